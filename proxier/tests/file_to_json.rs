//! Manifests in, lines out: the real command on a temporary directory, while files change as editors, scripts and
//! kubelet change them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

mod agent;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use agent::{Agent, command};
use nix::sys::signal::Signal;
use serde_json::Value;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples")
}

fn service(name: &str, external: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  labels: {{service.kubernetes.io/service-proxy-name: \
         proxier}}\nspec:\n  externalIPs: [{external}]\n"
    )
}

fn slice(service: &str, pods: &[&str]) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-abcde\n  labels: \
         {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nendpoints:\n"
    );
    for pod in pods {
        text += &format!("- {{addresses: [{pod}], nodeName: node1}}\n");
    }
    text
}

/// Addresses of the pods, and which of them are local.
fn pods(line: &Value) -> Vec<String> {
    let endpoints = line["Endpoints"].as_array().cloned().unwrap_or_default();
    let mut pods = Vec::new();
    for endpoint in &endpoints {
        let place = if endpoint["Local"] == true { "local" } else { "remote" };
        for family in ["V4", "V6"] {
            for address in endpoint["IPs"][family].as_array().into_iter().flatten() {
                pods.push(format!("{place} {}", address.as_str().unwrap()));
            }
        }
    }
    pods
}

fn externals(line: &Value) -> String {
    line["Service"]["IPs"]["ExternalIPs"].to_string()
}

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// As `kubectl`, `sed -i` and most editors do it.
    fn write_by_renaming(&self, name: &str, text: &str) {
        let temporary = self.path(&format!(".{name}.new"));
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }
}

#[test]
fn the_examples_deliver_both_families_to_both_pods_of_the_node() {
    let mut agent = Agent::to_json(&examples());
    let line = agent.next();
    assert_eq!(line["Service"]["Name"], "kpng-example");
    assert_eq!(externals(&line), r#"{"V4":["10.0.0.55"],"V6":["1000::55"]}"#);
    assert_eq!(
        pods(&line),
        [
            "local 11.0.2.2",
            "local 1100::202",
            "local 11.0.2.3",
            "local 1100::203",
            "remote 11.0.1.2",
            "remote 1100::102"
        ]
    );
    let ready = agent.logs("ready");
    assert!(
        ready.contains("services=1") && ready.contains("externals=2") && ready.contains("pods=4"),
        "{ready}"
    );
}

#[test]
fn once_prints_once_and_ends_well() {
    for (node, local) in [("node1", 4), ("node2", 2), ("node3", 0)] {
        let mut command = command(["file", "--node-name", node, "--input"]);
        let output = command.arg(examples()).args(["to-json", "--once"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let lines: Vec<Value> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 1);
        let found = pods(&lines[0]).iter().filter(|pod| pod.starts_with("local")).count();
        assert_eq!(found, local, "{node}");
    }
}

#[test]
fn a_change_is_followed_however_the_file_is_written() {
    let lab = Lab::new();
    lab.write("service.yaml", &service("web", "10.0.0.55"));
    lab.write("slice.yaml", &slice("web", &["11.0.2.2"]));
    let mut agent = Agent::to_json(lab.dir.path());
    assert_eq!(pods(&agent.next()), ["local 11.0.2.2"]);

    lab.write_by_renaming("slice.yaml", &slice("web", &["11.0.2.2", "11.0.2.3"]));
    assert_eq!(pods(&agent.next()), ["local 11.0.2.2", "local 11.0.2.3"]);

    lab.write("slice.yaml", &slice("web", &["11.0.2.3"]));
    agent.next_that(|line| pods(line) == ["local 11.0.2.3"]);

    fs::remove_file(lab.path("slice.yaml")).unwrap();
    assert_eq!(agent.next()["Endpoints"], Value::Null);
    agent.logs("Service passed on, without local pods");

    lab.write(
        "more.json",
        &format!(
            "{{{}}}",
            r#""apiVersion": "v1", "kind": "ServiceList", "items": [
        {"metadata": {"name": "mail", "labels": {"service.kubernetes.io/service-proxy-name": "proxier"}},
         "spec": {"externalIPs": ["10.0.0.56"]}}]"#
        ),
    );
    // The whole set again.
    agent.next_that(|line| line["Service"]["Name"] == "mail");
    assert_eq!(agent.next()["Service"]["Name"], "web");
}

#[test]
fn a_broken_file_is_reported_once_with_its_place_and_the_rest_goes_on_working() {
    let lab = Lab::new();
    lab.write("service.yaml", &service("web", "10.0.0.55"));
    lab.write("slice.yaml", &slice("web", &["11.0.2.2"]));
    let mut agent = Agent::to_json(lab.dir.path());
    assert_eq!(pods(&agent.next()), ["local 11.0.2.2"]);

    let good = service("web", "10.0.0.55");
    lab.write_by_renaming("service.yaml", &(good + "  ports: {\n"));
    let error = agent.logs("ERROR");
    assert!(error.contains("service.yaml:8:10: "), "{error}");

    lab.write("slice.yaml", &slice("web", &["11.0.2.3"]));
    let line = agent.next_that(|line| pods(line) == ["local 11.0.2.3"]);
    assert_eq!(externals(&line), r#"{"V4":["10.0.0.55"]}"#);

    lab.write_by_renaming("service.yaml", &service("web", "10.0.0.56"));
    agent.logs("service.yaml: now good again");
    assert_eq!(externals(&agent.next()), r#"{"V4":["10.0.0.56"]}"#);

    agent.signal(Signal::SIGTERM);
    let (status, out, log) = agent.end();
    assert_eq!(status.code(), Some(0));
    assert_eq!(out, [""; 0]);
    assert_eq!(log.iter().filter(|line| line.contains("service.yaml:8:10")).count(), 1, "{log:#?}");
    assert_eq!(log.iter().filter(|line| line.contains(" ready ")).count(), 1, "{log:#?}");
}

#[test]
fn a_config_map_mount_is_followed_when_kubelet_swaps_its_link() {
    let lab = Lab::new();
    let publish = |version: &str, pods: &[&str]| {
        fs::create_dir(lab.path(version)).unwrap();
        fs::write(lab.path(version).join("service.yaml"), service("web", "10.0.0.55")).unwrap();
        fs::write(lab.path(version).join("slice.yaml"), slice("web", pods)).unwrap();
        symlink(version, lab.path("..data_tmp")).unwrap();
        fs::rename(lab.path("..data_tmp"), lab.path("..data")).unwrap();
    };
    publish("..2026_11_22_01", &["11.0.2.2"]);
    for name in ["service.yaml", "slice.yaml"] {
        symlink(format!("..data/{name}"), lab.path(name)).unwrap();
    }
    let mut agent = Agent::to_json(lab.dir.path());
    assert_eq!(pods(&agent.next()), ["local 11.0.2.2"]);
    publish("..2026_11_22_02", &["11.0.2.3"]);
    fs::remove_dir_all(lab.path("..2026_11_22_01")).unwrap();
    assert_eq!(pods(&agent.next()), ["local 11.0.2.3"]);
}

#[test]
fn a_single_file_is_followed_as_well() {
    let lab = Lab::new();
    lab.write("all.yaml", &(service("web", "10.0.0.55") + "---\n" + &slice("web", &["11.0.2.2"])));
    let mut agent = Agent::to_json(&lab.path("all.yaml"));
    assert_eq!(pods(&agent.next()), ["local 11.0.2.2"]);
    lab.write_by_renaming(
        "all.yaml",
        &(service("web", "10.0.0.55") + "---\n" + &slice("web", &["11.0.2.3"])),
    );
    assert_eq!(pods(&agent.next()), ["local 11.0.2.3"]);
}

#[test]
fn bad_input_costs_what_is_bad_and_each_is_named() {
    let lab = Lab::new();
    lab.write("a-good.yaml", &(service("web", "10.0.0.55") + "---\n" + &slice("web", &["11.0.2.2"])));
    lab.write("b-yaml.yaml", "kind: Service\n\tmetadata: {}\n");
    lab.write("c-kind.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n");
    lab.write("d-address.yaml", &service("mail", "10.0.0.56, 10.0.0.999"));
    lab.write("e-duplicate.yaml", &service("web", "10.0.0.57"));
    lab.write("f-taken.yaml", &service("zebra", "10.0.0.55"));
    lab.write("g-family.yaml", &(service("six", "'1000::6'") + "---\n" + &slice("six", &["11.0.2.9"])));
    lab.write("h-loopback.yaml", &service("loop", "127.0.0.1"));
    lab.write("i-none.yaml", &service("none", ""));
    let mut agent = Agent::to_json(lab.dir.path());
    let names: Vec<String> = (0..6)
        .map(|_| agent.next())
        .map(|line| line["Service"]["Name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["loop", "mail", "none", "six", "web", "zebra"]);
    agent.logs("ready");
    agent.signal(Signal::SIGINT);
    let (status, _, log) = agent.end();
    assert_eq!(status.code(), Some(0));
    for expected in [
        "b-yaml.yaml:1:",
        "c-kind.yaml:2:7: kind \"apps/v1 Deployment\"",
        "d-address.yaml:1:1: Service default/mail: spec.externalIPs[1] \"10.0.0.999\"",
        "e-duplicate.yaml:1:1: Service default/web: is already defined at",
        "Service default/zebra: spec.externalIPs[0] \"10.0.0.55\" belongs to Service default/web, which comes first",
        "Service default/six: the external IPv6 address \"1000::6\" has no pod to go to",
        "Service default/loop: spec.externalIPs[0] \"127.0.0.1\" is a loopback address: not taken",
        "Service default/none: has no external address",
    ] {
        let found = log.iter().filter(|line| line.contains(expected)).count();
        assert_eq!(found, 1, "{expected:?} in {log:#?}");
    }
}

#[test]
fn three_hundred_pods_of_a_node_are_all_printed() {
    let lab = Lab::new();
    let all: Vec<String> = (0..300).map(|n| format!("11.0.{}.{}", n / 250, n % 250 + 1)).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    lab.write("all.yaml", &(service("web", "10.0.0.55") + "---\n" + &slice("web", &all)));
    assert_eq!(pods(&Agent::to_json(lab.dir.path()).next()).len(), 300);
}

#[test]
fn the_label_selects_services_if_a_name_is_given() {
    let lab = Lab::new();
    lab.write("a.yaml", &service("mine", "10.0.0.55"));
    lab.write("b.yaml", &service("theirs", "10.0.0.56").replace("proxy-name: proxier", "proxy-name: other"));
    let output = command(["file", "--service-proxy-name", "proxier", "--input"])
        .arg(lab.dir.path())
        .args(["to-json", "--once"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(r#""Name":"mine""#), "{text}");
}

#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_default() {
    let lab = Lab::new();
    lab.write("all.yaml", &(service("web", "10.0.0.55") + "---\n" + &slice("web", &["11.0.2.2"])));
    let run = |arguments: &[&str]| {
        let output = command(arguments)
            .env("PROXIER_INPUT", lab.dir.path())
            .env("NODE_NAME", "node1")
            .env("PROXIER_ONCE", "true")
            .output()
            .unwrap();
        pods(&serde_json::from_slice(&output.stdout).unwrap())
    };
    assert_eq!(run(&["file", "to-json"]), ["local 11.0.2.2"]);
    assert_eq!(run(&["file", "--node-name", "node2", "to-json"]), ["remote 11.0.2.2"]);
}

#[test]
fn an_empty_variable_is_as_good_as_none() {
    let lab = Lab::new();
    lab.write("all.yaml", &(service("web", "10.0.0.55") + "---\n" + &slice("web", &["11.0.2.2"])));
    let run = |arguments: &[&str]| {
        let mut command = command(arguments);
        for name in [
            "NODE_NAME",
            "PROXIER_SERVICE_PROXY_NAME",
            "PROXIER_EXTERNAL_CIDR",
            "PROXIER_NO_EXTERNAL_IPS",
            "PROXIER_NO_LOAD_BALANCER_IPS",
            "PROXIER_ONCE",
            "PROXIER_PRETTY",
            "PROXIER_LOG_FORMAT",
            "PROXIER_LOG_LEVEL",
            "PROXIER_UPLINK",
            "PROXIER_ATTACH",
            "PROXIER_INGRESS",
            "PROXIER_NO_BACKEND",
            "PROXIER_PIN_PATH",
            "PROXIER_OUTPUT",
            "PROXIER_INPUT",
        ] {
            command.env(name, "");
        }
        command.output().unwrap()
    };
    let input = lab.dir.path().to_str().unwrap();
    let output = run(&["file", "--input", input, "to-json", "--once"]);
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert_eq!(pods(&serde_json::from_slice(&output.stdout).unwrap()), ["remote 11.0.2.2"]);
    let host = nix::unistd::gethostname().unwrap().to_string_lossy().to_lowercase();
    assert!(log.contains(&format!("node={host}")), "{log}");

    // Each default is in force, so what fails is what fails without the variables: `/` is no bpffs.
    let output = run(&["file", "--input", input, "to-bpf", "--pin-path", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let output = run(&["get", "services", "--pin-path", "/nowhere"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    // What has no default is missing, as it is without the variable.
    let output = run(&["file", "to-json", "--once"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--input"));
}

#[test]
fn a_variable_holds_several_values_with_commas_between_them() {
    let lab = Lab::new();
    lab.write("all.yaml", &service("web", "10.0.0.55, 10.0.1.55, '1000::55'"));
    let run = |cidrs: &str| {
        let mut command = command(["file", "--input"]);
        command.arg(lab.dir.path()).args(["to-json", "--once"]).env("PROXIER_EXTERNAL_CIDR", cidrs);
        command.output().unwrap()
    };
    for cidrs in ["10.0.0.0/24,1000::/64", "10.0.0.0/24, 1000::/64"] {
        let output = run(cidrs);
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{log}");
        assert!(log.contains("\"10.0.1.55\" lies outside --external-cidr 10.0.0.0/24,1000::/64"), "{log}");
        assert_eq!(log.matches("lies outside").count(), 1, "{log}");
    }
    let output = run("10.0.0.0/24,eth0");
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("'eth0'") && error.contains("--external-cidr"), "{error}");

    // Read with the names of interfaces already, and before anything is asked of the kernel.
    let output =
        command(["file", "--input", "/", "to-bpf"]).env("PROXIER_UPLINK", "eth0,e/th1").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("'e/th1'") && error.contains("--uplink"), "{error}");
}

#[test]
fn an_input_that_is_not_there_fails_at_once_and_says_so() {
    let output = command(["file", "--input", "/nonexistent/manifests", "to-json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("cannot read --input /nonexistent/manifests: name a directory or a file"),
        "{error}"
    );
}

#[test]
fn what_is_not_understood_ends_with_two() {
    for arguments in [&["file", "to-json"][..], &["file", "--input", "/", "to-nowhere"], &[]] {
        assert_eq!(command(arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["version"], &["--version"], &["completions", "zsh"]] {
        let output = command(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(!output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_empty_directory_is_mentioned_once_and_followed() {
    let lab = Lab::new();
    lab.write("notes.txt", "not a manifest");
    let mut agent = Agent::to_json(lab.dir.path());
    let empty =
        format!("no *.yaml, *.yml or *.json in {}: nothing to do until there is", lab.dir.path().display());
    agent.logs(&empty);
    lab.write_by_renaming("service.yaml", &service("web", "10.0.0.55"));
    assert_eq!(agent.next_that(|line| line["Service"]["Name"] == "web")["Endpoints"], Value::Null);
    fs::remove_file(lab.path("service.yaml")).unwrap();
    agent.logs("Service withdrawn");
    agent.signal(Signal::SIGINT);
    let (status, _, log) = agent.end();
    assert_eq!(status.code(), Some(0));
    assert_eq!(log.iter().filter(|line| line.contains(&empty)).count(), 1, "{log:#?}");
    assert!(log.iter().any(|line| line.contains("ending; what is in force stays in force")), "{log:#?}");
}

#[test]
fn json_logs_are_one_object_a_line() {
    let mut command = command(["--log-format", "json", "file", "--input"]);
    let output = command.arg(examples()).args(["to-json", "--once"]).output().unwrap();
    let messages: Vec<Value> = String::from_utf8(output.stderr)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["message"].clone())
        .collect();
    assert_eq!(messages.last(), Some(&Value::from("ready")));
}

#[test]
fn a_reader_that_goes_away_ends_it_without_a_fuss() {
    let lab = Lab::new();
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    let mut command = command(["file", "--input"]);
    command.arg(lab.dir.path()).arg("to-json").stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Closed before anything is written, or after the first line: both are a pipe that nobody reads.
    drop(child.stdout.take());
    let mut number = 0;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        number += 1;
        lab.write("a.yaml", &service("web", &format!("10.1.{}.{}", number / 250 % 250, number % 250 + 1)));
        std::thread::sleep(std::time::Duration::from_millis(150));
    };
    assert_eq!(status.code(), Some(0));
}
