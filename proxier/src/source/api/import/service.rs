//! localv1's Service -> the model's. What is wrong costs that item alone and is reported, as `source::convert` does it.

use std::collections::BTreeSet;

use proxier_common::MAX_NAME;
use proxier_localv1::{self as localv1, Path, PortMapping, service::SessionAffinity as Affinity};

use super::{ranges::source_ranges, reporter::Reporter};
use crate::model::{
    DEFAULT_AFFINITY_TIMEOUT_SECONDS, IpMode, LoadBalancerIngress, MAX_AFFINITY_TIMEOUT_SECONDS, ObjectName,
    Protocol, Service, ServicePort, ServiceType, SessionAffinity, TargetPort, TrafficPolicy,
};

/// The Service that the value at a path is, unless it is none.
pub(super) fn service(path: &str, bytes: &[u8], report: &mut Reporter) -> Option<Service> {
    let Ok(Path { namespace, name, key: None }) = Path::parse(path) else {
        report.report_whole(
            "",
            "is at a path that is none of a Service: left out",
            "let the server have Services at namespace/name",
        );
        return None;
    };
    // The kernel's tables have room for the names that the API server accepts: a longer one would be cut, and not be known again.
    if namespace.len().max(name.len()) > MAX_NAME {
        report.report_whole(
            "",
            &format!(
                "has a name or namespace of more than {MAX_NAME} bytes, which the API server accepts of no Service: left out"
            ),
            "write a shorter one",
        );
        return None;
    }
    let value = report.decoded(bytes)?;
    Some(convert(ObjectName::new(namespace, name), value, report))
}

fn convert(name: ObjectName, value: localv1::Service, report: &mut Reporter) -> Service {
    for (field, said, is) in
        [("Namespace", &value.namespace, &name.namespace), ("Name", &value.name, &name.name)]
    {
        // What says nothing contradicts nothing.
        if !said.is_empty() && **said != **is {
            let reason = format!("is not what the value's path says: {is} counts");
            report.report(field, said, &reason, "let the server have each value at its own path");
        }
    }
    let ips = value.ips.unwrap_or_default();
    let external_ips = report.addresses("IPs.ExternalIPs", ips.external_ips.as_ref());
    let load_balancer_ips = report.addresses("IPs.LoadBalancerIPs", ips.load_balancer_ips.as_ref());
    let externals: BTreeSet<_> = external_ips.iter().chain(&load_balancer_ips).copied().collect();
    let policy = |is_local| if is_local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    // Not `MapIP`: kpng never sets it, and to proxier every Service maps the whole address.
    Service {
        labels: value.labels.into_iter().collect(),
        annotations: value.annotations.into_iter().collect(),
        service_type: service_type(&value.r#type, report),
        cluster_ips: report.addresses("IPs.ClusterIPs", ips.cluster_ips.as_ref()),
        headless: ips.headless,
        external_ips,
        load_balancer_ingress: load_balancer_ips
            .into_iter()
            .map(|address| LoadBalancerIngress { address, mode: IpMode::Vip })
            .collect(),
        ports: value
            .ports
            .into_iter()
            .enumerate()
            .filter_map(|(index, port)| service_port(index, port, report))
            .collect(),
        session_affinity: session_affinity(value.session_affinity.as_ref(), report),
        external_traffic_policy: policy(value.external_traffic_to_local),
        internal_traffic_policy: policy(value.internal_traffic_to_local),
        has_source_ranges: !value.ip_filters.is_empty(),
        source_ranges: source_ranges(&value.ip_filters, &externals, report),
        health_check_node_port: optional_port("HealthCheckNodePort", value.health_check_node_port, report),
        ..Service::new(name)
    }
}

fn service_type(text: &str, report: &mut Reporter) -> ServiceType {
    ServiceType::parse(text).unwrap_or_else(|| {
        report.report(
            "Type",
            text,
            "is not a type of Service: taken as ClusterIP",
            "let it be ClusterIP, NodePort, LoadBalancer or ExternalName",
        );
        ServiceType::ClusterIp
    })
}

/// Nought is how protobuf says none.
fn optional_port(field: &str, value: i32, report: &mut Reporter) -> Option<u16> {
    if value == 0 { None } else { report.port(field, value) }
}

fn service_port(index: usize, port: PortMapping, report: &mut Reporter) -> Option<ServicePort> {
    let field = |name: &str| format!("Ports[{index}].{name}");
    let protocol = match port.protocol() {
        localv1::Protocol::Tcp => Protocol::Tcp,
        localv1::Protocol::Udp => Protocol::Udp,
        localv1::Protocol::Sctp => Protocol::Sctp,
        localv1::Protocol::UnknownProtocol => {
            report.report(
                &field("Protocol"),
                &port.protocol.to_string(),
                "is not a protocol of a port: port left out",
                "let it be 1 (TCP), 2 (UDP) or 3 (SCTP)",
            );
            return None;
        }
    };
    let number = report.port(&field("Port"), port.port)?;
    let target_port = if !port.target_port_name.is_empty() {
        TargetPort::Name(port.target_port_name)
    } else if port.target_port == 0 {
        TargetPort::Number(number)
    } else {
        TargetPort::Number(report.port(&field("TargetPort"), port.target_port)?)
    };
    Some(ServicePort {
        name: port.name,
        protocol,
        port: number,
        node_port: optional_port(&field("NodePort"), port.node_port, report),
        target_port,
    })
}

fn session_affinity(affinity: Option<&Affinity>, report: &mut Reporter) -> SessionAffinity {
    let Some(Affinity::ClientIp(client_ip)) = affinity else { return SessionAffinity::None };
    let seconds = client_ip.timeout_seconds;
    let in_range =
        u32::try_from(seconds).ok().filter(|seconds| (1..=MAX_AFFINITY_TIMEOUT_SECONDS).contains(seconds));
    if in_range.is_none() && seconds != 0 {
        report.report(
            "ClientIP.TimeoutSeconds",
            &seconds.to_string(),
            "is out of range: taken as 10800",
            "let it be a number of seconds from 1 to 86400",
        );
    }
    SessionAffinity::ClientIp { timeout_seconds: in_range.unwrap_or(DEFAULT_AFFINITY_TIMEOUT_SECONDS) }
}
