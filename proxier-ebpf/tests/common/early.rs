//! A packet as XDP sees it: nothing is known of its checksums, and tc sees it next.

use proxier_common::Address;
use proxier_ebpf::{
    NetworkHeader, Packet,
    family::V4Hop,
    host::HostPacket,
    packet::{Plain, Way, WriteError},
};

use super::{Net, Network, checksum_offset, frame, segment};

/// A frame that comes by tc, too.
#[derive(Clone, Debug)]
pub struct Early {
    pub packet: HostPacket,
    /// Whether it is for this host.
    pub is_for_host: bool,
    /// Whether there is room for a mark.
    pub has_room: bool,
    /// Whether room was made for one.
    pub is_claimed: bool,
    /// Whether it says that the packet was rewritten.
    pub is_marked: bool,
}

impl Early {
    pub const fn new(packet: HostPacket) -> Self {
        Self { packet, is_for_host: true, has_room: true, is_claimed: false, is_marked: false }
    }
}

impl Packet for Early {
    const COMES_AGAIN: bool = true;

    type Path = ();

    fn can_pass_stack(&self) -> bool {
        true
    }

    fn is_for_host(&mut self) -> bool {
        self.is_for_host
    }

    fn find_way(&self, _: &Address, _: &Address, _: u32, (): &mut ()) -> Way {
        panic!("the way is for tc to find");
    }

    fn onward_interface(&self, (): &()) -> u32 {
        panic!("the way is for tc to find");
    }

    fn is_of_link(&self, interface: u32) -> bool {
        self.packet.is_of_link(interface)
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn claim(&mut self) -> bool {
        self.is_claimed = self.has_room;
        self.has_room
    }

    fn set_rewritten(&mut self) {
        assert!(self.is_claimed, "there is no room for the mark");
        self.is_marked = true;
    }

    fn is_rewritten(&self) -> bool {
        true
    }

    fn network_header(&self) -> Option<NetworkHeader> {
        // Tags are for tc.
        match self.packet.network_header()? {
            header @ (NetworkHeader::V4(14) | NetworkHeader::V6(14)) => Some(header),
            _ => None,
        }
    }

    fn length(&self) -> u32 {
        self.packet.length()
    }

    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        self.packet.load(offset)
    }

    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError> {
        self.packet.adjust_transport_checksum(offset, difference, zero_means_none)
    }

    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError> {
        self.packet.store_checksum(offset, checksum)
    }

    fn store_v4_address(
        &mut self,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        time_to_live: Option<u8>,
    ) -> Result<(), WriteError> {
        self.packet.store_v4_address(offset, at, address, difference, time_to_live)
    }

    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError> {
        self.packet.store_v4_hop(offset, hop)
    }

    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError> {
        self.packet.store_hop_limit(offset, value)
    }

    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError> {
        self.packet.store_v6_address(offset, address)
    }
}

/// A request with the sum over its pseudo-header in the place of the checksum (`CHECKSUM_PARTIAL`).
pub fn left_to_hardware(net: &Net, protocol: u8) -> HostPacket {
    let mut segment = segment(protocol, (40_000, 53), b"the card will sum it up");
    let octets = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut sum = internet_checksum::Checksum::new();
    sum.add_bytes(&octets(net.client));
    sum.add_bytes(&octets(net.external));
    sum.add_bytes(&[0, protocol]);
    sum.add_bytes(&u16::try_from(segment.len()).unwrap().to_be_bytes());
    // The sum itself, where a checksum is its complement.
    let sum = sum.checksum().map(|byte| !byte);
    let at = checksum_offset(protocol).unwrap();
    segment[at..at + 2].copy_from_slice(&sum);
    frame(&Network::default(), net.client, net.external, protocol, &segment)
}
