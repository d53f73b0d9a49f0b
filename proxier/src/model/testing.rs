//! Builders for tests: objects in the namespace `default`, valid and otherwise plain.

use std::net::IpAddr;

use super::{Endpoint, EndpointPort, EndpointSlice, Family, Node, NodeName, ObjectName, Protocol, Service};

pub(crate) fn mk_name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

pub(crate) fn mk_service<'a>(name: &str, external_ips: impl IntoIterator<Item = &'a str>) -> Service {
    Service { external_ips: parse(external_ips), ..Service::new(mk_name(name)) }
}

/// A slice of the family that its first endpoint has.
pub(crate) fn mk_slice(
    name: &str,
    service: &str,
    endpoints: impl IntoIterator<Item = Endpoint>,
) -> EndpointSlice {
    let endpoints: Box<[_]> = endpoints.into_iter().collect();
    EndpointSlice {
        name: mk_name(name),
        service: Some(mk_name(service)),
        family: endpoints.first().map_or(Family::V4, |endpoint| Family::of(endpoint.addresses[0])),
        endpoints,
        ports: [EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: Some(6000) }].into(),
    }
}

/// A ready endpoint.
pub(crate) fn mk_endpoint(address: &str, node: &str) -> Endpoint {
    Endpoint {
        addresses: parse([address]).into_iter().collect(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(NodeName::new(node)),
        hostname: None,
        target: None,
    }
}

pub(crate) fn mk_node<'a>(name: &str, addresses: impl IntoIterator<Item = &'a str>) -> Node {
    Node { name: NodeName::new(name), addresses: parse(addresses), pod_cidrs: Vec::new() }
}

fn parse<'a>(addresses: impl IntoIterator<Item = &'a str>) -> Vec<IpAddr> {
    addresses.into_iter().map(|address| address.parse().unwrap()).collect()
}
