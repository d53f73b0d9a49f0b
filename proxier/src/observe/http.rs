//! What the agent answers over HTTP: `/livez`, `/readyz` and `/healthz` for kubelet and load balancers, `/metrics` and
//! `/status` for who may know more.
//!
//! Two addresses, as kube-proxy has: health is for everybody who reaches the node and names no object, the rest is for the
//! node itself unless somebody says otherwise. The ports are kube-proxy's (10256 and 10249) plus 100: both agents run on
//! every node.

use std::net::SocketAddr;

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use clap::Args;

use super::{
    health::Verdict,
    listen::{Connections, Listen, Purpose, Server},
    metrics::CONTENT_TYPE,
    observed::Observed,
    status::StatusReport,
};

/// Where health is answered unless told otherwise: on all addresses of both families, as kubelet asks on the node's.
pub const DEFAULT_HEALTH_ADDRESS: &str = "[::]:10356";
/// Where metrics and status are answered unless told otherwise.
pub const DEFAULT_METRICS_ADDRESS: &str = "127.0.0.1:10349";

/// Connections at a time, of each of the two addresses.
const MAX_CONNECTIONS: usize = 64;
/// Of which one client address has so many at most. Who probes or scrapes needs one.
const MAX_CONNECTIONS_PER_CLIENT: usize = 4;

/// Where the agent answers.
#[derive(Clone, Copy, Debug, Args)]
pub struct ListenArgs {
    /// Where to answer /livez, /readyz and /healthz: an address with a port, or off
    #[arg(
        long,
        env = "PROXIER_HEALTH_ADDRESS",
        value_name = "ADDRESS:PORT|off",
        default_value = DEFAULT_HEALTH_ADDRESS
    )]
    pub health_address: Listen,
    /// Where to answer /metrics, /status and what --health-address does: an address with a port, or off
    #[arg(
        long,
        env = "PROXIER_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT|off",
        default_value = DEFAULT_METRICS_ADDRESS
    )]
    pub metrics_address: Listen,
}

/// Answers from now on, until what is returned is dropped. An address that is taken stops nothing: see [`Server::start`].
/// To be called within a runtime.
#[must_use]
pub fn serve(observed: &Observed, listen: ListenArgs) -> Vec<Server> {
    let ListenArgs { health_address, metrics_address } = listen;
    let server = |address: SocketAddr, subject: &str, flag: &str, routes| {
        let purpose = Purpose {
            subject: subject.to_owned(),
            next_step: format!(
                "see who has the port with `ss -ltnp`, and end that, or give another with {flag}"
            ),
        };
        // Each its own: whoever fills one of them leaves the other alone.
        let connections = Connections::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT);
        Server::start(address, purpose, routes, connections)
    };
    let mut servers = Vec::new();
    if let Some(address) = health_address.address()
        && health_address != metrics_address
    {
        servers.push(server(address, "health", "--health-address", health_routes(observed)));
    }
    if let Some(address) = metrics_address.address() {
        servers.push(server(address, "metrics and status", "--metrics-address", all_routes(observed)));
    }
    servers
}

/// `/livez`, `/readyz`, `/healthz`.
pub fn health_routes(observed: &Observed) -> Router {
    let ready = || get(|State(observed): State<Observed>| async move { plain(&observed.health.ready()) });
    Router::new()
        .route(
            "/livez",
            get(|State(observed): State<Observed>| async move { plain(&observed.health.live()) }),
        )
        .route("/readyz", ready())
        // As kube-proxy's: what a load balancer asks that does not ask for a Service.
        .route("/healthz", ready())
        .with_state(observed.clone())
}

/// The same, and `/metrics` and `/status`.
pub fn all_routes(observed: &Observed) -> Router {
    let more = Router::new()
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(observed.clone());
    health_routes(observed).merge(more)
}

fn plain(verdict: &Verdict) -> Response {
    let status = if verdict.passed() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        // A proxy on the way must not answer for a node.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (status, headers, verdict.to_string()).into_response()
}

async fn metrics(State(observed): State<Observed>) -> Response {
    // Maps are read: nothing that a thread of the runtime should wait for.
    let encoded = tokio::task::spawn_blocking(move || observed.metrics.encode()).await;
    match encoded {
        Ok(Ok(text)) => {
            ([(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE))], text).into_response()
        }
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn status(State(observed): State<Observed>) -> Json<StatusReport> {
    Json(observed.report())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;
    use crate::{model::NodeName, observe::status};

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        listen: ListenArgs,
    }

    fn listen(line: &str) -> ListenArgs {
        Line::try_parse_from(format!("proxier {line}").split_whitespace()).unwrap().listen
    }

    fn observed() -> Observed {
        Observed::new(&NodeName::new("node1"), "file", None)
    }

    async fn ask(address: SocketAddr, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: n\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    #[test]
    fn without_flags_no_port_of_kube_proxy_is_taken() {
        let ListenArgs { health_address, metrics_address } = listen("");
        let health = health_address.address().unwrap();
        let metrics = metrics_address.address().unwrap();
        assert!(health.ip().is_unspecified() && health.is_ipv6(), "{health}");
        assert!(metrics.ip().is_loopback(), "{metrics}");
        for port in [10_248, 10_249, 10_250, 10_255, 10_256, 10_257, 10_258, 10_259] {
            assert!(health.port() != port && metrics.port() != port);
        }
    }

    #[tokio::test]
    async fn health_is_on_both_addresses_and_the_rest_on_one() {
        let observed = observed();
        let mut servers = serve(&observed, listen("--health-address 127.0.0.1:0 --metrics-address [::1]:0"));
        let [health, metrics] = &mut servers[..] else { panic!("{servers:?}") };
        let (health, metrics) = (health.bound().await.unwrap(), metrics.bound().await.unwrap());
        for path in ["/livez", "/readyz", "/healthz"] {
            assert_eq!(ask(health, path).await.1, ask(metrics, path).await.1);
        }
        for path in ["/metrics", "/status"] {
            assert!(ask(health, path).await.0.starts_with("HTTP/1.1 404"), "{path}");
            assert!(ask(metrics, path).await.0.starts_with("HTTP/1.1 200"), "{path}");
        }
    }

    #[tokio::test]
    async fn one_address_for_all_is_listened_on_once_and_off_not_at_all() {
        let observed = observed();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut servers =
            serve(&observed, listen(&format!("--health-address {free} --metrics-address {free}")));
        assert_eq!(servers.len(), 1);
        assert_eq!(servers[0].bound().await, Some(free));
        assert!(ask(free, "/metrics").await.0.starts_with("HTTP/1.1 200"));
        assert_eq!(serve(&observed, listen("--health-address off --metrics-address off")).len(), 0);
    }

    async fn started(observed: &Observed) -> (Vec<Server>, SocketAddr) {
        let mut servers = serve(observed, listen("--health-address off --metrics-address 127.0.0.1:0"));
        let address = servers[0].bound().await.unwrap();
        (servers, address)
    }

    #[tokio::test]
    async fn a_probe_gets_503_with_the_reason_until_the_state_is_applied() {
        let observed = observed();
        let (_servers, address) = started(&observed).await;
        let (head, body) = ask(address, "/readyz").await;
        assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        assert!(body.contains("[-]source-synced failed: the source has not delivered"), "{body}");
        assert!(body.ends_with("readyz check failed\n"), "{body}");
        assert!(ask(address, "/livez").await.0.starts_with("HTTP/1.1 200"));
        observed.synced();
        observed.applied(Duration::ZERO);
        for path in ["/readyz", "/healthz", "/readyz?verbose"] {
            let (head, body) = ask(address, path).await;
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert_eq!(body, "[+]source-synced ok\n[+]state-applied ok\nreadyz check passed\n");
        }
    }

    #[tokio::test]
    async fn metrics_are_what_they_say_they_are() {
        let (_servers, address) = started(&observed()).await;
        let (head, body) = ask(address, "/metrics").await;
        let line = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(head.lines().any(|found| found == line), "{head}");
        assert!(body.ends_with("# EOF\n"), "{body}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_command_fetches_what_the_agent_reports() {
        let observed = observed();
        observed.synced();
        observed.applied(Duration::from_millis(2));
        let (_servers, address) = started(&observed).await;
        let fetched = tokio::task::spawn_blocking(move || status::fetch(address)).await.unwrap().unwrap();
        let report = observed.report();
        assert_eq!(StatusReport { time: report.time, ..fetched }, report);
        assert!(fetched_is_recent(&report), "{report:?}");
    }

    fn fetched_is_recent(report: &StatusReport) -> bool {
        report.sync.last_applied.is_some_and(|applied| report.time.duration_since(applied).as_secs() < 60)
    }
}
