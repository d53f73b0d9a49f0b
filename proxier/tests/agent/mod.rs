//! The real `proxier` as a child process: its lines of output, its end.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

/// Nothing here takes a second; this only keeps a test that would wait for ever from doing so.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Agent {
    child: Child,
    out: Receiver<String>,
    log: Receiver<String>,
    /// What the log said so far, for messages.
    logged: Vec<String>,
}

/// `proxier` with these arguments and nothing of this process's settings in its environment.
pub(crate) fn command(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxier"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

impl Agent {
    /// Follows `input` as `node1` and prints what that node should do.
    pub(crate) fn to_json(input: &Path) -> Self {
        let mut command = command(["file", "--node-name", "node1", "--input"]);
        command.arg(input).arg("to-json");
        Self::start(command)
    }

    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = lines(child.stdout.take().unwrap());
        let log = lines(child.stderr.take().unwrap());
        Self { child, out, log, logged: Vec::new() }
    }

    /// Waits for the next line that the sink prints.
    pub(crate) fn next(&mut self) -> serde_json::Value {
        let Ok(line) = self.out.recv_timeout(PATIENCE) else {
            self.logged.extend(self.log.try_iter());
            panic!("nothing was printed. The log:\n{}", self.logged.join("\n"));
        };
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    /// Waits for a line that is as `wanted`: a file that is cut and written again may be read in between.
    pub(crate) fn next_that(&mut self, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        loop {
            let line = self.next();
            if wanted(&line) {
                return line;
            }
        }
    }

    /// Waits for a line of the log with `text` in it.
    pub(crate) fn logs(&mut self, text: &str) -> String {
        loop {
            let Ok(line) = self.log.recv_timeout(PATIENCE) else {
                panic!("{text:?} is not in the log:\n{}", self.logged.join("\n"));
            };
            self.logged.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for the end. Returns what was left of both outputs as well.
    pub(crate) fn end(mut self) -> (ExitStatus, Vec<String>, Vec<String>) {
        let status = self.child.wait().unwrap();
        self.logged.extend(self.log.iter());
        (status, self.out.iter().collect(), std::mem::take(&mut self.logged))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
