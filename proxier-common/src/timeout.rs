//! How long a flow may be idle before it counts as over. The kernel asks before it takes a tuple for another
//! external address; the agent asks when it removes idle ones.

use crate::{
    FlowKey, FlowValue, TCP_ESTABLISHED, TCP_REPLIED, TCP_REPLY_FIN, TCP_REQUEST_FIN, TCP_RESET, protocol,
};

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// An established TCP connection: 2 hours 4 minutes (RFC 5382, REQ-5).
pub const TCP_ESTABLISHED_TIMEOUT: u64 = 7440 * SECOND;
/// A TCP connection being opened or closed: 4 minutes (RFC 5382, REQ-5).
pub const TCP_TRANSITORY_TIMEOUT: u64 = 240 * SECOND;
/// A TCP connection closed by both sides or reset: time for a last retransmission.
pub const TCP_CLOSED_TIMEOUT: u64 = 30 * SECOND;
/// UDP and UDP-Lite: 5 minutes (RFC 4787, REQ-5).
pub const UDP_TIMEOUT: u64 = 300 * SECOND;
/// ICMP and ICMPv6 queries: 60 seconds (RFC 5508, REQ-1).
pub const ICMP_TIMEOUT: u64 = 60 * SECOND;
/// Everything else.
pub const OTHER_TIMEOUT: u64 = 600 * SECOND;

/// Whether both sides have closed the TCP connection, or the pod has reset it.
#[inline(always)]
#[must_use]
pub const fn tcp_is_closed(tcp_state: u8) -> bool {
    const BOTH: u8 = TCP_REQUEST_FIN | TCP_REPLY_FIN;
    tcp_state & TCP_RESET != 0 || tcp_state & BOTH == BOTH
}

/// How long a flow may be idle, in nanoseconds.
#[inline(always)]
#[must_use]
pub const fn of_flow(protocol: u8, tcp_state: u8) -> u64 {
    match protocol {
        protocol::TCP => {
            const OPEN: u8 = TCP_REPLIED | TCP_ESTABLISHED;
            if tcp_is_closed(tcp_state) {
                TCP_CLOSED_TIMEOUT
            } else if tcp_state & (TCP_REQUEST_FIN | TCP_REPLY_FIN) == 0 && tcp_state & OPEN == OPEN {
                TCP_ESTABLISHED_TIMEOUT
            } else {
                TCP_TRANSITORY_TIMEOUT
            }
        }
        protocol::UDP | protocol::UDPLITE => UDP_TIMEOUT,
        protocol::ICMP | protocol::ICMPV6 => ICMP_TIMEOUT,
        _ => OTHER_TIMEOUT,
    }
}

/// Whether a flow has been idle for longer than it may.
///
/// A `last_seen` that lies ahead (another CPU wrote it just now) is not old.
#[inline(always)]
#[must_use]
pub const fn flow_is_over(key: &FlowKey, value: &FlowValue, now: u64) -> bool {
    now.saturating_sub(value.last_seen) > of_flow(key.protocol, value.tcp_state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcp_connection_lives_as_long_as_its_state_says() {
        let established = TCP_REPLIED | TCP_ESTABLISHED;
        for (state, seconds) in [
            (0, 240),
            (TCP_REPLIED, 240),
            (established, 7440),
            (established | TCP_REQUEST_FIN, 240),
            (established | TCP_REPLY_FIN, 240),
            (established | TCP_REQUEST_FIN | TCP_REPLY_FIN, 30),
            (established | TCP_RESET, 30),
            (TCP_RESET, 30),
        ] {
            assert_eq!(of_flow(protocol::TCP, state), seconds * SECOND, "state {state:#b}");
        }
    }

    #[test]
    fn other_protocols_live_as_long_as_their_rfc_says() {
        for (protocol, seconds) in [(17, 300), (136, 300), (1, 60), (58, 60), (132, 600), (47, 600)] {
            assert_eq!(of_flow(protocol, 0), seconds * SECOND, "protocol {protocol}");
        }
    }
}
