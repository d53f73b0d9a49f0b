//! Telling of packets dropped: exactly by counters, and by samples on the ring buffer.

use proxier_common::{Address, DropEvent, DropReason, ExternalKey, Hook, PodKey, protocol};
use proxier_ebpf::{
    Family, NetworkHeader, Packet, Tables, V4, V6,
    family::{Fragment, Payload, V6_HEADER_LENGTH},
    verifier,
};

use super::maps::{self, KernelTables};

/// A packet at an interface.
pub(super) trait AtInterface: Packet {
    /// Its index.
    fn interface(&self) -> u32;
}

/// Counts a packet dropped, and reports it if not too many have been already.
#[inline(never)]
pub(super) fn dropped<P: AtInterface>(packet: &P, reason: DropReason, hook: Hook) {
    // Every reason is a path of its own up to here; they go on as one.
    let reason = verifier::forget(reason as u32);
    let counter = hook.counter_at(reason);
    maps::count_drop(counter);
    let now = KernelTables.now();
    if maps::take_event_budget(counter, now) {
        let mut event = DropEvent {
            time: now,
            source: Address::UNSPECIFIED,
            destination: Address::UNSPECIFIED,
            service_id: 0,
            length: 0,
            interface: 0,
            source_port: 0,
            destination_port: 0,
            protocol: DropEvent::UNKNOWN_PROTOCOL,
            // Numbers below 64 and 8 (`DROP_COUNTERS`).
            reason: (reason & 0xff) as u8,
            hook: hook as u8,
            padding: [0; 5],
        };
        describe(packet, &mut event);
        maps::report(&event);
    }
}

/// Reads the packet once more: what the core knew of it is gone with its stack. Not behind IPv6 extension headers: the
/// walk along them is what the verifier spends most of its patience on, and here is but a sample.
#[inline(never)]
fn describe<P: AtInterface>(packet: &P, event: &mut DropEvent) {
    event.length = packet.length();
    event.interface = packet.interface();
    let transport = match packet.network_header() {
        Some(NetworkHeader::V4(offset)) => describe_v4(packet, offset, event),
        Some(NetworkHeader::V6(offset)) => describe_v6(packet, offset, event),
        None => return,
    };
    event.service_id = service_of(event.destination);
    if event.service_id == 0
        && let Some(pod) = KernelTables.pod(&PodKey { pod: event.destination })
    {
        // Rewritten already: a request of the node itself that found no way to the pod.
        event.service_id = service_of(pod.external);
    }
    if let Some(offset) = transport
        && protocol::has_ports(event.protocol)
        && let Some([source_port, destination_port]) = packet.load::<[u16; 2]>(offset)
    {
        event.source_port = source_port;
        event.destination_port = destination_port;
    }
}

/// The Service that an external address belongs to; 0 if none.
#[inline(always)]
fn service_of(external: Address) -> u32 {
    KernelTables.service(&ExternalKey { external }).map_or(0, |service| service.service_id)
}

/// Where the transport header is, unless this is a later fragment, which has none.
#[inline(always)]
fn describe_v4<P: Packet>(packet: &P, offset: u32, event: &mut DropEvent) -> Option<u32> {
    let header = V4::header(packet, offset)?;
    event.source = V4::source(&header);
    event.destination = V4::destination(&header);
    let mut payload = Payload::within(packet.length(), false);
    if !V4::payload(packet, offset, &header, &mut payload) {
        return None;
    }
    event.protocol = payload.protocol;
    (!matches!(payload.fragment, Fragment::Later)).then_some(payload.offset)
}

/// As [`describe_v4`].
#[inline(always)]
fn describe_v6<P: Packet>(packet: &P, offset: u32, event: &mut DropEvent) -> Option<u32> {
    let header = V6::header(packet, offset)?;
    event.source = V6::source(&header);
    event.destination = V6::destination(&header);
    event.protocol = header.next_header;
    Some(offset + V6_HEADER_LENGTH)
}
