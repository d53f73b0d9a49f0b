//! Packets as values: built with right checksums, cut into fragments, read back from a capture, and checked.
//!
//! The arithmetic is etherparse's and crc's, not proxier's: this is the oracle that proxier's rewriting is held
//! against. Not for sending or capturing; that is `host` and `capture`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, bail, ensure};
use etherparse::{
    Ethernet2Header, IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpFragOffset,
    IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader,
};

mod checksums;
mod icmp;

/// IP protocol numbers (IANA).
pub mod protocol {
    /// Internet Control Message Protocol.
    pub const ICMP: u8 = 1;
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// Datagram Congestion Control Protocol (RFC 4340).
    pub const DCCP: u8 = 33;
    /// Generic Routing Encapsulation (RFC 2784).
    pub const GRE: u8 = 47;
    /// Encapsulating Security Payload (RFC 4303).
    pub const ESP: u8 = 50;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// Stream Control Transmission Protocol (RFC 9260).
    pub const SCTP: u8 = 132;
    /// UDP-Lite (RFC 3828).
    pub const UDPLITE: u8 = 136;

    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const SCTP_CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// SCTP chunk types.
pub const SCTP_INIT: u8 = 1;
/// See [`SCTP_INIT`].
pub const SCTP_INIT_ACK: u8 = 2;
/// DCCP packet types.
pub const DCCP_REQUEST: u8 = 0;
/// See [`DCCP_REQUEST`].
pub const DCCP_RESPONSE: u8 = 1;

/// A piece of a packet: where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// What all pieces of one packet have in common; 16 bits for IPv4.
    pub identification: u32,
    /// Position in bytes, a multiple of 8.
    pub offset: u16,
    /// Whether there are later pieces.
    pub more: bool,
}

/// An IP packet of either family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Hop limit; IPv4's time to live.
    pub hop_limit: u8,
    /// The transport protocol, after all extension headers.
    pub protocol: u8,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers in order: number, and the whole header without its first byte (the next header).
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Set if this is a fragment. In IPv6 the fragment header comes after all `extensions`.
    pub fragment: Option<Fragment>,
    /// Transport header and data.
    pub payload: Vec<u8>,
}

/// The control bits of a TCP segment that the lab sends by hand.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpFlags {
    /// Opens a connection.
    pub syn: bool,
    /// The acknowledgement number counts.
    pub ack: bool,
    /// Nothing more will be sent.
    pub fin: bool,
    /// The connection is over.
    pub rst: bool,
}

impl Packet {
    /// A packet of `protocol` whose transport header and data are already there.
    #[must_use]
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "{source} and {destination} differ in family");
        Self {
            source,
            destination,
            hop_limit: 64,
            protocol,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            payload,
        }
    }

    /// A TCP segment.
    #[must_use]
    pub fn tcp(
        source: SocketAddr,
        destination: SocketAddr,
        flags: TcpFlags,
        sequence: u32,
        data: &[u8],
    ) -> Self {
        let mut header = TcpHeader::new(source.port(), destination.port(), sequence, 65_000);
        header.syn = flags.syn;
        header.ack = flags.ack;
        header.fin = flags.fin;
        header.rst = flags.rst;
        header.psh = !data.is_empty();
        let mut payload = header.to_bytes().to_vec();
        payload.extend_from_slice(data);
        Self::new(source.ip(), destination.ip(), protocol::TCP, payload).with_checksum_at(16)
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Self {
        let mut payload = ports(source, destination);
        payload.extend_from_slice(&length(8 + data.len()).to_be_bytes());
        payload.extend_from_slice(&[0, 0]);
        payload.extend_from_slice(data);
        Self::new(source.ip(), destination.ip(), protocol::UDP, payload).with_checksum_at(6)
    }

    /// A UDP-Lite datagram, of which the checksum covers the first `coverage` bytes; 0 covers all (RFC 3828).
    #[must_use]
    pub fn udplite(source: SocketAddr, destination: SocketAddr, coverage: u16, data: &[u8]) -> Self {
        let mut payload = ports(source, destination);
        payload.extend_from_slice(&coverage.to_be_bytes());
        payload.extend_from_slice(&[0, 0]);
        payload.extend_from_slice(data);
        Self::new(source.ip(), destination.ip(), protocol::UDPLITE, payload).with_checksum_at(6)
    }

    /// An SCTP INIT, which opens an association (RFC 9260, section 3.3.2).
    #[must_use]
    pub fn sctp_init(source: SocketAddr, destination: SocketAddr, initiate_tag: u32) -> Self {
        Self::sctp(source, destination, 0, &sctp_init_chunk(SCTP_INIT, initiate_tag, &[]))
    }

    /// The answer to an INIT: `tag` is the one that the INIT offered, `cookie` what the peer shall send back.
    #[must_use]
    pub fn sctp_init_ack(source: SocketAddr, destination: SocketAddr, tag: u32, cookie: &[u8]) -> Self {
        Self::sctp(source, destination, tag, &sctp_init_chunk(SCTP_INIT_ACK, !tag, cookie))
    }

    /// An SCTP packet with `chunks`.
    #[must_use]
    pub fn sctp(source: SocketAddr, destination: SocketAddr, verification_tag: u32, chunks: &[u8]) -> Self {
        let mut payload = ports(source, destination);
        payload.extend_from_slice(&verification_tag.to_be_bytes());
        payload.extend_from_slice(&[0; 4]);
        payload.extend_from_slice(chunks);
        let crc = SCTP_CRC.checksum(&payload);
        // The CRC is the one number of the packet that is sent lowest byte first (RFC 9260, appendix A).
        payload[8..12].copy_from_slice(&crc.to_le_bytes());
        Self::new(source.ip(), destination.ip(), protocol::SCTP, payload)
    }

    /// A DCCP packet of type [`DCCP_REQUEST`] or [`DCCP_RESPONSE`] (RFC 4340, sections 5.2 and 5.3).
    #[must_use]
    pub fn dccp(source: SocketAddr, destination: SocketAddr, kind: u8, data: &[u8]) -> Self {
        let mut payload = ports(source, destination);
        let words = if kind == DCCP_RESPONSE { 7 } else { 5 };
        payload.extend_from_slice(&[words, 0, 0, 0]);
        // Type, then the bit that says that sequence numbers have 48 bits.
        payload.extend_from_slice(&[kind << 1 | 1, 0]);
        payload.extend_from_slice(&[0, 0, 0, 0, 0, 7]);
        if kind == DCCP_RESPONSE {
            payload.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 7]);
        }
        payload.extend_from_slice(b"prox");
        payload.extend_from_slice(data);
        Self::new(source.ip(), destination.ip(), protocol::DCCP, payload).with_checksum_at(6)
    }

    /// An echo request of the addresses' family.
    #[must_use]
    pub fn echo_request(
        source: IpAddr,
        destination: IpAddr,
        identifier: u16,
        sequence: u16,
        data: &[u8],
    ) -> Self {
        let echo = IcmpEchoHeader { id: identifier, seq: sequence };
        let (number, mut payload) = match source {
            IpAddr::V4(_) => {
                let header = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), data);
                (protocol::ICMP, header.to_bytes().to_vec())
            }
            // Its checksum needs the addresses, and comes below.
            IpAddr::V6(_) => {
                (protocol::ICMPV6, Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes().to_vec())
            }
        };
        payload.extend_from_slice(data);
        let packet = Self::new(source, destination, number, payload);
        if source.is_ipv6() { packet.with_checksum_at(2) } else { packet }
    }

    /// A GRE packet with a key (RFC 2890), carrying a protocol number that is free for experiments.
    #[must_use]
    pub fn gre(source: IpAddr, destination: IpAddr, key: u32, data: &[u8]) -> Self {
        let mut payload = vec![0x20, 0, 0x88, 0xb5];
        payload.extend_from_slice(&key.to_be_bytes());
        payload.extend_from_slice(data);
        Self::new(source, destination, protocol::GRE, payload)
    }

    /// An ESP packet: index and sequence number in the clear, the rest as if encrypted.
    #[must_use]
    pub fn esp(source: IpAddr, destination: IpAddr, index: u32, sequence: u32, data: &[u8]) -> Self {
        let mut payload = index.to_be_bytes().to_vec();
        payload.extend_from_slice(&sequence.to_be_bytes());
        payload.extend_from_slice(data);
        Self::new(source, destination, protocol::ESP, payload)
    }

    /// The same packet with IPv4 options that ask for nothing (RFC 791: no operation, end of list): a router or host
    /// that writes into options would blur what else changes.
    #[must_use]
    pub fn with_ipv4_options(mut self) -> Self {
        self.options = vec![1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0];
        self
    }

    /// The same packet with an IPv6 extension header of 8 bytes that asks for nothing (PadN).
    /// `number` is [`protocol::HOP_BY_HOP`] or [`protocol::DESTINATION_OPTIONS`].
    #[must_use]
    pub fn with_extension(mut self, number: u8) -> Self {
        self.extensions.push((number, vec![0, 1, 4, 0, 0, 0, 0]));
        self
    }

    /// The packet in pieces of at most `size` bytes after the IP headers, rounded down to a multiple of 8.
    #[must_use]
    pub fn fragments(&self, identification: u32, size: usize) -> Vec<Self> {
        let size = (size / 8 * 8).max(8);
        let pieces = self.payload.chunks(size).count();
        let cut = |(index, piece): (usize, &[u8])| Self {
            fragment: Some(Fragment {
                identification,
                offset: length(index * size),
                more: index + 1 < pieces,
            }),
            payload: piece.to_vec(),
            ..self.clone()
        };
        self.payload.chunks(size).enumerate().map(cut).collect()
    }

    /// Source and destination port, where the protocol has ports and this packet carries them.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        let has_ports = [protocol::TCP, protocol::UDP, protocol::DCCP, protocol::SCTP, protocol::UDPLITE]
            .contains(&self.protocol);
        if !has_ports || self.fragment.is_some_and(|fragment| fragment.offset > 0) {
            return None;
        }
        let [a, b, c, d] = *self.payload.first_chunk()?;
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// Identifier and sequence number, if this is an echo request or reply.
    #[must_use]
    pub fn echo(&self) -> Option<(u16, u16)> {
        let [kind, 0, _, _, a, b, c, d] = *self.payload.first_chunk()? else { return None };
        let is_echo = match self.protocol {
            protocol::ICMP => kind == 0 || kind == 8,
            protocol::ICMPV6 => kind == 128 || kind == 129,
            _ => false,
        };
        is_echo.then(|| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// Whether this is one of the messages that IPv6 needs on a link itself (neighbour discovery, multicast
    /// listeners), which happen to cross a capture.
    #[must_use]
    pub fn is_link_housekeeping(&self) -> bool {
        let kind = self.payload.first().copied().unwrap_or(0);
        self.protocol == protocol::ICMPV6 && matches!(kind, 130..=137 | 143)
    }

    /// The bytes from the IP header on.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.encode_ipv4(source, destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.encode_ipv6(source, destination),
            _ => unreachable!("new() has checked the families"),
        }
    }

    fn encode_ipv4(&self, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let mut header = Ipv4Header {
            time_to_live: self.hop_limit,
            protocol: IpNumber(self.protocol),
            ..Ipv4Header::default()
        };
        header.source = source.octets();
        header.destination = destination.octets();
        header.options =
            Ipv4Options::try_from(&self.options[..]).expect("options are a multiple of 4, at most 40");
        header.dont_fragment = false;
        if let Some(fragment) = self.fragment {
            header.identification = (fragment.identification & 0xffff) as u16;
            header.fragment_offset = IpFragOffset::try_new(fragment.offset / 8).expect("13 bits");
            header.more_fragments = fragment.more;
        }
        header.total_len = length(header.header_len() + self.payload.len());
        header.header_checksum = header.calc_header_checksum();
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    fn encode_ipv6(&self, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let mut headers: Vec<(u8, Vec<u8>)> = self.extensions.clone();
        if let Some(Fragment { identification, offset, more }) = self.fragment {
            let mut body = vec![0];
            body.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
            body.extend_from_slice(&identification.to_be_bytes());
            headers.push((protocol::FRAGMENT, body));
        }
        let numbers: Vec<u8> = headers.iter().map(|(number, _)| *number).chain([self.protocol]).collect();
        let mut body = Vec::new();
        for (index, (_, bytes)) in headers.iter().enumerate() {
            body.push(numbers[index + 1]);
            body.extend_from_slice(bytes);
        }
        body.extend_from_slice(&self.payload);
        let header = Ipv6Header {
            payload_length: length(body.len()),
            next_header: IpNumber(numbers[0]),
            hop_limit: self.hop_limit,
            source: source.octets(),
            destination: destination.octets(),
            ..Ipv6Header::default()
        };
        let mut bytes = header.to_bytes().to_vec();
        bytes.append(&mut body);
        bytes
    }

    /// The bytes from the Ethernet header on.
    #[must_use]
    pub fn frame(&self, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
        let ethertype = if self.source.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        let header = Ethernet2Header { source: from, destination: to, ether_type: ethertype.into() };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(&self.encode());
        bytes
    }

    /// Reads a frame from the Ethernet header on. `None`: no IP.
    ///
    /// # Errors
    ///
    /// A header that is cut off or contradicts itself, or a wrong IPv4 header checksum.
    pub fn from_frame(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let (header, rest) = Ethernet2Header::from_slice(bytes).context("Ethernet")?;
        match header.ether_type.0 {
            ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => Self::decode(rest).map(Some),
            _ => Ok(None),
        }
    }

    /// Reads a packet from the IP header on. Bytes after its end (padding of the link) are left out.
    ///
    /// # Errors
    ///
    /// As [`Self::from_frame`].
    pub fn decode(bytes: &[u8]) -> anyhow::Result<Self> {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::decode_ipv4(bytes),
            Some(6) => Self::decode_ipv6(bytes),
            _ => bail!("neither IPv4 nor IPv6"),
        }
    }

    fn decode_ipv4(bytes: &[u8]) -> anyhow::Result<Self> {
        let (header, rest) = Ipv4Header::from_slice(bytes).context("IPv4 header")?;
        ensure!(
            header.header_checksum == header.calc_header_checksum(),
            "wrong IPv4 header checksum: {header:?}"
        );
        let size = usize::from(header.payload_len().context("IPv4 length")?);
        let payload = rest.get(..size).context("the packet ends early")?;
        let offset = header.fragment_offset.value() * 8;
        Ok(Self {
            source: Ipv4Addr::from(header.source).into(),
            destination: Ipv4Addr::from(header.destination).into(),
            hop_limit: header.time_to_live,
            protocol: header.protocol.0,
            options: header.options.as_slice().to_vec(),
            extensions: Vec::new(),
            fragment: (offset > 0 || header.more_fragments).then_some(Fragment {
                identification: header.identification.into(),
                offset,
                more: header.more_fragments,
            }),
            payload: payload.to_vec(),
        })
    }

    fn decode_ipv6(bytes: &[u8]) -> anyhow::Result<Self> {
        let (header, rest) = Ipv6Header::from_slice(bytes).context("IPv6 header")?;
        let mut rest = rest.get(..usize::from(header.payload_length)).context("the packet ends early")?;
        let mut packet = Self::new(
            Ipv6Addr::from(header.source).into(),
            Ipv6Addr::from(header.destination).into(),
            header.next_header.0,
            Vec::new(),
        );
        packet.hop_limit = header.hop_limit;
        loop {
            let size = match packet.protocol {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS => {
                    8 + 8 * usize::from(*rest.get(1).context("an extension header ends early")?)
                }
                protocol::FRAGMENT => 8,
                _ => break,
            };
            let (extension, after) = rest.split_at_checked(size).context("an extension header ends early")?;
            let number = std::mem::replace(&mut packet.protocol, extension[0]);
            if number == protocol::FRAGMENT {
                let field = u16::from_be_bytes([extension[2], extension[3]]);
                let identification =
                    u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                packet.fragment = Some(Fragment { identification, offset: field & !7, more: field & 1 == 1 });
            } else {
                packet.extensions.push((number, extension[1..].to_vec()));
            }
            rest = after;
            if packet.fragment.is_some_and(|fragment| fragment.offset > 0) {
                break;
            }
        }
        packet.payload = rest.to_vec();
        Ok(packet)
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ports() {
            Some((source, destination)) => {
                let (source, destination) =
                    (SocketAddr::new(self.source, source), SocketAddr::new(self.destination, destination));
                write!(f, "{source} -> {destination}")?;
            }
            None => write!(f, "{} -> {}", self.source, self.destination)?,
        }
        write!(f, " {}", name(self.protocol))?;
        if let Some((identifier, _)) = self.echo() {
            write!(f, " echo {identifier}")?;
        }
        if let Some(fragment) = self.fragment {
            write!(f, " fragment at {}", fragment.offset)?;
        }
        Ok(())
    }
}

/// The name of a protocol number, or the number.
#[must_use]
pub fn name(number: u8) -> String {
    match number {
        protocol::ICMP => "icmp",
        protocol::TCP => "tcp",
        protocol::UDP => "udp",
        protocol::DCCP => "dccp",
        protocol::GRE => "gre",
        protocol::ESP => "esp",
        protocol::ICMPV6 => "icmpv6",
        protocol::SCTP => "sctp",
        protocol::UDPLITE => "udplite",
        other => return other.to_string(),
    }
    .to_owned()
}

fn ports(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat()
}

fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).expect("the lab sends no jumbograms")
}

fn sctp_init_chunk(kind: u8, initiate_tag: u32, cookie: &[u8]) -> Vec<u8> {
    let mut body = initiate_tag.to_be_bytes().to_vec();
    body.extend_from_slice(&65_536_u32.to_be_bytes());
    body.extend_from_slice(&[0, 1, 0, 1]);
    body.extend_from_slice(&1_u32.to_be_bytes());
    if !cookie.is_empty() {
        body.extend_from_slice(&[0, 7]);
        body.extend_from_slice(&length(4 + cookie.len()).to_be_bytes());
        body.extend_from_slice(cookie);
    }
    let mut chunk = vec![kind, 0];
    chunk.extend_from_slice(&length(4 + body.len()).to_be_bytes());
    chunk.append(&mut body);
    // A chunk's length does not count the padding of its last parameter, but the packet carries it.
    chunk.resize(chunk.len().next_multiple_of(4), 0);
    chunk
}

#[cfg(test)]
mod tests;
