//! The program at XDP, before an uplink's tc ingress: attaching it, by a pinned link as the others, and taking it off. It is never
//! needed: what it does not do, the program at tc does. So where it cannot be, the agent says why and goes on.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
    programs::{ProgramError, Xdp, XdpError, XdpMode, links::FdLink, loaded_programs, xdp::XdpLink},
};
use proxier_common::XdpDevice;
use tokio::{runtime::Handle, task};

use super::{
    BpfSink,
    attach::{Former, REQUEST_PREFIX, Role, directory, take_over},
    uplinks::{self, Device, Interface, LinkHeader, View},
};
use crate::sink::Xdp as State;

/// The map of devices.
const TABLE: &str = "xdp_devices";

/// Where packets from outside are rewritten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Ingress {
    /// Where the node's stack takes them in.
    #[default]
    Tc,
    /// In the driver, before the kernel spends anything on them; at tc, where the driver cannot, and what XDP leaves alone.
    Xdp,
    /// By the kernel's generic XDP, which every Ethernet interface has: to try it out, for it is no faster than tc.
    XdpGeneric,
}

/// How a program is attached at XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
}

impl Mode {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    /// What was asked for; `None` for tc alone.
    const fn of(ingress: Ingress) -> Option<Self> {
        match ingress {
            Ingress::Tc => None,
            Ingress::Xdp => Some(Self::Native),
            Ingress::XdpGeneric => Some(Self::Generic),
        }
    }

    /// As told to whoever asks.
    const fn state(self) -> State {
        match self {
            Self::Native => State::Native,
            Self::Generic => State::Generic,
        }
    }

    /// The program's name in the object.
    const fn program(self) -> &'static str {
        match self {
            Self::Native => "proxier_xdp",
            Self::Generic => "proxier_xdp_skb",
        }
    }

    const fn flag(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }

    /// A link stays in its mode, so the pin's name says which.
    const fn name(self) -> &'static str {
        match self {
            Self::Native => "xdp-native-",
            Self::Generic => "xdp-generic-",
        }
    }

    fn pin(self, pin_path: &Path, index: u32) -> PathBuf {
        directory(pin_path).join(format!("{REQUEST_PREFIX}{}{index}", self.name()))
    }
}

/// The interface that a pin of this name belongs to, if it is one of XDP's.
pub(super) fn index_of_pin(name: &str) -> Option<u32> {
    let name = name.strip_prefix(REQUEST_PREFIX)?;
    Mode::ALL.into_iter().find_map(|mode| name.strip_prefix(mode.name())?.parse().ok())
}

/// What is at XDP of the uplinks, and why not.
#[derive(Debug)]
pub(super) struct Attachments {
    /// How to attach; `None` for tc alone.
    mode: Option<Mode>,
    /// Why there can be no program anywhere.
    unusable: Option<String>,
    /// What became of it, by the uplink's index.
    states: BTreeMap<u32, State>,
    /// By which the program tells this host's frames from others'.
    table: HashMap<MapData, u32, XdpDevice>,
    /// What that holds.
    devices: BTreeMap<u32, Device>,
}

impl Attachments {
    /// None yet. Loads the program that is asked for; that the kernel does not take it is said where it is to be attached.
    ///
    /// # Errors
    ///
    /// The object does not have what it should.
    pub(super) fn new(ebpf: &mut Ebpf, ingress: Ingress) -> anyhow::Result<Self> {
        let mode = Mode::of(ingress);
        let unusable = mode.and_then(|mode| load(ebpf, mode).err()).map(|error| format!("{error:#}"));
        let table = ebpf.take_map(TABLE).with_context(|| format!("the kernel object has no map {TABLE}"))?;
        let table = table.try_into().with_context(|| format!("map {TABLE} of the kernel object"))?;
        Ok(Self { mode, unusable, states: BTreeMap::new(), table, devices: BTreeMap::new() })
    }

    /// What became of XDP at the interface of this index; `None` where it was not asked for.
    pub(super) fn state(&self, index: u32) -> Option<&State> {
        self.states.get(&index)
    }

    /// Forgets the interfaces whose index is not one of these.
    pub(super) fn retain(&mut self, is_there: impl Fn(u32) -> bool) {
        self.states.retain(|index, _| is_there(*index));
    }

    /// Tells the program by which devices the uplinks' frames come, and with which MAC addresses they are for this host. Frames of
    /// a device that it does not know, or with another address, it leaves to tc.
    pub(super) fn follow(&mut self, view: &View) {
        // Between two default routes the last uplinks stay.
        if self.mode.is_none() || view.uplinks.is_empty() {
            return;
        }
        let is_uplink = |device: &Device| view.uplinks.iter().any(|uplink| uplink.index == device.upper);
        let wanted = view.devices.iter().filter(|(_, device)| is_uplink(device));
        let wanted: BTreeMap<u32, Device> = wanted.map(|(index, device)| (*index, *device)).collect();
        for index in
            self.devices.keys().copied().filter(|index| !wanted.contains_key(index)).collect::<Vec<_>>()
        {
            match self.table.remove(&index) {
                Ok(()) | Err(MapError::KeyNotFound) => drop(self.devices.remove(&index)),
                Err(error) => {
                    tracing::warn!(index, "an interface stays known to the program at XDP: {error}");
                }
            }
        }
        for (index, device) in wanted {
            if self.devices.get(&index) == Some(&device) {
                continue;
            }
            let Device { upper, mac } = device;
            match self.table.insert(index, XdpDevice { upper, mac, padding: 0 }, 0) {
                Ok(()) => drop(self.devices.insert(index, device)),
                Err(error) => tracing::warn!(
                    index,
                    "packets are rewritten at tc, not at XDP: map {TABLE} takes no interface of this index: {error}"
                ),
            }
        }
    }
}

impl BpfSink {
    /// Puts the program at XDP of an uplink if that was asked for, or else takes it off. tc is in place already: there is no moment
    /// without a program. `is_making_way` if another version of proxier has just let go of its own: the kernel takes it off in its own
    /// time.
    pub(super) fn attach_xdp(&mut self, interface: &Interface, role: Role, is_making_way: bool) {
        let Some(mode) = self.xdp.mode.filter(|_| role == Role::Uplink) else {
            self.xdp.states.remove(&interface.index);
            if let Err(error) = detach(&self.pin_path, interface.index) {
                tracing::warn!(interface = interface.name, "a program stays at XDP: {error:#}");
            }
            return;
        };
        // One of them may have the place.
        if !self.others.is_empty() {
            return;
        }
        let attached = match &self.xdp.unusable {
            Some(reason) => Err(anyhow!(reason.clone())),
            None => attach(&mut self.ebpf, &self.pin_path, interface, mode, is_making_way),
        };
        let state = match attached {
            Ok(()) => mode.state(),
            Err(error) => State::Refused(format!("{error:#}")),
        };
        if self.xdp.state(interface.index) == Some(&state) {
            return;
        }
        match &state {
            State::Refused(reason) => {
                tracing::warn!(
                    interface = interface.name,
                    "packets are rewritten at tc, not at XDP: {reason}"
                );
            }
            _ => tracing::info!(interface = interface.name, ?mode, "program is attached at XDP"),
        }
        self.xdp.states.insert(interface.index, state);
    }

    /// Puts the program at XDP of the uplinks once no other version of proxier has any, or has just let go of it (`is_making_way`).
    pub(super) fn succeed_at_xdp(&mut self, is_making_way: bool) {
        for (interface, role) in &self.attached.clone() {
            self.attach_xdp(interface, *role, is_making_way);
        }
    }
}

/// The number of this process's network namespace, which marks what its programs have rewritten: the same after a restart.
///
/// # Errors
///
/// There is no /proc.
pub(super) fn network_namespace() -> anyhow::Result<u32> {
    const PATH: &str = "/proc/self/ns/net";
    let inode =
        fs::metadata(PATH).with_context(|| format!("{PATH} cannot be read: is /proc mounted?"))?.ino();
    u32::try_from(inode)
        .with_context(|| format!("{PATH} has the inode {inode}, which is none of a namespace"))
}

/// Loads the program.
///
/// # Errors
///
/// The kernel does not take it.
fn load(ebpf: &mut Ebpf, mode: Mode) -> anyhow::Result<()> {
    program(ebpf, mode)?.load().with_context(|| {
        format!("program {} cannot be loaded, which needs Linux 5.18 (XDP on packets in fragments): use --ingress tc", mode.program())
    })
}

fn program(ebpf: &mut Ebpf, mode: Mode) -> anyhow::Result<&mut Xdp> {
    let name = mode.program();
    ebpf.program_mut(name)
        .with_context(|| format!("the kernel object has no program {name}"))?
        .try_into()
        .with_context(|| format!("{name} in the kernel object is not an XDP program"))
}

/// Puts the program of `ebpf` at XDP of `interface`. Where it is already, it is put there again, without a moment between.
/// `is_making_way` if another was let go just now.
///
/// # Errors
///
/// Why it cannot be there, and what to do about it.
fn attach(
    ebpf: &mut Ebpf,
    pin_path: &Path,
    interface: &Interface,
    mode: Mode,
    mut is_making_way: bool,
) -> anyhow::Result<()> {
    if interface.header != Some(LinkHeader::Ethernet) {
        bail!("{} has no Ethernet headers, which proxier reads at XDP", interface.name);
    }
    let program = program(ebpf, mode)?;
    // The kernel does not take both at once.
    for other in Mode::ALL.into_iter().filter(|other| *other != mode) {
        is_making_way |= remove(&other.pin(pin_path, interface.index))?;
    }
    let pin = mode.pin(pin_path, interface.index);
    match take_over(&pin, |link| Ok(program.attach_to_link(XdpLink::try_from(link)?)?)) {
        Former::TakenOver(id) => {
            // Closing this descriptor leaves the pin, and with it the link.
            drop(program.take_link(id)?);
            return Ok(());
        }
        Former::LeadsNowhere => is_making_way |= remove(&pin)?,
        Former::None => {}
    }
    let id = attach_anew(program, interface, mode, is_making_way)
        .map_err(|error| refusal(error, interface, mode))?;
    let link =
        FdLink::try_from(program.take_link(id)?).context("this kernel has no links for XDP (Linux 5.9)")?;
    drop(link.pin(&pin).with_context(|| format!("the link cannot be pinned at {}", pin.display()))?);
    Ok(())
}

/// `is_making_way` if a link of ours was let go just now: the kernel takes it off in its own time.
fn attach_anew(
    program: &mut Xdp,
    interface: &Interface,
    mode: Mode,
    is_making_way: bool,
) -> Result<aya::programs::xdp::XdpLinkId, ProgramError> {
    // Ten seconds: a grace period of RCU, a worker's turn, and whoever else has the lock of the network devices.
    const ATTEMPTS: u32 = 200;
    const BETWEEN: Duration = Duration::from_millis(50);
    let mut attempt = 1;
    loop {
        match program.attach_to_if_index(interface.index, mode.flag()) {
            Err(error) if is_making_way && attempt < ATTEMPTS && is_taken(&error) => {
                attempt += 1;
                thread::sleep(BETWEEN);
            }
            result => return result,
        }
    }
}

fn is_taken(error: &ProgramError) -> bool {
    // The latter where the other program is there in the other mode.
    matches!(code_of(error), Some(libc::EBUSY | libc::EEXIST))
}

fn code_of(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::XdpError(XdpError::NetlinkError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// The kernel's refusal in words, with what to do about it.
fn refusal(error: ProgramError, interface: &Interface, mode: Mode) -> anyhow::Error {
    let name = &interface.name;
    let reason = match code_of(&error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            let other = other_program(interface.index);
            format!(
                "{other} is at XDP of {name} already, where one program has room, and is left there: take it off with whatever put \
                 it there, or use --ingress tc"
            )
        }
        Some(libc::EOPNOTSUPP) if mode == Mode::Native => {
            // The latter: virtio_net, as long as the host does receive offloads for it.
            format!(
                "the driver of {name} has no XDP of its own, or none with the interface as it is set up (`dmesg` may say what is in the way): \
                 use --ingress tc, or --ingress xdp-generic to try it out"
            )
        }
        Some(libc::ERANGE | libc::EINVAL | libc::E2BIG) if mode == Mode::Native => format!(
            "the driver of {name} does not take an XDP program with the interface as it is set up (its MTU, its receive offloads, or its \
             queues; `dmesg` may say which): change that, or use --ingress tc"
        ),
        _ => format!("the kernel does not take an XDP program for {name}: use --ingress tc"),
    };
    anyhow::Error::from(error).context(reason)
}

/// Whose program is in the place, as far as the kernel tells.
fn other_program(index: u32) -> String {
    let id = task::block_in_place(|| Handle::current().block_on(uplinks::xdp_program(index)));
    let id = match id {
        Ok(Some(id)) => id,
        Ok(None) => return "another program".to_owned(),
        Err(error) => {
            tracing::debug!("the XDP program of interface {index} cannot be asked for: {error:#}");
            return "another program".to_owned();
        }
    };
    let mut programs = loaded_programs().filter_map(Result::ok);
    match programs
        .find(|program| program.id() == id)
        .and_then(|program| Some(program.name_as_str()?.to_owned()))
    {
        Some(name) if !name.is_empty() => format!("program {id} ({name})"),
        _ => format!("program {id}"),
    }
}

/// Takes the program off the interface of this index. Returns what was removed, a line each.
///
/// # Errors
///
/// What stays, and why.
pub(super) fn detach(pin_path: &Path, index: u32) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for mode in Mode::ALL {
        let pin = mode.pin(pin_path, index);
        if remove(&pin)? {
            removed.push(format!("link {}", pin.display()));
        }
    }
    Ok(removed)
}

/// `false` if there was nothing.
fn remove(pin: &Path) -> anyhow::Result<bool> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(anyhow!(error).context(format!("{} cannot be removed", pin.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_says_of_which_interface_it_is() {
        for mode in Mode::ALL {
            let pin = mode.pin(Path::new("/p"), 17);
            assert_eq!(index_of_pin(pin.file_name().unwrap().to_str().unwrap()), Some(17));
        }
        assert_eq!(index_of_pin("request-17"), None);
        assert_eq!(index_of_pin("reply-17"), None);
    }
}
