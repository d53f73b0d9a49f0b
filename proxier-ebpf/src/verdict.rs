//! What the core says about a packet. The adapters turn it into the action codes of their hook.

use proxier_common::DropReason;

use crate::packet::WriteError;

/// What is to happen with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, and untouched: whoever comes next decides.
    Next,
    /// From a pod to the node itself, and untouched so far: it may answer a process of the node that spoke to an external
    /// address ([`reply`](crate::reply()) for [`DELIVERY_NODE`](proxier_common::DELIVERY_NODE) tells).
    ToNode,
    /// Rewritten; whoever comes next decides, on the new addresses.
    Rewritten,
    /// Rewritten for whoever sent it: it goes back through the link that it came by, past the node's stack, which
    /// would take a packet from and to the same address for a mistake.
    Hairpin,
    /// To be dropped and counted.
    Drop(DropReason),
}

impl Verdict {
    /// `if_written` if the packet could be written; else it must go, for a part of it may have been.
    #[inline(always)]
    pub(crate) const fn of_write(written: Result<(), WriteError>, if_written: Self) -> Self {
        match written {
            Ok(()) => if_written,
            Err(WriteError) => Self::Drop(DropReason::RewriteFailed),
        }
    }
}
