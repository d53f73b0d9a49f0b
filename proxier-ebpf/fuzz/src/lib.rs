//! What holds for the packet core whatever comes: a packet is untouched or wholly rewritten, every checksum stays as
//! right or as wrong as it was, a reply leaves with the address that its client spoke to, and the rewritten request
//! sent back is the request that came.
//!
//! One function per fuzz target; each takes any bytes and panics if something does not hold. They are ordinary code
//! without a fuzzer in it, so that `proxier-ebpf/tests/corpus.rs` runs the corpus with any compiler.
//!
//! ```text
//!   bytes ──> frames (steps, or as they are) ──> world: the core on tables ──> judge: bytes before and after
//!                                                         └─ what was promised to whom (flows, fragments)
//! ```
//!
//! [`wire`] and [`judge`] share no code with the core: they read packets on their own, and checksums are computed by
//! the crate internet-checksum. [`world`] is the only place that knows the core's interface.

#![allow(unreachable_pub, reason = "it is also a module of a test")]

#[path = "../../tests/common/mod.rs"]
pub mod common;
pub mod judge;
pub mod steps;
pub mod wire;
pub mod world;

use common::{BOTH, Network, frame};
use steps::Step;
use world::{From, To, World};

/// A frame of any bytes from any side: the first byte says from where, and whether conversations of a family are there
/// already; the rest is the frame. What is rewritten on its way in is sent back as it came out.
pub fn request(data: &[u8]) {
    let Some((&side, bytes)) = data.split_first() else { return };
    let mut world = World::new();
    if side & 0x80 != 0 {
        world.open_conversations(&BOTH[usize::from(side >> 6 & 1)]);
    }
    match side & 3 {
        3 => drop(world.reply(bytes, if side & 4 == 0 { To::Outside } else { To::Node })),
        side => {
            world.request(bytes, From::ALL[usize::from(side) % From::ALL.len()]);
            world.send_back();
        }
    }
}

/// Requests, replies, fragments and errors of a few parties who meet again and again, while pods come and go: records
/// of [`Step::LENGTH`] bytes, each a step.
pub fn conversation(data: &[u8]) {
    let mut world = World::new();
    for record in data.chunks_exact(Step::LENGTH).take(steps::MOST) {
        if let Some(step) = Step::read(record) {
            step.take(&mut world);
        }
    }
}

/// An ICMP message of any bytes about conversations that there are: two bytes say who sends it to whom, the rest is the
/// message from its type on.
pub fn icmp_error(data: &[u8]) {
    let [side, shape, message @ ..] = data else { return };
    let net = BOTH[usize::from(side & 1)];
    let mut world = World::new();
    world.open_conversations(&net);
    let network = Network { padding: usize::from(shape & 0x1f), ..steps::headers(*shape) };
    let inbound = side & 2 == 0;
    let source = steps::party(&net, side >> 2 & 7);
    let destination = if inbound { net.external } else { steps::party(&net, side >> 5 & 3) };
    let bytes = frame(&network, source, destination, net.icmp, message).bytes;
    if inbound {
        world.request(&bytes, From::ALL[usize::from(side >> 5) % From::ALL.len()]);
    } else {
        world.reply(&bytes, if side & 0x80 == 0 { To::Outside } else { To::Node });
    }
}
