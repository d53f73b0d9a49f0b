//! ICMP errors (RFC 792, RFC 4443): the packet that one quotes is translated as well, in the opposite direction, or its
//! receiver would not know the conversation that it is about. Path-MTU discovery lives on this.
//!
//! ```text
//!   a router ──> EXT, quoting EXT -> client      becomes      a router ──> pod, quoting pod -> client
//!   pod or node ──> client, quoting client -> pod   becomes   EXT ──> client, quoting client -> EXT
//! ```
//!
//! An error to an external address about no conversation of ours is dropped, as whatever is for one and is not understood;
//! one on its way to a client is left alone. Flows are not refreshed: an error is no sign of life. A redirect (RFC 792,
//! type 5) is dropped: its advice is about the way to the pod, and would be taken for one about the external
//! address; netfilter's NAT drops it too.

use proxier_common::{
    Address, DELIVERY_DIRECT, DELIVERY_STACK, DropReason, ExternalKey, FlowKey, FlowValue, PodKey, is_direct,
    is_of_place, protocol,
};

use crate::{
    checksum, direct,
    family::{Family, Fragment, Payload},
    packet::{Packet, WriteError},
    request::Origin,
    rewrite,
    tables::{FlowEntry, SessionEntry, Tables},
    transport::{self, Kind, Transport},
    verdict::Verdict,
};

/// Length of the part of an ICMP error before the packet that it quotes.
const ICMP_HEADER: u32 = 8;
/// Offset of the checksum in an ICMP message.
const ICMP_CHECKSUM: u32 = 2;

/// ICMP type 5, of IPv4 only: ICMPv6 has its redirects in neighbour discovery.
const REDIRECT: u8 = 5;

/// The packet that an error quotes.
struct Quote {
    offset: u32,
    source: Address,
    destination: Address,
    transport: Transport,
}

/// An error that somebody on the way to the client sends to an external address: about a reply of a pod.
#[inline(never)]
pub(crate) fn to_pod<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    origin: Origin,
) -> Verdict {
    let Some(outer) = Outer::read::<F, P>(packet, offset) else {
        return Verdict::Drop(DropReason::Malformed);
    };
    let Some(quote) = quote::<F, P>(packet, &outer) else {
        return Verdict::Drop(DropReason::UnrelatedError);
    };
    let (external, peer) = (outer.destination, quote.destination);
    if quote.source != external {
        return Verdict::Drop(DropReason::UnrelatedError);
    }
    let session = tables
        .service(&ExternalKey { external })
        .and_then(|service| tables.session(&quote.transport.session_of_reply(external, peer, service.flags)));
    let Some(session) = session else {
        return Verdict::Drop(DropReason::UnrelatedError);
    };
    let mut pod = session.value().pod;
    if origin.is_local() && pod == peer && outer.source == pod {
        // The pod's own error about a packet that it sent to itself: both go back the way that packet came.
        let written = rewrite::exchange::<F, P>(packet, quote.offset, pod, external)
            .and_then(|()| rewrite::exchange::<F, P>(packet, offset, external, pod));
        return Verdict::of_write(written, Verdict::Hairpin);
    }
    // The quote is a reply as it left.
    if !matches!(quote.transport.kind, Kind::Ordinary | Kind::Answer) {
        return Verdict::Drop(DropReason::UnrelatedError);
    }
    let mut key = quote.transport.flow_of_reply(pod, peer);
    let mut flow = flow_of(tables, &key, origin.delivery());
    if flow.external != external {
        // The conversation may be one with the client's former pod.
        pod = session.value().former;
        key.pod = pod;
        flow = flow_of(tables, &key, origin.delivery());
        if flow.external != external {
            return Verdict::Drop(DropReason::UnrelatedError);
        }
    }
    if outer.is_redirect::<F>() {
        return Verdict::Drop(DropReason::IcmpRedirect);
    }
    // To conntrack, an error about a conversation that it has not seen is invalid.
    let delivery = if origin.may_be_direct(packet) { flow.delivery } else { DELIVERY_STACK };
    if P::COMES_AGAIN && is_direct(delivery) {
        return Verdict::Next;
    }
    let difference = F::difference(external, pod);
    let written = mend_checksums::<F, P>(packet, &outer, &quote, difference, difference)
        .and_then(|()| F::store_address(packet, quote.offset, F::SOURCE, pod, difference, None))
        .and_then(|()| F::store_address(packet, offset, F::DESTINATION, pod, difference, None));
    Verdict::of_write(written, Verdict::to_pod(delivery))
}

/// An error that a pod, the node or somebody behind it sends to a client: about a request.
///
/// It leaves from the external address whoever made it, as with netfilter's NAT: to the client, nothing else is there.
#[inline(never)]
pub(crate) fn to_client<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    delivery: u8,
) -> Verdict {
    let Some(outer) = Outer::read::<F, P>(packet, offset) else {
        return Verdict::Next;
    };
    let Some(quote) = quote::<F, P>(packet, &outer) else {
        return Verdict::Next;
    };
    // The quote is a request as the pod was to get it.
    if !matches!(quote.transport.kind, Kind::Ordinary | Kind::Query) {
        return Verdict::Next;
    }
    let (pod, peer) = (quote.destination, quote.source);
    // An error goes to whoever sent the packet: anything else is made up.
    if peer != outer.destination {
        return Verdict::Next;
    }
    let key = quote.transport.flow_of_request(pod, peer);
    let external = flow_of(tables, &key, delivery).external;
    if external == Address::UNSPECIFIED {
        return Verdict::Next;
    }
    if outer.is_redirect::<F>() {
        return Verdict::Drop(DropReason::IcmpRedirect);
    }
    // As of any reply: from the pod's own link only.
    if delivery == DELIVERY_DIRECT
        && !tables.pod(&PodKey { pod }).is_some_and(|pod| direct::is_by_link_of(packet, &pod))
    {
        return Verdict::Next;
    }
    let outer_difference = F::difference(outer.source, external);
    let quoted_difference = F::difference(pod, external);
    let written = mend_checksums::<F, P>(packet, &outer, &quote, outer_difference, quoted_difference)
        .and_then(|()| {
            F::store_address(packet, quote.offset, F::DESTINATION, external, quoted_difference, None)
        })
        .and_then(|()| F::store_address(packet, offset, F::SOURCE, external, outer_difference, None));
    // Nobody is told of an error that finds no way, so it need not be the pod's any more.
    let onward = if delivery == DELIVERY_DIRECT { Verdict::Forward } else { Verdict::Rewritten };
    Verdict::of_write(written, onward)
}

/// The error itself.
#[repr(C)]
struct Outer {
    source: Address,
    destination: Address,
    payload: Payload,
    icmp_type: u8,
}

impl Outer {
    /// Reads it again: whoever found out that it is an error is done, and has given back its stack.
    #[inline(always)]
    fn read<F: Family, P: Packet>(packet: &P, offset: u32) -> Option<Self> {
        let header = F::header(packet, offset)?;
        let mut payload = Payload::within(packet.length(), false);
        if !F::payload(packet, offset, &header, &mut payload) {
            return None;
        }
        let icmp_type = packet.load(payload.offset)?;
        Some(Self { source: F::source(&header), destination: F::destination(&header), payload, icmp_type })
    }

    #[inline(always)]
    fn is_redirect<F: Family>(&self) -> bool {
        F::ICMP == protocol::ICMP && self.icmp_type == REDIRECT
    }
}

/// Finds and reads the quoted packet.
#[inline(always)]
fn quote<F: Family, P: Packet>(packet: &P, outer: &Outer) -> Option<Quote> {
    // An error in fragments carries its quote in pieces.
    if !matches!(outer.payload.fragment, Fragment::Whole) {
        return None;
    }
    let offset = outer.payload.offset + ICMP_HEADER;
    let header = F::header(packet, offset)?;
    let mut payload = Payload::within(outer.payload.end, true);
    if !F::payload(packet, offset, &header, &mut payload) {
        return None;
    }
    let mut transport = Transport::EMPTY;
    transport::read(packet, &payload, F::ICMP, &mut transport).ok()?;
    Some(Quote { offset, source: F::source(&header), destination: F::destination(&header), transport })
}

/// What of a flow is asked here.
#[repr(C)]
struct Conversation {
    /// [`Address::UNSPECIFIED`] if there is no such flow that is rewritten here.
    external: Address,
    delivery: u8,
}

#[inline(always)]
fn flow_of<T: Tables>(tables: &T, key: &FlowKey, place: u8) -> Conversation {
    match tables.flow(key) {
        Some(entry) if is_of_place(entry.value().delivery, place) => {
            let FlowValue { external, delivery, .. } = entry.value();
            Conversation { external, delivery }
        }
        _ => Conversation { external: Address::UNSPECIFIED, delivery: 0 },
    }
}

/// The checksum in the quote, where there is one, and the message's own, which covers the quote.
#[inline(always)]
fn mend_checksums<F: Family, P: Packet>(
    packet: &mut P,
    outer: &Outer,
    quote: &Quote,
    outer_difference: u32,
    quoted_difference: u32,
) -> Result<(), WriteError> {
    let own_offset = outer.payload.offset + ICMP_CHECKSUM;
    let own: u16 = packet.load(own_offset).ok_or(WriteError)?;
    let mut difference = F::error_difference(outer_difference, quoted_difference);
    let at = quote.transport.checksum_offset;
    if at != 0 {
        let old: u16 = packet.load(at).ok_or(WriteError)?;
        if !(quote.transport.zero_means_none && old == 0) {
            let new = checksum::apply_as(quote.transport.zero_means_none, old, quoted_difference);
            difference += u64::from(checksum::word_difference(old, new));
            packet.store_checksum(at, new)?;
        }
    }
    packet.store_checksum(own_offset, checksum::apply(own, checksum::fold_to_32(difference)))
}
