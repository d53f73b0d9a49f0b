//! What is wrong with a value, collected: a server may say anything, so no problem is longer than a line, and of one value
//! there are only so many.

use std::net::IpAddr;

use prost::Message;
use proxier_localv1::IpSet;

use crate::model::{Family, ObjectId, ObjectName, Problem, ProblemKind, Severity, Subject};

/// Most problems of a Service, and of its endpoints together, that are told.
const MAX_PROBLEMS: usize = 20;
/// With the one that says how many more there are.
pub(super) const MOST: usize = MAX_PROBLEMS + 1;

/// More of a value than this nobody reads.
const MAX_SHOWN: usize = 100;

/// What every problem with an address that cannot be read advises.
const WRITE_ADDRESS: &str =
    "let the server's source say an IPv4 or IPv6 address, without prefix length, port or zone";

/// Collects what is wrong with a Service, or with its endpoints.
pub(super) struct Reporter {
    subject: Subject,
    /// What the names of fields begin with.
    prefix: String,
    problems: Vec<Problem>,
    /// Those that are not told.
    untold: usize,
}

impl Reporter {
    pub(super) fn new(service: &ObjectName) -> Self {
        let service = ObjectName::new(shown(&service.namespace), shown(&service.name));
        Self {
            subject: Subject::Object(ObjectId::Service(service)),
            prefix: String::new(),
            problems: Vec::new(),
            untold: 0,
        }
    }

    /// From now on, fields are those of the endpoint with this key.
    pub(super) fn in_endpoint(&mut self, key: &str) {
        self.prefix = format!("endpoints[{}].", shown(key));
    }

    /// Something of the value is not in force.
    pub(super) fn report(&mut self, field: &str, value: &str, reason: &str, next_step: &str) {
        let field = format!("{}{field}", self.prefix);
        self.add(|subject| {
            Problem::new(Severity::Warning, subject, reason, next_step).in_field(field, shown(value))
        });
    }

    /// The same, where there is no value to show; of the value as a whole if `field` is empty.
    pub(super) fn report_whole(&mut self, field: &str, reason: &str, next_step: &str) {
        let field = format!("{}{field}", self.prefix);
        let field = field.trim_end_matches('.');
        self.add(|subject| Problem::new(Severity::Warning, subject, reason, next_step).in_whole_field(field));
    }

    fn add(&mut self, problem: impl FnOnce(Subject) -> Problem) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem(self.subject.clone()));
        } else {
            self.untold += 1;
        }
    }

    /// What the bytes of the value say.
    pub(super) fn decoded<M: Message + Default>(&mut self, bytes: &[u8]) -> Option<M> {
        M::decode(bytes)
            .inspect_err(|error| {
                let reason = format!("cannot be decoded ({error}): left out");
                self.report_whole("", &reason, "check that the server speaks localv1");
            })
            .ok()
    }

    /// An address of a family.
    fn address(&mut self, field: &str, value: &str, family: Family) -> Option<IpAddr> {
        let Ok(address) = value.parse() else {
            self.report(field, value, "is not an IP address: left out", WRITE_ADDRESS);
            return None;
        };
        if Family::of(address) != family {
            let reason = format!("is not an {family} address: left out");
            self.report(field, value, &reason, "let the server have it among those of its family");
            return None;
        }
        Some(address)
    }

    /// Those of a set that can be read.
    pub(super) fn addresses(&mut self, field: &str, set: Option<&IpSet>) -> Vec<IpAddr> {
        let Some(IpSet { v4, v6 }) = set else { return Vec::new() };
        let mut addresses = Vec::new();
        for (family, name, texts) in [(Family::V4, "V4", v4), (Family::V6, "V6", v6)] {
            for (index, text) in texts.iter().enumerate() {
                addresses.extend(self.address(&format!("{field}.{name}[{index}]"), text, family));
            }
        }
        addresses
    }

    /// A port, if it is one.
    pub(super) fn port(&mut self, field: &str, value: i32) -> Option<u16> {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        if port.is_none() {
            let next_step = "let the server's source say a number from 1 to 65535";
            self.report(field, &value.to_string(), "is not a port: left out", next_step);
        }
        port
    }

    /// Everything that was reported.
    pub(super) fn finish(mut self) -> Vec<Problem> {
        if self.untold > 0 {
            let reason = format!("has {} more problems like those that are told", self.untold);
            let problem = Problem::new(Severity::Warning, self.subject.clone(), reason, "mend those first");
            self.problems.push(problem.of_kind(ProblemKind::Invalid));
        }
        self.problems
    }
}

/// As much of somebody else's text as a line has room for.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(MAX_SHOWN) {
        // A line of the log stays one.
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push_str("...");
    }
    shown
}
