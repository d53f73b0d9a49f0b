//! localv1's Endpoint -> the model's, one for each address family that it has, and which slice each of them is in. The API knows no
//! slices: all endpoints of a Service that have family and ports in common are one.

use std::{fmt::Write as _, net::IpAddr, sync::Arc};

use proxier_common::MAX_NAME;
use proxier_localv1::{self as localv1, Path, PortName};

use super::reporter::Reporter;
use crate::model::{
    Addresses, Endpoint, EndpointPort, EndpointSlice, Family, NodeName, ObjectName, Protocol, not_a_pods,
};

/// The longest name of a pod (RFC 1123's for a subdomain), and what proxier appends to it.
const MAX_KEY: usize = 253 + 3;

/// As many hexadecimal digits has the key that kpng gives to an endpoint that names no pod.
const HASH_DIGITS: usize = 16;

/// What the endpoints of a slice have in common, beside the Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    family: Family,
    /// Name and number; none stands for every port.
    ports: Box<[(Box<str>, Option<u16>)]>,
}

impl Slot {
    /// The slice's name, of which no other slice has one: a Service's name has no slash, a port's is cut off by a comma, and commas
    /// within it are escaped.
    pub(super) fn slice_name(&self, service: &ObjectName) -> ObjectName {
        let mut name = format!("{}/{}", service.name, self.family);
        for (index, (port, number)) in self.ports.iter().enumerate() {
            name.push(if index == 0 { '/' } else { ',' });
            if let Some(number) = number {
                // Writing to a string does not fail.
                let _ = write!(name, "{number}");
            }
            if !port.is_empty() {
                name.push(':');
                name += &port.replace('%', "%25").replace(',', "%2C");
            }
        }
        ObjectName::new(Arc::clone(&service.namespace), name)
    }

    /// The slice, with these endpoints.
    pub(super) fn slice(&self, service: &ObjectName, endpoints: Vec<Endpoint>) -> EndpointSlice {
        let ports = self.ports.iter();
        EndpointSlice {
            name: self.slice_name(service),
            service: Some(service.clone()),
            family: self.family,
            endpoints: endpoints.into(),
            ports: ports
                .map(|(name, port)| EndpointPort {
                    name: name.to_string(),
                    // The API does not say it: the Service's port of that name does.
                    protocol: Protocol::Tcp,
                    port: *port,
                })
                .collect(),
        }
    }
}

/// Where the value at a path is one of an endpoint: its Service and its key.
pub(super) fn place(path: &str) -> Option<(ObjectName, &str)> {
    let Path { namespace, name, key } = Path::parse(path).ok()?;
    Some((ObjectName::new(namespace, name), key?))
}

/// What the value at a path is on `node`: nothing, an endpoint, or one of each family, each in another slot.
pub(super) fn endpoints(
    path: &str,
    bytes: &[u8],
    node: &NodeName,
    report: &mut Reporter,
) -> Vec<(Slot, Endpoint)> {
    let Some((service, key)) = place(path) else {
        report.report_whole(
            "",
            "is at a path that is none of an endpoint: left out",
            "let the server have endpoints at namespace/name/key",
        );
        return Vec::new();
    };
    report.in_endpoint(key);
    if key.len() > MAX_KEY || service.namespace.len().max(service.name.len()) > MAX_NAME {
        report.report_whole(
            "",
            "is at a path that is longer than those of pods: left out",
            "write a shorter name",
        );
        return Vec::new();
    }
    let Some(value) = report.decoded::<localv1::Endpoint>(bytes) else { return Vec::new() };
    let mut addresses = report.addresses("IPs", value.ips.as_ref());
    addresses.retain(|address| {
        let Some(what) = not_a_pods(*address) else { return true };
        let reason = format!("is {what}: left out");
        report.report("IPs", &address.to_string(), &reason, "let the server's source say the pod's address");
        false
    });
    if addresses.is_empty() {
        // One of which an address was wrong has been told of.
        if value.ips.is_none_or(|ips| ips.v4.is_empty() && ips.v6.is_empty()) {
            report.report_whole("", "has no address: left out", "let the server's source say one");
        }
        return Vec::new();
    }
    let ports: Box<[_]> = value
        .port_overrides
        .into_iter()
        .enumerate()
        .filter_map(|(index, port)| endpoint_port(index, port, report))
        .collect();
    let families: Vec<Family> = Family::ALL
        .into_iter()
        .filter(|family| addresses.iter().any(|address| Family::of(*address) == *family))
        .collect();
    let endpoint = Endpoint {
        addresses: std::iter::empty().collect(),
        // Who drains keeps what it has and gets nothing new, even if there is nobody else; that it be about to end would mean
        // the contrary (`desired::select`), and the server has decided.
        ready: !value.draining,
        serving: true,
        terminating: false,
        // Of the others the API does not say where they are.
        node: value.local.then(|| node.clone()),
        hostname: Some(value.hostname).filter(|hostname| !hostname.is_empty()).map(Into::into),
        target: pod(key, &families).map(|pod| ObjectName::new(Arc::clone(&service.namespace), pod)),
    };
    families
        .into_iter()
        .map(|family| {
            let of_family = addresses.iter().copied().filter(|address| Family::of(*address) == family);
            let endpoint = Endpoint { addresses: of_family.collect::<Addresses>(), ..endpoint.clone() };
            (Slot { family, ports: ports.clone() }, endpoint)
        })
        .collect()
}

fn endpoint_port(
    index: usize,
    PortName { name, port }: PortName,
    report: &mut Reporter,
) -> Option<(Box<str>, Option<u16>)> {
    let field = |field: &str| format!("PortOverrides[{index}].{field}");
    if name.len() > MAX_NAME {
        report.report(
            &field("Name"),
            &name,
            "is longer than a port's name can be: port left out",
            "write a shorter one",
        );
        return None;
    }
    let number = if port == 0 { None } else { Some(report.port(&field("Port"), port)?) };
    Some((name.into(), number))
}

/// The pod that an endpoint's key names, if it names one. proxier's keys say the family as well (`alpine-1.v4`), since a pod's two
/// families would else be one value; kpng's do not, or are a hash.
fn pod<'a>(key: &'a str, families: &[Family]) -> Option<&'a str> {
    let suffix = match families {
        [Family::V4] => ".v4",
        [Family::V6] => ".v6",
        _ => "",
    };
    let named = key.strip_suffix(suffix).filter(|pod| !suffix.is_empty() && !pod.is_empty());
    let is_hash = || key.len() == HASH_DIGITS && key.bytes().all(|c| c.is_ascii_hexdigit());
    named.or_else(|| (key.parse::<IpAddr>().is_err() && !is_hash()).then_some(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_a_pod_or_none() {
        for (key, families, names) in [
            ("alpine-1", &[Family::V6][..], Some("alpine-1")),
            ("alpine-1.v4", &[Family::V4], Some("alpine-1")),
            ("alpine-1.v6", &[Family::V6], Some("alpine-1")),
            // A pod may have such a name.
            ("alpine.v4", &[Family::V6], Some("alpine.v4")),
            ("alpine.v4", &[Family::V4, Family::V6], Some("alpine.v4")),
            ("11.0.2.2", &[Family::V4], None),
            ("1100::202", &[Family::V6], None),
            ("0123456789abcdef", &[Family::V4], None),
            ("0123456789abcdeg", &[Family::V4], Some("0123456789abcdeg")),
            (".v4", &[Family::V4], Some(".v4")),
        ] {
            assert_eq!(pod(key, families), names, "{key}");
        }
    }

    #[test]
    fn slices_of_different_ports_have_different_names() {
        let service = ObjectName::new("default", "web");
        let lists: [&[(&str, Option<u16>)]; 13] = [
            &[],
            &[("", None)],
            &[("", None), ("", None)],
            &[("", Some(1))],
            &[("", Some(12))],
            &[("", Some(1)), ("", Some(2))],
            &[("a", Some(1)), ("b", Some(2))],
            &[("a,2:b", Some(1))],
            &[("a%2C2:b", Some(1))],
            &[("a", Some(1)), ("b", None)],
            &[("b", Some(2)), ("a", Some(1))],
            &[("1", None)],
            &[("/", Some(1))],
        ];
        let mut names = std::collections::BTreeSet::new();
        for family in Family::ALL {
            for list in lists {
                let ports = list.iter().map(|(name, port)| ((*name).into(), *port)).collect();
                assert!(names.insert(Slot { family, ports }.slice_name(&service)), "{list:?}");
            }
        }
        let sip =
            Slot { family: Family::V4, ports: [("sip".into(), Some(15060)), ("".into(), Some(1))].into() };
        assert_eq!(sip.slice_name(&service).to_string(), "default/web/IPv4/15060:sip,1");
    }
}
