//! An EndpointSlice: some of a Service's pods, of one address family.

use std::net::IpAddr;

use super::{Family, NodeName, ObjectName, Protocol};

/// An EndpointSlice, reduced to what proxier needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name of the slice itself.
    pub name: ObjectName,
    /// The Service that it belongs to (label `kubernetes.io/service-name`).
    pub service: Option<ObjectName>,
    /// `addressType`.
    pub family: Family,
    /// The pods.
    pub endpoints: Vec<Endpoint>,
    /// The ports that all of them have.
    pub ports: Vec<EndpointPort>,
}

/// A pod, or whatever else answers for a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// All of the slice's family.
    pub addresses: Vec<IpAddr>,
    /// Whether it takes new clients.
    pub ready: bool,
    /// Whether it answers, be it that it is about to end.
    pub serving: bool,
    /// Whether it is about to end.
    pub terminating: bool,
    /// The node that it runs on.
    pub node: Option<NodeName>,
    /// `hostname`.
    pub hostname: Option<String>,
    /// `targetRef`: what the two families of a pod have in common.
    pub target: Option<ObjectName>,
}

/// An entry of an EndpointSlice's `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// The name of the Service's port; may be empty.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The pods' port; none stands for every port.
    pub port: Option<u16>,
}
