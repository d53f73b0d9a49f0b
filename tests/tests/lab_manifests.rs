//! Edits of manifests, as people and programs make them, reach the kernel; mistakes do not take down what works.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{fs, net::IpAddr};

use proxier_tests::{
    exchange::{PATIENCE, Protocol},
    manifests::{self, ConfigMap},
    scenario::{SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME},
    wait,
};

fn client(scenario: &Scenario) -> (IpAddr, IpAddr) {
    let [external, _] = externals();
    (scenario.lab.client.address(external), external)
}

#[test]
fn every_way_of_editing_a_file_reaches_the_kernel() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let (from, external) = client(&scenario);
    let slices = |pod| manifests::slices(SERVICE, NODE_NAME, &scenario.pod(pod));
    let path = scenario.path("slices.yaml");

    manifests::replace(&path, &slices("alpine-1")).unwrap();
    scenario.wait_for_pod(from, external, "alpine-1");
    manifests::edit_as_vim_does(&path, &slices("alpine-2")).unwrap();
    scenario.wait_for_pod(from, external, "alpine-2");
    fs::write(&path, slices("alpine-1")).unwrap();
    scenario.wait_for_pod(from, external, "alpine-1");
    fs::remove_file(&path).unwrap();
    scenario.wait_for_silence(external);
    fs::write(scenario.path("under-another-name.json"), json_of(&scenario.pod("alpine-2"))).unwrap();
    scenario.wait_for_pod(from, external, "alpine-2");
}

/// One slice of IPv4, in the other notation that Kubernetes has.
fn json_of(pods: &[IpAddr]) -> String {
    let address = pods.iter().find(|address| address.is_ipv4()).unwrap();
    serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-4",
            "namespace": "lab",
            "labels": {
                "kubernetes.io/service-name": SERVICE,
                "service.kubernetes.io/service-proxy-name": "proxier",
            },
        },
        "addressType": "IPv4",
        "ports": [],
        "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}, "nodeName": NODE_NAME}],
    })
    .to_string()
}

#[test]
fn a_config_map_volume_is_followed() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    let (from, external) = client(&scenario);
    let service = manifests::service(SERVICE, &externals());
    let slices = |pod| manifests::slices(SERVICE, NODE_NAME, &scenario.pod(pod));
    let (first, second) = (slices("alpine-1"), slices("alpine-2"));
    for name in ["service.yaml", "slices.yaml"] {
        fs::remove_file(scenario.path(name)).unwrap();
    }
    let mut volume =
        ConfigMap::mount(&scenario.spec.manifests, &[("service.yaml", &service), ("slices.yaml", &first)])
            .unwrap();
    scenario.start_agent();
    assert_eq!(scenario.pod_of(from, external).host, "alpine-1");
    for (slices, pod) in [(&second, "alpine-2"), (&first, "alpine-1"), (&second, "alpine-2")] {
        volume.update(&[("service.yaml", &service), ("slices.yaml", slices)]).unwrap();
        scenario.wait_for_pod(from, external, pod);
    }
}

#[test]
fn a_broken_file_keeps_its_last_good_objects() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &[]);
    let (from, external) = client(&scenario);
    let pod = scenario.pod_of(from, external).host;
    scenario.write(
        "slices.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: [web\n",
    );
    scenario.agent().wait_for_log(PATIENCE, |log| log.contains("slices.yaml")).unwrap();
    for (from_port, external) in (42000..).zip(externals()) {
        let outcome = scenario.ask(&scenario.question(Protocol::Tcp, from_port, external, 6000));
        assert_eq!(outcome.pods().len(), 1);
    }
    // What else changes meanwhile is followed.
    let another: IpAddr = "10.0.0.56".parse().unwrap();
    scenario.write("service.yaml", &manifests::service(SERVICE, &[external, another]));
    scenario.wait_for_pod(from, external, &pod);
    scenario.wait_for_any_pod(another);
    // And the file, once it is right again.
    let other = if pod == "alpine-1" { "alpine-2" } else { "alpine-1" };
    scenario.write_pods(&scenario.pod(other));
    scenario.wait_for_pod(from, external, other);
}

#[test]
fn a_service_that_goes_takes_its_addresses_along() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [v4, v6] = externals();
    for external in [v4, v6] {
        let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, 5060));
    }
    scenario.write("service.yaml", &manifests::service(SERVICE, &[v6]));
    scenario.wait_for_silence(v4);
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42001, v6, 5060));
    fs::remove_file(scenario.path("service.yaml")).unwrap();
    scenario.wait_for_silence(v6);
    let empty = wait::until(PATIENCE, || {
        (scenario.get("services").is_empty() && scenario.get("endpoints").is_empty()).then_some(())
    });
    assert!(empty.is_some(), "{:?} {:?}", scenario.get("services"), scenario.get("endpoints"));
}

#[test]
fn unknown_kinds_and_bad_addresses_do_not_stop_the_rest() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write("other.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {}\n");
    let bad = manifests::service("bad", &externals())
        .replace("\"10.0.0.55\"", "\"10.0.0.555\"")
        .replace("1000::55", "1000::56");
    scenario.write("bad.yaml", &bad);
    scenario.start_agent();
    let log = scenario.agent().log();
    assert!(log.contains("10.0.0.555") && log.contains("bad"), "the log does not name what is wrong:\n{log}");
    for external in externals() {
        let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, 5060));
    }
}

#[test]
fn an_address_of_two_services_goes_to_the_first_and_to_the_other_when_that_goes() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    let (from, external) = client(&scenario);
    scenario.write("slices.yaml", &manifests::slices(SERVICE, NODE_NAME, &scenario.pod("alpine-1")));
    // `web` has a time of creation, and an earlier one.
    let dated = |name: &str, time: &str| {
        let name_line = format!("  name: {name}\n");
        manifests::service(name, &[external]).replacen(
            &name_line,
            &format!("{name_line}  creationTimestamp: \"{time}\"\n"),
            1,
        )
    };
    scenario.write("service.yaml", &dated(SERVICE, "2026-01-01T00:00:00Z"));
    scenario.write("rival.yaml", &dated("a-rival", "2026-02-01T00:00:00Z"));
    scenario.write("rival-slices.yaml", &manifests::slices("a-rival", NODE_NAME, &scenario.pod("alpine-2")));
    scenario.start_agent();
    assert_eq!(scenario.pod_of(from, external).host, "alpine-1");
    let log = scenario.agent().log();
    assert!(
        log.contains("a-rival") && log.contains(&external.to_string()),
        "the loser is not reported:\n{log}"
    );
    fs::remove_file(scenario.path("service.yaml")).unwrap();
    scenario.wait_for_pod(from, external, "alpine-2");
}
