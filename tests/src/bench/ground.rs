//! Where an arm is measured: a lab of its own, with the arm's rules or agent in its node, and nothing else.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxier_common::{FlowKey, FlowValue, SCHEMA, is_direct};
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

use super::{
    arm::{Arm, Kind},
    figure::{Figure, Measure, Sample},
    load::{
        CONNECTIONS_PORT, Cpus, DATAGRAMS_PORT, Ends, ROUND_TRIPS_PORT, THROUGHPUT_PORT, connections,
        datagrams, round_trips, throughput,
    },
    rules::{self, ServicePort, external},
};
use crate::{
    agent::{Agent, AgentSpec},
    capture::{Capture, Direction},
    manifests,
    netns::Namespace,
    topology::{Lab, LabSpec, NODE_NAME, UPLINK},
};

/// The pod's address, as labs have it.
const POD: Ipv4Addr = Ipv4Addr::new(11, 0, 2, 2);
/// The clients' first address, as labs have it.
const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
/// How long a connection may take that is expected not to come about.
const REFUSAL: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(2);
/// All ports of a Service that kube-proxy would need to know.
const PORTS: [ServicePort; 4] = [
    ServicePort { protocol: "tcp", port: CONNECTIONS_PORT },
    ServicePort { protocol: "udp", port: DATAGRAMS_PORT },
    ServicePort { protocol: "tcp", port: ROUND_TRIPS_PORT },
    ServicePort { protocol: "tcp", port: THROUGHPUT_PORT },
];

/// An arm, ready to be measured. Everything is removed when this is dropped.
#[derive(Debug)]
pub struct Ground {
    // In the order in which they go.
    _iperf3: throughput::Server,
    agent: Option<Agent>,
    network: Network,
    /// Which arm.
    pub arm: Arm,
    clients: Vec<Ipv4Addr>,
    target: Ipv4Addr,
    cpus: Cpus,
    cursors: connections::Cursors,
    _work: TempDir,
}

#[derive(Debug)]
enum Network {
    Wire { client: Namespace, pod: Namespace },
    Lab(Box<Lab>),
}

impl Network {
    fn client(&self) -> &Namespace {
        match self {
            Self::Wire { client, .. } => client,
            Self::Lab(lab) => &lab.client.namespace,
        }
    }

    fn pod(&self) -> &Namespace {
        match self {
            Self::Wire { pod, .. } => pod,
            Self::Lab(lab) => &lab.pods[0].host.namespace,
        }
    }
}

/// What can be seen of the way that a connection took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Somebody between client and pod counted the hop.
    pub forwarded: bool,
    /// Connection tracking of the node has it, and expects the answers from the pod.
    pub tracked: bool,
    /// How the agent delivers it, if its table of flows has it.
    pub flow: Option<Delivery>,
    /// It is the pod's before the node's stack has it.
    pub early: bool,
}

/// How the agent delivers a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// By the node's stack.
    Stack,
    /// Past it.
    Direct,
}

impl Way {
    /// What it must be.
    #[must_use]
    pub const fn of(kind: Kind) -> Self {
        Self {
            forwarded: !matches!(kind, Kind::Wire),
            tracked: matches!(kind, Kind::RouteTracked | Kind::Iptables | Kind::Nft | Kind::Iptables10k),
            flow: match kind {
                Kind::ProxierDirect => Some(Delivery::Direct),
                Kind::ProxierStack | Kind::ProxierXdp => Some(Delivery::Stack),
                _ => None,
            },
            early: matches!(kind, Kind::ProxierXdp),
        }
    }
}

impl Ground {
    /// Builds the lab of `arm` and sets the arm up: `services` are those of `iptables-10k`, `agent` is the agent's binary.
    ///
    /// # Errors
    ///
    /// No root, a tool that is missing, rules that the kernel does not take, an agent that does not get ready.
    pub fn build(arm: Arm, services: u32, agent: &Path, cpus: Cpus) -> anyhow::Result<Self> {
        let work = tempfile::tempdir().context("no temporary directory")?;
        let clients = (0..connections::CLIENTS).map(|index| {
            let [a, b, c, d] = FIRST_CLIENT.octets();
            Ipv4Addr::new(a, b, c, d + index)
        });
        let spec = LabSpec::unique().with_pods(1).with_clients(connections::CLIENTS);
        let network = match arm.kind {
            Kind::Wire => wire(&spec.prefix)?,
            _ => Network::Lab(Box::new(Lab::build(&spec)?)),
        };
        let target = match arm.kind {
            Kind::Wire | Kind::Route | Kind::RouteAgain | Kind::RouteTracked => POD,
            Kind::Iptables10k => external(services.saturating_sub(1)),
            _ => external(arm.addresses - 1),
        };
        let agent = match &network {
            Network::Wire { .. } => None,
            Network::Lab(lab) => set_up(arm, services, lab, agent, work.path())?,
        };
        let iperf3 = throughput::Server::start(network.pod(), cpus.pod, work.path())?;
        Ok(Self {
            _iperf3: iperf3,
            agent,
            network,
            arm,
            clients: clients.collect(),
            target,
            cpus,
            cursors: connections::Cursors::default(),
            _work: work,
        })
    }

    fn ends(&self) -> Ends<'_> {
        Ends {
            client: self.network.client(),
            clients: &self.clients,
            pod: self.network.pod(),
            target: self.target,
            cpus: self.cpus,
        }
    }

    /// The node between client and pod, if there is one.
    #[must_use]
    pub fn node(&self) -> Option<&Namespace> {
        match &self.network {
            Network::Wire { .. } => None,
            Network::Lab(lab) => Some(&lab.node.namespace),
        }
    }

    /// The directory with the agent's pinned maps, if there is an agent.
    #[must_use]
    pub fn pins(&self) -> Option<std::path::PathBuf> {
        match (&self.agent, &self.network) {
            (Some(_), Network::Lab(lab)) => Some(lab.pin_path().join(format!("v{SCHEMA}"))),
            _ => None,
        }
    }

    /// Takes a measure.
    ///
    /// # Errors
    ///
    /// Traffic does not arrive.
    pub fn take(&self, measure: Measure, burst: Duration) -> anyhow::Result<Vec<Sample>> {
        let ends = self.ends();
        let sample = |figure, value| Sample { figure, value };
        Ok(match measure {
            Measure::Datagrams => {
                let datagrams = datagrams::run(&ends, burst)?;
                vec![
                    sample(Figure::UdpPerSecond, datagrams.per_second),
                    sample(Figure::UdpLostPercent, datagrams.lost_percent),
                ]
            }
            Measure::Connections => {
                vec![sample(Figure::ConnectionsPerSecond, connections::run(&ends, &self.cursors, burst)?)]
            }
            Measure::RoundTrips => {
                let round_trips = round_trips::run(&ends, burst)?;
                vec![
                    sample(Figure::RoundTripP50, round_trips.p50),
                    sample(Figure::RoundTripP99, round_trips.p99),
                ]
            }
            Measure::Throughput => vec![sample(Figure::TcpGbps, throughput::run(&ends, burst)?)],
        })
    }

    /// Makes sure that the arm's traffic goes the arm's way: a rule that never matches is as fast as none.
    ///
    /// # Errors
    ///
    /// It does not reach the pod, or by another way.
    pub fn verify(&self) -> anyhow::Result<()> {
        let (way, expected) = (self.way()?, Way::of(self.arm.kind));
        ensure!(way == expected, "expected {expected:?}, found {way:?}");
        Ok(())
    }

    /// Makes a connection and looks which way it took.
    ///
    /// # Errors
    ///
    /// There is none, or it is the wrong pod's.
    pub fn way(&self) -> anyhow::Result<Way> {
        let ends = self.ends();
        let listener = ends.pod.enter(|| std::net::TcpListener::bind(("0.0.0.0", CONNECTIONS_PORT)))?;
        // Behind XDP and before tc.
        let uplink = self.node().map(|node| Capture::start(node, UPLINK)).transpose()?;
        let client = SocketAddr::from((ends.clients[0], 0));
        let to = SocketAddr::from((self.target, CONNECTIONS_PORT));
        let connection = connect(ends.client, client, to, None, PATIENCE)
            .with_context(|| format!("no connection to {to}"))?;
        listener.set_nonblocking(true)?;
        let accepted = crate::wait::until(PATIENCE, || listener.accept().ok());
        let (_, seen) = accepted.context("a connection, but not with this pod")?;
        let own = connection.local_addr()?;
        ensure!(seen == own, "the pod sees {seen} as its client, which is {own}");
        let once = connect(ends.client, client, to, Some(1), REFUSAL);
        Ok(Way {
            forwarded: once.is_err(),
            tracked: match self.node() {
                Some(node) => is_tracked(node, own, self.target)?,
                None => false,
            },
            flow: match self.pins() {
                Some(pins) => delivery(&pins, own)?,
                None => None,
            },
            early: self.target != POD && uplink.is_some_and(|uplink| is_pods_at(&uplink, own)),
        })
    }
}

/// Two hosts and a link, with the addresses that labs have.
fn wire(prefix: &str) -> anyhow::Result<Network> {
    let client = Namespace::create(&format!("{prefix}-client"))?;
    let pod = Namespace::create(&format!("{prefix}-pod-1"))?;
    client.ip(&format!("link add eth0 type veth peer name eth0 netns {}", pod.name()))?;
    let mut batch = String::new();
    let [a, b, c, first] = FIRST_CLIENT.octets();
    for host in first..first + connections::CLIENTS {
        batch += &format!("address add {a}.{b}.{c}.{host}/24 dev eth0\n");
    }
    client.ip(&format!("{batch}link set eth0 up\nroute add {POD} dev eth0 src {FIRST_CLIENT}\n"))?;
    pod.ip(&format!(
        "address add {POD}/32 dev eth0\nlink set eth0 up\nroute add {a}.{b}.{c}.0/24 dev eth0\n"
    ))?;
    Ok(Network::Wire { client, pod })
}

/// Puts the arm's rules or its agent into the lab's node.
fn set_up(arm: Arm, services: u32, lab: &Lab, agent: &Path, work: &Path) -> anyhow::Result<Option<Agent>> {
    let node = &lab.node.namespace;
    match arm.kind {
        Kind::Wire | Kind::Route | Kind::RouteAgain => {}
        Kind::RouteTracked => feed(node, &["nft", "-f", "-"], rules::TRACKED)?,
        Kind::Iptables => feed(node, &["iptables-restore"], &rules::iptables(external(0), POD))?,
        Kind::Iptables10k => feed(node, &["iptables-restore"], &rules::kube_proxy(services, POD, &PORTS))?,
        Kind::Nft => feed(node, &["nft", "-f", "-"], &rules::nft(arm.addresses, POD))?,
        Kind::NftStateless => feed(node, &["nft", "-f", "-"], &rules::nft_stateless(arm.addresses, POD))?,
        Kind::ProxierStack | Kind::ProxierDirect | Kind::ProxierXdp => {
            let manifests = work.join("manifests");
            fs::create_dir(&manifests)?;
            let externals: Vec<IpAddr> = (0..arm.addresses).map(|index| external(index).into()).collect();
            fs::write(manifests.join("service.yaml"), manifests::service("bench", &externals))?;
            fs::write(manifests.join("slices.yaml"), manifests::slices("bench", NODE_NAME, &[POD.into()]))?;
            if arm.kind == Kind::ProxierXdp {
                complete_checksums(&lab.client.namespace)?;
            }
            let flags = arm.kind.flag().unwrap_or_default();
            let spec = AgentSpec::new(agent, &manifests, &work.join("agent.log"));
            return spec.with_arguments(flags).start(lab).map(Some);
        }
    }
    Ok(None)
}

/// Has the client compute the checksums of what it sends, as packets of a network card have them: others XDP leaves to tc.
fn complete_checksums(client: &Namespace) -> anyhow::Result<()> {
    let output = client.command("ethtool")?.args(["-K", "eth0", "tx", "off"]).output();
    let output = output.context("cannot run `ethtool`: install ethtool")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ethtool: {}", said.trim());
    Ok(())
}

/// Runs a command in `namespace` with `input`.
fn feed(namespace: &Namespace, command: &[&str], input: &str) -> anyhow::Result<()> {
    let [program, arguments @ ..] = command else { bail!("no command") };
    let mut child = namespace
        .command(program)?
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // What it says about a line that it does not like tells more than EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed: {}", command.join(" "), said.trim());
    Ok(())
}

/// A connection, of whose packets only those arrive that fewer than `hops` hosts forward.
fn connect(
    client: &Namespace,
    from: SocketAddr,
    to: SocketAddr,
    hops: Option<u32>,
    timeout: Duration,
) -> std::io::Result<TcpStream> {
    client.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(hops) = hops {
            socket.set_ttl_v4(hops)?;
        }
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), timeout)?;
        Ok(socket.into())
    })
}

/// Whether netfilter sends what `client` sends to `target` to the pod.
fn is_tracked(node: &Namespace, client: SocketAddr, target: Ipv4Addr) -> anyhow::Result<bool> {
    let output = node
        .command("conntrack")?
        .args(["--dump", "--proto", "tcp"])
        .output()
        .context("cannot run `conntrack`: install conntrack")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "conntrack: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(listing.lines().any(|line| is_translated(line, client, target)))
}

/// Whether a line of `conntrack --dump` is of the connection from `client` to `target`, and the answers are the pod's.
fn is_translated(line: &str, client: SocketAddr, target: Ipv4Addr) -> bool {
    let words: Vec<&str> = line.split_whitespace().filter(|word| word.contains('=')).collect();
    let expected = [
        format!("src={}", client.ip()),
        format!("dst={target}"),
        format!("sport={}", client.port()),
        format!("dport={CONNECTIONS_PORT}"),
        format!("src={POD}"),
        format!("dst={}", client.ip()),
    ];
    words.len() >= expected.len() && words.iter().zip(&expected).all(|(word, expected)| word == expected)
}

/// Whether what `client` sends is for the pod where it has come in. One checksum in 65,536 looks as if it were left to the hardware:
/// not each packet's.
fn is_pods_at(uplink: &Capture, client: SocketAddr) -> bool {
    uplink.packets(Direction::In).iter().any(|packet| {
        packet.source == client.ip()
            && packet.destination == POD
            && packet.ports().is_some_and(|(from, _)| from == client.port())
    })
}

/// Whether the agent's table of flows has a conversation of `client` with the pod.
fn delivery(pins: &Path, client: SocketAddr) -> anyhow::Result<Option<Delivery>> {
    let map = Map::LruHashMap(MapData::from_pin(pins.join("flows")).context("the agent's table of flows")?);
    let flows: HashMap<MapData, FlowKey, FlowValue> = HashMap::try_from(map)?;
    let is_it = |key: &FlowKey| {
        key.pod.to_ip() == IpAddr::V4(POD)
            && SocketAddr::new(key.peer.to_ip(), u16::from_be(key.peer_port)) == client
    };
    let flow = flows.iter().flatten().find(|(key, _)| is_it(key));
    Ok(flow.map(|(_, flow)| if is_direct(flow.delivery) { Delivery::Direct } else { Delivery::Stack }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACKED: &str = "tcp      6 431999 ESTABLISHED src=192.168.1.100 dst=10.1.0.0 sport=40000 dport=7000 \
                           src=11.0.2.2 dst=192.168.1.100 sport=7000 dport=40000 [ASSURED] mark=0 use=1";

    #[test]
    fn a_connection_is_tracked_only_if_its_answers_are_the_pods() {
        let client = SocketAddr::from((FIRST_CLIENT, 40_000));
        assert!(is_translated(TRACKED, client, external(0)));
        assert!(!is_translated(TRACKED, client, external(1)));
        assert!(!is_translated(TRACKED, SocketAddr::from((FIRST_CLIENT, 40_001)), external(0)));
        assert!(!is_translated(&TRACKED.replace("src=11.0.2.2", "src=10.1.0.0"), client, external(0)));
        assert!(!is_translated("", client, external(0)));
    }

    #[test]
    fn every_kind_has_a_way_of_its_own_group() {
        assert!(!Way::of(Kind::Wire).forwarded);
        assert_eq!(Way::of(Kind::Route), Way::of(Kind::NftStateless), "neither leaves a trace in a table");
        assert!(Way::of(Kind::Nft).tracked && Way::of(Kind::Nft).flow.is_none());
        assert!(!Way::of(Kind::ProxierDirect).tracked);
        assert_ne!(
            Way::of(Kind::ProxierDirect),
            Way::of(Kind::ProxierStack),
            "a fallback would go unnoticed"
        );
        assert_ne!(Way::of(Kind::ProxierXdp), Way::of(Kind::ProxierStack), "what tc does would go unnoticed");
    }
}
