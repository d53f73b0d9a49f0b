//! Sets up the log: on the standard error, so that the standard output belongs to the sink.

use std::io;

use anyhow::Context as _;
use tracing_subscriber::{EnvFilter, filter::ParseError};

/// What kube tells of every attempt to reach an API server, the agent tells itself: once for an outage, with what to do. What it
/// says of certificates is told by nobody else.
const TOLD_BY_THE_AGENT: &str =
    "kube_client::client=off,kube_client::client::tls=warn,kube_runtime::watcher=off";

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
    match parse(filter) {
        Ok(_) => Ok(filter.to_owned()),
        Err(_) => Err("write error, warn, info, debug or trace, or levels by module, such as \
                       info,proxier::source=debug"
            .to_owned()),
    }
}

/// The filter that `text` asks for. What it says of a module counts, also of one that is quiet otherwise.
fn parse(text: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{TOLD_BY_THE_AGENT},{text}"))
}

/// Starts logging what `filter` lets through: a level (`debug`) or levels by module (`info,proxier::source=debug`).
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

    /// Which of a few lines are logged.
    fn logged(filter: &str) -> Vec<&'static str> {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(parse(filter).unwrap())
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "proxier::app", "[ready]");
            tracing::error!(target: "kube_client::client::builder", "[attempt]");
            tracing::warn!(target: "kube_client::client", "[stream]");
            tracing::warn!(target: "kube_client::client::tls", "[certificates]");
            tracing::warn!(target: "kube_runtime::watcher", "[watch]");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let all = ["[ready]", "[attempt]", "[stream]", "[certificates]", "[watch]"];
        all.into_iter().filter(|line| text.contains(line)).collect()
    }

    #[test]
    fn attempts_to_reach_the_api_server_are_told_by_the_agent_and_not_by_kube() {
        assert_eq!(logged("info"), ["[ready]", "[certificates]"]);
        assert_eq!(logged("error"), ["[certificates]"]);
        assert_eq!(logged("debug"), ["[ready]", "[certificates]"]);
    }

    #[test]
    fn kube_is_heard_if_the_filter_names_it() {
        let all = logged("info,kube_client::client=info,kube_runtime::watcher=info");
        assert_eq!(all, ["[ready]", "[attempt]", "[stream]", "[certificates]", "[watch]"]);
    }
}
