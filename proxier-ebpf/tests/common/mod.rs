//! Packets with named addresses, tables with a Service in them, and a judge of checksums that shares no code with the
//! packet core.
//!
//! ```text
//!   CLIENT ──> EXTERNAL            (services: EXTERNAL -> slot 0 = POD, slot 1 = OTHER_POD, ...)
//!                 │ request()
//!   CLIENT ──>   POD
//!                 │ reply()
//!   CLIENT <── EXTERNAL
//! ```

#![allow(
    clippy::unwrap_used,
    reason = "lengths and numbers of a few bytes; the lint knows tests only by their attribute"
)]
#![allow(dead_code, unreachable_pub, reason = "each test binary includes it whole and uses a part of it")]

pub mod early;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use internet_checksum::Checksum;
use proxier_common::{
    Address, BackendKey, BackendValue, DELIVERY_STACK, ExternalKey, FlowKey, MEMBER_DRAINING, MemberKey,
    MemberValue, PodKey, PodValue, SERVICE_IS_NODE, SERVICE_IS_POD, ServiceValue, SessionKey,
    timeout::SECOND,
};
use proxier_ebpf::{
    Origin, Tables, Verdict,
    host::{HostFlow, HostPacket, HostTables},
};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const DCCP: u8 = 33;
pub const GRE: u8 = 47;
pub const ESP: u8 = 50;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
pub const SCTP: u8 = 132;
pub const UDPLITE: u8 = 136;

pub const SERVICE_ID: u32 = 7;
pub const AFFINITY_TIMEOUT: u32 = 10_800;

/// The named addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct Net {
    pub client: IpAddr,
    pub external: IpAddr,
    pub other_external: IpAddr,
    pub pod: IpAddr,
    pub other_pod: IpAddr,
    pub icmp: u8,
}

pub const V4: Net = Net {
    client: IpAddr::V4(Ipv4Addr::new(192, 168, 1, 100)),
    external: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 55)),
    other_external: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 56)),
    pod: IpAddr::V4(Ipv4Addr::new(11, 0, 2, 2)),
    other_pod: IpAddr::V4(Ipv4Addr::new(11, 0, 2, 3)),
    icmp: ICMP,
};

pub const V6: Net = Net {
    client: IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x100)),
    external: IpAddr::V6(Ipv6Addr::new(0x1000, 0, 0, 0, 0, 0, 0, 0x55)),
    other_external: IpAddr::V6(Ipv6Addr::new(0x1000, 0, 0, 0, 0, 0, 0, 0x56)),
    pod: IpAddr::V6(Ipv6Addr::new(0x1100, 0, 0, 0, 0, 0, 0, 0x202)),
    other_pod: IpAddr::V6(Ipv6Addr::new(0x1100, 0, 0, 0, 0, 0, 0, 0x203)),
    icmp: ICMPV6,
};

pub const BOTH: [Net; 2] = [V4, V6];

/// Tables in which `externals` lead to `pods` in generation 1, at second 1,000.
pub fn tables(externals: &[IpAddr], pods: &[IpAddr]) -> HostTables {
    let tables = HostTables::default();
    tables.now.set(1_000 * SECOND);
    set_pods(&tables, externals, pods, 1);
    tables
}

/// Puts a generation in force, as the agent does: members first, then the switch.
pub fn set_pods(tables: &HostTables, externals: &[IpAddr], pods: &[IpAddr], generation: u32) {
    let mut members = tables.members.borrow_mut();
    members.retain(|key, _| pods.contains(&key.pod.to_ip()));
    for (slot, pod) in (0..).zip(pods) {
        let pod = Address::from(*pod);
        let key = BackendKey { service_id: SERVICE_ID, generation, slot };
        tables.backends.borrow_mut().insert(key, BackendValue { pod });
        members
            .entry(MemberKey { pod, service_id: SERVICE_ID, padding: 0 })
            .or_insert(MemberValue { since_generation: generation, flags: 0 });
    }
    for external in externals {
        tables.services.borrow_mut().insert(
            ExternalKey { external: (*external).into() },
            ServiceValue {
                service_id: SERVICE_ID,
                generation,
                backend_count: pods.len().try_into().unwrap(),
                affinity_timeout: AFFINITY_TIMEOUT,
                flags: 0,
                source_generation: 0,
            },
        );
    }
    let external = match externals {
        [external] => (*external).into(),
        _ => Address::UNSPECIFIED,
    };
    let known =
        pods.iter().map(|pod| (PodKey { pod: (*pod).into() }, PodValue { external, flags: 0, interface: 0 }));
    *tables.pods.borrow_mut() = known.collect();
}

/// Gives the Services these flags as well.
pub fn set_flags(tables: &HostTables, flags: u32) {
    for service in tables.services.borrow_mut().values_mut() {
        service.flags |= flags;
    }
    for pod in tables.pods.borrow_mut().values_mut() {
        pod.flags |= flags;
    }
}

/// The key of a client's session.
pub fn session_of_client(net: &Net) -> SessionKey {
    SessionKey {
        external: net.external.into(),
        peer: net.client.into(),
        external_port: 0,
        peer_port: 0,
        protocol: 0,
        padding: [0; 3],
    }
}

/// A packet that comes in by an uplink.
pub fn request<T: Tables>(packet: &mut HostPacket, tables: &T) -> Verdict {
    proxier_ebpf::request(packet, tables, Origin::Outside)
}

/// A packet that comes in by a pod's link.
pub fn request_of_pod<T: Tables>(packet: &mut HostPacket, tables: &T) -> Verdict {
    proxier_ebpf::request(packet, tables, Origin::Pod)
}

/// A packet that a process of the node sends.
pub fn request_of_node<T: Tables>(packet: &mut HostPacket, tables: &T) -> Verdict {
    proxier_ebpf::request(packet, tables, Origin::Node)
}

/// A packet that leaves the node's stack.
pub fn reply<T: Tables>(packet: &mut HostPacket, tables: &T) -> Verdict {
    proxier_ebpf::reply(packet, tables, DELIVERY_STACK)
}

/// What a test may vary about the headers before the transport header.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// VLAN tags, outermost first.
    pub vlans: Vec<u16>,
    /// IPv4 options (a multiple of four bytes).
    pub options: Vec<u8>,
    /// IPv6 extension headers: number, and the bytes behind the next-header byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Offset in units of 8 bytes, more fragments, identification.
    pub fragment: Option<(u16, bool, u32)>,
    /// Bytes behind the IP packet, as Ethernet pads.
    pub padding: usize,
}

/// An Ethernet frame with an IP packet of `protocol` from `source` to `destination`.
pub fn frame(net: &Network, source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> HostPacket {
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for vlan in &net.vlans {
        bytes.extend([0x81, 0x00]);
        bytes.extend(vlan.to_be_bytes());
    }
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            bytes.extend([0x08, 0x00]);
            bytes.extend(v4_header(net, source, destination, protocol, payload.len()));
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            bytes.extend([0x86, 0xdd]);
            bytes.extend(v6_header(net, source, destination, protocol, payload.len()));
        }
        _ => panic!("{source} and {destination} are of two families"),
    }
    bytes.extend(payload);
    bytes.extend(std::iter::repeat_n(0xee, net.padding));
    HostPacket::new(bytes)
}

fn v4_header(
    net: &Network,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    payload: usize,
) -> Vec<u8> {
    let length = 20 + net.options.len();
    let mut header = vec![0x40 | u8::try_from(length / 4).unwrap(), 0];
    header.extend(u16::try_from(length + payload).unwrap().to_be_bytes());
    let (offset, more, identification) = net.fragment.unwrap_or((0, false, 0x1234));
    header.extend(u16::try_from(identification & 0xffff).unwrap().to_be_bytes());
    header.extend((offset | if more { 0x2000 } else { 0 }).to_be_bytes());
    header.extend([64, protocol, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header.extend(&net.options);
    let checksum = internet_checksum::checksum(&header);
    header[10..12].copy_from_slice(&checksum);
    header
}

fn v6_header(
    net: &Network,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: u8,
    payload: usize,
) -> Vec<u8> {
    let mut chain = net.extensions.clone();
    if let Some((offset, more, identification)) = net.fragment {
        let mut body = vec![0];
        body.extend((offset << 3 | u16::from(more)).to_be_bytes());
        body.extend(identification.to_be_bytes());
        chain.push((44, body));
    }
    let numbers: Vec<u8> = chain.iter().map(|(number, _)| *number).chain([protocol]).collect();
    let mut extensions = Vec::new();
    for (next, (_, body)) in numbers[1..].iter().zip(&chain) {
        extensions.push(*next);
        extensions.extend(body);
    }
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(u16::try_from(extensions.len() + payload).unwrap().to_be_bytes());
    header.extend([numbers[0], 64]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header.extend(extensions);
    header
}

/// Where a protocol's checksum is, if it covers the addresses.
pub fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP | UDPLITE | DCCP => Some(6),
        ICMPV6 => Some(2),
        _ => None,
    }
}

/// The checksum of `segment` with its pseudo-header, from scratch: RFC 793, 768, 8200 section 8.1.
pub fn transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> [u8; 2] {
    let mut checksum = Checksum::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => checksum.add_bytes(&address.octets()),
            IpAddr::V6(address) => checksum.add_bytes(&address.octets()),
        }
    }
    checksum.add_bytes(&u32::try_from(segment.len()).unwrap().to_be_bytes());
    checksum.add_bytes(&[0, 0, 0, protocol]);
    checksum.add_bytes(segment);
    checksum.checksum()
}

/// Fills in the checksum of `segment`.
pub fn seal(source: IpAddr, destination: IpAddr, protocol: u8, mut segment: Vec<u8>) -> Vec<u8> {
    if protocol == ICMP {
        segment[2..4].fill(0);
        let checksum = internet_checksum::checksum(&segment);
        segment[2..4].copy_from_slice(&checksum);
    } else if let Some(at) = checksum_offset(protocol) {
        segment[at..at + 2].fill(0);
        let mut checksum = transport_checksum(source, destination, protocol, &segment);
        if checksum == [0, 0] && matches!(protocol, UDP | UDPLITE) {
            checksum = [0xff, 0xff];
        }
        segment[at..at + 2].copy_from_slice(&checksum);
    }
    segment
}

/// A transport header with `payload` behind it, checksum not filled in. `ports` are source and destination; of ICMP
/// the first is the type and the second the identifier.
pub fn segment(protocol: u8, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let head = |bytes: &mut Vec<u8>| {
        bytes.extend(ports.0.to_be_bytes());
        bytes.extend(ports.1.to_be_bytes());
    };
    match protocol {
        TCP => {
            head(&mut bytes);
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
        }
        UDP | UDPLITE => {
            head(&mut bytes);
            bytes.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
            bytes.extend([0, 0]);
        }
        DCCP => {
            head(&mut bytes);
            bytes.extend([4, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0]);
        }
        SCTP => {
            head(&mut bytes);
            bytes.extend([9, 8, 7, 6, 0xca, 0xfe, 0xba, 0xbe]);
        }
        ICMP | ICMPV6 => {
            bytes.extend([u8::try_from(ports.0).unwrap(), 0, 0, 0]);
            bytes.extend(ports.1.to_be_bytes());
            bytes.extend([0, 1]);
        }
        _ => {}
    }
    bytes.extend(payload);
    bytes
}

/// A sealed packet from `source` to `destination`.
pub fn packet(
    net: &Network,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ports: (u16, u16),
    payload: &[u8],
) -> HostPacket {
    let segment = seal(source, destination, protocol, segment(protocol, ports, payload));
    frame(net, source, destination, protocol, &segment)
}

/// The same from plain headers.
pub fn plain(source: IpAddr, destination: IpAddr, protocol: u8, ports: (u16, u16)) -> HostPacket {
    packet(&Network::default(), source, destination, protocol, ports, b"hello, whole address")
}

/// Type and code of "packet too big" and of "port unreachable".
pub fn errors(net: &Net) -> [(u8, u8); 2] {
    if net.icmp == ICMP { [(3, 4), (3, 3)] } else { [(2, 0), (1, 4)] }
}

/// Somebody on the way.
pub fn router(net: &Net) -> IpAddr {
    match net.client {
        IpAddr::V4(_) => [192, 0, 2, 1].into(),
        IpAddr::V6(_) => IpAddr::V6("2001:db8::1".parse().unwrap()),
    }
}

/// The error of this type and code that quotes the first `length` bytes of the IP packet in `about`.
pub fn error(
    net: &Net,
    source: IpAddr,
    destination: IpAddr,
    (kind, code): (u8, u8),
    about: &HostPacket,
    length: usize,
) -> HostPacket {
    let mut message = vec![kind, code, 0, 0, 0, 0, 5, 20];
    message.extend(about.bytes[14..].iter().take(length));
    frame(&Network::default(), source, destination, net.icmp, &seal(source, destination, net.icmp, message))
}

/// What the packet says, read by etherparse.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// The IP payload behind extension headers.
    pub segment: Vec<u8>,
}

pub fn seen(packet: &HostPacket) -> Seen {
    let sliced = etherparse::SlicedPacket::from_ethernet(&packet.bytes).expect("a whole packet");
    match sliced.net.expect("an IP packet") {
        etherparse::NetSlice::Ipv4(v4) => Seen {
            source: v4.header().source_addr().into(),
            destination: v4.header().destination_addr().into(),
            protocol: v4.payload().ip_number.0,
            segment: v4.payload().payload.to_vec(),
        },
        etherparse::NetSlice::Ipv6(v6) => Seen {
            source: v6.header().source_addr().into(),
            destination: v6.header().destination_addr().into(),
            protocol: v6.payload().ip_number.0,
            segment: v6.payload().payload.to_vec(),
        },
        other => panic!("neither IPv4 nor IPv6: {other:?}"),
    }
}

/// Every checksum of a whole packet is what it would be if the packet had been made like this.
pub fn assert_checksums(packet: &HostPacket) {
    let sliced = etherparse::SlicedPacket::from_ethernet(&packet.bytes).expect("a whole packet");
    if let Some(etherparse::NetSlice::Ipv4(v4)) = &sliced.net {
        let header = v4.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum(), "IPv4 header checksum");
    }
    let seen = seen(packet);
    if let Some(at) = checksum_offset(seen.protocol) {
        let found: [u8; 2] = seen.segment[at..at + 2].try_into().unwrap();
        if found == [0, 0] && matches!(seen.protocol, UDP | UDPLITE) {
            return;
        }
        let mut blank = seen.segment.clone();
        blank[at..at + 2].fill(0);
        let mut expected = transport_checksum(seen.source, seen.destination, seen.protocol, &blank);
        if expected == [0, 0] && matches!(seen.protocol, UDP | UDPLITE) {
            expected = [0xff, 0xff];
        }
        assert_eq!(found, expected, "checksum of protocol {}", seen.protocol);
    }
}

/// One of each kind.
pub const ALL_PROTOCOLS: [u8; 7] = [TCP, UDP, UDPLITE, SCTP, DCCP, GRE, ESP];

/// A TCP packet with these flags, of one conversation.
pub fn tcp(net: &Net, from_client: bool, flags: u8) -> HostPacket {
    let (source, destination, ports) = if from_client {
        (net.client, net.external, (40_000, 443))
    } else {
        (net.pod, net.client, (443, 40_000))
    };
    let mut segment = segment(TCP, ports, b"");
    segment[13] = flags;
    frame(&Network::default(), source, destination, TCP, &seal(source, destination, TCP, segment))
}

/// The steps of a TCP handshake, for [`converse`].
pub const HANDSHAKE: [(bool, u8); 3] = [(true, 0x02), (false, 0x12), (true, 0x10)];

/// Lets packets of one TCP conversation pass, each from the client or not and with these flags. All must be rewritten.
pub fn converse(tables: &HostTables, net: &Net, steps: impl IntoIterator<Item = (bool, u8)>) {
    for (step, (from_client, flags)) in steps.into_iter().enumerate() {
        let mut packet = tcp(net, from_client, flags);
        let verdict = if from_client { request(&mut packet, tables) } else { reply(&mut packet, tables) };
        assert_eq!(verdict, Verdict::Rewritten, "step {step}, flags {flags:#x}");
    }
}

/// The flow, where there is one only.
pub fn only_flow(tables: &HostTables) -> (FlowKey, HostFlow) {
    let flows = tables.flows.borrow();
    assert_eq!(flows.len(), 1, "{flows:?}");
    let (key, flow) = flows.iter().next().expect("one flow");
    (*key, flow.clone())
}

/// The pod that a packet of `client` to the external address goes to.
pub fn pod_of(tables: &HostTables, net: &Net, client: IpAddr, protocol: u8, port: u16) -> IpAddr {
    let ports =
        if protocol == net.icmp { (if protocol == ICMP { 8 } else { 128 }, port) } else { (port, port) };
    let mut packet = plain(client, net.external, protocol, ports);
    assert_eq!(request(&mut packet, tables), Verdict::Rewritten);
    seen(&packet).destination
}

/// One of many clients.
pub fn client(net: &Net, number: u8) -> IpAddr {
    let mut address = Address::from(net.client);
    address.bytes[15] = number;
    address.to_ip()
}

/// As the agent: a pod's own address is in `services` too.
pub fn know_pod(tables: &HostTables, pod: IpAddr) {
    let mut services = tables.services.borrow_mut();
    let value = *services.values().next().expect("a Service");
    services.insert(
        ExternalKey { external: pod.into() },
        ServiceValue { flags: SERVICE_IS_POD, service_id: 0, ..value },
    );
}

/// As the agent: the node's own address is in `services`, flagged.
pub fn know_node(tables: &HostTables, node: IpAddr, flags: u32) {
    let mut services = tables.services.borrow_mut();
    let value = *services.values().next().expect("a Service");
    services.insert(
        ExternalKey { external: node.into() },
        ServiceValue { flags: SERVICE_IS_NODE | flags, service_id: 0, ..value },
    );
}

/// As the agent: a pod that takes no new conversations.
pub fn drain(tables: &HostTables, pod: IpAddr) {
    tables.members.borrow_mut().insert(
        MemberKey { pod: pod.into(), service_id: SERVICE_ID, padding: 0 },
        MemberValue { since_generation: 1, flags: MEMBER_DRAINING },
    );
    let mut pods = tables.pods.borrow_mut();
    let alone = PodValue { external: Address::UNSPECIFIED, flags: 0, interface: 0 };
    let others = pods.values().next().copied().unwrap_or(alone);
    pods.insert(PodKey { pod: pod.into() }, others);
}
