//! A host of the lab: a namespace with an interface, whose programs open sockets and send packets of any shape.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    capture::{Capture, PacketSocket, link_address},
    inbox::Inbox,
    netns::Namespace,
    packets::{Packet, protocol},
    wait,
};

/// The only interface of hosts that have one, apart from loopback.
pub const INTERFACE: &str = "eth0";

/// A socket is gone when every program that got it by a fork runs: milliseconds, seconds on a machine that has much to do.
const CLOSES_WITHIN: Duration = Duration::from_secs(10);

/// How packets made by hand leave a host.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// As frames, which the host's own stack never sees.
    Link {
        /// The interface's hardware address.
        mac: [u8; 6],
        /// The hardware address of the gateway, which all frames are sent to.
        gateway_mac: [u8; 6],
    },
    /// As a program's packets: the host's stack routes them, and what sits on its way out sees them as made here.
    Stack,
}

/// A host that clients and servers run on.
#[derive(Debug)]
pub struct Host {
    /// What reports call it.
    pub name: String,
    /// Where it lives.
    pub namespace: Namespace,
    /// Its addresses of both families, the first of a family being its own address in replies and reports.
    pub addresses: Vec<IpAddr>,
    /// Its interface, or the one of several by which it is a client.
    pub interface: String,
    /// How packets made by hand leave.
    pub output: Output,
}

impl Host {
    /// The hardware addresses of its interface and of its gateway.
    ///
    /// # Panics
    ///
    /// When it sends by its stack, which finds them by itself.
    #[must_use]
    pub fn hardware_addresses(&self) -> [[u8; 6]; 2] {
        match self.output {
            Output::Link { mac, gateway_mac } => [mac, gateway_mac],
            Output::Stack => panic!("{} sends by its stack", self.name),
        }
    }

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
        Capture::start(&self.namespace, &self.interface)
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

    /// Closes a UDP socket of this host, and waits until nothing of it is left. A program that another thread is starting just then
    /// has the socket as well until it runs, and what comes meanwhile is delivered, not refused.
    ///
    /// # Errors
    ///
    /// Something keeps it open.
    pub fn close(&self, socket: UdpSocket) -> anyhow::Result<()> {
        let address = socket.local_addr()?;
        drop(socket);
        let table = if address.is_ipv4() { "udp" } else { "udp6" };
        self.namespace.enter(|| {
            // The second word of a line is the local address and port, in hexadecimal (Linux, Documentation/networking/proc_net_tcp.rst).
            let end = format!(":{:04X}", address.port());
            let gone = wait::until(CLOSES_WITHIN, || {
                let sockets = fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok()?;
                let mut local = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
                (!local.any(|local| local.ends_with(&end))).then_some(())
            });
            gone.with_context(|| format!("{}: the socket at {address} stays open", self.name))
        })
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

    /// Sends packets as they are. Of those that go by [`Output::Stack`] the stack fills in IPv4's header checksum, and
    /// refuses what it cannot route.
    ///
    /// # Errors
    ///
    /// The interface is down, or there is no route.
    pub fn send(&self, packets: &[Packet]) -> anyhow::Result<()> {
        let context = |packet: &Packet| format!("{} cannot send {packet}", self.name);
        self.namespace.enter(|| match self.output {
            Output::Link { mac, gateway_mac } => {
                // One for all: closing such a socket takes the kernel a grace period of RCU.
                let socket = PacketSocket::open()?;
                let index = nix::net::if_::if_nametoindex(self.interface.as_str())?;
                socket.bind(&link_address(index, 0)?)?;
                packets.iter().try_for_each(|packet| {
                    socket.send(&packet.frame(mac, gateway_mac)).map(drop).with_context(|| context(packet))
                })
            }
            Output::Stack => packets.iter().try_for_each(|packet| {
                let to = SocketAddr::new(packet.destination, 0);
                // Sockets of this protocol number expect the IP header to be there, in both families.
                let protocol = Protocol::from(libc::IPPROTO_RAW);
                let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?;
                socket.send_to(&packet.encode(), &to.into()).map(drop).with_context(|| context(packet))
            }),
        })
    }

    /// What its kernel hands to programs of `protocol`, at its address `local`, from now on.
    ///
    /// # Errors
    ///
    /// No privilege, or not its address.
    pub fn inbox(&self, protocol: u8, local: IpAddr) -> anyhow::Result<Inbox> {
        self.namespace
            .enter(|| Inbox::open(protocol, local))
            .with_context(|| format!("{} cannot receive at {local}", self.name))
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
