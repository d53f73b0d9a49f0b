//! Lists, pages, selections, watches and Events, where there is no recording: by the documented rules of the API.

use std::time::{Duration, Instant};

use proxier_tests::apiserver::{ApiServer, FutureWatch, Resource, Verb};
use serde_json::{Value, json};

use super::{
    objects::{LABEL, SERVICES, SLICES, names, server_with, service, slice, touch},
    wire::{End, PATIENCE, Request, get, send, until},
};

#[test]
fn pages_show_the_objects_as_they_were_when_the_first_was_asked_for() {
    let server = server_with(&["a", "b", "c", "d", "e"]);
    let first = get(&server, &format!("{SERVICES}?limit=2")).json();
    assert_eq!(names(&first), ["a", "b"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    server.delete("Service", "default", "d").unwrap();
    touch(&server, "c", "later");
    server.apply(service("bb")).unwrap();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let second = get(&server, &format!("{SERVICES}?limit=2&continue={token}")).json();
    assert_eq!(names(&second), ["c", "d"]);
    assert_eq!(second["items"][0]["metadata"].get("annotations"), None, "not yet touched");
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let token = second["metadata"]["continue"].as_str().unwrap();
    let third = get(&server, &format!("{SERVICES}?limit=2&continue={token}")).json();
    assert_eq!(names(&third), ["e"]);
    assert_eq!(third["metadata"].get("continue"), None);
    assert_eq!(names(&get(&server, SERVICES).json()), ["a", "b", "bb", "c", "e"]);
}

#[test]
fn the_token_of_an_expired_page_goes_on_with_what_is_there_now() {
    let server = server_with(&["a", "b", "c"]);
    let first = get(&server, &format!("{SERVICES}?limit=1")).json();
    server.apply(service("d")).unwrap();
    server.compact();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let expired = get(&server, &format!("{SERVICES}?limit=1&continue={token}"));
    assert_eq!(expired.code, 410);
    let token = expired.json()["metadata"]["continue"].as_str().unwrap().to_owned();
    let rest = get(&server, &format!("{SERVICES}?continue={token}")).json();
    assert_eq!(names(&rest), ["b", "c", "d"]);
}

#[test]
fn a_page_of_a_selection_can_be_the_last_and_empty() {
    let server = server_with(&["a"]);
    let mut other = service("b");
    other["metadata"]["labels"] = json!({});
    server.apply(other).unwrap();
    let first = get(&server, &format!("{SERVICES}?limit=1&labelSelector={LABEL}")).json();
    assert_eq!(names(&first), ["a"]);
    let token = first["metadata"]["continue"].as_str().unwrap();
    let second = get(&server, &format!("{SERVICES}?limit=1&labelSelector={LABEL}&continue={token}")).json();
    assert_eq!(second["items"], json!([]));
}

#[test]
fn lists_keep_to_selectors_and_namespaces() {
    let server = server_with(&["a", "b"]);
    let mut elsewhere = service("a");
    elsewhere["metadata"]["namespace"] = "shop".into();
    server.apply(elsewhere).unwrap();
    let count = |path: &str| get(&server, path).json()["items"].as_array().unwrap().len();
    assert_eq!(count(SERVICES), 3);
    assert_eq!(count("/api/v1/namespaces/shop/services"), 1);
    assert_eq!(count(&format!("{SERVICES}?labelSelector={LABEL}%3Dother")), 0);
    assert_eq!(count(&format!("{SERVICES}?labelSelector={LABEL}+in+(other,kpng-example)")), 3);
    assert_eq!(count(&format!("{SERVICES}?labelSelector=!{LABEL}")), 0);
    assert_eq!(count(&format!("{SERVICES}?fieldSelector=metadata.name%3Da")), 2);
    assert_eq!(get(&server, &format!("{SERVICES}?labelSelector=%3D")).code, 400);
}

#[test]
fn a_resource_version_of_a_list_is_a_minimum_or_exact() {
    let server = server_with(&["a"]);
    let past = server.resource_version();
    server.apply(service("b")).unwrap();
    let listed = |query: &str| {
        let list = get(&server, &format!("{SERVICES}?{query}")).json();
        names(&list).join(",")
    };
    assert_eq!(
        listed("resourceVersion=0&limit=1"),
        "a,b",
        "any revision comes from the cache, without pages"
    );
    assert_eq!(listed(&format!("resourceVersion={past}")), "a,b");
    assert_eq!(listed(&format!("resourceVersion={past}&resourceVersionMatch=NotOlderThan&limit=9")), "a,b");
    assert_eq!(listed(&format!("resourceVersion={past}&resourceVersionMatch=Exact")), "a");
    assert_eq!(listed(&format!("resourceVersion={past}&limit=9")), "a");
    server.compact();
    let gone = get(&server, &format!("{SERVICES}?resourceVersion={past}&resourceVersionMatch=Exact"));
    assert_eq!(gone.code, 410);
}

#[test]
fn a_list_from_the_future_times_out() {
    let server = server_with(&["a"]);
    let present = server.resource_version();
    let answer = get(&server, &format!("{SERVICES}?resourceVersion=5000"));
    assert_eq!((answer.code, answer.headers["retry-after"].as_str()), (504, "1"));
    let status = answer.json();
    assert_eq!(status["reason"], "Timeout");
    assert_eq!(status["message"], format!("Timeout: Too large resource version: 5000, current: {present}"));
    assert_eq!(status["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
}

#[test]
fn a_watch_without_resource_version_begins_with_what_is_there() {
    let server = server_with(&["b", "a"]);
    for query in ["watch=1", "watch=true&resourceVersion=0"] {
        let mut watch = get(&server, &format!("{SERVICES}?{query}"));
        assert_eq!(watch.change(), ("ADDED".to_owned(), "a".to_owned(), 102));
        assert_eq!(watch.change(), ("ADDED".to_owned(), "b".to_owned(), 101));
        touch(&server, "a", query);
        assert_eq!(watch.change().0, "MODIFIED");
        server.delete("Service", "default", "a").unwrap();
        let deleted = server.resource_version();
        assert_eq!(watch.change(), ("DELETED".to_owned(), "a".to_owned(), deleted));
        server.apply(service("a")).unwrap();
        assert_eq!(watch.change().0, "ADDED");
        // Back to the beginning, for the other spelling.
        server.restore(&server_backup());
    }
}

/// What [`server_with`] `["b", "a"]` has.
fn server_backup() -> proxier_tests::apiserver::Backup {
    server_with(&["b", "a"]).backup()
}

#[test]
fn a_watch_goes_on_from_a_resource_version_and_sees_only_its_resource() {
    let server = server_with(&["a"]);
    let from = server.resource_version();
    touch(&server, "a", "1");
    server.apply(slice("a-1", &[])).unwrap();
    touch(&server, "a", "2");
    let mut watch = get(&server, &format!("{SERVICES}?watch=1&resourceVersion={from}"));
    assert_eq!(watch.change(), ("MODIFIED".to_owned(), "a".to_owned(), from + 1));
    assert_eq!(watch.change(), ("MODIFIED".to_owned(), "a".to_owned(), from + 3));
    let mut slices = get(&server, &format!("{SLICES}?watch=1&resourceVersion={from}"));
    assert_eq!(slices.change(), ("ADDED".to_owned(), "a-1".to_owned(), from + 2));
}

#[test]
fn bookmarks_come_to_those_who_want_them_until_the_timeout_ends_the_stream() {
    let server = server_with(&["a"]);
    let from = server.resource_version();
    server.set_bookmark_interval(Duration::from_millis(300));
    let path = format!("{SERVICES}?watch=1&resourceVersion={from}&timeoutSeconds=1");
    let started = Instant::now();
    let (none, end) = get(&server, &path).events();
    assert_eq!((none, end), (vec![], End::Whole));
    assert!(started.elapsed() >= Duration::from_millis(950), "{:?}", started.elapsed());
    server.skip_to(5000).unwrap();
    let (bookmarks, end) = get(&server, &format!("{path}&allowWatchBookmarks=true")).events();
    assert_eq!(end, End::Whole);
    assert!((3..=4).contains(&bookmarks.len()), "every 300 ms and at 900: {bookmarks:?}");
    for bookmark in bookmarks {
        assert_eq!(bookmark["type"], "BOOKMARK");
        assert_eq!(
            bookmark["object"]["metadata"],
            json!({"resourceVersion": "5000"}),
            "also of what others changed"
        );
    }
}

#[test]
fn a_watch_from_the_future_is_silent_until_then_or_refused() {
    let server = server_with(&["a"]);
    let present = server.resource_version();
    server.set_bookmark_interval(Duration::from_millis(10));
    let path = format!("{SERVICES}?watch=1&allowWatchBookmarks=1&resourceVersion={}", present + 2);
    let mut watch = get(&server, &path);
    touch(&server, "a", "1");
    touch(&server, "a", "2");
    touch(&server, "a", "3");
    let change = loop {
        let change = watch.change();
        if change.0 != "BOOKMARK" {
            break change;
        }
        assert!(change.2 >= present + 2);
    };
    assert_eq!(change, ("MODIFIED".to_owned(), "a".to_owned(), present + 3), "what was before is never told");
    server.set_future_watch(FutureWatch::Refused);
    let (events, end) = get(&server, &format!("{SERVICES}?watch=1&resourceVersion=5000")).events();
    assert_eq!(
        (events[0]["type"].as_str(), &events[0]["object"]["code"], end),
        (Some("ERROR"), &json!(504), End::Whole)
    );
}

#[test]
fn an_unknown_path_is_not_found_as_the_real_server_says_it() {
    let server = server_with(&["a"]);
    let status = get(&server, "/api/v1/pods");
    assert_eq!(status.code, 404);
    assert_eq!(
        status.json(),
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "NotFound",
            "message": "the server could not find the requested resource", "details": {}, "code": 404,
        })
    );
    let plain = get(&server, "/apis/example.com/v1/things");
    assert_eq!((plain.code, plain.content_type()), (404, "text/plain; charset=utf-8"));
    assert_eq!(plain.rest().0, b"404 page not found\n");
    let object = get(&server, "/api/v1/namespaces/default/services/gone");
    assert_eq!(object.code, 404);
    assert_eq!(object.json()["message"], "services \"gone\" not found");
    let object = get(&server, "/api/v1/namespaces/default/services/a").json();
    assert_eq!(object, server.get("Service", "default", "a").unwrap());
    assert_eq!(get(&server, "/version").json()["gitVersion"], "v1.36.2");
}

#[test]
fn nobody_may_list_without_a_token() {
    let request = Request { method: "GET", token: None, content_type: "", body: "" };
    let server = server_with(&[]);
    let answer = send(&server, SERVICES, &request, PATIENCE).unwrap();
    assert_eq!(answer.code, 403);
    assert_eq!(
        answer.json()["message"],
        "services is forbidden: User \"system:anonymous\" cannot list resource \"services\" in API group \"\" at \
         the cluster scope"
    );
    assert_eq!(send(&server, "/version", &request, PATIENCE).unwrap().code, 200);
}

#[test]
fn an_old_token_is_wrong_once_there_is_another() {
    let server = server_with(&[]);
    let old = server.token();
    server.set_token("new");
    let request = Request { method: "GET", token: Some(&old), content_type: "", body: "" };
    assert_eq!(send(&server, SERVICES, &request, PATIENCE).unwrap().code, 401);
    assert_eq!(get(&server, SERVICES).code, 200);
}

#[test]
fn events_are_created_once_and_patched() {
    let server = server_with(&[]);
    let token = server.token();
    let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
    let send = |method, path: &str, content_type, body: &Value| {
        let body = body.to_string();
        send(&server, path, &Request { method, token: Some(&token), content_type, body: &body }, PATIENCE)
            .unwrap()
    };
    let event =
        json!({"metadata": {"name": "conflict.1"}, "reason": "Conflict", "type": "Warning", "note": "once"});
    let created = send("POST", path, "application/json", &event);
    assert_eq!(created.code, 201);
    assert_eq!(created.json()["metadata"]["namespace"], "shop");
    assert_eq!(send("POST", path, "application/json", &event).code, 409);
    let patch = json!({"series": {"count": 2}, "note": null});
    let one = format!("{path}/conflict.1");
    assert_eq!(send("PATCH", &one, "application/merge-patch+json", &patch).code, 200);
    let other = format!("{path}/other");
    assert_eq!(send("PATCH", &other, "application/merge-patch+json", &patch).code, 404);
    let [event] = &server.events()[..] else { panic!("{:?}", server.events()) };
    assert_eq!((&event["series"]["count"], &event["reason"]), (&json!(2), &json!("Conflict")));
    assert_eq!(event.get("note"), None);
    assert_eq!(send("POST", "/api/v1/namespaces/shop/services", "application/json", &service("a")).code, 403);
    assert_eq!(send("DELETE", &one, "", &json!({})).code, 405);
}

#[test]
fn every_request_is_written_down_and_open_watches_are_counted() {
    let server = server_with(&["a"]);
    get(&server, &format!("{SERVICES}?limit=1&labelSelector=app%3Dweb"));
    let watch = get(&server, &format!("{SLICES}?watch=1"));
    until("a watch is open", || server.watchers(Resource::EndpointSlices) == 1);
    assert_eq!(server.watchers(Resource::Services), 0);
    let requests = server.requests();
    let [list, watched] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((list.resource, list.verb, list.status), (Some(Resource::Services), Verb::List, Some(200)));
    assert_eq!(list.parameter("labelSelector"), Some("app=web"));
    assert_eq!(watched.verb, Verb::Watch);
    assert!(watched.at >= list.at);
    drop(watch);
    until("the watch is over", || server.watchers(Resource::EndpointSlices) == 0);
}

#[test]
fn manifests_of_many_documents_are_applied_and_wrong_ones_named() {
    let server = ApiServer::start().unwrap();
    server
        .apply_yaml("---\nkind: Node\nmetadata: {name: node1}\n---\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None}\n")
        .unwrap();
    assert_eq!(server.objects().len(), 2);
    assert_eq!(server.get("Service", "default", "a").unwrap()["spec"]["clusterIP"], "None");
    let error = server.apply_yaml("kind: Pod\nmetadata: {name: a}\n").unwrap_err();
    assert!(error.to_string().contains("Pod"), "{error}");
    let error = server.delete("Service", "default", "gone").unwrap_err();
    assert!(error.to_string().contains("default/gone"), "{error}");
}

#[test]
fn five_thousand_services_and_forty_thousand_endpoints_are_there_in_no_time() {
    let services: Vec<Value> = (0..5_000).map(|index| service(&format!("service-{index}"))).collect();
    let slices: Vec<Value> = (0..5_000)
        .map(|index| {
            let addresses: Vec<_> =
                (0..8).map(|host| format!("10.{}.{}.{host}", index / 250, index % 250)).collect();
            slice(&format!("slice-{index}"), &addresses)
        })
        .collect();
    let server = ApiServer::start().unwrap();
    let mut watch = get(&server, &format!("{SLICES}?watch=1&resourceVersion={}", server.resource_version()));
    let started = Instant::now();
    server.apply_all(services.iter().chain(&slices)).unwrap();
    let applied = started.elapsed();
    let mut listed = 0;
    let mut token = String::new();
    loop {
        let page = get(&server, &format!("{SERVICES}?limit=500&continue={token}")).json();
        listed += page["items"].as_array().unwrap().len();
        match page["metadata"]["continue"].as_str() {
            Some(next) => next.clone_into(&mut token),
            None => break,
        }
    }
    assert_eq!(listed, 5_000);
    for index in 0..5_000 {
        assert_eq!(watch.change().1, format!("slice-{index}"));
    }
    let all = started.elapsed();
    println!("applied in {applied:?}; with ten pages and five thousand events in {all:?}");
    assert!(all < Duration::from_secs(60), "{all:?}");
}
