//! Small datagrams, as many as one thread can send, counted by the program that receives them.
//!
//! Not by iperf3: it makes a system call for every datagram at either end and stamps each of them, which costs more than the
//! way to the pod does.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsRawFd as _, RawFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::{DATAGRAMS_PORT, Ends, pin};

/// What makes a frame of 64 bytes with Ethernet's, IP's and UDP's headers and the checksum of the frame, which veths do without.
const PAYLOAD: usize = 64 - 14 - 20 - 8 - 4;
/// How many datagrams go by one system call.
const BATCH: u32 = 64;
/// The receiver looks after as long, as a network card that moderates its interrupts: one that slept in `recvmmsg` would have
/// to be woken up by the sender, which costs it more than the way to the pod, now and then.
const LOOKS_EVERY: Duration = Duration::from_micros(200);
/// Of 768 bytes a datagram this is room for ten times what comes between two looks.
const BUFFER: usize = 16 << 20;
/// Not counted: caches and tables fill, neighbours are found.
const WARM_UP: Duration = Duration::from_millis(50);

/// What came of a burst.
#[derive(Clone, Copy, Debug)]
pub struct Datagrams {
    /// Received a second.
    pub per_second: f64,
    /// How many percent of those sent were not received.
    pub lost_percent: f64,
}

/// Sends for as long as `burst`.
///
/// # Errors
///
/// Nothing arrives, or a socket does not work.
pub fn run(ends: &Ends<'_>, burst: Duration) -> anyhow::Result<Datagrams> {
    let receiver = ends.pod.enter(|| UdpSocket::bind(("0.0.0.0", DATAGRAMS_PORT))).context("receiver")?;
    receiver.set_nonblocking(true)?;
    setsockopt(&receiver, RcvBufForce, &BUFFER).context("the receiver's buffer")?;
    let sender = ends.client.enter(|| {
        let sender = UdpSocket::bind((ends.clients[0], 0))?;
        sender.connect((ends.target, DATAGRAMS_PORT))?;
        io::Result::Ok(sender)
    })?;
    let stop_sending = AtomicBool::new(false);
    let stop_receiving = AtomicBool::new(false);
    let received = AtomicU64::new(0);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            pin(ends.cpus.pod)?;
            let mut batch = Batch::new();
            loop {
                // Asked first, so that whatever came before the end is counted.
                let last = stop_receiving.load(Ordering::Relaxed);
                while let Some(count) = batch.receive(receiver.as_raw_fd())? {
                    received.fetch_add(count, Ordering::Relaxed);
                }
                if last {
                    return anyhow::Ok(());
                }
                thread::sleep(LOOKS_EVERY);
            }
        });
        let sending = scope.spawn(|| {
            pin(ends.cpus.client)?;
            let mut batch = Batch::new();
            let mut sent = 0;
            while !stop_sending.load(Ordering::Relaxed) {
                sent += batch.send(sender.as_raw_fd())?;
            }
            anyhow::Ok(sent)
        });
        thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
        thread::sleep(burst);
        let (taken, after) = (start.elapsed(), received.load(Ordering::Relaxed));
        stop_sending.store(true, Ordering::Relaxed);
        let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
        thread::sleep(2 * LOOKS_EVERY);
        stop_receiving.store(true, Ordering::Relaxed);
        receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
        let (sent, arrived) = (sent?, received.load(Ordering::Relaxed));
        ensure!(after > before, "of {sent} datagrams to {} none arrived", ends.target);
        Ok(Datagrams {
            per_second: (after - before) as f64 / taken.as_secs_f64(),
            lost_percent: 100.0 * sent.saturating_sub(arrived) as f64 / sent as f64,
        })
    })
}

/// Room for many datagrams, all in the same place: what is in them does not matter.
struct Batch {
    headers: Vec<libc::mmsghdr>,
    // What the headers point to.
    _vector: Box<libc::iovec>,
    _bytes: Box<[u8; PAYLOAD]>,
}

impl Batch {
    fn new() -> Self {
        let mut bytes = Box::new([0; PAYLOAD]);
        let mut vector = Box::new(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: PAYLOAD });
        // SAFETY: a header is numbers and pointers, for which zero means none.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_iov = &raw mut *vector;
        header.msg_hdr.msg_iovlen = 1;
        Self { headers: vec![header; BATCH as usize], _vector: vector, _bytes: bytes }
    }

    /// Sends as many as there is room for; how many.
    fn send(&mut self, socket: RawFd) -> anyhow::Result<u64> {
        // SAFETY: the headers, as many as said, point to a vector and to bytes that this value owns.
        let sent = unsafe { libc::sendmmsg(socket, self.headers.as_mut_ptr(), BATCH, 0) };
        u64::try_from(sent).map_err(|_| io::Error::last_os_error()).context("sendmmsg")
    }

    /// Receives what is there; none if nothing is.
    fn receive(&mut self, socket: RawFd) -> anyhow::Result<Option<u64>> {
        // SAFETY: as in `send`; that all datagrams are written to the same bytes does no harm, as nobody reads them.
        let received =
            unsafe { libc::recvmmsg(socket, self.headers.as_mut_ptr(), BATCH, 0, std::ptr::null_mut()) };
        match (u64::try_from(received), io::Error::last_os_error()) {
            (Ok(count), _) => Ok(Some(count)),
            (Err(_), error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            (Err(_), error) => Err(error).context("recvmmsg"),
        }
    }
}
