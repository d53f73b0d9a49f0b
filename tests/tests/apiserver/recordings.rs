//! The double against what kube-apiserver v1.36.2 said to the same requests (`tests/recordings/apiserver`), with the
//! same objects. Objects keep the uids and times of the recording, so only what the double does not have is left out:
//! who manages which field, and headers of flow control. Where the real server indents, the JSON is compared.

use std::{fs, path::Path, time::Duration};

use proxier_tests::apiserver::ApiServer;
use serde_json::{Value, json};

use super::{
    objects::{LABEL, SERVICES, SLICES},
    wire::{Answer, End, PATIENCE, Request, get, send},
};

const SELECTED: &str = "labelSelector=service.kubernetes.io%2Fservice-proxy-name%3Dkpng-example";

struct Recording {
    code: u16,
    content_type: String,
    cache_control: String,
    body: String,
}

impl Recording {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings/apiserver").join(name);
        let text = fs::read_to_string(&path).unwrap().replace("\r\n", "\n");
        let (head, body) = text.split_once("\n\n").unwrap();
        let header = |name: &str| {
            head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap().to_owned()
        };
        Self {
            code: head.split(' ').nth(1).unwrap().parse().unwrap(),
            content_type: header("content-type"),
            cache_control: header("cache-control"),
            body: body.to_owned(),
        }
    }

    fn json(&self) -> Value {
        without_managers(serde_json::from_str(&self.body).unwrap())
    }

    fn events(&self) -> Vec<Value> {
        let lines = self.body.lines().filter(|line| !line.is_empty());
        lines.map(|line| without_managers(serde_json::from_str(line).unwrap())).collect()
    }

    /// Fails unless the heads are alike.
    fn assert_head(&self, answer: &Answer) {
        assert_eq!(answer.code, self.code);
        assert_eq!(answer.content_type(), self.content_type);
        assert_eq!(answer.headers["cache-control"], self.cache_control);
    }

    /// Fails unless the answer is this, as JSON.
    fn assert_is(&self, answer: Answer) {
        self.assert_head(&answer);
        assert_eq!(without_managers(answer.json()), self.json());
    }
}

fn without_managers(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            fields.remove("managedFields");
            for field in fields.values_mut() {
                *field = without_managers(field.take());
            }
        }
        Value::Array(items) => {
            for item in items {
                *item = without_managers(item.take());
            }
        }
        _ => {}
    }
    value
}

fn typed(mut object: Value, kind: &str, api_version: &str) -> Value {
    object["kind"] = kind.into();
    object["apiVersion"] = api_version.into();
    object
}

/// The recorded Service as the real server has it, at its resourceVersion.
fn recorded_service() -> Value {
    typed(Recording::read("services-list.http").json()["items"][0].take(), "Service", "v1")
}

/// A server as the recorded one was when it was asked.
fn recorded_server() -> ApiServer {
    let server = ApiServer::start().unwrap();
    server.skip_to(634).unwrap();
    server.apply(recorded_service()).unwrap();
    let slice = Recording::read("endpointslices-list-page1.http").json()["items"][0].take();
    let slice = typed(slice, "EndpointSlice", "discovery.k8s.io/v1");
    server.apply(slice.clone()).unwrap();
    // The second page, of which there is no recording.
    let mut other = slice;
    other["metadata"]["name"] = "kpng-example-zzzzz".into();
    other["metadata"]["uid"] = Value::Null;
    server.apply(other).unwrap();
    server.skip_to(650).unwrap();
    server
}

#[test]
fn a_list_of_services() {
    let answer = get(&recorded_server(), &format!("{SERVICES}?{SELECTED}&limit=500"));
    Recording::read("services-list.http").assert_is(answer);
}

#[test]
fn the_first_page_of_a_list_of_slices() {
    let answer = get(&recorded_server(), &format!("{SLICES}?{SELECTED}&limit=1"));
    Recording::read("endpointslices-list-page1.http").assert_is(answer);
}

#[test]
fn a_second_page_that_has_expired() {
    let server = recorded_server();
    let recording = Recording::read("endpointslices-list-page1.http").json();
    let token = recording["metadata"]["continue"].as_str().unwrap();
    server.skip_to(651).unwrap();
    server.compact();
    let answer = get(&server, &format!("{SLICES}?{SELECTED}&limit=1&continue={token}"));
    Recording::read("endpointslices-list-expired-continue.http").assert_is(answer);
}

/// The recorded request had a resourceVersion, as there are no synthetic events.
#[test]
fn a_watch_whose_service_loses_and_gets_back_its_label() {
    let server = recorded_server();
    // For the two bookmarks: one in between, one before the end.
    server.set_bookmark_interval(Duration::from_secs(2));
    let path = format!(
        "{SERVICES}?watch=1&{SELECTED}&allowWatchBookmarks=true&timeoutSeconds=3&resourceVersion=650"
    );
    let answer = get(&server, &path);
    let (with_label, mut without_label) = (recorded_service(), recorded_service());
    without_label["metadata"]["labels"].as_object_mut().unwrap().remove(LABEL).unwrap();
    server.apply(without_label).unwrap();
    server.skip_to(654).unwrap();
    server.apply(with_label.clone()).unwrap();
    server.skip_to(659).unwrap();
    let mut annotated = with_label;
    annotated["metadata"]["annotations"]["a"] = "b".into();
    server.apply(annotated).unwrap();

    let recording = Recording::read("services-watch-label-toggle.http");
    recording.assert_head(&answer);
    let (events, end) = answer.events();
    assert_eq!(events, recording.events());
    assert_eq!(end, End::Whole);
}

#[test]
fn a_watch_from_what_is_compacted() {
    let server = recorded_server();
    server.skip_to(676).unwrap();
    server.compact();
    let answer = get(&server, &format!("{SERVICES}?watch=1&{SELECTED}&resourceVersion=400"));
    let recording = Recording::read("services-watch-too-old.http");
    recording.assert_head(&answer);
    assert_eq!(answer.events(), (recording.events(), End::Whole));
}

#[test]
fn a_watch_list_that_the_storage_cannot_do() {
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let answer = get(&recorded_server(), &format!("{SLICES}?{query}&{SELECTED}"));
    let recording = Recording::read("endpointslices-watchlist.http");
    recording.assert_head(&answer);
    assert_eq!(answer.events(), (recording.events(), End::Whole));
}

#[test]
fn a_watch_list_without_the_parameter_that_it_needs() {
    let answer = get(&recorded_server(), &format!("{SERVICES}?watch=1&sendInitialEvents=true&{SELECTED}"));
    Recording::read("services-watchlist-bad-request.http").assert_is(answer);
}

#[test]
fn a_wrong_token() {
    let request = Request { method: "GET", token: Some("wrong"), content_type: "", body: "" };
    for path in [SERVICES, SLICES, "/version"] {
        let answer = send(&recorded_server(), path, &request, PATIENCE).unwrap();
        Recording::read("unauthorized.http").assert_is(answer);
    }
}

#[test]
fn every_recording_is_held_against_the_double() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings/apiserver");
    let source = include_str!("recordings.rs");
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(source.contains(&format!("{name:?}")), "no test reads {name}");
        count += 1;
    }
    assert_eq!(count, 8);
}

#[test]
fn the_comparison_sees_a_difference_anywhere_but_in_managed_fields() {
    let left = json!({"metadata": {"managedFields": [1], "name": "a"}, "items": [{"managedFields": []}]});
    let mut right = json!({"metadata": {"managedFields": [2], "name": "a"}, "items": [{}]});
    assert_eq!(without_managers(left.clone()), without_managers(right.clone()));
    right["metadata"]["name"] = "b".into();
    assert_ne!(without_managers(left), without_managers(right));
}
