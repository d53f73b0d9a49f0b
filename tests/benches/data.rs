//! How fast packets get from a client to a pod, by proxier and by what people would use in its place. Run by
//! `cargo xtask bench data`, with the agent as people run it. What is measured is in `proxier_tests::bench`.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use anyhow::Context as _;
use proxier_tests::bench::{self, Plan};

/// The plan is the argument that is JSON; cargo adds words of its own.
fn plan() -> anyhow::Result<Plan> {
    match std::env::args().find(|argument| argument.starts_with('{')) {
        Some(text) => serde_json::from_str(&text).context("the plan"),
        None => Ok(Plan::quick()),
    }
}

fn main() -> anyhow::Result<()> {
    let plan = plan()?;
    let report = bench::run(&plan, &mut |line| eprintln!("bench: {line}"))?;
    let text = serde_json::to_string_pretty(&report)?;
    match &plan.output {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display())),
        None => {
            println!("{text}");
            Ok(())
        }
    }
}
