//! Which external addresses lead to a pod: what the map `pods` says. Pure.

use proxier_common::{Address, PodValue, SERVICE_BALANCE_FLOW, SERVICE_DIRECT};

use super::Actual;

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
    pub(super) const fn value(self) -> PodValue {
        match self {
            Self::One(external, flags) => PodValue { external, flags, interface: 0 },
            Self::None | Self::Several => PodValue { external: Address::UNSPECIFIED, flags: 0, interface: 0 },
        }
    }
}
