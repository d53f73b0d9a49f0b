//! What this node should have: external addresses, each with the pods on this node that may answer for it.
//!
//! Pure: a function of the catalog, the node and the settings. Not for how the kernel's tables say it: that is
//! `delta` and `sink::bpf`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    catalog::Catalog,
    model::{Family, NodeName, ObjectId, ObjectName, Problem, Service, ServiceType, Severity, Subject},
};

pub mod ownership;
mod policy;
pub mod select;

/// One Service in one address family: what shares backends, sessions and an id in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// The Service's namespace and name.
    pub service: ObjectName,
    /// The family of its external addresses and pods.
    pub family: Family,
}

/// What a node does with packets for a Service that has no pod on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum NoBackend {
    /// Drop and count them, as `externalTrafficPolicy: Local` does.
    #[default]
    Drop,
    /// Leave them to the rest of the node.
    Pass,
}

/// What stays on one pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// All that a client says: protocols like FTP and SIP span several conversations.
    #[default]
    Client,
    /// One conversation of a client.
    Flow,
}

impl Balance {
    /// The name that the annotation and commands have for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Flow => "flow",
        }
    }
}

/// What the kernel should do for one [`ServiceKey`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredService {
    /// The external addresses that this Service owns. All of the key's family.
    pub externals: BTreeSet<IpAddr>,
    /// Addresses of the pods on this node that take new conversations. All of the key's family. May be empty.
    pub pods: BTreeSet<IpAddr>,
    /// Addresses of the other pods of the Service on this node, which are not ready or about to end: they keep the
    /// conversations that they have, and get no new ones. All of the key's family.
    pub draining: BTreeSet<IpAddr>,
    /// How long an idle client keeps its pod, in seconds.
    pub affinity_timeout: u32,
    /// What happens without pods.
    pub no_backend: NoBackend,
    /// What stays on one pod.
    pub balance: Balance,
    /// Who may send; `None` for everybody. All of the key's family: empty for nobody of it.
    pub sources: Option<BTreeSet<IpNet>>,
}

impl DesiredService {
    /// Whether a pod is there, draining or not.
    #[must_use]
    pub fn has(&self, pod: IpAddr) -> bool {
        self.pods.contains(&pod) || self.draining.contains(&pod)
    }
}

/// What the kernel should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// By Service and family. A Service without external address of a family is not there. Shared: who keeps an earlier state
    /// keeps what has not changed since only once.
    pub services: BTreeMap<ServiceKey, Arc<DesiredService>>,
    /// The node's own addresses, from which its processes may speak to external ones. One that a Service has is the
    /// Service's all the same.
    pub node_addresses: BTreeSet<IpAddr>,
}

/// Which Services may differ from what somebody was given last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Any.
    All,
    /// These alone: they are new, have changed or have gone.
    Only(BTreeSet<ServiceKey>),
}

/// Addresses that a node's interfaces have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalAddresses {
    /// Those by which the node is reached: no Service may have them.
    pub identities: BTreeSet<IpAddr>,
    /// Those that may be there to attract traffic alone: external addresses, or the node's as well.
    pub attracting: BTreeSet<IpAddr>,
}

/// What the command line says about it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's name, as EndpointSlices write it.
    pub node: NodeName,
    /// What happens to packets for a Service without pods here.
    pub no_backend: NoBackend,
    /// Addresses that this node's interfaces have now, whether or not a Node object says so.
    pub local_addresses: LocalAddresses,
    /// Whether the node's own processes are clients, as everybody else.
    pub node_clients: bool,
    /// Where external addresses may lie; anywhere if there is none.
    pub external_cidrs: Vec<IpNet>,
    /// Whether `spec.externalIPs` count.
    pub external_ips: bool,
    /// Whether `status.loadBalancer.ingress` counts.
    pub load_balancer_ips: bool,
}

impl Settings {
    /// Everything as the command line has it without flags.
    #[must_use]
    pub const fn new(node: NodeName) -> Self {
        Self {
            node,
            no_backend: NoBackend::Drop,
            local_addresses: LocalAddresses { identities: BTreeSet::new(), attracting: BTreeSet::new() },
            node_clients: false,
            external_cidrs: Vec::new(),
            external_ips: true,
            load_balancer_ips: true,
        }
    }
}

/// Works out what this node should have, and what of it cannot be.
///
/// The result depends on the objects in the catalog only, not on the order in which they came.
#[must_use]
pub fn compute(catalog: &Catalog, settings: &Settings) -> (Desired, Vec<Problem>) {
    let mut problems = Vec::new();
    let mut claims = Vec::new();
    for service in catalog.services() {
        if may_be_served(service, &mut problems) {
            claims.extend(ownership::claims(service, settings, &mut problems));
        }
    }
    let owned = ownership::settle(claims, catalog, settings, &mut problems);

    let mut desired = Desired { node_addresses: node_addresses(settings), ..Desired::default() };
    for (service, externals) in owned {
        problems.extend(without_endpoints(catalog, service, settings));
        let balance = policy::balance(service, &mut problems);
        for family in Family::ALL {
            let externals: BTreeSet<_> =
                externals.iter().copied().filter(|address| Family::of(*address) == family).collect();
            if externals.is_empty() {
                continue;
            }
            let select::LocalPods { pods, draining } =
                select::local_pods(catalog, &service.name, family, &settings.node);
            if pods.is_empty() {
                problems.extend(wrong_family(catalog, service, family, &externals));
            }
            desired.services.insert(
                ServiceKey { service: service.name.clone(), family },
                Arc::new(DesiredService {
                    externals,
                    pods,
                    draining,
                    affinity_timeout: service.affinity_timeout(),
                    no_backend: settings.no_backend,
                    balance,
                    sources: policy::sources(service, family, &mut problems),
                }),
            );
        }
    }
    problems.extend(unknown_node(catalog, &settings.node));
    problems.sort();
    (desired, problems)
}

/// Addresses from which a process of the node can speak to an external one.
fn node_addresses(settings: &Settings) -> BTreeSet<IpAddr> {
    if !settings.node_clients {
        return BTreeSet::new();
    }
    let LocalAddresses { identities, attracting } = &settings.local_addresses;
    identities.union(attracting).copied().filter(|address| ownership::is_routable(*address)).collect()
}

/// Whether proxier can do what the Service asks for. What it cannot do must not be left out silently.
fn may_be_served(service: &Service, problems: &mut Vec<Problem>) -> bool {
    if service.service_type == ServiceType::ExternalName {
        problems.push(
            Problem::new(
                Severity::Warning,
                Subject::Object(ObjectId::Service(service.name.clone())),
                "is a DNS alias without pods: none of its addresses is taken",
                "give it another type",
            )
            .in_field("spec.type", service.service_type.to_string()),
        );
        return false;
    }
    true
}

/// More names than this are no help.
const MAX_NODE_NAMES: usize = 5;

/// If nothing speaks of this node, says so: with a slip in its name all goes well, and no pod is ever local.
fn unknown_node(catalog: &Catalog, node: &NodeName) -> Option<Problem> {
    let nodes = || catalog.nodes().map(|node| &node.name);
    let of_endpoints = || {
        let endpoints = catalog.slices().flat_map(|slice| &slice.endpoints);
        endpoints.filter_map(|endpoint| endpoint.node.as_ref())
    };
    if nodes().chain(of_endpoints()).any(|known| known == node) {
        return None;
    }
    let known: BTreeSet<&NodeName> = nodes().chain(of_endpoints()).collect();
    if known.is_empty() {
        return None;
    }
    let mut names: Vec<_> = known.iter().take(MAX_NODE_NAMES).map(|name| name.as_str()).collect();
    if known.len() > names.len() {
        names.push("...");
    }
    // Without Nodes, this one may just have no pod.
    let severity = if nodes().next().is_some() { Severity::Warning } else { Severity::Info };
    Some(Problem::new(
        severity,
        Subject::Object(ObjectId::Node(node.clone())),
        "is this node's name, and no Node and no endpoint has it: no pod is local",
        format!("check --node-name (NODE_NAME); names that there are: {}", names.join(", ")),
    ))
}

/// If no node has a pod of the Service, says so: that its pods are on other nodes, or about to start, is no mistake.
fn without_endpoints(catalog: &Catalog, service: &Service, settings: &Settings) -> Option<Problem> {
    if catalog.slices_of(&service.name).any(|slice| !slice.endpoints.is_empty()) {
        return None;
    }
    let happens = match settings.no_backend {
        NoBackend::Drop => "dropped",
        NoBackend::Pass => "left to the rest of the node",
    };
    let ObjectName { namespace, name } = &service.name;
    Some(Problem::new(
        Severity::Warning,
        Subject::Object(ObjectId::Service(service.name.clone())),
        format!("has no endpoint on any node: packets for its external addresses are {happens}"),
        format!(
            "check that its selector matches pods, or write an EndpointSlice in namespace {namespace} with the label \
             kubernetes.io/service-name: {name}"
        ),
    ))
}

/// If the Service has pods, but of the other family alone, says so: the usual cause is a single-stack Service.
fn wrong_family(
    catalog: &Catalog,
    service: &Service,
    family: Family,
    externals: &BTreeSet<IpAddr>,
) -> Option<Problem> {
    let mut slices = catalog.slices_of(&service.name).filter(|slice| !slice.endpoints.is_empty()).peekable();
    let other = slices.peek()?.family;
    if slices.any(|slice| slice.family == family) {
        return None;
    }
    let addresses: Vec<_> = externals.iter().map(ToString::to_string).collect();
    Some(
        Problem::new(
            Severity::Warning,
            Subject::Object(ObjectId::Service(service.name.clone())),
            format!("has no pod to go to: the Service's pods have {other} addresses only"),
            format!("set spec.ipFamilyPolicy to PreferDualStack, or take the {family} address away"),
        )
        .in_field(format!("the external {family} address"), addresses.join(", ")),
    )
}

#[cfg(test)]
mod tests;
