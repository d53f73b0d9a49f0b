//! Which problems are new and which are solved: a log line each, once, however often the same is found again.

use std::collections::BTreeSet;

use crate::model::{Problem, Severity, Subject};

/// What is known to be wrong.
#[derive(Debug, Default)]
pub struct Report {
    known: BTreeSet<Problem>,
}

/// Something worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// A problem that was not there before.
    Appeared(Problem),
    /// Something that had problems has none now.
    Solved(Subject),
}

impl Report {
    /// Compares all problems that there are now with those that there were.
    pub fn update(&mut self, current: impl IntoIterator<Item = Problem>) -> Vec<Transition> {
        let current: BTreeSet<Problem> = current.into_iter().collect();
        let wrong = |problems: &BTreeSet<Problem>| -> BTreeSet<Subject> {
            let matter = problems.iter().filter(|problem| problem.severity != Severity::Info);
            matter.map(|problem| problem.subject.clone()).collect()
        };
        let (were, are) = (wrong(&self.known), wrong(&current));
        let mut transitions: Vec<_> = were.difference(&are).cloned().map(Transition::Solved).collect();
        transitions.extend(current.difference(&self.known).cloned().map(Transition::Appeared));
        self.known = current;
        transitions
    }
}

/// Writes transitions to the log. Of a subject that does not exist any more nothing is said.
pub fn log(transitions: &[Transition], exists: impl Fn(&Subject) -> bool) {
    for transition in transitions {
        match transition {
            Transition::Appeared(problem) => match problem.severity {
                Severity::Error => tracing::error!("{problem}"),
                Severity::Warning => tracing::warn!("{problem}"),
                Severity::Info => tracing::info!("{problem}"),
            },
            Transition::Solved(subject) if exists(subject) => tracing::info!("{subject}: now good again"),
            Transition::Solved(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(file: &str, reason: &str, severity: Severity) -> Problem {
        Problem::new(severity, Subject::File(file.into()), reason, "mend it")
    }

    #[test]
    fn a_problem_is_told_once_and_its_end_once() {
        let mut report = Report::default();
        let broken = problem("a.yaml", "has a tab", Severity::Error);
        assert_eq!(report.update([broken.clone()]), [Transition::Appeared(broken.clone())]);
        assert_eq!(report.update([broken.clone()]), []);
        assert_eq!(report.update([]), [Transition::Solved(broken.subject)]);
        assert_eq!(report.update([]), []);
    }

    #[test]
    fn a_file_is_good_again_only_when_nothing_is_wrong_with_it() {
        let mut report = Report::default();
        let (tab, quote) = (
            problem("a.yaml", "has a tab", Severity::Error),
            problem("a.yaml", "has a quote", Severity::Error),
        );
        report.update([tab.clone()]);
        assert_eq!(report.update([quote.clone()]), [Transition::Appeared(quote.clone())]);
        assert_eq!(report.update([]), [Transition::Solved(quote.subject)]);
    }

    #[test]
    fn what_was_a_mere_remark_is_not_solved() {
        let mut report = Report::default();
        report.update([problem("a.yaml", "has a Pod", Severity::Info)]);
        assert_eq!(report.update([]), []);
    }
}
