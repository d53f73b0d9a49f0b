//! The core on tables of two Services, one of each family, and what it has promised so far: everything that a packet
//! does is held against that. All that the harness needs of the core's interface is used here.

use std::{collections::BTreeMap, net::IpAddr};

use proxier_common::{
    BackendKey, DELIVERY_NODE, DELIVERY_STACK, DropReason, ExternalKey, MemberKey, SERVICE_BALANCE_FLOW,
    SERVICE_IS_NODE, SERVICE_PASS_WITHOUT_BACKEND, ServiceValue, SourceKey, timeout::SECOND,
};
use proxier_ebpf::{
    Origin, Verdict,
    host::{HostPacket, HostTables},
};

use super::{
    common::{self, BOTH, DCCP, GRE, ICMP, Net, SCTP, SERVICE_ID, TCP, UDP, UDPLITE, know_pod, plain},
    judge::{assert_same, assert_wholly_rewritten},
    wire::{Body, Piece, Topic, Wire, reflected},
};

/// Where a packet comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Outside,
    Pod,
    Node,
}

impl From {
    pub const ALL: [Self; 3] = [Self::Outside, Self::Pod, Self::Node];

    fn origin(self) -> Origin {
        match self {
            Self::Outside => Origin::Outside,
            Self::Pod => Origin::Pod,
            Self::Node => Origin::Node,
        }
    }

    fn delivery(self) -> u8 {
        if self == Self::Node { DELIVERY_NODE } else { DELIVERY_STACK }
    }
}

/// Where a packet leaves, to a client of which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// The node's stack, where it leaves.
    Outside,
    /// A process of the node, from a pod's link.
    Node,
}

impl To {
    fn delivery(self) -> u8 {
        if self == Self::Node { DELIVERY_NODE } else { DELIVERY_STACK }
    }
}

/// What a Service is like, beside its pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Conversations are spread, not clients.
    pub balance_flow: bool,
    /// Without a pod, packets are left to others.
    pub pass: bool,
    /// Only one external address leads to the pods.
    pub alone: bool,
    /// Only one client may send.
    pub ranges: bool,
}

/// An address as it lies in a packet, 4 or 16 bytes.
type Bytes = Vec<u8>;

/// A conversation as its pod knows it: pod, client, and what the client sends.
type Talk = (Bytes, Bytes, Topic);

/// What a conversation's reply must become.
#[derive(Clone, Debug)]
struct Promise {
    external: Bytes,
    delivery: u8,
    /// Not if a packet straight to the pod may have ended it.
    certain: bool,
}

/// A packet of a pod in pieces: its addresses, identification, and protocol where that counts.
type Pieces = (Bytes, Bytes, u32, u8);

pub struct World {
    tables: HostTables,
    /// What the agent of each family has written; one agent's tables are the tests' [`common::tables`].
    written: [HostTables; 2],
    settings: [Settings; 2],
    generation: u32,
    /// Whether the table of flows has given up all it had.
    evicted: bool,
    promises: BTreeMap<Talk, Promise>,
    /// What the first fragment became, and when.
    pieces: BTreeMap<Pieces, (Bytes, u64)>,
    /// The last packet that went to a pod: as it came, and as the pod got it, and where its answer goes.
    last: Option<(Vec<u8>, Vec<u8>, To)>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Both external addresses of each family lead to both its pods.
    pub fn new() -> Self {
        let written = BOTH.map(|net| {
            let tables = common::tables(&[net.external, net.other_external], &[net.pod, net.other_pod]);
            know_pod(&tables, net.pod);
            know_pod(&tables, net.other_pod);
            let of_node = ServiceValue {
                flags: SERVICE_IS_NODE,
                service_id: 0,
                ..*tables.services.borrow().values().next().expect("a Service")
            };
            tables.services.borrow_mut().insert(ExternalKey { external: node(&net).into() }, of_node);
            tables
        });
        let world = Self {
            tables: HostTables::default(),
            written,
            settings: [Settings::default(); 2],
            generation: 1,
            evicted: false,
            promises: BTreeMap::new(),
            pieces: BTreeMap::new(),
            last: None,
        };
        world.tables.now.set(world.written[0].now.get());
        world.publish();
        world
    }

    /// Both agents' tables become those of the core. Their Services have one number, which the core may not see.
    fn publish(&self) {
        let mut services = self.tables.services.borrow_mut();
        let mut backends = self.tables.backends.borrow_mut();
        let mut members = self.tables.members.borrow_mut();
        let mut pods = self.tables.pods.borrow_mut();
        let mut sources = self.tables.sources.borrow_mut();
        services.clear();
        backends.clear();
        members.clear();
        pods.clear();
        sources.clear();
        for (service_id, written) in (SERVICE_ID..).zip(&self.written) {
            let number = |value: &ServiceValue| ServiceValue {
                service_id: if value.service_id == SERVICE_ID { service_id } else { value.service_id },
                ..*value
            };
            services.extend(written.services.borrow().iter().map(|(key, value)| (*key, number(value))));
            let all = written.backends.borrow();
            backends.extend(all.iter().map(|(key, value)| (BackendKey { service_id, ..*key }, *value)));
            let all = written.members.borrow();
            members.extend(all.iter().map(|(key, value)| (MemberKey { service_id, ..*key }, *value)));
            let all = written.sources.borrow();
            sources.extend(all.iter().map(|(bits, key)| (*bits, SourceKey { service_id, ..*key })));
            pods.extend(written.pods.borrow().iter().map(|(key, value)| (*key, *value)));
        }
    }

    /// The next generation of a family's Service: these pods, which may be none.
    pub fn set_pods(&mut self, net: &Net, pods: &[IpAddr], settings: Settings) {
        let index = usize::from(net.icmp != ICMP);
        self.settings[index] = settings;
        self.generation += 1;
        let written = &self.written[index];
        let externals = [net.external, net.other_external];
        let externals = &externals[..if settings.alone { 1 } else { 2 }];
        common::set_pods(written, externals, pods, self.generation);
        if settings.alone {
            written.services.borrow_mut().remove(&ExternalKey { external: net.other_external.into() });
        }
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(settings.balance_flow, SERVICE_BALANCE_FLOW)
            | flag(settings.pass, SERVICE_PASS_WITHOUT_BACKEND);
        for external in externals {
            let key = ExternalKey { external: (*external).into() };
            if let Some(service) = written.services.borrow_mut().get_mut(&key) {
                service.flags = flags;
                service.source_generation = u32::from(settings.ranges);
            }
        }
        for pod in written.pods.borrow_mut().values_mut() {
            pod.flags = flags;
        }
        let client = SourceKey { service_id: SERVICE_ID, generation: 1, address: net.client.into() };
        *written.sources.borrow_mut() = vec![(SourceKey::BITS, client)];
        self.publish();
    }

    /// A pod takes no new conversations.
    pub fn drain(&mut self, net: &Net, pod: IpAddr) {
        common::drain(&self.written[usize::from(net.icmp != ICMP)], pod);
        self.publish();
    }

    /// The table of flows gives up all that it has.
    pub fn evict(&mut self) {
        self.tables.flows.borrow_mut().clear();
        self.promises.clear();
        self.evicted = true;
    }

    pub fn wait(&mut self, nanoseconds: u64) {
        self.tables.now.set(self.tables.now.get().saturating_add(nanoseconds));
    }

    /// Whether the table of flows takes no more.
    pub fn set_full(&mut self, full: bool) {
        self.tables.flows_full.set(full);
    }

    /// One conversation of a family's client, and of its node, for each protocol, with port 443, or identifier 9.
    pub fn open_conversations(&mut self, net: &Net) {
        let query = if net.icmp == ICMP { 8 } else { 128 };
        let echo = [(net.icmp, (query, 9))];
        let talks = [TCP, UDP, UDPLITE, SCTP, DCCP, GRE].map(|protocol| (protocol, (40_000, 443)));
        for (client, from) in [(net.client, From::Outside), (node(net), From::Node)] {
            for (protocol, ports) in talks.into_iter().chain(echo) {
                let mut packet = plain(client, net.external, protocol, ports);
                let verdict = proxier_ebpf::request(&mut packet, &self.tables, from.origin());
                // Packets like these are judged elsewhere, and before every run of a fuzzer that would be most of its work.
                assert_eq!(verdict, Verdict::Rewritten);
                let wire = Wire::in_frame(&packet.bytes).expect("an IP packet");
                let topic = wire.topic(&packet.bytes).expect("a request");
                let talk = (packet.bytes[wire.destination()].to_vec(), octets(client), topic);
                let external = octets(net.external);
                self.promises.insert(talk, Promise { external, delivery: from.delivery(), certain: true });
            }
        }
    }

    /// A packet that comes in: what is decided, and what becomes of it.
    pub fn request(&mut self, before: &[u8], from: From) -> (Verdict, Vec<u8>) {
        let mut packet = HostPacket::new(before.to_vec());
        self.tables.lookups.set(0);
        let verdict = proxier_ebpf::request(&mut packet, &self.tables, from.origin());
        let after = packet.bytes;
        let wire = Wire::in_frame(before);
        match verdict {
            Verdict::Next => {
                assert_eq!(before, &after[..], "{verdict:?}, and changed");
                if let Some(wire) = wire {
                    self.assert_not_ours(before, &wire, from);
                }
            }
            Verdict::ToNode => {
                assert_eq!(before, &after[..], "{verdict:?}, and changed");
                assert_eq!(from, From::Pod);
                let wire = wire.expect("a packet to the node has an address");
                assert!(BOTH.iter().any(|net| octets(node(net)) == before[wire.destination()]));
                return self.reply(before, To::Node);
            }
            Verdict::Drop(reason) => {
                assert_eq!(before, &after[..], "{verdict:?}, and changed");
                assert_ne!(reason, DropReason::RewriteFailed, "written where nothing was read");
                assert_ne!(reason, DropReason::BackendMissing, "every slot has a backend");
                let wire = wire.expect("a packet that is dropped has an address");
                assert!(is_external(&before[wire.destination()]), "{reason:?} of somebody else's packet");
            }
            Verdict::Rewritten => {
                let wire = wire.expect("a packet that is rewritten has an address");
                self.assert_request_rewritten(before, &after, &wire, from.delivery());
            }
            Verdict::Forward | Verdict::ForwardIntoPod | Verdict::Direct | Verdict::FromUplink => {
                panic!("{verdict:?} where no Service is delivered so")
            }
            Verdict::Hairpin => {
                assert_ne!(from, From::Outside, "only who is on this node gets a packet back");
                assert_turned_round(
                    before,
                    &after,
                    &wire.expect("a packet that is rewritten has an address"),
                );
            }
        }
        (verdict, after)
    }

    /// The core left a packet alone: that is right for what is for nobody here, which may cost one look-up, and for
    /// neighbour discovery.
    fn assert_not_ours(&mut self, bytes: &[u8], wire: &Wire, from: From) {
        let destination = &bytes[wire.destination()];
        if self.is_served(destination) {
            let pass = self.settings[usize::from(wire.v6)].pass;
            // No answer would find back to an address that is none of the node's.
            let is_nowhere =
                from == From::Node && !BOTH.iter().any(|net| octets(node(net)) == bytes[wire.source()]);
            assert!(
                pass || is_nowhere || wire.is_neighbour_discovery(bytes),
                "for an external address, and left to others"
            );
        } else if is_pod(destination) {
            self.forget(bytes, wire);
        } else {
            assert!(self.tables.lookups.get() <= 1, "{} look-ups for nothing", self.tables.lookups.get());
        }
    }

    /// Whether an external address is one of a Service right now.
    fn is_served(&self, address: &[u8]) -> bool {
        let alone = |net: &Net| self.settings[usize::from(net.icmp != ICMP)].alone;
        is_external(address) && !BOTH.iter().any(|net| alone(net) && octets(net.other_external) == address)
    }

    /// A packet straight to a pod ends an earlier conversation with the same ports; of TCP, only sometimes.
    fn forget(&mut self, bytes: &[u8], wire: &Wire) {
        let Some(topic) = wire.topic(bytes).filter(Topic::asks) else { return };
        let talk = (bytes[wire.destination()].to_vec(), bytes[wire.source()].to_vec(), topic);
        if let Some(promise) = self.promises.get_mut(&talk) {
            promise.certain = false;
        }
    }

    fn assert_request_rewritten(&mut self, before: &[u8], after: &[u8], wire: &Wire, delivery: u8) {
        let body = wire.body.as_ref().expect("what is rewritten was understood");
        let (external, pod) = (&before[wire.destination()], &after[wire.destination()]);
        assert!(is_external(external), "somebody else's packet");
        assert!(is_pod(pod), "to no pod: {pod:?}");
        assert!(!wire.is_neighbour_discovery(before));
        let mut changed = vec![wire.destination()];
        if wire.is_error(before) {
            // About a reply that left from the external address: the pod knows it as its own.
            let quote = wire.quote(before).expect("an error of which the quote was understood");
            let topic = quote.topic(before).expect("a quote that is about something");
            assert_eq!(&before[quote.source()], external, "about another conversation");
            assert_eq!(&after[quote.source()], pod, "outer and quoted address differ");
            let talk = (pod.to_vec(), before[quote.destination()].to_vec(), topic.reversed());
            let promise = self.promises.get(&talk).expect("about a conversation that there is");
            assert_eq!(promise.external, external, "about another conversation");
            assert_eq!(promise.delivery, delivery, "of somebody elsewhere");
            assert!(!wire.is_redirect(before), "a redirect");
            changed.push(quote.source());
        } else if let Some(topic) = wire.topic(before).filter(Topic::asks) {
            let talk = (pod.to_vec(), before[wire.source()].to_vec(), topic);
            self.promises.insert(talk, Promise { external: external.to_vec(), delivery, certain: true });
            let to = if delivery == DELIVERY_NODE { To::Node } else { To::Outside };
            self.last = Some((before.to_vec(), after.to_vec(), to));
        } else {
            assert!(body.piece == Piece::Later || matches!(body.protocol, ICMP | common::ICMPV6));
        }
        assert_wholly_rewritten(before, after, &changed);
    }

    /// A packet that leaves: what is decided, and what becomes of it.
    pub fn reply(&mut self, before: &[u8], to: To) -> (Verdict, Vec<u8>) {
        let mut packet = HostPacket::new(before.to_vec());
        self.tables.lookups.set(0);
        let verdict = proxier_ebpf::reply(&mut packet, &self.tables, to.delivery());
        let after = packet.bytes;
        let wire = Wire::in_frame(before);
        let promise = wire.as_ref().and_then(|wire| self.promise_to_client(before, wire, to));
        match verdict {
            Verdict::Next => {
                assert_eq!(before, &after[..], "{verdict:?}, and changed");
                let kept = promise.is_none_or(|promise| !promise.certain);
                assert!(kept, "a reply, and left with the pod's address");
                let of_pod =
                    wire.as_ref().is_some_and(|wire| is_pod(&before[wire.source()]) || wire.is_error(before));
                assert!(
                    of_pod || self.tables.lookups.get() <= 1,
                    "{} look-ups for nothing",
                    self.tables.lookups.get()
                );
            }
            Verdict::Drop(reason) => {
                assert_eq!(before, &after[..], "{verdict:?}, and changed");
                assert_eq!(reason, DropReason::IcmpRedirect);
                let wire = wire.as_ref().expect("a packet that is dropped has an address");
                let about_pod = wire.advised(before).is_some_and(|address| is_pod(&before[address]));
                assert!(about_pod || promise.is_some() && wire.is_redirect(before));
            }
            Verdict::Rewritten => {
                let wire = wire.as_ref().expect("a packet that is rewritten has an address");
                let external = after[wire.source()].to_vec();
                match promise {
                    Some(promise) => assert_eq!(external, promise.external, "of another external address"),
                    None => self.assert_rebuilt(before, &external, wire, to),
                }
                let mut changed = vec![wire.source()];
                if let Some(quote) = wire.quote(before) {
                    assert!(!wire.is_redirect(before), "a redirect");
                    assert_eq!(&after[quote.destination()], external, "outer and quoted address differ");
                    changed.push(quote.destination());
                }
                assert_wholly_rewritten(before, &after, &changed);
            }
            Verdict::Hairpin
            | Verdict::ToNode
            | Verdict::Forward
            | Verdict::ForwardIntoPod
            | Verdict::Direct
            | Verdict::FromUplink => {
                panic!("{verdict:?} of a packet that leaves")
            }
        }
        if let Some(wire) = &wire {
            self.remember_first_fragment(before, &after, wire);
        }
        (verdict, after)
    }

    /// A reply without a flow: only of TCP, once flows were given up, and of a pod with one external address.
    fn assert_rebuilt(&mut self, bytes: &[u8], external: &[u8], wire: &Wire, to: To) {
        let topic = wire.topic(bytes).filter(|_| self.evicted).filter(|topic| topic.protocol == TCP);
        let topic = topic.expect("a reply to somebody who spoke to an external address");
        assert!(is_external(external) && is_pod(&bytes[wire.source()]));
        let talk = (bytes[wire.source()].to_vec(), bytes[wire.destination()].to_vec(), topic.reversed());
        let promise = Promise { external: external.to_vec(), delivery: to.delivery(), certain: true };
        self.promises.insert(talk, promise);
    }

    /// What a packet that leaves must become, if anything.
    fn promise_to_client(&self, bytes: &[u8], wire: &Wire, to: To) -> Option<Promise> {
        let body = wire.body.as_ref()?;
        let (pod, client) = (bytes[wire.source()].to_vec(), bytes[wire.destination()].to_vec());
        let of_delivery = |promise: &Promise| promise.delivery == to.delivery();
        if wire.is_error(bytes) {
            // About a request as the pod got it, or was to get it.
            let quote = wire.quote(bytes)?;
            let topic = quote.topic(bytes).filter(Topic::asks)?;
            if bytes[quote.source()] != client {
                return None;
            }
            let talk = (bytes[quote.destination()].to_vec(), bytes[quote.source()].to_vec(), topic);
            return self.promises.get(&talk).filter(|promise| of_delivery(promise)).cloned();
        }
        // Its flows are swept when a pod goes.
        if !self.tables.pods.borrow().keys().any(|key| octets(key.pod.to_ip()) == pod) {
            return None;
        }
        if body.piece == Piece::Later {
            let (external, since) = self.pieces.get(&pieces(bytes, wire, body)).cloned()?;
            let in_time = self.tables.now.get() - since <= 60 * SECOND;
            return in_time.then_some(Promise { external, delivery: to.delivery(), certain: true });
        }
        let topic = wire.topic(bytes).filter(Topic::replies)?;
        let promise =
            self.promises.get(&(pod, client, topic.reversed())).filter(|promise| of_delivery(promise))?;
        // A SYN of the pod may be the start of a connection of its own.
        let opens = wire.tcp_flags(bytes) & 0x02 != 0;
        Some(Promise { certain: promise.certain && !opens, ..promise.clone() })
    }

    /// The rest of a packet follows its first fragment.
    fn remember_first_fragment(&mut self, before: &[u8], after: &[u8], wire: &Wire) {
        let Some(body) = wire.body.as_ref().filter(|body| body.piece == Piece::First) else { return };
        // Errors in pieces are nobody's.
        if !wire.has_header() || wire.is_error(before) {
            return;
        }
        let key = pieces(before, wire, body);
        if before == after {
            self.pieces.remove(&key);
        } else {
            self.pieces.insert(key, (after[wire.source()].to_vec(), self.tables.now.get()));
        }
    }

    /// The pod sends the last packet that it got back as it is. What its client gets then is what it sent.
    pub fn send_back(&mut self) {
        let Some((original, received, to)) = self.last.clone() else { return };
        let sent_back = reflected(&received).expect("a packet about something");
        let (verdict, got) = self.reply(&sent_back, to);
        if verdict == Verdict::Rewritten && self.is_of(&got, &original) {
            assert_same(&reflected(&got).expect("reflected once already"), &original);
        }
    }

    /// Whether a reply comes from where the request went to. Another request may have had the same ports since.
    fn is_of(&self, reply: &[u8], request: &[u8]) -> bool {
        let address = |bytes: &[u8], range: fn(&Wire) -> std::ops::Range<usize>| {
            Wire::in_frame(bytes).map(|wire| bytes[range(&wire)].to_vec())
        };
        address(reply, Wire::source) == address(request, Wire::destination)
    }
}

fn pieces(bytes: &[u8], wire: &Wire, body: &Body) -> Pieces {
    let protocol = if wire.v6 { 0 } else { body.protocol };
    (bytes[wire.source()].to_vec(), bytes[wire.destination()].to_vec(), body.identification, protocol)
}

/// A packet of a pod to itself came back to it as one from the external address; so did the packet that it quotes.
fn assert_turned_round(before: &[u8], after: &[u8], wire: &Wire) {
    assert!(is_external(&before[wire.destination()]), "somebody else's packet");
    assert!(is_pod(&before[wire.source()]), "from no pod");
    let mut changed = Vec::new();
    for wire in [Some(wire), wire.quote(before).as_ref()].into_iter().flatten() {
        assert_eq!(before[wire.source()], after[wire.destination()], "to another than who sent it");
        assert_eq!(before[wire.destination()], after[wire.source()], "from another than who it was sent to");
        changed.extend([wire.source(), wire.destination()]);
    }
    assert_wholly_rewritten(before, after, &changed);
}

fn is_external(address: &[u8]) -> bool {
    BOTH.iter()
        .any(|net| [net.external, net.other_external].iter().any(|external| octets(*external) == address))
}

fn is_pod(address: &[u8]) -> bool {
    BOTH.iter().any(|net| [net.pod, net.other_pod].iter().any(|pod| octets(*pod) == address))
}

/// One of the node's own addresses.
pub fn node(net: &Net) -> IpAddr {
    common::client(net, 8)
}

fn octets(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
