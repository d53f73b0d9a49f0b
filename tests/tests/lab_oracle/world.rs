//! The same topology twice: in one world the node has nftables' DNAT, in the other it has proxier. The ends are the test's
//! own: hosts without addresses, whose kernels answer nothing.
//!
//! Everything a frame leads to happens on the CPU that sends it, in order: the queue between two veths is that CPU's. So
//! a frame sent last says, when it has come out at the other end, that there is nothing more to wait for.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use proxier_tests::{
    netns::Namespace,
    packets::Packet,
    scenario::{Scenario, externals},
    tap::{Frame, Tap},
    topology::{Lab, LabSpec, UPLINK},
};

use crate::script::Side;

/// The node's interface for what conntrack finds invalid, and its other end at the client.
const TRAP: &str = "trap0";
/// What fits into a packet to the pod, and into one to a client, without more ado.
pub(crate) const MTU_OF_POD: u16 = 1400;
pub(crate) const MTU_OF_CLIENT: u16 = 1300;
/// What the node calls itself in IPv4 towards the pod.
const OWN_TO_POD: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const SENTINEL_PORT: u16 = 9;
const PATIENCE: Duration = Duration::from_secs(5);

/// What the node's rules do in the first world. What conntrack finds invalid its NAT leaves alone, by policy: the packet
/// goes out at another interface, so that the test knows.
const RULES: &str = "
table inet oracle {
  chain invalid {
    type filter hook prerouting priority mangle
    ct state invalid meta mark set 1
  }
  chain forward_to_pod {
    type nat hook prerouting priority dstnat
    ip daddr EXTERNAL4 dnat ip to POD4
    ip6 daddr EXTERNAL6 dnat ip6 to POD6
  }
}
";

/// What came out where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) pod: Vec<Frame>,
    pub(crate) client: Vec<Frame>,
    /// What netfilter's connection tracking finds invalid.
    pub(crate) invalid: Vec<Frame>,
    /// The kernel would not send the frame at all.
    pub(crate) refused: bool,
}

/// A client, a node and a pod.
pub(crate) struct World {
    client: Tap,
    pod: Tap,
    invalid: Option<Tap>,
    sentinels: [Frame; 2],
    lab: Kept,
}

/// What is removed when the world is.
enum Kept {
    Lab(Box<Lab>),
    Scenario(Box<Scenario>),
}

impl Kept {
    fn lab(&self) -> &Lab {
        match self {
            Self::Lab(lab) => lab,
            Self::Scenario(scenario) => &scenario.lab,
        }
    }
}

/// What can be told about both worlds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) externals: [IpAddr; 2],
    pub(crate) pods: [IpAddr; 2],
    /// Of the client, of the node's uplink, of the pod, of the node's end of the pod's link.
    pub(crate) macs: [[u8; 6]; 4],
    /// What the node calls itself in IPv4 towards the pod, and towards the client; in IPv6 towards anybody.
    pub(crate) own_addresses: [IpAddr; 3],
}

impl World {
    /// A node with nftables.
    pub(crate) fn netfilter(spec: &LabSpec) -> anyhow::Result<Self> {
        let lab = Lab::build(spec)?;
        let node = &lab.node.namespace;
        let [external4, external6] = externals().map(|address| address.to_string());
        let pod = |like: IpAddr| lab.pods[0].host.address(like).to_string();
        let rules = RULES
            .replace("EXTERNAL4", &external4)
            .replace("EXTERNAL6", &external6)
            .replace("POD4", &pod(externals()[0]))
            .replace("POD6", &pod(externals()[1]));
        nft(node, &rules)?;
        // See `meant`: where netfilter would be stricter than a NAT has to be.
        for (parameter, value) in [("checksum", "0"), ("tcp_be_liberal", "1"), ("tcp_loose", "1")] {
            node.sysctl(&format!("net.netfilter.nf_conntrack_{parameter}"), value)?;
        }
        // Pieces that nothing comes to are kept to the end: the node's error about them would come at any time.
        for timeout in ["ipv4.ipfrag_time", "netfilter.nf_conntrack_frag6_timeout"] {
            node.sysctl(&format!("net.{timeout}"), "3600")?;
        }
        for limit in ["ipv4.ipfrag_high_thresh", "netfilter.nf_conntrack_frag6_high_thresh"] {
            node.sysctl(&format!("net.{limit}"), &(1 << 30).to_string())?;
        }
        lab.client
            .namespace
            .ip(&format!("link add {TRAP} type veth peer name {TRAP} netns {}", node.name()))?;
        quiet(&lab.client.namespace, TRAP)?;
        node.ip(&format!(
            "link set {TRAP} up\n\
             address add 192.0.2.1/24 dev {TRAP}\n\
             address add fe80::3:1/64 dev {TRAP} nodad\n\
             neighbour replace 192.0.2.2 lladdr 02:00:00:00:03:02 dev {TRAP} nud permanent\n\
             neighbour replace fe80::3:2 lladdr 02:00:00:00:03:02 dev {TRAP} nud permanent\n",
        ))?;
        // As on the way that the packet would have gone, for those that are too big and those that record their route.
        for (table, interface, mtu, source) in
            [("100", UPLINK, MTU_OF_POD, OWN_TO_POD.into()), ("101", "pod1", MTU_OF_CLIENT, own_to_client())]
        {
            node.ip(&format!(
                "route add default via 192.0.2.2 dev {TRAP} src {source} mtu lock {mtu} table {table}\n\
                 route add default via fe80::3:2 dev {TRAP} mtu lock {mtu} table {table}\n",
            ))?;
            for family in ["-4", "-6"] {
                let mut ip = node.command("ip")?;
                ip.args([family, "rule", "add", "iif", interface, "fwmark", "1", "table", table]);
                ensure!(ip.status()?.success(), "no rule for invalid packets");
            }
        }
        let invalid = Some(Tap::open(&lab.client.namespace, TRAP)?);
        Self::new(Kept::Lab(Box::new(lab)), invalid)
    }

    /// A node with proxier.
    pub(crate) fn proxier(spec: &LabSpec) -> anyhow::Result<Self> {
        Self::new(Kept::Scenario(Box::new(Scenario::start(spec, &[]))), None)
    }

    fn new(kept: Kept, invalid: Option<Tap>) -> anyhow::Result<Self> {
        let lab = kept.lab();
        ensure!(lab.pods.len() == 1, "which pod is chosen would be a difference");
        let pod = &lab.pods[0].host;
        for host in [&lab.client, pod] {
            quiet(&host.namespace, proxier_tests::host::INTERFACE)?;
        }
        settle(lab)?;
        let like = externals()[0];
        let ends = [lab.client.address(like), pod.address(like)]
            .map(|address| SocketAddr::new(address, SENTINEL_PORT));
        let sentinel = |from: SocketAddr, to, [mac, gateway_mac]: [[u8; 6]; 2]| Frame {
            bytes: Packet::udp(from, to, b"nothing more comes").frame(mac, gateway_mac),
            ..Frame::default()
        };
        let sentinels = [
            sentinel(ends[0], ends[1], lab.client.hardware_addresses()),
            sentinel(ends[1], ends[0], pod.hardware_addresses()),
        ];
        let client = Tap::open(&lab.client.namespace, proxier_tests::host::INTERFACE)?;
        let pod = Tap::open(&pod.namespace, proxier_tests::host::INTERFACE)?;
        let world = Self { client, pod, invalid, sentinels, lab: kept };
        // What the hosts' kernels had still to say.
        let _ = world.inject(Side::Client, &[])?;
        let _ = world.inject(Side::Pod, &[])?;
        Ok(world)
    }

    /// Addresses, the same in both worlds.
    pub(crate) fn map(&self) -> Map {
        let lab = self.lab.lab();
        let pod = &lab.pods[0].host;
        let [[client, by_client], [of_pod, by_pod]] =
            [lab.client.hardware_addresses(), pod.hardware_addresses()];
        let macs = [client, by_client, of_pod, by_pod];
        Map {
            externals: externals(),
            pods: externals().map(|like| pod.address(like)),
            macs,
            own_addresses: [OWN_TO_POD.into(), own_to_client(), Lab::node_address(externals()[1])],
        }
    }

    /// Sends frames at one end and returns everything that comes out for it at either.
    pub(crate) fn inject(&self, side: Side, frames: &[Frame]) -> anyhow::Result<Outcome> {
        let (near, far) = match side {
            Side::Client => (&self.client, &self.pod),
            Side::Pod => (&self.pod, &self.client),
        };
        let mut outcome = Outcome::default();
        for frame in frames {
            if near.send(frame).is_err() {
                outcome.refused = true;
            }
        }
        near.send(&self.sentinels[side as usize]).context("the sentinel was not sent")?;
        let far_frames = until_sentinel(far)?;
        let near_frames = rest(near)?;
        (outcome.client, outcome.pod) = match side {
            Side::Client => (near_frames, far_frames),
            Side::Pod => (far_frames, near_frames),
        };
        if let Some(tap) = &self.invalid {
            outcome.invalid = rest(tap)?;
        }
        Ok(outcome)
    }
}

fn own_to_client() -> IpAddr {
    Lab::node_address(externals()[0])
}

/// Static neighbours, so that nobody has to be found, routes for packets that are too big, and errors without limit.
fn settle(lab: &Lab) -> anyhow::Result<()> {
    let (node, pod) = (&lab.node.namespace, &lab.pods[0].host);
    // Whom it has spoken with before it would ask for from time to time.
    let mut batch = "neighbour flush all\n".to_owned();
    let hex = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    for like in externals() {
        let (client, address) = (lab.client.address(like), pod.address(like));
        let length = if like.is_ipv4() { 32 } else { 128 };
        batch.push_str(&format!(
            "neighbour replace {client} lladdr {} dev {UPLINK} nud permanent\n\
             neighbour replace {address} lladdr {} dev pod1 nud permanent\n\
             route replace default via {client} dev {UPLINK} mtu lock {MTU_OF_CLIENT}\n\
             route replace {address}/{length} dev pod1 mtu lock {MTU_OF_POD}\n",
            hex(lab.client.hardware_addresses()[0]),
            hex(pod.hardware_addresses()[0]),
        ));
    }
    node.ip(&batch)?;
    for (parameter, value) in [
        ("ipv4.icmp_ratemask", "0"),
        ("ipv4.icmp_ratelimit", "0"),
        ("ipv6.icmp.ratelimit", "0"),
        ("ipv6.icmp.ratemask", ""),
        ("ipv6.auto_flowlabels", "0"),
    ] {
        node.sysctl(&format!("net.{parameter}"), value)?;
    }
    Ok(())
}

/// Takes a host's kernel out of the conversation: without an address, it has nothing to say to anybody.
fn quiet(namespace: &Namespace, interface: &str) -> anyhow::Result<()> {
    namespace.ip(&format!("address flush dev {interface}\nlink set {interface} arp off up\n"))?;
    namespace.sysctl(&format!("net.ipv6.conf.{interface}.disable_ipv6"), "1")
}

fn nft(namespace: &Namespace, rules: &str) -> anyhow::Result<()> {
    let mut child = namespace
        .command("nft")?
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run `nft`: install nftables")?;
    child.stdin.take().context("no way to write to nft")?.write_all(rules.as_bytes())?;
    ensure!(child.wait()?.success(), "nft refuses the rules");
    Ok(())
}

fn until_sentinel(tap: &Tap) -> anyhow::Result<Vec<Frame>> {
    let mut frames = Vec::new();
    loop {
        match tap.receive()? {
            Some(frame) if is_sentinel(&frame) => return Ok(frames),
            Some(frame) => frames.extend(Some(frame).filter(is_of_interest)),
            None => {
                tap.wait(PATIENCE)?;
                match tap.receive()? {
                    Some(frame) if is_sentinel(&frame) => return Ok(frames),
                    Some(frame) => frames.extend(Some(frame).filter(is_of_interest)),
                    None => bail!("the sentinel does not arrive"),
                }
            }
        }
    }
}

fn rest(tap: &Tap) -> anyhow::Result<Vec<Frame>> {
    let mut frames = Vec::new();
    while let Some(frame) = tap.receive()? {
        frames.extend(Some(frame).filter(is_of_interest));
    }
    Ok(frames)
}

fn is_sentinel(frame: &Frame) -> bool {
    frame.bytes.ends_with(b"nothing more comes")
}

/// Not the links' own housekeeping, which goes to groups, and no address resolution.
fn is_of_interest(frame: &Frame) -> bool {
    let to_group = frame.bytes[0] & 1 == 1;
    let is_arp = frame.bytes.get(12..14) == Some(&[0x08, 0x06]);
    !to_group && !is_arp
}
