//! Who the server is, and who may be its client: certificates in files, read again when they have changed, as whoever renews
//! them expects.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio_rustls::rustls::{
    self, RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject as _},
    },
    server::WebPkiClientVerifier,
};

/// How often it is looked whether the files have changed.
pub(super) const LOOK: Duration = Duration::from_secs(10);

/// The server's certificate, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that lead to its authority, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Authorities, PEM: only clients with a certificate of one of them are served. Everybody if there is none.
    pub client_authorities: Option<PathBuf>,
}

/// A file that cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// It cannot be read, or is no PEM.
    #[error("{file} ({flag}) cannot be used: {error}; give a PEM file that has what is asked for", file = file.display())]
    Pem {
        /// Who names it.
        flag: &'static str,
        /// The file.
        file: PathBuf,
        /// What is wrong.
        error: pem::Error,
    },
    /// There is no certificate in it.
    #[error("{file} ({flag}) has no certificate in it; give a PEM file with one", file = file.display())]
    Empty {
        /// Who names it.
        flag: &'static str,
        /// The file.
        file: PathBuf,
    },
    /// They do not fit each other, or cannot be used.
    #[error(
        "the certificates cannot be used: {0}; see that --tls-cert, --tls-key and --tls-client-ca belong together"
    )]
    Unusable(String),
}

/// What connections are accepted with.
#[derive(Debug)]
pub(super) struct Identity {
    files: TlsFiles,
    look_every: Duration,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    /// What the files were when they were read; compared, not understood.
    versions: Vec<Option<Version>>,
    looked: Instant,
    /// Whether the newest files cannot be used, as told.
    failed: bool,
}

type Version = (u64, u64, i64, i64, u64);

impl Identity {
    pub(super) fn read(files: TlsFiles, look_every: Duration) -> Result<Self, TlsError> {
        let versions = versions(&files);
        let config = Arc::new(config(&files)?);
        let current = Current { config, versions, looked: Instant::now(), failed: false };
        Ok(Self { files, look_every, current: Mutex::new(current) })
    }

    /// Whether clients need a certificate.
    pub(super) const fn asks_clients(&self) -> bool {
        self.files.client_authorities.is_some()
    }

    /// With what the files have now, or had when they could be used last.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= self.look_every {
            current.looked = Instant::now();
            self.look(&mut current);
        }
        Arc::clone(&current.config)
    }

    fn look(&self, current: &mut Current) {
        let versions = versions(&self.files);
        if versions == current.versions && !current.failed {
            return;
        }
        // One file may be there before the other: the next look settles that.
        match config(&self.files) {
            Ok(config) => {
                current.config = Arc::new(config);
                current.versions = versions;
                current.failed = false;
                tracing::info!("the certificates of the API have changed; new connections get the new ones");
            }
            Err(error) => {
                if !current.failed {
                    tracing::warn!("{error}; those read before are used on, and it is tried again");
                }
                current.failed = true;
            }
        }
    }
}

fn versions(files: &TlsFiles) -> Vec<Option<Version>> {
    let TlsFiles { certificate, key, client_authorities } = files;
    let version = |path: &Path| -> io::Result<Version> {
        let metadata = fs::metadata(path)?;
        Ok((metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
    };
    [Some(certificate), Some(key), client_authorities.as_ref()]
        .into_iter()
        .flatten()
        .map(|path| version(path).ok())
        .collect()
}

fn config(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let TlsFiles { certificate, key, client_authorities } = files;
    let chain = certificates("--tls-cert", certificate)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| TlsError::Pem {
        flag: "--tls-key",
        file: key.clone(),
        error,
    })?;
    let unusable = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?;
    let builder = match client_authorities {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates("--tls-client-ca", file)? {
                roots.add(authority).map_err(|error| unusable(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unusable(&error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config: rustls::ServerConfig =
        builder.with_single_cert(chain, key).map_err(|error| unusable(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(flag: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| TlsError::Pem { flag, file: file.to_owned(), error })?;
    if all.is_empty() {
        return Err(TlsError::Empty { flag, file: file.to_owned() });
    }
    Ok(all)
}
