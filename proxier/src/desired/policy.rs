//! What a Service says about its clients: who may send, and what of it stays on one pod. Pure.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Balance, Delivery, complaints::warning};
use crate::model::{Family, Problem, ProblemKind, Service, SessionAffinity};

/// An annotation of a Service: what stays on one pod.
const BALANCE_ANNOTATION: &str = "proxier.io/balance";

/// An annotation of a Service: how packets reach its pods.
const DELIVERY_ANNOTATION: &str = "proxier.io/delivery";

/// Who may send to a Service's addresses of `family`; `None` for everybody.
///
/// A Service that names ranges is never open to a family of which it names none.
pub(super) fn sources(
    service: &Service,
    family: Family,
    problems: &mut Vec<Problem>,
) -> Option<BTreeSet<IpNet>> {
    if !service.has_source_ranges {
        return None;
    }
    let ranges: BTreeSet<IpNet> =
        service.source_ranges.iter().copied().filter(|range| Family::of(range.addr()) == family).collect();
    if ranges.is_empty() {
        problems.push(
            warning(
                service,
                ProblemKind::NoClientAdmitted,
                format!("names no {family} network: nobody may send to the external {family} addresses"),
                format!("add one ({} for everybody), or take the {family} addresses away", everybody(family)),
            )
            .in_whole_field("spec.loadBalancerSourceRanges"),
        );
    }
    Some(ranges)
}

/// The network that all addresses of a family are in.
const fn everybody(family: Family) -> &'static str {
    match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    }
}

/// How packets reach the pods: as the Service says, else as the command line does.
pub(super) fn delivery(service: &Service, otherwise: Delivery, problems: &mut Vec<Problem>) -> Delivery {
    let Some(value) = service.annotations.get(DELIVERY_ANNOTATION) else {
        return otherwise;
    };
    match value {
        "stack" => return Delivery::Stack,
        "direct" => return Delivery::Direct,
        _ => {}
    }
    let reason =
        format!("is not a way to deliver: it is {} as for every Service that does not say", otherwise.name());
    problems.push(
        warning(service, ProblemKind::Invalid, reason, "write stack or direct")
            .in_field(format!("metadata.annotations[{DELIVERY_ANNOTATION}]"), value),
    );
    otherwise
}

/// What stays on one pod.
pub(super) fn balance(service: &Service, problems: &mut Vec<Problem>) -> Balance {
    let Some(value) = service.annotations.get(BALANCE_ANNOTATION) else {
        return Balance::Client;
    };
    let (reason, next_step) = match (value, service.session_affinity) {
        ("client", _) => return Balance::Client,
        ("flow", SessionAffinity::None) => return Balance::Flow,
        ("flow", SessionAffinity::ClientIp { .. }) => (
            "contradicts spec.sessionAffinity ClientIP, which counts: a client stays on its pod",
            "take one of the two away",
        ),
        _ => ("is not a way to balance: a client stays on its pod", "write client or flow"),
    };
    problems.push(
        warning(service, ProblemKind::Invalid, reason, next_step)
            .in_field(format!("metadata.annotations[{BALANCE_ANNOTATION}]"), value),
    );
    Balance::Client
}
