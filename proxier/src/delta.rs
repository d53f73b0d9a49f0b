//! What is to be done so that the kernel's tables become as desired: an ordered plan.
//!
//! Pure: [`Actual`] is a mirror of the tables, a [`Plan`] compares it with [`Desired`], and whoever carries the plan out
//! ([`crate::sink::bpf`]) tells the mirror of every step that worked. The steps of each task are asked for when its turn
//! comes, against what has been done by then: an address that changes hands leads somewhere at any moment, whichever
//! of the two Services comes first and whichever fails. After a restart the mirror is read back from the pinned maps
//! and the ordinary path runs.
//!
//! Packets flow while a plan is carried out, so the order within a Service matters:
//! 1. external addresses that nobody is to have are withdrawn, and the Service's name, its pods and their own addresses
//!    noted: what a pod sends is a reply only while `pods` has it;
//! 2. the next generation of `backends` is written beside the one in force;
//! 3. so is the next generation of `sources`, should the source ranges have changed, and fit;
//! 4. `members` is brought up to date: a session is checked against it only once its generation has passed;
//! 5. one write of `services` per address switches to the new generations.
//!
//! Services that are gone come next, so that their addresses have been taken over. Then, after every packet that has
//! seen the old state is done, what nothing leads to any more is removed; then flows and sessions of what went are
//! swept, and only then is the id of a Service free for another.
//!
//! A plan is about the Services of a [`Scope`] and the node's addresses, and costs as much as those: the mirror finds what
//! belongs to a Service or a pod without looking at the others. Whatever an address or a pod has from a Service outside of
//! the scope is as the tables say.
//!
//! The last two parts need not be done by every plan ([`Plan::pressing`]). Both wait for something, and until they are
//! done no packet is treated wrongly, but that conversations of what went go on. The mirror remembers what is left
//! ([`Actual::retirement`], [`Actual::begin_sweep`]), and a plan in which an address comes back that still has to be swept
//! begins with that: a pod that is given the address of another must not be given its conversations.

use std::net::IpAddr;

use proxier_common::{
    BackendKey, BackendValue, ExternalKey, MemberKey, MemberValue, NameValue, PodKey, PodValue,
    SERVICE_BALANCE_FLOW, SERVICE_DIRECT, SERVICE_PASS_WITHOUT_BACKEND, ServiceValue,
};

use crate::desired::{Balance, Delivery, DesiredService, NoBackend};
#[cfg(doc)]
use crate::desired::{Desired, Scope};

mod actual;
mod leftovers;
mod names;
mod plan;
mod pods;
mod sources;

pub use self::{
    actual::Actual,
    leftovers::Departed,
    names::{decode_name, encode_name},
    plan::{Plan, Task},
    pods::{PodLink, PodLinks},
    sources::{Shortage, SourceRange},
};

/// One write to the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Says which Service an id stands for.
    PutName(u32, NameValue),
    /// Writes a backend of a generation that is not in force yet.
    PutBackend(BackendKey, BackendValue),
    /// Writes a source range of a generation that is not in force yet.
    PutSource(SourceRange),
    /// Lets a pod belong to a Service.
    PutMember(MemberKey, MemberValue),
    /// Ends that.
    RemoveMember(MemberKey),
    /// Says that an address is a pod's, which external address leads to it, and by which link it is reached directly.
    PutPod(PodKey, PodValue),
    /// Ends that.
    RemovePod(PodKey),
    /// Puts a generation in force for an external address; or says that an address is a pod's own, or the node's.
    PutService(ExternalKey, ServiceValue),
    /// Lets go of an address.
    RemoveService(ExternalKey),
    /// Waits until every packet is done that the kernel programs were at work on.
    Grace,
    /// Removes a backend of a generation that is no longer in force.
    RemoveBackend(BackendKey),
    /// Removes a source range of a generation that is no longer in force.
    RemoveSource(SourceRange),
    /// Removes every flow whose pod is no member of the Service that has its external address now, and every session of
    /// which neither the pod nor the former one is; of those that [`Actual::departed`] is about.
    Sweep,
    /// Frees an id.
    RemoveName(u32),
}

/// The entries of pods' own addresses and of the node's in `services` belong to no Service.
const NO_SERVICE: u32 = 0;

/// What `services` says of an address that is nobody's external one: `flags` tell whose it is.
const fn own_address(flags: u32) -> ServiceValue {
    ServiceValue {
        service_id: NO_SERVICE,
        generation: 0,
        backend_count: 0,
        affinity_timeout: 0,
        flags,
        source_generation: 0,
    }
}

fn external_key(external: IpAddr) -> ExternalKey {
    ExternalKey { external: external.into() }
}

/// [`ServiceValue::flags`] of an external address.
const fn flags_of(service: &DesiredService) -> u32 {
    let no_backend = match service.no_backend {
        NoBackend::Drop => 0,
        NoBackend::Pass => SERVICE_PASS_WITHOUT_BACKEND,
    };
    let balance = match service.balance {
        Balance::Client => 0,
        Balance::Flow => SERVICE_BALANCE_FLOW,
    };
    let delivery = match service.delivery {
        Delivery::Stack => 0,
        Delivery::Direct => SERVICE_DIRECT,
    };
    no_backend | balance | delivery
}

#[cfg(test)]
mod tests;
