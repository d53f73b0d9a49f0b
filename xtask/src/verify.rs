//! `cargo xtask build-ebpf --verify`: offers every program of the object to this kernel's verifier and prints what
//! each costs. It attaches nothing and leaves nothing pinned.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError, ProgramInfo, ProgramType},
};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use proxier_common::{COARSE_CLOCK_SINCE, DIRECT_DELIVERY_SINCE, is_linux_since};

use crate::{
    environment::{Environment, as_root_hint, is_root},
    process::say,
};

/// The verifier gives up after this many instructions (`BPF_COMPLEXITY_LIMIT_INSNS`, Linux 5.2).
const VERIFIER_LIMIT: u32 = 1_000_000;
/// The reason of a refusal is in the last lines of what may be megabytes.
const LOG_LINES: usize = 40;
const INSTRUCTION_BYTES: u32 = 8;

/// What the kernel says about an accepted program.
struct Accepted {
    name: String,
    kind: String,
    translated: Option<u32>,
    jitted: u32,
    verified: Option<u32>,
    took: Duration,
}

/// Says how to become root, before anything is built for nothing.
pub(crate) fn need_root() -> Result<()> {
    if !is_root() {
        bail!(
            "--verify loads programs into the kernel, which needs root. Run: {}",
            as_root_hint("build-ebpf --verify")
        );
    }
    Ok(())
}

/// Loads every program of `object`. An error if the kernel refuses one; the others are tried all the same.
pub(crate) fn verify(environment: &Environment, object: &Path) -> Result<()> {
    environment.ensure_bpf_file_system()?;
    // Maps that the object wants pinned go to a folder of our own, never among a running agent's.
    let pins = PinFolder::new()?;
    // As the agent does.
    let direct_delivery = u8::from(is_linux_since(DIRECT_DELIVERY_SINCE));
    let coarse_clock = u8::from(is_linux_since(COARSE_CLOCK_SINCE));
    let mut ebpf = EbpfLoader::new()
        .override_global("DIRECT_DELIVERY", &direct_delivery, true)
        .override_global("COARSE_CLOCK", &coarse_clock, true)
        .default_map_pin_directory(&pins.0)
        .verifier_log_level(VerifierLogLevel::DEBUG | VerifierLogLevel::STATS)
        .load_file(object)
        .with_context(|| format!("{}: the maps cannot be created", object.display()))?;
    let mut accepted = Vec::new();
    let mut refused = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        let started = Instant::now();
        match load(program) {
            Ok(info) => accepted.push(Accepted {
                name: name.to_owned(),
                kind: kind_of(program.prog_type()),
                translated: info.size_translated(),
                jitted: info.size_jitted(),
                verified: info.verified_instruction_count(),
                took: started.elapsed(),
            }),
            Err(error) => {
                eprintln!("{name}: {error}");
                refused.push(name.to_owned());
            }
        }
    }
    accepted.sort_by(|one, other| one.name.cmp(&other.name));
    println!("{}", table(&accepted));
    if accepted.is_empty() && refused.is_empty() {
        bail!("{} holds no program", object.display());
    }
    if !refused.is_empty() {
        bail!(
            "the kernel refuses {} of {}: {}",
            refused.len(),
            refused.len() + accepted.len(),
            refused.join(", ")
        );
    }
    say(&format!("the kernel accepts all {} programs", accepted.len()));
    Ok(())
}

fn load(program: &mut Program) -> std::result::Result<ProgramInfo, String> {
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        other => {
            return Err(format!("is a {:?} program, which this command cannot load yet", other.prog_type()));
        }
    };
    match loaded {
        Ok(()) => program.info().map_err(|error| format!("the kernel tells nothing about it: {error}")),
        Err(ProgramError::LoadError { io_error, verifier_log }) => Err(format!(
            "refused by the verifier ({io_error}). The end of its log:\n{}",
            tail(&verifier_log.to_string())
        )),
        Err(error) => Err(format!("cannot be loaded: {error}")),
    }
}

fn kind_of(kind: ProgramType) -> String {
    match kind {
        ProgramType::SchedClassifier => "tc".into(),
        ProgramType::Xdp => "xdp".into(),
        other => format!("{other:?}"),
    }
}

fn tail(log: &str) -> String {
    let lines = log.trim_end().lines().collect::<Vec<_>>();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

fn table(programs: &[Accepted]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header([
        "PROGRAM",
        "TYPE",
        "INSTRUCTIONS",
        "JITED BYTES",
        "VERIFIED",
        "OF LIMIT",
        "LOAD TIME",
    ]);
    for program in programs {
        let unknown = || "unknown".to_owned();
        table.add_row([
            program.name.clone(),
            program.kind.clone(),
            program.translated.map_or_else(unknown, |bytes| (bytes / INSTRUCTION_BYTES).to_string()),
            program.jitted.to_string(),
            program.verified.map_or_else(unknown, |count| count.to_string()),
            program.verified.map_or_else(unknown, share_of_limit),
            format!("{} ms", program.took.as_millis()),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn share_of_limit(count: u32) -> String {
    format!("{:.1} %", f64::from(count) * 100.0 / f64::from(VERIFIER_LIMIT))
}

/// A folder on the BPF file system that goes when the check is over, with whatever the loader pinned there.
struct PinFolder(PathBuf);

impl PinFolder {
    fn new() -> Result<Self> {
        let folder = PathBuf::from(format!("/sys/fs/bpf/proxier-verify-{}", std::process::id()));
        std::fs::create_dir(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for PinFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            say(&format!("{} is left behind: {error}", self.0.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_log_is_kept() {
        let log = (0..100).map(|line| line.to_string()).collect::<Vec<_>>().join("\n");
        let tail = tail(&log);
        assert_eq!(tail.lines().count(), LOG_LINES);
        assert_eq!((tail.lines().next(), tail.lines().last()), (Some("60"), Some("99")));
    }

    #[test]
    fn a_short_log_is_kept_whole() {
        assert_eq!(tail("R1 type=ctx\nprocessed 7 insns\n"), "R1 type=ctx\nprocessed 7 insns");
        assert_eq!(tail(""), "");
    }

    #[test]
    fn the_table_gives_instructions_not_bytes() {
        let program = Accepted {
            name: "request".into(),
            kind: "tc".into(),
            translated: Some(80),
            jitted: 123,
            verified: Some(250_000),
            took: Duration::from_millis(5),
        };
        let table = table(&[program]).to_string();
        let row = table.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(row, ["request", "tc", "10", "123", "250000", "25.0", "%", "5", "ms"]);
    }
}
