//! From a shape to frames: spoiled, cut into pieces, tagged, with what is left to hardware.

use std::net::IpAddr;

use proxier_tests::{
    packets::protocol,
    tap::{Frame, Offload},
};

use crate::{
    packet::{Located, Piece, build, checksum_offset, pseudo_header, seal, seal_header, word},
    script::{ErrorShape, Flaw, Header, Link, Offloaded, Order, Pieces, Shape, Spoil},
};

/// Where a packet goes: on the link and above.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) from_mac: [u8; 6],
    pub(crate) to_mac: [u8; 6],
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// What the fragments of the packet have in common, if there are any.
    pub(crate) identification: u32,
}

/// All of a shape but its transport header.
struct Wrapping<'a> {
    header: &'a Header,
    spoil: Spoil,
    pieces: Pieces,
    link: &'a Link,
    offload: Offloaded,
}

/// The frames of an ordinary packet, whose transport header and data are `segment`, with the right checksum.
pub(crate) fn of_shape(shape: &Shape, way: &Way, number: u8, segment: Vec<u8>) -> Vec<Frame> {
    let Shape { header, spoil, pieces, link, offload, .. } = shape;
    Wrapping { header, spoil: *spoil, pieces: *pieces, link, offload: *offload }.frames(way, number, segment)
}

/// The frames of an ICMP error.
pub(crate) fn of_error(shape: &ErrorShape, way: &Way, number: u8, segment: Vec<u8>) -> Vec<Frame> {
    let ErrorShape { header, spoil, pieces, link, .. } = shape;
    let wrapping = Wrapping { header, spoil: *spoil, pieces: *pieces, link, offload: Offloaded::Nothing };
    wrapping.frames(way, number, segment)
}

impl Wrapping<'_> {
    fn frames(&self, way: &Way, number: u8, mut segment: Vec<u8>) -> Vec<Frame> {
        spoil_segment(self.spoil, number, &mut segment);
        let header = Header { hop_limit: self.header.hop_limit, ..self.header.clone() };
        let addresses = (way.source, way.destination);
        let identification = way.identification;
        let ip = |piece, payload: &[u8]| build(&header, addresses, number, piece, payload);
        let packets: Vec<Vec<u8>> = match self.pieces {
            Pieces::Atomic if way.source.is_ipv6() => {
                vec![ip(Some(Piece { identification, offset: 0, more: false }), &segment)]
            }
            Pieces::Cut { size, order, flaw } if segment.len() > usize::from(size) => {
                let cut = |(range, more): (std::ops::Range<usize>, bool)| {
                    let piece = Piece { identification, offset: range.start, more };
                    ip(Some(piece), &segment[range])
                };
                arranged(segment.len(), size.into(), order, flaw).into_iter().map(cut).collect()
            }
            _ => {
                let offload = self.leave_to_hardware(way, number, &mut segment);
                let packet = ip(None, &segment);
                return vec![self.frame(way, packet, offload)];
            }
        };
        packets.into_iter().map(|packet| self.frame(way, packet, None)).collect()
    }

    /// Where the checksum is from the transport header on, and what else is left to do. The field then has what the kernel
    /// puts there in such a case.
    fn leave_to_hardware(&self, way: &Way, number: u8, segment: &mut [u8]) -> Option<(usize, Offload)> {
        let at = checksum_offset(number).filter(|at| segment.len() >= at + 2)?;
        let offload = |start: usize, at: usize| Offload {
            flags: Offload::NEEDS_CHECKSUM,
            checksum_start: start as u16,
            checksum_offset: at as u16,
            ..Offload::default()
        };
        if !matches!(number, protocol::TCP | protocol::UDP) {
            return None;
        }
        let partial = |source, destination, length| {
            let [a, b] = pseudo_header(source, destination, number, length).checksum();
            [!a, !b]
        };
        match self.offload {
            Offloaded::Checksum | Offloaded::Segments(_) => {
                let sum = partial(way.source, way.destination, segment.len());
                segment[at..at + 2].copy_from_slice(&sum);
                let mut offload = offload(0, at);
                if let Offloaded::Segments(size) = self.offload {
                    let header = if number == protocol::TCP { usize::from(segment[12] >> 4) * 4 } else { 8 };
                    if segment.len() > header + usize::from(size) {
                        offload.kind = match (number, way.source.is_ipv4()) {
                            (protocol::UDP, _) => Offload::UDP,
                            (_, true) => Offload::TCP_V4,
                            (_, false) => Offload::TCP_V6,
                        };
                        offload.segment_size = size;
                        offload.header_length = header as u16;
                    }
                }
                Some((0, offload))
            }
            // The inner datagram's header is the first eight bytes of the data; its addresses are anybody's.
            Offloaded::InnerChecksum if number == protocol::UDP && segment.len() >= 16 => {
                let length = segment.len() - 8;
                segment[12..14].copy_from_slice(&(length as u16).to_be_bytes());
                let (source, destination) = (way.destination, way.source);
                seal(source, destination, protocol::UDP, &mut segment[8..]);
                // Complete with the inner one complete, which it is not yet.
                seal(way.source, way.destination, protocol::UDP, segment);
                segment[14..16].copy_from_slice(&partial(source, destination, length));
                Some((8, offload(8, 6)))
            }
            Offloaded::Nothing | Offloaded::InnerChecksum => None,
        }
    }

    fn frame(&self, way: &Way, mut packet: Vec<u8>, offload: Option<(usize, Offload)>) -> Frame {
        spoil_packet(self.spoil, &mut packet);
        let transport = Located::of(&packet).map_or(0, |located| located.transport);
        let mut bytes = [way.to_mac, way.from_mac].concat();
        for (tag_protocol, control) in &self.link.tags {
            bytes.extend(tag_protocol.to_be_bytes());
            bytes.extend(control.to_be_bytes());
        }
        bytes.extend(if way.source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        let transport = (bytes.len() + transport) as u16;
        bytes.extend(packet);
        match self.spoil {
            Spoil::Frame(missing) => {
                let rest = bytes.len().saturating_sub(missing.into());
                bytes.truncate(rest.max(15));
            }
            _ if offload.is_none() => bytes.resize(bytes.len() + usize::from(self.link.padding), 0),
            _ => {}
        }
        let offload = offload.map_or(Offload::default(), |(_, mut offload)| {
            offload.checksum_start += transport;
            if offload.kind != 0 {
                offload.header_length += transport;
            }
            offload
        });
        Frame { offload, tag: None, bytes }
    }
}

fn spoil_segment(spoil: Spoil, number: u8, segment: &mut Vec<u8>) {
    let at = if number == protocol::SCTP { Some(8) } else { checksum_offset(number) };
    match (spoil, at.filter(|at| at + 2 <= segment.len())) {
        (Spoil::Checksum(bits), Some(at)) => {
            segment[at] ^= (bits >> 8) as u8;
            segment[at + 1] ^= (bits & 0xff) as u8;
        }
        (Spoil::NoChecksum, Some(at)) => segment[at..at + 2].fill(0),
        (Spoil::Cut(length), _) => segment.truncate(length.into()),
        (Spoil::Flip(at, bits), _) if !segment.is_empty() => {
            let at = usize::from(at) % segment.len();
            segment[at] ^= bits;
        }
        _ => {}
    }
}

fn spoil_packet(spoil: Spoil, packet: &mut [u8]) {
    let v4 = packet[0] >> 4 == 4;
    match spoil {
        Spoil::Length(by) => {
            let at = if v4 { 2 } else { 4 };
            let length = word(packet, at).unwrap_or(0).wrapping_add_signed(by.into());
            // With hop-by-hop options it would be a jumbogram, without saying how long (RFC 2675, section 3: an error).
            let is_jumbogram = !v4 && length == 0 && packet[6] == protocol::HOP_BY_HOP;
            let length = if is_jumbogram { 1 } else { length };
            packet[at..at + 2].copy_from_slice(&length.to_be_bytes());
            if v4 {
                seal_header(packet);
            }
        }
        Spoil::HeaderChecksum if v4 => packet[10] ^= 0x55,
        _ => {}
    }
}

/// Which bytes each fragment has and whether more follow, in the order in which they are sent.
fn arranged(total: usize, size: usize, order: Order, flaw: Flaw) -> Vec<(std::ops::Range<usize>, bool)> {
    let size = (size / 8 * 8).max(8);
    let mut pieces: Vec<_> = (0..total)
        .step_by(size)
        .map(|start| (start..(start + size).min(total), start + size < total))
        .collect();
    let count = pieces.len();
    match flaw {
        Flaw::Nothing => {}
        Flaw::Missing(index) => drop(pieces.remove(usize::from(index) % count)),
        Flaw::Twice(index) => {
            let index = usize::from(index) % count;
            let again = pieces[index].clone();
            pieces.insert(index, again);
        }
        Flaw::Overlap(index) => {
            let piece = &mut pieces[usize::from(index) % count].0;
            piece.start = piece.start.saturating_sub(8);
        }
    }
    match order {
        Order::Forward => {}
        Order::Backward => pieces.reverse(),
        Order::Halves => {
            let half = pieces.len() / 2;
            pieces.rotate_left(half);
        }
    }
    pieces
}
