//! `cargo xtask bench`: measures, and prints figures; judges nothing. What is measured and how is in `tests/benches` and
//! `proxier/benches`.

use anyhow::{Result, bail};

use crate::{
    build_ebpf,
    environment::{Environment, LAB_TOOLS, as_root_hint, is_root},
    process::{cargo, run, say},
    test,
};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchOptions {
    #[command(subcommand)]
    what: Bench,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long, global = true)]
    no_install: bool,
}

/// What is measured.
#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// From the API server to the kernel's maps: first list, time of a change, memory, restart
    Control(ControlOptions),
    /// What it takes to serve the API, and how long a change takes to a client
    Api(ApiOptions),
}

/// How much of it.
#[derive(Debug, clap::Args)]
struct ControlOptions {
    /// Services, each with four pods on this node and four on others
    #[arg(long, default_value_t = 5_000)]
    services: u32,
    /// Changes, of one pod each
    #[arg(long, default_value_t = 1_000)]
    changes: u32,
    /// Changes a second
    #[arg(long, default_value_t = 100)]
    per_second: u32,
}

/// How much of it.
#[derive(Debug, clap::Args)]
struct ApiOptions {
    /// Services, each with four pods, two of them on the clients' node
    #[arg(long, default_value_t = 1_000)]
    services: u32,
    /// Changes a second, of one Service or one pod each
    #[arg(long, default_value_t = 1_000)]
    per_second: u32,
    /// For how long
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

/// Runs the command.
pub(crate) fn run_command(options: &BenchOptions) -> Result<()> {
    let environment = Environment::new(!options.no_install);
    match &options.what {
        Bench::Control(options) => control(&environment, options),
        Bench::Api(options) => api(&environment, options),
    }
}

fn control(environment: &Environment, options: &ControlOptions) -> Result<()> {
    if !is_root() {
        bail!("the agent programs a kernel, which needs root. Run: {}", as_root_hint("bench"));
    }
    environment.ensure_tools(LAB_TOOLS)?;
    environment.ensure_bpf_file_system()?;
    build_ebpf::build(environment)?;
    say("building the agent as people run it: with all optimization, that takes minutes");
    let agent = test::build_agent_with(|command| {
        command.arg("--release");
    })?;
    let ControlOptions { services, changes, per_second } = options;
    say("measuring");
    let numbers = [services, changes, per_second].map(ToString::to_string);
    run(cargo()
        .args(["bench", "--package", "proxier-tests", "--bench", "control", "--"])
        .args(numbers)
        .env("PROXIER_AGENT", agent))
}

fn api(environment: &Environment, options: &ApiOptions) -> Result<()> {
    // The agent does not build without, though nothing of it is loaded.
    build_ebpf::build(environment)?;
    say("building with all optimization, that takes minutes; then measuring for a minute");
    let ApiOptions { services, per_second, seconds } = options;
    let numbers = [services, per_second, seconds].map(ToString::to_string);
    run(cargo().args(["bench", "--package", "proxier", "--bench", "api", "--"]).args(numbers))
}
