//! Calls a program at every change, with the lines of `to-json` on its standard input: the way of kpng's kpng-callout, for
//! whoever turns Services into something else than eBPF with a script of their own.
//!
//! [`ExecSink`] renders and hands over, which waits for nobody. A task of its own ([`worker`]) has the newest state, runs the
//! command one run at a time ([`run`]) and tries again what failed. Not for what the lines look like: that is `json`'s.

use std::{
    fmt,
    io::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::bail;
use tokio::{sync::watch, task::JoinHandle};

use self::worker::Worker;
use super::{Sink, Snapshot, export::Carried, json};
use crate::model::NodeName;

pub mod arguments;
mod invocation;
mod output;
mod run;
mod worker;

pub use self::{invocation::Invocation, run::Failure};

/// How long runs may take, and how long to wait after one that failed.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The longest that a run may take; then its process group is ended.
    pub timeout: Duration,
    /// From SIGTERM to SIGKILL; and how long a run may still take when the agent ends.
    pub grace: Duration,
    /// The pause after a first failure, and the least one before a changed state is tried after a failure.
    pub first_retry: Duration,
    /// The longest pause.
    pub last_retry: Duration,
}

impl Timing {
    /// With pauses as those of all that the agent tries again.
    #[must_use]
    pub const fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            // Twice that, when the agent ends, is well below the 15 seconds that the DaemonSet gives it.
            grace: Duration::from_secs(3),
            first_retry: Duration::from_secs(1),
            last_retry: Duration::from_secs(60),
        }
    }

    /// Longer than any run takes, from its start to its last word.
    #[must_use]
    pub fn longest_run(&self) -> Duration {
        self.timeout + 2 * self.grace + Duration::from_secs(10)
    }
}

/// Told what becomes of runs. No call may wait for anything.
pub trait Onlooker: Send + Sync {
    /// A run begins; `again` with the same state as the one before, which failed.
    fn begins(&self, again: bool);
    /// It has done what it should, and took that long.
    fn succeeded(&self, took: Duration);
    /// It has not; `message` says all about it.
    fn failed(&self, took: Duration, failure: &Failure, message: &str);
}

/// What is called `Text` here: all lines of a state. Shared, as it may be megabytes.
type Text = Arc<str>;

/// The state that the last run has set up, if it succeeded; none while one is at work.
#[derive(Clone, Debug, Default)]
struct InForce(Arc<Mutex<Option<Text>>>);

impl InForce {
    /// Every assignment leaves it whole.
    fn lock(&self) -> MutexGuard<'_, Option<Text>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sink.
pub struct ExecSink {
    node: NodeName,
    carried: Carried,
    newest: watch::Sender<Option<Text>>,
    in_force: InForce,
    /// Dropped when the agent ends.
    going_on: watch::Sender<()>,
    worker: JoinHandle<()>,
}

impl fmt::Debug for ExecSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecSink").field("node", &self.node).finish_non_exhaustive()
    }
}

impl ExecSink {
    /// Will run `invocation` at every change of what `node` should do, and pass on to `out` what it prints. To be called within
    /// a runtime.
    #[must_use]
    pub fn start(
        invocation: Invocation,
        timing: Timing,
        node: NodeName,
        carried: Carried,
        out: Box<dyn Write + Send>,
        onlooker: Arc<dyn Onlooker>,
    ) -> Self {
        let (newest, states) = watch::channel(None);
        let (going_on, until) = watch::channel(());
        let in_force = InForce::default();
        let worker = Worker::new(invocation, timing, states, until, in_force.clone(), out, onlooker);
        Self { node, carried, newest, in_force, going_on, worker: tokio::spawn(worker.work()) }
    }

    /// Ends the worker. A run that goes on has the grace period to end by itself, and is ended then; what it has set up stays.
    pub async fn stop(self) {
        drop(self.going_on);
        drop(self.newest);
        // It panics by a defect only, which has been told then.
        let _ = self.worker.await;
    }
}

impl Sink for ExecSink {
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        let text: Text = json::render(snapshot, &self.node, &self.carried, false)?.into();
        if self.newest.is_closed() {
            bail!("what runs the command has ended: see the log, and start proxier again");
        }
        self.newest.send_if_modified(|newest| {
            let news = newest.as_ref() != Some(&text);
            *newest = Some(text);
            news
        });
        Ok(())
    }

    fn is_underway(&self) -> bool {
        *self.newest.borrow() != *self.in_force.lock()
    }
}

#[cfg(test)]
mod tests;
