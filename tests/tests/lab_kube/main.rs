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
    apiserver::Resource,
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

#[test]
fn a_service_without_its_label_is_left_alone_until_it_has_it_again() {
    skip_unless_root!();
    let (server, scenario) = start(&LabSpec::unique(), &[]);
    let stays = another_external(1);
    apply_service(&server, "stays", &[stays]);
    apply_pods(&server, "stays", &scenario.pod("alpine-1"));
    scenario.wait_for_any_pod(stays);

    let labelled = manifests::service(SERVICE, &externals());
    apply(&server, &labelled.replace("service-proxy-name: proxier", "service-proxy-name: other"));
    for external in externals() {
        scenario.wait_for_silence(external);
    }
    assert_eq!(pod_of(&scenario, stays), "alpine-1");
    apply(&server, &labelled);
    for external in externals() {
        scenario.wait_for_any_pod(external);
    }

    // The controller of EndpointSlices gives them the Service's labels.
    let slices = manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods());
    let elsewhere = slices.replace("service-proxy-name: proxier", "service-proxy-name: other");
    apply(&server, &elsewhere);
    for external in externals() {
        scenario.wait_for_silence(external);
    }
    apply(&server, &slices);
    for external in externals() {
        scenario.wait_for_any_pod(external);
    }
}

#[test]
fn a_service_that_is_deleted_is_withdrawn_and_another_of_its_name_is_delivered() {
    skip_unless_root!();
    let (server, scenario) = start(&LabSpec::unique(), &[]);
    let [v4, v6] = externals();
    scenario.wait_for_any_pod(v4);
    server.delete("Service", "lab", SERVICE).unwrap();
    scenario.wait_for_silence(v4);
    scenario.wait_for_silence(v6);
    assert_eq!(scenario.get("services").len(), 0);
    // As when somebody deletes and creates it: an address of the former one is no longer its.
    apply_service(&server, SERVICE, &[v6]);
    scenario.wait_for_any_pod(v6);
    scenario.wait_for_silence(v4);
}

#[test]
fn an_address_that_a_node_has_is_withdrawn_until_the_node_goes() {
    skip_unless_root!();
    let (server, scenario) = start(&LabSpec::unique(), &[]);
    let [v4, v6] = externals();
    scenario.wait_for_any_pod(v4);
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: node2}}\nstatus:\n  addresses:\n  - {{type: InternalIP, address: {v4}}}\n"
    );
    apply(&server, &node);
    scenario.wait_for_silence(v4);
    scenario.wait_for_any_pod(v6);
    server.delete("Node", "", "node2").unwrap();
    scenario.wait_for_any_pod(v4);
}
