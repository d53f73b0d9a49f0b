//! The differences between netfilter's NAT and proxier that are meant, all of them, each with its reason. An entry says what
//! should have come out instead of what did from netfilter's node, exactly: what proxier does is then compared with that. An
//! entry that nothing needs any more fails the test.
//!
//! Three settings put both on equal terms, where connection tracking is strict by policy and not for its NAT
//! (`world`): `nf_conntrack_checksum=0`, or packets with wrong checksums would not be translated (proxier leaves them as wrong as
//! they are, and the receiver notices); `nf_conntrack_tcp_be_liberal=1`, or segments outside the window would not be; and
//! `nf_conntrack_tcp_loose=1`, the usual, by which a connection may be met in its middle.
//!
//! What the comparison passes over, on either side, is listed in `compare`; what no script does, where two answers would both
//! be right, stands in `generator` and `play` at the place.

use proxier_tests::{
    packets::protocol,
    tap::{Frame, Offload},
};

use crate::{
    compare::reassembled,
    model::{
        self, Conversation, Field, bare, ip_of, is_accepted, is_error, is_understood, through, translate_own,
    },
    packet::{Located, has_right_checksum, word},
    play::Cast,
    script::{Offloaded, Script, Side, Step, Talk},
    world::Outcome,
};

/// What was sent, and when.
pub(crate) struct Case<'a> {
    pub(crate) script: &'a Script,
    pub(crate) step: &'a Step,
    pub(crate) side: Side,
    pub(crate) frames: &'a [Frame],
    pub(crate) cast: &'a Cast,
    /// Conversations that the client has begun.
    pub(crate) known: &'a [Conversation],
}

/// A difference that is meant.
pub(crate) struct Meant {
    pub(crate) name: &'static str,
    pub(crate) reason: &'static str,
    /// What should come out; `None` if this is not about such a case.
    pub(crate) correct: fn(&Case<'_>, &Outcome) -> Option<Outcome>,
}

/// All of them.
pub(crate) const MEANT: &[Meant] = &[
    Meant {
        name: "invalid to connection tracking",
        reason: "What connection tracking finds invalid its NAT leaves alone, and it goes back and forth between node and \
            router. proxier tracks no states: what it can read it translates, what it cannot read it drops (decision 005).",
        correct: |case, netfilter| {
            if netfilter.invalid.is_empty() {
                return None;
            }
            // Each fragment on its own: nobody has looked at the whole.
            if case.frames.iter().filter_map(located).any(|located| located.is_part()) {
                return Some(model::outcome(case));
            }
            let invalid: Vec<Frame> =
                netfilter.invalid.iter().filter_map(|frame| through(case, frame)).collect();
            let mut outcome = Outcome { invalid: Vec::new(), ..netfilter.clone() };
            match case.side {
                Side::Client => outcome.pod.extend(invalid),
                Side::Pod => outcome.client.extend(invalid),
            }
            Some(outcome)
        },
    },
    Meant {
        name: "source route with segments left",
        reason: "The checksum has another destination than the header (RFC 8200, section 8.1): netfilter, which changes both by \
            the same, breaks it for its final destination. Source routes are dropped (decision 005).",
        correct: |case, _| {
            let is_routed = |frame: &Frame| located(frame).is_some_and(|located| located.is_source_routed);
            case.frames.iter().any(is_routed).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "packet that ends within its extension headers",
        reason: "netfilter translates it if it knows no more of the protocol than its number. To proxier it is broken: for an \
            external address it is dropped, from a pod it is left alone (decision 005).",
        correct: |case, netfilter| {
            let is_cut = |frame: &Frame| located(frame).is_none() && is_accepted(frame);
            (case.frames.iter().any(is_cut) && !is_answered(case, netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "more than eight extension headers",
        reason: "The verifier bounds the walk. The specification knows six, each of them once but one (RFC 8200, section 4.1).",
        correct: |case, _| {
            let is_long = |frame: &Frame| located(frame).is_some_and(|located| located.extensions > 8);
            case.frames.iter().any(is_long).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "the node's error about an invalid packet",
        reason: "It leaves from the external address, as every error about a packet for it does: that is the host that the client \
            speaks to. netfilter, which has not translated the packet, does not translate the error either; the same with an \
            error that IPv6 makes before its NAT. About what proxier drops there is none.",
        correct: |case, netfilter| {
            let is_own = |frame: &Frame| {
                let ip = ip_of(frame);
                let source = model::address(ip, Field::Source);
                let about = quote_of(ip).and_then(|quote| model::address(quote, Field::Destination));
                is_error(ip)
                    && source.is_some_and(|source| case.cast.map.own_addresses.contains(&source))
                    && about == Some(case.cast.external)
            };
            if case.side == Side::Pod || !netfilter.client.iter().any(is_own) {
                return None;
            }
            let is_understood = sent(case).iter().all(|frame| is_understood(ip_of(frame)));
            let corrected = |frame: &Frame| {
                let mut frame = frame.clone();
                if is_own(&frame) {
                    translate_own(&mut frame.bytes[14..], (Field::Source, case.cast.external));
                    return is_understood.then_some(frame);
                }
                Some(frame)
            };
            let client = netfilter.client.iter().filter_map(corrected).collect();
            Some(Outcome { client, ..netfilter.clone() })
        },
    },
    Meant {
        name: "fragments that make no packet",
        reason: "Connection tracking keeps fragments until it has all of a packet. proxier keeps none: each goes the way of the \
            first, and the receiver puts them together, or gives up and says so.",
        correct: |case, netfilter| {
            let parts =
                sent(case).iter().any(|frame| located(frame).is_some_and(|located| located.is_part()));
            (parts && !is_answered(case, netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "tiny first fragment",
        reason: "A first fragment without the checksum cannot be translated without the second, which proxier does not wait \
            for: it is dropped, as attacks are (RFC 1858). A reply is left as it is: the pod's own affair (decision 005).",
        correct: |case, _| {
            let is_tiny = |frame: &Frame| {
                located(frame).is_some_and(|located| located.is_part() && located.has_transport())
                    && !is_understood(ip_of(frame))
            };
            case.frames.iter().any(is_tiny).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "reply whose first fragment is not the first",
        reason: "Only the first fragment tells what conversation it belongs to. Hosts send it first; where it is overtaken the \
            rest is lost to the client.",
        correct: |case, _| {
            let is_first = |frame: &Frame| located(frame).is_some_and(|located| located.has_transport());
            let is_overtaken = case.side == Side::Pod && case.frames.iter().skip(1).any(is_first);
            is_overtaken.then(|| model::outcome(case))
        },
    },
    Meant {
        name: "ICMP error in fragments",
        reason: "No host sends one: an error is no longer than 576 bytes, or 1280 (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).",
        correct: |case, _| {
            let is_cut = |frame: &Frame| located(frame).is_some_and(|located| located.is_part());
            let is_error = case.frames.iter().any(|frame| is_cut(frame) && is_error(ip_of(frame)));
            is_error.then(|| model::outcome(case))
        },
    },
    Meant {
        name: "ICMP error with a wrong checksum",
        reason: "netfilter drops it; proxier leaves it as wrong as it was, and its receiver drops it.",
        correct: |case, netfilter| {
            let is_wrong = |frame: &Frame| is_error(ip_of(frame)) && !has_right_checksum(ip_of(frame));
            (case.frames.iter().any(is_wrong) && is_silent(netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "SCTP checksum",
        reason: "It covers no addresses (RFC 9260, section 6.8). netfilter computes it anew, and so makes good what was broken on \
            the way, and wrong what an error quotes a part of.",
        correct: |case, netfilter| {
            let sent = sent(case);
            let sent = ip_of(sent.first()?);
            let checksum = sent.get(sctp_checksum_at(sent)?..)?.first_chunk::<4>()?;
            let mut outcome = netfilter.clone();
            for frame in outcome.pod.iter_mut().chain(&mut outcome.client) {
                restore_sctp_checksum(&mut frame.bytes[14..], *checksum);
            }
            Some(outcome)
        },
    },
    Meant {
        name: "DCCP checksum",
        reason: "netfilter knows DCCP no more (Linux 6.17): addresses change and the checksum, which covers them, does not, and \
            conversations are not told apart by ports.",
        correct: |case, netfilter| {
            let is_dccp = |frame: &Frame| concerns(ip_of(frame), protocol::DCCP, 0);
            (sent(case).iter().any(is_dccp) && !is_answered(case, netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "GRE with call identifiers",
        reason: "netfilter knows the answers of a PPTP call only if it has seen the call being made, by a helper for TCP port 1723.",
        correct: |case, netfilter| {
            let is_pptp =
                |ip: &[u8]| concerns(ip, protocol::GRE, 4) && matches!(case.script.talk, Talk::Gre(Some(_)));
            (case.side == Side::Pod).then(|| corrected(case, netfilter, is_pptp)).flatten()
        },
    },
    Meant {
        name: "no next header, behind a fragment header",
        reason: "netfilter drops it. It is a packet like any other (RFC 8200, section 4.7), with nothing in it.",
        correct: |case, netfilter| {
            const NO_NEXT_HEADER: u8 = 59;
            let is_nothing = |frame: &Frame| {
                located(frame).is_some_and(|located| {
                    located.v6 && located.protocol == NO_NEXT_HEADER && located.piece.is_some()
                })
            };
            (case.frames.iter().all(is_nothing) && is_silent(netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "multicast listener discovery",
        reason: "It is about groups on a link (RFC 3810), never about an external address. netfilter leaves it alone, and it goes \
            back and forth; proxier does not tell it from other messages that are no conversation (decision 005).",
        correct: |case, _| {
            let is_mld = |frame: &Frame| {
                let kind = located(frame).and_then(|located| ip_of(frame).get(located.transport).copied());
                concerns(ip_of(frame), protocol::ICMPV6, 1) && matches!(kind, Some(130..=132 | 143))
            };
            sent(case).iter().any(is_mld).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "GRE that cannot be read",
        reason: "netfilter drops GRE of another version than 0 and 1, and what ends within its header. To a NAT of addresses it is \
            a protocol without ports.",
        correct: |case, netfilter| {
            let is_unread = |frame: &Frame| {
                let ip = ip_of(frame);
                let about = if is_error(ip) { quote_of(ip).unwrap_or_default() } else { ip };
                let header = Located::of(about).map_or(&[][..], |located| located.payload(about));
                let is_read = header.len() >= 8 && header[1] & 7 <= 1;
                concerns(ip, protocol::GRE, 0) && !is_read
            };
            (sent(case).iter().any(is_unread) && !is_answered(case, netfilter)).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "UDP-Lite without a checksum",
        reason: "There is no such thing (RFC 3828, section 3.1). Quoted, netfilter makes a wrong checksum of it; proxier leaves it.",
        correct: |case, netfilter| {
            let is_zero = |ip: &[u8]| {
                let quote = quote_of(ip).unwrap_or_default();
                let checksum = Located::of(quote).and_then(|inner| inner.checksum_at());
                checksum.and_then(|at| word(quote, at)) == Some(0)
            };
            let spoils = |ip: &[u8]| is_error(ip) && concerns(ip, protocol::UDPLITE, 8) && is_zero(ip);
            corrected(case, netfilter, spoils)
        },
    },
    Meant {
        name: "quote that is too short",
        reason: "An error quotes 8 bytes behind the IP header at least (RFC 792), or all there are. netfilter drops it where there \
            are less, and translates one that ends before the ports if it knows none of the protocol. proxier needs ports where \
            the protocol has them, and nothing where it has none.",
        correct: |case, _| {
            let is_short = |frame: &Frame| {
                let ip = ip_of(frame);
                is_error(ip)
                    && quote_of(ip).and_then(Located::of).is_none_or(|inner| inner.end - inner.transport < 8)
            };
            sent(case).iter().any(is_short).then(|| model::outcome(case))
        },
    },
    Meant {
        name: "checksum of a quote cut short",
        reason: "netfilter mends the checksum of a quoted TCP header if the header is all there, proxier if the checksum is.",
        correct: |case, netfilter| {
            let is_between = |ip: &[u8]| concerns(ip, protocol::TCP, 18) && !concerns(ip, protocol::TCP, 20);
            corrected(case, netfilter, |ip| is_error(ip) && is_between(ip))
        },
    },
    Meant {
        name: "inner checksum left to hardware",
        reason: "A UDP datagram that carries another one whose checksum is left to hardware has a complete one itself (Linux, \
            \"local checksum offload\"), which netfilter takes for one that is left to hardware as well, and breaks.",
        correct: |case, netfilter| {
            let left = |frame: &Frame| frame.offload.flags & Offload::NEEDS_CHECKSUM != 0;
            let is_inner = case.script.talk == Talk::Udp
                && matches!(case.step, Step::Request(shape) | Step::Reply(shape)
                    if shape.offload == Offloaded::InnerChecksum);
            let delivered = far(case, netfilter);
            (is_inner && !delivered.is_empty() && delivered.iter().all(left)).then(|| model::outcome(case))
        },
    },
];

/// What came out at the other end.
fn far<'a>(case: &Case<'_>, outcome: &'a Outcome) -> &'a [Frame] {
    match case.side {
        Side::Client => &outcome.pod,
        Side::Pod => &outcome.client,
    }
}

fn is_silent(outcome: &Outcome) -> bool {
    outcome.pod.is_empty() && outcome.client.is_empty() && outcome.invalid.is_empty()
}

fn located(frame: &Frame) -> Option<Located> {
    Located::of(ip_of(frame))
}

/// What was sent, put together.
fn sent(case: &Case<'_>) -> Vec<Frame> {
    reassembled(case.frames.iter().map(bare).collect())
}

/// Whether the node has answered with an error of its own.
fn is_answered(case: &Case<'_>, outcome: &Outcome) -> bool {
    match case.side {
        Side::Client => !outcome.client.is_empty(),
        Side::Pod => !outcome.pod.is_empty(),
    }
}

/// The model's outcome in place of netfilter's, where that has delivered a packet that `spoils` says it spoils.
fn corrected(case: &Case<'_>, netfilter: &Outcome, spoils: impl Fn(&[u8]) -> bool) -> Option<Outcome> {
    let is_delivered = !far(case, netfilter).is_empty();
    (is_delivered && sent(case).iter().any(|frame| spoils(ip_of(frame)))).then(|| model::outcome(case))
}

/// Where the checksum of an SCTP packet is, or of one that an error quotes.
fn sctp_checksum_at(ip: &[u8]) -> Option<usize> {
    let mut start = 0;
    if is_error(ip) {
        start = Located::of(ip)?.transport + 8;
    }
    let inner = Located::of(ip.get(start..)?)?;
    concerns(ip, protocol::SCTP, 12).then_some(start + inner.transport + 8)
}

/// Puts the checksum that was sent in the place of the one that netfilter has computed.
fn restore_sctp_checksum(ip: &mut [u8], checksum: [u8; 4]) {
    let (Some(at), Some(located)) = (sctp_checksum_at(ip), Located::of(ip)) else { return };
    let old = ip[at..at + 4].to_vec();
    ip[at..at + 4].copy_from_slice(&checksum);
    if is_error(ip) {
        let field = located.transport + 2;
        let updated = internet_checksum::update([ip[field], ip[field + 1]], &old, &checksum);
        ip[field..field + 2].copy_from_slice(&updated);
    }
}

/// Whether this is a packet of `number`, or an error about one, with at least so much of its header.
fn concerns(ip: &[u8], number: u8, least: usize) -> bool {
    let Some(found) = Located::of(ip).filter(Located::has_transport) else { return false };
    if !is_error(ip) {
        return found.protocol == number && found.payload(ip).len() >= least;
    }
    let Some(quote) = quote_of(ip) else { return false };
    Located::of(quote).is_some_and(|inner| inner.protocol == number && inner.payload(quote).len() >= least)
}

/// The packet that an error quotes.
fn quote_of(ip: &[u8]) -> Option<&[u8]> {
    let located = Located::of(ip)?;
    ip.get(located.transport + 8..located.end)
}
