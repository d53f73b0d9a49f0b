//! The map ABI: the keys, values and limits that the kernel programs and the agent agree on, and nothing else.
//!
//! Every type is `repr(C)` with explicit padding, so that a key has one representation only (a hash map compares
//! keys as bytes). Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6 (RFC 4291, section 2.5.5.2).
//! Ports and identifiers of packets are in network order, everything else is in host order. Times are nanoseconds
//! of `CLOCK_MONOTONIC`, which is what `bpf_ktime_get_ns` returns.
//!
//! Changing anything here changes what is pinned on running nodes: raise [`SCHEMA`].

#![cfg_attr(not(test), no_std)]

mod address;
mod drops;
mod events;
pub mod protocol;
mod stats;
pub mod timeout;

pub use address::Address;
pub use drops::{DROP_COUNTERS, DropReason, Hook};
pub use events::{DropEvent, EVENT_BYTES, EVENTS_A_SECOND, EventBudget};
pub use stats::{STATISTICS, Statistic};

/// Version of this ABI. The agent pins its maps under `<pin-path>/v<SCHEMA>/`.
pub const SCHEMA: u32 = 3;

/// Most external addresses, pods' own and the node's together (entries of `services`, and of `pods` and `names`).
pub const MAX_SERVICES: u32 = 131_072;
/// Most backends of all Services and generations (entries of `backends`). A Service being changed is there twice.
pub const MAX_BACKENDS: u32 = 524_288;
/// Most sessions remembered (entries of `sessions`); beyond it the least recently used one goes.
pub const MAX_SESSIONS: u32 = 262_144;
/// Most flows remembered (entries of `flows`); beyond it the least recently used one goes.
pub const MAX_FLOWS: u32 = 262_144;
/// Most fragmented packets of which the rest is still awaited (entries of `fragments`). An LRU map keeps up to 128 entries
/// back for each CPU.
pub const MAX_FRAGMENTS: u32 = 65_536;

/// Most source ranges of all Services and generations (entries of `sources`).
pub const MAX_SOURCES: u32 = 65_536;

/// Longest namespace or Service name (RFC 1123 label), in bytes.
pub const MAX_NAME: usize = 63;

/// Key of `services`: an external address, a pod's own ([`SERVICE_IS_POD`]) or the node's ([`SERVICE_IS_NODE`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExternalKey {
    /// The external address.
    pub external: Address,
}

/// Value of `services`: which backends an external address has, right now. Of a pod's or the node's own only `flags` counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceValue {
    /// Names one Service in one address family.
    pub service_id: u32,
    /// Which set of `backends` is in force. One write of this value switches from one set to the next.
    pub generation: u32,
    /// How many backends that set has: its slots are `0..backend_count`.
    pub backend_count: u32,
    /// How long an idle client keeps its pod, in seconds.
    pub affinity_timeout: u32,
    /// Bits of `SERVICE_*`.
    pub flags: u32,
    /// Which set of `sources` is in force; 0 if everybody may send. A set of its own numbering: source ranges change
    /// seldom, backends often.
    pub source_generation: u32,
}

/// [`ServiceValue::flags`]: without a backend, leave packets to the rest of the node instead of dropping them.
pub const SERVICE_PASS_WITHOUT_BACKEND: u32 = 1 << 0;
/// [`ServiceValue::flags`]: not an external address but a pod's own, and nothing else of the value counts. A packet to it
/// belongs to no external address, which ends what is noted about an earlier conversation with the same ports. Here and
/// not in a map of its own, so that a packet to anybody else still costs one look-up.
pub const SERVICE_IS_POD: u32 = 1 << 1;
/// [`ServiceValue::flags`]: one of the node's own addresses, and nothing else of the value counts. A pod's packet to it may
/// answer a process of the node that spoke to an external address.
pub const SERVICE_IS_NODE: u32 = 1 << 2;
/// [`ServiceValue::flags`]: every conversation has a session of its own, instead of every client.
pub const SERVICE_BALANCE_FLOW: u32 = 1 << 3;

/// [`ServiceValue::flags`]: new conversations of clients outside go past the node's stack, with pods that can be reached so
/// ([`PodValue::interface`]).
pub const SERVICE_DIRECT: u32 = 1 << 4;

/// Key of `backends`: one slot of one generation of a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// As [`ServiceValue::service_id`].
    pub service_id: u32,
    /// As [`ServiceValue::generation`].
    pub generation: u32,
    /// Position within the generation, from 0.
    pub slot: u32,
}

/// Value of `backends`: a pod of the Service on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendValue {
    /// The pod's address.
    pub pod: Address,
}

/// Key of `pods`: the address of a pod that belongs to a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodKey {
    /// The pod's address.
    pub pod: Address,
}

/// Value of `pods`. Whatever else sends something is no pod, and its packet no reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodValue {
    /// The one external address that leads to the pod; all zero if there are several.
    pub external: Address,
    /// Bits of `SERVICE_*` of that external address, and of `POD_*`.
    pub flags: u32,
    /// The node's link that leads to the pod, if the programs are in place there and packets may pass the node's stack by;
    /// else 0.
    pub interface: u32,
}

/// The first Linux that delivers past the node's stack. Before 6.4 the verifier takes every number for one that matters
/// (docs/decisions/003), and gives up a pod's link's program that looks for direct replies as well (6.1: more than 1,000,000
/// instructions).
pub const DIRECT_DELIVERY_SINCE: (u8, u8) = (6, 4);

/// The first Linux that lends programs the clock as of the last tick (`bpf_ktime_get_coarse_ns`).
pub const COARSE_CLOCK_SINCE: (u8, u8) = (5, 11);

/// The first Linux with tcx links.
pub const TCX_SINCE: (u8, u8) = (6, 6);

/// Whether this machine runs that Linux or a newer one; no, if it does not say. The agent goes by it, and so must whoever tries or
/// measures what the agent does.
#[cfg(feature = "aya")]
#[must_use]
pub fn is_linux_since((major, minor): (u8, u8)) -> bool {
    use aya::util::KernelVersion;
    KernelVersion::current().is_ok_and(|running| running >= KernelVersion::new(major, minor, 0))
}

/// [`PodValue::flags`]: the link's other end is in the pod, which `bpf_redirect_peer` reaches. Without it the link is a
/// bridge.
pub const POD_HAS_PEER: u32 = 1 << 16;

/// Entries of the array `pod_links`, which says at which links pods are reached past the node's stack. The agent writes it before
/// it says so of a pod, and takes it back before it takes the programs off that link.
///
/// An array, as the kernel makes of a look-up there a few instructions. Interfaces whose numbers have the same remainder share an
/// entry. It is of the one that was written last; pods behind another one are reached through the stack, both ways.
pub const MAX_POD_LINKS: u32 = 1 << 16;

/// Value of `pod_links`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodLinkValue {
    /// The interface that the entry is of; 0 for none.
    pub interface: u32,
    /// [`POD_HAS_PEER`] or 0.
    pub flags: u32,
}

impl PodLinkValue {
    /// Of no interface.
    pub const NONE: Self = Self { interface: 0, flags: 0 };

    /// The entry for all ports of bridges, in place [`LINK_OF_PORTS`]: which of them leads to a pod is not known. Once there is one such
    /// pod it stays.
    pub const PORTS: Self = Self { interface: LINK_OF_PORTS, flags: 1 };

    /// The entry of the link that leads to a pod, and its place in the array.
    #[must_use]
    pub const fn of(pod: &PodValue) -> Option<(u32, Self)> {
        match pod.interface % MAX_POD_LINKS {
            LINK_OF_PORTS => None,
            place => Some((place, Self { interface: pod.interface, flags: pod.flags & POD_HAS_PEER })),
        }
    }
}

/// The place in `pod_links` of all ports of bridges. Interfaces whose number would have it have none.
pub const LINK_OF_PORTS: u32 = 0;

/// Most devices at XDP (entries of `xdp_devices`): uplinks, and the members of those that are bonds.
pub const MAX_XDP_DEVICES: u32 = 1024;

/// Value of `xdp_devices`, by the index of the interface whose driver has a frame. At XDP nothing else tells whether it is for
/// this host. The map is not pinned: each agent's program has its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct XdpDevice {
    /// The interface at which tc sees its frames: itself, or the bond that it is a member of.
    pub upper: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Always 0.
    pub padding: u16,
}

/// What is looked up in `sources`, behind the number of its leading bits that count: an address that may send to a
/// Service. All of the first two fields count, and of the address what the range says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    /// As [`ServiceValue::service_id`].
    pub service_id: u32,
    /// As [`ServiceValue::source_generation`].
    pub generation: u32,
    /// The client's address, or the first of a range.
    pub address: Address,
}

impl SourceKey {
    /// How many leading bits of the key count for one address.
    pub const BITS: u32 = 192;
    /// How many of them come before the address.
    pub const BITS_BEFORE_ADDRESS: u32 = Self::BITS - 128;
}

/// Value of `sources`: that the range may send.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceValue {
    /// Always 0.
    pub padding: u32,
}

/// Key of `members`: that a pod belongs to a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    /// The pod's address.
    pub pod: Address,
    /// As [`ServiceValue::service_id`].
    pub service_id: u32,
    /// Always 0.
    pub padding: u32,
}

/// Value of `members`: since when a pod belongs to a Service.
///
/// A session made before the pod joined was with an earlier owner of the address, and does not count.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemberValue {
    /// The generation in which the pod joined.
    pub since_generation: u32,
    /// Bits of `MEMBER_*`.
    pub flags: u32,
}

/// [`MemberValue::flags`]: the pod is there but takes no new conversations (not ready, or terminating).
pub const MEMBER_DRAINING: u32 = 1 << 0;

/// Key of `names`: as [`ServiceValue::service_id`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NameKey {
    /// As [`ServiceValue::service_id`].
    pub service_id: u32,
}

/// Value of `names`: which Service an id stands for. Only user space reads it: a restarted agent keeps ids, and
/// with them sessions and flows; the inspection commands show names.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameValue {
    /// The Service's namespace, filled up with zero bytes.
    pub namespace: [u8; MAX_NAME + 1],
    /// The Service's name, filled up with zero bytes.
    pub name: [u8; MAX_NAME + 1],
    /// 4 or 6.
    pub family: u32,
}

/// Key of `sessions`: a client of an external address, whatever its ports and protocols; with [`SERVICE_BALANCE_FLOW`] one
/// conversation of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey {
    /// The external address.
    pub external: Address,
    /// The client's address.
    pub peer: Address,
    /// The external port in network order; of an ICMP query its identifier; 0 if the session is the client's.
    pub external_port: u16,
    /// The client's port in network order; of an ICMP query its identifier; 0 if the session is the client's.
    pub peer_port: u16,
    /// IP protocol number; 0 if the session is the client's.
    pub protocol: u8,
    /// Always 0.
    pub padding: [u8; 3],
}

/// Value of `sessions`: the pod that a client stays on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionValue {
    /// The pod's address.
    pub pod: Address,
    /// The pod that the client was on before, with which it may still have conversations; all zero if none.
    pub former: Address,
    /// When the client last sent something, to the second.
    pub last_seen: u64,
    /// As [`ServiceValue::service_id`], when the pod was last checked. Where the address changes hands, clients stay whose
    /// pod is a member of the new Service.
    pub service_id: u32,
    /// The generation in which the pod was last known to belong to the Service.
    pub generation: u32,
    /// The external port of the TCP connection that the client opened last, in network order; 0 if none. What the pod sends
    /// of it is a reply, though its flow be gone.
    pub tcp_port: u16,
    /// The client's port of that connection, in network order.
    pub tcp_peer_port: u16,
    /// Always 0.
    pub padding: u32,
}

impl SessionValue {
    /// Whether the TCP connection that the client opened last is the one with this pod between these ports, the external one
    /// first.
    #[inline(always)]
    #[must_use]
    pub fn is_of_connection(&self, pod: Address, (port, peer_port): (u16, u16)) -> bool {
        self.tcp_port != 0
            && self.tcp_port == port
            && self.tcp_peer_port == peer_port
            && self.pod.words() == pod.words()
    }
}

/// Key of `flows`: what tells one conversation of a pod from another, seen from the pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The pod's address.
    pub pod: Address,
    /// The client's address.
    pub peer: Address,
    /// The pod's port in network order; of an ICMP query its identifier; 0 for protocols without ports.
    pub pod_port: u16,
    /// The client's port in network order; 0 for ICMP and protocols without ports.
    pub peer_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// For ICMP the type of the client's query, so that a pod's own query is no reply to it; else 0.
    pub query: u8,
    /// Always 0.
    pub padding: u16,
}

/// Value of `flows`: the external address that a reply leaves with.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowValue {
    /// The external address that the client speaks to.
    pub external: Address,
    /// When a packet last passed, in either direction, to the second.
    pub last_seen: u64,
    /// As [`ServiceValue::service_id`].
    pub service_id: u32,
    /// `DELIVERY_*`: how replies are rewritten.
    pub delivery: u8,
    /// Bits of `TCP_*`.
    pub tcp_state: u8,
    /// Always 0.
    pub padding: u16,
}

/// [`FlowValue::delivery`]: through the node's stack; replies are rewritten at the egress of
/// uplinks, and of pods' links for clients on the node.
pub const DELIVERY_STACK: u8 = 1;
/// [`FlowValue::delivery`]: from a process of the node itself, past the node's stack; replies are rewritten at the
/// ingress of the pod's link.
pub const DELIVERY_NODE: u8 = 2;
/// [`FlowValue::delivery`]: past the node's stack, out by the link that leads to the pod; replies are rewritten at the ingress
/// of the pod's link.
pub const DELIVERY_DIRECT: u8 = 3;
/// [`FlowValue::delivery`]: as [`DELIVERY_DIRECT`], but into the link's other end, which is in the pod.
pub const DELIVERY_PEER: u8 = 4;

/// Whether a flow of this delivery goes past the node's stack, in both directions.
#[inline(always)]
#[must_use]
pub const fn is_direct(delivery: u8) -> bool {
    matches!(delivery, DELIVERY_DIRECT | DELIVERY_PEER)
}

/// Whether a place that rewrites packets of flows of one delivery does so for flows of another.
///
/// The place for [`DELIVERY_STACK`] takes direct ones too: a packet that could not go directly, or has come by a link that the
/// programs are not on.
#[inline(always)]
#[must_use]
pub const fn is_of_place(delivery: u8, place: u8) -> bool {
    match place {
        DELIVERY_STACK => delivery == DELIVERY_STACK || is_direct(delivery),
        DELIVERY_DIRECT => is_direct(delivery),
        _ => delivery == place,
    }
}

/// [`FlowValue::tcp_state`]: the pod has answered.
pub const TCP_REPLIED: u8 = 1 << 0;
/// [`FlowValue::tcp_state`]: the client has acknowledged the answer.
pub const TCP_ESTABLISHED: u8 = 1 << 1;
/// [`FlowValue::tcp_state`]: the client has sent a FIN, or a RST, which anybody can forge who knows the ports.
pub const TCP_REQUEST_FIN: u8 = 1 << 2;
/// [`FlowValue::tcp_state`]: the pod has sent a FIN.
pub const TCP_REPLY_FIN: u8 = 1 << 3;
/// [`FlowValue::tcp_state`]: the pod has sent a RST.
pub const TCP_RESET: u8 = 1 << 4;

/// Key of `fragments`: a packet of which the first fragment decided for the rest (RFC 791, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentKey {
    /// The address that is replaced, as on the wire before: a request's destination, a reply's source. A pod's own packet
    /// to an external address is thereby not taken for a reply to it.
    pub local: Address,
    /// The client's address.
    pub peer: Address,
    /// The packet's identification as loaded from it, IPv4's 16 bits widened to 32.
    pub identification: u32,
    /// IP protocol number for IPv4; 0 for IPv6, where the identification alone tells packets apart.
    pub protocol: u8,
    /// How the rest of a reply that is seen at the pod's link must go, after the first fragment: [`DELIVERY_DIRECT`] past the
    /// node's stack, [`DELIVERY_STACK`] through it. Elsewhere 0.
    pub delivery: u8,
    /// Always 0.
    pub padding: [u8; 2],
}

/// Value of `fragments`: what one address of the first fragment became: the destination of a request, the source of a reply.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentValue {
    /// The pod's address, or the external one.
    pub address: Address,
    /// When the first fragment passed.
    pub seen: u64,
}

// A hash map hashes and compares every byte of a key: a hole would make equal keys differ.
const _: () = {
    assert!(size_of::<ExternalKey>() == 16);
    assert!(size_of::<ServiceValue>() == 24);
    assert!(size_of::<BackendKey>() == 12);
    assert!(size_of::<BackendValue>() == 16);
    assert!(size_of::<PodKey>() == 16);
    assert!(size_of::<PodValue>() == 24);
    assert!(size_of::<PodLinkValue>() == 8);
    assert!(size_of::<SourceKey>() == 24 && SourceKey::BITS == 24 * 8);
    assert!(size_of::<SourceValue>() == 4);
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<MemberValue>() == 8);
    assert!(size_of::<NameKey>() == 4);
    assert!(size_of::<NameValue>() == 132);
    assert!(size_of::<SessionKey>() == 40);
    assert!(size_of::<SessionValue>() == 56);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<FlowValue>() == 32);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentValue>() == 24);
};

#[cfg(feature = "aya")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($name:ty),+ $(,)?) => {$(
            // SAFETY: `repr(C)` of plain integers and byte arrays, without padding that the compiler put there
            // (the assertions above), so every bit pattern is valid and every byte is initialised.
            unsafe impl aya::Pod for $name {}
        )+};
    }
    pod!(
        ExternalKey,
        ServiceValue,
        BackendKey,
        BackendValue,
        PodKey,
        PodValue,
        PodLinkValue,
        SourceKey,
        SourceValue,
        MemberKey,
        MemberValue,
        NameKey,
        NameValue,
        SessionKey,
        SessionValue,
        FlowKey,
        FlowValue,
        FragmentKey,
        FragmentValue,
        XdpDevice,
        DropEvent,
        EventBudget,
    );
}
