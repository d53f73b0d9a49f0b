//! What a large cluster costs a node: 5,000 Services of 8 endpoints each, half of them on this node. Heap is counted by
//! the allocator, so the figures are the same on every machine.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use proxier::{
    desired::{ServiceKey, Settings, State},
    model::{Family, NodeName, Object, ObjectName},
    source::convert,
};

/// The system's allocator, with a count of what is in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every request goes to the system's allocator unchanged; counting touches no memory that is handed out.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
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
const MAX_CHANGE: Duration = Duration::from_millis(5);

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

/// Of a hundred changes, the one in the middle: what a busy machine does in between is not what a change costs.
fn median(mut change: impl FnMut(usize)) -> Duration {
    let mut times: Vec<_> = (0..101)
        .map(|n| {
            let start = Instant::now();
            change(n);
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
fn a_large_cluster_fits_and_a_change_costs_what_it_touches() {
    let before = in_use();
    let mut state = State::new(Settings::new(NodeName::new("worker-000.example.net")));
    for n in 0..SERVICES {
        state.apply(service(n));
        state.apply(slice(n, true));
    }
    let objects = in_use() - before;
    assert_eq!(state.refresh().services.len(), SERVICES);
    assert_eq!(state.problems().count(), 0);
    let all = in_use() - before;
    let per_endpoint = all / (SERVICES * ENDPOINTS);
    println!("objects {objects} bytes, with the desired state {all}: {per_endpoint} bytes an endpoint");
    assert!(per_endpoint < MAX_BYTES, "{per_endpoint} bytes an endpoint");

    // Objects are made beforehand: that is the source's work.
    let flips: Vec<_> = (0..101).map(|n| slice(n * 7, false)).collect();
    let mut flips = flips.into_iter();
    let flip = median(|n| {
        state.apply(flips.next().unwrap());
        let changed = state.refresh();
        let service = ObjectName::new(format!("team-{:02}", n * 7 % 50), format!("telephony-{:04}", n * 7));
        assert_eq!(
            changed.services.into_iter().collect::<Vec<_>>(),
            [ServiceKey { service, family: Family::V4 }]
        );
    });
    let mut gone: Vec<_> = (0..101).map(|n| service(n * 11).id()).collect();
    let withdrawn = median(|_| {
        state.delete(&gone.pop().unwrap());
        assert_eq!(state.refresh().services.len(), 1);
    });
    println!("a pod less: {flip:?}; a Service less: {withdrawn:?}");
    // A debug build on a busy machine takes some hundred microseconds. Going through everything takes a thousand times that.
    for (what, took) in [("a pod less", flip), ("a Service less", withdrawn)] {
        assert!(took < MAX_CHANGE, "{what}: {took:?}");
    }
}
