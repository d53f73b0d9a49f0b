//! What it costs to serve the API, and how long a change takes to a client, while some clients read nothing. Run by `cargo xtask
//! bench api`.
//!
//! The sink is in a process of its own, so that memory and processor time are those of serving (and of working out what changes),
//! not of the clients. Its Services have as many pods on the clients' node as elsewhere. A change gives a Service an annotation,
//! or a pod a hostname, that says when it was made; its time ends when a client has decoded it. What a client is told of together
//! counts as the last of it.
//!
//! ```text
//! main, for each number of clients that read nothing ──> serve ──┬─> follow: fast clients and a slow one
//!                                                                └─> stall: clients that ask once and read nothing
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement that cannot go on panics")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, io,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use nix::{
    sys::resource::{UsageWho, getrusage},
    time::{ClockId, clock_gettime},
};
use prost::Message as _;
use proxier::{
    desired::{Scope, Settings, State},
    model::{Endpoint, EndpointPort, EndpointSlice, Family, Labels, NodeName, ObjectName, Protocol, Service},
    observe::observed::Observed,
    sink::{
        Sink as _, Snapshot,
        api::{ApiSink, ListenAddress, Taken},
        export::Carried,
    },
};
use proxier_localv1::{self as localv1, Set, WatchReq, op_item::Op, sets_client::SetsClient};
use serde_json::{Value, json};
use tokio::{
    net::TcpSocket,
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint as Server},
};
use tower::service_fn;

/// Clients that take every batch as soon as it is there.
const FAST: usize = 8;
/// What the slow one does after each batch.
const SLOW: Duration = Duration::from_millis(100);
/// How many clients read nothing, one measurement each.
const STALLED: [u32; 3] = [0, 1, 10];
/// Pods of a Service, every other one on the clients' node.
const PODS: u32 = 4;
const NODE: &str = "node1";
const NAMESPACE: &str = "bench";
const CHANGED: &str = "proxier.io/changed";
/// The Service that comes when everything else has changed.
const LAST: &str = "last";
/// More than all buffers on the way to a client have room for, in Services that never change: who reads nothing must not have got
/// everything all the same.
const BALLAST: u32 = 64;
const BALLAST_BYTES: usize = 64 * 1024;
/// Nothing here takes as long; this only keeps a measurement from waiting for ever.
const PATIENCE: Duration = Duration::from_secs(120);
/// Until what is freed or allocated in the background is settled.
const REST: Duration = Duration::from_secs(2);

/// What to measure.
#[derive(Clone, Copy, Debug)]
struct Size {
    services: u32,
    per_second: u32,
    seconds: u32,
}

/// Since the machine's start; the same for all processes.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into()
}

fn stamp() -> String {
    now().as_nanos().to_string()
}

fn service(number: u32, changed: Option<String>) -> Service {
    let base = u32::from(Ipv4Addr::new(10, 1, 0, 0));
    Service {
        external_ips: vec![Ipv4Addr::from(base + number).into()],
        annotations: changed.map(|changed| (CHANGED.to_owned(), changed)).into_iter().collect::<Labels>(),
        headless: true,
        ..Service::new(ObjectName::new(NAMESPACE, format!("s{number:05}")))
    }
}

fn ballast(number: u32) -> Service {
    let padding = ("proxier.io/ballast", "x".repeat(BALLAST_BYTES));
    Service {
        annotations: Labels::from_iter([padding]),
        ..Service::new(ObjectName::new(NAMESPACE, format!("ballast{number}")))
    }
}

fn slice(number: u32, changed: Option<&str>) -> EndpointSlice {
    let base = u32::from(Ipv4Addr::new(11, 0, 0, 0));
    let pod = |index| {
        let address = IpAddr::from(Ipv4Addr::from(base + number * PODS + index));
        Endpoint {
            addresses: [address].into_iter().collect(),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(NodeName::new(if index % 2 == 0 { NODE } else { "node2" })),
            hostname: changed.filter(|_| index == 0).map(Into::into),
            target: Some(ObjectName::new(NAMESPACE, format!("s{number:05}-7d9c5b6f48-{index}"))),
        }
    };
    EndpointSlice {
        name: ObjectName::new(NAMESPACE, format!("s{number:05}-x7k2p")),
        service: Some(ObjectName::new(NAMESPACE, format!("s{number:05}"))),
        family: Family::V4,
        endpoints: (0..PODS).map(pod).collect(),
        ports: [EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: Some(6000) }].into(),
    }
}

/// The sink, and what it is shown.
struct World {
    state: State,
    sink: ApiSink,
}

impl World {
    fn show(&mut self, touched: Option<BTreeSet<ObjectName>>) {
        let (catalog, desired) = (self.state.catalog(), self.state.desired());
        let touched = touched.map_or(Scope::All, Scope::Only);
        self.sink.apply(Snapshot { catalog, desired, scope: &Scope::All, touched: &touched }).unwrap();
    }

    /// Makes the changes at their times; those that are late together, as the agent does. Returns how many batches that were.
    async fn change(&mut self, size: Size) -> u32 {
        let changes = size.per_second * size.seconds;
        let period = Duration::from_secs(1) / size.per_second;
        let start = Instant::now();
        let mut made = 0;
        let mut batches = 0;
        while made < changes {
            sleep_until(start + period * made).await;
            while made < changes && start + period * made <= Instant::now() {
                // Neighbours in time are far apart in every order.
                let number = made.wrapping_mul(7919) % size.services;
                if made % 2 == 0 {
                    self.state.apply(service(number, Some(stamp())).into());
                } else {
                    self.state.apply(slice(number, Some(&stamp())).into());
                }
                made += 1;
            }
            let touched = self.state.refresh().touched;
            self.show(Some(touched));
            batches += 1;
        }
        self.state.apply(Service::new(ObjectName::new(NAMESPACE, LAST)).into());
        let touched = self.state.refresh().touched;
        self.show(Some(touched));
        batches
    }
}

/// A process of this program in another role, and what it says.
struct Role {
    child: Child,
    words: BufReader<ChildStdout>,
}

impl Role {
    fn start(arguments: &[String]) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let words = BufReader::new(child.stdout.take().unwrap());
        Self { child, words }
    }

    fn word(&mut self) -> Value {
        let mut line = String::new();
        self.words.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(value: &Value) {
    println!("{value}");
    io::stdout().flush().unwrap();
}

/// How many batches clients were given, to the last step.
fn batches(observed: &Observed) -> usize {
    let text = observed.metrics.encode().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("proxier_api_batches_total "));
    line.unwrap().parse().unwrap()
}

fn resident_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let part = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec().try_into().unwrap(), u32::try_from(time.tv_usec()).unwrap() * 1000)
    };
    part(usage.user_time()) + part(usage.system_time())
}

/// Serves, has clients come, and changes everything.
fn serve(size: Size, stalled: u32) {
    // The agent's.
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let node = NodeName::new("controller");
    let observed = Observed::new(&node, "kube", None);
    let _guard = runtime.enter();
    let address = "tcp://127.0.0.1:0".parse().unwrap();
    let sink =
        ApiSink::serve(&address, None, Taken::Fails, Carried::none(), None, Arc::clone(&observed.metrics))
            .unwrap();
    let ListenAddress::Tcp(address) = *sink.bound() else { panic!("{sink:?}") };
    let mut world = World { state: State::new(Settings::new(node)), sink };
    for number in 0..BALLAST {
        world.state.apply(ballast(number).into());
    }
    for number in 0..size.services {
        world.state.apply(service(number, None).into());
        world.state.apply(slice(number, None).into());
    }
    world.state.refresh();
    world.show(None);
    thread::sleep(REST);
    let alone = resident_mib();
    let mut followers = Role::start(&["follow".to_owned(), address.to_string()]);
    let synced = followers.word();
    thread::sleep(REST);
    let with_followers = resident_mib();
    let mut stallers = Role::start(&["stall".to_owned(), address.to_string(), stalled.to_string()]);
    stallers.word();
    thread::sleep(REST);
    let with_stallers = resident_mib();
    assert_eq!(
        batches(&observed),
        FAST + 1,
        "there was room on the way for all that the others were not to read"
    );

    let before = processor_time();
    let start = now();
    let applied = runtime.block_on(world.change(size));
    let clients = followers.word();
    let took = now() - start;
    let spent = processor_time() - before;
    thread::sleep(REST);
    let changed = resident_mib();
    drop(stallers);
    thread::sleep(REST);
    let released = resident_mib();
    say(&json!({
        "stalledClients": stalled,
        "clients": clients,
        "firstBatchMs": synced["firstBatchMs"],
        "changesShownTogether": f64::from(size.per_second * size.seconds) / f64::from(applied),
        "secondsUntilAllHaveTheLast": took.as_secs_f64(),
        "processorPercent": 100.0 * spent.as_secs_f64() / took.as_secs_f64(),
        "residentMib": {
            "alone": alone,
            "withFollowers": with_followers,
            "withStalled": with_stallers,
            "afterChanges": changed,
            "withoutStalled": released,
        },
    }));
}

/// A client that keeps what it is told.
struct Follower {
    requests: mpsc::Sender<WatchReq>,
    steps: Streaming<localv1::OpItem>,
    values: BTreeMap<String, Vec<u8>>,
    taken: Vec<Duration>,
    batches: u32,
}

fn request() -> WatchReq {
    WatchReq { node_name: NODE.to_owned(), draining: false }
}

impl Follower {
    async fn open(channel: Channel) -> Self {
        let (requests, stream) = mpsc::channel(1);
        let steps = SetsClient::new(channel).watch(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { requests, steps, values: BTreeMap::new(), taken: Vec::new(), batches: 0 }
    }

    async fn next(&mut self) {
        self.requests.send(request()).await.unwrap();
        loop {
            let step = timeout(PATIENCE, self.steps.message()).await.expect("nothing comes");
            match step.unwrap().unwrap().op.unwrap() {
                Op::Set(value) => {
                    let place = value.r#ref.unwrap();
                    let changed = match place.set() {
                        Set::ServicesSet => {
                            let service = localv1::Service::decode(value.bytes.clone()).unwrap();
                            service.annotations.get(CHANGED).cloned().unwrap_or_default()
                        }
                        _ => localv1::Endpoint::decode(value.bytes.clone()).unwrap().hostname,
                    };
                    if let Ok(nanoseconds) = changed.parse() {
                        self.taken.push(now().saturating_sub(Duration::from_nanos(nanoseconds)));
                    }
                    self.values.insert(place.path, value.bytes.into());
                }
                Op::Delete(place) => drop(self.values.remove(&place.path)),
                Op::Reset(_) => self.values.clear(),
                Op::Sync(_) => {
                    self.batches += 1;
                    return;
                }
            }
        }
    }

    async fn follow(mut self, pause: Duration) -> Self {
        let last = localv1::service_path(NAMESPACE, LAST);
        self.taken.clear();
        while !self.values.contains_key(&last) {
            self.next().await;
            sleep(pause).await;
        }
        self
    }
}

fn connect(address: SocketAddr) -> Channel {
    Server::try_from(format!("http://{address}")).unwrap().connect_lazy()
}

/// The value that this share of all is not above, in milliseconds.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1].as_secs_f64() * 1000.0
}

/// Fast clients and a slow one, until they have the last object.
async fn follow(address: SocketAddr) {
    let start = Instant::now();
    let mut followers = Vec::new();
    for _ in 0..=FAST {
        let mut follower = Follower::open(connect(address)).await;
        follower.next().await;
        followers.push(follower);
    }
    let milliseconds = start.elapsed().as_secs_f64() * 1000.0 / followers.len() as f64;
    say(&json!({"firstBatchMs": milliseconds}));
    let follow = |(number, follower): (usize, Follower)| {
        tokio::spawn(follower.follow(if number == FAST { SLOW } else { Duration::ZERO }))
    };
    let tasks: Vec<_> = followers.into_iter().enumerate().map(follow).collect();
    let mut done = Vec::new();
    for task in tasks {
        done.push(task.await.unwrap());
    }
    let mut reference = Follower::open(connect(address)).await;
    reference.next().await;
    assert!(
        done.iter().all(|follower| follower.values == reference.values),
        "somebody has not what there is"
    );
    let figures = |followers: &[Follower]| {
        let mut taken: Vec<Duration> =
            followers.iter().flat_map(|follower| &follower.taken).copied().collect();
        taken.sort();
        let batches: u32 = followers.iter().map(|follower| follower.batches - 1).sum();
        json!({
            "changeMs": {
                "p50": percentile(&taken, 50),
                "p99": percentile(&taken, 99),
                "max": percentile(&taken, 100),
            },
            "batches": f64::from(batches) / followers.len() as f64,
            "values": taken.len() / followers.len(),
        })
    };
    let (fast, slow) = done.split_at(FAST);
    say(&json!({"fast": figures(fast), "slow": figures(slow)}));
}

/// Clients that begin to read, and stop. What they do not read fills TCP's window: HTTP/2's has no end, and the kernel keeps little
/// for them.
async fn stall(address: SocketAddr, count: u32) {
    let mut open = Vec::new();
    for _ in 0..count {
        let connector = service_fn(move |_| async move {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(4096)?;
            io::Result::Ok(TokioIo::new(socket.connect(address).await?))
        });
        let window = 1 << 30;
        let server = Server::try_from(format!("http://{address}"))
            .unwrap()
            .initial_stream_window_size(window)
            .initial_connection_window_size(window);
        let follower = Follower::open(server.connect_with_connector(connector).await.unwrap()).await;
        open.push(follower);
    }
    for follower in &mut open {
        follower.requests.send(request()).await.unwrap();
        follower.steps.message().await.unwrap().unwrap();
    }
    say(&json!({"stalled": count}));
    // The one thread of this runtime reads nothing any more.
    loop {
        thread::park();
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", services, per_second, seconds, stalled] => {
            let [services, per_second, seconds, stalled] =
                [services, per_second, seconds, stalled].map(|number| number.parse().unwrap());
            serve(Size { services, per_second, seconds }, stalled);
        }
        ["follow", address] => Runtime::new().unwrap().block_on(follow(address.parse().unwrap())),
        ["stall", address, count] => {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(stall(address.parse().unwrap(), count.parse().unwrap()));
        }
        // `SERVICES PER_SECOND SECONDS`; cargo adds words of its own.
        _ => {
            let mut numbers = words.into_iter().filter(|word| word.parse::<u32>().is_ok()).map(str::to_owned);
            let mut next = |default: &str| numbers.next().unwrap_or_else(|| default.to_owned());
            let size = [next("1000"), next("1000"), next("10")];
            let [services, per_second, seconds] = &size;
            println!(
                "{services} Services of {PODS} endpoints, {per_second} changes a second for {seconds} s; {FAST} clients that are \
                 fast, one that takes {} ms after each batch, and some that read nothing",
                SLOW.as_millis()
            );
            for stalled in STALLED {
                let mut server =
                    Role::start(&[&["serve".to_owned()][..], &size, &[stalled.to_string()]].concat());
                println!("{:#}", server.word());
            }
        }
    }
}
