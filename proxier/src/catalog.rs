//! Joins Services, EndpointSlices and Nodes, whatever the order in which they come. Synchronous, no I/O, no clock;
//! what a node should do with them is `desired`'s business.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::model::{EndpointSlice, Node, NodeName, Object, ObjectId, ObjectName, Service};

/// Every object that the sources have delivered.
///
/// Equal if the objects are, whatever happened before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    nodes: BTreeMap<NodeName, Node>,
    slices_by_service: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
}

impl Catalog {
    /// Adds an object, or replaces the one of the same kind and name.
    pub fn apply(&mut self, object: Object) {
        match object {
            Object::Service(service) => {
                self.services.insert(service.name.clone(), *service);
            }
            Object::EndpointSlice(slice) => {
                // The label that ties a slice to its Service can change.
                self.delete_slice(&slice.name);
                if let Some(service) = &slice.service {
                    self.slices_by_service.entry(service.clone()).or_default().insert(slice.name.clone());
                }
                self.slices.insert(slice.name.clone(), slice);
            }
            Object::Node(node) => {
                self.nodes.insert(node.name.clone(), node);
            }
        }
    }

    /// Removes an object; one that is not there is removed already.
    pub fn delete(&mut self, id: &ObjectId) {
        match id {
            ObjectId::Service(name) => {
                self.services.remove(name);
            }
            ObjectId::EndpointSlice(name) => self.delete_slice(name),
            ObjectId::Node(name) => {
                self.nodes.remove(name);
            }
        }
    }

    fn delete_slice(&mut self, name: &ObjectName) {
        let Some(slice) = self.slices.remove(name) else { return };
        let Some(service) = slice.service else { return };
        if let Some(names) = self.slices_by_service.get_mut(&service) {
            names.remove(name);
            if names.is_empty() {
                self.slices_by_service.remove(&service);
            }
        }
    }

    /// All Services, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// A Service.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// The slices of a Service, by name. They may be there before the Service is.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_by_service.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name))
    }

    /// A slice.
    #[must_use]
    pub fn slice(&self, name: &ObjectName) -> Option<&EndpointSlice> {
        self.slices.get(name)
    }

    /// All slices, also those of no Service.
    pub fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.values()
    }

    /// All Nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Every address of every endpoint, of all nodes.
    #[must_use]
    pub fn endpoint_addresses(&self) -> BTreeSet<IpAddr> {
        self.slices()
            .flat_map(|slice| &slice.endpoints)
            .flat_map(|endpoint| &endpoint.addresses)
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice};

    fn slice_names(catalog: &Catalog, service: &str) -> Vec<String> {
        catalog.slices_of(&mk_name(service)).map(|slice| slice.name.name.clone()).collect()
    }

    #[test]
    fn a_slice_that_comes_before_its_service_is_joined() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        catalog.apply(mk_service("web", ["10.0.0.55"]).into());
        assert_eq!(slice_names(&catalog, "web"), ["web-1"]);
    }

    #[test]
    fn all_slices_of_a_service_are_joined_and_no_other() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        catalog.apply(mk_slice("web-2", "web", [mk_endpoint("1100::202", "node1")]).into());
        catalog.apply(mk_slice("mail-1", "mail", [mk_endpoint("11.0.2.9", "node1")]).into());
        assert_eq!(slice_names(&catalog, "web"), ["web-1", "web-2"]);
        assert_eq!(slice_names(&catalog, "mail"), ["mail-1"]);
    }

    #[test]
    fn a_slice_whose_label_changes_moves_to_the_other_service() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_slice("x", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        catalog.apply(mk_slice("x", "mail", [mk_endpoint("11.0.2.2", "node1")]).into());
        assert_eq!(slice_names(&catalog, "web"), [""; 0]);
        assert_eq!(slice_names(&catalog, "mail"), ["x"]);
    }

    #[test]
    fn a_deleted_service_leaves_its_slices_for_the_next_of_its_name() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_service("web", ["10.0.0.55"]).into());
        catalog.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        catalog.delete(&ObjectId::Service(mk_name("web")));
        assert_eq!(catalog.services().count(), 0);
        assert_eq!(slice_names(&catalog, "web"), ["web-1"]);
    }

    #[test]
    fn what_was_applied_and_deleted_leaves_nothing_behind() {
        let mut catalog = Catalog::default();
        let objects: [Object; 3] = [
            mk_service("web", ["10.0.0.55"]).into(),
            mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into(),
            mk_node("node1", ["192.168.1.1"]).into(),
        ];
        for object in &objects {
            catalog.apply(object.clone());
        }
        assert_ne!(catalog, Catalog::default());
        for object in &objects {
            catalog.delete(&object.id());
        }
        assert_eq!(catalog, Catalog::default());
    }
}
