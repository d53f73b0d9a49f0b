//! A packet's life, path by path: a request goes in, the pod answers, the answer goes out. One test per thing that must
//! hold; what holds for any packet is in `properties.rs`.

mod common;

use std::{cell::Cell, rc::Rc};

use common::*;
use proxier_common::{
    Address, BackendKey, BackendValue, DropReason, ExternalKey, FlowKey, MEMBER_DRAINING, MemberKey,
    MemberValue, SERVICE_IS_POD, SERVICE_PASS_WITHOUT_BACKEND, SessionKey, TCP_ESTABLISHED, TCP_REPLIED,
    TCP_REPLY_FIN, TCP_REQUEST_FIN, TCP_RESET, timeout::SECOND,
};
use proxier_ebpf::{
    Verdict,
    host::{HostFlow, HostPacket, HostTables},
    reply,
};

const ALL_PROTOCOLS: [u8; 7] = [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP];

fn tcp(net: &Net, from_client: bool, flags: u8) -> HostPacket {
    let (source, destination, ports) = if from_client {
        (net.client, net.external, (40_000, 443))
    } else {
        (net.pod, net.client, (443, 40_000))
    };
    let mut segment = segment(TCP, ports, b"");
    segment[13] = flags;
    frame(&Network::default(), source, destination, TCP, &seal(source, destination, TCP, segment))
}

fn only_flow(tables: &HostTables) -> (FlowKey, HostFlow) {
    let flows = tables.flows.borrow();
    assert_eq!(flows.len(), 1, "{flows:?}");
    let (key, flow) = flows.iter().next().expect("one flow");
    (*key, flow.clone())
}

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
fn a_pods_own_connection_costs_one_lookup_and_is_untouched() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, TCP, (40_000, 443)), &tables);
        tables.lookups.set(0);
        let original = plain(net.pod, net.client, TCP, (50_000, 443));
        let mut packet = original.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
        assert_eq!(tables.lookups.get(), 1);
    }
}

#[test]
fn an_established_request_costs_three_lookups_and_its_reply_one() {
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
        assert_eq!(tables.lookups.get(), 1, "flows");
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
fn a_total_length_of_zero_means_the_whole_frame() {
    for (net, length_at) in [(V4, 16), (V6, 18)] {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = plain(net.client, net.external, TCP, (40_000, 443));
        packet.bytes[length_at..length_at + 2].fill(0);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    }
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

// Sessions.

fn pod_of(
    tables: &HostTables,
    net: &Net,
    client: std::net::IpAddr,
    protocol: u8,
    port: u16,
) -> std::net::IpAddr {
    let ports =
        if protocol == net.icmp { (if protocol == ICMP { 8 } else { 128 }, port) } else { (port, port) };
    let mut packet = plain(client, net.external, protocol, ports);
    assert_eq!(request(&mut packet, tables), Verdict::Rewritten);
    seen(&packet).destination
}

fn client(net: &Net, number: u8) -> std::net::IpAddr {
    let mut address = Address::from(net.client);
    address.bytes[15] = number;
    address.to_ip()
}

#[test]
fn a_client_stays_on_its_pod_across_ports_and_protocols() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        for number in 0..100 {
            let client = client(&net, number);
            let pod = pod_of(&tables, &net, client, TCP, 21);
            for (protocol, port) in [(TCP, 30_000), (UDP, 5060), (SCTP, 36_412), (net.icmp, 9), (GRE, 0)] {
                assert_eq!(pod_of(&tables, &net, client, protocol, port), pod);
            }
        }
    }
}

#[test]
fn clients_are_spread_over_the_pods() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        let on_first =
            (0..200).filter(|number| pod_of(&tables, &net, client(&net, *number), UDP, 1) == net.pod).count();
        assert!((60..140).contains(&on_first), "{on_first} of 200 clients on one of two pods");
    }
}

#[test]
fn removing_a_pod_moves_only_its_clients_and_adding_one_moves_nobody() {
    for net in BOTH {
        let third = Address::from(net.pod).bytes;
        let third = Address::from_v6([&third[..15], &[77]].concat().try_into().unwrap()).to_ip();
        let tables = tables(&[net.external], &[net.pod, net.other_pod, third]);
        let clients: Vec<_> = (0..200).map(|number| client(&net, number)).collect();
        let before: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();

        set_pods(&tables, &[net.external], &[net.pod, third], 2);
        let after: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();
        for ((client, before), after) in clients.iter().zip(&before).zip(&after) {
            assert_ne!(*after, net.other_pod, "{client} is on a pod that went");
            if *before != net.other_pod {
                assert_eq!(before, after, "{client} moved although its pod stayed");
            }
        }

        set_pods(&tables, &[net.external], &[net.pod, net.other_pod, third], 3);
        let last: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();
        assert_eq!(after, last);
    }
}

#[test]
fn a_pod_that_left_and_one_that_came_with_its_address_are_two() {
    let tables = tables(&[V4.external], &[V4.pod, V4.other_pod]);
    let clients: Vec<_> = (0..50).map(|number| client(&V4, number)).collect();
    for client in &clients {
        pod_of(&tables, &V4, *client, UDP, 1);
    }
    set_pods(&tables, &[V4.external], &[V4.other_pod], 2);
    set_pods(&tables, &[V4.external], &[V4.pod, V4.other_pod], 3);
    for client in &clients {
        pod_of(&tables, &V4, *client, UDP, 1);
    }
    let sessions = tables.sessions.borrow();
    let kept = sessions.values().filter(|session| session.0.get().pod == V4.pod.into());
    for session in kept {
        assert_eq!(session.0.get().generation, 3, "a session with the former owner of the address lives on");
    }
}

#[test]
fn a_session_ends_when_the_client_was_silent_for_too_long() {
    let tables = tables(&[V4.external], &[V4.pod]);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    // The pod is alone no more; only who has to choose anew may land on the other.
    let key = SessionKey { external: V4.external.into(), peer: V4.client.into() };
    let session = tables.sessions.borrow()[&key].clone();
    let timeout = u64::from(AFFINITY_TIMEOUT) * SECOND;
    tables.now.set(tables.now.get() + timeout);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    assert_eq!(session.0.get().last_seen, tables.now.get(), "still the same session, seen now");
    tables.now.set(tables.now.get() + timeout + 1);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    assert!(!Rc::ptr_eq(&tables.sessions.borrow()[&key].0, &session.0), "a new session");
}

#[test]
fn an_address_that_changes_hands_takes_no_clients_along() {
    let tables = tables(&[V4.external], &[V4.pod]);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    let key = SessionKey { external: V4.external.into(), peer: V4.client.into() };
    let session = tables.sessions.borrow()[&key].clone();
    session.0.set(proxier_common::SessionValue {
        service_id: 99,
        pod: V4.other_pod.into(),
        ..session.0.get()
    });
    assert_eq!(pod_of(&tables, &V4, V4.client, UDP, 1), V4.pod);
}

#[test]
fn last_seen_is_written_at_most_once_a_second() {
    let tables = tables(&[V4.external], &[V4.pod]);
    let start = tables.now.get();
    let key = SessionKey { external: V4.external.into(), peer: V4.client.into() };
    pod_of(&tables, &V4, V4.client, UDP, 1);
    for (after, written) in [(SECOND - 1, start), (SECOND, start + SECOND)] {
        tables.now.set(start + after);
        pod_of(&tables, &V4, V4.client, UDP, 1);
        assert_eq!(only_flow(&tables).1.0.get().last_seen, written);
        assert_eq!(tables.sessions.borrow()[&key].0.get().last_seen, written);
    }
    tables.now.set(start + 5 * SECOND);
    reply(&mut plain(V4.pod, V4.client, UDP, (1, 1)), &tables);
    assert_eq!(only_flow(&tables).1.0.get().last_seen, start + 5 * SECOND);
}

// Flows.

#[test]
fn two_external_addresses_of_one_pod_do_not_share_a_clients_port() {
    for net in BOTH {
        let tables = tables(&[net.external, net.other_external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let original = plain(net.client, net.other_external, UDP, (40_000, 53));
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::FlowCollision));
        assert_eq!(packet, original);
        // From another port, or when the first conversation is over, it may.
        let mut packet = plain(net.client, net.other_external, UDP, (40_001, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        tables.now.set(tables.now.get() + 301 * SECOND);
        let mut packet = original;
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        let mut packet = plain(net.pod, net.client, UDP, (53, 40_000));
        reply(&mut packet, &tables);
        assert_eq!(seen(&packet).source, net.other_external);
    }
}

#[test]
fn a_conversation_goes_on_when_its_address_changes_hands() {
    let tables = tables(&[V4.external], &[V4.pod]);
    request(&mut tcp(&V4, true, 0x02), &tables);
    let (key, flow) = only_flow(&tables);
    flow.0.set(proxier_common::FlowValue {
        service_id: 99,
        tcp_state: TCP_REPLIED | TCP_ESTABLISHED,
        ..flow.0.get()
    });
    assert_eq!(request(&mut tcp(&V4, true, 0x10), &tables), Verdict::Rewritten);
    let flow = tables.flows.borrow()[&key].0.get();
    assert_eq!((flow.service_id, flow.tcp_state), (SERVICE_ID, TCP_REPLIED | TCP_ESTABLISHED));
}

#[test]
fn a_tcp_connections_state_follows_its_flags() {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    const FIN: u8 = 0x11;
    const RST: u8 = 0x04;
    let established = TCP_REPLIED | TCP_ESTABLISHED;
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let life = [
            (true, SYN, 0),
            (false, SYN | ACK, TCP_REPLIED),
            (true, ACK, established),
            (false, FIN, established | TCP_REPLY_FIN),
            (true, FIN, established | TCP_REPLY_FIN | TCP_REQUEST_FIN),
            // The client's port is used again.
            (true, SYN, 0),
            (false, SYN | ACK, TCP_REPLIED),
            (true, ACK, established),
            // Half closed, and opened again: nothing of the first connection is left.
            (true, FIN, established | TCP_REQUEST_FIN),
            (true, SYN, 0),
            // A RST of the client may be anybody's.
            (true, RST, TCP_REQUEST_FIN),
            (false, RST, TCP_REPLIED | TCP_REQUEST_FIN | TCP_RESET),
        ];
        for (step, (from_client, flags, expected)) in life.into_iter().enumerate() {
            let mut packet = tcp(&net, from_client, flags);
            let verdict =
                if from_client { request(&mut packet, &tables) } else { reply(&mut packet, &tables) };
            assert_eq!(verdict, Verdict::Rewritten, "step {step}");
            assert_eq!(only_flow(&tables).1.0.get().tcp_state, expected, "step {step}");
        }
    }
}

/// As the agent: a pod's own address is in `services` too.
fn know_pod(tables: &HostTables, pod: std::net::IpAddr) {
    let mut services = tables.services.borrow_mut();
    let value = *services.values().next().expect("a Service");
    services.insert(
        ExternalKey { external: pod.into() },
        proxier_common::ServiceValue { flags: SERVICE_IS_POD, service_id: 0, ..value },
    );
}

#[test]
fn a_client_that_used_a_port_through_the_external_address_may_use_it_with_the_pod_directly() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        let closed = [(true, 0x02), (false, 0x12), (true, 0x11), (false, 0x11)];
        for (from_client, flags) in closed {
            let mut packet = tcp(&net, from_client, flags);
            if from_client {
                request(&mut packet, &tables)
            } else {
                reply(&mut packet, &tables)
            };
        }
        let direct = |flags: u8| {
            let mut segment = segment(TCP, (40_000, 443), b"");
            segment[13] = flags;
            let sealed = seal(net.client, net.pod, TCP, segment);
            frame(&Network::default(), net.client, net.pod, TCP, &sealed)
        };
        // Anything but a new connection may be a straggler.
        assert_eq!(request(&mut direct(0x10), &tables), Verdict::Next);
        assert_eq!(tables.flows.borrow().len(), 1);
        let mut syn = direct(0x02);
        assert_eq!(request(&mut syn, &tables), Verdict::Next);
        assert_eq!(syn, direct(0x02));
        for flags in [0x12, 0x10, 0x18] {
            assert_eq!(reply(&mut tcp(&net, false, flags), &tables), Verdict::Next);
        }
    }
}

#[test]
fn a_packet_straight_to_the_pod_does_not_end_an_open_connection() {
    let tables = tables(&[V4.external], &[V4.pod]);
    know_pod(&tables, V4.pod);
    for (from_client, flags) in [(true, 0x02), (false, 0x12), (true, 0x10)] {
        let mut packet = tcp(&V4, from_client, flags);
        if from_client {
            request(&mut packet, &tables)
        } else {
            reply(&mut packet, &tables)
        };
    }
    let mut syn = segment(TCP, (40_000, 443), b"");
    syn[13] = 0x02;
    let sealed = seal(V4.client, V4.pod, TCP, syn);
    request(&mut frame(&Network::default(), V4.client, V4.pod, TCP, &sealed), &tables);
    assert_eq!(reply(&mut tcp(&V4, false, 0x18), &tables), Verdict::Rewritten);
}

#[test]
fn with_the_same_ports_the_last_address_that_a_client_spoke_to_answers() {
    for net in BOTH {
        let icmp = (net.icmp, (if net.icmp == ICMP { 8 } else { 128 }, 1));
        for (protocol, ports) in [(UDP, (5_060, 5_060)), (GRE, (0, 0)), (ESP, (0, 0)), icmp] {
            let tables = tables(&[net.external], &[net.pod]);
            know_pod(&tables, net.pod);
            let answer = match (protocol, ports) {
                (ICMP, (_, identifier)) => plain(net.pod, net.client, protocol, (0, identifier)),
                (ICMPV6, (_, identifier)) => plain(net.pod, net.client, protocol, (129, identifier)),
                _ => plain(net.pod, net.client, protocol, ports),
            };
            for _ in 0..2 {
                request(&mut plain(net.client, net.external, protocol, ports), &tables);
                assert_eq!(reply(&mut answer.clone(), &tables), Verdict::Rewritten, "{protocol}");
                request(&mut plain(net.client, net.pod, protocol, ports), &tables);
                assert_eq!(reply(&mut answer.clone(), &tables), Verdict::Next, "{protocol}");
            }
        }
    }
}

/// While one agent's programs take the place of another's, both may see a packet.
#[test]
fn a_second_program_at_the_same_hook_does_not_take_a_rewritten_packet_for_one_straight_to_the_pod() {
    let tables = tables(&[V4.external], &[V4.pod]);
    know_pod(&tables, V4.pod);
    let mut packet = plain(V4.client, V4.external, UDP, (40_000, 53));
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    assert_eq!(request(&mut packet, &tables), Verdict::Next);
    assert_eq!(tables.flows.borrow().len(), 1);
}

#[test]
fn an_idle_connection_still_answers_from_the_external_address() {
    let tables = tables(&[V4.external], &[V4.pod]);
    for (from_client, flags) in [(true, 0x02), (false, 0x12), (true, 0x10), (true, 0x04)] {
        let mut packet = tcp(&V4, from_client, flags);
        if from_client {
            request(&mut packet, &tables)
        } else {
            reply(&mut packet, &tables)
        };
    }
    // The RST was forged; the pod has not believed it and sends on.
    tables.now.set(tables.now.get() + 10_000 * SECOND);
    assert_eq!(reply(&mut tcp(&V4, false, 0x18), &tables), Verdict::Rewritten);
}

#[test]
fn conversations_stay_on_a_pod_that_drains_and_new_ones_go_elsewhere() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        for (from_client, flags) in [(true, 0x02), (false, 0x12), (true, 0x10)] {
            let mut packet = tcp(&net, from_client, flags);
            if from_client {
                request(&mut packet, &tables)
            } else {
                reply(&mut packet, &tables)
            };
        }
        // The pod is no longer ready; another is.
        set_pods(&tables, &[net.external], &[net.other_pod], 2);
        drain(&tables, net.pod);
        let opens = |port: u16| {
            let mut segment = segment(TCP, (port, 443), b"");
            segment[13] = 0x02;
            let sealed = seal(net.client, net.external, TCP, segment);
            frame(&Network::default(), net.client, net.external, TCP, &sealed)
        };
        for _ in 0..3 {
            let mut ongoing = tcp(&net, true, 0x18);
            assert_eq!(request(&mut ongoing, &tables), Verdict::Rewritten);
            assert_eq!(seen(&ongoing).destination, net.pod, "the connection goes on");
            assert_eq!(reply(&mut tcp(&net, false, 0x18), &tables), Verdict::Rewritten);
            let mut new = opens(50_000);
            assert_eq!(request(&mut new, &tables), Verdict::Rewritten);
            assert_eq!(seen(&new).destination, net.other_pod, "a new one goes to the pod that is ready");
        }
        // The port of the old connection, used for a new one.
        let mut new = opens(40_000);
        assert_eq!(request(&mut new, &tables), Verdict::Rewritten);
        assert_eq!(seen(&new).destination, net.other_pod);
    }
}

#[test]
fn conversations_go_on_although_no_pod_is_left_for_new_ones() {
    let tables = tables(&[V4.external], &[V4.pod]);
    request(&mut plain(V4.client, V4.external, UDP, (40_000, 53)), &tables);
    set_pods(&tables, &[V4.external], &[], 2);
    drain(&tables, V4.pod);
    let mut ongoing = plain(V4.client, V4.external, UDP, (40_000, 53));
    assert_eq!(request(&mut ongoing, &tables), Verdict::Rewritten);
    assert_eq!(seen(&ongoing).destination, V4.pod);
    let mut new = plain(V4.client, V4.external, UDP, (40_001, 53));
    assert_eq!(request(&mut new, &tables), Verdict::Drop(DropReason::NoBackend));
}

fn drain(tables: &HostTables, pod: std::net::IpAddr) {
    tables.members.borrow_mut().insert(
        MemberKey { pod: pod.into(), service_id: SERVICE_ID, padding: 0 },
        MemberValue { since_generation: 1, flags: MEMBER_DRAINING },
    );
}

#[test]
fn an_idle_connection_outlives_a_short_affinity() {
    let tables = tables(&[V4.external], &[V4.pod]);
    for (from_client, flags) in [(true, 0x02), (false, 0x12), (true, 0x10)] {
        let mut packet = tcp(&V4, from_client, flags);
        if from_client {
            request(&mut packet, &tables)
        } else {
            reply(&mut packet, &tables)
        };
    }
    // Ten seconds of affinity, and a pod that a client choosing anew would go to.
    set_pods(&tables, &[V4.external], &[V4.pod, V4.other_pod], 2);
    tables.services.borrow_mut().values_mut().for_each(|service| service.affinity_timeout = 10);
    let chosen = |slot| BackendKey { service_id: SERVICE_ID, generation: 2, slot };
    for slot in [0, 1] {
        tables.backends.borrow_mut().insert(chosen(slot), BackendValue { pod: V4.other_pod.into() });
    }
    tables.now.set(tables.now.get() + 11 * SECOND);
    let mut packet = tcp(&V4, true, 0x18);
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    assert_eq!(seen(&packet).destination, V4.pod);
    assert_eq!(pod_of(&tables, &V4, V4.client, UDP, 1), V4.other_pod, "a new conversation chooses anew");
}

#[test]
fn a_packet_from_the_external_address_to_itself_is_dropped() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = plain(net.external, net.external, UDP, (7, 7));
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::SpoofedSource));
    }
}

#[test]
fn an_ipv6_packet_with_an_ipv4_address_inside_is_not_ipv4() {
    let tables = tables(&[V4.external], &[V4.pod]);
    let mapped = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(v4) => std::net::IpAddr::V6(v4.to_ipv6_mapped()),
        std::net::IpAddr::V6(v6) => v6.into(),
    };
    for (source, destination) in [(V6.client, mapped(V4.external)), (mapped(V4.client), mapped(V4.external))]
    {
        let mut packet = plain(source, destination, UDP, (1, 2));
        assert_eq!(request(&mut packet, &tables), Verdict::Next);
        assert!(tables.flows.borrow().is_empty());
    }
}

#[test]
fn a_flow_of_another_delivery_is_left_to_its_own_hook() {
    let tables = tables(&[V4.external], &[V4.pod]);
    request(&mut plain(V4.client, V4.external, UDP, (1, 2)), &tables);
    let (_, flow) = only_flow(&tables);
    flow.0.set(proxier_common::FlowValue { delivery: 200, ..flow.0.get() });
    assert_eq!(reply(&mut plain(V4.pod, V4.client, UDP, (2, 1)), &tables), Verdict::Next);
}

// Fragments.

fn fragments(net: &Net, source: std::net::IpAddr, destination: std::net::IpAddr) -> [HostPacket; 3] {
    let _ = net;
    let ports = if source == net.client { (40_000, 53) } else { (53, 40_000) };
    let bytes = seal(source, destination, UDP, segment(UDP, ports, &[0xab; 2_000]));
    let cut = |offset: u16, range: std::ops::Range<usize>, more| {
        let network = Network { fragment: Some((offset, more, 0x0bad_cafe)), ..Network::default() };
        frame(&network, source, destination, UDP, &bytes[range])
    };
    [cut(0, 0..800, true), cut(100, 800..1_600, true), cut(200, 1_600..2_008, false)]
}

fn payload_of(fragments: &[HostPacket]) -> Vec<u8> {
    fragments.iter().flat_map(|fragment| seen(fragment).segment).collect()
}

#[test]
fn fragments_of_a_request_reach_the_pod_in_any_order_and_fit_together() {
    for net in BOTH {
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let tables = tables(&[net.external], &[net.pod, net.other_pod]);
            let mut packets = fragments(&net, net.client, net.external);
            for index in order {
                assert_eq!(request(&mut packets[index], &tables), Verdict::Rewritten);
            }
            let pod = seen(&packets[0]).destination;
            assert!(packets.iter().all(|packet| seen(packet).destination == pod));
            let whole = payload_of(&packets);
            assert_eq!(transport_checksum(net.client, pod, UDP, &whole), [0, 0], "checksum of the whole");
            assert_eq!(tables.flows.borrow().len(), 1, "the first fragment notes the flow");
        }
    }
}

#[test]
fn fragments_of_a_reply_follow_the_first() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let mut packets = fragments(&net, net.pod, net.client);
        for packet in &mut packets {
            assert_eq!(reply(packet, &tables), Verdict::Rewritten);
            assert_eq!(seen(packet).source, net.external);
        }
        assert_eq!(transport_checksum(net.external, net.client, UDP, &payload_of(&packets)), [0, 0]);
        // A minute later the identification may be in use again.
        tables.now.set(tables.now.get() + 61 * SECOND);
        let [_, mut later, _] = fragments(&net, net.pod, net.client);
        assert_eq!(reply(&mut later, &tables), Verdict::Next);
    }
}

#[test]
fn fragments_of_a_pods_own_packet_are_untouched() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        for original in fragments(&net, net.pod, net.client) {
            let mut packet = original.clone();
            assert_eq!(reply(&mut packet, &tables), Verdict::Next);
            assert_eq!(packet, original);
        }
    }
}

#[test]
fn a_first_fragment_too_small_for_the_checksum_is_dropped() {
    for net in BOTH {
        for (protocol, enough) in [(TCP, 18), (UDP, 8), (DCCP, 8), (SCTP, 4)] {
            for (length, expected) in
                [(enough - 1, Verdict::Drop(DropReason::TinyFragment)), (enough, Verdict::Rewritten)]
            {
                let tables = tables(&[net.external], &[net.pod]);
                let network = Network { fragment: Some((0, true, 7)), ..Network::default() };
                let mut packet = frame(&network, net.client, net.external, protocol, &vec![1; length]);
                assert_eq!(request(&mut packet, &tables), expected, "{protocol}, {length} bytes");
            }
        }
    }
}

#[test]
fn an_ipv6_fragment_header_on_a_whole_packet_changes_nothing() {
    let tables = tables(&[V6.external], &[V6.pod]);
    let network = Network { fragment: Some((0, false, 7)), ..Network::default() };
    let mut packet = packet(&network, V6.client, V6.external, TCP, (40_000, 443), b"atomic");
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    assert_checksums(&packet);
    assert_eq!(tables.flows.borrow().len(), 1);
}

#[test]
fn two_first_packets_at_once_agree_on_the_flow() {
    // What `insert_flow` meets when another CPU was faster: a table that changes between look-up and insert.
    struct Racing<'a> {
        tables: &'a HostTables,
        other: Option<Address>,
        raced: Cell<bool>,
    }
    impl proxier_ebpf::Tables for Racing<'_> {
        type Flow = HostFlow;
        type Session = proxier_ebpf::host::HostSession;
        fn now(&self) -> u64 {
            self.tables.now()
        }
        fn service(&self, key: &ExternalKey) -> Option<proxier_common::ServiceValue> {
            self.tables.service(key)
        }
        fn backend(&self, key: &proxier_common::BackendKey) -> Option<proxier_common::BackendValue> {
            self.tables.backend(key)
        }
        fn member(&self, key: &proxier_common::MemberKey) -> Option<proxier_common::MemberValue> {
            self.tables.member(key)
        }
        fn session(&self, key: &SessionKey) -> Option<Self::Session> {
            self.tables.session(key)
        }
        fn put_session(&self, key: &SessionKey, value: &proxier_common::SessionValue) {
            self.tables.put_session(key, value);
        }
        fn flow(&self, key: &FlowKey) -> Option<HostFlow> {
            if self.raced.get() { self.tables.flow(key) } else { None }
        }
        fn insert_flow(
            &self,
            key: &FlowKey,
            value: &proxier_common::FlowValue,
        ) -> Result<(), proxier_ebpf::InsertError> {
            self.raced.set(true);
            if let Some(external) = self.other {
                let other = proxier_common::FlowValue { external, ..*value };
                self.tables.replace_flow(key, &other)?;
            }
            Err(proxier_ebpf::InsertError::Exists)
        }
        fn replace_flow(
            &self,
            key: &FlowKey,
            value: &proxier_common::FlowValue,
        ) -> Result<(), proxier_ebpf::InsertError> {
            self.tables.replace_flow(key, value)
        }
        fn remove_flow(&self, key: &FlowKey) {
            self.tables.remove_flow(key);
        }
        fn remove_fragment(&self, key: &proxier_common::FragmentKey) {
            self.tables.remove_fragment(key);
        }
        fn fragment(&self, key: &proxier_common::FragmentKey) -> Option<proxier_common::FragmentValue> {
            self.tables.fragment(key)
        }
        fn put_fragment(&self, key: &proxier_common::FragmentKey, value: &proxier_common::FragmentValue) {
            self.tables.put_fragment(key, value);
        }
    }
    for (other, expected) in [
        (Some(V4.external), Verdict::Rewritten),
        (Some(V4.other_external), Verdict::Drop(DropReason::FlowCollision)),
        (None, Verdict::Drop(DropReason::FlowCollision)),
    ] {
        let tables = tables(&[V4.external], &[V4.pod]);
        let racing = Racing { tables: &tables, other: other.map(Address::from), raced: Cell::new(false) };
        let mut packet = plain(V4.client, V4.external, UDP, (1, 2));
        assert_eq!(request(&mut packet, &racing), expected);
    }
}

// Pods as clients.

#[test]
fn a_pod_reaches_another_through_the_external_address() {
    for net in BOTH {
        for protocol in ALL_PROTOCOLS {
            let tables = tables(&[net.external], &[net.other_pod]);
            let mut packet = plain(net.pod, net.external, protocol, (40_000, 6_001));
            assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Rewritten);
            assert_checksums(&packet);
            assert_eq!((seen(&packet).source, seen(&packet).destination), (net.pod, net.other_pod));
            let mut packet = plain(net.other_pod, net.pod, protocol, (6_001, 40_000));
            assert_eq!(reply(&mut packet, &tables), Verdict::Rewritten);
            assert_checksums(&packet);
            assert_eq!((seen(&packet).source, seen(&packet).destination), (net.external, net.pod));
        }
    }
}

#[test]
fn a_pod_that_is_its_own_backend_gets_its_packet_back_from_the_external_address() {
    for net in BOTH {
        for protocol in ALL_PROTOCOLS {
            let tables = tables(&[net.external], &[net.pod]);
            // What the pod's server sends back to what it takes for its client is turned round in the same way.
            for ports in [(40_000, 443), (443, 40_000)] {
                let mut packet = plain(net.pod, net.external, protocol, ports);
                assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Hairpin, "{protocol}");
                assert_eq!(packet, plain(net.external, net.pod, protocol, ports));
            }
            assert!(tables.flows.borrow().is_empty(), "it needs none");
        }
    }
}

#[test]
fn a_packet_from_outside_with_the_pods_address_is_not_sent_back() {
    let tables = tables(&[V4.external], &[V4.pod]);
    let mut packet = plain(V4.pod, V4.external, UDP, (40_000, 53));
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
}
