//! The same objects mean the same, whether an API server or manifests have them: random clusters are put into the double, written
//! as it gives them back into a directory, and followed by both sources through changes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[allow(dead_code, reason = "each test program uses its part")]
mod cluster;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::{option, prelude::*, sample::select};
use proxier::{
    catalog::Catalog,
    desired::{NoBackend, Settings, compute},
    model::{NodeName, ObjectName, Place, Problem, ProblemKind},
    source::{
        directory::Directory,
        file,
        kube::{Options, Timing},
    },
};
use proxier_tests::apiserver::ApiServer;
use serde_json::{Map, Value, json};

use crate::cluster::{Away, Observer, TIMING};

const PROXY_NAME: &str = "proxier";
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Nothing here takes as long; this only keeps a test that would wait for ever from doing so.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the API server shows an object to the kube source. With [`comparable`], all differences that are meant:
///
/// * A slice without the Service's label is not selected. Its controller gives every slice the labels of its Service, so there is
///   none of our Services, and watching all slices of a cluster on every node would cost far more. People who write manifests name
///   the Service and no more: the file source takes such a slice.
/// * A Service without the label is not selected. The file source leaves it out as well, and says so, since whoever wrote it
///   into that directory may wonder.
/// * A Service whose name is longer than the API server allows is refused before anybody looks at its label: no API server has
///   such a one, so here they all have the label.
fn is_selected(object: &Value) -> bool {
    object["kind"] == "Node" || object["metadata"]["labels"][PROXY_NAME_LABEL] == PROXY_NAME
}

/// What is wrong, as far as both sources can say it: not where it stands in a file, nor what is there and left to others.
fn comparable(problems: &[Problem]) -> BTreeSet<Problem> {
    let problems = problems.iter().filter(|problem| problem.kind != ProblemKind::Ignored);
    problems.map(|problem| Problem { place: None::<Place>, ..problem.clone() }).collect()
}

/// External addresses, of both families: free ones, such as nobody may have, such as the cluster has itself, and such as are none.
const EXTERNALS: [&str; 20] = [
    "203.0.113.1",
    "203.0.113.2",
    "2001:db8::1",
    "2001:db8::2",
    "10.0.0.55",
    "127.0.0.1",
    "::1",
    "224.0.0.1",
    "ff02::1",
    "169.254.1.1",
    "fe80::1",
    "0.0.0.0",
    "255.255.255.255",
    "::ffff:203.0.113.9",
    "192.168.77.1",
    "10.244.1.2",
    "010.0.0.1",
    "203.0.113.1/32",
    "example.com",
    "",
];
const PODS: [&str; 9] = [
    "10.244.1.2",
    "10.244.1.3",
    "10.244.2.2",
    "fd00:244::2",
    "fd00:244::3",
    "127.0.0.1",
    "::ffff:10.244.1.9",
    "pod.example.com",
    "",
];
const NODES: [&str; 3] = ["node1", "node2", "node3"];

fn metadata(
    names: &'static [&'static str],
    label: impl Strategy<Value = Option<&'static str>>,
) -> impl Strategy<Value = Value> {
    let created = select(vec![None, Some("2026-01-01T00:00:00Z"), Some("2026-01-02T00:00:00Z")]);
    (select(vec!["a", "b"]), select(names), label, created).prop_map(|(namespace, name, label, created)| {
        let labels: Map<String, Value> =
            label.iter().map(|label| (PROXY_NAME_LABEL.to_owned(), json!(label))).collect();
        let mut metadata = json!({"namespace": namespace, "name": name, "labels": labels});
        if let Some(created) = created {
            metadata["creationTimestamp"] = json!(created);
        }
        metadata
    })
}

fn label() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![8 => Just(Some(PROXY_NAME)), 1 => Just(Some("other")), 1 => Just(None)]
}

/// An object of those fields that are not null.
fn fields<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(fields.map(|(name, value)| (name.to_owned(), value)).collect())
}

fn any_of(values: &'static [&'static str]) -> impl Strategy<Value = Value> {
    option::of(select(values)).prop_map(|value| value.map_or(Value::Null, Value::from))
}

fn list(element: impl Strategy<Value = Value>, most: usize) -> impl Strategy<Value = Value> {
    option::weighted(0.8, prop::collection::vec(element, 0..=most))
        .prop_map(|list| list.map_or(Value::Null, Value::from))
}

fn port() -> impl Strategy<Value = Value> {
    let number = select(vec![0_i32, 80, 5060, 65_535, 70_000, -1]);
    let target = prop_oneof![Just(Value::Null), Just(json!(8080)), Just(json!("sip")), Just(json!(99_999))];
    (number, any_of(&["TCP", "UDP", "SCTP", "GRE"]), any_of(&["a", "b"]), target).prop_map(
        |(port, protocol, name, target)| {
            fields([("port", json!(port)), ("protocol", protocol), ("name", name), ("targetPort", target)])
        },
    )
}

fn ingress() -> impl Strategy<Value = Value> {
    let ip = option::of(select(&EXTERNALS[..])).prop_map(|ip| ip.map_or(Value::Null, Value::from));
    (ip, any_of(&["VIP", "Proxy", "Sideways"]), any_of(&["lb.example.com"]))
        .prop_map(|(ip, mode, host)| fields([("ip", ip), ("ipMode", mode), ("hostname", host)]))
}

fn affinity() -> impl Strategy<Value = (Value, Value)> {
    let timeout = select(vec![None, Some(0_i32), Some(60), Some(86_400), Some(86_401), Some(-1)]);
    (any_of(&["None", "ClientIP", "Cookie"]), timeout).prop_map(|(affinity, timeout)| {
        (affinity, timeout.map_or(Value::Null, |seconds| json!({"clientIP": {"timeoutSeconds": seconds}})))
    })
}

fn service() -> impl Strategy<Value = Value> {
    const TOO_LONG: &str = "s01234567890123456789012345678901234567890123456789012345678901234567890";
    const NAMES: &[&str] = &["s0", "s1", "s2", "s3", TOO_LONG];
    const RANGES: &[&str] =
        &["198.51.100.0/24", " 192.0.2.1/8 ", "2001:db8:1::/48", "::ffff:10.0.0.0/104", "all"];
    let cluster_ip = any_of(&["None", "10.96.0.7", "fd00:96::7", "nonsense"]);
    let kind = any_of(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "Sideways"]);
    let annotations =
        (any_of(&["client", "flow", "round-robin"]), any_of(&["{}"])).prop_map(|(balance, last)| {
            fields([
                ("proxier.io/balance", balance),
                ("kubectl.kubernetes.io/last-applied-configuration", last),
            ])
        });
    let policies = (any_of(&["Cluster", "Local", "Global"]), any_of(&["Local", "Sometimes"]));
    let bools = (option::of(any::<bool>()), option::of(select(vec![0_i32, 30_000, 70_000])));
    let lists = (
        list(select(&EXTERNALS[..]).prop_map(Value::from), 4),
        list(ingress(), 3),
        list(select(RANGES).prop_map(Value::from), 3),
        list(port(), 3),
    );
    (metadata(NAMES, label()), annotations, cluster_ip, kind, lists, affinity(), policies, bools).prop_map(
        |(mut metadata, annotations, cluster_ip, kind, lists, affinity, policies, (publish, health))| {
            metadata["annotations"] = annotations;
            if metadata["name"] == TOO_LONG {
                metadata["labels"] = json!({PROXY_NAME_LABEL: PROXY_NAME});
            }
            let (externals, ingress, ranges, ports) = lists;
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": metadata,
                "spec": fields([
                    ("clusterIP", cluster_ip),
                    ("type", kind),
                    ("externalIPs", externals),
                    ("loadBalancerSourceRanges", ranges),
                    ("ports", ports),
                    ("sessionAffinity", affinity.0),
                    ("sessionAffinityConfig", affinity.1),
                    ("externalTrafficPolicy", policies.0),
                    ("internalTrafficPolicy", policies.1),
                    ("publishNotReadyAddresses", publish.map_or(Value::Null, Value::from)),
                    ("healthCheckNodePort", health.map_or(Value::Null, Value::from)),
                    ("selector", json!({"app": "x"})),
                ]),
                "status": {"loadBalancer": fields([("ingress", ingress)])},
            })
        },
    )
}

fn endpoint() -> impl Strategy<Value = Value> {
    let condition = || select(vec![Value::Null, json!(true), json!(false)]);
    let conditions = (condition(), condition(), condition()).prop_map(|(ready, serving, terminating)| {
        fields([("ready", ready), ("serving", serving), ("terminating", terminating)])
    });
    // Nearly always one; the API allows a hundred.
    let addresses = prop::collection::vec(select(&PODS[..]), 1..=2);
    let target = prop_oneof![
        Just(Value::Null),
        Just(json!({"kind": "Pod", "name": "p", "namespace": "a"})),
        Just(json!({"kind": "Pod", "name": ""})),
    ];
    (addresses, option::of(conditions), any_of(&NODES), any_of(&["h", ""]), target).prop_map(
        |(addresses, conditions, node, hostname, target)| {
            fields([
                ("addresses", json!(addresses)),
                ("conditions", conditions.map_or(Value::Null, Value::from)),
                ("nodeName", node),
                ("hostname", hostname),
                ("targetRef", target),
            ])
        },
    )
}

fn slice() -> impl Strategy<Value = Value> {
    const NAMES: &[&str] = &["x0", "x1", "x2", "x3", "x4", "x5"];
    let family = prop_oneof![5 => Just("IPv4"), 5 => Just("IPv6"), 1 => Just("FQDN"), 1 => Just("IPX")];
    let ports = (any_of(&["TCP", "UDP", "GRE"]), select(vec![Value::Null, json!(80), json!(0)]))
        .prop_map(|(protocol, port)| fields([("protocol", protocol), ("port", port), ("name", json!("a"))]));
    let service = option::weighted(0.9, select(vec!["s0", "s1", "s2", "s3", ""]));
    let endpoints = prop::collection::vec(endpoint(), 0..4);
    (metadata(NAMES, label()), service, family, endpoints, list(ports, 2)).prop_map(
        |(mut metadata, service, family, endpoints, ports)| {
            if let Some(service) = service {
                metadata["labels"]["kubernetes.io/service-name"] = json!(service);
            }
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
                "addressType": family, "endpoints": endpoints, "ports": ports,
            })
        },
    )
}

fn node() -> impl Strategy<Value = Value> {
    const ADDRESSES: &[&str] = &["192.168.77.1", "192.168.77.2", "2001:db8::2", "host.example.com"];
    const CIDRS: &[&str] = &["10.244.1.0/24", "fd00:244::/64", "203.0.113.2/32", "10.244.1.0", "x"];
    let address = (select(vec!["InternalIP", "ExternalIP", "Hostname", "InternalDNS"]), select(ADDRESSES))
        .prop_map(|(kind, address)| json!({"type": kind, "address": address}));
    (select(&NODES[..]), list(address, 3), list(select(CIDRS).prop_map(Value::from), 2), any_of(CIDRS))
        .prop_map(|(name, addresses, cidrs, cidr)| {
            json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
                "spec": fields([("podCIDRs", cidrs), ("podCIDR", cidr)]),
                "status": fields([("addresses", addresses)]),
            })
        })
}

#[derive(Clone, Debug)]
enum Change {
    Apply(Value),
    /// That of the objects there are, if it is one.
    Delete(prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => service().prop_map(Change::Apply),
        4 => slice().prop_map(Change::Apply),
        1 => node().prop_map(Change::Apply),
        3 => any::<prop::sample::Index>().prop_map(Change::Delete),
    ]
}

fn settings(node: &str) -> Vec<Settings> {
    let plain = Settings::new(NodeName::new(node));
    let cidrs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    vec![
        Settings { no_backend: NoBackend::Pass, load_balancer_ips: false, ..plain.clone() },
        Settings {
            external_cidrs: ["203.0.113.0/24", "b=2001:db8::/64"].map(|text| text.parse().unwrap()).into(),
            max_externals_per_namespace: Some(2),
            ..plain.clone()
        },
        Settings {
            cluster_cidrs: cidrs(&["203.0.113.2/31", "10.0.0.0/8"]),
            external_ips: false,
            ..plain.clone()
        },
        plain,
    ]
}

/// What a directory with these objects says.
fn write_manifests(directory: &Path, objects: &[Value]) {
    let yaml = |object: &Value| serde_saphyr::to_string(object).unwrap();
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut listed = Vec::new();
    for object in objects {
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        let name = format!("{}-{}-{}", object["kind"].as_str().unwrap(), text("namespace"), text("name"));
        // By its name, so that it stays where it is.
        match name.bytes().map(u32::from).sum::<u32>() % 4 {
            0 => {
                files.insert(format!("{name}.yaml"), yaml(object));
            }
            1 => {
                files.insert(format!("{name}.json"), object.to_string());
            }
            2 => *files.entry("several.yml".to_owned()).or_default() += &format!("---\n{}", yaml(object)),
            _ => listed.push(object),
        }
    }
    files.insert(
        "list.json".to_owned(),
        json!({"apiVersion": "v1", "kind": "List", "items": listed}).to_string(),
    );
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if !files.contains_key(entry.file_name().to_str().unwrap()) {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
}

/// What comes after it has been seen by a watch that has seen this.
fn marks(round: u32) -> [Value; 3] {
    let labels = json!({PROXY_NAME_LABEL: PROXY_NAME, "kubernetes.io/service-name": "mark"});
    let metadata = json!({"namespace": "mark", "name": "mark", "labels": labels});
    let address = format!("10.9.9.{round}");
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"externalIPs": [address]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [],
        }),
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "mark"},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        }),
    ]
}

fn has_marks(catalog: &Catalog, round: u32) -> bool {
    let address: IpAddr = format!("10.9.9.{round}").parse().unwrap();
    let name = ObjectName::new("mark", "mark");
    let service = catalog.service(&name).is_some_and(|service| service.external_ips == [address]);
    let slice = catalog.slice(&name).is_some_and(|slice| *slice.endpoints[0].addresses == [address]);
    let node = catalog.node(&NodeName::new("mark")).is_some_and(|node| node.addresses == [address]);
    service && slice && node
}

/// What there is to read, without watching it.
fn read(directory: &Path) -> (Catalog, Vec<Problem>) {
    let mut directory = Directory::open(directory.to_owned(), Some(PROXY_NAME.to_owned())).unwrap();
    let (_batches, receiver) = tokio::sync::mpsc::channel(1);
    let mut reader = Observer::of(receiver, Arc::new(Away::default()), "nobody");
    reader.absorb(directory.read());
    (reader.catalog, reader.problems)
}

/// Both sources, and what they follow.
struct Pair {
    server: ApiServer,
    kube: Observer,
    files: Observer,
    work: tempfile::TempDir,
}

impl Pair {
    async fn start(changes: &[Change]) -> Self {
        let server = ApiServer::start().unwrap();
        let work = tempfile::tempdir().unwrap();
        let (kubeconfig, manifests) = (work.path().join("kubeconfig"), work.path().join("manifests"));
        server.write_kubeconfig(&kubeconfig).unwrap();
        fs::create_dir(&manifests).unwrap();
        make(&server, changes, 0);
        write_manifests(&manifests, &written(&server));
        let timing = Timing { ..TIMING };
        let options =
            Options { kubeconfig: Some(kubeconfig), page_size: 3, timing, ..Options::new(PROXY_NAME) };
        let away = Arc::new(Away::default());
        let directory = Directory::open(manifests, Some(PROXY_NAME.to_owned())).unwrap();
        let batches = file::spawn(directory, away.clone()).unwrap();
        let kube = Observer::start(&options, "node1").await;
        Self { server, kube, files: Observer::of(batches, away, "node1"), work }
    }

    fn change(&self, changes: &[Change], round: u32) {
        make(&self.server, changes, round);
        write_manifests(&self.work.path().join("manifests"), &written(&self.server));
    }

    /// Waits until both sources have told everything, and compares.
    async fn compare(&mut self, round: u32) {
        self.kube.until("the marks", |catalog| has_marks(catalog, round)).await;
        let wanted = read(&self.work.path().join("manifests"));
        let end = Instant::now() + PATIENCE;
        while (&self.files.catalog, comparable(&self.files.problems)) != (&wanted.0, comparable(&wanted.1)) {
            let rest = end.saturating_duration_since(Instant::now());
            let batch = tokio::time::timeout(rest, self.files.batches.recv()).await;
            self.files.absorb(batch.expect("the file source does not follow its directory").unwrap());
        }
        let (kube, files) = (&self.kube, &self.files);
        assert_eq!(kube.catalog, files.catalog);
        assert_eq!(comparable(&kube.problems), comparable(&files.problems));
        for settings in ["node1", "node2"].into_iter().flat_map(settings) {
            // Of the double on loopback, where no Service may have an address anyway.
            let api_server_addresses = kube.settings.api_server_addresses.clone();
            let of_kube = compute(&kube.catalog, &Settings { api_server_addresses, ..settings.clone() });
            let of_files = compute(&files.catalog, &settings);
            assert_eq!(of_kube.0, of_files.0, "{settings:?}");
            assert_eq!(comparable(&of_kube.1), comparable(&of_files.1), "{settings:?}");
        }
    }
}

fn make(server: &ApiServer, changes: &[Change], round: u32) {
    for change in changes {
        match change {
            Change::Apply(object) => {
                server.apply(object.clone()).unwrap();
            }
            Change::Delete(index) => {
                let objects = server.objects();
                if objects.is_empty() {
                    continue;
                }
                let object = index.get(&objects);
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (namespace, name) =
                    (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
                server.delete(&text(&object["kind"]), &namespace, &name).unwrap();
            }
        }
    }
    server.apply_all(&marks(round)).unwrap();
}

/// The objects that are written as manifests: all but slices that the API server would not show.
fn written(server: &ApiServer) -> Vec<Value> {
    let objects = server.objects().into_iter();
    objects.filter(|object| object["kind"] != "EndpointSlice" || is_selected(object)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn an_api_server_and_manifests_with_the_same_objects_mean_the_same(
        start in prop::collection::vec(change(), 4..16),
        rounds in prop::collection::vec(prop::collection::vec(change(), 1..6), 2),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut pair = Pair::start(&start).await;
            pair.compare(0).await;
            for (round, changes) in (1..).zip(&rounds) {
                pair.change(changes, round);
                pair.compare(round).await;
            }
        });
    }
}

/// The differences that are meant are there: else the filters above would hide others.
#[tokio::test]
async fn what_only_one_of_the_sources_sees_is_what_is_documented() {
    let object = |kind: &str, label: Value| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": "x", "labels": label}});
    assert!(is_selected(&object("Node", json!({}))));
    assert!(is_selected(&object("Service", json!({PROXY_NAME_LABEL: PROXY_NAME}))));
    let server = ApiServer::start().unwrap();
    let labels = json!({"kubernetes.io/service-name": "web"});
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "a", "name": "unlabelled", "labels": labels},
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.1.2"], "nodeName": "node1"}], "ports": [],
    });
    let bad_and_not_ours = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "a", "name": "left"},
        "spec": {"externalIPs": ["nonsense"]},
    });
    server.apply_all([&slice, &bad_and_not_ours].into_iter().chain(&marks(0))).unwrap();
    let work = tempfile::tempdir().unwrap();
    let kubeconfig = work.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig).unwrap();
    let options = Options { kubeconfig: Some(kubeconfig), timing: TIMING, ..Options::new(PROXY_NAME) };
    let mut kube = Observer::start(&options, "node1").await;
    kube.until("the marks", |catalog| has_marks(catalog, 0)).await;
    let manifests = work.path().join("manifests");
    fs::create_dir(&manifests).unwrap();
    write_manifests(&manifests, &server.objects());
    let (catalog, problems) = read(&manifests);

    let unlabelled = ObjectName::new("a", "unlabelled");
    assert!(kube.catalog.slice(&unlabelled).is_none() && catalog.slice(&unlabelled).is_some());
    let left = ObjectName::new("a", "left");
    assert!(kube.catalog.service(&left).is_none() && catalog.service(&left).is_none());
    assert_eq!(kube.problems, []);
    // Of a Service that is left to others no more is said than that.
    let kinds: Vec<_> = problems.iter().map(|problem| problem.kind).collect();
    assert_eq!(kinds, [ProblemKind::Ignored], "{problems:?}");
}
