//! The lab's namespaces and what connects them, one function a link. What belongs together is the lab's to know.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::Context as _;

use super::{Lab, LabSpec, NODE_V4, NODE_V6, PodNetwork, PodSpec, UPLINK, pod_link};
use crate::{
    host::{Host, INTERFACE, Output},
    netns::Namespace,
};

/// The bridge of pods.
const BRIDGE: &str = "cni0";
const BRIDGE_V4: Ipv4Addr = Ipv4Addr::new(11, 0, 2, 1);
const BRIDGE_V6: Ipv6Addr = Ipv6Addr::new(0x1100, 0, 0, 0, 0, 0, 0, 1);
/// The router's interfaces.
const TO_NODE: &str = "node0";
const TO_CLIENT: &str = "client0";

const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x64];
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 3, 1];
const TO_NODE_MAC: [u8; 6] = [2, 0, 0, 0, 4, 1];
const TO_CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 4, 2];

/// What fits a pod's link once it is narrow. Less than an Ethernet, more than what the node's routes let through: that
/// a host chooses its segments by the one must not hide that nobody tells it of the other.
const NARROW_LINK: u32 = 1400;
/// What fits a way that is narrow further on, as behind a tunnel. Nobody but the router before it knows.
const NARROW_WAY: u32 = 1300;

/// The address of host `host` in the lab's subnet `subnet`. Its digits are written the same in both families, though those of
/// IPv6 are hexadecimal.
fn addresses(subnet: u8, host: u8) -> (Ipv4Addr, Ipv6Addr) {
    let digits = u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4 | u16::from(host % 10);
    (Ipv4Addr::new(192, 168, subnet, host), Ipv6Addr::new(0xfd00, subnet.into(), 0, 0, 0, 0, 0, digits))
}

fn new_namespace(name: &str) -> anyhow::Result<Namespace> {
    let namespace = Namespace::create(name)?;
    // Duplicate address detection would keep IPv6 silent for a second or two.
    for parameter in ["accept_dad", "dad_transmits", "accept_ra", "router_solicitations"] {
        namespace.sysctl(&format!("net.ipv6.conf.default.{parameter}"), "0")?;
    }
    // A host tells another of one error a second, once the first six are told, and a lab's have more than that to tell.
    for parameter in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"] {
        namespace.sysctl(parameter, "0")?;
    }
    Ok(namespace)
}

/// A namespace that forwards.
pub(super) fn new_router(name: &str) -> anyhow::Result<Namespace> {
    let namespace = new_namespace(name)?;
    for parameter in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
        namespace.sysctl(parameter, "1")?;
    }
    Ok(namespace)
}

/// One end of a link.
struct End<'a> {
    namespace: &'a Namespace,
    interface: &'a str,
    mac: [u8; 6],
}

/// Makes a link, with the offloads that the spec wants.
fn link(spec: &LabSpec, one: &End<'_>, other: &End<'_>) -> anyhow::Result<()> {
    one.namespace.ip(&format!(
        "link add {} address {} type veth peer name {} address {} netns {}",
        one.interface,
        mac(one.mac),
        other.interface,
        mac(other.mac),
        other.namespace.name(),
    ))?;
    if !spec.offloads {
        for end in [one, other] {
            without_offloads(end.namespace, end.interface)?;
        }
    }
    Ok(())
}

/// Makes the client and its way to the node.
pub(super) fn connect_client(
    spec: &LabSpec,
    node: &Namespace,
    router: Option<&Namespace>,
    name: &str,
) -> anyhow::Result<Host> {
    let client = new_namespace(name)?;
    let uplink = End { namespace: node, interface: UPLINK, mac: UPLINK_MAC };
    let (subnet, gateway, (gateway_v4, gateway_v6)) = match router {
        None => (1, uplink, (NODE_V4, NODE_V6)),
        Some(router) => {
            link(spec, &End { namespace: router, interface: TO_NODE, mac: TO_NODE_MAC }, &uplink)?;
            (2, End { namespace: router, interface: TO_CLIENT, mac: TO_CLIENT_MAC }, addresses(2, 1))
        }
    };
    link(spec, &End { namespace: &client, interface: INTERFACE, mac: CLIENT_MAC }, &gateway)?;
    let own: Vec<(Ipv4Addr, Ipv6Addr)> =
        (0..spec.clients).map(|index| addresses(subnet, 100 + index)).collect();
    let mut batch = String::new();
    for (v4, v6) in &own {
        // A route may name a source address only once that is past duplicate address detection.
        let _ =
            writeln!(batch, "address add {v4}/24 dev {INTERFACE}\naddress add {v6}/64 dev {INTERFACE} nodad");
    }
    let (v4, v6) = own[0];
    client.ip(&format!("{batch}link set {INTERFACE} up\n"))?;
    node.ip(&format!(
        "address add {NODE_V4}/24 dev {UPLINK}\naddress add {NODE_V6}/64 dev {UPLINK} nodad\nlink set {UPLINK} up\n"
    ))?;
    let (beyond_v4, beyond_v6) = match router {
        None => (v4, v6),
        Some(router) => {
            let (v4, v6) = addresses(1, 254);
            router.ip(&format!(
                "address add {v4}/24 dev {TO_NODE}\naddress add {v6}/64 dev {TO_NODE} nodad\n\
                 address add {gateway_v4}/24 dev {TO_CLIENT}\naddress add {gateway_v6}/64 dev {TO_CLIENT} nodad\n\
                 link set {TO_NODE} up\nlink set {TO_CLIENT} up\n\
                 route add default via {NODE_V4}\nroute add default via {NODE_V6}\n"
            ))?;
            (v4, v6)
        }
    };
    client.ip(&format!(
        "route add default via {gateway_v4} src {v4}\nroute add default via {gateway_v6} src {v6}\n"
    ))?;
    node.ip(&format!("route add default via {beyond_v4}\nroute add default via {beyond_v6}\n"))?;
    Ok(Host {
        name: "client".to_owned(),
        namespace: client,
        addresses: own.into_iter().flat_map(|(v4, v6)| [IpAddr::V4(v4), IpAddr::V6(v6)]).collect(),
        interface: INTERFACE.to_owned(),
        output: Output::Link { mac: CLIENT_MAC, gateway_mac: gateway.mac },
    })
}

/// Makes the bridge that pods will be connected with.
pub(super) fn new_bridge(node: &Namespace) -> anyhow::Result<()> {
    node.ip(&format!(
        "link add {BRIDGE} address {} type bridge\naddress add {BRIDGE_V4}/24 dev {BRIDGE}\n\
         address add {BRIDGE_V6}/64 dev {BRIDGE} nodad\nlink set {BRIDGE} up\n",
        mac(BRIDGE_MAC)
    ))
}

/// Makes a pod and connects it with the node.
pub(super) fn connect_pod(
    spec: &LabSpec,
    pod: &PodSpec,
    index: u8,
    node: &Namespace,
    name: &str,
) -> anyhow::Result<Host> {
    let namespace = new_namespace(name)?;
    let (pod_mac, host_mac) = ([2, 0, 0, 0, 2, index], [2, 0, 0, 0, 1, index]);
    let veth = pod_link(index);
    link(
        spec,
        &End { namespace: &namespace, interface: INTERFACE, mac: pod_mac },
        &End { namespace: node, interface: &veth, mac: host_mac },
    )?;
    let bridged = spec.pod_network == PodNetwork::Bridge;
    let mut in_pod = format!("link set {INTERFACE} up\n");
    let mut in_node = if bridged {
        format!("link set {veth} master {BRIDGE} up\n")
    } else {
        format!(
            "address add 169.254.1.1/32 dev {veth}\naddress add fe80::1/64 dev {veth} nodad\nlink set {veth} up\n"
        )
    };
    for address in &pod.addresses {
        let (length, subnet, flags) = if address.is_ipv4() { (32, 24, "") } else { (128, 64, "nodad") };
        let own_length = if bridged { subnet } else { length };
        let _ = writeln!(in_pod, "address add {address}/{own_length} dev {INTERFACE} {flags}");
        if !bridged {
            let _ = writeln!(in_node, "route add {address}/{length} dev {veth}");
        }
    }
    if bridged {
        let _ = writeln!(in_pod, "route add default via {BRIDGE_V4}\nroute add default via {BRIDGE_V6}");
    } else {
        let _ = writeln!(
            in_pod,
            "route add 169.254.1.1 dev {INTERFACE} scope link\nroute add default via 169.254.1.1\n\
             route add default via fe80::1 dev {INTERFACE}"
        );
    }
    node.ip(&in_node)?;
    namespace.ip(&in_pod)?;
    Ok(Host {
        name: pod.name.clone(),
        namespace,
        addresses: pod.addresses.clone(),
        interface: INTERFACE.to_owned(),
        output: Output::Link { mac: pod_mac, gateway_mac: if bridged { BRIDGE_MAC } else { host_mac } },
    })
}

impl Lab {
    /// From now on 1400 bytes fit the links of the pods called `pods`, whose ends know it, and 1300 what the node
    /// forwards to them, which only it knows. A bridge has one width: there, that of all pods' links changes.
    ///
    /// # Errors
    ///
    /// No such pod.
    pub fn narrow_ways_to_pods(&self, pods: &[&str]) -> anyhow::Result<()> {
        let node = &self.node.namespace;
        for (index, pod) in (1..).zip(&self.pods) {
            let host = &pod.host;
            let chosen = pods.contains(&host.name.as_str());
            if !chosen && self.pod_network == PodNetwork::PointToPoint {
                continue;
            }
            let veth = pod_link(index);
            node.ip(&format!("link set {veth} mtu {NARROW_LINK}"))?;
            host.namespace.ip(&format!("link set {INTERFACE} mtu {NARROW_LINK}"))?;
            if self.pod_network == PodNetwork::PointToPoint {
                for address in &host.addresses {
                    node.ip(&format!("route replace {address} dev {veth} mtu {NARROW_WAY}"))?;
                }
            }
        }
        if self.pod_network == PodNetwork::Bridge {
            // Longer prefixes than those of the kernel's own routes, which stay.
            node.ip(&format!(
                "link set {BRIDGE} mtu {NARROW_LINK}\nroute add 11.0.2.0/25 dev {BRIDGE} mtu {NARROW_WAY}\n\
                 route add 1100::/65 dev {BRIDGE} mtu {NARROW_WAY}\n"
            ))?;
        }
        Ok(())
    }

    /// From now on 1300 bytes fit what the router forwards to the client, which only it knows.
    ///
    /// # Errors
    ///
    /// The lab has no router.
    pub fn narrow_way_to_client(&self) -> anyhow::Result<()> {
        let router = self.router.as_ref().context("this lab has no router")?;
        for address in &self.client.addresses {
            router.ip(&format!("route replace {address} dev {TO_CLIENT} mtu {NARROW_WAY}"))?;
        }
        Ok(())
    }
}

fn without_offloads(namespace: &Namespace, interface: &str) -> anyhow::Result<()> {
    let status = namespace
        .command("ethtool")?
        .args(["-K", interface, "tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off"])
        .stdout(std::process::Stdio::null())
        .status()
        .context("cannot run `ethtool`: install ethtool")?;
    anyhow::ensure!(status.success(), "ethtool could not switch off the offloads of {interface}");
    Ok(())
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
