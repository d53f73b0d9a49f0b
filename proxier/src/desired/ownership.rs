//! Whose an external address is: one Service's and no other's, the oldest's, the same on every node; and how many
//! a namespace may have. Kept up to date as Services come and go. Which addresses nobody may have is `taken`'s business.
//! Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::Settings;
use crate::model::{CreationTime, ObjectName, Service, ServiceType};

/// That a Service wants an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) address: IpAddr,
    /// The field that says so, for messages.
    pub(super) field: String,
}

/// What a Service claims, in the order in which it says so.
pub(super) fn claims(service: &Service, settings: &Settings) -> Vec<Claim> {
    // A DNS alias has no addresses, whatever is written.
    if service.service_type == ServiceType::ExternalName {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    let mut claims = Vec::new();
    let mut claim = |address: IpAddr, field: &dyn Fn() -> String| {
        // The same address as externalIP and load balancer address is one claim.
        if seen.insert(address) {
            claims.push(Claim { address, field: field() });
        }
    };
    if settings.external_ips {
        for (index, address) in service.external_ips.iter().enumerate() {
            claim(*address, &|| format!("spec.externalIPs[{index}]"));
        }
    }
    if settings.load_balancer_ips {
        for address in service.load_balancer_ips() {
            claim(address, &|| "status.loadBalancer.ingress".to_owned());
        }
    }
    claims
}

/// The order in which Services are served: the oldest first. Every node sees the same objects, so every node decides alike.
/// Of two of one age the first by name counts; the API's rule would then go by UID, but no two in a catalog have one name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seniority {
    /// A manifest has no time: it comes after what a cluster holds.
    dateless: bool,
    created: CreationTime,
    pub(super) service: ObjectName,
}

impl Seniority {
    /// Comes before every other.
    fn least() -> Self {
        Self { dateless: false, created: CreationTime(i64::MIN), service: ObjectName::default() }
    }
}

/// What of a Service has a part in who owns what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    seniority: Seniority,
    addresses: BTreeSet<IpAddr>,
}

impl Standing {
    pub(super) fn of(service: &Service, settings: &Settings) -> Self {
        let seniority = Seniority {
            dateless: service.created.is_none(),
            created: service.created.unwrap_or_default(),
            service: service.name.clone(),
        };
        let addresses = claims(service, settings).into_iter().map(|claim| claim.address).collect();
        Self { seniority, addresses }
    }
}

/// Who claims what.
#[derive(Debug)]
pub(super) struct Claims {
    by_address: BTreeSet<(IpAddr, Seniority)>,
    /// Only where there is a limit.
    namespaces: BTreeMap<Arc<str>, Turns>,
    /// How many addresses a namespace may have.
    limit: Option<u32>,
}

/// A namespace's addresses in the order in which they are counted: by the oldest Service of the namespace that claims each,
/// and those of one Service by address.
#[derive(Debug, Default)]
struct Turns {
    order: BTreeSet<(Seniority, IpAddr)>,
    /// The first one that is too many.
    first_refused: Option<(Seniority, IpAddr)>,
}

impl Claims {
    pub(super) const fn new(limit: Option<u32>) -> Self {
        Self { by_address: BTreeSet::new(), namespaces: BTreeMap::new(), limit }
    }

    /// Puts what a Service claims now in place of what it claimed before. Returns addresses that may have another
    /// owner now, or whose claims may be told something else.
    pub(super) fn replace(
        &mut self,
        before: Option<&Standing>,
        after: Option<&Standing>,
    ) -> BTreeSet<IpAddr> {
        let Some(either) = before.or(after).filter(|_| before != after) else { return BTreeSet::new() };
        let namespace = Arc::clone(&either.seniority.service.namespace);
        let mut touched: BTreeSet<IpAddr> =
            [before, after].into_iter().flatten().flat_map(|standing| &standing.addresses).copied().collect();

        if self.limit.is_some() {
            self.move_turns(&namespace, &touched, Turns::take);
        }
        if let Some(standing) = before {
            for address in &standing.addresses {
                self.by_address.remove(&(*address, standing.seniority.clone()));
            }
        }
        if let Some(standing) = after {
            let claims = standing.addresses.iter().map(|address| (*address, standing.seniority.clone()));
            self.by_address.extend(claims);
        }
        if let Some(limit) = self.limit {
            self.move_turns(&namespace, &touched, Turns::give);
            let turns = self.namespaces.entry(Arc::clone(&namespace)).or_default();
            turns.count(limit, &mut touched);
            if turns.order.is_empty() {
                self.namespaces.remove(&namespace);
            }
        }
        touched
    }

    /// Takes these addresses' turns from a namespace, or gives them: those of whoever claims them now.
    fn move_turns(
        &mut self,
        namespace: &Arc<str>,
        addresses: &BTreeSet<IpAddr>,
        change: fn(&mut Turns, Seniority, IpAddr),
    ) {
        for address in addresses {
            let first = self.claimants(*address).find(|claimant| claimant.service.namespace == *namespace);
            if let Some(first) = first.cloned() {
                change(self.namespaces.entry(Arc::clone(namespace)).or_default(), first, *address);
            }
        }
    }

    /// All who claim an address, the oldest first.
    pub(super) fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &Seniority> {
        self.by_address
            .range((address, Seniority::least())..)
            .take_while(move |(claimed, _)| *claimed == address)
            .map(|(_, seniority)| seniority)
    }

    /// All who claim an address of a network.
    pub(super) fn claimants_within(&self, network: IpNet) -> impl Iterator<Item = &Seniority> {
        self.by_address
            .range((network.network(), Seniority::least())..)
            .take_while(move |(claimed, _)| network.contains(claimed))
            .map(|(_, seniority)| seniority)
    }

    /// How many addresses the namespace may have, if this one, which it claims, is beyond.
    pub(super) fn exceeded(&self, namespace: &Arc<str>, address: IpAddr) -> Option<u32> {
        let first_refused = self.namespaces.get(namespace)?.first_refused.as_ref()?;
        let first = self.claimants(address).find(|claimant| claimant.service.namespace == *namespace)?;
        self.limit.filter(|_| (first, address) >= (&first_refused.0, first_refused.1))
    }
}

impl Turns {
    fn take(&mut self, seniority: Seniority, address: IpAddr) {
        self.order.remove(&(seniority, address));
    }

    fn give(&mut self, seniority: Seniority, address: IpAddr) {
        self.order.insert((seniority, address));
    }

    /// Counts anew up to `limit`, and adds addresses that are beyond it now and were not, or the other way round.
    fn count(&mut self, limit: u32, touched: &mut BTreeSet<IpAddr>) {
        let first_refused =
            usize::try_from(limit).ok().and_then(|limit| self.order.iter().nth(limit)).cloned();
        let former = std::mem::replace(&mut self.first_refused, first_refused);
        // None stands for beyond the last one.
        let (low, high) = match (&former, &self.first_refused) {
            (None, None) => return,
            (Some(one), None) | (None, Some(one)) => (one, None),
            (Some(one), Some(other)) => (one.min(other), Some(one.max(other))),
        };
        let between = self.order.range(low.clone()..).take_while(|turn| high.is_none_or(|high| *turn < high));
        touched.extend(between.map(|(_, address)| *address));
    }
}

#[cfg(test)]
mod tests;
