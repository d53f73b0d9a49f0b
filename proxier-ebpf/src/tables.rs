//! How the core sees the maps, whoever holds them.

use proxier_common::{
    BackendKey, BackendValue, ExternalKey, FlowKey, FlowValue, FragmentKey, FragmentValue, MemberKey,
    MemberValue, PodKey, PodLinkValue, PodValue, ServiceValue, SessionKey, SessionValue, SourceKey,
    Statistic, timeout::SECOND,
};

/// Why an entry could not be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// Another packet was faster.
    Exists,
    /// The table would not take it.
    Full,
}

/// A flow in its table. Other CPUs may write to it at the same time; every write is of one field.
pub trait FlowEntry {
    /// A copy of the flow as it is now.
    fn value(&self) -> FlowValue;
    /// Notes when a packet last passed.
    fn set_last_seen(&self, now: u64);
    /// Notes how far a TCP connection has come.
    fn set_tcp_state(&self, state: u8);

    /// Notes that a packet has passed, which left the flow in this state. `flow` is what [`FlowEntry::value`] said: what
    /// stays is not written, and time only by the second, for a write takes the memory from all other CPUs.
    #[inline(always)]
    fn refresh(&self, flow: &FlowValue, now: u64, tcp_state: u8) {
        if now.saturating_sub(flow.last_seen) >= SECOND {
            self.set_last_seen(now);
        }
        if tcp_state != flow.tcp_state {
            self.set_tcp_state(tcp_state);
        }
    }
}

/// A session in its table. Other CPUs may write to it at the same time; every write is of one field.
pub trait SessionEntry {
    /// A copy of the session as it is now.
    fn value(&self) -> SessionValue;
    /// Notes when the client last sent something.
    fn set_last_seen(&self, now: u64);
    /// Notes that the pod belongs to this Service in this generation too.
    fn set_generation(&self, service_id: u32, generation: u32);
    /// Notes between which ports the client has opened a TCP connection; zeros for none.
    fn set_tcp_ports(&self, port: u16, peer_port: u16);
}

/// The maps and the clock.
pub trait Tables {
    /// An entry of `flows`.
    type Flow: FlowEntry;
    /// An entry of `sessions`.
    type Session: SessionEntry;

    /// `CLOCK_MONOTONIC` in nanoseconds.
    fn now(&self) -> u64;

    /// Looks up an external address, a pod's own, or the node's.
    fn service(&self, key: &ExternalKey) -> Option<ServiceValue>;
    /// Looks up a backend.
    fn backend(&self, key: &BackendKey) -> Option<BackendValue>;
    /// Looks up whether a pod belongs to a Service.
    fn member(&self, key: &MemberKey) -> Option<MemberValue>;
    /// Looks up whether an address is that of a pod that belongs to a Service.
    fn pod(&self, key: &PodKey) -> Option<PodValue>;
    /// What is known of an interface as a link by which pods are reached past the node's stack. In an array: next to nothing beside
    /// the other look-ups.
    fn pod_link(&self, interface: u32) -> Option<PodLinkValue>;
    /// Whether a source range has the address that all bits of the key name.
    fn is_permitted(&self, key: &SourceKey) -> bool;

    /// Looks up a client's session.
    fn session(&self, key: &SessionKey) -> Option<Self::Session>;
    /// Inserts or replaces a session. When the table is full the least recently used one goes; should that fail,
    /// the client is placed anew with its next packet.
    fn put_session(&self, key: &SessionKey, value: &SessionValue);

    /// Looks up a flow.
    fn flow(&self, key: &FlowKey) -> Option<Self::Flow>;
    /// Inserts a flow that is not there yet.
    ///
    /// # Errors
    ///
    /// It is there by now, or the table would not take it.
    fn insert_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError>;
    /// Inserts or replaces a flow.
    ///
    /// # Errors
    ///
    /// The table would not take it.
    fn replace_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), InsertError>;

    /// Removes a flow, if it is there.
    fn remove_flow(&self, key: &FlowKey);

    /// Looks up what the first fragment of a packet decided.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue>;
    /// Remembers what the first fragment of a packet decided.
    fn put_fragment(&self, key: &FragmentKey, value: &FragmentValue);
    /// Forgets what an earlier packet's first fragment decided, if anything.
    fn remove_fragment(&self, key: &FragmentKey);

    /// Counts something that has happened.
    fn count(&self, what: Statistic);
}
