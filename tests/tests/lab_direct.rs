//! Delivery past the node's stack (docs/decisions/017): all that the matrix tries, and that the node's netfilter neither sees
//! nor disturbs it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{io::Write as _, net::IpAddr, path::Path, process::Stdio};

use aya::maps::{HashMap, Map, MapData};
use proxier_common::{Address, FlowKey, FlowValue, POD_HAS_PEER, PodKey, PodValue, SCHEMA, is_direct};
use proxier_tests::{
    exchange::Protocol,
    matrix::{Client, Table, ground::Ground},
    report,
    responder::Sighting,
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, PodNetwork},
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

/// Says which link leads to each pod of a Service, in place of the agent.
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

/// Tries the cells of `clients`, with pods that are linked so, and the node's `rules`.
fn matrix(
    (network, flags, offloads): (PodNetwork, u32, bool),
    rules: &str,
    clients: &[Client],
) -> anyhow::Result<Table> {
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
    let mut table = Table::default();
    for lab in [
        (PodNetwork::PointToPoint, POD_HAS_PEER, true),
        (PodNetwork::PointToPoint, 0, true),
        (PodNetwork::Bridge, 0, true),
        (PodNetwork::PointToPoint, POD_HAS_PEER, false),
        (PodNetwork::Bridge, 0, false),
    ] {
        table.extend(matrix(lab, USUAL_RULES, &[Client::Outside]).unwrap());
    }
    assert_passed(&table, "direct matrix", 1);
}

#[test]
fn all_other_clients_are_served_as_ever_beside_those_that_are_served_directly() {
    skip_unless_root!();
    let mut table = Table::default();
    for lab in [(PodNetwork::PointToPoint, POD_HAS_PEER, true), (PodNetwork::Bridge, 0, true)] {
        table.extend(matrix(lab, "", &Client::ALL).unwrap());
    }
    assert_passed(&table, "matrix beside direct clients", Client::ALL.len());
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
