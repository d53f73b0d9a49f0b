//! Removes flows and sessions that have been idle for longer than they may, in a thread of its own: the tables are large
//! and nothing waits for it. A request asks for the time itself; a reply finds its flow until it is removed here.

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
    Address, SessionKey, SessionValue,
    timeout::{SECOND, flow_is_over},
};

use super::{clock, tables::Tables};

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
    /// Starts it on the maps pinned below `pin_path`.
    ///
    /// # Errors
    ///
    /// The maps cannot be opened, or no thread can be had.
    pub(super) fn start(pin_path: &Path) -> anyhow::Result<Self> {
        let mut tables = Tables::open(pin_path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        thread::Builder::new()
            .name("expiry".to_owned())
            .spawn(move || {
                let mut failing = false;
                while !stopped.load(Ordering::Relaxed) {
                    match pass(&mut tables) {
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

/// A session of an address that nobody serves is swept by whoever withdrew the address.
fn session_is_over(
    key: &SessionKey,
    session: &SessionValue,
    timeouts: &HashMap<Address, u32>,
    now: u64,
) -> bool {
    timeouts
        .get(&key.external)
        .is_some_and(|seconds| now.saturating_sub(session.last_seen) > u64::from(*seconds) * SECOND)
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

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_session_is_over_when_its_services_timeout_has_passed() {
        let timeouts = HashMap::from([(address("10.0.0.1"), 60)]);
        let session = |last_seen| SessionValue {
            pod: address("11.0.0.1"),
            former: Address::UNSPECIFIED,
            last_seen,
            service_id: 1,
            generation: 1,
            tcp_port: 0,
            tcp_peer_port: 0,
            padding: 0,
        };
        let key = |external| SessionKey {
            external: address(external),
            peer: address("192.0.2.1"),
            external_port: 0,
            peer_port: 0,
            protocol: 0,
            padding: [0; 3],
        };
        let now = 1_000 * SECOND;
        assert!(!session_is_over(&key("10.0.0.1"), &session(now - 60 * SECOND), &timeouts, now));
        assert!(session_is_over(&key("10.0.0.1"), &session(now - 60 * SECOND - 1), &timeouts, now));
        assert!(!session_is_over(&key("10.0.0.1"), &session(now + SECOND), &timeouts, now));
        assert!(!session_is_over(&key("10.9.9.9"), &session(0), &timeouts, now), "not ours to judge");
    }
}
