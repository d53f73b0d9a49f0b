//! One GET over HTTP/1.1, as kubelet, Prometheus or a load balancer would send it, from within a namespace. Not for anything
//! that needs more of HTTP than a status, headers and a body that ends with the connection.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use anyhow::{Context as _, ensure};

use crate::{exchange::PATIENCE, netns::Namespace};

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 200, 503, ...
    pub status: u16,
    /// Status line and headers, as they came.
    pub head: String,
    /// What follows them.
    pub body: String,
}

impl Answer {
    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.filter(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }
}

/// Asks `address` for `path`, from within `namespace`.
///
/// # Errors
///
/// Nobody is there, or it is no HTTP/1.1 with a length.
pub fn get(namespace: &Namespace, address: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    let context = || format!("GET {path} of {address}");
    let mut stream =
        namespace.enter(|| TcpStream::connect_timeout(&address, PATIENCE)).with_context(context)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        .with_context(context)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(context)?;
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("{}: {text:?}", context()))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("{}: {head:?}", context()))?;
    let answer = Answer { status, head: head.to_owned(), body: body.to_owned() };
    // Else the body would have to be put together from pieces.
    let length = answer.header("content-length").and_then(|length| length.parse().ok());
    ensure!(length == Some(answer.body.len()), "{}: it is not whole: {text:?}", context());
    Ok(answer)
}
