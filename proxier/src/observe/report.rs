//! Which problems are new and which are solved: a log line each, once, however often the same is found again. Of one field of
//! an object only the first few: a list of five thousand mistakes is one mistake of whoever made the list.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use crate::model::{Problem, Severity, Subject};

/// Most problems with the items of one field that are told at a time. As these are solved, others take their place.
const MAX_OF_FIELD: usize = 5;

/// What is known to be wrong.
#[derive(Debug, Default)]
pub struct Report(BTreeMap<Subject, Known>);

/// What is known of one subject.
#[derive(Debug, Default)]
struct Known {
    /// What has been told, and how often: an item is the same wherever in its list it is, for the list moves up when the
    /// one before it goes. Two items may be the same.
    told: BTreeMap<Problem, usize>,
    /// How many have been said to be there beside those told.
    more: BTreeMap<Field, usize>,
    /// Whether it had problems that matter, told or not.
    is_wrong: bool,
}

/// A field of an object, whichever of its items.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Field {
    severity: Severity,
    subject: Subject,
    /// Its path, without the numbers of items.
    path: String,
}

impl Field {
    fn of(problem: &Problem) -> Self {
        let Problem { severity, subject, field, .. } = problem;
        Self { severity: *severity, subject: subject.clone(), path: without_indices(field) }
    }
}

/// The problem, wherever in its list the item is.
fn wherever(problem: &Problem) -> Problem {
    Problem { field: without_indices(&problem.field), ..problem.clone() }
}

/// `spec.ports[].port` for `spec.ports[3].port`. What else is in brackets (an annotation's name) stays.
fn without_indices(path: &str) -> String {
    let mut parts = path.split('[');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push('[');
        text.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    text
}

/// Something worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// A problem that was not there before.
    Appeared(Problem),
    /// So many more of a field than are told.
    More(Field, usize),
    /// Something that had problems has none now.
    Solved(Subject),
}

impl Report {
    /// Compares all that is wrong with `subject` now with what was.
    pub fn update(
        &mut self,
        subject: &Subject,
        current: impl IntoIterator<Item = Problem>,
    ) -> Vec<Transition> {
        let mut before = self.0.remove(subject).unwrap_or_default();
        let mut fields: BTreeMap<Field, BTreeSet<Problem>> = BTreeMap::new();
        for problem in current {
            fields.entry(Field::of(&problem)).or_default().insert(problem);
        }
        let mut known = Known {
            is_wrong: fields.keys().any(|field| field.severity != Severity::Info),
            ..Known::default()
        };
        let mut transitions = Vec::new();
        if before.is_wrong && !known.is_wrong {
            transitions.push(Transition::Solved(subject.clone()));
        }
        for (field, problems) in fields {
            let (old, mut new): (Vec<_>, Vec<_>) = problems.into_iter().partition(|problem| {
                let left = before.told.get_mut(&wherever(problem)).filter(|left| **left > 0);
                left.map(|left| *left -= 1).is_some()
            });
            // Item 10 after item 9.
            new.sort_by(|a, b| (a.field.len(), a).cmp(&(b.field.len(), b)));
            let room = MAX_OF_FIELD.saturating_sub(old.len()).min(new.len());
            let rest = new.split_off(room).len();
            for problem in old.iter().chain(&new) {
                *known.told.entry(wherever(problem)).or_default() += 1;
            }
            transitions.extend(new.into_iter().map(Transition::Appeared));
            if rest > 0 {
                if before.more.get(&field) != Some(&rest) {
                    transitions.push(Transition::More(field.clone(), rest));
                }
                known.more.insert(field, rest);
            }
        }
        if !known.told.is_empty() {
            self.0.insert(subject.clone(), known);
        }
        transitions
    }
}

/// Writes transitions to the log. Of a subject that does not exist any more nothing is said.
pub fn log(transitions: &[Transition], exists: impl Fn(&Subject) -> bool) {
    for transition in transitions {
        match transition {
            Transition::Appeared(problem) => write(problem.severity, problem),
            Transition::More(field, rest) => {
                let Field { severity, subject, path } = field;
                let of = if path.is_empty() { String::new() } else { format!(" of {path}") };
                write(
                    *severity,
                    &format_args!("{subject}: ... and {rest} more{of}, told as those above are mended"),
                );
            }
            Transition::Solved(subject) if exists(subject) => tracing::info!("{subject}: now good again"),
            Transition::Solved(_) => {}
        }
    }
}

fn write(severity: Severity, line: &dyn Display) {
    match severity {
        Severity::Error => tracing::error!("{line}"),
        Severity::Warning => tracing::warn!("{line}"),
        Severity::Info => tracing::info!("{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is wrong with anything.
    fn update(report: &mut Report, problems: impl IntoIterator<Item = Problem>) -> Vec<Transition> {
        let mut of_subjects: BTreeMap<Subject, Vec<Problem>> =
            report.0.keys().map(|subject| (subject.clone(), Vec::new())).collect();
        for problem in problems {
            of_subjects.entry(problem.subject.clone()).or_default().push(problem);
        }
        of_subjects.into_iter().flat_map(|(subject, problems)| report.update(&subject, problems)).collect()
    }

    fn problem(file: &str, reason: &str, severity: Severity) -> Problem {
        Problem::new(severity, Subject::File(file.into()), reason, "mend it")
    }

    #[test]
    fn a_problem_is_told_once_and_its_end_once() {
        let mut report = Report::default();
        let broken = problem("a.yaml", "has a tab", Severity::Error);
        assert_eq!(update(&mut report, [broken.clone()]), [Transition::Appeared(broken.clone())]);
        assert_eq!(update(&mut report, [broken.clone()]), []);
        assert_eq!(update(&mut report, []), [Transition::Solved(broken.subject)]);
        assert_eq!(update(&mut report, []), []);
    }

    #[test]
    fn a_file_is_good_again_only_when_nothing_is_wrong_with_it() {
        let mut report = Report::default();
        let (tab, quote) = (
            problem("a.yaml", "has a tab", Severity::Error),
            problem("a.yaml", "has a quote", Severity::Error),
        );
        update(&mut report, [tab.clone()]);
        assert_eq!(update(&mut report, [quote.clone()]), [Transition::Appeared(quote.clone())]);
        assert_eq!(update(&mut report, []), [Transition::Solved(quote.subject)]);
    }

    #[test]
    fn what_was_a_mere_remark_is_not_solved() {
        let mut report = Report::default();
        update(&mut report, [problem("a.yaml", "has a Pod", Severity::Info)]);
        assert_eq!(update(&mut report, []), []);
    }

    fn bad_range(index: usize) -> Problem {
        let subject = Subject::File("a.yaml".into());
        Problem::new(Severity::Warning, subject, "is not a network", "write one")
            .in_field(format!("spec.loadBalancerSourceRanges[{index}]"), format!("x{index}"))
    }

    /// The items told, and how many more are said to be there.
    fn told(transitions: &[Transition]) -> (Vec<Problem>, Vec<usize>) {
        let (mut problems, mut rests) = (Vec::new(), Vec::new());
        for transition in transitions {
            match transition {
                Transition::Appeared(problem) => problems.push(problem.clone()),
                Transition::More(field, rest) => {
                    assert_eq!(field.path, "spec.loadBalancerSourceRanges[]");
                    rests.push(*rest);
                }
                Transition::Solved(subject) => panic!("{subject} is not solved"),
            }
        }
        (problems, rests)
    }

    #[test]
    fn of_a_long_list_the_first_few_are_told_and_the_others_as_these_are_mended() {
        let mut report = Report::default();
        let all = || (0..5_000).map(bad_range);
        let first: Vec<_> = (0..5).map(bad_range).collect();
        assert_eq!(told(&update(&mut report, all())), (first, vec![4_995]));
        assert_eq!(update(&mut report, all()), []);
        let next = vec![bad_range(5), bad_range(6)];
        assert_eq!(told(&update(&mut report, all().skip(2))), (next, vec![4_993]));
        assert_eq!(told(&update(&mut report, (2..6).map(bad_range))), (vec![], vec![]));
        assert_eq!(update(&mut report, []), [Transition::Solved(bad_range(0).subject)]);
    }

    #[test]
    fn an_item_that_moves_up_in_its_list_is_no_news_and_a_second_one_like_it_is() {
        let mut report = Report::default();
        let of = |index: usize, value: &str| {
            let field = format!("spec.externalIPs[{index}]");
            problem("a.yaml", "is not an IP address", Severity::Warning).in_field(field, value)
        };
        update(&mut report, [of(0, "x"), of(1, "y"), of(2, "y")]);
        assert_eq!(update(&mut report, [of(0, "y"), of(1, "y")]), []);
        assert_eq!(update(&mut report, [of(0, "y")]), []);
        let again = of(1, "y");
        assert_eq!(update(&mut report, [of(0, "y"), again.clone()]), [Transition::Appeared(again)]);
        let other = of(0, "z");
        assert_eq!(update(&mut report, [other.clone(), of(1, "y")]), [Transition::Appeared(other)]);
    }

    #[test]
    fn another_field_and_another_object_are_told_beside_a_long_list() {
        let mut report = Report::default();
        let port = bad_range(0).in_field("spec.ports[3].port", "0");
        let other = Problem { subject: Subject::File("b.yaml".into()), ..bad_range(0) };
        let transitions = update(&mut report, (0..100).map(bad_range).chain([port.clone(), other.clone()]));
        for problem in [port, other] {
            assert!(transitions.contains(&Transition::Appeared(problem)), "{transitions:?}");
        }
    }

    #[test]
    fn only_numbers_of_items_are_left_out_of_a_fields_path() {
        assert_eq!(without_indices("spec.ports[13].port"), "spec.ports[].port");
        assert_eq!(
            without_indices("metadata.annotations[proxier.io/balance]"),
            "metadata.annotations[proxier.io/balance]"
        );
        assert_eq!(without_indices(""), "");
    }
}
