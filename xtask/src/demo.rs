//! `cargo xtask demo`: the real agent between real network stacks, on this machine. Sends every kind of traffic to a
//! Service's external addresses, edits the Service's endpoints meanwhile, and shows what either side saw.
//!
//! Not a test suite: `cargo xtask test` covers more. This is to be looked at.

use std::{
    fmt::Write as _,
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use proxier_common::SCHEMA;
use proxier_tests::{
    agent::{Agent, AgentSpec},
    exchange::{Outcome, Protocol, Question, SILENCE},
    manifests,
    packets::Packet,
    topology::{BPFFS, Lab, LabSpec, NODE_NAME},
    wait,
};
use tempfile::TempDir;

/// How long the agent may take from an edit to the kernel, on a busy machine.
const EDIT_TAKES_EFFECT_WITHIN: Duration = Duration::from_secs(10);
/// Someone is watching: an answer takes a millisecond, and one that does not come should not take long.
const PATIENCE: Duration = Duration::from_secs(2);
/// Enough for both pods to have some of them, but for a chance of one in billions.
const CLIENTS: u8 = 32;
const EXTERNAL: [&str; 2] = ["10.0.0.55", "1000::55"];
const SLICES: &str = "endpointslices.yaml";

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct DemoOptions {
    /// Leave everything up until Ctrl-C, and say how to play with it
    #[arg(long)]
    keep: bool,
    /// Directory of the manifests: deploy/examples, or an edited copy with the same pods
    #[arg(long, value_name = "DIR")]
    examples: Option<PathBuf>,
    /// Run this agent instead of building one
    #[arg(long, value_name = "PATH")]
    pub(crate) agent: Option<PathBuf>,
}

/// Runs the demo with the agent at `agent`; whether every row was as it should be.
///
/// # Errors
///
/// The demo could not be shown: no root, another one is running, the agent does not start, Ctrl-C.
pub(crate) fn run(agent: &Path, options: &DemoOptions) -> Result<bool> {
    proxier_tests::need_root()?;
    wait::stop_on_signals()?;
    let _lock = lock()?;
    let mut demo = Demo::start(agent, options)?;
    let shown = demo.show();
    if wait::interrupted() {
        bail!("stopped by a signal; the namespaces, the agent and its pins are removed");
    }
    if let Err(error) = shown {
        demo.failed += 1;
        eprintln!("the demo ends early: {error:#}");
    } else if options.keep {
        demo.explain();
        while !wait::interrupted() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let (passed, failed) = (demo.passed, demo.failed);
    demo.end();
    println!("demo: {passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// Two demos would remove each other's namespaces.
fn lock() -> Result<File> {
    let path = "/run/proxier-demo.lock";
    let file = File::create(path).with_context(|| format!("cannot write {path}"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another demo is running on this machine: wait for it, or end it")
        }
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {path}")),
    }
}

/// What a row should show.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    /// An answer by this pod, or by any.
    Answer(Option<&'a str>),
    /// No pod sees it, and no answer comes.
    Drop,
}

struct Demo {
    // In the order in which they go.
    agent: Agent,
    lab: Lab,
    work: TempDir,
    binary: PathBuf,
    /// Every question has a port of its own, so that no row meets what another left behind.
    next_port: u16,
    passed: usize,
    failed: usize,
}

impl Demo {
    fn start(binary: &Path, options: &DemoOptions) -> Result<Self> {
        let work = tempfile::Builder::new().prefix("proxier-demo-").tempdir()?;
        let manifests = work.path().join("manifests");
        let examples = options.examples.clone().unwrap_or_else(manifests::examples);
        manifests::copy(&examples, &manifests)?;
        let spec = LabSpec { pin_path: Path::new(BPFFS).join("proxier-demo"), ..LabSpec::new("proxier") };
        let lab = Lab::build(&spec.with_clients(CLIENTS))?;
        println!("client 192.168.1.100, fd00:1::100 --- node {NODE_NAME} --- pods {}", pods_of(&lab));
        println!(
            "Service default/kpng-example: externalIPs {}; port 6000, which nothing below uses\n",
            EXTERNAL.join(", ")
        );
        let agent = AgentSpec::new(binary, &manifests, &work.path().join("agent.log")).start(&lab)?;
        Ok(Self { agent, lab, work, binary: binary.to_owned(), next_port: 41000, passed: 0, failed: 0 })
    }

    fn show(&mut self) -> Result<()> {
        self.show_protocols()?;
        self.show_what_is_left_alone()?;
        self.show_edits()
    }

    fn show_protocols(&mut self) -> Result<()> {
        let mut step = Step::new("Every protocol, every port, both families");
        let questions = [
            (Protocol::Tcp, 8443),
            (Protocol::Tcp, 22),
            (Protocol::Udp, 5060),
            (Protocol::Udp, 51820),
            (Protocol::Icmp, 0),
            (Protocol::Sctp, 5060),
            (Protocol::Gre, 0),
            (Protocol::Esp, 0),
        ];
        for (protocol, port) in questions {
            for external in EXTERNAL {
                let question = self.question(protocol, SocketAddr::new(external.parse()?, port));
                self.row(&mut step, "", &question, Expected::Answer(None))?;
            }
        }
        step.print();
        Ok(())
    }

    fn show_what_is_left_alone(&mut self) -> Result<()> {
        let mut step = Step::new("Straight to a pod's own address: nothing is rewritten");
        for address in self.lab.pods[0].host.addresses.clone() {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let question = self.question(protocol, SocketAddr::new(address, 5060));
                self.row(&mut step, "", &question, Expected::Answer(Some("alpine-1")))?;
            }
        }
        step.print();
        Ok(())
    }

    fn show_edits(&mut self) -> Result<()> {
        let slices = self.work.path().join("manifests").join(SLICES);
        let both =
            fs::read_to_string(&slices).with_context(|| format!("cannot read {}", slices.display()))?;
        let only_second = manifests::without_pod(&both, "alpine-1")?;
        let only_first = manifests::without_pod(&both, "alpine-2")?;
        let neither = manifests::without_pod(&only_second, "alpine-2")?;

        let mut clients = Vec::new();
        for external in EXTERNAL {
            let external = external.parse()?;
            clients.push((
                external,
                self.client_of("alpine-1", external)?,
                self.client_of("alpine-2", external)?,
            ));
        }

        let mut step = Step::new("The manifest loses pod alpine-1: its clients move, the others stay");
        manifests::replace(&slices, &only_second)?;
        for (external, on_first, on_second) in &clients {
            self.edit_row(
                &mut step,
                "was on alpine-1",
                *on_first,
                *external,
                Expected::Answer(Some("alpine-2")),
            )?;
            self.edit_row(
                &mut step,
                "was on alpine-2",
                *on_second,
                *external,
                Expected::Answer(Some("alpine-2")),
            )?;
        }
        step.print();

        let mut step = Step::new("It loses pod alpine-2 too: none is left, packets are dropped");
        manifests::replace(&slices, &neither)?;
        for (external, _, on_second) in &clients {
            self.edit_row(&mut step, "", *on_second, *external, Expected::Drop)?;
        }
        step.print();

        let mut step = Step::new("Pod alpine-1 comes back");
        manifests::replace(&slices, &only_first)?;
        for (external, on_first, on_second) in &clients {
            self.edit_row(&mut step, "", *on_first, *external, Expected::Answer(Some("alpine-1")))?;
            self.edit_row(
                &mut step,
                "was on alpine-2",
                *on_second,
                *external,
                Expected::Answer(Some("alpine-1")),
            )?;
        }
        step.print();

        let mut step = Step::new("Pod alpine-2 comes back: who has a pod keeps it");
        manifests::replace(&slices, &both)?;
        for (external, on_first, on_second) in &clients {
            for client in [*on_first, *on_second] {
                self.edit_row(
                    &mut step,
                    "was on alpine-1",
                    client,
                    *external,
                    Expected::Answer(Some("alpine-1")),
                )?;
            }
        }
        step.print();
        Ok(())
    }

    fn question(&mut self, protocol: Protocol, to: SocketAddr) -> Question {
        self.next_port += 1;
        let question = Question::new(&self.lab, protocol, self.next_port, to);
        Question { timeout: PATIENCE, ..question }
    }

    /// A client address that is on `pod` for `external`.
    fn client_of(&mut self, pod: &str, external: IpAddr) -> Result<IpAddr> {
        let addresses = self.lab.client.addresses.clone();
        for address in addresses.into_iter().filter(|address| address.is_ipv4() == external.is_ipv4()) {
            let question = self.question(Protocol::Udp, SocketAddr::new(external, 5060)).from(address);
            match question.ask_who(&self.lab.client)? {
                Ok(sighting) if sighting.host == pod => return Ok(address),
                Ok(_) => {}
                Err(reason) => bail!("{address} to {external}: {reason}; look at {}", self.where_to_look()),
            }
        }
        bail!("none of {CLIENTS} clients of {external} is on pod {pod}; look at {}", self.where_to_look());
    }

    /// Asks until the last edit shows, and shows that.
    fn edit_row(
        &mut self,
        step: &mut Step,
        note: &str,
        client: IpAddr,
        external: IpAddr,
        expected: Expected<'_>,
    ) -> Result<()> {
        let to = SocketAddr::new(external, 5060);
        let mut last = self.question(Protocol::Udp, to).from(client).expecting_silence();
        let mut error = None;
        let settled = wait::until(EDIT_TAKES_EFFECT_WITHIN, || match last.ask(&self.lab) {
            Ok(outcome) if complaint(&outcome, &last, &self.lab, expected).is_some() => None,
            Ok(_) => Some(()),
            Err(problem) => {
                error = Some(problem);
                Some(())
            }
        });
        if let (Some(()), Some(error)) = (settled, error) {
            return Err(error);
        }
        // Once more from a new port: what it shows was not merely an old flow.
        last = self.question(Protocol::Udp, to).from(client);
        self.row(step, note, &last, expected)
    }

    fn row(
        &mut self,
        step: &mut Step,
        note: &str,
        question: &Question,
        expected: Expected<'_>,
    ) -> Result<()> {
        let question = match expected {
            Expected::Drop => Question { timeout: SILENCE, ..*question },
            Expected::Answer(_) => *question,
        };
        if wait::interrupted() {
            bail!("stopped by a signal");
        }
        let outcome = question.ask(&self.lab)?;
        let complaint = complaint(&outcome, &question, &self.lab, expected);
        if complaint.is_some() {
            self.failed += 1;
        } else {
            self.passed += 1;
        }
        step.row(note, &question, &outcome, complaint.as_deref());
        if let Some(complaint) = complaint {
            let expected = match expected {
                Expected::Answer(Some(pod)) => format!("an answer by {pod}"),
                Expected::Answer(None) => "an answer by one pod of this node".to_owned(),
                Expected::Drop => "no answer, and no pod that sees the packet".to_owned(),
            };
            let Question { protocol, from, to, .. } = question;
            let _ = writeln!(step.complaints, "FAILED: {protocol} from {from} to {to}");
            let _ = writeln!(step.complaints, "  expected: {expected}");
            let _ = writeln!(step.complaints, "  happened: {complaint}");
            let _ = writeln!(step.complaints, "  look at:  {}", self.where_to_look());
        }
        Ok(())
    }

    fn where_to_look(&self) -> String {
        format!("the agent's log, {}", self.agent.log_path().display())
    }

    fn explain(&self) {
        let pins = self.lab.pin_path().display();
        let manifests = self.work.path().join("manifests");
        let enter = |role: &str| format!("nsenter --net=/run/netns/proxier-{role}");
        println!(
            "The lab stays up until Ctrl-C. In another terminal, as root:

  {client} ping -c 3 10.0.0.55
  {client} ping -c 3 1000::55
  {client} nc -v 10.0.0.55 8443        type a line: the pod says who it is, and echoes
  {client} nc -u 1000::55 5060
  {client} tcpdump -ni eth0            what the client sees
  {pod} tcpdump -ni eth0             what the pod sees

  bpftool map dump pinned {pins}/v{SCHEMA}/services
  bpftool map dump pinned {pins}/v{SCHEMA}/backends
  bpftool map dump pinned {pins}/v{SCHEMA}/flows
  {proxier} get services --pin-path {pins}
  {proxier} get flows --pin-path {pins}

  manifests, read at every change: {manifests}
  agent's log:                     {log}
",
            client = enter("client"),
            proxier = self.binary.display(),
            pod = enter("pod-1"),
            manifests = manifests.display(),
            log = self.agent.log_path().display(),
        );
    }

    /// Removes everything, but for the log where a row has referred to it.
    fn end(self) {
        let Self { agent, lab, work, failed, .. } = self;
        drop(agent);
        drop(lab);
        if failed > 0 {
            println!("kept for you to look at: {}", work.keep().display());
        }
    }
}

/// What is wrong with `outcome`, if anything.
fn complaint(outcome: &Outcome, question: &Question, lab: &Lab, expected: Expected<'_>) -> Option<String> {
    match expected {
        Expected::Answer(pod) => outcome.complaint(question, lab).or_else(|| {
            let pod = pod?;
            (outcome.pods() != [pod]).then(|| format!("{} answered", outcome.pods().join(", ")))
        }),
        Expected::Drop => match (&outcome.answer, outcome.pods()) {
            (Ok(_), pods) => Some(format!("an answer came, and {pods:?} saw the packet")),
            (Err(_), pods) if !pods.is_empty() => Some(format!("{pods:?} saw the packet")),
            // A packet that nobody takes follows the node's default route, back to where it came from.
            (Err(_), _) if !outcome.client_saw.is_empty() => {
                Some(format!("the client saw {}", list(&outcome.client_saw)))
            }
            (Err(_), _) => None,
        },
    }
}

fn list(packets: &[Packet]) -> String {
    packets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn pods_of(lab: &Lab) -> String {
    let pods = lab.pods.iter().map(|pod| {
        let addresses: Vec<String> = pod.host.addresses.iter().map(ToString::to_string).collect();
        format!("{} ({})", pod.host.name, addresses.join(", "))
    });
    pods.collect::<Vec<_>>().join(", ")
}

/// A table, and what is to be said below it.
struct Step {
    title: &'static str,
    table: Table,
    complaints: String,
}

impl Step {
    fn new(title: &'static str) -> Self {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header([
            "protocol",
            "client sent to",
            "pod",
            "the pod saw",
            "the client saw replies from",
            "result",
        ]);
        Self { title, table, complaints: String::new() }
    }

    fn row(&mut self, note: &str, question: &Question, outcome: &Outcome, complaint: Option<&str>) {
        let Question { protocol, to, .. } = question;
        let to = if protocol.has_ports() { to.to_string() } else { to.ip().to_string() };
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        let first = |packet: &(String, Packet)| packet.1.to_string();
        let sources: Vec<String> = outcome.sources().iter().map(ToString::to_string).collect();
        let verdict = match (complaint, &outcome.answer) {
            (Some(_), _) => "FAILED",
            (None, Ok(_)) => "ok",
            (None, Err(_)) => "ok, dropped",
        };
        let verdict = if note.is_empty() { verdict.to_owned() } else { format!("{verdict} ({note})") };
        self.table.add_row([
            protocol.to_string(),
            to,
            or_dash(outcome.pods().join(", ")),
            or_dash(outcome.pods_saw.first().map(first).unwrap_or_default()),
            or_dash(sources.join(", ")),
            verdict,
        ]);
    }

    fn print(&self) {
        println!("{}\n{}\n{}", self.title, self.table, self.complaints);
    }
}
