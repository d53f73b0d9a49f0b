//! The pinned maps, with their types: opening, checking, reading and writing them.

use std::{
    collections::HashSet,
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::{
    Pod,
    maps::{
        Array, HashMap, Map, MapData, MapError, MapInfo, MapType, PerCpuArray, PerCpuValues, RingBuf,
        lpm_trie::{Key as LpmKey, LpmTrie},
    },
    sys::SyscallError,
};
use proxier_common::{
    Address, BackendKey, BackendValue, DROP_COUNTERS, EVENT_BYTES, EventBudget, ExternalKey, FlowKey,
    FlowValue, FragmentKey, FragmentValue, LINK_OF_PORTS, MAX_BACKENDS, MAX_FLOWS, MAX_FRAGMENTS,
    MAX_POD_LINKS, MAX_SERVICES, MAX_SESSIONS, MAX_SOURCES, MemberKey, MemberValue, NameKey, NameValue,
    POD_HAS_PEER, PodKey, PodLinkValue, PodValue, SCHEMA, STATISTICS, ServiceValue, SessionKey, SessionValue,
    SourceKey, SourceValue,
};
use thiserror::Error;

use super::{
    scan,
    versions::{self, Version},
};
use crate::delta::{Actual, SourceRange, Step};

/// What can go wrong with a map.
#[derive(Debug, Error)]
pub(super) enum TableError {
    /// There is no such pin.
    #[error(
        "there is no map `{map}` at {}: is `proxier ... to-bpf` running on this node, with this --pin-path?{}",
        path.display(),
        beside(others)
    )]
    Missing {
        /// The map's name.
        map: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Versions of proxier whose maps are there.
        others: Vec<String>,
    },
    /// The pin cannot be opened.
    #[error("the map pinned at {} cannot be opened", path.display())]
    Open {
        /// Where it is pinned.
        path: PathBuf,
        /// Why.
        source: MapError,
    },
    /// The pinned map is not the one that this version of proxier expects.
    #[error(
        "the map pinned at {} has {found}, this version of proxier expects {expected}: it was made by another \
         program or another version; stop the agent and run `proxier cleanup --pin-path {}`, which ends running \
         conversations, or choose another --pin-path",
        path.display(),
        pin_path.display()
    )]
    Shape {
        /// Where it is pinned.
        path: PathBuf,
        /// What `--pin-path` was.
        pin_path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// No room for another entry.
    #[error("the map `{map}` is full at {max_entries} entries: no more {of} fit on this node")]
    Full {
        /// The map's name.
        map: &'static str,
        /// What it is full of.
        of: &'static str,
        /// Its size.
        max_entries: u32,
    },
    /// The kernel refused.
    #[error("the map `{map}` cannot be {action}")]
    Access {
        /// The map's name.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: MapError,
    },
}

/// What else there is, as the rest of a sentence.
fn beside(others: &[String]) -> String {
    if others.is_empty() {
        return String::new();
    }
    format!(" What is there is another version's ({}): ask a proxier of that version", others.join(", "))
}

/// Name and shape of a map, to be held against what is pinned: the kernel hands out whatever is at the path.
#[derive(Clone, Copy, Debug)]
struct Shape {
    name: &'static str,
    kind: MapType,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

impl Shape {
    const fn of<K, V>(name: &'static str, kind: MapType, max_entries: u32) -> Self {
        // The ABI's types have a few dozen bytes.
        #[expect(clippy::cast_possible_truncation, reason = "sizes of the ABI's types")]
        let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
        Self { name, kind, key_size, value_size, max_entries }
    }
}

const SERVICES: Shape = Shape::of::<ExternalKey, ServiceValue>("services", MapType::Hash, MAX_SERVICES);
const BACKENDS: Shape = Shape::of::<BackendKey, BackendValue>("backends", MapType::Hash, MAX_BACKENDS);
const MEMBERS: Shape = Shape::of::<MemberKey, MemberValue>("members", MapType::Hash, MAX_BACKENDS);
const PODS: Shape = Shape::of::<PodKey, PodValue>("pods", MapType::Hash, MAX_SERVICES);
const SOURCES: Shape = Shape::of::<LpmKey<SourceKey>, SourceValue>("sources", MapType::LpmTrie, MAX_SOURCES);
const NAMES: Shape = Shape::of::<NameKey, NameValue>("names", MapType::Hash, MAX_SERVICES);
const SESSIONS: Shape = Shape::of::<SessionKey, SessionValue>("sessions", MapType::LruHash, MAX_SESSIONS);
const FLOWS: Shape = Shape::of::<FlowKey, FlowValue>("flows", MapType::LruHash, MAX_FLOWS);
const FRAGMENTS: Shape =
    Shape::of::<FragmentKey, FragmentValue>("fragments", MapType::LruHash, MAX_FRAGMENTS);
const DROPS: Shape = Shape::of::<u32, u64>("drops", MapType::PerCpuArray, DROP_COUNTERS);

const STATS: Shape = Shape::of::<u32, u64>("stats", MapType::PerCpuArray, STATISTICS);
const EVENTS: Shape =
    Shape { name: "events", kind: MapType::RingBuf, key_size: 0, value_size: 0, max_entries: EVENT_BYTES };
const EVENT_BUDGETS: Shape =
    Shape::of::<u32, EventBudget>("event_budgets", MapType::PerCpuArray, DROP_COUNTERS);
const POD_LINKS: Shape = Shape::of::<u32, PodLinkValue>("pod_links", MapType::Array, MAX_POD_LINKS);

const ALL: [Shape; 14] = [
    SERVICES,
    BACKENDS,
    MEMBERS,
    PODS,
    SOURCES,
    NAMES,
    SESSIONS,
    FLOWS,
    FRAGMENTS,
    DROPS,
    STATS,
    EVENTS,
    EVENT_BUDGETS,
    POD_LINKS,
];

/// The directory that holds the maps of this version's ABI.
pub(super) fn directory(pin_path: &Path) -> PathBuf {
    pin_path.join(versions::name(SCHEMA))
}

/// Names of all maps, and where each is pinned.
pub(super) fn pins(pin_path: &Path) -> impl Iterator<Item = (&'static str, PathBuf)> {
    let directory = directory(pin_path);
    ALL.into_iter().map(move |shape| (shape.name, directory.join(shape.name)))
}

/// Checks those maps that are pinned already.
///
/// # Errors
///
/// [`TableError::Shape`] and [`TableError::Open`].
pub(super) fn check_pinned(pin_path: &Path) -> Result<(), TableError> {
    for shape in ALL {
        match open_pinned(pin_path, shape) {
            Ok(_) | Err(TableError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn open_pinned(pin_path: &Path, shape: Shape) -> Result<MapData, TableError> {
    let path = directory(pin_path).join(shape.name);
    if !path.exists() {
        let others = versions::others(pin_path).iter().map(Version::name).collect();
        return Err(TableError::Missing { map: shape.name, path, others });
    }
    let map = MapData::from_pin(&path).map_err(|source| TableError::Open { path: path.clone(), source })?;
    let info = map.info().map_err(|source| TableError::Open { path: path.clone(), source })?;
    let expected = describe(shape.kind, shape.key_size, shape.value_size, shape.max_entries);
    let found = described(&info);
    if found == expected {
        Ok(map)
    } else {
        Err(TableError::Shape { path, pin_path: pin_path.to_owned(), found, expected })
    }
}

fn described(info: &MapInfo) -> String {
    match info.map_type() {
        Ok(kind) => describe(kind, info.key_size(), info.value_size(), info.max_entries()),
        Err(_) => "a type of map that is not known here".to_owned(),
    }
}

fn describe(kind: MapType, key_size: u32, value_size: u32, max_entries: u32) -> String {
    format!("type {kind:?}, keys of {key_size} and values of {value_size} bytes, {max_entries} entries")
}

/// A hash map of the ABI.
#[derive(Debug)]
pub(super) struct Table<K: Pod, V: Pod> {
    shape: Shape,
    /// The kernel's number for the map.
    id: u32,
    map: HashMap<MapData, K, V>,
    /// The same map, for what aya has no call for.
    fd: OwnedFd,
    /// How many entries [`Table::retain`] has removed.
    pub(super) removed: Arc<AtomicU64>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn open(pin_path: &Path, shape: Shape) -> Result<Self, TableError> {
        let data = open_pinned(pin_path, shape)?;
        let error = |source| TableError::Access { map: shape.name, action: "opened", source };
        let id = data.info().map_err(error)?.id();
        let fd = data.fd().as_fd().try_clone_to_owned();
        let fd = fd.map_err(|source| TableError::Open {
            path: directory(pin_path).join(shape.name),
            source: source.into(),
        })?;
        let map = match shape.kind {
            MapType::LruHash => Map::LruHashMap(data),
            _ => Map::HashMap(data),
        };
        Ok(Self { shape, id, map: HashMap::try_from(map).map_err(error)?, fd, removed: Arc::default() })
    }

    /// Every entry. Entries that come and go meanwhile may be there or not.
    pub(super) fn entries(&self) -> impl Iterator<Item = Result<(K, V), TableError>> + '_ {
        // SAFETY: `open` has found a hash map with keys and values of these sizes.
        let entries = unsafe { scan::Entries::of(self.fd.as_fd()) };
        entries.map(|entry| {
            let failed = |io_error| SyscallError { call: "bpf_map_lookup_batch", io_error };
            entry.map_err(|error| self.error("read", failed(error).into()))
        })
    }

    /// The entry under `key`.
    pub(super) fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(self.error("read", source)),
        }
    }

    /// How many entries there are. Takes milliseconds.
    pub(super) fn count(&self) -> Result<u64, TableError> {
        self.entries().try_fold(0, |count, entry| entry.map(|_| count + 1))
    }

    /// Name and size of the map.
    pub(super) const fn name_and_size(&self) -> (&'static str, u32) {
        (self.shape.name, self.shape.max_entries)
    }

    fn put(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        self.map.insert(key, value, 0).map_err(|source| not_written(self.shape, "Services or pods", source))
    }

    /// Removes an entry, if it is there.
    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        removed(self.shape, self.map.remove(key))
    }

    fn error(&self, action: &'static str, source: MapError) -> TableError {
        TableError::Access { map: self.shape.name, action, source }
    }

    /// Removes every entry that `keep` does not want. Returns how many.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) -> Result<usize, TableError> {
        // Collected first: `keep` may take its time, and what it reads is a copy.
        let mut gone = Vec::new();
        for entry in self.entries() {
            let (key, value) = entry?;
            if !keep(&key, &value) {
                gone.push(key);
            }
        }
        let mut removed = 0;
        for key in &gone {
            // It may be another entry by now, under the same key.
            if self.get(key)?.is_some_and(|value| !keep(key, &value)) {
                // Counted before it goes: who works out what became of entries must not miss it. See `expiry`.
                self.removed.fetch_add(1, Ordering::SeqCst);
                self.remove(key)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn not_written(shape: Shape, of: &'static str, source: MapError) -> TableError {
    let Shape { name: map, max_entries, .. } = shape;
    match &source {
        // A hash map says the one, a trie the other.
        MapError::SyscallError(error)
            if matches!(error.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) =>
        {
            TableError::Full { map, of, max_entries }
        }
        _ => TableError::Access { map, action: "written", source },
    }
}

/// What was to be removed may not have been there.
fn removed(shape: Shape, result: Result<(), MapError>) -> Result<(), TableError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TableError::Access { map: shape.name, action: "written", source }),
    }
}

/// The map `sources`: not a hash map, but a trie of prefixes.
#[derive(Debug)]
pub(super) struct Sources(LpmTrie<MapData, SourceKey, SourceValue>);

impl Sources {
    fn open(pin_path: &Path) -> Result<Self, TableError> {
        let map = Map::LpmTrie(open_pinned(pin_path, SOURCES)?);
        let error = |source| TableError::Access { map: SOURCES.name, action: "opened", source };
        LpmTrie::try_from(map).map(Self).map_err(error)
    }

    /// Every entry.
    pub(super) fn entries(&self) -> impl Iterator<Item = Result<SourceRange, TableError>> + '_ {
        self.0.keys().map(|key| match key {
            Ok(key) => Ok(SourceRange { key: key.data(), bits: key.prefix_len() }),
            Err(source) => Err(TableError::Access { map: SOURCES.name, action: "read", source }),
        })
    }

    fn put(&mut self, range: &SourceRange) -> Result<(), TableError> {
        let result = self.0.insert(&LpmKey::new(range.bits, range.key), SourceValue { padding: 0 }, 0);
        result.map_err(|source| not_written(SOURCES, "source ranges", source))
    }

    fn remove(&mut self, range: &SourceRange) -> Result<(), TableError> {
        removed(SOURCES, self.0.remove(&LpmKey::new(range.bits, range.key)))
    }
}

/// What the programs know of the links by which pods are reached past the node's stack.
struct Links(Array<MapData, PodLinkValue>);

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").finish_non_exhaustive()
    }
}

impl Links {
    fn open(pin_path: &Path) -> Result<Self, TableError> {
        let map = Array::try_from(Map::Array(open_pinned(pin_path, POD_LINKS)?));
        let error = |source| TableError::Access { map: POD_LINKS.name, action: "opened", source };
        map.map(Self).map_err(error)
    }

    /// Tells the programs what a pod's link is: before the pod is put, for its first packet may follow at once.
    fn put_link_of(&mut self, pod: &PodValue) -> Result<(), TableError> {
        let Some(entry) = PodLinkValue::of(pod) else { return Ok(()) };
        let ports = (pod.flags & POD_HAS_PEER == 0).then_some((LINK_OF_PORTS, PodLinkValue::PORTS));
        for (place, link) in [entry].into_iter().chain(ports) {
            let error = |source| TableError::Access { map: POD_LINKS.name, action: "written", source };
            self.0.set(place, link, 0).map_err(error)?;
        }
        Ok(())
    }

    /// Has the programs take the interface for no pod's link any more.
    fn remove(&mut self, interface: u32) -> Result<(), TableError> {
        let place = interface % MAX_POD_LINKS;
        let error = |action| move |source| TableError::Access { map: POD_LINKS.name, action, source };
        if self.0.get(&place, 0).map_err(error("read"))?.interface == interface {
            self.0.set(place, PodLinkValue::NONE, 0).map_err(error("written"))?;
        }
        Ok(())
    }
}

/// The maps that the agent reads and writes.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) services: Table<ExternalKey, ServiceValue>,
    pub(super) backends: Table<BackendKey, BackendValue>,
    pub(super) members: Table<MemberKey, MemberValue>,
    pub(super) pods: Table<PodKey, PodValue>,
    pod_links: Links,
    pub(super) sources: Sources,
    pub(super) names: Table<NameKey, NameValue>,
    pub(super) sessions: Table<SessionKey, SessionValue>,
    pub(super) flows: Table<FlowKey, FlowValue>,
}

impl Tables {
    /// Opens the maps pinned below `pin_path`.
    ///
    /// # Errors
    ///
    /// One is missing, or not what it should be.
    pub(super) fn open(pin_path: &Path) -> Result<Self, TableError> {
        Ok(Self {
            services: Table::open(pin_path, SERVICES)?,
            backends: Table::open(pin_path, BACKENDS)?,
            members: Table::open(pin_path, MEMBERS)?,
            pods: Table::open(pin_path, PODS)?,
            pod_links: Links::open(pin_path)?,
            sources: Sources::open(pin_path)?,
            names: Table::open(pin_path, NAMES)?,
            sessions: Table::open(pin_path, SESSIONS)?,
            flows: Table::open(pin_path, FLOWS)?,
        })
    }

    /// Whether the maps are those that are pinned below `pin_path`.
    pub(super) fn are_pinned(&self, pin_path: &Path) -> bool {
        MapInfo::from_pin(directory(pin_path).join(SERVICES.name))
            .is_ok_and(|pinned| pinned.id() == self.services.id)
    }

    /// Reads back everything that only user space writes.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn read(&self) -> Result<Actual, TableError> {
        let services =
            self.services.entries().map(|entry| entry.map(|(key, value)| Step::PutService(key, value)));
        let backends =
            self.backends.entries().map(|entry| entry.map(|(key, value)| Step::PutBackend(key, value)));
        let members =
            self.members.entries().map(|entry| entry.map(|(key, value)| Step::PutMember(key, value)));
        let pods = self.pods.entries().map(|entry| entry.map(|(key, value)| Step::PutPod(key, value)));
        let sources = self.sources.entries().map(|entry| entry.map(Step::PutSource));
        let names =
            self.names.entries().map(|entry| entry.map(|(key, value)| Step::PutName(key.service_id, value)));
        Actual::read_back(services.chain(backends).chain(members).chain(pods).chain(sources).chain(names))
    }

    /// Name, entries and size of every map that can be full. `pin_path` is where they are pinned.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn fill(&self, pin_path: &Path) -> Result<[(&'static str, u64, u32); 9], TableError> {
        fn of<K: Pod, V: Pod>(table: &Table<K, V>) -> Result<(&'static str, u64, u32), TableError> {
            let (name, max_entries) = table.name_and_size();
            Ok((name, table.count()?, max_entries))
        }
        // Nobody else asks for them.
        let fragments: Table<FragmentKey, FragmentValue> = Table::open(pin_path, FRAGMENTS)?;
        let sources = self.sources.entries().try_fold(0, |count, entry| entry.map(|_| count + 1))?;
        Ok([
            of(&self.services)?,
            of(&self.backends)?,
            of(&self.members)?,
            of(&self.pods)?,
            (SOURCES.name, sources, SOURCES.max_entries),
            of(&self.names)?,
            of(&self.sessions)?,
            of(&self.flows)?,
            of(&fragments)?,
        ])
    }

    /// Tells the programs again by which links the pods of a former agent are reached.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn put_links(&mut self, actual: &Actual) -> Result<(), TableError> {
        actual.pods().try_for_each(|pod| self.pod_links.put_link_of(pod))
    }

    /// Has the programs take an interface, from which they are about to be taken, for no pod's link any more.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn remove_link(&mut self, interface: u32) -> Result<(), TableError> {
        self.pod_links.remove(interface)
    }

    /// Carries out a step. `actual` is what the tables hold before it.
    ///
    /// # Errors
    ///
    /// The kernel refused, or the map is full.
    pub(super) fn execute(&mut self, step: &Step, actual: &Actual) -> Result<(), TableError> {
        match step {
            Step::PutName(id, value) => self.names.put(&NameKey { service_id: *id }, value),
            Step::PutBackend(key, value) => self.backends.put(key, value),
            Step::PutSource(range) => self.sources.put(range),
            Step::RemoveSource(range) => self.sources.remove(range),
            Step::PutMember(key, value) => self.members.put(key, value),
            Step::RemoveMember(key) => self.members.remove(key),
            Step::PutPod(key, value) => {
                self.pod_links.put_link_of(value)?;
                self.pods.put(key, value)
            }
            Step::RemovePod(key) => self.pods.remove(key),
            Step::PutService(key, value) => self.services.put(key, value),
            Step::RemoveService(key) => self.services.remove(key),
            Step::RemoveBackend(key) => self.backends.remove(key),
            Step::Grace => {
                grace_period();
                Ok(())
            }
            Step::Sweep => {
                let departed = actual.departed();
                if departed.is_empty() {
                    return Ok(());
                }
                self.sweep(|pod, external| departed.concerns(pod, external))
            }
            Step::RemoveName(id) => self.names.remove(&NameKey { service_id: *id }),
        }
    }

    /// Removes flows and sessions that nothing keeps, of those pods and external addresses that are `concerned`.
    ///
    /// Asks the maps themselves, at the moment of removing once more: they may be changing meanwhile. What has been found to
    /// be kept is not asked for again: should it go, that is for the next sweep.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(super) fn sweep(&mut self, concerned: impl Fn(Address, Address) -> bool) -> Result<(), TableError> {
        let Self { services, members, sessions, flows, .. } = self;
        let mut kept = HashSet::new();
        let mut failure = None;
        let mut stays = |pod: Address, external: Address| {
            if kept.contains(&(pod, external)) {
                return true;
            }
            let keeps = keeps(services, members, pod, external).unwrap_or_else(|error| {
                failure = Some(error);
                true
            });
            if keeps {
                kept.insert((pod, external));
            }
            keeps
        };
        let flows =
            flows.retain(|key, flow| !concerned(key.pod, flow.external) || stays(key.pod, flow.external))?;
        let sessions = sessions.retain(|key, session| {
            let pods = [session.pod, session.former];
            !pods.iter().any(|pod| concerned(*pod, key.external))
                || pods.iter().any(|pod| stays(*pod, key.external))
        })?;
        tracing::debug!(flows, sessions, "flows and sessions of pods and addresses that went are removed");
        failure.map_or(Ok(()), Err)
    }
}

/// As [`Actual::keeps`], of what the kernel has at this moment.
fn keeps(
    services: &Table<ExternalKey, ServiceValue>,
    members: &Table<MemberKey, MemberValue>,
    pod: Address,
    external: Address,
) -> Result<bool, TableError> {
    match services.get(&ExternalKey { external })? {
        // A pod's or the node's own address.
        None | Some(ServiceValue { service_id: 0, .. }) => Ok(false),
        Some(ServiceValue { service_id, .. }) => {
            Ok(members.get(&MemberKey { pod, service_id, padding: 0 })?.is_some())
        }
    }
}

/// Returns once every run of a kernel program is over that had begun before: they run under RCU, and this waits for a
/// grace period of it.
fn grace_period() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes numbers only and changes nothing in this process.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // A kernel without it, or with CPUs that take no interruptions (nohz_full): a run takes microseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Counters that the kernel programs keep, each CPU its own.
pub(super) struct Counters {
    shape: Shape,
    map: PerCpuArray<MapData, u64>,
    cpus: usize,
}

impl Counters {
    /// Packets dropped, by [`proxier_common::Hook::counter`].
    ///
    /// # Errors
    ///
    /// As [`Tables::open`].
    pub(super) fn drops(pin_path: &Path) -> Result<Self, TableError> {
        Self::open(pin_path, DROPS)
    }

    /// What else is counted, by [`proxier_common::Statistic`].
    ///
    /// # Errors
    ///
    /// As [`Tables::open`].
    pub(super) fn stats(pin_path: &Path) -> Result<Self, TableError> {
        Self::open(pin_path, STATS)
    }

    fn open(pin_path: &Path, shape: Shape) -> Result<Self, TableError> {
        let map = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(open_pinned(pin_path, shape)?));
        let error = |source| TableError::Access { map: shape.name, action: "opened", source };
        let map = map.map_err(error)?;
        let cpus = map.get(&0, 0).map_err(error)?.len();
        Ok(Self { shape, map, cpus })
    }

    /// The counter at `index`, over all CPUs.
    pub(super) fn total(&self, index: u32) -> Result<u64, TableError> {
        let values = self.map.get(&index, 0);
        let error = |source| TableError::Access { map: self.shape.name, action: "read", source };
        Ok(values.map_err(error)?.iter().sum())
    }

    /// How many CPUs count.
    pub(super) const fn cpus(&self) -> usize {
        self.cpus
    }

    /// Sets the counter at `index`, which no kernel program counts in.
    pub(super) fn set(&mut self, index: u32, total: u64) -> Result<(), TableError> {
        let error = |source| TableError::Access { map: self.shape.name, action: "written", source };
        let mut values = vec![0; self.cpus];
        values[0] = total;
        let values = PerCpuValues::try_from(values).map_err(|source| error(MapError::IoError(source)))?;
        self.map.set(index, values, 0).map_err(error)
    }
}

/// The names of Services, by id.
///
/// # Errors
///
/// As [`Tables::open`].
pub(super) fn names(pin_path: &Path) -> Result<Table<NameKey, NameValue>, TableError> {
    Table::open(pin_path, NAMES)
}

/// The buffer of packets dropped. Who reads from it takes away from all others.
///
/// # Errors
///
/// As [`Tables::open`].
pub(super) fn events(pin_path: &Path) -> Result<RingBuf<MapData>, TableError> {
    let error = |source| TableError::Access { map: EVENTS.name, action: "opened", source };
    RingBuf::try_from(Map::RingBuf(open_pinned(pin_path, EVENTS)?)).map_err(error)
}
