//! What a translation of addresses has to do, for the few cases in which netfilter does something else (`meant`). It is no
//! third opinion where netfilter has one. Checksums are brought up to date, not made anew: a wrong one stays as wrong.

use std::{net::IpAddr, ops::Range};

use proxier_tests::{
    packets::protocol,
    tap::{Frame, Offload},
};

use crate::{
    meant::Case,
    packet::{Located, addresses, octets, word},
    play::Cast,
    script::Side,
    world::{MTU_OF_CLIENT, MTU_OF_POD, Outcome},
};

/// A frame's VLAN tags.
fn tags(frame: &Frame) -> &[u8] {
    let rest = frame.bytes.get(12..).unwrap_or_default();
    let is_tag = |tag: &&[u8]| matches!(tag, [0x81, 0x00, ..] | [0x88, 0xa8, ..]);
    let count = rest.chunks_exact(4).take_while(is_tag).count();
    &rest[..4 * count]
}

/// Which of a packet's addresses is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Source,
    Destination,
}

impl Field {
    fn range(self, v6: bool) -> Range<usize> {
        match (v6, self) {
            (false, Self::Source) => 12..16,
            (false, Self::Destination) => 16..20,
            (true, Self::Source) => 8..24,
            (true, Self::Destination) => 24..40,
        }
    }
}

/// The IP packet in a frame, without tags and without what is behind its end.
pub(crate) fn ip_of(frame: &Frame) -> &[u8] {
    let ip = frame.bytes.get(12 + tags(frame).len() + 2..).unwrap_or_default();
    let end = match (Located::of(ip), ip.first().map(|byte| byte >> 4), word(ip, 4)) {
        (Some(located), ..) => located.end,
        (None, Some(6), Some(length)) => (40 + usize::from(length)).min(ip.len()),
        (None, ..) => ip.len(),
    };
    &ip[..end]
}

/// The packet with another address, and whatever checksums cover it.
pub(crate) fn translate(ip: &mut [u8], field: Field, new: IpAddr, offload: Offload) {
    let Some(located) = Located::of(ip) else { return };
    let range = field.range(located.v6);
    let (old, new) = (ip[range.clone()].to_vec(), octets(new));
    if let Some(at) = located.checksum_at() {
        let left_to_hardware = offload.flags & Offload::NEEDS_CHECKSUM != 0
            && usize::from(offload.checksum_start + offload.checksum_offset) == 14 + at;
        update(ip, at, located.protocol, &old, &new, left_to_hardware);
    }
    if !located.v6 {
        update(ip, 10, 0, &old, &new, false);
    }
    ip[range].copy_from_slice(&new);
}

fn update(ip: &mut [u8], at: usize, number: u8, old: &[u8], new: &[u8], left_to_hardware: bool) {
    let zero_means_none = matches!(number, protocol::UDP | protocol::UDPLITE);
    let field = [ip[at], ip[at + 1]];
    if zero_means_none && field == [0, 0] {
        return;
    }
    // What is left to hardware is a sum, not its complement.
    let invert = |[a, b]: [u8; 2]| if left_to_hardware { [!a, !b] } else { [a, b] };
    let updated = invert(internet_checksum::update(invert(field), old, new));
    let updated = if zero_means_none && updated == [0, 0] { [0xff, 0xff] } else { updated };
    ip[at..at + 2].copy_from_slice(&updated);
}

/// An ICMP error with another address of its own and another one in what it quotes.
pub(crate) fn translate_error(ip: &mut [u8], own: (Field, IpAddr), quoted: (Field, IpAddr)) {
    let Some(located) = Located::of(ip) else { return };
    let before = located.payload(ip).to_vec();
    if let Some(quote) = ip.get_mut(located.transport + 8..located.end) {
        translate(quote, quoted.0, quoted.1, Offload::default());
    }
    let after = located.payload(ip).to_vec();
    let at = located.transport + 2;
    // All but the checksum itself.
    let checksum = [ip[at], ip[at + 1]];
    let checksum = internet_checksum::update(checksum, &even(&before[4..]), &even(&after[4..]));
    ip[at..at + 2].copy_from_slice(&checksum);
    // Of IPv6 it covers the outer addresses as well.
    translate_own(ip, own);
}

/// An ICMP message with another address, and nothing else.
pub(crate) fn translate_own(ip: &mut [u8], (field, new): (Field, IpAddr)) {
    let Some(located) = Located::of(ip) else { return };
    let range = field.range(located.v6);
    let (old, new) = (ip[range.clone()].to_vec(), octets(new));
    if located.v6 {
        update(ip, located.transport + 2, protocol::ICMPV6, &old, &new, false);
    } else {
        update(ip, 10, 0, &old, &new, false);
    }
    ip[range].copy_from_slice(&new);
}

fn even(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    bytes
}

/// A frame as the node forwards it, which has the address `own` at its other interface: one hop less, and nothing of the
/// link around it.
pub(crate) fn forwarded(frame: &Frame, own: IpAddr) -> Option<Frame> {
    let mut ip = ip_of(frame).to_vec();
    if !is_accepted(frame) {
        return None;
    }
    // Of a VLAN that the node has no interface for.
    if tags(frame).chunks_exact(4).any(|tag| word(tag, 2).is_some_and(|control| control & 0xfff != 0)) {
        return None;
    }
    let v6 = ip.first()? >> 4 == 6;
    let at = if v6 { 7 } else { 8 };
    let old = [*ip.get(at)?, *ip.get(at + 1)?];
    // The last hop there is: the node makes an error of it.
    ip[at] = ip[at].checked_sub(1).filter(|left| *left > 0)?;
    if !v6 {
        let new = [ip[at], ip[at + 1]];
        update(&mut ip, 10, 0, &old, &new, false);
        write_options(&mut ip, &octets(own));
    }
    Some(Frame { bytes: [&frame.bytes[..12], &ether_type(v6), &ip].concat(), ..bare(frame) })
}

fn ether_type(v6: bool) -> [u8; 2] {
    if v6 { [0x86, 0xdd] } else { [0x08, 0x00] }
}

/// The frame without its tags and without what is behind the packet.
pub(crate) fn bare(frame: &Frame) -> Frame {
    let ip = ip_of(frame);
    let mut offload = frame.offload;
    if offload != Offload::default() {
        let tags = tags(frame).len() as u16;
        offload.checksum_start -= tags;
        offload.header_length = offload.header_length.saturating_sub(tags);
    }
    let v6 = ip.first().is_some_and(|byte| byte >> 4 == 6);
    Frame { bytes: [&frame.bytes[..12], &ether_type(v6), ip].concat(), offload, ..frame.clone() }
}

/// Whether any IP stack takes it: all of it is there, and the header's checksum is right.
pub(crate) fn is_accepted(frame: &Frame) -> bool {
    let ip = frame.bytes.get(12 + tags(frame).len() + 2..).unwrap_or_default();
    match ip.first().map(|byte| byte >> 4) {
        Some(4) => Located::of(ip).is_some_and(|located| {
            let length = usize::from(word(ip, 2).unwrap_or(0));
            let is_right = internet_checksum::checksum(&ip[..usize::from(ip[0] & 15) * 4]) == [0, 0];
            is_right && length <= ip.len() && length >= located.transport
        }),
        Some(6) => word(ip, 4).is_some_and(|length| {
            let length = usize::from(length);
            // Hop-by-hop options are every router's business.
            let is_read = match (ip.get(6), ip.get(41)) {
                (Some(&protocol::HOP_BY_HOP), Some(words)) => 8 + 8 * usize::from(*words) <= length,
                (number, _) => number != Some(&protocol::HOP_BY_HOP),
            };
            40 + length <= ip.len() && is_read
        }),
        _ => false,
    }
}

/// What a router writes into IPv4 options (RFC 791): its address where a route is recorded, and that there was no room for
/// a time stamp.
fn write_options(ip: &mut [u8], own: &[u8]) {
    let end = usize::from(ip[0] & 15) * 4;
    let before = ip[20..end].to_vec();
    let mut at = 20;
    while at < end {
        let (kind, length) = (ip[at], ip.get(at + 1).copied().map_or(0, usize::from));
        match kind {
            0 => break,
            1 => {
                at += 1;
                continue;
            }
            7 if usize::from(ip[at + 2]) + 3 <= length => {
                let place = at + usize::from(ip[at + 2]) - 1;
                ip[place..place + 4].copy_from_slice(own);
                ip[at + 2] += 4;
            }
            68 => ip[at + 3] += 0x10,
            _ => {}
        }
        at += length.max(2);
    }
    let after = ip[20..end].to_vec();
    update(ip, 10, 0, &before, &after, false);
}

/// Which conversation a packet belongs to: protocol, type of an ICMP query, the pod's port and the client's.
pub(crate) type Conversation = (u8, u8, u16, u16);

/// Of a packet that the client sends, or the pod; `None` if nothing is to come back for it, or it is no such packet.
pub(crate) fn conversation(ip: &[u8], from: Side) -> Option<Conversation> {
    let located = Located::of(ip).filter(Located::has_transport)?;
    let header = ip.get(located.transport..).unwrap_or_default();
    let number = located.protocol;
    let (query, pod_port, client_port) = match number {
        protocol::ICMP | protocol::ICMPV6 => {
            let query = match (number, from, *header.first()?) {
                (protocol::ICMP, Side::Client, kind @ (8 | 13 | 15 | 17))
                | (protocol::ICMPV6, Side::Client, kind @ (128 | 139)) => kind,
                (protocol::ICMP, Side::Pod, 0) => 8,
                (protocol::ICMP, Side::Pod, kind @ (14 | 16 | 18))
                | (protocol::ICMPV6, Side::Pod, kind @ (129 | 140)) => kind - 1,
                _ => return None,
            };
            (query, word(header, 4)?, 0)
        }
        number if has_ports(number) => match from {
            Side::Client => (0, word(header, 2)?, word(header, 0)?),
            Side::Pod => (0, word(header, 0)?, word(header, 2)?),
        },
        _ => (0, 0, 0),
    };
    Some((number, query, pod_port, client_port))
}

fn has_ports(number: u8) -> bool {
    matches!(number, protocol::TCP | protocol::UDP | protocol::UDPLITE | protocol::DCCP | protocol::SCTP)
}

/// Whether a packet is an ICMP error, by its type (IANA).
pub(crate) fn is_error(ip: &[u8]) -> bool {
    let Some(located) = Located::of(ip).filter(Located::has_transport) else { return false };
    match (located.protocol, ip.get(located.transport)) {
        (protocol::ICMP, Some(3 | 4 | 5 | 11 | 12)) => !located.v6,
        (protocol::ICMPV6, Some(1..=127)) => located.v6,
        _ => false,
    }
}

/// How much of a transport header must be there, of a whole packet and of a first fragment.
const fn needed(number: u8) -> (usize, usize) {
    match number {
        protocol::TCP => (20, 18),
        protocol::UDP | protocol::UDPLITE | protocol::ICMP | protocol::ICMPV6 => (8, 8),
        protocol::DCCP => (12, 8),
        protocol::SCTP => (12, 4),
        _ => (0, 0),
    }
}

/// Whether the packet's headers are what a NAT can work with: all there, and no source route that still leads elsewhere
/// (the checksum has another destination then, RFC 8200, section 8.1).
pub(crate) fn is_understood(ip: &[u8]) -> bool {
    let Some(located) = Located::of(ip) else { return false };
    let (whole, first) = needed(located.protocol);
    let needed = if located.is_part() { first } else { whole };
    let is_there = !located.has_transport() || located.payload(ip).len() >= needed;
    is_there && !located.is_source_routed && located.extensions <= 8
}

/// What comes out for a packet that the node has forwarded as it came; `None` if nothing should.
pub(crate) fn through(case: &Case<'_>, frame: &Frame) -> Option<Frame> {
    let Cast { client, external, pod, .. } = *case.cast;
    let mut ip = ip_of(frame).to_vec();
    let (source, destination) = addresses(&ip)?;
    match case.side {
        Side::Client if destination == external => {
            if !is_understood(&ip) {
                return None;
            }
            if is_error(&ip) {
                quoted(&ip, (external, client))
                    .and_then(|quote| conversation(quote, Side::Pod))
                    .filter(|conversation| case.known.contains(conversation))?;
                if is_redirect(&ip) {
                    return None;
                }
                translate_error(&mut ip, (Field::Destination, pod), (Field::Source, pod));
            } else {
                translate(&mut ip, Field::Destination, pod, frame.offload);
            }
        }
        Side::Client => {}
        Side::Pod if is_error(&ip) => {
            let quote = quoted(&ip, (client, pod));
            let about = quote.and_then(|quote| conversation(quote, Side::Client));
            if about.is_some_and(|conversation| case.known.contains(&conversation)) {
                if is_redirect(&ip) {
                    return None;
                }
                translate_error(&mut ip, (Field::Source, external), (Field::Destination, external));
            }
        }
        Side::Pod => {
            let about = conversation(&ip, Side::Pod).filter(|_| is_understood(&ip) && source == pod);
            if about.is_some_and(|conversation| case.known.contains(&conversation)) {
                translate(&mut ip, Field::Source, external, frame.offload);
            }
        }
    }
    towards(case, frame, &ip)
}

/// The packet on its last link.
fn towards(case: &Case<'_>, frame: &Frame, ip: &[u8]) -> Option<Frame> {
    let [client_mac, uplink_mac, pod_mac, link_mac] = case.cast.map.macs;
    let (from, to) = if case.side == Side::Client { (link_mac, pod_mac) } else { (uplink_mac, client_mac) };
    let ether_type = &frame.bytes[12..14];
    Some(Frame { bytes: [&to[..], &from, ether_type, ip].concat(), ..frame.clone() })
}

fn is_redirect(ip: &[u8]) -> bool {
    Located::of(ip).is_some_and(|located| !located.v6 && ip.get(located.transport) == Some(&5))
}

/// The packet that an error quotes, if the error is whole, quotes eight bytes behind all headers, and has these addresses.
fn quoted(ip: &[u8], between: (IpAddr, IpAddr)) -> Option<&[u8]> {
    let located = Located::of(ip).filter(|located| !located.is_part())?;
    let quote = ip.get(located.transport + 8..located.end)?;
    let inner = Located::of(quote).filter(|inner| inner.v6 == located.v6 && !inner.is_source_routed)?;
    let is_there = addresses(quote)? == between;
    // Of more than 64 KiB, and cut short.
    let is_big = inner.v6 && word(quote, 4) == Some(0);
    let end = if is_big { quote.len() } else { inner.end };
    let is_enough = !(has_ports(inner.protocol)
        || matches!(inner.protocol, protocol::ICMP | protocol::ICMPV6))
        || end - inner.transport >= 8;
    (is_there && is_enough).then_some(quote)
}

/// What comes out for what was sent, if all of it is forwarded.
pub(crate) fn outcome(case: &Case<'_>) -> Outcome {
    let is_part = |frame: &Frame| Located::of(ip_of(frame)).is_some_and(|located| located.is_part());
    let mut first = None;
    let own = case.cast.map.own_addresses[case.side as usize];
    let mtu = if case.side == Side::Client { MTU_OF_POD } else { MTU_OF_CLIENT };
    // An error that is too big is dropped, without another one about it (RFC 1122, RFC 4443).
    let is_dropped = |frame: &&Frame| {
        let ip = ip_of(frame);
        let may_be_cut =
            address(ip, Field::Source).is_some_and(|source| source.is_ipv4()) && ip[6] & 0x40 == 0;
        is_error(ip) && ip.len() > usize::from(mtu) && !may_be_cut
    };
    let frames = case
        .frames
        .iter()
        .filter(|frame| !is_dropped(frame))
        .filter_map(|frame| forwarded(frame, own))
        .filter_map(|frame| {
            let out = through(case, &frame);
            if case.side == Side::Client || !is_part(&frame) {
                return out;
            }
            // Pieces of a reply go the way of the first, once that has passed.
            let ip = ip_of(&frame).to_vec();
            if Located::of(&ip)?.has_transport() {
                // Of an error in pieces nobody sees the whole quote.
                let translated = out.filter(|_| !is_error(&ip)).and_then(|out| {
                    let source = address(ip_of(&out), Field::Source)?;
                    (source == case.cast.external).then_some(out)
                });
                first = translated.as_ref().map(|_| case.cast.external);
                return translated.or_else(|| towards(case, &frame, &ip));
            }
            let mut ip = ip;
            if let Some(external) = first {
                translate(&mut ip, Field::Source, external, frame.offload);
            }
            towards(case, &frame, &ip)
        });
    let frames = frames.collect();
    match case.side {
        Side::Client => Outcome { pod: frames, ..Outcome::default() },
        Side::Pod => Outcome { client: frames, ..Outcome::default() },
    }
}

/// Source or destination of a packet, if it has one.
pub(crate) fn address(ip: &[u8], field: Field) -> Option<IpAddr> {
    let (source, destination) = addresses(ip)?;
    Some(if field == Field::Source { source } else { destination })
}
