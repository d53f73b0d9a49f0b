//! `proxier api`: takes the state of a node from a localv1 server, proxier's own (`to-api`) or kpng's, and delivers what changes.
//! Goes on through whatever happens to the server, and holds the last state meanwhile. Not for what the values mean: that is
//! `import`'s.
//!
//! A batch is asked for when the one before has been handed on: while the agent is busy, changes of one value come together
//! at the server.

use std::{future::pending, sync::Arc, time::Duration};

use anyhow::anyhow;
use proxier_localv1::{OpItem, WatchReq, sets_client::SetsClient};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use self::{
    connection::{Channel, Pings, connect, tls},
    failure::Failure,
    import::{Changes, Import, Limits},
};
use super::{
    Batch, Event, Onlooker, TURN,
    patience::{Patience, Timing},
    standing::Reporter,
};
use crate::model::NodeName;

mod address;
mod connection;
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

/// How long a server that answers pings may take to answer the call. Kpng and proxier do so at once, whatever they have to say.
const ANSWER: Duration = Duration::from_secs(60);
/// The pause after a batch without news.
const NO_NEWS: Duration = Duration::from_millis(10);
/// How long a server may take over its first state before somebody wonders.
const FIRST_STATE: Duration = Duration::from_secs(5);

/// The largest message that is read. A Service with as many addresses and ports as etcd would take is a tenth of it.
const MAX_MESSAGE: usize = 16 << 20;

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
        match tls(&options) {
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

/// How a stream has ended.
enum Ended {
    /// With what the server says of it, or what its connection does.
    With(Status),
    /// Otherwise.
    Of(Failure),
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

    /// Connects, and follows one stream until it ends.
    async fn attempt(&mut self) -> Failure {
        self.import.restart();
        let pings = if self.pings_seldom { Pings::Seldom } else { Pings::Often };
        let mut connection = match connect(&self.options, pings).await {
            Ok(connection) => connection,
            Err(failure) => return failure,
        };
        match self.watch(&mut connection.client).await {
            Ended::Of(failure) => failure,
            Ended::With(status) if failure::is_of_connection(&status) => {
                Failure::broken_off(&status, &connection.cause().await)
            }
            Ended::With(status) => Failure::refused(&status),
        }
    }

    /// Follows one stream.
    async fn watch(&mut self, client: &mut SetsClient<Channel>) -> Ended {
        // One batch is asked for at a time.
        let (requests, receiver) = mpsc::channel(1);
        let request = WatchReq { node_name: self.options.node.to_string(), draining: true };
        // There is room: the first request must be there before the call, since some servers answer nothing before it.
        let _ = requests.try_send(request.clone());
        let mut items = match time::timeout(ANSWER, client.watch(ReceiverStream::new(receiver))).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Ended::With(status),
            Err(_) => return Ended::Of(Failure::slow(ANSWER)),
        };
        self.reporter.accepted(STATE);
        let mut waits_quietly = true;
        loop {
            let message = if waits_quietly && !self.begun {
                match time::timeout(FIRST_STATE, items.message()).await {
                    Ok(message) => message,
                    Err(_) => {
                        waits_quietly = false;
                        tracing::info!(
                            "the localv1 server {} has sent no state yet: its own source is away, or it is kpng and has no \
                             Service; nothing is changed before it has",
                            self.options.address
                        );
                        continue;
                    }
                }
            } else {
                items.message().await
            };
            match message {
                Ok(Some(item)) => match self.take(item).await {
                    Ok(false) => {}
                    Ok(true) => {
                        // If it does not want to be asked any more, the stream tells why. If there is no room, it has not read what it
                        // was asked before.
                        let _ = requests.try_send(request.clone());
                    }
                    Err(failure) => return Ended::Of(failure),
                },
                Ok(None) => return Ended::Of(Failure::ended()),
                Err(status) => return Ended::With(status),
            }
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
            // A server that says nothing again and again is not asked as fast as it can.
            time::sleep(NO_NEWS).await;
            return Ok(true);
        }
        if !self.begun && objects.is_empty() {
            tracing::info!("the localv1 server {} has no Service for this node", self.options.address);
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
