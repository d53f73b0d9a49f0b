//! What the agent tells of packets that are dropped, and what is counted beside.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::Range,
    thread,
    time::Duration,
};

use proxier_common::{EVENTS_A_SECOND, MAX_FLOWS};
use proxier_tests::{
    exchange::PATIENCE,
    manifests,
    packets::{Packet, TcpFlags},
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, Pod, UPLINK},
    wait,
};
use serde_json::Value;

/// Longer than the agent takes to tell what it has put off.
const NEXT_LINES: Duration = Duration::from_millis(1500);

/// A lab whose agent logs as JSON, what `level` lets through.
fn start(level: &str) -> Scenario {
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    for (name, value) in [("PROXIER_LOG_FORMAT", "json"), ("PROXIER_LOG_LEVEL", level)] {
        scenario.spec.environment.push((name.into(), value.into()));
    }
    scenario.start_agent();
    scenario
}

/// Leaves the Service without pods.
fn take_pods(scenario: &Scenario) {
    scenario.write_pods(&[]);
    let taken = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
        scenario.get("services").iter().all(|row| row["backends"] == 0).then_some(())
    });
    assert!(taken.is_some(), "{:?}", scenario.get("services"));
}

/// What the agent has told of packets for `reason`.
fn told(scenario: &mut Scenario, reason: &str) -> Vec<Value> {
    let log = scenario.agent().log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["reason"] == reason).collect()
}

/// Waits until the agent has told of `number` kinds of packets for `reason`, and then for lines that should not come.
fn first_lines(scenario: &mut Scenario, reason: &str, number: usize) -> Vec<Value> {
    let _ = wait::until(PATIENCE, || (told(scenario, reason).len() >= number).then_some(()));
    thread::sleep(NEXT_LINES);
    let lines = told(scenario, reason);
    assert_eq!(lines.len(), number, "{lines:#?}");
    lines
}

/// How many packets have been dropped so.
fn dropped(scenario: &Scenario, reason: &str, hook: &str) -> u64 {
    let rows = scenario.get("drops");
    let row = rows.iter().find(|row| row["reason"] == reason && row["hook"] == hook).unwrap();
    row["packets"].as_u64().unwrap()
}

fn statistic(scenario: &Scenario, name: &str) -> u64 {
    let rows = scenario.get("statistics");
    let row = rows.iter().find(|row| row["statistic"] == name);
    row.unwrap_or_else(|| panic!("no {name} in {rows:?}"))["count"].as_u64().unwrap()
}

fn client(scenario: &Scenario, external: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(scenario.lab.client.address(external), port)
}

fn send(scenario: &Scenario, packets: &[Packet]) {
    scenario.lab.client.send(packets).unwrap();
}

#[test]
fn a_packet_for_a_service_without_pods_makes_one_line_that_says_whose_it_was() {
    skip_unless_root!();
    let mut scenario = start("info");
    take_pods(&scenario);
    let packets_of = |external: IpAddr| {
        let (from, to) = (client(&scenario, external, 42_000), SocketAddr::new(external, 5060));
        let syn = TcpFlags { syn: true, ..TcpFlags::default() };
        [
            (Packet::udp(from, to, b"question"), "udp"),
            (Packet::tcp(from, to, syn, 1, b""), "tcp"),
            (Packet::sctp_init(from, to, 7), "sctp"),
            (Packet::gre(from.ip(), to.ip(), 7, b"question"), "gre"),
            (
                Packet::echo_request(from.ip(), to.ip(), 7, 1, b"question"),
                if external.is_ipv4() { "icmp" } else { "icmpv6" },
            ),
        ]
    };
    let packets: Vec<_> = externals().into_iter().flat_map(packets_of).collect();
    assert!(packets.len() <= EVENTS_A_SECOND as usize, "the kernel would not report all of them");
    // Each three times: the other two are told in a minute.
    for _ in 0..3 {
        for (packet, _) in &packets {
            send(&scenario, std::slice::from_ref(packet));
        }
        thread::sleep(Duration::from_millis(1100));
    }
    let lines = first_lines(&mut scenario, "no-backend", packets.len());
    for ((packet, protocol), line) in packets.iter().zip(&lines) {
        assert_eq!(line["level"], "INFO", "{line}");
        assert_eq!(line["hook"], "uplink-ingress", "{line}");
        assert_eq!(line["service"], format!("lab/{SERVICE}"), "{line}");
        assert_eq!(line["protocol"], *protocol, "{line}");
        assert_eq!(line["source"], packet.source.to_string(), "{line}");
        assert_eq!(line["destination"], packet.destination.to_string(), "{line}");
        assert_eq!(line["interface"], UPLINK, "{line}");
        let ports = packet.ports().map(|(source, destination)| (source.into(), destination.into()));
        let told = ports.is_some().then(|| (line["source_port"].clone(), line["destination_port"].clone()));
        assert_eq!(told, ports, "{line}");
        assert_eq!(line.get("source_port").is_some(), ports.is_some(), "{line}");
    }
    assert_eq!(dropped(&scenario, "no-backend", "uplink-ingress"), 3 * packets.len() as u64);
}

#[test]
fn a_flood_makes_few_lines_and_every_packet_is_counted() {
    const PACKETS: u16 = 5_000;
    skip_unless_root!();
    let mut scenario = start("info");
    take_pods(&scenario);
    let [external, _] = externals();
    let flood: Vec<_> = (0..PACKETS)
        .map(|number| {
            let from = client(&scenario, external, 10_000 + number);
            Packet::udp(from, SocketAddr::new(external, 5060), b"flood")
        })
        .collect();
    send(&scenario, &flood);
    let sums = |lines: &[Value]| lines.iter().filter(|line| line.get("source").is_none()).count();
    let _ = wait::until(PATIENCE, || (sums(&told(&mut scenario, "no-backend")) > 0).then_some(()));
    thread::sleep(NEXT_LINES);
    let lines = told(&mut scenario, "no-backend");
    assert!((2..=24).contains(&lines.len()), "{} lines: {lines:#?}", lines.len());
    assert_eq!(sums(&lines), 1, "{lines:#?}");
    // What came while it was summed up is told in a minute, but no packet twice.
    let packets: u64 = lines.iter().map(|line| line["packets"].as_u64().unwrap_or(1)).sum();
    assert!(packets <= u64::from(PACKETS), "{packets}: {lines:#?}");
    assert_eq!(dropped(&scenario, "no-backend", "uplink-ingress"), u64::from(PACKETS));
}

#[test]
fn what_needs_an_operator_is_a_warning_and_what_anybody_can_send_is_for_debugging() {
    skip_unless_root!();
    for level in ["info", "debug"] {
        let mut scenario = start(level);
        let [first, other] = ["10.0.0.55", "10.0.0.56"].map(|text| text.parse::<IpAddr>().unwrap());
        scenario.write("service.yaml", &manifests::service(SERVICE, &[first, other]));
        scenario.write_pods(&scenario.pod(&scenario.lab.pods[0].host.name));
        let written = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            let rows = scenario.get("services");
            (rows.len() == 2 && rows.iter().all(|row| row["backends"] == 1 && row["external"] != "1000::55"))
                .then_some(())
        });
        assert!(written.is_some(), "{:?}", scenario.get("services"));

        for external in [first, other] {
            let to = SocketAddr::new(external, 5060);
            send(&scenario, &[Packet::udp(client(&scenario, external, 42_000), to, b"question")]);
        }
        let lines = first_lines(&mut scenario, "flow-collision", 1);
        assert_eq!((&lines[0]["level"], &lines[0]["destination"]), (&"WARN".into(), &"10.0.0.56".into()));

        let forged = Packet::udp(SocketAddr::new(first, 9), SocketAddr::new(first, 9), b"to itself");
        send(&scenario, &[forged]);
        let lines = first_lines(&mut scenario, "spoofed-source", usize::from(level == "debug"));
        assert!(lines.iter().all(|line| line["level"] == "DEBUG"), "{lines:#?}");
        assert_eq!(dropped(&scenario, "spoofed-source", "uplink-ingress"), 1);
    }
}

#[test]
fn what_was_dropped_while_no_agent_ran_is_told_by_the_next_one() {
    skip_unless_root!();
    let mut scenario = start("info");
    take_pods(&scenario);
    let [external, _] = externals();
    let packet =
        |port| Packet::udp(client(&scenario, external, port), SocketAddr::new(external, 5060), b"question");
    let [before, between] = [packet(42_000), packet(42_001)];
    send(&scenario, &[before]);
    first_lines(&mut scenario, "no-backend", 1);
    scenario.kill_agent();
    send(&scenario, &[between]);
    scenario.start_agent();
    let lines = first_lines(&mut scenario, "no-backend", 1);
    assert_eq!(lines[0]["source_port"], 42_001);
    assert_eq!(lines[0]["message"], "packet dropped earlier", "{lines:#?}");
    assert!(lines[0]["ago_seconds"].as_u64().unwrap() < 60, "{lines:#?}");
}

#[test]
fn a_full_table_is_told_with_how_many_conversations_it_cost() {
    /// Ports of each client.
    const PORTS: u16 = 50_000;
    const CLIENTS: u8 = 6;
    const SENT: u64 = PORTS as u64 * CLIENTS as u64;
    /// Two looks at the table, ten seconds apart, and what a busy machine takes for them.
    const COUNTED_WITHIN: Duration = Duration::from_secs(60);
    skip_unless_root!();
    let mut scenario = start("info");
    // Nobody answers: nothing but the flood is on its way.
    scenario.lab.pods.iter_mut().for_each(Pod::stop);
    let [external, _] = externals();
    for client in 1..=CLIENTS {
        let packets = |ports: Range<u16>| -> Vec<Packet> {
            let from = |port| SocketAddr::new(IpAddr::from([192, 168, 1, client]), port);
            let to = SocketAddr::new(external, 5060);
            ports.map(|port| Packet::sctp_init(from(port), to, 1)).collect()
        };
        for first in (0..PORTS).step_by(5_000) {
            send(&scenario, &packets(10_000 + first..15_000 + first));
        }
    }
    assert_eq!(statistic(&scenario, "flow-inserted"), SENT);
    assert_eq!(dropped(&scenario, "flow-table-full", "uplink-ingress"), 0);
    let least = SENT - u64::from(MAX_FLOWS);
    let counted =
        wait::until(COUNTED_WITHIN, || (statistic(&scenario, "flow-evicted") >= least).then_some(()));
    let evicted = statistic(&scenario, "flow-evicted");
    assert!(counted.is_some(), "{evicted} told, {least} or more evicted");
    // The kernel evicts some hundred at once, for each CPU.
    assert!(evicted < least + u64::from(MAX_FLOWS) / 100, "{evicted} told, about {least} evicted");

    scenario.agent().wait_for_log(PATIENCE, |log| log.contains("`flows` is full")).unwrap();
    let log = scenario.agent().log();
    let line = log.lines().find(|line| line.contains("`flows` is full")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["level"], &line["map"]), (&"WARN".into(), &"flows".into()));
    assert_eq!(line["max_entries"], MAX_FLOWS);
    let told = line["evicted"].as_u64().unwrap();
    assert!((1..=evicted).contains(&told), "{line}");
}

#[test]
fn statistics_tell_how_many_flows_were_made_and_every_one_is_listed_once() {
    /// More than are read from the kernel at once.
    const FLOWS: u16 = 3_000;
    skip_unless_root!();
    let scenario = start("info");
    assert_eq!(statistic(&scenario, "flow-inserted"), 0);
    for external in externals() {
        let packet = |number| {
            let from = client(&scenario, external, 10_000 + number);
            Packet::sctp_init(from, SocketAddr::new(external, 5060), 1)
        };
        let packets: Vec<_> = (0..FLOWS).map(packet).collect();
        send(&scenario, &packets);
        send(&scenario, &packets[..10]);
    }
    let flows = 2 * u64::from(FLOWS);
    assert_eq!(statistic(&scenario, "flow-inserted"), flows);
    for name in ["flow-forgotten", "flow-rebuilt", "flow-evicted"] {
        assert_eq!(statistic(&scenario, name), 0, "{name}");
    }
    let listed: BTreeSet<String> = scenario.get("flows").iter().map(ToString::to_string).collect();
    assert_eq!(listed.len() as u64, flows);

    for format in ["table", "wide", "json", "yaml"] {
        let output = scenario.proxier(&["get", "statistics", "-o", format]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("flow-inserted"), "{format}: {output:?}");
    }
}
