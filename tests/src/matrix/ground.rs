//! The lab that the cells are tried in: one for each way of connecting pods, with a Service of one pod and a Service of
//! several, a pod that belongs to neither, and a router before the client.

use std::{
    cell::Cell as Counter,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, bail};

use super::{Cell, Client, Family, Outcome, Pods, Table, checks};
use crate::{
    exchange::{PATIENCE, Protocol, Question},
    host::Host,
    manifests,
    responder::Sighting,
    scenario::{Scenario, externals},
    topology::{Lab, LabSpec, NODE_NAME, Pod, PodNetwork},
};

const SEVERAL: &str = "several";
/// Few enough to be quick, and enough that hardly any rule of choosing would put all on one pod.
const CLIENTS: u8 = 16;
/// A port that pods listen on and no Service names.
pub(super) const PORT: u16 = 5060;

/// The lab, and what the next packets may use.
#[derive(Debug)]
pub struct Ground {
    scenario: Scenario,
    pod_network: PodNetwork,
    offloads: bool,
    /// Every exchange has a source port of its own: what one did to tables is no help for the next.
    next_port: Counter<u16>,
}

/// Who asks whom in a cell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case<'a> {
    pub(super) ground: &'a Ground,
    pub(super) kind: Client,
    pub(super) pods: Pods,
    pub(super) family: Family,
    pub(super) client: &'a Host,
    pub(super) external: IpAddr,
    /// The pod that the client is on.
    pub(super) pod: &'a Host,
}

impl Ground {
    /// Builds it. With offloads packets keep their checksums unfinished and segments large, as on users' nodes; without
    /// them every checksum is there from the start.
    #[must_use]
    pub fn new(pod_network: PodNetwork, offloads: bool) -> Self {
        Self::with(pod_network, offloads, &[])
    }

    /// As [`Self::new`], with an agent that has more `arguments` of `to-bpf`.
    #[must_use]
    pub fn with(pod_network: PodNetwork, offloads: bool, arguments: &[&str]) -> Self {
        let spec =
            LabSpec::unique().with_pods(4).with_clients(CLIENTS).with_pod_network(pod_network).with_router();
        let spec = if offloads { spec } else { spec.without_offloads() };
        let mut scenario = Scenario::prepare(&spec, arguments);
        let [one, several @ .., _neither] = &scenario.lab.pods[..] else { unreachable!("four pods") };
        scenario.write_pods(&one.host.addresses);
        let several: Vec<IpAddr> = several.iter().flat_map(|pod| pod.host.addresses.clone()).collect();
        scenario.write("several.yaml", &manifests::service(SEVERAL, &all_externals_of_several()));
        scenario.write("several-slices.yaml", &manifests::slices(SEVERAL, NODE_NAME, &several));
        scenario.start_agent();
        Self { scenario, pod_network, offloads, next_port: Counter::new(20_000) }
    }

    /// Tries every cell with pods connected in this way.
    ///
    /// # Errors
    ///
    /// The lab itself is broken; what proxier does wrong is in the table.
    pub fn try_all(&self) -> anyhow::Result<Table> {
        self.try_clients(&Client::ALL)
    }

    /// As [`Self::try_all`], the cells of these clients.
    ///
    /// # Errors
    ///
    /// As [`Self::try_all`].
    pub fn try_clients(&self, clients: &[Client]) -> anyhow::Result<Table> {
        let mut table = Table::default();
        let (narrow, wide): (Vec<Cell>, Vec<Cell>) = Cell::all(self.pod_network)
            .filter(|cell| clients.contains(&cell.client))
            .partition(|cell| cell.check == super::Check::Pmtu);
        for cell in wide {
            table.enter(cell, self.try_cell(&cell));
        }
        let lab = self.lab();
        lab.narrow_way_to_client()?;
        let servers: Vec<&str> = lab.pods[..3].iter().map(|pod| pod.host.name.as_str()).collect();
        lab.narrow_ways_to_pods(&servers)?;
        for cell in narrow {
            table.enter(cell, self.try_cell(&cell));
        }
        Ok(table)
    }

    fn try_cell(&self, cell: &Cell) -> Outcome {
        if let Some(reason) = cell.has_no_meaning() {
            return Outcome::NoMeaning(reason);
        }
        let tried = self.case(cell).and_then(|case| checks::check(cell.check, &case));
        match tried {
            Ok(()) => Outcome::Passed,
            Err(error) if self.offloads => Outcome::Failed(format!("{error:#}")),
            Err(error) => Outcome::Failed(format!("without offloads: {error:#}")),
        }
    }

    /// The lab and its agent.
    #[must_use]
    pub const fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    pub(super) fn lab(&self) -> &Lab {
        &self.scenario.lab
    }

    /// Whether it is one with offloads.
    pub(super) const fn has_offloads(&self) -> bool {
        self.offloads
    }

    pub(super) fn next_port(&self) -> u16 {
        self.next_port.replace(self.next_port.get() + 1)
    }

    /// The Service's pods.
    pub(super) fn servers(&self, pods: Pods) -> &[Pod] {
        match pods {
            Pods::One => &self.lab().pods[..1],
            Pods::Several => &self.lab().pods[1..3],
        }
    }

    /// The Service's external addresses of a family.
    pub(super) fn externals(pods: Pods, family: Family) -> Vec<IpAddr> {
        match pods {
            Pods::One => vec![family.of(externals())],
            Pods::Several => externals_of_several().map(|pair| family.of(pair)).collect(),
        }
    }

    fn case(&self, cell: &Cell) -> anyhow::Result<Case<'_>> {
        let lab = self.lab();
        let client = match cell.client {
            Client::Outside => &lab.client,
            Client::Node => &lab.node,
            Client::OtherPod => &lab.pods[3].host,
            Client::OwnPod => &self.servers(cell.pods)[0].host,
        };
        let mut others = Vec::new();
        for external in Self::externals(cell.pods, cell.family) {
            let name = self.who(client, client.address(external), external)?.host;
            let pod = &lab.pods.iter().find(|pod| pod.host.name == name).context("no pod of the lab")?.host;
            // A pod that is one of several is its own for some of the Service's addresses, but not for all.
            if cell.client != Client::OwnPod || pod.name == client.name {
                let Cell { client: kind, pods, family, .. } = *cell;
                return Ok(Case { ground: self, kind, pods, family, client, external, pod });
            }
            others.push(pod.name.clone());
        }
        bail!("{} is never answered by itself, but by {others:?}", client.name)
    }

    /// Which pod answers.
    pub(super) fn who(&self, client: &Host, from: IpAddr, to: IpAddr) -> anyhow::Result<Sighting> {
        let question = Question {
            protocol: Protocol::Udp,
            from: SocketAddr::new(from, self.next_port()),
            to: SocketAddr::new(to, PORT),
            timeout: PATIENCE,
        };
        let answer = question.ask_who(client)?;
        answer.map_err(anyhow::Error::msg).with_context(|| format!("{question:?}"))
    }
}

fn externals_of_several() -> impl Iterator<Item = [IpAddr; 2]> {
    (0..CLIENTS).map(|index| {
        let v6 = [0x1000, 0, 0, 0, 0, 0, 0, 0x100 + u16::from(index)];
        [IpAddr::from([10, 0, 0, 100 + index]), IpAddr::from(v6)]
    })
}

fn all_externals_of_several() -> Vec<IpAddr> {
    externals_of_several().flatten().collect()
}
