//! Kubernetes manifests as people write them -> objects, each with its place in the file. Text in, objects out: no I/O,
//! and what several files have to do with each other is `directory`'s business.
//!
//! Each document is read twice: first its `kind`, then, straight from the text into the type that belongs to it, so that
//! whatever does not fit is reported with the line and column where it stands.

use std::{cell::RefCell, fmt, marker::PhantomData, path::Path};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{MessageFormatter as _, Spanned, UserMessageFormatter};

use super::convert::{self, Converted, Refused};
use crate::model::{Object, Place, Problem, ProblemKind, Severity, Subject};

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The objects, in the order of the file.
    pub objects: Vec<(Object, Place)>,
    /// What of it does not count.
    pub problems: Vec<Problem>,
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// YAML documents, between `---`.
    Yaml,
    /// JSON values, one after the other.
    Json,
}

impl Syntax {
    /// By the file's name, as kubectl does it.
    #[must_use]
    pub fn of(file: &Path) -> Self {
        if file.extension().is_some_and(|extension| extension == "json") { Self::Json } else { Self::Yaml }
    }
}

/// Reads all documents of a file. `file` is its name, for messages.
///
/// # Errors
///
/// One problem for each document that is broken: then nothing of the file counts.
pub fn parse(file: &Path, text: &[u8]) -> Result<Manifest, Vec<Problem>> {
    let text = match str::from_utf8(text) {
        Ok(text) => text,
        Err(error) => {
            let before = String::from_utf8_lossy(&text[..error.valid_up_to()]);
            let (line, column) = end_of(&before);
            return Err(vec![Flaw::new(line, column, "is not UTF-8").into_problem(file)]);
        }
    };
    let documents = match Syntax::of(file) {
        Syntax::Yaml => yaml_documents(text),
        Syntax::Json => json_documents(text).map_err(|error| {
            // serde_json repeats the position at the end of its message.
            let message = error.to_string();
            let reason = message.split(" at line ").next().unwrap_or_default();
            let (line, column) = (error.line() as u64, error.column() as u64);
            vec![Flaw::new(line.max(1), column.max(1), reason).into_problem(file)]
        })?,
    };

    let mut manifest = Manifest::default();
    let mut errors = Vec::new();
    for document in &documents {
        if let Err(flaw) = document.read(file, &mut manifest) {
            errors.push(flaw.into_problem(file));
        }
    }
    if errors.is_empty() { Ok(manifest) } else { Err(errors) }
}

/// Why a document is broken, and where in the file.
struct Flaw {
    line: u64,
    column: u64,
    reason: String,
}

impl Flaw {
    fn new(line: u64, column: u64, reason: &str) -> Self {
        // A message may quote the file, and a log line is one line.
        let printable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        Self { line, column, reason: reason.chars().map(printable).collect() }
    }

    fn into_problem(self, file: &Path) -> Problem {
        Problem::new(
            Severity::Error,
            Subject::File(file.to_owned()),
            self.reason,
            "correct the file; until then what it said last, if anything, stays in force",
        )
        .at(Place { file: file.to_owned(), line: self.line, column: self.column })
    }
}

/// Line and column right after `text`.
fn end_of(text: &str) -> (u64, u64) {
    let line = text.matches('\n').count() as u64 + 1;
    let column = text.rsplit('\n').next().unwrap_or_default().chars().count() as u64 + 1;
    (line, column)
}

/// A part of a file, and where it begins.
#[derive(Debug, PartialEq, Eq)]
struct Document<'a> {
    text: &'a str,
    /// Lines of the file before it.
    lines_before: u64,
    /// Characters before it on its first line.
    columns_before: u64,
}

/// Splits at `---` and `...`, which YAML forbids at the beginning of any other line.
fn yaml_documents(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let mut push = |start: usize, end: usize, lines_before: u64| {
        let text = &text[start..end];
        if !is_blank(text) {
            documents.push(Document { text, lines_before, columns_before: 0 });
        }
    };
    let (mut start, mut lines_before) = (0, 0);
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let number = number as u64;
        if is_marker(line, "---") {
            push(start, offset, lines_before);
            (start, lines_before) = (offset, number);
        } else if is_marker(line, "...") {
            push(start, offset, lines_before);
            (start, lines_before) = (offset + line.len(), number + 1);
        }
        offset += line.len();
    }
    push(start, offset, lines_before);
    documents
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

/// Whether a document has nothing but comments and directives in it.
fn is_blank(text: &str) -> bool {
    text.trim_start_matches('\u{feff}').lines().all(|line| {
        let rest = if is_marker(line, "---") { &line[3..] } else { line }.trim();
        rest.is_empty() || rest.starts_with('#') || line.starts_with('%')
    })
}

fn json_documents(text: &str) -> Result<Vec<Document<'_>>, serde_json::Error> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    let mut documents = Vec::new();
    let (mut offset, mut line, mut column) = (0, 1, 1);
    while let Some(value) = stream.next() {
        value?;
        let document = &text[offset..stream.byte_offset()];
        documents.push(Document { text: document, lines_before: line - 1, columns_before: column - 1 });
        let (lines, columns) = end_of(document);
        column = if lines == 1 { column + columns - 1 } else { columns };
        line += lines - 1;
        offset = stream.byte_offset();
    }
    Ok(documents)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    api_version: Option<Spanned<String>>,
    kind: Option<Spanned<String>>,
}

#[derive(Deserialize)]
struct Items {
    #[serde(default)]
    items: Option<Vec<Spanned<TypeMeta>>>,
}

/// A kind that proxier reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Service,
    EndpointSlice,
    Node,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Service, Self::EndpointSlice, Self::Node];

    const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
        }
    }

    const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    fn of(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == kind && known.api_version() == api_version)
    }

    /// What was probably meant by a kind that is none of these: `service`, or an EndpointSlice of `v1` or `v1beta1`. A
    /// Service of another API group is another thing.
    fn meant(api_version: &str, kind: &str) -> Option<Self> {
        let group = |api_version: &str| api_version.rsplit_once('/').map(|(group, _)| group.to_owned());
        Self::ALL.into_iter().find(|known| {
            known.name().eq_ignore_ascii_case(kind)
                && group(api_version)
                    .is_none_or(|group_given| Some(group_given) == group(known.api_version()))
        })
    }

    /// Of a list of one kind alone: `ServiceList`.
    fn of_list(api_version: &str, kind: &str) -> Option<Self> {
        kind.strip_suffix("List").and_then(|item| Self::of(api_version, item))
    }
}

impl Document<'_> {
    fn read(&self, file: &Path, manifest: &mut Manifest) -> Result<(), Flaw> {
        let meta = self.deserialize(PhantomData::<Spanned<TypeMeta>>)?;
        let place = self.place(file, meta.referenced);
        let (api_version, kind) = self.api_version_and_kind(&meta)?;
        if let Some(known) = Kind::of(&api_version.value, &kind.value) {
            let object = self.deserialize(known)?;
            return manifest.add(object.convert(), known, place);
        }
        let of_one_kind = Kind::of_list(&api_version.value, &kind.value);
        if of_one_kind.is_none() && (api_version.value.as_str(), kind.value.as_str()) != ("v1", "List") {
            manifest.ignore(&api_version.value, &kind.value, self.place(file, kind.referenced));
            return Ok(());
        }

        let items = self.deserialize(PhantomData::<Items>)?;
        let mut wanted = Vec::new();
        for item in items.items.iter().flatten() {
            // The API server leaves kind and version away within a list of one kind.
            let known = match of_one_kind {
                Some(known) if item.value.kind.is_none() => Some(known),
                _ => {
                    let (api_version, kind) = self.api_version_and_kind(item)?;
                    let known = Kind::of(&api_version.value, &kind.value);
                    if known.is_none() {
                        let place = self.place(file, kind.referenced);
                        manifest.ignore(&api_version.value, &kind.value, place);
                    }
                    known
                }
            };
            wanted.push(known);
        }
        let objects = RefCell::new(Vec::new());
        let list = ListSeed { wanted: &wanted, objects: &objects };
        self.deserialize(list)?;
        let places = items.items.iter().flatten().map(|item| self.place(file, item.referenced));
        for (item, place) in objects.into_inner().into_iter().zip(places) {
            if let Some((object, known)) = item {
                manifest.add(object.convert(), known, place)?;
            }
        }
        Ok(())
    }

    fn api_version_and_kind<'m>(
        &self,
        meta: &'m Spanned<TypeMeta>,
    ) -> Result<(&'m Spanned<String>, &'m Spanned<String>), Flaw> {
        let missing = |field: &str| {
            let (line, column) = self.position(meta.referenced);
            Flaw::new(line, column, &format!("has no {field}: not a Kubernetes object"))
        };
        let kind = meta.value.kind.as_ref().ok_or_else(|| missing("kind"))?;
        let api_version = meta.value.api_version.as_ref().ok_or_else(|| missing("apiVersion"))?;
        Ok((api_version, kind))
    }

    fn deserialize<T>(&self, seed: impl for<'de> DeserializeSeed<'de, Value = T>) -> Result<T, Flaw> {
        let options = serde_saphyr::options! {
            // A list of ten thousand Services is a document that somebody may have.
            budget: serde_saphyr::budget! { max_nodes: 8_000_000, max_events: 16_000_000 },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
            // What kubectl refuses is refused here: `name: 123` is a number.
            no_schema: true,
            with_snippet: false,
        };
        let read = |deserializer: serde_saphyr::Deserializer<'_, '_>| seed.deserialize(deserializer);
        serde_saphyr::with_deserializer_from_str_with_options(self.text, options, read).map_err(|error| {
            let error = error.without_snippet();
            let reason = match error {
                serde_saphyr::Error::QuotingRequired { value, .. } => {
                    format!("{value} is no string: put it in quotes").into()
                }
                _ => UserMessageFormatter.format_message(error),
            };
            let (line, column) = self.position(error.location().unwrap_or(serde_saphyr::Location::UNKNOWN));
            Flaw::new(line, column, &reason)
        })
    }

    /// Line and column in the file of a position in the document.
    fn position(&self, location: serde_saphyr::Location) -> (u64, u64) {
        let line = location.line().max(1);
        let column = location.column().max(1) + if line == 1 { self.columns_before } else { 0 };
        (line + self.lines_before, column)
    }

    fn place(&self, file: &Path, location: serde_saphyr::Location) -> Place {
        let (line, column) = self.position(location);
        Place { file: file.to_owned(), line, column }
    }
}

impl Manifest {
    fn add(
        &mut self,
        converted: Result<Converted<Object>, Refused>,
        kind: Kind,
        place: Place,
    ) -> Result<(), Flaw> {
        match converted {
            Ok(Converted { object, problems }) => {
                self.problems.extend(problems.into_iter().map(|problem| problem.at(place.clone())));
                self.objects.push((object, place));
                Ok(())
            }
            Err(Refused::Unsupported(problem)) => {
                self.problems.push(problem.at(place));
                Ok(())
            }
            Err(nameless @ Refused::Nameless) => {
                let reason = format!("{} {nameless}", kind.name());
                Err(Flaw::new(place.line, place.column, &reason))
            }
        }
    }

    fn ignore(&mut self, api_version: &str, kind: &str, place: Place) {
        let problem = if let Some(meant) = Kind::meant(api_version, kind) {
            Problem::new(
                Severity::Warning,
                Subject::File(place.file.clone()),
                "is not a kind that proxier reads: ignored",
                format!("write apiVersion: {} and kind: {}", meant.api_version(), meant.name()),
            )
        } else {
            let readable: Vec<_> =
                Kind::ALL.iter().map(|kind| format!("{} {}", kind.api_version(), kind.name())).collect();
            Problem::new(
                Severity::Info,
                Subject::File(place.file.clone()),
                "is not a kind that proxier reads: ignored",
                format!("it reads {} and lists of them", readable.join(", ")),
            )
        };
        let problem = problem.in_field("kind", format!("{api_version} {kind}")).of_kind(ProblemKind::Ignored);
        // Once a kind and file: a directory of Deployments is not ten messages worth.
        let known =
            self.problems.iter().any(|known| known.field == problem.field && known.value == problem.value);
        if !known {
            self.problems.push(problem.at(place));
        }
    }
}

/// An object of a kind that proxier reads.
enum ApiObject {
    Service(Box<core::Service>),
    EndpointSlice(Box<discovery::EndpointSlice>),
    Node(Box<core::Node>),
}

impl ApiObject {
    fn convert(self) -> Result<Converted<Object>, Refused> {
        fn wrap<T>(converted: Converted<T>, object: impl FnOnce(T) -> Object) -> Converted<Object> {
            Converted { object: object(converted.object), problems: converted.problems }
        }
        Ok(match self {
            Self::Service(service) => {
                wrap(convert::service(*service)?, |service| Object::Service(Box::new(service)))
            }
            Self::EndpointSlice(slice) => wrap(convert::endpoint_slice(*slice)?, Object::EndpointSlice),
            Self::Node(node) => wrap(convert::node(&node)?, Object::Node),
        })
    }
}

impl<'de> DeserializeSeed<'de> for Kind {
    type Value = ApiObject;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<ApiObject, D::Error> {
        Ok(match self {
            Self::Service => ApiObject::Service(Box::deserialize(deserializer)?),
            Self::EndpointSlice => ApiObject::EndpointSlice(Box::deserialize(deserializer)?),
            Self::Node => ApiObject::Node(Box::deserialize(deserializer)?),
        })
    }
}

/// Reads the `items` of a list, each as what `wanted` says at its position; none is skipped.
#[derive(Clone, Copy)]
struct ListSeed<'a> {
    wanted: &'a [Option<Kind>],
    objects: &'a RefCell<Vec<Option<(ApiObject, Kind)>>>,
}

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" && !self.wanted.is_empty() {
                map.next_value_seed(ItemsSeed(self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct ItemsSeed<'a>(ListSeed<'a>);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        for wanted in self.0.wanted {
            let item = match wanted {
                Some(kind) => items.next_element_seed(*kind)?.map(|object| (object, *kind)),
                None => {
                    items.next_element::<IgnoredAny>()?;
                    None
                }
            };
            self.0.objects.borrow_mut().push(item);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
