//! The agent comes and goes; traffic does not notice.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use proxier_tests::{
    connection::Connection,
    exchange::{PATIENCE, Protocol},
    loss::lost_during,
    neighbour::{Neighbour, Verdict, tcx_programs},
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, UPLINK},
    wait,
};

fn traffic_goes_on_without_the_agent(attach: &str) {
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
    let mut connections = externals().map(|external| Connection::open(&scenario, external, 42000));
    scenario.kill_agent();
    for (external, connection) in externals().into_iter().zip(&mut connections) {
        connection.goes_on("after kill -9");
        for (from_port, protocol) in (43000..).zip(Protocol::ALL) {
            let outcome = scenario.ask(&scenario.question(protocol, from_port, external, 5060));
            assert_eq!(outcome.pods(), [connection.pod.as_str()], "the session is kept");
        }
    }
    let flows = scenario.get("flows");
    scenario.start_agent();
    let kept = scenario.get("flows");
    for row in &flows {
        let same = |other: &&serde_json::Value| {
            ["protocol", "peer", "peerPort", "external", "pod", "podPort"]
                .iter()
                .all(|field| row[field] == other[field])
        };
        assert!(kept.iter().any(|other| same(&other)), "the new agent has lost {row}");
    }
    for (external, connection) in externals().into_iter().zip(&mut connections) {
        connection.goes_on("after another agent has started");
        let outcome = scenario.ask(&scenario.question(Protocol::Udp, 44000, external, 5060));
        assert_eq!(outcome.pods(), [connection.pod.as_str()], "the session is adopted");
    }
    scenario.stop_agent();
    for connection in &mut connections {
        connection.goes_on("after SIGTERM");
    }
}

#[test]
fn traffic_goes_on_when_the_agent_is_killed_and_comes_back_by_tcx() {
    skip_unless_root!();
    traffic_goes_on_without_the_agent("tcx");
}

#[test]
fn traffic_goes_on_when_the_agent_is_killed_and_comes_back_by_clsact() {
    skip_unless_root!();
    traffic_goes_on_without_the_agent("clsact");
}

/// That nothing is lost is worth something only if a loss would be seen.
#[test]
fn a_moment_without_programs_is_noticed() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [v4, _] = externals();
    let (_, lost) = lost_during(&mut scenario, v4, |scenario| {
        scenario.kill_agent();
        assert!(scenario.proxier(&["cleanup"]).status.success());
        scenario.start_agent();
    });
    assert!(!lost.is_empty());
}

fn no_packet_is_lost_over_restarts(attach: &str) {
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
    for external in externals() {
        let (sent, lost) = lost_during(&mut scenario, external, |scenario| {
            for _ in 0..3 {
                scenario.kill_agent();
                scenario.start_agent();
            }
            scenario.stop_agent();
            scenario.start_agent();
        });
        assert!(sent > 100, "only {sent} datagrams were sent");
        assert!(lost.is_empty(), "{} of {sent} datagrams to {external} were lost: {lost:?}", lost.len());
    }
}

#[test]
fn no_packet_is_lost_over_restarts_by_tcx() {
    skip_unless_root!();
    no_packet_is_lost_over_restarts("tcx");
}

#[test]
fn no_packet_is_lost_over_restarts_by_clsact() {
    skip_unless_root!();
    no_packet_is_lost_over_restarts("clsact");
}

#[test]
fn no_packet_is_lost_when_another_way_of_attaching_is_chosen() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", "tcx"]);
    let [v4, _] = externals();
    // Adding a qdisc to an interface that is up makes the kernel itself drop what it sends for a moment
    // (`qdisc_graft` deactivates the device): that is not what is looked at here.
    for interface in scenario.lab.node_interfaces() {
        let _ = scenario.on_node("tc", &["qdisc", "add", "dev", &interface, "clsact"]);
    }
    let (sent, lost) = lost_during(&mut scenario, v4, |scenario| {
        for attach in ["clsact", "tcx"] {
            scenario.stop_agent();
            scenario.spec.arguments = vec!["--attach".into(), attach.into()];
            scenario.start_agent();
        }
    });
    assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
}

#[test]
fn no_packet_is_lost_while_other_pods_come_and_go() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [v4, _] = externals();
    let client = scenario.lab.client.address(v4);
    let stays = scenario.pod_of(client, v4).host;
    let one = scenario.pod(&stays);
    let all = scenario.all_pods();
    let (sent, lost) = lost_during(&mut scenario, v4, |scenario| {
        for _ in 0..5 {
            for pods in [&one, &all] {
                scenario.write_pods(pods);
                let known =
                    wait::until(PATIENCE, || (scenario.get("endpoints").len() == pods.len()).then_some(()));
                assert!(known.is_some(), "{:?}", scenario.get("endpoints"));
            }
        }
    });
    assert!(sent > 100, "only {sent} datagrams were sent");
    assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
}

#[test]
fn what_changed_while_no_agent_ran_is_caught_up_with() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [v4, v6] = externals();
    let client = scenario.lab.client.address(v4);
    let was_on = scenario.pod_of(client, v4).host;
    scenario.kill_agent();
    let other = if was_on == "alpine-1" { "alpine-2" } else { "alpine-1" };
    scenario.write_pods(&scenario.pod(other));
    scenario.write("service.yaml", &proxier_tests::manifests::service("web", &[v4]));
    scenario.start_agent();
    assert_eq!(scenario.pod_of(client, v4).host, other);
    scenario.wait_for_silence(v6);
    assert_eq!(scenario.get("services").len(), 1);
}

fn cleanup_leaves_nothing(attach: &str) {
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
    let [v4, _] = externals();
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, v4, 5060));
    let attached = |scenario: &Scenario| {
        let by_clsact = scenario.on_node("bpftool", &["net"]).matches("proxier_").count();
        let by_tcx = tcx_programs(&scenario.lab.node.namespace, UPLINK).unwrap();
        (by_tcx, by_clsact)
    };
    assert_eq!(attached(&scenario).0, if attach == "tcx" { 2 } else { 0 });
    assert_eq!(attached(&scenario).1 == 0, attach == "tcx");
    scenario.kill_agent();

    let output = scenario.proxier(&["cleanup"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!scenario.lab.pin_path().exists(), "{} is still there", scenario.lab.pin_path().display());
    // The kernel frees a link that nobody holds any more in its own time.
    let detached = wait::until(PATIENCE, || (attached(&scenario) == (0, 0)).then_some(()));
    assert!(detached.is_some(), "still attached by tcx and clsact: {:?}", attached(&scenario));
    let outcome =
        scenario.question(Protocol::Udp, 42001, v4, 5060).expecting_silence().ask(&scenario.lab).unwrap();
    outcome.answer.unwrap_err();

    // There is nothing left to remove, which is no error: a DaemonSet's last words may be said twice.
    let again = scenario.proxier(&["cleanup"]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    scenario.start_agent();
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42002, v4, 5060));
}

#[test]
fn cleanup_leaves_nothing_of_tcx() {
    skip_unless_root!();
    cleanup_leaves_nothing("tcx");
}

#[test]
fn cleanup_leaves_nothing_of_clsact() {
    skip_unless_root!();
    cleanup_leaves_nothing("clsact");
}

#[test]
fn programs_of_another_version_are_replaced_without_a_gap() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", "tcx"]);
    let attached = |scenario: &Scenario| tcx_programs(&scenario.lab.node.namespace, UPLINK).unwrap();
    let [v4, v6] = externals();
    let (sent, lost) = lost_during(&mut scenario, v4, |scenario| {
        scenario.stop_agent();
        scenario.make_pins_of_another_version();
        scenario.write("service.yaml", &proxier_tests::manifests::service("web", &[v4]));
        assert_eq!(attached(scenario), 2);
        scenario.start_agent();
    });
    assert!(sent > 100, "only {sent} datagrams were sent");
    assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
    // The kernel frees a link that nobody holds any more in its own time.
    let replaced = wait::until(PATIENCE, || (attached(&scenario) == 2).then_some(()));
    assert!(replaced.is_some(), "{} programs are attached", attached(&scenario));
    scenario.wait_for_silence(v6);
    let left = scenario.lab.pin_path().join("v1");
    assert!(!left.exists(), "{} is still there", left.display());
    let log = scenario.agent().log();
    assert_eq!(log.matches("programs of another version (v1) are detached").count(), 1, "{log}");
}

#[test]
fn cleanup_takes_off_every_version_and_commands_say_whose_maps_there_are() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &["--attach", "tcx"]);
    scenario.kill_agent();
    scenario.make_pins_of_another_version();
    let get = scenario.proxier(&["get", "services"]);
    let said = String::from_utf8_lossy(&get.stderr).into_owned();
    assert!(!get.status.success() && said.contains("another version's (v1)"), "{said}");

    let output = scenario.proxier(&["cleanup"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("/v1/links/request-"), "{output:?}");
    assert!(!scenario.lab.pin_path().exists(), "{} is still there", scenario.lab.pin_path().display());
    let attached = || tcx_programs(&scenario.lab.node.namespace, UPLINK).unwrap();
    let detached = wait::until(PATIENCE, || (attached() == 0).then_some(()));
    assert!(detached.is_some(), "{} programs are attached", attached());
}

#[test]
fn other_programs_on_the_hook_still_decide() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &["--attach", "tcx"]);
    let [v4, _] = externals();
    let pod = scenario.lab.pods[0].host.address(v4);
    let to_pod = scenario.question(Protocol::Icmp, 7, pod, 0);
    let to_service = scenario.question(Protocol::Icmp, 8, v4, 0);
    let _ = scenario.ask(&to_pod);
    let _ = scenario.ask(&to_service);
    let neighbour = Neighbour::attach(&scenario.lab.node.namespace, UPLINK, Verdict::Drop).unwrap();
    to_pod.expecting_silence().ask(&scenario.lab).unwrap().answer.unwrap_err();
    to_service.expecting_silence().ask(&scenario.lab).unwrap().answer.unwrap_err();
    drop(neighbour);
    let gone = wait::until(PATIENCE, || {
        (tcx_programs(&scenario.lab.node.namespace, UPLINK).unwrap() == 2).then_some(())
    });
    assert!(gone.is_some(), "the other program is still there");
    let _ = scenario.ask(&to_pod);
}

#[test]
fn proxier_comes_before_programs_that_were_there_first() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--attach", "tcx"]);
    // It takes every packet, and would leave none for proxier.
    let _neighbour = Neighbour::attach(&scenario.lab.node.namespace, UPLINK, Verdict::Pass).unwrap();
    scenario.start_agent();
    for external in externals() {
        let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, 5060));
    }
}

#[test]
fn a_second_agent_and_a_clean_up_are_refused_while_one_is_at_work() {
    skip_unless_root!();
    let mut scenario = Scenario::start(&LabSpec::unique(), &[]);
    let manifests = scenario.spec.manifests.display().to_string();
    for arguments in [
        vec!["cleanup"],
        vec!["file", "--input", &manifests, "--node-name", "node1", "to-bpf", "--uplink", UPLINK],
    ] {
        let output = scenario.proxier(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("a proxier is at work on"), "{arguments:?}: {said}");
    }
    let [v4, _] = externals();
    scenario.wait_for_any_pod(v4);
    // Also one that was killed leaves the place free.
    scenario.kill_agent();
    assert!(scenario.proxier(&["cleanup"]).status.success());
}
