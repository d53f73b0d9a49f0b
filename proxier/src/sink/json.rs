//! Prints the whole state at every change, one JSON object per Service per line, in the shape of kpng's kpng-json, so
//! that scripts written for that go on working. One thing differs: where kpng lets the two families of a
//! dual-stack pod overwrite each other, both are there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write},
    net::IpAddr,
};

use anyhow::Context as _;
use serde::Serialize;

use super::{Sink, Snapshot};
use crate::{
    catalog::Catalog,
    desired::{Desired, ServiceKey, select},
    model::{
        self, EndpointSlice, Family, NodeName, ObjectName, Protocol, SessionAffinity, TargetPort,
        TrafficPolicy,
    },
};

/// The sink.
pub struct JsonSink {
    out: Box<dyn Write + Send>,
    node: NodeName,
    pretty: bool,
    printed: Option<String>,
}

impl fmt::Debug for JsonSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonSink")
            .field("node", &self.node)
            .field("pretty", &self.pretty)
            .finish_non_exhaustive()
    }
}

impl JsonSink {
    /// Prints to `out` what `node` should do, on one line a Service or, if `pretty`, on many.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, node: NodeName, pretty: bool) -> Self {
        Self { out, node, pretty, printed: None }
    }
}

impl Sink for JsonSink {
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        let text = render(snapshot, &self.node, self.pretty)?;
        // Something changed that nobody sees here; the same set again would start whatever reads this for nothing.
        if self.printed.as_ref() == Some(&text) {
            return Ok(());
        }
        let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        written.context("cannot write to the standard output")?;
        self.printed = Some(text);
        Ok(())
    }
}

fn render(snapshot: Snapshot<'_>, node: &NodeName, pretty: bool) -> Result<String, serde_json::Error> {
    let mut text = String::new();
    for service in snapshot.catalog.services() {
        let line = Line {
            service: ServiceJson::new(service, snapshot.desired),
            endpoints: endpoints(snapshot.catalog, service, node),
        };
        text += &if pretty { serde_json::to_string_pretty(&line)? } else { serde_json::to_string(&line)? };
        text.push('\n');
    }
    Ok(text)
}

/// Whether an error means that nobody reads the output any more.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

// The order of the fields below is that of kpng's Go structs, so that lines compare as text.

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line<'a> {
    service: ServiceJson<'a>,
    /// `null` if there is none.
    endpoints: Option<Vec<EndpointJson>>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceJson<'a> {
    namespace: &'a str,
    name: &'a str,
    r#type: String,
    #[serde(rename = "IPs")]
    ips: ServiceIpsJson,
    #[serde(rename = "IPFilters", skip_serializing_if = "Vec::is_empty")]
    ip_filters: Vec<IpFilterJson>,
    /// "True if the service maps the whole IP, not just individual ports": kpng declares it and never sets it.
    #[serde(rename = "MapIP")]
    map_ip: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortMappingJson<'a>>,
    #[serde(skip_serializing_if = "is_default")]
    external_traffic_to_local: bool,
    /// There even if null: protobuf's Go code has no `omitempty` for a oneof.
    session_affinity: Option<SessionAffinityJson>,
    #[serde(skip_serializing_if = "is_default")]
    internal_traffic_to_local: bool,
    #[serde(skip_serializing_if = "is_default")]
    health_check_node_port: u16,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceIpsJson {
    #[serde(rename = "ClusterIPs")]
    cluster_ips: IpSetJson,
    #[serde(rename = "ExternalIPs")]
    external_ips: IpSetJson,
    #[serde(rename = "LoadBalancerIPs", skip_serializing_if = "is_default")]
    load_balancer_ips: IpSetJson,
    #[serde(skip_serializing_if = "is_default")]
    headless: bool,
}

#[derive(Default, PartialEq, Serialize)]
struct IpSetJson {
    #[serde(rename = "V4", skip_serializing_if = "Vec::is_empty")]
    v4: Vec<IpAddr>,
    #[serde(rename = "V6", skip_serializing_if = "Vec::is_empty")]
    v6: Vec<IpAddr>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct IpFilterJson {
    source_ranges: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct PortMappingJson<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    protocol: u8,
    port: u16,
    #[serde(skip_serializing_if = "is_default")]
    node_port: u16,
    #[serde(skip_serializing_if = "is_default")]
    target_port: u16,
    #[serde(skip_serializing_if = "str::is_empty")]
    target_port_name: &'a str,
}

#[derive(Serialize)]
enum SessionAffinityJson {
    #[serde(rename = "ClientIP", rename_all = "PascalCase")]
    ClientIp { timeout_seconds: u32 },
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct EndpointJson {
    #[serde(skip_serializing_if = "String::is_empty")]
    hostname: String,
    #[serde(rename = "IPs")]
    ips: IpSetJson,
    #[serde(skip_serializing_if = "is_default")]
    local: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    port_overrides: Vec<PortNameJson>,
    scopes: ScopesJson,
}

#[derive(PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct PortNameJson {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "is_default")]
    port: u16,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ScopesJson {
    #[serde(skip_serializing_if = "is_default")]
    internal: bool,
    #[serde(skip_serializing_if = "is_default")]
    external: bool,
}

/// Go's JSON leaves zero values out.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl IpSetJson {
    fn add(&mut self, address: IpAddr) {
        let set = match Family::of(address) {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        };
        if !set.contains(&address) {
            set.push(address);
        }
    }
}

impl FromIterator<IpAddr> for IpSetJson {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let mut set = Self::default();
        for address in addresses {
            set.add(address);
        }
        set
    }
}

impl<'a> ServiceJson<'a> {
    fn new(service: &'a model::Service, desired: &Desired) -> Self {
        // An address that the Service may not have must not be taken by whatever reads this either.
        let owned: BTreeSet<IpAddr> = Family::ALL
            .into_iter()
            .filter_map(|family| desired.services.get(&ServiceKey { service: service.name.clone(), family }))
            .flat_map(|service| &service.externals)
            .copied()
            .collect();
        Self {
            namespace: &service.name.namespace,
            name: &service.name.name,
            r#type: service.service_type.to_string(),
            ips: ServiceIpsJson {
                cluster_ips: service.cluster_ips.iter().copied().collect(),
                external_ips: service.external_ips.iter().copied().filter(|ip| owned.contains(ip)).collect(),
                load_balancer_ips: service.load_balancer_ips().filter(|ip| owned.contains(ip)).collect(),
                headless: service.headless,
            },
            ip_filters: if service.has_source_ranges {
                vec![IpFilterJson {
                    source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
                }]
            } else {
                Vec::new()
            },
            map_ip: true,
            ports: service.ports.iter().map(PortMappingJson::new).collect(),
            external_traffic_to_local: service.external_traffic_policy == TrafficPolicy::Local,
            session_affinity: match service.session_affinity {
                SessionAffinity::None => None,
                SessionAffinity::ClientIp { timeout_seconds } => {
                    Some(SessionAffinityJson::ClientIp { timeout_seconds })
                }
            },
            internal_traffic_to_local: service.internal_traffic_policy == TrafficPolicy::Local,
            health_check_node_port: service.health_check_node_port.unwrap_or_default(),
        }
    }
}

impl<'a> PortMappingJson<'a> {
    fn new(port: &'a model::ServicePort) -> Self {
        let (target_port, target_port_name) = match &port.target_port {
            TargetPort::Number(number) => (*number, ""),
            TargetPort::Name(name) => (0, name.as_str()),
        };
        Self {
            name: &port.name,
            protocol: match port.protocol {
                Protocol::Tcp => 1,
                Protocol::Udp => 2,
                Protocol::Sctp => 3,
            },
            port: port.port,
            node_port: port.node_port.unwrap_or_default(),
            target_port,
            target_port_name,
        }
    }
}

/// What the endpoints of a pod have in common, so that its families become one.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Pod {
    Named(ObjectName),
    /// Without `targetRef` nothing says which endpoints are one pod.
    Unnamed(Vec<IpAddr>),
}

/// The endpoints of all nodes that traffic may go to, by pod.
fn endpoints(catalog: &Catalog, service: &model::Service, node: &NodeName) -> Option<Vec<EndpointJson>> {
    let mut by_node: BTreeMap<_, Vec<(&EndpointSlice, &model::Endpoint)>> = BTreeMap::new();
    for slice in catalog.slices_of(&service.name) {
        for endpoint in &slice.endpoints {
            by_node.entry((slice.family, endpoint.node.as_ref())).or_default().push((slice, endpoint));
        }
    }

    let mut pods: BTreeMap<Pod, EndpointJson> = BTreeMap::new();
    for group in by_node.values() {
        let any_ready = group.iter().any(|(_, endpoint)| endpoint.ready);
        for (slice, endpoint) in
            group.iter().filter(|(_, endpoint)| select::is_preferred(endpoint, any_ready))
        {
            let pod =
                endpoint.target.clone().map_or_else(|| Pod::Unnamed(endpoint.addresses.to_vec()), Pod::Named);
            let local = endpoint.node.as_ref() == Some(node);
            let json = pods.entry(pod).or_insert_with(|| EndpointJson {
                hostname: endpoint.hostname.as_deref().unwrap_or_default().to_owned(),
                ips: IpSetJson::default(),
                local,
                port_overrides: Vec::new(),
                scopes: ScopesJson {
                    internal: local || service.internal_traffic_policy == TrafficPolicy::Cluster,
                    external: local || service.external_traffic_policy == TrafficPolicy::Cluster,
                },
            });
            for address in &endpoint.addresses {
                json.ips.add(*address);
            }
            for port in &slice.ports {
                let port = PortNameJson { name: port.name.clone(), port: port.port.unwrap_or_default() };
                if !json.port_overrides.contains(&port) {
                    json.port_overrides.push(port);
                }
            }
        }
    }
    (!pods.is_empty()).then(|| pods.into_values().collect())
}

#[cfg(test)]
mod tests;
