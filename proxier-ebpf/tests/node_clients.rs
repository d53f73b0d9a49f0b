//! Processes of the node itself as clients: their requests leave by an uplink and go to the pod from there; the pod's
//! replies are rewritten where they come in from the pod.

mod common;

use common::*;
use proxier_common::{DELIVERY_NODE, DropReason, ExternalKey, SERVICE_IS_POD, timeout::SECOND};
use proxier_ebpf::{
    Verdict,
    host::{HostPacket, HostTables},
    straight_to_pod,
};

/// What comes in from a pod, on its way to the node.
fn reply_to_node(packet: &mut HostPacket, tables: &HostTables) -> Verdict {
    assert_eq!(request_of_pod(packet, tables), Verdict::ToNode);
    proxier_ebpf::reply(packet, tables, DELIVERY_NODE)
}

#[test]
fn a_process_of_the_node_reaches_the_pod_and_is_answered_by_the_external_address() {
    for net in BOTH {
        for protocol in ALL_PROTOCOLS {
            let tables = tables(&[net.external], &[net.pod]);
            know_node(&tables, net.client, 0);
            let mut packet = plain(net.client, net.external, protocol, (40_000, 53));
            assert_eq!(request_of_node(&mut packet, &tables), Verdict::Rewritten, "{protocol}");
            assert_eq!(packet, plain(net.client, net.pod, protocol, (40_000, 53)));
            let mut answer = plain(net.pod, net.client, protocol, (53, 40_000));
            assert_eq!(reply_to_node(&mut answer, &tables), Verdict::Rewritten, "{protocol}");
            assert_eq!(answer, plain(net.external, net.client, protocol, (53, 40_000)));
        }
    }
}

#[test]
fn a_flow_of_the_node_is_rewritten_at_the_pods_link_only_and_another_clients_there_not() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_node(&tables, net.client, 0);
        request_of_node(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let answer = || plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply(&mut answer(), &tables), Verdict::Next, "at an egress");
        // The same from outside: nobody else has the node's address.
        let mut spoofed = plain(net.client, net.external, UDP, (40_000, 53));
        assert_eq!(request(&mut spoofed, &tables), Verdict::Drop(DropReason::SpoofedSource));
        assert_eq!(reply_to_node(&mut answer(), &tables), Verdict::Rewritten);
        // Unless it has moved to another machine.
        tables.services.borrow_mut().remove(&ExternalKey { external: net.client.into() });
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        assert_eq!(reply(&mut answer(), &tables), Verdict::Rewritten);
        know_node(&tables, net.client, 0);
        assert_eq!(reply_to_node(&mut answer(), &tables), Verdict::Next);
    }
}

#[test]
fn what_a_pod_sends_to_the_node_by_itself_is_untouched() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_node(&tables, net.client, 0);
        for protocol in ALL_PROTOCOLS {
            let original = plain(net.pod, net.client, protocol, (50_000, 10_250));
            let mut packet = original.clone();
            assert_eq!(reply_to_node(&mut packet, &tables), Verdict::Next);
            assert_eq!(packet, original);
        }
        // From outside it is the node's own affair, for one look-up.
        tables.lookups.set(0);
        let mut packet = plain(net.other_pod, net.client, TCP, (50_000, 22));
        assert_eq!(request(&mut packet, &tables), Verdict::Next);
        assert_eq!(tables.lookups.get(), 1);
    }
}

#[test]
fn a_process_that_speaks_to_the_pod_itself_ends_what_was_noted_for_its_port() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_node(&tables, net.client, 0);
        know_pod(&tables, net.pod);
        let mut rewritten = plain(net.client, net.external, UDP, (40_000, 53));
        request_of_node(&mut rewritten, &tables);
        // The request that was sent on passes the egress of the pod's link.
        straight_to_pod(&rewritten, &tables);
        assert_eq!(tables.flows.borrow().len(), 1, "it is the same packet");
        straight_to_pod(&plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        straight_to_pod(&plain(net.client, net.other_pod, UDP, (40_000, 53)), &tables);
        assert_eq!(tables.flows.borrow().len(), 1, "it is for somebody else");
        straight_to_pod(&plain(net.client, net.pod, UDP, (40_000, 53)), &tables);
        assert_eq!(tables.flows.borrow().len(), 1, "it may be the same, its mark lost");
        tables.now.set(tables.now.get() + 2 * SECOND);
        straight_to_pod(&plain(net.client, net.pod, UDP, (40_000, 53)), &tables);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply_to_node(&mut answer, &tables), Verdict::Next);
    }
}

#[test]
fn a_pod_that_has_the_nodes_address_is_reached_by_the_node_past_its_stack() {
    for net in BOTH {
        let node = net.client;
        let tables = tables(&[net.external], &[node]);
        know_node(&tables, node, SERVICE_IS_POD);
        let mut packet = plain(node, net.external, TCP, (40_000, 443));
        assert_eq!(request_of_node(&mut packet, &tables), Verdict::Hairpin);
        assert_eq!(packet, plain(net.external, node, TCP, (40_000, 443)));
        let mut answer = plain(node, net.external, TCP, (443, 40_000));
        assert_eq!(request_of_node(&mut answer, &tables), Verdict::Hairpin);
        assert_eq!(answer, plain(net.external, node, TCP, (443, 40_000)));
    }
}

#[test]
fn errors_about_conversations_of_the_node_name_what_each_side_knows() {
    for net in BOTH {
        for (protocol, what) in
            [TCP, UDP, SCTP].into_iter().zip([errors(&net)[0], errors(&net)[1]].into_iter().cycle())
        {
            let tables = tables(&[net.external], &[net.pod]);
            know_node(&tables, net.client, 0);
            let sent = plain(net.client, net.external, protocol, (40_000, 53));
            let mut arrived = sent.clone();
            request_of_node(&mut arrived, &tables);
            // By the pod, about the request.
            let mut packet = error(&net, net.pod, net.client, what, &arrived, 64);
            assert_eq!(reply_to_node(&mut packet, &tables), Verdict::Rewritten, "{protocol}");
            assert_eq!(packet, error(&net, net.external, net.client, what, &sent, 64));
            // By the node, about the reply.
            let answer = plain(net.pod, net.client, protocol, (53, 40_000));
            let mut seen_by_node = answer.clone();
            reply_to_node(&mut seen_by_node, &tables);
            let mut packet = error(&net, net.client, net.external, what, &seen_by_node, 64);
            assert_eq!(request_of_node(&mut packet, &tables), Verdict::Rewritten, "{protocol}");
            assert_eq!(packet, error(&net, net.client, net.pod, what, &answer, 64));
            // From outside it is about nothing that is known.
            let mut packet = error(&net, router(&net), net.external, what, &seen_by_node, 64);
            assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
        }
    }
}

/// A link-local address, or one that has just gone: the reply would not be known for one.
#[test]
fn what_comes_from_no_address_of_the_node_is_left_alone() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let original = plain(net.client, net.external, UDP, (40_000, 53));
        let mut packet = original.clone();
        assert_eq!(request_of_node(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
        assert!(tables.flows.borrow().is_empty() && tables.sessions.borrow().is_empty());
    }
}
