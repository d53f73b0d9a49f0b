use std::{any::Any, sync::Weak};

use proptest::prelude::*;
use proxier_localv1::{Endpoint, IpSet, Service};

use super::{reference::World, *};
use crate::{
    model::{Family, testing::mk_name},
    sink::export::Pod,
};

impl Store {
    /// What there is of each Service: it lives while anybody has it, be it the store or a batch.
    pub(in crate::sink::api) fn versions(&self) -> Vec<Weak<dyn Any + Send + Sync>> {
        let entries = self.services.values().cloned();
        entries.map(|entry| Arc::downgrade(&(entry as Arc<dyn Any + Send + Sync>))).collect()
    }
}

fn service(name: &str) -> Exported {
    Exported {
        service: Service { namespace: "default".to_owned(), name: name.to_owned(), ..Service::default() },
        endpoints: Vec::new(),
    }
}

fn endpoint(pod: &str, address: &str, node: &str) -> ExportedEndpoint {
    ExportedEndpoint {
        pod: Pod::Named(mk_name(pod)),
        family: Family::V4,
        node: Some(NodeName::new(node)),
        draining: false,
        common: Endpoint {
            ips: Some(IpSet { v4: vec![address.to_owned()], v6: Vec::new() }),
            ..Endpoint::default()
        },
    }
}

fn client(node: &str) -> Client {
    Client { node: NodeName::new(node), draining: false }
}

/// The steps of a batch, a word each.
fn told(store: &Store, client: &Client, seen: Option<Revision>) -> Vec<String> {
    let Some(batch) = store.batch(client, seen) else { return vec!["forgotten".to_owned()] };
    batch
        .items()
        .map(|item| match item.op.unwrap() {
            Op::Reset(_) => "reset".to_owned(),
            Op::Sync(_) => "sync".to_owned(),
            Op::Set(value) => format!("set {}", value.r#ref.unwrap().path),
            Op::Delete(place) => format!("delete {}", place.path),
        })
        .collect()
}

fn put(store: &mut Store, name: &str, exported: Option<Exported>) -> Revision {
    store.put([(mk_name(name), exported)])
}

#[test]
fn who_has_seen_nothing_gets_everything_and_who_has_seen_everything_nothing() {
    let mut store = Store::new(10);
    assert_eq!(told(&store, &client("node1"), None), ["reset", "sync"]);
    let web = Exported { endpoints: vec![endpoint("a", "11.0.1.1", "node1")], ..service("web") };
    let seen = put(&mut store, "web", Some(web.clone()));
    let everything = ["reset", "set default/web", "set default/web/a.v4", "sync"];
    assert_eq!(told(&store, &client("node1"), None), everything);
    assert!(store.batch(&client("node1"), Some(seen)).unwrap().is_empty());
    assert_eq!(put(&mut store, "web", Some(web)), seen, "the same again");
}

#[test]
fn what_has_not_changed_is_not_told_again() {
    let mut store = Store::new(10);
    let pods = |second| Exported {
        endpoints: vec![endpoint("a", "11.0.1.1", "node1"), endpoint("b", second, "node2")],
        ..service("web")
    };
    let seen = put(&mut store, "web", Some(pods("11.0.1.2")));
    put(&mut store, "web", Some(pods("11.0.1.3")));
    assert_eq!(told(&store, &client("node1"), Some(seen)), ["set default/web/b.v4", "sync"]);
}

#[test]
fn what_goes_goes_before_its_service_and_is_told_to_those_who_knew_it() {
    let mut store = Store::new(10);
    let web = Exported { endpoints: vec![endpoint("a", "11.0.1.1", "node1")], ..service("web") };
    let seen = put(&mut store, "web", Some(web.clone()));
    put(&mut store, "web", None);
    let gone = ["delete default/web/a.v4", "delete default/web", "sync"];
    assert_eq!(told(&store, &client("node1"), Some(seen)), gone);

    let seen = store.revision;
    put(&mut store, "mail", Some(service("mail")));
    put(&mut store, "mail", None);
    assert!(store.batch(&client("node1"), Some(seen)).unwrap().is_empty(), "it has come and gone meanwhile");
}

#[test]
fn a_service_that_went_and_came_back_with_other_pods_replaces_the_former_one() {
    let mut store = Store::new(10);
    let pods = |pod| Exported { endpoints: vec![endpoint(pod, "11.0.1.1", "node1")], ..service("web") };
    let seen = put(&mut store, "web", Some(pods("a")));
    put(&mut store, "web", None);
    put(&mut store, "web", Some(pods("b")));
    let steps = ["set default/web", "set default/web/b.v4", "delete default/web/a.v4", "sync"];
    assert_eq!(told(&store, &client("node1"), Some(seen)), steps);
}

#[test]
fn pods_that_take_no_traffic_of_a_node_are_not_told_there() {
    let mut store = Store::new(10);
    let mut web = Exported {
        endpoints: vec![endpoint("a", "11.0.1.1", "node1"), endpoint("b", "11.0.2.1", "node2")],
        ..service("web")
    };
    web.service.internal_traffic_to_local = true;
    web.service.external_traffic_to_local = true;
    let seen = put(&mut store, "web", Some(web.clone()));
    let here = ["reset", "set default/web", "set default/web/a.v4", "sync"];
    assert_eq!(told(&store, &client("node1"), None), here);

    // Nothing of it is any business of the others.
    web.endpoints[1] = endpoint("b", "11.0.2.2", "node2");
    let changed = put(&mut store, "web", Some(web.clone()));
    assert!(store.batch(&client("node1"), Some(seen)).unwrap().is_empty());
    web.endpoints.pop();
    put(&mut store, "web", Some(web.clone()));
    assert!(store.batch(&client("node1"), Some(changed)).unwrap().is_empty());

    // Now it is, and then not any more.
    web.endpoints.push(endpoint("b", "11.0.2.2", "node2"));
    web.service.external_traffic_to_local = false;
    let seen = put(&mut store, "web", Some(web.clone()));
    assert!(told(&store, &client("node1"), Some(changed)).contains(&"set default/web/b.v4".to_owned()));
    web.service.external_traffic_to_local = true;
    put(&mut store, "web", Some(web));
    assert!(told(&store, &client("node1"), Some(seen)).contains(&"delete default/web/b.v4".to_owned()));
}

#[test]
fn a_pod_that_drains_has_gone_for_all_but_those_of_its_node_who_want_to_know() {
    let mut store = Store::new(10);
    let web = |draining| Exported {
        endpoints: vec![ExportedEndpoint { draining, ..endpoint("a", "11.0.1.1", "node1") }],
        ..service("web")
    };
    let seen = put(&mut store, "web", Some(web(false)));
    put(&mut store, "web", Some(web(true)));
    for (node, draining, step) in [
        ("node1", false, "delete default/web/a.v4"),
        ("node1", true, "set default/web/a.v4"),
        ("node2", true, "delete default/web/a.v4"),
    ] {
        let client = Client { draining, ..client(node) };
        assert_eq!(told(&store, &client, Some(seen)), [step, "sync"], "{node} {draining}");
    }
}

#[test]
fn who_has_not_asked_for_so_long_that_something_is_forgotten_has_to_start_over() {
    let mut store = Store::new(2);
    let seen = put(&mut store, "a", Some(service("a")));
    for name in ["b", "c", "d"] {
        put(&mut store, name, Some(service(name)));
    }
    put(&mut store, "b", None);
    put(&mut store, "c", None);
    assert_ne!(told(&store, &client("node1"), Some(seen)), ["forgotten"]);
    let later = put(&mut store, "d", None);
    assert_eq!(told(&store, &client("node1"), Some(seen)), ["forgotten"]);
    assert_eq!(told(&store, &client("node1"), None), ["reset", "set default/a", "sync"]);
    assert!(store.batch(&client("node1"), Some(later)).unwrap().is_empty());
    assert_eq!(store.services.len(), 3, "a, and c and d, which are remembered");
    assert_eq!(store.by_revision.len(), 3);
}

#[test]
fn who_has_seen_everything_is_told_of_whatever_goes_at_once() {
    let mut store = Store::new(2);
    let pods = (0..9).map(|n| endpoint(&format!("p{n}"), "11.0.1.1", "node1")).collect();
    let seen = put(&mut store, "web", Some(Exported { endpoints: pods, ..service("web") }));
    put(&mut store, "web", None);
    let steps = told(&store, &client("node1"), Some(seen));
    assert_eq!(steps.iter().filter(|step| step.starts_with("delete")).count(), 10, "{steps:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<(u8, Option<Exported>)>),
    Ask(usize),
}

fn exported() -> impl Strategy<Value = Exported> {
    let pods = prop::collection::btree_map(0u8..4, (0u8..2, 0u8..3, any::<bool>()), 0..4);
    (any::<bool>(), any::<bool>(), 0u8..2, pods).prop_map(|(internal, external, kind, pods)| {
        let mut exported = service("any");
        exported.service.internal_traffic_to_local = internal;
        exported.service.external_traffic_to_local = external;
        exported.service.r#type = kind.to_string();
        exported.endpoints = pods
            .into_iter()
            .map(|(pod, (address, node, draining))| ExportedEndpoint {
                draining,
                ..endpoint(&format!("p{pod}"), &format!("11.0.0.{address}"), &format!("node{node}"))
            })
            .collect();
        exported
    })
}

fn step() -> impl Strategy<Value = Step> {
    let put = prop::collection::vec((0u8..4, prop::option::weighted(0.7, exported())), 1..3);
    prop_oneof![put.prop_map(Step::Put), (0usize..4).prop_map(Step::Ask)]
}

proptest! {
    #[test]
    fn whoever_asks_whenever_has_what_is_there(steps in prop::collection::vec(step(), 0..60), max_gone in 0usize..6) {
        let mut world = World::new(max_gone);
        for step in steps {
            match step {
                Step::Put(services) => {
                    let named = services.into_iter().map(|(n, exported)| (mk_name(&format!("s{n}")), exported));
                    world.put(named.collect());
                }
                Step::Ask(which) => world.ask(which),
            }
        }
        world.finish();
    }

    #[test]
    fn whatever_bytes_come_everybody_has_what_is_there(data in prop::collection::vec(any::<u8>(), 0..400)) {
        super::reference::watch(&data);
    }
}
