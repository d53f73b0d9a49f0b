//! A watch: what changed since a resourceVersion, then what changes, a line of JSON each.

use std::{io, sync::Arc, time::Duration};

use axum::body::Bytes;
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    answer::{NOT_JSON, OTHER_SHAPE, Part, Parts, drip, next_bytes},
    fault::{FaultId, Kind, Moment, Verb},
    resource::Resource,
    selector::Selector,
    state::{FutureWatch, Open, Shared, State},
    status::Status,
    store::{Change, Stored},
};

/// The last bookmark comes so long before the end, or a tenth of a shorter watch.
const LAST_BOOKMARK: Duration = Duration::from_secs(2);

/// What a watch was asked for.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) resource: Resource,
    pub(super) selector: Selector,
    /// 0: the present objects first.
    pub(super) from: u64,
    pub(super) bookmarks: bool,
    pub(super) timeout: Option<Duration>,
    /// `sendInitialEvents`, which this storage cannot do.
    pub(super) wants_initial_events: bool,
}

/// An open watch.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    options: Options,
    /// Everything up to this revision was sent.
    position: u64,
    epoch: u64,
    changed: watch::Receiver<()>,
    next_bookmark: Option<Instant>,
    deadline: Option<Instant>,
    parts: Parts,
    ended: bool,
    /// Faults that happened to this stream.
    met: Vec<FaultId>,
    twice: bool,
    drip: Option<(usize, Duration)>,
    /// The stream stops after so many bytes.
    stall_after: Option<usize>,
    _open: Open,
}

impl Watch {
    pub(super) fn open(shared: &Arc<Shared>, options: Options) -> Self {
        let changed = shared.changes();
        let now = Instant::now();
        let mut watch = Self {
            shared: Arc::clone(shared),
            position: options.from,
            epoch: 0,
            changed,
            next_bookmark: None,
            deadline: options.timeout.map(|timeout| now + timeout),
            parts: Parts::new(),
            ended: false,
            met: Vec::new(),
            twice: false,
            drip: None,
            stall_after: None,
            _open: Open::new(shared, options.resource),
            options,
        };
        let state = shared.lock();
        watch.epoch = state.epoch;
        watch.schedule_bookmark(now, state.bookmark_interval);
        watch.begin(&state);
        drop(state);
        // What it is from on, and the faults that wait for it.
        watch.catch_up();
        watch
    }

    /// The next bytes; none at the end.
    pub(super) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            if let Some(bytes) = next_bytes(&mut self.parts).await {
                return Some(bytes);
            }
            if self.ended {
                return None;
            }
            let never = Instant::now() + Duration::from_secs(86_400);
            tokio::select! {
                // Changes first, so that a bookmark and the end never overtake one.
                biased;
                changed = self.changed.changed() => {
                    // The sender lives as long as `shared`.
                    self.ended |= changed.is_err();
                    self.catch_up();
                }
                () = sleep_until(self.next_bookmark.unwrap_or(never)) => self.bookmark(),
                () = sleep_until(self.deadline.unwrap_or(never)) => self.ended = true,
            }
        }
    }

    fn begin(&mut self, state: &State) {
        let Options { resource, from, wants_initial_events, .. } = self.options;
        let (oldest, present) = (state.store.compacted(), state.store.revision());
        if wants_initial_events {
            self.fail(&Status::no_watch_list());
        } else if from == 0 {
            self.position = present;
            let objects = state.store.list(resource, present, "");
            let objects: Vec<_> =
                objects.filter(|(_, object)| self.options.selector.selects(object)).collect();
            for (_, object) in objects {
                self.send(event("ADDED", &object.typed_json(resource)));
            }
        } else if from < oldest {
            self.fail(&Status::too_old(from, oldest));
        } else if from > present && state.future_watch == FutureWatch::Refused {
            self.fail(&Status::too_large(from, present));
        }
    }

    /// Sends what changed since, after what goes wrong now.
    fn catch_up(&mut self) {
        if self.ended {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        if state.epoch != self.epoch {
            self.parts.push_back(Part::Abort);
            self.ended = true;
            return;
        }
        let Options { resource, .. } = self.options;
        let changes: Vec<Change> = state.store.changes_after(resource, self.position).collect();
        let mut lines: Vec<String> = changes.iter().filter_map(|change| self.line(change)).collect();
        while !self.ended
            && let Some((id, kind)) = state.faults.take(resource, Verb::Watch, Moment::Stream, &self.met)
        {
            self.met.push(id);
            self.go_wrong(kind, &state, lines.first());
        }
        if self.ended {
            return;
        }
        if let Some(line) = lines.first_mut()
            && let Some((id, kind)) = state.faults.take(resource, Verb::Watch, Moment::Event, &self.met)
        {
            self.met.push(id);
            *line = if kind == Kind::LostAsNotJson { NOT_JSON } else { OTHER_SHAPE }.to_owned();
        }
        for line in lines {
            if self.twice {
                self.send(line.clone());
            }
            self.send(line);
        }
        self.position = self.position.max(state.store.revision());
    }

    /// The event of a change: an object that leaves the selection is DELETED for this watch, one that enters ADDED.
    fn line(&self, change: &Change) -> Option<String> {
        let selected = |object: &Option<Arc<Stored>>| {
            object.clone().filter(|object| self.options.selector.selects(object))
        };
        let resource = self.options.resource;
        match (selected(&change.before), selected(&change.now)) {
            (None, None) => None,
            (None, Some(now)) => Some(event("ADDED", &now.typed_json(resource))),
            (Some(_), Some(now)) => Some(event("MODIFIED", &now.typed_json(resource))),
            // As it was when last seen, but for the resourceVersion.
            (Some(before), None) => Some(event("DELETED", &before.at(change.revision).typed_json(resource))),
        }
    }

    fn go_wrong(&mut self, kind: Kind, state: &State, due: Option<&String>) {
        let resource = self.options.resource;
        match kind {
            Kind::GoneInStream => {
                self.fail(&Status::too_old(self.options.from, state.store.revision()));
            }
            Kind::Stall { after } => {
                self.stall_after = Some(after);
                // It does not end either.
                self.deadline = None;
            }
            Kind::Cut | Kind::Disconnect => {
                let line = due.cloned().unwrap_or_else(|| self.bookmark_line());
                let half = Bytes::from(line).slice(..20);
                self.push(half);
                if kind == Kind::Disconnect {
                    self.parts.push_back(Part::Abort);
                }
                self.ended = true;
            }
            Kind::NotJson => self.send(NOT_JSON.to_owned()),
            Kind::OtherShape => self.send(OTHER_SHAPE.to_owned()),
            Kind::Drip { piece, pause } => self.drip = Some((piece, pause)),
            Kind::Duplicates => {
                self.twice = true;
                let objects = state.store.list(resource, state.store.revision(), "");
                let oldest = objects
                    .filter(|(_, object)| self.options.selector.selects(object))
                    .min_by_key(|(_, object)| object.revision)
                    // One that is still to come would be no duplicate.
                    .filter(|(_, object)| object.revision <= self.position);
                if let Some((_, object)) = oldest {
                    self.send(event("ADDED", &object.typed_json(resource)));
                }
            }
            // These are answers in place of the stream.
            Kind::Unauthorized
            | Kind::Forbidden
            | Kind::NotFound
            | Kind::TooManyRequests { .. }
            | Kind::InternalError
            | Kind::Unavailable
            | Kind::Gone
            | Kind::Silence
            | Kind::Html
            // These are of events.
            | Kind::LostAsOtherShape
            | Kind::LostAsNotJson => {}
        }
    }

    fn bookmark(&mut self) {
        let interval = self.shared.lock().bookmark_interval;
        self.schedule_bookmark(Instant::now(), interval);
        // A watch from the future gets none before that.
        if self.position <= self.shared.lock().store.revision() {
            self.send(self.bookmark_line());
        }
    }

    fn bookmark_line(&self) -> String {
        let resource = self.options.resource;
        let mut object = resource.empty_fields();
        object.insert("kind".to_owned(), resource.kind().into());
        object.insert("apiVersion".to_owned(), resource.api_version().into());
        object.insert("metadata".to_owned(), json!({"resourceVersion": self.position.to_string()}));
        event("BOOKMARK", &serde_json::Value::Object(object).to_string())
    }

    /// One every `interval`, and one just before the end.
    fn schedule_bookmark(&mut self, now: Instant, interval: Duration) {
        if !self.options.bookmarks {
            return;
        }
        let last = self.deadline.zip(self.options.timeout);
        let last = last.map(|(deadline, timeout)| deadline - LAST_BOOKMARK.min(timeout / 10));
        let next = now + interval;
        self.next_bookmark = match last {
            Some(last) if last <= now => None,
            Some(last) => Some(next.min(last)),
            None => Some(next),
        };
    }

    fn fail(&mut self, status: &Status) {
        self.send(status.event());
        self.ended = true;
    }

    fn send(&mut self, line: String) {
        self.push(Bytes::from(line));
    }

    fn push(&mut self, mut bytes: Bytes) {
        let mut stalls = false;
        if let Some(left) = self.stall_after {
            stalls = bytes.len() >= left;
            bytes.truncate(left);
            self.stall_after = Some(left - bytes.len());
        }
        match self.drip {
            Some((piece, pause)) => self.parts.extend(drip(&bytes, piece, pause)),
            None => self.parts.push_back(Part::Bytes(bytes)),
        }
        if stalls {
            self.parts.push_back(Part::Stall);
        }
    }
}

fn event(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}
