//! Writes what the corpus starts from: real packets, and conversations as they go.
//!
//! ```console
//! $ cargo run --example seeds -- FOLDER
//! ```
//!
//! makes FOLDER/TARGET/ for every fuzz target.

use std::{
    error::Error,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use prost::Message as _;
use proxier_fuzz::{
    common::{
        ALL_PROTOCOLS, BOTH, ICMP, Net, Network, TCP, UDP, V6, error, errors, packet, plain, router, segment,
    },
    steps::{Action, Step, headers},
    world::node,
};
use proxier_localv1 as localv1;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: seeds FOLDER")?;
    write(&folder.join("request"), &requests())?;
    write(&folder.join("conversation"), &conversations())?;
    write(&folder.join("icmp_error"), &icmp_errors())?;
    write(&folder.join("localv1_op"), &localv1_ops())?;
    Ok(())
}

fn write(folder: &Path, seeds: &[Vec<u8>]) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(folder.join(format!("seed-{number:03}")), seed)?;
    }
    println!("{}: {} seeds", folder.display(), seeds.len());
    Ok(())
}

/// What servers of kpng's API say: batches in which values come, change, and go, of each kind.
fn localv1_ops() -> Vec<Vec<u8>> {
    use localv1::op_item::Op;
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let ips = |v4: &[&str], v6: &[&str]| Some(localv1::IpSet { v4: texts(v4), v6: texts(v6) });
    let at = |set: localv1::Set, path: &str| localv1::Ref { set: set as i32, path: path.to_owned() };
    let set = |set, path: &str, bytes: Vec<u8>| {
        Op::Set(localv1::Value { r#ref: Some(at(set, path)), bytes: bytes.into() })
    };
    let (services, endpoints) = (localv1::Set::ServicesSet, localv1::Set::EndpointsSet);
    let service = |external: &[&str], filters: Vec<localv1::IpFilter>| {
        let value = localv1::Service {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            r#type: "LoadBalancer".to_owned(),
            ips: Some(localv1::ServiceIPs {
                external_ips: ips(external, &["2001:db8::1"]),
                load_balancer_ips: ips(&["203.0.113.7"], &[]),
                ..localv1::ServiceIPs::default()
            }),
            ip_filters: filters,
            ports: vec![localv1::PortMapping {
                protocol: 2,
                port: 5060,
                target_port: 15060,
                ..localv1::PortMapping::default()
            }],
            ..localv1::Service::default()
        };
        set(services, "default/web", value.encode_to_vec())
    };
    let endpoint = |key: &str, v4: &[&str], v6: &[&str], port: i32, draining: bool| {
        let value = localv1::Endpoint {
            ips: ips(v4, v6),
            local: true,
            draining,
            port_overrides: vec![localv1::PortName { name: "sip".to_owned(), port }],
            ..localv1::Endpoint::default()
        };
        set(endpoints, &format!("default/web/{key}"), value.encode_to_vec())
    };
    let filter = |targets: &[&str], range: &str| localv1::IpFilter {
        target_ips: ips(targets, &[]),
        source_ranges: vec![range.to_owned()],
    };
    let (sync, reset) = (|| Op::Sync(localv1::EmptyOp {}), || Op::Reset(localv1::EmptyOp {}));
    let first = || {
        vec![reset(), service(&["203.0.113.1"], Vec::new()), endpoint("a.v4", &["11.0.2.2"], &[], 1, false)]
    };
    let rest = [
        vec![],
        vec![
            endpoint("a.v6", &[], &["1100::202"], 1, false),
            endpoint("b", &["11.0.2.3"], &["1100::203"], 2, true),
        ],
        vec![service(
            &["203.0.113.2", "x"],
            vec![filter(&[], "192.0.2.0/24"), filter(&["203.0.113.2"], "10.0.0.0/8")],
        )],
        vec![service(
            &[],
            vec![filter(&["203.0.113.7"], "192.0.2.0/24"), filter(&["203.0.113.7"], "::ffff:1.2.3.4/120")],
        )],
        vec![
            endpoint("a.v4", &["11.0.2.2"], &[], 2, false),
            endpoint("127.0.0.1", &["127.0.0.1"], &[], 1, false),
        ],
        vec![Op::Delete(at(endpoints, "default/web/a.v4")), Op::Delete(at(services, "default/web"))],
        vec![reset(), set(services, "default", vec![0xff]), set(endpoints, "default/web/a.v4", vec![0xff])],
    ];
    let message = |op| localv1::OpItem { op: Some(op) }.encode_length_delimited_to_vec();
    rest.into_iter()
        .map(|rest| {
            first().into_iter().chain([sync()]).chain(rest).chain([sync()]).flat_map(message).collect()
        })
        .collect()
}

/// Echo request and reply of a family.
fn echo(net: &Net) -> (u16, u16) {
    if net.icmp == ICMP { (8, 0) } else { (128, 129) }
}

/// Frames: every protocol behind every kind of header, in and out; fragments; what is cut short.
fn requests() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    // 0: from outside, 1: from a pod, 2: from the node, 3: out, 7: to the node.
    let mut put = |side: u8, bytes: &[u8]| seeds.push([&[side][..], bytes].concat());
    for (family, net) in (0_u8..).zip(BOTH) {
        // With the conversations of the family opened beforehand.
        let opened = 0x80 | family << 6;
        let (query, answer) = echo(&net);
        for shape in 0..8_u8 {
            let headers = headers(shape << 5);
            for (protocol, there, back) in ALL_PROTOCOLS
                .map(|protocol| (protocol, (40_000, 443), (443, 40_000)))
                .into_iter()
                .chain([(net.icmp, (query, 9), (answer, 9))])
            {
                put(0, &packet(&headers, net.client, net.external, protocol, there, b"request").bytes);
                put(opened | 3, &packet(&headers, net.pod, net.client, protocol, back, b"reply").bytes);
            }
        }
        put(1, &plain(net.pod, net.external, UDP, (40_000, 443)).bytes);
        put(2, &plain(node(&net), net.external, UDP, (40_000, 443)).bytes);
        put(1, &plain(net.pod, node(&net), UDP, (443, 40_000)).bytes);
        put(opened | 7, &plain(net.pod, node(&net), UDP, (443, 40_000)).bytes);
        put(opened, &plain(net.client, net.pod, UDP, (40_000, 443)).bytes);
        put(0, &plain(net.external, net.external, UDP, (1, 2)).bytes);
        put(0, &plain(net.client, router(&net), UDP, (1, 2)).bytes);
        for (offset, more) in [(0, true), (3, true), (6, false)] {
            let pieces = Network { fragment: Some((offset, more, 7)), ..Network::default() };
            put(
                0,
                &packet(&pieces, net.client, net.external, UDP, (40_000, 443), b"a piece of a packet").bytes,
            );
            put(
                opened | 3,
                &packet(&pieces, net.pod, net.client, UDP, (443, 40_000), b"a piece of a packet").bytes,
            );
        }
        let mut without_checksum = segment(UDP, (40_000, 443), b"no checksum");
        without_checksum[6..8].fill(0);
        put(
            0,
            &proxier_fuzz::common::frame(
                &Network::default(),
                net.client,
                net.external,
                UDP,
                &without_checksum,
            )
            .bytes,
        );
        // An IPv4 address in IPv6 clothes is not the one in the tables.
        let dressed = |address| match address {
            IpAddr::V4(address) => IpAddr::V6(address.to_ipv6_mapped()),
            IpAddr::V6(_) => address,
        };
        put(0, &plain(dressed(net.client), dressed(net.external), UDP, (40_000, 443)).bytes);
        put(0, &plain(V6.client, dressed(net.external), UDP, (40_000, 443)).bytes);
        let tcp = plain(net.client, net.external, TCP, (40_000, 443)).bytes;
        for length in [13, 14, 20, 34, 54, tcp.len() - 1] {
            put(0, &tcp[..length]);
        }
    }
    seeds
}

/// Errors about every kind of conversation in both directions, with quotes of several lengths.
fn icmp_errors() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (family, net) in (0_u8..).zip(BOTH) {
        let (query, answer) = echo(&net);
        let fixed = if net.icmp == ICMP { 20 } else { 40 };
        for (protocol, there, back) in ALL_PROTOCOLS
            .map(|protocol| (protocol, (40_000, 443), (443, 40_000)))
            .into_iter()
            .chain([(net.icmp, (query, 9), (answer, 9))])
        {
            for kind in errors(&net).into_iter().chain((net.icmp == ICMP).then_some((5, 1))) {
                for length in [fixed + 8, fixed + 20, usize::MAX] {
                    let in_about = plain(net.external, net.client, protocol, back);
                    let out_about = plain(net.client, net.pod, protocol, there);
                    for (side, source, destination, about) in [
                        // Party 2 is a router, party 3 the pod.
                        (family | 2 << 2, router(&net), net.external, in_about),
                        (family | 2 | 3 << 2, net.pod, net.client, out_about),
                    ] {
                        let frame = error(&net, source, destination, kind, &about, length);
                        // Without and with Ethernet's padding, which is no part of the quote.
                        for shape in [0, 0x1f] {
                            seeds.push([&[side, shape][..], &frame.bytes[14 + fixed..]].concat());
                        }
                    }
                }
            }
        }
    }
    seeds
}

/// Conversations as they go, for each family.
fn conversations() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for v6 in [0, 1] {
        let step = |action: Action| Step { action: index(action), side: v6, length: 20, ..Step::default() };
        let mut put = |steps: &[Step]| seeds.push(steps.iter().flat_map(Step::record).collect::<Vec<u8>>());
        let [request, reply, back] = [Action::Request, Action::Reply, Action::SendBack].map(step);
        for protocol in 0..9 {
            let [request, reply] = [request, reply].map(|step| Step { protocol, kind: 0, ..step });
            put(&[request, reply, back, request, reply]);
            // The same ports through the other external address, at once and when the flow is over.
            let other = Step { side: v6 | 8, ..request };
            put(&[request, other, Step { kind: 12, ..step(Action::Wait) }, other, reply]);
            // Straight to the pod ends it.
            put(&[request, Step { protocol, ..step(Action::Straight) }, reply]);
            // The node's processes, and what a pod sends to them through its link.
            let of_node = |step| Step { side: v6 | 4, who: 7, ..step };
            put(&[of_node(request), of_node(reply), Step { side: v6, who: 7, ..reply }, back]);
            // A pod to itself, and to the other one.
            put(&[Step { side: v6 | 2, who: 3, ..request }, Step { side: v6 | 2, who: 4, ..request }, reply]);
            // Errors, the pod's and the routers', in both directions.
            for kind in 0..4 {
                let [inbound, outbound] = [Action::ErrorToExternal, Action::ErrorToClient]
                    .map(|action| Step { protocol, kind, who: 2 << 3, length: 255, ..step(action) });
                put(&[request, inbound, outbound, Step { who: 3 << 3, length: 48, ..outbound }]);
            }
        }
        // TCP from SYN to both FINs, a new one from the same port, a RST.
        let tcp = |action: Action, kind: u8| Step { kind, ..step(action) };
        let opened = [tcp(Action::Request, 0x02), tcp(Action::Reply, 0x12), tcp(Action::Request, 0x10)];
        let closed = [tcp(Action::Request, 0x11), tcp(Action::Reply, 0x11), tcp(Action::Request, 0x10)];
        put(&[&opened[..], &closed, &opened].concat());
        put(&[&opened[..], &[tcp(Action::Reply, 0x14), tcp(Action::Reply, 0x02), opened[0]]].concat());
        put(&[&opened[..], &closed, &[tcp(Action::Straight, 0x02), tcp(Action::Reply, 0x12)]].concat());
        // A client that is moved keeps its old connections.
        let to_one = |kind| Step { kind, ..step(Action::SetPods) };
        put(&[&opened[..], &[to_one(1), tcp(Action::Request, 0x10), to_one(2), tcp(Action::Request, 0x10)]]
            .concat());
        put(&[&opened[..], &[to_one(3), tcp(Action::Request, 0x10), tcp(Action::Request, 0x02)]].concat());
        let drained = step(Action::Drain);
        put(&[&opened[..], &[drained, to_one(0), tcp(Action::Request, 0x10), tcp(Action::Request, 0x02)]]
            .concat());
        put(&[
            Step { kind: 1, ..step(Action::SetFull) },
            request,
            Step { kind: 0, ..step(Action::SetFull) },
            request,
        ]);
        // Conversations that are spread, with pods that come and go; one client that may, and one that may not.
        let spread = to_one(0x10);
        put(&[
            spread,
            request,
            Step { ports: 1, ..request },
            Step { ports: 2, ..request },
            to_one(0x11),
            request,
            reply,
        ]);
        put(&[
            spread,
            Step { side: v6 | 2, who: 3, ..request },
            Step { side: v6 | 2, who: 3, ports: 3, ..request },
        ]);
        put(&[to_one(0x80), request, reply, Step { who: 1, ..request }]);
        put(&[to_one(0x23), request]);
        // Flows that are given up, with one external address and with two.
        let alone = to_one(0x41);
        put(&[
            &[alone][..],
            &opened,
            &[step(Action::Evict), tcp(Action::Reply, 0x18), tcp(Action::Reply, 0x10)],
        ]
        .concat());
        put(&[&opened[..], &[step(Action::Evict), tcp(Action::Reply, 0x18), tcp(Action::Request, 0x10)]]
            .concat());
        // Pieces in both directions, in order and not.
        let pieces = [0x01, 0x31, 0x60];
        let inbound = pieces.map(|fragment| Step { protocol: 1, fragment, ..request });
        let outbound = pieces.map(|fragment| Step { protocol: 1, fragment, ..reply });
        put(&[&inbound[..], &outbound].concat());
        // The identification is in use again, by a packet that answers nobody.
        put(&[inbound[0], outbound[0], Step { ports: 5, ..outbound[0] }, outbound[1]]);
        put(&[inbound[2], inbound[0], outbound[1], outbound[0], outbound[2]]);
        // Every kind of header; no checksum and a wrong one.
        for shape in 0..8 {
            let [request, reply] =
                [request, reply].map(|step| Step { protocol: 1, shape: shape << 5 | 3, ..step });
            put(&[request, reply, back]);
            let [request, reply] = [request, reply].map(|step| Step { side: v6 | 0x20, ..step });
            put(&[request, reply, Step { side: v6 | 0x40, ..request }, Step { cut: 9, ..request }]);
        }
    }
    seeds
}

fn index(action: Action) -> u8 {
    Action::ALL.iter().position(|other| *other == action).map_or(0, |at| at as u8)
}
