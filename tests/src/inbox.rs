//! What a host's kernel hands to its programs: a raw socket, which gets whole packets of one protocol after all that the
//! stack does to them or objects to. A capture sees what is on the wire; only this shows that it was accepted.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use crate::packets::Packet;

/// Packets of one protocol to one address.
#[derive(Debug)]
pub struct Inbox {
    // It reads like a UDP socket: a message and its sender.
    socket: UdpSocket,
    protocol: u8,
    local: IpAddr,
}

impl Inbox {
    /// Opens it in the namespace of this thread.
    pub(crate) fn open(protocol: u8, local: IpAddr) -> io::Result<Self> {
        let address = SocketAddr::new(local, 0);
        let number = Protocol::from(i32::from(protocol));
        let socket = Socket::new(Domain::for_address(address), Type::RAW, Some(number))?;
        socket.bind(&address.into())?;
        Ok(Self { socket: socket.into(), protocol, local })
    }

    /// The first packet that `matches`, waiting for it if it is not there yet. Those before it are gone.
    ///
    /// # Errors
    ///
    /// The kernel hands over what cannot be read, or the socket fails.
    pub fn wait_for(
        &self,
        timeout: Duration,
        matches: impl Fn(&Packet) -> bool,
    ) -> anyhow::Result<Option<Packet>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            match self.receive(left)? {
                Some(packet) if matches(&packet) => return Ok(Some(packet)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    fn receive(&self, timeout: Duration) -> anyhow::Result<Option<Packet>> {
        let mut buffer = vec![0; 1 << 16];
        self.socket.set_read_timeout(Some(timeout))?;
        let (size, source) = match self.socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error).context("receiving from a raw socket"),
        };
        match self.local {
            // Raw IPv4 sockets show the IP header, raw IPv6 sockets do not.
            IpAddr::V4(_) => Packet::decode(&buffer[..size]).map(Some),
            IpAddr::V6(_) => {
                Ok(Some(Packet::new(source.ip(), self.local, self.protocol, buffer[..size].to_vec())))
            }
        }
    }
}
