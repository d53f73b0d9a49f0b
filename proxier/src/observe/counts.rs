//! How much there is: a few numbers about the whole state, for metrics and `proxier status`. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{catalog::Catalog, desired::Desired, model::ObjectName};

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Services that the source has delivered.
    pub services: usize,
    /// Services with an external address and no pod here that takes new conversations: of no family.
    pub services_without_local_endpoints: usize,
    /// External addresses that this node delivers.
    pub external_addresses: Families,
    /// Addresses of pods.
    pub endpoints: Endpoints,
}

/// A number of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Families {
    /// IPv4.
    pub ipv4: usize,
    /// IPv6.
    pub ipv6: usize,
}

/// Addresses of pods, counted for each Service that they are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Those here that take new conversations.
    pub local: usize,
    /// Those here that keep the conversations that they have.
    pub draining: usize,
    /// Those of all nodes, ready or not.
    pub total: usize,
}

impl Counts {
    /// Of what a node should have. Looks at every endpoint: worth doing once a second, not at every change.
    #[must_use]
    pub fn of(catalog: &Catalog, desired: &Desired) -> Self {
        let mut counts = Self { services: catalog.services().count(), ..Self::default() };
        // By name: a Service with pods of one family only has pods.
        let mut has_pods: BTreeMap<&ObjectName, bool> = BTreeMap::new();
        for (key, service) in &desired.services {
            let ipv4 = service.externals.iter().filter(|address| address.is_ipv4()).count();
            counts.external_addresses.ipv4 += ipv4;
            counts.external_addresses.ipv6 += service.externals.len() - ipv4;
            counts.endpoints.local += service.pods.len();
            counts.endpoints.draining += service.draining.len();
            *has_pods.entry(&key.service).or_default() |= !service.pods.is_empty();
        }
        counts.services_without_local_endpoints = has_pods.values().filter(|has| !**has).count();
        let endpoints = catalog.slices().flat_map(|slice| &slice.endpoints);
        counts.endpoints.total = endpoints.map(|endpoint| endpoint.addresses.len()).sum();
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        desired::{self, Settings},
        model::{
            Endpoint, NodeName,
            testing::{mk_endpoint, mk_service, mk_slice},
        },
    };

    #[test]
    fn services_addresses_and_pods_are_counted_here_and_everywhere() {
        let mut catalog = Catalog::default();
        catalog.apply(mk_service("web", ["10.0.0.55", "10.0.0.56", "1000::55"]).into());
        catalog.apply(mk_service("mail", ["10.0.0.57"]).into());
        catalog.apply(mk_service("plain", []).into());
        let unready = Endpoint { ready: false, ..mk_endpoint("11.0.2.3", "node1") };
        let slice = [mk_endpoint("11.0.2.2", "node1"), unready, mk_endpoint("11.0.1.2", "node2")];
        catalog.apply(mk_slice("web-1", "web", slice).into());
        catalog.apply(mk_slice("mail-1", "mail", [mk_endpoint("11.0.1.3", "node2")]).into());
        let (desired, _) = desired::compute(&catalog, &Settings::new(NodeName::new("node1")));
        assert_eq!(
            Counts::of(&catalog, &desired),
            Counts {
                services: 3,
                // `web` has pods of one family, `plain` has no external address.
                services_without_local_endpoints: 1,
                external_addresses: Families { ipv4: 3, ipv6: 1 },
                endpoints: Endpoints { local: 1, draining: 1, total: 4 },
            }
        );
    }
}
