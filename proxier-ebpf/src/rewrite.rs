//! Replacing one address of a packet, with every checksum that covers it.

use proxier_common::Address;

use crate::{
    checksum,
    family::{Family, Payload},
    packet::{Packet, WriteError},
    transport::Transport,
};

/// An address of a packet, and what stands beside it.
#[derive(Clone, Copy, Debug)]
pub struct Replacement {
    /// The address as it is.
    pub old: Address,
    /// The address to be.
    pub new: Address,
    /// The packet's other address, which stays.
    pub other: Address,
    /// The hop limit to be, if it is another than now.
    pub hop_limit: Option<u8>,
}

/// Replaces the address that is `at` bytes ([`Family::SOURCE`] or [`Family::DESTINATION`]) into the header at `offset`.
///
/// # Errors
///
/// The kernel would not write. The packet must be dropped.
#[inline(always)]
pub fn address<F: Family, P: Packet>(
    packet: &mut P,
    (offset, at): (u32, u32),
    payload: &Payload,
    transport: &Transport,
    replacement: &Replacement,
) -> Result<(), WriteError> {
    let difference = transport_checksum::<F, P>(packet, payload, transport, replacement)?;
    F::store_address(packet, offset, at, replacement.new, difference, replacement.hop_limit)
}

/// Makes a packet from `pod` to `external` one from `external` to `pod`. Every sum over both addresses stays what it was.
///
/// # Errors
///
/// The kernel would not write. The packet must be dropped.
#[inline(always)]
pub fn exchange<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    external: Address,
    pod: Address,
) -> Result<(), WriteError> {
    F::store_address(packet, offset, F::SOURCE, external, F::difference(pod, external), None)?;
    F::store_address(packet, offset, F::DESTINATION, pod, F::difference(external, pod), None)
}

/// The transport checksum goes first: it is the write that fails if the packet cannot be made writable, and then
/// nothing has been written yet.
#[inline(always)]
fn transport_checksum<F: Family, P: Packet>(
    packet: &mut P,
    payload: &Payload,
    transport: &Transport,
    replacement: &Replacement,
) -> Result<u32, WriteError> {
    let difference = F::difference(replacement.old, replacement.new);
    let at = transport.checksum_offset;
    if at == 0 {
        return Ok(difference);
    }
    if transport.zero_means_none {
        let field = transport.checksum;
        if field == 0 {
            return Ok(difference);
        }
        // UDP may carry another packet whose checksum is left to the hardware, while its own is complete already
        // (Linux, "local checksum offload"). To the kernel both look alike; the field tells them apart.
        if !looks_left_to_hardware::<F>(field, payload, transport, replacement.old, replacement.other) {
            packet.store_checksum(at, checksum::apply_as(true, field, difference))?;
            return Ok(difference);
        }
    }
    packet.adjust_transport_checksum(at, difference, transport.zero_means_none)?;
    Ok(difference)
}

/// Whether a checksum may be one that is left to the hardware (`CHECKSUM_PARTIAL`), with the sum of the pseudo-header of
/// `old` and `other` in its place. So looks one complete checksum in 65,536 as well.
#[inline(always)]
fn looks_left_to_hardware<F: Family>(
    field: u16,
    payload: &Payload,
    transport: &Transport,
    old: Address,
    other: Address,
) -> bool {
    let length = payload.end.wrapping_sub(payload.offset);
    field == F::pseudo_header_sum(old, other, transport.protocol, length)
}

/// Whether the packet's transport checksum can be mended by arithmetic alone, whoever knows what it is: not one that may be left
/// to the hardware, which is a sum where a complete one is its complement.
#[inline(never)]
pub(crate) fn is_arithmetic<F: Family, P: Packet>(
    packet: &P,
    payload: &Payload,
    transport: &Transport,
    old: &Address,
    other: &Address,
) -> bool {
    if transport.checksum_offset == 0 {
        return true;
    }
    let Some(field) = packet.load::<u16>(transport.checksum_offset) else {
        return false;
    };
    transport.zero_means_none && field == 0
        || !looks_left_to_hardware::<F>(field, payload, transport, *old, *other)
}
