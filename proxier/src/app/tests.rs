use std::{
    collections::{BTreeSet, VecDeque},
    future::pending,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use super::*;
use crate::{
    model::{
        Family, NodeName, Object, ProblemKind,
        testing::{mk_endpoint, mk_name, mk_service, mk_slice},
    },
    observe::notices::{Notice, Reason},
};

/// Fails as often as it is told, and remembers when it was asked for what.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Default)]
struct Recorded {
    failures: VecDeque<bool>,
    /// Seconds since the start, how many addresses, and whether it worked.
    applied: Vec<(u64, usize, bool)>,
    /// Names of the Services that it was to look at, each time; none for all.
    scopes: Vec<Option<BTreeSet<String>>>,
    /// Services that there is no room for.
    too_large: BTreeSet<&'static str>,
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
        let names =
            |keys: &BTreeSet<ServiceKey>| keys.iter().map(|key| key.service.name.to_string()).collect();
        let scope: Option<BTreeSet<String>> = match snapshot.scope {
            Scope::All => None,
            Scope::Only(keys) => Some(names(keys)),
        };
        recorded.scopes.push(scope.clone());
        anyhow::ensure!(!fails, "no");
        let is_tried = |name: &&&str| scope.as_ref().is_none_or(|names| names.contains(**name));
        let failures = recorded.too_large.iter().filter(is_tried).map(|name| Failure {
            subject: (*name).to_owned(),
            service: Some(ServiceKey { service: mk_name(name), family: Family::V4 }),
            is_full: true,
            message: "is too large".to_owned(),
        });
        let failures: Vec<Failure> = failures.collect();
        if failures.is_empty() { Ok(()) } else { Err(Incomplete { failures }.into()) }
    }

    fn in_force(&self) -> Desired {
        self.0.lock().unwrap().left.clone()
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        self.0.lock().unwrap().ticks += 1;
        Ok(())
    }
}

fn tellers() -> Tellers {
    let observed = Observed::new(&settings().node, "test", None);
    Tellers { audience: Audience::Kernel, ..Tellers::new(observed) }
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
    Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
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
        Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
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
    for event in web().events.into_iter().chain(batch([mk_service("gone", ["10.0.0.56"]).into()]).events) {
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
    Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
    let withdrawn = log.lines_with("Service withdrawn");
    assert!(withdrawn.len() == 1 && withdrawn[0].contains("default/gone"), "{withdrawn:?}");
    assert_eq!(log.lines_with("default/web"), [""; 0]);
    let ready = log.lines_with(" ready ");
    assert!(ready.len() == 1 && ready[0].contains("externals=1"), "{ready:?}");
}

#[tokio::test(start_paused = true)]
async fn load_balancers_are_sent_here_once_a_part_is_in_force_and_not_by_an_attempt_that_failed_altogether() {
    let recorder = Recorder::default();
    recorder.0.lock().unwrap().failures = [true].into();
    recorder.0.lock().unwrap().too_large = ["greedy"].into();
    let tellers = tellers();
    let health = tellers.observed.health.clone();
    let (batches, receiver) = mpsc::channel(1);
    let mut sink = recorder.clone();
    let shutdown = async {
        let greedy = batch([mk_service("greedy", ["10.0.0.99"]).into()]);
        batches.send(greedy).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(recorder.0.lock().unwrap().applied, [(0, 1, false)]);
        assert!(!health.serves());
        // The second attempt.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(health.serves());
        "test"
    };
    Agent::new(&mut sink, settings(), tellers).run(receiver, Until::Signalled, shutdown).await.unwrap();
    assert_eq!(recorder.0.lock().unwrap().applied.len(), 2);
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
    Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
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
    Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
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
        let result =
            Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::FirstApply, pending()).await;
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
    let mut agent = Agent::new(&mut sink, settings(), tellers());
    agent
        .watch_addresses(move || {
            let reading = if readings.len() > 1 { readings.pop_front() } else { readings.front().copied() };
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
    let mut agent = Agent::new(&mut sink, settings(), tellers());
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
    let result =
        Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, pending()).await;
    assert!(result.unwrap_err().to_string().starts_with("the source has ended"));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_news_is_not_applied() {
    let recorder = Recorder::default();
    let (batches, receiver) = mpsc::channel(1);
    let mut sink = recorder.clone();
    let shutdown = async {
        for _ in 0..10 {
            batches.send(web()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        "test"
    };
    Agent::new(&mut sink, settings(), tellers()).run(receiver, Until::Signalled, shutdown).await.unwrap();
    assert_eq!(recorder.0.lock().unwrap().applied.len(), 1);
}

/// One Service that does not fit must not cost the others more than a look at itself now and then.
#[tokio::test(start_paused = true)]
async fn beside_a_service_that_does_not_fit_others_change_as_ever_and_it_is_tried_when_that_is_due() {
    let recorder = Recorder::default();
    recorder.0.lock().unwrap().too_large = ["greedy"].into();
    let (log, _listening) = Log::listen();
    let tellers = tellers();
    let observed = tellers.observed.clone();
    let (batches, receiver) = mpsc::channel(1);
    let mut sink = recorder.clone();
    let shutdown = async {
        let greedy = batch([mk_service("greedy", ["10.0.0.99"]).into()]);
        batches.send(greedy).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        batches.send(web()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(6)).await;
        recorder.0.lock().unwrap().too_large.clear();
        tokio::time::sleep(Duration::from_secs(2)).await;
        "test"
    };
    Agent::new(&mut sink, settings(), tellers).run(receiver, Until::Signalled, shutdown).await.unwrap();
    let web_only = Some(BTreeSet::from(["web".to_owned()]));
    let recorded = recorder.0.lock().unwrap();
    // At once, the change, and after 1, 3 and 7 seconds.
    assert_eq!(recorded.scopes, [None, web_only, None, None, None]);
    assert_eq!(log.lines_with("cannot apply the state").len(), 3);
    assert_eq!(log.lines_with("is tried again").len(), 3);
    assert_eq!(log.lines_with("Service programmed").len(), 1, "web is told of while the other is not there");
    assert_eq!(log.lines_with("Service without local pods").len(), 1, "the other when it is");
    assert!(observed.health.ready().passed());
}

fn notices<T>(receiver: &mut mpsc::Receiver<(Notice, T)>, reason: Reason) -> Vec<String> {
    let told = std::iter::from_fn(|| Some(receiver.try_recv().ok()?.0));
    told.filter(|notice| notice.reason == reason).map(|notice| notice.service.name.to_string()).collect()
}

/// What is in the way of some is told once, whatever changes meanwhile; and of those that change it is measured how long
/// that takes, however long others do not fit.
#[tokio::test(start_paused = true)]
async fn while_services_do_not_fit_that_is_told_once_and_changes_of_others_are_measured_as_ever() {
    let recorder = Recorder::default();
    recorder.0.lock().unwrap().too_large = ["greedy", "huge"].into();
    let (log, _listening) = Log::listen();
    let observed = tellers().observed;
    let (events, mut told) = Events::kept(&observed);
    let tellers = Tellers { events: Some(events), ..Tellers::new(observed.clone()) };
    let (batches, receiver) = mpsc::channel(1);
    let mut sink = recorder.clone();
    let count = |metric: &str| {
        let text = observed.metrics.encode().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("proxier_{metric} "))).unwrap();
        line.parse::<u64>().unwrap()
    };
    let pause = || tokio::time::sleep(Duration::from_millis(100));
    let shutdown = async {
        let objects = [mk_service("greedy", ["10.0.0.98"]), mk_service("huge", ["10.0.0.99"])];
        batches.send(batch(objects.map(Into::into))).await.unwrap();
        pause().await;
        assert_eq!(notices(&mut told, Reason::TableFull), ["greedy", "huge"]);

        batches.send(batch([mk_service("greedy", ["10.0.0.97"]).into()])).await.unwrap();
        pause().await;
        let failure = observed.report().sync.failure.unwrap();
        let both = "huge: is too large; greedy: is too large; everything else is in force";
        assert_eq!((failure.attempts, &*failure.error), (2, both));

        let triggered = vec![SystemTime::now()];
        batches.send(Batch { triggered, ..web() }).await.unwrap();
        pause().await;
        assert_eq!(count("sync_proxy_rules_duration_seconds_count"), 3);
        assert_eq!(count("network_programming_duration_seconds_count"), 1);
        let failure = observed.report().sync.failure.unwrap();
        assert_eq!((failure.attempts, &*failure.error), (2, both), "what is not in force is still told");
        assert!(observed.report().sync.last_applied.is_none(), "the whole state is not in force");

        // All of it is tried again after a second, and altogether fails after three.
        tokio::time::sleep(Duration::from_secs(1)).await;
        recorder.0.lock().unwrap().failures.push_back(true);
        tokio::time::sleep(Duration::from_secs(6)).await;
        recorder.0.lock().unwrap().too_large.remove("huge");
        batches.send(batch([mk_service("huge", ["10.0.0.96"]).into()])).await.unwrap();
        pause().await;
        assert_eq!(notices(&mut told, Reason::TableFull), [""; 0]);

        // One that fitted is told of again.
        recorder.0.lock().unwrap().too_large.insert("huge");
        batches.send(batch([mk_service("huge", ["10.0.0.95"]).into()])).await.unwrap();
        pause().await;
        assert_eq!(notices(&mut told, Reason::TableFull), ["huge"]);
        "test"
    };
    Agent::new(&mut sink, settings(), tellers).run(receiver, Until::Signalled, shutdown).await.unwrap();
    let only = |name: &str| Some(BTreeSet::from([name.to_owned()]));
    let expected = [None, only("greedy"), only("web"), None, None, None, only("huge"), only("huge")];
    assert_eq!(recorder.0.lock().unwrap().scopes, expected);
    assert_eq!(log.lines_with("cannot apply the state").len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_service_without_endpoints_is_told_of_when_it_has_been_so_for_ten_seconds_on_end() {
    let observed = tellers().observed;
    let (events, mut told) = Events::kept(&observed);
    let tellers = Tellers { events: Some(events), ..Tellers::new(observed) };
    let (batches, receiver) = mpsc::channel(1);
    let mut sink = Recorder::default();
    let slice = ObjectId::EndpointSlice(mk_name("web-1"));
    let gone = || Batch { events: vec![Event::Delete(slice.clone())], ..Batch::default() };
    let seconds = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
    let without = Reason::Problem(ProblemKind::NoEndpoints);
    let shutdown = async {
        // Slices come after their Service.
        batches.send(batch([mk_service("web", ["10.0.0.55"]).into()])).await.unwrap();
        seconds(4).await;
        batches.send(web()).await.unwrap();
        seconds(2).await;
        batches.send(gone()).await.unwrap();
        seconds(8).await;
        assert_eq!(
            notices(&mut told, without),
            [""; 0],
            "eight seconds on end, fourteen since the first time"
        );
        seconds(4).await;
        assert_eq!(notices(&mut told, without), ["web"]);
        seconds(60).await;
        assert_eq!(notices(&mut told, without), [""; 0], "once");
        batches.send(web()).await.unwrap();
        seconds(60).await;
        batches.send(gone()).await.unwrap();
        seconds(12).await;
        assert_eq!(notices(&mut told, without), ["web"], "once each time");
        "test"
    };
    Agent::new(&mut sink, settings(), tellers).run(receiver, Until::Signalled, shutdown).await.unwrap();
}
