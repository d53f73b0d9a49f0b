//! What a developer runs: one file per command. `cargo xtask help` lists them.

mod bench;
mod build_ebpf;
mod cargo_tool;
mod coverage;
mod demo;
mod environment;
mod fuzz;
mod image;
mod kernels;
mod lint;
mod process;
mod test;
mod toolchain;
mod unstable;
mod verify;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;

use crate::environment::{Environment, LAB_TOOLS, as_root_hint, is_root};

/// Builds, shows and tests proxier. What a command needs and the machine lacks gets installed, with a line each.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Command {
    /// Compile the kernel programs into target/proxier.bpf.o, which the agent embeds
    BuildEbpf(build_ebpf::BuildOptions),
    /// Show the agent at work between network namespaces of this machine (as root)
    Demo(DemoCommand),
    /// Run every test: on the host, in the kernel, in the lab (as root)
    Test(test::TestOptions),
    /// Measure what the agent needs, and how fast it is (as root)
    Bench(bench::BenchOptions),
    /// Boot older kernels in virtual machines and check the agent in each (minutes, 60 MB of downloads)
    Kernels(kernels::KernelsOptions),
    /// Fuzz the packet core on the host, from the committed corpus
    Fuzz(fuzz::FuzzOptions),
    /// Show what of the packet core its tests on the host reach, and what not
    Coverage(coverage::CoverageOptions),
    /// Make the container image: the static agent and nothing else
    Image(image::ImageOptions),
    /// Run clippy on everything, the kernel programs included, with warnings denied
    Lint(lint::LintOptions),
}

/// The demo's own arguments, and what comes before it.
#[derive(Debug, clap::Args)]
struct DemoCommand {
    #[command(flatten)]
    options: demo::DemoOptions,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
}

fn main() -> ExitCode {
    let outcome = match Command::parse() {
        Command::BuildEbpf(options) => build_ebpf::run_command(&options).map(|()| true),
        Command::Demo(command) => show(&command),
        Command::Test(options) => test::run_command(&options),
        Command::Bench(options) => bench::run_command(&options).map(|()| true),
        Command::Kernels(options) => kernels::run_command(&options),
        Command::Fuzz(options) => fuzz::run_command(&options),
        Command::Coverage(options) => coverage::run_command(&options),
        Command::Image(options) => image::run_command(&options),
        Command::Lint(options) => lint::run_command(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(command: &DemoCommand) -> Result<bool> {
    // Before minutes of building, not after.
    if !is_root() {
        bail!("the demo makes network namespaces, which needs root. Run: {}", as_root_hint("demo"));
    }
    let environment = Environment::new(!command.no_install);
    environment.ensure_tools(LAB_TOOLS)?;
    environment.ensure_bpf_file_system()?;
    let agent = match &command.options.agent {
        Some(agent) => agent.clone(),
        None => {
            build_ebpf::build(&environment)?;
            test::build_agent()?
        }
    };
    demo::run(&agent, &command.options)
}
