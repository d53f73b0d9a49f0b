//! Bytes of IP packets: where things are in them, and how they are put together. Sums are the `internet-checksum` and
//! `crc` crates', lengths and offsets are this file's: nothing here is shared with the packet core that is on trial.

use std::net::IpAddr;

use internet_checksum::Checksum;
use proxier_tests::packets::protocol;

use crate::script::Header;

pub(crate) const AUTHENTICATION: u8 = 51;
const SCTP_CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// A place in a fragmented packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) identification: u32,
    /// In bytes.
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// Where things are in an IP packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub(crate) v6: bool,
    /// The protocol behind all headers that are IP's own. Of a later fragment what the fragment header says.
    pub(crate) protocol: u8,
    /// Where the transport header is; of a later fragment the data.
    pub(crate) transport: usize,
    /// Where the packet ends by its own account, or the bytes do.
    pub(crate) end: usize,
    pub(crate) piece: Option<Piece>,
    /// Where the number is that names what follows the IPv6 fragment header's predecessor, and that header itself.
    pub(crate) fragment_header: Option<(usize, usize)>,
    /// An IPv6 routing header that has segments left.
    pub(crate) is_source_routed: bool,
    /// How many extension headers there are.
    pub(crate) extensions: usize,
}

impl Located {
    /// Finds them. `None`: the headers are not all there.
    pub(crate) fn of(ip: &[u8]) -> Option<Self> {
        match ip.first()? >> 4 {
            4 => Self::of_ipv4(ip),
            6 => Self::of_ipv6(ip),
            _ => None,
        }
    }

    fn of_ipv4(ip: &[u8]) -> Option<Self> {
        let transport = usize::from(ip[0] & 15) * 4;
        let end = match usize::from(word(ip, 2)?) {
            // Of more than 64 KiB, and cut short by who quotes it.
            0 => ip.len(),
            length => length,
        };
        if transport < 20 || transport > end.min(ip.len()) {
            return None;
        }
        let field = word(ip, 6)?;
        let (offset, more) = (usize::from(field & 0x1fff) * 8, field & 0x2000 != 0);
        let piece = Piece { identification: word(ip, 4)?.into(), offset, more };
        Some(Self {
            v6: false,
            protocol: ip[9],
            transport,
            end: end.min(ip.len()),
            piece: (offset > 0 || more).then_some(piece),
            fragment_header: None,
            is_source_routed: false,
            extensions: 0,
        })
    }

    fn of_ipv6(ip: &[u8]) -> Option<Self> {
        let end = (40 + usize::from(word(ip, 4)?)).min(ip.len());
        let mut found = Self {
            v6: true,
            protocol: *ip.get(6)?,
            transport: 40,
            end,
            piece: None,
            fragment_header: None,
            is_source_routed: false,
            extensions: 0,
        };
        let mut number_at = 6;
        loop {
            let at = found.transport;
            let length = match found.protocol {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS => {
                    8 + 8 * usize::from(*ip.get(at + 1)?)
                }
                AUTHENTICATION => 8 + 4 * usize::from(*ip.get(at + 1)?),
                protocol::FRAGMENT => 8,
                _ => return (at <= ip.len()).then_some(found),
            };
            if found.protocol == protocol::ROUTING && *ip.get(at + 3)? != 0 {
                found.is_source_routed = true;
            }
            if found.protocol == protocol::FRAGMENT {
                let field = word(ip, at + 2)?;
                let identification = u32::from_be_bytes(*ip.get(at + 4..)?.first_chunk()?);
                let (offset, more) = (usize::from(field & 0xfff8), field & 1 != 0);
                found.piece = Some(Piece { identification, offset, more });
                found.fragment_header = Some((number_at, at));
            }
            found.extensions += 1;
            found.protocol = *ip.get(at)?;
            number_at = at;
            found.transport = at + length;
            if found.piece.is_some_and(|piece| piece.offset > 0) {
                return (found.transport <= ip.len()).then_some(found);
            }
        }
    }

    /// Whether the transport header is in this packet.
    pub(crate) fn has_transport(&self) -> bool {
        self.piece.is_none_or(|piece| piece.offset == 0)
    }

    /// Whether it is a part of a packet, not the whole.
    pub(crate) fn is_part(&self) -> bool {
        self.piece.is_some_and(|piece| piece.offset > 0 || piece.more)
    }

    /// Transport header and data.
    pub(crate) fn payload<'a>(&self, ip: &'a [u8]) -> &'a [u8] {
        ip.get(self.transport..self.end).unwrap_or_default()
    }

    /// Where the transport checksum that covers addresses is, if it is there. Of ICMP: none covers them.
    pub(crate) fn checksum_at(&self) -> Option<usize> {
        let at = self.transport + checksum_offset(self.protocol)?;
        (self.has_transport() && self.protocol != protocol::ICMP && at + 2 <= self.end).then_some(at)
    }
}

/// A word in network order.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Source and destination.
pub(crate) fn addresses(ip: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let at = |at: usize| -> Option<IpAddr> {
        Some(if ip[0] >> 4 == 4 {
            IpAddr::from(*ip.get(at..)?.first_chunk::<4>()?)
        } else {
            IpAddr::from(*ip.get(at..)?.first_chunk::<16>()?)
        })
    };
    let (source, destination) = if ip.first()? >> 4 == 4 { (12, 16) } else { (8, 24) };
    Some((at(source)?, at(destination)?))
}

/// The bytes of an address.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Where a protocol's checksum is in its header.
pub(crate) const fn checksum_offset(number: u8) -> Option<usize> {
    match number {
        protocol::TCP => Some(16),
        protocol::UDP | protocol::UDPLITE | protocol::DCCP => Some(6),
        protocol::ICMP | protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// The sum over a pseudo-header of both families (RFC 768, RFC 8200).
pub(crate) fn pseudo_header(source: IpAddr, destination: IpAddr, number: u8, length: usize) -> Checksum {
    let mut sum = Checksum::new();
    sum.add_bytes(&octets(source));
    sum.add_bytes(&octets(destination));
    sum.add_bytes(&u32::try_from(length).expect("a packet's length").to_be_bytes());
    sum.add_bytes(&[0, number]);
    sum
}

/// Writes the checksum of a whole transport header and data, of which UDP-Lite's covers `coverage` bytes.
pub(crate) fn seal(source: IpAddr, destination: IpAddr, number: u8, segment: &mut [u8]) {
    if number == protocol::SCTP && segment.len() >= 12 {
        segment[8..12].fill(0);
        let crc = SCTP_CRC.checksum(segment);
        // Lowest byte first (RFC 9260, appendix A).
        segment[8..12].copy_from_slice(&crc.to_le_bytes());
        return;
    }
    let Some(at) = checksum_offset(number) else { return };
    if segment.len() < at + 2 {
        return;
    }
    segment[at..at + 2].fill(0);
    let covered = match (number, word(segment, 4)) {
        (protocol::UDPLITE, Some(coverage @ 1..)) => usize::from(coverage).min(segment.len()),
        // The lowest four bits of the fifth byte say how much of the data (RFC 4340, section 9.2).
        _ => segment.len(),
    };
    let mut sum = match number {
        protocol::ICMP => Checksum::new(),
        _ => pseudo_header(source, destination, number, segment.len()),
    };
    sum.add_bytes(&segment[..covered]);
    let checksum = match sum.checksum() {
        [0, 0] if matches!(number, protocol::UDP | protocol::UDPLITE) => [0xff, 0xff],
        checksum => checksum,
    };
    segment[at..at + 2].copy_from_slice(&checksum);
}

/// Recomputes IPv4's header checksum.
pub(crate) fn seal_header(ip: &mut [u8]) {
    let length = usize::from(ip[0] & 15) * 4;
    if ip[0] >> 4 == 4 && length >= 20 && ip.len() >= length {
        ip[10..12].fill(0);
        let checksum = internet_checksum::checksum(&ip[..length]);
        ip[10..12].copy_from_slice(&checksum);
    }
}

/// An IP packet.
pub(crate) fn build(
    header: &Header,
    (source, destination): (IpAddr, IpAddr),
    number: u8,
    piece: Option<Piece>,
    payload: &[u8],
) -> Vec<u8> {
    let length = |bytes: usize| (u16::try_from(bytes).expect("no jumbograms")).to_be_bytes();
    let mut ip = Vec::new();
    if source.is_ipv4() {
        let words = u8::try_from(5 + header.options.len() / 4).expect("at most 40 bytes of options");
        ip.extend([0x40 | words, header.class]);
        ip.extend(length(usize::from(words) * 4 + payload.len()));
        let identification = piece.map_or(header.label, |piece| (piece.identification & 0xffff) as u16);
        ip.extend(identification.to_be_bytes());
        let flags = u16::from(header.dont_fragment) << 14
            | piece.map_or(0, |piece| u16::from(piece.more) << 13 | (piece.offset / 8) as u16);
        ip.extend(flags.to_be_bytes());
        ip.extend([header.hop_limit, number, 0, 0]);
        ip.extend(octets(source));
        ip.extend(octets(destination));
        ip.extend(&header.options);
        seal_header(&mut ip);
    } else {
        let mut headers = header.extensions.clone();
        if let Some(Piece { identification, offset, more }) = piece {
            let mut body = vec![0];
            body.extend((offset as u16 | u16::from(more)).to_be_bytes());
            body.extend(identification.to_be_bytes());
            headers.push((protocol::FRAGMENT, body));
        }
        let numbers: Vec<u8> = headers.iter().map(|(number, _)| *number).chain([number]).collect();
        let extensions: usize = headers.iter().map(|(_, body)| 1 + body.len()).sum();
        ip.extend((0x6000_0000 | u32::from(header.class) << 20 | u32::from(header.label)).to_be_bytes());
        ip.extend(length(extensions + payload.len()));
        ip.extend([numbers[0], header.hop_limit]);
        ip.extend(octets(source));
        ip.extend(octets(destination));
        for ((_, body), next) in headers.iter().zip(&numbers[1..]) {
            ip.push(*next);
            ip.extend(body);
        }
    }
    ip.extend(payload);
    ip
}

/// Whether the transport checksum of a whole packet is right.
pub(crate) fn has_right_checksum(ip: &[u8]) -> bool {
    let (Some(located), Some((source, destination))) = (Located::of(ip), addresses(ip)) else { return false };
    let mut segment = located.payload(ip).to_vec();
    seal(source, destination, located.protocol, &mut segment);
    segment == located.payload(ip)
}
