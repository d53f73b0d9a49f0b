//! A connection to a localv1 server, by TCP, with TLS or without, or by a unix socket; and how it is noticed that it leads nowhere any
//! more.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderValue, Request, Response, header};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::{
    client::legacy::connect::HttpConnector,
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use proxier_localv1::sets_client::SetsClient;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    task::JoinHandle,
    time,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tonic::body::Body;
use tower::{BoxError, Service};

use super::{Address, MAX_MESSAGE, Options, failure::Failure};

/// How much may be on the way: the first state of a large cluster takes a few round trips, and not hundreds.
const WINDOW: u32 = 1 << 20;
/// Of all streams together, of which there is one, so that the other bounds what is held. h2 0.4 takes small frames that nobody has
/// read yet for an attack when they are more than half of this one would hold; kpng sends each value in a frame of its own.
const CONNECTION_WINDOW: u32 = 128 << 20;

/// See [`Pings::Seldom`].
const SELDOM: Duration = Duration::from_mins(6);

/// The kernel counts these in seconds.
const SECOND: Duration = Duration::from_secs(1);

/// How often a server is asked whether it is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pings {
    /// So that it is noticed in time if it is not.
    Often,
    /// As servers want it that are made with Go's gRPC, such as kpng: they break off connections on which nothing happens if
    /// they are asked more often than every five minutes. Then only TCP notices, if the host has gone.
    Seldom,
}

/// A connection. Ends when this is dropped.
pub(super) struct Connection {
    pub(super) client: SetsClient<Channel>,
    driver: JoinHandle<hyper::Result<()>>,
    noted: Noted,
}

/// What has ended a connection. Streams only say that it has ended.
#[derive(Debug, Default)]
pub(super) struct Cause {
    /// In terms of HTTP/2.
    pub(super) http: Option<hyper::Error>,
    /// Below that: h2 keeps no more of it than a kind and a text.
    pub(super) io: Option<io::Error>,
}

impl Connection {
    /// What has ended the connection, if it has, or is about to.
    pub(super) async fn cause(&mut self) -> Cause {
        let ended = time::timeout(SECOND, &mut self.driver).await;
        let http = ended.ok().and_then(Result::ok).and_then(Result::err);
        Cause { http, io: self.noted.0.lock().unwrap_or_else(PoisonError::into_inner).take() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Takes calls to a connection. tonic's own keeps to itself what has ended it, and so why a server does.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    sender: http2::SendRequest<Body>,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let agent = HeaderValue::from_static(concat!("proxier/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(header::USER_AGENT, agent);
        Box::pin(self.sender.send_request(request))
    }
}

/// What TLS is made with, by files as they are now; none if there is to be none.
///
/// # Errors
///
/// They are of no use, in words.
pub(super) fn tls(options: &Options) -> Result<Option<(TlsConnector, ServerName<'static>)>, String> {
    let Some(credentials) = &options.credentials else { return Ok(None) };
    let connector = credentials.read()?;
    let host = options.address.host();
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("no certificate can be for the host {host:?}; check --api"))?;
    Ok(Some((connector, name)))
}

/// Connects.
pub(super) async fn connect(options: &Options, pings: Pings) -> Result<Connection, Failure> {
    let Options { address, timing, .. } = options;
    let tls = tls(options).map_err(|why| Failure::credentials(&why))?;
    let origin = address.uri(if tls.is_some() { "https" } else { "http" });
    // Asked and waited for: what has died in the first part is noticed at the end of the second.
    let (pause, wait) = (timing.silence * 2 / 3, timing.silence / 3);
    let stream = match time::timeout(wait, open(options, pause, tls)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(Failure::connecting(&*error, address)),
        Err(_) => return Err(Failure::slow(wait)),
    };
    let noted = Noted::default();
    let handshake = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(match pings {
            Pings::Often => pause,
            Pings::Seldom => SELDOM,
        })
        .keep_alive_timeout(wait)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(Watched { stream, noted: noted.clone() }));
    let (sender, connection) = handshake.await.map_err(|error| Failure::connecting(&error, address))?;
    let driver = tokio::spawn(connection);
    let client = SetsClient::with_origin(Channel { sender }, origin).max_decoding_message_size(MAX_MESSAGE);
    Ok(Connection { client, driver, noted })
}

async fn open(
    Options { address, timing, .. }: &Options,
    pause: Duration,
    tls: Option<(TlsConnector, ServerName<'static>)>,
) -> Result<Box<dyn Duplex>, BoxError> {
    if let Address::Unix(path) = address {
        return Ok(Box::new(UnixStream::connect(path).await?));
    }
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_keepalive(Some((pause / 2).max(SECOND)));
    connector.set_keepalive_interval(Some((pause / 4).max(SECOND)));
    connector.set_keepalive_retries(Some(3));
    connector.set_tcp_user_timeout(Some(timing.silence));
    let stream = connector.call(address.uri("http")).await?.into_inner();
    Ok(match tls {
        Some((tls, name)) => Box::new(tls.connect(name, stream).await?),
        None => Box::new(stream),
    })
}

/// What bytes come and go by.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// The first error of a stream.
#[derive(Clone, Debug, Default)]
struct Noted(Arc<Mutex<Option<io::Error>>>);

impl Noted {
    /// Keeps an error, and returns one that says the same.
    fn note(&self, error: io::Error) -> io::Error {
        let copy = io::Error::new(error.kind(), error.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        copy
    }
}

/// Notes what breaks a stream.
struct Watched {
    stream: Box<dyn Duplex>,
    noted: Noted,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        Poll::Ready(result.map_err(|error| self.noted.note(error)))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        Poll::Ready(result.map_err(|error| self.noted.note(error)))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_flush(context));
        Poll::Ready(result.map_err(|error| self.noted.note(error)))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
