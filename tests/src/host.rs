//! A host of the lab: a namespace with one interface, whose programs open sockets and send packets of any shape.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    capture::{Capture, link_address},
    netns::Namespace,
    packets::{Packet, protocol},
};

/// Its only interface, apart from loopback.
pub const INTERFACE: &str = "eth0";

/// A host with one interface called [`INTERFACE`] and one neighbour behind it.
#[derive(Debug)]
pub struct Host {
    /// What reports call it.
    pub name: String,
    /// Where it lives.
    pub namespace: Namespace,
    /// Its addresses of both families, the first of a family being its own address in replies and reports.
    pub addresses: Vec<IpAddr>,
    /// Its interface's hardware address.
    pub mac: [u8; 6],
    /// The hardware address at the other end, which packets made by hand are sent to.
    pub gateway_mac: [u8; 6],
}

impl Host {
    /// Its first address of the family of `like`.
    ///
    /// # Panics
    ///
    /// When it has none.
    #[must_use]
    pub fn address(&self, like: IpAddr) -> IpAddr {
        let mut addresses = self.addresses.iter().copied();
        addresses
            .find(|address| address.is_ipv4() == like.is_ipv4())
            .unwrap_or_else(|| panic!("{} has no address of the family of {like}", self.name))
    }

    /// Starts to see what passes its interface.
    ///
    /// # Errors
    ///
    /// As [`Capture::start`].
    pub fn capture(&self) -> anyhow::Result<Capture> {
        Capture::start(&self.namespace, INTERFACE)
    }

    /// Opens a TCP connection from `from` (port 0: any).
    ///
    /// # Errors
    ///
    /// As `connect(2)`; `TimedOut` when there is no answer.
    pub fn connect(&self, from: SocketAddr, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        self.namespace.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            // Tests come back to a port soon, while the last connection from it is still in TIME_WAIT.
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), timeout)?;
            Ok(socket.into())
        })
    }

    /// A UDP socket at `from` (port 0: any).
    ///
    /// # Errors
    ///
    /// As `bind(2)`.
    pub fn udp(&self, from: SocketAddr) -> io::Result<UdpSocket> {
        self.datagram(from, Protocol::UDP)
    }

    /// A UDP-Lite socket at `from`. It reads and writes like a UDP socket.
    ///
    /// # Errors
    ///
    /// As `bind(2)`, and a kernel without UDP-Lite.
    pub fn udplite(&self, from: SocketAddr) -> io::Result<UdpSocket> {
        self.datagram(from, Protocol::from(i32::from(protocol::UDPLITE)))
    }

    fn datagram(&self, from: SocketAddr, protocol: Protocol) -> io::Result<UdpSocket> {
        self.namespace.enter(|| {
            let socket = Socket::new(Domain::for_address(from), Type::DGRAM, Some(protocol))?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            Ok(socket.into())
        })
    }

    /// Sends packets as they are, whatever this host's own stack thinks of them.
    ///
    /// # Errors
    ///
    /// The interface is down.
    pub fn send(&self, packets: &[Packet]) -> anyhow::Result<()> {
        let socket = self.namespace.enter(|| -> anyhow::Result<Socket> {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            let index = nix::net::if_::if_nametoindex(INTERFACE)?;
            socket.bind(&link_address(index, 0)?)?;
            Ok(socket)
        })?;
        for packet in packets {
            let frame = packet.frame(self.mac, self.gateway_mac);
            socket.send(&frame).with_context(|| format!("{} cannot send {packet}", self.name))?;
        }
        Ok(())
    }

    /// Keeps this host's kernel from answering "protocol unreachable" to replies that only a capture reads, for as
    /// long as the sockets are kept.
    ///
    /// # Errors
    ///
    /// No privilege.
    pub fn accept_protocols(&self, protocols: &[u8]) -> io::Result<Vec<Socket>> {
        self.namespace.enter(|| {
            let families = [Domain::IPV4, Domain::IPV6];
            let kinds = protocols.iter().flat_map(|protocol| families.map(|family| (family, *protocol)));
            kinds
                .map(|(family, protocol)| {
                    Socket::new(family, Type::RAW, Some(Protocol::from(i32::from(protocol))))
                })
                .collect()
        })
    }
}
