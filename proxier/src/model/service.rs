//! A Service: whose external addresses proxier takes over.

use std::{fmt, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Labels, ObjectName};

/// A Service, reduced to what proxier needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.uid`; empty where a manifest has none.
    pub uid: Box<str>,
    /// `metadata.creationTimestamp`; none where a manifest has none.
    pub created: Option<CreationTime>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.annotations`.
    pub annotations: Labels,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs`, without `None`.
    pub cluster_ips: Vec<IpAddr>,
    /// Whether `spec.clusterIP` is `None`.
    pub headless: bool,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`, those with an address.
    pub load_balancer_ingress: Vec<LoadBalancerIngress>,
    /// `spec.ports`. Shown to people and passed on; which traffic is taken does not depend on them.
    pub ports: Vec<ServicePort>,
    /// `spec.sessionAffinity`.
    pub session_affinity: SessionAffinity,
    /// `spec.externalTrafficPolicy`.
    pub external_traffic_policy: TrafficPolicy,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic_policy: TrafficPolicy,
    /// `spec.loadBalancerSourceRanges`, those that parse.
    pub source_ranges: Vec<IpNet>,
    /// Whether `spec.loadBalancerSourceRanges` names anything, be it only ranges that do not parse: without this, a
    /// typing mistake would open the Service to everybody.
    pub has_source_ranges: bool,
    /// `spec.selector`.
    pub selector: Labels,
    /// `spec.publishNotReadyAddresses`. The EndpointSlices say the same by `ready: true`.
    pub publish_not_ready_addresses: bool,
    /// `spec.healthCheckNodePort`.
    pub health_check_node_port: Option<u16>,
}

/// When an object was created, in seconds since 1970 (the API's resolution).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CreationTime(pub i64);

/// `spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceType {
    /// The API's default.
    #[default]
    ClusterIp,
    /// A port on every node as well.
    NodePort,
    /// A load balancer in front as well.
    LoadBalancer,
    /// A DNS alias. Has neither addresses nor endpoints.
    ExternalName,
}

impl ServiceType {
    /// The type that a text names; what says nothing is the API's default.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "ClusterIP" => Some(Self::ClusterIp),
            "NodePort" => Some(Self::NodePort),
            "LoadBalancer" => Some(Self::LoadBalancer),
            "ExternalName" => Some(Self::ExternalName),
            _ => None,
        }
    }
}

impl fmt::Display for ServiceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalName => "ExternalName",
        })
    }
}

/// An entry of `status.loadBalancer.ingress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadBalancerIngress {
    /// The load balancer's address.
    pub address: IpAddr,
    /// Who is behind it.
    pub mode: IpMode,
}

/// `status.loadBalancer.ingress[].ipMode` (KEP-1860).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IpMode {
    /// Packets arrive at the node with the load balancer's address as their destination.
    #[default]
    Vip,
    /// The load balancer is a proxy: packets arrive with the node's or the pod's address.
    Proxy,
}

/// An entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// May be empty if there is one only.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The Service's port.
    pub port: u16,
    /// The port on every node, if there is one.
    pub node_port: Option<u16>,
    /// The pods' port.
    pub target_port: TargetPort,
}

/// `spec.ports[].targetPort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container's port.
    Name(String),
}

/// A transport protocol that a Service's port can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// The API's default.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// `spec.sessionAffinity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionAffinity {
    /// `None`.
    #[default]
    None,
    /// `ClientIP`.
    ClientIp {
        /// How long an idle client keeps its pod.
        timeout_seconds: u32,
    },
}

/// What `sessionAffinityConfig.clientIP.timeoutSeconds` is where nothing is said: three hours, as the API server fills
/// in.
pub const DEFAULT_AFFINITY_TIMEOUT_SECONDS: u32 = 10_800;
/// The API server's limit for it: a day.
pub const MAX_AFFINITY_TIMEOUT_SECONDS: u32 = 86_400;

/// Which pods traffic may go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Pods of every node.
    #[default]
    Cluster,
    /// Pods of the same node.
    Local,
}

/// Leading bits that all v4-mapped IPv6 addresses have in common.
const V4_MAPPED_BITS: u8 = 96;

/// A network of clients: an entry of `spec.loadBalancerSourceRanges`, around which the API allows blanks.
///
/// # Errors
///
/// It admits nobody.
pub fn source_range(text: &str) -> Result<IpNet, NotASourceRange> {
    match text.trim().parse::<IpNet>().map(|net| net.trunc()) {
        // No packet has such a source, and the maps keep IPv4 like this.
        Ok(IpNet::V6(net)) if net.addr().to_ipv4_mapped().is_some() => {
            Err(NotASourceRange::Mapped(as_ipv4(net)))
        }
        Ok(net) => Ok(net),
        Err(_) => Err(NotASourceRange::NotANetwork),
    }
}

/// The IPv4 network that is meant by an IPv6 one of v4-mapped addresses.
fn as_ipv4(mapped: Ipv6Net) -> Option<Ipv4Net> {
    let length = mapped.prefix_len().checked_sub(V4_MAPPED_BITS)?;
    Ipv4Net::new(mapped.addr().to_ipv4_mapped()?, length).ok()
}

/// Why a text is no network of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotASourceRange {
    /// It is no network.
    NotANetwork,
    /// It has an IPv4 address in IPv6's form. The network that is meant, if it can be told.
    Mapped(Option<Ipv4Net>),
}

impl NotASourceRange {
    /// What is wrong; continues a sentence that began with the text.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NotANetwork => "is not a network: it admits nobody",
            Self::Mapped(_) => "is an IPv4 network written as IPv6: it admits nobody",
        }
    }

    /// What to write in its place.
    #[must_use]
    pub fn instead(self) -> String {
        match self {
            Self::Mapped(Some(meant)) => meant.to_string(),
            _ => "address/length, such as 192.0.2.0/24 or 2001:db8::/32".to_owned(),
        }
    }
}

impl Service {
    /// A Service of the API's default type, without addresses.
    #[must_use]
    pub fn new(name: ObjectName) -> Self {
        Self {
            name,
            uid: Box::default(),
            created: None,
            labels: Labels::default(),
            annotations: Labels::default(),
            service_type: ServiceType::ClusterIp,
            cluster_ips: Vec::new(),
            headless: false,
            external_ips: Vec::new(),
            load_balancer_ingress: Vec::new(),
            ports: Vec::new(),
            session_affinity: SessionAffinity::None,
            external_traffic_policy: TrafficPolicy::Cluster,
            internal_traffic_policy: TrafficPolicy::Cluster,
            source_ranges: Vec::new(),
            has_source_ranges: false,
            selector: Labels::default(),
            publish_not_ready_addresses: false,
            health_check_node_port: None,
        }
    }

    /// Addresses at which the load balancer leaves packets as they are: not those where it is a proxy.
    pub fn load_balancer_ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.load_balancer_ingress
            .iter()
            .filter(|ingress| ingress.mode == IpMode::Vip)
            .map(|ingress| ingress.address)
    }

    /// How long an idle client keeps its pod, in seconds.
    ///
    /// Clients always keep their pod for a while (protocols like FTP and SIP span several flows); the Service only
    /// says for how long.
    #[must_use]
    pub const fn affinity_timeout(&self) -> u32 {
        match self.session_affinity {
            SessionAffinity::None => DEFAULT_AFFINITY_TIMEOUT_SECONDS,
            SessionAffinity::ClientIp { timeout_seconds } => timeout_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_balancer_that_is_a_proxy_has_no_address_of_the_service() {
        let mut service = Service::new(ObjectName::new("default", "media"));
        service.load_balancer_ingress = vec![
            LoadBalancerIngress { address: "10.0.0.77".parse().unwrap(), mode: IpMode::Vip },
            LoadBalancerIngress { address: "10.0.0.78".parse().unwrap(), mode: IpMode::Proxy },
        ];
        assert_eq!(service.load_balancer_ips().collect::<Vec<_>>(), ["10.0.0.77".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn without_client_ip_affinity_a_client_keeps_its_pod_for_three_hours() {
        let mut service = Service::new(ObjectName::new("default", "media"));
        assert_eq!(service.affinity_timeout(), 10_800);
        service.session_affinity = SessionAffinity::ClientIp { timeout_seconds: 60 };
        assert_eq!(service.affinity_timeout(), 60);
    }
}
