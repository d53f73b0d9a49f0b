//! Sequenced datagrams through an external address while something happens: which of them were lost.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::sys::socket::{SetSockOpt as _, sockopt};

use crate::scenario::Scenario;

/// Room for ten seconds of datagrams.
const RECEIVE_BUFFER: usize = 16 << 20;

/// Sends numbered datagrams to `external` while `work` goes on, and returns how many were sent and which of them
/// were never answered.
///
/// # Panics
///
/// When `work` does, or nothing can be sent.
pub fn lost_during(
    scenario: &mut Scenario,
    external: IpAddr,
    work: impl FnOnce(&mut Scenario),
) -> (u32, BTreeSet<u32>) {
    let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
    let socket = scenario.lab.client.udp(from).expect("the client can open a socket");
    // What comes while others have this machine's CPUs must wait here: lost here, it would look as if lost on the way.
    sockopt::RcvBufForce.set(&socket, &RECEIVE_BUFFER).expect("root may have a large buffer");
    socket.connect(SocketAddr::new(external, 5060)).expect("the client has a route");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0_u32;
            while !stop.load(Ordering::Relaxed) {
                socket.send(&sent.to_be_bytes()).expect("the client can send");
                sent += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        let receiver = scope.spawn(|| received(&socket, &stop));
        // Also when the work fails: the threads would wait for ever.
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(scenario)));
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().expect("the sender goes on");
        let received = receiver.join().expect("the receiver goes on");
        if let Err(panic) = worked {
            std::panic::resume_unwind(panic);
        }
        (sent, (0..sent).filter(|number| !received.contains(number)).collect())
    })
}

fn received(socket: &UdpSocket, stop: &AtomicBool) -> BTreeSet<u32> {
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("no zero timeout");
    let mut numbers = BTreeSet::new();
    let mut buffer = [0; 2048];
    loop {
        match socket.recv(&mut buffer) {
            Ok(size) => {
                numbers.extend(buffer[..size].last_chunk().map(|number| u32::from_be_bytes(*number)));
            }
            // What has not come half a second after the last was sent will not come.
            Err(_) if stop.load(Ordering::Relaxed) => return numbers,
            Err(_) => {}
        }
    }
}
