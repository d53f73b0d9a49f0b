//! `loadBalancerSourceRanges`: who may send to an external address.

mod common;

use common::*;
use proxier_common::{Address, DropReason, SourceKey};
use proxier_ebpf::{Verdict, host::HostTables};

/// Permits the client's /24 or /64, in this source generation.
fn permit(tables: &HostTables, net: &Net, generation: u32) {
    let bits = if net.icmp == ICMP { 96 + 24 } else { 64 };
    let key = SourceKey { service_id: SERVICE_ID, generation, address: Address::from(net.client) };
    tables.sources.borrow_mut().push((SourceKey::BITS_BEFORE_ADDRESS + bits, key));
}

fn enforce(tables: &HostTables, generation: u32) {
    for service in tables.services.borrow_mut().values_mut() {
        service.source_generation = generation;
    }
}

#[test]
fn only_permitted_clients_reach_the_pod() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        permit(&tables, &net, 3);
        enforce(&tables, 3);
        know_node(&tables, net.other_external, 0);
        for protocol in ALL_PROTOCOLS {
            let mut packet = plain(client(&net, 9), net.external, protocol, (1, 2));
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
            let original = plain(net.other_external, net.external, protocol, (1, 2));
            for ask in [request, request_of_pod, request_of_node] {
                let mut packet = original.clone();
                assert_eq!(ask(&mut packet, &tables), Verdict::Drop(DropReason::SourceNotAllowed));
                assert_eq!(packet, original);
            }
        }
        assert!(tables.sessions.borrow().keys().all(|key| key.peer == client(&net, 9).into()));
    }
}

#[test]
fn the_ranges_of_another_generation_do_not_count_and_none_at_all_means_nobody() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        permit(&tables, &net, 1);
        let ask = || request(&mut plain(net.client, net.external, UDP, (1, 2)), &tables);
        assert_eq!(ask(), Verdict::Rewritten, "0: everybody may");
        enforce(&tables, 2);
        assert_eq!(ask(), Verdict::Drop(DropReason::SourceNotAllowed));
        enforce(&tables, 1);
        assert_eq!(ask(), Verdict::Rewritten);
    }
}

#[test]
fn errors_about_permitted_conversations_pass_whoever_sends_them() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod]);
        permit(&tables, &net, 1);
        enforce(&tables, 1);
        request(&mut plain(net.client, net.external, UDP, (40_000, 53)), &tables);
        let mut answer = plain(net.pod, net.client, UDP, (53, 40_000));
        assert_eq!(reply(&mut answer, &tables), Verdict::Rewritten);
        for what in errors(&net) {
            let mut packet = error(&net, router(&net), net.external, what, &answer, 60);
            assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
        }
    }
}

#[test]
fn a_permitted_request_costs_four_lookups() {
    let tables = tables(&[V4.external], &[V4.pod]);
    permit(&tables, &V4, 1);
    enforce(&tables, 1);
    request(&mut plain(V4.client, V4.external, UDP, (1, 2)), &tables);
    tables.lookups.set(0);
    request(&mut plain(V4.client, V4.external, UDP, (1, 2)), &tables);
    assert_eq!(tables.lookups.get(), 4, "services, sources, sessions, flows");
}
