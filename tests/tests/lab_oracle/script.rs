//! What is to happen between a client and a pod, as plain data: generated, shrunk, printed, and written by hand for
//! regressions. How it becomes bytes is in `frame` and `play`.

use std::fmt;

/// An end of the path through the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Behind the uplink.
    Client,
    /// Behind the pod's link.
    Pod,
}

/// One conversation. Each time that a script is played its client has an address that nobody had before.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// IPv6, or else IPv4.
    pub(crate) v6: bool,
    pub(crate) talk: Talk,
    /// Of an ICMP query the identifier.
    pub(crate) client_port: u16,
    pub(crate) pod_port: u16,
    pub(crate) steps: Vec<Step>,
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Talk {
    Tcp,
    Udp,
    /// With this many bytes under the checksum; 0 is all.
    UdpLite(u16),
    Sctp,
    Dccp,
    /// An ICMP query, by its place in the family's list of them.
    Query(u8),
    /// Version 0, or 1 (PPTP) with this call identifier.
    Gre(Option<u16>),
    Esp,
    /// Any other protocol, or one of those above with a header that says nothing.
    Other(u8),
}

/// One thing that somebody sends.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// The client to the external address.
    Request(Shape),
    /// The pod, in answer to what it got last; left out if it got nothing.
    Reply(Shape),
    /// An ICMP error about what this side got last; left out if it got nothing.
    Error(Side, ErrorShape),
    /// The pod on its own account, to the same client.
    Own(Shape),
    /// The client to the pod's own address.
    Straight(Shape),
}

/// What a packet looks like beside what the conversation asks for.
#[derive(Clone, Default)]
pub(crate) struct Shape {
    pub(crate) header: Header,
    pub(crate) segment: Segment,
    pub(crate) spoil: Spoil,
    pub(crate) pieces: Pieces,
    pub(crate) link: Link,
    pub(crate) offload: Offloaded,
}

/// The IP header.
#[derive(Clone, PartialEq)]
pub(crate) struct Header {
    pub(crate) hop_limit: u8,
    /// Type of service, traffic class.
    pub(crate) class: u8,
    /// IPv4's identification, IPv6's flow label.
    pub(crate) label: u16,
    /// IPv4 only.
    pub(crate) dont_fragment: bool,
    /// IPv4 only; a multiple of 4 bytes, at most 40.
    pub(crate) options: Vec<u8>,
    /// IPv6 only: number, and the header without its first byte.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
}

impl Default for Header {
    fn default() -> Self {
        Self {
            hop_limit: 64,
            class: 0,
            label: 0,
            dont_fragment: false,
            options: Vec::new(),
            extensions: Vec::new(),
        }
    }
}

/// The transport header and what is in it.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Segment {
    /// Bytes of data.
    pub(crate) size: u16,
    /// Flags of TCP, chunk of SCTP, type of DCCP, if not what is due.
    pub(crate) flags: Option<u8>,
    /// Options of TCP; a multiple of 4 bytes, at most 40.
    pub(crate) options: Vec<u8>,
}

/// What is wrong with the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Spoil {
    #[default]
    Nothing,
    /// These bits of the transport checksum.
    Checksum(u16),
    /// The transport checksum is zero.
    NoChecksum,
    /// The transport header and data are cut to this many bytes, and the IP header knows.
    Cut(u16),
    /// The frame ends this many bytes early.
    Frame(u16),
    /// The IP header's length is off by this.
    Length(i8),
    /// IPv4's header checksum.
    HeaderChecksum,
    /// Bits of one byte of the transport header and data.
    Flip(u16, u8),
}

/// How the packet is cut into fragments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pieces {
    #[default]
    Whole,
    /// IPv6: a fragment header on a whole packet (RFC 6946).
    Atomic,
    /// Into pieces of this many bytes.
    Cut { size: u16, order: Order, flaw: Flaw },
}

/// Which piece comes when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Forward,
    Backward,
    /// The second half first.
    Halves,
}

/// What is wrong with the set of pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    Nothing,
    /// One does not come.
    Missing(u8),
    /// One comes twice.
    Twice(u8),
    /// One begins 8 bytes early.
    Overlap(u8),
}

/// Around the IP packet.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Link {
    /// VLAN tags, outermost first: protocol and control information.
    pub(crate) tags: Vec<(u16, u16)>,
    /// Bytes behind the packet.
    pub(crate) padding: u8,
}

/// What is left to hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Offloaded {
    #[default]
    Nothing,
    /// The checksum, of TCP and UDP.
    Checksum,
    /// And cutting into segments of this size.
    Segments(u16),
    /// The checksum of a UDP datagram that the datagram carries: that of the outer one is complete.
    InnerChecksum,
}

/// An ICMP error.
#[derive(Clone)]
pub(crate) struct ErrorShape {
    /// Type and code.
    pub(crate) kind: (u8, u8),
    /// The four bytes before the quote.
    pub(crate) rest: u32,
    /// At most this many bytes of the packet are quoted.
    pub(crate) quote: u16,
    /// From somebody on the way, not from the end itself.
    pub(crate) from_router: bool,
    /// How the quote differs from what was sent.
    pub(crate) distortion: Distortion,
    pub(crate) header: Header,
    pub(crate) spoil: Spoil,
    pub(crate) pieces: Pieces,
    pub(crate) link: Link,
}

/// How a quote differs from the packet that it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distortion {
    Nothing,
    /// Hop limit and class, as every router on the way changes them.
    Travelled,
    /// These bits of the quoted transport checksum.
    Checksum(u16),
    /// The quoted transport checksum is zero.
    NoChecksum,
    /// Another conversation's ports.
    Ports(u16),
    /// Quoted in the wrong direction.
    Swapped,
    /// Another destination, or source, that nobody here knows.
    Stranger,
}

impl fmt::Debug for Shape {
    /// Only what is not the default: most of a shrunk script is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        let mut shape = f.debug_struct("Shape");
        if self.header != default.header {
            shape.field("header", &self.header);
        }
        if self.segment != default.segment {
            shape.field("segment", &self.segment);
        }
        if self.spoil != default.spoil {
            shape.field("spoil", &self.spoil);
        }
        if self.pieces != default.pieces {
            shape.field("pieces", &self.pieces);
        }
        if self.link != default.link {
            shape.field("link", &self.link);
        }
        if self.offload != default.offload {
            shape.field("offload", &self.offload);
        }
        shape.finish_non_exhaustive()
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hop_limit, class, label, dont_fragment, options, extensions } = self;
        write!(f, "ttl {hop_limit} class {class:#x} label {label:#x} df {dont_fragment}")?;
        write!(f, " options {options:02x?} extensions {extensions:02x?}")
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, flags {:?}, options {:02x?}", self.size, self.flags, self.options)
    }
}

impl fmt::Debug for ErrorShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, rest, quote, from_router, distortion, header, spoil, pieces, link } = self;
        write!(
            f,
            "{kind:?} rest {rest:#x} quoting {quote} router {from_router} {distortion:?} [{header:?}]"
        )?;
        write!(f, " {spoil:?} {pieces:?} {link:?}")
    }
}
