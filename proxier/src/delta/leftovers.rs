//! What changes have left behind: entries that nothing may lead to any more, and conversations of what went. Pure.
//!
//! Removing them can wait, and has to be waited for: for a grace period, and for a pass over all flows and sessions. At a
//! hundred changes a second neither is done for each of them; the mirror of the tables notes with every step what is to be
//! looked at again, for whichever plan or round of tidying comes to it. It may note too much: what is right stays.
//!
//! A sweep may run beside further changes. What it was begun for and what went since are kept apart: only of the former is
//! it known, at its end, that nothing is left.

use std::collections::BTreeSet;

use proxier_common::{Address, ExternalKey, PodKey, SERVICE_IS_NODE, SERVICE_IS_POD, ServiceValue};

use super::{
    Actual, NO_SERVICE, Step, own_address,
    pods::{Leads, PodLinks},
    sources,
};

/// What has to be looked at again.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftovers {
    /// Services of which backends, source ranges, or what `pods` says of their pods may be out of date.
    pub(super) services: BTreeSet<u32>,
    /// Addresses that may no longer be a pod's.
    pub(super) addresses: BTreeSet<Address>,
    /// Ids of which perhaps nothing but the name is left.
    pub(super) names: BTreeSet<u32>,
    /// Whether packets may be on their way by what is no longer so.
    pub(super) unsettled: bool,
    unswept: Departed,
    /// What the sweep under way was begun for.
    sweeping: Departed,
}

/// What went, and may have left conversations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Departed {
    /// Pods that left a Service.
    pods: BTreeSet<Address>,
    /// External addresses that were withdrawn or changed hands.
    externals: BTreeSet<Address>,
    /// The Services that had them.
    services: BTreeSet<u32>,
}

impl Departed {
    /// Whether a flow or session of this pod and external address is to be looked at.
    #[must_use]
    pub fn concerns(&self, pod: Address, external: Address) -> bool {
        self.pods.contains(&pod) || self.externals.contains(&external)
    }

    /// Whether there is nothing to look at.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.externals.is_empty()
    }

    fn append(&mut self, mut other: Self) {
        self.pods.append(&mut other.pods);
        self.externals.append(&mut other.externals);
        self.services.append(&mut other.services);
    }
}

impl Leftovers {
    /// A pod has left a Service.
    pub(super) fn left(&mut self, pod: Address, service_id: u32) {
        self.unswept.pods.insert(pod);
        self.unswept.services.insert(service_id);
        self.names.insert(service_id);
        self.unsettled = true;
    }

    /// A Service has lost an external address.
    pub(super) fn let_go(&mut self, external: Address, service_id: u32) {
        self.unswept.externals.insert(external);
        self.unswept.services.insert(service_id);
        self.names.insert(service_id);
        self.unsettled = true;
    }

    /// Adds what `before` has noted about conversations: reading the tables again tells nothing of those.
    pub(super) fn inherit(&mut self, before: Self) {
        self.unswept.append(before.unswept);
        self.sweeping.append(before.sweeping);
        self.unsettled = true;
    }

    pub(super) fn begin_sweep(&mut self) -> &Departed {
        self.sweeping.append(std::mem::take(&mut self.unswept));
        &self.sweeping
    }

    pub(super) fn end_sweep(&mut self, worked: bool) {
        let swept = std::mem::take(&mut self.sweeping);
        if !worked {
            self.unswept.append(swept);
        }
    }

    /// Whether conversations of an earlier pod of this address may be left.
    pub(super) fn haunts_pod(&self, pod: Address) -> bool {
        self.unswept.pods.contains(&pod) || self.sweeping.pods.contains(&pod)
    }

    /// Whether conversations of an earlier owner of this external address may be left.
    pub(super) fn haunts_external(&self, external: Address) -> bool {
        self.unswept.externals.contains(&external) || self.sweeping.externals.contains(&external)
    }

    fn haunts_service(&self, id: u32) -> bool {
        self.unswept.services.contains(&id) || self.sweeping.services.contains(&id)
    }
}

impl Actual {
    /// The steps that remove backends that no address leads to, source ranges that none asks for, pods that belong to no
    /// Service, and addresses that are pods' no longer; of the pods that stay, those that say what leads to them now. A grace
    /// period goes before them all. Once all of them are carried out, to be told by [`Actual::retired`].
    #[must_use]
    pub fn retirement(&self, links: &dyn PodLinks) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut ranges = Vec::new();
        let mut addresses = self.leftovers.addresses.clone();
        for id in &self.leftovers.services {
            for (key, backend) in self.backends_of(*id) {
                if !self.is_in_force(key) {
                    steps.push(Step::RemoveBackend(*key));
                }
                addresses.insert(backend.pod);
            }
            ranges.extend(sources::out_of_force(*id, self).map(Step::RemoveSource));
            addresses.extend(self.members_of(*id).map(|(pod, _)| pod));
        }
        steps.append(&mut ranges);
        let mut own = Vec::new();
        for address in addresses {
            let leads = Leads::in_force(address, self);
            let key = PodKey { pod: address };
            match (self.pods.get(&key), leads) {
                (Some(value), Some(leads)) => {
                    let right = leads.value(self.link_of(address, links));
                    if right != *value {
                        steps.push(Step::PutPod(key, right));
                    }
                }
                (Some(_), None) => steps.push(Step::RemovePod(key)),
                _ => {}
            }
            let key = ExternalKey { external: address };
            let entry = self.services.get(&key).filter(|value| value.service_id == NO_SERVICE);
            let Some(ServiceValue { flags, .. }) = entry else { continue };
            let pod = if leads.is_some() { SERVICE_IS_POD } else { 0 };
            match flags & SERVICE_IS_NODE | pod {
                0 => own.push(Step::RemoveService(key)),
                right if right == *flags => {}
                right => own.push(Step::PutService(key, own_address(right))),
            }
        }
        steps.append(&mut own);
        if !steps.is_empty() {
            steps.insert(0, Step::Grace);
        }
        steps
    }

    /// Notes that all of [`Actual::retirement`] was carried out, or that there was nothing to do.
    pub fn retired(&mut self) {
        self.leftovers.services.clear();
        self.leftovers.addresses.clear();
        let mut names = std::mem::take(&mut self.leftovers.names);
        names.retain(|id| self.names.contains_key(id) && self.is_gone(*id));
        self.leftovers.names = names;
    }

    /// Whether there are no conversations to be removed, but for those that a sweep is under way for.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.leftovers.unswept.is_empty()
    }

    /// What has to come before a sweep: a packet on its way could note another conversation behind it.
    #[must_use]
    pub fn before_sweep(&self) -> Option<Step> {
        self.leftovers.unsettled.then_some(Step::Grace)
    }

    /// What a sweep is due for, which is under way from now on, until [`Actual::end_sweep`].
    pub fn begin_sweep(&mut self) -> Departed {
        self.leftovers.begin_sweep().clone()
    }

    /// Notes how the sweep under way has ended. What it was for is due again if it has failed.
    pub fn end_sweep(&mut self, worked: bool) {
        self.leftovers.end_sweep(worked);
    }

    /// What a sweep is due or under way for.
    #[must_use]
    pub fn departed(&self) -> Departed {
        let mut departed = self.leftovers.sweeping.clone();
        departed.append(self.leftovers.unswept.clone());
        departed
    }

    /// The steps that free ids: of those of which nothing is left but the name, and no conversation either.
    #[must_use]
    pub fn freeing(&self) -> Vec<Step> {
        self.leftovers
            .names
            .iter()
            .filter(|id| self.is_gone(**id) && !self.leftovers.haunts_service(**id))
            .map(|id| Step::RemoveName(*id))
            .collect()
    }

    /// The steps of a sweep for which everything waits, and what it frees.
    pub(super) fn sweep_and_free(&self) -> Vec<Step> {
        if self.departed().is_empty() {
            return self.freeing();
        }
        let free = self.leftovers.names.iter().filter(|id| self.is_gone(**id));
        let free = free.map(|id| Step::RemoveName(*id));
        self.before_sweep().into_iter().chain([Step::Sweep]).chain(free).collect()
    }
}
