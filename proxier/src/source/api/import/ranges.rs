//! Who may send to a Service: `IPFilters` say it of single addresses, the model of all of a Service's external ones. Where the
//! two differ, nobody gets in whom the filters would keep out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use proxier_localv1::{IpFilter, IpSet};

use super::reporter::Reporter;
use crate::model::source_range;

/// Addresses of one Service that are filtered each in its own way; more would take longer to work out than it is worth.
const MAX_WAYS: usize = 64;

/// The networks that may send to `externals`, the external addresses of a Service; none, if that is what the filters come to, or if
/// there are no filters.
pub(super) fn source_ranges(
    filters: &[IpFilter],
    externals: &BTreeSet<IpAddr>,
    report: &mut Reporter,
) -> Vec<IpNet> {
    if filters.is_empty() {
        return Vec::new();
    }
    let ranges: Vec<Vec<IpNet>> =
        filters.iter().enumerate().map(|(index, filter)| networks(index, filter, report)).collect();
    // Those for all addresses, and of each address those that name it.
    let mut for_all = Vec::new();
    let mut naming: BTreeMap<IpAddr, Vec<usize>> = externals.iter().map(|ip| (*ip, Vec::new())).collect();
    for (index, filter) in filters.iter().enumerate() {
        match &filter.target_ips {
            Some(targets) if !(targets.v4.is_empty() && targets.v6.is_empty()) => {
                for target in self::targets(index, targets, report) {
                    if let Some(indexes) = naming.get_mut(&target) {
                        indexes.push(index);
                    }
                }
            }
            _ => for_all.push(index),
        }
    }
    let union = |indexes: &[usize]| -> Vec<IpNet> {
        for_all.iter().chain(indexes).flat_map(|&index| &ranges[index]).copied().collect()
    };
    let ways: BTreeSet<&[usize]> = naming.values().map(Vec::as_slice).collect();
    // An address that no filter is for is open to everybody.
    let is_filtered = |way: &&[usize]| !for_all.is_empty() || !way.is_empty();
    if let (Some(way), 0 | 1) = (ways.first(), ways.len())
        && is_filtered(way)
    {
        return union(way);
    }
    if !ways.iter().any(is_filtered) {
        if !externals.is_empty() {
            report.report_whole(
                "IPFilters",
                "are for none of the Service's external addresses: taken as if they were for all",
                "let their targets be external addresses of the Service",
            );
        }
        return ranges.into_iter().flatten().collect();
    }
    if ways.len() > MAX_WAYS {
        report.report_whole(
            "IPFilters",
            "differ between too many of the Service's external addresses: they admit nobody",
            "make a Service for each way of filtering",
        );
        return Vec::new();
    }
    report.report_whole(
        "IPFilters",
        "are not the same for all of the Service's external addresses: who is kept from one of them is kept from all",
        "make a Service for each way of filtering",
    );
    let of_ways = ways.into_iter().filter(is_filtered).map(|way| aggregated(&union(way)));
    of_ways.reduce(|one, other| intersection(&one, &other)).unwrap_or_default()
}

/// The same addresses in as few networks as can be, in order: none holds another.
fn aggregated(networks: &Vec<IpNet>) -> Vec<IpNet> {
    let mut aggregated = IpNet::aggregate(networks);
    aggregated.sort_unstable();
    aggregated
}

/// What two aggregated lists have in common, which is aggregated too.
fn intersection(one: &[IpNet], other: &[IpNet]) -> Vec<IpNet> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut common = Vec::new();
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        // Networks are apart, or one holds the other: then the other way round, its next one may lie there as well.
        if a.contains(*b) {
            common.push(**b);
            other.next();
        } else if b.contains(*a) {
            common.push(**a);
            one.next();
        } else if a < b {
            one.next();
        } else {
            other.next();
        }
    }
    common
}

fn networks(index: usize, filter: &IpFilter, report: &mut Reporter) -> Vec<IpNet> {
    let mut networks = Vec::new();
    for (position, range) in filter.source_ranges.iter().enumerate() {
        match source_range(range) {
            Ok(net) => networks.push(net),
            Err(why) => {
                let field = format!("IPFilters[{index}].SourceRanges[{position}]");
                report.report(&field, range, why.reason(), &format!("let it be {}", why.instead()));
            }
        }
    }
    networks
}

/// The addresses that a filter is for. One that cannot be read is none that a packet could be sent to.
fn targets(index: usize, targets: &IpSet, report: &mut Reporter) -> BTreeSet<IpAddr> {
    let field = format!("IPFilters[{index}].TargetIPs");
    report.addresses(&field, Some(targets)).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectName, Problem};

    const EXTERNALS: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

    /// Filters, each as its targets and its ranges.
    fn result(filters: &[(&[&str], &[&str])]) -> (Vec<String>, Vec<Problem>) {
        let filters: Vec<IpFilter> = filters
            .iter()
            .map(|(targets, ranges)| {
                let of_family =
                    |v6| targets.iter().filter(move |ip| ip.contains(':') == v6).map(|ip| (*ip).to_owned());
                let targets = (!targets.is_empty())
                    .then(|| IpSet { v4: of_family(false).collect(), v6: of_family(true).collect() });
                let source_ranges = ranges.iter().map(|range| (*range).to_owned()).collect();
                IpFilter { target_ips: targets, source_ranges }
            })
            .collect();
        let mut report = Reporter::new(&ObjectName::new("default", "web"));
        let externals = EXTERNALS.iter().map(|ip| ip.parse().unwrap()).collect();
        let networks = source_ranges(&filters, &externals, &mut report);
        (networks.iter().map(ToString::to_string).collect(), report.finish())
    }

    #[test]
    fn what_is_said_of_all_addresses_is_taken_as_it_is() {
        assert_eq!(
            result(&[(&[], &["192.0.2.0/24", " 198.51.100.0/24"]), (&[], &["192.0.2.128/25"])]),
            (["192.0.2.0/24", "198.51.100.0/24", "192.0.2.128/25"].map(str::to_owned).to_vec(), vec![])
        );
        // One filter, or several, that name all of them say the same.
        let (ranges, problems) = result(&[(&EXTERNALS, &["192.0.2.0/24"]), (&[], &["10.0.0.0/8"])]);
        assert_eq!((ranges, problems), (["10.0.0.0/8", "192.0.2.0/24"].map(str::to_owned).to_vec(), vec![]));
    }

    #[test]
    fn a_filter_for_some_addresses_closes_the_others_as_well_and_that_is_said() {
        let (ranges, problems) = result(&[(&["203.0.113.1"], &["192.0.2.0/24"])]);
        assert_eq!(ranges, ["192.0.2.0/24"]);
        assert!(problems[0].reason.starts_with("are not the same for all"), "{problems:?}");
    }

    #[test]
    fn who_is_kept_from_one_address_is_kept_from_all() {
        let (ranges, problems) = result(&[
            (&["203.0.113.1"], &["192.0.2.0/24", "2001:db8:1::/48", "10.0.0.0/8"]),
            (&["2001:db8::1"], &["192.0.2.64/26", "192.0.2.0/27", "2001:db8::/32", "172.16.0.0/12"]),
        ]);
        assert_eq!(ranges, ["192.0.2.0/27", "192.0.2.64/26", "2001:db8:1::/48"]);
        assert_eq!(problems.len(), 1);
        let (ranges, _) =
            result(&[(&["203.0.113.1"], &["192.0.2.0/24"]), (&["2001:db8::1"], &["198.51.100.0/24"])]);
        assert_eq!(ranges, [""; 0], "nobody");
        // Of those for all and those for one, those for all are left.
        let (ranges, _) = result(&[(&[], &["192.0.2.0/24"]), (&["2001:db8::1"], &["198.51.100.0/24"])]);
        assert_eq!(ranges, ["192.0.2.0/24"]);
    }

    #[test]
    fn filters_for_addresses_of_others_are_not_taken_for_none() {
        let (ranges, problems) = result(&[(&["203.0.113.99", "rubbish"], &["192.0.2.0/24"])]);
        assert_eq!(ranges, ["192.0.2.0/24"]);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[1].reason.starts_with("are for none of the Service's"), "{problems:?}");
    }

    #[test]
    fn what_is_no_network_admits_nobody() {
        let (ranges, problems) = result(&[(&[], &["192.0.2.0", "::ffff:192.0.2.0/120", ""])]);
        assert_eq!(ranges, [""; 0]);
        assert_eq!(problems.len(), 3);
        assert_eq!(problems[1].next_step, "let it be 192.0.2.0/24");
        assert_eq!(result(&[(&[], &[])]), (vec![], vec![]));
    }

    #[test]
    fn a_flood_of_filters_is_worked_out_in_no_time_and_never_opens_anything() {
        let externals: BTreeSet<IpAddr> = (0..20_000_u32).map(|n| IpAddr::from(n.to_be_bytes())).collect();
        let mut report = Reporter::new(&ObjectName::new("default", "web"));
        let filters: Vec<_> = externals
            .iter()
            .map(|external| IpFilter {
                target_ips: Some(IpSet { v4: vec![external.to_string()], v6: Vec::new() }),
                source_ranges: vec!["192.0.2.0/24".to_owned()],
            })
            .collect();
        assert_eq!(source_ranges(&filters, &externals, &mut report), []);
        assert_eq!(report.finish().len(), 1);
    }
}
