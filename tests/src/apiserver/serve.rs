//! Requests: which resource, who asks, what is answered.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Query, State as Extract},
    http::{HeaderMap, Method, StatusCode, Uri, header, request::Parts as Head},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    answer::{self, Target, faulty},
    fault::{Moment, Verb},
    resource::Resource,
    selector::Selector,
    state::{Request, Shared, State},
    status::{Status, USER},
    store::{Stored, key},
    watch::{Options, Watch},
};

/// What clients may send: an Event has some kilobytes.
const BODY_LIMIT: usize = 1 << 20;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    // One handler, as also a request for nothing is recorded, and who asks comes before what for.
    Router::new().fallback(handle).with_state(shared)
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path<'a> {
    Version,
    Objects {
        resource: Resource,
        namespace: Option<&'a str>,
        name: &'a str,
    },
    /// A group that is there, a resource that is not.
    UnknownResource,
    Unknown,
}

impl<'a> Path<'a> {
    fn parse(path: &'a str) -> Self {
        let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (api_version, rest) = match &segments[..] {
            ["version"] => return Self::Version,
            ["api", version, rest @ ..] => ((*version).to_owned(), rest),
            ["apis", group, version, rest @ ..] => (format!("{group}/{version}"), rest),
            _ => return Self::Unknown,
        };
        let (namespace, plural, name) = match *rest {
            ["namespaces", namespace, plural] => (Some(namespace), plural, ""),
            ["namespaces", namespace, plural, name] => (Some(namespace), plural, name),
            [plural] => (None, plural, ""),
            [plural, name] => (None, plural, name),
            _ => (None, "", ""),
        };
        let fits = |resource: &Resource| {
            if resource.is_namespaced() {
                namespace.is_some() || name.is_empty()
            } else {
                namespace.is_none()
            }
        };
        if let Some(resource) = Resource::at(&api_version, plural).filter(fits) {
            Self::Objects { resource, namespace, name }
        } else if Resource::ALL.iter().any(|resource| resource.api_version() == api_version) {
            Self::UnknownResource
        } else {
            Self::Unknown
        }
    }
}

/// The parameters of lists and watches.
#[derive(Debug, Default)]
struct Parameters(BTreeMap<String, String>);

impl Parameters {
    fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn is_true(&self, name: &str) -> bool {
        matches!(self.get(name), "1" | "t" | "true" | "True" | "TRUE")
    }

    fn number(&self, name: &str) -> Result<u64, Status> {
        match self.get(name) {
            "" => Ok(0),
            text => text.parse().map_err(|_| {
                Status::bad_request(&format!(
                    "invalid query parameter {name}: strconv.ParseUint: parsing \"{text}\": invalid syntax"
                ))
            }),
        }
    }
}

/// A page token, as the real server spells it.
#[derive(Debug, Serialize, Deserialize)]
struct Continue {
    v: String,
    /// The revision of the whole list; -1 once it is compacted.
    rv: i64,
    /// The first key that may be on the page.
    start: String,
}

impl Continue {
    fn token(revision: i64, start: &str) -> String {
        let token = Self { v: "meta.k8s.io/v1".to_owned(), rv: revision, start: start.to_owned() };
        // In the order of the fields, as Go does; that cannot fail for strings and numbers.
        URL_SAFE_NO_PAD.encode(serde_json::to_string(&token).unwrap_or_default())
    }

    fn parse(token: &str) -> Result<Self, Status> {
        let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('='));
        bytes
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .ok_or_else(|| Status::bad_request("continue key is not valid: illegal base64 data"))
    }
}

async fn handle(Extract(shared): Extract<Arc<Shared>>, request: axum::extract::Request) -> Response {
    let (head, body) = request.into_parts();
    let index = record(&shared, &head);
    let answered = match to_bytes(body, BODY_LIMIT).await {
        Ok(body) => respond(&shared, &head, &body),
        Err(_) => Some(answer::status(&Status::bad_request("the body cannot be read"))),
    };
    let Some(response) = answered else { return std::future::pending().await };
    shared.lock().requests[index].status = Some(response.status().as_u16());
    response
}

fn parameters(uri: &Uri) -> Vec<(String, String)> {
    Query::<Vec<(String, String)>>::try_from_uri(uri).map(|query| query.0).unwrap_or_default()
}

fn verb(method: &Method, name: &str, parameters: &Parameters) -> Verb {
    match *method {
        Method::GET if parameters.is_true("watch") => Verb::Watch,
        Method::GET if !name.is_empty() => Verb::Get,
        Method::GET if !parameters.get("continue").is_empty() => Verb::Continue,
        Method::GET => Verb::List,
        _ => Verb::Write,
    }
}

/// Where in the log the request is.
fn record(shared: &Shared, head: &Head) -> usize {
    let query = parameters(&head.uri);
    let known = Parameters(query.iter().cloned().collect());
    let (resource, name) = match Path::parse(head.uri.path()) {
        Path::Objects { resource, name, .. } => (Some(resource), name),
        _ => (None, ""),
    };
    let request = Request {
        at: std::time::Instant::now(),
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        verb: verb(&head.method, name, &known),
        query,
        resource,
        status: None,
    };
    let mut state = shared.lock();
    state.requests.push(request);
    state.requests.len() - 1
}

/// The user that the token names; no token is nobody, and a wrong one an error.
fn authenticate(state: &State, headers: &HeaderMap) -> Result<Option<&'static str>, Status> {
    let Some(authorization) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let token = authorization.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    if token == Some(&state.token) { Ok(Some(USER)) } else { Err(Status::unauthorized()) }
}

/// None: there is no answer.
fn respond(shared: &Arc<Shared>, head: &Head, body: &Bytes) -> Option<Response> {
    let parameters = Parameters(parameters(&head.uri).into_iter().collect());
    let user = authenticate(&shared.lock(), &head.headers);
    let user = match user {
        Ok(user) => user,
        Err(status) => return Some(answer::status(&status)),
    };
    let (resource, namespace, name) = match Path::parse(head.uri.path()) {
        // Anybody may ask for it.
        Path::Version => return Some(answer::json(StatusCode::OK, version().to_string())),
        Path::Unknown => return Some(answer::page_not_found()),
        Path::UnknownResource => return Some(answer::status(&Status::unknown_resource())),
        Path::Objects { resource, namespace, name } => (resource, namespace, name),
    };
    let verb = verb(&head.method, name, &parameters);
    if user.is_none() {
        let status = Status::forbidden("system:anonymous", resource, verb, namespace, name);
        return Some(answer::status(&status));
    }
    let fault = shared.lock().faults.take(resource, verb, Moment::Request, &[]);
    let right = match head.method {
        Method::GET if verb == Verb::Watch && fault.is_none() => {
            return Some(match watch_options(resource, namespace, &parameters) {
                Ok(options) => {
                    let watch = Watch::open(shared, options);
                    answer::json_stream(Body::from_stream(stream::unfold(watch, async |mut watch| {
                        let bytes: io::Result<Bytes> = watch.next().await?;
                        Some((bytes, watch))
                    })))
                }
                Err(status) => answer::status(&status),
            });
        }
        Method::GET if verb == Verb::Watch => Ok((StatusCode::OK, String::new())),
        Method::GET if name.is_empty() => {
            list(&shared.lock(), resource, namespace, &parameters).map(|list| (StatusCode::OK, list))
        }
        Method::GET => get(&shared.lock(), resource, namespace, name),
        // A write that fails has not happened.
        _ if fault.is_some() => Ok((StatusCode::OK, "{}".to_owned())),
        Method::POST if name.is_empty() => create(shared, resource, namespace, body),
        Method::PATCH if !name.is_empty() => patch(shared, resource, namespace, name, body, &head.headers),
        _ => Err(Status::method_not_allowed()),
    };
    match (fault, right) {
        (Some((_, kind)), right) => {
            let revision = shared.lock().store.revision();
            let again =
                Continue::parse(parameters.get("continue")).map(|token| Continue::token(-1, &token.start));
            let target = Target {
                resource,
                verb,
                namespace,
                name,
                again: &again.unwrap_or_default(),
                wanted: parameters.number("resourceVersion").unwrap_or_default(),
                revision,
            };
            let (code, body) = right.unwrap_or_else(|status| (status.code, status.body.to_string()));
            faulty(kind, &target, code, body)
        }
        (None, Ok((code, body))) => Some(answer::json(code, body)),
        (None, Err(status)) => Some(answer::status(&status)),
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "emulationMajor": "1", "emulationMinor": "36",
        "minCompatibilityMajor": "1", "minCompatibilityMinor": "35", "gitVersion": "v1.36.2",
        "gitCommit": "0000000000000000000000000000000000000000", "gitTreeState": "clean",
        "buildDate": "2026-01-01T00:00:00Z", "goVersion": "go1.26", "compiler": "gc",
        "platform": "linux/amd64",
    })
}

type Answer = Result<(StatusCode, String), Status>;

fn get(state: &State, resource: Resource, namespace: Option<&str>, name: &str) -> Answer {
    let key = key(resource, namespace.unwrap_or_default(), name);
    let object = state.store.get(resource, &key).ok_or_else(|| Status::not_found(resource, name))?;
    Ok((StatusCode::OK, object.typed_json(resource)))
}

fn selector(namespace: Option<&str>, parameters: &Parameters) -> Result<Selector, Status> {
    Selector::parse(namespace, parameters.get("labelSelector"), parameters.get("fieldSelector"))
        .map_err(|message| Status::bad_request(&message))
}

fn watch_options(
    resource: Resource,
    namespace: Option<&str>,
    parameters: &Parameters,
) -> Result<Options, Status> {
    let wants_initial_events =
        match (parameters.get("sendInitialEvents"), parameters.get("resourceVersionMatch")) {
            ("", "") => false,
            ("", _) => {
                let reason =
                    "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
                return Err(Status::invalid_option("resourceVersionMatch", reason));
            }
            (_, "NotOlderThan") => true,
            _ => {
                let reason = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                return Err(Status::invalid_option("resourceVersionMatch", reason));
            }
        };
    Ok(Options {
        resource,
        selector: selector(namespace, parameters)?,
        from: parameters.number("resourceVersion")?,
        bookmarks: parameters.is_true("allowWatchBookmarks"),
        timeout: Some(parameters.number("timeoutSeconds")?)
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs),
        wants_initial_events,
    })
}

/// From which revision a list is, and from which key on.
struct Start {
    revision: u64,
    key: String,
}

/// Where a list begins, by the rules for `resourceVersion`, `resourceVersionMatch` and `continue`. `prefix` is what
/// the keys of the request's namespace begin with.
fn start(state: &State, prefix: &str, parameters: &Parameters, limit: usize) -> Result<Start, Status> {
    let (oldest, present) = (state.store.compacted(), state.store.revision());
    let version = parameters.number("resourceVersion")?;
    let matching = parameters.get("resourceVersionMatch");
    if !parameters.get("sendInitialEvents").is_empty() {
        let reason = "sendInitialEvents is forbidden for list";
        return Err(Status::invalid_option("sendInitialEvents", reason));
    }
    let token = parameters.get("continue");
    if !token.is_empty() {
        if !matching.is_empty() {
            let reason = "resourceVersionMatch is forbidden when continue is provided";
            return Err(Status::invalid_option("resourceVersionMatch", reason));
        }
        if version != 0 {
            let message = "specifying resource version is not allowed when using continue";
            return Err(Status::bad_request(message));
        }
        let token = Continue::parse(token)?;
        let key = format!("{prefix}{}", token.start);
        return match u64::try_from(token.rv) {
            Err(_) => Ok(Start { revision: present, key }),
            Ok(revision) if revision < oldest => {
                Err(Status::expired_continue(&Continue::token(-1, &token.start)))
            }
            Ok(revision) if revision > present => Err(Status::future_revision()),
            Ok(revision) => Ok(Start { revision, key }),
        };
    }
    if !matching.is_empty() && parameters.get("resourceVersion").is_empty() {
        let reason = "resourceVersionMatch is forbidden unless resourceVersion is provided";
        return Err(Status::invalid_option("resourceVersionMatch", reason));
    }
    if version > present {
        return Err(Status::too_large(version, present));
    }
    // A limit made it exact before there was a parameter to say so.
    let exact = matching == "Exact" || (matching.is_empty() && version > 0 && limit > 0);
    if exact && version < oldest {
        return Err(Status::expired_list());
    }
    Ok(Start { revision: if exact { version } else { present }, key: prefix.to_owned() })
}

fn list(
    state: &State,
    resource: Resource,
    namespace: Option<&str>,
    parameters: &Parameters,
) -> Result<String, Status> {
    let selector = selector(namespace, parameters)?;
    let limit = usize::try_from(parameters.number("limit")?).unwrap_or(usize::MAX);
    // The watch cache, which answers for "any" revision, has no pages.
    let limit = if parameters.get("resourceVersion") == "0" { 0 } else { limit };
    let prefix = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
    let Start { revision, key } = start(state, &prefix, parameters, limit)?;

    let objects = state.store.list(resource, revision, &key);
    let mut objects = objects.take_while(|(key, _)| key.starts_with(&prefix)).peekable();
    let mut items: Vec<&Stored> = Vec::new();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    while let Some((key, object)) = objects.next() {
        if selector.selects(object) {
            items.push(object);
        }
        // As in the real server, also when nothing of what follows is selected: the last page can be empty.
        if limit > 0 && items.len() == limit && objects.peek().is_some() {
            let after = format!("{}\0", &key[prefix.len()..]);
            metadata["continue"] =
                Continue::token(i64::try_from(revision).unwrap_or(i64::MAX), &after).into();
            if selector.is_everything() {
                metadata["remainingItemCount"] = objects.count().into();
            }
            break;
        }
    }
    let (kind, api_version) = (resource.kind(), resource.api_version());
    let length: usize = items.iter().map(|item| item.json().len() + 1).sum();
    let mut list =
        format!(r#"{{"kind":"{kind}List","apiVersion":"{api_version}","metadata":{metadata},"items":["#);
    list.reserve(length + 2);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            list.push(',');
        }
        list.push_str(item.json());
    }
    list.push_str("]}");
    Ok(list)
}

/// Objects that clients write: Events only.
fn writable(resource: Resource, verb: &str, namespace: Option<&str>, name: &str) -> Result<String, Status> {
    let namespace = namespace.filter(|_| resource == Resource::Events);
    namespace.map(str::to_owned).ok_or_else(|| {
        let mut status = Status::forbidden(USER, resource, Verb::Write, namespace, name);
        if verb != "create"
            && let Some(message) = status.body["message"].as_str()
        {
            status.body["message"] = message.replacen("cannot create", &format!("cannot {verb}"), 1).into();
        }
        status
    })
}

fn create(shared: &Shared, resource: Resource, namespace: Option<&str>, body: &[u8]) -> Answer {
    let namespace = writable(resource, "create", namespace, "")?;
    let mut object = parse(resource, body)?;
    shared.change(|state| {
        let metadata = &mut object["metadata"];
        metadata["namespace"] = namespace.as_str().into();
        if let (None, Some(prefix)) = (metadata["name"].as_str(), metadata["generateName"].as_str()) {
            metadata["name"] = format!("{prefix}{}", state.store.revision()).into();
        }
        let name = metadata["name"].as_str().unwrap_or_default().to_owned();
        if state.store.get(resource, &key(resource, &namespace, &name)).is_some() {
            return Err(Status::already_exists(resource, &name));
        }
        put(state, resource, &object, StatusCode::CREATED)
    })
}

fn patch(
    shared: &Shared,
    resource: Resource,
    namespace: Option<&str>,
    name: &str,
    body: &[u8],
    headers: &HeaderMap,
) -> Answer {
    let namespace = writable(resource, "patch", namespace, name)?;
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if !content_type.is_some_and(|content_type| content_type.starts_with("application/merge-patch+json")) {
        let message = "the double knows application/merge-patch+json only";
        return Err(Status::bad_request(message));
    }
    let patch: Value = serde_json::from_slice(body)
        .map_err(|error| Status::bad_request(&format!("error decoding patch: {error}")))?;
    shared.change(|state| {
        let old = state.store.get(resource, &key(resource, &namespace, name));
        let old = old.ok_or_else(|| Status::not_found(resource, name))?;
        let mut object = old.value(resource);
        merge(&mut object, &patch);
        put(state, resource, &object, StatusCode::OK)
    })
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        if value.is_null() {
            if let Some(target) = target.as_object_mut() {
                target.remove(name);
            }
        } else {
            merge(&mut target[name], value);
        }
    }
}

fn parse(resource: Resource, body: &[u8]) -> Result<Value, Status> {
    let mut object: Value = serde_json::from_slice(body)
        .map_err(|error| Status::bad_request(&format!("the object provided is unrecognized: {error}")))?;
    if !object["metadata"].is_object() {
        return Err(Status::bad_request("the object provided has no metadata"));
    }
    // Clients may leave out what the path says.
    object["kind"] = resource.kind().into();
    object["apiVersion"] = resource.api_version().into();
    Ok(object)
}

fn put(state: &mut State, resource: Resource, object: &Value, code: StatusCode) -> Answer {
    let (_, stored) = state.store.put(object).map_err(|error| Status::bad_request(&format!("{error:#}")))?;
    Ok((code, stored.typed_json(resource)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_resources_with_and_without_namespace() {
        let objects = |resource, namespace, name| Path::Objects { resource, namespace, name };
        for (path, expected) in [
            ("/api/v1/services", objects(Resource::Services, None, "")),
            ("/api/v1/namespaces/shop/services", objects(Resource::Services, Some("shop"), "")),
            ("/api/v1/namespaces/shop/services/web", objects(Resource::Services, Some("shop"), "web")),
            ("/api/v1/nodes/node1", objects(Resource::Nodes, None, "node1")),
            ("/apis/discovery.k8s.io/v1/endpointslices", objects(Resource::EndpointSlices, None, "")),
            ("/version", Path::Version),
            ("/api/v1/services/web", Path::UnknownResource),
            ("/api/v1/namespaces/shop/nodes", Path::UnknownResource),
            ("/api/v1/pods", Path::UnknownResource),
            ("/apis/discovery.k8s.io/v1/services", Path::UnknownResource),
            ("/apis/discovery.k8s.io/v1beta1/endpointslices", Path::Unknown),
            ("/healthz", Path::Unknown),
            ("/", Path::Unknown),
        ] {
            assert_eq!(Path::parse(path), expected, "{path}");
        }
    }

    #[test]
    fn a_page_token_is_spelled_as_the_real_server_does() {
        let recorded = "eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6NjUwLCJzdGFydCI6ImRlZmF1bHQva3BuZy1leGFtcGxlLWxrbWRqXHUwMDAwIn0";
        let token = Continue::parse(recorded).unwrap();
        assert_eq!((token.rv, token.start.as_str()), (650, "default/kpng-example-lkmdj\0"));
        assert_eq!(Continue::token(650, &token.start), recorded);
        assert!(Continue::parse("nonsense").is_err());
    }

    #[test]
    fn a_merge_patch_adds_replaces_and_removes() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "list": [1, 2]});
        merge(&mut target, &json!({"a": {"b": null, "d": {"e": 3}}, "list": [4]}));
        assert_eq!(target, json!({"a": {"c": 2, "d": {"e": 3}}, "list": [4]}));
    }
}
