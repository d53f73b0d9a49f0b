//! One byte to the pod and back, over one connection.
//!
//! Not by sockperf: a second of it takes three, of which it evaluates half a one, and there are many arms. As with its
//! `--nonblocked`, both ends ask for the next byte over and over: an end that sleeps has to be woken up, which in a virtual
//! machine takes longer than the whole way, and far from equally long.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};

use super::{Ends, ROUND_TRIPS_PORT, pin};
use crate::bench::statistics::percentile;

/// Not counted.
const WARM_UP: Duration = Duration::from_millis(50);
/// How long a byte may stay away.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of a burst, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrips {
    /// Half are not above.
    pub p50: f64,
    /// 99 of 100 are not above.
    pub p99: f64,
}

/// Asks for as long as `burst`.
///
/// # Errors
///
/// No connection, or no answer.
pub fn run(ends: &Ends<'_>, burst: Duration) -> anyhow::Result<RoundTrips> {
    let listener = ends.pod.enter(|| TcpListener::bind(("0.0.0.0", ROUND_TRIPS_PORT))).context("server")?;
    // With one CPU for both ends, one has to make room for the other.
    let shared = ends.cpus.client == ends.cpus.pod;
    // Before the server waits for it: without a client nothing would end its waiting.
    let target = (ends.target, ROUND_TRIPS_PORT).into();
    let client = ends.client.enter(|| TcpStream::connect_timeout(&target, PATIENCE)).context("connecting")?;
    let mut taken = thread::scope(|scope| {
        let server = scope.spawn(|| -> anyhow::Result<()> {
            pin(ends.cpus.pod)?;
            let (mut stream, _) = listener.accept()?;
            prepare(&stream)?;
            while next(&mut stream, shared)? {
                stream.write_all(b"!")?;
            }
            Ok(())
        });
        let client = scope.spawn(move || ask(client, ends.cpus.client, shared, burst));
        let taken = client.join().map_err(|_| anyhow!("the client panicked"))?.context("client")?;
        server.join().map_err(|_| anyhow!("the server panicked"))?.context("server")?;
        anyhow::Ok(taken)
    })?;
    taken.sort_unstable();
    let microseconds = |percent| {
        let nanoseconds = percentile(&taken, percent).context("not a single round trip")?;
        anyhow::Ok(f64::from(nanoseconds) / 1000.0)
    };
    Ok(RoundTrips { p50: microseconds(50)?, p99: microseconds(99)? })
}

/// How many nanoseconds each round trip took. Closes the connection, which ends the server.
fn ask(mut stream: TcpStream, cpu: usize, shared: bool, burst: Duration) -> anyhow::Result<Vec<u32>> {
    pin(cpu)?;
    prepare(&stream)?;
    let mut taken = Vec::with_capacity(1 << 20);
    let start = Instant::now();
    while start.elapsed() < WARM_UP + burst {
        let since = Instant::now();
        stream.write_all(b"?")?;
        anyhow::ensure!(next(&mut stream, shared)?, "the server closed the connection");
        if start.elapsed() > WARM_UP {
            taken.push(u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
    }
    Ok(taken)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)
}

/// Waits for the next byte; none comes after the end.
fn next(stream: &mut TcpStream, shared: bool) -> io::Result<bool> {
    // Looking at the clock costs as much as asking the socket.
    for attempt in 1_u32.. {
        match stream.read(&mut [0]) {
            Ok(count) => return Ok(count > 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if shared {
            thread::yield_now();
        }
        if attempt == ATTEMPTS {
            break;
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Asking so often takes seconds.
const ATTEMPTS: u32 = 20_000_000;
