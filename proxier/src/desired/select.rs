//! Which endpoints of a Service answer on a node: the ready ones, and if there is none, those that are about to end
//! but still serve (KEP-1669). Pure.

use std::{collections::BTreeSet, net::IpAddr};

use crate::{
    catalog::Catalog,
    model::{Endpoint, Family, NodeName, ObjectName},
};

/// Addresses of a Service's pods on a node, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPods {
    /// Those that answer.
    pub pods: BTreeSet<IpAddr>,
    /// The others, which may still be in conversations.
    pub draining: BTreeSet<IpAddr>,
}

/// Addresses of the pods of `service` on `node` in `family`: of all its slices, and of each endpoint all addresses.
#[must_use]
pub fn local_pods(catalog: &Catalog, service: &ObjectName, family: Family, node: &NodeName) -> LocalPods {
    let local: Vec<&Endpoint> = catalog
        .slices_of(service)
        .filter(|slice| slice.family == family)
        .flat_map(|slice| &slice.endpoints)
        .filter(|endpoint| endpoint.node.as_ref() == Some(node))
        .collect();
    let any_ready = local.iter().any(|endpoint| endpoint.ready);
    let mut found = LocalPods::default();
    for endpoint in local {
        let addresses = endpoint.addresses.iter().copied();
        if is_preferred(endpoint, any_ready) {
            found.pods.extend(addresses);
        } else {
            found.draining.extend(addresses);
        }
    }
    // An address can be in two slices that do not agree, while one of them is being replaced.
    found.draining.retain(|address| !found.pods.contains(address));
    found
}

/// Whether traffic may go to an endpoint, given whether `any_ready` of its Service, node and family is ready.
#[must_use]
pub const fn is_preferred(endpoint: &Endpoint, any_ready: bool) -> bool {
    if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{mk_endpoint, mk_name, mk_slice};

    fn pods(endpoints: impl IntoIterator<Item = Endpoint>) -> Vec<String> {
        let mut catalog = Catalog::default();
        catalog.apply(mk_slice("web-1", "web", endpoints).into());
        local_pods(&catalog, &mk_name("web"), Family::V4, &NodeName::new("node1"))
            .pods
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    fn not_ready(endpoint: Endpoint) -> Endpoint {
        Endpoint { ready: false, serving: false, ..endpoint }
    }

    fn ending(endpoint: Endpoint) -> Endpoint {
        Endpoint { ready: false, serving: true, terminating: true, ..endpoint }
    }

    #[test]
    fn only_pods_of_this_node_are_chosen() {
        let nowhere = Endpoint { node: None, ..mk_endpoint("11.0.3.2", "") };
        assert_eq!(
            pods([mk_endpoint("11.0.2.2", "node1"), mk_endpoint("11.0.1.2", "node2"), nowhere]),
            ["11.0.2.2"]
        );
    }

    #[test]
    fn ready_pods_are_preferred_to_ending_ones() {
        assert_eq!(
            pods([mk_endpoint("11.0.2.2", "node1"), ending(mk_endpoint("11.0.2.3", "node1"))]),
            ["11.0.2.2"]
        );
    }

    #[test]
    fn without_a_ready_pod_those_that_end_but_serve_are_chosen() {
        let gone = Endpoint { serving: false, ..ending(mk_endpoint("11.0.2.4", "node1")) };
        assert_eq!(
            pods([
                not_ready(mk_endpoint("11.0.2.2", "node1")),
                ending(mk_endpoint("11.0.2.3", "node1")),
                gone
            ]),
            ["11.0.2.3"]
        );
    }

    #[test]
    fn a_ready_pod_of_another_node_does_not_keep_an_ending_local_one_from_serving() {
        assert_eq!(
            pods([mk_endpoint("11.0.1.2", "node2"), ending(mk_endpoint("11.0.2.3", "node1"))]),
            ["11.0.2.3"]
        );
    }

    #[test]
    fn a_pod_that_is_not_ready_and_stays_is_not_chosen() {
        let slow = Endpoint { ready: false, serving: true, ..mk_endpoint("11.0.2.2", "node1") };
        assert_eq!(pods([slow]), [""; 0]);
    }

    #[test]
    fn the_same_pod_in_two_slices_counts_once() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        catalog.apply(
            mk_slice("web-2", "web", [mk_endpoint("11.0.2.2", "node1"), mk_endpoint("11.0.2.3", "node1")])
                .into(),
        );
        assert_eq!(local_pods(&catalog, &mk_name("web"), Family::V4, &NodeName::new("node1")).pods.len(), 2);
    }

    #[test]
    fn every_address_of_an_endpoint_counts_not_the_first_alone() {
        let addresses = ["11.0.2.2", "11.0.2.3"].map(|address| address.parse().unwrap());
        let endpoint =
            Endpoint { addresses: addresses.into_iter().collect(), ..mk_endpoint("11.0.2.2", "node1") };
        assert_eq!(pods([endpoint]), ["11.0.2.2", "11.0.2.3"]);
    }

    #[test]
    fn three_hundred_local_pods_are_all_chosen() {
        let all = (0..300).map(|n| mk_endpoint(&format!("11.0.{}.{}", n / 250, n % 250 + 1), "node1"));
        assert_eq!(pods(all).len(), 300);
    }

    #[test]
    fn who_does_not_answer_is_drained_and_an_address_does_both_never() {
        let mut catalog = Catalog::default();
        let ready = || mk_endpoint("11.0.0.1", "node1");
        let unready = |address| not_ready(mk_endpoint(address, "node1"));
        catalog.apply(mk_slice("web-1", "web", [ready(), unready("11.0.0.2"), unready("11.0.0.1")]).into());
        let found = local_pods(&catalog, &mk_name("web"), Family::V4, &NodeName::new("node1"));
        assert_eq!(found.pods, BTreeSet::from(["11.0.0.1".parse().unwrap()]));
        assert_eq!(found.draining, BTreeSet::from(["11.0.0.2".parse().unwrap()]));
    }
}
