//! Whom the client of a localv1 server trusts, and who it is: files, read anew at each attempt to connect, so that whatever renews
//! certificates need not start the agent anew. Not for what a server makes of them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

use crate::source::words::chain;

/// Where the files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Certificates of whoever signs the server's, in PEM form.
    pub ca: PathBuf,
    /// Our own certificate and its key, if the server wants to know who we are.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Credentials {
    /// What a connection needs of them.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is of no use: in words that name the file, its flag and the next step.
    pub(super) fn read(&self) -> Result<TlsConnector, String> {
        let roots =
            authorities(&read(&self.ca, "--api-ca")?).map_err(|why| of_no_use(&self.ca, "--api-ca", &why))?;
        // By name: a process may be linked with another provider as well.
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS cannot be set up: {}", chain(&error)))?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate_file, key_file)) => {
                let certificates = certificates(&read(certificate_file, "--api-cert")?)
                    .map_err(|why| of_no_use(certificate_file, "--api-cert", &why))?;
                let key = PrivateKeyDer::from_pem_slice(&read(key_file, "--api-key")?)
                    .map_err(|_| of_no_use(key_file, "--api-key", "has no private key in it"))?;
                builder.with_client_auth_cert(certificates, key).map_err(|error| {
                    let files = format!("{} and {}", certificate_file.display(), key_file.display());
                    format!(
                        "{files} cannot be used together: {}; check --api-cert and --api-key",
                        chain(&error)
                    )
                })?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config).into())
    }
}

fn read(path: &Path, flag: &str) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| {
        format!("{} cannot be read: {error}; check {flag}, and who may read the file", path.display())
    })
}

fn of_no_use(path: &Path, flag: &str, why: &str) -> String {
    format!("{} {why}; give {flag} a file in PEM form", path.display())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = read.map_err(|error| format!("cannot be understood ({})", chain(&error)))?;
    if certificates.is_empty() {
        return Err("has no certificate in it".to_owned());
    }
    Ok(certificates)
}

/// A bundle may have certificates in it that rustls does not understand; nobody would be trusted if there were no other.
fn authorities(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match roots.add_parsable_certificates(certificates(pem)?) {
        (0, _) => Err("has no certificate in it that can be understood".to_owned()),
        _ => Ok(roots),
    }
}
