//! Replies: a packet of a pod that answers a client leaves with the external address that the client spoke to.
//!
//! Only a packet that matches a flow is a reply. A pod's own connections, and its answers to clients that spoke to
//! the pod's address directly, match none.

use proxier_common::{
    Address, DELIVERY_STACK, FlowValue, FragmentKey, FragmentValue, TCP_REPLIED, TCP_REPLY_FIN, TCP_RESET,
    protocol,
    timeout::{self, SECOND},
};

use crate::{
    family::{Family, Fragment, Payload},
    icmp_error,
    packet::{NetworkHeader, Packet},
    rewrite::{self, Replacement},
    tables::{FlowEntry, Tables},
    transport::{self, Kind, Transport, tcp_flags},
    verdict::Verdict,
};

/// How long the rest of a fragmented packet may take: a receiver gives up after 60 s (RFC 8200, section 4.5).
const FRAGMENT_TIMEOUT: u64 = 60 * SECOND;

/// Decides about a packet that is about to leave, and rewrites it if it answers a client of an external address.
#[inline(always)]
pub fn reply<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<crate::V4, P, T>(packet, tables, offset),
        Some(NetworkHeader::V6(offset)) => of_family::<crate::V6, P, T>(packet, tables, offset),
        None => Verdict::Next,
    }
}

#[inline(always)]
fn of_family<F: Family, P: Packet, T: Tables>(packet: &mut P, tables: &T, offset: u32) -> Verdict {
    match ordinary::<F, P, T>(packet, tables, offset) {
        Some(verdict) => verdict,
        // From here, where nothing else lies on the kernel's stack.
        None => icmp_error::to_client::<F, P, T>(packet, tables, offset),
    }
}

/// Anything but an ICMP error, for which it returns `None`.
///
/// A function of its own for each family: the two then share the kernel's 512 bytes of stack, one after the other.
#[inline(never)]
fn ordinary<F: Family, P: Packet, T: Tables>(packet: &mut P, tables: &T, offset: u32) -> Option<Verdict> {
    let Some(header) = F::header(packet, offset) else {
        return Some(Verdict::Next);
    };
    let mut payload = Payload::within(packet.length(), false);
    let mut transport = Transport::EMPTY;
    if !F::payload(packet, offset, &header, &mut payload)
        || transport::read(packet, &payload, &mut transport).is_err()
    {
        return Some(Verdict::Next);
    }
    if let Kind::IcmpError = transport.kind {
        return None;
    }
    let (pod, peer) = (F::source(&header), F::destination(&header));
    let mut external = pod;
    let found = if let Fragment::Later = payload.fragment {
        external_of_fragment(tables, &fragment_key::<F>(pod, peer, &payload), &mut external)
    } else {
        external_of_flow(tables, &pod, &peer, &transport, &mut external)
    };
    if let Fragment::First = payload.fragment {
        let key = fragment_key::<F>(pod, peer, &payload);
        if found {
            tables.put_fragment(&key, &FragmentValue { external, seen: tables.now() });
        } else {
            // The identification is in use again, by a packet that is not ours.
            tables.remove_fragment(&key);
        }
    }
    if !found {
        return Some(Verdict::Next);
    }
    let replacement = Replacement { old: pod, new: external, other: peer };
    let place = (offset, F::SOURCE);
    let written = rewrite::address::<F, P>(packet, place, &payload, &transport, &replacement);
    Some(Verdict::of_write(written, Verdict::Rewritten))
}

/// Finds the external address that the client of this conversation speaks to. `false` if it is no conversation of
/// ours.
#[inline(never)]
fn external_of_flow<T: Tables>(
    tables: &T,
    pod: &Address,
    peer: &Address,
    transport: &Transport,
    external: &mut Address,
) -> bool {
    if !matches!(transport.kind, Kind::Ordinary | Kind::Answer) {
        return false;
    }
    let key = transport.flow_of_reply(*pod, *peer);
    let Some(entry) = tables.flow(&key) else {
        return false;
    };
    let flow = entry.value();
    let now = tables.now();
    if flow.delivery != DELIVERY_STACK || is_another_conversation(&flow, transport) {
        return false;
    }
    entry.refresh(&flow, now, tcp_state_after(transport, flow.tcp_state));
    *external = flow.external;
    true
}

/// The pod opens a connection from the port of one that has ended. Anything else still belongs to the flow, however long
/// it has been idle: a conversation of the same ports with the pod's own address would have ended it.
#[inline(always)]
const fn is_another_conversation(flow: &FlowValue, transport: &Transport) -> bool {
    transport.tcp_flags & tcp_flags::SYN != 0 && timeout::tcp_is_closed(flow.tcp_state)
}

/// What a TCP connection's state becomes by a packet of the pod.
#[inline(always)]
const fn tcp_state_after(transport: &Transport, state: u8) -> u8 {
    if transport.protocol != protocol::TCP {
        return 0;
    }
    let flags = transport.tcp_flags;
    let mut state = state | TCP_REPLIED;
    if flags & tcp_flags::RST != 0 {
        state |= TCP_RESET;
    }
    if flags & tcp_flags::FIN != 0 {
        state |= TCP_REPLY_FIN;
    }
    state
}

#[inline(always)]
fn fragment_key<F: Family>(source: Address, destination: Address, payload: &Payload) -> FragmentKey {
    FragmentKey {
        source,
        destination,
        identification: payload.identification,
        protocol: F::fragment_protocol(payload),
        padding: [0; 3],
    }
}

/// Finds what the first fragment of the same packet left with. `false` if it was not ours, or has not passed yet.
#[inline(always)]
fn external_of_fragment<T: Tables>(tables: &T, key: &FragmentKey, external: &mut Address) -> bool {
    match tables.fragment(key) {
        Some(fragment) if tables.now().saturating_sub(fragment.seen) <= FRAGMENT_TIMEOUT => {
            *external = fragment.external;
            true
        }
        _ => false,
    }
}
