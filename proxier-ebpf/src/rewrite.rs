//! Replacing one address of a packet, with every checksum that covers it.

use proxier_common::Address;

use crate::{
    family::Family,
    packet::{Packet, WriteError},
    transport::Transport,
};

/// Replaces the destination address `old` of the header at `offset` by `new`.
///
/// # Errors
///
/// The kernel would not write. The packet must be dropped.
#[inline(always)]
pub fn destination<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    transport: &Transport,
    old: Address,
    new: Address,
) -> Result<(), WriteError> {
    let difference = transport_checksum::<F, P>(packet, transport, old, new)?;
    F::store_destination(packet, offset, new, difference)
}

/// Replaces the source address `old` of the header at `offset` by `new`.
///
/// # Errors
///
/// The kernel would not write. The packet must be dropped.
#[inline(always)]
pub fn source<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    transport: &Transport,
    old: Address,
    new: Address,
) -> Result<(), WriteError> {
    let difference = transport_checksum::<F, P>(packet, transport, old, new)?;
    F::store_source(packet, offset, new, difference)
}

/// The transport checksum goes first: it is the write that fails if the packet cannot be made writable, and then
/// nothing has been written yet.
#[inline(always)]
fn transport_checksum<F: Family, P: Packet>(
    packet: &mut P,
    transport: &Transport,
    old: Address,
    new: Address,
) -> Result<u32, WriteError> {
    let difference = F::difference(old, new);
    if transport.checksum_offset != 0 {
        packet.adjust_transport_checksum(transport.checksum_offset, difference, transport.zero_means_none)?;
    }
    Ok(difference)
}
