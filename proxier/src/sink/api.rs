//! Serves what nodes should have to any number of backends, by kpng's API: one controller, many backends. Each client is
//! told of its own node, at its own pace.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, task::JoinHandle};

use self::{
    listen::Listener,
    store::{Revision, Store},
    tls::Identity,
};
use super::{
    Condition, Sink, Snapshot,
    export::{Carried, Exported},
};
use crate::{
    desired::{Desired, Scope},
    model::{NodeName, ObjectName},
    observe::metrics::Metrics,
};

mod listen;
mod server;
mod store;
mod tls;

/// What the fuzzer calls.
#[cfg(any(test, fuzzing))]
pub use self::store::reference::watch as fuzz_watch;
pub use self::{
    listen::{ListenAddress, NotAListenAddress},
    tls::{TlsError, TlsFiles},
};

/// Where kpng's backends look for it; kpng itself listens on every address.
pub const DEFAULT_LISTEN_ADDRESS: &str = "tcp://127.0.0.1:12090";

/// How many values that have gone are remembered, in some ten megabytes at most. A client that has not asked while more went starts
/// over.
const MAX_GONE: usize = 100_000;

/// What becomes of an address that somebody else has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is an error: there is nothing else to do.
    Fails,
    /// It is waited for: what is served beside must not wait for it.
    Waits,
}

/// The sink.
pub struct ApiSink {
    carried: Carried,
    shared: Arc<Shared>,
    /// Of the newest change; none before the first whole state. Goes with the sink, which is how the clients learn of its end.
    revision: watch::Sender<Option<Revision>>,
    bound: ListenAddress,
    server: JoinHandle<()>,
}

impl fmt::Debug for ApiSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiSink").field("bound", &self.bound).finish_non_exhaustive()
    }
}

/// What the sink and its clients share.
#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    /// The only node that the source knows the pods of, if it is one.
    only: Option<NodeName>,
    revision: watch::Receiver<Option<Revision>>,
    metrics: Arc<Metrics>,
}

impl Shared {
    /// A panic in the midst of a change ends the process.
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ApiSink {
    /// Listens, and serves until it is dropped. Clients that come before there is something to serve wait. If the source knows
    /// the pods of `only` one node, clients of others are refused. To be called within a runtime.
    ///
    /// # Errors
    ///
    /// A file of `tls` cannot be used; or the address cannot be had, and `taken` says that this is one.
    pub fn serve(
        address: &ListenAddress,
        tls: Option<TlsFiles>,
        taken: Taken,
        carried: Carried,
        only: Option<NodeName>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let tls = tls.map(|files| Identity::read(files, tls::LOOK)).transpose()?;
        Self::start(address, tls, taken, carried, only, metrics)
    }

    fn start(
        address: &ListenAddress,
        tls: Option<Identity>,
        taken: Taken,
        carried: Carried,
        only: Option<NodeName>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let listener = match (Listener::bind(address), taken) {
            (Ok(listener), _) => Ok(listener),
            (Err(error), Taken::Fails) => return Err(error),
            (Err(error), Taken::Waits) => {
                tracing::warn!(
                    "{error:#}; the rest goes on, and it is tried again every {} seconds",
                    listen::AGAIN.as_secs()
                );
                Err(address.clone())
            }
        };
        let bound = listener.as_ref().map_or_else(Clone::clone, Listener::bound);
        if bound.is_exposed() && !tls.as_ref().is_some_and(Identity::asks_clients) {
            tracing::warn!(
                "whoever reaches {bound} can read every Service and the addresses of its pods; listen on a loopback address \
                 or a unix socket, or ask for certificates with --tls-client-ca"
            );
        }
        let (revision, newest) = watch::channel(None);
        let store = Mutex::new(Store::new(MAX_GONE));
        let shared = Arc::new(Shared { store, only, revision: newest, metrics });
        let server = tokio::spawn(server::run(Arc::clone(&shared), listener, tls));
        Ok(Self { carried, shared, revision, bound, server })
    }

    /// Where it listens, with the port that the kernel has chosen if none was given.
    #[must_use]
    pub const fn bound(&self) -> &ListenAddress {
        &self.bound
    }
}

impl Drop for ApiSink {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Sink for ApiSink {
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        let names: BTreeSet<ObjectName> = match snapshot.touched {
            Scope::Only(names) => names.clone(),
            Scope::All => {
                let there = snapshot.catalog.services().map(|service| &service.name);
                there.chain(self.shared.store().names()).cloned().collect()
            }
        };
        // Before the lock: clients ask meanwhile.
        let services: Vec<_> = names
            .into_iter()
            .map(|name| {
                let exported = Exported::of(snapshot, &name, &self.carried);
                (name, exported)
            })
            .collect();
        let revision = self.shared.store().put(services);
        self.revision.send_if_modified(|known| known.replace(revision) != Some(revision));
        Ok(())
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.server.is_finished(),
            "the API on {} is no longer served; start proxier again",
            self.bound
        );
        Ok(())
    }
}

/// A sink, and the API beside it.
#[derive(Debug)]
pub struct WithApi<S> {
    /// What the API is served beside.
    pub sink: S,
    /// The API.
    pub api: ApiSink,
}

impl<S: Sink> Sink for WithApi<S> {
    /// What the other sink cannot apply is served all the same: it may be this node alone that has no room.
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        self.api.apply(snapshot)?;
        self.sink.apply(snapshot)
    }

    fn in_force(&self) -> Desired {
        self.sink.in_force()
    }

    fn condition(&self) -> Option<Condition> {
        self.sink.condition()
    }

    fn is_underway(&self) -> bool {
        self.sink.is_underway()
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        let served = self.api.tick();
        self.sink.tick().and(served)
    }
}

#[cfg(test)]
mod tests;
