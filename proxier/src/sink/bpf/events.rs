//! Tells people which packets the kernel programs drop: reads the samples from the ring buffer `events`, and logs.
//!
//! A ring buffer has one reader: an event that it has read is gone for everybody else. The lock on the pin path keeps
//! another agent away. What was dropped while no agent ran is still in the buffer and is told by the next one.

use std::{
    ffi::CString,
    net::IpAddr,
    os::fd::AsFd as _,
    path::Path,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use proxier_common::{Address, DropEvent, DropReason, Hook, NameKey, NameValue, protocol};
use tracing::{Level, field};

use self::digest::{Digest, Dropped, Kind, Line, Totals, level};
use super::{
    clock,
    tables::{self, Counters, Table},
};
use crate::delta::decode_name;

mod digest;

/// How often it looks whether a line is due, in milliseconds.
const TICK: u16 = 1000;

/// The reader, a thread of its own. It ends soon after this is dropped.
#[derive(Debug)]
pub(super) struct Events {
    stop: Arc<AtomicBool>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Events {
    /// Starts it on the maps pinned below `pin_path`. For who holds the lock.
    ///
    /// # Errors
    ///
    /// The maps cannot be opened, or no thread can be had.
    pub(super) fn start(pin_path: &Path) -> anyhow::Result<Self> {
        let drops = Counters::drops(pin_path)?;
        let digest = Digest::new(clock::monotonic()?, &totals(&drops)?);
        let names = tables::names(pin_path)?;
        let mut reader =
            Reader { ring: tables::events(pin_path)?, drops, names, digest, due_at: Instant::now() };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                let mut failing = false;
                while !stopped.load(Ordering::Relaxed) {
                    match reader.wait_and_tell() {
                        Ok(()) => failing = false,
                        Err(error) => {
                            if !failing {
                                tracing::warn!(
                                    "packets dropped are not told for now, tried again: {error:#}"
                                );
                            }
                            failing = true;
                            thread::sleep(Duration::from_millis(TICK.into()));
                        }
                    }
                }
            })
            .context("no thread can be had for telling of packets dropped")?;
        Ok(Self { stop })
    }
}

struct Reader {
    ring: RingBuf<MapData>,
    drops: Counters,
    names: Table<NameKey, NameValue>,
    digest: Digest,
    due_at: Instant,
}

impl Reader {
    /// Waits for packets dropped, but not for long, and tells of them and of what else is due.
    fn wait_and_tell(&mut self) -> anyhow::Result<()> {
        let mut readable = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, PollTimeout::from(TICK)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("the ring buffer `events` cannot be waited for"),
        }
        let now = Instant::now();
        // Counted first, reported then: what the counters say now is in the buffer by now, or nowhere. Read the other way round, a
        // packet that comes in between would be told as one of which there is no report, and then by itself.
        let counted = (now >= self.due_at).then(|| totals(&self.drops)).transpose()?;
        self.read();
        if let Some(counted) = counted {
            self.due_at = now + Duration::from_millis(TICK.into());
            for line in self.digest.due(now, &counted) {
                self.log(&line);
            }
        }
        Ok(())
    }

    fn read(&mut self) {
        // Decoded in one go: its place in the buffer is then free.
        while let Some(dropped) = self.ring.next().map(|event| decode(&event)) {
            if let Some(line) = dropped.and_then(|dropped| self.digest.take(Instant::now(), dropped)) {
                self.log(&line);
            }
        }
    }

    fn log(&self, line: &Line) {
        /// An event at a level that is known at run time only: tracing wants a constant.
        macro_rules! at {
            ($level:expr, $($event:tt)+) => {
                match $level {
                    Level::WARN => tracing::warn!($($event)+),
                    Level::INFO => tracing::info!($($event)+),
                    _ => tracing::debug!($($event)+),
                }
            };
        }
        /// The fields that tell whose packet it was.
        macro_rules! about {
            ($dropped:expr, $($rest:tt)+) => {{
                let Dropped { kind, interface, length, .. } = $dropped;
                let ports = kind.ports;
                at!(
                    level(kind.reason),
                    reason = kind.reason.name(),
                    hook = kind.hook.name(),
                    service = self.service(kind.service_id),
                    protocol = protocol_name(kind.protocol),
                    source = address(kind.source),
                    source_port = ports.map(|(source, _)| source),
                    destination = address(kind.destination),
                    destination_port = ports.map(|(_, destination)| destination),
                    interface = interface_name(*interface),
                    length,
                    $($rest)+
                )
            }};
        }
        match line {
            Line::First(dropped) => about!(dropped, "packet dropped"),
            Line::Earlier { dropped, ago } => {
                about!(dropped, ago_seconds = ago.as_secs(), "packet dropped earlier");
            }
            Line::EarlierOthers { packets } => {
                tracing::info!(packets, "packets dropped while no agent ran");
            }
            Line::Again { last, packets, within } => {
                about!(last, packets, within_seconds = within.as_secs(), "packets dropped again");
            }
            Line::Others { reason, hook, packets } => at!(
                level(*reason),
                reason = reason.name(),
                hook = hook.name(),
                packets,
                "more packets dropped than are told one by one"
            ),
        }
    }

    /// Namespace and name; none of what is for no external address, or of a Service that has been forgotten.
    fn service(&self, service_id: u32) -> Option<String> {
        let name = self.names.get(&NameKey { service_id }).ok().flatten()?;
        Some(decode_name(&name)?.service.to_string())
    }
}

fn totals(drops: &Counters) -> anyhow::Result<Totals> {
    let pairs = DropReason::ALL.into_iter().flat_map(|reason| Hook::ALL.map(|hook| (reason, hook)));
    pairs.map(|(reason, hook)| Ok(((reason, hook), drops.total(hook.counter(reason))?))).collect()
}

/// None if another version of proxier wrote it.
fn decode(bytes: &[u8]) -> Option<Dropped> {
    if bytes.len() != size_of::<DropEvent>() {
        return None;
    }
    // SAFETY: there are as many bytes, and any bytes make an event: it is `aya::Pod`, plain integers without padding.
    let event: DropEvent = unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) };
    let ports = (u16::from_be(event.source_port), u16::from_be(event.destination_port));
    let kind = Kind {
        reason: *DropReason::ALL.get(usize::from(event.reason))?,
        hook: *Hook::ALL.get(usize::from(event.hook))?,
        service_id: event.service_id,
        source: event.source,
        destination: event.destination,
        protocol: event.protocol,
        // Of a fragment, or a packet cut short, there are none either.
        ports: (protocol::has_ports(event.protocol) && ports != (0, 0)).then_some(ports),
    };
    Some(Dropped { time: event.time, kind, interface: event.interface, length: event.length })
}

/// None of a packet whose headers cannot be read.
fn address(address: Address) -> Option<field::DisplayValue<IpAddr>> {
    (address != Address::UNSPECIFIED).then(|| field::display(address.to_ip()))
}

fn protocol_name(number: u8) -> Option<String> {
    let name = || protocol::name(number).map_or_else(|| number.to_string(), ToOwned::to_owned);
    (number != DropEvent::UNKNOWN_PROTOCOL).then(name)
}

/// Its number if it has gone.
fn interface_name(index: u32) -> String {
    let name = nix::net::if_::if_indextoname(index).ok().and_then(|name| CString::into_string(name).ok());
    // nix 0.31 takes the null pointer of an index that nobody has for an empty name.
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| index.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(event: DropEvent) -> [u8; size_of::<DropEvent>()] {
        // SAFETY: plain integers without padding.
        unsafe { std::mem::transmute(event) }
    }

    fn event() -> DropEvent {
        let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
        DropEvent {
            time: 5,
            source: address("192.0.2.1"),
            destination: address("10.0.0.55"),
            service_id: 7,
            length: 60,
            interface: 2,
            source_port: 40_000_u16.to_be(),
            destination_port: 5060_u16.to_be(),
            protocol: protocol::UDP,
            reason: DropReason::SourceNotAllowed as u8,
            hook: Hook::PodIngress as u8,
            padding: [0; 5],
        }
    }

    #[test]
    fn an_event_is_read_as_the_kernel_wrote_it() {
        let dropped = decode(&bytes(event())).unwrap();
        let kind = dropped.kind;
        assert_eq!((kind.reason, kind.hook), (DropReason::SourceNotAllowed, Hook::PodIngress));
        assert_eq!(kind.ports, Some((40_000, 5060)));
        assert_eq!((kind.service_id, dropped.interface, dropped.length, dropped.time), (7, 2, 60, 5));
    }

    #[test]
    fn only_protocols_with_ports_have_ports() {
        let ports = |protocol, source_port| {
            decode(&bytes(DropEvent { protocol, source_port, destination_port: source_port, ..event() }))
                .unwrap()
                .kind
                .ports
        };
        for protocol in [protocol::TCP, protocol::UDP, protocol::UDPLITE, protocol::SCTP, protocol::DCCP] {
            assert!(ports(protocol, 1).is_some(), "{protocol}");
            assert_eq!(ports(protocol, 0), None, "{protocol}, a later fragment");
        }
        for protocol in [protocol::ICMP, protocol::ICMPV6, 47, 50] {
            assert_eq!(ports(protocol, 1), None, "{protocol}");
        }
    }

    #[test]
    fn what_another_version_wrote_is_left_out() {
        let [reason, hook] = [DropReason::ALL.len(), Hook::ALL.len()].map(|n| u8::try_from(n).unwrap());
        assert_eq!(decode(&bytes(DropEvent { reason, ..event() })), None);
        assert_eq!(decode(&bytes(DropEvent { hook, ..event() })), None);
        assert_eq!(decode(&bytes(event())[1..]), None);
        assert_eq!(decode(&[bytes(event()).as_slice(), &[0]].concat()), None);
    }

    #[test]
    fn what_cannot_be_read_of_a_packet_is_not_made_up() {
        assert!(address(Address::UNSPECIFIED).is_none());
        assert_eq!(protocol_name(DropEvent::UNKNOWN_PROTOCOL), None);
        assert_eq!(protocol_name(132).as_deref(), Some("sctp"));
        assert_eq!(protocol_name(200).as_deref(), Some("200"));
        assert_eq!(interface_name(u32::MAX), u32::MAX.to_string());
    }
}
