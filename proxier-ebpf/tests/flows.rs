//! What lets a reply find its external address: how it comes, goes on and ends. As `paths.rs`: one test per thing that
//! must hold.

mod common;

use std::cell::Cell;

use common::*;
use proxier_common::{
    Address, BackendKey, BackendValue, DropReason, ExternalKey, FlowKey, SessionKey, TCP_ESTABLISHED,
    TCP_REPLIED, TCP_REPLY_FIN, TCP_REQUEST_FIN, TCP_RESET, timeout::SECOND,
};
use proxier_ebpf::{
    Verdict,
    host::{HostFlow, HostTables},
};

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

#[test]
fn a_client_that_used_a_port_through_the_external_address_may_use_it_with_the_pod_directly() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        know_pod(&tables, net.pod);
        let closed = [(true, 0x02), (false, 0x12), (true, 0x11), (false, 0x11)];
        converse(&tables, &net, closed);
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
    converse(&tables, &V4, HANDSHAKE);
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
    converse(&tables, &V4, [(true, 0x02), (false, 0x12), (true, 0x10), (true, 0x04)]);
    // The RST was forged; the pod has not believed it and sends on.
    tables.now.set(tables.now.get() + 10_000 * SECOND);
    assert_eq!(reply(&mut tcp(&V4, false, 0x18), &tables), Verdict::Rewritten);
}

#[test]
fn conversations_stay_on_a_pod_that_drains_and_new_ones_go_elsewhere() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        converse(&tables, &net, HANDSHAKE);
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

#[test]
fn an_idle_connection_outlives_a_short_affinity() {
    let tables = tables(&[V4.external], &[V4.pod]);
    converse(&tables, &V4, HANDSHAKE);
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
        fn pod(&self, key: &proxier_common::PodKey) -> Option<proxier_common::PodValue> {
            self.tables.pod(key)
        }
        fn pod_link(&self, interface: u32) -> Option<proxier_common::PodLinkValue> {
            self.tables.pod_link(interface)
        }
        fn is_permitted(&self, key: &proxier_common::SourceKey) -> bool {
            self.tables.is_permitted(key)
        }
        fn count(&self, what: proxier_common::Statistic) {
            self.tables.count(what);
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

/// The port is in use again, and a reset of the former connection was late.
#[test]
fn a_late_reset_does_not_show_the_pods_address_in_the_next_handshake() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        converse(&tables, &net, HANDSHAKE);
        converse(&tables, &net, [(true, 0x02), (false, 0x04), (false, 0x12)]);
        request(&mut tcp(&net, true, 0x10), &tables);
        let state = only_flow(&tables).1.0.get().tcp_state;
        assert_eq!(state, TCP_REPLIED | TCP_ESTABLISHED, "it lives as long as one that is open");
    }
}
