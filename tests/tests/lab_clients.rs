//! Clients on the node itself: pods that speak to an external address, their own Service's included. And large transfers
//! through a link that is narrower than the client knows.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use proxier_tests::{
    capture::Direction,
    connection::Connection,
    exchange::{PATIENCE, Protocol, Question},
    host::Host,
    packets::Packet,
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, UPLINK},
};

/// Asks from a pod in `protocols`, and expects answers from the external address by the pod called `expected`.
fn ask_all(client: &Host, protocols: &[Protocol], expected: &str) {
    for external in externals() {
        for (from_port, protocol) in (42000..).zip(protocols.iter().copied()) {
            let question = Question {
                protocol,
                from: SocketAddr::new(client.address(external), from_port),
                to: SocketAddr::new(external, 5060),
                timeout: PATIENCE,
            };
            let answer = question.ask_who(client).unwrap();
            // The kernel answers an echo by itself, and does not say who it is.
            match (protocol, answer) {
                (Protocol::Icmp, Err(error)) => assert_eq!(error, "the answer names no pod"),
                (_, Ok(sighting)) => assert_eq!(sighting.host, expected, "{protocol} from {}", client.name),
                (_, Err(error)) => panic!("{protocol} from {} to {external}: {error}", client.name),
            }
        }
        let mut connection = Connection::from(client, external, 43000);
        assert_eq!(connection.pod, expected);
        connection.goes_on("once it is open");
    }
}

#[test]
fn a_pod_reaches_another_pod_through_the_external_address() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [server, client] = [&scenario.lab.pods[0].host, &scenario.lab.pods[1].host];
    scenario.write_pods(&server.addresses);
    for external in externals() {
        scenario.wait_for_pod(scenario.lab.client.address(external), external, &server.name);
    }
    let capture = client.capture().unwrap();
    ask_all(client, &Protocol::ALL, &server.name);
    let from_server: Vec<_> = capture
        .packets(Direction::In)
        .into_iter()
        .filter(|packet| server.addresses.contains(&packet.source))
        .collect();
    assert!(from_server.is_empty(), "the client saw the pod's own address: {from_server:?}");
    assert!(capture.wrong_checksums().is_empty(), "{:?}", capture.wrong_checksums());
}

#[test]
fn a_pod_reaches_itself_through_its_external_address() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let pod = &scenario.lab.pods[0].host;
    scenario.write_pods(&pod.addresses);
    for external in externals() {
        scenario.wait_for_pod(scenario.lab.client.address(external), external, &pod.name);
    }
    // Without ports, the pod's own packet that comes back looks like the answer to it.
    let with_ports: Vec<_> = Protocol::ALL
        .into_iter()
        .filter(|protocol| !matches!(protocol, Protocol::Gre | Protocol::Esp))
        .collect();
    ask_all(pod, &with_ports, &pod.name);
}

#[test]
fn clients_on_the_node_are_left_alone_if_told_so() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &["--no-local-clients"]);
    let server = &scenario.lab.pods[0].host;
    scenario.write_pods(&server.addresses);
    for external in externals() {
        scenario.wait_for_pod(scenario.lab.client.address(external), external, &server.name);
        let capture = server.capture().unwrap();
        for client in [&scenario.lab.pods[1].host, &scenario.lab.node] {
            let question = scenario.question(Protocol::Udp, 42000, external, 5060);
            let question = question.from(client.address(external)).expecting_silence();
            assert!(question.ask_who(client).unwrap().is_err(), "{}", client.name);
        }
        let arrived: Vec<_> =
            capture.packets(Direction::In).into_iter().filter(|packet| packet.protocol == 17).collect();
        assert!(arrived.is_empty(), "{arrived:?}");
    }
}

/// The node says "packet too big" to the client about a packet on its way to the pod. Only if that names the external
/// address does the client know what it is about.
#[test]
fn a_large_transfer_gets_through_a_link_that_is_narrower_than_the_client_knows() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for interface in scenario.lab.node_interfaces().iter().filter(|interface| *interface != UPLINK) {
        let _ = scenario.on_node("ip", &["link", "set", "dev", interface, "mtu", "1300"]);
    }
    for external in externals() {
        let capture = scenario.lab.client.capture().unwrap();
        let connection = Connection::open(&scenario, external, 42000);
        let (mut sending, mut receiving) = (connection.stream.try_clone().unwrap(), connection.stream);
        const SIZE: usize = 300_000;
        std::thread::scope(|scope| {
            scope.spawn(move || sending.write_all(&[0xab; SIZE]).unwrap());
            let mut echo = vec![0; SIZE];
            receiving.read_exact(&mut echo).unwrap_or_else(|error| panic!("{external}: {error}"));
            assert!(echo.iter().all(|byte| *byte == 0xab));
        });
        let errors: Vec<_> = capture.packets(Direction::In).into_iter().filter(Packet::is_too_big).collect();
        assert!(!errors.is_empty(), "nobody said that a packet was too big");
        for error in &errors {
            let (_, quoted) = error.quoted_addresses().unwrap();
            assert_eq!((error.source, quoted), (external, external));
        }
        assert!(capture.wrong_checksums().is_empty(), "{:?}", capture.wrong_checksums());
    }
}

/// A pod that is the end of a tunnel: the checksum of what is within is left to the hardware, that of the UDP around it
/// is complete ("local checksum offload"). To the kernel's helpers both look alike.
#[test]
fn a_tunnel_that_ends_in_a_pod_carries_tcp() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let pod = &scenario.lab.pods[0].host;
    let client = &scenario.lab.client;
    scenario.write_pods(&pod.addresses);
    // The uplink's driver, not the kernel's, would otherwise fill in what is left to it, and none is there.
    let _ = scenario.on_node("ethtool", &["-K", UPLINK, "tx", "off"]);
    for (index, external) in (1_u8..).zip(externals()) {
        scenario.wait_for_pod(client.address(external), external, &pod.name);
        let (inner_client, inner_pod) = ([10, 99, index, 1], [10, 99, index, 2]);
        for (host, inner, remote) in
            [(client, inner_client, external), (pod, inner_pod, client.address(external))]
        {
            let [a, b, c, d] = inner;
            let (local, next) = (host.address(external), 4781 + u32::from(index));
            let zero = if external.is_ipv4() { "udpcsum" } else { "noudp6zerocsumtx noudp6zerocsumrx" };
            host.namespace
                .ip(&format!(
                    "link add vx{index} type vxlan id {index} local {local} remote {remote} dstport 478{index} \
                     srcport 478{index} {next} {zero}\naddress add {a}.{b}.{c}.{d}/24 dev vx{index}\n\
                     link set vx{index} up\n"
                ))
                .unwrap();
        }
        let to = SocketAddr::new(inner_pod.into(), 6000);
        let mut stream =
            client.connect(SocketAddr::new(inner_client.into(), 0), to, PATIENCE).unwrap_or_else(|error| {
                panic!("no connection through the tunnel to {external}: {error}");
            });
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut banner = [0; 256];
        let size = stream.read(&mut banner).unwrap();
        assert!(size > 0, "the tunnel to {external} is closed");
        stream.write_all(b"question").unwrap();
        let size = stream.read(&mut banner).unwrap();
        assert_eq!(&banner[..size], b"question");
    }
    let flows = scenario.get("flows");
    assert!(flows.iter().any(|flow| flow["podPort"] == 4782), "the tunnel does not go through: {flows:?}");
}
