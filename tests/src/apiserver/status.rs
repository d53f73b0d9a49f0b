//! The answers of the API server that are no objects: each is a `Status`, with the message of the real server.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{fault::Verb, resource::Resource};

/// Who the token belongs to.
pub(super) const USER: &str = "system:serviceaccount:proxier:proxier";

/// A `Status` of failure.
#[derive(Clone, Debug)]
pub(super) struct Status {
    pub(super) code: StatusCode,
    pub(super) retry_after: Option<u32>,
    pub(super) body: Value,
}

impl Status {
    fn new(code: StatusCode, reason: &str, message: &str, details: Value) -> Self {
        let mut body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "code": code.as_u16(),
        });
        // Go leaves out what is empty.
        if !reason.is_empty() {
            body["reason"] = reason.into();
        }
        if !details.is_null() {
            body["details"] = details;
        }
        Self { code, retry_after: None, body }
    }

    fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    /// As a line of a watch.
    pub(super) fn event(&self) -> String {
        format!("{}\n", json!({"type": "ERROR", "object": self.body}))
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized", Value::Null)
    }

    pub(super) fn forbidden(
        user: &str,
        resource: Resource,
        verb: Verb,
        namespace: Option<&str>,
        name: &str,
    ) -> Self {
        let scope = namespace.map_or_else(
            || "at the cluster scope".to_owned(),
            |namespace| format!("in the namespace \"{namespace}\""),
        );
        let (plural, group, qualified) = (resource.plural(), resource.group(), resource.qualified());
        let object = if name.is_empty() { qualified } else { format!("{qualified} \"{name}\"") };
        let verb = verb.of_authorization();
        let message = format!(
            "{object} is forbidden: User \"{user}\" cannot {verb} resource \"{plural}\" in API group \"{group}\" {scope}"
        );
        Self::new(StatusCode::FORBIDDEN, "Forbidden", &message, details(resource, name))
    }

    pub(super) fn bad_request(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message, Value::Null)
    }

    pub(super) fn unknown_resource() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFound",
            "the server could not find the requested resource",
            json!({}),
        )
    }

    pub(super) fn not_found(resource: Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", resource.qualified());
        Self::new(StatusCode::NOT_FOUND, "NotFound", &message, details(resource, name))
    }

    pub(super) fn already_exists(resource: Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", resource.qualified());
        Self::new(StatusCode::CONFLICT, "AlreadyExists", &message, details(resource, name))
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
            json!({}),
        )
    }

    /// A page token whose revision is compacted, with another that goes on inconsistently.
    pub(super) fn expired_continue(again: &str) -> Self {
        let mut status = Self::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new \
             list without the continue parameter, or use the continue token in this response to retrieve the \
             remainder of the results. Continuing with the provided token results in an inconsistent list - \
             objects that were created, modified, or deleted between the time the first chunk was returned and now \
             may show up in the list.",
        );
        status.body["metadata"]["continue"] = again.into();
        status
    }

    pub(super) fn expired_list() -> Self {
        Self::expired("The resourceVersion for the provided list is too old.")
    }

    pub(super) fn too_old(wanted: u64, oldest: u64) -> Self {
        Self::expired(&format!("too old resource version: {wanted} ({oldest})"))
    }

    fn expired(message: &str) -> Self {
        Self::new(StatusCode::GONE, "Expired", message, Value::Null)
    }

    pub(super) fn too_large(wanted: u64, current: u64) -> Self {
        let message = format!("Timeout: Too large resource version: {wanted}, current: {current}");
        let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        let details = json!({"causes": [cause], "retryAfterSeconds": 1});
        Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message, details).retry_after(1)
    }

    pub(super) fn future_revision() -> Self {
        Self::internal(
            "rpc error: code = OutOfRange desc = etcdserver: mvcc: required revision is a future revision",
        )
    }

    /// A field of the list options that does not go with another.
    pub(super) fn invalid_option(field: &str, reason: &str) -> Self {
        let message = format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: Forbidden: {reason}");
        let cause = json!({
            "reason": "FieldValueForbidden", "message": format!("Forbidden: {reason}"), "field": field,
        });
        let details = json!({"group": "meta.k8s.io", "kind": "ListOptions", "causes": [cause]});
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", &message, details)
    }

    /// What a storage that cannot report its progress says to `sendInitialEvents`.
    pub(super) fn no_watch_list() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalError",
            "a watch stream was requested by the client but the required storage feature RequestWatchProgress is \
             disabled",
            Value::Null,
        )
    }

    /// An error of the storage, passed on without a reason.
    pub(super) fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "", message, Value::Null)
    }

    pub(super) fn unavailable() -> Self {
        let message = "apiserver is shutting down";
        let details = json!({"retryAfterSeconds": 1});
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message, details).retry_after(1)
    }
}

fn details(resource: Resource, name: &str) -> Value {
    let mut details = json!({"kind": resource.plural()});
    for (field, value) in [("name", name), ("group", resource.group())] {
        if !value.is_empty() {
            details[field] = value.into();
        }
    }
    details
}
