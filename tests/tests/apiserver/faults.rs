//! Each fault is on the wire what it says, happens where and as often as it was asked for, and is over then.

use std::time::{Duration, Instant};

use proxier_tests::apiserver::{ApiServer, Fault, Kind, Resource, Step, Verb};
use serde_json::{Value, json};

use super::{
    objects::{SERVICES, SLICES, names, server_with, service, touch},
    wire::{Answer, End, get, try_get, until},
};

/// Nothing within this is silence.
const SILENCE: Duration = Duration::from_millis(300);

fn server_failing(kind: Kind) -> ApiServer {
    let server = server_with(&["a", "b", "c"]);
    server.inject(Fault::new(kind).times(1));
    server
}

fn open_watch(server: &ApiServer) -> Answer {
    let answer = get(server, &format!("{SERVICES}?watch=1&resourceVersion={}", server.resource_version()));
    assert_eq!(answer.code, 200);
    answer
}

/// The next request is answered as if nothing had been.
fn assert_over(server: &ApiServer) {
    assert_eq!(names(&get(server, SERVICES).json()).len(), server.objects().len());
    let mut watch = open_watch(server);
    touch(server, "a", &format!("over {}", server.resource_version()));
    assert_eq!(watch.change().0, "MODIFIED");
}

#[test]
fn answers_of_refusal_are_those_of_the_real_server() {
    for verb in ["", "?watch=1"] {
        for (kind, code, reason) in [
            (Kind::Unauthorized, 401, "Unauthorized"),
            (Kind::Forbidden, 403, "Forbidden"),
            (Kind::Gone, 410, "Expired"),
            (Kind::Unavailable, 503, "ServiceUnavailable"),
        ] {
            let server = server_failing(kind);
            let answer = get(&server, &format!("{SERVICES}{verb}"));
            assert_eq!((answer.code, answer.content_type()), (code, "application/json"));
            let status = answer.json();
            assert_eq!(
                (&status["kind"], &status["code"], &status["reason"]),
                (&json!("Status"), &json!(code), &json!(reason))
            );
            assert_over(&server);
        }
        let server = server_failing(Kind::InternalError);
        let status = get(&server, &format!("{SERVICES}{verb}")).json();
        assert_eq!(
            status,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "etcdserver: leader changed", "code": 500})
        );
        assert_over(&server);
    }
}

#[test]
fn what_is_not_served_is_not_found_in_go_s_words() {
    let server = server_failing(Kind::NotFound);
    let answer = get(&server, SERVICES);
    assert_eq!((answer.code, answer.content_type()), (404, "text/plain; charset=utf-8"));
    assert_eq!(answer.rest().0, b"404 page not found\n");
    assert_over(&server);
}

#[test]
fn an_event_that_is_lost_is_the_first_there_is_and_no_other() {
    for kind in [Kind::LostAsOtherShape, Kind::LostAsNotJson] {
        let server = server_failing(kind);
        let mut watch = open_watch(&server);
        touch(&server, "a", "lost");
        let line = watch.line().unwrap();
        assert!(!line.contains("lost"), "{line}");
        touch(&server, "a", "found");
        assert_eq!(watch.change().0, "MODIFIED");
        assert_over(&server);
    }
}

#[test]
fn too_many_requests_say_when_to_come_back_and_nothing_in_json() {
    let server = server_failing(Kind::TooManyRequests { retry_after: 7 });
    let answer = get(&server, SERVICES);
    assert_eq!((answer.code, answer.headers["retry-after"].as_str()), (429, "7"));
    assert_eq!(answer.rest().0, b"Too many requests, please try again later.\n");
    assert_over(&server);
}

#[test]
fn forbidden_names_user_verb_resource_and_scope() {
    let server = server_with(&[]);
    server.inject(Fault::new(Kind::Forbidden));
    let message = |path: &str| get(&server, path).json()["message"].as_str().unwrap().to_owned();
    let user = "User \"system:serviceaccount:proxier:proxier\"";
    assert_eq!(
        message(SERVICES),
        format!(
            "services is forbidden: {user} cannot list resource \"services\" in API group \"\" at the cluster scope"
        )
    );
    assert_eq!(
        message(&format!("{SLICES}?watch=1")),
        format!(
            "endpointslices.discovery.k8s.io is forbidden: {user} cannot watch resource \"endpointslices\" in API \
             group \"discovery.k8s.io\" at the cluster scope"
        )
    );
    assert_eq!(
        message("/api/v1/nodes/node1"),
        format!(
            "nodes \"node1\" is forbidden: {user} cannot get resource \"nodes\" in API group \"\" at the cluster scope"
        )
    );
}

#[test]
fn gone_is_said_of_the_page_the_list_or_the_watch() {
    let server = server_with(&["a", "b"]);
    let first = get(&server, &format!("{SERVICES}?limit=1")).json();
    let token = first["metadata"]["continue"].as_str().unwrap();
    server.inject(Fault::new(Kind::Gone).on(Verb::Continue));
    assert_eq!(get(&server, SERVICES).code, 200, "only pages after the first");
    let page = get(&server, &format!("{SERVICES}?limit=1&continue={token}"));
    assert_eq!(page.code, 410);
    let again = page.json()["metadata"]["continue"].as_str().unwrap().to_owned();
    server.heal();
    assert_eq!(names(&get(&server, &format!("{SERVICES}?continue={again}")).json()), ["b"]);
    server.inject(Fault::new(Kind::Gone).on(Verb::Watch));
    assert_eq!(get(&server, &format!("{SERVICES}?watch=1&resourceVersion=101")).code, 410);
    assert_eq!(get(&server, SERVICES).code, 200);
}

#[test]
fn a_stream_that_is_open_ends_with_gone_at_once() {
    let server = server_with(&["a"]);
    let watch = open_watch(&server);
    server.inject(Fault::new(Kind::GoneInStream).times(1));
    let (events, end) = watch.events();
    assert_eq!(end, End::Whole);
    let [error] = &events[..] else { panic!("{events:?}") };
    assert_eq!(
        (&error["type"], &error["object"]["code"], &error["object"]["reason"]),
        (&json!("ERROR"), &json!(410), &json!("Expired"))
    );
    assert_over(&server);
}

#[test]
fn silence_is_no_answer_on_an_open_connection() {
    for path in [SERVICES.to_owned(), format!("{SERVICES}?watch=1")] {
        let server = server_failing(Kind::Silence);
        assert_eq!(try_get(&server, &path, SILENCE).unwrap_err(), End::Silent);
        assert_eq!(server.requests()[0].status, None);
        assert_over(&server);
    }
}

#[test]
fn a_stalled_list_has_its_headers_and_the_bytes_asked_for_and_no_end() {
    for after in [0, 100] {
        let server = server_failing(Kind::Stall { after });
        let answer = get(&server, SERVICES);
        answer.be_patient_for(SILENCE);
        let length: usize = answer.headers["content-length"].parse().unwrap();
        let (body, end) = answer.rest();
        assert_eq!((body.len(), end), (after, End::Silent));
        assert!(length > after);
        assert_over(&server);
    }
}

#[test]
fn a_stalled_watch_is_open_and_says_no_more_than_the_bytes_asked_for() {
    for after in [0, 30] {
        let server = server_with(&["a"]);
        let watch = get(
            &server,
            &format!("{SERVICES}?watch=1&timeoutSeconds=1&resourceVersion={}", server.resource_version()),
        );
        server.inject(Fault::new(Kind::Stall { after }).times(1));
        touch(&server, "a", "1");
        touch(&server, "a", "2");
        watch.be_patient_for(Duration::from_millis(1_500));
        let (body, end) = watch.rest();
        assert_eq!((body.len(), end), (after, End::Silent), "not even its timeout ends it");
        assert_over(&server);
    }
}

#[test]
fn a_cut_body_is_whole_http_and_half_json() {
    let server = server_failing(Kind::Cut);
    let (body, end) = get(&server, SERVICES).rest();
    assert_eq!(end, End::Whole);
    let error = serde_json::from_slice::<Value>(&body).unwrap_err();
    assert!(error.is_eof(), "{error}");
    assert_over(&server);
}

#[test]
fn a_cut_stream_ends_cleanly_in_the_middle_of_the_line_that_is_due() {
    let server = server_with(&["a"]);
    let mut watch = open_watch(&server);
    touch(&server, "a", "1");
    assert_eq!(watch.change().0, "MODIFIED", "what came before is whole");
    server.inject(Fault::new(Kind::Cut).times(1));
    assert_eq!(watch.line().unwrap_err(), ("{\"type\":\"BOOKMARK\",\"".to_owned(), End::Whole));
    let from = server.resource_version();
    touch(&server, "a", "2");
    server.inject(Fault::new(Kind::Cut).times(1));
    let mut watch = get(&server, &format!("{SERVICES}?watch=1&resourceVersion={from}"));
    assert_eq!(watch.line().unwrap_err(), ("{\"type\":\"MODIFIED\",\"".to_owned(), End::Whole));
    assert_over(&server);
}

#[test]
fn a_disconnected_list_is_shorter_than_its_length_says() {
    let server = server_failing(Kind::Disconnect);
    let answer = get(&server, SERVICES);
    let length: usize = answer.headers["content-length"].parse().unwrap();
    let (body, end) = answer.rest();
    assert_eq!((body.len(), end), (length / 2, End::Broken));
    assert_over(&server);
}

#[test]
fn a_disconnected_stream_has_no_last_chunk() {
    let server = server_with(&["a"]);
    let mut watch = open_watch(&server);
    server.inject(Fault::new(Kind::Disconnect).times(1));
    assert_eq!(watch.line().unwrap_err(), ("{\"type\":\"BOOKMARK\",\"".to_owned(), End::Broken));
    assert_over(&server);
}

#[test]
fn nonsense_is_no_json_or_other_json_or_a_web_page() {
    for (kind, is_json, content_type) in [
        (Kind::NotJson, false, "application/json"),
        (Kind::OtherShape, true, "application/json"),
        (Kind::Html, false, "text/html; charset=utf-8"),
    ] {
        let server = server_failing(kind);
        let answer = get(&server, SERVICES);
        assert_eq!((answer.code, answer.content_type()), (200, content_type));
        let (body, end) = answer.rest();
        assert_eq!(end, End::Whole);
        let body = serde_json::from_slice::<Value>(&body);
        assert_eq!(body.is_ok(), is_json);
        assert!(body.is_err() || !body.unwrap()["items"].is_array());
        assert_over(&server);
    }
    let server = server_failing(Kind::Html);
    assert_eq!(get(&server, &format!("{SERVICES}?watch=1")).content_type(), "text/html; charset=utf-8");
}

#[test]
fn a_line_of_nonsense_comes_between_events_that_are_right() {
    for (kind, is_json) in [(Kind::NotJson, false), (Kind::OtherShape, true)] {
        let server = server_with(&["a"]);
        let mut watch = open_watch(&server);
        touch(&server, "a", "1");
        assert_eq!(watch.change().0, "MODIFIED");
        server.inject(Fault::new(kind).times(1));
        let line = watch.line().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).is_ok(), is_json, "{line}");
        touch(&server, "a", "2");
        assert_eq!(watch.change().0, "MODIFIED");
    }
}

#[test]
fn a_drip_brings_the_right_bytes_slowly() {
    let drip = Kind::Drip { piece: 50, pause: Duration::from_millis(10) };
    let server = server_failing(drip);
    let started = Instant::now();
    let list = get(&server, SERVICES).json();
    let least = Duration::from_millis(10) * u32::try_from(list.to_string().len() / 50).unwrap();
    assert!(started.elapsed() >= least, "{:?} < {least:?}", started.elapsed());
    assert_eq!(list, get(&server, SERVICES).json());

    let mut watch = open_watch(&server);
    server.inject(Fault::new(drip).times(1));
    let started = Instant::now();
    touch(&server, "a", "1");
    assert_eq!(watch.change().0, "MODIFIED");
    assert!(started.elapsed() >= Duration::from_millis(40), "{:?}", started.elapsed());
}

#[test]
fn duplicates_are_an_old_object_added_again_and_every_event_twice() {
    let server = server_with(&["a", "b"]);
    let mut watch = open_watch(&server);
    server.inject(Fault::new(Kind::Duplicates).times(1));
    assert_eq!(watch.change(), ("ADDED".to_owned(), "a".to_owned(), 101));
    touch(&server, "b", "1");
    let once = watch.event();
    assert_eq!(once["type"], "MODIFIED");
    assert_eq!(watch.event(), once);
    server.delete("Service", "default", "b").unwrap();
    assert_eq!([watch.change().0, watch.change().0], ["DELETED", "DELETED"]);
}

#[test]
fn a_reset_cuts_watches_and_starts_again_lower_with_the_same_objects() {
    let server = server_with(&["a", "b"]);
    let (before, uid) = (server.resource_version(), server.get("Service", "default", "a").unwrap());
    let watch = open_watch(&server);
    server.reset_history();
    assert_eq!(watch.events(), (vec![], End::Broken));
    let list = get(&server, SERVICES).json();
    assert!(server.resource_version() < before);
    assert_eq!(list["metadata"]["resourceVersion"], server.resource_version().to_string());
    assert_eq!(list["items"][0]["metadata"]["uid"], uid["metadata"]["uid"]);
    assert_over(&server);
}

#[test]
fn a_restored_backup_has_other_objects_at_the_same_resource_versions() {
    let server = server_with(&["a"]);
    let backup = server.backup();
    let watch = open_watch(&server);
    server.apply(service("b")).unwrap();
    let seen = server.resource_version();
    server.restore(&backup);
    let (events, end) = watch.events();
    assert!(events.len() <= 1, "{events:?}");
    assert_eq!(end, End::Broken);
    assert_eq!(names(&get(&server, SERVICES).json()), ["a"]);
    server.apply(service("c")).unwrap();
    assert_eq!(server.resource_version(), seen);
}

#[test]
fn a_compaction_ends_no_watch_and_lets_none_begin_before() {
    let server = server_with(&["a"]);
    let past = server.resource_version();
    let mut watch = open_watch(&server);
    touch(&server, "a", "1");
    server.compact();
    touch(&server, "a", "2");
    assert_eq!([watch.change().2, watch.change().2], [past + 1, past + 2]);
    let (events, end) = get(&server, &format!("{SERVICES}?watch=1&resourceVersion={past}")).events();
    assert_eq!((&events[0]["object"]["code"], end), (&json!(410), End::Whole));
}

#[test]
fn down_cuts_and_refuses_and_up_is_the_same_address_again() {
    let server = server_with(&["a"]);
    let address = server.address();
    for _ in 0..3 {
        let watch = open_watch(&server);
        server.down().unwrap();
        server.down().unwrap();
        assert_eq!(watch.events().1, End::Broken);
        assert_eq!(server.watchers(Resource::Services), 0);
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        server.up().unwrap();
        server.up().unwrap();
        assert_eq!(server.address(), address);
        assert_over(&server);
    }
    drop(server);
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_fault_is_counted_and_keeps_to_its_resource_verb_and_times() {
    let server = server_with(&["a"]);
    let fault = server.inject(Fault::new(Kind::InternalError).of(Resource::Services).on(Verb::List).times(2));
    assert_eq!(get(&server, SLICES).code, 200);
    assert_eq!(get(&server, &format!("{SERVICES}?watch=1")).code, 200);
    let codes = [(); 3].map(|()| get(&server, SERVICES).code);
    assert_eq!(codes, [500, 500, 200]);
    assert_eq!(server.hits(fault), 2);
    let statuses: Vec<_> = server.requests().iter().map(|request| request.status.unwrap()).collect();
    assert_eq!(statuses, [200, 200, 500, 500, 200]);
}

#[test]
fn after_any_sequence_of_misfortunes_the_server_is_well_again() {
    for seed in 1..=4 {
        let server = server_with(&["a", "b", "c"]);
        let mut open = Vec::new();
        for step in Step::sequence(seed).take(40) {
            server.play(step).unwrap();
            touch(&server, "a", &step.to_string());
            for path in [SERVICES.to_owned(), format!("{SLICES}?watch=1"), format!("{SERVICES}?watch=1")] {
                // Whatever comes of it.
                open.push(try_get(&server, &path, Duration::from_millis(20)));
            }
        }
        server.heal();
        drop(open);
        let gone = || Resource::ALL.iter().all(|resource| server.watchers(*resource) == 0);
        until(&format!("all watches are over, seed {seed}"), gone);
        assert_over(&server);
    }
}
