//! IP protocol numbers (IANA, "Assigned Internet Protocol Numbers") that somebody here knows by name.

/// Internet Control Message Protocol.
pub const ICMP: u8 = 1;
/// Transmission Control Protocol.
pub const TCP: u8 = 6;
/// User Datagram Protocol.
pub const UDP: u8 = 17;
/// Datagram Congestion Control Protocol (RFC 4340).
pub const DCCP: u8 = 33;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Stream Control Transmission Protocol (RFC 9260).
pub const SCTP: u8 = 132;
/// UDP-Lite (RFC 3828).
pub const UDPLITE: u8 = 136;

/// Whether its header starts with a source and a destination port.
#[must_use]
#[inline(always)]
pub const fn has_ports(number: u8) -> bool {
    matches!(number, TCP | UDP | DCCP | SCTP | UDPLITE)
}

/// The name that `/etc/protocols` has, of those that people use.
#[must_use]
pub const fn name(number: u8) -> Option<&'static str> {
    Some(match number {
        ICMP => "icmp",
        2 => "igmp",
        4 => "ipip",
        TCP => "tcp",
        UDP => "udp",
        DCCP => "dccp",
        41 => "ipv6",
        47 => "gre",
        50 => "esp",
        51 => "ah",
        ICMPV6 => "icmpv6",
        89 => "ospf",
        112 => "vrrp",
        115 => "l2tp",
        SCTP => "sctp",
        UDPLITE => "udplite",
        _ => return None,
    })
}
