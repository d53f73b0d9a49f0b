//! Probes amid clients that say nothing and come as fast as they can. In a program of its own, one test at a time: what is measured
//! is who has to wait for whom, and not what else the machine does.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::{
    collections::VecDeque,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{Router, routing::get};
use proxier::observe::listen::{Connections, Purpose, Server};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::watch,
    time::{Instant, timeout},
};

/// What a probe asks and hears.
async fn probe(mut stream: TcpStream) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A connection that comes from `source`.
async fn connect(source: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::from(source), 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

/// Asks again and again from 127.0.0.1 while clients that say nothing come from `sources`, one after the other, as fast
/// as they can. Returns the longest wait.
async fn wait_amid_silent_clients(sources: Vec<u8>) -> Duration {
    let purpose = Purpose { subject: "a test".to_owned(), next_step: "run it again".to_owned() };
    let routes = Router::new().route("/", get(|| async { "hello" }));
    let mut server = Server::start("0.0.0.0:0".parse().unwrap(), purpose, routes, Connections::new(64, 4));
    let port = server.bound().await.unwrap().port();
    let bound = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (tell, mut told) = watch::channel(0);
    let silent = tokio::spawn(async move {
        let mut open = VecDeque::new();
        for source in sources.iter().cycle() {
            open.push_back(connect([127, 0, 1, *source], bound).await);
            // Bounded, as the descriptors of a test are; more than there is room for at the server, and in its queue.
            if open.len() > 300 {
                open.pop_front();
            }
            tell.send_modify(|count| *count += 1);
        }
    });
    told.wait_for(|count| *count >= 300).await.unwrap();
    let (mut longest, mut sent_again) = (Duration::ZERO, 0);
    for _ in 0..50 {
        let begin = Instant::now();
        let stream = timeout(Duration::from_secs(10), TcpStream::connect(bound)).await.unwrap().unwrap();
        // In a flood the queue in front of the server may be full for a moment, and TCP tries again after a second: not the server's
        // doing, as long as it is seldom.
        sent_again += usize::from(begin.elapsed() >= Duration::from_secs(1));
        let begin = Instant::now();
        let answer = timeout(Duration::from_secs(10), probe(stream)).await.unwrap();
        assert!(answer.ends_with("hello"), "{answer:?}");
        longest = longest.max(begin.elapsed());
    }
    assert!(sent_again <= 5, "{sent_again} of 50 probes found no place in the queue");
    assert!(!silent.is_finished());
    silent.abort();
    longest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_is_answered_soon_though_clients_that_say_nothing_come_from_one_address_or_from_many() {
    for sources in [vec![2], (1..=200).collect()] {
        let wait = wait_amid_silent_clients(sources).await;
        assert!(wait < Duration::from_secs(1), "{wait:?}");
    }
}
