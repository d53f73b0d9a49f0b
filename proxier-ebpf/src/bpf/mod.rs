//! Everything that only compiles for the kernel: entry points here, adapters of the core's traits in the modules.

#![expect(clippy::needless_pass_by_value, reason = "entry points are as aya's macro calls them")]

mod events;
mod maps;
mod redirect;
mod skb;
mod too_big;
mod xdp;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use proxier_common::{DELIVERY_NODE, DELIVERY_STACK, DropReason, Hook, LINK_OF_PORTS};
use proxier_ebpf::{Origin, Packet as _, Tables as _, Verdict, verifier};

use self::{
    maps::KernelTables,
    redirect::{Path, Side},
    skb::{ETHERNET_HEADER, NO_LINK_HEADER, Skb},
    xdp::Frame,
};

/// Requests, before there is an skb, at an uplink with Ethernet headers. What it lets go as it came, [`proxier_request`] sees.
#[xdp(frags)]
pub(crate) fn proxier_xdp(context: XdpContext) -> u32 {
    from_driver(&context)
}

/// The same for generic XDP. There, for a program that can do with fragments, the kernel makes a new skb that has lost its
/// `mac_len`, and tc would see it without its Ethernet header (Linux 6.9 to 6.18 at least).
#[xdp]
pub(crate) fn proxier_xdp_skb(context: XdpContext) -> u32 {
    from_driver(&context)
}

#[inline(always)]
fn from_driver(context: &XdpContext) -> u32 {
    let mut packet = Frame::new(context);
    let marked = match proxier_ebpf::request(&mut packet, &KernelTables, Origin::Outside) {
        Verdict::Rewritten => packet.mark(),
        Verdict::Drop(reason) => Err(reason),
        _ => Ok(()),
    };
    match marked {
        Ok(()) => XDP_PASS,
        Err(reason) => {
            events::dropped(&packet, reason, Hook::UplinkXdp);
            XDP_DROP
        }
    }
}

/// Requests, at the ingress of an uplink with Ethernet headers.
#[classifier]
pub(crate) fn proxier_request(context: TcContext) -> i32 {
    from_outside::<ETHERNET_HEADER>(&context)
}

/// Replies, at the egress of an uplink with Ethernet headers. Requests of the node itself.
#[classifier]
pub(crate) fn proxier_reply(context: TcContext) -> i32 {
    to_outside::<ETHERNET_HEADER>(&context)
}

/// Requests, at the ingress of an uplink without link-layer header (WireGuard, tun, IP tunnels).
#[classifier]
pub(crate) fn proxier_req_l3(context: TcContext) -> i32 {
    from_outside::<NO_LINK_HEADER>(&context)
}

/// Replies, at the egress of an uplink without link-layer header. Requests of the node itself.
#[classifier]
pub(crate) fn proxier_rep_l3(context: TcContext) -> i32 {
    to_outside::<NO_LINK_HEADER>(&context)
}

/// Requests of a pod on this node, at the ingress of the pod's host-side link. Replies to the node itself.
#[classifier]
pub(crate) fn proxier_pod_in(context: TcContext) -> i32 {
    from_pod(Skb::new(&context), redirect::comes_from_its_source)
}

/// The same where that link is a port of a bridge. There, a pod that has another's address is the bridge's affair.
#[classifier]
pub(crate) fn proxier_port_in(context: TcContext) -> i32 {
    from_pod(Skb::of_port(&context), |_| true)
}

/// `is_genuine` tells whether the packet's source is whom the link leads to. What is not must not get past the filters of
/// the link, and stays there.
#[inline(always)]
fn from_pod(mut packet: Skb<'_, ETHERNET_HEADER>, is_genuine: fn(&TcContext) -> bool) -> i32 {
    const HOOK: Hook = Hook::PodIngress;
    let context = packet.context();
    // Before anything else: there is more of it than of what pods ask for themselves.
    let mut action = Ok(TC_ACT_UNSPEC);
    let link = if packet.is_port() { LINK_OF_PORTS } else { packet.interface() };
    if direct_delivery() && KernelTables.pod_link(link).is_some() {
        action = answer_directly(context, packet.is_port());
    }
    // Without local clients, it is here for what is delivered directly alone.
    if action == Ok(TC_ACT_UNSPEC) && local_clients() {
        action = match proxier_ebpf::request(&mut packet, &KernelTables, Origin::Pod) {
            Verdict::ToNode => {
                // While the source is the pod's. As one path: what follows is looked at once.
                let is_genuine = verifier::forget_whether(is_genuine(context));
                match proxier_ebpf::reply(&mut packet, &KernelTables, DELIVERY_NODE) {
                    Verdict::Rewritten if is_genuine => redirect::to_node(context),
                    verdict => outcome::<ETHERNET_HEADER>(context, verdict, HOOK, through_stack),
                }
            }
            verdict => outcome::<ETHERNET_HEADER>(context, verdict, HOOK, through_stack),
        };
    }
    code::<ETHERNET_HEADER>(context, action, HOOK)
}

/// Sends a pod's reply past the stack. `TC_ACT_UNSPEC` if it is none, or not one that can go so.
#[inline(never)]
fn answer_directly(context: &TcContext, is_port: bool) -> Result<i32, DropReason> {
    let mut packet = if is_port { Skb::of_port(context) } else { Skb::<ETHERNET_HEADER>::new(context) };
    let mut path = Path::NONE;
    match proxier_ebpf::reply_directly(&mut packet, &KernelTables, &mut path) {
        Verdict::Direct => {
            packet.set_sent();
            Ok(redirect::out_by(&path))
        }
        Verdict::FromUplink => {
            packet.set_sent();
            redirect::in_by(context, &path)
        }
        Verdict::Forward => forward_to_client(context),
        Verdict::Drop(reason) => Err(reason),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// Sends a pod's error about a request, rewritten, past the stack, if it can go so.
#[inline(never)]
fn forward_to_client(context: &TcContext) -> Result<i32, DropReason> {
    let mut path = Path::NONE;
    match proxier_ebpf::forward_to_client(&mut Skb::<ETHERNET_HEADER>::new(context), &mut path) {
        Verdict::Forward => Ok(redirect::out_by(&path)),
        Verdict::Drop(reason) => Err(reason),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// Sends a packet to a pod, rewritten, past the stack, if it can go so.
#[inline(never)]
fn forward_to_pod<const LINK_HEADER: u32>(context: &TcContext, into_pod: bool) -> Result<i32, DropReason> {
    let mut path = Path::NONE;
    let mut packet = Skb::<LINK_HEADER>::new(context);
    match proxier_ebpf::forward_to_pod(&mut packet, &KernelTables, into_pod, &mut path) {
        Verdict::ForwardIntoPod => redirect::into_peer(context, &path),
        Verdict::Forward => Ok(redirect::out_by(&path)),
        Verdict::Drop(reason) => Err(reason),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// Replies to a pod on this node, at the egress of the pod's host-side link. What a process of the node sends to the pod's
/// own address.
#[classifier]
pub(crate) fn proxier_pod_out(context: TcContext) -> i32 {
    let mut packet = Skb::<ETHERNET_HEADER>::new(&context);
    if packet.is_made_here() {
        proxier_ebpf::straight_to_pod(&packet, &KernelTables);
    }
    let verdict = proxier_ebpf::reply(&mut packet, &KernelTables, DELIVERY_STACK);
    action::<ETHERNET_HEADER>(&context, verdict, Hook::PodEgress, through_stack)
}

#[inline(always)]
fn from_outside<const LINK_HEADER: u32>(context: &TcContext) -> i32 {
    let mut packet = Skb::<LINK_HEADER>::new(context);
    if packet.is_marked() {
        packet.set_rewritten();
        return TC_ACT_UNSPEC;
    }
    match proxier_ebpf::request(&mut packet, &KernelTables, Origin::Outside) {
        verdict @ (Verdict::Forward | Verdict::ForwardIntoPod) => {
            let into_pod = verifier::forget_whether(verdict == Verdict::ForwardIntoPod);
            code::<LINK_HEADER>(
                context,
                forward_to_pod::<LINK_HEADER>(context, into_pod),
                Hook::UplinkIngress,
            )
        }
        verdict => action::<LINK_HEADER>(context, verdict, Hook::UplinkIngress, through_stack),
    }
}

#[inline(always)]
fn to_outside<const LINK_HEADER: u32>(context: &TcContext) -> i32 {
    const HOOK: Hook = Hook::UplinkEgress;
    let mut packet = Skb::<LINK_HEADER>::new(context);
    if packet.take_sent() {
        return TC_ACT_UNSPEC;
    }
    if local_clients() && packet.is_made_here() {
        let verdict = proxier_ebpf::request(&mut packet, &KernelTables, Origin::Node);
        if verdict != Verdict::Next {
            return action::<LINK_HEADER>(context, verdict, HOOK, to_pod_or_back::<LINK_HEADER>);
        }
    }
    let verdict = proxier_ebpf::reply(&mut packet, &KernelTables, DELIVERY_STACK);
    action::<LINK_HEADER>(context, verdict, HOOK, through_stack)
}

/// Where a request of the node itself goes. If it does not fit there, an error comes back instead.
#[inline(never)]
fn to_pod_or_back<const LINK_HEADER: u32>(context: &TcContext) -> Result<i32, DropReason> {
    let result = redirect::to_pod::<LINK_HEADER>(context);
    if let Err(DropReason::TooBig) = result
        && too_big::answer::<LINK_HEADER>(context)
        // An error about the request by now, as if from somebody before the pod.
        && let Verdict::Rewritten =
            proxier_ebpf::error_reply(&mut Skb::<LINK_HEADER>::new(context), &KernelTables, DELIVERY_NODE)
    {
        maps::count_drop(Hook::UplinkEgress.counter(DropReason::TooBig));
        return redirect::back::<LINK_HEADER>(context, Side::In);
    }
    result
}

/// Whether pods and processes of the node are clients. The agent writes it before the kernel reads the program, which then leaves out
/// what cannot be reached.
#[unsafe(no_mangle)]
static NODE_CLIENTS: u8 = 1;

#[inline(always)]
fn local_clients() -> bool {
    // Volatile: to the compiler it would be the constant that it is here.
    // SAFETY: a static, which nobody writes to.
    unsafe { core::ptr::read_volatile(&raw const NODE_CLIENTS) != 0 }
}

/// Whether pods are reached past the node's stack. The agent writes it as [`NODE_CLIENTS`]: before
/// [`DIRECT_DELIVERY_SINCE`](proxier_common::DIRECT_DELIVERY_SINCE), the verifier would not get to the end of a pod's link's program.
#[unsafe(no_mangle)]
static DIRECT_DELIVERY: u8 = 1;

#[inline(always)]
fn direct_delivery() -> bool {
    // SAFETY: as in `local_clients`.
    unsafe { core::ptr::read_volatile(&raw const DIRECT_DELIVERY) != 0 }
}

/// Where a packet goes that has been rewritten and takes its usual way.
#[inline(always)]
fn through_stack(_: &TcContext) -> Result<i32, DropReason> {
    Ok(TC_ACT_UNSPEC)
}

/// `onward` is where a packet goes that has been rewritten. `TC_ACT_UNSPEC` is `TCX_NEXT`: the programs and filters after
/// this one still decide. An `OK` would take the packet away from them.
#[inline(always)]
fn action<const LINK_HEADER: u32>(
    context: &TcContext,
    verdict: Verdict,
    hook: Hook,
    onward: fn(&TcContext) -> Result<i32, DropReason>,
) -> i32 {
    code::<LINK_HEADER>(context, outcome::<LINK_HEADER>(context, verdict, hook, onward), hook)
}

/// The action that a verdict comes to, or why the packet goes.
#[inline(always)]
fn outcome<const LINK_HEADER: u32>(
    context: &TcContext,
    verdict: Verdict,
    hook: Hook,
    onward: fn(&TcContext) -> Result<i32, DropReason>,
) -> Result<i32, DropReason> {
    match verdict {
        Verdict::Next | Verdict::ToNode => Ok(TC_ACT_UNSPEC),
        Verdict::Rewritten => onward(context),
        Verdict::Hairpin if matches!(hook, Hook::UplinkEgress) => {
            redirect::back::<LINK_HEADER>(context, Side::In)
        }
        Verdict::Hairpin => redirect::back::<LINK_HEADER>(context, Side::Out),
        // Only said where packets can pass the stack by.
        Verdict::Forward | Verdict::ForwardIntoPod | Verdict::Direct | Verdict::FromUplink => {
            Err(DropReason::NoRoute)
        }
        Verdict::Drop(reason) => Err(reason),
    }
}

/// The action's code, after telling of a packet dropped.
#[inline(always)]
fn code<const LINK_HEADER: u32>(context: &TcContext, action: Result<i32, DropReason>, hook: Hook) -> i32 {
    match action {
        Ok(action) => action,
        Err(reason) => {
            events::dropped(&Skb::<LINK_HEADER>::new(context), reason, hook);
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
