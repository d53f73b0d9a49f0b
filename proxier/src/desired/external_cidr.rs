//! Where external addresses may lie, and whose: the flag `--external-cidr`. Pure.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use ipnet::IpNet;

/// More ranges than this in a message are no help.
const MAX_LISTED: usize = 5;

/// The longest name that a namespace can have (RFC 1123, a label).
const MAX_NAMESPACE: usize = 63;

/// A range of addresses that Services may have: those of one namespace, or of all. Written `[NAMESPACE=]CIDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalCidr {
    /// Whose Services; `None` for everybody's.
    pub namespace: Option<Arc<str>>,
    /// The range, without bits beyond its prefix.
    pub cidr: IpNet,
}

impl ExternalCidr {
    fn is_for(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
    }
}

impl fmt::Display for ExternalCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}=")?;
        }
        write!(f, "{}", self.cidr)
    }
}

/// Why a text is no [`ExternalCidr`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAnExternalCidr {
    /// What should be the range is none.
    #[error(
        "not a network: write address/length, such as 192.0.2.0/24 or 2001:db8::/32, several with commas between them; \
         before it NAMESPACE= if Services of that namespace alone may have its addresses"
    )]
    Network,
    /// What should be the namespace cannot be one.
    #[error(
        "{0:?} is not a namespace's name: write up to 63 lower-case letters, digits and hyphens, such as \
         voip=192.0.2.0/24, or the network alone for all namespaces"
    )]
    Namespace(String),
    /// An IPv4 range in IPv6's notation: no Service has such addresses.
    #[error("an IPv4 network written as IPv6: write it as 192.0.2.0/24")]
    Mapped,
}

impl FromStr for ExternalCidr {
    type Err = NotAnExternalCidr;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, cidr) = match text.split_once('=') {
            Some((namespace, cidr)) => (Some(namespace.trim()), cidr),
            None => (None, text),
        };
        if let Some(namespace) = namespace.filter(|namespace| !is_namespace(namespace)) {
            return Err(NotAnExternalCidr::Namespace(namespace.to_owned()));
        }
        let cidr = cidr.trim().parse::<IpNet>().map_err(|_| NotAnExternalCidr::Network)?.trunc();
        if matches!(cidr, IpNet::V6(net) if net.addr().to_ipv4_mapped().is_some()) {
            return Err(NotAnExternalCidr::Mapped);
        }
        Ok(Self { namespace: namespace.map(Into::into), cidr })
    }
}

fn is_namespace(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=MAX_NAMESPACE).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Why a Service may not have an address, as far as the ranges go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outside {
    /// No range holds it; these are the ones that the namespace may use, as many as are worth showing.
    All(String),
    /// The most specific range that holds it belongs to other namespaces.
    Others(IpNet),
}

/// Whether Services of `namespace` may have `address`. The most specific of the ranges that hold it decides: so a part
/// of a range for all can be kept for one namespace. Without any range everything is allowed.
pub(super) fn check(ranges: &[ExternalCidr], address: IpAddr, namespace: &str) -> Result<(), Outside> {
    if ranges.is_empty() {
        return Ok(());
    }
    let holding = || ranges.iter().filter(|range| range.cidr.contains(&address));
    let Some(longest) = holding().map(|range| range.cidr.prefix_len()).max() else {
        let mut own: Vec<_> =
            ranges.iter().filter(|range| range.is_for(namespace)).map(ToString::to_string).collect();
        if own.len() > MAX_LISTED {
            own.truncate(MAX_LISTED);
            own.push("...".to_owned());
        }
        return Err(Outside::All(own.join(",")));
    };
    // Ranges of one length that hold one address are the same range.
    let mut deciding = holding().filter(|range| range.cidr.prefix_len() == longest).peekable();
    match deciding.peek().map(|range| range.cidr) {
        Some(cidr) if !deciding.any(|range| range.is_for(namespace)) => Err(Outside::Others(cidr)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Vec<ExternalCidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn allowed(ranges: &[ExternalCidr], address: &str, namespace: &str) -> bool {
        check(ranges, address.parse().unwrap(), namespace).is_ok()
    }

    #[test]
    fn a_range_is_written_with_or_without_a_namespace_and_shown_as_it_counts() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            (" 10.0.0.7/24 ", "10.0.0.0/24"),
            ("voip=10.0.0.0/28", "voip=10.0.0.0/28"),
            (" team-1 = 1000::/64", "team-1=1000::/64"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(text.parse::<ExternalCidr>().unwrap().to_string(), shown, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_range_is_refused_with_what_to_write() {
        let error = |text: &str| text.parse::<ExternalCidr>().unwrap_err().to_string();
        for text in
            ["", "10.0.0.5", "10.0.0.0/33", "10.0.0.300/8", "1000::/129", "eth0", "voip=", "voip=voip"]
        {
            assert!(error(text).contains("such as 192.0.2.0/24"), "{text:?}: {}", error(text));
        }
        let long = format!("{}=10.0.0.0/8", "a".repeat(64));
        for text in
            ["=10.0.0.0/8", "VoIP=10.0.0.0/8", "-a=10.0.0.0/8", "a-=10.0.0.0/8", "a.b=10.0.0.0/8", &long]
        {
            assert!(error(text).contains("not a namespace's name"), "{text:?}: {}", error(text));
        }
        assert!(error("::ffff:10.0.0.0/104").contains("written as IPv6"));
    }

    #[test]
    fn without_ranges_everything_is_allowed_and_with_some_nothing_else() {
        assert!(allowed(&[], "10.0.0.55", "default"));
        let ranges = ranges(&["10.0.0.0/24", "1000::/64"]);
        for (address, is) in
            [("10.0.0.55", true), ("10.0.1.55", false), ("1000::55", true), ("2000::55", false)]
        {
            assert_eq!(allowed(&ranges, address, "default"), is, "{address}");
        }
    }

    #[test]
    fn the_most_specific_range_decides_whose_an_address_may_be() {
        let ranges = ranges(&[
            "10.0.0.0/8",
            "voip=10.0.1.0/24",
            "video=10.0.1.0/24",
            "10.0.1.64/26",
            "lab=10.0.1.65/32",
        ]);
        for (address, who) in [
            ("10.0.0.55", ["default", "voip", "video", "lab"].as_slice()),
            ("10.0.1.1", &["voip", "video"]),
            ("10.0.1.64", &["default", "voip", "video", "lab"]),
            ("10.0.1.65", &["lab"]),
            ("11.0.0.1", &[]),
        ] {
            for namespace in ["default", "voip", "video", "lab"] {
                assert_eq!(
                    allowed(&ranges, address, namespace),
                    who.contains(&namespace),
                    "{namespace} {address}"
                );
            }
        }
    }

    #[test]
    fn a_range_for_all_beside_the_same_for_one_is_for_all() {
        let ranges = ranges(&["voip=10.0.0.0/24", "10.0.0.0/24"]);
        assert!(allowed(&ranges, "10.0.0.1", "default"));
    }

    #[test]
    fn whoever_is_refused_is_told_the_ranges_it_may_use_or_that_it_is_others() {
        let many: Vec<_> = (0..9).map(|n| format!("10.{n}.0.0/16")).collect();
        let mut all = ranges(&many.iter().map(String::as_str).collect::<Vec<_>>());
        all.push("voip=10.0.1.0/24".parse().unwrap());
        assert_eq!(
            check(&all, "11.0.0.1".parse().unwrap(), "default"),
            Err(Outside::All("10.0.0.0/16,10.1.0.0/16,10.2.0.0/16,10.3.0.0/16,10.4.0.0/16,...".to_owned()))
        );
        assert_eq!(
            check(&all, "10.0.1.1".parse().unwrap(), "default"),
            Err(Outside::Others("10.0.1.0/24".parse().unwrap()))
        );
        let one = ranges(&["voip=10.0.1.0/24"]);
        assert_eq!(check(&one, "11.0.0.1".parse().unwrap(), "lab"), Err(Outside::All(String::new())));
    }
}
