//! One question and its answer, in any protocol, and what was seen of it on either side.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr},
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    capture::{Capture, Direction},
    host::Host,
    packets::{DCCP_REQUEST, Packet, protocol},
    responder::Sighting,
    topology::Lab,
};

/// Long enough for any answer on one machine that has other things to do. It is only waited for in full when something is wrong.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// How long to wait for an answer that must not come. It is only waited for in full when all is well.
pub const SILENCE: Duration = Duration::from_millis(400);

/// What a question is asked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A connection of the kernel's own: banner, then an echo.
    Tcp,
    /// A datagram of the kernel's own.
    Udp,
    /// A UDP-Lite datagram.
    UdpLite,
    /// Echo of the address's family.
    Icmp,
    /// INIT, answered by INIT ACK.
    Sctp,
    /// Request, answered by Response.
    Dccp,
    /// A packet with a key, sent back.
    Gre,
    /// A packet sent back.
    Esp,
}

impl Protocol {
    /// Every one.
    pub const ALL: [Self; 8] =
        [Self::Tcp, Self::Udp, Self::UdpLite, Self::Icmp, Self::Sctp, Self::Dccp, Self::Gre, Self::Esp];

    /// Whether it has ports.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        !matches!(self, Self::Icmp | Self::Gre | Self::Esp)
    }

    /// Its number for packets to `address`.
    #[must_use]
    pub const fn number(self, address: IpAddr) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
            Self::UdpLite => protocol::UDPLITE,
            Self::Icmp if address.is_ipv4() => protocol::ICMP,
            Self::Icmp => protocol::ICMPV6,
            Self::Sctp => protocol::SCTP,
            Self::Dccp => protocol::DCCP,
            Self::Gre => protocol::GRE,
            Self::Esp => protocol::ESP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::UdpLite => "UDP-Lite",
            Self::Icmp => "ICMP echo",
            Self::Sctp => "SCTP",
            Self::Dccp => "DCCP",
            Self::Gre => "GRE",
            Self::Esp => "ESP",
        })
    }
}

/// A question: from whom, to whom, in what.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The protocol.
    pub protocol: Protocol,
    /// The client's address and port. The port is the identifier of an ICMP echo, the key of GRE and the index of ESP.
    pub from: SocketAddr,
    /// Whom it is for. Protocols without ports ignore the port.
    pub to: SocketAddr,
    /// How long to wait for the answer.
    pub timeout: Duration,
}

impl Question {
    /// A question from the client's first address.
    #[must_use]
    pub fn new(lab: &Lab, protocol: Protocol, from_port: u16, to: SocketAddr) -> Self {
        let from = SocketAddr::new(lab.client.address(to.ip()), from_port);
        Self { protocol, from, to, timeout: PATIENCE }
    }

    /// The same from another of the client's addresses.
    #[must_use]
    pub fn from(self, address: IpAddr) -> Self {
        Self { from: SocketAddr::new(address, self.from.port()), ..self }
    }

    /// The same for an answer that should not come.
    #[must_use]
    pub fn expecting_silence(self) -> Self {
        Self { timeout: SILENCE, ..self }
    }

    /// Asks, and watches the client's and all pods' interfaces meanwhile.
    ///
    /// # Errors
    ///
    /// The lab itself is broken; that there is no answer is an [`Outcome`].
    pub fn ask(&self, lab: &Lab) -> anyhow::Result<Outcome> {
        let at_client = lab.client.capture()?;
        let at_pods: Vec<(&Host, Capture)> =
            lab.pods.iter().map(|pod| Ok((&pod.host, pod.host.capture()?))).collect::<anyhow::Result<_>>()?;
        let answer = self.exchange(&lab.client)?;
        let number = self.protocol.number(self.to.ip());
        let mut pods_saw = Vec::new();
        let mut wrong_checksums = at_client.wrong_checksums();
        for (host, capture) in &at_pods {
            let packets = capture.packets(Direction::In);
            let requests = packets.into_iter().filter(|packet| packet.protocol == number);
            pods_saw.extend(requests.map(|packet| (host.name.clone(), packet)));
            wrong_checksums.extend(capture.wrong_checksums());
        }
        Ok(Outcome { answer, client_saw: at_client.packets(Direction::In), pods_saw, wrong_checksums })
    }

    /// As [`Self::ask`], without watching: who answered?
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn ask_who(&self, client: &Host) -> anyhow::Result<Result<Sighting, String>> {
        let answer = self.exchange(client)?;
        Ok(answer.and_then(|bytes| {
            Sighting::in_answer(&bytes).ok_or_else(|| "the answer names no pod".to_owned())
        }))
    }

    /// Asks on a host, and returns the answer as a program there gets it, or why it gets none.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn exchange(&self, client: &Host) -> anyhow::Result<Result<Vec<u8>, String>> {
        let Self { protocol, from, to, timeout } = *self;
        match protocol {
            Protocol::Tcp => Ok(self.tcp(client).map_err(|error| format!("{error:#}"))),
            Protocol::Udp | Protocol::UdpLite => {
                let socket = match protocol {
                    Protocol::Udp => client.udp(from),
                    _ => client.udplite(from),
                };
                let socket = socket.with_context(|| format!("no {protocol} socket at {from}"))?;
                socket.set_read_timeout(Some(timeout))?;
                socket.send_to(b"question", to)?;
                let mut buffer = [0; 2048];
                Ok(match socket.recv_from(&mut buffer) {
                    Ok((size, source)) if source == to => Ok(buffer[..size].to_vec()),
                    Ok((_, source)) => Err(format!("the answer came from {source}")),
                    Err(_) => Err("no answer".to_owned()),
                })
            }
            _ => {
                let request = self.request();
                let inbox = client.inbox(request.protocol, from.ip())?;
                client.send(std::slice::from_ref(&request))?;
                let answer = inbox.wait_for(timeout, |packet| is_answer(packet, &request))?;
                Ok(answer.map(|packet| packet.payload).ok_or_else(|| "no answer".to_owned()))
            }
        }
    }

    fn tcp(&self, client: &Host) -> anyhow::Result<Vec<u8>> {
        let mut stream = client.connect(self.from, self.to, self.timeout).context("no connection")?;
        stream.set_read_timeout(Some(self.timeout))?;
        let mut banner = Vec::new();
        let mut reader = BufReader::new(stream.try_clone()?);
        reader.read_until(b'\n', &mut banner).context("no banner")?;
        stream.write_all(b"question").context("cannot send")?;
        let mut echo = [0; 8];
        reader.read_exact(&mut echo).context("no echo")?;
        anyhow::ensure!(&echo == b"question", "the echo is wrong: {echo:?}");
        // Until the pod has closed too: a late segment would turn up in what is watched next.
        stream.shutdown(Shutdown::Write).context("cannot close")?;
        reader.read_to_end(&mut Vec::new()).context("the pod does not close")?;
        Ok(banner)
    }

    fn request(&self) -> Packet {
        let Self { protocol, from, to, .. } = *self;
        match protocol {
            Protocol::Icmp => Packet::echo_request(from.ip(), to.ip(), from.port(), 1, b"question"),
            Protocol::Sctp => Packet::sctp_init(from, to, 0x7000_0000 | u32::from(from.port())),
            Protocol::Dccp => Packet::dccp(from, to, DCCP_REQUEST, b"question"),
            Protocol::Gre => Packet::gre(from.ip(), to.ip(), from.port().into(), b"question"),
            Protocol::Esp => Packet::esp(from.ip(), to.ip(), from.port().into(), 1, b"question"),
            Protocol::Tcp | Protocol::Udp | Protocol::UdpLite => {
                unreachable!("the kernel's sockets ask in {protocol}")
            }
        }
    }
}

/// Whether `packet` answers `request`: the same tuple the other way round, and no question itself. To a host that asks
/// itself, its own question comes back first.
fn is_answer(packet: &Packet, request: &Packet) -> bool {
    packet.protocol == request.protocol
        && packet.source == request.destination
        && packet.destination == request.source
        && packet.ports() == request.ports().map(|(source, destination)| (destination, source))
        && match request.protocol {
            protocol::ICMP | protocol::ICMPV6 => {
                packet.echo() == request.echo() && packet.payload.first() != request.payload.first()
            }
            // The header that names the tunnel.
            protocol::GRE | protocol::ESP => {
                packet.payload.get(..8) == request.payload.get(..8)
                    && Sighting::in_answer(&packet.payload).is_some()
            }
            _ => true,
        }
}

/// What came of a question.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the client got, or why it got nothing.
    pub answer: Result<Vec<u8>, String>,
    /// Every packet that reached the client meanwhile.
    pub client_saw: Vec<Packet>,
    /// Every packet of the question's protocol that reached a pod meanwhile, with the pod's name.
    pub pods_saw: Vec<(String, Packet)>,
    /// Packets with a wrong transport checksum, as sentences.
    pub wrong_checksums: Vec<String>,
}

impl Outcome {
    /// Where the client's packets came from, each address once.
    #[must_use]
    pub fn sources(&self) -> Vec<IpAddr> {
        let mut sources: Vec<IpAddr> = self.client_saw.iter().map(|packet| packet.source).collect();
        sources.sort_unstable();
        sources.dedup();
        sources
    }

    /// The pods that saw the question, each once.
    #[must_use]
    pub fn pods(&self) -> Vec<&str> {
        let mut pods: Vec<&str> = self.pods_saw.iter().map(|(pod, _)| pod.as_str()).collect();
        pods.sort_unstable();
        pods.dedup();
        pods
    }

    /// What is wrong, if exactly one pod should have answered for `question` and nothing else should have happened.
    /// None: all is well.
    #[must_use]
    pub fn complaint(&self, question: &Question, lab: &Lab) -> Option<String> {
        if let Err(reason) = &self.answer {
            return Some(format!("{reason}; pods that saw the request: {:?}", self.pods()));
        }
        let pod = match self.pods()[..] {
            [pod] => pod,
            ref pods => return Some(format!("one pod should have seen it, but {pods:?} did")),
        };
        let sources = self.sources();
        if sources != [question.to.ip()] {
            let seen: Vec<String> = self.client_saw.iter().take(10).map(ToString::to_string).collect();
            return Some(format!(
                "the client should see {} only, but it saw {}",
                question.to.ip(),
                seen.join(", ")
            ));
        }
        let address = lab.pod(pod).host.address(question.to.ip());
        for (_, packet) in &self.pods_saw {
            let ports_kept = !question.protocol.has_ports()
                || packet.ports() == Some((question.from.port(), question.to.port()));
            if packet.source != question.from.ip() || packet.destination != address || !ports_kept {
                return Some(format!("{pod} saw {packet}, not the client's own address and ports"));
            }
        }
        (!self.wrong_checksums.is_empty()).then(|| self.wrong_checksums.join("; "))
    }
}
