//! What the importer is held against, in tests and by the fuzzer: the same values, worked out from nothing after each batch.

use std::collections::BTreeMap;

use proxier_localv1::{OpItem, Ref, Set, Value, op_item::Op};

use super::{
    Changes, Import, Limits,
    endpoint::{Slot, endpoints, place},
    reporter::Reporter,
    service::service,
    subject,
};
use crate::model::{Endpoint, NodeName, Object, ObjectId, Problem};

type Values = BTreeMap<(i32, String), Vec<u8>>;

/// A server's values in the plainest form, and an importer that must agree with them.
pub(crate) struct Judge {
    node: NodeName,
    import: Import,
    /// What whoever applies the importer's changes has.
    objects: BTreeMap<ObjectId, Object>,
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
            let former = match object.clone() {
                Some(object) => self.objects.insert(id.clone(), object),
                None => self.objects.remove(&id),
            };
            assert_ne!(former, object, "{id} is no news");
        }
        if let Some(problems) = changes.problems.clone() {
            self.problems = problems;
        }
        let (objects, problems) = self.from_nothing();
        assert_eq!(self.objects, objects);
        let mut said = self.problems.clone();
        said.sort();
        assert_eq!(said, problems);
        Some(changes)
    }

    /// What the held values make.
    fn from_nothing(&self) -> (BTreeMap<ObjectId, Object>, Vec<Problem>) {
        let (mut objects, mut problems) = (BTreeMap::new(), Vec::new());
        let mut reports: BTreeMap<String, Reporter> = BTreeMap::new();
        let mut slices: BTreeMap<(String, Slot), Vec<Endpoint>> = BTreeMap::new();
        for ((set, path), bytes) in &self.held {
            if *set == Set::ServicesSet as i32 {
                let mut report = Reporter::new(&subject(path));
                if let Some(service) = service(path, bytes, &mut report) {
                    let object = Object::from(service);
                    objects.insert(object.id(), object);
                }
                problems.extend(report.finish());
                continue;
            }
            let owner = place(path).map_or(path.clone(), |(service, _)| service.to_string());
            let report = reports.entry(owner.clone()).or_insert_with(|| Reporter::new(&subject(&owner)));
            for (slot, endpoint) in endpoints(path, bytes, &self.node, report) {
                slices.entry((owner.clone(), slot)).or_default().push(endpoint);
            }
        }
        for ((owner, slot), endpoints) in slices {
            let object = Object::from(slot.slice(&subject(&owner), endpoints));
            assert_eq!(objects.insert(object.id(), object), None, "two slices of one name");
        }
        problems.extend(reports.into_values().flat_map(Reporter::finish));
        problems.sort();
        (objects, problems)
    }
}
