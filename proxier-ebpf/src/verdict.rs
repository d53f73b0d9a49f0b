//! What the core says about a packet. The adapters turn it into the action codes of their hook.

use proxier_common::DropReason;

/// What is to happen with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, and untouched: whoever comes next decides.
    Next,
    /// Rewritten; whoever comes next decides, on the new addresses.
    Rewritten,
    /// To be dropped and counted.
    Drop(DropReason),
}
