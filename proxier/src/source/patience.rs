//! How long to wait before asking a server again: ever longer while it fails, short again once it has answered for a
//! while. Without this, a server that ends every watch at once would be asked as fast as the network allows.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;

/// A server that asks to be left alone for longer is asked again all the same.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How often a server is asked, and how long it may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// The first pause after a failure, and the least time between two.
    pub first_retry: Duration,
    /// The longest pause.
    pub last_retry: Duration,
    /// How long all must have gone well for a failure to count as the first one.
    pub calm: Duration,
    /// How long a connection may be silent while an answer or an event is expected, before it counts as dead.
    pub silence: Duration,
}

impl Default for Timing {
    /// The pauses of client-go's reflector (0.8 s doubling up to 30 s). An API server sends a bookmark every minute to those
    /// who want them, so a watch that has been silent for longer than that leads nowhere.
    fn default() -> Self {
        Self {
            first_retry: Duration::from_millis(800),
            last_retry: Duration::from_secs(30),
            calm: Duration::from_secs(120),
            silence: Duration::from_secs(90),
        }
    }
}

/// The pauses of one thing that is tried again and again.
#[derive(Debug)]
pub(super) struct Patience {
    timing: Timing,
    pauses: ExponentialBackoff,
    last: Option<Instant>,
}

impl Patience {
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, pauses: pauses(timing), last: None }
    }

    /// How long to wait now.
    pub(super) fn next(&mut self) -> Duration {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) > self.timing.calm) {
            self.pauses = pauses(self.timing);
        }
        let pause = self.pauses.next().unwrap_or(self.timing.last_retry);
        self.last = Some(now + pause);
        pause
    }
}

fn pauses(timing: Timing) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(timing.first_retry)
        .with_max_delay(timing.last_retry)
        .with_factor(2.0)
        .without_max_times()
        // A thousand nodes that have lost the same server must not come back in step.
        .with_jitter()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_a_limit_and_are_short_again_after_a_calm() {
        let timing = Timing::default();
        let mut patience = Patience::new(timing);
        for n in 0..40 {
            let pause = patience.next();
            let least = timing.first_retry.saturating_mul(2_u32.pow(n.min(20))).min(timing.last_retry);
            assert!(pause >= least && pause <= timing.last_retry * 2, "pause {n} is {pause:?}");
            tokio::time::sleep(pause).await;
        }
        tokio::time::sleep(timing.calm * 2).await;
        assert!(patience.next() < timing.first_retry * 3);
    }
}
