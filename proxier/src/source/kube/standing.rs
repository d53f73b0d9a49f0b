//! How the source stands with the API server: for whoever asks, and as lines in the log, few of them. Four watches that lose
//! the same server are one outage, and a watch that is back at the next attempt was none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use tokio::sync::watch;

use super::failure::Failure;
use crate::source::{Away, Standing};

/// Told of every success and failure of every watch.
#[derive(Clone, Debug)]
pub(super) struct Reporter {
    standing: watch::Sender<Standing>,
    outage: Arc<Mutex<Outage>>,
    server: Arc<str>,
}

#[derive(Debug)]
struct Outage {
    began: Instant,
    /// Failures of each watch since it was accepted last. A watch that never was has more than one from the start.
    failures: BTreeMap<&'static str, u32>,
    /// What has been said of this outage.
    told: BTreeSet<String>,
    /// Whether the server has ever answered all of them.
    connected_before: bool,
}

impl Reporter {
    /// Of watches of these `resources`, none of which has been accepted.
    pub(super) fn new(server: &str, resources: &[&'static str]) -> (Self, watch::Receiver<Standing>) {
        let away = Away { since: SystemTime::now(), reason: "not reached yet".to_owned() };
        let (standing, receiver) = watch::channel(Standing {
            away: resources.iter().map(|resource| (*resource, away.clone())).collect(),
        });
        let outage = Outage {
            began: Instant::now(),
            failures: resources.iter().map(|resource| (*resource, 1)).collect(),
            told: BTreeSet::new(),
            connected_before: false,
        };
        (Self { standing, outage: Arc::new(Mutex::new(outage)), server: server.into() }, receiver)
    }

    /// A watch of `resource` has failed.
    pub(super) fn failed(&self, resource: &'static str, failure: &Failure) {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        if outage.told.is_empty() && outage.failures.values().all(|count| *count == 0) {
            outage.began = Instant::now();
        }
        let failures = outage.failures.entry(resource).or_default();
        *failures += 1;
        let server = &*self.server;
        if *failures > 1 && outage.told.insert(failure.reason.clone()) {
            let state = if outage.connected_before {
                "; meanwhile everything stays as it is"
            } else {
                "; nothing is changed before it answers"
            };
            tracing::warn!(resource, "the API server {server} {}{state}", failure.reason);
        } else {
            tracing::debug!(resource, "the API server {server} {}", failure.reason);
        }
        self.standing.send_modify(|standing| {
            let away = standing
                .away
                .entry(resource)
                .or_insert_with(|| Away { since: SystemTime::now(), reason: String::new() });
            away.reason.clone_from(&failure.reason);
        });
    }

    /// The server has accepted a watch of `resource`.
    pub(super) fn accepted(&self, resource: &'static str) {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        outage.failures.insert(resource, 0);
        self.standing.send_if_modified(|standing| standing.away.remove(resource).is_some());
        if outage.failures.values().any(|count| *count > 0) {
            return;
        }
        let server = &*self.server;
        if !std::mem::replace(&mut outage.connected_before, true) {
            tracing::info!("connected to the API server {server}");
        } else if !outage.told.is_empty() {
            tracing::info!(
                away_seconds = outage.began.elapsed().as_secs(),
                "the API server {server} answers again"
            );
        }
        outage.told.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(reason: &str) -> Failure {
        Failure { reason: reason.to_owned(), start_over: false, retry_after: None }
    }

    #[test]
    fn the_source_is_away_until_every_watch_is_accepted_and_again_when_one_fails() {
        let (reporter, standing) = Reporter::new("https://192.0.2.1", &["services", "nodes"]);
        let away = || standing.borrow().away.keys().copied().collect::<Vec<_>>();
        assert_eq!(away(), ["nodes", "services"]);
        reporter.accepted("services");
        assert_eq!(away(), ["nodes"]);
        reporter.accepted("nodes");
        assert_eq!(away(), [""; 0]);
        reporter.failed("services", &failure("is tired"));
        assert_eq!(away(), ["services"]);
        let since = standing.borrow().away["services"].since;
        reporter.failed("services", &failure("is asleep"));
        assert_eq!(standing.borrow().away["services"], Away { since, reason: "is asleep".to_owned() });
        reporter.accepted("services");
        assert_eq!(away(), [""; 0]);
    }
}
