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

use anyhow::{anyhow, bail};
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
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    runtime::watcher,
};
use tokio::sync::mpsc;

use self::{
    batches::{Pending, Update},
    failure::Failure,
    follow::{Follower, Id, follow, id},
    link::Link,
};
use super::{
    Batch, Onlooker,
    convert::{self, Converted, Refused, SERVICE_NAME_LABEL, SERVICE_PROXY_NAME_LABEL},
    standing::Reporter,
    words::chain,
};
use crate::model::{NodeName, Object, ObjectId, ObjectName};

mod batches;
mod failure;
mod follow;
mod link;

pub(crate) use self::failure::words;
pub use super::patience::Timing;

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
/// There is no kubeconfig or ServiceAccount, or it cannot be used.
pub async fn server(options: &Options) -> anyhow::Result<Server> {
    let names_none = options.kubeconfig.is_none() && options.context.is_none();
    let mut config = if names_none && std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        Config::incluster().map_err(|error| {
            anyhow!(
                "the ServiceAccount of this pod cannot be used: {}: the pod needs automountServiceAccountToken: true",
                chain(&error)
            )
        })?
    } else {
        from_kubeconfig(options).await?
    };
    // Nobody would be trusted, and every connection fail with a message about the server's certificate.
    if config.root_cert.as_ref().is_some_and(Vec::is_empty) {
        bail!(
            "the certificate authority for the API server {} has no certificate in it: write one in PEM form",
            url(&config)
        );
    }
    // Pauses are `follow`'s business, which lets the source say what is going on.
    config.default_retry = false;
    config.read_timeout = Some(options.timing.silence);
    config.connect_timeout = config.connect_timeout.map(|timeout| timeout.min(options.timing.silence));
    config.reset_reader_on_write = true;
    let addresses = addresses(&config).await;
    Ok(Server { config, addresses })
}

async fn from_kubeconfig(options: &Options) -> anyhow::Result<Config> {
    let (name, read, next_step) = match &options.kubeconfig {
        Some(path) => (
            format!("the kubeconfig {}", path.display()),
            Kubeconfig::read_from(path),
            "name another one with --kubeconfig",
        ),
        None => ("the kubeconfig that kubectl would use".to_owned(), Kubeconfig::read(), "give --kubeconfig"),
    };
    let kubeconfig = read.map_err(|error| {
        let why = match &error {
            KubeconfigError::ReadConfig(error, path) if options.kubeconfig.is_none() => {
                format!("{}: {error}", path.display())
            }
            KubeconfigError::ReadConfig(error, _) => error.to_string(),
            error => chain(error),
        };
        let why = format!("{name} cannot be read: {why}: {next_step}");
        if options.kubeconfig.is_none() && options.context.is_none() {
            anyhow!("no API server is known: this is no pod, and {why}")
        } else {
            anyhow!(why)
        }
    })?;
    let contexts: Vec<_> = kubeconfig.contexts.iter().map(|context| context.name.as_str()).collect();
    let contexts = if contexts.is_empty() { "none".to_owned() } else { contexts.join(", ") };
    let context = KubeConfigOptions { context: options.context.clone(), ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &context).await;
    config.map_err(|error| match error {
        KubeconfigError::LoadContext(context) => {
            anyhow!("{name} has no context {context}: name one that it has ({contexts}) with --context")
        }
        KubeconfigError::CurrentContextNotSet => {
            anyhow!("{name} has no current context: name one that it has ({contexts}) with --context")
        }
        error => anyhow!("{name} cannot be used: {}: correct it, or {next_step}", chain(&error)),
    })
}

/// For people: without the slash that every URL ends with.
fn url(config: &Config) -> String {
    config.cluster_url.to_string().trim_end_matches('/').to_owned()
}

impl Server {
    /// A client for what is not watched.
    ///
    /// # Errors
    ///
    /// As [`spawn`].
    pub fn client(&self) -> anyhow::Result<Client> {
        Client::try_from(self.config.clone()).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, error: &kube::Error) -> anyhow::Error {
        anyhow!(
            "no connection to the API server {} can be set up: {}: check the certificates and keys in the kubeconfig",
            url(&self.config),
            chain(error)
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
    let reporter = Reporter::new(format!("the API server {}", url(&server.config)), &RESOURCES, onlooker);
    let client = |resource| {
        let accepted = {
            let reporter = reporter.clone();
            move || reporter.accepted(resource)
        };
        let client =
            ClientBuilder::try_from(server.config.clone()).map_err(|error| server.unusable(&error))?;
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
        self.reporter.failed(self.resource, failure.kind, &failure.reason);
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
