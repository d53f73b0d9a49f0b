//! A kernel that refuses to read or write: nothing is written before everything has been read, and a packet that could not
//! be written to its end goes nowhere.

mod common;

use std::cell::Cell;

use common::*;
use proxier_common::{Address, DELIVERY_STACK, DropReason};
use proxier_ebpf::{
    InsertError, NetworkHeader, Origin, Packet, Plain, Tables, Verdict,
    family::V4Hop,
    host::{HostPacket, HostTables},
    packet::WriteError,
};

/// A packet of which so many reads and writes succeed, and no more.
struct Refusing {
    packet: HostPacket,
    reads: Cell<u32>,
    writes: Cell<u32>,
}

impl Refusing {
    const ALL: u32 = 1_000;

    fn new(packet: &HostPacket, reads: u32, writes: u32) -> Self {
        Self { packet: packet.clone(), reads: Cell::new(reads), writes: Cell::new(writes) }
    }

    fn take(left: &Cell<u32>) -> bool {
        let number = left.get();
        left.set(number.saturating_sub(1));
        number > 0
    }

    fn if_written(
        &mut self,
        write: impl FnOnce(&mut HostPacket) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        if Self::take(&self.writes) { write(&mut self.packet) } else { Err(WriteError) }
    }
}

impl Packet for Refusing {
    type Path = <HostPacket as Packet>::Path;

    fn can_pass_stack(&self) -> bool {
        self.packet.can_pass_stack()
    }

    fn find_way(
        &self,
        source: &Address,
        destination: &Address,
        length: u32,
        path: &mut Self::Path,
    ) -> proxier_ebpf::Way {
        self.packet.find_way(source, destination, length, path)
    }

    fn segment_size(&self) -> u32 {
        self.packet.segment_size()
    }

    fn onward_interface(&self, path: &Self::Path) -> u32 {
        self.packet.onward_interface(path)
    }

    fn is_of_link(&self, interface: u32) -> bool {
        self.packet.is_of_link(interface)
    }

    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError> {
        self.if_written(|packet| packet.store_v4_hop(offset, hop))
    }

    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError> {
        self.if_written(|packet| packet.store_hop_limit(offset, value))
    }

    fn network_header(&self) -> Option<NetworkHeader> {
        self.packet.network_header()
    }

    fn length(&self) -> u32 {
        self.packet.length()
    }

    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        Self::take(&self.reads).then(|| self.packet.load(offset)).flatten()
    }

    fn set_rewritten(&mut self) {
        self.packet.set_rewritten();
    }

    fn is_rewritten(&self) -> bool {
        self.packet.is_rewritten()
    }

    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError> {
        self.if_written(|packet| packet.adjust_transport_checksum(offset, difference, zero_means_none))
    }

    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError> {
        self.if_written(|packet| packet.store_checksum(offset, checksum))
    }

    fn store_v4_address(
        &mut self,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        time_to_live: Option<u8>,
    ) -> Result<(), WriteError> {
        self.if_written(|packet| packet.store_v4_address(offset, at, address, difference, time_to_live))
    }

    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError> {
        self.if_written(|packet| packet.store_v6_address(offset, address))
    }
}

type Way = fn(&mut Refusing, &HostTables) -> Verdict;

fn incoming(packet: &mut Refusing, tables: &HostTables) -> Verdict {
    proxier_ebpf::request(packet, tables, Origin::Outside)
}

fn from_pod(packet: &mut Refusing, tables: &HostTables) -> Verdict {
    proxier_ebpf::request(packet, tables, Origin::Pod)
}

fn outgoing(packet: &mut Refusing, tables: &HostTables) -> Verdict {
    proxier_ebpf::reply(packet, tables, DELIVERY_STACK)
}

/// Tables with a conversation of the client and one of the pod with itself.
fn opened(net: &Net, protocol: u8) -> HostTables {
    let tables = tables(&[net.external], &[net.pod]);
    let mut packet = plain(net.client, net.external, protocol, (40_000, 443));
    assert_eq!(request(&mut packet, &tables), Verdict::Rewritten);
    let mut packet = plain(net.pod, net.external, protocol, (40_000, 443));
    assert_eq!(request_of_pod(&mut packet, &tables), Verdict::Hairpin);
    tables
}

/// Every way that a packet is rewritten.
fn ways(net: &Net, protocol: u8) -> Vec<(&'static str, Way, HostPacket, Verdict)> {
    let (there, back) = ((40_000, 443), (443, 40_000));
    let about_reply = plain(net.external, net.client, protocol, back);
    let about_request = plain(net.client, net.pod, protocol, there);
    let about_itself = plain(net.external, net.pod, protocol, there);
    let kind = errors(net)[1];
    let error = |source, destination, about| error(net, source, destination, kind, about, usize::MAX);
    vec![
        ("request", incoming, plain(net.client, net.external, protocol, there), Verdict::Rewritten),
        ("reply", outgoing, plain(net.pod, net.client, protocol, back), Verdict::Rewritten),
        ("to itself", from_pod, plain(net.pod, net.external, protocol, there), Verdict::Hairpin),
        ("error in", incoming, error(router(net), net.external, &about_reply), Verdict::Rewritten),
        ("error out", outgoing, error(net.pod, net.client, &about_request), Verdict::Rewritten),
        ("error to itself", from_pod, error(net.pod, net.external, &about_itself), Verdict::Hairpin),
    ]
}

#[test]
fn what_cannot_be_read_to_its_end_is_untouched() {
    for net in BOTH {
        for protocol in [TCP, UDP] {
            for (name, way, original, verdict) in ways(&net, protocol) {
                let enough = (0..Refusing::ALL).find(|&reads| {
                    let mut packet = Refusing::new(&original, reads, Refusing::ALL);
                    let decided = way(&mut packet, &opened(&net, protocol));
                    if matches!(decided, Verdict::Next | Verdict::Drop(_)) {
                        assert_eq!(packet.packet, original, "{name}, {reads} reads");
                        return false;
                    }
                    assert_eq!(decided, verdict, "{name}, {reads} reads");
                    true
                });
                assert!(enough.unwrap() >= 2, "{name} reads header and ports at least");
            }
        }
    }
}

#[test]
fn what_cannot_be_written_to_its_end_is_dropped() {
    for net in BOTH {
        for protocol in [TCP, UDP, SCTP] {
            for (name, way, original, verdict) in ways(&net, protocol) {
                let enough = (0..Refusing::ALL).find(|&writes| {
                    let mut packet = Refusing::new(&original, Refusing::ALL, writes);
                    let decided = way(&mut packet, &opened(&net, protocol));
                    if writes == 0 {
                        assert_eq!(packet.packet, original, "{name}");
                    }
                    if decided == Verdict::Drop(DropReason::RewriteFailed) {
                        return false;
                    }
                    assert_eq!(decided, verdict, "{name}, {writes} writes");
                    true
                });
                assert!(enough.unwrap() >= 1, "{name} is written to");
            }
        }
    }
}

#[test]
fn a_host_packet_is_not_read_or_written_past_its_end() {
    let original = HostPacket::new(vec![7; 20]);
    let mut packet = original.clone();
    assert_eq!(packet.load::<[u8; 4]>(16), Some([7; 4]));
    assert_eq!(packet.load::<[u8; 4]>(17), None);
    assert_eq!(packet.load::<u8>(u32::MAX), None);
    assert_eq!(packet.store_checksum(19, 0), Err(WriteError));
    assert_eq!(packet.adjust_transport_checksum(19, 0, false), Err(WriteError));
    assert_eq!(packet.store_v4_address(1, 16, Address::UNSPECIFIED, 0, None), Err(WriteError));
    assert_eq!(packet.store_v6_address(5, Address::UNSPECIFIED), Err(WriteError));
    assert_eq!(packet, original);
    packet.store_checksum(18, 0).unwrap();
    packet.adjust_transport_checksum(18, 1, true).unwrap();
    assert_eq!(packet.load::<u16>(18), Some(0), "none stays none");
    packet.adjust_transport_checksum(18, 1, false).unwrap();
    assert_ne!(packet.load::<u16>(18), Some(0));
}

#[test]
fn a_host_flow_that_is_there_is_not_inserted_again() {
    let tables = tables(&[V4.external], &[V4.pod]);
    request(&mut plain(V4.client, V4.external, UDP, (1, 2)), &tables);
    let (key, flow) = only_flow(&tables);
    let value = flow.0.get();
    assert_eq!(tables.insert_flow(&key, &value), Err(InsertError::Exists));
}
