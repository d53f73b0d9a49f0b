//! What changed for a Service, as a line in the log: on transitions only.

use std::{collections::BTreeSet, fmt::Display};

use ipnet::IpNet;

use super::few::first_of;
use crate::desired::{Desired, DesiredService, NoBackend, Scope, ServiceKey};

/// More changes at once than this are counted rather than told one by one.
const MAX_LINES: usize = 100;
/// More addresses than this on one line nobody reads; `proxier get` shows them all.
const MAX_ADDRESSES: usize = 10;

/// What happened to a Service in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// It is there now.
    Programmed(&'a ServiceKey, &'a DesiredService),
    /// It was there already.
    Changed(&'a ServiceKey, &'a DesiredService),
    /// It is there, new or not, and the last pod on this node has gone, or there never was one.
    WithoutPods(&'a ServiceKey, &'a DesiredService),
    /// It has gone.
    Withdrawn(&'a ServiceKey, &'a DesiredService),
}

/// What differs between two states, within `scope`.
#[must_use]
pub fn between<'a>(before: &'a Desired, after: &'a Desired, scope: &'a Scope) -> Vec<Change<'a>> {
    let change = |key| match (before.services.get_key_value(key), after.services.get_key_value(key)) {
        (None, None) => None,
        (Some((key, service)), None) => Some(Change::Withdrawn(key, service)),
        (Some((_, known)), Some((_, service))) if known == service => None,
        (Some((_, known)), Some((key, service))) if service.pods.is_empty() && !known.pods.is_empty() => {
            Some(Change::WithoutPods(key, service))
        }
        (Some(_), Some((key, service))) => Some(Change::Changed(key, service)),
        (None, Some((key, service))) if service.pods.is_empty() => Some(Change::WithoutPods(key, service)),
        (None, Some((key, service))) => Some(Change::Programmed(key, service)),
    };
    match scope {
        Scope::Only(keys) => keys.iter().filter_map(change).collect(),
        Scope::All => {
            let new = after.services.keys().filter(|key| !before.services.contains_key(key));
            before.services.keys().chain(new).filter_map(change).collect()
        }
    }
}

/// For whom the differences are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// This node's kernel, which they are in force in.
    Kernel,
    /// Somebody who is told of a node.
    Node,
    /// Those who are told of every node.
    EveryNode,
}

/// Writes the differences to the log.
pub fn log(changes: &[Change<'_>], audience: Audience) {
    if changes.len() > MAX_LINES {
        let hint = if audience == Audience::Kernel { "; `proxier get services` shows them" } else { "" };
        tracing::info!(changes = changes.len(), "many Services changed{hint}");
        return;
    }
    for change in changes {
        match change {
            Change::Withdrawn(key, service) => tracing::info!(
                service = %key.service,
                family = %key.family,
                externals = list(&service.externals),
                "Service withdrawn"
            ),
            Change::Programmed(key, service)
            | Change::Changed(key, service)
            | Change::WithoutPods(key, service)
                if audience == Audience::EveryNode =>
            {
                tracing::info!(
                    service = %key.service,
                    family = %key.family,
                    externals = list(&service.externals),
                    sources = sources(service.sources.as_ref()),
                    "Service passed on"
                );
            }
            Change::WithoutPods(key, service) => {
                let message = match (audience, service.no_backend) {
                    (Audience::Kernel, NoBackend::Drop) => {
                        "Service without local pods: packets for it are dropped"
                    }
                    (Audience::Kernel, NoBackend::Pass) => {
                        "Service without local pods: packets for it are passed"
                    }
                    (Audience::Node | Audience::EveryNode, _) => "Service passed on, without local pods",
                };
                line(key, service, message);
            }
            Change::Programmed(key, service) | Change::Changed(key, service)
                if audience == Audience::Node =>
            {
                line(key, service, "Service passed on");
            }
            Change::Programmed(key, service) => line(key, service, "Service programmed"),
            Change::Changed(key, service) => line(key, service, "Service changed"),
        }
    }
}

fn line(key: &ServiceKey, service: &DesiredService, message: &str) {
    tracing::info!(
        service = %key.service,
        family = %key.family,
        externals = list(&service.externals),
        pods = list(&service.pods),
        draining = list(&service.draining),
        sources = sources(service.sources.as_ref()),
        balance = service.balance.name(),
        delivery = service.delivery.name(),
        affinity_timeout = service.affinity_timeout,
        "{message}"
    );
}

/// Addresses or networks.
fn list<T: Display>(items: &BTreeSet<T>) -> String {
    first_of(items, MAX_ADDRESSES, ",")
}

/// Who may send, in the words of `proxier get services`.
fn sources(nets: Option<&BTreeSet<IpNet>>) -> String {
    match nets {
        None => "any".to_owned(),
        Some(nets) if nets.is_empty() => "none".to_owned(),
        Some(nets) => list(nets),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, sync::Arc};

    use super::*;
    use crate::{
        desired::{Balance, Delivery},
        model::{Family, testing::mk_name},
    };

    fn state(services: &[(&str, &[&str])]) -> Desired {
        Desired {
            services: services
                .iter()
                .map(|(name, pods)| {
                    let key = ServiceKey { service: mk_name(name), family: Family::V4 };
                    let service = DesiredService {
                        externals: BTreeSet::from(["10.0.0.55".parse().unwrap()]),
                        pods: pods.iter().map(|pod| pod.parse().unwrap()).collect(),
                        draining: BTreeSet::new(),
                        affinity_timeout: 1,
                        no_backend: NoBackend::Drop,
                        balance: Balance::Client,
                        delivery: Delivery::Stack,
                        sources: None,
                    };
                    (key, Arc::new(service))
                })
                .collect(),
            ..Desired::default()
        }
    }

    fn kinds(before: &Desired, after: &Desired) -> Vec<&'static str> {
        let within = |scope| -> Vec<_> {
            between(before, after, &scope)
                .iter()
                .map(|change| match change {
                    Change::Programmed(..) => "programmed",
                    Change::Changed(..) => "changed",
                    Change::WithoutPods(..) => "without pods",
                    Change::Withdrawn(..) => "withdrawn",
                })
                .collect()
        };
        assert_eq!(between(before, after, &Scope::Only(BTreeSet::new())), []);
        let all = within(Scope::All);
        let both = before.services.keys().chain(after.services.keys()).cloned().collect();
        assert_eq!(within(Scope::Only(both)), all);
        all
    }

    #[test]
    fn of_three_hundred_pods_a_line_names_ten_and_counts_the_rest() {
        let addresses = |count: u8| (1..=count).map(|n| IpAddr::from([11, 0, 0, n])).collect::<BTreeSet<_>>();
        assert_eq!(list(&addresses(0)), "");
        assert_eq!(list(&addresses(2)), "11.0.0.1,11.0.0.2");
        assert!(list(&addresses(10)).ends_with(",11.0.0.10"));
        assert!(list(&addresses(250)).ends_with(",11.0.0.10 and 240 more"));
    }

    #[test]
    fn who_may_send_is_told_as_by_the_commands() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<BTreeSet<_>>();
        assert_eq!(sources(None), "any");
        assert_eq!(sources(Some(&nets(&[]))), "none");
        assert_eq!(sources(Some(&nets(&["192.0.2.0/24", "10.0.0.0/8"]))), "10.0.0.0/8,192.0.2.0/24");
    }

    #[test]
    fn each_transition_has_its_name_and_the_same_state_has_none() {
        let (none, one) = (state(&[]), state(&[("web", &["11.0.2.2"])]));
        let (two, empty) = (state(&[("web", &["11.0.2.2", "11.0.2.3"])]), state(&[("web", &[])]));
        for (before, after, expected) in [
            (&none, &one, vec!["programmed"]),
            (&one, &one, vec![]),
            (&one, &two, vec!["changed"]),
            (&two, &empty, vec!["without pods"]),
            (&empty, &empty, vec![]),
            (&empty, &one, vec!["changed"]),
            (&none, &empty, vec!["without pods"]),
            (&one, &none, vec!["withdrawn"]),
        ] {
            assert_eq!(kinds(before, after), expected);
        }
    }
}
