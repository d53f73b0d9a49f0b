//! A Rust compiler that takes unstable flags: sanitizers and branch coverage are such. rustup's nightly where it is
//! there; else the compiler in use, told by `RUSTC_BOOTSTRAP` to take them all the same. None is installed.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    process::{clean_cargo, output, workspace},
    toolchain::{OLDEST_COMPILER, Version},
};

/// A toolchain, and how it is made to take unstable flags.
#[derive(Debug, Clone)]
pub(crate) struct Unstable {
    /// rustup's name, if it is not the toolchain in use.
    name: Option<&'static str>,
    /// Whether it is a stable one that has to be told.
    bootstrap: bool,
    /// What `rustc -vV` says.
    verbose: String,
}

impl fmt::Display for Unstable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.verbose.lines().next().unwrap_or_default();
        let how = if self.bootstrap { ", with RUSTC_BOOTSTRAP=1" } else { "" };
        write!(formatter, "{version}{how}")
    }
}

impl Unstable {
    /// Finds one.
    pub(crate) fn find() -> Result<Self> {
        let ask = |name: Option<&'static str>| {
            let mut toolchain = Self { name, bootstrap: false, verbose: String::new() };
            toolchain.verbose = output(toolchain.rustc().arg("-vV"))?;
            anyhow::Ok(toolchain)
        };
        let active = ask(None)?;
        if is_unstable(&active.verbose) {
            return Ok(active);
        }
        match ask(Some("nightly")) {
            Ok(nightly) if is_unstable(&nightly.verbose) && is_new_enough(&nightly.verbose) => Ok(nightly),
            _ => Ok(Self { bootstrap: true, ..active }),
        }
    }

    /// `program`, a cargo or one of its tools, in the workspace and with this toolchain.
    pub(crate) fn run(&self, program: &Path) -> Command {
        let mut command = clean_cargo(program);
        self.choose(&mut command);
        command
    }

    fn rustc(&self) -> Command {
        let mut command = Command::new("rustc");
        command.current_dir(workspace());
        self.choose(&mut command);
        command
    }

    fn choose(&self, command: &mut Command) {
        // cargo sets both for the toolchain that runs this program.
        command.env_remove("LD_LIBRARY_PATH");
        if let Some(name) = self.name {
            command.env_remove("CARGO").env_remove("RUSTC").env("RUSTUP_TOOLCHAIN", name);
        }
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
    }

    /// The folder of its own libraries and programs for the machine that it runs on.
    pub(crate) fn rustlib(&self) -> Result<PathBuf> {
        let sysroot = output(self.rustc().args(["--print", "sysroot"]))?;
        Ok(Path::new(sysroot.trim()).join("lib/rustlib").join(field(&self.verbose, "host: ")?))
    }

    /// The major version of its LLVM.
    pub(crate) fn llvm(&self) -> Result<u32> {
        let version = field(&self.verbose, "LLVM version: ")?;
        let major = version.split('.').next().and_then(|text| text.parse().ok());
        major.with_context(|| format!("not an LLVM version: {version}"))
    }

    /// What rustup calls it.
    pub(crate) fn rustup_name(&self) -> Option<String> {
        self.name.map(str::to_owned).or_else(|| std::env::var("RUSTUP_TOOLCHAIN").ok())
    }
}

fn field<'a>(verbose: &'a str, name: &str) -> Result<&'a str> {
    verbose
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .with_context(|| format!("`rustc -vV` prints no \"{name}\""))
}

fn is_unstable(verbose: &str) -> bool {
    field(verbose, "release: ")
        .is_ok_and(|release| release.ends_with("-nightly") || release.ends_with("-dev"))
}

fn is_new_enough(verbose: &str) -> bool {
    field(verbose, "release: ")
        .ok()
        .and_then(Version::parse)
        .is_some_and(|version| version >= OLDEST_COMPILER)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STABLE: &str = "rustc 1.95.0 (0123 2026-04-14)\nhost: x86_64-unknown-linux-gnu\nrelease: 1.95.0\nLLVM version: 22.1.2\n";
    const NIGHTLY: &str =
        "rustc 1.97.0-nightly (0123 2026-05-19)\nhost: x86_64-unknown-linux-gnu\nrelease: 1.97.0-nightly\n";

    #[test]
    fn a_nightly_takes_unstable_flags_and_a_release_must_be_told() {
        assert!(is_unstable(NIGHTLY));
        assert!(!is_unstable(STABLE));
        let told = Unstable { name: None, bootstrap: true, verbose: STABLE.into() };
        assert_eq!(told.to_string(), "rustc 1.95.0 (0123 2026-04-14), with RUSTC_BOOTSTRAP=1");
        let command = told.run(Path::new("cargo"));
        assert!(
            command.get_envs().any(|(name, value)| name == "RUSTC_BOOTSTRAP" && value == Some("1".as_ref()))
        );
    }

    #[test]
    fn an_old_nightly_is_none() {
        assert!(is_new_enough(NIGHTLY));
        assert!(!is_new_enough(&NIGHTLY.replace("1.97", "1.80")));
    }

    #[test]
    fn the_llvm_of_a_compiler_is_read() {
        let toolchain = Unstable { name: None, bootstrap: true, verbose: STABLE.into() };
        assert_eq!(toolchain.llvm().unwrap(), 22);
    }
}
