//! Services, endpoints and nodes as proxier sees them: the few fields it needs, parsed and checked. No I/O, and no
//! Kubernetes types: `source` converts.

mod endpoint;
mod labels;
mod node;
mod problem;
mod service;
#[cfg(test)]
pub(crate) mod testing;

use std::{fmt, net::IpAddr, sync::Arc};

pub use self::{
    endpoint::{Addresses, Endpoint, EndpointPort, EndpointSlice, not_a_pods},
    labels::Labels,
    node::{Node, NodeName},
    problem::{Place, Problem, ProblemKind, Severity, Subject},
    service::{
        CreationTime, DEFAULT_AFFINITY_TIMEOUT_SECONDS, IpMode, LoadBalancerIngress,
        MAX_AFFINITY_TIMEOUT_SECONDS, NotASourceRange, Protocol, Service, ServicePort, ServiceType,
        SessionAffinity, TargetPort, TrafficPolicy, source_range,
    },
};

/// Namespace and name of an object. Clones share both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// The namespace; `default` where a manifest names none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Takes any strings: the API server has checked them.
    #[must_use]
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An object that a source delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// Some endpoints of a Service.
    EndpointSlice(EndpointSlice),
    /// A Node.
    Node(Node),
}

impl Object {
    /// Kind and name.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        match self {
            Self::Service(service) => ObjectId::Service(service.name.clone()),
            Self::EndpointSlice(slice) => ObjectId::EndpointSlice(slice.name.clone()),
            Self::Node(node) => ObjectId::Node(node.name.clone()),
        }
    }

    /// The Service, if it is one.
    #[must_use]
    pub fn as_service(&self) -> Option<&Service> {
        if let Self::Service(service) = self { Some(service) } else { None }
    }

    /// The slice, if it is one.
    #[must_use]
    pub const fn as_slice(&self) -> Option<&EndpointSlice> {
        if let Self::EndpointSlice(slice) = self { Some(slice) } else { None }
    }

    /// The Node, if it is one.
    #[must_use]
    pub const fn as_node(&self) -> Option<&Node> {
        if let Self::Node(node) = self { Some(node) } else { None }
    }
}

impl From<Service> for Object {
    fn from(service: Service) -> Self {
        Self::Service(Box::new(service))
    }
}

impl From<EndpointSlice> for Object {
    fn from(slice: EndpointSlice) -> Self {
        Self::EndpointSlice(slice)
    }
}

impl From<Node> for Object {
    fn from(node: Node) -> Self {
        Self::Node(node)
    }
}

/// Kind and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectId {
    /// A Service.
    Service(ObjectName),
    /// An EndpointSlice.
    EndpointSlice(ObjectName),
    /// A Node.
    Node(NodeName),
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::EndpointSlice(name) => write!(f, "EndpointSlice {name}"),
            Self::Node(name) => write!(f, "Node {name}"),
        }
    }
}
