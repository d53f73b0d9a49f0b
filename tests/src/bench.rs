//! The data plane, measured: the same traffic between a client and a pod by several ways, of which proxier is one. Run by
//! `cargo xtask bench data`, which also shows the figures; what they mean is in `docs/BENCHMARKS.md`.
//!
//! Every way ([`arm::Arm`]) has a lab of its own, all of them built before the first measurement ([`ground::Ground`]). A round
//! takes each figure of every arm once, one after the other, so that what happens to the machine meanwhile happens to all. Not
//! for judging: what a figure has to be is nobody's business here.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use proxier_common::MAX_SERVICES;
use serde::{Deserialize, Serialize};

pub mod arm;
pub mod cost;
pub mod figure;
pub mod ground;
pub mod load;
pub mod micro;
pub mod rules;
pub mod statistics;

use crate::wait;
use arm::{Arm, Capabilities, Kind};
use figure::{Figure, Sample};
use ground::Ground;
use load::Cpus;

/// The map `services` has pods' own addresses beside external ones; a few places are kept for them.
pub const MAX_ADDRESSES: u32 = MAX_SERVICES - 1024;

/// What to measure, and for how long.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// How many times every figure of every arm is taken.
    pub rounds: u32,
    /// How long a figure's traffic lasts, but for TCP throughput, which takes whole seconds.
    pub burst_ms: u64,
    /// Numbers of external addresses, for the arms that keep them in a table.
    pub addresses: Vec<u32>,
    /// Which kinds of arms; all if empty.
    pub kinds: Vec<Kind>,
    /// How many Services `iptables-10k` really has.
    pub services: u32,
    /// How many runs of a program one figure of the microbenchmark is made of; none: there is no microbenchmark.
    pub program_runs: u32,
    /// Where the report goes.
    pub output: Option<PathBuf>,
}

impl Plan {
    /// What makes a figure worth quoting.
    #[must_use]
    pub fn full() -> Self {
        Self {
            rounds: 10,
            burst_ms: 1000,
            addresses: vec![1, 1_000, 10_000, 100_000],
            kinds: Vec::new(),
            services: 10_000,
            program_runs: 20_000,
            output: None,
        }
    }

    /// What shows within two minutes whether a change was worth it.
    #[must_use]
    pub fn quick() -> Self {
        Self { rounds: 3, burst_ms: 400, addresses: vec![1], program_runs: 5_000, ..Self::full() }
    }

    /// How long a burst is.
    #[must_use]
    pub fn burst(&self) -> Duration {
        Duration::from_millis(self.burst_ms)
    }

    /// Whether the numbers can be used.
    ///
    /// # Errors
    ///
    /// Says which cannot, and what is allowed.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.rounds > 0, "no rounds, no figures: --rounds takes 1 or more");
        ensure!(
            (50..=60_000).contains(&self.burst_ms),
            "a burst takes 50 to 60,000 ms, not {}",
            self.burst_ms
        );
        for addresses in &self.addresses {
            ensure!(
                (1..=MAX_ADDRESSES).contains(addresses),
                "--addresses {addresses}: 1 to {MAX_ADDRESSES} fit (the map `services` has {MAX_SERVICES} entries, \
                 some of which are for pods)"
            );
        }
        Ok(())
    }
}

/// The machine that the figures are of.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Its kernel's release.
    pub kernel: String,
    /// What its first CPU calls itself.
    pub processor: String,
    /// How many CPUs this process may use.
    pub cpus: usize,
    /// Where client and pod were.
    pub pinned: Cpus,
    /// How many percent of its CPUs' time others had in the second before. Not the load average, which remembers the compiler.
    pub busy_percent: f64,
}

impl Machine {
    fn this(pinned: Cpus) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let before = read("/proc/stat");
        std::thread::sleep(Duration::from_secs(1));
        let processors = read("/proc/cpuinfo");
        let name = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            pinned,
            busy_percent: busy_percent(&before, &read("/proc/stat")),
        }
    }
}

/// How busy the CPUs were between two readings of `/proc/stat`. What a hypervisor has taken away counts as busy.
fn busy_percent(before: &str, after: &str) -> f64 {
    // All of it, and of that what was idle or waited for a disk: fields 4 and 5.
    let times = |stat: &str| -> (u64, u64) {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "));
        let fields = line.unwrap_or_default().split_whitespace().map(|field| field.parse().unwrap_or(0));
        // Guests' time, in fields 9 and 10, is in the first two as well.
        let fields: Vec<u64> = fields.take(8).collect();
        (fields.iter().sum(), fields.iter().skip(3).take(2).sum())
    };
    let ((all_before, idle_before), (all, idle)) = (times(before), times(after));
    let (all, idle) = (all.saturating_sub(all_before), idle.saturating_sub(idle_before));
    if all == 0 { 0.0 } else { 100.0 * all.saturating_sub(idle) as f64 / all as f64 }
}

/// An arm of a report.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// The arm's name.
    pub arm: String,
    /// Its figures, in the order of the rounds.
    pub figures: BTreeMap<Figure, Vec<f64>>,
    /// What its BPF programs cost, a kind of traffic each; empty for arms without.
    pub costs: Vec<cost::Cost>,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// What was asked for.
    pub plan: Plan,
    /// Arms that were asked for and cannot be, with the reason.
    pub left_out: Vec<String>,
    /// The arms, in order.
    pub rows: Vec<Row>,
    /// Single programs, attached to nothing.
    pub programs: Vec<micro::Timing>,
    /// How long it all took.
    pub seconds: u64,
}

impl Report {
    /// The figures of the arm that the others are compared with.
    #[must_use]
    pub fn reference(&self, figure: Figure) -> Option<&[f64]> {
        let row = self.rows.iter().find(|row| row.arm == Kind::Route.name())?;
        row.figures.get(&figure).map(Vec::as_slice)
    }
}

/// Builds all arms, takes all figures, and tells `progress` what is going on.
///
/// # Errors
///
/// Something that is needed is not there, or an arm's traffic does not go the arm's way.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    plan.check()?;
    crate::need_root()?;
    wait::stop_on_signals()?;
    let began = Instant::now();
    let cpus = Cpus::choose()?;
    let machine = Machine::this(cpus);
    let agent = crate::agent::binary()?;
    let (arms, left_out) = arms_of(plan, &agent)?;
    let mut grounds = Vec::new();
    for arm in arms {
        progress(&format!("preparing {arm}: {}", arm.kind.description()));
        let ground = Ground::build(arm, plan.services, &agent, cpus).with_context(|| format!("arm {arm}"))?;
        ground.verify().with_context(|| format!("arm {arm}: its traffic does not go the way it should"))?;
        grounds.push(ground);
    }
    let mut rows: Vec<Row> = grounds
        .iter()
        .map(|ground| Row { arm: ground.arm.to_string(), figures: BTreeMap::new(), costs: Vec::new() })
        .collect();
    for round in 0..plan.rounds {
        progress(&format!("round {} of {}", round + 1, plan.rounds));
        take_round(round as usize, &grounds, &mut rows, plan)?;
    }
    for (ground, row) in grounds.iter().zip(&mut rows) {
        row.costs = cost::of(ground, plan.burst())?;
    }
    drop(grounds);
    let programs = if plan.program_runs > 0 {
        progress("single programs, by BPF_PROG_TEST_RUN");
        micro::run(plan.program_runs)?
    } else {
        Vec::new()
    };
    Ok(Report { machine, plan: plan.clone(), left_out, rows, programs, seconds: began.elapsed().as_secs() })
}

/// Takes every figure of every arm once. Figures are the outer loop: what is divided by one another later was measured within
/// seconds. Each round begins with another arm, so that none always comes after the same one.
fn take_round(round: usize, grounds: &[Ground], rows: &mut [Row], plan: &Plan) -> anyhow::Result<()> {
    for measure in figure::Measure::ALL {
        for index in 0..grounds.len() {
            if wait::interrupted() {
                bail!("interrupted");
            }
            let index = (index + round) % grounds.len();
            let (ground, row) = (&grounds[index], &mut rows[index]);
            let samples = ground
                .take(measure, plan.burst())
                .with_context(|| format!("arm {}, {}", row.arm, measure.name()))?;
            for Sample { figure, value } in samples {
                row.figures.entry(figure).or_default().push(value);
            }
        }
    }
    Ok(())
}

/// These kinds and the one that all others are compared with. None means all.
#[must_use]
pub fn with_reference(mut kinds: Vec<Kind>) -> Vec<Kind> {
    if !kinds.is_empty() && !kinds.contains(&Kind::Route) {
        kinds.push(Kind::Route);
    }
    kinds
}

/// The arms of a plan, and those that `agent` cannot be yet, with the reason.
///
/// # Errors
///
/// The agent does not run, or cannot be an arm that the plan names.
pub fn arms_of(plan: &Plan, agent: &Path) -> anyhow::Result<(Vec<Arm>, Vec<String>)> {
    arm::plan(&plan.kinds, &plan.addresses, &Capabilities::of(agent)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_does_not_fit_the_maps_says_what_does() {
        let plan = Plan { addresses: vec![1, 200_000], ..Plan::quick() };
        let error = plan.check().unwrap_err().to_string();
        assert!(error.contains("200000") && error.contains(&MAX_ADDRESSES.to_string()), "{error}");
        Plan::full().check().unwrap();
        Plan { rounds: 0, ..Plan::quick() }.check().unwrap_err();
        Plan { burst_ms: 1, ..Plan::quick() }.check().unwrap_err();
    }

    #[test]
    fn what_is_neither_idle_nor_waiting_is_busy() {
        let before = "cpu  100 0 50 1000 20 0 0 5 90 0\ncpu0 1 2 3 4\n";
        let after = "cpu  110 0 55 1060 30 0 0 20 95 0\ncpu0 9 9 9 9\n";
        // 10 + 5 + 15 taken away, of 100.
        assert_eq!(busy_percent(before, after), 30.0);
        assert_eq!(busy_percent(before, before), 0.0);
        assert_eq!(busy_percent("", ""), 0.0);
    }

    #[test]
    fn the_reference_is_always_measured() {
        assert_eq!(with_reference(vec![Kind::Nft]), [Kind::Nft, Kind::Route]);
        assert_eq!(with_reference(vec![Kind::Route]), [Kind::Route]);
        assert!(with_reference(Vec::new()).is_empty(), "which means all");
    }

    #[test]
    fn a_plan_survives_its_way_to_the_benchmark() {
        let plan = Plan { kinds: vec![Kind::Iptables10k, Kind::ProxierStack], ..Plan::full() };
        let text = serde_json::to_string(&plan).unwrap();
        let read: Plan = serde_json::from_str(&text).unwrap();
        assert_eq!(read.kinds, plan.kinds);
        assert_eq!(read.addresses, plan.addresses);
    }
}
