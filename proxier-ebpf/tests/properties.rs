//! What holds for any packet: a rewrite and its reverse are the identity, every checksum is what an independent crate
//! computes from scratch, and a packet is either wholly rewritten or untouched.

mod common;

use common::*;
use proptest::prelude::*;
use proxier_ebpf::{Verdict, host::HostPacket};

fn any_network() -> impl Strategy<Value = Network> {
    let extension = prop_oneof![
        // Destination options or a routing header that has been followed, filled with padding.
        (prop::sample::select(vec![43_u8, 60]), 0..3_u8).prop_map(|(number, words)| {
            let mut body = vec![words, 0, 0];
            body.resize(7 + usize::from(words) * 8, 0);
            (number, body)
        }),
        (1..4_u8).prop_map(|words| {
            let mut body = vec![words * 2];
            body.resize((usize::from(words) * 2 + 2) * 4 - 1, 0x5a);
            (51, body)
        }),
    ];
    (
        prop::collection::vec(0..4096_u16, 0..3),
        0..10_usize,
        any::<bool>(),
        prop::collection::vec(extension, 0..7),
        0..20_usize,
    )
        .prop_map(|(vlans, option_words, hop_by_hop, mut extensions, padding)| {
            if hop_by_hop {
                // The first place is the only one it may have (RFC 8200, section 4.1).
                extensions.insert(0, (0, vec![0; 7]));
            }
            Network { vlans, options: vec![1; option_words * 4], extensions, fragment: None, padding }
        })
}

fn any_net() -> impl Strategy<Value = Net> {
    prop::sample::select(BOTH.to_vec())
}

/// Protocol and ports as [`segment`] wants them; of ICMP a query.
fn any_conversation(net: Net) -> impl Strategy<Value = (u8, (u16, u16))> {
    let query = if net.icmp == ICMP { 8 } else { 128 };
    prop_oneof![
        (prop::sample::select(vec![TCP, UDP, UDPLITE, SCTP, DCCP]), any::<(u16, u16)>()),
        any::<u16>().prop_map(move |identifier| (net.icmp, (query, identifier))),
        (prop::sample::select(vec![4_u8, 41, 47, 50, 89, 112, 253]), Just((0, 0))),
    ]
}

fn any_case() -> impl Strategy<Value = (Net, Network, u8, (u16, u16), Vec<u8>)> {
    any_net().prop_flat_map(|net| {
        (any_network(), any_conversation(net), prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(move |(network, (protocol, ports), payload)| (net, network, protocol, ports, payload))
    })
}

/// The pod's answer to what it has received, as an echo: addresses and ports swapped.
fn answer(net: &Net, protocol: u8, ports: (u16, u16)) -> (u8, (u16, u16)) {
    match (protocol, ports) {
        (ICMP, (8, identifier)) => (ICMP, (0, identifier)),
        (ICMPV6, (128, identifier)) => (ICMPV6, (129, identifier)),
        (protocol, (source, destination)) if protocol != net.icmp => (protocol, (destination, source)),
        other => panic!("{other:?} is no request"),
    }
}

proptest! {
    #[test]
    fn a_request_changes_the_destination_and_the_checksums_and_nothing_else(
        (net, network, protocol, ports, payload) in any_case(),
    ) {
        let tables = tables(&[net.external], &[net.pod]);
        let mut rewritten = packet(&network, net.client, net.external, protocol, ports, &payload);
        prop_assert_eq!(request(&mut rewritten, &tables), Verdict::Rewritten);
        assert_checksums(&rewritten);
        // Exactly the packet that the client would have sent to the pod, up to the two ways to write a sum of zero.
        let direct = packet(&network, net.client, net.pod, protocol, ports, &payload);
        prop_assert_eq!(rewritten, direct);
    }

    #[test]
    fn a_reply_is_what_the_pod_would_have_sent_from_the_external_address(
        (net, network, protocol, ports, payload) in any_case(),
        answered in any_network(),
    ) {
        let tables = tables(&[net.external], &[net.pod]);
        request(&mut packet(&network, net.client, net.external, protocol, ports, &payload), &tables);
        let (protocol, ports) = answer(&net, protocol, ports);
        let mut rewritten = packet(&answered, net.pod, net.client, protocol, ports, &payload);
        prop_assert_eq!(reply(&mut rewritten, &tables), Verdict::Rewritten);
        assert_checksums(&rewritten);
        let direct = packet(&answered, net.external, net.client, protocol, ports, &payload);
        prop_assert_eq!(rewritten, direct);
    }

    /// The request rewritten, its addresses swapped by hand as a pod that reflects everything would, and the reply
    /// rewritten: what comes back is what was sent, with its addresses swapped.
    #[test]
    fn forward_and_back_is_the_identity(
        net in any_net(),
        network in any_network(),
        protocol in prop::sample::select(vec![TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP]),
        port in any::<u16>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
        checksum in any::<u16>(),
    ) {
        let tables = tables(&[net.external], &[net.pod]);
        let mut original = packet(&network, net.client, net.external, protocol, (port, port), &payload);
        // A wrong checksum must stay as wrong as it was: its receiver shall notice. Not the two forms of zero, of which
        // one may come back as the other (RFC 1624, section 3).
        if let Some(at) = checksum_offset(protocol) {
            let length = seen(&original).segment.len();
            let start = original.bytes.len() - network.padding - length + at;
            if checksum != 0 && checksum != 0xffff {
                original.bytes[start..start + 2].copy_from_slice(&checksum.to_be_bytes());
            }
        }
        let mut there = original.clone();
        prop_assume!(request(&mut there, &tables) == Verdict::Rewritten);
        let mut back = swapped(&there);
        prop_assert_eq!(reply(&mut back, &tables), Verdict::Rewritten);
        prop_assert_eq!(swapped(&back), original);
    }

    #[test]
    fn any_bytes_at_all_are_wholly_rewritten_or_untouched(
        net in any_net(),
        header in prop::collection::vec(any::<u8>(), 0..200),
        aimed in any::<bool>(),
    ) {
        let tables = tables(&[net.external], &[net.pod]);
        let mut bytes = plain(net.client, net.external, UDP, (1, 2)).bytes;
        // Behind Ethernet header, or behind an IP header that leads to the external address.
        let keep = if aimed { bytes.len() - 28 } else { 14 };
        bytes.truncate(keep);
        bytes.extend(header);
        let original = HostPacket::new(bytes);
        let mut packet = original.clone();
        match request(&mut packet, &tables) {
            Verdict::Next | Verdict::Drop(_) => prop_assert_eq!(&packet, &original),
            Verdict::Hairpin | Verdict::ToNode => prop_assert!(false, "only for a pod's packet"),
            Verdict::Forward | Verdict::ForwardIntoPod | Verdict::Direct | Verdict::FromUplink => {
                prop_assert!(false, "the Service is not delivered so");
            }
            Verdict::Rewritten => {
                prop_assert_eq!(packet.bytes.len(), original.bytes.len());
                let at = if net.icmp == ICMP { 30..34 } else { 38..54 };
                let pod = proxier_common::Address::from(net.pod).bytes;
                prop_assert_eq!(&packet.bytes[at.clone()], &pod[16 - at.len()..]);
            }
        }
        let mut packet = original.clone();
        let verdict = reply(&mut packet, &tables);
        prop_assert_eq!(verdict, Verdict::Next, "nothing answers a flow that is not there");
        prop_assert_eq!(packet, original);
    }
}

/// The packet with its addresses exchanged. No checksum changes by that.
fn swapped(packet: &HostPacket) -> HostPacket {
    let mut packet = packet.clone();
    let mut network = 14;
    while packet.bytes[network - 2..network] == [0x81, 0x00] {
        network += 4;
    }
    let (at, length) = if packet.bytes[network - 2] == 0x08 { (network + 12, 4) } else { (network + 8, 16) };
    let (source, destination) = packet.bytes[at..at + 2 * length].split_at_mut(length);
    source.swap_with_slice(destination);
    packet
}
