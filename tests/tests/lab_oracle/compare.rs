//! Compares what came out of the two worlds, byte for byte and with what is left to hardware. Before that, what differs from
//! one run to the next by nature is made equal; the list is short, and every line of it is here:
//!
//! * Fragments are put together. Connection tracking does so on the node and cuts anew, with other sizes, in order, without
//!   "don't fragment" and, of IPv6, with another identification. Headers of all pieces must agree, and a piece that comes
//!   twice counts once; pieces that are no whole packet are compared as they are.
//! * The IPv4 identification of ICMP errors that the node makes itself is random.
//! * That a checksum has been found right already is not told: it saves the receiver work and is no part of the packet.

use std::{collections::BTreeMap, fmt, fmt::Write as _};

use proxier_tests::{
    packets::protocol,
    tap::{Frame, Offload},
};

use crate::{
    meant::{Case, MEANT},
    model::{ip_of, is_accepted},
    packet::{Located, Piece, seal_header},
    script::{Side, Step},
    world::Outcome,
};

/// What has been compared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Packets that came out at either end.
    pub(crate) packets: u64,
    /// Frames that were sent.
    pub(crate) sent: u64,
    /// Steps that led to no packet in either world.
    pub(crate) silent: u64,
    /// How often each difference was one that is meant.
    pub(crate) meant: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.sent += other.sent;
        self.silent += other.silent;
        for (name, times) in &other.meant {
            *self.meant.entry(name).or_default() += times;
        }
    }
}

/// A difference that is not meant.
#[derive(Debug)]
pub(crate) struct Difference(String);

impl Difference {
    /// The worlds themselves do not work.
    pub(crate) fn broken(error: &anyhow::Error) -> Self {
        Self(format!("{error:#}"))
    }

    pub(crate) fn at(self, index: usize, step: &Step) -> Self {
        Self(format!("step {index}, {step:?}\n{}", self.0))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Compares, and counts.
pub(crate) fn judge(
    case: &Case<'_>,
    netfilter: &Outcome,
    proxier: &Outcome,
    tally: &mut Tally,
) -> Result<(), Difference> {
    let netfilter = normal(case.side, netfilter);
    let proxier = normal(case.side, proxier);
    let mut expected = netfilter.clone();
    let mut reasons = Vec::new();
    for meant in MEANT.iter().filter(|_| !netfilter.refused) {
        if let Some(corrected) = (meant.correct)(case, &expected) {
            let corrected = normal(case.side, &corrected);
            if corrected != expected {
                expected = corrected;
                reasons.push(meant.name);
            }
        }
    }
    let agree = expected.invalid.is_empty()
        && (&expected.pod, &expected.client, expected.refused)
            == (&proxier.pod, &proxier.client, proxier.refused);
    if !agree {
        return Err(Difference(describe(case, &netfilter, &expected, &proxier, &reasons)));
    }
    for reason in reasons {
        *tally.meant.entry(reason).or_default() += 1;
    }
    let packets = expected.pod.len() + expected.client.len();
    tally.packets += packets as u64;
    tally.sent += case.frames.len() as u64;
    tally.silent += u64::from(packets == 0);
    Ok(())
}

fn describe(
    case: &Case<'_>,
    netfilter: &Outcome,
    expected: &Outcome,
    proxier: &Outcome,
    reasons: &[&str],
) -> String {
    let mut text = format!("{:?} sends\n", case.side);
    list(&mut text, "", case.frames);
    for (who, outcome) in [("netfilter", netfilter), ("expected", expected), ("proxier", proxier)] {
        if who == "expected" && reasons.is_empty() {
            continue;
        }
        let note = if who == "expected" { format!(" ({})", reasons.join(", ")) } else { String::new() };
        let refused = if outcome.refused { ", refused" } else { "" };
        let _ = writeln!(text, "{who}{note}{refused}:");
        list(&mut text, "pod gets", &outcome.pod);
        list(&mut text, "client gets", &outcome.client);
        list(&mut text, "invalid", &outcome.invalid);
    }
    text
}

fn list(text: &mut String, what: &str, frames: &[Frame]) {
    for Frame { offload, tag, bytes } in frames {
        let hex: String = bytes.iter().take(300).map(|byte| format!("{byte:02x}")).collect();
        let _ = writeln!(text, "  {what} {hex} ({} bytes)", bytes.len());
        if *offload != Offload::default() || tag.is_some() {
            let _ = writeln!(text, "    {offload:?} {tag:?}");
        }
    }
}

/// The outcome without what may differ.
pub(crate) fn normal(near: Side, outcome: &Outcome) -> Outcome {
    let end = |frames: &[Frame], side: Side| -> Vec<Frame> {
        let known = |frame: &Frame| {
            let mut frame = frame.clone();
            frame.offload.flags &= Offload::NEEDS_CHECKSUM;
            if side == near {
                forget_identification(&mut frame.bytes);
            }
            frame
        };
        reassembled(frames.iter().map(known).collect())
    };
    Outcome {
        pod: end(&outcome.pod, Side::Pod),
        client: end(&outcome.client, Side::Client),
        invalid: reassembled(outcome.invalid.clone()),
        refused: outcome.refused,
    }
}

/// Of an IPv4 ICMP error.
fn forget_identification(frame: &mut [u8]) {
    let Some(ip) = frame.get_mut(14..) else { return };
    let is_error = Located::of(ip).is_some_and(|located| {
        let kind = ip.get(located.transport);
        !located.v6 && located.protocol == protocol::ICMP && matches!(kind, Some(3 | 11 | 12))
    });
    if is_error {
        ip[4..6].fill(0);
        seal_header(ip);
    }
}

/// A fragment, taken apart.
struct Fragment {
    piece: Piece,
    /// What is to be put together, which may begin with more extension headers.
    body: std::ops::Range<usize>,
    frame: Frame,
}

/// Fragments of one packet.
struct Set {
    common: Vec<u8>,
    fragments: Vec<Fragment>,
}

/// Puts fragments together that make a packet; a packet stands where its last piece stood.
pub(crate) fn reassembled(frames: Vec<Frame>) -> Vec<Frame> {
    let mut done: Vec<Frame> = Vec::new();
    let mut sets: Vec<Set> = Vec::new();
    let mut seen: Vec<Frame> = Vec::new();
    for frame in frames {
        let located = Located::of(ip_of(&frame)).filter(|_| is_accepted(&frame));
        let Some((located, piece)) = located.and_then(|located| Some((located, located.piece?))) else {
            done.push(frame);
            continue;
        };
        if seen.contains(&frame) {
            continue;
        }
        seen.push(frame.clone());
        let common = common(&frame, &located, piece);
        let body = located.fragment_header.map_or(located.transport, |(_, at)| at + 8)..located.end;
        let fragment = Fragment { piece, body, frame };
        let at = sets.iter().position(|set| set.common == common);
        let mut set = at.map_or(Set { common, fragments: Vec::new() }, |at| sets.remove(at));
        set.fragments.push(fragment);
        match whole(&mut set) {
            Some(packet) => done.push(packet),
            None => sets.push(set),
        }
    }
    done.extend(sets.into_iter().flat_map(|set| set.fragments).map(|fragment| fragment.frame));
    done
}

/// What all fragments of a packet have in common: the headers, but for lengths and place, and of IPv4 options and the checksum
/// over them.
fn common(frame: &Frame, located: &Located, piece: Piece) -> Vec<u8> {
    let ip = ip_of(frame);
    let link = &frame.bytes[..14];
    let identification = piece.identification.to_be_bytes();
    if let Some((_, at)) = located.fragment_header {
        [link, &ip[..4], &ip[6..=at], &identification].concat()
    } else {
        let reserved = [ip[6] & 0x80];
        [link, &ip[1..2], &reserved, &ip[8..10], &ip[12..20], &identification].concat()
    }
}

/// The packet that the fragments make, if they do.
fn whole(set: &mut Set) -> Option<Frame> {
    let fragments = &mut set.fragments;
    let end = |fragment: &Fragment| fragment.piece.offset + fragment.body.len();
    let total = fragments.iter().find(|fragment| !fragment.piece.more).map(end)?;
    if fragments.iter().map(|fragment| fragment.body.len()).sum::<usize>() != total {
        return None;
    }
    fragments.sort_by_key(|fragment| fragment.piece.offset);
    let mut payload: Vec<u8> = Vec::new();
    for fragment in fragments.iter() {
        if fragment.piece.offset != payload.len() {
            return None;
        }
        payload.extend(ip_of(&fragment.frame).get(fragment.body.clone())?);
    }
    let first = &fragments.first()?.frame;
    let ip = ip_of(first);
    let located = Located::of(ip)?;
    let mut packet;
    if let Some((number_at, header_at)) = located.fragment_header {
        packet = ip[..header_at].to_vec();
        packet[number_at] = ip[header_at];
        let length = packet.len() - 40 + payload.len();
        packet[4..6].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
    } else {
        packet = ip[..located.transport].to_vec();
        let length = packet.len() + payload.len();
        packet[2..4].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
        packet[6..8].fill(0);
        seal_header(&mut packet);
    }
    packet.extend(payload);
    Some(Frame { bytes: [&first.bytes[..14], &packet].concat(), ..first.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        frame::{self, Way},
        model,
        packet::seal,
        play::Cast,
        script::{Flaw, Order, Pieces, Script, Shape, Talk},
        world::Map,
    };

    fn cast(v6: bool) -> Cast {
        let of = |v4: &str, v6_address: &str| (if v6 { v6_address } else { v4 }).parse().unwrap();
        let (external, pod) = (of("10.0.0.55", "1000::55"), of("11.0.2.2", "1100::202"));
        let map = Map {
            externals: [external; 2],
            pods: [pod; 2],
            macs: [[2; 6], [4; 6], [6; 6], [8; 6]],
            own_addresses: [of("192.168.1.1", "fd00::1"); 3],
        };
        let (router, stranger) = (of("198.51.100.7", "fd00:9::7"), of("198.51.100.8", "fd00:9::8"));
        Cast { client: of("100.64.0.1", "fd00:2::1"), external, pod, router, stranger, map }
    }

    /// A request, and what a NAT makes of it.
    fn with_request(v6: bool, shape: Shape, test: impl Fn(&Case<'_>, Outcome)) {
        let cast = cast(v6);
        let way = Way {
            from_mac: cast.map.macs[0],
            to_mac: cast.map.macs[1],
            source: cast.client,
            destination: cast.external,
            identification: 7,
        };
        let mut segment = [&[0x9c, 0x40, 0x01, 0xbb, 0, 58, 0, 0][..], &[0xa5; 50]].concat();
        seal(way.source, way.destination, protocol::UDP, &mut segment);
        let frames = frame::of_shape(&shape, &way, protocol::UDP, segment);
        let script = Script { v6, talk: Talk::Udp, client_port: 40_000, pod_port: 443, steps: Vec::new() };
        let step = Step::Request(shape);
        let case = Case {
            script: &script,
            step: &step,
            side: Side::Client,
            frames: &frames,
            cast: &cast,
            known: &[],
        };
        test(&case, model::outcome(&case));
    }

    fn agree(case: &Case<'_>, netfilter: &Outcome, proxier: &Outcome) -> bool {
        judge(case, netfilter, proxier, &mut Tally::default()).is_ok()
    }

    #[test]
    fn any_byte_that_differs_is_found() {
        for v6 in [false, true] {
            with_request(v6, Shape::default(), |case, right| {
                assert!(agree(case, &right, &right));
                for at in 0..right.pod[0].bytes.len() {
                    let mut wrong = right.clone();
                    wrong.pod[0].bytes[at] ^= 0x10;
                    assert!(!agree(case, &right, &wrong), "byte {at}");
                    assert!(!agree(case, &wrong, &right), "byte {at} of netfilter's");
                }
            });
        }
    }

    #[test]
    fn a_packet_too_few_too_many_or_elsewhere_is_found() {
        with_request(false, Shape::default(), |case, right| {
            let again =
                Outcome { pod: [right.pod.clone(), right.pod.clone()].concat(), ..Outcome::default() };
            let back = Outcome { client: right.pod.clone(), ..Outcome::default() };
            for wrong in [Outcome::default(), again, back] {
                assert!(!agree(case, &right, &wrong), "{wrong:?}");
            }
        });
    }

    #[test]
    fn what_is_left_to_hardware_belongs_to_the_packet() {
        with_request(false, Shape::default(), |case, right| {
            let mut wrong = right.clone();
            wrong.pod[0].offload.flags = Offload::NEEDS_CHECKSUM;
            assert!(!agree(case, &right, &wrong));
            let mut same = right.clone();
            same.pod[0].offload.flags = 2;
            assert!(agree(case, &right, &same), "that a checksum was found right is no part of the packet");
        });
    }

    #[test]
    fn what_connection_tracking_finds_invalid_is_no_excuse() {
        with_request(false, Shape::default(), |case, right| {
            let invalid = case.frames.iter().filter_map(|frame| model::forwarded(frame, case.cast.router));
            let netfilter = Outcome { invalid: invalid.collect(), ..Outcome::default() };
            assert!(agree(case, &netfilter, &right), "it must be translated all the same");
            assert!(!agree(case, &netfilter, &Outcome::default()));
            let mut wrong = right.clone();
            wrong.pod[0].bytes[50] ^= 1;
            assert!(!agree(case, &netfilter, &wrong));
        });
    }

    #[test]
    fn fragments_are_compared_as_the_packet_that_they_make() {
        for v6 in [false, true] {
            let whole = model_of(v6, Pieces::Whole);
            for order in [Order::Forward, Order::Backward, Order::Halves] {
                let cut = |size| model_of(v6, Pieces::Cut { size, order, flaw: Flaw::Nothing });
                assert_eq!(cut(16).pod.len(), 4);
                assert_eq!(normal(Side::Client, &cut(16)), normal(Side::Client, &cut(40)));
                assert_eq!(normal(Side::Client, &cut(16)).pod.len(), 1);
                // But for the identification, which IPv4 has in every packet.
                if v6 {
                    assert_eq!(normal(Side::Client, &cut(16)), normal(Side::Client, &whole));
                }
                for piece in 0..4 {
                    for at in 0..cut(16).pod[piece].bytes.len() {
                        let mut wrong = cut(16);
                        wrong.pod[piece].bytes[at] ^= 0x10;
                        let is_free = is_forgotten(v6, at);
                        let is_same = normal(Side::Client, &wrong) == normal(Side::Client, &cut(16));
                        assert!(!is_same || is_free, "byte {at} of piece {piece}, v6 {v6}");
                    }
                }
                let mut missing = cut(16);
                missing.pod.remove(2);
                assert_eq!(normal(Side::Client, &missing).pod.len(), 3, "as they are");
            }
        }
    }

    fn model_of(v6: bool, pieces: Pieces) -> Outcome {
        let outcome = std::cell::RefCell::new(Outcome::default());
        with_request(v6, Shape { pieces, ..Shape::default() }, |_, right| *outcome.borrow_mut() = right);
        outcome.into_inner()
    }

    /// The reserved byte of IPv6's fragment header, which goes with it.
    const fn is_forgotten(v6: bool, at: usize) -> bool {
        v6 && at == 55
    }
}
