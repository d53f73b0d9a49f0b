//! What ICMP messages are about.

use std::net::IpAddr;

use super::{Packet, protocol};

impl Packet {
    /// Source and destination of the packet that this ICMP error quotes; none if it is no error.
    #[must_use]
    pub fn quoted_addresses(&self) -> Option<(IpAddr, IpAddr)> {
        let kind = *self.payload.first()?;
        let quote = self.payload.get(8..)?;
        match self.protocol {
            protocol::ICMP if matches!(kind, 3..=5 | 11 | 12) => {
                let address = |at| Some(IpAddr::from(*quote.get(at..)?.first_chunk::<4>()?));
                Some((address(12)?, address(16)?))
            }
            protocol::ICMPV6 if kind < 128 => {
                let address = |at| Some(IpAddr::from(*quote.get(at..)?.first_chunk::<16>()?));
                Some((address(8)?, address(24)?))
            }
            _ => None,
        }
    }

    /// Whether this is an ICMP error that says that a packet was too big.
    #[must_use]
    pub fn is_too_big(&self) -> bool {
        match self.protocol {
            protocol::ICMP => self.payload.starts_with(&[3, 4]),
            protocol::ICMPV6 => self.payload.starts_with(&[2, 0]),
            _ => false,
        }
    }

    /// Whether this tells a host of a shorter way to somebody else.
    #[must_use]
    pub fn is_redirect(&self) -> bool {
        match self.protocol {
            protocol::ICMP => self.payload.starts_with(&[5]),
            protocol::ICMPV6 => self.payload.starts_with(&[137]),
            _ => false,
        }
    }
}
