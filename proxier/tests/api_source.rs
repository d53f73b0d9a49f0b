//! Whatever a localv1 server does: what the agent knows becomes what the server has said last, a batch at a time, and nothing that is
//! there is ever said to be gone because the server is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[allow(dead_code, reason = "each test program uses its part")]
mod cluster;
#[allow(dead_code, reason = "each test program uses its part")]
mod localv1;

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use prost::Message as _;
use proxier::{
    catalog::Catalog,
    model::{self, NodeName, Object, ServicePort},
    source::api::{Credentials, Options, Source},
};
use proxier_localv1::{Endpoint, OpItem, Service, Set, Value, op_item::Op, service::SessionAffinity};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tonic::Status;

use crate::{
    cluster::{Away, Observer, TIMING},
    localv1::{Server, Tls, delete, huge, pod, recorded, reset, service, sync},
};

const STATE: &str = "state";
/// Nothing here takes as long; this only keeps a test that would wait for ever from doing so.
const PATIENCE: Duration = Duration::from_secs(30);

fn options(address: &str) -> Options {
    Options { timing: TIMING, ..Options::new(address.parse().unwrap(), NodeName::new("node1")) }
}

fn observe(options: Options) -> Observer {
    let away = Arc::new(Away::default());
    Observer::of(Source::open(options).unwrap().spawn(away.clone()), away, "node1")
}

/// Waits until the source says why it does not see the state, and with these words. Nothing may come meanwhile.
#[track_caller]
fn fails(observer: &Observer, words: &str) -> impl Future<Output = ()> {
    let away = observer.away.clone();
    let words = words.to_owned();
    async move {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = away.get().get(STATE).cloned().unwrap_or_default();
            if said.contains(&words) {
                return;
            }
            assert!(Instant::now() < end, "{words:?} is never said, but {said:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// What a source that follows this server says.
async fn says(options: Options, words: &str) {
    let mut observer = observe(options);
    fails(&observer, words).await;
    assert!(observer.batches.try_recv().is_err(), "nothing is known, so nothing may be handed on");
}

fn names(catalog: &Catalog) -> Vec<String> {
    catalog.objects().map(|object| object.id().to_string()).collect()
}

const WEB_AND_POD: [&str; 2] = ["Service default/web", "EndpointSlice default/web/IPv4/6000"];

fn web_and_pod() -> [OpItem; 2] {
    [service("web", "203.0.113.1"), pod("web", "alpine-1", "11.0.2.2")]
}

/// A server that has told of a Service and its pod, and who knows it.
async fn settled() -> (Server, Observer) {
    let server = Server::start();
    server.script.whole(web_and_pod());
    let mut observer = observe(options(&server.address));
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
    (server, observer)
}

/// In few words what matters of an object.
fn line(object: &Object) -> String {
    match object {
        Object::Service(service) => {
            let mut line = format!("{} {}", object.id(), service.service_type);
            let mut add = |name: &str, values: Vec<String>| {
                if !values.is_empty() {
                    line += &format!(" {name} {}", values.join(","));
                }
            };
            let texts = |values: &[std::net::IpAddr]| values.iter().map(ToString::to_string).collect();
            add("headless", vec![service.headless.to_string()]);
            add("cluster", texts(&service.cluster_ips));
            add("external", texts(&service.external_ips));
            add("balanced", texts(&service.load_balancer_ips().collect::<Vec<_>>()));
            add("from", service.source_ranges.iter().map(ToString::to_string).collect());
            let ports = service.ports.iter();
            let port = |port: &ServicePort| {
                format!("{}:{:?}:{}->{:?}", port.name, port.protocol, port.port, port.target_port)
            };
            add("ports", ports.map(port).collect());
            add("health", service.health_check_node_port.iter().map(ToString::to_string).collect());
            add("external", vec![format!("{:?}", service.external_traffic_policy)]);
            add("internal", vec![format!("{:?}", service.internal_traffic_policy)]);
            if let model::SessionAffinity::ClientIp { timeout_seconds } = service.session_affinity {
                add("affinity", vec![timeout_seconds.to_string()]);
            }
            assert_eq!(service.has_source_ranges, !service.source_ranges.is_empty());
            line
        }
        Object::EndpointSlice(slice) => {
            let endpoints = slice.endpoints.iter().map(|endpoint| {
                let node = endpoint.node.as_ref().map_or("elsewhere", NodeName::as_str);
                let pod = &endpoint.target.as_ref().unwrap().name;
                assert!(endpoint.ready && endpoint.serving && !endpoint.terminating);
                format!(" {pod} {:?} on {node}", endpoint.addresses)
            });
            let ports = slice.ports.iter().map(|port| format!("{}:{}", port.name, port.port.unwrap()));
            let (endpoints, ports) = (endpoints.collect::<String>(), ports.collect::<Vec<_>>().join(","));
            let service = slice.service.as_ref().unwrap();
            format!("{} of {service} {} ports {ports}:{endpoints}", object.id(), slice.family)
        }
        Object::Node(_) => panic!("the API has no Nodes"),
    }
}

/// As the recording writes it: kpng's field names, without what says nothing.
fn service_as_recorded(value: &Service) -> serde_json::Value {
    let ports: Vec<_> = value
        .ports
        .iter()
        .map(|port| {
            let mut json = serde_json::to_value(port).unwrap();
            json["Protocol"] = json!(port.protocol().as_str_name());
            json
        })
        .collect();
    let mut json = json!({
        "Namespace": value.namespace, "Name": value.name, "Type": value.r#type, "IPs": value.ips, "Ports": ports,
    });
    if !value.ip_filters.is_empty() {
        json["IPFilters"] = json!(value.ip_filters);
    }
    if value.external_traffic_to_local {
        json["ExternalTrafficToLocal"] = json!(true);
    }
    if let Some(SessionAffinity::ClientIp(client_ip)) = &value.session_affinity {
        json["ClientIP"] = json!(client_ip);
    }
    if value.health_check_node_port != 0 {
        json["HealthCheckNodePort"] = json!(value.health_check_node_port);
    }
    json
}

#[tokio::test]
async fn kpngs_recorded_words_are_understood_batch_by_batch() {
    let server = Server::start();
    let mut observer = observe(options(&server.address));
    let mut batch = Vec::new();
    let (mut state, mut changes) = (BTreeSet::new(), Vec::new());
    for (item, record) in recorded() {
        if let Some(Op::Set(Value { r#ref: Some(reference), bytes })) = &item.op {
            let value = if reference.set == Set::ServicesSet as i32 {
                service_as_recorded(&Service::decode(&**bytes).unwrap())
            } else {
                serde_json::to_value(Endpoint::decode(&**bytes).unwrap()).unwrap()
            };
            assert_eq!(value, record["value"]);
        }
        let is_sync = matches!(item.op, Some(Op::Sync(_)));
        batch.push(item);
        if !is_sync {
            continue;
        }
        let asked = server.script.requests().len();
        server.script.say(std::mem::take(&mut batch));
        // The next batch is asked for when this one has been handed on; one without news never is.
        let end = Instant::now() + PATIENCE;
        while server.script.requests().len() <= asked.max(1) {
            assert!(Instant::now() < end, "the next batch is not asked for");
            observer.watch_for(Duration::from_millis(1)).await;
        }
        observer.watch_for(Duration::from_millis(1)).await;
        let after: BTreeSet<String> = observer.catalog.objects().map(|object| line(&object)).collect();
        changes.push(format!("Sync {}", server.script.requests().len() - 1));
        changes.extend(state.difference(&after).map(|line| format!("- {line}")));
        changes.extend(after.difference(&state).map(|line| format!("+ {line}")));
        state = after;
    }
    assert!(server.script.requests().iter().all(|request| request.node_name == "node1" && request.draining));
    assert!(observer.problems.is_empty(), "{:?}", observer.problems);
    insta::assert_snapshot!(changes.join("\n"), @r"
    Sync 1
    + EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1
    + Service default/kpng-example ClusterIP headless true external 10.0.0.55,1000::55 ports :Tcp:6000->Number(6000) external Cluster internal Cluster
    Sync 2
    Sync 3
    + Service default/media LoadBalancer headless false cluster 10.96.56.103 from 192.0.2.0/24 ports sip:Udp:5060->Number(15060),sctp:Sctp:36412->Number(36412) health 30122 external Local internal Cluster affinity 10800
    Sync 4
    + EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1
    Sync 5
    - EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1
    + EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1 alpine-2 [11.0.1.2] on elsewhere
    Sync 6
    + EndpointSlice default/kpng-example/IPv4/6000 of default/kpng-example IPv4 ports :6000: alpine-2 [11.0.1.2] on elsewhere
    Sync 7
    - EndpointSlice default/kpng-example/IPv4/6000 of default/kpng-example IPv4 ports :6000: alpine-2 [11.0.1.2] on elsewhere
    - EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1
    + EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1 alpine-2 [1100::102] on elsewhere
    Sync 8
    - Service default/media LoadBalancer headless false cluster 10.96.56.103 from 192.0.2.0/24 ports sip:Udp:5060->Number(15060),sctp:Sctp:36412->Number(36412) health 30122 external Local internal Cluster affinity 10800
    + Service default/media LoadBalancer headless false cluster 10.96.56.103 balanced 10.0.0.77 from 192.0.2.0/24 ports sip:Udp:5060->Number(15060),sctp:Sctp:36412->Number(36412) health 30122 external Local internal Cluster affinity 10800
    Sync 9
    Sync 10
    - EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1 alpine-2 [11.0.1.2] on elsewhere
    + EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1
    Sync 11
    - EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1 alpine-2 [1100::102] on elsewhere
    + EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1
    Sync 12
    Sync 13
    Sync 14
    - EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1
    - Service default/kpng-example ClusterIP headless true external 10.0.0.55,1000::55 ports :Tcp:6000->Number(6000) external Cluster internal Cluster
    Sync 15
    + EndpointSlice default/kpng-example/IPv6/6000 of default/kpng-example IPv6 ports :6000: alpine-1 [1100::202] on node1
    + Service default/kpng-example ClusterIP headless true external 10.0.0.55,1000::55 ports :Tcp:6000->Number(6000) external Cluster internal Cluster
    Sync 16
    - EndpointSlice default/media/IPv4/15060:sip,36412:sctp of default/media IPv4 ports sip:15060,sctp:36412: alpine-1 [11.0.2.2] on node1
    - Service default/media LoadBalancer headless false cluster 10.96.56.103 balanced 10.0.0.77 from 192.0.2.0/24 ports sip:Udp:5060->Number(15060),sctp:Sctp:36412->Number(36412) health 30122 external Local internal Cluster affinity 10800
    Sync 17
    ");
}

#[tokio::test]
async fn a_batch_that_breaks_off_leaves_what_was_and_the_next_whole_state_says_what_has_gone() {
    let (server, mut observer) = settled().await;
    let script = server.script.clone();
    script.say([service("web", "203.0.113.9"), service("mail", "203.0.113.2")]);
    observer.watch_for(Duration::from_millis(200)).await;
    let address = server.die();
    fails(&observer, "cannot be reached: ").await;
    observer.watch_for(Duration::from_millis(200)).await;
    assert_eq!(
        (names(&observer.catalog), &*observer.deleted),
        (WEB_AND_POD.map(str::to_owned).to_vec(), &[][..])
    );

    // It comes back with less, and a moment later with nothing.
    let server = Server::at(address, script.clone(), None);
    script.whole([service("mail", "203.0.113.2")]);
    observer.until("less", |catalog| names(catalog) == ["Service default/mail"]).await;
    script.end(Ok(()));
    script.whole([]);
    observer.until("nothing", |catalog| names(catalog).is_empty()).await;
    assert_eq!(observer.away.get(), [].into());
    drop(server);
}

#[tokio::test]
async fn an_end_in_the_middle_of_a_batch_is_no_end_of_the_batch() {
    let (server, mut observer) = settled().await;
    for end in [Ok(()), Err(Status::unavailable("going down"))] {
        server.script.say([reset()]);
        server.script.end(end);
        server.script.whole(web_and_pod());
        // What is asked again is known already: nothing comes.
        observer.watch_for(Duration::from_millis(400)).await;
        assert_eq!((names(&observer.catalog), observer.heard), (WEB_AND_POD.map(str::to_owned).to_vec(), 1));
    }
    server.script.batch([delete(Set::EndpointsSet, "default/web/alpine-1.v4")]);
    observer.until("the pod has gone", |catalog| names(catalog) == WEB_AND_POD[..1]).await;
}

#[tokio::test]
async fn a_stream_without_reset_begins_anew_as_well() {
    let (server, mut observer) = settled().await;
    server.script.end(Ok(()));
    server.script.batch([service("mail", "203.0.113.2")]);
    observer.until("another state", |catalog| names(catalog) == ["Service default/mail"]).await;
}

#[tokio::test]
async fn a_server_without_services_is_a_first_state_too() {
    let server = Server::start();
    let mut observer = observe(options(&server.address));
    observer.watch_for(Duration::from_millis(200)).await;
    assert_eq!((observer.heard, observer.away.get()), (0, [].into()), "it waits");
    server.script.say([sync()]);
    observer.until("nothing", |catalog| names(catalog).is_empty()).await;
}

/// While the agent is busy, no more is asked for, and what the server has by then is what comes.
#[tokio::test]
async fn nothing_is_asked_for_while_nobody_takes_what_came() {
    let server = Server::start();
    for number in 0..10 {
        server.script.batch([service("web", &format!("203.0.113.{number}"))]);
    }
    let mut observer = observe(options(&server.address));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(server.script.requests().len() <= 3, "{}", server.script.requests().len());
    observer
        .until("the last", |catalog| {
            catalog.services().next().is_some_and(|web| web.external_ips[0].to_string() == "203.0.113.9")
        })
        .await;
}

#[tokio::test]
async fn where_nothing_listens_it_is_tried_until_something_does() {
    let server = Server::start();
    let (script, address) = (server.script.clone(), server.die());
    let mut observer = observe(options(&address.to_string()));
    fails(
        &observer,
        "cannot be reached: Connection refused (os error 111); nothing listens there: check --api, ",
    )
    .await;
    let _server = Server::at(address, script.clone(), None);
    script.whole(web_and_pod());
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
}

#[tokio::test]
async fn what_a_server_refuses_with_is_said_with_what_to_do() {
    for (status, words) in [
        (
            Status::unauthenticated("who are you?"),
            "refuses with Unauthenticated: who are you?; check --api-cert and --api-key",
        ),
        (Status::permission_denied("not you"), "refuses with PermissionDenied: not you; check --api-cert"),
        (Status::unavailable("not yet"), "refuses with Unavailable: not yet; asked again"),
        (
            Status::invalid_argument("no such node"),
            "refuses with InvalidArgument: no such node; check --node-name",
        ),
        (
            Status::unimplemented(""),
            "has no localv1.Sets (it says: ); check --api: that of `proxier to-api`, or of kpng's",
        ),
    ] {
        let (server, mut observer) = settled().await;
        server.script.end(Err(status));
        fails(&observer, words).await;
        server.script.whole([service("web", "203.0.113.7")]);
        observer.until("well again", |catalog| names(catalog) == WEB_AND_POD[..1]).await;
        assert_eq!(observer.away.get(), [].into());
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_not_read_and_what_is_known_stays() {
    let (server, mut observer) = settled().await;
    server.script.say([service("web", "203.0.113.9"), huge()]);
    fails(&observer, "sends a message of more than 16 MiB (").await;
    assert_eq!(names(&observer.catalog), WEB_AND_POD);
    server.script.whole([service("mail", "203.0.113.2")]);
    observer.until("well again", |catalog| names(catalog) == ["Service default/mail"]).await;
}

/// A server that does with each connection what a test wants.
async fn strange<F: Future<Output = ()> + Send + 'static>(
    of_each: impl Fn(TcpStream) -> F + Send + 'static,
) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            tokio::spawn(of_each(connection));
        }
    });
    address
}

#[tokio::test]
async fn what_is_no_server_of_the_api_is_told_apart_from_one_that_is_not_well() {
    let answering = |answer: &'static [u8]| {
        strange(move |mut connection| async move {
            let _ = connection.read(&mut [0; 4096]).await;
            let _ = connection.write_all(answer).await;
            // Until the client goes.
            while connection.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
        })
    };
    let web = answering(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
    says(options(&web), "does not speak gRPC (").await;
    let noise = answering(&[0xa5; 300]).await;
    says(options(&noise), "check --api: that of `proxier to-api`, or of kpng's").await;
    let closing = strange(|connection| async move { drop(connection) }).await;
    says(options(&closing), "check that it runs, and what proxies are on the way").await;
    let resetting = strange(|connection| async move {
        socket2::SockRef::from(&connection).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    says(options(&resetting), "check that it runs, and what proxies are on the way").await;
    // gRPC, and nothing of ours.
    let (_, service) = tonic_health::server::health_reporter();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let other = listener.local_addr().unwrap().to_string();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    says(options(&other), "has no localv1.Sets (").await;
}

#[tokio::test]
async fn a_server_that_never_answers_is_silence() {
    let silent = strange(|mut connection| async move {
        while connection.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
    })
    .await;
    let begun = Instant::now();
    says(options(&silent), "says nothing any more; check that it runs, ").await;
    assert!(begun.elapsed() >= TIMING.silence, "{:?}", begun.elapsed());
    assert!(begun.elapsed() < TIMING.silence * 3, "{:?}", begun.elapsed());
}

/// Something on the way that forgets connections while `frozen`.
async fn way(server: String, frozen: Arc<AtomicBool>) -> String {
    strange(move |client| {
        let (server, frozen) = (server.clone(), frozen.clone());
        async move {
            let server = TcpStream::connect(server).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            let there = carry(&mut from_client, &mut to_server, &frozen);
            let back = carry(&mut from_server, &mut to_client, &frozen);
            tokio::select! { () = there => {}, () = back => {} }
        }
    })
    .await
}

async fn carry(
    from: &mut tokio::net::tcp::OwnedReadHalf,
    to: &mut tokio::net::tcp::OwnedWriteHalf,
    frozen: &AtomicBool,
) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if frozen.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_connection_that_leads_nowhere_any_more_is_noticed_and_what_is_known_stays() {
    let server = Server::start();
    server.script.whole(web_and_pod());
    let frozen = Arc::new(AtomicBool::new(false));
    let mut observer = observe(options(&way(server.address.clone(), frozen.clone()).await));
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
    // A live one with nothing to say is no dead one.
    observer.watch_for(TIMING.silence * 2).await;
    assert_eq!(observer.away.get(), [].into());
    frozen.store(true, Ordering::Relaxed);
    fails(&observer, "says nothing any more; ").await;
    assert_eq!((names(&observer.catalog), observer.heard), (WEB_AND_POD.map(str::to_owned).to_vec(), 1));
    let asked = server.script.requests().len();
    frozen.store(false, Ordering::Relaxed);
    let end = Instant::now() + PATIENCE;
    while server.script.requests().len() == asked {
        assert!(Instant::now() < end, "it does not ask");
        observer.watch_for(Duration::from_millis(5)).await;
    }
    server.script.whole([]);
    observer.until("nothing", |catalog| names(catalog).is_empty()).await;
}

/// As a kpng that has nothing to say does after four minutes: Go's gRPC does not like to be asked whether it is alive.
#[tokio::test]
async fn a_server_that_minds_pings_is_pinged_no_more_and_nothing_is_said_of_it() {
    let connections = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = connections.clone();
    let address = strange(move |mut connection| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        async move {
            if number > 0 {
                // Answers no ping: the client would not wait for that in vain if it sent any.
                while connection.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
                return;
            }
            let mut connection = h2::server::handshake(connection).await.unwrap();
            let _call = connection.accept().await.unwrap().unwrap();
            connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
            let _ = std::future::poll_fn(|context| connection.poll_closed(context)).await;
        }
    })
    .await;
    let mut observer = observe(options(&address));
    observer.watch_for(TIMING.silence * 3).await;
    assert_eq!((connections.load(Ordering::Relaxed), observer.away.get()), (2, [].into()));
}

/// An authority, in PEM form, and what it signs with.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = authority.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(authority, key) }
    }

    /// A certificate for this name, and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// A server with a certificate for `name`.
    fn server(&self, name: &str, clients: Option<&Self>) -> Server {
        let (certificate, key) = self.sign(name);
        let client_ca = clients.map(|clients| clients.certificate.clone());
        let server = Server::with_tls(Tls { certificate, key, client_ca });
        server.script.whole(web_and_pod());
        server
    }
}

/// Files for TLS.
struct Files {
    work: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { work: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn trusting(&self, authority: &Authority) -> Credentials {
        fs::write(self.path("ca.crt"), &authority.certificate).unwrap();
        Credentials { ca: self.path("ca.crt"), identity: None }
    }

    fn with_identity(&self, credentials: Credentials, (certificate, key): (String, String)) -> Credentials {
        fs::write(self.path("tls.crt"), certificate).unwrap();
        fs::write(self.path("tls.key"), key).unwrap();
        Credentials { identity: Some((self.path("tls.crt"), self.path("tls.key"))), ..credentials }
    }
}

fn with_tls(server: &Server, credentials: Credentials) -> Options {
    Options { credentials: Some(credentials), ..options(&server.address) }
}

#[tokio::test]
async fn a_server_with_tls_is_followed_if_it_is_trusted() {
    let (authority, files) = (Authority::new(), Files::new());
    let server = authority.server("127.0.0.1", None);
    let mut observer = observe(with_tls(&server, files.trusting(&authority)));
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
    // Of a bundle, one is enough.
    let bundle = format!("{}{}", Authority::new().certificate, authority.certificate);
    fs::write(files.path("bundle"), bundle).unwrap();
    let server = authority.server("127.0.0.1", None);
    let mut observer = observe(with_tls(&server, Credentials { ca: files.path("bundle"), identity: None }));
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
}

#[tokio::test]
async fn what_keeps_tls_from_working_is_said_with_the_flag_to_look_at() {
    let (authority, files) = (Authority::new(), Files::new());
    let server = authority.server("127.0.0.1", None);
    let stranger = Files::new();
    let untrusting = stranger.trusting(&Authority::new());
    says(with_tls(&server, untrusting), "its certificate is not of an authority that is trusted (").await;
    let elsewhere = authority.server("localv1.example", None);
    says(with_tls(&elsewhere, files.trusting(&authority)), "its certificate is for other names (").await;
    let plain = Server::start();
    says(with_tls(&plain, files.trusting(&authority)), "it does not speak TLS (").await;
    says(options(&server.address), "whether it wants TLS (--api-ca)").await;
}

#[tokio::test]
async fn a_server_that_wants_to_know_who_we_are_is_shown_a_certificate_read_anew_each_time() {
    let (authority, clients, files) = (Authority::new(), Authority::new(), Files::new());
    let server = authority.server("127.0.0.1", Some(&clients));
    let trusting = files.trusting(&authority);
    says(with_tls(&server, trusting.clone()), "it wants to know who we are (").await;
    let (certificate, key) = Authority::new().sign("node1");
    let mut observer = observe(with_tls(&server, files.with_identity(trusting.clone(), (certificate, key))));
    fails(&observer, "it does not take our certificate (").await;
    // In between, the two do not belong together.
    let (certificate, key) = clients.sign("node1");
    fs::write(files.path("tls.crt"), certificate).unwrap();
    fails(&observer, " cannot be used together: ").await;
    fs::write(files.path("tls.key"), "").unwrap();
    fails(&observer, "tls.key has no private key in it; give --api-key a file in PEM form").await;
    fs::write(files.path("tls.key"), key).unwrap();
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
    assert_eq!(observer.away.get(), [].into());
}

#[test]
fn files_that_are_of_no_use_are_refused_at_the_start() {
    let (authority, files) = (Authority::new(), Files::new());
    let good = files.with_identity(files.trusting(&authority), authority.sign("node1"));
    let refused = |credentials: Credentials| {
        let options = Options { credentials: Some(credentials), ..options("127.0.0.1:12090") };
        Source::open(options).unwrap_err().to_string()
    };
    let file = |name: &str, text: &str| {
        fs::write(files.path(name), text).unwrap();
        files.path(name)
    };
    let identity = |certificate: &Path, key: &Path| Credentials {
        identity: Some((certificate.to_owned(), key.to_owned())),
        ..good.clone()
    };
    let (certificate, key) = good.identity.clone().unwrap();
    assert!(Source::open(Options { credentials: Some(good.clone()), ..options("127.0.0.1:12090") }).is_ok());
    for (credentials, words) in [
        (
            Credentials { ca: "/nowhere/ca".into(), ..good.clone() },
            "/nowhere/ca cannot be read: No such file or directory (os error 2); check --api-ca",
        ),
        (
            Credentials { ca: file("empty", ""), ..good.clone() },
            "empty has no certificate in it; give --api-ca a file in PEM form",
        ),
        (Credentials { ca: key.clone(), ..good.clone() }, "tls.key has no certificate in it; give --api-ca"),
        (
            Credentials {
                ca: file("odd", "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"),
                ..good.clone()
            },
            "odd has no certificate in it that can be understood; give --api-ca",
        ),
        (
            Credentials {
                ca: file("broken", "-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n"),
                ..good.clone()
            },
            "broken cannot be understood (",
        ),
        (identity(&key, &key), "tls.key has no certificate in it; give --api-cert"),
        (identity(&certificate, &certificate), "tls.crt has no private key in it; give --api-key"),
        (identity(&file("other", &authority.sign("node1").0), &key), " cannot be used together: "),
    ] {
        let error = refused(credentials);
        assert!(error.contains(words), "{words:?} is not in {error:?}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[tokio::test]
async fn a_unix_socket_is_followed_and_waited_for() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("api.sock");
    let mut observer = observe(options(&format!("unix://{}", path.display())));
    fails(
        &observer,
        "cannot be reached: No such file or directory (os error 2); nothing listens there: check --api, ",
    )
    .await;
    let server = Server::at_socket(&path);
    server.script.whole(web_and_pod());
    observer.until("the first state", |catalog| names(catalog) == WEB_AND_POD).await;
    drop(server);
    fails(
        &observer,
        "cannot be reached: Connection refused (os error 111); nothing listens there: check --api, ",
    )
    .await;
    fs::remove_file(&path).unwrap();
    let server = Server::at_socket(&path);
    server.script.whole([]);
    observer.until("nothing", |catalog| names(catalog).is_empty()).await;
}

#[tokio::test]
async fn nobody_who_listens_any_more_is_an_end() {
    let (server, observer) = settled().await;
    // It asks for the next batch as soon as it has one, which may be a moment later.
    for _ in 0..10_000 {
        if server.script.requests().len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(observer);
    let asked = server.script.requests().len();
    server.script.end(Ok(()));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(server.script.requests().len(), asked);
}
