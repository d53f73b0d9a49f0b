//! What the machine must offer, asked before anything is loaded, so that the answer names what is missing instead of
//! an `EPERM` from somewhere inside.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use proxier_common::{COARSE_CLOCK_SINCE, DIRECT_DELIVERY_SINCE, TCX_SINCE, is_linux_since};
use thiserror::Error;

use crate::model::Family;

/// The oldest kernel that proxier supports: the first long-term one with every helper used here (`bpf_redirect_neigh`).
const OLDEST_KERNEL: (u8, u8) = (5, 10);

/// Why this machine will not do.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum PreflightError {
    /// Not root, or too little of it.
    #[error(
        "loading programs into the kernel needs the capabilities {missing}, which this process lacks: run it as root, \
         or give the container the capabilities BPF, PERFMON and NET_ADMIN"
    )]
    Capabilities {
        /// Those it lacks.
        missing: String,
    },
    /// Too old.
    #[error("kernel {found} is too old: proxier needs Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1)]
    Kernel {
        /// The kernel's release.
        found: String,
    },
    /// No bpffs.
    #[error(
        "{} is not on a bpffs: mount one with `mount -t bpf bpf {}`, or name a directory on one with --pin-path",
        path.display(), mount_point.display()
    )]
    NoBpffs {
        /// The directory asked for.
        path: PathBuf,
        /// Where a bpffs would do.
        mount_point: PathBuf,
    },
    /// bpffs allows no dots.
    #[error("{} cannot be a directory on a bpffs: names there have no dots; choose another --pin-path", path.display())]
    Dotted {
        /// The directory asked for.
        path: PathBuf,
    },
    /// Something else in the way.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// What was asked.
        path: PathBuf,
        /// What the kernel said.
        reason: String,
    },
}

/// Asks everything.
///
/// # Errors
///
/// The first thing that is missing.
pub(super) fn check(pin_path: &Path) -> Result<(), PreflightError> {
    kernel(&release()?)?;
    capabilities(&status()?)?;
    bpffs(pin_path)
}

/// Whether the running kernel has tcx links.
pub(super) fn has_tcx() -> bool {
    is_linux_since(TCX_SINCE)
}

/// Whether the running kernel takes programs that deliver past its stack.
pub(super) fn has_direct_delivery() -> bool {
    is_linux_since(DIRECT_DELIVERY_SINCE)
}

/// Whether the running kernel lends programs the clock as of the last tick.
pub(super) fn has_coarse_clock() -> bool {
    is_linux_since(COARSE_CLOCK_SINCE)
}

/// The parameter that lets the node forward packets of a family.
pub(super) const fn forwarding_parameter(family: Family) -> &'static str {
    match family {
        Family::V4 => "net.ipv4.ip_forward",
        Family::V6 => "net.ipv6.conf.all.forwarding",
    }
}

/// Whether the node forwards packets of a family; yes, if it does not say.
pub(super) fn forwards(family: Family) -> bool {
    let path = Path::new("/proc/sys").join(forwarding_parameter(family).replace('.', "/"));
    fs::read_to_string(path).map_or(true, |value| value.trim() != "0")
}

fn read(path: &str) -> Result<String, PreflightError> {
    fs::read_to_string(path)
        .map_err(|error| PreflightError::Unreadable { path: path.into(), reason: error.to_string() })
}

fn release() -> Result<String, PreflightError> {
    read("/proc/sys/kernel/osrelease")
}

fn status() -> Result<String, PreflightError> {
    read("/proc/self/status")
}

fn kernel(release: &str) -> Result<(), PreflightError> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        // A release that starts with no number is a custom build: let the verifier judge.
        _ => return Ok(()),
    };
    if version < (OLDEST_KERNEL.0.into(), OLDEST_KERNEL.1.into()) {
        return Err(PreflightError::Kernel { found: release.trim().to_owned() });
    }
    Ok(())
}

/// Bits of `CapEff` (linux/capability.h).
const NET_ADMIN: (u32, &str) = (12, "NET_ADMIN");
const SYS_ADMIN: u32 = 21;
const PERFMON: (u32, &str) = (38, "PERFMON");
const BPF: (u32, &str) = (39, "BPF");

fn capabilities(status: &str) -> Result<(), PreflightError> {
    let Some(effective) = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
    else {
        return Err(PreflightError::Unreadable {
            path: "/proc/self/status".into(),
            reason: "it says nothing about effective capabilities (CapEff): is /proc mounted?".to_owned(),
        });
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    // SYS_ADMIN includes what BPF and PERFMON were split off from it.
    let missing: Vec<&str> = [BPF, PERFMON, NET_ADMIN]
        .into_iter()
        .filter(|(bit, _)| !has(*bit) && (*bit == NET_ADMIN.0 || !has(SYS_ADMIN)))
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(PreflightError::Capabilities { missing: missing.join(", ") })
    }
}

fn bpffs(pin_path: &Path) -> Result<(), PreflightError> {
    let unreadable = |path: &Path, error: &dyn std::fmt::Display| PreflightError::Unreadable {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let absolute = std::path::absolute(pin_path).map_err(|error| unreadable(pin_path, &error))?;
    // The directory itself is made later; what counts is the file system it will be on.
    for ancestor in absolute.ancestors() {
        match nix::sys::statfs::statfs(ancestor) {
            Ok(stat) if stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC => {
                let below = absolute.strip_prefix(ancestor).unwrap_or(&absolute);
                let dotted = below.components().any(|part| has_dot(Some(part.as_os_str())));
                return if dotted { Err(PreflightError::Dotted { path: absolute }) } else { Ok(()) };
            }
            Ok(_) => {
                return Err(PreflightError::NoBpffs {
                    path: pin_path.to_owned(),
                    mount_point: Path::new("/sys/fs/bpf").to_owned(),
                });
            }
            Err(nix::Error::ENOENT) => {}
            // How a bpffs answers to a name with a dot; which file system it is, the directory above says.
            Err(nix::Error::EPERM) if has_dot(ancestor.file_name()) => {}
            Err(error) => return Err(unreadable(ancestor, &io::Error::from(error))),
        }
    }
    Err(PreflightError::NoBpffs { path: pin_path.to_owned(), mount_point: "/sys/fs/bpf".into() })
}

fn has_dot(name: Option<&OsStr>) -> bool {
    name.is_some_and(|name| name.to_string_lossy().contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_before_5_10_is_refused_by_name() {
        for good in ["5.10.0", "5.15.0-91-generic", "6.1.0-42-amd64", "6.18.44", "10.0-rc1", "7.1"] {
            assert_eq!(kernel(good), Ok(()), "{good}");
        }
        for bad in ["5.9.16", "4.19.0-27-amd64\n", "5.4.0-1"] {
            let error = kernel(bad).unwrap_err();
            assert!(error.to_string().contains(bad.trim()), "{error}");
        }
    }

    #[test]
    fn each_missing_capability_is_named() {
        let status = |bits: &[u32]| {
            let mask = bits.iter().fold(0_u64, |mask, bit| mask | 1 << bit);
            format!("Name:\tproxier\nCapEff:\t{mask:016x}\n")
        };
        assert_eq!(capabilities(&status(&[12, 38, 39])), Ok(()));
        assert_eq!(capabilities(&status(&[12, 21])), Ok(()));
        assert_eq!(
            capabilities(&status(&[21])),
            Err(PreflightError::Capabilities { missing: "NET_ADMIN".into() })
        );
        assert_eq!(
            capabilities(&status(&[])),
            Err(PreflightError::Capabilities { missing: "BPF, PERFMON, NET_ADMIN".into() })
        );
    }

    #[test]
    fn a_directory_that_is_not_on_a_bpffs_is_refused_with_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let error = bpffs(&directory.path().join("not/there/yet")).unwrap_err();
        assert!(error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"), "{error}");
    }
}
