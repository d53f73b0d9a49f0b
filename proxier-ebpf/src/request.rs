//! Requests: a packet from a client to an external address goes to a pod.

use proxier_common::{
    Address, BackendKey, DELIVERY_STACK, DropReason, ExternalKey, FlowKey, FlowValue, MEMBER_DRAINING,
    MemberKey, SERVICE_IS_POD, SERVICE_PASS_WITHOUT_BACKEND, ServiceValue, SessionKey, SessionValue,
    TCP_ESTABLISHED, TCP_REPLIED, TCP_REQUEST_FIN, protocol,
    timeout::{self, SECOND},
};

use crate::{
    family::{Family, Payload},
    icmp_error,
    packet::{NetworkHeader, Packet},
    rewrite::{self, Replacement},
    tables::{FlowEntry, InsertError, SessionEntry, Tables},
    transport::{self, Kind, Transport, TransportError, tcp_flags},
    verdict::Verdict,
};

/// Where a request comes from.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From outside, by an uplink.
    Outside,
    /// From a pod on this node, by the pod's link.
    Pod,
}

/// Decides about a packet that comes in, and rewrites it if it is for an external address.
#[inline(always)]
pub fn request<P: Packet, T: Tables>(packet: &mut P, tables: &T, origin: Origin) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<crate::V4, P, T>(packet, tables, offset, origin),
        Some(NetworkHeader::V6(offset)) => of_family::<crate::V6, P, T>(packet, tables, offset, origin),
        None => Verdict::Next,
    }
}

#[inline(always)]
fn of_family<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    origin: Origin,
) -> Verdict {
    match ordinary::<F, P, T>(packet, tables, offset, origin) {
        Some(verdict) => verdict,
        // From here, where nothing else lies on the kernel's stack.
        None => icmp_error::to_pod::<F, P, T>(packet, tables, offset, origin),
    }
}

/// Anything but an ICMP error, for which it returns `None`.
///
/// A function of its own for each family, as are its parts: keys, values and headers take turns on the kernel's 512 bytes
/// of stack.
#[inline(never)]
fn ordinary<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    origin: Origin,
) -> Option<Verdict> {
    let mut request = Request::within(packet.length());
    match read::<F, P, T>(packet, tables, offset, &mut request) {
        Read::External => {}
        Read::NotOurs => return Some(Verdict::Next),
        Read::Pod => {
            if !packet.is_rewritten() {
                forget_flow(tables, &request);
            }
            return Some(Verdict::Next);
        }
        Read::Malformed => return Some(Verdict::Drop(DropReason::Malformed)),
        Read::TinyFragment => return Some(Verdict::Drop(DropReason::TinyFragment)),
    }
    match request.transport.kind {
        Kind::NeighbourDiscovery => return Some(Verdict::Next),
        Kind::IcmpError => return None,
        _ => {}
    }
    if request.peer == request.destination.external {
        return Some(Verdict::Drop(DropReason::SpoofedSource));
    }
    request.now = tables.now();
    let mut placement = Placement { pod: Address::UNSPECIFIED, former: [Address::UNSPECIFIED; 2] };
    place(tables, &request, &mut placement);
    let external = request.destination.external;
    if let Origin::Pod = origin
        && placement.pod == request.peer
    {
        // The pod speaks to itself. Left with its own address as source it would not believe the packet, and the reply
        // would never leave it. From the external address it does, and the reply is a packet of the same kind: no flow.
        let written = rewrite::exchange::<F, P>(packet, offset, external, placement.pod);
        return Some(Verdict::of_write(written, Verdict::Hairpin));
    }
    match note_flow(tables, &request, &mut placement) {
        Noted::Yes => {}
        Noted::NoPod if request.service.backend_count != 0 => {
            return Some(Verdict::Drop(DropReason::BackendMissing));
        }
        Noted::NoPod if request.service.flags & SERVICE_PASS_WITHOUT_BACKEND != 0 => {
            return Some(Verdict::Next);
        }
        Noted::NoPod => return Some(Verdict::Drop(DropReason::NoBackend)),
        Noted::Collision => return Some(Verdict::Drop(DropReason::FlowCollision)),
        Noted::Full => return Some(Verdict::Drop(DropReason::FlowTableFull)),
    }
    let replacement = Replacement { old: external, new: placement.pod, other: request.peer };
    let Request { payload, transport, .. } = &request;
    let place = (offset, F::DESTINATION);
    let written = rewrite::address::<F, P>(packet, place, payload, transport, &replacement);
    packet.set_rewritten();
    Some(Verdict::of_write(written, Verdict::Rewritten))
}

/// A packet for an external address, or for a pod's own: who speaks to whom, what, and when.
#[repr(C)]
struct Request {
    destination: ExternalKey,
    peer: Address,
    service: ServiceValue,
    now: u64,
    payload: Payload,
    transport: Transport,
}

impl Request {
    /// To be filled in by [`read`], for a packet of this length.
    #[inline(always)]
    const fn within(length: u32) -> Self {
        Self {
            destination: ExternalKey { external: Address::UNSPECIFIED },
            peer: Address::UNSPECIFIED,
            service: ServiceValue {
                service_id: 0,
                generation: 0,
                backend_count: 0,
                affinity_timeout: 0,
                flags: 0,
                padding: 0,
            },
            now: 0,
            payload: Payload::within(length, false),
            transport: Transport::EMPTY,
        }
    }
}

/// What a packet turns out to be.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Read {
    /// For somebody else, or nothing that can be told.
    NotOurs,
    /// For an external address, and whole.
    External,
    /// For a pod's own address, and whole.
    Pod,
    /// For an external address, but not to be understood.
    Malformed,
    /// For an external address, a first fragment without what is needed.
    TinyFragment,
}

/// Reads the packet as far as its destination demands: of a packet for somebody else that one look-up is all.
#[inline(never)]
fn read<F: Family, P: Packet, T: Tables>(packet: &P, tables: &T, offset: u32, request: &mut Request) -> Read {
    let Some(header) = F::header(packet, offset) else {
        return Read::NotOurs;
    };
    request.destination = ExternalKey { external: F::destination(&header) };
    request.peer = F::source(&header);
    let Some(service) = tables.service(&request.destination) else {
        return Read::NotOurs;
    };
    request.service = service;
    let is_pod = service.flags & SERVICE_IS_POD != 0;
    if !F::payload(packet, offset, &header, &mut request.payload) {
        return if is_pod { Read::NotOurs } else { Read::Malformed };
    }
    match transport::read(packet, &request.payload, &mut request.transport) {
        Ok(()) if is_pod => Read::Pod,
        Ok(()) => Read::External,
        Err(_) if is_pod => Read::NotOurs,
        Err(TransportError::Truncated) => Read::Malformed,
        Err(TransportError::TinyFragment) => Read::TinyFragment,
    }
}

/// Where a client is; [`Address::UNSPECIFIED`] for nowhere.
#[repr(C)]
struct Placement {
    /// The pod for new conversations.
    pod: Address,
    /// The pods that it was on before, for those it still has there, the last one first.
    former: [Address; 2],
}

/// Finds the pod that the client is on, or chooses one.
///
/// Not inlined, as [`note_flow`]: keys and values of both would not fit the kernel's stack side by side.
#[inline(never)]
fn place<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) {
    let Request { destination: ExternalKey { external }, peer, service, now, .. } = request;
    let key = SessionKey { external: *external, peer: *peer };
    if let Some(entry) = tables.session(&key) {
        let session = entry.value();
        placement.former[0] = session.former;
        if session_holds(tables, service, &session, *now) {
            placement.pod = session.pod;
            if session.generation != service.generation || session.service_id != service.service_id {
                entry.set_generation(service.service_id, service.generation);
            }
            if now.saturating_sub(session.last_seen) >= SECOND {
                entry.set_last_seen(*now);
            }
            return;
        }
        placement.former = [session.pod, session.former];
    }
    let ServiceValue { service_id, generation, backend_count, .. } = *service;
    if backend_count == 0 {
        return;
    }
    let slot = slot_of_client(*peer, *external, backend_count);
    let Some(backend) = tables.backend(&BackendKey { service_id, generation, slot }) else {
        return;
    };
    placement.pod = backend.pod;
    if placement.former[0] == backend.pod {
        placement.former = [placement.former[1], Address::UNSPECIFIED];
    }
    tables.put_session(
        &key,
        &SessionValue {
            pod: backend.pod,
            former: placement.former[0],
            last_seen: *now,
            service_id,
            generation,
        },
    );
}

#[inline(always)]
fn session_holds<T: Tables>(tables: &T, service: &ServiceValue, session: &SessionValue, now: u64) -> bool {
    if now.saturating_sub(session.last_seen) > u64::from(service.affinity_timeout) * SECOND {
        return false;
    }
    let same_service = session.service_id == service.service_id;
    if same_service && session.generation == service.generation {
        return true;
    }
    // Something has changed since. The client stays if its pod is one of the Service's that now has the address; of the
    // same Service, if it has been there all along: a pod that left and another that came with its address are two.
    let key = MemberKey { pod: session.pod, service_id: service.service_id, padding: 0 };
    match tables.member(&key) {
        Some(member) => {
            member.flags & MEMBER_DRAINING == 0
                && (!same_service || member.since_generation <= session.generation)
        }
        None => false,
    }
}

/// Spreads clients over slots, the same way on every CPU, so that two first packets of a client agree.
#[inline(always)]
fn slot_of_client(peer: Address, external: Address, backend_count: u32) -> u32 {
    let [high, low] = peer.words();
    let [external_high, external_low] = external.words();
    // The finalizer of MurmurHash3, which spreads every input bit over all output bits.
    let mut hash = high.rotate_left(32) ^ low ^ external_high.rotate_left(13) ^ external_low.rotate_left(47);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    // The upper half of hash x count: a slot without a division.
    (((hash & 0xffff_ffff) * u64::from(backend_count)) >> 32) as u32
}

/// What came of looking after the flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Noted {
    /// A reply will find its external address.
    Yes,
    /// There is no pod for this packet.
    NoPod,
    /// The pod speaks with this client and port through another external address.
    Collision,
    /// The table would not take another flow.
    Full,
}

impl From<InsertError> for Noted {
    #[inline(always)]
    fn from(_: InsertError) -> Self {
        Self::Full
    }
}

/// Makes sure that a reply will find its external address. A conversation that the client still has with a former pod
/// stays there: `placement.pod` then becomes that one.
#[inline(never)]
fn note_flow<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) -> Noted {
    let Request { destination: ExternalKey { external }, peer, transport, now, .. } = request;
    let nowhere = placement.pod == Address::UNSPECIFIED;
    // Nothing comes back for an answer; of a later fragment the first one has noted the flow.
    if !matches!(transport.kind, Kind::Ordinary | Kind::Query) {
        return if nowhere { Noted::NoPod } else { Noted::Yes };
    }
    let mut key = transport.flow_of_request(placement.pod, *peer);
    let fresh = FlowValue {
        external: *external,
        last_seen: *now,
        service_id: request.service.service_id,
        delivery: DELIVERY_STACK,
        tcp_state: tcp_state_after(transport, 0),
        padding: 0,
    };
    if !nowhere && let Some(entry) = tables.flow(&key) {
        return continue_flow(tables, &key, &entry, &fresh, transport);
    }
    if !transport.opens() {
        for former in placement.former {
            if former == Address::UNSPECIFIED {
                break;
            }
            key.pod = former;
            if let Some(entry) = tables.flow(&key)
                && still_there(tables, request, &key, &entry.value())
            {
                placement.pod = former;
                return continue_flow(tables, &key, &entry, &fresh, transport);
            }
        }
        key.pod = placement.pod;
    }
    if nowhere {
        return Noted::NoPod;
    }
    match tables.insert_flow(&key, &fresh) {
        Ok(()) => Noted::Yes,
        Err(InsertError::Full) => Noted::Full,
        // Another CPU inserted it in between, for the same client and port. Which external address has won?
        Err(InsertError::Exists) => match tables.flow(&key) {
            Some(entry) if entry.value().external == *external => Noted::Yes,
            _ => Noted::Collision,
        },
    }
}

/// Whether a flow with a former pod of the client is this conversation, and the pod still one of the Service's.
#[inline(always)]
fn still_there<T: Tables>(tables: &T, request: &Request, key: &FlowKey, flow: &FlowValue) -> bool {
    let member = MemberKey { pod: key.pod, service_id: request.service.service_id, padding: 0 };
    flow.external == request.destination.external
        && !timeout::flow_is_over(key, flow, request.now)
        && tables.member(&member).is_some()
}

#[inline(always)]
fn continue_flow<T: Tables>(
    tables: &T,
    key: &FlowKey,
    entry: &T::Flow,
    fresh: &FlowValue,
    transport: &Transport,
) -> Noted {
    let now = fresh.last_seen;
    let flow = entry.value();
    let over =
        timeout::flow_is_over(key, &flow, now) || timeout::tcp_is_closed(flow.tcp_state) && transport.opens();
    // A reply could not tell which of the two external addresses it belongs to.
    if flow.external != fresh.external && !over {
        return Noted::Collision;
    }
    if over || flow.service_id != fresh.service_id || flow.delivery != fresh.delivery {
        // Another conversation; or this one goes on although the address has changed hands.
        let tcp_state = if over { fresh.tcp_state } else { tcp_state_after(transport, flow.tcp_state) };
        return match tables.replace_flow(key, &FlowValue { tcp_state, ..*fresh }) {
            Ok(()) => Noted::Yes,
            Err(error) => error.into(),
        };
    }
    entry.refresh(&flow, now, tcp_state_after(transport, flow.tcp_state));
    Noted::Yes
}

/// What a TCP connection's state becomes by a packet of the client.
///
/// A RST of the client only makes the flow a short-lived one: anyone can forge it who knows the ports, and the pod may
/// not have believed it (RFC 5961). A RST of the pod is the pod's.
#[inline(always)]
const fn tcp_state_after(transport: &Transport, state: u8) -> u8 {
    if transport.opens() || transport.protocol != protocol::TCP {
        return 0;
    }
    let flags = transport.tcp_flags;
    let mut state = state;
    if flags & (tcp_flags::FIN | tcp_flags::RST) != 0 {
        state |= TCP_REQUEST_FIN;
    }
    if flags & tcp_flags::ACK != 0 && state & TCP_REPLIED != 0 {
        state |= TCP_ESTABLISHED;
    }
    state
}

/// A packet that was sent to the pod's own address ends what is noted about an earlier conversation with the same ports
/// through an external address: the pod's answer belongs to this one. Of TCP, where it can be told, only a new
/// connection after the end of the old one.
#[inline(never)]
fn forget_flow<T: Tables>(tables: &T, request: &Request) {
    let Request { destination: ExternalKey { external: pod }, peer, transport, .. } = request;
    if !matches!(transport.kind, Kind::Ordinary | Kind::Query) {
        return;
    }
    let is_tcp = transport.protocol == protocol::TCP;
    if is_tcp && !transport.opens() {
        return;
    }
    let key = transport.flow_of_request(*pod, *peer);
    if let Some(entry) = tables.flow(&key) {
        let flow = entry.value();
        let ends = !is_tcp
            || timeout::tcp_is_closed(flow.tcp_state)
            || timeout::flow_is_over(&key, &flow, tables.now());
        if ends {
            tables.remove_flow(&key);
        }
    }
}
