use std::net::IpAddr;

use proptest::{collection::vec, option, prelude::*, sample::select};
use prost::Message as _;
use proxier_localv1::{
    self as localv1, ClientIpAffinity, EmptyOp, IpFilter, IpSet, PortMapping, PortName, ServiceIPs,
};

use super::{
    reference::{Judge, sync},
    *,
};
use crate::model::{
    IpMode, LoadBalancerIngress, Protocol, ServicePort, ServiceType, SessionAffinity, TargetPort,
    TrafficPolicy, testing::mk_name,
};

fn op(op: Op) -> OpItem {
    OpItem { op: Some(op) }
}

fn reset() -> OpItem {
    op(Op::Reset(EmptyOp {}))
}

fn reference(set: i32, path: &str) -> Ref {
    Ref { set, path: path.to_owned() }
}

fn set_bytes(set: Set, path: &str, bytes: Vec<u8>) -> OpItem {
    op(Op::Set(Value { r#ref: Some(reference(set as i32, path)), bytes: bytes.into() }))
}

fn set_service(path: &str, service: &localv1::Service) -> OpItem {
    set_bytes(Set::ServicesSet, path, service.encode_to_vec())
}

fn set_endpoint(path: &str, endpoint: &localv1::Endpoint) -> OpItem {
    set_bytes(Set::EndpointsSet, path, endpoint.encode_to_vec())
}

fn delete(set: Set, path: &str) -> OpItem {
    op(Op::Delete(reference(set as i32, path)))
}

fn ips(addresses: &[&str]) -> IpSet {
    let of_family = |v6| addresses.iter().filter(move |ip| ip.contains(':') == v6).map(|ip| (*ip).to_owned());
    IpSet { v4: of_family(false).collect(), v6: of_family(true).collect() }
}

/// With these external addresses.
fn service_with(externals: &[&str]) -> localv1::Service {
    localv1::Service {
        ips: Some(ServiceIPs { external_ips: Some(ips(externals)), ..ServiceIPs::default() }),
        ..localv1::Service::default()
    }
}

/// A local one, with these addresses and the port 6000.
fn endpoint_with(addresses: &[&str]) -> localv1::Endpoint {
    localv1::Endpoint {
        ips: Some(ips(addresses)),
        local: true,
        port_overrides: vec![PortName { name: String::new(), port: 6000 }],
        ..localv1::Endpoint::default()
    }
}

fn judge() -> Judge {
    Judge::new(Limits::default())
}

/// Tells a batch of these items. Returns what has changed.
#[track_caller]
fn tell(judge: &mut Judge, items: impl IntoIterator<Item = OpItem>) -> Changes {
    for item in items {
        assert_eq!(judge.take(item), None);
    }
    judge.take(sync()).unwrap()
}

/// What has changed, in words: a minus stands before what has gone.
fn names(changes: &Changes) -> Vec<String> {
    let name = |(id, object): (&ObjectId, &Option<Object>)| {
        if object.is_some() { id.to_string() } else { format!("-{id}") }
    };
    changes.objects.iter().map(name).collect()
}

fn texts(changes: &Changes) -> Vec<String> {
    changes.problems.iter().flatten().map(ToString::to_string).collect()
}

fn imported(value: &localv1::Service) -> (Service, Vec<String>) {
    let changes = tell(&mut judge(), [set_service("default/web", value)]);
    let object = changes.objects[&ObjectId::Service(mk_name("web"))].clone().unwrap();
    (object.as_service().unwrap().clone(), texts(&changes))
}

#[test]
fn nothing_counts_before_sync_and_what_does_not_come_again_after_reset_has_gone() {
    let mut judge = judge();
    let web = || set_service("default/web", &service_with(&["203.0.113.1"]));
    let mail = || set_service("default/mail", &service_with(&["203.0.113.2"]));
    let pod = || set_endpoint("default/web/alpine-1.v4", &endpoint_with(&["11.0.2.2"]));
    let changes = tell(&mut judge, [reset(), web(), mail(), pod()]);
    assert_eq!(
        names(&changes),
        ["Service default/mail", "Service default/web", "EndpointSlice default/web/IPv4/6000"]
    );
    assert!(changes.whole);
    assert_eq!(changes.problems, Some(vec![]));
    let changes = tell(&mut judge, [web(), pod(), delete(Set::ServicesSet, "default/nobody")]);
    assert_eq!(changes, Changes::default(), "nothing differs");
    // A stream breaks before Sync; the next does not say Reset, and has it all the same.
    assert_eq!(judge.take(set_service("default/web", &service_with(&["203.0.113.3"]))), None);
    judge.restart();
    let changes = tell(&mut judge, [mail(), pod()]);
    assert_eq!(names(&changes), ["-Service default/web"]);
    let changes = tell(&mut judge, [web(), reset()]);
    assert_eq!(names(&changes), ["-Service default/mail", "-EndpointSlice default/web/IPv4/6000"]);
}

#[test]
fn of_what_a_batch_says_of_a_value_the_last_counts() {
    let mut judge = judge();
    let path = "default/web";
    let one = || set_service(path, &service_with(&["203.0.113.1"]));
    let other = || set_service(path, &service_with(&["203.0.113.2"]));
    tell(&mut judge, [one()]);
    assert_eq!(names(&tell(&mut judge, [other(), delete(Set::ServicesSet, path), one()])), [""; 0]);
    let changes = tell(&mut judge, [other(), delete(Set::ServicesSet, path)]);
    assert_eq!(names(&changes), ["-Service default/web"]);
}

#[test]
fn every_field_of_a_service_is_taken_over() {
    let value = localv1::Service {
        namespace: "default".to_owned(),
        name: "web".to_owned(),
        r#type: "LoadBalancer".to_owned(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        annotations: [("proxier.io/balance".to_owned(), "flow".to_owned())].into(),
        ips: Some(ServiceIPs {
            cluster_ips: Some(ips(&["10.96.0.9"])),
            external_ips: Some(ips(&["203.0.113.1", "2001:db8::1"])),
            load_balancer_ips: Some(ips(&["203.0.113.7"])),
            headless: true,
        }),
        ip_filters: vec![IpFilter { target_ips: None, source_ranges: vec!["192.0.2.7/24".to_owned()] }],
        map_ip: true,
        ports: vec![
            PortMapping {
                name: "sip".to_owned(),
                protocol: 2,
                port: 5060,
                node_port: 31000,
                target_port: 15060,
                ..PortMapping::default()
            },
            PortMapping {
                protocol: 3,
                port: 36412,
                target_port_name: "s1ap".to_owned(),
                ..PortMapping::default()
            },
        ],
        external_traffic_to_local: true,
        internal_traffic_to_local: true,
        health_check_node_port: 30122,
        session_affinity: Some(localv1::service::SessionAffinity::ClientIp(ClientIpAffinity {
            timeout_seconds: 60,
        })),
    };
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let (service, problems) = imported(&value);
    assert_eq!(
        service,
        Service {
            service_type: ServiceType::LoadBalancer,
            labels: [("app", "web")].into_iter().collect(),
            annotations: [("proxier.io/balance", "flow")].into_iter().collect(),
            cluster_ips: vec![address("10.96.0.9")],
            headless: true,
            external_ips: vec![address("203.0.113.1"), address("2001:db8::1")],
            load_balancer_ingress: vec![LoadBalancerIngress {
                address: address("203.0.113.7"),
                mode: IpMode::Vip
            }],
            ports: vec![
                ServicePort {
                    name: "sip".to_owned(),
                    protocol: Protocol::Udp,
                    port: 5060,
                    node_port: Some(31000),
                    target_port: TargetPort::Number(15060)
                },
                ServicePort {
                    name: String::new(),
                    protocol: Protocol::Sctp,
                    port: 36412,
                    node_port: None,
                    target_port: TargetPort::Name("s1ap".to_owned())
                },
            ],
            session_affinity: SessionAffinity::ClientIp { timeout_seconds: 60 },
            external_traffic_policy: TrafficPolicy::Local,
            internal_traffic_policy: TrafficPolicy::Local,
            source_ranges: vec!["192.0.2.0/24".parse().unwrap()],
            has_source_ranges: true,
            health_check_node_port: Some(30122),
            ..Service::new(mk_name("web"))
        }
    );
    assert_eq!(problems, [""; 0]);
    let (service, problems) = imported(&localv1::Service::default());
    assert_eq!((service, problems), (Service::new(mk_name("web")), vec![]));
}

#[test]
fn what_is_wrong_in_a_service_costs_that_item_alone_and_is_said() {
    let (service, problems) = imported(&localv1::Service {
        namespace: "kube-system".to_owned(),
        r#type: "Headless".to_owned(),
        ports: vec![
            PortMapping { protocol: 77, port: 1, ..PortMapping::default() },
            PortMapping { protocol: 1, port: 65536, ..PortMapping::default() },
            PortMapping { protocol: 1, port: 80, node_port: -1, ..PortMapping::default() },
        ],
        session_affinity: Some(localv1::service::SessionAffinity::ClientIp(ClientIpAffinity {
            timeout_seconds: -1,
        })),
        ip_filters: vec![IpFilter { target_ips: None, source_ranges: vec!["everybody".to_owned()] }],
        ..service_with(&["203.0.113.1", "203.0.113.1/32"])
    });
    assert_eq!(service.external_ips, ["203.0.113.1".parse::<IpAddr>().unwrap()]);
    assert_eq!((service.ports.len(), service.ports[0].node_port), (1, None));
    assert_eq!(service.affinity_timeout(), 10_800);
    assert!(service.has_source_ranges && service.source_ranges.is_empty(), "nobody gets in");
    assert_eq!(problems.len(), 8, "{problems:#?}");
    for text in [
        r#"Service default/web: Namespace "kube-system" is not what the value's path says: default counts; "#,
        r#"Type "Headless" is not a type of Service"#,
        r#"IPs.ExternalIPs.V4[1] "203.0.113.1/32" is not an IP address: left out; "#,
        r#"Ports[0].Protocol "77" is not a protocol of a port: port left out; "#,
        r#"Ports[1].Port "65536" is not a port: left out; "#,
        r#"Ports[2].NodePort "-1" is not a port"#,
        r#"ClientIP.TimeoutSeconds "-1" is out of range"#,
        r#"IPFilters[0].SourceRanges[0] "everybody" is not a network: it admits nobody; "#,
    ] {
        assert!(problems.iter().any(|problem| problem.contains(text)), "{text} is not in {problems:#?}");
    }
}

#[test]
fn endpoints_with_family_and_ports_in_common_are_a_slice_and_none_is_left_without_any() {
    let mut judge = judge();
    let sip = localv1::Endpoint {
        port_overrides: vec![PortName { name: "sip".to_owned(), port: 5060 }],
        ..endpoint_with(&["11.0.2.3"])
    };
    let changes = tell(
        &mut judge,
        [
            set_endpoint("default/web/a.v4", &endpoint_with(&["11.0.2.2"])),
            set_endpoint("default/web/a.v6", &endpoint_with(&["1100::202"])),
            set_endpoint("default/web/b.v4", &sip),
            // As kpng may say it.
            set_endpoint("default/web/c", &endpoint_with(&["11.0.2.4", "1100::204"])),
            set_endpoint("default/web-2/a.v4", &endpoint_with(&["11.0.2.2"])),
        ],
    );
    let slices = [
        "EndpointSlice default/web-2/IPv4/6000",
        "EndpointSlice default/web/IPv4/5060:sip",
        "EndpointSlice default/web/IPv4/6000",
        "EndpointSlice default/web/IPv6/6000",
    ];
    assert_eq!(names(&changes), slices);
    let pods = |changes: &Changes, slice: &str| -> Vec<String> {
        let (_, object) = changes.objects.iter().find(|(id, _)| id.to_string() == slice).unwrap();
        let endpoints = object.as_ref().unwrap().as_slice().unwrap().endpoints.iter();
        endpoints
            .map(|endpoint| {
                let node = endpoint.node.as_ref().map_or("elsewhere", NodeName::as_str);
                format!("{} {} on {node}", endpoint.target.as_ref().unwrap(), endpoint.addresses[0])
            })
            .collect()
    };
    assert_eq!(pods(&changes, slices[2]), ["default/a 11.0.2.2 on node1", "default/c 11.0.2.4 on node1"]);
    assert_eq!(pods(&changes, slices[3]), ["default/a 1100::202 on node1", "default/c 1100::204 on node1"]);
    // One endpoint changes: one slice does.
    let remote = localv1::Endpoint { local: false, ..endpoint_with(&["11.0.2.2"]) };
    let changes = tell(&mut judge, [set_endpoint("default/web/a.v4", &remote)]);
    assert_eq!(names(&changes), slices[2..3]);
    assert_eq!(pods(&changes, slices[2]), ["default/a 11.0.2.2 on elsewhere", "default/c 11.0.2.4 on node1"]);
    // One moves to other ports, and another one goes.
    let changes = tell(
        &mut judge,
        [
            set_endpoint("default/web/b.v4", &endpoint_with(&["11.0.2.3"])),
            delete(Set::EndpointsSet, "default/web/a.v6"),
        ],
    );
    assert_eq!(names(&changes), ["-EndpointSlice default/web/IPv4/5060:sip", slices[2], slices[3]]);
    assert_eq!(pods(&changes, slices[3]), ["default/c 1100::204 on node1"]);
}

#[test]
fn an_endpoint_that_drains_is_not_ready_and_not_about_to_end() {
    let draining = localv1::Endpoint { draining: true, ..endpoint_with(&["11.0.2.2"]) };
    let changes = tell(&mut judge(), [set_endpoint("default/web/a.v4", &draining)]);
    let object = changes.objects.values().next().unwrap().clone().unwrap();
    let Endpoint { ready, serving, terminating, .. } = object.as_slice().unwrap().endpoints[0];
    assert_eq!((ready, serving, terminating), (false, true, false));
}

#[test]
fn rubbish_is_a_problem_until_it_is_mended_and_costs_nobody_else_anything() {
    let mut judge = judge();
    let good = || set_service("default/web", &service_with(&["203.0.113.1"]));
    tell(&mut judge, [good()]);
    let changes = tell(
        &mut judge,
        [
            set_bytes(Set::ServicesSet, "default/web", vec![0xff]),
            set_service("default/mail", &service_with(&["203.0.113.2"])),
            set_service("nowhere", &service_with(&[])),
            set_service(&format!("default/{}", "x".repeat(1 << 20)), &service_with(&[])),
            set_bytes(Set::EndpointsSet, "default/web/a", vec![0xff]),
            set_endpoint("default/web", &endpoint_with(&["11.0.2.2"])),
            set_endpoint("default/web/", &endpoint_with(&["11.0.2.2"])),
            set_endpoint("default/web/b", &localv1::Endpoint::default()),
            set_endpoint("default/web/c", &endpoint_with(&["11.0.2.2", "1100::202", "127.0.0.1", "::1"])),
            set_endpoint(&format!("default/web/{}", "x".repeat(1 << 20)), &endpoint_with(&["11.0.2.2"])),
        ],
    );
    assert_eq!(
        names(&changes),
        [
            "Service default/mail",
            "-Service default/web",
            "EndpointSlice default/web/IPv4/6000",
            "EndpointSlice default/web/IPv6/6000"
        ]
    );
    let problems = texts(&changes);
    assert_eq!(problems.len(), 10, "{problems:#?}");
    for text in [
        "Service default/web: cannot be decoded (",
        "Service /nowhere: is at a path that is none of a Service: left out; let the server have Services at namespace/name",
        "xxx...: has a name or namespace of more than 63 bytes",
        "Service default/web: endpoints[a] cannot be decoded (",
        "Service default/web: is at a path that is none of an endpoint: left out; ",
        "Service /default/web/: is at a path that is none of an endpoint: left out; ",
        "Service default/web: endpoints[b] has no address: left out; ",
        r#"Service default/web: endpoints[c].IPs "127.0.0.1" is a loopback address: left out; "#,
        "xxx...] is at a path that is longer than those of pods: left out; ",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(text)), "{text} is not in {problems:#?}");
    }
    assert!(problems.iter().all(|problem| problem.len() < 500), "{problems:#?}");
    let changes = tell(
        &mut judge,
        [
            good(),
            delete(Set::EndpointsSet, "default/web"),
            delete(Set::EndpointsSet, "default/web/"),
            delete(Set::ServicesSet, "nowhere"),
        ],
    );
    assert_eq!(names(&changes), ["Service default/web"]);
    assert_eq!(texts(&changes).len(), 6, "{:#?}", texts(&changes));
    assert_eq!(tell(&mut judge, [reset(), good()]).problems, Some(vec![]));
}

#[test]
fn what_this_version_does_not_know_is_counted_and_left_out() {
    let mut import = Import::new(NodeName::new("node1"), Limits::default());
    let unknown_set =
        |set| op(Op::Set(Value { r#ref: Some(reference(set, "default/web")), bytes: Vec::new().into() }));
    for item in [
        OpItem { op: None },
        op(Op::Set(Value::default())),
        unknown_set(0),
        unknown_set(12),
        unknown_set(i32::MIN),
        op(Op::Delete(reference(99, "default/web"))),
    ] {
        assert_eq!(import.take(item), Ok(None));
    }
    assert_eq!((import.take_unknown(), import.take_unknown()), (6, 0));
    let changes = import.take(sync()).unwrap().unwrap();
    assert_eq!((changes.objects.len(), changes.problems), (0, Some(vec![])));
}

#[test]
fn more_than_can_be_held_is_refused_and_what_was_stays() {
    let limits = Limits { values: 3, bytes: 1000, ..Limits::default() };
    let mut import = Import::new(NodeName::new("node1"), limits);
    let told = |import: &mut Import, items: Vec<OpItem>| -> Result<usize, TooMuch> {
        for item in items {
            import.take(item)?;
        }
        import.take(sync()).map(|changes| changes.unwrap().objects.len())
    };
    let service =
        |number: usize| set_service(&format!("default/web-{number}"), &service_with(&["203.0.113.1"]));
    assert_eq!(told(&mut import, vec![service(1), service(2)]), Ok(2));
    assert_eq!(told(&mut import, vec![service(3), service(4)]), Err(TooMuch::Values(3)));
    import.restart();
    assert_eq!(told(&mut import, (1..5).map(service).collect()), Err(TooMuch::Values(3)));
    import.restart();
    // What takes another one's place takes no room.
    assert_eq!(told(&mut import, (2..5).map(service).collect()), Ok(3));
    assert_eq!(told(&mut import, vec![delete(Set::ServicesSet, "default/web-2"), service(5)]), Ok(2));
    let large = || set_bytes(Set::ServicesSet, "default/web-5", vec![0; 1000]);
    assert_eq!(told(&mut import, vec![large()]), Err(TooMuch::Bytes(1000)));
    // A batch without end is given up as well.
    import.restart();
    assert_eq!(import.take(large()), Err(TooMuch::Bytes(1000)));
}

#[test]
fn of_too_many_problems_some_are_told_and_others_as_soon_as_those_are_mended() {
    let limits = Limits { problems: 40, ..Limits::default() };
    let mut import = Import::new(NodeName::new("node1"), limits);
    let mut said = Vec::new();
    let mut tell = |items: Vec<OpItem>| {
        for item in items {
            assert_eq!(import.take(item), Ok(None));
        }
        said = import.take(sync()).unwrap().unwrap().problems.unwrap();
        said.clone()
    };
    let bad = |number| set_bytes(Set::ServicesSet, &format!("default/web-{number:03}"), vec![0xff]);
    let problems = tell((0..100).map(bad).collect());
    assert_eq!(problems.len(), 41);
    assert!(problems[40].reason.starts_with("and 59 others have more problems"), "{:?}", problems[40]);
    let mend = |number| delete(Set::ServicesSet, &format!("default/web-{number:03}"));
    let problems = tell((0..80).map(mend).collect());
    assert_eq!(problems.len(), 20, "{problems:#?}");
    // Of one Service's endpoints only so many.
    let problems = tell(
        (0..1000).map(|n| set_bytes(Set::EndpointsSet, &format!("default/web/{n}"), vec![0xff])).collect(),
    );
    let of_web = problems
        .iter()
        .filter(|problem| problem.subject == Subject::Object(ObjectId::Service(mk_name("web"))));
    assert!(of_web.count() <= 21, "{problems:#?}");
}

/// See `cargo xtask fuzz localv1_op`, which looks for more.
#[test]
fn what_the_fuzzer_has_kept_holds() {
    let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxier-ebpf/fuzz");
    let mut ran = 0;
    for folder in ["corpus", "kept"] {
        for entry in fuzz.join(folder).join("localv1_op").read_dir().into_iter().flatten() {
            let path = entry.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            let held = std::panic::catch_unwind(|| super::reference::judge(&data));
            assert!(held.is_ok(), "see above: {}", path.display());
            ran += 1;
        }
    }
    assert!(ran > 50, "{ran} inputs: the corpus is not there");
}

/// Bytes of a value: one that is right, or rubbish.
fn bytes_of_service() -> impl Strategy<Value = Vec<u8>> {
    let externals =
        vec(select(&["203.0.113.1", "203.0.113.2", "2001:db8::1", "", "x", "::ffff:1.2.3.4"]), 0..3);
    let filters =
        vec((option::of(select(&["203.0.113.1", "2001:db8::1"])), select(&["192.0.2.0/24", "x"])), 0..3);
    let service = (externals, filters, select(&["", "ClusterIP", "x"]), -1..3_i32).prop_map(
        |(externals, filters, service_type, number)| {
            localv1::Service {
                r#type: service_type.to_owned(),
                ip_filters: filters
                    .into_iter()
                    .map(|(target, range)| IpFilter {
                        target_ips: target.map(|target| ips(&[target])),
                        source_ranges: vec![range.to_owned()],
                    })
                    .collect(),
                ports: vec![PortMapping { protocol: number, port: number, ..PortMapping::default() }],
                ..service_with(&externals)
            }
            .encode_to_vec()
        },
    );
    prop_oneof![4 => service, 1 => vec(any::<u8>(), 0..8)]
}

fn bytes_of_endpoint() -> impl Strategy<Value = Vec<u8>> {
    let addresses = vec(select(&["11.0.2.2", "11.0.2.3", "1100::202", "127.0.0.1", "x"]), 0..3);
    let ports = vec((select(&["", "a", "a,1"]), -1..3_i32), 0..3);
    let endpoint =
        (addresses, ports, any::<(bool, bool)>()).prop_map(|(addresses, ports, (local, draining))| {
            localv1::Endpoint {
                local,
                draining,
                port_overrides: ports
                    .into_iter()
                    .map(|(name, port)| PortName { name: name.to_owned(), port })
                    .collect(),
                ..endpoint_with(&addresses)
            }
            .encode_to_vec()
        });
    prop_oneof![4 => endpoint, 1 => vec(any::<u8>(), 0..8)]
}

fn item() -> impl Strategy<Value = Option<OpItem>> {
    const PATHS: [&str; 7] =
        ["default/web", "default/web-2", "default/mail", "", "x", "default/", "default/web/a"];
    const KEYS: [&str; 7] = ["a", "a.v4", "a.v6", "11.0.2.2", "b/c", "0123456789abcdef", ""];
    let service_path = select(&PATHS).prop_map(str::to_owned);
    let endpoint_path = (select(&["default/web", "default/web-2", "x"]), select(&KEYS))
        .prop_map(|(service, key)| format!("{service}/{key}"));
    let endpoint_path = prop_oneof![6 => endpoint_path, 1 => service_path.clone()];
    let sets = select(&[0, 10, 77, -1]);
    prop_oneof![
        6 => (service_path.clone(), bytes_of_service()).prop_map(|(path, bytes)| Some(set_bytes(Set::ServicesSet, &path, bytes))),
        12 => (endpoint_path.clone(), bytes_of_endpoint()).prop_map(|(path, bytes)| Some(set_bytes(Set::EndpointsSet, &path, bytes))),
        2 => service_path.clone().prop_map(|path| Some(delete(Set::ServicesSet, &path))),
        4 => endpoint_path.prop_map(|path| Some(delete(Set::EndpointsSet, &path))),
        4 => Just(Some(sync())),
        1 => Just(Some(reset())),
        1 => Just(Some(OpItem { op: None })),
        1 => (sets, service_path).prop_map(|(set, path)| Some(op(Op::Set(Value { r#ref: Some(reference(set, &path)), bytes: Vec::new().into() })))),
        // The stream breaks.
        1 => Just(None),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 512 } else { 4096 }))]

    #[test]
    fn whatever_a_server_says_the_objects_are_those_of_the_values_that_it_has_said(items in vec(item(), 0..80)) {
        let mut judge = judge();
        for item in items {
            match item {
                Some(item) => {
                    judge.take(item);
                }
                None => judge.restart(),
            }
        }
        judge.take(sync());
    }
}
