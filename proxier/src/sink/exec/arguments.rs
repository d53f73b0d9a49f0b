//! The flags of `to-exec`, and which command is meant.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use clap::{
    Arg, ArgAction, ArgMatches, Args, FromArgMatches,
    builder::{OsStringValueParser, TypedValueParser as _, ValueParser},
    error::ErrorKind,
    parser::ValueSource,
};
use jiff::SignedDuration;

use super::{Invocation, Timing};
use crate::model::NodeName;

/// The longest that a run may be given: what takes longer is no answer to a change.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// What to run, and how.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The longest that a run may take, such as 10s or 1m30s; then the command and its children are ended
    #[arg(long, env = "PROXIER_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    pub timeout: Duration,
    /// A variable for the command: NAME=VALUE, or NAME with the value that the agent has; repeatable. Without, it has PATH,
    /// LANG=C.UTF-8 and NODE_NAME only
    #[arg(long = "env", env = "PROXIER_ENV", value_name = "NAME[=VALUE]", value_parser = variable())]
    pub variables: Vec<Variable>,
    #[command(flatten)]
    command: CommandArgs,
}

impl ExecArgs {
    /// What is to be run on `node`.
    ///
    /// # Errors
    ///
    /// As [`Invocation::new`].
    pub fn invocation(self, node: &NodeName) -> anyhow::Result<Invocation> {
        let CommandArgs { program, arguments } = self.command;
        let mut invocation =
            Invocation::new(program, arguments, node).context("the command cannot be prepared")?;
        for Variable { name, value } in self.variables {
            match value.or_else(|| env::var_os(&name)) {
                Some(value) => invocation = invocation.with_variable(name, value),
                None => tracing::warn!(
                    "--env {name}: the agent has no such variable, so the command gets none; give it to the agent, or a value here \
                     ({name}=VALUE)"
                ),
            }
        }
        Ok(invocation)
    }

    /// How long runs may take.
    #[must_use]
    pub const fn timing(&self) -> Timing {
        Timing::new(self.timeout)
    }
}

/// A variable of the command's environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its value; none: the one that the agent has.
    pub value: Option<OsString>,
}

/// The command: what follows `--`, or else the program that CALLOUT names, as kpng-callout takes it.
#[derive(Debug)]
struct CommandArgs {
    program: OsString,
    arguments: Vec<OsString>,
}

const COMMAND: &str = "command";

impl Args for CommandArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.arg(
            Arg::new(COMMAND)
                .help("The program to run at every change, with its arguments; no shell. CALLOUT names one without arguments")
                .value_name("CMD")
                .env("CALLOUT")
                .last(true)
                .num_args(1..)
                .action(ArgAction::Append)
                .value_parser(OsStringValueParser::new()),
        )
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CommandArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut words = matches.get_many::<OsString>(COMMAND).into_iter().flatten().cloned();
        match words.next().filter(|program| !program.is_empty()) {
            Some(program) if is_sentence(matches, &program) => Err(clap::Error::raw(
                ErrorKind::InvalidValue,
                format!(
                    "CALLOUT is a program's name, without arguments: write to-exec -- {}\n",
                    program.display()
                ),
            )),
            Some(program) => Ok(Self { program, arguments: words.collect() }),
            None => Err(clap::Error::raw(
                ErrorKind::MissingRequiredArgument,
                "there is no command to run: write it after two dashes (to-exec -- CMD ARGS), or name a program without arguments in \
                 the environment (CALLOUT=CMD)\n",
            )),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Whether CALLOUT has blanks, and names no file.
fn is_sentence(matches: &ArgMatches, program: &OsStr) -> bool {
    matches.value_source(COMMAND) == Some(ValueSource::EnvVariable)
        && program.to_string_lossy().contains(' ')
        && !Path::new(program).exists()
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout =
        text.trim().parse::<SignedDuration>().ok().and_then(|timeout| Duration::try_from(timeout).ok());
    timeout.filter(|timeout| !timeout.is_zero() && *timeout <= LONGEST_TIMEOUT).ok_or_else(|| {
        format!(
            "not a time that a run may take: write one of up to {} minutes with its unit, such as 500ms, 10s or 1m30s",
            LONGEST_TIMEOUT.as_secs() / 60
        )
    })
}

fn variable() -> ValueParser {
    ValueParser::new(OsStringValueParser::new().try_map(|word| {
        use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
        let (name, value) = match word.as_bytes().iter().position(|byte| *byte == b'=') {
            Some(at) => {
                (&word.as_bytes()[..at], Some(OsString::from_vec(word.as_bytes()[at + 1..].to_vec())))
            }
            None => (word.as_bytes(), None),
        };
        let is_name = |name: &&str| {
            let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            starts && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        std::str::from_utf8(name)
            .ok()
            .filter(is_name)
            .map(|name| Variable { name: name.to_owned(), value })
            .ok_or(
                "write NAME or NAME=VALUE, the name of letters, digits and '_'; several with an --env each",
            )
    }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        exec: ExecArgs,
    }

    fn parse(words: &[&str]) -> Result<ExecArgs, String> {
        let line = Line::try_parse_from(["to-exec"].iter().chain(words));
        line.map(|line| line.exec).map_err(|error| error.to_string())
    }

    #[test]
    fn what_follows_the_dashes_is_the_command_whatever_it_looks_like() {
        let exec = parse(&["--timeout", "1m30s", "--", "sh", "-c", "--timeout", "", "--"]).unwrap();
        assert_eq!(exec.timeout, Duration::from_secs(90));
        assert_eq!(exec.command.program, "sh");
        assert_eq!(exec.command.arguments, ["-c", "--timeout", "", "--"]);
        assert_eq!(parse(&["--", "true"]).unwrap().timeout, Duration::from_secs(10));
    }

    #[test]
    fn no_command_is_refused_with_both_ways_to_give_one() {
        for words in [&[][..], &["--"], &["--", ""], &["--timeout", "5s"]] {
            let error = parse(words).unwrap_err();
            assert!(
                error.contains("to-exec -- CMD ARGS") && error.contains("CALLOUT=CMD"),
                "{words:?}: {error}"
            );
        }
        // Without dashes it would be one of our own words.
        parse(&["true"]).unwrap_err();
    }

    #[test]
    fn a_time_that_is_none_is_refused_with_examples() {
        for (text, is) in [("10s", 10_000), ("500ms", 500), (" 2m ", 120_000), ("1h", 3_600_000)] {
            assert_eq!(timeout(text), Ok(Duration::from_millis(is)), "{text}");
        }
        for text in ["", "10", "0s", "-5s", "61m", "soon", "99999999999999999999s"] {
            assert!(timeout(text).unwrap_err().contains("such as 500ms, 10s or 1m30s"), "{text}");
        }
    }

    #[test]
    fn variables_are_named_or_given() {
        let exec =
            parse(&["--env", "HOME", "--env", "OPTIONS=a,b=c", "--env", "_E1=", "--", "true"]).unwrap();
        let expected = [("HOME", None), ("OPTIONS", Some("a,b=c")), ("_E1", Some(""))];
        let expected = expected
            .map(|(name, value)| Variable { name: name.to_owned(), value: value.map(OsString::from) });
        assert_eq!(exec.variables, expected);
        for bad in ["", "=x", "1A=x", "A B=x", "A,B", "ä=x"] {
            let error = parse(&["--env", bad, "--", "true"]).unwrap_err();
            assert!(error.contains("write NAME or NAME=VALUE"), "{bad}: {error}");
        }
    }
}
