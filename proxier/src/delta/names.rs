//! The map `names`: which Service an id stands for. Pure.

use std::sync::Arc;

use proxier_common::{MAX_NAME, NameValue};

use super::Actual;
use crate::{
    desired::ServiceKey,
    model::{Family, ObjectName},
};

/// The form in which `names` keeps a Service.
#[must_use]
pub fn encode_name(key: &ServiceKey) -> NameValue {
    NameValue {
        namespace: padded(&key.service.namespace),
        name: padded(&key.service.name),
        family: match key.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
    }
}

/// The Service that an entry of `names` stands for; `None` if it is not one that [`encode_name`] wrote.
#[must_use]
pub fn decode_name(value: &NameValue) -> Option<ServiceKey> {
    let text = |bytes: &[u8]| -> Option<Arc<str>> {
        let end = bytes.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok().map(Into::into)
    };
    Some(ServiceKey {
        service: ObjectName { namespace: text(&value.namespace)?, name: text(&value.name)? },
        family: match value.family {
            4 => Family::V4,
            6 => Family::V6,
            _ => return None,
        },
    })
}

/// Cuts at [`MAX_NAME`] bytes: the API server accepts none longer, a manifest from a file could hold one.
fn padded(text: &str) -> [u8; MAX_NAME + 1] {
    let mut bytes = [0; MAX_NAME + 1];
    for (to, from) in bytes[..MAX_NAME].iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

/// Which id stands for which Service: the one it has, or the lowest that nothing uses.
pub(super) struct Ids<'a> {
    actual: &'a Actual,
    unused: Box<dyn Iterator<Item = u32> + 'a>,
}

impl<'a> Ids<'a> {
    pub(super) fn new(actual: &'a Actual) -> Self {
        Self { actual, unused: Box::new(actual.unused_ids()) }
    }

    /// None if there is no id left.
    pub(super) fn of(&mut self, key: &ServiceKey) -> Option<u32> {
        self.actual.id_of(key).or_else(|| self.unused.next())
    }
}
