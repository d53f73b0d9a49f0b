//! What may differ between a packet before and after the core: the addresses that it had to replace, and the checksums
//! that cover them, each of which must be exactly as right or as wrong as it was.

use std::ops::Range;

use internet_checksum::Checksum;

use super::{
    common::{ICMP, ICMPV6, UDP, UDPLITE, checksum_offset},
    wire::{Piece, Wire},
};

/// A checksum of a packet, as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    what: &'static str,
    at: usize,
    /// A field of zero says that there is no checksum (RFC 768).
    zero_means_none: bool,
    value: [u8; 2],
    /// What of the packet it is computed over.
    covers: Vec<Range<usize>>,
    /// The one's complement sum of all that it covers and is here, itself included, modulo 0xffff: 0 if it is right. Of
    /// a fragment or a quote cut short it says nothing by itself, but must stay what it is all the same.
    error: u16,
}

/// The checksums of a packet and, of an ICMP error, of the one that it quotes.
fn checksums(bytes: &[u8]) -> Vec<Field> {
    let Some(outer) = Wire::in_frame(bytes) else { return Vec::new() };
    let quote = outer.quote(bytes);
    [Some(&outer), quote.as_ref()].into_iter().flatten().flat_map(|wire| of_packet(bytes, wire)).collect()
}

fn of_packet(bytes: &[u8], wire: &Wire) -> Vec<Field> {
    let mut fields = Vec::new();
    let Some(body) = &wire.body else { return fields };
    let mut field = |what, at: usize, zero_means_none, covers: Vec<Range<usize>>| {
        let mut sum = Checksum::new();
        for range in &covers {
            sum.add_bytes(&bytes[range.clone()]);
        }
        let error = u16::from_be_bytes(sum.checksum()) % 0xffff;
        fields.push(Field { what, at, zero_means_none, value: [bytes[at], bytes[at + 1]], covers, error });
    };
    if !wire.v6 {
        let length = usize::from(bytes[wire.start] & 15) * 4;
        let header = wire.start..wire.start + length;
        field("IPv4 header", wire.start + 10, false, vec![header]);
    }
    let message = body.start..body.end;
    let (place, covers) = match body.protocol {
        ICMP | ICMPV6 if !wire.is_own_icmp() => (None, vec![]),
        ICMP => (Some(2), vec![message]),
        // The protocol and the length in the pseudo-header never change, and do not matter here.
        protocol => (checksum_offset(protocol), vec![wire.source(), wire.destination(), message]),
    };
    if let Some(at) = place.map(|place| body.start + place)
        && body.piece != Piece::Later
        && at + 2 <= body.end
    {
        field("transport", at, matches!(body.protocol, UDP | UDPLITE), covers);
    }
    fields
}

/// Panics unless `after` is `before` with nothing but the `addresses` replaced, and the checksums mended that cover them.
pub fn assert_wholly_rewritten(before: &[u8], after: &[u8], addresses: &[Range<usize>]) {
    assert_eq!(before.len(), after.len(), "the length has changed");
    let (fields, mended) = (checksums(before), checksums(after));
    assert_eq!(fields.len(), mended.len(), "another packet has come of it");
    let mut may_change = addresses.to_vec();
    // From the innermost out: a checksum that was mended is itself covered by the next.
    for (old, new) in fields.iter().zip(&mended).rev() {
        let what =
            format!("{} checksum at {}: {:02x?} became {:02x?}", old.what, old.at, old.value, new.value);
        assert_eq!((old.what, old.at), (new.what, new.at), "another packet has come of it");
        if old.zero_means_none && (old.value == [0, 0] || new.value == [0, 0]) {
            assert_eq!(old.value, new.value, "{what}: none became one, or one none");
        } else {
            assert_eq!(old.error, new.error, "{what}: not as right or wrong as it was");
        }
        let overlap =
            |range: &Range<usize>, other: &Range<usize>| range.start < other.end && other.start < range.end;
        if old.covers.iter().any(|covered| may_change.iter().any(|changed| overlap(covered, changed))) {
            may_change.push(old.at..old.at + 2);
        }
    }
    for (at, (old, new)) in before.iter().zip(after).enumerate() {
        let expected = old == new || may_change.iter().any(|range| range.contains(&at));
        assert!(expected, "byte {at} was {old:#04x} and is {new:#04x}");
    }
}

/// Panics unless both are the same packet. A sum of zero may be written in two ways, and which one a checksum had is
/// lost when it is changed there and back (RFC 1624, section 3).
pub fn assert_same(one: &[u8], other: &[u8]) {
    let normal = |bytes: &[u8]| {
        let mut normal = bytes.to_vec();
        for field in checksums(bytes) {
            if field.value == [0xff, 0xff] {
                normal[field.at..field.at + 2].fill(0);
            }
        }
        normal
    };
    assert_eq!(normal(one), normal(other));
}
