//! How the source stands with the API server: for whoever asks, and as lines in the log, few of them. Four watches that lose
//! the same server are one outage, and a watch that is back at the next attempt was none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::failure::Failure;
use crate::source::Onlooker;

/// Told of every success and failure of every watch.
#[derive(Clone)]
pub(super) struct Reporter {
    onlooker: Arc<dyn Onlooker>,
    outage: Arc<Mutex<Outage>>,
    server: Arc<str>,
}

#[derive(Debug)]
struct Outage {
    began: Instant,
    /// Failures of each watch since it was accepted last. A watch that never was has one from the start.
    failures: BTreeMap<&'static str, u32>,
    /// What has been said of this outage.
    told: BTreeSet<String>,
    /// Whether the server has ever accepted all of them.
    connected_before: bool,
}

impl Outage {
    fn is_over(&self) -> bool {
        self.failures.values().all(|count| *count == 0)
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Reporter {
    /// Of watches of these `resources`, none of which has been accepted.
    pub(super) fn new(server: &str, resources: &[&'static str], onlooker: Arc<dyn Onlooker>) -> Self {
        let outage = Outage {
            began: Instant::now(),
            failures: resources.iter().map(|resource| (*resource, 1)).collect(),
            told: BTreeSet::new(),
            connected_before: false,
        };
        Self { onlooker, outage: Arc::new(Mutex::new(outage)), server: server.into() }
    }

    /// Who is told of everything.
    pub(super) fn onlooker(&self) -> &dyn Onlooker {
        &*self.onlooker
    }

    /// Every assignment leaves it whole.
    fn outage(&self) -> MutexGuard<'_, Outage> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A watch of `resource` has failed.
    pub(super) fn failed(&self, resource: &'static str, failure: &Failure) {
        let Failure { kind, reason, .. } = failure;
        self.onlooker.failed(resource, kind, reason);
        let mut outage = self.outage();
        if outage.is_over() {
            outage.began = Instant::now();
        }
        let failures = outage.failures.entry(resource).or_default();
        *failures += 1;
        let server = &*self.server;
        if *failures > 1 && outage.told.insert(reason.clone()) {
            let meanwhile = if outage.connected_before {
                "meanwhile everything stays as it is"
            } else {
                "nothing is changed before it answers"
            };
            tracing::warn!(resource, "the API server {server} {reason}; {meanwhile}");
        } else {
            tracing::debug!(resource, "the API server {server} {reason}");
        }
    }

    /// The server has accepted a watch of `resource`.
    pub(super) fn accepted(&self, resource: &'static str) {
        self.onlooker.connected(resource);
        let mut outage = self.outage();
        outage.failures.insert(resource, 0);
        if !outage.is_over() {
            return;
        }
        let server = &*self.server;
        if !std::mem::replace(&mut outage.connected_before, true) {
            tracing::info!("connected to the API server {server}");
        } else if !outage.told.is_empty() {
            let away_seconds = outage.began.elapsed().as_secs();
            tracing::info!(away_seconds, "the API server {server} answers again");
        }
        outage.told.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers who is away.
    #[derive(Default)]
    struct Remembering(Mutex<BTreeMap<&'static str, String>>);

    impl Onlooker for Remembering {
        fn connected(&self, resource: &'static str) {
            self.0.lock().unwrap().remove(resource);
        }

        fn failed(&self, resource: &'static str, _: &'static str, reason: &str) {
            self.0.lock().unwrap().insert(resource, reason.to_owned());
        }

        fn heard(&self, _: &'static str) {}

        fn relisted(&self, _: &'static str) {}

        fn turned(&self) {}
    }

    #[test]
    fn an_outage_lasts_from_the_first_failure_until_every_watch_is_accepted() {
        let onlooker = Arc::new(Remembering::default());
        let reporter = Reporter::new("https://192.0.2.1", &["services", "nodes"], onlooker.clone());
        let failure = Failure {
            kind: "connection",
            reason: "is asleep".to_owned(),
            start_over: false,
            retry_after: None,
        };
        assert!(!reporter.outage().is_over());
        reporter.accepted("services");
        assert!(!reporter.outage().is_over() && !reporter.outage().connected_before);
        reporter.accepted("nodes");
        assert!(reporter.outage().is_over() && reporter.outage().connected_before);
        // One attempt is not worth a line; the next is.
        reporter.failed("services", &failure);
        assert!(reporter.outage().told.is_empty());
        reporter.failed("services", &failure);
        reporter.failed("nodes", &failure);
        reporter.failed("nodes", &failure);
        assert_eq!(reporter.outage().told.len(), 1);
        assert_eq!(onlooker.0.lock().unwrap()["services"], "is asleep");
        reporter.accepted("services");
        assert!(!reporter.outage().is_over());
        reporter.accepted("nodes");
        assert!(reporter.outage().is_over() && reporter.outage().told.is_empty());
        assert!(onlooker.0.lock().unwrap().is_empty());
    }
}
