//! Makes batches of what the watches see: none before each has told its whole first list, and then one as soon as the agent is
//! ready for it, with the last of what happened to each object.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::IpAddr,
    time::SystemTime,
};

use tokio::sync::mpsc;

use crate::{
    model::{Object, ObjectId, Problem},
    source::{Batch, Event, TURN, standing::Reporter},
};

/// What a watch has seen.
#[derive(Debug)]
pub(super) enum Update {
    /// An object is there, or has changed.
    Applied {
        /// The object.
        object: Object,
        /// What is wrong with it.
        problems: Vec<Problem>,
        /// When what it tells of happened, if it says so.
        triggered: Option<SystemTime>,
    },
    /// An object has gone, or is of no use.
    Deleted {
        /// Which.
        id: ObjectId,
        /// Why it is of no use.
        problems: Vec<Problem>,
    },
    /// The API server's addresses.
    ApiServer(BTreeSet<IpAddr>),
    /// A watch has told its whole list.
    Listed(&'static str),
}

/// What the agent has not been given yet.
#[derive(Debug)]
pub(super) struct Pending {
    /// Watches that have not told their first list.
    unlisted: BTreeSet<&'static str>,
    /// Of each object the last, so that no more is kept than there are objects, however long a first list is missing. With
    /// it, when the first of what happened to the object meanwhile did, if it says so.
    events: BTreeMap<ObjectId, (Event, Option<SystemTime>)>,
    api_server: Option<BTreeSet<IpAddr>>,
    /// Of all objects.
    problems: BTreeMap<ObjectId, Vec<Problem>>,
    /// True at first: the agent is given a first batch even if there is nothing.
    problems_changed: bool,
    /// Whether the agent has been given anything.
    begun: bool,
    /// What Services are selected by, to be named if there are none.
    label: String,
}

impl Pending {
    pub(super) fn new(resources: &[&'static str], label: String) -> Self {
        Self {
            unlisted: resources.iter().copied().collect(),
            events: BTreeMap::new(),
            api_server: None,
            problems: BTreeMap::new(),
            problems_changed: true,
            begun: false,
            label,
        }
    }

    /// Takes `updates` and sends `batches` until nobody wants them.
    pub(super) async fn run(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        batches: mpsc::Sender<Batch>,
        reporter: Reporter,
    ) {
        let mut turn = tokio::time::interval(TURN);
        loop {
            tokio::select! {
                update = updates.recv() => {
                    let Some(update) = update else { return };
                    if let Update::Listed(resource) = update && !self.unlisted.contains(resource) {
                        reporter.onlooker().relisted(resource);
                    }
                    self.add(update);
                }
                permit = batches.reserve(), if self.is_due() => {
                    let Ok(permit) = permit else { return };
                    permit.send(self.take());
                }
                _ = turn.tick() => reporter.turned(),
            }
        }
    }

    fn add(&mut self, update: Update) {
        match update {
            Update::Applied { object, problems, triggered } => {
                let id = object.id();
                self.note(&id, problems);
                let waits = self.events.get(&id).and_then(|(_, triggered)| *triggered);
                self.events.insert(id, (Event::Apply(object), waits.or(triggered)));
            }
            Update::Deleted { id, problems } => {
                self.note(&id, problems);
                if self.begun {
                    self.events.insert(id.clone(), (Event::Delete(id), None));
                } else {
                    // Nobody knows of it. Names that come and go must not pile up.
                    self.events.remove(&id);
                }
            }
            Update::ApiServer(addresses) => self.api_server = Some(addresses),
            Update::Listed(resource) => {
                self.unlisted.remove(resource);
            }
        }
    }

    fn note(&mut self, id: &ObjectId, problems: Vec<Problem>) {
        if self.problems.get(id).map_or(&[][..], Vec::as_slice) == problems {
            return;
        }
        self.problems_changed = true;
        if problems.is_empty() {
            self.problems.remove(id);
        } else {
            self.problems.insert(id.clone(), problems);
        }
    }

    fn is_due(&self) -> bool {
        let news = !self.events.is_empty() || self.api_server.is_some() || self.problems_changed;
        self.unlisted.is_empty() && news
    }

    fn take(&mut self) -> Batch {
        let (events, triggered): (Vec<Event>, Vec<_>) = mem::take(&mut self.events).into_values().unzip();
        if !mem::replace(&mut self.begun, true)
            && !events.iter().any(|event| matches!(event, Event::Apply(Object::Service(_))))
        {
            tracing::info!("no Service has the label {} yet: nothing to do until one has", self.label);
        }
        let problems = mem::take(&mut self.problems_changed)
            .then(|| self.problems.values().flatten().cloned().collect());
        Batch {
            events,
            problems,
            api_server: self.api_server.take(),
            triggered: triggered.into_iter().flatten().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice};

    fn applied(object: impl Into<Object>) -> Update {
        Update::Applied { object: object.into(), problems: Vec::new(), triggered: None }
    }

    fn pending() -> Pending {
        Pending::new(&["services", "nodes"], "label".to_owned())
    }

    #[test]
    fn nothing_is_delivered_before_every_watch_has_told_its_whole_list() {
        let mut pending = pending();
        pending.add(applied(mk_service("web", ["10.0.0.55"])));
        pending.add(Update::Listed("services"));
        assert!(!pending.is_due());
        pending.add(Update::Listed("nodes"));
        assert!(pending.is_due());
        assert_eq!(pending.take().events.len(), 1);
        assert!(!pending.is_due());
    }

    #[test]
    fn an_empty_cluster_is_delivered_as_well() {
        let mut pending = pending();
        pending.add(Update::Listed("services"));
        pending.add(Update::Listed("nodes"));
        assert!(pending.is_due());
        assert_eq!(pending.take().events, []);
        assert!(!pending.is_due());
    }

    #[test]
    fn of_what_happened_to_an_object_the_last_counts() {
        let mut pending = pending();
        pending.add(Update::Listed("services"));
        pending.add(Update::Listed("nodes"));
        pending.take();
        for address in ["10.0.0.55", "10.0.0.56"] {
            pending.add(applied(mk_service("web", [address])));
            pending.add(applied(mk_node("node1", [address])));
        }
        let id = ObjectId::Service(mk_name("web"));
        pending.add(Update::Deleted { id: id.clone(), problems: Vec::new() });
        let node = mk_node("node1", ["10.0.0.56"]);
        assert_eq!(pending.take().events, [Event::Delete(id), Event::Apply(node.into())]);
    }
    fn at(seconds: u64) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    fn slice(name: &str, seconds: u64) -> Update {
        let slice = mk_slice(name, "web", [mk_endpoint("11.0.2.2", "node1")]);
        Update::Applied { object: slice.into(), problems: Vec::new(), triggered: at(seconds) }
    }

    #[test]
    fn while_a_first_list_is_missing_no_more_is_kept_than_there_are_objects() {
        let mut pending = pending();
        pending.add(Update::Listed("services"));
        for round in 0..1000 {
            pending.add(slice("web-1", 100 + round));
            pending.add(slice(&format!("passing-{round}"), 100));
            let id = ObjectId::EndpointSlice(mk_name(&format!("passing-{round}")));
            pending.add(Update::Deleted { id, problems: Vec::new() });
        }
        assert_eq!(pending.events.len(), 1);
        pending.add(Update::Listed("nodes"));
        let batch = pending.take();
        assert_eq!(batch.events.len(), 1);
        assert_eq!(batch.triggered, [at(100).unwrap()]);
    }

    #[test]
    fn of_changes_that_are_delivered_as_one_the_one_that_waited_longest_is_timed() {
        let mut pending = pending();
        pending.add(Update::Listed("services"));
        pending.add(Update::Listed("nodes"));
        pending.add(slice("web-1", 1));
        pending.add(slice("web-2", 2));
        pending.add(slice("web-1", 3));
        assert_eq!(pending.take().triggered, [at(1).unwrap(), at(2).unwrap()]);
        pending.add(slice("web-1", 4));
        assert_eq!(pending.take().triggered, [at(4).unwrap()]);
        // Of one that has gone nothing says when.
        pending.add(slice("web-1", 5));
        let id = ObjectId::EndpointSlice(mk_name("web-1"));
        pending.add(Update::Deleted { id, problems: Vec::new() });
        assert!(pending.take().triggered.is_empty());
    }
}
