//! Where objects come from. A source delivers [`Batch`]es through a channel and knows nothing of what becomes of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::SystemTime,
};

use tokio::sync::{mpsc, watch};

use crate::model::{Object, ObjectId, Problem};

pub mod convert;
pub mod directory;
pub mod file;
pub mod kube;
pub mod manifest;

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

/// What a source delivers.
#[derive(Debug)]
pub struct Source {
    /// What happens. Ends only if the source cannot go on.
    pub batches: mpsc::Receiver<Batch>,
    /// Whether it would be noticed.
    pub standing: watch::Receiver<Standing>,
}

/// Whether a source sees what happens. While it does not, what it has delivered stays true as far as anybody knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What it does not see, by name. Empty if all is well.
    pub away: BTreeMap<&'static str, Away>,
}

/// That something is out of a source's sight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// Since when.
    pub since: SystemTime,
    /// Why, and what to do about it.
    pub reason: String,
}
