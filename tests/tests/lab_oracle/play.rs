//! Plays a script in both worlds at once: each step becomes frames, which depend on what came out of the last one, and what
//! comes out of both worlds is compared.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxier_tests::{packets::protocol, tap::Frame};

use crate::{
    compare::{Difference, Tally, judge, reassembled},
    frame::{self, Way},
    meant::Case,
    model::{self, Conversation, ip_of},
    packet::{Located, addresses, checksum_offset, seal, word},
    script::{Distortion, ErrorShape, Script, Shape, Side, Step, Talk},
    world::{Map, Outcome, World},
};

/// The two worlds, and what has been compared in them.
pub(crate) struct Stage {
    netfilter: World,
    proxier: World,
    map: Map,
    clients: u32,
    identification: u32,
    pub(crate) tally: Tally,
}

/// Who speaks to whom in a script.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    pub(crate) client: IpAddr,
    pub(crate) external: IpAddr,
    pub(crate) pod: IpAddr,
    pub(crate) router: IpAddr,
    pub(crate) stranger: IpAddr,
    pub(crate) map: Map,
}

/// What has happened so far in a script.
#[derive(Default)]
struct Progress {
    at_pod: Option<Vec<u8>>,
    at_client: Option<Vec<u8>>,
    requests: u8,
    replies: u8,
    /// Next sequence numbers of client and pod.
    sequence: [u32; 2],
    known: Vec<Conversation>,
}

impl Progress {
    /// What a step has changed. What netfilter has not let through it knows nothing of, nor of a connection that has been reset
    /// before it was established: it would take an answer for a conversation of the pod's own.
    /// So pods answer what came out of both worlds.
    fn note(&mut self, step: &Step, sent: &[Frame], netfilter: &Outcome, proxier: &Outcome) {
        match step {
            Step::Request(_) => {
                let translated = sent.iter().map(ip_of).filter(|ip| model::is_understood(ip));
                self.known.extend(translated.filter_map(|ip| model::conversation(ip, Side::Client)));
                if has_reset(sent) {
                    self.at_pod = None;
                } else if !netfilter.pod.is_empty() {
                    self.at_pod = first_of(&proxier.pod).or_else(|| self.at_pod.take());
                }
            }
            Step::Reply(_) => {
                if has_reset(sent) {
                    self.at_pod = None;
                }
                if !netfilter.client.is_empty() {
                    self.at_client = first_of(&proxier.client).or_else(|| self.at_client.take());
                }
            }
            Step::Error(..) | Step::Own(_) | Step::Straight(_) => {}
        }
    }
}

impl Stage {
    pub(crate) fn new(netfilter: World, proxier: World) -> Self {
        let map = proxier.map();
        assert_eq!(format!("{:?}", netfilter.map()), format!("{map:?}"), "two worlds of one kind");
        Self { netfilter, proxier, map, clients: 0, identification: 0, tally: Tally::default() }
    }

    /// Plays a script.
    ///
    /// # Errors
    ///
    /// The first difference that is not meant.
    pub(crate) fn play(&mut self, script: &Script) -> Result<(), Difference> {
        let cast = self.cast(script.v6);
        let mut progress = Progress { sequence: [1_000_000, 9_000_000], ..Progress::default() };
        for (index, step) in script.steps.iter().enumerate() {
            let Some((side, frames)) = self.frames_of(script, step, &cast, &mut progress) else { continue };
            let failed = |error| Difference::broken(&error);
            let netfilter = self.netfilter.inject(side, &frames).map_err(failed)?;
            let proxier = self.proxier.inject(side, &frames).map_err(failed)?;
            let case = Case { script, step, side, frames: &frames, cast: &cast, known: &progress.known };
            judge(&case, &netfilter, &proxier, &mut self.tally)
                .map_err(|difference| difference.at(index, step))?;
            progress.note(step, &frames, &netfilter, &proxier);
        }
        Ok(())
    }

    /// Addresses for a script: a client that nobody has spoken with.
    fn cast(&mut self, v6: bool) -> Cast {
        self.clients += 1;
        let family = usize::from(v6);
        let number = self.clients;
        let (client, router, stranger) = if v6 {
            let of = |net: u128, host: u32| {
                IpAddr::from(Ipv6Addr::from((0xfd00_u128 << 112) | (net << 96) | u128::from(host)))
            };
            (of(2, number), of(9, 7), of(9, 8))
        } else {
            // Addresses for carriers' own use (RFC 6598), and for documentation.
            let client = Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + number);
            (client.into(), Ipv4Addr::new(198, 51, 100, 7).into(), Ipv4Addr::new(198, 51, 100, 8).into())
        };
        let Map { externals, pods, .. } = self.map;
        Cast { client, external: externals[family], pod: pods[family], router, stranger, map: self.map }
    }

    fn way(&mut self, cast: &Cast, side: Side, source: IpAddr, destination: IpAddr) -> Way {
        self.identification = self.identification.wrapping_add(0x0001_0003);
        let [client, uplink, pod, link] = cast.map.macs;
        let (from_mac, to_mac) = if side == Side::Client { (client, uplink) } else { (pod, link) };
        Way { from_mac, to_mac, source, destination, identification: self.identification }
    }

    /// What to send and where. `None`: there is nothing to answer.
    fn frames_of(
        &mut self,
        script: &Script,
        step: &Step,
        cast: &Cast,
        progress: &mut Progress,
    ) -> Option<(Side, Vec<Frame>)> {
        let number = script.talk.number(script.v6);
        match step {
            Step::Request(shape) => {
                let way = self.way(cast, Side::Client, cast.client, cast.external);
                let ports = (script.client_port, script.pod_port);
                let segment = segment(script, shape, Side::Client, ports, progress);
                Some((Side::Client, sealed(shape, &way, number, segment)))
            }
            Step::Reply(shape) => {
                let received = progress.at_pod.as_ref()?;
                let located = Located::of(received)?;
                let (client, pod) = addresses(received)?;
                let way = self.way(cast, Side::Pod, pod, client);
                let ports = match (script.talk, located.payload(received)) {
                    (Talk::Query(_), [_, _, _, _, a, b, ..]) => (u16::from_be_bytes([*a, *b]), 0),
                    (_, [a, b, c, d, ..]) => (u16::from_be_bytes([*c, *d]), u16::from_be_bytes([*a, *b])),
                    _ => (script.pod_port, script.client_port),
                };
                let segment = segment(script, shape, Side::Pod, ports, progress);
                Some((Side::Pod, sealed(shape, &way, number, segment)))
            }
            Step::Error(Side::Pod, shape) => {
                let quoted = progress.at_pod.as_ref()?;
                let source = if shape.from_router { cast.router } else { cast.pod };
                let way = self.way(cast, Side::Pod, source, cast.client);
                Some((Side::Pod, error(shape, &way, cast, quoted)))
            }
            Step::Error(Side::Client, shape) => {
                let quoted = progress.at_client.as_ref()?;
                let source = if shape.from_router { cast.router } else { cast.client };
                let way = self.way(cast, Side::Client, source, cast.external);
                Some((Side::Client, error(shape, &way, cast, quoted)))
            }
            Step::Own(shape) => {
                let way = self.way(cast, Side::Pod, cast.pod, cast.client);
                let ports = (script.pod_port ^ 0x4000, script.client_port ^ 0x4000);
                let segment = segment(script, shape, Side::Client, ports, &mut Progress::default());
                Some((Side::Pod, sealed(shape, &way, number, segment)))
            }
            Step::Straight(shape) => {
                let way = self.way(cast, Side::Client, cast.client, cast.pod);
                let ports = (script.client_port ^ 0x2000, script.pod_port ^ 0x2000);
                let segment = segment(script, shape, Side::Client, ports, &mut Progress::default());
                Some((Side::Client, sealed(shape, &way, number, segment)))
            }
        }
    }
}

/// The packet that a host answers: not a later fragment, which nobody does (RFC 1122, section 3.2.2).
fn first_of(frames: &[Frame]) -> Option<Vec<u8>> {
    let mut packets = frames.iter().map(ip_of);
    let first = packets.find(|ip| Located::of(ip).is_some_and(|located| located.has_transport()))?;
    Some(first.to_vec())
}

fn has_reset(frames: &[Frame]) -> bool {
    reassembled(frames.iter().map(model::bare).collect()).iter().map(ip_of).any(|ip| {
        let tcp = Located::of(ip).filter(|located| located.protocol == protocol::TCP);
        let flags = tcp.and_then(|located| ip.get(located.transport + 13));
        flags.is_some_and(|flags| flags & 0x04 != 0)
    })
}

fn sealed(shape: &Shape, way: &Way, number: u8, mut segment: Vec<u8>) -> Vec<Frame> {
    seal(way.source, way.destination, number, &mut segment);
    frame::of_shape(shape, way, number, segment)
}

impl Talk {
    /// Its protocol's number.
    pub(crate) const fn number(self, v6: bool) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
            Self::UdpLite(_) => protocol::UDPLITE,
            Self::Sctp => protocol::SCTP,
            Self::Dccp => protocol::DCCP,
            Self::Query(_) if v6 => protocol::ICMPV6,
            Self::Query(_) => protocol::ICMP,
            Self::Gre(_) => protocol::GRE,
            Self::Esp => protocol::ESP,
            Self::Other(number) => number,
        }
    }

    /// Types of a query and of its answer.
    const fn query(which: u8, v6: bool) -> (u8, u8) {
        match (v6, which % 4) {
            (false, 0) => (8, 0),
            (false, 1) => (13, 14),
            (false, 2) => (15, 16),
            (false, _) => (17, 18),
            (true, 0 | 1) => (128, 129),
            (true, _) => (139, 140),
        }
    }
}

/// Transport header and data, all but the checksum.
fn segment(
    script: &Script,
    shape: &Shape,
    side: Side,
    (source, destination): (u16, u16),
    progress: &mut Progress,
) -> Vec<u8> {
    let from_client = side == Side::Client;
    let data = data(shape.segment.size, script.client_port);
    let turn = if from_client { &mut progress.requests } else { &mut progress.replies };
    let nth = *turn;
    *turn = turn.saturating_add(1);
    let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    match script.talk {
        Talk::Tcp => {
            let (own, other) = if from_client { (0, 1) } else { (1, 0) };
            let flags = shape.segment.flags.unwrap_or(match (from_client, nth) {
                (true, 0) => 0x02,
                (false, 0) => 0x12,
                _ => 0x18,
            });
            let words = 5 + (shape.segment.options.len() / 4) as u8;
            bytes.extend(progress.sequence[own].to_be_bytes());
            let acknowledged = if flags & 0x10 == 0 { 0 } else { progress.sequence[other] };
            bytes.extend(acknowledged.to_be_bytes());
            bytes.extend([words << 4, flags, 0xff, 0x00, 0, 0, 0, 0]);
            bytes.extend(&shape.segment.options);
            let length = data.len() as u32 + u32::from(flags & 0x03 != 0);
            progress.sequence[own] = progress.sequence[own].wrapping_add(length);
        }
        Talk::Udp => {
            bytes.extend((8 + data.len() as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        Talk::UdpLite(coverage) => {
            let coverage = if coverage == 0 { 0 } else { coverage.clamp(8, 8 + data.len() as u16) };
            bytes.extend(coverage.to_be_bytes());
            bytes.extend([0, 0]);
        }
        Talk::Sctp => {
            bytes.extend(sctp(from_client, shape.segment.flags, nth, &data));
            return bytes;
        }
        Talk::Dccp => {
            let kind = shape.segment.flags.unwrap_or(match (from_client, nth) {
                (true, 0) => 0,
                (false, 0) => 1,
                (_, 1) => 3,
                _ => 4,
            });
            // Everything but a request acknowledges something (RFC 4340, section 5.1).
            let words = if kind == 0 { 5 } else { 7 };
            bytes.extend([words, 0, 0, 0, kind << 1 | 1, 0, 0, 0, 0, 0, 0, 7]);
            bytes.extend(if kind == 0 { vec![] } else { vec![0, 0, 0, 0, 0, 0, 0, 7] });
            bytes.extend(b"prox");
        }
        Talk::Query(which) => {
            let (query, answer) = Talk::query(which, script.v6);
            bytes = vec![if from_client { query } else { answer }, shape.segment.flags.unwrap_or(0), 0, 0];
            bytes.extend(source.to_be_bytes());
            bytes.extend([0, nth]);
        }
        Talk::Gre(None) => bytes = vec![0x20, 0, 0x88, 0xb5, 0, 0, 0, 5],
        Talk::Gre(Some(call)) => {
            bytes = vec![0x20, 0x01, 0x88, 0x0b];
            bytes.extend((data.len() as u16).to_be_bytes());
            bytes.extend(call.to_be_bytes());
        }
        Talk::Esp => bytes = vec![0, 0, 0x10, 0, 0, 0, 0, nth],
        Talk::Other(_) => bytes.clear(),
    }
    bytes.extend(data);
    bytes
}

/// SCTP behind its ports: tag, checksum, one chunk (RFC 9260, section 3).
fn sctp(from_client: bool, chunk: Option<u8>, nth: u8, data: &[u8]) -> Vec<u8> {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    const COOKIE_ECHO: u8 = 10;
    const COOKIE_ACK: u8 = 11;
    let kind = chunk.unwrap_or(match (from_client, nth) {
        (true, 0) => INIT,
        (false, 0) => INIT_ACK,
        (true, 1) => COOKIE_ECHO,
        (false, 1) => COOKIE_ACK,
        _ => 0,
    });
    let tags: [&[u8; 4]; 2] = [b"clnt", b"poda"];
    let (own, other) = if from_client { (tags[0], tags[1]) } else { (tags[1], tags[0]) };
    let body = match kind {
        INIT | INIT_ACK => [&own[..], &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat(),
        0 => [&[0, 0, 0, nth, 0, 0, 0, 0, 0, 0, 0, 0], data].concat(),
        COOKIE_ACK => Vec::new(),
        _ => data.to_vec(),
    };
    let mut bytes = if kind == INIT { vec![0; 4] } else { other.to_vec() };
    bytes.extend([0; 4]);
    bytes.extend([kind, if kind == 0 { 3 } else { 0 }]);
    bytes.extend((4 + body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Bytes that differ from place to place, so that any that moves is noticed.
fn data(size: u16, salt: u16) -> Vec<u8> {
    let byte = |at: u16| (u32::from(at).wrapping_mul(31) ^ u32::from(at >> 8) ^ u32::from(salt)) as u8;
    (0..size).map(byte).collect()
}

/// An ICMP error about `quoted`.
fn error(shape: &ErrorShape, way: &Way, cast: &Cast, quoted: &[u8]) -> Vec<Frame> {
    let number = if way.source.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
    let mut quote = quoted.to_vec();
    distort(shape.distortion, cast, &mut quote);
    quote.truncate(shape.quote.into());
    let mut segment = vec![shape.kind.0, shape.kind.1, 0, 0];
    segment.extend(shape.rest.to_be_bytes());
    segment.extend(quote);
    seal(way.source, way.destination, number, &mut segment);
    frame::of_error(shape, way, number, segment)
}

fn distort(distortion: Distortion, cast: &Cast, quote: &mut [u8]) {
    let Some(located) = Located::of(quote) else { return };
    let (hop_limit, source) = if located.v6 { (7, 8) } else { (8, 12) };
    let length = if located.v6 { 16 } else { 4 };
    let at = located.transport + checksum_offset(located.protocol).unwrap_or(0);
    match distortion {
        Distortion::Travelled => {
            quote[hop_limit] = 1;
            quote[1] ^= 0x10;
        }
        Distortion::Checksum(bits) if word(quote, at).is_some() => {
            quote[at] ^= (bits >> 8) as u8;
            quote[at + 1] ^= (bits & 0xff) as u8;
        }
        Distortion::NoChecksum if word(quote, at).is_some() => quote[at..at + 2].fill(0),
        Distortion::Ports(bits) if quote.len() >= located.transport + 4 => {
            quote[located.transport + 1] ^= (bits & 0xff) as u8;
            quote[located.transport + 3] ^= (bits >> 8) as u8;
        }
        Distortion::Swapped => {
            let (source, destination) = quote[source..source + 2 * length].split_at_mut(length);
            source.swap_with_slice(destination);
        }
        Distortion::Stranger => {
            let stranger = crate::packet::octets(cast.stranger);
            quote[source..source + length].copy_from_slice(&stranger);
        }
        _ => {}
    }
}
