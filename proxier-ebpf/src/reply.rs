//! Replies: a packet of a pod that answers a client leaves with the external address that the client spoke to.
//!
//! A packet is a reply if it matches a flow, if it follows a first fragment that did, or if it is of the TCP connection that
//! its client opened last and whose flow the full table gave up (docs/decisions/009). A pod's own connections, and its
//! answers to clients that spoke to the pod's address directly, are none of these.

use proxier_common::{
    Address, DELIVERY_DIRECT, DELIVERY_PEER, DELIVERY_STACK, DropReason, FlowValue, FragmentKey,
    POD_HAS_PEER, PodKey, PodValue, SERVICE_DIRECT, Statistic, TCP_ESTABLISHED, TCP_REPLIED, TCP_REPLY_FIN,
    TCP_RESET, is_of_place, protocol, timeout,
};

use crate::{
    V4, V6, direct,
    family::{Family, Fragment, Payload},
    fragment, icmp_error,
    packet::{NetworkHeader, Packet, SEGMENTS_VARY, Way, WriteError},
    rewrite::{self, Replacement},
    tables::{FlowEntry, SessionEntry, Tables},
    transport::{self, Kind, Transport, tcp_flags},
    verdict::Verdict,
    verifier,
};

/// Decides about a packet on its way to a client that is reached so ([`DELIVERY_STACK`](proxier_common::DELIVERY_STACK),
/// [`DELIVERY_NODE`](proxier_common::DELIVERY_NODE)), and rewrites it if it answers one of an external address.
#[inline(always)]
pub fn reply<P: Packet, T: Tables>(packet: &mut P, tables: &T, delivery: u8) -> Verdict {
    of_any_family(packet, tables, delivery, None)
}

/// As [`reply`], at the link of a pod, of what goes past the node's stack (`path`).
#[inline(always)]
pub fn reply_directly<P: Packet, T: Tables>(packet: &mut P, tables: &T, path: &mut P::Path) -> Verdict {
    of_any_family(packet, tables, DELIVERY_DIRECT, Some(path))
}

/// As [`reply`], for an ICMP error and nothing else.
#[inline(always)]
pub fn error_reply<P: Packet, T: Tables>(packet: &mut P, tables: &T, delivery: u8) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => {
            icmp_error::to_client::<V4, P, T>(packet, tables, offset, delivery)
        }
        Some(NetworkHeader::V6(offset)) => {
            icmp_error::to_client::<V6, P, T>(packet, tables, offset, delivery)
        }
        None => Verdict::Next,
    }
}

#[inline(always)]
fn of_any_family<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    delivery: u8,
    path: Option<&mut P::Path>,
) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<V4, P, T>(packet, tables, offset, delivery, path),
        Some(NetworkHeader::V6(offset)) => of_family::<V6, P, T>(packet, tables, offset, delivery, path),
        None => Verdict::Next,
    }
}

#[inline(always)]
fn of_family<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    delivery: u8,
    path: Option<&mut P::Path>,
) -> Verdict {
    match ordinary::<F, P, T>(packet, tables, offset, delivery, path) {
        Some(verdict) => verdict,
        // From here, where nothing else lies on the kernel's stack.
        None => icmp_error::to_client::<F, P, T>(packet, tables, offset, delivery),
    }
}

/// A packet that may be a reply.
#[repr(C)]
struct Reply {
    pod: Address,
    peer: Address,
    /// To be found.
    external: Address,
    of_pod: PodValue,
    payload: Payload,
    transport: Transport,
    /// Of the session that makes up for a flow.
    service_id: u32,
    /// That of the place that sees it (`DELIVERY_*`).
    delivery: u8,
    hop_limit: u8,
    /// As [`Family::fragment_flags`].
    fragment_flags: u8,
    /// A later fragment of a packet whose first one was too large.
    follows_through_stack: bool,
}

impl Reply {
    /// To be filled in by [`read`].
    #[inline(always)]
    const fn within(length: u32, delivery: u8) -> Self {
        Self {
            pod: Address::UNSPECIFIED,
            peer: Address::UNSPECIFIED,
            external: Address::UNSPECIFIED,
            of_pod: PodValue { external: Address::UNSPECIFIED, flags: 0, interface: 0 },
            payload: Payload::within(length, false),
            transport: Transport::EMPTY,
            service_id: 0,
            delivery,
            hop_limit: 0,
            fragment_flags: 0,
            follows_through_stack: false,
        }
    }
}

/// Anything but an ICMP error, for which it returns `None`.
///
/// A function of its own for each family: the two then share the kernel's 512 bytes of stack, one after the other.
#[inline(never)]
fn ordinary<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    delivery: u8,
    path: Option<&mut P::Path>,
) -> Option<Verdict> {
    let mut reply = Reply::within(packet.length(), delivery);
    if !read::<F, P, T>(packet, tables, offset, &mut reply) {
        return Some(Verdict::Next);
    }
    match reply.transport.kind {
        Kind::IcmpError => return None,
        Kind::NeighbourRedirect if path.is_some() => return Some(Verdict::Next),
        Kind::NeighbourRedirect => return Some(of_redirect(packet, tables, &reply.payload)),
        _ => {}
    }
    if path.is_some() && !direct::is_by_link_of(packet, &reply.of_pod) {
        return Some(Verdict::Next);
    }
    let verdict = match path {
        _ if !is_of_external::<F, T>(tables, &mut reply) => Verdict::Next,
        Some(path) => verdict_on_way::<F, P>(packet, offset, &reply, path),
        None => Verdict::Rewritten,
    };
    if let Fragment::First = reply.payload.fragment {
        lead_rest::<F, T>(tables, &reply, verdict);
    }
    if verdict == Verdict::Next {
        return Some(verdict);
    }
    // One path for all from here.
    let is_direct = verifier::forget_whether(verdict == Verdict::Direct);
    let written = send::<F, P>(packet, offset, &reply, is_direct);
    let onward = match reply.delivery {
        DELIVERY_DIRECT if is_direct => Verdict::Direct,
        DELIVERY_DIRECT => Verdict::FromUplink,
        _ => Verdict::Rewritten,
    };
    Some(Verdict::of_write(written, onward))
}

/// Whether a reply can go past the stack. Else the stack has it untouched and answers with an error; or makes fragments of it,
/// for which it must not be the pod's: to conntrack that would be a conversation of the pod's own, and masqueraded as such.
#[inline(always)]
fn verdict_on_way<F: Family, P: Packet>(
    packet: &P,
    offset: u32,
    reply: &Reply,
    path: &mut P::Path,
) -> Verdict {
    if reply.hop_limit <= 1 {
        return Verdict::Next;
    }
    let length = direct::length_on_wire(packet, offset, &reply.payload);
    match packet.find_way(&reply.external, &reply.peer, length, path) {
        // The kernel alone can tell how long each is.
        Way::Open | Way::TooNarrow if packet.segment_size() == SEGMENTS_VARY => Verdict::FromUplink,
        Way::Open if reply.follows_through_stack => Verdict::FromUplink,
        Way::Open => Verdict::Direct,
        Way::TooNarrow if F::may_be_fragmented(reply.fragment_flags) => Verdict::FromUplink,
        Way::TooNarrow | Way::None => Verdict::Next,
    }
}

/// Reads the packet. `false` if it is broken, not one that NAT may touch, or neither of a pod's nor a report about another packet.
#[inline(never)]
fn read<F: Family, P: Packet, T: Tables>(packet: &P, tables: &T, offset: u32, reply: &mut Reply) -> bool {
    let Some(header) = F::header(packet, offset) else {
        return false;
    };
    (reply.pod, reply.peer) = (F::source(&header), F::destination(&header));
    // Most of what leaves a node is of no such pod, and that is all there is to know.
    let may_be_icmp = F::may_be_icmp(&header);
    if !may_be_icmp && !find_pod(tables, reply) {
        return false;
    }
    (reply.hop_limit, reply.fragment_flags) = (F::hop_limit(&header), F::fragment_flags(&header));
    if !F::payload(packet, offset, &header, &mut reply.payload)
        || transport::read(packet, &reply.payload, F::ICMP, &mut reply.transport).is_err()
    {
        return false;
    }
    // These may be of any router, and are about somebody else.
    let is_report = matches!(reply.transport.kind, Kind::IcmpError | Kind::NeighbourRedirect);
    !may_be_icmp || is_report || find_pod(tables, reply)
}

/// Whether the packet is of a pod that belongs to a Service.
#[inline(always)]
fn find_pod<T: Tables>(tables: &T, reply: &mut Reply) -> bool {
    let Some(of_pod) = tables.pod(&PodKey { pod: reply.pod }) else {
        return false;
    };
    reply.of_pod = of_pod;
    true
}

/// Whether the packet answers a client of an external address, which then is in `reply`.
#[inline(always)]
fn is_of_external<F: Family, T: Tables>(tables: &T, reply: &mut Reply) -> bool {
    if let Fragment::Later = reply.payload.fragment {
        return follow_first::<F, T>(tables, reply);
    }
    match find_flow(tables, reply) {
        Found::Yes => true,
        Found::No => false,
        Found::NoFlow => is_of_session(tables, reply) && rebuild_flow(tables, reply),
    }
}

/// How the first fragment of a packet went ([`FragmentKey::delivery`]) that is seen at a place of this delivery.
const fn first_went(delivery: u8) -> u8 {
    if delivery == DELIVERY_DIRECT { DELIVERY_DIRECT } else { 0 }
}

/// Finds out about a later fragment from the first one. `false` if that was not ours, or has not passed yet.
#[inline(never)]
fn follow_first<F: Family, T: Tables>(tables: &T, reply: &mut Reply) -> bool {
    let key = fragment::key::<F>(reply.pod, reply.peer, &reply.payload, first_went(reply.delivery));
    if fragment::find(tables, &key, &mut reply.external) {
        return true;
    }
    let key = FragmentKey { delivery: DELIVERY_STACK, ..key };
    let found = reply.delivery == DELIVERY_DIRECT && fragment::find(tables, &key, &mut reply.external);
    reply.follows_through_stack = verifier::forget_whether(found);
    found
}

/// Lets the rest of a fragmented packet follow the first fragment, about which this was the verdict. All of them take one way:
/// conntrack in the stack would wait for one that does not.
#[inline(never)]
fn lead_rest<F: Family, T: Tables>(tables: &T, reply: &Reply, verdict: Verdict) {
    let here = fragment::key::<F>(reply.pod, reply.peer, &reply.payload, first_went(reply.delivery));
    let stack = FragmentKey { delivery: DELIVERY_STACK, ..here };
    // Of an earlier packet that had the same identification.
    if verdict != Verdict::FromUplink && reply.delivery == DELIVERY_DIRECT {
        tables.remove_fragment(&stack);
    }
    match verdict {
        Verdict::Next => tables.remove_fragment(&here),
        Verdict::FromUplink => {
            tables.remove_fragment(&here);
            fragment::remember(tables, &stack, reply.external);
        }
        _ => fragment::remember(tables, &here, reply.external),
    }
}

/// Past the stack, the packet passes a router here.
#[inline(always)]
fn send<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    reply: &Reply,
    passes_router: bool,
) -> Result<(), WriteError> {
    let Reply { pod, peer, external, payload, transport, .. } = reply;
    let hop_limit = passes_router.then_some(reply.hop_limit.wrapping_sub(1));
    let replacement = Replacement { old: *pod, new: *external, other: *peer, hop_limit };
    rewrite::address::<F, P>(packet, (offset, F::SOURCE), payload, transport, &replacement)
}

/// A redirect (RFC 4861, section 4.5) tells a client the better way to the destination of a packet that it sent. If
/// that is a pod by now, the client knows nothing of it: pods on one bridge would be told at each request.
#[inline(always)]
fn of_redirect<P: Packet, T: Tables>(packet: &P, tables: &T, payload: &Payload) -> Verdict {
    /// Offset of the destination address in the ICMPv6 message.
    const DESTINATION: u32 = 24;
    match packet.load(payload.offset + DESTINATION) {
        Some(pod) if tables.pod(&PodKey { pod }).is_some() => Verdict::Drop(DropReason::IcmpRedirect),
        _ => Verdict::Next,
    }
}

/// What came of looking for a flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// The conversation is one of a client of an external address.
    Yes,
    /// It is not.
    No,
    /// There is none.
    NoFlow,
}

/// Finds the external address that the client of this conversation speaks to.
#[inline(never)]
fn find_flow<T: Tables>(tables: &T, reply: &mut Reply) -> Found {
    let transport = &reply.transport;
    if !matches!(transport.kind, Kind::Ordinary | Kind::Answer) {
        return Found::No;
    }
    let key = transport.flow_of_reply(reply.pod, reply.peer);
    let Some(entry) = tables.flow(&key) else {
        return Found::NoFlow;
    };
    let flow = entry.value();
    if !is_of_place(flow.delivery, reply.delivery) || is_another_conversation(&flow, transport) {
        return Found::No;
    }
    entry.refresh(&flow, tables.now(), tcp_state_after(transport, flow.tcp_state));
    reply.external = flow.external;
    Found::Yes
}

/// Whether a packet without a flow belongs to one nevertheless: the table was full, and gave it up for a new one. Left
/// alone, the packet would show the client the pod's address, and the client's reset would end the connection.
///
/// It does if nothing else can be meant: it is of the TCP connection that the client opened last, through the one external
/// address that the pod has.
#[inline(never)]
fn is_of_session<T: Tables>(tables: &T, reply: &mut Reply) -> bool {
    let Reply { pod, peer, of_pod: PodValue { external, flags, .. }, transport, .. } = &*reply;
    let (pod, peer, external, flags) = (*pod, *peer, *external, *flags);
    if transport.protocol != protocol::TCP || external == Address::UNSPECIFIED {
        return false;
    }
    // The place sees conversations of either kind; whose flow is gone was direct if a new one would be.
    if reply.delivery == DELIVERY_DIRECT && flags & SERVICE_DIRECT == 0 {
        return false;
    }
    let Some(entry) = tables.session(&transport.session_of_reply(external, peer, flags)) else {
        return false;
    };
    let session = entry.value();
    if !session.is_of_connection(pod, (transport.source_port, transport.destination_port)) {
        return false;
    }
    if transport.opens() {
        // Between the same ports, but the pod's own.
        entry.set_tcp_ports(0, 0);
        return false;
    }
    let goes_on = transport.tcp_flags & (tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK) == tcp_flags::ACK;
    reply.external = external;
    reply.service_id = session.service_id;
    goes_on
}

#[inline(never)]
fn rebuild_flow<T: Tables>(tables: &T, reply: &Reply) -> bool {
    let transport = &reply.transport;
    let key = transport.flow_of_reply(reply.pod, reply.peer);
    let flow = FlowValue {
        external: reply.external,
        last_seen: tables.now(),
        service_id: reply.service_id,
        delivery: match reply.delivery {
            DELIVERY_DIRECT if reply.of_pod.flags & POD_HAS_PEER != 0 => DELIVERY_PEER,
            delivery => delivery,
        },
        tcp_state: tcp_state_after(transport, TCP_ESTABLISHED),
        padding: 0,
    };
    if tables.insert_flow(&key, &flow).is_err() {
        return false;
    }
    tables.count(Statistic::FlowInserted);
    tables.count(Statistic::FlowRebuilt);
    true
}

/// The pod opens a connection from the port of one that has ended. Anything else still belongs to the flow, however long
/// it has been idle: a conversation of the same ports with the pod's own address would have ended it.
#[inline(always)]
const fn is_another_conversation(flow: &FlowValue, transport: &Transport) -> bool {
    transport.opens() && timeout::tcp_is_closed(flow.tcp_state)
}

/// What a TCP connection's state becomes by a packet of the pod.
#[inline(always)]
const fn tcp_state_after(transport: &Transport, state: u8) -> u8 {
    if transport.protocol != protocol::TCP {
        return 0;
    }
    let flags = transport.tcp_flags;
    // With a SYN the pod takes part in a new connection, whatever a straggler of the former has left.
    let former = if flags & tcp_flags::SYN == 0 { state } else { 0 };
    let mut state = former | TCP_REPLIED;
    if flags & tcp_flags::RST != 0 {
        state |= TCP_RESET;
    }
    if flags & tcp_flags::FIN != 0 {
        state |= TCP_REPLY_FIN;
    }
    state
}
