//! The mirror of the tables that only user space writes, with what finds things in them: a change costs as much as the
//! Services that it is about. Pure.
//!
//! Everything comes in by [`Actual::apply`], what is read back from the kernel too, so the indexes cannot differ from the
//! tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use proxier_common::{
    Address, BackendKey, BackendValue, ExternalKey, MEMBER_DRAINING, MemberKey, MemberValue, NameValue,
    PodKey, PodValue, SERVICE_BALANCE_FLOW, SERVICE_DIRECT, SERVICE_IS_NODE, SERVICE_PASS_WITHOUT_BACKEND,
    ServiceValue,
};

use super::{
    NO_SERVICE, Step, decode_name,
    leftovers::Leftovers,
    sources::{self, SourceRange},
};
use crate::desired::{Balance, Delivery, Desired, DesiredService, NoBackend, ServiceKey};

/// The tables that only user space writes, as they are. Equal if the tables are.
#[derive(Clone, Debug, Default)]
pub struct Actual {
    /// The map `services`.
    pub(super) services: BTreeMap<ExternalKey, ServiceValue>,
    /// The map `backends`.
    pub(super) backends: BTreeMap<BackendKey, BackendValue>,
    /// The map `members`.
    pub(super) members: BTreeMap<MemberKey, MemberValue>,
    /// The map `pods`.
    pub(super) pods: BTreeMap<PodKey, PodValue>,
    /// The map `sources`.
    pub(super) sources: BTreeSet<SourceRange>,
    /// The map `names`.
    pub(super) names: BTreeMap<u32, NameValue>,

    /// The ids of named Services.
    ids: BTreeMap<ServiceKey, u32>,
    /// Every id below has a name.
    first_unnamed: u32,
    /// External addresses by Service.
    externals: BTreeSet<(u32, Address)>,
    /// Members by Service.
    joined: BTreeSet<(u32, Address)>,
    /// Backends by pod.
    slots: BTreeSet<(Address, BackendKey)>,
    /// How many addresses of a Service have a generation of its backends in force.
    generations: BTreeMap<(u32, u32), usize>,
    /// How many addresses of a Service are flagged as delivered directly.
    direct: BTreeMap<u32, usize>,
    /// Addresses flagged as the node's own.
    node: BTreeSet<Address>,
    /// What has to be looked at again.
    pub(super) leftovers: Leftovers,
}

impl PartialEq for Actual {
    fn eq(&self, other: &Self) -> bool {
        self.services == other.services
            && self.backends == other.backends
            && self.members == other.members
            && self.pods == other.pods
            && self.sources == other.sources
            && self.names == other.names
    }
}

impl Eq for Actual {}

impl Actual {
    /// The tables as the kernel has them, as so many steps that write an entry each.
    ///
    /// # Errors
    ///
    /// The first of `entries`.
    pub fn read_back<E>(entries: impl IntoIterator<Item = Result<Step, E>>) -> Result<Self, E> {
        let mut actual = Self::default();
        for entry in entries {
            actual.apply(&entry?);
        }
        Ok(actual)
    }

    /// Takes over what has been read back. What was to be swept is to be swept still, and so is what has gone unnoticed: a
    /// write that failed may have been carried out.
    pub fn correct(&mut self, read: Self) {
        let before = std::mem::replace(self, read);
        self.leftovers.inherit(before.leftovers);
        for key in before.members.keys().filter(|key| !self.members.contains_key(key)) {
            self.leftovers.left(key.pod, key.service_id);
        }
        for (key, was) in before.services.iter().filter(|(_, value)| value.service_id != NO_SERVICE) {
            if self.services.get(key).is_none_or(|value| value.service_id != was.service_id) {
                self.leftovers.let_go(key.external, was.service_id);
            }
        }
    }

    /// Notes that a step was carried out.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutName(id, value) => self.put_name(id, value),
            Step::PutBackend(key, value) => {
                if let Some(old) = self.backends.insert(key, value) {
                    self.slots.remove(&(old.pod, key));
                }
                self.slots.insert((value.pod, key));
                self.leftovers.services.insert(key.service_id);
            }
            Step::PutSource(range) => {
                self.sources.insert(range);
                self.leftovers.services.insert(range.key.service_id);
            }
            Step::RemoveSource(range) => {
                self.sources.remove(&range);
                self.leftovers.names.insert(range.key.service_id);
            }
            Step::PutMember(key, value) => {
                self.members.insert(key, value);
                self.joined.insert((key.service_id, key.pod));
                self.leftovers.addresses.insert(key.pod);
            }
            Step::RemoveMember(key) => {
                if self.members.remove(&key).is_some() {
                    self.joined.remove(&(key.service_id, key.pod));
                    self.leftovers.addresses.insert(key.pod);
                    self.leftovers.left(key.pod, key.service_id);
                }
            }
            Step::PutPod(key, value) => {
                self.pods.insert(key, value);
                self.leftovers.addresses.insert(key.pod);
            }
            Step::RemovePod(key) => {
                self.pods.remove(&key);
            }
            Step::PutService(key, value) => {
                let old = self.services.insert(key, value);
                self.forget(key.external, old, value.service_id);
                if value.service_id == NO_SERVICE {
                    if value.flags & SERVICE_IS_NODE != 0 {
                        self.node.insert(key.external);
                    }
                    self.leftovers.addresses.insert(key.external);
                } else {
                    self.externals.insert((value.service_id, key.external));
                    *self.generations.entry((value.service_id, value.generation)).or_default() += 1;
                    if value.flags & SERVICE_DIRECT != 0 {
                        *self.direct.entry(value.service_id).or_default() += 1;
                    }
                    self.leftovers.services.insert(value.service_id);
                }
            }
            Step::RemoveService(key) => {
                let old = self.services.remove(&key);
                self.forget(key.external, old, NO_SERVICE);
            }
            Step::RemoveBackend(key) => {
                if let Some(old) = self.backends.remove(&key) {
                    self.slots.remove(&(old.pod, key));
                    self.leftovers.names.insert(key.service_id);
                }
            }
            Step::Grace => self.leftovers.unsettled = false,
            Step::Sweep => {
                self.leftovers.begin_sweep();
                self.leftovers.end_sweep(true);
            }
            Step::RemoveName(id) => self.remove_name(id),
        }
    }

    fn put_name(&mut self, id: u32, value: NameValue) {
        self.remove_name(id);
        self.names.insert(id, value);
        self.leftovers.names.insert(id);
        if let Some(key) = decode_name(&value) {
            self.ids.insert(key, id);
        }
        let named = self.names.range(self.first_unnamed.max(1)..);
        let consecutive =
            (self.first_unnamed.max(1)..).zip(named).take_while(|(id, (named, _))| id == *named);
        if let Some((last, _)) = consecutive.last() {
            self.first_unnamed = last.saturating_add(1);
        }
    }

    fn remove_name(&mut self, id: u32) {
        self.leftovers.names.remove(&id);
        let Some(old) = self.names.remove(&id) else { return };
        if let Some(key) = decode_name(&old)
            && self.ids.get(&key) == Some(&id)
        {
            self.ids.remove(&key);
        }
        self.first_unnamed = self.first_unnamed.min(id);
    }

    /// Notes what `services` no longer says of an address, which is the Service's of id `successor` now.
    fn forget(&mut self, external: Address, old: Option<ServiceValue>, successor: u32) {
        let Some(ServiceValue { service_id, generation, flags, .. }) = old else { return };
        if service_id == NO_SERVICE {
            if flags & SERVICE_IS_NODE != 0 {
                self.node.remove(&external);
            }
            return;
        }
        self.externals.remove(&(service_id, external));
        if let Some(count) = self.generations.get_mut(&(service_id, generation)) {
            *count -= 1;
            if *count == 0 {
                self.generations.remove(&(service_id, generation));
            }
        }
        if flags & SERVICE_DIRECT != 0
            && let Some(count) = self.direct.get_mut(&service_id)
        {
            *count -= 1;
            if *count == 0 {
                self.direct.remove(&service_id);
            }
        }
        self.leftovers.services.insert(service_id);
        self.leftovers.unsettled = true;
        if service_id != successor {
            self.leftovers.let_go(external, service_id);
        }
    }

    /// Whether no Service is known here, not even by name.
    #[must_use]
    pub fn has_no_service(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether a flow or session of this pod and external address may stay: the pod belongs to the Service that has the
    /// address now, whichever had it when the conversation began.
    #[must_use]
    pub fn keeps(&self, pod: Address, external: Address) -> bool {
        self.services.get(&ExternalKey { external }).is_some_and(|service| {
            service.service_id != NO_SERVICE && self.is_member(pod, service.service_id)
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
                    pods: self.pods_with(value.service_id, 0),
                    draining: self.pods_with(value.service_id, MEMBER_DRAINING),
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
                    delivery: if value.flags & SERVICE_DIRECT == 0 {
                        Delivery::Stack
                    } else {
                        Delivery::Direct
                    },
                    sources: sources::in_force(value, self),
                })
            });
            Arc::make_mut(service).externals.insert(external.external.to_ip());
        }
        desired
    }

    /// The members of a Service that have these flags.
    fn pods_with(&self, service_id: u32, flags: u32) -> BTreeSet<IpAddr> {
        let members = self.members_of(service_id).filter(|(_, value)| value.flags == flags);
        members.map(|(pod, _)| pod.to_ip()).collect()
    }

    pub(super) fn is_member(&self, pod: Address, service_id: u32) -> bool {
        self.members.contains_key(&MemberKey { pod, service_id, padding: 0 })
    }

    pub(super) fn members_of(&self, service_id: u32) -> impl Iterator<Item = (Address, MemberValue)> {
        let pods = self.joined.range((service_id, Address::UNSPECIFIED)..=(service_id, HIGHEST));
        pods.filter_map(|(service_id, pod)| {
            let key = MemberKey { pod: *pod, service_id: *service_id, padding: 0 };
            Some((*pod, *self.members.get(&key)?))
        })
    }

    /// The addresses that lead to a Service now.
    pub(super) fn externals_of(&self, service_id: u32) -> impl Iterator<Item = (ExternalKey, &ServiceValue)> {
        let externals = self.externals.range((service_id, Address::UNSPECIFIED)..=(service_id, HIGHEST));
        externals.filter_map(|(_, external)| {
            let key = ExternalKey { external: *external };
            Some((key, self.services.get(&key)?))
        })
    }

    /// Backends of every generation of a Service.
    pub(super) fn backends_of(&self, service_id: u32) -> impl Iterator<Item = (&BackendKey, &BackendValue)> {
        let key = |generation, slot| BackendKey { service_id, generation, slot };
        self.backends.range(key(0, 0)..=key(u32::MAX, u32::MAX))
    }

    /// Generations of a Service's backends that are in force: one, but while it is being changed.
    pub(super) fn generations_of(&self, service_id: u32) -> impl Iterator<Item = u32> {
        self.generations
            .range((service_id, 0)..=(service_id, u32::MAX))
            .map(|((_, generation), _)| *generation)
    }

    pub(super) fn is_in_force(&self, key: &BackendKey) -> bool {
        self.generations.contains_key(&(key.service_id, key.generation))
    }

    /// The Services that a pod belongs to, in order and perhaps twice. Between the end of a membership and the switch that
    /// belongs to it, a pod is a backend alone.
    pub(super) fn services_of(&self, pod: Address) -> impl Iterator<Item = u32> {
        let member = |service_id, padding| MemberKey { pod, service_id, padding };
        let slot = |n| (pod, BackendKey { service_id: n, generation: n, slot: n });
        let members = self.members.range(member(0, 0)..=member(u32::MAX, u32::MAX));
        let slots = self.slots.range(slot(0)..=slot(u32::MAX)).filter(|(_, key)| self.is_in_force(key));
        members.map(|(key, _)| key.service_id).chain(slots.map(|(_, key)| key.service_id))
    }

    /// The Services that are delivered directly, by the address that says so or all of them.
    pub(super) fn direct_services(&self) -> impl Iterator<Item = u32> {
        self.direct.keys().copied()
    }

    /// Whether a Service is one of those.
    pub(super) fn is_direct(&self, service_id: u32) -> bool {
        self.direct.contains_key(&service_id)
    }

    /// Addresses flagged as the node's own.
    pub(super) fn node_addresses(&self) -> impl Iterator<Item = Address> {
        self.node.iter().copied()
    }

    /// The id that a Service has, if it has a name here.
    pub(super) fn id_of(&self, key: &ServiceKey) -> Option<u32> {
        self.ids.get(key).copied()
    }

    /// The ids that nothing in the tables uses, from the lowest on.
    pub(super) fn unused_ids(&self) -> impl Iterator<Item = u32> {
        (self.first_unnamed.max(1)..).filter(|id| !self.names.contains_key(id) && self.is_gone(*id))
    }

    /// Whether nothing but its name is left of a Service.
    pub(super) fn is_gone(&self, id: u32) -> bool {
        self.externals_of(id).next().is_none()
            && self.members_of(id).next().is_none()
            && self.backends_of(id).next().is_none()
            && sources::of_service(id, self).next().is_none()
    }

    /// Every id that something in the tables still uses.
    pub(super) fn used_ids(&self) -> BTreeSet<u32> {
        self.names
            .keys()
            .copied()
            .chain(self.externals.iter().map(|(id, _)| *id))
            .chain(self.joined.iter().map(|(id, _)| *id))
            .chain(self.backends.keys().map(|key| key.service_id))
            .chain(self.sources.iter().map(|range| range.key.service_id))
            .collect()
    }
}

const HIGHEST: Address = Address { bytes: [u8::MAX; 16] };
