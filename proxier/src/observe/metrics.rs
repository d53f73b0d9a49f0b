//! What Prometheus scrapes. Where kube-proxy has a metric of the same meaning, the name is kube-proxy's with `proxier_` in
//! place of `kubeproxy_`: rules and boards are moved over by that. `docs/OBSERVING.md` lists all of them; a test holds the
//! list against this module.
//!
//! No label has the name of a Service, a pod or a client: the number of series depends on nothing that users make.

use std::{
    fmt,
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets, linear_buckets},
        info::Info,
    },
    registry::Registry,
};

use super::{counts::Counts, health::Health};
use crate::model::{ObjectId, Problem, Severity, Subject};

pub mod kernel;
mod process;

/// What [`Metrics::encode`] writes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = [(&'static str, &'static str); N];
type Seconds = Gauge<f64, AtomicU64>;

/// What a client of the API is told of a value: that it is there, or has gone.
const API_STEPS: [&str; 2] = ["set", "delete"];

/// Everything that is counted. Methods may be called from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sync_duration: Histogram,
    network_programming: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    sync_failures: Counter,
    sync_retries: Counter,
    services: Gauge,
    services_without_endpoints: Gauge,
    external_addresses: Family<Labels<1>, Gauge>,
    endpoints: Family<Labels<1>, Gauge>,
    problems: Family<Labels<2>, Gauge>,
    source_connected: Family<Labels<1>, Gauge>,
    source_last_event: Family<Labels<1>, Seconds>,
    source_errors: Family<Labels<2>, Counter>,
    source_relists: Family<Labels<1>, Counter>,
    events_published: Family<Labels<1>, Counter>,
    events_dropped: Family<Labels<1>, Counter>,
    interfaces: Family<Labels<1>, Gauge>,
    xdp_uplinks: Family<Labels<1>, Gauge>,
    direct_addresses: Family<Labels<1>, Gauge>,
    api_clients: Gauge,
    api_batches: Counter,
    api_steps: Family<Labels<1>, Counter>,
    exec_runs: Family<Labels<1>, Counter>,
    exec_duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

impl Metrics {
    /// All at zero. `kernel` tells the kernel's figures, where there is a kernel.
    #[must_use]
    pub fn new(health: Health, kernel: Option<Box<dyn kernel::Kernel>>) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            // From a millisecond to 16 seconds, as kube-proxy.
            sync_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            network_programming: Histogram::new(network_programming_buckets()),
            last_sync: Seconds::default(),
            last_queued: Seconds::default(),
            sync_failures: Counter::default(),
            sync_retries: Counter::default(),
            services: Gauge::default(),
            services_without_endpoints: Gauge::default(),
            external_addresses: Family::default(),
            endpoints: Family::default(),
            problems: Family::default(),
            source_connected: Family::default(),
            source_last_event: Family::default(),
            source_errors: Family::default(),
            source_relists: Family::default(),
            events_published: Family::default(),
            events_dropped: Family::default(),
            interfaces: Family::default(),
            xdp_uplinks: Family::default(),
            direct_addresses: Family::default(),
            api_clients: Gauge::default(),
            api_batches: Counter::default(),
            api_steps: Family::default(),
            exec_runs: Family::default(),
            // To beyond a minute: the longest is the user's to say.
            exec_duration: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.004, 2.0, 15))
            }),
        };
        metrics.counts(&Counts::default());
        metrics.problems(&[]);
        for op in API_STEPS {
            drop(metrics.api_steps.get_or_create(&[("op", op)]));
        }
        let mut registry = Registry::default();
        metrics.register(registry.sub_registry_with_prefix("proxier"));
        registry.sub_registry_with_prefix("proxier").register_collector(Box::new(HealthCollector(health)));
        if let Some(kernel) = kernel {
            let collector = Box::new(kernel::KernelCollector::new(kernel));
            registry.sub_registry_with_prefix("proxier").register_collector(collector);
        }
        registry.register_collector(Box::new(process::Process));
        metrics.registry = registry;
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "build",
            "Which proxier this is",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register(
            "sync_proxy_rules_duration_seconds",
            "How long it took to apply the state, whether that worked or not",
            self.sync_duration.clone(),
        );
        registry.register(
            "network_programming_duration_seconds",
            "From a change of a Service's pods, by the control plane's clock, until it was in force on this node",
            self.network_programming.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When the whole state was last in force, since 1970",
            self.last_sync.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When there was last something to apply, since 1970; much later than the last sync, and something hangs or fails",
            self.last_queued.clone(),
        );
        registry.register(
            "sync_proxy_rules_failures",
            "Attempts to apply the state of which a part, or all, could not be applied",
            self.sync_failures.clone(),
        );
        registry.register(
            "sync_proxy_rules_retries",
            "Attempts to apply the same state again after a failure",
            self.sync_retries.clone(),
        );
        registry.register("services", "Services that are delivered by proxier", self.services.clone());
        registry.register(
            "services_without_local_endpoints",
            "Services with an external address and no pod on this node that takes new conversations",
            self.services_without_endpoints.clone(),
        );
        registry.register(
            "external_addresses",
            "External addresses that this node delivers",
            self.external_addresses.clone(),
        );
        registry.register(
            "endpoints",
            "Addresses of Services' pods: those here that take new conversations (local), those here that keep the ones they \
             have (draining), and all of the cluster (total)",
            self.endpoints.clone(),
        );
        registry.register(
            "problems",
            "What is wrong with objects or files, as the log tells it",
            self.problems.clone(),
        );
        registry.register(
            "source_connected",
            "Whether a source follows what it reads; without, the last known state stays in force",
            self.source_connected.clone(),
        );
        registry.register(
            "source_last_event_timestamp_seconds",
            "When a source last heard anything, since 1970",
            self.source_last_event.clone(),
        );
        registry.register("source_errors", "Errors of a source, by kind", self.source_errors.clone());
        registry.register(
            "source_relists",
            "How often a source has read all objects again",
            self.source_relists.clone(),
        );
        registry.register(
            "events_published",
            "Events written for users to see",
            self.events_published.clone(),
        );
        registry.register(
            "events_dropped",
            "Events that were not written, by why",
            self.events_dropped.clone(),
        );
        registry.register(
            "attached_interfaces",
            "Interfaces that carry the programs, by what they lead to",
            self.interfaces.clone(),
        );
        registry.register(
            "xdp_uplinks",
            "Uplinks where XDP was asked for, by what became of it: in the driver (native), in the stack (generic), or left to tc \
             (refused)",
            self.xdp_uplinks.clone(),
        );
        registry.register(
            "direct_delivery_addresses",
            "Addresses of pods here whose Services ask for direct delivery: those that are reached so (direct), and those left to \
             the node's stack (stack)",
            self.direct_addresses.clone(),
        );
        registry.register("api_clients", "Clients that follow the API", self.api_clients.clone());
        registry.register(
            "api_batches",
            "Batches of changes that clients of the API were given",
            self.api_batches.clone(),
        );
        registry.register(
            "api_steps",
            "Values that clients of the API were told of, by whether they are there or have gone",
            self.api_steps.clone(),
        );
        registry.register("exec_runs", "Runs of the command, by what came of them", self.exec_runs.clone());
        registry.register(
            "exec_run_duration_seconds",
            "How long a run of the command took, by what came of it",
            self.exec_duration.clone(),
        );
    }

    /// All of it, in the format of [`CONTENT_TYPE`]. Reads maps and files: to be called where that may take its time.
    ///
    /// # Errors
    ///
    /// None that is known of.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// There is something to apply.
    pub fn queued(&self, now: SystemTime) {
        self.last_queued.set(since_epoch(now));
    }

    /// The state is in force; that took so long.
    pub fn applied(&self, took: Duration, now: SystemTime) {
        self.sync_duration.observe(took.as_secs_f64());
        self.last_sync.set(since_epoch(now));
    }

    /// What has changed is in force, beside something that is not; that took so long.
    pub fn applied_beside_failures(&self, took: Duration) {
        self.sync_duration.observe(took.as_secs_f64());
    }

    /// A part of the state, or all of it, could not be applied.
    pub fn apply_failed(&self, took: Duration) {
        self.sync_duration.observe(took.as_secs_f64());
        self.sync_failures.inc();
    }

    /// The same state is applied again.
    pub fn retried(&self) {
        self.sync_retries.inc();
    }

    /// A change is in force that long after it was made.
    pub fn programmed(&self, after: Duration) {
        self.network_programming.observe(after.as_secs_f64());
    }

    /// What there is now.
    pub fn counts(&self, counts: &Counts) {
        let set = |family: &Family<Labels<1>, Gauge>, label, value, count| {
            family.get_or_create(&[(label, value)]).set(gauge(count));
        };
        self.services.set(gauge(counts.services));
        self.services_without_endpoints.set(gauge(counts.services_without_local_endpoints));
        set(&self.external_addresses, "family", "ipv4", counts.external_addresses.ipv4);
        set(&self.external_addresses, "family", "ipv6", counts.external_addresses.ipv6);
        set(&self.endpoints, "scope", "local", counts.endpoints.local);
        set(&self.endpoints, "scope", "draining", counts.endpoints.draining);
        set(&self.endpoints, "scope", "total", counts.endpoints.total);
    }

    /// What is wrong now.
    pub fn problems(&self, problems: &[&Problem]) {
        for severity in [Severity::Error, Severity::Warning, Severity::Info] {
            for kind in KINDS {
                let count = problems
                    .iter()
                    .filter(|problem| problem.severity == severity && kind_of(&problem.subject) == kind)
                    .count();
                let labels = [("severity", severity_name(severity)), ("kind", kind)];
                self.problems.get_or_create(&labels).set(gauge(count));
            }
        }
    }

    /// Whether the source follows `resource` (`services`, `endpointslices`, `nodes`, `files`).
    pub fn source_connected(&self, resource: &'static str, connected: bool) {
        self.source_connected.get_or_create(&[("resource", resource)]).set(connected.into());
    }

    /// The source has heard something of `resource`.
    pub fn source_heard(&self, resource: &'static str, now: SystemTime) {
        self.source_last_event.get_or_create(&[("resource", resource)]).set(since_epoch(now));
    }

    /// The source could not read `resource`. `kind` is a word of a short list.
    pub fn source_failed(&self, resource: &'static str, kind: &'static str) {
        self.source_errors.get_or_create(&[("resource", resource), ("kind", kind)]).inc();
    }

    /// The source reads all of `resource` again.
    pub fn source_relisted(&self, resource: &'static str) {
        self.source_relists.get_or_create(&[("resource", resource)]).inc();
    }

    /// An Event was written.
    pub fn event_published(&self, reason: &'static str) {
        self.events_published.get_or_create(&[("reason", reason)]).inc();
    }

    /// An Event was not written. `why` is a word of a short list.
    pub fn event_dropped(&self, why: &'static str) {
        self.events_dropped.get_or_create(&[("why", why)]).inc();
    }

    /// A client follows the API, until what is returned is dropped.
    pub fn api_client(&self) -> ApiClient {
        self.api_clients.inc();
        ApiClient(self.api_clients.clone())
    }

    /// A client of the API was given a batch.
    pub fn api_batch(&self) {
        self.api_batches.inc();
    }

    /// A client of the API is told of a value. `op` is a word of a short list.
    pub fn api_step(&self, op: &'static str) {
        self.api_steps.get_or_create(&[("op", op)]).inc();
    }

    /// A run of the command has ended; that took so long. `result` is a word of a short list.
    pub fn ran(&self, result: &'static str, took: Duration) {
        let labels = [("result", result)];
        self.exec_runs.get_or_create(&labels).inc();
        self.exec_duration.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// So many interfaces carry the programs.
    pub fn attached(&self, uplinks: usize, pod_links: usize) {
        self.interfaces.get_or_create(&[("role", "uplink")]).set(gauge(uplinks));
        self.interfaces.get_or_create(&[("role", "pod-link")]).set(gauge(pod_links));
    }

    /// At so many uplinks XDP was asked for, and this became of it.
    pub fn xdp(&self, native: usize, generic: usize, refused: usize) {
        for (mode, uplinks) in [("native", native), ("generic", generic), ("refused", refused)] {
            self.xdp_uplinks.get_or_create(&[("mode", mode)]).set(gauge(uplinks));
        }
    }

    /// So many pods are reached past the node's stack, and so many are not, though they are to be.
    pub fn direct_addresses(&self, reached: usize, by_stack: usize) {
        self.direct_addresses.get_or_create(&[("by", "direct")]).set(gauge(reached));
        self.direct_addresses.get_or_create(&[("by", "stack")]).set(gauge(by_stack));
    }
}

/// A client of the API, counted while it is one.
#[derive(Debug)]
pub struct ApiClient(Gauge);

impl Drop for ApiClient {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Whether the agent is alive and ready, for alerts: a probe that fails is seen by kubelet alone.
#[derive(Debug)]
struct HealthCollector(Health);

impl Collector for HealthCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, verdict) in [
            ("live", "Whether every loop of the agent turns, as /livez says", self.0.live()),
            ("ready", "Whether this node has what it should have, as /readyz says", self.0.ready()),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(u32::from(verdict.passed())).encode(metric)?;
        }
        Ok(())
    }
}

/// A quarter and half a second, every second of the first minute, then ever more coarsely to five minutes: kube-proxy's.
fn network_programming_buckets() -> impl Iterator<Item = f64> {
    linear_buckets(0.25, 0.25, 2)
        .chain(linear_buckets(1.0, 1.0, 59))
        .chain(linear_buckets(60.0, 5.0, 12))
        .chain(linear_buckets(120.0, 30.0, 7))
}

const KINDS: [&str; 4] = ["service", "endpointslice", "node", "file"];

/// What a problem is about, in a word.
const fn kind_of(subject: &Subject) -> &'static str {
    match subject {
        Subject::Object(ObjectId::Service(_)) => KINDS[0],
        Subject::Object(ObjectId::EndpointSlice(_)) => KINDS[1],
        Subject::Object(ObjectId::Node(_)) => KINDS[2],
        Subject::File(_) => KINDS[3],
    }
}

/// As a label, and in reports.
#[must_use]
pub const fn severity_name(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Info => "info",
    }
}

/// A clock that stands before 1970 is as good as none.
fn since_epoch(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        observe::counts::{Endpoints, Families},
        sink::bpf::inspect::{DropRow, FillRow, StatisticRow},
    };

    #[derive(Debug)]
    struct OneOfEach;

    impl kernel::Kernel for OneOfEach {
        fn drops(&self) -> anyhow::Result<Vec<DropRow>> {
            Ok(vec![DropRow { reason: "no-backend", hook: "uplink-ingress", packets: 1 }])
        }

        fn statistics(&self) -> anyhow::Result<Vec<StatisticRow>> {
            Ok(vec![StatisticRow { statistic: "flow-inserted", count: 1 }])
        }

        fn fill(&self) -> anyhow::Result<Vec<FillRow>> {
            Ok(vec![FillRow { map: "flows", entries: 1, max_entries: 2 }])
        }
    }

    /// Metrics with which everything has happened.
    fn busy() -> Metrics {
        let metrics = Metrics::new(Health::new(true), Some(Box::new(OneOfEach)));
        let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
        metrics.queued(now);
        metrics.applied(Duration::from_millis(3), now);
        metrics.apply_failed(Duration::from_secs(100));
        metrics.retried();
        metrics.programmed(Duration::from_millis(700));
        metrics.counts(&Counts {
            services: 5,
            services_without_local_endpoints: 2,
            external_addresses: Families { ipv4: 6, ipv6: 3 },
            endpoints: Endpoints { local: 4, draining: 1, total: 9 },
        });
        metrics.source_connected("services", true);
        metrics.source_connected("nodes", false);
        metrics.source_heard("services", now);
        metrics.source_failed("nodes", "forbidden");
        metrics.source_relisted("services");
        metrics.event_published("Programmed");
        metrics.event_dropped("rate-limited");
        metrics.attached(2, 7);
        metrics.xdp(1, 0, 1);
        metrics.direct_addresses(3, 1);
        metrics.ran("ok", Duration::from_millis(5));
        metrics.ran("timeout", Duration::from_secs(10));
        metrics
    }

    fn assert_has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn everything_that_happened_is_in_a_scrape() {
        let text = busy().encode().unwrap();
        assert_has(
            &text,
            &[
                concat!("proxier_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
                "proxier_sync_proxy_rules_last_timestamp_seconds 1700000000.5",
                "proxier_sync_proxy_rules_last_queued_timestamp_seconds 1700000000.5",
                "proxier_sync_proxy_rules_failures_total 1",
                "proxier_sync_proxy_rules_retries_total 1",
                "proxier_services 5",
                "proxier_services_without_local_endpoints 2",
                "proxier_external_addresses{family=\"ipv4\"} 6",
                "proxier_external_addresses{family=\"ipv6\"} 3",
                "proxier_endpoints{scope=\"local\"} 4",
                "proxier_endpoints{scope=\"draining\"} 1",
                "proxier_endpoints{scope=\"total\"} 9",
                "proxier_source_connected{resource=\"services\"} 1",
                "proxier_source_connected{resource=\"nodes\"} 0",
                "proxier_source_errors_total{resource=\"nodes\",kind=\"forbidden\"} 1",
                "proxier_source_relists_total{resource=\"services\"} 1",
                "proxier_events_published_total{reason=\"Programmed\"} 1",
                "proxier_events_dropped_total{why=\"rate-limited\"} 1",
                "proxier_attached_interfaces{role=\"uplink\"} 2",
                "proxier_attached_interfaces{role=\"pod-link\"} 7",
                "proxier_xdp_uplinks{mode=\"native\"} 1",
                "proxier_xdp_uplinks{mode=\"generic\"} 0",
                "proxier_xdp_uplinks{mode=\"refused\"} 1",
                "proxier_direct_delivery_addresses{by=\"direct\"} 3",
                "proxier_direct_delivery_addresses{by=\"stack\"} 1",
                "proxier_exec_runs_total{result=\"ok\"} 1",
                "proxier_exec_run_duration_seconds_bucket{le=\"0.004\",result=\"ok\"} 0",
                "proxier_exec_run_duration_seconds_bucket{le=\"0.008\",result=\"ok\"} 1",
                "proxier_exec_run_duration_seconds_count{result=\"timeout\"} 1",
                "proxier_live 1",
                "proxier_ready 0",
            ],
        );
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn histograms_have_the_buckets_of_kube_proxy() {
        let text = busy().encode().unwrap();
        assert_has(
            &text,
            &[
                "proxier_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
                "proxier_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
                "proxier_sync_proxy_rules_duration_seconds_bucket{le=\"16.384\"} 1",
                "proxier_sync_proxy_rules_duration_seconds_bucket{le=\"+Inf\"} 2",
                "proxier_network_programming_duration_seconds_bucket{le=\"0.5\"} 0",
                "proxier_network_programming_duration_seconds_bucket{le=\"1.0\"} 1",
                "proxier_network_programming_duration_seconds_count 1",
            ],
        );
        let buckets: Vec<f64> = network_programming_buckets().collect();
        assert_eq!(buckets.len(), 2 + 59 + 12 + 7);
        assert!(buckets.windows(2).all(|pair| pair[0] < pair[1]), "{buckets:?}");
        assert_eq!((buckets[60], buckets[61], buckets[72], buckets[79]), (59.0, 60.0, 115.0, 300.0));
    }

    #[test]
    fn problems_that_are_solved_go_back_to_zero() {
        let metrics = Metrics::new(Health::new(false), None);
        let problem =
            |severity| Problem::new(severity, Subject::File("a.yaml".into()), "is broken", "mend it");
        metrics.problems(&[
            &problem(Severity::Error),
            &problem(Severity::Error),
            &problem(Severity::Warning),
        ]);
        let line =
            |severity, count| format!("proxier_problems{{severity=\"{severity}\",kind=\"file\"}} {count}");
        let text = metrics.encode().unwrap();
        assert_has(&text, &[&line("error", 2), &line("warning", 1), &line("info", 0)]);
        metrics.problems(&[]);
        assert_has(&metrics.encode().unwrap(), &[&line("error", 0), &line("warning", 0)]);
    }

    #[test]
    fn the_document_lists_every_metric_and_no_other() {
        let text = busy().encode().unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let exported: BTreeSet<String> = types
            .map(|line| match line.split_once(' ').unwrap() {
                (name, "counter") => format!("{name}_total"),
                (name, "info") => format!("{name}_info"),
                (name, _) => name.to_owned(),
            })
            .collect();
        let document =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OBSERVING.md")).unwrap();
        let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let documented: BTreeSet<String> = rows
            .map(|(name, _)| name.to_owned())
            .filter(|name| name.starts_with("proxier_") || name.starts_with("process_"))
            .collect();
        assert_eq!(exported, documented);
    }
}
