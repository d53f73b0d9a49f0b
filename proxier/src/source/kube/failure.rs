//! What went wrong with the API server, in words that an operator can act on; and what to do about it.

use std::{io, time::Duration};

use hyper_util::client::legacy;
use kube::{core::Status, runtime::watcher};

use crate::source::{
    patience::LONGEST_WAIT,
    words::{causes, chain, quote},
};

/// The [`Failure::kind`] of a resourceVersion that is too old.
const GONE: &str = "gone";

/// A request or a watch that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// What it is, in a word, for metrics.
    pub(super) kind: &'static str,
    /// The reason and the next step; continues a sentence that began with the server's name.
    pub(super) reason: String,
    /// Whether what is known is of no use for going on: everything must be listed again.
    pub(super) start_over: bool,
    /// How long the server asks to be left alone.
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    /// Whether this is in the nature of things: the server is well, and has forgotten what was long ago.
    pub(super) fn is_gone(&self) -> bool {
        self.kind == GONE
    }

    /// Of a watch of `resource` (its plural).
    pub(super) fn of(error: &watcher::Error, resource: &str) -> Self {
        use watcher::Error;
        match error {
            // Already listing.
            Error::InitialListFailed(error) => Self { start_over: false, ..client(error, resource) },
            Error::WatchStartFailed(error) | Error::WatchFailed(error) => client(error, resource),
            Error::WatchError(answer) => status(answer, resource),
            Error::NoResourceVersion => nonsense("an object or a list without resourceVersion"),
        }
    }
}

fn client(error: &kube::Error, resource: &str) -> Failure {
    match error {
        kube::Error::Api(answer) => status(answer, resource),
        // The event that could not be read is lost; going on would be going on without it.
        kube::Error::SerdeError(error) => nonsense(&error.to_string()),
        kube::Error::FromUtf8(error) => nonsense(&error.to_string()),
        kube::Error::Auth(error) => Failure {
            kind: "credentials",
            reason: format!(
                "cannot be asked: {}; check the user in the kubeconfig, or the ServiceAccount's token",
                chain(error)
            ),
            start_over: false,
            retry_after: None,
        },
        error => connection(error),
    }
}

/// A server that cannot be reached, or no longer. The outer errors only say that something failed, the innermost says what.
fn connection(error: &kube::Error) -> Failure {
    let cause = causes(error).last().map(ToString::to_string).unwrap_or_default();
    let is_any = |kinds: &[io::ErrorKind]| {
        causes(error)
            .filter_map(|error| error.downcast_ref::<io::Error>())
            .any(|error| kinds.contains(&error.kind()))
    };
    let connecting = causes(error)
        .filter_map(|error| error.downcast_ref::<legacy::Error>())
        .any(legacy::Error::is_connect);
    let failure = |kind, reason, start_over| Failure { kind, reason, start_over, retry_after: None };

    if connecting {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, InvalidData,
            NetworkUnreachable, TimedOut, UnexpectedEof,
        };
        let (cause, next_step) = if is_any(&[ConnectionRefused]) {
            (cause, "nothing listens there: check the address, and that the API server runs")
        } else if is_any(&[TimedOut]) {
            ("it does not answer".to_owned(), "check the address, and the routes and firewalls on the way")
        } else if is_any(&[HostUnreachable, NetworkUnreachable]) {
            (cause, "check the address, and the routes and firewalls on the way")
        } else if is_any(&[ConnectionReset, ConnectionAborted, BrokenPipe]) {
            (cause, "check that the API server runs, and what load balancers and proxies are on the way")
        } else if is_any(&[InvalidData, UnexpectedEof]) {
            (
                cause,
                "it cannot be trusted: check the certificate authority, and that the address is that of an API server with TLS",
            )
        } else {
            (cause, "check the address, and that this node's resolver knows the name")
        };
        return failure("connection", format!("cannot be reached: {cause}; {next_step}"), false);
    }
    // A server that says nothing, not even bookmarks, may have been put back to an earlier state: it waits for the
    // resourceVersion that we have seen, and what happens until then would never be told.
    if is_any(&[io::ErrorKind::TimedOut]) {
        let reason = "says nothing any more: everything is listed again; check that it runs, and whether something on the \
                      way forgets connections";
        return failure("silence", reason.to_owned(), true);
    }
    let reason =
        format!("has broken off: {cause}; asked again; check that it runs, and what proxies are on the way");
    failure("connection", reason, false)
}

fn nonsense(what: &str) -> Failure {
    Failure {
        kind: "nonsense",
        reason: format!(
            "answers what cannot be understood ({}): everything is listed again; check that the address is an API \
             server's, and what proxies are on the way",
            quote(what)
        ),
        start_over: true,
        retry_after: None,
    }
}

/// The API server's own words, and what follows from them.
fn status(status: &Status, resource: &str) -> Failure {
    let Status { code, message, reason, .. } = status;
    // Whatever is JSON and no event is read as a status of which nothing is known; it may have been an event.
    if *code == 0 {
        return nonsense("JSON of another shape");
    }
    let next_step = match code {
        400 => "check that the address is an API server's, with https or http as it speaks it".to_owned(),
        401 => {
            "check the token: the ServiceAccount's may have been deleted, the kubeconfig's may have expired"
                .to_owned()
        }
        403 => format!(
            "give this ServiceAccount (or user) a ClusterRole with list and watch of {resource}: deploy/ has one"
        ),
        404 => {
            format!(
                "this server has no {resource}: check the address; the API server must be of Kubernetes 1.33 or newer"
            )
        }
        410 => "everything is listed again".to_owned(),
        429 => "the server is busy: asked again later".to_owned(),
        _ => "asked again".to_owned(),
    };
    let details = status.details.as_ref();
    let retry_after = details.map(|details| details.retry_after_seconds).filter(|seconds| *seconds > 0);
    // After a restore from a backup, the server's history is shorter than ours.
    let from_the_future = details
        .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "ResourceVersionTooLarge"))
        || message.contains("Too large resource version");
    let words = if message.is_empty() { reason } else { message };
    Failure {
        kind: match code {
            401 => "unauthorized",
            403 => "forbidden",
            404 => "not-found",
            410 => GONE,
            429 => "too-many-requests",
            500.. => "server-error",
            _ => "refused",
        },
        reason: format!("refuses with {code}: {}; {next_step}", quote(words)),
        start_over: *code == 410 || from_the_future,
        retry_after: retry_after.map(|seconds| Duration::from_secs(u64::from(seconds)).min(LONGEST_WAIT)),
    }
}

/// What a request failed with, for a line of the log: the server's words, or why there are none.
pub(crate) fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => quote(&status.message),
        error => quote(&causes(error).last().map(ToString::to_string).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use k8s_openapi::api::core::v1::Service;
    use kube::{Api, Client, Config, api::ListParams};
    use serde_json::json;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::source::words::MAX_WORDS;

    fn of_status(status: serde_json::Value) -> Failure {
        let status: Status = serde_json::from_value(status).unwrap();
        Failure::of(&watcher::Error::WatchError(Box::new(status)), "services")
    }

    fn refusal(code: u16, message: &str) -> Failure {
        of_status(json!({"status": "Failure", "code": code, "message": message, "reason": "Whatever"}))
    }

    #[test]
    fn a_refusal_says_what_to_do_about_it() {
        for (code, kind, next_step) in [
            (400, "refused", "https or http"),
            (401, "unauthorized", "check the token"),
            (403, "forbidden", "list and watch of services"),
            (404, "not-found", "this server has no services"),
            (410, "gone", "listed again"),
            (429, "too-many-requests", "busy"),
            (500, "server-error", "asked again"),
            (504, "server-error", "asked again"),
        ] {
            let failure = refusal(code, "in its own words.");
            assert_eq!(failure.kind, kind);
            let begin = format!("refuses with {code}: in its own words; ");
            assert!(failure.reason.starts_with(&begin), "{}", failure.reason);
            assert!(failure.reason.contains(next_step), "{}", failure.reason);
            assert_eq!(failure.start_over, code == 410, "{code}");
        }
    }

    #[test]
    fn a_refusal_without_words_gives_its_reason() {
        let failure = of_status(json!({"status": "Failure", "code": 409, "reason": "Conflict"}));
        assert_eq!(failure.reason, "refuses with 409: Conflict; asked again");
    }

    #[test]
    fn a_status_that_says_nothing_was_meant_as_something_else() {
        let failure = of_status(json!({}));
        assert_eq!((failure.kind, failure.start_over), ("nonsense", true));
    }

    #[test]
    fn a_history_that_ends_before_ours_is_a_reason_to_start_over() {
        let by_cause = json!({
            "code": 504, "message": "Timeout", "details": {"causes": [{"reason": "ResourceVersionTooLarge"}]},
        });
        assert!(of_status(by_cause).start_over);
        assert!(refusal(504, "Timeout: Too large resource version: 9, current: 7").start_over);
        assert!(!refusal(504, "Timeout").start_over);
    }

    #[test]
    fn a_page_or_a_long_answer_does_not_fill_the_log() {
        let page = format!("\n<!DOCTYPE html>\n<html>{}</html>", "x".repeat(1 << 20));
        assert_eq!(refusal(502, &page).reason, "refuses with 502: a web page; asked again");
        let long = refusal(500, &"b\u{1b}\u{e4}\r\n ".repeat(1 << 18)).reason;
        assert!(long.chars().count() < MAX_WORDS + 50, "{long}");
        assert!(long.ends_with("...; asked again"), "{long}");
        assert!(!long.contains(char::is_control), "{long:?}");
    }

    #[test]
    fn a_server_that_asks_for_a_pause_gets_it_within_reason() {
        let wait = |seconds: u32| {
            of_status(json!({"code": 429, "message": "busy", "details": {"retryAfterSeconds": seconds}}))
                .retry_after
        };
        assert_eq!(wait(0), None);
        assert_eq!(wait(7), Some(Duration::from_secs(7)));
        assert_eq!(wait(u32::MAX), Some(LONGEST_WAIT));
        assert_eq!(refusal(429, "busy").retry_after, None);
    }

    /// What a list at `url` fails with, if the connection is given up after a silence of `silence`.
    async fn failure_at(url: &str, silence: Duration) -> Failure {
        let mut config = Config::new(url.parse().unwrap());
        config.default_retry = false;
        config.read_timeout = Some(silence);
        config.connect_timeout = Some(silence);
        let services: Api<Service> = Api::all(Client::try_from(config).unwrap());
        let error = services.list(&ListParams::default()).await.unwrap_err();
        Failure::of(&watcher::Error::WatchStartFailed(error), "services")
    }

    /// Reads what a client sends first and answers with `answer`; then keeps or closes the connection.
    async fn server(answer: &'static [u8], keep: bool) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            assert_ne!(connection.read(&mut [0; 4096]).await.unwrap(), 0);
            connection.write_all(answer).await.unwrap();
            if keep {
                std::future::pending::<()>().await;
            }
        });
        port
    }

    const LONG: Duration = Duration::from_secs(30);
    const SHORT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn where_nothing_listens_is_said_without_repetitions() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let failure = failure_at(&format!("http://127.0.0.1:{port}"), LONG).await;
        assert_eq!(
            failure.reason,
            "cannot be reached: Connection refused (os error 111); nothing listens there: check the address, and that the \
             API server runs"
        );
        assert!(!failure.start_over);
    }

    #[tokio::test]
    async fn a_name_that_nobody_knows_is_a_matter_of_the_resolver() {
        // A label of a name has 63 characters at most, so no name server needs to be asked.
        let failure = failure_at(&format!("http://{}", "a".repeat(64)), LONG).await;
        assert!(failure.reason.starts_with("cannot be reached: failed to lookup address"), "{failure:?}");
        assert!(failure.reason.contains("resolver"), "{failure:?}");
    }

    #[tokio::test]
    async fn a_server_that_is_none_of_ours_is_a_matter_of_trust() {
        for (answer, keep) in [(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], true), (b"", false)] {
            let port = server(answer, keep).await;
            let failure = failure_at(&format!("https://127.0.0.1:{port}"), LONG).await;
            assert!(failure.reason.contains("check the certificate authority"), "{failure:?}");
            assert_eq!((failure.kind, failure.start_over), ("connection", false));
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_closed_is_no_reason_to_list_everything_again() {
        let port = server(b"", false).await;
        let failure = failure_at(&format!("http://127.0.0.1:{port}"), LONG).await;
        assert!(failure.reason.starts_with("has broken off: "), "{failure:?}");
        assert_eq!((failure.kind, failure.start_over), ("connection", false));
    }

    #[tokio::test]
    async fn silence_is_a_reason_to_list_everything_again() {
        for answer in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{"] {
            let port = server(answer, true).await;
            let failure = failure_at(&format!("http://127.0.0.1:{port}"), SHORT).await;
            assert!(failure.reason.starts_with("says nothing any more"), "{failure:?}");
            assert_eq!((failure.kind, failure.start_over), ("silence", true));
        }
    }

    /// A thousand nodes behind a network that is cut need not list everything for it.
    #[tokio::test]
    async fn a_connection_that_cannot_be_made_in_time_is_no_silence() {
        // It listens, and never takes part in a handshake.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let failure = failure_at(&format!("https://127.0.0.1:{port}"), SHORT).await;
        assert!(failure.reason.starts_with("cannot be reached: it does not answer"), "{failure:?}");
        assert_eq!((failure.kind, failure.start_over), ("connection", false));
    }
}
