//! Pods on the node as clients, of other pods and of themselves. As `paths.rs`: one test per thing that must hold.

mod common;

use common::*;
use proxier_common::{BackendKey, BackendValue, ExternalKey, PodKey, PodValue, ServiceValue};
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

/// As two telephone exchanges do, both from and to port 5060.
#[test]
fn two_pods_that_ask_each_other_between_the_same_ports_see_each_others_external_addresses() {
    const SIP: (u16, u16) = (5_060, 5_060);
    for net in BOTH {
        let (here, there) = (net.pod, net.other_pod);
        // One table has both Services: `external` leads here, `other_external` there.
        let tables = tables(&[net.external], &[here]);
        let value = BackendValue { pod: there.into() };
        let key = BackendKey { service_id: 77, generation: 1, slot: 0 };
        tables.backends.borrow_mut().insert(key, value);
        let service = tables.services.borrow().values().next().copied().unwrap();
        let key = ExternalKey { external: net.other_external.into() };
        tables.services.borrow_mut().insert(key, ServiceValue { service_id: 77, ..service });
        let pod = PodValue { external: net.other_external.into(), flags: 0, interface: 0 };
        tables.pods.borrow_mut().insert(PodKey { pod: there.into() }, pod);
        [here, there].into_iter().for_each(|pod| know_pod(&tables, pod));
        let delivered = |source, destination| {
            let mut packet = plain(source, destination, UDP, SIP);
            assert_ne!(request_of_pod(&mut packet, &tables), Verdict::Hairpin);
            reply(&mut packet, &tables);
            assert_checksums(&packet);
            (seen(&packet).source, seen(&packet).destination)
        };
        assert_eq!(delivered(here, net.other_external), (here, there), "the first question");
        // This one is a question as well, and comes where the answer to the first is awaited from.
        assert_eq!(delivered(there, net.external), (net.other_external, here), "a question the other way");
        assert_eq!(delivered(here, net.other_external), (net.external, there), "and from then on");
        assert_eq!(delivered(there, net.external), (net.other_external, here));
        assert_eq!(delivered(there, here), (net.other_external, here), "the answer to the first");
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
