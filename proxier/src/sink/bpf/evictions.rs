//! How many flows the full table has given up for new ones. The kernel does not tell, so they are worked out: what was
//! inserted, and neither ended nor removed, and is not there any more, was evicted.
//!
//! Packets come while the table is counted. What is told is what must have been evicted at least; the rest follows with the
//! next count. Flows that went while no agent ran are left out.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use proxier_common::Statistic;

use super::tables::{Counters, TableError, Tables};

/// Between two warnings.
const AGAIN: Duration = Duration::from_secs(60);

/// Counts evictions from now on, in `stats` and in the log.
pub(super) struct Evictions {
    stats: Counters,
    tally: Tally,
    /// What `stats` said at the start.
    earlier: u64,
    warning: Warning,
}

impl Evictions {
    /// Begins to count.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn new(stats: Counters, tables: &Tables) -> Result<Self, TableError> {
        let earlier = stats.total(Statistic::FlowEvicted as u32)?;
        let (_, max_entries) = tables.flows.name_and_size();
        let tally = Tally::new(nearly_full(max_entries, stats.cpus()), &census(&stats, tables)?);
        Ok(Self { stats, tally, earlier, warning: Warning::default() })
    }

    /// Counts those since the last time.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn update(&mut self, tables: &Tables) -> Result<(), TableError> {
        let before = self.tally.evicted;
        self.tally.update(&census(&self.stats, tables)?);
        if self.tally.evicted > before {
            self.stats.set(Statistic::FlowEvicted as u32, self.earlier + self.tally.evicted)?;
        }
        if let Some(evicted) = self.warning.due(Instant::now(), self.tally.evicted) {
            let (map, max_entries) = tables.flows.name_and_size();
            tracing::warn!(
                map,
                max_entries,
                evicted,
                "the map `{map}` is full at {max_entries} entries: {evicted} conversations were given up for new ones, and \
                 what pods send in these may leave with the pod's address; see whose they are with `proxier get flows`, then \
                 give busy Services more nodes, or keep a flood out with loadBalancerSourceRanges"
            );
        }
        Ok(())
    }
}

/// How many entries make evictions possible. Each CPU keeps up to 128 free ones to itself, and a few that it has only just
/// filled; where nothing is evicted that number is never reached, so it need not be exact.
fn nearly_full(max_entries: u32, cpus: usize) -> u64 {
    let size = u64::from(max_entries);
    size - size.min((size / 10).max(256 * cpus as u64))
}

/// Flows that came and went, since the maps were made or the agent was started.
#[derive(Clone, Copy, Debug, Default)]
struct Movement {
    inserted: u64,
    /// By packets.
    forgotten: u64,
    /// By the agent.
    removed: u64,
}

impl Movement {
    /// The order matters to [`Census`]: what comes before what goes.
    fn read(stats: &Counters, tables: &Tables) -> Result<Self, TableError> {
        Ok(Self {
            inserted: stats.total(Statistic::FlowInserted as u32)?,
            forgotten: stats.total(Statistic::FlowForgotten as u32)?,
            removed: tables.flows.removed.load(Ordering::SeqCst),
        })
    }

    const fn gone(&self) -> u64 {
        self.forgotten + self.removed
    }
}

/// The table counted, and what had moved before and after that.
#[derive(Clone, Copy, Debug)]
struct Census {
    before: Movement,
    present: u64,
    after: Movement,
}

fn census(stats: &Counters, tables: &Tables) -> Result<Census, TableError> {
    let before = Movement::read(stats, tables)?;
    let present = tables.flows.count()?;
    Ok(Census { before, present, after: Movement::read(stats, tables)? })
}

impl Census {
    /// How many flows are missing at least: what came while the table was counted may be none of those in it, and what went
    /// may be.
    fn missing_at_least(&self) -> u64 {
        self.before.inserted.saturating_sub(self.after.gone() + self.present)
    }

    /// How many at most: the other way round.
    fn missing_at_most(&self) -> u64 {
        self.after.inserted.saturating_sub(self.before.gone() + self.present)
    }
}

/// The sum.
#[derive(Clone, Copy, Debug)]
struct Tally {
    nearly_full: u64,
    /// Flows that are missing for another reason: they went before the start, or somebody has taken them out by hand.
    unexplained: u64,
    evicted: u64,
    last: Census,
}

impl Tally {
    fn new(nearly_full: u64, start: &Census) -> Self {
        Self { nearly_full, unexplained: start.missing_at_most(), evicted: 0, last: *start }
    }

    fn update(&mut self, census: &Census) {
        // Nothing is evicted from a table that cannot have been full at any time since the last count.
        let most = self.last.present + census.after.inserted.saturating_sub(self.last.before.inserted);
        let missing = census.missing_at_least().saturating_sub(self.unexplained);
        if most >= self.nearly_full {
            self.evicted = self.evicted.max(missing);
        } else {
            self.unexplained += missing.saturating_sub(self.evicted);
        }
        self.last = *census;
    }
}

/// When to warn: the first time, then once a minute as long as it goes on.
#[derive(Clone, Copy, Debug, Default)]
struct Warning {
    told: u64,
    told_at: Option<Instant>,
}

impl Warning {
    /// How many to tell of now, of `evicted` so far.
    fn due(&mut self, now: Instant, evicted: u64) -> Option<u64> {
        let rests = self.told_at.is_some_and(|told_at| now.saturating_duration_since(told_at) < AGAIN);
        if rests || evicted <= self.told {
            return None;
        }
        let news = evicted - self.told;
        (self.told, self.told_at) = (evicted, Some(now));
        Some(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1000;

    /// A table of which all is known.
    #[derive(Clone, Copy, Default)]
    struct Table {
        moved: Movement,
        evicted: u64,
    }

    impl Table {
        fn present(&self) -> u64 {
            self.moved.inserted - self.moved.gone() - self.evicted
        }

        fn insert(&mut self, flows: u64) {
            self.moved.inserted += flows;
            self.evicted += self.present().saturating_sub(SIZE);
        }

        /// Counted while nothing moves.
        fn census(&self) -> Census {
            Census { before: self.moved, present: self.present(), after: self.moved }
        }
    }

    #[test]
    fn what_is_missing_from_a_full_table_was_evicted() {
        let mut table = Table::default();
        table.insert(100);
        let mut tally = Tally::new(900, &table.census());
        for (inserted, forgotten, removed, evicted) in
            [(500, 10, 10, 0), (420, 0, 0, 0), (50, 0, 0, 50), (300, 0, 100, 250), (0, 500, 400, 250)]
        {
            table.moved.removed += removed;
            table.moved.forgotten += forgotten;
            table.insert(inserted);
            tally.update(&table.census());
            assert_eq!((tally.evicted, table.evicted), (evicted, evicted), "{inserted} inserted");
        }
    }

    #[test]
    fn a_table_that_was_full_only_between_two_counts_is_no_secret() {
        let mut table = Table::default();
        let mut tally = Tally::new(900, &table.census());
        table.insert(1500);
        table.moved.removed += 1000;
        tally.update(&table.census());
        assert_eq!((tally.evicted, table.present()), (500, 0));
    }

    #[test]
    fn no_more_is_told_than_was_evicted_whatever_moves_while_the_table_is_counted() {
        // Of 300 flows that come in between, the count sees none or all; of 200 that go, likewise.
        let before = Movement { inserted: 2000, forgotten: 50, removed: 50 };
        let after = Movement { inserted: 2300, forgotten: 150, removed: 150 };
        let first = Movement::default();
        for (present, evicted) in [(1000, 900), (1000, 1000), (800, 1100), (990, 910)] {
            let mut tally = Tally::new(900, &Census { before: first, present: 0, after: first });
            tally.update(&Census { before, present, after });
            assert!(tally.evicted <= evicted, "{} told, {evicted} evicted", tally.evicted);
            // Once it is quiet, all are told, and never fewer than before.
            let told = tally.evicted;
            let quiet = after.inserted - after.gone() - 1100;
            tally.update(&Census { before: after, present: quiet, after });
            assert!(tally.evicted == 1100 && told <= 1100);
        }
    }

    #[test]
    fn what_moves_during_the_first_count_is_not_told_as_evicted() {
        let before = Movement { inserted: 950, forgotten: 0, removed: 0 };
        let after = Movement { inserted: 980, forgotten: 20, removed: 0 };
        // The count has missed those that came, and seen those that went.
        for present in [950, 930, 960, 980] {
            let mut tally = Tally::new(900, &Census { before, present, after });
            tally.update(&Census { before: after, present: 960, after });
            assert_eq!(tally.evicted, 0, "{present} counted");
        }
    }

    #[test]
    fn what_goes_from_a_table_that_was_never_full_was_not_evicted() {
        let mut table = Table::default();
        table.insert(800);
        let mut tally = Tally::new(900, &table.census());
        let by_hand = |table: &Table, taken| {
            let present = table.present() - taken;
            Census { present, ..table.census() }
        };
        tally.update(&by_hand(&table, 300));
        assert_eq!(tally.evicted, 0);
        // Nor later, when it is full.
        table.moved.inserted += 600;
        let full = Census { present: 1000, ..table.census() };
        tally.update(&full);
        assert_eq!(tally.evicted, 100, "1400 came, 300 were taken");
    }

    #[test]
    fn a_new_agent_begins_with_nothing() {
        let mut table = Table::default();
        table.insert(5000);
        assert_eq!(table.evicted, 4000);
        let mut tally = Tally::new(900, &table.census());
        tally.update(&table.census());
        assert_eq!(tally.evicted, 0);
        table.insert(7);
        tally.update(&table.census());
        assert_eq!(tally.evicted, 7);
    }

    #[test]
    fn a_table_is_nearly_full_before_the_kernel_evicts() {
        assert_eq!(nearly_full(1000, 1), 744);
        assert_eq!(nearly_full(262_144, 2), 262_144 - 26_214);
        assert_eq!(nearly_full(262_144, 512), 131_072);
        assert_eq!(nearly_full(1000, 512), 0);
    }

    #[test]
    fn warnings_come_once_a_minute_with_what_is_new() {
        let mut warning = Warning::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(warning.due(at(0), 0), None);
        assert_eq!(warning.due(at(10), 5), Some(5));
        assert_eq!(warning.due(at(20), 50), None);
        assert_eq!(warning.due(at(69), 60), None);
        assert_eq!(warning.due(at(70), 70), Some(65));
        assert_eq!(warning.due(at(1000), 70), None);
    }
}
