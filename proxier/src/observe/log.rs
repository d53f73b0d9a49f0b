//! Sets up the log: on the standard error, so that the standard output belongs to the sink.

use std::io;

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Checks a filter without setting it up.
///
/// # Errors
///
/// What to write instead.
pub fn check(filter: &str) -> Result<String, String> {
    match EnvFilter::try_new(filter) {
        Ok(_) => Ok(filter.to_owned()),
        Err(_) => Err("write error, warn, info, debug or trace, or levels by module, such as \
                       info,proxier::source=debug"
            .to_owned()),
    }
}

/// Starts logging what `filter` lets through: a level (`debug`) or levels by module (`info,proxier::source=debug`).
///
/// # Errors
///
/// The filter does not parse.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("cannot read --log-level {filter:?}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        // Colours are for terminals.
        LogFormat::Text => {
            builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).with_target(false).init();
        }
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
