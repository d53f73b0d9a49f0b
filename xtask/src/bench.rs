//! `cargo xtask bench`: measures, and shows figures; judges nothing. What is measured and how is in `tests/benches` and
//! `proxier/benches`.

use std::{ffi::OsStr, path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::{
    build_ebpf,
    environment::{Environment, LAB_TOOLS, Tool, as_root_hint, is_root},
    process::{cargo, run, say},
    test,
};

mod api;
mod chart;
mod control;
mod data;
mod table;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchOptions {
    /// One part only; all by default
    #[command(subcommand)]
    what: Option<Bench>,
    /// Of `data` 3 rounds of short bursts with one external address each: under two minutes
    #[arg(long, global = true)]
    quick: bool,
    /// How agent and benchmark are built; what people run is `release`
    #[arg(long, global = true, default_value = "release", value_name = "PROFILE")]
    profile: String,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long, global = true)]
    no_install: bool,
}

/// What is measured.
#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// From the API server to the kernel's maps: first list, time of a change, memory, restart
    Control(control::ControlOptions),
    /// What it takes to serve the API, and how long a change takes to a client
    Api(api::ApiOptions),
    /// From a client to a pod: throughput, packets, round trips, connections; by proxier and by what people use in its place
    Data(data::DataOptions),
}

/// Runs the command.
pub(crate) fn run_command(options: &BenchOptions) -> Result<()> {
    let environment = Environment::new(!options.no_install);
    match &options.what {
        Some(Bench::Control(control)) => control::run(control, &build(&environment, options, &[])?),
        Some(Bench::Data(data)) => {
            data::run(data, options.quick, &build(&environment, options, data::TOOLS)?)
        }
        Some(Bench::Api(api)) => {
            // The agent does not build without, though nothing of it is loaded.
            build_ebpf::build(&environment)?;
            api::run(api, &options.profile)
        }
        None => {
            let built = build(&environment, options, data::TOOLS)?;
            control::run(&control::ControlOptions::default(), &built)?;
            data::run(&data::DataOptions::default(), options.quick, &built)?;
            api::run(&api::ApiOptions::default(), &options.profile)
        }
    }
}

/// What is measured, and how it was built.
#[derive(Debug)]
struct Built {
    object: PathBuf,
    agent: PathBuf,
    profile: String,
}

impl Built {
    /// Runs one of the programs in `tests/benches` on it.
    fn bench<A: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = A>) -> Result<()> {
        let mut command = bench("proxier-tests", name, &self.profile);
        command.args(arguments).env("PROXIER_AGENT", &self.agent).env("PROXIER_BPF_OBJECT", &self.object);
        run(&mut command)
    }
}

/// A benchmark's program, whose arguments follow.
fn bench(package: &str, name: &str, profile: &str) -> Command {
    let mut command = cargo();
    command.args(["bench", "--profile", profile, "--package", package, "--bench", name, "--"]);
    command
}

/// Everything that a benchmark of the agent needs, `tools` beside those of every lab.
fn build(environment: &Environment, options: &BenchOptions, tools: &[Tool]) -> Result<Built> {
    if !is_root() {
        bail!("the agent programs a kernel, which needs root. Run: {}", as_root_hint("bench"));
    }
    environment.ensure_tools(LAB_TOOLS)?;
    environment.ensure_tools(tools)?;
    environment.ensure_bpf_file_system()?;
    let object = build_ebpf::build(environment)?;
    say(&format!(
        "building the agent with profile {}; with all optimization, that takes minutes",
        options.profile
    ));
    let agent = test::build_agent_with(|command| {
        command.args(["--profile", &options.profile]);
    })?;
    Ok(Built { object, agent, profile: options.profile.clone() })
}
