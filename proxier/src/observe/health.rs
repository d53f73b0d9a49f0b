//! Whether the agent is alive (its loops turn) and ready (this node has what it should have). A state machine that reads
//! the clock and does no I/O; `http` serves it.
//!
//! **Alive** says nothing of the world: an API server that is away, a full table, an uplink that went are not mended by
//! killing the agent, and its last state is worth keeping. **Ready** is about the first time: once a state is in force, a
//! later one that cannot be applied makes no node unready, for everything else is in force still.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The loop waits for something that may never come.
const RESTS: u64 = u64::MAX;
/// The loop has ended.
const ENDED: u64 = u64::MAX - 1;

/// What is known of the agent's health. Clones share it.
#[derive(Clone, Debug)]
pub struct Health(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// What times of loops count from.
    epoch: Instant,
    loops: Mutex<Vec<Arc<Turning>>>,
    progress: Mutex<Progress>,
}

/// A loop of the agent.
#[derive(Debug)]
struct Turning {
    name: &'static str,
    limit: Duration,
    /// When it last turned, in milliseconds since the epoch; or [`RESTS`], [`ENDED`].
    turned: AtomicU64,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    synced: bool,
    applied: bool,
    /// Whether a part of it was.
    in_part: bool,
    /// Whether all was applied that the kernel has room for.
    full: bool,
    /// Since when, and how often in a row, the state could not be applied.
    failing: Option<(Instant, u64)>,
    /// None where no kernel is programmed.
    kernel: Option<Kernel>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Kernel {
    uplinks: usize,
    pins_lost: bool,
}

/// By which a loop says that it turns. A loop that ends, in whatever way, lets go of it: the agent is not alive then.
#[derive(Debug)]
pub struct Beat {
    turning: Arc<Turning>,
    epoch: Instant,
}

impl Beat {
    /// The loop is at work: it will come by again within its limit.
    pub fn turn(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(ENDED - 1);
        self.turning.turned.store(now, Ordering::Relaxed);
    }

    /// The loop waits for something that may never come, such as a change of a Service: until its next [`Beat::turn`] it is
    /// not expected to come by.
    pub fn rest(&self) {
        self.turning.turned.store(RESTS, Ordering::Relaxed);
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.turning.turned.store(ENDED, Ordering::Relaxed);
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub name: String,
    /// Why it fails; none if it does not.
    pub failure: Option<String>,
    /// What is worth saying all the same.
    pub remark: Option<String>,
}

impl Check {
    fn new(name: impl Into<String>, failure: Option<String>) -> Self {
        Self { name: name.into(), failure, remark: None }
    }
}

/// All that was looked at to answer one question. Displayed as the API server does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The question: `livez` or `readyz`.
    pub question: &'static str,
    /// In order.
    pub checks: Vec<Check>,
}

impl Verdict {
    /// Whether the answer is yes.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.failure.is_none())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { name, failure, remark } in &self.checks {
            match (failure, remark) {
                (Some(failure), _) => writeln!(f, "[-]{name} failed: {failure}")?,
                (None, Some(remark)) => writeln!(f, "[+]{name} ok: {remark}")?,
                (None, None) => writeln!(f, "[+]{name} ok")?,
            }
        }
        writeln!(f, "{} check {}", self.question, if self.passed() { "passed" } else { "failed" })
    }
}

impl Health {
    /// Of an agent that has just been started. `programs_kernel`: whether uplinks and pinned maps belong to being ready.
    #[must_use]
    pub fn new(programs_kernel: bool) -> Self {
        let progress = Progress { kernel: programs_kernel.then(Kernel::default), ..Progress::default() };
        Self(Arc::new(Inner {
            epoch: Instant::now(),
            loops: Mutex::default(),
            progress: Mutex::new(progress),
        }))
    }

    /// Expects the loop `name` to turn at least every `limit` from now on.
    #[must_use]
    pub fn beat(&self, name: &'static str, limit: Duration) -> Beat {
        let turning = Arc::new(Turning { name, limit, turned: AtomicU64::new(RESTS) });
        lock(&self.0.loops).push(Arc::clone(&turning));
        let beat = Beat { turning, epoch: self.0.epoch };
        beat.turn();
        beat
    }

    /// The source has delivered its whole first list.
    pub fn synced(&self) {
        lock(&self.0.progress).synced = true;
    }

    /// The state is in force.
    pub fn applied(&self) {
        let mut progress = lock(&self.0.progress);
        progress.applied = true;
        progress.failing = None;
    }

    /// The state is in force but for some of its Services.
    pub fn applied_in_part(&self) {
        lock(&self.0.progress).in_part = true;
    }

    /// The state is in force but for what the kernel has no room for. Starting the agent anew would not make any, and one
    /// Service's greed must not hold up a roll-out.
    pub fn applied_but_for_room(&self) {
        let mut progress = lock(&self.0.progress);
        progress.in_part = true;
        progress.full = true;
    }

    /// The state, or a part of it, could not be applied.
    pub fn apply_failed(&self) {
        let mut progress = lock(&self.0.progress);
        let (since, times) = progress.failing.unwrap_or((Instant::now(), 0));
        progress.failing = Some((since, times + 1));
    }

    /// So many uplinks carry the programs now.
    pub fn uplinks(&self, attached: usize) {
        lock(&self.0.progress).kernel.get_or_insert_default().uplinks = attached;
    }

    /// Whether the pinned maps are this agent's.
    pub fn pins(&self, present: bool) {
        lock(&self.0.progress).kernel.get_or_insert_default().pins_lost = !present;
    }

    /// Whether the loops turn.
    #[must_use]
    pub fn live(&self) -> Verdict {
        let now = u64::try_from(self.0.epoch.elapsed().as_millis()).unwrap_or(ENDED - 1);
        let checks = lock(&self.0.loops).iter().map(|turning| turning.check(now)).collect();
        Verdict { question: "livez", checks }
    }

    /// Whether this node has what it should have.
    #[must_use]
    pub fn ready(&self) -> Verdict {
        let progress = lock(&self.0.progress).clone();
        Verdict { question: "readyz", checks: progress.checks(Instant::now()) }
    }

    /// Whether load balancers may send this node what is for Services that have pods here.
    ///
    /// A state that was applied but for a part counts: one Service that does not fit must not take every other one off the
    /// load balancers when the agent is started anew. One of which nothing could be applied does not.
    #[must_use]
    pub fn serves(&self) -> bool {
        let progress = lock(&self.0.progress).clone();
        let in_force = progress.synced && (progress.applied || progress.in_part);
        let in_place = progress.kernel.is_none_or(|kernel| kernel.uplinks > 0 && !kernel.pins_lost);
        in_force && in_place && self.live().passed()
    }
}

impl Turning {
    fn check(&self, now: u64) -> Check {
        let failure = match self.turned.load(Ordering::Relaxed) {
            RESTS => None,
            ENDED => Some("it has ended; see the log, then start the agent again".to_owned()),
            turned => {
                let since = Duration::from_millis(now.saturating_sub(turned));
                (since > self.limit).then(|| {
                    format!(
                        "it has not turned for {} seconds, and should every {}: the agent hangs, start it again",
                        since.as_secs(),
                        self.limit.as_secs()
                    )
                })
            }
        };
        Check::new(format!("loop-{}", self.name), failure)
    }
}

impl Progress {
    /// What is wrong is told without names of objects: these ports may be open to anybody.
    fn checks(&self, now: Instant) -> Vec<Check> {
        let mut checks = vec![Check::new(
            "source-synced",
            (!self.synced).then(|| {
                "the source has not delivered its whole first list; nothing is changed before, see `proxier status` for its \
                 last error"
                    .to_owned()
            }),
        )];

        let failing = self.failing.map(|(since, times)| {
            format!(
                "failed attempts: {times}, in {} seconds; see `proxier status` for why",
                now.saturating_duration_since(since).as_secs()
            )
        });
        let mut state = Check::new("state-applied", None);
        if self.applied || self.full {
            state.remark = failing.map(|failing| format!("but not all of it, {failing}"));
        } else {
            state.failure = Some(failing.unwrap_or_else(|| "not yet".to_owned()));
        }
        checks.push(state);

        if let Some(Kernel { uplinks, pins_lost }) = self.kernel {
            checks.push(Check::new(
                "uplink-attached",
                (uplinks == 0).then(|| {
                    "no interface towards clients carries the programs: the node needs a default route, or --uplink the name \
                     of an interface that is there"
                        .to_owned()
                }),
            ));
            checks.push(Check::new(
                "maps-pinned",
                pins_lost.then(|| {
                    "somebody has removed or replaced the pinned maps: start the agent again".to_owned()
                }),
            ));
        }
        checks
    }
}

/// What a panic leaves behind is whole: every lock is held for a few assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn failing(verdict: &Verdict) -> Vec<&str> {
        verdict.checks.iter().filter(|check| check.failure.is_some()).map(|check| &*check.name).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_turns_is_alive_and_one_that_hangs_is_named_with_how_long() {
        let health = Health::new(true);
        let (agent, source) = (health.beat("agent", LIMIT), health.beat("source", LIMIT));
        for _ in 0..100 {
            advance(LIMIT).await;
            assert!(health.live().passed());
            agent.turn();
            source.turn();
        }
        advance(LIMIT / 2).await;
        agent.turn();
        advance(LIMIT / 2 + Duration::from_secs(1)).await;
        assert_eq!(failing(&health.live()), ["loop-source"]);
        assert_eq!(
            health.live().to_string(),
            "[+]loop-agent ok\n[-]loop-source failed: it has not turned for 61 seconds, and should every 60: the agent \
             hangs, start it again\nlivez check failed\n"
        );
        source.turn();
        assert!(health.live().passed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_waits_for_others_is_alive_for_ever() {
        let health = Health::new(true);
        let source = health.beat("source", LIMIT);
        source.rest();
        advance(Duration::from_secs(30 * 86_400)).await;
        assert!(health.live().passed());
        source.turn();
        advance(LIMIT + Duration::from_secs(1)).await;
        assert!(!health.live().passed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_ended_is_not_alive_even_if_it_was_waiting() {
        let health = Health::new(true);
        let (agent, source) = (health.beat("agent", LIMIT), health.beat("source", LIMIT));
        source.rest();
        drop(source);
        agent.turn();
        assert_eq!(failing(&health.live()), ["loop-source"]);
        assert!(health.live().to_string().contains("it has ended"));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_but_loops_makes_the_agent_dead() {
        let health = Health::new(true);
        let beat = health.beat("agent", LIMIT);
        health.apply_failed();
        health.uplinks(0);
        health.pins(false);
        advance(LIMIT).await;
        beat.turn();
        assert!(health.live().passed());
        assert!(!health.ready().passed());
    }

    #[tokio::test(start_paused = true)]
    async fn ready_is_who_has_listed_applied_attached_and_pinned() {
        let health = Health::new(true);
        assert_eq!(failing(&health.ready()), ["source-synced", "state-applied", "uplink-attached"]);
        health.synced();
        assert_eq!(failing(&health.ready()), ["state-applied", "uplink-attached"]);
        health.applied();
        assert_eq!(failing(&health.ready()), ["uplink-attached"]);
        health.uplinks(2);
        assert_eq!(
            health.ready().to_string(),
            "[+]source-synced ok\n[+]state-applied ok\n[+]uplink-attached ok\n[+]maps-pinned ok\nreadyz check passed\n"
        );
        health.pins(false);
        assert_eq!(failing(&health.ready()), ["maps-pinned"]);
        health.pins(true);
        health.uplinks(0);
        assert_eq!(failing(&health.ready()), ["uplink-attached"]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_kernel_to_program_neither_uplinks_nor_pins_are_asked_for() {
        let health = Health::new(false);
        health.synced();
        health.applied();
        assert!(health.ready().passed() && health.serves());
        assert_eq!(health.ready().checks.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_state_that_cannot_be_applied_is_told_with_how_long() {
        let health = Health::new(false);
        health.synced();
        health.apply_failed();
        advance(Duration::from_secs(34)).await;
        health.apply_failed();
        let text = health.ready().to_string();
        assert!(text.contains("[-]state-applied failed: failed attempts: 2, in 34 seconds;"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_change_that_cannot_be_applied_is_told_and_leaves_the_node_ready() {
        let health = Health::new(false);
        health.synced();
        health.applied();
        health.apply_failed();
        advance(Duration::from_secs(5)).await;
        let ready = health.ready();
        assert!(ready.passed());
        let text = "[+]state-applied ok: but not all of it, failed attempts: 1, in 5 seconds";
        assert!(ready.to_string().contains(text), "{ready}");
        health.applied();
        assert!(!health.ready().to_string().contains("but"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_kernel_has_no_room_for_does_not_keep_a_started_agent_from_being_ready() {
        let health = Health::new(false);
        health.synced();
        health.apply_failed();
        assert!(!health.ready().passed());
        health.applied_but_for_room();
        assert!(health.ready().passed());
        assert!(health.ready().to_string().contains("[+]state-applied ok: but not all of it"));
    }

    #[tokio::test(start_paused = true)]
    async fn load_balancers_are_kept_from_a_node_that_hangs_or_has_nothing_in_force_and_from_no_other() {
        let health = Health::new(true);
        let beat = health.beat("agent", LIMIT);
        health.uplinks(1);
        assert!(!health.serves());
        health.synced();
        assert!(!health.serves());
        // Nothing is in force: packets would go to the node itself.
        health.apply_failed();
        assert!(!health.serves());
        // All but one Service is.
        health.applied_in_part();
        assert!(health.serves() && !health.ready().passed());
        // A later attempt takes nothing away.
        health.apply_failed();
        assert!(health.serves());
        health.uplinks(0);
        assert!(!health.serves());
        health.uplinks(1);
        advance(LIMIT * 2).await;
        assert!(!health.serves());
        beat.turn();
        assert!(health.serves());
    }
}
