//! Requests: a packet from a client to an external address goes to a pod.

use proxier_common::{
    Address, BackendKey, DELIVERY_STACK, DropReason, FlowKey, FlowValue, MemberKey,
    SERVICE_PASS_WITHOUT_BACKEND, ServiceKey, ServiceValue, SessionKey, SessionValue, TCP_ESTABLISHED,
    TCP_REPLIED, TCP_REQUEST_FIN,
    timeout::{self, SECOND, protocol},
};

use crate::{
    family::{Family, Payload},
    icmp_error,
    packet::{NetworkHeader, Packet},
    rewrite,
    tables::{FlowEntry, InsertError, SessionEntry, Tables},
    transport::{self, Kind, Transport, TransportError, tcp_flags},
    verdict::Verdict,
};

/// Decides about a packet that came in from outside, and rewrites it if it is for an external address.
#[inline(always)]
pub fn request<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<crate::V4, P, T>(packet, tables, offset),
        Some(NetworkHeader::V6(offset)) => of_family::<crate::V6, P, T>(packet, tables, offset),
        None => Verdict::Next,
    }
}

// A function of its own for each family: the two then share the kernel's 512 bytes of stack, one after the other.
#[inline(never)]
fn of_family<F: Family, P: Packet, T: Tables>(packet: &mut P, tables: &T, offset: u32) -> Verdict {
    let Some(header) = F::header(packet, offset) else {
        return Verdict::Next;
    };
    let external = F::destination(&header);
    let Some(service) = tables.service(&ServiceKey { external }) else {
        return Verdict::Next;
    };
    let peer = F::source(&header);
    let mut payload = Payload::within(packet.length(), false);
    if !F::payload(packet, offset, &header, &mut payload) {
        return Verdict::Next;
    }
    let mut transport = Transport::EMPTY;
    match transport::read(packet, &payload, &mut transport) {
        Ok(()) => {}
        Err(TransportError::Truncated) => return Verdict::Next,
        Err(TransportError::TinyFragment) => return Verdict::Drop(DropReason::TinyFragment),
    }
    match transport.kind {
        Kind::NeighbourDiscovery => return Verdict::Next,
        Kind::IcmpError => return icmp_error::to_pod::<F, P, T>(packet, tables, offset, &external, &payload),
        _ => {}
    }
    if service.backend_count == 0 {
        return if service.flags & SERVICE_PASS_WITHOUT_BACKEND != 0 {
            Verdict::Next
        } else {
            Verdict::Drop(DropReason::NoBackend)
        };
    }
    let client = Client { external, peer, service, now: tables.now() };
    let Some(pod) = pod_of_client(tables, &client) else {
        return Verdict::Drop(DropReason::BackendMissing);
    };
    if let Err(reason) = note_flow(tables, &client, &pod, &transport) {
        return Verdict::Drop(reason);
    }
    match rewrite::destination::<F, P>(packet, offset, &transport, external, pod) {
        Ok(()) => Verdict::Rewritten,
        Err(_) => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// Who speaks to whom, and when.
struct Client {
    external: Address,
    peer: Address,
    service: ServiceValue,
    now: u64,
}

/// The pod that the client is on, or a newly chosen one.
///
/// Not inlined, as [`note_flow`]: keys and values of both would not fit the kernel's stack side by side.
#[inline(never)]
fn pod_of_client<T: Tables>(tables: &T, client: &Client) -> Option<Address> {
    let Client { external, peer, service, now } = client;
    let key = SessionKey { external: *external, peer: *peer };
    if let Some(entry) = tables.session(&key) {
        let session = entry.value();
        if session_holds(tables, service, &session, *now) {
            if session.generation != service.generation {
                entry.set_generation(service.generation);
            }
            if now.saturating_sub(session.last_seen) >= SECOND {
                entry.set_last_seen(*now);
            }
            return Some(session.pod);
        }
    }
    let ServiceValue { service_id, generation, backend_count, .. } = *service;
    let slot = slot_of_client(*peer, service_id, backend_count);
    let pod = tables.backend(&BackendKey { service_id, generation, slot })?.pod;
    tables.put_session(&key, &SessionValue { pod, last_seen: *now, service_id, generation });
    Some(pod)
}

#[inline(always)]
fn session_holds<T: Tables>(tables: &T, service: &ServiceValue, session: &SessionValue, now: u64) -> bool {
    if session.service_id != service.service_id
        || now.saturating_sub(session.last_seen) > u64::from(service.affinity_timeout) * SECOND
    {
        return false;
    }
    if session.generation == service.generation {
        return true;
    }
    // The Service has changed since. The client stays if its pod is still there, and has been there all along: a
    // pod that left and another that came with the same address are not the same.
    match tables.member(&MemberKey { pod: session.pod, service_id: service.service_id, padding: 0 }) {
        Some(member) => member.since_generation <= session.generation,
        None => false,
    }
}

/// Spreads clients over slots, the same way on every CPU, so that two first packets of a client agree.
#[inline(always)]
fn slot_of_client(peer: Address, service_id: u32, backend_count: u32) -> u32 {
    let [high, low] = peer.words();
    // The finalizer of MurmurHash3, which spreads every input bit over all output bits.
    let mut hash = high.rotate_left(32) ^ low ^ (u64::from(service_id) << 17);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    // The upper half of hash x count: a slot without a division.
    (((hash & 0xffff_ffff) * u64::from(backend_count)) >> 32) as u32
}

/// Makes sure that a reply will find its external address.
#[inline(never)]
fn note_flow<T: Tables>(
    tables: &T,
    client: &Client,
    pod: &Address,
    transport: &Transport,
) -> Result<(), DropReason> {
    // Nothing comes back for an answer; of a later fragment the first one has noted the flow.
    if !matches!(transport.kind, Kind::Ordinary | Kind::Query) {
        return Ok(());
    }
    let key = FlowKey {
        pod: *pod,
        peer: client.peer,
        pod_port: transport.destination_port,
        peer_port: if transport.query == 0 { transport.source_port } else { 0 },
        protocol: transport.protocol,
        query: transport.query,
        padding: 0,
    };
    let fresh = FlowValue {
        external: client.external,
        last_seen: client.now,
        service_id: client.service.service_id,
        delivery: DELIVERY_STACK,
        tcp_state: tcp_state_after(transport, 0),
        padding: 0,
    };
    if let Some(entry) = tables.flow(&key) {
        return continue_flow(tables, &key, &entry, &fresh, transport);
    }
    match tables.insert_flow(&key, &fresh) {
        Ok(()) => Ok(()),
        Err(InsertError::Full) => Err(DropReason::FlowTableFull),
        // Another CPU inserted it in between, for the same client and port. Which external address has won?
        Err(InsertError::Exists) => match tables.flow(&key) {
            Some(entry) if entry.value().external == client.external => Ok(()),
            _ => Err(DropReason::FlowCollision),
        },
    }
}

#[inline(always)]
fn continue_flow<T: Tables>(
    tables: &T,
    key: &FlowKey,
    entry: &T::Flow,
    fresh: &FlowValue,
    transport: &Transport,
) -> Result<(), DropReason> {
    let now = fresh.last_seen;
    let flow = entry.value();
    let opens = transport.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    if timeout::flow_is_over(key, &flow, now) || opens && timeout::tcp_is_closed(flow.tcp_state) {
        return tables.replace_flow(key, fresh).map_err(|_| DropReason::FlowTableFull);
    }
    // A reply could not tell which of the two external addresses it belongs to.
    if flow.external != fresh.external {
        return Err(DropReason::FlowCollision);
    }
    if flow.service_id != fresh.service_id || flow.delivery != fresh.delivery {
        // The address has changed hands and the conversation goes on.
        let moved = FlowValue { tcp_state: tcp_state_after(transport, flow.tcp_state), ..*fresh };
        return tables.replace_flow(key, &moved).map_err(|_| DropReason::FlowTableFull);
    }
    if now.saturating_sub(flow.last_seen) >= SECOND {
        entry.set_last_seen(now);
    }
    if transport.protocol == protocol::TCP {
        let state = tcp_state_after(transport, flow.tcp_state);
        if state != flow.tcp_state {
            entry.set_tcp_state(state);
        }
    }
    Ok(())
}

/// What a TCP connection's state becomes by a packet of the client.
#[inline(always)]
const fn tcp_state_after(transport: &Transport, state: u8) -> u8 {
    let flags = transport.tcp_flags;
    let mut state = transport::reset_after(flags, state);
    if flags & tcp_flags::FIN != 0 {
        state |= TCP_REQUEST_FIN;
    }
    if flags & tcp_flags::ACK != 0 && state & TCP_REPLIED != 0 {
        state |= TCP_ESTABLISHED;
    }
    state
}
