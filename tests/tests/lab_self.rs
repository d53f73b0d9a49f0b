//! The lab itself, without proxier: what its other tests conclude is worth nothing if the lab cannot tell right
//! from wrong.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::net::SocketAddr;

use proxier_tests::{
    capture::Direction,
    exchange::{PATIENCE, Protocol, Question},
    netns,
    packets::Packet,
    skip_unless_root,
    topology::{Lab, LabSpec, PodNetwork},
};

const NFT: &str = "
table inet lab {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    ip daddr 10.0.0.55 dnat ip to 11.0.2.2
    ip6 daddr 1000::55 dnat ip6 to 1100::202
  }
}
";

#[test]
fn every_protocol_reaches_a_pod_at_its_own_address() {
    skip_unless_root!();
    let specs = [
        LabSpec::unique(),
        LabSpec::unique().without_offloads(),
        LabSpec::unique().with_pod_network(PodNetwork::Bridge).with_router(),
    ];
    for spec in specs {
        let lab = Lab::build(&spec).unwrap();
        for protocol in Protocol::ALL {
            for address in lab.pods[1].host.addresses.clone() {
                let question = Question::new(&lab, protocol, 41000, SocketAddr::new(address, 5060));
                let outcome = question.ask(&lab).unwrap();
                assert_eq!(outcome.complaint(&question, &lab), None, "{protocol} to {address}");
                assert_eq!(outcome.pods(), ["alpine-2"]);
            }
        }
    }
}

#[test]
fn an_external_address_without_proxier_gets_no_answer() {
    skip_unless_root!();
    let lab = Lab::build(&LabSpec::unique()).unwrap();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Gre] {
        for external in ["10.0.0.55:6000", "[1000::55]:6000"] {
            let question =
                Question::new(&lab, protocol, 41000, external.parse().unwrap()).expecting_silence();
            let outcome = question.ask(&lab).unwrap();
            assert!(outcome.complaint(&question, &lab).is_some(), "{protocol} to {external}");
            assert!(outcome.pods().is_empty());
        }
    }
}

/// Stands in for the data plane: the same questions, asked the same way, with the kernel's own translation.
#[test]
fn the_kernels_own_translation_passes_as_right() {
    skip_unless_root!();
    let lab = Lab::build(&LabSpec::unique()).unwrap();
    let mut nft = match lab
        .node
        .namespace
        .command("nft")
        .unwrap()
        .args(["-f", "-"])
        .stdin(std::process::Stdio::piped())
        .spawn()
    {
        Ok(nft) => nft,
        Err(error) => {
            eprintln!("SKIPPED: no nft here ({error}): install nftables");
            return;
        }
    };
    std::io::Write::write_all(&mut nft.stdin.take().unwrap(), NFT.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
    // The kernel itself does not get these right: conntrack calls its own UDP-Lite invalid, and no kernel from 6.16 on
    // knows where DCCP has its checksum (which the responder finds out).
    let not_translated = [Protocol::UdpLite, Protocol::Dccp];
    for protocol in Protocol::ALL.into_iter().filter(|protocol| !not_translated.contains(protocol)) {
        for external in ["10.0.0.55:5060", "[1000::55]:5060"] {
            let question = Question::new(&lab, protocol, 41000, external.parse().unwrap());
            let outcome = question.ask(&lab).unwrap();
            assert_eq!(outcome.complaint(&question, &lab), None, "{protocol} to {external}");
            assert_eq!(outcome.pods(), ["alpine-1"]);
        }
    }
}

#[test]
fn a_capture_sees_both_directions_in_order() {
    skip_unless_root!();
    let lab = Lab::build(&LabSpec::unique()).unwrap();
    let capture = lab.client.capture().unwrap();
    let to = SocketAddr::new(lab.pods[0].host.addresses[0], 0);
    let outcome = Question::new(&lab, Protocol::Icmp, 7, to).ask(&lab).unwrap();
    outcome.answer.unwrap();
    let frames = capture.frames();
    let echoes: Vec<_> = frames
        .iter()
        .filter(|frame| frame.packet.as_ref().is_some_and(|packet| packet.echo().is_some()))
        .collect();
    assert_eq!(
        echoes.iter().map(|frame| frame.direction).collect::<Vec<_>>(),
        [Direction::Out, Direction::In]
    );
    assert!(echoes[0].time <= echoes[1].time);
    capture.clear();
    assert!(capture.packets(Direction::In).is_empty());
}

#[test]
fn nothing_is_left_of_a_lab() {
    skip_unless_root!();
    let spec = LabSpec::unique();
    let left =
        || netns::names().into_iter().filter(|name| name.starts_with(&format!("{}-", spec.prefix))).count();
    let panicked = std::thread::spawn({
        let spec = spec.clone();
        move || {
            let lab = Lab::build(&spec).unwrap();
            std::fs::create_dir_all(lab.pin_path().join("v1")).unwrap();
            panic!("as a failing test does");
        }
    });
    panicked.join().unwrap_err();
    assert_eq!(left(), 0);
    assert!(!spec.pin_path.exists());
    // A lab of the same name can be built at once, and again over one that was never removed.
    std::mem::forget(Lab::build(&spec).unwrap());
    let lab = Lab::build(&spec).unwrap();
    assert_eq!(left(), 4);
    drop(lab);
    assert_eq!(left(), 0);
}

#[test]
fn packets_with_options_reach_a_pod_too() {
    skip_unless_root!();
    let lab = Lab::build(&LabSpec::unique()).unwrap();
    let from = SocketAddr::new(lab.client.addresses[0], 42000);
    let to = SocketAddr::new(lab.pods[0].host.addresses[0], 5060);
    let at_pod = lab.pods[0].host.capture().unwrap();
    let at_client = lab.client.capture().unwrap();
    lab.client.send(&[Packet::sctp_init(from, to, 7).with_ipv4_options()]).unwrap();
    let answer = at_client.wait_for(PATIENCE, Direction::In, |packet| packet.source == to.ip());
    assert!(
        answer.is_some(),
        "the pod saw {:?} and sent {:?}",
        at_pod.packets(Direction::In),
        at_pod.packets(Direction::Out)
    );
}
