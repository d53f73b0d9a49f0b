//! What is run: a program with its arguments, no shell, and an environment that is the same wherever the agent was started.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::fd::RawFd,
    process::Stdio,
};

use anyhow::Context as _;
use tokio::process::{Child, Command};

use crate::model::NodeName;

/// Where programs are looked for if the agent itself was not told: as root's login has it on Debian.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of a long command line a message shows.
const SHOWN: usize = 200;

/// A program to be run, again and again in the same way.
#[derive(Clone, Debug)]
pub struct Invocation {
    program: OsString,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
}

impl Invocation {
    /// `program` with `arguments`. Its environment has the agent's PATH, LANG=C.UTF-8 so that messages and sorting are the same
    /// everywhere, and NODE_NAME; nothing else but what is [added](Self::with_variable).
    ///
    /// Descriptors that this process was started with, and that its own child would inherit, are no longer inherited from now on.
    ///
    /// # Errors
    ///
    /// They cannot be listed.
    pub fn new(program: OsString, arguments: Vec<OsString>, node: &NodeName) -> anyhow::Result<Self> {
        keep_descriptors_to_ourselves().context("cannot tell which descriptors a command would inherit")?;
        let path = env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| DEFAULT_PATH.into());
        let variables: [(&str, OsString); 3] =
            [("PATH", path), ("LANG", "C.UTF-8".into()), ("NODE_NAME", node.as_str().into())];
        let environment = variables.into_iter().map(|(name, value)| (name.into(), value)).collect();
        Ok(Self { program, arguments, environment })
    }

    /// The same with another variable, or another value of one.
    #[must_use]
    pub fn with_variable(mut self, name: impl AsRef<OsStr>, value: OsString) -> Self {
        self.environment.insert(name.as_ref().to_owned(), value);
        self
    }

    /// Starts it as the leader of a process group, with pipes for all three streams.
    pub(super) fn spawn(&self) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs(&self.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec only `signal` is called, which is async-signal-safe: no allocation, no lock.
        unsafe {
            command.pre_exec(|| {
                reset_signals();
                Ok(())
            });
        }
        command.spawn()
    }
}

impl fmt::Display for Invocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = std::iter::once(&self.program).chain(&self.arguments);
        let line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        // A script given as an argument has lines.
        let line = line.escape_debug().to_string();
        match line.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(f, "`{}...`", &line[..end]),
            None => write!(f, "`{line}`"),
        }
    }
}

/// What this process ignores stays ignored across exec: a shell could not even trap it. The mask is the standard library's to
/// empty.
fn reset_signals() {
    // Those of realtime included: `_NSIG` on all but MIPS.
    const LAST_SIGNAL: libc::c_int = 64;
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: it has no memory as argument. It fails for SIGKILL, SIGSTOP and those of libc's own, which need no reset.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Everything that Rust opens is closed on exec; what somebody left open when this process was started is not.
fn keep_descriptors_to_ourselves() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let descriptor: Option<RawFd> = name.to_str().and_then(|name| name.parse().ok());
        let Some(descriptor) = descriptor.filter(|descriptor| *descriptor > libc::STDERR_FILENO) else {
            continue;
        };
        // SAFETY: it sets a flag and has no memory as argument. One that was closed meanwhile is an error of no consequence; one
        // that was opened anew has the flag already.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}
