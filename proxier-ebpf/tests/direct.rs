//! Delivery past the node's stack: which conversations go so, what a router does to their packets, and what is left to the
//! stack instead (docs/decisions/017).

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod common;

use std::{net::IpAddr, ops::Range};

use common::*;
use proxier_common::{
    Address, DELIVERY_DIRECT, DELIVERY_PEER, DELIVERY_STACK, MAX_POD_LINKS, POD_HAS_PEER, PodLinkValue,
    SERVICE_DIRECT,
};
use proxier_ebpf::{
    Verdict, Way,
    host::{HostPacket, HostTables},
    packet::SEGMENTS_VARY,
};

/// The node's link to the pod.
const LINK: u32 = 7;

/// Tables of a Service that is delivered directly, to a pod behind [`LINK`].
fn direct_tables(net: &Net) -> HostTables {
    let tables = tables(&[net.external], &[net.pod]);
    set_flags(&tables, SERVICE_DIRECT);
    link_pods(&tables, LINK, POD_HAS_PEER);
    tables
}

fn link_pods(tables: &HostTables, interface: u32, flags: u32) {
    for pod in tables.pods.borrow_mut().values_mut() {
        pod.interface = interface;
        pod.flags = pod.flags & !POD_HAS_PEER | flags;
        tables.pod_links.borrow_mut().extend(PodLinkValue::of(pod));
    }
}

/// What was asked of the routing: source, destination and length.
type Asked = Option<(Address, Address, u32)>;

/// A packet from outside, and what is left of its way if it goes past the stack: by [`LINK`], says the routing.
fn request_onward(packet: &mut HostPacket, tables: &HostTables) -> (Verdict, Asked) {
    request_routed(packet, tables, LINK)
}

/// As [`request_onward`], where the routing names this interface.
fn request_routed(packet: &mut HostPacket, tables: &HostTables, onward: u32) -> (Verdict, Asked) {
    packet.onward = onward;
    let mut asked = None;
    let verdict = match request(packet, tables) {
        verdict @ (Verdict::Forward | Verdict::ForwardIntoPod) => {
            let into_pod = verdict == Verdict::ForwardIntoPod;
            proxier_ebpf::forward_to_pod(packet, tables, into_pod, &mut asked)
        }
        verdict => verdict,
    };
    (verdict, asked)
}

/// A packet of the pod, at the ingress of its link.
fn reply_at_link(packet: &mut HostPacket, tables: &HostTables) -> (Verdict, Asked) {
    packet.link = LINK;
    let mut asked = None;
    let verdict = proxier_ebpf::reply_directly(packet, tables, &mut asked);
    (verdict, asked)
}

/// The same packet behind one router more.
fn one_router_on(net: &Net, packet: HostPacket) -> HostPacket {
    let mut bytes = packet.bytes;
    if net.client.is_ipv4() {
        bytes[14 + 8] -= 1;
        bytes[14 + 10..14 + 12].fill(0);
        let checksum = internet_checksum::checksum(&bytes[14..34]);
        bytes[14 + 10..14 + 12].copy_from_slice(&checksum);
    } else {
        bytes[14 + 7] -= 1;
    }
    HostPacket::new(bytes)
}

fn with_hop_limit(net: &Net, mut packet: HostPacket, limit: u8) -> HostPacket {
    packet.bytes[14 + if net.client.is_ipv4() { 8 } else { 7 }] = limit + 1;
    one_router_on(net, packet)
}

fn only_delivery(tables: &HostTables) -> u8 {
    let flows = tables.flows.borrow();
    assert_eq!(flows.len(), 1);
    flows.values().next().unwrap().0.get().delivery
}

/// Length without the Ethernet header.
fn length(packet: &HostPacket) -> u32 {
    (packet.bytes.len() - 14).try_into().unwrap()
}

#[test]
fn both_directions_pass_the_stack_by_and_lose_one_hop() {
    for net in BOTH {
        for (flags, expected, delivery) in
            [(POD_HAS_PEER, Verdict::ForwardIntoPod, DELIVERY_PEER), (0, Verdict::Forward, DELIVERY_DIRECT)]
        {
            for protocol in ALL_PROTOCOLS {
                let tables = direct_tables(&net);
                link_pods(&tables, LINK, flags);
                let (client, pod, external) =
                    (Address::from(net.client), Address::from(net.pod), Address::from(net.external));
                let mut packet = plain(net.client, net.external, protocol, (40_000, 53));
                let (verdict, asked) = request_onward(&mut packet, &tables);
                assert_eq!(verdict, expected, "{protocol}");
                assert_eq!(packet, one_router_on(&net, plain(net.client, net.pod, protocol, (40_000, 53))));
                assert_eq!(only_delivery(&tables), delivery);
                assert_eq!(asked, Some((client, pod, length(&packet))));
                let mut answer = plain(net.pod, net.client, protocol, (53, 40_000));
                let (verdict, asked) = reply_at_link(&mut answer, &tables);
                assert_eq!(verdict, Verdict::Direct, "{protocol}");
                assert_eq!(
                    answer,
                    one_router_on(&net, plain(net.external, net.client, protocol, (53, 40_000)))
                );
                assert_eq!(asked, Some((external, client, length(&answer))));
            }
        }
    }
}

#[test]
fn an_established_request_costs_three_look_ups_and_a_reply_two() {
    for net in BOTH {
        let tables = direct_tables(&net);
        for _ in 0..2 {
            tables.lookups.set(0);
            request_onward(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        }
        assert_eq!(tables.lookups.get(), 3);
        tables.lookups.set(0);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut answer, &tables).0, Verdict::Direct);
        assert_eq!(tables.lookups.get(), 2);
        tables.lookups.set(0);
        let mut own = plain(net.other_pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut own, &tables).0, Verdict::Next);
        assert_eq!(tables.lookups.get(), 1, "of a pod that belongs to no Service");
    }
}

#[test]
fn a_conversation_keeps_its_way_when_the_setting_changes() {
    for net in BOTH {
        let direct = direct_tables(&net);
        let ask = |tables: &HostTables, port| {
            request_onward(&mut plain(net.client, net.external, UDP, (port, 53)), tables).0
        };
        assert_eq!(ask(&direct, 40_000), Verdict::ForwardIntoPod);
        for service in direct.services.borrow_mut().values_mut() {
            service.flags &= !SERVICE_DIRECT;
        }
        assert_eq!(ask(&direct, 40_000), Verdict::ForwardIntoPod);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut answer, &direct).0, Verdict::Direct);
        assert_eq!(ask(&direct, 40_001), Verdict::Rewritten, "a new one");
        set_flags(&direct, SERVICE_DIRECT);
        assert_eq!(ask(&direct, 40_001), Verdict::Rewritten, "one through the stack");
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_001));
        assert_eq!(reply_at_link(&mut answer, &direct).0, Verdict::Next);
        assert_eq!(reply(&mut answer, &direct), Verdict::Rewritten);
    }
}

#[test]
fn a_pod_that_cannot_be_reached_so_is_reached_through_the_stack() {
    for net in BOTH {
        let tables = direct_tables(&net);
        link_pods(&tables, 0, 0);
        let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(packet, plain(net.client, net.pod, UDP, (40_000, 53)));
        assert_eq!(only_delivery(&tables), DELIVERY_STACK);
    }
}

#[test]
fn a_client_with_an_address_that_leads_to_this_node_is_not_answered_directly() {
    for net in BOTH {
        let tables = tables(&[net.external, net.other_external], &[net.pod]);
        set_flags(&tables, SERVICE_DIRECT);
        link_pods(&tables, LINK, POD_HAS_PEER);
        let mut packet = plain(net.other_external, net.external, UDP, (40_000, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(only_delivery(&tables), DELIVERY_STACK);
        let mut own = plain(net.pod, net.other_external, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut own, &tables).0, Verdict::Next, "the pod is a client here");
    }
}

#[test]
fn a_request_without_a_way_goes_on_through_the_stack_with_its_hop_limit() {
    for net in BOTH {
        for way in [Way::TooNarrow, Way::None] {
            let tables = direct_tables(&net);
            let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
            packet.way = way;
            assert_eq!(request_onward(&mut packet, &tables).0, Verdict::Rewritten);
            assert_eq!(packet, plain(net.client, net.pod, UDP, (40_000, 53)));
        }
        for limit in [0, 1] {
            let tables = direct_tables(&net);
            let mut packet = with_hop_limit(&net, plain(net.client, net.external, UDP, (40_000, 53)), limit);
            assert_eq!(request_onward(&mut packet, &tables), (Verdict::Rewritten, None));
            assert_eq!(packet, with_hop_limit(&net, plain(net.client, net.pod, UDP, (40_000, 53)), limit));
        }
    }
}

#[test]
fn a_request_goes_into_the_pod_only_where_the_link_that_the_routing_names_now_has_a_peer() {
    const BRIDGE: u32 = LINK + 1;
    const OTHER_POD: u32 = LINK + 2;
    const UNKNOWN: u32 = LINK + 3;
    for net in BOTH {
        let tables = direct_tables(&net);
        let mut pod = *tables.pods.borrow().values().next().unwrap();
        for (interface, flags) in [(BRIDGE, 0), (OTHER_POD, POD_HAS_PEER)] {
            (pod.interface, pod.flags) = (interface, flags);
            tables.pod_links.borrow_mut().extend(PodLinkValue::of(&pod));
        }
        let ask = |onward| {
            let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
            (request_routed(&mut packet, &tables, onward).0, packet)
        };
        let rewritten = || plain(net.client, net.pod, UDP, (40_000, 53));
        for (onward, expected) in [
            (LINK, Verdict::ForwardIntoPod),
            (BRIDGE, Verdict::Forward),
            (OTHER_POD, Verdict::ForwardIntoPod),
            (UNKNOWN, Verdict::Rewritten),
            // It would share an entry.
            (LINK + MAX_POD_LINKS, Verdict::Rewritten),
            (LINK, Verdict::ForwardIntoPod),
        ] {
            let (verdict, packet) = ask(onward);
            assert_eq!(verdict, expected, "by {onward}");
            let hops = expected != Verdict::Rewritten;
            assert_eq!(packet, if hops { one_router_on(&net, rewritten()) } else { rewritten() });
        }
        assert_eq!(only_delivery(&tables), DELIVERY_PEER, "the conversation is one all the time");
        // Of two with one entry it is that of the last.
        (pod.interface, pod.flags) = (LINK + MAX_POD_LINKS, POD_HAS_PEER);
        tables.pod_links.borrow_mut().extend(PodLinkValue::of(&pod));
        assert_eq!(ask(LINK).0, Verdict::Rewritten);
        assert_eq!(ask(LINK + MAX_POD_LINKS).0, Verdict::ForwardIntoPod);
    }
}

#[test]
fn a_reply_without_a_way_is_left_to_the_stack_as_the_pods() {
    for net in BOTH {
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let answer = || plain(net.pod, net.client, UDP, (53, 40_000));
        let mut lost = answer();
        lost.way = Way::None;
        assert_eq!(reply_at_link(&mut lost, &tables).0, Verdict::Next);
        assert_eq!(lost, answer());
        for limit in [0, 1] {
            let last = || with_hop_limit(&net, answer(), limit);
            let mut packet = last();
            assert_eq!(reply_at_link(&mut packet, &tables), (Verdict::Next, None));
            assert_eq!(packet, last());
        }
        // Should it come to the uplink all the same, it is rewritten there.
        assert_eq!(reply(&mut lost, &tables), Verdict::Rewritten);
        assert_eq!(lost, plain(net.external, net.client, UDP, (53, 40_000)));
    }
}

#[test]
fn a_reply_too_large_is_fragmented_by_the_stack_if_a_router_may() {
    for (net, expected) in [(V4, Verdict::FromUplink), (V6, Verdict::Next)] {
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        answer.way = Way::TooNarrow;
        assert_eq!(reply_at_link(&mut answer, &tables).0, expected);
        let source = if expected == Verdict::Next { net.pod } else { net.external };
        // Its hop is the stack's to count.
        assert_eq!(answer, plain(source, net.client, UDP, (53, 40_000)));
    }
    // Don't fragment.
    let tables = direct_tables(&V4);
    request(&mut plain(V4.client, V4.external, UDP, (40_000, 53)), &tables);
    let mut answer = plain(V4.pod, V4.client, UDP, (53, 40_000));
    answer.bytes[14 + 6] |= 0x40;
    let original = answer.clone();
    answer.way = Way::TooNarrow;
    assert_eq!(reply_at_link(&mut answer, &tables).0, Verdict::Next);
    assert_eq!(answer, original);
}

/// A packet between these two in three pieces.
fn fragments(source: IpAddr, destination: IpAddr, ports: (u16, u16)) -> [HostPacket; 3] {
    let bytes = seal(source, destination, UDP, segment(UDP, ports, &[0xab; 2_000]));
    let cut = |offset: u16, range: Range<usize>, more| {
        let network = Network { fragment: Some((offset, more, 0x0bad_cafe)), ..Network::default() };
        frame(&network, source, destination, UDP, &bytes[range])
    };
    [cut(0, 0..800, true), cut(100, 800..1_600, true), cut(200, 1_600..2_008, false)]
}

#[test]
fn fragments_of_a_request_go_through_the_stack_all_of_them() {
    for net in BOTH {
        let tables = direct_tables(&net);
        for mut packet in fragments(net.client, net.external, (40_000, 53)) {
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
            assert_eq!(seen(&packet).destination, net.pod);
        }
        assert_eq!(only_delivery(&tables), DELIVERY_PEER, "what answers them is no fragment, or its own");
    }
}

#[test]
fn fragments_of_a_reply_all_take_the_way_of_the_first() {
    for net in BOTH {
        let mut first_ways = vec![(Way::Open, Verdict::Direct), (Way::None, Verdict::Next)];
        // Only IPv4 lets routers fragment.
        let too_narrow = if net.client.is_ipv4() { Verdict::FromUplink } else { Verdict::Next };
        first_ways.push((Way::TooNarrow, too_narrow));
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        // The identification is the same for all of these packets: what is remembered is of the last one.
        for (way, expected) in [first_ways.clone(), first_ways].concat() {
            let [mut first, mut second, mut last] = fragments(net.pod, net.client, (53, 40_000));
            first.way = way;
            assert_eq!(reply_at_link(&mut first, &tables).0, expected, "{way:?}");
            for rest in [&mut second, &mut last] {
                assert_eq!(reply_at_link(rest, &tables).0, expected, "{way:?}, and the rest would fit");
            }
            let source = if expected == Verdict::Next { net.pod } else { net.external };
            assert!([&first, &second, &last].iter().all(|packet| seen(packet).source == source));
        }
    }
}

#[test]
fn what_is_segmented_later_is_judged_by_its_segments() {
    for net in BOTH {
        let header = if net.client.is_ipv4() { 20 } else { 40 };
        for (protocol, transport) in [(TCP, 20), (UDP, 8)] {
            let tables = direct_tables(&net);
            let mut packet = plain(net.client, net.external, protocol, (40_000, 53));
            packet.segment_size = 1_400;
            let (_, asked) = request_onward(&mut packet, &tables);
            assert_eq!(asked.unwrap().2, header + transport + 1_400);
            let mut answer = plain(net.pod, net.client, protocol, (53, 40_000));
            answer.segment_size = 1_400;
            let (_, asked) = reply_at_link(&mut answer, &tables);
            assert_eq!(asked.unwrap().2, header + transport + 1_400);
        }
    }
}

#[test]
fn whose_packets_the_stack_would_not_forward_is_not_served_past_it() {
    for net in BOTH {
        let tables = direct_tables(&net);
        let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
        packet.is_strange = true;
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(only_delivery(&tables), DELIVERY_STACK);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut answer, &tables).0, Verdict::Next);
    }
}

#[test]
fn of_segments_that_differ_the_stack_knows_whether_they_fit() {
    for net in BOTH {
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, SCTP, (40_000, 53)), &tables);
        let mut answer = plain(net.pod, net.client, SCTP, (53, 40_000));
        answer.segment_size = SEGMENTS_VARY;
        assert_eq!(reply_at_link(&mut answer, &tables).0, Verdict::FromUplink);
        assert_eq!(seen(&answer).source, net.external);
    }
}

#[test]
fn a_reply_by_another_link_than_the_pods_stays_on_it() {
    for net in BOTH {
        let tables = direct_tables(&net);
        let there = || plain(net.client, net.external, UDP, (40_000, 53));
        request(&mut there(), &tables);
        let mut spoofed = plain(net.pod, net.client, UDP, (53, 40_000));
        spoofed.link = LINK + 1;
        let untouched = spoofed.clone();
        assert_eq!(proxier_ebpf::reply_directly(&mut spoofed, &tables, &mut None), Verdict::Next);
        assert_eq!(spoofed, untouched);
        let about = plain(net.client, net.pod, UDP, (40_000, 53));
        let [kind, _] = errors(&net);
        let mut spoofed = error(&net, net.pod, net.client, kind, &about, usize::MAX);
        spoofed.link = LINK + 1;
        let untouched = spoofed.clone();
        assert_eq!(proxier_ebpf::reply_directly(&mut spoofed, &tables, &mut None), Verdict::Next);
        assert_eq!(spoofed, untouched);
    }
}

#[test]
fn errors_go_the_way_of_what_they_are_about() {
    for net in BOTH {
        for (flags, expected) in [(POD_HAS_PEER, Verdict::ForwardIntoPod), (0, Verdict::Forward)] {
            let tables = direct_tables(&net);
            link_pods(&tables, LINK, flags);
            request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
            for kind in errors(&net) {
                let about_reply = plain(net.external, net.client, UDP, (53, 40_000));
                let mut inbound = error(&net, router(&net), net.external, kind, &about_reply, usize::MAX);
                assert_eq!(request_onward(&mut inbound, &tables).0, expected);
                let about_it = plain(net.pod, net.client, UDP, (53, 40_000));
                assert_eq!(
                    inbound,
                    one_router_on(&net, error(&net, router(&net), net.pod, kind, &about_it, usize::MAX))
                );
                let about_request = plain(net.client, net.pod, UDP, (40_000, 53));
                let mut outbound = error(&net, net.pod, net.client, kind, &about_request, usize::MAX);
                let (verdict, asked) = reply_at_link(&mut outbound, &tables);
                assert_eq!((verdict, asked), (Verdict::Forward, None));
                let onward = proxier_ebpf::forward_to_client(&mut outbound, &mut None);
                assert_eq!(onward, Verdict::Forward, "by whatever leads there");
                let about_it = plain(net.client, net.external, UDP, (40_000, 53));
                assert_eq!(
                    outbound,
                    one_router_on(&net, error(&net, net.external, net.client, kind, &about_it, usize::MAX))
                );
            }
        }
    }
}

#[test]
fn an_evicted_flow_is_made_again_as_a_direct_one_where_a_new_one_would_be() {
    for net in BOTH {
        for (flags, delivery) in [(POD_HAS_PEER, DELIVERY_PEER), (0, DELIVERY_DIRECT)] {
            let tables = direct_tables(&net);
            link_pods(&tables, LINK, flags | SERVICE_DIRECT);
            request(&mut tcp(&net, true, 0x02), &tables);
            assert_eq!(reply_at_link(&mut tcp(&net, false, 0x12), &tables).0, Verdict::Direct);
            request(&mut tcp(&net, true, 0x10), &tables);
            tables.flows.borrow_mut().clear();
            assert_eq!(reply_at_link(&mut tcp(&net, false, 0x18), &tables).0, Verdict::Direct);
            assert_eq!(only_delivery(&tables), delivery);
            tables.flows.borrow_mut().clear();
            for pod in tables.pods.borrow_mut().values_mut() {
                pod.flags &= !SERVICE_DIRECT;
            }
            assert_eq!(reply_at_link(&mut tcp(&net, false, 0x18), &tables).0, Verdict::Next);
            assert_eq!(reply(&mut tcp(&net, false, 0x18), &tables), Verdict::Rewritten);
            assert_eq!(only_delivery(&tables), DELIVERY_STACK);
        }
    }
}
