//! Which interfaces lead to clients: uplinks, which are those named or every one that carries a default route, and the
//! node's ends of pods' links; and which routes lead to pods. Followed as interfaces and routes come and go. Knows netlink;
//! knows nothing of programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
    packet_route::{
        AddressFamily,
        link::{InfoKind, InfoPortKind, LinkAttribute, LinkInfo, LinkLayerType, LinkXdp},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};
use tokio::{sync::watch, time};

use super::reach::{Discard, Route, Routes, Target};

/// Whether packets of an interface start with an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LinkHeader {
    /// They do.
    Ethernet,
    /// They start with the IP header.
    None,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// `None` for link types that proxier cannot read.
    pub(super) header: Option<LinkHeader>,
    /// The node's end of a pair whose other end is in another network namespace.
    pub(super) leads_to_pod: bool,
    /// Whether it is a bridge.
    pub(super) is_bridge: bool,
    /// The bridge that it is a port of: what comes in goes on by that.
    pub(super) bridge: Option<u32>,
}

/// The interfaces, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// All there are.
    pub(super) interfaces: Vec<Interface>,
    /// Those that lead to clients outside.
    pub(super) uplinks: BTreeSet<Interface>,
    /// Those that lead to pods on this node, which may be clients too. None of them is an uplink.
    pub(super) pod_links: BTreeSet<Interface>,
    /// Names asked for that no interface has.
    pub(super) missing: BTreeSet<String>,
    /// Those that can tell how pods are reached.
    pub(super) routes: Routes,
    /// Where frames come in, by the index of the interface whose driver has them.
    pub(super) devices: BTreeMap<u32, Device>,
}

/// An interface with Ethernet frames, from its driver's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// The interface that its frames are seen at: itself, or the bond that it is a member of.
    pub(super) upper: u32,
    pub(super) mac: [u8; 6],
}

/// After a change, how long to wait for the ones that come with it.
const SETTLE: Duration = Duration::from_millis(100);
/// Netlink may lose messages under load: how often to look without being told.
const RELIST: Duration = Duration::from_secs(30);

/// Finds the uplinks and keeps finding them in the background, until the receiver is dropped.
///
/// # Errors
///
/// Netlink would not answer.
pub(super) async fn watch(named: BTreeSet<String>) -> anyhow::Result<watch::Receiver<View>> {
    let (events, _, mut changes) = new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ])
    .context("changes of interfaces and routes cannot be followed (netlink)")?;
    tokio::spawn(events);
    let (connection, handle, _) = new_connection().context("interfaces cannot be listed (netlink)")?;
    tokio::spawn(connection);

    let (sender, receiver) = watch::channel(list(&handle, &named).await?);
    tokio::spawn(async move {
        // As logged.
        let (mut is_closed, mut is_stale) = (false, false);
        loop {
            tokio::select! {
                change = changes.next() => if change.is_none() {
                    if !mem::replace(&mut is_closed, true) {
                        tracing::error!(
                            "the kernel tells of no more changes of interfaces and routes (netlink has closed): they are listed every \
                             {} seconds instead, so new pods and uplinks wait that long for their programs; restart the agent",
                            RELIST.as_secs()
                        );
                    }
                    time::sleep(RELIST).await;
                },
                () = time::sleep(RELIST) => {}
                () = sender.closed() => return,
            }
            time::sleep(SETTLE).await;
            while let Ok(Some(_)) = time::timeout(Duration::ZERO, changes.next()).await {}
            match list(&handle, &named).await {
                Ok(view) => {
                    if mem::take(&mut is_stale) {
                        tracing::info!("interfaces and routes can be listed again");
                    }
                    sender.send_if_modified(|known| {
                        let changed = *known != view;
                        *known = view;
                        changed
                    });
                }
                Err(error) => {
                    // Of an outage once.
                    if !mem::replace(&mut is_stale, true) {
                        tracing::warn!(
                            "{error:#}: programs stay on the uplinks and pods' links that have them, new ones get none; tried again at \
                             the next change, or after {} seconds; if it lasts, see whether `ip link` and `ip route` work on the node",
                            RELIST.as_secs()
                        );
                    }
                }
            }
        }
    });
    Ok(receiver)
}

async fn list(handle: &Handle, named: &BTreeSet<String>) -> anyhow::Result<View> {
    let mut interfaces = Vec::new();
    let mut devices = BTreeMap::new();
    let mut links = Box::pin(handle.link().get().execute());
    while let Some(link) = links.try_next().await.context("interfaces cannot be listed (netlink)")? {
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let index = link.header.index;
        devices.extend(device(index, &link.attributes).map(|device| (index, device)));
        if let Some(name) = name {
            interfaces.push(Interface {
                index,
                name,
                header: link_header(link.header.link_layer_type),
                leads_to_pod: leads_to_pod(&link.attributes),
                is_bridge: infos(&link.attributes)
                    .any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge))),
                bridge: controller(&link.attributes, &InfoPortKind::Bridge),
            });
        }
    }
    let (default, routes) = list_routes(handle).await?;
    let wanted: BTreeSet<u32> = if named.is_empty() {
        default
    } else {
        interfaces.iter().filter(|i| named.contains(&i.name)).map(|i| i.index).collect()
    };
    let routes = Routes::new(routes, &wanted);
    Ok(View { devices, ..view(interfaces, routes, &wanted, named) })
}

fn view(
    interfaces: Vec<Interface>,
    routes: Routes,
    wanted: &BTreeSet<u32>,
    named: &BTreeSet<String>,
) -> View {
    let by_name: BTreeMap<&str, u32> = interfaces.iter().map(|i| (i.name.as_str(), i.index)).collect();
    let missing = named.iter().filter(|name| !by_name.contains_key(name.as_str())).cloned().collect();
    let (uplinks, others): (BTreeSet<_>, BTreeSet<_>) =
        interfaces.iter().cloned().partition(|interface| wanted.contains(&interface.index));
    let pod_links = others.into_iter().filter(|interface| interface.leads_to_pod).collect();
    View { interfaces, uplinks, pod_links, missing, routes, devices: BTreeMap::new() }
}

/// Every container network plugin that gives a pod an interface of its own on the node makes such a pair.
fn leads_to_pod(attributes: &[LinkAttribute]) -> bool {
    let elsewhere = attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    let pair =
        infos(attributes).any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth | InfoKind::Netkit)));
    elsewhere && pair
}

fn infos(attributes: &[LinkAttribute]) -> impl Iterator<Item = &LinkInfo> {
    attributes.iter().flat_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.as_slice(),
        _ => &[],
    })
}

fn device(index: u32, attributes: &[LinkAttribute]) -> Option<Device> {
    let mac = attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    })?;
    Some(Device { upper: controller(attributes, &InfoPortKind::Bond).unwrap_or(index), mac })
}

/// What it is a port of, if that is of this kind.
fn controller(attributes: &[LinkAttribute], of_kind: &InfoPortKind) -> Option<u32> {
    if !infos(attributes).any(|info| matches!(info, LinkInfo::PortKind(kind) if kind == of_kind)) {
        return None;
    }
    attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

/// Which program is at XDP of the interface of this index, by the kernel's number; `None` if none is.
///
/// # Errors
///
/// Netlink would not answer.
pub(super) async fn xdp_program(index: u32) -> anyhow::Result<Option<u32>> {
    let (connection, handle, _) = new_connection().context("interfaces cannot be listed (netlink)")?;
    tokio::spawn(connection);
    let mut links = Box::pin(handle.link().get().match_index(index).execute());
    let Some(link) = links.try_next().await.context("an interface cannot be looked at (netlink)")? else {
        return Ok(None);
    };
    Ok(link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Xdp(facts) => facts.iter().find_map(|fact| match fact {
            LinkXdp::ProgId(id) => Some(*id),
            _ => None,
        }),
        _ => None,
    }))
}

/// The interfaces that carry a default route, and the routes that packets to pods may take.
async fn list_routes(handle: &Handle) -> anyhow::Result<(BTreeSet<u32>, Vec<Route>)> {
    let mut indices = BTreeSet::new();
    let mut kept = Vec::new();
    let requests =
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    for request in requests {
        let unspecified = match request.header.address_family {
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let mut routes = Box::pin(handle.route().get(request).execute());
        while let Some(route) = routes.try_next().await.context("routes cannot be listed (netlink)")? {
            indices.extend(interfaces_of_default_route(&route));
            kept.extend(route_to_pods(&route, unspecified));
        }
    }
    Ok((indices, kept))
}

/// A route that a packet to a pod may take: of the main table, or to the node itself. What rules for some packets have in other
/// tables, or a route for some sources alone, says nothing about a pod. `unspecified` is what a default route has as destination.
fn route_to_pods(route: &RouteMessage, unspecified: IpAddr) -> Option<Route> {
    let RouteHeader { table, kind, destination_prefix_length, source_prefix_length, .. } = route.header;
    let number = |wanted: fn(&RouteAttribute) -> Option<u32>| route.attributes.iter().find_map(wanted);
    let table = number(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    })
    .unwrap_or_else(|| table.into());
    let is_main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    let target = match kind {
        RouteType::Local => Target::Node,
        RouteType::Unicast if is_main => Target::Links(links_of(route).into_iter().collect()),
        RouteType::BlackHole if is_main => Target::Nowhere(Discard::Blackhole),
        RouteType::Unreachable if is_main => Target::Nowhere(Discard::Unreachable),
        RouteType::Prohibit if is_main => Target::Nowhere(Discard::Prohibit),
        _ => return None,
    };
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let destination = IpNet::new(destination.unwrap_or(unspecified), destination_prefix_length).ok()?;
    // Every interface has one of these.
    let is_of_link = matches!(destination.addr(), IpAddr::V6(address) if address.is_unicast_link_local());
    let priority = number(|attribute| match attribute {
        RouteAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    let is_gateway = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    };
    let has_gateway = route.attributes.iter().any(is_gateway);
    let priority = priority.unwrap_or(0);
    (source_prefix_length == 0 && !is_of_link).then_some(Route { destination, target, has_gateway, priority })
}

/// In any table: with policy routing, replies leave by the default route of another one.
fn interfaces_of_default_route(route: &RouteMessage) -> Vec<u32> {
    if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    links_of(route)
}

fn links_of(route: &RouteMessage) -> Vec<u32> {
    route
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => vec![*index],
            RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
            _ => Vec::new(),
        })
        .collect()
}

fn link_header(kind: LinkLayerType) -> Option<LinkHeader> {
    match kind {
        LinkLayerType::Ether | LinkLayerType::Loopback => Some(LinkHeader::Ethernet),
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => Some(LinkHeader::None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            header: Some(LinkHeader::Ethernet),
            leads_to_pod: false,
            is_bridge: false,
            bridge: None,
        }
    }

    #[test]
    fn a_pair_with_one_end_elsewhere_leads_to_a_pod_unless_it_is_an_uplink() {
        let to_pod = |index, name| Interface { leads_to_pod: true, ..interface(index, name) };
        let interfaces = vec![interface(1, "lo"), to_pod(2, "eth0"), to_pod(3, "cali1")];
        let view = view(interfaces, Routes::default(), &BTreeSet::from([2]), &BTreeSet::new());
        assert_eq!(view.uplinks, BTreeSet::from([to_pod(2, "eth0")]));
        assert_eq!(view.pod_links, BTreeSet::from([to_pod(3, "cali1")]));
    }

    #[test]
    fn a_name_that_no_interface_has_is_missing() {
        let named = BTreeSet::from(["eth0".to_owned(), "bond9".to_owned()]);
        let interfaces = vec![interface(1, "lo"), interface(2, "eth0")];
        let view = view(interfaces, Routes::default(), &BTreeSet::from([2]), &named);
        assert_eq!(view.uplinks, BTreeSet::from([interface(2, "eth0")]));
        assert_eq!(view.missing, BTreeSet::from(["bond9".to_owned()]));
    }

    #[test]
    fn a_members_frames_are_seen_at_its_bond_and_a_ports_at_itself() {
        let mac = [2, 0, 0, 0, 0, 7];
        let of = |kind, mac: &[u8]| {
            let port = LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(kind)]);
            device(7, &[LinkAttribute::Address(mac.to_vec()), port, LinkAttribute::Controller(9)])
        };
        assert_eq!(of(InfoPortKind::Bond, &mac), Some(Device { upper: 9, mac }));
        assert_eq!(of(InfoPortKind::Bridge, &mac), Some(Device { upper: 7, mac }));
        assert_eq!(of(InfoPortKind::Bond, &[10, 0, 0, 1]), None, "that of a tunnel");
        assert_eq!(device(7, &[]), None);
    }

    #[test]
    fn only_unicast_routes_of_length_zero_are_default_routes() {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Oif(7)];
        assert_eq!(interfaces_of_default_route(&route), [7]);
        route.header.destination_prefix_length = 8;
        assert!(interfaces_of_default_route(&route).is_empty());
        route.header.destination_prefix_length = 0;
        route.header.kind = RouteType::Unreachable;
        assert!(interfaces_of_default_route(&route).is_empty());
    }

    #[test]
    fn routes_to_pods_are_those_of_the_main_table_and_to_the_node_itself() {
        let route = |table: u32, kind, destination: Option<Ipv6Addr>, length| {
            let mut route = RouteMessage::default();
            route.header.kind = kind;
            route.header.destination_prefix_length = length;
            let to = destination.map(|address| RouteAttribute::Destination(RouteAddress::Inet6(address)));
            let rest = [RouteAttribute::Table(table), RouteAttribute::Oif(7), RouteAttribute::Priority(9)];
            route.attributes = rest.into_iter().chain(to).collect();
            route_to_pods(&route, Ipv6Addr::UNSPECIFIED.into())
        };
        let pod: Ipv6Addr = "1100::5".parse().unwrap();
        let by_link = |destination: &str| Route {
            destination: destination.parse().unwrap(),
            target: Target::Links(BTreeSet::from([7])),
            has_gateway: false,
            priority: 9,
        };
        assert_eq!(route(254, RouteType::Unicast, Some(pod), 128), Some(by_link("1100::5/128")));
        assert_eq!(route(254, RouteType::Unicast, None, 0), Some(by_link("::/0")));
        for (kind, discard) in [
            (RouteType::BlackHole, Discard::Blackhole),
            (RouteType::Unreachable, Discard::Unreachable),
            (RouteType::Prohibit, Discard::Prohibit),
        ] {
            let thrown_away = Route { target: Target::Nowhere(discard), ..by_link("1100::5/128") };
            assert_eq!(route(254, kind, Some(pod), 128), Some(thrown_away));
        }
        let own = Route { target: Target::Node, ..by_link("1100::5/128") };
        assert_eq!(route(255, RouteType::Local, Some(pod), 128), Some(own));
        assert_eq!(route(1000, RouteType::Unicast, Some(pod), 128), None, "of another table");
        assert_eq!(route(255, RouteType::Multicast, Some("ff00::".parse().unwrap()), 8), None);
        assert_eq!(
            route(254, RouteType::Unicast, Some("fe80::".parse().unwrap()), 64),
            None,
            "of every link"
        );
    }
}
