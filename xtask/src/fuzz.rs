//! `cargo xtask fuzz`: runs the fuzz targets (`proxier-ebpf/fuzz`) with cargo-fuzz, from the committed
//! corpus. What they find that is new stays in `target/`, unless it is to be kept. What they check is theirs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cargo_tool::CargoTool,
    environment::{Environment, Tool},
    process::{line_of, run, say, workspace},
    unstable::Unstable,
};

/// Arguments of `fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzOptions {
    /// Targets to run; all by default
    targets: Vec<String>,
    /// How long each of them runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Run the one target on this file only: a crash again
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Take what is found into the committed corpus, and leave out of that what reaches nothing new
    #[arg(long)]
    keep: bool,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
}

const CARGO_FUZZ: CargoTool =
    CargoTool { name: "cargo-fuzz", version: "0.13.2", purpose: "builds and runs the fuzz targets" };

const COMPILER: Tool = Tool { program: "c++", packages: &["g++"], purpose: "libFuzzer is written in C++" };

/// Longest input, in bytes: a frame with every header that matters, or a conversation of all its steps.
const LONGEST: u32 = 1024;

/// What can be said about memory errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sanitizer {
    Address,
    /// Where the compiler comes without its runtime. Panics, wrong answers and endless loops are found all the same.
    None,
}

impl Sanitizer {
    fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::None => "none",
        }
    }

    fn of(toolchain: &Unstable) -> Result<Self> {
        let libraries = toolchain.rustlib()?.join("lib");
        let has_runtime = fs::read_dir(&libraries).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with("rt.asan.a"))
        });
        Ok(if has_runtime { Self::Address } else { Self::None })
    }
}

/// cargo-fuzz, and all that its commands have in common.
struct Fuzzer {
    program: PathBuf,
    toolchain: Unstable,
    sanitizer: Sanitizer,
}

/// Runs the command; whether every target ran and found nothing.
pub(crate) fn run_command(options: &FuzzOptions) -> Result<bool> {
    let environment = Environment::new(!options.no_install);
    let all = targets()?;
    let chosen = choose(&options.targets, &all)?;
    environment.ensure_tools(&[COMPILER])?;
    let program = CARGO_FUZZ.find(&environment)?;
    let toolchain = Unstable::find()?;
    let sanitizer = Sanitizer::of(&toolchain)?;
    say(&format!("fuzzing with {toolchain}, sanitizer: {}", sanitizer.name()));
    let fuzzer = Fuzzer { program, toolchain, sanitizer };
    if let Some(input) = &options.input {
        let [target] = chosen[..] else { bail!("--input needs one target: {}", all.join(", ")) };
        return Ok(fuzzer.run_input(target, input));
    }
    run(&mut fuzzer.command("build")).context("the fuzz targets do not compile")?;
    let mut clean = true;
    for target in &chosen {
        clean &= fuzzer.fuzz(target, options.seconds)?;
    }
    if options.keep {
        for target in &chosen {
            fuzzer.keep(target)?;
        }
    }
    Ok(clean)
}

fn folder() -> PathBuf {
    workspace().join("proxier-ebpf/fuzz")
}

/// Every target: one file each.
fn targets() -> Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn choose<'a>(wanted: &[String], all: &'a [String]) -> Result<Vec<&'a str>> {
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("no fuzz target {unknown}; there are: {}", all.join(", "));
    }
    Ok(all.iter().filter(|name| wanted.is_empty() || wanted.contains(name)).map(String::as_str).collect())
}

impl Fuzzer {
    fn command(&self, subcommand: &str) -> Command {
        let mut command = self.toolchain.run(&self.program);
        command
            .args(["fuzz", subcommand, "--sanitizer", self.sanitizer.name(), "--fuzz-dir"])
            .arg(folder())
            // One for each compiler and sanitizer would be built anew at every change between them.
            .arg("--target-dir")
            .arg(workspace().join("target/fuzz").join(self.sanitizer.name()))
            // The core allocates nothing that could leak, and what is freed need not be kept for long.
            .env("ASAN_OPTIONS", "detect_leaks=0:quarantine_size_mb=16");
        command
    }

    /// Runs a target for a while; whether nothing was found.
    fn fuzz(&self, target: &str, seconds: u32) -> Result<bool> {
        let found = found(target);
        fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
        let log = workspace().join("target/fuzz").join(format!("{target}.log"));
        let output = File::create(&log).with_context(|| log.display().to_string())?;
        // The first folder is written to, all are read.
        let mut folders = vec![found];
        folders.extend([committed(target), kept(target)].into_iter().filter(|folder| folder.is_dir()));
        let mut command = self.command("run");
        command
            .arg(target)
            .args(folders)
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={LONGEST}"))
            .args(["-timeout=10", "-print_final_stats=1"])
            .stdout(output.try_clone().context("the log")?)
            .stderr(output);
        say(&format!("{target}: {seconds} s, log in {}", log.display()));
        let began = SystemTime::now();
        let status = command.status().with_context(|| format!("`{}` did not start", line_of(&command)))?;
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        if status.success() {
            println!("{target}: {}", Figures::read(&text));
            return Ok(true);
        }
        println!("{target}: FAILED\n{}", what_failed(&text));
        for artifact in artifacts(target, began) {
            println!("the input: {}", artifact.display());
            println!("again:     cargo xtask fuzz {target} --input {}", artifact.display());
            println!("as a test: install -D -t {} {}", kept(target).display(), artifact.display());
            println!("           cargo test -p {}", test_of(target));
        }
        Ok(false)
    }

    /// Runs a target on one file; whether everything held.
    fn run_input(&self, target: &str, input: &Path) -> bool {
        // What runs is in the work tree, what was typed is relative to here.
        let input = std::path::absolute(input).unwrap_or_else(|_| input.to_owned());
        run(self.command("run").arg(target).arg(input))
            .inspect_err(|error| say(&format!("{error:#}")))
            .is_ok()
    }

    /// The committed corpus and what was found, with nothing in it that reaches only what others reach.
    fn keep(&self, target: &str) -> Result<()> {
        let (found, committed) = (found(target), committed(target));
        fs::create_dir_all(&committed).with_context(|| committed.display().to_string())?;
        for entry in fs::read_dir(&found).with_context(|| found.display().to_string())?.flatten() {
            fs::copy(entry.path(), committed.join(entry.file_name()))
                .with_context(|| entry.path().display().to_string())?;
        }
        let mut command = self.command("cmin");
        run(command.arg(target).arg(&committed).arg("--").arg(format!("-max_len={LONGEST}")))?;
        fs::remove_dir_all(&found).with_context(|| found.display().to_string())?;
        let kept = fs::read_dir(&committed).map_or(0, Iterator::count);
        println!("{target}: {kept} inputs in {}", committed.display());
        Ok(())
    }
}

fn committed(target: &str) -> PathBuf {
    folder().join("corpus").join(target)
}

fn kept(target: &str) -> PathBuf {
    folder().join("kept").join(target)
}

fn found(target: &str) -> PathBuf {
    workspace().join("target/fuzz/found").join(target)
}

/// The test that runs the corpus of a target.
fn test_of(target: &str) -> &'static str {
    match target {
        "localv1_op" => "proxier --lib source::api::import",
        _ => "proxier-ebpf --test corpus",
    }
}

/// What a run left behind since it began: one file per failure.
fn artifacts(target: &str, began: SystemTime) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder().join("artifacts").join(target));
    let is_new = |path: &PathBuf| {
        path.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|changed| changed >= began)
    };
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_new).collect()
}

/// The panic or the sanitizer's report, without the thousands of lines before it.
fn what_failed(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let is_start = |line: &&str| {
        [" panicked at ", "ERROR: ", "error: ", "error["].iter().any(|start| line.contains(start))
    };
    let start = lines.iter().position(is_start).unwrap_or(lines.len().saturating_sub(20));
    lines[start..].iter().take(40).copied().collect::<Vec<_>>().join("\n")
}

/// How far a run came.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    runs: u64,
    runs_per_second: u64,
    corpus: String,
}

impl Figures {
    /// Reads libFuzzer's last words: `stat::number_of_executed_units: 41234`, and the line before that says DONE.
    fn read(log: &str) -> Self {
        let number = |name: &str| {
            log.lines()
                .find_map(|line| line.strip_prefix(name)?.trim_start_matches(':').trim().parse().ok())
                .unwrap_or(0)
        };
        let corpus = log
            .lines()
            .find(|line| line.contains("DONE"))
            .and_then(|line| line.split_once("corp: ")?.1.split_whitespace().next());
        Self {
            runs: number("stat::number_of_executed_units"),
            runs_per_second: number("stat::average_exec_per_sec"),
            corpus: corpus.unwrap_or("?").to_owned(),
        }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { runs, runs_per_second, corpus } = self;
        write!(
            formatter,
            "{runs} runs, {runs_per_second} per second, {corpus} of different inputs, no failure"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus() {
        let targets = targets().unwrap();
        assert!(!targets.is_empty());
        for target in targets {
            assert!(committed(&target).is_dir(), "{target}");
        }
    }

    #[test]
    fn only_targets_that_there_are_can_be_chosen() {
        let all = ["a".to_owned(), "b".to_owned()];
        assert_eq!(choose(&[], &all).unwrap(), ["a", "b"]);
        assert_eq!(choose(&["b".to_owned()], &all).unwrap(), ["b"]);
        let error = choose(&["c".to_owned()], &all).unwrap_err().to_string();
        assert!(error.contains("no fuzz target c; there are: a, b"), "{error}");
    }

    #[test]
    fn the_figures_of_a_run_are_read() {
        let log = "#18385\tDONE   cov: 2071 ft: 3722 corp: 260/17Kb lim: 130 exec/s: 1671 rss: 488Mb\n\
            Done 18385 runs in 11 second(s)\nstat::number_of_executed_units: 18385\n\
            stat::average_exec_per_sec:     1671\n";
        let figures = Figures { runs: 18_385, runs_per_second: 1_671, corpus: "260/17Kb".into() };
        assert_eq!(Figures::read(log), figures);
    }

    #[test]
    fn of_a_failure_the_reason_is_shown_and_not_the_way_there() {
        let log =
            "#1 NEW\n#2 NEW\nthread '<unnamed>' (7) panicked at src/world.rs:1:2:\nof another address\n";
        assert!(what_failed(log).starts_with("thread '<unnamed>'"));
        assert!(what_failed(log).ends_with("of another address"));
        let report = "#1 NEW\n==7==ERROR: AddressSanitizer: heap-buffer-overflow\n#0 in core\n";
        assert!(what_failed(report).starts_with("==7==ERROR"));
        assert_eq!(what_failed("nothing like that"), "nothing like that");
    }
}
