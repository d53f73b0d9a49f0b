//! The API server's double inside a network namespace, where the lab's agents are.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use std::net::TcpStream;

use proxier_tests::{apiserver::ApiServer, netns::Namespace, skip_unless_root};

#[test]
fn the_double_listens_in_the_namespace_it_was_started_in_also_after_a_pause() {
    skip_unless_root!();
    let namespace = Namespace::create("double-1").unwrap();
    let server = ApiServer::start_in(&namespace, "127.0.0.1:0".parse().unwrap()).unwrap();
    let address = server.address();
    for _ in 0..2 {
        assert!(namespace.enter(|| TcpStream::connect(address)).is_ok());
        server.down().unwrap();
        assert!(namespace.enter(|| TcpStream::connect(address)).is_err());
        server.up().unwrap();
    }
    assert!(TcpStream::connect(address).is_err(), "it is not here");
}

#[test]
fn a_socket_made_in_a_namespace_can_be_handed_over() {
    skip_unless_root!();
    let namespace = Namespace::create("double-2").unwrap();
    let listener = namespace.enter(|| std::net::TcpListener::bind("[::1]:0")).unwrap();
    let server = ApiServer::start_on(listener).unwrap();
    assert!(server.url().starts_with("http://[::1]:"));
    assert!(namespace.enter(|| TcpStream::connect(server.address())).is_ok());
}
