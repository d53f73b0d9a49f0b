//! Replies: a packet of a pod that answers a client leaves with the external address that the client spoke to.
//!
//! A packet is a reply if it matches a flow, if it follows a first fragment that did, or if it is of the TCP connection that
//! its client opened last and whose flow the full table gave up (docs/decisions/009). A pod's own connections, and its
//! answers to clients that spoke to the pod's address directly, are none of these.

use proxier_common::{
    Address, DropReason, FlowValue, PodKey, PodValue, Statistic, TCP_ESTABLISHED, TCP_REPLIED, TCP_REPLY_FIN,
    TCP_RESET, protocol, timeout,
};

use crate::{
    family::{Family, Fragment, Payload},
    fragment, icmp_error,
    packet::{NetworkHeader, Packet, WriteError},
    rewrite::{self, Replacement},
    tables::{FlowEntry, SessionEntry, Tables},
    transport::{self, Kind, Transport, tcp_flags},
    verdict::Verdict,
};

/// Decides about a packet on its way to a client that is reached so (`DELIVERY_*`), and rewrites it if it answers one of an
/// external address.
#[inline(always)]
pub fn reply<P: Packet, T: Tables>(packet: &mut P, tables: &T, delivery: u8) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<crate::V4, P, T>(packet, tables, offset, delivery),
        Some(NetworkHeader::V6(offset)) => of_family::<crate::V6, P, T>(packet, tables, offset, delivery),
        None => Verdict::Next,
    }
}

/// As [`reply`], for an ICMP error and nothing else.
#[inline(always)]
pub fn error_reply<P: Packet, T: Tables>(packet: &mut P, tables: &T, delivery: u8) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => {
            icmp_error::to_client::<crate::V4, P, T>(packet, tables, offset, delivery)
        }
        Some(NetworkHeader::V6(offset)) => {
            icmp_error::to_client::<crate::V6, P, T>(packet, tables, offset, delivery)
        }
        None => Verdict::Next,
    }
}

#[inline(always)]
fn of_family<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    delivery: u8,
) -> Verdict {
    match ordinary::<F, P, T>(packet, tables, offset, delivery) {
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
    /// Of the session that makes up for a flow.
    service_id: u32,
    delivery: u8,
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
) -> Option<Verdict> {
    let Some(header) = F::header(packet, offset) else {
        return Some(Verdict::Next);
    };
    let mut payload = Payload::within(packet.length(), false);
    let mut transport = Transport::EMPTY;
    if !F::payload(packet, offset, &header, &mut payload)
        || transport::read(packet, &payload, F::ICMP, &mut transport).is_err()
    {
        return Some(Verdict::Next);
    }
    match transport.kind {
        Kind::IcmpError => return None,
        Kind::NeighbourRedirect => return Some(of_redirect(packet, tables, &payload)),
        _ => {}
    }
    let (pod, peer) = (F::source(&header), F::destination(&header));
    let Some(of_pod) = tables.pod(&PodKey { pod }) else {
        return Some(Verdict::Next);
    };
    let mut reply = Reply { pod, peer, external: pod, of_pod, service_id: 0, delivery };
    let found = if let Fragment::Later = payload.fragment {
        let key = fragment::key::<F>(pod, peer, &payload);
        fragment::find(tables, &key, &mut reply.external)
    } else {
        match find_flow(tables, &transport, &mut reply) {
            Found::Yes => true,
            Found::No => false,
            Found::NoFlow => {
                is_of_session(tables, &transport, &mut reply) && rebuild_flow(tables, &transport, &reply)
            }
        }
    };
    if let Fragment::First = payload.fragment {
        let key = fragment::key::<F>(pod, peer, &payload);
        if found {
            fragment::remember(tables, &key, reply.external);
        } else {
            // The identification is in use again, by a packet that is not ours.
            tables.remove_fragment(&key);
        }
    }
    if !found {
        return Some(Verdict::Next);
    }
    let written = send::<F, P>(packet, offset, &payload, &transport, &reply);
    Some(Verdict::of_write(written, Verdict::Rewritten))
}

#[inline(never)]
fn send<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    payload: &Payload,
    transport: &Transport,
    reply: &Reply,
) -> Result<(), WriteError> {
    let replacement = Replacement { old: reply.pod, new: reply.external, other: reply.peer };
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
fn find_flow<T: Tables>(tables: &T, transport: &Transport, reply: &mut Reply) -> Found {
    if !matches!(transport.kind, Kind::Ordinary | Kind::Answer) {
        return Found::No;
    }
    let key = transport.flow_of_reply(reply.pod, reply.peer);
    let Some(entry) = tables.flow(&key) else {
        return Found::NoFlow;
    };
    let flow = entry.value();
    if flow.delivery != reply.delivery || is_another_conversation(&flow, transport) {
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
fn is_of_session<T: Tables>(tables: &T, transport: &Transport, reply: &mut Reply) -> bool {
    let Reply { pod, peer, of_pod: PodValue { external, flags, .. }, .. } = *reply;
    if transport.protocol != protocol::TCP || external == Address::UNSPECIFIED {
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
    reply.external = external;
    reply.service_id = session.service_id;
    transport.tcp_flags & (tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK) == tcp_flags::ACK
}

#[inline(never)]
fn rebuild_flow<T: Tables>(tables: &T, transport: &Transport, reply: &Reply) -> bool {
    let key = transport.flow_of_reply(reply.pod, reply.peer);
    let flow = FlowValue {
        external: reply.external,
        last_seen: tables.now(),
        service_id: reply.service_id,
        delivery: reply.delivery,
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
