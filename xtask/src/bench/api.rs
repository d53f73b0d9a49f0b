//! `cargo xtask bench api`: what it costs to serve the API.

use anyhow::Result;

use super::bench;
use crate::process::{run as run_it, say};

/// How much of it.
#[derive(Debug, clap::Args)]
pub(super) struct ApiOptions {
    /// Services, each with four pods, two of them on the clients' node
    #[arg(long, default_value_t = Self::default().services)]
    services: u32,
    /// Changes a second, of one Service or one pod each
    #[arg(long, default_value_t = Self::default().per_second)]
    per_second: u32,
    /// For how long
    #[arg(long, default_value_t = Self::default().seconds)]
    seconds: u32,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self { services: 1_000, per_second: 1_000, seconds: 10 }
    }
}

/// Measures and prints. The benchmark serves by itself: it needs no agent and, unlike the others, no root.
pub(super) fn run(options: &ApiOptions, profile: &str) -> Result<()> {
    let ApiOptions { services, per_second, seconds } = options;
    say("building the benchmark of the API, minutes with all optimization; then measuring for a minute");
    let numbers = [services, per_second, seconds].map(ToString::to_string);
    run_it(bench("proxier", "api", profile).args(numbers))
}
