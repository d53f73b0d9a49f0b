//! A flow that the full table gave up while its conversation goes on.

mod common;

use common::*;
use proxier_common::{Address, DELIVERY_STACK, SERVICE_BALANCE_FLOW, Statistic, TCP_ESTABLISHED};
use proxier_ebpf::{Verdict, host::HostTables};

fn rebuilt(tables: &HostTables) -> u64 {
    tables.stats.borrow().get(&Statistic::FlowRebuilt).copied().unwrap_or_default()
}

/// A connection of the client, open, whose flow is evicted.
fn evicted(net: &Net, flags: u32) -> HostTables {
    let tables = tables(&[net.external], &[net.pod]);
    set_flags(&tables, flags);
    converse(&tables, net, HANDSHAKE);
    tables.flows.borrow_mut().clear();
    tables
}

#[test]
fn a_reply_of_the_connection_that_the_client_opened_last_rebuilds_it() {
    for net in BOTH {
        for flags in [0, SERVICE_BALANCE_FLOW] {
            let tables = evicted(&net, flags);
            for tcp_flags in [0x18, 0x10] {
                let mut packet = tcp(&net, false, tcp_flags);
                assert_eq!(reply(&mut packet, &tables), Verdict::Rewritten);
                assert_checksums(&packet);
                assert_eq!(seen(&packet).source, net.external);
            }
            assert_eq!(rebuilt(&tables), 1);
            let (_, flow) = only_flow(&tables);
            let flow = flow.0.get();
            assert_eq!((flow.service_id, flow.delivery), (SERVICE_ID, DELIVERY_STACK));
            assert_ne!(flow.tcp_state & TCP_ESTABLISHED, 0, "it lives as long as one that is open");
        }
    }
}

#[test]
fn a_request_rebuilds_it_always() {
    for net in BOTH {
        let tables = evicted(&net, 0);
        assert_eq!(request(&mut tcp(&net, true, 0x10), &tables), Verdict::Rewritten);
        assert_eq!(reply(&mut tcp(&net, false, 0x18), &tables), Verdict::Rewritten);
        assert_eq!(rebuilt(&tables), 0);
    }
}

#[test]
fn what_may_be_another_conversation_is_left_alone() {
    for net in BOTH {
        let untouched = |tables: &HostTables, flags: u8, case: &str| {
            let original = tcp(&net, false, flags);
            let mut packet = original.clone();
            assert_eq!(reply(&mut packet, tables), Verdict::Next, "{case}");
            assert_eq!(packet, original, "{case}");
            assert_eq!(tables.flows.borrow().len(), 0, "{case}");
        };
        for flags in [0x02, 0x12, 0x04, 0x14, 0x00] {
            untouched(&evicted(&net, 0), flags, &format!("TCP flags {flags:#x}"));
        }
        let tables = evicted(&net, 0);
        for pod in tables.pods.borrow_mut().values_mut() {
            pod.external = Address::UNSPECIFIED;
        }
        untouched(&tables, 0x18, "the pod has two external addresses");

        let tables = evicted(&net, 0);
        let mut opens = segment(TCP, (40_001, 443), b"");
        opens[13] = 0x02;
        let sealed = seal(net.client, net.external, TCP, opens);
        request(&mut frame(&Network::default(), net.client, net.external, TCP, &sealed), &tables);
        tables.flows.borrow_mut().clear();
        untouched(&tables, 0x18, "the client has opened another one since");

        let tables = evicted(&net, 0);
        know_pod(&tables, net.pod);
        let mut opens = segment(TCP, (40_000, 443), b"");
        opens[13] = 0x02;
        let sealed = seal(net.client, net.pod, TCP, opens);
        request(&mut frame(&Network::default(), net.client, net.pod, TCP, &sealed), &tables);
        untouched(&tables, 0x18, "the client has opened one straight to the pod, between the same ports");

        let tables = evicted(&net, 0);
        assert_eq!(reply(&mut tcp(&net, false, 0x02), &tables), Verdict::Next);
        untouched(&tables, 0x18, "the pod has opened one between the same ports");

        let tables = evicted(&net, 0);
        tables.sessions.borrow_mut().clear();
        untouched(&tables, 0x18, "nothing is known of the client");

        let tables = evicted(&net, 0);
        let original = plain(net.pod, net.client, UDP, (443, 40_000));
        let mut packet = original.clone();
        assert_eq!(reply(&mut packet, &tables), Verdict::Next, "UDP does not say that it goes on");
        assert_eq!(packet, original);
    }
}

#[test]
fn a_full_table_that_takes_nothing_leaves_the_reply_alone() {
    let tables = evicted(&V4, 0);
    tables.flows_full.set(true);
    assert_eq!(reply(&mut tcp(&V4, false, 0x18), &tables), Verdict::Next);
    assert_eq!(rebuilt(&tables), 0);
}
