//! A localv1 server that says what a test wants, when it wants, and kpng's recorded words. Not `to-api`: nothing here works
//! anything out.

use std::{
    collections::VecDeque,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{Stream, stream};
use prost::Message as _;
use proxier_localv1::{
    EmptyOp, Endpoint, IpSet, OpItem, PortName, Ref, Service, ServiceIPs, Set, Value, WatchReq,
    op_item::Op,
    sets_server::{Sets, SetsServer},
};
use tokio::{
    net::{TcpListener, UnixListener},
    runtime::Runtime,
    sync::Notify,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Certificate, Identity, Server as Transport, ServerTlsConfig},
};

/// What the server does next.
pub(crate) enum Step {
    /// Says something.
    Say(OpItem),
    /// Ends the stream, as if all were well or not.
    End(Result<(), Status>),
}

/// What it does, and what it has been asked.
#[derive(Default)]
pub(crate) struct Script {
    steps: Mutex<VecDeque<Step>>,
    requests: Mutex<Vec<WatchReq>>,
    more: Notify,
    streams: AtomicUsize,
}

impl Script {
    /// A batch of these items.
    pub(crate) fn batch(&self, items: impl IntoIterator<Item = OpItem>) {
        self.say(items.into_iter().chain([sync()]));
    }

    /// A whole state.
    pub(crate) fn whole(&self, items: impl IntoIterator<Item = OpItem>) {
        self.batch([reset()].into_iter().chain(items));
    }

    pub(crate) fn say(&self, items: impl IntoIterator<Item = OpItem>) {
        self.then(items.into_iter().map(Step::Say));
    }

    pub(crate) fn end(&self, how: Result<(), Status>) {
        self.then([Step::End(how)]);
    }

    fn then(&self, steps: impl IntoIterator<Item = Step>) {
        self.steps.lock().unwrap().extend(steps);
        self.more.notify_waiters();
    }

    /// What has been asked so far.
    pub(crate) fn requests(&self) -> Vec<WatchReq> {
        self.requests.lock().unwrap().clone()
    }

    /// The next step of a stream. What is said is for the newest: an older one may not have been noticed to have gone.
    async fn next(&self, stream: usize) -> Step {
        loop {
            let more = self.more.notified();
            if self.streams.load(Ordering::SeqCst) != stream {
                return Step::End(Ok(()));
            }
            if let Some(step) = self.steps.lock().unwrap().pop_front() {
                return step;
            }
            more.await;
        }
    }
}

struct Scripted(Arc<Script>);

/// Where a stream is.
struct Talk {
    script: Arc<Script>,
    /// Its number.
    stream: usize,
    requests: Streaming<WatchReq>,
    /// Whether a batch has been asked for and not been told.
    asked: bool,
}

impl Talk {
    async fn next(&mut self) -> Option<Result<OpItem, Status>> {
        if !self.asked {
            let request = self.requests.message().await.ok().flatten()?;
            self.script.requests.lock().unwrap().push(request);
            self.asked = true;
        }
        match self.script.next(self.stream).await {
            Step::Say(item) => {
                self.asked = !matches!(item.op, Some(Op::Sync(_)));
                Some(Ok(item))
            }
            Step::End(Ok(())) => None,
            Step::End(Err(status)) => Some(Err(status)),
        }
    }
}

#[tonic::async_trait]
impl Sets for Scripted {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<OpItem, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchReq>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let stream = self.0.streams.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.more.notify_waiters();
        let talk = Talk { script: self.0.clone(), stream, requests: request.into_inner(), asked: false };
        let items = stream::unfold(talk, |mut talk| async { talk.next().await.map(|item| (item, talk)) });
        Ok(Response::new(Box::pin(items)))
    }
}

/// A running server. With it, all its connections end.
pub(crate) struct Server {
    runtime: Option<Runtime>,
    pub(crate) address: String,
    pub(crate) script: Arc<Script>,
}

/// Certificates in PEM form, and keys.
pub(crate) struct Tls {
    pub(crate) certificate: String,
    pub(crate) key: String,
    /// Of whom the server wants certificates.
    pub(crate) client_ca: Option<String>,
}

impl Server {
    /// On a port of its own.
    pub(crate) fn start() -> Self {
        Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Arc::default(), None)
    }

    pub(crate) fn with_tls(tls: Tls) -> Self {
        Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Arc::default(), Some(tls))
    }

    /// At an address where one has been before.
    pub(crate) fn at(address: SocketAddr, script: Arc<Script>, tls: Option<Tls>) -> Self {
        let runtime = runtime();
        let listener = listen(address);
        let address = listener.local_addr().unwrap().to_string();
        let service = SetsServer::new(Scripted(script.clone()));
        runtime.spawn(async move {
            let mut transport = Transport::builder();
            if let Some(tls) = tls {
                let config = ServerTlsConfig::new().identity(Identity::from_pem(tls.certificate, tls.key));
                let config = match tls.client_ca {
                    Some(ca) => config.client_ca_root(Certificate::from_pem(ca)),
                    None => config,
                };
                transport = transport.tls_config(config).unwrap();
            }
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            transport.add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { runtime: Some(runtime), address, script }
    }

    pub(crate) fn at_socket(path: &Path) -> Self {
        let (runtime, script) = (runtime(), Arc::<Script>::default());
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let service = SetsServer::new(Scripted(script.clone()));
        runtime.spawn(async move {
            let incoming = UnixListenerStream::new(UnixListener::from_std(listener).unwrap());
            Transport::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { runtime: Some(runtime), address: format!("unix://{}", path.display()), script }
    }

    /// Ends it and all its connections. Another one can be started at the address.
    pub(crate) fn die(self) -> SocketAddr {
        self.address.parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A test may be within a runtime of its own.
            runtime.shutdown_background();
        }
    }
}

fn runtime() -> Runtime {
    // With a thread, so that it goes on while a test waits.
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// The port of a server that has just gone may be in use for a moment.
fn listen(address: SocketAddr) -> std::net::TcpListener {
    for _ in 0..200 {
        if let Ok(listener) = std::net::TcpListener::bind(address) {
            listener.set_nonblocking(true).unwrap();
            return listener;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{address} is in use");
}

pub(crate) fn op(op: Op) -> OpItem {
    OpItem { op: Some(op) }
}

pub(crate) fn reset() -> OpItem {
    op(Op::Reset(EmptyOp {}))
}

pub(crate) fn sync() -> OpItem {
    op(Op::Sync(EmptyOp {}))
}

fn set(set: Set, path: &str, bytes: Vec<u8>) -> OpItem {
    let reference = Ref { set: set as i32, path: path.to_owned() };
    op(Op::Set(Value { r#ref: Some(reference), bytes: bytes.into() }))
}

pub(crate) fn delete(set: Set, path: &str) -> OpItem {
    op(Op::Delete(Ref { set: set as i32, path: path.to_owned() }))
}

/// A Service in `default` with one external IPv4 address.
pub(crate) fn service(name: &str, external: &str) -> OpItem {
    let external_ips = Some(IpSet { v4: vec![external.to_owned()], v6: Vec::new() });
    let service = Service {
        namespace: "default".to_owned(),
        name: name.to_owned(),
        ips: Some(ServiceIPs { external_ips, headless: true, ..ServiceIPs::default() }),
        ..Service::default()
    };
    set(Set::ServicesSet, &format!("default/{name}"), service.encode_to_vec())
}

/// A pod of it on the client's node.
pub(crate) fn pod(service: &str, pod: &str, address: &str) -> OpItem {
    let endpoint = Endpoint {
        ips: Some(IpSet { v4: vec![address.to_owned()], v6: Vec::new() }),
        local: true,
        port_overrides: vec![PortName { name: String::new(), port: 6000 }],
        ..Endpoint::default()
    };
    set(Set::EndpointsSet, &format!("default/{service}/{pod}.v4"), endpoint.encode_to_vec())
}

/// A value that is larger than any.
pub(crate) fn huge() -> OpItem {
    set(Set::ServicesSet, "default/huge", vec![0; 17 << 20])
}

/// What kpng's server sent to a client of node1, with what the recording says that it means.
pub(crate) fn recorded() -> Vec<(OpItem, serde_json::Value)> {
    let file = recordings().join("watch-node1.jsonl");
    let lines = std::fs::read_to_string(file).unwrap();
    lines
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let wire = BASE64_STANDARD.decode(line["wire"].as_str().unwrap()).unwrap();
            let item = OpItem::decode(&*wire).unwrap();
            // So what the server sends is what was recorded.
            assert_eq!(item.encode_to_vec(), wire);
            (item, line)
        })
        .collect()
}

pub(crate) fn recordings() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/recordings/kpng")
}
