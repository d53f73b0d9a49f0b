//! Which external addresses lead to a pod: what the map `pods` says. Pure.

use std::collections::{BTreeMap, BTreeSet};

use proxier_common::{Address, PodValue, SERVICE_BALANCE_FLOW};

use super::{Actual, NO_SERVICE};
use crate::desired::DesiredService;

/// Bits of `SERVICE_*` that a pod has from the external address that leads to it.
const FLAGS: u32 = SERVICE_BALANCE_FLOW;

/// The external addresses that lead to a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Leads {
    /// None, though it belongs to a Service.
    #[default]
    None,
    /// This one, whose flags are those.
    One(Address, u32),
    /// Several: of a packet of the pod, nothing but its flow can tell which one.
    Several,
}

impl Leads {
    /// Another one, or the same once more: the flags that were named first count.
    fn add(&mut self, external: Address, flags: u32) {
        *self = match *self {
            Self::None => Self::One(external, flags & FLAGS),
            Self::One(known, _) if known == external => *self,
            Self::One(..) | Self::Several => Self::Several,
        };
    }

    /// What `pods` says.
    pub(super) const fn value(self) -> PodValue {
        match self {
            Self::One(external, flags) => PodValue { external, flags, padding: 0 },
            Self::None | Self::Several => PodValue { external: Address::UNSPECIFIED, flags: 0, padding: 0 },
        }
    }
}

/// Who leads where: external addresses and pods by Service.
#[derive(Debug, Default)]
pub(super) struct Paths {
    /// Each with its flags; of an address that is there twice the first ones count.
    externals: BTreeMap<u32, Vec<(Address, u32)>>,
    pods: BTreeSet<(Address, u32)>,
}

impl Paths {
    /// Those that there are now.
    pub(super) fn in_force(actual: &Actual) -> Self {
        let mut paths = Self::default();
        let mut generations = BTreeSet::new();
        for (key, value) in actual.services.iter().filter(|(_, value)| value.service_id != NO_SERVICE) {
            paths.externals.entry(value.service_id).or_default().push((key.external, value.flags));
            generations.insert((value.service_id, value.generation));
        }
        paths.pods.extend(actual.members.keys().map(|key| (key.pod, key.service_id)));
        // Between the end of a membership and the switch that belongs to it, a pod is a backend alone.
        let backends = actual.backends.iter();
        let backends = backends.filter(|(key, _)| generations.contains(&(key.service_id, key.generation)));
        paths.pods.extend(backends.map(|(key, backend)| (backend.pod, key.service_id)));
        paths
    }

    /// Adds what Service `id` is to have. Each of its addresses may lead to each of its pods then, those that it has and
    /// those that it is to have: between the steps that change them there are such moments.
    pub(super) fn add(&mut self, id: u32, service: &DesiredService) {
        let flags = super::flags_of(service);
        let externals = service.externals.iter().map(|external| (Address::from(*external), flags));
        self.externals.entry(id).or_default().extend(externals);
        self.pods.extend(service.pods.union(&service.draining).map(|pod| (Address::from(*pod), id)));
    }

    /// What leads to each pod. One that belongs to a Service without addresses is there as well.
    pub(super) fn leads(&self) -> BTreeMap<Address, Leads> {
        let mut leads: BTreeMap<Address, Leads> = BTreeMap::new();
        for (pod, id) in &self.pods {
            let of_pod = leads.entry(*pod).or_default();
            for (external, flags) in self.externals.get(id).into_iter().flatten() {
                of_pod.add(*external, *flags);
            }
        }
        leads
    }
}
