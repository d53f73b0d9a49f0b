//! Traffic, made and counted: where it comes from and goes to, on which CPU, and how much of it there is. Nothing here knows
//! what is between the two ends.
//!
//! A packet is carried through veths and the node by whoever sends it, in the softirq of its CPU, up to the socket of whoever
//! receives it. So with both ends on CPUs of their own, the one that sends does the work that is being measured.

use std::net::Ipv4Addr;

use anyhow::Context as _;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::netns::Namespace;

pub mod connections;
pub mod datagrams;
pub mod round_trips;
pub mod throughput;

/// TCP port of the server of [`connections`].
pub const CONNECTIONS_PORT: u16 = 7000;
/// UDP port of the receiver of [`datagrams`].
pub const DATAGRAMS_PORT: u16 = 7001;
/// TCP port of the server of [`round_trips`].
pub const ROUND_TRIPS_PORT: u16 = 7002;
/// TCP port of iperf3, of [`throughput`].
pub const THROUGHPUT_PORT: u16 = 7003;

/// The CPUs of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// Where the client runs.
    pub client: usize,
    /// Where the pod runs.
    pub pod: usize,
}

impl Cpus {
    /// The first two that this process may use, or twice the only one.
    ///
    /// # Errors
    ///
    /// The kernel does not say which those are.
    pub fn choose() -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("which CPUs may be used?")?;
        let mut usable = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let client = usable.next().context("no CPU may be used")?;
        Ok(Self { client, pod: usable.next().unwrap_or(client) })
    }
}

/// Keeps the calling thread on `cpu`.
fn pin(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| format!("CPU {cpu}"))
}

/// Where traffic comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// Where clients are.
    pub client: &'a Namespace,
    /// The clients' addresses.
    pub clients: &'a [Ipv4Addr],
    /// Where servers are.
    pub pod: &'a Namespace,
    /// The address that clients use.
    pub target: Ipv4Addr,
    /// Which CPU each end runs on.
    pub cpus: Cpus,
}
