//! The clock that the kernel programs use.

use anyhow::Context as _;
use proxier_common::timeout::SECOND;

/// `CLOCK_MONOTONIC` in nanoseconds, which is what `bpf_ktime_get_ns` returns, and as of the last tick `bpf_ktime_get_coarse_ns`.
///
/// # Errors
///
/// The kernel has no such clock.
pub(super) fn monotonic() -> anyhow::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).context("no monotonic clock")?;
    Ok(u64::try_from(now.tv_sec())? * SECOND + u64::try_from(now.tv_nsec())?)
}
