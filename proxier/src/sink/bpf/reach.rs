//! Whether packets can go to a pod past the node's stack, and by which link: what direct delivery needs to know of the node
//! (docs/decisions/017). Pure; the routes and interfaces come from `uplinks`, where the programs are from `attach`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use proxier_common::{Address, DIRECT_DELIVERY_SINCE};

use super::{preflight, uplinks::Interface};
use crate::{
    delta::{PodLink, PodLinks},
    model::Family,
};

/// A route of the node's main table, or one to an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Where it leads.
    pub(super) destination: IpNet,
    /// By what.
    pub(super) target: Target,
    /// Whether another router is next.
    pub(super) has_gateway: bool,
    /// Of several to the same destination the lowest counts.
    pub(super) priority: u32,
}

/// By what a route leads somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// To the node itself.
    Node,
    /// By these links.
    Links(BTreeSet<u32>),
    /// Nowhere: its packets are thrown away.
    Nowhere(Discard),
}

/// A type of route whose packets are thrown away, by the name that `ip route` has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Discard {
    /// Nobody is told.
    Blackhole,
    /// The sender is told that the host is unreachable.
    Unreachable,
    /// The sender is told that it is forbidden.
    Prohibit,
}

impl fmt::Display for Discard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blackhole => "blackhole",
            Self::Unreachable => "unreachable",
            Self::Prohibit => "prohibit",
        })
    }
}

/// The routes that can tell how pods are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Routes(BTreeMap<IpNet, Target>);

impl Routes {
    /// Of all routes those that lead elsewhere than to a router by `uplinks`, and the exceptions of these: a node that speaks BGP
    /// may have a million others.
    pub(super) fn new(routes: Vec<Route>, uplinks: &BTreeSet<u32>) -> Self {
        let is_elsewhere = |route: &Route| match &route.target {
            Target::Node | Target::Nowhere(_) => true,
            Target::Links(links) => links.is_empty() || !route.has_gateway || !links.is_subset(uplinks),
        };
        let (elsewhere, by_uplink): (Vec<Route>, Vec<Route>) = routes.into_iter().partition(is_elsewhere);
        let mut kept = Self::default();
        let mut priorities = BTreeMap::new();
        for route in elsewhere {
            kept.add(route, &mut priorities);
        }
        let exceptions: Vec<Route> =
            by_uplink.into_iter().filter(|route| kept.has_around(route.destination)).collect();
        for route in exceptions {
            kept.add(route, &mut priorities);
        }
        kept
    }

    fn add(&mut self, route: Route, priorities: &mut BTreeMap<IpNet, u32>) {
        let Route { destination, target, priority, .. } = route;
        // The table of the node's own addresses is asked first.
        let priority = if target == Target::Node { 0 } else { priority };
        match (self.0.get_mut(&destination), target) {
            (Some(Target::Links(known)), Target::Links(more)) if priorities[&destination] == priority => {
                // The hops of one, told one by one.
                known.extend(more);
            }
            (Some(Target::Node), _) => {}
            (Some(_), Target::Links(_) | Target::Nowhere(_)) if priorities[&destination] < priority => {}
            (_, target) => {
                self.0.insert(destination, target);
                priorities.insert(destination, priority);
            }
        }
    }

    /// Whether there is a route to the same network, or to one that holds it; a default route is none.
    fn has_around(&self, net: IpNet) -> bool {
        self.matching(net.network(), net.prefix_len()).any(|(net, _)| net.prefix_len() != 0)
    }

    /// The most specific route to an address.
    fn to(&self, address: IpAddr) -> Option<(IpNet, &Target)> {
        let length = if address.is_ipv4() { 32 } else { 128 };
        self.matching(address, length).next()
    }

    /// The routes to networks around an address, from those of this length on, the most specific first.
    fn matching(&self, address: IpAddr, length: u8) -> impl Iterator<Item = (IpNet, &Target)> {
        (0..=length).rev().filter_map(move |length| {
            let net = IpNet::new(address, length).ok()?.trunc();
            Some((net, self.0.get(&net)?))
        })
    }
}

/// Which kind of link.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Of a pod's own.
    OfPod,
    /// A bridge with pods on these of its ports.
    Bridge(BTreeSet<u32>),
    /// One towards clients.
    Uplink,
    /// Anything else.
    Other,
}

/// What a link is to direct delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    name: String,
    kind: Kind,
    /// Whether the programs of a pod's link are on it.
    has_programs: bool,
}

/// What programs are on which interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Programs {
    /// Those of uplinks.
    pub(super) uplinks: BTreeSet<u32>,
    /// Those of pods' links and ports.
    pub(super) pod_links: BTreeSet<u32>,
    /// Whether, of the uplinks, there are some, and none has an Ethernet header.
    pub(super) no_ethernet: bool,
    /// Whether the kernel is one whose programs do not deliver directly.
    pub(super) too_old: bool,
}

/// How pods are reached, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reach {
    routes: Routes,
    links: BTreeMap<u32, Link>,
    has_uplink: bool,
    no_ethernet: bool,
    too_old: bool,
    not_forwarding: BTreeSet<Family>,
}

/// Why no packet reaches a pod directly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Obstacle {
    NoUplink,
    NotForwarding(Family),
    Kernel,
    NoEthernet,
    NoRoute,
    /// What the route is to that counts, and of which type.
    Discarded(IpNet, Discard),
    NoInterface,
    OfNode,
    SeveralLinks,
    Uplink(String),
    NoPodLink(String),
    Unattached(String),
}

impl Obstacle {
    /// Whether it is one of the node, of which the log has a line by itself: nothing gets through then, directly or not.
    pub(super) const fn is_reported_elsewhere(&self) -> bool {
        matches!(self, Self::NoUplink | Self::NotForwarding(_))
    }

    /// In words, of this pod.
    pub(super) const fn of(&self, pod: IpAddr) -> ObstacleOf<'_> {
        ObstacleOf { obstacle: self, pod }
    }
}

/// An obstacle before a pod: why, and what to do about it.
#[derive(Debug)]
pub(super) struct ObstacleOf<'a> {
    obstacle: &'a Obstacle,
    pod: IpAddr,
}

/// What to do where nothing is wrong.
const OPT_OUT: &str = "annotate its Service with proxier.io/delivery: stack";

impl fmt::Display for ObstacleOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { obstacle, pod } = self;
        match obstacle {
            Obstacle::NoUplink => f.write_str(
                "the node has no uplink, so nothing comes from outside: give it a default route, or name the interfaces towards \
                 clients with --uplink",
            ),
            Obstacle::NotForwarding(family) => {
                let parameter = preflight::forwarding_parameter(*family);
                write!(
                    f,
                    "the node forwards no {family}, by its stack neither: run `sysctl -w {parameter}=1`"
                )
            }
            Obstacle::Kernel => {
                let (major, minor) = DIRECT_DELIVERY_SINCE;
                write!(
                    f,
                    "this kernel is older than Linux {major}.{minor}, the first with direct delivery: boot a newer one, or \
                     {OPT_OUT}"
                )
            }
            Obstacle::NoEthernet => write!(
                f,
                "no uplink has Ethernet headers, which a packet needs to go into a pod: if clients come by an interface that has \
                 them, name it with --uplink; else {OPT_OUT}"
            ),
            Obstacle::NoRoute => write!(
                f,
                "no route of the main table leads to it but by a router at an uplink: see `ip route get {pod}`; the pod network's \
                 plugin has to add one by the pod's link"
            ),
            Obstacle::Discarded(net, discard) => write!(
                f,
                "the route to {net} is of type {discard}, so the kernel throws packets to it away: see `ip route get {pod}`, and \
                 remove that route or add one by the pod's link"
            ),
            Obstacle::NoInterface => write!(
                f,
                "its route names no interface that there is: see `ip route get {pod}`; the pod network's plugin has to mend it"
            ),
            Obstacle::OfNode => write!(
                f,
                "its address is one of the node's own, as with hostNetwork, to which only the stack delivers: give the pod one of \
                 its own, or {OPT_OUT}"
            ),
            Obstacle::SeveralLinks => {
                let family = if pod.is_ipv4() { "-4" } else { "-6" };
                write!(
                    f,
                    "its route has several links: see `ip {family} route show match {pod}`; give it a route by one, or {OPT_OUT}"
                )
            }
            Obstacle::Uplink(link) => write!(
                f,
                "its route leads to {link}, which is an uplink: if no clients come by it, name the other uplinks with --uplink; \
                 else {OPT_OUT}"
            ),
            Obstacle::NoPodLink(link) => write!(
                f,
                "its route leads to {link}, which is neither a pod's own link (veth, netkit) nor a bridge with such: this \
                 pod network knows no direct delivery; {OPT_OUT}"
            ),
            Obstacle::Unattached(link) => {
                write!(f, "the programs are not on its link {link} yet; if that lasts, the log says why")
            }
        }
    }
}

impl Reach {
    pub(super) fn new(
        interfaces: &[Interface],
        routes: Routes,
        programs: &Programs,
        not_forwarding: BTreeSet<Family>,
    ) -> Self {
        let link = |interface: &Interface| {
            let Interface { index, name, leads_to_pod, is_bridge, bridge, .. } = interface;
            let ports = || {
                let ports = interfaces.iter().filter(|port| port.leads_to_pod && port.bridge == Some(*index));
                ports.map(|port| port.index).collect::<BTreeSet<u32>>()
            };
            let kind = if programs.uplinks.contains(index) {
                Kind::Uplink
            } else if *leads_to_pod && bridge.is_none() {
                Kind::OfPod
            } else if *is_bridge && !ports().is_empty() {
                Kind::Bridge(ports())
            } else {
                Kind::Other
            };
            let has_programs = programs.pod_links.contains(index);
            (*index, Link { name: name.clone(), kind, has_programs })
        };
        let links = interfaces.iter().map(link).collect();
        let Programs { no_ethernet, too_old, .. } = *programs;
        let has_uplink = !programs.uplinks.is_empty();
        Self { routes, links, has_uplink, no_ethernet, too_old, not_forwarding }
    }

    /// Whether it takes these families for those that the node does not forward.
    pub(super) fn is_of(&self, not_forwarding: &BTreeSet<Family>) -> bool {
        self.not_forwarding == *not_forwarding
    }

    /// What keeps packets from going to `pod` directly. Without an uplink the tables keep the links of pods: it may be back in a
    /// moment, and conversations with it.
    pub(super) fn obstacle(&self, pod: IpAddr) -> Option<Obstacle> {
        if self.has_uplink { self.of(pod).err() } else { Some(Obstacle::NoUplink) }
    }

    /// The link by which `pod` is reached past the node's stack.
    pub(super) fn of(&self, pod: IpAddr) -> Result<PodLink, Obstacle> {
        let family = Family::of(pod);
        if self.not_forwarding.contains(&family) {
            return Err(Obstacle::NotForwarding(family));
        }
        if self.too_old {
            return Err(Obstacle::Kernel);
        }
        if self.no_ethernet {
            return Err(Obstacle::NoEthernet);
        }
        let (interface, link) = self.route_to(pod)?;
        let unattached = match &link.kind {
            Kind::OfPod => (!link.has_programs).then_some(link),
            // Its packets come in by any of them.
            Kind::Bridge(ports) => {
                let mut ports = ports.iter().filter_map(|port| self.links.get(port));
                ports.find(|port| !port.has_programs)
            }
            Kind::Uplink => return Err(Obstacle::Uplink(link.name.clone())),
            Kind::Other => return Err(Obstacle::NoPodLink(link.name.clone())),
        };
        match unattached {
            Some(unattached) => Err(Obstacle::Unattached(unattached.name.clone())),
            // Every kernel that proxier supports has `bpf_redirect_peer`.
            None => Ok(PodLink { interface, has_peer: link.kind == Kind::OfPod }),
        }
    }

    /// The links at which the programs have to be so that `pod` can be reached.
    pub(super) fn needs(&self, pod: IpAddr) -> BTreeSet<u32> {
        match self.route_to(pod) {
            Ok((interface, Link { kind: Kind::OfPod, .. })) => BTreeSet::from([interface]),
            Ok((_, Link { kind: Kind::Bridge(ports), .. })) => ports.clone(),
            _ => BTreeSet::new(),
        }
    }

    fn route_to(&self, pod: IpAddr) -> Result<(u32, &Link), Obstacle> {
        let links = match self.routes.to(pod) {
            None => return Err(Obstacle::NoRoute),
            Some((_, Target::Node)) => return Err(Obstacle::OfNode),
            Some((net, Target::Nowhere(discard))) => return Err(Obstacle::Discarded(net, *discard)),
            Some((_, Target::Links(links))) => links,
        };
        let mut links = links.iter();
        match (links.next(), links.next()) {
            (Some(index), None) => {
                let link = self.links.get(index).ok_or(Obstacle::NoInterface)?;
                Ok((*index, link))
            }
            (Some(_), Some(_)) => Err(Obstacle::SeveralLinks),
            (None, _) => Err(Obstacle::NoInterface),
        }
    }
}

impl PodLinks for Reach {
    fn link_of(&self, pod: Address) -> Option<PodLink> {
        self.of(pod.to_ip()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::bpf::uplinks::LinkHeader;

    fn by(destination: &str, links: &[u32]) -> Route {
        let target = Target::Links(links.iter().copied().collect());
        Route { destination: destination.parse().unwrap(), target, has_gateway: false, priority: 0 }
    }

    fn via(destination: &str, links: &[u32]) -> Route {
        Route { has_gateway: true, ..by(destination, links) }
    }

    fn interface(index: u32) -> Interface {
        Interface {
            index,
            name: format!("link{index}"),
            header: Some(LinkHeader::Ethernet),
            leads_to_pod: false,
            is_bridge: false,
            bridge: None,
        }
    }

    fn of_pod(index: u32) -> Interface {
        Interface { leads_to_pod: true, ..interface(index) }
    }

    /// An uplink, 1; links of pods, 2 to 4, the last one without programs; two bridges, 5 with the ports 6 and 7, and 8 with 9
    /// and 10, the latter without programs; 11, another one; a bridge without pods, 12.
    fn interfaces() -> Vec<Interface> {
        let bridge = |index| Interface { is_bridge: true, ..interface(index) };
        let port = |index, bridge| Interface { bridge: Some(bridge), ..of_pod(index) };
        vec![
            interface(1),
            of_pod(2),
            of_pod(3),
            of_pod(4),
            bridge(5),
            port(6, 5),
            port(7, 5),
            bridge(8),
            port(9, 8),
            port(10, 8),
            interface(11),
            bridge(12),
        ]
    }

    fn programs() -> Programs {
        Programs { uplinks: [1].into(), pod_links: [2, 3, 6, 7, 9].into(), ..Programs::default() }
    }

    fn reach_by(routes: Vec<Route>) -> Reach {
        let routes = Routes::new(routes, &BTreeSet::from([1]));
        Reach::new(&interfaces(), routes, &programs(), BTreeSet::new())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn peer(interface: u32) -> Result<PodLink, Obstacle> {
        Ok(PodLink { interface, has_peer: true })
    }

    #[test]
    fn the_most_specific_route_says_which_link_leads_to_a_pod() {
        let reach = reach_by(vec![
            via("0.0.0.0/0", &[1]),
            by("11.0.0.0/16", &[5]),
            by("11.0.0.5/32", &[3]),
            by("1100::5/128", &[2]),
            via("11.0.7.0/24", &[1]),
            by("11.9.0.9/32", &[1]),
        ]);
        assert_eq!(reach.of(ip("11.0.0.5")), peer(3));
        assert_eq!(reach.of(ip("1100::5")), peer(2));
        assert_eq!(reach.of(ip("11.0.0.6")), Ok(PodLink { interface: 5, has_peer: false }));
        assert_eq!(reach.of(ip("11.0.7.1")), Err(Obstacle::Uplink("link1".to_owned())), "an exception");
        assert_eq!(reach.of(ip("11.9.0.9")), Err(Obstacle::Uplink("link1".to_owned())), "without a router");
        assert_eq!(reach.of(ip("12.0.0.1")), Err(Obstacle::NoRoute));
        assert_eq!(reach.of(ip("1100::1")), Err(Obstacle::NoRoute));
    }

    #[test]
    fn routes_that_name_no_pods_link_are_obstacles() {
        let own = Route { target: Target::Node, ..by("11.0.0.4/32", &[]) };
        let reach = reach_by(vec![
            by("11.0.0.0/24", &[2]),
            by("11.0.0.1/32", &[2, 3]),
            Route { target: Target::Nowhere(Discard::Blackhole), ..by("11.0.0.2/32", &[]) },
            by("11.0.0.5/32", &[]),
            by("11.0.0.3/32", &[11]),
            own,
            by("11.0.0.4/32", &[2]),
            by("11.0.0.6/32", &[12]),
            by("11.0.0.7/32", &[99]),
        ]);
        let obstacle = |pod: &str| reach.of(ip(pod)).unwrap_err();
        assert_eq!(obstacle("11.0.0.1"), Obstacle::SeveralLinks);
        assert_eq!(
            obstacle("11.0.0.2"),
            Obstacle::Discarded("11.0.0.2/32".parse().unwrap(), Discard::Blackhole)
        );
        assert_eq!(obstacle("11.0.0.5"), Obstacle::NoInterface, "none is named");
        assert_eq!(obstacle("11.0.0.3"), Obstacle::NoPodLink("link11".to_owned()));
        assert_eq!(obstacle("11.0.0.4"), Obstacle::OfNode);
        assert_eq!(obstacle("11.0.0.6"), Obstacle::NoPodLink("link12".to_owned()), "nobody is on the bridge");
        assert_eq!(obstacle("11.0.0.7"), Obstacle::NoInterface, "it has gone since");
        assert_eq!(reach.of(ip("11.0.0.8")), peer(2));
    }

    #[test]
    fn a_pod_whose_link_lacks_the_programs_is_reached_once_they_are_there() {
        let routes = vec![by("11.0.0.2/32", &[4]), by("11.0.1.0/24", &[8]), by("11.0.2.0/24", &[5])];
        let reach = reach_by(routes.clone());
        assert_eq!(reach.of(ip("11.0.0.2")), Err(Obstacle::Unattached("link4".to_owned())));
        assert_eq!(reach.of(ip("11.0.1.1")), Err(Obstacle::Unattached("link10".to_owned())));
        assert_eq!(reach.needs(ip("11.0.0.2")), BTreeSet::from([4]));
        assert_eq!(reach.needs(ip("11.0.1.1")), BTreeSet::from([9, 10]));
        assert_eq!(reach.needs(ip("11.0.2.1")), BTreeSet::from([6, 7]), "also if they are there");
        assert_eq!(reach.needs(ip("12.0.0.1")), BTreeSet::new());
        let programs = Programs { pod_links: [4, 9, 10].into(), ..programs() };
        let reach = Reach::new(&interfaces(), Routes::new(routes, &[1].into()), &programs, BTreeSet::new());
        assert_eq!(reach.of(ip("11.0.0.2")), peer(4));
        assert_eq!(reach.of(ip("11.0.1.1")), Ok(PodLink { interface: 8, has_peer: false }));
        assert_eq!(reach.of(ip("11.0.2.1")), Err(Obstacle::Unattached("link6".to_owned())));
    }

    #[test]
    fn a_node_that_does_not_forward_or_has_no_ethernet_uplink_delivers_nothing_directly() {
        let routes = || Routes::new(vec![by("11.0.0.2/32", &[2]), by("1100::2/128", &[2])], &[1].into());
        let reach = Reach::new(&interfaces(), routes(), &programs(), [Family::V6].into());
        assert_eq!(reach.of(ip("11.0.0.2")), peer(2));
        assert_eq!(reach.of(ip("1100::2")), Err(Obstacle::NotForwarding(Family::V6)));
        let programs = Programs { no_ethernet: true, ..programs() };
        let reach = Reach::new(&interfaces(), routes(), &programs, BTreeSet::new());
        assert_eq!(reach.of(ip("11.0.0.2")), Err(Obstacle::NoEthernet));
        let programs = Programs { too_old: true, ..programs };
        let reach = Reach::new(&interfaces(), routes(), &programs, BTreeSet::new());
        assert_eq!(reach.of(ip("11.0.0.2")), Err(Obstacle::Kernel));
    }

    #[test]
    fn without_an_uplink_nothing_comes_from_outside_but_the_links_of_pods_stay() {
        let routes = || Routes::new(vec![by("11.0.0.2/32", &[2])], &BTreeSet::new());
        let programs = Programs { uplinks: BTreeSet::new(), ..programs() };
        let reach = Reach::new(&interfaces(), routes(), &programs, BTreeSet::new());
        assert_eq!(reach.obstacle(ip("11.0.0.2")), Some(Obstacle::NoUplink));
        assert_eq!(reach.of(ip("11.0.0.2")), peer(2));
        let reach = reach_by(vec![by("11.0.0.2/32", &[2])]);
        assert_eq!(reach.obstacle(ip("11.0.0.2")), None);
        assert_eq!(reach.obstacle(ip("12.0.0.1")), Some(Obstacle::NoRoute));
    }

    #[test]
    fn every_obstacle_is_told_with_its_object_the_reason_and_what_to_do() {
        let link = || "veth1".to_owned();
        let all = [
            Obstacle::NoUplink,
            Obstacle::NotForwarding(Family::V6),
            Obstacle::Kernel,
            Obstacle::NoEthernet,
            Obstacle::NoRoute,
            Obstacle::Discarded("1100::/64".parse().unwrap(), Discard::Unreachable),
            Obstacle::Discarded("1100::2/128".parse().unwrap(), Discard::Prohibit),
            Obstacle::NoInterface,
            Obstacle::OfNode,
            Obstacle::SeveralLinks,
            Obstacle::Uplink(link()),
            Obstacle::NoPodLink(link()),
            Obstacle::Unattached(link()),
        ];
        let told: Vec<String> = all.iter().map(|obstacle| obstacle.of(ip("1100::2")).to_string()).collect();
        insta::assert_snapshot!(told.join("\n"), @"
        the node has no uplink, so nothing comes from outside: give it a default route, or name the interfaces towards clients with --uplink
        the node forwards no IPv6, by its stack neither: run `sysctl -w net.ipv6.conf.all.forwarding=1`
        this kernel is older than Linux 6.4, the first with direct delivery: boot a newer one, or annotate its Service with proxier.io/delivery: stack
        no uplink has Ethernet headers, which a packet needs to go into a pod: if clients come by an interface that has them, name it with --uplink; else annotate its Service with proxier.io/delivery: stack
        no route of the main table leads to it but by a router at an uplink: see `ip route get 1100::2`; the pod network's plugin has to add one by the pod's link
        the route to 1100::/64 is of type unreachable, so the kernel throws packets to it away: see `ip route get 1100::2`, and remove that route or add one by the pod's link
        the route to 1100::2/128 is of type prohibit, so the kernel throws packets to it away: see `ip route get 1100::2`, and remove that route or add one by the pod's link
        its route names no interface that there is: see `ip route get 1100::2`; the pod network's plugin has to mend it
        its address is one of the node's own, as with hostNetwork, to which only the stack delivers: give the pod one of its own, or annotate its Service with proxier.io/delivery: stack
        its route has several links: see `ip -6 route show match 1100::2`; give it a route by one, or annotate its Service with proxier.io/delivery: stack
        its route leads to veth1, which is an uplink: if no clients come by it, name the other uplinks with --uplink; else annotate its Service with proxier.io/delivery: stack
        its route leads to veth1, which is neither a pod's own link (veth, netkit) nor a bridge with such: this pod network knows no direct delivery; annotate its Service with proxier.io/delivery: stack
        the programs are not on its link veth1 yet; if that lasts, the log says why
        ");
    }

    #[test]
    fn of_routes_to_one_network_the_lowest_metric_counts_and_hops_told_apart_are_one_route() {
        let with = |priority, route| Route { priority, ..route };
        let routes = vec![
            with(1024, by("11.0.0.2/32", &[3])),
            with(256, by("11.0.0.2/32", &[2])),
            with(512, by("11.0.0.2/32", &[4])),
            with(256, by("1100::1/128", &[2])),
            with(256, by("1100::1/128", &[3])),
        ];
        let reach = reach_by(routes);
        assert_eq!(reach.of(ip("11.0.0.2")), peer(2));
        assert_eq!(reach.of(ip("1100::1")), Err(Obstacle::SeveralLinks));
    }

    #[test]
    fn routes_to_routers_by_uplinks_are_kept_only_where_they_are_exceptions() {
        let routes = vec![
            via("0.0.0.0/0", &[1]),
            via("10.0.0.0/8", &[1]),
            by("11.0.0.0/16", &[5]),
            via("11.0.3.0/24", &[1]),
            via("12.0.0.0/8", &[1, 2]),
            by("13.0.0.0/24", &[1]),
        ];
        let Routes(kept) = Routes::new(routes, &BTreeSet::from([1]));
        let kept: Vec<String> = kept.keys().map(ToString::to_string).collect();
        assert_eq!(kept, ["11.0.0.0/16", "11.0.3.0/24", "12.0.0.0/8", "13.0.0.0/24"]);
    }

    #[test]
    fn a_route_that_throws_packets_away_counts_by_its_metric_as_others_do() {
        let nowhere = |priority| Route {
            target: Target::Nowhere(Discard::Unreachable),
            priority,
            ..by("11.0.0.0/24", &[])
        };
        let by_link = Route { priority: 512, ..by("11.0.0.0/24", &[2]) };
        let discarded = Err(Obstacle::Discarded("11.0.0.0/24".parse().unwrap(), Discard::Unreachable));
        for (priority, expected) in [(1024, peer(2)), (256, discarded)] {
            let mut routes = vec![by_link.clone(), nowhere(priority)];
            assert_eq!(reach_by(routes.clone()).of(ip("11.0.0.2")), expected);
            routes.reverse();
            assert_eq!(reach_by(routes).of(ip("11.0.0.2")), expected, "told in the other order");
        }
    }
}
