//! Sees every packet of one interface, with its direction and the kernel's time stamp.
//!
//! There is no thread: a packet socket queues what passes from the moment it is opened, and reading empties the
//! queue. So whatever an answer was a consequence of is there when the answer is, without waiting.

use std::{
    cell::RefCell,
    io::{self, IoSliceMut},
    mem::size_of,
    ops::Deref,
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessageOwned, LinkAddr, MsgFlags, recvmsg, setsockopt,
        sockopt::{RcvBufForce, ReceiveTimestampns},
    },
};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::{netns::Namespace, packets::Packet, wait};

/// Enough for the bursts of any test; more is counted as lost, not silently missing.
const QUEUE_BYTES: usize = 64 << 20;

/// Whether the interface received or sent a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Received.
    In,
    /// Sent.
    Out,
}

/// A frame that passed.
#[derive(Clone, Debug)]
pub struct Frame {
    /// When, by the kernel.
    pub time: SystemTime,
    /// Which way.
    pub direction: Direction,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// Whether the transport checksum is there. On a veth it may be left for hardware that never comes, with the sum over
    /// the pseudo-header in its place.
    pub checksum_is_complete: bool,
    /// The IP packet in it; none if it carries something else, such as ARP.
    pub packet: Option<Packet>,
}

/// A packet socket. To close one takes the kernel a grace period of RCU, tens of milliseconds, in which a test would do nothing: a
/// thread of its own waits for that.
#[derive(Debug)]
pub(crate) struct PacketSocket(Option<Socket>);

impl PacketSocket {
    /// Protocol 0 keeps it silent until it is bound: nothing of other interfaces slips in.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self(Some(Socket::new(Domain::PACKET, Type::RAW, None)?)))
    }
}

impl Deref for PacketSocket {
    type Target = Socket;

    fn deref(&self) -> &Socket {
        self.0.as_ref().expect("it is taken out by `drop` alone")
    }
}

impl Drop for PacketSocket {
    fn drop(&mut self) {
        let socket = self.0.take();
        // Without a thread it is closed here.
        let _ = thread::Builder::new().spawn(move || drop(socket));
    }
}

/// Frames of one interface since it was started.
#[derive(Debug)]
pub struct Capture {
    socket: PacketSocket,
    name: String,
    frames: RefCell<Vec<Frame>>,
}

impl Capture {
    /// Starts to see what passes `interface` in `namespace`.
    ///
    /// # Errors
    ///
    /// No such interface, or no privilege.
    pub fn start(namespace: &Namespace, interface: &str) -> anyhow::Result<Self> {
        let name = format!("{interface} in {}", namespace.name());
        let socket =
            namespace.enter(|| open(interface)).with_context(|| format!("cannot capture on {name}"))?;
        Ok(Self { socket, name, frames: RefCell::default() })
    }

    /// Everything so far.
    ///
    /// # Panics
    ///
    /// When the kernel had to drop frames: a test must not conclude anything from what it did not see.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        self.read();
        self.frames.borrow().clone()
    }

    /// The IP packets that passed in `direction`, without the link's own housekeeping.
    #[must_use]
    pub fn packets(&self, direction: Direction) -> Vec<Packet> {
        self.read();
        let frames = self.frames.borrow();
        let chosen = frames.iter().filter(|frame| frame.direction == direction);
        chosen
            .filter_map(|frame| frame.packet.clone())
            .filter(|packet| !packet.is_link_housekeeping())
            .collect()
    }

    /// Forgets everything so far.
    pub fn clear(&self) {
        self.read();
        self.frames.borrow_mut().clear();
    }

    /// The first packet in `direction` that `matches`, waiting for it if it is not there yet.
    pub fn wait_for(
        &self,
        timeout: Duration,
        direction: Direction,
        matches: impl Fn(&Packet) -> bool,
    ) -> Option<Packet> {
        wait::until(timeout, || self.packets(direction).into_iter().find(|packet| matches(packet)))
    }

    /// Every packet whose transport checksum is wrong, or would be once the hardware had filled it in, as sentences.
    #[must_use]
    pub fn wrong_checksums(&self) -> Vec<String> {
        self.read();
        let frames = self.frames.borrow();
        let check = |frame: &Frame| {
            let packet = frame.packet.as_ref()?;
            let checked = if frame.checksum_is_complete {
                packet.check_checksum()
            } else {
                packet.check_checksum_left_to_hardware()
            };
            checked.err()
        };
        frames.iter().filter_map(check).map(|error| format!("{}: {error:#}", self.name)).collect()
    }

    fn read(&self) {
        let mut buffer = vec![0; 1 << 17];
        let mut frames = self.frames.borrow_mut();
        while let Some(frame) = receive(&self.socket, &mut buffer)
            .unwrap_or_else(|error| panic!("cannot read the capture of {}: {error:#}", self.name))
        {
            frames.push(frame);
        }
        let lost = lost_frames(&self.socket)
            .unwrap_or_else(|errno| panic!("no statistics of {}: {errno}", self.name));
        assert_eq!(lost, 0, "the capture of {} lost frames", self.name);
    }
}

fn open(interface: &str) -> anyhow::Result<PacketSocket> {
    let socket = PacketSocket::open()?;
    socket.set_nonblocking(true)?;
    setsockopt(&*socket, RcvBufForce, &QUEUE_BYTES)?;
    setsockopt(&*socket, ReceiveTimestampns, &true)?;
    set_packet_option(&socket, libc::PACKET_AUXDATA, 1)?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    socket.bind(&link_address(index, u16::try_from(libc::ETH_P_ALL)?.to_be())?)?;
    Ok(socket)
}

/// The address of an interface for a packet socket; `protocol` in network order.
pub(crate) fn link_address(index: u32, protocol: u16) -> anyhow::Result<SockAddr> {
    let index = i32::try_from(index)?;
    let family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    let length = length_of::<libc::sockaddr_ll>();
    let initialise = |storage: *mut SockAddrStorage, storage_length: *mut libc::socklen_t| {
        // SAFETY: zeros are a valid `sockaddr_ll`, and the storage, which is zeroed, is larger.
        let link: &mut libc::sockaddr_ll = unsafe { &mut *storage.cast() };
        link.sll_family = family;
        link.sll_protocol = protocol;
        link.sll_ifindex = index;
        // SAFETY: given by `try_init` to be written.
        unsafe { *storage_length = length };
        Ok(())
    };
    // SAFETY: `initialise` fills in a whole address and its length.
    let ((), address) = unsafe { SockAddr::try_init(initialise) }?;
    Ok(address)
}

#[expect(clippy::cast_possible_truncation, reason = "no structure of the kernel's is that large")]
const fn length_of<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

fn receive(socket: &Socket, buffer: &mut [u8]) -> anyhow::Result<Option<Frame>> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(libc::timespec, libc::tpacket_auxdata);
    let received =
        recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT);
    let message = match received {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let mut time = SystemTime::UNIX_EPOCH;
    let mut checksum_is_complete = true;
    for item in message.cmsgs()? {
        match item {
            ControlMessageOwned::ScmTimestampns(stamp) => time += Duration::from(stamp),
            ControlMessageOwned::Unknown(item) if item.cmsg_header.cmsg_type == libc::PACKET_AUXDATA => {
                let status = item.data_bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
                checksum_is_complete = status & libc::TP_STATUS_CSUMNOTREADY == 0;
            }
            _ => {}
        }
    }
    let kind = message.address.map(|address| address.pkttype());
    let outgoing = kind == Some(libc::PACKET_OUTGOING);
    let size = message.bytes;
    let bytes = buffer[..size].to_vec();
    let packet = Packet::from_frame(&bytes).context("an unreadable frame")?;
    let direction = if outgoing { Direction::Out } else { Direction::In };
    Ok(Some(Frame { time, direction, bytes, checksum_is_complete, packet }))
}

pub(crate) fn set_packet_option(
    socket: &Socket,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: the option's value is an int, and its size is given as such.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const value).cast(),
            length_of::<libc::c_int>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Frames lost since the last time this was asked.
pub(crate) fn lost_frames(socket: &Socket) -> Result<u32, Errno> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = length_of::<libc::tpacket_stats>();
    // SAFETY: the kernel writes at most `length` bytes, which is the size of what it is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    Errno::result(result).map(|_| statistics.tp_drops)
}
