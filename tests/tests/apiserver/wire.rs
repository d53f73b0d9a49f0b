//! A client that hides nothing of what is on the wire: how a body is framed, where it breaks off, and when.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use proxier_tests::apiserver::ApiServer;
use serde_json::Value;

/// Longer than anything takes that comes at all, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All of `content-length`, or the last chunk.
    Whole,
    /// The connection ended before.
    Broken,
    /// Nothing comes any more, and the connection is there.
    Silent,
}

#[derive(Clone, Copy, Debug)]
enum Framing {
    Length(usize),
    Chunked,
}

/// An answer whose head was read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) headers: BTreeMap<String, String>,
    framing: Framing,
    reader: BufReader<TcpStream>,
    pending: Vec<u8>,
}

/// A request's parts beside its path.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) token: Option<&'a str>,
    pub(crate) content_type: &'a str,
    pub(crate) body: &'a str,
}

/// Gets with the right token.
pub(crate) fn get(server: &ApiServer, path: &str) -> Answer {
    try_get(server, path, PATIENCE).unwrap_or_else(|end| panic!("{path}: {end:?} instead of an answer"))
}

/// Gets with the right token; how it ended when there was no answer within `patience`.
pub(crate) fn try_get(server: &ApiServer, path: &str, patience: Duration) -> Result<Answer, End> {
    let token = server.token();
    send(server, path, &Request { method: "GET", token: Some(&token), content_type: "", body: "" }, patience)
}

pub(crate) fn send(
    server: &ApiServer,
    path: &str,
    request: &Request<'_>,
    patience: Duration,
) -> Result<Answer, End> {
    let mut stream = TcpStream::connect(server.address()).map_err(|_| End::Broken)?;
    stream.set_read_timeout(Some(patience)).unwrap();
    let Request { method, token, content_type, body } = request;
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: double\r\n{token}content-type: {content_type}\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(0) => return Err(End::Broken),
            Ok(_) if line == "\r\n" => break,
            Ok(_) => lines.push(line.trim_end().to_owned()),
            Err(error) => return Err(end_of(&error)),
        }
    }
    let code = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<String, String> = lines[1..]
        .iter()
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let framing = headers
        .get("content-length")
        .map_or(Framing::Chunked, |length| Framing::Length(length.parse().unwrap()));
    Ok(Answer { code, headers, framing, reader, pending: Vec::new() })
}

fn end_of(error: &std::io::Error) -> End {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => End::Silent,
        _ => End::Broken,
    }
}

impl Answer {
    pub(crate) fn content_type(&self) -> &str {
        &self.headers["content-type"]
    }

    /// From now on a wait for bytes ends after so long.
    pub(crate) fn be_patient_for(&self, patience: Duration) {
        self.reader.get_ref().set_read_timeout(Some(patience)).unwrap();
    }

    /// The rest of the body, and how it ended.
    pub(crate) fn rest(mut self) -> (Vec<u8>, End) {
        let end = loop {
            if let Err(end) = self.more() {
                break end;
            }
        };
        (self.pending, end)
    }

    /// A whole body of JSON.
    pub(crate) fn json(self) -> Value {
        let (body, end) = self.rest();
        assert_eq!(end, End::Whole, "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }

    /// The next line of the body; what was left, and how it ended, where there is none.
    pub(crate) fn line(&mut self) -> Result<String, (String, End)> {
        loop {
            if let Some(length) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=length).collect();
                return Ok(String::from_utf8(line).unwrap());
            }
            if let Err(end) = self.more() {
                return Err((String::from_utf8_lossy(&self.pending).into_owned(), end));
            }
        }
    }

    /// The next event of a watch.
    pub(crate) fn event(&mut self) -> Value {
        let line = self.line().unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// The next event that is no bookmark: its type, the object's name and its resourceVersion.
    pub(crate) fn change(&mut self) -> (String, String, u64) {
        let event = self.event();
        let metadata = &event["object"]["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (
            text(&event["type"]),
            text(&metadata["name"]),
            text(&metadata["resourceVersion"]).parse().unwrap_or_default(),
        )
    }

    /// The events until the end, and what it was.
    pub(crate) fn events(mut self) -> (Vec<Value>, End) {
        let mut events = Vec::new();
        loop {
            match self.line() {
                Ok(line) => events.push(serde_json::from_str(&line).unwrap()),
                Err((left, end)) => {
                    assert_eq!(left, "");
                    return (events, end);
                }
            }
        }
    }

    fn more(&mut self) -> Result<(), End> {
        match self.framing {
            Framing::Length(0) => Err(End::Whole),
            Framing::Length(left) => {
                let bytes = self.reader.fill_buf().map_err(|error| end_of(&error))?;
                let length = bytes.len().min(left);
                if length == 0 {
                    return Err(End::Broken);
                }
                self.pending.extend_from_slice(&bytes[..length]);
                self.reader.consume(length);
                self.framing = Framing::Length(left - length);
                Ok(())
            }
            Framing::Chunked => {
                let mut size = String::new();
                let read = self.reader.read_line(&mut size).map_err(|error| end_of(&error))?;
                if read == 0 {
                    return Err(End::Broken);
                }
                let size = usize::from_str_radix(size.trim_end(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                self.reader.read_exact(&mut chunk).map_err(|error| end_of(&error))?;
                chunk.truncate(size);
                self.pending.extend_from_slice(&chunk);
                if size == 0 { Err(End::Whole) } else { Ok(()) }
            }
        }
    }
}

/// Waits until `done`.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
