//! Where objects come from. A source delivers [`Batch`]es through a channel and knows nothing of what becomes of them.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use crate::model::{Object, ObjectId, Problem};

pub mod api;
pub mod convert;
pub mod directory;
pub mod file;
pub mod kube;
pub mod manifest;
mod patience;
mod standing;
mod words;

/// What happened to an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is new, or has changed.
    Apply(Object),
    /// It has gone.
    Delete(ObjectId),
}

/// What happened since the batch before. Nothing is applied between the events of a batch.
///
/// A source's first batch holds its whole first list: what is not in it does not exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In order.
    pub events: Vec<Event>,
    /// Everything that is wrong at this time, known before or not; none if that is what it was.
    pub problems: Option<Vec<Problem>>,
    /// The addresses that the API server has now; none if that is what they were.
    pub api_server: Option<BTreeSet<IpAddr>>,
    /// When what these events tell of happened, where it is known.
    pub triggered: Vec<SystemTime>,
}

/// Told how a source stands with the outside world. While it does not see what happens, what it has delivered stays true as
/// far as anybody knows.
///
/// No call may wait for anything.
pub trait Onlooker: Send + Sync {
    /// What happens to `resource` is seen from now on.
    fn connected(&self, resource: &'static str);
    /// An attempt to see what happens to `resource` has failed; it goes on trying. `kind` is one of a few words.
    fn failed(&self, resource: &'static str, kind: &'static str, reason: &str);
    /// Something came of `resource`.
    fn heard(&self, resource: &'static str);
    /// All of `resource` has been read once more.
    fn relisted(&self, resource: &'static str);
    /// The source is at work, though nothing may happen: every few seconds.
    fn turned(&self);
}

/// How often [`Onlooker::turned`] is called.
pub const TURN: Duration = Duration::from_secs(5);

#[cfg(test)]
pub(crate) mod testing {
    //! Nobody who looks on.

    use super::Onlooker;

    /// Does not care.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Nobody;

    impl Onlooker for Nobody {
        fn connected(&self, _: &'static str) {}
        fn failed(&self, _: &'static str, _: &'static str, _: &str) {}
        fn heard(&self, _: &'static str) {}
        fn relisted(&self, _: &'static str) {}
        fn turned(&self) {}
    }
}
