//! The cluster that a test talks to: the double in this process; or, with `PROXIER_TEST_KUBECONFIG`, a real one, in which every
//! test has a namespace, a label value and Nodes of its own. And a node of it, which sees what the agent would see.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client, Config,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use proxier::{
    catalog::Catalog,
    desired::{Desired, DesiredService, ServiceKey, Settings, compute},
    model::{Family, NodeName, ObjectId, ObjectName, Problem},
    source::{
        Batch, Event, Onlooker,
        kube::{self as source, Options, Timing},
    },
};
use proxier_tests::apiserver::ApiServer;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::MissedTickBehavior};

/// A real cluster's kubeconfig.
const REAL: &str = "PROXIER_TEST_KUBECONFIG";

/// Nothing here takes as long, however little of a busy machine is left for it; this only keeps a test that would wait for ever
/// from doing so.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Pauses that a test can wait for.
pub(crate) const TIMING: Timing = Timing {
    first_retry: Duration::from_millis(20),
    last_retry: Duration::from_millis(200),
    calm: Duration::from_secs(2),
    silence: Duration::from_millis(1000),
};

/// Where objects live.
pub(crate) struct Cluster {
    api: Server,
    kubeconfig: PathBuf,
    /// The namespace of this test.
    pub(crate) namespace: String,
    /// The value of the label that this test's Services have.
    pub(crate) proxy_name: String,
    _work: TempDir,
}

enum Server {
    Double(ApiServer),
    Real(Client),
}

impl Cluster {
    /// The double, or the real cluster, with a namespace for this test.
    pub(crate) async fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("proxier-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let work = tempfile::tempdir().unwrap();
        let (api, kubeconfig) = match env::var_os(REAL) {
            Some(path) => {
                let path = PathBuf::from(path);
                let client = client(&path).await;
                let namespace: Namespace =
                    serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
                Api::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
                (Server::Real(client), path)
            }
            None => {
                let path = work.path().join("kubeconfig");
                let server = ApiServer::start().unwrap();
                server.set_bookmark_interval(Duration::from_millis(300));
                server.write_kubeconfig(&path).unwrap();
                (Server::Double(server), path)
            }
        };
        Self { api, kubeconfig, namespace: name.clone(), proxy_name: name, _work: work }
    }

    /// For `--kubeconfig`.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// What the command line says.
    pub(crate) fn options(&self) -> Options {
        Options {
            kubeconfig: Some(self.kubeconfig.clone()),
            page_size: 3,
            timing: match self.api {
                Server::Double(_) => TIMING,
                Server::Real(_) => Timing::default(),
            },
            ..Options::new(&*self.proxy_name)
        }
    }

    /// The name of a Node that no other test has.
    pub(crate) fn node(&self, number: u32) -> String {
        format!("{}-node{number}", self.namespace)
    }

    /// A name in this test's namespace.
    pub(crate) fn name(&self, name: &str) -> ObjectName {
        ObjectName::new(&*self.namespace, name)
    }

    /// Creates or replaces an object, in this test's namespace if it is in one.
    pub(crate) async fn apply(&self, mut object: Value) {
        if object["kind"] != "Node" {
            object["metadata"]["namespace"] = json!(self.namespace);
        }
        match &self.api {
            Server::Double(server) => {
                server.apply(object).unwrap();
            }
            Server::Real(client) => {
                let status = object.get("status").cloned();
                let api = self.api_of(client, &object["kind"]);
                let name = object["metadata"]["name"].as_str().unwrap().to_owned();
                let force = PatchParams::apply("proxier-test").force();
                api.patch(&name, &force, &Patch::Apply(&object)).await.unwrap();
                if let Some(status) = status {
                    let patch = json!({"status": status});
                    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
                }
            }
        }
    }

    /// Deletes an object.
    pub(crate) async fn delete(&self, kind: &str, name: &str) {
        match &self.api {
            Server::Double(server) => server.delete(kind, &self.namespace, name).unwrap(),
            Server::Real(client) => {
                let api = self.api_of(client, &json!(kind));
                api.delete(name, &DeleteParams::default()).await.unwrap();
            }
        }
    }

    fn api_of(&self, client: &Client, kind: &Value) -> Api<DynamicObject> {
        let kind = kind.as_str().unwrap();
        let (group, plural) = match kind {
            "Service" => ("", "services"),
            "Node" => ("", "nodes"),
            "EndpointSlice" => ("discovery.k8s.io", "endpointslices"),
            other => panic!("no tests with {other}"),
        };
        let api_version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
        let resource = ApiResource {
            group: group.to_owned(),
            version: "v1".to_owned(),
            api_version,
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        };
        if kind == "Node" {
            Api::all_with(client.clone(), &resource)
        } else {
            Api::namespaced_with(client.clone(), &self.namespace, &resource)
        }
    }

    /// Removes what a real cluster would keep.
    pub(crate) async fn end(self) {
        if let Server::Real(client) = &self.api {
            for number in 1..=2 {
                let api = self.api_of(client, &json!("Node"));
                let _ = api.delete(&self.node(number), &DeleteParams::default()).await;
            }
            let namespaces: Api<Namespace> = Api::all(client.clone());
            namespaces.delete(&self.namespace, &DeleteParams::default()).await.unwrap();
        }
    }

    /// A Service of ours with these external addresses.
    pub(crate) fn service(&self, name: &str, external_ips: &[&str]) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": name,
                "labels": {"service.kubernetes.io/service-proxy-name": self.proxy_name},
            },
            "spec": {"clusterIP": "None", "externalIPs": external_ips, "ports": [{"port": 6000}]},
        })
    }

    /// A slice of a Service of ours, of the family of its endpoints.
    pub(crate) fn slice(&self, name: &str, service: &str, endpoints: &[Value]) -> Value {
        let is_v6 = endpoints.iter().any(|endpoint| endpoint["addresses"][0].as_str().unwrap().contains(':'));
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "labels": {
                    "service.kubernetes.io/service-proxy-name": self.proxy_name,
                    "kubernetes.io/service-name": service,
                },
            },
            "addressType": if is_v6 { "IPv6" } else { "IPv4" },
            "endpoints": endpoints,
            "ports": [],
        })
    }

    /// A ready endpoint on the Node of this number.
    pub(crate) fn endpoint(&self, address: &str, node: u32) -> Value {
        json!({
            "addresses": [address],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": self.node(node),
        })
    }

    /// A Node.
    pub(crate) fn node_object(&self, number: u32, address: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.node(number)},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        })
    }
}

async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// What a source does not see, and why, as it says.
#[derive(Debug, Default)]
pub(crate) struct Away(Mutex<BTreeMap<&'static str, String>>);

impl Away {
    pub(crate) fn get(&self) -> BTreeMap<&'static str, String> {
        self.0.lock().unwrap().clone()
    }
}

impl Onlooker for Away {
    fn connected(&self, resource: &'static str) {
        self.0.lock().unwrap().remove(resource);
    }

    fn failed(&self, resource: &'static str, _: &'static str, reason: &str) {
        self.0.lock().unwrap().insert(resource, reason.to_owned());
    }

    fn heard(&self, _: &'static str) {}

    fn relisted(&self, _: &'static str) {}

    fn turned(&self) {}
}

/// What a node sees through its source.
pub(crate) struct Observer {
    pub(crate) batches: mpsc::Receiver<Batch>,
    /// What is out of sight.
    pub(crate) away: Arc<Away>,
    pub(crate) catalog: Catalog,
    pub(crate) settings: Settings,
    /// What the source says is wrong.
    pub(crate) problems: Vec<Problem>,
    /// Everything that was ever said to be gone.
    pub(crate) deleted: Vec<ObjectId>,
    /// How many batches came.
    pub(crate) heard: usize,
}

impl Observer {
    pub(crate) async fn start(options: &Options, node: &str) -> Self {
        let server = source::server(options).await.unwrap();
        let away = Arc::new(Away::default());
        Self::of(source::spawn(&server, options, away.clone()).unwrap(), away, node)
    }

    /// Of any source.
    pub(crate) fn of(batches: mpsc::Receiver<Batch>, away: Arc<Away>, node: &str) -> Self {
        Self {
            batches,
            away,
            catalog: Catalog::default(),
            settings: Settings::new(NodeName::new(node)),
            problems: Vec::new(),
            deleted: Vec::new(),
            heard: 0,
        }
    }

    pub(crate) fn absorb(&mut self, batch: Batch) {
        self.heard += 1;
        if let Some(problems) = batch.problems {
            self.problems = problems;
        }
        if let Some(addresses) = batch.api_server {
            self.settings.api_server_addresses = addresses;
        }
        for event in batch.events {
            match event {
                Event::Apply(object) => {
                    self.catalog.apply(object);
                }
                Event::Delete(id) => {
                    self.catalog.delete(&id);
                    self.deleted.push(id);
                }
            }
        }
    }

    /// Takes what comes for a while.
    pub(crate) async fn watch_for(&mut self, duration: Duration) {
        let end = Instant::now() + duration;
        while let Ok(batch) =
            tokio::time::timeout(end.saturating_duration_since(Instant::now()), self.batches.recv()).await
        {
            self.absorb(batch.unwrap());
        }
    }

    /// Takes what comes until the catalog is as wanted. Returns whether that comes to pass.
    pub(crate) async fn comes_to(&mut self, wanted: impl Fn(&Catalog) -> bool) -> bool {
        // Counted, not measured: on a machine that stood still for a while, everybody's time is over at once, and who waits for
        // the others must not be the first to say so.
        const TICK: Duration = Duration::from_millis(100);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut left = PATIENCE.as_millis() / TICK.as_millis();
        while (self.heard == 0 || !wanted(&self.catalog)) && left > 0 {
            tokio::select! {
                batch = self.batches.recv() => self.absorb(batch.unwrap()),
                _ = ticks.tick() => left -= 1,
            }
        }
        left > 0
    }

    /// [`Self::comes_to`], which it must.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl Fn(&Catalog) -> bool) {
        let comes_to_pass = self.comes_to(wanted).await;
        assert!(comes_to_pass, "{what}: never comes to pass. {:?} {:#?}", self.away, self.catalog);
    }

    /// Takes what comes until the node should have what is wanted.
    pub(crate) async fn until_desired(&mut self, what: &str, wanted: impl Fn(&Desired) -> bool) {
        let settings = self.settings.clone();
        self.until(what, |catalog| wanted(&compute(catalog, &settings).0)).await;
    }
}

/// What a node should have of a Service in a family: its external addresses, each with the pods behind it.
pub(crate) fn paths(desired: &Desired, name: &ObjectName) -> BTreeMap<String, Vec<String>> {
    let services = Family::ALL.into_iter().filter_map(|family| {
        desired.services.get(&ServiceKey { service: name.clone(), family }).map(|service| &**service)
    });
    let texts = |addresses: &std::collections::BTreeSet<std::net::IpAddr>| {
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    services
        .flat_map(|DesiredService { externals, pods, .. }| {
            texts(externals).into_iter().map(move |external| (external, texts(pods)))
        })
        .collect()
}

/// [`paths`] in few words.
pub(crate) fn as_paths<const N: usize>(paths: [(&str, &[&str]); N]) -> BTreeMap<String, Vec<String>> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    paths.into_iter().map(|(external, pods)| (external.to_owned(), owned(pods))).collect()
}
