//! What the machine must have: which tools, from which package, what for; and how to get them. Without permission to
//! install (`--no-install`) it changes nothing and names the exact commands. The eBPF compiler is `toolchain`'s.

use std::{cell::Cell, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::process::{line_of, output, run, say, which};

/// A program that some command of xtask cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tool {
    /// The program's name in `PATH`.
    pub(crate) program: &'static str,
    /// Packages that have it, Debian's name first, then Ubuntu's where it differs.
    pub(crate) packages: &'static [&'static str],
    /// Why it is needed, as the rest of "xtask installs X: ...".
    pub(crate) purpose: &'static str,
}

pub(crate) const fn tool(
    program: &'static str,
    packages: &'static [&'static str],
    purpose: &'static str,
) -> Tool {
    Tool { program, packages, purpose }
}

/// What the lab (the tests in namespaces, and the demo) runs.
pub(crate) const LAB_TOOLS: &[Tool] = &[
    tool("ip", &["iproute2"], "network namespaces, veths, addresses and routes of the lab"),
    tool("bpftool", &["bpftool", "linux-tools-generic"], "shows the maps with the names of their fields"),
    tool("tcpdump", &["tcpdump"], "packets as the client and the pod see them"),
    tool("nft", &["nftables"], "netfilter rules next to proxier"),
    tool("iptables", &["iptables"], "the rules of an example's script"),
    tool("jq", &["jq"], "reads the lines of to-json in scripts of examples"),
    tool("ethtool", &["ethtool"], "checksum and segmentation offloads of the lab's interfaces"),
    tool("nsenter", &["util-linux"], "commands in a namespace of the lab"),
];

/// The machine, and whether xtask may change it.
#[derive(Debug)]
pub(crate) struct Environment {
    may_install: bool,
    lists_are_fresh: Cell<bool>,
}

impl Environment {
    /// `may_install`: missing packages are installed; otherwise their commands are printed and the command fails.
    pub(crate) fn new(may_install: bool) -> Self {
        Self { may_install, lists_are_fresh: Cell::new(false) }
    }

    /// Whether missing things may be installed.
    pub(crate) fn may_install(&self) -> bool {
        self.may_install
    }

    /// Makes sure that every one of `tools` is there.
    pub(crate) fn ensure_tools(&self, tools: &[Tool]) -> Result<()> {
        let absent = missing(tools, |program| which(program).is_some());
        if absent.is_empty() {
            return Ok(());
        }
        let list = absent
            .iter()
            .map(|tool| format!("{} ({})", tool.program, tool.purpose))
            .collect::<Vec<_>>()
            .join(", ");
        if which("apt-get").is_none() {
            bail!(
                "missing: {list}. Install them with this system's package manager, then run the command again"
            );
        }
        if !self.may_install {
            bail!(
                "missing: {list}. Run:\n  {}",
                install_commands(&packages(&absent, |_| true), is_root()).join("\n  ")
            );
        }
        self.refresh_lists()?;
        for tool in &absent {
            say(&format!("{} is missing and gets installed: {}", tool.program, tool.purpose));
        }
        self.install(&packages(&absent, |package| candidate(package).is_some()))?;
        let still = missing(&absent, |program| which(program).is_some());
        if !still.is_empty() {
            let names = still.iter().map(|tool| tool.program).collect::<Vec<_>>().join(", ");
            bail!("still missing after apt-get: {names}. Install them by hand, then run the command again");
        }
        Ok(())
    }

    /// Installs Debian packages. Callers say why beforehand.
    pub(crate) fn install(&self, packages: &[&str]) -> Result<()> {
        let commands = install_commands(packages, is_root());
        if !self.may_install {
            bail!("not installed: {}. Run:\n  {}", packages.join(" "), commands.join("\n  "));
        }
        self.refresh_lists()?;
        run(as_root("apt-get")?
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"))
        .with_context(|| format!("run by hand: {}", commands.join(" && ")))
    }

    /// A fresh machine has no package lists at all, and old lists name packages that are gone.
    pub(crate) fn refresh_lists(&self) -> Result<()> {
        if self.may_install && !self.lists_are_fresh.replace(true) {
            run(as_root("apt-get")?.args(["update", "-q"]))?;
        }
        Ok(())
    }

    /// Mounts the BPF file system where the agent pins its maps, if nobody has.
    pub(crate) fn ensure_bpf_file_system(&self) -> Result<()> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
        if has_bpf_file_system(&mounts) {
            return Ok(());
        }
        let mut mount = Command::new("mount");
        mount.args(["-t", "bpf", "bpf", BPF_FILE_SYSTEM]);
        if !self.may_install {
            bail!("no BPF file system at {BPF_FILE_SYSTEM}. Run:\n  {}", line_of(&mount));
        }
        say(&format!("mounting the BPF file system at {BPF_FILE_SYSTEM}: maps and links are pinned there"));
        run(&mut mount)
    }
}

const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";

fn has_bpf_file_system(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPF_FILE_SYSTEM) && fields.next() == Some("bpf")
    })
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// How to run `command` of xtask as root, keeping the user's Rust.
pub(crate) fn as_root_hint(command: &str) -> String {
    format!("sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask {command}")
}

fn as_root(program: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    // -n: a password prompt in the middle of a build would look like a hang.
    if which("sudo").is_some() && output(Command::new("sudo").args(["-n", "true"])).is_ok() {
        let mut command = Command::new("sudo");
        command.args(["-n", program]);
        return Ok(command);
    }
    bail!("`{program}` needs root, and sudo without a password is not set up here")
}

/// The version of a package that apt would install.
pub(crate) fn candidate(package: &str) -> Option<String> {
    candidate_in(&output(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C")).ok()?)
}

/// Whether `apt-get update` was ever run: without it nothing has a candidate.
pub(crate) fn has_package_lists() -> bool {
    std::fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

fn candidate_in(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn missing(tools: &[Tool], is_there: impl Fn(&str) -> bool) -> Vec<Tool> {
    tools.iter().copied().filter(|tool| !is_there(tool.program)).collect()
}

/// One package per tool, each once: the first that the distribution has, else the first of all, so that apt names it.
fn packages(tools: &[Tool], is_known: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut chosen = Vec::new();
    for tool in tools {
        let known = tool.packages.iter().copied().find(|package| is_known(package));
        if let Some(package) = known.or(tool.packages.first().copied())
            && !chosen.contains(&package)
        {
            chosen.push(package);
        }
    }
    chosen
}

/// What a person types to install `packages`.
pub(crate) fn install_commands(packages: &[&str], root: bool) -> Vec<String> {
    let prefix = if root { "" } else { "sudo " };
    vec![
        format!("{prefix}apt-get update"),
        format!("{prefix}apt-get install -y --no-install-recommends {}", packages.join(" ")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_OF_ONE: &[Tool] = &[
        tool("ip", &["iproute2"], "links"),
        tool("tc", &["iproute2"], "filters"),
        tool("bpftool", &["bpftool", "linux-tools-generic"], "maps"),
    ];

    #[test]
    fn only_what_is_missing_is_installed() {
        let absent = missing(TWO_OF_ONE, |program| program == "ip");
        assert_eq!(absent.iter().map(|tool| tool.program).collect::<Vec<_>>(), ["tc", "bpftool"]);
    }

    #[test]
    fn two_tools_of_one_package_install_it_once() {
        assert_eq!(packages(TWO_OF_ONE, |_| true), ["iproute2", "bpftool"]);
    }

    #[test]
    fn a_package_of_another_name_is_used_where_the_first_does_not_exist() {
        assert_eq!(packages(TWO_OF_ONE, |name| name != "bpftool"), ["iproute2", "linux-tools-generic"]);
        assert_eq!(packages(TWO_OF_ONE, |_| false), ["iproute2", "bpftool"]);
    }

    #[test]
    fn the_commands_printed_are_the_ones_to_type() {
        assert_eq!(
            install_commands(&["tcpdump", "nftables"], false),
            ["sudo apt-get update", "sudo apt-get install -y --no-install-recommends tcpdump nftables"]
        );
    }

    #[test]
    fn without_permission_nothing_is_installed_and_the_commands_are_named() {
        let environment = Environment::new(false);
        let error = environment.install(&["tcpdump"]).unwrap_err().to_string();
        assert!(error.contains("apt-get install -y --no-install-recommends tcpdump"), "{error}");
    }

    #[test]
    fn a_package_without_a_candidate_is_not_there() {
        assert_eq!(candidate_in("rustc-web:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate_in(""), None);
        assert_eq!(
            candidate_in("rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n").as_deref(),
            Some("1.96.0+dfsg1-1~deb12u2")
        );
    }

    #[test]
    fn only_a_bpf_file_system_at_the_right_place_counts() {
        assert!(has_bpf_file_system("proc /proc proc rw 0 0\nnone /sys/fs/bpf bpf rw,mode=700 0 0\n"));
        assert!(!has_bpf_file_system("none /sys/fs/bpf tmpfs rw 0 0\nnone /mnt bpf rw 0 0\n"));
    }
}
