//! What went wrong with a localv1 server, in words that an operator can act on; and what to do about it.

use std::{error::Error, io, time::Duration};

use tokio_rustls::rustls;
use tonic::{Code, Status};

use super::{Address, MAX_MESSAGE, connection::Cause, import::TooMuch};
use crate::source::words::{causes, chain, quote};

/// An attempt to follow a server that has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// What it is, in a word, for metrics.
    pub(super) kind: &'static str,
    /// The reason and the next step; continues a sentence that began with the server's name.
    pub(super) reason: String,
    /// Whether the server thinks that it is asked too often whether it is alive.
    pub(super) too_many_pings: bool,
}

const CHECK_WAY: &str = "check the address, and the routes and firewalls on the way";
const CHECK_SERVER: &str = "check that it runs, and what proxies are on the way";
const CHECK_IDENTITY: &str = "check --api-cert and --api-key, and whom the server trusts";
const NO_LOCALV1: &str = "check --api: that of `proxier to-api`, or of kpng's to-api";

impl Failure {
    fn new(kind: &'static str, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), too_many_pings: false }
    }

    /// The files for TLS are of no use: `why` is in words already.
    pub(super) fn credentials(why: &str) -> Self {
        Self::new("credentials", format!("is not asked: {why}"))
    }

    /// It has taken longer than `limit` to connect.
    pub(super) fn slow(limit: Duration) -> Self {
        let limit = limit.as_secs_f32();
        Self::new(
            "connection",
            format!("cannot be reached: it does not answer within {limit} s; {CHECK_WAY}"),
        )
    }

    /// The server has ended a watch as if all were well.
    pub(super) fn ended() -> Self {
        Self::new("connection", format!("has ended the watch; asked again; {CHECK_SERVER}"))
    }

    /// The server has told more than is held.
    pub(super) fn too_much(error: TooMuch) -> Self {
        Self::new("too-large", format!("{error}, which is no state of a node; {NO_LOCALV1}"))
    }

    /// No connection could be made. The outer errors only say that something failed, the innermost says what.
    pub(super) fn connecting(error: &(dyn Error + 'static), address: &Address) -> Self {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable,
            NetworkUnreachable, NotFound, PermissionDenied, TimedOut, UnexpectedEof,
        };
        if let Some(tls) = tls(error) {
            return Self::new("connection", format!("cannot be reached: {tls}"));
        }
        let cause = causes(error).last().map(ToString::to_string).unwrap_or_default();
        let cause = quote(&cause);
        let is = |kinds: &[io::ErrorKind]| is_any(error, kinds);
        let nobody = "nothing listens there: check --api, and that the server runs";
        let (cause, next_step) = match address {
            Address::Tcp(_) if is(&[ConnectionRefused]) => (cause, nobody),
            Address::Unix(_) if is(&[ConnectionRefused, NotFound]) => (cause, nobody),
            Address::Unix(_) if is(&[PermissionDenied]) => {
                (cause, "run as a user or in a group that may use the socket")
            }
            _ if is(&[TimedOut]) => ("it does not answer".to_owned(), CHECK_WAY),
            _ if is(&[HostUnreachable, NetworkUnreachable]) => (cause, CHECK_WAY),
            _ if is(&[ConnectionReset, ConnectionAborted, BrokenPipe, UnexpectedEof]) => {
                (cause, CHECK_SERVER)
            }
            Address::Unix(_) => (cause, "check --api"),
            Address::Tcp(_) => (cause, "check --api, and that this node's resolver knows the name"),
        };
        Self::new("connection", format!("cannot be reached: {cause}; {next_step}"))
    }

    /// The server has ended a watch, and said why.
    pub(super) fn refused(status: &Status) -> Self {
        let words = quote(status.message());
        let code = status.code();
        let refuses =
            |kind, next_step| Self::new(kind, format!("refuses with {code:?}: {words}; {next_step}"));
        match code {
            Code::Unimplemented => {
                Self::new("not-found", format!("has no localv1.Sets (it says: {words}); {NO_LOCALV1}"))
            }
            Code::Unauthenticated => refuses("unauthorized", CHECK_IDENTITY),
            Code::PermissionDenied => refuses("forbidden", CHECK_IDENTITY),
            Code::InvalidArgument | Code::NotFound => refuses("refused", "check --node-name (NODE_NAME)"),
            // tonic's own word for it: a server that says so means its own streams, and there is nothing else to say of them.
            Code::OutOfRange => {
                let limit = MAX_MESSAGE >> 20;
                let reason = format!("sends a message of more than {limit} MiB ({words}); {NO_LOCALV1}");
                Self::new("too-large", reason)
            }
            // So it is called as well if a message cannot be decoded.
            Code::Internal | Code::DataLoss => {
                Self::new("nonsense", format!("answers what cannot be understood ({words}); {NO_LOCALV1}"))
            }
            Code::ResourceExhausted => refuses("too-many-requests", "asked again later"),
            _ => refuses("server-error", "asked again"),
        }
    }

    /// The connection has not held: by what a stream knows of it, and what has ended it.
    pub(super) fn broken_off(status: &Status, Cause { http, io }: &Cause) -> Self {
        let http: &(dyn Error + 'static) = match http {
            Some(error) => error,
            None => status,
        };
        let of_h2 = causes(http).find_map(|error| error.downcast_ref::<h2::Error>());
        let by_cause = |error: &(dyn Error + 'static)| {
            let cause = causes(error).last().map_or_else(String::new, |cause| quote(&cause.to_string()));
            Self::new("connection", format!("has broken off: {cause}; asked again; {CHECK_SERVER}"))
        };
        if of_h2
            .is_some_and(|error| error.is_remote() && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM))
        {
            return Self { too_many_pings: true, ..by_cause(http) };
        }
        if let Some(error) = io {
            return match tls(error) {
                Some(tls) => Self::new("connection", format!("has broken off: {tls}")),
                None => by_cause(error),
            };
        }
        let of_http = |error| causes(error).find_map(|error| error.downcast_ref::<hyper::Error>());
        if [http, status].into_iter().filter_map(of_http).any(hyper::Error::is_timeout) {
            let reason = format!(
                "says nothing any more; {CHECK_SERVER}, and whether something on the way forgets connections"
            );
            return Self::new("silence", reason);
        }
        // Whatever the other side says, it says it in frames of HTTP/2, or else this side says that it does not.
        if let Some(error) = of_h2
            && error.reason().is_some()
            && !error.is_remote()
        {
            let cause = quote(&error.to_string());
            let reason =
                format!("does not speak gRPC ({cause}); {NO_LOCALV1}, and whether it wants TLS (--api-ca)");
            return Self::new("nonsense", reason);
        }
        by_cause(http)
    }
}

/// Whether it is not the server that has said so: the connection has not held.
pub(super) fn is_of_connection(status: &Status) -> bool {
    causes(status)
        .any(|error| error.is::<hyper::Error>() || error.is::<h2::Error>() || error.is::<io::Error>())
}

/// If TLS has failed, why, and what to do about it.
fn tls(error: &(dyn Error + 'static)) -> Option<String> {
    use rustls::{AlertDescription as Alert, CertificateError as Wrong, Error as Tls};
    let error = causes(error).find_map(|error| error.downcast_ref::<Tls>())?;
    let (what, next_step) = match error {
        Tls::InvalidCertificate(Wrong::UnknownIssuer | Wrong::BadSignature) => {
            ("its certificate is not of an authority that is trusted", "check --api-ca")
        }
        Tls::InvalidCertificate(Wrong::NotValidForName | Wrong::NotValidForNameContext { .. }) => {
            ("its certificate is for other names", "check --api, or let the certificate name that host")
        }
        Tls::InvalidCertificate(Wrong::Expired | Wrong::ExpiredContext { .. }) => {
            ("its certificate has expired", "renew it, or check the clocks")
        }
        Tls::InvalidCertificate(_) => ("its certificate is of no use", "check the server's certificate"),
        Tls::InvalidMessage(_) => ("it does not speak TLS", "leave --api-ca away, or check --api"),
        Tls::AlertReceived(Alert::CertificateRequired) => {
            ("it wants to know who we are", "give --api-cert and --api-key")
        }
        Tls::AlertReceived(
            Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::CertificateRevoked
            | Alert::UnsupportedCertificate
            | Alert::DecryptError
            | Alert::AccessDenied,
        ) => ("it does not take our certificate", CHECK_IDENTITY),
        _ => ("TLS fails", "check --api-ca, and that the address is that of a server with TLS"),
    };
    Some(format!("{what} ({}); {next_step}", chain(error)))
}

fn is_any(error: &(dyn Error + 'static), kinds: &[io::ErrorKind]) -> bool {
    causes(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| kinds.contains(&error.kind()))
}
