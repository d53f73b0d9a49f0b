//! What is to be done, task by task. Pure.

use std::collections::{BTreeMap, BTreeSet};

use proxier_common::{
    Address, BackendKey, BackendValue, ExternalKey, MAX_SOURCES, MEMBER_DRAINING, MemberKey, MemberValue,
    PodKey, SERVICE_IS_NODE, SERVICE_IS_POD, ServiceValue,
};

use super::{
    Actual, NO_SERVICE, Step, decode_name, encode_name, external_key, flags_of,
    names::Ids,
    own_address,
    pods::{Leads, PodLinks},
    sources::{self, Shortage},
};
use crate::desired::{Delivery, Desired, DesiredService, Scope, ServiceKey};

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
    pub(super) wanted: BTreeMap<u32, (&'a ServiceKey, &'a DesiredService)>,
    /// Services that are to go.
    pub(super) removed: BTreeSet<u32>,
    /// Whether the two are all Services that there are.
    pub(super) covers_all: bool,
    /// Addresses that some Service of `wanted` is to have.
    pub(super) owned: BTreeSet<ExternalKey>,
    /// The node's own addresses.
    pub(super) node: BTreeSet<Address>,
    /// All that can lead to each pod of `wanted` before, between and after the steps.
    pub(super) leads: BTreeMap<Address, Leads>,
    /// Pods of those of `wanted` that are to be delivered directly.
    pub(super) direct: BTreeSet<Address>,
    /// Who knows their links.
    pub(super) links: &'a dyn PodLinks,
    /// How many source ranges fit the tables.
    pub(super) room_for_sources: usize,
    pub(super) tasks: Vec<Task>,
    /// Whether the last two of the tasks may be left for later.
    pub(super) can_wait: bool,
}

impl<'a> Plan<'a> {
    /// Compares the Services of `scope`, and the node's addresses. All others are taken to be as desired already. What has
    /// become of pods' `links` beside, [`Actual::relink`] tells.
    #[must_use]
    pub fn new(desired: &'a Desired, actual: &Actual, scope: &Scope, links: &'a dyn PodLinks) -> Self {
        let mut ids = Ids::new(actual);
        let mut with_id =
            |key: &'a ServiceKey, service: &'a DesiredService| Some((ids.of(key)?, (key, service)));
        let covers_all = matches!(scope, Scope::All);
        let (wanted, removed): (BTreeMap<_, _>, BTreeSet<u32>) = match scope {
            Scope::All => {
                let wanted: BTreeMap<_, _> =
                    desired.services.iter().filter_map(|(key, service)| with_id(key, service)).collect();
                let mut removed = actual.used_ids();
                removed.retain(|id| !wanted.contains_key(id));
                (wanted, removed)
            }
            Scope::Only(keys) => {
                let wanted = keys.iter().filter_map(|key| desired.services.get_key_value(key));
                let gone = keys.iter().filter(|key| !desired.services.contains_key(key));
                (
                    wanted.filter_map(|(key, service)| with_id(key, service)).collect(),
                    gone.filter_map(|key| actual.id_of(key)).collect(),
                )
            }
        };
        let owned = wanted.values().flat_map(|(_, service)| &service.externals);
        let is_direct = |service: &&DesiredService| service.delivery == Delivery::Direct;
        let direct = wanted.values().map(|(_, service)| *service).filter(is_direct);
        let direct = direct.flat_map(|service| service.pods.union(&service.draining));
        let mut plan = Self {
            owned: owned.copied().map(external_key).collect(),
            direct: direct.copied().map(Address::from).collect(),
            links,
            wanted,
            removed,
            covers_all,
            node: desired.node_addresses.iter().copied().map(Address::from).collect(),
            leads: BTreeMap::new(),
            room_for_sources: MAX_SOURCES as usize,
            tasks: Vec::new(),
            can_wait: true,
        };
        plan.leads = plan.leads(actual);
        plan.can_wait = !plan.moves_a_pod(actual);
        if plan.is_haunted(actual) {
            plan.tasks.push(Task::Sweep);
        }
        plan.tasks.push(Task::Node);
        plan.tasks.extend(plan.wanted.keys().copied().map(Task::Update));
        plan.tasks.extend(plan.removed.iter().copied().map(Task::Remove));
        plan.tasks.extend([Task::Retire, Task::Sweep]);
        plan
    }

    /// What to do, in this order.
    #[must_use]
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// As [`Plan::tasks`], but for what can be left for later, when it is done once for several plans: removing what
    /// nothing leads to any more and sweeping, in this order.
    #[must_use]
    pub fn pressing(&self) -> &[Task] {
        if self.can_wait { &self.tasks[..self.tasks.len() - 2] } else { &self.tasks }
    }

    /// The steps of `task`, in this order, given what the tables hold now. None if there is nothing to do.
    #[must_use]
    pub fn steps(&self, task: Task, actual: &Actual) -> Vec<Step> {
        match task {
            Task::Node => {
                let addresses: BTreeSet<Address> =
                    self.node.iter().copied().chain(actual.node_addresses()).collect();
                addresses.into_iter().filter_map(|address| self.own(address, actual)).collect()
            }
            Task::Update(id) => match self.wanted.get(&id) {
                Some((key, service)) => self.update(id, key, service, actual),
                None => Vec::new(),
            },
            Task::Remove(id) => self.removal(id, actual),
            Task::Retire => actual.retirement(self.links),
            Task::Sweep => {
                let is_wanted = |step: &Step| match step {
                    // Named by a task that has failed since.
                    Step::RemoveName(id) => self.wanted.contains_key(id),
                    _ => false,
                };
                actual.sweep_and_free().into_iter().filter(|step| !is_wanted(step)).collect()
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

    /// The Service that `task` makes as desired.
    #[must_use]
    pub fn service(&self, task: Task) -> Option<&ServiceKey> {
        let Task::Update(id) = task else { return None };
        self.wanted.get(&id).map(|(key, _)| *key)
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

    /// Whether the plan knows what is to become of a Service.
    fn covers(&self, id: u32) -> bool {
        self.covers_all || self.wanted.contains_key(&id) || self.removed.contains(&id)
    }

    /// Whether some Service is to have an address: one that the plan is about, or one that has it and is left as it is.
    fn is_owned(&self, key: ExternalKey, actual: &Actual) -> bool {
        let of_another =
            |value: &ServiceValue| value.service_id != NO_SERVICE && !self.covers(value.service_id);
        self.owned.contains(&key) || actual.services.get(&key).is_some_and(of_another)
    }

    /// What is to lead to each pod, and what leads to it now. Each address that a Service has or is to have may lead to each
    /// of its pods, those that it has and those that it is to have: between the steps there are such moments.
    fn leads(&self, actual: &Actual) -> BTreeMap<Address, Leads> {
        let pods: BTreeSet<(Address, u32)> = self
            .wanted
            .iter()
            .flat_map(|(id, (_, service))| {
                service.pods.union(&service.draining).map(|pod| (Address::from(*pod), *id))
            })
            .collect();
        let mut leads = BTreeMap::new();
        for pods in pods.into_iter().collect::<Vec<_>>().chunk_by(|(one, _), (other, _)| one == other) {
            let pod = pods[0].0;
            let services: BTreeSet<u32> =
                actual.services_of(pod).chain(pods.iter().map(|(_, id)| *id)).collect();
            let mut of_pod = Leads::None;
            for id in services {
                of_pod.add_all(actual.externals_of(id).map(|(key, value)| (key.external, value.flags)));
                if let Some((_, service)) = self.wanted.get(&id) {
                    let flags = flags_of(service);
                    let externals = service.externals.iter();
                    of_pod.add_all(externals.map(|external| (Address::from(*external), flags)));
                }
            }
            leads.insert(pod, of_pod);
        }
        leads
    }

    /// Whether an address comes back, of a pod or external, of which conversations with its former owner may be left.
    fn is_haunted(&self, actual: &Actual) -> bool {
        self.wanted.iter().any(|(id, (_, service))| {
            let mut pods = service.pods.union(&service.draining).map(|pod| Address::from(*pod));
            let mut externals = service.externals.iter().copied().map(external_key);
            let has =
                |key: &ExternalKey| actual.services.get(key).is_some_and(|value| value.service_id == *id);
            pods.any(|pod| actual.leftovers.haunts_pod(pod) && !actual.is_member(pod, *id))
                || externals.any(|key| actual.leftovers.haunts_external(key.external) && !has(&key))
        })
    }

    /// Whether an address leaves one Service and joins another: it may be a new pod's, so the former one's conversations
    /// must not wait for their end.
    fn moves_a_pod(&self, actual: &Actual) -> bool {
        let wants = |id: &u32, pod: &Address| {
            self.wanted.get(id).is_some_and(|(_, service)| service.has(pod.to_ip()))
        };
        let ids = self.wanted.keys().chain(&self.removed);
        let leaving: BTreeSet<Address> = ids
            .flat_map(|id| actual.members_of(*id).map(|(pod, _)| pod).filter(|pod| !wants(id, pod)))
            .collect();
        !leaving.is_empty()
            && self.wanted.iter().any(|(id, (_, service))| {
                let mut pods = service.pods.union(&service.draining).map(|pod| Address::from(*pod));
                pods.any(|pod| leaving.contains(&pod) && !actual.is_member(pod, *id))
            })
    }

    /// The steps that make Service `id` as desired.
    fn update(&self, id: u32, key: &ServiceKey, service: &DesiredService, actual: &Actual) -> Vec<Step> {
        // The addresses that lead to it now. Those that another Service is to have are led to the new generation as well: it
        // takes them over with one write, and until then, or should that fail, they lead to pods that are there.
        let (held, going): (BTreeSet<ExternalKey>, BTreeSet<ExternalKey>) =
            actual.externals_of(id).map(|(key, _)| key).partition(|key| self.owned.contains(key));
        let mut steps: Vec<Step> =
            going.into_iter().filter_map(|key| self.own(key.external, actual)).collect();
        let name = encode_name(key);
        if actual.names.get(&id) != Some(&name) {
            steps.push(Step::PutName(id, name));
        }
        let pods: BTreeSet<Address> = service.pods.iter().map(|pod| Address::from(*pod)).collect();
        let draining =
            service.draining.iter().map(|pod| Address::from(*pod)).filter(|pod| !pods.contains(pod));
        let wanted: BTreeMap<Address, u32> =
            pods.iter().map(|pod| (*pod, 0)).chain(draining.map(|pod| (pod, MEMBER_DRAINING))).collect();
        let members: BTreeMap<Address, MemberValue> = actual.members_of(id).collect();
        let (generation, is_new) = generation_for(id, &pods, &members, actual);
        steps.extend(wanted.keys().filter_map(|pod| self.put_pod(*pod, actual)));
        steps.extend(wanted.keys().filter_map(|pod| self.own(*pod, actual)));
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

    fn removal(&self, id: u32, actual: &Actual) -> Vec<Step> {
        // One that another Service is to have is still here if that could not take it over: the pods go all the same.
        let release = |key: ExternalKey| self.own(key.external, actual).unwrap_or(Step::RemoveService(key));
        let externals = actual.externals_of(id).map(|(key, _)| release(key));
        let member_key = |pod| MemberKey { pod, service_id: id, padding: 0 };
        let members = actual.members_of(id).map(|(pod, _)| Step::RemoveMember(member_key(pod)));
        externals.chain(members).collect()
    }

    /// Says what leads to a pod of the plan. What is said of it already may still be so for packets on their way: only
    /// [`Actual::retirement`] takes that back.
    fn put_pod(&self, pod: Address, actual: &Actual) -> Option<Step> {
        let key = PodKey { pod };
        let leads = self.leads.get(&pod).copied().unwrap_or_default();
        let noted = actual.pods.get(&key);
        let link = if self.direct.contains(&pod) {
            self.links.link_of(pod)
        } else {
            actual.link_of(pod, self.links)
        };
        let value = noted.map_or(leads, |value| Leads::noted(value).and(leads)).value(link);
        (noted != Some(&value)).then_some(Step::PutPod(key, value))
    }

    /// Makes an address that no Service is to have what it is then: a pod's, the node's, both, or nobody's. None if some
    /// Service is to have it, or if there is nothing to do. That it is a pod's only [`Actual::retirement`] takes back.
    fn own(&self, address: Address, actual: &Actual) -> Option<Step> {
        let key = ExternalKey { external: address };
        if self.is_owned(key, actual) {
            return None;
        }
        let entry = actual.services.get(&key);
        let is_pod = entry.is_some_and(|value| value.flags & SERVICE_IS_POD != 0)
            || self.leads.contains_key(&address)
            || actual.services_of(address).next().is_some();
        let pod = if is_pod { SERVICE_IS_POD } else { 0 };
        let node = if self.node.contains(&address) { SERVICE_IS_NODE } else { 0 };
        match node | pod {
            0 => entry.map(|_| Step::RemoveService(key)),
            flags => {
                let value = own_address(flags);
                (entry != Some(&value)).then_some(Step::PutService(key, value))
            }
        }
    }
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
    let in_force: Vec<u32> = actual.generations_of(id).collect();
    // More than one is what an interrupted switch leaves behind.
    if let [generation] = in_force[..] {
        let has = |slot, pod: &Address| {
            let key = BackendKey { service_id: id, generation, slot };
            actual.backends.get(&key).is_some_and(|backend| backend.pod == *pod)
        };
        let complete = slots(pods).all(|(slot, pod)| has(slot, &pod));
        let counted = actual.externals_of(id).all(|(_, value)| value.backend_count as usize == pods.len());
        if complete && counted {
            return (generation, false);
        }
    }
    let written = actual.backends_of(id).map(|(key, _)| key.generation);
    let joined = members.values().map(|value| value.since_generation);
    let last = in_force.iter().copied().chain(written).chain(joined).max().unwrap_or(0);
    (last.wrapping_add(1), true)
}
