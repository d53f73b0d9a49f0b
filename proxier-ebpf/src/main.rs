//! The kernel programs: entry points that hand a packet to the core and turn its verdict into an action code.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`. On a host this is a program that says so: the core
//! itself is the library, which builds everywhere.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("proxier-ebpf runs in the kernel; build it with `cargo xtask build-ebpf`");
    std::process::exit(2);
}
