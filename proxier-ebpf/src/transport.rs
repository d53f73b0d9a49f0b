//! What the core needs from the transport header: which conversation the packet belongs to, and which checksum
//! covers the addresses.

use proxier_common::{Address, FlowKey, SERVICE_BALANCE_FLOW, SessionKey, protocol};

use crate::{
    family::{Fragment, Payload},
    packet::Packet,
    verifier,
};

/// TCP header flags, byte 13 (RFC 9293).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgment field is significant.
    pub const ACK: u8 = 0x10;
}

/// What a packet is, as far as a conversation goes.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ports, or no ports at all: either side may speak first.
    Ordinary,
    /// An ICMP query of the type that [`Transport::query`] says.
    Query,
    /// The ICMP answer to a query of the type that [`Transport::query`] says.
    Answer,
    /// An ICMP error, which quotes another packet.
    IcmpError,
    /// Neighbour discovery (RFC 4861): about this link, never to be rewritten.
    NeighbourDiscovery,
    /// A redirect of neighbour discovery: advice about the way to an address.
    NeighbourRedirect,
    /// Awaits no reply of its own: a later fragment, or an ICMP message that is neither query, answer nor error.
    Unpaired,
}

/// The transport header, as far as the core cares.
///
/// Plain fields, no `Option`: the kernel refuses BTF in which a union has a member that is not at its start, which is
/// how an enum looks whose discriminant hides in a later field.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Offset in the packet of the checksum that covers the addresses; 0 if there is none.
    pub checksum_offset: u32,
    /// Source port in network order; of an ICMP query or answer the identifier; else 0.
    pub source_port: u16,
    /// Destination port in network order; of an ICMP query or answer the identifier; else 0.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// What it is.
    pub kind: Kind,
    /// The type of the ICMP query that this is or answers; else 0.
    pub query: u8,
    /// TCP's flags; else 0.
    pub tcp_flags: u8,
    /// A checksum of zero says that there is none (UDP).
    pub zero_means_none: bool,
    /// The checksum as loaded, where zero means none and [`Transport::checksum_offset`] is not 0; else 0.
    pub checksum: u16,
}

/// Why there is no [`Transport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportError {
    /// The packet ends within the header: its receiver will not want it either.
    Truncated,
    /// The first fragment ends within the part of the header that is needed.
    TinyFragment,
}

impl Transport {
    /// Whether it opens a TCP connection.
    #[inline(always)]
    #[must_use]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
    }

    /// The key of the flow that this belongs to as a request of `peer` to `pod`.
    #[inline(always)]
    #[must_use]
    pub const fn flow_of_request(&self, pod: Address, peer: Address) -> FlowKey {
        self.flow(pod, peer, self.destination_port, self.source_port)
    }

    /// The key of the flow that this belongs to as a reply of `pod` to `peer`.
    #[inline(always)]
    #[must_use]
    pub const fn flow_of_reply(&self, pod: Address, peer: Address) -> FlowKey {
        self.flow(pod, peer, self.source_port, self.destination_port)
    }

    #[inline(always)]
    const fn flow(&self, pod: Address, peer: Address, pod_port: u16, peer_port: u16) -> FlowKey {
        FlowKey {
            pod,
            peer,
            pod_port,
            peer_port: if self.query == 0 { peer_port } else { 0 },
            protocol: self.protocol,
            query: self.query,
            padding: 0,
        }
    }

    /// The key of the session that this belongs to as a request of `peer` to `external`, a Service with these flags
    /// (`SERVICE_*`).
    #[inline(always)]
    #[must_use]
    pub const fn session_of_request(&self, external: Address, peer: Address, flags: u32) -> SessionKey {
        let ports = (self.destination_port, self.source_port);
        session_key(external, peer, self.protocol, ports, flags)
    }

    /// The key of the session that this belongs to as a reply to `peer` from `external`.
    #[inline(always)]
    #[must_use]
    pub const fn session_of_reply(&self, external: Address, peer: Address, flags: u32) -> SessionKey {
        let ports = (self.source_port, self.destination_port);
        session_key(external, peer, self.protocol, ports, flags)
    }

    /// To be filled in by [`read`].
    pub const EMPTY: Self = Self {
        checksum_offset: 0,
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        kind: Kind::Ordinary,
        query: 0,
        tcp_flags: 0,
        zero_means_none: false,
        checksum: 0,
    };
}

/// The key of a session: of the client, or where [`SERVICE_BALANCE_FLOW`] is among the `flags`, of one conversation between
/// these ports, the external one first.
#[inline(always)]
#[must_use]
pub(crate) const fn session_key(
    external: Address,
    peer: Address,
    protocol: u8,
    (external_port, peer_port): (u16, u16),
    flags: u32,
) -> SessionKey {
    if flags & SERVICE_BALANCE_FLOW == 0 {
        return SessionKey { external, peer, external_port: 0, peer_port: 0, protocol: 0, padding: [0; 3] };
    }
    SessionKey { external, peer, external_port, peer_port, protocol, padding: [0; 3] }
}

/// How many bytes of a header must be there. A whole packet has a whole header; a first fragment may end early
/// (RFC 1858), but must reach as far as ports and checksum.
struct Layout {
    whole: u32,
    first_fragment: u32,
    checksum: u32,
    zero_means_none: bool,
}

/// How much of a transport header every ICMP error quotes (RFC 792).
const QUOTED: u32 = 8;

/// Reads the transport header that `payload` points at into `transport`. `icmp` is [`Family::ICMP`](crate::Family::ICMP): the
/// other family's ICMP is a protocol without ports and checksum as any unknown one. Of a quoted one, ports and identifier are
/// enough; a checksum that is not all there counts as none.
///
/// # Errors
///
/// The header is not all there.
#[inline(never)]
pub fn read<P: Packet>(
    packet: &P,
    payload: &Payload,
    icmp: u8,
    transport: &mut Transport,
) -> Result<(), TransportError> {
    *transport = Transport { protocol: payload.protocol, ..Transport::EMPTY };
    if let Fragment::Later = payload.fragment {
        transport.kind = Kind::Unpaired;
        return Ok(());
    }
    let layout = match payload.protocol {
        protocol::TCP => Layout { whole: 20, first_fragment: 18, checksum: 16, zero_means_none: false },
        protocol::UDP | protocol::UDPLITE => {
            Layout { whole: 8, first_fragment: 8, checksum: 6, zero_means_none: true }
        }
        protocol::DCCP => Layout { whole: 12, first_fragment: 8, checksum: 6, zero_means_none: false },
        // CRC32c, which does not cover addresses (RFC 9260, section 6.8).
        protocol::SCTP => Layout { whole: 12, first_fragment: 4, checksum: 0, zero_means_none: false },
        protocol::ICMP | protocol::ICMPV6 if payload.protocol != icmp => return Ok(()),
        // No pseudo-header (RFC 792).
        protocol::ICMP => Layout { whole: 8, first_fragment: 8, checksum: 0, zero_means_none: false },
        // A pseudo-header (RFC 4443, section 2.3).
        protocol::ICMPV6 => Layout { whole: 8, first_fragment: 8, checksum: 2, zero_means_none: false },
        _ => return Ok(()),
    };
    let available = payload.end.saturating_sub(payload.offset);
    match payload.fragment {
        _ if payload.quoted && available < QUOTED => return Err(TransportError::Truncated),
        _ if payload.quoted => {}
        Fragment::Whole if available < layout.whole => return Err(TransportError::Truncated),
        Fragment::First if available < layout.first_fragment => return Err(TransportError::TinyFragment),
        _ => {}
    }
    if layout.checksum != 0 && available >= layout.first_fragment {
        transport.checksum_offset = verifier::forget(payload.offset + layout.checksum);
        transport.zero_means_none = verifier::forget_whether(layout.zero_means_none);
    }
    let header: [u16; 4] = if layout.first_fragment < 8 {
        let [source_port, destination_port] =
            packet.load_header(payload.offset).ok_or(TransportError::Truncated)?;
        [source_port, destination_port, 0, 0]
    } else {
        packet.load_header(payload.offset).ok_or(TransportError::Truncated)?
    };
    if let protocol::ICMP | protocol::ICMPV6 = payload.protocol {
        let [icmp_type, _] = header[0].to_ne_bytes();
        let (kind, query) = icmp_kind(payload.protocol, icmp_type);
        transport.kind = kind;
        transport.query = (verifier::forget(query.into()) & 0xff) as u8;
        if let Kind::Query | Kind::Answer = transport.kind {
            transport.source_port = header[2];
            transport.destination_port = header[2];
        }
        return Ok(());
    }
    [transport.source_port, transport.destination_port, ..] = header;
    if transport.zero_means_none {
        transport.checksum = header[3];
    }
    if payload.protocol == protocol::TCP && !payload.quoted {
        let [_, flags] = packet.load_header(payload.offset + 12).ok_or(TransportError::Truncated)?;
        transport.tcp_flags = flags;
    }
    Ok(())
}

/// What an ICMP or ICMPv6 type is, and the query it belongs to (IANA registries "ICMP Type Numbers" and "ICMPv6
/// type Numbers").
#[inline(always)]
const fn icmp_kind(protocol_number: u8, icmp_type: u8) -> (Kind, u8) {
    if protocol_number == protocol::ICMP {
        match icmp_type {
            8 | 13 | 15 | 17 => (Kind::Query, icmp_type),
            0 => (Kind::Answer, 8),
            14 | 16 | 18 => (Kind::Answer, icmp_type - 1),
            3 | 4 | 5 | 11 | 12 => (Kind::IcmpError, 0),
            _ => (Kind::Unpaired, 0),
        }
    } else {
        match icmp_type {
            128 | 139 => (Kind::Query, icmp_type),
            129 | 140 => (Kind::Answer, icmp_type - 1),
            1..=127 => (Kind::IcmpError, 0),
            133..=136 => (Kind::NeighbourDiscovery, 0),
            137 => (Kind::NeighbourRedirect, 0),
            _ => (Kind::Unpaired, 0),
        }
    }
}
