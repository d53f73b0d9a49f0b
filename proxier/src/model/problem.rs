//! What is wrong with something that a user wrote, said so that the user can mend it: the object, the field and its
//! value, the reason, the next step. Not for failures of the machine: those are errors.

use std::{fmt, path::PathBuf};

use super::ObjectId;

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// A whole file is not in force.
    Error,
    /// A part of an object is not in force.
    Warning,
    /// Nothing is wrong, but somebody may wonder.
    Info,
}

/// What sort of problem it is, for programs: metrics, Kubernetes Events. People read the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// Something is written that cannot be understood, or contradicts something else: that part is not in force.
    #[default]
    Invalid,
    /// A file or directory cannot be read or watched.
    Unreadable,
    /// There are two objects of one name.
    Duplicate,
    /// Something is there that is none of proxier's business.
    Ignored,
    /// What an object asks for is nothing that proxier does.
    Unsupported,
    /// A Service names no external address.
    NoExternalAddress,
    /// No Service may have the address, or none of this namespace.
    AddressRejected,
    /// The namespace has as many addresses as it may have already.
    AddressLimitExceeded,
    /// An older Service has the address.
    AddressConflict,
    /// No node has a pod of the Service.
    NoEndpoints,
    /// All pods of the Service are of the other address family.
    NoEndpointsOfFamily,
    /// Nobody may send to the Service's addresses of a family.
    NoClientAdmitted,
    /// Nothing speaks of this node.
    UnknownNode,
}

impl ProblemKind {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Invalid,
        Self::Unreadable,
        Self::Duplicate,
        Self::Ignored,
        Self::Unsupported,
        Self::NoExternalAddress,
        Self::AddressRejected,
        Self::AddressLimitExceeded,
        Self::AddressConflict,
        Self::NoEndpoints,
        Self::NoEndpointsOfFamily,
        Self::NoClientAdmitted,
        Self::UnknownNode,
    ];

    /// Its name in the form that an Event's `reason` has. Never changes: people filter by it.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Invalid => "Invalid",
            Self::Unreadable => "Unreadable",
            Self::Duplicate => "Duplicate",
            Self::Ignored => "Ignored",
            Self::Unsupported => "Unsupported",
            Self::NoExternalAddress => "NoExternalAddress",
            Self::AddressRejected => "AddressRejected",
            Self::AddressLimitExceeded => "AddressLimitExceeded",
            Self::AddressConflict => "AddressConflict",
            Self::NoEndpoints => "NoEndpoints",
            Self::NoEndpointsOfFamily => "NoEndpointsOfFamily",
            Self::NoClientAdmitted => "NoClientAdmitted",
            Self::UnknownNode => "UnknownNode",
        }
    }
}

/// What a problem is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// An object, wherever it came from.
    Object(ObjectId),
    /// A file or directory.
    File(PathBuf),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(object) => write!(f, "{object}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A position in a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// From 1.
    pub line: u64,
    /// From 1, in characters.
    pub column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// Something that a user should know.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// What it is about.
    pub subject: Subject,
    /// The field's path within the object (`spec.externalIPs[1]`); empty if it is about the whole.
    pub field: String,
    /// The field's value; none if that says nothing. An empty one is a value too.
    pub value: Option<String>,
    /// What is wrong; continues a sentence that began with the field and its value.
    pub reason: String,
    /// What to do about it.
    pub next_step: String,
    /// Where it was written, if that is known.
    pub place: Option<Place>,
    /// What sort of problem it is.
    pub kind: ProblemKind,
}

impl Problem {
    /// A problem with a whole object or file.
    #[must_use]
    pub fn new(
        severity: Severity,
        subject: Subject,
        reason: impl Into<String>,
        next_step: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            subject,
            field: String::new(),
            value: None,
            reason: reason.into(),
            next_step: next_step.into(),
            place: None,
            kind: ProblemKind::Invalid,
        }
    }

    /// The same, of another kind than [`ProblemKind::Invalid`].
    #[must_use]
    pub const fn of_kind(mut self, kind: ProblemKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same, about one field.
    #[must_use]
    pub fn in_field(mut self, field: impl Into<String>, value: impl Into<String>) -> Self {
        self.value = Some(value.into());
        self.in_whole_field(field)
    }

    /// The same, about a field whose value says nothing: it is missing, or a list of which all is meant.
    #[must_use]
    pub fn in_whole_field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// The same, with the position.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.place, &self.subject) {
            (Some(place), Subject::File(file)) if place.file == *file => write!(f, "{place}: ")?,
            (Some(place), subject) => write!(f, "{place}: {subject}: ")?,
            (None, subject) => write!(f, "{subject}: ")?,
        }
        if !self.field.is_empty() {
            write!(f, "{} ", self.field)?;
        }
        if let Some(value) = &self.value {
            write!(f, "{value:?} ")?;
        }
        write!(f, "{}; {}", self.reason, self.next_step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;

    #[test]
    fn a_problem_names_place_object_field_value_reason_and_next_step() {
        let web = ObjectName::new("default", "web");
        let problem = Problem::new(
            Severity::Warning,
            Subject::Object(ObjectId::Service(web)),
            "is not an IP address",
            "write one",
        )
        .in_field("spec.externalIPs[1]", "10.0.0.555")
        .at(Place { file: "a/web.yaml".into(), line: 3, column: 1 });
        assert_eq!(
            problem.to_string(),
            "a/web.yaml:3:1: Service default/web: spec.externalIPs[1] \"10.0.0.555\" is not an IP address; write one"
        );
    }

    #[test]
    fn an_empty_value_is_shown_and_no_value_is_not() {
        let problem = || {
            let subject = Subject::File(PathBuf::from("a.yaml"));
            Problem::new(Severity::Warning, subject, "is no address", "write one")
        };
        let text = problem().in_field("spec.externalIPs[0]", "").to_string();
        assert_eq!(text, "a.yaml: spec.externalIPs[0] \"\" is no address; write one");
        let text = problem().in_whole_field("spec.externalIPs").to_string();
        assert_eq!(text, "a.yaml: spec.externalIPs is no address; write one");
    }

    #[test]
    fn every_kind_has_a_reason_of_its_own_that_an_event_can_have() {
        let mut reasons = std::collections::BTreeSet::new();
        for kind in ProblemKind::ALL {
            let reason = kind.reason();
            assert_eq!(format!("{kind:?}"), reason);
            assert!(reason.len() <= 128 && reason.chars().all(|c| c.is_ascii_alphanumeric()), "{reason}");
            assert!(reasons.insert(reason), "{reason} twice");
        }
    }

    #[test]
    fn a_problem_with_a_file_names_the_file_once() {
        let file = PathBuf::from("a/web.yaml");
        let problem = Problem::new(Severity::Error, Subject::File(file.clone()), "has a tab", "take it out")
            .at(Place { file, line: 2, column: 9 });
        assert_eq!(problem.to_string(), "a/web.yaml:2:9: has a tab; take it out");
    }
}
