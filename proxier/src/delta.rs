//! What is to be done so that the kernel's tables become as desired: an ordered plan.
//!
//! Pure: [`Actual`] is a mirror of the tables, a [`Plan`] compares it with [`Desired`], and whoever carries the plan out
//! ([`crate::sink::bpf`]) tells the mirror of every step that worked. The steps of each task are asked for when its turn
//! comes, against what has been done by then: an address that changes hands leads somewhere at any moment, whichever
//! of the two Services comes first and whichever fails. After a restart the mirror is read back from the pinned maps
//! and the ordinary path runs.
//!
//! Packets flow while a plan is carried out, so the order within a Service matters:
//! 1. external addresses that nobody is to have are withdrawn, and the Service's name, its pods and their own addresses
//!    noted: what a pod sends is a reply only while `pods` has it;
//! 2. the next generation of `backends` is written beside the one in force;
//! 3. so is the next generation of `sources`, should the source ranges have changed, and fit;
//! 4. `members` is brought up to date: a session is checked against it only once its generation has passed;
//! 5. one write of `services` per address switches to the new generations.
//!
//! Services that are gone come next, so that their addresses have been taken over. Then, after every packet that has
//! seen the old state is done, what nothing leads to any more is removed; then flows and sessions of what went are
//! swept, and only then is the id of a Service free for another.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use proxier_common::{
    Address, BackendKey, BackendValue, ExternalKey, MAX_SOURCES, MEMBER_DRAINING, MemberKey, MemberValue,
    NameValue, PodKey, PodValue, SERVICE_BALANCE_FLOW, SERVICE_IS_NODE, SERVICE_IS_POD,
    SERVICE_PASS_WITHOUT_BACKEND, ServiceValue,
};

use crate::desired::{Balance, Desired, DesiredService, NoBackend, ServiceKey};

mod names;
mod pods;
mod sources;

use self::{
    names::Ids,
    pods::{Leads, Paths},
};
pub use self::{
    names::{decode_name, encode_name},
    sources::{Shortage, SourceRange},
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
    /// The map `pods`.
    pub pods: BTreeMap<PodKey, PodValue>,
    /// The map `sources`.
    pub sources: BTreeSet<SourceRange>,
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
    /// Writes a source range of a generation that is not in force yet.
    PutSource(SourceRange),
    /// Lets a pod belong to a Service.
    PutMember(MemberKey, MemberValue),
    /// Ends that.
    RemoveMember(MemberKey),
    /// Says that an address is a pod's, and which external address leads to it.
    PutPod(PodKey, PodValue),
    /// Ends that.
    RemovePod(PodKey),
    /// Puts a generation in force for an external address; or says that an address is a pod's own, or the node's.
    PutService(ExternalKey, ServiceValue),
    /// Lets go of an address.
    RemoveService(ExternalKey),
    /// Waits until every packet is done that the kernel programs were at work on.
    Grace,
    /// Removes a backend of a generation that is no longer in force.
    RemoveBackend(BackendKey),
    /// Removes a source range of a generation that is no longer in force.
    RemoveSource(SourceRange),
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
    /// Note the node's own addresses.
    Node,
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
    /// The node's own addresses, but those that some Service is to have.
    node: BTreeSet<ExternalKey>,
    /// All that can lead to each pod before, between and after the steps.
    leads: BTreeMap<Address, Leads>,
    /// How many source ranges fit the tables.
    room_for_sources: usize,
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
            Step::PutSource(range) => {
                self.sources.insert(range);
            }
            Step::RemoveSource(range) => {
                self.sources.remove(&range);
            }
            Step::PutMember(key, value) => {
                self.members.insert(key, value);
            }
            Step::RemoveMember(key) => {
                self.members.remove(&key);
            }
            Step::PutPod(key, value) => {
                self.pods.insert(key, value);
            }
            Step::RemovePod(key) => {
                self.pods.remove(&key);
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
            service.service_id != NO_SERVICE && self.members.contains_key(&key)
        })
    }

    /// What of [`Desired`] the tables say.
    #[must_use]
    pub fn in_force(&self) -> Desired {
        let mut desired = Desired::default();
        for (external, value) in &self.services {
            if value.flags & SERVICE_IS_NODE != 0 {
                desired.node_addresses.insert(external.external.to_ip());
            }
            if value.service_id == NO_SERVICE {
                continue;
            }
            let Some(key) = self.names.get(&value.service_id).and_then(decode_name) else {
                continue;
            };
            let service = desired.services.entry(key).or_insert_with(|| {
                Arc::new(DesiredService {
                    externals: BTreeSet::new(),
                    pods: self.pods(value.service_id, 0),
                    draining: self.pods(value.service_id, MEMBER_DRAINING),
                    affinity_timeout: value.affinity_timeout,
                    no_backend: if value.flags & SERVICE_PASS_WITHOUT_BACKEND == 0 {
                        NoBackend::Drop
                    } else {
                        NoBackend::Pass
                    },
                    balance: if value.flags & SERVICE_BALANCE_FLOW == 0 {
                        Balance::Client
                    } else {
                        Balance::Flow
                    },
                    sources: sources::in_force(value, self),
                })
            });
            Arc::make_mut(service).externals.insert(external.external.to_ip());
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
            .chain(self.sources.iter().map(|range| range.key.service_id))
            .filter(|id| *id != NO_SERVICE)
            .collect()
    }
}

/// The entries of pods' own addresses and of the node's in `services` belong to no Service.
const NO_SERVICE: u32 = 0;

/// What `services` says of an address that is nobody's external one: `flags` tell whose it is.
const fn own_address(flags: u32) -> ServiceValue {
    ServiceValue {
        service_id: NO_SERVICE,
        generation: 0,
        backend_count: 0,
        affinity_timeout: 0,
        flags,
        source_generation: 0,
    }
}

impl<'a> Plan<'a> {
    /// Compares. With `sweep_due`, sweeps even if nothing goes: an earlier sweep has failed.
    #[must_use]
    pub fn new(desired: &'a Desired, actual: &Actual, sweep_due: bool) -> Self {
        let mut ids = Ids::new(actual);
        let wanted: BTreeMap<u32, (&ServiceKey, &DesiredService)> =
            desired.services.iter().map(|(key, service)| (ids.of(key), (key, &**service))).collect();
        let mut owners = BTreeMap::new();
        for (id, (_, service)) in &wanted {
            owners.extend(service.externals.iter().map(|external| (external_key(*external), *id)));
        }
        let removed = ids.used.iter().filter(|id| !wanted.contains_key(id)).copied();
        let mut tasks = vec![Task::Node];
        tasks.extend(wanted.keys().copied().map(Task::Update).chain(removed.map(Task::Remove)));
        let leaves = |member: &MemberKey| {
            wanted.get(&member.service_id).is_none_or(|(_, service)| !service.has(member.pod.to_ip()))
        };
        let handed_over = |(external, value): (&ExternalKey, &ServiceValue)| {
            value.service_id != NO_SERVICE && owners.get(external) != Some(&value.service_id)
        };
        tasks.push(Task::Retire);
        if sweep_due
            || tasks.iter().any(|task| matches!(task, Task::Remove(_)))
            || actual.members.keys().any(leaves)
            || actual.services.iter().any(handed_over)
        {
            tasks.push(Task::Sweep);
        }
        let owned: BTreeSet<ExternalKey> = owners.into_keys().collect();
        let node = desired
            .node_addresses
            .iter()
            .copied()
            .map(external_key)
            .filter(|key| !owned.contains(key))
            .collect();
        let mut paths = Paths::in_force(actual);
        for (id, (_, service)) in &wanted {
            paths.add(*id, service);
        }
        let room_for_sources = MAX_SOURCES as usize;
        Self { wanted, owned, node, leads: paths.leads(), room_for_sources, tasks }
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
            Task::Node => self.own_addresses(self.node.iter().map(|key| key.external), actual),
            Task::Update(id) => match self.wanted.get(&id) {
                Some((key, service)) => {
                    let (held, going) =
                        held_by(id, actual).partition(|external| self.owned.contains(external));
                    self.update(id, key, service, held, going, actual)
                }
                None => Vec::new(),
            },
            Task::Remove(id) => removal(id, actual),
            Task::Retire => self.retirement(actual),
            Task::Sweep => {
                let free = actual
                    .ids()
                    .into_iter()
                    .filter(|id| !self.wanted.contains_key(id) && is_gone(*id, actual));
                [Step::Sweep].into_iter().chain(free.map(Step::RemoveName)).collect()
            }
        }
    }

    /// What of `task` its steps leave out for want of room, given what the tables hold before them. It may fit once another
    /// task has made room: to be tried again.
    #[must_use]
    pub fn shortage(&self, task: Task, actual: &Actual) -> Option<Shortage> {
        let Task::Update(id) = task else { return None };
        let (_, service) = self.wanted.get(&id)?;
        sources::next(id, service.sources.as_ref(), self.room_for_sources, actual).shortage
    }

    /// The steps that make Service `id` as desired.
    ///
    /// `held` are the addresses that lead to it now and that it or another Service is to have. All are led to the new
    /// generation: the other Service takes its own over with one write, and until then, or should that fail, they lead to
    /// pods that are there. `going` are those that nobody is to have.
    fn update(
        &self,
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
        let draining =
            service.draining.iter().map(|pod| Address::from(*pod)).filter(|pod| !pods.contains(pod));
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
                .map(|pod| (PodKey { pod: *pod }, self.leads.get(pod).copied().unwrap_or_default().value()))
                .filter(|(key, value)| actual.pods.get(key) != Some(value))
                .map(|(key, value)| Step::PutPod(key, value)),
        );
        steps.extend(self.own_addresses(wanted.keys().copied(), actual));
        if is_new {
            steps.extend(slots(&pods).map(|(slot, pod)| {
                Step::PutBackend(BackendKey { service_id: id, generation, slot }, BackendValue { pod })
            }));
        }
        let sources::Next { generation: source_generation, unwritten, .. } =
            sources::next(id, service.sources.as_ref(), self.room_for_sources, actual);
        steps.extend(unwritten.into_iter().map(Step::PutSource));
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
            members
                .keys()
                .filter(|pod| !wanted.contains_key(pod))
                .map(|pod| Step::RemoveMember(member_key(pod))),
        );
        let value = ServiceValue {
            service_id: id,
            generation,
            backend_count: u32::try_from(pods.len()).unwrap_or(u32::MAX),
            affinity_timeout: service.affinity_timeout,
            flags: flags_of(service),
            source_generation,
        };
        let mut externals: BTreeSet<ExternalKey> =
            service.externals.iter().copied().map(external_key).collect();
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

    /// Says of each of these addresses that nobody's Service has that it is a pod's, the node's, or both.
    fn own_addresses(&self, addresses: impl IntoIterator<Item = Address>, actual: &Actual) -> Vec<Step> {
        addresses
            .into_iter()
            .map(|external| ExternalKey { external })
            .filter(|key| !self.owned.contains(key))
            .map(|key| {
                let is_pod = self.leads.contains_key(&key.external);
                let node = if self.node.contains(&key) { SERVICE_IS_NODE } else { 0 };
                (key, own_address(node | if is_pod { SERVICE_IS_POD } else { 0 }))
            })
            .filter(|(key, value)| actual.services.get(key) != Some(value))
            .map(|(key, value)| Step::PutService(key, value))
            .collect()
    }

    /// Backends that no address leads to, source ranges that none asks for, pods that belong to no Service, and addresses that are nobody's any more. Of the
    /// pods that stay, what leads to them now.
    fn retirement(&self, actual: &Actual) -> Vec<Step> {
        let in_force: BTreeSet<(u32, u32)> =
            actual.services.values().map(|value| (value.service_id, value.generation)).collect();
        let leads = Paths::in_force(actual).leads();
        let backends = actual
            .backends
            .keys()
            .filter(|key| !in_force.contains(&(key.service_id, key.generation)))
            .map(|key| Step::RemoveBackend(*key));
        let pods = actual.pods.iter().filter_map(|(key, value)| match leads.get(&key.pod) {
            Some(leads) if leads.value() == *value => None,
            Some(leads) => Some(Step::PutPod(*key, leads.value())),
            None => Some(Step::RemovePod(*key)),
        });
        let addresses = actual.services.iter().filter(|(_, value)| value.service_id == NO_SERVICE);
        let addresses = addresses.filter_map(|(key, value)| {
            let node = if self.node.contains(key) { SERVICE_IS_NODE } else { 0 };
            let pod = if leads.contains_key(&key.external) { SERVICE_IS_POD } else { 0 };
            match node | pod {
                0 => Some(Step::RemoveService(*key)),
                flags if flags == value.flags => None,
                flags => Some(Step::PutService(*key, own_address(flags))),
            }
        });
        let ranges = sources::out_of_force(actual).map(Step::RemoveSource);
        let retired: Vec<Step> = backends.chain(ranges).chain(pods).chain(addresses).collect();
        if retired.is_empty() { retired } else { [Step::Grace].into_iter().chain(retired).collect() }
    }

    /// What `task` is about, for people.
    #[must_use]
    pub fn subject(&self, task: Task, actual: &Actual) -> String {
        let id = match task {
            Task::Node => return "the node's own addresses".to_owned(),
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

fn external_key(external: IpAddr) -> ExternalKey {
    ExternalKey { external: external.into() }
}

fn removal(id: u32, actual: &Actual) -> Vec<Step> {
    let members = actual.members.keys().filter(|key| key.service_id == id);
    held_by(id, actual).map(Step::RemoveService).chain(members.map(|key| Step::RemoveMember(*key))).collect()
}

/// Whether nothing but its name is left of a Service.
fn is_gone(id: u32, actual: &Actual) -> bool {
    removal(id, actual).is_empty()
        && actual.backends.range(all_backends_of(id)).next().is_none()
        && sources::of_service(id, actual).next().is_none()
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

/// [`ServiceValue::flags`] of an external address.
const fn flags_of(service: &DesiredService) -> u32 {
    let no_backend = match service.no_backend {
        NoBackend::Drop => 0,
        NoBackend::Pass => SERVICE_PASS_WITHOUT_BACKEND,
    };
    let balance = match service.balance {
        Balance::Client => 0,
        Balance::Flow => SERVICE_BALANCE_FLOW,
    };
    no_backend | balance
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
mod tests;
