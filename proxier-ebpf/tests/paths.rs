//! A packet's life, path by path: a request goes in, the pod answers, the answer goes out. One test per thing that must
//! hold; what holds for any packet is in `properties.rs`; sessions, flows, fragments and pods as clients have files of
//! their own.

mod common;

use common::*;
use proxier_common::{DropReason, ExternalKey, SERVICE_PASS_WITHOUT_BACKEND};
use proxier_ebpf::{Verdict, host::HostPacket};

#[test]
fn a_request_reaches_the_pod_with_the_clients_own_address_and_its_reply_leaves_from_the_external_one() {
    for net in BOTH {
        for protocol in ALL_PROTOCOLS {
            let tables = tables(&[net.external], &[net.pod]);
            let mut packet = plain(net.client, net.external, protocol, (40_000, 6_001));
            let before = seen(&packet);
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "{protocol} {net:?}");
            assert_checksums(&packet);
            let at_pod = seen(&packet);
            assert_eq!((at_pod.source, at_pod.destination), (net.client, net.pod));
            assert_eq!(at_pod.segment[..4], before.segment[..4], "ports are not touched");

            let mut packet = plain(net.pod, net.client, protocol, (6_001, 40_000));
            assert_eq!(reply(&mut packet, &tables), Verdict::Rewritten, "{protocol} {net:?}");
            assert_checksums(&packet);
            let at_client = seen(&packet);
            assert_eq!((at_client.source, at_client.destination), (net.external, net.client));
        }
    }
}

#[test]
fn icmp_queries_are_answered_from_the_external_address() {
    for (net, query, answer) in
        [(V4, 8, 0), (V4, 13, 14), (V4, 15, 16), (V4, 17, 18), (V6, 128, 129), (V6, 139, 140)]
    {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = query_of_20_bytes(net.client, net.external, net.icmp, (query, 77));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "type {query}");
        assert_checksums(&packet);
        assert_eq!(seen(&packet).destination, net.pod);

        let mut packet = query_of_20_bytes(net.pod, net.client, net.icmp, (answer, 77));
        assert_eq!(reply(&mut packet, &tables), Verdict::Rewritten, "type {answer}");
        assert_checksums(&packet);
        assert_eq!(seen(&packet).source, net.external);
    }
}

/// As long as a timestamp message is, which etherparse insists on.
fn query_of_20_bytes(
    source: std::net::IpAddr,
    destination: std::net::IpAddr,
    protocol: u8,
    ports: (u16, u16),
) -> HostPacket {
    packet(&Network::default(), source, destination, protocol, ports, &[0; 12])
}

#[test]
fn a_pods_own_query_is_no_answer_even_with_the_clients_identifier() {
    for (net, query) in [(V4, 8), (V6, 128)] {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, net.icmp, (query, 77)), &tables);
        let own = plain(net.pod, net.client, net.icmp, (query, 77));
        let mut packet = own.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, own);
    }
}

#[test]
fn an_answer_that_nobody_asked_for_reaches_the_pod_and_opens_nothing() {
    for (net, answer) in [(V4, 0), (V6, 129)] {
        let tables = tables(&[net.external], &[net.pod]);
        assert_eq!(
            request(&mut plain(net.client, net.external, net.icmp, (answer, 77)), &tables),
            Verdict::Rewritten
        );
        assert!(tables.flows.borrow().is_empty());
    }
}

#[test]
fn a_packet_for_another_address_costs_one_lookup_and_is_untouched() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let original = plain(net.client, net.pod, TCP, (1, 2));
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
        assert_eq!(tables.lookups.get(), 1);
    }
}

#[test]
fn a_pods_own_connection_is_untouched_and_anybody_elses_packet_costs_one_lookup() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, TCP, (40_000, 443)), &tables);
        tables.lookups.set(0);
        let cases = [
            (net.other_pod, TCP, 1, "pods"),
            (net.pod, UDP, 2, "pods, flows"),
            // Might be of a connection whose flow has been evicted.
            (net.pod, TCP, 3, "pods, flows, sessions"),
        ];
        for (source, protocol, lookups, tables_asked) in cases {
            tables.lookups.set(0);
            let original = plain(source, net.client, protocol, (50_000, 443));
            let mut packet = original.clone();
            assert_eq!(reply(&mut packet, &tables), Verdict::Next);
            assert_eq!(packet, original);
            assert_eq!(tables.lookups.get(), lookups, "{tables_asked}");
        }
    }
}

#[test]
fn an_established_request_costs_three_lookups_and_its_reply_two() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        let mut first = plain(net.client, net.external, TCP, (40_000, 443));
        request(&mut first, &tables);
        let pod = seen(&first).destination;
        tables.lookups.set(0);
        request(&mut plain(net.client, net.external, TCP, (40_000, 443)), &tables);
        assert_eq!(tables.lookups.get(), 3, "services, sessions, flows");
        tables.lookups.set(0);
        reply(&mut plain(pod, net.client, TCP, (443, 40_000)), &tables);
        assert_eq!(tables.lookups.get(), 2, "pods, flows");
    }
}

#[test]
fn neighbour_discovery_is_never_rewritten() {
    for icmp_type in 133..=137 {
        let tables = tables(&[V6.external], &[V6.pod]);
        let original = plain(V6.client, V6.external, ICMPV6, (icmp_type, 0));
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), Verdict::Next, "type {icmp_type}");
        assert_eq!(packet, original);
    }
}

#[test]
fn other_icmp_messages_reach_the_pod_and_await_nothing() {
    for (net, icmp_type) in [(V4, 9), (V4, 40), (V6, 130), (V6, 160)] {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = plain(net.client, net.external, net.icmp, (icmp_type, 5));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "type {icmp_type}");
        assert_checksums(&packet);
        assert!(tables.flows.borrow().is_empty());
        let mut packet = plain(net.pod, net.client, net.icmp, (icmp_type, 5));
        assert_eq!(reply(&mut packet, &tables), Verdict::Next, "type {icmp_type}");
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    for net in BOTH {
        for protocol in [UDP, UDPLITE] {
            let tables = tables(&[net.external], &[net.pod]);
            let mut bytes = segment(protocol, (40_000, 53), b"no checksum");
            bytes[6..8].fill(0);
            let mut packet = frame(&Network::default(), net.client, net.external, protocol, &bytes);
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
            assert_eq!(seen(&packet).segment[6..8], [0, 0]);
        }
    }
}

#[test]
fn a_udp_checksum_that_comes_out_as_zero_is_sent_as_ones() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        // Two bytes of payload chosen so that the rewritten packet's sum is zero.
        let mut bytes = segment(UDP, (40_000, 53), &[0, 0]);
        let sum = transport_checksum(net.client, net.pod, UDP, &bytes);
        bytes[8..10].copy_from_slice(&sum);
        assert_eq!(transport_checksum(net.client, net.pod, UDP, &bytes), [0, 0]);
        let bytes = seal(net.client, net.external, UDP, bytes);
        let mut packet = frame(&Network::default(), net.client, net.external, UDP, &bytes);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(seen(&packet).segment[6..8], [0xff, 0xff]);
    }
}

#[test]
fn ipv4_options_and_ipv6_extension_headers_are_walked() {
    let options = Network { options: vec![7, 7, 4, 0, 0, 0, 0, 0], ..Network::default() };
    let six = [0, 60, 43, 51, 60, 60].map(|number| {
        // Length 0 is 8 bytes for all but the authentication header, whose 4 is 24.
        let body = if number == 51 { [vec![4], vec![0; 22]].concat() } else { vec![0; 7] };
        (number, body)
    });
    let extensions = Network { extensions: six.to_vec(), ..Network::default() };
    for (net, network) in [(V4, options), (V6, extensions)] {
        for protocol in [TCP, UDP, SCTP, GRE] {
            let tables = tables(&[net.external], &[net.pod]);
            let mut packet = packet(&network, net.client, net.external, protocol, (40_000, 443), b"x");
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "{protocol}");
            if protocol != GRE {
                let (key, _) = only_flow(&tables);
                assert_eq!((key.pod_port.swap_bytes(), key.peer_port.swap_bytes()), (443, 40_000));
            }
            assert_checksums(&packet);
        }
    }
}

#[test]
fn a_chain_of_too_many_extension_headers_is_dropped() {
    for (headers, expected) in [(8, Verdict::Rewritten), (9, Verdict::Drop(DropReason::Malformed))] {
        let tables = tables(&[V6.external], &[V6.pod]);
        let network = Network { extensions: vec![(60, vec![0; 7]); headers], ..Network::default() };
        let original = packet(&network, V6.client, V6.external, UDP, (1, 2), b"x");
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), expected, "{headers} headers");
        assert_eq!(packet == original, expected != Verdict::Rewritten);
    }
}

#[test]
fn a_packet_on_its_way_through_a_source_route_is_dropped() {
    let tables = tables(&[V6.external], &[V6.pod]);
    let routing = [vec![2, 4, 1], vec![0; 20]].concat();
    let network = Network { extensions: vec![(43, routing)], ..Network::default() };
    let mut packet = packet(&network, V6.client, V6.external, UDP, (1, 2), b"x");
    assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::Malformed));
}

#[test]
fn vlan_tags_are_looked_through() {
    for net in BOTH {
        for (vlans, expected) in
            [(vec![5], Verdict::Rewritten), (vec![5, 6], Verdict::Rewritten), (vec![5, 6, 7], Verdict::Next)]
        {
            let tables = tables(&[net.external], &[net.pod]);
            let network = Network { vlans, ..Network::default() };
            let mut packet = packet(&network, net.client, net.external, TCP, (1, 2), b"x");
            assert_eq!(request(&mut packet, &tables), expected, "{network:?}");
        }
    }
}

#[test]
fn anything_but_ip_is_passed_on() {
    let tables = tables(&[V4.external], &[V4.pod]);
    let mut arp = HostPacket::new([[0xff; 12].as_slice(), &[0x08, 0x06], &[0; 28]].concat());
    assert_eq!(request(&mut arp, &tables), Verdict::Next);
    assert_eq!(reply(&mut arp, &tables), Verdict::Next);
    assert_eq!(tables.lookups.get(), 0);
}

#[test]
fn a_packet_cut_short_anywhere_is_never_half_rewritten() {
    for net in BOTH {
        for protocol in [TCP, UDP, SCTP, DCCP, net.icmp, GRE] {
            let ports =
                if protocol == net.icmp { (if protocol == ICMP { 8 } else { 128 }, 7) } else { (1, 2) };
            let whole = plain(net.client, net.external, protocol, ports);
            for length in 0..whole.bytes.len() {
                let tables = tables(&[net.external], &[net.pod]);
                let original = HostPacket::new(whole.bytes[..length].to_vec());
                let mut packet = original.clone();
                // Once it can be told whom it is for, it is dropped: passed on it would go back where it came from.
                let header = if net.icmp == ICMP { 34 } else { 54 };
                let expected =
                    if length < header { Verdict::Next } else { Verdict::Drop(DropReason::Malformed) };
                assert_eq!(request(&mut packet, &tables), expected, "{protocol} cut to {length}");
                assert_eq!(packet, original);
            }
        }
    }
}

#[test]
fn a_transport_header_cut_short_within_a_right_ip_packet_is_dropped() {
    for net in BOTH {
        for (protocol, needed) in [(TCP, 20), (UDP, 8), (UDPLITE, 8), (SCTP, 12), (DCCP, 12), (net.icmp, 8)] {
            for length in 0..needed {
                let tables = tables(&[net.external], &[net.pod]);
                let bytes = vec![8; length];
                let mut packet = frame(&Network::default(), net.client, net.external, protocol, &bytes);
                let expected = Verdict::Drop(DropReason::Malformed);
                assert_eq!(request(&mut packet, &tables), expected, "{protocol}, {length} bytes");
                let mut packet = frame(&Network::default(), net.pod, net.client, protocol, &bytes);
                assert_eq!(reply(&mut packet, &tables), Verdict::Next, "{protocol}, {length} bytes");
            }
        }
    }
}

#[test]
fn ethernet_padding_is_not_part_of_the_packet() {
    let tables = tables(&[V4.external], &[V4.pod]);
    // A TCP header of 8 bytes, padded to look long enough.
    let network = Network { padding: 40, ..Network::default() };
    let mut packet = frame(&network, V4.client, V4.external, TCP, &[0; 8]);
    assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::Malformed));
}

#[test]
fn a_header_that_is_none_is_passed_on() {
    for (net, at, value) in [(V4, 14, 0x55), (V4, 14, 0x44), (V6, 14, 0x40)] {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = plain(net.client, net.external, TCP, (1, 2));
        packet.bytes[at] = value;
        assert_eq!(request(&mut packet, &tables), Verdict::Next, "first byte {value:#x}");
        assert_eq!(reply(&mut packet, &tables), Verdict::Next, "first byte {value:#x}");
    }
}

/// The kernel makes packets of more than 64 KiB whose length field is 0 (BIG TCP).
#[test]
fn a_length_of_zero_in_a_packet_of_more_than_64_kib_means_the_whole_frame() {
    for (net, length_at, headers) in [(V4, 16, 14), (V6, 18, 14 + 40)] {
        for (size, expected) in [
            (headers + 0x10000, Verdict::Rewritten),
            (headers + 0xffff, Verdict::Drop(DropReason::Malformed)),
        ] {
            let tables = tables(&[net.external], &[net.pod]);
            let mut packet = plain(net.client, net.external, TCP, (40_000, 443));
            packet.bytes[length_at..length_at + 2].fill(0);
            packet.bytes.resize(size, 0);
            assert_eq!(request(&mut packet, &tables), expected, "{size} bytes, {net:?}");
        }
    }
}

/// What is behind the IP packet is padding, and must not be taken for a header.
#[test]
fn a_packet_whose_length_is_zero_has_no_transport_header() {
    for (net, length_at) in [(V4, 16), (V6, 18)] {
        for protocol in [TCP, UDP, SCTP] {
            let tables = tables(&[net.external], &[net.pod]);
            let mut packet = plain(net.client, net.external, protocol, (40_000, 443));
            packet.bytes[length_at..length_at + 2].fill(0);
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::Malformed), "{protocol}");
            assert!(tables.flows.borrow().is_empty());
        }
    }
}

#[test]
fn an_ipv6_packet_without_payload_reaches_the_pod() {
    let tables = tables(&[V6.external], &[V6.pod]);
    // No next header (RFC 8200, section 4.7), and padding of the link.
    let network = Network { padding: 6, ..Network::default() };
    let mut packet = frame(&network, V6.client, V6.external, 59, &[]);
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    assert_eq!(seen(&packet).destination, V6.pod);
}

#[test]
fn without_a_pod_packets_are_dropped_or_passed_as_the_service_says() {
    for net in BOTH {
        let tables = tables(&[net.external], &[]);
        let original = plain(net.client, net.external, UDP, (1, 2));
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::NoBackend));
        let key = ExternalKey { external: net.external.into() };
        tables.services.borrow_mut().get_mut(&key).unwrap().flags = SERVICE_PASS_WITHOUT_BACKEND;
        assert_eq!(request(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
    }
}

#[test]
fn a_generation_with_a_hole_drops_and_says_so() {
    let tables = tables(&[V4.external], &[V4.pod]);
    tables.backends.borrow_mut().clear();
    let mut packet = plain(V4.client, V4.external, UDP, (1, 2));
    assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::BackendMissing));
}

#[test]
fn a_full_flow_table_drops_and_says_so() {
    let tables = tables(&[V4.external], &[V4.pod]);
    tables.flows_full.set(true);
    let mut packet = plain(V4.client, V4.external, UDP, (1, 2));
    assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::FlowTableFull));
}

/// ICMP in IPv6 and ICMPv6 in IPv4 are protocols as any that is not known: nothing in them says what an error is, and no
/// pseudo-header is covered.
#[test]
fn the_other_familys_icmp_is_a_protocol_without_ports() {
    for (net, other) in [(V4, ICMPV6), (V6, ICMP)] {
        for icmp_type in 0..=255 {
            let tables = tables(&[net.external], &[net.pod]);
            let segment = [icmp_type, 0, 0xab, 0xcd, 0, 7, 0, 1, 2, 3, 4, 5];
            let of = |source, destination| frame(&Network::default(), source, destination, other, &segment);
            let mut packet = of(net.client, net.external);
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten, "type {icmp_type}");
            assert_eq!(packet, of(net.client, net.pod));
            let mut answer = of(net.pod, net.client);
            assert_eq!(reply(&mut answer, &tables), Verdict::Rewritten, "type {icmp_type}");
            assert_eq!(answer, of(net.external, net.client));
        }
    }
}
