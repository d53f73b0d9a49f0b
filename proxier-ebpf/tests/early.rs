//! Packets that XDP sees before tc does: what of them is rewritten there, and what is left as it is.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod common;

use common::{
    early::{Early, left_to_hardware},
    *,
};
use proxier_common::{DropReason, POD_HAS_PEER, SERVICE_DIRECT, SERVICE_PASS_WITHOUT_BACKEND, is_direct};
use proxier_ebpf::{FlowEntry as _, Origin, Verdict, host::HostPacket};

const ALL_PROTOCOLS: [u8; 7] = [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP];

fn early(packet: HostPacket, tables: &proxier_ebpf::host::HostTables) -> (Verdict, Early) {
    let mut early = Early::new(packet);
    let verdict = proxier_ebpf::request(&mut early, tables, Origin::Outside);
    (verdict, early)
}

#[test]
fn what_is_rewritten_is_what_tc_would_make_of_it_and_is_marked() {
    for net in BOTH {
        for protocol in ALL_PROTOCOLS {
            let packet = plain(net.client, net.external, protocol, (40_000, 53));
            let (verdict, seen) = early(packet.clone(), &tables(&[net.external], &[net.pod]));
            assert_eq!((verdict, seen.is_marked), (Verdict::Rewritten, true), "{protocol}");
            let mut by_tc = packet;
            request(&mut by_tc, &tables(&[net.external], &[net.pod]));
            assert_eq!(seen.packet, by_tc, "{protocol}");
            assert_checksums(&seen.packet);
        }
    }
}

/// A complete checksum is the complement of a sum and this one a sum: one arithmetic would make a wrong one of the other.
#[test]
fn a_checksum_that_may_be_left_to_the_hardware_stays_as_it_is() {
    for net in BOTH {
        for protocol in [TCP, UDP] {
            let tables = tables(&[net.external], &[net.pod]);
            let packet = left_to_hardware(&net, protocol);
            let (verdict, seen) = early(packet.clone(), &tables);
            assert_eq!((verdict, seen.is_claimed), (Verdict::Next, false), "{protocol}");
            assert_eq!(seen.packet, packet);
            assert!(tables.flows.borrow().is_empty() && tables.sessions.borrow().is_empty());
        }
    }
}

#[test]
fn a_udp_packet_without_a_checksum_is_rewritten() {
    for net in BOTH {
        let mut bytes = segment(UDP, (40_000, 53), b"no checksum");
        bytes[6..8].fill(0);
        let packet = frame(&Network::default(), net.client, net.external, UDP, &bytes);
        let (verdict, rewritten) = early(packet, &tables(&[net.external], &[net.pod]));
        assert_eq!(verdict, Verdict::Rewritten);
        assert_eq!(seen(&rewritten.packet).segment[6..8], [0, 0]);
    }
}

#[test]
fn without_room_for_a_mark_all_but_drops_is_left_to_tc() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let mut packet = Early::new(plain(net.client, net.external, UDP, (40_000, 53)));
        packet.has_room = false;
        assert_eq!(proxier_ebpf::request(&mut packet, &tables, Origin::Outside), Verdict::Next);
        assert_eq!(packet.packet, plain(net.client, net.external, UDP, (40_000, 53)));
        assert!(tables.flows.borrow().is_empty());
        let spoofed = plain(net.external, net.external, UDP, (40_000, 53));
        assert_eq!(early(spoofed, &tables).0, Verdict::Drop(DropReason::SpoofedSource));
    }
}

/// Neither delivered nor dropped: that is up to whoever it is for.
#[test]
fn a_frame_for_another_host_is_left_as_it_is() {
    for net in BOTH {
        for pods in [&[net.pod][..], &[]] {
            let tables = tables(&[net.external], pods);
            let about_reply = plain(net.external, net.client, UDP, (53, 40_000));
            let error = error(&net, router(&net), net.external, errors(&net)[0], &about_reply, usize::MAX);
            let spoofed = plain(net.external, net.external, UDP, (40_000, 53));
            for packet in [plain(net.client, net.external, UDP, (40_000, 53)), error, spoofed] {
                let mut seen = Early { is_for_host: false, ..Early::new(packet.clone()) };
                assert_eq!(proxier_ebpf::request(&mut seen, &tables, Origin::Outside), Verdict::Next);
                assert_eq!((seen.packet, seen.is_claimed), (packet, false));
            }
            assert!(tables.flows.borrow().is_empty() && tables.sessions.borrow().is_empty());
        }
    }
}

#[test]
fn drops_are_decided_early() {
    for net in BOTH {
        let tables = tables(&[net.external], &[]);
        let packet = || plain(net.client, net.external, UDP, (40_000, 53));
        assert_eq!(early(packet(), &tables).0, Verdict::Drop(DropReason::NoBackend));
        set_flags(&tables, SERVICE_PASS_WITHOUT_BACKEND);
        let (verdict, seen) = early(packet(), &tables);
        assert_eq!((verdict, seen.is_marked), (Verdict::Next, false));
        assert_eq!(seen.packet, packet());
    }
}

#[test]
fn a_packet_to_a_pods_own_address_is_left_to_tc_with_its_flow() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        early(plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let straight = plain(net.client, net.pod, UDP, (40_000, 53));
        assert_eq!(early(straight.clone(), &tables).0, Verdict::Next);
        assert_eq!(tables.flows.borrow().len(), 1);
        // tc, unless it finds the mark.
        request(&mut straight.clone(), &tables);
        assert_eq!(tables.flows.borrow().len(), 0);
    }
}

/// Only tc can tell whether a packet can go so, such as one whose tag the card has taken off; and whoever decides has the flow to
/// note.
#[test]
fn what_is_delivered_directly_is_all_of_tc() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        set_flags(&tables, SERVICE_DIRECT | POD_HAS_PEER);
        tables.pods.borrow_mut().values_mut().for_each(|pod| pod.interface = 7);
        let packet = plain(net.client, net.external, UDP, (40_000, 53));
        let left_alone = |packet: &HostPacket| {
            let (said, seen) = early(packet.clone(), &tables);
            assert_eq!((said, seen.is_marked, &seen.packet), (Verdict::Next, false, packet));
        };
        left_alone(&packet);
        assert!(tables.flows.borrow().is_empty() && tables.sessions.borrow().is_empty());
        let mut tagged = packet.clone();
        tagged.is_strange = true;
        assert_eq!(request(&mut tagged, &tables), Verdict::Rewritten);
        assert!(!is_direct(only_flow(&tables).1.value().delivery), "its replies go by the stack as well");
        tables.flows.borrow_mut().clear();
        assert_eq!(request(&mut packet.clone(), &tables), Verdict::ForwardIntoPod);
        // The conversation keeps its way when the Service's setting changes, and so does an error about it.
        for service in tables.services.borrow_mut().values_mut() {
            service.flags &= !SERVICE_DIRECT;
        }
        left_alone(&packet);
        assert!(is_direct(only_flow(&tables).1.value().delivery));
        let reply = plain(net.external, net.client, UDP, (53, 40_000));
        let report = error(&net, router(&net), net.external, errors(&net)[0], &reply, 64);
        left_alone(&report);
    }
}

#[test]
fn drops_of_what_would_go_directly_are_decided_early_too() {
    for net in BOTH {
        let tables = tables(&[net.external], &[]);
        set_flags(&tables, SERVICE_DIRECT);
        let packet = plain(net.client, net.external, UDP, (40_000, 53));
        assert_eq!(early(packet, &tables).0, Verdict::Drop(DropReason::NoBackend));
    }
}

#[test]
fn an_error_about_a_reply_needs_room_for_a_mark_too() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        early(plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let about_reply = plain(net.external, net.client, UDP, (53, 40_000));
        let error = error(&net, router(&net), net.external, errors(&net)[0], &about_reply, usize::MAX);
        let (verdict, seen) = early(error.clone(), &tables);
        assert_eq!((verdict, seen.is_claimed), (Verdict::Rewritten, true));
        let mut without_room = Early { has_room: false, ..Early::new(error.clone()) };
        assert_eq!(proxier_ebpf::request(&mut without_room, &tables, Origin::Outside), Verdict::Next);
        assert_eq!(without_room.packet, error);
    }
}
