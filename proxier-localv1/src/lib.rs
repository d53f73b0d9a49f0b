//! The API between kpng's controller and its backends (package `localv1`): what both ends say, and where a value lies. The
//! messages, the client and the server are made of `proto/localv1.proto`. Not for what is in them.
//!
//! A backend of its own needs nothing else of proxier: ask for a batch with a [`WatchReq`], keep the values of
//! [`Set::ServicesSet`] and [`Set::EndpointsSet`] by their paths, act at [`op_item::Op::Sync`], ask for the next.

#[allow(clippy::all, missing_docs, unreachable_pub, reason = "generated")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/localv1.rs"));
}

pub use self::generated::*;

/// The definition in protobuf's own form, a `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/localv1.binpb"));

/// Where a Service lies: `namespace/name`.
#[must_use]
pub fn service_path(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

/// Where an endpoint of a Service lies: `namespace/name/key`.
#[must_use]
pub fn endpoint_path(namespace: &str, name: &str, key: &str) -> String {
    format!("{namespace}/{name}/{key}")
}

/// What a path names: a Service, or one of its endpoints if there is a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path<'a> {
    /// The Service's namespace.
    pub namespace: &'a str,
    /// The Service's name.
    pub name: &'a str,
    /// The endpoint's key.
    pub key: Option<&'a str>,
}

impl<'a> Path<'a> {
    /// Reads a path.
    ///
    /// # Errors
    ///
    /// A part is missing or empty, or has blanks or control characters.
    pub fn parse(path: &'a str) -> Result<Self, NotAPath> {
        // Nothing says that a key has no slash.
        let mut parts = path.splitn(3, '/');
        let (Some(namespace), Some(name), key) = (parts.next(), parts.next(), parts.next()) else {
            return Err(NotAPath);
        };
        // They are shown to people, line by line.
        let is_odd = path.contains(|c: char| c.is_control() || c.is_whitespace());
        if namespace.is_empty() || name.is_empty() || key == Some("") || is_odd {
            return Err(NotAPath);
        }
        Ok(Self { namespace, name, key })
    }
}

/// A path that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is no path of this API: namespace/name for a Service, namespace/name/key for an endpoint")]
pub struct NotAPath;

/// Whether Go's JSON would leave it out.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_as_it_is_written() {
        let service = Path { namespace: "default", name: "web", key: None };
        assert_eq!(Path::parse(&service_path("default", "web")), Ok(service));
        for key in ["alpine-1.v4", "1100::202", "a/b"] {
            let path = endpoint_path("default", "web", key);
            assert_eq!(Path::parse(&path), Ok(Path { key: Some(key), ..service }));
        }
    }

    #[test]
    fn a_path_without_a_part_is_none() {
        for path in
            ["", "/", "web", "default/", "/web", "default/web/", "//x", "a/b c", "a/b/c\nd", "a\u{1b}/b"]
        {
            assert_eq!(Path::parse(path), Err(NotAPath), "{path:?}");
        }
    }

    #[test]
    fn a_message_is_printed_as_go_prints_it() {
        let endpoint = Endpoint {
            ips: Some(IpSet { v4: Vec::new(), v6: vec!["1100::202".to_owned()] }),
            port_overrides: vec![PortName { name: String::new(), port: 6000 }],
            scopes: Some(EndpointScopes { internal: true, external: false }),
            ..Endpoint::default()
        };
        let text = serde_json::to_string(&endpoint).unwrap();
        // An empty message is not no message.
        let printed =
            r#"{"IPs":{"V6":["1100::202"]},"PortOverrides":[{"Port":6000}],"Scopes":{"Internal":true}}"#;
        assert_eq!(text, printed);
        let nothing = Endpoint { ips: Some(IpSet::default()), ..Endpoint::default() };
        assert_eq!(serde_json::to_string(&nothing).unwrap(), r#"{"IPs":{}}"#);
    }
}
