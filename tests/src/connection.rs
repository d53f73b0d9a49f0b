//! A TCP connection through an external address that stays open while things change. Panics where something is not as it
//! should be, as a test does.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
};

use crate::{exchange::PATIENCE, host::Host, responder::Sighting, scenario::Scenario};

/// A port that pods listen on and no Service names.
const PORT: u16 = 8443;

/// A connection, and the pod at its other end.
#[derive(Debug)]
pub struct Connection {
    /// The client's end.
    pub stream: TcpStream,
    /// The pod's name.
    pub pod: String,
}

impl Connection {
    /// Opens one from the lab's client.
    #[must_use]
    pub fn open(scenario: &Scenario, external: IpAddr, from_port: u16) -> Self {
        Self::from(&scenario.lab.client, external, from_port)
    }

    /// Opens one from any host.
    ///
    /// # Panics
    ///
    /// When it cannot be opened, or no pod says who it is.
    #[must_use]
    pub fn from(client: &Host, external: IpAddr, from_port: u16) -> Self {
        let from = SocketAddr::new(client.address(external), from_port);
        let mut stream = client
            .connect(from, SocketAddr::new(external, PORT), PATIENCE)
            .unwrap_or_else(|error| panic!("{from} to {external}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap_or_else(|error| panic!("{error}"));
        let mut banner = [0; 256];
        let size = stream.read(&mut banner).unwrap_or_else(|error| panic!("no banner: {error}"));
        let sighting = Sighting::in_answer(&banner[..size]).unwrap_or_else(|| panic!("no pod in {banner:?}"));
        Self { stream, pod: sighting.host }
    }

    /// Sends something and reads it back.
    ///
    /// # Panics
    ///
    /// When the connection is broken.
    pub fn goes_on(&mut self, when: &str) {
        let mut echo = [0; 8];
        self.stream.write_all(b"question").unwrap_or_else(|error| panic!("{when}: {error}"));
        self.stream.read_exact(&mut echo).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert_eq!(&echo, b"question", "{when}");
    }
}
