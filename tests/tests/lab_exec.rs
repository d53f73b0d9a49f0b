//! The example scripts of `to-exec` on a node, with traffic through the rules that they make.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{collections::BTreeSet, fs, net::IpAddr};

use proxier_tests::{
    exchange::Protocol,
    has_programs, manifests,
    scenario::{EDIT_TAKES_EFFECT_WITHIN, SERVICE, Scenario, externals},
    skip_unless_root,
    topology::LabSpec,
    wait,
};

const CLIENTS: u8 = 12;
/// Of each kind, and none but 6000 named by the Service. Conntrack finds the kernel's own UDP-Lite invalid.
const QUESTIONS: [(Protocol, u16); 9] = [
    (Protocol::Tcp, 6000),
    (Protocol::Tcp, 21),
    (Protocol::Tcp, 8443),
    (Protocol::Udp, 5060),
    (Protocol::Udp, 16384),
    (Protocol::Icmp, 0),
    (Protocol::Sctp, 36412),
    (Protocol::Gre, 0),
    (Protocol::Esp, 0),
];

/// A lab whose agent calls an example's script; none, with a word about it, if a program that it needs is not there.
fn start(script: &str, programs: &[&str]) -> Option<Scenario> {
    if !has_programs(programs, "jq nftables iptables") {
        return None;
    }
    let script = manifests::examples().join("callout").join(script);
    let mut scenario = Scenario::prepare(&LabSpec::unique().with_clients(CLIENTS), &[]);
    let words = ["to-exec", "--health-address", "off", "--metrics-address", "off", "--"].map(AsRef::as_ref);
    scenario.spec = scenario.spec.with_sink(&[&words[..], &[script.as_os_str()]].concat());
    scenario.start_agent();
    Some(scenario)
}

/// Asks everything, each from a port of its own from `from_port` on.
fn ask_all(scenario: &Scenario, from_port: u16) {
    for (port, (protocol, to_port)) in (from_port..).zip(QUESTIONS) {
        for external in externals() {
            let _ = scenario.ask(&scenario.question(protocol, port, external, to_port));
        }
    }
}

/// The client's addresses of the family of `external`.
fn clients(scenario: &Scenario, external: IpAddr) -> Vec<IpAddr> {
    let addresses = scenario.lab.client.addresses.iter().copied();
    addresses.filter(|address| address.is_ipv4() == external.is_ipv4()).collect()
}

/// Waits until the rules that `list` prints are as `wanted`: the script has run.
fn wait_for_rules(scenario: &Scenario, list: &[&[&str]], wanted: impl Fn(&str) -> bool) {
    let rules = || list.iter().map(|words| scenario.on_node(words[0], &words[1..])).collect::<String>();
    let found = wait::until(EDIT_TAKES_EFFECT_WITHIN, || wanted(&rules()).then_some(()));
    assert!(found.is_some(), "{}", rules());
}

/// Nothing comes of a question: no answer, no pod sees it, and it does not go on to where the node's routes lead.
fn is_dropped(scenario: &Scenario, from_port: u16) {
    for external in externals() {
        let question = scenario.question(Protocol::Udp, from_port, external, 5060).expecting_silence();
        let outcome = question.ask(&scenario.lab).unwrap();
        assert!(outcome.answer.is_err(), "{outcome:?}");
        assert_eq!(outcome.pods(), [""; 0], "{outcome:?}");
        let is_back = outcome.client_saw.iter().any(|packet| packet.ports() == Some((from_port, 5060)));
        assert!(!is_back, "{outcome:?}");
    }
}

/// What both scripts do, as long as they live. `list` prints the rules.
fn rules_come_and_go(scenario: &mut Scenario, list: &[&[&str]]) {
    ask_all(scenario, 41000);
    // A process of the node is a client as well.
    for (protocol, external) in
        [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|protocol| externals().map(|to| (protocol, to)))
    {
        let question =
            scenario.question(protocol, 41100, external, 6000).from(scenario.lab.node.address(external));
        question.ask_who(&scenario.lab.node).unwrap().unwrap_or_else(|error| panic!("{external}: {error}"));
    }

    // Scaled down, to a pod that `iptables.sh` did not choose either: new conversations go there.
    let left = scenario.pod("alpine-2");
    scenario.write_pods(&left);
    let gone = scenario.pod("alpine-1").iter().map(ToString::to_string).collect::<Vec<_>>();
    wait_for_rules(scenario, list, |rules| {
        gone.iter().all(|pod| !has_word(rules, pod))
            && left.iter().all(|pod| has_word(rules, &pod.to_string()))
    });
    ask_all(scenario, 42000);
    for external in externals() {
        for client in clients(scenario, external) {
            assert_eq!(scenario.pod_of(client, external).host, "alpine-2");
        }
    }

    // To nothing: what is for the addresses goes nowhere.
    scenario.write_pods(&[]);
    wait_for_rules(scenario, list, |rules| left.iter().all(|pod| !has_word(rules, &pod.to_string())));
    is_dropped(scenario, 43000);

    // And back, for one client address of each family.
    scenario.write_pods(&left);
    let allowed = externals().map(|external| clients(scenario, external)[0]);
    let ranges =
        allowed.map(|address| format!("  - \"{address}/{}\"\n", if address.is_ipv4() { 32 } else { 128 }));
    let service = manifests::service(SERVICE, &externals());
    let ranges = ranges.concat();
    // Ranges that overlap.
    let service = format!("{service}  loadBalancerSourceRanges:\n{ranges}{ranges}  - \"192.168.1.100/31\"\n");
    scenario.write("service.yaml", &service);
    // The script is called once a family.
    let [_, allowed_v6] = allowed.map(|address| address.to_string());
    wait_for_rules(scenario, list, |rules| {
        rules.contains("192.168.1.100/31")
            && has_word(rules, &allowed_v6)
            && left.iter().all(|pod| has_word(rules, &pod.to_string()))
    });
    ask_all(scenario, 44000);
    for external in externals() {
        let addresses = clients(scenario, external);
        assert_eq!(scenario.pod_of(addresses[0], external).host, "alpine-2");
        let question =
            scenario.question(Protocol::Udp, 0, external, 5060).from(addresses[2]).expecting_silence();
        question.ask_who(&scenario.lab.client).unwrap().unwrap_err();
    }

    // The agent ends: what has been set up goes on.
    scenario.stop_agent();
    ask_all(scenario, 45000);
    scenario.start_agent();
    fs::remove_file(scenario.path("service.yaml")).unwrap();
    let externals = externals().map(|external| external.to_string());
    wait_for_rules(scenario, list, |rules| externals.iter().all(|external| !has_word(rules, external)));
}

/// Whether `rules` has `word`, not only within a longer one: 11.0.2.2 is no part of 11.0.2.20.
fn has_word(rules: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_ascii_hexdigit() || c == '.' || c == ':';
    rules.split(|c| !is_part(c)).any(|found| found == word)
}

#[test]
fn the_script_for_nftables_delivers_everything_and_takes_away_what_has_gone() {
    skip_unless_root!();
    let Some(mut scenario) = start("nft.sh", &["jq", "nft"]) else { return };
    // Several pods share the clients, each of which is on its pod whatever it speaks.
    for external in externals() {
        let mut pods = BTreeSet::new();
        for client in clients(&scenario, external) {
            let pod = scenario.pod_of(client, external).host;
            let question = scenario.question(Protocol::Tcp, 0, external, 22).from(client);
            assert_eq!(question.ask_who(&scenario.lab.client).unwrap().unwrap().host, pod);
            pods.insert(pod);
        }
        assert_eq!(pods.len(), 2, "{external}: {pods:?}");
    }
    rules_come_and_go(&mut scenario, &[&["nft", "list", "table", "inet", "proxier_callout"]]);
}

#[test]
fn the_script_for_iptables_delivers_everything_and_takes_away_what_has_gone() {
    skip_unless_root!();
    let Some(mut scenario) = start("iptables.sh", &["jq", "iptables"]) else { return };
    rules_come_and_go(&mut scenario, &[&["iptables-save"], &["ip6tables-save"]]);
    // Started again and again, and still one jump each.
    let rules = scenario.on_node("iptables-save", &[]);
    assert_eq!(
        rules.matches("-A PREROUTING -j PROXIER").count(),
        2,
        "of the tables mangle and nat:\n{rules}"
    );
    assert_eq!(rules.matches("-A OUTPUT -j PROXIER").count(), 2, "{rules}");
}
