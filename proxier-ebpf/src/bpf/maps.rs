//! The maps and the clock, in the kernel. Names have at most 15 characters (`BPF_OBJ_NAME_LEN`).

use core::{
    mem::{self, offset_of},
    ptr::{self, NonNull},
};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
    helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::btf_map,
};
use proxier_common::{
    BackendKey, BackendValue, DROP_COUNTERS, DropEvent, EVENT_BYTES, EventBudget, ExternalKey, FlowKey,
    FlowValue, FragmentKey, FragmentValue, MAX_BACKENDS, MAX_FLOWS, MAX_FRAGMENTS, MAX_POD_LINKS,
    MAX_SERVICES, MAX_SESSIONS, MAX_SOURCES, MAX_XDP_DEVICES, MemberKey, MemberValue, NameKey, NameValue,
    PodKey, PodLinkValue, PodValue, STATISTICS, ServiceValue, SessionKey, SessionValue, SourceKey,
    SourceValue, Statistic, XdpDevice,
};
use proxier_ebpf::tables::{FlowEntry, InsertError, SessionEntry, Tables};

/// Room for many, memory for those that are there.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "services")]
static SERVICES: HashMap<ExternalKey, ServiceValue, { MAX_SERVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "backends")]
static BACKENDS: HashMap<BackendKey, BackendValue, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "members")]
static MEMBERS: HashMap<MemberKey, MemberValue, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "pods")]
static PODS: HashMap<PodKey, PodValue, { MAX_SERVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "pod_links")]
static POD_LINKS: Array<PodLinkValue, { MAX_POD_LINKS as usize }> = Array::new();

/// Not pinned, and written by the agent before the program at XDP is attached.
#[btf_map(name = "xdp_devices")]
static XDP_DEVICES: HashMap<u32, XdpDevice, { MAX_XDP_DEVICES as usize }> = HashMap::new();

#[btf_map(name = "sources")]
static SOURCES: LpmTrie<SourceKey, SourceValue, { MAX_SOURCES as usize }, NO_PREALLOC> = LpmTrie::new();

/// Read by user space only.
#[btf_map(name = "names")]
static NAMES: HashMap<NameKey, NameValue, { MAX_SERVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "sessions")]
static SESSIONS: LruHashMap<SessionKey, SessionValue, { MAX_SESSIONS as usize }> = LruHashMap::new();

#[btf_map(name = "flows")]
static FLOWS: LruHashMap<FlowKey, FlowValue, { MAX_FLOWS as usize }> = LruHashMap::new();

#[btf_map(name = "fragments")]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue, { MAX_FRAGMENTS as usize }> = LruHashMap::new();

#[btf_map(name = "drops")]
static DROPS: PerCpuArray<u64, { DROP_COUNTERS as usize }> = PerCpuArray::new();

#[btf_map(name = "stats")]
static STATS: PerCpuArray<u64, { STATISTICS as usize }> = PerCpuArray::new();

/// Written here, read by the agent.
#[btf_map(name = "events")]
static EVENTS: RingBuf<DropEvent, { EVENT_BYTES as usize }> = RingBuf::new();

/// What each CPU may still report.
#[btf_map(name = "event_budgets")]
static EVENT_BUDGETS: PerCpuArray<EventBudget, { DROP_COUNTERS as usize }> = PerCpuArray::new();

/// Whether a packet that `counter` has counted may be reported.
#[inline(always)]
pub(super) fn take_event_budget(counter: u32, now: u64) -> bool {
    match EVENT_BUDGETS.get_ptr_mut(counter) {
        // SAFETY: as in `count_drop`.
        Some(budget) => unsafe { (*budget).take(now) },
        None => false,
    }
}

/// Reports a packet dropped. If nobody reads, or not fast enough, the buffer is full and this one is not reported.
#[inline(always)]
pub(super) fn report(event: &DropEvent) {
    let _ = EVENTS.output(event, 0);
}

/// What is known of a device at XDP, by its interface's index.
#[inline(always)]
pub(super) fn xdp_device(index: u32) -> Option<XdpDevice> {
    // SAFETY: copied at once; any bytes make one, and a wrong address only leaves the frame to tc.
    unsafe { XDP_DEVICES.get(index) }.copied()
}

/// Counts a packet dropped.
#[inline(always)]
pub(super) fn count_drop(counter: u32) {
    if let Some(packets) = DROPS.get_ptr_mut(counter) {
        // SAFETY: a slot of this CPU's own, which nothing else writes while the program runs.
        unsafe { *packets += 1 };
    }
}

/// The maps of this object.
pub(super) struct KernelTables;

/// Whether the clock as of the last tick will do, which is there since [`COARSE_CLOCK_SINCE`](proxier_common::COARSE_CLOCK_SINCE): to
/// ask the hardware what time it is takes longer than a look-up, and all that is noted are seconds. The agent writes it before the
/// kernel reads the program, which then leaves out the other.
#[unsafe(no_mangle)]
static COARSE_CLOCK: u8 = 1;

/// A value in a map, seen as words.
///
/// It outlives the program's run (RCU), but other CPUs read and write it at the same time. Volatile accesses by whole
/// words are what READ_ONCE and WRITE_ONCE are in the kernel: never torn, never repeated. The fields are read together,
/// so that the compiler copies words, not bytes.
///
/// Never null, so that one that may be there is a pointer, too, and can be returned from a function of its own: the kernel
/// refuses pointers that are written to a caller's stack.
pub(super) struct Entry<V>(NonNull<V>);

/// A flow in the map.
pub(super) type KernelFlow = Entry<FlowValue>;

/// A session in the map.
pub(super) type KernelSession = Entry<SessionValue>;

impl<V> Entry<V> {
    #[inline(always)]
    fn words<const WORDS: usize>(&self) -> [u64; WORDS] {
        const { assert!(size_of::<V>() == WORDS * 8 && align_of::<V>() == 8) };
        // SAFETY: a look-up in this run returned the pointer to a `V`, which has this size and alignment.
        unsafe { ptr::read_volatile(self.0.as_ptr().cast()) }
    }

    /// Writes the field of type `T` at `offset` of `V`.
    #[inline(always)]
    fn write<T>(&self, offset: usize, value: T) {
        let field = self.0.as_ptr().wrapping_byte_add(offset).cast::<T>();
        // SAFETY: as in `words`; callers take the offset of a field of this type from `offset_of!`.
        unsafe { ptr::write_volatile(field, value) };
    }
}

impl FlowEntry for KernelFlow {
    #[inline(always)]
    fn value(&self) -> FlowValue {
        // SAFETY: both types have 32 bytes, and any bytes make a value of plain integers.
        unsafe { mem::transmute::<[u64; 4], FlowValue>(self.words()) }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u64) {
        self.write(offset_of!(FlowValue, last_seen), now);
    }

    #[inline(always)]
    fn set_tcp_state(&self, state: u8) {
        self.write(offset_of!(FlowValue, tcp_state), state);
    }
}

impl SessionEntry for KernelSession {
    #[inline(always)]
    fn value(&self) -> SessionValue {
        // SAFETY: both types have 56 bytes, and any bytes make a value of plain integers.
        unsafe { mem::transmute::<[u64; 7], SessionValue>(self.words()) }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u64) {
        self.write(offset_of!(SessionValue, last_seen), now);
    }

    #[inline(always)]
    fn set_generation(&self, service_id: u32, generation: u32) {
        self.write(offset_of!(SessionValue, service_id), service_id);
        self.write(offset_of!(SessionValue, generation), generation);
    }

    #[inline(always)]
    fn set_tcp_ports(&self, port: u16, peer_port: u16) {
        const { assert!(offset_of!(SessionValue, tcp_peer_port) == offset_of!(SessionValue, tcp_port) + 2) };
        // In one write: nobody sees the port of one connection beside that of another.
        let [port, peer_port] = [port.to_ne_bytes(), peer_port.to_ne_bytes()];
        let both = u32::from_ne_bytes([port[0], port[1], peer_port[0], peer_port[1]]);
        self.write(offset_of!(SessionValue, tcp_port), both);
    }
}

impl Tables for KernelTables {
    type Flow = KernelFlow;
    type Session = KernelSession;

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a static, which nobody writes to. Volatile: to the compiler it would be the constant that it is here.
        let is_coarse = unsafe { ptr::read_volatile(&raw const COARSE_CLOCK) != 0 };
        // SAFETY: helpers without arguments.
        if is_coarse { unsafe { bpf_ktime_get_coarse_ns() } } else { unsafe { bpf_ktime_get_ns() } }
    }

    #[inline(always)]
    fn service(&self, key: &ExternalKey) -> Option<ServiceValue> {
        // SAFETY: copied at once. Only user space writes, and with NO_PREALLOC an entry is replaced, not reused.
        unsafe { SERVICES.get(key) }.copied()
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        // SAFETY: as in `service`.
        unsafe { BACKENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<MemberValue> {
        // SAFETY: as in `service`.
        unsafe { MEMBERS.get(key) }.copied()
    }

    #[inline(always)]
    fn pod(&self, key: &PodKey) -> Option<PodValue> {
        // SAFETY: as in `service`.
        unsafe { PODS.get(key) }.copied()
    }

    #[inline(always)]
    fn pod_link(&self, interface: u32) -> Option<PodLinkValue> {
        let link = POD_LINKS.get_ptr(interface % MAX_POD_LINKS)?;
        // SAFETY: a look-up in this run returned the pointer, to eight bytes that are aligned to as many. Read at once: the agent may
        // write to them.
        let word = unsafe { ptr::read_volatile(link.cast::<u64>()) };
        // SAFETY: both types have 8 bytes, and any bytes make a value of plain integers.
        let link: PodLinkValue = unsafe { mem::transmute(word) };
        // Where nothing is written, the entry is of 0, and empty.
        (link.interface == interface && link != PodLinkValue::NONE).then_some(link)
    }

    #[inline(always)]
    fn is_permitted(&self, key: &SourceKey) -> bool {
        SOURCES.get(&Key::new(SourceKey::BITS, *key)).is_some()
    }

    #[inline(always)]
    fn session(&self, key: &SessionKey) -> Option<KernelSession> {
        SESSIONS.get_ptr_mut(key).and_then(NonNull::new).map(Entry)
    }

    #[inline(always)]
    fn put_session(&self, key: &SessionKey, value: &SessionValue) {
        // What fails is made up for by the client's next packet; see the trait.
        let _ = SESSIONS.insert(key, value, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<KernelFlow> {
        FLOWS.get_ptr_mut(key).and_then(NonNull::new).map(Entry)
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError> {
        const EEXIST: i32 = -17;
        FLOWS.insert(key, value, u64::from(BPF_NOEXIST)).map_err(|error| match error {
            EEXIST => InsertError::Exists,
            _ => InsertError::Full,
        })
    }

    #[inline(always)]
    fn replace_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError> {
        FLOWS.insert(key, value, u64::from(BPF_ANY)).map_err(|_| InsertError::Full)
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) {
        // The only error is that it is not there.
        let _ = FLOWS.remove(key);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        // SAFETY: copied at once; an entry reused meanwhile can only misdirect a packet that came a minute late.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        // Without the entry the rest of a reply leaves unchanged; that of a request follows its client's session, or is
        // dropped where conversations are spread.
        let _ = FRAGMENTS.insert(key, value, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn remove_fragment(&self, key: &FragmentKey) {
        // The only error is that it is not there.
        let _ = FRAGMENTS.remove(key);
    }

    #[inline(always)]
    fn count(&self, what: Statistic) {
        if let Some(count) = STATS.get_ptr_mut(what as u32) {
            // SAFETY: as in `count_drop`.
            unsafe { *count += 1 };
        }
    }
}
