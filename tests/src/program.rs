//! The compiled programs in the kernel, pinned and attached to nothing, on packets that a test hands to them
//! (BPF_PROG_TEST_RUN). Panics where something is not as it should be, as a test does.

use std::{
    env, fs, io, mem,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, MapInfo, PerCpuArray},
    programs::{SchedClassifier, Xdp},
};
use proxier_common::{
    BackendKey, BackendValue, DropReason, ExternalKey, FlowKey, FlowValue, FragmentKey, FragmentValue, Hook,
    MemberKey, MemberValue, PodKey, PodLinkValue, PodValue, ServiceValue, SessionKey, SessionValue,
    Statistic, XdpDevice,
};
use proxier_ebpf::host::{HostPacket, HostTables};

/// BPF_F_TEST_SKB_CHECKSUM_COMPLETE (linux/bpf.h): the skb carries a checksum of the whole packet, and the kernel
/// recomputes it after the run.
pub const CHECKSUM_COMPLETE: u32 = 1 << 2;

/// What a program returns for a packet that the next one shall see (linux/bpf.h).
pub const TCX_NEXT: i32 = -1;
/// What it returns for one that shall be dropped.
pub const TC_ACT_SHOT: i32 = 2;
/// What it returns for one that it has sent elsewhere.
pub const TC_ACT_REDIRECT: i32 = 7;

/// What a program at XDP returns for a packet to be dropped (linux/bpf.h).
pub const XDP_DROP: i32 = 1;
/// What it returns for one that goes on.
pub const XDP_PASS: i32 = 2;

/// The program at XDP.
const XDP: &str = "proxier_xdp";
/// Whom the frames of tests are for.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The start of `union bpf_attr` for BPF_PROG_TEST_RUN (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    /// The kernel wants what follows the last field to be zero.
    rest: u32,
}

/// The programs and maps of the object under test.
pub struct Kernel {
    ebpf: Ebpf,
    /// The map `services`.
    pub services: HashMap<MapData, ExternalKey, ServiceValue>,
    /// The map `backends`.
    pub backends: HashMap<MapData, BackendKey, BackendValue>,
    /// The map `members`.
    pub members: HashMap<MapData, MemberKey, MemberValue>,
    /// The map `pods`.
    pub pods: HashMap<MapData, PodKey, PodValue>,
    /// The map `sessions`.
    pub sessions: HashMap<MapData, SessionKey, SessionValue>,
    /// The map `flows`.
    pub flows: HashMap<MapData, FlowKey, FlowValue>,
    /// The map `fragments`.
    pub fragments: HashMap<MapData, FragmentKey, FragmentValue>,
    pod_links: Array<MapData, PodLinkValue>,
    /// Entries of it that are not empty.
    linked: Vec<u32>,
    drops: PerCpuArray<MapData, u64>,
    stats: PerCpuArray<MapData, u64>,
}

impl Kernel {
    /// Loads the object that `PROXIER_BPF_OBJECT` names, or the one that was built last.
    ///
    /// # Panics
    ///
    /// When there is none, or the kernel does not take it.
    #[must_use]
    pub fn load() -> Self {
        let object = env::var("PROXIER_BPF_OBJECT")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../target/proxier.bpf.o").to_owned());
        let bytes = fs::read(&object)
            .unwrap_or_else(|error| panic!("{object}: {error}; run `cargo xtask build-ebpf`"));
        let mut ebpf = EbpfLoader::new().load(&bytes).expect("the kernel takes the maps (as root)");
        for name in ["proxier_request", "proxier_reply", "proxier_pod_in", "proxier_pod_out"] {
            let program = ebpf.program_mut(name).expect("the object has the program");
            let program: &mut SchedClassifier = program.try_into().expect("it is one of TC");
            program.load().expect("the verifier accepts the program");
        }
        let mut devices: HashMap<MapData, u32, XdpDevice> = table(&mut ebpf, "xdp_devices");
        let device = XdpDevice { upper: LOOPBACK, mac: MAC, padding: 0 };
        devices.insert(LOOPBACK, device, 0).expect("the table has room");
        let xdp = ebpf.program_mut(XDP).expect("the object has the program");
        let xdp: &mut Xdp = xdp.try_into().expect("it is one of XDP");
        xdp.load().expect("the verifier accepts the program");
        Self {
            services: table(&mut ebpf, "services"),
            backends: table(&mut ebpf, "backends"),
            members: table(&mut ebpf, "members"),
            pods: table(&mut ebpf, "pods"),
            sessions: table(&mut ebpf, "sessions"),
            flows: table(&mut ebpf, "flows"),
            fragments: table(&mut ebpf, "fragments"),
            pod_links: array(&mut ebpf, "pod_links"),
            linked: Vec::new(),
            drops: counters(&mut ebpf, "drops"),
            stats: counters(&mut ebpf, "stats"),
            ebpf,
        }
    }

    /// Makes the maps hold the Services and pods of `tables`, and nothing else: no session, no flow, no fragment.
    pub fn set(&mut self, tables: &HostTables) {
        clear(&mut self.services);
        clear(&mut self.backends);
        clear(&mut self.members);
        clear(&mut self.pods);
        clear(&mut self.sessions);
        clear(&mut self.flows);
        clear(&mut self.fragments);
        for index in mem::take(&mut self.linked) {
            self.pod_links.set(index, PodLinkValue::NONE, 0).expect("the array has such an entry");
        }
        self.add(tables);
    }

    /// Adds the Services and pods of `tables`.
    pub fn add(&mut self, tables: &HostTables) {
        put(&mut self.services, tables.services.borrow().iter());
        put(&mut self.backends, tables.backends.borrow().iter());
        put(&mut self.members, tables.members.borrow().iter());
        put(&mut self.pods, tables.pods.borrow().iter());
        for (index, link) in tables.pod_links.borrow().iter() {
            self.pod_links.set(*index, *link, 0).expect("the array has such an entry");
            self.linked.push(*index);
        }
    }

    /// Runs `program` on `packet`. What it returns, and what it makes of the packet.
    ///
    /// # Errors
    ///
    /// The kernel does not know one of `flags`, or what it has checked for them is not so.
    ///
    /// # Panics
    ///
    /// When there is no such program.
    pub fn run(&self, program: &str, packet: &HostPacket, flags: u32) -> io::Result<(i32, HostPacket)> {
        self.run_at(LOOPBACK, program, packet, flags)
    }

    /// As [`Self::run`], at this interface of the thread's network namespace.
    ///
    /// # Errors
    ///
    /// As [`Self::run`]; or there is no such interface.
    ///
    /// # Panics
    ///
    /// As [`Self::run`].
    pub fn run_at(
        &self,
        interface: u32,
        program: &str,
        packet: &HostPacket,
        flags: u32,
    ) -> io::Result<(i32, HostPacket)> {
        // Once: a second run would be fed with what the first one wrote.
        let outcome = test_run(self.program(program), interface, &packet.bytes, 1, flags)?;
        Ok((outcome.code, HostPacket::new(outcome.packet)))
    }

    /// The program called `name`.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn program(&self, name: &str) -> BorrowedFd<'_> {
        let program = self.ebpf.program(name).expect("the object has the program");
        let program: &SchedClassifier = program.try_into().expect("it is one of TC");
        program.fd().expect("it is loaded").as_fd()
    }

    /// The map called `name`.
    ///
    /// # Panics
    ///
    /// When no program uses such a map.
    #[must_use]
    pub fn map(&self, name: &str) -> MapInfo {
        let infos = self.ebpf.programs().filter_map(|(_, program)| program.info().ok());
        let ids = infos.filter_map(|info| info.map_ids().ok().flatten()).flatten();
        let mut maps = ids.filter_map(|id| MapInfo::from_id(id).ok());
        maps.find(|map| map.name_as_str() == Some(name)).unwrap_or_else(|| panic!("no program uses {name}"))
    }

    /// Runs the program at XDP on `packet`. What it returns, how many bytes it leaves before the packet, and what it makes of that.
    ///
    /// # Errors
    ///
    /// The kernel would not.
    ///
    /// # Panics
    ///
    /// When there is no such program.
    pub fn run_xdp(&self, packet: &HostPacket) -> io::Result<(i32, usize, HostPacket)> {
        let program = self.ebpf.program(XDP).expect("the object has the program");
        let program: &Xdp = program.try_into().expect("it is one of XDP");
        let program = program.fd().expect("it is loaded").as_fd();
        let mut outcome = run_in(program, &packet.bytes, 1, 0, &[])?;
        let before = outcome.packet.len() - packet.bytes.len();
        outcome.packet.drain(..before);
        Ok((outcome.code, before, HostPacket::new(outcome.packet)))
    }

    /// Packets dropped.
    #[must_use]
    pub fn drops(&self, hook: Hook, reason: DropReason) -> u64 {
        total(&self.drops, hook.counter(reason))
    }

    /// What has been counted beside.
    #[must_use]
    pub fn statistic(&self, statistic: Statistic) -> u64 {
        total(&self.stats, statistic as u32)
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the program returned.
    pub code: i32,
    /// What it made of the packet.
    pub packet: Vec<u8>,
    /// How long a run took, on average.
    pub duration: Duration,
}

/// The index of the loopback interface in every network namespace; also where a run at XDP without a context has its packets from.
pub const LOOPBACK: u32 = 1;

/// Runs a program of TC on `packet` at `interface`, `repeat` times: all but the first on what the one before has made of it.
///
/// # Errors
///
/// The thread's network namespace has no such interface; the kernel does not know one of `flags`, or what it has checked for them
/// is not so.
///
/// # Panics
///
/// When the packet is none.
pub fn test_run(
    program: BorrowedFd<'_>,
    interface: u32,
    packet: &[u8],
    repeat: u32,
    flags: u32,
) -> io::Result<Outcome> {
    // `struct __sk_buff` up to `ingress_ifindex`, by which a packet that the node forwards has come in, and `ifindex`.
    let mut context = [0_u32; 11];
    context[9..].fill(interface);
    run_in(program, packet, repeat, flags, &context)
}

/// As [`test_run`], of a program of any type; without a context, if that is empty.
fn run_in(
    program: BorrowedFd<'_>,
    packet: &[u8],
    repeat: u32,
    flags: u32,
    context: &[u32],
) -> io::Result<Outcome> {
    const BPF_PROG_TEST_RUN: libc::c_int = 10;
    let mut out = vec![0; packet.len() + 64];
    let size = |bytes: usize| u32::try_from(bytes).expect("a packet's size");
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_in: packet.as_ptr() as u64,
        data_size_in: size(packet.len()),
        data_out: out.as_mut_ptr() as u64,
        data_size_out: size(out.len()),
        repeat,
        flags,
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr() as u64 },
        ctx_size_in: size(size_of_val(context)),
        ..TestRun::default()
    };
    // SAFETY: the attributes are laid out as the kernel expects, and its pointers cover live buffers of the sizes
    // beside them.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRun>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attr.data_size_out as usize);
    Ok(Outcome {
        code: attr.retval.cast_signed(),
        packet: out,
        duration: Duration::from_nanos(attr.duration.into()),
    })
}

fn table<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> HashMap<MapData, K, V> {
    let map = ebpf.take_map(name).unwrap_or_else(|| panic!("the object has no map {name}"));
    map.try_into().unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn array<V: Pod>(ebpf: &mut Ebpf, name: &str) -> Array<MapData, V> {
    let map = ebpf.take_map(name).unwrap_or_else(|| panic!("the object has no map {name}"));
    map.try_into().unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn counters(ebpf: &mut Ebpf, name: &str) -> PerCpuArray<MapData, u64> {
    let map = ebpf.take_map(name).unwrap_or_else(|| panic!("the object has no map {name}"));
    map.try_into().unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn clear<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) {
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>().expect("the map can be read");
    for key in keys {
        map.remove(&key).expect("nobody else removes");
    }
}

fn put<'a, K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, entries: impl Iterator<Item = (&'a K, &'a V)>) {
    for (key, value) in entries {
        map.insert(key, value, 0).expect("there is room");
    }
}

fn total(counters: &PerCpuArray<MapData, u64>, index: u32) -> u64 {
    counters.get(&index, 0).expect("the map has such a counter").iter().sum()
}
