//! Where the desired state goes: the kernel (`bpf`), or a line of JSON (`json`).

pub mod bpf;
pub mod json;

use crate::{
    catalog::Catalog,
    desired::{Desired, Scope},
};

/// What a sink is given at every change: always the whole state, and where in it to look.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// Every Service and endpoint known.
    pub catalog: &'a Catalog,
    /// What this node should have.
    pub desired: &'a Desired,
    /// What of it may differ from the snapshot before. [`Scope::All`] in the first one, and after a failure.
    pub scope: &'a Scope,
}

/// Brings the outside world in line with a [`Snapshot`].
pub trait Sink {
    /// Applies `snapshot`. Called once after all sources have delivered their first whole list, then at every change;
    /// called again with the same state some time after it failed.
    ///
    /// # Errors
    ///
    /// What could not be applied; the rest has been.
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()>;

    /// What the sink has in force already, before the first [`Sink::apply`]: what a former agent left. Empty if it cannot
    /// tell, or if nothing outlives an agent.
    fn in_force(&self) -> Desired {
        Desired::default()
    }

    /// Called about once a second while nothing changes, for housekeeping.
    ///
    /// # Errors
    ///
    /// What could not be done; it is tried again.
    fn tick(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
