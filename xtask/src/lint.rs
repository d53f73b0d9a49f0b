//! `cargo xtask lint`: clippy with warnings denied, on the workspace and on the kernel programs as the kernel's target
//! sees them, which the workspace's run cannot reach. Formatting is `cargo fmt`'s.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build_ebpf::{build, cargo_for_ebpf},
    environment::{Environment, candidate},
    process::{cargo, run, say, workspace},
    toolchain::{self, Compiler},
};

/// Arguments of `lint`.
#[derive(Debug, clap::Args)]
pub(crate) struct LintOptions {
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
}

/// Runs the command; whether nothing was found. Both parts run, so that one run shows all there is.
pub(crate) fn run_command(options: &LintOptions) -> Result<bool> {
    let environment = Environment::new(!options.no_install);
    // The agent includes the object at compile time, so clippy needs it as well.
    build(&environment)?;
    let mut workspace = cargo();
    workspace.args(["clippy", "--workspace", "--all-targets", "--keep-going", "--", "-D", "warnings"]);
    let mut clean = passed(&mut workspace);
    let compiler = toolchain::compiler(&environment)?;
    match driver(&environment, &compiler) {
        Ok(driver) => clean &= lint_kernel_programs(&compiler, driver),
        Err(error) => say(&format!("LEFT OUT: clippy for the kernel programs: {error:#}")),
    }
    Ok(clean)
}

fn passed(command: &mut Command) -> bool {
    run(command).inspect_err(|error| say(&format!("{error:#}"))).is_ok()
}

/// The clippy of the compiler that makes eBPF: another's cannot read its libraries.
fn driver(environment: &Environment, compiler: &Compiler) -> Result<PathBuf> {
    const DEBIAN_PACKAGE: &str = "rust-web-clippy";
    let driver = compiler.rustc.with_file_name("clippy-driver");
    if driver.is_file() {
        return Ok(driver);
    }
    if compiler.rustc.starts_with("/usr/bin") && candidate(DEBIAN_PACKAGE).is_some() {
        say(&format!("installing {DEBIAN_PACKAGE}: clippy for {compiler}"));
        environment.install(&[DEBIAN_PACKAGE])?;
    }
    driver.is_file().then_some(driver).with_context(|| format!("{compiler} comes without clippy-driver"))
}

fn lint_kernel_programs(compiler: &Compiler, driver: PathBuf) -> bool {
    say(&format!("clippy for the kernel programs with {}", driver.display()));
    // This is what `cargo clippy` does; its own front end insists on the driver that lies beside it.
    passed(
        cargo_for_ebpf(compiler, "check")
            .arg("--target-dir")
            .arg(workspace().join("target/ebpf-lint"))
            .env("RUSTC_WORKSPACE_WRAPPER", driver)
            .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__"),
    )
}
