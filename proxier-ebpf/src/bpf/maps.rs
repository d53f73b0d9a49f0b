//! The maps and the clock, in the kernel. Names have at most 15 characters (`BPF_OBJ_NAME_LEN`).

use core::{mem, ptr};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{HashMap, LruHashMap, PerCpuArray},
    helpers::bpf_ktime_get_ns,
    macros::btf_map,
};
use proxier_common::{
    BackendKey, BackendValue, DROP_COUNTERS, FlowKey, FlowValue, FragmentKey, FragmentValue, MAX_BACKENDS,
    MAX_FLOWS, MAX_FRAGMENTS, MAX_SERVICES, MAX_SESSIONS, MemberKey, MemberValue, NameKey, NameValue,
    ServiceKey, ServiceValue, SessionKey, SessionValue,
};
use proxier_ebpf::tables::{FlowEntry, InsertError, SessionEntry, Tables};

/// Room for many, memory for those that are there.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "services")]
static SERVICES: HashMap<ServiceKey, ServiceValue, { MAX_SERVICES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "backends")]
static BACKENDS: HashMap<BackendKey, BackendValue, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "members")]
static MEMBERS: HashMap<MemberKey, MemberValue, { MAX_BACKENDS as usize }, NO_PREALLOC> = HashMap::new();

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

/// A flow in the map.
pub(super) struct KernelFlow(*mut FlowValue);

/// A session in the map.
pub(super) struct KernelSession(*mut SessionValue);

// Values of a map outlive a program's run (RCU), but other CPUs read and write them at the same time. Volatile
// accesses by whole words are what READ_ONCE and WRITE_ONCE are in the kernel: never torn, never repeated. The fields
// are read together, so that the compiler copies words, not bytes.

impl FlowEntry for KernelFlow {
    #[inline(always)]
    fn value(&self) -> FlowValue {
        // SAFETY: a look-up in this run returned the pointer, and values are aligned to 8 bytes; see above.
        let words = unsafe { ptr::read_volatile(self.0.cast::<[u64; 4]>()) };
        // SAFETY: both types have 32 bytes, and any bytes make a value of plain integers.
        unsafe { mem::transmute::<[u64; 4], FlowValue>(words) }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u64) {
        // SAFETY: as in `value`.
        unsafe { ptr::write_volatile(&raw mut (*self.0).last_seen, now) };
    }

    #[inline(always)]
    fn set_tcp_state(&self, state: u8) {
        // SAFETY: as in `value`.
        unsafe { ptr::write_volatile(&raw mut (*self.0).tcp_state, state) };
    }
}

impl SessionEntry for KernelSession {
    #[inline(always)]
    fn value(&self) -> SessionValue {
        // SAFETY: a look-up in this run returned the pointer, and values are aligned to 8 bytes; see above.
        let words = unsafe { ptr::read_volatile(self.0.cast::<[u64; 4]>()) };
        // SAFETY: both types have 32 bytes, and any bytes make a value of plain integers.
        unsafe { mem::transmute::<[u64; 4], SessionValue>(words) }
    }

    #[inline(always)]
    fn set_last_seen(&self, now: u64) {
        // SAFETY: as in `value`.
        unsafe { ptr::write_volatile(&raw mut (*self.0).last_seen, now) };
    }

    #[inline(always)]
    fn set_generation(&self, generation: u32) {
        // SAFETY: as in `value`.
        unsafe { ptr::write_volatile(&raw mut (*self.0).generation, generation) };
    }
}

impl Tables for KernelTables {
    type Flow = KernelFlow;
    type Session = KernelSession;

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
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
    fn session(&self, key: &SessionKey) -> Option<KernelSession> {
        SESSIONS.get_ptr_mut(key).map(KernelSession)
    }

    #[inline(always)]
    fn put_session(&self, key: &SessionKey, value: &SessionValue) {
        // What fails is made up for by the client's next packet; see the trait.
        let _ = SESSIONS.insert(key, value, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<KernelFlow> {
        FLOWS.get_ptr_mut(key).map(KernelFlow)
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
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        // SAFETY: copied at once; an entry reused meanwhile can only misdirect a packet that came a minute late.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        // Without the entry the rest of the packet leaves unchanged and the receiver asks again.
        let _ = FRAGMENTS.insert(key, value, u64::from(BPF_ANY));
    }
}
