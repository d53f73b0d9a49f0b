use etherparse::checksum::Sum16BitWords;

use super::*;

fn both_families() -> [(SocketAddr, SocketAddr); 2] {
    [
        ("192.168.1.100:41000".parse().unwrap(), "10.0.0.55:5060".parse().unwrap()),
        ("[fd00:1::100]:41000".parse().unwrap(), "[1000::55]:5060".parse().unwrap()),
    ]
}

fn one_of_each(source: SocketAddr, destination: SocketAddr) -> Vec<Packet> {
    let (from, to) = (source.ip(), destination.ip());
    vec![
        Packet::tcp(source, destination, TcpFlags { syn: true, ..TcpFlags::default() }, 7, b""),
        Packet::tcp(source, destination, TcpFlags { ack: true, ..TcpFlags::default() }, 8, b"odd"),
        Packet::udp(source, destination, b"hello"),
        Packet::udp(source, destination, b""),
        Packet::udplite(source, destination, 0, b"hello"),
        Packet::udplite(source, destination, 8, b"hello"),
        Packet::sctp_init(source, destination, 77),
        Packet::sctp_init_ack(source, destination, 77, b"cookies"),
        Packet::dccp(source, destination, DCCP_REQUEST, b"hi"),
        Packet::dccp(source, destination, DCCP_RESPONSE, b"hi"),
        Packet::echo_request(from, to, 9, 1, b"abc"),
        Packet::gre(from, to, 5, b"inside"),
        Packet::esp(from, to, 5, 1, b"inside"),
    ]
}

#[test]
fn every_packet_reads_back_as_it_was_built() {
    for (source, destination) in both_families() {
        for packet in one_of_each(source, destination) {
            assert_eq!(Packet::decode(&packet.encode()).unwrap(), packet);
            packet.check_checksum().unwrap();
        }
    }
}

/// etherparse's own packet parser and checksum functions agree with what is put together here.
#[test]
fn etherparse_finds_the_checksums_right() {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    for (source, destination) in both_families() {
        for packet in one_of_each(source, destination) {
            let bytes = packet.encode();
            let sliced = SlicedPacket::from_ip(&bytes).unwrap();
            let expected = match (sliced.net.unwrap(), sliced.transport) {
                (NetSlice::Ipv4(ip), Some(TransportSlice::Tcp(tcp))) => {
                    let header = ip.header();
                    tcp.to_header().calc_checksum_ipv4_raw(
                        header.source(),
                        header.destination(),
                        tcp.payload(),
                    )
                }
                (NetSlice::Ipv6(ip), Some(TransportSlice::Tcp(tcp))) => {
                    let header = ip.header();
                    tcp.to_header().calc_checksum_ipv6_raw(
                        header.source(),
                        header.destination(),
                        tcp.payload(),
                    )
                }
                (NetSlice::Ipv4(ip), Some(TransportSlice::Udp(udp))) => {
                    let header = ip.header();
                    udp.to_header().calc_checksum_ipv4_raw(
                        header.source(),
                        header.destination(),
                        udp.payload(),
                    )
                }
                (NetSlice::Ipv6(ip), Some(TransportSlice::Udp(udp))) => {
                    let header = ip.header();
                    udp.to_header().calc_checksum_ipv6_raw(
                        header.source(),
                        header.destination(),
                        udp.payload(),
                    )
                }
                _ => continue,
            }
            .unwrap();
            let offset = if packet.protocol == protocol::TCP { 16 } else { 6 };
            assert_eq!(packet.payload[offset..offset + 2], expected.to_be_bytes(), "{packet}");
        }
    }
}

#[test]
fn a_flipped_bit_is_found() {
    for (source, destination) in both_families() {
        for mut packet in one_of_each(source, destination) {
            if [protocol::GRE, protocol::ESP].contains(&packet.protocol) {
                continue;
            }
            packet.payload[1] ^= 0x10;
            packet.check_checksum().unwrap_err();
        }
    }
}

#[test]
fn a_wrong_address_is_found_where_the_checksum_covers_it() {
    for (source, destination) in both_families() {
        for mut packet in one_of_each(source, destination) {
            packet.destination = packet.source;
            let covered =
                ![protocol::GRE, protocol::ESP, protocol::SCTP, protocol::ICMP].contains(&packet.protocol);
            assert_eq!(packet.check_checksum().is_err(), covered, "{packet}");
        }
    }
}

#[test]
fn a_sum_left_to_the_hardware_covers_addresses_and_length() {
    for (source, destination) in both_families() {
        for mut packet in [
            Packet::tcp(source, destination, TcpFlags::default(), 7, b"data"),
            Packet::udp(source, destination, b"data"),
        ] {
            packet.check_checksum_left_to_hardware().unwrap_err();
            let offset = if packet.protocol == protocol::TCP { 16 } else { 6 };
            let sum = !packet.pseudo_header_sum(packet.payload.len()).ones_complement();
            packet.payload[offset..offset + 2].copy_from_slice(&sum.to_ne_bytes());
            packet.check_checksum_left_to_hardware().unwrap();
            // Filling in the rest, as the hardware would, makes the packet right.
            let filled = Sum16BitWords::new().add_slice(&packet.payload).ones_complement();
            let mut whole = packet.clone();
            whole.payload[offset..offset + 2].copy_from_slice(&filled.to_ne_bytes());
            whole.check_checksum().unwrap();
            let longer = Packet { payload: [&packet.payload[..], b"!"].concat(), ..packet.clone() };
            longer.check_checksum_left_to_hardware().unwrap_err();
            packet.destination = packet.source;
            packet.check_checksum_left_to_hardware().unwrap_err();
        }
    }
}

#[test]
fn options_extensions_and_fragments_read_back() {
    let [(v4, to_v4), (v6, to_v6)] = both_families();
    let with_options = Packet::udp(v4, to_v4, &[7; 100]).with_ipv4_options();
    let with_extensions = Packet::udp(v6, to_v6, &[7; 100])
        .with_extension(protocol::HOP_BY_HOP)
        .with_extension(protocol::DESTINATION_OPTIONS);
    for packet in [with_options, with_extensions] {
        assert_eq!(Packet::decode(&packet.encode()).unwrap(), packet);
        let pieces = packet.fragments(0x1234, 40);
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces.iter().flat_map(|piece| piece.payload.clone()).collect::<Vec<_>>(), packet.payload);
        assert!(pieces[0].ports().is_some() && pieces[1].ports().is_none());
        for piece in &pieces {
            assert_eq!(&Packet::decode(&piece.encode()).unwrap(), piece);
        }
    }
}

#[test]
fn a_packet_that_ends_early_is_no_packet() {
    for (source, destination) in both_families() {
        let bytes = Packet::udp(source, destination, b"hello").encode();
        for end in 0..bytes.len() {
            Packet::decode(&bytes[..end]).unwrap_err();
        }
    }
}
