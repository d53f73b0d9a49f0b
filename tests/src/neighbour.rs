//! Somebody else's program on the same hook, as Cilium or Calico would have one: it does nothing but give a verdict.

use std::{
    ffi::c_long,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use crate::netns::Namespace;

/// What the program says about every packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes to the stack; programs after this one are not asked.
    Pass = 0,
    /// Is dropped.
    Drop = 2,
}

/// A program at the end of the line of an interface's tcx ingress, until this is dropped.
#[derive(Debug)]
pub struct Neighbour {
    _link: OwnedFd,
}

impl Neighbour {
    /// Attaches a program behind those that are there already.
    ///
    /// # Errors
    ///
    /// No privilege, or a kernel without tcx (before 6.6).
    pub fn attach(namespace: &Namespace, interface: &str, verdict: Verdict) -> anyhow::Result<Self> {
        let link = namespace.enter(|| -> anyhow::Result<OwnedFd> {
            let index = nix::net::if_::if_nametoindex(interface)?;
            let program = load(BPF_PROG_TYPE_SCHED_CLS, verdict as u8)?;
            Ok(link(&program, index, BPF_TCX_INGRESS)?)
        })?;
        Ok(Self { _link: link })
    }

    /// Attaches one at XDP that lets everything go, where there is no other.
    ///
    /// # Errors
    ///
    /// No privilege, or there is one.
    pub fn attach_at_xdp(namespace: &Namespace, interface: &str) -> anyhow::Result<Self> {
        let link = namespace.enter(|| -> anyhow::Result<OwnedFd> {
            let index = nix::net::if_::if_nametoindex(interface)?;
            let program = load(BPF_PROG_TYPE_XDP, XDP_PASS)?;
            Ok(link(&program, index, BPF_XDP)?)
        })?;
        Ok(Self { _link: link })
    }
}

/// How many programs an interface has at tcx, ingress and egress together, whosever they are. bpftool learned to
/// tell in version 7.3, which many distributions do not have.
///
/// # Errors
///
/// As [`Neighbour::attach`].
pub fn tcx_programs(namespace: &Namespace, interface: &str) -> anyhow::Result<u32> {
    namespace.enter(|| {
        let interface = nix::net::if_::if_nametoindex(interface)?;
        let mut programs = 0;
        for attach_type in [BPF_TCX_INGRESS, BPF_TCX_EGRESS] {
            let mut attributes = QueryAttributes { interface, attach_type, ..QueryAttributes::default() };
            bpf(BPF_PROG_QUERY, &mut attributes)?;
            programs += attributes.count;
        }
        Ok(programs)
    })
}

/// The start of `union bpf_attr` for the commands used here; the kernel takes the rest as zero.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    interface: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
    more: [u64; 4],
}

// Numbers of the kernel's user interface, linux/bpf.h.
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_QUERY: c_long = 16;
const BPF_LINK_CREATE: c_long = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_PASS: u8 = 2;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

fn load(program_type: u32, verdict: u8) -> io::Result<OwnedFd> {
    // r0 = verdict; exit. An instruction is 8 bytes: operation, registers, offset, immediate.
    let mut instructions = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0_u8];
    instructions[4] = verdict;
    let mut attributes = LoadAttributes {
        program_type,
        instruction_count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
    };
    bpf(BPF_PROG_LOAD, &mut attributes).map(own)
}

fn link(program: &OwnedFd, interface: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let program = program.as_raw_fd().cast_unsigned();
    let mut attributes = LinkAttributes { program, interface, attach_type, flags: 0 };
    bpf(BPF_LINK_CREATE, &mut attributes).map(own)
}

/// Owns the result of a command that makes a descriptor.
fn own(result: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(result) }
}

fn bpf<T>(command: c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` lives through the call, as does what it points to, and its size is given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
