//! `cargo xtask bench data`: how fast packets get from a client to a pod. The benchmark measures and leaves a report; this
//! makes tables and pictures of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use proxier_tests::bench::{Plan, Report, arm::Kind, figure::Figure, with_reference};

use super::{Built, chart, table};
use crate::{
    environment::{Tool, tool},
    process::{say, workspace},
};

/// What it runs beside the lab's own tools.
pub(super) const TOOLS: &[Tool] = &[
    tool("iperf3", &["iperf3"], "TCP throughput"),
    tool("iptables-restore", &["iptables"], "the rules that proxier is compared with"),
    tool("conntrack", &["conntrack"], "whether connections go by netfilter's NAT or past it"),
    tool("taskset", &["util-linux"], "client and pod on a CPU each"),
];

/// More than this, in percent of all CPUs, in use before the measurement is worth a word.
const QUIET: f64 = 10.0;
/// More datagrams than these, in percent, lost between sender and receiver mean that the receiver was the limit.
const LOSS: f64 = 1.0;

/// What to measure.
#[derive(Debug, Default, clap::Args)]
pub(super) struct DataOptions {
    /// Arms to measure, `route` always among them [default: all]
    #[arg(long, value_delimiter = ',', value_name = "ARM", value_parser = parse_kind)]
    arms: Vec<Kind>,
    /// How many external addresses there are, for arms with a table [default: 1,1000,10000,100000]
    #[arg(long, value_delimiter = ',', value_name = "NUMBER")]
    addresses: Vec<u32>,
    /// How many times each figure of each arm is taken [default: 10]
    #[arg(long)]
    rounds: Option<u32>,
    /// How long the traffic of a figure lasts, in milliseconds; TCP throughput takes whole seconds [default: 1000]
    #[arg(long, value_name = "MILLISECONDS")]
    burst: Option<u64>,
}

fn parse_kind(name: &str) -> std::result::Result<Kind, String> {
    Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
        let names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        format!("the arms are {}", names.join(", "))
    })
}

impl DataOptions {
    fn plan(&self, quick: bool) -> Plan {
        let usual = if quick { Plan::quick() } else { Plan::full() };
        Plan {
            kinds: with_reference(self.arms.clone()),
            addresses: if self.addresses.is_empty() { usual.addresses } else { self.addresses.clone() },
            rounds: self.rounds.unwrap_or(usual.rounds),
            burst_ms: self.burst.unwrap_or(usual.burst_ms),
            ..usual
        }
    }
}

/// Measures, prints, and leaves report, table and pictures in `target/bench`.
pub(super) fn run(options: &DataOptions, quick: bool, built: &Built) -> Result<()> {
    let directory = workspace().join("target/bench");
    let output = directory.join("data.json");
    let plan = Plan { output: Some(output.clone()), ..options.plan(quick) };
    plan.check()?;
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    say("building the benchmark; with all optimization, that takes minutes the first time");
    built.bench("data", [serde_json::to_string(&plan)?])?;
    let text = fs::read_to_string(&output).with_context(|| format!("cannot read {}", output.display()))?;
    let report: Report = serde_json::from_str(&text).context("the benchmark's report")?;
    println!("{}", table::on_screen(&report));
    for remark in remarks(&report) {
        println!("{remark}");
    }
    let mut files = vec![output];
    files.push(write(&directory, "data.md", &page(&report))?);
    for figure in Figure::COMPARED {
        if let Some(picture) = chart::of_figure(&report, figure) {
            files.push(write(&directory, &format!("{}.svg", figure.slug()), &picture)?);
        }
    }
    if !report.programs.is_empty() {
        files.push(write(&directory, "programs.svg", &chart::of_programs(&report.programs))?);
    }
    for file in files {
        println!("{}", file.display());
    }
    Ok(())
}

fn write(directory: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// What goes into `docs/BENCHMARKS.md`, as it is.
fn page(report: &Report) -> String {
    let remarks: String = remarks(report).iter().map(|remark| format!("* {remark}\n")).collect();
    format!("{remarks}\n{}", table::as_markdown(report))
}

/// What a reader of the figures has to know.
fn remarks(report: &Report) -> Vec<String> {
    let machine = &report.machine;
    let mut remarks = vec![format!(
        "{} rounds in {} s; Linux {}, {} x {}; client on CPU {}, pod on CPU {}",
        report.plan.rounds,
        report.seconds,
        machine.kernel,
        machine.cpus,
        machine.processor,
        machine.pinned.client,
        machine.pinned.pod
    )];
    if machine.busy_percent > QUIET {
        remarks.push(format!(
            "the machine was not idle ({:.0}% of its CPUs' time): take the figures of another run",
            machine.busy_percent
        ));
    }
    if machine.pinned.client == machine.pinned.pod {
        remarks.push("one CPU for both ends: figures are of switching between them as well".to_owned());
    }
    for row in &report.rows {
        let lost = table::median(row, Figure::UdpLostPercent);
        if let Some(lost) = lost.filter(|lost| *lost > LOSS) {
            remarks.push(format!(
                "{}: {lost:.0}% of UDP packets got lost: its receiver was the limit, not the way",
                row.arm
            ));
        }
    }
    remarks.extend(report.left_out.iter().map(|reason| format!("left out: {reason}")));
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_is_as_usual() {
        let options = DataOptions { rounds: Some(1), ..DataOptions::default() };
        let plan = options.plan(false);
        assert_eq!((plan.rounds, plan.addresses.len(), plan.burst_ms), (1, 4, 1000));
        assert!(plan.kinds.is_empty(), "which is all of them");
        let plan = DataOptions { addresses: vec![7], ..DataOptions::default() }.plan(true);
        assert_eq!((plan.rounds, plan.addresses), (3, vec![7]));
    }

    #[test]
    fn an_arm_that_there_is_not_is_refused_with_a_list() {
        assert_eq!(parse_kind("proxier-stack"), Ok(Kind::ProxierStack));
        let error = parse_kind("ipvs").unwrap_err();
        assert!(error.contains("iptables-10k") && error.contains("wire"), "{error}");
    }

    #[test]
    fn a_page_says_of_what_the_figures_are_and_then_has_the_tables() {
        let page = page(&super::table::tests::report());
        let (remarks, tables) = page.split_once("\n\n").unwrap();
        assert!(remarks.starts_with("* ") && remarks.contains("Linux 6.12.1"), "{remarks}");
        assert!(tables.starts_with('|') && tables.contains("| nft"), "{tables}");
    }

    #[test]
    fn a_reader_is_told_what_was_not_as_it_should_be() {
        let mut report = super::table::tests::report();
        assert_eq!(remarks(&report).len(), 1, "{:?}", remarks(&report));
        report.machine.busy_percent = 31.7;
        report.machine.pinned.pod = report.machine.pinned.client;
        report.left_out.push("proxier-xdp: this agent has no --ingress".to_owned());
        report.rows[1].figures.insert(Figure::UdpLostPercent, vec![0.0, 12.0, 14.0]);
        let all = remarks(&report).join("\n");
        for word in ["32% of its CPUs", "one CPU", "nft: 12%", "left out: proxier-xdp"] {
            assert!(all.contains(word), "{word}: {all}");
        }
    }
}
