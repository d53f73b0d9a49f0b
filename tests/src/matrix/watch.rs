//! What must hold in every cell, whatever is tried: one pod saw the client, the client saw the external address and no
//! other, nothing left the node unrewritten, and every checksum was right on both sides.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};

use super::{Client, ground::Case};
use crate::{
    capture::{Capture, Direction, Frame},
    host::Host,
    packets::{Packet, protocol},
};

/// More than this no link of the lab carries in one packet.
const ETHERNET_MTU: usize = 1500;

/// Sees all that a cell's exchanges cause.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    case: Case<'a>,
    at_client: Capture,
    at_uplink: Capture,
    at_pods: Vec<(&'a Host, Capture)>,
}

impl<'a> Watch<'a> {
    /// Starts to watch the client, all pods and the node's uplink.
    pub(super) fn start(case: &Case<'a>) -> anyhow::Result<Self> {
        let lab = case.ground.lab();
        let pods = lab.pods.iter().map(|pod| &pod.host);
        // A client's own interface shows answers, which nobody should take for questions to it.
        let others = pods.filter(|pod| case.kind == Client::OwnPod || pod.name != case.client.name);
        Ok(Self {
            case: *case,
            at_client: case.client.capture()?,
            at_uplink: lab.node.capture()?,
            at_pods: others.map(|pod| Ok((pod, pod.capture()?))).collect::<anyhow::Result<_>>()?,
        })
    }

    /// What reached the client so far.
    pub(super) fn client_saw(&self) -> Vec<Packet> {
        self.at_client.packets(Direction::In)
    }

    /// What reached the client's pod so far.
    pub(super) fn pod_saw(&self) -> anyhow::Result<Vec<Packet>> {
        Ok(self.at_pod()?.packets(Direction::In))
    }

    /// Both sides got segments larger than any link carries, with checksums left to the hardware, as without proxier: it
    /// neither cut them nor filled them in.
    ///
    /// # Errors
    ///
    /// One of them did not.
    pub(super) fn offloads_stayed_on(&self) -> anyhow::Result<()> {
        for (side, capture) in [("pod", self.at_pod()?), ("client", &self.at_client)] {
            let whole = |frame: &Frame| {
                let is_large = frame.packet.as_ref().is_some_and(|packet| {
                    packet.protocol == protocol::TCP && packet.payload.len() > ETHERNET_MTU
                });
                frame.direction == Direction::In && is_large && !frame.checksum_is_complete
            };
            ensure!(capture.frames().iter().any(whole), "no large segment reached the {side} as it was sent");
        }
        Ok(())
    }

    fn at_pod(&self) -> anyhow::Result<&Capture> {
        let own = self.at_pods.iter().find(|(pod, _)| pod.name == self.case.pod.name);
        Ok(&own.context("the client's pod is not watched")?.1)
    }

    /// Judges what was seen.
    ///
    /// # Errors
    ///
    /// Something does not hold.
    pub(super) fn finish(self, protocols: &[u8]) -> anyhow::Result<()> {
        self.one_pod_saw_the_client(protocols)?;
        self.errors_at_the_pod_name_the_pod()?;
        self.the_client_saw_the_external_address_only()?;
        let left = self.at_uplink.packets(Direction::Out);
        if let Some(packet) = left.iter().find(|packet| packet.destination == self.case.external) {
            bail!("it left the node as it was: {packet}");
        }
        let captures = self.at_pods.iter().map(|(_, capture)| capture);
        let wrong: Vec<String> =
            captures.chain([&self.at_client, &self.at_uplink]).flat_map(Capture::wrong_checksums).collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    }

    fn one_pod_saw_the_client(&self, protocols: &[u8]) -> anyhow::Result<()> {
        let Case { pod, external, .. } = self.case;
        let peer = self.case.client_as_pods_see_it();
        for protocol in protocols {
            let saw = |capture: &Capture| -> Vec<Packet> {
                let packets = capture.packets(Direction::In).into_iter();
                packets.filter(|packet| packet.protocol == *protocol && packet.source == peer).collect()
            };
            let seen: Vec<(&str, Vec<Packet>)> = self
                .at_pods
                .iter()
                .map(|(pod, capture)| (pod.name.as_str(), saw(capture)))
                .filter(|(_, packets)| !packets.is_empty())
                .collect();
            match &seen[..] {
                [(name, packets)] if *name == pod.name => {
                    let foreign = packets.iter().find(|packet| packet.destination != pod.address(external));
                    ensure!(foreign.is_none(), "{name} saw a packet that is not for it: {foreign:?}");
                }
                _ => bail!(
                    "{} alone should have seen {peer} in protocol {protocol}, but these did: {:?}",
                    pod.name,
                    seen.iter().map(|(name, _)| name).collect::<Vec<_>>()
                ),
            }
        }
        Ok(())
    }

    fn the_client_saw_the_external_address_only(&self) -> anyhow::Result<()> {
        let external = self.case.external;
        for frame in self.at_client.frames() {
            let Some(packet) = frame.packet.filter(|_| frame.direction == Direction::In) else { continue };
            ensure!(!packet.is_redirect(), "a redirect names the pod to the client: {packet}");
            if packet.is_link_housekeeping() {
                continue;
            }
            ensure!(packet.source == external, "the client saw {packet}");
            if let Some((_, quoted)) = packet.quoted_addresses() {
                ensure!(quoted == external, "the client saw {packet}, which quotes a packet to {quoted}");
            }
        }
        Ok(())
    }

    fn errors_at_the_pod_name_the_pod(&self) -> anyhow::Result<()> {
        // To itself, the pod is a client as well.
        if self.case.kind == Client::OwnPod {
            return Ok(());
        }
        let own = self.case.pod.address(self.case.external);
        for packet in self.pod_saw()? {
            if let Some((quoted, _)) = packet.quoted_addresses() {
                ensure!(quoted == own, "the pod saw {packet}, which quotes a packet from {quoted}");
            }
        }
        Ok(())
    }
}

impl Case<'_> {
    /// The client's address.
    pub(super) fn from(&self) -> IpAddr {
        self.client.address(self.external)
    }

    /// Whom pods see: the client itself, except that a pod would not believe a packet from itself.
    pub(super) fn client_as_pods_see_it(&self) -> IpAddr {
        if self.kind == Client::OwnPod { self.external } else { self.from() }
    }
}
