//! `proxier kube ... to-bpf` on a node of the lab, at a double of the API server, with traffic: what objects mean for packets, and
//! what becomes of packets when the API server fails.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod asked;
mod outages;
mod said;

use std::net::IpAddr;

use proxier_tests::{
    apiserver::{ApiServer, Resource},
    exchange::Protocol,
    kube_scenario::{apply, apply_pods, apply_service, start},
    manifests,
    scenario::{SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME},
};

/// More external addresses, for Services that come and go beside the one that stays.
fn another_external(number: u8) -> IpAddr {
    IpAddr::from([10, 0, 1, number])
}

/// Whom the client reaches at an address of its own family.
fn pod_of(scenario: &Scenario, external: IpAddr) -> String {
    scenario.pod_of(scenario.lab.client.address(external), external).host
}

#[test]
fn a_service_that_only_the_api_server_knows_is_delivered() {
    skip_unless_root!();
    let (server, scenario) = start(&LabSpec::unique(), &[]);
    for (from_port, protocol) in (42000..).zip(Protocol::ALL) {
        for external in externals() {
            let _ = scenario.ask(&scenario.question(protocol, from_port, external, 5060));
        }
    }
    // Of the API server's own slices there is a watch, too.
    assert_eq!((server.watchers(Resource::Services), server.watchers(Resource::EndpointSlices)), (1, 2));
    let [v4, v6] = externals();
    apply_pods(&server, SERVICE, &scenario.pod("alpine-2"));
    for external in [v4, v6] {
        scenario.wait_for_pod(scenario.lab.client.address(external), external, "alpine-2");
    }
}

fn a_service_without_its_label_is_left_alone(server: &ApiServer, scenario: &Scenario) {
    let stays = another_external(1);
    apply_service(server, "stays", &[stays]);
    apply_pods(server, "stays", &scenario.pod("alpine-1"));
    scenario.wait_for_any_pod(stays);
    let service = manifests::service(SERVICE, &externals());
    // The controller of EndpointSlices gives them the Service's labels.
    let slices = manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods());
    for labelled in [service, slices] {
        apply(server, &labelled.replace("service-proxy-name: proxier", "service-proxy-name: other"));
        for external in externals() {
            scenario.wait_for_silence(external);
        }
        assert_eq!(pod_of(scenario, stays), "alpine-1");
        apply(server, &labelled);
        for external in externals() {
            scenario.wait_for_any_pod(external);
        }
    }
}

fn an_address_that_a_node_has_is_withdrawn(server: &ApiServer, scenario: &Scenario) {
    let [v4, v6] = externals();
    let addresses = format!("addresses: [{{type: InternalIP, address: {v4}}}]");
    apply(
        server,
        &format!("apiVersion: v1\nkind: Node\nmetadata: {{name: node2}}\nstatus: {{{addresses}}}\n"),
    );
    scenario.wait_for_silence(v4);
    scenario.wait_for_any_pod(v6);
    server.delete("Node", "", "node2").unwrap();
    scenario.wait_for_any_pod(v4);
}

fn a_service_that_is_deleted_is_withdrawn_and_another_of_its_name_is_delivered(
    server: &ApiServer,
    scenario: &Scenario,
) {
    let [v4, v6] = externals();
    server.delete("Service", "lab", SERVICE).unwrap();
    scenario.wait_for_silence(v4);
    scenario.wait_for_silence(v6);
    assert!(
        scenario.get("services").iter().all(|row| row["name"] != SERVICE),
        "{:?}",
        scenario.get("services")
    );
    // As when somebody deletes and creates it: an address of the former one is no longer its.
    apply_service(server, SERVICE, &[v6]);
    scenario.wait_for_any_pod(v6);
    scenario.wait_for_silence(v4);
}

#[test]
fn what_becomes_of_objects_becomes_of_packets() {
    skip_unless_root!();
    let (server, scenario) = start(&LabSpec::unique(), &[]);
    a_service_without_its_label_is_left_alone(&server, &scenario);
    an_address_that_a_node_has_is_withdrawn(&server, &scenario);
    a_service_that_is_deleted_is_withdrawn_and_another_of_its_name_is_delivered(&server, &scenario);
}
