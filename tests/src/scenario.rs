//! What most lab tests begin with: a lab, a Service with two external addresses and all the lab's pods, and the agent
//! running on that. Panics where something is not as it should be, as a test does.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Command, Output},
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    agent::{self, Agent, AgentSpec},
    exchange::{Outcome, Protocol, Question},
    manifests,
    responder::Sighting,
    topology::{Lab, LabSpec, NODE_NAME},
    wait,
};

/// The Service's name.
pub const SERVICE: &str = "web";
/// How long an edit may take to reach the kernel, on a machine that has other things to do.
pub const EDIT_TAKES_EFFECT_WITHIN: Duration = Duration::from_secs(60);

/// The Service's external addresses, one a family.
#[must_use]
pub fn externals() -> [IpAddr; 2] {
    [IpAddr::from([10, 0, 0, 55]), IpAddr::from([0x1000, 0, 0, 0, 0, 0, 0, 0x55])]
}

/// A lab with a running agent.
#[derive(Debug)]
pub struct Scenario {
    // In the order in which they go.
    agent: Option<Agent>,
    /// The network.
    pub lab: Lab,
    /// How the agent is started.
    pub spec: AgentSpec,
    work: TempDir,
}

impl Scenario {
    /// Builds `lab`, writes the manifests and starts the agent with more `arguments` of `to-bpf`.
    #[must_use]
    pub fn start(lab: &LabSpec, arguments: &[&str]) -> Self {
        let mut scenario = Self::prepare(lab, arguments);
        scenario.start_agent();
        scenario
    }

    /// As [`Self::start`], without starting the agent.
    ///
    /// # Panics
    ///
    /// When there is no agent to start, or no lab.
    #[must_use]
    pub fn prepare(lab: &LabSpec, arguments: &[&str]) -> Self {
        let scenario = Self::without_objects(lab, arguments);
        scenario.write("service.yaml", &manifests::service(SERVICE, &externals()));
        scenario.write_pods(&scenario.all_pods());
        scenario
    }

    /// As [`Self::prepare`], without manifests: the agent may be given another source.
    ///
    /// # Panics
    ///
    /// As [`Self::prepare`].
    #[must_use]
    pub fn without_objects(lab: &LabSpec, arguments: &[&str]) -> Self {
        let work = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        let manifests = work.path().join("manifests");
        fs::create_dir(&manifests).unwrap_or_else(|error| panic!("{}: {error}", manifests.display()));
        let binary = agent::binary().unwrap_or_else(|error| panic!("{error:#}"));
        let lab = Lab::build(lab).unwrap_or_else(|error| panic!("no lab: {error:#}"));
        let spec =
            AgentSpec::new(&binary, &manifests, &work.path().join("agent.log")).with_arguments(arguments);
        Self { agent: None, lab, spec, work }
    }

    /// Addresses of all pods.
    #[must_use]
    pub fn all_pods(&self) -> Vec<IpAddr> {
        self.lab.pods.iter().flat_map(|pod| pod.host.addresses.clone()).collect()
    }

    /// Addresses of the pod called `name`.
    #[must_use]
    pub fn pod(&self, name: &str) -> Vec<IpAddr> {
        self.lab.pod(name).host.addresses.clone()
    }

    /// A file of manifests.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.spec.manifests.join(name)
    }

    /// Replaces a file of manifests.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn write(&self, name: &str, text: &str) {
        manifests::replace(&self.path(name), text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Lets the Service have these pods.
    pub fn write_pods(&self, pods: &[IpAddr]) {
        self.write("slices.yaml", &manifests::slices(SERVICE, NODE_NAME, pods));
    }

    /// Starts an agent, and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it does not get ready.
    pub fn start_agent(&mut self) {
        assert!(self.agent.is_none(), "an agent is running");
        let agent = self.spec.start(&self.lab).unwrap_or_else(|error| panic!("{error:#}"));
        self.agent = Some(agent);
    }

    /// Starts an agent, and does not wait.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn spawn_agent(&mut self) {
        assert!(self.agent.is_none(), "an agent is running");
        let agent = self.spec.spawn(&self.lab).unwrap_or_else(|error| panic!("{error:#}"));
        self.agent = Some(agent);
    }

    /// The running agent.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap_or_else(|| panic!("no agent is running"))
    }

    /// Kills the agent with SIGKILL.
    ///
    /// # Panics
    ///
    /// When there is none, or it has ended by itself.
    pub fn kill_agent(&mut self) {
        let agent = self.agent.take().unwrap_or_else(|| panic!("no agent is running"));
        agent.kill().unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Ends the agent with SIGTERM.
    ///
    /// # Panics
    ///
    /// When there is none, or it does not end well.
    pub fn stop_agent(&mut self) {
        let agent = self.agent.take().unwrap_or_else(|| panic!("no agent is running"));
        agent.stop().unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Lets what the last agent pinned look like another version's (`v1`).
    ///
    /// # Panics
    ///
    /// When there is nothing.
    pub fn make_pins_of_another_version(&self) {
        let pin_path = self.lab.pin_path();
        let ours = pin_path.join(format!("v{}", proxier_common::SCHEMA));
        fs::rename(&ours, pin_path.join("v1")).unwrap_or_else(|error| panic!("{}: {error}", ours.display()));
    }

    /// A question from the client's first address.
    #[must_use]
    pub fn question(&self, protocol: Protocol, from_port: u16, to: IpAddr, port: u16) -> Question {
        Question::new(&self.lab, protocol, from_port, SocketAddr::new(to, port))
    }

    /// Asks, and is content with nothing but a right answer.
    ///
    /// # Panics
    ///
    /// When anything about it is wrong.
    #[must_use]
    pub fn ask(&self, question: &Question) -> Outcome {
        let outcome = question.ask(&self.lab).unwrap_or_else(|error| panic!("{error:#}"));
        if let Some(complaint) = outcome.complaint(question, &self.lab) {
            panic!("{question:?}: {complaint}{}", self.log_of_agent());
        }
        outcome
    }

    /// Which pod answers the client's address `from`.
    ///
    /// # Panics
    ///
    /// When none does.
    #[must_use]
    pub fn pod_of(&self, from: IpAddr, to: IpAddr) -> Sighting {
        let question = self.question(Protocol::Udp, 0, to, 5060).from(from);
        let answer = question.ask_who(&self.lab.client).unwrap_or_else(|error| panic!("{error:#}"));
        answer.unwrap_or_else(|error| panic!("{from} to {to}: {error}{}", self.log_of_agent()))
    }

    /// Asks until the answer comes from `pod`: an edit has reached the kernel.
    ///
    /// # Panics
    ///
    /// When it does not in time.
    pub fn wait_for_pod(&self, from: IpAddr, to: IpAddr, pod: &str) {
        let mut last = None;
        let arrived = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            let question = self.question(Protocol::Udp, 0, to, 5060).from(from).expecting_silence();
            let answer = question.ask_who(&self.lab.client).unwrap_or_else(|error| panic!("{error:#}"));
            let is_there = answer.as_ref().is_ok_and(|sighting| sighting.host == pod);
            last = Some(answer);
            is_there.then_some(())
        });
        assert!(arrived.is_some(), "{from} to {to} never reaches {pod}: {last:?}{}", self.log_of_agent());
    }

    /// Asks until any pod answers the client's first address.
    ///
    /// # Panics
    ///
    /// When none does in time.
    pub fn wait_for_any_pod(&self, to: IpAddr) {
        let answered = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            let question = self.question(Protocol::Udp, 0, to, 5060).expecting_silence();
            question.ask_who(&self.lab.client).unwrap_or_else(|error| panic!("{error:#}")).ok()
        });
        assert!(answered.is_some(), "{to} is never answered{}", self.log_of_agent());
    }

    /// Asks until no answer comes any more.
    ///
    /// # Panics
    ///
    /// When answers keep coming.
    pub fn wait_for_silence(&self, to: IpAddr) {
        let silent = wait::until(EDIT_TAKES_EFFECT_WITHIN, || {
            let question = self.question(Protocol::Udp, 0, to, 5060).expecting_silence();
            question.ask_who(&self.lab.client).unwrap_or_else(|error| panic!("{error:#}")).err()
        });
        assert!(silent.is_some(), "{to} is still answered{}", self.log_of_agent());
    }

    /// Runs `proxier` with `arguments` and this lab's pins.
    ///
    /// # Panics
    ///
    /// When it cannot be run.
    #[must_use]
    pub fn proxier(&self, arguments: &[&str]) -> Output {
        let pins = self.lab.pin_path().display().to_string();
        let arguments = [arguments, &["--pin-path", &pins]].concat();
        agent::run(&self.lab, &self.spec.binary, &arguments).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// What `proxier get KIND -o json` prints.
    ///
    /// # Panics
    ///
    /// When it fails or prints no list.
    #[must_use]
    pub fn get(&self, kind: &str) -> Vec<serde_json::Value> {
        let output = self.proxier(&["get", kind, "-o", "json"]);
        assert!(output.status.success(), "get {kind}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// What a command on the node prints.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[must_use]
    pub fn on_node(&self, program: &str, arguments: &[&str]) -> String {
        let run = |mut command: Command| command.args(arguments).output().map_err(anyhow::Error::from);
        let output = self.lab.node.namespace.command(program).and_then(run);
        let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error:#}"));
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn log_of_agent(&self) -> String {
        let log = fs::read_to_string(self.work.path().join("agent.log")).unwrap_or_default();
        format!("\nthe agent's log:\n{log}")
    }
}
