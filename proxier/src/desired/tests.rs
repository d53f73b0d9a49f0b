use proptest::prelude::*;

use super::*;
use crate::model::{
    Endpoint, Object, Service, ServiceType, SessionAffinity, Severity,
    testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice},
};

fn desired(objects: impl IntoIterator<Item = Object>) -> (Desired, Vec<Problem>) {
    let mut catalog = Catalog::default();
    for object in objects {
        catalog.apply(object);
    }
    compute(&catalog, &Settings::new(NodeName::new("node1")))
}

fn key(name: &str, family: Family) -> ServiceKey {
    ServiceKey { service: mk_name(name), family }
}

pub(super) fn addresses(list: &[&str]) -> BTreeSet<IpAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

#[test]
fn each_family_has_its_own_externals_and_pods() {
    let (desired, problems) = desired([
        mk_service("web", ["10.0.0.55", "1000::55"]).into(),
        mk_slice("web-4", "web", [mk_endpoint("11.0.2.2", "node1"), mk_endpoint("11.0.1.2", "node2")]).into(),
        mk_slice("web-6", "web", [mk_endpoint("1100::202", "node1"), mk_endpoint("1100::102", "node2")])
            .into(),
    ]);
    assert_eq!(problems, []);
    assert_eq!(desired.services.len(), 2);
    for (family, external, pod) in
        [(Family::V4, "10.0.0.55", "11.0.2.2"), (Family::V6, "1000::55", "1100::202")]
    {
        let service = &desired.services[&key("web", family)];
        assert_eq!(service.externals, addresses(&[external]));
        assert_eq!(service.pods, addresses(&[pod]));
        assert_eq!(service.affinity_timeout, 10_800);
    }
}

#[test]
fn an_external_address_without_a_local_pod_stays_with_none() {
    let (desired, problems) = desired([
        mk_service("web", ["10.0.0.55"]).into(),
        mk_slice("web-4", "web", [mk_endpoint("11.0.1.2", "node2")]).into(),
        mk_node("node1", []).into(),
    ]);
    assert_eq!(desired.services[&key("web", Family::V4)].pods, addresses(&[]));
    assert_eq!(problems, []);
}

#[test]
fn a_node_name_that_nothing_speaks_of_is_reported_with_the_names_that_there_are() {
    let objects = |node: &str| -> Vec<Object> {
        vec![
            mk_service("web", ["10.0.0.55"]).into(),
            mk_slice("web-4", "web", [mk_endpoint("11.0.1.2", "node2"), mk_endpoint("11.0.1.3", node)])
                .into(),
        ]
    };
    let (_, problems) = desired(objects("Node1"));
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].severity, Severity::Info);
    assert_eq!(
        problems[0].to_string(),
        "Node node1: is this node's name, and no Node and no endpoint has it: no pod is local; check --node-name \
         (NODE_NAME); names that there are: Node1, node2"
    );

    let others = (2..9).map(|n| mk_node(&format!("node{n}"), []).into());
    let (_, problems) = desired(objects("Node1").into_iter().chain(others));
    assert_eq!(problems[0].severity, Severity::Warning);
    assert!(problems[0].to_string().ends_with("Node1, node2, node3, node4, node5, ..."), "{}", problems[0]);

    assert_eq!(desired(objects("node1")).1, []);
    let alone: Object = mk_node("node1", []).into();
    assert_eq!(desired(objects("Node1").into_iter().chain([alone])).1, []);
}

#[test]
fn a_service_without_any_endpoint_is_reported_once_with_what_becomes_of_its_packets() {
    let objects: [Object; 2] =
        [mk_service("web", ["10.0.0.55", "1000::55"]).into(), mk_slice("web-4", "web", []).into()];
    let mut catalog = Catalog::default();
    for object in objects {
        catalog.apply(object);
    }
    for (no_backend, becomes) in
        [(NoBackend::Drop, "are dropped"), (NoBackend::Pass, "are left to the rest of the node")]
    {
        let settings = Settings { no_backend, ..Settings::new(NodeName::new("node1")) };
        let (desired, problems) = compute(&catalog, &settings);
        assert_eq!(desired.services.len(), 2);
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [format!(
                "Service default/web: has no endpoint on any node: packets for its external addresses {becomes}; \
                 check that its selector matches pods, or write an EndpointSlice in namespace default with the label \
                 kubernetes.io/service-name: web"
            )]
        );
    }
}

#[test]
fn pods_of_the_other_family_alone_are_reported() {
    let (desired, problems) = desired([
        mk_service("web", ["1000::55"]).into(),
        mk_slice("web-4", "web", [mk_endpoint("11.0.2.2", "node1")]).into(),
    ]);
    assert_eq!(desired.services[&key("web", Family::V6)].pods, addresses(&[]));
    assert_eq!(problems.len(), 1);
    assert_eq!(
        problems[0].to_string(),
        "Service default/web: the external IPv6 address \"1000::55\" has no pod to go to: the Service's pods have \
         IPv4 addresses only; set spec.ipFamilyPolicy to PreferDualStack, or take the IPv6 address away"
    );
}

#[test]
fn the_timeout_of_client_ip_affinity_is_the_services() {
    let web = Service {
        session_affinity: SessionAffinity::ClientIp { timeout_seconds: 77 },
        ..mk_service("web", ["10.0.0.55"])
    };
    assert_eq!(desired([web.into()]).0.services[&key("web", Family::V4)].affinity_timeout, 77);
}

/// A Service of both families that names these source ranges, and what becomes of them.
fn sources_of(ranges: &[&str]) -> ([Option<Vec<String>>; 2], Vec<String>) {
    let web = Service {
        source_ranges: ranges.iter().filter_map(|range| range.parse().ok()).collect(),
        has_source_ranges: !ranges.is_empty(),
        ..mk_service("web", ["10.0.0.55", "1000::55"])
    };
    let (desired, problems) = desired([
        web.into(),
        mk_slice("web-4", "web", [mk_endpoint("11.0.2.2", "node1")]).into(),
        mk_slice("web-6", "web", [mk_endpoint("1100::202", "node1")]).into(),
    ]);
    let texts = |sources: &BTreeSet<IpNet>| sources.iter().map(ToString::to_string).collect();
    let sources = Family::ALL.map(|family| desired.services[&key("web", family)].sources.as_ref().map(texts));
    (sources, problems.iter().map(ToString::to_string).collect())
}

#[test]
fn each_family_has_its_own_source_ranges() {
    assert_eq!(sources_of(&[]), ([None, None], vec![]));
    let some = |ranges: &[&str]| Some(ranges.iter().map(|range| (*range).to_owned()).collect::<Vec<_>>());
    assert_eq!(
        sources_of(&["192.0.2.0/24", "2001:db8::/32", "198.51.100.7/32"]),
        ([some(&["192.0.2.0/24", "198.51.100.7/32"]), some(&["2001:db8::/32"])], vec![])
    );
}

#[test]
fn a_family_without_source_ranges_is_closed_if_the_other_has_some_and_so_are_both_if_none_parses() {
    let (sources, problems) = sources_of(&["192.0.2.0/24"]);
    assert_eq!(sources, [Some(vec!["192.0.2.0/24".to_owned()]), Some(vec![])]);
    assert_eq!(
        problems,
        [
            "Service default/web: spec.loadBalancerSourceRanges names no IPv6 network: nobody may send to the external \
             IPv6 addresses; add one (::/0 for everybody), or take the IPv6 addresses away"
        ]
    );
    let (sources, problems) = sources_of(&["oops"]);
    assert_eq!(sources, [Some(vec![]), Some(vec![])]);
    assert_eq!(problems.len(), 2, "{problems:?}");
}

#[test]
fn the_annotation_says_what_stays_on_one_pod_unless_it_is_nonsense_or_contradicted() {
    let affinity = SessionAffinity::ClientIp { timeout_seconds: 60 };
    for (annotation, session_affinity, expected, complaint) in [
        (None, SessionAffinity::None, Balance::Client, None),
        (Some("client"), SessionAffinity::None, Balance::Client, None),
        (Some("client"), affinity, Balance::Client, None),
        (Some("flow"), SessionAffinity::None, Balance::Flow, None),
        (
            Some("flow"),
            affinity,
            Balance::Client,
            Some(
                "\"flow\" contradicts spec.sessionAffinity ClientIP, which counts: a client stays on its pod; take one \
                 of the two away",
            ),
        ),
        (
            Some("random"),
            SessionAffinity::None,
            Balance::Client,
            Some("\"random\" is not a way to balance: a client stays on its pod; write client or flow"),
        ),
    ] {
        let annotations = annotation.map(|value| ("proxier.io/balance", value)).into_iter().collect();
        let web = Service { annotations, session_affinity, ..mk_service("web", ["10.0.0.55"]) };
        let slice = mk_slice("web-4", "web", [mk_endpoint("11.0.2.2", "node1")]);
        let (desired, problems) = desired([web.into(), slice.into()]);
        assert_eq!(desired.services[&key("web", Family::V4)].balance, expected, "{annotation:?}");
        let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let start = "Service default/web: metadata.annotations[proxier.io/balance] ";
        let expected = complaint.map(|complaint| format!("{start}{complaint}"));
        assert_eq!(texts, Vec::from_iter(expected));
    }
}

#[test]
fn the_nodes_own_addresses_are_those_that_packets_leave_with_if_its_processes_are_clients() {
    let local_addresses = LocalAddresses {
        identities: addresses(&[
            "192.168.1.1",
            "240.0.0.1",
            "fd00:1::1",
            "127.0.0.1",
            "::1",
            "fe80::1",
            "169.254.1.1",
        ]),
        attracting: addresses(&["10.0.0.55", "10.255.0.1"]),
        broadcasts: addresses(&["192.168.1.255"]),
    };
    for (node_clients, expected) in
        [(false, vec![]), (true, vec!["192.168.1.1", "240.0.0.1", "fd00:1::1", "10.0.0.55", "10.255.0.1"])]
    {
        let local_addresses = local_addresses.clone();
        let settings = Settings { local_addresses, node_clients, ..Settings::new(NodeName::new("node1")) };
        let (desired, _) = compute(&Catalog::default(), &settings);
        assert_eq!(desired.node_addresses, addresses(&expected));
    }
}

#[test]
fn an_external_name_has_no_addresses() {
    let web = Service { service_type: ServiceType::ExternalName, ..mk_service("web", ["10.0.0.55"]) };
    let (desired, problems) = desired([web.into()]);
    assert_eq!(desired, Desired::default());
    assert_eq!(problems.len(), 1);
}

#[test]
fn three_hundred_pods_of_one_service_are_all_there() {
    let endpoints = (0..300)
        .map(|n| mk_endpoint(&format!("11.0.{}.{}", n / 250, n % 250 + 1), "node1"))
        .collect::<Vec<_>>();
    let slices = endpoints
        .chunks(100)
        .enumerate()
        .map(|(n, chunk)| Object::from(mk_slice(&format!("web-{n}"), "web", chunk.iter().cloned())));
    let (desired, _) = desired(slices.chain([mk_service("web", ["10.0.0.55"]).into()]));
    assert_eq!(desired.services[&key("web", Family::V4)].pods.len(), 300);
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    (1..6_u8, 1..3_u8, any::<bool>(), any::<bool>()).prop_map(|(pod, node, ready, terminating)| Endpoint {
        ready,
        terminating,
        ..mk_endpoint(&format!("11.0.{node}.{pod}"), &format!("node{node}"))
    })
}

/// Objects that get in each other's way: few names, few addresses.
fn any_object() -> impl Strategy<Value = Object> {
    prop_oneof![
        (0..4_u8, proptest::collection::vec(50..54_u8, 0..3), proptest::option::of(0..2_i64)).prop_map(
            |(name, externals, created)| {
                let externals: Vec<_> = externals.iter().map(|n| format!("10.0.0.{n}")).collect();
                let service = mk_service(&format!("s{name}"), externals.iter().map(String::as_str));
                Service { created: created.map(crate::model::CreationTime), ..service }.into()
            }
        ),
        (0..6_u8, 0..4_u8, proptest::collection::vec(any_endpoint(), 0..4)).prop_map(
            |(name, service, endpoints)| mk_slice(&format!("e{name}"), &format!("s{service}"), endpoints)
                .into()
        ),
        (1..3_u8, 50..54_u8).prop_map(|(node, n)| mk_node(
            &format!("node{node}"),
            [format!("10.0.0.{n}").as_str()]
        )
        .into()),
    ]
}

proptest! {
    #[test]
    fn the_order_in_which_objects_come_does_not_matter(
        (objects, shuffled) in proptest::collection::vec(any_object(), 0..14)
            .prop_map(|objects| {
                // One object a name: of two, the later one counts, and then order matters by right.
                let by_id: BTreeMap<_, _> = objects.into_iter().map(|object| (object.id(), object)).collect();
                by_id.into_values().collect::<Vec<_>>()
            })
            .prop_flat_map(|objects| (Just(objects.clone()), Just(objects).prop_shuffle())),
    ) {
        prop_assert_eq!(desired(objects), desired(shuffled));
    }

    #[test]
    fn what_came_and_went_leaves_no_trace(
        kept in proptest::collection::vec(any_object(), 0..8),
        passing in proptest::collection::vec(any_object(), 0..8),
    ) {
        let kept: BTreeMap<_, _> = kept.into_iter().map(|object| (object.id(), object)).collect();
        let mut catalog = Catalog::default();
        for object in passing.iter().chain(kept.values()) {
            catalog.apply(object.clone());
        }
        for id in passing.iter().map(Object::id).filter(|id| !kept.contains_key(id)) {
            catalog.delete(&id);
        }
        let settings = Settings::new(NodeName::new("node1"));
        prop_assert_eq!(compute(&catalog, &settings), desired(kept.into_values()));
    }

    #[test]
    fn an_address_has_one_owner_and_pods_of_this_node_only(
        objects in proptest::collection::vec(any_object(), 0..14),
    ) {
        let (desired, _) = desired(objects);
        let mut seen = BTreeSet::new();
        for (key, service) in &desired.services {
            for external in &service.externals {
                prop_assert!(seen.insert(*external), "{external} has two owners");
                prop_assert_eq!(Family::of(*external), key.family);
            }
            for pod in &service.pods {
                prop_assert!(pod.to_string().starts_with("11.0.1."), "{pod} is not of node1");
            }
        }
    }
}
