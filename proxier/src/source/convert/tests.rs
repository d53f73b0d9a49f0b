use super::*;

fn service_of(yaml: &str) -> (Service, Vec<String>) {
    let converted = service(serde_saphyr::from_str(yaml).unwrap()).unwrap();
    (converted.object, converted.problems.iter().map(ToString::to_string).collect())
}

fn slice_of(yaml: &str) -> (EndpointSlice, Vec<String>) {
    let converted = endpoint_slice(serde_saphyr::from_str(yaml).unwrap()).unwrap();
    (converted.object, converted.problems.iter().map(ToString::to_string).collect())
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

#[test]
fn a_service_keeps_what_proxier_needs() {
    let (service, problems) = service_of(
        r#"
metadata:
  name: media
  namespace: telco
  uid: abc
  creationTimestamp: "2026-11-22T11:13:20Z"
  labels: {a: b}
  annotations: {c: d}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd00::1"]
  externalIPs: [10.0.0.55, "1000::55"]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  loadBalancerSourceRanges: [" 192.0.2.7/24 "]
  healthCheckNodePort: 30122
  publishNotReadyAddresses: true
  selector: {app: x}
  ports:
  - {name: sip, port: 5060, protocol: UDP, targetPort: 15060, nodePort: 30001}
  - {name: sctp, port: 36412, protocol: SCTP, targetPort: s1ap}
  - {name: plain, port: 80}
status:
  loadBalancer:
    ingress:
    - {ip: 10.0.0.77, ipMode: VIP}
    - {ip: 10.0.0.78, ipMode: Proxy}
    - {ip: 10.0.0.79}
    - {hostname: lb.example.com}
"#,
    );
    assert_eq!(problems, [""; 0]);
    assert_eq!(service.name.to_string(), "telco/media");
    assert_eq!(&*service.uid, "abc");
    assert_eq!(service.created, Some(CreationTime(1_795_346_000)));
    assert_eq!(&service.labels["a"], "b");
    assert_eq!(&service.annotations["c"], "d");
    assert_eq!(service.service_type, ServiceType::LoadBalancer);
    assert_eq!(service.cluster_ips, ips(&["10.96.0.1", "fd00::1"]));
    assert!(!service.headless);
    assert_eq!(service.external_ips, ips(&["10.0.0.55", "1000::55"]));
    assert_eq!(service.load_balancer_ips().collect::<Vec<_>>(), ips(&["10.0.0.77", "10.0.0.79"]));
    assert_eq!(service.external_traffic_policy, TrafficPolicy::Local);
    assert_eq!(service.internal_traffic_policy, TrafficPolicy::Local);
    assert_eq!(service.session_affinity, SessionAffinity::ClientIp { timeout_seconds: 60 });
    assert_eq!(service.source_ranges, ["192.0.2.0/24".parse().unwrap()]);
    assert!(service.has_source_ranges);
    assert_eq!(service.health_check_node_port, Some(30122));
    assert!(service.publish_not_ready_addresses);
    assert_eq!(&service.selector["app"], "x");
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| (port.port, port.protocol, port.node_port, &port.target_port))
        .collect();
    assert_eq!(
        ports,
        [
            (5060, Protocol::Udp, Some(30001), &TargetPort::Number(15060)),
            (36412, Protocol::Sctp, None, &TargetPort::Name("s1ap".to_owned())),
            (80, Protocol::Tcp, None, &TargetPort::Number(80)),
        ]
    );
}

#[test]
fn what_a_manifest_leaves_out_is_as_the_api_server_fills_it_in() {
    let (service, problems) = service_of("{metadata: {name: web}, spec: {clusterIP: None}}");
    assert_eq!(problems, [""; 0]);
    let expected = Service { headless: true, ..Service::new(ObjectName::new("default", "web")) };
    assert_eq!(service, expected);
}

#[test]
fn client_ip_affinity_without_a_timeout_has_the_apis_default() {
    let (service, _) = service_of("{metadata: {name: web}, spec: {sessionAffinity: ClientIP}}");
    assert_eq!(service.session_affinity, SessionAffinity::ClientIp { timeout_seconds: 10_800 });
}

#[test]
fn a_bad_address_costs_that_address_alone() {
    let (service, problems) = service_of(
        "{metadata: {name: web}, spec: {externalIPs: [10.0.0.55, 10.0.0.555, 10.0.0.56/32, '1000::55']}}",
    );
    assert_eq!(service.external_ips, ips(&["10.0.0.55", "1000::55"]));
    assert_eq!(problems.len(), 2);
    assert_eq!(
        problems[0],
        "Service default/web: spec.externalIPs[1] \"10.0.0.555\" is not an IP address: left out; write an IPv4 or \
         IPv6 address, without prefix length, port or zone"
    );
}

#[test]
fn an_ipv4_network_written_as_ipv6_is_told_its_right_spelling() {
    for (range, expected) in [
        ("::ffff:192.0.2.0/120", "; write 192.0.2.0/24"),
        ("::ffff:192.0.2.7/128", "; write 192.0.2.7/32"),
        ("::ffff:0.0.0.0/96", "; write 0.0.0.0/0"),
    ] {
        let spec = format!("metadata: {{name: web}}\nspec:\n  loadBalancerSourceRanges: ['{range}']\n");
        let (service, problems) = service_of(&spec);
        assert_eq!(service.source_ranges, []);
        assert!(problems[0].ends_with(expected), "{problems:?}");
    }
}

#[test]
fn each_bad_item_is_reported_with_its_field_and_value() {
    for (spec, field, value) in [
        ("type: Headless", "spec.type", "Headless"),
        ("externalTrafficPolicy: local", "spec.externalTrafficPolicy", "local"),
        ("internalTrafficPolicy: Node", "spec.internalTrafficPolicy", "Node"),
        ("sessionAffinity: Cookie", "spec.sessionAffinity", "Cookie"),
        ("loadBalancerSourceRanges: [192.0.2.0]", "spec.loadBalancerSourceRanges[0]", "192.0.2.0"),
        ("ports: [{port: 0}]", "spec.ports[0].port", "0"),
        ("ports: [{port: 80}, {port: 70000}]", "spec.ports[1].port", "70000"),
        ("ports: [{port: 80, protocol: GRE}]", "spec.ports[0].protocol", "GRE"),
        ("ports: [{port: 80, targetPort: -1}]", "spec.ports[0].targetPort", "-1"),
        ("clusterIPs: [x]", "spec.clusterIPs[0]", "x"),
        ("externalIPs: ['']", "spec.externalIPs[0]", ""),
        ("healthCheckNodePort: 99999", "spec.healthCheckNodePort", "99999"),
        ("loadBalancerSourceRanges: [192.0.2.1]", "spec.loadBalancerSourceRanges[0]", "192.0.2.1"),
        (
            "loadBalancerSourceRanges: [192.0.2.0/24, '::ffff:192.0.2.0/120']",
            "spec.loadBalancerSourceRanges[1]",
            "::ffff:192.0.2.0/120",
        ),
        (
            "{sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 90000}}}",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "90000",
        ),
    ] {
        let (service, problems) = service_of(&format!("metadata: {{name: web}}\nspec:\n  {spec}\n"));
        assert_eq!(&*service.name.name, "web");
        assert_eq!(problems.len(), 1, "{spec}: {problems:?}");
        assert!(
            problems[0].starts_with(&format!("Service default/web: {field} {value:?} ")),
            "{spec}: {}",
            problems[0]
        );
    }
}

#[test]
fn a_range_that_does_not_parse_still_restricts_the_service() {
    let (service, _) = service_of("{metadata: {name: web}, spec: {loadBalancerSourceRanges: [oops]}}");
    assert_eq!(service.source_ranges, []);
    assert!(service.has_source_ranges);
}

#[test]
fn blanks_around_a_range_and_bits_behind_its_length_do_not_matter() {
    let ranges = "[' 192.0.2.77/24 ', \"\\t2001:db8::1/32\\n\"]";
    let (service, problems) =
        service_of(&format!("{{metadata: {{name: web}}, spec: {{loadBalancerSourceRanges: {ranges}}}}}"));
    assert_eq!(problems, [""; 0]);
    let texts: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["192.0.2.0/24", "2001:db8::/32"]);
}

#[test]
fn an_object_without_a_name_is_none() {
    assert_eq!(service(core::Service::default()), Err(Refused::Nameless));
    assert_eq!(endpoint_slice(discovery::EndpointSlice::default()), Err(Refused::Nameless));
    assert_eq!(node(&core::Node::default()), Err(Refused::Nameless));
}

#[test]
fn a_service_whose_name_the_kernels_tables_would_cut_is_left_out_with_the_reason() {
    let metadata = |namespace: usize, name: usize| ObjectMeta {
        namespace: Some("n".repeat(namespace)),
        name: Some("s".repeat(name)),
        ..ObjectMeta::default()
    };
    let convert = |metadata| service(core::Service { metadata, ..core::Service::default() });
    assert_eq!(convert(metadata(MAX_NAME, MAX_NAME)).unwrap().object.name.name.len(), MAX_NAME);
    for (namespace, name, field) in
        [(MAX_NAME + 1, 1, "metadata.namespace"), (1, MAX_NAME + 1, "metadata.name")]
    {
        let text = convert(metadata(namespace, name)).unwrap_err().to_string();
        let subject = format!("Service {}/{}", "n".repeat(namespace), "s".repeat(name));
        assert_eq!(
            text,
            format!(
                "{subject}: {field} is longer than 63 bytes, which the API server accepts of no Service: left out; \
                 write a shorter one"
            )
        );
    }
    // Names of slices may have up to 253 bytes, and get into no table.
    let slice =
        discovery::EndpointSlice { metadata: metadata(1, 253), ..discovery::EndpointSlice::default() };
    endpoint_slice(slice).unwrap();
}

#[test]
fn conditions_left_out_mean_what_the_api_says() {
    let slice = |conditions: &str| {
        let (slice, _) = slice_of(&format!(
            "{{metadata: {{name: s, labels: {{kubernetes.io/service-name: web}}}}, addressType: IPv4, \
             endpoints: [{{addresses: [11.0.2.2], nodeName: node1{conditions}}}]}}"
        ));
        let endpoint = &slice.endpoints[0];
        (endpoint.ready, endpoint.serving, endpoint.terminating)
    };
    assert_eq!(slice(""), (true, true, false));
    assert_eq!(slice(", conditions: {}"), (true, true, false));
    assert_eq!(slice(", conditions: {ready: false}"), (false, false, false));
    assert_eq!(slice(", conditions: {ready: null, serving: false}"), (true, false, false));
    assert_eq!(slice(", conditions: {ready: false, serving: true, terminating: true}"), (false, true, true));
}

#[test]
fn an_address_of_the_wrong_family_costs_that_address_alone() {
    let (slice, problems) = slice_of(
        "{metadata: {name: s, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, endpoints: \
         [{addresses: [11.0.2.2, '1100::202'], targetRef: {kind: Pod, name: alpine-1}}]}",
    );
    assert_eq!(*slice.endpoints[0].addresses, ips(&["11.0.2.2"]));
    assert_eq!(slice.endpoints[0].target.as_ref().unwrap().to_string(), "default/alpine-1");
    assert_eq!(slice.service.unwrap().to_string(), "default/web");
    assert_eq!(
        problems,
        [
            "EndpointSlice default/s: endpoints[0].addresses[1] \"1100::202\" is not of the slice's addressType IPv4: \
         left out; put it into a slice of its own family"
        ]
    );
}

#[test]
fn an_address_that_no_pod_can_have_is_left_out() {
    for address in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1"] {
        let (slice, problems) = slice_of(&format!(
            "{{metadata: {{name: s, labels: {{kubernetes.io/service-name: web}}}}, addressType: IPv4, \
             endpoints: [{{addresses: [{address}]}}]}}"
        ));
        assert_eq!(*slice.endpoints[0].addresses, [] as [IpAddr; 0], "{address}");
        assert_eq!(problems.len(), 1, "{address}");
    }
}

#[test]
fn a_slice_of_names_or_without_a_service_is_reported() {
    let (slice, problems) =
        slice_of("{metadata: {name: s}, addressType: FQDN, endpoints: [{addresses: [a.example.com]}]}");
    assert_eq!(*slice.endpoints, []);
    assert_eq!(slice.service, None);
    assert_eq!(problems.len(), 2);
    assert!(
        problems[0].contains("metadata.labels[kubernetes.io/service-name] is missing"),
        "{}",
        problems[0]
    );
    assert!(problems[1].contains("addressType \"FQDN\""), "{}", problems[1]);
}

#[test]
fn a_nodes_addresses_are_kept_and_its_names_are_not() {
    let converted = node(
        &serde_saphyr::from_str(
            "{metadata: {name: node1}, status: {addresses: [{type: InternalIP, address: 192.168.1.1}, {type: \
             Hostname, address: node1}, {type: ExternalIP, address: 'fd00:1::1'}, {type: ExternalIP, address: x}]}}",
        )
        .unwrap(),
    )
    .unwrap();
    assert_eq!(converted.object.addresses, ips(&["192.168.1.1", "fd00:1::1"]));
    assert_eq!(converted.problems.len(), 1);
}

#[test]
fn a_nodes_pod_networks_are_those_of_the_list_or_the_one_before_there_was_a_list() {
    let cidrs = |spec: &str| {
        let text = format!("{{metadata: {{name: node1}}, spec: {spec}}}");
        let converted = node(&serde_saphyr::from_str(&text).unwrap()).unwrap();
        let cidrs: Vec<_> = converted.object.pod_cidrs.iter().map(ToString::to_string).collect();
        (cidrs, converted.problems.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let both = "{podCIDR: 11.0.2.0/24, podCIDRs: [11.0.2.7/24, '1100::200/120']}";
    assert_eq!(cidrs(both).0, ["11.0.2.0/24", "1100::200/120"]);
    assert_eq!(cidrs("{podCIDR: 11.0.2.0/24}").0, ["11.0.2.0/24"]);
    assert_eq!(cidrs("{}"), (vec![], vec![]));
    let (known, problems) = cidrs("{podCIDRs: [11.0.2.0, 11.0.3.0/24]}");
    assert_eq!(known, ["11.0.3.0/24"]);
    assert_eq!(
        problems,
        [
            "Node node1: spec.podCIDRs[0] \"11.0.2.0\" is not a network: its addresses are not kept from Services; write \
             address/length, such as 10.244.1.0/24 or fd00:244:1::/64"
        ]
    );
}

#[test]
fn kubectls_copy_of_a_service_is_not_kept() {
    let web = service(
        serde_saphyr::from_str(
            "{metadata: {name: web, annotations: {a: b, kubectl.kubernetes.io/last-applied-configuration: '{}'}}}",
        )
        .unwrap(),
    )
    .unwrap();
    assert_eq!(web.object.annotations, [("a", "b")].into_iter().collect());
}
