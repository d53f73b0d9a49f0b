//! Composition root: which source feeds which sink, and when. Holds the catalog, works out the desired state at every
//! change, hands it to the sink, tries again what failed, and ends on a signal without undoing anything.

use std::{future::Future, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    catalog::Catalog,
    desired::{self, Desired, LocalAddresses, Scope, Settings},
    model::{ObjectId, Problem, Subject},
    observe::{changes, report},
    sink::{Sink, Snapshot, json},
    source::{Batch, Event, Source},
};

mod addresses;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);
/// How soon a new address of an interface is noticed: until then a process of the node that speaks from it to an external
/// address gets no answer.
const ADDRESS_REFRESH: Duration = Duration::from_secs(5);

/// When to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When told to.
    Signalled,
    /// Once the first whole list has been applied.
    FirstApply,
}

/// Whose addresses [`Settings::local_addresses`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Those of the machine that this process runs on: its kernel is what the sink programs.
    ThisNode,
    /// Nobody's.
    Any,
}

/// The signals that end the process, SIGTERM and SIGINT, from when they are first listened for: one that comes while a
/// sink is being opened, which takes seconds, ends the process as well, and no worse.
#[derive(Debug)]
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
}

impl Shutdown {
    /// Listens from now on. To be called within a runtime.
    ///
    /// # Errors
    ///
    /// The process cannot have handlers for these signals.
    pub fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
        })
    }

    async fn signalled(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Keeps `sink` in line with what comes from `source`, until `shutdown` or `until` says so. Then nothing is undone:
/// packets go on without the agent.
///
/// # Errors
///
/// The source has ended; the addresses of this node cannot be told; or, with [`Until::FirstApply`], the sink could not
/// apply the state.
pub async fn run(
    source: Source,
    sink: &mut dyn Sink,
    settings: Settings,
    until: Until,
    machine: Machine,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let mut agent = Agent::new(sink, settings);
    if machine == Machine::ThisNode {
        agent.watch_addresses(addresses::of_this_node)?;
    }
    agent.run(source.batches, until, shutdown.signalled()).await
}

type AddressReader<'a> = Box<dyn FnMut() -> anyhow::Result<LocalAddresses> + Send + 'a>;

/// A failed attempt, and when the next one is due.
#[derive(Clone, Copy, Debug)]
struct Retry {
    delay: Duration,
    at: Instant,
}

struct Agent<'a> {
    sink: &'a mut dyn Sink,
    settings: Settings,
    catalog: Catalog,
    source_problems: Vec<Problem>,
    report: report::Report,
    /// What the sink has applied last; before the first time, what it had already.
    in_force: Desired,
    /// Whether the sink has applied anything.
    ready: bool,
    retry: Option<Retry>,
    /// Whether the last housekeeping failed: one line in the log, not one a second.
    tick_failed: bool,
    /// Whether the source has delivered its first whole list: nothing is applied before.
    synced: bool,
    /// Tells [`Settings::local_addresses`]; none if they never change.
    read_addresses: Option<AddressReader<'a>>,
    addresses_due: Instant,
    /// As `tick_failed`.
    addresses_failed: bool,
}

impl<'a> Agent<'a> {
    fn new(sink: &'a mut dyn Sink, settings: Settings) -> Self {
        Self {
            // Before anything is applied: an attempt that fails half-way must not hide what it changed.
            in_force: sink.in_force(),
            ready: false,
            sink,
            settings,
            catalog: Catalog::default(),
            source_problems: Vec::new(),
            report: report::Report::default(),
            retry: None,
            tick_failed: false,
            synced: false,
            read_addresses: None,
            addresses_due: Instant::now(),
            addresses_failed: false,
        }
    }

    /// Has `read` tell [`Settings::local_addresses`], now and from time to time.
    fn watch_addresses(
        &mut self,
        mut read: impl FnMut() -> anyhow::Result<LocalAddresses> + Send + 'a,
    ) -> anyhow::Result<()> {
        self.settings.local_addresses = read()?;
        self.addresses_due = Instant::now() + ADDRESS_REFRESH;
        self.read_addresses = Some(Box::new(read));
        Ok(())
    }

    async fn run(
        mut self,
        mut batches: mpsc::Receiver<Batch>,
        until: Until,
        shutdown: impl Future<Output = &'static str>,
    ) -> anyhow::Result<()> {
        tokio::pin!(shutdown);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Far away if nothing has failed; the branch is off then.
            let retry_at = self.retry.map_or_else(Instant::now, |retry| retry.at);
            tokio::select! {
                // In this order: whoever has told it to end while the sink was being opened wants nothing applied.
                biased;
                signal = &mut shutdown => {
                    tracing::info!(signal, "ending; what is in force stays in force");
                    return Ok(());
                }
                batch = batches.recv() => {
                    let Some(batch) = batch else {
                        bail!("the source has ended: see the log above, then start proxier again");
                    };
                    self.absorb(batch);
                    // What came meanwhile is one change, not many.
                    while let Ok(batch) = batches.try_recv() {
                        self.absorb(batch);
                    }
                }
                () = sleep_until(retry_at), if self.retry.is_some() => {}
                _ = tick.tick() => {
                    self.tick();
                    if !(self.refresh_addresses() && self.synced) {
                        continue;
                    }
                }
            }
            match self.apply() {
                Ok(()) if until == Until::FirstApply => return Ok(()),
                Ok(()) => {}
                // `| head` has what it wanted.
                Err(error) if json::is_broken_pipe(&error) => return Ok(()),
                Err(error) if until == Until::FirstApply => return Err(error),
                Err(error) => self.failed(&error),
            }
        }
    }

    fn absorb(&mut self, batch: Batch) {
        self.synced = true;
        for event in batch.events {
            match event {
                Event::Apply(object) => drop(self.catalog.apply(object)),
                Event::Delete(id) => drop(self.catalog.delete(&id)),
            }
        }
        if let Some(problems) = batch.problems {
            self.source_problems = problems;
        }
    }

    fn apply(&mut self) -> anyhow::Result<()> {
        let (desired, problems) = desired::compute(&self.catalog, &self.settings);
        let transitions = self.report.update(self.source_problems.iter().cloned().chain(problems));
        report::log(&transitions, |subject| exists(&self.catalog, subject));

        self.sink.apply(Snapshot { catalog: &self.catalog, desired: &desired, scope: &Scope::All })?;
        if self.retry.take().is_some() {
            tracing::info!("applied now, after failures");
        }
        changes::log(&self.in_force, &desired);
        if !std::mem::replace(&mut self.ready, true) {
            tracing::info!(
                node = %self.settings.node,
                services = self.catalog.services().count(),
                externals = desired.services.values().map(|service| service.externals.len()).sum::<usize>(),
                pods = desired.services.values().map(|service| service.pods.len()).sum::<usize>(),
                "ready"
            );
        }
        self.in_force = desired;
        Ok(())
    }

    fn failed(&mut self, error: &anyhow::Error) {
        let delay = self.retry.map_or(FIRST_RETRY, |retry| (retry.delay * 2).min(LAST_RETRY));
        tracing::error!(
            retry_in_seconds = delay.as_secs(),
            "cannot apply the state: {error:#}; mend that, it is tried again without a restart"
        );
        self.retry = Some(Retry { delay, at: Instant::now() + delay });
    }

    fn tick(&mut self) {
        let result = self.sink.tick();
        if let Err(error) = &result
            && !self.tick_failed
        {
            tracing::warn!("housekeeping failed: {error:#}; it is tried again every second");
        }
        if result.is_ok() && self.tick_failed {
            tracing::info!("housekeeping works again");
        }
        self.tick_failed = result.is_err();
    }

    /// Reads this node's addresses again if that is due. Returns whether they have changed.
    fn refresh_addresses(&mut self) -> bool {
        let Some(read) = &mut self.read_addresses else { return false };
        if Instant::now() < self.addresses_due {
            return false;
        }
        self.addresses_due = Instant::now() + ADDRESS_REFRESH;
        let addresses = match read() {
            Ok(addresses) => addresses,
            Err(error) => {
                if !self.addresses_failed {
                    tracing::warn!(
                        "{error:#}; those known before count, and it is tried again every {} seconds",
                        ADDRESS_REFRESH.as_secs()
                    );
                }
                self.addresses_failed = true;
                return false;
            }
        };
        if std::mem::take(&mut self.addresses_failed) {
            tracing::info!("the addresses of this node's interfaces can be listed again");
        }
        let changed = addresses != self.settings.local_addresses;
        self.settings.local_addresses = addresses;
        changed
    }
}

/// Whether there is still something that a problem can be solved of.
fn exists(catalog: &Catalog, subject: &Subject) -> bool {
    match subject {
        Subject::Object(ObjectId::Service(name)) => catalog.service(name).is_some(),
        Subject::Object(ObjectId::EndpointSlice(name)) => catalog.slice(name).is_some(),
        Subject::Object(ObjectId::Node(name)) => catalog.nodes().any(|node| node.name == *name),
        Subject::File(path) => path.exists(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeSet, VecDeque},
        future::pending,
        net::IpAddr,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::model::{
        NodeName, Object,
        testing::{mk_endpoint, mk_service, mk_slice},
    };

    /// Fails as often as it is told, and remembers when it was asked for what.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Recorded>>);

    #[derive(Default)]
    struct Recorded {
        failures: VecDeque<bool>,
        /// Seconds since the start, how many addresses, and whether it worked.
        applied: Vec<(u64, usize, bool)>,
        ticks: usize,
        start: Option<Instant>,
        /// What a former agent left.
        left: Desired,
    }

    impl Sink for Recorder {
        fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
            let mut recorded = self.0.lock().unwrap();
            let start = *recorded.start.get_or_insert_with(Instant::now);
            let fails = recorded.failures.pop_front().unwrap_or(false);
            recorded.applied.push((start.elapsed().as_secs(), snapshot.desired.services.len(), !fails));
            anyhow::ensure!(!fails, "no");
            Ok(())
        }

        fn in_force(&self) -> Desired {
            self.0.lock().unwrap().left.clone()
        }

        fn tick(&mut self) -> anyhow::Result<()> {
            self.0.lock().unwrap().ticks += 1;
            Ok(())
        }
    }

    fn settings() -> Settings {
        Settings::new(NodeName::new("node1"))
    }

    fn batch(objects: impl IntoIterator<Item = Object>) -> Batch {
        Batch { events: objects.into_iter().map(Event::Apply).collect(), ..Batch::default() }
    }

    fn web() -> Batch {
        batch([
            mk_service("web", ["10.0.0.55"]).into(),
            mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into(),
        ])
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_applied_before_the_first_whole_list() {
        let recorder = Recorder::default();
        let (batches, receiver) = mpsc::channel(1);
        let mut sink = recorder.clone();
        let shutdown = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            "test"
        };
        Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, shutdown).await.unwrap();
        drop(batches);
        let recorded = recorder.0.lock().unwrap();
        assert_eq!(recorded.applied, []);
        assert!(recorded.ticks >= 10, "{} ticks", recorded.ticks);
    }

    #[tokio::test(start_paused = true)]
    async fn a_signal_that_came_before_the_source_was_heard_keeps_everything_as_it_is() {
        // Many times: a choice by chance would be right now and then.
        for _ in 0..32 {
            let recorder = Recorder::default();
            let (batches, receiver) = mpsc::channel(1);
            batches.send(web()).await.unwrap();
            let mut sink = recorder.clone();
            let shutdown = std::future::ready("test");
            Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, shutdown).await.unwrap();
            assert_eq!(recorder.0.lock().unwrap().applied, []);
        }
    }

    /// Collects what is logged on this thread.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
            // Another test's thread that is the first to come by a log line, and has nobody who listens, must not switch it
            // off for all: somebody listens always.
            static ALWAYS: std::sync::Once = std::sync::Once::new();
            ALWAYS.call_once(|| {
                let _ = tracing_subscriber::fmt().with_writer(std::io::sink).try_init();
            });
            let log = Self::default();
            let writer = log.clone();
            let subscriber =
                tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
            (log, tracing::subscriber::set_default(subscriber))
        }

        fn lines_with(&self, text: &str) -> Vec<String> {
            let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_restarted_agent_tells_what_changed_while_none_ran_and_nothing_else() {
        let mut catalog = Catalog::default();
        for event in web().events.into_iter().chain(batch([mk_service("gone", ["10.0.0.56"]).into()]).events)
        {
            let Event::Apply(object) = event else { panic!("{event:?}") };
            catalog.apply(object);
        }
        let recorder = Recorder::default();
        let (left, _) = desired::compute(&catalog, &settings());
        recorder.0.lock().unwrap().left = left;
        // Of a first attempt that fails, nothing is told; what it was before that counts.
        recorder.0.lock().unwrap().failures = [true].into();

        let (log, _listening) = Log::listen();
        let (batches, receiver) = mpsc::channel(1);
        batches.send(web()).await.unwrap();
        let mut sink = recorder.clone();
        let shutdown = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            "test"
        };
        Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, shutdown).await.unwrap();
        let withdrawn = log.lines_with("Service withdrawn");
        assert!(withdrawn.len() == 1 && withdrawn[0].contains("default/gone"), "{withdrawn:?}");
        assert_eq!(log.lines_with("default/web"), [""; 0]);
        let ready = log.lines_with(" ready ");
        assert!(ready.len() == 1 && ready[0].contains("externals=1"), "{ready:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_tried_again_ever_more_slowly_and_the_same_state_is_not_applied_twice() {
        let recorder = Recorder::default();
        recorder.0.lock().unwrap().failures = [true; 9].into();
        let (batches, receiver) = mpsc::channel(1);
        batches.send(web()).await.unwrap();
        let mut sink = recorder.clone();
        let shutdown = async {
            tokio::time::sleep(Duration::from_secs(1000)).await;
            "test"
        };
        Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, shutdown).await.unwrap();
        let applied = recorder.0.lock().unwrap().applied.clone();
        let times: Vec<_> = applied.iter().map(|(at, ..)| *at).collect();
        assert_eq!(times, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
        assert!(applied.iter().all(|(_, services, _)| *services == 1));
        assert_eq!(applied.iter().filter(|(.., worked)| *worked).count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_does_not_wait_for_the_next_attempt() {
        let recorder = Recorder::default();
        recorder.0.lock().unwrap().failures = [true; 6].into();
        let (batches, receiver) = mpsc::channel(1);
        let mut sink = recorder.clone();
        let shutdown = async {
            batches.send(web()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(20)).await;
            batches.send(batch([mk_service("mail", ["10.0.0.56"]).into()])).await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            "test"
        };
        Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, shutdown).await.unwrap();
        let applied = recorder.0.lock().unwrap().applied.clone();
        assert_eq!(applied.last(), Some(&(20, 2, false)));
    }

    #[tokio::test(start_paused = true)]
    async fn once_ends_after_the_first_apply_and_fails_if_that_fails() {
        for fails in [false, true] {
            let recorder = Recorder::default();
            recorder.0.lock().unwrap().failures.push_back(fails);
            let (batches, receiver) = mpsc::channel(1);
            batches.send(web()).await.unwrap();
            let mut sink = recorder.clone();
            let result = Agent::new(&mut sink, settings()).run(receiver, Until::FirstApply, pending()).await;
            assert_eq!(result.is_err(), fails);
            assert_eq!(recorder.0.lock().unwrap().applied.len(), 1);
        }
    }

    fn only(address: IpAddr) -> LocalAddresses {
        LocalAddresses { identities: BTreeSet::from([address]), ..LocalAddresses::default() }
    }

    /// An agent on a node whose interfaces have, at each reading, the next of `readings`, and the last one for ever.
    async fn run_on_addresses(
        recorder: &Recorder,
        mut readings: VecDeque<Option<&'static str>>,
        seconds: u64,
    ) -> Vec<(u64, usize, bool)> {
        let (batches, receiver) = mpsc::channel(1);
        batches.send(web()).await.unwrap();
        let mut sink = recorder.clone();
        let mut agent = Agent::new(&mut sink, settings());
        agent
            .watch_addresses(move || {
                let reading =
                    if readings.len() > 1 { readings.pop_front() } else { readings.front().copied() };
                let address = reading.flatten().context("no addresses")?;
                Ok(only(address.parse().unwrap()))
            })
            .unwrap();
        let shutdown = async {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            "test"
        };
        agent.run(receiver, Until::Signalled, shutdown).await.unwrap();
        recorder.0.lock().unwrap().applied.clone()
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_this_node_gets_is_taken_from_its_service_and_given_back_when_it_goes() {
        let (other, webs) = (Some("192.168.1.1"), Some("10.0.0.55"));
        let applied = run_on_addresses(&Recorder::default(), [other, webs, webs, other].into(), 1000).await;
        assert_eq!(applied, [(0, 1, true), (5, 0, true), (15, 1, true)]);
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_that_cannot_be_read_again_stay_as_they_were() {
        let webs = Some("10.0.0.55");
        let applied = run_on_addresses(&Recorder::default(), [webs, None].into(), 1000).await;
        assert_eq!(applied, [(0, 0, true)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_address_does_not_cause_anything_before_the_first_whole_list() {
        let mut number = 0;
        let recorder = Recorder::default();
        let (batches, receiver) = mpsc::channel(1);
        let mut sink = recorder.clone();
        let mut agent = Agent::new(&mut sink, settings());
        agent
            .watch_addresses(|| {
                number += 1;
                Ok(only(IpAddr::from([10, 0, 1, number])))
            })
            .unwrap();
        let shutdown = async {
            tokio::time::sleep(Duration::from_secs(100)).await;
            "test"
        };
        agent.run(receiver, Until::Signalled, shutdown).await.unwrap();
        drop(batches);
        assert_eq!(recorder.0.lock().unwrap().applied, []);
        assert!(number >= 4, "read {number} times");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_ends_is_an_error() {
        let (batches, receiver) = mpsc::channel(1);
        drop(batches);
        let mut sink = Recorder::default();
        let result = Agent::new(&mut sink, settings()).run(receiver, Until::Signalled, pending()).await;
        assert!(result.unwrap_err().to_string().starts_with("the source has ended"));
    }
}
