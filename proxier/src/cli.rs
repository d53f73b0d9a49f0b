//! The command line: `proxier <source> [flags] <sink> [flags]`, read as the data flows (`sources`, `sinks`), and the commands that
//! look at what there is. Only parses and starts; what the words mean is `app`'s and the modules' business.

use std::{
    env,
    ffi::OsString,
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{
    Arg, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, builder::Resettable,
    error::ErrorKind,
};

use self::{
    sinks::PinArgs,
    sources::{ApiArgs, FileArgs, KubeArgs},
};
use crate::{
    allocator,
    observe::{
        http::DEFAULT_METRICS_ADDRESS,
        log::{self, LogFormat},
        status,
        table::{self, Output, TableRow},
    },
    sink::bpf::{self, inspect},
};

mod sinks;
mod sources;

/// Delivers every port and every protocol of a Service's external addresses to a pod on this node.
#[derive(Debug, Parser)]
#[command(name = "proxier", version, disable_help_subcommand = true)]
struct Cli {
    /// How log lines are written, on the standard error
    #[arg(
        long,
        global = true,
        env = "PROXIER_LOG_FORMAT",
        value_enum,
        default_value_t,
        help_heading = "Logging"
    )]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or levels by module (info,proxier::source=debug); the client
    /// library of the Kubernetes API only if it is named (info,kube_client=debug)
    #[arg(
        long,
        global = true,
        env = "PROXIER_LOG_LEVEL",
        value_name = "FILTER",
        default_value = "info",
        value_parser = log::check,
        help_heading = "Logging"
    )]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take Services, EndpointSlices and Nodes from the API server, and follow their changes
    Kube(KubeArgs),
    /// Take Services, EndpointSlices and Nodes from Kubernetes manifests, and follow their changes
    File(FileArgs),
    /// Take what this node should do from a server of kpng's API (`proxier kube to-api`, or kpng), and follow its changes
    Api(ApiArgs),
    /// Detach the programs from all interfaces and remove the pinned maps
    Cleanup(PinArgs),
    /// Show what the kernel has; needs no running agent
    Get {
        #[command(subcommand)]
        what: GetCommand,
    },
    /// Ask the agent of this node how it is; fails if it is not ready
    Status(StatusArgs),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum GetCommand {
    /// External addresses
    #[command(visible_alias = "service")]
    Services(GetArgs),
    /// Pods on this node
    #[command(visible_alias = "endpoint")]
    Endpoints(GetArgs),
    /// Clients, each with the pod it stays on
    #[command(visible_alias = "session")]
    Sessions(GetArgs),
    /// Conversations of pods through external addresses
    #[command(visible_alias = "flow")]
    Flows(GetArgs),
    /// Packets dropped since the maps were made, by reason and hook; a table leaves zeros out
    #[command(visible_alias = "drop")]
    Drops(GetArgs),
    /// What else has been counted since the maps were made: flows made, ended, evicted and made again
    #[command(visible_alias = "statistic")]
    Statistics(GetArgs),
}

#[derive(Debug, Args)]
struct GetArgs {
    /// How to print
    #[arg(short, long, env = "PROXIER_OUTPUT", value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    pin: PinArgs,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// How to print
    #[arg(short, long, env = "PROXIER_OUTPUT", value_enum, default_value_t)]
    output: Output,
    /// Where the agent answers /status: what it has as --metrics-address
    #[arg(
        long,
        visible_alias = "address",
        env = "PROXIER_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = DEFAULT_METRICS_ADDRESS
    )]
    metrics_address: SocketAddr,
}

impl Cli {
    /// Refuses what the grammar cannot say to be wrong.
    fn checked(self) -> Result<Self, clap::Error> {
        let (source, sink) = match &self.command {
            Command::Kube(kube) => (None, Some(&kube.sink)),
            Command::File(file) => (None, Some(&file.sink)),
            Command::Api(api) => (api.contradiction(), Some(&api.sink)),
            _ => (None, None),
        };
        match source.or_else(|| sink?.contradiction()) {
            Some(reason) => Err(Self::command().error(ErrorKind::ArgumentConflict, reason)),
            None => Ok(self),
        }
    }
}

/// Runs the command that the process was started with. 0: done, 1: failed, 2: not understood.
#[must_use]
pub fn main() -> ExitCode {
    allocator::share_one_arena();
    run(env::args_os())
}

fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = without_empty_variables(Cli::command()).try_get_matches_from(arguments);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)).and_then(Cli::checked) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done if not even this can be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let result = log::init(cli.log_format, &cli.log_level).and_then(|()| execute(cli.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxier: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A manifest or a chart that leaves a value out gives an empty variable: that says as much as none.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(without_empty_variables)
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Kube(arguments) => sources::kube(arguments),
        Command::File(arguments) => sources::file(arguments),
        Command::Api(arguments) => sources::api(arguments),
        Command::Cleanup(pin) => {
            let removed = bpf::cleanup(&pin.pin_path)?;
            if removed.is_empty() {
                return print(&format!("Nothing of proxier found at {}.\n", pin.pin_path.display()));
            }
            print(&removed.iter().map(|line| format!("{line}\n")).collect::<String>())
        }
        Command::Get { what } => match what {
            GetCommand::Services(arguments) => list(&inspect::services(&arguments.pin.pin_path)?, &arguments),
            GetCommand::Endpoints(arguments) => {
                list(&inspect::endpoints(&arguments.pin.pin_path)?, &arguments)
            }
            GetCommand::Sessions(arguments) => list(&inspect::sessions(&arguments.pin.pin_path)?, &arguments),
            GetCommand::Flows(arguments) => list(&inspect::flows(&arguments.pin.pin_path)?, &arguments),
            GetCommand::Drops(arguments) => list(&inspect::drops(&arguments.pin.pin_path)?, &arguments),
            GetCommand::Statistics(arguments) => {
                list(&inspect::statistics(&arguments.pin.pin_path)?, &arguments)
            }
        },
        Command::Status(arguments) => {
            let report = status::fetch(arguments.metrics_address)?;
            print(&status::render(&report, arguments.output)?)?;
            status::verdict(&report)
        }
        Command::Version => print(&format!("proxier {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "proxier", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    }
}

fn list<R: TableRow>(rows: &[R], arguments: &GetArgs) -> anyhow::Result<()> {
    print(&table::render(rows, arguments.output)?)
}

/// `println!` panics when the reader has gone: `proxier get flows | head` is no crash.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to the standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
