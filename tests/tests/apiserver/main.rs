//! The API server's double against recordings of a real server, against a real client, and each of its faults as it
//! is on the wire. It needs no privileges.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

mod client;
mod faults;
mod objects;
mod recordings;
mod semantics;
mod wire;
