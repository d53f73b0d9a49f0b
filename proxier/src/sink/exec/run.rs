//! One run of the command: started, fed, read, and ended when its time is over. Nothing of it is left when this returns, but for
//! what has made itself a session of its own.

use std::{
    convert::Infallible,
    future::{Future, pending},
    io,
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::process::ExitStatusExt as _,
    },
    pin::{Pin, pin},
    process::ExitStatus,
    time::Duration,
};

use futures::future::{FusedFuture as _, FutureExt as _};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use thiserror::Error;
use tokio::{
    io::{AsyncWriteExt as _, Interest, unix::AsyncFd},
    process::{Child, ChildStdin},
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    Timing,
    invocation::Invocation,
    output::{Head, Tail},
};

/// How much of what a run prints is passed on.
pub(super) const MAX_STDOUT: usize = 64 * 1024;
/// How much of its standard error is kept, the last.
const MAX_STDERR: usize = 4 * 1024;
/// How long to read what a run has left in its pipes. They are at their end at once unless a process that has left the
/// group holds them.
const DRAIN: Duration = Duration::from_millis(500);

/// Why a run has failed.
#[derive(Debug, Error)]
pub enum Failure {
    /// There was none.
    #[error("cannot be started: {0}: {advice}", advice = advice(.0))]
    Start(io::Error),
    /// It was there, and cannot be watched.
    #[error("cannot be watched, and was ended: {0}")]
    Watch(io::Error),
    /// The command says so, or something else has ended it.
    #[error("{}", said(.0))]
    Status(ExitStatus),
    /// It took too long, and was ended.
    #[error("was not done within {} s, and was ended (--timeout)", .0.as_secs_f64())]
    Timeout(Duration),
    /// It was ended with the agent.
    #[error("was ended with the agent")]
    Stopped,
}

/// What to do about a program that does not start.
fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "see whether the file is there (in a container: in its image, or mounted), and the interpreter that its first line \
             names"
        }
        Some(libc::EACCES) => {
            "make the file executable (chmod +x), on a file system that is not mounted noexec"
        }
        Some(libc::ENOEXEC) => "a script's first line must name its interpreter, such as #!/bin/sh",
        _ => "see whether the machine has processes, memory and descriptors left",
    }
}

fn said(status: &ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        },
        (None, None) => format!("ended with {status}"),
    }
}

/// What came of a run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) result: Result<(), Failure>,
    pub(super) stdout: Head,
    pub(super) stderr: Tail,
}

impl Outcome {
    fn without_output(failure: Failure) -> Self {
        Self { result: Err(failure), stdout: Head::default(), stderr: Tail::default() }
    }
}

/// Runs `invocation` with `text` on its standard input. `going_on` is closed when the agent ends.
pub(super) async fn run(
    invocation: &Invocation,
    text: &str,
    timing: &Timing,
    going_on: watch::Receiver<()>,
) -> Outcome {
    let mut child = match invocation.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::without_output(Failure::Start(error)),
    };
    let group = match Group::of(&child) {
        Ok(group) => group,
        // It is killed as it is dropped.
        Err(error) => return Outcome::without_output(Failure::Watch(error)),
    };
    let (mut stdout, mut stderr) = (Head::default(), Tail::default());
    let end = {
        let feeding = feed(child.stdin.take(), text);
        let reading = stdout.read(child.stdout.take(), MAX_STDOUT);
        let reading_errors = stderr.read(child.stderr.take(), MAX_STDERR);
        let mut streams = pin!(futures::future::join3(feeding, reading, reading_errors).fuse());
        let end = tokio::select! {
            end = supervise(&group, timing, going_on) => end,
            never = go_on_with(streams.as_mut()) => match never {},
        };
        if !streams.is_terminated() {
            let _ = timeout(DRAIN, streams).await;
        }
        end
    };
    let result = match (end, child.wait().await) {
        (End::TimedOut, _) => Err(Failure::Timeout(timing.timeout)),
        (End::Stopped, _) => Err(Failure::Stopped),
        (End::OfItself, Ok(status)) if status.success() => Ok(()),
        (End::OfItself, Ok(status)) => Err(Failure::Status(status)),
        (End::OfItself, Err(error)) => Err(Failure::Watch(error)),
    };
    Outcome { result, stdout, stderr }
}

/// A command may have no interest in what it is given: a pipe that it does not read to the end is no failure.
async fn feed(stdin: Option<ChildStdin>, text: &str) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(text.as_bytes()).await;
    }
}

async fn go_on_with(future: Pin<&mut impl Future>) -> Infallible {
    future.await;
    pending().await
}

/// How a run has come to its end.
enum End {
    OfItself,
    TimedOut,
    Stopped,
}

/// Waits for the command's end, or brings it about; then ends what it has left behind.
async fn supervise(group: &Group, timing: &Timing, going_on: watch::Receiver<()>) -> End {
    let end = tokio::select! {
        () = group.leader_ended() => End::OfItself,
        () = sleep(timing.timeout) => End::TimedOut,
        () = until_stopped(going_on, timing.grace) => End::Stopped,
    };
    if !matches!(end, End::OfItself) {
        group.signal(Signal::SIGTERM);
        let _ = timeout(timing.grace, group.leader_ended()).await;
    }
    // What the leader has left behind would work against the next run, or hold its pipes open for ever.
    group.signal(Signal::SIGKILL);
    group.leader_ended().await;
    end
}

/// Waits until the agent ends, and then for a run that is nearly done.
async fn until_stopped(mut going_on: watch::Receiver<()>, grace: Duration) {
    while going_on.changed().await.is_ok() {}
    sleep(grace).await;
}

/// The process group of a command. Its number is nobody else's as long as the leader has not been waited for, so that a signal
/// cannot reach strangers; the leader's end is therefore learned from a pidfd, which leaves it a zombie.
struct Group {
    id: Pid,
    leader: AsyncFd<OwnedFd>,
}

impl Group {
    /// Of a child that was started as the leader of one, and has not been waited for.
    fn of(child: &Child) -> io::Result<Self> {
        let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: an `OwnedFd` always gives the same descriptor, which stays open until it is dropped: by the `AsyncFd`.
        let leader = unsafe { AsyncFd::register_with_interest(pidfd_open(id)?, Interest::READABLE) }?;
        Ok(Self { id: Pid::from_raw(id), leader })
    }

    /// Waits until the leader has ended.
    async fn leader_ended(&self) {
        // Stays ready once it is. It fails only when the runtime is shut down, and this with it.
        let _ = self.leader.readable().await;
    }

    /// Sends a signal to all of it.
    fn signal(&self, signal: Signal) {
        // It fails if nobody but a zombie is left, and if the command is somebody else by now (setuid), whom nobody can help.
        let _ = killpg(self.id, signal);
    }
}

/// pidfd_open(2), of Linux 5.3. It is closed on exec.
fn pidfd_open(process: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: it has no memory as argument.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    let descriptor = RawFd::try_from(descriptor).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
