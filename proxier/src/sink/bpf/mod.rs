//! The kernel's side of the agent: loads and attaches the programs, keeps the maps as desired, pins both, and removes
//! what has been idle.
//!
//! Nothing is detached or removed when the agent ends: packets go on, and the next agent adopts what it finds.

use std::{
    collections::BTreeSet,
    fs::{self, File, TryLockError},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, programs::Program};
use proxier_common::Address;
use tokio::{runtime::Handle, sync::watch, task};

use self::{
    attach::{Method, Role},
    delivery::Monitor,
    events::Events,
    expiry::Expiry,
    reach::Reach,
    sweeper::Sweeper,
    tables::{TableError, Tables},
    uplinks::{Interface, View},
    versions::Version,
};
use super::{Attached, Condition, Failure, Incomplete, Sink, Snapshot};
use crate::{
    delta::{Actual, Plan, Step},
    desired::{Desired, Scope, ServiceKey},
    model::Family,
};

mod attach;
mod clock;
mod delivery;
mod events;
mod evictions;
mod expiry;
mod follow;
pub mod inspect;
mod preflight;
mod reach;
mod scan;
mod sweeper;
mod tables;
mod uplinks;
mod versions;
mod xdp;

pub use xdp::Ingress;

/// Where the maps and links are pinned unless told otherwise.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/proxier";

/// The kernel programs, as `cargo xtask build-ebpf` made them: the agent is one file to ship.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxier.bpf.o"));

/// How often the programs are put in their places again.
const ATTACH_AGAIN: Duration = Duration::from_secs(30);

/// The shortest time from one round of tidying to the next. After a single change it is tidied up at once; changes that
/// follow each other share a round, the last ones' at the next tick. A round begins with a grace period, 5 to 20 ms in which
/// nothing else is applied, and begins a sweep, which takes half of one CPU while the tables are full and pods go all the
/// time.
const BETWEEN_TIDYINGS: Duration = Duration::from_millis(500);

/// How the programs are attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AttachMode {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// A tcx link, first in line.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

/// What the command line says about this sink.
#[derive(Clone, Debug)]
pub struct Options {
    /// Interfaces towards clients. None: every interface that carries a default route, followed as routes change.
    pub uplinks: Vec<String>,
    /// A directory on a bpffs; made if it is missing.
    pub pin_path: PathBuf,
    /// How to attach.
    pub attach: AttachMode,
    /// Where packets from outside are rewritten.
    pub ingress: Ingress,
    /// Whether pods and processes of this node are clients too: all pods' links are then attached to, not only those by which
    /// packets are delivered directly, and the programs look at what the node itself sends (`NODE_CLIENTS`).
    pub local_clients: bool,
}

/// The sink. Nothing is detached or removed when it is dropped.
#[derive(Debug)]
pub struct BpfSink {
    pin_path: PathBuf,
    method: Method,
    ebpf: Ebpf,
    tables: Tables,
    _expiry: Expiry,
    _events: Events,
    sweeper: Sweeper,
    /// What the tables hold.
    actual: Actual,
    /// Whether a write has failed, so that they have to be read again.
    stale: bool,
    /// Whether some Service may not be as it was last to be, so that the next plan has to be about all of them. One whose
    /// source ranges do not fit is what it can be until there is room: no other has to be looked at for its sake.
    incomplete: bool,
    /// When it was last tidied up; never before the first plan.
    tidied_at: Option<Instant>,
    view: watch::Receiver<View>,
    attached: BTreeSet<(Interface, Role)>,
    xdp: xdp::Attachments,
    /// When the programs were last put in their places.
    attached_at: Instant,
    local_clients: bool,
    /// How pods are reached past the stack, given what is attached.
    reach: Arc<Reach>,
    /// Interfaces on which programs have to be for that.
    direct_links: BTreeSet<u32>,
    /// Whether the tables say so.
    linked: bool,
    /// What is reported of it.
    delivery: Monitor,
    /// Interfaces that could not be attached to, as reported: said once, tried again every second.
    refused: BTreeSet<Interface>,
    reported_missing: BTreeSet<String>,
    without_uplink: bool,
    /// Families that the last desired state has external addresses of.
    families: BTreeSet<Family>,
    /// Those of them of which the node forwards no packets, as logged.
    without_forwarding: BTreeSet<Family>,
    /// Families of which the node forwards no packets, used or not.
    not_forwarding: BTreeSet<Family>,
    pins_lost: bool,
    /// Versions of proxier whose programs may be attached beside ours.
    others: Vec<Version>,
    /// Held as long as the agent is at work on the pins.
    _lock: File,
}

impl BpfSink {
    /// Checks the machine (privileges, kernel, bpffs), loads the programs over the pinned maps, attaches them.
    /// Must be called inside a multi-threaded tokio runtime, in which it goes on following interfaces and routes.
    ///
    /// # Errors
    ///
    /// What is missing and what to do about it.
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let Options { uplinks, pin_path, attach, ingress, local_clients } = options;
        preflight::check(&pin_path)?;
        let method = Method::resolve(attach)?;
        let links = attach::directory(&pin_path);
        fs::create_dir_all(&links).with_context(|| format!("{} cannot be made", links.display()))?;
        let lock = lock(&pin_path)?;
        tables::check_pinned(&pin_path)?;
        let mut ebpf = load(&pin_path, local_clients, ingress)?;
        let xdp = xdp::Attachments::new(&mut ebpf, ingress)?;
        let mut tables = Tables::open(&pin_path)?;
        let actual = tables.read()?;
        tables.put_links(&actual)?;
        // A former agent may have been killed between a change and the sweep that belongs to it.
        tables.sweep(|_, _| true)?;
        if actual.has_no_service() {
            tracing::info!(pin_path = %pin_path.display(), "kernel programs are loaded");
        } else {
            tracing::info!(
                services = actual.in_force().services.into_keys().map(|key| key.service).collect::<BTreeSet<_>>().len(),
                pin_path = %pin_path.display(),
                "kernel programs are loaded; the tables of a former agent are adopted as they are"
            );
        }
        let sweeper = Sweeper::open(&pin_path, &tables)?;
        let expiry = Expiry::start(&pin_path, &tables)?;
        let events = Events::start(&pin_path)?;
        let named = uplinks.into_iter().collect();
        let view = task::block_in_place(|| Handle::current().block_on(uplinks::watch(named)))?;
        let others = versions::others(&pin_path);
        let mut sink = Self {
            pin_path,
            method,
            ebpf,
            tables,
            sweeper,
            _expiry: expiry,
            _events: events,
            actual,
            stale: false,
            incomplete: true,
            tidied_at: None,
            view,
            attached: BTreeSet::new(),
            xdp,
            attached_at: Instant::now(),
            local_clients,
            reach: Arc::default(),
            direct_links: BTreeSet::new(),
            linked: false,
            delivery: Monitor::default(),
            refused: BTreeSet::new(),
            reported_missing: BTreeSet::new(),
            without_uplink: false,
            families: BTreeSet::new(),
            without_forwarding: BTreeSet::new(),
            not_forwarding: not_forwarding(),
            pins_lost: false,
            others,
            _lock: lock,
        };
        let view = sink.view.borrow_and_update().clone();
        sink.follow(&view)?;
        Ok(sink)
    }

    /// Carries out these steps, up to the first that fails.
    fn execute(&mut self, steps: Vec<Step>) -> anyhow::Result<()> {
        for step in steps {
            // The one under way is for a part of the same; and two need not run side by side.
            if step == Step::Sweep
                && let Some(ended) = self.sweeper.wait()
            {
                self.actual.end_sweep(ended.is_ok());
            }
            if let Err(error) = self.tables.execute(&step, &self.actual) {
                // What was half done is made good by the next plan, which starts from what is really there.
                self.stale = true;
                return Err(error.into());
            }
            self.actual.apply(&step);
        }
        Ok(())
    }

    /// Reads the tables again if that is due.
    fn refresh(&mut self) -> anyhow::Result<()> {
        if self.stale {
            self.actual.correct(self.tables.read()?);
            self.stale = false;
        }
        Ok(())
    }

    /// Removes what plans have left behind, and begins to sweep if that is due and no sweep is under way.
    fn tidy_up(&mut self) -> anyhow::Result<()> {
        self.tidied_at = Some(Instant::now());
        self.refresh()?;
        self.execute(self.actual.retirement(&*self.reach))?;
        self.actual.retired();
        if self.sweeper.is_busy() {
            return Ok(());
        }
        self.execute(self.actual.freeing())?;
        if self.actual.is_swept() {
            return Ok(());
        }
        self.execute(self.actual.before_sweep().into_iter().collect())?;
        let started = self.sweeper.start(self.actual.begin_sweep());
        if started.is_err() {
            self.actual.end_sweep(false);
        }
        started
    }

    /// If a sweep has ended, frees the ids for which it was waited.
    fn look_after_sweep(&mut self) -> anyhow::Result<()> {
        let Some(ended) = self.sweeper.ended() else { return Ok(()) };
        self.actual.end_sweep(ended.is_ok());
        ended.context("flows and sessions of what went stay for now")?;
        self.execute(self.actual.freeing())
    }

    /// Says so when somebody has removed or replaced the pinned maps: what this agent writes then reaches nobody who comes
    /// after it.
    fn look_after_pins(&mut self) {
        let lost = !self.tables.are_pinned(&self.pin_path);
        if lost && !self.pins_lost {
            tracing::error!(
                pin_path = %self.pin_path.display(),
                "the pinned maps are no longer those of this agent: restart it"
            );
        }
        self.pins_lost = lost;
    }

    /// Says so when the node does not forward packets of a family that is in use, and when it does again.
    fn look_after_forwarding(&mut self) {
        self.not_forwarding = not_forwarding();
        let without: BTreeSet<Family> = self.families.intersection(&self.not_forwarding).copied().collect();
        for family in without.difference(&self.without_forwarding) {
            let parameter = preflight::forwarding_parameter(*family);
            tracing::warn!(
                "{parameter} is 0: {family} packets for external addresses end on this node, delivered directly or not; run \
                 `sysctl -w {parameter}=1`"
            );
        }
        for family in self.without_forwarding.difference(&self.not_forwarding) {
            let parameter = preflight::forwarding_parameter(*family);
            tracing::info!("{parameter} is not 0 any more: {family} packets go on to pods");
        }
        self.without_forwarding = without;
    }

    /// Takes off what another version of proxier has attached: it would go on delivering what this one withdraws.
    ///
    /// Not before this version's tables are filled for the first time. Its programs are first in line, so from then on they
    /// take every request; until then, those of the other version do. There is no moment without.
    fn detach_others(&mut self) {
        if self.others.is_empty() {
            return;
        }
        let is_making_way = self.others.iter().any(Version::is_at_xdp);
        for version in self.others.drain(..) {
            let name = version.name();
            // Its filters, if it had any instead of links, have been replaced in place or are taken off like our own.
            match version.detach().and_then(|_| version.remove()) {
                Ok(_) => tracing::info!(
                    "programs of another version ({name}) are detached; conversations that they carried end"
                ),
                Err(error) => tracing::warn!(
                    "programs of another version ({name}) may go on delivering what is withdrawn: {error:#}; run \
                     `rm -r {}`",
                    version.directory().display()
                ),
            }
        }
        self.succeed_at_xdp(is_making_way);
    }
}

impl Sink for BpfSink {
    fn apply(&mut self, snapshot: Snapshot<'_>) -> anyhow::Result<()> {
        self.families = snapshot.desired.services.keys().map(|key| key.family).collect();
        self.look_after_forwarding();
        self.refresh()?;
        let mut failures = Vec::new();
        let scope = if self.incomplete { &Scope::All } else { snapshot.scope };
        if let Err(error) = self.prepare_links(snapshot.desired, scope) {
            failures.push(Failure::of("links of pods".to_owned(), None, &error));
        }
        if let Err(error) = self.look_after_sweep() {
            failures.push(Failure::of("flows and sessions of what went".to_owned(), None, &error));
        }
        let reach = Arc::clone(&self.reach);
        let plan = Plan::new(snapshot.desired, &self.actual, scope, &*reach);
        let mut shortages = Vec::new();
        for task in plan.pressing() {
            if let Some(shortage) = plan.shortage(*task, &self.actual) {
                shortages.push(Failure {
                    subject: plan.subject(*task, &self.actual),
                    service: plan.service(*task).cloned(),
                    is_full: true,
                    message: shortage.to_string(),
                });
            }
            if let Err(error) = self.execute(plan.steps(*task, &self.actual)) {
                let service = plan.service(*task).cloned();
                failures.push(Failure::of(plan.subject(*task, &self.actual), service, &error));
            }
        }
        // Also if some of it failed: the rest is in force, and what is withdrawn must end.
        self.detach_others();
        self.incomplete = !failures.is_empty();
        // What is removed may make the room that is wanting when all of it is tried again.
        let makes_room = !shortages.is_empty() && *snapshot.scope == Scope::All;
        let is_due =
            self.incomplete || makes_room || self.tidied_at.is_none_or(|at| at.elapsed() >= BETWEEN_TIDYINGS);
        if is_due && let Err(error) = self.tidy_up() {
            self.incomplete = true;
            failures.push(Failure::of("what nothing leads to any more".to_owned(), None, &error));
        }
        failures.append(&mut shortages);
        if failures.is_empty() {
            return Ok(());
        }
        Err(Incomplete { failures }.into())
    }

    fn condition(&self) -> Option<Condition> {
        let interfaces = self.attached.iter().map(|(interface, role)| Attached {
            interface: interface.name.clone(),
            is_uplink: *role == Role::Uplink,
            xdp: self.xdp.state(interface.index).cloned(),
        });
        let direct = self.delivery.report();
        Some(Condition { interfaces: interfaces.collect(), pinned: !self.pins_lost, direct })
    }

    fn in_force(&self) -> Desired {
        self.actual.in_force()
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        let mut followed = Ok(());
        self.look_after_forwarding();
        if self.view.has_changed().context("uplinks are no longer followed (netlink)")? {
            let view = self.view.borrow_and_update().clone();
            followed = self.follow(&view);
        } else if !self.refused.is_empty() || !self.linked || !self.reach.is_of(&self.not_forwarding) {
            let view = self.view.borrow().clone();
            followed = self.follow(&view);
        }
        if self.attached_at.elapsed() >= ATTACH_AGAIN {
            self.attach_again();
            self.look_after_pins();
            let view = self.view.borrow().clone();
            followed = self.follow(&view);
        }
        let services_of = |pod: IpAddr| self.actual.direct_services_of(pod.into());
        self.delivery.look(self.actual.direct_pods().map(Address::to_ip), &self.reach, services_of);
        followed?;
        self.refresh()?;
        self.look_after_sweep()?;
        if self.tidied_at.is_some_and(|at| at.elapsed() >= BETWEEN_TIDYINGS) {
            self.tidy_up().context("what nothing leads to any more stays for now")?;
        }
        Ok(())
    }
}

/// The families of which the node forwards no packets.
fn not_forwarding() -> BTreeSet<Family> {
    Family::ALL.into_iter().filter(|family| !preflight::forwards(*family)).collect()
}

impl Failure {
    fn of(subject: String, service: Option<ServiceKey>, error: &anyhow::Error) -> Self {
        let is_full = matches!(error.downcast_ref(), Some(TableError::Full { .. }));
        Self { subject, service, is_full, message: format!("{error:#}") }
    }
}

/// Names in a sentence.
struct Names<'a>(&'a BTreeSet<String>);

impl std::fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.iter().map(String::as_str).collect::<Vec<_>>().join(", "))
    }
}

/// Keeps a second agent, or a clean-up, away from the pins until the file is closed.
fn lock(pin_path: &Path) -> anyhow::Result<File> {
    let directory =
        File::open(pin_path).with_context(|| format!("{} cannot be opened", pin_path.display()))?;
    match directory.try_lock() {
        Ok(()) => Ok(directory),
        Err(TryLockError::WouldBlock) => bail!(
            "a proxier is at work on {}: end it first, or choose another --pin-path",
            pin_path.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("{} cannot be locked", pin_path.display()))
        }
    }
}

fn load(pin_path: &Path, local_clients: bool, ingress: Ingress) -> anyhow::Result<Ebpf> {
    let pins: Vec<_> = tables::pins(pin_path).collect();
    let node_clients = u8::from(local_clients);
    let direct_delivery = u8::from(preflight::has_direct_delivery());
    let coarse_clock = u8::from(preflight::has_coarse_clock());
    let namespace = xdp::network_namespace()?;
    let xdp_in_use = u8::from(ingress != Ingress::Tc);
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::STATS);
    // Else they would speak to the pod, and be answered by an address that they do not know.
    loader.override_global("NODE_CLIENTS", &node_clients, true);
    loader.override_global("DIRECT_DELIVERY", &direct_delivery, true);
    loader.override_global("COARSE_CLOCK", &coarse_clock, true);
    loader.override_global("NETWORK_NAMESPACE", &namespace, true);
    loader.override_global("XDP_IN_USE", &xdp_in_use, true);
    for (map, path) in &pins {
        loader.map_pin_path(map, path.as_path());
    }
    let mut ebpf = loader.load(OBJECT).context(
        "the kernel does not take proxier's maps: does it have BPF (CONFIG_BPF_SYSCALL) and enough locked memory?",
    )?;
    for (name, program) in ebpf.programs_mut() {
        let program = match program {
            Program::SchedClassifier(program) => program,
            // Where it is asked for only: by `xdp::load`.
            Program::Xdp(_) => continue,
            _ => bail!("program {name} of the kernel object is of an unexpected type"),
        };
        program.load().with_context(|| {
            format!(
                "program {name} cannot be loaded; if the kernel's verifier refuses it, that is a defect of proxier: please \
                 report it with the kernel's release and this message"
            )
        })?;
    }
    Ok(ebpf)
}

/// Detaches the programs and removes every pin below `pin_path`, those of other versions of proxier too. Returns what was
/// removed, a line each.
///
/// # Errors
///
/// What could not be removed, and why.
pub fn cleanup(pin_path: &Path) -> anyhow::Result<Vec<String>> {
    preflight::check(pin_path)?;
    let _lock = if pin_path.exists() { Some(lock(pin_path)?) } else { None };
    let versions = versions::all(pin_path)?;
    let mut removed = Vec::new();
    for version in &versions {
        removed.extend(version.detach()?);
    }
    for interface in &nix::net::if_::if_nameindex().context("interfaces cannot be listed")? {
        let name = interface.name().to_string_lossy();
        removed.extend(attach::detach_clsact(&name)?);
    }
    for version in &versions {
        removed.extend(version.remove()?);
    }
    match fs::remove_dir(pin_path) {
        Ok(()) => removed.push(format!("directory {}", pin_path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // A mount point, or somebody else's files in it: not ours to remove.
        Err(error) => tracing::debug!("{} stays: {error}", pin_path.display()),
    }
    Ok(removed)
}
