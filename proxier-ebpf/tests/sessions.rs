//! A client stays on its pod, and what makes it leave. As `paths.rs`: one test per thing that must hold.

mod common;

use std::rc::Rc;

use common::*;
use proxier_common::{Address, timeout::SECOND};

#[test]
fn a_client_stays_on_its_pod_across_ports_and_protocols() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        for number in 0..100 {
            let client = client(&net, number);
            let pod = pod_of(&tables, &net, client, TCP, 21);
            for (protocol, port) in [(TCP, 30_000), (UDP, 5060), (SCTP, 36_412), (net.icmp, 9), (GRE, 0)] {
                assert_eq!(pod_of(&tables, &net, client, protocol, port), pod);
            }
        }
    }
}

#[test]
fn clients_are_spread_over_the_pods() {
    for net in BOTH {
        let tables = tables(&[net.external], &[net.pod, net.other_pod]);
        let on_first =
            (0..200).filter(|number| pod_of(&tables, &net, client(&net, *number), UDP, 1) == net.pod).count();
        assert!((60..140).contains(&on_first), "{on_first} of 200 clients on one of two pods");
    }
}

#[test]
fn removing_a_pod_moves_only_its_clients_and_adding_one_moves_nobody() {
    for net in BOTH {
        let third = Address::from(net.pod).bytes;
        let third = Address::from_v6([&third[..15], &[77]].concat().try_into().unwrap()).to_ip();
        let tables = tables(&[net.external], &[net.pod, net.other_pod, third]);
        let clients: Vec<_> = (0..200).map(|number| client(&net, number)).collect();
        let before: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();

        set_pods(&tables, &[net.external], &[net.pod, third], 2);
        let after: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();
        for ((client, before), after) in clients.iter().zip(&before).zip(&after) {
            assert_ne!(*after, net.other_pod, "{client} is on a pod that went");
            if *before != net.other_pod {
                assert_eq!(before, after, "{client} moved although its pod stayed");
            }
        }

        set_pods(&tables, &[net.external], &[net.pod, net.other_pod, third], 3);
        let last: Vec<_> = clients.iter().map(|client| pod_of(&tables, &net, *client, UDP, 1)).collect();
        assert_eq!(after, last);
    }
}

#[test]
fn a_pod_that_left_and_one_that_came_with_its_address_are_two() {
    let tables = tables(&[V4.external], &[V4.pod, V4.other_pod]);
    let clients: Vec<_> = (0..50).map(|number| client(&V4, number)).collect();
    for client in &clients {
        pod_of(&tables, &V4, *client, UDP, 1);
    }
    set_pods(&tables, &[V4.external], &[V4.other_pod], 2);
    set_pods(&tables, &[V4.external], &[V4.pod, V4.other_pod], 3);
    for client in &clients {
        pod_of(&tables, &V4, *client, UDP, 1);
    }
    let sessions = tables.sessions.borrow();
    let kept = sessions.values().filter(|session| session.0.get().pod == V4.pod.into());
    for session in kept {
        assert_eq!(session.0.get().generation, 3, "a session with the former owner of the address lives on");
    }
}

#[test]
fn a_session_ends_when_the_client_was_silent_for_too_long() {
    let tables = tables(&[V4.external], &[V4.pod]);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    // The pod is alone no more; only who has to choose anew may land on the other.
    let key = session_of_client(&V4);
    let session = tables.sessions.borrow()[&key].clone();
    let timeout = u64::from(AFFINITY_TIMEOUT) * SECOND;
    tables.now.set(tables.now.get() + timeout);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    assert_eq!(session.0.get().last_seen, tables.now.get(), "still the same session, seen now");
    tables.now.set(tables.now.get() + timeout + 1);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    assert!(!Rc::ptr_eq(&tables.sessions.borrow()[&key].0, &session.0), "a new session");
}

#[test]
fn an_address_that_changes_hands_takes_no_clients_along() {
    let tables = tables(&[V4.external], &[V4.pod]);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    let key = session_of_client(&V4);
    let session = tables.sessions.borrow()[&key].clone();
    session.0.set(proxier_common::SessionValue {
        service_id: 99,
        pod: V4.other_pod.into(),
        ..session.0.get()
    });
    assert_eq!(pod_of(&tables, &V4, V4.client, UDP, 1), V4.pod);
}

#[test]
fn last_seen_is_written_at_most_once_a_second() {
    let tables = tables(&[V4.external], &[V4.pod]);
    let start = tables.now.get();
    let key = session_of_client(&V4);
    pod_of(&tables, &V4, V4.client, UDP, 1);
    for (after, written) in [(SECOND - 1, start), (SECOND, start + SECOND)] {
        tables.now.set(start + after);
        pod_of(&tables, &V4, V4.client, UDP, 1);
        assert_eq!(only_flow(&tables).1.0.get().last_seen, written);
        assert_eq!(tables.sessions.borrow()[&key].0.get().last_seen, written);
    }
    tables.now.set(start + 5 * SECOND);
    reply(&mut plain(V4.pod, V4.client, UDP, (1, 1)), &tables);
    assert_eq!(only_flow(&tables).1.0.get().last_seen, start + 5 * SECOND);
}
