//! The matrix of clients, protocols, families, Services and pod networks: every cell, with offloads and without.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics; clippy sees tests in `#[test]` functions only"
)]

use proxier_tests::{
    matrix::{Table, ground::Ground},
    report, skip_unless_root,
    topology::PodNetwork,
};

#[test]
fn every_cell_of_the_matrix_passes() {
    skip_unless_root!();
    let labs = [PodNetwork::PointToPoint, PodNetwork::Bridge]
        .into_iter()
        .flat_map(|network| [true, false].map(|offloads| (network, offloads)));
    let mut table = Table::default();
    std::thread::scope(|scope| {
        let tried: Vec<_> = labs
            .map(|(network, offloads)| scope.spawn(move || Ground::new(network, offloads).try_all().unwrap()))
            .collect();
        for tried in tried {
            table.extend(tried.join().unwrap());
        }
    });
    for line in table.lines() {
        report::line("matrix", &line).unwrap();
    }
    let failures = table.failures();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // Clients, checks, families, Services, networks.
    assert_eq!(table.len(), 4 * 8 * 2 * 2 * 2);
}
