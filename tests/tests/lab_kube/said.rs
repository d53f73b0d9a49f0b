//! Events: what `kubectl describe service` shows of what became of a Service, and how little of it.

use std::net::IpAddr;

use proxier_tests::{
    apiserver::{ApiServer, Resource},
    exchange::PATIENCE,
    kube_scenario::{
        Metrics, apply, apply_pods, apply_service, changes_told, lines, start, wait_for_watches,
    },
    manifests,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME},
    wait,
};
use serde_json::{Value, json};

use crate::another_external;

/// Of a Service of the lab's namespace: each Event's reason and note, in the order in which they were written. Without those of a
/// moment: Services and slices come by watches of their own, so that a new Service may be seen to have no pod yet.
fn events(server: &ApiServer, service: &str) -> Vec<(String, String)> {
    let mut events = server.events();
    events.retain(|event| event["regarding"]["name"] == service && event["reason"] != "NoEndpoints");
    events.sort_by_key(|event| event["eventTime"].as_str().unwrap().to_owned());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    events.iter().map(|event| (text(&event["reason"]), text(&event["note"]))).collect()
}

/// Waits until a Service has had Events of these reasons, and no others.
fn wait_for_events(server: &ApiServer, service: &str, reasons: &[&str]) {
    let are_there = || events(server, service).iter().map(|(reason, _)| reason).eq(reasons);
    let arrived = wait::until(PATIENCE, || are_there().then_some(()));
    assert!(arrived.is_some(), "{service}: {reasons:?}, not {:?}", events(server, service));
}

/// A Service with one address, created at that second.
fn created_at(name: &str, external: IpAddr, second: u8) -> String {
    let creation = format!("metadata:\n  creationTimestamp: \"2026-01-01T00:00:{second:02}Z\"\n");
    manifests::service(name, &[external]).replacen("metadata:\n", &creation, 1)
}

/// Has everything told once more, as new nodes and expired histories do.
fn relist(server: &ApiServer, scenario: &Scenario) {
    let lists = |metrics: &Metrics| {
        let series = |resource| format!("proxier_source_relists_total{{resource=\"{resource}\"}}");
        ["services", "endpointslices"].map(|resource| metrics.get(&series(resource)).unwrap_or_default())
    };
    let before = lists(&Metrics::of(scenario));
    server.compact();
    // What is not told by the watches: without it their resourceVersion would not be too old.
    server.skip_to(server.resource_version() + 1).unwrap();
    server.compact();
    server.cut_watches();
    let listed = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        lists(&Metrics::of(scenario)).iter().zip(before).all(|(now, before)| *now > before).then_some(())
    });
    assert!(listed.is_some(), "{:?}", server.requests().iter().rev().take(20).collect::<Vec<_>>());
    wait_for_watches(scenario, None);
}

/// Lets a Service have one pod, of IPv4, on that node. Slices of one family are one change, and so are Events.
fn place(server: &ApiServer, scenario: &Scenario, service: &str, node: &str) {
    let pod = scenario.pod("alpine-1").into_iter().filter(IpAddr::is_ipv4).collect::<Vec<_>>();
    apply(server, &manifests::slices(service, node, &pod));
}

#[test]
fn what_becomes_of_a_service_is_an_event_once() {
    skip_unless_root!();
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    // Both families of it are one.
    wait_for_events(&server, SERVICE, &["Programmed"]);
    let (_, note) = &events(&server, SERVICE)[0];
    let expected = "10.0.0.55, 1000::55: all ports and protocols lead to the pods 11.0.2.2, 11.0.2.3, 1100::202, 1100::203 on node \
                    node1";
    assert_eq!(note, expected);

    let [moves, wanted_by_two] = [1, 2].map(another_external);
    place(&server, &scenario, "moves", NODE_NAME);
    apply_service(&server, "moves", &[moves]);
    wait_for_events(&server, "moves", &["Programmed"]);
    place(&server, &scenario, "moves", "node2");
    wait_for_events(&server, "moves", &["Programmed", "NoLocalEndpoint"]);
    for service in ["elder", "younger", "greedy"] {
        place(&server, &scenario, service, NODE_NAME);
    }
    apply(&server, &created_at("elder", wanted_by_two, 1));
    wait_for_events(&server, "elder", &["Programmed"]);
    apply(&server, &created_at("younger", wanted_by_two, 2));
    wait_for_events(&server, "younger", &["AddressConflict"]);
    apply_service(&server, "greedy", &["127.0.0.1".parse().unwrap()]);
    wait_for_events(&server, "greedy", &["AddressRejected"]);

    let services = [SERVICE, "moves", "elder", "younger", "greedy"];
    let told = || services.map(|service| events(&server, service));
    let before = told();
    relist(&server, &scenario);
    // What comes after it has been seen.
    place(&server, &scenario, "mark", NODE_NAME);
    apply_service(&server, "mark", &[another_external(3)]);
    wait_for_events(&server, "mark", &["Programmed"]);
    assert_eq!(told(), before);

    scenario.stop_agent();
    scenario.start_agent();
    place(&server, &scenario, "mark-2", NODE_NAME);
    apply_service(&server, "mark-2", &[another_external(4)]);
    wait_for_events(&server, "mark-2", &["Programmed"]);
    for service in [SERVICE, "elder", "mark"] {
        wait_for_events(&server, service, &["Programmed"]);
    }
    wait_for_events(&server, "moves", &["Programmed", "NoLocalEndpoint"]);
}

#[test]
fn a_service_that_flaps_is_told_of_a_few_times() {
    skip_unless_root!();
    const FLAPS: usize = 20;
    // The budget of a Service: so many at once, and then one a minute.
    const AT_MOST: usize = 7;
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    place(&server, &scenario, "flaps", NODE_NAME);
    apply_service(&server, "flaps", &[another_external(1)]);
    wait_for_events(&server, "flaps", &["Programmed"]);
    let dropped = "proxier_events_dropped_total{why=\"rate-limited\"}";
    for node in ["node2", NODE_NAME].repeat(FLAPS) {
        let told = changes_told(&mut scenario);
        place(&server, &scenario, "flaps", node);
        let seen = wait::until(PATIENCE, || (changes_told(&mut scenario) > told).then_some(()));
        assert!(seen.is_some(), "{}", scenario.agent().log());
    }
    // All others were dropped.
    let told = wait::until(PATIENCE, || {
        let dropped = Metrics::of(&scenario).get(dropped).unwrap_or_default();
        (events(&server, "flaps").len() as f64 + dropped >= (1 + 2 * FLAPS) as f64).then_some(())
    });
    let of_service = events(&server, "flaps");
    assert!(told.is_some(), "{of_service:?}");
    assert!((2..=AT_MOST).contains(&of_service.len()), "{of_service:?}");
    // Others are told of all the same.
    place(&server, &scenario, "quiet", NODE_NAME);
    apply_service(&server, "quiet", &[another_external(2)]);
    wait_for_events(&server, "quiet", &["Programmed"]);
}

#[test]
fn a_service_that_has_no_room_in_the_kernel_is_told_once() {
    skip_unless_root!();
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "large", "namespace": "lab",
            "labels": {"service.kubernetes.io/service-proxy-name": "proxier"},
        },
        "spec": {
            "clusterIP": "None",
            "externalIPs": [another_external(1)],
            "ports": [{"port": 6000}],
            // Some more than `sources` has room for.
            "loadBalancerSourceRanges":
                (0..70_000_u32).map(|n| format!("10.{}.{}.{}/31", n >> 15, n >> 7 & 0xff, n << 1 & 0xff)).collect::<Vec<_>>(),
        },
    });
    apply_pods(&server, "large", &scenario.pod("alpine-1"));
    server.apply(service).unwrap();
    let full = |server: &ApiServer| {
        let events = events(server, "large");
        events
            .into_iter()
            .filter(|(reason, _)| reason == "TableFull")
            .map(|(_, note)| note)
            .collect::<Vec<_>>()
    };
    let told = wait::until(EDIT_TAKES_EFFECT_WITHIN, || (!full(&server).is_empty()).then_some(()));
    assert!(told.is_some(), "{:?}\n{}", events(&server, "large"), scenario.agent().log());
    assert!(full(&server)[0].contains("70000 source ranges do not fit"), "{:?}", full(&server));
    // It is tried again after a second, and after two.
    let tried = scenario.agent().wait_for_log(PATIENCE, |log| lines(log, "cannot apply the state") >= 3);
    tried.unwrap();
    assert_eq!(full(&server).len(), 1);
    for external in externals() {
        scenario.wait_for_any_pod(external);
    }
    assert!(server.watchers(Resource::Services) > 0);
}
