//! Delivery past the node's stack: every protocol with its offloads, and nothing of it in the node's connection tracking.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{io::Write as _, path::Path, process::Stdio};

use aya::maps::{HashMap, Map, MapData};
use proxier_common::{POD_HAS_PEER, PodKey, PodValue, SCHEMA};
use proxier_tests::{
    exchange::Protocol,
    responder::Sighting,
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::LabSpec,
};

const PORT: u16 = 5060;

/// What a node may have that sees no conversation of a pod's that is delivered directly: it lets none through, and masquerades
/// what pods send.
const NO_FORWARDING: &str = "
table inet node {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state invalid counter drop
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname uplink0 ip saddr 11.0.0.0/8 masquerade
    oifname uplink0 ip6 saddr 1100::/16 masquerade
  }
}
";

/// Says which link leads to each pod, in place of the agent.
fn link_pods(scenario: &Scenario, pin_path: &Path, flags: u32) {
    let path = pin_path.join(format!("v{SCHEMA}")).join("pods");
    let map = Map::HashMap(MapData::from_pin(path).unwrap());
    let mut pods: HashMap<_, PodKey, PodValue> = HashMap::try_from(map).unwrap();
    for (index, pod) in (1..).zip(&scenario.lab.pods) {
        let line = scenario.on_node("ip", &["-o", "link", "show", &format!("pod{index}")]);
        let interface: u32 = line.split(':').next().unwrap().trim().parse().unwrap();
        for address in &pod.host.addresses {
            let key = PodKey { pod: (*address).into() };
            let value = pods.get(&key, 0).unwrap();
            pods.insert(key, PodValue { interface, flags: value.flags | flags, ..value }, 0).unwrap();
        }
    }
}

fn every_protocol_is_delivered(flags: u32) {
    let spec = LabSpec::unique();
    let scenario = Scenario::start(&spec, &["--delivery", "direct"]);
    link_pods(&scenario, &spec.pin_path, flags);
    let mut nft = scenario.lab.node.namespace.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(NO_FORWARDING.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
    for (from_port, protocol) in (41000..).zip(Protocol::ALL) {
        for external in externals() {
            let question = scenario.question(protocol, from_port, external, PORT);
            let outcome = scenario.ask(&question);
            if let Some(sighting) = outcome.answer.ok().and_then(|bytes| Sighting::in_answer(&bytes)) {
                assert_eq!(sighting.peer.ip(), question.from.ip());
                assert_eq!(sighting.local.ip(), scenario.lab.pod(&sighting.host).host.address(external));
            }
        }
    }
}

#[test]
fn every_protocol_passes_by_a_firewall_that_lets_nothing_through_into_the_pods_end() {
    skip_unless_root!();
    every_protocol_is_delivered(POD_HAS_PEER);
}

#[test]
fn every_protocol_passes_by_a_firewall_that_lets_nothing_through_by_the_link() {
    skip_unless_root!();
    every_protocol_is_delivered(0);
}
