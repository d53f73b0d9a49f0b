//! One type for addresses of both families, with the representation that the maps use.

use core::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An IP address: 16 bytes in network order, IPv4 as v4-mapped IPv6.
///
/// Aligned to 8 bytes and handled as two words wherever the kernel program does: byte by byte, an address costs it
/// sixteen instructions and as many slots of its 512-byte stack.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Address {
    /// Network order.
    pub bytes: [u8; 16],
}

impl Address {
    /// All zero, `::`: nobody's address.
    pub const UNSPECIFIED: Self = Self { bytes: [0; 16] };

    /// The v4-mapped form of an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self::from_words([0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])])
    }

    /// The 16 bytes of an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn from_v6(bytes: [u8; 16]) -> Self {
        Self { bytes }
    }

    /// From two words as they lie in memory, whatever this machine's byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u64; 2]) -> Self {
        // SAFETY: both types have 16 bytes and every bit pattern is a valid value of both.
        unsafe { core::mem::transmute(words) }
    }

    /// Two words as they lie in memory, whatever this machine's byte order.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [u64; 2] {
        // SAFETY: both types have 16 bytes and every bit pattern is a valid value of both.
        unsafe { core::mem::transmute(self) }
    }

    /// Whether it is the v4-mapped form of an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4_mapped(self) -> bool {
        let [high, low] = self.words();
        let [a, b, c, d, ..] = low.to_ne_bytes();
        high == 0 && u32::from_ne_bytes([a, b, c, d]) == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }

    /// The last four bytes, which are the IPv4 address if this is one.
    #[inline(always)]
    #[must_use]
    pub const fn v4_octets(self) -> [u8; 4] {
        let [_, low] = self.words();
        let [.., a, b, c, d] = low.to_ne_bytes();
        [a, b, c, d]
    }

    /// The standard library's form. A v4-mapped address is an IPv4 address.
    #[must_use]
    pub const fn to_ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from_octets(self.bytes);
        match v6.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(v6),
        }
    }
}

impl PartialEq for Address {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Address {}

impl Hash for Address {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bytes.hash(state);
    }
}

impl PartialOrd for Address {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Address {
    fn cmp(&self, other: &Self) -> Ordering {
        self.bytes.cmp(&other.bytes)
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::from_v4(address.octets())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        Self::from_v6(address.octets())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_ip(), f)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_ip(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_is_kept_as_v4_mapped() {
        let address = Address::from(Ipv4Addr::new(10, 0, 0, 55));
        assert_eq!(address.bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 55]);
        assert_eq!(address.to_ip(), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 55)));
        assert_eq!(address.v4_octets(), [10, 0, 0, 55]);
    }

    #[test]
    fn ipv6_is_kept_as_it_is() {
        let v6: Ipv6Addr = "1000::55".parse().unwrap();
        assert_eq!(Address::from(v6).bytes, v6.octets());
        assert_eq!(Address::from(v6).to_string(), "1000::55");
    }
}
