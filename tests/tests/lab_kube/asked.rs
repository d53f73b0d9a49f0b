//! What the agent answers over HTTP on a node with traffic: to Prometheus, to kubelet, to load balancers.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use proxier_tests::{
    apiserver::ApiServer,
    exchange::{Protocol, SILENCE},
    http::{self, Answer},
    kube_scenario::{BACK_WITHIN, HEALTH_PORT, Metrics, apply, apply_service, ask, prepare, start},
    manifests,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME},
    wait,
};
use serde_json::Value;

use crate::{another_external, pod_of};

/// The names that `docs/OBSERVING.md` promises.
fn documented() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OBSERVING.md");
    let text = fs::read_to_string(path).unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    names
        .map(|(name, _)| name.to_owned())
        .filter(|name| name.starts_with("proxier_") || name.starts_with("process_"))
        .collect()
}

/// The Service's slices with the time at which what they tell of happened.
fn slices_since(scenario: &Scenario, pod: &str, happened: SystemTime) -> String {
    let time = Timestamp::try_from(happened).unwrap();
    let annotation = format!(
        "metadata:\n  annotations: {{endpoints.kubernetes.io/last-change-trigger-time: \"{time}\"}}\n"
    );
    manifests::slices(SERVICE, NODE_NAME, &scenario.pod(pod)).replace("metadata:\n", &annotation)
}

#[test]
fn metrics_tell_of_traffic_and_of_changes() {
    skip_unless_root!();
    const METRICS: u16 = 20349;
    const PROGRAMMED: &str = "proxier_network_programming_duration_seconds";
    let arguments = ["--metrics-address", "127.0.0.1:20349", "--health-address", "[::1]:20356"];
    let (server, scenario) = start(&LabSpec::unique(), &arguments);
    let without_pods = another_external(1);
    apply_service(&server, "without-pods", &[without_pods]);
    let node = &scenario.lab.node.namespace;
    let health = http::get(node, "[::1]:20356".parse().unwrap(), "/readyz").unwrap();
    assert_eq!(health.status, 200, "{}", health.body);
    // Counted once a second.
    let known = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        let of_scenario = http::get(node, SocketAddr::from(([127, 0, 0, 1], METRICS)), "/status").unwrap();
        let report: Value = serde_json::from_str(&of_scenario.body).unwrap();
        (report["counts"]["services"] == 2 && report["counts"]["endpoints"]["local"] == 4).then_some(())
    });
    assert!(known.is_some());

    for external in externals() {
        for (from_port, protocol) in [(42000, Protocol::Udp), (42001, Protocol::Tcp)] {
            let _ = scenario.ask(&scenario.question(protocol, from_port, external, 5060));
        }
    }
    for from_port in 43000..43003 {
        let question = scenario.question(Protocol::Udp, from_port, without_pods, 5060);
        question.expecting_silence().ask(&scenario.lab).unwrap().answer.unwrap_err();
    }
    let metrics = Metrics::at(&scenario, METRICS);
    for (series, value) in [
        ("proxier_live", 1.0),
        ("proxier_ready", 1.0),
        ("proxier_kernel_maps_readable", 1.0),
        ("proxier_services", 2.0),
        ("proxier_services_without_local_endpoints", 1.0),
        ("proxier_external_addresses{family=\"ipv4\"}", 2.0),
        ("proxier_external_addresses{family=\"ipv6\"}", 1.0),
        ("proxier_endpoints{scope=\"local\"}", 4.0),
        ("proxier_endpoints{scope=\"draining\"}", 0.0),
        ("proxier_endpoints{scope=\"total\"}", 4.0),
        ("proxier_sync_proxy_rules_failures_total", 0.0),
        ("proxier_source_connected{resource=\"services\"}", 1.0),
        ("proxier_source_connected{resource=\"endpointslices\"}", 1.0),
        ("proxier_source_connected{resource=\"nodes\"}", 1.0),
        ("proxier_attached_interfaces{role=\"uplink\"}", 1.0),
        ("proxier_attached_interfaces{role=\"pod-link\"}", 2.0),
        ("proxier_dropped_packets_total{reason=\"no-backend\",hook=\"uplink-ingress\"}", 3.0),
        ("proxier_dropped_packets_total{reason=\"source-not-allowed\",hook=\"uplink-ingress\"}", 0.0),
        // Two protocols of two families.
        ("proxier_statistics_total{statistic=\"flow-inserted\"}", 4.0),
        ("proxier_map_entries{map=\"flows\"}", 4.0),
        ("proxier_map_max_entries{map=\"flows\"}", 262_144.0),
        // A client of two families.
        ("proxier_map_entries{map=\"sessions\"}", 2.0),
        // What was there before the agent was started may have happened long ago.
        (&format!("{PROGRAMMED}_count"), 0.0),
    ] {
        assert_eq!(metrics.value(series), value, "{series}");
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    for series in [
        "proxier_sync_proxy_rules_last_timestamp_seconds",
        "proxier_sync_proxy_rules_last_queued_timestamp_seconds",
        "proxier_source_last_event_timestamp_seconds{resource=\"services\"}",
        "process_start_time_seconds",
    ] {
        let ago = now - metrics.value(series);
        assert!((0.0..120.0).contains(&ago), "{series}: {ago} seconds ago");
    }
    assert!((1e6..1e9).contains(&metrics.value("process_resident_memory_bytes")));

    let happened = SystemTime::now() - Duration::from_secs(3);
    apply(&server, &slices_since(&scenario, "alpine-2", happened));
    let [v4, _] = externals();
    scenario.wait_for_pod(scenario.lab.client.address(v4), v4, "alpine-2");
    let counted = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        let metrics = Metrics::at(&scenario, METRICS);
        // One a slice.
        (metrics.value(&format!("{PROGRAMMED}_count")) == 2.0).then_some(metrics)
    });
    let metrics = counted.unwrap();
    let took = metrics.value(&format!("{PROGRAMMED}_sum")) / 2.0;
    assert!((3.0..3.0 + EDIT_TAKES_EFFECT_WITHIN.as_secs_f64()).contains(&took), "{took} seconds");
    assert_eq!(metrics.value(&format!("{PROGRAMMED}_bucket{{le=\"2.0\"}}")), 0.0);

    let (names, documented) = (metrics.names(), documented());
    assert_eq!(names.difference(&documented).collect::<Vec<_>>(), Vec::<&String>::new());
    // What has not happened, by kind, has no series.
    let missing: Vec<&str> = documented.difference(&names).map(String::as_str).collect();
    let not_happened = [
        "proxier_events_dropped_total",
        "proxier_exec_run_duration_seconds",
        "proxier_exec_runs_total",
        "proxier_source_errors_total",
        "proxier_source_relists_total",
    ];
    assert_eq!(missing, not_happened);
}

#[test]
fn without_an_uplink_the_agent_is_alive_and_not_ready() {
    skip_unless_root!();
    let (_server, mut scenario) = prepare(&LabSpec::unique(), &[]);
    scenario.spec.uplink = "uplink9".to_owned();
    scenario.start_agent();
    let answer = ask(&scenario, HEALTH_PORT, "/readyz");
    assert_eq!(answer.status, 503, "{}", answer.body);
    for line in ["[+]source-synced ok\n", "[-]uplink-attached failed: no interface towards clients"] {
        assert!(answer.body.contains(line), "{}", answer.body);
    }
    assert_eq!(ask(&scenario, HEALTH_PORT, "/livez").status, 200);
    scenario.lab.node.namespace.ip("link add uplink9 up type veth peer name nowhere9").unwrap();
    let ready = || ask(&scenario, HEALTH_PORT, "/readyz");
    let is_ready = wait::until(BACK_WITHIN, || (ready().status == 200).then_some(()));
    assert!(is_ready.is_some(), "{}", ready().body);
}

/// The Service's node port for health checks.
const CHECKED: u16 = 30123;

/// A load balancer's Service with the lab's external addresses, as its controller has written them.
fn balanced() -> String {
    let [v4, v6] = externals();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {SERVICE}\n  namespace: lab\n  labels:\n    \
         service.kubernetes.io/service-proxy-name: proxier\nspec:\n  type: LoadBalancer\n  externalTrafficPolicy: Local\n  \
         healthCheckNodePort: {CHECKED}\n  ports:\n  - port: 6000\nstatus:\n  loadBalancer:\n    ingress:\n    - ip: \"{v4}\"\n    \
         - ip: \"{v6}\"\n"
    )
}

/// What a load balancer is told: asked as it would, from outside, at the node's address.
fn checked(scenario: &Scenario, node: IpAddr) -> anyhow::Result<Answer> {
    http::get(&scenario.lab.client.namespace, SocketAddr::new(node, CHECKED), "/healthz")
}

/// Waits until load balancers are told that so many pods are here, at each address of the node.
fn wait_for_pods(scenario: &Scenario, pods: usize) {
    for node in &scenario.lab.node.addresses {
        let arrived = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            let answer = checked(scenario, *node).ok()?;
            let said: Value = serde_json::from_str(&answer.body).unwrap();
            (said["localEndpoints"] == pods).then_some((answer, said))
        });
        let (answer, said) = arrived.unwrap_or_else(|| panic!("{node}: {:?}", checked(scenario, *node)));
        assert_eq!(answer.status, if pods > 0 { 200 } else { 503 }, "{answer:?}");
        assert_eq!(answer.header("x-load-balancing-endpoint-weight"), Some(&*pods.to_string()), "{answer:?}");
        assert_eq!((&said["service"]["name"], &said["serviceProxyHealthy"]), (&SERVICE.into(), &true.into()));
    }
}

/// The Service's slices with one pod in this condition.
fn apply_condition(server: &ApiServer, scenario: &Scenario, pod: &str, condition: &str) {
    let slices = manifests::slices(SERVICE, NODE_NAME, &scenario.pod(pod));
    apply(server, &slices.replace("conditions: {ready: true}", &format!("conditions: {{{condition}}}")));
}

#[test]
fn load_balancers_are_told_where_pods_are_and_leave_before_the_last_one_goes() {
    skip_unless_root!();
    let (server, mut scenario) = prepare(&LabSpec::unique(), &[]);
    apply(&server, &balanced());
    scenario.start_agent();
    wait_for_pods(&scenario, 2);
    apply_condition(&server, &scenario, "alpine-1", "ready: true");
    wait_for_pods(&scenario, 1);
    apply_condition(&server, &scenario, "alpine-1", "ready: false, serving: true, terminating: true");
    wait_for_pods(&scenario, 0);
    for external in externals() {
        assert_eq!(pod_of(&scenario, external), "alpine-1", "what comes all the same is delivered");
    }
    apply_condition(&server, &scenario, "alpine-2", "ready: true, serving: true");
    wait_for_pods(&scenario, 1);
    apply_condition(&server, &scenario, "alpine-2", "ready: false, serving: false, terminating: false");
    wait_for_pods(&scenario, 0);
    for external in externals() {
        scenario.wait_for_silence(external);
    }
    apply_condition(&server, &scenario, "alpine-1", "ready: true");
    wait_for_pods(&scenario, 1);

    server.delete("Service", "lab", SERVICE).unwrap();
    let closed = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        scenario.lab.node.addresses.iter().all(|node| checked(&scenario, *node).is_err()).then_some(())
    });
    assert!(closed.is_some(), "somebody listens for a Service that has gone");
    std::thread::sleep(SILENCE);
    assert!(checked(&scenario, scenario.lab.node.addresses[0]).is_err());
}
