//! What kpng's server said of the objects in `tests/recordings/kpng/scenario.yaml` as they changed, held against what this one
//! says of the same.

use std::{collections::BTreeSet, fmt::Write as _, fs};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde_json::{Value, json};

use super::*;
use crate::{
    model::{IpMode, LoadBalancerIngress, Service},
    sink::json::ServiceJson,
    source::convert,
};

/// What is meant to differ from what kpng said.
mod meant {
    use super::localv1;

    /// Where the endpoints of a pod are: kpng's of one family overwrite those of the other.
    pub(super) const FAMILIES: [&str; 2] = [".v4", ".v6"];

    /// As we would say it.
    pub(super) fn service(mut recorded: localv1::Service) -> localv1::Service {
        // kpng has the field, and never sets it.
        recorded.map_ip = true;
        // kpng leaves it to its backends which addresses a filter is for, and these disagree.
        let ips = recorded.ips.clone().unwrap_or_default();
        for filter in &mut recorded.ip_filters {
            let mut targets = ips.external_ips.clone().unwrap_or_default();
            let load_balancers = ips.load_balancer_ips.clone().unwrap_or_default();
            targets.v4.extend(load_balancers.v4);
            targets.v6.extend(load_balancers.v6);
            filter.target_ips = Some(targets);
        }
        recorded
    }
}

fn recording(name: &str) -> String {
    fs::read_to_string(format!("{}/../tests/recordings/kpng/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The Services of the scenario, with what the API server has filled in.
fn services() -> BTreeMap<String, Service> {
    let mut services = BTreeMap::new();
    for document in recording("scenario.yaml").split("\n---\n") {
        let mut object: Value = serde_saphyr::from_str(document).unwrap();
        if object["kind"] != "Service" {
            continue;
        }
        if object["metadata"]["name"] == "media" {
            object["spec"]["clusterIP"] = json!("10.96.56.103");
            object["spec"]["clusterIPs"] = json!(["10.96.56.103"]);
            object["spec"]["healthCheckNodePort"] = json!(30122);
        }
        let service: core::Service = serde_json::from_value(object).unwrap();
        let service = convert::service(service).unwrap();
        assert_eq!(service.problems, []);
        services.insert(service.object.name.name.to_string(), service.object);
    }
    services
}

const ALPINE_1: [&str; 4] = ["alpine-1", "node1", "11.0.2.2", "1100::202"];
const ALPINE_2: [&str; 4] = ["alpine-2", "node2", "11.0.1.2", "1100::102"];

/// A slice as the EndpointSlice controller makes it of pods.
fn slice(service: &str, is_v6: bool, pods: &[[&str; 4]]) -> Object {
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|[name, node, v4, v6]| {
            json!({
                "addresses": [if is_v6 { v6 } else { v4 }],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": node,
                "targetRef": {"kind": "Pod", "namespace": "default", "name": name},
            })
        })
        .collect();
    let ports = match service {
        "media" => json!([
            {"name": "sip", "port": 15060, "protocol": "UDP"},
            {"name": "sctp", "port": 36412, "protocol": "SCTP"},
        ]),
        _ => json!([{"name": "", "port": 6000, "protocol": "TCP"}]),
    };
    let (family, suffix) = if is_v6 { ("IPv6", "v6") } else { ("IPv4", "v4") };
    let slice: discovery::EndpointSlice = serde_json::from_value(json!({
        "metadata": {
            "name": format!("{service}-{suffix}"),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }))
    .unwrap();
    let slice = convert::endpoint_slice(slice).unwrap();
    assert_eq!(slice.problems, []);
    slice.object.into()
}

/// The headless one is dual-stack, media has the cluster's first family.
fn slices(pods: &[[&str; 4]]) -> Vec<Object> {
    vec![slice("kpng-example", false, pods), slice("kpng-example", true, pods), slice("media", false, pods)]
}

fn kpng_example() -> [ObjectId; 3] {
    [service_id("kpng-example"), slice_id("kpng-example-v4"), slice_id("kpng-example-v6")]
}

/// What the scenario's steps are to the objects. The fifth is two.
fn steps() -> Vec<(&'static str, Vec<Object>, Vec<ObjectId>)> {
    let services = services();
    let example = || Object::from(services["kpng-example"].clone());
    let media = services["media"].clone();
    let mut balanced = media.clone();
    balanced.load_balancer_ingress =
        vec![LoadBalancerIngress { address: "10.0.0.77".parse().unwrap(), mode: IpMode::Vip }];
    let first = [vec![example()], slices(&[ALPINE_1])[..2].to_vec()].concat();
    let second = [vec![media.into()], slices(&[ALPINE_1, ALPINE_2])].concat();
    let again = [vec![example()], slices(&[ALPINE_1])[..2].to_vec()].concat();
    vec![
        ("1", first, vec![]),
        ("2", second, vec![]),
        ("3", vec![balanced.into()], vec![]),
        ("4", slices(&[ALPINE_1]), vec![]),
        ("5, the label goes", vec![], kpng_example().to_vec()),
        ("5, and comes back", again, vec![]),
        ("6", vec![], vec![service_id("media"), slice_id("media-v4")]),
    ]
}

/// What kpng said, as it came.
fn recorded() -> Vec<Op> {
    recording("watch-node1.jsonl")
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let wire = STANDARD.decode(line["wire"].as_str().unwrap()).unwrap();
            OpItem::decode(Bytes::from(wire)).unwrap().op.unwrap()
        })
        .collect()
}

/// What this server says, a batch for each step.
async fn served() -> Vec<(&'static str, Vec<Op>)> {
    let mut world = World::new();
    let mut watch = world.watch("node1").await;
    let mut batches = Vec::new();
    for (step, put, deleted) in steps() {
        for object in put {
            world.state.apply(object);
        }
        world.delete(deleted);
        watch.ask().await;
        let mut ops = Vec::new();
        while ops.last() != Some(&Op::Sync(localv1::EmptyOp {})) {
            let op = watch.step().await.unwrap().unwrap();
            match op.clone() {
                Op::Set(value) => drop(watch.set(value)),
                Op::Delete(place) => drop(watch.delete(&place)),
                Op::Reset(_) | Op::Sync(_) => {}
            }
            ops.push(op);
        }
        batches.push((step, ops));
    }
    batches
}

/// Every value of a set that was told, with its path.
fn values<'a, M: prost::Message + Default>(
    ops: impl IntoIterator<Item = &'a Op>,
    set: Set,
) -> Vec<(String, M)> {
    let told = ops.into_iter().filter_map(|op| match op {
        Op::Set(value) => Some(value),
        _ => None,
    });
    told.filter(|value| value.r#ref.as_ref().unwrap().set() == set)
        .map(|value| (value.r#ref.clone().unwrap().path, M::decode(value.bytes.clone()).unwrap()))
        .collect()
}

fn deleted<'a>(ops: impl IntoIterator<Item = &'a Op>) -> Vec<localv1::Ref> {
    let gone = ops.into_iter().filter_map(|op| match op {
        Op::Delete(place) => Some(place.clone()),
        _ => None,
    });
    gone.collect()
}

/// The path of kpng's endpoint of the same pod.
fn of_pod(path: &str) -> &str {
    meant::FAMILIES.iter().find_map(|family| path.strip_suffix(family)).unwrap_or(path)
}

#[tokio::test]
async fn services_are_told_as_kpng_told_them() {
    let recorded = values(&recorded(), Set::ServicesSet);
    let recorded: Vec<_> =
        recorded.into_iter().map(|(path, service)| (path, meant::service(service))).collect();
    let served = served().await;
    let served = values(served.iter().flat_map(|(_, ops)| ops), Set::ServicesSet);
    assert_eq!(served, recorded);
    assert_eq!(served.len(), 4);
}

#[tokio::test]
async fn endpoints_are_told_as_kpng_told_them_and_both_families() {
    let served = served().await;
    let served: Vec<(String, localv1::Endpoint)> =
        values(served.iter().flat_map(|(_, ops)| ops), Set::EndpointsSet);
    let recorded: Vec<(String, localv1::Endpoint)> = values(&recorded(), Set::EndpointsSet);
    assert!(recorded.len() > 20, "kpng tells everything again and again");
    for (path, endpoint) in &recorded {
        let ips = endpoint.ips.as_ref().unwrap();
        let family = meant::FAMILIES[usize::from(ips.v4.is_empty())];
        let ours = (format!("{path}{family}"), endpoint.clone());
        assert!(served.contains(&ours), "nobody says {ours:?}");
    }
    // What kpng loses is what it had of the other family.
    for (path, endpoint) in &served {
        let ours = |endpoint: &localv1::Endpoint| localv1::Endpoint { ips: None, ..endpoint.clone() };
        let theirs = recorded.iter().find(|(recorded, _)| recorded == of_pod(path));
        assert_eq!(theirs.map(|(_, theirs)| ours(theirs)), Some(ours(endpoint)), "{path}");
    }
    let paths: BTreeSet<&str> = served.iter().map(|(path, _)| &**path).collect();
    let expected = [
        "default/kpng-example/alpine-1.v4",
        "default/kpng-example/alpine-1.v6",
        "default/kpng-example/alpine-2.v4",
        "default/kpng-example/alpine-2.v6",
        "default/media/alpine-1.v4",
        "default/media/alpine-2.v4",
    ];
    assert_eq!(paths, BTreeSet::from(expected));
    // Each once, and those of the Service that goes and comes back once more: `Watch` sees to what has not changed.
    assert_eq!(served.len(), expected.len() + 2);
}

#[tokio::test]
async fn what_goes_goes_as_kpng_had_it_go() {
    let recorded: Vec<_> = deleted(&recorded()).into_iter().map(|place| (place.set, place.path)).collect();
    let mut ours = Vec::new();
    for (step, ops) in served().await {
        let gone = deleted(&ops);
        let is_last = |place: &localv1::Ref| place.set() == Set::ServicesSet;
        assert!(gone.is_sorted_by_key(is_last), "{step}: Services go last");
        let mut pods: Vec<_> =
            gone.into_iter().map(|place| (place.set, of_pod(&place.path).to_owned())).collect();
        pods.dedup();
        ours.push(pods);
    }
    let [none @ .., fourth, fifth, back, sixth] = &ours[..] else { panic!("{ours:?}") };
    assert!(none.iter().chain([back]).all(Vec::is_empty), "{ours:?}");
    // kpng's controller saw one slice after the other.
    assert_eq!(BTreeSet::from_iter(fourth), BTreeSet::from_iter(&recorded[..2]));
    assert_eq!([&fifth[..], sixth].concat(), recorded[2..]);
}

#[tokio::test]
async fn the_conversation_stays_as_it_is() {
    let mut text = String::new();
    for (step, ops) in served().await {
        writeln!(text, "# {step}").unwrap();
        for op in ops {
            let line = match op {
                Op::Reset(_) => json!({"op": "Reset"}),
                Op::Sync(_) => json!({"op": "Sync"}),
                Op::Delete(place) => {
                    json!({"op": "Delete", "path": place.path, "set": place.set().as_str_name()})
                }
                Op::Set(value) => {
                    let place = value.r#ref.unwrap();
                    let bytes = value.bytes;
                    let value = match place.set() {
                        Set::ServicesSet => {
                            let service = localv1::Service::decode(bytes).unwrap();
                            serde_json::to_value(ServiceJson::from(&service)).unwrap()
                        }
                        _ => serde_json::to_value(localv1::Endpoint::decode(bytes).unwrap()).unwrap(),
                    };
                    let set = place.set().as_str_name();
                    json!({"op": "Set", "path": place.path, "set": set, "value": value})
                }
            };
            writeln!(text, "{line}").unwrap();
        }
    }
    insta::assert_snapshot!("what_node1_is_told", text);
}
