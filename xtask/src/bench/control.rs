//! `cargo xtask bench control`: what the agent needs to follow an API server.

use anyhow::Result;

use super::Built;
use crate::process::say;

/// How much of it.
#[derive(Debug, clap::Args)]
pub(super) struct ControlOptions {
    /// Services, each with four pods on this node and four on others
    #[arg(long, default_value_t = Self::default().services)]
    services: u32,
    /// Changes, of one pod each
    #[arg(long, default_value_t = Self::default().changes)]
    changes: u32,
    /// Changes a second
    #[arg(long, default_value_t = Self::default().per_second)]
    per_second: u32,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self { services: 5_000, changes: 1_000, per_second: 100 }
    }
}

/// Measures and prints.
pub(super) fn run(options: &ControlOptions, built: &Built) -> Result<()> {
    let ControlOptions { services, changes, per_second } = options;
    say("measuring the control plane");
    let numbers = [services, changes, per_second].map(ToString::to_string);
    built.bench("control", numbers)
}
