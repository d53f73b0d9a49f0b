//! `cargo xtask test`: runs every tier of tests and adds up what they report. Without root it runs what it can and says
//! loudly what it left out. The tests themselves are the crates'.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use proxier_tests::report;

use crate::{
    build_ebpf,
    environment::{Environment, LAB_TOOLS, as_root_hint, is_root},
    process::{cargo, line_of, say},
};

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct TestOptions {
    /// Run this tier only; may be given more than once. All by default
    #[arg(long = "tier", value_enum)]
    tiers: Vec<Tier>,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
    /// A filter and other arguments for the test programs
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Tests that need the same things from the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Tier {
    /// Unit and property tests; no privileges
    Host,
    /// The compiled programs on packets, in the kernel, attached to nothing
    Kernel,
    /// The agent and its programs between network namespaces
    Lab,
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Host => "host",
            Self::Kernel => "kernel",
            Self::Lab => "lab",
        })
    }
}

impl Tier {
    const ALL: [Self; 3] = [Self::Host, Self::Kernel, Self::Lab];

    fn needs_root(self) -> bool {
        self != Self::Host
    }

    /// What cargo is to test, a run each.
    fn selections(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Host => &[
                &["-p", "proxier-common", "-p", "proxier-ebpf", "-p", "proxier", "-p", "xtask"],
                // On its own: a choice of test programs would hold for the other crates too.
                &["-p", "proxier-tests", "--test", "apiserver"],
            ],
            Self::Kernel => &[&["-p", "proxier-tests", "--lib", "--test", "kernel_*"]],
            Self::Lab => &[&["-p", "proxier-tests", "--test", "lab_*"]],
        }
    }
}

/// Which of the tiers run, and which are left out for want of root.
fn plan(wanted: &[Tier], root: bool) -> (Vec<Tier>, Vec<Tier>) {
    Tier::ALL
        .into_iter()
        .filter(|tier| wanted.is_empty() || wanted.contains(tier))
        .partition(|tier| root || !tier.needs_root())
}

/// Runs the command; whether every test that should have run did, and passed.
pub(crate) fn run_command(options: &TestOptions) -> Result<bool> {
    let environment = Environment::new(!options.no_install);
    let (run, left_out) = plan(&options.tiers, is_root());
    if !left_out.is_empty() && !options.tiers.is_empty() {
        bail!("the tier {} needs root. Run: {}", names(&left_out), as_root_hint("test"));
    }
    if run.iter().any(|tier| tier.needs_root()) {
        environment.ensure_tools(LAB_TOOLS)?;
        environment.ensure_bpf_file_system()?;
    }
    let object = build_ebpf::build(&environment)?;
    let agent = if run.iter().any(|tier| tier.needs_root()) { Some(build_agent()?) } else { None };

    let told = tempfile::tempdir().context("no directory for what the tests report")?;
    let inputs = Inputs { agent: agent.as_deref(), object: &object, told: told.path() };
    let mut reports = Vec::new();
    for tier in run {
        reports.push(run_tier(tier, &inputs, &options.filter)?);
    }
    println!();
    for line in report::lines(told.path())? {
        println!("{line}");
    }
    for report in &reports {
        println!("{report}");
    }
    if !left_out.is_empty() {
        println!(
            "NOT RUN: {}: they load programs and make network namespaces, which needs root. Run: {}",
            names(&left_out),
            as_root_hint("test")
        );
    }
    let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    let total = reports.iter().fold(Counts::default(), |sum, report| sum.plus(report.counted()));
    if total == Counts::default() {
        println!("no test ran: nothing is called {}", options.filter.join(" "));
    }
    println!("tests: {} passed, {} failed", total.passed, total.failed);
    Ok(is_good(total, &left_out, in_ci))
}

/// Where nobody reads the output, a tier that was left out would look like one that passed.
fn is_good(total: Counts, left_out: &[Tier], in_ci: bool) -> bool {
    total.failed == 0 && total.passed > 0 && (left_out.is_empty() || !in_ci)
}

fn names(tiers: &[Tier]) -> String {
    tiers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Builds the agent and returns where cargo put it.
pub(crate) fn build_agent() -> Result<PathBuf> {
    say("building the agent");
    build_agent_with(|_| {})
}

/// As [`build_agent`], with more arguments or environment for cargo.
pub(crate) fn build_agent_with(more: impl FnOnce(&mut Command)) -> Result<PathBuf> {
    let mut command = cargo();
    command.args([
        "build",
        "--package",
        "proxier",
        "--bin",
        "proxier",
        "--message-format=json-render-diagnostics",
    ]);
    more(&mut command);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("`{}` did not start", line_of(&command)))?;
    if !output.status.success() {
        bail!("the agent does not compile: `{}`: {}", line_of(&command), output.status);
    }
    executable_in(&String::from_utf8_lossy(&output.stdout))
        .context("cargo built the agent but does not say where")
}

fn executable_in(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "proxier")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// Numbers that cargo's test programs report.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            ignored: self.ignored + other.ignored,
        }
    }

    /// Reads `test result: ok. 5 passed; 0 failed; 1 ignored; ...`.
    fn parse(line: &str) -> Option<Self> {
        let (_verdict, numbers) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let number = |what: &str| {
            numbers.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok())
        };
        Some(Self { passed: number("passed")?, failed: number("failed")?, ignored: number("ignored")? })
    }
}

/// How a tier went.
#[derive(Debug)]
struct Report {
    tier: Tier,
    counts: Counts,
    succeeded: bool,
    seconds: u64,
}

impl Report {
    /// The numbers, where a tier that broke (it did not compile, a test program crashed) counts as one failure: else
    /// the total would read "0 failed".
    fn counted(&self) -> Counts {
        let broke = u64::from(!self.succeeded && self.counts.failed == 0);
        Counts { failed: self.counts.failed + broke, ..self.counts }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tier, counts, seconds, .. } = self;
        write!(formatter, "{tier}: {} passed, {} failed", counts.passed, counts.failed)?;
        if counts.ignored > 0 {
            write!(formatter, ", {} ignored", counts.ignored)?;
        }
        if !self.succeeded && counts.failed == 0 {
            write!(formatter, ", and cargo test itself failed (see above)")?;
        }
        write!(formatter, " ({seconds} s)")
    }
}

/// What the tests that need root are given.
struct Inputs<'a> {
    agent: Option<&'a Path>,
    object: &'a Path,
    /// Where they leave lines for the summary.
    told: &'a Path,
}

fn run_tier(tier: Tier, inputs: &Inputs<'_>, filter: &[String]) -> Result<Report> {
    println!("\n== tests: {tier}");
    let started = Instant::now();
    let (mut counts, mut succeeded) = (Counts::default(), true);
    for selection in tier.selections() {
        let mut command = cargo();
        command.arg("test").args(*selection).arg("--no-fail-fast").arg("--").args(filter);
        // Only where it is read: for the other crates it would look like another build and link the agent anew.
        if tier.needs_root() {
            command.env("PROXIER_BPF_OBJECT", inputs.object).env(report::DIRECTORY, inputs.told);
            if let Some(agent) = inputs.agent {
                command.env("PROXIER_AGENT", agent);
            }
        }
        let (counted, went_well) = count(&mut command, &mut std::io::stdout())?;
        counts = counts.plus(counted);
        succeeded &= went_well;
    }
    Ok(Report { tier, counts, succeeded, seconds: started.elapsed().as_secs() })
}

/// Runs a `cargo test`, passing its output to `screen` as it comes, and adds up the results in it.
fn count(command: &mut Command, screen: &mut impl Write) -> Result<(Counts, bool)> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{}` did not start", line_of(command)))?;
    let mut counts = Counts::default();
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // Bytes, as a test may print what is not UTF-8.
        while output.read_until(b'\n', &mut line).context("reading cargo's output")? > 0 {
            screen.write_all(&line).context("writing to standard output")?;
            if let Some(result) = Counts::parse(&String::from_utf8_lossy(&line)) {
                counts = counts.plus(result);
            }
            line.clear();
        }
    }
    Ok((counts, child.wait().context("waiting for cargo")?.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.05s";
        assert_eq!(Counts::parse(line), Some(Counts { passed: 12, failed: 3, ignored: 1 }));
    }

    #[test]
    fn other_lines_are_no_results() {
        for line in [
            "test a::b ... ok",
            "running 3 tests",
            "test result: ",
            "the test result: ok. 1 passed; 0 failed",
        ] {
            assert_eq!(Counts::parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_results_of_all_test_programs_are_added_up() {
        let script = "echo running 2 tests; echo 'test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured';
            printf '\\377\\n'; echo 'test result: FAILED. 1 passed; 4 failed; 5 ignored; 0 measured'; exit 101";
        let mut screen = Vec::new();
        let (counts, succeeded) = count(Command::new("sh").args(["-c", script]), &mut screen).unwrap();
        assert_eq!(counts, Counts { passed: 3, failed: 4, ignored: 5 });
        assert!(!succeeded);
        assert!(screen.starts_with(b"running 2 tests\n"), "what cargo prints is shown");
        assert_eq!(screen.iter().filter(|byte| **byte == b'\n').count(), 4);
    }

    fn report(counts: Counts, succeeded: bool) -> Report {
        Report { tier: Tier::Lab, counts, succeeded, seconds: 7 }
    }

    #[test]
    fn a_tier_that_does_not_compile_counts_as_a_failure() {
        let broken = report(Counts::default(), false);
        assert_eq!(broken.counted().failed, 1);
        assert_eq!(
            broken.to_string(),
            "lab: 0 passed, 0 failed, and cargo test itself failed (see above) (7 s)"
        );
    }

    #[test]
    fn failed_tests_are_counted_once() {
        let failed = report(Counts { passed: 5, failed: 2, ignored: 1 }, false);
        assert_eq!(failed.counted().failed, 2);
        assert_eq!(failed.to_string(), "lab: 5 passed, 2 failed, 1 ignored (7 s)");
    }

    #[test]
    fn without_root_only_the_host_tier_runs_and_the_rest_is_named() {
        assert_eq!(plan(&[], false), (vec![Tier::Host], vec![Tier::Kernel, Tier::Lab]));
        assert_eq!(plan(&[], true), (Tier::ALL.to_vec(), vec![]));
        assert_eq!(plan(&[Tier::Lab], true), (vec![Tier::Lab], vec![]));
        assert_eq!(plan(&[Tier::Lab, Tier::Host], false), (vec![Tier::Host], vec![Tier::Lab]));
    }

    #[test]
    fn a_tier_left_out_fails_only_where_nobody_reads_it() {
        let passed = Counts { passed: 3, ..Counts::default() };
        assert!(is_good(passed, &[Tier::Lab], false));
        assert!(!is_good(passed, &[Tier::Lab], true));
        assert!(is_good(passed, &[], true));
        assert!(!is_good(Counts { failed: 1, ..passed }, &[], false));
        assert!(!is_good(Counts::default(), &[], false), "a filter that matches nothing proves nothing");
    }

    #[test]
    fn the_agent_is_where_cargo_says() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"proxier"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/x/other"}
not json
{"reason":"compiler-artifact","target":{"name":"proxier"},"executable":"/x/proxier"}"#;
        assert_eq!(executable_in(messages), Some("/x/proxier".into()));
        assert_eq!(executable_in(""), None);
    }
}
