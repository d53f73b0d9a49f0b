//! What the core says about a packet. The adapters turn it into the action codes of their hook.

use proxier_common::DropReason;

/// What is to happen with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, and untouched: whoever comes next decides.
    Next,
    /// Rewritten; whoever comes next decides, on the new addresses.
    Rewritten,
    /// Rewritten for the pod that sent it: it goes back through the link that it came in by, past the node's stack,
    /// which would take a packet from and to the same pod for a mistake.
    Hairpin,
    /// To be dropped and counted.
    Drop(DropReason),
}
