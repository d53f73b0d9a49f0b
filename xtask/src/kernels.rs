//! `cargo xtask kernels`: boots the kernels that this distribution has packages of in virtual machines, and lets the real
//! agent deliver real traffic in each. For what differs between kernels: whether the verifier accepts the programs, how
//! they are attached, and that nothing is lost or left behind. Not a replacement of `cargo xtask test`, which covers
//! more, on the one kernel that runs it.

mod guest;
mod machine;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use comfy_table::{Table, presets::NOTHING};

use self::machine::Machine;
use crate::{
    build_ebpf,
    environment::{Environment, LAB_TOOLS, Tool, candidate},
    process::{output, run, say},
    test, toolchain,
};

/// Debian's kernels for virtual machines, the oldest first: before tcx, and after it.
const PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64"];

const TOOLS: &[Tool] = &[
    Tool {
        program: "qemu-system-x86_64",
        packages: &["qemu-system-x86"],
        purpose: "the virtual machines that other kernels run in",
    },
    Tool { program: "cpio", packages: &["cpio"], purpose: "packs what a virtual machine starts from" },
    Tool {
        program: "depmod",
        packages: &["kmod"],
        purpose: "lists the modules of a kernel; modprobe loads them",
    },
    Tool { program: "tc", packages: &["iproute2"], purpose: "shows what is attached by clsact" },
];

/// Arguments of `kernels`.
#[derive(Debug, clap::Args)]
pub(crate) struct KernelsOptions {
    /// A kernel to boot: a Debian package, or a .deb file of one. May be given more than once
    #[arg(long = "kernel", value_name = "PACKAGE|FILE", default_values = PACKAGES)]
    kernels: Vec<String>,
    /// Give up on a kernel after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Emulate the processor although /dev/kvm is there
    #[arg(long)]
    emulate: bool,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
    /// Run the checks on this machine's own kernel, and exit: what a virtual machine does
    #[arg(long, hide = true)]
    inside: bool,
}

/// Runs the command; whether every kernel passed every check.
pub(crate) fn run_command(options: &KernelsOptions) -> Result<bool> {
    if options.inside {
        return guest::run_checks();
    }
    if !cfg!(target_arch = "x86_64") {
        bail!("the kernels are Debian's for x86-64, and so must this machine be");
    }
    let environment = Environment::new(!options.no_install);
    environment.ensure_tools(LAB_TOOLS)?;
    environment.ensure_tools(TOOLS)?;
    environment.refresh_lists()?;
    let object = build_ebpf::build(&environment)?;
    let agent = test::build_agent()?;
    let cache = toolchain::cache()?.join("kernels");

    let mut outcomes = Vec::new();
    let mut skipped = Vec::new();
    for kernel in &options.kernels {
        let image = match Image::get(&environment, kernel, &cache)? {
            Source::There(image) => image,
            Source::Missing(reason) => {
                say(&format!("SKIPPED {kernel}: {reason}"));
                skipped.push(format!("{kernel}: {reason}"));
                continue;
            }
        };
        println!("\n== {}", image.release);
        let machine = Machine::prepare(&image, &agent, &object)?;
        let report = machine.run(Duration::from_secs(options.timeout), options.emulate)?;
        outcomes.push(Outcome::read(&image.release, &report));
    }

    println!("\n{}", table(&outcomes));
    for outcome in outcomes.iter().filter(|outcome| !outcome.passed()) {
        for failure in &outcome.failures {
            println!("{}: {failure}", outcome.release);
        }
    }
    for line in &skipped {
        println!("SKIPPED {line}");
    }
    let passed = outcomes.iter().filter(|outcome| outcome.passed()).count();
    let failed = outcomes.len() - passed;
    println!("kernels: {passed} passed, {failed} failed");
    Ok(failed == 0 && passed > 0)
}

/// A kernel and its modules, unpacked.
struct Image {
    /// As `uname -r` says it.
    release: String,
    folder: PathBuf,
}

/// Whether a kernel can be had.
enum Source {
    There(Image),
    Missing(String),
}

impl Image {
    fn get(environment: &Environment, name: &str, cache: &Path) -> Result<Source> {
        std::fs::create_dir_all(cache).with_context(|| format!("{}: cannot be made", cache.display()))?;
        if name.ends_with(".deb") {
            return Ok(Source::There(Self::unpack(Path::new(name), cache)?));
        }
        // The names without a version depend on the package that has the kernel.
        let depends =
            output(Command::new("apt-cache").args(["depends", "--important", name]).env("LC_ALL", "C"))
                .unwrap_or_default();
        let package = kernel_package(name, &depends);
        let Some(version) = candidate(&package) else {
            return Ok(Source::Missing("none of this machine's apt sources has it".into()));
        };
        // apt writes the epoch's colon as %3a into the name of a file.
        let file = cache.join(format!("{package}_{}_amd64.deb", version.replace(':', "%3a")));
        if !file.is_file() {
            let mut download = Command::new("apt-get");
            download.args(["download", "-q", &package]).current_dir(cache);
            if !environment.may_install() {
                bail!("{} is missing. Run, in that folder:\n  apt-get download {package}", file.display());
            }
            say(&format!("downloading {package} {version} into {}: a kernel to boot", cache.display()));
            run(&mut download)?;
        }
        Ok(Source::There(Self::unpack(&file, cache)?))
    }

    fn unpack(file: &Path, cache: &Path) -> Result<Self> {
        let stem = file.file_stem().with_context(|| format!("{}: no name of a file", file.display()))?;
        let folder = cache.join(stem);
        if !folder.is_dir() {
            let partial = tempfile::tempdir_in(cache)?;
            run(Command::new("dpkg-deb").arg("--extract").arg(file).arg(partial.path()))?;
            std::fs::rename(partial.keep(), &folder)
                .with_context(|| format!("{}: cannot be made", folder.display()))?;
        }
        let release = std::fs::read_dir(folder.join("boot"))
            .ok()
            .and_then(|entries| {
                entries
                    .flatten()
                    .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            })
            .with_context(|| format!("{}: there is no kernel in it", file.display()))?;
        Ok(Self { release, folder })
    }

    fn kernel(&self) -> PathBuf {
        self.folder.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.release)
    }
}

/// The package with the kernel itself, in the output of `apt-cache depends` for `name`.
fn kernel_package(name: &str, depends: &str) -> String {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .unwrap_or(name)
        .to_owned()
}

/// What a virtual machine says about one check or of itself, a line each.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// The checks begin.
    Started,
    /// How the agent attaches when it may choose.
    Method(String),
    Passed(String),
    Failed(String),
    /// All checks were made.
    Done,
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started => formatter.write_str("[started]"),
            Self::Method(method) => write!(formatter, "[attaches by] {method}"),
            Self::Passed(check) => write!(formatter, "[passed] {check}"),
            Self::Failed(check) => write!(formatter, "[FAILED] {check}"),
            Self::Done => formatter.write_str("[done]"),
        }
    }
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let (tag, rest) = line.trim().strip_prefix('[')?.split_once(']')?;
        let rest = rest.trim().to_owned();
        match tag {
            "started" => Some(Self::Started),
            "attaches by" => Some(Self::Method(rest)),
            "passed" => Some(Self::Passed(rest)),
            "FAILED" => Some(Self::Failed(rest)),
            "done" => Some(Self::Done),
            _ => None,
        }
    }
}

/// How a kernel fared.
#[derive(Debug)]
struct Outcome {
    release: String,
    method: String,
    checks: usize,
    failures: Vec<String>,
}

impl Outcome {
    fn read(release: &str, report: &str) -> Self {
        let mut outcome =
            Self { release: release.to_owned(), method: "-".into(), checks: 0, failures: Vec::new() };
        let mut done = false;
        for line in report.lines().filter_map(Line::parse) {
            match line {
                Line::Started => {}
                Line::Method(method) => outcome.method = method,
                Line::Passed(_) => outcome.checks += 1,
                Line::Failed(check) => outcome.failures.push(check),
                Line::Done => done = true,
            }
        }
        // A kernel that hangs or crashes half-way has passed nothing.
        if !done {
            outcome.failures.push("it did not come to the end of the checks".into());
        }
        outcome
    }

    fn passed(&self) -> bool {
        self.failures.is_empty() && self.checks > 0
    }
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(["KERNEL", "ATTACHES BY", "CHECKS PASSED", "FAILED"]);
    for outcome in outcomes {
        table.add_row([
            outcome.release.clone(),
            outcome.method.clone(),
            outcome.checks.to_string(),
            outcome.failures.len().to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_version_leads_to_the_package_with_the_kernel() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(kernel_package("linux-image-cloud-amd64", depends), "linux-image-6.1.0-56-cloud-amd64");
        let of_kernel = "linux-image-6.1.0-56-cloud-amd64\n  Depends: kmod\n  Depends: linux-base\n";
        assert_eq!(
            kernel_package("linux-image-6.1.0-56-cloud-amd64", of_kernel),
            "linux-image-6.1.0-56-cloud-amd64"
        );
    }

    #[test]
    fn what_the_machine_writes_is_what_is_read() {
        for line in [
            Line::Started,
            Line::Method("tcx".into()),
            Line::Passed("UDP to 1000::55".into()),
            Line::Failed("cleanup: [x] is left".into()),
            Line::Done,
        ] {
            // A serial line ends its lines as terminals do.
            assert_eq!(Line::parse(&format!("{line}\r")), Some(line));
        }
        assert_eq!(Line::parse(" proxier_request  tc  3061"), None);
        assert_eq!(Line::parse("[    8.04] Invalid ELF header magic"), None);
    }

    #[test]
    fn a_kernel_that_does_not_come_to_the_end_has_failed() {
        let outcome = Outcome::read("6.1", "[started]\r\n[passed] one\r\n");
        assert!(!outcome.passed());
        assert!(!Outcome::read("6.1", "").passed());
        let outcome = Outcome::read("6.1", "[started]\r\n[attaches by] clsact\r\n[passed] one\r\n[done]\r\n");
        assert!(outcome.passed());
        assert_eq!((outcome.method.as_str(), outcome.checks), ("clsact", 1));
    }

    #[test]
    fn one_failed_check_fails_the_kernel() {
        let outcome = Outcome::read("6.1", "[started]\n[passed] one\n[FAILED] two: lost\n[done]\n");
        assert!(!outcome.passed());
        assert_eq!(outcome.failures, ["two: lost"]);
        assert!(!Outcome::read("6.1", "[started]\n[done]\n").passed(), "no check at all proves nothing");
    }
}
