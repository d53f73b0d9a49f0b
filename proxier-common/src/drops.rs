//! Why and where a packet was dropped: the index of the `drops` counters.

/// Why a packet was dropped.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// The Service has no pod on this node.
    NoBackend = 0,
    /// The Service should have a backend in this slot, but `backends` has none.
    BackendMissing = 1,
    /// The pod already speaks with this client and port through another external address: a reply could not tell.
    FlowCollision = 2,
    /// The kernel could not insert into `flows`.
    FlowTableFull = 3,
    /// A first fragment that ends before the checksum that the rewrite must change (RFC 1858).
    TinyFragment = 4,
    /// The kernel had no memory to make the packet writable.
    RewriteFailed = 5,
    /// An ICMP redirect about a conversation through an external address: its advice holds for another address.
    IcmpRedirect = 6,
    /// For an external address, but broken, cut short, source-routed (IPv6), or with too many extension headers to read.
    /// Passed on it would go back where it came from, and come again.
    Malformed = 7,
    /// An ICMP error to an external address about a conversation that is not known. Passed on, as above.
    UnrelatedError = 8,
    /// To an external address from that same address, or from the node's where it has come in from elsewhere.
    SpoofedSource = 9,
    /// From an address outside the Service's source ranges.
    SourceNotAllowed = 10,
    /// A later fragment of a packet whose first fragment has not come by, of a Service that spreads conversations: which
    /// one it belongs to, only the first says.
    FragmentWithoutFirst = 11,
    /// From a process of the node, which has no route to the pod.
    NoRoute = 12,
    /// From a process of the node, and larger than the way to the pod is wide.
    TooBig = 13,
}

impl DropReason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 14] = [
        Self::NoBackend,
        Self::BackendMissing,
        Self::FlowCollision,
        Self::FlowTableFull,
        Self::TinyFragment,
        Self::RewriteFailed,
        Self::IcmpRedirect,
        Self::Malformed,
        Self::UnrelatedError,
        Self::SpoofedSource,
        Self::SourceNotAllowed,
        Self::FragmentWithoutFirst,
        Self::NoRoute,
        Self::TooBig,
    ];

    /// The name that commands and metrics print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoBackend => "no-backend",
            Self::BackendMissing => "backend-missing",
            Self::FlowCollision => "flow-collision",
            Self::FlowTableFull => "flow-table-full",
            Self::TinyFragment => "tiny-fragment",
            Self::RewriteFailed => "rewrite-failed",
            Self::IcmpRedirect => "icmp-redirect",
            Self::Malformed => "malformed",
            Self::UnrelatedError => "unrelated-error",
            Self::SpoofedSource => "spoofed-source",
            Self::SourceNotAllowed => "source-not-allowed",
            Self::FragmentWithoutFirst => "fragment-without-first",
            Self::NoRoute => "no-route",
            Self::TooBig => "too-big",
        }
    }
}

/// Where a packet was dropped.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Ingress of an uplink: requests.
    UplinkIngress = 0,
    /// Egress of an uplink: replies, and requests of the node's own processes.
    UplinkEgress = 1,
    /// Ingress of a pod's host-side link: requests of pods on this node, and replies to the node's own processes.
    PodIngress = 2,
    /// Egress of a pod's host-side link: replies to pods on this node.
    PodEgress = 3,
    /// XDP at an uplink, before its ingress: requests.
    UplinkXdp = 4,
}

impl Hook {
    /// Every hook, in the order of its number.
    pub const ALL: [Self; 5] =
        [Self::UplinkIngress, Self::UplinkEgress, Self::PodIngress, Self::PodEgress, Self::UplinkXdp];

    /// The name that commands and metrics print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UplinkIngress => "uplink-ingress",
            Self::UplinkEgress => "uplink-egress",
            Self::PodIngress => "pod-ingress",
            Self::PodEgress => "pod-egress",
            Self::UplinkXdp => "uplink-xdp",
        }
    }

    /// The position in `drops` that counts packets dropped here for `reason`.
    #[inline(always)]
    #[must_use]
    pub const fn counter(self, reason: DropReason) -> u32 {
        self.counter_at(reason as u32)
    }

    /// As [`Hook::counter`], for the number of a reason.
    #[inline(always)]
    #[must_use]
    pub const fn counter_at(self, reason: u32) -> u32 {
        reason * MAX_HOOKS + self as u32
    }
}

const REASONS: u32 = 14;
const HOOKS: u32 = 5;
/// Room for hooks to come, as for reasons.
const MAX_HOOKS: u32 = 8;
const _: () = assert!(HOOKS <= MAX_HOOKS);
const _: () = assert!(DropReason::ALL.len() == REASONS as usize && Hook::ALL.len() == HOOKS as usize);

/// Room for reasons to come: the size of a pinned map cannot change.
const MAX_REASONS: u32 = 64;
const _: () = assert!(REASONS <= MAX_REASONS);

/// Entries of `drops`.
pub const DROP_COUNTERS: u32 = MAX_REASONS * MAX_HOOKS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_and_hook_has_a_counter_of_its_own() {
        let mut seen = [false; DROP_COUNTERS as usize];
        for reason in DropReason::ALL {
            for hook in Hook::ALL {
                let index = hook.counter(reason) as usize;
                assert!(!seen[index], "{} at {} shares a counter", reason.name(), hook.name());
                seen[index] = true;
            }
        }
        assert_eq!(seen.iter().filter(|seen| **seen).count(), DropReason::ALL.len() * Hook::ALL.len());
    }
}
