//! Whom the client of a localv1 server trusts, and who it is: files, read anew at each attempt to connect, so that whatever renews
//! certificates need not start the agent anew. Not for what a server makes of them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::source::words::quote;

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
    pub(super) fn read(&self) -> Result<ClientTlsConfig, String> {
        let ca = read(&self.ca, "--api-ca")?;
        check_authority(&ca).map_err(|why| of_no_use(&self.ca, "--api-ca", &why))?;
        // A server of HTTP/2 need not say that it is one.
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).assume_http2(true);
        let Some((certificate_file, key_file)) = &self.identity else { return Ok(config) };
        let certificate = read(certificate_file, "--api-cert")?;
        if certificates(&certificate)?.is_empty() {
            return Err(of_no_use(certificate_file, "--api-cert", "has no certificate in it"));
        }
        let key = read(key_file, "--api-key")?;
        if PrivateKeyDer::from_pem_slice(&key).is_err() {
            return Err(of_no_use(key_file, "--api-key", "has no private key in it"));
        }
        Ok(config.identity(Identity::from_pem(certificate, key)))
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
    read.map_err(|error| quote(&error.to_string()))
}

/// A bundle may have certificates in it that rustls does not understand; nobody would be trusted if there were no other.
fn check_authority(pem: &[u8]) -> Result<(), String> {
    let certificates = certificates(pem).map_err(|error| format!("cannot be understood ({error})"))?;
    if certificates.is_empty() {
        return Err("has no certificate in it".to_owned());
    }
    match RootCertStore::empty().add_parsable_certificates(certificates) {
        (0, _) => Err("has no certificate in it that can be understood".to_owned()),
        _ => Ok(()),
    }
}
