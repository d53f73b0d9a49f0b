use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;
use crate::{
    desired::{compute, tests::addresses},
    model::{
        CreationTime, Endpoint, ProblemKind, ServiceType,
        testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice},
    },
};

mod reference;

fn settings() -> Settings {
    Settings::new(NodeName::new("node1"))
}

fn key(name: &str) -> ServiceKey {
    ServiceKey { service: mk_name(name), family: Family::V4 }
}

fn id(name: &str) -> ObjectId {
    ObjectId::Service(mk_name(name))
}

fn state(objects: impl IntoIterator<Item = Object>, settings: Settings) -> State {
    let mut state = State::new(settings);
    for object in objects {
        state.apply(object);
    }
    state.refresh();
    state
}

/// The Services and addresses that are delivered, such as `web 10.0.0.55`.
fn owned(state: &State) -> Vec<String> {
    let services = state.desired().services.iter();
    services
        .flat_map(|(key, service)| {
            service.externals.iter().map(|address| format!("{} {address}", key.service.name))
        })
        .collect()
}

fn kinds(state: &State) -> Vec<ProblemKind> {
    state.problems().map(|problem| problem.kind).collect()
}

fn web_and_mail() -> [Object; 4] {
    [
        mk_service("web", ["10.0.0.55"]).into(),
        mk_service("mail", ["10.0.0.56"]).into(),
        mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into(),
        mk_slice("mail-1", "mail", [mk_endpoint("11.0.2.3", "node1")]).into(),
    ]
}

#[test]
fn a_refresh_names_what_changed_and_nothing_else() {
    let mut state = State::new(settings());
    for object in web_and_mail() {
        state.apply(object);
    }
    assert_eq!(state.refresh().services, BTreeSet::from([key("mail"), key("web")]));
    assert!(state.refresh().is_empty());

    state.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.4", "node1")]).into());
    let mail = Arc::clone(&state.desired().services[&key("mail")]);
    let changed = state.refresh();
    assert_eq!(
        changed,
        Changed {
            services: BTreeSet::from([key("web")]),
            touched: BTreeSet::from([mk_name("web")]),
            ..Changed::default()
        }
    );
    assert!(Arc::ptr_eq(&mail, &state.desired().services[&key("mail")]), "what did not change is shared");

    state.delete(&id("web"));
    assert_eq!(state.refresh().services, BTreeSet::from([key("web")]));
    assert_eq!(owned(&state), ["mail 10.0.0.56"]);
}

#[test]
fn an_object_that_comes_again_as_it_was_changes_nothing_and_a_pod_elsewhere_nothing_here() {
    let mut state = state(web_and_mail(), settings());
    for object in web_and_mail() {
        state.apply(object);
    }
    assert!(state.due.services.is_empty());
    let remote = mk_slice("web-2", "web", [mk_endpoint("11.0.1.2", "node2")]);
    let remote = Object::from(remote);
    let touched = Changed { touched: BTreeSet::from([mk_name("web")]), ..Changed::default() };
    state.apply(remote.clone());
    assert_eq!(state.refresh(), touched);
    state.delete(&remote.id());
    assert_eq!(state.refresh(), touched);
    assert!(state.refresh().is_empty());
}

#[test]
fn a_problem_is_told_by_its_subject_and_its_end_too() {
    let subject = Subject::Object(id("web"));
    let mut state = state([mk_service("web", ["10.0.0.55"]).into()], settings());
    assert_eq!(state.problems_of(&subject).len(), 1);
    assert_eq!(kinds(&state), [ProblemKind::NoEndpoints]);
    state.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
    assert_eq!(state.refresh().subjects, BTreeSet::from([subject.clone()]));
    assert_eq!(state.problems_of(&subject), []);
    state.delete(&ObjectId::EndpointSlice(mk_name("web-1")));
    state.delete(&id("web"));
    assert_eq!(state.refresh().subjects, BTreeSet::new());
}

#[test]
fn an_address_is_withdrawn_when_something_of_the_cluster_gets_it_and_comes_back_when_that_goes() {
    let service_of_cluster =
        Service { cluster_ips: addresses(&["10.0.0.55"]).into_iter().collect(), ..mk_service("dns", []) };
    let node_of_pods = Node { pod_cidrs: vec!["10.0.0.48/28".parse().unwrap()], ..mk_node("node2", []) };
    let takers: [Object; 4] = [
        mk_node("node2", ["10.0.0.55"]).into(),
        node_of_pods.into(),
        mk_slice("other-1", "other", [mk_endpoint("10.0.0.55", "node2")]).into(),
        service_of_cluster.into(),
    ];
    let mut state = state(web_and_mail(), settings());
    let before = owned(&state);
    for taker in takers {
        state.apply(taker.clone());
        let changed = state.refresh();
        assert!(changed.services.contains(&key("web")), "{taker:?}");
        assert!(!owned(&state).contains(&"web 10.0.0.55".to_owned()), "{taker:?}");
        let problems = state.problems_of(&Subject::Object(id("web")));
        assert_eq!(
            problems.iter().map(|problem| problem.kind).collect::<Vec<_>>(),
            [ProblemKind::AddressRejected]
        );
        state.delete(&taker.id());
        assert!(state.refresh().services.contains(&key("web")), "{taker:?}");
        assert_eq!(owned(&state), before);
    }
}

#[test]
fn addresses_of_this_node_and_of_the_api_server_are_withdrawn_and_given_back() {
    let mut state = state(web_and_mail(), settings());
    let before = owned(&state);
    let webs = addresses(&["10.0.0.55"]);
    let identities = LocalAddresses { identities: webs.clone(), ..LocalAddresses::default() };
    assert!(state.set_local_addresses(identities.clone()));
    assert!(!state.set_local_addresses(identities));
    assert_eq!(state.refresh().services, BTreeSet::from([key("web")]));
    assert_eq!(owned(&state), ["mail 10.0.0.56"]);
    assert!(
        state.set_local_addresses(LocalAddresses { attracting: webs.clone(), ..LocalAddresses::default() })
    );
    assert_eq!(state.refresh().services, BTreeSet::from([key("web")]));
    assert_eq!(owned(&state), before);

    assert!(state.set_api_server_addresses(webs.clone()));
    assert!(!state.set_api_server_addresses(webs));
    assert_eq!(state.refresh().services, BTreeSet::from([key("web")]));
    assert_eq!(owned(&state), ["mail 10.0.0.56"]);
    let text = state.problems().next().unwrap().to_string();
    assert!(
        text.contains("\"10.0.0.55\" is an address of the API server, from which this node would"),
        "{text}"
    );
    state.set_api_server_addresses(BTreeSet::new());
    state.refresh();
    assert_eq!(owned(&state), before);
}

#[test]
fn the_nodes_own_addresses_are_a_change_of_their_own() {
    let mut state = State::new(Settings { node_clients: true, ..settings() });
    assert!(state.refresh().is_empty());
    let local = LocalAddresses { identities: addresses(&["192.168.1.1"]), ..LocalAddresses::default() };
    state.set_local_addresses(local);
    assert_eq!(state.refresh(), Changed { node_addresses: true, ..Changed::default() });
    assert_eq!(state.desired().node_addresses, addresses(&["192.168.1.1"]));
}

#[test]
fn another_configuration_withdraws_what_it_forbids_and_the_former_one_gives_it_back() {
    let flags = [
        Settings { cluster_cidrs: vec!["10.0.0.55/32".parse().unwrap()], ..settings() },
        Settings { external_cidrs: vec!["10.0.0.56/31".parse().unwrap()], ..settings() },
        Settings {
            external_cidrs: vec!["10.0.0.0/24".parse().unwrap(), "other=10.0.0.54/31".parse().unwrap()],
            ..settings()
        },
    ];
    for forbidding in flags {
        let narrow = state(web_and_mail(), forbidding.clone());
        assert_eq!(owned(&narrow), ["mail 10.0.0.56"], "{forbidding:?}");
        assert_eq!(kinds(&narrow), [ProblemKind::AddressRejected]);
        assert_eq!(owned(&state(web_and_mail(), settings())), ["mail 10.0.0.56", "web 10.0.0.55"]);
    }
}

#[test]
fn a_range_of_another_namespace_is_refused_with_whose_it_is_not_and_what_to_do() {
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let text = |external_cidrs| {
        let state = state(web_and_mail(), Settings { external_cidrs, ..settings() });
        state.problems_of(&Subject::Object(id("web")))[0].to_string()
    };
    assert_eq!(
        text(ranges(&["10.0.0.0/24", "voip=10.0.0.55/32"])),
        "Service default/web: spec.externalIPs[0] \"10.0.0.55\" lies in --external-cidr 10.0.0.55/32, which is for other \
         namespaces than default: not taken; write an address of another range, or start proxier with --external-cidr \
         default=10.0.0.55/32 as well"
    );
    assert_eq!(
        text(ranges(&["voip=10.9.0.0/24"])),
        "Service default/web: spec.externalIPs[0] \"10.0.0.55\" lies in no --external-cidr, and none is for namespace \
         default: not taken; start proxier with --external-cidr default=CIDR, a range that holds it"
    );
}

fn of_age(service: Service, created: i64) -> Object {
    Service { created: Some(CreationTime(created)), ..service }.into()
}

fn in_namespace(service: Service, namespace: &str) -> Service {
    Service { name: ObjectName::new(namespace, service.name.name), ..service }
}

fn limited(limit: u32) -> Settings {
    Settings { max_externals_per_namespace: Some(limit), ..settings() }
}

#[test]
fn a_namespace_has_no_more_addresses_than_it_may_the_oldest_services_first() {
    let mut state = state(
        [
            of_age(mk_service("c", ["10.0.0.3"]), 30),
            of_age(mk_service("a", ["10.0.0.9", "10.0.0.8", "10.0.0.7"]), 20),
            of_age(mk_service("b", ["10.0.0.9", "10.0.0.4"]), 10),
            of_age(in_namespace(mk_service("d", ["10.0.1.1", "10.0.1.2", "10.0.1.3"]), "other"), 40),
        ],
        limited(3),
    );
    // b's two, then the first of a's that b does not claim; c's is beyond. Another namespace counts for itself.
    let expected = ["a 10.0.0.7", "b 10.0.0.4", "b 10.0.0.9", "d 10.0.1.1", "d 10.0.1.2", "d 10.0.1.3"];
    assert_eq!(owned(&state), expected);
    let beyond: Vec<_> =
        state.problems().filter(|problem| problem.kind == ProblemKind::AddressLimitExceeded).collect();
    assert_eq!(beyond.len(), 2);
    assert_eq!(
        beyond[0].to_string(),
        "Service default/a: spec.externalIPs[1] \"10.0.0.8\" is one more than the 3 addresses that namespace default may \
         have (--max-addresses-per-namespace): not taken; take away an address that an older Service of the namespace \
         claims, or ask for a higher limit"
    );

    // A place that becomes free goes to the next in line.
    state.delete(&id("b"));
    let changed = state.refresh();
    assert!(changed.services.contains(&key("a")) && !changed.services.contains(&key("c")), "{changed:?}");
    assert_eq!(owned(&state)[..3], ["a 10.0.0.7", "a 10.0.0.8", "a 10.0.0.9"]);
    state.apply(of_age(mk_service("a", ["10.0.0.9"]), 20));
    assert!(state.refresh().services.contains(&key("c")));
    assert_eq!(owned(&state)[..2], ["a 10.0.0.9", "c 10.0.0.3"]);
}

#[test]
fn what_is_beyond_a_namespaces_limit_is_free_for_others() {
    let mut state = state(
        [
            of_age(mk_service("old", ["10.0.0.1", "10.0.0.2"]), 10),
            of_age(in_namespace(mk_service("new", ["10.0.0.2"]), "other"), 20),
        ],
        limited(1),
    );
    assert_eq!(owned(&state), ["old 10.0.0.1", "new 10.0.0.2"]);
    state.apply(of_age(mk_service("old", ["10.0.0.2"]), 10));
    state.refresh();
    assert_eq!(owned(&state), ["old 10.0.0.2"]);
}

/// An address that this node alone refuses uses up a place here as on the other nodes: they must not differ in who has what.
#[test]
fn what_counts_for_the_limit_is_the_same_on_every_node() {
    let objects = || [of_age(mk_service("a", ["10.0.0.1"]), 10), of_age(mk_service("b", ["10.0.0.2"]), 20)];
    let local = LocalAddresses { identities: addresses(&["10.0.0.1"]), ..LocalAddresses::default() };
    assert_eq!(owned(&state(objects(), Settings { local_addresses: local, ..limited(1) })), [""; 0]);
    assert_eq!(owned(&state(objects(), limited(1))), ["a 10.0.0.1"]);
}

/// One thing that happens to a [`State`].
#[derive(Clone, Debug)]
enum Step {
    Apply(Object),
    Delete(ObjectId),
    Local(LocalAddresses),
    ApiServer(BTreeSet<IpAddr>),
    Refresh,
}

/// An address that many things can have: external, a node's, a pod's.
fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        6 => (50..55_u8).prop_map(|n| IpAddr::from([10, 0, 0, n])),
        1 => (1..3_u8).prop_map(|n| format!("1000::{n}").parse().unwrap()),
        1 => Just(IpAddr::from([127, 0, 0, 1])),
    ]
}

fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let address = prop_oneof![4 => (1..6_u8).prop_map(|n| IpAddr::from([11, 0, 0, n])), 1 => any_address()];
    (address, option::of(1..4_u8), any::<[bool; 3]>()).prop_map(
        |(address, node, [ready, serving, terminating])| {
            let node = node.map(|node| NodeName::new(format!("node{node}")));
            Endpoint { ready, serving, terminating, node, ..mk_endpoint(&address.to_string(), "") }
        },
    )
}

fn any_service() -> impl Strategy<Value = Object> {
    let namespace = select(vec!["default", "other"]);
    let parts = (vec(any_address(), 0..4), vec(any_address(), 0..2), vec(any_address(), 0..2));
    (0..4_u8, namespace, parts, option::of(-1..2_i64), 0..12_u8).prop_map(
        |(name, namespace, (externals, ingress, cluster_ips), created, oddity)| {
            let mut service = in_namespace(mk_service(&format!("s{name}"), []), namespace);
            service.external_ips = externals;
            service.load_balancer_ingress = ingress
                .into_iter()
                .map(|address| crate::model::LoadBalancerIngress { address, mode: crate::model::IpMode::Vip })
                .collect();
            service.created = created.map(CreationTime);
            match oddity {
                0 => service.service_type = ServiceType::ExternalName,
                1 => service.cluster_ips = cluster_ips,
                2 => service.annotations = [("proxier.io/balance", "flow")].into_iter().collect(),
                3 => service.annotations = [("proxier.io/balance", "nonsense")].into_iter().collect(),
                4 => service.has_source_ranges = true,
                _ => {}
            }
            service.into()
        },
    )
}

fn any_object() -> impl Strategy<Value = Object> {
    let slice = (0..6_u8, 0..4_u8, select(vec!["default", "other"]), vec(any_endpoint(), 0..4)).prop_map(
        |(name, service, namespace, endpoints)| {
            let mut slice = mk_slice(&format!("e{name}"), &format!("s{service}"), endpoints);
            slice.service = slice.service.map(|service| ObjectName::new(namespace, service.name));
            slice.into()
        },
    );
    let networks = vec(select(vec!["10.0.0.52/31", "10.0.0.52/32", "1000::/64", "11.0.0.0/24"]), 0..2);
    let node = (1..4_u8, vec(any_address(), 0..2), networks).prop_map(|(node, addresses, networks)| {
        let pod_cidrs = networks.into_iter().map(|network| network.parse().unwrap()).collect();
        Node { addresses, pod_cidrs, ..mk_node(&format!("node{node}"), []) }.into()
    });
    prop_oneof![4 => any_service(), 3 => slice, 1 => node]
}

fn any_step() -> impl Strategy<Value = Step> {
    let some = || proptest::collection::btree_set(any_address(), 0..2);
    prop_oneof![
        8 => any_object().prop_map(Step::Apply),
        3 => any_object().prop_map(|object| Step::Delete(object.id())),
        1 => (some(), some(), some()).prop_map(|(identities, attracting, broadcasts)| {
            Step::Local(LocalAddresses { identities, attracting, broadcasts })
        }),
        1 => some().prop_map(Step::ApiServer),
        4 => Just(Step::Refresh),
    ]
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let ranges = select(vec![
        vec![],
        vec!["10.0.0.0/24"],
        vec!["10.0.0.0/8", "other=10.0.0.52/30"],
        vec!["10.0.0.0/24", "other=1000::/64", "default=10.0.0.50/31", "other=10.0.0.50/31"],
    ]);
    let cluster = select(vec![vec![], vec!["10.0.0.54/32"]]);
    (ranges, cluster, option::of(1..4_u32), any::<bool>()).prop_map(
        |(ranges, cluster, limit, node_clients)| Settings {
            external_cidrs: ranges.into_iter().map(|range| range.parse().unwrap()).collect(),
            cluster_cidrs: cluster.into_iter().map(|network| network.parse().unwrap()).collect(),
            max_externals_per_namespace: limit,
            node_clients,
            ..settings()
        },
    )
}

/// The keys that two states do not have alike.
fn difference(a: &Desired, b: &Desired) -> BTreeSet<ServiceKey> {
    let keys = a.services.keys().chain(b.services.keys());
    keys.filter(|key| a.services.get(*key) != b.services.get(*key)).cloned().collect()
}

/// The subjects whose problems are not alike.
fn other_problems(a: &[Problem], b: &[Problem]) -> BTreeSet<Subject> {
    let of = |problems: &[Problem], subject: &Subject| -> BTreeSet<Problem> {
        problems.iter().filter(|problem| problem.subject == *subject).cloned().collect()
    };
    let subjects = a.iter().chain(b).map(|problem| &problem.subject);
    subjects.filter(|subject| of(a, subject) != of(b, subject)).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_happened_the_state_is_that_of_its_objects_and_each_refresh_names_the_difference(
        settings in any_settings(),
        steps in vec(any_step(), 0..40),
    ) {
        let mut state = State::new(settings.clone());
        let mut settings = settings;
        let mut objects = BTreeMap::new();
        let (mut desired, mut problems) = (Desired::default(), Vec::new());
        for step in steps.into_iter().chain([Step::Refresh]) {
            match step {
                Step::Apply(object) => {
                    objects.insert(object.id(), object.clone());
                    state.apply(object);
                }
                Step::Delete(id) => {
                    objects.remove(&id);
                    state.delete(&id);
                }
                Step::Local(addresses) => {
                    settings.local_addresses = addresses.clone();
                    state.set_local_addresses(addresses);
                }
                Step::ApiServer(addresses) => {
                    settings.api_server_addresses = addresses.clone();
                    state.set_api_server_addresses(addresses);
                }
                Step::Refresh => {
                    let changed = state.refresh();
                    // In the reverse order of the catalog's: which object came first must not matter.
                    let mut anew = State::new(settings.clone());
                    for object in objects.values().rev() {
                        anew.apply(object.clone());
                    }
                    anew.refresh();
                    prop_assert_eq!(state.desired(), anew.desired());
                    let now: Vec<_> = state.problems().cloned().collect();
                    prop_assert_eq!(&now, &anew.problems().cloned().collect::<Vec<_>>());
                    prop_assert_eq!(state.catalog(), anew.catalog());
                    let (computed, _) = compute(state.catalog(), &settings);
                    prop_assert_eq!(state.desired(), &computed);

                    prop_assert_eq!(&changed.services, &difference(&desired, state.desired()));
                    prop_assert_eq!(changed.node_addresses, desired.node_addresses != state.desired().node_addresses);
                    prop_assert_eq!(&changed.subjects, &other_problems(&problems, &now));
                    desired = state.desired().clone();
                    problems = now;

                    let (owners, complaints) = reference::of(&objects, &settings);
                    let delivered: BTreeMap<IpAddr, ObjectName> = desired
                        .services
                        .iter()
                        .flat_map(|(key, service)| service.externals.iter().map(|address| (*address, key.service.clone())))
                        .collect();
                    prop_assert_eq!(delivered, owners);
                    let told: BTreeSet<_> = problems
                        .iter()
                        .filter_map(|problem| match (&problem.subject, &problem.value, problem.kind) {
                            (
                                Subject::Object(ObjectId::Service(name)),
                                Some(address),
                                kind @ (ProblemKind::AddressRejected
                                | ProblemKind::AddressLimitExceeded
                                | ProblemKind::AddressConflict),
                            ) => Some((name.clone(), address.parse().unwrap(), kind)),
                            _ => None,
                        })
                        .collect();
                    prop_assert_eq!(told, complaints);
                }
            }
        }
    }

    #[test]
    fn a_state_whose_objects_have_all_gone_is_that_of_a_new_one(
        settings in any_settings(),
        objects in vec(any_object(), 0..20),
    ) {
        let mut state = state(objects.clone(), settings.clone());
        for object in &objects {
            state.delete(&object.id());
        }
        state.refresh();
        prop_assert_eq!(state.desired().services.len(), 0);
        prop_assert_eq!(state.problems().count(), 0);
        // The indexes too: what stays there costs memory for ever, and refuses addresses for nothing.
        let new = State::new(settings);
        prop_assert_eq!(format!("{:?} {:?}", state.claims, state.taken), format!("{:?} {:?}", new.claims, new.taken));
    }
}

#[test]
fn of_ten_thousand_wrong_addresses_a_hundred_are_told_and_the_rest_counted() {
    let mut state = State::new(settings());
    let mut web = mk_service("web", ["10.0.0.55"]);
    web.external_ips.extend((0..10_000_u32).map(|n| IpAddr::from(std::net::Ipv4Addr::from(0x7f00_0000 + n))));
    state.apply(web.into());
    state.refresh();
    let subject = Subject::Object(ObjectId::Service(mk_name("web")));
    let problems = state.problems_of(&subject);
    assert_eq!(problems.len(), MAX_PROBLEMS + 1);
    let told: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert!(told.iter().any(|text| text.contains("has 9901 more problems like those")), "{told:?}");
    assert_eq!(state.desired().services.len(), 1);
}
