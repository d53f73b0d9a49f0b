//! Certificates: who is let in, and what becomes of files that change.

use std::{fs, path::PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tonic::transport::{Certificate, ClientTlsConfig, Identity as ClientIdentity};

use super::*;

const SERVER: &str = "api.proxier.test";

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, PEM.
    pem: String,
}

/// A certificate and its key, PEM.
struct Issued {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, name: &str) -> Issued {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Issued { certificate, key: key.serialize_pem() }
    }
}

/// The server's files.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new(server: &Issued, clients: Option<&Authority>) -> Self {
        let files = Self { directory: tempfile::tempdir().unwrap() };
        files.renew(server);
        if let Some(clients) = clients {
            files.write("ca.crt", &clients.pem);
        }
        files
    }

    fn renew(&self, server: &Issued) {
        self.write("tls.crt", &server.certificate);
        self.write("tls.key", &server.key);
    }

    /// As those do it who renew them: whole, in place of the former one.
    fn write(&self, name: &str, text: &str) {
        let new = self.path("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.path(name)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn names(&self) -> TlsFiles {
        let authorities = self.path("ca.crt");
        TlsFiles {
            certificate: self.path("tls.crt"),
            key: self.path("tls.key"),
            client_authorities: authorities.exists().then_some(authorities),
        }
    }

    fn identity(&self, look_every: Duration) -> Identity {
        Identity::read(self.names(), look_every).unwrap()
    }

    /// A server with these files, that looks whether they have changed at every connection.
    fn serve(&self) -> World {
        let address = "tcp://127.0.0.1:0".parse().unwrap();
        let mut world = World::at(&address, Some(self.identity(Duration::ZERO)));
        world.put([web()]);
        world
    }
}

/// A client that trusts one authority, with a certificate or without.
async fn client(world: &World, trusts: &Authority, own: Option<&Issued>) -> Result<Watch, Status> {
    let mut config =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&trusts.pem)).domain_name(SERVER);
    if let Some(Issued { certificate, key }) = own {
        config = config.identity(ClientIdentity::from_pem(certificate, key));
    }
    let ListenAddress::Tcp(address) = world.sink.bound() else { panic!("{:?}", world.sink) };
    let server = Server::try_from(format!("https://{address}")).unwrap().tls_config(config).unwrap();
    let mut watch = Watch::open(server.connect_lazy(), "node1").await?;
    watch.ask().await;
    // TLS 1.3 tells a client that it is not let in when it has sent its first words.
    watch.batch().await?;
    Ok(watch)
}

#[tokio::test]
async fn only_clients_of_the_authority_are_let_in() {
    let (servers, clients, others) = (Authority::new(), Authority::new(), Authority::new());
    let files = Files::new(&servers.issue(SERVER), Some(&clients));
    let mut world = files.serve();
    let mut watch = client(&world, &servers, Some(&clients.issue("node1"))).await.unwrap();
    assert_eq!(watch.values.len(), 1);

    client(&world, &servers, None).await.map(drop).unwrap_err();
    client(&world, &servers, Some(&others.issue("node1"))).await.map(drop).unwrap_err();
    // Its own kind of certificate is no client's.
    client(&world, &servers, Some(&servers.issue(SERVER))).await.map(drop).unwrap_err();
    Watch::open(world.channel(), "node1").await.map(drop).unwrap_err();
    world.until_metric("proxier_api_clients", 1).await;

    world.put([mk_service("web", []).into()]);
    assert_eq!(watch.next().await, ["set default/web", "sync"], "who was let in notices nothing");
}

#[tokio::test]
async fn without_an_authority_for_clients_everybody_is_served_who_speaks_tls() {
    let servers = Authority::new();
    let files = Files::new(&servers.issue(SERVER), None);
    assert!(!files.identity(Duration::ZERO).asks_clients());
    let world = files.serve();
    client(&world, &servers, None).await.unwrap();
    client(&world, &servers, Some(&Authority::new().issue("node1"))).await.unwrap();
    Watch::open(world.channel(), "node1").await.map(drop).unwrap_err();
}

#[tokio::test]
async fn new_connections_get_renewed_certificates_and_old_ones_go_on() {
    let (former, next) = (Authority::new(), Authority::new());
    let files = Files::new(&former.issue(SERVER), Some(&former));
    let mut world = files.serve();
    let own = former.issue("node1");
    let mut before = client(&world, &former, Some(&own)).await.unwrap();

    files.renew(&next.issue(SERVER));
    client(&world, &next, Some(&own)).await.unwrap();
    client(&world, &former, Some(&own)).await.map(drop).unwrap_err();

    files.write("ca.crt", &next.pem);
    client(&world, &next, Some(&next.issue("node1"))).await.unwrap();
    client(&world, &next, Some(&own)).await.map(drop).unwrap_err();

    world.put([mk_service("web", []).into()]);
    assert_eq!(before.next().await, ["set default/web", "sync"]);
}

#[tokio::test]
async fn what_was_read_before_serves_while_new_files_cannot_be_used() {
    let (former, next) = (Authority::new(), Authority::new());
    let files = Files::new(&former.issue(SERVER), None);
    let world = files.serve();
    let server = next.issue(SERVER);

    // The certificate is there before its key.
    files.write("tls.crt", &server.certificate);
    client(&world, &former, None).await.unwrap();
    files.write("tls.key", "garbage");
    client(&world, &former, None).await.unwrap();
    fs::remove_file(files.path("tls.key")).unwrap();
    client(&world, &former, None).await.unwrap();

    files.write("tls.key", &server.key);
    client(&world, &next, None).await.unwrap();
}

#[test]
fn files_are_looked_at_from_time_to_time_and_read_when_they_have_changed() {
    let authority = Authority::new();
    let files = Files::new(&authority.issue(SERVER), None);
    let rarely = files.identity(Duration::from_secs(3600));
    let always = files.identity(Duration::ZERO);
    let (first_rarely, first_always) = (rarely.config(), always.config());
    assert!(Arc::ptr_eq(&first_always, &always.config()), "nothing has changed");
    files.renew(&authority.issue(SERVER));
    assert!(Arc::ptr_eq(&first_rarely, &rarely.config()), "not looked at yet");
    let second = always.config();
    assert!(!Arc::ptr_eq(&first_always, &second));
    assert!(Arc::ptr_eq(&second, &always.config()));
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_its_flag() {
    let authority = Authority::new();
    let files = Files::new(&authority.issue(SERVER), Some(&authority));
    let refused = || Identity::read(files.names(), Duration::ZERO).unwrap_err().to_string();
    let good = |name: &str| fs::read_to_string(files.path(name)).unwrap();
    for (name, flag, text) in [
        ("tls.crt", "--tls-cert", ""),
        ("tls.crt", "--tls-cert", "garbage"),
        ("tls.crt", "--tls-cert", "-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n"),
        ("tls.key", "--tls-key", ""),
        ("tls.key", "--tls-key", &good("tls.crt")),
        ("ca.crt", "--tls-client-ca", ""),
        ("ca.crt", "--tls-client-ca", &good("tls.key")),
    ] {
        let before = good(name);
        files.write(name, text);
        let error = refused();
        assert!(error.contains(&files.path(name).display().to_string()), "{error}");
        assert!(error.contains(flag), "{error}");
        files.write(name, &before);
    }
    files.write("tls.key", &authority.issue(SERVER).key);
    assert!(refused().contains("belong together"), "{}", refused());
}
