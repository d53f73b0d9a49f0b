//! The objects and their history, as etcd keeps them: every change has a revision, and what was at a revision can be
//! listed until it is compacted. No I/O, and no clock: times count up by a second an object, so that a test run twice
//! gives the same bytes.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

use super::resource::Resource;

/// 2026-01-01T00:00:00Z.
const FIRST_SECOND: i64 = 1_767_225_600;
/// A real cluster has made some revisions before anybody looks; and a reset has somewhere to go back to.
const FIRST_REVISION: u64 = 100;
/// So far below the beginning of a history the next begins, if there is room.
const HISTORY: u64 = 10_000;

/// An object at a revision.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) revision: u64,
    /// Without `kind` and `apiVersion`, as in a list.
    fields: Map<String, Value>,
    json: OnceLock<String>,
}

impl Stored {
    fn new(mut fields: Map<String, Value>, revision: u64) -> Self {
        let metadata = &mut fields["metadata"];
        metadata["resourceVersion"] = revision.to_string().into();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let labels = metadata["labels"].as_object();
        let labels = labels
            .map(|labels| labels.iter().map(|(key, value)| (key.clone(), text(value))).collect())
            .unwrap_or_default();
        Self {
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]),
            labels,
            revision,
            fields,
            json: OnceLock::new(),
        }
    }

    /// As in a list.
    pub(super) fn json(&self) -> &str {
        self.json.get_or_init(|| Value::Object(self.fields.clone()).to_string())
    }

    /// With `kind` and `apiVersion`, as in a watch.
    pub(super) fn typed_json(&self, resource: Resource) -> String {
        let (kind, api_version) = (resource.kind(), resource.api_version());
        format!(r#"{{"kind":"{kind}","apiVersion":"{api_version}",{}"#, &self.json()[1..])
    }

    /// With `kind` and `apiVersion`.
    pub(super) fn value(&self, resource: Resource) -> Value {
        let mut fields = self.fields.clone();
        fields.insert("kind".to_owned(), resource.kind().into());
        fields.insert("apiVersion".to_owned(), resource.api_version().into());
        Value::Object(fields)
    }

    /// The same object as of another revision.
    pub(super) fn at(&self, revision: u64) -> Self {
        Self::new(self.fields.clone(), revision)
    }
}

/// A change: what was, and what is. At least one is there.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) before: Option<Arc<Stored>>,
    pub(super) now: Option<Arc<Stored>>,
}

#[derive(Clone, Debug)]
struct Version {
    revision: u64,
    /// None: deleted.
    object: Option<Arc<Stored>>,
}

#[derive(Clone, Debug, Default)]
struct Table {
    /// By `namespace/name`, oldest first.
    versions: BTreeMap<String, Vec<Version>>,
    /// Which key changed at a revision.
    changes: BTreeMap<u64, String>,
}

/// All objects.
#[derive(Clone, Debug)]
pub(super) struct Store {
    revision: u64,
    compacted: u64,
    /// The revision before the first of this history.
    origin: u64,
    /// Objects ever created: gives uids and times.
    created: u32,
    tables: BTreeMap<Resource, Table>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            revision: FIRST_REVISION,
            compacted: FIRST_REVISION,
            origin: FIRST_REVISION,
            created: 0,
            tables: Resource::ALL.map(|resource| (resource, Table::default())).into(),
        }
    }
}

impl Store {
    /// The present revision.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The oldest revision whose objects are still known, and from which a watch can start.
    pub(super) fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Goes on from a higher revision, as if objects that nobody looks at had changed.
    pub(super) fn skip_to(&mut self, revision: u64) -> anyhow::Result<()> {
        if revision < self.revision {
            bail!("revision {} has been already, so the next cannot be after {revision}", self.revision);
        }
        if self.revision == self.origin {
            self.origin = revision;
        }
        self.revision = revision;
        Ok(())
    }

    /// Creates or replaces an object. Nothing happens when it is there already.
    pub(super) fn put(&mut self, object: &Value) -> anyhow::Result<(Resource, Arc<Stored>)> {
        let (resource, mut fields) = parse(object)?;
        let key = key_of(resource, &fields);
        let old = self.get(resource, &key).cloned();
        self.complete(resource, &mut fields, old.as_deref())
            .with_context(|| format!("{} {key} cannot be applied", resource.kind()))?;
        if let Some(old) = old
            && old.fields == fields
        {
            return Ok((resource, old));
        }
        self.revision += 1;
        let stored = Arc::new(Stored::new(fields, self.revision));
        self.record(resource, key, Some(Arc::clone(&stored)));
        Ok((resource, stored))
    }

    /// Removes an object; none when it is not there.
    pub(super) fn remove(&mut self, resource: Resource, key: &str) -> Option<u64> {
        self.get(resource, key)?;
        self.revision += 1;
        self.record(resource, key.to_owned(), None);
        Some(self.revision)
    }

    /// The object as it is.
    pub(super) fn get(&self, resource: Resource, key: &str) -> Option<&Arc<Stored>> {
        self.tables[&resource].versions.get(key)?.last()?.object.as_ref()
    }

    /// The objects as they were at `revision`, by key, from the first that is not before `start`.
    pub(super) fn list(
        &self,
        resource: Resource,
        revision: u64,
        start: &str,
    ) -> impl Iterator<Item = (&str, &Arc<Stored>)> {
        let from = (Bound::Included(start), Bound::Unbounded);
        self.tables[&resource].versions.range::<str, _>(from).filter_map(move |(key, versions)| {
            let version = versions.iter().rev().find(|version| version.revision <= revision)?;
            Some((key.as_str(), version.object.as_ref()?))
        })
    }

    /// What changed after `revision`, in order.
    pub(super) fn changes_after(&self, resource: Resource, revision: u64) -> impl Iterator<Item = Change> {
        let table = &self.tables[&resource];
        let after = (Bound::Excluded(revision), Bound::Unbounded);
        table.changes.range(after).map(|(revision, key)| {
            let versions = &table.versions[key];
            let at = versions.partition_point(|version| version.revision < *revision);
            let before = at.checked_sub(1).and_then(|before| versions[before].object.clone());
            Change { revision: *revision, before, now: versions[at].object.clone() }
        })
    }

    /// Makes everything before the present too old to begin with. What there is of it stays: watches that are open
    /// may not have got so far, and must miss nothing.
    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
    }

    /// Starts again with the same objects and no history, lower than the history until now began: what is left when
    /// etcd was lost and the objects were written into a new one with their uids.
    ///
    /// Where there is room for it ([`HISTORY`]), no revision is ever used twice. Without, one that a client has seen may come again
    /// before the client does, and means something else then: no client can know what it has missed.
    pub(super) fn restart(&mut self) {
        self.origin = self.origin.saturating_sub(HISTORY);
        self.revision = self.origin;
        for table in self.tables.values_mut() {
            table.changes.clear();
            table.versions.retain(|_, versions| {
                let Some(object) = versions.last().and_then(|version| version.object.clone()) else {
                    return false;
                };
                self.revision += 1;
                let object = Some(Arc::new(object.at(self.revision)));
                *versions = vec![Version { revision: self.revision, object }];
                true
            });
        }
        self.compacted = self.revision;
    }

    fn record(&mut self, resource: Resource, key: String, object: Option<Arc<Stored>>) {
        let table = self.tables.entry(resource).or_default();
        table.changes.insert(self.revision, key.clone());
        table.versions.entry(key).or_default().push(Version { revision: self.revision, object });
    }

    /// Fills in what the server decides. What a new object says of its uid and times is kept, unlike in a real
    /// server: tests need objects of a certain age, and recorded ones.
    fn complete(
        &mut self,
        resource: Resource,
        fields: &mut Map<String, Value>,
        old: Option<&Stored>,
    ) -> anyhow::Result<()> {
        let generation = match old {
            Some(old) if is_same_content(&old.fields, fields) => {
                old.fields["metadata"]["generation"].as_u64()
            }
            Some(old) => old.fields["metadata"]["generation"].as_u64().map(|generation| generation + 1),
            None => Some(1),
        };
        let metadata = &mut fields["metadata"];
        if let Some(old) = old {
            let old = &old.fields["metadata"];
            for decided in ["uid", "creationTimestamp"] {
                let said = &metadata[decided];
                if decided == "uid" && !said.is_null() && *said != old[decided] {
                    bail!("its uid is {}, not {said}: delete it first", old[decided]);
                }
                metadata[decided] = old[decided].clone();
            }
            metadata["resourceVersion"] = old["resourceVersion"].clone();
        } else {
            self.created += 1;
            if metadata["uid"].is_null() {
                metadata["uid"] = format!("00000000-0000-4000-8000-{:012x}", self.created).into();
            }
            if metadata["creationTimestamp"].is_null() {
                let time = jiff::Timestamp::from_second(FIRST_SECOND + i64::from(self.created))?;
                metadata["creationTimestamp"] = time.to_string().into();
            }
        }
        // Of these four only EndpointSlices have one.
        if resource == Resource::EndpointSlices
            && let Some(generation) = generation
            && (old.is_some() || metadata["generation"].is_null())
        {
            metadata["generation"] = generation.into();
        }
        Ok(())
    }
}

/// The table's key of an object.
pub(super) fn key(resource: Resource, namespace: &str, name: &str) -> String {
    if resource.is_namespaced() { format!("{namespace}/{name}") } else { name.to_owned() }
}

fn key_of(resource: Resource, fields: &Map<String, Value>) -> String {
    let text = |field: &str| fields["metadata"][field].as_str().unwrap_or_default();
    key(resource, text("namespace"), text("name"))
}

/// The resource and the fields of a manifest, with a namespace where there must be one.
fn parse(object: &Value) -> anyhow::Result<(Resource, Map<String, Value>)> {
    let fields = object.as_object().context("an object of the API is a JSON object")?;
    let kind = fields.get("kind").and_then(Value::as_str).context("an object of the API has a kind")?;
    let resource =
        Resource::of_kind(kind).with_context(|| format!("the double has no resource for {kind}"))?;
    if let Some(version) = fields.get("apiVersion")
        && version != resource.api_version()
    {
        bail!("the double serves {kind} as {}, not {version}", resource.api_version());
    }
    let mut fields = fields.clone();
    fields.remove("kind");
    fields.remove("apiVersion");
    let metadata = fields.get_mut("metadata").and_then(Value::as_object_mut);
    let metadata = metadata.with_context(|| format!("a {kind} needs metadata"))?;
    if !metadata.get("name").is_some_and(Value::is_string) {
        bail!("a {kind} needs metadata.name");
    }
    if !resource.is_namespaced() {
        metadata.remove("namespace");
    } else if !metadata.get("namespace").is_some_and(Value::is_string) {
        metadata.insert("namespace".to_owned(), "default".into());
    }
    Ok((resource, fields))
}

/// What counts for `generation`: everything but the metadata, and the labels.
fn is_same_content(old: &Map<String, Value>, new: &Map<String, Value>) -> bool {
    fn content(fields: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
        fields.iter().filter(|(name, _)| *name != "metadata")
    }
    content(old).eq(content(new)) && old["metadata"].get("labels") == new["metadata"].get("labels")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(name: &str, color: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"color": color}})
    }

    fn metadata(store: &Store, key: &str) -> Value {
        store.get(Resource::Services, key).unwrap().value(Resource::Services)["metadata"].clone()
    }

    fn names(store: &Store, revision: u64) -> Vec<String> {
        store.list(Resource::Services, revision, "").map(|(key, _)| key.to_owned()).collect()
    }

    #[test]
    fn an_update_keeps_uid_and_time_and_a_new_object_of_that_name_does_not() {
        let mut store = Store::default();
        store.put(&service("a", "red")).unwrap();
        let first = metadata(&store, "default/a");
        store.put(&service("a", "blue")).unwrap();
        let second = metadata(&store, "default/a");
        assert_eq!(
            (&second["uid"], &second["creationTimestamp"]),
            (&first["uid"], &first["creationTimestamp"])
        );
        assert_eq!((&first["resourceVersion"], &second["resourceVersion"]), (&json!("101"), &json!("102")));
        store.remove(Resource::Services, "default/a").unwrap();
        store.put(&service("a", "blue")).unwrap();
        let third = metadata(&store, "default/a");
        assert_ne!(third["uid"], first["uid"]);
        assert_eq!(third["creationTimestamp"], "2026-01-01T00:00:02Z");
        assert_eq!(third["resourceVersion"], "104");
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let mut store = Store::default();
        store.put(&service("a", "red")).unwrap();
        let revision = store.revision();
        store.put(&service("a", "red")).unwrap();
        assert_eq!(store.revision(), revision);
        assert_eq!(store.changes_after(Resource::Services, revision).count(), 0);
    }

    #[test]
    fn a_generation_counts_changes_of_slices_beside_annotations() {
        let slice = |address: &str, annotation: &str| {
            json!({"kind": "EndpointSlice", "metadata": {"name": "a", "annotations": {"x": annotation}},
                "endpoints": [{"addresses": [address]}]})
        };
        let mut store = Store::default();
        let mut generations = Vec::new();
        for (address, annotation) in [("10.0.0.1", "a"), ("10.0.0.2", "a"), ("10.0.0.2", "b")] {
            let (resource, stored) = store.put(&slice(address, annotation)).unwrap();
            generations.push(stored.value(resource)["metadata"]["generation"].clone());
        }
        assert_eq!(generations, [json!(1), json!(2), json!(2)]);
        store.put(&service("a", "red")).unwrap();
        assert_eq!(metadata(&store, "default/a").get("generation"), None, "Services have none");
    }

    #[test]
    fn the_past_can_be_listed() {
        let mut store = Store::default();
        store.put(&service("a", "red")).unwrap();
        store.put(&service("b", "red")).unwrap();
        let past = store.revision();
        store.remove(Resource::Services, "default/a").unwrap();
        store.put(&service("c", "red")).unwrap();
        assert_eq!(names(&store, past), ["default/a", "default/b"]);
        assert_eq!(names(&store, store.revision()), ["default/b", "default/c"]);
        assert_eq!(store.changes_after(Resource::Services, past).count(), 2);
    }

    #[test]
    fn a_change_knows_what_was_before_and_a_compaction_takes_none_away() {
        let mut store = Store::default();
        store.put(&service("a", "red")).unwrap();
        let start = store.revision();
        store.put(&service("a", "blue")).unwrap();
        store.remove(Resource::Services, "default/a").unwrap();
        store.compact();
        assert_eq!(store.compacted(), start + 2);
        let changes: Vec<_> = store
            .changes_after(Resource::Services, start)
            .map(|change| {
                let color = |object: Option<Arc<Stored>>| {
                    object.map(|object| object.fields["spec"]["color"].as_str().unwrap().to_owned())
                };
                (change.revision, color(change.before), color(change.now))
            })
            .collect();
        let (red, blue) = (Some("red".to_owned()), Some("blue".to_owned()));
        assert_eq!(changes, [(start + 1, red, blue.clone()), (start + 2, blue, None)]);
    }

    #[test]
    fn a_restart_goes_back_to_lower_revisions_with_the_same_objects() {
        let mut store = Store::default();
        for name in ["b", "a", "gone"] {
            store.put(&service(name, "red")).unwrap();
        }
        store.remove(Resource::Services, "default/gone").unwrap();
        let (before, uid) = (store.revision(), metadata(&store, "default/b")["uid"].clone());
        store.restart();
        assert!(store.revision() < before);
        assert_eq!(names(&store, store.revision()), ["default/a", "default/b"]);
        assert_eq!(metadata(&store, "default/b")["uid"], uid);
        assert_eq!(metadata(&store, "default/b")["resourceVersion"], "2");
    }

    #[test]
    fn a_restart_uses_no_revision_again_where_there_is_room() {
        let mut store = Store::default();
        store.skip_to(2 * HISTORY).unwrap();
        for origin in [HISTORY, 0] {
            store.put(&service("a", &format!("after {origin}"))).unwrap();
            store.restart();
            assert_eq!(metadata(&store, "default/a")["resourceVersion"], (origin + 1).to_string());
        }
    }

    #[test]
    fn what_is_no_object_is_refused_by_name() {
        let mut store = Store::default();
        for (object, complaint) in [
            (json!([]), "JSON object"),
            (json!({"kind": "Pod", "metadata": {"name": "a"}}), "Pod"),
            (json!({"kind": "Service", "apiVersion": "v2", "metadata": {"name": "a"}}), "v2"),
            (json!({"kind": "Service", "metadata": {}}), "metadata.name"),
        ] {
            let error = store.put(&object).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
        store.put(&service("a", "red")).unwrap();
        let other = json!({"kind": "Service", "metadata": {"name": "a", "uid": "x"}});
        let error = format!("{:#}", store.put(&other).unwrap_err());
        assert!(error.contains("default/a") && error.contains("delete it first"), "{error}");
    }
}
