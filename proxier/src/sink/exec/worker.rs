//! The task that runs the command: one run at a time, always with the newest state. What changes while one goes on is one change,
//! not many; a state that the last run has set up already is no change.
//!
//! A run that failed is tried again after a pause that doubles from one failure to the next. A change cuts the pause short: whoever
//! has mended an object need not wait. But never below the first pause, so that a broken script costs a start a second
//! however much changes.

use std::{io::Write, sync::Arc, time::Instant as Clock};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    Failure, InForce, Invocation, Onlooker, Text, Timing,
    output::Output,
    run::{self, MAX_STDOUT, Outcome},
};

/// What is known after a failure.
struct Failing {
    pauses: ExponentialBackoff,
    /// The state that it failed with.
    text: Text,
    /// When it is tried again.
    due: Instant,
    /// When a change is tried.
    earliest: Instant,
    /// What was told of it.
    told: String,
}

/// The task.
pub(super) struct Worker {
    invocation: Invocation,
    timing: Timing,
    states: watch::Receiver<Option<Text>>,
    /// Closed when the agent ends.
    going_on: watch::Receiver<()>,
    in_force: InForce,
    output: Output,
    onlooker: Arc<dyn Onlooker>,
    failing: Option<Failing>,
    /// Whether it has been told that more was printed than is passed on.
    cut_told: bool,
}

impl Worker {
    pub(super) fn new(
        invocation: Invocation,
        timing: Timing,
        states: watch::Receiver<Option<Text>>,
        going_on: watch::Receiver<()>,
        in_force: InForce,
        out: Box<dyn Write + Send>,
        onlooker: Arc<dyn Onlooker>,
    ) -> Self {
        let output = Output::new(out);
        Self {
            invocation,
            timing,
            states,
            going_on,
            in_force,
            output,
            onlooker,
            failing: None,
            cut_told: false,
        }
    }

    /// Works until the agent ends.
    pub(super) async fn work(mut self) {
        let mut stopped = self.going_on.clone();
        loop {
            let next = tokio::select! {
                biased;
                _ = stopped.changed() => break,
                next = self.next() => next,
            };
            let Some(text) = next else { break };
            self.run(text).await;
        }
        self.output.close().await;
    }

    /// Waits for a state that is to be set up. None: there will be no more.
    async fn next(&mut self) -> Option<Text> {
        loop {
            match &self.failing {
                None => self.states.changed().await.ok()?,
                Some(Failing { due, earliest, .. }) => tokio::select! {
                    () = sleep_until(*due) => {}
                    changed = self.states.changed() => {
                        changed.ok()?;
                        sleep_until(*earliest).await;
                    }
                },
            }
            let newest = self.states.borrow_and_update().clone();
            if newest.is_some() && newest != *self.in_force.lock() {
                return newest;
            }
        }
    }

    async fn run(&mut self, text: Text) {
        // A run that fails may have done a part.
        *self.in_force.lock() = None;
        let again = self.failing.as_ref().is_some_and(|failing| failing.text == text);
        self.onlooker.begins(again);
        let start = Clock::now();
        let Outcome { result, stdout, stderr } =
            run::run(&self.invocation, &text, &self.timing, self.going_on.clone()).await;
        let took = start.elapsed();
        if stdout.is_cut && !std::mem::replace(&mut self.cut_told, true) {
            tracing::warn!(
                "the command {} has printed more than {} KiB in one run: the rest is not passed on, now and in later runs",
                self.invocation,
                MAX_STDOUT / 1024
            );
        }
        self.output.pass(stdout.bytes);
        let stderr = stderr.last_lines();
        match result {
            Ok(()) => {
                *self.in_force.lock() = Some(text);
                self.onlooker.succeeded(took);
                tracing::debug!(
                    took_seconds = took.as_secs_f64(),
                    stderr,
                    "the command {} has run",
                    self.invocation
                );
                if self.failing.take().is_some() {
                    tracing::info!("the command {} works again", self.invocation);
                }
            }
            Err(failure) => {
                let mut message = format!("the command {} {failure}", self.invocation);
                if !stderr.is_empty() {
                    message += &format!("; its standard error: {stderr}");
                }
                self.onlooker.failed(took, &failure, &message);
                if matches!(failure, Failure::Stopped) {
                    tracing::warn!("{message}; what it has set up stays");
                } else {
                    self.failed(text, message);
                }
            }
        }
    }

    fn failed(&mut self, text: Text, message: String) {
        let now = Instant::now();
        let former = self.failing.take();
        // Whoever changes objects all the time must not fill the log with one broken script.
        let is_told = former.as_ref().is_some_and(|former| former.told == message && former.due > now);
        let mut pauses = former.map_or_else(|| pauses(&self.timing), |former| former.pauses);
        let pause = pauses.next().unwrap_or(self.timing.last_retry);
        if is_told {
            tracing::debug!("{message}");
        } else {
            tracing::error!(
                retry_in_seconds = pause.as_secs_f64(),
                "{message}; mend that, it is run again without a restart, and sooner if something changes"
            );
        }
        self.failing = Some(Failing {
            pauses,
            text,
            due: now + pause,
            earliest: now + self.timing.first_retry,
            told: message,
        });
    }
}

fn pauses(timing: &Timing) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(timing.first_retry)
        .with_max_delay(timing.last_retry)
        .with_factor(2.0)
        .without_max_times()
        .build()
}
