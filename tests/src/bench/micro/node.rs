//! A node for packets that go past its stack. The programs ask its routing about them, so there has to be one: links, a route to
//! the pod, and neighbours. Nothing is sent: a run of BPF_PROG_TEST_RUN ends with what the program returns.

use std::net::Ipv4Addr;

use crate::{netns::Namespace, topology::LabSpec};

/// Indices of the links to clients and to the pod.
pub(super) const UPLINK: u32 = 11;
pub(super) const POD_LINK: u32 = 12;

type Mac = [u8; 6];

/// What packets are addressed to at either link: to one that is not for this host, the programs are blind.
pub(super) const NODE_MAC: Mac = [2, 0, 0, 0, 0, 1];
/// Who sends them.
pub(super) const SENDER_MAC: Mac = [2, 0, 0, 0, 0, 2];
const POD_MAC: Mac = [2, 0, 0, 0, 2, 1];
const CLIENT_MAC: Mac = [2, 0, 0, 0, 0, 100];

/// Addresses of the frame that goes into the pod: to, and from.
pub(super) const INTO_POD: [Mac; 2] = [POD_MAC, NODE_MAC];

/// Builds it, with a way to `client` and to `pod`.
pub(super) fn build(client: Ipv4Addr, pod: Ipv4Addr) -> anyhow::Result<Namespace> {
    let node = Namespace::create(&format!("{}-node", LabSpec::unique().prefix))?;
    node.sysctl("net.ipv4.ip_forward", "1")?;
    let [node_mac, pod_mac, client_mac] = [NODE_MAC, POD_MAC, CLIENT_MAC].map(|mac| {
        let bytes = mac.map(|byte| format!("{byte:02x}"));
        bytes.join(":")
    });
    node.ip(&format!(
        "link add uplink0 index {UPLINK} address {node_mac} type veth peer name client0\n\
         link add pod1 index {POD_LINK} address {node_mac} type veth peer name eth0\n\
         link set uplink0 up\nlink set client0 up\nlink set pod1 up\nlink set eth0 up\n\
         route add {client}/32 dev uplink0\nroute add {pod}/32 dev pod1\n\
         neigh add {client} lladdr {client_mac} dev uplink0 nud permanent\n\
         neigh add {pod} lladdr {pod_mac} dev pod1 nud permanent\n"
    ))?;
    Ok(node)
}
