//! What the importer is held against, in tests and by the fuzzer: the same values, worked out from nothing after each batch.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use proxier_localv1::{EmptyOp, OpItem, Ref, Set, Value, op_item::Op};

use super::{
    Changes, Import, Limits,
    endpoint::{Slot, endpoints, place},
    reporter::Reporter,
    service::service,
    subject,
};
use crate::model::{Endpoint, NodeName, Object, ObjectId, Problem};

type Values = BTreeMap<(i32, String), Vec<u8>>;

/// Holds the importer against messages, each after its length, as far as they are any. An empty one, which says nothing, stands for the
/// end of a stream.
pub(crate) fn judge(mut data: &[u8]) {
    let mut judge = Judge::new(Limits::default());
    while let Ok(item) = OpItem::decode_length_delimited(&mut data) {
        if item.op.is_some() {
            judge.take(item);
        } else if data.is_empty() {
            break;
        } else {
            judge.restart();
        }
    }
    judge.take(sync());
}

/// The end of a batch.
pub(crate) fn sync() -> OpItem {
    OpItem { op: Some(Op::Sync(EmptyOp {})) }
}

/// What an object is made of, by path.
type Members = BTreeMap<ObjectId, BTreeMap<String, Member>>;

#[derive(PartialEq)]
enum Member {
    Service(Object),
    Endpoint(Endpoint),
}

#[derive(Default)]
struct WorkedOut {
    objects: BTreeMap<ObjectId, Object>,
    members: Members,
    problems: Vec<Problem>,
}

/// A server's values in the plainest form, and an importer that must agree with them.
pub(crate) struct Judge {
    node: NodeName,
    import: Import,
    /// What whoever applies the importer's changes has.
    objects: BTreeMap<ObjectId, Object>,
    members: Members,
    problems: Vec<Problem>,
    held: Values,
    /// Held, and what the batch has changed so far.
    told: Values,
}

impl Judge {
    pub(crate) fn new(limits: Limits) -> Self {
        let node = NodeName::new("node1");
        Self {
            import: Import::new(node.clone(), limits),
            node,
            objects: BTreeMap::new(),
            members: Members::new(),
            problems: Vec::new(),
            held: Values::new(),
            told: Values::new(),
        }
    }

    /// The stream breaks, and another one begins.
    pub(crate) fn restart(&mut self) {
        self.import.restart();
        self.told.clear();
    }

    /// What the importer says has changed, if the item ends a batch, which is then judged.
    pub(crate) fn take(&mut self, item: OpItem) -> Option<Changes> {
        let followed =
            |set| [Set::ServicesSet, Set::EndpointsSet].into_iter().any(|known| known as i32 == set);
        match item.op.clone() {
            Some(Op::Reset(_)) => self.told.clear(),
            Some(Op::Set(Value { r#ref: Some(Ref { set, path }), bytes })) if followed(set) => {
                self.told.insert((set, path), bytes.to_vec());
            }
            Some(Op::Delete(Ref { set, path })) => {
                self.told.remove(&(set, path));
            }
            _ => {}
        }
        let changes = self.import.take(item).unwrap_or_else(|error| panic!("{error}"))?;
        self.held.clone_from(&self.told);
        for (id, object) in changes.objects.clone() {
            match object {
                Some(object) => self.objects.insert(id, object),
                None => self.objects.remove(&id),
            };
        }
        if let Some(problems) = changes.problems.clone() {
            self.problems = problems;
        }
        let WorkedOut { objects, members, problems } = self.worked_out();
        assert_eq!(self.objects, objects);
        let ids: BTreeSet<_> = members.keys().chain(self.members.keys()).collect();
        let news: Vec<_> = ids.into_iter().filter(|id| members.get(*id) != self.members.get(*id)).collect();
        assert!(news.into_iter().eq(changes.objects.keys()), "this is news, and nothing else: {changes:?}");
        self.members = members;
        let mut said = self.problems.clone();
        said.sort();
        assert_eq!(said, problems);
        Some(changes)
    }

    /// What the held values make.
    fn worked_out(&self) -> WorkedOut {
        let mut out = WorkedOut::default();
        let mut reports: BTreeMap<String, Reporter> = BTreeMap::new();
        let mut slices: BTreeMap<(String, Slot), Vec<Endpoint>> = BTreeMap::new();
        for ((set, path), bytes) in &self.held {
            if *set == Set::ServicesSet as i32 {
                let mut report = Reporter::new(&subject(path));
                if let Some(service) = service(path, bytes, &mut report) {
                    let object = Object::from(service);
                    out.members.insert(
                        object.id(),
                        BTreeMap::from([(path.clone(), Member::Service(object.clone()))]),
                    );
                    out.objects.insert(object.id(), object);
                }
                out.problems.extend(report.finish());
                continue;
            }
            let owner = place(path).map_or(path.clone(), |(service, _)| service.to_string());
            let report = reports.entry(owner.clone()).or_insert_with(|| Reporter::new(&subject(&owner)));
            for (slot, endpoint) in endpoints(path, bytes, &self.node, report) {
                let id = ObjectId::EndpointSlice(slot.slice_name(&subject(&owner)));
                out.members.entry(id).or_default().insert(path.clone(), Member::Endpoint(endpoint.clone()));
                slices.entry((owner.clone(), slot)).or_default().push(endpoint);
            }
        }
        for ((owner, slot), endpoints) in slices {
            let object = Object::from(slot.slice(&subject(&owner), endpoints));
            assert_eq!(out.objects.insert(object.id(), object), None, "two slices of one name");
        }
        out.problems.extend(reports.into_values().flat_map(Reporter::finish));
        out.problems.sort();
        out
    }
}
