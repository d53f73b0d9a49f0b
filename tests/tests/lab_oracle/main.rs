//! The oracle: Linux's own NAT. Two nodes alike, but that one has nftables' DNAT with connection tracking and the other
//! proxier; the same packets go through both, and what the pod receives and what the client gets back must be the same,
//! byte for byte. What may differ is in `meant`.
//!
//! `PROXIER_ORACLE_SEED` and `PROXIER_ORACLE_SCRIPTS` choose other packets than the usual, and more of them.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths of packets, which fit 16 bits, and bytes of words"
)]

mod compare;
mod frame;
mod generator;
mod meant;
mod model;
mod packet;
mod picked;
mod play;
mod script;
mod world;

use std::{cell::RefCell, env, str::FromStr};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proptest::test_runner::{Config, FileFailurePersistence, RngSeed, TestCaseError, TestRunner};
use proxier_tests::{report, skip_unless_root, topology::LabSpec};

use self::{compare::Tally, meant::MEANT, play::Stage, script::Script, world::World};

const SEED: u64 = 20_261_122;
/// For each of the two ways in which links can be set up.
const SCRIPTS: u32 = 2_500;
/// Seeds of failures, which are played again first.
const REGRESSIONS: &str = "tests/lab_oracle/regressions.txt";

fn number<T: FromStr>(variable: &str, usual: T) -> T {
    let parse = |text: String| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number"));
    env::var(variable).map_or(usual, parse)
}

/// Keeps this thread on one CPU: on two, packets would overtake each other between the veths' queues.
fn stay_on_one_cpu() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let cpu = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(cpu).unwrap();
    sched_setaffinity(this, &one).unwrap();
}

fn stage(offloads: bool) -> Stage {
    let spec = || {
        let mut spec = LabSpec::unique();
        spec.pods.truncate(1);
        if offloads { spec } else { spec.without_offloads() }
    };
    let stage = Stage::new(World::netfilter(&spec()).unwrap(), World::proxier(&spec()).unwrap());
    stay_on_one_cpu();
    stage
}

fn runner(seed: u64, scripts: u32) -> TestRunner {
    TestRunner::new(Config {
        cases: scripts,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        max_shrink_iters: 2_000,
        ..Config::default()
    })
}

#[test]
fn netfilter_and_proxier_do_the_same_to_every_packet() {
    skip_unless_root!();
    let (seed, scripts) = (number("PROXIER_ORACLE_SEED", SEED), number("PROXIER_ORACLE_SCRIPTS", SCRIPTS));
    println!("PROXIER_ORACLE_SEED={seed} PROXIER_ORACLE_SCRIPTS={scripts}");
    let mut tally = Tally::default();
    let mut differences = Vec::new();
    for (offloads, seed) in [(true, seed), (false, seed.wrapping_add(1))] {
        let mut stage = stage(offloads);
        for (name, script) in picked::scripts() {
            if let Err(difference) = stage.play(&script) {
                differences.push(format!("{name}, offloads {offloads}: {difference}"));
            }
        }
        let stage = RefCell::new(stage);
        let play = |script: Script| {
            stage.borrow_mut().play(&script).map_err(|difference| TestCaseError::fail(difference.to_string()))
        };
        if let Err(error) = runner(seed, scripts).run(&generator::scripts(), play) {
            differences.push(format!("offloads {offloads}, seed {seed}: {error}"));
        }
        tally.add(&stage.into_inner().tally);
    }
    let Tally { packets, sent, silent, meant } = &tally;
    println!("{sent} frames sent, {silent} times nothing came out, meant: {meant:#?}");
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n\n"));
    for entry in MEANT {
        // One that does not show any more is one that nobody has looked at for a while.
        assert!(meant.contains_key(entry.name), "no difference is \"{}\": {}", entry.name, entry.reason);
    }
    let corrected: u64 = meant.values().sum();
    report::line("oracle", &format!("{packets} packets compared, 0 differences")).unwrap();
    let note = format!(
        "{sent} frames sent (seed {seed}), {silent} times nothing came out in both worlds, {corrected} times one of {} \
         differences that are meant",
        meant.len()
    );
    report::line("oracle", &note).unwrap();
}
