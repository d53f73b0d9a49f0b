//! Transport checksums from scratch: filled in, and checked.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use etherparse::checksum::Sum16BitWords;

use super::{Packet, SCTP_CRC, length, protocol};

impl Packet {
    /// Recomputes the transport checksum from scratch.
    ///
    /// # Errors
    ///
    /// It is wrong. Fragments, and protocols without a checksum that the lab knows, are never wrong.
    pub fn check_checksum(&self) -> anyhow::Result<()> {
        if self.fragment.is_some() {
            return Ok(());
        }
        let wrong = match self.protocol {
            protocol::UDP if self.source.is_ipv4() && self.payload.get(6..8) == Some(&[0, 0]) => false,
            protocol::TCP | protocol::UDP | protocol::DCCP | protocol::UDPLITE | protocol::ICMPV6 => {
                self.sum(&self.payload) != 0
            }
            protocol::ICMP => Sum16BitWords::new().add_slice(&self.payload).ones_complement() != 0,
            protocol::SCTP => {
                let mut bytes = self.payload.clone();
                let Some(field) = bytes.get_mut(8..12) else { bail!("an SCTP packet ends early: {self}") };
                let sent = field.to_vec();
                field.fill(0);
                SCTP_CRC.checksum(&bytes).to_le_bytes()[..] != sent[..]
            }
            _ => false,
        };
        ensure!(!wrong, "wrong checksum: {self}");
        Ok(())
    }

    /// Compares the sum over the pseudo-header, which the hardware is to add the rest to, with one from scratch.
    ///
    /// # Errors
    ///
    /// It is wrong. Packets within which another one has its checksum left to the hardware are not for this.
    pub fn check_checksum_left_to_hardware(&self) -> anyhow::Result<()> {
        let offset = match self.protocol {
            protocol::TCP => 16,
            protocol::UDP => 6,
            // The lab's kernels leave no other. What a program made out of such a packet, an ICMP error, still looks like
            // one, but nobody is going to fill it in.
            _ => return self.check_checksum(),
        };
        let field =
            self.payload.get(offset..).and_then(<[u8]>::first_chunk).context("the packet ends early")?;
        let sum = !self.pseudo_header_sum(self.payload.len()).ones_complement();
        // etherparse sums words as they lie in memory. Zero has two forms in ones' complement.
        let same = u16::from_ne_bytes(*field) % 0xffff == sum % 0xffff;
        ensure!(same, "wrong sum over the pseudo-header: {self}");
        Ok(())
    }

    /// Complement of the sum over the pseudo-header and what `payload` has covered; 0 over a whole right packet.
    fn sum(&self, payload: &[u8]) -> u16 {
        let covered = match self.protocol {
            protocol::UDPLITE => match payload.get(4..6) {
                Some(&[0, 0]) | None => payload,
                Some(&[a, b]) => payload.get(..usize::from(u16::from_be_bytes([a, b]))).unwrap_or(payload),
                Some(_) => unreachable!("two bytes"),
            },
            _ => payload,
        };
        self.pseudo_header_sum(payload.len()).add_slice(covered).ones_complement()
    }

    /// The sum over the addresses, the protocol and the length of the transport header and data.
    pub(super) fn pseudo_header_sum(&self, size: usize) -> Sum16BitWords {
        let mut sum =
            Sum16BitWords::new().add_2bytes([0, self.protocol]).add_2bytes(length(size).to_be_bytes());
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                sum.add_4bytes(source.octets()).add_4bytes(destination.octets())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                sum.add_16bytes(source.octets()).add_16bytes(destination.octets())
            }
            _ => unreachable!("new() has checked the families"),
        }
    }

    pub(super) fn with_checksum_at(mut self, offset: usize) -> Self {
        let sum = match self.sum(&self.payload) {
            // A zero would say that there is no checksum (RFC 768).
            0 if [protocol::UDP, protocol::UDPLITE].contains(&self.protocol) => 0xffff,
            sum => sum,
        };
        // etherparse sums words as they lie in memory.
        self.payload[offset..offset + 2].copy_from_slice(&sum.to_ne_bytes());
        self
    }
}
