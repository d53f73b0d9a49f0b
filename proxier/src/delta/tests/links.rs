//! By which links pods of Services that are delivered directly are reached.

use super::*;

fn direct(service: DesiredService) -> DesiredService {
    DesiredService { delivery: Delivery::Direct, ..service }
}

/// These links alone: pod, index, and whether the other end is in the pod.
fn only(links: &[(&str, u32, bool)]) -> BTreeMap<Address, PodLink> {
    links
        .iter()
        .map(|(pod, interface, peer)| (address(pod), PodLink { interface: *interface, has_peer: *peer }))
        .collect()
}

fn link(actual: &Actual, pod: &str) -> Option<(u32, bool)> {
    let value = actual.pods.get(&PodKey { pod: address(pod) })?;
    Some((value.interface, value.flags & POD_HAS_PEER != 0))
}

/// Carries out a plan and all that it leaves.
fn carry_out_by(links: &dyn PodLinks, desired: &Desired, actual: &mut Actual) {
    let steps = |actual: &Actual| {
        let mut after = actual.clone();
        let plan = Plan::new(desired, actual, &Scope::All, links);
        let mut all = Vec::new();
        for task in plan.tasks() {
            for step in plan.steps(*task, &after) {
                after.apply(&step);
                all.push(step);
            }
        }
        all
    };
    for step in steps(actual) {
        actual.apply(&step);
        assert_consistent(actual);
    }
    assert_eq!(steps(actual), [], "a plan carried out leaves nothing to do");
    assert_eq!(actual.relink(links), [], "nor does it leave a link to be told");
}

fn relink(links: &dyn PodLinks, actual: &mut Actual) -> usize {
    let steps = actual.relink(links);
    steps.iter().for_each(|step| actual.apply(step));
    assert_eq!(actual.relink(links), []);
    steps.len()
}

#[test]
fn a_pod_of_a_direct_service_has_its_link_before_an_address_leads_to_it() {
    let state = |pods: &[&str]| {
        desired([
            (key("a", Family::V4), direct(service(&["10.0.0.1"], pods))),
            (key("b", Family::V4), service(&["10.0.0.2"], &["11.0.0.8"])),
        ])
    };
    let mut actual = Actual::default();
    carry_out(&state(&["11.0.0.1"]), &mut actual);
    let after = state(&["11.0.0.1", "11.0.0.2"]);
    let steps = steps(&after, &actual);
    let pods: Vec<_> = steps.iter().filter(|step| matches!(step, Step::PutPod(..))).collect();
    let [Step::PutPod(key, value)] = pods[..] else { panic!("{pods:?}") };
    assert_eq!((key.pod, value.interface), (address("11.0.0.2"), 102));
    carry_out(&after, &mut actual);
    assert_eq!(link(&actual, "11.0.0.1"), Some((101, false)));
    assert_eq!(link(&actual, "11.0.0.2"), Some((102, true)));
    assert_eq!(link(&actual, "11.0.0.8"), Some((0, false)), "of a Service that the stack delivers");
    assert_eq!(actual.direct_pods().collect::<Vec<_>>(), [address("11.0.0.1"), address("11.0.0.2")]);
}

#[test]
fn of_a_pods_services_those_are_named_that_ask_for_direct_delivery() {
    let state = desired([
        (key("a", Family::V4), direct(service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]))),
        (key("b", Family::V4), service(&["10.0.0.2"], &["11.0.0.1", "11.0.0.3"])),
        (key("c", Family::V4), direct(service(&["10.0.0.3"], &["11.0.0.1"]))),
    ]);
    let mut actual = Actual::default();
    carry_out(&state, &mut actual);
    let named = |pod: &str| actual.direct_services_of(address(pod)).into_iter().collect::<Vec<_>>();
    let [a, c] = ["a", "c"].map(|name| key(name, Family::V4).service);
    assert_eq!(named("11.0.0.1"), [a.clone(), c]);
    assert_eq!(named("11.0.0.2"), [a]);
    assert_eq!(named("11.0.0.3"), []);
}

#[test]
fn a_link_comes_goes_and_is_replaced_under_the_same_address() {
    let state = desired([(key("a", Family::V4), direct(service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"])))]);
    let mut actual = Actual::default();
    carry_out_by(&only(&[("11.0.0.2", 7, true)]), &state, &mut actual);
    assert_eq!(link(&actual, "11.0.0.1"), Some((0, false)), "nothing leads to it yet");
    assert_eq!(relink(&only(&[("11.0.0.1", 6, true), ("11.0.0.2", 7, true)]), &mut actual), 1);
    assert_eq!(link(&actual, "11.0.0.1"), Some((6, true)));
    // Another pod's interface, with the same address; and a bridge in place of a pod's own link.
    assert_eq!(relink(&only(&[("11.0.0.1", 9, true), ("11.0.0.2", 3, false)]), &mut actual), 2);
    assert_eq!(link(&actual, "11.0.0.1"), Some((9, true)));
    assert_eq!(link(&actual, "11.0.0.2"), Some((3, false)));
    assert_eq!(relink(&only(&[]), &mut actual), 2);
    assert_eq!(link(&actual, "11.0.0.1"), Some((0, false)));
    assert_consistent(&actual);
}

#[test]
fn a_pod_that_goes_takes_its_link_with_it_and_one_that_comes_has_another() {
    let with = desired([(key("a", Family::V4), direct(service(&["10.0.0.1"], &["11.0.0.1"])))]);
    let without = desired([(key("a", Family::V4), direct(service(&["10.0.0.1"], &[])))]);
    let mut actual = Actual::default();
    carry_out_by(&only(&[("11.0.0.1", 6, true)]), &with, &mut actual);
    carry_out_by(&only(&[]), &without, &mut actual);
    assert_eq!(link(&actual, "11.0.0.1"), None);
    assert_eq!(actual.linked_pods().count(), 0);
    carry_out_by(&only(&[("11.0.0.1", 8, false)]), &with, &mut actual);
    assert_eq!(link(&actual, "11.0.0.1"), Some((8, false)));
}

#[test]
fn after_a_restart_links_stay_and_nothing_is_written() {
    let state = desired([
        (key("a", Family::V4), direct(service(&["10.0.0.1", "10.0.0.2"], &["11.0.0.1", "11.0.0.2"]))),
        (key("b", Family::V4), service(&["10.0.0.3"], &["11.0.0.2", "11.0.0.4"])),
    ]);
    let mut actual = Actual::default();
    carry_out(&state, &mut actual);
    let values = actual.pods.iter().map(|(key, value)| Step::PutPod(*key, *value));
    let services = actual.services.iter().map(|(key, value)| Step::PutService(*key, *value));
    let members = actual.members.iter().map(|(key, value)| Step::PutMember(*key, *value));
    let read = values.chain(services).chain(members);
    let read = Actual::read_back(read.map(Ok::<_, std::convert::Infallible>)).unwrap();
    assert_eq!(read.relink(&VETHS), []);
    assert_eq!(read.direct_pods().collect::<Vec<_>>(), [address("11.0.0.1"), address("11.0.0.2")]);
    assert_eq!(actual.relink(&VETHS), []);
    assert_eq!(steps(&state, &actual), []);
}

#[test]
fn a_service_that_becomes_direct_gives_its_pods_links_first_and_one_that_no_longer_is_leaves_them() {
    let by_stack = desired([(key("a", Family::V4), service(&["10.0.0.1", "10.0.0.2"], &["11.0.0.2"]))]);
    let directly =
        desired([(key("a", Family::V4), direct(service(&["10.0.0.1", "10.0.0.2"], &["11.0.0.2"])))]);
    let mut actual = Actual::default();
    carry_out(&by_stack, &mut actual);
    assert_eq!(link(&actual, "11.0.0.2"), Some((0, false)));
    let change = steps(&directly, &actual);
    let at = |wanted: fn(&Step) -> bool| change.iter().position(wanted).unwrap();
    let linked = at(|step| matches!(step, Step::PutPod(_, value) if value.interface == 102));
    let flagged = at(|step| matches!(step, Step::PutService(_, value) if value.flags & SERVICE_DIRECT != 0));
    assert!(linked < flagged, "{change:?}");
    carry_out(&directly, &mut actual);
    carry_out(&by_stack, &mut actual);
    assert_eq!(link(&actual, "11.0.0.2"), Some((102, true)), "conversations go on by it");
    assert_eq!(actual.direct_pods().count(), 0);
    assert_eq!(actual.linked_pods().collect::<Vec<_>>(), [address("11.0.0.2")]);
    // Should that link go, the next one is no longer asked for.
    relink(&only(&[]), &mut actual);
    relink(&VETHS, &mut actual);
    assert_eq!(link(&actual, "11.0.0.2"), Some((0, false)));
}

#[test]
fn a_pod_of_a_direct_service_and_another_is_reached_directly_by_either() {
    let state = |of_b: Delivery| {
        let b = DesiredService { delivery: of_b, ..service(&["10.0.0.2"], &["11.0.0.2"]) };
        desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.2"])), (key("b", Family::V4), b)])
    };
    let mut actual = Actual::default();
    carry_out(&state(Delivery::Stack), &mut actual);
    assert_eq!(link(&actual, "11.0.0.2"), Some((0, false)));
    carry_out(&state(Delivery::Direct), &mut actual);
    // Whether a conversation is direct its Service says, by the flag of the address.
    assert_eq!(link(&actual, "11.0.0.2"), Some((102, true)));
    let flags = |external: &str| actual.services[&external_key(external.parse().unwrap())].flags;
    assert_eq!((flags("10.0.0.1") & SERVICE_DIRECT, flags("10.0.0.2") & SERVICE_DIRECT), (0, SERVICE_DIRECT));
}
