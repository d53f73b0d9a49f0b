//! Services that spread conversations instead of clients (`proxier.io/balance: flow`).

mod common;

use std::collections::BTreeSet;

use common::*;
use proxier_common::{DropReason, SERVICE_BALANCE_FLOW};
use proxier_ebpf::{Verdict, host::HostTables};

fn spreading(net: &Net) -> HostTables {
    let tables = tables(&[net.external], &[net.pod, net.other_pod]);
    set_flags(&tables, SERVICE_BALANCE_FLOW);
    tables
}

#[test]
fn one_clients_conversations_are_spread_and_each_stays() {
    for net in BOTH {
        for protocol in [TCP, UDP, SCTP, net.icmp] {
            let tables = spreading(&net);
            let first: Vec<_> =
                (1..60).map(|port| pod_of(&tables, &net, net.client, protocol, port)).collect();
            assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 2, "{protocol}");
            let second: Vec<_> =
                (1..60).map(|port| pod_of(&tables, &net, net.client, protocol, port)).collect();
            assert_eq!(first, second, "{protocol}");
        }
    }
}

#[test]
fn a_pod_that_comes_moves_no_conversation_and_one_that_goes_only_its_own() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        set_flags(&tables, SERVICE_BALANCE_FLOW);
        let pods = |ports: std::ops::Range<u16>| {
            ports.map(|port| pod_of(&tables, &net, net.client, UDP, port)).collect::<Vec<_>>()
        };
        pods(1..60);
        set_pods(&tables, &[net.external], &[net.pod, net.other_pod], 2);
        set_flags(&tables, SERVICE_BALANCE_FLOW);
        assert!(pods(1..60).iter().all(|pod| *pod == net.pod));
        let before = pods(60..120);
        set_pods(&tables, &[net.external], &[net.other_pod], 3);
        set_flags(&tables, SERVICE_BALANCE_FLOW);
        assert!(before.contains(&net.other_pod));
        assert!(pods(1..120).iter().all(|pod| *pod == net.other_pod));
    }
}

#[test]
fn fragments_follow_the_first_one_of_their_packet() {
    for net in BOTH {
        let tables = spreading(&net);
        for (port, identification) in (1..40).zip(1..) {
            let first_of = |port| {
                let segment = seal(net.client, net.external, UDP, segment(UDP, (port, 53), &[7; 64]));
                let fragment = Some((0, true, identification));
                frame(&Network { fragment, ..Network::default() }, net.client, net.external, UDP, &segment)
            };
            let later = || {
                let fragment = Some((9, false, identification));
                frame(&Network { fragment, ..Network::default() }, net.client, net.external, UDP, &[8; 40])
            };
            let alone = request(&mut later(), &tables);
            assert_eq!(alone, Verdict::Drop(DropReason::FragmentWithoutFirst));
            let (mut first, mut rest) = (first_of(port), later());
            assert_eq!(request(&mut first, &tables), Verdict::Rewritten);
            assert_eq!(request(&mut rest, &tables), Verdict::Rewritten);
            let destination = |packet: &proxier_ebpf::host::HostPacket| {
                if net.icmp == ICMP { packet.bytes[30..34].to_vec() } else { packet.bytes[38..54].to_vec() }
            };
            assert_eq!(destination(&first), destination(&rest), "port {port}");
            let mut whole = plain(net.client, net.external, UDP, (port, 53));
            request(&mut whole, &tables);
            assert_eq!(destination(&whole), destination(&first), "port {port}");
        }
    }
}

#[test]
fn with_one_pod_fragments_may_come_in_any_order() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        set_flags(&tables, SERVICE_BALANCE_FLOW);
        let fragment = Some((9, false, 77));
        let network = Network { fragment, ..Network::default() };
        let mut later = frame(&network, net.client, net.external, UDP, &[8; 40]);
        assert_eq!(request(&mut later, &tables), Verdict::Rewritten);
    }
}

#[test]
fn errors_find_the_pod_of_their_conversation() {
    for net in BOTH {
        let tables = spreading(&net);
        for port in 1..40 {
            let mut packet = plain(net.client, net.external, UDP, (port, 53));
            request(&mut packet, &tables);
            let pod = seen(&packet).destination;
            let answer = plain(pod, net.client, UDP, (53, port));
            let mut arrived = answer.clone();
            assert_eq!(reply(&mut arrived, &tables), Verdict::Rewritten);
            for what in errors(&net) {
                let mut packet = error(&net, router(&net), net.external, what, &arrived, 60);
                assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
                assert_eq!(packet, error(&net, router(&net), pod, what, &answer, 60));
            }
        }
    }
}

#[test]
fn a_pod_that_reaches_itself_is_answered_by_itself() {
    for net in BOTH {
        for protocol in [TCP, UDP, SCTP] {
            let tables = spreading(&net);
            let mut to_itself = 0;
            for port in 1..60 {
                let mut packet = plain(net.pod, net.external, protocol, (port, 443));
                if request_of_pod(&mut packet, &tables) == Verdict::Hairpin {
                    to_itself += 1;
                    assert_eq!(packet, plain(net.external, net.pod, protocol, (port, 443)));
                    let mut answer = plain(net.pod, net.external, protocol, (443, port));
                    assert_eq!(request_of_pod(&mut answer, &tables), Verdict::Hairpin, "{protocol} {port}");
                }
            }
            assert!((10..50).contains(&to_itself), "{to_itself} of 59");
        }
    }
}
