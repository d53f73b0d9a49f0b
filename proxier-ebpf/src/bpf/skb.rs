//! A packet as an skb, at a tc hook.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    programs::TcContext,
};
use proxier_common::Address;
use proxier_ebpf::{
    family::{V4Addresses, V4Hop},
    packet::{NetworkHeader, Packet, Plain, Way, WriteError},
    verifier,
};

use super::{
    events::AtInterface,
    redirect::{self, Ends, Path},
    xdp::{self, Mark},
};

/// Length of an Ethernet header, in bytes.
pub(super) const ETHERNET_HEADER: u32 = 14;
/// Length of the header of links that have none.
pub(super) const NO_LINK_HEADER: u32 = 0;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const VLAN_TAG: u32 = 4;
/// `__sk_buff::pkt_type` of what is for this host, by its MAC address (linux/if_packet.h).
const PACKET_HOST: u32 = 0;

/// Headers that begin no farther into a packet are read where they are. The verifier wants a bound, of less than 64 KB; one with a
/// single bit set would be tested in ways that it does not follow.
const NEAR: u32 = 1000;

/// Says that a packet has been rewritten, in the skb's `tc_index`: a field that is zero unless a classifier writes it, and
/// that bridges and neighbour queues leave alone, other than the control buffer (`cb`). Its readers in the kernel, the
/// DiffServ disciplines, went with Linux 6.3.
const REWRITTEN: u32 = 0x7078;
/// Says so of a reply that goes past the stack, in the same field, from the pod's link to the uplink.
const SENT: u32 = 0x7079;

/// An skb whose data starts with a link-layer header of `LINK_HEADER` bytes.
pub(super) struct Skb<'a, const LINK_HEADER: u32> {
    context: &'a TcContext,
    /// What it has come by is one of a bridge's.
    is_port: bool,
}

impl<'a, const LINK_HEADER: u32> Skb<'a, LINK_HEADER> {
    #[inline(always)]
    pub(super) const fn new(context: &'a TcContext) -> Self {
        Self { context, is_port: false }
    }

    /// One that has come by a port of a bridge.
    #[inline(always)]
    pub(super) const fn of_port(context: &'a TcContext) -> Self {
        Self { context, is_port: true }
    }

    /// Whether the node has made the packet itself: it has come in by no interface.
    #[inline(always)]
    pub(super) fn is_made_here(&self) -> bool {
        // SAFETY: the kernel hands over a valid context, and the field is readable at this hook.
        unsafe { (*self.context.skb.skb).ingress_ifindex == 0 }
    }

    /// Whether it has come by a port of a bridge.
    #[inline(always)]
    pub(super) const fn is_port(&self) -> bool {
        self.is_port
    }

    /// Says to the uplink's egress that it is done with.
    #[inline(always)]
    pub(super) fn set_sent(&self) {
        // SAFETY: as in `set_rewritten`.
        unsafe { (*self.context.skb.skb).tc_index = SENT };
    }

    /// Whether [`Skb::set_sent`] was called; not any more from now on, as the packet may see other nodes on this machine.
    #[inline(always)]
    pub(super) fn take_sent(&self) -> bool {
        // SAFETY: as in `set_rewritten`.
        let is_sent = unsafe { (*self.context.skb.skb).tc_index == SENT };
        if is_sent {
            // SAFETY: as in `set_rewritten`.
            unsafe { (*self.context.skb.skb).tc_index = 0 };
        }
        is_sent
    }

    /// As the kernel handed it over.
    #[inline(always)]
    pub(super) const fn context(&self) -> &'a TcContext {
        self.context
    }

    /// The interface that it comes in or goes out by.
    #[inline(always)]
    pub(super) fn interface(&self) -> u32 {
        // SAFETY: as in `is_made_here`.
        unsafe { (*self.context.skb.skb).ifindex }
    }

    /// Whether XDP has rewritten it, at this interface.
    ///
    /// Only read: a program that writes there, or anywhere into a packet by itself, makes the kernel give it a copy of a packet that
    /// others look at as well (tcpdump), without what XDP has left.
    #[inline(always)]
    pub(super) fn is_marked(&self) -> bool {
        if LINK_HEADER == NO_LINK_HEADER {
            return false;
        }
        let skb = self.context.skb.skb;
        // SAFETY: the kernel hands over a valid context, and the field is readable at this hook.
        let start = unsafe { (*skb).data_meta } as usize;
        // SAFETY: as above.
        let end = unsafe { (*skb).data } as usize;
        if start + size_of::<Mark>() > end {
            return false;
        }
        // SAFETY: within what XDP has left before the packet, and aligned as it was there; any bytes make a `Mark`.
        let mark = unsafe { ptr::read_volatile(start as *const Mark) };
        mark.is_of(self.interface())
    }
}

impl<const LINK_HEADER: u32> AtInterface for Skb<'_, LINK_HEADER> {
    #[inline(always)]
    fn interface(&self) -> u32 {
        Self::interface(self)
    }
}

impl<const LINK_HEADER: u32> Packet for Skb<'_, LINK_HEADER> {
    type Path = Path;

    #[inline(always)]
    fn can_pass_stack(&self) -> bool {
        // Without an Ethernet header there is nothing that could go into a pod. Where the stack drops what is for another host
        // (a port in promiscuous mode), no program may deliver it; and a tag beside the data, also one without a VLAN, is
        // what `find_way` does not know the way of: half of a conversation would go by the stack.
        let skb = self.context.skb.skb;
        // SAFETY: as in `is_made_here`.
        let is_ours = unsafe { (*skb).pkt_type } == PACKET_HOST;
        // SAFETY: as in `is_made_here`.
        let is_tagged = unsafe { (*skb).vlan_present } != 0;
        LINK_HEADER != NO_LINK_HEADER && is_ours && !is_tagged
    }

    #[inline(always)]
    fn find_way(&self, source: &Address, destination: &Address, length: u32, path: &mut Path) -> Way {
        if LINK_HEADER == NO_LINK_HEADER {
            return Way::None;
        }
        redirect::find_way(self.context, &Ends { source, destination }, length, path)
    }

    #[inline(always)]
    fn onward_interface(&self, path: &Path) -> u32 {
        path.interface()
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: as in `is_made_here`.
        unsafe { (*self.context.skb.skb).gso_size }
    }

    #[inline(always)]
    fn is_of_link(&self, interface: u32) -> bool {
        self.is_port || self.interface() == interface
    }

    #[inline(always)]
    fn network_header(&self) -> Option<NetworkHeader> {
        // SAFETY: the kernel hands over a valid context, and `protocol` is readable at this hook.
        let protocol = unsafe { (*self.context.skb.skb).protocol };
        // 16 bits in network order, in the lower half of the field.
        let mut protocol = u16::from_be((protocol & 0xffff) as u16);
        let mut offset = LINK_HEADER;
        if let ETHERTYPE_VLAN | ETHERTYPE_QINQ = protocol
            && LINK_HEADER != NO_LINK_HEADER
        {
            // The kernel takes one tag off and keeps it beside the data; this is a second one, within.
            protocol = u16::from_be_bytes(self.load(offset + 2)?);
            offset += VLAN_TAG;
        }
        // With and without a tag are one path from here.
        let offset = verifier::forget(offset);
        match protocol {
            ETHERTYPE_IPV4 => Some(NetworkHeader::V4(offset)),
            ETHERTYPE_IPV6 => Some(NetworkHeader::V6(offset)),
            _ => None,
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.context.len()
    }

    #[inline(always)]
    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        self.context.load(offset as usize).ok()
    }

    #[inline(always)]
    fn load_header<T: Plain>(&self, offset: u32) -> Option<T> {
        // Of `first + 1 <= end` the compiler makes `first < end`, from which the verifier concludes nothing.
        const { assert!(size_of::<T>() > 1) };
        let near = verifier::forget(offset);
        if near <= NEAR {
            let first = self.context.data() + near as usize;
            if first + size_of::<T>() <= self.context.data_end() {
                // SAFETY: within the packet's linear bytes, which are there until a helper writes to the packet.
                return Some(unsafe { ptr::read_unaligned(first as *const T) });
            }
        }
        self.load(offset)
    }

    #[inline(always)]
    fn set_rewritten(&mut self) {
        // SAFETY: the kernel hands over a valid context, and the field is writable at this hook.
        unsafe { (*self.context.skb.skb).tc_index = REWRITTEN };
    }

    #[inline(always)]
    fn is_rewritten(&self) -> bool {
        // SAFETY: as in `set_rewritten`.
        unsafe { (*self.context.skb.skb).tc_index == REWRITTEN }
    }

    #[inline(always)]
    fn may_have_lost_mark(&self) -> bool {
        LINK_HEADER != NO_LINK_HEADER && xdp::is_in_use()
    }

    #[inline(always)]
    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError> {
        // PSEUDO_HDR: the kernel then knows that a checksum left to the hardware (CHECKSUM_PARTIAL) covers the
        // pseudo-header only, and corrects a checksum of the whole packet (CHECKSUM_COMPLETE).
        let mut flags = u64::from(BPF_F_PSEUDO_HDR);
        if zero_means_none {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // A size of 0, in the lowest bits of the flags, says that `to` is a difference.
        self.context.l4_csum_replace(offset as usize, 0, u64::from(difference), flags).map_err(|_| WriteError)
    }

    #[inline(always)]
    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError> {
        // RECOMPUTE_CSUM keeps a CHECKSUM_COMPLETE right, whatever this field makes up for.
        self.context
            .store(offset as usize, &checksum, u64::from(BPF_F_RECOMPUTE_CSUM))
            .map_err(|_| WriteError)
    }

    #[inline(always)]
    fn store_v4_address(
        &mut self,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        time_to_live: Option<u8>,
    ) -> Result<(), WriteError> {
        let offset = offset + V4Addresses::OFFSET;
        let old: V4Addresses = self.load_header(offset).ok_or(WriteError)?;
        self.context
            .store(offset as usize, &old.with(at, address, difference, time_to_live), 0)
            .map_err(|_| WriteError)
    }

    #[inline(always)]
    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError> {
        self.context.store((offset + V4Hop::OFFSET) as usize, &hop, 0).map_err(|_| WriteError)
    }

    #[inline(always)]
    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError> {
        // Nothing makes up for it: RECOMPUTE_CSUM corrects a CHECKSUM_COMPLETE.
        self.context.store(offset as usize, &value, u64::from(BPF_F_RECOMPUTE_CSUM)).map_err(|_| WriteError)
    }

    #[inline(always)]
    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError> {
        // No header checksum makes up for the address, and `adjust_transport_checksum` has corrected a
        // CHECKSUM_COMPLETE for the transport checksum as if one did: RECOMPUTE_CSUM corrects it for the address.
        // BPF_F_IPV6 of Linux 6.16 would do without either; both together would be wrong again.
        self.context
            .store(offset as usize, &address.bytes, u64::from(BPF_F_RECOMPUTE_CSUM))
            .map_err(|_| WriteError)
    }
}
