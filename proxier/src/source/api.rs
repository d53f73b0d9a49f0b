//! `proxier api`: takes the state of a node from a localv1 server, proxier's own (`to-api`) or kpng's, and delivers what changes.
//! Goes on through whatever happens to the server, and holds the last state meanwhile. Not for what the values mean: that is
//! `import`'s.
//!
//! A batch is asked for when the one before has been handed on: while the agent is busy, changes of one value come together
//! at the server.

use std::{future::pending, sync::Arc, time::Duration};

use anyhow::anyhow;
use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use proxier_localv1::{OpItem, WatchReq, sets_client::SetsClient};
use tokio::{net::UnixStream, sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use self::{
    failure::Failure,
    import::{Changes, Import, Limits},
};
use super::{
    Batch, Event, Onlooker, TURN,
    patience::{Patience, Timing},
    standing::Reporter,
    words::chain,
};
use crate::model::NodeName;

mod address;
mod credentials;
mod failure;
pub mod import;

pub use self::{
    address::{Address, NotAnAddress},
    credentials::Credentials,
};

/// kpng's default as well.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:12090";

/// What is followed, for who looks on.
const STATE: &str = "state";

/// The largest message that is read. A Service with as many addresses and ports as etcd would take is a tenth of it.
const MAX_MESSAGE: usize = 16 << 20;

/// How much may be on the way: the first state of a large cluster takes a few round trips, and not hundreds.
const WINDOW: u32 = 1 << 20;

/// How often a server is asked whether it is alive that thinks it is asked too often: Go's gRPC, which kpng is made of, breaks off
/// connections on which nothing happens if that is more often than this.
const SELDOM: Duration = Duration::from_mins(6);

/// The kernel counts these in seconds.
const SECOND: Duration = Duration::from_secs(1);

/// What the command line says about this source.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the server is.
    pub address: Address,
    /// For TLS; without it if there is none.
    pub credentials: Option<Credentials>,
    /// Whose state is asked for.
    pub node: NodeName,
    /// How often the server is asked, and how long it may be silent.
    pub timing: Timing,
}

impl Options {
    /// Everything as the command line has it without flags. A server that has died is noticed after half a minute.
    #[must_use]
    pub fn new(address: Address, node: NodeName) -> Self {
        let timing = Timing { silence: Duration::from_secs(30), ..Timing::default() };
        Self { address, credentials: None, node, timing }
    }

    /// What a connection is made with, by files as they are now.
    fn endpoint(&self) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from(self.address.uri(self.credentials.is_some()));
        let Some(credentials) = &self.credentials else { return Ok(endpoint) };
        endpoint.tls_config(credentials.read()?).map_err(|error| {
            format!(
                "the certificates and keys cannot be used: {}; check --api-ca, --api-cert and --api-key",
                chain(&error)
            )
        })
    }
}

/// A server that can be followed. Nothing has been sent to it yet.
#[derive(Debug)]
pub struct Source {
    options: Options,
}

impl Source {
    /// Checks what can be checked without the server.
    ///
    /// # Errors
    ///
    /// The files for TLS are of no use.
    pub fn open(options: Options) -> anyhow::Result<Self> {
        match options.endpoint() {
            Ok(_) => Ok(Self { options }),
            Err(why) => Err(anyhow!(why)),
        }
    }

    /// Follows the server until the receiver is dropped. Must be called within a runtime.
    #[must_use]
    pub fn spawn(self, onlooker: Arc<dyn Onlooker>) -> mpsc::Receiver<Batch> {
        let options = self.options;
        let (batches, receiver) = mpsc::channel(1);
        let reporter = Reporter::new(format!("the localv1 server {}", options.address), &[STATE], onlooker);
        let follower = Follower {
            import: Import::new(options.node.clone(), Limits::default()),
            options,
            reporter: reporter.clone(),
            batches: batches.clone(),
            begun: false,
            pings_seldom: false,
        };
        tokio::spawn(async move {
            let mut turn = time::interval(TURN);
            let turns = async {
                loop {
                    turn.tick().await;
                    reporter.turned();
                }
            };
            tokio::select! {
                () = follower.follow() => {}
                () = turns => {}
                () = batches.closed() => {}
            }
        });
        receiver
    }
}

/// Follows one server.
struct Follower {
    options: Options,
    import: Import,
    reporter: Reporter,
    batches: mpsc::Sender<Batch>,
    /// Whether a batch has been handed on.
    begun: bool,
    /// Whether the server wants to be asked seldom whether it is alive.
    pings_seldom: bool,
}

impl Follower {
    /// For ever.
    async fn follow(mut self) {
        let mut patience = Patience::new(self.options.timing);
        loop {
            let failure = self.attempt().await;
            if failure.too_many_pings && !self.pings_seldom {
                // No outage: what it minds is over.
                tracing::debug!("the localv1 server {} wants fewer pings", self.options.address);
                self.pings_seldom = true;
            } else {
                self.reporter.failed(STATE, failure.kind, &failure.reason);
            }
            time::sleep(patience.next()).await;
        }
    }

    /// Follows one stream until it ends, which nothing does well.
    async fn attempt(&mut self) -> Failure {
        self.import.restart();
        let channel = match self.connect().await {
            Ok(channel) => channel,
            Err(failure) => return failure,
        };
        let mut client = SetsClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        // One batch is asked for at a time.
        let (requests, receiver) = mpsc::channel(1);
        let request = WatchReq { node_name: self.options.node.to_string(), draining: true };
        // There is room: the first request must be there before the call, since some servers answer nothing before it.
        let _ = requests.try_send(request.clone());
        let mut items = match client.watch(ReceiverStream::new(receiver)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return Failure::watching(&status),
        };
        self.reporter.accepted(STATE);
        loop {
            match items.message().await {
                Ok(Some(item)) => match self.take(item).await {
                    Ok(false) => {}
                    Ok(true) if requests.send(request.clone()).await.is_ok() => {}
                    // The stream tells why it does not want to be asked.
                    Ok(true) => {}
                    Err(failure) => return failure,
                },
                Ok(None) => return Failure::ended(),
                Err(status) => return Failure::watching(&status),
            }
        }
    }

    async fn connect(&self) -> Result<Channel, Failure> {
        let Options { address, timing, .. } = &self.options;
        // Asked and waited for: what has died within the pause is noticed at the end of both.
        let (pause, wait) = (timing.silence * 2 / 3, timing.silence / 3);
        let endpoint = self.options.endpoint().map_err(|why| Failure::credentials(&why))?;
        let endpoint = endpoint
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(if self.pings_seldom { SELDOM } else { pause })
            .keep_alive_timeout(wait)
            .keep_alive_while_idle(true);
        let connected = time::timeout(wait, async {
            match address {
                Address::Tcp(_) => {
                    let mut connector = HttpConnector::new();
                    connector.enforce_http(false);
                    connector.set_nodelay(true);
                    // The kernel notices a host that has gone, also where pings are seldom.
                    connector.set_keepalive(Some((pause / 2).max(SECOND)));
                    connector.set_keepalive_interval(Some((pause / 4).max(SECOND)));
                    connector.set_keepalive_retries(Some(3));
                    connector.set_tcp_user_timeout(Some(timing.silence));
                    endpoint.connect_with_connector(connector).await
                }
                Address::Unix(path) => {
                    let path = path.clone();
                    let connect = move |_: Uri| {
                        let path = path.clone();
                        async move { UnixStream::connect(path).await.map(TokioIo::new) }
                    };
                    endpoint.connect_with_connector(service_fn(connect)).await
                }
            }
        });
        match connected.await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(Failure::connecting(&error, address)),
            Err(_) => Err(Failure::slow(wait)),
        }
    }

    /// Takes what the server says next. Returns whether a batch is over, and has been handed on.
    async fn take(&mut self, item: OpItem) -> Result<bool, Failure> {
        let Some(changes) = self.import.take(item).map_err(Failure::too_much)? else { return Ok(false) };
        let onlooker = self.reporter.onlooker();
        onlooker.heard(STATE);
        let unknown = self.import.take_unknown();
        if unknown > 0 {
            tracing::debug!(
                unknown,
                "the localv1 server {} says what is not known here",
                self.options.address
            );
        }
        let Changes { objects, problems, whole } = changes;
        if whole && self.begun {
            onlooker.relisted(STATE);
        }
        if self.begun && objects.is_empty() && problems.is_none() {
            return Ok(true);
        }
        if !self.begun && objects.is_empty() {
            tracing::info!(
                "the localv1 server {} has no Service for this node yet: nothing to do until it has",
                self.options.address
            );
        }
        self.begun = true;
        let events = objects.into_iter().map(|(id, object)| object.map_or(Event::Delete(id), Event::Apply));
        let batch = Batch { events: events.collect(), problems, ..Batch::default() };
        if self.batches.send(batch).await.is_err() {
            // Nobody listens any more: the task is being ended.
            pending::<()>().await;
        }
        Ok(true)
    }
}
