//! The two programs that nothing can be faster than, as instructions: too few to compile them.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::Context as _;
use aya::maps::MapInfo;

/// An instruction is 8 bytes: operation, the two registers, offset, immediate (`struct bpf_insn`, linux/bpf.h).
const fn instruction(operation: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([operation, source << 4 | destination, low, high, a, b, c, d])
}

const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE: u8 = 0xbf;
const ADD_IMMEDIATE: u8 = 0x07;
const STORE_IMMEDIATE_64: u8 = 0x7a;
const LOAD_IMMEDIATE_64: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// As a source register of a 64-bit load: the immediate is a map's descriptor.
const IS_MAP: u8 = 1;
const LOOKUP: i32 = 1;
const FRAME: u8 = 10;
const NEXT: i32 = -1;

/// Returns at once.
pub(super) fn nothing() -> io::Result<OwnedFd> {
    load(&[instruction(MOVE_IMMEDIATE, 0, 0, 0, NEXT), instruction(EXIT, 0, 0, 0, 0)])
}

/// Looks up a key that is not there, of 16 bytes, in `map`, and returns.
pub(super) fn lookup(map: &MapInfo) -> anyhow::Result<OwnedFd> {
    // The program keeps the map; the descriptor has to live for as long as it is being loaded.
    let map = map.fd()?;
    let program = load(&[
        instruction(STORE_IMMEDIATE_64, FRAME, 0, -16, 0),
        instruction(STORE_IMMEDIATE_64, FRAME, 0, -8, 0),
        instruction(LOAD_IMMEDIATE_64, 1, IS_MAP, 0, map.as_fd().as_raw_fd()),
        // Its second half: the upper 32 bits of the immediate.
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE, 2, FRAME, 0, 0),
        instruction(ADD_IMMEDIATE, 2, 0, 0, -16),
        instruction(CALL, 0, 0, 0, LOOKUP),
        instruction(MOVE_IMMEDIATE, 0, 0, 0, NEXT),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    program.context("the verifier does not take it")
}

/// The start of `union bpf_attr` for BPF_PROG_LOAD (linux/bpf.h); the kernel takes the rest as zero.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    let mut attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
    };
    let size = size_of::<LoadAttributes>();
    // SAFETY: `attributes` and what it points to live through the call, and their sizes are given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw mut attributes, size) };
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows it.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        // *(u64 *)(r10 - 16) = 0
        let store = instruction(STORE_IMMEDIATE_64, FRAME, 0, -16, 0);
        assert_eq!(store.to_ne_bytes(), [0x7a, 0x0a, 0xf0, 0xff, 0, 0, 0, 0]);
        // r0 = -1
        let next = instruction(MOVE_IMMEDIATE, 0, 0, 0, NEXT);
        assert_eq!(next.to_ne_bytes(), [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}
