//! TLS as an API server has it: a certificate for its address, of an authority that nobody knows but who is given `ca.crt`.

use std::{fmt, io, net::SocketAddr, sync::Arc};

use anyhow::Context as _;
use axum::serve::Listener;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
    server::TlsStream,
};

/// Connections whose handshake is over and that nobody has taken yet.
const READY: usize = 64;

/// What a server needs for TLS.
#[derive(Clone)]
pub(super) struct Tls {
    acceptor: TlsAcceptor,
    /// The authority's certificate, as PEM.
    pub(super) authority: String,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// With an authority and a certificate for `address` of its own.
    pub(super) fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate()?;
        let pem = authority.self_signed(&authority_key)?.pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([address.ip().to_string()])?.signed_by(&key, &issuer)?;
        // By name: a process may be linked with another provider as well.
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.into()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .context("no TLS")?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { acceptor: Arc::new(config).into(), authority: pem })
    }

    /// A listener whose connections speak TLS. To be called within a runtime, which ends it.
    pub(super) fn listen(&self, listener: TcpListener) -> io::Result<TlsListener> {
        let address = listener.local_addr()?;
        let (sender, connections) = mpsc::channel(READY);
        let acceptor = self.acceptor.clone();
        tokio::spawn(async move {
            let mut listener = listener;
            loop {
                let (connection, peer) = Listener::accept(&mut listener).await;
                // A line of a watch is sent when it is there, not with the next. A connection that is gone will say so.
                let _ = connection.set_nodelay(true);
                let handshake = acceptor.accept(connection);
                let sender = sender.clone();
                // One that stalls holds up no other.
                tokio::spawn(async move {
                    // A client that does not trust us, or is gone, has said so on its side.
                    if let Ok(connection) = handshake.await {
                        let _ = sender.send((connection, peer)).await;
                    }
                });
            }
        });
        Ok(TlsListener { address, connections })
    }
}

/// See [`Tls::listen`].
pub(super) struct TlsListener {
    address: SocketAddr,
    connections: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.connections.recv().await {
            Some(connection) => connection,
            // The task that sends them ends with the runtime, and so do we.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}
