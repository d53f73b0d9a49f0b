//! What kpng's API says of a Service and its endpoints. `json` and `exec` print it, `api` serves it. Pure.
//!
//! Two things kpng does not do: every external address is one that the Service may have, and it says so where a Service has
//! whole addresses (`MapIP`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use globset::GlobSet;
use proxier_localv1 as localv1;

use super::Snapshot;
use crate::{
    desired::{ServiceKey, select},
    model::{
        Endpoint, EndpointSlice, Family, Labels, NodeName, ObjectName, Protocol, Service, ServicePort,
        SessionAffinity, TargetPort, TrafficPolicy,
    },
};

/// Annotations that begin so are meant for whoever carries the Service out. Others can be large, and are nobody's business on
/// every node.
const ANNOTATIONS: &str = "proxier.io/";

/// Which labels and annotations of a Service are passed on, beside those for whoever carries the Service out.
#[derive(Clone, Debug)]
pub struct Carried {
    /// By name.
    pub labels: GlobSet,
    /// By name.
    pub annotations: GlobSet,
}

impl Carried {
    /// None.
    #[must_use]
    pub const fn none() -> Self {
        Self { labels: GlobSet::empty(), annotations: GlobSet::empty() }
    }
}

/// A Service and its endpoints, whoever asks.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Exported {
    pub(super) service: localv1::Service,
    /// By pod and family.
    pub(super) endpoints: Vec<ExportedEndpoint>,
}

/// A pod of a Service in one family.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ExportedEndpoint {
    pub(super) pod: Pod,
    pub(super) family: Family,
    /// The node that it runs on.
    pub(super) node: Option<NodeName>,
    /// Whether it takes no new conversations.
    pub(super) draining: bool,
    /// All but what depends on who asks.
    pub(super) common: localv1::Endpoint,
}

/// What the endpoints of a pod have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Pod {
    Named(ObjectName),
    /// Without `targetRef` nothing says which endpoints are one pod.
    Unnamed(Vec<IpAddr>),
}

impl Exported {
    /// A Service as `snapshot` has it; none if it is not there.
    pub(super) fn of(snapshot: Snapshot<'_>, name: &ObjectName, carried: &Carried) -> Option<Self> {
        let service = snapshot.catalog.service(name)?;
        Some(Self { service: message(snapshot, service, carried), endpoints: endpoints(snapshot, name) })
    }

    /// Whose traffic an endpoint takes; none if nobody's, which is as good as none at all.
    pub(super) fn scopes(&self, local: bool) -> Option<localv1::EndpointScopes> {
        let scopes = localv1::EndpointScopes {
            internal: local || !self.service.internal_traffic_to_local,
            external: local || !self.service.external_traffic_to_local,
        };
        (scopes.internal || scopes.external).then_some(scopes)
    }
}

impl ExportedEndpoint {
    /// What tells it from the other endpoints of its Service, which is in `namespace`. kpng has the pod's name alone, so that the
    /// families of a pod overwrite each other.
    pub(super) fn key(&self, namespace: &str) -> String {
        match &self.pod {
            Pod::Named(pod) => {
                let family = match self.family {
                    Family::V4 => "v4",
                    Family::V6 => "v6",
                };
                // A slice that somebody has written may name pods of anywhere. No name has a colon in it.
                let elsewhere = Some(&*pod.namespace).filter(|of| *of != namespace);
                let prefix = elsewhere.map(|of| format!("{of}:")).unwrap_or_default();
                format!("{prefix}{}.{family}", pod.name)
            }
            Pod::Unnamed(addresses) => {
                addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
            }
        }
    }

    /// Whether it runs on `node`.
    pub(super) fn is_on(&self, node: &NodeName) -> bool {
        self.node.as_ref() == Some(node)
    }
}

fn message(snapshot: Snapshot<'_>, service: &Service, carried: &Carried) -> localv1::Service {
    // An address that the Service may not have must not be taken by whatever reads this either.
    let owned: BTreeSet<IpAddr> = Family::ALL
        .into_iter()
        .filter_map(|family| {
            snapshot.desired.services.get(&ServiceKey { service: service.name.clone(), family })
        })
        .flat_map(|service| &service.externals)
        .copied()
        .collect();
    let external_ips = service.external_ips.iter().copied().filter(|ip| owned.contains(ip));
    let load_balancer_ips = ip_set(service.load_balancer_ips().filter(|ip| owned.contains(ip)));
    localv1::Service {
        namespace: service.name.namespace.to_string(),
        name: service.name.name.to_string(),
        r#type: service.service_type.to_string(),
        labels: chosen(&service.labels, |name| carried.labels.is_match(name)),
        annotations: chosen(&service.annotations, |name| {
            name.starts_with(ANNOTATIONS) || carried.annotations.is_match(name)
        }),
        ips: Some(localv1::ServiceIPs {
            cluster_ips: Some(ip_set(service.cluster_ips.iter().copied())),
            external_ips: Some(ip_set(external_ips)),
            load_balancer_ips: Some(load_balancer_ips).filter(|set| *set != localv1::IpSet::default()),
            headless: service.headless,
        }),
        ip_filters: if service.has_source_ranges {
            vec![localv1::IpFilter {
                target_ips: Some(ip_set(owned)),
                source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
            }]
        } else {
            Vec::new()
        },
        map_ip: true,
        ports: service.ports.iter().map(port).collect(),
        external_traffic_to_local: service.external_traffic_policy == TrafficPolicy::Local,
        internal_traffic_to_local: service.internal_traffic_policy == TrafficPolicy::Local,
        health_check_node_port: service.health_check_node_port.unwrap_or_default().into(),
        session_affinity: match service.session_affinity {
            SessionAffinity::None => None,
            SessionAffinity::ClientIp { timeout_seconds } => {
                // The API server takes a day at the most.
                let timeout_seconds = i32::try_from(timeout_seconds).unwrap_or(i32::MAX);
                Some(localv1::service::SessionAffinity::ClientIp(localv1::ClientIpAffinity {
                    timeout_seconds,
                }))
            }
        },
    }
}

fn chosen(all: &Labels, choose: impl Fn(&str) -> bool) -> BTreeMap<String, String> {
    all.iter()
        .filter(|(name, _)| choose(name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn ip_set(addresses: impl IntoIterator<Item = IpAddr>) -> localv1::IpSet {
    let mut set = localv1::IpSet::default();
    add(&mut set, addresses);
    set
}

/// Adds what is not there yet.
fn add(set: &mut localv1::IpSet, addresses: impl IntoIterator<Item = IpAddr>) {
    for address in addresses {
        let family = match Family::of(address) {
            Family::V4 => &mut set.v4,
            Family::V6 => &mut set.v6,
        };
        let address = address.to_string();
        if !family.contains(&address) {
            family.push(address);
        }
    }
}

fn port(port: &ServicePort) -> localv1::PortMapping {
    let (target_port, target_port_name) = match &port.target_port {
        TargetPort::Number(number) => (*number, String::new()),
        TargetPort::Name(name) => (0, name.clone()),
    };
    let protocol = match port.protocol {
        Protocol::Tcp => localv1::Protocol::Tcp,
        Protocol::Udp => localv1::Protocol::Udp,
        Protocol::Sctp => localv1::Protocol::Sctp,
    };
    localv1::PortMapping {
        name: port.name.clone(),
        protocol: protocol.into(),
        port: port.port.into(),
        node_port: port.node_port.unwrap_or_default().into(),
        target_port: target_port.into(),
        target_port_name,
    }
}

/// The endpoints of all nodes, by pod and family.
fn endpoints(snapshot: Snapshot<'_>, service: &ObjectName) -> Vec<ExportedEndpoint> {
    let mut by_node: BTreeMap<_, Vec<(&EndpointSlice, &Endpoint)>> = BTreeMap::new();
    for slice in snapshot.catalog.slices_of(service) {
        for endpoint in &slice.endpoints {
            by_node.entry((slice.family, endpoint.node.as_ref())).or_default().push((slice, endpoint));
        }
    }

    let mut pods: BTreeMap<(Pod, Family), ExportedEndpoint> = BTreeMap::new();
    for ((family, node), group) in by_node {
        let any_ready = group.iter().any(|(_, endpoint)| endpoint.ready);
        for (slice, endpoint) in group {
            // None of them was one: there is nothing to send to, and nothing to call it by.
            if endpoint.addresses.is_empty() {
                continue;
            }
            let draining = !select::is_preferred(endpoint, any_ready);
            let pod =
                endpoint.target.clone().map_or_else(|| Pod::Unnamed(endpoint.addresses.to_vec()), Pod::Named);
            let new = || ExportedEndpoint {
                pod: pod.clone(),
                family,
                node: node.cloned(),
                draining,
                common: localv1::Endpoint {
                    hostname: endpoint.hostname.as_deref().unwrap_or_default().to_owned(),
                    ips: Some(localv1::IpSet::default()),
                    ..localv1::Endpoint::default()
                },
            };
            let exported = pods.entry((pod.clone(), family)).or_insert_with(new);
            // Two slices do not agree, while one of them is being replaced: what takes conversations is the pod, and it is on
            // one node.
            match (exported.draining, draining) {
                (false, true) => continue,
                (true, false) => *exported = new(),
                _ if exported.node.as_ref() != node => continue,
                _ => {}
            }
            add(exported.common.ips.get_or_insert_default(), endpoint.addresses.iter().copied());
            for port in &slice.ports {
                let port =
                    localv1::PortName { name: port.name.clone(), port: port.port.unwrap_or_default().into() };
                if !exported.common.port_overrides.contains(&port) {
                    exported.common.port_overrides.push(port);
                }
            }
        }
    }
    pods.into_values().collect()
}
