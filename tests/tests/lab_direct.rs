//! Delivery past the node's stack (docs/decisions/017): all that the matrix tries, and that the node's netfilter neither sees
//! nor disturbs it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    process::Stdio,
};

use aya::maps::{HashMap, Map, MapData};
use proxier_common::{
    Address, DELIVERY_PEER, FlowKey, FlowValue, POD_HAS_PEER, PodKey, PodValue, SCHEMA, is_direct,
};
use proxier_tests::{
    capture::{Capture, Direction},
    connection::Connection,
    exchange::{PATIENCE, Protocol, SILENCE},
    host::Host,
    loss::lost_of_each_during,
    matrix::{Client, Table, ground::Ground},
    packets::{Packet, protocol},
    report,
    responder::Sighting,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, PodNetwork, UPLINK},
    wait,
};

const PORT: u16 = 5060;
const DIRECT: [&str; 2] = ["--delivery", "direct"];

/// What nodes of most clusters have: packets that conntrack finds invalid go (kube-proxy), and what pods send to the world gets
/// the node's address (network plugins).
const USUAL_RULES: &str = "
table inet node {
  chain forward {
    type filter hook forward priority filter;
    ct state invalid counter drop
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname uplink0 ip saddr 11.0.0.0/8 counter masquerade
    oifname uplink0 ip6 saddr 1100::/16 counter masquerade
  }
}
";

/// What comes by another link than the one that leads to its source goes.
const REVERSE_PATH_FILTER: &str = "
table inet reverse {
  chain prerouting {
    type filter hook prerouting priority raw;
    iifname pod* fib saddr . iif oif 0 counter drop
  }
}
";

/// A firewall that lets nothing through to pods, nor from them.
const NO_FORWARDING: &str = "
table inet firewall {
  chain forward {
    type filter hook forward priority filter; policy drop;
  }
}
";

fn pinned(pin_path: &Path, name: &str) -> MapData {
    MapData::from_pin(pin_path.join(format!("v{SCHEMA}")).join(name)).unwrap()
}

fn index_of_link(scenario: &Scenario, name: &str) -> u32 {
    let line = scenario.on_node("ip", &["-o", "link", "show", name]);
    line.split(':').next().unwrap().trim().parse().unwrap()
}

/// Says by which link each pod of a Service is reached, and whether by its other end: as the agent would, or as it does where the
/// kernel lacks `bpf_redirect_peer`.
fn link_pods(scenario: &Scenario, network: PodNetwork, flags: u32) {
    let map = Map::HashMap(pinned(scenario.lab.pin_path(), "pods"));
    let mut pods: HashMap<_, PodKey, PodValue> = HashMap::try_from(map).unwrap();
    for (index, pod) in (1..).zip(&scenario.lab.pods) {
        let interface = match network {
            PodNetwork::PointToPoint => index_of_link(scenario, &format!("pod{index}")),
            PodNetwork::Bridge => index_of_link(scenario, "cni0"),
        };
        for address in &pod.host.addresses {
            let key = PodKey { pod: (*address).into() };
            if let Ok(value) = pods.get(&key, 0) {
                let flags = value.flags & !POD_HAS_PEER | flags;
                pods.insert(key, PodValue { interface, flags, ..value }, 0).unwrap();
            }
        }
    }
}

fn nft(scenario: &Scenario, rules: &str) {
    let mut nft = scenario.lab.node.namespace.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

/// Delivery of each flow with one of the lab's clients.
fn deliveries(scenario: &Scenario) -> Vec<(FlowKey, u8)> {
    let map = Map::LruHashMap(pinned(scenario.lab.pin_path(), "flows"));
    let flows: HashMap<_, FlowKey, FlowValue> = HashMap::try_from(map).unwrap();
    let clients: Vec<Address> = scenario.lab.client.addresses.iter().copied().map(Address::from).collect();
    let all = flows.iter().map(Result::unwrap);
    all.filter(|(key, _)| clients.contains(&key.peer)).map(|(key, flow)| (key, flow.delivery)).collect()
}

/// The lines of the node's conntrack table that have this address.
fn tracked(scenario: &Scenario, address: IpAddr) -> Vec<String> {
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    let table = scenario.on_node("conntrack", &["-L", "-f", family]);
    let word = format!("={address} ");
    table.lines().filter(|line| line.contains(&word)).map(str::to_owned).collect()
}

/// How pods are connected, the flags of their links, and whether offloads are on.
type Linked = (PodNetwork, u32, bool);

/// Tries the cells of `clients` in all `labs` at once, with the node's `rules`.
fn matrix<const N: usize>(labs: [Linked; N], rules: &str, clients: &[Client]) -> Table {
    let mut table = Table::default();
    std::thread::scope(|scope| {
        let tried = labs.map(|lab| scope.spawn(move || matrix_of(lab, rules, clients).unwrap()));
        for tried in tried {
            table.extend(tried.join().unwrap());
        }
    });
    table
}

fn matrix_of((network, flags, offloads): Linked, rules: &str, clients: &[Client]) -> anyhow::Result<Table> {
    let ground = Ground::with(network, offloads, &DIRECT);
    link_pods(ground.scenario(), network, flags);
    nft(ground.scenario(), rules);
    let table = ground.try_clients(clients)?;
    let flows = deliveries(ground.scenario());
    let direct = flows.iter().filter(|(_, delivery)| is_direct(*delivery)).count();
    assert!(direct > 50 && direct == flows.len(), "{direct} direct ones among {flows:?}");
    Ok(table)
}

fn assert_passed(table: &Table, title: &str, clients: usize) {
    for line in table.lines() {
        report::line(title, &line).unwrap();
    }
    let failures = table.failures();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // Checks, families, Services, networks.
    assert_eq!(table.len(), clients * 8 * 2 * 2 * 2);
}

#[test]
fn clients_outside_are_served_directly_in_every_cell_of_the_matrix_whatever_netfilter_is_told() {
    skip_unless_root!();
    let labs = [
        (PodNetwork::PointToPoint, POD_HAS_PEER, true),
        (PodNetwork::PointToPoint, 0, true),
        (PodNetwork::Bridge, 0, true),
        (PodNetwork::PointToPoint, POD_HAS_PEER, false),
        (PodNetwork::Bridge, 0, false),
    ];
    let table = matrix(labs, USUAL_RULES, &[Client::Outside]);
    assert_passed(&table, "matrix-direct", 1);
}

#[test]
fn all_other_clients_are_served_as_ever_beside_those_that_are_served_directly() {
    skip_unless_root!();
    let labs = [(PodNetwork::PointToPoint, POD_HAS_PEER, true), (PodNetwork::Bridge, 0, true)];
    let table = matrix(labs, "", &Client::ALL);
    assert_passed(&table, "matrix-beside-direct", Client::ALL.len());
}

fn every_protocol_is_delivered(network: PodNetwork, flags: u32) {
    let spec = LabSpec::unique().with_pod_network(network);
    let scenario = Scenario::start(&spec, &DIRECT);
    link_pods(&scenario, network, flags);
    nft(&scenario, USUAL_RULES);
    nft(&scenario, NO_FORWARDING);
    for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
        for external in externals() {
            let question = scenario.question(protocol, from_port, external, PORT);
            let outcome = scenario.ask(&question);
            if let Some(sighting) = outcome.answer.ok().and_then(|bytes| Sighting::in_answer(&bytes)) {
                assert_eq!(sighting.peer.ip(), question.from.ip());
                assert_eq!(sighting.local.ip(), scenario.lab.pod(&sighting.host).host.address(external));
            }
        }
    }
    for address in scenario.all_pods().into_iter().chain(externals()) {
        assert_eq!(tracked(&scenario, address), Vec::<String>::new());
    }
}

#[test]
fn every_protocol_passes_by_a_firewall_that_lets_nothing_through_into_the_pods_end() {
    skip_unless_root!();
    every_protocol_is_delivered(PodNetwork::PointToPoint, POD_HAS_PEER);
}

#[test]
fn every_protocol_passes_by_a_firewall_that_lets_nothing_through_by_the_link() {
    skip_unless_root!();
    every_protocol_is_delivered(PodNetwork::PointToPoint, 0);
}

#[test]
fn every_protocol_passes_by_a_firewall_that_lets_nothing_through_by_a_bridge() {
    skip_unless_root!();
    every_protocol_is_delivered(PodNetwork::Bridge, 0);
}

/// A lab with the usual rules whose pods are reached directly, each by the other end of its link.
fn scenario(spec: &LabSpec) -> Scenario {
    let scenario = Scenario::start(spec, &DIRECT);
    link_pods(&scenario, PodNetwork::PointToPoint, POD_HAS_PEER);
    nft(&scenario, USUAL_RULES);
    scenario
}

/// A conversation with a pod by UDP that has begun.
struct Talk<'a> {
    scenario: &'a Scenario,
    socket: UdpSocket,
    client: SocketAddr,
    external: SocketAddr,
    pod: &'a Host,
    at_pod: SocketAddr,
}

impl<'a> Talk<'a> {
    fn begin(scenario: &'a Scenario, external: IpAddr) -> Self {
        let client = SocketAddr::new(scenario.lab.client.address(external), 41_000);
        let external = SocketAddr::new(external, PORT);
        let socket = scenario.lab.client.udp(client).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(b"who", external).unwrap();
        let mut answer = [0; 512];
        let (size, from) = socket.recv_from(&mut answer).unwrap();
        assert_eq!(from, external);
        let name = Sighting::in_answer(&answer[..size]).unwrap().host;
        let pod = &scenario.lab.pod(&name).host;
        let at_pod = SocketAddr::new(pod.address(external.ip()), PORT);
        let key = FlowKey {
            pod: at_pod.ip().into(),
            peer: client.ip().into(),
            pod_port: at_pod.port().to_be(),
            peer_port: client.port().to_be(),
            protocol: protocol::UDP,
            query: 0,
            padding: 0,
        };
        assert!(deliveries(scenario).contains(&(key, DELIVERY_PEER)));
        Self { scenario, socket, client, external, pod, at_pod }
    }

    /// A datagram of the client of so many bytes, which may be fragmented.
    fn question(&self, size: usize) -> Packet {
        Packet::udp(self.client, self.external, &vec![b'q'; size])
    }

    /// A datagram of the pod, likewise.
    fn answer(&self, size: usize) -> Packet {
        Packet::udp(self.at_pod, self.client, &vec![b'a'; size])
    }

    /// Reads what comes from the external address, of which there must be so much.
    fn receives(&self, size: usize) {
        let mut answer = vec![0; 1 << 16];
        let (received, from) = self.socket.recv_from(&mut answer).unwrap();
        assert_eq!((received, from), (size, self.external));
    }

    /// Sends from the pod what cannot go on, and waits until the pod is told so. Nothing of it must reach the client.
    fn pod_is_told(&self, packet: &Packet, is_told: impl Fn(&Packet) -> bool) {
        let (at_pod, at_client) = (self.pod.capture().unwrap(), self.scenario.lab.client.capture().unwrap());
        self.pod.send(std::slice::from_ref(packet)).unwrap();
        let quoted = Some((self.at_pod.ip(), self.client.ip()));
        let told = |packet: &Packet| is_told(packet) && packet.quoted_addresses() == quoted;
        assert!(at_pod.wait_for(PATIENCE, Direction::In, told).is_some(), "nobody told the pod of {packet}");
        let leaked = |seen: &Packet| seen.payload.ends_with(&packet.payload[8..]);
        assert_eq!(at_client.wait_for(SILENCE, Direction::In, leaked), None);
    }
}

fn is_time_exceeded(packet: &Packet) -> bool {
    let kind = if packet.protocol == protocol::ICMP { 11 } else { 3 };
    [protocol::ICMP, protocol::ICMPV6].contains(&packet.protocol) && packet.payload.first() == Some(&kind)
}

#[test]
fn the_node_is_a_hop_to_either_side() {
    skip_unless_root!();
    let scenario = scenario(&LabSpec::unique());
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        let (at_pod, at_client) = (talk.pod.capture().unwrap(), scenario.lab.client.capture().unwrap());
        let with_hops = |packet: Packet, hop_limit| Packet { hop_limit, ..packet };
        scenario.lab.client.send(&[with_hops(talk.question(10), 2)]).unwrap();
        let last_hop = |packet: &Packet| packet.protocol == protocol::UDP && packet.hop_limit == 1;
        let arrived = at_pod.wait_for(PATIENCE, Direction::In, last_hop);
        assert_eq!(arrived.map(|packet| packet.source), Some(talk.client.ip()));
        talk.pod.send(&[with_hops(talk.answer(10), 2)]).unwrap();
        let arrived = at_client.wait_for(PATIENCE, Direction::In, last_hop);
        assert_eq!(arrived.map(|packet| packet.source), Some(external));
        scenario.lab.client.send(&[with_hops(talk.question(10), 1)]).unwrap();
        let told = at_client.wait_for(PATIENCE, Direction::In, is_time_exceeded).unwrap();
        assert_eq!(told.quoted_addresses(), Some((talk.client.ip(), external)));
        talk.pod_is_told(&with_hops(talk.answer(10), 1), is_time_exceeded);
    }
}

#[test]
fn what_is_too_large_for_a_way_is_fragmented_there_or_its_sender_told() {
    skip_unless_root!();
    let scenario = scenario(&LabSpec::unique());
    scenario.lab.node.namespace.ip(&format!("link set {UPLINK} mtu 1300\n")).unwrap();
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        let at_client = scenario.lab.client.capture().unwrap();
        let is_piece = |packet: &Packet| packet.fragment.is_some() && packet.source == external;
        if external.is_ipv4() {
            talk.pod.send(&[talk.answer(1_350)]).unwrap();
            talk.receives(1_350);
            assert!(at_client.packets(Direction::In).iter().any(is_piece));
            // The first does not fit, the last would.
            talk.pod.send(&talk.answer(1_500).fragments(7, 1_400)).unwrap();
            talk.receives(1_500);
        } else {
            talk.pod_is_told(&talk.answer(1_350), Packet::is_too_big);
        }
        // What fits goes directly as ever.
        talk.pod.send(&[talk.answer(1_200)]).unwrap();
        talk.receives(1_200);
        talk.pod.send(&talk.answer(1_500).fragments(8, 1_200)).unwrap();
        talk.receives(1_500);
    }
    scenario.lab.node.namespace.ip(&format!("link set {UPLINK} mtu 1500\n")).unwrap();
    let pods: Vec<&str> = scenario.lab.pods.iter().map(|pod| pod.host.name.as_str()).collect();
    scenario.lab.narrow_ways_to_pods(&pods).unwrap();
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        let (at_pod, at_client) = (talk.pod.capture().unwrap(), scenario.lab.client.capture().unwrap());
        scenario.lab.client.send(&[talk.question(1_450)]).unwrap();
        if external.is_ipv4() {
            let is_piece = |packet: &Packet| packet.fragment.is_some() && packet.source == talk.client.ip();
            assert!(at_pod.wait_for(PATIENCE, Direction::In, is_piece).is_some());
            let mut answer = vec![0; 1 << 16];
            let (size, _) = talk.socket.recv_from(&mut answer).unwrap();
            assert!(answer[..size].ends_with(&[b'q'; 1_450]), "the pod puts the pieces together");
        } else {
            let told = at_client.wait_for(PATIENCE, Direction::In, Packet::is_too_big).unwrap();
            assert_eq!(told.quoted_addresses(), Some((talk.client.ip(), external)));
        }
    }
}

#[test]
fn what_the_node_has_learnt_of_a_path_for_itself_does_not_part_a_conversation() {
    skip_unless_root!();
    let scenario = scenario(&LabSpec::unique().with_router());
    scenario.lab.narrow_way_to_client().unwrap();
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        // The node sends something too large itself, and is told so.
        let client = talk.client.ip().to_string();
        let family = if external.is_ipv4() { "-4" } else { "-6" };
        let ping = ["-c1", "-q", family, "-W1", "-s1400", "-Mdo", &client];
        let _ = scenario.lab.node.namespace.command("ping").unwrap().args(ping).output().unwrap();
        let cached = scenario.on_node("ip", &[family, "route", "get", &client]);
        assert!(cached.contains("mtu 1300"), "{cached}");
        // It fits the uplink, and nobody but the router has a say in it.
        if external.is_ipv4() {
            talk.pod.send(&[talk.answer(1_400)]).unwrap();
            talk.receives(1_400);
        } else {
            talk.pod_is_told(&talk.answer(1_400), Packet::is_too_big);
        }
        for address in [talk.at_pod.ip(), external] {
            assert_eq!(tracked(&scenario, address), Vec::<String>::new());
        }
    }
}

#[test]
fn a_client_that_the_routing_finds_elsewhere_is_answered_there() {
    skip_unless_root!();
    let scenario = scenario(&LabSpec::unique());
    nft(&scenario, NO_FORWARDING);
    let client = &scenario.lab.client;
    let (node, far) = (&scenario.lab.node.namespace, client.namespace.name());
    node.ip(&format!(
        "link add other0 type veth peer name eth1 netns {far}\nlink set other0 up\n\
         address add 192.168.9.1/24 dev other0\naddress add fd00:9::1/64 dev other0 nodad\n"
    ))
    .unwrap();
    client
        .namespace
        .ip("address add 192.168.9.2/24 dev eth1\naddress add fd00:9::2/64 dev eth1 nodad\nlink set eth1 up\n")
        .unwrap();
    for (external, next_hop) in externals().into_iter().zip(["192.168.9.2", "fd00:9::2"]) {
        let at_other = Capture::start(&client.namespace, "eth1").unwrap();
        let address = client.address(external).to_string();
        // Of packets from the external address alone, as they are to be.
        let family = if external.is_ipv4() { "-4" } else { "-6" };
        let rule = [family, "rule", "add", "from", &external.to_string(), "lookup", "100"];
        let _ = scenario.on_node("ip", &rule);
        let route = [family, "route", "add", &address, "via", next_hop, "dev", "other0", "table", "100"];
        let _ = scenario.on_node("ip", &route);
        let _talk = Talk::begin(&scenario, external);
        let answer = |packet: &Packet| packet.source == external && packet.protocol == protocol::UDP;
        assert!(at_other.wait_for(PATIENCE, Direction::In, answer).is_some());
    }
}

/// Packets of a family that the node's stack forwards out by an interface.
fn forwarded_by(scenario: &Scenario, family: &str) -> u64 {
    let counters = scenario.on_node("nft", &["-j", "list", "counters"]);
    let counters: serde_json::Value = serde_json::from_str(&counters).unwrap();
    let mut counters = counters["nftables"].as_array().unwrap().iter();
    counters
        .find_map(|entry| (entry["counter"]["name"] == family).then(|| &entry["counter"]["packets"]))
        .unwrap()
        .as_u64()
        .unwrap()
}

#[test]
fn a_conversation_goes_by_the_stacks_rules_while_the_route_to_its_pod_leads_elsewhere() {
    skip_unless_root!();
    const DATAGRAMS: u64 = 5;
    let scenario = scenario(&LabSpec::unique());
    // To somebody on the node, who is no pod.
    let node = &scenario.lab.node.namespace;
    node.ip("link add other0 type veth peer name other1\nlink set other0 up\nlink set other1 up\n").unwrap();
    nft(
        &scenario,
        "table inet lab {
           counter v4 {}
           counter v6 {}
           chain forward {
             type filter hook forward priority filter;
             meta nfproto ipv4 oifname other0 counter name v4
             meta nfproto ipv6 oifname other0 counter name v6
           }
         }",
    );
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        let client = &scenario.lab.client;
        let family = if external.is_ipv4() { "v4" } else { "v6" };
        let pod = talk.at_pod.ip();
        let link = scenario.lab.pods.iter().position(|pod| pod.host.name == talk.pod.name).unwrap() + 1;
        let route = |kind_and_link: &str| {
            let (kind, link) = kind_and_link.split_once(' ').unwrap_or((kind_and_link, ""));
            node.ip(&format!("route replace {kind} {pod} {link}\n")).unwrap();
        };
        node.ip(&format!("neighbour add {pod} lladdr 02:00:00:00:09:09 dev other0 nud permanent\n")).unwrap();
        for round in 1..=2 {
            let at_pod = talk.pod.capture().unwrap();
            route("unicast dev other0");
            for _ in 0..DATAGRAMS {
                client.send(&[talk.question(10)]).unwrap();
            }
            let passed = wait::until(PATIENCE, || {
                (forwarded_by(&scenario, family) == round * DATAGRAMS).then_some(())
            });
            assert!(passed.is_some(), "{} of {}", forwarded_by(&scenario, family), round * DATAGRAMS);
            let at_client = client.capture().unwrap();
            route("unreachable");
            client.send(&[talk.question(10)]).unwrap();
            let told = |packet: &Packet| packet.quoted_addresses() == Some((talk.client.ip(), external));
            assert!(at_client.wait_for(PATIENCE, Direction::In, told).is_some(), "the client is not told");
            let from_client = |packet: &Packet| packet.source == talk.client.ip();
            assert!(!at_pod.packets(Direction::In).iter().any(from_client));
            // And back: the same conversation, past the stack.
            route(&format!("unicast dev pod{link}"));
            client.send(&[talk.question(10)]).unwrap();
            assert!(at_pod.wait_for(PATIENCE, Direction::In, from_client).is_some());
            let answered = |packet: &Packet| packet.source == external && packet.protocol == protocol::UDP;
            assert!(at_client.wait_for(PATIENCE, Direction::In, answered).is_some());
            assert_eq!(forwarded_by(&scenario, family), round * DATAGRAMS);
        }
    }
}

#[test]
fn a_pod_with_the_address_of_another_does_not_get_past_the_filters_of_its_link() {
    skip_unless_root!();
    let scenario = scenario(&LabSpec::unique());
    nft(&scenario, REVERSE_PATH_FILTER);
    for external in externals() {
        let talk = Talk::begin(&scenario, external);
        let other = &scenario.lab.pods.iter().find(|pod| pod.host.name != talk.pod.name).unwrap().host;
        let at_client = scenario.lab.client.capture().unwrap();
        other.send(&[talk.answer(77)]).unwrap();
        let leaked = |packet: &Packet| [talk.at_pod.ip(), external].contains(&packet.source);
        assert_eq!(at_client.wait_for(SILENCE, Direction::In, leaked), None);
        talk.pod.send(&[talk.answer(78)]).unwrap();
        talk.receives(78);
    }
}

#[test]
fn nothing_is_lost_while_the_delivery_changes() {
    skip_unless_root!();
    let mut scenario = scenario(&LabSpec::unique());
    let plain = fs::read_to_string(scenario.path("service.yaml")).unwrap();
    let mut port = 43_000;
    let mut connections: Vec<Connection> =
        externals().map(|external| Connection::open(&scenario, external, port)).into();
    let losses = lost_of_each_during(&mut scenario, externals(), |scenario| {
        for delivery in ["stack", "direct", "stack", "direct"] {
            let annotation = format!("  annotations: {{proxier.io/delivery: {delivery}}}\n  labels:");
            scenario.write("service.yaml", &plain.replacen("  labels:", &annotation, 1));
            for external in externals() {
                let arrived = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
                    link_pods(scenario, PodNetwork::PointToPoint, POD_HAS_PEER);
                    port += 1;
                    let question = scenario.question(Protocol::Udp, port, external, PORT);
                    question.ask_who(&scenario.lab.client).unwrap().unwrap();
                    let flows = deliveries(scenario);
                    let (_, chosen) = flows.iter().find(|(key, _)| key.peer_port == port.to_be()).unwrap();
                    (is_direct(*chosen) == (delivery == "direct")).then_some(())
                });
                assert!(arrived.is_some(), "new conversations with {external} do not become {delivery}");
                port += 1;
                connections.push(Connection::open(scenario, external, port));
            }
            for connection in &mut connections {
                connection.goes_on(delivery);
            }
        }
    });
    for (external, (sent, lost)) in externals().into_iter().zip(losses) {
        assert!(sent > 100, "only {sent} datagrams were sent");
        assert!(lost.is_empty(), "{} of {sent} datagrams to {external} were lost: {lost:?}", lost.len());
        let client = Address::from(scenario.lab.client.address(external));
        let flows = deliveries(&scenario).into_iter().filter(|(key, _)| key.peer == client);
        let kinds: BTreeSet<bool> = flows.map(|(_, kind)| is_direct(kind)).collect();
        assert_eq!(kinds.len(), 2, "both kinds side by side");
    }
}

/// That conntrack knows of nothing is worth something only if it would be seen.
#[test]
fn the_stack_tracks_what_goes_through_it() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    nft(&scenario, USUAL_RULES);
    for external in externals() {
        let pod = scenario.pod_of(scenario.lab.client.address(external), external);
        assert!(!tracked(&scenario, pod.local.ip()).is_empty());
    }
}
