//! What this node should have: external addresses, each with the pods on this node that may answer for it.
//!
//! Pure: a function of the objects, the node and the settings, which [`State`] keeps up to date at the price of what
//! changed. Not for how the kernel's tables say it: that is `delta` and `sink::bpf`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    catalog::Catalog,
    model::{Family, NodeName, ObjectName, Problem},
};

mod complaints;
mod counted;
mod external_cidr;
mod networks;
mod ownership;
mod policy;
pub mod select;
mod state;
mod taken;

pub use self::{
    external_cidr::{ExternalCidr, NotAnExternalCidr},
    state::{Changed, State},
};

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

/// How packets reach pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Delivery {
    /// Through the node's stack: its firewall, and network policies that it enforces, see client and pod
    #[default]
    Stack,
    /// Past it, where the pod can be reached so
    Direct,
}

impl Delivery {
    /// The name that the annotation, the flag and commands have for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stack => "stack",
            Self::Direct => "direct",
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
    /// How new conversations reach the pods.
    pub delivery: Delivery,
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
pub enum Scope<K = ServiceKey> {
    /// Any.
    All,
    /// These alone: they are new, have changed or have gone.
    Only(BTreeSet<K>),
}

impl<K: Ord> Scope<K> {
    /// Adds more.
    pub fn extend(&mut self, more: impl IntoIterator<Item = K>) {
        if let Self::Only(keys) = self {
            keys.extend(more);
        }
    }

    /// Nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self::Only(BTreeSet::new())
    }
}

/// Addresses that a node's interfaces have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalAddresses {
    /// Those by which the node is reached: no Service may have them.
    pub identities: BTreeSet<IpAddr>,
    /// Those that may be there to attract traffic alone: external addresses, or the node's as well.
    pub attracting: BTreeSet<IpAddr>,
    /// Those that stand for all who are on one of its links: no Service may have them, and no packet comes from them.
    pub broadcasts: BTreeSet<IpAddr>,
}

impl LocalAddresses {
    const fn none() -> Self {
        Self { identities: BTreeSet::new(), attracting: BTreeSet::new(), broadcasts: BTreeSet::new() }
    }
}

/// What the command line says about it, and what is known about this node beside the objects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's name, as EndpointSlices write it.
    pub node: NodeName,
    /// Whether what is worked out is for every node, of which this may be none.
    pub every_node: bool,
    /// What happens to packets for a Service without pods here.
    pub no_backend: NoBackend,
    /// How packets reach the pods of Services that do not say.
    pub delivery: Delivery,
    /// Addresses that this node's interfaces have now, whether or not a Node object says so.
    pub local_addresses: LocalAddresses,
    /// Whether the node's own processes are clients, as everybody else.
    pub node_clients: bool,
    /// The API server's addresses, as this node reaches it: no Service may have them.
    pub api_server_addresses: BTreeSet<IpAddr>,
    /// Networks of the cluster itself, its pods' and Services': no external address lies there.
    pub cluster_cidrs: Vec<IpNet>,
    /// Where external addresses may lie, and whose; anywhere and anybody's if there is none.
    pub external_cidrs: Vec<ExternalCidr>,
    /// How many addresses the Services of a namespace may have together.
    pub max_externals_per_namespace: Option<u32>,
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
            every_node: false,
            no_backend: NoBackend::Drop,
            delivery: Delivery::Stack,
            local_addresses: LocalAddresses::none(),
            node_clients: false,
            api_server_addresses: BTreeSet::new(),
            cluster_cidrs: Vec::new(),
            external_cidrs: Vec::new(),
            max_externals_per_namespace: None,
            external_ips: true,
            load_balancer_ips: true,
        }
    }
}

/// Works out from nothing what this node should have, and what of it cannot be.
///
/// The result depends on the objects in the catalog only, not on the order in which they came. Whoever follows changes
/// keeps a [`State`] instead.
#[must_use]
pub fn compute(catalog: &Catalog, settings: &Settings) -> (Desired, Vec<Problem>) {
    let mut state = State::new(settings.clone());
    for object in catalog.objects() {
        state.apply(object);
    }
    state.refresh();
    let mut problems: Vec<_> = state.problems().cloned().collect();
    problems.sort();
    (state.into_desired(), problems)
}

#[cfg(test)]
mod tests;
