//! Packets that are broken, or of which a part cannot be understood, to whoever may be their destination.

mod common;

use common::*;
use proxier_common::{Address, DELIVERY_NODE, DELIVERY_STACK, DropReason, PodKey};
use proxier_ebpf::{Family as _, Verdict, checksum, error_reply, host::HostPacket, straight_to_pod};

/// A UDP packet with less than its header, and one whose length is beyond the frame.
fn broken(source: std::net::IpAddr, destination: std::net::IpAddr) -> [HostPacket; 2] {
    let short = frame(&Network::default(), source, destination, UDP, &[1, 2, 3, 4]);
    let mut beyond = plain(source, destination, UDP, (1, 2));
    beyond.bytes.pop();
    [short, beyond]
}

#[test]
fn what_is_broken_is_dropped_at_an_external_address_and_left_alone_at_a_pods_own() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        for (destination, expected) in
            [(net.external, Verdict::Drop(DropReason::Malformed)), (net.pod, Verdict::Next)]
        {
            for original in broken(net.client, destination) {
                let mut packet = original.clone();
                assert_eq!(request(&mut packet, &tables), expected);
                assert_eq!(packet, original);
            }
        }
        for original in broken(net.pod, net.client) {
            let mut packet = original.clone();
            assert_eq!(reply(&mut packet, &tables), Verdict::Next);
            assert_eq!(packet, original);
        }
    }
}

#[test]
fn an_extension_header_that_is_cut_short_is_malformed() {
    let tables = tables(&[V6.external], &[V6.pod]);
    for length in 0..8 {
        // Destination options, of which less is there than the shortest have.
        let mut packet = frame(&Network::default(), V6.client, V6.external, 60, &vec![0; length]);
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::Malformed), "{length} bytes");
    }
}

#[test]
fn what_a_pod_sends_to_somebody_else_is_not_for_the_node() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = plain(net.pod, router(&net), UDP, (1, 2));
        assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Next);
    }
}

#[test]
fn an_answer_or_a_later_fragment_without_a_pod_has_nowhere_to_go() {
    for net in BOTH {
        let tables = tables(&[net.external], &[]);
        let answer = if net.icmp == ICMP { 0 } else { 129 };
        let later = Network { fragment: Some((9, false, 7)), ..Network::default() };
        for mut packet in [
            plain(net.client, net.external, net.icmp, (answer, 9)),
            frame(&later, net.client, net.external, UDP, &[1; 24]),
        ] {
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::NoBackend));
        }
    }
}

#[test]
fn an_error_whose_quote_cannot_be_read_is_dropped_on_its_way_in_and_passed_on_its_way_out() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (40_000, 443)), &tables);
        let kind = errors(&net)[0];
        let in_about = plain(net.external, net.client, UDP, (443, 40_000));
        let out_about = plain(net.client, net.pod, UDP, (40_000, 443));
        let header = if net.icmp == ICMP { 20 } else { 40 };
        for length in [0, header - 1, header, header + 7] {
            let mut packet = error(&net, router(&net), net.external, kind, &in_about, length);
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError), "{length}");
            let mut packet = error(&net, net.pod, net.client, kind, &out_about, length);
            assert_eq!(reply(&mut packet, &tables), Verdict::Next, "{length}");
        }
        // A header that says that it is longer than its packet; one that goes on with what is not there.
        let [mut in_about, mut out_about] = [in_about, out_about];
        for about in [&mut in_about, &mut out_about] {
            about.bytes.truncate(14 + header + 7);
            if net.icmp == ICMP {
                about.bytes[14] = 0x4f;
                about.bytes[16..18].copy_from_slice(&27_u16.to_be_bytes());
            } else {
                about.bytes[14 + 6] = 60;
            }
        }
        let mut packet = error(&net, router(&net), net.external, kind, &in_about, usize::MAX);
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
        let mut packet = error(&net, net.pod, net.client, kind, &out_about, usize::MAX);
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
    }
}

/// BIG TCP: the length field of a packet of more than 64 KiB is 0, and an error quotes it like that.
#[test]
fn a_quote_of_a_packet_of_more_than_64_kib_is_translated() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, TCP, (40_000, 443)), &tables);
        let kind = errors(&net)[0];
        let about = |source| {
            let mut about = plain(source, net.client, TCP, (443, 40_000));
            let at = if net.icmp == ICMP { 14 + 2 } else { 14 + 4 };
            about.bytes[at..at + 2].fill(0);
            about
        };
        let mut packet = error(&net, router(&net), net.external, kind, &about(net.external), usize::MAX);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(packet, error(&net, router(&net), net.pod, kind, &about(net.pod), usize::MAX));
    }
}

#[test]
fn an_error_made_here_is_translated_and_anything_else_left_alone() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_node(&tables, net.client, 0);
        let sent = plain(net.client, net.external, UDP, (40_000, 443));
        let mut passed_on = sent.clone();
        assert_eq!(request_of_node(&mut passed_on, &tables), Verdict::Rewritten);
        let kind = errors(&net)[0];
        let original = error(&net, net.pod, net.client, kind, &passed_on, usize::MAX);
        let mut packet = original.clone();
        assert_eq!(error_reply(&mut packet, &tables, DELIVERY_STACK), Verdict::Next, "of another delivery");
        assert_eq!(packet, original);
        assert_eq!(error_reply(&mut packet, &tables, DELIVERY_NODE), Verdict::Rewritten);
        assert_eq!(packet, error(&net, net.external, net.client, kind, &sent, usize::MAX));
        // No header, less than a header, less than it says, nothing behind it, and no IP at all.
        let header = if net.icmp == ICMP { 34 } else { 54 };
        for length in [14, header - 1, original.bytes.len() - 1] {
            let mut packet = HostPacket::new(original.bytes[..length].to_vec());
            assert_eq!(error_reply(&mut packet, &tables, DELIVERY_NODE), Verdict::Next, "{length} bytes");
        }
        let mut nothing = frame(&Network::default(), net.pod, net.client, net.icmp, &[]);
        assert_eq!(error_reply(&mut nothing, &tables, DELIVERY_NODE), Verdict::Next);
    }
    let mut arp = HostPacket::new([&[0xff; 12][..], &[0x08, 0x06], &[0; 28]].concat());
    assert_eq!(error_reply(&mut arp, &tables(&[V4.external], &[V4.pod]), DELIVERY_NODE), Verdict::Next);
}

#[test]
fn what_is_no_ip_packet_goes_straight_to_nobody() {
    let tables = tables(&[V4.external], &[V4.pod]);
    straight_to_pod(&HostPacket::new([&[0xff; 12][..], &[0x08, 0x06], &[0; 28]].concat()), &tables);
    assert_eq!(tables.lookups.get(), 0);
}

/// A redirect of neighbour discovery (RFC 4861, section 4.5): for `about`, better go to `target`.
fn redirect(about: Address, target: Address) -> HostPacket {
    let message = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &target.bytes, &about.bytes].concat();
    let (source, destination) = (router(&V6), V6.client);
    frame(&Network::default(), source, destination, ICMPV6, &seal(source, destination, ICMPV6, message))
}

#[test]
fn a_redirect_about_a_pod_never_leaves() {
    let tables = tables(&[V6.external], &[V6.pod]);
    assert!(tables.pods.borrow().contains_key(&PodKey { pod: V6.pod.into() }));
    let mut packet = redirect(V6.pod.into(), V6.pod.into());
    assert_eq!(reply(&mut packet, &tables), Verdict::Drop(DropReason::IcmpRedirect));
    let mut packet = redirect(router(&V6).into(), V6.pod.into());
    assert_eq!(reply(&mut packet, &tables), Verdict::Next, "about another address");
    let mut cut = frame(&Network::default(), router(&V6), V6.client, ICMPV6, &[137, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(reply(&mut cut, &tables), Verdict::Next, "about none");
}

#[test]
fn a_checksum_of_zero_is_written_as_the_protocol_has_it() {
    // RFC 1624, section 4: the word 0x5555 becomes 0x3285.
    let difference = checksum::word_difference(0x5555, 0x3285);
    assert_eq!(checksum::apply_as(false, 0xdd2f, difference), 0x0000);
    assert_eq!(checksum::apply_as(true, 0xdd2f, difference), 0xffff);
}

#[test]
fn a_checksum_from_scratch_is_the_one_that_everybody_computes() {
    let bytes = &plain(V4.client, V4.external, UDP, (1, 2)).bytes[14..34];
    let sum = bytes
        .chunks_exact(2)
        .enumerate()
        .filter(|(word, _)| *word != 5)
        .map(|(_, word)| u64::from(u16::from_ne_bytes([word[0], word[1]])))
        .sum();
    assert_eq!(checksum::of_sum(sum).to_ne_bytes(), bytes[10..12]);
}

#[test]
fn a_header_says_what_follows_it() {
    let hop_by_hop = Network { extensions: vec![(0, vec![0; 7])], ..Network::default() };
    let packet = packet(&hop_by_hop, V6.client, V6.external, UDP, (1, 2), b"");
    assert_eq!(proxier_ebpf::V6::header(&packet, 14).unwrap().next_header, 0);
}

/// As a tunnel's outer UDP header looks while the inner checksum is left to the hardware, or any whose own is: on a host
/// nothing is left to hardware, and the field is mended as any.
#[test]
fn a_udp_checksum_that_looks_left_to_the_hardware_stays_as_wrong_as_it_was() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let mut bytes = segment(UDP, (40_000, 4_789), b"inner packet");
        let length = u32::try_from(bytes.len()).unwrap();
        let sum = |destination: std::net::IpAddr| {
            let (source, destination) = (net.client.into(), destination.into());
            let sum = if net.icmp == ICMP {
                checksum::v4_pseudo_header_sum(source, destination, UDP, length)
            } else {
                checksum::v6_pseudo_header_sum(source, destination, UDP, length)
            };
            sum.to_ne_bytes()
        };
        bytes[6..8].copy_from_slice(&sum(net.external));
        let mut packet = frame(&Network::default(), net.client, net.external, UDP, &bytes);
        let error = |destination, segment: &[u8]| transport_checksum(net.client, destination, UDP, segment);
        let before = error(net.external, &bytes);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(error(net.pod, &seen(&packet).segment), before);
    }
}
