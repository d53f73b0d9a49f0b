//! What lab tests of `proxier kube` begin with: a lab whose node has the API server's double on loopback, with the Service and the
//! pods of [`scenario`](crate::scenario) in it; and what such tests ask the agent. Panics where something is not as it should be,
//! as a test does.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use proxier_common::SCHEMA;
use serde_json::Value;

use crate::{
    agent,
    apiserver::ApiServer,
    http::{self, Answer},
    loss::lost_during,
    manifests,
    scenario::{SERVICE, Scenario, externals},
    topology::{LabSpec, NODE_NAME},
    wait,
};

/// Where the agent answers `/livez` and `/readyz`, unless told otherwise.
pub const HEALTH_PORT: u16 = 10356;
/// Where it answers `/metrics` and `/status`.
pub const METRICS_PORT: u16 = 10349;
/// What the agent watches: four times something.
const WATCHES: usize = 4;
/// The longest pause between two attempts of an agent that has met a few failures, and some more: its pauses double.
pub const BACK_WITHIN: Duration = Duration::from_secs(90);

/// A lab, and the API server that its agent is to follow. The agent is not running yet.
///
/// # Panics
///
/// As [`Scenario::prepare`].
#[must_use]
pub fn prepare(lab: &LabSpec, arguments: &[&str]) -> (ApiServer, Scenario) {
    let mut scenario = Scenario::without_objects(lab, arguments);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 6443));
    let server = ApiServer::start_with_tls_in(&scenario.lab.node.namespace, address)
        .unwrap_or_else(|error| panic!("no API server: {error:#}"));
    let kubeconfig = scenario.path("kubeconfig");
    server.write_kubeconfig(&kubeconfig).unwrap_or_else(|error| panic!("{error:#}"));
    scenario.spec.source =
        ["kube", "--service-proxy-name", "proxier", "--kubeconfig"].map(Into::into).to_vec();
    scenario.spec.source.push(kubeconfig.into());
    apply_service(&server, SERVICE, &externals());
    apply_pods(&server, SERVICE, &scenario.all_pods());
    (server, scenario)
}

/// The same with an agent that is ready.
#[must_use]
pub fn start(lab: &LabSpec, arguments: &[&str]) -> (ApiServer, Scenario) {
    let (server, mut scenario) = prepare(lab, arguments);
    scenario.start_agent();
    (server, scenario)
}

/// Lets the API server have objects.
///
/// # Panics
///
/// When they are no objects.
pub fn apply(server: &ApiServer, yaml: &str) {
    server.apply_yaml(yaml).unwrap_or_else(|error| panic!("{error:#}"));
}

/// Lets the API server have a Service with these external addresses.
pub fn apply_service(server: &ApiServer, service: &str, externals: &[IpAddr]) {
    apply(server, &manifests::service(service, externals));
}

/// Lets a Service have these pods.
pub fn apply_pods(server: &ApiServer, service: &str, pods: &[IpAddr]) {
    apply(server, &manifests::slices(service, NODE_NAME, pods));
}

/// Sends numbered datagrams to both of the Service's addresses while `work` goes on: none may be lost.
///
/// # Panics
///
/// When one is, or `work` panics.
pub fn without_loss(scenario: &mut Scenario, work: impl FnOnce(&mut Scenario)) {
    let [v4, v6] = externals();
    let mut of_v6 = (0, BTreeSet::new());
    let of_v4 = lost_during(scenario, v4, |scenario| of_v6 = lost_during(scenario, v6, work));
    for (external, (sent, lost)) in [(v4, of_v4), (v6, of_v6)] {
        assert!(sent > 100, "only {sent} datagrams were sent to {external}");
        assert!(lost.is_empty(), "{} of {sent} datagrams to {external} were lost: {lost:?}", lost.len());
    }
}

/// Asks the agent on the node's loopback.
///
/// # Panics
///
/// When it does not answer.
#[must_use]
pub fn ask(scenario: &Scenario, port: u16, path: &str) -> Answer {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    http::get(&scenario.lab.node.namespace, address, path).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Fails unless the agent says that it is alive and ready.
///
/// # Panics
///
/// As said.
pub fn assert_live_and_ready(scenario: &Scenario) {
    for path in ["/livez", "/readyz", "/healthz"] {
        let answer = ask(scenario, HEALTH_PORT, path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
}

/// What `/metrics` says.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// As they are now.
    #[must_use]
    pub fn of(scenario: &Scenario) -> Self {
        Self::at(scenario, METRICS_PORT)
    }

    /// The same, of an agent that has another `--metrics-address`.
    ///
    /// # Panics
    ///
    /// When there are none.
    #[must_use]
    pub fn at(scenario: &Scenario, port: u16) -> Self {
        let answer = ask(scenario, port, "/metrics");
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
        Self(answer.body)
    }

    /// The value of a series, named with its labels as in the text; none if it is not there.
    #[must_use]
    pub fn get(&self, series: &str) -> Option<f64> {
        self.0.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
    }

    /// The same of one that must be there.
    ///
    /// # Panics
    ///
    /// When it is not.
    #[must_use]
    pub fn value(&self, series: &str) -> f64 {
        self.get(series).unwrap_or_else(|| panic!("no {series} in\n{}", self.0))
    }

    /// Names of all metrics, as `# TYPE` has them, but with `_total` and `_info`.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let types = self.0.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        types
            .map(|(name, kind)| match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            })
            .collect()
    }
}

/// How often the agent has tried to apply a state.
#[must_use]
pub fn attempts(scenario: &Scenario) -> f64 {
    Metrics::of(scenario).value("proxier_sync_proxy_rules_duration_seconds_count")
}

/// The entries of all tables that the agent writes, generations included, as bpftool prints them: the same twice, and nothing has
/// been written anew.
#[must_use]
pub fn tables(scenario: &Scenario) -> Vec<(&'static str, BTreeSet<String>)> {
    let directory = scenario.lab.pin_path().join(format!("v{SCHEMA}"));
    let dump = |map: &'static str| {
        let path = directory.join(map).display().to_string();
        let text = scenario.on_node("bpftool", &["--json", "map", "dump", "pinned", &path]);
        let entries: Vec<Value> =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        (map, entries.iter().map(ToString::to_string).collect())
    };
    ["services", "backends", "members", "pods", "sources", "names"].map(dump).to_vec()
}

/// `proxier status`: the exit code, and what it prints.
///
/// # Panics
///
/// When it cannot be run.
#[must_use]
pub fn status(scenario: &Scenario) -> (Option<i32>, String) {
    let output = agent::run(&scenario.lab, &scenario.spec.binary, &["status"])
        .unwrap_or_else(|error| panic!("{error:#}"));
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until `proxier status` says of every watch that it is followed, or that it is away for a reason with `why` in it.
///
/// # Panics
///
/// When it does not say so in time.
pub fn wait_for_watches(scenario: &Scenario, why: Option<&str>) {
    let arrived = wait::until(BACK_WITHIN, || {
        let answer = ask(scenario, METRICS_PORT, "/status");
        let report: Value =
            serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {}", answer.body));
        let resources = report["source"]["resources"].as_array().cloned().unwrap_or_default();
        let is_so = |resource: &Value| match why {
            None => resource["connected"] == true,
            Some(why) => {
                resource["connected"] == false
                    && resource["lastError"].as_str().is_some_and(|error| error.contains(why))
            }
        };
        (resources.len() == WATCHES && resources.iter().all(is_so)).then_some(())
    });
    assert!(arrived.is_some(), "{}", status(scenario).1);
}

/// How many of the log's lines have `what` in them.
#[must_use]
pub fn lines(log: &str, what: &str) -> usize {
    log.lines().filter(|line| line.contains(what)).count()
}

/// How often the log tells that something changed for a Service.
#[must_use]
pub fn changes_told(scenario: &mut Scenario) -> usize {
    let log = scenario.agent().log();
    ["Service programmed", "Service changed", "Service withdrawn", "Service without local pods"]
        .iter()
        .map(|what| lines(&log, what))
        .sum()
}
