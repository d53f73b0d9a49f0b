//! Sets up the log: on the standard error, so that the standard output belongs to the sink.

use std::io;

use anyhow::Context as _;
use tracing_subscriber::{EnvFilter, filter::ParseError};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Libraries that log what this agent logs itself, once and with what to do, at every attempt and as errors. They are silent
/// unless the filter names them. What kube says of certificates is told by nobody else.
const SILENT: &str = "kube_client=off,kube_client::client::tls=warn,kube_runtime=off,hyper=off,hyper_util=off,rustls=off,\
                      tower=off,tower_http=off,h2=off,tonic=off";

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

/// Starts logging what `filter` lets through: a level (`debug`) or levels by module (`info,proxier::source=debug`). Libraries
/// that would repeat what the agent says are left out unless they are named (`info,kube_client=debug`).
///
/// # Errors
///
/// The filter does not parse.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = parse(filter).with_context(|| format!("cannot read --log-level {filter:?}"))?;
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

fn parse(filter: &str) -> Result<EnvFilter, ParseError> {
    // Of two directives for a target the later counts.
    EnvFilter::try_new(format!("{SILENT},{filter}"))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Which of some events a filter lets through.
    fn passed(filter: &str) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(parse(filter).unwrap())
            .with_writer(move || writer.clone())
            .without_time()
            .with_ansi(false)
            .with_target(false)
            .with_level(false)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(target: "kube_client::client::builder", "client");
            tracing::warn!(target: "kube_client::client::tls", "certificates");
            tracing::warn!(target: "kube_runtime::watcher", "runtime");
            tracing::info!(target: "proxier::app", "ours");
            tracing::debug!(target: "proxier::source::kube", "detail");
        });
        let text = lines.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn libraries_that_repeat_what_the_agent_says_are_silent_unless_they_are_named() {
        assert_eq!(passed("info"), "certificates ours");
        assert_eq!(passed("debug"), "certificates ours detail");
        assert_eq!(passed("info,kube_client=debug"), "client certificates ours");
        assert_eq!(passed("warn,kube_client::client=error,kube_runtime=warn"), "client certificates runtime");
        assert_eq!(passed("info,proxier::source=debug"), "certificates ours detail");
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        assert!(check("info,proxier::source=debug").is_ok());
        assert!(check("info,proxier=loud").is_err());
    }
}
