//! Removes flows and sessions that have been idle for longer than they may, in a thread of its own: the tables are large
//! and nothing waits for it. A request asks for the time itself; a reply finds its flow until it is removed here. Then
//! looks what else has gone.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use proxier_common::{
    Address, SessionKey, SessionValue, TCP_ESTABLISHED, TCP_REPLIED,
    timeout::{SECOND, flow_is_over, of_flow},
};

use super::{
    clock,
    evictions::Evictions,
    tables::{Counters, Tables},
};

/// Between two passes over the tables.
const PAUSE: Duration = Duration::from_secs(10);
/// Entries between two breaths, each of [`BREATH`]: a pass over a full table then takes a few per cent of one CPU.
const STRIDE: usize = 4096;
const BREATH: Duration = Duration::from_millis(20);

/// The thread. It ends soon after this is dropped.
#[derive(Debug)]
pub(super) struct Expiry {
    stop: Arc<AtomicBool>,
}

impl Drop for Expiry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Expiry {
    /// Starts it on the maps pinned below `pin_path`. `others` are the same maps, of whoever else removes flows.
    ///
    /// # Errors
    ///
    /// The maps cannot be opened, or no thread can be had.
    pub(super) fn start(pin_path: &Path, others: &Tables) -> anyhow::Result<Self> {
        let mut tables = Tables::open(pin_path)?;
        tables.flows.removed = Arc::clone(&others.flows.removed);
        let mut evictions = Evictions::new(Counters::stats(pin_path)?, &tables)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        thread::Builder::new()
            .name("expiry".to_owned())
            .spawn(move || {
                let mut failing = false;
                while !stopped.load(Ordering::Relaxed) {
                    let result = pass(&mut tables).and_then(|gone| {
                        evictions.update(&tables)?;
                        Ok(gone)
                    });
                    match result {
                        Ok((flows, sessions)) => {
                            failing = false;
                            if flows + sessions > 0 {
                                tracing::debug!(flows, sessions, "idle flows and sessions are removed");
                            }
                        }
                        Err(error) if !failing => {
                            failing = true;
                            tracing::warn!("idle flows and sessions stay for now, tried again: {error:#}");
                        }
                        Err(_) => {}
                    }
                    thread::sleep(PAUSE);
                }
            })
            .context("no thread can be had for removing idle flows")?;
        Ok(Self { stop })
    }
}

/// One pass. Returns how many flows and sessions went.
///
/// A packet may revive an entry between reading and removing it. Its next request then finds or makes another: the same
/// as if the entry had gone a moment earlier.
fn pass(tables: &mut Tables) -> anyhow::Result<(usize, usize)> {
    let mut timeouts = HashMap::new();
    for entry in tables.services.entries() {
        let (key, value) = entry?;
        timeouts.insert(key.external, value.affinity_timeout);
    }
    let now = clock::monotonic()?;
    let mut breath = Breath::default();
    let flows = tables.flows.retain(|key, flow| {
        breath.take();
        !flow_is_over(key, flow, now)
    })?;
    let sessions = tables.sessions.retain(|key, session| {
        breath.take();
        !session_is_over(key, session, &timeouts, now)
    })?;
    Ok((flows, sessions))
}

/// A session of an address that nobody serves is swept by whoever withdrew the address. One of a single conversation is of
/// no use for longer than that can last: there may be one for every datagram of a client that asks from ever new ports.
fn session_is_over(
    key: &SessionKey,
    session: &SessionValue,
    timeouts: &HashMap<Address, u32>,
    now: u64,
) -> bool {
    timeouts.get(&key.external).is_some_and(|seconds| {
        let of_client = u64::from(*seconds) * SECOND;
        let timeout = if key.protocol == 0 {
            of_client
        } else {
            of_client.min(of_flow(key.protocol, TCP_REPLIED | TCP_ESTABLISHED))
        };
        now.saturating_sub(session.last_seen) > timeout
    })
}

#[derive(Default)]
struct Breath {
    entries: usize,
}

impl Breath {
    fn take(&mut self) {
        self.entries += 1;
        if self.entries.is_multiple_of(STRIDE) {
            thread::sleep(BREATH);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proxier_common::protocol;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn key(external: &str, protocol: u8) -> SessionKey {
        SessionKey {
            external: address(external),
            peer: address("192.0.2.1"),
            external_port: 0,
            peer_port: 0,
            protocol,
            padding: [0; 3],
        }
    }

    fn session(last_seen: u64) -> SessionValue {
        SessionValue {
            pod: address("11.0.0.1"),
            former: Address::UNSPECIFIED,
            last_seen,
            service_id: 1,
            generation: 1,
            tcp_port: 0,
            tcp_peer_port: 0,
            padding: 0,
        }
    }

    #[test]
    fn a_session_is_over_when_its_services_timeout_has_passed() {
        let timeouts = HashMap::from([(address("10.0.0.1"), 60)]);
        let now = 1_000 * SECOND;
        let over =
            |external, last_seen| session_is_over(&key(external, 0), &session(last_seen), &timeouts, now);
        assert!(!over("10.0.0.1", now - 60 * SECOND));
        assert!(over("10.0.0.1", now - 60 * SECOND - 1));
        assert!(!over("10.0.0.1", now + SECOND));
        assert!(!over("10.9.9.9", 0), "not ours to judge");
    }

    #[test]
    fn a_session_of_one_conversation_is_over_with_it() {
        let timeouts = HashMap::from([(address("10.0.0.1"), 10_800), (address("10.0.0.2"), 100)]);
        let now = 100_000 * SECOND;
        for (protocol, external, seconds) in [
            (0, "10.0.0.1", 10_800),
            (protocol::TCP, "10.0.0.1", 7440),
            (protocol::UDP, "10.0.0.1", 300),
            (protocol::ICMP, "10.0.0.1", 60),
            (47, "10.0.0.1", 600),
            (protocol::UDP, "10.0.0.2", 100),
        ] {
            let over = |age| session_is_over(&key(external, protocol), &session(now - age), &timeouts, now);
            assert!(!over(seconds * SECOND), "{protocol}");
            assert!(over(seconds * SECOND + 1), "{protocol}");
        }
    }
}
