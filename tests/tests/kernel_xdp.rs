//! The compiled program at XDP, in the kernel, on the very packets that the host tests use: BPF_PROG_TEST_RUN. It decides and
//! rewrites as the core does on a host, and what it leaves to tc it leaves as it was.

#![allow(
    clippy::unwrap_used,
    reason = "a test file, all of it; the lint knows tests only by their attribute"
)]

// One set of packet builders for all tests of the core. They are the core's own tests' and live with them.
#[path = "../../proxier-ebpf/tests/common/mod.rs"]
mod common;

mod kernel;

use common::{
    early::{Early, left_to_hardware},
    *,
};
use kernel::{any_damaged_packet, any_packet, with_kernel};
use proptest::prelude::*;
use proxier_common::{DropReason, Hook, Statistic};
use proxier_ebpf::{
    Origin, Verdict,
    host::{HostPacket, HostTables},
};
use proxier_tests::program::{Kernel, XDP_DROP, XDP_PASS};

/// How many bytes XDP leaves before a packet that it has rewritten.
const MARK: usize = 12;

/// Runs `packet` on the host, as it is seen at XDP, and in the kernel, and holds the results together.
fn both(kernel: &Kernel, tables: &HostTables, packet: &HostPacket) -> Verdict {
    let mut expected = Early::new(packet.clone());
    let verdict = proxier_ebpf::request(&mut expected, tables, Origin::Outside);
    let (code, before, found) = kernel.run_xdp(packet).expect("the program runs");
    assert_eq!(code, if matches!(verdict, Verdict::Drop(_)) { XDP_DROP } else { XDP_PASS }, "{verdict:?}");
    if !matches!(verdict, Verdict::Drop(_)) {
        assert_eq!(found, expected.packet, "{verdict:?}");
        assert_eq!(before, if expected.is_claimed { MARK } else { 0 }, "{verdict:?}");
    }
    verdict
}

#[test]
fn the_kernel_rewrites_at_xdp_as_the_host_does() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP] {
                let tables = tables(&[net.external], &[net.pod]);
                kernel.set(&tables);
                let packet = plain(net.client, net.external, protocol, (40_000, 6_001));
                assert_eq!(both(kernel, &tables, &packet), Verdict::Rewritten);
                assert_eq!(kernel.run_xdp(&packet).unwrap().1, MARK);
            }
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            let query = if net.icmp == ICMP { 8 } else { 128 };
            let packet = plain(net.client, net.external, net.icmp, (query, 9));
            assert_eq!(both(kernel, &tables, &packet), Verdict::Rewritten);
        }
    });
}

/// Neither delivered nor dropped: whoever it is for sees it as it came.
#[test]
fn a_frame_for_another_host_is_left_as_it_is() {
    with_kernel(|kernel| {
        for net in BOTH {
            for pods in [&[net.pod][..], &[]] {
                let tables = tables(&[net.external], pods);
                kernel.set(&tables);
                for changed in 0..6 {
                    let mut packet = plain(net.client, net.external, UDP, (40_000, 53));
                    packet.bytes[changed] ^= 1;
                    assert_eq!(kernel.run_xdp(&packet).unwrap(), (XDP_PASS, 0, packet));
                }
                assert_eq!(kernel.flows.keys().count(), 0);
            }
        }
    });
}

/// Larger than what lies in one piece: the header is in the first, the checksum of the packet covers all.
#[test]
fn a_packet_in_several_pieces_is_rewritten_at_xdp() {
    with_kernel(|kernel| {
        for net in BOTH {
            for length in [3_000, 8_900, 30_000] {
                let tables = tables(&[net.external], &[net.pod]);
                kernel.set(&tables);
                let payload = vec![0xab; length];
                let there =
                    packet(&Network::default(), net.client, net.external, UDP, (40_000, 6_001), &payload);
                assert_eq!(both(kernel, &tables, &there), Verdict::Rewritten);
            }
        }
    });
}

#[test]
fn a_checksum_that_may_be_left_to_the_hardware_is_left_to_tc() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP] {
                let tables = tables(&[net.external], &[net.pod]);
                kernel.set(&tables);
                let packet = left_to_hardware(&net, protocol);
                assert_eq!(both(kernel, &tables, &packet), Verdict::Next);
                assert_eq!(kernel.flows.keys().count(), 0);
                assert_eq!(kernel.run_xdp(&packet).unwrap().1, 0);
            }
        }
    });
}

#[test]
fn drops_at_xdp_have_a_hook_of_their_own() {
    with_kernel(|kernel| {
        let tables = tables(&[V4.external], &[]);
        kernel.set(&tables);
        let drops = |kernel: &Kernel, hook: Hook| kernel.drops(hook, DropReason::NoBackend);
        let before = (drops(kernel, Hook::UplinkXdp), drops(kernel, Hook::UplinkIngress));
        for _ in 0..3 {
            let packet = plain(V4.client, V4.external, UDP, (1, 2));
            assert_eq!(both(kernel, &tables, &packet), Verdict::Drop(DropReason::NoBackend));
        }
        assert_eq!(drops(kernel, Hook::UplinkXdp), before.0 + 3);
        assert_eq!(drops(kernel, Hook::UplinkIngress), before.1);
    });
}

/// That is for tc to note, which knows whether XDP has rewritten the packet.
#[test]
fn what_is_for_a_pods_own_address_ends_no_flow_at_xdp() {
    with_kernel(|kernel| {
        for net in BOTH {
            let tables = tables(&[net.external], &[net.pod]);
            know_pod(&tables, net.pod);
            kernel.set(&tables);
            both(kernel, &tables, &plain(net.client, net.external, UDP, (40_000, 53)));
            let before = kernel.statistic(Statistic::FlowForgotten);
            assert_eq!(both(kernel, &tables, &plain(net.client, net.pod, UDP, (40_000, 53))), Verdict::Next);
            assert_eq!(kernel.flows.keys().count(), 1);
            assert_eq!(kernel.statistic(Statistic::FlowForgotten), before);
        }
    });
}

#[test]
fn icmp_errors_are_translated_at_xdp_as_on_the_host() {
    with_kernel(|kernel| {
        for net in BOTH {
            for protocol in [TCP, UDP, SCTP, GRE] {
                for length in [48, 60, usize::MAX] {
                    let tables = tables(&[net.external], &[net.pod]);
                    kernel.set(&tables);
                    both(kernel, &tables, &plain(net.client, net.external, protocol, (40_000, 443)));
                    let about_reply = plain(net.external, net.client, protocol, (443, 40_000));
                    for kind in errors(&net) {
                        let error = error(&net, router(&net), net.external, kind, &about_reply, length);
                        assert_eq!(both(kernel, &tables, &error), Verdict::Rewritten, "protocol {protocol}");
                    }
                }
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_packet_fares_at_xdp_as_on_the_host((net, there, _) in any_packet()) {
        with_kernel(|kernel| {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            both(kernel, &tables, &there);
        });
    }

    #[test]
    fn a_packet_cut_short_or_damaged_fares_at_xdp_as_on_the_host(
        (net, mut packet) in any_damaged_packet(),
        length in any::<prop::sample::Index>(),
    ) {
        // BPF_PROG_TEST_RUN takes nothing shorter than an Ethernet header.
        packet.bytes.truncate(14 + length.index(packet.bytes.len() - 14 + 1));
        with_kernel(|kernel| {
            let tables = tables(&[net.external], &[net.pod]);
            kernel.set(&tables);
            both(kernel, &tables, &packet);
        });
    }
}
