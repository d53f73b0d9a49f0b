//! Delivery past the node's stack: which conversations go so, what a router does to their packets, and what is left to the
//! stack instead (docs/decisions/017).

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod common;

use common::*;
use proxier_common::{Address, DELIVERY_DIRECT, DELIVERY_PEER, DELIVERY_STACK, POD_HAS_PEER, SERVICE_DIRECT};
use proxier_ebpf::{
    Verdict, Way,
    host::{HostPacket, HostTables},
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
    }
}

/// A packet of the pod, at the ingress of its link.
fn reply_at_link(packet: &mut HostPacket, tables: &HostTables) -> Verdict {
    packet.link = LINK;
    assert_eq!(request_of_pod(packet, tables), Verdict::Next);
    proxier_ebpf::reply(packet, tables, DELIVERY_DIRECT)
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

#[test]
fn both_directions_pass_the_stack_by_and_lose_one_hop() {
    for net in BOTH {
        for (flags, verdict, delivery) in
            [(POD_HAS_PEER, Verdict::IntoPod, DELIVERY_PEER), (0, Verdict::Direct, DELIVERY_DIRECT)]
        {
            for protocol in ALL_PROTOCOLS {
                let tables = direct_tables(&net);
                link_pods(&tables, LINK, flags);
                let mut packet = plain(net.client, net.external, protocol, (40_000, 53));
                assert_eq!(request(&mut packet, &tables), verdict, "{protocol}");
                assert_eq!(packet, one_router_on(&net, plain(net.client, net.pod, protocol, (40_000, 53))));
                assert_eq!(only_delivery(&tables), delivery);
                let (client, pod) = (Address::from(net.client), Address::from(net.pod));
                assert_eq!(packet.asked.map(|(from, to, _)| (from, to)), Some((client, pod)));
                let mut answer = plain(net.pod, net.client, protocol, (53, 40_000));
                assert_eq!(reply_at_link(&mut answer, &tables), Verdict::Direct, "{protocol}");
                assert_eq!(
                    answer,
                    one_router_on(&net, plain(net.external, net.client, protocol, (53, 40_000)))
                );
                let (external, length) = (Address::from(net.external), answer.bytes.len() - 14);
                assert_eq!(answer.asked, Some((external, client, length.try_into().unwrap())));
            }
        }
    }
}

#[test]
fn an_established_request_costs_three_look_ups() {
    for net in BOTH {
        let tables = direct_tables(&net);
        for _ in 0..2 {
            tables.lookups.set(0);
            request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        }
        assert_eq!(tables.lookups.get(), 3);
    }
}

#[test]
fn a_conversation_keeps_its_way_when_the_setting_changes() {
    for net in BOTH {
        let direct = direct_tables(&net);
        let ask = |tables: &HostTables, port| {
            request(&mut plain(net.client, net.external, UDP, (port, 53)), tables)
        };
        assert_eq!(ask(&direct, 40_000), Verdict::IntoPod);
        for service in direct.services.borrow_mut().values_mut() {
            service.flags &= !SERVICE_DIRECT;
        }
        assert_eq!(ask(&direct, 40_000), Verdict::IntoPod);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_at_link(&mut answer, &direct), Verdict::Direct);
        assert_eq!(ask(&direct, 40_001), Verdict::Rewritten, "a new one");
        set_flags(&direct, SERVICE_DIRECT);
        assert_eq!(ask(&direct, 40_001), Verdict::Rewritten, "one through the stack");
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_001));
        assert_eq!(reply_at_link(&mut answer, &direct), Verdict::Next);
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
fn a_request_without_a_way_goes_on_through_the_stack_with_its_hop_limit() {
    for net in BOTH {
        for way in [Way::TooNarrow, Way::None] {
            let tables = direct_tables(&net);
            let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
            packet.way = way;
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
            assert_eq!(packet, plain(net.client, net.pod, UDP, (40_000, 53)));
        }
        let tables = direct_tables(&net);
        let mut packet = with_hop_limit(&net, plain(net.client, net.external, UDP, (40_000, 53)), 1);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(packet, with_hop_limit(&net, plain(net.client, net.pod, UDP, (40_000, 53)), 1));
        assert_eq!(packet.asked, None);
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
        assert_eq!(reply_at_link(&mut lost, &tables), Verdict::Next);
        assert_eq!(lost, answer());
        let last = || with_hop_limit(&net, answer(), 1);
        let mut packet = last();
        assert_eq!(reply_at_link(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, last());
        // Should it come to the uplink all the same, it is rewritten there.
        assert_eq!(reply(&mut lost, &tables), Verdict::Rewritten);
        assert_eq!(lost, plain(net.external, net.client, UDP, (53, 40_000)));
    }
}

#[test]
fn a_reply_too_large_is_fragmented_by_the_stack_if_a_router_may() {
    for (net, verdict) in [(V4, Verdict::FromUplink), (V6, Verdict::Next)] {
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        answer.way = Way::TooNarrow;
        assert_eq!(reply_at_link(&mut answer, &tables), verdict);
        let source = if verdict == Verdict::Next { net.pod } else { net.external };
        // Its hop is the stack's to count.
        assert_eq!(answer, plain(source, net.client, UDP, (53, 40_000)));
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
            request(&mut packet, &tables);
            assert_eq!(packet.asked.unwrap().2, header + transport + 1_400);
        }
    }
}

#[test]
fn a_reply_by_another_link_than_the_pods_stays_on_it() {
    for net in BOTH {
        let tables = direct_tables(&net);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let mut spoofed = plain(net.pod, net.client, UDP, (53, 40_000));
        spoofed.link = LINK + 1;
        assert_eq!(proxier_ebpf::reply(&mut spoofed, &tables, DELIVERY_DIRECT), Verdict::Next);
        assert_eq!(spoofed, plain(net.pod, net.client, UDP, (53, 40_000)));
    }
}
