//! What a large cluster costs a node: 5,000 Services of 8 endpoints each, half of them on this node. Heap is counted by
//! the allocator, so the figures are the same on every machine.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use proxier::{
    desired::{ServiceKey, Settings, State},
    model::{Family, NodeName, Object, ObjectName},
    source::convert,
};

/// The system's allocator, with a count of what is in use, and of how often something was asked for.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every request goes to the system's allocator unchanged; counting touches no memory that is handed out.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `alloc` above with this layout, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn in_use() -> usize {
    IN_USE.load(Ordering::Relaxed)
}

const SERVICES: usize = 5_000;
const ENDPOINTS: usize = 8;
const NODES: usize = 100;

/// All that is kept, by endpoint: its share of the Service, the slice, the indexes and the desired state.
const MAX_BYTES: usize = 480;
/// Of each kind, all of different Services.
const CHANGES: usize = 14;

fn service(n: usize) -> Object {
    let service: core::Service = serde_json::from_value(serde_json::json!({
        "metadata": {
            "name": format!("telephony-{n:04}"),
            "namespace": format!("team-{:02}", n % 50),
            "uid": format!("5f0c8d5e-3c1b-4d57-9a55-{n:012}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"service.kubernetes.io/service-proxy-name": "proxier", "app": format!("telephony-{n:04}")},
            "annotations": {"proxier.io/balance": "client"},
        },
        "spec": {
            "clusterIPs": ["None"],
            "externalIPs": [format!("203.0.{}.{}", n / 250, n % 250)],
            "selector": {"app": format!("telephony-{n:04}")},
            "ports": [{"name": "sip", "protocol": "UDP", "port": 5060}],
        },
    }))
    .unwrap();
    Object::Service(Box::new(convert::service(service).unwrap().object))
}

fn slice(n: usize, ready: bool) -> Object {
    let endpoints: Vec<_> = (0..ENDPOINTS)
        .map(|e| {
            let pod = n * ENDPOINTS + e;
            // Half of them are on this node.
            let node = if e % 2 == 0 { 0 } else { 1 + pod % (NODES - 1) };
            serde_json::json!({
                "addresses": [format!("10.{}.{}.{}", pod / 62_500, pod / 250 % 250, pod % 250)],
                "conditions": {"ready": ready || e > 0, "serving": true, "terminating": false},
                "nodeName": format!("worker-{node:03}.example.net"),
                "targetRef": {
                    "kind": "Pod",
                    "namespace": format!("team-{:02}", n % 50),
                    "name": format!("telephony-{n:04}-7d9c5b6f48-{pod:05}"),
                },
            })
        })
        .collect();
    let slice: discovery::EndpointSlice = serde_json::from_value(serde_json::json!({
        "metadata": {
            "name": format!("telephony-{n:04}-x7k2p"),
            "namespace": format!("team-{:02}", n % 50),
            "labels": {"kubernetes.io/service-name": format!("telephony-{n:04}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "sip", "protocol": "UDP", "port": 5060}],
        "endpoints": endpoints,
    }))
    .unwrap();
    Object::EndpointSlice(convert::endpoint_slice(slice).unwrap().object)
}

/// A cluster of so many Services, whose desired state has been computed.
fn cluster(services: usize) -> State {
    let mut state = State::new(Settings::new(NodeName::new("worker-000.example.net")));
    for n in 0..services {
        state.apply(service(n));
        state.apply(slice(n, true));
    }
    assert_eq!(state.refresh().services.len(), services);
    assert_eq!(state.problems().count(), 0);
    state
}

/// How many allocations each of some changes makes, in the middle: now and then a table grows.
fn allocations(mut change: impl FnMut(usize)) -> usize {
    let mut counts: Vec<_> = (0..CHANGES)
        .map(|n| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            change(n);
            ALLOCATIONS.load(Ordering::Relaxed) - before
        })
        .collect();
    counts.sort_unstable();
    counts[counts.len() / 2]
}

/// What it takes that a pod goes.
fn less_a_pod(state: &mut State) -> usize {
    // Objects are made beforehand: that is the source's work.
    let mut flips: Vec<_> = (0..CHANGES).map(|n| slice(n * 7, false)).rev().collect();
    let keys: Vec<_> = (0..CHANGES)
        .map(|n| ServiceKey {
            service: ObjectName::new(format!("team-{:02}", n * 7 % 50), format!("telephony-{:04}", n * 7)),
            family: Family::V4,
        })
        .collect();
    allocations(|n| {
        state.apply(flips.pop().unwrap());
        assert!(state.refresh().services.iter().eq([&keys[n]]));
    })
}

/// What it takes that a Service goes.
fn less_a_service(state: &mut State) -> usize {
    let gone: Vec<_> = (0..CHANGES).map(|n| service(n * 7 + 1).id()).collect();
    allocations(|n| {
        state.delete(&gone[n]);
        assert_eq!(state.refresh().services.len(), 1);
    })
}

#[test]
fn a_large_cluster_fits_and_a_change_costs_what_it_touches() {
    let before = in_use();
    let mut large = cluster(SERVICES);
    let all = in_use() - before;
    let per_endpoint = all / (SERVICES * ENDPOINTS);
    println!("{all} bytes: {per_endpoint} bytes an endpoint");
    assert!(per_endpoint < MAX_BYTES, "{per_endpoint} bytes an endpoint");

    // Counted, not timed: what goes through everything makes a copy of something of each.
    let mut small = cluster(SERVICES / 50);
    for (what, change) in
        [("a pod less", less_a_pod as fn(&mut State) -> usize), ("a Service less", less_a_service)]
    {
        let (of_large, of_small) = (change(&mut large), change(&mut small));
        println!("{what}: {of_large} allocations, of a cluster a fiftieth as large {of_small}");
        assert!(of_large <= of_small * 2, "{what}: {of_large} allocations, {of_small} in a small cluster");
    }
}
