//! `cargo xtask coverage`: what of the packet core its tests on the host reach: lines, regions and branches of each file
//! with cargo-llvm-cov, and by name whatever is not reached. Generic code counts as reached if one of the types it is
//! compiled for reaches it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde_json::Value;

use crate::{
    cargo_tool::CargoTool,
    environment::Environment,
    process::{line_of, output, run, say, which, workspace},
    unstable::Unstable,
};

/// Arguments of `coverage`.
#[derive(Debug, clap::Args)]
pub(crate) struct CoverageOptions {
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
    /// A filter and other arguments for the test programs, as `--skip corpus`
    #[arg(last = true)]
    filter: Vec<String>,
}

const CARGO_LLVM_COV: CargoTool =
    CargoTool { name: "cargo-llvm-cov", version: "0.9.1", purpose: "measures which code the tests reach" };

/// The packet core: files right in this folder, and not the adapters to the kernel below it.
const CORE: &str = "proxier-ebpf/src";
/// Entry point for the kernel's target; on a host it does nothing.
const LEFT_OUT: &str = "main.rs";

/// Runs the command; whether everything is reached.
pub(crate) fn run_command(options: &CoverageOptions) -> Result<bool> {
    let environment = Environment::new(!options.no_install);
    let program = CARGO_LLVM_COV.find(&environment)?;
    let toolchain = Unstable::find()?;
    let tools = LlvmTools::find(&environment, &toolchain)?;
    say(&format!("measuring with {toolchain} and {}", tools.cov.display()));
    let report = workspace().join("target/coverage.json");
    let mut command = toolchain.run(&program);
    command
        .args(["llvm-cov", "--package", "proxier-ebpf", "--branch", "--json", "--output-path"])
        .arg(&report)
        .env("LLVM_COV", &tools.cov)
        .env("LLVM_PROFDATA", &tools.profdata)
        .arg("--")
        .args(&options.filter);
    run(&mut command)?;
    let text = fs::read_to_string(&report).with_context(|| report.display().to_string())?;
    let report: Value = serde_json::from_str(&text).with_context(|| line_of(&command))?;
    let coverage = Coverage::read(&report, &workspace().join(CORE));
    println!("\n{}", coverage.table());
    let missed =
        coverage.missed(&|file| fs::read_to_string(workspace().join(CORE).join(file)).unwrap_or_default());
    if missed.is_empty() {
        println!("everything is reached");
    } else {
        println!("not reached:\n{}", missed.join("\n"));
    }
    Ok(missed.is_empty())
}

/// The two programs of LLVM that make a report of what an instrumented program has counted; their version is the
/// compiler's.
#[derive(Debug)]
struct LlvmTools {
    cov: PathBuf,
    profdata: PathBuf,
}

impl LlvmTools {
    fn find(environment: &Environment, toolchain: &Unstable) -> Result<Self> {
        if let (Some(cov), Some(profdata)) = (std::env::var_os("LLVM_COV"), std::env::var_os("LLVM_PROFDATA"))
        {
            return Ok(Self { cov: cov.into(), profdata: profdata.into() });
        }
        let version = toolchain.llvm()?;
        let folders = [toolchain.rustlib()?.join("bin"), format!("/usr/lib/llvm-{version}/bin").into()];
        if let Some(tools) = folders.iter().find_map(|folder| Self::in_folder(folder)) {
            return Ok(tools);
        }
        if environment.may_install()
            && which("rustup").is_some()
            && let Some(name) = toolchain.rustup_name()
        {
            say(&format!("installing llvm-tools for {name}: llvm-cov and llvm-profdata"));
            let mut rustup = std::process::Command::new("rustup");
            let added = output(rustup.args(["component", "add", "llvm-tools", "--toolchain", &name]));
            match added.map(|_| Self::in_folder(&folders[0])) {
                Ok(Some(tools)) => return Ok(tools),
                Ok(None) => say("that did not bring them"),
                Err(error) => say(&format!("that did not work: {error:#}")),
            }
        }
        say(&format!("LLVM {version}'s llvm-cov and llvm-profdata are missing"));
        environment
            .install(&[&format!("llvm-{version}")])
            .context("or name them with LLVM_COV and LLVM_PROFDATA; rustup has them too: rustup component add llvm-tools")?;
        Self::in_folder(&folders[1]).with_context(|| format!("no llvm-cov in {}", folders[1].display()))
    }

    fn in_folder(folder: &Path) -> Option<Self> {
        let tools = Self { cov: folder.join("llvm-cov"), profdata: folder.join("llvm-profdata") };
        (tools.cov.is_file() && tools.profdata.is_file()).then_some(tools)
    }
}

/// A piece of a file: first line and column, last line and column.
type Span = (u64, u64, u64, u64);

/// What was reached of one file.
#[derive(Debug, Default)]
struct FileCoverage {
    /// All lines, and those reached.
    lines: (u64, u64),
    /// How often each region was reached.
    regions: BTreeMap<Span, u64>,
    /// How often each condition was true, and false.
    branches: BTreeMap<Span, (u64, u64)>,
}

/// What was reached of the packet core.
#[derive(Debug, Default)]
struct Coverage {
    files: BTreeMap<String, FileCoverage>,
}

/// The kind of a region that is code; others are gaps between such, or hold them.
const CODE: u64 = 0;

impl Coverage {
    /// Reads what `llvm-cov export` writes (format 2 and 3): files with segments `[line, column, count, has count, is entry,
    /// is gap]`, functions with regions `[line, column, line, column, count, file, ...]` and branches `[line, column, line,
    /// column, true, false, file, ...]`.
    fn read(report: &Value, core: &Path) -> Self {
        let mut coverage = Self::default();
        let name_of = |path: &Value| {
            let path = Path::new(path.as_str()?);
            let name = path.file_name()?.to_string_lossy().into_owned();
            (path.parent()? == core && name != LEFT_OUT).then_some(name)
        };
        for file in array(&report["data"][0]["files"]) {
            if let Some(name) = name_of(&file["filename"]) {
                coverage.files.entry(name).or_default().lines = lines(array(&file["segments"]));
            }
        }
        for function in array(&report["data"][0]["functions"]) {
            let names: Vec<Option<String>> = array(&function["filenames"]).iter().map(name_of).collect();
            let file = |index: &Value| names.get(usize::try_from(number(index)).ok()?)?.clone();
            for region in array(&function["regions"]) {
                if let Some(name) = file(&region[5])
                    && number(&region[7]) == CODE
                {
                    let regions = &mut coverage.files.entry(name).or_default().regions;
                    *regions.entry(span(region)).or_default() += number(&region[4]);
                }
            }
            for branch in array(&function["branches"]) {
                if let Some(name) = file(&branch[6]) {
                    let branches = &mut coverage.files.entry(name).or_default().branches;
                    let (was_true, was_false) = branches.entry(span(branch)).or_default();
                    *was_true += number(&branch[4]);
                    *was_false += number(&branch[5]);
                }
            }
        }
        coverage
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(NOTHING).set_header(["FILE", "LINES", "REGIONS", "BRANCHES"]);
        let mut total = [(0, 0); 3];
        for (name, file) in &self.files {
            let figures = [file.lines, file.reached_regions(), file.reached_branches()];
            for (sum, figure) in total.iter_mut().zip(figures) {
                *sum = (sum.0 + figure.0, sum.1 + figure.1);
            }
            table.add_row([name.clone()].into_iter().chain(figures.map(percentage)));
        }
        table.add_row(["all".to_owned()].into_iter().chain(total.map(percentage)));
        for column in 1..4 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    /// One line for each region and each side of a branch that no test reaches, with the source.
    fn missed(&self, source: &dyn Fn(&str) -> String) -> Vec<String> {
        let mut missed = Vec::new();
        for (name, file) in &self.files {
            let text = source(name);
            let line_at = |line: u64| {
                let index = usize::try_from(line).unwrap_or(usize::MAX).saturating_sub(1);
                text.lines().nth(index).unwrap_or_default().trim().to_owned()
            };
            let mut of_file: Vec<(Span, &str)> = Vec::new();
            let not_reached = file.regions.iter().filter(|(_, count)| **count == 0);
            of_file.extend(not_reached.map(|(span, _)| (*span, "never reached")));
            for (span, (was_true, was_false)) in &file.branches {
                if *was_true == 0 {
                    of_file.push((*span, "never true"));
                }
                if *was_false == 0 {
                    of_file.push((*span, "never false"));
                }
            }
            of_file.sort_unstable();
            missed.extend(of_file.into_iter().map(|((line, column, ..), what)| {
                format!("  {CORE}/{name}:{line}:{column}: {what}: {}", line_at(line))
            }));
        }
        missed
    }
}

impl FileCoverage {
    fn reached_regions(&self) -> (u64, u64) {
        count(self.regions.values().map(|count| *count > 0))
    }

    /// Each branch has two sides.
    fn reached_branches(&self) -> (u64, u64) {
        count(self.branches.values().flat_map(|(was_true, was_false)| [*was_true > 0, *was_false > 0]))
    }
}

/// All lines with code, and those reached, as llvm-cov counts them: a segment holds until the next one, and a line is
/// reached if the segment that goes on from the line before is, or one that begins in it. (Its own summary takes of a
/// generic function the one type that reaches most.)
fn lines(segments: &[Value]) -> (u64, u64) {
    let flag = |segment: &Value, index: usize| segment[index].as_bool().unwrap_or(false);
    let mut by_line: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for segment in segments {
        by_line.entry(number(&segment[0])).or_default().push(segment);
    }
    let last = by_line.keys().next_back().copied().unwrap_or(0);
    let mut before: Option<&Value> = None;
    count((1..=last).filter_map(|line| {
        let here = by_line.get(&line).map_or(&[][..], Vec::as_slice);
        let goes_on = before.filter(|segment| flag(segment, 3));
        let begin = here.iter().filter(|segment| flag(segment, 3) && flag(segment, 4) && !flag(segment, 5));
        let is_code = goes_on.is_some() || begin.clone().next().is_some();
        let reached = goes_on.into_iter().chain(begin.copied()).any(|segment| number(&segment[2]) > 0);
        before = here.last().copied().or(before);
        is_code.then_some(reached)
    }))
}

/// How many, and how many of them hold.
fn count(reached: impl Iterator<Item = bool>) -> (u64, u64) {
    reached.fold((0, 0), |(all, reached), is_reached| (all + 1, reached + u64::from(is_reached)))
}

fn percentage((all, reached): (u64, u64)) -> String {
    // In tenths, rounded down: 100 % is all.
    let tenths = (reached * 1000).checked_div(all).unwrap_or(1000);
    format!("{reached}/{all} {:>3}.{} %", tenths / 10, tenths % 10)
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn span(place: &Value) -> Span {
    (number(&place[0]), number(&place[1]), number(&place[2]), number(&place[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generic function, compiled for two types: one took one way, the other the other.
    fn report() -> Value {
        let function = |was_true: u64, was_false: u64| {
            serde_json::json!({
                "filenames": ["/core/a.rs", "/core/bpf/b.rs"],
                "regions": [
                    [1, 1, 3, 2, was_true + was_false, 0, 0, 0], [2, 5, 2, 9, was_true, 0, 0, 0],
                    [3, 1, 3, 2, 0, 0, 0, 0], [4, 1, 4, 2, 0, 0, 0, 3], [9, 1, 9, 2, 0, 1, 0, 0],
                ],
                "branches": [[1, 4, 1, 8, was_true, was_false, 0, 0, 4], [2, 1, 2, 4, was_true, 0, 0, 0, 4]],
            })
        };
        serde_json::json!({"data": [{
            "files": [
                {"filename": "/core/a.rs", "segments": [
                    [1, 1, 7, true, true, false], [2, 9, 0, true, true, false], [3, 2, 0, false, false, false],
                ]},
                {"filename": "/core/main.rs", "segments": [[1, 1, 0, true, true, false]]},
                {"filename": "/core/bpf/b.rs", "segments": [[1, 1, 0, true, true, false]]},
            ],
            "functions": [function(5, 0), function(0, 2)],
        }]})
    }

    #[test]
    fn what_one_of_several_types_reaches_is_reached() {
        let coverage = Coverage::read(&report(), Path::new("/core"));
        let [(name, file)] = coverage.files.iter().collect::<Vec<_>>()[..] else { panic!("{coverage:?}") };
        assert_eq!(name, "a.rs", "neither the entry point nor the adapters");
        assert_eq!(file.lines, (3, 2));
        assert_eq!(file.reached_regions(), (3, 2));
        assert_eq!(file.reached_branches(), (4, 3));
    }

    #[test]
    fn what_is_missed_is_named_with_its_source() {
        let coverage = Coverage::read(&report(), Path::new("/core"));
        let missed = coverage.missed(&|_| "if a {\n    b()\n}\n".to_owned());
        assert_eq!(
            missed,
            [
                "  proxier-ebpf/src/a.rs:2:1: never false: b()",
                "  proxier-ebpf/src/a.rs:3:1: never reached: }"
            ]
        );
        let table = coverage.table().to_string();
        assert!(table.contains("2/3  66.6 %") && table.contains("3/4  75.0 %"), "{table}");
    }

    #[test]
    fn a_line_is_reached_if_a_piece_of_it_is() {
        let segments = serde_json::json!([
            // A function from line 2 to 6, with a block from line 3 to 5 that is not reached.
            [2, 1, 1, true, true, false],
            [3, 9, 0, true, true, false],
            [5, 3, 1, true, false, false],
            [6, 2, 0, false, false, false],
            // Code that is not reached, behind a gap.
            [8, 1, 0, true, true, false],
            [8, 9, 0, false, false, false],
        ]);
        assert_eq!(lines(array(&segments)), (6, 3));
        assert_eq!(lines(&[]), (0, 0));
    }

    #[test]
    fn all_is_a_hundred_per_cent_and_nothing_else_is() {
        assert_eq!(percentage((1_000_000, 999_999)), "999999/1000000  99.9 %");
        assert_eq!(percentage((3, 3)), "3/3 100.0 %");
        assert_eq!(percentage((0, 0)), "0/0 100.0 %");
    }
}
