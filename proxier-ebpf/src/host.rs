//! The core's two traits on a host: a packet is a vector of bytes, the maps are ordinary ones. For tests, fuzzing
//! and whoever wants to ask what the kernel would do; the kernel's own adapters are in `bpf/`.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use proxier_common::{
    Address, BackendKey, BackendValue, ExternalKey, FlowKey, FlowValue, FragmentKey, FragmentValue,
    MAX_POD_LINKS, MemberKey, MemberValue, PodKey, PodLinkValue, PodValue, ServiceValue, SessionKey,
    SessionValue, SourceKey, Statistic,
};

use crate::{
    checksum,
    family::{V4Addresses, V4Hop},
    packet::{NetworkHeader, Packet, Plain, Way, WriteError},
    tables::{FlowEntry, InsertError, SessionEntry, Tables},
};

/// An Ethernet frame. Two are equal if their bytes are.
#[derive(Clone, Debug)]
pub struct HostPacket {
    /// Its bytes, from the destination MAC address on.
    pub bytes: Vec<u8>,
    rewritten: bool,
    /// What the routing will say.
    pub way: Way,
    /// The interface by which that leads.
    pub onward: u32,
    /// Whether the stack would not forward it, for it is another host's.
    pub is_strange: bool,
    /// The packets that it will be segmented into.
    pub segment_size: u32,
    /// The link that it has come by.
    pub link: u32,
}

impl PartialEq for HostPacket {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for HostPacket {}

impl HostPacket {
    /// A frame that no program has seen yet.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            rewritten: false,
            way: Way::Open,
            onward: 0,
            is_strange: false,
            segment_size: 0,
            link: 0,
        }
    }

    fn write(&mut self, offset: u32, bytes: &[u8]) -> Result<(), WriteError> {
        let offset = offset as usize;
        self.bytes.get_mut(offset..offset + bytes.len()).ok_or(WriteError)?.copy_from_slice(bytes);
        Ok(())
    }
}

impl Packet for HostPacket {
    /// What was asked of [`Packet::find_way`].
    type Path = Option<(Address, Address, u32)>;

    fn can_pass_stack(&self) -> bool {
        !self.is_strange
    }

    fn find_way(&self, source: &Address, destination: &Address, length: u32, path: &mut Self::Path) -> Way {
        *path = Some((*source, *destination, length));
        self.way
    }

    fn onward_interface(&self, _path: &Self::Path) -> u32 {
        self.onward
    }

    fn segment_size(&self) -> u32 {
        self.segment_size
    }

    fn is_of_link(&self, interface: u32) -> bool {
        self.link == interface
    }

    fn network_header(&self) -> Option<NetworkHeader> {
        let mut offset = 12;
        loop {
            let ether_type: [u8; 2] = self.load(offset)?;
            offset += 2;
            match u16::from_be_bytes(ether_type) {
                0x0800 => return Some(NetworkHeader::V4(offset)),
                0x86dd => return Some(NetworkHeader::V6(offset)),
                // Two tags, as the skb adapter: one that the network card takes off, one that it leaves.
                0x8100 | 0x88a8 if offset < 20 => offset += 2,
                _ => return None,
            }
        }
    }

    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        let bytes = self.bytes.get(offset as usize..)?.get(..size_of::<T>())?;
        // SAFETY: `bytes` has the size of `T`, and `Plain` says that any bytes make a `T`.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn set_rewritten(&mut self) {
        self.rewritten = true;
    }

    fn is_rewritten(&self) -> bool {
        self.rewritten
    }

    fn adjust_transport_checksum(
        &mut self,
        offset: u32,
        difference: u32,
        zero_means_none: bool,
    ) -> Result<(), WriteError> {
        let field: u16 = self.load(offset).ok_or(WriteError)?;
        self.write(offset, &checksum::adjust(zero_means_none, field, difference).to_ne_bytes())
    }

    fn store_checksum(&mut self, offset: u32, checksum: u16) -> Result<(), WriteError> {
        self.write(offset, &checksum.to_ne_bytes())
    }

    fn store_v4_address(
        &mut self,
        offset: u32,
        at: u32,
        address: Address,
        difference: u32,
        time_to_live: Option<u8>,
    ) -> Result<(), WriteError> {
        let offset = offset + V4Addresses::OFFSET;
        let old: V4Addresses = self.load(offset).ok_or(WriteError)?;
        self.write(offset, &old.with(at, address, difference, time_to_live).bytes())
    }

    fn store_v4_hop(&mut self, offset: u32, hop: V4Hop) -> Result<(), WriteError> {
        self.write(offset + V4Hop::OFFSET, &hop.bytes())
    }

    fn store_hop_limit(&mut self, offset: u32, value: u8) -> Result<(), WriteError> {
        self.write(offset, &[value])
    }

    fn store_v6_address(&mut self, offset: u32, address: Address) -> Result<(), WriteError> {
        self.write(offset, &address.bytes)
    }
}

/// The maps, without limits and without eviction, and a clock that is set by hand. Counts look-ups.
#[derive(Debug, Default)]
pub struct HostTables {
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub now: Cell<u64>,
    /// As the map of the same name.
    pub services: RefCell<HashMap<ExternalKey, ServiceValue>>,
    /// As the map of the same name.
    pub backends: RefCell<HashMap<BackendKey, BackendValue>>,
    /// As the map of the same name.
    pub members: RefCell<HashMap<MemberKey, MemberValue>>,
    /// As the map of the same name.
    pub pods: RefCell<HashMap<PodKey, PodValue>>,
    /// As the map of the same name: keys, with how many of their leading bits count.
    pub sources: RefCell<Vec<(u32, SourceKey)>>,
    /// As the map of the same name.
    pub sessions: RefCell<HashMap<SessionKey, HostSession>>,
    /// As the map of the same name.
    pub flows: RefCell<HashMap<FlowKey, HostFlow>>,
    /// As the map of the same name.
    pub fragments: RefCell<HashMap<FragmentKey, FragmentValue>>,
    /// Look-ups since it was last set to 0. Inserting counts too.
    pub lookups: Cell<u32>,
    /// As the array of the same name.
    pub pod_links: RefCell<HashMap<u32, PodLinkValue>>,
    /// As the map of the same name.
    pub stats: RefCell<HashMap<Statistic, u64>>,
    /// Whether `flows` refuses new entries.
    pub flows_full: Cell<bool>,
}

impl HostTables {
    fn count_lookup(&self) {
        self.lookups.set(self.lookups.get() + 1);
    }
}

/// A flow that its table and the core share.
#[derive(Clone, Debug)]
pub struct HostFlow(pub Rc<Cell<FlowValue>>);

impl FlowEntry for HostFlow {
    fn value(&self) -> FlowValue {
        self.0.get()
    }

    fn set_last_seen(&self, now: u64) {
        self.0.set(FlowValue { last_seen: now, ..self.0.get() });
    }

    fn set_tcp_state(&self, state: u8) {
        self.0.set(FlowValue { tcp_state: state, ..self.0.get() });
    }
}

/// A session that its table and the core share.
#[derive(Clone, Debug)]
pub struct HostSession(pub Rc<Cell<SessionValue>>);

impl SessionEntry for HostSession {
    fn value(&self) -> SessionValue {
        self.0.get()
    }

    fn set_last_seen(&self, now: u64) {
        self.0.set(SessionValue { last_seen: now, ..self.0.get() });
    }

    fn set_generation(&self, service_id: u32, generation: u32) {
        self.0.set(SessionValue { service_id, generation, ..self.0.get() });
    }

    fn set_tcp_ports(&self, port: u16, peer_port: u16) {
        self.0.set(SessionValue { tcp_port: port, tcp_peer_port: peer_port, ..self.0.get() });
    }
}

impl Tables for HostTables {
    type Flow = HostFlow;
    type Session = HostSession;

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn service(&self, key: &ExternalKey) -> Option<ServiceValue> {
        self.count_lookup();
        self.services.borrow().get(key).copied()
    }

    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        self.count_lookup();
        self.backends.borrow().get(key).copied()
    }

    fn member(&self, key: &MemberKey) -> Option<MemberValue> {
        self.count_lookup();
        self.members.borrow().get(key).copied()
    }

    fn pod(&self, key: &PodKey) -> Option<PodValue> {
        self.count_lookup();
        self.pods.borrow().get(key).copied()
    }

    fn pod_link(&self, interface: u32) -> Option<PodLinkValue> {
        let links = self.pod_links.borrow();
        links.get(&(interface % MAX_POD_LINKS)).copied().filter(|link| link.interface == interface)
    }

    fn is_permitted(&self, key: &SourceKey) -> bool {
        self.count_lookup();
        self.sources.borrow().iter().any(|(bits, range)| {
            let beyond = 128 - (bits - SourceKey::BITS_BEFORE_ADDRESS);
            let number = |key: &SourceKey| u128::from_be_bytes(key.address.bytes).checked_shr(beyond);
            (range.service_id, range.generation, number(range))
                == (key.service_id, key.generation, number(key))
        })
    }

    fn session(&self, key: &SessionKey) -> Option<HostSession> {
        self.count_lookup();
        self.sessions.borrow().get(key).cloned()
    }

    fn put_session(&self, key: &SessionKey, value: &SessionValue) {
        self.count_lookup();
        self.sessions.borrow_mut().insert(*key, HostSession(Rc::new(Cell::new(*value))));
    }

    fn flow(&self, key: &FlowKey) -> Option<HostFlow> {
        self.count_lookup();
        self.flows.borrow().get(key).cloned()
    }

    fn insert_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError> {
        if self.flows.borrow().contains_key(key) {
            self.count_lookup();
            return Err(InsertError::Exists);
        }
        self.replace_flow(key, value)
    }

    fn replace_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError> {
        self.count_lookup();
        if self.flows_full.get() {
            return Err(InsertError::Full);
        }
        self.flows.borrow_mut().insert(*key, HostFlow(Rc::new(Cell::new(*value))));
        Ok(())
    }

    fn remove_flow(&self, key: &FlowKey) {
        self.count_lookup();
        self.flows.borrow_mut().remove(key);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        self.count_lookup();
        self.fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        self.count_lookup();
        self.fragments.borrow_mut().insert(*key, *value);
    }

    fn remove_fragment(&self, key: &FragmentKey) {
        self.count_lookup();
        self.fragments.borrow_mut().remove(key);
    }

    fn count(&self, what: Statistic) {
        *self.stats.borrow_mut().entry(what).or_default() += 1;
    }
}
