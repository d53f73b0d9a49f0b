//! Prints the whole state at every change, one JSON object per Service per line, in the shape of kpng's kpng-json, so
//! that scripts written for that go on working. One thing differs: where kpng lets the two families of a
//! dual-stack pod overwrite each other, both are there.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
};

use anyhow::Context as _;
use proxier_localv1 as localv1;
use serde::Serialize;

use super::{
    Sink, Snapshot,
    export::{Carried, Exported, Pod},
};
use crate::model::NodeName;

/// The sink.
pub struct JsonSink {
    out: Box<dyn Write + Send>,
    node: NodeName,
    carried: Carried,
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
    pub fn new(out: Box<dyn Write + Send>, node: NodeName, carried: Carried, pretty: bool) -> Self {
        Self { out, node, carried, pretty, printed: None }
    }
}

impl Sink for JsonSink {
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        let text = render(snapshot, &self.node, &self.carried, self.pretty)?;
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

/// All Services of `snapshot`, as lines. Empty if it has none.
pub(super) fn render(
    snapshot: Snapshot<'_>,
    node: &NodeName,
    carried: &Carried,
    pretty: bool,
) -> Result<String, serde_json::Error> {
    let mut text = String::new();
    for service in snapshot.catalog.services() {
        let Some(exported) = Exported::of(snapshot, &service.name, carried) else { continue };
        let line = Line { service: (&exported.service).into(), endpoints: endpoints(&exported, node) };
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

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Line<'a> {
    service: ServiceJson<'a>,
    /// `null` if there is none.
    endpoints: Option<Vec<localv1::Endpoint>>,
}

/// The order of the fields is that of kpng's Go structs, so that lines compare as text.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ServiceJson<'a> {
    namespace: &'a str,
    name: &'a str,
    r#type: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    #[serde(rename = "IPs", skip_serializing_if = "Option::is_none")]
    ips: Option<&'a localv1::ServiceIPs>,
    #[serde(rename = "IPFilters", skip_serializing_if = "<[_]>::is_empty")]
    ip_filters: &'a [localv1::IpFilter],
    #[serde(rename = "MapIP", skip_serializing_if = "is_default")]
    map_ip: bool,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    ports: &'a [localv1::PortMapping],
    #[serde(skip_serializing_if = "is_default")]
    external_traffic_to_local: bool,
    /// There even if null: protobuf's Go code has no `omitempty` for a oneof.
    session_affinity: Option<SessionAffinityJson<'a>>,
    #[serde(skip_serializing_if = "is_default")]
    internal_traffic_to_local: bool,
    #[serde(skip_serializing_if = "is_default")]
    health_check_node_port: i32,
}

#[derive(Serialize)]
enum SessionAffinityJson<'a> {
    #[serde(rename = "ClientIP")]
    ClientIp(&'a localv1::ClientIpAffinity),
}

/// Go's JSON leaves zero values out.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl<'a> From<&'a localv1::Service> for ServiceJson<'a> {
    fn from(service: &'a localv1::Service) -> Self {
        let localv1::Service {
            namespace,
            name,
            r#type,
            labels,
            annotations,
            ips,
            ip_filters,
            map_ip,
            ports,
            external_traffic_to_local,
            internal_traffic_to_local,
            health_check_node_port,
            session_affinity,
        } = service;
        Self {
            namespace,
            name,
            r#type,
            labels,
            annotations,
            ips: ips.as_ref(),
            ip_filters,
            map_ip: *map_ip,
            ports,
            external_traffic_to_local: *external_traffic_to_local,
            session_affinity: session_affinity.as_ref().map(
                |localv1::service::SessionAffinity::ClientIp(affinity)| {
                    SessionAffinityJson::ClientIp(affinity)
                },
            ),
            internal_traffic_to_local: *internal_traffic_to_local,
            health_check_node_port: *health_check_node_port,
        }
    }
}

/// The endpoints of all nodes that `node` may send traffic to, those of a pod's families as one.
fn endpoints(exported: &Exported, node: &NodeName) -> Option<Vec<localv1::Endpoint>> {
    let mut pods: Vec<(&Pod, localv1::Endpoint)> = Vec::new();
    for endpoint in exported.endpoints.iter().filter(|endpoint| !endpoint.draining) {
        let local = endpoint.is_on(node);
        let Some(scopes) = exported.scopes(local) else { continue };
        // They come by pod.
        match pods.last_mut() {
            Some((pod, known)) if **pod == endpoint.pod => join(known, &endpoint.common),
            _ => {
                let endpoint = (
                    &endpoint.pod,
                    localv1::Endpoint { local, scopes: Some(scopes), ..endpoint.common.clone() },
                );
                pods.push(endpoint);
            }
        }
    }
    (!pods.is_empty()).then(|| pods.into_iter().map(|(_, endpoint)| endpoint).collect())
}

/// Adds what another endpoint of the same pod has.
fn join(endpoint: &mut localv1::Endpoint, other: &localv1::Endpoint) {
    if let Some(other) = &other.ips {
        let ips = endpoint.ips.get_or_insert_default();
        ips.v4.extend_from_slice(&other.v4);
        ips.v6.extend_from_slice(&other.v6);
    }
    for port in &other.port_overrides {
        if !endpoint.port_overrides.contains(port) {
            endpoint.port_overrides.push(port.clone());
        }
    }
}

#[cfg(test)]
mod tests;
