//! Requests: a packet from a client to an external address goes to a pod.

use proxier_common::{
    Address, BackendKey, DELIVERY_DIRECT, DELIVERY_NODE, DELIVERY_PEER, DELIVERY_STACK, DropReason,
    ExternalKey, FlowValue, MEMBER_DRAINING, MemberKey, POD_HAS_PEER, PodKey, PodValue, SERVICE_BALANCE_FLOW,
    SERVICE_DIRECT, SERVICE_IS_NODE, SERVICE_IS_POD, SERVICE_PASS_WITHOUT_BACKEND, ServiceValue, SessionKey,
    SessionValue, SourceKey, Statistic, TCP_ESTABLISHED, TCP_REPLIED, TCP_REQUEST_FIN, is_direct, protocol,
    timeout::{self, SECOND},
};

use crate::{
    family::{Family, Fragment, Payload},
    fragment, icmp_error,
    packet::{NetworkHeader, Packet, WriteError},
    rewrite::{self, Replacement},
    tables::{FlowEntry, InsertError, SessionEntry, Tables},
    transport::{self, Kind, Transport, TransportError, tcp_flags},
    verdict::Verdict,
    verifier,
};

/// Where a request comes from.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From outside, by an uplink.
    Outside,
    /// From a pod on this node, by the pod's link.
    Pod,
    /// From a process of the node itself, on its way out.
    Node,
}

impl Origin {
    /// How a request from there reaches the pod, and its reply the client.
    #[inline(always)]
    pub(crate) const fn delivery(self) -> u8 {
        match self {
            Self::Outside | Self::Pod => DELIVERY_STACK,
            Self::Node => DELIVERY_NODE,
        }
    }

    /// Whether a request from there may go past the node's stack.
    #[inline(always)]
    pub(crate) fn may_be_direct<P: Packet>(self, packet: &P) -> bool {
        matches!(self, Self::Outside) && packet.can_pass_stack()
    }

    /// Whether the pod that a client is on may be the client itself.
    #[inline(always)]
    pub(crate) const fn is_local(self) -> bool {
        matches!(self, Self::Pod | Self::Node)
    }
}

/// Decides about a packet, and rewrites it if it is for an external address.
#[inline(always)]
pub fn request<P: Packet, T: Tables>(packet: &mut P, tables: &T, origin: Origin) -> Verdict {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => of_family::<crate::V4, P, T>(packet, tables, offset, origin),
        Some(NetworkHeader::V6(offset)) => of_family::<crate::V6, P, T>(packet, tables, offset, origin),
        None => Verdict::Next,
    }
}

/// A request of the node that was rewritten has refreshed its flow within this time, before it comes by the pod's link.
const JUST_NOW: u64 = 2 * SECOND;

/// Notes that a process of the node speaks to a pod's own address, if the packet is for one.
///
/// Not about a flow that was in use just now: the mark of a rewritten packet may have been lost on the way, for the kernel
/// puts the class into the same field where a classifier says so.
///
/// [`request`] does so for every other client, whose packets it sees.
#[inline(always)]
pub fn straight_to_pod<P: Packet, T: Tables>(packet: &P, tables: &T) {
    match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => straight_of_family::<crate::V4, P, T>(packet, tables, offset),
        Some(NetworkHeader::V6(offset)) => straight_of_family::<crate::V6, P, T>(packet, tables, offset),
        None => {}
    }
}

#[inline(never)]
fn straight_of_family<F: Family, P: Packet, T: Tables>(packet: &P, tables: &T, offset: u32) {
    let mut request = Request::within(packet.length(), DELIVERY_NODE, false);
    if !packet.is_rewritten() && read::<F, P, T>(packet, tables, offset, &mut request) == Read::Pod {
        forget_flow(tables, &request, JUST_NOW);
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
    let mut request = Request::within(packet.length(), origin.delivery(), origin.may_be_direct(packet));
    match read::<F, P, T>(packet, tables, offset, &mut request) {
        Read::NotOurs => return Some(request.left_alone(origin)),
        Read::Pod => {
            if !packet.is_rewritten() {
                forget_flow(tables, &request, if packet.may_have_lost_mark() { JUST_NOW } else { 0 });
            }
            return Some(request.left_alone(origin));
        }
        _ if P::COMES_AGAIN && !packet.is_for_host() => return Some(Verdict::Next),
        Read::External => {}
        Read::Malformed => return Some(Verdict::Drop(DropReason::Malformed)),
        Read::TinyFragment => return Some(Verdict::Drop(DropReason::TinyFragment)),
    }
    match request.transport.kind {
        Kind::NeighbourDiscovery | Kind::NeighbourRedirect => return Some(Verdict::Next),
        Kind::IcmpError if P::COMES_AGAIN && !packet.claim() => return Some(Verdict::Next),
        Kind::IcmpError => return None,
        _ => {}
    }
    let (external, peer) = (request.destination.external, request.peer);
    if peer == external {
        return Some(Verdict::Drop(DropReason::SpoofedSource));
    }
    // From an address that no uplink leads to, such as a link-local one, the answer would not find back.
    if let Origin::Node = origin
        && !is_node(tables, &request.peer)
    {
        return Some(Verdict::Next);
    }
    if request.service.source_generation != 0 && !is_permitted(tables, &request) {
        return Some(Verdict::Drop(DropReason::SourceNotAllowed));
    }
    if P::COMES_AGAIN && !is_for_here::<F, P>(packet, &request) {
        return Some(Verdict::Next);
    }
    request.now = tables.now();
    let mut placement = Placement {
        pod: Address::UNSPECIFIED,
        former: [Address::UNSPECIFIED; 2],
        delivery: request.delivery,
    };
    let is_later = matches!(request.payload.fragment, Fragment::Later);
    if !(is_later && follow_first::<F, T>(tables, &request, &mut placement)) {
        if is_later && request.service.flags & SERVICE_BALANCE_FLOW != 0 && request.service.backend_count > 1
        {
            return Some(Verdict::Drop(DropReason::FragmentWithoutFirst));
        }
        place(tables, &request, &mut placement);
    }
    let is_to_itself = origin.is_local() && placement.pod == peer;
    if !is_to_itself {
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
            Noted::Spoofed => return Some(Verdict::Drop(DropReason::SpoofedSource)),
        }
    }
    // A conversation that began so before the Service's setting changed.
    if P::COMES_AGAIN && is_direct(placement.delivery) {
        return Some(Verdict::Next);
    }
    if let Fragment::First = request.payload.fragment {
        lead_rest::<F, T>(tables, &request, placement.pod);
    }
    if is_to_itself {
        // The pod speaks to itself. Left with its own address as source it would not believe the packet, and the reply
        // would never leave it. From the external address it does, and the reply is a packet of the same kind: no flow.
        if request.service.flags & SERVICE_BALANCE_FLOW != 0 {
            keep_answer_here(tables, &request);
        }
        let written = send_back::<F, P>(packet, offset, &request);
        return Some(Verdict::of_write(written, Verdict::Hairpin));
    }
    packet.set_rewritten();
    let written = deliver::<F, P>(packet, offset, &request, &placement);
    // All fragments of a packet go through the stack: conntrack there would wait for one that does not.
    let verdict = match request.payload.fragment {
        Fragment::Whole => Verdict::to_pod(placement.delivery),
        Fragment::First | Fragment::Later => Verdict::Rewritten,
    };
    Some(Verdict::of_write(written, verdict))
}

/// Whether a packet that comes again is best rewritten here and now. What goes past the stack is not: whether it can is not known
/// before it comes again. Where nobody is to take it, it is dropped here all the same.
#[inline(always)]
fn is_for_here<F: Family, P: Packet>(packet: &mut P, request: &Request) -> bool {
    let Request { destination: ExternalKey { external }, peer, payload, transport, service, .. } = request;
    let goes_directly = service.flags & SERVICE_DIRECT != 0 && service.backend_count != 0;
    !goes_directly
        && rewrite::is_arithmetic::<F, P>(packet, payload, transport, external, peer)
        && packet.claim()
}

#[inline(never)]
fn send_back<F: Family, P: Packet>(packet: &mut P, offset: u32, request: &Request) -> Result<(), WriteError> {
    rewrite::exchange::<F, P>(packet, offset, request.destination.external, request.peer)
}

#[inline(always)]
fn deliver<F: Family, P: Packet>(
    packet: &mut P,
    offset: u32,
    request: &Request,
    placement: &Placement,
) -> Result<(), WriteError> {
    let Request { destination: ExternalKey { external }, peer, payload, transport, .. } = request;
    let replacement = Replacement { old: *external, new: placement.pod, other: *peer, hop_limit: None };
    rewrite::address::<F, P>(packet, (offset, F::DESTINATION), payload, transport, &replacement)
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
    /// As [`FlowValue::delivery`].
    delivery: u8,
    /// Whether the packet may go past the node's stack.
    may_be_direct: bool,
}

impl Request {
    /// To be filled in by [`read`], for a packet of this length that is delivered so.
    #[inline(always)]
    const fn within(length: u32, delivery: u8, may_be_direct: bool) -> Self {
        Self {
            destination: ExternalKey { external: Address::UNSPECIFIED },
            peer: Address::UNSPECIFIED,
            service: ServiceValue {
                service_id: 0,
                generation: 0,
                backend_count: 0,
                affinity_timeout: 0,
                flags: 0,
                source_generation: 0,
            },
            now: 0,
            payload: Payload::within(length, false),
            transport: Transport::EMPTY,
            delivery,
            may_be_direct,
        }
    }

    /// What becomes of a packet that is for no external address.
    #[inline(always)]
    const fn left_alone(&self, origin: Origin) -> Verdict {
        match origin {
            Origin::Pod if self.service.flags & SERVICE_IS_NODE != 0 => Verdict::ToNode,
            _ => Verdict::Next,
        }
    }

    /// A session of the client with `pod`, which has opened no TCP connection and was with no other pod before.
    #[inline(always)]
    const fn session_with(&self, pod: Address) -> SessionValue {
        SessionValue {
            pod,
            former: Address::UNSPECIFIED,
            last_seen: self.now,
            service_id: self.service.service_id,
            generation: self.service.generation,
            tcp_port: 0,
            tcp_peer_port: 0,
            padding: 0,
        }
    }

    /// A flow that was in use just now.
    #[inline(always)]
    const fn flow(&self, delivery: u8, tcp_state: u8) -> FlowValue {
        FlowValue {
            external: self.destination.external,
            last_seen: self.now,
            service_id: self.service.service_id,
            delivery,
            tcp_state,
            padding: 0,
        }
    }

    #[inline(always)]
    const fn session_key(&self) -> SessionKey {
        self.transport.session_of_request(self.destination.external, self.peer, self.service.flags)
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
    if service.flags & (SERVICE_IS_NODE | SERVICE_IS_POD) == SERVICE_IS_NODE {
        return Read::NotOurs;
    }
    let is_pod = service.flags & SERVICE_IS_POD != 0;
    if !F::payload(packet, offset, &header, &mut request.payload) {
        return if is_pod { Read::NotOurs } else { Read::Malformed };
    }
    match transport::read(packet, &request.payload, F::ICMP, &mut request.transport) {
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
    /// How it gets there, as [`FlowValue::delivery`].
    delivery: u8,
}

/// Whether the client's address is in one of the Service's source ranges.
#[inline(never)]
fn is_permitted<T: Tables>(tables: &T, request: &Request) -> bool {
    let ServiceValue { service_id, source_generation: generation, .. } = request.service;
    tables.is_permitted(&SourceKey { service_id, generation, address: request.peer })
}

/// Places a later fragment where the first one went. `false` if that has not come by.
#[inline(never)]
fn follow_first<F: Family, T: Tables>(tables: &T, request: &Request, placement: &mut Placement) -> bool {
    let key = fragment::key::<F>(request.destination.external, request.peer, &request.payload, 0);
    fragment::find(tables, &key, &mut placement.pod)
}

/// Lets the rest of a fragmented packet follow to `pod`.
#[inline(never)]
fn lead_rest<F: Family, T: Tables>(tables: &T, request: &Request, pod: Address) {
    let key = fragment::key::<F>(request.destination.external, request.peer, &request.payload, 0);
    fragment::remember(tables, &key, pod);
}

/// What answers a packet of a pod to itself has the ports the other way round. Where every conversation has a session of
/// its own, that is another one, and it must not lead elsewhere.
#[inline(never)]
fn keep_answer_here<T: Tables>(tables: &T, request: &Request) {
    let Request { destination: ExternalKey { external }, peer, transport, service, .. } = request;
    let key = transport.session_of_reply(*external, *peer, service.flags);
    tables.put_session(&key, &request.session_with(*peer));
}

/// Finds the pod that the client is on, or chooses one.
///
/// Not inlined, as [`note_flow`]: keys and values of both would not fit the kernel's stack side by side.
#[inline(never)]
fn place<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) {
    let Request { service, transport, now, .. } = request;
    let key = request.session_key();
    let (tcp_port, tcp_peer_port) =
        if transport.opens() { (transport.destination_port, transport.source_port) } else { (0, 0) };
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
            if transport.opens() {
                entry.set_tcp_ports(tcp_port, tcp_peer_port);
            }
            return;
        }
        placement.former = [session.pod, session.former];
    }
    let ServiceValue { service_id, generation, backend_count, .. } = *service;
    if backend_count == 0 {
        return;
    }
    let slot = slot_of_session(&key, backend_count);
    let Some(backend) = tables.backend(&BackendKey { service_id, generation, slot }) else {
        return;
    };
    placement.pod = backend.pod;
    if placement.former[0] == backend.pod {
        placement.former = [placement.former[1], Address::UNSPECIFIED];
    }
    let former = placement.former[0];
    let session = SessionValue { former, tcp_port, tcp_peer_port, ..request.session_with(backend.pod) };
    tables.put_session(&key, &session);
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

/// Spreads sessions over slots, the same way on every CPU, so that two first packets of a client agree.
#[inline(always)]
fn slot_of_session(key: &SessionKey, backend_count: u32) -> u32 {
    let [high, low] = key.peer.words();
    let [external_high, external_low] = key.external.words();
    let ports = u64::from(key.external_port) << 32 | u64::from(key.peer_port) << 8 | u64::from(key.protocol);
    // The finalizer of MurmurHash3, which spreads every input bit over all output bits.
    let mut hash =
        high.rotate_left(32) ^ low ^ external_high.rotate_left(13) ^ external_low.rotate_left(47) ^ ports;
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
    /// The client's address is the node's, and it has this conversation itself.
    Spoofed,
}

impl From<InsertError> for Noted {
    #[inline(always)]
    fn from(_: InsertError) -> Self {
        Self::Full
    }
}

/// Makes sure that a reply will find its external address. A conversation that the client still has with a former pod
/// stays there: `placement.pod` then becomes that one.
///
/// In steps, of which each has its keys and values on the kernel's stack for itself.
#[inline(always)]
fn note_flow<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) -> Noted {
    // Nothing comes back for an answer; of a later fragment the first one has noted the flow.
    if !matches!(request.transport.kind, Kind::Ordinary | Kind::Query) {
        return if placement.pod == Address::UNSPECIFIED { Noted::NoPod } else { Noted::Yes };
    }
    match find_flow(tables, request, placement) {
        Some(entry) => continue_flow(tables, request, placement, &entry),
        None if placement.pod == Address::UNSPECIFIED => Noted::NoPod,
        None => begin_flow(tables, request, placement),
    }
}

/// Finds the flow of the packet with the client's pod; else one that goes on with a former pod, which then is the pod.
#[inline(never)]
fn find_flow<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) -> Option<T::Flow> {
    let Request { destination: ExternalKey { external }, peer, transport, service, now, .. } = request;
    let mut key = transport.flow_of_request(placement.pod, *peer);
    if placement.pod != Address::UNSPECIFIED
        && let Some(entry) = tables.flow(&key)
    {
        return Some(entry);
    }
    if transport.opens() {
        return None;
    }
    for former in placement.former {
        if former == Address::UNSPECIFIED {
            return None;
        }
        key.pod = former;
        let Some(entry) = tables.flow(&key) else { continue };
        let flow = entry.value();
        let member = MemberKey { pod: former, service_id: service.service_id, padding: 0 };
        if flow.external != *external || tables.member(&member).is_none() {
            continue;
        }
        if timeout::flow_is_over(&key, &flow, *now) {
            return None;
        }
        placement.pod = former;
        return Some(entry);
    }
    None
}

/// The packet's conversation, or one that had the same ports before it.
#[inline(never)]
fn continue_flow<T: Tables>(
    tables: &T,
    request: &Request,
    placement: &mut Placement,
    entry: &T::Flow,
) -> Noted {
    let Request { peer, transport, now, may_be_direct, .. } = request;
    let key = transport.flow_of_request(placement.pod, *peer);
    let flow = entry.value();
    let is_over = timeout::flow_is_over(&key, &flow, *now)
        || timeout::tcp_is_closed(flow.tcp_state) && transport.opens();
    let delivery = match flow.delivery {
        // A conversation keeps its way.
        delivery if *may_be_direct && !is_over && delivery != DELIVERY_NODE => delivery,
        _ => delivery_to(tables, request, &placement.pod),
    };
    placement.delivery = delivery;
    // A reply could not tell which of the two external addresses it belongs to.
    if flow.external != request.destination.external && !is_over {
        return Noted::Collision;
    }
    // The node's own packets do not come in from outside, nor from a pod.
    if flow.delivery != delivery && delivery != DELIVERY_NODE && is_node(tables, peer) {
        return Noted::Spoofed;
    }
    if !is_over && flow.service_id == request.service.service_id && flow.delivery == delivery {
        entry.refresh(&flow, *now, tcp_state_after(transport, flow.tcp_state));
        return Noted::Yes;
    }
    // Another conversation; or this one goes on although the address has changed hands.
    let tcp_state = tcp_state_after(transport, if is_over { 0 } else { flow.tcp_state });
    match tables.replace_flow(&key, &request.flow(delivery, tcp_state)) {
        Ok(()) => Noted::Yes,
        Err(error) => error.into(),
    }
}

/// A new conversation.
#[inline(never)]
fn begin_flow<T: Tables>(tables: &T, request: &Request, placement: &mut Placement) -> Noted {
    let Request { destination: ExternalKey { external }, peer, transport, .. } = request;
    let key = transport.flow_of_request(placement.pod, *peer);
    placement.delivery = delivery_to(tables, request, &placement.pod);
    match tables.insert_flow(&key, &request.flow(placement.delivery, tcp_state_after(transport, 0))) {
        Ok(()) => {
            tables.count(Statistic::FlowInserted);
            Noted::Yes
        }
        Err(InsertError::Full) => Noted::Full,
        // Another CPU inserted it in between, for the same client and port. Which external address has won?
        Err(InsertError::Exists) => match tables.flow(&key) {
            Some(entry) if entry.value().external == *external => Noted::Yes,
            _ => Noted::Collision,
        },
    }
}

/// How a new conversation with a pod goes. Not directly if the client's address is one that leads to somebody on this node:
/// at the pod's link, whatever is for it would be a reply to a client outside.
#[inline(always)]
fn delivery_to<T: Tables>(tables: &T, request: &Request, pod: &Address) -> u8 {
    // As one path.
    (verifier::forget(find_delivery(tables, request, pod).into()) & 0xff) as u8
}

#[inline(never)]
fn find_delivery<T: Tables>(tables: &T, request: &Request, pod: &Address) -> u8 {
    if !request.may_be_direct
        || request.service.flags & SERVICE_DIRECT == 0
        || tables.service(&ExternalKey { external: request.peer }).is_some()
    {
        return request.delivery;
    }
    match tables.pod(&PodKey { pod: *pod }) {
        None | Some(PodValue { interface: 0, .. }) => DELIVERY_STACK,
        Some(PodValue { flags, .. }) if flags & POD_HAS_PEER != 0 => DELIVERY_PEER,
        Some(_) => DELIVERY_DIRECT,
    }
}

#[inline(never)]
fn is_node<T: Tables>(tables: &T, address: &Address) -> bool {
    let service = tables.service(&ExternalKey { external: *address });
    service.is_some_and(|service| service.flags & SERVICE_IS_NODE != 0)
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
/// connection after the end of the old one. And only if that has been idle for so long.
#[inline(never)]
fn forget_flow<T: Tables>(tables: &T, request: &Request, idle: u64) {
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
        if !ends || tables.now().saturating_sub(flow.last_seen) < idle {
            return;
        }
        tables.remove_flow(&key);
        tables.count(Statistic::FlowForgotten);
    }
    if is_tcp {
        forget_connection(tables, *pod, *peer, (transport.destination_port, transport.source_port));
    }
}

/// The session must not take a connection of the same ports for the one that the client opened through the external
/// address.
#[inline(always)]
fn forget_connection<T: Tables>(tables: &T, pod: Address, peer: Address, ports: (u16, u16)) {
    let Some(PodValue { external, flags, .. }) = tables.pod(&PodKey { pod }) else {
        return;
    };
    let key = transport::session_key(external, peer, protocol::TCP, ports, flags);
    if let Some(session) = tables.session(&key)
        && session.value().is_of_connection(pod, ports)
    {
        session.set_tcp_ports(0, 0);
    }
}
