//! An EndpointSlice: some of a Service's pods, of one address family.

use std::{fmt, net::IpAddr, ops::Deref};

use super::{Family, NodeName, ObjectName, Protocol};

/// An EndpointSlice, reduced to what proxier needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name of the slice itself.
    pub name: ObjectName,
    /// The Service that it belongs to (label `kubernetes.io/service-name`).
    pub service: Option<ObjectName>,
    /// `addressType`.
    pub family: Family,
    /// The pods.
    pub endpoints: Box<[Endpoint]>,
    /// The ports that all of them have.
    pub ports: Box<[EndpointPort]>,
}

/// A pod, or whatever else answers for a Service. A large cluster has tens of thousands of them on every node, so what
/// repeats is shared and nothing has room to spare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// All of the slice's family.
    pub addresses: Addresses,
    /// Whether it takes new clients.
    pub ready: bool,
    /// Whether it answers, be it that it is about to end.
    pub serving: bool,
    /// Whether it is about to end.
    pub terminating: bool,
    /// The node that it runs on.
    pub node: Option<NodeName>,
    /// `hostname`.
    pub hostname: Option<Box<str>>,
    /// `targetRef`: what the two families of a pod have in common.
    pub target: Option<ObjectName>,
}

/// An entry of an EndpointSlice's `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// The name of the Service's port; may be empty.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The pods' port; none stands for every port.
    pub port: Option<u16>,
}

/// The addresses of an endpoint, in order: a slice of them. There is one as a rule (consumers are to treat them as
/// interchangeable, says the API), which is kept in place.
#[derive(Clone, PartialEq, Eq)]
pub struct Addresses(Repr);

#[derive(Clone, PartialEq, Eq)]
enum Repr {
    One(IpAddr),
    Others(Box<[IpAddr]>),
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Repr::One(address) => std::slice::from_ref(address),
            Repr::Others(addresses) => addresses,
        }
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let addresses: Box<[IpAddr]> = addresses.into_iter().collect();
        Self(if let [address] = *addresses { Repr::One(address) } else { Repr::Others(addresses) })
    }
}

impl<'a> IntoIterator for &'a Addresses {
    type Item = &'a IpAddr;
    type IntoIter = std::slice::Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// What an address is, if no pod can have it: the API server refuses these, others say anything.
#[must_use]
pub fn not_a_pods(address: IpAddr) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    [
        (address.is_unspecified(), "the unspecified address"),
        (address.is_loopback(), "a loopback address"),
        (address.is_multicast(), "a multicast address"),
        (link_local, "a link-local address"),
        (mapped, "an IPv4 address written as IPv6"),
    ]
    .into_iter()
    .find_map(|(is, what)| is.then_some(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_addresses_there_are_they_keep_their_order() {
        let all: Vec<IpAddr> = (1..4).map(|n| IpAddr::from([11, 0, 0, 4 - n])).collect();
        for count in 0..=all.len() {
            let addresses: Addresses = all[..count].iter().copied().collect();
            assert_eq!(*addresses, all[..count]);
            assert_eq!(format!("{addresses:?}"), format!("{:?}", &all[..count]));
        }
    }

    #[test]
    fn an_endpoint_takes_less_than_two_cache_lines() {
        assert!(size_of::<Endpoint>() <= 96, "{} bytes", size_of::<Endpoint>());
    }
}
