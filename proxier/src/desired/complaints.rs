//! What may be wrong with a Service, or with the node's name, in words. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use super::{NoBackend, Settings, counted::Counted, ownership::Claim, taken::Refusal};
use crate::{
    catalog::Catalog,
    model::{Family, NodeName, ObjectId, ObjectName, Problem, ProblemKind, Service, Severity, Subject},
};

/// More names than this are no help.
const MAX_NODE_NAMES: usize = 5;

fn of_service(
    severity: Severity,
    service: &Service,
    kind: ProblemKind,
    reason: impl Into<String>,
    next_step: impl Into<String>,
) -> Problem {
    let subject = Subject::Object(ObjectId::Service(service.name.clone()));
    Problem::new(severity, subject, reason, next_step).of_kind(kind)
}

/// Something about a Service is not in force.
pub(super) fn warning(
    service: &Service,
    kind: ProblemKind,
    reason: impl Into<String>,
    next_step: impl Into<String>,
) -> Problem {
    of_service(Severity::Warning, service, kind, reason, next_step)
}

/// There are more than anybody reads.
pub(super) fn more(subject: &Subject, problems: &[Problem]) -> Problem {
    let kind = problems.first().map_or(ProblemKind::Invalid, |problem| problem.kind);
    let reason = format!("has {} more problems like those that are told", problems.len());
    Problem::new(Severity::Warning, subject.clone(), reason, "mend those first").of_kind(kind)
}

/// It is a DNS alias: what proxier cannot do must not be left out silently.
pub(super) fn external_name(service: &Service) -> Problem {
    warning(
        service,
        ProblemKind::Unsupported,
        "is a DNS alias without pods: none of its addresses is taken",
        "give it another type",
    )
    .in_field("spec.type", service.service_type.to_string())
}

/// It claims nothing, though its label says that it wants to.
pub(super) fn without_addresses(service: &Service) -> Problem {
    of_service(
        Severity::Info,
        service,
        ProblemKind::NoExternalAddress,
        "has no external address: nothing is delivered",
        "write spec.externalIPs, or let a load balancer set status.loadBalancer.ingress",
    )
}

/// It may not have this address.
pub(super) fn refused(service: &Service, claim: Claim, refusal: Refusal) -> Problem {
    warning(service, refusal.kind, refusal.reason, refusal.next_step)
        .in_field(claim.field, claim.address.to_string())
}

/// Another Service has this address.
pub(super) fn conflict(service: &Service, claim: Claim, owner: &ObjectName) -> Problem {
    warning(
        service,
        ProblemKind::AddressConflict,
        format!(
            "belongs to Service {owner}, which comes first (older, or before it by name), until that goes"
        ),
        "give one of the two another address",
    )
    .in_field(claim.field, claim.address.to_string())
}

/// If nothing speaks of this node, says so: with a slip in its name all goes well, and no pod is ever local.
pub(super) fn unknown_node(
    catalog: &Catalog,
    of_endpoints: &Counted<NodeName>,
    node: &NodeName,
) -> Option<Problem> {
    if catalog.node(node).is_some() || of_endpoints.contains(node) {
        return None;
    }
    let known: BTreeSet<&NodeName> =
        catalog.nodes().map(|node| &node.name).chain(of_endpoints.iter()).collect();
    if known.is_empty() {
        return None;
    }
    let mut names: Vec<_> = known.iter().take(MAX_NODE_NAMES).map(|name| name.as_str()).collect();
    if known.len() > names.len() {
        names.push("...");
    }
    // Without Nodes, this one may just have no pod.
    let severity = if catalog.nodes().next().is_some() { Severity::Warning } else { Severity::Info };
    let problem = Problem::new(
        severity,
        Subject::Object(ObjectId::Node(node.clone())),
        "is this node's name, and no Node and no endpoint has it: no pod is local",
        format!("check --node-name (NODE_NAME); names that there are: {}", names.join(", ")),
    );
    Some(problem.of_kind(ProblemKind::UnknownNode))
}

/// If no node has a pod of the Service, says so: that its pods are on other nodes, or about to start, is no mistake.
pub(super) fn without_endpoints(
    catalog: &Catalog,
    service: &Service,
    settings: &Settings,
) -> Option<Problem> {
    if catalog.slices_of(&service.name).any(|slice| !slice.endpoints.is_empty()) {
        return None;
    }
    let happens = match settings.no_backend {
        NoBackend::Drop => "dropped",
        NoBackend::Pass => "left to the rest of the node",
    };
    let ObjectName { namespace, name } = &service.name;
    Some(warning(
        service,
        ProblemKind::NoEndpoints,
        format!("has no endpoint on any node: packets for its external addresses are {happens}"),
        format!(
            "check that its selector matches pods, or write an EndpointSlice in namespace {namespace} with the label \
             kubernetes.io/service-name: {name}"
        ),
    ))
}

/// If the Service has pods, but of the other family alone, says so: the usual cause is a single-stack Service.
pub(super) fn wrong_family(
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
        warning(
            service,
            ProblemKind::NoEndpointsOfFamily,
            format!("has no pod to go to: the Service's pods have {other} addresses only"),
            format!("set spec.ipFamilyPolicy to PreferDualStack, or take the {family} address away"),
        )
        .in_field(format!("the external {family} address"), addresses.join(", ")),
    )
}
