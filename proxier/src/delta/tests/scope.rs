//! Plans about what has changed alone, and what they leave for later.

use super::*;

/// The Services in which two states differ.
fn difference(before: &Desired, after: &Desired) -> Scope {
    let keys = before.services.keys().chain(after.services.keys());
    Scope::Only(keys.filter(|key| before.services.get(key) != after.services.get(key)).cloned().collect())
}

/// `after`, but for these Services, which stay as they were; and these, whose pods do.
fn partly(before: &Desired, after: &Desired, stay: [bool; 4], pods_stay: [bool; 4]) -> Desired {
    let mut services = BTreeMap::new();
    let mut taken = BTreeSet::new();
    let keys = || (0..4).map(|index| key(&format!("s{index}"), Family::V4));
    for (key, _) in keys().zip(stay).filter(|(_, stays)| *stays) {
        if let Some(service) = before.services.get(&key) {
            taken.extend(service.externals.iter().copied());
            services.insert(key, Arc::clone(service));
        }
    }
    for ((key, stays), pods_stay) in keys().zip(stay).zip(pods_stay) {
        let Some(service) = after.services.get(&key).filter(|_| !stays) else { continue };
        let mut service = DesiredService::clone(service);
        service.externals.retain(|external| !taken.contains(external));
        if let Some(former) = before.services.get(&key).filter(|_| pods_stay) {
            service.pods.clone_from(&former.pods);
            service.draining.clone_from(&former.draining);
        }
        if !service.externals.is_empty() {
            services.insert(key, Arc::new(service));
        }
    }
    Desired { services, node_addresses: after.node_addresses.clone() }
}

/// What a pod has talked through an external address.
#[derive(Default)]
struct Conversation {
    /// The Service that had both.
    service_id: u32,
    /// The plan in which the pod left it.
    pod_left: Option<usize>,
    /// The plan in which it lost the external address.
    external_left: Option<usize>,
}

/// Tables with packets: whoever can speak to a pod does.
#[derive(Default)]
struct Node {
    actual: Actual,
    conversations: BTreeMap<(Address, Address), Conversation>,
    /// Pods with external addresses that have led to them since the last grace period: packets may be on their way.
    led: BTreeSet<(Address, Address)>,
    /// How many plans there have been.
    plans: usize,
}

impl Node {
    /// Carries out a step, unless it would hand conversations of one pod, or of one owner of an address, to another.
    fn apply(&mut self, step: &Step) {
        let Self { actual, conversations, plans, .. } = self;
        let of_pod =
            |pod: Address| move |((other, _), _): &(&(Address, Address), &mut Conversation)| *other == pod;
        let of_external = |external: Address| {
            move |((_, other), _): &(&(Address, Address), &mut Conversation)| *other == external
        };
        let before = |plan: Option<usize>| plan.is_some_and(|plan| plan < *plans);
        match step {
            Step::PutMember(key, _) if !actual.is_member(key.pod, key.service_id) => {
                let inherited =
                    conversations.iter_mut().filter(of_pod(key.pod)).any(|(_, talk)| before(talk.pod_left));
                assert!(!inherited, "{} is given conversations of a former pod", key.pod);
            }
            Step::RemoveMember(key) => {
                let talks = conversations.iter_mut().filter(of_pod(key.pod));
                for (_, talk) in talks.filter(|(_, talk)| talk.service_id == key.service_id) {
                    talk.pod_left.get_or_insert(*plans);
                }
            }
            Step::PutService(ExternalKey { external }, ServiceValue { service_id, .. })
                if owner(actual, *external) != *service_id =>
            {
                for (_, talk) in conversations.iter_mut().filter(of_external(*external)) {
                    let inherited = *service_id != NO_SERVICE && before(talk.external_left);
                    assert!(!inherited, "{external} comes back with conversations");
                    talk.external_left.get_or_insert(*plans);
                }
            }
            Step::RemoveService(ExternalKey { external }) => {
                for (_, talk) in conversations.iter_mut().filter(of_external(*external)) {
                    talk.external_left.get_or_insert(*plans);
                }
            }
            Step::RemoveName(id) => {
                let left = conversations.values().any(|talk| talk.service_id == *id);
                assert!(!left, "id {id} is freed before its conversations are gone");
            }
            _ => {}
        }
        if *step == Step::Sweep {
            let departed = actual.departed();
            self.sweep(&departed);
        }
        self.actual.apply(step);
        assert_consistent(&self.actual);
        if *step == Step::Grace {
            self.led.clear();
        }
        self.talk();
    }

    /// Ends what `departed` is about and is not kept.
    fn sweep(&mut self, departed: &Departed) {
        let Self { actual, conversations, .. } = self;
        conversations.retain(|(pod, external), _| {
            !departed.concerns(*pod, *external) || actual.keeps(*pod, *external)
        });
    }

    /// Everybody who can speaks to each pod.
    fn talk(&mut self) {
        let Self { actual, conversations, .. } = self;
        for (key, ServiceValue { service_id, .. }) in &actual.services {
            for (pod, _) in actual.members_of(*service_id) {
                // Kept by pod and address, whichever Service they were of.
                let talk = conversations.entry((pod, key.external)).or_default();
                *talk = Conversation { service_id: *service_id, ..Conversation::default() };
                self.led.insert((pod, key.external));
            }
        }
        for (pod, external) in &self.led {
            assert_led(actual, &ExternalKey { external: *external }, *pod);
            // One that is an external address as well may be so any moment.
            if pod.to_ip() >= IpAddr::from([11, 0, 0, 0]) {
                let own = &actual.services[&ExternalKey { external: *pod }];
                assert!(own.flags & SERVICE_IS_POD != 0, "{pod} is no pod");
            }
        }
    }

    /// As the sink does now and then: all that is left but conversations. Returns whether all of it was done.
    fn tidy_up(&mut self, mut fails: impl FnMut() -> bool) -> bool {
        for step in self.actual.retirement(&VETHS) {
            if fails() {
                return false;
            }
            self.apply(&step);
        }
        self.actual.retired();
        true
    }

    /// Begins to sweep beside further plans. What is kept at that time is not what it finds.
    fn begin_sweep(&mut self) -> Option<Vec<(Address, Address)>> {
        if self.actual.is_swept() {
            return None;
        }
        if let Some(step) = self.actual.before_sweep() {
            self.apply(&step);
        }
        let departed = self.actual.begin_sweep();
        let found = self.conversations.keys().filter(|(pod, external)| {
            departed.concerns(*pod, *external) && !self.actual.keeps(*pod, *external)
        });
        Some(found.copied().collect())
    }

    fn end_sweep(&mut self, found: &[(Address, Address)], worked: bool) {
        for (pod, external) in found.iter().filter(|_| worked) {
            if !self.actual.keeps(*pod, *external) {
                self.conversations.remove(&(*pod, *external));
            }
        }
        self.actual.end_sweep(worked);
        for step in self.actual.freeing() {
            self.apply(&step);
        }
    }

    /// Carries out `tasks`. Returns whether all of it was done.
    fn carry_out(&mut self, plan: &Plan<'_>, tasks: &[Task], mut fails: impl FnMut() -> bool) -> bool {
        let mut worked = true;
        for task in tasks {
            for step in plan.steps(*task, &self.actual) {
                // Pods do not wait for a sweep that fails.
                if !matches!(step, Step::Grace | Step::Sweep) && fails() {
                    worked = false;
                    break;
                }
                self.apply(&step);
            }
        }
        worked
    }
}

fn owner(actual: &Actual, external: Address) -> u32 {
    actual.services.get(&ExternalKey { external }).map_or(NO_SERVICE, |value| value.service_id)
}

/// What the tables say, whatever the ids and generations.
fn said(actual: &Actual) -> impl PartialEq + std::fmt::Debug + use<> {
    let counts = [actual.backends.len(), actual.members.len(), actual.sources.len(), actual.names.len()];
    (actual.in_force(), actual.pods.clone(), own_addresses(actual), counts)
}

/// A mirror whose indexes were built from the tables at once.
fn rebuilt(actual: &Actual) -> Actual {
    let Actual { services, backends, members, pods, sources, names, .. } = actual;
    let steps = (names.iter().map(|(id, value)| Step::PutName(*id, *value)))
        .chain(sources.iter().copied().map(Step::PutSource))
        .chain(pods.iter().map(|(key, value)| Step::PutPod(*key, *value)))
        .chain(members.iter().map(|(key, value)| Step::PutMember(*key, *value)))
        .chain(backends.iter().map(|(key, value)| Step::PutBackend(*key, *value)))
        .chain(services.iter().map(|(key, value)| Step::PutService(*key, *value)));
    Actual::read_back(steps.map(Ok::<_, std::convert::Infallible>)).unwrap()
}

/// What a plan with this scope ends in, once everything is tidied up.
fn outcome(desired: &Desired, scope: &Scope, actual: &Actual) -> Actual {
    let mut actual = actual.clone();
    let plan = Plan::new(desired, &actual, scope, &VETHS);
    for task in plan.tasks() {
        for step in plan.steps(*task, &actual) {
            actual.apply(&step);
            assert_consistent(&actual);
        }
    }
    actual
}

/// What of the steps of these tasks one looks at, in order.
fn kinds(plan: &Plan<'_>, tasks: &[Task], actual: &mut Actual) -> Vec<&'static str> {
    let mut kinds = Vec::new();
    for task in tasks {
        for step in plan.steps(*task, actual) {
            kinds.push(match step {
                Step::Grace => "grace",
                Step::Sweep => "sweep",
                Step::PutMember(..) => "joins",
                Step::RemoveMember(..) => "leaves",
                Step::RemoveBackend(..) => "retires",
                _ => "",
            });
            actual.apply(&step);
        }
    }
    kinds.retain(|kind| !kind.is_empty());
    kinds
}

#[test]
fn a_pod_that_comes_back_before_it_was_swept_waits_for_that() {
    let with = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.1", "11.0.0.2"]))]);
    let without = desired([(key("a", Family::V4), service(&["10.0.0.1"], &["11.0.0.2"]))]);
    let mut actual = Actual::default();
    carry_out(&with, &mut actual);
    actual.retired();
    let scope = difference(&with, &without);
    let leaves = Plan::new(&without, &actual, &scope, &VETHS);
    assert_eq!(kinds(&leaves, leaves.pressing(), &mut actual), ["leaves"]);
    let comes_back = Plan::new(&with, &actual, &scope, &VETHS);
    assert_eq!(kinds(&comes_back, comes_back.pressing(), &mut actual), ["grace", "sweep", "joins"]);
    // What both have left behind, in one go.
    let left = actual.retirement(&VETHS);
    let graces = left.iter().filter(|step| **step == Step::Grace).count();
    let backends = left.iter().filter(|step| matches!(step, Step::RemoveBackend(_))).count();
    assert_eq!((graces, backends), (1, 3), "{left:?}");
}

#[test]
fn a_pod_that_leaves_one_service_for_another_is_swept_at_once() {
    let state = |of_a: &[&str], of_b: &[&str]| {
        desired([
            (key("a", Family::V4), service(&["10.0.0.1"], of_a)),
            (key("b", Family::V4), service(&["10.0.0.2"], of_b)),
        ])
    };
    let before = state(&["11.0.0.1"], &[]);
    let after = state(&[], &["11.0.0.1"]);
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let plan = Plan::new(&after, &actual, &difference(&before, &after), &VETHS);
    let kinds = kinds(&plan, plan.pressing(), &mut actual);
    assert_eq!(kinds, ["leaves", "joins", "grace", "retires", "sweep"]);
}

#[test]
fn a_sweep_waits_for_packets_on_their_way_even_if_nothing_is_retired() {
    let drains = |service: DesiredService| DesiredService {
        draining: ["11.0.0.1".parse().unwrap()].into(),
        ..service
    };
    let state = |a: DesiredService| {
        let b = service(&["10.0.0.2", "10.0.0.3"], &["11.0.0.1"]);
        desired([(key("a", Family::V4), a), (key("b", Family::V4), b)])
    };
    let before = state(drains(service(&["10.0.0.1"], &[])));
    let after = state(service(&["10.0.0.1"], &[]));
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let plan = Plan::new(&after, &actual, &difference(&before, &after), &VETHS);
    assert_eq!(kinds(&plan, plan.tasks(), &mut actual), ["leaves", "grace", "sweep"]);
}

#[test]
fn a_plan_looks_at_its_scope_alone() {
    let state = |pods: &[&str]| {
        let service = |n: u8| {
            let pod = format!("11.0.1.{n}");
            let pods: Vec<&str> = pods.iter().copied().chain([pod.as_str()]).collect();
            (key(&format!("s{n}"), Family::V4), service(&[&format!("10.0.0.{n}")], &pods))
        };
        desired([service(1), service(2), service(3)])
    };
    let (before, after) = (state(&[]), state(&["11.0.0.9"]));
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let scope = Scope::Only([key("s2", Family::V4)].into());
    let plan = Plan::new(&after, &actual, &scope, &VETHS);
    assert_eq!(plan.tasks(), [Task::Node, Task::Update(2), Task::Retire, Task::Sweep]);
    let changed = outcome(&after, &scope, &actual).in_force();
    for (name, state) in [("s1", &before), ("s2", &after), ("s3", &before)] {
        let key = key(name, Family::V4);
        assert_eq!(changed.services[&key], state.services[&key], "{name}");
    }
}

proptest! {
    /// Whatever changes, whichever write fails, and whenever it is tidied up and swept meanwhile.
    #[test]
    fn plans_about_what_has_changed_end_as_those_about_everything_and_nobody_inherits_a_conversation(
        states in prop::collection::vec((any_desired_with_pods_in(10..12), any::<[[bool; 4]; 2]>(), any::<[bool; 5]>()), 1..12),
        failures in prop::collection::vec(prop::bool::weighted(0.03), 200),
    ) {
        let mut failures = failures.into_iter().cycle();
        let mut fails = || failures.next() == Some(true);
        let mut node = Node::default();
        let mut sweep: Option<Vec<(Address, Address)>> = None;
        let (mut before, mut worked) = (Desired::default(), true);
        for (after, [stay, pods_stay], [tidies, sweeps, ends, ends_well, restarts]) in &states {
            let desired = &partly(&before, after, *stay, *pods_stay);
            node.plans += 1;
            let scope = if worked { difference(&before, desired) } else { Scope::All };
            let in_one_go = outcome(desired, &scope, &node.actual);
            assert_says(desired, &in_one_go);
            prop_assert_eq!(said(&in_one_go), said(&outcome(desired, &Scope::All, &node.actual)));

            let plan = Plan::new(desired, &node.actual, &scope, &VETHS);
            let tasks = if *tidies { plan.tasks() } else { plan.pressing() };
            worked = node.carry_out(&plan, tasks, &mut fails);
            if *tidies {
                worked &= node.tidy_up(&mut fails);
            }
            if *ends && let Some(found) = sweep.take() {
                node.end_sweep(&found, *ends_well);
            }
            if *sweeps && sweep.is_none() {
                sweep = node.begin_sweep();
            }
            if !worked || *restarts {
                let read = rebuilt(&node.actual);
                node.actual.correct(read);
            }
            before = desired.clone();
        }
        // Nothing fails any more, and nothing is left for later.
        node.plans += 1;
        let scope = if worked { difference(&before, &before) } else { Scope::All };
        let plan = Plan::new(&before, &node.actual, &scope, &VETHS);
        prop_assert!(node.carry_out(&plan, plan.pressing(), || false));
        prop_assert!(node.tidy_up(|| false));
        if let Some(found) = sweep {
            node.end_sweep(&found, true);
        }
        if let Some(found) = node.begin_sweep() {
            node.end_sweep(&found, true);
        }
        for step in node.actual.freeing() {
            node.apply(&step);
        }
        assert_says(&before, &node.actual);
        prop_assert_eq!(node.actual.names.len(), before.services.len());
        for (pod, external) in node.conversations.keys() {
            prop_assert!(node.actual.keeps(*pod, *external), "{} by {} goes on", pod, external);
        }
        prop_assert_eq!(&rebuilt(&node.actual), &node.actual);
        prop_assert_eq!(node.actual.retirement(&VETHS), []);
    }
    /// Source ranges that do not fit are tried again by plans about everything, whenever there is one, and by no other: those
    /// are as right as ever all the same.
    #[test]
    fn beside_services_whose_ranges_do_not_fit_plans_about_what_has_changed_do(
        states in prop::collection::vec((any_desired_with_pods_in(10..12), any::<[[bool; 4]; 2]>(), any::<[bool; 3]>()), 1..12),
        room in 0..5_usize,
    ) {
        let mut node = Node::default();
        let mut before = Desired::default();
        let mut short: BTreeSet<ServiceKey> = BTreeSet::new();
        for (after, [stay, pods_stay], [tidies, is_retry, restarts]) in &states {
            let desired = &partly(&before, after, *stay, *pods_stay);
            node.plans += 1;
            let scope = if *is_retry { Scope::All } else { difference(&before, desired) };
            let plan =
                Plan { room_for_sources: room, ..Plan::new(desired, &node.actual, &scope, &VETHS) };
            let tasks = if *tidies { plan.tasks() } else { plan.pressing() };
            for task in tasks {
                if let Some(key) = plan.service(*task) {
                    short.remove(key);
                    short.extend(plan.shortage(*task, &node.actual).map(|_| key.clone()));
                }
                node.carry_out(&plan, &[*task], || false);
            }
            if *tidies {
                node.tidy_up(|| false);
            }
            if *restarts {
                let read = rebuilt(&node.actual);
                node.actual.correct(read);
            }
            short.retain(|key| desired.services.contains_key(key));
            prop_assert!(node.actual.sources.len() <= room);
            prop_assert_eq!(in_force(&node.actual), wanted(desired));
            let said = node.actual.in_force().services;
            for (key, service) in &desired.services {
                if short.contains(key) {
                    prop_assert!(service.sources.is_some(), "{:?} asks for no range", key);
                } else {
                    prop_assert_eq!(&said[key].sources, &service.sources, "{:?}", key);
                }
            }
            before = desired.clone();
        }
        // With room for all.
        carry_out(&before, &mut node.actual);
        assert_says(&before, &node.actual);
    }
}
