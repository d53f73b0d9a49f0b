//! The compiled programs, in the kernel, on the very packets that the host tests use: BPF_PROG_TEST_RUN. Whatever the
//! core decides on a host, the kernel must decide too, byte for byte; and the kernel's own idea of a packet's checksum
//! (CHECKSUM_COMPLETE) must still be right afterwards.

#![allow(
    clippy::unwrap_used,
    reason = "a test file, all of it; the lint knows tests only by their attribute"
)]

// One set of packet builders for all tests of the core. They are the core's own tests' and live with them.
#[path = "../../proxier-ebpf/tests/common/mod.rs"]
mod common;

mod kernel;

use common::*;
use kernel::{any_damaged_packet, any_packet, with_kernel};
use proptest::prelude::*;
use proxier_common::{
    DELIVERY_STACK, DropReason, ExternalKey, FlowValue, Hook, SERVICE_PASS_WITHOUT_BACKEND, SessionValue,
};
use proxier_ebpf::{
    Origin, Verdict,
    host::{HostPacket, HostTables},
};
use proxier_tests::program::{CHECKSUM_COMPLETE, Kernel, TC_ACT_REDIRECT, TC_ACT_SHOT, TCX_NEXT};

fn code(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Next | Verdict::ToNode | Verdict::Rewritten => TCX_NEXT,
        Verdict::Hairpin
        | Verdict::Forward
        | Verdict::ForwardIntoPod
        | Verdict::Direct
        | Verdict::FromUplink => TC_ACT_REDIRECT,
        Verdict::Drop(_) => TC_ACT_SHOT,
    }
}

/// Runs `packet` through `program` on the host and in the kernel and holds the results together. The tables of both must
/// have seen the same packets before.
fn both(kernel: &Kernel, tables: &HostTables, program: &str, packet: &HostPacket) -> (Verdict, HostPacket) {
    let mut expected = packet.clone();
    let verdict = match program {
        "proxier_request" => proxier_ebpf::request(&mut expected, tables, Origin::Outside),
        "proxier_pod_in" => proxier_ebpf::request(&mut expected, tables, Origin::Pod),
        _ => proxier_ebpf::reply(&mut expected, tables, DELIVERY_STACK),
    };
    if verdict == Verdict::Hairpin {
        // Back through the same link: the adapter, which the host has none of, exchanges the two MAC addresses.
        let (destination, source) = expected.bytes[..12].split_at_mut(6);
        destination.swap_with_slice(source);
    }
    let (code_found, found) = kernel.run(program, packet, 0).expect("the program runs");
    assert_eq!(code_found, code(verdict), "{program}: the core says {verdict:?}");
    if !matches!(verdict, Verdict::Drop(_)) {
        assert_eq!(found, expected, "{program}: {verdict:?}");
    }
    (verdict, expected)
}

/// As [`both`], with the kernel's sum over the whole packet checked. The kernel refuses the flag for a packet whose
/// addresses it cannot see.
fn checksum_complete(kernel: &Kernel, program: &str, packet: &HostPacket) {
    match kernel.run(program, packet, CHECKSUM_COMPLETE) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            panic!("this kernel has no BPF_F_TEST_SKB_CHECKSUM_COMPLETE (Linux 6.15)")
        }
        Err(error) => panic!("{program} leaves a wrong CHECKSUM_COMPLETE behind: {error}"),
    }
}

fn kernel_has_checksum_complete() -> bool {
    proxier_common::is_linux_since((6, 15))
}

#[test]
fn the_kernel_rewrites_as_the_host_does() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP] {
                let tables = tables(&[net.external], &[net.pod]);
                kernel.set(&tables);
                let there = plain(net.client, net.external, protocol, (40_000, 6_001));
                let (verdict, _) = both(kernel, &tables, "proxier_request", &there);
                assert_eq!(verdict, Verdict::Rewritten);
                let back = plain(net.pod, net.client, protocol, (6_001, 40_000));
                tables.now.set(tables.now.get() + 1);
                let (verdict, _) = both(kernel, &tables, "proxier_reply", &back);
                assert_eq!(verdict, Verdict::Rewritten);
                if kernel_has_checksum_complete() {
                    checksum_complete(kernel, "proxier_request", &there);
                    checksum_complete(kernel, "proxier_reply", &back);
                }
            }
            let (query, answer) = if net.icmp == ICMP { (8, 0) } else { (128, 129) };
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            let there = plain(net.client, net.external, net.icmp, (query, 9));
            let back = plain(net.pod, net.client, net.icmp, (answer, 9));
            assert_eq!(both(kernel, &tables, "proxier_request", &there).0, Verdict::Rewritten);
            assert_eq!(both(kernel, &tables, "proxier_reply", &back).0, Verdict::Rewritten);
            if kernel_has_checksum_complete() {
                checksum_complete(kernel, "proxier_request", &there);
                checksum_complete(kernel, "proxier_reply", &back);
            }
        }
    });
}

/// Near the start of a packet they are read in place, farther on by a helper.
#[test]
fn a_transport_header_is_read_wherever_it_begins() {
    with_kernel(|kernel| {
        for length in [936, 944, 952, 960, 1_200] {
            for protocol in [TCP, UDP, SCTP] {
                let tables = tables(&[V6.external], &[V6.pod]);
                kernel.set(&tables);
                // Destination options, of which the first byte counts words of eight bytes but the first; then padding.
                let mut options = vec![0; length - 1];
                options[0] = u8::try_from(length / 8 - 1).unwrap();
                let far = Network { extensions: vec![(60, options)], ..Network::default() };
                let there = packet(&far, V6.client, V6.external, protocol, (40_000, 6_001), b"far away");
                let (verdict, _) = both(kernel, &tables, "proxier_request", &there);
                assert_eq!(verdict, Verdict::Rewritten, "{protocol} behind {length} bytes");
                let back = packet(&far, V6.pod, V6.client, protocol, (6_001, 40_000), b"far away");
                let (verdict, _) = both(kernel, &tables, "proxier_reply", &back);
                assert_eq!(verdict, Verdict::Rewritten, "{protocol} behind {length} bytes");
            }
        }
    });
}

#[test]
fn the_kernel_chooses_the_pod_that_the_host_chooses() {
    with_kernel(|kernel| {
        for net in BOTH {
            let tables = tables(&[net.external], &[net.pod, net.other_pod]);
            kernel.set(&tables);
            for number in 0..64 {
                let mut client = proxier_common::Address::from(net.client);
                client.bytes[15] = number;
                let packet = plain(client.to_ip(), net.external, UDP, (5_060, 5_060));
                both(kernel, &tables, "proxier_request", &packet);
            }
            assert_eq!(kernel.sessions.keys().count(), 64);
            assert_eq!(kernel.flows.keys().count(), 64);
        }
    });
}

#[test]
fn what_is_noted_in_the_kernel_is_what_the_host_notes() {
    with_kernel(|kernel| {
        for net in BOTH {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            both(kernel, &tables, "proxier_request", &plain(net.client, net.external, TCP, (40_000, 443)));
            both(kernel, &tables, "proxier_reply", &plain(net.pod, net.client, TCP, (443, 40_000)));
            let (key, expected) =
                tables.flows.borrow().iter().next().map(|(key, flow)| (*key, flow.0.get())).unwrap();
            let found = kernel.flows.get(&key, 0).expect("the flow is there under the same key");
            assert_eq!(FlowValue { last_seen: 0, ..found }, FlowValue { last_seen: 0, ..expected });
            let (key, expected) =
                tables.sessions.borrow().iter().next().map(|(key, session)| (*key, session.0.get())).unwrap();
            let found = kernel.sessions.get(&key, 0).expect("the session is there under the same key");
            assert_eq!(SessionValue { last_seen: 0, ..found }, SessionValue { last_seen: 0, ..expected });
        }
    });
}

#[test]
fn drops_are_counted_by_reason_and_hook() {
    with_kernel(|kernel| {
        let tables = tables(&[V4.external], &[]);
        kernel.set(&tables);
        let before = kernel.drops(Hook::UplinkIngress, DropReason::NoBackend);
        let packet = plain(V4.client, V4.external, UDP, (1, 2));
        for _ in 0..3 {
            let (verdict, _) = both(kernel, &tables, "proxier_request", &packet);
            assert_eq!(verdict, Verdict::Drop(DropReason::NoBackend));
        }
        assert_eq!(kernel.drops(Hook::UplinkIngress, DropReason::NoBackend), before + 3);

        let key = ExternalKey { external: V4.external.into() };
        tables.services.borrow_mut().get_mut(&key).unwrap().flags = SERVICE_PASS_WITHOUT_BACKEND;
        kernel.set(&tables);
        assert_eq!(both(kernel, &tables, "proxier_request", &packet).0, Verdict::Next);
        assert_eq!(kernel.drops(Hook::UplinkIngress, DropReason::NoBackend), before + 3);
    });
}

#[test]
fn a_second_external_address_of_the_pod_collides_in_the_kernel_too() {
    with_kernel(|kernel| {
        let tables = tables(&[V6.external, V6.other_external], &[V6.pod]);
        kernel.set(&tables);
        both(kernel, &tables, "proxier_request", &plain(V6.client, V6.external, UDP, (40_000, 53)));
        let (verdict, _) =
            both(kernel, &tables, "proxier_request", &plain(V6.client, V6.other_external, UDP, (40_000, 53)));
        assert_eq!(verdict, Verdict::Drop(DropReason::FlowCollision));
    });
}

#[test]
fn what_is_not_ours_is_passed_on_untouched() {
    with_kernel(|kernel| {
        let tables = tables(&[V4.external, V6.external], &[]);
        kernel.set(&tables);
        let arp = HostPacket::new([[0xff; 12].as_slice(), &[0x08, 0x06], &[0; 46]].concat());
        let others = [
            arp,
            plain(V4.client, V4.pod, TCP, (1, 2)),
            plain(V6.client, V6.pod, UDP, (1, 2)),
            plain(V6.client, V6.external, ICMPV6, (135, 0)),
        ];
        for packet in &others {
            for program in ["proxier_request", "proxier_reply"] {
                assert_eq!(both(kernel, &tables, program, packet).0, Verdict::Next);
            }
        }
    });
}

#[test]
fn a_udp_checksum_of_zero_stays_zero_in_the_kernel() {
    with_kernel(|kernel| {
        for net in BOTH {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            let mut bytes = segment(UDP, (40_000, 53), b"no checksum");
            bytes[6..8].fill(0);
            let packet = frame(&Network::default(), net.client, net.external, UDP, &bytes);
            let (_, rewritten) = both(kernel, &tables, "proxier_request", &packet);
            assert_eq!(seen(&rewritten).segment[6..8], [0, 0]);
        }
    });
}

#[test]
fn pods_are_clients_in_the_kernel_as_on_the_host() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP] {
                let tables = tables(&[net.external], &[net.pod]);
                kernel.set(&tables);
                let own = plain(net.pod, net.external, protocol, (40_000, 443));
                assert_eq!(both(kernel, &tables, "proxier_pod_in", &own).0, Verdict::Hairpin);
                let there = plain(net.other_pod, net.external, protocol, (40_000, 443));
                assert_eq!(both(kernel, &tables, "proxier_pod_in", &there).0, Verdict::Rewritten);
                let back = plain(net.pod, net.other_pod, protocol, (443, 40_000));
                assert_eq!(both(kernel, &tables, "proxier_pod_out", &back).0, Verdict::Rewritten);
                if kernel_has_checksum_complete() {
                    for (program, packet) in
                        [("proxier_pod_in", &own), ("proxier_pod_in", &there), ("proxier_pod_out", &back)]
                    {
                        checksum_complete(kernel, program, packet);
                    }
                }
            }
        }
    });
}

#[test]
fn icmp_errors_are_translated_in_the_kernel_as_on_the_host() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP, SCTP, GRE] {
                for length in [48, 60, usize::MAX] {
                    let tables = tables(&[net.external], &[net.pod]);
                    kernel.set(&tables);
                    let there = plain(net.client, net.external, protocol, (40_000, 443));
                    both(kernel, &tables, "proxier_request", &there);
                    let about_reply = plain(net.external, net.client, protocol, (443, 40_000));
                    let about_request = plain(net.client, net.pod, protocol, (40_000, 443));
                    for kind in errors(&net) {
                        let inbound = error(&net, router(&net), net.external, kind, &about_reply, length);
                        let outbound = error(&net, net.pod, net.client, kind, &about_request, length);
                        for (program, packet) in [("proxier_request", inbound), ("proxier_reply", outbound)] {
                            let (verdict, _) = both(kernel, &tables, program, &packet);
                            assert_eq!(verdict, Verdict::Rewritten, "{program}, protocol {protocol}");
                            if kernel_has_checksum_complete() {
                                checksum_complete(kernel, program, &packet);
                            }
                        }
                    }
                }
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_packet_fares_in_the_kernel_as_on_the_host((net, there, back) in any_packet()) {
        with_kernel(|kernel| {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            both(kernel, &tables, "proxier_request", &there);
            both(kernel, &tables, "proxier_reply", &back);
        });
    }

    #[test]
    fn a_packet_cut_short_or_damaged_fares_in_the_kernel_as_on_the_host(
        (net, mut packet) in any_damaged_packet(),
        length in any::<prop::sample::Index>(),
    ) {
        // BPF_PROG_TEST_RUN takes nothing shorter than an IP header; the host tests cut there too.
        let shortest = if net.icmp == ICMP { 14 + 20 } else { 14 + 40 };
        packet.bytes.truncate(shortest + length.index(packet.bytes.len() - shortest + 1));
        with_kernel(|kernel| {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            both(kernel, &tables, "proxier_request", &packet);
        });
    }
}
