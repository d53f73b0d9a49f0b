//! What goes wrong on demand, and sequences of it that a seed plays again.

use std::{fmt, time::Duration};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

use super::resource::Resource;

/// What a request does, as far as faults tell requests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Anything.
    Any,
    /// One object by its name.
    Get,
    /// A list, whichever page of it.
    List,
    /// A page of a list after the first.
    Continue,
    /// A watch.
    Watch,
    /// Creating or patching.
    Write,
}

impl Verb {
    fn covers(self, other: Self) -> bool {
        self == Self::Any || self == other || (self == Self::List && other == Self::Continue)
    }

    /// As RBAC calls it.
    pub(super) fn of_authorization(self) -> &'static str {
        match self {
            Self::Any => "*",
            Self::Get => "get",
            Self::List | Self::Continue => "list",
            Self::Watch => "watch",
            Self::Write => "create",
        }
    }
}

/// A way in which an API server, or what is between it and its client, fails.
///
/// Where a watch can fail in its stream, streams that are open already fail at once, too: a test need not wait for the
/// client to open the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HTTP 401.
    Unauthorized,
    /// HTTP 403.
    Forbidden,
    /// HTTP 404, as of an API group that is not served, or of something that is no API server.
    NotFound,
    /// HTTP 429, as priority and fairness answers: `Retry-After` and a body that is no JSON.
    TooManyRequests {
        /// Seconds.
        retry_after: u32,
    },
    /// HTTP 500 with the storage's error.
    InternalError,
    /// HTTP 503 with `Retry-After`.
    Unavailable,
    /// HTTP 410.
    Gone,
    /// HTTP 200, and an ERROR of 410 in the stream, which ends. Watches only.
    GoneInStream,
    /// The request is read and never answered.
    Silence,
    /// Headers and so much of the body, or of the stream from now on; then nothing, on a connection that stays.
    Stall {
        /// Bytes.
        after: usize,
    },
    /// The body, or a line of the stream, ends in the middle as if it were whole: the HTTP is right, the JSON is not.
    Cut,
    /// The body, or the stream, ends in the middle with its connection: less than `content-length`, or no last chunk.
    Disconnect,
    /// A body, or a line of the stream, that is not JSON.
    NotJson,
    /// A body, or a line of the stream, of JSON that is something else.
    OtherShape,
    /// HTTP 200 and a web page, as from a proxy that asks for a login.
    Html,
    /// The right bytes, a few at a time.
    Drip {
        /// Bytes at a time.
        piece: usize,
        /// Between two of them.
        pause: Duration,
    },
    /// An event arrives as JSON of another shape, and is lost. Watches only, and not before there is one.
    LostAsOtherShape,
    /// The same, as no JSON.
    LostAsNotJson,
    /// An ADDED of long ago once more, and from then on every event twice. Watches only.
    Duplicates,
}

impl Kind {
    /// Every kind, with parameters that a test can wait for.
    pub const ALL: [Self; 19] = [
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::TooManyRequests { retry_after: 1 },
        Self::InternalError,
        Self::Unavailable,
        Self::Gone,
        Self::GoneInStream,
        Self::Silence,
        Self::Stall { after: 100 },
        Self::Cut,
        Self::Disconnect,
        Self::NotJson,
        Self::OtherShape,
        Self::Html,
        Self::Drip { piece: 64, pause: Duration::from_millis(1) },
        Self::LostAsOtherShape,
        Self::LostAsNotJson,
        Self::Duplicates,
    ];

    /// Whether it happens in the stream of a watch, not in place of it.
    fn is_in_stream(self) -> bool {
        matches!(
            self,
            Self::GoneInStream
                | Self::Stall { .. }
                | Self::Cut
                | Self::Disconnect
                | Self::NotJson
                | Self::OtherShape
                | Self::Drip { .. }
                | Self::Duplicates
        )
    }

    fn moment_of_watches(self) -> Moment {
        if self.is_of_an_event() {
            Moment::Event
        } else if self.is_in_stream() {
            Moment::Stream
        } else {
            Moment::Request
        }
    }

    /// Whether it happens to an event in the stream of a watch.
    fn is_of_an_event(self) -> bool {
        matches!(self, Self::LostAsOtherShape | Self::LostAsNotJson)
    }

    /// Whether nothing else can fail like this.
    #[must_use]
    pub fn is_for_watches_only(self) -> bool {
        matches!(self, Self::GoneInStream | Self::Duplicates) || self.is_of_an_event()
    }
}

/// A fault: what, where, how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    kind: Kind,
    resource: Option<Resource>,
    verb: Verb,
    times: Option<u32>,
}

impl Fault {
    /// Of every request, until healed.
    #[must_use]
    pub const fn new(kind: Kind) -> Self {
        Self { kind, resource: None, verb: Verb::Any, times: None }
    }

    /// Of this resource only.
    #[must_use]
    pub const fn of(self, resource: Resource) -> Self {
        Self { resource: Some(resource), ..self }
    }

    /// Of requests that do this only.
    #[must_use]
    pub const fn on(self, verb: Verb) -> Self {
        Self { verb, ..self }
    }

    /// So many times only.
    #[must_use]
    pub const fn times(self, times: u32) -> Self {
        Self { times: Some(times), ..self }
    }

    /// What goes wrong.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// One that ends by itself, of Services, EndpointSlices or everything. It may be of a kind that never happens to
    /// what it is of; then it does nothing.
    pub fn any(random: &mut impl Rng) -> Self {
        let kind = match Kind::ALL[random.random_range(0..Kind::ALL.len())] {
            Kind::Stall { .. } => Kind::Stall { after: random.random_range(0..600) },
            Kind::Drip { pause, .. } => Kind::Drip { piece: random.random_range(16..256), pause },
            kind => kind,
        };
        let resources = [None, Some(Resource::Services), Some(Resource::EndpointSlices)];
        let verbs = [Verb::Any, Verb::List, Verb::Continue, Verb::Watch];
        Self {
            kind,
            resource: resources[random.random_range(0..resources.len())],
            verb: verbs[random.random_range(0..verbs.len())],
            times: Some(random.random_range(1..4)),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} on {:?}", self.kind, self.verb)?;
        if let Some(resource) = self.resource {
            write!(formatter, " of {resource}")?;
        }
        self.times.map_or(Ok(()), |times| write!(formatter, ", {times} times"))
    }
}

/// A step of a sequence of misfortunes; [`super::ApiServer::play`] takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A fault from now on.
    Inject(Fault),
    /// No fault from now on.
    Heal,
    /// Everything before now is too old.
    Compact,
    /// resourceVersions start again lower.
    ResetHistory,
    /// Every connection is cut.
    CutWatches,
    /// Nothing listens for so long.
    Restart(Duration),
    /// Nothing happens for so long.
    Wait(Duration),
}

impl Step {
    /// Any one; half of them faults.
    pub fn any(random: &mut impl Rng) -> Self {
        let pause = Duration::from_millis(random.random_range(5..150));
        match random.random_range(0..14) {
            0..7 => Self::Inject(Fault::any(random)),
            7 => Self::Heal,
            8 => Self::Compact,
            9 => Self::ResetHistory,
            10 => Self::CutWatches,
            11 => Self::Restart(pause),
            _ => Self::Wait(pause),
        }
    }

    /// The endless sequence of a seed: the same at every run.
    pub fn sequence(seed: u64) -> impl Iterator<Item = Self> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        std::iter::repeat_with(move || Self::any(&mut random))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inject(fault) => fault.fmt(formatter),
            other => write!(formatter, "{other:?}"),
        }
    }
}

/// Names a fault that was injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(usize);

/// At which point of a request a fault may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// Before the answer begins.
    Request,
    /// While a watch is open.
    Stream,
    /// When a watch is about to send an event.
    Event,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    healed: bool,
    hits: u32,
}

/// All faults that were injected.
#[derive(Debug, Default)]
pub(super) struct Faults {
    all: Vec<Armed>,
}

impl Faults {
    pub(super) fn inject(&mut self, fault: Fault) -> FaultId {
        self.all.push(Armed { fault, healed: false, hits: 0 });
        FaultId(self.all.len() - 1)
    }

    pub(super) fn heal(&mut self) {
        for armed in &mut self.all {
            armed.healed = true;
        }
    }

    pub(super) fn heal_one(&mut self, id: FaultId) {
        self.all[id.0].healed = true;
    }

    pub(super) fn hits(&self, id: FaultId) -> u32 {
        self.all[id.0].hits
    }

    /// The fault that happens to this request now: the first injected that is not used up. `unless` are those that a
    /// stream has met already: a fault happens to a stream once.
    pub(super) fn take(
        &mut self,
        resource: Resource,
        verb: Verb,
        moment: Moment,
        unless: &[FaultId],
    ) -> Option<(FaultId, Kind)> {
        let (index, armed) = self.all.iter_mut().enumerate().find(|(index, armed)| {
            let Fault { kind, resource: of, verb: on, times } = armed.fault;
            let fits_moment = if verb == Verb::Watch {
                moment == kind.moment_of_watches()
            } else {
                !kind.is_for_watches_only()
            };
            !armed.healed
                && fits_moment
                && times.is_none_or(|times| armed.hits < times)
                && of.is_none_or(|of| of == resource)
                && on.covers(verb)
                && !unless.contains(&FaultId(*index))
        })?;
        armed.hits += 1;
        Some((FaultId(index), armed.fault.kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_of_its_resource_and_verb_and_ends() {
        let mut faults = Faults::default();
        let id =
            faults.inject(Fault::new(Kind::InternalError).of(Resource::Services).on(Verb::List).times(2));
        let mut take = |resource, verb| faults.take(resource, verb, Moment::Request, &[]).is_some();
        assert!(!take(Resource::Nodes, Verb::List));
        assert!(!take(Resource::Services, Verb::Watch));
        assert!(take(Resource::Services, Verb::List));
        assert!(take(Resource::Services, Verb::Continue));
        assert!(!take(Resource::Services, Verb::List));
        assert_eq!(faults.hits(id), 2);
    }

    #[test]
    fn healing_ends_faults_that_would_go_on() {
        let mut faults = Faults::default();
        let id = faults.inject(Fault::new(Kind::Gone));
        faults.inject(Fault::new(Kind::Unavailable));
        let mut kind =
            || faults.take(Resource::Nodes, Verb::List, Moment::Request, &[]).map(|(_, kind)| kind);
        assert_eq!((kind(), kind()), (Some(Kind::Gone), Some(Kind::Gone)));
        faults.heal_one(id);
        assert_eq!(
            faults.take(Resource::Nodes, Verb::Get, Moment::Request, &[]).unwrap().1,
            Kind::Unavailable
        );
        faults.heal();
        assert_eq!(faults.take(Resource::Nodes, Verb::List, Moment::Request, &[]), None);
    }

    #[test]
    fn faults_of_a_stream_wait_for_the_stream_and_happen_to_it_once() {
        let mut faults = Faults::default();
        let id = faults.inject(Fault::new(Kind::Cut));
        let watch = (Resource::Services, Verb::Watch);
        assert_eq!(faults.take(watch.0, watch.1, Moment::Request, &[]), None);
        assert_eq!(faults.take(watch.0, watch.1, Moment::Stream, &[]), Some((id, Kind::Cut)));
        assert_eq!(faults.take(watch.0, watch.1, Moment::Stream, &[id]), None);
        assert_eq!(faults.take(watch.0, Verb::List, Moment::Request, &[]), Some((id, Kind::Cut)));
    }

    #[test]
    fn a_seed_gives_the_same_sequence_and_another_seed_another() {
        let steps = |seed| Step::sequence(seed).take(200).collect::<Vec<_>>();
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn a_sequence_comes_to_every_kind_of_fault_and_step() {
        let steps: Vec<_> = Step::sequence(1).take(2_000).collect();
        for kind in Kind::ALL {
            let met = steps.iter().any(|step| {
                matches!(step, Step::Inject(fault)
                    if std::mem::discriminant(&fault.kind) == std::mem::discriminant(&kind))
            });
            assert!(met, "{kind:?}");
        }
        for step in [Step::Heal, Step::Compact, Step::ResetHistory, Step::CutWatches] {
            assert!(steps.contains(&step), "{step}");
        }
        assert!(steps.iter().any(|step| matches!(step, Step::Restart(_))));
    }
}
