//! `proxier api` as a process: what it prints of kpng's words, what it logs when its server is away, and how it refuses what it is told
//! wrongly. Pauses are those of production.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

#[allow(dead_code, reason = "each test program uses its part")]
mod agent;
#[allow(dead_code, reason = "each test program uses its part")]
mod localv1;

use std::{fs, process::Command};

use agent::Agent;
use nix::sys::signal::Signal;
use prost::Message as _;
use proxier_localv1::{Endpoint, OpItem, Value, op_item::Op};
use serde_json::json;
use tonic::Status;

use crate::localv1::{Server, pod, recorded, recordings, service};

fn command(server: &str) -> Command {
    agent::command(["api", "--api", server, "--node-name", "node1"])
}

fn to_json(server: &str) -> Agent {
    let mut command = command(server);
    command.arg("to-json");
    Agent::start(command)
}

fn external(line: &serde_json::Value) -> &str {
    line["Service"]["IPs"]["ExternalIPs"]["V4"][0].as_str().unwrap()
}

/// As kpng would say it to a client of a node without pods.
fn elsewhere(mut item: OpItem) -> OpItem {
    if let Some(Op::Set(Value { r#ref: Some(reference), bytes })) = &mut item.op
        && reference.path.matches('/').count() == 2
    {
        let endpoint = Endpoint { local: false, ..Endpoint::decode(&**bytes).unwrap() };
        *bytes = endpoint.encode_to_vec().into();
    }
    item
}

#[test]
fn what_kpng_has_said_is_printed_as_kpng_json_has_printed_it() {
    let server = Server::start();
    let first = recorded().into_iter().map(|(item, _)| item);
    // To its first Sync.
    let mut is_over = false;
    let first =
        first.take_while(move |item| !std::mem::replace(&mut is_over, matches!(item.op, Some(Op::Sync(_)))));
    server.script.say(first.map(elsewhere));
    let mut command = command(&server.address);
    let output = command.args(["to-json", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    // The one difference is meant: kpng never says that a Service maps the whole address. That it has lost a family of the pod
    // is so in what it has said as well.
    let printed = fs::read_to_string(recordings().join("kpng-json.txt")).unwrap();
    let expected = printed.replace(r#""Ports":[{"Protocol""#, r#""MapIP":true,"Ports":[{"Protocol""#);
    assert_ne!(printed, expected);
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), expected.trim_end());
}

#[test]
fn the_scopes_that_kpng_says_are_those_that_are_worked_out() {
    let server = Server::start();
    let mut scopes = std::collections::BTreeMap::new();
    // Until the load balancer's address has come; then there are two pods as well.
    for (item, record) in recorded().into_iter().take(25) {
        if let Some(scope) = record["value"].get("Scopes") {
            scopes.insert(record["path"].as_str().unwrap().to_owned(), scope.clone());
        }
        server.script.say([item]);
    }
    let mut agent = to_json(&server.address);
    let line = agent.next_that(|line| {
        line["Service"]["Name"] == "media"
            && line["Service"]["IPs"]["LoadBalancerIPs"] == json!({"V4": ["10.0.0.77"]})
            && line["Endpoints"].as_array().is_some_and(|endpoints| endpoints.len() == 2)
    });
    for (index, pod) in ["alpine-1", "alpine-2"].into_iter().enumerate() {
        assert_eq!(line["Endpoints"][index]["Scopes"], scopes[&format!("default/media/{pod}")]);
    }
}

#[test]
fn an_outage_is_two_lines_and_changes_nothing() {
    let server = Server::start();
    server.script.whole([service("web", "203.0.113.1"), pod("web", "alpine-1", "11.0.2.2")]);
    let mut agent = to_json(&server.address);
    assert_eq!(external(&agent.next()), "203.0.113.1");
    let connected = format!("connected to the localv1 server {}", server.address);
    agent.logs(&connected);
    let script = server.script.clone();
    let address = server.die();
    let line = agent.logs("cannot be reached: Connection refused");
    assert!(
        line.contains(" WARN ") && line.contains(&format!("the localv1 server {address} cannot")),
        "{line}"
    );
    assert!(
        line.contains("check --api, and that the server runs; meanwhile everything stays as it is"),
        "{line}"
    );
    let _server = Server::at(address, script.clone(), None);
    script.whole([service("web", "203.0.113.2"), pod("web", "alpine-1", "11.0.2.2")]);
    assert_eq!(external(&agent.next()), "203.0.113.2");
    let line = agent.logs("answers again");
    assert!(line.contains(" INFO "), "{line}");
    agent.signal(Signal::SIGTERM);
    let (status, out, log) = agent.end();
    assert_eq!((status.code(), out), (Some(0), Vec::new()));
    let lines = |words: &str| log.iter().filter(|line| line.contains(words)).count();
    assert_eq!(
        (lines(" WARN "), lines(" ERROR "), lines("answers again"), lines(&connected)),
        (1, 0, 1, 1),
        "{log:#?}"
    );
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let server = Server::start();
    let script = server.script.clone();
    let address = server.die();
    let mut agent = to_json(&address.to_string());
    let line = agent.logs("nothing listens there");
    assert!(line.contains(" WARN ") && line.contains("before that is mended nothing is changed"), "{line}");
    let _server = Server::at(address, script.clone(), None);
    script.end(Err(Status::unavailable("not yet")));
    script.whole([service("web", "203.0.113.1")]);
    assert_eq!(external(&agent.next()), "203.0.113.1");
    agent.logs("connected to the localv1 server");
}

#[test]
fn a_state_without_services_is_said() {
    let server = Server::start();
    server.script.whole([]);
    let mut agent = to_json(&server.address);
    let line = agent.logs("has no Service for this node");
    assert!(line.contains(" INFO "), "{line}");
}

#[test]
fn a_value_that_is_wrong_is_named_in_the_log_and_when_it_is_mended() {
    let server = Server::start();
    server.script.whole([service("web", "203.0.113.1"), pod("web", "alpine-1", "nowhere")]);
    let mut agent = to_json(&server.address);
    assert_eq!(external(&agent.next()), "203.0.113.1");
    let line = agent.logs("endpoints[alpine-1.v4].IPs.V4[0]");
    assert!(
        line.contains("Service default/web") && line.contains("is not an IP address: left out"),
        "{line}"
    );
    server.script.batch([pod("web", "alpine-1", "11.0.2.2")]);
    assert_eq!(agent.next()["Endpoints"][0]["IPs"], json!({"V4": ["11.0.2.2"]}));
}

#[test]
fn what_is_wrong_on_the_command_line_is_said_at_once() {
    let work = tempfile::tempdir().unwrap();
    let no_ca = work.path().join("ca.crt");
    let ends = |arguments: &[&str]| {
        let output = agent::command(["api"])
            .args(arguments)
            .args(["--node-name", "node1", "to-json"])
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"");
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, log) = ends(&["--api-ca", no_ca.to_str().unwrap()]);
    assert_eq!(
        (code, &*log),
        (
            Some(1),
            &*format!(
                "proxier: {} cannot be read: No such file or directory (os error 2); check --api-ca, and who may read the \
                 file\n",
                no_ca.display()
            )
        )
    );
    for (arguments, words) in [
        (&["--api", "http://127.0.0.1:12090"][..], "only tcp:// and unix:// are known"),
        (&["--api-cert", "/tls.crt"], "--api-ca <FILE>"),
        (&["--api-key", "/tls.key", "--api-ca", "/ca.crt"], "--api-cert <FILE>"),
        (
            &["--api", "unix:///run/api.sock", "--api-ca", "/ca.crt"],
            "who may use a unix socket is up to its owner and mode",
        ),
    ] {
        let (code, log) = ends(arguments);
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(words), "{words:?} is not in {log}");
    }
}
