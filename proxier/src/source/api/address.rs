//! Where a localv1 server is: what `--api` says.

use std::{fmt, path::PathBuf, str::FromStr};

use http::{Uri, uri::Authority};

/// The address of a localv1 server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host, by address or name, and a port.
    Tcp(Authority),
    /// A unix socket.
    Unix(PathBuf),
}

/// The longest path that the kernel takes for a socket (`sun_path`, with its nought).
const MAX_SOCKET_PATH: usize = 107;

const FORMS: &str = "write host:port, tcp://host:port or unix:///path";

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {FORMS}")]
pub struct NotAnAddress {
    reason: &'static str,
}

impl FromStr for Address {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let not = |reason| Err(NotAnAddress { reason });
        let text = text.trim();
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                _ if !path.starts_with('/') || path == "/" => not("the path of a socket begins at the root"),
                _ if path.len() > MAX_SOCKET_PATH || path.contains('\0') => {
                    not("the path of a socket has no more than 107 bytes")
                }
                path => Ok(Self::Unix(path.into())),
            };
        }
        let text = text.strip_prefix("tcp://").unwrap_or(text);
        if text.contains("://") {
            return not("only tcp:// and unix:// are known");
        }
        // `::1:12090` may be an address without a port.
        if text.matches(':').count() > 1 && !text.starts_with('[') {
            return not("an IPv6 address stands in brackets");
        }
        match text.parse::<Authority>() {
            Ok(authority) if authority.as_str().contains('@') => not("no user is needed"),
            Ok(authority) if authority.host().is_empty() => not("there is no host"),
            Ok(authority) if authority.port_u16().is_none_or(|port| port == 0) => not("there is no port"),
            Ok(authority) => Ok(Self::Tcp(authority)),
            Err(_) => not("not an address"),
        }
    }
}

/// As it can be given.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(authority) => write!(f, "{authority}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl Address {
    /// What a request names as its server: to a socket's owner, who it is does not matter.
    pub(super) fn uri(&self, scheme: &str) -> Uri {
        let authority = match self {
            Self::Tcp(authority) => authority.clone(),
            Self::Unix(_) => Authority::from_static("localhost"),
        };
        Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query("/")
            .build()
            .unwrap_or_else(|error| unreachable!("an authority and constants are a URI: {error}"))
    }

    /// What the server's certificate is to be for.
    pub(super) fn host(&self) -> &str {
        match self {
            Self::Tcp(authority) => authority.host().trim_start_matches('[').trim_end_matches(']'),
            Self::Unix(_) => "localhost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_in_every_form_that_it_is_written_in() {
        for (text, is, uri) in [
            ("127.0.0.1:12090", "127.0.0.1:12090", "http://127.0.0.1:12090/"),
            ("tcp://127.0.0.1:12090", "127.0.0.1:12090", "http://127.0.0.1:12090/"),
            (" kpng.kube-system:12090 ", "kpng.kube-system:12090", "http://kpng.kube-system:12090/"),
            ("[::1]:12090", "[::1]:12090", "http://[::1]:12090/"),
            ("unix:///run/proxier/api.sock", "unix:///run/proxier/api.sock", "http://localhost/"),
            ("unix:/run/proxier/api.sock", "unix:///run/proxier/api.sock", "http://localhost/"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.to_string().as_str(), address.uri("http").to_string().as_str()), (is, uri));
            assert_eq!(is.parse(), Ok(address));
        }
    }

    #[test]
    fn what_is_no_address_says_how_to_write_one() {
        let long = format!("unix:///{}", "x".repeat(MAX_SOCKET_PATH));
        for (text, reason) in [
            ("", "not an address"),
            ("127.0.0.1", "there is no port"),
            ("127.0.0.1:0", "there is no port"),
            ("127.0.0.1:99999", "there is no port"),
            (":12090", "there is no host"),
            ("::1:12090", "an IPv6 address stands in brackets"),
            ("http://127.0.0.1:12090", "only tcp:// and unix:// are known"),
            ("me@127.0.0.1:12090", "no user is needed"),
            ("127.0.0.1:12090/path", "not an address"),
            ("unix://run/api.sock", "the path of a socket begins at the root"),
            ("unix:///", "the path of a socket begins at the root"),
            (&long, "the path of a socket has no more than 107 bytes"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!("{reason}: write host:port, tcp://host:port or unix:///path"),
                "{text:?}"
            );
        }
    }
}
