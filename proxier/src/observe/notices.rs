//! What is worth an Event: that a Service's addresses lead to pods on this node, or no longer do; what is wrong with it; that
//! the kernel has no room for it. On transitions only. Pure; `events` publishes.

use std::{
    collections::BTreeMap,
    fmt::Display,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use super::{changes::Change, few::first_of};
use crate::{
    catalog::Catalog,
    desired::{Desired, DesiredService, NoBackend},
    model::{NodeName, ObjectId, ObjectName, Problem, ProblemKind, Severity, Subject},
};

/// How many nodes tell what is wrong with a Service that has no pods.
const TELLERS: usize = 3;

/// More addresses than this in one sentence nobody reads.
const MAX_ADDRESSES: usize = 8;

/// Something that a Service's owner should see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The Service.
    pub service: ObjectName,
    /// Its uid; empty if it has none.
    pub uid: String,
    /// Why.
    pub reason: Reason,
    /// The same as a sentence, with the particulars.
    pub note: String,
}

/// Why there is an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// External addresses lead to pods on this node.
    Programmed,
    /// They have, and the last of these pods has gone.
    NoLocalEndpoint,
    /// The kernel's tables have no room for all of it.
    TableFull,
    /// Something is wrong with the Service.
    Problem(ProblemKind),
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All is well.
    Normal,
    /// Somebody should look.
    Warning,
}

impl Reason {
    /// As Events have it. Never changes: people filter by it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Programmed => "Programmed",
            Self::NoLocalEndpoint => "NoLocalEndpoint",
            Self::TableFull => "TableFull",
            Self::Problem(kind) => kind.reason(),
        }
    }

    /// Whether it may be over in a moment.
    #[must_use]
    pub const fn may_pass(self) -> bool {
        matches!(self, Self::Problem(ProblemKind::NoEndpoints | ProblemKind::NoEndpointsOfFamily))
    }

    /// What was being done.
    #[must_use]
    pub const fn action(self) -> &'static str {
        match self {
            Self::Programmed | Self::NoLocalEndpoint | Self::TableFull => "Program",
            Self::Problem(_) => "Validate",
        }
    }

    /// How much it matters.
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self {
            Self::Programmed => Kind::Normal,
            Self::NoLocalEndpoint | Self::TableFull | Self::Problem(_) => Kind::Warning,
        }
    }
}

/// What the kernel does differently now from `before`.
///
/// That a Service never had a pod here is none: on most nodes of a cluster that is so.
#[must_use]
pub fn of_changes(
    changes: &[Change<'_>],
    before: &Desired,
    catalog: &Catalog,
    node: &NodeName,
) -> Vec<Notice> {
    // The families of a Service are one Event.
    let mut found: BTreeMap<(&ObjectName, Reason), Vec<&DesiredService>> = BTreeMap::new();
    for change in changes {
        let (key, service) = match change {
            Change::Programmed(key, service)
            | Change::Changed(key, service)
            | Change::WithoutPods(key, service) => (*key, *service),
            Change::Withdrawn(..) => continue,
        };
        let known = before.services.get(key);
        let had_pods = known.is_some_and(|known| !known.pods.is_empty());
        let reason = match (service.pods.is_empty(), had_pods) {
            (true, true) => Reason::NoLocalEndpoint,
            (false, false) => Reason::Programmed,
            (false, true) if known.is_some_and(|known| known.externals != service.externals) => {
                Reason::Programmed
            }
            _ => continue,
        };
        found.entry((&key.service, reason)).or_default().push(service);
    }
    let notice = |((name, reason), services): ((&ObjectName, Reason), Vec<&DesiredService>)| {
        let externals = list(services.iter().flat_map(|service| &service.externals));
        let note = if reason == Reason::Programmed {
            let pods = list(services.iter().flat_map(|service| &service.pods));
            format!("{externals}: all ports and protocols lead to the pods {pods} on node {node}")
        } else {
            let happens = match services[0].no_backend {
                NoBackend::Drop => "dropped",
                NoBackend::Pass => "left to the rest of the node",
            };
            format!(
                "{externals}: the last pod on node {node} has gone; packets that arrive there are {happens}"
            )
        };
        of_service(name, reason, note, catalog)
    };
    found.into_iter().map(notice).collect()
}

/// That something is wrong with a Service, if this node is to tell.
///
/// All nodes see the same. Should some of them run pods of the Service, the first of those by name tells; else [`TELLERS`] of all,
/// others for each Service: on some nodes no agent may run. Without Nodes, all tell.
#[must_use]
pub fn of_problem(problem: &Problem, catalog: &Catalog, node: &NodeName) -> Option<Notice> {
    let Subject::Object(ObjectId::Service(name)) = &problem.subject else { return None };
    if problem.severity == Severity::Info || !tells(name, catalog, node) {
        return None;
    }
    Some(of_service(name, Reason::Problem(problem.kind), sentence(problem), catalog))
}

/// Whether `node` is among those that tell what is wrong with a Service.
fn tells(name: &ObjectName, catalog: &Catalog, node: &NodeName) -> bool {
    let endpoints = catalog.slices_of(name).flat_map(|slice| slice.endpoints.iter());
    if let Some(first) = endpoints.filter_map(|endpoint| endpoint.node.as_ref()).min() {
        return first == node;
    }
    // Rendezvous hashing: every node comes to the same result without asking.
    let weight = |node: &NodeName| {
        let mut hasher = DefaultHasher::new();
        (name, node).hash(&mut hasher);
        hasher.finish()
    };
    let own = weight(node);
    catalog.nodes().filter(|other| weight(&other.name) < own).count() < TELLERS
}

/// That the kernel has no room, as its sink says it.
#[must_use]
pub fn table_full(name: &ObjectName, message: &str, catalog: &Catalog, node: &NodeName) -> Notice {
    of_service(name, Reason::TableFull, format!("on node {node}: {message}"), catalog)
}

fn of_service(name: &ObjectName, reason: Reason, note: String, catalog: &Catalog) -> Notice {
    let uid = catalog.service(name).map(|service| service.uid.to_string()).unwrap_or_default();
    Notice { service: name.clone(), uid, reason, note }
}

/// A problem without what an Event says anyway.
fn sentence(problem: &Problem) -> String {
    let Problem { field, value, reason, next_step, .. } = problem;
    let value = value.as_ref().map(|value| format!("{value:?}"));
    let parts = [Some(field.clone()).filter(|field| !field.is_empty()), value, Some(reason.clone())];
    format!("{}; {next_step}", parts.into_iter().flatten().collect::<Vec<_>>().join(" "))
}

fn list<T: Display>(items: impl Iterator<Item = T>) -> String {
    first_of(items, MAX_ADDRESSES, ", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        desired::{Scope, Settings, compute},
        model::{
            Object,
            testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice},
        },
        observe::changes::between,
    };

    fn settings() -> Settings {
        Settings::new(NodeName::new("node1"))
    }

    /// A Service with both families and these pods.
    fn cluster(pods: &[(&str, &str)]) -> Catalog {
        let mut catalog = Catalog::default();
        let mut objects: Vec<Object> = vec![mk_service("web", ["10.0.0.55", "1000::55"]).into()];
        for (index, (address, node)) in pods.iter().enumerate() {
            objects.push(mk_slice(&format!("web-{index}"), "web", [mk_endpoint(address, node)]).into());
        }
        for object in objects {
            catalog.apply(object);
        }
        catalog
    }

    fn notices(before: &Catalog, after: &Catalog) -> Vec<(&'static str, String)> {
        let (before, _) = compute(before, &settings());
        let (desired, _) = compute(after, &settings());
        let changes = between(&before, &desired, &Scope::All);
        of_changes(&changes, &before, after, &settings().node)
            .into_iter()
            .map(|notice| (notice.reason.name(), notice.note))
            .collect()
    }

    #[test]
    fn a_service_with_both_families_is_one_notice() {
        let nothing = Catalog::default();
        let web = cluster(&[("11.0.2.2", "node1"), ("1100::202", "node1")]);
        let expected =
            "10.0.0.55, 1000::55: all ports and protocols lead to the pods 11.0.2.2, 1100::202 on node node1";
        assert_eq!(notices(&nothing, &web), [("Programmed", expected.to_owned())]);
        assert_eq!(notices(&web, &web), []);
    }

    #[test]
    fn the_last_pod_that_goes_is_told_and_a_service_that_never_had_one_is_not() {
        let here = cluster(&[("11.0.2.2", "node1")]);
        let elsewhere = cluster(&[("11.0.1.2", "node2")]);
        let told = notices(&here, &elsewhere);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, "NoLocalEndpoint");
        assert!(told[0].1.contains("10.0.0.55: the last pod on node node1 has gone"), "{told:?}");
        assert_eq!(notices(&Catalog::default(), &elsewhere), []);
        assert_eq!(notices(&elsewhere, &here)[0].0, "Programmed");
    }

    fn told_by(node: &str, catalog: &Catalog) -> Vec<Notice> {
        let (_, problems) = compute(catalog, &settings());
        let subject = Subject::Object(ObjectId::Service(mk_name("web")));
        let of_web = problems.iter().filter(|problem| problem.subject == subject);
        let node = NodeName::new(node);
        of_web.filter_map(|problem| of_problem(problem, catalog, &node)).collect()
    }

    #[test]
    fn one_node_with_a_pod_tells_what_is_wrong() {
        let mut catalog = cluster(&[("11.0.1.2", "node1"), ("11.0.2.2", "node2"), ("1100::2", "node2")]);
        catalog.apply(mk_service("web", ["10.0.0.55", "127.0.0.1"]).into());
        let told = told_by("node1", &catalog);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].reason.name(), "AddressRejected");
        assert!(
            told[0].note.starts_with("spec.externalIPs[1] \"127.0.0.1\" is a loopback address"),
            "{told:?}"
        );
        assert_eq!(told_by("node2", &catalog), []);
    }

    #[test]
    fn of_a_hundred_nodes_without_a_pod_three_tell_what_is_wrong() {
        let mut lonely = cluster(&[]);
        let nodes: Vec<String> = (0..100).map(|number| format!("node{number}")).collect();
        let tellers =
            |catalog: &Catalog| nodes.iter().filter(|node| !told_by(node, catalog).is_empty()).count();
        assert_eq!(tellers(&lonely), 100, "without Nodes");
        for node in &nodes {
            lonely.apply(mk_node(node, []).into());
        }
        assert_eq!(tellers(&lonely), TELLERS);
        let notice = nodes.iter().flat_map(|node| told_by(node, &lonely)).next().unwrap();
        assert!(notice.reason.name() == "NoEndpoints" && notice.reason.may_pass());
    }
}
