//! ICMP errors in both directions: what its receiver gets is the error that would have been sent if the conversation
//! had been with the address that the receiver knows, made from scratch.

mod common;

use common::*;
use proptest::prelude::*;
use proxier_common::DropReason;
use proxier_ebpf::{Verdict, host::HostTables};

/// A conversation, and the packets of it as each side knows them.
struct Talk {
    protocol: u8,
    there: (u16, u16),
    back: (u16, u16),
}

fn talks(net: &Net) -> Vec<Talk> {
    let (query, answer) = if net.icmp == ICMP { (8, 0) } else { (128, 129) };
    [TCP, UDP, UDPLITE, SCTP, DCCP]
        .into_iter()
        .map(|protocol| Talk { protocol, there: (40_000, 443), back: (443, 40_000) })
        .chain([Talk { protocol: net.icmp, there: (query, 9), back: (answer, 9) }])
        .chain([GRE, ESP].map(|protocol| Talk { protocol, there: (0, 0), back: (0, 0) }))
        .collect()
}

/// Header of the family, and the transport header that every error quotes.
fn shortest(net: &Net) -> usize {
    if net.icmp == ICMP { 28 } else { 48 }
}

fn opened(net: &Net, talk: &Talk) -> HostTables {
    let tables = tables(&[net.external], &[net.pod]);
    let mut first = plain(net.client, net.external, talk.protocol, talk.there);
    assert_eq!(request(&mut first, &tables), Verdict::Rewritten);
    tables
}

#[test]
fn an_error_about_a_reply_reaches_the_pod_as_one_about_its_own_packet() {
    for net in BOTH {
        for talk in talks(&net) {
            for kind in errors(&net) {
                for length in [shortest(&net), shortest(&net) + 12, usize::MAX] {
                    let tables = opened(&net, &talk);
                    let as_sent = plain(net.external, net.client, talk.protocol, talk.back);
                    let as_known = plain(net.pod, net.client, talk.protocol, talk.back);
                    let mut packet = error(&net, router(&net), net.external, kind, &as_sent, length);
                    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "{}", talk.protocol);
                    let expected = error(&net, router(&net), net.pod, kind, &as_known, length);
                    assert_eq!(packet, expected, "protocol {}, {length} bytes quoted", talk.protocol);
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_request_reaches_the_client_from_the_external_address_whoever_made_it() {
    for net in BOTH {
        for talk in talks(&net) {
            for kind in errors(&net) {
                for source in [net.pod, router(&net)] {
                    for length in [shortest(&net), shortest(&net) + 12, usize::MAX] {
                        let tables = opened(&net, &talk);
                        let as_received = plain(net.client, net.pod, talk.protocol, talk.there);
                        let as_sent = plain(net.client, net.external, talk.protocol, talk.there);
                        let mut packet = error(&net, source, net.client, kind, &as_received, length);
                        assert_eq!(reply(&mut packet, &tables), Verdict::Rewritten, "{}", talk.protocol);
                        let expected = error(&net, net.external, net.client, kind, &as_sent, length);
                        assert_eq!(packet, expected, "protocol {}, {length} bytes quoted", talk.protocol);
                    }
                }
            }
        }
    }
}

#[test]
fn an_error_about_a_conversation_that_is_not_ours_is_dropped_at_the_external_address_and_passed_to_clients() {
    for net in BOTH {
        let kind = errors(&net)[0];
        let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
        let tables = opened(&net, &talk);
        // Another port, another peer, not from the external address at all, and the pod's own query.
        let (query, answer) = if net.icmp == ICMP { (8, 0) } else { (128, 129) };
        let inbound = [
            plain(net.external, net.client, UDP, (443, 40_001)),
            plain(net.external, router(&net), UDP, (443, 40_000)),
            plain(net.other_external, net.client, UDP, (443, 40_000)),
            plain(net.external, net.client, net.icmp, (query, 9)),
        ];
        for about in inbound {
            let original = error(&net, router(&net), net.external, kind, &about, usize::MAX);
            let mut packet = original.clone();
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
            assert_eq!(packet, original);
        }
        let outbound = [
            plain(net.client, net.pod, UDP, (40_001, 443)),
            plain(net.client, net.other_pod, UDP, (40_000, 443)),
            plain(net.client, net.pod, net.icmp, (answer, 9)),
        ];
        for about in outbound {
            let original = error(&net, net.pod, net.client, kind, &about, usize::MAX);
            let mut packet = original.clone();
            assert_eq!(reply(&mut packet, &tables), Verdict::Next);
            assert_eq!(packet, original);
        }
        // About a packet of ours, but sent to somebody who did not send that packet.
        let about = plain(net.client, net.pod, UDP, talk.there);
        let original = error(&net, net.pod, router(&net), kind, &about, usize::MAX);
        let mut packet = original.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
    }
}

#[test]
fn an_error_about_an_error_or_about_a_later_fragment_is_dropped() {
    for net in BOTH {
        let kind = errors(&net)[0];
        let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
        let tables = opened(&net, &talk);
        let fragment = Network { fragment: Some((100, true, 7)), ..Network::default() };
        let about_fragment = packet(&fragment, net.external, net.client, UDP, talk.back, b"middle");
        let about_error = error(&net, net.external, net.client, kind, &about_fragment, usize::MAX);
        for about in [about_fragment, about_error] {
            let original = error(&net, router(&net), net.external, kind, &about, usize::MAX);
            let mut packet = original.clone();
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
            assert_eq!(packet, original);
        }
    }
}

#[test]
fn an_error_whose_quote_is_cut_too_short_is_dropped() {
    for net in BOTH {
        let talk = Talk { protocol: TCP, there: (40_000, 443), back: (443, 40_000) };
        let tables = opened(&net, &talk);
        let about = plain(net.external, net.client, TCP, talk.back);
        for length in 0..shortest(&net) {
            let original = error(&net, router(&net), net.external, errors(&net)[0], &about, length);
            let mut packet = original.clone();
            let expected = Verdict::Drop(DropReason::UnrelatedError);
            assert_eq!(request(&mut packet, &tables), expected, "{length} bytes quoted");
            assert_eq!(packet, original);
        }
    }
}

#[test]
fn an_error_that_itself_comes_in_fragments_is_dropped() {
    for net in BOTH {
        let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
        let tables = opened(&net, &talk);
        let about = plain(net.external, net.client, UDP, talk.back);
        let whole = error(&net, router(&net), net.external, errors(&net)[0], &about, usize::MAX);
        let message = seen(&whole).segment;
        let fragment = Network { fragment: Some((0, true, 7)), ..Network::default() };
        let mut packet = frame(&fragment, router(&net), net.external, net.icmp, &message);
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
    }
}

#[test]
fn a_quoted_udp_checksum_of_zero_stays_zero() {
    for net in BOTH {
        let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
        let tables = opened(&net, &talk);
        let mut bytes = segment(UDP, talk.back, b"no checksum");
        bytes[6..8].fill(0);
        let as_sent = frame(&Network::default(), net.external, net.client, UDP, &bytes);
        let as_known = frame(&Network::default(), net.pod, net.client, UDP, &bytes);
        let kind = errors(&net)[0];
        let mut packet = error(&net, router(&net), net.external, kind, &as_sent, usize::MAX);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(packet, error(&net, router(&net), net.pod, kind, &as_known, usize::MAX));
    }
}

#[test]
fn an_error_is_no_sign_of_life() {
    let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
    let tables = opened(&V4, &talk);
    let before: Vec<_> = tables.flows.borrow().values().map(|flow| flow.0.get()).collect();
    tables.now.set(tables.now.get() * 2);
    let about = plain(V4.external, V4.client, UDP, talk.back);
    request(&mut error(&V4, router(&V4), V4.external, (3, 4), &about, usize::MAX), &tables);
    let after: Vec<_> = tables.flows.borrow().values().map(|flow| flow.0.get()).collect();
    assert_eq!(before, after);
}

proptest! {
    /// Options and extension headers in the quote, any payload, quotes of any length that holds a whole transport header
    /// or leaves its checksum out.
    #[test]
    fn any_quote_is_translated(
        v6 in any::<bool>(),
        options in 0..10_usize,
        extensions in prop::collection::vec(prop::sample::select(vec![43_u8, 51, 60]), 0..4),
        payload in prop::collection::vec(any::<u8>(), 12..200),
        which in any::<prop::sample::Index>(),
        cut in 0..100_usize,
    ) {
        let net = if v6 { V6 } else { V4 };
        let all = talks(&net);
        let talk = &all[which.index(all.len())];
        let tables = opened(&net, talk);
        let extensions = extensions
            .into_iter()
            .map(|number| (number, if number == 51 { [vec![4], vec![0; 22]].concat() } else { vec![0; 7] }))
            .collect();
        let network = Network { options: vec![1; options * 4], extensions, ..Network::default() };
        let about = |source| packet(&network, source, net.client, talk.protocol, talk.back, &payload);
        let length = about(net.pod).bytes.len() - 14 - cut.min(payload.len());
        let mut translated =
            error(&net, router(&net), net.external, errors(&net)[0], &about(net.external), length);
        prop_assert_eq!(request(&mut translated, &tables), Verdict::Rewritten);
        let expected = error(&net, router(&net), net.pod, errors(&net)[0], &about(net.pod), length);
        prop_assert_eq!(translated, expected);
    }
}

#[test]
fn a_pods_error_about_its_own_packet_to_the_external_address_comes_back_to_it() {
    for net in BOTH {
        for talk in talks(&net) {
            let tables = tables(&[net.external], &[net.pod]);
            let sent = plain(net.pod, net.external, talk.protocol, talk.there);
            let mut received = sent.clone();
            assert_eq!(request_of_pod(&mut received, &tables), Verdict::Hairpin);
            let kind = errors(&net)[1];
            for length in [shortest(&net), usize::MAX] {
                let mut packet = error(&net, net.pod, net.external, kind, &received, length);
                assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Hairpin, "{}", talk.protocol);
                assert_eq!(packet, error(&net, net.external, net.pod, kind, &sent, length));
            }
        }
    }
}

#[test]
fn a_redirect_about_our_conversation_is_dropped() {
    let talk = Talk { protocol: UDP, there: (40_000, 443), back: (443, 40_000) };
    let tables = opened(&V4, &talk);
    let about_reply = plain(V4.external, V4.client, UDP, talk.back);
    let mut inbound = error(&V4, router(&V4), V4.external, (5, 1), &about_reply, usize::MAX);
    assert_eq!(request(&mut inbound, &tables), Verdict::Drop(DropReason::IcmpRedirect));
    let about_request = plain(V4.client, V4.pod, UDP, talk.there);
    let mut outbound = error(&V4, router(&V4), V4.client, (5, 1), &about_request, usize::MAX);
    assert_eq!(reply(&mut outbound, &tables), Verdict::Drop(DropReason::IcmpRedirect));
    let not_ours = plain(V4.client, V4.other_pod, UDP, talk.there);
    let mut outbound = error(&V4, router(&V4), V4.client, (5, 1), &not_ours, usize::MAX);
    assert_eq!(reply(&mut outbound, &tables), Verdict::Next);
}
