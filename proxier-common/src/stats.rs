//! What the programs count beside packets dropped: the index of the `stats` counters.

/// What is counted.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Statistic {
    /// Flows that a packet made.
    FlowInserted = 0,
    /// Flows that a packet ended: one straight to the pod, between the same ports.
    FlowForgotten = 1,
    /// Flows that had been evicted from the full table while the conversation went on, and that a reply made again.
    FlowRebuilt = 2,
    /// Flows that the full table gave up for new ones. The kernel does not tell; the agent works it out.
    FlowEvicted = 3,
}

impl Statistic {
    /// Every one, in the order of its number.
    pub const ALL: [Self; 4] =
        [Self::FlowInserted, Self::FlowForgotten, Self::FlowRebuilt, Self::FlowEvicted];

    /// The name that commands and metrics print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FlowInserted => "flow-inserted",
            Self::FlowForgotten => "flow-forgotten",
            Self::FlowRebuilt => "flow-rebuilt",
            Self::FlowEvicted => "flow-evicted",
        }
    }
}

/// Entries of `stats`, with room for more: the size of a pinned map cannot change.
pub const STATISTICS: u32 = 32;

const _: () = assert!(Statistic::ALL.len() <= STATISTICS as usize);
