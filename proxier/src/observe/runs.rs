//! Lets what becomes of a command's runs be seen: a run that has succeeded has put the state in force, one that has failed has not.

use std::{sync::Arc, time::Duration};

use super::{health::Beat, observed::Observed};
use crate::sink::exec::{Failure, Onlooker};

/// A command that is looked on.
struct Runs {
    observed: Observed,
    beat: Beat,
}

impl Observed {
    /// Who is told what becomes of the runs of a command, none of which takes longer than `longest`. It counts as one of the
    /// agent's loops from now on.
    #[must_use]
    pub fn runs(&self, longest: Duration) -> Arc<dyn Onlooker> {
        let beat = self.beat("command", longest);
        beat.rest();
        Arc::new(Runs { observed: self.clone(), beat })
    }
}

impl Onlooker for Runs {
    fn begins(&self, again: bool) {
        self.beat.turn();
        // Again, for the run before it may have put in force what was no longer the newest.
        self.observed.queued();
        if again {
            self.observed.retried();
        }
    }

    fn succeeded(&self, took: Duration) {
        self.beat.rest();
        self.observed.metrics.ran("ok", took);
        self.observed.applied(took);
    }

    fn failed(&self, took: Duration, failure: &Failure, message: &str) {
        self.beat.rest();
        let result = match failure {
            Failure::Timeout(_) => "timeout",
            Failure::Start(_) | Failure::Watch(_) | Failure::Status(_) | Failure::Stopped => "failed",
        };
        self.observed.metrics.ran(result, took);
        self.observed.apply_failed(took, &anyhow::Error::msg(message.to_owned()));
    }
}
