//! What a Service says about its clients: who may send (`loadBalancerSourceRanges`), and what of it stays on one pod
//! (`proxier.io/balance`).

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
};

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, icmpv4, icmpv6::DestUnreachableCode as V6Unreachable,
};
use proxier_common::SCHEMA;
use proxier_tests::{
    capture::Direction,
    connection::Connection,
    exchange::{PATIENCE, Protocol, Question},
    manifests,
    packets::{Packet, protocol},
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, NODE_NAME, PodSpec},
    wait,
};

/// The first two of the lab's client addresses of each family.
const FIRST_TWO: [&str; 2] = ["192.168.1.100/31", "fd00:1::100/127"];
/// The client's addresses as a whole.
const ALL: [&str; 2] = ["192.168.1.0/24", "fd00:1::/64"];

/// The Service, open to these networks only.
fn only_from(ranges: &[&str]) -> String {
    format!("{}  loadBalancerSourceRanges: {ranges:?}\n", manifests::service(SERVICE, &externals()))
}

/// The Service with the annotation of this value.
fn balanced(value: &str) -> String {
    let annotation = format!("metadata:\n  annotations: {{proxier.io/balance: {value}}}\n");
    manifests::service(SERVICE, &externals()).replacen("metadata:\n", &annotation, 1)
}

/// More networks than the kernel's table has room for, none of which has a client.
fn too_many_ranges() -> Vec<String> {
    let nets = (0..70_000_u32).map(|n| format!("10.{}.{}.{}/31", n >> 15, n >> 7 & 0xff, n << 1 & 0xff));
    nets.chain([ALL[1].to_owned()]).collect()
}

/// Waits until the kernel has a Service's every address with `expected` in the column `field`.
fn wait_for_services(scenario: &Scenario, field: &str, expected: impl Fn(IpAddr) -> serde_json::Value) {
    let in_force = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        let rows = scenario.get("services");
        let is_so = |row: &serde_json::Value| {
            row[field] == expected(row["external"].as_str().unwrap().parse().unwrap())
        };
        (!rows.is_empty() && rows.iter().all(is_so)).then_some(())
    });
    assert!(in_force.is_some(), "{:?}", scenario.get("services"));
}

/// Writes the Service with these ranges, one a family, and waits until the kernel has them.
fn restrict(scenario: &Scenario, [v4, v6]: [&str; 2]) {
    scenario.write("service.yaml", &only_from(&[v4, v6]));
    wait_for_services(scenario, "sources", |external| [if external.is_ipv4() { v4 } else { v6 }].into());
}

/// The client's addresses of the family of `like`.
fn clients(scenario: &Scenario, like: IpAddr) -> Vec<IpAddr> {
    let addresses = scenario.lab.client.addresses.iter().copied();
    addresses.filter(|address| address.is_ipv4() == like.is_ipv4()).collect()
}

/// How many packets were dropped for want of permission at `hook`.
fn not_allowed(scenario: &Scenario, hook: &str) -> u64 {
    let rows = scenario.get("drops");
    let row = rows.iter().find(|row| row["reason"] == "source-not-allowed" && row["hook"] == hook);
    row.unwrap()["packets"].as_u64().unwrap()
}

fn assert_silent(scenario: &Scenario, question: &Question) {
    let outcome = question.expecting_silence().ask(&scenario.lab).unwrap();
    outcome.answer.as_ref().unwrap_err();
    assert_eq!(outcome.pods(), [""; 0], "{question:?}");
    assert_eq!(outcome.client_saw, [], "{question:?}");
}

fn three_pods() -> LabSpec {
    let mut spec = LabSpec::unique();
    let addresses = ["11.0.2.4".parse().unwrap(), "1100::204".parse().unwrap()];
    spec.pods.push(PodSpec { name: "alpine-3".to_owned(), addresses: addresses.to_vec() });
    spec
}

#[test]
fn ranges_that_do_not_fit_leave_the_former_ones_and_do_not_hold_up_the_pods() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(4), &[]);
    scenario.write("service.yaml", &only_from(&FIRST_TWO));
    scenario.start_agent();
    let [v4, _] = externals();
    let clients = clients(&scenario, v4);
    let ranges = too_many_ranges();
    scenario.write("service.yaml", &only_from(&ranges.iter().map(String::as_str).collect::<Vec<_>>()));
    let said = scenario.agent().wait_for_log(EDIT_TAKES_EFFECT_WITHIN, |log| {
        log.contains(
            "Service lab/web (IPv4): 70000 source ranges do not fit (the map `sources` has room for 65536",
        )
    });
    said.unwrap();
    // Those of the other family do fit.
    wait_for_services(&scenario, "sources", |external| {
        [if external.is_ipv4() { FIRST_TWO[0] } else { ALL[1] }].into()
    });
    let name = scenario.lab.pods[0].host.name.clone();
    scenario.write_pods(&scenario.pod(&name));
    let known =
        wait::until(EDIT_TAKES_EFFECT_WITHIN, || (scenario.get("endpoints").len() == 2).then_some(()));
    assert!(known.is_some(), "{:?}", scenario.get("endpoints"));
    let question = scenario.question(Protocol::Udp, 42000, v4, 5060);
    assert_eq!(scenario.ask(&question.from(clients[0])).pods(), [name.as_str()]);
    assert_silent(&scenario, &question.from(clients[2]));
    // Mended, without a restart.
    restrict(&scenario, ALL);
    let _ = scenario.ask(&question.from(clients[2]));
}

#[test]
fn source_ranges_admit_whom_they_name_in_every_protocol() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(4), &[]);
    scenario.write("service.yaml", &only_from(&FIRST_TWO));
    scenario.start_agent();
    for external in externals() {
        let clients = clients(&scenario, external);
        for (from_port, protocol) in (42000..).zip(Protocol::ALL) {
            let question = scenario.question(protocol, from_port, external, 5060);
            for permitted in &clients[..2] {
                let _ = scenario.ask(&question.from(*permitted));
            }
            let before = not_allowed(&scenario, "uplink-ingress");
            assert_silent(&scenario, &question.from(clients[2]));
            assert!(not_allowed(&scenario, "uplink-ingress") > before, "{protocol} is not counted");
        }
        let before = not_allowed(&scenario, "uplink-ingress");
        assert_silent(&scenario, &scenario.question(Protocol::Icmp, 7, external, 0).from(clients[3]));
        assert_eq!(not_allowed(&scenario, "uplink-ingress"), before + 1);
    }
}

#[test]
fn pods_need_permission_too_and_other_addresses_of_theirs_have_their_own_ranges() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(3), &[]);
    let open: [IpAddr; 2] = ["10.0.0.56".parse().unwrap(), "1000::56".parse().unwrap()];
    // The same pods have two Services: one is for some, the other for all.
    scenario.write("service.yaml", &only_from(&FIRST_TWO));
    scenario.write("open.yaml", &manifests::service("open", &open));
    scenario.write("open-slices.yaml", &manifests::slices("open", NODE_NAME, &scenario.all_pods()));
    scenario.start_agent();
    let pod = &scenario.lab.pods[1].host;
    for (external, open) in externals().into_iter().zip(open) {
        let clients = clients(&scenario, external);
        let to = |external, from_port| scenario.question(Protocol::Udp, from_port, external, 5060);
        let _ = scenario.ask(&to(external, 42000).from(clients[0]));
        let _ = scenario.ask(&to(open, 42001).from(clients[0]));
        assert_silent(&scenario, &to(external, 42000).from(clients[2]));
        let _ = scenario.ask(&to(open, 42001).from(clients[2]));

        let before = not_allowed(&scenario, "pod-ingress");
        let from_pod = |external| to(external, 43000).from(pod.address(external));
        from_pod(external).expecting_silence().ask_who(pod).unwrap().unwrap_err();
        assert_eq!(not_allowed(&scenario, "pod-ingress"), before + 1);
        from_pod(open).ask_who(pod).unwrap().unwrap();
    }
}

#[test]
fn a_service_whose_ranges_do_not_parse_is_open_to_nobody_and_so_is_a_family_without_any() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write("service.yaml", &only_from(&["192.168.1.0-255"]));
    scenario.start_agent();
    let log = scenario.agent().log();
    assert!(log.contains("spec.loadBalancerSourceRanges[0] \"192.168.1.0-255\" is not a network"), "{log}");
    for external in externals() {
        assert_silent(&scenario, &scenario.question(Protocol::Icmp, 7, external, 0));
    }
    let [v4, v6] = externals();
    scenario.write("service.yaml", &only_from(&[" 192.168.1.0/24 "]));
    scenario.wait_for_any_pod(v4);
    assert_silent(&scenario, &scenario.question(Protocol::Icmp, 7, v6, 0));
    scenario.write("service.yaml", &manifests::service(SERVICE, &externals()));
    scenario.wait_for_any_pod(v6);
}

#[test]
fn source_ranges_stay_in_force_without_the_agent_and_the_next_one_leaves_them_as_they_are() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(3), &[]);
    scenario.write("service.yaml", &only_from(&FIRST_TWO));
    scenario.start_agent();
    let entries = |scenario: &Scenario| {
        let pin = scenario.lab.pin_path().join(format!("v{SCHEMA}/sources")).display().to_string();
        scenario.on_node("bpftool", &["map", "dump", "pinned", &pin])
    };
    let before = entries(&scenario);
    for step in ["killed", "started again"] {
        match step {
            "killed" => scenario.kill_agent(),
            _ => scenario.start_agent(),
        }
        for external in externals() {
            let clients = clients(&scenario, external);
            let question = scenario.question(Protocol::Udp, 42000, external, 5060);
            let _ = scenario.ask(&question.from(clients[1]));
            assert_silent(&scenario, &question.from(clients[2]));
        }
        assert_eq!(entries(&scenario), before, "{step}");
    }
}

/// Sends a datagram, waits for its answer, and so on until told to stop. Returns how many were answered, and how many not.
fn converse(scenario: &Scenario, from: SocketAddr, to: SocketAddr, stop: &AtomicBool) -> (usize, usize) {
    let socket = scenario.lab.client.udp(from).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut answered, mut lost) = (0, 0);
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        socket.send_to(b"question", to).unwrap();
        match socket.recv_from(&mut buffer) {
            Ok((_, source)) if source == to => answered += 1,
            _ => lost += 1,
        }
    }
    (answered, lost)
}

/// Ends conversations also when a test fails meanwhile.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn whom_all_ranges_admit_loses_nothing_while_they_change() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(3), &[]);
    scenario.write("service.yaml", &only_from(&ALL));
    scenario.start_agent();
    let mut permitted = externals().map(|external| Connection::open(&scenario, external, 42000));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stops = Stop(&stop);
        let conversations: Vec<_> = externals()
            .into_iter()
            .map(|external| {
                let from = SocketAddr::new(clients(&scenario, external)[0], 42001);
                let (scenario, stop) = (&scenario, &stop);
                scope.spawn(move || converse(scenario, from, SocketAddr::new(external, 5060), stop))
            })
            .collect();
        for _ in 0..5 {
            restrict(&scenario, FIRST_TWO);
            for external in externals() {
                let outsider = scenario.question(Protocol::Udp, 0, external, 5060);
                let outsider = outsider.from(clients(&scenario, external)[2]).expecting_silence();
                outsider.ask_who(&scenario.lab.client).unwrap().unwrap_err();
            }
            restrict(&scenario, ALL);
            permitted.iter_mut().for_each(|connection| connection.goes_on("while ranges change"));
        }
        drop(stops);
        for conversation in conversations {
            let (answered, lost) = conversation.join().unwrap();
            assert_eq!(lost, 0, "of {}", answered + lost);
            assert!(answered > 1000, "only {answered} datagrams went while ranges changed");
        }
    });
}

#[test]
fn whoever_is_no_longer_admitted_is_cut_off_and_goes_on_when_admitted_again() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write("service.yaml", &only_from(&ALL));
    scenario.start_agent();
    let mut connections = externals().map(|external| Connection::open(&scenario, external, 42000));
    restrict(&scenario, ["198.51.100.0/24", "2001:db8::/32"]);
    for external in externals() {
        assert_silent(&scenario, &scenario.question(Protocol::Icmp, 7, external, 0));
    }
    restrict(&scenario, ALL);
    for connection in &mut connections {
        connection.goes_on("once its client may send again");
    }
}

/// An error from `router` about `quoted`, a packet that came by there: its destination does not answer.
fn unreachable(router: IpAddr, quoted: &Packet) -> Packet {
    let quote = quoted.encode();
    let (number, mut message) = match (router, quoted.source) {
        (IpAddr::V4(_), _) => {
            let kind = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Host);
            (protocol::ICMP, Icmpv4Header::with_checksum(kind, &quote).to_bytes().to_vec())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = Icmpv6Type::DestinationUnreachable(V6Unreachable::Address);
            let header = Icmpv6Header::with_checksum(kind, from.octets(), to.octets(), &quote).unwrap();
            (protocol::ICMPV6, header.to_bytes().to_vec())
        }
        (IpAddr::V6(_), IpAddr::V4(_)) => unreachable!("{router} would not quote {quoted}"),
    };
    message.extend_from_slice(&quote);
    Packet::new(router, quoted.source, number, message)
}

#[test]
fn a_router_outside_of_the_ranges_may_report_errors_about_permitted_conversations() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write("service.yaml", &only_from(&FIRST_TWO));
    scenario.start_agent();
    for (external, router) in externals().into_iter().zip(["203.0.113.9", "2001:db8::9"]) {
        let question = scenario.question(Protocol::Udp, 42000, external, 5060);
        let outcome = scenario.ask(&question);
        let pod = &scenario.lab.pod(outcome.pods()[0]).host;
        let reply = outcome.client_saw.iter().find(|packet| packet.source == external).unwrap();
        let router = router.parse().unwrap();
        let error = unreachable(router, reply);
        error.check_checksum().unwrap();
        let capture = pod.capture().unwrap();
        scenario.lab.client.send(&[error]).unwrap();
        let seen = capture.wait_for(PATIENCE, Direction::In, |packet| packet.source == router);
        let seen = seen.unwrap_or_else(|| panic!("{} is not told", pod.name));
        assert_eq!(seen.destination, pod.address(external));
        let quoted = Packet::decode(&seen.payload[8..]).unwrap();
        assert_eq!((quoted.source, quoted.destination), (pod.address(external), question.from.ip()));
        seen.check_checksum().unwrap();
        // Anything else from there is not for the pod.
        let echo = Packet::echo_request(router, external, 7, 1, b"let me in");
        let before = not_allowed(&scenario, "uplink-ingress");
        scenario.lab.client.send(&[echo]).unwrap();
        let counted =
            wait::until(PATIENCE, || (not_allowed(&scenario, "uplink-ingress") == before + 1).then_some(()));
        assert!(counted.is_some());
    }
}

/// With a fair choice among three pods, one is left without any of 40 conversations in one case of 3,700,000.
const CONVERSATIONS: u16 = 40;

#[test]
fn with_balance_flow_one_clients_connections_are_spread_and_each_stays() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&three_pods(), &[]);
    scenario.write("service.yaml", &balanced("flow"));
    scenario.start_agent();
    for external in externals() {
        let mut connections: Vec<_> =
            (0..CONVERSATIONS).map(|n| Connection::open(&scenario, external, 42000 + n)).collect();
        let used: BTreeSet<String> = connections.iter().map(|connection| connection.pod.clone()).collect();
        assert_eq!(used.len(), 3, "{external}: {used:?}");
        let ask = |port| {
            let question = scenario.question(Protocol::Udp, port, external, 5060);
            question.ask_who(&scenario.lab.client).unwrap().unwrap().host
        };
        let first: Vec<String> = (43000..43000 + CONVERSATIONS).map(ask).collect();
        assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 3, "{external}: {first:?}");

        // One of the pods takes no new conversations, and those that it has go on.
        let gone = scenario.lab.pods[2].host.name.clone();
        let text = manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods());
        let text = scenario.pod(&gone).iter().fold(text, |text, address| {
            let ready = format!("[\"{address}\"]\n  conditions: {{ready: true}}");
            text.replace(&ready, &ready.replace("true", "false"))
        });
        scenario.write("slices.yaml", &text);
        wait_for_services(&scenario, "backends", |_| 2.into());
        connections.iter_mut().for_each(|connection| connection.goes_on("when a pod is not ready"));
        let second: Vec<String> = (43000..43000 + CONVERSATIONS).map(ask).collect();
        assert_eq!(first, second, "{external}: a conversation has moved");
        let new: BTreeSet<String> = (44000..44000 + CONVERSATIONS).map(ask).collect();
        assert_eq!(new.len(), 2, "{external}: {new:?}");
        scenario.write_pods(&scenario.all_pods());
        wait_for_services(&scenario, "backends", |_| 3.into());
    }
    let sessions = scenario.get("sessions");
    for (protocol, external_port, from) in [("tcp", 8443, 42000), ("udp", 5060, 43000)] {
        for peer_port in from..from + CONVERSATIONS {
            let of_port = sessions.iter().filter(|row| {
                row["protocol"] == protocol
                    && row["externalPort"] == external_port
                    && row["peerPort"] == peer_port
            });
            assert_eq!(of_port.count(), 2, "{protocol} from port {peer_port}, one a family");
        }
    }
}

#[test]
fn a_pods_connections_are_spread_with_balance_flow_its_own_pod_included() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&three_pods(), &[]);
    scenario.write("service.yaml", &balanced("flow"));
    scenario.start_agent();
    let pod = &scenario.lab.pods[0].host;
    for external in externals() {
        let mut answered_by = BTreeSet::new();
        for from_port in 42000..42000 + CONVERSATIONS {
            let mut connection = Connection::from(pod, external, from_port);
            connection.goes_on("from a pod");
            answered_by.insert(connection.pod);
        }
        assert!(answered_by.contains(&pod.name), "it never reaches itself");
        assert_eq!(answered_by.len(), 3, "{answered_by:?}");
    }
}

#[test]
fn an_unknown_balance_is_reported_and_a_client_stays_on_its_pod() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    scenario.write("service.yaml", &balanced("random"));
    scenario.start_agent();
    let log = scenario.agent().log();
    assert!(
        log.contains("metadata.annotations[proxier.io/balance] \"random\" is not a way to balance"),
        "{log}"
    );
    for external in externals() {
        let pods: BTreeSet<String> = (42000..42020)
            .map(|from_port| {
                let question = scenario.question(Protocol::Udp, from_port, external, 5060);
                question.ask_who(&scenario.lab.client).unwrap().unwrap().host
            })
            .collect();
        assert_eq!(pods.len(), 1, "{external}: {pods:?}");
    }
}
