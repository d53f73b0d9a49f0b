//! A conversation as bytes: records of one length, so that a fuzzer may change, drop and repeat them, and a person may
//! write them (`examples/seeds.rs`). Few parties and ports, so that they meet again.

use std::net::IpAddr;

use proxier_common::timeout::SECOND;
use proxier_ebpf::{Verdict, host::HostPacket};

use super::{
    common::{
        BOTH, DCCP, ESP, GRE, ICMP, ICMPV6, Net, Network, SCTP, TCP, UDP, UDPLITE, assert_checksums, client,
        error, frame, router, seal, segment,
    },
    world::{From, Settings, To, World, node},
};

/// Steps of a conversation that are taken; what is behind them is not.
pub const MOST: usize = 48;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A client sends to an external address.
    Request,
    /// A pod sends to a client.
    Reply,
    /// The pod that got the last request sends it back.
    SendBack,
    /// Somebody on the way to the client tells the external address of an error.
    ErrorToExternal,
    /// A pod, or somebody on the way to it, tells the client of an error.
    ErrorToClient,
    /// A client sends to a pod's own address.
    Straight,
    /// Time passes.
    Wait,
    /// The Service has other pods, and is another in other ways.
    SetPods,
    /// A pod takes no new conversations.
    Drain,
    /// The table of flows is full, or no longer.
    SetFull,
    /// The table of flows has given up all that it had.
    Evict,
}

impl Action {
    pub const ALL: [Self; 11] = [
        Self::Request,
        Self::Reply,
        Self::SendBack,
        Self::ErrorToExternal,
        Self::ErrorToClient,
        Self::Straight,
        Self::Wait,
        Self::SetPods,
        Self::Drain,
        Self::SetFull,
        Self::Evict,
    ];
}

const PROTOCOLS: [u8; 9] = [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP, ICMP, ICMPV6];

/// What happens, and the packet that does it where one does. Every value of every byte means something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// An [`Action`].
    pub action: u8,
    /// Bit 0: IPv6. Bits 1, 2: where it comes in, or leaves. Bit 3: the other external address. Bit 4: the other pod. Bit 5: the
    /// checksum is zero. Bit 6: the checksum is wrong.
    pub side: u8,
    /// Bits 0 to 2: the client, a [`party`]. Bits 3 to 5: who tells of an error.
    pub who: u8,
    /// One of [`PROTOCOLS`]; from 16 on the number itself.
    pub protocol: u8,
    /// Bits 0 to 3: the client's port. Bits 4 to 7: the pod's.
    pub ports: u8,
    /// TCP's flags. Of ICMP the type, where 0 stands for an echo; of an error which one. Of a Service which pods it has, and
    /// its settings.
    pub kind: u8,
    /// Bits 0 to 4: Ethernet padding. Bits 5 to 7: which [`headers`].
    pub shape: u8,
    /// 0: a whole packet. Bit 0: more fragments. Bits 1 to 3: identification. Bits 4 to 7: offset.
    pub fragment: u8,
    /// Bytes behind the transport header; of an error how many it quotes, where 255 means all.
    pub length: u8,
    /// Bytes missing at the end of the frame.
    pub cut: u8,
    /// Where a byte of the frame is changed.
    pub at: u8,
    /// By what.
    pub change: u8,
}

impl Step {
    /// Bytes of a record.
    pub const LENGTH: usize = 12;

    /// The step in a record of [`Self::LENGTH`] bytes.
    pub fn read(record: &[u8]) -> Option<Self> {
        let &[action, side, who, protocol, ports, kind, shape, fragment, length, cut, at, change] = record
        else {
            return None;
        };
        Some(Self { action, side, who, protocol, ports, kind, shape, fragment, length, cut, at, change })
    }

    /// The record that [`Self::read`] reads.
    #[allow(dead_code, reason = "what writes records is no test")]
    pub fn record(&self) -> [u8; Self::LENGTH] {
        let Self { action, side, who, protocol, ports, kind, shape, fragment, length, cut, at, change } =
            *self;
        [action, side, who, protocol, ports, kind, shape, fragment, length, cut, at, change]
    }

    /// Lets it happen.
    pub fn take(&self, world: &mut World) {
        let net = self.net();
        let (client, pod, external) = (party(&net, self.who & 7), self.pod(), self.external());
        match Action::ALL[usize::from(self.action) % Action::ALL.len()] {
            Action::Request => self.send(world, &self.packet(client, external, true), Way::In(self.from())),
            Action::Reply => self.send(world, &self.packet(pod, client, false), Way::Out(self.to())),
            Action::SendBack => world.send_back(),
            Action::ErrorToExternal => {
                let about = self.packet(external, client, false);
                self.send(world, &self.error(external, &about), Way::In(self.from()));
            }
            Action::ErrorToClient => {
                let about = self.packet(client, pod, true);
                self.send(world, &self.error(client, &about), Way::Out(self.to()));
            }
            Action::Straight => self.send(world, &self.packet(client, pod, true), Way::In(self.from())),
            // Up to nine hours, and small steps around a second.
            Action::Wait => world.wait((u64::from(self.length) * (SECOND / 8)) << (self.kind & 0x0f)),
            Action::SetPods => {
                let pods = [net.pod, net.other_pod];
                let range = [0..2, 0..1, 1..2, 0..0][usize::from(self.kind & 3)].clone();
                let is_set = |bit: u8| self.kind & bit != 0;
                let settings = Settings {
                    balance_flow: is_set(0x10),
                    pass: is_set(0x20),
                    alone: is_set(0x40),
                    ranges: is_set(0x80),
                };
                world.set_pods(&net, &pods[range], settings);
            }
            Action::Drain => world.drain(&net, pod),
            Action::SetFull => world.set_full(self.kind & 1 != 0),
            Action::Evict => world.evict(),
        }
    }

    fn net(&self) -> Net {
        BOTH[usize::from(self.side & 1)]
    }

    fn from(&self) -> From {
        From::ALL[usize::from(self.side >> 1 & 3) % From::ALL.len()]
    }

    fn to(&self) -> To {
        if self.from() == From::Node { To::Node } else { To::Outside }
    }

    fn external(&self) -> IpAddr {
        if self.side & 8 == 0 { self.net().external } else { self.net().other_external }
    }

    fn pod(&self) -> IpAddr {
        if self.side & 16 == 0 { self.net().pod } else { self.net().other_pod }
    }

    /// A packet of the conversation, from the client or to it.
    fn packet(&self, source: IpAddr, destination: IpAddr, from_client: bool) -> HostPacket {
        let protocol = match self.protocol {
            number @ 16.. => number,
            index => PROTOCOLS.get(usize::from(index)).copied().unwrap_or(TCP),
        };
        let (client, pod) = (40_000 + u16::from(self.ports & 15), 443 + u16::from(self.ports >> 4));
        let ports = match (protocol, from_client) {
            (ICMP | ICMPV6, _) => (self.icmp_type(protocol, from_client).into(), client),
            (_, true) => (client, pod),
            (_, false) => (pod, client),
        };
        let payload: Vec<u8> = (0..self.length).map(|at| at ^ self.length).collect();
        let mut segment = segment(protocol, ports, &payload);
        if protocol == TCP {
            segment[13] = self.kind;
        }
        let mut segment = seal(source, destination, protocol, segment);
        if let Some(at) = super::common::checksum_offset(protocol) {
            if self.side & 0x20 != 0 {
                segment[at..at + 2].fill(0);
            }
            if self.side & 0x40 != 0 {
                segment[at] ^= 0x55;
            }
        }
        let offset = u16::from(self.fragment >> 4);
        let fragment =
            (self.fragment != 0).then(|| (offset, self.fragment & 1 != 0, u32::from(self.fragment >> 1 & 7)));
        let network = Network { fragment, padding: usize::from(self.shape & 0x1f), ..headers(self.shape) };
        frame(&network, source, destination, protocol, &segment)
    }

    fn icmp_type(&self, protocol: u8, from_client: bool) -> u8 {
        match (self.kind, protocol, from_client) {
            (0, ICMP, true) => 8,
            (0, ICMP, false) => 0,
            (0, _, true) => 128,
            (0, _, false) => 129,
            (kind, ..) => kind,
        }
    }

    fn error(&self, destination: IpAddr, about: &HostPacket) -> HostPacket {
        let kinds = match self.net().icmp {
            ICMP => [(3, 4), (3, 3), (11, 0), (5, 1)],
            _ => [(2, 0), (1, 4), (3, 0), (4, 1)],
        };
        let length = if self.length == 255 { usize::MAX } else { self.length.into() };
        let source = party(&self.net(), self.who >> 3 & 7);
        error(&self.net(), source, destination, kinds[usize::from(self.kind & 3)], about, length)
    }

    /// The packet goes its way, with what the step does to it; it comes in somewhere, or leaves.
    fn send(&self, world: &mut World, packet: &HostPacket, way: Way) {
        let mut bytes = packet.bytes.clone();
        bytes.truncate(bytes.len() - usize::from(self.cut).min(bytes.len()));
        if let Some(byte) = bytes.get_mut(usize::from(self.at)) {
            *byte ^= self.change;
        }
        let as_made = self.cut == 0 && self.change == 0 && self.side & 0x60 == 0;
        // Of other protocols etherparse reads some as extension headers, and of ICMP it wants more than a header. The other
        // family's ICMP is a protocol as any, of which the checksum is not the core's affair.
        let is_echo = PROTOCOLS.get(usize::from(self.protocol)) == Some(&self.net().icmp) && self.kind == 0;
        let readable = self.protocol < 7 || is_echo;
        let whole = as_made && self.fragment == 0 && readable;
        let (verdict, after) = match way {
            Way::In(from) => world.request(&bytes, from),
            Way::Out(to) => world.reply(&bytes, to),
        };
        if whole && matches!(verdict, Verdict::Rewritten | Verdict::Hairpin) {
            assert_checksums(&HostPacket::new(after));
        }
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy)]
enum Way {
    In(From),
    Out(To),
}

/// Somebody who may send.
pub fn party(net: &Net, number: u8) -> IpAddr {
    match number & 7 {
        0 => net.client,
        1 => client(net, 7),
        2 => router(net),
        3 => net.pod,
        4 => net.other_pod,
        5 => net.external,
        6 => net.other_external,
        _ => node(net),
    }
}

/// Headers before the transport header, by the upper three bits.
pub fn headers(shape: u8) -> Network {
    const PADDED: [u8; 7] = [0; 7];
    let number = shape >> 5;
    let vlans = match number {
        1 => vec![5],
        2 => vec![5, 6],
        _ => vec![],
    };
    let options = vec![1; if number == 3 { 40 } else { 0 }];
    let extensions = match number {
        3 => vec![(60, PADDED.to_vec())],
        4 => vec![(0, PADDED.to_vec()), (43, PADDED.to_vec())],
        5 => vec![(51, [vec![4], vec![0x5a; 22]].concat())],
        6 => vec![(60, PADDED.to_vec()); 6],
        // Not in its place yet: one segment is left.
        7 => vec![(43, vec![0, 0, 1, 0, 0, 0, 0])],
        _ => vec![],
    };
    Network { vlans, options, extensions, ..Network::default() }
}
