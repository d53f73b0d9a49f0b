//! The files of a directory (or one file) -> the objects that they define together, and what changed since the last
//! time. Reads files when told to; when that is, is `file`'s business.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hasher as _},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::{
    Batch, Event,
    convert::SERVICE_PROXY_NAME_LABEL,
    manifest::{self, Manifest},
};
use crate::model::{Object, ObjectId, Place, Problem, ProblemKind, Service, Severity, Subject};

/// No manifest that people write is larger, and a large file that got here by mistake must not cost all memory.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The manifests of a directory, or of one file.
#[derive(Debug)]
pub struct Directory {
    input: PathBuf,
    is_directory: bool,
    service_proxy_name: Option<String>,
    files: BTreeMap<PathBuf, FileState>,
    /// Why the directory could not be listed the last time.
    unreadable: Option<Problem>,
    delivered: BTreeMap<ObjectId, Object>,
}

#[derive(Debug, Default)]
struct FileState {
    /// Hash of what `good` or `broken` was read from.
    content: Option<u64>,
    /// What the file said when it was last good.
    good: Manifest,
    /// What is wrong with it now.
    broken: Vec<Problem>,
}

impl Directory {
    /// Takes up `input`, a directory or a file. Of the Services in it those count whose label
    /// `service.kubernetes.io/service-proxy-name` is `service_proxy_name`; without that, all that have the label.
    ///
    /// # Errors
    ///
    /// `input` does not exist or cannot be read.
    pub fn open(input: PathBuf, service_proxy_name: Option<String>) -> anyhow::Result<Self> {
        let metadata = fs::metadata(&input).with_context(|| {
            format!("cannot read --input {}: name a directory or a file", input.display())
        })?;
        if metadata.is_dir() {
            fs::read_dir(&input)
                .with_context(|| format!("cannot list --input {}: check its permissions", input.display()))?;
        } else if !metadata.is_file() {
            bail!("--input {} is neither a directory nor a file: name one", input.display());
        }
        Ok(Self {
            is_directory: metadata.is_dir(),
            input,
            service_proxy_name,
            files: BTreeMap::new(),
            unreadable: None,
            delivered: BTreeMap::new(),
        })
    }

    /// The directory in which changes are to be expected.
    #[must_use]
    pub fn watched(&self) -> &Path {
        if self.is_directory {
            return &self.input;
        }
        match self.input.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Whether the directory, when last read, had nothing in it that could be a manifest.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.is_directory && self.unreadable.is_none() && self.files.is_empty()
    }

    /// Reads what has changed.
    pub fn read(&mut self) -> Batch {
        match self.list() {
            Ok(paths) => {
                self.unreadable = None;
                self.files.retain(|path, _| paths.contains(path));
                for path in paths {
                    self.read_file(path);
                }
            }
            // A directory that cannot be read says nothing about the files in it.
            Err(error) => {
                self.unreadable = Some(
                    Problem::new(
                        Severity::Error,
                        Subject::File(self.input.clone()),
                        format!("cannot be listed: {error}"),
                        "bring it back; until then its last good objects stay in force",
                    )
                    .of_kind(ProblemKind::Unreadable),
                );
            }
        }
        self.difference()
    }

    fn list(&self) -> io::Result<Vec<PathBuf>> {
        if !self.is_directory {
            return Ok(vec![self.input.clone()]);
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.input)? {
            let entry = entry?;
            if is_manifest(&entry.file_name()) {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    }

    fn read_file(&mut self, path: PathBuf) {
        let content = match read_regular(&path) {
            Ok(Some(content)) => content,
            Ok(None) if leads_nowhere(&path) => {
                let problem = Problem::new(
                    Severity::Warning,
                    Subject::File(path.clone()),
                    "is a symbolic link that leads nowhere: no object comes from it",
                    "bring back what it leads to, or remove it",
                )
                .of_kind(ProblemKind::Unreadable);
                self.files.insert(path, FileState { broken: vec![problem], ..FileState::default() });
                return;
            }
            // Neither what went between listing and reading, nor a sub-directory, has anything to say.
            Ok(None) => {
                self.files.remove(&path);
                return;
            }
            Err(error) => {
                let problem = Problem::new(
                    Severity::Error,
                    Subject::File(path.clone()),
                    format!("cannot be read: {error}"),
                    "check its permissions; until then what it said last, if anything, stays in force",
                )
                .of_kind(ProblemKind::Unreadable);
                let state = self.files.entry(path).or_default();
                state.content = None;
                state.broken = vec![problem];
                return;
            }
        };
        let mut hasher = DefaultHasher::new();
        hasher.write(&content);
        let hash = Some(hasher.finish());
        let parsed = match self.files.get(&path) {
            Some(state) if state.content == hash => return,
            _ => manifest::parse(&path, &content),
        };
        let state = self.files.entry(path).or_default();
        state.content = hash;
        match parsed {
            Ok(good) => {
                state.good = good;
                state.broken.clear();
            }
            Err(broken) => state.broken = broken,
        }
    }

    /// What changed since the last batch, and all that is wrong now.
    fn difference(&mut self) -> Batch {
        let (current, problems) = self.merge();
        let mut events = Vec::new();
        for id in self.delivered.keys().filter(|id| !current.contains_key(id)) {
            events.push(Event::Delete(id.clone()));
        }
        for (id, object) in &current {
            if self.delivered.get(id) != Some(object) {
                events.push(Event::Apply(object.clone()));
            }
        }
        self.delivered = current;
        Batch { events, problems: Some(problems), ..Batch::default() }
    }

    /// All objects of all files: of two with one name, the first by file and position counts.
    fn merge(&self) -> (BTreeMap<ObjectId, Object>, Vec<Problem>) {
        let mut problems: Vec<Problem> = self.unreadable.iter().cloned().collect();
        let mut first: BTreeMap<ObjectId, (&Object, &Place)> = BTreeMap::new();
        for state in self.files.values() {
            problems.extend(state.broken.iter().cloned());
            // What is wrong in the good version that stays in force is no news while the file is broken.
            if state.broken.is_empty() {
                problems.extend(state.good.problems.iter().cloned());
            }
            for (object, place) in &state.good.objects {
                match first.entry(object.id()) {
                    Entry::Vacant(entry) => {
                        entry.insert((object, place));
                    }
                    Entry::Occupied(entry) => problems.push(
                        Problem::new(
                            Severity::Warning,
                            Subject::Object(object.id()),
                            format!("is already defined at {}: this one is left out", entry.get().1),
                            "take one of the two away",
                        )
                        .of_kind(ProblemKind::Duplicate)
                        .at(place.clone()),
                    ),
                }
            }
        }

        let mut objects = BTreeMap::new();
        let mut ignored = Vec::new();
        for (id, (object, place)) in first {
            if let Object::Service(service) = object
                && let Some(problem) = self.deselected(service, place)
            {
                // What else is wrong with it is the business of whoever it is left to.
                problems.retain(|other| other.subject != problem.subject);
                ignored.push(problem);
            } else {
                objects.insert(id, object.clone());
            }
        }
        problems.extend(ignored);
        problems.sort();
        problems.dedup();
        (objects, problems)
    }

    /// Why a Service is none of proxier's, if it is none.
    fn deselected(&self, service: &Service, place: &Place) -> Option<Problem> {
        let subject = Subject::Object(ObjectId::Service(service.name.clone()));
        let field = format!("metadata.labels[{SERVICE_PROXY_NAME_LABEL}]");
        let label = service.labels.get(SERVICE_PROXY_NAME_LABEL);
        let problem = match (label, &self.service_proxy_name) {
            (None, _) => Problem::new(
                Severity::Info,
                subject,
                "is missing: the Service is left to kube-proxy",
                "add the label if proxier is to take it over",
            )
            .in_whole_field(field),
            (Some(label), Some(wanted)) if label != wanted => Problem::new(
                Severity::Info,
                subject,
                format!("is not {wanted:?}, the --service-proxy-name: the Service is left to that proxy"),
                "change one of the two if proxier is to take it over",
            )
            .in_field(field, label),
            _ => return None,
        };
        Some(problem.of_kind(ProblemKind::Ignored).at(place.clone()))
    }
}

/// Whether a file of this name is meant to be read: not what editors and kubelet leave beside the files.
fn is_manifest(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let has_extension = Path::new(name)
        .extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| matches!(extension, "yaml" | "yml" | "json"));
    // `.foo.yaml`, `.#foo.yaml`, `#foo.yaml`; `foo.yaml~`, `foo.yaml.swp`, `4913` and `#foo.yaml#` have no extension of ours.
    has_extension && !name.starts_with(['.', '#'])
}

/// The content of a file; none if there is no file, or something else of that name. Follows symbolic links.
fn read_regular(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let result = fs::metadata(path).and_then(|metadata| {
        if !metadata.is_file() {
            return Ok(None);
        }
        if metadata.len() > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20)));
        }
        fs::read(path).map(Some)
    });
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result,
    }
}

/// Whether `path` is a symbolic link whose target does not exist.
fn leads_nowhere(path: &Path) -> bool {
    path.is_symlink() && matches!(path.try_exists(), Ok(false))
}

#[cfg(test)]
mod tests;
