//! The container image, on a node of the lab: what is in it, and that it does a node's work with what `deploy/kustomize` gives it.
//! `cargo xtask image --test` makes the image and runs these.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use proxier_tests::{
    apiserver::ApiServer,
    connection::Connection,
    container::{self, Container, ContainerSpec, Privileges},
    exchange::{PATIENCE, Protocol},
    kube_scenario,
    neighbour::tcx_programs,
    scenario::{Scenario, externals},
    skip_unless_root,
    topology::{LabSpec, UPLINK},
    wait,
};

/// Where a pod finds its ServiceAccount.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The image, or the end of the test, loudly: a failure where nobody would miss it (CI=true).
macro_rules! image_or_skip {
    () => {{
        skip_unless_root!();
        match container::image() {
            Ok(image) => image,
            Err(reason) => {
                assert!(std::env::var("CI").as_deref() != Ok("true"), "not run, though CI=true: {reason:#}");
                eprintln!("SKIPPED: {}: {reason:#}", module_path!());
                return;
            }
        }
    }};
}

fn kustomize(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize").join(path)
}

/// A node whose API server is the double, in the place of the real one.
fn node() -> (ApiServer, Scenario) {
    kube_scenario::prepare(&LabSpec::unique(), &[])
}

/// The agent as the DaemonSet starts it, with the ServiceAccount that the kubelet gives a pod.
fn daemon_set(image: &str, server: &ApiServer, scenario: &Scenario) -> ContainerSpec {
    let account = scenario.path("serviceaccount");
    fs::create_dir_all(&account).unwrap();
    server.write_service_account(&account, "proxier").unwrap();
    let address = server.address();
    let environment = [
        ("KUBERNETES_SERVICE_HOST", address.ip().to_string()),
        ("KUBERNETES_SERVICE_PORT", address.port().to_string()),
    ];
    ContainerSpec {
        mounts: vec![(account, SERVICE_ACCOUNT.into())],
        variables: Some(kustomize("base/proxier.env").into()),
        environment: environment.map(|(name, value)| (name.to_owned(), value)).to_vec(),
        ..ContainerSpec::new(image)
    }
}

fn start(spec: &ContainerSpec, scenario: &Scenario, more: &[&str]) -> Container {
    let pins = scenario.lab.pin_path().display().to_string();
    let arguments = ["kube", "to-bpf", "--uplink", UPLINK, "--pin-path", &pins];
    let container = spec.start(&scenario.lab, &[&arguments[..], more].concat()).unwrap();
    container.wait_ready().unwrap();
    container
}

fn every_protocol_is_answered(scenario: &Scenario, from_port: u16) {
    for (from_port, protocol) in (from_port..).zip(Protocol::ALL) {
        for external in externals() {
            // Says so itself if anything about the answer is wrong.
            let _ = scenario.ask(&scenario.question(protocol, from_port, external, 5060));
        }
    }
}

/// What `components/capabilities` leaves the agent.
fn capabilities() -> Vec<String> {
    let text = fs::read_to_string(kustomize("components/capabilities/security-context.yaml")).unwrap();
    let patch: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    let added = patch[0]["value"]["capabilities"]["add"].as_array().unwrap();
    added.iter().map(|capability| capability.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_image_is_one_file_that_all_may_run_and_nobody_may_write() {
    let image = image_or_skip!();
    let known = container::inspect(&image).unwrap();
    assert_eq!(known["Config"]["Entrypoint"], serde_json::json!(["/proxier"]));
    assert_eq!(known["Config"]["User"], "0:0");
    let labels = &known["Config"]["Labels"];
    assert_eq!(labels["org.opencontainers.image.title"], "proxier");
    assert_eq!(labels["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(labels["org.opencontainers.image.licenses"], "MIT");

    let files = container::look_inside(&image, |root| {
        let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name(), entry.metadata().unwrap())).collect::<Vec<_>>()
    });
    let [(name, file)] = &files.unwrap()[..] else { panic!("there is more than the agent") };
    assert_eq!(name, "proxier");
    assert_eq!((file.uid(), file.gid(), file.mode()), (0, 0, 0o100_555));
}

#[test]
fn a_privileged_container_delivers_and_traffic_outlives_it() {
    let image = image_or_skip!();
    let (server, scenario) = node();
    let spec = daemon_set(&image, &server, &scenario);
    let container = start(&spec, &scenario, &[]);
    every_protocol_is_answered(&scenario, 41000);
    let mut connections = externals().map(|external| Connection::open(&scenario, external, 42000));

    container.kill().unwrap();
    drop(container);
    for connection in &mut connections {
        connection.goes_on("after its container was killed");
    }
    every_protocol_is_answered(&scenario, 43000);

    let container = start(&spec, &scenario, &[]);
    assert!(container.log().contains("the tables of a former agent are adopted"), "{}", container.log());
    for (external, connection) in externals().into_iter().zip(&mut connections) {
        connection.goes_on("after another container has started");
        let pod = scenario.pod_of(scenario.lab.client.address(external), external).host;
        assert_eq!(pod, connection.pod, "the session is adopted");
    }
    assert_eq!(container.stop().unwrap(), 0, "{}", container.log());
    for connection in &mut connections {
        connection.goes_on("after SIGTERM");
    }
}

fn the_capabilities_of_the_overlay_are_enough(attach: &str) {
    let image = image_or_skip!();
    let (server, scenario) = node();
    let privileges = Privileges::only(&capabilities());
    let spec = ContainerSpec { privileges, ..daemon_set(&image, &server, &scenario) };
    let container = start(&spec, &scenario, &["--attach", attach]);
    every_protocol_is_answered(&scenario, 41000);
    container.kill().unwrap();
    drop(container);
    // Adopting pins and replacing programs takes no more than making them.
    let container = start(&spec, &scenario, &["--attach", attach]);
    every_protocol_is_answered(&scenario, 43000);
    assert_eq!(container.stop().unwrap(), 0, "{}", container.log());
    drop(container);
    for kind in ["services", "endpoints", "sessions", "flows", "drops", "statistics"] {
        spec.run(&scenario.lab, &["get", kind, "--pin-path", &scenario.lab.pin_path().display().to_string()])
            .unwrap();
    }
}

#[test]
fn the_capabilities_of_the_overlay_are_enough_for_tcx() {
    the_capabilities_of_the_overlay_are_enough("tcx");
}

#[test]
fn the_capabilities_of_the_overlay_are_enough_for_clsact() {
    the_capabilities_of_the_overlay_are_enough("clsact");
}

#[test]
fn each_capability_of_the_overlay_is_needed() {
    let image = image_or_skip!();
    let (server, scenario) = node();
    for missing in capabilities() {
        let left: Vec<_> = capabilities().into_iter().filter(|capability| *capability != missing).collect();
        let spec =
            ContainerSpec { privileges: Privileges::only(&left), ..daemon_set(&image, &server, &scenario) };
        let pins = scenario.lab.pin_path().display().to_string();
        let error =
            spec.run(&scenario.lab, &["kube", "to-bpf", "--pin-path", &pins]).unwrap_err().to_string();
        assert!(error.contains(&format!("needs the capabilities {missing}, which")), "{error}");
    }
}

#[test]
fn the_cleanup_container_takes_everything_off_and_is_refused_beside_an_agent() {
    let image = image_or_skip!();
    let (server, scenario) = node();
    let agent = start(&daemon_set(&image, &server, &scenario), &scenario, &[]);
    let pins = scenario.lab.pin_path().display().to_string();
    let cleanup = ["cleanup", "--pin-path", &pins];
    let spec = ContainerSpec::new(&image);
    let refused = spec.run(&scenario.lab, &cleanup).unwrap_err().to_string();
    assert!(refused.contains("a proxier is at work on"), "{refused}");
    every_protocol_is_answered(&scenario, 41000);

    assert_eq!(agent.stop().unwrap(), 0, "{}", agent.log());
    spec.run(&scenario.lab, &cleanup).unwrap();
    assert!(!scenario.lab.pin_path().exists(), "{pins} is still there");
    // The kernel frees a link that nobody holds any more in its own time.
    let programs = || tcx_programs(&scenario.lab.node.namespace, UPLINK).unwrap();
    assert!(wait::until(PATIENCE, || (programs() == 0).then_some(())).is_some(), "{} programs", programs());
    // Said again, as a DaemonSet does whose pod is started anew.
    spec.run(&scenario.lab, &cleanup).unwrap();
}
