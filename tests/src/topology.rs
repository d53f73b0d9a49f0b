//! The lab's network, made and removed as one.
//!
//! ```text
//!      PREFIX-client                        PREFIX-node                           PREFIX-pod-1
//!  ┌───────────────────┐      ┌───────────────────────────────────────┐      ┌───────────────────┐
//!  │ responder         │      │ agent                                 │      │ responder         │
//!  │              eth0 ├──────┤ uplink0                          pod1 ├──────┤ eth0              │
//!  │  192.168.1.100/24 │      │ 192.168.1.1/24            169.254.1.1 │      │ 11.0.2.2/32       │
//!  │  fd00:1::100/64   │      │ fd00:1::1/64                  fe80::1 │      │ 1100::202/128     │
//!  │  default -> node  │      │ default -> client       forwards both │      │ default -> node   │
//!  └───────────────────┘      │                                       │      └───────────────────┘
//!                             │                                       │           PREFIX-pod-2
//!                             │                                  pod2 ├──────┤ ...
//!                             └───────────────────────────────────────┘
//! ```
//!
//! External addresses are nobody's: the client sends them to the node as it sends everything, as a router would that
//! learned them by BGP. The node's own default route leads back to the client, so that a packet that nothing has
//! rewritten comes back out and is seen.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use socket2::Socket;

use crate::{
    capture::{Capture, Direction},
    host::{Host, INTERFACE},
    netns::{self, Namespace},
    packets::{Packet, protocol},
    responder::{Ports, Responder},
};

/// The node's interface towards the client.
pub const UPLINK: &str = "uplink0";
/// The node's name in manifests.
pub const NODE_NAME: &str = "node1";
/// Where bpffs is.
pub const BPFFS: &str = "/sys/fs/bpf";

const CONNECTED_WITHIN: Duration = Duration::from_secs(10);
const NODE_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x64];
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What a pod is called and which addresses it has.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its name, as in the manifests.
    pub name: String,
    /// Its addresses of both families.
    pub addresses: Vec<IpAddr>,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// What the namespaces' names start with.
    pub prefix: String,
    /// The directory on the bpffs that the agent may use. It is removed with the lab, and before it is built.
    pub pin_path: PathBuf,
    /// The pods.
    pub pods: Vec<PodSpec>,
    /// How many addresses of each family the client has: 192.168.1.100, .101, ... and fd00:1::100, ::101, ...
    pub clients: u8,
    /// Whether veths keep their offloads, as they do on users' nodes: no checksums in software, large segments.
    pub offloads: bool,
}

impl LabSpec {
    /// A lab with two pods, those that `deploy/examples` has on node1.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let pod = |index: u8| PodSpec {
            name: format!("alpine-{index}"),
            addresses: vec![
                Ipv4Addr::new(11, 0, 2, 1 + index).into(),
                Ipv6Addr::new(0x1100, 0, 0, 0, 0, 0, 0, 0x201 + u16::from(index)).into(),
            ],
        };
        Self {
            prefix: prefix.to_owned(),
            // Never the agent's default, which a real agent on this machine may be using.
            pin_path: Path::new(BPFFS).join(format!("{prefix}-lab")),
            pods: vec![pod(1), pod(2)],
            clients: 1,
            offloads: true,
        }
    }

    /// As [`Self::new`], with a prefix that no other lab on this machine has.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self::new(&format!("px{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// The same with this many client addresses of each family.
    #[must_use]
    pub fn with_clients(self, clients: u8) -> Self {
        Self { clients, ..self }
    }

    /// The same without offloads.
    #[must_use]
    pub fn without_offloads(self) -> Self {
        Self { offloads: false, ..self }
    }
}

/// A pod: a host that answers.
#[derive(Debug)]
pub struct Pod {
    // Dropped first: its sockets would keep the namespace alive.
    responder: Option<Responder>,
    /// Where it lives and which addresses it has.
    pub host: Host,
}

impl Pod {
    /// Stops answering, as when the pod's process ends.
    pub fn stop(&mut self) {
        self.responder = None;
    }
}

/// The node: forwards between client and pods.
#[derive(Debug)]
pub struct Node {
    /// Where the agent runs.
    pub namespace: Namespace,
}

impl Node {
    /// Starts to see what passes the uplink.
    ///
    /// # Errors
    ///
    /// As [`Capture::start`].
    pub fn capture(&self) -> anyhow::Result<Capture> {
        Capture::start(&self.namespace, UPLINK)
    }
}

/// A client, a node and its pods. Everything is removed when this is dropped.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they go.
    _accepted: Vec<Socket>,
    _client_responder: Responder,
    /// The pods, in the order of the spec.
    pub pods: Vec<Pod>,
    /// Who asks.
    pub client: Host,
    /// Who forwards, and runs the agent.
    pub node: Node,
    pins: Pins,
}

/// The node's end of a pod's link.
fn pod_link(index: u8) -> String {
    format!("pod{index}")
}

impl Lab {
    /// The node's interfaces towards the client and its pods.
    #[must_use]
    pub fn node_interfaces(&self) -> Vec<String> {
        [UPLINK.to_owned()]
            .into_iter()
            .chain((1..).zip(&self.pods).map(|(index, _)| pod_link(index)))
            .collect()
    }

    /// Builds what `spec` says.
    ///
    /// # Errors
    ///
    /// Not root, no iproute2, or a kernel without network namespaces or veth.
    pub fn build(spec: &LabSpec) -> anyhow::Result<Self> {
        crate::need_root()?;
        remove_leftovers();
        let pins = Pins::new(&spec.pin_path)?;
        let name = |role: &str| format!("{}-{role}", spec.prefix);
        let node = Node { namespace: new_namespace(&name("node"))? };
        for parameter in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            node.namespace.sysctl(parameter, "1")?;
        }
        let client = new_client(spec, &node, &name("client"))?;
        let mut pods = Vec::new();
        for (index, pod) in (1..).zip(&spec.pods) {
            pods.push(new_pod(pod, index, spec.offloads, &node, &name(&format!("pod-{index}")))?);
        }
        let accepted =
            client.accept_protocols(&[protocol::SCTP, protocol::DCCP, protocol::GRE, protocol::ESP])?;
        let responder = Responder::start(&client.namespace, &client.name, &Ports::default())?;
        let lab = Self { _accepted: accepted, _client_responder: responder, pods, client, node, pins };
        lab.wait_until_connected()?;
        Ok(lab)
    }

    /// Interfaces come up in their own time, and until then a missing answer would mean nothing.
    fn wait_until_connected(&self) -> anyhow::Result<()> {
        for pod in &self.pods {
            for to in pod.host.addresses.iter().copied() {
                let capture = self.client.capture()?;
                self.client.send(&[Packet::echo_request(self.client.address(to), to, 1, 1, b"up?")])?;
                let is_answer = |packet: &Packet| packet.source == to && packet.echo().is_some();
                capture
                    .wait_for(CONNECTED_WITHIN, Direction::In, is_answer)
                    .with_context(|| format!("the lab does not connect the client with {to}"))?;
            }
        }
        Ok(())
    }

    /// The pod called `name`.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods
            .iter()
            .find(|pod| pod.host.name == name)
            .unwrap_or_else(|| panic!("no pod {name} in this lab"))
    }

    /// The node's own address of the family of `like`.
    #[must_use]
    pub fn node_address(like: IpAddr) -> IpAddr {
        if like.is_ipv4() { NODE_V4.into() } else { NODE_V6.into() }
    }

    /// A directory on the bpffs that is this lab's own, removed with it. The agent makes it.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pins.path
    }
}

/// Removes the pins last, after whoever used them.
#[derive(Debug)]
struct Pins {
    path: PathBuf,
}

impl Pins {
    fn new(path: &Path) -> anyhow::Result<Self> {
        let pins = Self { path: path.to_owned() };
        pins.remove()
            .with_context(|| format!("cannot remove {}, left by an earlier run", pins.path.display()))?;
        Ok(pins)
    }

    fn remove(&self) -> std::io::Result<()> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes what labs of processes that are no longer there left behind: a test that was killed cannot.
fn remove_leftovers() {
    let is_dead = |name: &str| {
        let pid = name.strip_prefix("px").and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
    };
    for name in netns::names().iter().filter(|name| is_dead(name)) {
        // Another lab may be removing it at this moment.
        let _ = netns::delete(name);
    }
    let pins = std::fs::read_dir(BPFFS).into_iter().flatten().flatten();
    for entry in pins.filter(|entry| entry.file_name().to_str().is_some_and(is_dead)) {
        let _ = std::fs::remove_dir_all(entry.path());
    }
}

fn new_namespace(name: &str) -> anyhow::Result<Namespace> {
    let namespace = Namespace::create(name)?;
    // Duplicate address detection would keep IPv6 silent for a second or two.
    for parameter in ["accept_dad", "dad_transmits", "accept_ra", "router_solicitations"] {
        namespace.sysctl(&format!("net.ipv6.conf.default.{parameter}"), "0")?;
    }
    Ok(namespace)
}

fn new_client(spec: &LabSpec, node: &Node, namespace: &str) -> anyhow::Result<Host> {
    let namespace = new_namespace(namespace)?;
    let addresses: Vec<IpAddr> = (0..spec.clients)
        .flat_map(|index| {
            let v4 = Ipv4Addr::new(192, 168, 1, 100 + index);
            // ::100, ::101 ... as people write them, though the digits are hexadecimal.
            let v6 = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x100 + u16::from(index));
            [IpAddr::V4(v4), IpAddr::V6(v6)]
        })
        .collect();
    namespace.ip(&format!(
        "link add {INTERFACE} address {} type veth peer name {UPLINK} address {} netns {}",
        mac(CLIENT_MAC),
        mac(UPLINK_MAC),
        node.namespace.name(),
    ))?;
    let mut batch = String::new();
    for address in &addresses {
        // A route may name a source address only once that is past duplicate address detection.
        let (length, flags) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
        let _ = writeln!(batch, "address add {address}/{length} dev {INTERFACE} {flags}");
    }
    let _ = writeln!(batch, "link set {INTERFACE} up");
    node.namespace.ip(&format!(
        "address add {NODE_V4}/24 dev {UPLINK}\naddress add {NODE_V6}/64 dev {UPLINK} nodad\nlink set {UPLINK} up\n"
    ))?;
    let (v4, v6) = (addresses[0], addresses[1]);
    namespace.ip(&format!(
        "{batch}route add default via {NODE_V4} src {v4}\nroute add default via {NODE_V6} src {v6}\n"
    ))?;
    node.namespace.ip(&format!("route add default via {v4}\nroute add default via {v6}\n"))?;
    if !spec.offloads {
        without_offloads(&namespace, INTERFACE)?;
        without_offloads(&node.namespace, UPLINK)?;
    }
    Ok(Host { name: "client".to_owned(), namespace, addresses, mac: CLIENT_MAC, gateway_mac: UPLINK_MAC })
}

fn new_pod(spec: &PodSpec, index: u8, offloads: bool, node: &Node, namespace: &str) -> anyhow::Result<Pod> {
    let namespace = new_namespace(namespace)?;
    let (pod_mac, host_mac) = ([2, 0, 0, 0, 2, index], [2, 0, 0, 0, 1, index]);
    let veth = pod_link(index);
    namespace.ip(&format!(
        "link add {INTERFACE} address {} type veth peer name {veth} address {} netns {}",
        mac(pod_mac),
        mac(host_mac),
        node.namespace.name(),
    ))?;
    let mut in_pod = format!("link set {INTERFACE} up\n");
    let mut in_node = format!(
        "address add 169.254.1.1/32 dev {veth}\naddress add fe80::1/64 dev {veth} nodad\nlink set {veth} up\n"
    );
    for address in &spec.addresses {
        let (length, flags) = if address.is_ipv4() { (32, "") } else { (128, "nodad") };
        let _ = writeln!(in_pod, "address add {address}/{length} dev {INTERFACE} {flags}");
        let _ = writeln!(in_node, "route add {address}/{length} dev {veth}");
    }
    in_pod.push_str("route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\n");
    let _ = writeln!(in_pod, "route add default via fe80::1 dev {INTERFACE}");
    node.namespace.ip(&in_node)?;
    namespace.ip(&in_pod)?;
    if !offloads {
        without_offloads(&namespace, INTERFACE)?;
        without_offloads(&node.namespace, &veth)?;
    }
    let responder = Responder::start(&namespace, &spec.name, &Ports::default())?;
    let host = Host {
        name: spec.name.clone(),
        namespace,
        addresses: spec.addresses.clone(),
        mac: pod_mac,
        gateway_mac: host_mac,
    };
    Ok(Pod { responder: Some(responder), host })
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
