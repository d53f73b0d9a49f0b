//! The gRPC server: kpng's `localv1.Sets`, with gRPC's health and reflection. A task for each client asks the store for what
//! that client lacks; nobody waits for a client but its own task.

use std::{
    io,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use governor::{Quota, RateLimiter};
use proxier_localv1::{
    DESCRIPTORS, OpItem, WatchReq,
    op_item::Op,
    sets_server::{Sets, SetsServer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, Sleep, sleep, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{Server, server::Connected},
};

use super::{
    Shared,
    listen::{AGAIN, ListenAddress, Listener, Stream},
    store::{Batch, Client, Revision},
    tls::Identity,
};
use crate::{model::NodeName, observe::listen::descriptor_limit};

/// Of all clients together, of which a cluster may have one a node. Each may also have half of the process's descriptors, no
/// more.
const MAX_CONNECTIONS: usize = 16_384;
/// Of a connection. A client needs one.
const MAX_STREAMS: u32 = 8;
/// A request is a name.
const MAX_REQUEST: usize = 4096;
/// As long as the API server takes names.
const MAX_NODE_NAME: usize = 253;
/// Steps of a batch that wait in the stream, beside what HTTP/2 has under way.
const QUEUE: usize = 64;
/// How long a client may take to read a step. kpng's take a batch in before they do anything with it.
const STALLED: Duration = Duration::from_secs(60);
/// And a whole batch.
const WHOLE_BATCH: Duration = Duration::from_secs(600);
/// How long a client may take until it is clear what it is, and again until it has said its first words.
pub(super) const GREETING: Duration = Duration::from_secs(10);
/// How many bytes those have with which every HTTP/2 client begins.
const PREFACE: usize = 24;
/// A client that does not answer for the sum of these has gone.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(10);
/// Lines about clients that are refused: a few, then one in ten seconds.
const REFUSALS: Quota =
    Quota::per_minute(NonZeroU32::new(6).unwrap()).allow_burst(NonZeroU32::new(10).unwrap());
/// Where no connection can be accepted, for want of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// Serves for ever, as soon as the address can be had.
pub(super) async fn run(
    shared: Arc<Shared>,
    listener: Result<Listener, ListenAddress>,
    tls: Option<Identity>,
) {
    let listener = match listener {
        Ok(listener) => listener,
        Err(address) => wait_for(&address).await,
    };
    tracing::info!(address = %listener.bound(), tls = tls.is_some(), "serving the API");
    let (connections, incoming) = mpsc::channel(16);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_not_serving::<SetsServer<Watcher>>().await;
    let mut first = shared.revision.clone();
    let ready = async move {
        if first.wait_for(Option::is_some).await.is_ok() {
            health.set_serving::<SetsServer<Watcher>>().await;
        }
        std::future::pending::<()>().await;
    };
    let reflection = |descriptors| {
        tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(descriptors)
    };
    // Tools of some years ago ask for the older one.
    let (Ok(current), Ok(older)) =
        (reflection(DESCRIPTORS).build_v1(), reflection(DESCRIPTORS).build_v1alpha())
    else {
        tracing::error!("the API's own description cannot be read: report this");
        return;
    };
    let sets = SetsServer::new(Watcher { shared }).max_decoding_message_size(MAX_REQUEST);
    let server = Server::builder()
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PONG))
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(sets)
        .add_service(health_service.max_decoding_message_size(MAX_REQUEST))
        .add_service(current.max_decoding_message_size(MAX_REQUEST))
        .add_service(older.max_decoding_message_size(MAX_REQUEST))
        .serve_with_incoming(ReceiverStream::new(incoming));
    tokio::select! {
        () = accept(listener, tls.map(Arc::new), connections) => {}
        () = ready => {}
        served = server => if let Err(error) = served {
            tracing::error!("the API is no longer served: {error}");
        }
    }
}

async fn wait_for(address: &ListenAddress) -> Listener {
    loop {
        sleep(AGAIN).await;
        if let Ok(listener) = Listener::bind(address) {
            return listener;
        }
    }
}

/// Hands connections on that are ready to speak HTTP/2.
async fn accept(
    listener: Listener,
    tls: Option<Arc<Identity>>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS.min(descriptor_limit() / 2)));
    let refusals = Arc::new(RateLimiter::direct(REFUSALS));
    let mut failing = false;
    let mut full = false;
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                // One that was given up before it was accepted is nobody's fault.
                if error.kind() != io::ErrorKind::ConnectionAborted && !failing {
                    failing = true;
                    tracing::warn!("no connection to the API can be accepted: {error}; it is tried again");
                }
                sleep(BREATH).await;
                continue;
            }
        };
        failing = false;
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            if !full {
                tracing::warn!("the API has as many connections as it may have: new ones are closed");
            }
            full = true;
            continue;
        };
        full = false;
        let (tls, connections, refusals) = (tls.clone(), connections.clone(), Arc::clone(&refusals));
        // A client that says nothing holds up nobody but itself.
        tokio::spawn(async move {
            let io: Box<dyn Io> = match (stream, tls) {
                (Stream::Unix(stream), _) => Box::new(stream),
                (Stream::Tcp(stream), None) => Box::new(stream),
                (Stream::Tcp(stream), Some(tls)) => {
                    let peer = stream.peer_addr();
                    let acceptor = TlsAcceptor::from(tls.config());
                    match timeout(GREETING, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => Box::new(stream),
                        Ok(Err(error)) => {
                            if let (Ok(peer), Ok(())) = (peer, refusals.check()) {
                                tracing::warn!(
                                    "a client of the API at {peer} is refused: {error}; see which certificates it has and \
                                     trusts (--api-cert and --api-ca of proxier api)"
                                );
                            }
                            return;
                        }
                        Err(_) => return,
                    }
                }
            };
            let connection = Connection::new(io, place);
            // It has ended if nobody takes it.
            let _ = connections.send(Ok(connection)).await;
        });
    }
}

/// Ends a connection from one of its streams: what a stream has to say does not get through to a client that reads nothing.
#[derive(Debug, Default)]
pub(super) struct Hangup {
    asked: AtomicBool,
    waker: AtomicWaker,
}

impl Hangup {
    fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// What HTTP/2 is spoken over.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection, until it ends or its client takes too long to say its first words.
pub(super) struct Connection {
    io: Box<dyn Io>,
    greeting: Option<Greeting>,
    hangup: Arc<Hangup>,
    _place: OwnedSemaphorePermit,
}

/// What has yet to come before HTTP/2's own pings see to the rest, and until when. Without it, one byte would hold a place for
/// ever.
struct Greeting {
    missing: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Connection {
    pub(super) fn new(io: Box<dyn Io>, place: OwnedSemaphorePermit) -> Self {
        let greeting = Greeting { missing: PREFACE, deadline: Box::pin(sleep(GREETING)) };
        Self { io, greeting: Some(greeting), hangup: Arc::default(), _place: place }
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Hangup>;

    fn connect_info(&self) -> Arc<Hangup> {
        Arc::clone(&self.hangup)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.hangup.waker.register(context.waker());
        if self.hangup.asked.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if let Some(greeting) = &mut self.greeting {
            greeting.missing = greeting.missing.saturating_sub(buffer.filled().len() - before);
            if greeting.missing == 0 {
                self.greeting = None;
            } else if read.is_pending() && greeting.deadline.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// The service.
#[derive(Debug)]
struct Watcher {
    shared: Arc<Shared>,
}

type Steps = mpsc::Sender<Result<OpItem, Status>>;

#[tonic::async_trait]
impl Sets for Watcher {
    type WatchStream = ReceiverStream<Result<OpItem, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchReq>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (steps, stream) = mpsc::channel(QUEUE);
        let shared = Arc::clone(&self.shared);
        let hangup = request.extensions().get::<Arc<Hangup>>().cloned();
        tokio::spawn(async move {
            let _counted = shared.metrics.api_client();
            let mut client = None;
            let answered = answer(&shared, request.into_inner(), &steps, &mut client).await;
            if let Some(Client { node, .. }) = client {
                tracing::info!(%node, "a client of the API has gone");
            }
            if let Err(status) = answered {
                tracing::debug!("a client of the API is let go: {}", status.message());
                let is_stalled = status.code() == Code::DeadlineExceeded;
                // One who reads nothing would not read this either.
                let _ = steps.try_send(Err(status));
                if let (true, Some(hangup)) = (is_stalled, hangup) {
                    hangup.ask();
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Gives a client batch after batch, as it asks for them, until it goes.
async fn answer(
    shared: &Shared,
    mut requests: Streaming<WatchReq>,
    steps: &Steps,
    stream: &mut Option<Client>,
) -> Result<(), Status> {
    let mut seen = None;
    while let Some(request) = requests.message().await? {
        let client = client(request)?;
        if stream.is_none() {
            tracing::info!(node = %client.node, "a client follows the API");
        }
        let stream = stream.get_or_insert_with(|| client.clone());
        if *stream != client {
            // kpng's clients forget what they have when they open a stream, and at no other time.
            return Err(Status::failed_precondition(
                "a stream is for one node, with those that are draining or without: open another for anything else",
            ));
        }
        let Some(batch) = next(shared, &client, &mut seen, steps).await? else { return Ok(()) };
        let until = Instant::now() + WHOLE_BATCH;
        for item in batch.items() {
            match item.op {
                Some(Op::Set(_)) => shared.metrics.api_step("set"),
                Some(Op::Delete(_)) => shared.metrics.api_step("delete"),
                _ => {}
            }
            match timeout_at(until.min(Instant::now() + STALLED), steps.send(Ok(item))).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    return Err(Status::deadline_exceeded("the batch that was asked for is not read"));
                }
            }
        }
        seen = Some(batch.revision);
        shared.metrics.api_batch();
    }
    Ok(())
}

pub(super) fn client(request: WatchReq) -> Result<Client, Status> {
    let WatchReq { node_name, draining } = request;
    if node_name.len() > MAX_NODE_NAME {
        return Err(Status::invalid_argument(format!(
            "NodeName has {} bytes: no node has a name of more than {MAX_NODE_NAME}",
            node_name.len()
        )));
    }
    Ok(Client { node: NodeName::new(node_name), draining })
}

/// Waits until there is something that the client lacks. None if it has gone meanwhile.
async fn next(
    shared: &Shared,
    client: &Client,
    seen: &mut Option<Revision>,
    steps: &Steps,
) -> Result<Option<Batch>, Status> {
    let mut news = shared.revision.clone();
    loop {
        if news.borrow_and_update().is_some() {
            if let Some(only) = &shared.only
                && *only != client.node
            {
                return Err(Status::failed_precondition(format!(
                    "what is served here was told of node {only} alone: ask for that node, or ask the controller itself"
                )));
            }
            let batch = shared.store().batch(client, *seen);
            let Some(batch) = batch else {
                return Err(Status::aborted(
                    "so much has gone since the last request that it is forgotten: start over",
                ));
            };
            if !batch.is_empty() {
                return Ok(Some(batch));
            }
            *seen = Some(batch.revision);
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() {
                return Err(Status::unavailable("the server is ending"));
            },
            () = steps.closed() => return Ok(None),
        }
    }
}
