//! Attaching the programs to interfaces and taking them off again. A program that is attached stays so when the agent
//! ends; the next agent puts its own in the same place.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{
            self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_detach_program,
        },
    },
};

use super::{
    AttachMode, preflight, tables,
    uplinks::{Interface, LinkHeader},
    xdp,
};

/// What an interface leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Clients outside.
    Uplink,
    /// A pod on this node.
    PodLink,
    /// A pod on this node, which is on a bridge: the route to it leads to the bridge, not to its own link.
    PodPort,
}

/// One of the two places at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Towards clients or pods. Its pins are called `reply-`, for its main use.
    Egress,
    /// From clients or pods. Its pins are called `request-`, likewise.
    Ingress,
}

impl Place {
    /// Replies first: a request must not get through before its reply can be rewritten.
    const IN_ORDER: [Self; 2] = [Self::Egress, Self::Ingress];

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Egress => TcAttachType::Egress,
            Self::Ingress => TcAttachType::Ingress,
        }
    }

    /// The program's name in the object.
    const fn program(self, role: Role, header: LinkHeader) -> &'static str {
        match (self, role, header) {
            (Self::Egress, Role::Uplink, LinkHeader::Ethernet) => "proxier_reply",
            (Self::Ingress, Role::Uplink, LinkHeader::Ethernet) => "proxier_request",
            (Self::Egress, Role::Uplink, LinkHeader::None) => "proxier_rep_l3",
            (Self::Ingress, Role::Uplink, LinkHeader::None) => "proxier_req_l3",
            // Pods have Ethernet links.
            (Self::Egress, Role::PodLink | Role::PodPort, _) => "proxier_pod_out",
            (Self::Ingress, Role::PodLink, _) => "proxier_pod_in",
            (Self::Ingress, Role::PodPort, _) => "proxier_port_in",
        }
    }

    /// Every program that may be in this place.
    const fn programs(self) -> [&'static str; 4] {
        [
            self.program(Role::Uplink, LinkHeader::Ethernet),
            self.program(Role::Uplink, LinkHeader::None),
            self.program(Role::PodLink, LinkHeader::Ethernet),
            self.program(Role::PodPort, LinkHeader::Ethernet),
        ]
    }

    const fn pin_prefix(self) -> &'static str {
        match self {
            Self::Egress => "reply-",
            Self::Ingress => REQUEST_PREFIX,
        }
    }

    /// Where the link to the interface of this index is pinned. Names of interfaces may have dots, those of pins may
    /// not; and an interface that comes again under the same name is another one.
    fn pin(self, pin_path: &Path, index: u32) -> PathBuf {
        directory(pin_path).join(format!("{}{index}", self.pin_prefix()))
    }
}

/// How programs are attached, once that is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Tcx,
    Clsact,
}

impl Method {
    /// What `mode` means on this kernel.
    ///
    /// # Errors
    ///
    /// The kernel does not have what was asked for.
    pub(super) fn resolve(mode: AttachMode) -> anyhow::Result<Self> {
        match mode {
            AttachMode::Clsact => Ok(Self::Clsact),
            AttachMode::Auto if !preflight::has_tcx() => Ok(Self::Clsact),
            AttachMode::Tcx if !preflight::has_tcx() => {
                let (major, minor) = proxier_common::TCX_SINCE;
                bail!(
                    "this kernel has no tcx links, which came with Linux {major}.{minor}: use --attach clsact"
                )
            }
            AttachMode::Auto | AttachMode::Tcx => Ok(Self::Tcx),
        }
    }
}

/// The first priority, and a handle by which a later agent finds the filter again: "px".
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x7078);

/// What the directory of the pinned links is called, in every version of proxier.
pub(super) const LINKS: &str = "links";
/// What the name of a pinned link to a program for requests begins with, in every version of proxier.
pub(super) const REQUEST_PREFIX: &str = "request-";

/// The directory that holds the pinned links.
pub(super) fn directory(pin_path: &Path) -> PathBuf {
    tables::directory(pin_path).join(LINKS)
}

/// Puts the programs of `ebpf` in both places of `interface`. Where they are already, they are put there again.
///
/// # Errors
///
/// Which program could not be put where, and why.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    pin_path: &Path,
    interface: &Interface,
    role: Role,
    method: Method,
) -> anyhow::Result<()> {
    let Some(header) = interface.header else {
        bail!(
            "{} is of a link type whose packets proxier cannot read: it reads Ethernet and links without link-layer \
             header; name other interfaces with --uplink",
            interface.name
        );
    };
    for place in Place::IN_ORDER {
        let name = place.program(role, header);
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .with_context(|| format!("the kernel object has no program {name}"))?
            .try_into()
            .with_context(|| format!("{name} in the kernel object is not a tc program"))?;
        match method {
            Method::Tcx => attach_tcx(program, place, pin_path, interface),
            Method::Clsact => attach_clsact(program, place, interface),
        }
        .with_context(|| format!("program {name} cannot be attached to {}", interface.name))?;
    }
    // What another --attach left behind goes only now: there is no moment without a program, and for a moment with two
    // the first leaves a mark on what it rewrites, and the second lets that go (`Packet::set_rewritten`).
    match method {
        Method::Tcx => detach_clsact(&interface.name).map(drop),
        Method::Clsact => unpin_tcx(pin_path, interface.index).map(drop),
    }
}

/// What became of the link that a former program was attached by.
#[derive(Debug)]
pub(super) enum Former<Id> {
    /// There is none.
    None,
    /// It has the new program, which knows it by this: there was no moment without one.
    TakenOver(Id),
    /// The interface of its index is another one by now. Its pin is still there.
    LeadsNowhere,
}

/// Has the link that is pinned run another program, which `replace` attaches to it.
pub(super) fn take_over<Id>(pin: &Path, replace: impl FnOnce(FdLink) -> anyhow::Result<Id>) -> Former<Id> {
    let Ok(link) = PinnedLink::from_pin(pin) else { return Former::None };
    match replace(link.into()) {
        Ok(id) => Former::TakenOver(id),
        Err(error) => {
            tracing::debug!("the pinned link {} is replaced: {error:#}", pin.display());
            Former::LeadsNowhere
        }
    }
}

fn attach_tcx(
    program: &mut SchedClassifier,
    place: Place,
    pin_path: &Path,
    interface: &Interface,
) -> anyhow::Result<()> {
    let pin = place.pin(pin_path, interface.index);
    match take_over(&pin, |link| Ok(program.attach_to_link(SchedClassifierLink::try_from(link)?)?)) {
        Former::TakenOver(id) => {
            // Closing this descriptor leaves the pin, and with it the link.
            drop(program.take_link(id)?);
            return Ok(());
        }
        Former::LeadsNowhere => {
            fs::remove_file(&pin).with_context(|| format!("{} cannot be removed", pin.display()))?;
        }
        Former::None => {}
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(&interface.name, place.attach_type(), options)?;
    let link = FdLink::try_from(program.take_link(id)?)?;
    drop(link.pin(&pin).with_context(|| format!("the link cannot be pinned at {}", pin.display()))?);
    Ok(())
}

fn attach_clsact(program: &mut SchedClassifier, place: Place, interface: &Interface) -> anyhow::Result<()> {
    let options = || NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
    match tc::qdisc_add_clsact(&interface.name) {
        Ok(()) => {}
        Err(error) if kind_of(&error) == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).context("the clsact qdisc cannot be added"),
    }
    let attach_type = place.attach_type();
    let id = match program.attach_with_options(
        &interface.name,
        attach_type,
        TcAttachOptions::Netlink(options()),
    ) {
        Err(ProgramError::TcError(error)) if kind_of(&error) == io::ErrorKind::AlreadyExists => {
            // Our filter of a former agent: the kernel replaces a filter's program in one step.
            let NlOptions { priority, handle, classid } = options();
            let link =
                SchedClassifierLink::attached(&interface.name, attach_type, priority, handle, classid)?;
            program.attach_to_link(link)?
        }
        other => other?,
    };
    // The filter outlives this process; dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn kind_of(error: &TcError) -> io::ErrorKind {
    match error {
        TcError::IoError(error) => error.kind(),
        TcError::NetlinkError(error) => error
            .raw_os_error()
            .map_or(io::ErrorKind::Other, |code| io::Error::from_raw_os_error(code).kind()),
        _ => io::ErrorKind::Other,
    }
}

/// Takes the programs off an interface, however they were attached. Returns what was taken off, a line each.
///
/// # Errors
///
/// What is still attached, and why.
pub(super) fn detach(pin_path: &Path, interface: &Interface) -> anyhow::Result<Vec<String>> {
    let mut removed = unpin(pin_path, interface.index)?;
    removed.extend(detach_clsact(&interface.name)?);
    Ok(removed)
}

/// Removes the pins of the links to the interface of this index, which detaches them.
pub(super) fn unpin(pin_path: &Path, index: u32) -> anyhow::Result<Vec<String>> {
    // What lets requests in goes first, and of that what is first in line.
    let mut removed = xdp::detach(pin_path, index)?;
    removed.extend(unpin_tcx(pin_path, index)?);
    Ok(removed)
}

fn unpin_tcx(pin_path: &Path, index: u32) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for place in Place::IN_ORDER.into_iter().rev() {
        let pin = place.pin(pin_path, index);
        match fs::remove_file(&pin) {
            Ok(()) => removed.push(format!("link {}", pin.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} cannot be removed", pin.display())),
        }
    }
    Ok(removed)
}

/// Removes our filters from an interface's clsact qdisc. The qdisc stays: others may use it.
pub(super) fn detach_clsact(interface: &str) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for place in Place::IN_ORDER.into_iter().rev() {
        for name in place.programs() {
            match qdisc_detach_program(interface, place.attach_type(), name) {
                Ok(()) => removed.push(format!("filter {name} at {interface}")),
                // No such filter; or no clsact qdisc at all, which is EINVAL.
                Err(error)
                    if matches!(kind_of(&error), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("filter {name} at {interface} stays"));
                }
            }
        }
    }
    Ok(removed)
}

/// Indices of the interfaces to which links are pinned.
pub(super) fn pinned(pin_path: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory(pin_path)) else {
        return Vec::new();
    };
    let mut indices: Vec<u32> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let of_tcx = || {
                Place::IN_ORDER.iter().find_map(|place| name.strip_prefix(place.pin_prefix())?.parse().ok())
            };
            xdp::index_of_pin(name).or_else(of_tcx)
        })
        .collect();
    indices.sort_unstable();
    indices.dedup();
    indices
}
