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
            let program = load(verdict)?;
            Ok(link(&program, index)?)
        })?;
        Ok(Self { _link: link })
    }
}

/// The start of `union bpf_attr` for the two commands used here; the kernel takes the rest as zero.
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

// Numbers of the kernel's user interface, linux/bpf.h.
const BPF_PROG_LOAD: c_long = 5;
const BPF_LINK_CREATE: c_long = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

fn load(verdict: Verdict) -> io::Result<OwnedFd> {
    // r0 = verdict; exit. An instruction is 8 bytes: operation, registers, offset, immediate.
    let mut instructions = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0_u8];
    instructions[4] = verdict as u8;
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
    };
    bpf(BPF_PROG_LOAD, &attributes)
}

fn link(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    let program = program.as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_CREATE, &LinkAttributes { program, interface, attach_type: BPF_TCX_INGRESS, flags: 0 })
}

/// A `bpf(2)` command that returns a descriptor.
fn bpf<T>(command: c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` lives through the call, as does what it points to, and its size is given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for the caller.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}
