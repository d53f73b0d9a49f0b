use std::sync::{Arc, Mutex};

use globset::{Glob, GlobSet};

use super::*;
use crate::{
    catalog::Catalog,
    desired::{Scope, Settings, compute},
    model::{
        Endpoint, IpMode, LoadBalancerIngress, Object, Protocol, Service, ServicePort, ServiceType,
        SessionAffinity, TargetPort, TrafficPolicy,
        testing::{mk_endpoint, mk_name, mk_service, mk_slice},
    },
};

/// What kpng's kpng-json printed for the Service and pod below, asked for a node without pods.
const RECORDED: &str = r#"{"Service":{"Namespace":"default","Name":"kpng-example","Type":"ClusterIP","IPs":{"ClusterIPs":{},"ExternalIPs":{"V4":["10.0.0.55"],"V6":["1000::55"]},"Headless":true},"Ports":[{"Protocol":1,"Port":6000,"TargetPort":6000}],"SessionAffinity":null},"Endpoints":[{"IPs":{"V6":["1100::202"]},"PortOverrides":[{"Port":6000}],"Scopes":{"Internal":true,"External":true}}]}"#;

fn lines(objects: impl IntoIterator<Item = Object>, node: &str) -> Vec<String> {
    let mut catalog = Catalog::default();
    for object in objects {
        catalog.apply(object);
    }
    let node = NodeName::new(node);
    let settings = Settings::new(node.clone());
    let (desired, _) = compute(&catalog, &settings);
    let text = render(
        Snapshot { catalog: &catalog, desired: &desired, scope: &Scope::All, touched: &Scope::All },
        &node,
        &Carried::none(),
        false,
    )
    .unwrap();
    text.lines().map(str::to_owned).collect()
}

fn pod(name: &str, address: &str, node: &str) -> Endpoint {
    Endpoint { target: Some(mk_name(name)), ..mk_endpoint(address, node) }
}

fn kpng_example() -> Object {
    Service {
        headless: true,
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 6000,
            node_port: None,
            target_port: TargetPort::Number(6000),
        }],
        ..mk_service("kpng-example", ["10.0.0.55", "1000::55"])
    }
    .into()
}

#[test]
fn a_line_is_what_kpng_prints_plus_the_family_that_kpng_loses() {
    let printed = lines(
        [
            kpng_example(),
            mk_slice("kpng-example-4", "kpng-example", [pod("alpine-1", "11.0.2.2", "node1")]).into(),
            mk_slice("kpng-example-6", "kpng-example", [pod("alpine-1", "1100::202", "node1")]).into(),
        ],
        "elsewhere",
    );
    // The two differences, both meant: kpng's endpoints of the two families have one key, so that one is lost; and
    // kpng never says that a Service maps the whole address.
    let expected = RECORDED
        .replace(r#"{"V6":["1100::202"]}"#, r#"{"V4":["11.0.2.2"],"V6":["1100::202"]}"#)
        .replace(r#""Ports":[{"#, r#""MapIP":true,"Ports":[{"#);
    assert_eq!(printed, [expected]);
}

#[test]
fn local_says_whether_the_pod_is_on_the_node() {
    let objects = [
        kpng_example(),
        mk_slice(
            "kpng-example-4",
            "kpng-example",
            [pod("alpine-1", "11.0.2.2", "node1"), pod("alpine-3", "11.0.1.2", "node2")],
        )
        .into(),
    ];
    let local = |node| {
        let line: serde_json::Value = serde_json::from_str(&lines(objects.clone(), node)[0]).unwrap();
        let endpoints = line["Endpoints"].as_array().unwrap().clone();
        endpoints.iter().map(|endpoint| endpoint.get("Local").cloned()).collect::<Vec<_>>()
    };
    assert_eq!(local("node1"), [Some(true.into()), None]);
    assert_eq!(local("node2"), [None, Some(true.into())]);
}

#[test]
fn a_service_without_endpoints_has_null() {
    let printed = lines([kpng_example()], "node1");
    assert!(printed[0].ends_with(r#""SessionAffinity":null},"Endpoints":null}"#), "{}", printed[0]);
}

#[test]
fn every_field_that_kpng_knows_has_kpngs_name_place_and_form() {
    // As kpng said it in `Set default/media` and `Set default/media/alpine-2` of a recorded watch, in kpng-json's form.
    let media = Service {
        service_type: ServiceType::LoadBalancer,
        cluster_ips: vec!["10.96.56.103".parse().unwrap()],
        load_balancer_ingress: vec![LoadBalancerIngress {
            address: "10.0.0.77".parse().unwrap(),
            mode: IpMode::Vip,
        }],
        source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
        has_source_ranges: true,
        external_traffic_policy: TrafficPolicy::Local,
        session_affinity: SessionAffinity::ClientIp { timeout_seconds: 10_800 },
        health_check_node_port: Some(30122),
        ports: vec![
            ServicePort {
                name: "sip".to_owned(),
                protocol: Protocol::Udp,
                port: 5060,
                node_port: None,
                target_port: TargetPort::Number(15060),
            },
            ServicePort {
                name: "sctp".to_owned(),
                protocol: Protocol::Sctp,
                port: 36412,
                node_port: Some(31000),
                target_port: TargetPort::Name("s1ap".to_owned()),
            },
        ],
        ..mk_service("media", [])
    };
    let printed = lines(
        [media.into(), mk_slice("media-4", "media", [pod("alpine-2", "11.0.1.2", "node2")]).into()],
        "node1",
    );
    let expected = r#"{"Service":{"Namespace":"default","Name":"media","Type":"LoadBalancer","IPs":{"ClusterIPs":{"V4":["10.96.56.103"]},"ExternalIPs":{},"LoadBalancerIPs":{"V4":["10.0.0.77"]}},"IPFilters":[{"TargetIPs":{"V4":["10.0.0.77"]},"SourceRanges":["192.0.2.0/24"]}],"MapIP":true,"Ports":[{"Name":"sip","Protocol":2,"Port":5060,"TargetPort":15060},{"Name":"sctp","Protocol":3,"Port":36412,"NodePort":31000,"TargetPortName":"s1ap"}],"ExternalTrafficToLocal":true,"SessionAffinity":{"ClientIP":{"TimeoutSeconds":10800}},"HealthCheckNodePort":30122},"Endpoints":[{"IPs":{"V4":["11.0.1.2"]},"PortOverrides":[{"Port":6000}],"Scopes":{"Internal":true}}]}"#;
    assert_eq!(printed, [expected]);
}

#[test]
fn an_address_that_the_service_may_not_have_is_not_printed() {
    let printed = lines([mk_service("web", ["127.0.0.1", "10.0.0.55"]).into()], "node1");
    assert!(printed[0].contains(r#""ExternalIPs":{"V4":["10.0.0.55"]}"#), "{}", printed[0]);
}

#[test]
fn labels_and_annotations_are_passed_on_if_asked_for_and_those_for_proxier_always() {
    let service = Service {
        labels: [("app", "pbx"), ("tier", "voice")].into_iter().collect(),
        annotations: [
            ("proxier.io/balance", "flow"),
            ("example.com/a", "1"),
            ("example.com/b", "2"),
            ("x", "3"),
        ]
        .into_iter()
        .collect(),
        ..mk_service("web", ["10.0.0.55"])
    };
    let carried = |labels, annotations| Carried {
        labels: GlobSet::new([Glob::new(labels).unwrap()]).unwrap(),
        annotations: GlobSet::new([Glob::new(annotations).unwrap()]).unwrap(),
    };
    let printed = |carried: &Carried| {
        let mut catalog = Catalog::default();
        catalog.apply(service.clone().into());
        let node = NodeName::new("node1");
        let (desired, _) = compute(&catalog, &Settings::new(node.clone()));
        let (scope, touched) = (&Scope::All, &Scope::All);
        let snapshot = Snapshot { catalog: &catalog, desired: &desired, scope, touched };
        let line: serde_json::Value =
            serde_json::from_str(&render(snapshot, &node, carried, false).unwrap()).unwrap();
        (line["Service"]["Labels"].clone(), line["Service"]["Annotations"].clone())
    };
    let own = serde_json::json!({"proxier.io/balance": "flow"});
    assert_eq!(printed(&Carried::none()), (serde_json::Value::Null, own));
    let labels = serde_json::json!({"tier": "voice"});
    let annotations =
        serde_json::json!({"proxier.io/balance": "flow", "example.com/a": "1", "example.com/b": "2"});
    assert_eq!(printed(&carried("t*", "example.com/*")), (labels, annotations));
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_whole_set_is_printed_at_every_change_and_not_without_one() {
    let out = Shared::default();
    let mut sink = JsonSink::new(Box::new(out.clone()), NodeName::new("node1"), Carried::none(), false);
    let mut catalog = Catalog::default();
    let mut apply = |object: Option<Object>| {
        if let Some(object) = object {
            catalog.apply(object);
        }
        let (desired, _) = compute(&catalog, &Settings::new(NodeName::new("node1")));
        sink.apply(Snapshot {
            catalog: &catalog,
            desired: &desired,
            scope: &Scope::All,
            touched: &Scope::All,
        })
        .unwrap();
        String::from_utf8(out.0.lock().unwrap().clone()).unwrap().lines().count()
    };
    assert_eq!(apply(Some(mk_service("web", ["10.0.0.55"]).into())), 1);
    assert_eq!(apply(None), 1);
    assert_eq!(apply(Some(mk_service("mail", ["10.0.0.56"]).into())), 3);
}
