//! Puts the kernel programs where the agent's source includes them from: `concat!(env!("OUT_DIR"), "/proxier.bpf.o")`.
//! It does not compile them: that needs another compiler, which `cargo xtask build-ebpf` finds or installs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

const VARIABLE: &str = "PROXIER_BPF_OBJECT";

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let object = object();
    println!("cargo::rerun-if-changed={}", object.display());
    if let Err(reason) = embed(&object) {
        println!("cargo::error={reason}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The one that is named, else the one that xtask makes. Its place does not follow `CARGO_TARGET_DIR`, which a build
/// script cannot know.
fn object() -> PathBuf {
    let folder = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    env::var_os(VARIABLE).map_or_else(|| folder.join("../target/proxier.bpf.o"), PathBuf::from)
}

fn embed(object: &Path) -> Result<(), String> {
    let bytes = fs::read(object).map_err(|error| {
        format!(
            "the kernel programs are not there ({}: {error}). Run `cargo xtask build-ebpf` first, or name the object \
             with {VARIABLE}",
            object.display()
        )
    })?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(format!(
            "{} is not an ELF object. Run `cargo xtask build-ebpf`, or name the object with {VARIABLE}",
            object.display()
        ));
    }
    let folder = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this program")?;
    let copy = Path::new(&folder).join("proxier.bpf.o");
    fs::write(&copy, bytes).map_err(|error| format!("{}: {error}", copy.display()))
}
