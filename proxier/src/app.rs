//! Composition root: which source feeds which sink, and when. Holds what this node should have, hands what differs to the sink at
//! every change, tries again what failed, says what became of it, and ends on a signal without undoing anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    mem,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    catalog::Catalog,
    desired::{self, Changed, Desired, LocalAddresses, Scope, ServiceKey, Settings},
    model::{ObjectId, ObjectName, Problem, Subject},
    observe::{
        changes::{self, Audience},
        counts::Counts,
        events::Events,
        health::Beat,
        notices::{self, Reason},
        observed::Observed,
        report::{self, Transition},
        service_health::{ServiceHealth, health_check_ports},
    },
    sink::{Failure, Incomplete, Sink, Snapshot, json},
    source::{Batch, Event},
};

mod addresses;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);
/// How soon a new address of an interface is noticed: until then a process of the node that speaks from it to an external
/// address gets no answer.
const ADDRESS_REFRESH: Duration = Duration::from_secs(5);
/// How long a Service that is just being made may be without endpoints before that is worth an Event: slices come after it.
const MAY_PASS: Duration = Duration::from_secs(10);
/// The longest that the loop may take for one turn: it waits for the kernel, which on a machine that swaps takes its time over
/// the first whole state.
const TURN: Duration = Duration::from_secs(120);

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

/// Who is told what becomes of it.
#[derive(Debug)]
pub struct Tellers {
    /// Metrics, health and status.
    pub observed: Observed,
    /// For whom the log's lines about Services are true.
    pub audience: Audience,
    /// Events at the API server; none if there is no API server.
    pub events: Option<Events>,
    /// The answers to load balancers that ask at a `healthCheckNodePort`; none if packets do not come to this machine.
    pub service_health: Option<ServiceHealth>,
}

impl Tellers {
    /// Nobody but `observed`.
    #[must_use]
    pub const fn new(observed: Observed) -> Self {
        Self { observed, audience: Audience::Node, events: None, service_health: None }
    }
}

/// Keeps `sink` in line with what comes in `batches`, until `shutdown` or `until` says so. Then nothing is undone: packets
/// go on without the agent.
///
/// # Errors
///
/// The source has ended; the addresses of this node cannot be told; or, with [`Until::FirstApply`], the sink could not
/// apply the state.
pub async fn run(
    batches: mpsc::Receiver<Batch>,
    sink: &mut dyn Sink,
    settings: Settings,
    tellers: Tellers,
    until: Until,
    machine: Machine,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let mut agent = Agent::new(sink, settings, tellers);
    if machine == Machine::ThisNode {
        agent.watch_addresses(addresses::of_this_node)?;
    }
    agent.run(batches, until, shutdown.signalled()).await
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
    state: desired::State,
    source_problems: BTreeMap<Subject, Vec<Problem>>,
    /// Of Services whose health check's port is another one's.
    port_problems: BTreeMap<Subject, Vec<Problem>>,
    report: report::Report,
    /// What the sink has applied last; before the first time, what it had already.
    in_force: Desired,
    /// What may differ from that.
    scope: Scope,
    /// Services that the sink has not been shown since anything of them changed.
    touched: Scope<ObjectName>,
    /// Subjects that may have other problems than those told.
    unreported: BTreeSet<Subject>,
    /// When what has been absorbed since the last apply happened.
    triggered: Vec<SystemTime>,
    /// Whether the sink has put anything in force.
    ready: bool,
    /// Whether it was still at that when it was asked last.
    underway: bool,
    retry: Option<Retry>,
    /// What could not be applied when it was last tried, as told.
    failures: Vec<Failure>,
    /// What is wrong and may be over in a moment: told of in an Event if it is not.
    passing: BTreeMap<Subject, Instant>,
    /// Whether the last housekeeping failed: one line in the log, not one a second.
    tick_failed: bool,
    /// Whether the source has delivered its first whole list: nothing is applied before.
    synced: bool,
    /// Whether objects have changed since they were counted.
    uncounted: bool,
    /// Tells [`Settings::local_addresses`]; none if they never change.
    read_addresses: Option<AddressReader<'a>>,
    addresses_due: Instant,
    /// As `tick_failed`.
    addresses_failed: bool,
    tellers: Tellers,
    beat: Beat,
}

impl<'a> Agent<'a> {
    fn new(sink: &'a mut dyn Sink, settings: Settings, tellers: Tellers) -> Self {
        Self {
            // Before anything is applied: an attempt that fails half-way must not hide what it changed.
            in_force: sink.in_force(),
            scope: Scope::All,
            touched: Scope::All,
            ready: false,
            underway: false,
            sink,
            state: desired::State::new(settings),
            source_problems: BTreeMap::new(),
            port_problems: BTreeMap::new(),
            report: report::Report::default(),
            unreported: BTreeSet::new(),
            triggered: Vec::new(),
            retry: None,
            failures: Vec::new(),
            passing: BTreeMap::new(),
            tick_failed: false,
            synced: false,
            uncounted: false,
            read_addresses: None,
            addresses_due: Instant::now(),
            addresses_failed: false,
            beat: tellers.observed.beat("agent", TURN),
            tellers,
        }
    }

    /// Has `read` tell [`Settings::local_addresses`], now and from time to time.
    fn watch_addresses(
        &mut self,
        mut read: impl FnMut() -> anyhow::Result<LocalAddresses> + Send + 'a,
    ) -> anyhow::Result<()> {
        self.state.set_local_addresses(read()?);
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
            self.beat.turn();
            // Far away if nothing has failed; the branch is off then.
            let retry_at = self.retry.map_or_else(Instant::now, |retry| retry.at);
            tokio::select! {
                // In this order: whoever has told it to end while the sink was being opened wants nothing applied.
                biased;
                signal = &mut shutdown => {
                    tracing::info!(signal, "ending; what is in force stays in force");
                    return Ok(());
                }
                // Before the batches, which may come without a pause.
                _ = tick.tick() => {
                    self.tick();
                    if !(self.refresh_addresses() && self.synced) {
                        continue;
                    }
                }
                () = sleep_until(retry_at), if self.retry.is_some() => self.scope = Scope::All,
                batch = batches.recv() => {
                    let Some(batch) = batch else {
                        bail!("the source has ended: see the log above, then start proxier again");
                    };
                    let mut news = self.absorb(batch);
                    // What came meanwhile is one change, not many.
                    while let Ok(batch) = batches.try_recv() {
                        news |= self.absorb(batch);
                    }
                    if !news {
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

    /// Takes a batch in. Returns whether there is something to be applied or reported.
    fn absorb(&mut self, batch: Batch) -> bool {
        let Batch { events, problems, api_server, triggered } = batch;
        let mut news = !mem::replace(&mut self.synced, true);
        self.tellers.observed.synced();
        for event in events {
            news |= match event {
                Event::Apply(object) => self.state.apply(object),
                Event::Delete(id) => self.state.delete(&id),
            };
        }
        self.uncounted |= news;
        if let Some(addresses) = api_server {
            news |= self.state.set_api_server_addresses(addresses);
        }
        if news {
            self.triggered.extend(triggered);
            self.tellers.observed.queued();
        }
        if let Some(problems) = problems {
            news = true;
            let former = mem::replace(&mut self.source_problems, by_subject(problems));
            let subjects = former.keys().chain(self.source_problems.keys());
            let changed =
                subjects.filter(|subject| former.get(*subject) != self.source_problems.get(*subject));
            self.unreported.extend(changed.cloned());
        }
        news
    }

    /// Applies what may differ from what is in force. While something fails, that is what has changed since; all of it, what has
    /// failed too, when the retry is due.
    fn apply(&mut self) -> anyhow::Result<()> {
        let Changed { services, touched, subjects, node_addresses: _ } = self.state.refresh();
        self.scope.extend(services);
        self.touched.extend(touched);
        self.unreported.extend(subjects);
        self.report();

        let is_retry = self.retry.is_some() && self.scope == Scope::All;
        if is_retry {
            self.tellers.observed.retried();
        }
        let start = Instant::now();
        let touched = mem::replace(&mut self.touched, Scope::none());
        let snapshot = Snapshot {
            catalog: self.state.catalog(),
            desired: self.state.desired(),
            scope: &self.scope,
            touched: &touched,
        };
        let triggered = mem::take(&mut self.triggered);
        if let Err(error) = self.sink.apply(snapshot) {
            let error = match error.downcast() {
                Ok(Incomplete { failures }) => self.applied_but_for(failures),
                Err(error) => {
                    self.scope = Scope::All;
                    self.touched = Scope::All;
                    error
                }
            };
            self.tellers.observed.apply_failed(start.elapsed(), &error);
            return Err(error);
        }
        let scope = mem::replace(&mut self.scope, Scope::none());
        self.failures = self.unsolved(&scope, &[]);
        if scope == Scope::All && self.retry.take().is_some() {
            tracing::info!("applied now, after failures");
        }
        self.tell_changes(scope);
        if self.retry.is_some() {
            if !self.sink.is_underway() {
                self.tellers.observed.applied_beside_failures(start.elapsed());
                self.programmed(triggered);
            }
            return Ok(());
        }
        self.underway = self.sink.is_underway();
        if self.underway {
            return Ok(());
        }
        self.tellers.observed.applied(start.elapsed());
        self.programmed(triggered);
        self.say_ready();
        Ok(())
    }

    /// Notes that all within the scope is in force but for what has failed. Returns that, together with what failed before and
    /// was not tried this time, as an error.
    fn applied_but_for(&mut self, mut failures: Vec<Failure>) -> anyhow::Error {
        self.tellers.observed.health.applied_in_part();
        let failed = failures.iter().filter_map(|failure| failure.service.clone()).collect();
        let scope = mem::replace(&mut self.scope, Scope::none());
        failures.splice(..0, self.unsolved(&scope, &failures));
        self.tell_changes(self.without(&failed, scope));
        Incomplete { failures }.into()
    }

    /// What failed before about Services that an attempt with this scope leaves alone, and that has not failed again.
    fn unsolved(&self, scope: &Scope, failures: &[Failure]) -> Vec<Failure> {
        let Scope::Only(tried) = scope else { return Vec::new() };
        let is_unsolved = |known: &&Failure| {
            known.service.as_ref().is_some_and(|key| !tried.contains(key))
                && failures.iter().all(|failure| failure.service != known.service)
        };
        self.failures.iter().filter(is_unsolved).cloned().collect()
    }

    fn programmed(&self, triggered: Vec<SystemTime>) {
        for happened in triggered {
            self.tellers.observed.programmed(happened);
        }
    }

    /// Says so once.
    fn say_ready(&mut self) {
        if !mem::replace(&mut self.ready, true) {
            let services = self.in_force.services.values();
            let (externals, pods) = services.fold((0, 0), |(externals, pods), service| {
                (externals + service.externals.len(), pods + service.pods.len())
            });
            tracing::info!(
                node = %self.state.settings().node,
                services = self.state.catalog().services().count(),
                externals,
                pods,
                "ready"
            );
        }
    }

    /// `scope` without these Services.
    fn without(&self, services: &BTreeSet<ServiceKey>, scope: Scope) -> Scope {
        let keys = match scope {
            Scope::Only(keys) => keys,
            Scope::All => {
                let keys = self.in_force.services.keys().chain(self.state.desired().services.keys());
                keys.cloned().collect()
            }
        };
        Scope::Only(keys.into_iter().filter(|key| !services.contains(key)).collect())
    }

    /// Says what within `scope` is in force now that was not, and notes it.
    fn tell_changes(&mut self, scope: Scope) {
        let (catalog, desired) = (self.state.catalog(), self.state.desired());
        let changes = changes::between(&self.in_force, desired, &scope);
        changes::log(&changes, self.tellers.audience);
        if let Some(events) = &self.tellers.events {
            let node = &self.state.settings().node;
            notices::of_changes(&changes, &self.in_force, catalog, node)
                .into_iter()
                .for_each(|notice| events.tell(notice));
        }
        // What of a Service is in force is counted too.
        self.uncounted |= !changes.is_empty();
        match scope {
            Scope::All => self.in_force.clone_from(desired),
            Scope::Only(keys) => {
                for key in &keys {
                    put(&mut self.in_force, key, desired);
                }
                self.in_force.node_addresses.clone_from(&desired.node_addresses);
            }
        }
    }

    /// Says what is wrong that was not, and what is right again.
    fn report(&mut self) {
        if self.unreported.is_empty() {
            return;
        }
        let catalog = self.state.catalog();
        for subject in mem::take(&mut self.unreported) {
            let known = [&self.source_problems, &self.port_problems];
            let known = known.into_iter().filter_map(|problems| problems.get(&subject)).flatten();
            let problems: Vec<Problem> = known.chain(self.state.problems_of(&subject)).cloned().collect();
            if !problems.iter().any(|problem| Reason::Problem(problem.kind).may_pass()) {
                // The next time counts from its own beginning.
                self.passing.remove(&subject);
            }
            let transitions = self.report.update(&subject, problems);
            report::log(&transitions, |subject| exists(catalog, subject));
            let Some(events) = &self.tellers.events else { continue };
            let node = &self.state.settings().node;
            let appeared = transitions.iter().filter_map(|transition| match transition {
                Transition::Appeared(problem) => Some(problem),
                Transition::More(..) | Transition::Solved(_) => None,
            });
            for notice in appeared.filter_map(|problem| notices::of_problem(problem, catalog, node)) {
                if notice.reason.may_pass() {
                    self.passing.entry(subject.clone()).or_insert_with(|| Instant::now() + MAY_PASS);
                } else {
                    events.tell(notice);
                }
            }
        }
        let known = self.source_problems.values().chain(self.port_problems.values()).flatten();
        let all: Vec<&Problem> = known.chain(self.state.problems()).collect();
        self.tellers.observed.problems(&all);
    }

    /// Tells of what was wrong a moment ago and still is.
    fn tell_lasting(&mut self) {
        let now = Instant::now();
        let due: Vec<Subject> =
            self.passing.extract_if(.., |_, at| *at <= now).map(|(subject, _)| subject).collect();
        let Some(events) = &self.tellers.events else { return };
        let (catalog, node) = (self.state.catalog(), &self.state.settings().node);
        for problem in due.iter().flat_map(|subject| self.state.problems_of(subject)) {
            notices::of_problem(problem, catalog, node)
                .into_iter()
                .filter(|notice| notice.reason.may_pass())
                .for_each(|notice| events.tell(notice));
        }
    }

    /// Notes a failed attempt. One that was due, and not a change that came by meanwhile, makes the next one wait longer.
    fn failed(&mut self, error: &anyhow::Error) {
        let now = Instant::now();
        let known = self.retry;
        let retry = match known {
            Some(retry) if retry.at > now => retry,
            _ => {
                let delay = known.map_or(FIRST_RETRY, |retry| (retry.delay * 2).min(LAST_RETRY));
                Retry { delay, at: now + delay }
            }
        };
        self.retry = Some(retry);
        let failures = match error.downcast_ref() {
            Some(Incomplete { failures }) => failures.clone(),
            // Nothing is known to be solved.
            None => self.failures.clone(),
        };
        if known.is_none_or(|known| known.at <= now)
            || failures.iter().any(|new| !self.failures.contains(new))
        {
            tracing::error!(
                retry_in_seconds = retry.at.saturating_duration_since(now).as_secs_f64().round(),
                "cannot apply the state: {error:#}; mend that, it is tried again without a restart"
            );
        }
        if !failures.is_empty() && failures.iter().all(|failure| failure.is_full) {
            self.tellers.observed.health.applied_but_for_room();
        }
        for failure in failures.iter().filter(|failure| failure.is_full) {
            let told = self.failures.iter().any(|known| known.is_full && known.service == failure.service);
            if let (Some(key), Some(events), false) = (&failure.service, &self.tellers.events, told) {
                let node = &self.state.settings().node;
                let notice = notices::table_full(&key.service, &failure.message, self.state.catalog(), node);
                events.tell(notice);
            }
        }
        self.failures = failures;
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
        if self.underway && !self.sink.is_underway() {
            self.underway = false;
            self.say_ready();
        }
        if let Some(condition) = self.sink.condition() {
            self.tellers.observed.attached(&condition.interfaces);
            self.tellers.observed.pins(condition.pinned);
            self.tellers.observed.direct(condition.direct);
        }
        self.tell_lasting();
        // Not at every change: both look at every object.
        if mem::take(&mut self.uncounted) {
            let (catalog, desired) = (self.state.catalog(), self.state.desired());
            let node = &self.state.settings().node;
            self.tellers.observed.counts(Counts::of(catalog, desired));
            if let Some(service_health) = &mut self.tellers.service_health {
                let (ports, problems) = health_check_ports(catalog, &self.in_force, node);
                service_health.update(&ports);
                let former = mem::replace(&mut self.port_problems, by_subject(problems));
                self.unreported.extend(former.into_keys().chain(self.port_problems.keys().cloned()));
                self.report();
            }
        }
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
        if mem::take(&mut self.addresses_failed) {
            tracing::info!("the addresses of this node's interfaces can be listed again");
        }
        self.state.set_local_addresses(addresses)
    }
}

fn by_subject(problems: Vec<Problem>) -> BTreeMap<Subject, Vec<Problem>> {
    let mut of_subjects: BTreeMap<Subject, Vec<Problem>> = BTreeMap::new();
    for problem in problems {
        of_subjects.entry(problem.subject.clone()).or_default().push(problem);
    }
    of_subjects
}

/// Lets `state` say of `key` what `desired` says.
fn put(state: &mut Desired, key: &ServiceKey, desired: &Desired) {
    match desired.services.get(key) {
        Some(service) => state.services.insert(key.clone(), service.clone()),
        None => state.services.remove(key),
    };
}

/// Whether there is still something that a problem can be solved of.
fn exists(catalog: &Catalog, subject: &Subject) -> bool {
    match subject {
        Subject::Object(ObjectId::Service(name)) => catalog.service(name).is_some(),
        Subject::Object(ObjectId::EndpointSlice(name)) => catalog.slice(name).is_some(),
        Subject::Object(ObjectId::Node(name)) => catalog.node(name).is_some(),
        Subject::File(path) => path.exists(),
    }
}

#[cfg(test)]
mod tests;
