//! ICMP errors (RFC 792, RFC 4443): the packet that one quotes is translated as well, in the opposite direction, or its
//! receiver would not know the conversation that it is about. Path-MTU discovery lives on this.
//!
//! ```text
//!   a router ──> EXT, quoting EXT -> client      becomes      a router ──> pod, quoting pod -> client
//!   pod or node ──> client, quoting client -> pod   becomes   EXT ──> client, quoting client -> EXT
//! ```
//!
//! An error about no conversation of ours is left alone. Flows are not refreshed: an error is no sign of life.

use proxier_common::{Address, DELIVERY_STACK, DropReason, FlowKey, SessionKey};

use crate::{
    checksum,
    family::{Family, Fragment, Payload},
    packet::{Packet, WriteError},
    tables::{FlowEntry, SessionEntry, Tables},
    transport::{self, Kind, Transport},
    verdict::Verdict,
};

/// Length of the part of an ICMP error before the packet that it quotes.
const ICMP_HEADER: u32 = 8;
/// Offset of the checksum in an ICMP message.
const ICMP_CHECKSUM: u32 = 2;

/// The packet that an error quotes.
struct Quote {
    offset: u32,
    source: Address,
    destination: Address,
    transport: Transport,
}

/// What becomes of one address.
struct Change {
    old: Address,
    new: Address,
}

/// An error that somebody on the way to the client sends to an external address: about a reply of a pod.
#[inline(never)]
pub(crate) fn to_pod<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    external: &Address,
    outer: &Payload,
) -> Verdict {
    let Some(quote) = quote::<F, P>(packet, outer) else {
        return Verdict::Next;
    };
    // The quote is a reply as it left.
    if quote.source != *external || !matches!(quote.transport.kind, Kind::Ordinary | Kind::Answer) {
        return Verdict::Next;
    }
    let peer = quote.destination;
    let Some(session) = tables.session(&SessionKey { external: *external, peer }) else {
        return Verdict::Next;
    };
    let pod = session.value().pod;
    let (pod_port, peer_port) = (quote.transport.source_port, quote.transport.destination_port);
    if flow_external(tables, &key(pod, peer, pod_port, peer_port, &quote.transport)) != Some(*external) {
        return Verdict::Next;
    }
    let change = Change { old: *external, new: pod };
    let written = mend_checksums::<F, P>(packet, outer, &quote, &change, &change)
        .and_then(|()| F::store_source(packet, quote.offset, pod, F::difference(*external, pod)))
        .and_then(|()| F::store_destination(packet, offset, pod, F::difference(*external, pod)));
    verdict(written)
}

/// An error that a pod, the node or somebody behind it sends to a client: about a request.
///
/// It leaves from the external address whoever made it, as with netfilter's NAT: to the client, nothing else is there.
#[inline(never)]
pub(crate) fn to_client<F: Family, P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    offset: u32,
    source: &Address,
    outer: &Payload,
) -> Verdict {
    let Some(quote) = quote::<F, P>(packet, outer) else {
        return Verdict::Next;
    };
    // The quote is a request as the pod was to get it.
    if !matches!(quote.transport.kind, Kind::Ordinary | Kind::Query) {
        return Verdict::Next;
    }
    let (pod, peer) = (quote.destination, quote.source);
    let (pod_port, peer_port) = (quote.transport.destination_port, quote.transport.source_port);
    let Some(external) = flow_external(tables, &key(pod, peer, pod_port, peer_port, &quote.transport)) else {
        return Verdict::Next;
    };
    let outer_change = Change { old: *source, new: external };
    let quoted_change = Change { old: pod, new: external };
    let written = mend_checksums::<F, P>(packet, outer, &quote, &outer_change, &quoted_change)
        .and_then(|()| F::store_destination(packet, quote.offset, external, F::difference(pod, external)))
        .and_then(|()| F::store_source(packet, offset, external, F::difference(*source, external)));
    verdict(written)
}

/// Finds and reads the quoted packet.
#[inline(always)]
fn quote<F: Family, P: Packet>(packet: &P, outer: &Payload) -> Option<Quote> {
    // An error in fragments carries its quote in pieces.
    if !matches!(outer.fragment, Fragment::Whole) {
        return None;
    }
    let offset = outer.offset + ICMP_HEADER;
    let header = F::header(packet, offset)?;
    let mut payload = Payload::within(outer.end, true);
    if !F::payload(packet, offset, &header, &mut payload) {
        return None;
    }
    let mut transport = Transport::EMPTY;
    transport::read(packet, &payload, &mut transport).ok()?;
    Some(Quote { offset, source: F::source(&header), destination: F::destination(&header), transport })
}

#[inline(always)]
fn key(pod: Address, peer: Address, pod_port: u16, peer_port: u16, transport: &Transport) -> FlowKey {
    FlowKey {
        pod,
        peer,
        pod_port,
        peer_port: if transport.query == 0 { peer_port } else { 0 },
        protocol: transport.protocol,
        query: transport.query,
        padding: 0,
    }
}

#[inline(always)]
fn flow_external<T: Tables>(tables: &T, key: &FlowKey) -> Option<Address> {
    let flow = tables.flow(key)?.value();
    (flow.delivery == DELIVERY_STACK).then_some(flow.external)
}

/// The checksum in the quote, where there is one, and the message's own, which covers the quote.
#[inline(always)]
fn mend_checksums<F: Family, P: Packet>(
    packet: &mut P,
    outer: &Payload,
    quote: &Quote,
    outer_change: &Change,
    quoted_change: &Change,
) -> Result<(), WriteError> {
    let outer_difference = F::difference(outer_change.old, outer_change.new);
    let quoted_difference = F::difference(quoted_change.old, quoted_change.new);
    let own_offset = outer.offset + ICMP_CHECKSUM;
    let own: u16 = packet.load(own_offset).ok_or(WriteError)?;
    let mut difference = F::error_difference(outer_difference, quoted_difference);
    let at = quote.transport.checksum_offset;
    if at != 0 {
        let old: u16 = packet.load(at).ok_or(WriteError)?;
        if !(quote.transport.zero_means_none && old == 0) {
            let new = match checksum::apply(old, quoted_difference) {
                0 if quote.transport.zero_means_none => 0xffff,
                new => new,
            };
            difference += u64::from(checksum::word_difference(old, new));
            packet.store_checksum(at, new)?;
        }
    }
    packet.store_checksum(own_offset, checksum::apply(own, checksum::fold_to_32(difference)))
}

#[inline(always)]
const fn verdict(written: Result<(), WriteError>) -> Verdict {
    match written {
        Ok(()) => Verdict::Rewritten,
        Err(WriteError) => Verdict::Drop(DropReason::RewriteFailed),
    }
}
