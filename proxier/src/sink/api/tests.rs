//! The sink as its clients see it: the generated client, on real sockets.

use std::{collections::BTreeMap, mem};

use prost::{Message as _, bytes::Bytes};
use proxier_localv1::{self as localv1, OpItem, Path, Set, WatchReq, op_item::Op, sets_client::SetsClient};
use tokio::{
    sync::mpsc,
    time::{Duration, Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint as Server},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;
use crate::{
    desired::{Settings, State},
    model::{
        Endpoint, NodeName, Object, ObjectId, TrafficPolicy,
        testing::{mk_endpoint, mk_name, mk_service, mk_slice},
    },
    observe::observed::Observed,
};

mod crowd;
mod recording;
mod strangers;
mod tls;

/// Longer than anything takes that is to happen.
const PATIENCE: Duration = Duration::from_secs(30);
/// As long as it is looked whether something happens that is not to.
const MOMENT: Duration = Duration::from_millis(200);

/// The sink, and the objects behind it.
struct World {
    state: State,
    observed: Observed,
    sink: ApiSink,
    /// Whether the sink has been shown anything.
    shown: bool,
}

impl World {
    fn new() -> Self {
        Self::at(&"tcp://127.0.0.1:0".parse().unwrap(), None)
    }

    fn at(address: &ListenAddress, tls: Option<Identity>) -> Self {
        let node = NodeName::new("controller");
        let observed = Observed::new(&node, "file", None);
        let metrics = Arc::clone(&observed.metrics);
        let sink = ApiSink::start(address, tls, Taken::Fails, Carried::none(), None, metrics).unwrap();
        Self { state: State::new(Settings::new(node)), observed, sink, shown: false }
    }

    fn put(&mut self, objects: impl IntoIterator<Item = Object>) {
        for object in objects {
            self.state.apply(object);
        }
        self.show();
    }

    fn delete(&mut self, names: impl IntoIterator<Item = ObjectId>) {
        for name in names {
            self.state.delete(&name);
        }
        self.show();
    }

    fn show(&mut self) {
        let changed = self.state.refresh();
        let (scope, touched) = if mem::replace(&mut self.shown, true) {
            (Scope::Only(changed.services), Scope::Only(changed.touched))
        } else {
            (Scope::All, Scope::All)
        };
        let (catalog, desired) = (self.state.catalog(), self.state.desired());
        self.sink.apply(Snapshot { catalog, desired, scope: &scope, touched: &touched }).unwrap();
    }

    fn server(&self) -> Server {
        let ListenAddress::Tcp(address) = self.sink.bound() else { panic!("{:?}", self.sink.bound()) };
        Server::try_from(format!("http://{address}")).unwrap().tcp_nodelay(true)
    }

    fn channel(&self) -> Channel {
        self.server().connect_lazy()
    }

    async fn watch(&self, node: &str) -> Watch {
        Watch::open(self.channel(), node).await.unwrap()
    }

    async fn health(&self, service: &str) -> ServingStatus {
        let request = HealthCheckRequest { service: service.to_owned() };
        HealthClient::new(self.channel()).check(request).await.unwrap().into_inner().status()
    }

    fn metric(&self, name: &str) -> i64 {
        let text = self.observed.metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    async fn until_metric(&self, name: &str, value: i64) {
        until(&format!("{name} is {value}"), || self.metric(name) == value).await;
    }
}

/// Waits until something holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not yet: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A client that takes over what it is told, and holds every step against what a client may rely on.
struct Watch {
    requests: Option<mpsc::Sender<WatchReq>>,
    steps: Streaming<OpItem>,
    request: WatchReq,
    values: BTreeMap<String, Bytes>,
    is_first: bool,
    /// Whether values go and come back as they were, which who has not asked meanwhile is told as if they were new.
    values_come_back: bool,
}

impl Watch {
    async fn open(channel: Channel, node: &str) -> Result<Self, Status> {
        Self::open_as(channel, WatchReq { node_name: node.to_owned(), draining: false }).await
    }

    async fn open_as(channel: Channel, request: WatchReq) -> Result<Self, Status> {
        let (requests, stream) = mpsc::channel(128);
        let mut client = SetsClient::new(channel);
        let opened = client.watch(ReceiverStream::new(stream));
        let steps = timeout(PATIENCE, opened).await.expect("no answer")?.into_inner();
        Ok(Self {
            requests: Some(requests),
            steps,
            request,
            values: BTreeMap::new(),
            is_first: true,
            values_come_back: false,
        })
    }

    async fn ask(&self) {
        self.send(self.request.clone()).await;
    }

    async fn send(&self, request: WatchReq) {
        self.requests.as_ref().unwrap().send(request).await.unwrap();
    }

    /// The next step; none if the stream has ended.
    async fn step(&mut self) -> Result<Option<Op>, Status> {
        let item = timeout(PATIENCE, self.steps.message()).await.expect("nothing comes")?;
        Ok(item.map(|item| item.op.expect("a step is something")))
    }

    /// The next batch, each step a word.
    async fn batch(&mut self) -> Result<Vec<String>, Status> {
        let mut words = Vec::new();
        loop {
            let Some(op) = self.step().await? else {
                panic!("the stream has ended after {words:?}");
            };
            let is_first_step = mem::replace(&mut self.is_first, false);
            assert_eq!(
                matches!(op, Op::Reset(_)),
                is_first_step,
                "Reset is the first step of a stream, no other"
            );
            match op {
                Op::Reset(_) => words.push("reset".to_owned()),
                Op::Set(value) => words.push(format!("set {}", self.set(value))),
                Op::Delete(place) => words.push(format!("delete {}", self.delete(&place))),
                Op::Sync(_) => {
                    words.push("sync".to_owned());
                    return Ok(words);
                }
            }
        }
    }

    fn set(&mut self, value: localv1::Value) -> String {
        let place = value.r#ref.unwrap();
        let Path { namespace, name, key } = Path::parse(&place.path).unwrap();
        match key {
            None => {
                assert_eq!(place.set(), Set::ServicesSet);
                localv1::Service::decode(value.bytes.clone()).unwrap();
            }
            Some(_) => {
                assert_eq!(place.set(), Set::EndpointsSet);
                localv1::Endpoint::decode(value.bytes.clone()).unwrap();
                let service = localv1::service_path(namespace, name);
                assert!(self.values.contains_key(&service), "{} comes before its Service", place.path);
            }
        }
        let former = self.values.insert(place.path.clone(), value.bytes.clone());
        let is_news = self.values_come_back || former.as_ref() != Some(&value.bytes);
        assert!(is_news, "{} comes again as it was", place.path);
        place.path
    }

    fn delete(&mut self, place: &localv1::Ref) -> String {
        assert!(self.values.remove(&place.path).is_some(), "{} goes, but has never come", place.path);
        let within = format!("{}/", place.path);
        assert!(!self.values.keys().any(|path| path.starts_with(&within)), "{} is outlived", place.path);
        place.path.clone()
    }

    async fn next(&mut self) -> Vec<String> {
        self.ask().await;
        self.batch().await.unwrap()
    }

    async fn refused(&mut self) -> Status {
        self.batch().await.unwrap_err()
    }

    /// Whether nothing comes for a while. A step that comes is lost.
    async fn is_quiet(&mut self) -> bool {
        timeout(MOMENT, self.steps.message()).await.is_err()
    }

    fn service(&self, name: &str) -> localv1::Service {
        localv1::Service::decode(self.values[&format!("default/{name}")].clone()).unwrap()
    }

    fn endpoint(&self, key: &str) -> localv1::Endpoint {
        localv1::Endpoint::decode(self.values[&format!("default/{key}")].clone()).unwrap()
    }
}

fn pod(name: &str, address: &str, node: &str) -> Endpoint {
    Endpoint { target: Some(mk_name(name)), ..mk_endpoint(address, node) }
}

fn web() -> Object {
    mk_service("web", ["10.0.0.55"]).into()
}

fn pods_of_web(pods: impl IntoIterator<Item = Endpoint>) -> Object {
    mk_slice("web-1", "web", pods).into()
}

fn service_id(name: &str) -> ObjectId {
    ObjectId::Service(mk_name(name))
}

fn slice_id(name: &str) -> ObjectId {
    ObjectId::EndpointSlice(mk_name(name))
}

#[tokio::test]
async fn nobody_is_answered_before_there_is_a_whole_state() {
    let mut world = World::new();
    let mut watch = world.watch("node1").await;
    watch.ask().await;
    assert!(watch.is_quiet().await);
    world.put([web(), pods_of_web([pod("a", "11.0.1.1", "node1")])]);
    assert_eq!(watch.batch().await.unwrap(), ["reset", "set default/web", "set default/web/a.v4", "sync"]);
}

#[tokio::test]
async fn that_there_is_nothing_is_told_as_well() {
    let mut world = World::new();
    world.show();
    assert_eq!(world.watch("node1").await.next().await, ["reset", "sync"]);
}

#[tokio::test]
async fn a_client_is_told_what_has_changed_and_nothing_else() {
    let mut world = World::new();
    let pods = |second| pods_of_web([pod("a", "11.0.1.1", "node1"), pod("b", second, "node2")]);
    world.put([web(), pods("11.0.2.1"), mk_service("mail", ["10.0.0.56"]).into()]);
    let mut watch = world.watch("node1").await;
    watch.next().await;
    watch.ask().await;
    world.put([pods("11.0.2.1")]);
    assert!(watch.is_quiet().await, "as it was");
    world.put([pods("11.0.2.2")]);
    assert_eq!(watch.batch().await.unwrap(), ["set default/web/b.v4", "sync"]);
    assert_eq!(watch.endpoint("web/b.v4").ips.unwrap().v4, ["11.0.2.2"]);

    world.put([mk_service("mail", ["10.0.0.57"]).into()]);
    assert_eq!(watch.next().await, ["set default/mail", "sync"]);
    world.put([pods_of_web([pod("b", "11.0.2.2", "node2")])]);
    assert_eq!(watch.next().await, ["delete default/web/a.v4", "sync"]);
}

#[tokio::test]
async fn each_client_is_told_what_is_local_to_its_node_and_whose_traffic_a_pod_takes() {
    let mut world = World::new();
    let mut web = mk_service("web", ["10.0.0.55"]);
    web.external_traffic_policy = TrafficPolicy::Local;
    world.put([web.into(), pods_of_web([pod("a", "11.0.1.1", "node1"), pod("b", "11.0.2.1", "node2")])]);
    let everything = ["reset", "set default/web", "set default/web/a.v4", "set default/web/b.v4", "sync"];
    for (node, own, other) in [("node1", "web/a.v4", "web/b.v4"), ("node2", "web/b.v4", "web/a.v4")] {
        let mut watch = world.watch(node).await;
        assert_eq!(watch.next().await, everything);
        let scopes = |internal, external| Some(localv1::EndpointScopes { internal, external });
        let told = |key| {
            let endpoint = watch.endpoint(key);
            (endpoint.local, endpoint.scopes)
        };
        assert_eq!(told(own), (true, scopes(true, true)), "{node}");
        assert_eq!(told(other), (false, scopes(true, false)), "{node}");
    }
}

#[tokio::test]
async fn the_last_service_goes_for_those_who_are_connected_and_for_those_who_are_away() {
    let mut world = World::new();
    world.put([web(), pods_of_web([pod("a", "11.0.1.1", "node1")])]);
    let mut connected = world.watch("node1").await;
    connected.next().await;
    connected.ask().await;
    let mut busy = world.watch("node1").await;
    busy.next().await;
    let mut away = world.watch("node1").await;
    away.next().await;
    drop(away);

    // `Watch` sees to it that nothing outlives its Service.
    world.delete([service_id("web")]);
    let gone = ["delete default/web/a.v4", "delete default/web", "sync"];
    assert_eq!(connected.batch().await.unwrap(), gone);
    assert_eq!(busy.next().await, gone);
    assert_eq!(world.watch("node1").await.next().await, ["reset", "sync"]);
}

#[tokio::test]
async fn deletes_come_last_and_a_services_pods_go_before_it() {
    let mut world = World::new();
    let names = ["a", "b", "c"];
    for name in names {
        let pods = ["1", "2"].map(|n| pod(&format!("{name}{n}"), &format!("11.0.1.{n}"), "node1"));
        let slice = mk_slice(&format!("{name}-1"), name, pods);
        world.put([mk_service(name, []).into(), slice.into()]);
    }
    let mut watch = world.watch("node1").await;
    watch.next().await;
    let slice = mk_slice("b-1", "b", [pod("b2", "11.0.1.2", "node1"), pod("b3", "11.0.1.3", "node1")]);
    world.state.apply(slice.into());
    world.state.apply(mk_service("d", []).into());
    world.delete([service_id("a"), slice_id("a-1"), service_id("c")]);
    let steps = [
        "set default/d",
        "set default/b/b3.v4",
        "delete default/a/a1.v4",
        "delete default/a/a2.v4",
        "delete default/b/b1.v4",
        "delete default/c/c1.v4",
        "delete default/c/c2.v4",
        "delete default/a",
        "delete default/c",
        "sync",
    ];
    assert_eq!(watch.next().await, steps);
}

#[tokio::test]
async fn a_client_that_comes_back_is_told_everything_and_nothing_of_what_has_gone() {
    let mut world = World::new();
    world.put([web(), mk_service("mail", ["10.0.0.56"]).into()]);
    // One channel: the connection stays, the stream is another one.
    let channel = world.channel();
    let mut watch = Watch::open(channel.clone(), "node1").await.unwrap();
    watch.next().await;
    drop(watch);
    world.delete([service_id("mail")]);
    let mut watch = Watch::open(channel, "node1").await.unwrap();
    assert_eq!(watch.next().await, ["reset", "set default/web", "sync"]);
}

#[tokio::test]
async fn what_happens_between_two_requests_is_one_batch_with_each_value_once() {
    let mut world = World::new();
    world.put([web()]);
    let mut watch = world.watch("node1").await;
    watch.next().await;
    for n in 1..=50 {
        world.put([
            mk_service("web", [&*format!("10.0.1.{n}")]).into(),
            pods_of_web([pod("a", &format!("11.0.1.{n}"), "node1")]),
            mk_service(&format!("passing-{n}"), []).into(),
        ]);
        world.delete([service_id(&format!("passing-{n}"))]);
    }
    assert_eq!(watch.next().await, ["set default/web", "set default/web/a.v4", "sync"]);
    assert_eq!(watch.service("web").ips.unwrap().external_ips.unwrap().v4, ["10.0.1.50"]);
    assert_eq!(watch.endpoint("web/a.v4").ips.unwrap().v4, ["11.0.1.50"]);
    assert_eq!(world.metric("proxier_api_batches_total"), 2);
}

#[tokio::test]
async fn pods_that_drain_are_told_to_who_asks_for_them() {
    let mut world = World::new();
    world.put([web(), pods_of_web([pod("a", "11.0.1.1", "node1"), pod("b", "11.0.1.2", "node1")])]);
    let mut plain = world.watch("node1").await;
    plain.next().await;
    let request = WatchReq { node_name: "node1".to_owned(), draining: true };
    let mut draining = Watch::open_as(world.channel(), request).await.unwrap();
    draining.next().await;
    assert!(!draining.endpoint("web/a.v4").draining);

    let ends = Endpoint { ready: false, terminating: true, ..pod("a", "11.0.1.1", "node1") };
    world.put([pods_of_web([ends, pod("b", "11.0.1.2", "node1")])]);
    assert_eq!(plain.next().await, ["delete default/web/a.v4", "sync"]);
    assert_eq!(draining.next().await, ["set default/web/a.v4", "sync"]);
    assert!(draining.endpoint("web/a.v4").draining);
}

#[tokio::test]
async fn a_pod_that_two_slices_put_on_two_nodes_is_where_it_takes_conversations() {
    let mut world = World::new();
    let ends = Endpoint { ready: false, terminating: true, ..pod("web-0", "11.0.1.1", "node1") };
    let other = pod("web-1", "11.0.1.2", "node1");
    world.put([web(), pods_of_web([ends, other])]);
    let mut watch = world.watch("node1").await;
    watch.next().await;
    let next = |address| mk_slice("web-2", "web", [pod("web-0", address, "node2")]);
    world.put([next("11.0.2.1").into()]);
    watch.next().await;
    let endpoint = watch.endpoint("web/web-0.v4");
    assert_eq!((endpoint.local, endpoint.ips.unwrap().v4), (false, vec!["11.0.2.1".to_owned()]));

    // Both say that it does: whichever is told, it is told as it is.
    world.put([pods_of_web([pod("web-0", "11.0.1.1", "node1")])]);
    watch.next().await;
    let endpoint = watch.endpoint("web/web-0.v4");
    assert_eq!((endpoint.local, endpoint.ips.unwrap().v4), (true, vec!["11.0.1.1".to_owned()]));
}

#[tokio::test]
async fn pods_of_one_name_in_two_namespaces_are_two_and_stay_as_they_are() {
    let mut world = World::new();
    let elsewhere =
        Endpoint { target: Some(ObjectName::new("guests", "a")), ..mk_endpoint("11.0.1.2", "node1") };
    world.put([web(), pods_of_web([pod("a", "11.0.1.1", "node1"), elsewhere.clone()])]);
    let mut watch = world.watch("node1").await;
    let steps = ["reset", "set default/web", "set default/web/a.v4", "set default/web/guests:a.v4", "sync"];
    assert_eq!(watch.next().await, steps);
    let third = pod("b", "11.0.1.3", "node1");
    world.put([pods_of_web([pod("a", "11.0.1.1", "node1"), elsewhere, third])]);
    assert_eq!(watch.next().await, ["set default/web/b.v4", "sync"]);
}

#[tokio::test]
async fn a_pod_without_name_goes_by_its_addresses_and_one_without_addresses_is_none() {
    let mut world = World::new();
    let nameless = mk_endpoint("11.0.1.1", "node1");
    let nothing = Endpoint { addresses: [].into_iter().collect(), ..nameless.clone() };
    let named = Endpoint { target: Some(mk_name("a")), ..nothing.clone() };
    world.put([web(), pods_of_web([nameless, nothing, named])]);
    let steps = ["reset", "set default/web", "set default/web/11.0.1.1", "sync"];
    assert_eq!(world.watch("node1").await.next().await, steps);
}

#[tokio::test]
async fn a_stream_is_for_one_node() {
    let mut world = World::new();
    world.put([web()]);
    for request in [
        WatchReq { node_name: "node2".to_owned(), draining: false },
        WatchReq { node_name: "node1".to_owned(), draining: true },
    ] {
        let mut watch = world.watch("node1").await;
        watch.next().await;
        watch.send(request).await;
        let status = watch.refused().await;
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("open another"), "{status}");
    }
}

#[tokio::test]
async fn a_name_that_no_node_has_and_a_request_that_is_too_large_are_refused() {
    let mut world = World::new();
    world.put([web()]);
    for (length, code, word) in [
        (254, Code::InvalidArgument, "NodeName has 254 bytes"),
        (4093, Code::InvalidArgument, "NodeName has 4093 bytes"),
        // With its tag and its length.
        (4094, Code::OutOfRange, "4097 bytes"),
        (1 << 20, Code::OutOfRange, "1048580 bytes"),
    ] {
        let mut watch = world.watch(&"n".repeat(length)).await;
        watch.ask().await;
        let status = watch.refused().await;
        assert_eq!(status.code(), code, "{length}: {status}");
        assert!(status.message().contains(word), "{length}: {status}");
    }
    assert_eq!(world.watch(&"n".repeat(253)).await.next().await, ["reset", "set default/web", "sync"]);
}

#[tokio::test]
async fn a_hundred_requests_at_once_are_answered_one_after_the_other() {
    let mut world = World::new();
    world.put([web()]);
    let mut watch = world.watch("node1").await;
    for _ in 0..100 {
        watch.ask().await;
    }
    assert_eq!(watch.batch().await.unwrap(), ["reset", "set default/web", "sync"]);
    assert!(watch.is_quiet().await, "nothing is told twice");
    for n in 1..100 {
        world.put([mk_service("web", [&*format!("10.0.1.{n}")]).into()]);
        assert_eq!(watch.batch().await.unwrap(), ["set default/web", "sync"], "{n}");
    }
    world.put([mk_service("web", []).into()]);
    assert!(watch.is_quiet().await, "nobody has asked");
    assert_eq!(watch.next().await, ["set default/web", "sync"]);
}

#[tokio::test]
async fn who_asks_for_nothing_more_gets_what_it_has_asked_for() {
    let mut world = World::new();
    world.put([web()]);
    let mut watch = world.watch("node1").await;
    watch.ask().await;
    watch.ask().await;
    watch.requests = None;
    assert_eq!(watch.batch().await.unwrap(), ["reset", "set default/web", "sync"]);
    world.put([mk_service("web", []).into()]);
    assert_eq!(watch.batch().await.unwrap(), ["set default/web", "sync"]);
    assert_eq!(watch.step().await.unwrap(), None);
    world.until_metric("proxier_api_clients", 0).await;

    let mut silent = world.watch("node1").await;
    silent.requests = None;
    assert_eq!(silent.step().await.unwrap(), None, "who has never asked gets nothing");
}

#[tokio::test]
async fn health_says_whether_there_is_something_to_serve() {
    let mut world = World::new();
    assert_eq!(world.health("localv1.Sets").await, ServingStatus::NotServing);
    assert_eq!(world.health("").await, ServingStatus::Serving, "the server itself is there");
    world.show();
    let start = Instant::now();
    while world.health("localv1.Sets").await != ServingStatus::Serving {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn reflection_of_either_version_names_the_service_and_describes_it() {
    let world = World::new();
    macro_rules! reflected {
        ($version:ident) => {{
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            let ask =
                |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
            let requests = tokio_stream::iter([
                ask(MessageRequest::ListServices(String::new())),
                ask(MessageRequest::FileContainingSymbol("localv1.Sets".to_owned())),
            ]);
            let mut client = ServerReflectionClient::new(world.channel());
            let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
            let listed = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::ListServicesResponse(listed) = listed else { panic!("{listed:?}") };
            let names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
            assert!(names.contains(&"localv1.Sets".to_owned()), "{names:?}");
            let described = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::FileDescriptorResponse(files) = described else { panic!("{described:?}") };
            assert_eq!(files.file_descriptor_proto.len(), 1);
        }};
    }
    reflected!(v1);
    reflected!(v1alpha);
}

#[tokio::test]
async fn clients_are_counted_while_they_are_there_and_so_is_what_they_are_told() {
    let mut world = World::new();
    world.put([web(), pods_of_web([pod("a", "11.0.1.1", "node1")])]);
    let mut watches = Vec::new();
    for _ in 0..3 {
        let mut watch = world.watch("node1").await;
        watch.next().await;
        watches.push(watch);
    }
    world.until_metric("proxier_api_clients", 3).await;
    world.until_metric("proxier_api_batches_total", 3).await;
    assert_eq!(world.metric(r#"proxier_api_steps_total{op="set"}"#), 6);
    // One waits for a change, one has yet to ask.
    watches[0].ask().await;
    watches.truncate(2);
    world.until_metric("proxier_api_clients", 2).await;
    drop(watches);
    world.until_metric("proxier_api_clients", 0).await;
    world.delete([service_id("web")]);
    assert_eq!(world.metric("proxier_api_batches_total"), 3, "nobody is there");
}

#[tokio::test]
async fn clients_are_told_when_the_sink_goes() {
    let mut world = World::new();
    world.put([web()]);
    let mut waits = world.watch("node1").await;
    waits.next().await;
    waits.ask().await;
    let mut asks_later = world.watch("node1").await;
    asks_later.next().await;
    let World { sink, .. } = world;
    drop(sink);
    assert_eq!(waits.refused().await.code(), Code::Unavailable);
    asks_later.ask().await;
    assert_eq!(asks_later.refused().await.code(), Code::Unavailable);
}

#[tokio::test]
async fn a_unix_socket_serves_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxier/api.sock");
    let mut world = World::at(&ListenAddress::Unix(path.clone()), None);
    world.put([web()]);
    let server = Server::try_from(format!("unix://{}", path.display())).unwrap();
    let mut watch = Watch::open(server.connect_lazy(), "node1").await.unwrap();
    assert_eq!(watch.next().await, ["reset", "set default/web", "sync"]);
    world.delete([service_id("web")]);
    assert_eq!(watch.next().await, ["delete default/web", "sync"]);
}

/// A sink that never can.
#[derive(Debug)]
struct Unable;

impl Sink for Unable {
    fn apply(&mut self, _snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        anyhow::bail!("no room")
    }
}

#[tokio::test]
async fn what_this_node_cannot_have_is_served_all_the_same_and_a_server_that_has_ended_is_reported() {
    let World { mut state, sink, observed: _observed, .. } = World::new();
    let ListenAddress::Tcp(address) = *sink.bound() else { panic!("{sink:?}") };
    let mut both = WithApi { sink: Unable, api: sink };
    state.apply(web());
    state.refresh();
    let (catalog, desired) = (state.catalog(), state.desired());
    let snapshot = Snapshot { catalog, desired, scope: &Scope::All, touched: &Scope::All };
    assert_eq!(both.apply(snapshot).unwrap_err().to_string(), "no room");
    let channel = Server::try_from(format!("http://{address}")).unwrap().connect_lazy();
    let mut watch = Watch::open(channel, "node1").await.unwrap();
    assert_eq!(watch.next().await, ["reset", "set default/web", "sync"]);

    both.tick().unwrap();
    both.api.server.abort();
    until("the server has ended", || both.api.server.is_finished()).await;
    let error = both.tick().unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn an_address_that_somebody_has_is_waited_for_where_something_else_is_served_beside() {
    let metrics = || Arc::clone(&Observed::new(&NodeName::new("node1"), "file", None).metrics);
    let former = World::new();
    let address = former.sink.bound().clone();
    ApiSink::serve(&address, None, Taken::Fails, Carried::none(), None, metrics()).unwrap_err();
    let mut waits = ApiSink::serve(&address, None, Taken::Waits, Carried::none(), None, metrics()).unwrap();
    assert_eq!(waits.bound(), &address);
    waits.tick().unwrap();
    assert_eq!(former.health("").await, ServingStatus::Serving, "the former one is as it was");
}
