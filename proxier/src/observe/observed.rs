//! One handle for all that is to be seen of a running agent: whoever does something says so here once, and metrics, health
//! and status follow. Nothing here decides anything, and no call waits for anybody.

use std::{
    collections::BTreeMap,
    fmt::Display,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;

use super::{
    counts::Counts,
    health::{Beat, Health, Verdict},
    metrics::{Metrics, kernel::Kernel, severity_name},
    status::{
        DirectReport, Failing, FailureReport, Interface, InterfaceRole, MAX_PROBLEMS, ProblemReport,
        ProblemsReport, ResourceReport, SourceReport, StackReport, StatusReport, SyncReport, XdpReport,
    },
};
use crate::{
    model::{NodeName, Problem, Severity},
    sink::{Attached, ByStack, DirectDelivery, Xdp},
    source::{Onlooker, TURN},
};

/// What is to be seen of the agent. Clones share it; every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct Observed {
    /// What Prometheus scrapes.
    pub metrics: Arc<Metrics>,
    /// Whether the agent is alive and ready.
    pub health: Health,
    status: Arc<Mutex<Status>>,
}

/// What [`StatusReport`] has beside what health knows.
#[derive(Debug)]
struct Status {
    node: String,
    source: &'static str,
    synced: bool,
    started: Timestamp,
    resources: BTreeMap<&'static str, ResourceReport>,
    sync: SyncReport,
    counts: Counts,
    interfaces: Vec<Interface>,
    direct: DirectReport,
    problems: ProblemsReport,
}

impl Observed {
    /// Of an agent that is being started: before its source and sink. `source` is its name on the command line; `kernel`
    /// is there if its sink is the kernel, which being ready then depends on.
    #[must_use]
    pub fn new(node: &NodeName, source: &'static str, kernel: Option<Box<dyn Kernel>>) -> Self {
        let health = Health::new(kernel.is_some());
        let status = Status {
            node: node.to_string(),
            source,
            synced: false,
            started: Timestamp::now(),
            resources: BTreeMap::new(),
            sync: SyncReport::default(),
            counts: Counts::default(),
            interfaces: Vec::new(),
            direct: DirectReport::default(),
            problems: ProblemsReport::default(),
        };
        Self {
            metrics: Arc::new(Metrics::new(health.clone(), kernel)),
            health,
            status: Arc::new(Mutex::new(status)),
        }
    }

    /// Every assignment leaves it whole.
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a loop begins: see [`Health::beat`].
    #[must_use]
    pub fn beat(&self, name: &'static str, limit: Duration) -> Beat {
        self.health.beat(name, limit)
    }

    /// When a batch of the source, or another change, is there to be applied.
    pub fn queued(&self) {
        self.metrics.queued(SystemTime::now());
    }

    /// When the source has delivered its first batch, the whole list; again does no harm.
    pub fn synced(&self) {
        self.health.synced();
        self.status().synced = true;
    }

    /// Before the same state is applied again after a failure.
    pub fn retried(&self) {
        self.metrics.retried();
    }

    /// When the sink has applied the state, which took so long.
    pub fn applied(&self, took: Duration) {
        self.metrics.applied(took, SystemTime::now());
        self.health.applied();
        self.status().sync = SyncReport {
            last_applied: Some(Timestamp::now()),
            last_duration_seconds: Some(took.as_secs_f64()),
            failure: None,
        };
    }

    /// When the sink has applied what has changed, which took so long, while something else has still to be tried again.
    pub fn applied_beside_failures(&self, took: Duration) {
        self.metrics.applied_beside_failures(took);
    }

    /// When the sink could not apply the state, or not all of it.
    pub fn apply_failed(&self, took: Duration, error: &anyhow::Error) {
        self.metrics.apply_failed(took);
        self.health.apply_failed();
        let mut status = self.status();
        let earlier = status.sync.failure.take();
        status.sync.failure = Some(FailureReport {
            since: earlier.as_ref().map_or_else(Timestamp::now, |failure| failure.since),
            attempts: earlier.map_or(0, |failure| failure.attempts) + 1,
            error: format!("{error:#}"),
        });
    }

    /// After [`Observed::applied`] or [`Observed::applied_beside_failures`], for every EndpointSlice that has changed since the last time: `changed` is its annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`. What changed before the agent was started says how long none ran,
    /// and is left out.
    pub fn programmed(&self, changed: SystemTime) {
        if Timestamp::try_from(changed).is_ok_and(|changed| changed < self.status().started) {
            return;
        }
        // A clock of the control plane that is ahead.
        self.metrics.programmed(SystemTime::now().duration_since(changed).unwrap_or_default());
    }

    /// At the tick after a change, with [`Counts::of`]: that looks at every endpoint.
    pub fn counts(&self, counts: Counts) {
        self.metrics.counts(&counts);
        self.status().counts = counts;
    }

    /// Whenever the problems may have changed, with all that there are now.
    pub fn problems(&self, problems: &[&Problem]) {
        self.metrics.problems(problems);
        let mut first = Vec::new();
        for severity in [Severity::Error, Severity::Warning, Severity::Info] {
            let of_this = problems.iter().filter(|problem| problem.severity == severity);
            first.extend(of_this.take(MAX_PROBLEMS - first.len()).map(|problem| ProblemReport {
                severity: severity_name(severity).to_owned(),
                text: problem.to_string(),
            }));
        }
        self.status().problems = ProblemsReport { total: problems.len(), first };
    }

    /// Whenever the sink has attached to, or let go of, an interface, with all that carry the programs now.
    pub fn attached(&self, interfaces: &[Attached]) {
        let at_xdp = |what: fn(&Xdp) -> bool| {
            interfaces.iter().filter(|interface| interface.xdp.as_ref().is_some_and(what)).count()
        };
        self.metrics.xdp(
            at_xdp(|xdp| matches!(xdp, Xdp::Native)),
            at_xdp(|xdp| matches!(xdp, Xdp::Generic)),
            at_xdp(|xdp| matches!(xdp, Xdp::Refused(_))),
        );
        let mut interfaces: Vec<Interface> = interfaces
            .iter()
            .map(|Attached { interface, is_uplink, xdp }| Interface {
                name: interface.clone(),
                role: if *is_uplink { InterfaceRole::Uplink } else { InterfaceRole::PodLink },
                xdp: xdp.as_ref().map(|xdp| match xdp {
                    Xdp::Native => XdpReport::Native,
                    Xdp::Generic => XdpReport::Generic,
                    Xdp::Refused(reason) => XdpReport::Refused(reason.clone()),
                }),
            })
            .collect();
        let uplinks = interfaces.iter().filter(|interface| interface.role == InterfaceRole::Uplink).count();
        self.metrics.attached(uplinks, interfaces.len() - uplinks);
        self.health.uplinks(uplinks);
        interfaces.sort();
        self.status().interfaces = interfaces;
    }

    /// Whenever the sink has looked how the addresses of pods are reached whose Services ask for direct delivery.
    pub fn direct(&self, direct: DirectDelivery) {
        let DirectDelivery { reached, by_stack } = direct;
        self.metrics.direct_addresses(reached, by_stack.len());
        let by_stack = by_stack.into_iter().map(|ByStack { pod, services, reason }| {
            let services = services.iter().map(ToString::to_string).collect();
            StackReport { pod, services, reason }
        });
        self.status().direct = DirectReport { reached, by_stack: by_stack.collect() };
    }

    /// Whenever the sink has looked whether the pinned maps are its own.
    pub fn pins(&self, present: bool) {
        self.health.pins(present);
    }

    /// Who is told how the source stands. Its loop counts as one of the agent's from now on; it may have to wait for the
    /// agent's own, which has [two minutes](crate::app).
    #[must_use]
    pub fn onlooker(&self) -> Arc<dyn Onlooker> {
        Arc::new(SourceObserved { observed: self.clone(), beat: self.beat("source", 36 * TURN) })
    }

    /// When the source follows `resource` (`services`, `endpointslices`, `nodes`, `files`) from now on; while it does, does no
    /// harm.
    pub fn source_connected(&self, resource: &'static str) {
        self.source(resource, true, None);
    }

    /// When the source cannot read `resource`, at every attempt. `kind` is a word of a short list, such as `forbidden`.
    pub fn source_failed(&self, resource: &'static str, kind: &'static str, error: &dyn Display) {
        self.metrics.source_failed(resource, kind);
        self.source(resource, false, Some(error.to_string()));
    }

    /// When something came of `resource`: an object, or that one has gone. Where nothing happens, this is long ago.
    pub fn source_heard(&self, resource: &'static str) {
        self.metrics.source_heard(resource, SystemTime::now());
        if let Some(report) = self.status().resources.get_mut(resource) {
            report.last_event = Some(Timestamp::now());
        }
    }

    /// When the source begins to read all of `resource` again; not for the first time.
    pub fn source_relisted(&self, resource: &'static str) {
        self.metrics.source_relisted(resource);
    }

    fn source(&self, resource: &'static str, connected: bool, error: Option<String>) {
        self.metrics.source_connected(resource, connected);
        let now = Timestamp::now();
        let mut status = self.status();
        let report = status.resources.entry(resource).or_insert_with(|| ResourceReport {
            resource: resource.to_owned(),
            connected,
            since: now,
            last_event: None,
            last_error: None,
        });
        if report.connected != connected {
            report.connected = connected;
            report.since = now;
        }
        if error.is_some() {
            report.last_error = error;
        }
    }

    /// When an Event was written for users to see. `reason` is the Event's.
    pub fn event_published(&self, reason: &'static str) {
        self.metrics.event_published(reason);
    }

    /// When an Event was not written. `why` is a word of a short list, such as `rate-limited`.
    pub fn event_dropped(&self, why: &'static str) {
        self.metrics.event_dropped(why);
    }

    /// The report as of now.
    #[must_use]
    pub fn report(&self) -> StatusReport {
        let (live, ready) = (self.health.live(), self.health.ready());
        let failing = [&live, &ready]
            .into_iter()
            .flat_map(|Verdict { checks, .. }| checks)
            .filter_map(|check| Some(Failing { check: check.name.clone(), reason: check.failure.clone()? }))
            .collect();
        let status = self.status();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: status.node.clone(),
            time: Timestamp::now(),
            started: status.started,
            live: live.passed(),
            ready: ready.passed(),
            failing,
            source: SourceReport {
                kind: status.source.to_owned(),
                synced: status.synced,
                resources: status.resources.values().cloned().collect(),
            },
            sync: status.sync.clone(),
            counts: status.counts,
            interfaces: status.interfaces.clone(),
            direct: status.direct.clone(),
            problems: status.problems.clone(),
        }
    }
}

/// A source that is looked on.
struct SourceObserved {
    observed: Observed,
    beat: Beat,
}

impl Onlooker for SourceObserved {
    fn connected(&self, resource: &'static str) {
        self.observed.source_connected(resource);
    }

    fn failed(&self, resource: &'static str, kind: &'static str, reason: &str) {
        self.observed.source_failed(resource, kind, &reason);
    }

    fn heard(&self, resource: &'static str) {
        self.observed.source_heard(resource);
    }

    fn relisted(&self, resource: &'static str) {
        self.observed.source_relisted(resource);
    }

    fn turned(&self) {
        self.beat.turn();
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use anyhow::anyhow;

    use super::*;
    use crate::model::Subject;

    fn observed() -> Observed {
        Observed::new(&NodeName::new("node1"), "kube", None)
    }

    #[test]
    fn what_fails_is_reported_with_since_when_until_it_is_applied() {
        let observed = observed();
        observed.synced();
        let took = Duration::from_millis(5);
        observed.apply_failed(took, &anyhow!("no room").context("Service default/web"));
        let first = observed.report().sync.failure.unwrap();
        observed.apply_failed(took, &anyhow!("still no room"));
        let second = observed.report().sync.failure.unwrap();
        assert_eq!((first.attempts, first.error.as_str()), (1, "Service default/web: no room"));
        assert_eq!((second.attempts, second.error.as_str()), (2, "still no room"));
        assert_eq!(first.since, second.since);
        assert!(!observed.report().ready);
        observed.applied(took);
        let report = observed.report();
        assert!(report.ready && report.source.synced);
        assert_eq!((report.sync.failure, report.sync.last_duration_seconds), (None, Some(0.005)));
    }

    #[test]
    fn a_failure_keeps_when_the_state_was_last_applied() {
        let observed = observed();
        observed.applied(Duration::ZERO);
        let applied = observed.report().sync.last_applied;
        observed.apply_failed(Duration::ZERO, &anyhow!("no"));
        assert_eq!(observed.report().sync.last_applied, applied);
        assert!(applied.is_some());
    }

    #[test]
    fn a_source_that_comes_and_goes_has_since_when_and_its_last_error() {
        let observed = observed();
        observed.source_failed("services", "forbidden", &"services is forbidden");
        let away = observed.report().source.resources[0].clone();
        assert!(!away.connected && away.last_event.is_none());
        observed.source_failed("services", "timeout", &"no answer");
        let still = observed.report().source.resources[0].clone();
        assert_eq!(still.since, away.since);
        assert_eq!(still.last_error.as_deref(), Some("no answer"));
        observed.source_connected("services");
        observed.source_heard("services");
        let back = observed.report().source.resources[0].clone();
        assert!(back.connected && back.since > away.since && back.last_event.is_some());
        assert_eq!(back.last_error.as_deref(), Some("no answer"));
        observed.source_connected("services");
        assert_eq!(observed.report().source.resources[0].since, back.since);
    }

    #[test]
    fn the_worst_problems_are_told_first_and_all_are_counted() {
        let observed = observed();
        let problem = |severity, name: &str| {
            Problem::new(severity, Subject::File(PathBuf::from(name)), "is broken", "mend it")
        };
        let mut problems: Vec<_> =
            (0..MAX_PROBLEMS).map(|n| problem(Severity::Warning, &n.to_string())).collect();
        problems.push(problem(Severity::Error, "worst"));
        observed.problems(&problems.iter().collect::<Vec<_>>());
        let ProblemsReport { total, first } = observed.report().problems;
        assert_eq!((total, first.len()), (MAX_PROBLEMS + 1, MAX_PROBLEMS));
        assert_eq!(first[0].text, "worst: is broken; mend it");
        assert_eq!(first[0].severity, "error");
        observed.problems(&[]);
        assert_eq!(observed.report().problems, ProblemsReport::default());
    }

    #[test]
    fn a_change_of_before_the_start_or_of_the_future_does_not_spoil_the_latency() {
        let observed = observed();
        observed.programmed(SystemTime::now() - Duration::from_secs(3600));
        let count = |observed: &Observed, count| {
            let line = format!("proxier_network_programming_duration_seconds_count {count}\n");
            assert!(observed.metrics.encode().unwrap().contains(&line), "{line}");
        };
        count(&observed, 0);
        observed.programmed(SystemTime::now() + Duration::from_secs(3600));
        count(&observed, 1);
        let text = observed.metrics.encode().unwrap();
        assert!(text.contains("proxier_network_programming_duration_seconds_sum 0.0\n"), "{text}");
    }

    #[test]
    fn interfaces_make_ready_and_are_listed_uplinks_with_their_names() {
        #[derive(Debug)]
        struct NoMaps;
        impl Kernel for NoMaps {
            fn drops(&self) -> anyhow::Result<Vec<crate::sink::bpf::inspect::DropRow>> {
                anyhow::bail!("none")
            }

            fn statistics(&self) -> anyhow::Result<Vec<crate::sink::bpf::inspect::StatisticRow>> {
                anyhow::bail!("none")
            }

            fn fill(&self) -> anyhow::Result<Vec<crate::sink::bpf::inspect::FillRow>> {
                anyhow::bail!("none")
            }
        }
        let observed = Observed::new(&NodeName::new("node1"), "file", Some(Box::new(NoMaps)));
        observed.synced();
        observed.applied(Duration::ZERO);
        let failing: Vec<_> = observed.report().failing.into_iter().map(|failing| failing.check).collect();
        assert_eq!(failing, ["uplink-attached"]);
        let attached =
            |interface: &str, is_uplink| Attached { interface: interface.to_owned(), is_uplink, xdp: None };
        observed.attached(&[attached("veth1", false), attached("eth0", true)]);
        assert!(observed.report().ready);
        let interface = |name: &str, role| Interface { name: name.to_owned(), role, xdp: None };
        let expected = [interface("eth0", InterfaceRole::Uplink), interface("veth1", InterfaceRole::PodLink)];
        assert_eq!(observed.report().interfaces, expected);
        assert_eq!(observed.report().direct, DirectReport::default());
        let pod = "11.0.2.2".parse().unwrap();
        let reason = "no route leads to it".to_owned();
        let services = vec![crate::model::ObjectName::new("default", "web")];
        let by_stack = vec![ByStack { pod, services, reason: reason.clone() }];
        observed.direct(DirectDelivery { reached: 4, by_stack });
        let by_stack = vec![StackReport { pod, services: vec!["default/web".to_owned()], reason }];
        assert_eq!(observed.report().direct, DirectReport { reached: 4, by_stack });
        let refused = Attached { xdp: Some(Xdp::Refused("no room".to_owned())), ..attached("eth1", true) };
        observed.attached(&[attached("eth0", true), refused]);
        let text = observed.metrics.encode().unwrap();
        for line in
            ["proxier_attached_interfaces{role=\"uplink\"} 2\n", "proxier_xdp_uplinks{mode=\"refused\"} 1\n"]
        {
            assert!(text.contains(line), "{text}");
        }
        observed.pins(false);
        assert!(!observed.report().ready);
    }
}
