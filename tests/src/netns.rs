//! Network namespaces: made, entered, removed. Only the network is separate: mounts stay shared, so that pins on a
//! bpffs are visible from everywhere (`ip netns exec` would hide them).

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{prctl::set_pdeathsig, signal::Signal},
};

const DIRECTORY: &str = "/run/netns";

/// A named network namespace, removed when this is dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes a namespace called `name`; one of that name that an earlier run left behind is replaced.
    ///
    /// # Errors
    ///
    /// No privilege, or no iproute2.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        crate::need_root()?;
        let path = path_of(name);
        if path.exists() {
            delete(name)?;
        }
        ip(&["netns", "add", name], "")?;
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let namespace = Self { name: name.to_owned(), file };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name below `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is bound, for `nsenter --net=PATH`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// Runs `work` inside, on a thread of its own. Sockets opened there stay inside wherever they are used.
    ///
    /// # Panics
    ///
    /// When `work` does.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .unwrap_or_else(|errno| panic!("cannot enter namespace {}: {errno}", self.name));
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside, and dies with the thread that starts it.
    ///
    /// # Errors
    ///
    /// No file descriptor left.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> anyhow::Result<Command> {
        let file = self.file.try_clone().context("cannot duplicate the namespace's descriptor")?;
        let parent = nix::unistd::getpid();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only system calls are made, no allocation and no lock.
        unsafe {
            command.pre_exec(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                // A lab that is killed must not leave its processes behind.
                set_pdeathsig(Signal::SIGKILL)?;
                if nix::unistd::getppid() != parent {
                    return Err(Errno::ESRCH.into());
                }
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs lines of `ip` commands inside, in one process.
    ///
    /// # Errors
    ///
    /// What `ip` says about the line that failed.
    pub fn ip(&self, batch: &str) -> anyhow::Result<()> {
        // Not `ip -n`: it remounts `/`, which fails where `/` is no mount point, as in a chroot.
        run_ip(self.command("ip")?, &["-batch", "-"], batch)
    }

    /// Sets a parameter of its network stack, such as `net.ipv4.ip_forward`.
    ///
    /// # Errors
    ///
    /// The kernel has no such parameter or refuses the value.
    pub fn sysctl(&self, parameter: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(parameter.replace('.', "/"));
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("cannot set {parameter}={value} in namespace {}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = delete(&self.name) {
            eprintln!("cannot remove namespace {}: {error:#}", self.name);
        }
    }
}

/// Names of all namespaces there are.
#[must_use]
pub fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Removes the namespace called `name`.
///
/// # Errors
///
/// There is none, or no privilege.
pub fn delete(name: &str) -> anyhow::Result<()> {
    ip(&["netns", "delete", name], "")
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn ip(arguments: &[&str], input: &str) -> anyhow::Result<()> {
    run_ip(Command::new("ip"), arguments, input)
}

fn run_ip(mut command: Command, arguments: &[&str], input: &str) -> anyhow::Result<()> {
    let mut child = command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C reaches the whole foreground group, and would break the clean-up in the middle of a command.
        .process_group(0)
        .spawn()
        .context("cannot run `ip`: install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        // `ip` may stop reading at the first line that fails: its own message says more than EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("`ip {}` failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
