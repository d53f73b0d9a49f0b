//! What the core says about a packet. The adapters turn it into the action codes of their hook.

use proxier_common::{DELIVERY_DIRECT, DELIVERY_PEER, DropReason};

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
    /// Rewritten, and to go on past the node's stack if [`forward_to_pod`](crate::forward_to_pod()) or
    /// [`forward_to_client`](crate::forward_to_client()) finds a way; else as [`Verdict::Rewritten`].
    Forward,
    /// As [`Verdict::Forward`] to a pod, but into the other end of the link that is found, if that has one.
    ForwardIntoPod,
    /// Rewritten, and to go on past the node's stack by the path that was found.
    Direct,
    /// Rewritten, but too large for the path that was found: the node's stack makes fragments of it, as if it came in by that
    /// path's interface. By the pod's link it would have an address that does not belong there.
    FromUplink,
    /// To be dropped and counted.
    Drop(DropReason),
}

impl Verdict {
    /// Of a packet to a pod that was rewritten and is delivered so (`DELIVERY_*`).
    #[inline(always)]
    pub(crate) const fn to_pod(delivery: u8) -> Self {
        match delivery {
            DELIVERY_PEER => Self::ForwardIntoPod,
            DELIVERY_DIRECT => Self::Forward,
            _ => Self::Rewritten,
        }
    }

    /// `if_written` if the packet could be written; else it must go, for a part of it may have been.
    #[inline(always)]
    pub(crate) const fn of_write(written: Result<(), WriteError>, if_written: Self) -> Self {
        match written {
            Ok(()) => if_written,
            Err(WriteError) => Self::Drop(DropReason::RewriteFailed),
        }
    }
}
