//! What a user can look at: proxier's own tables, and the kernel's with bpftool.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::collections::BTreeSet;

use proxier_common::SCHEMA;
use proxier_tests::{
    exchange::Protocol,
    manifests,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME},
    wait,
};

#[test]
fn get_shows_services_endpoints_and_flows() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let strings = |rows: &[serde_json::Value], field: &str| -> BTreeSet<String> {
        rows.iter()
            .map(|row| row[field].as_str().unwrap_or_else(|| panic!("no {field} in {row}")).to_owned())
            .collect()
    };

    let services = scenario.get("services");
    assert_eq!(strings(&services, "external"), externals().map(|address| address.to_string()).into());
    for row in &services {
        assert_eq!(
            (&row["namespace"], &row["name"], &row["backends"]),
            (&"lab".into(), &SERVICE.into(), &2.into())
        );
        assert_eq!(row["noBackend"], "drop");
    }

    let endpoints = scenario.get("endpoints");
    assert_eq!(strings(&endpoints, "pod"), scenario.all_pods().iter().map(ToString::to_string).collect());
    assert_eq!(strings(&endpoints, "name"), [SERVICE.to_owned()].into());
    assert_eq!(strings(&endpoints, "state"), ["ready".to_owned()].into());

    assert_eq!(scenario.get("flows"), Vec::<serde_json::Value>::new());
    for external in externals() {
        let question = scenario.question(Protocol::Udp, 42000, external, 5060);
        let outcome = scenario.ask(&question);
        let pod = scenario.lab.pod(outcome.pods()[0]).host.address(external);
        let flows = scenario.get("flows");
        let row = flows.iter().find(|row| row["external"] == external.to_string()).unwrap();
        assert_eq!(row["protocol"], "udp");
        assert_eq!(row["peer"], question.from.ip().to_string());
        assert_eq!(row["pod"], pod.to_string());
        assert_eq!((&row["peerPort"], &row["podPort"]), (&42000.into(), &5060.into()));
        assert_eq!(row["name"], SERVICE);
    }
    // A connection's state can be followed.
    let external = externals()[0];
    let from = std::net::SocketAddr::new(scenario.lab.client.address(external), 43000);
    let to = std::net::SocketAddr::new(external, 8443);
    let stream = scenario.lab.client.connect(from, to, proxier_tests::exchange::PATIENCE).unwrap();
    let state = || {
        let flows = scenario.get("flows");
        flows.iter().find(|row| row["peerPort"] == 43000).map(|row| row["state"].as_str().unwrap().to_owned())
    };
    assert_eq!(state().as_deref(), Some("established"));
    // Both sides say that they have no more to send.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    std::io::copy(&mut &stream, &mut std::io::sink()).unwrap();
    let closed = wait::until(proxier_tests::exchange::PATIENCE, || state().filter(|state| state == "closed"));
    assert!(closed.is_some(), "{:?}", state());
}

#[test]
fn get_shows_pods_that_drain_until_they_go() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let pods = scenario.all_pods();
    let draining = pods[0];
    let states = || -> BTreeSet<(String, String, bool)> {
        let row = |row: &serde_json::Value| {
            let text = |field: &str| row[field].as_str().unwrap().to_owned();
            (text("pod"), text("state"), row["slot"].is_number())
        };
        scenario.get("endpoints").iter().map(row).collect()
    };
    let comes_to = |expected: &BTreeSet<_>| {
        let came = wait::until(EDIT_TAKES_EFFECT_WITHIN, || (states() == *expected).then_some(()));
        assert!(came.is_some(), "{:?} is never {expected:?}", states());
    };
    let ready = |pod: &std::net::IpAddr| (pod.to_string(), "ready".to_owned(), true);

    let slices = manifests::slices(SERVICE, NODE_NAME, &pods);
    let endpoint = format!("[\"{draining}\"]\n  conditions: {{ready: true}}");
    assert!(slices.contains(&endpoint), "{slices}");
    let unready = endpoint.replace("true", "false");
    scenario.write("slices.yaml", &slices.replace(&endpoint, &unready));
    let mut expected: BTreeSet<_> = pods[1..].iter().map(ready).collect();
    let rest = expected.clone();
    expected.insert((draining.to_string(), "draining".to_owned(), false));
    comes_to(&expected);
    let table = scenario.proxier(&["get", "endpoints"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("draining"), "{table:?}");

    scenario.write_pods(&pods[1..]);
    comes_to(&rest);
    scenario.write_pods(&pods);
    comes_to(&pods.iter().map(ready).collect());
}

#[test]
fn get_prints_every_format() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for kind in ["services", "endpoints", "flows"] {
        for format in ["table", "wide", "json", "yaml"] {
            let output = scenario.proxier(&["get", kind, "-o", format]);
            assert!(
                output.status.success(),
                "get {kind} -o {format}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let text = String::from_utf8_lossy(&output.stdout);
            assert_eq!(text.contains(SERVICE), kind != "flows", "get {kind} -o {format}:\n{text}");
        }
    }
}

#[test]
fn bpftool_prints_the_tables_with_named_fields() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for external in externals() {
        let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, 5060));
    }
    let tables: [(&str, &[&str]); 6] = [
        ("services", &["external", "service_id", "generation", "backend_count", "affinity_timeout", "flags"]),
        ("backends", &["service_id", "generation", "slot", "pod"]),
        (
            "flows",
            &["pod", "peer", "pod_port", "peer_port", "protocol", "external", "last_seen", "tcp_state"],
        ),
        ("sessions", &["external", "peer", "pod", "last_seen", "service_id"]),
        ("names", &["service_id", "namespace", "name", "family"]),
        ("pods", &["pod", "external", "flags"]),
    ];
    for (table, fields) in tables {
        let path = scenario.lab.pin_path().join(format!("v{SCHEMA}")).join(table);
        let dump = scenario.on_node("bpftool", &["map", "dump", "pinned", &path.display().to_string()]);
        for field in fields {
            assert!(dump.contains(&format!("\"{field}\":")), "no field {field} in {table}:\n{dump}");
        }
    }
}

#[test]
fn get_says_what_to_do_when_there_is_nothing_to_read() {
    skip_unless_root!();
    let scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    let output = scenario.proxier(&["get", "services"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains(&scenario.lab.pin_path().display().to_string()), "{message}");
}
