//! Single programs on single packets (BPF_PROG_TEST_RUN), attached to nothing: what each kind of packet costs, beside a
//! program that does nothing and one that does a single look-up.
//!
//! A program that is repeated in the kernel is fed its own output. So each packet is given by a call of its own as well, of which
//! the median is taken: that includes caches and branch predictors that a system call has used meanwhile, and reading the clock;
//! what does nothing is measured in the same way beside it. Repeated is what leaves its packet as it was: because it is let
//! through, or because the pod's address is the external one, so that all that is done to the packet changes nothing. What goes past
//! the node's stack is never repeated: each run takes one off its hop limit. It ends where the kernel would send it on.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Context as _, ensure};
use etherparse::{Icmpv4Header, Icmpv4Type, icmpv4::DestUnreachableHeader};
use proxier_common::{
    Address, BackendKey, BackendValue, DELIVERY_STACK, ExternalKey, MemberKey, MemberValue, POD_HAS_PEER,
    PodKey, PodLinkValue, PodValue, SERVICE_DIRECT, ServiceValue, timeout::SECOND,
};
use proxier_ebpf::{
    Origin, Verdict,
    host::{HostPacket, HostTables},
};
use serde::{Deserialize, Serialize};

use crate::{
    packets::{Packet, TcpFlags, protocol},
    program::{Kernel, LOOPBACK, TC_ACT_REDIRECT, TCX_NEXT, test_run},
};

mod floor;
mod node;

const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 0);
const NOBODYS: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 0);
const POD: Ipv4Addr = Ipv4Addr::new(11, 0, 2, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 254);
const REQUEST: &str = "proxier_request";
const REPLY: &str = "proxier_reply";
const DIRECT_REPLY: &str = "proxier_pod_in";
/// Of which one system call gets the average.
const REPETITIONS: u32 = 100_000;

/// What a kind of packet costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timing {
    /// Which packet.
    pub case: String,
    /// Nanoseconds of a run by itself, in the middle of all.
    pub single: f64,
    /// Nanoseconds of a run among many, where one run is like the other.
    pub repeated: Option<f64>,
    /// How many look-ups in maps the packet core does; none where a program is not the core's.
    pub lookups: Option<u32>,
}

/// What a program is given, run by run.
struct Case {
    name: &'static str,
    program: &'static str,
    /// What makes the maps ready, before all runs.
    before: fn(Ipv4Addr) -> Vec<(&'static str, Packet)>,
    /// The packet of this run, if this is the pod's address.
    packet: fn(u32, Ipv4Addr) -> Packet,
    expected: Verdict,
    delivery: Delivery,
    /// Whether it can be repeated: nothing is different the second time.
    repeats: bool,
}

/// How the Service's packets go between client and pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    /// Through the node's stack.
    Stack,
    /// Past it.
    Direct,
}

impl Delivery {
    /// Where a program is run.
    fn interface(self, program: &str) -> u32 {
        match self {
            Self::Stack => LOOPBACK,
            Self::Direct if program == DIRECT_REPLY => node::POD_LINK,
            Self::Direct => node::UPLINK,
        }
    }

    /// What a program returns.
    const fn code(self) -> i32 {
        match self {
            Self::Stack => TCX_NEXT,
            Self::Direct => TC_ACT_REDIRECT,
        }
    }
}

fn client(number: u32) -> SocketAddr {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + number);
    (address, 40_000).into()
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn request(_: u32, _: Ipv4Addr) -> Packet {
    Packet::udp(at(CLIENT, 40_000), at(EXTERNAL, 7000), b"a byte, or more")
}

fn reply(_: u32, pod: Ipv4Addr) -> Packet {
    Packet::udp(at(pod, 7000), at(CLIENT, 40_000), b"a byte, or more")
}

fn segment(from: SocketAddr, to: SocketAddr, flags: TcpFlags) -> Packet {
    Packet::tcp(from, to, flags, 1, b"")
}

fn large(from: SocketAddr, to: SocketAddr) -> Vec<Packet> {
    Packet::udp(from, to, &[7; 2_000]).fragments(77, 1_000)
}

/// A router on the way cannot send on what `about` is.
fn error(about: &Packet) -> Packet {
    let reason = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1300 };
    let quoted: Vec<u8> = about.encode().into_iter().take(48).collect();
    let header = Icmpv4Header::with_checksum(Icmpv4Type::DestinationUnreachable(reason), &quoted);
    let message = [header.to_bytes().as_slice(), &quoted].concat();
    Packet::new(ROUTER.into(), about.source, protocol::ICMP, message)
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "miss",
            program: REQUEST,
            before: |_| vec![],
            packet: |_, _| Packet::udp(at(CLIENT, 40_000), at(NOBODYS, 7000), b""),
            expected: Verdict::Next,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "miss, going out",
            program: REPLY,
            before: |_| vec![],
            packet: |_, _| Packet::udp(at(NOBODYS, 9), at(CLIENT, 9), b""),
            expected: Verdict::Next,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "pod's own packet",
            program: REPLY,
            before: |_| vec![],
            packet: |_, pod| Packet::udp(at(pod, 9), at(CLIENT, 9), b""),
            expected: Verdict::Next,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "first packet of a client",
            program: REQUEST,
            before: |_| vec![],
            packet: |number, _| Packet::udp(client(number), at(EXTERNAL, 7000), b"a byte, or more"),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: false,
        },
        Case {
            name: "request, UDP",
            program: REQUEST,
            before: established,
            packet: request,
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "reply, UDP",
            program: REPLY,
            before: established,
            packet: reply,
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "request, TCP",
            program: REQUEST,
            before: connected,
            packet: |_, _| segment(at(CLIENT, 40_000), at(EXTERNAL, 7000), ACK),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "reply, TCP",
            program: REPLY,
            before: connected,
            packet: |_, pod| segment(at(pod, 7000), at(CLIENT, 40_000), ACK),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "request, later fragment",
            program: REQUEST,
            before: |_| vec![(REQUEST, large(at(CLIENT, 40_000), at(EXTERNAL, 7000)).swap_remove(0))],
            packet: |_, _| large(at(CLIENT, 40_000), at(EXTERNAL, 7000)).swap_remove(1),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "reply, later fragment",
            program: REPLY,
            before: |pod| {
                let first = large(at(pod, 7000), at(CLIENT, 40_000)).swap_remove(0);
                established(pod).into_iter().chain([(REPLY, first)]).collect()
            },
            packet: |_, pod| large(at(pod, 7000), at(CLIENT, 40_000)).swap_remove(1),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "ICMP error about a reply",
            program: REQUEST,
            before: established,
            packet: |_, _| error(&Packet::udp(at(EXTERNAL, 7000), at(CLIENT, 40_000), b"a byte, or more")),
            expected: Verdict::Rewritten,
            delivery: Delivery::Stack,
            repeats: true,
        },
        Case {
            name: "request, UDP, direct",
            program: REQUEST,
            before: established,
            packet: request,
            expected: Verdict::ForwardIntoPod,
            delivery: Delivery::Direct,
            repeats: false,
        },
        Case {
            name: "reply, UDP, direct",
            program: DIRECT_REPLY,
            before: established,
            packet: reply,
            expected: Verdict::Direct,
            delivery: Delivery::Direct,
            repeats: false,
        },
    ]
}

const SYN: TcpFlags = TcpFlags { syn: true, ack: false, fin: false, rst: false };
const ACK: TcpFlags = TcpFlags { syn: false, ack: true, fin: false, rst: false };

fn established(pod: Ipv4Addr) -> Vec<(&'static str, Packet)> {
    vec![(REQUEST, request(0, pod))]
}

fn connected(_: Ipv4Addr) -> Vec<(&'static str, Packet)> {
    vec![(REQUEST, segment(at(CLIENT, 40_000), at(EXTERNAL, 7000), SYN))]
}

/// A Service with one pod, at this address, that is delivered so.
fn tables(pod: Ipv4Addr, delivery: Delivery) -> HostTables {
    let (service_id, generation) = (1, 1);
    let (flags, flags_of_pod, interface) = match delivery {
        Delivery::Stack => (0, 0, 0),
        Delivery::Direct => (SERVICE_DIRECT, SERVICE_DIRECT | POD_HAS_PEER, node::POD_LINK),
    };
    let tables = HostTables::default();
    tables.now.set(1_000 * SECOND);
    let pod = Address::from(pod);
    let external = Address::from(EXTERNAL);
    tables.services.borrow_mut().insert(
        ExternalKey { external },
        ServiceValue {
            service_id,
            generation,
            backend_count: 1,
            affinity_timeout: 10_800,
            flags,
            source_generation: 0,
        },
    );
    tables.backends.borrow_mut().insert(BackendKey { service_id, generation, slot: 0 }, BackendValue { pod });
    tables.members.borrow_mut().insert(
        MemberKey { pod, service_id, padding: 0 },
        MemberValue { since_generation: generation, flags: 0 },
    );
    let value = PodValue { external, flags: flags_of_pod, interface };
    tables.pod_links.borrow_mut().extend(PodLinkValue::of(&value));
    tables.pods.borrow_mut().insert(PodKey { pod }, value);
    tables
}

/// The frame, as the programs get it.
fn frame(packet: &Packet) -> HostPacket {
    HostPacket::new(packet.frame(node::SENDER_MAC, node::NODE_MAC))
}

/// Measures every case, `runs` runs each.
///
/// # Errors
///
/// The kernel does not take the programs, or one does not do what it is to be measured at.
///
/// # Panics
///
/// When there is no object with the programs.
pub fn run(runs: u32) -> anyhow::Result<Vec<Timing>> {
    let node = node::build(CLIENT, POD).context("a node for what goes past its stack")?;
    node.enter(|| time_all(runs))
}

fn time_all(runs: u32) -> anyhow::Result<Vec<Timing>> {
    let mut kernel = Kernel::load();
    let packet = frame(&request(0, POD));
    kernel.set(&tables(POD, Delivery::Stack));
    let mut timings = Vec::new();
    let nothing = floor::nothing().context("the program that does nothing")?;
    let lookup = floor::lookup(&kernel.map("services")).context("the program with one look-up")?;
    for (name, program, lookups) in [("nothing", &nothing, 0), ("one look-up", &lookup, 1)] {
        let single = singles(program.as_fd(), LOOPBACK, runs, |_| packet.clone(), TCX_NEXT)?;
        let repeated = repeated(program.as_fd(), &packet)?;
        timings.push(Timing {
            case: name.to_owned(),
            single,
            repeated: Some(repeated),
            lookups: Some(lookups),
        });
    }
    for case in cases() {
        timings.push(time(&mut kernel, &case, runs).with_context(|| case.name.to_owned())?);
    }
    Ok(timings)
}

fn time(kernel: &mut Kernel, case: &Case, runs: u32) -> anyhow::Result<Timing> {
    let lookups = prepare(kernel, case, POD)?;
    // Number 0 has been seen there.
    let packet = |number| frame(&(case.packet)(number + 1, POD));
    let (interface, code) = (case.delivery.interface(case.program), case.delivery.code());
    let single = singles(kernel.program(case.program), interface, runs, packet, code)?;
    let repeated = if case.repeats {
        prepare(kernel, case, EXTERNAL)?;
        let packet = frame(&(case.packet)(0, EXTERNAL));
        let (_, found) = kernel.run(case.program, &packet, 0)?;
        ensure!(found == packet, "the second run would not be like the first one");
        Some(repeated(kernel.program(case.program), &packet)?)
    } else {
        None
    };
    Ok(Timing { case: case.name.to_owned(), single, repeated, lookups: Some(lookups) })
}

/// Makes the maps ready, and holds what the kernel does with the packet against the packet core on a host. Returns how many
/// look-ups that one did.
fn prepare(kernel: &mut Kernel, case: &Case, pod: Ipv4Addr) -> anyhow::Result<u32> {
    let delivery = case.delivery;
    let host = tables(pod, delivery);
    kernel.set(&host);
    for (program, packet) in (case.before)(pod) {
        let (code, _) = kernel.run_at(delivery.interface(program), program, &frame(&packet), 0)?;
        ensure!(code == delivery.code(), "{packet} does not go on: {code}");
        core(&host, program, &mut frame(&packet));
    }
    let packet = frame(&(case.packet)(0, pod));
    let mut seen = packet.clone();
    host.lookups.set(0);
    let verdict = core(&host, case.program, &mut seen);
    ensure!(verdict == case.expected, "{verdict:?} in place of {:?}", case.expected);
    if verdict == Verdict::ForwardIntoPod {
        // Which the adapter writes, for it has asked the routing.
        seen.bytes[..12].copy_from_slice(node::INTO_POD.as_flattened());
    }
    let (_, found) = kernel.run_at(delivery.interface(case.program), case.program, &packet, 0)?;
    ensure!(found == seen, "the kernel makes something else of it");
    Ok(host.lookups.get())
}

/// What the packet core does with it on a host.
fn core(tables: &HostTables, program: &str, packet: &mut HostPacket) -> Verdict {
    let mut path = None;
    match program {
        REQUEST => match proxier_ebpf::request(packet, tables, Origin::Outside) {
            verdict @ (Verdict::Forward | Verdict::ForwardIntoPod) => {
                packet.onward = node::POD_LINK;
                let into_pod = verdict == Verdict::ForwardIntoPod;
                proxier_ebpf::forward_to_pod(packet, tables, into_pod, &mut path)
            }
            verdict => verdict,
        },
        DIRECT_REPLY => {
            packet.link = node::POD_LINK;
            proxier_ebpf::reply_directly(packet, tables, &mut path)
        }
        _ => proxier_ebpf::reply(packet, tables, DELIVERY_STACK),
    }
}

/// Nanoseconds of a run, each by itself; in the middle of all.
fn singles(
    program: BorrowedFd<'_>,
    interface: u32,
    runs: u32,
    packet: impl Fn(u32) -> HostPacket,
    expected: i32,
) -> anyhow::Result<f64> {
    let mut taken = Vec::new();
    for number in 0..runs {
        let outcome = test_run(program, interface, &packet(number).bytes, 1, 0)?;
        ensure!(outcome.code == expected, "run {number} returned {}", outcome.code);
        taken.push(outcome.duration.as_nanos() as f64);
    }
    let spread = super::statistics::Spread::of(&taken).context("no runs")?;
    Ok(spread.median)
}

/// Nanoseconds of a run among many: the fastest of a few series, as everything else that happens only adds.
fn repeated(program: BorrowedFd<'_>, packet: &HostPacket) -> anyhow::Result<f64> {
    let mut fastest = f64::INFINITY;
    for _ in 0..10 {
        let outcome = test_run(program, LOOPBACK, &packet.bytes, REPETITIONS, 0)?;
        fastest = fastest.min(outcome.duration.as_nanos() as f64);
    }
    Ok(fastest)
}
