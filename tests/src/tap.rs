//! An end of a link on which only the test speaks: frames go out exactly as given and come in exactly as they are, offloads
//! (checksums left to hardware, segments to be cut) and VLAN tags included. For whole packets of a host that has a
//! network stack, see `host` and `capture`.

use std::{
    cell::RefCell,
    io::{self, IoSliceMut},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt::RcvBufForce},
};
use socket2::{Domain, Socket, Type};

use crate::{
    capture::{link_address, lost_frames, set_packet_option},
    netns::Namespace,
};

const QUEUE_BYTES: usize = 16 << 20;
/// A frame with the largest IP packet there is, two VLAN tags and the offload header.
const LARGEST: usize = OFFLOAD_HEADER + 14 + 8 + (1 << 16);
const OFFLOAD_HEADER: usize = 10;

/// What the kernel knows about a frame beside its bytes: `struct virtio_net_hdr` (linux/virtio_net.h, and the virtio
/// specification, section 5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// [`Self::NEEDS_CHECKSUM`] and others.
    pub flags: u8,
    /// How the frame is to be cut: 0 not at all, else one of the kinds below, or'ed with [`Self::ECN`].
    pub kind: u8,
    /// Length of all headers, which every segment repeats.
    pub header_length: u16,
    /// Bytes of payload in each segment.
    pub segment_size: u16,
    /// Where the sum begins that the checksum lacks.
    pub checksum_start: u16,
    /// Where the checksum is, from there.
    pub checksum_offset: u16,
}

impl Offload {
    /// The checksum field has the pseudo-header's sum; the rest is left to hardware.
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// TCP over IPv4.
    pub const TCP_V4: u8 = 1;
    /// TCP over IPv6.
    pub const TCP_V6: u8 = 4;
    /// UDP over either, into datagrams.
    pub const UDP: u8 = 5;
    /// The first segment has the congestion-window-reduced flag, the others have not.
    pub const ECN: u8 = 0x80;

    fn to_bytes(self) -> [u8; OFFLOAD_HEADER] {
        let mut bytes = [0; OFFLOAD_HEADER];
        bytes[..2].copy_from_slice(&[self.flags, self.kind]);
        let words = [self.header_length, self.segment_size, self.checksum_start, self.checksum_offset];
        for (field, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; OFFLOAD_HEADER]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            kind: bytes[1],
            header_length: word(2),
            segment_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }
}

/// A frame on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// What is left to do about it.
    pub offload: Offload,
    /// The VLAN tag that the receiver has taken off, protocol and control information. Tags of a frame to be sent
    /// are in its bytes.
    pub tag: Option<(u16, u16)>,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// A packet socket on an interface. Frames that others send there are not seen, and its own neither.
#[derive(Debug)]
pub struct Tap {
    socket: Socket,
    name: String,
    buffer: RefCell<Vec<u8>>,
}

impl Tap {
    /// Opens one on `interface` in `namespace`.
    ///
    /// # Errors
    ///
    /// No such interface, or no privilege.
    pub fn open(namespace: &Namespace, interface: &str) -> anyhow::Result<Self> {
        let name = format!("{interface} in {}", namespace.name());
        let socket =
            namespace.enter(|| open(interface)).with_context(|| format!("cannot open a tap on {name}"))?;
        Ok(Self { socket, name, buffer: RefCell::new(vec![0; LARGEST]) })
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// As `send(2)`: the frame is too long for the interface, or what it says about its offloads is not true.
    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        let bytes = [&frame.offload.to_bytes()[..], &frame.bytes].concat();
        self.socket.send(&bytes).map(drop)
    }

    /// The next frame that has come, without waiting for one.
    ///
    /// # Errors
    ///
    /// One was lost: a test must not conclude anything from what it did not see.
    pub fn receive(&self) -> anyhow::Result<Option<Frame>> {
        let mut buffer = self.buffer.borrow_mut();
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let mut control = nix::cmsg_space!(libc::tpacket_auxdata);
        let received =
            recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT);
        let message = match received {
            Ok(message) => message,
            Err(Errno::EAGAIN) => {
                let lost = lost_frames(&self.socket)?;
                ensure!(lost == 0, "the tap {} lost {lost} frames", self.name);
                return Ok(None);
            }
            Err(errno) => return Err(errno).with_context(|| format!("cannot read the tap {}", self.name)),
        };
        let mut tag = None;
        for item in message.cmsgs()? {
            if let ControlMessageOwned::Unknown(item) = item
                && item.cmsg_header.cmsg_type == libc::PACKET_AUXDATA
            {
                tag = tag_in(&item.data_bytes);
            }
        }
        let size = message.bytes;
        let (header, bytes) = buffer[..size].split_first_chunk().context("a frame without its header")?;
        Ok(Some(Frame { offload: Offload::from_bytes(*header), tag, bytes: bytes.to_vec() }))
    }

    /// Waits until a frame has come, or `timeout` is over.
    ///
    /// # Errors
    ///
    /// As `poll(2)`.
    pub fn wait(&self, timeout: Duration) -> anyhow::Result<()> {
        let timeout = PollTimeout::try_from(timeout)?;
        let mut sockets = [PollFd::new(std::os::fd::AsFd::as_fd(&self.socket), PollFlags::POLLIN)];
        poll(&mut sockets, timeout)?;
        Ok(())
    }
}

/// Reads `struct tpacket_auxdata` (linux/if_packet.h): status, two lengths, two offsets of 16 bits, then the tag.
fn tag_in(auxdata: &[u8]) -> Option<(u16, u16)> {
    let status = u32::from_ne_bytes(*auxdata.first_chunk()?);
    let word = |at: usize| Some(u16::from_ne_bytes([*auxdata.get(at)?, *auxdata.get(at + 1)?]));
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    Some((word(18)?, word(16)?))
}

fn open(interface: &str) -> anyhow::Result<Socket> {
    // Protocol 0 keeps the socket silent until it is bound: nothing of other interfaces slips in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, RcvBufForce, &QUEUE_BYTES)?;
    for option in [libc::PACKET_AUXDATA, libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
        set_packet_option(&socket, option, 1)?;
    }
    let index = nix::net::if_::if_nametoindex(interface)?;
    socket.bind(&link_address(index, u16::try_from(libc::ETH_P_ALL)?.to_be())?)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_to_hardware_reads_back() {
        let offload = Offload {
            flags: Offload::NEEDS_CHECKSUM,
            kind: Offload::TCP_V6 | Offload::ECN,
            header_length: 74,
            segment_size: 1220,
            checksum_start: 54,
            checksum_offset: 16,
        };
        assert_eq!(Offload::from_bytes(offload.to_bytes()), offload);
        assert_eq!(offload.to_bytes()[..2], [1, 0x84]);
    }
}
