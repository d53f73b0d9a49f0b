//! Scripts by hand: what must be there whatever the generator makes, what it cannot make, and every regression, with the name
//! of what it is about. A failure of the generator prints its script, shrunk, in the form that it has here.

use crate::script::{
    Distortion, ErrorShape, Flaw, Header, Link, Offloaded, Order, Pieces, Script, Segment, Shape, Side,
    Spoil, Step, Talk,
};

/// All of them, in both families.
pub(crate) fn scripts() -> Vec<(String, Script)> {
    let talks = [
        Talk::Tcp,
        Talk::Udp,
        Talk::UdpLite(0),
        Talk::UdpLite(8),
        Talk::Sctp,
        Talk::Dccp,
        Talk::Query(0),
        Talk::Query(1),
        Talk::Query(2),
        Talk::Query(3),
        Talk::Gre(None),
        Talk::Gre(Some(7)),
        Talk::Esp,
        // IP in IP, OSPF, L2TP, no next header, one for experiments.
        Talk::Other(4),
        Talk::Other(89),
        Talk::Other(115),
        Talk::Other(59),
        Talk::Other(253),
    ];
    let mut scripts = Vec::new();
    for v6 in [false, true] {
        let mut add = |name: &str, talk: Talk, steps: Vec<Step>| {
            let name = format!("{name}, {talk:?}, v6 {v6}");
            scripts.push((name, Script { v6, talk, client_port: 40_000, pod_port: 443, steps }));
        };
        for talk in talks {
            add("a conversation", talk, conversation());
            add("errors about both directions", talk, errors(v6));
            add("too far and too big", talk, beyond());
            add("fragments", talk, fragments());
        }
        add("large segments", Talk::Tcp, offloaded(Offloaded::Segments(1000), 40_000));
        add("large datagrams", Talk::Udp, offloaded(Offloaded::Segments(500), 20_000));
        add("a checksum left to hardware", Talk::Tcp, offloaded(Offloaded::Checksum, 700));
        add("a checksum left to hardware", Talk::Udp, offloaded(Offloaded::Checksum, 700));
        add(
            "a tunnel's inner checksum left to hardware",
            Talk::Udp,
            offloaded(Offloaded::InnerChecksum, 700),
        );
        add("no checksum", Talk::Udp, spoilt(Spoil::NoChecksum));
        add("a wrong checksum", Talk::Tcp, spoilt(Spoil::Checksum(0x0100)));
        add("a wrong checksum", Talk::Sctp, spoilt(Spoil::Checksum(0x0100)));
        add("priority tags", Talk::Udp, tagged());
        // Of ICMPv6 types 130 and 136; of ICMP 10 and 0, a router solicitation and an answer that nobody has asked for.
        add("multicast listener discovery", Talk::Query(0), spoilt(Spoil::Flip(0, 2)));
        add("neighbour discovery", Talk::Query(0), spoilt(Spoil::Flip(0, 8)));
        add("a length of zero", Talk::Gre(None), spoilt(Spoil::Length(-12)));
    }
    let mut add_v6 = |name: &str, talk: Talk, extensions: Vec<(u8, Vec<u8>)>, spoil: Spoil| {
        let right = Shape { header: Header { extensions, ..Header::default() }, ..Shape::default() };
        let wrong = Shape { spoil, ..right.clone() };
        let steps = vec![
            Step::Request(right.clone()),
            Step::Reply(right),
            Step::Request(wrong.clone()),
            Step::Reply(wrong),
        ];
        let script = Script { v6: true, talk, client_port: 40_000, pod_port: 443, steps };
        scripts.push((name.to_owned(), script));
    };
    let nothing = (60, vec![0, 1, 4, 0, 0, 0, 0]);
    let route = (43, vec![0, 253, 1, 0, 0, 0, 0]);
    add_v6("a source route with segments left", Talk::Udp, vec![route], Spoil::Nothing);
    add_v6("eight extension headers", Talk::Udp, vec![nothing.clone(); 8], Spoil::Nothing);
    add_v6("nine extension headers", Talk::Udp, vec![nothing.clone(); 9], Spoil::Nothing);
    // The length says that there are seven bytes of the header, which has eight.
    add_v6("an extension header cut short", Talk::Esp, vec![nothing], Spoil::Length(-9));
    scripts
}

fn conversation() -> Vec<Step> {
    let of_size = |size| Shape { segment: Segment { size, ..Segment::default() }, ..Shape::default() };
    vec![
        Step::Request(of_size(20)),
        Step::Reply(of_size(30)),
        Step::Request(of_size(0)),
        Step::Request(of_size(1200)),
        Step::Reply(of_size(1200)),
        Step::Reply(of_size(1)),
    ]
}

fn error_about(v6: bool, quote: u16, distortion: Distortion) -> ErrorShape {
    ErrorShape {
        // The packet is too big, for a link of 1280 bytes.
        kind: if v6 { (2, 0) } else { (3, 4) },
        rest: 1280,
        quote,
        from_router: true,
        distortion,
        header: Header::default(),
        spoil: Spoil::Nothing,
        pieces: Pieces::Whole,
        link: Link::default(),
    }
}

fn errors(v6: bool) -> Vec<Step> {
    let headers = if v6 { 40 } else { 20 };
    let mut steps = conversation();
    for side in [Side::Client, Side::Pod] {
        for transport in [7, 8, 12, 16, 17, 18, 19, 20, 1000] {
            let error = error_about(v6, headers + transport, Distortion::Travelled);
            steps.push(Step::Error(side, error));
        }
        for distortion in [
            Distortion::NoChecksum,
            Distortion::Checksum(0x1000),
            Distortion::Ports(0x0101),
            Distortion::Swapped,
            Distortion::Stranger,
        ] {
            steps.push(Step::Error(side, error_about(v6, 100, distortion)));
        }
        // About a packet of another client: that of the last script, which had the same ports.
        let last_of_client = if v6 { 8 + 23 } else { 8 + 15 };
        for bits in [0x01, 0x03, 0x07, 0x0f] {
            let spoil = Spoil::Flip(last_of_client, bits);
            let about = ErrorShape { spoil, ..error_about(v6, 100, Distortion::Nothing) };
            steps.push(Step::Error(side, about));
        }
        let redirect = ErrorShape { kind: (5, 1), ..error_about(v6, 100, Distortion::Nothing) };
        if !v6 {
            steps.push(Step::Error(side, redirect));
        }
        let broken = ErrorShape { spoil: Spoil::Checksum(1), ..error_about(v6, 100, Distortion::Nothing) };
        steps.push(Step::Error(side, broken));
        let cut = Pieces::Cut { size: 24, order: Order::Forward, flaw: Flaw::Nothing };
        steps
            .push(Step::Error(side, ErrorShape { pieces: cut, ..error_about(v6, 100, Distortion::Nothing) }));
    }
    steps
}

/// What the node makes an error of.
fn beyond() -> Vec<Step> {
    let shape = |hop_limit, size, dont_fragment| Shape {
        header: Header { hop_limit, dont_fragment, ..Header::default() },
        segment: Segment { size, ..Segment::default() },
        ..Shape::default()
    };
    vec![
        Step::Request(shape(1, 20, false)),
        Step::Request(shape(64, 20, false)),
        Step::Reply(shape(1, 20, false)),
        Step::Reply(shape(64, 20, false)),
        Step::Request(shape(1, 20, false)),
        Step::Request(shape(64, 1400, true)),
        Step::Request(shape(64, 1400, false)),
        Step::Reply(shape(64, 1300, true)),
        Step::Reply(shape(64, 1300, false)),
    ]
}

fn fragments() -> Vec<Step> {
    let shape = |size, order, flaw| Shape {
        segment: Segment { size: 1000, ..Segment::default() },
        pieces: Pieces::Cut { size, order, flaw },
        ..Shape::default()
    };
    let mut steps = Vec::new();
    for (size, order, flaw) in [
        (400, Order::Forward, Flaw::Nothing),
        (400, Order::Backward, Flaw::Nothing),
        (24, Order::Halves, Flaw::Nothing),
        (8, Order::Forward, Flaw::Nothing),
        (400, Order::Forward, Flaw::Twice(1)),
        (400, Order::Forward, Flaw::Missing(1)),
        (400, Order::Forward, Flaw::Overlap(1)),
    ] {
        steps.push(Step::Request(shape(size, order, flaw)));
        steps.push(Step::Reply(shape(size, order, flaw)));
    }
    let atomic = Shape { pieces: Pieces::Atomic, ..Shape::default() };
    steps.extend([Step::Request(atomic.clone()), Step::Reply(atomic)]);
    steps
}

fn offloaded(offload: Offloaded, size: u16) -> Vec<Step> {
    let shape = |offload, size| Shape {
        offload,
        segment: Segment { size, ..Segment::default() },
        ..Shape::default()
    };
    let opening = shape(Offloaded::Checksum, 0);
    let data = shape(offload, size);
    vec![
        Step::Request(opening.clone()),
        Step::Reply(opening),
        Step::Request(data.clone()),
        Step::Reply(data.clone()),
        Step::Request(data),
    ]
}

fn spoilt(spoil: Spoil) -> Vec<Step> {
    let right = Shape { segment: Segment { size: 4, ..Segment::default() }, ..Shape::default() };
    let wrong = Shape { spoil, ..right.clone() };
    vec![Step::Request(right.clone()), Step::Reply(right), Step::Request(wrong.clone()), Step::Reply(wrong)]
}

fn tagged() -> Vec<Step> {
    let shape =
        |tags: &[(u16, u16)]| Shape { link: Link { tags: tags.to_vec(), padding: 10 }, ..Shape::default() };
    let tags: [&[(u16, u16)]; 5] = [
        &[(0x8100, 0xe000)],
        &[(0x8100, 0x6000), (0x8100, 0)],
        &[(0x88a8, 0), (0x8100, 0)],
        // Of a VLAN that the node is not in.
        &[(0x8100, 7)],
        &[(0x88a8, 0), (0x8100, 7)],
    ];
    let mut steps = vec![Step::Request(shape(&[]))];
    steps.extend(tags.iter().flat_map(|tags| [Step::Request(shape(tags)), Step::Reply(shape(tags))]));
    steps
}
