//! Kubernetes' types -> the model. What does not parse costs that item alone and is reported; the rest of the object
//! counts. Defaults are those that the API server fills in, so that a manifest means here what it means there.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{
        core::v1::{self as core, ServiceSpec, ServiceStatus},
        discovery::v1 as discovery,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use proxier_common::MAX_NAME;

use crate::model::{
    CreationTime, DEFAULT_AFFINITY_TIMEOUT_SECONDS, Endpoint, EndpointPort, EndpointSlice, Family, IpMode,
    Labels, LoadBalancerIngress, MAX_AFFINITY_TIMEOUT_SECONDS, Node, NodeName, ObjectId, ObjectName, Problem,
    Protocol, Service, ServicePort, ServiceType, SessionAffinity, Severity, Subject, TargetPort,
    TrafficPolicy, not_a_pods, source_range,
};

/// Ties an EndpointSlice to its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Takes a Service from kube-proxy and gives it to the proxy named.
pub const SERVICE_PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// What `kubectl apply` keeps in an object.
const LAST_APPLIED_ANNOTATION: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// An object, and what of it could not be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted<T> {
    /// The object without the items that are wrong.
    pub object: T,
    /// One for each item that is wrong.
    pub problems: Vec<Problem>,
}

/// Why an object is not taken at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is none.
    #[error("has no metadata.name")]
    Nameless,
    /// It is one that the kernel's tables cannot tell from others.
    #[error("{0}")]
    Unsupported(Box<Problem>),
}

/// Collects what is wrong with one object.
struct Reporter {
    id: ObjectId,
    problems: Vec<Problem>,
}

impl Reporter {
    const fn new(id: ObjectId) -> Self {
        Self { id, problems: Vec::new() }
    }

    fn report(&mut self, field: impl Into<String>, value: impl Into<String>, reason: &str, next_step: &str) {
        let problem = self.problem(reason, next_step).in_field(field, value);
        self.problems.push(problem);
    }

    /// As [`Self::report`], of a field that is not there.
    fn report_missing(&mut self, field: impl Into<String>, reason: &str, next_step: &str) {
        let problem = self.problem(reason, next_step).in_whole_field(field);
        self.problems.push(problem);
    }

    fn problem(&self, reason: &str, next_step: &str) -> Problem {
        Problem::new(Severity::Warning, Subject::Object(self.id.clone()), reason, next_step)
    }

    fn address(&mut self, field: &str, value: &str) -> Option<IpAddr> {
        let address = value.parse().ok();
        if address.is_none() {
            self.report(
                field,
                value,
                "is not an IP address: left out",
                "write an IPv4 or IPv6 address, without prefix length, port or zone",
            );
        }
        address
    }

    fn addresses(&mut self, field: &str, values: &[String]) -> Vec<IpAddr> {
        values
            .iter()
            .enumerate()
            .filter_map(|(index, value)| self.address(&format!("{field}[{index}]"), value))
            .collect()
    }

    /// Of pods.
    fn network(&mut self, field: &str, value: &str) -> Option<IpNet> {
        let network = value.parse::<IpNet>().ok();
        if network.is_none() {
            self.report(
                field,
                value,
                "is not a network: its addresses are not kept from Services",
                "write address/length, such as 10.244.1.0/24 or fd00:244:1::/64",
            );
        }
        network.map(|network| network.trunc())
    }

    fn port(&mut self, field: &str, value: i32) -> Option<u16> {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        if port.is_none() {
            self.report(
                field,
                value.to_string(),
                "is not a port: left out",
                "write a number from 1 to 65535",
            );
        }
        port
    }

    fn protocol(&mut self, field: &str, value: Option<&str>) -> Option<Protocol> {
        match value.unwrap_or_default() {
            "" | "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            other => {
                self.report(
                    field,
                    other,
                    "is not a protocol of a port: port left out",
                    "write TCP, UDP or SCTP; other protocols are delivered without a port",
                );
                None
            }
        }
    }

    fn traffic_policy(&mut self, field: &str, value: Option<&str>) -> TrafficPolicy {
        match value.unwrap_or_default() {
            "" | "Cluster" => TrafficPolicy::Cluster,
            "Local" => TrafficPolicy::Local,
            other => {
                self.report(
                    field,
                    other,
                    "is not a traffic policy: taken as Cluster",
                    "write Cluster or Local",
                );
                TrafficPolicy::Cluster
            }
        }
    }
}

fn object_name(metadata: &ObjectMeta) -> Result<ObjectName, Refused> {
    let name = metadata.name.clone().filter(|name| !name.is_empty()).ok_or(Refused::Nameless)?;
    let namespace = metadata.namespace.clone().filter(|namespace| !namespace.is_empty());
    Ok(ObjectName::new(namespace.unwrap_or_else(|| "default".to_owned()), name))
}

/// The kernel's tables have room for the names that the API server accepts: a longer one would be cut, and not be known
/// again.
fn service_name(metadata: &ObjectMeta) -> Result<ObjectName, Refused> {
    let name = object_name(metadata)?;
    let fields = [("metadata.namespace", &name.namespace), ("metadata.name", &name.name)];
    let Some((field, _)) = fields.into_iter().find(|(_, text)| text.len() > MAX_NAME) else {
        return Ok(name);
    };
    let problem = Problem::new(
        Severity::Warning,
        Subject::Object(ObjectId::Service(name)),
        format!("is longer than {MAX_NAME} bytes, which the API server accepts of no Service: left out"),
        "write a shorter one",
    );
    Err(Refused::Unsupported(Box::new(problem.in_whole_field(field))))
}

fn labels(metadata: &ObjectMeta) -> BTreeMap<String, String> {
    metadata.labels.clone().unwrap_or_default()
}

/// All but kubectl's copy of the whole object, which is larger than the rest and says nothing new.
fn annotations(metadata: &ObjectMeta) -> Labels {
    let annotations = metadata.annotations.iter().flatten();
    let kept = annotations.filter(|(name, _)| *name != LAST_APPLIED_ANNOTATION);
    kept.map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

/// Converts a Service.
///
/// # Errors
///
/// It has no name, or too long a one.
pub fn service(service: core::Service) -> Result<Converted<Service>, Refused> {
    let core::Service { metadata, spec, status } = service;
    let name = service_name(&metadata)?;
    let mut reporter = Reporter::new(ObjectId::Service(name.clone()));
    let report = &mut reporter;
    let spec = spec.unwrap_or_default();

    let mut cluster_ips = spec.cluster_ips.clone().unwrap_or_default();
    if cluster_ips.is_empty() {
        // Before dual-stack there was this field alone, and manifests still write it.
        cluster_ips.extend(spec.cluster_ip.clone().filter(|address| !address.is_empty()));
    }
    let headless = cluster_ips.iter().any(|address| address == "None");
    cluster_ips.retain(|address| address != "None");

    let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let service = Service {
        uid: metadata.uid.clone().unwrap_or_default().into(),
        created: metadata.creation_timestamp.as_ref().map(|time| CreationTime(time.0.as_second())),
        labels: labels(&metadata).into_iter().collect(),
        annotations: annotations(&metadata),
        service_type: service_type(&spec, report),
        cluster_ips: report.addresses("spec.clusterIPs", &cluster_ips),
        headless,
        external_ips: report.addresses("spec.externalIPs", spec.external_ips.as_deref().unwrap_or_default()),
        load_balancer_ingress: load_balancer_ingress(status.as_ref(), report),
        ports: spec
            .ports
            .iter()
            .flatten()
            .enumerate()
            .filter_map(|(index, port)| service_port(index, port, report))
            .collect(),
        session_affinity: session_affinity(&spec, report),
        external_traffic_policy: report
            .traffic_policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref()),
        internal_traffic_policy: report
            .traffic_policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref()),
        source_ranges: source_ranges(ranges, report),
        has_source_ranges: !ranges.is_empty(),
        selector: spec.selector.clone().into_iter().flatten().collect(),
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or_default(),
        health_check_node_port: spec
            .health_check_node_port
            .filter(|port| *port != 0)
            .and_then(|port| report.port("spec.healthCheckNodePort", port)),
        name,
    };
    Ok(Converted { object: service, problems: reporter.problems })
}

fn service_type(spec: &ServiceSpec, report: &mut Reporter) -> ServiceType {
    let text = spec.type_.as_deref().unwrap_or_default();
    ServiceType::parse(text).unwrap_or_else(|| {
        report.report(
            "spec.type",
            text,
            "is not a type of Service: taken as ClusterIP",
            "write ClusterIP, NodePort, LoadBalancer or ExternalName",
        );
        ServiceType::ClusterIp
    })
}

fn load_balancer_ingress(status: Option<&ServiceStatus>, report: &mut Reporter) -> Vec<LoadBalancerIngress> {
    let ingress =
        status.and_then(|status| status.load_balancer.as_ref()).and_then(|status| status.ingress.as_ref());
    let mut converted = Vec::new();
    for (index, ingress) in ingress.into_iter().flatten().enumerate() {
        // An entry with a host name alone is a load balancer that is a proxy somewhere else.
        let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        let field = format!("status.loadBalancer.ingress[{index}]");
        let Some(address) = report.address(&format!("{field}.ip"), ip) else { continue };
        let mode = match ingress.ip_mode.as_deref().unwrap_or_default() {
            "" | "VIP" => IpMode::Vip,
            "Proxy" => IpMode::Proxy,
            other => {
                report.report(
                    format!("{field}.ipMode"),
                    other,
                    "is not a mode: address left out",
                    "write VIP or Proxy",
                );
                continue;
            }
        };
        converted.push(LoadBalancerIngress { address, mode });
    }
    converted
}

fn service_port(index: usize, port: &core::ServicePort, report: &mut Reporter) -> Option<ServicePort> {
    let field = format!("spec.ports[{index}]");
    let number = report.port(&format!("{field}.port"), port.port)?;
    let protocol = report.protocol(&format!("{field}.protocol"), port.protocol.as_deref())?;
    let target_port = match &port.target_port {
        None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
        Some(IntOrString::Int(target)) => {
            TargetPort::Number(report.port(&format!("{field}.targetPort"), *target)?)
        }
        Some(IntOrString::String(target)) if target.is_empty() => TargetPort::Number(number),
        Some(IntOrString::String(target)) => TargetPort::Name(target.clone()),
    };
    Some(ServicePort {
        name: port.name.clone().unwrap_or_default(),
        protocol,
        port: number,
        node_port: port
            .node_port
            .filter(|port| *port != 0)
            .and_then(|port| report.port(&format!("{field}.nodePort"), port)),
        target_port,
    })
}

fn session_affinity(spec: &ServiceSpec, report: &mut Reporter) -> SessionAffinity {
    match spec.session_affinity.as_deref().unwrap_or_default() {
        "" | "None" => SessionAffinity::None,
        "ClientIP" => {
            let seconds = spec
                .session_affinity_config
                .as_ref()
                .and_then(|config| config.client_ip.as_ref())
                .and_then(|client_ip| client_ip.timeout_seconds);
            let timeout_seconds = seconds.map_or(Some(DEFAULT_AFFINITY_TIMEOUT_SECONDS), |seconds| {
                u32::try_from(seconds)
                    .ok()
                    .filter(|seconds| (1..=MAX_AFFINITY_TIMEOUT_SECONDS).contains(seconds))
            });
            if timeout_seconds.is_none() {
                report.report(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    seconds.unwrap_or_default().to_string(),
                    "is out of range: taken as 10800",
                    "write a number of seconds from 1 to 86400",
                );
            }
            SessionAffinity::ClientIp {
                timeout_seconds: timeout_seconds.unwrap_or(DEFAULT_AFFINITY_TIMEOUT_SECONDS),
            }
        }
        other => {
            report.report(
                "spec.sessionAffinity",
                other,
                "is not an affinity: taken as None",
                "write None or ClientIP",
            );
            SessionAffinity::None
        }
    }
}

fn source_ranges(ranges: &[String], report: &mut Reporter) -> Vec<IpNet> {
    let mut converted = Vec::new();
    for (index, range) in ranges.iter().enumerate() {
        match source_range(range) {
            Ok(net) => converted.push(net),
            Err(why) => {
                let field = format!("spec.loadBalancerSourceRanges[{index}]");
                report.report(field, range, why.reason(), &format!("write {}", why.instead()));
            }
        }
    }
    converted
}

/// Converts an EndpointSlice.
///
/// # Errors
///
/// It has no name.
pub fn endpoint_slice(slice: discovery::EndpointSlice) -> Result<Converted<EndpointSlice>, Refused> {
    let discovery::EndpointSlice { address_type, endpoints, metadata, ports } = slice;
    let name = object_name(&metadata)?;
    let mut reporter = Reporter::new(ObjectId::EndpointSlice(name.clone()));
    let report = &mut reporter;

    let service = labels(&metadata).remove(SERVICE_NAME_LABEL).filter(|service| !service.is_empty());
    if service.is_none() {
        report.report_missing(
            format!("metadata.labels[{SERVICE_NAME_LABEL}]"),
            "is missing: the slice belongs to no Service",
            "write the Service's name there",
        );
    }

    let family = match address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        other => {
            report.report(
                "addressType",
                other,
                "is not an address family: its endpoints are left out",
                "write IPv4 or IPv6, and a slice for each",
            );
            None
        }
    };
    let endpoints = family.map_or_else(Box::default, |family| {
        endpoints
            .into_iter()
            .enumerate()
            .map(|(index, endpoint)| convert_endpoint(index, endpoint, family, &name, report))
            .collect()
    });

    let ports = ports
        .into_iter()
        .flatten()
        .enumerate()
        .filter_map(|(index, port)| {
            Some(EndpointPort {
                name: port.name.unwrap_or_default(),
                protocol: report.protocol(&format!("ports[{index}].protocol"), port.protocol.as_deref())?,
                port: port.port.and_then(|port| report.port(&format!("ports[{index}].port"), port)),
            })
        })
        .collect();

    let service = service.map(|service| ObjectName::new(Arc::clone(&name.namespace), service));
    let slice = EndpointSlice { name, service, family: family.unwrap_or(Family::V4), endpoints, ports };
    Ok(Converted { object: slice, problems: reporter.problems })
}

fn convert_endpoint(
    index: usize,
    endpoint: discovery::Endpoint,
    family: Family,
    slice: &ObjectName,
    report: &mut Reporter,
) -> Endpoint {
    let conditions = endpoint.conditions.unwrap_or_default();
    // What is not said has the meaning that the API documents for it.
    let ready = conditions.ready.unwrap_or(true);
    let mut addresses = Vec::new();
    for (position, value) in endpoint.addresses.iter().enumerate() {
        let field = format!("endpoints[{index}].addresses[{position}]");
        let Some(address) = report.address(&field, value) else { continue };
        if Family::of(address) != family {
            report.report(
                field,
                value,
                &format!("is not of the slice's addressType {family}: left out"),
                "put it into a slice of its own family",
            );
        } else if let Some(what) = not_a_pods(address) {
            report.report(field, value, &format!("is {what}: left out"), "write the pod's address");
        } else {
            addresses.push(address);
        }
    }
    Endpoint {
        addresses: addresses.into_iter().collect(),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name.filter(|node| !node.is_empty()).map(NodeName::new),
        hostname: endpoint.hostname.filter(|hostname| !hostname.is_empty()).map(Into::into),
        target: endpoint.target_ref.and_then(|target| {
            let name = target.name.filter(|name| !name.is_empty())?;
            let namespace = target.namespace.filter(|namespace| **namespace != *slice.namespace);
            Some(ObjectName::new(namespace.map_or_else(|| Arc::clone(&slice.namespace), Into::into), name))
        }),
    }
}

/// Converts a Node.
///
/// # Errors
///
/// It has no name.
pub fn node(node: &core::Node) -> Result<Converted<Node>, Refused> {
    let name = NodeName::new(object_name(&node.metadata)?.name);
    let mut reporter = Reporter::new(ObjectId::Node(name.clone()));
    let mut addresses = Vec::new();
    for (index, entry) in node.status.iter().flat_map(|status| status.addresses.iter().flatten()).enumerate()
    {
        // The other types are names, which may still be written as addresses.
        if matches!(entry.type_.as_str(), "InternalIP" | "ExternalIP") {
            addresses.extend(reporter.address(&format!("status.addresses[{index}].address"), &entry.address));
        } else {
            addresses.extend(entry.address.parse::<IpAddr>());
        }
    }
    let spec = node.spec.iter();
    // The second field is the first of the others, which older clusters write alone.
    let cidrs = spec.flat_map(|spec| match spec.pod_cidrs.as_deref().unwrap_or_default() {
        [] => spec.pod_cidr.as_slice(),
        cidrs => cidrs,
    });
    let pod_cidrs = cidrs
        .enumerate()
        .filter_map(|(index, cidr)| reporter.network(&format!("spec.podCIDRs[{index}]"), cidr))
        .collect();
    Ok(Converted { object: Node { name, addresses, pod_cidrs }, problems: reporter.problems })
}

#[cfg(test)]
mod tests;
