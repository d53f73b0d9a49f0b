//! Directories of Kubernetes manifests for the agent to read, and the ways in which people and programs edit them.

use std::{
    fmt::Write as _,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// Copies the files in `from` to the new directory `to`, to be edited there.
///
/// # Errors
///
/// One cannot be read, the other not be written.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir(to).with_context(context)?;
    for entry in fs::read_dir(from).with_context(context)? {
        let entry = entry.with_context(context)?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).with_context(context)?;
        }
    }
    Ok(())
}

/// The manifests in this repository that the documentation and the demo use.
#[must_use]
pub fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples")
}

/// Replaces a file as a program should: written beside it, then renamed over it.
///
/// # Errors
///
/// As the file system says.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    fs::write(&beside, text)?;
    fs::rename(beside, path)
}

/// Edits a file as vim does: a swap file beside it, the old file moved to a backup, a new one in its place, and
/// the two others removed.
///
/// # Errors
///
/// As the file system says.
pub fn edit_as_vim_does(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let swap = path.with_file_name(format!(".{name}.swp"));
    let backup = path.with_file_name(format!("{name}~"));
    fs::write(&swap, b"b0VIM 9.0\0 not YAML: {{{")?;
    fs::rename(path, &backup)?;
    fs::write(path, text)?;
    fs::remove_file(&backup)?;
    fs::remove_file(&swap)
}

/// A directory as the kubelet mounts a ConfigMap: files are links through `..data` into a directory with a time in
/// its name, and an update moves one link.
#[derive(Debug)]
pub struct ConfigMap {
    directory: PathBuf,
    version: u32,
}

impl ConfigMap {
    /// Makes the volume in `directory`, which exists and is empty.
    ///
    /// # Errors
    ///
    /// As the file system says.
    pub fn mount(directory: &Path, files: &[(&str, &str)]) -> io::Result<Self> {
        let mut volume = Self { directory: directory.to_owned(), version: 0 };
        volume.update(files)?;
        for (name, _) in files {
            std::os::unix::fs::symlink(Path::new("..data").join(name), directory.join(name))?;
        }
        Ok(volume)
    }

    /// Swaps all files for new ones, at once.
    ///
    /// # Errors
    ///
    /// As the file system says.
    pub fn update(&mut self, files: &[(&str, &str)]) -> io::Result<()> {
        let old = format!("..2026_01_01_00_00_{:02}", self.version);
        self.version += 1;
        let new = format!("..2026_01_01_00_00_{:02}", self.version);
        fs::create_dir(self.directory.join(&new))?;
        for (name, text) in files {
            fs::write(self.directory.join(&new).join(name), text)?;
        }
        std::os::unix::fs::symlink(&new, self.directory.join("..data_tmp"))?;
        fs::rename(self.directory.join("..data_tmp"), self.directory.join("..data"))?;
        if self.version > 1 {
            fs::remove_dir_all(self.directory.join(old))?;
        }
        Ok(())
    }
}

/// A manifest of EndpointSlices without the endpoints of the pod called `pod`; everything else stays as it is,
/// comments included.
///
/// # Errors
///
/// The pod is not in it: an edit that changes nothing would prove nothing.
pub fn without_pod(slices: &str, pod: &str) -> anyhow::Result<String> {
    let mut kept = String::new();
    let mut endpoint = String::new();
    let mut removed = 0;
    let named = format!("name: {pod}");
    let mut finish = |endpoint: &mut String, kept: &mut String| {
        if endpoint.lines().any(|line| line.trim() == named) {
            removed += 1;
        } else {
            kept.push_str(endpoint);
        }
        endpoint.clear();
    };
    for line in slices.split_inclusive('\n') {
        let starts_endpoint = line.trim_start().starts_with("- addresses:");
        let continues = !endpoint.is_empty() && line.starts_with([' ', '\t']);
        if !continues {
            finish(&mut endpoint, &mut kept);
        }
        if starts_endpoint || continues {
            endpoint.push_str(line);
        } else {
            kept.push_str(line);
        }
    }
    finish(&mut endpoint, &mut kept);
    ensure!(removed > 0, "no endpoint of pod {pod} in this manifest");
    // A list whose last item went is null to YAML, which the API would not accept.
    Ok(kept)
}

/// A Service with `externals` as its external addresses, in the namespace `lab`.
#[must_use]
pub fn service(name: &str, externals: &[IpAddr]) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: lab\n  labels:\n    \
         service.kubernetes.io/service-proxy-name: proxier\nspec:\n  clusterIP: None\n  ports:\n  - port: 6000\n  \
         externalIPs:\n"
    );
    for external in externals {
        let _ = writeln!(text, "  - \"{external}\"");
    }
    text
}

/// EndpointSlices, one a family, with every one of `pods` on `node`.
#[must_use]
pub fn slices(service: &str, node: &str, pods: &[IpAddr]) -> String {
    let mut text = String::new();
    for (family, suffix) in [("IPv4", 4), ("IPv6", 6)] {
        let addresses: Vec<_> = pods.iter().filter(|address| address.is_ipv4() == (suffix == 4)).collect();
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-{suffix}\n  \
             namespace: lab\n  labels:\n    kubernetes.io/service-name: {service}\n    \
             service.kubernetes.io/service-proxy-name: proxier\naddressType: {family}\nports: []\n"
        );
        text.push_str(if addresses.is_empty() { "endpoints: []\n" } else { "endpoints:\n" });
        for address in addresses {
            let _ = writeln!(
                text,
                "- addresses: [\"{address}\"]\n  conditions: {{ready: true}}\n  nodeName: {node}"
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_endpoints_of_one_pod_go() {
        let text = fs::read_to_string(examples().join("endpointslices.yaml")).unwrap();
        let edited = without_pod(&text, "alpine-1").unwrap();
        for gone in ["alpine-1", "11.0.2.2\n", "1100::202"] {
            assert!(text.contains(gone) && !edited.contains(gone), "{gone}");
        }
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&text).len() - lines(&edited).len(), 2 * 11);
        for kept in ["11.0.2.3", "1100::203", "11.0.1.2", "1100::102", "addressType: IPv6"] {
            assert!(edited.contains(kept), "{kept}");
        }
        without_pod(&edited, "alpine-1").unwrap_err();
    }

    #[test]
    fn a_config_map_changes_all_files_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut volume = ConfigMap::mount(directory.path(), &[("a.yaml", "1"), ("b.yaml", "2")]).unwrap();
        volume.update(&[("a.yaml", "3"), ("b.yaml", "4")]).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("a.yaml")).unwrap(), "3");
        assert_eq!(fs::read_to_string(directory.path().join("b.yaml")).unwrap(), "4");
    }
}
