//! The table of flows, filled far beyond its size: new conversations win, and of those that were given up for them the replies
//! that can only mean one thing still leave with the external address.

#![allow(
    clippy::unwrap_used,
    reason = "a test file, all of it; the lint knows tests only by their attribute"
)]

// As in kernel_programs.rs.
#[path = "../../proxier-ebpf/tests/common/mod.rs"]
mod common;

use std::net::IpAddr;

use common::*;
use proxier_common::{
    Address, DropReason, FlowKey, Hook, MAX_FLOWS, PodKey, PodValue, SERVICE_BALANCE_FLOW, Statistic,
};
use proxier_ebpf::host::HostPacket;
use proxier_tests::program::{Kernel, TCX_NEXT};

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// More than the table holds, by far more than the kernel evicts at once.
const CONVERSATIONS: u32 = 300_000;
const _: () = assert!(CONVERSATIONS > MAX_FLOWS + MAX_FLOWS / 10);

/// A conversation of a client, and what the two sides send of it.
#[derive(Clone, Copy)]
struct Conversation {
    net: Net,
    client: IpAddr,
    protocol: u8,
    /// The client's and the external one.
    ports: (u16, u16),
}

impl Conversation {
    fn segment(&self, ports: (u16, u16), flags: u8) -> Vec<u8> {
        let mut bytes = segment(self.protocol, ports, b"whatever");
        if self.protocol == TCP {
            bytes[13] = flags;
        }
        bytes
    }

    fn request(&self, flags: u8) -> HostPacket {
        let Self { net, client, protocol, ports } = *self;
        let bytes = seal(client, net.external, protocol, self.segment(ports, flags));
        frame(&Network::default(), client, net.external, protocol, &bytes)
    }

    fn reply(&self, flags: u8) -> HostPacket {
        let Self { net, client, protocol, ports } = *self;
        let bytes = seal(net.pod, client, protocol, self.segment((ports.1, ports.0), flags));
        frame(&Network::default(), net.pod, client, protocol, &bytes)
    }

    fn key(&self) -> FlowKey {
        FlowKey {
            pod: self.net.pod.into(),
            peer: self.client.into(),
            pod_port: self.ports.1.to_be(),
            peer_port: self.ports.0.to_be(),
            protocol: self.protocol,
            query: 0,
            padding: 0,
        }
    }

    /// The client sends.
    fn ask(&self, kernel: &Kernel, flags: u8) {
        let (code, rewritten) = kernel.run("proxier_request", &self.request(flags), 0).unwrap();
        assert_eq!((code, seen(&rewritten).destination), (TCX_NEXT, self.net.pod));
    }

    fn is_noted(&self, kernel: &Kernel) -> bool {
        kernel.flows.get(&self.key(), 0).is_ok()
    }

    /// Where a packet of the pod seems to come from when it leaves the node.
    fn source_of_reply(&self, kernel: &Kernel, flags: u8) -> IpAddr {
        let packet = self.reply(flags);
        let (code, sent) = kernel.run("proxier_reply", &packet, 0).unwrap();
        assert_eq!(code, TCX_NEXT);
        assert_checksums(&sent);
        let source = seen(&sent).source;
        assert!(source != self.net.pod || sent == packet, "what is left alone stays as it is");
        source
    }
}

/// A kernel with a Service of each family.
fn kernel(flags: u32) -> Kernel {
    let mut kernel = Kernel::load();
    for (net, generation) in BOTH.into_iter().zip(1..) {
        let tables = tables(&[], &[]);
        set_pods(&tables, &[net.external], &[net.pod], generation);
        set_flags(&tables, flags);
        kernel.add(&tables);
    }
    kernel
}

/// Opens [`CONVERSATIONS`] more, from many clients and ports, every one of which reaches its pod.
fn fill(kernel: &Kernel) {
    /// Where the client's address ends and where its port is, in a frame with plain headers.
    const PLACES: [(usize, usize); 2] = [(14 + 16, 14 + 20), (14 + 24, 14 + 40)];
    let mut packets = BOTH.map(|net| plain(net.client, net.external, UDP, (0, 5060)));
    for number in 0..CONVERSATIONS {
        let family = number as usize % 2;
        let (address_end, port) = PLACES[family];
        let bytes = &mut packets[family].bytes;
        // Some hundred clients with a thousand ports each. The checksum is nobody's business on the way.
        bytes[address_end - 2..address_end]
            .copy_from_slice(&u16::try_from(0x8000 + number / 1000).unwrap().to_be_bytes());
        bytes[port..port + 2].copy_from_slice(&u16::try_from(10_000 + number % 1000).unwrap().to_be_bytes());
        let (code, rewritten) = kernel.run("proxier_request", &packets[family], 0).unwrap();
        let pod = Address::from(BOTH[family].pod);
        let found = if family == 0 { &rewritten.bytes[30..34] } else { &rewritten.bytes[38..54] };
        assert!(code == TCX_NEXT && pod.bytes.ends_with(found), "conversation {number}: {code}, {found:?}");
    }
}

fn rebuilt(kernel: &Kernel) -> u64 {
    kernel.statistic(Statistic::FlowRebuilt)
}

/// A client that no other test packet comes from.
fn somebody(net: Net, number: u8, protocol: u8, ports: (u16, u16)) -> Conversation {
    Conversation { net, client: client(&net, number), protocol, ports }
}

#[test]
fn new_conversations_win_and_unambiguous_replies_of_old_ones_are_made_good() {
    let mut kernel = kernel(0);
    let of_family = |net: Net| {
        [
            somebody(net, 1, TCP, (40_000, 443)),
            somebody(net, 2, TCP, (40_000, 443)),
            somebody(net, 2, TCP, (40_001, 443)),
            somebody(net, 3, UDP, (40_000, 443)),
            somebody(net, 4, TCP, (40_000, 443)),
        ]
    };
    let old = BOTH.map(of_family);
    old.as_flattened().iter().for_each(|conversation| conversation.ask(&kernel, SYN));
    let in_use = BOTH.map(|net| somebody(net, 5, TCP, (40_000, 443)));
    for conversation in in_use {
        conversation.ask(&kernel, SYN);
        assert_eq!(conversation.source_of_reply(&kernel, ACK), conversation.net.external);
        conversation.ask(&kernel, ACK);
    }
    let opened = (old.as_flattened().len() + in_use.len()) as u64;
    assert_eq!(kernel.statistic(Statistic::FlowInserted), opened);

    fill(&kernel);
    assert_eq!(kernel.statistic(Statistic::FlowInserted), opened + u64::from(CONVERSATIONS));
    for reason in DropReason::ALL {
        assert_eq!(kernel.drops(Hook::UplinkIngress, reason), 0, "{}", reason.name());
    }
    let present = kernel.flows.keys().count();
    assert!(present <= MAX_FLOWS as usize && present > MAX_FLOWS as usize * 9 / 10, "{present} flows");
    // The least recently used go first: a flood of single packets takes none from connections that are at work.
    assert!(in_use.iter().all(|conversation| conversation.is_noted(&kernel)));
    assert!(!old.as_flattened().iter().any(|conversation| conversation.is_noted(&kernel)));

    for [only, former, last, datagrams, of_two] in old {
        let net = only.net;
        let before = rebuilt(&kernel);
        let left_alone = |kernel: &Kernel, conversation: &Conversation, flags, why| {
            assert_eq!(conversation.source_of_reply(kernel, flags), net.pod, "{why}");
            assert!(!conversation.is_noted(kernel), "{why}");
        };
        left_alone(&kernel, &former, ACK, "not the connection that the client opened last");
        left_alone(&kernel, &datagrams, ACK, "a pod may well send datagrams of its own from any port");
        left_alone(&kernel, &only, RST, "nothing is left to be continued");
        left_alone(&kernel, &only, RST | ACK, "nothing is left to be continued");

        // The pod gets a second external address, then loses it again.
        let pod = PodKey { pod: net.pod.into() };
        let value = kernel.pods.get(&pod, 0).unwrap();
        kernel.pods.insert(pod, PodValue { external: Address::UNSPECIFIED, ..value }, 0).unwrap();
        left_alone(&kernel, &of_two, ACK, "either address may be meant");
        kernel.pods.insert(pod, value, 0).unwrap();
        assert_eq!(rebuilt(&kernel), before);

        for (conversation, number) in [only, last, of_two].iter().zip(1..) {
            for _ in 0..2 {
                assert_eq!(conversation.source_of_reply(&kernel, ACK), net.external);
                assert!(conversation.is_noted(&kernel));
                assert_eq!(rebuilt(&kernel), before + number, "the second packet finds the flow");
            }
        }
        left_alone(&kernel, &former, ACK, "still not");
    }
    // A flow that is made again is one that is inserted.
    let made = opened + u64::from(CONVERSATIONS) + rebuilt(&kernel);
    assert_eq!(kernel.statistic(Statistic::FlowInserted), made);
}

#[test]
fn a_pod_that_opens_a_connection_of_its_own_is_not_taken_for_one_that_answers() {
    let mut kernel = kernel(0);
    for net in BOTH {
        let conversation = somebody(net, 1, TCP, (40_000, 443));
        conversation.ask(&kernel, SYN);
        kernel.flows.remove(&conversation.key()).unwrap();
        for flags in [SYN, ACK] {
            assert_eq!(conversation.source_of_reply(&kernel, flags), net.pod, "{flags:#x}");
        }
        assert_eq!(rebuilt(&kernel), 0);
    }
}

#[test]
fn where_conversations_are_spread_every_one_of_a_client_is_made_good() {
    let mut kernel = kernel(SERVICE_BALANCE_FLOW);
    for net in BOTH {
        let both = [somebody(net, 1, TCP, (40_000, 443)), somebody(net, 1, TCP, (40_001, 443))];
        both.iter().for_each(|conversation| conversation.ask(&kernel, SYN));
        for conversation in &both {
            kernel.flows.remove(&conversation.key()).unwrap();
            assert_eq!(conversation.source_of_reply(&kernel, ACK), net.external);
        }
    }
    assert_eq!(rebuilt(&kernel), 4);
}
