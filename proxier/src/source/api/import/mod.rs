//! What a localv1 server has told, and the objects that it makes. Nothing counts before the Sync that ends its batch; then only what
//! differs is said. Whatever the values are, their part of the whole is what counts: one that cannot be understood is a problem of
//! its Service and not there. No I/O, no clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use proxier_localv1::{OpItem, Path, Ref, Set, Value, op_item::Op};

use self::{
    endpoint::{Slot, endpoints, place},
    reporter::{Reporter, shown},
    service::service,
};
use crate::model::{
    Endpoint, NodeName, Object, ObjectId, ObjectName, Problem, ProblemKind, Service, Severity, Subject,
};

mod endpoint;
mod ranges;
mod reporter;
mod service;

/// How much a server may tell. More is no state of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Values held at a time.
    pub values: usize,
    /// Bytes of these values and their paths.
    pub bytes: usize,
    /// Problems told at a time.
    pub problems: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { values: 1_000_000, bytes: 512 << 20, problems: 10_000 }
    }
}

/// A server has told more than is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    /// By number.
    #[error("tells more than {0} values")]
    Values(usize),
    /// By size.
    #[error("tells more than {0} bytes of values")]
    Bytes(usize),
}

/// What a batch has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Objects that are new or have changed, or are made of other values, be it equal ones; none for those that have gone.
    pub objects: BTreeMap<ObjectId, Option<Object>>,
    /// All that is wrong, if that is not what it was.
    pub problems: Option<Vec<Problem>>,
    /// Whether the batch told everything, and not only what differs from the one before.
    pub whole: bool,
}

/// The sets that are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Services,
    Endpoints,
}

impl Kind {
    fn of(set: i32) -> Option<Self> {
        match Set::try_from(set) {
            Ok(Set::ServicesSet) => Some(Self::Services),
            Ok(Set::EndpointsSet) => Some(Self::Endpoints),
            _ => None,
        }
    }
}

/// Values by path, as they were sent: a tenth of what the objects take that they make.
type Values = BTreeMap<Box<str>, Box<[u8]>>;

/// Where a value is.
type Place = (Kind, Box<str>);

/// The batch that is being told.
#[derive(Debug, Default)]
struct Pending {
    /// Whether what is not told in it has gone.
    reset: bool,
    /// The value that each path has at its end; none if it has gone.
    values: BTreeMap<Place, Option<Box<[u8]>>>,
    size: Size,
}

/// How much is held.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    values: usize,
    /// Of the values and their paths.
    bytes: usize,
}

impl Size {
    const fn add(&mut self, path: &str, value: &[u8]) {
        self.values += 1;
        self.bytes += path.len() + value.len();
    }

    const fn subtract(&mut self, path: &str, value: &[u8]) {
        self.values -= 1;
        self.bytes -= path.len() + value.len();
    }
}

/// Follows a localv1 server.
#[derive(Debug)]
pub struct Import {
    node: NodeName,
    limits: Limits,
    services: Values,
    endpoints: Values,
    size: Size,
    pending: Pending,
    /// Operations that are of no known set or kind, since the last time they were asked for.
    unknown: u64,
    problems: BTreeMap<Place, Box<[Problem]>>,
    /// How many those are.
    told: usize,
    /// Which have problems that there is no room for.
    untold: BTreeSet<Place>,
    problems_changed: bool,
}

impl Import {
    /// Of a server that is asked for the state of `node`, and has told nothing.
    #[must_use]
    pub fn new(node: NodeName, limits: Limits) -> Self {
        Self {
            node,
            limits,
            services: Values::new(),
            endpoints: Values::new(),
            size: Size::default(),
            pending: Pending { reset: true, ..Pending::default() },
            unknown: 0,
            problems: BTreeMap::new(),
            told: 0,
            untold: BTreeSet::new(),
            // The first list is told even if nothing is wrong.
            problems_changed: true,
        }
    }

    /// A new stream begins: it tells everything, whether it says so or not. The batch that the last one was telling is as good as
    /// never begun.
    pub fn restart(&mut self) {
        self.pending = Pending { reset: true, ..Pending::default() };
    }

    /// How many operations were of no known set or kind since this was last asked.
    pub fn take_unknown(&mut self) -> u64 {
        std::mem::take(&mut self.unknown)
    }

    /// Takes what the server says next. Returns what the batch has changed if that ends it.
    ///
    /// # Errors
    ///
    /// It is more than can be held: nothing of the batch is, and the stream is of no use any more.
    pub fn take(&mut self, item: OpItem) -> Result<Option<Changes>, TooMuch> {
        match item.op {
            Some(Op::Sync(_)) => return self.commit().map(Some),
            Some(Op::Reset(_)) => self.restart(),
            Some(Op::Set(Value { r#ref: Some(Ref { set, path }), bytes })) => match Kind::of(set) {
                Some(kind) => self.put(kind, path.into(), Some(bytes.as_ref().into()))?,
                None => self.unknown += 1,
            },
            Some(Op::Delete(Ref { set, path })) => match Kind::of(set) {
                Some(kind) => self.put(kind, path.into(), None)?,
                None => self.unknown += 1,
            },
            Some(Op::Set(Value { r#ref: None, .. })) | None => self.unknown += 1,
        }
        Ok(None)
    }

    const fn values(&self, kind: Kind) -> &Values {
        match kind {
            Kind::Services => &self.services,
            Kind::Endpoints => &self.endpoints,
        }
    }

    const fn values_mut(&mut self, kind: Kind) -> &mut Values {
        match kind {
            Kind::Services => &mut self.services,
            Kind::Endpoints => &mut self.endpoints,
        }
    }

    fn put(&mut self, kind: Kind, path: Box<str>, value: Option<Box<[u8]>>) -> Result<(), TooMuch> {
        let key = (kind, path);
        let is_needed = value.is_some() || (!self.pending.reset && self.values(kind).contains_key(&key.1));
        let pending = &mut self.pending;
        if let Some(Some(former)) = pending.values.remove(&key) {
            pending.size.subtract(&key.1, &former);
        }
        if is_needed {
            if let Some(value) = &value {
                pending.size.add(&key.1, value);
            }
            pending.values.insert(key, value);
        }
        // Before the batch is whole, so that one without end is not held either.
        self.check(self.pending.size)
    }

    const fn check(&self, size: Size) -> Result<(), TooMuch> {
        if size.values > self.limits.values {
            return Err(TooMuch::Values(self.limits.values));
        }
        if size.bytes > self.limits.bytes {
            return Err(TooMuch::Bytes(self.limits.bytes));
        }
        Ok(())
    }

    /// How much will be held once the batch is in force.
    fn size_to_be(&self) -> Size {
        if self.pending.reset {
            return self.pending.size;
        }
        let mut size = self.size;
        for ((kind, path), value) in &self.pending.values {
            if let Some(held) = self.values(*kind).get(path) {
                size.subtract(path, held);
            }
            if let Some(value) = value {
                size.add(path, value);
            }
        }
        size
    }

    /// Puts the batch in force.
    fn commit(&mut self) -> Result<Changes, TooMuch> {
        let size = self.size_to_be();
        self.check(size)?;
        self.size = size;
        let Pending { reset, mut values, .. } = std::mem::take(&mut self.pending);
        if reset {
            for kind in [Kind::Services, Kind::Endpoints] {
                for path in self.values(kind).keys() {
                    values.entry((kind, path.clone())).or_insert(None);
                }
            }
        }
        let mut changes = Changes { whole: reset, ..Changes::default() };
        // Of each Service whose endpoints have changed, the slices that they were or are in.
        let mut stirred: BTreeMap<Box<str>, BTreeSet<Slot>> = BTreeMap::new();
        for ((kind, path), value) in values {
            let former = self.values_mut(kind).remove(&path);
            match kind {
                _ if former == value => {}
                Kind::Services => {
                    self.follow_service(&path, former.as_deref(), value.as_deref(), &mut changes);
                }
                Kind::Endpoints => {
                    let slots = self.slots_that_differ(&path, former.as_deref(), value.as_deref());
                    stirred.entry(owner(&path).into()).or_default().extend(slots);
                }
            }
            if let Some(value) = value {
                self.values_mut(kind).insert(path, value);
            }
        }
        for (owner, slots) in stirred {
            self.follow_endpoints(&owner, slots, &mut changes);
        }
        changes.problems = self.take_problems();
        Ok(changes)
    }

    fn follow_service(
        &mut self,
        path: &str,
        former: Option<&[u8]>,
        value: Option<&[u8]>,
        changes: &mut Changes,
    ) {
        let convert = |value: Option<&[u8]>| -> (Option<Service>, Vec<Problem>) {
            let mut report = Reporter::new(&subject(path));
            let service = value.and_then(|bytes| service(path, bytes, &mut report));
            (service, report.finish())
        };
        let (service, problems) = convert(value);
        self.note(Kind::Services, path, problems);
        let former = convert(former).0;
        if service != former
            && let Some(name) = service.as_ref().or(former.as_ref()).map(|service| service.name.clone())
        {
            changes.objects.insert(ObjectId::Service(name), service.map(Object::from));
        }
    }

    /// The slots in which something differs between two values of an endpoint.
    fn slots_that_differ(&self, path: &str, former: Option<&[u8]>, value: Option<&[u8]>) -> BTreeSet<Slot> {
        let convert = |value: Option<&[u8]>| -> BTreeMap<Slot, Endpoint> {
            let mut unheard = Reporter::new(&subject(path));
            let endpoints = value.map(|bytes| endpoints(path, bytes, &self.node, &mut unheard));
            endpoints.into_iter().flatten().collect()
        };
        let (former, value) = (convert(former), convert(value));
        let differs = |slot: &&Slot| former.get(*slot) != value.get(*slot);
        former.keys().chain(value.keys()).filter(differs).cloned().collect()
    }

    /// Goes through the endpoints of a Service, some of which have changed.
    fn follow_endpoints(&mut self, owner: &str, slots: BTreeSet<Slot>, changes: &mut Changes) {
        let (of_slots, problems) = self.endpoints_of(owner, slots);
        self.note(Kind::Endpoints, owner, problems);
        if of_slots.is_empty() {
            return;
        }
        // Only what is at the path of an endpoint is in a slice.
        let service = subject(owner);
        for (slot, endpoints) in of_slots {
            let id = ObjectId::EndpointSlice(slot.slice_name(&service));
            let slice = (!endpoints.is_empty()).then(|| slot.slice(&service, endpoints).into());
            changes.objects.insert(id, slice);
        }
    }

    /// The endpoints of a Service that are in `slots`, and what is wrong with any.
    fn endpoints_of(
        &self,
        owner: &str,
        slots: BTreeSet<Slot>,
    ) -> (BTreeMap<Slot, Vec<Endpoint>>, Vec<Problem>) {
        let mut of_slots: BTreeMap<Slot, Vec<Endpoint>> =
            slots.into_iter().map(|slot| (slot, Vec::new())).collect();
        let mut report = Reporter::new(&subject(owner));
        for (path, bytes) in self.endpoint_values_of(owner) {
            for (slot, endpoint) in endpoints(path, bytes, &self.node, &mut report) {
                if let Some(members) = of_slots.get_mut(&slot) {
                    members.push(endpoint);
                }
            }
        }
        (of_slots, report.finish())
    }

    /// The values of the endpoints of a Service; of what is at no path of an endpoint, that alone.
    fn endpoint_values_of(&self, owner: &str) -> impl Iterator<Item = (&str, &[u8])> {
        let prefix = format!("{owner}/");
        let from: (Bound<&str>, Bound<&str>) = (Bound::Included(&prefix), Bound::Unbounded);
        let is_service = matches!(Path::parse(owner), Ok(Path { key: None, .. }));
        let itself = self.endpoints.get_key_value(owner);
        let members = is_service.then(|| self.endpoints.range::<str, _>(from)).into_iter().flatten();
        // `default/web/`, without a key, is one of those that are at no path.
        let members = members
            .take_while(move |(path, _)| path.starts_with(&prefix))
            .filter(|(path, _)| place(path).is_some());
        itself.into_iter().chain(members).map(|(path, bytes)| (&**path, &**bytes))
    }

    /// Notes what is wrong with a Service, or with its endpoints.
    fn note(&mut self, kind: Kind, path: &str, problems: Vec<Problem>) {
        let key = (kind, Box::from(path));
        if self.problems.get(&key).map_or(&[][..], |known| known) == problems && !self.untold.contains(&key) {
            return;
        }
        self.problems_changed = true;
        self.untold.remove(&key);
        self.told -= self.problems.remove(&key).map_or(0, |known| known.len());
        if problems.is_empty() {
            return;
        }
        if self.told + problems.len() <= self.limits.problems {
            self.told += problems.len();
            self.problems.insert(key, problems.into());
        } else {
            self.untold.insert(key);
        }
    }

    /// All that is wrong, if that has changed.
    fn take_problems(&mut self) -> Option<Vec<Problem>> {
        if !std::mem::take(&mut self.problems_changed) {
            return None;
        }
        // Some may have been mended, which makes room for others.
        while self.told + reporter::MOST <= self.limits.problems
            && let Some((kind, path)) = self.untold.pop_first()
        {
            let problems = match kind {
                Kind::Services => {
                    let mut report = Reporter::new(&subject(&path));
                    if let Some(bytes) = self.services.get(&path) {
                        service(&path, bytes, &mut report);
                    }
                    report.finish()
                }
                Kind::Endpoints => self.endpoints_of(&path, BTreeSet::new()).1,
            };
            self.note(kind, &path, problems);
        }
        self.problems_changed = false;
        let mut problems: Vec<Problem> = self.problems.values().flatten().cloned().collect();
        if let Some((_, first)) = self.untold.first() {
            let others = self.untold.len() - 1;
            let reason = format!("and {others} others have more problems than are told");
            let subject = Subject::Object(ObjectId::Service(subject(first)));
            let problem = Problem::new(Severity::Warning, subject, reason, "mend those first");
            problems.push(problem.of_kind(ProblemKind::Invalid));
        }
        Some(problems)
    }
}

/// What is told and mended together with a value of an endpoint: its Service's path; the value itself, if it is at no path of an
/// endpoint.
fn owner(path: &str) -> &str {
    let Some((service, _)) = place(path) else { return path };
    &path[..service.namespace.len() + 1 + service.name.len()]
}

/// The Service at a path. Of one that is none, something to know it by.
fn subject(path: &str) -> ObjectName {
    match Path::parse(path) {
        Ok(Path { namespace, name, key: None }) => ObjectName::new(namespace, name),
        _ => ObjectName::new("", shown(path)),
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
