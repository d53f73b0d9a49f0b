//! A node of the cluster: its addresses belong to it and to no Service.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

/// The name of a node, as EndpointSlices and the Node object write it. Clones share it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// Takes any string: the API server has checked it, or nothing will match it.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// As a string.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The shared text itself, for whoever has the same one already.
    pub(crate) const fn shared_mut(&mut self) -> &mut Arc<str> {
        &mut self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A Node, reduced to what proxier needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// `status.addresses`, those that are addresses and not names.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`: where its pods' addresses lie.
    pub pod_cidrs: Vec<IpNet>,
}
