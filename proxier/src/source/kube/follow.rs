//! One watch: lists what there is, follows what happens to it, and goes on through whatever the API server does.
//!
//! kube's watcher pages, resumes and lists again after a 410 in the stream. What it leaves to its caller is here: what no longer
//! exists after a list is deleted; pauses between attempts; and starting over where resuming would go on failing (a 410 as
//! the answer to a watch, a server whose history is shorter than ours) or would leave out what could not be read.

use std::{collections::BTreeSet, fmt::Debug, mem, pin::pin};

use futures::StreamExt as _;
use kube::{
    Api, Resource,
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::time::sleep;

use super::failure::Failure;
use crate::source::patience::{Patience, Timing};

/// What is watched, and who is told.
pub(super) trait Follower<K>: Send {
    /// An object is there, or has changed. `fresh` unless it comes from a list.
    fn applied(&mut self, object: K, fresh: bool) -> impl Future<Output = ()> + Send;
    /// An object has gone.
    fn deleted(&mut self, id: Id) -> impl Future<Output = ()> + Send;
    /// A whole list has been told.
    fn listed(&mut self) -> impl Future<Output = ()> + Send;
    /// Something failed; it is tried again.
    fn failed(&mut self, failure: &Failure);
}

/// Namespace and name; the first is empty for what has none.
pub(super) type Id = (String, String);

pub(super) fn id<K: Resource>(object: &K) -> Id {
    let metadata = object.meta();
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// Which objects there are, as far as they have been told.
#[derive(Debug, Default)]
struct Known {
    objects: BTreeSet<Id>,
    /// Those of the list that is being read.
    listed: BTreeSet<Id>,
}

impl Known {
    /// A list begins. Of one that was broken off, what was told stays told.
    fn begin(&mut self) {
        self.objects.append(&mut self.listed);
    }

    /// A list is whole. Returns what is not in it.
    fn end(&mut self) -> BTreeSet<Id> {
        let listed = mem::take(&mut self.listed);
        let gone = self.objects.difference(&listed).cloned().collect();
        self.objects = listed;
        gone
    }
}

/// Follows all objects of `api` that `config` selects, for ever.
pub(super) async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    timing: Timing,
    mut follower: impl Follower<K>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut known = Known::default();
    let mut patience = Patience::new(timing);
    // After a long outage the server has forgotten what we know. It is back, so there is no more to wait for than after any
    // first failure; but one that says so again and again is not well either.
    let mut gone_patience = Patience::new(timing);
    loop {
        let mut events = pin!(watcher::watcher(api.clone(), config.clone()));
        while let Some(event) = events.next().await {
            let failure = match event {
                Ok(event) => {
                    tell(event, &mut known, &mut follower).await;
                    continue;
                }
                Err(error) => Failure::of(&error, &K::plural(&())),
            };
            follower.failed(&failure);
            let pause = if failure.is_gone() { gone_patience.next() } else { patience.next() };
            sleep(failure.retry_after.unwrap_or_default().max(pause)).await;
            if failure.start_over {
                break;
            }
        }
    }
}

/// Tells the follower of an event. What a list holds is told at once, since it is the truth however the list ends; what it
/// does not hold may only be gone once it is whole.
async fn tell<K: Resource>(event: Event<K>, known: &mut Known, follower: &mut impl Follower<K>) {
    match event {
        Event::Init => known.begin(),
        Event::InitApply(object) => {
            known.listed.insert(id(&object));
            follower.applied(object, false).await;
        }
        Event::InitDone => {
            for id in known.end() {
                follower.deleted(id).await;
            }
            follower.listed().await;
        }
        Event::Apply(object) => {
            known.objects.insert(id(&object));
            follower.applied(object, true).await;
        }
        Event::Delete(object) => {
            let id = id(&object);
            known.objects.remove(&id);
            follower.deleted(id).await;
        }
    }
}
