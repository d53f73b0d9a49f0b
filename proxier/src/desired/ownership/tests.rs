use super::*;
use crate::model::{
    Object,
    testing::{mk_endpoint, mk_name, mk_node, mk_service, mk_slice},
};
use crate::{
    catalog::Catalog,
    desired::{Desired, LocalAddresses, compute},
    model::{NodeName, ObjectId, Problem, Severity, Subject},
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
        .map(|(key, _)| key.service.name.to_string());
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
        ["Service default/a-new: spec.externalIPs[0] \"10.0.0.55\" belongs to Service default/z-old, which \
             comes first (older, or before it by name), until that goes; give one of the two another address"]
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

/// What counts is the age of the Service, not that of its claim, for no field tells the latter: SECURITY.md says what that means.
#[test]
fn an_older_service_that_claims_later_takes_the_address_unless_the_range_is_another_namespaces() {
    let young = created(mk_service("young", ["10.0.0.55"]), 200);
    let old = |addresses: Vec<&str>| {
        let service = Service { name: ObjectName::new("other", "old"), ..mk_service("old", addresses) };
        created(service, 100)
    };
    let owner = |old: Service, settings: &Settings| {
        let (desired, _) = desired(vec![young.clone().into(), old.into()], settings);
        owner_of(&desired, "10.0.0.55")
    };
    assert_eq!(owner(old(vec![]), &settings()).as_deref(), Some("young"));
    assert_eq!(owner(old(vec!["10.0.0.55"]), &settings()).as_deref(), Some("old"));
    let bound = Settings { external_cidrs: vec!["default=10.0.0.0/24".parse().unwrap()], ..settings() };
    assert_eq!(owner(old(vec!["10.0.0.55"]), &bound).as_deref(), Some("young"));
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
        "240.0.0.1",
        "255.255.255.254",
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
fn the_broadcast_address_of_a_network_that_this_node_is_in_is_never_taken() {
    let local_addresses = LocalAddresses {
        broadcasts: BTreeSet::from(["192.168.1.255".parse().unwrap()]),
        ..LocalAddresses::default()
    };
    let settings = Settings { local_addresses, ..settings() };
    let (desired, problems) =
        desired(vec![mk_service("web", ["192.168.1.255", "192.168.2.255"]).into()], &settings);
    assert_eq!(owner_of(&desired, "192.168.1.255"), None);
    assert_eq!(owner_of(&desired, "192.168.2.255").as_deref(), Some("web"), "an address like any other");
    let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "Service default/web: spec.externalIPs[0] \"192.168.1.255\" is the broadcast address of a network that this node \
             is in: not taken; write an address that routers can forward"
        ]
    );
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
    assert!(problems[0].to_string().contains("cluster address of Service default/mail"), "{}", problems[0]);
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

#[test]
fn an_address_of_the_clusters_networks_is_refused_with_what_says_that_it_is_one() {
    let node = crate::model::Node {
        pod_cidrs: vec!["11.0.3.0/24".parse().unwrap()],
        ..mk_node("node3", ["192.168.1.3"])
    };
    let settings = Settings { cluster_cidrs: vec!["10.96.0.0/12".parse().unwrap()], ..settings() };
    let web = mk_service("web", ["10.96.0.1", "11.0.3.9", "11.0.4.9"]);
    let (desired, problems) = desired(vec![web.into(), node.into()], &settings);
    assert_eq!(owner_of(&desired, "11.0.4.9").as_deref(), Some("web"));
    let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "Service default/web: spec.externalIPs[0] \"10.96.0.1\" lies in --cluster-cidr 10.96.0.0/12, which is the \
             cluster's own: not taken; write an address outside the cluster's networks",
            "Service default/web: spec.externalIPs[1] \"11.0.3.9\" lies in 11.0.3.0/24, where the pods of Node node3 have \
             their addresses (spec.podCIDRs): not taken; write an address outside the pods' ranges",
        ]
    );
}
