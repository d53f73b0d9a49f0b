//! Networks that have owners, and which of them holds an address. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::model::Family;

/// Networks, each with those whose it is. A look-up costs as much as there are different lengths (one a family as a rule),
/// however many networks there are.
#[derive(Debug)]
pub(super) struct Networks<O> {
    owners: BTreeMap<IpNet, BTreeSet<O>>,
    /// How many networks there are of each length.
    lengths: BTreeMap<(Family, u8), usize>,
}

impl<O> Default for Networks<O> {
    fn default() -> Self {
        Self { owners: BTreeMap::new(), lengths: BTreeMap::new() }
    }
}

impl<O: Ord> Networks<O> {
    /// Adds a network, which has no bits beyond its prefix.
    pub(super) fn insert(&mut self, network: IpNet, owner: O) {
        let owners = self.owners.entry(network).or_default();
        if owners.is_empty() {
            *self.lengths.entry(length(network)).or_default() += 1;
        }
        owners.insert(owner);
    }

    /// Takes it from this owner.
    pub(super) fn remove(&mut self, network: IpNet, owner: &O) {
        let Some(owners) = self.owners.get_mut(&network) else { return };
        owners.remove(owner);
        if !owners.is_empty() {
            return;
        }
        self.owners.remove(&network);
        if let Some(count) = self.lengths.get_mut(&length(network)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(network));
            }
        }
    }

    /// The widest network that holds `address`, and the first of its owners.
    pub(super) fn holding(&self, address: IpAddr) -> Option<(IpNet, &O)> {
        let family = Family::of(address);
        self.lengths.range((family, 0)..=(family, u8::MAX)).find_map(|((_, length), _)| {
            let network = IpNet::new(address, *length).ok()?.trunc();
            Some((network, self.owners.get(&network)?.first()?))
        })
    }
}

fn length(network: IpNet) -> (Family, u8) {
    (Family::of(network.addr()), network.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_held_by_the_widest_network_as_long_as_anybody_has_it() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mut networks = Networks::default();
        networks.insert(net("11.0.2.0/24"), "node2");
        networks.insert(net("11.0.2.0/24"), "node1");
        networks.insert(net("11.0.0.0/16"), "node3");
        networks.insert(net("1100::/64"), "node1");
        let holding = |networks: &Networks<&'static str>, address: &str| {
            networks.holding(address.parse().unwrap()).map(|(network, owner)| format!("{network} {owner}"))
        };
        assert_eq!(holding(&networks, "11.0.2.9").as_deref(), Some("11.0.0.0/16 node3"));
        networks.remove(net("11.0.0.0/16"), &"node3");
        assert_eq!(holding(&networks, "11.0.2.9").as_deref(), Some("11.0.2.0/24 node1"));
        networks.remove(net("11.0.2.0/24"), &"node1");
        assert_eq!(holding(&networks, "11.0.2.9").as_deref(), Some("11.0.2.0/24 node2"));
        networks.remove(net("11.0.2.0/24"), &"node2");
        assert_eq!(holding(&networks, "11.0.2.9"), None);
        assert_eq!(holding(&networks, "1100::9").as_deref(), Some("1100::/64 node1"));
        assert_eq!(holding(&networks, "1100:0:0:1::9"), None);
        assert_eq!(networks.lengths.len(), 1);
    }
}
