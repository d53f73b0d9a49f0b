//! What goes over the connection that one watch has to the API server, seen from below it: kube's watcher tells of errors, but
//! neither that the server answers again, nor of watches that end as soon as they have begun, which it begins anew at once, nor
//! how long a server asks to be left alone where only the header says so, as when it is busy.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, StatusCode, header};
use kube::client::Body;
use tokio::time::{Instant, sleep_until};
use tower::{Layer, Service};

use crate::source::patience::{LONGEST_WAIT, Patience, Timing};

/// Makes the watches that pass keep their distance, and all requests the pause that the server asks for; tells when the server
/// has accepted a watch.
#[derive(Clone, Debug)]
pub(super) struct Link<F> {
    accepted: F,
    timing: Timing,
    pace: Arc<Mutex<Pace>>,
}

impl<F> Link<F> {
    /// Every assignment leaves it whole.
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Fn() + Clone> Link<F> {
    /// Calls `accepted` whenever the server has answered the beginning of a watch with a success.
    pub(super) fn new(timing: Timing, accepted: F) -> Self {
        let pace = Pace { begun: None, patience: Patience::new(timing), left_alone: None };
        Self { accepted, timing, pace: Arc::new(Mutex::new(pace)) }
    }
}

#[derive(Debug)]
struct Pace {
    /// When the last watch began.
    begun: Option<Instant>,
    patience: Patience,
    /// Until when the server wants to be left alone.
    left_alone: Option<Instant>,
}

impl Pace {
    /// When the next request may be sent: now, unless it is a watch and the one before has not lasted, or the server has
    /// asked for a pause.
    fn next(&mut self, is_watch: bool, timing: Timing) -> Instant {
        let now = Instant::now();
        let allowed = self.left_alone.map_or(now, |until| until.max(now));
        if !is_watch {
            return allowed;
        }
        let start = match self.begun {
            Some(begun) if now.duration_since(begun) < timing.first_retry * 4 => now + self.patience.next(),
            _ => now,
        };
        let start = start.max(allowed);
        self.begun = Some(start);
        start
    }
}

/// How long a server that answers like this asks to be left alone. A date, which HTTP allows too, no API server writes.
fn asked_pause(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if status != StatusCode::TOO_MANY_REQUESTS && !status.is_server_error() {
        return None;
    }
    let seconds: u64 = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_WAIT))
}

impl<S, F: Clone> Layer<S> for Link<F> {
    type Service = Linked<S, F>;

    fn layer(&self, inner: S) -> Self::Service {
        Linked { inner, link: self.clone() }
    }
}

/// A client's service with a [`Link`] around it.
#[derive(Debug)]
pub(super) struct Linked<S, F> {
    inner: S,
    link: Link<F>,
}

impl<S, F, B> Service<http::Request<Body>> for Linked<S, F>
where
    S: Service<http::Request<Body>, Response = http::Response<B>>,
    S::Future: Send + 'static,
    F: Fn() + Clone + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        // Sent when it is polled.
        let response = self.inner.call(request);
        let link = self.link.clone();
        let start = link.pace().next(is_watch, link.timing);
        Box::pin(async move {
            sleep_until(start).await;
            let response = response.await?;
            if is_watch && response.status().is_success() {
                (link.accepted)();
            }
            if let Some(pause) = asked_pause(response.status(), response.headers()) {
                link.pace().left_alone = Some(Instant::now() + pause);
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_server_says_in_the_header_how_long_it_wants_to_be_left_alone() {
        let pause =
            |status, value| asked_pause(status, &HeaderMap::from_iter([(header::RETRY_AFTER, value)]));
        let value = |text| http::HeaderValue::from_str(text).unwrap();
        for status in [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE] {
            assert_eq!(pause(status, value("7")), Some(Duration::from_secs(7)));
            assert_eq!(pause(status, value("86400")), Some(LONGEST_WAIT));
            assert_eq!(pause(status, value("Sun, 22 Nov 2026 00:00:00 GMT")), None);
            assert_eq!(asked_pause(status, &HeaderMap::new()), None);
        }
        assert_eq!(pause(StatusCode::OK, value("7")), None);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_while_the_server_wants_to_be_left_alone_and_watches_keep_their_distance() {
        let timing = Timing::default();
        let mut pace = Pace { begun: None, patience: Patience::new(timing), left_alone: None };
        let now = Instant::now();
        assert_eq!(pace.next(false, timing), now);
        assert_eq!(pace.next(true, timing), now);
        assert!(pace.next(true, timing) >= now + timing.first_retry);
        assert_eq!(pace.next(false, timing), now);
        let until = now + Duration::from_secs(600);
        pace.left_alone = Some(until);
        assert_eq!((pace.next(false, timing), pace.next(true, timing)), (until, until));
        tokio::time::sleep(Duration::from_secs(700)).await;
        assert_eq!((pace.next(false, timing), pace.next(true, timing)), (Instant::now(), Instant::now()));
    }
}
