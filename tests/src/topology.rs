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
//!
//! Pods may be on a bridge instead ([`PodNetwork::Bridge`]): the node's ends of their links are its ports, and the
//! pods see one another on the link.
//!
//! ```text
//!                             │       cni0 11.0.2.1/24           pod1 ├──────┤ eth0 11.0.2.2/24  │
//!                             │            1100::1/64            pod2 ├──────┤ eth0 11.0.2.3/24  │
//! ```
//!
//! And there may be a router on the way ([`LabSpec::with_router`]), so that neither end of the way knows how narrow it is.
//!
//! ```text
//!   eth0 192.168.2.100/24 ├──────┤ client0 192.168.2.1/24  PREFIX-router  192.168.1.254/24 node0 ├──────┤ uplink0
//!        fd00:2::100/64   │      │         fd00:2::1/64                   fd00:1::254/64         │      │
//! ```

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use socket2::Socket;

use crate::{
    capture::Direction,
    host::{Host, Output},
    netns::{self, Namespace},
    packets::{Packet, protocol},
    responder::{Ports, Responder},
};

mod links;

/// The node's interface towards the client.
pub const UPLINK: &str = "uplink0";
/// The node's name in manifests.
pub const NODE_NAME: &str = "node1";
/// Where bpffs is.
pub const BPFFS: &str = "/sys/fs/bpf";

const CONNECTED_WITHIN: Duration = Duration::from_secs(10);
const NODE_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);

/// What a pod is called and which addresses it has.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its name, as in the manifests.
    pub name: String,
    /// Its addresses of both families.
    pub addresses: Vec<IpAddr>,
}

/// How pods are connected with their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// Each by a link of its own, over which the node routes to its one address, as Calico and kindnet do.
    PointToPoint,
    /// By a bridge that is the gateway of a subnet, as flannel does. Pods reach one another past the node's IP stack.
    Bridge,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// What the namespaces' names start with.
    pub prefix: String,
    /// The directory on the bpffs that the agent may use. It is removed with the lab, and before it is built.
    pub pin_path: PathBuf,
    /// The pods. Those on a bridge are in 11.0.2.0/24 and 1100::/64.
    pub pods: Vec<PodSpec>,
    /// How they are connected.
    pub pod_network: PodNetwork,
    /// How many addresses of each family the client has: 192.168.1.100, .101, ... and fd00:1::100, ::101, ...
    pub clients: u8,
    /// Whether a router is between the client and the node. The client then is 192.168.2.100 and fd00:2::100.
    pub router: bool,
    /// Whether veths keep their offloads, as they do on users' nodes: no checksums in software, large segments.
    pub offloads: bool,
}

impl LabSpec {
    /// A lab with two pods, those that `deploy/examples` has on node1.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let spec = Self {
            prefix: prefix.to_owned(),
            // Never the agent's default, which a real agent on this machine may be using.
            pin_path: Path::new(BPFFS).join(format!("{prefix}-lab")),
            pods: Vec::new(),
            pod_network: PodNetwork::PointToPoint,
            clients: 1,
            router: false,
            offloads: true,
        };
        spec.with_pods(2)
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

    /// The same with this many pods: alpine-1 at 11.0.2.2 and 1100::202, and so on.
    #[must_use]
    pub fn with_pods(self, pods: u8) -> Self {
        let pod = |index: u8| PodSpec {
            name: format!("alpine-{index}"),
            addresses: vec![
                Ipv4Addr::new(11, 0, 2, 1 + index).into(),
                Ipv6Addr::new(0x1100, 0, 0, 0, 0, 0, 0, 0x201 + u16::from(index)).into(),
            ],
        };
        Self { pods: (1..=pods).map(pod).collect(), ..self }
    }

    /// The same with pods connected in another way.
    #[must_use]
    pub fn with_pod_network(self, pod_network: PodNetwork) -> Self {
        Self { pod_network, ..self }
    }

    /// The same with a router between the client and the node.
    #[must_use]
    pub fn with_router(self) -> Self {
        Self { router: true, ..self }
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
    /// The router between the two, if there is one.
    pub router: Option<Namespace>,
    /// Who forwards, and runs the agent. A client as well, by its uplink; nothing answers on it.
    pub node: Host,
    pod_network: PodNetwork,
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
        let node = Host {
            name: "node".to_owned(),
            namespace: links::new_router(&name("node"))?,
            addresses: vec![NODE_V4.into(), NODE_V6.into()],
            interface: UPLINK.to_owned(),
            output: Output::Stack,
        };
        let router = spec.router.then(|| links::new_router(&name("router"))).transpose()?;
        let client = links::connect_client(spec, &node.namespace, router.as_ref(), &name("client"))?;
        if spec.pod_network == PodNetwork::Bridge {
            links::new_bridge(&node.namespace)?;
        }
        let mut pods = Vec::new();
        for (index, pod) in (1..).zip(&spec.pods) {
            let host = links::connect_pod(spec, pod, index, &node.namespace, &name(&format!("pod-{index}")))?;
            let responder = Responder::start(&host.namespace, &host.name, &Ports::default())?;
            pods.push(Pod { responder: Some(responder), host });
        }
        let accepted =
            client.accept_protocols(&[protocol::SCTP, protocol::DCCP, protocol::GRE, protocol::ESP])?;
        let responder = Responder::start(&client.namespace, &client.name, &Ports::default())?;
        let lab = Self {
            _accepted: accepted,
            _client_responder: responder,
            pods,
            client,
            router,
            node,
            pod_network: spec.pod_network,
            pins,
        };
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
