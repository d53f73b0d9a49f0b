//! What the map `pods` says of a pod: which external addresses lead to it, and by which of the node's links it is reached
//! past the node's stack. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use proxier_common::{Address, POD_HAS_PEER, PodKey, PodValue, SERVICE_BALANCE_FLOW, SERVICE_DIRECT};

use super::{Actual, Step, decode_name};
use crate::model::ObjectName;

/// The node's link by which a pod is reached past the node's stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Its index.
    pub interface: u32,
    /// Whether its other end is in the pod.
    pub has_peer: bool,
}

/// Who knows the links of pods.
pub trait PodLinks: fmt::Debug {
    /// The link by which packets may go to `pod` past the node's stack now; `None` if they may not.
    fn link_of(&self, pod: Address) -> Option<PodLink>;
}

impl PodLinks for BTreeMap<Address, PodLink> {
    fn link_of(&self, pod: Address) -> Option<PodLink> {
        self.get(&pod).copied()
    }
}

/// Bits of `SERVICE_*` that a pod has from the external address that leads to it.
const FLAGS: u32 = SERVICE_BALANCE_FLOW | SERVICE_DIRECT;

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
    /// Those that there are now; `None` if the pod belongs to no Service.
    pub(super) fn in_force(pod: Address, actual: &Actual) -> Option<Self> {
        let mut services = actual.services_of(pod).peekable();
        services.peek()?;
        let mut leads = Self::None;
        for id in services {
            leads.add_all(actual.externals_of(id).map(|(key, value)| (key.external, value.flags)));
        }
        Some(leads)
    }

    /// Whatever a value of `pods` that was written earlier may stand for.
    pub(super) fn noted(value: &PodValue) -> Self {
        if value.external == Address::UNSPECIFIED {
            Self::Several
        } else {
            Self::One(value.external, value.flags & FLAGS)
        }
    }

    pub(super) fn add_all(&mut self, externals: impl IntoIterator<Item = (Address, u32)>) {
        for (external, flags) in externals {
            if *self == Self::Several {
                return;
            }
            self.add(external, flags);
        }
    }

    /// Another one, or the same once more: the flags that were named first count.
    fn add(&mut self, external: Address, flags: u32) {
        *self = match *self {
            Self::None => Self::One(external, flags & FLAGS),
            Self::One(known, _) if known == external => *self,
            Self::One(..) | Self::Several => Self::Several,
        };
    }

    /// What both say.
    pub(super) fn and(mut self, other: Self) -> Self {
        match other {
            Self::None => self,
            Self::Several => Self::Several,
            Self::One(external, flags) => {
                self.add(external, flags);
                self
            }
        }
    }

    /// What `pods` says.
    pub(super) fn value(self, link: Option<PodLink>) -> PodValue {
        let (external, flags) = match self {
            Self::One(external, flags) => (external, flags),
            Self::None | Self::Several => (Address::UNSPECIFIED, 0),
        };
        by_link(PodValue { external, flags, interface: 0 }, link)
    }
}

/// `value`, but for the link.
fn by_link(value: PodValue, link: Option<PodLink>) -> PodValue {
    let has_peer = link.is_some_and(|link| link.has_peer);
    PodValue {
        flags: value.flags & !POD_HAS_PEER | if has_peer { POD_HAS_PEER } else { 0 },
        interface: link.map_or(0, |link| link.interface),
        ..value
    }
}

impl Actual {
    /// Pods of the Services in force that are delivered directly.
    pub fn direct_pods(&self) -> impl Iterator<Item = Address> {
        self.direct_services().flat_map(|id| self.members_of(id)).map(|(pod, _)| pod)
    }

    /// What the tables say of the pods of Services.
    pub fn pods(&self) -> impl Iterator<Item = &PodValue> {
        self.pods.values()
    }

    /// The Services for whose sake a pod is one of [`Actual::direct_pods`].
    #[must_use]
    pub fn direct_services_of(&self, pod: Address) -> BTreeSet<ObjectName> {
        let direct = self.services_of(pod).filter(|id| self.is_direct(*id));
        direct.filter_map(|id| Some(decode_name(self.names.get(&id)?)?.service)).collect()
    }

    /// Pods for which the programs have to be at their links: those of [`Actual::direct_pods`], and those that were reached
    /// so, for conversations that go on.
    pub fn linked_pods(&self) -> impl Iterator<Item = Address> {
        let linked = self.pods.iter().filter(|(_, value)| value.interface != 0).map(|(key, _)| key.pod);
        self.direct_pods().chain(linked)
    }

    /// The steps after which `pods` has the links of `links`: before programs are taken off a link, and after they were put
    /// on one.
    #[must_use]
    pub fn relink(&self, links: &dyn PodLinks) -> Vec<Step> {
        let step = |(key, value): (&PodKey, &PodValue)| {
            let linked = by_link(*value, self.link_of(key.pod, links));
            (linked != *value).then_some(Step::PutPod(*key, linked))
        };
        self.pods.iter().filter_map(step).collect()
    }

    /// The link of a pod for which `pods` is to have one. A pod that has one keeps it when its Services are delivered directly
    /// no more: conversations keep their way, and the replies of direct ones are told by it.
    pub(super) fn link_of(&self, pod: Address, links: &dyn PodLinks) -> Option<PodLink> {
        let is_linked = self.pods.get(&PodKey { pod }).is_some_and(|value| value.interface != 0);
        let is_direct = || self.services_of(pod).any(|id| self.is_direct(id));
        (is_linked || is_direct()).then(|| links.link_of(pod)).flatten()
    }
}
