//! What each version of proxier has pinned below `<pin-path>/v<SCHEMA>/`: found, detached and removed, without knowing its
//! ABI. Not for adopting it: maps of another ABI say nothing to this version.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use proxier_common::SCHEMA;

use super::{attach, xdp};

/// The pins of one version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    schema: u32,
    directory: PathBuf,
}

/// The name of a version's directory below the pin path.
pub(super) fn name(schema: u32) -> String {
    format!("v{schema}")
}

/// Every version that has something below `pin_path`.
///
/// # Errors
///
/// The directory cannot be read.
pub(super) fn all(pin_path: &Path) -> anyhow::Result<Vec<Version>> {
    let mut versions = Vec::new();
    for (directory, is_directory) in entries(pin_path)? {
        let file_name = file_name(&directory);
        let schema = file_name.and_then(|file_name| file_name.strip_prefix('v')?.parse().ok());
        // One way to write a number only: `v02` is somebody else's.
        if let Some(schema) = schema.filter(|schema| file_name == Some(&name(*schema)))
            && is_directory
        {
            versions.push(Version { schema, directory });
        }
    }
    versions.sort_unstable();
    Ok(versions)
}

/// Every version but this one that has something below `pin_path`; none if that cannot be told.
pub(super) fn others(pin_path: &Path) -> Vec<Version> {
    let versions = all(pin_path).unwrap_or_default();
    versions.into_iter().filter(|version| version.schema != SCHEMA).collect()
}

impl Version {
    /// As its directory is called.
    pub(super) fn name(&self) -> String {
        name(self.schema)
    }

    /// Where its pins are.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether it has a program at XDP of an interface.
    pub(super) fn is_at_xdp(&self) -> bool {
        let links = entries(&self.directory.join(attach::LINKS)).unwrap_or_default();
        links.iter().any(|(pin, _)| is_of_xdp(pin))
    }

    /// Removes the pins of its links, which detaches its programs. Returns what was removed, a line each.
    ///
    /// Those for requests go first, XDP's before tc's, which knows what XDP has marked: what one of them has let in at the last
    /// moment still finds the program that rewrites the reply. The other way round, the reply would leave with the pod's address.
    ///
    /// # Errors
    ///
    /// Which pin stays, and why.
    pub(super) fn detach(&self) -> anyhow::Result<Vec<String>> {
        let mut links = entries(&self.directory.join(attach::LINKS))?;
        let is_of_requests =
            |pin: &Path| file_name(pin).is_some_and(|name| name.starts_with(attach::REQUEST_PREFIX));
        links.sort_by_key(|(pin, _)| (!is_of_xdp(pin), !is_of_requests(pin)));
        links.iter().map(|(pin, _)| remove_file("link", pin)).collect()
    }

    /// Removes everything else of it. Returns what was removed, a line each.
    ///
    /// # Errors
    ///
    /// What stays, and why.
    pub(super) fn remove(&self) -> anyhow::Result<Vec<String>> {
        let mut removed = Vec::new();
        remove_directory(&self.directory, &mut removed)?;
        Ok(removed)
    }
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name().and_then(|name| name.to_str())
}

/// Whether a pin is of a link at XDP.
fn is_of_xdp(pin: &Path) -> bool {
    file_name(pin).and_then(xdp::index_of_pin).is_some()
}

fn remove_directory(directory: &Path, removed: &mut Vec<String>) -> anyhow::Result<()> {
    for (path, is_directory) in entries(directory)? {
        if is_directory {
            remove_directory(&path, removed)?;
        } else {
            removed.push(remove_file("map", &path)?);
        }
    }
    fs::remove_dir(directory).with_context(|| format!("{} cannot be removed", directory.display()))?;
    removed.push(format!("directory {}", directory.display()));
    Ok(())
}

fn remove_file(kind: &str, pin: &Path) -> anyhow::Result<String> {
    fs::remove_file(pin).with_context(|| format!("{} cannot be removed", pin.display()))?;
    Ok(format!("{kind} {}", pin.display()))
}

/// What is in a directory, by name, and whether it is a directory. Nothing if there is no such directory.
fn entries(directory: &Path) -> anyhow::Result<Vec<(PathBuf, bool)>> {
    let read = || -> io::Result<Vec<(PathBuf, bool)>> {
        fs::read_dir(directory)?
            .map(|entry| {
                let entry = entry?;
                Ok((entry.path(), entry.file_type()?.is_dir()))
            })
            .collect()
    };
    match read() {
        Ok(mut entries) => {
            entries.sort_unstable();
            Ok(entries)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", directory.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(pin_path: &Path, files: &[&str]) {
        for file in files {
            let path = pin_path.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
    }

    #[test]
    fn other_versions_are_those_whose_directory_is_called_so() {
        let work = tempfile::tempdir().unwrap();
        let ours = format!("{}/services", name(SCHEMA));
        make(
            work.path(),
            &[&ours, "v1/services", "v10/links/reply-2", "v01/x", "v+1/x", "vx/x", "w1/x", "v7"],
        );
        std::os::unix::fs::symlink(work.path().join("w1"), work.path().join("v8")).unwrap();
        let names: Vec<_> = others(work.path()).iter().map(Version::name).collect();
        assert_eq!(names, ["v1", "v10"]);
        assert_eq!(all(work.path()).unwrap().len(), 3);
        assert_eq!(all(&work.path().join("missing")).unwrap(), []);
    }

    #[test]
    fn what_lets_requests_in_goes_first_and_nothing_is_left() {
        let work = tempfile::tempdir().unwrap();
        let pins = ["reply-2", "request-2", "request-3", "request-xdp-native-3"]
            .map(|link| format!("v1/links/{link}"));
        make(work.path(), &pins.each_ref().map(String::as_str));
        make(work.path(), &["v1/services"]);
        let version = others(work.path()).remove(0);
        assert!(version.is_at_xdp());
        let names = |lines: Vec<String>| -> Vec<String> {
            lines.iter().map(|line| line.replace(&format!("{}/", work.path().display()), "")).collect()
        };
        let detached = names(version.detach().unwrap());
        let first = ["request-xdp-native-3", "request-2", "request-3", "reply-2"];
        assert_eq!(detached, first.map(|link| format!("link v1/links/{link}")));
        assert!(!version.is_at_xdp());
        let removed = names(version.remove().unwrap());
        assert_eq!(removed, ["directory v1/links", "map v1/services", "directory v1"]);
        assert_eq!(others(work.path()), []);
    }

    #[test]
    fn what_cannot_be_removed_is_named() {
        let work = tempfile::tempdir().unwrap();
        make(work.path(), &["v1/links/request-2/unexpected"]);
        let error = format!("{:#}", others(work.path())[0].detach().unwrap_err());
        assert!(error.contains("v1/links/request-2 cannot be removed"), "{error}");
    }
}
