//! How the core reads and writes a packet, wherever it lives.

use proxier_common::Address;

use crate::family::V4Hop;

/// A type that may be read from any bytes of a packet.
///
/// # Safety
///
/// Every bit pattern must be a valid value, and the type must have no padding: `repr(C)` of integers and byte
/// arrays that fit together without holes.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ty),+ $(,)?) => {$(
        // SAFETY: an integer or byte array; see the trait.
        unsafe impl Plain for $name {}
    )+};
}
plain!(u8, u16, [u16; 2], [u16; 4], [u8; 2], [u8; 4], [u8; 6], [u8; 8]);

// SAFETY: 16 bytes, without holes.
unsafe impl Plain for Address {}

/// Where a packet's network header starts and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkHeader {
    /// IPv4, at this offset from the packet's first byte.
    V4(u32),
    /// IPv6, at this offset from the packet's first byte.
    V6(u32),
}

/// What the node's routing says about a packet that is to go past the node's stack.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It can go.
    Open,
    /// It is too large for the way.
    TooNarrow,
    /// There is none, or none that is known without the stack.
    None,
}

/// The kernel would not write: no memory to make the packet writable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteError;

/// As [`Packet::segment_size`]: the kernel's `GSO_BY_FRAGS`, of SCTP.
pub const SEGMENTS_VARY: u32 = 0xffff;

/// A packet from its link-layer header on.
///
/// Offsets count bytes from the first byte. Reads past the end give `None`. Writes are only asked for where a read
/// has succeeded before.
pub trait Packet {
    /// Where a packet leaves the node, as [`Packet::find_way`] has found it. Whoever sends the packet on has to keep it: most
    /// packets need none, and the kernel's stack is small.
    type Path;

    /// Whether the packet's conversation can go past the node's stack: there is a way where it is seen, and the stack would take
    /// the packet for one that is to be forwarded.
    fn can_pass_stack(&self) -> bool;

    /// Finds the way of a packet of `length` bytes (without link-layer header) from and to these addresses, which need not be
    /// those that it has.
    fn find_way(&self, source: &Address, destination: &Address, length: u32, path: &mut Self::Path) -> Way;

    /// The interface by which the way leads that was found.
    fn onward_interface(&self, path: &Self::Path) -> u32;

    /// Whether it has come by this link, as far as that can be told from where it is seen: a port of a bridge is not the bridge.
    fn is_of_link(&self, interface: u32) -> bool;

    /// How much payload each of the packets has into which this one is segmented later (GSO); 0 if it is not,
    /// [`SEGMENTS_VARY`] if each has its own.
    fn segment_size(&self) -> u32;

    /// Whether a hook that knows more of the packet sees it after this one (XDP, before tc): what is let go unchanged here is
    /// done there.
    const COMES_AGAIN: bool = false;

    /// Where it comes again: whether the frame is for this host, by its destination's MAC address. What a bridge, a macvlan or a
    /// capture in promiscuous mode takes in beside is not, nor is what is for many.
    fn is_for_host(&mut self) -> bool {
        true
    }

    /// Makes room for [`Packet::set_rewritten`]. `false` if there is none: nobody could tell afterwards that the packet was
    /// rewritten, so it must not be.
    fn claim(&mut self) -> bool {
        true
    }

    /// The network header; `None` if it is neither IPv4 nor IPv6.
    fn network_header(&self) -> Option<NetworkHeader>;

    /// Length in bytes, link-layer header included. Of a GSO packet the length of the whole.
    fn length(&self) -> u32;

    /// Copies a value out of the packet. The offset need not be aligned.
    fn load<T: Plain>(&self, offset: u32) -> Option<T>;

    /// As [`Packet::load`], of what every packet is asked for. In the kernel that saves a call most of the time, and costs the
    /// verifier a path.
    fn load_header<T: Plain>(&self, offset: u32) -> Option<T> {
        self.load(offset)
    }

    /// Remembers, for whoever sees the packet later on this node, that it was for an external address.
    fn set_rewritten(&mut self);

    /// Whether [`Packet::set_rewritten`] was called for the packet: at this hook by another agent's program of the same kind,
    /// while one takes the other's place; or at the uplink, where a request of the node itself was sent to the pod's link.
    fn is_rewritten(&self) -> bool;

    /// Whether the packet may have been rewritten although it does not say so: what XDP has left with it may get lost where another
    /// program writes to it before this one.
    fn may_have_lost_mark(&self) -> bool {
        false
    }

    /// Adds `difference` to the transport checksum at `offset`, which covers a pseudo-header whose addresses
    /// changed by that much. With `zero_means_none`, a checksum of zero stays zero, and none becomes zero
    /// (RFC 768).
    ///
    /// # Errors
    ///
    /// [`WriteError`]; the packet is unchanged.
    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError>;

    /// Writes a checksum field that is complete: nothing of it is left to the hardware.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; this write has not happened.
    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError>;

    /// Writes an IPv4 address `at` bytes into the header at `offset` ([`V4::SOURCE`](crate::V4) or `DESTINATION`), and mends the
    /// header's checksum, of which `difference` is the gain; and a new time to live, if there is one. The header's checksum makes
    /// up for both, so a checksum over the whole packet stays.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; this write has not happened.
    fn store_v4_address(
        &mut self,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        time_to_live: Option<u8>,
    ) -> Result<(), WriteError>;

    /// Writes time to live and checksum into the IPv4 header at `offset`, of which the one makes up for the other.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; this write has not happened.
    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError>;

    /// Writes IPv6's hop limit.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; this write has not happened.
    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError>;

    /// Writes an IPv6 address, to which no checksum of the IPv6 header belongs.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; this write has not happened.
    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError>;
}
