//! TCP throughput, by iperf3: one connection, from the client to the pod.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use super::{Ends, THROUGHPUT_PORT};
use crate::{netns::Namespace, wait};

/// How long the server may take to listen, on a busy machine.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);
/// How much longer than its traffic a client may take.
const GRACE: Duration = Duration::from_secs(10);

/// iperf3 in the pod. It ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
}

impl Server {
    /// Starts it; its output goes to a file in `work`.
    ///
    /// # Errors
    ///
    /// It is not installed, or does not listen.
    pub fn start(pod: &Namespace, cpu: usize, work: &Path) -> anyhow::Result<Self> {
        let log = work.join("iperf3.log");
        let output = File::create(&log).with_context(|| format!("{}", log.display()))?;
        let mut command = pinned(pod, cpu)?;
        command.args(["--server", "--forceflush"]).stdout(output.try_clone()?).stderr(output);
        let child = command.stdin(Stdio::null()).spawn().context("cannot run iperf3")?;
        let mut server = Self { child };
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let listens = wait::until(LISTENS_WITHIN, || {
            let ended = server.child.try_wait().ok().flatten().is_some();
            (ended || said().contains("listening")).then_some(!ended)
        });
        if listens != Some(true) {
            bail!("iperf3 does not listen in the pod: {}", said());
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gb/s of one connection that lasts for `burst`, in whole seconds.
///
/// # Errors
///
/// iperf3 says why not.
pub fn run(ends: &Ends<'_>, burst: Duration) -> anyhow::Result<f64> {
    let seconds = burst.as_secs_f64().ceil().max(1.0);
    let mut command = pinned(ends.client, ends.cpus.client)?;
    command.args(["--json", "--connect-timeout", "5000", "--client"]).arg(ends.target.to_string());
    command.args(["--time", &seconds.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("cannot run iperf3")?;
    // What it prints, at its end, fits the pipe.
    let ended = wait::until(burst + GRACE, || child.try_wait().transpose());
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
        bail!("iperf3 did not end in time");
    }
    let output = child.wait_with_output()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn pinned(namespace: &Namespace, cpu: usize) -> anyhow::Result<Command> {
    let mut command = namespace.command("taskset")?;
    command.args(["--cpu-list", &cpu.to_string(), "iperf3", "--port", &THROUGHPUT_PORT.to_string()]);
    Ok(command)
}

#[derive(Deserialize)]
struct Output {
    #[serde(default)]
    end: End,
    error: Option<String>,
}

#[derive(Default, Deserialize)]
struct End {
    sum_received: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    bits_per_second: f64,
}

/// What the server has received, in Gb/s.
fn parse(json: &str) -> anyhow::Result<f64> {
    let output: Output =
        serde_json::from_str(json).with_context(|| format!("iperf3 does not speak JSON: {json:?}"))?;
    match output {
        Output { error: Some(error), .. } => bail!("iperf3: {error}"),
        Output { end: End { sum_received: Some(sum) }, .. } => Ok(sum.bits_per_second / 1e9),
        Output { .. } => bail!("iperf3 says nothing of what was received: {json}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_what_was_received() {
        // As iperf 3.12 prints it, shortened.
        let json = r#"{"start":{"version":"iperf 3.12"},"intervals":[],"end":{
            "sum_sent":{"start":0,"end":1.0,"seconds":1.0,"bytes":2000000000,"bits_per_second":16e9,"retransmits":3,"sender":true},
            "sum_received":{"start":0,"end":1.0,"seconds":1.0,"bytes":1590347776,"bits_per_second":12724783141.17,"sender":true},
            "cpu_utilization_percent":{"host_total":99.1}}}"#;
        assert_eq!(parse(json).unwrap(), 12.724_783_141_17);
    }

    #[test]
    fn what_iperf3_complains_of_is_the_error() {
        let json = r#"{"start":{"connected":[]},"intervals":[],"end":{},"error":"unable to connect to server: Connection refused"}"#;
        let error = parse(json).unwrap_err().to_string();
        assert_eq!(error, "iperf3: unable to connect to server: Connection refused");
    }

    #[test]
    fn an_answer_without_a_result_is_no_result() {
        parse(r#"{"end":{"sum_sent":{"bits_per_second":1.0}}}"#).unwrap_err();
        let error = parse("").unwrap_err().to_string();
        assert!(error.contains("does not speak JSON"), "{error}");
    }
}
