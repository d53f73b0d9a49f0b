//! What is tried in a cell, one function a column.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, ErrorKind, IoSliceMut, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr},
};

use super::{
    Check, Client, Pods,
    ground::{Case, Ground, PORT},
    watch::Watch,
};
use crate::{
    exchange::{PATIENCE, Protocol, Question},
    packets::{Packet, protocol},
    responder::Sighting,
};

/// A TCP port that pods listen on and no Service names.
const TCP_PORT: u16 = 8443;
/// A port that no pod listens on.
const CLOSED_PORT: u16 = 9;
/// A transfer that segmentation offload, and a window, have something to do with.
const TRANSFER: usize = 300_000;
/// More than any link of the lab carries in one packet.
const LARGE_DATAGRAM: usize = 4000;
/// Fits an Ethernet of either family, but no way that is narrower.
const FULL_DATAGRAM: usize = 1440;

/// Tries what the column says.
///
/// # Errors
///
/// Something that must hold does not.
pub(super) fn check(check: Check, case: &Case<'_>) -> anyhow::Result<()> {
    match check {
        Check::Tcp => {
            ask(case, &[Protocol::Tcp])?;
            let watch = Watch::start(case)?;
            transfer(case)?;
            if case.ground.has_offloads() {
                watch.offloads_stayed_on()?;
            }
            watch.finish(&[protocol::TCP])
        }
        Check::Udp => {
            // Several times: a client stays where it is.
            ask(case, &[Protocol::Udp, Protocol::UdpLite, Protocol::Udp, Protocol::Udp])?;
            if case.pods == Pods::Several { clients_spread(case) } else { Ok(()) }
        }
        Check::Sctp => ask(case, &[Protocol::Sctp, Protocol::Dccp]),
        Check::Icmp => ask(case, &[Protocol::Icmp]),
        Check::Gre => ask(case, &[Protocol::Gre, Protocol::Esp]),
        Check::Fragments => fragments(case),
        Check::Errors => {
            error_of_the_pod(case)?;
            error_of_the_client(case)
        }
        Check::Pmtu => path_mtu_discovery(case),
    }
}

fn ask(case: &Case<'_>, protocols: &[Protocol]) -> anyhow::Result<()> {
    let watch = Watch::start(case)?;
    for protocol in protocols.iter().copied() {
        let question = Question {
            protocol,
            from: SocketAddr::new(case.from(), case.ground.next_port()),
            to: SocketAddr::new(case.external, PORT),
            timeout: PATIENCE,
        };
        let answer = question
            .exchange(case.client)?
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{protocol}"))?;
        // The kernel answers an echo by itself, and does not say who it is: what the pods saw must do.
        if protocol != Protocol::Icmp {
            recognise(case, &answer).with_context(|| format!("{protocol}"))?;
        }
    }
    let numbers: Vec<u8> = protocols.iter().map(|protocol| protocol.number(case.external)).collect();
    watch.finish(&numbers)
}

/// The answer is the pod's, and the pod was spoken to as it should be.
fn recognise(case: &Case<'_>, answer: &[u8]) -> anyhow::Result<()> {
    let sighting = Sighting::in_answer(answer).context("the answer names no pod")?;
    let wanted = (case.pod.name.as_str(), case.client_as_pods_see_it(), case.pod.address(case.external));
    let got = (sighting.host.as_str(), sighting.peer.ip(), sighting.local.ip());
    ensure!(got == wanted, "{sighting}, but it should have been {wanted:?}");
    Ok(())
}

/// Not all are on one pod, and each stays on its own. What there is only one client for, it asks through many external
/// addresses, on each of which it may be on another pod.
fn clients_spread(case: &Case<'_>) -> anyhow::Result<()> {
    let pairs: Vec<(IpAddr, IpAddr)> = match case.kind {
        Client::Outside => {
            let addresses = case.client.addresses.iter().copied();
            let family = addresses.filter(|address| address.is_ipv4() == case.external.is_ipv4());
            family.map(|from| (from, case.external)).collect()
        }
        _ => {
            let externals = Ground::externals(case.pods, case.family).into_iter();
            externals.map(|external| (case.from(), external)).collect()
        }
    };
    let mut pods = BTreeSet::new();
    for (from, to) in pairs {
        let [first, second] = [(); 2].map(|()| case.ground.who(case.client, from, to).map(|pod| pod.host));
        let (first, second) = (first?, second?);
        ensure!(first == second, "{from} to {to} was on {first}, then on {second}");
        pods.insert(first);
    }
    let servers = case.ground.servers(case.pods).iter().map(|pod| pod.host.name.clone()).collect();
    ensure!(pods == servers, "all clients are on {pods:?} of {servers:?}");
    Ok(())
}

/// Sends much, and reads it all back.
fn transfer(case: &Case<'_>) -> anyhow::Result<()> {
    let from = SocketAddr::new(case.from(), case.ground.next_port());
    let to = SocketAddr::new(case.external, TCP_PORT);
    let mut stream = case.client.connect(from, to, PATIENCE).context("no connection")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut banner = Vec::new();
    reader.read_until(b'\n', &mut banner).context("no banner")?;
    recognise(case, &banner)?;
    let sent = pattern(TRANSFER);
    let mut echo = vec![0; TRANSFER];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| stream.write_all(&sent).context("sending"));
        let read = reader.read_exact(&mut echo).context("reading what was sent");
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(read)
    })?;
    ensure!(echo == sent, "what came back is not what was sent");
    stream.shutdown(Shutdown::Write)?;
    reader.read_to_end(&mut Vec::new()).context("the pod does not close")?;
    Ok(())
}

/// Bytes of which none can be missing or out of place unseen.
fn pattern(size: usize) -> Vec<u8> {
    (0..=u16::MAX).cycle().flat_map(u16::to_be_bytes).take(size).collect()
}

/// A large datagram, in pieces that either side's kernel cuts and the other's puts together; then one whose pieces come in
/// reverse order.
fn fragments(case: &Case<'_>) -> anyhow::Result<()> {
    let watch = Watch::start(case)?;
    let from = SocketAddr::new(case.from(), case.ground.next_port());
    let to = SocketAddr::new(case.external, PORT);
    let socket = case.client.udp(from)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let question = pattern(LARGE_DATAGRAM);
    for round in 0..3 {
        socket.send_to(&question, to)?;
        answered(case, &socket, to, &question).with_context(|| format!("fragments, round {round}"))?;
    }
    let at_pod = watch.pod_saw()?.into_iter().filter(|packet| packet.fragment.is_some()).count();
    let at_client = watch.client_saw().into_iter().filter(|packet| packet.fragment.is_some()).count();
    ensure!(at_pod >= 9 && at_client >= 9, "{at_pod} fragments to the pod and {at_client} to the client");
    let mut pieces = Packet::udp(from, to, &question).fragments(u32::from(from.port()), 1400);
    pieces.reverse();
    case.client.send(&pieces)?;
    answered(case, &socket, to, &question).context("fragments in reverse order")?;
    watch.finish(&[protocol::UDP])
}

/// Reads the answer to `question` from `to`.
fn answered(case: &Case<'_>, socket: &UdpSocket, to: SocketAddr, question: &[u8]) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let (size, source) = socket.recv_from(&mut buffer).context("no answer")?;
    ensure!(source == to, "the answer came from {source}");
    let answer = &buffer[..size];
    ensure!(answer.ends_with(question), "the answer is not what was asked");
    recognise(case, answer)
}

/// A port of the pod's that is closed: the client's socket learns it, from the external address.
fn error_of_the_pod(case: &Case<'_>) -> anyhow::Result<()> {
    let watch = Watch::start(case)?;
    let socket = case.client.udp(SocketAddr::new(case.from(), case.ground.next_port()))?;
    socket.connect(SocketAddr::new(case.external, CLOSED_PORT))?;
    explain_errors(&socket)?;
    socket.send(b"question")?;
    refused(&socket, case.external).context("the client")?;
    watch.finish(&[protocol::UDP])
}

/// The client has gone before the answer comes: the pod's socket learns it, from whom it takes for the client.
fn error_of_the_client(case: &Case<'_>) -> anyhow::Result<()> {
    let watch = Watch::start(case)?;
    let port = case.ground.next_port();
    let any: IpAddr = match case.external {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let server = case.pod.udp(SocketAddr::new(any, port))?;
    server.set_read_timeout(Some(PATIENCE))?;
    explain_errors(&server)?;
    let client = case.client.udp(SocketAddr::new(case.from(), case.ground.next_port()))?;
    client.send_to(b"question", SocketAddr::new(case.external, port))?;
    let (_, peer) = server.recv_from(&mut [0; 64]).context("the question never reaches the pod")?;
    ensure!(peer.ip() == case.client_as_pods_see_it(), "the pod saw {peer}");
    server.connect(peer)?;
    case.client.close(client)?;
    server.send(b"answer")?;
    refused(&server, peer.ip()).context("the pod")?;
    watch.finish(&[protocol::UDP, Protocol::Icmp.number(case.external)])
}

/// Makes the kernel keep who sent an error.
fn explain_errors(socket: &UdpSocket) -> anyhow::Result<()> {
    if socket.local_addr()?.is_ipv4() {
        setsockopt(socket, Ipv4RecvErr, &true)?;
    } else {
        setsockopt(socket, Ipv6RecvErr, &true)?;
    }
    Ok(())
}

/// Waits until a connected socket is told "port unreachable" by `offender`.
fn refused(socket: &UdpSocket, offender: IpAddr) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    match socket.recv(&mut [0; 64]) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("is never told that the port is closed"),
        other => bail!("expects a refusal, and gets {other:?}"),
    }
    let mut data = [0; 256];
    let mut parts = [IoSliceMut::new(&mut data)];
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
    )
    .context("the kernel does not say who refused")?;
    let by = message.cmsgs()?.find_map(|item| match item {
        ControlMessageOwned::Ipv4RecvErr(_, Some(by)) => {
            Some(IpAddr::from(Ipv4Addr::from(u32::from_be(by.sin_addr.s_addr))))
        }
        ControlMessageOwned::Ipv6RecvErr(_, Some(by)) => {
            Some(IpAddr::from(Ipv6Addr::from(by.sin6_addr.s6_addr)))
        }
        _ => None,
    });
    ensure!(by == Some(offender), "is refused by {by:?}, not by {offender}");
    Ok(())
}

/// Both ways are narrower than their senders know, which learn it in time to get everything through.
fn path_mtu_discovery(case: &Case<'_>) -> anyhow::Result<()> {
    let watch = Watch::start(case)?;
    transfer(case)?;
    let from = SocketAddr::new(case.from(), case.ground.next_port());
    let to = SocketAddr::new(case.external, PORT);
    let socket = case.client.udp(from)?;
    // What is too big is lost, and the sender told so: it takes a try for each link that is narrower than the last.
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let question = pattern(FULL_DATAGRAM);
    let mut result = Ok(());
    for _ in 0..6 {
        socket.send_to(&question, to)?;
        result = answered(case, &socket, to, &question);
        if result.is_ok() {
            break;
        }
    }
    result.with_context(|| format!("a datagram of {FULL_DATAGRAM} bytes"))?;
    let told_client = watch.client_saw().iter().any(Packet::is_too_big);
    ensure!(told_client, "nobody told the client that a packet was too big");
    // Only behind the router is the way back narrower than the pod knows.
    if case.kind == Client::Outside {
        ensure!(
            watch.pod_saw()?.iter().any(Packet::is_too_big),
            "nobody told the pod that a packet was too big"
        );
    }
    watch.finish(&[protocol::TCP, protocol::UDP])
}
