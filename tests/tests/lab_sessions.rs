//! Which pod a client is sent to, and that it stays there.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use proxier_tests::{
    exchange::Protocol,
    manifests,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME, PodSpec},
    wait,
};

/// With a fair choice among three pods, one is left without any of 32 clients in one case of 140,000.
const CLIENTS: u8 = 32;

fn three_pods() -> LabSpec {
    let mut spec = LabSpec::unique().with_clients(CLIENTS);
    let addresses = ["11.0.2.4".parse().unwrap(), "1100::204".parse().unwrap()];
    spec.pods.push(PodSpec { name: "alpine-3".to_owned(), addresses: addresses.to_vec() });
    spec
}

/// Where each client of `external` is sent.
fn pods_of_clients(scenario: &Scenario, external: IpAddr) -> BTreeMap<IpAddr, String> {
    let clients = scenario.lab.client.addresses.iter().copied();
    clients
        .filter(|client| client.is_ipv4() == external.is_ipv4())
        .map(|client| (client, scenario.pod_of(client, external).host))
        .collect()
}

#[test]
fn a_client_stays_on_its_pod_across_ports_and_protocols() {
    skip_unless_root!();
    let scenario = Scenario::start(&three_pods(), &[]);
    for external in externals() {
        let clients = scenario.lab.client.addresses.clone();
        let clients = clients.into_iter().filter(|client| client.is_ipv4() == external.is_ipv4());
        for client in clients.take(6) {
            let pod = scenario.pod_of(client, external).host;
            for (from_port, protocol) in (42000..).zip(Protocol::ALL) {
                for port in [5060, 6000] {
                    let outcome =
                        scenario.ask(&scenario.question(protocol, from_port, external, port).from(client));
                    assert_eq!(outcome.pods(), [pod.as_str()], "{client} by {protocol} to port {port}");
                }
            }
        }
    }
}

#[test]
fn clients_are_spread_over_all_pods() {
    skip_unless_root!();
    let scenario = Scenario::start(&three_pods(), &[]);
    for external in externals() {
        let used: BTreeSet<String> = pods_of_clients(&scenario, external).into_values().collect();
        assert_eq!(used.len(), 3, "{external}: {used:?}");
    }
}

#[test]
fn removing_a_pod_moves_only_its_clients() {
    skip_unless_root!();
    let scenario = Scenario::start(&three_pods(), &[]);
    let before = externals().map(|external| pods_of_clients(&scenario, external));
    let remaining = [scenario.pod("alpine-1"), scenario.pod("alpine-3")].concat();
    scenario.write_pods(&remaining);
    for (external, before) in externals().into_iter().zip(before) {
        let moves = before.iter().find(|(_, pod)| *pod == "alpine-2").expect("a pod without clients");
        let gone = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            (scenario.pod_of(*moves.0, external).host != "alpine-2").then_some(())
        });
        assert!(gone.is_some(), "{external}: alpine-2 is still used");
        for (client, pod) in pods_of_clients(&scenario, external) {
            if before[&client] == "alpine-2" {
                assert_ne!(pod, "alpine-2", "{client} is still on a pod that has gone");
            } else {
                assert_eq!(pod, before[&client], "{client} was moved without need");
            }
        }
    }
}

#[test]
fn a_pod_that_comes_moves_nobody() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&three_pods(), &[]);
    scenario.write_pods(&scenario.pod("alpine-1"));
    scenario.start_agent();
    for external in externals() {
        let clients = pods_of_clients(&scenario, external);
        assert!(clients.values().all(|pod| pod == "alpine-1"), "{clients:?}");
    }
    scenario.write_pods(&scenario.all_pods());
    let known =
        wait::until(EDIT_TAKES_EFFECT_WITHIN, || (scenario.get("endpoints").len() == 6).then_some(()));
    assert!(known.is_some(), "{:?}", scenario.get("endpoints"));
    for external in externals() {
        let clients = pods_of_clients(&scenario, external);
        assert!(clients.values().all(|pod| pod == "alpine-1"), "{clients:?}");
    }
}

#[test]
fn without_a_pod_packets_are_dropped() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write_pods(&[]);
    scenario.start_agent();
    for external in externals() {
        let question = scenario.question(Protocol::Icmp, 7, external, 0).expecting_silence();
        let outcome = question.ask(&scenario.lab).unwrap();
        outcome.answer.unwrap_err();
        // Passed on, it would follow the node's default route and come back to the client.
        assert!(outcome.client_saw.is_empty(), "the client sees {:?}", outcome.client_saw);
    }
    scenario.write_pods(&scenario.all_pods());
    for external in externals() {
        scenario.wait_for_any_pod(external);
    }
}

#[test]
fn without_a_pod_packets_are_passed_on_if_told_so() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--no-backend", "pass"]);
    scenario.write_pods(&[]);
    scenario.start_agent();
    for external in externals() {
        let question = scenario.question(Protocol::Icmp, 7, external, 0).expecting_silence();
        let outcome = question.ask(&scenario.lab).unwrap();
        // The node forwards it by its default route, back to the client.
        let came_back = outcome.client_saw.iter().any(|packet| packet.destination == external);
        assert!(came_back, "the client sees {:?}", outcome.client_saw);
    }
}

#[test]
fn the_wrong_family_of_pods_is_never_used() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    let only_v4: Vec<IpAddr> = scenario.all_pods().into_iter().filter(IpAddr::is_ipv4).collect();
    scenario.write_pods(&only_v4);
    scenario.start_agent();
    let [v4, v6] = externals();
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, v4, 5060));
    let outcome =
        scenario.question(Protocol::Udp, 42000, v6, 5060).expecting_silence().ask(&scenario.lab).unwrap();
    outcome.answer.unwrap_err();
    assert!(outcome.client_saw.is_empty());
}

#[test]
fn three_hundred_pods_are_all_in_use() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(100), &[]);
    // One host stands for 300 pods: it takes whole ranges as its own.
    let stand_in = &scenario.lab.pods[0].host.namespace;
    stand_in.ip("route add local 11.0.4.0/23 dev lo").unwrap();
    scenario.lab.node.namespace.ip("route add 11.0.4.0/23 dev pod1").unwrap();
    let pods: Vec<IpAddr> = (0..300_u32).map(|index| Ipv4Addr::from(0x0b00_0401 + index).into()).collect();
    scenario.write("slices.yaml", &manifests::slices(SERVICE, NODE_NAME, &pods));
    scenario.start_agent();

    let listed: BTreeSet<String> =
        scenario.get("endpoints").iter().map(|row| row["pod"].as_str().unwrap().to_owned()).collect();
    assert_eq!(listed, pods.iter().map(ToString::to_string).collect());

    let [v4, _] = externals();
    let clients = scenario.lab.client.addresses.clone();
    let mut used = BTreeSet::new();
    for client in clients.into_iter().filter(IpAddr::is_ipv4) {
        let first = scenario.pod_of(client, v4).local;
        assert!(pods.contains(&first.ip()), "{first}");
        assert_eq!(
            scenario.pod_of(client, v4).local,
            SocketAddr::new(first.ip(), 5060),
            "{client} has moved"
        );
        used.insert(first.ip());
    }
    // 100 clients that choose among 300 pods meet about 85 of them; fewer than 60 would be no fair choice.
    assert!(used.len() > 60, "100 clients use only {} of 300 pods", used.len());
}
