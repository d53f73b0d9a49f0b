//! Single programs on single packets (BPF_PROG_TEST_RUN), attached to nothing: what each kind of packet costs, beside a
//! program that does nothing and one that does a single look-up.
//!
//! A program that rewrites is fed its own output when it is repeated, so it gets each packet anew, by a call of its own, of
//! which the median is taken. That includes caches and branch predictors that a system call has used meanwhile, and reading the
//! clock; what does nothing is measured in the same way beside it. What rewrites nothing is repeated in the kernel as well.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Context as _, ensure};
use etherparse::{Icmpv4Header, Icmpv4Type, icmpv4::DestUnreachableHeader};
use proxier_common::{
    Address, BackendKey, BackendValue, DELIVERY_STACK, ExternalKey, MemberKey, MemberValue, PodKey, PodValue,
    ServiceValue, timeout::SECOND,
};
use proxier_ebpf::{
    Origin, Verdict,
    host::{HostPacket, HostTables},
};
use serde::{Deserialize, Serialize};

use crate::{
    packets::{Packet, TcpFlags, protocol},
    program::{Kernel, TCX_NEXT, test_run},
};

mod floor;

const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 0);
const NOBODYS: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 0);
const POD: Ipv4Addr = Ipv4Addr::new(11, 0, 2, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 254);
const REQUEST: &str = "proxier_request";
const REPLY: &str = "proxier_reply";
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
    /// Nanoseconds of a run among many, for packets that no run changes.
    pub repeated: Option<f64>,
    /// How many look-ups in maps the packet core does; none where a program is not the core's.
    pub lookups: Option<u32>,
}

/// What a program is given, run by run.
struct Case {
    name: &'static str,
    program: &'static str,
    /// What makes the maps ready, before all runs.
    before: Vec<(&'static str, Packet)>,
    /// The packet of this run.
    packet: fn(u32) -> Packet,
    expected: Verdict,
}

fn client(number: u32) -> SocketAddr {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + number);
    (address, 40_000).into()
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

fn request(_: u32) -> Packet {
    Packet::udp(at(CLIENT, 40_000), at(EXTERNAL, 7000), b"a byte, or more")
}

fn reply(_: u32) -> Packet {
    Packet::udp(at(POD, 7000), at(CLIENT, 40_000), b"a byte, or more")
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
    let syn = TcpFlags { syn: true, ..TcpFlags::default() };
    let established = || vec![(REQUEST, request(0))];
    let case = |name, program, before, packet, expected| Case { name, program, before, packet, expected };
    vec![
        case(
            "miss",
            REQUEST,
            vec![],
            |_| Packet::udp(at(CLIENT, 40_000), at(NOBODYS, 7000), b""),
            Verdict::Next,
        ),
        case(
            "pod's own packet",
            REPLY,
            vec![],
            |_| Packet::udp(at(POD, 9), at(CLIENT, 9), b""),
            Verdict::Next,
        ),
        case(
            "first packet of a client",
            REQUEST,
            vec![],
            |number| Packet::udp(client(number), at(EXTERNAL, 7000), b"a byte, or more"),
            Verdict::Rewritten,
        ),
        case("request, UDP", REQUEST, established(), request, Verdict::Rewritten),
        case("reply, UDP", REPLY, established(), reply, Verdict::Rewritten),
        case(
            "request, TCP",
            REQUEST,
            vec![(REQUEST, segment(at(CLIENT, 40_000), at(EXTERNAL, 7000), syn))],
            |_| {
                segment(at(CLIENT, 40_000), at(EXTERNAL, 7000), TcpFlags { ack: true, ..TcpFlags::default() })
            },
            Verdict::Rewritten,
        ),
        case(
            "reply, TCP",
            REPLY,
            vec![(REQUEST, segment(at(CLIENT, 40_000), at(EXTERNAL, 7000), syn))],
            |_| segment(at(POD, 7000), at(CLIENT, 40_000), TcpFlags { ack: true, ..TcpFlags::default() }),
            Verdict::Rewritten,
        ),
        case(
            "request, later fragment",
            REQUEST,
            large(at(CLIENT, 40_000), at(EXTERNAL, 7000))
                .into_iter()
                .take(1)
                .map(|piece| (REQUEST, piece))
                .collect(),
            |_| large(at(CLIENT, 40_000), at(EXTERNAL, 7000)).swap_remove(1),
            Verdict::Rewritten,
        ),
        case(
            "reply, later fragment",
            REPLY,
            established()
                .into_iter()
                .chain([(REPLY, large(at(POD, 7000), at(CLIENT, 40_000)).swap_remove(0))])
                .collect(),
            |_| large(at(POD, 7000), at(CLIENT, 40_000)).swap_remove(1),
            Verdict::Rewritten,
        ),
        case(
            "ICMP error about a reply",
            REQUEST,
            established(),
            |_| error(&Packet::udp(at(EXTERNAL, 7000), at(CLIENT, 40_000), b"a byte, or more")),
            Verdict::Rewritten,
        ),
    ]
}

/// A Service with one pod.
fn tables() -> HostTables {
    let (service_id, generation) = (1, 1);
    let tables = HostTables::default();
    tables.now.set(1_000 * SECOND);
    let pod = Address::from(std::net::IpAddr::from(POD));
    let external = Address::from(std::net::IpAddr::from(EXTERNAL));
    tables.services.borrow_mut().insert(
        ExternalKey { external },
        ServiceValue {
            service_id,
            generation,
            backend_count: 1,
            affinity_timeout: 10_800,
            flags: 0,
            source_generation: 0,
        },
    );
    tables.backends.borrow_mut().insert(BackendKey { service_id, generation, slot: 0 }, BackendValue { pod });
    tables.members.borrow_mut().insert(
        MemberKey { pod, service_id, padding: 0 },
        MemberValue { since_generation: generation, flags: 0 },
    );
    tables.pods.borrow_mut().insert(PodKey { pod }, PodValue { external, flags: 0, padding: 0 });
    tables
}

/// The frame, as the programs get it.
fn frame(packet: &Packet) -> HostPacket {
    HostPacket::new(packet.frame([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]))
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
    let mut kernel = Kernel::load();
    let packet = frame(&request(0));
    kernel.set(&tables());
    let mut timings = Vec::new();
    let nothing = floor::nothing().context("the program that does nothing")?;
    let lookup = floor::lookup(&kernel.map("services")).context("the program with one look-up")?;
    for (name, program, lookups) in [("nothing", &nothing, 0), ("one look-up", &lookup, 1)] {
        let single = singles(program.as_fd(), runs, |_| packet.clone(), TCX_NEXT)?;
        let repeated = repeated(program.as_fd(), &packet)?;
        timings.push(Timing {
            case: name.to_owned(),
            single,
            repeated: Some(repeated),
            lookups: Some(lookups),
        });
    }
    for case in cases() {
        kernel.set(&tables());
        timings.push(time(&kernel, &case, runs).with_context(|| case.name.to_owned())?);
    }
    Ok(timings)
}

fn time(kernel: &Kernel, case: &Case, runs: u32) -> anyhow::Result<Timing> {
    let host = tables();
    for (program, packet) in &case.before {
        let (code, _) = kernel.run(program, &frame(packet), 0)?;
        ensure!(code == TCX_NEXT, "{packet} is not let through: {code}");
        core(&host, program, &mut frame(packet));
    }
    let program = kernel.program(case.program);
    let mut seen = frame(&(case.packet)(0));
    host.lookups.set(0);
    let verdict = core(&host, case.program, &mut seen);
    ensure!(verdict == case.expected, "{verdict:?} in place of {:?}", case.expected);
    let lookups = host.lookups.get();
    let (_, found) = kernel.run(case.program, &frame(&(case.packet)(0)), 0)?;
    ensure!(found == seen, "the kernel makes something else of it");
    let unchanged = verdict == Verdict::Next;
    Ok(Timing {
        case: case.name.to_owned(),
        // Number 0 has been seen above.
        single: singles(program, runs, |number| frame(&(case.packet)(number + 1)), TCX_NEXT)?,
        repeated: unchanged.then(|| repeated(program, &frame(&(case.packet)(0)))).transpose()?,
        lookups: Some(lookups),
    })
}

/// What the packet core does with it on a host.
fn core(tables: &HostTables, program: &str, packet: &mut HostPacket) -> Verdict {
    if program == REQUEST {
        proxier_ebpf::request(packet, tables, Origin::Outside)
    } else {
        proxier_ebpf::reply(packet, tables, DELIVERY_STACK)
    }
}

/// Nanoseconds of a run, each by itself; in the middle of all.
fn singles(
    program: BorrowedFd<'_>,
    runs: u32,
    packet: impl Fn(u32) -> HostPacket,
    expected: i32,
) -> anyhow::Result<f64> {
    let mut taken = Vec::new();
    for number in 0..runs {
        let outcome = test_run(program, &packet(number).bytes, 1, 0)?;
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
        let outcome = test_run(program, &packet.bytes, REPETITIONS, 0)?;
        fastest = fastest.min(outcome.duration.as_nanos() as f64);
    }
    Ok(fastest)
}
