//! Addresses that no Service may have, because taking them would cut off a node, a pod, the API server or somebody
//! else's traffic (CVE-2020-8554): who has which, kept up to date as objects come and go. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use super::{
    LocalAddresses, Settings,
    counted::Counted,
    external_cidr::{self, Outside},
    networks::Networks,
};
use crate::model::{EndpointSlice, Node, NodeName, ObjectName, ProblemKind, Service};

/// Why a Service may not have an address, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: ProblemKind,
    pub(super) reason: String,
    pub(super) next_step: String,
}

impl Refusal {
    fn new(reason: impl Into<String>, next_step: impl Into<String>) -> Self {
        let reason = format!("{}: not taken", reason.into());
        Self { kind: ProblemKind::AddressRejected, reason, next_step: next_step.into() }
    }
}

/// What an index change may have an effect on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Stirred {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) networks: Vec<IpNet>,
}

/// Addresses that belong to something in the catalog.
#[derive(Debug, Default)]
pub(super) struct Taken {
    nodes: BTreeSet<(IpAddr, NodeName)>,
    pods: Networks<NodeName>,
    endpoints: Counted<IpAddr>,
    clusters: BTreeSet<(IpAddr, ObjectName)>,
}

impl Taken {
    /// Replaces a Node by a newer version. Returns what may be somebody else's now, or nobody's.
    pub(super) fn replace_node(
        &mut self,
        name: &NodeName,
        before: Option<&Node>,
        after: Option<&Node>,
    ) -> Stirred {
        let addresses = |node: Option<&Node>| -> BTreeSet<IpAddr> {
            node.iter().flat_map(|node| &node.addresses).copied().collect()
        };
        let (old, new) = (addresses(before), addresses(after));
        for address in &old {
            self.nodes.remove(&(*address, name.clone()));
        }
        self.nodes.extend(new.iter().map(|address| (*address, name.clone())));

        let networks = |node: Option<&Node>| -> BTreeSet<IpNet> {
            node.iter().flat_map(|node| &node.pod_cidrs).map(IpNet::trunc).collect()
        };
        let (old_nets, new_nets) = (networks(before), networks(after));
        for network in &old_nets {
            self.pods.remove(*network, name);
        }
        for network in &new_nets {
            self.pods.insert(*network, name.clone());
        }
        Stirred {
            addresses: old.symmetric_difference(&new).copied().collect(),
            networks: old_nets.symmetric_difference(&new_nets).copied().collect(),
        }
    }

    /// As [`Self::replace_node`], of a slice.
    pub(super) fn replace_slice(
        &mut self,
        before: Option<&EndpointSlice>,
        after: Option<&EndpointSlice>,
    ) -> Vec<IpAddr> {
        let addresses = |slice: Option<&'_ EndpointSlice>| {
            slice
                .iter()
                .flat_map(|slice| &slice.endpoints)
                .flat_map(|endpoint| &endpoint.addresses)
                .copied()
                .collect::<Vec<_>>()
        };
        self.endpoints.replace(addresses(before), addresses(after))
    }

    /// As [`Self::replace_node`], of a Service's cluster addresses.
    pub(super) fn replace_service(
        &mut self,
        name: &ObjectName,
        before: Option<&Service>,
        after: Option<&Service>,
    ) -> Vec<IpAddr> {
        let addresses = |service: Option<&Service>| -> BTreeSet<IpAddr> {
            service.iter().flat_map(|service| &service.cluster_ips).copied().collect()
        };
        let (old, new) = (addresses(before), addresses(after));
        for address in old.difference(&new) {
            self.clusters.remove(&(*address, name.clone()));
        }
        self.clusters.extend(new.difference(&old).map(|address| (*address, name.clone())));
        old.symmetric_difference(&new).copied().collect()
    }

    /// Why no Service of `namespace` may have this address.
    pub(super) fn refuses(&self, address: IpAddr, namespace: &str, settings: &Settings) -> Option<Refusal> {
        self.belongs(address, settings).or_else(|| outside(address, namespace, settings))
    }

    /// Whose the address is, if it is anybody's.
    fn belongs(&self, address: IpAddr, settings: &Settings) -> Option<Refusal> {
        if let Some(what) = never_external(address) {
            return Some(Refusal::new(format!("is {what}"), "write an address that routers can forward"));
        }
        if let Some(node) = first(&self.nodes, address) {
            return Some(Refusal::new(
                format!("is an address of Node {node}"),
                "write an address that no node has",
            ));
        }
        if settings.local_addresses.identities.contains(&address) {
            return Some(Refusal::new(
                "is an address of an interface of this node, which would be cut off",
                format!(
                    "write an address that no node has; or if it is there to attract traffic alone, move it to the \
                     interface lo (`ip address show to {address}` shows where it is)"
                ),
            ));
        }
        if settings.local_addresses.broadcasts.contains(&address) {
            return Some(Refusal::new(
                "is the broadcast address of a network that this node is in",
                "write an address that routers can forward",
            ));
        }
        if settings.api_server_addresses.contains(&address) {
            return Some(Refusal::new(
                "is an address of the API server, from which this node would be cut off",
                "write an address that nothing of the cluster has",
            ));
        }
        if self.endpoints.contains(&address) {
            return Some(Refusal::new(
                "is the address of a pod",
                "write an address outside the pods' ranges",
            ));
        }
        if let Some(service) = first(&self.clusters, address) {
            return Some(Refusal::new(
                format!("is the cluster address of Service {service}"),
                "write an address outside the Services' range",
            ));
        }
        if let Some(cidr) = settings.cluster_cidrs.iter().find(|cidr| cidr.contains(&address)) {
            return Some(Refusal::new(
                format!("lies in --cluster-cidr {cidr}, which is the cluster's own"),
                "write an address outside the cluster's networks",
            ));
        }
        if let Some((network, node)) = self.pods.holding(address) {
            return Some(Refusal::new(
                format!(
                    "lies in {network}, where the pods of Node {node} have their addresses (spec.podCIDRs)"
                ),
                "write an address outside the pods' ranges",
            ));
        }
        None
    }
}

/// Why the command line keeps an address from Services of this namespace.
fn outside(address: IpAddr, namespace: &str, settings: &Settings) -> Option<Refusal> {
    let refusal = match external_cidr::check(&settings.external_cidrs, address, namespace).err()? {
        Outside::All(ranges) if ranges.is_empty() => Refusal::new(
            format!("lies in no --external-cidr, and none is for namespace {namespace}"),
            format!("start proxier with --external-cidr {namespace}=CIDR, a range that holds it"),
        ),
        Outside::All(ranges) => Refusal::new(
            format!("lies outside --external-cidr {ranges}"),
            "write an address inside, or start proxier with a range that holds it",
        ),
        Outside::Others(cidr) => Refusal::new(
            format!("lies in --external-cidr {cidr}, which is for other namespaces than {namespace}"),
            format!(
                "write an address of another range, or start proxier with --external-cidr {namespace}={cidr} as well"
            ),
        ),
    };
    Some(refusal)
}

/// That the namespace has as many addresses as it may have.
pub(super) fn beyond(limit: u32, namespace: &str) -> Refusal {
    let addresses = if limit == 1 { "address" } else { "addresses" };
    Refusal {
        kind: ProblemKind::AddressLimitExceeded,
        ..Refusal::new(
            format!(
                "is one more than the {limit} {addresses} that namespace {namespace} may have \
                 (--max-addresses-per-namespace)"
            ),
            "take away an address that an older Service of the namespace claims, or ask for a higher limit",
        )
    }
}

/// The first of those who have an address.
fn first<O: Ord + Default>(owners: &BTreeSet<(IpAddr, O)>, address: IpAddr) -> Option<&O> {
    let (of, owner) = owners.range((address, O::default())..).next()?;
    (*of == address).then_some(owner)
}

/// Addresses from which a process of the node can speak to an external one.
pub(super) fn node_addresses(settings: &Settings) -> BTreeSet<IpAddr> {
    if !settings.node_clients {
        return BTreeSet::new();
    }
    let LocalAddresses { identities, attracting, broadcasts: _ } = &settings.local_addresses;
    identities.union(attracting).copied().filter(|address| is_routable(*address)).collect()
}

/// Whether packets with this address leave the link that they are on.
fn is_routable(address: IpAddr) -> bool {
    is_reserved(address) || never_external(address).is_none()
}

/// Whether it is of the former class E. Most routers and hosts do not forward that; networks of whose nodes all do use it for
/// their own.
fn is_reserved(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.octets()[0] >= 240 && v4 != Ipv4Addr::BROADCAST)
}

/// What an address is, if it can never be an external address, whatever the cluster.
fn never_external(address: IpAddr) -> Option<&'static str> {
    let what = match address {
        IpAddr::V4(v4) if v4 == Ipv4Addr::BROADCAST => "the broadcast address",
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "of the network 0.0.0.0/8, which stands for none",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        _ if is_reserved(address) => "of the reserved network 240.0.0.0/4",
        // The maps keep IPv4 like this, so it would be that IPv4 address.
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "an IPv4 address written as IPv6",
        _ if address.is_unspecified() => "the unspecified address",
        _ if address.is_loopback() => "a loopback address",
        _ if address.is_multicast() => "a multicast address",
        _ => return None,
    };
    Some(what)
}
