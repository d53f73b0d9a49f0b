//! Sending a packet on past the node's stack.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect,
    programs::TcContext,
};

/// The two addresses at the start of an Ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
struct MacAddresses {
    destination: [u8; 6],
    source: [u8; 6],
}

/// Sends the packet back through the Ethernet link that it came in by, to whoever sent it.
#[inline(always)]
pub(super) fn back(context: &TcContext) -> i32 {
    let Ok(MacAddresses { destination, source }) = context.load(0) else {
        return TC_ACT_UNSPEC;
    };
    if context.store(0, &MacAddresses { destination: source, source: destination }, 0).is_err() {
        return TC_ACT_SHOT;
    }
    // SAFETY: the kernel hands over a valid context.
    let index = unsafe { (*context.skb.skb).ifindex };
    // SAFETY: takes numbers only; what comes back is the action code that makes the kernel do it.
    let action = unsafe { bpf_redirect(index, 0) };
    // TC_ACT_REDIRECT or TC_ACT_SHOT.
    i32::try_from(action).unwrap_or(TC_ACT_SHOT)
}
