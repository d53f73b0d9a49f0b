//! Kubernetes Events: what `kubectl describe service` shows of what became of a Service. Not for when something is worth one:
//! that is `notices`.
//!
//! Events are for people, and nothing waits for them: while the API server is away they are lost, and a Service that flaps
//! is told of only so often. kube's `Recorder` is not used: of two events of one kind it keeps the first one's text.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter, clock::DefaultClock, middleware::NoOpMiddleware,
    state::keyed::HashMapStateStore,
};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::sync::mpsc;

use super::{
    Observed,
    notices::{Kind, Notice},
};
use crate::{
    model::{NodeName, ObjectName},
    source::kube::words,
};

/// Who tells, on every node.
const CONTROLLER: &str = "proxier.io/agent";

/// Longest note that the API server takes, in bytes (`Event.note`).
const MAX_NOTE: usize = 1024;

/// How many may wait to be published.
const WAITING: usize = 256;

/// A node's events: so many at once, then one in each period.
const OF_NODE: Budget = Budget { at_once: NonZeroU32::new(50).unwrap(), period: Duration::from_secs(1) };
/// The same of all Services of a namespace, whose owners must not be able to silence those of others.
const OF_NAMESPACE: Budget =
    Budget { at_once: NonZeroU32::new(20).unwrap(), period: Duration::from_secs(10) };
/// The same of one Service. A pod that comes and goes every second is worth a few lines, not a thousand.
const OF_SERVICE: Budget = Budget { at_once: NonZeroU32::new(6).unwrap(), period: Duration::from_secs(60) };

#[derive(Clone, Copy, Debug)]
struct Budget {
    at_once: NonZeroU32,
    period: Duration,
}

impl Budget {
    fn quota(self) -> Quota {
        // Only a period of zero gives none.
        Quota::with_period(self.period)
            .unwrap_or(Quota::per_second(NonZeroU32::MIN))
            .allow_burst(self.at_once)
    }
}

/// Why a notice is not published: it was one too many.
const LIMITED: &str = "rate-limited";
/// The same: the API server does not want it, or does not answer.
const FAILED: &str = "failed";

/// Takes notices to be published.
#[derive(Clone, Debug)]
pub struct Events {
    /// Each with when it was told.
    notices: mpsc::Sender<(Notice, Timestamp)>,
    observed: Observed,
}

impl Events {
    /// Publishes as `node`, on a task of its own. Must be called within a runtime.
    #[must_use]
    pub fn start(client: Client, node: &NodeName, observed: &Observed) -> Self {
        let (notices, waiting) = mpsc::channel(WAITING);
        let publisher = Publisher {
            client,
            node: node.clone(),
            limits: Limits::new(),
            observed: observed.clone(),
            failing: false,
        };
        tokio::spawn(publisher.run(waiting));
        Self { notices, observed: observed.clone() }
    }

    /// Publishes nothing: what is told can be looked at.
    #[cfg(test)]
    pub(crate) fn kept(observed: &Observed) -> (Self, mpsc::Receiver<(Notice, Timestamp)>) {
        let (notices, waiting) = mpsc::channel(WAITING);
        (Self { notices, observed: observed.clone() }, waiting)
    }

    /// Publishes a notice some time, or never: see above.
    pub fn tell(&self, notice: Notice) {
        if self.notices.try_send((notice, Timestamp::now())).is_err() {
            self.observed.event_dropped(LIMITED);
        }
    }
}

type Keyed<K> = RateLimiter<K, HashMapStateStore<K>, DefaultClock, NoOpMiddleware>;

struct Limits {
    of_node: DefaultDirectRateLimiter,
    of_namespace: Keyed<Arc<str>>,
    of_service: Keyed<ObjectName>,
}

impl Limits {
    fn new() -> Self {
        Self {
            of_node: RateLimiter::direct(OF_NODE.quota()),
            of_namespace: RateLimiter::hashmap(OF_NAMESPACE.quota()),
            of_service: RateLimiter::hashmap(OF_SERVICE.quota()),
        }
    }

    fn allow(&self, service: &ObjectName) -> bool {
        // Services that have been quiet for long need no state.
        self.of_service.retain_recent();
        self.of_namespace.retain_recent();
        self.of_service.check_key(service).is_ok()
            && self.of_namespace.check_key(&service.namespace).is_ok()
            && self.of_node.check().is_ok()
    }
}

struct Publisher {
    client: Client,
    node: NodeName,
    limits: Limits,
    observed: Observed,
    /// Whether the last one failed: said once.
    failing: bool,
}

impl Publisher {
    async fn run(mut self, mut waiting: mpsc::Receiver<(Notice, Timestamp)>) {
        while let Some((notice, happened)) = waiting.recv().await {
            if self.limits.allow(&notice.service) {
                self.publish(&notice, happened).await;
            } else {
                tracing::debug!(service = %notice.service, "one Event too many: {}", notice.note);
                self.observed.event_dropped(LIMITED);
            }
        }
    }

    async fn publish(&mut self, notice: &Notice, happened: Timestamp) {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &notice.service.namespace);
        let event = event(notice, &self.node, happened, Timestamp::now());
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => {
                self.failing = false;
                self.observed.event_published(notice.reason.name());
            }
            // Its Services go with it.
            Err(error) if is_ending(&error) => {
                tracing::debug!(service = %notice.service, "no Event in a namespace that ends: {}", notice.note);
                self.observed.event_dropped(FAILED);
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(
                        service = %notice.service,
                        "Events cannot be written: {}; the log has what they would tell; should it be forbidden, give \
                         this ServiceAccount create of events in the API group events.k8s.io (deploy/ has a ClusterRole)",
                        words(&error)
                    );
                }
                self.observed.event_dropped(FAILED);
            }
        }
    }
}

/// Whether the API server takes nothing new in the namespace, as it is about to end: a 403 that no right would mend.
fn is_ending(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

fn event(notice: &Notice, node: &NodeName, happened: Timestamp, now: Timestamp) -> Event {
    let ObjectName { namespace, name } = &notice.service;
    let mut note = notice.note.clone();
    if note.len() > MAX_NOTE {
        note.truncate(note.floor_char_boundary(MAX_NOTE - '…'.len_utf8()));
        note.push('…');
    }
    Event {
        metadata: ObjectMeta {
            namespace: Some(namespace.to_string()),
            // As client-go names them: two nodes would have to be of one mind to the nanosecond.
            name: Some(format!("{name}.{:x}", now.as_nanosecond())),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(happened)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node.to_string()),
        action: Some(notice.reason.action().to_owned()),
        reason: Some(notice.reason.name().to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(namespace.to_string()),
            name: Some(name.to_string()),
            uid: Some(notice.uid.clone()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        }),
        note: Some(note),
        type_: Some(
            match notice.reason.kind() {
                Kind::Normal => "Normal",
                Kind::Warning => "Warning",
            }
            .to_owned(),
        ),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::testing::mk_name, observe::notices::Reason};

    fn notice(note: &str) -> Notice {
        Notice {
            service: mk_name("web"),
            uid: "u".to_owned(),
            reason: Reason::Programmed,
            note: note.to_owned(),
        }
    }

    #[test]
    fn an_event_regards_the_service_and_names_the_node() {
        let (happened, now) = (Timestamp::UNIX_EPOCH, Timestamp::from_second(7).unwrap());
        let event = event(&notice("hello"), &NodeName::new("node1"), happened, now);
        assert_eq!(event.event_time, Some(MicroTime(happened)), "not when it was its turn");
        assert_eq!(event.metadata.name.as_deref(), Some("web.1a13b8600"));
        let regarding = event.regarding.unwrap();
        assert_eq!(
            (regarding.kind.as_deref(), regarding.name.as_deref(), regarding.uid.as_deref()),
            (Some("Service"), Some("web"), Some("u"))
        );
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        assert_eq!(event.reporting_instance.as_deref(), Some("node1"));
        assert_eq!(event.note.as_deref(), Some("hello"));
    }

    #[test]
    fn a_refusal_is_told_in_the_api_servers_words() {
        let refusal = kube::core::Status {
            code: 403,
            message: "events.events.k8s.io is forbidden".to_owned(),
            ..kube::core::Status::default()
        };
        assert_eq!(words(&kube::Error::Api(Box::new(refusal))), "events.events.k8s.io is forbidden");
    }

    /// Answers every request so.
    fn refusing(details: &serde_json::Value) -> Client {
        let status = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "reason": "Forbidden",
            "message": "events.events.k8s.io is forbidden", "details": details,
        });
        let answer = move |_: http::Request<kube::client::Body>| {
            let body = kube::client::Body::from(serde_json::to_vec(&status).unwrap());
            std::future::ready(http::Response::builder().status(403).body(body))
        };
        Client::new(tower::service_fn(answer), "default")
    }

    #[tokio::test]
    async fn a_namespace_that_is_about_to_end_is_no_reason_to_look_for_a_missing_right() {
        let node = NodeName::new("node1");
        let observed = Observed::new(&node, "kube", None);
        for (details, warns) in [
            (
                serde_json::json!({"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]}),
                false,
            ),
            (serde_json::json!({"causes": [{"reason": "Other"}]}), true),
            (serde_json::json!(null), true),
        ] {
            let mut publisher = Publisher {
                client: refusing(&details),
                node: node.clone(),
                limits: Limits::new(),
                observed: observed.clone(),
                failing: false,
            };
            publisher.publish(&notice("hello"), Timestamp::UNIX_EPOCH).await;
            assert_eq!(publisher.failing, warns, "{details}");
        }
        let dropped = "proxier_events_dropped_total{why=\"failed\"} 3\n";
        assert!(observed.metrics.encode().unwrap().contains(dropped));
    }

    #[test]
    fn a_note_is_cut_at_the_api_servers_limit_and_between_characters() {
        let epoch = Timestamp::UNIX_EPOCH;
        let event = event(&notice(&"ü".repeat(1000)), &NodeName::new("node1"), epoch, epoch);
        let note = event.note.unwrap();
        assert!(note.len() <= MAX_NOTE && note.ends_with("ü…"), "{} bytes", note.len());
    }

    #[test]
    fn a_service_that_flaps_is_told_of_a_few_times_and_others_all_the_same() {
        let limits = Limits::new();
        let allowed = (0..1000).filter(|_| limits.allow(&mk_name("web"))).count();
        assert_eq!(allowed, 6);
        assert!(limits.allow(&mk_name("mail")));
        let all = (0..1000).filter(|n| limits.allow(&mk_name(&format!("s{n}")))).count();
        assert!(all < 60, "{all}");
    }
}
