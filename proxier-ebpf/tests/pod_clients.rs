//! Pods on the node as clients, of other pods and of themselves. As `paths.rs`: one test per thing that must hold.

mod common;

use common::*;
use proxier_ebpf::Verdict;

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
fn what_a_pod_asks_of_another_is_no_answer_to_a_question_of_that_one() {
    for net in BOTH {
        for protocol in [TCP, UDP] {
            // Both serve, each by an address of its own, and each is the other's client between the same two ports.
            let (there, back) =
                (tables(&[net.external], &[net.other_pod]), tables(&[net.external], &[net.pod]));
            request_of_pod(&mut plain(net.other_pod, net.external, protocol, (7_000, 7_001)), &back);
            let mut packet = plain(net.pod, net.external, protocol, (7_001, 7_000));
            assert_eq!(request_of_pod(&mut packet, &there), Verdict::Rewritten);
            let asked = packet.clone();
            back.lookups.set(0);
            assert_eq!(proxier_ebpf::reply_to_pod(&mut packet, &back), Verdict::Next, "{protocol}");
            assert_eq!((&packet, back.lookups.get()), (&asked, 0), "it goes in as it was asked");
            // The answer has the same addresses and ports, and nobody has rewritten it yet.
            let mut answer = plain(net.pod, net.other_pod, protocol, (7_001, 7_000));
            assert_eq!(proxier_ebpf::reply_to_pod(&mut answer, &back), Verdict::Rewritten, "{protocol}");
            assert_eq!(seen(&answer).source, net.external);
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
