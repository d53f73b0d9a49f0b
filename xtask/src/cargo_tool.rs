//! Subcommands of cargo that do not come with it: found where they are, or installed into the cache, each in the one
//! version that is known to work.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    environment::Environment,
    process::{cargo, line_of, output, run, say, which},
    toolchain::cache,
};

/// A program that `cargo install` makes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CargoTool {
    /// Its crate and its program.
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// Why it is needed, as the rest of "installing X: ...".
    pub(crate) purpose: &'static str,
}

impl CargoTool {
    /// Finds the program, or installs it.
    pub(crate) fn find(&self, environment: &Environment) -> Result<PathBuf> {
        let Self { name, version, purpose } = self;
        let home = cache()?.join(format!("{name}-{version}"));
        let installed = home.join("bin").join(name);
        let found = which(name).into_iter().chain([installed.clone()]).find(|program| self.is_at(program));
        if let Some(program) = found {
            return Ok(program);
        }
        let mut install = cargo();
        install.args(["install", name, "--version", version, "--locked", "--force", "--root"]).arg(&home);
        let line = line_of(&install);
        if !environment.may_install() {
            bail!("no {name} {version} ({purpose}). Run:\n  {line}");
        }
        say(&format!("installing {name} {version} into {} (a minute): {purpose}", home.display()));
        run(&mut install).with_context(|| format!("{name} could not be built. By hand: {line}"))?;
        if !self.is_at(&installed) {
            bail!(
                "{} was built but does not run; remove {} and try again",
                installed.display(),
                home.display()
            );
        }
        Ok(installed)
    }

    fn is_at(&self, program: &Path) -> bool {
        // They expect to be called by cargo, which names the subcommand first.
        let subcommand = self.name.trim_start_matches("cargo-");
        program.is_file()
            && output(Command::new(program).args([subcommand, "--version"]))
                .is_ok_and(|answer| is_version(&answer, self.version))
    }
}

/// Whether `answer`, as `cargo-fuzz 0.13.2`, is of this version.
fn is_version(answer: &str, version: &str) -> bool {
    answer.split_whitespace().any(|word| word == version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_TOOL: CargoTool =
        CargoTool { name: "cargo-surely-no-such-tool", version: "1.2.3", purpose: "nothing" };

    #[test]
    fn without_permission_the_command_is_named() {
        let error = NO_TOOL.find(&Environment::new(false)).unwrap_err().to_string();
        assert!(error.contains("install cargo-surely-no-such-tool --version 1.2.3 --locked"), "{error}");
    }

    #[test]
    fn another_version_is_another_tool() {
        assert!(is_version("cargo-fuzz 0.13.2\n", "0.13.2"));
        assert!(!is_version("cargo-fuzz 0.13.20\n", "0.13.2"));
        assert!(!NO_TOOL.is_at(Path::new("/nowhere")));
    }
}
