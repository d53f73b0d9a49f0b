//! What the ring buffer `events` carries: a sample of the packets dropped, for people to see whose they were.
//!
//! The counters of `drops` are exact; a flood must not cost more than they do. So each CPU reports at most
//! [`EVENTS_A_SECOND`] packets a second of one reason at one hook.

use crate::Address;

/// Size of the ring buffer, in bytes.
pub const EVENT_BYTES: u32 = 256 * 1024;

/// Most packets reported a second, by one CPU, of one reason at one hook.
pub const EVENTS_A_SECOND: u32 = 10;

/// A packet that was dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DropEvent {
    /// When.
    pub time: u64,
    /// Its source address, as it was when it was dropped.
    pub source: Address,
    /// Its destination address, as it was when it was dropped.
    pub destination: Address,
    /// As [`ServiceValue::service_id`](crate::ServiceValue::service_id); 0 if the destination is no external address.
    pub service_id: u32,
    /// Its length in bytes, with the link-layer header.
    pub length: u32,
    /// The interface's index.
    pub interface: u32,
    /// Source port in network order, 0 if there is none or it cannot be read; of an ICMP query or answer the identifier.
    pub source_port: u16,
    /// Destination port, likewise.
    pub destination_port: u16,
    /// IP protocol number; of IPv6 what follows its fixed header, which may be an extension header's number, and then there are no
    /// ports; 255, which is reserved (IANA), if the packet's headers cannot be read as far.
    pub protocol: u8,
    /// As [`DropReason`](crate::DropReason).
    pub reason: u8,
    /// As [`Hook`](crate::Hook).
    pub hook: u8,
    /// Always 0.
    pub padding: [u8; 5],
}

impl DropEvent {
    /// [`DropEvent::protocol`] of a packet whose headers cannot be read as far.
    pub const UNKNOWN_PROTOCOL: u8 = 255;
}

/// Value of `event_budgets`, by the index that a counter of `drops` has: what a CPU may still report.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventBudget {
    /// When the second began that `reported` counts in.
    pub since: u64,
    /// Events in this second.
    pub reported: u32,
    /// Always 0.
    pub padding: u32,
}

impl EventBudget {
    /// Takes one packet dropped at `now` into account; whether it may be reported.
    #[inline(always)]
    pub const fn take(&mut self, now: u64) -> bool {
        if now.wrapping_sub(self.since) >= crate::timeout::SECOND {
            self.since = now;
            self.reported = 0;
        }
        if self.reported >= EVENTS_A_SECOND {
            return false;
        }
        self.reported += 1;
        true
    }
}

const _: () = {
    assert!(size_of::<DropEvent>() == 64);
    assert!(size_of::<EventBudget>() == 16);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeout::SECOND;

    #[test]
    fn a_flood_is_reported_as_ten_packets_a_second() {
        let mut budget = EventBudget { since: 0, reported: 0, padding: 0 };
        for start in [5 * SECOND, 6 * SECOND, 60 * SECOND] {
            let reported = (0..1000).filter(|packet| budget.take(start + packet)).count();
            assert_eq!(reported, EVENTS_A_SECOND as usize);
        }
    }
}
