//! Keeps [`Desired`] up to date as objects come and go. A change costs what it touches: the Service itself, and those
//! that share an address with it; never all of them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Desired, DesiredService, LocalAddresses, ServiceKey, Settings, complaints,
    counted::Counted,
    ownership::{self, Claims, Standing},
    policy, select,
    taken::{self, Refusal, Taken},
};
use crate::{
    catalog::Catalog,
    model::{
        EndpointSlice, Family, Node, NodeName, Object, ObjectId, ObjectName, Problem, Service, ServiceType,
        Subject,
    },
};

/// Most problems of one subject that are kept. A Service may name a hundred thousand addresses, and none of them be right.
const MAX_PROBLEMS: usize = 100;

/// What this node should have, and everything that it follows from.
///
/// Equal objects and settings lead to an equal state, in whatever order they came.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    catalog: Catalog,
    taken: Taken,
    claims: Claims,
    /// The nodes of all endpoints.
    endpoint_nodes: Counted<NodeName>,
    desired: Desired,
    problems: BTreeMap<Subject, Box<[Problem]>>,
    due: Due,
}

/// What has to be worked out anew.
#[derive(Debug, Default)]
struct Due {
    services: BTreeSet<ObjectName>,
    node_addresses: bool,
    /// Whether anything speaks of this node.
    node_name: bool,
}

/// What differs since the refresh before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Entries of [`Desired::services`] that are new, have changed or have gone.
    pub services: BTreeSet<ServiceKey>,
    /// Services of which any object has changed, or that were looked at again for another reason.
    pub touched: BTreeSet<ObjectName>,
    /// Whether [`Desired::node_addresses`] are others.
    pub node_addresses: bool,
    /// What has other problems than before, or none any more.
    pub subjects: BTreeSet<Subject>,
}

impl Changed {
    /// Whether everything is as it was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { services, touched, node_addresses, subjects } = self;
        services.is_empty() && touched.is_empty() && !node_addresses && subjects.is_empty()
    }
}

impl State {
    /// A state without any object.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            claims: Claims::new(settings.max_externals_per_namespace),
            settings,
            catalog: Catalog::default(),
            taken: Taken::default(),
            endpoint_nodes: Counted::default(),
            desired: Desired::default(),
            problems: BTreeMap::new(),
            due: Due { node_addresses: true, ..Due::default() },
        }
    }

    /// Adds an object, or replaces the one of the same kind and name; the same again changes nothing. Returns whether it is
    /// news: a kubelet writes its Node every few minutes, and hardly ever is anything of it.
    pub fn apply(&mut self, object: Object) -> bool {
        if self.catalog.holds(&object) {
            return false;
        }
        let id = object.id();
        let before = self.catalog.apply(object);
        self.follow(&id, before.as_ref());
        true
    }

    /// Removes an object; one that is not there is removed already. Returns whether it was there.
    pub fn delete(&mut self, id: &ObjectId) -> bool {
        let Some(before) = self.catalog.delete(id) else { return false };
        self.follow(id, Some(&before));
        true
    }

    /// Says what this node's interfaces have now. Returns whether that is news.
    pub fn set_local_addresses(&mut self, addresses: LocalAddresses) -> bool {
        if addresses == self.settings.local_addresses {
            return false;
        }
        let former = std::mem::replace(&mut self.settings.local_addresses, addresses);
        // Each by itself: why a Service may not have an address is told as well.
        let now = &self.settings.local_addresses;
        let changed = &(&former.identities ^ &now.identities) | &(&former.broadcasts ^ &now.broadcasts);
        self.stir(changed);
        self.due.node_addresses = true;
        true
    }

    /// Says at which addresses this node reaches the API server now. Returns whether that is news.
    pub fn set_api_server_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let changed: Vec<_> =
            self.settings.api_server_addresses.symmetric_difference(&addresses).copied().collect();
        self.settings.api_server_addresses = addresses;
        let any = !changed.is_empty();
        self.stir(changed);
        any
    }

    /// Works out what is due, and says what came out different.
    pub fn refresh(&mut self) -> Changed {
        let Due { services, node_addresses, node_name } = std::mem::take(&mut self.due);
        let mut changed = Changed::default();
        for name in &services {
            let assessed = self.catalog.service(name).map(|service| self.assess(service));
            let assessed = assessed.unwrap_or_default();
            self.put_problems(
                Subject::Object(ObjectId::Service(name.clone())),
                assessed.problems,
                &mut changed.subjects,
            );
            for (family, service) in Family::ALL.into_iter().zip(assessed.services) {
                let key = ServiceKey { service: name.clone(), family };
                let services = &mut self.desired.services;
                if services.get(&key).map(|known| &**known) == service.as_ref() {
                    continue;
                }
                match service {
                    Some(service) => services.insert(key.clone(), Arc::new(service)),
                    None => services.remove(&key),
                };
                changed.services.insert(key);
            }
        }
        changed.touched = services;
        if node_addresses {
            let addresses = taken::node_addresses(&self.settings);
            changed.node_addresses = addresses != self.desired.node_addresses;
            self.desired.node_addresses = addresses;
        }
        if node_name && !self.settings.every_node {
            let node = &self.settings.node;
            let problem = complaints::unknown_node(&self.catalog, &self.endpoint_nodes, node);
            let subject = Subject::Object(ObjectId::Node(node.clone()));
            self.put_problems(subject, problem.into_iter().collect(), &mut changed.subjects);
        }
        changed
    }

    /// Every object that has come and not gone.
    #[must_use]
    pub const fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What this node should have, as of the last [`Self::refresh`].
    #[must_use]
    pub const fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The same, for whoever needs nothing else any more.
    #[must_use]
    pub fn into_desired(self) -> Desired {
        self.desired
    }

    /// What it is worked out by.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All that is wrong, as of the last [`Self::refresh`], by subject.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// What is wrong with one subject.
    #[must_use]
    pub fn problems_of(&self, subject: &Subject) -> &[Problem] {
        self.problems.get(subject).map_or(&[], |problems| problems)
    }

    /// Brings the indexes in line with the catalog after an object has changed, and notes what that may change.
    fn follow(&mut self, id: &ObjectId, before: Option<&Object>) {
        match id {
            ObjectId::Service(name) => self.follow_service(name, before.and_then(Object::as_service)),
            ObjectId::EndpointSlice(name) => self.follow_slice(name, before.and_then(Object::as_slice)),
            ObjectId::Node(name) => self.follow_node(name, before.and_then(Object::as_node)),
        }
    }

    fn follow_service(&mut self, name: &ObjectName, before: Option<&Service>) {
        let after = self.catalog.service(name);
        let standing =
            |service: Option<&Service>| service.map(|service| Standing::of(service, &self.settings));
        let contested = self.claims.replace(standing(before).as_ref(), standing(after).as_ref());
        let clusters = self.taken.replace_service(name, before, after);
        self.stir(contested);
        self.stir(clusters);
        self.due.services.insert(name.clone());
    }

    fn follow_slice(&mut self, name: &ObjectName, before: Option<&EndpointSlice>) {
        let after = self.catalog.slice(name);
        let nodes = |slice: Option<&EndpointSlice>| -> Vec<NodeName> {
            let endpoints = slice.into_iter().flat_map(|slice| &slice.endpoints);
            endpoints.filter_map(|endpoint| endpoint.node.clone()).collect()
        };
        self.due.node_name |= !self.endpoint_nodes.replace(nodes(before), nodes(after)).is_empty();
        self.due
            .services
            .extend([before, after].into_iter().flatten().filter_map(|slice| slice.service.clone()));
        let addresses = self.taken.replace_slice(before, after);
        self.stir(addresses);
    }

    fn follow_node(&mut self, name: &NodeName, before: Option<&Node>) {
        let after = self.catalog.node(name);
        self.due.node_name |= before.is_some() != after.is_some();
        let taken::Stirred { addresses, networks } = self.taken.replace_node(name, before, after);
        self.stir(addresses);
        for network in networks {
            self.due
                .services
                .extend(self.claims.claimants_within(network).map(|claimant| claimant.service.clone()));
        }
    }

    /// Has all those worked out anew who claim one of these addresses.
    fn stir(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.due.services.extend(self.claims.claimants(address).map(|claimant| claimant.service.clone()));
        }
    }

    fn put_problems(
        &mut self,
        subject: Subject,
        mut problems: Vec<Problem>,
        changed: &mut BTreeSet<Subject>,
    ) {
        problems.sort();
        if problems.len() > MAX_PROBLEMS {
            let more = problems.split_off(MAX_PROBLEMS);
            problems.push(complaints::more(&subject, &more));
            problems.sort();
        }
        if *self.problems_of(&subject) == *problems {
            return;
        }
        changed.insert(subject.clone());
        if problems.is_empty() {
            self.problems.remove(&subject);
        } else {
            self.problems.insert(subject, problems.into());
        }
    }

    /// What one Service comes to.
    fn assess(&self, service: &Service) -> Assessed {
        let mut assessed = Assessed::default();
        let problems = &mut assessed.problems;
        if service.service_type == ServiceType::ExternalName {
            problems.push(complaints::external_name(service));
            return assessed;
        }
        let claims = ownership::claims(service, &self.settings);
        if claims.is_empty() {
            problems.push(complaints::without_addresses(service));
        }
        let mut owned = BTreeSet::new();
        for claim in claims {
            if let Some(refusal) = self.refuses(&service.name.namespace, claim.address) {
                problems.push(complaints::refused(service, claim, refusal));
                continue;
            }
            match self.owner(claim.address) {
                Some(owner) if *owner != service.name => {
                    problems.push(complaints::conflict(service, claim, owner));
                }
                _ => {
                    owned.insert(claim.address);
                }
            }
        }
        if owned.is_empty() {
            return assessed;
        }

        problems.extend(complaints::without_endpoints(&self.catalog, service, &self.settings));
        let balance = policy::balance(service, problems);
        let delivery = policy::delivery(service, self.settings.delivery, problems);
        for (family, entry) in Family::ALL.into_iter().zip(&mut assessed.services) {
            let externals: BTreeSet<_> =
                owned.iter().copied().filter(|address| Family::of(*address) == family).collect();
            if externals.is_empty() {
                continue;
            }
            let select::LocalPods { pods, draining } =
                select::local_pods(&self.catalog, &service.name, family, &self.settings.node);
            if pods.is_empty() {
                problems.extend(complaints::wrong_family(&self.catalog, service, family, &externals));
            }
            *entry = Some(DesiredService {
                externals,
                pods,
                draining,
                affinity_timeout: service.affinity_timeout(),
                no_backend: self.settings.no_backend,
                balance,
                delivery,
                sources: policy::sources(service, family, problems),
            });
        }
        assessed
    }

    /// Why no Service of `namespace` may have an address that one of them claims.
    fn refuses(&self, namespace: &Arc<str>, address: IpAddr) -> Option<Refusal> {
        self.taken.refuses(address, namespace, &self.settings).or_else(|| {
            let limit = self.claims.exceeded(namespace, address)?;
            Some(taken::beyond(limit, namespace))
        })
    }

    /// Whose an address is: the oldest's of those that may have it.
    fn owner(&self, address: IpAddr) -> Option<&ObjectName> {
        let mut claimants = self.claims.claimants(address).map(|claimant| &claimant.service);
        claimants.find(|claimant| self.refuses(&claimant.namespace, address).is_none())
    }
}

/// What a Service comes to: its entries by [`Family::ALL`], and what is wrong with it.
#[derive(Debug, Default)]
struct Assessed {
    services: [Option<DesiredService>; 2],
    problems: Vec<Problem>,
}

#[cfg(test)]
mod tests;
