//! Whose an external address is: one Service's and no other's, the same on every node; and which addresses no
//! Service may ever have, because taking them would cut off the node or somebody else's traffic (CVE-2020-8554).
//! Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use super::Settings;
use crate::{
    catalog::Catalog,
    model::{CreationTime, ObjectId, ObjectName, Problem, Service, Severity, Subject},
};

/// That a Service wants an address.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    /// The Service.
    pub service: &'a Service,
    /// The address.
    pub address: IpAddr,
    /// The field that says so, for messages.
    pub field: String,
}

/// What a Service claims. One that claims nothing is reported: its label says that it wants to.
pub fn claims<'a>(service: &'a Service, settings: &Settings, problems: &mut Vec<Problem>) -> Vec<Claim<'a>> {
    let mut claims: Vec<Claim<'a>> = Vec::new();
    let mut claim = |address: IpAddr, field: String| {
        // The same address as externalIP and load balancer address is one claim.
        if !claims.iter().any(|claim| claim.address == address) {
            claims.push(Claim { service, address, field });
        }
    };
    if settings.external_ips {
        for (index, address) in service.external_ips.iter().enumerate() {
            claim(*address, format!("spec.externalIPs[{index}]"));
        }
    }
    if settings.load_balancer_ips {
        for address in service.load_balancer_ips() {
            claim(address, "status.loadBalancer.ingress".to_owned());
        }
    }
    if claims.is_empty() {
        problems.push(Problem::new(
            Severity::Info,
            Subject::Object(ObjectId::Service(service.name.clone())),
            "has no external address: nothing is delivered",
            "write spec.externalIPs, or let a load balancer set status.loadBalancer.ingress",
        ));
    }
    claims
}

/// Gives every claimed address to one Service.
pub fn settle<'a>(
    claims: Vec<Claim<'a>>,
    catalog: &Catalog,
    settings: &Settings,
    problems: &mut Vec<Problem>,
) -> Vec<(&'a Service, BTreeSet<IpAddr>)> {
    let taken = Taken::of(catalog);
    let mut by_address: BTreeMap<IpAddr, Vec<Claim<'a>>> = BTreeMap::new();
    for claim in claims {
        match taken.refuses(claim.address, settings) {
            Some((reason, next_step)) => problems.push(
                Problem::new(
                    Severity::Warning,
                    Subject::Object(ObjectId::Service(claim.service.name.clone())),
                    format!("{reason}: not taken"),
                    next_step,
                )
                .in_field(claim.field, claim.address.to_string()),
            ),
            None => by_address.entry(claim.address).or_default().push(claim),
        }
    }

    let mut owned: BTreeMap<&ObjectName, (&'a Service, BTreeSet<IpAddr>)> = BTreeMap::new();
    for (address, mut claims) in by_address {
        claims.sort_by(|a, b| seniority(a.service).cmp(&seniority(b.service)));
        let mut claims = claims.into_iter();
        let Some(winner) = claims.next().map(|claim| claim.service) else { continue };
        owned.entry(&winner.name).or_insert_with(|| (winner, BTreeSet::new())).1.insert(address);
        for loser in claims {
            problems.push(
                Problem::new(
                    Severity::Warning,
                    Subject::Object(ObjectId::Service(loser.service.name.clone())),
                    format!(
                        "belongs to Service {}, which comes first (older, or before it by name), until that goes",
                        winner.name
                    ),
                    "give one of the two another address",
                )
                .in_field(loser.field, address.to_string()),
            );
        }
    }
    owned.into_values().collect()
}

/// What the oldest Service has the least of. Every node sees the same objects, so every node decides alike.
fn seniority(service: &Service) -> impl Ord + '_ {
    // A manifest has no time: it comes after what a cluster holds.
    (service.created.map_or((true, CreationTime(0)), |created| (false, created)), &service.name, &service.uid)
}

/// Addresses that belong to something in the catalog.
struct Taken<'a> {
    nodes: BTreeMap<IpAddr, String>,
    endpoints: BTreeSet<IpAddr>,
    clusters: BTreeMap<IpAddr, &'a ObjectName>,
}

impl<'a> Taken<'a> {
    fn of(catalog: &'a Catalog) -> Self {
        let nodes = catalog
            .nodes()
            .flat_map(|node| node.addresses.iter().map(|address| (*address, node.name.to_string())))
            .collect();
        let clusters = catalog
            .services()
            .flat_map(|service| service.cluster_ips.iter().map(|address| (*address, &service.name)))
            .collect();
        Self { nodes, endpoints: catalog.endpoint_addresses(), clusters }
    }

    /// Why no Service may have this address, and what to do about it.
    fn refuses(&self, address: IpAddr, settings: &Settings) -> Option<(String, String)> {
        if let Some(what) = never_external(address) {
            return Some((format!("is {what}"), "write an address that routers can forward".to_owned()));
        }
        if let Some(node) = self.nodes.get(&address) {
            return Some((
                format!("is an address of Node {node}"),
                "write an address that no node has".to_owned(),
            ));
        }
        if settings.local_addresses.identities.contains(&address) {
            return Some((
                "is an address of an interface of this node, which would be cut off".to_owned(),
                format!(
                    "write an address that no node has; or if it is there to attract traffic alone, move it to the \
                     interface lo (`ip address show to {address}` shows where it is)"
                ),
            ));
        }
        if self.endpoints.contains(&address) {
            return Some((
                "is the address of a pod".to_owned(),
                "write an address outside the pods' ranges".to_owned(),
            ));
        }
        if let Some(service) = self.clusters.get(&address) {
            return Some((
                format!("is the cluster address of Service {service}"),
                "write an address outside the Services' range".to_owned(),
            ));
        }
        let cidrs = &settings.external_cidrs;
        if !cidrs.is_empty() && !cidrs.iter().any(|cidr| cidr.contains(&address)) {
            let list: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
            return Some((
                format!("lies outside --external-cidr {}", list.join(",")),
                "write an address inside, or start proxier with a range that holds it".to_owned(),
            ));
        }
        None
    }
}

/// Whether packets with this address leave the link that they are on.
pub fn is_routable(address: IpAddr) -> bool {
    never_external(address).is_none()
}

/// What an address is, if it can never be an external address, whatever the cluster.
fn never_external(address: IpAddr) -> Option<&'static str> {
    let what = match address {
        IpAddr::V4(v4) if v4 == Ipv4Addr::BROADCAST => "the broadcast address",
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "of the network 0.0.0.0/8, which stands for none",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        // The maps keep IPv4 like this, so it would be that IPv4 address.
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "an IPv4 address written as IPv6",
        _ if address.is_unspecified() => "the unspecified address",
        _ if address.is_loopback() => "a loopback address",
        _ if address.is_multicast() => "a multicast address",
        _ => return None,
    };
    Some(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Object,
        testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice},
    };
    use crate::{
        desired::{Desired, LocalAddresses, compute},
        model::NodeName,
    };

    fn desired(objects: Vec<Object>, settings: &Settings) -> (Desired, Vec<Problem>) {
        let mut catalog = Catalog::default();
        for object in objects {
            if let Object::Service(service) = &object {
                give_pods(&mut catalog, &service.name.name);
            }
            catalog.apply(object);
        }
        compute(&catalog, settings)
    }

    /// So that nothing but its addresses is wrong with a Service.
    fn give_pods(catalog: &mut Catalog, service: &str) {
        for (family, pod) in [(4, "11.255.0.2"), (6, "1100:ffff::2")] {
            let slice = mk_slice(&format!("{service}-{family}"), service, [mk_endpoint(pod, "node1")]);
            catalog.apply(slice.into());
        }
    }

    fn owner_of(desired: &Desired, address: &str) -> Option<String> {
        let address: IpAddr = address.parse().unwrap();
        let mut owners = desired
            .services
            .iter()
            .filter(|(_, service)| service.externals.contains(&address))
            .map(|(key, _)| key.service.name.clone());
        let owner = owners.next();
        assert_eq!(owners.next(), None, "{address} has two owners");
        owner
    }

    fn settings() -> Settings {
        Settings::new(NodeName::new("node1"))
    }

    fn created(service: Service, seconds: i64) -> Service {
        Service { created: Some(CreationTime(seconds)), ..service }
    }

    #[test]
    fn the_oldest_service_has_the_address_and_the_other_is_reported() {
        let old = created(mk_service("z-old", ["10.0.0.55"]), 100);
        let new = created(mk_service("a-new", ["10.0.0.55", "10.0.0.56"]), 200);
        let (desired, problems) = desired(vec![new.into(), old.into()], &settings());
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("z-old"));
        assert_eq!(owner_of(&desired, "10.0.0.56").as_deref(), Some("a-new"));
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "Service default/a-new: spec.externalIPs[0] \"10.0.0.55\" belongs to Service default/z-old, which \
                 comes first (older, or before it by name), until that goes; give one of the two another address"
            ]
        );
    }

    #[test]
    fn the_loser_takes_over_when_the_winner_goes() {
        let old = created(mk_service("old", ["10.0.0.55"]), 100);
        let new = created(mk_service("new", ["10.0.0.55"]), 200);
        let mut catalog = Catalog::default();
        give_pods(&mut catalog, "old");
        give_pods(&mut catalog, "new");
        catalog.apply(old.clone().into());
        catalog.apply(new.into());
        assert_eq!(owner_of(&compute(&catalog, &settings()).0, "10.0.0.55").as_deref(), Some("old"));
        catalog.delete(&ObjectId::Service(old.name));
        let (desired, problems) = compute(&catalog, &settings());
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("new"));
        assert_eq!(problems, []);
    }

    #[test]
    fn of_two_services_of_one_age_the_first_by_name_has_the_address() {
        let a = created(mk_service("a", ["10.0.0.55"]), 100);
        let b = created(mk_service("b", ["10.0.0.55"]), 100);
        let (desired, _) = desired(vec![b.into(), a.into()], &settings());
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("a"));
    }

    #[test]
    fn a_service_without_a_creation_time_comes_last() {
        let timeless = mk_service("a", ["10.0.0.55"]);
        let dated = created(mk_service("b", ["10.0.0.55"]), i64::MAX);
        let (desired, _) = desired(vec![timeless.into(), dated.into()], &settings());
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("b"));
    }

    #[test]
    fn an_address_that_is_no_destination_for_routers_is_never_taken() {
        for address in [
            "127.0.0.1",
            "127.255.0.9",
            "::1",
            "169.254.169.254",
            "fe80::1",
            "224.0.0.1",
            "239.1.2.3",
            "ff02::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "255.255.255.255",
            "::ffff:10.0.0.55",
        ] {
            let (desired, problems) = desired(vec![mk_service("web", [address]).into()], &settings());
            assert_eq!(desired, Desired::default(), "{address}");
            assert_eq!(problems.len(), 1, "{address}");
            assert!(problems[0].to_string().contains(&format!("{address:?}")), "{}", problems[0]);
        }
    }

    #[test]
    fn an_address_of_any_node_is_never_taken() {
        let objects = vec![
            mk_service("web", ["192.168.1.2", "10.0.0.55"]).into(),
            mk_node("node2", ["192.168.1.2", "fd00:1::2"]).into(),
        ];
        let (desired, problems) = desired(objects, &settings());
        assert_eq!(owner_of(&desired, "192.168.1.2"), None);
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("web"));
        assert!(problems[0].to_string().contains("is an address of Node node2"), "{}", problems[0]);
    }

    #[test]
    fn an_address_of_this_nodes_interfaces_is_never_taken_even_if_no_node_object_says_so() {
        let local_addresses = LocalAddresses {
            identities: BTreeSet::from(["192.168.1.1".parse().unwrap()]),
            ..LocalAddresses::default()
        };
        let settings = Settings { local_addresses, ..settings() };
        let (desired, problems) =
            desired(vec![mk_service("web", ["192.168.1.1", "10.0.0.55"]).into()], &settings);
        assert_eq!(owner_of(&desired, "192.168.1.1"), None);
        assert_eq!(owner_of(&desired, "10.0.0.55").as_deref(), Some("web"));
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "Service default/web: spec.externalIPs[0] \"192.168.1.1\" is an address of an interface of this node, \
             which would be cut off: not taken; write an address that no node has; or if it is there to attract \
             traffic alone, move it to the interface lo (`ip address show to 192.168.1.1` shows where it is)"
            ]
        );
        assert_eq!(problems[0].severity, Severity::Warning);
    }

    #[test]
    fn a_pods_address_is_never_taken_be_it_another_services_pod_on_another_node() {
        let objects = vec![
            mk_service("web", ["11.0.1.2"]).into(),
            mk_slice("mail-1", "mail", [mk_endpoint("11.0.1.2", "node2")]).into(),
        ];
        let (desired, problems) = desired(objects, &settings());
        assert_eq!(owner_of(&desired, "11.0.1.2"), None);
        assert!(problems[0].to_string().contains("is the address of a pod"), "{}", problems[0]);
    }

    #[test]
    fn a_cluster_address_is_never_taken() {
        let mail =
            Service { cluster_ips: vec!["10.96.0.10".parse().unwrap()], ..mk_service("mail", ["10.0.0.1"]) };
        let (desired, problems) =
            desired(vec![mk_service("web", ["10.96.0.10"]).into(), mail.into()], &settings());
        assert_eq!(owner_of(&desired, "10.96.0.10"), None);
        assert!(
            problems[0].to_string().contains("cluster address of Service default/mail"),
            "{}",
            problems[0]
        );
    }

    #[test]
    fn an_address_outside_the_given_ranges_is_not_taken() {
        let settings = Settings {
            external_cidrs: vec!["10.0.0.0/24".parse().unwrap(), "1000::/64".parse().unwrap()],
            ..settings()
        };
        let web = mk_service("web", ["10.0.0.55", "10.0.1.55", "1000::55", "2000::55"]);
        let (desired, problems) = desired(vec![web.into()], &settings);
        for (address, owner) in
            [("10.0.0.55", Some("web")), ("10.0.1.55", None), ("1000::55", Some("web")), ("2000::55", None)]
        {
            assert_eq!(owner_of(&desired, address).as_deref(), owner, "{address}");
        }
        assert_eq!(problems.len(), 2);
        assert!(problems[0].to_string().contains("--external-cidr 10.0.0.0/24,1000::/64"), "{}", problems[0]);
    }

    #[test]
    fn each_source_of_addresses_can_be_switched_off() {
        let mut web = mk_service("web", ["10.0.0.55"]);
        web.load_balancer_ingress.push(crate::model::LoadBalancerIngress {
            address: "10.0.0.77".parse().unwrap(),
            mode: crate::model::IpMode::Vip,
        });
        for (external_ips, load_balancer_ips) in [(true, true), (true, false), (false, true)] {
            let settings = Settings { external_ips, load_balancer_ips, ..settings() };
            let (desired, _) = desired(vec![web.clone().into()], &settings);
            assert_eq!(owner_of(&desired, "10.0.0.55").is_some(), external_ips);
            assert_eq!(owner_of(&desired, "10.0.0.77").is_some(), load_balancer_ips);
        }
    }

    #[test]
    fn a_service_without_an_external_address_is_mentioned_and_no_more() {
        let (desired, problems) = desired(vec![mk_service("web", []).into()], &settings());
        assert_eq!(desired, Desired::default());
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].severity, Severity::Info);
        assert_eq!(problems[0].subject, Subject::Object(ObjectId::Service(mk_name("web"))));
    }
}
