//! Runs other programs and says which command failed, how, and where. It knows nothing of what they are for.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// What `cargo run` adds for the crate it runs. A cargo started from here must not see it: build scripts that watch
/// one of these variables would be run again each time a build alternates between a shell and xtask.
const OF_THE_OUTER_CARGO: [&str; 4] =
    ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_BIN_NAME", "OUT_DIR"];

/// Prints one line about what is going on; to stderr, as stdout is for results.
pub(crate) fn say(line: &str) {
    eprintln!("xtask: {line}");
}

/// The cargo that runs this program (cargo names itself in `CARGO`), else the one in `PATH`.
pub(crate) fn cargo() -> Command {
    clean_cargo(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `program`, a cargo, in the workspace and without the outer cargo's variables.
pub(crate) fn clean_cargo(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || OF_THE_OUTER_CARGO.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

/// The top of the work tree.
pub(crate) fn workspace() -> &'static Path {
    // The crate lies one level below it, which cannot change without this file being compiled again.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Runs a command whose output the user sees; an error unless it exits with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("`{}` did not start", line_of(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", line_of(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output; its standard error is part of the error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("`{}` did not start", line_of(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}: {}",
            line_of(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where `program` is in `PATH`. The administrator's folders count too: Debian leaves them out of a user's `PATH`.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// The command as one would type it.
pub(crate) fn line_of(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_command_its_status_and_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"])).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("`sh -c"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("no such thing"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_that_names_it() {
        let error = run(&mut Command::new("/nowhere/to/be/found")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/to/be/found"), "{error}");
        assert_eq!(which("surely-no-such-program"), None);
    }

    #[test]
    fn the_workspace_is_where_the_lock_file_is() {
        assert!(workspace().join("Cargo.lock").is_file());
    }
}
