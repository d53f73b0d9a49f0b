//! Sending a packet on past the node's stack.

use core::{mem, ptr};

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh},
    helpers::{
        bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head,
        bpf_skb_vlan_pop,
    },
    programs::TcContext,
};
use proxier_common::{Address, DropReason, PodKey};
use proxier_ebpf::{Family, NetworkHeader, Packet, Tables, V4, V6, Way, family::V6_HEADER_LENGTH};

use super::{
    maps::KernelTables,
    skb::{ETHERNET_HEADER, NO_LINK_HEADER, Skb},
};

/// The two addresses at the start of an Ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct MacAddresses {
    destination: [u8; 6],
    source: [u8; 6],
}

/// Which side of the interface a packet goes to.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// Out by it.
    Out,
    /// Into the node, as if it had come in by it.
    In,
}

/// Sends the packet back through the link that it came by, to whoever sent it: a pod, or a process of the node.
#[inline(always)]
pub(super) fn back<const LINK_HEADER: u32>(context: &TcContext, side: Side) -> Result<i32, DropReason> {
    let packet = Skb::<LINK_HEADER>::new(context);
    if LINK_HEADER != NO_LINK_HEADER {
        let MacAddresses { destination, source } = context.load(0).map_err(|_| DropReason::RewriteFailed)?;
        context
            .store(0, &MacAddresses { destination: source, source: destination }, 0)
            .map_err(|_| DropReason::RewriteFailed)?;
    }
    Ok(redirect(packet.interface(), side))
}

/// Sends a request of a process of the node to the pod.
///
/// The node's stack has routed it to an uplink, for nothing else leads to the external address. It does not see the packet
/// again: to it, and to conntrack, the process speaks with the external address.
#[inline(never)]
pub(super) fn to_pod<const LINK_HEADER: u32>(context: &TcContext) -> Result<i32, DropReason> {
    let packet = Skb::<LINK_HEADER>::new(context);
    let route = Route::of_packet(&packet, Direction::Forward).ok_or(DropReason::NoRoute)?;
    match route.result {
        Route::FOUND => {}
        // Linux before 5.12 does not say which interface if the neighbour is not known yet.
        Route::NO_NEIGHBOUR if route.lookup.interface != packet.interface() => {}
        Route::TOO_BIG => return Err(DropReason::TooBig),
        _ => return Err(DropReason::NoRoute),
    }
    let skb = context.skb.skb;
    // SAFETY: a valid context.
    if unsafe { (*skb).vlan_present } != 0 && unsafe { bpf_skb_vlan_pop(skb) } != 0 {
        // The tag was for the uplink.
        return Err(DropReason::RewriteFailed);
    }
    if LINK_HEADER == NO_LINK_HEADER {
        // The kernel wants to take an Ethernet header off.
        // SAFETY: a valid context.
        let made = unsafe { bpf_skb_change_head(skb, ETHERNET_HEADER, 0) };
        if made != 0 {
            return Err(DropReason::RewriteFailed);
        }
    }
    // SAFETY: without parameters, the kernel finds the next hop by itself.
    let action = unsafe { bpf_redirect_neigh(route.lookup.interface, ptr::null_mut(), 0, 0) };
    Ok(action_of(action))
}

/// The MTU of the link to the pod that a packet does not fit, where the kernel says (Linux 5.12).
#[inline(never)]
pub(super) fn mtu_towards_pod<const LINK_HEADER: u32>(context: &TcContext) -> Option<u32> {
    let route = Route::of_packet(&Skb::<LINK_HEADER>::new(context), Direction::Forward)?;
    let mtu = route.lookup.total_length;
    (route.result == Route::TOO_BIG && mtu != 0).then_some(mtu.into())
}

/// Whether the packet is of a pod that belongs to a Service, and the route to it leads back by the interface that it came in
/// by. The routing is asked of those only: what other pods send to the node is no reply.
#[inline(never)]
pub(super) fn comes_from_its_source(context: &TcContext) -> bool {
    let packet = Skb::<ETHERNET_HEADER>::new(context);
    let source = match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => packet.load(offset + V4::SOURCE).map(Address::from_v4),
        Some(NetworkHeader::V6(offset)) => packet.load(offset + V6::SOURCE),
        None => None,
    };
    if source.and_then(|pod| KernelTables.pod(&PodKey { pod })).is_none() {
        return false;
    }
    match Route::of_packet(&packet, Direction::Reverse) {
        Some(Route { lookup, result: Route::FOUND | Route::NO_NEIGHBOUR }) => {
            lookup.interface == packet.interface()
        }
        _ => false,
    }
}

/// Sends the reply of a pod to a process of the node, as if it came in by the uplink that the request was to leave by: a
/// packet from an external address that comes in by a pod's link is one that reverse path filters drop.
///
/// If no such uplink can be told, the packet goes on where it is.
#[inline(never)]
pub(super) fn to_node(context: &TcContext) -> Result<i32, DropReason> {
    let packet = Skb::<ETHERNET_HEADER>::new(context);
    let Some(route) = Route::of_packet(&packet, Direction::Reverse) else {
        return Ok(TC_ACT_UNSPEC);
    };
    if route.result != Route::FOUND {
        return Ok(TC_ACT_UNSPEC);
    }
    let MacAddresses { source, .. } = context.load(0).map_err(|_| DropReason::RewriteFailed)?;
    context
        .store(0, &MacAddresses { destination: route.lookup.source_mac, source }, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    Ok(redirect(route.lookup.interface, Side::In))
}

/// Who speaks to whom.
pub(super) struct Ends<'a> {
    pub(super) source: &'a Address,
    pub(super) destination: &'a Address,
}

/// Where a packet goes past the node's stack.
#[repr(C)]
pub(super) struct Path {
    interface: u32,
    /// The kernel's `struct bpf_redir_neigh`: the next hop's address family, and its address.
    next_hop: [u32; 5],
    /// Those that it leaves with; all zero while the next hop's is not known.
    addresses: MacAddresses,
}

const _: () = assert!(size_of::<bpf_redir_neigh>() == size_of::<[u32; 5]>());

impl Path {
    pub(super) const NONE: Self = Self {
        interface: 0,
        next_hop: [0; 5],
        addresses: MacAddresses { destination: [0; 6], source: [0; 6] },
    };

    /// The interface by which it leads.
    #[inline(always)]
    pub(super) const fn interface(&self) -> u32 {
        self.interface
    }
}

/// Asks the routing for the way of a packet that came in by the interface that it is seen at, and that will be of this length
/// and from and to these addresses. Also finds the path of one that is too large.
#[inline(never)]
pub(super) fn find_way(context: &TcContext, ends: &Ends<'_>, length: u32, path: &mut Path) -> Way {
    let packet = Skb::<ETHERNET_HEADER>::new(context);
    // SAFETY: a valid context.
    if unsafe { (*context.skb.skb).vlan_present } != 0 {
        // To a VLAN's own interface, which the routing was not asked about.
        return Way::None;
    }
    // SAFETY: integers, for which all zeros are values.
    let mut lookup: FibLookup = unsafe { mem::zeroed() };
    match packet.network_header() {
        Some(NetworkHeader::V4(_)) => {
            lookup.family = Route::AF_INET;
            lookup.source[0] = u32::from_ne_bytes(ends.source.v4_octets());
            lookup.destination[0] = u32::from_ne_bytes(ends.destination.v4_octets());
        }
        Some(NetworkHeader::V6(_)) => {
            lookup.family = Route::AF_INET6;
            lookup.source = words(*ends.source);
            lookup.destination = words(*ends.destination);
        }
        None => return Way::None,
    }
    lookup.interface = packet.interface();
    let result = look_up(context, &mut lookup);
    if lookup.interface == packet.interface() {
        // Nowhere, or back; or a next hop that Linux before 5.12 does not know and does not name the interface of.
        return Way::None;
    }
    path.interface = lookup.interface;
    // The look-up has put the next hop's there: over IPv6 for IPv4, if the route says so.
    let [first, second, third, fourth] = lookup.destination;
    path.next_hop = [lookup.family.into(), first, second, third, fourth];
    match result {
        Route::FOUND | Route::TOO_BIG => {
            path.addresses = MacAddresses { destination: lookup.destination_mac, source: lookup.source_mac };
            // Asked about no length, the kernel compares the packet as it is, and says what the interface takes (Linux 5.12).
            // Asked about one, it goes by what the node has learnt about the path, which the stack does not when it forwards:
            // what is too large for the one alone would be sent on by the other, as the pod's.
            let mtu = u32::from(lookup.total_length);
            if result == Route::TOO_BIG || mtu != 0 && length > mtu { Way::TooNarrow } else { Way::Open }
        }
        Route::NO_NEIGHBOUR => Way::Open,
        _ => Way::None,
    }
}

#[inline(always)]
fn look_up(context: &TcContext, lookup: &mut FibLookup) -> i64 {
    // SAFETY: a valid context, and a structure of the kernel's layout and of the size that is told.
    unsafe { bpf_fib_lookup(context.skb.skb.cast(), ptr::from_mut(lookup).cast(), FIB_LOOKUP, 0) }
}

/// Sends a packet along a path that was found: out by the interface.
#[inline(always)]
pub(super) fn out_by(path: &Path) -> i32 {
    // With the next hop known, the kernel need not ask the routing again.
    let next_hop = (&raw const path.next_hop).cast_mut().cast();
    // SAFETY: the kernel's structure and its size; it only reads it.
    action_of(unsafe { bpf_redirect_neigh(path.interface, next_hop, NEXT_HOP, 0) })
}

/// Size of what `bpf_redirect_neigh` is told.
const NEXT_HOP: i32 = 20;

/// Sends a packet along a path that was found: into the other end of the interface.
///
/// To the pod's own stack the MAC addresses do not matter any more, as the packet is for this host since the uplink; to a bridge
/// in the pod, which has a virtual machine behind it, they do.
#[inline(always)]
pub(super) fn into_peer(context: &TcContext, path: &Path) -> Result<i32, DropReason> {
    if path.addresses.destination == [0; 6] {
        // The kernel asks for the pod's address, and sends it by the link.
        return Ok(out_by(path));
    }
    context.store(0, &path.addresses, 0).map_err(|_| DropReason::RewriteFailed)?;
    // SAFETY: takes numbers only.
    Ok(action_of(unsafe { bpf_redirect_peer(path.interface, 0) }))
}

/// Gives a packet to the node's stack as if it had come in by the interface that it would have left by.
#[inline(always)]
pub(super) fn in_by(context: &TcContext, path: &Path) -> Result<i32, DropReason> {
    let MacAddresses { destination, source } = path.addresses;
    if source == [0; 6] {
        return Err(DropReason::NoRoute);
    }
    context
        .store(0, &MacAddresses { destination: source, source: destination }, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    Ok(redirect(path.interface, Side::In))
}

#[inline(always)]
fn redirect(interface: u32, side: Side) -> i32 {
    let flags = match side {
        Side::Out => 0,
        Side::In => u64::from(BPF_F_INGRESS),
    };
    // SAFETY: takes numbers only; what comes back is the action code that makes the kernel do it.
    action_of(unsafe { bpf_redirect(interface, flags) })
}

/// `TC_ACT_REDIRECT` or `TC_ACT_SHOT`.
#[inline(always)]
fn action_of(code: i64) -> i32 {
    i32::try_from(code).unwrap_or(TC_ACT_SHOT)
}

/// The kernel's `struct bpf_fib_lookup`.
#[repr(C)]
#[derive(Clone, Copy)]
struct FibLookup {
    family: u8,
    protocol: u8,
    source_port: u16,
    destination_port: u16,
    /// What has to fit; 0: the kernel compares what it will send with the device's MTU. Comes back as the MTU.
    total_length: u16,
    interface: u32,
    flow_information: u32,
    source: [u32; 4],
    destination: [u32; 4],
    vlan: [u16; 2],
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
}

/// Its size, as the kernel wants to be told.
const FIB_LOOKUP: i32 = 64;
const _: () = assert!(size_of::<FibLookup>() == FIB_LOOKUP as usize);

/// Which way to look.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// Where the packet goes.
    Forward,
    /// Where an answer to it would go.
    Reverse,
}

/// What the node's routing says.
struct Route {
    lookup: FibLookup,
    result: i64,
}

impl Route {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    /// `BPF_FIB_LKUP_RET_SUCCESS`.
    const FOUND: i64 = 0;
    /// `BPF_FIB_LKUP_RET_NO_NEIGH`: there is a route, and nobody has spoken to the next hop yet.
    const NO_NEIGHBOUR: i64 = 7;
    /// `BPF_FIB_LKUP_RET_FRAG_NEEDED`: there is a route by an interface with a smaller MTU.
    const TOO_BIG: i64 = 8;

    #[inline(always)]
    fn of_packet<const LINK_HEADER: u32>(
        packet: &Skb<'_, LINK_HEADER>,
        direction: Direction,
    ) -> Option<Self> {
        // SAFETY: integers, for which all zeros are values.
        let mut lookup: FibLookup = unsafe { mem::zeroed() };
        match packet.network_header()? {
            NetworkHeader::V4(offset) => {
                lookup.family = Self::AF_INET;
                lookup.source[0] = u32::from_ne_bytes(packet.load(offset + V4::SOURCE)?);
                lookup.destination[0] = u32::from_ne_bytes(packet.load(offset + V4::DESTINATION)?);
            }
            NetworkHeader::V6(offset) => {
                lookup.family = Self::AF_INET6;
                lookup.source = words(packet.load(offset + V6::SOURCE)?);
                lookup.destination = words(packet.load(offset + V6::DESTINATION)?);
            }
        }
        match direction {
            // Of a large one that is segmented later, the pieces have to, and the kernel sees to that.
            Direction::Forward if packet.segment_size() != 0 => {}
            Direction::Forward => lookup.total_length = length_of(packet)?,
            Direction::Reverse => {
                mem::swap(&mut lookup.source, &mut lookup.destination);
                // It came in: whether it would fit the way back is of no interest.
                lookup.total_length = 1;
            }
        }
        lookup.interface = packet.interface();
        // SAFETY: a valid context, and a structure of the kernel's layout and of the size that is told.
        let result = unsafe {
            bpf_fib_lookup(packet.context().skb.skb.cast(), (&raw mut lookup).cast(), FIB_LOOKUP, 0)
        };
        Some(Self { lookup, result })
    }
}

/// Length of the IP packet, as its header says.
#[inline(always)]
fn length_of<const LINK_HEADER: u32>(packet: &Skb<'_, LINK_HEADER>) -> Option<u16> {
    const V4_TOTAL_LENGTH: u32 = 2;
    const V6_PAYLOAD_LENGTH: u32 = 4;
    let (at, header) = match packet.network_header()? {
        NetworkHeader::V4(offset) => (offset + V4_TOTAL_LENGTH, 0),
        NetworkHeader::V6(offset) => (offset + V6_PAYLOAD_LENGTH, V6_HEADER_LENGTH),
    };
    let length = u32::from(u16::from_be_bytes(packet.load(at)?)) + header;
    Some(if length > 0xffff { 0xffff } else { (length & 0xffff) as u16 })
}

#[inline(always)]
fn words(address: Address) -> [u32; 4] {
    // SAFETY: both have 16 bytes, and any bytes make integers.
    unsafe { mem::transmute(address) }
}
