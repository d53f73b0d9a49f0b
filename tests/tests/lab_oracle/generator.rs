//! Any conversation of any packets: what real hosts send, and what nobody should.

use proptest::{collection::vec, option, prelude::*, sample::select, strategy::Union};
use proxier_tests::packets::protocol;

use crate::{
    packet::AUTHENTICATION,
    script::{
        Distortion, ErrorShape, Flaw, Header, Link, Offloaded, Order, Pieces, Script, Segment, Shape, Side,
        Spoil, Step, Talk,
    },
};

/// A conversation.
pub(crate) fn scripts() -> impl Strategy<Value = Script> {
    (any::<bool>(), talks(), ports(), ports()).prop_flat_map(|(v6, talk, client_port, pod_port)| {
        let steps = (vec(shapes(v6, talk), 1..3), vec(steps(v6, talk), 1..8));
        steps.prop_map(move |(first, mut rest)| {
            // A conversation begins with the client.
            let mut steps: Vec<Step> = first.into_iter().map(Step::Request).collect();
            steps.append(&mut rest);
            Script { v6, talk, client_port, pod_port, steps }
        })
    })
}

fn ports() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 1_u16.., 1 => select(vec![1_u16, 53, 5060, 0xffff])]
}

fn talks() -> BoxedStrategy<Talk> {
    prop_oneof![
        4 => Just(Talk::Tcp),
        4 => Just(Talk::Udp),
        2 => select(vec![0_u16, 8, 20, 0xffff]).prop_map(Talk::UdpLite),
        2 => Just(Talk::Sctp),
        2 => Just(Talk::Dccp),
        3 => any::<u8>().prop_map(Talk::Query),
        1 => Just(Talk::Gre(None)),
        1 => any::<u16>().prop_map(|call| Talk::Gre(Some(call))),
        1 => Just(Talk::Esp),
        1 => any_other_protocol().prop_map(Talk::Other),
    ]
    .boxed()
}

/// A number that means no header of IPv6's own, and nothing of the other family.
fn any_other_protocol() -> impl Strategy<Value = u8> {
    any::<u8>().prop_filter("it has a meaning", |number| {
        let meaning = [
            protocol::HOP_BY_HOP,
            protocol::ROUTING,
            protocol::FRAGMENT,
            protocol::DESTINATION_OPTIONS,
            protocol::ICMP,
            protocol::ICMPV6,
            protocol::GRE,
            AUTHENTICATION,
        ];
        !meaning.contains(number)
    })
}

fn steps(v6: bool, talk: Talk) -> BoxedStrategy<Step> {
    // Without ports nothing tells a conversation with the pod from one with the external address; the last one that the
    // client spoke to answers (decision 007), with netfilter the first one. The same with one that the pod begins. To
    // netfilter, DCCP has no ports.
    let apart = u32::from(!matches!(talk, Talk::Dccp | Talk::Gre(_) | Talk::Esp | Talk::Other(_)));
    let side = select(vec![Side::Client, Side::Pod]);
    prop_oneof![
        6 => shapes(v6, talk).prop_map(Step::Request),
        6 => shapes(v6, talk).prop_map(without_syn).prop_map(Step::Reply),
        3 => (side, errors(v6)).prop_map(|(side, shape)| Step::Error(side, shape)),
        apart => shapes(v6, talk).prop_map(Step::Own),
        apart => shapes(v6, talk).prop_map(Step::Straight),
    ]
    .boxed()
}

/// A pod that opens a connection to the client, from the port and to the port of one that has ended, begins one of its own:
/// when one has ended, netfilter and proxier need not agree.
fn without_syn(mut shape: Shape) -> Shape {
    shape.segment.flags = shape.segment.flags.map(|flags| flags & !2);
    shape
}

fn shapes(v6: bool, talk: Talk) -> BoxedStrategy<Shape> {
    (headers(v6), segments(talk), spoils(), pieces(), links(), offloads(talk))
        .prop_map(move |(header, segment, spoil, pieces, link, offload)| {
            let offload =
                if pieces == Pieces::Whole && spoil == Spoil::Nothing { offload } else { Offloaded::Nothing };
            let mut shape = Shape { header, segment, spoil, pieces, link, offload };
            travel_far(&mut shape.header, pieces, spoil);
            // Nor about one whose checksum is not there yet, which netfilter may leave as it is.
            let is_partial =
                offload == Offloaded::InnerChecksum || offload != Offloaded::Nothing && talk == Talk::Tcp;
            if is_partial {
                shape.header.hop_limit = 64;
            }
            if pieces == Pieces::Atomic || is_partial {
                // Nor one about a packet that is too big with its fragment header, and not without.
                shape.segment.size = shape.segment.size.min(1000);
            }
            if let Offloaded::Segments(_) = offload {
                shape.segment.flags = None;
                shape.segment.size = 3000 + shape.segment.size * 8;
            }
            shape
        })
        .boxed()
}

/// The node's error about a packet in pieces quotes the first, or, after connection tracking, the whole: two right answers.
/// About a broken packet it quotes what netfilter has made of it.
fn travel_far(header: &mut Header, pieces: Pieces, spoil: Spoil) {
    let is_right = matches!(spoil, Spoil::Nothing | Spoil::Checksum(_) | Spoil::NoChecksum);
    if pieces != Pieces::Whole || !is_right {
        header.hop_limit = header.hop_limit.max(2);
    }
}

fn headers(v6: bool) -> BoxedStrategy<Header> {
    let hop_limit = prop_oneof![20 => Just(64_u8), 2 => 2_u8.., 1 => Just(1_u8)];
    let options = prop_oneof![6 => Just(vec![]), 1 => ipv4_options()];
    let extensions = prop_oneof![6 => Just(vec![]), 1 => extensions()];
    (hop_limit, any::<u8>(), any::<u16>(), any::<bool>(), options, extensions)
        .prop_map(move |(hop_limit, class, label, dont_fragment, options, extensions)| Header {
            hop_limit,
            class,
            label,
            dont_fragment: dont_fragment && !v6,
            options: if v6 { vec![] } else { options },
            extensions: if v6 { extensions } else { vec![] },
        })
        .boxed()
}

/// Options that a router leaves alone, and those that it writes into, which may be there once.
fn ipv4_options() -> BoxedStrategy<Vec<u8>> {
    let alone = prop_oneof![
        4 => Just(vec![1_u8]),
        2 => Just(vec![148, 4, 0, 0]),
        1 => Just(vec![130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        1 => (2_usize..8, 150_u8..).prop_map(|(length, kind)| {
            let mut option = vec![kind, length as u8];
            option.resize(length, 0x5a);
            option
        }),
    ];
    let route = option::weighted(0.3, Just(vec![7, 7, 4, 0, 0, 0, 0]));
    // Full: a time would tell the worlds apart.
    let time = option::weighted(0.2, Just(vec![68, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    (route, time, vec(alone, 1..4))
        .prop_map(|(route, time, alone)| {
            let mut options: Vec<u8> = route.into_iter().chain(time).chain(alone).flatten().collect();
            while options.len() > 40 {
                options.pop();
            }
            // What is left of an option that was cut would be an error.
            if options.len() == 40 {
                options.truncate(if options[0] == 7 { 7 } else { 0 });
            }
            options.resize(options.len().next_multiple_of(4), 0);
            options
        })
        .boxed()
}

fn extensions() -> BoxedStrategy<Vec<(u8, Vec<u8>)>> {
    let padded = |number: u8| {
        (0..3_u8).prop_map(move |words| {
            // An option that is passed over where nobody knows it (RFC 8200, section 4.2); Linux takes no more than 7
            // bytes of padding.
            let mut body = vec![words, 0x1e, 4 + words * 8];
            body.resize(7 + usize::from(words) * 8, 0);
            (number, body)
        })
    };
    // A routing header that has been followed, of a type that nobody knows: such a one is passed over.
    let routing = Just((protocol::ROUTING, vec![0, 253, 0, 0, 0, 0, 0]));
    let authentication = (1..4_u8).prop_map(|words| {
        let mut body = vec![words * 2];
        body.resize((usize::from(words) * 2 + 2) * 4 - 1, 0x5a);
        (AUTHENTICATION, body)
    });
    let extension =
        prop_oneof![4 => padded(protocol::DESTINATION_OPTIONS), 1 => routing, 1 => authentication];
    (option::of(padded(protocol::HOP_BY_HOP)), vec(extension, 0..4))
        .prop_map(|(first, rest)| first.into_iter().chain(rest).collect())
        .boxed()
}

fn segments(talk: Talk) -> BoxedStrategy<Segment> {
    let size = prop_oneof![
        6 => 0_u16..64,
        2 => 64_u16..1200,
        1 => 1200_u16..1420,
    ];
    let flags: BoxedStrategy<Option<u8>> = match talk {
        Talk::Tcp => prop_oneof![
            12 => Just(None),
            4 => select(vec![0x10_u8, 0x11, 0x14, 0x18, 0x04, 0x02, 0x12, 0xc2, 0x52]).prop_map(Some),
            1 => any::<u8>().prop_map(Some),
        ]
        .boxed(),
        Talk::Sctp | Talk::Dccp => prop_oneof![8 => Just(None), 1 => (0..16_u8).prop_map(Some)].boxed(),
        _ => Just(None).boxed(),
    };
    let options = prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec![2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7]),
        1 => vec(any::<u8>(), 0..11).prop_map(|words| words.into_iter().flat_map(|byte| [1, 1, 1, byte & 1]).collect()),
    ];
    (size, flags, options).prop_map(|(size, flags, options)| Segment { size, flags, options }).boxed()
}

fn spoils() -> BoxedStrategy<Spoil> {
    prop_oneof![
        40 => Just(Spoil::Nothing),
        2 => (1_u16..).prop_map(Spoil::Checksum),
        1 => Just(Spoil::NoChecksum),
        1 => (0_u16..24).prop_map(Spoil::Cut),
        1 => (1_u16..60).prop_map(Spoil::Frame),
        1 => any::<i8>().prop_map(Spoil::Length),
        1 => Just(Spoil::HeaderChecksum),
        2 => (0_u16..40, 1_u8..).prop_map(|(at, bits)| Spoil::Flip(at, bits)),
    ]
    .boxed()
}

fn pieces() -> BoxedStrategy<Pieces> {
    let order = select(vec![Order::Forward, Order::Backward, Order::Halves]);
    let flaw = prop_oneof![
        12 => Just(Flaw::Nothing),
        1 => any::<u8>().prop_map(Flaw::Missing),
        1 => any::<u8>().prop_map(Flaw::Twice),
        1 => any::<u8>().prop_map(Flaw::Overlap),
    ];
    let size = prop_oneof![4 => (3_u16..100).prop_map(|words| words * 8), 1 => select(vec![8_u16, 16])];
    prop_oneof![
        12 => Just(Pieces::Whole),
        1 => Just(Pieces::Atomic),
        4 => (size, order, flaw).prop_map(|(size, order, flaw)| Pieces::Cut { size, order, flaw }),
    ]
    .boxed()
}

fn links() -> BoxedStrategy<Link> {
    // Tag 0 is priority only, and the packet is for the interface itself; any other is for one that is not there.
    let tag = (select(vec![0x8100_u16, 0x88a8]), prop_oneof![3 => Just(0_u16), 1 => 0_u16..4095]);
    let tags = prop_oneof![12 => Just(vec![]), 1 => vec(tag, 1..3)];
    (tags, prop_oneof![4 => Just(0_u8), 1 => 0_u8..60])
        .prop_map(|(tags, padding)| Link { tags, padding })
        .boxed()
}

fn offloads(talk: Talk) -> Union<BoxedStrategy<Offloaded>> {
    let nothing = Just(Offloaded::Nothing).boxed();
    let segments = (200_u16..1300).prop_map(Offloaded::Segments).boxed();
    let checksum = Just(Offloaded::Checksum).boxed();
    match talk {
        Talk::Tcp => Union::new_weighted(vec![(6, nothing), (3, checksum), (1, segments)]),
        Talk::Udp => {
            let inner = Just(Offloaded::InnerChecksum).boxed();
            Union::new_weighted(vec![(6, nothing), (3, checksum), (1, segments), (1, inner)])
        }
        _ => Union::new(vec![nothing]),
    }
}

fn errors(v6: bool) -> BoxedStrategy<ErrorShape> {
    let kind = if v6 {
        prop_oneof![
            4 => (Just(1_u8), 0..8_u8),
            4 => (Just(2_u8), Just(0_u8)),
            2 => (Just(3_u8), 0..2_u8),
            2 => (Just(4_u8), 0..3_u8),
            1 => (select(vec![100_u8, 127]), any::<u8>()),
        ]
        .boxed()
    } else {
        prop_oneof![
            8 => (Just(3_u8), 0..16_u8),
            1 => (Just(4_u8), Just(0_u8)),
            1 => (Just(5_u8), 0..4_u8),
            3 => (Just(11_u8), 0..2_u8),
            1 => (Just(12_u8), 0..3_u8),
        ]
        .boxed()
    };
    // As little as a router may quote, a little more, as much as fits.
    let least = if v6 { 48 } else { 28 };
    let quote = prop_oneof![3 => Just(least), 4 => least..least + 40, 4 => Just(1000_u16), 1 => 0..least];
    let distortion = prop_oneof![
        8 => Just(Distortion::Nothing),
        4 => Just(Distortion::Travelled),
        2 => (1_u16..).prop_map(Distortion::Checksum),
        1 => Just(Distortion::NoChecksum),
        1 => (1_u16..).prop_map(Distortion::Ports),
        1 => Just(Distortion::Swapped),
        1 => Just(Distortion::Stranger),
    ];
    (kind, any::<u32>(), quote, any::<bool>(), distortion, headers(v6), spoils(), pieces(), links())
        .prop_map(|(kind, rest, quote, from_router, distortion, mut header, spoil, pieces, link)| {
            travel_far(&mut header, pieces, spoil);
            ErrorShape { kind, rest, quote, from_router, distortion, header, spoil, pieces, link }
        })
        .boxed()
}
