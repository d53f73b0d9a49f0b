//! `spec.healthCheckNodePort`: by it a load balancer learns on which nodes a Service has pods. kube-proxy leaves the
//! Services that are ours alone, this port included, so we answer there, and just as kube-proxy would.
//!
//! The port is asked on the node's own addresses. Who asks on the external address, as some load balancers do, asks a
//! pod: every port of that address is the Service's.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::ser::PrettyFormatter;

use super::{
    health::Health,
    listen::{Connections, Purpose, Server, descriptor_limit},
};
use crate::{
    catalog::Catalog,
    desired::{Desired, ServiceKey},
    model::{
        Family, NodeName, ObjectId, ObjectName, Problem, ProblemKind, Service, ServiceType, Severity,
        Subject, TrafficPolicy,
    },
};

/// The field, in problems.
const FIELD: &str = "spec.healthCheckNodePort";
/// A load balancer that weighs nodes reads this rather than the body (kube-proxy since 1.28).
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Ports that are listened on, at most: a file descriptor each. The API server takes them from its range for node ports,
/// which has 2768 unless somebody has made it larger.
const MAX_PORTS: usize = 4096;
/// The part of the process's file descriptors that may be listeners, at most. The rest is for connections, and for what
/// matters more: watches, netlink, maps, links.
const DESCRIPTOR_SHARE: usize = 4;
/// Connections at a time, of all ports together.
const MAX_CONNECTIONS: usize = 256;
/// Of which one client address has so many at most: a load balancer asks for every Service from the same.
const MAX_CONNECTIONS_PER_CLIENT: usize = 64;

/// By port: whose it is, and how many pods of it take new conversations on this node.
pub type HealthCheckPorts = BTreeMap<u16, (ObjectName, usize)>;

/// The ports that `node` has to answer on. The API server gives every Service another one; of those that have the same,
/// as manifests may, the oldest gets it, and the others are reported. So are those for which there are too many.
///
/// A Service of whose addresses none is `in_force` has no pods: all are refused, or another's, or there is no room.
#[must_use]
pub fn health_check_ports(
    catalog: &Catalog,
    in_force: &Desired,
    node: &NodeName,
) -> (HealthCheckPorts, Vec<Problem>) {
    assign_ports(catalog, in_force, node, MAX_PORTS.min(descriptor_limit() / DESCRIPTOR_SHARE))
}

fn assign_ports(
    catalog: &Catalog,
    in_force: &Desired,
    node: &NodeName,
    max_ports: usize,
) -> (HealthCheckPorts, Vec<Problem>) {
    let mut asking: Vec<(u16, &Service)> = catalog
        .services()
        .filter(|service| {
            service.service_type == ServiceType::LoadBalancer
                && service.external_traffic_policy == TrafficPolicy::Local
        })
        .filter_map(|service| Some((service.health_check_node_port.filter(|port| *port != 0)?, service)))
        .collect();
    asking.sort_by_key(|(_, service)| {
        (service.created.is_none(), service.created, &service.name, &service.uid)
    });
    let (mut ports, mut problems) = (HealthCheckPorts::new(), Vec::new());
    for (port, service) in asking {
        let full = ports.len() >= max_ports;
        match ports.entry(port) {
            Entry::Vacant(_) if full => {
                let subject = Subject::Object(ObjectId::Service(service.name.clone()));
                let reason = format!(
                    "is one too many: this node answers on the ports of the {max_ports} oldest Services, so load balancers cannot \
                     ask for this one"
                );
                let next_step = format!(
                    "use externalTrafficPolicy Cluster where nothing asks; the agent answers on up to {MAX_PORTS} ports, and on \
                     one for every {DESCRIPTOR_SHARE} file descriptors that its hard limit (RLIMIT_NOFILE) allows"
                );
                let problem = Problem::new(Severity::Warning, subject, reason, next_step);
                problems.push(problem.in_field(FIELD, port.to_string()).of_kind(ProblemKind::Unsupported));
            }
            Entry::Vacant(entry) => {
                let count = if is_served(service, in_force) {
                    local_endpoints(catalog, &service.name, node)
                } else {
                    0
                };
                entry.insert((service.name.clone(), count));
            }
            Entry::Occupied(entry) => {
                let subject = Subject::Object(ObjectId::Service(service.name.clone()));
                let reason = format!(
                    "is that of Service {} as well, which is older: load balancers cannot ask for this one",
                    entry.get().0
                );
                let problem = Problem::new(Severity::Warning, subject, reason, "give it another port");
                problems.push(problem.in_field(FIELD, port.to_string()));
            }
        }
    }
    (ports, problems)
}

/// Whether an address of `service` leads to a pod that takes new conversations. One that has no address yet may be given one
/// only once its nodes are known to have pods.
fn is_served(service: &Service, in_force: &Desired) -> bool {
    let has_address = !service.external_ips.is_empty() || service.load_balancer_ips().next().is_some();
    !has_address
        || Family::ALL.into_iter().any(|family| {
            let key = ServiceKey { service: service.name.clone(), family };
            let known = in_force.services.get(&key);
            known.is_some_and(|known| !known.externals.is_empty() && !known.pods.is_empty())
        })
}

/// Pods of `service` on `node` that are ready. Those that are about to end are not: that is how a load balancer learns to
/// send new conversations elsewhere while the node still delivers them (KEP-1669). With `publishNotReadyAddresses` all
/// are, as the API has it. A pod with addresses of both families is one.
fn local_endpoints(catalog: &Catalog, service: &ObjectName, node: &NodeName) -> usize {
    let count = |family: Family| {
        let addresses: BTreeSet<IpAddr> = catalog
            .slices_of(service)
            .filter(|slice| slice.family == family)
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.ready && endpoint.node.as_ref() == Some(node))
            // The addresses of an endpoint are all of the same pod.
            .filter_map(|endpoint| endpoint.addresses.first().copied())
            .collect();
        addresses.len()
    };
    Family::ALL.into_iter().map(count).max().unwrap_or(0)
}

/// The listeners. They end when this is dropped.
#[derive(Debug)]
pub struct ServiceHealth {
    health: Health,
    /// Where to listen; every address, but in tests.
    address: IpAddr,
    ports: BTreeMap<u16, Port>,
    /// Of all ports together.
    connections: Arc<Connections>,
}

#[derive(Debug)]
struct Port {
    asked: Arc<Asked>,
    #[cfg_attr(not(test), expect(dead_code, reason = "listens as long as it is held"))]
    server: Server,
}

/// What the answers on a port are made of.
#[derive(Debug)]
struct Asked {
    /// The Service, and how many pods it has here.
    service: Mutex<(ObjectName, usize)>,
    health: Health,
}

impl Asked {
    /// A panic cannot leave half of a pair behind.
    fn service(&self) -> MutexGuard<'_, (ObjectName, usize)> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServiceHealth {
    /// Listens nowhere yet.
    #[must_use]
    pub fn new(health: Health) -> Self {
        Self {
            health,
            address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            ports: BTreeMap::new(),
            connections: Connections::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT),
        }
    }

    /// Listens on these ports, and no others, from now on. Those that stay are not interrupted. A port that is taken is
    /// reported once and tried again. To be called within a runtime, at every change.
    pub fn update(&mut self, wanted: &HealthCheckPorts) {
        self.ports.retain(|number, _| wanted.contains_key(number));
        for (number, service) in wanted {
            match self.ports.entry(*number) {
                Entry::Occupied(entry) => entry.get().asked.service().clone_from(service),
                Entry::Vacant(entry) => {
                    let address = SocketAddr::new(self.address, *number);
                    let (health, connections) = (self.health.clone(), Arc::clone(&self.connections));
                    entry.insert(Port::open(address, service.clone(), health, connections));
                }
            }
        }
    }
}

impl Port {
    fn open(
        address: SocketAddr,
        service: (ObjectName, usize),
        health: Health,
        connections: Arc<Connections>,
    ) -> Self {
        let purpose = Purpose {
            subject: format!("Service {}: {FIELD}", service.0),
            next_step: "load balancers do not send to this node until it can: see who has the port with `ss -ltnp`, and end that, \
                        or give the Service another"
                .to_owned(),
        };
        let asked = Arc::new(Asked { service: Mutex::new(service), health });
        // Whatever the path and the method.
        let routes = Router::new().fallback(answer).with_state(Arc::clone(&asked));
        Self { asked, server: Server::start(address, purpose, routes, connections) }
    }
}

/// As kube-proxy has it, with its names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

async fn answer(State(asked): State<Arc<Asked>>) -> Response {
    let (ObjectName { namespace, name }, local_endpoints) = asked.service().clone();
    let service_proxy_healthy = asked.health.serves();
    let service = Name { namespace: &namespace, name: &name };
    let body = Body { service, local_endpoints, service_proxy_healthy };
    let status = if local_endpoints > 0 && service_proxy_healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(local_endpoints)),
    ];
    (status, headers, indented(&body)).into_response()
}

/// With tabs, as kube-proxy prints it, for those who compare text.
fn indented(body: &Body<'_>) -> Vec<u8> {
    let mut text = Vec::new();
    let mut serializer =
        serde_json::Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"\t"));
    // Strings and numbers, written to memory: nothing can fail.
    let _ = body.serialize(&mut serializer);
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        time::timeout,
    };

    use super::*;
    use crate::{
        desired::{Settings, compute},
        model::{
            CreationTime, Endpoint,
            testing::{mk_endpoint, mk_name, mk_service, mk_slice},
        },
    };

    fn balanced(name: &str, port: u16) -> Service {
        Service {
            service_type: ServiceType::LoadBalancer,
            external_traffic_policy: TrafficPolicy::Local,
            health_check_node_port: Some(port),
            ..mk_service(name, [])
        }
    }

    /// All that should be in force is.
    fn assigned(catalog: &Catalog, max_ports: usize) -> (HealthCheckPorts, Vec<Problem>) {
        let settings = Settings::new(NodeName::new("node1"));
        let (desired, _) = compute(catalog, &settings);
        assign_ports(catalog, &desired, &settings.node, max_ports)
    }

    fn ports(services: impl IntoIterator<Item = Service>, endpoints: Vec<Vec<Endpoint>>) -> HealthCheckPorts {
        let mut catalog = Catalog::default();
        for service in services {
            catalog.apply(service.into());
        }
        for (number, endpoints) in endpoints.into_iter().enumerate() {
            catalog.apply(mk_slice(&format!("web-{number}"), "web", endpoints).into());
        }
        let (ports, problems) = assigned(&catalog, MAX_PORTS);
        assert_eq!(problems, []);
        ports
    }

    fn count(endpoints: Vec<Vec<Endpoint>>) -> usize {
        let ports = ports([balanced("web", 30_123)], endpoints);
        assert_eq!(ports.keys().collect::<Vec<_>>(), [&30_123]);
        ports[&30_123].1
    }

    #[test]
    fn only_load_balancers_with_local_traffic_have_the_port() {
        let web = || balanced("web", 30_123);
        assert_eq!(ports([web()], vec![]), BTreeMap::from([(30_123, (mk_name("web"), 0))]));
        for other in [
            Service { service_type: ServiceType::NodePort, ..web() },
            Service { external_traffic_policy: TrafficPolicy::Cluster, ..web() },
            Service { health_check_node_port: None, ..web() },
            Service { health_check_node_port: Some(0), ..web() },
        ] {
            assert_eq!(ports([other], vec![]), BTreeMap::new());
        }
    }

    #[test]
    fn ready_pods_of_this_node_count() {
        let unready = Endpoint { ready: false, serving: false, ..mk_endpoint("11.0.2.3", "node1") };
        let elsewhere = mk_endpoint("11.0.1.2", "node2");
        let nowhere = Endpoint { node: None, ..mk_endpoint("11.0.1.3", "") };
        assert_eq!(count(vec![vec![mk_endpoint("11.0.2.2", "node1"), unready, elsewhere, nowhere]]), 1);
    }

    #[test]
    fn a_pod_that_is_about_to_end_does_not_count_though_it_still_serves() {
        let ending =
            Endpoint { ready: false, serving: true, terminating: true, ..mk_endpoint("11.0.2.2", "node1") };
        assert_eq!(count(vec![vec![ending]]), 0);
    }

    #[test]
    fn a_pod_that_is_published_whatever_it_does_counts_to_its_end() {
        // What publishNotReadyAddresses makes of it.
        let published = Endpoint { terminating: true, ..mk_endpoint("11.0.2.2", "node1") };
        assert_eq!(count(vec![vec![published]]), 1);
    }

    #[test]
    fn a_pod_of_both_families_or_in_two_slices_counts_once() {
        let v4 = |n| mk_endpoint(&format!("11.0.2.{n}"), "node1");
        let v6 = |n| mk_endpoint(&format!("1100::{n}"), "node1");
        assert_eq!(count(vec![vec![v4(2)], vec![v6(2)]]), 1);
        assert_eq!(count(vec![vec![v4(2), v4(3)], vec![v4(3)], vec![v6(2)]]), 2);
    }

    #[test]
    fn a_service_none_of_whose_addresses_is_in_force_has_no_pods_and_one_without_any_yet_has() {
        let with = |addresses: &[&str]| Service {
            external_ips: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            ..balanced("web", 30_123)
        };
        for (addresses, counts) in [
            (&["127.0.0.1"][..], 0),
            (&["127.0.0.1", "10.0.0.55"], 1),
            // Its pods have the other family.
            (&["1000::55"], 0),
            (&["1000::55", "10.0.0.55"], 1),
            (&[], 1),
        ] {
            let ports = ports([with(addresses)], vec![vec![mk_endpoint("11.0.2.2", "node1")]]);
            assert_eq!(ports, BTreeMap::from([(30_123, (mk_name("web"), counts))]), "{addresses:?}");
        }

        // It should be, and the kernel has no room.
        let mut catalog = Catalog::default();
        catalog.apply(with(&["10.0.0.55"]).into());
        catalog.apply(mk_slice("web-1", "web", [mk_endpoint("11.0.2.2", "node1")]).into());
        let (ports, _) = health_check_ports(&catalog, &Desired::default(), &NodeName::new("node1"));
        assert_eq!(ports, BTreeMap::from([(30_123, (mk_name("web"), 0))]));
    }

    #[test]
    fn of_two_services_with_one_port_the_older_has_it_and_the_other_is_told() {
        let created = |name, seconds: Option<i64>| Service {
            created: seconds.map(CreationTime),
            ..balanced(name, 30_123)
        };
        for (web, mail) in [(Some(2), Some(1)), (None, Some(9))] {
            let mut catalog = Catalog::default();
            catalog.apply(created("mail", mail).into());
            catalog.apply(created("web", web).into());
            catalog.apply(created("a", Some(10)).into());
            let (ports, problems) = assigned(&catalog, MAX_PORTS);
            assert_eq!(ports, BTreeMap::from([(30_123, (mk_name("mail"), 0))]));
            let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
            assert_eq!(texts.len(), 2, "{texts:?}");
            assert_eq!(
                texts.last().unwrap().replace("default/web", "default/a"),
                "Service default/a: spec.healthCheckNodePort \"30123\" is that of Service default/mail as well, which is \
                 older: load balancers cannot ask for this one; give it another port"
            );
        }
    }

    #[test]
    fn the_oldest_services_have_the_ports_there_can_be_and_the_others_are_told() {
        let mut catalog = Catalog::default();
        for (name, port, created) in
            [("young", 30_001, 9), ("older", 30_002, 2), ("oldest", 30_003, 1), ("same", 30_003, 8)]
        {
            let created = Some(CreationTime(created));
            catalog.apply(Service { created, ..balanced(name, port) }.into());
        }
        let (ports, problems) = assigned(&catalog, 2);
        let expected = BTreeMap::from([(30_002, (mk_name("older"), 0)), (30_003, (mk_name("oldest"), 0))]);
        assert_eq!(ports, expected);
        let [same, young] = &problems[..] else { panic!("{problems:?}") };
        assert!(same.to_string().contains("is that of Service default/oldest as well"), "{same}");
        assert_eq!(young.kind, ProblemKind::Unsupported);
        assert_eq!(
            young.to_string(),
            "Service default/young: spec.healthCheckNodePort \"30001\" is one too many: this node answers on the ports of the 2 \
             oldest Services, so load balancers cannot ask for this one; use externalTrafficPolicy Cluster where nothing asks; \
             the agent answers on up to 4096 ports, and on one for every 4 file descriptors that its hard limit \
             (RLIMIT_NOFILE) allows"
        );
        // Room again.
        let (ports, problems) = assigned(&catalog, 3);
        assert_eq!((ports.len(), problems.len()), (3, 1));
    }

    fn healthy() -> Health {
        let health = Health::new(false);
        health.synced();
        health.applied();
        health
    }

    fn local(health: &Health) -> ServiceHealth {
        ServiceHealth { address: "::1".parse().unwrap(), ..ServiceHealth::new(health.clone()) }
    }

    fn wanted(ports: &[(u16, &str, usize)]) -> HealthCheckPorts {
        ports.iter().map(|(port, name, count)| (*port, (mk_name(name), *count))).collect()
    }

    /// Ports that nobody has at the moment.
    fn free<const N: usize>() -> [u16; N] {
        let taken = [(); N].map(|()| std::net::TcpListener::bind("[::1]:0").unwrap());
        taken.map(|listener| listener.local_addr().unwrap().port())
    }

    async fn ask(port: u16, path: &str) -> String {
        let mut stream = TcpStream::connect(("::1", port)).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: n\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    impl ServiceHealth {
        async fn bound(&mut self) {
            for port in self.ports.values_mut() {
                port.server.bound().await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn the_answer_is_that_of_kube_proxy_to_the_byte() {
        let [port] = free();
        let mut service_health = local(&healthy());
        service_health.update(&wanted(&[(port, "web", 2)]));
        service_health.bound().await;
        for path in ["/", "/healthz", "/anything?x=y"] {
            let answer = ask(port, path).await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
            for header in [
                "content-type: application/json",
                "x-content-type-options: nosniff",
                "x-load-balancing-endpoint-weight: 2",
            ] {
                assert!(head.lines().any(|line| line == header), "{header} is not in {head}");
            }
            assert_eq!(
                body,
                "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": \
                 2,\n\t\"serviceProxyHealthy\": true\n}"
            );
        }
    }

    #[tokio::test]
    async fn without_pods_or_on_a_node_that_does_not_serve_the_answer_is_503() {
        let [port] = free();
        let health = Health::new(false);
        let mut service_health = local(&health);
        service_health.update(&wanted(&[(port, "web", 1)]));
        service_health.bound().await;
        let answer = ask(port, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": false"), "{answer}");
        health.synced();
        health.applied();
        assert!(ask(port, "/").await.starts_with("HTTP/1.1 200"));
        service_health.update(&wanted(&[(port, "web", 0)]));
        let answer = ask(port, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("\"localEndpoints\": 0,\n\t\"serviceProxyHealthy\": true"), "{answer}");
        assert!(answer.contains("x-load-balancing-endpoint-weight: 0"), "{answer}");
    }

    #[tokio::test]
    async fn ports_come_go_and_stay_as_services_do() {
        let [web, mail] = free();
        let mut service_health = local(&healthy());
        service_health.update(&wanted(&[(web, "web", 1), (mail, "mail", 1)]));
        service_health.bound().await;
        let kept = service_health.ports[&web].server.id();
        service_health.update(&wanted(&[(web, "web", 3)]));
        assert_eq!(service_health.ports[&web].server.id(), kept);
        assert!(ask(web, "/").await.contains("\"localEndpoints\": 3"));
        let refused = async {
            // The listener ends as soon as its task is looked at again.
            while TcpStream::connect(("::1", mail)).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), refused).await.unwrap();
        // The port goes to another Service.
        service_health.update(&wanted(&[(web, "shop", 1)]));
        service_health.bound().await;
        assert!(ask(web, "/").await.contains("\"name\": \"shop\""));
    }

    #[tokio::test]
    async fn a_port_that_somebody_else_has_keeps_no_other_from_being_answered() {
        let taken = std::net::TcpListener::bind("[::1]:0").unwrap();
        let taken_port = taken.local_addr().unwrap().port();
        let [free_port] = free();
        let mut service_health = local(&healthy());
        service_health.update(&wanted(&[(taken_port, "web", 1), (free_port, "mail", 1)]));
        service_health.ports.get_mut(&free_port).unwrap().server.bound().await.unwrap();
        assert!(ask(free_port, "/").await.contains("mail"));
        drop(taken);
        timeout(Duration::from_secs(30), service_health.bound()).await.unwrap();
        assert!(ask(taken_port, "/").await.contains("web"));
    }
}
