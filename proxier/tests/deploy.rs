//! What `deploy/kustomize` installs: that every field is one that Kubernetes knows, every variable one that the agent knows, and
//! that what has to agree does. The agent's life in such a pod is `tests/tests/image.rs`.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod kustomize;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Container, Namespace, Probe, ResourceQuota, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use kustomize::{documents, render, variables};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// The variables with the addresses at which the agent is asked.
const HEALTH_ADDRESS: &str = "PROXIER_HEALTH_ADDRESS";
const METRICS_ADDRESS: &str = "PROXIER_METRICS_ADDRESS";
/// What the agent's command line says of itself; variables of any of these may be in the ConfigMap.
const COMMANDS: [&[&str]; 2] = [&["kube"], &["kube", "to-bpf"]];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn directories_in(name: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(deploy().join("kustomize").join(name)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Everything that somebody may apply, by its path below `deploy/kustomize`.
fn all() -> Vec<String> {
    let overlays = directories_in("overlays").into_iter().map(|name| format!("overlays/{name}"));
    ["base".to_owned(), "cleanup".to_owned()].into_iter().chain(overlays).collect()
}

/// What installs an agent.
fn installations() -> Vec<String> {
    all().into_iter().filter(|path| path != "cleanup").collect()
}

fn rendered(path: &str) -> Vec<Value> {
    render(&deploy().join("kustomize").join(path))
}

fn of_kind<T: DeserializeOwned>(path: &str, kind: &str) -> T {
    let objects = rendered(path);
    let mut found = objects.into_iter().filter(|object| object["kind"] == kind);
    let object = found.next().unwrap_or_else(|| panic!("{path}: no {kind}"));
    assert!(found.next().is_none(), "{path}: more than one {kind}");
    serde_json::from_value(object).unwrap()
}

fn agent_of(path: &str) -> (DaemonSet, Container) {
    let set: DaemonSet = of_kind(path, "DaemonSet");
    let containers = &set.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers;
    let container = containers[0].clone();
    (set, container)
}

fn variables_of(path: &str) -> BTreeMap<String, String> {
    of_kind::<ConfigMap>(path, "ConfigMap").data.unwrap()
}

/// What a type of Kubernetes makes of an object: a field that it does not know is lost.
fn as_kubernetes_reads<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    serde_json::to_value(typed).unwrap()
}

#[test]
fn every_field_is_one_that_kubernetes_knows() {
    for path in all() {
        for object in rendered(&path) {
            let read = match object["kind"].as_str().unwrap() {
                "ClusterRole" => as_kubernetes_reads::<ClusterRole>(&object),
                "ClusterRoleBinding" => as_kubernetes_reads::<ClusterRoleBinding>(&object),
                "ConfigMap" => as_kubernetes_reads::<ConfigMap>(&object),
                "DaemonSet" => as_kubernetes_reads::<DaemonSet>(&object),
                "Namespace" => as_kubernetes_reads::<Namespace>(&object),
                "ResourceQuota" => as_kubernetes_reads::<ResourceQuota>(&object),
                "ServiceAccount" => as_kubernetes_reads::<ServiceAccount>(&object),
                // Of the Prometheus Operator.
                "PodMonitor" => object.clone(),
                kind => panic!("{path}: is {kind} meant to be here?"),
            };
            assert_eq!(read, object, "{path}");
        }
    }
}

#[test]
fn every_field_of_the_admission_policy_is_one_that_kubernetes_knows_and_its_binding_binds_it() {
    let text = fs::read_to_string(deploy().join("admission-policy.yaml")).unwrap();
    let [policy, binding] = &documents(&text)[..] else { panic!("a policy and its binding") };
    assert_eq!(&as_kubernetes_reads::<ValidatingAdmissionPolicy>(policy), policy);
    assert_eq!(&as_kubernetes_reads::<ValidatingAdmissionPolicyBinding>(binding), binding);
    assert_eq!(
        (&policy["kind"], &binding["kind"]),
        (&json!("ValidatingAdmissionPolicy"), &json!("ValidatingAdmissionPolicyBinding"))
    );
    assert_eq!(binding["spec"]["policyName"], policy["metadata"]["name"]);
    // Whom it is about are those whom the agent serves as it is installed.
    let variables = policy["spec"]["variables"].as_array().unwrap();
    let proxy_name = variables.iter().find(|variable| variable["name"] == "proxyName").unwrap();
    let served = &variables_of("base")["PROXIER_SERVICE_PROXY_NAME"];
    assert_eq!(proxy_name["expression"], json!(format!("'{served}'")));
}

#[test]
fn the_agent_may_list_and_watch_three_kinds_and_write_events_and_nothing_else() {
    let events_and_three_kinds = json!([
        {"apiGroups": [""], "resources": ["services", "nodes"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
    ]);
    for path in installations() {
        let role: ClusterRole = of_kind(&path, "ClusterRole");
        assert_eq!(json!(role.rules), events_and_three_kinds, "{path}");
        assert!(role.aggregation_rule.is_none());

        let binding: ClusterRoleBinding = of_kind(&path, "ClusterRoleBinding");
        assert_eq!(
            (&binding.role_ref.kind[..], Some(&binding.role_ref.name)),
            ("ClusterRole", role.metadata.name.as_ref())
        );
        let account: ServiceAccount = of_kind(&path, "ServiceAccount");
        let [subject] = &binding.subjects.unwrap()[..] else { panic!("{path}: one subject, the agent") };
        assert_eq!((&subject.kind[..], &subject.namespace), ("ServiceAccount", &account.metadata.namespace));
        assert_eq!(Some(&subject.name), account.metadata.name.as_ref());

        let (set, _) = agent_of(&path);
        let pod = set.spec.unwrap().template.spec.unwrap();
        assert_eq!(
            (pod.service_account_name, pod.automount_service_account_token),
            (account.metadata.name, Some(true))
        );
        assert_eq!(of_kind::<Namespace>(&path, "Namespace").metadata.name, account.metadata.namespace);
    }
    assert!(
        rendered("cleanup").iter().all(|object| object["kind"] == "DaemonSet"),
        "cleanup asks the API for nothing"
    );
}

fn proxier(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxier"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

/// The variables that the agent reads, as its help names them: `[env: PROXIER_PIN_PATH=]`.
fn known_variables() -> BTreeSet<String> {
    let mut known = BTreeSet::new();
    for command in COMMANDS {
        let output = proxier(&[command, &["--help"]].concat()).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        let help = String::from_utf8(output.stdout).unwrap();
        let names = help.split("[env:").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
        known.extend(names.map(|name| name.trim().to_owned()));
    }
    assert!(known.contains("PROXIER_PIN_PATH") && known.contains("NODE_NAME"), "{known:?}");
    known
}

#[test]
fn every_variable_is_one_that_the_agent_reads() {
    let known = known_variables();
    for path in installations() {
        let (_, container) = agent_of(&path);
        let own = container.env.unwrap().into_iter().map(|variable| variable.name);
        let unknown: Vec<_> =
            variables_of(&path).into_keys().chain(own).filter(|name| !known.contains(name)).collect();
        assert_eq!(unknown, [""; 0], "{path}");
    }
}

#[test]
fn every_variable_that_the_agent_reads_is_in_its_file_if_only_as_a_comment() {
    let text = fs::read_to_string(deploy().join("kustomize/base/proxier.env")).unwrap();
    let is_assignment =
        |line: &&str| line.split('=').next().is_some_and(|name| !name.contains(' ')) && line.contains('=');
    let lines: Vec<_> = text.lines().map(|line| line.trim_start_matches('#')).filter(is_assignment).collect();
    let mentioned: BTreeSet<_> = variables(&lines.join("\n")).map(|(name, _)| name.to_owned()).collect();
    let of_the_pod = BTreeSet::from(["NODE_NAME".to_owned()]);
    assert_eq!(mentioned, &known_variables() - &of_the_pod);
}

#[test]
fn the_agent_understands_what_it_is_started_with() {
    for path in installations() {
        let (_, container) = agent_of(&path);
        let arguments = container.args.unwrap();
        // Where there is no kubeconfig it can do nothing yet; that it does not refuse to try is what is looked at.
        let mut agent = proxier(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
            .envs(variables_of(&path))
            .envs([("NODE_NAME", "node1"), ("PROXIER_KUBECONFIG", "/nowhere/kubeconfig")])
            // Nothing may be made on the bpffs of the machine that runs this.
            .env("PROXIER_PIN_PATH", "/nowhere")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let patience = Instant::now() + Duration::from_secs(5);
        let ended = loop {
            match agent.try_wait().unwrap() {
                None if Instant::now() < patience => std::thread::sleep(Duration::from_millis(10)),
                ended => break ended,
            }
        };
        if ended.is_none() {
            agent.kill().unwrap();
        }
        let output = agent.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(ended.is_none_or(|status| status.code() == Some(1)), "{path}: {ended:?}: {said}");
    }
}

fn port_of(address: &str) -> i32 {
    let address: std::net::SocketAddr = address.parse().unwrap();
    address.port().into()
}

#[test]
fn the_probes_ask_where_the_agent_answers() {
    for path in installations() {
        let (_, container) = agent_of(&path);
        let address: std::net::SocketAddr = variables_of(&path)[HEALTH_ADDRESS].parse().unwrap();
        let ports = container.ports.unwrap();
        let port = ports.iter().find(|port| port.name.as_deref() == Some("health")).unwrap();
        assert_eq!(
            (port.container_port, port.host_port),
            (address.port().into(), Some(address.port().into()))
        );
        let probes = [
            ("/livez", container.startup_probe),
            ("/livez", container.liveness_probe.clone()),
            ("/readyz", container.readiness_probe),
        ];
        for (asked, probe) in probes {
            let get = probe.unwrap().http_get.unwrap();
            assert_eq!(get.path.as_deref(), Some(asked), "{path}");
            assert_eq!(get.host, Some(address.ip().to_string()), "{path}");
            assert_eq!(json!(get.port), json!("health"), "{path}");
        }
        let Probe { period_seconds, failure_threshold, .. } = container.liveness_probe.unwrap();
        assert!(
            period_seconds.unwrap() * failure_threshold.unwrap() >= 60,
            "a busy node is not one whose agent hangs"
        );
    }
}

#[test]
fn metrics_are_scraped_where_they_are_served_and_from_outside_only_if_chosen() {
    for path in installations() {
        let (set, container) = agent_of(&path);
        let address: std::net::SocketAddr = variables_of(&path)[METRICS_ADDRESS].parse().unwrap();
        let chosen = ["overlays/metrics", "overlays/pod-monitor"].contains(&path.as_str());
        assert_eq!(address.ip().is_loopback(), !chosen, "{path}");
        let ports = container.ports.unwrap();
        let named = ports.iter().find(|port| port.name.as_deref() == Some("metrics"));
        let annotations = set.spec.unwrap().template.metadata.unwrap().annotations.unwrap();
        let annotated = annotations.get("prometheus.io/port").map(|port| port.parse().unwrap());
        let expected = chosen.then_some(i32::from(address.port()));
        assert_eq!((named.map(|port| port.container_port), annotated), (expected, expected), "{path}");
    }
    let monitor: Value = of_kind("overlays/pod-monitor", "PodMonitor");
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["port"], "metrics");
    let (set, _) = agent_of("overlays/pod-monitor");
    let name = set.metadata.name.unwrap();
    let namespace = set.metadata.namespace.unwrap();
    let spec = set.spec.unwrap();
    assert_eq!(monitor["spec"]["selector"], json!(spec.selector));
    // The documented alert finds the job that this makes, and the DaemonSet.
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    let job = &labels[monitor["spec"]["jobLabel"].as_str().unwrap()];
    let alerts = fs::read_to_string(deploy().join("../docs/OBSERVING.md")).unwrap();
    let absent = format!(
        "up{{job=\"{job}\"}} == 0 or \
         kube_daemonset_status_number_unavailable{{namespace=\"{namespace}\",daemonset=\"{name}\"}} > 0\n"
    );
    assert!(alerts.contains(&absent), "{absent}");
    assert_eq!(
        port_of(&variables_of("base")[METRICS_ADDRESS]),
        port_of(&variables_of("overlays/metrics")[METRICS_ADDRESS])
    );
}

#[test]
fn daemon_sets_have_their_own_pods_and_no_others() {
    let labels_and_selector = |path: &str| {
        let spec = of_kind::<DaemonSet>(path, "DaemonSet").spec.unwrap();
        (spec.template.metadata.unwrap().labels.unwrap(), spec.selector.match_labels.unwrap())
    };
    let selects = |selector: &BTreeMap<_, _>, labels: &BTreeMap<String, String>| {
        selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    };
    let (cleanup_labels, cleanup_selector) = labels_and_selector("cleanup");
    assert!(selects(&cleanup_selector, &cleanup_labels));
    for path in installations() {
        let (labels, selector) = labels_and_selector(&path);
        assert!(selects(&selector, &labels), "{path}");
        assert!(!selects(&selector, &cleanup_labels) && !selects(&cleanup_selector, &labels), "{path}");
    }
}

#[test]
fn every_pod_is_on_the_node_s_network_and_bpffs_and_runs_this_version() {
    for path in all() {
        let spec = of_kind::<DaemonSet>(&path, "DaemonSet").spec.unwrap();
        let strategy = spec.update_strategy.unwrap().rolling_update.unwrap();
        assert_eq!(json!(strategy.max_surge), json!(0), "{path}: one agent at a time works on a node's pins");
        let pod = spec.template.spec.unwrap();
        assert_eq!(pod.host_network, Some(true), "{path}");
        assert_eq!(pod.enable_service_links, Some(false), "{path}: they make variables that look like flags");
        assert_eq!(json!(pod.tolerations), json!([{"operator": "Exists"}]), "{path}");
        let volumes = pod.volumes.unwrap();
        let bpffs = volumes.iter().find(|volume| volume.name == "bpffs").unwrap().host_path.as_ref().unwrap();
        let containers: Vec<_> =
            pod.init_containers.unwrap_or_default().into_iter().chain(pod.containers).collect();
        let mounts: Vec<_> =
            containers[0].volume_mounts.iter().flatten().filter(|mount| mount.name == "bpffs").collect();
        assert_eq!(mounts.iter().map(|mount| &mount.mount_path).collect::<Vec<_>>(), [&bpffs.path], "{path}");
        for container in containers {
            let image = format!("localhost/proxier:{}", env!("CARGO_PKG_VERSION"));
            assert_eq!(container.image, Some(image), "{path}: what `cargo xtask image` makes");
            assert!(container.command.is_none(), "{path}: the image has an entry point and no shell");
            assert_eq!(container.security_context.unwrap().read_only_root_filesystem, Some(true), "{path}");
            let limits = container.resources.unwrap().limits.unwrap();
            assert!(limits.contains_key("memory") && !limits.contains_key("cpu"), "{path}");
        }
    }
}

#[test]
fn only_the_overlay_for_it_does_without_privileges() {
    for path in installations() {
        let (_, container) = agent_of(&path);
        let context = container.security_context.unwrap();
        let capabilities = context.capabilities.map(|it| (it.add.unwrap(), it.drop.unwrap()));
        if path == "overlays/capabilities" {
            let (mut added, dropped) = capabilities.unwrap();
            added.sort();
            assert_eq!(
                (&added[..], &dropped[..]),
                (&["BPF", "NET_ADMIN", "PERFMON"].map(str::to_owned)[..], &["ALL".to_owned()][..])
            );
            assert_eq!((context.privileged, context.allow_privilege_escalation), (Some(false), Some(false)));
        } else {
            assert_eq!((context.privileged, capabilities), (Some(true), None), "{path}");
        }
        assert_eq!(context.run_as_user, Some(0), "{path}: the bpffs is root's");
    }
}

#[test]
fn each_choice_is_a_component_an_overlay_and_a_line_of_the_readme() {
    assert_eq!(directories_in("components"), directories_in("overlays"));
    let readme = fs::read_to_string(deploy().join("README.md")).unwrap();
    for name in directories_in("components") {
        assert!(readme.contains(&format!("`{name}`")), "{name} is not in deploy/README.md");
        assert_ne!(rendered(&format!("overlays/{name}")), rendered("base"), "{name} changes nothing");
    }
}

/// Whether kubectl is there, and new enough for components (1.21).
fn has_kubectl() -> bool {
    let Ok(output) = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output() else {
        return false;
    };
    let version: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let minor =
        version["clientVersion"]["minor"].as_str().map(|minor| minor.trim_end_matches('+').parse::<u32>());
    matches!(minor, Some(Ok(minor)) if minor >= 21)
}

#[test]
fn kubectl_makes_the_same_of_it() {
    // No failure under CI=true: Debian has no kubectl that is new enough, so nobody could mend that. The other tests look at the
    // same objects.
    if !has_kubectl() {
        eprintln!("SKIPPED: {}: there is no kubectl, or one from before 1.21", module_path!());
        return;
    }
    for path in all() {
        let output = Command::new("kubectl")
            .arg("kustomize")
            .arg(deploy().join("kustomize").join(&path))
            .output()
            .unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        let mut text = String::from_utf8(output.stdout).unwrap();
        let named = documents(&text).into_iter().find(|object| object["kind"] == "ConfigMap");
        if let Some(name) = named.as_ref().and_then(|object| object["metadata"]["name"].as_str()) {
            assert!(name.len() > "proxier-".len(), "{path}: {name} has no hash: an edit would not roll out");
            // In the DaemonSet as well, or the comparison fails.
            text = text.replace(name, "proxier");
        }
        let sorted = |mut objects: Vec<Value>| {
            objects
                .sort_by_key(|object| [&object["kind"], &object["metadata"]["name"]].map(Value::to_string));
            objects
        };
        assert_eq!(sorted(documents(&text)), sorted(rendered(&path)), "{path}");
    }
}
