//! What objects at an API server mean for a node: every row of the table in docs, driven over HTTP, against the double or a real
//! cluster (`PROXIER_TEST_KUBECONFIG`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[allow(dead_code, reason = "each test program uses its part")]
mod cluster;

use std::collections::BTreeSet;

use proxier::{
    catalog::Catalog,
    desired::{ServiceKey, compute},
    model::{Family, Protocol},
};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Observer, as_paths, paths};

/// A cluster with a Service `web` of one external address and one pod on this node, and who watches it from there.
async fn web() -> (Cluster, Observer) {
    let cluster = Cluster::start().await;
    cluster.apply(cluster.node_object(1, "192.168.77.1")).await;
    cluster.apply(cluster.service("web", &["203.0.113.55"])).await;
    cluster.apply(cluster.slice("web-1", "web", &[cluster.endpoint("10.244.1.2", 1)])).await;
    let mut node = Observer::start(&cluster.options(), &cluster.node(1)).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2"])]).await;
    (cluster, node)
}

/// Waits until a Service's addresses lead to these pods.
async fn expect<const N: usize>(
    cluster: &Cluster,
    node: &mut Observer,
    service: &str,
    wanted: [(&str, &[&str]); N],
) {
    let (name, wanted) = (cluster.name(service), as_paths(wanted));
    node.until_desired(&format!("{service}: {wanted:?}"), |desired| paths(desired, &name) == wanted).await;
}

fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    *object.pointer_mut(pointer).unwrap() = value;
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_goes_and_comes_back_takes_the_service_away_and_back() {
    let (cluster, mut node) = web().await;
    let service = cluster.service("web", &["203.0.113.55"]);
    cluster
        .apply(with(
            service.clone(),
            "/metadata/labels",
            json!({"service.kubernetes.io/service-proxy-name": "other"}),
        ))
        .await;
    expect(&cluster, &mut node, "web", []).await;
    cluster.apply(service).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2"])]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_deleted_and_made_again_is_another_one_of_its_name() {
    let (cluster, mut node) = web().await;
    let uid = |node: &Observer| node.catalog.service(&cluster.name("web")).unwrap().uid.clone();
    let first = uid(&node);
    cluster.delete("Service", "web").await;
    expect(&cluster, &mut node, "web", []).await;
    cluster.apply(cluster.service("web", &["203.0.113.56"])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.56", &["10.244.1.2"])]).await;
    assert_ne!(uid(&node), first);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_slices_of_a_service_and_both_families_count() {
    let (cluster, mut node) = web().await;
    cluster.apply(cluster.service("web", &["203.0.113.55", "2001:db8::55"])).await;
    cluster.apply(cluster.slice("web-2", "web", &[cluster.endpoint("10.244.1.3", 1)])).await;
    cluster.apply(cluster.slice("web-6", "web", &[cluster.endpoint("fd00:244::2", 1)])).await;
    let v4: &[&str] = &["10.244.1.2", "10.244.1.3"];
    expect(&cluster, &mut node, "web", [("203.0.113.55", v4), ("2001:db8::55", &["fd00:244::2"])]).await;
    cluster.delete("EndpointSlice", "web-2").await;
    let one: &[&str] = &["10.244.1.2"];
    expect(&cluster, &mut node, "web", [("203.0.113.55", one), ("2001:db8::55", &["fd00:244::2"])]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_other_nodes_do_not_count() {
    let (cluster, mut node) = web().await;
    let endpoints = [cluster.endpoint("10.244.1.2", 1), cluster.endpoint("10.244.2.2", 2)];
    cluster.apply(cluster.slice("web-1", "web", &endpoints)).await;
    cluster.apply(cluster.slice("web-2", "web", &[cluster.endpoint("10.244.1.9", 1)])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2", "10.244.1.9"])]).await;
    cluster.apply(cluster.slice("web-2", "web", &[cluster.endpoint("10.244.1.9", 2)])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2"])]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_ready_pod_those_that_end_but_serve_count() {
    let (cluster, mut node) = web().await;
    let ending = with(
        cluster.endpoint("10.244.1.2", 1),
        "/conditions",
        json!({"ready": false, "serving": true, "terminating": true}),
    );
    let unready = with(
        cluster.endpoint("10.244.1.3", 1),
        "/conditions",
        json!({"ready": false, "serving": false, "terminating": false}),
    );
    cluster.apply(cluster.slice("web-1", "web", &[ending.clone(), unready])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2"])]).await;
    cluster.apply(cluster.slice("web-1", "web", &[ending, cluster.endpoint("10.244.1.3", 1)])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.3"])]).await;
    cluster.end().await;
}

/// `publishNotReadyAddresses` is the slices' business: their controller says that such pods are ready.
#[tokio::test(flavor = "multi_thread")]
async fn pods_that_are_published_before_they_are_ready_count() {
    let (cluster, mut node) = web().await;
    let mut service = cluster.service("web", &["203.0.113.55"]);
    service["spec"]["publishNotReadyAddresses"] = json!(true);
    cluster.apply(service).await;
    let published = with(
        cluster.endpoint("10.244.1.4", 1),
        "/conditions",
        json!({"ready": true, "serving": false, "terminating": true}),
    );
    cluster.apply(cluster.slice("web-1", "web", &[published])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.4"])]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_of_load_balancers_count_unless_they_are_proxies() {
    let (cluster, mut node) = web().await;
    let mut service = cluster.service("web", &[]);
    service["spec"] = json!({"type": "LoadBalancer", "ports": [{"port": 6000}]});
    service["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "203.0.113.77"},
        {"ip": "203.0.113.78", "ipMode": "VIP"},
        {"ip": "203.0.113.79", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
    ]}});
    // A headless Service cannot become another type.
    cluster.delete("Service", "web").await;
    cluster.apply(service).await;
    let pods: &[&str] = &["10.244.1.2"];
    expect(&cluster, &mut node, "web", [("203.0.113.77", pods), ("203.0.113.78", pods)]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_a_node_is_given_back_when_the_node_goes() {
    let (cluster, mut node) = web().await;
    cluster.apply(cluster.service("web", &["203.0.113.55", "192.168.77.2"])).await;
    let pods: &[&str] = &["10.244.1.2"];
    expect(&cluster, &mut node, "web", [("203.0.113.55", pods), ("192.168.77.2", pods)]).await;
    cluster.apply(cluster.node_object(2, "192.168.77.2")).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", pods)]).await;
    cluster.delete("Node", &cluster.node(2)).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", pods), ("192.168.77.2", pods)]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_older_of_two_services_has_an_address_until_it_goes() {
    let (cluster, mut node) = web().await;
    // Times of creation have seconds.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    cluster.apply(cluster.service("a-younger-one", &["203.0.113.55"])).await;
    cluster.apply(cluster.slice("y-1", "a-younger-one", &[cluster.endpoint("10.244.1.7", 1)])).await;
    // What comes after it has been seen.
    cluster.apply(cluster.service("mark", &["203.0.113.99"])).await;
    expect(&cluster, &mut node, "mark", [("203.0.113.99", &[])]).await;
    expect(&cluster, &mut node, "web", [("203.0.113.55", &["10.244.1.2"])]).await;
    expect(&cluster, &mut node, "a-younger-one", []).await;
    cluster.delete("Service", "web").await;
    expect(&cluster, &mut node, "a-younger-one", [("203.0.113.55", &["10.244.1.7"])]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_objects_than_fit_a_page_are_all_there_at_once() {
    let cluster = Cluster::start().await;
    for number in 0..20 {
        let (name, external) = (format!("s{number}"), format!("203.0.113.{number}"));
        cluster.apply(cluster.service(&name, &[&external])).await;
        let pod = format!("10.244.1.{number}");
        cluster.apply(cluster.slice(&name, &name, &[cluster.endpoint(&pod, 1)])).await;
    }
    let mut node = Observer::start(&cluster.options(), &cluster.node(1)).await;
    let first = node.batches.recv().await.unwrap();
    node.absorb(first);
    assert_eq!(node.catalog.services().count(), 20);
    assert_eq!(node.catalog.slices().count(), 20);
    cluster.end().await;
}

/// What the API server writes into the objects, the agent assumes of those where nobody has written it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_fills_in_means_what_is_assumed_without_it() {
    let (cluster, mut node) = web().await;
    let mut service = cluster.service("web", &["203.0.113.55"]);
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    cluster.apply(service).await;
    // Neither conditions nor a protocol.
    let mut slice =
        cluster.slice("web-1", "web", &[json!({"addresses": ["10.244.1.2"], "nodeName": cluster.node(1)})]);
    slice["ports"] = json!([{"port": 6000}]);
    cluster.apply(slice).await;
    let key = ServiceKey { service: cluster.name("web"), family: Family::V4 };
    node.until_desired("three hours", |desired| {
        desired.services.get(&key).is_some_and(|service| {
            service.affinity_timeout == 10_800
                && service.pods == BTreeSet::from(["10.244.1.2".parse().unwrap()])
        })
    })
    .await;
    let ports_of = |catalog: &Catalog| catalog.slice(&cluster.name("web-1")).unwrap().ports.clone();
    node.until("a port", |catalog| !ports_of(catalog).is_empty()).await;
    assert_eq!(ports_of(&node.catalog)[0].protocol, Protocol::Tcp);
    let endpoints = &node.catalog.slice(&cluster.name("web-1")).unwrap().endpoints;
    assert!(endpoints[0].ready && endpoints[0].serving && !endpoints[0].terminating);
    cluster.end().await;
}

/// An address has many spellings, and the API server keeps the one that was written.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_the_same_however_it_is_written() {
    let (cluster, mut node) = web().await;
    cluster.apply(cluster.slice("web-6", "web", &[cluster.endpoint("fd00:244::2", 1)])).await;
    cluster.apply(cluster.service("web", &["2001:db8::55"])).await;
    expect(&cluster, &mut node, "web", [("2001:db8::55", &["fd00:244::2"])]).await;
    cluster.apply(cluster.service("a-younger-one", &["2001:DB8:0:0::55"])).await;
    // What comes after it has been seen.
    cluster.apply(cluster.service("mark", &["203.0.113.99"])).await;
    expect(&cluster, &mut node, "mark", [("203.0.113.99", &[])]).await;
    assert!(node.catalog.service(&cluster.name("a-younger-one")).is_some());
    let mut owners = compute(&node.catalog, &node.settings).0.services;
    owners.retain(|_, service| service.externals.contains(&"2001:db8::55".parse().unwrap()));
    assert_eq!(owners.len(), 1, "{owners:?}");
    cluster.end().await;
}

/// A source that sees nothing for a while is told all of it in the right order, whatever it has missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_late_sees_what_one_saw_that_was_there_all_the_time() {
    let (cluster, mut node) = web().await;
    cluster.apply(cluster.service("mail", &["203.0.113.56"])).await;
    cluster.apply(cluster.slice("mail-1", "mail", &[cluster.endpoint("10.244.1.3", 1)])).await;
    cluster.delete("EndpointSlice", "web-1").await;
    cluster.apply(cluster.service("web", &["203.0.113.57"])).await;
    expect(&cluster, &mut node, "web", [("203.0.113.57", &[])]).await;
    expect(&cluster, &mut node, "mail", [("203.0.113.56", &["10.244.1.3"])]).await;
    let mut late = Observer::start(&cluster.options(), &cluster.node(1)).await;
    expect(&cluster, &mut late, "mail", [("203.0.113.56", &["10.244.1.3"])]).await;
    // Nodes are everybody's in a real cluster.
    let of_this_test = |catalog: &Catalog| {
        (catalog.services().cloned().collect::<Vec<_>>(), catalog.slices().cloned().collect::<Vec<_>>())
    };
    assert_eq!(of_this_test(&late.catalog), of_this_test(&node.catalog));
    cluster.end().await;
}
