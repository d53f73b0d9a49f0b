//! Past the node's stack: what a router does that is not passed any more, and whether a packet can do without
//! (docs/decisions/017).

use proxier_common::{DropReason, POD_HAS_PEER, PodValue, protocol};

use crate::{
    V4, V6,
    family::{Family, Payload},
    packet::{NetworkHeader, Packet, Way, WriteError},
    tables::Tables,
    verdict::Verdict,
};

/// Finds the way of a packet to a client that has been rewritten ([`Verdict::Forward`]), and takes one off its hop limit if it can
/// go. Anything but [`Verdict::Forward`] leaves it to the node's stack as it is, or drops it.
///
/// Apart from the rewriting, so that what each of them has on the kernel's stack does not lie there together.
#[inline(always)]
pub fn forward_to_client<P: Packet>(packet: &mut P, path: &mut P::Path) -> Verdict {
    match forward(packet, path, |_| true) {
        Ok(true) => Verdict::Forward,
        Ok(false) => Verdict::Rewritten,
        Err(WriteError) => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// As [`forward_to_client`], of a packet to a pod that is to go into the other end of its link if it has one (`into_pod`), and then
/// is [`Verdict::ForwardIntoPod`].
///
/// The routing is what it is now, not what it was when the conversation began: only by links of which the agent says that pods
/// are reached so. By others there may be nobody, or somebody whom the stack keeps it from.
#[inline(always)]
pub fn forward_to_pod<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    into_pod: bool,
    path: &mut P::Path,
) -> Verdict {
    let mut has_peer = false;
    let may_go_by = |interface| match tables.pod_link(interface) {
        Some(link) => {
            has_peer = link.flags & POD_HAS_PEER != 0;
            true
        }
        None => false,
    };
    match forward(packet, path, may_go_by) {
        Ok(true) if into_pod && has_peer => Verdict::ForwardIntoPod,
        Ok(true) => Verdict::Forward,
        Ok(false) => Verdict::Rewritten,
        Err(WriteError) => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// Whether the packet goes, by an interface by which it may.
#[inline(always)]
fn forward<P: Packet>(
    packet: &mut P,
    path: &mut P::Path,
    may_go_by: impl FnOnce(u32) -> bool,
) -> Result<bool, WriteError> {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<V4, P>(packet, offset, path, may_go_by),
        Some(NetworkHeader::V6(offset)) => of_family::<V6, P>(packet, offset, path, may_go_by),
        None => Ok(false),
    }
}

#[inline(always)]
fn of_family<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    path: &mut P::Path,
    may_go_by: impl FnOnce(u32) -> bool,
) -> Result<bool, WriteError> {
    let Some(header) = F::header(packet, offset) else {
        return Ok(false);
    };
    let hop_limit = F::hop_limit(&header);
    let is_segmented = packet.segment_size() != 0;
    let protocol = F::protocol(&header);
    // Where its headers end that every segment has. Behind extension headers it would have to be looked for, which is not worth
    // what it costs: no machine makes such packets of what it receives, or hardly any.
    if hop_limit <= 1 || is_segmented && !matches!(protocol, protocol::TCP | protocol::UDP) {
        return Ok(false);
    }
    let payload = Payload {
        offset: offset + F::header_length(&header),
        protocol,
        ..Payload::within(packet.length(), false)
    };
    let length = length_on_wire(packet, offset, &payload);
    let way = packet.find_way(&F::source(&header), &F::destination(&header), length, path);
    let goes = way == Way::Open && may_go_by(packet.onward_interface(path));
    if goes {
        F::pass_router(packet, offset, &header)?;
    }
    Ok(goes)
}

/// Length of the packet, or of the largest one into which it is segmented later.
#[inline(always)]
pub(crate) fn length_on_wire<P: Packet>(packet: &P, offset: u32, payload: &Payload) -> u32 {
    const TCP_DATA_OFFSET: u32 = 12;
    const UDP_HEADER: u32 = 8;
    let size = packet.segment_size();
    if size == 0 {
        return payload.end.wrapping_sub(offset);
    }
    let transport_header = match payload.protocol {
        protocol::TCP => {
            packet.load::<u8>(payload.offset + TCP_DATA_OFFSET).map_or(60, |words| u32::from(words >> 4) * 4)
        }
        _ => UDP_HEADER,
    };
    payload.offset.wrapping_sub(offset) + transport_header + size
}

/// Whether a packet of a pod came by the link that leads there. With another pod's address it must not get past the filters of
/// its link.
#[inline(always)]
pub(crate) fn is_by_link_of<P: Packet>(packet: &P, pod: &PodValue) -> bool {
    pod.interface != 0 && packet.is_of_link(pod.interface)
}
