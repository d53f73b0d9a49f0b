//! The matrix: every kind of client, in every way that packets come, in both families, to a Service of one pod and of
//! several, with pods connected in either way. This module has the axes and the table, [`ground`] the lab that cells are
//! tried in, [`checks`] what is tried in a cell, and [`watch`] what must hold in all of them.

pub mod checks;
pub mod ground;
pub mod watch;

use std::{collections::BTreeMap, fmt, net::IpAddr};

use crate::topology::PodNetwork;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Client {
    /// A host beyond a router.
    Outside,
    /// A program on the node, in the node's own network namespace.
    Node,
    /// A pod of the node that is none of the Service's.
    OtherPod,
    /// The pod that will answer.
    OwnPod,
}

impl Client {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Outside, Self::Node, Self::OtherPod, Self::OwnPod];
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Outside => "outside",
            Self::Node => "node",
            Self::OtherPod => "other pod",
            Self::OwnPod => "own pod",
        })
    }
}

/// The family of all addresses in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The address of this family among `addresses`, which has one of each.
    #[must_use]
    pub const fn of(self, [v4, v6]: [IpAddr; 2]) -> IpAddr {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How many pods the Service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pods {
    /// One.
    One,
    /// More than one.
    Several,
}

impl Pods {
    /// Both.
    pub const ALL: [Self; 2] = [Self::One, Self::Several];
}

impl fmt::Display for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::One => "one pod",
            Self::Several => "several pods",
        })
    }
}

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// A connection, and a transfer whose large segments and unfinished checksums stay what they are.
    Tcp,
    /// UDP and UDP-Lite; who stays on which pod, and that not all are on one.
    Udp,
    /// SCTP and DCCP: ports, and a checksum that is not the kernel's.
    Sctp,
    /// Echo.
    Icmp,
    /// GRE and ESP: no ports.
    Gre,
    /// Datagrams larger than any link, by the kernels of both sides, and requests with their last fragment first.
    Fragments,
    /// "Port unreachable" in both directions.
    Errors,
    /// Path-MTU discovery: a large transfer and large datagrams over ways that are narrower than the sender knows.
    Pmtu,
}

impl Check {
    /// Every one. Path-MTU discovery is last: it needs ways that are narrow, and hosts remember.
    pub const ALL: [Self; 8] =
        [Self::Tcp, Self::Udp, Self::Sctp, Self::Icmp, Self::Gre, Self::Fragments, Self::Errors, Self::Pmtu];
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
            Self::Gre => "GRE",
            Self::Fragments => "fragments",
            Self::Errors => "errors",
            Self::Pmtu => "PMTU",
        })
    }
}

/// A cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// Who asks.
    pub client: Client,
    /// Whether pods are on a bridge. ([`PodNetwork`] has no order.)
    pub bridge: bool,
    /// In which family.
    pub family: Family,
    /// Whom: a Service of how many pods.
    pub pods: Pods,
    /// What.
    pub check: Check,
}

impl Cell {
    /// All cells with pods connected in this way.
    pub fn all(pod_network: PodNetwork) -> impl Iterator<Item = Self> {
        let bridge = pod_network == PodNetwork::Bridge;
        let rows = Client::ALL.into_iter().flat_map(|client| {
            Pods::ALL.into_iter().flat_map(move |pods| Family::ALL.map(|family| (client, pods, family)))
        });
        rows.flat_map(move |(client, pods, family)| {
            Check::ALL.map(|check| Self { client, bridge, family, pods, check })
        })
    }

    /// Why there is nothing to try in this cell. None: there is.
    #[must_use]
    pub const fn has_no_meaning(&self) -> Option<&'static str> {
        match (self.client, self.check) {
            (Client::OwnPod, Check::Pmtu) => {
                Some("a pod's packet to itself goes back by the link that it came by: nothing is narrower")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, family, pods, check, .. } = self;
        write!(f, "{check} {client} {} {family} {pods}", network(self.bridge))
    }
}

const fn network(bridge: bool) -> &'static str {
    if bridge { "bridge" } else { "veth" }
}

/// What came of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All that must hold does.
    Passed,
    /// Something does not.
    Failed(String),
    /// There is nothing to try, for this reason.
    NoMeaning(&'static str),
}

/// The matrix as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Table {
    cells: BTreeMap<Cell, Outcome>,
}

impl Table {
    /// Enters what came of a cell. One that was tried before has passed only if it has each time.
    pub fn enter(&mut self, cell: Cell, outcome: Outcome) {
        let known = self.cells.entry(cell).or_insert_with(|| outcome.clone());
        if *known == Outcome::Passed {
            *known = outcome;
        }
    }

    /// Enters all that another table knows.
    pub fn extend(&mut self, other: Self) {
        for (cell, outcome) in other.cells {
            self.enter(cell, outcome);
        }
    }

    /// How many cells it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The cells that failed, as sentences.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let failures = self.cells.iter().filter_map(|(cell, outcome)| match outcome {
            Outcome::Failed(reason) => Some(format!("{cell}: {reason}")),
            _ => None,
        });
        failures.collect()
    }

    /// The table for people: a line for each client, network and family; in each column the Service of one pod, then that
    /// of several.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let count =
            |wanted: fn(&Outcome) -> bool| self.cells.values().filter(|outcome| wanted(outcome)).count();
        let mut lines = vec![format!(
            "{} cells: {} passed, {} failed, {} without meaning (-)",
            self.cells.len(),
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::NoMeaning(_))),
        )];
        let heads = Check::ALL.map(|check| format!("{check:<9}"));
        lines.push(format!("{:24}{}", "", heads.join(" ").trim_end()));
        let mut rows: Vec<(Client, bool, Family)> =
            self.cells.keys().map(|cell| (cell.client, cell.bridge, cell.family)).collect();
        rows.dedup();
        for (client, bridge, family) in rows {
            let marks = Check::ALL.map(|check| {
                let marks = Pods::ALL.map(|pods| self.mark(&Cell { client, bridge, family, pods, check }));
                format!("{:<9}", marks.join(" "))
            });
            lines.push(format!(
                "{client:<10}{:<8}{family:<6}{}",
                network(bridge),
                marks.join(" ").trim_end()
            ));
        }
        let mut reasons: Vec<String> = self
            .cells
            .iter()
            .filter_map(|(cell, outcome)| match outcome {
                Outcome::NoMeaning(reason) => Some(format!("- {} {}: {reason}", cell.client, cell.check)),
                _ => None,
            })
            .collect();
        reasons.dedup();
        lines.extend(reasons);
        lines
    }

    fn mark(&self, cell: &Cell) -> &'static str {
        match self.cells.get(cell) {
            Some(Outcome::Passed) => "ok",
            Some(Outcome::Failed(_)) => "FAIL",
            Some(Outcome::NoMeaning(_)) => "-",
            None => "?",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_passes_only_if_it_does_each_time() {
        let failed = Outcome::Failed("no answer".to_owned());
        for outcomes in [[Outcome::Passed, failed.clone()], [failed, Outcome::Passed]] {
            let cell = Cell::all(PodNetwork::Bridge).next().unwrap();
            let mut table = Table::default();
            for outcome in outcomes {
                let mut other = Table::default();
                other.enter(cell, outcome);
                table.extend(other);
            }
            assert_eq!(table.failures().len(), 1);
        }
    }

    #[test]
    fn the_table_has_a_mark_for_every_cell() {
        let mut table = Table::default();
        for cell in Cell::all(PodNetwork::Bridge).chain(Cell::all(PodNetwork::PointToPoint)) {
            let outcome = match cell.has_no_meaning() {
                Some(reason) => Outcome::NoMeaning(reason),
                None if cell.check == Check::Gre && cell.client == Client::Node => {
                    Outcome::Failed("no answer".to_owned())
                }
                None => Outcome::Passed,
            };
            table.enter(cell, outcome);
        }
        let lines = table.lines();
        assert_eq!(lines[0], "256 cells: 240 passed, 8 failed, 8 without meaning (-)");
        assert_eq!(lines[1].split_whitespace().count(), Check::ALL.len());
        assert_eq!(lines.len(), 2 + 16 + 1, "{lines:#?}");
        for line in &lines[2..18] {
            let marks = line.split_whitespace().filter(|word| ["ok", "FAIL", "-"].contains(word)).count();
            assert_eq!(marks, 2 * Check::ALL.len(), "{line}");
        }
        assert_eq!(table.failures().len(), 8);
        assert_eq!(table.failures()[0], "GRE node veth IPv4 one pod: no answer");
    }
}
