//! What tests of the compiled programs share: the programs, loaded once, and any packet.

use std::sync::{Mutex, PoisonError};

use proptest::prelude::*;
use proxier_ebpf::host::HostPacket;
use proxier_tests::program::Kernel;

use crate::common::*;

/// Loading takes a second and the maps are shared, so the tests take turns.
static KERNEL: Mutex<Option<Kernel>> = Mutex::new(None);

pub(crate) fn with_kernel<R>(test: impl FnOnce(&mut Kernel) -> R) -> R {
    let mut kernel = KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    test(kernel.get_or_insert_with(Kernel::load))
}

/// A request and a reply. Headers that the host tests vary, too: options, extension headers, a VLAN tag within, fragments, padding.
pub(crate) fn any_packet() -> impl Strategy<Value = (Net, HostPacket, HostPacket)> {
    let headers = (
        0..10_usize,
        prop::collection::vec(prop::sample::select(vec![0_u8, 43, 51, 60]), 0..10),
        any::<bool>(),
        prop::option::of((0..3_u16, any::<bool>(), any::<u32>())),
        0..20_usize,
    );
    let protocol = prop::sample::select(vec![TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP, ICMP, ICMPV6, 59, 89]);
    (prop::sample::select(BOTH.to_vec()), headers, protocol, any::<(u8, u16)>(), 0..200_usize).prop_map(
        |(net, (options, extensions, vlan, fragment, padding), protocol, (kind, port), length)| {
            let network = Network {
                vlans: if vlan { vec![5] } else { Vec::new() },
                options: vec![1; options * 4],
                extensions: extensions
                    .into_iter()
                    .map(|number| {
                        (number, if number == 51 { [vec![4], vec![0; 22]].concat() } else { vec![0; 7] })
                    })
                    .collect(),
                fragment,
                padding,
            };
            let first = if matches!(protocol, ICMP | ICMPV6) { kind.into() } else { 40_000 };
            let request =
                packet(&network, net.client, net.external, protocol, (first, port), &vec![0xab; length]);
            let ports = if matches!(protocol, ICMP | ICMPV6) { (first, port) } else { (port, first) };
            let reply = packet(&network, net.pod, net.client, protocol, ports, &vec![0xcd; length]);
            (net, request, reply)
        },
    )
}

/// A request of which some bytes are anything, behind the Ethernet header: what that says is not the programs' to judge.
pub(crate) fn any_damaged_packet() -> impl Strategy<Value = (Net, HostPacket)> {
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (any_packet(), damage).prop_map(|((net, mut packet, _), damage)| {
        for (at, value) in damage {
            let at = 14 + at.index(packet.bytes.len() - 14);
            packet.bytes[at] = value;
        }
        (net, packet)
    })
}
