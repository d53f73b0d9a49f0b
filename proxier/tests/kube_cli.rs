//! `proxier kube` as a process, against the double: what it prints, what it logs when something is wrong, and how it ends. Pauses
//! are those of production.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

#[allow(dead_code, reason = "each test program uses its part")]
mod agent;

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use agent::Agent;
use nix::sys::signal::Signal;
use proxier_tests::apiserver::{ApiServer, Fault, Kind, Resource, Verb};
use serde_json::{Value, json};

const PROXY_NAME: &str = "kube-cli";

/// A server with one Service, its pod and its node, and a kubeconfig for it.
struct Lab {
    server: ApiServer,
    work: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self { server: ApiServer::start().unwrap(), work: tempfile::tempdir().unwrap() };
        lab.server.write_kubeconfig(&lab.kubeconfig()).unwrap();
        lab.server.apply_all(&[service(PROXY_NAME, "203.0.113.1"), slice(), node()]).unwrap();
        lab
    }

    fn kubeconfig(&self) -> PathBuf {
        self.work.path().join("kubeconfig")
    }

    fn command(&self) -> Command {
        let mut command =
            agent::command(["kube", "--node-name", "node1", "--service-proxy-name", PROXY_NAME]);
        // What kubectl would use is in the home directory.
        command.env("HOME", self.work.path()).arg("--kubeconfig").arg(self.kubeconfig());
        command
    }

    fn to_json(&self) -> Agent {
        let mut command = self.command();
        command.arg("to-json");
        Agent::start(command)
    }

    /// The agent, with a kubeconfig of this text and these further arguments, when it has ended.
    fn ends(&self, kubeconfig: Option<&str>, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command =
            agent::command(["kube", "--node-name", "node1", "--service-proxy-name", PROXY_NAME]);
        command.env("HOME", self.work.path());
        if let Some(text) = kubeconfig {
            let path = self.work.path().join("other");
            fs::write(&path, text).unwrap();
            command.arg("--kubeconfig").arg(path);
        }
        let Output { status, stdout, stderr } = command.args(arguments).arg("to-json").output().unwrap();
        assert_eq!(stdout, b"");
        (status.code(), String::from_utf8(stderr).unwrap())
    }
}

fn service(proxy_name: &str, external: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "namespace": "default", "name": "web",
            "labels": {"service.kubernetes.io/service-proxy-name": proxy_name},
        },
        "spec": {"clusterIP": "None", "externalIPs": [external]},
    })
}

fn slice() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "web-1",
            "labels": {
                "service.kubernetes.io/service-proxy-name": PROXY_NAME,
                "kubernetes.io/service-name": "web",
            },
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.1.2"], "nodeName": "node1"}],
        "ports": [],
    })
}

fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.77.1"}]},
    })
}

fn externals(line: &Value) -> &str {
    assert_eq!(line["Service"]["Name"], "web");
    line["Service"]["IPs"]["ExternalIPs"]["V4"][0].as_str().unwrap()
}

#[test]
fn everything_is_printed_and_changes_are_followed() {
    let lab = Lab::new();
    let mut agent = lab.to_json();
    let line = agent.next();
    assert_eq!(externals(&line), "203.0.113.1");
    assert_eq!(line["Endpoints"][0]["IPs"]["V4"], json!(["10.244.1.2"]));
    agent.logs(&format!("connected to the API server {}", lab.server.url()));
    lab.server.apply(service(PROXY_NAME, "203.0.113.2")).unwrap();
    assert_eq!(externals(&agent.next()), "203.0.113.2");

    // Without the label it is none of ours. Nothing is left to be printed; the log says it.
    lab.server.apply(service("other", "203.0.113.2")).unwrap();
    agent.logs("Service withdrawn");
    lab.server.apply(service(PROXY_NAME, "203.0.113.3")).unwrap();
    assert_eq!(externals(&agent.next()), "203.0.113.3");

    agent.signal(Signal::SIGTERM);
    let (status, out, _) = agent.end();
    assert_eq!((status.code(), out), (Some(0), Vec::new()));
}

#[test]
fn once_prints_once_and_ends_well() {
    let lab = Lab::new();
    let output = lab.command().args(["to-json", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let lines = String::from_utf8(output.stdout).unwrap();
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert_eq!(externals(&serde_json::from_str(&lines).unwrap()), "203.0.113.1");
}

/// What is said while `spoil` is so, and that everything is well as soon as `mend` has been done.
#[track_caller]
fn is_said_until_mended(spoil: impl Fn(&Lab), says: &[&str], mend: impl Fn(&Lab)) {
    let lab = Lab::new();
    spoil(&lab);
    let mut agent = lab.to_json();
    let line = agent.logs(says[0]);
    for words in says {
        assert!(line.contains(words), "{words:?} is not in: {line}");
    }
    assert!(line.contains(" WARN ") && line.contains("before that is mended nothing is changed"), "{line}");
    mend(&lab);
    assert_eq!(externals(&agent.next()), "203.0.113.1");
    agent.logs("connected to the API server");
}

#[test]
fn a_token_that_does_not_count_yet_is_tried_until_it_does() {
    let right = std::sync::Mutex::new(String::new());
    is_said_until_mended(
        |lab| {
            *right.lock().unwrap() = lab.server.token();
            lab.server.set_token("another");
        },
        &["refuses with 401: Unauthorized; check the token"],
        |lab| lab.server.set_token(&right.lock().unwrap()),
    );
}

#[test]
fn what_is_forbidden_is_named_with_the_role_that_is_missing() {
    is_said_until_mended(
        |lab| {
            lab.server.inject(Fault::new(Kind::Forbidden).of(Resource::EndpointSlices));
        },
        &[
            "refuses with 403: endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:",
            "give this ServiceAccount (or user) a ClusterRole with list and watch of endpointslices: deploy/ has one",
        ],
        |lab| lab.server.heal(),
    );
}

#[test]
fn where_nothing_listens_it_is_tried_until_something_does() {
    is_said_until_mended(
        |lab| lab.server.down().unwrap(),
        &["cannot be reached: Connection refused (os error 111); nothing listens there: check the address"],
        |lab| lab.server.up().unwrap(),
    );
}

#[test]
fn a_server_without_endpoint_slices_is_told_apart_from_one_without_them_yet() {
    is_said_until_mended(
        |lab| {
            lab.server.inject(Fault::new(Kind::NotFound).of(Resource::EndpointSlices));
        },
        &[
            "refuses with 404: 404 page not found; this server has no endpointslices",
            "the API server must be of Kubernetes 1.33 or newer",
        ],
        |lab| lab.server.heal(),
    );
}

#[test]
fn a_web_page_is_not_taken_for_an_answer() {
    is_said_until_mended(
        |lab| {
            lab.server.inject(Fault::new(Kind::Html));
        },
        &["answers what cannot be understood", "check that the address is an API server's, and what proxies"],
        |lab| lab.server.heal(),
    );
}

/// Every watch begins well, and then something on the way spoils it: lists go on, so the state is right, but late.
#[test]
fn watches_that_always_break_are_said_though_lists_go_on() {
    let lab = Lab::new();
    lab.server.inject(Fault::new(Kind::OtherShape).on(Verb::Watch));
    let mut agent = lab.to_json();
    assert_eq!(externals(&agent.next()), "203.0.113.1");
    agent.logs("answers what cannot be understood");
    lab.server.apply(service(PROXY_NAME, "203.0.113.2")).unwrap();
    assert_eq!(externals(&agent.next()), "203.0.113.2");
}

#[test]
fn without_any_way_to_the_api_server_it_says_what_to_give() {
    let (code, log) = Lab::new().ends(None, &[]);
    assert_eq!(code, Some(1));
    assert!(
        log.starts_with("proxier: no API server is known: this is no pod, and the kubeconfig that "),
        "{log}"
    );
    assert!(
        log.ends_with(".kube/config: No such file or directory (os error 2): give --kubeconfig\n"),
        "{log}"
    );
}

#[test]
fn a_pod_without_a_token_is_told_what_it_lacks() {
    let output = agent::command(["kube", "--service-proxy-name", PROXY_NAME, "to-json"])
        .env("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        .env("KUBERNETES_SERVICE_PORT", "443")
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("the ServiceAccount of this pod cannot be used"), "{log}");
    assert!(log.ends_with("the pod needs automountServiceAccountToken: true\n"), "{log}");
}

#[test]
fn a_kubeconfig_that_is_of_no_use_is_refused_with_what_to_do() {
    let lab = Lab::new();
    let good = fs::read_to_string(lab.kubeconfig()).unwrap();
    let with_authority = |authority: &str| {
        good.replace("server: \"http:", &format!("certificate-authority-data: {authority}, server: \"https:"))
    };
    for (text, arguments, says) in [
        ("}{", &[][..], "cannot be read: failed to parse kubeconfig YAML: "),
        ("just words", &[], "cannot be read: failed to parse kubeconfig YAML: "),
        ("", &[], "has no current context: name one that it has (none) with --context"),
        (&good, &["--context", "nope"], "has no context nope: name one that it has (double) with --context"),
        (
            &with_authority("'%%%'"),
            &[],
            "cannot be used: failed to load certificate authority: failed to decode",
        ),
        (&with_authority("aGVsbG8="), &[], "has no certificate in it: write one in PEM form"),
        (&good.replace("http://", "http//"), &[], "cannot be used: failed to parse cluster url: "),
    ] {
        let (code, log) = lab.ends(Some(text), arguments);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.starts_with("proxier: the ") && log.contains(says), "{says:?} is not in: {log}");
        assert_eq!(log.lines().count(), 1, "{log}");
        for cause in ["failed to parse", "failed to load", "failed to decode", "os error"] {
            assert!(log.matches(cause).count() <= 1, "said twice: {log}");
        }
    }
    let (code, log) = lab.ends(None, &["--kubeconfig", "/nonexistent/kubeconfig"]);
    assert_eq!(
        (code, &*log),
        (
            Some(1),
            "proxier: the kubeconfig /nonexistent/kubeconfig cannot be read: No such file or directory (os error 2): name \
             another one with --kubeconfig\n"
        )
    );
}

#[test]
fn a_label_value_that_no_object_can_have_is_a_mistake_of_the_command_line() {
    for value in ["", "a b", "-a", &"a".repeat(64), "a/b"] {
        let output = agent::command(["kube", "--service-proxy-name", value, "to-json"]).output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{value:?}: {log}");
        assert!(log.contains("--service-proxy-name"), "{log}");
    }
}

#[test]
fn a_label_that_no_service_has_is_named_and_waited_for() {
    let lab = Lab::new();
    lab.server.delete("Service", "default", "web").unwrap();
    let mut agent = lab.to_json();
    let line = agent.logs("no Service has the label");
    assert!(line.contains(" INFO "), "{line}");
    assert!(
        line.contains("service.kubernetes.io/service-proxy-name=kube-cli yet: nothing to do until"),
        "{line}"
    );
    lab.server.apply(service(PROXY_NAME, "203.0.113.1")).unwrap();
    assert_eq!(externals(&agent.next()), "203.0.113.1");
}

#[test]
fn a_node_name_that_nothing_speaks_of_is_said() {
    let lab = Lab::new();
    let mut command = agent::command(["kube", "--service-proxy-name", PROXY_NAME, "--node-name", "nobody"]);
    let output =
        command.arg("--kubeconfig").arg(lab.kubeconfig()).args(["to-json", "--once"]).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(log.contains("nobody") && log.contains("--node-name"), "{log}");
}

#[test]
fn a_server_that_says_nothing_does_not_keep_the_agent_from_ending() {
    let lab = Lab::new();
    lab.server.inject(Fault::new(Kind::Silence));
    let agent = lab.to_json();
    let deadline = Instant::now() + Duration::from_secs(30);
    while lab.server.requests().len() < 4 {
        assert!(Instant::now() < deadline, "it does not ask");
        thread::sleep(Duration::from_millis(10));
    }
    let start = Instant::now();
    agent.signal(Signal::SIGTERM);
    let (status, out, _) = agent.end();
    // Of a silence of 90 s.
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!((status.code(), out), (Some(0), Vec::new()));
}

/// Whether it is an outage that goes on for all watches in the same words.
fn is_told(kind: Option<Kind>) -> bool {
    matches!(kind, None | Some(Kind::Unauthorized | Kind::InternalError | Kind::Unavailable | Kind::Html))
}

/// What the agent logs through an outage that `kind` is: the whole of it, as JSON, which has the modules.
fn log_of_an_outage(kind: Option<Kind>, level: &[&str]) -> Vec<Value> {
    let lab = Lab::new();
    let mut command = lab.command();
    command.args(["--log-format", "json"]).args(level).arg("to-json");
    let mut agent = Agent::start(command);
    assert_eq!(externals(&agent.next()), "203.0.113.1");
    agent.logs("connected to the API server");
    match kind {
        Some(kind) => {
            lab.server.inject(Fault::new(kind));
        }
        None => lab.server.down().unwrap(),
    }
    // Lists are asked for as well.
    lab.server.compact();
    lab.server.cut_watches();
    thread::sleep(Duration::from_secs(6));
    lab.server.heal();
    lab.server.up().unwrap();
    lab.server.apply(service(PROXY_NAME, "203.0.113.2")).unwrap();
    agent.next_that(|line| externals(line) == "203.0.113.2");
    if is_told(kind) {
        agent.logs("answers again");
    }
    agent.signal(Signal::SIGTERM);
    let (_, _, log) = agent.end();
    log.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

#[test]
fn an_outage_is_a_few_lines_of_ours_and_none_of_the_libraries() {
    // All of which a server may do for long, but silence, which takes longer than this to be noticed.
    let kinds = Kind::ALL.into_iter().filter(|kind| {
        !matches!(kind, Kind::Silence | Kind::Stall { .. } | Kind::Drip { .. } | Kind::Duplicates)
    });
    thread::scope(|scope| {
        for kind in kinds.map(Some).chain([None]) {
            scope.spawn(move || {
                let log = log_of_an_outage(kind, &[]);
                let warnings = log.iter().filter(|line| line["level"] == "WARN").count();
                let strangers: Vec<_> = log
                    .iter()
                    .filter(|line| !line["target"].as_str().unwrap().starts_with("proxier"))
                    .collect();
                assert!(strangers.is_empty(), "{kind:?}: {strangers:#?}");
                assert!(log.iter().all(|line| line["level"] != "ERROR"), "{kind:?}: {log:#?}");
                // At most one a watch, where each is refused in words of its own.
                assert!(warnings <= 4, "{kind:?}: {log:#?}");
                assert!(log.len() <= 12, "{kind:?}: {log:#?}");
                if is_told(kind) {
                    assert_eq!(warnings, 1, "{kind:?}: {log:#?}");
                    let back = log.iter().filter(|line| {
                        line["message"].as_str().is_some_and(|text| text.ends_with("answers again"))
                    });
                    assert_eq!(back.count(), 1, "{kind:?}: {log:#?}");
                }
            });
        }
    });
}

#[test]
fn the_libraries_speak_when_they_are_named() {
    let log = log_of_an_outage(Some(Kind::InternalError), &["--log-level", "info,kube_client=debug"]);
    assert!(log.iter().any(|line| line["target"].as_str().unwrap().starts_with("kube_client")), "{log:#?}");
}
