//! Connections that carry a byte each way and are gone again: what a table of connections is built for, or is worn out by.
//!
//! Clients close with a reset, as a load generator has to: with TIME_WAIT, a minute of this would need more ports than there
//! are. Every connection is from a port that none has had for as long as possible, so that each is a new one to connection
//! tracking, as those of users are.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{CONNECTIONS_PORT, Ends, pin};

/// How many clients there are, each with an address of its own, and as many servers: no side waits for the other while there
/// is something to do.
pub const CLIENTS: u8 = 4;
const THREADS: usize = CLIENTS as usize;
/// The first port that clients use, and how many: above those that a lab's client listens on itself.
const PORTS: (u16, u32) = (10_000, 55_000);
/// A connection that takes as long was lost, not slow.
const PATIENCE: Duration = Duration::from_secs(5);
/// Not counted.
const WARM_UP: Duration = Duration::from_millis(50);

/// Which ports the clients had last. As long as it is kept, none has another connection from the same port before it has
/// been through all of them.
#[derive(Debug, Default)]
pub struct Cursors([AtomicU32; THREADS]);

/// Makes connections for as long as `burst`; how many a second.
///
/// # Errors
///
/// One fails: a proxy that refuses some may be fast.
pub fn run(ends: &Ends<'_>, cursors: &Cursors, burst: Duration) -> anyhow::Result<f64> {
    let listener = ends.pod.enter(|| -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, CONNECTIONS_PORT)).into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    })?;
    let counting = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    let (counted, taken): (Vec<anyhow::Result<u64>>, Duration) = thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| serve(&listener, ends.cpus.pod));
        }
        let clients: Vec<_> = (0..THREADS)
            .map(|number| {
                let (counting, stop, cursor) = (&counting, &stop, &cursors.0[number]);
                let from = ends.clients[number];
                // A socket belongs to the namespace of the thread that makes it.
                scope.spawn(move || ends.client.enter(|| ask(ends, from, cursor, counting, stop)))
            })
            .collect();
        thread::sleep(WARM_UP);
        counting.store(true, Ordering::Relaxed);
        let start = Instant::now();
        thread::sleep(burst);
        counting.store(false, Ordering::Relaxed);
        let taken = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        let counted = clients
            .into_iter()
            .map(|client| client.join().unwrap_or_else(|_| Err(anyhow!("a client panicked"))))
            .collect();
        // Ends every `accept`.
        let _ = SockRef::from(&listener).shutdown(Shutdown::Both);
        (counted, taken)
    });
    let counted = counted.into_iter().sum::<anyhow::Result<u64>>()?;
    ensure!(counted > 0, "no connection to {} was made", ends.target);
    Ok(counted as f64 / taken.as_secs_f64())
}

fn next_port(cursor: &AtomicU32) -> u16 {
    let (first, count) = PORTS;
    let number = cursor.fetch_add(1, Ordering::Relaxed) % count;
    first + u16::try_from(number).unwrap_or_default()
}

/// One client: connection after connection until `stop`; how many while `counting`.
fn ask(
    ends: &Ends<'_>,
    from: Ipv4Addr,
    cursor: &AtomicU32,
    counting: &AtomicBool,
    stop: &AtomicBool,
) -> anyhow::Result<u64> {
    pin(ends.cpus.client)?;
    let target = SocketAddr::from((ends.target, CONNECTIONS_PORT));
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let from = SocketAddr::from((from, next_port(cursor)));
        exchange(from, target).with_context(|| format!("a connection from {from} to {target}"))?;
        count += u64::from(counting.load(Ordering::Relaxed));
    }
    Ok(count)
}

/// A connection from beginning to end.
fn exchange(from: SocketAddr, to: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    // The port may be one that an earlier round had.
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    // A connection attempt waits for as long as sending may.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.connect(&to.into())?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}

/// Answers one connection after the other, until the listener is shut down.
fn serve(listener: &TcpListener, cpu: usize) {
    // Elsewhere it serves as well; the client's own call would have failed first.
    let _ = pin(cpu);
    // Kept for as long as the next one takes: by then the client has closed it, and there is nothing to say farewell to.
    let mut previous = None;
    while let Ok((mut stream, _)) = listener.accept() {
        // What goes wrong here the client reports.
        let _ = stream.set_read_timeout(Some(PATIENCE));
        if stream.read_exact(&mut [0]).and_then(|()| stream.write_all(b"!")).is_ok() {
            previous.replace(stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::responder::Ports;

    #[test]
    fn no_port_comes_again_before_all_others() {
        let cursor = AtomicU32::new(0);
        let mut seen: Vec<u16> = (0..PORTS.1).map(|_| next_port(&cursor)).collect();
        let again = next_port(&cursor);
        assert_eq!(again, seen[0]);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 55_000);
        let taken = Ports::default().tcp;
        assert!(
            taken.iter().all(|port| seen.binary_search(port).is_err()),
            "a lab's client listens on {taken:?}"
        );
    }
}
