//! A packet before there is an skb for it, at XDP: bytes that lie in one piece (as far as the driver has put them there) and in
//! fragments. Nothing tells what the kernel or the hardware knows of its checksums.

#![expect(clippy::cast_possible_truncation, reason = "lengths of headers and of packets")]

use core::{mem::MaybeUninit, ptr};

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_meta, bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use proxier_common::{Address, DropReason, XdpDevice};
use proxier_ebpf::{
    checksum,
    family::{V4Addresses, V4Hop},
    packet::{NetworkHeader, Packet, Plain, Way, WriteError},
    verifier,
};

use super::{
    events::AtInterface,
    maps,
    skb::{ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6},
};

/// Says that a packet has been rewritten, in the bytes before it that XDP may leave for tc (`data_meta`). Nobody can send them.
///
/// They may outlive the way through this node, into a pod that is a node itself, with an agent of its own. So they say where that was.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Mark {
    magic: u32,
    namespace: u32,
    interface: u32,
}

/// The agent's network namespace, by its inode: of all there are, no other has this number. The agent writes it before the kernel
/// reads the programs.
#[unsafe(no_mangle)]
static NETWORK_NAMESPACE: u32 = 0;

/// Whether the agent puts the program at XDP of uplinks. It writes it as [`NETWORK_NAMESPACE`].
#[unsafe(no_mangle)]
static XDP_IN_USE: u8 = 0;

#[inline(always)]
pub(super) fn is_in_use() -> bool {
    // SAFETY: as in `network_namespace`.
    unsafe { ptr::read_volatile(&raw const XDP_IN_USE) != 0 }
}

#[inline(always)]
fn network_namespace() -> u32 {
    // Volatile: to the compiler it would be the constant that it is here.
    // SAFETY: a static, which nobody writes to.
    unsafe { ptr::read_volatile(&raw const NETWORK_NAMESPACE) }
}

impl Mark {
    /// "proxierx", shortened.
    const MAGIC: u32 = 0x7078_7864;

    /// Says nothing.
    const NONE: Self = Self { magic: 0, namespace: 0, interface: 0 };

    /// Whether it was made at this interface.
    #[inline(always)]
    pub(super) fn is_of(self, interface: u32) -> bool {
        self.magic == Self::MAGIC && self.interface == interface && self.namespace == network_namespace()
    }
}

/// An Ethernet frame.
pub(super) struct Frame<'a> {
    context: &'a XdpContext,
    /// The interface at which tc will see it, as soon as that is known: see [`Packet::is_for_host`]. 0 before.
    interface: u32,
}

/// Offsets up to here are looked for where the packet lies in one piece. The verifier wants a bound.
const MAX_OFFSET: u32 = 0x3fff;

impl<'a> Frame<'a> {
    #[inline(always)]
    pub(super) const fn new(context: &'a XdpContext) -> Self {
        Self { context, interface: 0 }
    }

    /// Where `length` bytes at `offset` are, if they are in the piece that can be accessed directly.
    #[inline(always)]
    fn direct(&self, offset: u32, length: usize) -> Option<*mut u8> {
        if offset > MAX_OFFSET {
            return None;
        }
        // What was compared just now may be in another register than what is added here.
        let start = self.context.data() + (verifier::forget(offset) & MAX_OFFSET) as usize;
        // One byte would be compared by less-than, which the verifier learns nothing from: the packet's last goes the other way.
        let length = if length == 1 { 2 } else { length };
        (start + length <= self.context.data_end()).then_some(start as *mut u8)
    }

    #[inline(always)]
    fn store<T: Plain>(&self, offset: u32, value: T) -> Result<(), WriteError> {
        let slot = Slot(MaybeUninit::new(value));
        let from = slot.0.as_ptr();
        if let Some(to) = self.direct(offset, size_of::<T>()) {
            // SAFETY: `to` has room for a `T`, as was just found.
            unsafe { copy::<T>(from.cast(), to) };
            return Ok(());
        }
        let length = const { size_of::<T>() as u32 };
        // SAFETY: a valid context, and as many bytes as are told.
        let result = unsafe { bpf_xdp_store_bytes(self.context.ctx, offset, from.cast_mut().cast(), length) };
        if result == 0 { Ok(()) } else { Err(WriteError) }
    }
}

/// Room for a value, aligned for words whatever the value is.
#[repr(C, align(8))]
struct Slot<T>(MaybeUninit<T>);

/// Copies as many bytes as a `T` has, by words as large as fit: the compiler itself would do so by bytes, for it does not know
/// that a BPF program may read words wherever they lie in a packet (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`).
///
/// # Safety
///
/// There are as many bytes at both, and they do not overlap. What is not in the packet is aligned as words are.
#[inline(always)]
unsafe fn copy<T>(from: *const u8, to: *mut u8) {
    let mut at = 0;
    macro_rules! words {
        ($($word:ty),+) => {$(
            while at + size_of::<$word>() <= size_of::<T>() {
                // SAFETY: within the bytes that the caller vouches for. Volatile, so that words stay words.
                unsafe {
                    let word = ptr::read_volatile(from.wrapping_add(at).cast::<$word>());
                    ptr::write_volatile(to.wrapping_add(at).cast::<$word>(), word);
                }
                at += size_of::<$word>();
            }
        )+};
    }
    words!(u64, u32, u16, u8);
}

impl AtInterface for Frame<'_> {
    #[inline(always)]
    fn interface(&self) -> u32 {
        self.interface
    }
}

impl Packet for Frame<'_> {
    const COMES_AGAIN: bool = true;
    type Path = ();

    /// What that is about is tc's. Here no conversation is taken off the way that it has.
    #[inline(always)]
    fn can_pass_stack(&self) -> bool {
        true
    }

    #[inline(always)]
    fn is_for_host(&mut self) -> bool {
        // SAFETY: the kernel hands over a valid context.
        let device = unsafe { (*self.context.ctx).ingress_ifindex };
        let (Some(XdpDevice { upper, mac, .. }), Some(destination)) =
            (maps::xdp_device(device), self.load::<[u8; 6]>(0))
        else {
            return false;
        };
        self.interface = upper;
        verifier::forget_whether(destination == mac)
    }

    #[inline(always)]
    fn find_way(&self, _source: &Address, _destination: &Address, _length: u32, _path: &mut ()) -> Way {
        Way::None
    }

    #[inline(always)]
    fn onward_interface(&self, _path: &()) -> u32 {
        0
    }

    #[inline(always)]
    fn is_of_link(&self, interface: u32) -> bool {
        self.interface() == interface
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn claim(&mut self) -> bool {
        // SAFETY: a valid context. An error is that of a driver that has no room for it.
        if unsafe { bpf_xdp_adjust_meta(self.context.ctx, -(size_of::<Mark>() as i32)) } != 0 {
            return false;
        }
        self.store_mark(Mark::NONE)
    }

    /// A frame with a VLAN tag is left to tc, which sees it with the tag taken off.
    #[inline(always)]
    fn network_header(&self) -> Option<NetworkHeader> {
        const ETHERTYPE: usize = 12;
        let start = self.context.data();
        if start + ETHERNET_HEADER as usize > self.context.data_end() {
            return None;
        }
        // SAFETY: within the packet, as was just found; an Ethernet header is aligned to 2.
        let ether_type = unsafe { ptr::read((start + ETHERTYPE) as *const u16) };
        match u16::from_be(ether_type) {
            ETHERTYPE_IPV4 => Some(NetworkHeader::V4(ETHERNET_HEADER)),
            ETHERTYPE_IPV6 => Some(NetworkHeader::V6(ETHERNET_HEADER)),
            _ => None,
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: a valid context. Of fragments too, none of which is so large.
        unsafe { bpf_xdp_get_buff_len(self.context.ctx) as u32 }
    }

    #[inline(always)]
    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        let mut slot = Slot(MaybeUninit::<T>::uninit());
        let to = slot.0.as_mut_ptr();
        if let Some(from) = self.direct(offset, size_of::<T>()) {
            // SAFETY: a `T` lies at `from`, as was just found, and `to` is room for one.
            unsafe { copy::<T>(from, to.cast()) };
        } else {
            let length = const { size_of::<T>() as u32 };
            // SAFETY: a valid context, and room for as many bytes as are told.
            if unsafe { bpf_xdp_load_bytes(self.context.ctx, offset, to.cast(), length) } != 0 {
                return None;
            }
        }
        // SAFETY: written just now, and any bytes make a `T`, says `Plain`.
        Some(unsafe { slot.0.assume_init() })
    }

    /// The mark says so, as soon as it is.
    #[inline(always)]
    fn set_rewritten(&mut self) {}

    /// Nobody comes before. What was rewritten and is for a pod by now comes here no more; and what is for a pod's own address is
    /// noted by tc, which sees it next.
    #[inline(always)]
    fn is_rewritten(&self) -> bool {
        true
    }

    #[inline(always)]
    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError> {
        let field: u16 = self.load(offset).ok_or(WriteError)?;
        self.store(offset, checksum::adjust(zero_means_none, field, difference))
    }

    #[inline(always)]
    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError> {
        self.store(offset, checksum)
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
        let old: V4Addresses = self.load(offset).ok_or(WriteError)?;
        self.store(offset, old.with(at, address, difference, time_to_live))
    }

    #[inline(always)]
    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError> {
        self.store(offset + V4Hop::OFFSET, hop)
    }

    #[inline(always)]
    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError> {
        self.store(offset, value)
    }

    #[inline(always)]
    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError> {
        self.store(offset, address)
    }
}

impl Frame<'_> {
    /// Says that the packet has been rewritten. Without it, tc would take the packet for one to the pod's own address, which ends
    /// the flow: it must not go on.
    #[inline(always)]
    pub(super) fn mark(&self) -> Result<(), DropReason> {
        let mark = Mark { magic: Mark::MAGIC, namespace: network_namespace(), interface: self.interface() };
        if self.store_mark(mark) { Ok(()) } else { Err(DropReason::RewriteFailed) }
    }

    /// `false` if there is no room for it.
    #[inline(always)]
    fn store_mark(&self, mark: Mark) -> bool {
        let start = self.context.metadata();
        if start + size_of::<Mark>() > self.context.metadata_end() {
            return false;
        }
        // SAFETY: within the room before the packet, as was just found. The kernel keeps it aligned to 4.
        unsafe { ptr::write_volatile(start as *mut Mark, mark) };
        true
    }
}
