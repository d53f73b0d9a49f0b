//! A double of the Kubernetes API server: real HTTP, in this process, with objects that a test puts there and with
//! every fault that a test asks for.
//!
//! Lists (pages, selectors, consistent revisions), watches (bookmarks, timeouts, selections that objects enter and
//! leave), Events that clients write. What it says is held against recordings of a real server (`recordings/`).
//! It runs on a thread of its own with its own runtime, so that tests that know nothing of async can use it, also from
//! within network namespaces.
//!
//! It is no API server: it stores what it is given, with no defaults, no validation and no admission; it speaks
//! HTTP/1.1, with TLS if asked for, and JSON only, on one line where the real server indents for curl.

mod answer;
mod fault;
mod resource;
mod selector;
mod serve;
mod state;
mod status;
mod store;
mod tls;
mod watch;

use std::{
    fmt, fs, io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, bail};
use axum::serve::ListenerExt as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::sync::oneshot;

pub use self::{
    fault::{Fault, FaultId, Kind, Step, Verb},
    resource::Resource,
    state::{FutureWatch, Request},
};
use self::{
    state::{Shared, State},
    store::{Store, key},
    tls::Tls,
};
use crate::netns::Namespace;

const TOKEN: &str = "double-1";
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// A server; ends when dropped, with all connections.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    listening: Mutex<Listening>,
    /// Where sockets are made; none is the namespace of whoever asks.
    namespace: Option<fs::File>,
    tls: Option<Tls>,
}

#[derive(Debug)]
enum Listening {
    Up(Serving),
    /// Keeps the port: a connection to it is refused, and nobody else gets it.
    Down(Socket),
    /// The port is lost, and with it the double.
    Lost,
}

/// What was in the store, to go back to: a backup of etcd.
#[derive(Debug)]
pub struct Backup(Store);

impl fmt::Debug for ApiServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ApiServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// Starts on loopback, on any port.
    ///
    /// # Errors
    ///
    /// No port, descriptor or thread left.
    pub fn start() -> anyhow::Result<Self> {
        let socket = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)?;
        Self::start_on(listen(&socket).context("no port on loopback")?)
    }

    /// Starts on a socket that listens already. [`Self::down`] binds its address again in the namespace of the
    /// thread that calls it; for another namespace there is [`Self::start_in`].
    ///
    /// # Errors
    ///
    /// No descriptor or thread left.
    pub fn start_on(listener: TcpListener) -> anyhow::Result<Self> {
        Self::start_from(listener, None, None)
    }

    /// Starts in a network namespace; port 0 is any.
    ///
    /// # Errors
    ///
    /// The address is not there or taken.
    pub fn start_in(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        let (listener, file) = listener_in(namespace, address)?;
        Self::start_from(listener, Some(file), None)
    }

    /// The same with TLS: clients need [`Self::write_kubeconfig`] or [`Self::write_service_account`] to trust it.
    ///
    /// # Errors
    ///
    /// As [`Self::start_in`].
    pub fn start_with_tls_in(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<Self> {
        let (listener, file) = listener_in(namespace, address)?;
        let tls = Tls::new(address)?;
        Self::start_from(listener, Some(file), Some(tls))
    }

    fn start_from(
        listener: TcpListener,
        namespace: Option<fs::File>,
        tls: Option<Tls>,
    ) -> anyhow::Result<Self> {
        let address = listener.local_addr()?;
        let shared = Shared::new(TOKEN);
        let serving = Serving::start(listener, &shared, tls.as_ref())?;
        Ok(Self { shared, address, listening: Mutex::new(Listening::Up(serving)), namespace, tls })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, for a client.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What clients show.
    #[must_use]
    pub fn token(&self) -> String {
        self.shared.lock().token.clone()
    }

    /// From now on another token is the right one.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut self.shared.lock().token);
    }

    /// Writes a kubeconfig with the address, the token, and whom to trust.
    ///
    /// # Errors
    ///
    /// As the file system says.
    pub fn write_kubeconfig(&self, path: &Path) -> anyhow::Result<()> {
        let (url, token) = (self.url(), self.token());
        let authority = self.tls.as_ref().map_or_else(String::new, |tls| {
            format!(", certificate-authority-data: {}", STANDARD.encode(&tls.authority))
        });
        let text = format!(
            "apiVersion: v1
kind: Config
clusters:
- name: double
  cluster: {{server: \"{url}\"{authority}}}
users:
- name: agent
  user: {{token: \"{token}\"}}
contexts:
- name: double
  context: {{cluster: double, user: agent}}
current-context: double
"
        );
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes what the kubelet mounts at `/var/run/secrets/kubernetes.io/serviceaccount`. In a pod `KUBERNETES_SERVICE_HOST` and
    /// `KUBERNETES_SERVICE_PORT` are [`Self::address`].
    ///
    /// # Errors
    ///
    /// It was started without TLS, which clients in pods insist on; or as the file system says.
    pub fn write_service_account(&self, directory: &Path, namespace: &str) -> anyhow::Result<()> {
        let tls = self.tls.as_ref().context("this double has no TLS: use start_with_tls_in")?;
        for (name, text) in
            [("token", self.token().as_str()), ("ca.crt", &tls.authority), ("namespace", namespace)]
        {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Creates or replaces an object, as `kubectl replace` would; the same once more changes nothing. Gives the
    /// object with what the server decided. A uid, creationTimestamp or generation that a new object comes with is
    /// kept, so that a test can say how old it is.
    ///
    /// # Errors
    ///
    /// It is no object of a resource that the double serves.
    #[expect(clippy::needless_pass_by_value, reason = "callers build it in place")]
    pub fn apply(&self, object: Value) -> anyhow::Result<Value> {
        self.shared.change(|state| {
            let (resource, stored) = state.store.put(&object)?;
            Ok(stored.value(resource))
        })
    }

    /// Applies many objects; watches see them when all are there.
    ///
    /// # Errors
    ///
    /// As [`Self::apply`]; those before are applied.
    pub fn apply_all<'a>(&self, objects: impl IntoIterator<Item = &'a Value>) -> anyhow::Result<()> {
        self.shared
            .change(|state| objects.into_iter().try_for_each(|object| state.store.put(object).map(|_| ())))
    }

    /// Applies the documents of a YAML file.
    ///
    /// # Errors
    ///
    /// It is no YAML, or as [`Self::apply`].
    pub fn apply_yaml(&self, text: &str) -> anyhow::Result<()> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("the manifests are no YAML")?;
        self.apply_all(documents.iter().filter(|document| !document.is_null()))
    }

    /// Deletes an object; a Node's namespace does not matter.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<()> {
        let resource = Resource::of_kind(kind).with_context(|| format!("the double has no {kind}"))?;
        let removed =
            self.shared.change(|state| state.store.remove(resource, &key(resource, namespace, name)));
        removed.map(|_| ()).with_context(|| format!("there is no {kind} {namespace}/{name}"))
    }

    /// An object as it is.
    #[must_use]
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = Resource::of_kind(kind)?;
        let state = self.shared.lock();
        Some(state.store.get(resource, &key(resource, namespace, name))?.value(resource))
    }

    /// All objects as they are, but Events.
    #[must_use]
    pub fn objects(&self) -> Vec<Value> {
        let state = self.shared.lock();
        Resource::ALL
            .into_iter()
            .filter(|resource| *resource != Resource::Events)
            .flat_map(|resource| present(&state, resource))
            .collect()
    }

    /// The Events that clients wrote, each as it is now.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        present(&self.shared.lock(), Resource::Events)
    }

    /// The present resourceVersion.
    #[must_use]
    pub fn resource_version(&self) -> u64 {
        self.shared.lock().store.revision()
    }

    /// Goes on from a higher resourceVersion, as when objects change that nobody here looks at.
    ///
    /// # Errors
    ///
    /// It is a lower one.
    pub fn skip_to(&self, resource_version: u64) -> anyhow::Result<()> {
        self.shared.change(|state| state.store.skip_to(resource_version))
    }

    /// From now on this goes wrong, in open watches too.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.shared.change(|state| state.faults.inject(fault))
    }

    /// How often a fault has happened.
    #[must_use]
    pub fn hits(&self, fault: FaultId) -> u32 {
        self.shared.lock().faults.hits(fault)
    }

    /// No fault happens any more. Connections that one has stalled stay so.
    pub fn heal(&self) {
        self.shared.lock().faults.heal();
    }

    /// This fault does not happen any more.
    pub fn heal_one(&self, fault: FaultId) {
        self.shared.lock().faults.heal_one(fault);
    }

    /// Makes every resourceVersion before now too old. Open watches go on.
    pub fn compact(&self) {
        self.shared.lock().store.compact();
    }

    /// Cuts all watches in the middle, but those that are stalled.
    pub fn cut_watches(&self) {
        self.shared.change(|state| state.epoch += 1);
    }

    /// The same objects with resourceVersions that start again lower, and no history; watches are cut. What clients
    /// see when etcd was lost and filled again. With [`Self::skip_to`] before the first object there is room for histories that
    /// have no resourceVersion in common: else a client that comes late finds one that it knows, and cannot notice.
    pub fn reset_history(&self) {
        self.shared.change(|state| {
            state.store.restart();
            state.epoch += 1;
        });
    }

    /// Everything as it is, for [`Self::restore`].
    #[must_use]
    pub fn backup(&self) -> Backup {
        Backup(self.shared.lock().store.clone())
    }

    /// Goes back to what was; watches are cut. resourceVersions that clients have seen come again, and mean other
    /// objects.
    pub fn restore(&self, backup: &Backup) {
        self.shared.change(|state| {
            state.store = backup.0.clone();
            state.epoch += 1;
        });
    }

    /// What is said to watches from the future.
    pub fn set_future_watch(&self, answer: FutureWatch) {
        self.shared.lock().future_watch = answer;
    }

    /// How often watches that want bookmarks get one: those opened from now on. As the real server, once a minute
    /// and just before the end, unless set.
    pub fn set_bookmark_interval(&self, interval: Duration) {
        self.shared.lock().bookmark_interval = interval;
    }

    /// Every request since the start.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.shared.lock().requests.clone()
    }

    /// How many watches of a resource are open.
    #[must_use]
    pub fn watchers(&self, resource: Resource) -> usize {
        self.shared.lock().open.get(&resource).copied().unwrap_or_default()
    }

    /// Cuts all connections and refuses new ones; the objects stay.
    ///
    /// # Errors
    ///
    /// Somebody else has got the port.
    pub fn down(&self) -> anyhow::Result<()> {
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *listening, Listening::Lost) {
            Listening::Up(serving) => {
                // While it is still listened on, so that no client can get the port as its own in between. A listener that was
                // handed in may not allow that.
                let reserved = bound(self.address, self.namespace.as_ref());
                drop(serving);
                *listening = Listening::Down(match reserved {
                    Ok(reserved) => reserved,
                    Err(_) => bound(self.address, self.namespace.as_ref())?,
                });
                Ok(())
            }
            other => {
                *listening = other;
                Ok(())
            }
        }
    }

    /// Listens again after [`Self::down`].
    ///
    /// # Errors
    ///
    /// No descriptor or thread left.
    pub fn up(&self) -> anyhow::Result<()> {
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        match &*listening {
            Listening::Up(_) => {}
            Listening::Down(socket) => {
                let serving = Serving::start(listen(socket)?, &self.shared, self.tls.as_ref())?;
                *listening = Listening::Up(serving);
            }
            Listening::Lost => bail!("the port {} was lost when it was let go", self.address),
        }
        Ok(())
    }

    /// Takes a step of a sequence; one with a duration takes that long.
    ///
    /// # Errors
    ///
    /// As [`Self::down`].
    pub fn play(&self, step: Step) -> anyhow::Result<()> {
        match step {
            Step::Inject(fault) => {
                self.inject(fault);
            }
            Step::Heal => self.heal(),
            Step::Compact => self.compact(),
            Step::ResetHistory => self.reset_history(),
            Step::CutWatches => self.cut_watches(),
            Step::Restart(pause) => {
                self.down()?;
                std::thread::sleep(pause);
                self.up()?;
            }
            Step::Wait(pause) => std::thread::sleep(pause),
        }
        Ok(())
    }
}

fn present(state: &State, resource: Resource) -> Vec<Value> {
    let objects = state.store.list(resource, state.store.revision(), "");
    objects.map(|(_, object)| object.value(resource)).collect()
}

/// A listener in a namespace, and the namespace for when it is to be bound again.
fn listener_in(namespace: &Namespace, address: SocketAddr) -> anyhow::Result<(TcpListener, fs::File)> {
    let file = fs::File::open(namespace.path()).context("no such namespace")?;
    let socket = bound(address, Some(&file))?;
    Ok((listen(&socket)?, file))
}

/// A socket that has the address and does not listen yet.
fn bound(address: SocketAddr, namespace: Option<&fs::File>) -> anyhow::Result<Socket> {
    let make = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // Else connections that were cut would keep it for a minute.
        socket.set_reuse_address(true)?;
        // To have it again before it is let go.
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let socket = match namespace {
        None => make(),
        Some(namespace) => std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                make()
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        }),
    };
    socket.with_context(|| format!("{address} cannot be bound"))
}

fn listen(socket: &Socket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)?;
    Ok(socket.try_clone()?.into())
}

/// The thread that serves; ended with all its connections when dropped.
#[derive(Debug)]
struct Serving {
    /// A copy of the descriptor, to end the listening with.
    listener: TcpListener,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    fn start(listener: TcpListener, shared: &Arc<Shared>, tls: Option<&Tls>) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let held = listener.try_clone()?;
        let router = serve::router(Arc::clone(shared));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let served: Pin<Box<dyn Future<Output = io::Result<()>> + Send>> = {
            let _entered = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            match tls {
                Some(tls) => Box::pin(axum::serve(tls.listen(listener)?, router).into_future()),
                None => {
                    // A line of a watch is sent when it is there, not with the next. A connection that is gone will say so.
                    let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
                    Box::pin(axum::serve(listener, router).into_future())
                }
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("api server".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    served = served => {
                        if let Err(error) = served {
                            eprintln!("the API server's double no longer serves: {error}");
                        }
                    }
                    _ = stopped => {}
                }
            });
            // With the runtime go the tasks of the connections, and with them the sockets.
        })?;
        Ok(Self { listener: held, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has said why on stderr if it panicked; a second panic in a drop would hide that.
            let _ = thread.join();
        }
        // To close it is not enough: a process that another thread is starting has a copy of every descriptor until it executes
        // its program, and as long as one is open, connections are accepted. A listener that is gone needs no ending.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Read);
    }
}
