//! `proxier status` against an agent's endpoints, over real HTTP: what a person sees, and the exit code.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::{
    net::SocketAddr,
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use proxier::{
    model::NodeName,
    observe::{
        Observed,
        http::{ListenArgs, serve},
        listen::Listen,
    },
};
use tokio::runtime::Runtime;

/// An agent's endpoints in this process.
struct Endpoints {
    observed: Observed,
    address: SocketAddr,
    _servers: Vec<proxier::observe::listen::Server>,
    _runtime: Runtime,
}

fn endpoints() -> Endpoints {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let observed = Observed::new(&NodeName::new("node1"), "file", None);
    let (servers, address) = runtime.block_on(async {
        let metrics_address = Listen::On("127.0.0.1:0".parse().unwrap());
        let mut servers = serve(&observed, ListenArgs { health_address: Listen::Off, metrics_address });
        let address = servers[0].bound().await.unwrap();
        (servers, address)
    });
    Endpoints { observed, address, _servers: servers, _runtime: runtime }
}

/// How the command ends, and what it writes to its two outputs.
fn status(address: SocketAddr, more: &[&str]) -> (ExitStatus, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxier"));
    command.args(["status", "--metrics-address", &address.to_string()]).args(more);
    let output = command.env_clear().stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status, text(output.stdout), text(output.stderr))
}

#[test]
fn an_agent_that_is_ready_is_shown_and_is_a_success() {
    let endpoints = endpoints();
    endpoints.observed.synced();
    endpoints.observed.applied(Duration::from_millis(2));
    endpoints.observed.source_failed("services", "unreachable", &"connection refused");
    let (ended, out, log) = status(endpoints.address, &[]);
    assert_eq!(ended.code(), Some(0), "{log}");
    assert!(out.contains(" on node1, started ") && out.contains("Ready:       yes\n"), "{out}");
    assert!(out.contains("services: away for ") && out.contains(": connection refused\n"), "{out}");
    assert_eq!(log, "");
}

#[test]
fn an_agent_that_is_not_ready_is_shown_and_is_a_failure() {
    let endpoints = endpoints();
    endpoints.observed.synced();
    endpoints.observed.apply_failed(Duration::ZERO, &anyhow::anyhow!("no room in `services`"));
    let (ended, out, log) = status(endpoints.address, &[]);
    assert_eq!(ended.code(), Some(1));
    assert!(out.contains("attempts: 1: no room in `services`\n"), "{out}");
    assert_eq!(log, "proxier: the agent is not ready: state-applied\n");
    let (ended, out, _) = status(endpoints.address, &["-o", "json"]);
    assert_eq!(ended.code(), Some(1));
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["sync"]["failure"]["error"], "no room in `services`");
}

#[test]
fn where_no_agent_answers_the_error_says_what_that_means() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (ended, out, log) = status(free, &[]);
    assert_eq!((ended.code(), out.as_str()), (Some(1), ""));
    assert!(
        log.starts_with(&format!("proxier: no agent answers on {free}: none runs on this node")),
        "{log}"
    );
}
