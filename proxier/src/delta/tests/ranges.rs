//! Source ranges: when they count, and what becomes of those that do not fit.

use proxier_common::SourceKey;

use super::*;

#[test]
fn source_ranges_are_there_before_they_count_and_go_when_they_no_longer_do() {
    let web = || service(&["10.0.0.1"], &["11.0.0.1"]);
    let with = |ranges: &[&str]| desired([(key("a", Family::V4), only_from(ranges, web()))]);
    let mut actual = Actual::default();
    carry_out(&with(&["192.0.2.0/24"]), &mut actual);
    let steps = steps(&with(&["192.0.2.0/24", "198.51.100.0/24"]), &actual);
    let kinds: Vec<&str> = steps
        .iter()
        .map(|step| match step {
            Step::PutSource(_) => "range",
            Step::PutService(..) => "service",
            Step::Grace => "grace",
            Step::RemoveSource(_) => "remove range",
            _ => "other",
        })
        .collect();
    assert_eq!(kinds, ["range", "range", "service", "grace", "remove range"], "{steps:?}");
}

#[test]
fn source_ranges_have_a_generation_of_their_own() {
    let mut generations = Vec::new();
    let mut actual = Actual::default();
    let everybody: Option<&[&str]> = None;
    for (ranges, pods) in [
        (everybody, ["11.0.0.1", "11.0.0.2"]),
        (Some(&["192.0.2.0/24"]), ["11.0.0.1", "11.0.0.2"]),
        // Other pods, the same ranges.
        (Some(&["192.0.2.0/24"]), ["11.0.0.1", "11.0.0.3"]),
        // Nobody.
        (Some(&[]), ["11.0.0.1", "11.0.0.3"]),
        (Some(&[]), ["11.0.0.1", "11.0.0.2"]),
        (Some(&["192.0.2.0/24"]), ["11.0.0.1", "11.0.0.2"]),
        (everybody, ["11.0.0.1", "11.0.0.2"]),
        (Some(&[]), ["11.0.0.1", "11.0.0.2"]),
    ] {
        let web = service(&["10.0.0.1"], &pods);
        let web = ranges.map_or_else(|| web.clone(), |ranges| only_from(ranges, web.clone()));
        let desired = desired([(key("a", Family::V4), web)]);
        carry_out(&desired, &mut actual);
        assert_eq!(actual.in_force(), desired);
        let value = actual.services[&external_key("10.0.0.1".parse().unwrap())];
        generations.push((value.source_generation, value.generation, actual.sources.len()));
    }
    assert_eq!(
        generations,
        [(0, 1, 0), (1, 1, 1), (1, 2, 1), (2, 2, 0), (2, 3, 0), (3, 3, 1), (0, 3, 0), (1, 3, 0)]
    );
}

#[test]
fn a_range_of_either_family_survives_the_round_trip() {
    for range in
        ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.7/32", "::/0", "2001:db8::/32", "2001:db8::7/128", "::/96"]
    {
        let mut actual = Actual::default();
        let family = if range.contains(':') { Family::V6 } else { Family::V4 };
        let desired = desired([(key("a", family), only_from(&[range], service(&["10.0.0.1"], &[])))]);
        carry_out(&desired, &mut actual);
        assert_eq!(actual.in_force(), desired, "{range}");
        let entry = actual.sources.first().unwrap();
        assert!(entry.bits <= SourceKey::BITS && entry.bits >= SourceKey::BITS_BEFORE_ADDRESS, "{entry:?}");
    }
}

#[test]
fn ranges_that_could_not_all_be_written_never_count() {
    let web = || service(&["10.0.0.1"], &["11.0.0.1"]);
    let before = desired([(key("a", Family::V4), web())]);
    let after = desired([(key("a", Family::V4), only_from(&["192.0.2.0/24", "198.51.100.0/24"], web()))]);
    let mut actual = Actual::default();
    carry_out(&before, &mut actual);
    let plan = Plan::new(&after, &actual, &Scope::All, &VETHS);
    for task in plan.tasks() {
        for (nth, step) in plan.steps(*task, &actual).iter().enumerate() {
            if matches!(step, Step::PutSource(_)) && nth == 1 {
                break;
            }
            actual.apply(step);
        }
    }
    assert_eq!(actual.in_force(), before);
    assert_eq!(actual.sources, [].into(), "what was written of them is removed");
    carry_out(&after, &mut actual);
    assert_eq!(actual.in_force(), after);
}

#[test]
fn ranges_that_do_not_fit_keep_the_former_ones_in_force_and_nothing_else_from_being_done() {
    let three = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"];
    let two = ["192.0.2.0/24", "172.16.0.0/12"];
    let [one, other] = ["11.0.0.1", "11.0.0.2"];
    let web = |ranges: &[&str], pod| {
        desired([(key("a", Family::V4), only_from(ranges, service(&["10.0.0.1"], &[pod])))])
    };
    let mut actual = Actual::default();
    assert_eq!(carry_out_with_room(4, &web(&three, one), &mut actual), []);
    let shortages = carry_out_with_room(4, &web(&two, other), &mut actual);
    assert_eq!(
        shortages.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "2 source ranges do not fit (the map `sources` has room for 4 on this node, 1 free): the former ones stay in \
             force, so whoever was to be cut off is still admitted; its pods are up to date; write fewer, larger networks \
             (those in force count until they are replaced)"
        ]
    );
    assert_eq!(actual.in_force(), web(&three, other));
    // One fits, and makes room for the other.
    assert_eq!(carry_out_with_room(4, &web(&two[..1], other), &mut actual), []);
    assert_eq!(carry_out_with_room(4, &web(&two, other), &mut actual), []);
    assert_eq!(actual.in_force(), web(&two, other));
}

#[test]
fn a_new_service_whose_ranges_do_not_fit_admits_nobody_and_an_open_one_stays_open() {
    let ranges = ["192.0.2.0/24", "198.51.100.0/24"];
    let web = || service(&["10.0.0.1"], &["11.0.0.1"]);
    let closed = desired([(key("a", Family::V4), only_from(&ranges, web()))]);
    let mut actual = Actual::default();
    let shortage = carry_out_with_room(1, &closed, &mut actual).remove(0).to_string();
    assert!(shortage.contains("1 free): nobody is admitted; its pods are up to date"), "{shortage}");
    assert_eq!(actual.in_force(), desired([(key("a", Family::V4), only_from(&[], web()))]));
    // As soon as there is room they count.
    assert_eq!(carry_out_with_room(2, &closed, &mut actual), []);
    assert_eq!(actual.in_force(), closed);

    let open = desired([(key("a", Family::V4), web())]);
    let mut actual = Actual::default();
    carry_out(&open, &mut actual);
    let shortage = carry_out_with_room(1, &closed, &mut actual).remove(0).to_string();
    assert!(shortage.contains("everybody is still admitted"), "{shortage}");
    assert_eq!(actual.in_force(), open);
}

#[test]
fn ranges_that_another_service_gives_up_make_room_for_the_next_attempt() {
    let state = |ranges_of_b: &[&str], ranges_of_a: &[&str]| {
        desired([
            (key("a", Family::V4), only_from(ranges_of_a, service(&["10.0.0.1"], &["11.0.0.1"]))),
            (key("b", Family::V4), only_from(ranges_of_b, service(&["10.0.0.2"], &["11.0.0.2"]))),
        ])
    };
    let nets = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"];
    let mut actual = Actual::default();
    assert_eq!(carry_out_with_room(5, &state(&nets, &nets[..1]), &mut actual), []);
    let after = state(&nets[..1], &nets);
    let (shortages, _) = attempt_with_room(5, &after, &mut actual);
    assert_eq!(shortages.len(), 1, "what was in force goes after everything else");
    assert_eq!(attempt_with_room(5, &after, &mut actual), (Vec::new(), true));
    assert_eq!(actual.in_force(), after);
}
