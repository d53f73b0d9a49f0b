//! What the test's thread and the server's share: objects, faults, and what was asked.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    fault::{Faults, Verb},
    resource::Resource,
    store::Store,
};

/// A request, as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// When.
    pub at: Instant,
    /// `GET`, `POST`.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// The query's parameters, decoded.
    pub query: Vec<(String, String)>,
    /// None: the path names none that the double serves.
    pub resource: Option<Resource>,
    /// What it does with the resource.
    pub verb: Verb,
    /// None: not answered, at least not yet.
    pub status: Option<u16>,
}

impl Request {
    /// A parameter of the query.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find_map(|(parameter, value)| (parameter == name).then_some(value.as_str()))
    }
}

/// What a server says to a watch from a resourceVersion that has not been yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FutureWatch {
    /// Nothing until that resourceVersion is reached: the real server's watch cache, whose clients miss everything
    /// after a restored backup of etcd (kubernetes/kubernetes#107457).
    #[default]
    Silent,
    /// An ERROR of 504 in the stream, `Too large resource version`.
    Refused,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) store: Store,
    pub(super) faults: Faults,
    pub(super) requests: Vec<Request>,
    pub(super) open: BTreeMap<Resource, usize>,
    pub(super) token: String,
    pub(super) bookmark_interval: Duration,
    pub(super) future_watch: FutureWatch,
    /// Watches of an epoch that is over are cut.
    pub(super) epoch: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

impl Shared {
    pub(super) fn new(token: &str) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                store: Store::default(),
                faults: Faults::default(),
                requests: Vec::new(),
                open: BTreeMap::new(),
                token: token.to_owned(),
                // As often as the real server.
                bookmark_interval: Duration::from_secs(60),
                future_watch: FutureWatch::default(),
                epoch: 0,
            }),
            changed: watch::Sender::new(()),
        })
    }

    /// For a short look. A test that panicked meanwhile has said so; others should not fail for it.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something and tells the watches.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.send_replace(());
        result
    }

    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// Counts a watch while it is open.
#[derive(Debug)]
pub(super) struct Open {
    shared: Arc<Shared>,
    resource: Resource,
}

impl Open {
    pub(super) fn new(shared: &Arc<Shared>, resource: Resource) -> Self {
        *shared.lock().open.entry(resource).or_default() += 1;
        Self { shared: Arc::clone(shared), resource }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(open) = self.shared.lock().open.get_mut(&self.resource) {
            *open -= 1;
        }
    }
}
