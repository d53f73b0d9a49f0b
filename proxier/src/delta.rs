//! What is to be done so that the kernel's tables become as desired: an ordered plan.
//!
//! Pure: [`Actual`] is a mirror of the tables, a [`Plan`] compares it with [`Desired`], and whoever carries the plan out
//! ([`crate::sink::bpf`]) tells the mirror of every step that worked. The steps of each task are asked for when its turn
//! comes, against what has been done by then: an address that changes hands leads somewhere at any moment, whichever
//! of the two Services comes first and whichever fails. After a restart the mirror is read back from the pinned maps
//! and the ordinary path runs.
//!
//! Packets flow while a plan is carried out, so the order within a Service matters:
//! 1. external addresses that nobody is to have are withdrawn, and the Service's name and its pods' own addresses noted;
//! 2. the next generation of `backends` is written beside the one in force;
//! 3. `members` is brought up to date: a session is checked against it only once its generation has passed;
//! 4. one write of `services` per address switches to the new generation.
//!
//! Services that are gone come next, so that their addresses have been taken over. Then, after every packet that has
//! seen the old state is done, what nothing leads to any more is removed; then flows and sessions of what went are
//! swept, and only then is the id of a Service free for another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use proxier_common::{
    Address, BackendKey, BackendValue, ExternalKey, MAX_NAME, MEMBER_DRAINING, MemberKey, MemberValue,
    NameValue, SERVICE_IS_POD, SERVICE_PASS_WITHOUT_BACKEND, ServiceValue,
};

use crate::{
    desired::{Desired, DesiredService, NoBackend, ServiceKey},
    model::{Family, ObjectName},
};

/// The tables that only user space writes, as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The map `services`.
    pub services: BTreeMap<ExternalKey, ServiceValue>,
    /// The map `backends`.
    pub backends: BTreeMap<BackendKey, BackendValue>,
    /// The map `members`.
    pub members: BTreeMap<MemberKey, MemberValue>,
    /// The map `names`.
    pub names: BTreeMap<u32, NameValue>,
}

/// One write to the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Says which Service an id stands for.
    PutName(u32, NameValue),
    /// Writes a backend of a generation that is not in force yet.
    PutBackend(BackendKey, BackendValue),
    /// Lets a pod belong to a Service.
    PutMember(MemberKey, MemberValue),
    /// Ends that.
    RemoveMember(MemberKey),
    /// Puts a generation in force for an external address.
    PutService(ExternalKey, ServiceValue),
    /// Lets go of an external address.
    RemoveService(ExternalKey),
    /// Waits until every packet is done that the kernel programs were at work on.
    Grace,
    /// Removes a backend of a generation that is no longer in force.
    RemoveBackend(BackendKey),
    /// Removes every flow whose pod is no member of the Service that has its external address now, and every session of
    /// which neither the pod nor the former one is.
    Sweep,
    /// Frees an id.
    RemoveName(u32),
}

/// A part of a [`Plan`]. When one of its steps fails, those after it must not run: they rely on it. Nothing in another
/// task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Make the Service of this id as desired.
    Update(u32),
    /// Remove the Service of this id.
    Remove(u32),
    /// Remove what nothing leads to any more.
    Retire,
    /// Remove flows and sessions of what went, and free ids.
    Sweep,
}

/// What is to be done so that the tables become as desired.
#[derive(Debug)]
pub struct Plan<'a> {
    wanted: BTreeMap<u32, (&'a ServiceKey, &'a DesiredService)>,
    /// Addresses that some Service is to have.
    owned: BTreeSet<ExternalKey>,
    tasks: Vec<Task>,
}

impl Actual {
    /// Notes that a step was carried out.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutName(id, value) => {
                self.names.insert(id, value);
            }
            Step::PutBackend(key, value) => {
                self.backends.insert(key, value);
            }
            Step::PutMember(key, value) => {
                self.members.insert(key, value);
            }
            Step::RemoveMember(key) => {
                self.members.remove(&key);
            }
            Step::PutService(key, value) => {
                self.services.insert(key, value);
            }
            Step::RemoveService(key) => {
                self.services.remove(&key);
            }
            Step::RemoveBackend(key) => {
                self.backends.remove(&key);
            }
            Step::Grace | Step::Sweep => {}
            Step::RemoveName(id) => {
                self.names.remove(&id);
            }
        }
    }

    /// Whether a flow or session of this pod and external address may stay: the pod belongs to the Service that has the
    /// address now, whichever had it when the conversation began.
    #[must_use]
    pub fn keeps(&self, pod: Address, external: Address) -> bool {
        self.services.get(&ExternalKey { external }).is_some_and(|service| {
            let key = MemberKey { pod, service_id: service.service_id, padding: 0 };
            service.flags & SERVICE_IS_POD == 0 && self.members.contains_key(&key)
        })
    }

    /// What of [`Desired`] the tables say.
    #[must_use]
    pub fn in_force(&self) -> Desired {
        let mut desired = Desired::default();
        for (external, value) in self.services.iter().filter(|(_, value)| value.service_id != POD_ID) {
            let Some(key) = self.names.get(&value.service_id).and_then(decode_name) else {
                continue;
            };
            let service = desired.services.entry(key).or_insert_with(|| DesiredService {
                externals: BTreeSet::new(),
                pods: self.pods(value.service_id, 0),
                draining: self.pods(value.service_id, MEMBER_DRAINING),
                affinity_timeout: value.affinity_timeout,
                no_backend: if value.flags & SERVICE_PASS_WITHOUT_BACKEND == 0 {
                    NoBackend::Drop
                } else {
                    NoBackend::Pass
                },
            });
            service.externals.insert(external.external.to_ip());
        }
        desired
    }

    /// The members of a Service that have these flags.
    fn pods(&self, service_id: u32, flags: u32) -> BTreeSet<IpAddr> {
        self.members
            .iter()
            .filter(|(key, value)| key.service_id == service_id && value.flags == flags)
            .map(|(key, _)| key.pod.to_ip())
            .collect()
    }

    /// Every id that something in the tables still uses.
    fn ids(&self) -> BTreeSet<u32> {
        self.names
            .keys()
            .copied()
            .chain(self.services.values().map(|value| value.service_id))
            .chain(self.backends.keys().map(|key| key.service_id))
            .chain(self.members.keys().map(|key| key.service_id))
            .filter(|id| *id != POD_ID)
            .collect()
    }
}

/// The entries of pods' own addresses in `services` belong to no Service.
const POD_ID: u32 = 0;

/// What `services` says of a pod's own address.
const POD: ServiceValue = ServiceValue {
    service_id: POD_ID,
    generation: 0,
    backend_count: 0,
    affinity_timeout: 0,
    flags: SERVICE_IS_POD,
    padding: 0,
};

/// The form in which `names` keeps a Service.
#[must_use]
pub fn encode_name(key: &ServiceKey) -> NameValue {
    NameValue {
        namespace: padded(&key.service.namespace),
        name: padded(&key.service.name),
        family: match key.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
    }
}

/// The Service that an entry of `names` stands for; `None` if it is not one that [`encode_name`] wrote.
#[must_use]
pub fn decode_name(value: &NameValue) -> Option<ServiceKey> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok().map(ToOwned::to_owned)
    };
    Some(ServiceKey {
        service: ObjectName { namespace: text(&value.namespace)?, name: text(&value.name)? },
        family: match value.family {
            4 => Family::V4,
            6 => Family::V6,
            _ => return None,
        },
    })
}

/// Cuts at [`MAX_NAME`] bytes: the API server accepts none longer, a manifest from a file could hold one.
fn padded(text: &str) -> [u8; MAX_NAME + 1] {
    let mut bytes = [0; MAX_NAME + 1];
    for (to, from) in bytes[..MAX_NAME].iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

impl<'a> Plan<'a> {
    /// Compares. With `sweep_due`, sweeps even if nothing goes: an earlier sweep has failed.
    #[must_use]
    pub fn new(desired: &'a Desired, actual: &Actual, sweep_due: bool) -> Self {
        let mut ids = Ids::new(actual);
        let wanted: BTreeMap<u32, (&ServiceKey, &DesiredService)> =
            desired.services.iter().map(|(key, service)| (ids.of(key), (key, service))).collect();
        let mut owners = BTreeMap::new();
        for (id, (_, service)) in &wanted {
            owners.extend(service.externals.iter().map(|external| (external_key(*external), *id)));
        }
        let removed = ids.used.iter().filter(|id| !wanted.contains_key(id)).copied();
        let mut tasks: Vec<Task> =
            wanted.keys().copied().map(Task::Update).chain(removed.map(Task::Remove)).collect();
        let leaves = |member: &MemberKey| {
            wanted.get(&member.service_id).is_none_or(|(_, service)| !service.has(member.pod.to_ip()))
        };
        let handed_over = |(external, value): (&ExternalKey, &ServiceValue)| {
            value.service_id != POD_ID && owners.get(external) != Some(&value.service_id)
        };
        tasks.push(Task::Retire);
        if sweep_due
            || tasks.iter().any(|task| matches!(task, Task::Remove(_)))
            || actual.members.keys().any(leaves)
            || actual.services.iter().any(handed_over)
        {
            tasks.push(Task::Sweep);
        }
        Self { wanted, owned: owners.into_keys().collect(), tasks }
    }

    /// What to do, in this order.
    #[must_use]
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// The steps of `task`, in this order, given what the tables hold now. None if there is nothing to do.
    #[must_use]
    pub fn steps(&self, task: Task, actual: &Actual) -> Vec<Step> {
        match task {
            Task::Update(id) => match self.wanted.get(&id) {
                Some((key, service)) => {
                    let (held, going) =
                        held_by(id, actual).partition(|external| self.owned.contains(external));
                    update(id, key, service, held, going, actual)
                }
                None => Vec::new(),
            },
            Task::Remove(id) => removal(id, actual),
            Task::Retire => retirement(actual),
            Task::Sweep => {
                let free = actual
                    .ids()
                    .into_iter()
                    .filter(|id| !self.wanted.contains_key(id) && is_gone(*id, actual));
                [Step::Sweep].into_iter().chain(free.map(Step::RemoveName)).collect()
            }
        }
    }

    /// What `task` is about, for people.
    #[must_use]
    pub fn subject(&self, task: Task, actual: &Actual) -> String {
        let id = match task {
            Task::Retire => return "what nothing leads to any more".to_owned(),
            Task::Sweep => return "flows and sessions of what went".to_owned(),
            Task::Update(id) | Task::Remove(id) => id,
        };
        let known = actual.names.get(&id).and_then(decode_name);
        match self.wanted.get(&id).map(|(key, _)| (*key).clone()).or(known) {
            Some(key) => format!("Service {} ({})", key.service, key.family),
            None => format!("Service id {id}"),
        }
    }
}

/// Which id stands for which Service: the one it has, or the lowest that nothing uses.
struct Ids {
    known: BTreeMap<ServiceKey, u32>,
    used: BTreeSet<u32>,
    given: BTreeSet<u32>,
}

impl Ids {
    fn new(actual: &Actual) -> Self {
        let known = actual.names.iter().filter_map(|(id, value)| Some((decode_name(value)?, *id))).collect();
        Self { known, used: actual.ids(), given: BTreeSet::new() }
    }

    fn of(&mut self, key: &ServiceKey) -> u32 {
        if let Some(id) = self.known.get(key) {
            return *id;
        }
        let mut id = 1;
        while self.used.contains(&id) || self.given.contains(&id) {
            id += 1;
        }
        self.given.insert(id);
        id
    }
}

fn external_key(external: IpAddr) -> ExternalKey {
    ExternalKey { external: external.into() }
}

fn removal(id: u32, actual: &Actual) -> Vec<Step> {
    let members = actual.members.keys().filter(|key| key.service_id == id);
    held_by(id, actual).map(Step::RemoveService).chain(members.map(|key| Step::RemoveMember(*key))).collect()
}

/// Whether nothing but its name is left of a Service.
fn is_gone(id: u32, actual: &Actual) -> bool {
    removal(id, actual).is_empty() && actual.backends.range(all_backends_of(id)).next().is_none()
}

/// Backends that no address leads to, and addresses of pods that belong to no Service.
fn retirement(actual: &Actual) -> Vec<Step> {
    let in_force: BTreeSet<(u32, u32)> =
        actual.services.values().map(|value| (value.service_id, value.generation)).collect();
    let pods: BTreeSet<Address> = actual.members.keys().map(|key| key.pod).collect();
    let backends = actual
        .backends
        .keys()
        .filter(|key| !in_force.contains(&(key.service_id, key.generation)))
        .map(|key| Step::RemoveBackend(*key));
    let addresses = actual
        .services
        .iter()
        .filter(|(key, value)| value.service_id == POD_ID && !pods.contains(&key.external))
        .map(|(key, _)| Step::RemoveService(*key));
    let retired: Vec<Step> = backends.chain(addresses).collect();
    if retired.is_empty() { retired } else { [Step::Grace].into_iter().chain(retired).collect() }
}

/// The addresses that lead to Service `id` now.
fn held_by(id: u32, actual: &Actual) -> impl Iterator<Item = ExternalKey> {
    actual.services.iter().filter(move |(_, value)| value.service_id == id).map(|(external, _)| *external)
}

fn all_backends_of(id: u32) -> std::ops::RangeInclusive<BackendKey> {
    BackendKey { service_id: id, generation: 0, slot: 0 }..=BackendKey {
        service_id: id,
        generation: u32::MAX,
        slot: u32::MAX,
    }
}

/// The steps that make Service `id` as desired.
///
/// `held` are the addresses that lead to it now and that it or another Service is to have. All are led to the new
/// generation: the other Service takes its own over with one write, and until then, or should that fail, they lead to
/// pods that are there. `going` are those that nobody is to have.
fn update(
    id: u32,
    key: &ServiceKey,
    service: &DesiredService,
    held: BTreeSet<ExternalKey>,
    going: BTreeSet<ExternalKey>,
    actual: &Actual,
) -> Vec<Step> {
    let mut steps: Vec<Step> = going.into_iter().map(Step::RemoveService).collect();
    let name = encode_name(key);
    if actual.names.get(&id) != Some(&name) {
        steps.push(Step::PutName(id, name));
    }
    let pods: BTreeSet<Address> = service.pods.iter().map(|pod| Address::from(*pod)).collect();
    let draining = service.draining.iter().map(|pod| Address::from(*pod)).filter(|pod| !pods.contains(pod));
    let wanted: BTreeMap<Address, u32> =
        pods.iter().map(|pod| (*pod, 0)).chain(draining.map(|pod| (pod, MEMBER_DRAINING))).collect();
    let members: BTreeMap<Address, MemberValue> = actual
        .members
        .iter()
        .filter(|(key, _)| key.service_id == id)
        .map(|(key, value)| (key.pod, *value))
        .collect();
    let (generation, is_new) = generation_for(id, &pods, &members, actual);
    steps.extend(
        wanted
            .keys()
            .map(|pod| ExternalKey { external: *pod })
            .filter(|key| actual.services.get(key) != Some(&POD))
            .map(|key| Step::PutService(key, POD)),
    );
    if is_new {
        steps.extend(slots(&pods).map(|(slot, pod)| {
            Step::PutBackend(BackendKey { service_id: id, generation, slot }, BackendValue { pod })
        }));
    }
    let member_key = |pod: &Address| MemberKey { pod: *pod, service_id: id, padding: 0 };
    for (pod, flags) in &wanted {
        // Who has been there all along stays as old as he was.
        let since_generation = members.get(pod).map_or(generation, |member| member.since_generation);
        let value = MemberValue { since_generation, flags: *flags };
        if members.get(pod) != Some(&value) {
            steps.push(Step::PutMember(member_key(pod), value));
        }
    }
    steps.extend(
        members.keys().filter(|pod| !wanted.contains_key(pod)).map(|pod| Step::RemoveMember(member_key(pod))),
    );
    let value = ServiceValue {
        service_id: id,
        generation,
        backend_count: u32::try_from(pods.len()).unwrap_or(u32::MAX),
        affinity_timeout: service.affinity_timeout,
        flags: match service.no_backend {
            NoBackend::Drop => 0,
            NoBackend::Pass => SERVICE_PASS_WITHOUT_BACKEND,
        },
        padding: 0,
    };
    let mut externals: BTreeSet<ExternalKey> = service.externals.iter().copied().map(external_key).collect();
    if is_new {
        externals.extend(held);
    }
    steps.extend(
        externals
            .into_iter()
            .filter(|key| actual.services.get(key) != Some(&value))
            .map(|key| Step::PutService(key, value)),
    );
    steps
}

fn slots(pods: &BTreeSet<Address>) -> impl Iterator<Item = (u32, Address)> {
    (0..).zip(pods.iter().copied())
}

/// The generation to be in force, and whether it has yet to be written.
fn generation_for(
    id: u32,
    pods: &BTreeSet<Address>,
    members: &BTreeMap<Address, MemberValue>,
    actual: &Actual,
) -> (u32, bool) {
    let of_service = || actual.services.values().filter(|value| value.service_id == id);
    let in_force: BTreeSet<u32> = of_service().map(|value| value.generation).collect();
    // More than one is what an interrupted switch leaves behind.
    if let (1, Some(generation)) = (in_force.len(), in_force.first()) {
        let has = |slot, pod: &Address| {
            let key = BackendKey { service_id: id, generation: *generation, slot };
            actual.backends.get(&key).is_some_and(|backend| backend.pod == *pod)
        };
        let complete = slots(pods).all(|(slot, pod)| has(slot, &pod));
        let counted = of_service().all(|value| value.backend_count as usize == pods.len());
        if complete && counted {
            return (*generation, false);
        }
    }
    let written = actual.backends.range(all_backends_of(id)).map(|(key, _)| key.generation);
    let joined = members.values().map(|value| value.since_generation);
    let last = in_force.iter().copied().chain(written).chain(joined).max().unwrap_or(0);
    (last.wrapping_add(1), true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        }
    }

    fn desired<const N: usize>(services: [(ServiceKey, DesiredService); N]) -> Desired {
        Desired { services: services.into() }
    }

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn id_of(actual: &Actual, external: &str) -> u32 {
        actual.services[&external_key(external.parse().unwrap())].service_id
    }

    /// Every address in force leads to backends that are there.
    fn assert_consistent(actual: &Actual) {
        for (key, service) in &actual.services {
            for slot in 0..service.backend_count {
                let backend =
                    BackendKey { service_id: service.service_id, generation: service.generation, slot };
                assert!(actual.backends.contains_key(&backend), "{} lacks {backend:?}", key.external);
            }
        }
    }

    /// Every step, carried out as it comes.
    fn steps(desired: &Desired, actual: &Actual) -> Vec<Step> {
        let mut actual = actual.clone();
        let plan = Plan::new(desired, &actual, false);
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
            .filter(|(_, value)| value.service_id != POD_ID)
            .map(|(key, value)| {
                let pods = (0..value.backend_count)
                    .map(|slot| BackendKey {
                        service_id: value.service_id,
                        generation: value.generation,
                        slot,
                    })
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
                Step::PutService(..) => "service",
                _ => "other",
            })
            .collect();
        assert_eq!(
            kinds,
            ["name", "service", "service", "backend", "backend", "member", "member", "service"],
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
        assert!(
            !steps.contains(&Step::RemoveService(external_key("10.0.0.1".parse().unwrap()))),
            "{steps:?}"
        );
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

    /// Any few Services, addresses and pods; an address has one owner, as `desired` sees to.
    fn any_desired() -> impl Strategy<Value = Desired> {
        let owner = prop::option::of(0..4_usize);
        let pods = (prop::collection::btree_set(1..6_u8, 0..4), prop::collection::btree_set(1..6_u8, 0..2));
        (prop::collection::vec(owner, 5), prop::collection::vec((pods, 1..3_u32), 4)).prop_map(
            |(owners, services)| {
                let mut desired = Desired::default();
                for (index, ((pods, draining), timeout)) in services.into_iter().enumerate() {
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
                        DesiredService {
                            externals,
                            pods: pods.into_iter().map(|n| IpAddr::from([11, 0, 0, n])).collect(),
                            draining: draining.into_iter().map(|n| IpAddr::from([11, 0, 0, n])).collect(),
                            affinity_timeout: timeout,
                            no_backend: NoBackend::Drop,
                        },
                    );
                }
                desired
            },
        )
    }

    proptest! {
        /// Writes fail at random; the rest of their task is left out, as the sink does. At no moment does an address
        /// lead to a backend that is not there, and once writes work again the tables are as desired.
        #[test]
        fn any_change_under_failing_writes_converges(
            states in prop::collection::vec(any_desired(), 1..6),
            failures in prop::collection::vec(prop::bool::weighted(0.1), 200),
        ) {
            let mut actual = Actual::default();
            let mut failures = failures.into_iter().cycle();
            for desired in &states {
                let plan = Plan::new(desired, &actual, false);
                for task in plan.tasks() {
                    for step in plan.steps(*task, &actual) {
                        if failures.next() == Some(true) {
                            break;
                        }
                        actual.apply(&step);
                        assert_consistent(&actual);
                    }
                }
            }
            let last = states.last().unwrap();
            carry_out(last, &mut actual);
            prop_assert_eq!(in_force(&actual), wanted(last));
            let members: BTreeSet<(ServiceKey, IpAddr)> = actual
                .members
                .keys()
                .map(|key| (decode_name(&actual.names[&key.service_id]).unwrap(), key.pod.to_ip()))
                .collect();
            let expected = last.services.iter().flat_map(|(key, service)| {
                service.pods.union(&service.draining).map(|pod| (key.clone(), *pod))
            });
            prop_assert_eq!(&members, &expected.collect());
            let pods: BTreeSet<IpAddr> = members.into_iter().map(|(_, pod)| pod).collect();
            let known = actual.services.iter().filter(|(_, value)| value.service_id == POD_ID);
            prop_assert_eq!(pods, known.map(|(key, _)| key.external.to_ip()).collect());
        }
    }
}
