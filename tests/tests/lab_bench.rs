//! The benchmark itself: every arm is measured once, for a moment, and its traffic goes the arm's way. What the figures are
//! means nothing here.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use proxier_tests::{
    agent,
    bench::{
        self, Plan,
        arm::{Arm, Kind},
        cost::{self, Cost},
        figure::{Figure, Measure},
        ground::{Ground, Way},
        load::Cpus,
        micro,
    },
    skip_unless_root,
};

const BURST: Duration = Duration::from_millis(100);
/// As long as kube-proxy's list has more than one, the last one is behind others; 10,000 take iptables seconds.
const SERVICES: u32 = 50;

/// Traffic keeps two CPUs busy, and who gets none for as long as a burst lasts has no figures: the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn build(arm: Arm) -> Ground {
    let cpus = Cpus::choose().unwrap();
    Ground::build(arm, SERVICES, &agent::binary().unwrap(), cpus).unwrap_or_else(|e| panic!("{arm}: {e:#}"))
}

#[test]
fn every_arm_gives_every_figure_and_its_traffic_goes_the_arms_way() {
    skip_unless_root!();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let plan = Plan { addresses: vec![1, 1_000], ..Plan::quick() };
    let (arms, left_out) = bench::arms_of(&plan, &agent::binary().unwrap()).unwrap();
    let names: Vec<String> = arms.iter().map(ToString::to_string).collect();
    let expected = [
        "wire",
        "route",
        "route-again",
        "route-tracked",
        "iptables",
        "nft",
        "nft@1k",
        "nft-stateless",
        "nft-stateless@1k",
        "iptables-10k",
        "proxier-stack",
        "proxier-stack@1k",
        "proxier-direct",
        "proxier-direct@1k",
        "proxier-xdp",
        "proxier-xdp@1k",
    ];
    assert_eq!(names, expected);
    assert_eq!(left_out, [""; 0]);
    let flood = Mutex::new(());
    std::thread::scope(|scope| {
        for arm in arms {
            let flood = &flood;
            // An arm's programs end with the thread that has built it.
            scope.spawn(move || {
                let ground = build(arm);
                assert_eq!(ground.way().unwrap(), Way::of(arm.kind), "{arm}");
                // It takes a second, and shares a CPU as any program does.
                let mut figures = take(&ground, Measure::Throughput);
                // These do not: a flood is the kernel's work, and who waits for a byte never sleeps.
                let _alone = flood.lock().unwrap_or_else(PoisonError::into_inner);
                for measure in [Measure::Datagrams, Measure::Connections, Measure::RoundTrips] {
                    figures.extend(take(&ground, measure));
                }
                assert!(Figure::COMPARED.iter().all(|figure| figures.contains(figure)), "{arm}: {figures:?}");
            });
        }
    });
}

/// Takes a measure and checks what can be said of its figures on any machine.
fn take(ground: &Ground, measure: Measure) -> Vec<Figure> {
    // On a machine that does more than this, nobody may have had a turn.
    let samples = ground.take(measure, BURST).or_else(|_| ground.take(measure, BURST * 20));
    let samples = samples.unwrap_or_else(|error| panic!("{}: {error:#}", ground.arm));
    let figures = samples.into_iter().map(|sample| {
        let valid = sample.value > 0.0 || sample.figure == Figure::UdpLostPercent;
        assert!(valid && sample.value.is_finite(), "{}: {sample:?}", ground.arm);
        sample.figure
    });
    figures.collect()
}

#[test]
fn what_the_agents_programs_cost_is_counted_by_direction() {
    skip_unless_root!();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = build(Arm { kind: Kind::ProxierStack, addresses: 1 });
    let is_wanted = |cost: &Cost, (traffic, program): (&str, &str)| {
        cost.traffic == traffic
            && cost.program == program
            && cost.runs > 10
            && (1.0..1_000_000.0).contains(&cost.nanoseconds)
    };
    let has_all = |costs: &[Cost]| {
        [
            ("datagrams", "proxier_request"),
            ("round trips", "proxier_request"),
            ("round trips", "proxier_reply"),
            ("connections", "proxier_reply"),
        ]
        .into_iter()
        .all(|wanted| costs.iter().any(|cost| is_wanted(cost, wanted)))
    };
    // On a machine that does more than this, nobody may have had a turn.
    let costs = cost::of(&ground, BURST).ok().filter(|costs| has_all(costs));
    let costs = costs.unwrap_or_else(|| cost::of(&ground, BURST * 5).unwrap());
    assert!(has_all(&costs), "{costs:?}");
}

#[test]
fn an_arm_whose_rules_are_gone_is_noticed() {
    skip_unless_root!();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = build(Arm { kind: Kind::Nft, addresses: 1 });
    ground.verify().unwrap();
    let flushed = ground.node().unwrap().command("nft").unwrap().args(["flush", "ruleset"]).status().unwrap();
    assert!(flushed.success());
    ground.verify().unwrap_err();
}

#[test]
fn every_kind_of_packet_is_timed_beside_the_floor() {
    skip_unless_root!();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let timings = micro::run(50).unwrap();
    let timing = |name: &str| timings.iter().find(|timing| timing.case == name).unwrap();
    for timing in &timings {
        assert!(timing.single > 0.0, "{timing:?}");
    }
    // What leaves its packet alone is repeated in the kernel.
    for name in ["nothing", "one look-up", "miss", "pod's own packet"] {
        assert!(timing(name).repeated.is_some_and(|nanoseconds| nanoseconds > 0.0), "{timings:?}");
    }
    // The numbers that a packet may cost: docs/BENCHMARKS.md.
    for (name, most) in [
        ("miss", 1),
        ("request, UDP", 3),
        ("request, TCP", 3),
        ("request, UDP, direct", 3),
        ("reply, UDP", 2),
        ("reply, TCP", 2),
        ("reply, UDP, direct", 2),
    ] {
        assert!(timing(name).lookups.is_some_and(|lookups| lookups <= most), "{timings:?}");
    }
    assert!(timings.len() >= 14);
}
