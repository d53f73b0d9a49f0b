//! The agent, run as the program it is: on the lab's node, with its log in a file. Not for anything inside it.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    topology::{Lab, NODE_NAME, UPLINK},
    wait,
};

/// A first start loads and verifies all programs; a machine busy with other tests takes its time over that.
const READY_WITHIN: Duration = Duration::from_secs(120);
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Where the agent's binary is: `PROXIER_AGENT`, or what cargo last built.
///
/// # Errors
///
/// There is none; says how to build it.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = env::var_os("PROXIER_AGENT") {
        return Ok(path.into());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let path = target.join("debug/proxier");
    if !path.exists() {
        bail!(
            "{} is missing: run `cargo xtask test`, or set PROXIER_AGENT to an agent's binary",
            path.display()
        );
    }
    Ok(path)
}

/// How to start the agent.
#[derive(Clone, Debug)]
pub struct AgentSpec {
    /// The program.
    pub binary: PathBuf,
    /// The directory of manifests.
    pub manifests: PathBuf,
    /// The words before `to-bpf`: the source.
    pub source: Vec<OsString>,
    /// Where its log goes.
    pub log: PathBuf,
    /// The interface it attaches to.
    pub uplink: String,
    /// The words that name another sink than `to-bpf`, with its flags.
    pub sink: Option<Vec<OsString>>,
    /// More arguments, after the sink.
    pub arguments: Vec<OsString>,
    /// More environment.
    pub environment: Vec<(OsString, OsString)>,
}

impl AgentSpec {
    /// The agent at `binary`, reading `manifests`, logging to `log`.
    #[must_use]
    pub fn new(binary: &Path, manifests: &Path, log: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
            manifests: manifests.to_owned(),
            source: vec!["file".into(), "--input".into(), manifests.into()],
            log: log.to_owned(),
            uplink: UPLINK.to_owned(),
            sink: None,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// The same with more arguments of `to-bpf`.
    #[must_use]
    pub fn with_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(OsString::from));
        self
    }

    /// The same with another sink than `to-bpf`: its name, and its flags.
    #[must_use]
    pub fn with_sink(mut self, words: &[&OsStr]) -> Self {
        self.sink = Some(words.iter().map(OsString::from).collect());
        self
    }

    /// Starts it on the lab's node, on the uplink, and returns at once.
    ///
    /// # Errors
    ///
    /// The program cannot be run.
    pub fn spawn(&self, lab: &Lab) -> anyhow::Result<Agent> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot write {}", self.log.display()))?;
        let log_start = log.metadata()?.len();
        let to_bpf = || -> Vec<OsString> {
            let words = ["to-bpf", "--uplink", &self.uplink, "--pin-path"].map(OsString::from);
            words.into_iter().chain([lab.pin_path().into()]).collect()
        };
        let child = lab
            .node
            .namespace
            .command(&self.binary)?
            .args(&self.source)
            .args(["--node-name", NODE_NAME])
            .args(self.sink.clone().unwrap_or_else(to_bpf))
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the lab, which then stops the agent in its own time.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", self.binary.display()))?;
        Ok(Agent { child, log: self.log.clone(), log_start })
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    ///
    /// It ends, or is not ready in time; the error has its log.
    pub fn start(&self, lab: &Lab) -> anyhow::Result<Agent> {
        let mut agent = self.spawn(lab)?;
        agent.wait_ready()?;
        Ok(agent)
    }
}

/// A running agent. Killed when this is dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
    /// Earlier agents wrote to the same file.
    log_start: u64,
}

impl Agent {
    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start).unwrap_or(usize::MAX).min(bytes.len());
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Its process's number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it logs.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Waits until it says `ready`: the first whole state is in the kernel.
    ///
    /// # Errors
    ///
    /// As [`AgentSpec::start`].
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        self.wait_for_log(READY_WITHIN, |log| {
            log.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready")
        })
        .context("the agent is not ready")
    }

    /// Waits until its log is as `matches` wants.
    ///
    /// # Errors
    ///
    /// It ended, or time is over; the error has the log.
    pub fn wait_for_log(&mut self, timeout: Duration, matches: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        let answer = wait::until(timeout, || {
            // Asked first: what it wrote before it ended is then in the log for sure.
            let ended = self.child.try_wait().transpose();
            if matches(&self.log()) { Some(Ok(())) } else { ended.map(Err) }
        });
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(ended)) => bail!("it ended ({}):\n{}", ended?, self.log()),
            None => bail!("gave up after {timeout:?}; its log, {}:\n{}", self.log.display(), self.log()),
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn wait_end(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let ended = wait::until(timeout, || self.child.try_wait().transpose());
        ended
            .with_context(|| format!("still running after {timeout:?}:\n{}", self.log()))?
            .map_err(Into::into)
    }

    /// Kills it without a chance to clean up, as an out-of-memory kill does.
    ///
    /// # Errors
    ///
    /// It had ended before by itself.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("it had already ended ({status}):\n{}", self.log());
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM), as Kubernetes does, and waits.
    ///
    /// # Errors
    ///
    /// It does not end in time, or not with success.
    pub fn stop(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let status = self.wait_end(STOP_WITHIN)?;
        if !status.success() {
            bail!("it ended with {status}:\n{}", self.log());
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the agent's binary on the node with `arguments`, until it ends.
///
/// # Errors
///
/// It cannot be run.
pub fn run<A: AsRef<OsStr>>(lab: &Lab, binary: &Path, arguments: &[A]) -> anyhow::Result<Output> {
    let mut command = lab.node.namespace.command(binary)?;
    command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", binary.display()))
}
