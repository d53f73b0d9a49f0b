//! Serves HTTP to whoever asks how the agent is: a listener that nobody can exhaust, and that is tried again for as long
//! as its address is taken. Not for what is answered: that is `http` and `service_health`.
//!
//! One request a connection, few connections at a time, each for a short time: these ports may be open to anybody, and
//! the agent needs its file descriptors for more important things. Nobody waits for a connection that waits for its
//! client: a newcomer takes the place of the oldest of those, so that a probe, which sends its request at once, is
//! answered however many others say nothing.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::Router;
use hyper::{
    body::Incoming,
    http::Request,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::{JoinHandle, JoinSet, yield_now},
    time::{sleep, timeout},
};

/// Between two attempts to listen, as kube-proxy has it.
const AGAIN: Duration = Duration::from_secs(5);
/// Before the second attempt, and before anything is said: one of our own listeners may be about to end.
const A_MOMENT: Duration = Duration::from_millis(100);
/// How long a client may take to send its request. Probes give up after a second or a few.
const PATIENCE: Duration = Duration::from_secs(1);
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

/// Raises the number of file descriptors that the process may have to what it may raise it to, as Go's runtime does: the
/// soft limit is 1024 in many places for the sake of programs that use `select`, of which this is none.
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok((soft, hard))
    });
    match raised {
        Ok((soft, hard)) => {
            tracing::debug!("the limit of open file descriptors is {hard}; the process began with {soft}");
        }
        Err(error) => tracing::debug!("the limit of open file descriptors stays as it is: {error}"),
    }
}

/// How many file descriptors the process may have.
pub(crate) fn descriptor_limit() -> usize {
    // It fails for an unknown resource alone.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}

/// The connections of a listener, or of several that share what there is: never more than a number.
#[derive(Debug)]
pub struct Connections {
    max: usize,
    max_per_client: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// Oldest first.
    by_number: BTreeMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    client: IpAddr,
    stage: Stage,
    /// The connection ends when this is dropped.
    _kept: oneshot::Sender<()>,
}

/// What a connection is about. Those that wait for their client can be displaced, the first kind before the second.
/// Those that do not are left alone: what makes an answer may run on without anybody to have it, beyond any bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The request has not come yet.
    Reading,
    /// The answer is on its way.
    Sending,
    /// The answer is made.
    Answering,
}

impl Connections {
    /// Room for `max` connections, of which one client address has `max_per_client` at most. A loopback address may have
    /// half of all: kubelet, Prometheus and whoever logs in there share it.
    #[must_use]
    pub fn new(max: usize, max_per_client: usize) -> Arc<Self> {
        Arc::new(Self { max, max_per_client, open: Mutex::default() })
    }

    /// A place for a connection from `client`, and what is closed when it has to give it up. A client that has all it may
    /// have displaces one of its own, when there is no room at all it is anybody's. None if that cannot be.
    fn admit(self: &Arc<Self>, client: IpAddr) -> Option<(Place, oneshot::Receiver<()>)> {
        let client = client.to_canonical();
        let max_per_client = if client.is_loopback() { self.max / 2 } else { self.max_per_client };
        let mut open = self.open();
        let own = open.by_number.values().filter(|connection| connection.client == client).count();
        if own >= max_per_client {
            open.displace(|connection| connection.client == client)?;
        } else if open.by_number.len() >= self.max {
            open.displace(|_| true)?;
        }
        let number = open.next;
        open.next += 1;
        let (_kept, displaced) = oneshot::channel();
        open.by_number.insert(number, Connection { client, stage: Stage::Reading, _kept });
        drop(open);
        Some((Place { connections: Arc::clone(self), number }, displaced))
    }

    /// Every change is one call of the map: a panic cannot leave half of it behind.
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn displace(&mut self, among: impl Fn(&Connection) -> bool) -> Option<()> {
        let (_, number) = self
            .by_number
            .iter()
            .filter(|(_, connection)| connection.stage < Stage::Answering && among(connection))
            .map(|(number, connection)| (connection.stage, *number))
            .min()?;
        self.by_number.remove(&number).map(drop)
    }
}

/// A connection's place among [`Connections`], free again when this is dropped.
#[derive(Debug)]
struct Place {
    connections: Arc<Connections>,
    number: u64,
}

impl Place {
    fn enter(&self, stage: Stage) {
        if let Some(connection) = self.connections.open().by_number.get_mut(&self.number) {
            connection.stage = stage;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.open().by_number.remove(&self.number);
    }
}

/// A listener with its connections. Both end when this is dropped.
#[derive(Debug)]
pub struct Server {
    task: JoinHandle<()>,
    bound: watch::Receiver<Option<SocketAddr>>,
}

impl Server {
    /// Answers on `address` with `routes`, as soon as the address can be had: one that is taken is reported once and tried
    /// again. Its connections are among `connections`. To be called within a runtime.
    #[must_use]
    pub fn start(
        address: SocketAddr,
        purpose: Purpose,
        routes: Router,
        connections: Arc<Connections>,
    ) -> Self {
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
            serve(&listener, &routes, &connections).await;
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

/// Listens there, as every port of the agent does. To be called within a runtime.
pub(crate) fn listener(address: SocketAddr) -> io::Result<TcpListener> {
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

async fn serve(listener: &TcpListener, routes: &Router, connections: &Arc<Connections>) {
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            // First, so that the set does not grow while there is always another client.
            biased;
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    if let Some((place, displaced)) = connections.admit(client.ip()) {
                        tasks.spawn(answer(stream, routes.clone(), place, displaced));
                    } else {
                        tracing::debug!("a connection of {client} was closed at once: there are too many");
                    }
                    // A request that has come with its connection is read before the next client can displace it, and
                    // what is displaced is closed before there is more of it.
                    yield_now().await;
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

async fn answer(stream: TcpStream, routes: Router, place: Place, displaced: oneshot::Receiver<()>) {
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(|request: Request<Incoming>| {
        place.enter(Stage::Answering);
        let response = routes.call(request);
        async {
            let response = response.await;
            place.enter(Stage::Sending);
            response
        }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        ended = timeout(LIFETIME, connection) => match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("a connection broke off: {error}"),
            Err(_) => tracing::debug!("a connection took too long"),
        },
        _ = displaced => tracing::debug!("a connection that waited for its client made room for another"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpSocket,
        sync::oneshot::error::TryRecvError,
        time::Instant,
    };

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
        let mut server =
            Server::start(address.parse().unwrap(), purpose(), routes(), Connections::new(64, 4));
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
        let mut server = Server::start(address, purpose(), routes(), Connections::new(64, 4));
        assert!(timeout(Duration::from_millis(300), server.bound()).await.is_err());
        drop(taken);
        assert_eq!(timeout(Duration::from_secs(30), server.bound()).await, Ok(Some(address)));
        assert!(say(address, REQUEST).await.ends_with("hello"));
    }

    /// A connection that comes from `source`.
    async fn connect(source: [u8; 4], address: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::from(source), 0).into()).unwrap();
        socket.connect(address).await.unwrap()
    }

    #[tokio::test]
    async fn a_client_that_does_not_send_its_request_in_time_is_sent_away() {
        let (_server, bound) = started("127.0.0.1:0").await;
        let mut slow = TcpStream::connect(bound).await.unwrap();
        let begin = Instant::now();
        let mut rest = Vec::new();
        let drip = async {
            loop {
                // What is said now and then is not a request either.
                if slow.write_all(b"G").await.is_err() {
                    break;
                }
                if let Ok(read) = timeout(Duration::from_millis(100), slow.read_to_end(&mut rest)).await {
                    drop(read);
                    break;
                }
            }
        };
        timeout(Duration::from_secs(20), drip).await.unwrap();
        assert!(begin.elapsed() >= PATIENCE, "{:?}", begin.elapsed());
    }

    fn client(n: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, n).into()
    }

    fn is_displaced((_, displaced): &mut (Place, oneshot::Receiver<()>)) -> bool {
        displaced.try_recv() == Err(TryRecvError::Closed)
    }

    #[test]
    fn a_client_with_all_it_may_have_displaces_its_own_oldest_and_nobody_elses() {
        let connections = Connections::new(8, 2);
        let mut other = connections.admit(client(1)).unwrap();
        let mut own: Vec<_> = (0..3).map(|_| connections.admit(client(2)).unwrap()).collect();
        assert!(!is_displaced(&mut other));
        assert_eq!(own.iter_mut().map(is_displaced).collect::<Vec<_>>(), [true, false, false]);
        // The same client, as a listener of both families sees it.
        let mapped = IpAddr::V6(Ipv4Addr::new(192, 0, 2, 2).to_ipv6_mapped());
        own.push(connections.admit(mapped).unwrap());
        assert_eq!(own.iter_mut().map(is_displaced).collect::<Vec<_>>(), [true, true, false, false]);
    }

    #[test]
    fn without_room_the_oldest_that_waits_for_its_client_goes_those_without_a_request_first() {
        let connections = Connections::new(3, 3);
        let mut open: Vec<_> = (0..3).map(|n| connections.admit(client(n)).unwrap()).collect();
        open[0].0.enter(Stage::Answering);
        open[1].0.enter(Stage::Sending);
        for (displaced, newcomer) in [(2, 3), (1, 4)] {
            open.push(connections.admit(client(newcomer)).unwrap());
            open.last().unwrap().0.enter(Stage::Answering);
            assert!(is_displaced(&mut open[displaced]));
        }
        assert_eq!(open.iter_mut().map(is_displaced).collect::<Vec<_>>(), [false, true, true, false, false]);
        // Nobody waits for a client: the newcomer has to go.
        assert!(connections.admit(client(5)).is_none());
        drop(open.swap_remove(0));
        assert!(connections.admit(client(5)).is_some());
    }

    #[test]
    fn a_place_is_free_once_its_connection_has_ended_displaced_or_not() {
        let connections = Connections::new(2, 2);
        let open: Vec<_> = (0..5).map(|n| connections.admit(client(n)).unwrap()).collect();
        assert_eq!(connections.open().by_number.len(), 2);
        drop(open);
        assert_eq!(connections.open().by_number.len(), 0);
    }

    #[test]
    fn loopback_addresses_may_have_half_of_all() {
        let connections = Connections::new(8, 1);
        let mut open: Vec<_> =
            (0..5).map(|_| connections.admit(Ipv4Addr::LOCALHOST.into()).unwrap()).collect();
        assert_eq!(open.iter_mut().filter_map(|place| is_displaced(place).then_some(())).count(), 1);
    }

    #[tokio::test]
    async fn listeners_that_share_connections_have_no_more_together() {
        let connections = Connections::new(4, 4);
        let mut bound = Vec::new();
        let mut servers: Vec<_> = (0..3)
            .map(|_| {
                let any = (Ipv4Addr::LOCALHOST, 0).into();
                Server::start(any, purpose(), routes(), Arc::clone(&connections))
            })
            .collect();
        for server in &mut servers {
            bound.push(server.bound().await.unwrap());
        }
        let mut silent = Vec::new();
        for n in 0..12 {
            silent.push(connect([127, 0, 1, n + 1], bound[usize::from(n % 3)]).await);
        }
        for address in &bound {
            assert!(say(*address, REQUEST).await.ends_with("hello"));
        }
        assert!(connections.open().by_number.len() <= 4);
        // Displaced, all but four, long before they would have been sent away for their silence.
        let mut closed = 0;
        for stream in &mut silent {
            let mut rest = Vec::new();
            if timeout(Duration::from_millis(20), stream.read_to_end(&mut rest)).await.is_ok() {
                closed += 1;
            }
        }
        assert!(closed >= 8, "{closed}");
        drop(servers);
        let none = async {
            while !connections.open().by_number.is_empty() {
                yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), none).await.unwrap();
    }

    #[test]
    fn the_process_may_have_as_many_descriptors_as_it_can_raise_the_limit_to() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // One less is enough for the other tests, which have the same limit.
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard - 1), hard).unwrap();
        raise_descriptor_limit();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        assert_eq!(descriptor_limit(), usize::try_from(hard).unwrap());
    }
}
