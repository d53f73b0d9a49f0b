//! How a source stands with its server: for whoever asks, and as lines in the log, few of them. Four watches that lose the same
//! server are one outage, and a watch that is back at the next attempt was none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::Onlooker;

/// Different things that are said of one outage: a server's own words may have numbers in them that change every time.
const MOST_SAID: usize = 8;

/// Told of every success and failure of every watch.
#[derive(Clone)]
pub(super) struct Reporter {
    onlooker: Arc<dyn Onlooker>,
    outage: Arc<Mutex<Outage>>,
    server: Arc<str>,
}

/// So many failures in a row are worth a line even if no two in a row are of one kind.
const MOST_KINDS: u32 = 3;
/// How long all watches must have gone well before it is said that they do: one that is accepted may break at once.
const STEADY: Duration = Duration::from_secs(3);
/// How long a watch must have gone well for what is said of its next failure to be news.
const FORGOTTEN: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Outage {
    began: Instant,
    watches: BTreeMap<&'static str, Watch>,
    /// What has been said of this outage.
    told: BTreeSet<String>,
    /// Whether it has been said that it is over.
    told_over: bool,
    /// Whether the server has ever accepted all watches.
    connected_before: bool,
}

#[derive(Clone, Copy, Debug)]
struct Watch {
    /// Since when it goes well.
    accepted: Option<Instant>,
    /// How it failed last.
    kind: &'static str,
    /// How often it has failed like that since it went well for long.
    failures: u32,
    /// The same, whatever the kind.
    all_failures: u32,
}

impl Watch {
    const NEW: Self = Self { accepted: None, kind: "", failures: 0, all_failures: 0 };
}

impl Outage {
    /// Since when all watches go well.
    fn over_since(&self) -> Option<Instant> {
        self.watches
            .values()
            .map(|watch| watch.accepted)
            .try_fold(self.began, |since, accepted| Some(since.max(accepted?)))
    }

    /// A watch has failed. Returns whether that is worth a line.
    fn failed(&mut self, resource: &'static str, kind: &'static str, reason: &str, now: Instant) -> bool {
        if let Some(since) = self.over_since() {
            self.began = now;
            if now.duration_since(since) > FORGOTTEN {
                self.told.clear();
            }
        }
        let watch = self.watches.entry(resource).or_insert(Watch::NEW);
        if watch.accepted.is_some_and(|accepted| now.duration_since(accepted) > FORGOTTEN) {
            *watch = Watch::NEW;
        }
        watch.accepted = None;
        watch.failures = if watch.kind == kind { watch.failures + 1 } else { 1 };
        watch.kind = kind;
        watch.all_failures += 1;
        // Whoever starts the agent is waiting. Later, once is no trouble: a server that starts again refuses everybody for a
        // second, and one that is back after long has forgotten what we know.
        let is_trouble = !self.connected_before
            || watch.failures > 1
            || (self.told.is_empty() && watch.all_failures > MOST_KINDS);
        let is_news = is_trouble && self.told.len() < MOST_SAID && self.told.insert(reason.to_owned());
        self.told_over &= !is_news;
        is_news
    }

    /// The server has accepted a watch. Returns whether it has accepted all of them for the first time.
    fn accepted(&mut self, resource: &'static str, now: Instant) -> bool {
        let watch = self.watches.entry(resource).or_insert(Watch::NEW);
        watch.accepted = Some(now);
        if self.over_since().is_none() || self.connected_before {
            return false;
        }
        self.connected_before = true;
        self.told_over = true;
        true
    }

    /// Returns how long it took, if it is over and that has not been said.
    fn ended(&mut self, now: Instant) -> Option<Duration> {
        let since = self.over_since()?;
        if self.told_over || now.duration_since(since) < STEADY {
            return None;
        }
        self.told_over = true;
        Some(since.duration_since(self.began))
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Reporter {
    /// Of watches of these `resources`, none of which has been accepted. `server` says what sort of server it is and where, as a
    /// sentence would (`the API server https://192.0.2.1`).
    pub(super) fn new(server: String, resources: &[&'static str], onlooker: Arc<dyn Onlooker>) -> Self {
        let outage = Outage {
            began: Instant::now(),
            watches: resources.iter().map(|resource| (*resource, Watch::NEW)).collect(),
            told: BTreeSet::new(),
            told_over: true,
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

    /// A watch of `resource` has failed. `kind` is what it is in a word, `reason` the reason and the next step; it continues a
    /// sentence that began with the server's name.
    pub(super) fn failed(&self, resource: &'static str, kind: &'static str, reason: &str) {
        self.onlooker.failed(resource, kind, reason);
        let (is_news, connected_before) = {
            let mut outage = self.outage();
            (outage.failed(resource, kind, reason, Instant::now()), outage.connected_before)
        };
        let server = &*self.server;
        if is_news {
            let meanwhile = if connected_before {
                "meanwhile everything stays as it is"
            } else {
                "before that is mended nothing is changed"
            };
            tracing::warn!(resource, "{server} {reason}; {meanwhile}");
        } else {
            tracing::debug!(resource, "{server} {reason}");
        }
    }

    /// The server has accepted a watch of `resource`.
    pub(super) fn accepted(&self, resource: &'static str) {
        self.onlooker.connected(resource);
        if self.outage().accepted(resource, Instant::now()) {
            tracing::info!("connected to {}", self.server);
        }
    }

    /// To be called every few seconds.
    pub(super) fn turned(&self) {
        self.onlooker.turned();
        if let Some(away) = self.outage().ended(Instant::now()) {
            tracing::info!(away_seconds = away.as_secs(), "{} answers again", self.server);
        }
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

    fn reporter(onlooker: &Arc<Remembering>) -> Reporter {
        Reporter::new("the API server https://192.0.2.1".to_owned(), &["services", "nodes"], onlooker.clone())
    }

    #[test]
    fn who_looks_on_is_told_of_every_failure_and_success() {
        let onlooker = Arc::new(Remembering::default());
        let reporter = reporter(&onlooker);
        reporter.failed("services", "connection", "is asleep");
        assert_eq!(onlooker.0.lock().unwrap()["services"], "is asleep");
        reporter.accepted("services");
        assert!(onlooker.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_first_failure_of_an_agent_is_said_and_once_for_all_watches() {
        let reporter = reporter(&Arc::default());
        let (mut outage, now) = (reporter.outage(), Instant::now());
        assert!(outage.failed("services", "connection", "is asleep", now));
        assert!(!outage.failed("services", "connection", "is asleep", now));
        assert!(!outage.failed("nodes", "connection", "is asleep", now));
        assert!(outage.failed("nodes", "connection", "is ill", now));
        assert!(!outage.accepted("nodes", now));
        assert!(outage.accepted("services", now), "now all are");
        assert!(!outage.accepted("services", now), "that is no news");
        assert_eq!(outage.ended(now + STEADY), None, "connected is as much as well again");
    }

    /// Whose watches have been accepted.
    fn connected() -> Reporter {
        let reporter = reporter(&Arc::default());
        for resource in ["services", "nodes"] {
            reporter.outage().accepted(resource, Instant::now());
        }
        reporter
    }

    fn at(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn an_outage_lasts_from_the_first_failure_until_every_watch_has_gone_well_for_a_while() {
        let reporter = connected();
        let mut outage = reporter.outage();
        // One attempt is not worth a line; the next is.
        assert!(!outage.failed("services", "connection", "is asleep", at(100)));
        assert!(outage.failed("services", "connection", "is asleep", at(101)));
        assert!(!outage.accepted("services", at(110)));
        assert_eq!(outage.ended(at(111)), None);
        assert_eq!(outage.ended(at(114)).map(|away| away.as_secs()), Some(10));
        assert_eq!(outage.ended(at(120)), None, "said already");
    }

    #[test]
    fn a_watch_that_breaks_whenever_it_is_accepted_is_said_once_and_not_said_to_be_well() {
        let reporter = connected();
        let mut outage = reporter.outage();
        let mut lines = 0;
        for round in 0..100 {
            outage.accepted("services", at(round * 30));
            lines += u32::from(outage.failed("services", "connection", "talks nonsense", at(round * 30 + 1)));
            assert_eq!(outage.ended(at(round * 30 + 5)), None);
        }
        assert_eq!(lines, 1);
        outage.accepted("services", at(3000));
        assert!(outage.ended(at(3005)).is_some());
        // After a time of peace the same is news again.
        assert!(!outage.failed("services", "connection", "talks nonsense", at(4000)));
        assert!(outage.failed("services", "connection", "talks nonsense", at(4001)));
    }

    #[test]
    fn what_comes_once_in_a_return_is_no_trouble_of_its_own() {
        let reporter = connected();
        let mut outage = reporter.outage();
        outage.failed("services", "connection", "is asleep", at(0));
        assert!(outage.failed("services", "connection", "is asleep", at(1)));
        assert!(!outage.failed("services", "forbidden", "does not know us", at(2)));
        assert!(!outage.failed("services", "gone", "too old: 1", at(3)));
        assert!(outage.failed("services", "gone", "too old: 2", at(4)), "lists do not help");
    }

    #[test]
    fn a_server_that_fails_in_another_way_each_time_is_said_as_well() {
        let reporter = connected();
        let kinds = ["connection", "server-error"].into_iter().cycle().take(10);
        let lines = kinds.filter(|kind| reporter.outage().failed("services", kind, "is ill", Instant::now()));
        assert_eq!(lines.count(), 1);
    }

    #[test]
    fn a_server_whose_words_change_every_time_does_not_fill_the_log() {
        let reporter = reporter(&Arc::default());
        let lines = (0..1000).filter(|n| {
            reporter.outage().failed("services", "connection", &format!("request {n} failed"), Instant::now())
        });
        assert_eq!(lines.count(), MOST_SAID);
    }
}
