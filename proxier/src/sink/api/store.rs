//! What is served, each value with the revision at which it changed last: whatever a client has seen, what it lacks is what
//! changed after that. A client that is away, slow or stuck costs a number. Pure.
//!
//! What has gone leaves its name behind, so that those who knew it can be told. The oldest of these are forgotten when there are
//! too many; a client that saw nothing since then has to start over.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry},
    sync::Arc,
};

use prost::{Message as _, bytes::Bytes};
use proxier_localv1::{self as localv1, EmptyOp, OpItem, Ref, Set, Value, op_item::Op};

use crate::{
    model::{NodeName, ObjectName},
    sink::export::{Exported, ExportedEndpoint},
};

/// Counts the changes. Zero is before anything.
pub(super) type Revision = u64;

/// Values and what became of them.
#[derive(Debug)]
pub(super) struct Store {
    /// Of the newest change.
    revision: Revision,
    /// What went up to here may be forgotten.
    horizon: Revision,
    /// Shared with the batches that are on their way.
    services: BTreeMap<ObjectName, Arc<ServiceEntry>>,
    /// Every entry, by its newest change.
    by_revision: BTreeSet<(Revision, ObjectName)>,
    /// What has gone, in order. What has come back since stays here until its turn.
    gone: VecDeque<Gone>,
    max_gone: usize,
}

/// A value that has gone, or went and has come back.
#[derive(Debug)]
struct Gone {
    at: Revision,
    service: ObjectName,
    /// An endpoint of it.
    key: Option<Arc<str>>,
}

/// When a value came, changed and went.
#[derive(Clone, Debug)]
struct Life {
    /// Who has seen nothing since has never heard of it.
    born: Revision,
    changed: Revision,
    /// From when to before when it was not there, though it is remembered. Rarely any.
    absences: Vec<(Revision, Revision)>,
}

#[derive(Clone, Debug)]
struct ServiceEntry {
    life: Life,
    /// None if it has gone.
    value: Option<ServiceValue>,
    endpoints: BTreeMap<Arc<str>, EndpointEntry>,
    /// The newest change of all of it.
    changed: Revision,
}

#[derive(Clone, Debug)]
struct ServiceValue {
    message: Bytes,
    /// What those on other nodes are told of an endpoint.
    elsewhere: Option<localv1::EndpointScopes>,
}

#[derive(Clone, Debug)]
struct EndpointEntry {
    life: Life,
    /// None if it has gone.
    value: Option<EndpointValue>,
    /// The node that it was on when it was there last.
    node: Option<NodeName>,
    /// Whether anybody but clients of that node may have heard of it.
    known_elsewhere: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct EndpointValue {
    draining: bool,
    /// What everybody is told; the rest is appended, which is how protobuf's messages are joined.
    common: Bytes,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) node: NodeName,
    /// Whether it wants to hear of endpoints that are draining.
    pub(super) draining: bool,
}

/// What a client lacks. Its steps are made one by one, so that a client that takes its time costs a pointer for each Service
/// that has changed.
#[derive(Debug)]
pub(super) struct Batch {
    /// What it has seen when it has seen this.
    pub(super) revision: Revision,
    client: Client,
    /// None if nothing.
    seen: Option<Revision>,
    changed: Vec<(ObjectName, Arc<ServiceEntry>)>,
}

impl Store {
    /// An empty one, which remembers this many values that have gone.
    pub(super) fn new(max_gone: usize) -> Self {
        Self {
            revision: 0,
            horizon: 0,
            services: BTreeMap::new(),
            by_revision: BTreeSet::new(),
            gone: VecDeque::new(),
            max_gone,
        }
    }

    /// The names of all Services that are there.
    pub(super) fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.iter().filter(|(_, entry)| entry.value.is_some()).map(|(name, _)| name)
    }

    /// Sets Services as they are now, or notes that they have gone, in one revision. Returns the revision, the former one if
    /// nothing is different.
    pub(super) fn put(
        &mut self,
        services: impl IntoIterator<Item = (ObjectName, Option<Exported>)>,
    ) -> Revision {
        let next = self.revision + 1;
        for (name, exported) in services {
            let (former, entry) = match self.services.entry(name.clone()) {
                Entry::Vacant(_) if exported.is_none() => continue,
                Entry::Vacant(vacant) => (None, vacant.insert(Arc::new(ServiceEntry::new(next)))),
                Entry::Occupied(entry) => (Some(entry.get().changed), entry.into_mut()),
            };
            let entry = Arc::make_mut(entry);
            let gone = |key| self.gone.push_back(Gone { at: next, service: name.clone(), key });
            let changed = match exported {
                Some(exported) => entry.set(&exported, next, self.horizon, gone),
                None => entry.remove(next, gone),
            };
            if changed {
                if let Some(former) = former {
                    self.by_revision.remove(&(former, name.clone()));
                }
                entry.changed = next;
                self.by_revision.insert((next, name));
                self.revision = next;
            }
        }
        self.forget();
        self.revision
    }

    /// What a client lacks that has seen the state of a revision; one that has seen nothing lacks everything. None if nobody
    /// knows any more what has gone since then.
    pub(super) fn batch(&self, client: &Client, seen: Option<Revision>) -> Option<Batch> {
        let share = |(name, entry): (&ObjectName, &Arc<ServiceEntry>)| (name.clone(), Arc::clone(entry));
        let changed = match seen {
            None => self.services.iter().map(share).collect(),
            Some(seen) if seen < self.horizon => return None,
            Some(seen) => {
                let changed = self.by_revision.range((seen + 1, ObjectName::default())..);
                changed.filter_map(|(_, name)| self.services.get_key_value(name)).map(share).collect()
            }
        };
        Some(Batch { revision: self.revision, client: client.clone(), seen, changed })
    }

    /// Forgets of what has gone what is too much.
    fn forget(&mut self) {
        // What has gone just now nobody has been told yet.
        while self.gone.len() > self.max_gone && self.gone.front().is_some_and(|gone| gone.at < self.revision)
        {
            let Some(Gone { at, service, key }) = self.gone.pop_front() else { return };
            self.horizon = self.horizon.max(at);
            let Some(entry) = self.services.get_mut(&service) else { continue };
            let entry = Arc::make_mut(entry);
            if let Some(key) = key
                && let Some(endpoint) = entry.endpoints.get(&key)
                && endpoint.value.is_none()
                && endpoint.life.changed == at
            {
                entry.endpoints.remove(&key);
            }
            // The Service's own turn comes after those of the endpoints that went with it.
            if entry.value.is_none() && entry.life.changed <= self.horizon && entry.endpoints.is_empty() {
                self.by_revision.remove(&(entry.changed, service.clone()));
                self.services.remove(&service);
            }
        }
    }
}

impl ServiceEntry {
    const fn new(born: Revision) -> Self {
        Self { life: Life::new(born), value: None, endpoints: BTreeMap::new(), changed: born }
    }

    /// Sets what is there at revision `next`, and tells `gone` of each endpoint that no longer is. Returns whether anything is
    /// different.
    fn set(
        &mut self,
        exported: &Exported,
        next: Revision,
        horizon: Revision,
        mut gone: impl FnMut(Option<Arc<str>>),
    ) -> bool {
        let message = Bytes::from(exported.service.encode_to_vec());
        let elsewhere = exported.scopes(false);
        let former = self.value.replace(ServiceValue { message: message.clone(), elsewhere });
        if former.is_none() {
            self.life.come_back(next, horizon);
        }
        let mut changed = former.as_ref().is_none_or(|former| former.message != message);
        if changed {
            self.life.change(next);
        }
        // What an endpoint is told as depends on the Service.
        let others_are_told_otherwise = former.is_some_and(|former| former.elsewhere != elsewhere);

        let mut there = BTreeSet::new();
        for endpoint in &exported.endpoints {
            let key: Arc<str> = endpoint.key(&exported.service.namespace).into();
            // Of two with one name, the second would replace the first one again and again.
            if !there.insert(Arc::clone(&key)) {
                continue;
            }
            let entry = self.endpoints.entry(key).or_insert_with(|| EndpointEntry::new(next));
            changed |= entry.set(endpoint, elsewhere.is_some(), others_are_told_otherwise, next, horizon);
        }
        changed | self.keep(&there, next, &mut gone)
    }

    /// Notes that all other endpoints have gone. Returns whether any was there.
    fn keep(
        &mut self,
        there: &BTreeSet<Arc<str>>,
        next: Revision,
        gone: &mut impl FnMut(Option<Arc<str>>),
    ) -> bool {
        let mut any = false;
        for (key, endpoint) in &mut self.endpoints {
            if !there.contains(key) && endpoint.value.take().is_some() {
                endpoint.life.change(next);
                any = true;
                gone(Some(Arc::clone(key)));
            }
        }
        any
    }

    /// As [`Self::set`] for a Service that has gone.
    fn remove(&mut self, next: Revision, mut gone: impl FnMut(Option<Arc<str>>)) -> bool {
        if self.value.take().is_none() {
            return false;
        }
        self.keep(&BTreeSet::new(), next, &mut gone);
        self.life.change(next);
        gone(None);
        true
    }
}

impl EndpointEntry {
    const fn new(born: Revision) -> Self {
        Self { life: Life::new(born), value: None, node: None, known_elsewhere: false }
    }

    fn set(
        &mut self,
        endpoint: &ExportedEndpoint,
        elsewhere: bool,
        others_are_told_otherwise: bool,
        next: Revision,
        horizon: Revision,
    ) -> bool {
        let value = EndpointValue {
            draining: endpoint.draining,
            common: Bytes::from(endpoint.common.encode_to_vec()),
        };
        let has_moved = self.node != endpoint.node;
        let changed = others_are_told_otherwise || has_moved || self.value.as_ref() != Some(&value);
        // Those of the former node have.
        self.known_elsewhere |= elsewhere || (has_moved && self.life.born < next);
        if changed {
            if self.value.replace(value).is_none() {
                self.life.come_back(next, horizon);
            }
            self.node.clone_from(&endpoint.node);
            self.life.change(next);
        }
        changed
    }

    fn is_on(&self, client: &Client) -> bool {
        self.node.as_ref() == Some(&client.node)
    }

    /// Whose traffic it takes as `client` sees it; none if it is no business of that client.
    fn scopes(&self, service: &ServiceValue, client: &Client) -> Option<localv1::EndpointScopes> {
        let local = self.is_on(client);
        if self.value.as_ref()?.draining && !(local && client.draining) {
            return None;
        }
        let everywhere = localv1::EndpointScopes { internal: true, external: true };
        if local { Some(everywhere) } else { service.elsewhere }
    }

    /// What `client` is told of it; none if nothing.
    fn told(&self, service: &ServiceValue, client: &Client) -> Option<Bytes> {
        let EndpointValue { draining, common } = self.value.as_ref()?;
        let scopes = self.scopes(service, client)?;
        let own = localv1::Endpoint {
            local: self.is_on(client),
            scopes: Some(scopes),
            draining: *draining,
            ..localv1::Endpoint::default()
        };
        let mut bytes = Vec::with_capacity(common.len() + own.encoded_len());
        bytes.extend_from_slice(common);
        own.encode_raw(&mut bytes);
        Some(bytes.into())
    }

    /// Whether `client`, who has seen that revision, may have been told of it.
    fn may_be_known_to(&self, client: &Client, seen: Revision) -> bool {
        self.life.was_known_to(seen) && (self.known_elsewhere || self.is_on(client))
    }
}

impl Life {
    const fn new(born: Revision) -> Self {
        Self { born, changed: born, absences: Vec::new() }
    }

    /// Notes a change, or that it has gone.
    const fn change(&mut self, at: Revision) {
        self.changed = at;
    }

    /// Notes that it is there again. Who has not seen `horizon` starts over.
    fn come_back(&mut self, at: Revision, horizon: Revision) {
        if self.born < at {
            self.absences.retain(|(_, until)| *until > horizon);
            self.absences.push((self.changed, at));
        }
    }

    fn is_new_to(&self, seen: Option<Revision>) -> bool {
        seen.is_none_or(|seen| self.changed > seen)
    }

    fn was_known_to(&self, seen: Revision) -> bool {
        self.born <= seen && !self.absences.iter().any(|(from, until)| (*from..*until).contains(&seen))
    }
}

impl Batch {
    /// Whether there is nothing to say.
    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_some() && self.changes().next().is_none()
    }

    /// Its steps.
    pub(super) fn items(&self) -> impl Iterator<Item = OpItem> {
        let reset = self.seen.is_none().then_some(Op::Reset(EmptyOp {}));
        let ops = reset.into_iter().chain(self.changes()).chain([Op::Sync(EmptyOp {})]);
        ops.map(|op| OpItem { op: Some(op) })
    }

    /// In kpng's order: an endpoint never comes before its Service, and never outlives it.
    fn changes(&self) -> impl Iterator<Item = Op> {
        let services = self.services().filter_map(|(name, entry)| {
            let bytes = entry.value.as_ref()?.message.clone();
            Some(Op::Set(Value { r#ref: Some(service_ref(name)), bytes }))
        });
        let endpoints = self.endpoints().filter_map(|(name, service, key, endpoint)| {
            let bytes = endpoint.told(service?, &self.client)?;
            Some(Op::Set(Value { r#ref: Some(endpoint_ref(name, key)), bytes }))
        });
        let gone_endpoints = self.endpoints().filter_map(|(name, service, key, endpoint)| {
            let is_told = service.is_some_and(|service| endpoint.scopes(service, &self.client).is_some());
            let may_be_known = endpoint.may_be_known_to(&self.client, self.seen?);
            (may_be_known && !is_told).then(|| Op::Delete(endpoint_ref(name, key)))
        });
        let gone_services = self.services().filter_map(|(name, entry)| {
            let was_known = entry.life.was_known_to(self.seen?);
            (was_known && entry.value.is_none()).then(|| Op::Delete(service_ref(name)))
        });
        services.chain(endpoints).chain(gone_endpoints).chain(gone_services)
    }

    /// The Services that have themselves changed, or gone.
    fn services(&self) -> impl Iterator<Item = (&ObjectName, &ServiceEntry)> {
        let all = self.changed.iter().map(|(name, entry)| (name, &**entry));
        all.filter(|(_, entry)| entry.life.is_new_to(self.seen))
    }

    /// The endpoints that have changed, or gone, with their Services.
    fn endpoints(&self) -> impl Iterator<Item = (&ObjectName, Option<&ServiceValue>, &str, &EndpointEntry)> {
        self.changed.iter().flat_map(|(name, entry)| {
            let endpoints = entry
                .endpoints
                .iter()
                .map(move |(key, endpoint)| (name, entry.value.as_ref(), &**key, endpoint));
            endpoints.filter(|(.., endpoint)| endpoint.life.is_new_to(self.seen))
        })
    }
}

fn service_ref(name: &ObjectName) -> Ref {
    Ref { set: Set::ServicesSet.into(), path: localv1::service_path(&name.namespace, &name.name) }
}

fn endpoint_ref(name: &ObjectName, key: &str) -> Ref {
    Ref { set: Set::EndpointsSet.into(), path: localv1::endpoint_path(&name.namespace, &name.name, key) }
}

#[cfg(any(test, fuzzing))]
pub(super) mod reference;
#[cfg(test)]
mod tests;
