//! The packet core: everything that decides what happens to a packet, and nothing that knows where it runs.
//!
//! `parse -> lookup -> rewrite -> verdict`. The core sees a packet through [`Packet`] and the maps through
//! [`Tables`], so that the very same code runs in the kernel on an skb (`bpf/`, built for `target_arch = "bpf"`)
//! and on a host on a byte slice ([`host`]). IPv4 and IPv6 share all of it but what [`Family`] supplies.
//!
//! Two rules hold everywhere: everything is checked before the first write, so that a packet is either wholly
//! rewritten or untouched, or dropped, where the kernel refuses a later write; and a packet that is none of ours costs
//! one lookup (at the link of a pod that is delivered to directly, two).
//!
//! Small functions are `inline(always)`. The steps that a packet takes one after the other are `inline(never)`, so that
//! their frames take turns on the kernel's 512 bytes of stack and the verifier does not multiply their paths
//! (docs/decisions/003).

#![cfg_attr(target_arch = "bpf", no_std)]

pub mod checksum;
pub mod direct;
pub mod family;
mod fragment;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod icmp_error;
pub mod packet;
pub mod reply;
pub mod request;
pub mod rewrite;
pub mod tables;
pub mod transport;
pub mod verdict;
pub mod verifier;

pub use direct::{forward_to_client, forward_to_pod};
pub use family::{Family, V4, V6};
pub use packet::{NetworkHeader, Packet, Plain, Way};
pub use reply::{error_reply, reply, reply_directly};
pub use request::{Origin, request, straight_to_pod};
pub use tables::{FlowEntry, InsertError, SessionEntry, Tables};
pub use verdict::Verdict;
