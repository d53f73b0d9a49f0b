//! Removes the conversations of what went, in a thread of its own: a pass over full tables takes a third of a second, and
//! changes must not wait for it.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::anyhow;

use super::tables::{TableError, Tables};
use crate::delta::Departed;

/// At most one sweep at a time.
#[derive(Debug)]
pub(super) struct Sweeper {
    tables: Arc<Mutex<Tables>>,
    running: Option<JoinHandle<Result<(), TableError>>>,
}

impl Sweeper {
    /// A sweeper of the maps pinned below `pin_path`. `others` are the same maps, of whoever else removes flows.
    ///
    /// # Errors
    ///
    /// The maps cannot be opened.
    pub(super) fn open(pin_path: &Path, others: &Tables) -> Result<Self, TableError> {
        let mut tables = Tables::open(pin_path)?;
        tables.flows.removed = Arc::clone(&others.flows.removed);
        Ok(Self { tables: Arc::new(Mutex::new(tables)), running: None })
    }

    /// Whether the last sweep has yet to be asked after.
    pub(super) const fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Begins to sweep. To be called when it is not busy.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub(super) fn start(&mut self, departed: Departed) -> anyhow::Result<()> {
        debug_assert!(!self.is_busy(), "a sweep is under way");
        let tables = Arc::clone(&self.tables);
        let thread = thread::Builder::new().name("sweeper".to_owned()).spawn(move || {
            // They are handles of maps, as good after a panic as before.
            let mut tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
            tables.sweep(|pod, external| departed.concerns(pod, external))
        });
        self.running = Some(thread.map_err(|error| anyhow!("no thread can be had for it: {error}"))?);
        Ok(())
    }

    /// How the last sweep went, if it is over.
    pub(super) fn ended(&mut self) -> Option<anyhow::Result<()>> {
        self.running.as_ref().is_some_and(JoinHandle::is_finished).then(|| self.wait()).flatten()
    }

    /// Waits for the sweep under way, if there is one, and tells how it went.
    pub(super) fn wait(&mut self) -> Option<anyhow::Result<()>> {
        Some(match self.running.take()?.join() {
            Ok(result) => result.map_err(anyhow::Error::from),
            Err(_) => Err(anyhow!("the thread that swept has panicked: see the log above")),
        })
    }
}
