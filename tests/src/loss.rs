//! Sequenced datagrams through an external address while something happens: which of them were lost.

use std::{
    array,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::sys::socket::{SetSockOpt as _, sockopt};

use crate::{netns::Namespace, scenario::Scenario};

/// Room for ten seconds of datagrams.
const RECEIVE_BUFFER: usize = 16 << 20;

/// What has not come so long after the last was sent will not come.
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// In place of the number of datagrams that were sent, while they are.
const GOES_ON: u32 = u32::MAX;

/// How many datagrams were sent, and which of them were never answered.
pub type Loss = (u32, BTreeSet<u32>);

/// Sends numbered datagrams to `external` while `work` goes on.
///
/// # Panics
///
/// When `work` does, nothing can be sent, or datagrams were lost in the sockets of client or pods, of which nothing can be said.
pub fn lost_during(scenario: &mut Scenario, external: IpAddr, work: impl FnOnce(&mut Scenario)) -> Loss {
    let [loss] = lost_of_each_during(scenario, [external], work);
    loss
}

/// As [`lost_during`], to all `externals` at the same time.
///
/// # Panics
///
/// As [`lost_during`].
pub fn lost_of_each_during<const N: usize>(
    scenario: &mut Scenario,
    externals: [IpAddr; N],
    work: impl FnOnce(&mut Scenario),
) -> [Loss; N] {
    let sockets = externals.map(|external| connected(scenario, external));
    let stop = AtomicBool::new(false);
    let totals = [const { AtomicU32::new(GOES_ON) }; N];
    let overflows = overflows(scenario);
    let losses = std::thread::scope(|scope| {
        let ends = array::from_fn::<_, N, _>(|index| {
            let (socket, total) = (&sockets[index], &totals[index]);
            let sender = scope.spawn(|| send(socket, &stop));
            (sender, scope.spawn(|| received(socket, total)), total)
        });
        // Also when the work fails: the threads would wait for ever.
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(scenario)));
        stop.store(true, Ordering::Relaxed);
        let losses = ends.map(|(sender, receiver, total)| {
            let sent = sender.join();
            total.store(*sent.as_ref().unwrap_or(&0), Ordering::Relaxed);
            let sent = sent.expect("the sender goes on");
            let received = receiver.join().expect("the receiver goes on");
            (sent, (0..sent).filter(|number| !received.contains(number)).collect())
        });
        if let Err(panic) = worked {
            std::panic::resume_unwind(panic);
        }
        losses
    });
    assert_eq!(
        self::overflows(scenario),
        overflows,
        "sockets of the lab were full: sent, and missing: {losses:?}"
    );
    losses
}

fn connected(scenario: &Scenario, external: IpAddr) -> UdpSocket {
    let from = SocketAddr::new(scenario.lab.client.address(external), 42000);
    let socket = scenario.lab.client.udp(from).expect("the client can open a socket");
    // What comes while others have this machine's CPUs must wait here: lost here, it would look as if lost on the way.
    sockopt::RcvBufForce.set(&socket, &RECEIVE_BUFFER).expect("root may have a large buffer");
    socket.connect(SocketAddr::new(external, 5060)).expect("the client has a route");
    socket
}

fn send(socket: &UdpSocket, stop: &AtomicBool) -> u32 {
    let mut sent = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        socket.send(&sent.to_be_bytes()).expect("the client can send");
        sent += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    sent
}

/// How many datagrams the sockets of client and pods had no room for.
fn overflows(scenario: &Scenario) -> u64 {
    let pods = scenario.lab.pods.iter().map(|pod| &pod.host.namespace);
    pods.chain([&scenario.lab.client.namespace]).map(overflows_in).sum()
}

fn overflows_in(namespace: &Namespace) -> u64 {
    // Not /proc/net, which is that of the process's first thread.
    let read =
        |file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("/proc is mounted");
    let (v4, v6) = namespace.enter(|| (read("snmp"), read("snmp6")));
    let mut v4 = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (v4.next().expect("Linux counts UDP"), v4.next().expect("behind the names"));
    let v4 = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "RcvbufErrors");
    let v6 = v6.lines().filter_map(|line| line.split_once(' ')).find(|(name, _)| *name == "Udp6RcvbufErrors");
    [v4, v6]
        .into_iter()
        .map(|counter| counter.expect("Linux counts it").1.trim().parse::<u64>().expect("a number"))
        .sum()
}

/// The numbers of the answers that come, until there are as many as `total` says or no more are to be expected.
fn received(socket: &UdpSocket, total: &AtomicU32) -> BTreeSet<u32> {
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("no zero timeout");
    let mut numbers = BTreeSet::new();
    let mut buffer = [0; 2048];
    let mut quiet_since = None;
    loop {
        if let Ok(size) = socket.recv(&mut buffer) {
            numbers.extend(buffer[..size].last_chunk().map(|number| u32::from_be_bytes(*number)));
            quiet_since = None;
        }
        let total = total.load(Ordering::Relaxed);
        if total == GOES_ON {
            continue;
        }
        let quiet_since: &mut Instant = quiet_since.get_or_insert_with(Instant::now);
        if numbers.len() as u64 == u64::from(total) || quiet_since.elapsed() > LAST_ANSWER_WITHIN {
            return numbers;
        }
    }
}
