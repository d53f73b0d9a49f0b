//! Telling a process of the node that its packet does not fit the way to the pod: the link is narrower than the uplink that
//! the node's stack has chosen and knows the MTU of. Without it, path-MTU discovery (RFC 1191, RFC 8201) would see a
//! packet vanish.

#![expect(clippy::cast_possible_truncation, reason = "lengths of headers, some dozen bytes")]

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::{bpf_csum_diff, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes},
    programs::TcContext,
};
use proxier_common::protocol;
use proxier_ebpf::{
    Family, NetworkHeader, Packet, V4, V6, checksum,
    family::{V4Header, V6Header},
};

use super::{redirect, skb::Skb};

/// How much of an IPv4 packet is quoted: the largest header, and as much of TCP's as holds its checksum. Less than that
/// the kernel does not leave of a packet whose checksum is left to the hardware.
const V4_QUOTE: usize = 80;
/// How much of an IPv6 packet is quoted: as much as makes room for ports, checksum and some extension headers.
const V6_QUOTE: usize = 88;

/// An ICMP or ICMPv6 error that names an MTU.
#[repr(C)]
#[derive(Clone, Copy)]
struct Error<const QUOTE: usize> {
    icmp_type: u8,
    code: u8,
    checksum: u16,
    mtu: [u8; 4],
    quote: [u8; QUOTE],
}

/// Makes the packet, which is on its way to a pod, into the error that a router before the pod would send back. `false` if
/// that cannot be done.
#[inline(never)]
pub(super) fn answer<const LINK_HEADER: u32>(context: &TcContext) -> bool {
    let Some(mtu) = redirect::mtu_towards_pod::<LINK_HEADER>(context) else {
        return false;
    };
    match Skb::<LINK_HEADER>::new(context).network_header() {
        Some(NetworkHeader::V4(offset)) if offset == LINK_HEADER => {
            answer_v4::<LINK_HEADER>(context, mtu).is_some()
        }
        Some(NetworkHeader::V6(offset)) if offset == LINK_HEADER => {
            answer_v6::<LINK_HEADER>(context, mtu).is_some()
        }
        _ => false,
    }
}

/// Type 3, code 4. Also where the sender permits fragments: it then makes them by itself, as it would have done had it
/// known the link.
#[inline(never)]
fn answer_v4<const LINK_HEADER: u32>(context: &TcContext, mtu: u32) -> Option<()> {
    const LENGTH: usize = size_of::<V4Header>() + size_of::<Error<V4_QUOTE>>();
    let mut error: Error<V4_QUOTE> =
        Error { icmp_type: 3, code: 4, checksum: 0, mtu: mtu.to_be_bytes(), quote: [0; V4_QUOTE] };
    fill(context, LINK_HEADER, &mut error.quote)?;
    error.checksum = checksum::of_sum(sum(&error)?);
    let packet = Skb::<LINK_HEADER>::new(context);
    let mut header = V4Header {
        version_and_length: 0x45,
        type_of_service: 0,
        total_length: (LENGTH as u16).to_be_bytes(),
        identification: 0,
        // Don't fragment.
        fragment: [0x40, 0],
        time_to_live: 64,
        protocol: protocol::ICMP,
        checksum: 0,
        source: packet.load(LINK_HEADER + V4::DESTINATION)?,
        destination: packet.load(LINK_HEADER + V4::SOURCE)?,
    };
    header.checksum = checksum::of_sum(sum(&header)?);
    make_room::<LINK_HEADER>(context, V4_QUOTE, LENGTH - V4_QUOTE)?;
    context.store(LINK_HEADER as usize, &header, 0).ok()?;
    context.store(LINK_HEADER as usize + size_of::<V4Header>(), &error, 0).ok()
}

/// Type 2, code 0 (RFC 4443, section 3.2).
#[inline(never)]
fn answer_v6<const LINK_HEADER: u32>(context: &TcContext, mtu: u32) -> Option<()> {
    const PAYLOAD: usize = size_of::<Error<V6_QUOTE>>();
    const LENGTH: usize = size_of::<V6Header>() + PAYLOAD;
    let mut error: Error<V6_QUOTE> =
        Error { icmp_type: 2, code: 0, checksum: 0, mtu: mtu.to_be_bytes(), quote: [0; V6_QUOTE] };
    fill(context, LINK_HEADER, &mut error.quote)?;
    let packet = Skb::<LINK_HEADER>::new(context);
    let header = V6Header {
        version_class_flow: [0x60, 0, 0, 0],
        payload_length: (PAYLOAD as u16).to_be_bytes(),
        next_header: protocol::ICMPV6,
        hop_limit: 64,
        source: packet.load(LINK_HEADER + V6::DESTINATION)?,
        destination: packet.load(LINK_HEADER + V6::SOURCE)?,
    };
    let pseudo_header =
        V6::pseudo_header_sum(header.source, header.destination, protocol::ICMPV6, PAYLOAD as u32);
    error.checksum = checksum::of_sum(u64::from(pseudo_header) + sum(&error)?);
    make_room::<LINK_HEADER>(context, V6_QUOTE, LENGTH - V6_QUOTE)?;
    context.store(LINK_HEADER as usize, &header, 0).ok()?;
    context.store(LINK_HEADER as usize + size_of::<V6Header>(), &error, 0).ok()
}

/// Reads a quote to where it belongs: there is no room on the stack for a second one.
#[inline(always)]
fn fill<const LENGTH: usize>(context: &TcContext, offset: u32, quote: &mut [u8; LENGTH]) -> Option<()> {
    // SAFETY: a valid context, and as many bytes as the array has.
    let result = unsafe {
        bpf_skb_load_bytes(context.skb.skb.cast(), offset, quote.as_mut_ptr().cast(), LENGTH as u32)
    };
    (result == 0).then_some(())
}

/// The one's complement sum of a header's words.
#[inline(always)]
fn sum<T: Copy>(header: &T) -> Option<u64> {
    const { assert!(size_of::<T>().is_multiple_of(4)) };
    let from = core::ptr::from_ref(header).cast_mut().cast();
    // SAFETY: the helper reads as many bytes as the header has, and none of what it would be compared with.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, from, size_of::<T>() as u32, 0) };
    u32::try_from(sum).ok().map(u64::from)
}

/// Cuts the packet down to its first `kept` bytes behind the link-layer header, with `room` before them.
#[inline(always)]
fn make_room<const LINK_HEADER: u32>(context: &TcContext, kept: usize, room: usize) -> Option<()> {
    let skb = context.skb.skb;
    // SAFETY: a valid context, and numbers.
    if unsafe { bpf_skb_change_tail(skb, LINK_HEADER + kept as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: as above.
    (unsafe { bpf_skb_adjust_room(skb, room as i32, BPF_ADJ_ROOM_MAC, 0) } == 0).then_some(())
}
