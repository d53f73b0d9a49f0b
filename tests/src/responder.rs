//! What a pod of the lab runs: it answers every protocol, and each answer says who saw what.
//!
//! One thread per host polls all its sockets. ICMP echo is left to the host's kernel, as in a real pod.

use std::{
    collections::HashMap,
    fmt,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    str::FromStr,
    thread::JoinHandle,
};

use anyhow::{Context as _, anyhow};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
        sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, RcvBufForce},
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    netns::Namespace,
    packets::{DCCP_REQUEST, DCCP_RESPONSE, Packet, SCTP_INIT, name, protocol},
};

/// Protocols that no kernel socket answers: the responder does it by hand.
const RAW_PROTOCOLS: [u8; 4] = [protocol::SCTP, protocol::DCCP, protocol::GRE, protocol::ESP];

/// Room for what comes within seconds in which others have this machine's CPUs.
const RECEIVE_BUFFER: usize = 16 << 20;

/// Which ports a responder listens on. Protocols without ports are always answered.
#[derive(Clone, Debug)]
pub struct Ports {
    /// TCP.
    pub tcp: Vec<u16>,
    /// UDP and UDP-Lite.
    pub udp: Vec<u16>,
}

impl Default for Ports {
    /// The Service's own port, and many that it never named.
    fn default() -> Self {
        Self { tcp: vec![21, 22, 5060, 6000, 8443], udp: vec![53, 500, 4500, 5060, 6000, 16384, 51820] }
    }
}

/// What a host saw of a packet, as its answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The host's name.
    pub host: String,
    /// The sender. Port 0 for protocols without ports.
    pub peer: SocketAddr,
    /// The host's own address that the packet was for. Port 0 for protocols without ports.
    pub local: SocketAddr,
    /// The protocol's name.
    pub protocol: String,
}

impl fmt::Display for Sighting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} saw {} -> {} {}", self.host, self.peer, self.local, self.protocol)
    }
}

impl FromStr for Sighting {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[host, "saw", peer, "->", local, protocol] = &words[..] else {
            return Err(anyhow!("not a sighting: {line:?}"));
        };
        Ok(Self {
            host: host.to_owned(),
            peer: peer.parse()?,
            local: local.parse()?,
            protocol: protocol.to_owned(),
        })
    }
}

impl Sighting {
    /// Finds the sighting in an answer: the first line that is one, whatever header comes before it.
    #[must_use]
    pub fn in_answer(bytes: &[u8]) -> Option<Self> {
        bytes.split(|byte| *byte == b'\n').find_map(|line| std::str::from_utf8(line).ok()?.parse().ok())
    }
}

/// Answers on a host until it is dropped.
#[derive(Debug)]
pub struct Responder {
    thread: Option<JoinHandle<()>>,
    /// Closing it ends the thread.
    stop: Option<io::PipeWriter>,
}

impl Responder {
    /// Starts answering in `namespace` as `host`.
    ///
    /// # Errors
    ///
    /// A port is taken, or no privilege.
    pub fn start(namespace: &Namespace, host: &str, ports: &Ports) -> anyhow::Result<Self> {
        let mut answering = namespace
            .enter(|| Answering::open(host, ports))
            .with_context(|| format!("{host} cannot answer"))?;
        let (stopped, stop) = io::pipe()?;
        let file = std::fs::File::open(namespace.path())?;
        let thread = std::thread::Builder::new().name(format!("{host} answers")).spawn(move || {
            let served = setns(&file, CloneFlags::CLONE_NEWNET)
                .map_err(anyhow::Error::from)
                .and_then(|()| answering.serve(&stopped));
            if let Err(error) = served {
                eprintln!("{} no longer answers: {error:#}", answering.host);
            }
        })?;
        Ok(Self { thread: Some(thread), stop: Some(stop) })
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has said why on stderr if it panicked; a second panic in a drop would hide that.
            let _ = thread.join();
        }
    }
}

/// A socket of which every datagram is answered.
#[derive(Debug)]
struct Datagrams {
    socket: Socket,
    protocol: u8,
    is_raw: bool,
    port: u16,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    unsent: Vec<u8>,
    /// The peer has sent everything it will.
    ended: bool,
}

#[derive(Debug)]
struct Answering {
    host: String,
    listeners: Vec<TcpListener>,
    datagrams: Vec<Datagrams>,
    connections: HashMap<RawFd, Connection>,
}

impl Answering {
    fn open(host: &str, ports: &Ports) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        let mut datagrams = Vec::new();
        for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            for port in &ports.tcp {
                let address = SocketAddr::new(any, *port);
                let socket = new_socket(address, Type::STREAM, protocol::TCP)?;
                socket.set_reuse_address(true)?;
                socket.bind(&address.into()).with_context(|| format!("TCP {address}"))?;
                socket.listen(512)?;
                listeners.push(socket.into());
            }
            let mut raw = RAW_PROTOCOLS.to_vec();
            for port in &ports.udp {
                datagrams.push(Datagrams::open(SocketAddr::new(any, *port), protocol::UDP, false)?);
            }
            // A kernel with UDP-Lite answers "port unreachable" itself unless the port is open; one without needs a
            // raw socket.
            match new_socket(SocketAddr::new(any, 0), Type::DGRAM, protocol::UDPLITE) {
                Ok(_) => {
                    for port in &ports.udp {
                        datagrams.push(Datagrams::open(
                            SocketAddr::new(any, *port),
                            protocol::UDPLITE,
                            false,
                        )?);
                    }
                }
                Err(_) => raw.push(protocol::UDPLITE),
            }
            for protocol in raw {
                datagrams.push(Datagrams::open(SocketAddr::new(any, 0), protocol, true)?);
            }
        }
        Ok(Self { host: host.to_owned(), listeners, datagrams, connections: HashMap::new() })
    }

    fn serve(&mut self, stopped: &io::PipeReader) -> anyhow::Result<()> {
        loop {
            let mut fds = vec![PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
            fds.extend(self.listeners.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            fds.extend(self.datagrams.iter().map(|item| PollFd::new(item.socket.as_fd(), PollFlags::POLLIN)));
            let connections: Vec<RawFd> = self.connections.keys().copied().collect();
            fds.extend(connections.iter().map(|fd| {
                let connection = &self.connections[fd];
                let mut wanted = PollFlags::empty();
                wanted.set(PollFlags::POLLIN, !connection.ended);
                wanted.set(PollFlags::POLLOUT, !connection.unsent.is_empty());
                PollFd::new(connection.stream.as_fd(), wanted)
            }));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ready: Vec<bool> =
                fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
            drop(fds);
            if ready[0] {
                return Ok(());
            }
            let (listeners, rest) = ready[1..].split_at(self.listeners.len());
            let (datagrams, streams) = rest.split_at(self.datagrams.len());
            for (listener, _) in self.listeners.iter().zip(listeners).filter(|(_, ready)| **ready) {
                // Whoever has gone away meanwhile is not worth an error.
                if let Ok((stream, _)) = listener.accept()
                    && let Ok(connection) = Connection::greet(stream, &self.host)
                {
                    self.connections.insert(connection.stream.as_raw_fd(), connection);
                }
            }
            for (item, _) in self.datagrams.iter().zip(datagrams).filter(|(_, ready)| **ready) {
                item.answer(&self.host);
            }
            for (fd, _) in connections.iter().zip(streams).filter(|(_, ready)| **ready) {
                let over = self.connections.get_mut(fd).is_some_and(|connection| !connection.goes_on());
                if over {
                    self.connections.remove(fd);
                }
            }
        }
    }
}

impl Connection {
    fn greet(stream: TcpStream, host: &str) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
        let sighting = Sighting { host: host.to_owned(), peer, local, protocol: name(protocol::TCP) };
        Ok(Self { stream, unsent: format!("{sighting}\n").into_bytes(), ended: false })
    }

    /// Echoes what has come. False when the connection is over.
    fn goes_on(&mut self) -> bool {
        let mut buffer = vec![0; 1 << 16];
        while !self.ended && self.unsent.len() < 1 << 20 {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(size) => self.unsent.extend_from_slice(&buffer[..size]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(size) => drop(self.unsent.drain(..size)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        !self.ended
    }
}

impl Datagrams {
    fn open(address: SocketAddr, protocol: u8, is_raw: bool) -> anyhow::Result<Self> {
        let opened = || -> anyhow::Result<Socket> {
            let kind = if is_raw { Type::RAW } else { Type::DGRAM };
            let socket = new_socket(address, kind, protocol)?;
            // The answer must leave with the address that the question came to: a host may have many.
            if address.is_ipv4() {
                setsockopt(&socket, Ipv4PacketInfo, &true)?;
            } else {
                setsockopt(&socket, Ipv6RecvPacketInfo, &true)?;
            }
            // Not what the machine allows: of packets that native XDP has seen, each takes a page, and that would be a hundred.
            setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
            if !is_raw {
                socket.bind(&address.into())?;
            }
            Ok(socket)
        };
        let socket = opened().with_context(|| format!("{} {address}", name(protocol)))?;
        Ok(Self { socket, protocol, is_raw, port: address.port() })
    }

    fn answer(&self, host: &str) {
        let mut buffer = vec![0; 1 << 16];
        while let Ok((size, peer, local)) = receive(self.socket.as_fd(), &mut buffer) {
            let message = &buffer[..size];
            let answer = if self.is_raw {
                self.raw_answer(host, message, peer, local)
            } else {
                let sighting = self.sighting(host, peer, SocketAddr::new(local, self.port));
                Some([format!("{sighting}\n").as_bytes(), message].concat())
            };
            let Some(answer) = answer else { continue };
            // Raw IPv6 sockets insist on port 0.
            let peer = if self.is_raw { SocketAddr::new(peer.ip(), 0) } else { peer };
            // The peer asks again if the answer is lost.
            let _ = send(self.socket.as_fd(), &answer, local, peer);
        }
    }

    fn sighting(&self, host: &str, peer: SocketAddr, local: SocketAddr) -> Sighting {
        Sighting { host: host.to_owned(), peer, local, protocol: name(self.protocol) }
    }

    /// The transport header and data to answer a raw message with; none if it asks for nothing.
    fn raw_answer(&self, host: &str, message: &[u8], peer: SocketAddr, local: IpAddr) -> Option<Vec<u8>> {
        let request = match local {
            // Raw IPv4 sockets show the IP header, raw IPv6 sockets do not.
            IpAddr::V4(_) => Packet::decode(message).ok()?,
            IpAddr::V6(_) => Packet::new(peer.ip(), local, self.protocol, message.to_vec()),
        };
        // Two hosts that echo everything would go on for ever.
        if Sighting::in_answer(&request.payload).is_some() {
            return None;
        }
        // A pod that never looks at checksums would hide a broken rewrite.
        if let Err(error) = request.check_checksum() {
            eprintln!("{host} ignores a packet: {error:#}");
            return None;
        }
        let (peer_port, port) = request.ports().unwrap_or((0, 0));
        let (from, to) = (SocketAddr::new(local, port), SocketAddr::new(peer.ip(), peer_port));
        // The newline before it parts it from the binary header.
        let line = format!("\n{}\n", self.sighting(host, to, from));
        let payload = &request.payload;
        match self.protocol {
            protocol::SCTP => {
                let [SCTP_INIT, _, _, _, tag @ ..] = *payload.get(12..)?.first_chunk::<8>()? else {
                    return None;
                };
                Some(Packet::sctp_init_ack(from, to, u32::from_be_bytes(tag), line.as_bytes()).payload)
            }
            protocol::DCCP => {
                (payload.get(8)? >> 1 & 0xf == DCCP_REQUEST).then_some(())?;
                Some(Packet::dccp(from, to, DCCP_RESPONSE, line.as_bytes()).payload)
            }
            protocol::UDPLITE => {
                Some(Packet::udplite(from, to, 0, &[line.as_bytes(), payload.get(8..)?].concat()).payload)
            }
            protocol::GRE | protocol::ESP => {
                let (header, data) = payload.split_at_checked(8)?;
                Some([header, line.as_bytes(), data].concat())
            }
            _ => None,
        }
    }
}

fn new_socket(address: SocketAddr, kind: Type, protocol: u8) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::from(i32::from(protocol))))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() && kind != Type::RAW {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Size, sender, and the address that the message was for.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> anyhow::Result<(usize, SocketAddr, IpAddr)> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let local = message.cmsgs()?.find_map(|item| match item {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr))),
        _ => None,
    });
    let peer = message.address.context("a message without sender")?;
    let peer = match (peer.as_sockaddr_in(), peer.as_sockaddr_in6()) {
        (Some(peer), _) => SocketAddr::V4((*peer).into()),
        (_, Some(peer)) => SocketAddr::V6((*peer).into()),
        _ => return Err(anyhow!("a sender of no IP family")),
    };
    Ok((message.bytes, peer, local.context("a message without destination")?))
}

fn send(socket: BorrowedFd<'_>, message: &[u8], from: IpAddr, to: SocketAddr) -> nix::Result<usize> {
    let parts = [IoSlice::new(message)];
    let to = SockaddrStorage::from(to);
    match from {
        IpAddr::V4(from) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            sendmsg(
                socket.as_raw_fd(),
                &parts,
                &[ControlMessage::Ipv4PacketInfo(&info)],
                MsgFlags::empty(),
                Some(&to),
            )
        }
        IpAddr::V6(from) => {
            let info =
                libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: from.octets() }, ipi6_ifindex: 0 };
            sendmsg(
                socket.as_raw_fd(),
                &parts,
                &[ControlMessage::Ipv6PacketInfo(&info)],
                MsgFlags::empty(),
                Some(&to),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sighting_is_found_behind_a_binary_header() {
        let sighting = Sighting {
            host: "alpine-1".to_owned(),
            peer: "[fd00:1::100]:41000".parse().unwrap(),
            local: "[1100::202]:0".parse().unwrap(),
            protocol: "gre".to_owned(),
        };
        let answer = [&[0x20, 0, 0x88, 0xb5, 0, 0, 0, 1], format!("\n{sighting}\nrest").as_bytes()].concat();
        assert_eq!(Sighting::in_answer(&answer), Some(sighting));
        assert_eq!(Sighting::in_answer(b"no sighting\n"), None);
    }
}
