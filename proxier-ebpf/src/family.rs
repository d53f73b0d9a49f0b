//! What differs between IPv4 and IPv6: where the addresses are, and how to find the transport header behind them.

use proxier_common::{Address, protocol};

use crate::{
    checksum,
    packet::{Packet, Plain, WriteError},
    verifier,
};

/// Whether a packet is a fragment.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// A whole packet.
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// Any other fragment, which has none.
    Later,
}

/// What follows the network header and its extension headers.
///
/// Plain fields, no `Option` around it: it crosses functions that the kernel sees, and the kernel refuses BTF in which
/// a union has a member that is not at its start, which is how an enum looks whose discriminant hides in a later field.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Offset of the transport header in the packet.
    pub offset: u32,
    /// Offset of the first byte behind the IP packet, which may lie before the end of the frame.
    pub end: u32,
    /// The identification that a packet's fragments share, as loaded; 0 of a whole packet.
    pub identification: u32,
    /// IP protocol number. Of a later IPv6 fragment the number in the fragment header.
    pub protocol: u8,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// Whether it belongs to a packet that an ICMP error quotes.
    pub quoted: bool,
}

impl Payload {
    /// To be filled in by [`Family::payload`], for a packet that ends before `limit`. One that is `quoted` by an ICMP
    /// error may be cut short there (RFC 792, RFC 4443 section 2.4).
    #[inline(always)]
    #[must_use]
    pub const fn within(limit: u32, quoted: bool) -> Self {
        Self { offset: 0, end: limit, identification: 0, protocol: 0, fragment: Fragment::Whole, quoted }
    }

    /// Where the IP packet ends whose length field has `length`, counted from `start`; 0 if that is behind the limit.
    ///
    /// A packet of more than 64 KiB, which never leaves the machine in one piece (BIG TCP, Linux 5.19 and 6.3), has a length of
    /// 0: the limit counts, and likewise where such a packet is quoted. In a smaller one 0 is a length like any other.
    #[inline(always)]
    const fn end_of_packet(&self, start: u32, length: u32) -> u32 {
        let (limit, end) = (self.end, start + length);
        let is_big = length == 0 && (self.quoted || limit > start + MAX_LENGTH);
        if is_big || self.quoted && end > limit {
            limit
        } else if end <= limit {
            end
        } else {
            0
        }
    }
}

/// The largest number in an IP header's length field.
const MAX_LENGTH: u32 = 0xffff;

/// One address family.
pub trait Family {
    /// The fixed part of the header, as loaded.
    type Header: Copy;

    /// Which ICMP protocol belongs to the family.
    const ICMP: u8;
    /// Where the source address is in the header.
    const SOURCE: u32;
    /// Where the destination address is in the header.
    const DESTINATION: u32;

    /// Loads and checks the fixed part of the header at `offset`.
    fn header<P: Packet>(packet: &P, offset: u32) -> Option<Self::Header>;

    /// The source address.
    fn source(header: &Self::Header) -> Address;

    /// The destination address.
    fn destination(header: &Self::Header) -> Address;

    /// Whether the header alone does not rule out that the packet is of [`Family::ICMP`].
    fn may_be_icmp(header: &Self::Header) -> bool;

    /// Finds the transport header and fills in `payload`, as [`Payload::within`] made it. `false` means that the packet is
    /// broken, or not one that NAT may touch.
    fn payload<P: Packet>(packet: &P, offset: u32, header: &Self::Header, payload: &mut Payload) -> bool;

    /// What the key of `fragments` says beside addresses and identification.
    fn fragment_protocol(payload: &Payload) -> u8;

    /// What a checksum over an address gains when `old` becomes `new`.
    fn difference(old: Address, new: Address) -> u32;

    /// The one's complement sum of the pseudo-header of `length` bytes of `protocol` between two addresses, folded to 16
    /// bits: what the field of a checksum holds that is left to the hardware.
    fn pseudo_header_sum(source: Address, destination: Address, protocol: u8, length: u32) -> u16;

    /// What the checksum of an ICMP error gains when an address of its own header changes by `outer` and one of the
    /// header that it quotes by `quoted`. For IPv4 nothing: the outer addresses are not covered, and the quoted header's
    /// own checksum makes up for the quoted address. For IPv6 both (RFC 4443, section 2.3).
    fn error_difference(outer: u32, quoted: u32) -> u64;

    /// How many routers the packet may still pass.
    fn hop_limit(header: &Self::Header) -> u8;

    /// IP protocol number of what follows the header: of IPv6, that of an extension header if there is one.
    fn protocol(header: &Self::Header) -> u8;

    /// Length of the header, with IPv4's options and without IPv6's extension headers.
    fn header_length(header: &Self::Header) -> u32;

    /// What [`Family::may_be_fragmented`] has to know of the header, as loaded: an answer that is known would be two paths for
    /// the verifier from there on.
    fn fragment_flags(header: &Self::Header) -> u8;

    /// Whether a router may make fragments of a packet with these flags.
    fn may_be_fragmented(flags: u8) -> bool;

    /// Takes one off the hop limit of the packet, as a router does, whose `header` at `offset` has been read since it was written
    /// to last. It must not be 0.
    ///
    /// # Errors
    ///
    /// The kernel would not write.
    fn pass_router<P: Packet>(packet: &mut P, offset: u32, header: &Self::Header) -> Result<(), WriteError>;

    /// Writes an address `at` bytes into the header at `offset` ([`Family::SOURCE`] or [`Family::DESTINATION`]), and a new hop
    /// limit if there is one, and mends the header's own checksum.
    ///
    /// # Errors
    ///
    /// The kernel would not write. If there is a new hop limit, a part of it may have been written.
    fn store_address<P: Packet>(
        packet: &mut P,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        hop_limit: Option<u8>,
    ) -> Result<(), WriteError>;
}

/// IPv4 (RFC 791).
#[derive(Clone, Copy, Debug)]
pub struct V4;

const V4_TIME_TO_LIVE: u32 = 8;
/// In the first byte of the field.
const V4_DONT_FRAGMENT: u8 = 0x40;
const V4_MORE_FRAGMENTS: u16 = 0x2000;
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;

/// The IPv4 header, without options.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct V4Header {
    /// 4, and the header's length in words of four bytes.
    pub version_and_length: u8,
    /// DSCP and ECN.
    pub type_of_service: u8,
    /// In bytes, header included, in network order.
    pub total_length: [u8; 2],
    /// What a packet's fragments share, as loaded.
    pub identification: u16,
    /// Flags and offset in units of 8 bytes, in network order.
    pub fragment: [u8; 2],
    /// Routers that it may still pass.
    pub time_to_live: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Over the header, as loaded.
    pub checksum: u16,
    /// Source address.
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
}

const _: () = assert!(size_of::<V4Header>() == 20);

// SAFETY: integers and byte arrays, without holes.
unsafe impl Plain for V4Header {}

/// What of an IPv4 header a router writes, and what lies between: one write is enough for both.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct V4Hop {
    time_to_live: u8,
    protocol: u8,
    checksum: u16,
}

// SAFETY: 4 bytes of integers, without holes.
unsafe impl Plain for V4Hop {}

impl V4Hop {
    /// Where it is in the header.
    pub const OFFSET: u32 = V4_TIME_TO_LIVE;

    /// With another time to live, and the checksum mended.
    #[inline(always)]
    const fn with(self, time_to_live: u8) -> Self {
        let (old, new) = ([self.time_to_live, self.protocol], [time_to_live, self.protocol]);
        let difference = checksum::word_difference(u16::from_ne_bytes(old), u16::from_ne_bytes(new));
        Self { time_to_live, checksum: checksum::apply(self.checksum, difference), ..self }
    }

    /// As it is written.
    #[inline(always)]
    #[must_use]
    pub const fn bytes(self) -> [u8; 4] {
        // SAFETY: both types have 4 bytes and every bit pattern is a valid value of both.
        unsafe { core::mem::transmute(self) }
    }
}

/// What lies in an IPv4 header from the time to live on, for those who write an address: one write is enough for all that changes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct V4Addresses {
    hop: V4Hop,
    source: [u16; 2],
    destination: [u16; 2],
}

// SAFETY: 12 bytes of integers, without holes.
unsafe impl Plain for V4Addresses {}

impl V4Addresses {
    /// Where it is in the header.
    pub const OFFSET: u32 = V4Hop::OFFSET;

    /// Replaces the address that is `at` bytes into the header, and the time to live if there is a new one; mends the checksum by
    /// the address's `difference`.
    #[inline(always)]
    #[must_use]
    pub fn with(mut self, at: u32, address: Address, difference: u32, time_to_live: Option<u8>) -> Self {
        let [a, b, c, d] = address.v4_octets();
        let halves = [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])];
        if at == V4::SOURCE {
            self.source = halves;
        } else {
            self.destination = halves;
        }
        self.hop.checksum = checksum::apply(self.hop.checksum, difference);
        if let Some(time_to_live) = time_to_live {
            self.hop = self.hop.with(time_to_live);
        }
        self
    }

    /// As it is written.
    #[inline(always)]
    #[must_use]
    pub const fn bytes(self) -> [u8; 12] {
        // SAFETY: both types have 12 bytes and every bit pattern is a valid value of both.
        unsafe { core::mem::transmute(self) }
    }
}

impl Family for V4 {
    type Header = V4Header;

    const ICMP: u8 = protocol::ICMP;
    const SOURCE: u32 = 12;
    const DESTINATION: u32 = 16;

    #[inline(always)]
    fn header<P: Packet>(packet: &P, offset: u32) -> Option<Self::Header> {
        let header: V4Header = packet.load_header(offset)?;
        (header.version_and_length >> 4 == 4 && header.version_and_length & 0x0f >= 5).then_some(header)
    }

    #[inline(always)]
    fn source(header: &Self::Header) -> Address {
        Address::from_v4(header.source)
    }

    #[inline(always)]
    fn destination(header: &Self::Header) -> Address {
        Address::from_v4(header.destination)
    }

    #[inline(always)]
    fn may_be_icmp(header: &Self::Header) -> bool {
        header.protocol == Self::ICMP
    }

    #[inline(always)]
    fn payload<P: Packet>(_packet: &P, offset: u32, header: &Self::Header, payload: &mut Payload) -> bool {
        let field = u16::from_be_bytes(header.fragment);
        payload.offset = offset + Self::header_length(header);
        payload.end = payload.end_of_packet(offset, u16::from_be_bytes(header.total_length).into());
        payload.protocol = header.protocol;
        payload.fragment = if field & V4_FRAGMENT_OFFSET != 0 {
            Fragment::Later
        } else if field & V4_MORE_FRAGMENTS != 0 {
            Fragment::First
        } else {
            Fragment::Whole
        };
        payload.identification = header.identification.into();
        payload.offset <= payload.end
    }

    #[inline(always)]
    fn fragment_protocol(payload: &Payload) -> u8 {
        payload.protocol
    }

    #[inline(always)]
    fn difference(old: Address, new: Address) -> u32 {
        checksum::v4_difference(old, new)
    }

    #[inline(always)]
    fn pseudo_header_sum(source: Address, destination: Address, protocol: u8, length: u32) -> u16 {
        checksum::v4_pseudo_header_sum(source, destination, protocol, length)
    }

    #[inline(always)]
    fn error_difference(_outer: u32, _quoted: u32) -> u64 {
        0
    }

    #[inline(always)]
    fn store_address<P: Packet>(
        packet: &mut P,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        hop_limit: Option<u8>,
    ) -> Result<(), WriteError> {
        packet.store_v4_address(offset, at, address, difference, hop_limit)
    }

    #[inline(always)]
    fn hop_limit(header: &Self::Header) -> u8 {
        header.time_to_live
    }

    #[inline(always)]
    fn fragment_flags(header: &Self::Header) -> u8 {
        header.fragment[0]
    }

    #[inline(always)]
    fn may_be_fragmented(flags: u8) -> bool {
        flags & V4_DONT_FRAGMENT == 0
    }

    #[inline(always)]
    fn protocol(header: &Self::Header) -> u8 {
        header.protocol
    }

    #[inline(always)]
    fn header_length(header: &Self::Header) -> u32 {
        u32::from(header.version_and_length & 0x0f) * 4
    }

    #[inline(always)]
    fn pass_router<P: Packet>(packet: &mut P, offset: u32, header: &Self::Header) -> Result<(), WriteError> {
        let V4Header { time_to_live, protocol, checksum, .. } = *header;
        let hop = V4Hop { time_to_live, protocol, checksum };
        packet.store_v4_hop(offset, hop.with(time_to_live.wrapping_sub(1)))
    }
}

/// IPv6 (RFC 8200).
#[derive(Clone, Copy, Debug)]
pub struct V6;

/// The IPv6 header. The addresses are taken as they lie, for the kernel's stack has no room for copies.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct V6Header {
    /// 6, traffic class and flow label.
    pub version_class_flow: [u8; 4],
    /// In bytes, extension headers included, in network order.
    pub payload_length: [u8; 2],
    /// What follows: an extension header's number, or the protocol's.
    pub next_header: u8,
    /// Routers that it may still pass.
    pub hop_limit: u8,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
}

const _: () = assert!(size_of::<V6Header>() == V6_HEADER_LENGTH as usize);

// SAFETY: byte arrays, without holes: 8 bytes, then two addresses aligned to 8.
unsafe impl Plain for V6Header {}

/// Length of the IPv6 header, in bytes.
pub const V6_HEADER_LENGTH: u32 = 40;
const V6_HOP_LIMIT: u32 = 7;
const V6_MORE_FRAGMENTS: u16 = 0x0001;
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;
const V6_FRAGMENT_HEADER_LENGTH: u32 = 8;

/// Extension headers followed. A request with more is dropped as malformed, a reply with more is left alone. The
/// specification asks for orderly use of six (RFC 8200, section 4.1); packets with more are not seen in the wild.
pub const MAX_EXTENSION_HEADERS: u32 = 8;

mod extension {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;
}

impl Family for V6 {
    type Header = V6Header;

    const ICMP: u8 = protocol::ICMPV6;
    const SOURCE: u32 = 8;
    const DESTINATION: u32 = 24;

    #[inline(always)]
    fn header<P: Packet>(packet: &P, offset: u32) -> Option<Self::Header> {
        let header: V6Header = packet.load_header(offset)?;
        // The tables keep IPv4 addresses in this form. Nobody may send it (RFC 6890), and the kernel drops such a source,
        // but only behind this hook.
        let mapped = header.source.is_v4_mapped() || header.destination.is_v4_mapped();
        (header.version_class_flow[0] >> 4 == 6 && !mapped).then_some(header)
    }

    #[inline(always)]
    fn source(header: &Self::Header) -> Address {
        header.source
    }

    #[inline(always)]
    fn destination(header: &Self::Header) -> Address {
        header.destination
    }

    #[inline(always)]
    fn may_be_icmp(header: &Self::Header) -> bool {
        header.next_header == Self::ICMP || is_extension(header.next_header)
    }

    /// Not inlined: what the compiler would make of the walk and what follows it as one is more paths than the
    /// verifier has patience for.
    #[inline(never)]
    fn payload<P: Packet>(packet: &P, offset: u32, header: &Self::Header, payload: &mut Payload) -> bool {
        let payload_length = u16::from_be_bytes(header.payload_length).into();
        payload.end = payload.end_of_packet(offset + V6_HEADER_LENGTH, payload_length);
        payload.fragment = Fragment::Whole;
        payload.identification = 0;
        let mut protocol = header.next_header;
        let mut at = offset + V6_HEADER_LENGTH;
        for _ in 0..=MAX_EXTENSION_HEADERS {
            // Of a later fragment, what follows is the middle of the packet and not a header.
            if !is_extension(protocol) || matches!(payload.fragment, Fragment::Later) {
                payload.protocol = protocol;
                payload.offset = at;
                return at <= payload.end;
            }
            let Some(extension) = packet.load::<[u8; 8]>(at) else {
                return false;
            };
            let length = match protocol {
                extension::FRAGMENT => {
                    let field = u16::from_be_bytes([extension[2], extension[3]]);
                    payload.identification =
                        u32::from_ne_bytes([extension[4], extension[5], extension[6], extension[7]]);
                    payload.fragment = if field & V6_FRAGMENT_OFFSET != 0 {
                        Fragment::Later
                    } else if field & V6_MORE_FRAGMENTS != 0 {
                        Fragment::First
                    } else {
                        Fragment::Whole
                    };
                    V6_FRAGMENT_HEADER_LENGTH
                }
                // Words of four bytes, less two (RFC 4302, section 2.2).
                extension::AUTHENTICATION => (u32::from(extension[1]) + 2) * 4,
                // Segments left: the checksum's pseudo-header has the final destination, which is not the one in
                // the IPv6 header (RFC 8200, section 8.1). Not ours to touch.
                extension::ROUTING if extension[3] != 0 => return false,
                // Words of eight bytes, less one (RFC 8200, section 4).
                _ => (u32::from(extension[1]) + 1) * 8,
            };
            // Nine extension headers fit 16 bits. Known, every sequence of them would be a path of its own.
            at = verifier::forget(at + length);
            protocol = extension[0];
        }
        false
    }

    #[inline(always)]
    fn fragment_protocol(_payload: &Payload) -> u8 {
        0
    }

    #[inline(always)]
    fn difference(old: Address, new: Address) -> u32 {
        checksum::v6_difference(old, new)
    }

    #[inline(always)]
    fn pseudo_header_sum(source: Address, destination: Address, protocol: u8, length: u32) -> u16 {
        checksum::v6_pseudo_header_sum(source, destination, protocol, length)
    }

    #[inline(always)]
    fn error_difference(outer: u32, quoted: u32) -> u64 {
        outer as u64 + quoted as u64
    }

    #[inline(always)]
    fn store_address<P: Packet>(
        packet: &mut P,
        offset: u32,
        at: u32,
        address: Address,
        _difference: u32,
        hop_limit: Option<u8>,
    ) -> Result<(), WriteError> {
        packet.store_v6_address(offset + at, address)?;
        match hop_limit {
            Some(hop_limit) => packet.store_hop_limit(offset + V6_HOP_LIMIT, hop_limit),
            None => Ok(()),
        }
    }

    #[inline(always)]
    fn hop_limit(header: &Self::Header) -> u8 {
        header.hop_limit
    }

    #[inline(always)]
    fn fragment_flags(_header: &Self::Header) -> u8 {
        0
    }

    #[inline(always)]
    fn may_be_fragmented(_flags: u8) -> bool {
        false
    }

    #[inline(always)]
    fn protocol(header: &Self::Header) -> u8 {
        header.next_header
    }

    #[inline(always)]
    fn header_length(_header: &Self::Header) -> u32 {
        V6_HEADER_LENGTH
    }

    #[inline(always)]
    fn pass_router<P: Packet>(packet: &mut P, offset: u32, header: &Self::Header) -> Result<(), WriteError> {
        packet.store_hop_limit(offset + V6_HOP_LIMIT, header.hop_limit.wrapping_sub(1))
    }
}

#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        extension::HOP_BY_HOP
            | extension::DESTINATION
            | extension::ROUTING
            | extension::AUTHENTICATION
            | extension::FRAGMENT
    )
}
