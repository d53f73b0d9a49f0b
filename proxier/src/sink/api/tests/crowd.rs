//! Many clients at once, of whom one is slow and some read nothing: nobody waits for them, and what is kept for them does not
//! grow.

use std::{
    any::Any,
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::{future::join_all, task::AtomicWaker};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
    task::JoinHandle,
    time::interval,
};
use tower::service_fn;

use super::*;
use crate::model::{EndpointSlice, Labels, Service};

const SERVICES: usize = 200;
const PODS: usize = 4;
const FAST: usize = 8;
const CHANGES: usize = 600;
/// Between two changes.
const PERIOD: Duration = Duration::from_millis(4);
/// A batch for the slow client.
const SLOW: Duration = Duration::from_millis(100);
/// So that the first batch is more than all buffers on the way to a client have room for.
const PADDING: usize = 16 * 1024;

/// Lets a client read, or not.
#[derive(Default)]
struct Gate {
    is_shut: AtomicBool,
    waiting: AtomicWaker,
}

impl Gate {
    fn shut(&self) {
        self.is_shut.store(true, Ordering::SeqCst);
    }

    fn open(&self) {
        self.is_shut.store(false, Ordering::SeqCst);
        self.waiting.wake();
    }
}

/// A connection of which nothing is read while the gate is shut.
struct Gated {
    stream: TcpStream,
    gate: Arc<Gate>,
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.gate.waiting.register(context.waker());
        if self.gate.is_shut.load(Ordering::SeqCst) {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What is full when a client does not read.
#[derive(Clone, Copy, Debug)]
enum Full {
    /// HTTP/2 lets no more through.
    Stream,
    /// HTTP/2 would, TCP does not.
    Socket,
}

/// A client that has asked for everything and reads none of it until the gate is opened.
async fn stalled(world: &World, full: Full) -> (Watch, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let ListenAddress::Tcp(address) = *world.sink.bound() else { panic!("{:?}", world.sink) };
    let gate_of_connection = Arc::clone(&gate);
    let connect = service_fn(move |_| {
        let gate = Arc::clone(&gate_of_connection);
        async move {
            let socket = TcpSocket::new_v4()?;
            if matches!(full, Full::Socket) {
                SockRef::from(&socket).set_recv_buffer_size(4096)?;
            }
            let stream = socket.connect(address).await?;
            io::Result::Ok(TokioIo::new(Gated { stream, gate }))
        }
    });
    let window = match full {
        Full::Stream => (1 << 16) - 1,
        Full::Socket => 1 << 30,
    };
    let server = world.server().initial_stream_window_size(window).initial_connection_window_size(window);
    let channel = server.connect_with_connector(connect).await.unwrap();
    let watch = Watch::open(channel, "node1").await.unwrap();
    gate.shut();
    watch.ask().await;
    (watch, gate)
}

fn service(number: usize, revision: usize) -> Service {
    let padding = ("proxier.io/padding".to_owned(), "x".repeat(PADDING));
    Service {
        annotations: Labels::from_iter([padding]),
        ..mk_service(
            &format!("s{number:03}"),
            [&*format!("10.{}.{}.{number}", revision / 256, revision % 256)],
        )
    }
}

fn slice(number: usize, revision: usize) -> EndpointSlice {
    let pods = (0..PODS).map(|index| {
        // The first pod is the one that changes.
        let revision = if index == 0 { revision } else { 0 };
        let address = format!("11.{}.{}.{}", number, revision % 250, 1 + index);
        pod(&format!("s{number:03}-{index}"), &address, if index % 2 == 0 { "node1" } else { "node2" })
    });
    mk_slice(&format!("s{number:03}-1"), &format!("s{number:03}"), pods)
}

/// Follows until the last object is there; how many batches that took.
fn follow(mut watch: Watch, pause: Duration) -> JoinHandle<(Watch, i64)> {
    tokio::spawn(async move {
        watch.values_come_back = true;
        let mut batches = 0;
        while !watch.values.contains_key("default/last") {
            watch.next().await;
            batches += 1;
            sleep(pause).await;
        }
        (watch, batches)
    })
}

/// Everything that was ever kept of the Services, by where it was.
#[derive(Default)]
struct Versions(HashMap<usize, Weak<dyn Any + Send + Sync>>);

impl Versions {
    /// Notes what is kept now.
    fn note(&mut self, world: &World) {
        // While it is known here, nothing else comes to lie where it was.
        let versions = world.sink.shared.store().versions();
        self.0.extend(versions.into_iter().map(|version| (version.as_ptr().addr(), version)));
    }

    /// How many somebody still has.
    fn alive(&self) -> usize {
        self.0.values().filter(|version| version.strong_count() > 0).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_read_nothing_hold_up_nobody_and_cost_what_they_were_given() {
    let mut world = World::new();
    let objects = (0..SERVICES).flat_map(|number| [service(number, 0).into(), slice(number, 0).into()]);
    world.put(objects);
    let mut versions = Versions::default();
    versions.note(&world);

    let mut stalled_clients = Vec::new();
    for full in [Full::Stream, Full::Socket] {
        stalled_clients.push(stalled(&world, full).await);
    }
    // What they are to be given is taken before anything changes.
    let given = 2 * SERVICES;
    until("both have their batch", || {
        versions.0.values().map(Weak::strong_count).sum::<usize>() == SERVICES + given
    })
    .await;

    let mut others = Vec::new();
    for number in 0..=FAST {
        let pause = if number == FAST { SLOW } else { Duration::ZERO };
        others.push(follow(world.watch("node1").await, pause));
    }
    let mut ticks = interval(PERIOD);
    for change in 0..CHANGES {
        ticks.tick().await;
        // Neighbours in time are far apart in every order.
        let number = change * 71 % SERVICES;
        match change % 4 {
            0 => world.put([service(number, 1 + change).into()]),
            // Away and back again, between other changes.
            1 => world.delete([service_id(&format!("s{number:03}"))]),
            2 => world.put([service((change - 1) * 71 % SERVICES, 1 + change).into()]),
            _ => world.put([slice(number, 1 + change).into()]),
        }
        versions.note(&world);
    }
    world.put([mk_service("last", []).into()]);
    versions.note(&world);

    let done = timeout(PATIENCE, join_all(others)).await.expect("somebody waits for those who read nothing");
    let mut batches = 0;
    let mut reference = world.watch("node1").await;
    reference.next().await;
    assert_eq!(reference.values.len(), SERVICES * (1 + PODS) + 1);
    for (number, client) in done.into_iter().enumerate() {
        let (watch, of_client) = client.unwrap();
        assert_eq!(watch.values, reference.values, "client {number}");
        batches += of_client;
        if number == FAST {
            assert!(of_client < (CHANGES / 2).try_into().unwrap(), "what it misses comes together");
        }
    }
    // Those who read nothing have not got theirs, and are still there, beside the one for reference.
    world.until_metric("proxier_api_batches_total", batches + 1).await;
    world.until_metric("proxier_api_clients", 3).await;

    // Theirs is what there was when they asked, the store's is what there is. Whatever was in between has gone.
    let bound = SERVICES + (SERVICES + 1);
    assert!(versions.0.len() > bound + SERVICES, "{} versions show nothing", versions.0.len());
    until(&format!("at most {bound} versions are kept"), || versions.alive() <= bound).await;

    for (watch, gate) in &mut stalled_clients {
        gate.open();
        watch.values_come_back = true;
        assert!(!watch.batch().await.unwrap().contains(&"set default/last".to_owned()));
        watch.next().await;
        assert_eq!(watch.values, reference.values, "who reads again catches up");
    }
    until("nothing of old is kept", || versions.alive() == SERVICES + 1).await;
}
