//! What the agent knows of itself, for people and programs: served as `/status`, shown by `proxier status`. Plain data, how
//! it is fetched and how it is printed; `Observed` keeps it.

use std::{
    fmt::Write as _,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpStream, time::timeout};

use super::{counts::Counts, few::first_of, table::Output};

/// Problems that are told one by one.
pub const MAX_PROBLEMS: usize = 10;
/// Addresses that are not reached directly, and are told one by one at a terminal.
const MAX_BY_STACK: usize = 3;
/// Services of each of these.
const MAX_SERVICES_OF_ADDRESS: usize = 3;
/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than any report has: several hundred interfaces.
const MAX_BYTES: usize = 16 << 20;

/// An agent's report of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusReport {
    /// The agent's version.
    pub version: String,
    /// The node that it is the agent of.
    pub node: String,
    /// When the report was made, by the node's clock.
    pub time: Timestamp,
    /// When the agent was started.
    pub started: Timestamp,
    /// Whether its loops turn.
    pub live: bool,
    /// Whether the node has what it should have.
    pub ready: bool,
    /// Why it is not live or not ready.
    pub failing: Vec<Failing>,
    /// Where the objects come from.
    pub source: SourceReport,
    /// How the last attempts to apply the state went.
    pub sync: SyncReport,
    /// How much there is.
    pub counts: Counts,
    /// What carries the programs.
    pub interfaces: Vec<Interface>,
    /// How the addresses of pods are reached whose Services ask for direct delivery.
    #[serde(default)]
    pub direct: DirectReport,
    /// What is wrong with objects or files.
    pub problems: ProblemsReport,
}

/// A check that fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// Which.
    pub check: String,
    /// Why, and what to do about it.
    pub reason: String,
}

/// Where the objects come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceReport {
    /// As the command line names it: `kube`, `file`.
    pub kind: String,
    /// Whether all of it has been read once.
    pub synced: bool,
    /// What it reads.
    pub resources: Vec<ResourceReport>,
}

/// One of the things that a source follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceReport {
    /// `services`, `endpointslices`, `nodes`, `files`.
    pub resource: String,
    /// Whether it is followed. If not, what was last known stays in force.
    pub connected: bool,
    /// Since when that is so.
    pub since: Timestamp,
    /// When anything was last heard of it.
    pub last_event: Option<Timestamp>,
    /// The last error, be it over by now.
    pub last_error: Option<String>,
}

/// How the last attempts to apply the state went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyncReport {
    /// When the whole state was last applied.
    pub last_applied: Option<Timestamp>,
    /// How long that took.
    pub last_duration_seconds: Option<f64>,
    /// What cannot be applied at the moment.
    pub failure: Option<FailureReport>,
}

/// What cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReport {
    /// Since when.
    pub since: Timestamp,
    /// How often it has been tried.
    pub attempts: u64,
    /// What went wrong the last time.
    pub error: String,
}

/// An interface that carries the programs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// What it leads to.
    pub role: InterfaceRole,
    /// What became of XDP there; none where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xdp: Option<XdpReport>,
}

/// What became of XDP at an uplink.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpReport {
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
    /// It is not there, for this reason.
    Refused(String),
}

/// What an interface leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InterfaceRole {
    /// Clients.
    Uplink,
    /// A pod.
    PodLink,
}

/// How the addresses of pods are reached whose Services ask for direct delivery. Empty if no Service does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DirectReport {
    /// How many past the node's stack.
    pub reached: usize,
    /// The others.
    pub by_stack: Vec<StackReport>,
}

/// An address of a pod that is left to the stack all the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackReport {
    /// The address.
    pub pod: IpAddr,
    /// The Services that ask for more, as `namespace/name`.
    #[serde(default)]
    pub services: Vec<String>,
    /// Why, and what to do about it.
    pub reason: String,
}

/// What is wrong with objects or files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemsReport {
    /// How many there are.
    pub total: usize,
    /// The worst of them, [`MAX_PROBLEMS`] at most.
    pub first: Vec<ProblemReport>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemReport {
    /// `error`, `warning`, `info`.
    pub severity: String,
    /// As in the log: object, field, value, reason, next step.
    pub text: String,
}

/// Asks the agent that serves `/status` on `address`.
///
/// # Errors
///
/// Nobody is there, or somebody else.
pub fn fetch(address: SocketAddr) -> anyhow::Result<StatusReport> {
    // Where an agent listens on all addresses, it is asked on its own.
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let address = SocketAddr::new(ip, address.port());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let body = runtime.block_on(async {
        timeout(PATIENCE, get(address)).await.unwrap_or_else(|_| {
            bail!(
                "{address} gives no answer in {} seconds: the agent hangs, start it again",
                PATIENCE.as_secs()
            )
        })
    })?;
    serde_json::from_slice(&body).with_context(|| {
        format!("what {address} answers is no status of a proxier of this version: see who listens there with `ss -ltnp`")
    })
}

async fn get(address: SocketAddr) -> anyhow::Result<Bytes> {
    let stream = TcpStream::connect(address).await.map_err(|error| {
        let refused = error.kind() == io::ErrorKind::ConnectionRefused;
        let error = anyhow::Error::from(error);
        if refused {
            error.context(format!(
                "no agent answers on {address}: none runs on this node, or it has another --metrics-address; what the kernel has \
                 stays in force, and `proxier get services` shows it"
            ))
        } else {
            error.context(format!("{address} cannot be reached"))
        }
    })?;
    let talk = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get("/status").header(header::HOST, address.to_string());
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = response.status();
        anyhow::ensure!(status.is_success(), "the answer is {status}");
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        Ok(body.map_err(|error| anyhow::anyhow!(error))?.to_bytes())
    };
    talk.await.with_context(|| {
        format!(
            "{address} answers, but not as a proxier does that serves its status: is it --metrics-address (and not \
             --health-address)?"
        )
    })
}

/// An error if the agent is not live or not ready, naming the checks that fail: the exit code says so, too.
///
/// # Errors
///
/// As said. A source that is away is none: the last state is in force, and that is what matters for packets.
pub fn verdict(report: &StatusReport) -> anyhow::Result<()> {
    if report.live && report.ready {
        return Ok(());
    }
    let checks: Vec<&str> = report.failing.iter().map(|failing| failing.check.as_str()).collect();
    let what = if report.live { "ready" } else { "live" };
    bail!("the agent is not {what}: {}", checks.join(", "))
}

/// The report as text, ending with a newline.
///
/// # Errors
///
/// It cannot be written as JSON or YAML.
pub fn render(report: &StatusReport, output: Output) -> anyhow::Result<String> {
    match output {
        Output::Json => {
            Ok(serde_json::to_string_pretty(report).context("cannot write the status as JSON")? + "\n")
        }
        Output::Yaml => serde_saphyr::to_string(report).context("cannot write the status as YAML"),
        Output::Table | Output::Wide => {
            let mut text = String::new();
            // Memory does not run out of paper.
            let _ = write_for_people(&mut text, report, output == Output::Wide);
            Ok(text)
        }
    }
}

fn write_for_people(text: &mut String, report: &StatusReport, wide: bool) -> std::fmt::Result {
    let ago = |time: Timestamp| format!("{} ago", rough(report.time.duration_since(time)));
    let since = |time: Timestamp| format!("for {}", rough(report.time.duration_since(time)));
    let StatusReport { version, node, source, sync, counts, interfaces, direct, problems, .. } = report;
    let yes_no = |yes| if yes { "yes" } else { "no" };

    writeln!(text, "proxier {version} on {node}, started {}", ago(report.started))?;
    writeln!(text, "Live:        {}", yes_no(report.live))?;
    writeln!(text, "Ready:       {}", yes_no(report.ready))?;
    for Failing { check, reason } in &report.failing {
        writeln!(text, "  {check}: {reason}")?;
    }

    let synced = if source.synced { "" } else { ", not read as a whole yet" };
    writeln!(text, "Source:      {}{synced}", source.kind)?;
    for ResourceReport { resource, connected, since: from, last_event, last_error } in &source.resources {
        let state = if *connected { "followed" } else { "away" };
        write!(text, "  {resource}: {state} {}", since(*from))?;
        if let Some(time) = last_event {
            write!(text, ", last heard of {}", ago(*time))?;
        }
        match last_error {
            Some(error) if !connected => write!(text, ": {error}")?,
            Some(error) if wide => write!(text, ", last error: {error}")?,
            _ => {}
        }
        writeln!(text)?;
    }

    match (sync.last_applied, sync.last_duration_seconds) {
        (Some(time), Some(seconds)) => {
            writeln!(text, "Applied:     {}, in {:.1} ms", ago(time), seconds * 1000.0)?;
        }
        _ => writeln!(text, "Applied:     not yet")?,
    }
    if let Some(FailureReport { since: from, attempts, error }) = &sync.failure {
        writeln!(text, "  fails {}, attempts: {attempts}: {error}", since(*from))?;
    }

    writeln!(
        text,
        "Services:    {}, {} of them without a pod here",
        counts.services, counts.services_without_local_endpoints
    )?;
    let addresses = counts.external_addresses;
    writeln!(text, "Externals:   {} IPv4, {} IPv6", addresses.ipv4, addresses.ipv6)?;
    let endpoints = counts.endpoints;
    writeln!(
        text,
        "Pods:        {} here, {} draining, {} in the cluster",
        endpoints.local, endpoints.draining, endpoints.total
    )?;

    let named = |role| {
        let names: Vec<&str> =
            interfaces.iter().filter(|i| i.role == role).map(|i| i.name.as_str()).collect();
        names
    };
    let (uplinks, pod_links) = (named(InterfaceRole::Uplink), named(InterfaceRole::PodLink));
    let none_or = |names: &[&str]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    writeln!(text, "Uplinks:     {}", none_or(&uplinks))?;
    for Interface { name, xdp, .. } in interfaces {
        match xdp {
            None => {}
            Some(XdpReport::Native) => writeln!(text, "  {name}: XDP, in the driver")?,
            Some(XdpReport::Generic) => writeln!(text, "  {name}: XDP, generic")?,
            Some(XdpReport::Refused(reason)) => writeln!(text, "  {name}: tc, without XDP: {reason}")?,
        }
    }
    if wide {
        writeln!(text, "Pod links:   {}", none_or(&pod_links))?;
    } else {
        writeln!(text, "Pod links:   {}", pod_links.len())?;
    }

    let DirectReport { reached, by_stack } = direct;
    if reached + by_stack.len() > 0 {
        writeln!(
            text,
            "Direct:      {reached} of {} addresses of pods whose Services ask for it",
            reached + by_stack.len()
        )?;
        let shown = if wide { by_stack.len() } else { MAX_BY_STACK };
        for StackReport { pod, services, reason } in by_stack.iter().take(shown) {
            let named = if wide { services.len() } else { MAX_SERVICES_OF_ADDRESS };
            let names = first_of(services, named, ", ");
            let of = if names.is_empty() { names } else { format!(" ({names})") };
            writeln!(text, "  {pod}{of}: {reason}")?;
        }
        if by_stack.len() > shown {
            writeln!(text, "  ... and {} more: see -o wide", by_stack.len() - shown)?;
        }
    }

    writeln!(text, "Problems:    {}", problems.total)?;
    for ProblemReport { severity, text: problem } in &problems.first {
        writeln!(text, "  {severity}: {problem}")?;
    }
    if problems.total > problems.first.len() {
        writeln!(text, "  ... and {} more: see the log", problems.total - problems.first.len())?;
    }
    Ok(())
}

/// As kubectl shows ages: two units at most.
fn rough(duration: SignedDuration) -> String {
    // A clock that was set back.
    let seconds = duration.as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..172_800 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests;
