//! Whatever an API server does: what the agent knows becomes what is true, nothing that is there is ever said to be gone, and a
//! server that is not well is not asked more often for it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use proxier::{
    catalog::Catalog,
    model::{NodeName, Object, ObjectId, ObjectName},
    source::{
        convert,
        kube::{Options, Timing},
    },
};
use proxier_tests::apiserver::{ApiServer, Fault, FutureWatch, Kind, Request, Resource, Step, Verb};
use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

#[allow(dead_code, reason = "each test program uses its part")]
mod cluster;

use crate::cluster::{Observer, PATIENCE, TIMING};

const PROXY_NAME: &str = "faults";
/// How many servers are driven at a time.
const AT_A_TIME: usize = 12;

/// A server with a few pages of objects, and who watches it.
struct Rig {
    server: Arc<ApiServer>,
    options: Options,
    _work: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let work = tempfile::tempdir().unwrap();
        let server = ApiServer::start().unwrap();
        server.set_bookmark_interval(Duration::from_millis(300));
        // Room for as many lost histories as a sequence has steps.
        server.skip_to(1_000_000).unwrap();
        let kubeconfig = work.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig).unwrap();
        for number in 0..10 {
            server.apply(service(number, 0)).unwrap();
            server.apply(slice(number, 0)).unwrap();
        }
        for number in 0..3 {
            server.apply(node(number)).unwrap();
        }
        let options = Options {
            kubeconfig: Some(kubeconfig),
            page_size: 4,
            timing: TIMING,
            ..Options::new(PROXY_NAME)
        };
        Self { server: Arc::new(server), options, _work: work }
    }

    async fn observe(&self) -> Observer {
        Observer::start(&self.options, "node1").await
    }

    /// Waits until what the observer knows is what there is.
    async fn converge(&self, observer: &mut Observer, what: &str) {
        let converges = observer.comes_to(|catalog| *catalog == truth(&self.server)).await;
        assert!(converges, "{what}: never comes to the truth.\n{}", self.differences(observer));
    }

    /// What the observer does not know as it is, and what has gone to and fro lately.
    fn differences(&self, observer: &Observer) -> String {
        let (truth, known) = (truth(&self.server), &observer.catalog);
        let missing = truth.objects().filter(|object| !known.holds(object));
        let missing = missing.map(|object| format!("not known as it is: {object:?}"));
        let wrong = known.objects().filter(|object| !truth.holds(object));
        let wrong = wrong.map(|object| format!("known and wrong: {object:?}"));
        let requests = self.server.requests();
        let last = requests.iter().rev().take(40).rev().map(|request| {
            let from = request.parameter("resourceVersion").unwrap_or_default();
            let Request { at, verb, path, status, .. } = request;
            format!("{:?} ago: {verb:?} {path} from {from:?}: {status:?}", at.elapsed())
        });
        let watchers = Resource::ALL.map(|resource| (resource, self.server.watchers(resource)));
        let now = format!(
            "the server is at {}, watched {watchers:?}, out of sight {:?}",
            self.server.resource_version(),
            observer.away.get()
        );
        missing.chain(wrong).chain(last).chain([now]).collect::<Vec<_>>().join("\n")
    }

    /// Changes some objects, removes one and adds one: never those below 3, which are the anchors.
    fn change(&self, round: u32) {
        for number in 3..6 {
            self.server.apply(service(number, round)).unwrap();
            self.server.apply(slice(number, round)).unwrap();
        }
        let (comes, goes) = if round.is_multiple_of(2) { (6, 7) } else { (7, 6) };
        self.server.apply(service(comes, round)).unwrap();
        self.server.apply(slice(comes, round)).unwrap();
        let _ = self.server.delete("Service", "default", &format!("s{goes}"));
        let _ = self.server.delete("EndpointSlice", "default", &format!("s{goes}-1"));
    }
}

fn labels(service: Option<u32>) -> Value {
    let mut labels = json!({"service.kubernetes.io/service-proxy-name": PROXY_NAME});
    if let Some(service) = service {
        labels["kubernetes.io/service-name"] = json!(format!("s{service}"));
    }
    labels
}

fn service(number: u32, round: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("s{number}"), "namespace": "default", "labels": labels(None)},
        "spec": {"clusterIP": "None", "externalIPs": [format!("203.0.{round}.{number}")]},
    })
}

fn slice(number: u32, round: u32) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("s{number}-1"), "namespace": "default", "labels": labels(Some(number))},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [format!("10.244.{round}.{number}")], "nodeName": "node1"}],
        "ports": [],
    })
}

fn node(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node{number}")},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.77.{number}")}]},
    })
}

/// What a catalog with everything in it that the server has and the agent asks for would be.
fn truth(server: &ApiServer) -> Catalog {
    let mut catalog = Catalog::default();
    for object in server.objects() {
        let label = object.pointer("/metadata/labels/service.kubernetes.io~1service-proxy-name");
        let ours = label.is_some_and(|label| label == PROXY_NAME);
        let object: Object = match object["kind"].as_str().unwrap() {
            "Service" if ours => {
                convert::service(serde_json::from_value(object).unwrap()).unwrap().object.into()
            }
            "EndpointSlice" if ours => {
                convert::endpoint_slice(serde_json::from_value(object).unwrap()).unwrap().object.into()
            }
            "Node" => convert::node(&serde_json::from_value(object).unwrap()).unwrap().object.into(),
            _ => continue,
        };
        catalog.apply(object);
    }
    catalog
}

fn assert_anchors_stayed(observer: &Observer, what: &str) {
    let anchors: BTreeSet<ObjectId> = (0..3)
        .flat_map(|number| {
            [
                ObjectId::Service(ObjectName::new("default", format!("s{number}"))),
                ObjectId::EndpointSlice(ObjectName::new("default", format!("s{number}-1"))),
                ObjectId::Node(NodeName::new(format!("node{number}"))),
            ]
        })
        .collect();
    let lost: Vec<_> = observer.deleted.iter().filter(|id| anchors.contains(id)).collect();
    assert!(lost.is_empty(), "{what}: these were there all the time: {lost:?}");
}

/// Runs many of them, some at a time.
async fn all<F: Future<Output = ()> + Send + 'static>(runs: impl IntoIterator<Item = F>) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut set = JoinSet::new();
    for run in runs {
        let places = places.clone();
        set.spawn(async move {
            let _place = places.acquire().await.unwrap();
            run.await;
        });
    }
    while let Some(result) = set.join_next().await {
        result.unwrap();
    }
}

const VERBS: [Verb; 3] = [Verb::List, Verb::Continue, Verb::Watch];

fn singly() -> impl Iterator<Item = Fault> {
    Kind::ALL.into_iter().flat_map(|kind| {
        let verbs = VERBS.into_iter().filter(move |verb| *verb == Verb::Watch || !kind.is_for_watches_only());
        verbs.map(move |verb| Fault::new(kind).on(verb))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_at_the_start_is_heard_once_it_is_well() {
    all(singly().map(|fault| async move {
        let rig = Rig::new();
        rig.server.inject(fault.times(3));
        let mut observer = rig.observe().await;
        let what = format!("{fault} at the start");
        // Nothing before everything: the first batch is the whole.
        let first = tokio::time::timeout(PATIENCE, observer.batches.recv()).await;
        observer.absorb(first.unwrap_or_else(|_| panic!("{what}: nothing comes")).unwrap());
        assert_eq!(observer.catalog, truth(&rig.server), "{what}");
        rig.change(1);
        rig.converge(&mut observer, &what).await;
        assert_anchors_stayed(&observer, &what);
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_later_is_followed_through_it() {
    all(singly().map(|fault| async move {
        let rig = Rig::new();
        let mut observer = rig.observe().await;
        let what = format!("{fault} later");
        rig.converge(&mut observer, &what).await;
        let id = rig.server.inject(fault.times(3));
        rig.change(1);
        observer.watch_for(Duration::from_millis(100)).await;
        // Watches that begin anew, and lists.
        rig.server.compact();
        rig.server.cut_watches();
        rig.change(2);
        rig.converge(&mut observer, &what).await;
        // Until the fault has happened as often as it may, or clearly cannot any more.
        observer.watch_for(Duration::from_millis(300)).await;
        rig.server.heal_one(id);
        rig.change(3);
        rig.converge(&mut observer, &what).await;
        assert_anchors_stayed(&observer, &what);
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_gets_well_is_not_asked_more_than_its_pauses_allow() {
    const WATCHED: Duration = Duration::from_secs(2);
    all(singly().map(|fault| async move {
        // Those are as good as well.
        if matches!(fault.kind(), Kind::Drip { .. } | Kind::Duplicates) {
            return;
        }
        let rig = Rig::new();
        let mut observer = rig.observe().await;
        let what = format!("{fault} for ever");
        rig.converge(&mut observer, &what).await;
        rig.server.inject(fault);
        // What the watches know is too old when they come back: lists are needed.
        rig.server.down().unwrap();
        rig.change(1);
        rig.server.compact();
        rig.server.up().unwrap();
        let before = rig.server.requests().len();
        let start = Instant::now();
        observer.watch_for(WATCHED).await;
        let asked = rig.server.requests().len() - before;
        // Four watches; each attempt may be a list of four pages and a watch; the first pauses are short.
        let Timing { last_retry, .. } = TIMING;
        let attempts = 8 + start.elapsed().as_millis() / last_retry.as_millis();
        assert!(asked as u128 <= 4 * 5 * attempts, "{what}: asked {asked} times in {:?}", start.elapsed());
        rig.server.heal();
        rig.change(2);
        rig.converge(&mut observer, &what).await;
        assert_anchors_stayed(&observer, &what);
    }))
    .await;
}

/// Plays a seed's misfortunes while objects change, and then waits until all is known.
async fn play(seed: u64) {
    let rig = Rig::new();
    let mut observer = rig.observe().await;
    let what = format!("seed {seed}");
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    if random.random_bool(0.5) {
        rig.converge(&mut observer, &what).await;
    }
    for (round, step) in (1..).zip(Step::sequence(seed).take(30)) {
        tokio::task::block_in_place(|| rig.server.play(step)).unwrap();
        if random.random_bool(0.5) {
            rig.change(round);
        }
        observer.watch_for(Duration::from_millis(random.random_range(0..60))).await;
    }
    rig.server.heal();
    rig.converge(&mut observer, &what).await;
    assert_anchors_stayed(&observer, &what);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_sequence_of_misfortunes_ends_in_the_truth() {
    let seeds = match std::env::var("PROXIER_TEST_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..24).collect(),
    };
    all(seeds.into_iter().map(play)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_for_long_changes_nothing_and_neither_does_its_return() {
    let rig = Rig::new();
    let mut observer = rig.observe().await;
    rig.converge(&mut observer, "start").await;
    let (batches, catalog) = (observer.heard, observer.catalog.clone());
    rig.server.down().unwrap();
    let unreachable = |away: &BTreeMap<_, String>| {
        away.values().filter(|reason| reason.contains("cannot be reached")).count()
    };
    until_away(&mut observer, |away| unreachable(away) == 4).await;
    observer.watch_for(Duration::from_secs(2)).await;
    rig.server.up().unwrap();
    until_away(&mut observer, BTreeMap::is_empty).await;
    observer.watch_for(Duration::from_secs(1)).await;
    assert_eq!((observer.heard, &observer.catalog), (batches, &catalog), "something was told");
    rig.change(1);
    rig.converge(&mut observer, "afterwards").await;
}

/// etcd is put back to an earlier state. What the agent has seen since has not happened.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_back_in_time_is_followed_there() {
    for future in [FutureWatch::Silent, FutureWatch::Refused] {
        let rig = Rig::new();
        rig.server.set_future_watch(future);
        let mut observer = rig.observe().await;
        rig.converge(&mut observer, "start").await;
        let backup = rig.server.backup();
        for round in 1..20 {
            rig.change(round);
        }
        rig.converge(&mut observer, "before the restore").await;
        rig.server.restore(&backup);
        rig.converge(&mut observer, &format!("after the restore, {future:?}")).await;
        assert_anchors_stayed(&observer, "restore");
    }
}

/// What was lost is not told by the events after it.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_read_is_not_lost() {
    for kind in [Kind::LostAsOtherShape, Kind::LostAsNotJson] {
        let rig = Rig::new();
        let mut observer = rig.observe().await;
        rig.converge(&mut observer, "start").await;
        let id = rig.server.inject(Fault::new(kind).of(Resource::Services).times(1));
        rig.server.apply(service(3, 1)).unwrap();
        rig.server.apply(service(4, 1)).unwrap();
        rig.converge(&mut observer, &format!("{kind:?}")).await;
        assert_eq!(rig.server.hits(id), 1);
        assert_anchors_stayed(&observer, "a list");
    }
}

/// The header is all that says for how long.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_left_alone_for_as_long_as_it_asks() {
    let pause = Duration::from_secs(1);
    assert!(TIMING.last_retry * 2 < pause);
    let rig = Rig::new();
    let mut observer = rig.observe().await;
    rig.converge(&mut observer, "start").await;
    rig.server.inject(Fault::new(Kind::TooManyRequests { retry_after: 1 }));
    rig.server.cut_watches();
    observer.watch_for(pause * 7 / 2).await;
    let mut refused = BTreeMap::<String, Vec<Instant>>::new();
    for request in rig.server.requests().iter().filter(|request| request.status == Some(429)) {
        refused.entry(request.path.clone()).or_default().push(request.at);
    }
    assert_eq!(refused.len(), 4, "{refused:?}");
    for (path, times) in refused {
        assert!(times.len() > 1, "{path} is not asked for again");
        for pair in times.windows(2) {
            // The server's clock starts a little before ours.
            assert!(pair[1] - pair[0] > pause * 9 / 10, "{path}: after {:?}", pair[1] - pair[0]);
        }
    }
    rig.server.heal();
    rig.change(1);
    rig.converge(&mut observer, "afterwards").await;
}

/// Waits until what watches say of their failures is as wanted, and returns it.
async fn until_away(
    observer: &mut Observer,
    is_wanted: impl Fn(&BTreeMap<&'static str, String>) -> bool,
) -> BTreeMap<&'static str, String> {
    const TURN: Duration = Duration::from_millis(20);
    // Counted, as in [`Observer::comes_to`].
    for _ in 0..PATIENCE.as_millis() / TURN.as_millis() {
        let away = observer.away.get();
        if is_wanted(&away) {
            return away;
        }
        observer.watch_for(TURN).await;
    }
    panic!("{:?}", observer.away);
}

/// Waits until a watch says why it fails.
async fn reason_of(observer: &mut Observer, what: &str) -> String {
    let says_so = |reason: &String| reason.contains(what);
    let away = until_away(observer, |away| away.values().any(says_so)).await;
    away.into_values().find(says_so).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_with_what_to_do_and_ends_when_it_is_mended() {
    for (kind, says, next_step) in [
        (Kind::Unauthorized, "401: Unauthorized", "check the token"),
        (Kind::Forbidden, "403: services is forbidden: User", "list and watch of services: deploy/ has one"),
        (Kind::Unavailable, "503", "asked again"),
        (Kind::NotJson, "cannot be understood", "check that the address is an API server's"),
        (Kind::Html, "cannot be understood", "check that the address is an API server's"),
    ] {
        let rig = Rig::new();
        rig.server.inject(Fault::new(kind).of(Resource::Services));
        let mut observer = rig.observe().await;
        let reason = reason_of(&mut observer, says).await;
        assert!(reason.contains(next_step), "{kind:?}: {reason}");
        assert_eq!(observer.heard, 0, "{kind:?}");
        rig.server.heal();
        rig.converge(&mut observer, &format!("{kind:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_of_the_api_server_are_told() {
    let rig = Rig::new();
    rig.server
        .apply(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "kubernetes", "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["198.51.100.1"]}, {"addresses": ["198.51.100.2"]}],
            "ports": [],
        }))
        .unwrap();
    let mut observer = rig.observe().await;
    let first = observer.batches.recv().await.unwrap();
    let told = first.api_server.unwrap();
    for address in ["127.0.0.1", "198.51.100.1", "198.51.100.2"] {
        assert!(told.contains(&address.parse().unwrap()), "{told:?}");
    }
}
