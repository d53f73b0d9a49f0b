//! Everything that only compiles for the kernel: entry points here, adapters of the core's traits in the modules.

#![expect(clippy::needless_pass_by_value, reason = "entry points are as aya's macro calls them")]

mod maps;
mod redirect;
mod skb;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use proxier_common::Hook;
use proxier_ebpf::{Origin, Verdict};

use self::{
    maps::KernelTables,
    skb::{ETHERNET_HEADER, NO_LINK_HEADER, Skb},
};

/// Requests, at the ingress of an uplink with Ethernet headers.
#[classifier]
pub(crate) fn proxier_request(context: TcContext) -> i32 {
    let verdict =
        proxier_ebpf::request(&mut Skb::<ETHERNET_HEADER>::new(&context), &KernelTables, Origin::Outside);
    action(&context, verdict, Hook::UplinkIngress)
}

/// Replies, at the egress of an uplink with Ethernet headers.
#[classifier]
pub(crate) fn proxier_reply(context: TcContext) -> i32 {
    let verdict = proxier_ebpf::reply(&mut Skb::<ETHERNET_HEADER>::new(&context), &KernelTables);
    action(&context, verdict, Hook::UplinkEgress)
}

/// Requests, at the ingress of an uplink without link-layer header (WireGuard, tun, IP tunnels).
#[classifier]
pub(crate) fn proxier_req_l3(context: TcContext) -> i32 {
    let verdict =
        proxier_ebpf::request(&mut Skb::<NO_LINK_HEADER>::new(&context), &KernelTables, Origin::Outside);
    action(&context, verdict, Hook::UplinkIngress)
}

/// Replies, at the egress of an uplink without link-layer header.
#[classifier]
pub(crate) fn proxier_rep_l3(context: TcContext) -> i32 {
    let verdict = proxier_ebpf::reply(&mut Skb::<NO_LINK_HEADER>::new(&context), &KernelTables);
    action(&context, verdict, Hook::UplinkEgress)
}

/// Requests of a pod on this node, at the ingress of the pod's host-side link.
#[classifier]
pub(crate) fn proxier_pod_in(context: TcContext) -> i32 {
    let verdict =
        proxier_ebpf::request(&mut Skb::<ETHERNET_HEADER>::new(&context), &KernelTables, Origin::Pod);
    action(&context, verdict, Hook::PodIngress)
}

/// Replies to a pod on this node, at the egress of the pod's host-side link.
#[classifier]
pub(crate) fn proxier_pod_out(context: TcContext) -> i32 {
    let verdict = proxier_ebpf::reply(&mut Skb::<ETHERNET_HEADER>::new(&context), &KernelTables);
    action(&context, verdict, Hook::PodEgress)
}

/// `TC_ACT_UNSPEC` is `TCX_NEXT`: the programs and filters after this one still decide. An `OK` would take the
/// packet away from them.
#[inline(always)]
fn action(context: &TcContext, verdict: Verdict, hook: Hook) -> i32 {
    match verdict {
        Verdict::Next | Verdict::Rewritten => TC_ACT_UNSPEC,
        Verdict::Hairpin => redirect::back(context),
        Verdict::Drop(reason) => {
            maps::count_drop(hook.counter(reason));
            TC_ACT_SHOT
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier refuses a program in which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

/// What the kernel asks before it lends its GPL-only helpers. The sources are under the MIT license, which allows
/// both.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
