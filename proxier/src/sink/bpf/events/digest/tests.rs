use std::net::IpAddr;

use super::*;

const STARTED: u64 = 1_000;

/// A packet number `port` of a client that nobody serves.
fn dropped(reason: DropReason, port: u16) -> Dropped {
    let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
    Dropped {
        time: STARTED + 1,
        kind: Kind {
            reason,
            hook: Hook::UplinkIngress,
            service_id: 7,
            source: address("192.0.2.1"),
            destination: address("10.0.0.55"),
            protocol: 17,
            ports: Some((port, 5060)),
        },
        interface: 2,
        length: 60,
    }
}

/// A digest, the clock, and the kernel's counters.
struct Log {
    digest: Digest,
    now: Instant,
    totals: Totals,
    lines: Vec<Line>,
}

impl Log {
    fn new() -> Self {
        let totals = Totals::from([((DropReason::NoBackend, Hook::UplinkIngress), 1_000_000)]);
        let digest = Digest::new(STARTED, &totals);
        Self { digest, now: Instant::now(), totals, lines: Vec::new() }
    }

    /// The kernel counts a packet without reporting it.
    fn count(&mut self, dropped: Dropped) {
        *self.totals.entry((dropped.kind.reason, dropped.kind.hook)).or_default() += 1;
    }

    fn drop(&mut self, dropped: Dropped) {
        self.count(dropped);
        self.lines.extend(self.digest.take(self.now, dropped));
    }

    /// The agent looks once a second.
    fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            self.lines.extend(self.digest.due(self.now, &self.totals));
        }
    }

    fn take(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.lines)
    }
}

fn packets(lines: &[Line]) -> u64 {
    lines
        .iter()
        .map(|line| match line {
            Line::First(_) | Line::Earlier { .. } => 1,
            Line::Again { packets, .. } | Line::Others { packets, .. } | Line::EarlierOthers { packets } => {
                *packets
            }
        })
        .sum()
}

#[test]
fn the_first_packet_gets_a_line_at_once_and_those_like_it_one_a_minute() {
    let mut log = Log::new();
    let packet = dropped(DropReason::NoBackend, 40_000);
    log.drop(packet);
    assert_eq!(log.take(), [Line::First(packet)]);
    for _ in 0..59 {
        let last = Dropped { length: 80, ..packet };
        log.drop(last);
        log.wait(1);
    }
    assert_eq!(log.take(), []);
    log.wait(1);
    let last = Dropped { length: 80, ..packet };
    assert_eq!(log.take(), [Line::Again { last, packets: 59, within: AGAIN }]);
    log.wait(600);
    assert_eq!(log.take(), [], "a minute without packets gets no line");
    log.drop(packet);
    log.wait(1);
    assert_eq!(packets(&log.take()), 1, "one after a long time need not wait");
}

#[test]
fn every_difference_that_can_be_told_gets_a_line() {
    let mut log = Log::new();
    let packet = dropped(DropReason::NoBackend, 40_000);
    let kind = packet.kind;
    let others = [
        kind,
        Kind { hook: Hook::PodIngress, ..kind },
        Kind { service_id: 8, ..kind },
        Kind { source: Address::UNSPECIFIED, ..kind },
        Kind { destination: Address::UNSPECIFIED, ..kind },
        Kind { protocol: 6, ..kind },
        Kind { ports: Some((40_001, 5060)), ..kind },
        Kind { ports: None, ..kind },
        Kind { reason: DropReason::SourceNotAllowed, ..kind },
    ];
    for _ in 0..2 {
        others.iter().for_each(|kind| log.drop(Dropped { kind: *kind, ..packet }));
    }
    assert_eq!(log.take(), others.map(|kind| Line::First(Dropped { kind, ..packet })));
}

#[test]
fn a_flood_gets_few_lines_and_every_packet_is_in_one() {
    let mut log = Log::new();
    for port in 0..5_000 {
        log.drop(dropped(DropReason::NoBackend, port));
    }
    assert_eq!(log.lines.len(), LINES as usize);
    log.wait(1);
    let others = 5_000 - u64::from(LINES);
    let pair = (DropReason::NoBackend, Hook::UplinkIngress);
    assert_eq!(log.lines.last(), Some(&Line::Others { reason: pair.0, hook: pair.1, packets: others }));
    assert_eq!(packets(&log.take()), 5_000);

    // It goes on for an hour, from ever new ports and ten times faster than the kernel reports.
    let mut sent = 0_u64;
    for second in 0..3_600_u16 {
        log.drop(dropped(DropReason::NoBackend, 5_000 + second));
        (0..9).for_each(|_| log.count(dropped(DropReason::NoBackend, 0)));
        sent += 10;
        log.wait(1);
    }
    log.wait(61);
    let lines = log.take();
    let most = 3_600 / REFILL.as_secs() + 3_600 / AGAIN.as_secs();
    let number = lines.len() as u64;
    assert!((60..=most + 3).contains(&number), "{number} lines an hour, at most {most}");
    assert_eq!(packets(&lines), sent);
}

#[test]
fn what_anybody_can_send_takes_no_line_from_what_needs_an_operator() {
    let mut log = Log::new();
    for port in 0..1_000 {
        log.drop(dropped(DropReason::Malformed, port));
        log.drop(dropped(DropReason::NoBackend, port));
    }
    log.take();
    let collision = dropped(DropReason::FlowCollision, 1);
    log.drop(collision);
    assert_eq!(log.take(), [Line::First(collision)]);
}

#[test]
fn what_is_remembered_is_bounded_and_the_quietest_goes() {
    let mut log = Log::new();
    let faithful = dropped(DropReason::NoBackend, 0);
    log.drop(faithful);
    let mut told = 0;
    for port in 1..=2 * u16::try_from(REMEMBERED).unwrap() {
        // One line each, and the faithful client's one a minute.
        log.drop(dropped(DropReason::NoBackend, port));
        log.drop(faithful);
        log.wait(4);
        assert!(log.digest.kinds.len() <= REMEMBERED);
        let lines = log.take();
        assert!(!lines[1..].contains(&Line::First(faithful)), "it was forgotten");
        told += packets(&lines);
    }
    log.wait(61);
    assert_eq!(told + packets(&log.take()), 1 + 4 * REMEMBERED as u64);
}

#[test]
fn packets_of_before_the_start_are_told_as_such_and_not_taken_for_newer_ones() {
    let mut log = Log::new();
    let earlier = |port| Dropped { time: STARTED - 600, ..dropped(DropReason::NoBackend, port) };
    let ago = Duration::from_nanos(600);
    // Reported earlier, so counted in what the counters said at the start. Each kind twice.
    for port in (0..5).chain(0..5) {
        log.lines.extend(log.digest.take(log.now, earlier(port)));
    }
    let expected: Vec<_> = (0..5).map(|port| Line::Earlier { dropped: earlier(port), ago }).collect();
    assert_eq!(log.take(), expected);
    (0..3).for_each(|_| log.count(dropped(DropReason::NoBackend, 9)));
    log.wait(1);
    let pair = (DropReason::NoBackend, Hook::UplinkIngress);
    let newer = Line::Others { reason: pair.0, hook: pair.1, packets: 3 };
    assert_eq!(log.take(), [Line::EarlierOthers { packets: 5 }, newer]);
    log.drop(dropped(DropReason::NoBackend, 0));
    assert_eq!(log.take(), [Line::First(dropped(DropReason::NoBackend, 0))], "the first since the start");
    log.wait(120);
    assert_eq!(log.take(), []);
}

#[test]
fn of_a_flood_of_before_the_start_few_are_told_and_the_rest_in_one_line() {
    let mut log = Log::new();
    for port in 0..3_600 {
        let packet = Dropped { time: STARTED - 1, ..dropped(DropReason::NoBackend, port) };
        log.lines.extend(log.digest.take(log.now, packet));
    }
    assert_eq!(log.take().len(), LINES as usize);
    log.wait(120);
    assert_eq!(log.take(), [Line::EarlierOthers { packets: 3_600 - u64::from(LINES) }]);
}

#[test]
fn a_packet_that_is_reported_while_the_agent_looks_is_told_once() {
    let mut log = Log::new();
    let (counted, taken) = (dropped(DropReason::NoBackend, 1), dropped(DropReason::NoBackend, 2));
    log.drop(counted);
    let before = log.totals.clone();
    // It comes after the counters were read, and is in the buffer that is read then.
    log.drop(taken);
    log.now += Duration::from_secs(1);
    log.lines.extend(log.digest.due(log.now, &before));
    log.wait(120);
    assert_eq!(log.take(), [Line::First(counted), Line::First(taken)]);
    // Nor does what is reported by nothing get lost beside it.
    log.count(counted);
    let before = log.totals.clone();
    let third = dropped(DropReason::NoBackend, 3);
    log.drop(third);
    log.now += Duration::from_secs(1);
    log.lines.extend(log.digest.due(log.now, &before));
    log.wait(120);
    assert_eq!(packets(&log.take()), 2);
}

#[test]
fn an_event_that_is_read_after_the_counters_is_not_told_twice_for_ever() {
    let mut log = Log::new();
    let packet = dropped(DropReason::NoBackend, 1);
    log.count(packet);
    log.wait(1);
    log.lines.extend(log.digest.take(log.now, packet));
    log.count(packet);
    log.wait(120);
    assert_eq!(packets(&log.take()), 2);
}
