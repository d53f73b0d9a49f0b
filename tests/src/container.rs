//! The agent's container image, run by podman on the lab's node as a kubelet would have it run: in the node's network, on the
//! node's bpffs, with a root file system that cannot be written. Not for how the image is made: `cargo xtask image`.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, bail};

use crate::{
    topology::{BPFFS, Lab, NODE_NAME},
    wait,
};

/// The variable with the image's name in the local container storage.
pub const IMAGE: &str = "PROXIER_IMAGE";

/// As for the agent itself; starting a container comes on top.
const READY_WITHIN: Duration = Duration::from_secs(120);
const LABEL: &str = "proxier-lab";

/// The image to test.
///
/// # Errors
///
/// There is none, or nothing to run it; says what to do.
pub fn image() -> anyhow::Result<String> {
    let Ok(image) = env::var(IMAGE) else {
        bail!("{IMAGE} names no image: run `cargo xtask image --test` as root");
    };
    podman(&["image", "exists", &image])
        .with_context(|| format!("podman has no image {image}: run `cargo xtask image --test` as root"))?;
    Ok(image)
}

/// What a container may do, as options of `podman run`.
#[derive(Clone, Debug)]
pub struct Privileges(Vec<String>);

impl Privileges {
    /// Everything, as `privileged: true` gives.
    #[must_use]
    pub fn all() -> Self {
        Self(vec!["--privileged".to_owned()])
    }

    /// These capabilities (`BPF`, ...), and no way to more.
    #[must_use]
    pub fn only(capabilities: &[String]) -> Self {
        let mut options = vec!["--cap-drop=ALL".to_owned(), "--security-opt=no-new-privileges".to_owned()];
        options.extend(capabilities.iter().map(|capability| format!("--cap-add={capability}")));
        // The profile of Debian 12's podman refuses bpf() to all but SYS_ADMIN, whatever the capabilities.
        options.push("--security-opt=seccomp=unconfined".to_owned());
        Self(options)
    }
}

/// How to start a container of the agent's image.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// Which image.
    pub image: String,
    /// What it may do.
    pub privileges: Privileges,
    /// Files and directories that it sees and cannot write, each with where it sees them.
    pub mounts: Vec<(PathBuf, PathBuf)>,
    /// A file of variables, as a ConfigMap has them.
    pub variables: Option<OsString>,
    /// Variables beside these, as the kubelet adds them.
    pub environment: Vec<(String, String)>,
}

impl ContainerSpec {
    /// A privileged container of `image`.
    #[must_use]
    pub fn new(image: &str) -> Self {
        Self {
            image: image.to_owned(),
            privileges: Privileges::all(),
            mounts: Vec::new(),
            variables: None,
            environment: Vec::new(),
        }
    }

    /// Starts `proxier` with `arguments` on the lab's node, and returns at once.
    ///
    /// # Errors
    ///
    /// What podman says.
    pub fn start(&self, lab: &Lab, arguments: &[&str]) -> anyhow::Result<Container> {
        remove_leftovers();
        // One agent works on a lab at a time, and the lab's name has this process's id.
        let name = format!("{}-agent", lab.node.namespace.name());
        let _ = podman(&["rm", "--force", "--time=0", &name]);
        podman_with(|command| {
            command.args(["run", "--detach", "--name", &name]);
            self.options(lab, command);
            command.arg(&self.image).args(arguments);
        })?;
        Ok(Container { name })
    }

    /// Runs `proxier` with `arguments` on the lab's node until it ends, and removes the container.
    ///
    /// # Errors
    ///
    /// It could not be started, or ended with an error.
    pub fn run(&self, lab: &Lab, arguments: &[&str]) -> anyhow::Result<Output> {
        podman_with(|command| {
            command.args(["run", "--rm"]);
            self.options(lab, command);
            command.arg(&self.image).args(arguments);
        })
    }

    fn options(&self, lab: &Lab, command: &mut Command) {
        command.arg("--pull=never").arg(format!("--label={LABEL}={}", std::process::id()));
        command.arg(format!("--network=ns:{}", lab.node.namespace.path().display()));
        // podman's own limits are above what a container may be that is itself started in one.
        command.args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]);
        command.args(["--read-only", "--read-only-tmpfs=false"]).args(&self.privileges.0);
        command.arg(format!("--volume={BPFFS}:{BPFFS}")).arg(format!("--env=NODE_NAME={NODE_NAME}"));
        for (from, at) in &self.mounts {
            command.arg(format!("--volume={}:{}:ro", from.display(), at.display()));
        }
        for (name, value) in &self.environment {
            command.arg(format!("--env={name}={value}"));
        }
        if let Some(file) = &self.variables {
            command.arg("--env-file").arg(file);
        }
    }
}

/// A container of the agent. Killed and removed when this is dropped.
#[derive(Debug)]
pub struct Container {
    name: String,
}

impl Container {
    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        podman(&["logs", &self.name]).map_or_else(|error| format!("{error:#}"), |output| text(&output))
    }

    /// Waits until the agent says `ready`.
    ///
    /// # Errors
    ///
    /// It ended, or time is over; the error has its log.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        let is_ready = |log: &str| log.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready");
        let answer = wait::until(READY_WITHIN, || {
            let running = self.state("{{.State.Running}}").map(|state| state == "true");
            if is_ready(&self.log()) {
                Some(Ok(true))
            } else {
                Some(running).filter(|state| !matches!(state, Ok(true)))
            }
        });
        match answer.transpose()? {
            Some(true) => Ok(()),
            Some(false) => bail!("the agent has ended:\n{}", self.log()),
            None => bail!("the agent is not ready after {READY_WITHIN:?}:\n{}", self.log()),
        }
    }

    /// Asks it to end (SIGTERM), as the kubelet does, and returns its exit code.
    ///
    /// # Errors
    ///
    /// What podman says; it did not end in time, and was killed.
    pub fn stop(&self) -> anyhow::Result<i32> {
        podman(&["stop", "--time=10", &self.name])?;
        self.exit_code()
    }

    /// Kills it without a chance to clean up, as an out-of-memory kill does.
    ///
    /// # Errors
    ///
    /// It had ended before by itself.
    pub fn kill(&self) -> anyhow::Result<()> {
        podman(&["kill", "--signal=KILL", &self.name]).with_context(|| self.log())?;
        self.exit_code().map(drop)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// What podman says.
    pub fn exit_code(&self) -> anyhow::Result<i32> {
        let output = podman(&["wait", &self.name])?;
        text(&output).trim().parse().context("`podman wait` prints no exit code")
    }

    fn state(&self, format: &str) -> anyhow::Result<String> {
        Ok(text(&podman(&["inspect", "--format", format, &self.name])?).trim().to_owned())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = podman(&["rm", "--force", "--time=0", &self.name]) {
            eprintln!("cannot remove container {}: {error:#}", self.name);
        }
    }
}

/// Shows the files of `image` to `look`, as they are in it.
///
/// # Errors
///
/// What podman says.
pub fn look_inside<T>(image: &str, look: impl FnOnce(&Path) -> T) -> anyhow::Result<T> {
    let directory = text(&podman(&["image", "mount", image])?);
    let seen = look(Path::new(directory.trim()));
    podman(&["image", "unmount", image])?;
    Ok(seen)
}

/// What podman knows of `image`.
///
/// # Errors
///
/// What podman says.
pub fn inspect(image: &str) -> anyhow::Result<serde_json::Value> {
    let output = podman(&["image", "inspect", image])?;
    let images: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(images[0].clone())
}

/// Removes containers of tests that were killed: podman keeps a container running that nobody waits for.
fn remove_leftovers() {
    let format = format!("{{{{.ID}}}} {{{{index .Labels \"{LABEL}\"}}}}");
    let Ok(output) = podman(&["ps", "--all", "--filter", &format!("label={LABEL}"), "--format", &format])
    else {
        return;
    };
    for line in text(&output).lines() {
        if let Some((id, pid)) = line.split_once(' ')
            && !Path::new("/proc").join(pid).exists()
        {
            let _ = podman(&["rm", "--force", "--time=0", id]);
        }
    }
}

fn podman(arguments: &[&str]) -> anyhow::Result<Output> {
    podman_with(|command| {
        command.args(arguments);
    })
}

fn podman_with(more: impl FnOnce(&mut Command)) -> anyhow::Result<Output> {
    let mut command = Command::new("podman");
    // crun, which podman takes where it is there, does not run on a machine with cgroups of both versions.
    command.arg("--runtime=runc");
    more(&mut command);
    let output = command.output().context("cannot run podman: install podman and runc")?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!("`podman {}` failed ({}): {}", arguments.join(" "), output.status, text(&output).trim());
    }
    Ok(output)
}

/// Both of its outputs: a container's log is on either.
fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}
