//! How long a change at the API server takes to the kernel's maps, and what the agent needs for it: first list, steady memory,
//! changes one by one, restart. Run by `cargo xtask bench control`, with the agent as people run it.
//!
//! The double of an API server that the agent watches has as many Services as asked for, each with four pods on this node and
//! four on others. A change gives one pod of one Service another address. Its time ends when a packet would find the new
//! pod: `services` leads to a generation of `backends` that has it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that cannot go on panics")]

use std::{
    collections::VecDeque,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use proxier_common::{Address, BackendKey, BackendValue, ExternalKey, SCHEMA, ServiceValue};
use proxier_tests::{
    agent::{self, Agent, AgentSpec},
    apiserver::ApiServer,
    topology::{Lab, LabSpec, NODE_NAME},
};
use serde_json::{Value, json};

/// Pods of a Service on this node, and on others.
const LOCAL: u32 = 4;
const ELSEWHERE: u32 = 4;
const PROXY_NAME: &str = "bench";
/// Nothing here takes as long; this only keeps a measurement from waiting for ever.
const PATIENCE: Duration = Duration::from_secs(300);

/// What to measure.
#[derive(Clone, Copy, Debug)]
struct Size {
    services: u32,
    changes: u32,
    per_second: u32,
}

impl Size {
    /// From the arguments `SERVICES CHANGES PER_SECOND`; cargo adds words of its own.
    fn from_arguments() -> Self {
        let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
        let mut next = |default| numbers.next().unwrap_or(default);
        Self { services: next(5_000), changes: next(1_000), per_second: next(100) }
    }
}

fn external(service: u32) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + 0x1_0000 + service).into()
}

/// The address of a Service's pod; `revision` tells those apart that it has one after the other.
fn pod(service: u32, index: u32, revision: u32) -> IpAddr {
    let base = u32::from(Ipv4Addr::new(11, 0, 0, 0));
    Ipv4Addr::from(base + (service * (LOCAL + ELSEWHERE) + index) + revision * 0x10_0000).into()
}

fn service(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("s{number}"), "namespace": "bench",
            "labels": {"service.kubernetes.io/service-proxy-name": PROXY_NAME},
        },
        "spec": {"clusterIP": "None", "externalIPs": [external(number)], "ports": [{"port": 6000}]},
    })
}

/// The slice of a Service whose first local pod has had `revision` addresses before.
fn slice(number: u32, revision: u32) -> Value {
    let endpoint = |index: u32| {
        let node = if index < LOCAL { NODE_NAME.to_owned() } else { format!("node{}", 2 + index) };
        let revision = if index == 0 { revision } else { 0 };
        json!({
            "addresses": [pod(number, index, revision)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": node,
            "targetRef": {"kind": "Pod", "namespace": "bench", "name": format!("s{number}-{index}")},
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{number}-1"), "namespace": "bench",
            "labels": {
                "service.kubernetes.io/service-proxy-name": PROXY_NAME,
                "kubernetes.io/service-name": format!("s{number}"),
            },
        },
        "addressType": "IPv4",
        "endpoints": (0..LOCAL + ELSEWHERE).map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "", "protocol": "TCP", "port": 6000}],
    })
}

/// The maps that a packet is looked up in.
struct Tables {
    services: HashMap<MapData, ExternalKey, ServiceValue>,
    backends: HashMap<MapData, BackendKey, BackendValue>,
}

impl Tables {
    fn open(pin_path: &Path) -> Self {
        let open = |name| {
            let path = pin_path.join(format!("v{SCHEMA}")).join(name);
            Map::HashMap(MapData::from_pin(path).unwrap())
        };
        Self {
            services: HashMap::try_from(open("services")).unwrap(),
            backends: HashMap::try_from(open("backends")).unwrap(),
        }
    }

    /// Whether packets to `external` may go to `pod`.
    fn lead(&self, external: IpAddr, pod: IpAddr) -> bool {
        let Ok(service) = self.services.get(&ExternalKey { external: external.into() }, 0) else {
            return false;
        };
        let ServiceValue { service_id, generation, backend_count, .. } = service;
        (0..backend_count).any(|slot| {
            let key = BackendKey { service_id, generation, slot };
            self.backends.get(&key, 0).is_ok_and(|backend| backend.pod == Address::from(pod))
        })
    }
}

/// What a process has used so far.
struct Usage {
    resident_kib: u64,
    peak_kib: u64,
    cpu: Duration,
}

impl Usage {
    fn of(agent: &Agent) -> Self {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap();
        // The name is in brackets and may hold blanks; user and system time are fields 14 and 15.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Self { resident_kib: kib("VmRSS:"), peak_kib: kib("VmHWM:"), cpu: Duration::from_millis(ticks * 10) }
    }
}

struct Bench {
    // In the order in which they go.
    agent: Option<Agent>,
    server: ApiServer,
    lab: Lab,
    spec: AgentSpec,
    _work: tempfile::TempDir,
}

impl Bench {
    fn new(size: Size) -> Self {
        let work = tempfile::tempdir().unwrap();
        let lab = Lab::build(&LabSpec::unique().with_pods(0)).unwrap();
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = ApiServer::start_in(&lab.node.namespace, loopback).unwrap();
        let kubeconfig = work.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig).unwrap();
        server
            .apply(json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.1"}]},
            }))
            .unwrap();
        let objects: Vec<Value> =
            (0..size.services).flat_map(|number| [service(number), slice(number, 0)]).collect();
        server.apply_all(&objects).unwrap();
        let binary = agent::binary().unwrap();
        let mut spec = AgentSpec::new(&binary, work.path(), &work.path().join("agent.log"));
        spec.source = ["kube", "--service-proxy-name", PROXY_NAME, "--kubeconfig"].map(Into::into).to_vec();
        spec.source.push(kubeconfig.into());
        Self { agent: None, server, lab, spec, _work: work }
    }

    /// Starts the agent and returns how long it takes until every Service is as it should be.
    fn start(&mut self) -> Duration {
        let start = Instant::now();
        let mut agent = self.spec.spawn(&self.lab).unwrap();
        agent.wait_for_log(PATIENCE, |log| log.contains(" ready ")).unwrap();
        let taken = start.elapsed();
        self.agent = Some(agent);
        taken
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().unwrap()
    }

    /// Makes changes at their times and returns how long each took to the maps.
    fn change(&self, size: Size) -> Vec<Duration> {
        let (made, outstanding) = mpsc::channel::<(Instant, IpAddr, IpAddr)>();
        let pin_path = self.lab.pin_path().to_owned();
        let watcher = thread::spawn(move || {
            let tables = Tables::open(&pin_path);
            let mut open = VecDeque::new();
            let mut taken = Vec::new();
            loop {
                open.extend(outstanding.try_iter());
                open.retain(|(since, external, pod): &(Instant, IpAddr, IpAddr)| {
                    let found = tables.lead(*external, *pod);
                    if found {
                        taken.push(since.elapsed());
                    }
                    assert!(found || since.elapsed() < PATIENCE, "{external} never leads to {pod}");
                    !found
                });
                if open.is_empty() {
                    match outstanding.recv() {
                        Ok(change) => open.push_back(change),
                        Err(_) => return taken,
                    }
                }
                thread::sleep(Duration::from_micros(100));
            }
        });
        let start = Instant::now();
        let period = Duration::from_secs(1) / size.per_second;
        for change in 0..size.changes {
            let due = start + period * change;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            // Neighbours in time are far apart in every order.
            let number = change.wrapping_mul(7919) % size.services;
            let revision = 1 + change / size.services;
            let object = slice(number, revision);
            let since = Instant::now();
            self.server.apply(object).unwrap();
            made.send((since, external(number), pod(number, 0, revision))).unwrap();
        }
        drop(made);
        watcher.join().unwrap()
    }
}

/// The value that this share of all is not above.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn main() {
    let size = Size::from_arguments();
    let Size { services, changes, per_second } = size;
    proxier_tests::need_root().unwrap();
    println!(
        "{services} Services, {} endpoints, {LOCAL} pods a Service on this node; {changes} changes, {per_second} a second",
        services * (LOCAL + ELSEWHERE)
    );
    let mut bench = Bench::new(size);
    let first = bench.start();
    let tables = Tables::open(bench.lab.pin_path());
    assert!(
        (0..services)
            .all(|number| (0..LOCAL).all(|index| tables.lead(external(number), pod(number, index, 0))))
    );
    thread::sleep(Duration::from_secs(5));
    let synced = Usage::of(bench.agent());
    thread::sleep(Duration::from_secs(10));
    let idle = Usage::of(bench.agent());
    let mut taken = bench.change(size);
    taken.sort();
    let changed = Usage::of(bench.agent());
    bench.agent.take().unwrap().kill().unwrap();
    let again = bench.start();
    thread::sleep(Duration::from_secs(5));
    let adopted = Usage::of(bench.agent());
    let report = json!({
        "services": services,
        "endpoints": services * (LOCAL + ELSEWHERE),
        "changes": changes,
        "changesPerSecond": per_second,
        "firstSyncMs": milliseconds(first),
        "firstSyncCpuMs": milliseconds(synced.cpu),
        "idleCpuMsPerSecond": milliseconds(idle.cpu.saturating_sub(synced.cpu)) / 10.0,
        "changeMs": {
            "p50": milliseconds(percentile(&taken, 50)),
            "p99": milliseconds(percentile(&taken, 99)),
            "max": milliseconds(percentile(&taken, 100)),
        },
        "cpuMsPerChange": milliseconds(changed.cpu.saturating_sub(idle.cpu)) / f64::from(changes),
        "restartMs": milliseconds(again),
        "residentMib": {
            "steady": idle.resident_kib as f64 / 1024.0,
            "afterChanges": changed.resident_kib as f64 / 1024.0,
            "afterRestart": adopted.resident_kib as f64 / 1024.0,
            "peak": changed.peak_kib.max(adopted.peak_kib) as f64 / 1024.0,
        },
    });
    println!("{report:#}");
}
