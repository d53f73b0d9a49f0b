//! Follows interfaces and routes: puts the programs where they belong, takes them off elsewhere, and has the tables say by which
//! links pods are reached directly, in an order in which no packet meets a link without programs. Not for finding interfaces
//! (`uplinks`), for how a program is attached (`attach`), or for what a link is to direct delivery (`reach`).

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Instant};

use anyhow::Context as _;

use super::{
    BpfSink, Names,
    attach::{self, Role},
    preflight,
    reach::{Programs, Reach},
    uplinks::{Interface, LinkHeader, View},
};
use crate::desired::{Delivery, Desired, DesiredService, Scope};

impl BpfSink {
    /// Attaches to the interfaces of `view` that lead to clients and lets go of those that do not any more.
    ///
    /// # Errors
    ///
    /// The tables cannot be told by which links pods are reached now. To be tried again.
    pub(super) fn follow(&mut self, view: &View) -> anyhow::Result<()> {
        for name in view.missing.difference(&self.reported_missing) {
            let present: BTreeSet<String> = view.interfaces.iter().map(|i| i.name.clone()).collect();
            tracing::warn!(
                uplink = name,
                "no interface is called {name} (there are {}): waiting for it; check --uplink",
                Names(&present)
            );
        }
        self.reported_missing.clone_from(&view.missing);
        self.attached.retain(|(interface, _)| view.interfaces.contains(interface));
        self.refused.retain(|interface| view.interfaces.contains(interface));
        self.xdp.retain(|index| self.attached.iter().any(|(interface, _)| interface.index == index));
        let reach = self.reach(view, &BTreeSet::new());
        self.direct_links = self.actual.linked_pods().flat_map(|pod| reach.needs(pod.to_ip())).collect();
        self.xdp.follow(view);
        self.attach_wanted(view);
        // Between two default routes there may be a moment with none: the last uplinks stay.
        let going = if view.uplinks.is_empty() { BTreeSet::new() } else { self.going(view) };
        let linked = self.link(self.reach(view, &going));
        // Until the tables know it, packets go by these links.
        if linked.is_ok() {
            self.let_go(view, &going);
        }
        let without_uplink = !self.attached.iter().any(|(_, role)| *role == Role::Uplink);
        if without_uplink && !self.without_uplink {
            let wanted = if view.missing.is_empty() {
                "a default route; or name the interfaces towards clients with --uplink".to_owned()
            } else {
                Names(&view.missing).to_string()
            };
            tracing::warn!("no uplink: packets from outside are not rewritten; waiting for {wanted}");
        }
        self.without_uplink = without_uplink;
        linked
    }

    fn attach_wanted(&mut self, view: &View) {
        for (interface, role) in self.wanted(view) {
            if self.attached.contains(&(interface.clone(), role)) {
                continue;
            }
            match attach::attach(&mut self.ebpf, &self.pin_path, &interface, role, self.method) {
                Ok(()) => {
                    tracing::info!(interface = interface.name, ?role, method = ?self.method, "programs are attached");
                    self.refused.remove(&interface);
                    self.attached.retain(|(attached, _)| attached.index != interface.index);
                    self.attach_xdp(&interface, role, false);
                    self.attached.insert((interface, role));
                }
                Err(error) => {
                    if self.refused.insert(interface.clone()) {
                        tracing::error!(interface = interface.name, ?role, "{error:#}");
                    }
                }
            }
        }
    }

    /// How pods are reached, without the programs of the interfaces that are `going`.
    fn reach(&self, view: &View, going: &BTreeSet<u32>) -> Reach {
        let mut programs = Programs { too_old: !preflight::has_direct_delivery(), ..Programs::default() };
        let mut has_ethernet = false;
        for (interface, role) in &self.attached {
            if going.contains(&interface.index) || self.refused.contains(interface) {
                continue;
            }
            match role {
                Role::Uplink => {
                    programs.uplinks.insert(interface.index);
                    has_ethernet |= interface.header == Some(LinkHeader::Ethernet);
                }
                Role::PodLink | Role::PodPort => {
                    programs.pod_links.insert(interface.index);
                }
            }
        }
        programs.no_ethernet = !programs.uplinks.is_empty() && !has_ethernet;
        Reach::new(&view.interfaces, view.routes.clone(), &programs, self.not_forwarding.clone())
    }

    /// Has the tables say how pods are reached now.
    fn link(&mut self, reach: Reach) -> anyhow::Result<()> {
        if self.linked && *self.reach == reach {
            return Ok(());
        }
        self.reach = Arc::new(reach);
        self.linked = false;
        self.refresh()?;
        self.execute(self.actual.relink(&*self.reach))
            .context("by which links pods are reached is out of date")?;
        self.linked = true;
        Ok(())
    }

    /// Sees to the links of pods that are about to be reached directly: the first packet that the plan lets through may already
    /// go so.
    pub(super) fn prepare_links(&mut self, desired: &Desired, scope: &Scope) -> anyhow::Result<()> {
        let services: Vec<&DesiredService> = match scope {
            Scope::All => desired.services.values().map(|service| &**service).collect(),
            Scope::Only(keys) => {
                keys.iter().filter_map(|key| desired.services.get(key)).map(|service| &**service).collect()
            }
        };
        let direct = services.into_iter().filter(|service| service.delivery == Delivery::Direct);
        let pods: BTreeSet<IpAddr> =
            direct.flat_map(|service| service.pods.union(&service.draining)).copied().collect();
        if !pods.is_empty() && self.view.has_changed().unwrap_or_default() {
            let view = self.view.borrow_and_update().clone();
            self.follow(&view)?;
        }
        let needed: BTreeSet<u32> = pods.iter().flat_map(|pod| self.reach.needs(*pod)).collect();
        let is_new = !needed.is_subset(&self.direct_links);
        if !is_new && self.linked && self.reach.is_of(&self.not_forwarding) {
            return Ok(());
        }
        self.direct_links.extend(needed);
        let view = self.view.borrow().clone();
        self.attach_wanted(&view);
        self.link(self.reach(&view, &BTreeSet::new()))
    }

    /// Every interface that programs belong on, and as what.
    fn wanted(&self, view: &View) -> Vec<(Interface, Role)> {
        // A pair that has just lost its default route, which follow() lets be what it was.
        let stays = |interface: &Interface| {
            view.uplinks.is_empty() && self.attached.contains(&(interface.clone(), Role::Uplink))
        };
        let is_wanted =
            |interface: &Interface| self.local_clients || self.direct_links.contains(&interface.index);
        let pod_links = view.pod_links.iter().filter(|interface| is_wanted(interface) && !stays(interface));
        let uplinks = view.uplinks.iter().map(|interface| (interface.clone(), Role::Uplink));
        // Pods first: their replies leave by uplinks as well.
        let role = |interface: &Interface| {
            if interface.bridge.is_some() { Role::PodPort } else { Role::PodLink }
        };
        pod_links.map(|interface| (interface.clone(), role(interface))).chain(uplinks).collect()
    }

    /// Puts the programs in their places again, in case somebody has taken them off: a filter goes with its qdisc, and
    /// other programs of the node replace that.
    pub(super) fn attach_again(&mut self) {
        for (interface, role) in &self.attached.clone() {
            match attach::attach(&mut self.ebpf, &self.pin_path, interface, *role, self.method) {
                Ok(()) => {
                    self.refused.remove(interface);
                    self.attach_xdp(interface, *role, false);
                }
                Err(error) if self.refused.insert(interface.clone()) => {
                    tracing::warn!(
                        interface = interface.name,
                        ?role,
                        "programs may be off by now: {error:#}"
                    );
                }
                Err(_) => {}
            }
        }
        self.attached_at = Instant::now();
    }

    /// Indices of interfaces that carry programs and are to carry none.
    fn going(&self, view: &View) -> BTreeSet<u32> {
        let wanted: BTreeSet<u32> =
            self.wanted(view).into_iter().map(|(interface, _)| interface.index).collect();
        let pinned = attach::pinned(&self.pin_path);
        let attached = self.attached.iter().map(|(interface, _)| interface.index);
        pinned.into_iter().chain(attached).filter(|index| !wanted.contains(index)).collect()
    }

    fn let_go(&mut self, view: &View, going: &BTreeSet<u32>) {
        for index in going {
            let index = *index;
            // Both directions at once, or conversations that go on would have one past the stack and one through it.
            if let Err(error) = self.tables.remove_link(index) {
                tracing::warn!(
                    index,
                    "direct conversations by an interface that goes may not go on: {error}"
                );
            }
            let interface = view.interfaces.iter().find(|interface| interface.index == index);
            let detached = match interface {
                Some(interface) => attach::detach(&self.pin_path, interface),
                // The link led to an interface that went, but its pin is still there.
                None => attach::unpin(&self.pin_path, index),
            };
            let name = interface.map_or("", |interface| interface.name.as_str());
            match detached {
                Ok(_) if name.is_empty() => {
                    tracing::debug!(index, "pins of an interface that went are removed");
                }
                Ok(_) => {
                    tracing::info!(interface = name, "leads to no client any more: programs are detached");
                }
                Err(error) => tracing::warn!(interface = name, "programs stay attached: {error:#}"),
            }
            self.attached.retain(|(interface, _)| interface.index != index);
            self.xdp.retain(|other| other != index);
        }
    }
}
