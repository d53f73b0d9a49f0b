//! What each client must have, worked out the simple way from all that there is. For tests, and for the fuzzer: panics where the
//! store says anything else.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use proxier_localv1::{self as localv1, Endpoint, IpSet, Path, Service, Value, WatchReq, op_item::Op};

use super::{Client, Revision, Store};
use crate::{
    model::{Family, NodeName, ObjectName},
    sink::{
        api::server,
        export::{Exported, ExportedEndpoint, Pod},
    },
};

/// The store, what was put there, and clients of several nodes.
#[derive(Debug)]
pub(super) struct World {
    pub(super) store: Store,
    max_gone: usize,
    state: BTreeMap<ObjectName, Exported>,
    clients: Vec<Told>,
}

impl World {
    pub(super) fn new(max_gone: usize) -> Self {
        let clients = [("node0", false), ("node0", true), ("node1", true), ("elsewhere", false)];
        let told = |(node, draining)| Told::new(Client { node: NodeName::new(node), draining });
        let clients = clients.into_iter().map(told).collect();
        Self { store: Store::new(max_gone), max_gone, state: BTreeMap::new(), clients }
    }

    /// Sets Services, or removes them, in one revision.
    pub(super) fn put(&mut self, services: BTreeMap<ObjectName, Option<Exported>>) {
        for (name, exported) in &services {
            match exported {
                Some(exported) => self.state.insert(name.clone(), exported.clone()),
                None => self.state.remove(name),
            };
        }
        self.store.put(services);
        let newest = self.store.revision;
        let gone = &self.store.gone;
        assert!(gone.len() <= self.max_gone || gone.iter().all(|gone| gone.at == newest));
        assert_eq!(self.store.by_revision.len(), self.store.services.len());
    }

    pub(super) fn ask(&mut self, which: usize) {
        let which = which % self.clients.len();
        self.clients[which].ask(&self.store);
        self.clients[which].check(&self.state);
    }

    /// A client that comes and goes.
    fn pass(&self, client: Client) {
        let mut told = Told::new(client);
        told.ask(&self.store);
        told.check(&self.state);
    }

    /// Has all ask: nobody lacks anything then, and what has gone for good is forgotten.
    pub(super) fn finish(mut self) {
        for which in 0..self.clients.len() {
            self.ask(which);
            let told = &self.clients[which];
            assert!(self.store.batch(&told.client, told.seen).is_some_and(|batch| batch.is_empty()));
        }
        assert!(self.store.services.len() <= self.state.len() + self.store.gone.len());
    }
}

/// What a client has after everything that it was told.
#[derive(Debug)]
struct Told {
    client: Client,
    seen: Option<Revision>,
    services: BTreeMap<ObjectName, Service>,
    endpoints: BTreeMap<(ObjectName, String), Endpoint>,
}

impl Told {
    const fn new(client: Client) -> Self {
        Self { client, seen: None, services: BTreeMap::new(), endpoints: BTreeMap::new() }
    }

    /// Takes a batch in; starts over if so much has gone that nobody knows any more what.
    fn ask(&mut self, store: &Store) {
        let batch = store.batch(&self.client, self.seen).unwrap_or_else(|| {
            self.seen = None;
            store.batch(&self.client, None).expect("who has seen nothing has missed nothing")
        });
        let mut synced = false;
        for (position, item) in batch.items().enumerate() {
            assert!(!synced, "nothing comes after Sync");
            let op = item.op.expect("a step is something");
            let is_reset = matches!(op, Op::Reset(_));
            assert_eq!(
                is_reset,
                position == 0 && self.seen.is_none(),
                "Reset comes first, and only at first"
            );
            match op {
                Op::Reset(_) => {
                    self.services.clear();
                    self.endpoints.clear();
                }
                Op::Set(value) => self.set(value),
                Op::Delete(place) => self.delete(&place.path),
                Op::Sync(_) => synced = true,
            }
        }
        assert!(synced);
        self.seen = Some(batch.revision);
    }

    fn set(&mut self, value: Value) {
        let place = value.r#ref.expect("a value is somewhere");
        let (name, key) = parse(&place.path);
        match key {
            None => drop(self.services.insert(name, Service::decode(value.bytes).expect("a Service"))),
            Some(key) => {
                assert!(self.services.contains_key(&name), "no Service for {}", place.path);
                self.endpoints.insert((name, key), Endpoint::decode(value.bytes).expect("an endpoint"));
            }
        }
    }

    fn delete(&mut self, path: &str) {
        let (name, key) = parse(path);
        match key {
            None => {
                assert!(self.services.remove(&name).is_some(), "never told: {path}");
                assert!(!self.endpoints.keys().any(|(of, _)| *of == name), "outlived: {path}");
            }
            // It may be told of the end of what it never heard of: what that was like is not remembered.
            Some(key) => drop(self.endpoints.remove(&(name, key))),
        }
    }

    fn check(&self, state: &BTreeMap<ObjectName, Exported>) {
        let services: BTreeMap<_, _> =
            state.iter().map(|(name, exported)| (name.clone(), exported.service.clone())).collect();
        assert_eq!(self.services, services);
        let mut endpoints = BTreeMap::new();
        for (name, exported) in state {
            let mut keys = BTreeSet::new();
            for endpoint in &exported.endpoints {
                let key = endpoint.key(&name.namespace);
                let local = endpoint.node.as_ref() == Some(&self.client.node);
                let is_first = keys.insert(key.clone());
                let is_told = !endpoint.draining || (self.client.draining && local);
                let Some(scopes) = exported.scopes(local).filter(|_| is_first && is_told) else { continue };
                let told = Endpoint {
                    local,
                    scopes: Some(scopes),
                    draining: endpoint.draining,
                    ..endpoint.common.clone()
                };
                endpoints.insert((name.clone(), key), told);
            }
        }
        assert_eq!(self.endpoints, endpoints);
    }
}

fn parse(path: &str) -> (ObjectName, Option<String>) {
    let Path { namespace, name, key } = Path::parse(path).expect("a path that clients can read");
    (ObjectName::new(namespace, name), key.map(str::to_owned))
}

/// Takes bytes as a conversation: how much is remembered, then changes and requests, some of them of any bytes.
///
/// # Panics
///
/// A client is told anything but what there is.
pub fn watch(data: &[u8]) {
    let mut bytes = data.iter().copied();
    let Some(max_gone) = bytes.next() else { return };
    let mut world = World::new(usize::from(max_gone % 8));
    let mut due = BTreeMap::new();
    while let Some(step) = bytes.next() {
        let argument = step >> 3;
        match step & 7 {
            0..=2 => {
                let name = ObjectName::new("default", format!("s{}", argument & 3));
                let exported = (step & 7 != 2).then(|| exported(&name, &mut bytes));
                due.insert(name, exported);
                // Several are one revision.
                if argument & 4 == 0 {
                    world.put(std::mem::take(&mut due));
                }
            }
            3..=5 => world.ask(argument.into()),
            _ => {
                let length = usize::from(argument) + usize::from(bytes.next().unwrap_or_default());
                let request: Vec<u8> = bytes.by_ref().take(length).collect();
                let Ok(request) = WatchReq::decode(&*request) else { continue };
                assert_eq!(WatchReq::decode(&*request.encode_to_vec()).as_ref(), Ok(&request));
                if let Ok(client) = server::client(request) {
                    world.pass(client);
                }
            }
        }
    }
    world.put(due);
    world.finish();
}

fn exported(name: &ObjectName, bytes: &mut impl Iterator<Item = u8>) -> Exported {
    let mut next = || bytes.next().unwrap_or_default();
    let [kind, count] = [next(), next()];
    let service = Service {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        r#type: (kind >> 2 & 1).to_string(),
        internal_traffic_to_local: kind & 1 != 0,
        external_traffic_to_local: kind & 2 != 0,
        ..Service::default()
    };
    let endpoint = |_| {
        let [a, b] = [next(), next()];
        let address = [11, 0, 0, b & 3];
        let namespace = if a & 4 == 0 { "default" } else { "guests" };
        ExportedEndpoint {
            pod: match a & 8 {
                0 => Pod::Named(ObjectName::new(namespace, format!("p{}", a & 3))),
                _ => Pod::Unnamed(vec![address.into()]),
            },
            family: if b & 4 == 0 { Family::V4 } else { Family::V6 },
            node: match a >> 4 & 3 {
                3 => None,
                n => Some(NodeName::new(format!("node{n}"))),
            },
            draining: a & 0x40 != 0,
            common: localv1::Endpoint {
                ips: Some(IpSet { v4: vec![std::net::Ipv4Addr::from(address).to_string()], v6: Vec::new() }),
                ..Endpoint::default()
            },
        }
    };
    Exported { service, endpoints: (0..count & 7).map(endpoint).collect() }
}
