//! Which ways from a client to a pod are measured, and what each is called.

use std::{fmt, path::Path, process::Command};

use anyhow::{Context as _, bail, ensure};
use proxier_common::{DIRECT_DELIVERY_SINCE, is_linux_since};
use serde::{Deserialize, Serialize};

/// A way from a client to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One link and no node: the limit.
    Wire,
    /// The node forwards to the pod's own address: what all others are compared with.
    Route,
    /// The same in a second lab: how far two equal arms are apart is what a difference has to exceed.
    RouteAgain,
    /// The same on a node that tracks connections, as one with kube-proxy does.
    RouteTracked,
    /// netfilter, one rule of iptables.
    Iptables,
    /// netfilter, one rule of nftables with a map.
    Nft,
    /// nftables rewriting payloads, without connection tracking.
    NftStateless,
    /// netfilter as kube-proxy sets it up for 10,000 Services.
    #[serde(rename = "iptables-10k")]
    Iptables10k,
    /// proxier, delivering by the node's stack.
    ProxierStack,
    /// proxier, delivering past the node's stack.
    ProxierDirect,
    /// proxier, with requests taken by XDP.
    ProxierXdp,
}

impl Kind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 11] = [
        Self::Wire,
        Self::Route,
        Self::RouteAgain,
        Self::RouteTracked,
        Self::Iptables,
        Self::Nft,
        Self::NftStateless,
        Self::Iptables10k,
        Self::ProxierStack,
        Self::ProxierDirect,
        Self::ProxierXdp,
    ];

    /// What tables and the command line call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Route => "route",
            Self::RouteAgain => "route-again",
            Self::RouteTracked => "route-tracked",
            Self::Iptables => "iptables",
            Self::Nft => "nft",
            Self::NftStateless => "nft-stateless",
            Self::Iptables10k => "iptables-10k",
            Self::ProxierStack => "proxier-stack",
            Self::ProxierDirect => "proxier-direct",
            Self::ProxierXdp => "proxier-xdp",
        }
    }

    /// What it is, in a line.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::Wire => "client and pod on one veth, no node between them",
            Self::Route => "the node forwards to the pod's own address, nothing is rewritten",
            Self::RouteAgain => "route in a second lab: the difference is noise",
            Self::RouteTracked => "route on a node with connection tracking",
            Self::Iptables => "one DNAT rule of iptables, connection tracking",
            Self::Nft => "one DNAT rule of nftables with a map, connection tracking",
            Self::NftStateless => "nftables maps rewriting both directions, no connection tracking",
            Self::Iptables10k => "kube-proxy's chains for 10,000 Services, the one measured is the last",
            Self::ProxierStack => "the agent, delivery by the node's stack",
            Self::ProxierDirect => "the agent, delivery past the node's stack",
            Self::ProxierXdp => "the agent, requests taken by XDP",
        }
    }

    /// Whether it keeps external addresses in a table whose size may matter.
    #[must_use]
    pub const fn has_table(self) -> bool {
        matches!(self, Self::Nft | Self::NftStateless) || self.is_proxier()
    }

    /// Whether the agent does it.
    #[must_use]
    pub const fn is_proxier(self) -> bool {
        self.flag().is_some()
    }

    /// The agent's flag for it, which older agents do not have. Delivery by the stack needs none.
    #[must_use]
    pub const fn flag(self) -> Option<&'static [&'static str]> {
        match self {
            Self::ProxierStack => Some(&[]),
            Self::ProxierDirect => Some(&["--delivery", "direct"]),
            Self::ProxierXdp => Some(&["--ingress", "xdp"]),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A way, with so many external addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arm {
    /// Which way.
    pub kind: Kind,
    /// How many external addresses there are; traffic is for the last of them.
    pub addresses: u32,
}

impl fmt::Display for Arm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.kind)?;
        match self.addresses {
            1 => Ok(()),
            many if many.is_multiple_of(1_000) => write!(formatter, "@{}k", many / 1_000),
            many => write!(formatter, "@{many}"),
        }
    }
}

/// What an agent can do on this machine.
#[derive(Clone, Debug)]
pub struct Capabilities {
    help: String,
    /// Whether the kernel takes programs that deliver past its stack.
    direct_delivery: bool,
}

impl Capabilities {
    /// Asks the agent at `binary`.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn of(binary: &Path) -> anyhow::Result<Self> {
        let output = Command::new(binary)
            .args(["file", "to-bpf", "--help"])
            .output()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        ensure!(output.status.success(), "{} does not know `file to-bpf --help`", binary.display());
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Self { help, direct_delivery: is_linux_since(DIRECT_DELIVERY_SINCE) })
    }

    /// Why there is no such arm, if there is none.
    fn lack(&self, kind: Kind) -> Option<String> {
        let [flag, ..] = kind.flag()? else { return None };
        if !self.help.split_whitespace().any(|word| word == *flag) {
            return Some(format!("this agent has no {flag}"));
        }
        // The agent would deliver by the stack.
        let (major, minor) = DIRECT_DELIVERY_SINCE;
        (kind == Kind::ProxierDirect && !self.direct_delivery).then(|| {
            format!("this kernel is older than Linux {major}.{minor}, the first with direct delivery")
        })
    }
}

/// The arms of these kinds (all, if none is given) with these numbers of addresses, and of what is left out, why.
///
/// # Errors
///
/// One of the kinds given cannot be measured on this machine.
pub fn plan(
    kinds: &[Kind],
    addresses: &[u32],
    agent: &Capabilities,
) -> anyhow::Result<(Vec<Arm>, Vec<String>)> {
    let mut arms = Vec::new();
    let mut left_out = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|kind| kinds.is_empty() || kinds.contains(kind)) {
        if let Some(reason) = agent.lack(kind) {
            if !kinds.is_empty() {
                bail!("the arm {kind} cannot be measured here: {reason}; leave it out of --arms");
            }
            left_out.push(format!("{kind}: {reason}"));
            continue;
        }
        let sizes: &[u32] = if kind.has_table() { addresses } else { &[1] };
        arms.extend(sizes.iter().map(|addresses| Arm { kind, addresses: *addresses }));
    }
    Ok((arms, left_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(help: &str) -> Capabilities {
        Capabilities { help: help.to_owned(), direct_delivery: true }
    }

    fn names(arms: &[Arm]) -> Vec<String> {
        arms.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_the_agent_cannot_do_is_left_out_with_the_reason() {
        let (arms, left_out) =
            plan(&[], &[1], &agent("--uplink <INTERFACE>\n --ingress <INGRESS>\n")).unwrap();
        let expected = [
            "wire",
            "route",
            "route-again",
            "route-tracked",
            "iptables",
            "nft",
            "nft-stateless",
            "iptables-10k",
            "proxier-stack",
            "proxier-xdp",
        ];
        assert_eq!(names(&arms), expected);
        assert_eq!(left_out, ["proxier-direct: this agent has no --delivery"]);
        let agent = Capabilities { direct_delivery: false, ..agent("--delivery --ingress") };
        let (_, left_out) = plan(&[], &[1], &agent).unwrap();
        assert_eq!(
            left_out,
            ["proxier-direct: this kernel is older than Linux 6.4, the first with direct delivery"]
        );
    }

    #[test]
    fn an_arm_that_was_asked_for_by_name_is_not_left_out_in_silence() {
        let error = plan(&[Kind::Route, Kind::ProxierXdp], &[1], &agent("--delivery")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the arm proxier-xdp cannot be measured here: this agent has no --ingress; leave it out of --arms"
        );
    }

    #[test]
    fn only_tables_come_in_several_sizes() {
        let kinds = [Kind::Route, Kind::Nft, Kind::ProxierStack];
        let (arms, _) = plan(&kinds, &[1, 100_000, 1_500], &agent("")).unwrap();
        let expected = [
            "route",
            "nft",
            "nft@100k",
            "nft@1500",
            "proxier-stack",
            "proxier-stack@100k",
            "proxier-stack@1500",
        ];
        assert_eq!(names(&arms), expected);
    }

    #[test]
    fn names_on_the_command_line_are_those_of_the_plan() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
