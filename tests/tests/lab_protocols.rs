//! Every protocol in both families, end to end: what the pod sees, what the client sees, and what is left alone.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr},
    process::Stdio,
    time::Duration,
};

use proxier_tests::{
    capture::Direction,
    exchange::{PATIENCE, Protocol},
    packets::{Packet, protocol},
    responder::Sighting,
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::LabSpec,
};

/// Ports that the Service does not name, and that pods listen on.
const PORT: u16 = 5060;

fn every_protocol_is_delivered(spec: &LabSpec, attach: &str) {
    let scenario = Scenario::start(spec, &["--attach", attach]);
    for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
        for external in externals() {
            let question = scenario.question(protocol, from_port, external, PORT);
            // Says so itself if the client saw any other source, the pod any other client, or anyone a wrong checksum.
            let outcome = scenario.ask(&question);
            if let Some(sighting) = outcome.answer.ok().and_then(|bytes| Sighting::in_answer(&bytes)) {
                assert_eq!(sighting.peer.ip(), question.from.ip());
                assert_eq!(sighting.local.ip(), scenario.lab.pod(&sighting.host).host.address(external));
            }
        }
    }
}

#[test]
fn every_protocol_is_delivered_and_answered_by_tcx() {
    skip_unless_root!();
    every_protocol_is_delivered(&LabSpec::unique(), "tcx");
}

#[test]
fn every_protocol_is_delivered_and_answered_by_clsact() {
    skip_unless_root!();
    every_protocol_is_delivered(&LabSpec::unique(), "clsact");
}

#[test]
fn every_protocol_is_delivered_and_answered_without_offloads() {
    skip_unless_root!();
    every_protocol_is_delivered(&LabSpec::unique().without_offloads(), "auto");
}

/// What nodes of a cluster do to packets: whatever conntrack finds invalid is dropped, and what pods send to the
/// outside leaves with the node's address. Replies must be neither.
const NODE_FIREWALL: &str = "
table inet node {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    ct state established,related accept
    iifname uplink0 accept
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname uplink0 ip saddr 11.0.0.0/8 masquerade
    oifname uplink0 ip6 saddr 1100::/16 masquerade
  }
}
";

#[test]
fn the_nodes_connection_tracking_sees_one_consistent_conversation() {
    skip_unless_root!();
    for attach in ["tcx", "clsact"] {
        let scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
        let mut nft = scenario.lab.node.namespace.command("nft").unwrap();
        let mut nft = match nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn() {
            Ok(nft) => nft,
            Err(error) => return eprintln!("SKIPPED: no nft here ({error}): install nftables"),
        };
        nft.stdin.take().unwrap().write_all(NODE_FIREWALL.as_bytes()).unwrap();
        assert!(nft.wait().unwrap().success());
        // Conntrack finds the kernel's own UDP-Lite invalid, with or without proxier.
        let protocols = Protocol::ALL.into_iter().filter(|protocol| *protocol != Protocol::UdpLite);
        for (from_port, protocol) in (41000..).zip(protocols) {
            for external in externals() {
                let _ = scenario.ask(&scenario.question(protocol, from_port, external, PORT));
            }
        }
    }
}

#[test]
fn the_client_never_sees_a_pods_address() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let capture = scenario.lab.client.capture().unwrap();
    for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
        for external in externals() {
            let _ = scenario.ask(&scenario.question(protocol, from_port, external, PORT));
        }
    }
    let packets = capture.packets(Direction::In);
    assert!(packets.len() >= 2 * Protocol::ALL.len());
    let pods = scenario.all_pods();
    for packet in packets {
        assert!(!pods.contains(&packet.source), "the client sees a pod's address: {packet}");
        assert!(externals().contains(&packet.source), "who is that: {packet}");
    }
}

#[test]
fn a_pods_own_connections_are_untouched() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for external in externals() {
        let client = scenario.lab.client.address(external);
        // The client is in touch with the Service: there are flows that might be taken for these connections.
        let _ = scenario.ask(&scenario.question(Protocol::Tcp, 42000, external, 6000));
        let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, 6000));
        let _ = scenario.ask(&scenario.question(Protocol::Icmp, 42000, external, 0));
        for pod in &scenario.lab.pods {
            let address = pod.host.address(external);
            let capture = scenario.lab.client.capture().unwrap();

            let from = SocketAddr::new(address, 43000);
            let to = SocketAddr::new(client, 6000);
            let mut stream = pod.host.connect(from, to, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut banner = [0; 256];
            let size = stream.read(&mut banner).unwrap();
            assert_eq!(Sighting::in_answer(&banner[..size]).unwrap().peer, from);
            // Until both sides have closed: a late segment would turn up in what is watched next.
            stream.shutdown(Shutdown::Write).unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap();

            let socket = pod.host.udp(from).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(b"question", to).unwrap();
            let size = socket.recv(&mut banner).unwrap();
            assert_eq!(Sighting::in_answer(&banner[..size]).unwrap().peer, from);

            // The same identifier as the client's own echo, the other way round.
            pod.host.send(&[Packet::echo_request(address, client, 42000, 1, b"ping")]).unwrap();
            let at_client = capture.wait_for(PATIENCE, Direction::In, |packet| packet.echo().is_some());
            assert_eq!(at_client.unwrap().source, address);

            // A connection of the pod before may still be closing, from its own address.
            let packets = capture.packets(Direction::In);
            assert!(packets.iter().any(|packet| packet.source == address), "{packets:?}");
            assert!(packets.iter().all(|packet| packet.source != external), "{packets:?}");
        }
    }
}

#[test]
fn a_client_that_talks_straight_to_a_pod_is_untouched() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    for external in externals() {
        // First through the external address, to a pod that is then talked to directly.
        let outcome = scenario.ask(&scenario.question(Protocol::Udp, 42000, external, PORT));
        let pod = scenario.lab.pod(outcome.pods()[0]).host.address(external);
        for (from_port, protocol) in (44000..).zip(Protocol::ALL) {
            // GRE and ESP have no ports: from one client, a pod cannot tell the two ways apart, and they come next.
            let question = scenario.question(protocol, from_port, pod, PORT);
            let outcome = scenario.ask(&question);
            assert_eq!(outcome.sources(), [pod], "{protocol}");
        }
    }
}

#[test]
fn options_and_extension_headers_do_not_hide_the_transport() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let from = |external| SocketAddr::new(scenario.lab.client.address(external), 42000);
    let [v4, v6] = externals();
    let to = |external| SocketAddr::new(external, PORT);
    let with_options = Packet::sctp_init(from(v4), to(v4), 7).with_ipv4_options();
    let udp = |external| Packet::udp(from(external), to(external), b"question");
    // Keeps the client's kernel from answering that the port is closed.
    let _open = [v4, v6].map(|external| scenario.lab.client.udp(from(external)).unwrap());
    let packets = [
        with_options,
        udp(v4).with_ipv4_options(),
        udp(v6).with_extension(protocol::DESTINATION_OPTIONS),
        udp(v6).with_extension(protocol::HOP_BY_HOP).with_extension(protocol::DESTINATION_OPTIONS),
    ];
    for packet in packets {
        let at_client = scenario.lab.client.capture().unwrap();
        let at_pods: Vec<_> = scenario.lab.pods.iter().map(|pod| pod.host.capture().unwrap()).collect();
        scenario.lab.client.send(std::slice::from_ref(&packet)).unwrap();
        let answer = at_client
            .wait_for(PATIENCE, Direction::In, |answer| answer.protocol == packet.protocol)
            .unwrap_or_else(|| panic!("no answer to {packet} with {:?}", packet.extensions));
        assert_eq!(answer.source, packet.destination);
        let at_pods: Vec<_> = at_pods.iter().flat_map(|capture| capture.packets(Direction::In)).collect();
        let [seen] = &at_pods[..] else { panic!("pods saw {at_pods:?}") };
        assert_eq!((&seen.options.len(), &seen.extensions), (&packet.options.len(), &packet.extensions));
        seen.check_checksum().unwrap();
    }
}

#[test]
fn fragments_of_requests_and_replies_arrive_whole() {
    skip_unless_root!();
    for attach in ["tcx", "clsact"] {
        let scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
        for external in externals() {
            let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
            let capture = scenario.lab.client.capture().unwrap();
            let socket = scenario.lab.client.udp(from).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let question: Vec<u8> = (0..4000_u16).flat_map(u16::to_be_bytes).collect();
            let mut answer = vec![0; 1 << 16];
            for round in 0..5 {
                socket.send_to(&question, SocketAddr::new(external, PORT)).unwrap();
                let (size, source) = socket
                    .recv_from(&mut answer)
                    .unwrap_or_else(|error| panic!("{external} by {attach}, round {round}: {error}"));
                assert_eq!(source.ip(), external);
                assert!(answer[..size].ends_with(&question));
            }
            let fragments: Vec<_> = capture
                .packets(Direction::In)
                .into_iter()
                .filter(|packet| packet.fragment.is_some())
                .collect();
            assert!(fragments.len() >= 5 * 6, "{} fragments", fragments.len());
            assert!(fragments.iter().all(|fragment| fragment.source == external));
        }
    }
}

#[test]
fn bulk_transfers_survive_segmentation_offload() {
    skip_unless_root!();
    for attach in ["tcx", "clsact"] {
        let scenario = Scenario::start(&LabSpec::unique(), &["--attach", attach]);
        for external in externals() {
            let capture = scenario.lab.client.capture().unwrap();
            let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
            let stream =
                scenario.lab.client.connect(from, SocketAddr::new(external, 8443), PATIENCE).unwrap();
            let sent: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_be_bytes).collect();
            let received = std::thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    let mut received = Vec::new();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let mut stream = &stream;
                    stream.read_to_end(&mut received).unwrap();
                    received
                });
                (&stream).write_all(&sent).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                reader.join().unwrap()
            });
            let banner_ends = received.iter().position(|byte| *byte == b'\n').unwrap() + 1;
            assert!(received[banner_ends..] == sent[..], "{} bytes came back", received.len());
            let largest = capture.packets(Direction::In).iter().map(|packet| packet.payload.len()).max();
            assert!(
                largest > Some(1500),
                "no large segment was seen, so nothing is shown about them: {largest:?}"
            );
        }
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [v4, _] = externals();
    let from = SocketAddr::new(scenario.lab.client.address(v4), 42000);
    let _open = scenario.lab.client.udp(from).unwrap();
    let mut packet = Packet::udp(from, SocketAddr::new(v4, PORT), b"no checksum");
    packet.payload[6..8].fill(0);
    let at_pods: Vec<_> = scenario.lab.pods.iter().map(|pod| pod.host.capture().unwrap()).collect();
    let at_client = scenario.lab.client.capture().unwrap();
    scenario.lab.client.send(&[packet]).unwrap();
    at_client.wait_for(PATIENCE, Direction::In, |packet| packet.source == v4).unwrap();
    let seen: Vec<_> = at_pods.iter().flat_map(|capture| capture.packets(Direction::In)).collect();
    assert_eq!(seen[0].payload[6..8], [0, 0]);
}

#[test]
fn neighbour_discovery_goes_on_under_the_programs() {
    skip_unless_root!();
    let scenario = Scenario::start(&LabSpec::unique(), &[]);
    let [_, v6] = externals();
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, v6, PORT));
    for namespace in [&scenario.lab.node.namespace, &scenario.lab.client.namespace] {
        namespace.ip("neighbour flush all").unwrap();
    }
    let node: IpAddr = proxier_tests::topology::Lab::node_address(v6);
    let capture = scenario.lab.client.capture().unwrap();
    let echo = Packet::echo_request(scenario.lab.client.address(v6), node, 7, 1, b"ping");
    scenario.lab.client.send(&[echo]).unwrap();
    // The node must find the client again before it can answer.
    let answer =
        capture.wait_for(Duration::from_secs(5), Direction::In, |packet| packet.echo() == Some((7, 1)));
    assert_eq!(answer.unwrap().source, node);
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42001, v6, PORT));
}
