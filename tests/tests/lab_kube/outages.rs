//! The API server fails, in any way; packets do not notice.
//!
//! An agent asks a server that fails ever less often, so these tests mostly wait: those of a kind do so at the same time, each in a lab
//! of its own.

use std::{collections::BTreeSet, net::IpAddr, thread::sleep, time::Duration};

use proxier_tests::{
    apiserver::{ApiServer, Fault, FutureWatch, Kind, Resource, Step, Verb},
    kube_scenario::{
        BACK_WITHIN, HEALTH_PORT, apply_pods, apply_service, ask, assert_live_and_ready, attempts,
        changes_told, lines, prepare, start, status, tables, wait_for_watches, without_loss,
    },
    scenario::{SERVICE, Scenario},
    skip_unless_root,
    topology::LabSpec,
    wait,
};

use crate::{another_external, pod_of};

/// Waits until the server has been asked something since request `from`.
fn wait_for_request(server: &ApiServer, from: usize, resource: Resource, verb: Verb) {
    let asked = wait::until(BACK_WITHIN, || {
        let requests = server.requests();
        let is_it = |resource: Resource, verb: Verb| {
            requests[from..].iter().any(|request| request.resource == Some(resource) && request.verb == verb)
        };
        is_it(resource, verb).then_some(())
    });
    assert!(asked.is_some(), "{resource:?} {verb:?}: {:?}", &server.requests()[from..]);
}

#[test]
fn what_a_former_agent_left_stays_in_force_until_everything_has_been_listed() {
    skip_unless_root!();
    let (server, mut scenario) = prepare(&LabSpec::unique(), &[]);
    let leaves = another_external(1);
    apply_service(&server, "leaves", &[leaves]);
    apply_pods(&server, "leaves", &scenario.pod("alpine-1"));
    scenario.start_agent();
    without_loss(&mut scenario, |scenario| {
        let (before, services) = (tables(scenario), scenario.get("services"));
        scenario.kill_agent();
        server.inject(Fault::new(Kind::Silence).of(Resource::EndpointSlices));
        server.delete("Service", "lab", "leaves").unwrap();
        let from = server.requests().len();
        scenario.spawn_agent();
        // All that will be answered has been, and the agent knows Services that have no pods.
        for resource in [Resource::Services, Resource::Nodes] {
            wait_for_request(&server, from, resource, Verb::Watch);
        }
        sleep(Duration::from_secs(1));

        assert_eq!(tables(scenario), before);
        assert_eq!(scenario.get("services"), services);
        assert_eq!(pod_of(scenario, leaves), "alpine-1");
        assert_eq!(ask(scenario, HEALTH_PORT, "/livez").status, 200);
        let readyz = ask(scenario, HEALTH_PORT, "/readyz");
        assert_eq!(readyz.status, 503);
        assert!(
            readyz.body.contains("[-]source-synced failed: the source has not delivered"),
            "{}",
            readyz.body
        );
        let (code, text) = status(scenario);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("kube, not read as a whole yet"), "{text}");

        // With the answers that never came the connections must go, or the agent would wait for them a while yet.
        server.heal();
        server.play(Step::Restart(Duration::from_millis(10))).unwrap();
        scenario.agent().wait_ready().unwrap();
        assert_live_and_ready(scenario);
        scenario.wait_for_silence(leaves);
    });
    assert_eq!(scenario.get("services").len(), 2);
}

/// Runs both at the same time.
fn at_once(one: impl FnOnce() + Send, other: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let others = [scope.spawn(one), scope.spawn(other)];
        for thread in others {
            // With its own words, which the scope's would hide.
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// Waits until the agent says that the outage is over: once all has gone well for a while.
fn wait_for_end(scenario: &mut Scenario) {
    let agent = scenario.agent();
    let said = wait::until(BACK_WITHIN, || (lines(&agent.log(), "answers again") > 0).then_some(()));
    assert!(said.is_some(), "{}", agent.log());
}

#[test]
fn a_server_that_is_away_costs_no_packet_and_is_caught_up_with() {
    skip_unless_root!();
    at_once(its_return_changes_nothing, what_has_changed_meanwhile_is_caught_up_with);
}

fn its_return_changes_nothing() {
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    let before = (tables(&scenario), attempts(&scenario), changes_told(&mut scenario));
    without_loss(&mut scenario, |scenario| {
        server.down().unwrap();
        wait_for_watches(scenario, Some("cannot be reached"));
        // A watch that is back at the next attempt is not worth a line.
        let told = wait::until(BACK_WITHIN, || {
            assert_live_and_ready(scenario);
            sleep(Duration::from_millis(100));
            (lines(&scenario.agent().log(), "meanwhile everything stays as it is") > 0).then_some(())
        });
        assert!(told.is_some(), "{}", scenario.agent().log());
        let (code, text) = status(scenario);
        assert_eq!(code, Some(0), "{text}");
        for resource in ["services", "endpointslices", "nodes", "apiserver-endpointslices"] {
            let said =
                text.lines().find(|line| line.starts_with(&format!("  {resource}: away for "))).unwrap();
            assert!(said.contains("onnection refused"), "{said}");
        }
        server.up().unwrap();
        wait_for_watches(scenario, None);
        wait_for_end(scenario);
        assert_live_and_ready(scenario);
    });
    assert_eq!((tables(&scenario), attempts(&scenario), changes_told(&mut scenario)), before);
    let log = scenario.agent().log();
    for line in ["Connection refused", "answers again"] {
        assert_eq!(lines(&log, line), 1, "{line}: {log}");
    }
}

fn what_has_changed_meanwhile_is_caught_up_with() {
    let (server, mut scenario) = prepare(&LabSpec::unique(), &[]);
    let [moves, leaves, comes] = [1, 2, 3].map(another_external);
    for (service, external) in [("moves", moves), ("leaves", leaves)] {
        apply_service(&server, service, &[external]);
        apply_pods(&server, service, &scenario.pod("alpine-1"));
    }
    scenario.start_agent();
    let client = scenario.lab.client.address(moves);
    without_loss(&mut scenario, |scenario| {
        server.down().unwrap();
        wait_for_watches(scenario, Some("cannot be reached"));
        apply_pods(&server, "moves", &scenario.pod("alpine-2"));
        server.delete("Service", "lab", "leaves").unwrap();
        apply_service(&server, "comes", &[comes]);
        apply_pods(&server, "comes", &scenario.pod("alpine-1"));
        for external in [moves, leaves] {
            assert_eq!(pod_of(scenario, external), "alpine-1", "the last known state stays in force");
        }
        server.up().unwrap();
        scenario.wait_for_pod(client, moves, "alpine-2");
        scenario.wait_for_silence(leaves);
        scenario.wait_for_any_pod(comes);
    });
}

/// A Service beside the one that stays, which has another address and another pod at every turn.
struct Turning<'a> {
    server: &'a ApiServer,
    round: u8,
}

impl Turning<'_> {
    const SERVICE: &'static str = "turning";

    fn turn(&mut self, scenario: &Scenario) {
        self.round += 1;
        apply_service(self.server, Self::SERVICE, &[self.external()]);
        apply_pods(self.server, Self::SERVICE, &scenario.pod(self.pod()));
    }

    /// No round has another one's: what is still under way of an earlier turn cannot pass for a later one.
    fn external(&self) -> IpAddr {
        another_external(self.round)
    }

    fn pod(&self) -> &'static str {
        ["alpine-1", "alpine-2"][usize::from(self.round % 2)]
    }

    /// Waits until the kernel has what the API server has.
    fn wait(&self, scenario: &Scenario, when: &str) {
        let column = |kind, column| -> BTreeSet<IpAddr> {
            let rows = scenario.get(kind).into_iter().filter(|row| row["name"] == Self::SERVICE);
            rows.map(|row| row[column].as_str().unwrap().parse().unwrap()).collect()
        };
        let known = || (column("services", "external"), column("endpoints", "pod"));
        // It has no external address for the other pod address to answer at.
        let pods = scenario.pod(self.pod()).into_iter().filter(IpAddr::is_ipv4).collect();
        let expected = (BTreeSet::from([self.external()]), pods);
        let arrived = wait::until(BACK_WITHIN, || (known() == expected).then_some(()));
        assert!(arrived.is_some(), "{when}: {:?} instead of {expected:?}\n{}", known(), status(scenario).1);
    }
}

/// A lab with [`Turning`], and traffic to the Service that stays, which nothing may happen to.
fn play(misfortunes: impl FnOnce(&ApiServer, &mut Scenario, &mut Turning<'_>)) {
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    // Else a client that has seen more than the server now knows of would hear nothing for a minute and a half.
    server.set_future_watch(FutureWatch::Refused);
    let mut turning = Turning { server: &server, round: 0 };
    turning.turn(&scenario);
    turning.wait(&scenario, "at first");
    without_loss(&mut scenario, |scenario| misfortunes(&server, scenario, &mut turning));
    assert_live_and_ready(&scenario);
    let log = scenario.agent().log();
    for (line, times) in [
        // Both families, at the start.
        ("Service programmed", 2),
        ("Service changed", 0),
        ("Service withdrawn", 0),
        ("Service without local pods", 0),
    ] {
        let told =
            log.lines().filter(|told| told.contains(line) && told.contains(&format!("lab/{SERVICE} ")));
        assert_eq!(told.count(), times, "{line}: {log}");
    }
}

fn history_is_lost(server: &ApiServer, scenario: &mut Scenario, turning: &mut Turning<'_>) {
    let backup = server.backup();
    let round = turning.round;
    for _ in 0..3 {
        turning.turn(scenario);
    }
    turning.wait(scenario, "before etcd is restored");
    server.restore(&backup);
    turning.round = round;
    turning.wait(scenario, "after etcd was restored");

    server.cut_watches();
    turning.turn(scenario);
    server.compact();
    turning.wait(scenario, "after a compaction");
}

#[test]
fn no_packet_is_lost_in_any_sequence_of_misfortunes() {
    skip_unless_root!();
    let seed = std::env::var("PROXIER_TEST_SEED").map_or(7, |seed| seed.parse().unwrap());
    let sequence = |server: &ApiServer, scenario: &mut Scenario, turning: &mut Turning<'_>| {
        for step in Step::sequence(seed).take(20) {
            server.play(step).unwrap();
            sleep(Duration::from_millis(20));
            turning.turn(scenario);
        }
        server.heal();
        // What is stalled would stay so for a minute and a half.
        server.play(Step::Restart(Duration::from_millis(10))).unwrap();
        turning.turn(scenario);
        turning.wait(scenario, &format!("seed {seed}"));
    };
    at_once(|| play(history_is_lost), || play(sequence));
}

/// What an operator sees of an outage that is somebody's mistake: a line that says what to do, once, however often the agent tries.
fn a_mistake_is_told_once(
    scenario: &mut Scenario,
    server: &ApiServer,
    wrong: impl FnOnce(),
    right: impl FnOnce(),
    says: [&str; 2],
) {
    // The Event of the beginning is written: it could not be any more, and that is told as well.
    let written = wait::until(BACK_WITHIN, || (!server.events().is_empty()).then_some(()));
    assert!(written.is_some(), "{}", scenario.agent().log());
    without_loss(scenario, |scenario| {
        let from = server.requests().len();
        wrong();
        server.cut_watches();
        let refused = |server: &ApiServer| {
            let requests = server.requests();
            let refused = |status: Option<u16>| matches!(status, Some(401 | 403));
            requests[from..]
                .iter()
                .filter(|request| request.resource == Some(Resource::Services) && refused(request.status))
                .count()
        };
        let tried = wait::until(BACK_WITHIN, || (refused(server) >= 3).then_some(()));
        assert!(tried.is_some(), "{:?}", &server.requests()[from..]);
        let log = scenario.agent().log();
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        let [warning] = warnings[..] else { panic!("{warnings:?}") };
        for what in says {
            assert!(warning.contains(what), "{warning}");
        }
        assert!(warning.contains("meanwhile everything stays as it is"), "{warning}");
        assert_live_and_ready(scenario);
        right();
        wait_for_watches(scenario, None);
        wait_for_end(scenario);
    });
    let log = scenario.agent().log();
    assert_eq!((lines(&log, "WARN"), lines(&log, "answers again")), (1, 1), "{log}");
}

fn a_token_is_no_longer_good() {
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    let token = server.token();
    let wrong = || server.set_token("another");
    let right = || server.set_token(&token);
    a_mistake_is_told_once(&mut scenario, &server, wrong, right, ["401: Unauthorized", "check the token"]);
}

fn rights_are_taken_away() {
    let (server, mut scenario) = start(&LabSpec::unique(), &[]);
    let wrong = || {
        server.inject(Fault::new(Kind::Forbidden).of(Resource::Services));
    };
    let says = ["403: services is forbidden", "a ClusterRole with list and watch of services"];
    a_mistake_is_told_once(&mut scenario, &server, wrong, || server.heal(), says);
}

#[test]
fn a_token_or_rights_that_are_missing_are_told_once_and_cost_no_packet() {
    skip_unless_root!();
    at_once(a_token_is_no_longer_good, rights_are_taken_away);
}
