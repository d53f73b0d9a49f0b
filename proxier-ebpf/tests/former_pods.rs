//! Conversations that began under other circumstances: with a pod that the client is no longer on, a Service that had the
//! address before, a table that is full by now, a client that was somebody else.

mod common;

use common::*;
use proxier_common::{
    DELIVERY_NODE, DropReason, MemberKey, MemberValue, SessionValue, TCP_RESET, timeout::UDP_TIMEOUT,
};
use proxier_ebpf::{Verdict, host::HostTables};

/// The client has spoken to the external address, on the pod; now there is only the other pod for new conversations.
fn moved(net: &Net, externals: &[std::net::IpAddr]) -> HostTables {
    let tables = tables(externals, &[net.pod]);
    for external in externals {
        let port = if *external == net.external { 1 } else { 2 };
        let mut packet = plain(net.client, *external, UDP, (port, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    }
    set_pods(&tables, externals, &[net.other_pod], 2);
    drain(&tables, net.pod);
    tables
}

#[test]
fn a_flow_with_a_former_pod_that_is_over_or_of_another_address_keeps_no_one() {
    for net in BOTH {
        let tables = moved(&net, &[net.external, net.other_external]);
        // Through the other external address; a conversation of this one is new.
        let mut packet = plain(net.client, net.external, UDP, (2, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(seen(&packet).destination, net.other_pod);
        let mut packet = plain(net.client, net.external, UDP, (1, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(seen(&packet).destination, net.pod, "it is still there");
        tables.now.set(tables.now.get() + UDP_TIMEOUT + 1);
        let mut packet = plain(net.client, net.external, UDP, (1, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(seen(&packet).destination, net.other_pod, "and then over");
    }
}

#[test]
fn an_error_about_a_conversation_with_a_former_pod_reaches_it() {
    for net in BOTH {
        let tables = moved(&net, &[net.external]);
        // The client is on the other pod now.
        let mut packet = plain(net.client, net.external, UDP, (9, 53));
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(seen(&packet).destination, net.other_pod);
        let kind = errors(&net)[0];
        let about = |source| plain(source, net.client, UDP, (53, 1));
        let mut packet = error(&net, router(&net), net.external, kind, &about(net.external), usize::MAX);
        assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(packet, error(&net, router(&net), net.pod, kind, &about(net.pod), usize::MAX));
    }
}

#[test]
fn somebody_elses_error_about_what_a_pod_sent_to_itself_is_dropped() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        let mut received = plain(net.pod, net.external, UDP, (40_000, 443));
        assert_eq!(request_of_pod(&mut received, &tables), Verdict::Hairpin);
        for source in [net.other_pod, router(&net)] {
            let original = error(&net, source, net.external, errors(&net)[1], &received, usize::MAX);
            let mut packet = original.clone();
            assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Drop(DropReason::UnrelatedError));
            assert_eq!(packet, original);
        }
    }
}

#[test]
fn a_client_stays_on_a_pod_that_the_addresss_next_service_has_too() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        let pod = pod_of(&tables, &net, net.client, UDP, 1);
        let session = tables.sessions.borrow()[&session_of_client(&net)].clone();
        // Of another Service, in which the pod was since a generation that this one is far from.
        session.0.set(SessionValue { service_id: 99, ..session.0.get() });
        let key = MemberKey { pod: pod.into(), service_id: SERVICE_ID, padding: 0 };
        tables.members.borrow_mut().insert(key, MemberValue { since_generation: 1_000, flags: 0 });
        assert_eq!(pod_of(&tables, &net, net.client, UDP, 2), pod);
        assert_eq!(session.0.get().service_id, SERVICE_ID, "the session was taken over");
    }
}

#[test]
fn a_conversation_in_place_of_one_that_is_over_needs_room_as_any() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (1, 2)), &tables);
        tables.now.set(tables.now.get() + UDP_TIMEOUT + 1);
        tables.flows_full.set(true);
        let original = plain(net.client, net.external, UDP, (1, 2));
        let mut packet = original.clone();
        assert_eq!(request(&mut packet, &tables), Verdict::Drop(DropReason::FlowTableFull));
        assert_eq!(packet, original);
    }
}

#[test]
fn a_conversation_of_what_has_become_the_nodes_own_address_goes_on_from_there() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut plain(net.client, net.external, UDP, (1, 2)), &tables);
        know_node(&tables, net.client, 0);
        let mut packet = plain(net.client, net.external, UDP, (1, 2));
        assert_eq!(request_of_node(&mut packet, &tables), Verdict::Rewritten);
        assert_eq!(only_flow(&tables).1.0.get().delivery, DELIVERY_NODE);
    }
}

#[test]
fn an_answer_straight_to_a_pod_ends_nothing() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        let (query, answer) = if net.icmp == ICMP { (8, 0) } else { (128, 129) };
        request(&mut plain(net.client, net.external, net.icmp, (query, 9)), &tables);
        assert_eq!(request(&mut plain(net.client, net.pod, net.icmp, (answer, 9)), &tables), Verdict::Next);
        assert_eq!(tables.flows.borrow().len(), 1);
        request(&mut plain(net.client, net.pod, net.icmp, (query, 9)), &tables);
        assert!(tables.flows.borrow().is_empty(), "a query does");
    }
}

/// A SYN from the client straight to the pod, between these ports.
fn open_straight(tables: &HostTables, net: &Net, ports: (u16, u16)) {
    let mut segment = segment(TCP, ports, b"");
    segment[13] = 0x02;
    let segment = seal(net.client, net.pod, TCP, segment);
    let mut packet = frame(&Network::default(), net.client, net.pod, TCP, &segment);
    assert_eq!(request(&mut packet, tables), Verdict::Next);
}

#[test]
fn only_a_connection_of_the_same_ports_ends_what_the_session_remembers() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        open_straight(&tables, &net, (40_000, 443));
        assert!(tables.sessions.borrow().is_empty(), "there is none to remember it");
        request(&mut tcp(&net, true, 0x02), &tables);
        let remembered = || tables.sessions.borrow()[&session_of_client(&net)].0.get().tcp_peer_port != 0;
        open_straight(&tables, &net, (40_001, 443));
        assert!(remembered(), "other ports");
        // The flow is of a connection that the pod has reset.
        let (_, flow) = only_flow(&tables);
        flow.0.set(proxier_common::FlowValue { tcp_state: TCP_RESET, ..flow.0.get() });
        let pods = tables.pods.take();
        open_straight(&tables, &net, (40_000, 443));
        assert!(remembered(), "the pod is of no Service");
        tables.pods.replace(pods);
        open_straight(&tables, &net, (40_000, 443));
        assert!(!remembered());
    }
}

#[test]
fn a_connection_that_a_pod_opens_from_the_port_of_one_that_has_ended_is_its_own() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        converse(&tables, &net, [(true, 0x02), (false, 0x12), (true, 0x10), (false, 0x14)]);
        let original = tcp(&net, false, 0x02);
        let mut packet = original.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
    }
}

#[test]
fn the_rest_of_a_pods_request_is_no_reply_to_the_address_that_it_was_sent_to() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        let piece = |offset, more| {
            let network = Network { fragment: Some((offset, more, 7)), ..Network::default() };
            frame(&network, net.pod, net.external, UDP, &[1; 24])
        };
        request_of_pod(&mut piece(0, true), &tables);
        assert_eq!(tables.fragments.borrow().len(), 1);
        // The address is gone by the time that the rest comes, which leaves the node.
        let original = piece(3, false);
        let mut packet = original.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next);
        assert_eq!(packet, original);
    }
}
