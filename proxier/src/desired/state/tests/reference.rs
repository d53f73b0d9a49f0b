//! Who owns which address, worked out as the rules are told, by going through everything: what the indexes of a
//! [`State`](super::State) must come to.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

type Complaints = BTreeSet<(ObjectName, IpAddr, ProblemKind)>;

pub(super) fn of(
    objects: &BTreeMap<ObjectId, Object>,
    settings: &Settings,
) -> (BTreeMap<IpAddr, ObjectName>, Complaints) {
    let mut services: Vec<&Service> = objects
        .values()
        .filter_map(|object| match object {
            Object::Service(service) if service.service_type != ServiceType::ExternalName => Some(&**service),
            _ => None,
        })
        .collect();
    services.sort_by_key(|service| (service.created.is_none(), service.created, service.name.clone()));

    let mut counted: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    let (mut owners, mut complaints) = (BTreeMap::new(), BTreeSet::new());
    for service in services {
        let ingress = service.load_balancer_ingress.iter().map(|ingress| ingress.address);
        let claimed: BTreeSet<IpAddr> = service.external_ips.iter().copied().chain(ingress).collect();
        for address in claimed {
            let places = counted.entry(&service.name.namespace).or_default();
            let limit = settings.max_externals_per_namespace.map_or(usize::MAX, |limit| limit as usize);
            // Of those that are refused for another reason as well, a place is used all the same.
            let has_place = places.contains(&address) || places.len() < limit;
            if has_place {
                places.insert(address);
            }
            let complaint =
                if is_taken(address, objects, settings) || !is_in_range(address, service, settings) {
                    ProblemKind::AddressRejected
                } else if !has_place {
                    ProblemKind::AddressLimitExceeded
                } else if *owners.entry(address).or_insert_with(|| service.name.clone()) != service.name {
                    ProblemKind::AddressConflict
                } else {
                    continue;
                };
            complaints.insert((service.name.clone(), address, complaint));
        }
    }
    (owners, complaints)
}

fn is_taken(address: IpAddr, objects: &BTreeMap<ObjectId, Object>, settings: &Settings) -> bool {
    address.is_loopback()
        || settings.local_addresses.identities.contains(&address)
        || settings.local_addresses.broadcasts.contains(&address)
        || settings.api_server_addresses.contains(&address)
        || settings.cluster_cidrs.iter().any(|cidr| cidr.contains(&address))
        || objects.values().any(|object| match object {
            Object::Service(service) => service.cluster_ips.contains(&address),
            Object::EndpointSlice(slice) => {
                slice.endpoints.iter().any(|endpoint| endpoint.addresses.contains(&address))
            }
            Object::Node(node) => {
                node.addresses.contains(&address) || node.pod_cidrs.iter().any(|cidr| cidr.contains(&address))
            }
        })
}

fn is_in_range(address: IpAddr, service: &Service, settings: &Settings) -> bool {
    let mut holding: Vec<_> =
        settings.external_cidrs.iter().filter(|range| range.cidr.contains(&address)).collect();
    let longest = holding.iter().map(|range| range.cidr.prefix_len()).max();
    holding.retain(|range| Some(range.cidr.prefix_len()) == longest);
    settings.external_cidrs.is_empty()
        || holding
            .iter()
            .any(|range| range.namespace.as_ref().is_none_or(|own| *own == service.name.namespace))
}
