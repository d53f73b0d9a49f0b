//! Reads the pinned maps for people: `proxier get`. Needs no agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use ipnet::IpNet;
use proxier_common::{
    Address, DELIVERY_NODE, DropReason, Hook, MEMBER_DRAINING, SERVICE_BALANCE_FLOW, SERVICE_DIRECT,
    SERVICE_IS_NODE, SERVICE_IS_POD, SERVICE_PASS_WITHOUT_BACKEND, SourceKey, Statistic, TCP_ESTABLISHED,
    TCP_REPLY_FIN, TCP_REQUEST_FIN, is_direct, protocol,
    timeout::{self, SECOND},
};
use serde::Serialize;

use super::{
    clock,
    tables::{Counters, Tables},
};
use crate::{
    delta::decode_name,
    desired::{Balance, Delivery, ServiceKey},
};

/// An external address, as the kernel has it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// The Service's namespace; empty if the table of names has lost it.
    pub namespace: String,
    /// The Service's name; empty if the table of names has lost it.
    pub name: String,
    /// The external address.
    pub external: IpAddr,
    /// The Service's id in the kernel's tables.
    pub service_id: u32,
    /// The generation in force.
    pub generation: u32,
    /// How many pods it has here.
    pub backends: u32,
    /// Seconds an idle client keeps its pod.
    pub affinity_timeout: u32,
    /// What happens to packets without a pod: `drop` or `pass`.
    pub no_backend: &'static str,
    /// What stays on one pod: all of a `client`, or a `flow`.
    pub balance: &'static str,
    /// How new conversations are to reach the pods: by the node's `stack`, or `direct`.
    pub delivery: &'static str,
    /// The networks that may send; none for everybody.
    pub sources: Option<Vec<IpNet>>,
}

/// What the kernel does with a pod of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum EndpointState {
    /// It takes new conversations.
    Ready,
    /// It keeps the conversations that it has.
    Draining,
}

impl EndpointState {
    /// The name that commands print.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

/// A pod of a Service, as the kernel has it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointRow {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub name: String,
    /// The pod's address.
    pub pod: IpAddr,
    /// Whether it takes new conversations.
    pub state: EndpointState,
    /// How new ones reach it: by the node's `stack`, or `direct`.
    pub delivery: &'static str,
    /// The node's link by which packets may go to it past the stack; none if they may not.
    pub link: Option<String>,
    /// The Service's id in the kernel's tables.
    pub service_id: u32,
    /// The generation it is a backend of; none if it drains.
    pub generation: Option<u32>,
    /// Its slot in that generation; none if it drains.
    pub slot: Option<u32>,
}

/// A conversation of a pod through an external address.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowRow {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub name: String,
    /// IP protocol, by name where it has one (`tcp`, `udp`, `sctp`, `gre`, `50`).
    pub protocol: String,
    /// The client's address.
    pub peer: IpAddr,
    /// The client's port; of ICMP and protocols without ports 0.
    pub peer_port: u16,
    /// The external address.
    pub external: IpAddr,
    /// The pod's address.
    pub pod: IpAddr,
    /// The pod's port; of an ICMP query its identifier; of protocols without ports 0.
    pub pod_port: u16,
    /// For TCP `opening`, `established`, `closing`, `closed`; else empty.
    pub state: &'static str,
    /// How its packets go: by the node's `stack`, `direct`, or from a process of the `node` itself.
    pub delivery: &'static str,
    /// Seconds since the last packet.
    pub idle_seconds: u64,
}

/// A client that stays on a pod, whatever its ports and protocols; or one conversation that does.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionRow {
    /// The Service's namespace; empty if the table of names has lost it.
    pub namespace: String,
    /// The Service's name; empty if the table of names has lost it.
    pub name: String,
    /// The external address.
    pub external: IpAddr,
    /// The client's address.
    pub peer: IpAddr,
    /// IP protocol of the conversation, by name where it has one; none if the session is the client's.
    pub protocol: Option<String>,
    /// The external port of the conversation, or its ICMP identifier; 0 if it has none, or the session is the client's.
    pub external_port: u16,
    /// The client's port, likewise.
    pub peer_port: u16,
    /// The pod's address.
    pub pod: IpAddr,
    /// Seconds since the client last sent something. Past the Service's affinity timeout the session counts no more; it
    /// stays in the table until the agent next looks for such.
    pub idle_seconds: u64,
}

/// Packets dropped at one place for one reason.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DropRow {
    /// Why, as [`DropReason::name`].
    pub reason: &'static str,
    /// Where, as [`Hook::name`].
    pub hook: &'static str,
    /// How many, since the maps were made.
    pub packets: u64,
}

/// How often something has happened.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatisticRow {
    /// What, as [`Statistic::name`].
    pub statistic: &'static str,
    /// How often, since the maps were made.
    pub count: u64,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FillRow {
    /// The map's name.
    pub map: &'static str,
    /// How many entries it has.
    pub entries: u64,
    /// How many it has room for.
    pub max_entries: u32,
}

/// Every external address, by Service and address.
///
/// # Errors
///
/// No pinned maps below `pin_path`, no privilege, maps of another version.
pub fn services(pin_path: &Path) -> anyhow::Result<Vec<ServiceRow>> {
    let tables = open(pin_path)?;
    let names = Names::read(&tables)?;
    let mut sources: BTreeMap<(u32, u32), Vec<IpNet>> = BTreeMap::new();
    for entry in tables.sources.entries() {
        let range = entry?;
        let SourceKey { service_id, generation, .. } = range.key;
        sources.entry((service_id, generation)).or_default().extend(range.net());
    }
    sources.values_mut().for_each(|nets| nets.sort_unstable());
    let mut rows = Vec::new();
    for entry in tables.services.entries() {
        let (key, value) = entry?;
        if value.flags & (SERVICE_IS_POD | SERVICE_IS_NODE) != 0 {
            continue;
        }
        let (namespace, name) = names.of(value.service_id);
        rows.push(ServiceRow {
            namespace,
            name,
            external: key.external.to_ip(),
            service_id: value.service_id,
            generation: value.generation,
            backends: value.backend_count,
            affinity_timeout: value.affinity_timeout,
            no_backend: if value.flags & SERVICE_PASS_WITHOUT_BACKEND == 0 { "drop" } else { "pass" },
            balance: if value.flags & SERVICE_BALANCE_FLOW == 0 { Balance::Client } else { Balance::Flow }
                .name(),
            delivery: if value.flags & SERVICE_DIRECT == 0 { Delivery::Stack } else { Delivery::Direct }
                .name(),
            sources: (value.source_generation != 0).then(|| {
                sources.get(&(value.service_id, value.source_generation)).cloned().unwrap_or_default()
            }),
        });
    }
    rows.sort_by(|a, b| (&a.namespace, &a.name, a.external).cmp(&(&b.namespace, &b.name, b.external)));
    Ok(rows)
}

/// Every pod that a Service's conversations go to, by Service: those that take new ones by slot, then those that drain.
///
/// # Errors
///
/// As [`services`].
pub fn endpoints(pin_path: &Path) -> anyhow::Result<Vec<EndpointRow>> {
    let tables = open(pin_path)?;
    let names = Names::read(&tables)?;
    let mut in_force = BTreeSet::new();
    let mut direct = BTreeSet::new();
    for entry in tables.services.entries() {
        let (_, value) = entry?;
        in_force.insert((value.service_id, value.generation));
        if value.flags & SERVICE_DIRECT != 0 {
            direct.insert(value.service_id);
        }
    }
    let links = Links::read(&tables)?;
    let delivery = |service_id, link: Option<&String>| {
        let is_direct = direct.contains(&service_id) && link.is_some();
        if is_direct { Delivery::Direct } else { Delivery::Stack }.name()
    };
    let mut rows = Vec::new();
    let mut ready = BTreeSet::new();
    for entry in tables.backends.entries() {
        let (key, value) = entry?;
        if !in_force.contains(&(key.service_id, key.generation)) {
            continue;
        }
        let (namespace, name) = names.of(key.service_id);
        let link = links.0.get(&value.pod);
        rows.push(EndpointRow {
            namespace,
            name,
            pod: value.pod.to_ip(),
            state: EndpointState::Ready,
            delivery: delivery(key.service_id, link),
            link: link.cloned(),
            service_id: key.service_id,
            generation: Some(key.generation),
            slot: Some(key.slot),
        });
        ready.insert((key.service_id, value.pod));
    }
    for entry in tables.members.entries() {
        let (key, value) = entry?;
        // A pod is marked before the generation without it is in force.
        if value.flags & MEMBER_DRAINING == 0 || ready.contains(&(key.service_id, key.pod)) {
            continue;
        }
        let (namespace, name) = names.of(key.service_id);
        let link = links.0.get(&key.pod);
        rows.push(EndpointRow {
            namespace,
            name,
            pod: key.pod.to_ip(),
            state: EndpointState::Draining,
            delivery: delivery(key.service_id, link),
            link: link.cloned(),
            service_id: key.service_id,
            generation: None,
            slot: None,
        });
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, a.service_id, a.state, a.slot, a.pod).cmp(&(
            &b.namespace,
            &b.name,
            b.service_id,
            b.state,
            b.slot,
            b.pod,
        ))
    });
    Ok(rows)
}

/// Every flow, by Service, client and protocol.
///
/// # Errors
///
/// As [`services`].
pub fn flows(pin_path: &Path) -> anyhow::Result<Vec<FlowRow>> {
    let tables = open(pin_path)?;
    let names = Names::read(&tables)?;
    let now = clock::monotonic()?;
    let mut rows = Vec::new();
    for entry in tables.flows.entries() {
        let (key, value) = entry?;
        let (namespace, name) = names.of(value.service_id);
        rows.push(FlowRow {
            namespace,
            name,
            protocol: protocol_name(key.protocol),
            peer: key.peer.to_ip(),
            peer_port: u16::from_be(key.peer_port),
            external: value.external.to_ip(),
            pod: key.pod.to_ip(),
            pod_port: u16::from_be(key.pod_port),
            state: if key.protocol == protocol::TCP { tcp_state(value.tcp_state) } else { "" },
            delivery: delivery_name(value.delivery),
            idle_seconds: now.saturating_sub(value.last_seen) / SECOND,
        });
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, a.peer, &a.protocol, a.peer_port, a.external, a.pod_port).cmp(&(
            &b.namespace,
            &b.name,
            b.peer,
            &b.protocol,
            b.peer_port,
            b.external,
            b.pod_port,
        ))
    });
    Ok(rows)
}

/// Every session, by Service, external address, client and conversation.
///
/// # Errors
///
/// As [`services`].
pub fn sessions(pin_path: &Path) -> anyhow::Result<Vec<SessionRow>> {
    let tables = open(pin_path)?;
    let names = Names::read(&tables)?;
    let now = clock::monotonic()?;
    let mut rows = Vec::new();
    for entry in tables.sessions.entries() {
        let (key, value) = entry?;
        let (namespace, name) = names.of(value.service_id);
        rows.push(SessionRow {
            namespace,
            name,
            external: key.external.to_ip(),
            peer: key.peer.to_ip(),
            protocol: (key.protocol != 0).then(|| protocol_name(key.protocol)),
            external_port: u16::from_be(key.external_port),
            peer_port: u16::from_be(key.peer_port),
            pod: value.pod.to_ip(),
            idle_seconds: now.saturating_sub(value.last_seen) / SECOND,
        });
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, a.external, a.peer, &a.protocol, a.peer_port, a.external_port).cmp(&(
            &b.namespace,
            &b.name,
            b.external,
            b.peer,
            &b.protocol,
            b.peer_port,
            b.external_port,
        ))
    });
    Ok(rows)
}

/// Packets dropped, by reason and hook; those that were never needed are there with 0.
///
/// # Errors
///
/// As [`services`].
pub fn drops(pin_path: &Path) -> anyhow::Result<Vec<DropRow>> {
    let counters = Counters::drops(pin_path).map_err(|error| unprivileged(error.into()))?;
    let mut rows = Vec::new();
    for reason in DropReason::ALL {
        for hook in Hook::ALL {
            let packets = counters.total(hook.counter(reason))?;
            rows.push(DropRow { reason: reason.name(), hook: hook.name(), packets });
        }
    }
    Ok(rows)
}

/// What the programs count beside packets dropped.
///
/// # Errors
///
/// As [`services`].
pub fn statistics(pin_path: &Path) -> anyhow::Result<Vec<StatisticRow>> {
    let counters = Counters::stats(pin_path).map_err(|error| unprivileged(error.into()))?;
    let row = |statistic: Statistic| {
        Ok(StatisticRow { statistic: statistic.name(), count: counters.total(statistic as u32)? })
    };
    Statistic::ALL.into_iter().map(row).collect()
}

/// How full the maps are that have keys and can be full. Reads all of them, which takes
/// tenths of a second if flows and sessions are full.
///
/// # Errors
///
/// As [`services`].
pub fn fill(pin_path: &Path) -> anyhow::Result<Vec<FillRow>> {
    let fill = open(pin_path)?.fill(pin_path)?;
    Ok(fill.map(|(map, entries, max_entries)| FillRow { map, entries, max_entries }).into())
}

/// Opens the maps, and says what a user without privilege can do about it if that fails.
fn open(pin_path: &Path) -> anyhow::Result<Tables> {
    Tables::open(pin_path).map_err(|error| unprivileged(error.into()))
}

fn unprivileged(error: anyhow::Error) -> anyhow::Error {
    if nix::unistd::geteuid().is_root() {
        return error;
    }
    error.context("the kernel's tables are for root, or for who has the capability BPF: try it as root")
}

/// The map `names`, decoded.
struct Names(BTreeMap<u32, (String, String)>);

impl Names {
    fn read(tables: &Tables) -> anyhow::Result<Self> {
        let mut names = BTreeMap::new();
        for entry in tables.names.entries() {
            let (key, value) = entry?;
            if let Some(ServiceKey { service, .. }) = decode_name(&value) {
                names.insert(key.service_id, (service.namespace.to_string(), service.name.to_string()));
            }
        }
        Ok(Self(names))
    }

    fn of(&self, service_id: u32) -> (String, String) {
        self.0.get(&service_id).cloned().unwrap_or_default()
    }
}

/// The links by which pods are reached past the stack, by name.
struct Links(BTreeMap<Address, String>);

impl Links {
    fn read(tables: &Tables) -> anyhow::Result<Self> {
        let mut links = BTreeMap::new();
        for entry in tables.pods.entries() {
            let (key, value) = entry?;
            if value.interface != 0 {
                let name = nix::net::if_::if_indextoname(value.interface);
                // One of another network namespace, or gone since.
                let name = name
                    .map_or_else(|_| value.interface.to_string(), |name| name.to_string_lossy().into_owned());
                links.insert(key.pod, name);
            }
        }
        Ok(Self(links))
    }
}

const fn delivery_name(delivery: u8) -> &'static str {
    match delivery {
        DELIVERY_NODE => "node",
        delivery if is_direct(delivery) => Delivery::Direct.name(),
        _ => Delivery::Stack.name(),
    }
}

/// By name where it has one.
fn protocol_name(number: u8) -> String {
    protocol::name(number).map_or_else(|| number.to_string(), ToOwned::to_owned)
}

const fn tcp_state(state: u8) -> &'static str {
    if timeout::tcp_is_closed(state) {
        "closed"
    } else if state & (TCP_REQUEST_FIN | TCP_REPLY_FIN) != 0 {
        "closing"
    } else if state & TCP_ESTABLISHED != 0 {
        "established"
    } else {
        "opening"
    }
}
