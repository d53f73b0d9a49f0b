//! Services and endpoints change under conversations that go on.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use proxier_tests::{
    connection::Connection,
    manifests,
    scenario::{SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME, UPLINK},
    wait,
};

/// The pods' slices, with those of `unready` not ready.
fn slices(scenario: &Scenario, unready: &[std::net::IpAddr]) -> String {
    let mut text = manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods());
    for address in unready {
        let endpoint = format!("[\"{address}\"]\n  conditions: {{ready: true}}");
        assert!(text.contains(&endpoint), "{text}");
        text = text.replace(&endpoint, &format!("[\"{address}\"]\n  conditions: {{ready: false}}"));
    }
    text
}

#[test]
fn a_pod_that_is_no_longer_ready_keeps_its_connections_and_gets_no_new_ones() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for external in externals() {
        let client = scenario.lab.client.address(external);
        let mut connection = Connection::open(&scenario, external, 42000);
        let pod = connection.pod.clone();
        let other = scenario.lab.pods.iter().find(|other| other.host.name != pod).unwrap().host.name.clone();
        scenario.write("slices.yaml", &slices(&scenario, &scenario.pod(&pod)));
        scenario.wait_for_pod(client, external, &other);
        for _ in 0..3 {
            connection.goes_on("after the pod is not ready any more");
            assert_eq!(scenario.pod_of(client, external).host, other);
        }
        // No pod is ready: nobody is let in, nobody is thrown out.
        scenario.write("slices.yaml", &slices(&scenario, &scenario.all_pods()));
        scenario.wait_for_silence(external);
        connection.goes_on("when no pod is ready");
        scenario.write_pods(&scenario.all_pods());
        scenario.wait_for_any_pod(external);
        connection.goes_on("when all are ready again");
    }
}

#[test]
fn connections_go_on_when_the_service_is_renamed() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let mut connections = externals().map(|external| Connection::open(&scenario, external, 42000));
    let renamed = |text: &str| text.replace(&format!(" {SERVICE}"), " renamed");
    let all = [
        renamed(&manifests::service(SERVICE, &externals())),
        renamed(&manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods())),
    ];
    // In one file, so that there is no moment in which nobody has the address.
    std::fs::remove_file(scenario.path("slices.yaml")).unwrap();
    scenario.write("service.yaml", &all.join("---\n"));
    let served = wait::until(proxier_tests::scenario::EDIT_TAKES_EFFECT_WITHIN, || {
        let rows = scenario.get("services");
        (rows.len() == 2 && rows.iter().all(|row| row["name"] == "renamed" && row["backends"] == 2))
            .then_some(())
    });
    assert!(served.is_some(), "{:?}", scenario.get("services"));
    for connection in &mut connections {
        connection.goes_on("after the Service has another name");
    }
}

#[test]
fn filters_that_somebody_took_off_are_put_back() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &["--attach", "clsact"]);
    let [v4, _] = externals();
    scenario.wait_for_any_pod(v4);
    for arguments in [["qdisc", "del", "dev", UPLINK, "clsact"], ["qdisc", "add", "dev", UPLINK, "clsact"]] {
        let _ = scenario.on_node("tc", &arguments);
    }
    let back = wait::until(std::time::Duration::from_secs(60), || {
        scenario
            .on_node("tc", &["filter", "show", "dev", UPLINK, "ingress"])
            .contains("proxier_request")
            .then_some(())
    });
    assert!(back.is_some(), "the filter never comes back");
    scenario.wait_for_any_pod(v4);
}
