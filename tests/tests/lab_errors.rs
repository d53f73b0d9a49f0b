//! What a machine may lack: each time a message that names it and says what to do.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::process::{Output, Stdio};

use proxier_tests::{
    exchange::{PATIENCE, Protocol},
    scenario::{EDIT_TAKES_EFFECT_WITHIN, Scenario, externals},
    skip_unless_root,
    topology::LabSpec,
};

/// Runs the agent on the node as `program arguments... proxier ...`, to its end.
fn run_by(scenario: &Scenario, program: &[&str], pin_path: &str) -> Output {
    let mut command = scenario.lab.node.namespace.command(program[0]).unwrap();
    command
        .args(&program[1..])
        .arg(&scenario.spec.binary)
        .arg("file")
        .arg("--input")
        .arg(&scenario.spec.manifests);
    command.args(["--node-name", "node1", "to-bpf", "--uplink", "uplink0", "--pin-path", pin_path]);
    command.stdin(Stdio::null()).output().unwrap()
}

fn message(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

#[test]
fn an_uplink_that_is_missing_is_named_and_taken_when_it_comes() {
    skip_unless_root!();
    let mut scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    // The client's way in comes later: as yet the interface has another name.
    scenario
        .lab
        .node
        .namespace
        .ip("link set uplink0 down\nlink set uplink0 name other0\nlink set other0 up")
        .unwrap();
    let mut agent = scenario.spec.spawn(&scenario.lab).unwrap();
    agent.wait_for_log(EDIT_TAKES_EFFECT_WITHIN, |log| log.contains("uplink0")).unwrap();
    scenario
        .lab
        .node
        .namespace
        .ip("link set other0 down\nlink set other0 name uplink0\nlink set uplink0 up\n\
             route replace default via 192.168.1.100\n")
        .unwrap();
    let [v4, _] = externals();
    scenario.wait_for_any_pod(v4);
    agent.stop().unwrap();
    scenario.start_agent();
    let _ = scenario.ask(&scenario.question(Protocol::Udp, 42000, v4, 5060));
}

#[test]
fn without_root_the_missing_capabilities_are_named() {
    skip_unless_root!();
    let scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    // So that nothing but the capabilities is in the way.
    let readable =
        ["-R", "a+rX", &scenario.spec.manifests.parent().unwrap().display().to_string()].map(str::to_owned);
    let _ = scenario.on_node("chmod", &readable.iter().map(String::as_str).collect::<Vec<_>>());
    let copy = tempfile_outside_home(&scenario);
    let mut unprivileged = scenario.lab.node.namespace.command("setpriv").unwrap();
    let output = unprivileged
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(copy.path().join("proxier"))
        .arg("file")
        .arg("--input")
        .arg(&scenario.spec.manifests)
        .args(["--node-name", "node1", "to-bpf", "--uplink", "uplink0", "--pin-path"])
        .arg(scenario.lab.pin_path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = message(&output);
    for word in ["capabilities", "BPF", "NET_ADMIN", "root"] {
        assert!(message.contains(word), "{word} is missing in: {message}");
    }
}

/// The work tree may lie where only root can go; the program must be where anyone can run it.
fn tempfile_outside_home(scenario: &Scenario) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(&scenario.spec.binary, directory.path().join("proxier")).unwrap();
    directory
}

#[test]
fn a_pin_path_that_is_on_no_bpffs_is_refused() {
    skip_unless_root!();
    let scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("pins").display().to_string();
    let message = message(&run_by(&scenario, &["env"], &path));
    for word in [path.as_str(), "bpffs", "mount -t bpf"] {
        assert!(message.contains(word), "{word} is missing in: {message}");
    }
    assert!(!elsewhere.path().join("pins").exists(), "it was made before it was refused");
}

#[test]
fn a_directory_of_manifests_that_is_missing_is_named() {
    skip_unless_root!();
    let scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    std::fs::remove_dir_all(&scenario.spec.manifests).unwrap();
    let mut agent = scenario.spec.spawn(&scenario.lab).unwrap();
    let path = scenario.spec.manifests.display().to_string();
    agent.wait_for_log(PATIENCE, |log| log.contains(&path)).unwrap();
}

#[test]
fn arguments_that_make_no_sense_are_a_usage_error() {
    skip_unless_root!();
    let scenario = Scenario::prepare(&LabSpec::unique(), &[]);
    for arguments in [
        &["file"][..],
        &["get", "nonsense"],
        &["nonsense"],
        &["file", "--input", "/tmp", "to-bpf", "--attach", "no"],
    ] {
        let output = proxier_tests::agent::run(&scenario.lab, &scenario.spec.binary, arguments).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
