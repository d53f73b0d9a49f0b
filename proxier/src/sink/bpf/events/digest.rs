//! Which of the packets dropped get a line in the log. Pure: clock and counters are handed in.
//!
//! The first packet of a kind gets a line at once; those like it are told together, once a minute. Anybody outside can make
//! packets of ever new kinds, so lines are rationed; what got none is told as a number by reason and hook. Every packet is in
//! one line: their numbers add up to what the kernel counted.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use proxier_common::{Address, DropReason, Hook};
use tracing::Level;

/// Most lines at once, of one level.
const LINES: u32 = 20;
/// How soon there may be another one.
const REFILL: Duration = Duration::from_secs(3);
/// Between two lines about packets of one kind.
const AGAIN: Duration = Duration::from_secs(60);
/// Most kinds remembered; beyond them the one that has been quiet for longest is forgotten.
const REMEMBERED: usize = 1024;

/// How much the drop of a packet matters to who runs the node.
pub(super) const fn level(reason: DropReason) -> Level {
    match reason {
        // The node or the cluster is not as it should be, or too small.
        DropReason::BackendMissing
        | DropReason::FlowCollision
        | DropReason::FlowTableFull
        | DropReason::RewriteFailed
        | DropReason::NoRoute
        | DropReason::TooBig => Level::WARN,
        // As configured; or as networks are.
        DropReason::NoBackend | DropReason::SourceNotAllowed | DropReason::FragmentWithoutFirst => {
            Level::INFO
        }
        // What anybody can send, and nobody on the node can mend.
        DropReason::TinyFragment
        | DropReason::IcmpRedirect
        | DropReason::Malformed
        | DropReason::UnrelatedError
        | DropReason::SpoofedSource => Level::DEBUG,
    }
}

/// What packets have in common that are told together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) reason: DropReason,
    pub(super) hook: Hook,
    pub(super) service_id: u32,
    pub(super) source: Address,
    pub(super) destination: Address,
    pub(super) protocol: u8,
    /// Source and destination, of protocols that have ports.
    pub(super) ports: Option<(u16, u16)>,
}

/// A packet that the kernel has dropped and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dropped {
    /// When, by the kernel's clock.
    pub(super) time: u64,
    pub(super) kind: Kind,
    /// The interface's index.
    pub(super) interface: u32,
    /// In bytes, with the link-layer header.
    pub(super) length: u32,
}

/// Something to be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// The first packet of its kind.
    First(Dropped),
    /// One of before the agent's start, the first of its kind.
    Earlier {
        /// The packet.
        dropped: Dropped,
        /// How long before.
        ago: Duration,
    },
    /// Packets of before the agent's start that got no line.
    EarlierOthers {
        /// How many.
        packets: u64,
    },
    /// More of a kind, with the last one of them.
    Again {
        /// The last one.
        last: Dropped,
        /// How many.
        packets: u64,
        /// Since when.
        within: Duration,
    },
    /// Packets that got no line, or that the kernel did not report one by one.
    Others {
        /// Why they were dropped.
        reason: DropReason,
        /// Where.
        hook: Hook,
        /// How many.
        packets: u64,
    },
}

/// Counters of packets dropped, since the maps were made.
pub(super) type Totals = BTreeMap<(DropReason, Hook), u64>;

#[derive(Clone, Copy, Debug)]
struct Known {
    last: Dropped,
    told_at: Instant,
    seen_at: Instant,
    /// How many have been seen since it was told.
    untold: u64,
}

/// Packets of one reason and hook.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    /// How many the kernel has counted that are in some line, or will be in one about their kind.
    accounted: u64,
    /// When those were last told that are in none.
    told_at: Option<Instant>,
}

/// The lines that a level has left.
#[derive(Clone, Copy, Debug)]
struct Ration {
    lines: u32,
    refilled_at: Instant,
}

impl Ration {
    const fn full(now: Instant) -> Self {
        Self { lines: LINES, refilled_at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        while self.lines < LINES && now.saturating_duration_since(self.refilled_at) >= REFILL {
            self.lines += 1;
            self.refilled_at += REFILL;
        }
        if self.lines == LINES {
            self.refilled_at = now;
        }
        let is_left = self.lines > 0;
        self.lines = self.lines.saturating_sub(1);
        is_left
    }
}

/// What has been told, and what is still to be told.
#[derive(Debug)]
pub(super) struct Digest {
    /// By the kernel's clock: packets dropped before are not in what the counters grow by.
    started: u64,
    kinds: HashMap<Kind, Known>,
    rations: HashMap<Level, Ration>,
    sums: BTreeMap<(DropReason, Hook), Sum>,
    /// Kinds of before the start that have been told. As few as their level has lines: they are read in one go.
    earlier: HashSet<Kind>,
    /// Packets of before the start that have not been told.
    earlier_untold: u64,
}

impl Digest {
    /// Tells of what is dropped from `started` on, when the counters said `totals`, and of packets reported earlier.
    pub(super) fn new(started: u64, totals: &Totals) -> Self {
        let sums = totals.iter().map(|(pair, total)| (*pair, Sum { accounted: *total, told_at: None }));
        Self {
            started,
            kinds: HashMap::new(),
            rations: HashMap::new(),
            sums: sums.collect(),
            earlier: HashSet::new(),
            earlier_untold: 0,
        }
    }

    /// Takes a packet that was reported. The line that is due now, if any.
    pub(super) fn take(&mut self, now: Instant, dropped: Dropped) -> Option<Line> {
        if dropped.time < self.started {
            return self.take_earlier(now, dropped);
        }
        let kind = dropped.kind;
        if let Some(known) = self.kinds.get_mut(&kind) {
            known.last = dropped;
            known.seen_at = now;
            known.untold += 1;
            self.account(&dropped);
            return None;
        }
        if !self.ration(kind.reason, now) {
            return None;
        }
        if self.kinds.len() >= REMEMBERED {
            self.forget_quietest();
        }
        self.kinds.insert(kind, Known { last: dropped, told_at: now, seen_at: now, untold: 0 });
        self.account(&dropped);
        Some(Line::First(dropped))
    }

    /// Takes a packet of before the start. Which of the counters' packets it is cannot be told, so it is kept apart.
    fn take_earlier(&mut self, now: Instant, dropped: Dropped) -> Option<Line> {
        if self.earlier.contains(&dropped.kind) || !self.ration(dropped.kind.reason, now) {
            self.earlier_untold += 1;
            return None;
        }
        self.earlier.insert(dropped.kind);
        Some(Line::Earlier { dropped, ago: Duration::from_nanos(self.started - dropped.time) })
    }

    /// The lines that are due by now. `totals` must have been read before all packets were taken that were reported by then: the kernel
    /// counts a packet first.
    pub(super) fn due(&mut self, now: Instant, totals: &Totals) -> Vec<Line> {
        let mut lines = Vec::new();
        if self.earlier_untold > 0 {
            lines.push(Line::EarlierOthers { packets: std::mem::take(&mut self.earlier_untold) });
        }
        let is_due =
            |known: &Known| known.untold > 0 && now.saturating_duration_since(known.told_at) >= AGAIN;
        let mut due: Vec<_> = self
            .kinds
            .iter()
            .filter(|(_, known)| is_due(known))
            .map(|(kind, known)| (known.told_at, *kind))
            .collect();
        due.sort_unstable();
        for (told_at, kind) in due {
            if !self.ration(kind.reason, now) {
                continue;
            }
            if let Some(known) = self.kinds.get_mut(&kind) {
                let within = now.saturating_duration_since(told_at);
                lines.push(Line::Again { last: known.last, packets: known.untold, within });
                known.untold = 0;
                known.told_at = now;
            }
        }
        for ((reason, hook), total) in totals {
            let sum = self.sums.entry((*reason, *hook)).or_default();
            let packets = total.saturating_sub(sum.accounted);
            let rests = sum.told_at.is_some_and(|told_at| now.saturating_duration_since(told_at) < AGAIN);
            if packets > 0 && !rests {
                sum.accounted = *total;
                sum.told_at = Some(now);
                lines.push(Line::Others { reason: *reason, hook: *hook, packets });
            }
        }
        lines
    }

    fn account(&mut self, dropped: &Dropped) {
        self.sums.entry((dropped.kind.reason, dropped.kind.hook)).or_default().accounted += 1;
    }

    fn ration(&mut self, reason: DropReason, now: Instant) -> bool {
        self.rations.entry(level(reason)).or_insert_with(|| Ration::full(now)).take(now)
    }

    fn forget_quietest(&mut self) {
        // Seldom: whoever is remembered has got one of the few lines.
        let quietest = self.kinds.iter().min_by_key(|(_, known)| known.seen_at).map(|(kind, _)| *kind);
        if let Some(known) = quietest.and_then(|kind| self.kinds.remove(&kind)) {
            let Kind { reason, hook, .. } = known.last.kind;
            let sum = self.sums.entry((reason, hook)).or_default();
            sum.accounted = sum.accounted.saturating_sub(known.untold);
        }
    }
}

#[cfg(test)]
mod tests;
