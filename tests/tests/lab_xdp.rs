//! `--ingress xdp`: packets are rewritten, or dropped, before the node's stack has them, and what XDP leaves alone is rewritten at
//! tc. Which of the two it was shows at the uplink, where a capture sees packets between both.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr},
    time::Duration,
};

use proxier_tests::{
    capture::{Capture, Direction},
    exchange::{PATIENCE, Protocol, Question},
    http,
    loss::lost_during,
    manifests,
    neighbour::Neighbour,
    packets::{Packet, protocol},
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, PodNetwork, UPLINK},
    wait,
};

const PORT: u16 = 5060;
const NATIVE: [&str; 2] = ["--ingress", "xdp"];
const GENERIC: [&str; 2] = ["--ingress", "xdp-generic"];

const NO_FORWARDING: &str =
    "add chain inet firewall forward { type filter hook forward priority filter; policy drop; }";

/// As from a network card: every checksum is complete.
fn start(ingress: [&str; 2]) -> Scenario {
    let mut scenario = Scenario::start(&LabSpec::unique().without_offloads(), &ingress);
    let log = scenario.agent().log();
    assert!(log.contains("program is attached at XDP"), "{log}");
    scenario
}

/// What comes in at the uplink, behind XDP and before tc.
fn between(scenario: &Scenario) -> Capture {
    Capture::start(&scenario.lab.node.namespace, UPLINK).unwrap()
}

/// To whom the packets of `number` are that came in from the client's address.
fn destinations(capture: &Capture, client: IpAddr, number: u8) -> Vec<IpAddr> {
    let packets = capture.packets(Direction::In).into_iter();
    packets
        .filter(|packet| packet.source == client && packet.protocol == number)
        .map(|packet| packet.destination)
        .collect()
}

fn dropped(scenario: &Scenario, reason: &str, hook: &str) -> u64 {
    let rows = scenario.get("drops");
    let row = rows.iter().find(|row| row["reason"] == reason && row["hook"] == hook);
    row.unwrap()["packets"].as_u64().unwrap()
}

fn statistic(scenario: &Scenario, name: &str) -> u64 {
    let rows = scenario.get("statistics");
    rows.iter().find(|row| row["statistic"] == name).unwrap()["count"].as_u64().unwrap()
}

/// The `--ingress` that the uplink shows.
fn at_xdp(scenario: &Scenario) -> &'static str {
    let shown = scenario.on_node("ip", &["link", "show", "dev", UPLINK]);
    match shown.split([' ', '\n']).find_map(|word| word.strip_prefix("xdp")) {
        None => "tc",
        Some("") => "xdp",
        Some("generic") => "xdp-generic",
        Some(other) => panic!("{other}: {shown}"),
    }
}

fn assert_rewritten_early(scenario: &Scenario, question: &Question) {
    let capture = between(scenario);
    let outcome = scenario.ask(question);
    let pod = scenario.lab.pod(outcome.pods()[0]).host.address(question.to.ip());
    let seen = destinations(&capture, question.from.ip(), question.protocol.number(question.to.ip()));
    assert!(!seen.is_empty() && seen.iter().all(|to| *to == pod), "{question:?}: {seen:?}, not {pod} only");
}

fn every_protocol_is_rewritten_before_the_stack(ingress: [&str; 2]) {
    let scenario = start(ingress);
    for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
        for external in externals() {
            assert_rewritten_early(&scenario, &scenario.question(protocol, from_port, external, PORT));
        }
    }
    assert_eq!(statistic(&scenario, "flow-forgotten"), 0, "tc took what XDP had rewritten for a pod's own");
}

#[test]
fn every_protocol_is_rewritten_before_the_stack_by_native_xdp() {
    skip_unless_root!();
    every_protocol_is_rewritten_before_the_stack(NATIVE);
}

#[test]
fn every_protocol_is_rewritten_before_the_stack_by_generic_xdp() {
    skip_unless_root!();
    every_protocol_is_rewritten_before_the_stack(GENERIC);
}

#[test]
fn a_checksum_that_is_left_to_the_hardware_is_left_to_tc() {
    skip_unless_root!();
    for ingress in [NATIVE, GENERIC] {
        let scenario = Scenario::start(&LabSpec::unique(), &ingress);
        for external in externals() {
            for (from_port, protocol) in [(41000, Protocol::Udp), (41001, Protocol::Tcp)] {
                let question = scenario.question(protocol, from_port, external, PORT);
                let capture = between(&scenario);
                // Its checksums are right at the pod, says `ask`.
                let _ = scenario.ask(&question);
                assert!(capture.frames().iter().any(|frame| !frame.checksum_is_complete));
                let seen = destinations(&capture, question.from.ip(), protocol.number(external));
                assert!(!seen.is_empty() && seen.iter().all(|to| *to == external), "{seen:?}");
            }
            // Of these, nothing is left to hardware.
            for (from_port, protocol) in [(41002, Protocol::Sctp), (41003, Protocol::Icmp)] {
                assert_rewritten_early(&scenario, &scenario.question(protocol, from_port, external, PORT));
            }
        }
        assert_eq!(statistic(&scenario, "flow-forgotten"), 0);
    }
}

#[test]
fn what_may_not_come_in_is_dropped_before_the_stack_and_counted() {
    skip_unless_root!();
    for ingress in [NATIVE, GENERIC] {
        let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(2).without_offloads(), &ingress);
        let only_first = ["192.168.1.100/32", "fd00:1::100/128"];
        let service = manifests::service(SERVICE, &externals());
        scenario.write("service.yaml", &format!("{service}  loadBalancerSourceRanges: {only_first:?}\n"));
        let without_pods: IpAddr = "10.0.0.77".parse().unwrap();
        scenario.write("without-pods.yaml", &manifests::service("without-pods", &[without_pods]));
        scenario.start_agent();
        let of_family = |external: IpAddr| {
            let addresses = scenario.lab.client.addresses.iter();
            addresses.copied().filter(|own| own.is_ipv4() == external.is_ipv4()).collect::<Vec<_>>()
        };
        let refused = |question: &Question, reason| {
            let before =
                (dropped(&scenario, reason, "uplink-xdp"), dropped(&scenario, reason, "uplink-ingress"));
            let capture = between(&scenario);
            question.expecting_silence().ask_who(&scenario.lab.client).unwrap().unwrap_err();
            let number = question.protocol.number(question.to.ip());
            assert_eq!(destinations(&capture, question.from.ip(), number), [] as [IpAddr; 0], "{reason}");
            assert!(dropped(&scenario, reason, "uplink-xdp") > before.0, "{reason}");
            assert_eq!(dropped(&scenario, reason, "uplink-ingress"), before.1, "{reason}");
        };
        for external in externals() {
            let clients = of_family(external);
            for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Gre] {
                let question = scenario.question(protocol, 42000, external, PORT);
                assert_rewritten_early(&scenario, &question);
                refused(&question.from(clients[1]), "source-not-allowed");
            }
        }
        refused(&scenario.question(Protocol::Udp, 42000, without_pods, PORT), "no-backend");
        let is_reported = |log: &str| log.contains("hook=\"uplink-xdp\"");
        scenario.agent().wait_for_log(PATIENCE, is_reported).unwrap();
    }
}

#[test]
fn fragments_follow_the_first_before_the_stack() {
    skip_unless_root!();
    for ingress in [NATIVE, GENERIC] {
        let scenario = start(ingress);
        for external in externals() {
            let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
            let socket = scenario.lab.client.udp(from).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let capture = between(&scenario);
            let question: Vec<u8> = (0..4000_u16).flat_map(u16::to_be_bytes).collect();
            let mut answer = vec![0; 1 << 16];
            for _ in 0..5 {
                socket.send_to(&question, SocketAddr::new(external, PORT)).unwrap();
                let (size, source) = socket.recv_from(&mut answer).unwrap();
                assert_eq!(source.ip(), external);
                assert!(answer[..size].ends_with(&question));
            }
            let seen = destinations(&capture, from.ip(), protocol::UDP);
            assert!(seen.len() >= 5 * 6 && seen.iter().all(|to| *to != external), "{seen:?}");
        }
    }
}

/// A frame larger than a page does not lie in one piece.
#[test]
fn a_frame_in_several_pieces_is_rewritten_before_the_stack() {
    skip_unless_root!();
    for ingress in [NATIVE, GENERIC] {
        let scenario = start(ingress);
        let (node, client) = (&scenario.lab.node.namespace, &scenario.lab.client.namespace);
        node.ip(&format!("link set {UPLINK} mtu 9000")).unwrap();
        client.ip("link set eth0 mtu 9000").unwrap();
        for (index, pod) in (1..).zip(&scenario.lab.pods) {
            node.ip(&format!("link set pod{index} mtu 9000")).unwrap();
            pod.host.namespace.ip("link set eth0 mtu 9000").unwrap();
        }
        for external in externals() {
            let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
            let socket = scenario.lab.client.udp(from).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let capture = between(&scenario);
            let question: Vec<u8> = (0..4400_u16).flat_map(u16::to_be_bytes).collect();
            socket.send_to(&question, SocketAddr::new(external, PORT)).unwrap();
            let mut answer = vec![0; 1 << 16];
            let (size, source) = socket.recv_from(&mut answer).unwrap();
            assert_eq!(source.ip(), external);
            assert!(answer[..size].ends_with(&question));
            let seen = destinations(&capture, from.ip(), protocol::UDP);
            assert!(seen.len() == 1 && seen[0] != external, "{seen:?}");
            assert_eq!(capture.wrong_checksums(), [""; 0]);
        }
    }
}

#[test]
fn bulk_transfers_come_whole_with_and_without_offloads() {
    skip_unless_root!();
    for (ingress, offloads) in [(NATIVE, false), (NATIVE, true), (GENERIC, true)] {
        let scenario = Scenario::start(&LabSpec { offloads, ..LabSpec::unique() }, &ingress);
        for external in externals() {
            let capture = between(&scenario);
            let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
            let to = SocketAddr::new(external, 8443);
            let stream = scenario.lab.client.connect(from, to, PATIENCE).unwrap();
            let sent: Vec<u8> = (0..1_u32 << 19).flat_map(u32::to_be_bytes).collect();
            let received = std::thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    let mut received = Vec::new();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    (&stream).read_to_end(&mut received).unwrap();
                    received
                });
                (&stream).write_all(&sent).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                reader.join().unwrap()
            });
            let banner_ends = received.iter().position(|byte| *byte == b'\n').unwrap() + 1;
            assert!(received[banner_ends..] == sent[..], "{} bytes came back", received.len());
            let seen = destinations(&capture, from.ip(), protocol::TCP);
            // One complete checksum in 65,536 looks as if it were left to the hardware.
            let late = seen.iter().filter(|to| **to == external).count();
            let expected = if offloads { seen.len()..=seen.len() } else { 0..=seen.len() / 100 };
            assert!(expected.contains(&late), "{late} of {} were rewritten at tc", seen.len());
            // With native XDP at the other end, a veth sends nothing larger than it can.
            if ingress == GENERIC {
                let sizes = capture.packets(Direction::In).into_iter().map(|packet| packet.payload.len());
                assert!(sizes.max() > Some(1500), "no large segment was seen: nothing is shown about them");
            }
        }
    }
}

#[test]
fn an_error_about_a_reply_reaches_the_pod() {
    skip_unless_root!();
    let scenario = start(NATIVE);
    for external in externals() {
        let client = scenario.lab.client.address(external);
        let (from, to) = (SocketAddr::new(client, 42000), SocketAddr::new(external, PORT));
        let captures: Vec<_> = scenario.lab.pods.iter().map(|pod| pod.host.capture().unwrap()).collect();
        let capture = between(&scenario);
        // Nobody listens there: the client's kernel answers the reply with an error.
        scenario.lab.client.send(&[Packet::udp(from, to, b"question")]).unwrap();
        let is_error = |packet: &Packet| packet.source == client && packet.quoted_addresses().is_some();
        let error = capture.wait_for(PATIENCE, Direction::In, is_error).expect("an error comes in");
        let pod = error.destination;
        assert!(scenario.all_pods().contains(&pod), "{error} was not rewritten before the stack");
        assert_eq!(error.quoted_addresses(), Some((pod, client)));
        let arrived = wait::until(PATIENCE, || {
            captures.iter().find_map(|at| at.packets(Direction::In).into_iter().find(is_error))
        });
        arrived.expect("it reaches the pod").check_checksum().unwrap();
        assert_eq!(capture.wrong_checksums(), [""; 0]);
    }
}

/// Where XDP is in use, a flow has to be idle for two seconds: a packet whose mark was lost looks as if it came straight.
#[test]
fn a_packet_straight_to_a_pod_ends_an_idle_flow_and_one_that_xdp_rewrote_does_not() {
    skip_unless_root!();
    const IDLE: Duration = Duration::from_secs(4);
    let scenario = start(NATIVE);
    for external in externals() {
        let forgotten = statistic(&scenario, "flow-forgotten");
        let question = scenario.question(Protocol::Udp, 42000, external, PORT);
        let mut pod = String::new();
        for _ in 0..3 {
            pod = scenario.ask(&question).pods()[0].to_owned();
        }
        let flows = |scenario: &Scenario| {
            let flows = scenario.get("flows").into_iter();
            flows.filter(|flow| flow["external"] == external.to_string()).count()
        };
        assert_eq!((flows(&scenario), statistic(&scenario, "flow-forgotten")), (1, forgotten));
        let straight = scenario.lab.pod(&pod).host.address(external);
        let straight_on = scenario.question(Protocol::Udp, 42000, straight, PORT);
        // Nothing but these two between the last packet and the straight one: what watches takes its time.
        question.ask_who(&scenario.lab.client).unwrap().unwrap();
        let answer = straight_on.ask_who(&scenario.lab.client).unwrap();
        let by_external = format!("the answer came from {}", SocketAddr::new(external, PORT));
        assert_eq!(answer.unwrap_err(), by_external);
        assert_eq!((flows(&scenario), statistic(&scenario, "flow-forgotten")), (1, forgotten));
        std::thread::sleep(IDLE);
        assert_eq!(scenario.ask(&straight_on).sources(), [straight]);
        assert_eq!((flows(&scenario), statistic(&scenario, "flow-forgotten")), (0, forgotten + 1));
    }
}

/// Into the pod or to the bridge. A firewall lets nothing through the node's stack.
#[test]
fn what_is_delivered_directly_is_left_to_tc_and_goes_past_the_stack() {
    skip_unless_root!();
    for ingress in [NATIVE, GENERIC] {
        for network in [PodNetwork::PointToPoint, PodNetwork::Bridge] {
            let spec = LabSpec { pod_network: network, ..LabSpec::unique() }.without_offloads();
            let mut scenario = Scenario::start(&spec, &[&ingress[..], &["--delivery", "direct"]].concat());
            for rule in ["add table inet firewall", NO_FORWARDING] {
                assert_eq!(scenario.on_node("nft", &[rule]), "");
            }
            for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
                for external in externals() {
                    let question = scenario.question(protocol, from_port, external, PORT);
                    let capture = between(&scenario);
                    assert_eq!(scenario.ask(&question).sources(), [external], "{protocol:?}");
                    let seen = destinations(&capture, question.from.ip(), protocol.number(external));
                    assert!(!seen.is_empty() && seen.iter().all(|to| *to == external), "{seen:?}");
                }
            }
            assert_eq!(statistic(&scenario, "flow-forgotten"), 0);
            // The one kind of delivery goes on under another program.
            let [v4, _] = externals();
            let (sent, lost) = lost_during(&mut scenario, v4, |scenario| {
                for other in ["tc", ingress[1]] {
                    scenario.stop_agent();
                    scenario.spec.arguments =
                        ["--ingress", other, "--delivery", "direct"].map(Into::into).into();
                    scenario.start_agent();
                }
            });
            assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
        }
    }
}

/// As a port in promiscuous mode sees them. Then the uplink gets that address, and they are for this host.
#[test]
fn frames_are_taken_for_the_uplinks_own_mac_address_alone_whatever_that_becomes() {
    skip_unless_root!();
    const OTHER: &str = "02:00:00:00:99:99";
    for ingress in [NATIVE, GENERIC] {
        let mut scenario = start(ingress);
        for external in externals() {
            let gateway = scenario.lab.node.address(external);
            let neighbour = format!("neighbour replace {gateway} lladdr {OTHER} dev eth0 nud permanent");
            scenario.lab.client.namespace.ip(&neighbour).unwrap();
            let question = scenario.question(Protocol::Udp, 42000, external, PORT);
            let capture = between(&scenario);
            question.expecting_silence().ask_who(&scenario.lab.client).unwrap().unwrap_err();
            let seen = destinations(&capture, question.from.ip(), protocol::UDP);
            assert!(!seen.is_empty() && seen.iter().all(|to| *to == external), "{seen:?}");
        }
        scenario.lab.node.namespace.ip(&format!("link set {UPLINK} address {OTHER}")).unwrap();
        for external in externals() {
            let question = scenario.question(Protocol::Udp, 43000, external, PORT);
            let taken = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
                let capture = between(&scenario);
                let _ = scenario.ask(&question);
                let seen = destinations(&capture, question.from.ip(), protocol::UDP);
                (!seen.contains(&external)).then_some(())
            });
            assert!(taken.is_some(), "{external} is still left to tc: {}", scenario.agent().log());
            assert_rewritten_early(&scenario, &question);
        }
    }
}

#[test]
fn nothing_is_lost_over_restarts_and_when_another_ingress_is_chosen() {
    skip_unless_root!();
    let mut scenario = start(NATIVE);
    for external in externals() {
        let (sent, lost) = lost_during(&mut scenario, external, |scenario| {
            for _ in 0..2 {
                scenario.kill_agent();
                scenario.start_agent();
            }
            scenario.stop_agent();
            scenario.start_agent();
        });
        assert!(sent > 100, "only {sent} datagrams were sent");
        assert!(
            lost.is_empty(),
            "{} of {sent} datagrams to {external} were lost ({} flows were forgotten): {lost:?}",
            lost.len(),
            statistic(&scenario, "flow-forgotten")
        );
    }
    let [v4, _] = externals();
    let (sent, lost) = lost_during(&mut scenario, v4, |scenario| {
        for ingress in ["tc", "xdp", "xdp-generic", "xdp"] {
            scenario.stop_agent();
            scenario.spec.arguments = vec!["--ingress".into(), ingress.into()];
            scenario.start_agent();
            assert_eq!(scenario.agent().log().contains("program is attached at XDP"), ingress != "tc");
            assert!(
                wait::until(PATIENCE, || (at_xdp(scenario) == ingress).then_some(())).is_some(),
                "{ingress}"
            );
        }
    });
    assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
    let question = scenario.question(Protocol::Udp, 43000, v4, PORT);
    assert_rewritten_early(&scenario, &question);
    // Without an agent it goes on so.
    scenario.kill_agent();
    assert_rewritten_early(&scenario, &question);
    let output = scenario.proxier(&["cleanup"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("/links/request-xdp-native-"), "{output:?}");
    assert!(wait::until(PATIENCE, || (at_xdp(&scenario) == "tc").then_some(())).is_some(), "a program stays");
}

#[test]
fn another_versions_place_at_xdp_is_taken_once_it_has_gone() {
    skip_unless_root!();
    let mut scenario = start(NATIVE);
    scenario.stop_agent();
    scenario.make_pins_of_another_version();
    scenario.start_agent();
    let log = scenario.agent().log();
    assert!(log.contains("programs of another version (v1) are detached"), "{log}");
    assert_eq!(log.matches("program is attached at XDP").count(), 1, "{log}");
    assert!(!log.contains("rewritten at tc"), "{log}");
    for external in externals() {
        assert_rewritten_early(&scenario, &scenario.question(Protocol::Udp, 44000, external, PORT));
    }
}

#[test]
fn where_xdp_cannot_be_the_reason_is_said_and_tc_does_the_work() {
    skip_unless_root!();
    const METRICS: &str = "127.0.0.1:20349";
    let arguments = [&NATIVE[..], &["--uplink", "bridge0", "--metrics-address", METRICS]].concat();
    let mut scenario = Scenario::prepare(&LabSpec::unique().without_offloads(), &arguments);
    let node = &scenario.lab.node.namespace;
    // Its driver has no XDP.
    node.ip("link add bridge0 type bridge\nlink set bridge0 up\n").unwrap();
    let _neighbour = Neighbour::attach_at_xdp(node, UPLINK).unwrap();
    let shown = scenario.on_node("ip", &["-d", "link", "show", "dev", UPLINK]);
    let id = shown.split("prog/xdp id ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().to_owned();
    scenario.start_agent();
    let log = scenario.agent().log();
    for expected in
        [format!("program {id} is at XDP of {UPLINK} already"), "the driver of bridge0 has no XDP".to_owned()]
    {
        assert_eq!(log.matches(&expected).count(), 1, "{expected}:\n{log}");
    }
    for external in externals() {
        let question = scenario.question(Protocol::Udp, 42000, external, PORT);
        let capture = between(&scenario);
        let _ = scenario.ask(&question);
        assert_eq!(destinations(&capture, question.from.ip(), protocol::UDP), [external]);
    }
    let still = scenario.on_node("ip", &["-d", "link", "show", "dev", UPLINK]);
    assert!(still.contains(&format!("prog/xdp id {id} ")), "{still}");

    let reported = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        let report = http::get(&scenario.lab.node.namespace, METRICS.parse().unwrap(), "/status").ok()?;
        let report: serde_json::Value = serde_json::from_str(&report.body).ok()?;
        let interfaces = report["interfaces"].as_array()?.clone();
        let why = interfaces.iter().find(|interface| interface["name"] == UPLINK)?["xdp"]["refused"].clone();
        why.as_str().map(str::to_owned)
    });
    assert!(reported.is_some_and(|why| why.contains(&id)));
    let metrics = http::get(&scenario.lab.node.namespace, METRICS.parse().unwrap(), "/metrics").unwrap();
    assert!(metrics.body.contains("proxier_xdp_uplinks{mode=\"refused\"} 2\n"), "{}", metrics.body);
}
