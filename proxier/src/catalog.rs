//! Joins Services, EndpointSlices and Nodes, whatever the order in which they come. Synchronous, no I/O, no clock;
//! what a node should do with them is `desired`'s business.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use crate::model::{EndpointSlice, Node, NodeName, Object, ObjectId, ObjectName, Service};

/// Every object that the sources have delivered.
///
/// Equal if the objects are, whatever happened before.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    services: BTreeMap<ObjectName, Box<Service>>,
    slices: BTreeMap<ObjectName, Box<EndpointSlice>>,
    nodes: BTreeMap<NodeName, Node>,
    /// The Service of each slice that has one, and the slice. Flat: a set for every Service costs several times as much.
    slices_by_service: BTreeSet<(ObjectName, ObjectName)>,
    names: Names,
}

impl Catalog {
    /// Adds an object, or replaces the one of the same kind and name, which it returns.
    pub fn apply(&mut self, mut object: Object) -> Option<Object> {
        self.names.share_all(&mut object);
        match object {
            Object::Service(service) => {
                self.services.insert(service.name.clone(), service).map(Object::Service)
            }
            Object::EndpointSlice(slice) => {
                // The label that ties a slice to its Service can change.
                let former = self.delete_slice(&slice.name);
                if let Some(service) = &slice.service {
                    self.slices_by_service.insert((service.clone(), slice.name.clone()));
                }
                self.slices.insert(slice.name.clone(), Box::new(slice));
                former
            }
            Object::Node(node) => self.nodes.insert(node.name.clone(), node).map(Object::Node),
        }
    }

    /// Removes an object, and returns it; one that is not there is removed already.
    pub fn delete(&mut self, id: &ObjectId) -> Option<Object> {
        match id {
            ObjectId::Service(name) => self.services.remove(name).map(Object::Service),
            ObjectId::EndpointSlice(name) => self.delete_slice(name),
            ObjectId::Node(name) => self.nodes.remove(name).map(Object::Node),
        }
    }

    fn delete_slice(&mut self, name: &ObjectName) -> Option<Object> {
        let slice = self.slices.remove(name)?;
        if let Some(service) = &slice.service {
            self.slices_by_service.remove(&(service.clone(), name.clone()));
        }
        Some(Object::EndpointSlice(*slice))
    }

    /// Whether an object is there, and the same.
    #[must_use]
    pub fn holds(&self, object: &Object) -> bool {
        match object {
            Object::Service(service) => self.service(&service.name) == Some(service),
            Object::EndpointSlice(slice) => self.slice(&slice.name) == Some(slice),
            Object::Node(node) => self.node(&node.name) == Some(node),
        }
    }

    /// Every object: Services, then slices, then Nodes.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let services = self.services.values().cloned().map(Object::Service);
        let slices = self.slices().cloned().map(Object::EndpointSlice);
        services.chain(slices).chain(self.nodes().cloned().map(Object::Node))
    }

    /// All Services, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(|service| &**service)
    }

    /// A Service.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// The slices of a Service, by name. They may be there before the Service is.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_by_service
            .range((service.clone(), ObjectName::default())..)
            .take_while(move |(of, _)| of == service)
            .filter_map(|(_, name)| self.slice(name))
    }

    /// A slice.
    #[must_use]
    pub fn slice(&self, name: &ObjectName) -> Option<&EndpointSlice> {
        self.slices.get(name).map(|slice| &**slice)
    }

    /// All slices, also those of no Service.
    pub fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.values().map(|slice| &**slice)
    }

    /// All Nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// A Node.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&Node> {
        self.nodes.get(name)
    }
}

impl PartialEq for Catalog {
    fn eq(&self, other: &Self) -> bool {
        let Self { services, slices, nodes, slices_by_service: _, names: _ } = self;
        *services == other.services && *slices == other.slices && *nodes == other.nodes
    }
}

impl Eq for Catalog {}

/// Texts that many objects have in common, each kept once: of nodes, namespaces and Services. What tens of thousands of
/// endpoints say about their node is a pointer each.
#[derive(Clone, Debug, Default)]
struct Names {
    known: HashSet<Arc<str>>,
    /// When it has grown to this, those that nobody has any more are forgotten.
    sweep_at: usize,
}

impl Names {
    /// Fewer are not worth looking through.
    const FEW: usize = 64;

    fn share_all(&mut self, object: &mut Object) {
        match object {
            Object::Service(service) => self.share_name(&mut service.name),
            Object::EndpointSlice(slice) => {
                self.share(&mut slice.name.namespace);
                if let Some(service) = &mut slice.service {
                    self.share_name(service);
                }
                for endpoint in &mut slice.endpoints {
                    if let Some(node) = &mut endpoint.node {
                        self.share(node.shared_mut());
                    }
                    // A pod's own name is its own.
                    if let Some(target) = &mut endpoint.target {
                        self.share(&mut target.namespace);
                    }
                }
            }
            Object::Node(node) => self.share(node.name.shared_mut()),
        }
        if self.known.len() >= self.sweep_at.max(Self::FEW) {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = self.known.len() * 2;
        }
    }

    fn share_name(&mut self, name: &mut ObjectName) {
        self.share(&mut name.namespace);
        self.share(&mut name.name);
    }

    fn share(&mut self, text: &mut Arc<str>) {
        match self.known.get(text) {
            Some(known) => text.clone_from(known),
            None => {
                self.known.insert(Arc::clone(text));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice};

    fn slice_names(catalog: &Catalog, service: &str) -> Vec<String> {
        catalog.slices_of(&mk_name(service)).map(|slice| slice.name.name.to_string()).collect()
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

    #[test]
    fn what_was_there_is_handed_back_and_the_same_again_is_known_to_be_the_same() {
        let mut catalog = Catalog::default();
        for (old, new) in [
            (mk_service("web", ["10.0.0.55"]).into(), mk_service("web", ["10.0.0.56"]).into()),
            (
                Object::from(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")])),
                mk_slice("web-1", "mail", [mk_endpoint("11.0.2.2", "node1")]).into(),
            ),
            (mk_node("node1", ["192.168.1.1"]).into(), mk_node("node1", []).into()),
        ] {
            assert_eq!((catalog.holds(&old), catalog.apply(old.clone())), (false, None));
            assert_eq!((catalog.holds(&old), catalog.holds(&new)), (true, false));
            assert_eq!(catalog.apply(new.clone()), Some(old));
            assert_eq!(catalog.delete(&new.id()), Some(new.clone()));
            assert_eq!(catalog.delete(&new.id()), None);
        }
    }

    #[test]
    fn names_that_many_objects_have_are_kept_once_and_no_longer_than_anybody_has_them() {
        let mut catalog = Catalog::default();
        let slice =
            |n: usize| mk_slice(&format!("s{n}"), "web", [mk_endpoint("11.0.2.2", &format!("n{}", n % 2))]);
        for n in 0..1_000 {
            catalog.apply(slice(n).into());
        }
        let node =
            |n: usize| catalog.slice(&mk_name(&format!("s{n}"))).unwrap().endpoints[0].node.clone().unwrap();
        assert!(std::ptr::eq(node(0).as_str(), node(998).as_str()));
        assert!(!std::ptr::eq(node(0).as_str(), node(999).as_str()));

        for n in 0..1_000 {
            catalog.apply(mk_node(&format!("node{n}"), []).into());
            catalog.delete(&ObjectId::Node(NodeName::new(format!("node{n}"))));
        }
        assert!(catalog.names.known.len() <= 2 * Names::FEW, "{} names", catalog.names.known.len());
    }
}
