//! The lab: a client, a node and its pods as network namespaces on this machine, with what it takes to send any
//! packet and to see every packet. For tests that need a kernel, and for `cargo xtask demo`.
//!
//! Not for the agent's insides: the agent is a program that the lab starts, as a DaemonSet would.

pub mod agent;
pub mod apiserver;
pub mod bench;
pub mod capture;
pub mod connection;
pub mod container;
pub mod exchange;
pub mod host;
pub mod http;
pub mod inbox;
pub mod kube_scenario;
pub mod loss;
pub mod manifests;
pub mod matrix;
pub mod neighbour;
pub mod netns;
pub mod packets;
pub mod program;
pub mod report;
pub mod responder;
pub mod scenario;
pub mod tap;
pub mod topology;
pub mod wait;

use anyhow::bail;

/// Whether this process may make namespaces.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails unless [`is_root`].
///
/// # Errors
///
/// Says what to do about it.
pub fn need_root() -> anyhow::Result<()> {
    if !is_root() {
        bail!(
            "the lab makes network namespaces and loads eBPF programs, which takes root: run it again with sudo"
        );
    }
    Ok(())
}

/// Whether the programs of Debian's `packages` that a test runs are there. If not, that has been said, and the test is to end early;
/// the xtask that runs all of them installs them.
///
/// # Panics
///
/// One is missing, under `CI=true`: a test left out there would never be missed.
#[must_use]
pub fn has_programs(programs: &[&str], packages: &str) -> bool {
    for program in programs {
        if let Err(error) = std::process::Command::new(program).arg("--version").output() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "no {program} here, though CI=true: {error}"
            );
            eprintln!("SKIPPED: no {program} here ({error}): apt-get install {packages}");
            return false;
        }
    }
    true
}

/// Ends a test early, loudly, when it is not run as root. Under `CI=true` that is a failure: a tier left out there
/// would never be missed.
#[macro_export]
macro_rules! skip_unless_root {
    () => {
        if !$crate::is_root() {
            let reason = "lab tests need root: run `cargo xtask test` as root";
            assert!(std::env::var("CI").as_deref() != Ok("true"), "not run, though CI=true: {reason}");
            eprintln!("SKIPPED: {}: {reason}", module_path!());
            return;
        }
    };
}
