//! The checks, made on the kernel that this runs on: in a virtual machine, as its only user. What fails is told and does
//! not keep the rest from being checked.

use std::{
    panic::{self, AssertUnwindSafe},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxier_common::{TCX_SINCE, is_linux_since};
use proxier_tests::{
    agent::Agent,
    exchange::Protocol,
    manifests,
    neighbour::tcx_programs,
    scenario::{Scenario, externals},
    topology::{LabSpec, UPLINK},
};

use super::Line;
use crate::{build_ebpf, environment::Environment, verify};

/// An emulated processor takes its time over verifying the programs.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// One that no manifest names.
const PORT: u16 = 5060;

/// Makes the checks; whether all were passed.
pub(super) fn run_checks() -> Result<bool> {
    println!("{}", Line::Started);
    let mut checks = Checks { failed: false, next_port: 40_000 };
    let has_tcx = is_linux_since(TCX_SINCE);
    checks.check("the verifier accepts every program", || {
        verify::verify(&Environment::new(false), &build_ebpf::object_path())
    });
    let best = if has_tcx { "tcx" } else { "clsact" };
    checks.life("auto", best);
    if has_tcx {
        checks.life("clsact", "clsact");
    } else {
        checks.check("--attach tcx is refused with a reason", || {
            let scenario = Scenario::prepare(&LabSpec::unique(), &["--attach", "tcx"]);
            let mut agent = scenario.spec.spawn(&scenario.lab)?;
            let status = agent.wait_end(READY_WITHIN)?;
            ensure!(!status.success(), "the agent ended well");
            ensure!(agent.log().contains("--attach clsact"), "no way out is named:\n{}", agent.log());
            Ok(())
        });
    }
    println!("{}", Line::Done);
    Ok(!checks.failed)
}

struct Checks {
    failed: bool,
    /// Every question has a port of its own, so that none meets what another left behind.
    next_port: u16,
}

impl Checks {
    /// Whether it was passed. The lab's helpers panic, as they are made for tests.
    fn check(&mut self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        let reason = match panic::catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(panic) => Some(message(panic.as_ref())),
        };
        if let Some(reason) = &reason {
            self.failed = true;
            // All of it to the console; the first line is what fits a report.
            eprintln!("{name}: {reason}");
            println!("{}", Line::Failed(format!("{name}: {}", reason.lines().next().unwrap_or_default())));
        } else {
            println!("{}", Line::Passed(name.to_owned()));
        }
        reason.is_none()
    }

    /// An agent comes, dies, comes again and is cleaned up after, attached as `mode` says, which is by `method`.
    fn life(&mut self, mode: &str, method: &str) {
        let mut started = None;
        self.check(&format!("{mode}: the agent starts"), || {
            let mut scenario = Scenario::prepare(&LabSpec::unique(), &["--attach", mode]);
            scenario.spec.manifests = manifests::examples();
            let agent = start(&scenario)?;
            started = Some((scenario, agent));
            Ok(())
        });
        let Some((scenario, agent)) = started else { return };
        if self.check(&format!("{mode}: attached by {method} only"), || {
            let found = Attached::on(&scenario)?;
            ensure!(found.tcx == if method == "tcx" { 2 } else { 0 }, "{found:?}");
            ensure!(found.clsact == if method == "clsact" { 2 } else { 0 }, "{found:?}");
            Ok(())
        }) && mode == "auto"
        {
            println!("{}", Line::Method(method.to_owned()));
        }
        self.traffic(&scenario, mode, "with the agent");
        self.check(&format!("{mode}: flows are listed"), || {
            let flows = scenario.get("flows");
            for external in externals() {
                let external = external.to_string();
                ensure!(
                    flows.iter().any(|flow| flow["external"] == external),
                    "none of {external}: {flows:?}"
                );
            }
            Ok(())
        });
        self.check(&format!("{mode}: kill -9"), || agent.kill());
        self.traffic(&scenario, mode, "after kill -9");
        let mut another = None;
        self.check(&format!("{mode}: another agent adopts flows and programs"), || {
            // Of UDP, which stay for minutes: a closed TCP connection may be over before a slow agent is ready.
            let udp = |flow: &serde_json::Value| {
                flow["protocol"].as_str().is_some_and(|name| name.eq_ignore_ascii_case("udp"))
            };
            let before: Vec<_> = scenario.get("flows").into_iter().filter(udp).collect();
            ensure!(!before.is_empty(), "there was no flow of UDP to adopt");
            another = Some(start(&scenario)?);
            let after = scenario.get("flows");
            for flow in &before {
                let same = |other: &serde_json::Value| {
                    ["peer", "peerPort", "external", "pod", "podPort"]
                        .iter()
                        .all(|field| flow[field] == other[field])
                };
                ensure!(after.iter().filter(|other| udp(other)).any(same), "it has lost {flow}");
            }
            let found = Attached::on(&scenario)?;
            ensure!(found.tcx + found.clsact == 2, "{found:?}");
            Ok(())
        });
        self.traffic(&scenario, mode, "with another agent");
        self.check(&format!("{mode}: cleanup leaves nothing"), || {
            another.context("no agent is running")?.stop()?;
            let output = scenario.proxier(&["cleanup"]);
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let found = Attached::on(&scenario)?;
            ensure!(found.tcx + found.clsact == 0, "{found:?}");
            ensure!(!scenario.lab.pin_path().exists(), "pins are left");
            for external in externals() {
                let question = scenario.question(Protocol::Udp, 39_999, external, PORT).expecting_silence();
                ensure!(question.ask(&scenario.lab)?.answer.is_err(), "{external} still answers");
            }
            Ok(())
        });
    }

    /// Every protocol to both external addresses: who saw what, from whom, and with which checksums.
    fn traffic(&mut self, scenario: &Scenario, mode: &str, when: &str) {
        for protocol in Protocol::ALL {
            for external in externals() {
                let from_port = self.next_port;
                self.next_port += 1;
                self.check(&format!("{mode}: {protocol} to {external} {when}"), || {
                    let _ = scenario.ask(&scenario.question(protocol, from_port, external, PORT));
                    Ok(())
                });
            }
        }
    }
}

/// Starts an agent, and waits until it is ready.
fn start(scenario: &Scenario) -> Result<Agent> {
    let mut agent = scenario.spec.spawn(&scenario.lab)?;
    let is_ready = |log: &str| log.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready");
    agent.wait_for_log(READY_WITHIN, is_ready).context("the agent is not ready")?;
    Ok(agent)
}

/// How many of the programs are on the uplink, by either way.
#[derive(Debug)]
struct Attached {
    tcx: u32,
    clsact: u32,
}

impl Attached {
    fn on(scenario: &Scenario) -> Result<Self> {
        let tcx =
            if is_linux_since(TCX_SINCE) { tcx_programs(&scenario.lab.node.namespace, UPLINK)? } else { 0 };
        let clsact = ["ingress", "egress"]
            .map(|side| scenario.on_node("tc", &["filter", "show", "dev", UPLINK, side]))
            .iter()
            .flat_map(|filters| filters.lines())
            .map(|line| u32::from(line.contains("direct-action")))
            .sum();
        Ok(Self { tcx, clsact })
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "it panicked".into())
}
