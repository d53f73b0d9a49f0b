//! The `proxier` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxier::cli::main()
}
