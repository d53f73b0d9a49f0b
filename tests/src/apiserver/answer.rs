//! Answers as bytes on the wire, including those that go wrong in the middle.

use std::{collections::VecDeque, io, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use futures::stream;

use super::{
    fault::{Kind, Verb},
    resource::Resource,
    status::{Status, USER},
};

/// What is no JSON, whatever reads it.
pub(super) const NOT_JSON: &str = "}{ this is not JSON\n";
/// What is JSON, but neither an object of the API nor an event.
pub(super) const OTHER_SHAPE: &str =
    "{\"kind\":42,\"items\":\"none\",\"type\":[\"ADDED\"],\"object\":null}\n";
const PAGE: &str =
    "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in.</body></html>\n";

/// A part of an answer's body.
#[derive(Debug)]
pub(super) enum Part {
    Bytes(Bytes),
    Pause(Duration),
    /// Nothing any more, and no end.
    Stall,
    /// The connection ends without the body's end.
    Abort,
}

/// Parts in the order of sending.
pub(super) type Parts = VecDeque<Part>;

/// Sends the next of the parts; none when there is no more.
pub(super) async fn next_bytes(parts: &mut Parts) -> Option<io::Result<Bytes>> {
    while let Some(part) = parts.pop_front() {
        match part {
            Part::Bytes(bytes) => return Some(Ok(bytes)),
            Part::Pause(pause) => tokio::time::sleep(pause).await,
            Part::Stall => std::future::pending().await,
            Part::Abort => {
                // hyper writes out what it has only when the body has nothing ready.
                tokio::task::yield_now().await;
                return Some(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }
    None
}

/// `bytes`, a few at a time.
pub(super) fn drip(bytes: &Bytes, piece: usize, pause: Duration) -> impl Iterator<Item = Part> {
    let piece = piece.max(1);
    (0..bytes.len()).step_by(piece).flat_map(move |from| {
        [Part::Bytes(bytes.slice(from..bytes.len().min(from + piece))), Part::Pause(pause)]
    })
}

/// An answer of JSON that is all there.
pub(super) fn json(code: StatusCode, body: String) -> Response {
    let length = body.len();
    answer(code, "application/json", Body::from(body), Some(length))
}

/// An answer of JSON whose length nobody knows.
pub(super) fn json_stream(body: Body) -> Response {
    answer(StatusCode::OK, "application/json", body, None)
}

pub(super) fn status(status: &Status) -> Response {
    let mut response = json(status.code, status.body.to_string());
    if let Some(seconds) = status.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// What Go's HTTP library says to a path that it knows nothing of.
pub(super) fn page_not_found() -> Response {
    text(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n")
}

/// The answer in place of `right`; none if there will be no answer.
pub(super) fn faulty(kind: Kind, target: &Target<'_>, code: StatusCode, right: String) -> Option<Response> {
    let broken = |length: usize, parts: Vec<Part>| {
        let parts = Parts::from(parts);
        let body = Body::from_stream(stream::unfold(parts, async |mut parts| {
            let bytes = next_bytes(&mut parts).await?;
            Some((bytes, parts))
        }));
        answer(code, "application/json", body, Some(length))
    };
    let right = Bytes::from(right);
    Some(match kind {
        Kind::Unauthorized => status(&Status::unauthorized()),
        Kind::Forbidden => {
            status(&Status::forbidden(USER, target.resource, target.verb, target.namespace, target.name))
        }
        Kind::NotFound => page_not_found(),
        Kind::TooManyRequests { retry_after } => {
            let message = "Too many requests, please try again later.\n";
            let mut response = text(StatusCode::TOO_MANY_REQUESTS, "text/plain; charset=utf-8", message);
            response.headers_mut().insert(header::RETRY_AFTER, retry_after.into());
            response
        }
        Kind::InternalError => status(&Status::internal("etcdserver: leader changed")),
        Kind::Unavailable => status(&Status::unavailable()),
        Kind::Gone => status(&match target.verb {
            Verb::Continue => Status::expired_continue(target.again),
            Verb::Watch => Status::too_old(target.wanted, target.revision),
            _ => Status::expired_list(),
        }),
        Kind::Html => text(StatusCode::OK, "text/html; charset=utf-8", PAGE),
        Kind::NotJson => json(StatusCode::OK, NOT_JSON.to_owned()),
        Kind::OtherShape => json(StatusCode::OK, OTHER_SHAPE.to_owned()),
        Kind::Silence => return None,
        Kind::Stall { after } => {
            // All of it would be an answer like any other.
            let sent = right.slice(..after.min(right.len().saturating_sub(1)));
            broken(right.len(), vec![Part::Bytes(sent), Part::Stall])
        }
        Kind::Cut => {
            let half = right.slice(..right.len() / 2);
            broken(half.len(), vec![Part::Bytes(half)])
        }
        Kind::Disconnect => {
            let half = right.slice(..right.len() / 2);
            broken(right.len(), vec![Part::Bytes(half), Part::Abort])
        }
        Kind::Drip { piece, pause } => broken(right.len(), drip(&right, piece, pause).collect()),
        // Of watches, and there in the stream.
        Kind::GoneInStream | Kind::Duplicates | Kind::LostAsOtherShape | Kind::LostAsNotJson => {
            broken(right.len(), vec![Part::Bytes(right)])
        }
    })
}

/// What a faulty answer is about.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) resource: Resource,
    pub(super) verb: Verb,
    pub(super) namespace: Option<&'a str>,
    pub(super) name: &'a str,
    /// The token to go on with after a page token that expired.
    pub(super) again: &'a str,
    /// The resourceVersion that the request is from.
    pub(super) wanted: u64,
    /// The present one.
    pub(super) revision: u64,
}

fn text(code: StatusCode, content_type: &'static str, body: &'static str) -> Response {
    answer(code, content_type, Body::from(body), Some(body.len()))
}

fn answer(code: StatusCode, content_type: &'static str, body: Body, length: Option<usize>) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    response
}
