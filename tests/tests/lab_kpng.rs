//! kpng's split on a node of the lab: a controller at a double of the API server, backends at the controller, with traffic.
//! And every command of README's "Coming from kpng".

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::unix::{fs::symlink, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use proxier_tests::{
    agent,
    exchange::Protocol,
    has_programs,
    kube_scenario::{apply, apply_pods, prepare, without_loss},
    manifests,
    scenario::{SERVICE, Scenario, externals},
    skip_unless_root,
    topology::{Lab, LabSpec, NODE_NAME},
    wait,
};

/// What takes no longer than a start of the agent.
const SOON: Duration = Duration::from_secs(120);
/// Where kpng's family meets, unless told otherwise.
const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 12090);

/// The Service of the post, and the pods of the lab as its endpoints.
fn apply_kpng_example(server: &proxier_tests::apiserver::ApiServer, pods: &[IpAddr]) {
    let rename = |text: &str| {
        text.replace("service-proxy-name: proxier", "service-proxy-name: kpng-example")
            .replace(&format!("name: {SERVICE}"), "name: kpng-example")
            .replace("namespace: lab", "namespace: default")
    };
    apply(server, &rename(&manifests::service(SERVICE, &externals())));
    apply(server, &rename(&manifests::slices(SERVICE, NODE_NAME, pods)));
}

/// A shell on the node, and all that it has started.
struct Shell {
    child: Child,
    output: PathBuf,
}

impl Shell {
    /// Runs `script` as somebody would who has logged in on the node, with `proxier` in the PATH.
    fn start(scenario: &Scenario, directory: &Path, name: &str, script: &str) -> Self {
        let bin = directory.join("bin");
        fs::create_dir_all(&bin).unwrap();
        if !bin.join("proxier").exists() {
            symlink(agent::binary().unwrap().canonicalize().unwrap(), bin.join("proxier")).unwrap();
        }
        let output = directory.join(name);
        let file = File::create(&output).unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let child = scenario
            .lab
            .node
            .namespace
            .command("sh")
            .unwrap()
            .args(["-euc", script])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .env("PATH", path)
            .env("NODE_NAME", NODE_NAME)
            .env("PROXIER_KUBECONFIG", scenario.path("kubeconfig"))
            .env("PROXIER_PIN_PATH", scenario.lab.pin_path())
            .env("PROXIER_UPLINK", &scenario.spec.uplink)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .process_group(0)
            .spawn()
            .unwrap();
        Self { child, output }
    }

    /// Without colours.
    fn printed(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap();
        let mut parts = text.split("\u{1b}[");
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| text + part.split_once('m').map_or(part, |(_, rest)| rest))
    }

    /// Waits until it has printed all of `words`.
    fn wait_for(&self, words: &[&str]) {
        let found = wait::until(SOON, || {
            let printed = self.printed();
            words.iter().all(|word| printed.contains(word)).then_some(())
        });
        assert!(found.is_some(), "{words:?} not in:\n{}", self.printed());
    }

    /// What it has printed when it has ended well.
    fn end(mut self) -> String {
        let status = wait::until(SOON, || self.child.try_wait().unwrap());
        assert!(status.is_some_and(|status| status.success()), "{status:?}:\n{}", self.printed());
        self.printed()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // What has ended already needs no signal.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The rows of the table in README, what kpng's command is and what ours.
fn rows() -> Vec<(String, String)> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let section = readme.split("## Coming from kpng").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        // A pipe within a cell is escaped.
        let row = row.replace("\\|", "\0");
        let cell = |n: usize| {
            let cell = row.split('|').nth(n).unwrap();
            cell.split('`').nth(1).unwrap().replace('\0', "|")
        };
        (cell(1), cell(2))
    })
    .collect()
}

#[test]
fn every_command_of_the_post_has_its_counterpart() {
    skip_unless_root!();
    if !has_programs(&["jq", "nft"], "jq nftables") {
        return;
    }
    let (server, scenario) = prepare(&LabSpec::unique(), &[]);
    let pods = scenario.pod("alpine-1");
    apply_kpng_example(&server, &pods);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out").display().to_string();
    let start = |name: &str, script: &str| Shell::start(&scenario, directory.path(), name, script);
    let pod_v6 = pods.iter().find(|pod| pod.is_ipv6()).unwrap().to_string();
    let traffic = |from_port: u16| {
        for external in externals() {
            scenario.wait_for_any_pod(external);
        }
        for (port, protocol) in
            (from_port..).zip([Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Sctp])
        {
            for external in externals() {
                let _ = scenario.ask(&scenario.question(protocol, port, external, 5060));
            }
        }
    };

    let mut controller = None;
    let mut variables = String::new();
    let rows = rows();
    assert_eq!(rows.len(), 8, "{rows:?}");
    for (theirs, ours) in &rows {
        // People may have other things at that place.
        let ours = ours.replace("/tmp/out", &out);
        match theirs.split(' ').next().unwrap() {
            "kpng" => {
                let shell = start("controller", &ours);
                let listens =
                    || scenario.lab.node.namespace.enter(|| TcpStream::connect(API)).is_ok().then_some(());
                assert!(wait::until(SOON, listens).is_some(), "{}", shell.printed());
                controller = Some(shell);
            }
            "kpng-json" if theirs.contains('>') => {
                let _ = start("to-file", &ours).end();
                assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), 1);
            }
            // They follow every change, and do not end. To a terminal, as jq prints at once there only.
            "kpng-json" | "CALLOUT=jq" => {
                assert!(!ours.contains('\''), "{ours}");
                start("printed", &format!("script --quiet --flush --command '{ours}' /dev/null"))
                    .wait_for(&["\"Name\": \"kpng-example\"", "\"MapIP\": true", &pod_v6]);
            }
            name if name.starts_with("xip=") || name.starts_with("podip=") => {
                assert_eq!(*theirs, *rows.iter().find(|row| row.0 == *theirs).map(|row| &row.1).unwrap());
                variables += &format!("{ours}\n");
            }
            "CALLOUT=/bin/kpng-example-allip" => {
                let shell = start("callout", &ours);
                traffic(42000);
                drop(shell);
                let _ = scenario.on_node("nft", &["delete", "table", "inet", "proxier_callout"]);
                scenario.wait_for_silence(externals()[0]);
            }
            "ip6tables" => {
                let shell = start("backend", &ours);
                traffic(43000);
                // As it is told by kpng's form, and none of netfilter.
                assert!(!scenario.on_node("nft", &["list", "ruleset"]).contains("dnat"));
                drop(shell);
            }
            _ => panic!("no test for {theirs}"),
        }
    }
    assert!(controller.is_some());
    let printed = start("variables", &format!("{variables}echo \"$xip $podip\"")).end();
    assert_eq!(printed, format!("{} {pod_v6}\n", externals()[1]));
}

/// A controller at the API server, in a process of its own.
fn start_controller(lab: &Lab, scenario: &Scenario, socket: &str, log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    lab.node
        .namespace
        .command(&scenario.spec.binary)
        .unwrap()
        .args(["kube", "--service-proxy-name", "proxier", "--kubeconfig"])
        .arg(scenario.path("kubeconfig"))
        .args(["to-api", "--listen", socket, "--health-address", "off", "--metrics-address", "off"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

#[test]
fn a_backend_delivers_what_the_controller_tells_and_goes_on_without_it() {
    skip_unless_root!();
    let (server, mut scenario) = prepare(&LabSpec::unique(), &[]);
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("unix://{}", directory.path().join("run/api.sock").display());
    let log = directory.path().join("controller.log");
    let mut controller = start_controller(&scenario.lab, &scenario, &socket, &log);
    scenario.spec.source = ["api", "--api", &socket].map(Into::into).to_vec();
    scenario.start_agent();
    for (port, protocol) in (42000..).zip(Protocol::ALL) {
        for external in externals() {
            let _ = scenario.ask(&scenario.question(protocol, port, external, 5060));
        }
    }

    // What changes while the controller is away is caught up with, and nothing is lost meanwhile.
    without_loss(&mut scenario, |scenario| {
        controller.kill().unwrap();
        controller.wait().unwrap();
        let [v4, _] = externals();
        apply(&server, &manifests::service("more", &[IpAddr::from([10, 0, 1, 1])]));
        apply_pods(&server, "more", &scenario.pod("alpine-2"));
        std::thread::sleep(Duration::from_secs(1));
        assert!(scenario.get("services").iter().all(|row| row["name"] != "more"));
        controller = start_controller(&scenario.lab, scenario, &socket, &log);
        scenario.wait_for_any_pod(IpAddr::from([10, 0, 1, 1]));
        scenario.wait_for_any_pod(v4);
    });

    // A pod that is not ready keeps who is on it and gets nobody new.
    let [v4, _] = externals();
    let client = scenario.lab.client.address(v4);
    let former = scenario.pod_of(client, v4).host;
    let question = scenario.question(Protocol::Udp, 45000, v4, 5060);
    let sighting = question.ask_who(&scenario.lab.client).unwrap().unwrap();
    assert_eq!(sighting.host, former);
    let all = manifests::slices(SERVICE, NODE_NAME, &scenario.all_pods());
    apply(&server, &not_ready(&all, &scenario.pod(&former)));
    let drains = || {
        let rows = scenario.get("endpoints");
        rows.iter().any(|row| row.to_string().contains("draining")).then_some(())
    };
    assert!(wait::until(SOON, drains).is_some(), "{:?}", scenario.get("endpoints"));
    let sighting = question.ask_who(&scenario.lab.client).unwrap().unwrap();
    assert_eq!(sighting.host, former, "the conversation goes on");

    // The last Service goes while the controller is away.
    controller.kill().unwrap();
    controller.wait().unwrap();
    for name in [SERVICE, "more"] {
        server.delete("Service", "lab", name).unwrap();
    }
    controller = start_controller(&scenario.lab, &scenario, &socket, &log);
    for external in externals() {
        scenario.wait_for_silence(external);
    }
    controller.kill().unwrap();
    controller.wait().unwrap();
}

/// The same slices, in which the endpoints of these addresses are not ready.
fn not_ready(slices: &str, addresses: &[IpAddr]) -> String {
    addresses.iter().fold(slices.to_owned(), |text, address| {
        let ready = |word| format!("[\"{address}\"]\n  conditions: {{ready: {word}}}");
        assert!(text.contains(&ready("true")), "{text}");
        text.replace(&ready("true"), &ready("false, serving: true"))
    })
}
