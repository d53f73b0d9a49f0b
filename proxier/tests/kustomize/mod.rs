//! As much of kustomize as `deploy/kustomize` uses, so that its manifests can be tested on a machine without kubectl: resources,
//! components, generated ConfigMaps (without the hash in their names), JSON patches, the namespace. It refuses whatever else
//! a kustomization says, and where there is a kubectl, both are compared (`deploy.rs`).

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    config_map_generator: Vec<Generator>,
    #[serde(default)]
    patches: Vec<Patch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Generator {
    name: String,
    behavior: Option<String>,
    #[serde(default)]
    envs: Vec<String>,
    #[serde(default)]
    literals: Vec<String>,
    options: Option<GeneratorOptions>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GeneratorOptions {
    labels: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    target: Target,
    patch: Option<String>,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
struct Operation {
    op: String,
    path: String,
    value: Value,
}

/// The objects that `kubectl kustomize DIRECTORY` prints.
pub(crate) fn render(directory: &Path) -> Vec<Value> {
    let mut objects = Vec::new();
    apply(directory, &mut objects);
    objects
}

/// The documents of a manifest.
pub(crate) fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

/// The variables of a file such as `docker --env-file` takes.
pub(crate) fn variables(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once('=').unwrap_or_else(|| panic!("{line:?} is no NAME=VALUE")))
}

fn apply(directory: &Path, objects: &mut Vec<Value>) {
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let kustomization: Kustomization = serde_saphyr::from_str(&read("kustomization.yaml"))
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let version = if kustomization.kind == "Component" { "v1alpha1" } else { "v1beta1" };
    assert_eq!(
        kustomization.api_version,
        format!("kustomize.config.k8s.io/{version}"),
        "{}",
        directory.display()
    );

    for resource in &kustomization.resources {
        if directory.join(resource).is_dir() {
            apply(&directory.join(resource), objects);
        } else {
            objects.extend(documents(&read(resource)));
        }
    }
    for component in &kustomization.components {
        apply(&directory.join(component), objects);
    }
    for generator in &kustomization.config_map_generator {
        let texts = generator.envs.iter().map(|file| read(file)).chain(generator.literals.iter().cloned());
        generate(generator, &texts.collect::<Vec<_>>(), objects);
    }
    for Patch { target, patch, path } in &kustomization.patches {
        let text = patch.clone().or_else(|| path.as_deref().map(read)).expect("a patch has a text or a path");
        let operations: Vec<Operation> =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{error}"));
        let object = find(objects, &target.kind, &target.name);
        operations.into_iter().for_each(|operation| operate(object, operation));
    }
    if let Some(namespace) = &kustomization.namespace {
        let is_namespaced = |object: &&mut Value| {
            !matches!(object["kind"].as_str(), Some("Namespace" | "ClusterRole" | "ClusterRoleBinding"))
        };
        for object in objects.iter_mut().filter(is_namespaced) {
            object["metadata"]["namespace"] = json!(namespace);
        }
    }
}

fn find<'a>(objects: &'a mut [Value], kind: &str, name: &str) -> &'a mut Value {
    let is_it = |object: &&mut Value| object["kind"] == kind && object["metadata"]["name"] == name;
    objects.iter_mut().find(is_it).unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn generate(generator: &Generator, texts: &[String], objects: &mut Vec<Value>) {
    match generator.behavior.as_deref() {
        None => {
            let mut metadata = json!({"name": generator.name});
            if let Some(options) = &generator.options {
                metadata["labels"] = options.labels.clone().into();
            }
            objects.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {}}));
        }
        Some("merge") => {}
        Some(behavior) => panic!("{behavior}: no such behavior here"),
    }
    let map = find(objects, "ConfigMap", &generator.name);
    for (name, value) in texts.iter().flat_map(|text| variables(text)) {
        map["data"][name] = json!(value);
    }
}

/// RFC 6902, without what no patch here says.
fn operate(object: &mut Value, Operation { op, path, value }: Operation) {
    let (parent, last) = path.rsplit_once('/').expect("a path has a slash");
    let last = last.replace("~1", "/").replace("~0", "~");
    let parent = object.pointer_mut(parent).unwrap_or_else(|| panic!("{path}: nothing is there"));
    match (op.as_str(), parent) {
        ("add", Value::Array(items)) if last == "-" => items.push(value),
        ("add", Value::Object(fields)) => {
            fields.insert(last, value);
        }
        ("replace", Value::Object(fields)) => {
            *fields.get_mut(&last).unwrap_or_else(|| panic!("{path}: nothing is there to be replaced")) =
                value;
        }
        (op, _) => panic!("{op} {path}: no such operation here"),
    }
}
