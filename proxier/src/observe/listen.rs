//! Serves HTTP to whoever asks how the agent is: a listener that nobody can exhaust, and that is tried again for as long
//! as its address is taken. Not for what is answered: that is `http` and `service_health`.
//!
//! One request a connection, few connections at a time, each for a short time: these ports may be open to anybody, and
//! the agent needs its file descriptors for more important things.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

/// Between two attempts to listen, as kube-proxy has it.
const AGAIN: Duration = Duration::from_secs(5);
/// Before the second attempt, and before anything is said: one of our own listeners may be about to end.
const A_MOMENT: Duration = Duration::from_millis(100);
/// Connections at a time, of each listener; the kernel keeps a few more waiting.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may last in all.
const LIFETIME: Duration = Duration::from_secs(30);

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Do not.
    Off,
    /// There. An unspecified IPv6 address stands for every address of both families.
    On(SocketAddr),
}

impl Listen {
    /// The address, if there is one.
    #[must_use]
    pub const fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::On(address) => Some(address),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::On).map_err(|_| {
            "not an address with a port: write one such as 127.0.0.1:10349, [::1]:10349, [::]:10356 for all addresses of both \
             families, or off"
                .to_owned()
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On(address) => write!(f, "{address}"),
        }
    }
}

/// What a listener is for, as a log line says it when the address cannot be had.
#[derive(Clone, Debug)]
pub struct Purpose {
    /// Who wants it, and what for: the beginning of the sentence.
    pub subject: String,
    /// What to do about it.
    pub next_step: String,
}

/// A listener with its connections. Both end when this is dropped.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<()>,
    bound: watch::Receiver<Option<SocketAddr>>,
}

impl Server {
    /// Answers on `address` with `routes`, as soon as the address can be had: one that is taken is reported once and tried
    /// again. To be called within a runtime.
    #[must_use]
    pub fn start(address: SocketAddr, purpose: Purpose, routes: Router) -> Self {
        let (sender, bound) = watch::channel(None);
        let task = tokio::spawn(async move {
            let mut failures = 0_u64;
            let listener = loop {
                let error = match bind(address) {
                    Ok(listener) => break listener,
                    Err(error) => error,
                };
                failures += 1;
                if failures == 1 {
                    sleep(A_MOMENT).await;
                    continue;
                }
                if failures == 2 {
                    let Purpose { subject, next_step } = &purpose;
                    tracing::warn!(
                        "{subject} cannot listen on {address}: {error}; {next_step}; packets go on as before, and it is tried \
                         again every {} seconds",
                        AGAIN.as_secs()
                    );
                }
                sleep(AGAIN).await;
            };
            if failures > 1 {
                tracing::info!("{} listens on {address} now", purpose.subject);
            }
            sender.send_replace(listener.local_addr().ok());
            serve(&listener, &routes).await;
        });
        Self { task, bound }
    }

    /// Waits until the address is there. Returns it, with the port that the kernel has chosen if none was given.
    pub async fn bound(&mut self) -> Option<SocketAddr> {
        self.bound.wait_for(Option::is_some).await.ok().and_then(|address| *address)
    }
}

#[cfg(test)]
impl Server {
    /// Tells it from any other.
    pub(super) fn id(&self) -> tokio::task::Id {
        self.task.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match listener(address) {
        // A kernel that was started without IPv6: all its addresses are those of IPv4.
        Err(error)
            if address.ip().is_unspecified()
                && matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) =>
        {
            listener((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        result => result,
    }
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // An agent that has just ended leaves connections that the kernel winds up for a minute.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Whatever net.ipv6.bindv6only says.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

async fn serve(listener: &TcpListener, routes: &Router) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(answer(stream, routes.clone()));
                }
                // The client has gone again, or there is no file descriptor for it.
                Err(error) => {
                    tracing::debug!("a connection could not be accepted: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn answer(stream: TcpStream, routes: Router) {
    let connection = http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    match timeout(LIFETIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a connection broke off: {error}"),
        Err(_) => tracing::debug!("a connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn purpose() -> Purpose {
        Purpose { subject: "a test".to_owned(), next_step: "run it again".to_owned() }
    }

    fn routes() -> Router {
        Router::new().route("/", get(|| async { "hello" }))
    }

    /// What comes back, until the server closes.
    async fn say(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn started(address: &str) -> (Server, SocketAddr) {
        let mut server = Server::start(address.parse().unwrap(), purpose(), routes());
        let bound = server.bound().await.unwrap();
        (server, bound)
    }

    const REQUEST: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";

    #[test]
    fn an_address_is_read_with_its_port_and_off_is_none() {
        assert_eq!("off".parse(), Ok(Listen::Off));
        for text in ["127.0.0.1:10349", "[::]:10356", "off"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["", "10349", "127.0.0.1", "localhost:10349", ":10349"] {
            assert!(text.parse::<Listen>().unwrap_err().contains("such as 127.0.0.1:10349"), "{text}");
        }
    }

    #[tokio::test]
    async fn the_unspecified_ipv6_address_answers_in_both_families() {
        let (_server, bound) = started("[::]:0").await;
        for loopback in ["127.0.0.1", "::1"] {
            let address = SocketAddr::new(loopback.parse::<IpAddr>().unwrap(), bound.port());
            assert!(say(address, REQUEST).await.ends_with("hello"), "{loopback}");
        }
    }

    #[tokio::test]
    async fn the_unspecified_ipv4_address_answers_in_ipv4_alone() {
        let (_server, bound) = started("0.0.0.0:0").await;
        assert!(say((Ipv4Addr::LOCALHOST, bound.port()).into(), REQUEST).await.ends_with("hello"));
        let v6 = SocketAddr::new("::1".parse().unwrap(), bound.port());
        let error = TcpStream::connect(v6).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_connection_has_one_answer_and_is_closed() {
        let (_server, bound) = started("127.0.0.1:0").await;
        let answer = say(bound, &REQUEST.repeat(2)).await;
        assert_eq!(answer.matches("200 OK").count(), 1, "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }

    #[tokio::test]
    async fn what_is_dropped_listens_and_answers_no_more() {
        let (server, bound) = started("127.0.0.1:0").await;
        let mut open = TcpStream::connect(bound).await.unwrap();
        open.write_all(b"GET / HTT").await.unwrap();
        assert!(say(bound, REQUEST).await.ends_with("hello"));
        drop(server);
        let mut rest = Vec::new();
        // Closed or reset: nothing is answered.
        let _ = open.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "{rest:?}");
        let error = TcpStream::connect(bound).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_had_once_it_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let mut server = Server::start(address, purpose(), routes());
        assert!(timeout(Duration::from_millis(300), server.bound()).await.is_err());
        drop(taken);
        assert_eq!(timeout(Duration::from_secs(30), server.bound()).await, Ok(Some(address)));
        assert!(say(address, REQUEST).await.ends_with("hello"));
    }

    #[tokio::test]
    async fn clients_that_say_nothing_are_sent_away_and_keep_nobody_out_for_long() {
        let (_server, bound) = started("127.0.0.1:0").await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS + 16 {
            silent.push(TcpStream::connect(bound).await.unwrap());
        }
        let answer = timeout(Duration::from_secs(60), say(bound, REQUEST)).await.unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
    }
}
