//! The agent's part of direct delivery: it finds by which link a pod is reached, follows that, and says why where it cannot be.
//! A firewall that lets nothing of a pod through the node's stack shows which way its packets go.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use proxier_common::{MAX_POD_LINKS, POD_HAS_PEER, PodLinkValue, SCHEMA};
use proxier_tests::{
    connection::Connection,
    exchange::{Protocol, Question, SILENCE},
    http,
    loss::lost_of_each_during,
    manifests,
    neighbour::tcx_programs,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME, PodNetwork},
    wait,
};

const DIRECT: &str = "alpine-1";
/// The pod of a second Service.
const BESIDE: &str = "alpine-2";
const METRICS: &str = "127.0.0.1:10349";

/// External addresses of the second Service.
fn externals_beside() -> [IpAddr; 2] {
    [IpAddr::from([10, 0, 0, 56]), IpAddr::from([0x1000, 0, 0, 0, 0, 0, 0, 0x56])]
}

/// A Service that says how it is delivered.
fn delivered(name: &str, externals: &[IpAddr], delivery: &str) -> String {
    let annotation = format!("metadata:\n  annotations: {{proxier.io/delivery: {delivery}}}\n");
    manifests::service(name, externals).replacen("metadata:\n", &annotation, 1)
}

/// Writes both Services: the first has the first pod, the second the other one.
fn write_both(scenario: &Scenario, first: &str, second: &str) {
    scenario.write("service.yaml", first);
    scenario.write_pods(&scenario.pod(DIRECT));
    scenario.write("beside.yaml", second);
    scenario.write("beside-slices.yaml", &manifests::slices("beside", NODE_NAME, &scenario.pod(BESIDE)));
}

/// A direct Service beside one of the stack.
fn start_both(pod_network: PodNetwork, arguments: &[&str]) -> Scenario {
    let spec = LabSpec::unique().with_pod_network(pod_network);
    let mut scenario = Scenario::prepare(&spec, arguments);
    let stack = delivered("beside", &externals_beside(), "stack");
    write_both(&scenario, &delivered(SERVICE, &externals(), "direct"), &stack);
    scenario.start_agent();
    scenario
}

/// Lets nothing from or to these addresses through the node's stack.
fn forbid_forwarding(scenario: &Scenario, addresses: &[IpAddr]) {
    let mut rules =
        String::from("table inet lab {\n  chain forward {\n    type filter hook forward priority filter;\n");
    for address in addresses {
        let family = if address.is_ipv4() { "ip" } else { "ip6" };
        for side in ["saddr", "daddr"] {
            rules += &format!("    {family} {side} {address} counter drop\n");
        }
    }
    rules += "  }\n}\n";
    let mut nft = scenario.lab.node.namespace.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

/// Who answers a new conversation, if somebody does.
fn answered_by(scenario: &Scenario, external: IpAddr, from_port: u16) -> Result<String, String> {
    let question = scenario.question(Protocol::Udp, from_port, external, 5060).expecting_silence();
    question.ask_who(&scenario.lab.client).unwrap().map(|sighting| sighting.host)
}

/// Asserts who answers a new conversation.
fn assert_answered_by(scenario: &Scenario, external: IpAddr, from_port: u16, pod: &str) {
    let question = scenario.question(Protocol::Udp, from_port, external, 5060);
    let answer = question.ask_who(&scenario.lab.client).unwrap();
    assert_eq!(answer.map(|sighting| sighting.host).as_deref(), Ok(pod), "{external}");
}

/// What `get endpoints` says of a pod's addresses: how they are delivered to, and by which link.
fn endpoints(scenario: &Scenario, pod: &str) -> Vec<(String, Option<String>)> {
    let addresses: Vec<String> = scenario.pod(pod).iter().map(ToString::to_string).collect();
    let rows = scenario
        .get("endpoints")
        .into_iter()
        .filter(|row| addresses.iter().any(|address| row["pod"] == address.as_str()));
    let text = |value: &serde_json::Value| value.as_str().map(ToOwned::to_owned);
    rows.map(|row| (text(&row["delivery"]).unwrap(), text(&row["link"]))).collect()
}

/// Waits until `get endpoints` says so of both addresses of a pod.
fn wait_for_endpoints(scenario: &Scenario, pod: &str, delivery: &str, link: Option<&str>) {
    let expected = vec![(delivery.to_owned(), link.map(ToOwned::to_owned)); 2];
    let came = wait::until(EDIT_TAKES_EFFECT_WITHIN, || (endpoints(scenario, pod) == expected).then_some(()));
    assert!(came.is_some(), "{:?} is never {expected:?}", endpoints(scenario, pod));
}

/// What `proxier status` says.
fn status(scenario: &Scenario) -> Option<serde_json::Value> {
    let mut command = scenario.lab.node.namespace.command(&scenario.spec.binary).unwrap();
    let output = command.args(["status", "-o", "json"]).output().unwrap();
    serde_json::from_slice(&output.stdout).ok()
}

/// Waits until `proxier status` names so many pods to which the stack delivers, and returns the reasons.
fn wait_for_by_stack(scenario: &Scenario, count: usize) -> Vec<String> {
    let reasons = || {
        let by_stack = status(scenario)?["direct"]["byStack"].as_array()?.clone();
        Some(by_stack.iter().map(|row| row["reason"].as_str().unwrap().to_owned()).collect::<Vec<_>>())
    };
    let came = wait::until(EDIT_TAKES_EFFECT_WITHIN, || reasons().filter(|reasons| reasons.len() == count));
    came.unwrap_or_else(|| panic!("never {count}: {:?}", reasons()))
}

/// What the programs know of a link: whether it has a peer, if it is one by which pods are reached directly.
fn pod_link(scenario: &Scenario, link: &str) -> Option<bool> {
    let line = scenario.on_node("ip", &["-o", "link", "show", link]);
    let index: u32 = line.split(':').next().unwrap().trim().parse().unwrap();
    let pin = scenario.lab.pin_path().join(format!("v{SCHEMA}")).join("pod_links");
    let links = Map::Array(MapData::from_pin(pin).unwrap());
    let links: Array<_, PodLinkValue> = Array::try_from(links).unwrap();
    let entry = links.get(&(index % MAX_POD_LINKS), 0).unwrap();
    (entry.interface == index).then_some(entry.flags & POD_HAS_PEER != 0)
}

fn both_side_by_side(pod_network: PodNetwork, link: &str) {
    let scenario = start_both(pod_network, &[]);
    wait_for_endpoints(&scenario, DIRECT, "direct", Some(link));
    wait_for_endpoints(&scenario, BESIDE, "stack", None);
    // Before the first packet.
    assert_eq!(scenario.get("flows"), [] as [serde_json::Value; 0]);
    assert_eq!(pod_link(&scenario, link), Some(pod_network == PodNetwork::PointToPoint));
    assert_eq!(pod_link(&scenario, "pod2"), None);
    forbid_forwarding(&scenario, &scenario.pod(DIRECT));
    for (external, beside) in externals().into_iter().zip(externals_beside()) {
        assert_answered_by(&scenario, external, 42000, DIRECT);
        assert_answered_by(&scenario, beside, 42000, BESIDE);
        let mut connections = [external, beside].map(|to| Connection::open(&scenario, to, 43000));
        connections.iter_mut().for_each(|connection| connection.goes_on("once it is open"));
    }
    // That the firewall would have been seen.
    forbid_forwarding(&scenario, &scenario.pod(BESIDE));
    for beside in externals_beside() {
        answered_by(&scenario, beside, 42001).unwrap_err();
    }
    let services = scenario.get("services");
    for row in services {
        let expected = if row["name"] == SERVICE { "direct" } else { "stack" };
        assert_eq!(row["delivery"], expected, "{row}");
    }
    for row in scenario.get("flows") {
        let expected = if row["name"] == SERVICE { "direct" } else { "stack" };
        assert_eq!(row["delivery"], expected, "{row}");
    }
    assert_eq!(wait_for_by_stack(&scenario, 0), [""; 0]);
    let wide = scenario.proxier(&["get", "endpoints", "-o", "wide"]);
    let wide = String::from_utf8_lossy(&wide.stdout).into_owned();
    let line = wide.lines().find(|line| line.contains("11.0.2.2")).unwrap();
    assert!(line.contains("direct") && line.contains(link), "{wide}");
}

#[test]
fn a_direct_service_and_one_of_the_stack_stand_side_by_side_on_pods_own_links() {
    skip_unless_root!();
    both_side_by_side(PodNetwork::PointToPoint, "pod1");
}

#[test]
fn a_direct_service_and_one_of_the_stack_stand_side_by_side_on_a_bridge() {
    skip_unless_root!();
    both_side_by_side(PodNetwork::Bridge, "cni0");
}

/// Makes the first pod's link again, as when its sandbox is replaced under the same addresses: another interface.
fn plug_again(scenario: &Scenario, pod_network: PodNetwork) {
    let pod = &scenario.lab.pod(DIRECT).host;
    let mut in_node = format!(
        "link add pod1 address 02:00:00:00:01:01 type veth peer name eth0 address 02:00:00:00:02:01 netns {}\n",
        pod.namespace.name()
    );
    let mut in_pod = String::from("link set eth0 up\n");
    let bridged = pod_network == PodNetwork::Bridge;
    in_node += if bridged {
        "link set pod1 master cni0 up\n"
    } else {
        "address add 169.254.1.1/32 dev pod1\naddress add fe80::1/64 dev pod1 nodad\nlink set pod1 up\n"
    };
    for address in &pod.addresses {
        let (length, subnet, flags) = if address.is_ipv4() { (32, 24, "") } else { (128, 64, "nodad") };
        in_pod +=
            &format!("address add {address}/{} dev eth0 {flags}\n", if bridged { subnet } else { length });
        if !bridged {
            in_node += &format!("route add {address}/{length} dev pod1\n");
        }
    }
    in_pod += if bridged {
        "route add default via 11.0.2.1\nroute add default via 1100::1\n"
    } else {
        "route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\nroute add default via fe80::1 dev eth0\n"
    };
    scenario.lab.node.namespace.ip(&in_node).unwrap();
    pod.namespace.ip(&in_pod).unwrap();
}

fn a_link_that_is_replaced(pod_network: PodNetwork, link: &str) {
    let mut scenario = start_both(pod_network, &[]);
    wait_for_endpoints(&scenario, DIRECT, "direct", Some(link));
    forbid_forwarding(&scenario, &scenario.pod(DIRECT));
    for external in externals() {
        let answers = || answered_by(&scenario, external, 0).ok();
        assert!(wait::until(EDIT_TAKES_EFFECT_WITHIN, answers).is_some());
    }
    let losses = lost_of_each_during(&mut scenario, externals(), |scenario| {
        std::thread::sleep(Duration::from_secs(1));
        scenario.lab.node.namespace.ip("link delete pod1\n").unwrap();
        // A bridge has its route still, and other pods.
        if pod_network == PodNetwork::PointToPoint {
            let reasons = wait_for_by_stack(scenario, 2);
            assert!(reasons.iter().all(|reason| reason.contains("no route")), "{reasons:?}");
            wait_for_endpoints(scenario, DIRECT, "stack", None);
            // Not at once: a pod that goes loses its link before its Service loses it.
            let is_told = |log: &str| log.lines().last().is_some_and(|line| line.contains("no route"));
            scenario.agent().wait_for_log(EDIT_TAKES_EFFECT_WITHIN, is_told).unwrap();
        }
        plug_again(scenario, pod_network);
        for external in externals() {
            let reached = wait::until(EDIT_TAKES_EFFECT_WITHIN, || answered_by(scenario, external, 0).ok());
            assert_eq!(reached.as_deref(), Some(DIRECT));
        }
        wait_for_endpoints(scenario, DIRECT, "direct", Some(link));
        std::thread::sleep(Duration::from_secs(1));
    });
    for (sent, lost) in losses {
        let first_lost = *lost.first().unwrap();
        assert!(first_lost > 100, "it was delivered before the link went, but {first_lost}");
        let last_lost = *lost.last().unwrap();
        assert!(last_lost + 100 < sent, "the conversation goes on by the new link: {last_lost} of {sent}");
    }
    let log = scenario.agent().log();
    assert_eq!(
        log.matches("pods are reached directly now").count() > 0,
        pod_network == PodNetwork::PointToPoint,
        "{log}"
    );
}

#[test]
fn a_pods_own_link_that_is_replaced_under_its_addresses_is_followed_while_packets_flow() {
    skip_unless_root!();
    a_link_that_is_replaced(PodNetwork::PointToPoint, "pod1");
}

#[test]
fn a_port_of_a_bridge_that_is_replaced_is_followed_while_packets_flow() {
    skip_unless_root!();
    a_link_that_is_replaced(PodNetwork::Bridge, "cni0");
}

/// How many packets of a pod's conversations the node's stack has forwarded.
fn forwarded(scenario: &Scenario) -> u64 {
    let counters = scenario.on_node("nft", &["-j", "list", "counters"]);
    let counters: serde_json::Value = serde_json::from_str(&counters).unwrap();
    let counters = counters["nftables"].as_array().unwrap().iter();
    counters.filter_map(|entry| entry["counter"]["packets"].as_u64()).sum()
}

fn switching_loses_nothing(pod_network: PodNetwork) {
    let spec = LabSpec::unique().with_pod_network(pod_network);
    let mut scenario = Scenario::prepare(&spec, &[]);
    let service = |delivery: &str| delivered(SERVICE, &externals(), delivery);
    scenario.write("service.yaml", &service("stack"));
    scenario.write_pods(&scenario.pod(DIRECT));
    scenario.start_agent();
    let nft = "add table inet lab; add counter inet lab seen; \
               add chain inet lab forward { type filter hook forward priority filter; }; \
               add rule inet lab forward ct state invalid counter drop; add rule inet lab forward counter name seen";
    let _ = scenario.on_node("nft", &[nft]);
    let switch = |scenario: &Scenario, delivery: &str| {
        scenario.write("service.yaml", &service(delivery));
        let is_so = || scenario.get("services").iter().all(|row| row["delivery"] == delivery);
        let switched = wait::until(EDIT_TAKES_EFFECT_WITHIN, || is_so().then_some(()));
        assert!(switched.is_some(), "{:?}", scenario.get("services"));
    };
    let losses = lost_of_each_during(&mut scenario, externals(), |scenario| {
        for (from_port, delivery) in (45000_u16..).zip(["direct", "stack", "direct", "stack"]) {
            switch(scenario, delivery);
            for external in externals() {
                assert_answered_by(scenario, external, from_port, DIRECT);
            }
            let flows = scenario.get("flows");
            let new: Vec<_> = flows.iter().filter(|row| row["peerPort"] == from_port).collect();
            assert_eq!(new.len(), 2, "{flows:?}");
            assert!(new.iter().all(|row| row["delivery"] == delivery), "of new conversations: {new:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    for (external, (sent, lost)) in externals().into_iter().zip(losses) {
        assert!(sent > 400, "only {sent} datagrams were sent");
        assert!(lost.is_empty(), "{} of {sent} to {external} were lost: {lost:?}", lost.len());
    }
    // A conversation that began directly stays so, and a restart changes nothing about that.
    switch(&scenario, "direct");
    let mut connections = externals().map(|external| Connection::open(&scenario, external, 46000));
    switch(&scenario, "stack");
    let before = forwarded(&scenario);
    connections.iter_mut().for_each(|connection| connection.goes_on("after the Service is the stack's"));
    scenario.kill_agent();
    connections.iter_mut().for_each(|connection| connection.goes_on("without an agent"));
    scenario.start_agent();
    connections.iter_mut().for_each(|connection| connection.goes_on("after another agent has started"));
    assert_eq!(forwarded(&scenario), before, "the stack sees nothing of them");
}

#[test]
fn switching_back_and_forth_loses_nothing_and_moves_no_conversation_on_pods_own_links() {
    skip_unless_root!();
    switching_loses_nothing(PodNetwork::PointToPoint);
}

#[test]
fn switching_back_and_forth_loses_nothing_and_moves_no_conversation_on_a_bridge() {
    skip_unless_root!();
    switching_loses_nothing(PodNetwork::Bridge);
}

fn nothing_is_lost_over_restarts(pod_network: PodNetwork, attach: &str) {
    let mut scenario = start_both(pod_network, &["--attach", attach]);
    // One packet through the stack would be one too many.
    forbid_forwarding(&scenario, &scenario.pod(DIRECT));
    let losses = lost_of_each_during(&mut scenario, externals(), |scenario| {
        for end in [Scenario::kill_agent, Scenario::stop_agent] {
            end(scenario);
            scenario.start_agent();
            for external in externals() {
                assert_answered_by(scenario, external, 0, DIRECT);
            }
        }
    });
    for (external, (sent, lost)) in externals().into_iter().zip(losses) {
        assert!(sent > 100, "only {sent} datagrams were sent");
        assert!(lost.is_empty(), "{} of {sent} datagrams to {external} were lost: {lost:?}", lost.len());
    }
}

#[test]
fn no_directly_delivered_packet_is_lost_over_restarts_by_tcx() {
    skip_unless_root!();
    nothing_is_lost_over_restarts(PodNetwork::PointToPoint, "tcx");
}

#[test]
fn no_directly_delivered_packet_is_lost_over_restarts_by_clsact() {
    skip_unless_root!();
    nothing_is_lost_over_restarts(PodNetwork::PointToPoint, "clsact");
}

#[test]
fn no_directly_delivered_packet_is_lost_over_restarts_on_a_bridge() {
    skip_unless_root!();
    nothing_is_lost_over_restarts(PodNetwork::Bridge, "tcx");
}

#[test]
fn without_local_clients_only_links_of_direct_pods_carry_programs_and_what_pods_ask_for_stays_alone() {
    skip_unless_root!();
    let scenario = start_both(PodNetwork::PointToPoint, &["--no-local-clients"]);
    let programs = |interface| tcx_programs(&scenario.lab.node.namespace, interface).unwrap();
    wait_for_endpoints(&scenario, DIRECT, "direct", Some("pod1"));
    forbid_forwarding(&scenario, &scenario.pod(DIRECT));
    for external in externals() {
        assert_answered_by(&scenario, external, 42000, DIRECT);
    }
    let interfaces = || {
        let rows = status(&scenario)?["interfaces"].as_array()?.clone();
        Some(rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>())
    };
    // Told once a second.
    let told = wait::until(EDIT_TAKES_EFFECT_WITHIN, || interfaces().filter(|names| names.len() > 1));
    assert_eq!(told.unwrap(), ["pod1", "uplink0"]);
    assert_eq!((programs("pod1"), programs("pod2")), (2, 0));
    // The pod's own request to the other Service: nobody turns it round.
    let client = &scenario.lab.pod(DIRECT).host;
    for beside in externals_beside() {
        let question = Question {
            protocol: Protocol::Udp,
            from: SocketAddr::new(client.address(beside), 42000),
            to: SocketAddr::new(beside, 5060),
            timeout: SILENCE,
        };
        let answer = question.ask_who(client).unwrap();
        assert!(answer.is_err(), "{answer:?}");
    }
    // Once the other one is direct, its link is attached to before it is told.
    scenario.write("beside.yaml", &delivered("beside", &externals_beside(), "direct"));
    wait_for_endpoints(&scenario, BESIDE, "direct", Some("pod2"));
    assert_eq!(programs("pod2"), 2);
}

#[test]
fn a_pod_that_cannot_be_reached_directly_is_delivered_to_by_the_stack_and_it_is_said_why() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--delivery", "direct", "--uplink", "pod1"]);
    scenario.start_agent();
    // Also of a Service that says nothing, by the flag.
    wait_for_endpoints(&scenario, BESIDE, "direct", Some("pod2"));
    let reasons = wait_for_by_stack(&scenario, 2);
    assert!(reasons.iter().all(|reason| reason.contains("leads to pod1, which is an uplink")), "{reasons:?}");
    scenario.write_pods(&scenario.pod(DIRECT));
    for external in externals() {
        let client = scenario.lab.client.address(external);
        scenario.wait_for_pod(client, external, DIRECT);
    }
    let metrics = http::get(&scenario.lab.node.namespace, METRICS.parse().unwrap(), "/metrics").unwrap();
    assert!(metrics.body.contains("proxier_direct_delivery_addresses{by=\"stack\"} 2\n"), "{}", metrics.body);
    let told = |log: &str| log.matches("leads to pod1, which is an uplink").count();
    scenario.agent().wait_for_log(EDIT_TAKES_EFFECT_WITHIN, |log| told(log) > 0).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(told(&scenario.agent().log()), 1, "once, for both addresses");
    let status = scenario.on_node(scenario.spec.binary.to_str().unwrap(), &["status"]);
    let heading = "Direct:      0 of 2 addresses of pods whose Services ask for it\n";
    let line = format!("  11.0.2.2 (lab/{SERVICE}): its route leads to pod1, which is an uplink: ");
    assert!(status.contains(heading) && status.contains(&line), "{status}");
    let log = scenario.agent().log();
    let line = log.lines().find(|line| line.contains("leads to pod1, which is an uplink")).unwrap();
    let named = format!("services=\"lab/{SERVICE}\" pods=\"11.0.2.2, 1100:");
    assert!(line.contains(" WARN ") && line.contains(&named), "{line}");
}

#[test]
fn what_the_node_lacks_is_told_in_one_line_and_no_pod_is_called_reached_meanwhile() {
    skip_unless_root!();
    const FORWARDING: &str = "net.ipv6.conf.all.forwarding";
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--delivery", "direct"]);
    scenario.spec.uplink = "late0".to_owned();
    scenario.write_pods(&scenario.pod(DIRECT));
    scenario.lab.node.namespace.sysctl(FORWARDING, "0").unwrap();
    scenario.start_agent();
    let reasons = wait_for_by_stack(&scenario, 2);
    assert!(reasons.iter().all(|reason| reason.starts_with("the node has no uplink")), "{reasons:?}");
    scenario.lab.node.namespace.ip("link add late0 type veth peer name late1\nlink set late0 up\n").unwrap();
    let reasons = wait_for_by_stack(&scenario, 1);
    assert!(reasons[0].contains(&format!("sysctl -w {FORWARDING}=1")), "{reasons:?}");
    scenario.lab.node.namespace.sysctl(FORWARDING, "1").unwrap();
    assert_eq!(wait_for_by_stack(&scenario, 0), [""; 0], "without a change of any object");
    scenario.lab.node.namespace.sysctl(FORWARDING, "0").unwrap();
    let reasons = wait_for_by_stack(&scenario, 1);
    assert!(reasons[0].contains(&format!("sysctl -w {FORWARDING}=1")), "{reasons:?}");
    // In which each pod would have a line as well.
    std::thread::sleep(Duration::from_secs(3));
    let log = scenario.agent().log();
    for (line, times) in [
        ("--delivery direct: packets from outside for every Service go past this node's stack", 1),
        ("annotation proxier.io/delivery: stack", 1),
        ("no uplink: packets from outside are not rewritten", 1),
        (&*format!("{FORWARDING} is 0: "), 2),
        (&*format!("{FORWARDING} is not 0 any more"), 1),
        ("through the node's stack", 0),
        ("reached directly now", 0),
    ] {
        assert_eq!(log.matches(line).count(), times, "{line}: {log}");
    }
}

#[test]
fn a_delivery_that_nobody_knows_is_told_and_the_flag_counts() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--delivery", "direct"]);
    scenario.write("service.yaml", &delivered(SERVICE, &externals(), "teleport"));
    scenario.write_pods(&scenario.pod(DIRECT));
    scenario.start_agent();
    wait_for_endpoints(&scenario, DIRECT, "direct", Some("pod1"));
    let log = scenario.agent().log();
    assert!(
        log.contains("metadata.annotations[proxier.io/delivery] \"teleport\" is not a way to deliver"),
        "{log}"
    );
}
