//! A packet as somebody reads it who does not know the packet core: where its addresses and checksums are, and which
//! conversation it belongs to.

use std::ops::Range;

use super::common::{DCCP, ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};

/// An IP packet in a frame, or quoted by an ICMP error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wire {
    pub v6: bool,
    /// Offset of the network header.
    pub start: usize,
    /// Whether an ICMP error quotes it.
    pub quoted: bool,
    /// What is behind the fixed header; `None` if that cannot be told.
    pub body: Option<Body>,
}

/// What is behind the network header and its extension headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// Offset of the transport header.
    pub start: usize,
    /// Offset behind the IP packet.
    pub end: usize,
    pub protocol: u8,
    pub piece: Piece,
    pub identification: u32,
}

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    Whole,
    First,
    Later,
}

/// What tells two conversations of the same parties apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Topic {
    pub protocol: u8,
    /// The ports as sent, source first; of an ICMP query or its answer the identifier twice.
    pub ports: [[u8; 2]; 2],
    /// Type of the ICMP query, or of the one that is answered; else 0.
    pub query: u8,
    /// Whether it is the answer to a query.
    pub answers: bool,
}

impl Topic {
    /// Of the packet that answers one of this topic, or is answered by it.
    #[must_use]
    pub fn reversed(self) -> Self {
        let [source, destination] = self.ports;
        Self { ports: [destination, source], answers: self.query != 0 && !self.answers, ..self }
    }

    /// Whether a request may be about it.
    pub fn asks(&self) -> bool {
        !self.answers
    }

    /// Whether a reply may be about it.
    pub fn replies(&self) -> bool {
        self.answers || self.query == 0
    }
}

impl Wire {
    /// The packet in an Ethernet frame; `None` if there is none, or less than its fixed header.
    pub fn in_frame(bytes: &[u8]) -> Option<Self> {
        let mut at = 12;
        // Two tags at most.
        for _ in 0..3 {
            let kind = bytes.get(at..at + 2)?;
            at += 2;
            match kind {
                [0x08, 0x00] => return Self::at(bytes, at, bytes.len(), false, false),
                [0x86, 0xdd] => return Self::at(bytes, at, bytes.len(), true, false),
                [0x81, 0x00] | [0x88, 0xa8] => at += 2,
                _ => return None,
            }
        }
        None
    }

    /// The packet that this one quotes, if it is an ICMP error.
    pub fn quote(&self, bytes: &[u8]) -> Option<Self> {
        let body = self.body.as_ref().filter(|_| self.is_error(bytes))?;
        if body.piece != Piece::Whole {
            return None;
        }
        Self::at(bytes, body.start + 8, body.end, self.v6, true)
    }

    /// Whether it is an ICMP error of its family, so that it quotes another packet (RFC 792, RFC 4443).
    pub fn is_error(&self, bytes: &[u8]) -> bool {
        self.icmp_type(bytes).is_some_and(|icmp_type| {
            if self.v6 { (1..128).contains(&icmp_type) } else { matches!(icmp_type, 3 | 4 | 5 | 11 | 12) }
        })
    }

    /// Whether it is an ICMP redirect (RFC 792).
    pub fn is_redirect(&self, bytes: &[u8]) -> bool {
        !self.v6 && self.icmp_type(bytes) == Some(5)
    }

    /// Whether the transport header is there: all of it, of a first fragment as far as ports and checksum reach, of a quote
    /// what every error quotes.
    pub fn has_header(&self) -> bool {
        let Some(body) = self.body.as_ref().filter(|body| body.piece != Piece::Later) else { return false };
        let (whole, first) = match body.protocol {
            TCP => (20, 18),
            UDP | UDPLITE => (8, 8),
            ICMP | ICMPV6 if self.is_own_icmp() => (8, 8),
            DCCP => (12, 8),
            SCTP => (12, 4),
            _ => (0, 0),
        };
        let enough = match body.piece {
            _ if self.quoted => whole.min(8),
            Piece::Whole => whole,
            Piece::First | Piece::Later => first,
        };
        body.end - body.start >= enough
    }

    /// Whether it is about this link only (RFC 4861).
    pub fn is_neighbour_discovery(&self, bytes: &[u8]) -> bool {
        self.v6 && self.icmp_type(bytes).is_some_and(|kind| (133..138).contains(&kind))
    }

    /// The address that a redirect of neighbour discovery gives advice about (RFC 4861, section 4.5).
    pub fn advised(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let start = self.body.as_ref()?.start + 24;
        (self.v6 && self.icmp_type(bytes) == Some(137) && bytes.len() >= start + 16)
            .then_some(start..start + 16)
    }

    /// Whether it is ICMP of its own family; the other's is a protocol as any.
    pub fn is_own_icmp(&self) -> bool {
        self.body.as_ref().is_some_and(|body| body.protocol == if self.v6 { ICMPV6 } else { ICMP })
    }

    fn icmp_type(&self, bytes: &[u8]) -> Option<u8> {
        self.first_byte(bytes).filter(|_| self.is_own_icmp())
    }

    fn first_byte(&self, bytes: &[u8]) -> Option<u8> {
        let body = self.body.as_ref().filter(|_| self.has_header())?;
        bytes[..body.end].get(body.start).copied()
    }

    /// Where the source address is.
    pub fn source(&self) -> Range<usize> {
        if self.v6 { self.start + 8..self.start + 24 } else { self.start + 12..self.start + 16 }
    }

    /// Where the destination address is.
    pub fn destination(&self) -> Range<usize> {
        if self.v6 { self.start + 24..self.start + 40 } else { self.start + 16..self.start + 20 }
    }

    /// What it is about; `None` of a packet that opens or continues no conversation.
    pub fn topic(&self, bytes: &[u8]) -> Option<Topic> {
        let body = self.body.as_ref().filter(|_| self.has_header())?;
        let protocol = body.protocol;
        let head = bytes[..body.end].get(body.start..body.start + 8);
        let topic = |ports, query, answers| Some(Topic { protocol, ports, query, answers });
        match protocol {
            TCP | UDP | UDPLITE | SCTP | DCCP => {
                let head = bytes[..body.end].get(body.start..body.start + 4)?;
                topic([[head[0], head[1]], [head[2], head[3]]], 0, false)
            }
            ICMP | ICMPV6 if self.is_own_icmp() => {
                let head = head?;
                let identifier = [[head[4], head[5]]; 2];
                let kinds: &[(u8, u8)] = if protocol == ICMP {
                    &[(8, 0), (13, 14), (15, 16), (17, 18)]
                } else {
                    &[(128, 129), (139, 140)]
                };
                let &(query, answer) =
                    kinds.iter().find(|&&(query, answer)| head[0] == query || head[0] == answer)?;
                topic(identifier, query, head[0] == answer)
            }
            _ => topic([[0; 2]; 2], 0, false),
        }
    }

    /// The flags of a TCP header; 0 of anything else.
    pub fn tcp_flags(&self, bytes: &[u8]) -> u8 {
        match &self.body {
            Some(body) if body.protocol == TCP && body.piece != Piece::Later => {
                bytes[..body.end].get(body.start + 13).copied().unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// The packet at `start`, in front of `limit`; one that is quoted may be cut short there.
    fn at(bytes: &[u8], start: usize, limit: usize, v6: bool, quoted: bool) -> Option<Self> {
        let bytes = &bytes[..limit];
        let fixed = bytes.get(start..start + if v6 { 40 } else { 20 })?;
        let well_formed = if v6 {
            const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
            fixed[0] >> 4 == 6 && fixed[8..20] != MAPPED && fixed[24..36] != MAPPED
        } else {
            fixed[0] >> 4 == 4 && fixed[0] & 15 >= 5
        };
        let body = || {
            let length =
                usize::from(u16::from_be_bytes(if v6 { [fixed[4], fixed[5]] } else { [fixed[2], fixed[3]] }));
            let counted_from = start + if v6 { 40 } else { 0 };
            // None at all: more than 64 KiB (BIG TCP), where the packet is that long, or was.
            let end = match length {
                0 if quoted || limit > counted_from + 0xffff => limit,
                _ => counted_from + length,
            };
            let end = if quoted { end.min(limit) } else { end };
            let body = bytes.get(..end).and_then(|packet| {
                if v6 { Body::behind_v6(packet, start) } else { Body::behind_v4(packet, start) }
            })?;
            (body.start <= body.end).then_some(body)
        };
        well_formed.then(|| Self { v6, start, quoted, body: body() })
    }
}

impl Body {
    fn behind_v4(packet: &[u8], start: usize) -> Option<Self> {
        let header = packet.get(start..start + 20)?;
        let field = u16::from_be_bytes([header[6], header[7]]);
        let piece = Piece::of(field & 0x1fff != 0, field & 0x2000 != 0);
        let identification = u16::from_be_bytes([header[4], header[5]]).into();
        let start = start + usize::from(header[0] & 15) * 4;
        Some(Self { start, end: packet.len(), protocol: header[9], piece, identification })
    }

    /// Walks eight extension headers at most.
    fn behind_v6(packet: &[u8], start: usize) -> Option<Self> {
        let mut body = Self {
            start: start + 40,
            end: packet.len(),
            protocol: *packet.get(start + 6)?,
            piece: Piece::Whole,
            identification: 0,
        };
        let mut walked = 0;
        while matches!(body.protocol, 0 | 43 | 44 | 51 | 60) && body.piece != Piece::Later {
            let head = packet.get(body.start..body.start + 8)?;
            let length = match body.protocol {
                44 => {
                    let field = u16::from_be_bytes([head[2], head[3]]);
                    body.piece = Piece::of(field & 0xfff8 != 0, field & 1 != 0);
                    body.identification = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
                    8
                }
                51 => (usize::from(head[1]) + 2) * 4,
                // Somebody on the way is yet to put the final destination in its place.
                43 if head[3] != 0 => return None,
                _ => (usize::from(head[1]) + 1) * 8,
            };
            walked += 1;
            if walked > 8 {
                return None;
            }
            body.start += length;
            body.protocol = head[0];
        }
        Some(body)
    }
}

impl Piece {
    fn of(later: bool, more: bool) -> Self {
        match (later, more) {
            (true, _) => Self::Later,
            (false, true) => Self::First,
            (false, false) => Self::Whole,
        }
    }
}

/// What the receiver sends back who reflects all it gets: addresses and ports exchanged, a query made its answer and the
/// reverse. Checksums stay, of ICMP the wrong by what the type has changed.
pub fn reflected(bytes: &[u8]) -> Option<Vec<u8>> {
    let wire = Wire::in_frame(bytes)?;
    let topic = wire.topic(bytes)?;
    let start = wire.body.as_ref()?.start;
    let mut reflected = bytes.to_vec();
    reflected[wire.source()].copy_from_slice(&bytes[wire.destination()]);
    reflected[wire.destination()].copy_from_slice(&bytes[wire.source()]);
    if topic.query != 0 {
        reflected[start] = match (topic.answers, topic.query) {
            (true, query) => query,
            (false, 8) => 0,
            (false, query) => query + 1,
        };
    } else if matches!(topic.protocol, TCP | UDP | UDPLITE | SCTP | DCCP) {
        reflected[start..start + 4].rotate_left(2);
    }
    Some(reflected)
}
