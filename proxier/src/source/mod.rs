//! Where objects come from. A source delivers [`Batch`]es through a channel and knows nothing of what becomes of them.

use crate::model::{Object, ObjectId, Problem};

pub mod convert;
pub mod directory;
pub mod file;
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
    /// Everything that is wrong at this time, known before or not.
    pub problems: Vec<Problem>,
}
