//! Who may send to a Service: what the map `sources` says. Pure.
//!
//! The ranges of a Service are written under the number of a new generation, which one write of `services` puts in force:
//! at no moment do some of them count and others not. A generation without entries permits nobody; 0 stands for everybody
//! and never has any.
//!
//! Should they not all fit, none of them is written and those in force stay: a Service's pods must not wait for that.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxier_common::{Address, ServiceValue, SourceKey};

use super::Actual;

/// [`ServiceValue::source_generation`] that permits everybody.
const EVERYBODY: u32 = 0;

/// Bits of an IPv4 address that all of them have in the maps, which keep it as v4-mapped IPv6.
const V4_MAPPED_BITS: u8 = 96;

/// An entry of `sources`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceRange {
    /// The first address of the range, and whom it may send to.
    pub key: SourceKey,
    /// How many leading bits of the key count.
    pub bits: u32,
}

impl SourceRange {
    fn new(service_id: u32, generation: u32, net: IpNet) -> Self {
        let mapped_bits = if net.addr().is_ipv4() { V4_MAPPED_BITS } else { 0 };
        let key = SourceKey { service_id, generation, address: Address::from(net.network()) };
        let bits = SourceKey::BITS_BEFORE_ADDRESS + u32::from(mapped_bits) + u32::from(net.prefix_len());
        Self { key, bits }
    }

    /// The network that may send; `None` of an entry that this module has not made.
    #[must_use]
    pub fn net(&self) -> Option<IpNet> {
        let bits = u8::try_from(self.bits.checked_sub(SourceKey::BITS_BEFORE_ADDRESS)?).ok()?;
        match self.key.address.to_ip() {
            IpAddr::V4(v4) if bits >= V4_MAPPED_BITS => {
                Ipv4Net::new(v4, bits - V4_MAPPED_BITS).ok().map(IpNet::V4)
            }
            _ => Ipv6Net::new(Ipv6Addr::from(self.key.address.bytes), bits).ok().map(IpNet::V6),
        }
    }
}

/// The ranges that a Service's address asks for; `None` if it asks for none.
pub(super) fn in_force(service: &ServiceValue, actual: &Actual) -> Option<BTreeSet<IpNet>> {
    let ServiceValue { service_id, source_generation, .. } = *service;
    let ranges = || of_generation(service_id, source_generation, actual);
    (source_generation != EVERYBODY).then(|| ranges().filter_map(SourceRange::net).collect())
}

/// What is to become of a Service's source ranges.
#[derive(Debug)]
pub(super) struct Next {
    /// The generation to be in force.
    pub(super) generation: u32,
    /// Those of its ranges that have yet to be written.
    pub(super) unwritten: Vec<SourceRange>,
    /// Set if it is not the one that is asked for.
    pub(super) shortage: Option<Shortage>,
}

impl Next {
    const fn written(generation: u32) -> Self {
        Self { generation, unwritten: Vec::new(), shortage: None }
    }
}

/// Source ranges that do not fit. Half of them would cut off clients at random, so none is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    ranges: usize,
    free: usize,
    room: usize,
    admitted: Admitted,
}

/// Who may send for want of room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admitted {
    /// Whom the former ranges admit.
    AsBefore,
    /// Everybody: there were no ranges.
    Everybody,
    /// Nobody: the Service is new here.
    Nobody,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranges, free, room, admitted } = self;
        let meanwhile = match admitted {
            Admitted::AsBefore => {
                "the former ones stay in force, so whoever was to be cut off is still admitted"
            }
            Admitted::Everybody => "everybody is still admitted",
            Admitted::Nobody => "nobody is admitted",
        };
        write!(
            f,
            "{ranges} source ranges do not fit (the map `sources` has room for {room} on this node, {free} free): \
             {meanwhile}; its pods are up to date; write fewer, larger networks (those in force count until they are \
             replaced)"
        )
    }
}

/// What is to become of the ranges of Service `id`, where `room` of all Services fit.
pub(super) fn next(id: u32, wanted: Option<&BTreeSet<IpNet>>, room: usize, actual: &Actual) -> Next {
    let Some(wanted) = wanted else {
        return Next::written(EVERYBODY);
    };
    let ranges = |generation| -> BTreeSet<SourceRange> {
        wanted.iter().map(|net| SourceRange::new(id, generation, *net)).collect()
    };
    let in_force = generations_in_force(id, actual);
    if let (1, Some(generation)) = (in_force.len(), in_force.first())
        && *generation != EVERYBODY
        && of_generation(id, *generation, actual).eq(&ranges(*generation))
    {
        return Next::written(*generation);
    }
    let written = of_service(id, actual).map(|range| range.key.generation);
    let last = in_force.iter().copied().chain(written).max().unwrap_or(EVERYBODY);
    let generation = last.checked_add(1).unwrap_or(EVERYBODY + 1);
    let free = room.saturating_sub(actual.sources.len());
    if wanted.len() <= free {
        return Next { generation, unwritten: ranges(generation).into_iter().collect(), shortage: None };
    }
    // Of several in force, one that admits some rather than everybody.
    let (generation, admitted) = match in_force.last() {
        Some(&EVERYBODY) => (EVERYBODY, Admitted::Everybody),
        Some(former) if of_generation(id, *former, actual).next().is_some() => (*former, Admitted::AsBefore),
        Some(former) => (*former, Admitted::Nobody),
        None => (generation, Admitted::Nobody),
    };
    let shortage = Shortage { ranges: wanted.len(), free, room, admitted };
    Next { generation, unwritten: Vec::new(), shortage: Some(shortage) }
}

/// Every range of Service `id`, of any generation.
pub(super) fn of_service(id: u32, actual: &Actual) -> impl Iterator<Item = &SourceRange> {
    between((id, 0), (id, u32::MAX), actual)
}

fn of_generation(id: u32, generation: u32, actual: &Actual) -> impl Iterator<Item = &SourceRange> {
    between((id, generation), (id, generation), actual)
}

/// The ranges from one Service and generation to another.
fn between(first: (u32, u32), last: (u32, u32), actual: &Actual) -> impl Iterator<Item = &SourceRange> {
    let range = |(service_id, generation), address, bits| SourceRange {
        key: SourceKey { service_id, generation, address },
        bits,
    };
    let highest = Address { bytes: [u8::MAX; 16] };
    actual.sources.range(range(first, Address::UNSPECIFIED, 0)..=range(last, highest, u32::MAX))
}

/// More than one is what an interrupted switch leaves behind.
fn generations_in_force(id: u32, actual: &Actual) -> BTreeSet<u32> {
    actual.externals_of(id).map(|(_, value)| value.source_generation).collect()
}

/// The ranges of Service `id` that no address asks for.
pub(super) fn out_of_force(id: u32, actual: &Actual) -> impl Iterator<Item = SourceRange> {
    let in_force = generations_in_force(id, actual);
    of_service(id, actual).copied().filter(move |range| !in_force.contains(&range.key.generation))
}
