//! The fuzzers' corpus, run once: `corpus` is what reaches something that nothing else does, as cargo-fuzz chose it; `kept`
//! what must hold whatever it reaches, every input first of all that once broke something. `cargo xtask fuzz` looks for
//! more.

#![allow(
    clippy::unwrap_used,
    reason = "files and numbers of a few bytes; the lint knows tests only by their attribute"
)]

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

/// Runs every file of a target, and says which one it was that did not hold.
fn run(target: &str, judge: fn(&[u8])) {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let mut ran = 0;
    for folder in ["corpus", "kept"] {
        for entry in fuzz.join(folder).join(target).read_dir().into_iter().flatten() {
            let path = entry.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            if std::panic::catch_unwind(|| judge(&data)).is_err() {
                panic!("see above: {}", path.display());
            }
            ran += 1;
        }
    }
    assert!(ran > 50, "{ran} inputs: the corpus is not there");
}

#[test]
fn corpus_of_frames() {
    run("request", fuzz::request);
}

#[test]
fn corpus_of_conversations() {
    run("conversation", fuzz::conversation);
}

#[test]
fn corpus_of_icmp_errors() {
    run("icmp_error", fuzz::icmp_error);
}
