//! What users of netfilter write to send an external address to a pod: rulesets as texts.

use std::{fmt::Write as _, net::Ipv4Addr};

/// External address number `index`. None of them is in a network of the lab.
#[must_use]
pub fn external(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 0)) + index)
}

/// The address of a pod that is not there, for the external addresses that get no traffic.
fn absent(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(11, 16, 0, 0)) + index)
}

/// For `nft -f`: a rule that wants to know of each packet which connection it belongs to, and lets all of them go on, as the first one
/// of kube-proxy's in `KUBE-FORWARD`.
pub const TRACKED: &str = "table ip bench {\n\
     chain forward {\ntype filter hook forward priority filter; policy accept;\n\
     ct state invalid drop\n}\n}\n";

/// For `iptables-restore`: all of `external` to `pod`, in the kernel for requests of others as of the node.
#[must_use]
pub fn iptables(external: Ipv4Addr, pod: Ipv4Addr) -> String {
    format!("*nat\n-A PREROUTING -d {external}/32 -j DNAT --to-destination {pod}\nCOMMIT\n")
}

/// For `nft -f`: a map of `count` external addresses, the last of which is `pod`'s.
#[must_use]
pub fn nft(count: u32, pod: Ipv4Addr) -> String {
    format!(
        "table ip bench {{\n{}\
         chain prerouting {{\ntype nat hook prerouting priority dstnat; policy accept;\n\
         dnat to ip daddr map @there\n}}\n}}\n",
        map("there", pairs(count, pod)),
    )
}

/// The same without connection tracking: each direction has a map, and rewrites the address itself.
#[must_use]
pub fn nft_stateless(count: u32, pod: Ipv4Addr) -> String {
    let back = pairs(count, pod).map(|(external, pod)| (pod, external));
    format!(
        "table ip bench {{\n{}{}\
         chain prerouting {{\ntype filter hook prerouting priority raw; policy accept;\n\
         ip daddr set ip daddr map @there notrack\n}}\n\
         chain postrouting {{\ntype filter hook postrouting priority raw; policy accept;\n\
         ip saddr set ip saddr map @back notrack\n}}\n}}\n",
        map("there", pairs(count, pod)),
        map("back", back),
    )
}

fn pairs(count: u32, pod: Ipv4Addr) -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr)> {
    (0..count).map(move |index| (external(index), if index + 1 == count { pod } else { absent(index) }))
}

fn map(name: &str, pairs: impl Iterator<Item = (Ipv4Addr, Ipv4Addr)>) -> String {
    let elements: Vec<String> = pairs.map(|(from, to)| format!("{from} : {to}")).collect();
    format!("map {name} {{\ntype ipv4_addr : ipv4_addr;\nelements = {{ {} }}\n}}\n", elements.join(",\n"))
}

/// A port of a Service.
#[derive(Clone, Copy, Debug)]
pub struct ServicePort {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The same for the Service and its pods.
    pub port: u16,
}

/// For `iptables-restore`, in the shape of what kube-proxy writes: a rule in KUBE-SERVICES for every port of every Service, a
/// chain for each of them and one for each endpoint. The last Service has `ports`; the others have one port and no traffic.
#[must_use]
pub fn kube_proxy(services: u32, pod: Ipv4Addr, ports: &[ServicePort]) -> String {
    let mut chains =
        String::from("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n");
    let mut entries = String::new();
    let mut details = String::new();
    let others = (0..services.saturating_sub(1))
        .map(|index| (external(index), absent(index), ServicePort { protocol: "tcp", port: 80 }));
    let last = external(services.saturating_sub(1));
    let all = others.chain(ports.iter().map(|port| (last, pod, *port)));
    for (number, (external, pod, ServicePort { protocol, port })) in all.enumerate() {
        let (service, endpoint) = (format!("KUBE-SVC-{number:016}"), format!("KUBE-SEP-{number:016}"));
        let name = format!("ns/s{number}:p{port}");
        let _ = writeln!(chains, ":{service} - [0:0]\n:{endpoint} - [0:0]");
        let _ = writeln!(
            entries,
            "-A KUBE-SERVICES -d {external}/32 -p {protocol} -m comment --comment \"{name} loadbalancer IP\" \
             -m {protocol} --dport {port} -j {service}"
        );
        let _ = writeln!(
            details,
            "-A {service} -m comment --comment \"{name} -> {pod}:{port}\" -j {endpoint}\n\
             -A {endpoint} -s {pod}/32 -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
             -A {endpoint} -p {protocol} -m comment --comment \"{name}\" -m {protocol} -j DNAT \
             --to-destination {pod}:{port}"
        );
    }
    format!(
        "{chains}-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n{entries}{details}COMMIT\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Ipv4Addr = Ipv4Addr::new(11, 0, 2, 2);

    #[test]
    fn only_the_last_external_address_leads_to_the_pod() {
        let text = nft(3, POD);
        assert!(text.contains("10.1.0.2 : 11.0.2.2"), "{text}");
        assert_eq!(text.matches("11.0.2.2").count(), 1, "{text}");
        assert_eq!(text.matches(" : ").count(), 4, "three pairs and the type: {text}");
    }

    #[test]
    fn without_connection_tracking_the_way_back_has_a_map_of_its_own() {
        let text = nft_stateless(2, POD);
        assert!(text.contains("10.1.0.1 : 11.0.2.2") && text.contains("11.0.2.2 : 10.1.0.1"), "{text}");
        assert_eq!(text.matches("notrack").count(), 2);
    }

    #[test]
    fn the_service_that_is_measured_comes_last() {
        let ports =
            [ServicePort { protocol: "tcp", port: 6000 }, ServicePort { protocol: "udp", port: 6001 }];
        let text = kube_proxy(10_000, POD, &ports);
        let rules: Vec<&str> = text.lines().filter(|line| line.starts_with("-A KUBE-SERVICES")).collect();
        assert_eq!(rules.len(), 9_999 + 2);
        for (rule, port) in rules[9_999..].iter().zip(["--dport 6000", "--dport 6001"]) {
            assert!(rule.contains("-d 10.1.39.15/32") && rule.contains(port), "{rule}");
        }
        assert!(rules[..9_999].iter().all(|rule| !rule.contains("10.1.39.15/")));
    }

    #[test]
    fn a_hundred_thousand_addresses_stay_clear_of_the_labs_networks() {
        for index in [0, 99_999, 131_071] {
            assert_eq!(external(index).octets()[0], 10);
            assert_eq!(absent(index).octets()[0], 11);
            assert_ne!(absent(index).octets()[1], 0, "11.0.0.0/16 is the lab's");
        }
    }
}
