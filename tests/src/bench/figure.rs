//! What is measured of an arm.

use serde::{Deserialize, Serialize};

/// A burst of traffic, which gives one or more figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Small datagrams, one way, as many as go.
    Datagrams,
    /// Connections, one after the other, by several clients.
    Connections,
    /// One byte there and back.
    RoundTrips,
    /// One connection, as much as goes.
    Throughput,
}

impl Measure {
    /// All, in the order in which a round takes them.
    pub const ALL: [Self; 4] = [Self::Datagrams, Self::Connections, Self::RoundTrips, Self::Throughput];

    /// What errors call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Datagrams => "datagrams",
            Self::Connections => "connections",
            Self::RoundTrips => "round trips",
            Self::Throughput => "throughput",
        }
    }
}

/// A number that can be compared between arms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Figure {
    /// TCP payload in Gb/s that one connection brings to the pod.
    TcpGbps,
    /// Datagrams of 64-byte frames that arrive at a program in the pod.
    UdpPerSecond,
    /// Of those sent, how many percent did not arrive. No figure of an arm but of the measurement: where many are lost, the
    /// pod's program was too slow, and not the way to it.
    UdpLostPercent,
    /// Microseconds that half of all round trips do not exceed.
    RoundTripP50,
    /// Microseconds that 99 of 100 do not exceed.
    RoundTripP99,
    /// Connections made, used for a byte each way, and closed.
    ConnectionsPerSecond,
}

impl Figure {
    /// Those that arms are compared by.
    pub const COMPARED: [Self; 5] = [
        Self::TcpGbps,
        Self::UdpPerSecond,
        Self::RoundTripP50,
        Self::RoundTripP99,
        Self::ConnectionsPerSecond,
    ];

    /// What a table calls it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::TcpGbps => "TCP Gb/s",
            Self::UdpPerSecond => "64-byte UDP packets/s",
            Self::UdpLostPercent => "UDP packets lost, %",
            Self::RoundTripP50 => "TCP round trip p50, µs",
            Self::RoundTripP99 => "TCP round trip p99, µs",
            Self::ConnectionsPerSecond => "connections/s",
        }
    }

    /// What a file's name calls it.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::TcpGbps => "tcp-throughput",
            Self::UdpPerSecond => "udp-packets",
            Self::UdpLostPercent => "udp-lost",
            Self::RoundTripP50 => "tcp-round-trip-p50",
            Self::RoundTripP99 => "tcp-round-trip-p99",
            Self::ConnectionsPerSecond => "connections",
        }
    }

    /// Whether more is better.
    #[must_use]
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Self::TcpGbps | Self::UdpPerSecond | Self::ConnectionsPerSecond)
    }
}

/// One measured number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Of what.
    pub figure: Figure,
    /// In the figure's unit.
    pub value: f64,
}
