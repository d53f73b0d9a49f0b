//! `cargo xtask build-ebpf`: compiles the kernel programs into the object that the agent carries. Which compiler and
//! linker do it is `toolchain`'s business; whether the kernel accepts the result, `verify`'s.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    environment::Environment,
    process::{clean_cargo, run, say, workspace},
    toolchain::{Compiler, Core, TARGET, compiler, linker},
    verify,
};

/// Arguments of `build-ebpf`.
#[derive(Debug, clap::Args)]
pub(crate) struct BuildOptions {
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
    /// Load every program through this kernel's verifier and print what each costs (needs root)
    #[arg(long)]
    verify: bool,
    /// Accepted for habit's sake: the object is always an optimised one, as the verifier refuses others
    #[arg(long, hide = true)]
    release: bool,
}

/// Runs the command.
pub(crate) fn run_command(options: &BuildOptions) -> Result<()> {
    if options.verify {
        verify::need_root()?;
    }
    let environment = Environment::new(!options.no_install);
    let object = build(&environment)?;
    println!("{}", object.display());
    if options.verify {
        verify::verify(&environment, &object)?;
    }
    Ok(())
}

/// Where the object lies, whatever `CARGO_TARGET_DIR` says: proxier/build.rs looks for it there.
pub(crate) fn object_path() -> PathBuf {
    workspace().join("target/proxier.bpf.o")
}

/// Builds the object and returns its path.
pub(crate) fn build(environment: &Environment) -> Result<PathBuf> {
    let compiler = compiler(environment)?;
    let linker = linker(environment, &compiler)?;
    say(&format!("building the kernel programs with {compiler}"));
    let target = workspace().join("target/ebpf");
    let mut command = cargo_for_ebpf(&compiler, "build");
    command.arg("--target-dir").arg(&target).env("CARGO_ENCODED_RUSTFLAGS", flags(&linker));
    run(&mut command).context("the kernel programs do not compile")?;
    let built = target.join(TARGET).join("ebpf/proxier-ebpf");
    let object = object_path();
    if copy_if_changed(&built, &object)? {
        say(&format!("{} is new", object.display()));
    }
    Ok(object)
}

/// The cargo subcommand for the kernel programs, without what the user has set for ordinary programs.
pub(crate) fn cargo_for_ebpf(compiler: &Compiler, subcommand: &str) -> Command {
    let own = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = clean_cargo(compiler.cargo.clone().map_or(own, OsString::from));
    command.args([subcommand, "--quiet", "--package", "proxier-ebpf", "--bin", "proxier-ebpf"]);
    command.args(["--profile", "ebpf", "--target", TARGET]);
    if compiler.core == Core::Source {
        command.arg("-Zbuild-std=core");
    }
    for (name, _) in std::env::vars_os() {
        if is_for_ordinary_programs(&name.to_string_lossy()) {
            command.env_remove(&name);
        }
    }
    command
        .env("RUSTC", &compiler.rustc)
        // aya-ebpf asks for an unstable feature of the compiler, as eBPF is a target without guarantees.
        .env("RUSTC_BOOTSTRAP", "1")
        // Empty overrides what a configuration file sets; a compiler cache knows nothing of bitcode.
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "");
    command
}

fn is_for_ordinary_programs(variable: &str) -> bool {
    matches!(variable, "RUSTFLAGS" | "LD_LIBRARY_PATH" | "CARGO_ENCODED_RUSTFLAGS" | "CARGO_BUILD_TARGET")
        || variable.starts_with("CARGO_BUILD_RUST")
        || variable.starts_with("CARGO_PROFILE_")
        || variable.starts_with("CARGO_TARGET_BPF")
}

/// In cargo's encoding, where a blank in a path is no separator.
fn flags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Clinker=");
    flags.push(linker);
    // BTF names the maps' fields for bpftool, and the kernel wants it for BTF-typed maps.
    flags.push("\x1f-Clink-arg=--btf");
    // Otherwise LLVM zeroes and moves memory by calls of `memset` and `memmove`, which go byte by byte: of a packet for nobody here
    // that was half the time, and much of the verifier's work.
    flags.push("\x1f-Clink-arg=--disable-expand-memcpy-in-order");
    flags
}

/// Copies a file unless it is already there with the same content, as a new date alone relinks the agent.
fn copy_if_changed(from: &Path, to: &Path) -> Result<bool> {
    let new = std::fs::read(from).with_context(|| format!("{}: cannot be read", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == new) {
        return Ok(false);
    }
    let partial = to.with_extension(format!("{}.partial", std::process::id()));
    std::fs::write(&partial, new)
        .and_then(|()| std::fs::rename(&partial, to))
        .with_context(|| format!("{}: cannot be written", to.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_object_is_not_written_again() {
        let folder = std::env::temp_dir().join(format!("proxier-xtask-copy-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (from, to) = (folder.join("built"), folder.join("object.bpf.o"));
        std::fs::write(&from, "one").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        let written = to.metadata().unwrap().modified().unwrap();
        assert!(!copy_if_changed(&from, &to).unwrap());
        assert_eq!(to.metadata().unwrap().modified().unwrap(), written);
        std::fs::write(&from, "two").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "two");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "no partial file is left behind");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_flags_survive_a_blank_in_a_path() {
        let flags = flags(Path::new("/a b/bpf-linker"));
        let flags: Vec<&str> = flags.to_str().unwrap().split('\x1f').collect();
        assert_eq!(flags[0], "-Clinker=/a b/bpf-linker");
        assert!(flags[1..].iter().all(|flag| flag.starts_with("-Clink-arg=--")), "{flags:?}");
    }

    #[test]
    fn what_is_set_for_ordinary_programs_does_not_reach_the_kernel_programs() {
        assert!(is_for_ordinary_programs("RUSTFLAGS"));
        assert!(is_for_ordinary_programs("CARGO_BUILD_RUSTC_WRAPPER"));
        assert!(is_for_ordinary_programs("CARGO_PROFILE_RELEASE_LTO"));
        assert!(!is_for_ordinary_programs("CARGO_HOME"));
        assert!(!is_for_ordinary_programs("CARGO_NET_OFFLINE"));
    }
}
