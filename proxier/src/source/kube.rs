//! `proxier kube`: watches Services, EndpointSlices and Nodes at the API server and delivers what changes. The only module that
//! knows kube's types, but for `convert`, which it shares with `file`.
//!
//! One task a watch sends what it sees to a task that makes batches of it: while the agent is busy, changes of one object
//! come together there, so that memory is bounded by the number of objects. Nothing of an object is kept but what
//! `convert` makes of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use anyhow::Context as _;
use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, Config, Resource,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher,
};
use tokio::sync::mpsc;

use self::{
    batches::{Pending, Update},
    failure::Failure,
    follow::{Follower, Id, follow, id},
    link::Link,
    standing::Reporter,
};
use super::{
    Batch, Onlooker,
    convert::{self, Converted, Refused, SERVICE_NAME_LABEL, SERVICE_PROXY_NAME_LABEL},
};
use crate::model::{NodeName, Object, ObjectId, ObjectName};

mod batches;
mod failure;
mod follow;
mod link;
mod patience;
mod standing;

pub use self::patience::Timing;

/// What the command line says about this source.
#[derive(Clone, Debug)]
pub struct Options {
    /// The value that the label `service.kubernetes.io/service-proxy-name` of our Services has.
    pub service_proxy_name: String,
    /// How to find and enter the API server; the ServiceAccount of this pod, or else what kubectl would use, if none.
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig; the current one if none.
    pub context: Option<String>,
    /// Objects of one page of a list. Each page is in memory as a whole while it is converted.
    pub page_size: u32,
    /// How often the API server is asked.
    pub timing: Timing,
}

impl Options {
    /// Everything as the command line has it without flags.
    #[must_use]
    pub fn new(service_proxy_name: impl Into<String>) -> Self {
        Self {
            service_proxy_name: service_proxy_name.into(),
            kubeconfig: None,
            context: None,
            page_size: 250,
            timing: Timing::default(),
        }
    }
}

/// How to reach an API server. Nothing has been sent to it yet.
#[derive(Clone, Debug)]
pub struct Server {
    config: Config,
    /// The addresses that this host reaches it at.
    addresses: BTreeSet<IpAddr>,
}

/// How many objects the watches may be ahead of whoever makes batches of them.
const AHEAD: usize = 64;

/// What is watched, by the name that the API has for it. The last is the slices of one Service, the API server's own.
const RESOURCES: [&str; 4] = ["services", "endpointslices", "nodes", API_SERVER];
const API_SERVER: &str = "apiserver-endpointslices";

/// An EndpointSlice says here when what it tells of happened.
const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Finds out how to reach the API server.
///
/// # Errors
///
/// There is no kubeconfig or ServiceAccount, or it cannot be read.
pub async fn server(options: &Options) -> anyhow::Result<Server> {
    let context = KubeConfigOptions { context: options.context.clone(), ..KubeConfigOptions::default() };
    let mut config = match &options.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)
                .with_context(|| format!("the kubeconfig {} cannot be read: name another one with --kubeconfig", path.display()))?;
            Config::from_custom_kubeconfig(kubeconfig, &context)
                .await
                .with_context(|| format!("the kubeconfig {} cannot be used", path.display()))?
        }
        None if options.context.is_some() => Config::from_kubeconfig(&context)
            .await
            .context("the kubeconfig that kubectl would use has no such --context, or cannot be used")?,
        None if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() => Config::incluster().context(
            "the ServiceAccount of this pod cannot be used: automountServiceAccountToken must not be false",
        )?,
        None => Config::infer().await.context(
            "no API server is known: this is no pod, and there is no kubeconfig that kubectl would use; give --kubeconfig",
        )?,
    };
    // Pauses are `follow`'s business, which lets the source say what is going on.
    config.default_retry = false;
    config.read_timeout = Some(options.timing.silence);
    config.reset_reader_on_write = true;
    let addresses = addresses(&config).await;
    Ok(Server { config, addresses })
}

impl Server {
    /// A client for what is not watched.
    ///
    /// # Errors
    ///
    /// As [`spawn`].
    pub fn client(&self) -> anyhow::Result<Client> {
        Client::try_from(self.config.clone()).with_context(|| self.unusable())
    }

    fn unusable(&self) -> String {
        format!(
            "no connection to the API server {} can be set up: check the certificates and keys in the kubeconfig",
            self.config.cluster_url
        )
    }
}

/// The addresses in the URL, or behind the name in it.
async fn addresses(config: &Config) -> BTreeSet<IpAddr> {
    let Some(host) = config.cluster_url.host() else { return BTreeSet::new() };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = host.parse() {
        return BTreeSet::from([address]);
    }
    match tokio::net::lookup_host((host, 0)).await {
        Ok(found) => found.map(|socket| socket.ip()).collect(),
        Err(error) => {
            tracing::warn!(
                "the API server's name {host} leads to no address now ({error}): should a Service claim its address, that is \
                 not noticed"
            );
            BTreeSet::new()
        }
    }
}

/// Watches until the receiver is dropped. Must be called within a runtime.
///
/// # Errors
///
/// The client cannot be set up: certificates or keys of the kubeconfig are of no use.
pub fn spawn(
    server: &Server,
    options: &Options,
    onlooker: Arc<dyn Onlooker>,
) -> anyhow::Result<mpsc::Receiver<Batch>> {
    let timing = options.timing;
    let reporter = Reporter::new(&server.config.cluster_url.to_string(), &RESOURCES, onlooker);
    let client = |resource| {
        let accepted = {
            let reporter = reporter.clone();
            move || reporter.accepted(resource)
        };
        let client = ClientBuilder::try_from(server.config.clone()).with_context(|| server.unusable())?;
        anyhow::Ok(client.with_layer(&Link::new(timing, accepted)).build())
    };
    let ours = format!("{SERVICE_PROXY_NAME_LABEL}={}", options.service_proxy_name);

    let (updates, seen) = mpsc::channel(AHEAD);
    let feed = |resource| Feed { resource, reporter: reporter.clone(), updates: updates.clone() };
    let services = Objects {
        feed: feed("services"),
        id: |id| ObjectId::Service(object_name(id)),
        convert: convert::service,
        triggered: |_| None,
    };
    let slices = Objects {
        feed: feed("endpointslices"),
        id: |id| ObjectId::EndpointSlice(object_name(id)),
        convert: convert::endpoint_slice,
        triggered,
    };
    let nodes = Objects {
        feed: feed("nodes"),
        id: |(_, name)| ObjectId::Node(NodeName::new(name)),
        convert: |node| convert::node(&node),
        triggered: |_| None,
    };
    let api_server =
        ApiServer { feed: feed(API_SERVER), slices: BTreeMap::new(), reached: server.addresses.clone() };
    let all = watcher::Config::default().page_size(options.page_size);
    let selected = |labels: &str| all.clone().labels(labels);
    let own = selected(&format!("{SERVICE_NAME_LABEL}=kubernetes"));
    tokio::spawn(follow::<Service>(Api::all(client("services")?), selected(&ours), timing, services));
    tokio::spawn(follow::<EndpointSlice>(
        Api::all(client("endpointslices")?),
        selected(&ours),
        timing,
        slices,
    ));
    tokio::spawn(follow::<Node>(Api::all(client("nodes")?), all.clone(), timing, nodes));
    tokio::spawn(follow::<EndpointSlice>(
        Api::namespaced(client(API_SERVER)?, "default"),
        own,
        timing,
        api_server,
    ));

    let (batches, receiver) = mpsc::channel(1);
    tokio::spawn(Pending::new(&RESOURCES, ours).run(seen, batches, reporter));
    Ok(receiver)
}

/// Where a watch sends what it sees. When nobody listens any more, the agent is ending, and so is the watch's task.
struct Feed {
    resource: &'static str,
    reporter: Reporter,
    updates: mpsc::Sender<Update>,
}

impl Feed {
    async fn send(&self, update: Update) {
        self.reporter.onlooker().heard(self.resource);
        if self.updates.send(update).await.is_err() {
            // Nothing will ever be read again; the runtime ends this task with the agent.
            std::future::pending::<()>().await;
        }
    }

    async fn listed(&self) {
        self.send(Update::Listed(self.resource)).await;
    }

    fn failed(&self, failure: &Failure) {
        self.reporter.failed(self.resource, failure);
    }
}

/// Objects of a kind, which the agent is told of.
struct Objects<K, T> {
    feed: Feed,
    id: fn(Id) -> ObjectId,
    convert: fn(K) -> Result<Converted<T>, Refused>,
    /// When what an object tells of happened.
    triggered: fn(&K) -> Option<SystemTime>,
}

impl<K: Resource + Send, T: Into<Object> + Send> Follower<K> for Objects<K, T> {
    async fn applied(&mut self, object: K, fresh: bool) {
        let id = (self.id)(id(&object));
        // What a list tells may have happened long ago.
        let triggered = if fresh { (self.triggered)(&object) } else { None };
        let update = match (self.convert)(object) {
            Ok(Converted { object, problems }) => {
                Update::Applied { object: object.into(), problems, triggered }
            }
            // One that is refused is one that is not there.
            Err(Refused::Unsupported(problem)) => Update::Deleted { id, problems: vec![*problem] },
            // The API server has no nameless objects.
            Err(Refused::Nameless) => Update::Deleted { id, problems: Vec::new() },
        };
        self.feed.send(update).await;
    }

    async fn deleted(&mut self, id: Id) {
        self.feed.send(Update::Deleted { id: (self.id)(id), problems: Vec::new() }).await;
    }

    async fn listed(&mut self) {
        self.feed.listed().await;
    }

    fn failed(&mut self, failure: &Failure) {
        self.feed.failed(failure);
    }
}

fn object_name((namespace, name): Id) -> ObjectName {
    ObjectName::new(namespace, name)
}

/// When what a slice tells of happened.
fn triggered(slice: &EndpointSlice) -> Option<SystemTime> {
    let time = slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME_ANNOTATION)?;
    time.parse::<Timestamp>().ok().map(SystemTime::from)
}

/// The API server's own slices: it writes them into every cluster, and no Service may have an address in them.
struct ApiServer {
    feed: Feed,
    slices: BTreeMap<Id, BTreeSet<IpAddr>>,
    /// The addresses that this host reaches it at.
    reached: BTreeSet<IpAddr>,
}

impl ApiServer {
    async fn tell(&self) {
        let addresses = self.slices.values().chain([&self.reached]).flatten().copied().collect();
        self.feed.send(Update::ApiServer(addresses)).await;
    }
}

impl Follower<EndpointSlice> for ApiServer {
    async fn applied(&mut self, slice: EndpointSlice, fresh: bool) {
        let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        let addresses = addresses.filter_map(|address| address.parse().ok()).collect();
        self.slices.insert(id(&slice), addresses);
        // A list is told when it is whole.
        if fresh {
            self.tell().await;
        }
    }

    async fn deleted(&mut self, id: Id) {
        self.slices.remove(&id);
        self.tell().await;
    }

    async fn listed(&mut self) {
        self.tell().await;
        self.feed.listed().await;
    }

    fn failed(&mut self, failure: &Failure) {
        self.feed.failed(failure);
    }
}
