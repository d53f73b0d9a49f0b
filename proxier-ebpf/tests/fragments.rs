//! Packets in pieces: every fragment goes the way of the first. As `paths.rs`: one test per thing that must hold.

mod common;

use common::*;
use proxier_common::{DropReason, timeout::SECOND};
use proxier_ebpf::{Verdict, host::HostPacket};

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

/// A conversation that stays with the pod that its client was on before takes the rest of its packets along.
#[test]
fn later_fragments_follow_the_first_to_a_former_pod() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        set_pods(&tables, &[net.external], &[net.other_pod], 2);
        drain(&tables, net.pod);
        let segment = seal(net.client, net.external, UDP, segment(UDP, (40_000, 53), &[7; 64]));
        let part = |fragment, bytes: &[u8]| {
            let network = Network { fragment: Some(fragment), ..Network::default() };
            frame(&network, net.client, net.external, UDP, bytes)
        };
        let to_pod = |packet: &HostPacket| {
            let pod = proxier_common::Address::from(net.pod).bytes;
            let at = if net.icmp == ICMP { 30..34 } else { 38..54 };
            packet.bytes[at.clone()] == pod[16 - at.len()..]
        };
        let mut first = part((0, true, 9), &segment[..40]);
        assert_eq!(request(&mut first, &tables), Verdict::Rewritten);
        let mut later = part((5, false, 9), &segment[40..]);
        assert_eq!(request(&mut later, &tables), Verdict::Rewritten);
        assert!(to_pod(&first) && to_pod(&later));
        // Another packet's, of which no first fragment has come by: to the pod that the client is on now.
        let mut other = part((5, false, 10), &segment[40..]);
        assert_eq!(request(&mut other, &tables), Verdict::Rewritten);
        assert!(!to_pod(&other));
    }
}
