//! What the agent's programs cost a packet, by the kernel's own count (`kernel.bpf_stats_enabled`). Counting costs as well, so
//! nothing else is measured meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use aya::{
    maps::MapInfo,
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use serde::{Deserialize, Serialize};

use super::{figure::Measure, ground::Ground};

/// A program under a kind of traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// Which traffic.
    pub traffic: String,
    /// The program's name.
    pub program: String,
    /// How often it ran.
    pub runs: u64,
    /// Nanoseconds a run.
    pub nanoseconds: f64,
}

/// How long each program of an agent has run, and how often.
type Counts = BTreeMap<String, (Duration, u64)>;

/// What every program of this arm's agent costs, by traffic; nothing if it has none.
///
/// # Errors
///
/// No privilege, or the traffic does not arrive.
pub fn of(ground: &Ground, burst: Duration) -> anyhow::Result<Vec<Cost>> {
    let Some(pins) = ground.pins() else { return Ok(Vec::new()) };
    let maps = maps_in(&pins)?;
    // For as long as this is open, and not a moment longer, however this process ends.
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not count what programs cost")?;
    let mut costs = Vec::new();
    for measure in [Measure::Datagrams, Measure::RoundTrips, Measure::Connections] {
        let before = counts(&maps);
        ground.take(measure, burst.min(Duration::from_millis(500)))?;
        costs.extend(between(measure.name(), &before, &counts(&maps)));
    }
    Ok(costs)
}

/// The numbers of the maps that are pinned in `directory`.
fn maps_in(directory: &Path) -> anyhow::Result<BTreeSet<u32>> {
    let context = || format!("the pinned maps in {}", directory.display());
    let mut maps = BTreeSet::new();
    for entry in std::fs::read_dir(directory).with_context(context)? {
        // Links are pinned beside maps.
        maps.extend(MapInfo::from_pin(entry.with_context(context)?.path()).ok().map(|map| map.id()));
    }
    anyhow::ensure!(!maps.is_empty(), "no maps in {}", directory.display());
    Ok(maps)
}

/// Of all programs that use one of these maps: other agents on this machine have other maps.
fn counts(maps: &BTreeSet<u32>) -> Counts {
    let mut counts = Counts::new();
    // One that is gone when it is asked for was somebody else's.
    for program in loaded_programs().flatten() {
        let used = program.map_ids().ok().flatten().unwrap_or_default();
        if used.iter().any(|id| maps.contains(id)) {
            let count = counts.entry(program.name_as_str().unwrap_or("unnamed").to_owned()).or_default();
            count.0 += program.run_time();
            count.1 += program.run_count();
        }
    }
    counts
}

fn between(traffic: &str, before: &Counts, after: &Counts) -> Vec<Cost> {
    let cost = |(program, (time, runs)): (&String, &(Duration, u64))| {
        let (time_before, runs_before) = before.get(program).copied().unwrap_or_default();
        let runs = runs.checked_sub(runs_before).filter(|runs| *runs > 0)?;
        let nanoseconds = time.saturating_sub(time_before).as_nanos() as f64 / runs as f64;
        Some(Cost { traffic: traffic.to_owned(), program: program.clone(), runs, nanoseconds })
    };
    after.iter().filter_map(cost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ran_meanwhile_counts() {
        let counts = |list: &[(&str, u64, u64)]| -> Counts {
            list.iter()
                .map(|(name, time, runs)| ((*name).to_owned(), (Duration::from_nanos(*time), *runs)))
                .collect()
        };
        let before = counts(&[("request", 1_000, 10), ("idle", 500, 5)]);
        let after = counts(&[("request", 4_000, 30), ("idle", 500, 5), ("new", 80, 2)]);
        let costs = between("datagrams", &before, &after);
        let found: Vec<_> =
            costs.iter().map(|cost| (cost.program.as_str(), cost.runs, cost.nanoseconds)).collect();
        assert_eq!(found, [("new", 2, 40.0), ("request", 20, 150.0)]);
    }
}
