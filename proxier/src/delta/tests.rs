use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use proptest::prelude::*;
use proxier_common::{Address, MAX_SOURCES, POD_HAS_PEER, SERVICE_IS_NODE, SERVICE_IS_POD};

use super::*;
use crate::{
    desired::{Desired, Scope, ServiceKey},
    model::{Family, ObjectName},
};

mod links;
mod ranges;
mod scope;

fn key(name: &str, family: Family) -> ServiceKey {
    ServiceKey { service: ObjectName { namespace: "default".into(), name: name.into() }, family }
}

fn service(externals: &[&str], pods: &[&str]) -> DesiredService {
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    DesiredService {
        externals: addresses(externals),
        pods: addresses(pods),
        draining: BTreeSet::new(),
        affinity_timeout: 10_800,
        no_backend: NoBackend::Drop,
        balance: Balance::Client,
        delivery: Delivery::Stack,
        sources: None,
    }
}

fn only_from(ranges: &[&str], service: DesiredService) -> DesiredService {
    let sources = Some(ranges.iter().map(|range| range.parse().unwrap()).collect());
    DesiredService { sources, ..service }
}

fn desired<const N: usize>(services: [(ServiceKey, DesiredService); N]) -> Desired {
    let services = services.map(|(key, service)| (key, Arc::new(service)));
    Desired { services: services.into(), ..Desired::default() }
}

/// Links of pods, by the last byte of their addresses: 104 leads to 11.0.0.4, and its other end is in it, as of all even ones.
/// To .3 none leads.
#[derive(Debug)]
struct Veths;

static VETHS: Veths = Veths;

impl PodLinks for Veths {
    fn link_of(&self, pod: Address) -> Option<PodLink> {
        let last = pod.bytes[15];
        (last != 3).then(|| PodLink { interface: 100 + u32::from(last), has_peer: last.is_multiple_of(2) })
    }
}

fn address(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

fn id_of(actual: &Actual, external: &str) -> u32 {
    actual.services[&external_key(external.parse().unwrap())].service_id
}

/// Every address in force leads to backends that are there, and to pods whose packets are known as replies. A pod is said
/// to have one external address only where nothing else leads to it.
fn assert_consistent(actual: &Actual) {
    for (key, service) in &actual.services {
        for slot in 0..service.backend_count {
            let backend = BackendKey { service_id: service.service_id, generation: service.generation, slot };
            assert!(actual.backends.contains_key(&backend), "{} lacks {backend:?}", key.external);
            assert_led(actual, key, actual.backends[&backend].pod);
        }
        let members = actual.members.keys().filter(|member| member.service_id == service.service_id);
        members.for_each(|member| assert_led(actual, key, member.pod));
    }
}

fn assert_led(actual: &Actual, external: &ExternalKey, pod: Address) {
    let known = actual.pods.get(&PodKey { pod });
    let value =
        known.unwrap_or_else(|| panic!("{} leads to {pod}, which is not in `pods`", external.external));
    assert!(
        value.external == Address::UNSPECIFIED || value.external == external.external,
        "{} leads to {pod}, and `pods` says {} alone",
        external.external,
        value.external
    );
}

/// What `pods` is to say of each pod: the one address that leads to it, if there is one only.
fn wanted_pods(desired: &Desired) -> BTreeMap<IpAddr, Option<IpAddr>> {
    let mut externals: BTreeMap<IpAddr, BTreeSet<IpAddr>> = BTreeMap::new();
    for service in desired.services.values() {
        for pod in service.pods.union(&service.draining) {
            externals.entry(*pod).or_default().extend(&service.externals);
        }
    }
    let only = |externals: BTreeSet<IpAddr>| externals.first().copied().filter(|_| externals.len() == 1);
    externals.into_iter().map(|(pod, externals)| (pod, only(externals))).collect()
}

fn known_pods(actual: &Actual) -> BTreeMap<IpAddr, Option<IpAddr>> {
    let one = |value: &PodValue| Some(value.external).filter(|external| *external != Address::UNSPECIFIED);
    actual.pods.iter().map(|(key, value)| (key.pod.to_ip(), one(value).map(Address::to_ip))).collect()
}

/// Addresses that are nobody's external one, with whose they are.
fn own_addresses(actual: &Actual) -> BTreeMap<IpAddr, u32> {
    let own = actual.services.iter().filter(|(_, value)| value.service_id == NO_SERVICE);
    own.map(|(key, value)| (key.external.to_ip(), value.flags)).collect()
}

/// Every step, carried out as it comes.
fn steps(desired: &Desired, actual: &Actual) -> Vec<Step> {
    let mut actual = actual.clone();
    let plan = Plan::new(desired, &actual, &Scope::All, &VETHS);
    let mut all = Vec::new();
    for task in plan.tasks() {
        for step in plan.steps(*task, &actual) {
            actual.apply(&step);
            all.push(step);
        }
    }
    all
}

fn carry_out(desired: &Desired, actual: &mut Actual) {
    for step in steps(desired, actual) {
        actual.apply(&step);
        assert_consistent(actual);
    }
    assert_eq!(steps(desired, actual), [], "a plan carried out leaves nothing to do");
}

/// What packets would see: per external address its Service and its pods.
fn in_force(actual: &Actual) -> BTreeMap<IpAddr, (ServiceKey, BTreeSet<IpAddr>, u32)> {
    actual
        .services
        .iter()
        .filter(|(_, value)| value.service_id != NO_SERVICE)
        .map(|(key, value)| {
            let pods = (0..value.backend_count)
                .map(|slot| BackendKey { service_id: value.service_id, generation: value.generation, slot })
                .map(|key| actual.backends[&key].pod.to_ip())
                .collect();
            let name = decode_name(&actual.names[&value.service_id]).unwrap();
            (key.external.to_ip(), (name, pods, value.affinity_timeout))
        })
        .collect()
}

fn wanted(desired: &Desired) -> BTreeMap<IpAddr, (ServiceKey, BTreeSet<IpAddr>, u32)> {
    desired
        .services
        .iter()
        .flat_map(|(key, service)| {
            service.externals.iter().map(move |external| {
                (*external, (key.clone(), service.pods.clone(), service.affinity_timeout))
            })
        })
        .collect()
}

#[test]
fn backends_are_written_before_the_address_that_leads_to_them() {
    let desired = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]))]);
    let kinds: Vec<&str> = steps(&desired, &Actual::default())
        .iter()
        .map(|step| match step {
            Step::PutName(..) => "name",
            Step::PutBackend(..) => "backend",
            Step::PutMember(..) => "member",
            Step::PutPod(..) => "pod",
            Step::PutService(..) => "service",
            _ => "other",
        })
        .collect();
    assert_eq!(
        kinds,
        ["name", "pod", "pod", "service", "service", "backend", "backend", "member", "member", "service"],
        "the first two services are the pods' own addresses"
    );
}

#[test]
fn nothing_changed_means_nothing_to_do_also_after_a_restart() {
    let desired = desired([
        (key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"])),
        (key("a", Family::V6), service(&["1000::1"], &[])),
    ]);
    let mut actual = Actual::default();
    carry_out(&desired, &mut actual);
    let read_back = actual.clone();
    assert_eq!(steps(&desired, &read_back), []);
}

#[test]
fn what_is_in_force_can_be_read_back() {
    let draining = |mut service: DesiredService| {
        service.draining.insert("11.0.0.9".parse().unwrap());
        service
    };
    let desired = desired([
        (key("a", Family::V4), draining(service(&["10.0.0.1", "10.0.0.2"], &["11.0.0.1"]))),
        (key("a", Family::V6), service(&["1000::1"], &[])),
    ]);
    let desired = Desired { node_addresses: ["192.168.1.1".parse().unwrap()].into(), ..desired };
    let mut actual = Actual::default();
    carry_out(&desired, &mut actual);
    assert_eq!(actual.in_force(), desired);
}

#[test]
fn a_pod_that_goes_takes_a_new_generation_and_a_sweep() {
    let before = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]))]);
    let after = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.2"]))]);
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let steps = steps(&after, &actual);
    let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
    let leaves = at(|step| matches!(step, Step::RemoveMember(key) if key.pod == address("11.0.0.1")));
    let switch = at(|step| matches!(step, Step::PutService(..)));
    let grace = at(|step| matches!(step, Step::Grace));
    let old = at(|step| matches!(step, Step::RemoveBackend(..)));
    let sweep = at(|step| matches!(step, Step::Sweep));
    assert!(leaves < switch && switch < grace && grace < old && old < sweep, "{steps:?}");
    carry_out(&after, &mut actual);
    let stays = MemberKey { pod: address("11.0.0.2"), service_id: 1, padding: 0 };
    assert_eq!(actual.members[&stays].since_generation, 1, "who stays has been there all along");
}

#[test]
fn a_pod_that_comes_back_is_a_new_member() {
    let with = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let without = desired([(key("a", Family::V4), service(&["10.0.0.1"], &[]))]);
    let mut actual = Actual::default();
    for desired in [&with, &without, &with] {
        carry_out(desired, &mut actual);
    }
    let member = MemberKey { pod: address("11.0.0.1"), service_id: 1, padding: 0 };
    assert_eq!(actual.members[&member].since_generation, 3);
}

#[test]
fn a_pod_that_drains_keeps_its_conversations_and_one_that_is_gone_does_not() {
    let states = [
        (vec!["11.0.0.1", "11.0.0.2"], vec![]),
        (vec!["11.0.0.2"], vec!["11.0.0.1"]),
        (vec!["11.0.0.2"], vec![]),
    ];
    let mut actual = Actual::default();
    let mut kept = Vec::new();
    for (pods, draining) in states {
        let draining = draining.into_iter().map(|pod| pod.parse().unwrap()).collect();
        let service = DesiredService { draining, ..service(&["10.0.0.1"], &pods) };
        carry_out(&desired([(key("a", Family::V4), service)]), &mut actual);
        kept.push(actual.keeps(address("11.0.0.1"), address("10.0.0.1")));
    }
    assert_eq!(kept, [true, true, false]);
    let gone = external_key("11.0.0.1".parse().unwrap());
    assert!(!actual.services.contains_key(&gone), "nor is its address known as a pod's");
}

#[test]
fn a_conversation_outlives_the_service_that_it_began_with_if_pod_and_address_stay() {
    let a = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let b = desired([(key("b", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let mut actual = Actual::default();
    carry_out(&a, &mut actual);
    carry_out(&b, &mut actual);
    assert!(actual.keeps(address("11.0.0.1"), address("10.0.0.1")));
    assert!(
        !actual.keeps(address("11.0.0.1"), address("11.0.0.1")),
        "a pod's own address is no external one"
    );
}

#[test]
fn a_pod_of_several_addresses_has_none_that_stands_for_all() {
    let one = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let two = desired([
        (key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"])),
        (key("b", Family::V4), service(&["10.0.0.2"], &["11.0.0.1", "11.0.0.2"])),
    ]);
    let other = desired([(key("b", Family::V4), service(&["10.0.0.2"], &["11.0.0.1"]))]);
    let mut actual = Actual::default();
    let mut said = Vec::new();
    for desired in [&one, &two, &other, &Desired::default()] {
        carry_out(desired, &mut actual);
        said.push(
            known_pods(&actual)
                .into_iter()
                .map(|(pod, external)| {
                    format!("{pod}: {}", external.map_or("-".to_owned(), |address| address.to_string()))
                })
                .collect::<Vec<_>>(),
        );
    }
    assert_eq!(
        said,
        [
            vec!["11.0.0.1: 10.0.0.1"],
            vec!["11.0.0.1: -", "11.0.0.2: 10.0.0.2"],
            vec!["11.0.0.1: 10.0.0.2"],
            vec![]
        ]
    );
}

#[test]
fn a_pod_that_an_interrupted_change_still_leads_to_stays_known() {
    let before = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]))]);
    let after = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.2"]))]);
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let plan = Plan::new(&after, &actual, &Scope::All, &VETHS);
    for task in plan.tasks() {
        for step in plan.steps(*task, &actual) {
            // The switch fails, after the membership has ended.
            if matches!(step, Step::PutService(..)) {
                break;
            }
            actual.apply(&step);
            assert_consistent(&actual);
        }
    }
    assert!(known_pods(&actual).contains_key(&"11.0.0.1".parse().unwrap()));
    let own = own_addresses(&actual);
    assert!(own.contains_key(&"11.0.0.1".parse().unwrap()), "{own:?}");
    carry_out(&after, &mut actual);
    assert!(!known_pods(&actual).contains_key(&"11.0.0.1".parse().unwrap()));
}

/// Carries out one plan of a kernel that has room for so many source ranges. Returns what does not fit, and whether there
/// was anything to do.
fn attempt_with_room(room: usize, desired: &Desired, actual: &mut Actual) -> (Vec<Shortage>, bool) {
    let plan = Plan { room_for_sources: room, ..Plan::new(desired, actual, &Scope::All, &VETHS) };
    let (mut shortages, mut busy) = (Vec::new(), false);
    for task in plan.tasks() {
        shortages.extend(plan.shortage(*task, actual));
        for step in plan.steps(*task, actual) {
            busy = true;
            actual.apply(&step);
            assert_consistent(actual);
            assert!(actual.sources.len() <= room, "{} ranges", actual.sources.len());
        }
    }
    (shortages, busy)
}

/// The same until there is nothing left to do.
fn carry_out_with_room(room: usize, desired: &Desired, actual: &mut Actual) -> Vec<Shortage> {
    // Each plan but the last makes room for the next.
    for _ in 0..=desired.services.len() + 1 {
        if let (shortages, false) = attempt_with_room(room, desired, actual) {
            return shortages;
        }
    }
    panic!("there is always something to do");
}

#[test]
fn a_pod_has_the_balance_of_its_address_while_that_is_in_force() {
    let client = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let flow = desired([(
        key("a", Family::V4),
        DesiredService { balance: Balance::Flow, ..service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]) },
    )]);
    let mut actual = Actual::default();
    let mut flags = Vec::new();
    for desired in [&client, &flow, &client] {
        carry_out(desired, &mut actual);
        let of_service = actual.services[&external_key("10.0.0.1".parse().unwrap())].flags;
        flags.push((of_service, actual.pods.values().map(|pod| pod.flags).collect::<Vec<_>>()));
    }
    let balance = SERVICE_BALANCE_FLOW;
    assert_eq!(flags, [(0, vec![0]), (balance, vec![balance, balance]), (0, vec![0])]);
}

#[test]
fn an_address_of_the_node_is_marked_unless_it_is_an_external_one() {
    let node = |addresses: &[&str], services: Desired| Desired {
        node_addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        ..services
    };
    let web = || desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let (pod, lo, uplink) = ("11.0.0.1", "10.0.0.1", "192.168.1.1");
    let mut actual = Actual::default();
    for (desired, expected) in [
        (node(&[uplink, lo], web()), vec![(pod, SERVICE_IS_POD), (uplink, SERVICE_IS_NODE)]),
        // A pod in the node's network has the node's address.
        (node(&[pod, lo], web()), vec![(pod, SERVICE_IS_POD | SERVICE_IS_NODE)]),
        (node(&[pod, lo], Desired::default()), vec![(lo, SERVICE_IS_NODE), (pod, SERVICE_IS_NODE)]),
        (node(&[lo], web()), vec![(pod, SERVICE_IS_POD)]),
        (Desired::default(), vec![]),
    ] {
        carry_out(&desired, &mut actual);
        let expected = expected.into_iter().map(|(address, flags)| (address.parse().unwrap(), flags));
        assert_eq!(own_addresses(&actual), expected.collect());
        assert_eq!(in_force(&actual), wanted(&desired));
    }
    assert_eq!(actual, Actual::default());
}

#[test]
fn an_address_that_the_node_gets_is_taken_from_its_service_in_one_write() {
    let web = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let mut actual = Actual::default();
    carry_out(&web, &mut actual);
    let address: IpAddr = "10.0.0.1".parse().unwrap();
    let steps = steps(&Desired { node_addresses: [address].into(), ..Desired::default() }, &actual);
    assert!(!steps.contains(&Step::RemoveService(external_key(address))), "{steps:?}");
    assert!(steps.contains(&Step::Sweep), "{steps:?}");
}

#[test]
fn an_id_is_free_only_after_the_sweep() {
    let a = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let b = desired([(key("b", Family::V4), service(&["10.0.0.1"], &["11.0.0.1"]))]);
    let mut actual = Actual::default();
    carry_out(&a, &mut actual);
    carry_out(&b, &mut actual);
    assert_eq!(id_of(&actual, "10.0.0.1"), 2, "1 was still in use");
    carry_out(&a, &mut actual);
    assert_eq!(id_of(&actual, "10.0.0.1"), 1, "1 is free again");
}

#[test]
fn an_address_changes_hands_in_one_write() {
    let a = (key("a", Family::V4), service(&["10.0.0.1", "10.0.0.2"], &["11.0.0.1"]));
    let mut actual = Actual::default();
    carry_out(&desired([a]), &mut actual);
    let after = desired([
        (key("a", Family::V4), service(&["10.0.0.2"], &["11.0.0.1"])),
        (key("b", Family::V4), service(&["10.0.0.1"], &["11.0.0.2"])),
    ]);
    let steps = steps(&after, &actual);
    assert!(!steps.contains(&Step::RemoveService(external_key("10.0.0.1".parse().unwrap()))), "{steps:?}");
    assert!(steps.contains(&Step::Sweep), "{steps:?}");
    carry_out(&after, &mut actual);
    assert_eq!(in_force(&actual), wanted(&after));
}

#[test]
fn three_hundred_pods_are_as_good_as_three() {
    let pods: Vec<String> = (0..300).map(|n| format!("11.0.{}.{}", n / 250, n % 250 + 1)).collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let desired = desired([(key("a", Family::V4), service(&["10.0.0.1"], &pods))]);
    let mut actual = Actual::default();
    carry_out(&desired, &mut actual);
    let key = external_key("10.0.0.1".parse().unwrap());
    assert_eq!(actual.services[&key].backend_count, 300);
    assert_eq!(in_force(&actual), wanted(&desired));
}

#[test]
fn names_survive_the_round_trip() {
    for family in [Family::V4, Family::V6] {
        let key = key("kpng-example", family);
        assert_eq!(decode_name(&encode_name(&key)), Some(key));
    }
}

/// The tables say what is desired, and nothing else.
fn assert_says(desired: &Desired, actual: &Actual) {
    assert_eq!(in_force(actual), wanted(desired));
    let members: BTreeSet<(ServiceKey, IpAddr)> = actual
        .members
        .keys()
        .map(|key| (decode_name(&actual.names[&key.service_id]).unwrap(), key.pod.to_ip()))
        .collect();
    let expected = desired
        .services
        .iter()
        .flat_map(|(key, service)| service.pods.union(&service.draining).map(|pod| (key.clone(), *pod)));
    assert_eq!(members, expected.collect());
    assert_eq!(known_pods(actual), wanted_pods(desired));
    // A pod that is among both takes new conversations.
    let mut said = desired.services.clone();
    for service in said.values_mut() {
        let DesiredService { pods, draining, .. } = Arc::make_mut(service);
        draining.retain(|pod| !pods.contains(pod));
    }
    assert_eq!(actual.in_force().services, said);
    for (key, pod) in actual.pods.iter().filter(|(_, pod)| pod.external != Address::UNSPECIFIED) {
        let of_service = actual.services[&ExternalKey { external: pod.external }].flags;
        let flags = SERVICE_BALANCE_FLOW | SERVICE_DIRECT;
        assert_eq!(pod.flags & !POD_HAS_PEER, of_service & flags, "{}", key.pod);
    }
    for (key, value) in &actual.pods {
        let mut services = desired.services.values().filter(|service| service.has(key.pod.to_ip()));
        let is_direct = services.any(|service| service.delivery == Delivery::Direct);
        let link = VETHS.link_of(key.pod);
        // One that was direct keeps its link.
        if is_direct || value.interface != 0 {
            assert_eq!(value.interface, link.map_or(0, |link| link.interface), "{}", key.pod);
        }
        let has_peer = value.interface != 0 && link.is_some_and(|link| link.has_peer);
        assert_eq!(value.flags & POD_HAS_PEER != 0, has_peer, "{}", key.pod);
    }
    let ranges = desired.services.values().flat_map(|service| &service.sources).map(BTreeSet::len);
    assert_eq!(actual.sources.len(), ranges.sum::<usize>());
    let mut own: BTreeMap<IpAddr, u32> = members.into_iter().map(|(_, pod)| (pod, SERVICE_IS_POD)).collect();
    for address in &desired.node_addresses {
        *own.entry(*address).or_default() |= SERVICE_IS_NODE;
    }
    own.retain(|address, _| !wanted(desired).contains_key(address));
    assert_eq!(own_addresses(actual), own);
}

/// Any few Services, addresses and pods; an address has one owner, as `desired` sees to. The node has addresses of its own,
/// some of which are external ones or pods'.
fn any_desired() -> impl Strategy<Value = Desired> {
    any_desired_with_pods_in(11..12)
}

/// The same, with pods in these networks: external addresses are in 10.0.0.0/24.
fn any_desired_with_pods_in(nets: std::ops::Range<u8>) -> impl Strategy<Value = Desired> {
    let owner = prop::option::of(0..4_usize);
    let pod = move || (nets.clone(), 1..6_u8).prop_map(|(net, n)| IpAddr::from([net, 0, 0, n]));
    let pods = (prop::collection::btree_set(pod(), 0..4), prop::collection::btree_set(pod(), 0..2));
    let node = prop::collection::btree_set((10..12_u8, 1..8_u8), 0..4);
    let sources = prop::option::of(prop::collection::btree_set(0..3_u8, 0..3));
    let services = prop::collection::vec((pods, 1..3_u32, any::<[bool; 2]>(), sources), 4);
    (prop::collection::vec(owner, 5), services, node).prop_map(|(owners, services, node)| {
        let node_addresses = node.into_iter().map(|(net, n)| IpAddr::from([net, 0, 0, n])).collect();
        let mut desired = Desired { node_addresses, ..Desired::default() };
        for (index, ((pods, draining), timeout, [flow, direct], sources)) in services.into_iter().enumerate()
        {
            let externals: BTreeSet<IpAddr> = (1..)
                .zip(&owners)
                .filter(|(_, owner)| **owner == Some(index))
                .map(|(n, _): (u8, _)| IpAddr::from([10, 0, 0, n]))
                .collect();
            if externals.is_empty() {
                continue;
            }
            desired.services.insert(
                key(&format!("s{index}"), Family::V4),
                Arc::new(DesiredService {
                    externals,
                    pods,
                    draining,
                    affinity_timeout: timeout,
                    no_backend: NoBackend::Drop,
                    balance: if flow { Balance::Flow } else { Balance::Client },
                    delivery: if direct { Delivery::Direct } else { Delivery::Stack },
                    sources: sources.map(|nets| {
                        nets.into_iter().map(|n| format!("192.0.{n}.0/24").parse().unwrap()).collect()
                    }),
                }),
            );
        }
        desired
    })
}

proptest! {
    /// Writes fail at random; the rest of their task is left out, as the sink does. At no moment does an address
    /// lead to a backend or pod that is not there, or is open to others than its Service has at some time asked for; and
    /// once writes work again the tables are as desired, but for source ranges that do not fit, each of which is told.
    #[test]
    fn any_change_under_failing_writes_converges(
        states in prop::collection::vec(any_desired(), 1..6),
        failures in prop::collection::vec(prop::bool::weighted(0.1), 200),
        room in prop_oneof![0..5_usize, Just(MAX_SOURCES as usize)],
    ) {
        let mut actual = Actual::default();
        let mut failures = failures.into_iter().cycle();
        let nobody = Some(BTreeSet::new());
        let mut asked_for: BTreeMap<&ServiceKey, Vec<&Option<BTreeSet<IpNet>>>> = BTreeMap::new();
        for desired in &states {
            for (key, service) in &desired.services {
                asked_for.entry(key).or_default().push(&service.sources);
            }
            let plan = Plan { room_for_sources: room, ..Plan::new(desired, &actual, &Scope::All, &VETHS) };
            for task in plan.tasks() {
                if let (Task::Update(id), Some(_)) = (task, plan.shortage(*task, &actual)) {
                    asked_for.entry(plan.wanted[id].0).or_default().push(&nobody);
                }
                for step in plan.steps(*task, &actual) {
                    if failures.next() == Some(true) {
                        break;
                    }
                    actual.apply(&step);
                    assert_consistent(&actual);
                    prop_assert!(actual.sources.len() <= room);
                    for value in actual.services.values().filter(|value| value.service_id != NO_SERVICE) {
                        let name = decode_name(&actual.names[&value.service_id]).unwrap();
                        let sources = sources::in_force(value, &actual);
                        prop_assert!(asked_for[&name].contains(&&sources), "{name:?} never asked for {sources:?}");
                    }
                }
            }
        }
        let last = states.last().unwrap();
        let shortages = carry_out_with_room(room, last, &mut actual);
        prop_assert_eq!(in_force(&actual), wanted(last));
        let free = room - actual.sources.len();
        let said = actual.in_force().services;
        let left_out: Vec<_> =
            last.services.iter().filter(|(key, service)| said[*key].sources != service.sources).collect();
        prop_assert_eq!(left_out.len(), shortages.len());
        for (key, service) in left_out {
            prop_assert!(service.sources.as_ref().is_some_and(|nets| nets.len() > free), "{:?} fits", key);
        }
        // With room for all.
        carry_out(last, &mut actual);
        assert_says(last, &actual);
    }
}
