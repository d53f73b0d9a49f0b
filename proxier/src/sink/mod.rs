//! Where the desired state goes: the kernel (`bpf`), or, in kpng's form (`export`), other backends (`api`), a program that is
//! called (`exec`) or lines of JSON (`json`).

pub mod api;
pub mod bpf;
pub mod exec;
pub mod export;
pub mod json;

use std::net::IpAddr;

use thiserror::Error;

use crate::{
    catalog::Catalog,
    desired::{Desired, Scope, ServiceKey},
    model::ObjectName,
};

/// What a sink is given at every change: always the whole state, and where in it to look.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// Every Service and endpoint known.
    pub catalog: &'a Catalog,
    /// What this node should have.
    pub desired: &'a Desired,
    /// What of `desired` may differ from the snapshot before. [`Scope::All`] in the first one, and after a failure.
    pub scope: &'a Scope,
    /// Of which Services anything else may differ: the Service itself, or its endpoints, on whatever node. [`Scope::All`] in the
    /// first one, and after a failure.
    pub touched: &'a Scope<ObjectName>,
}

/// What is in the way of a [`Snapshot`]. Everything else of it is in force.
#[derive(Debug, Error)]
#[error("{}; everything else is in force", list(failures))]
pub struct Incomplete {
    /// One for each part that is not. There is one at least.
    pub failures: Vec<Failure>,
}

/// What is in the way of a part of a [`Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What it is about, for people.
    pub subject: String,
    /// The Service that it is about, if it is about one. It may be left alone until the whole state is applied again, or the
    /// Service changes.
    pub service: Option<ServiceKey>,
    /// Whether there is no room for it.
    pub is_full: bool,
    /// What went wrong, and what to do about it.
    pub message: String,
}

fn list(failures: &[Failure]) -> String {
    let line = |Failure { subject, message, .. }: &Failure| format!("{subject}: {message}");
    failures.iter().map(line).collect::<Vec<_>>().join("; ")
}

/// Where a sink's programs are, and whether what it writes reaches whoever comes after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Interfaces that carry the programs.
    pub interfaces: Vec<Attached>,
    /// Whether the tables that it writes are those that are pinned.
    pub pinned: bool,
    /// How the addresses of pods are reached whose Services ask for direct delivery.
    pub direct: DirectDelivery,
}

/// How the addresses of pods are reached whose Services ask for direct delivery. Empty if there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectDelivery {
    /// How many directly.
    pub reached: usize,
    /// The others.
    pub by_stack: Vec<ByStack>,
}

/// An address of a pod that is left to the node's stack, though a Service asks for direct delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByStack {
    /// The address.
    pub pod: IpAddr,
    /// The Services that ask.
    pub services: Vec<ObjectName>,
    /// Why, and what to do about it.
    pub reason: String,
}

/// An interface that carries the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its name.
    pub interface: String,
    /// Whether it leads to clients, rather than to a pod.
    pub is_uplink: bool,
    /// What became of XDP there; `None` where it was not asked for.
    pub xdp: Option<Xdp>,
}

/// What became of XDP at an uplink. The program at tc is there in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Xdp {
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
    /// It is not there, for this reason.
    Refused(String),
}

/// Brings the outside world in line with a [`Snapshot`].
pub trait Sink {
    /// Applies `snapshot`. Called once after all sources have delivered their first whole list, then at every change;
    /// called again with the same state some time after it failed.
    ///
    /// # Errors
    ///
    /// What could not be applied; the rest has been.
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()>;

    /// What the sink has in force already, before the first [`Sink::apply`]: what a former agent left. Empty if it cannot
    /// tell, or if nothing outlives an agent.
    fn in_force(&self) -> Desired {
        Desired::default()
    }

    /// What can be seen of the sink beside what it has applied; none if there is nothing.
    fn condition(&self) -> Option<Condition> {
        None
    }

    /// Whether something of what [`Sink::apply`] was given last is still to be put in force by somebody who does that in his own
    /// time, and tells by himself when he is done or has failed. Asked after each [`Sink::apply`] and about once a second.
    fn is_underway(&self) -> bool {
        false
    }

    /// Called about once a second, for housekeeping.
    ///
    /// # Errors
    ///
    /// What could not be done; it is tried again.
    fn tick(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
