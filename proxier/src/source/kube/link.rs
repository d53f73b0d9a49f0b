//! What goes over the connection that one watch has to the API server, seen from below it: kube's watcher tells of errors, but
//! neither that the server answers again, nor of watches that end as soon as they have begun, which it begins anew at once.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use kube::client::Body;
use tokio::time::{Instant, sleep_until};
use tower::{Layer, Service};

use super::patience::{Patience, Timing};

/// Makes the watches that pass keep their distance, and tells when the server has accepted one.
#[derive(Clone, Debug)]
pub(super) struct Link<F> {
    accepted: F,
    timing: Timing,
    pace: Arc<Mutex<Pace>>,
}

impl<F: Fn() + Clone> Link<F> {
    /// Calls `accepted` whenever the server has answered the beginning of a watch with a success.
    pub(super) fn new(timing: Timing, accepted: F) -> Self {
        let pace = Pace { begun: None, patience: Patience::new(timing) };
        Self { accepted, timing, pace: Arc::new(Mutex::new(pace)) }
    }
}

#[derive(Debug)]
struct Pace {
    /// When the last watch began.
    begun: Option<Instant>,
    patience: Patience,
}

impl Pace {
    /// When the next watch may begin: now, if the one before has lasted.
    fn next(&mut self, timing: Timing) -> Instant {
        let now = Instant::now();
        let start = match self.begun {
            Some(begun) if now.duration_since(begun) < timing.first_retry * 4 => now + self.patience.next(),
            _ => now,
        };
        self.begun = Some(start);
        start
    }
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
        if !is_watch {
            return Box::pin(response);
        }
        let start = self.link.pace.lock().unwrap_or_else(PoisonError::into_inner).next(self.link.timing);
        let accepted = self.link.accepted.clone();
        Box::pin(async move {
            sleep_until(start).await;
            let response = response.await?;
            if response.status().is_success() {
                accepted();
            }
            Ok(response)
        })
    }
}
