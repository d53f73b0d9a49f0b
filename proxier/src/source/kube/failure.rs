//! What went wrong with the API server, in words that an operator can act on; and what to do about it.

use std::time::Duration;

use kube::{core::Status, runtime::watcher};

/// More of an answer than this nobody reads.
const MAX_WORDS: usize = 300;

/// A server that asks to be left alone for longer is asked again all the same.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A request or a watch that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// What it is, in a word, for metrics.
    pub(super) kind: &'static str,
    /// The reason and the next step.
    pub(super) reason: String,
    /// Whether what is known is of no use for going on: everything must be listed again.
    pub(super) start_over: bool,
    /// How long the server asks to be left alone.
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    /// Of a watch of `resource` (its plural).
    pub(super) fn of(error: &watcher::Error, resource: &str) -> Self {
        use watcher::Error;
        match error {
            // Already listing.
            Error::InitialListFailed(error) => Self { start_over: false, ..client(error, resource) },
            Error::WatchStartFailed(error) | Error::WatchFailed(error) => client(error, resource),
            Error::WatchError(answer) => status(answer, resource),
            Error::NoResourceVersion => nonsense(&"an object or a list without resourceVersion"),
        }
    }
}

fn client(error: &kube::Error, resource: &str) -> Failure {
    match error {
        kube::Error::Api(answer) => status(answer, resource),
        // The event that could not be read is lost; going on would be going on without it.
        kube::Error::SerdeError(error) => nonsense(error),
        kube::Error::FromUtf8(error) => nonsense(error),
        kube::Error::Auth(error) => Failure {
            kind: "credentials",
            reason: format!(
                "cannot sign in: {}; check the kubeconfig's user or the ServiceAccount's token",
                chain(error)
            ),
            start_over: false,
            retry_after: None,
        },
        // A server that says nothing, not even bookmarks, may have been put back to an earlier state: it waits for the
        // resourceVersion that we have seen, and what happens until then would never be told.
        error => Failure {
            kind: if is_silence(error) { "silence" } else { "connection" },
            reason: connection(error),
            start_over: is_silence(error),
            retry_after: None,
        },
    }
}

/// Whether a connection was given up because nothing came.
fn is_silence(error: &kube::Error) -> bool {
    let error: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::TimedOut)
}

/// A server that cannot be reached. The outer errors say that there was one, the innermost says which.
fn connection(error: &kube::Error) -> String {
    let text = chain(error);
    let next_step = if text.contains("certificate") {
        "check the cluster's certificate authority and address in the kubeconfig"
    } else {
        "check that the API server runs and that this node reaches it"
    };
    format!("does not answer: {text}; {next_step}")
}

fn nonsense(what: &dyn std::fmt::Display) -> Failure {
    Failure {
        kind: "nonsense",
        reason: format!(
            "answers what cannot be understood ({what}): everything is listed again; check that the address is an API \
             server's, and what proxies are on the way"
        ),
        start_over: true,
        retry_after: None,
    }
}

/// The API server's own words, and what follows from them.
fn status(status: &Status, resource: &str) -> Failure {
    let Status { code, message, reason, .. } = status;
    let next_step = match code {
        401 => {
            "check the token: the ServiceAccount's may have been deleted, the kubeconfig's may have expired"
                .to_owned()
        }
        403 => format!(
            "give this ServiceAccount (or user) a ClusterRole with list and watch of {resource}: deploy/ has one"
        ),
        404 => format!("check the address: this server has no {resource} (Kubernetes 1.33 and later do)"),
        410 => "everything is listed again".to_owned(),
        429 => "the server is busy: asked again later".to_owned(),
        _ => "tried again".to_owned(),
    };
    let details = status.details.as_ref();
    let retry_after = details.map(|details| details.retry_after_seconds).filter(|seconds| *seconds > 0);
    // After a restore from a backup, the server's history is shorter than ours.
    let from_the_future = details
        .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "ResourceVersionTooLarge"))
        || message.contains("Too large resource version");
    let words = if message.is_empty() { reason } else { message };
    // What stands between may answer with a page.
    let words: String = words.trim().chars().take(MAX_WORDS).collect();
    Failure {
        kind: match code {
            401 => "unauthorized",
            403 => "forbidden",
            404 => "not-found",
            410 => "gone",
            429 => "too-many-requests",
            500.. => "server-error",
            _ => "refused",
        },
        reason: format!("refuses with {code}: {}; {next_step}", words.trim_end_matches('.')),
        start_over: *code == 410 || from_the_future,
        retry_after: retry_after.map(|seconds| Duration::from_secs(u64::from(seconds)).min(LONGEST_WAIT)),
    }
}

/// An error and its causes, each once: some of them repeat what is below.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}
