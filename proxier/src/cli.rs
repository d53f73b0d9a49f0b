//! The command line: `proxier <source> [flags] <sink> [flags]`, read as the data flows. Only parses and starts; what
//! the words mean is `app`'s and the modules' business.

use std::{
    env,
    ffi::OsString,
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use ::kube::Client;
use anyhow::Context as _;
use clap::{
    Arg, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    builder::{BoolishValueParser, Resettable},
    error::ErrorKind,
};
use globset::{Glob, GlobSet};
use ipnet::IpNet;
use tokio::sync::mpsc;

use crate::{
    allocator,
    app::{self, Machine, Shutdown, Tellers, Until},
    desired::{ExternalCidr, NoBackend, Settings},
    model::NodeName,
    observe::{
        Observed,
        events::Events,
        http::{self, DEFAULT_METRICS_ADDRESS, ListenArgs},
        listen,
        log::{self, LogFormat},
        metrics::kernel::PinnedMaps,
        service_health::ServiceHealth,
        status,
        table::{self, Output, TableRow},
    },
    sink::{
        Sink,
        api::{ApiSink, DEFAULT_LISTEN_ADDRESS, ListenAddress, Taken, TlsFiles, WithApi},
        bpf::{self, AttachMode, BpfSink, inspect},
        exec::{ExecSink, arguments::ExecArgs},
        export::Carried,
        json::JsonSink,
    },
    source::{Batch, Onlooker, api, directory::Directory, file, kube},
};

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

#[derive(Debug, Args)]
struct KubeArgs {
    /// Take Services whose label service.kubernetes.io/service-proxy-name has this value
    #[arg(long, env = "PROXIER_SERVICE_PROXY_NAME", value_name = "NAME", value_parser = label_value)]
    service_proxy_name: String,
    /// How to reach the API server [default: this pod's ServiceAccount, or else what kubectl would use]
    #[arg(long, env = "PROXIER_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig [default: its current one]
    #[arg(long, env = "PROXIER_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// This node's name, as EndpointSlices write it [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Write no Events about Services; the log has the same
    #[arg(long, env = "PROXIER_NO_EVENTS", value_parser = BoolishValueParser::new())]
    no_events: bool,
    #[command(subcommand)]
    sink: SinkCommand,
}

#[derive(Debug, Args)]
struct FileArgs {
    /// A directory (its *.yaml, *.yml and *.json; not its sub-directories) or a file
    #[arg(long, env = "PROXIER_INPUT", value_name = "DIR|FILE")]
    input: PathBuf,
    /// Take Services whose label service.kubernetes.io/service-proxy-name has this value [default: any value]
    #[arg(long, env = "PROXIER_SERVICE_PROXY_NAME", value_name = "NAME")]
    service_proxy_name: Option<String>,
    /// This node's name, as EndpointSlices write it [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    #[command(subcommand)]
    sink: SinkCommand,
}

#[derive(Debug, Args)]
struct ApiArgs {
    /// Where the server is
    #[arg(
        long,
        env = "PROXIER_API",
        value_name = "HOST:PORT|tcp://HOST:PORT|unix:///PATH",
        default_value = api::DEFAULT_ADDRESS
    )]
    api: api::Address,
    /// Speak TLS with a server whose certificate is of an authority in this file (PEM) [default: no TLS]
    #[arg(long, env = "PROXIER_API_CA", value_name = "FILE")]
    api_ca: Option<PathBuf>,
    /// Show the server this certificate (PEM, with its chain); files are read anew at each connection
    #[arg(long, env = "PROXIER_API_CERT", value_name = "FILE", requires_all = ["api_ca", "api_key"])]
    api_cert: Option<PathBuf>,
    /// The key of --api-cert (PEM)
    #[arg(long, env = "PROXIER_API_KEY", value_name = "FILE", requires = "api_cert")]
    api_key: Option<PathBuf>,
    /// The node whose state is asked for [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    #[command(subcommand)]
    sink: SinkCommand,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::enum_variant_names, reason = "the words of the command line")]
enum SinkCommand {
    /// Program the kernel
    ToBpf(ToBpfArgs),
    /// Serve it to any number of backends, by kpng's gRPC API
    ToApi(ToApiArgs),
    /// Print the whole state at every change, one JSON object per Service per line, in kpng-json's shape
    ToJson(ToJsonArgs),
    /// Call a program at every change, with the lines of to-json on its standard input
    #[command(
        override_usage = "proxier <SOURCE> to-exec [OPTIONS] -- CMD [ARGS]\n       CALLOUT=CMD proxier <SOURCE> to-exec [OPTIONS]"
    )]
    ToExec(ToExecArgs),
}

#[derive(Debug, Args)]
struct ToBpfArgs {
    /// An interface towards clients; repeatable [default: every interface that carries a default route]
    #[arg(
        long = "uplink",
        env = "PROXIER_UPLINK",
        value_name = "INTERFACE",
        value_delimiter = ',',
        value_parser = interface_name
    )]
    uplinks: Vec<String>,
    #[command(flatten)]
    pin: PinArgs,
    /// How to attach to interfaces
    #[arg(long, env = "PROXIER_ATTACH", value_enum, default_value_t)]
    attach: AttachMode,
    /// Leave alone what pods and processes of this node send to external addresses, and pods' links; set anew, it ends
    /// such conversations
    #[arg(long, env = "PROXIER_NO_LOCAL_CLIENTS", value_parser = BoolishValueParser::new())]
    no_local_clients: bool,
    /// What to do with packets for a Service that has no pod on this node
    #[arg(long, env = "PROXIER_NO_BACKEND", value_enum, default_value_t)]
    no_backend: NoBackend,
    #[command(flatten)]
    externals: ExternalArgs,
    #[command(flatten)]
    listen: ListenArgs,
    /// Serve the same to other backends, by kpng's gRPC API: tcp://ADDRESS:PORT, or unix:///PATH
    #[arg(long, env = "PROXIER_SERVE_API", value_name = "ADDRESS")]
    serve_api: Option<ListenAddress>,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    carried: CarriedArgs,
}

#[derive(Debug, Args)]
struct ToApiArgs {
    /// Where: tcp://ADDRESS:PORT, or unix:///PATH
    #[arg(long, env = "PROXIER_LISTEN", value_name = "ADDRESS", default_value = DEFAULT_LISTEN_ADDRESS)]
    listen: ListenAddress,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    carried: CarriedArgs,
    #[command(flatten)]
    externals: ExternalArgs,
    #[command(flatten)]
    health: ListenArgs,
}

/// What of a Service is passed on that proxier does not need.
#[derive(Debug, Args)]
struct CarriedArgs {
    /// Pass on labels of Services with such names (*, ?, [...]); repeatable [default: none]
    #[arg(long, env = "PROXIER_WITH_SERVICE_LABELS", value_name = "GLOB", value_delimiter = ',')]
    with_service_labels: Vec<Glob>,
    /// Pass on annotations of Services with such names, beside those of proxier; repeatable [default: none]
    #[arg(long, env = "PROXIER_WITH_SERVICE_ANNOTATIONS", value_name = "GLOB", value_delimiter = ',')]
    with_service_annotations: Vec<Glob>,
}

impl CarriedArgs {
    fn carried(self) -> anyhow::Result<Carried> {
        Ok(Carried {
            labels: GlobSet::new(self.with_service_labels)?,
            annotations: GlobSet::new(self.with_service_annotations)?,
        })
    }
}

/// How the API is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "TLS of the API")]
struct TlsArgs {
    /// The API's certificate, and those that lead to its authority (PEM); read again when it has changed
    #[arg(long, env = "PROXIER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, env = "PROXIER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate of one of these authorities (PEM)
    #[arg(long, env = "PROXIER_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// The files, for an API at `address`.
    fn files(self, address: &ListenAddress) -> anyhow::Result<Option<TlsFiles>> {
        let Self { tls_cert, tls_key, tls_client_ca } = self;
        let (Some(certificate), Some(key)) = (tls_cert, tls_key) else { return Ok(None) };
        anyhow::ensure!(
            matches!(address, ListenAddress::Tcp(_)),
            "--tls-cert is for tcp://: who may connect to {address} is up to the socket's permissions"
        );
        Ok(Some(TlsFiles { certificate, key, client_authorities: tls_client_ca }))
    }
}

#[derive(Debug, Args)]
struct ToJsonArgs {
    /// Print once and end
    #[arg(long, env = "PROXIER_ONCE", value_parser = BoolishValueParser::new())]
    once: bool,
    /// Print on many lines, for people
    #[arg(long, env = "PROXIER_PRETTY", value_parser = BoolishValueParser::new())]
    pretty: bool,
    #[command(flatten)]
    carried: CarriedArgs,
    #[command(flatten)]
    externals: ExternalArgs,
}

#[derive(Debug, Args)]
struct ToExecArgs {
    #[command(flatten)]
    exec: ExecArgs,
    #[command(flatten)]
    carried: CarriedArgs,
    #[command(flatten)]
    externals: ExternalArgs,
    #[command(flatten)]
    listen: ListenArgs,
}

/// Which external addresses count.
#[derive(Debug, Args)]
struct ExternalArgs {
    /// Take external addresses inside this range only, with NAMESPACE= for Services of that namespace alone; the most
    /// specific range that holds an address decides; repeatable [default: any]
    #[arg(
        long = "external-cidr",
        env = "PROXIER_EXTERNAL_CIDR",
        value_name = "[NAMESPACE=]CIDR",
        value_delimiter = ','
    )]
    external_cidrs: Vec<ExternalCidr>,
    /// Take no external address inside this network, which is the cluster's own: its pods', its Services'; repeatable
    #[arg(
        long = "cluster-cidr",
        env = "PROXIER_CLUSTER_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = cidr
    )]
    cluster_cidrs: Vec<IpNet>,
    /// Take no more external addresses than this for the Services of a namespace together, the oldest Services' first
    /// [default: any number]
    #[arg(
        long,
        env = "PROXIER_MAX_ADDRESSES_PER_NAMESPACE",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    max_addresses_per_namespace: Option<u32>,
    /// Leave spec.externalIPs alone
    #[arg(long, env = "PROXIER_NO_EXTERNAL_IPS", value_parser = BoolishValueParser::new())]
    no_external_ips: bool,
    /// Leave status.loadBalancer.ingress alone
    #[arg(long, env = "PROXIER_NO_LOAD_BALANCER_IPS", value_parser = BoolishValueParser::new())]
    no_load_balancer_ips: bool,
}

#[derive(Debug, Args)]
struct PinArgs {
    /// Where maps and links are pinned: a directory on a bpffs
    #[arg(long, env = "PROXIER_PIN_PATH", value_name = "DIR", default_value = bpf::DEFAULT_PIN_PATH)]
    pin_path: PathBuf,
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
        if let Command::Api(ApiArgs { api: api::Address::Unix(_), api_ca: Some(_), .. }) = &self.command {
            return Err(Self::command().error(
                ErrorKind::ArgumentConflict,
                "the argument '--api-ca <FILE>' is for TCP: a unix socket's owner and mode say who may use it",
            ));
        }
        Ok(self)
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
        Command::Kube(arguments) => kube(arguments),
        Command::File(arguments) => file(arguments),
        Command::Api(arguments) => api(arguments),
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

fn kube(arguments: KubeArgs) -> anyhow::Result<()> {
    let KubeArgs { service_proxy_name, kubeconfig, context, node_name, no_events, sink } = arguments;
    let options = kube::Options { kubeconfig, context, ..kube::Options::new(service_proxy_name) };
    agent(node_name, sink, async move || {
        let server = kube::server(&options).await?;
        let events = if no_events { None } else { Some(server.client()?) };
        let start = move |onlooker| kube::spawn(&server, &options, onlooker);
        Ok(Found { kind: "kube", events, start })
    })
}

fn file(arguments: FileArgs) -> anyhow::Result<()> {
    let FileArgs { input, service_proxy_name, node_name, sink } = arguments;
    agent(node_name, sink, async move || {
        let directory = Directory::open(input, service_proxy_name)?;
        let start = move |onlooker| file::spawn(directory, onlooker);
        Ok(Found { kind: "file", events: None, start })
    })
}

fn api(arguments: ApiArgs) -> anyhow::Result<()> {
    let ApiArgs { api, api_ca, api_cert, api_key, node_name, sink } = arguments;
    let node = self::node_name(node_name)?;
    // The command line has none of the last two without the others.
    let credentials = api_ca.map(|ca| api::Credentials { ca, identity: api_cert.zip(api_key) });
    let options = api::Options { credentials, ..api::Options::new(api, node.clone()) };
    agent(Some(node.to_string()), sink, async move || {
        let source = api::Source::open(options)?;
        let start = move |onlooker| Ok(source.spawn(onlooker));
        Ok(Found { kind: "api", events: None, start })
    })
}

/// A source that can be started.
struct Found<S> {
    /// The word that the command line has for it.
    kind: &'static str,
    /// Where Events are written, if anywhere.
    events: Option<Client>,
    start: S,
}

/// Runs the agent with the source that `find` finds.
fn agent<S>(
    node_name: Option<String>,
    sink: SinkCommand,
    find: impl AsyncFnOnce() -> anyhow::Result<Found<S>>,
) -> anyhow::Result<()>
where
    S: FnOnce(Arc<dyn Onlooker>) -> anyhow::Result<mpsc::Receiver<Batch>>,
{
    let node = self::node_name(node_name)?;
    // A command would inherit it, and may be what the limit is low for.
    if !matches!(sink, SinkCommand::ToExec(_)) {
        listen::raise_descriptor_limit();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let shutdown = Shutdown::listen()?;
        // Before anything is read or changed: whoever made a mistake on the command line is waiting to be told.
        let Found { kind, events, start } = find().await?;
        match sink {
            SinkCommand::ToBpf(sink) => {
                let settings = Settings {
                    no_backend: sink.no_backend,
                    node_clients: !sink.no_local_clients,
                    ..settings(node.clone(), sink.externals)
                };
                let kernel = PinnedMaps { pin_path: sink.pin.pin_path.clone() };
                let options = bpf::Options {
                    uplinks: sink.uplinks,
                    pin_path: sink.pin.pin_path,
                    attach: sink.attach,
                    local_clients: !sink.no_local_clients,
                };
                let observed = Observed::new(&node, kind, Some(Box::new(kernel)));
                let _servers = http::serve(&observed, sink.listen);
                let api = match sink.serve_api {
                    Some(address) => {
                        let tls = sink.tls.files(&address)?;
                        let metrics = Arc::clone(&observed.metrics);
                        Some(ApiSink::serve(&address, tls, Taken::Waits, sink.carried.carried()?, metrics)?)
                    }
                    None => None,
                };
                let bpf = BpfSink::open(options)?;
                let mut sink: Box<dyn Sink> = match api {
                    Some(api) => Box::new(WithApi { sink: bpf, api }),
                    None => Box::new(bpf),
                };
                let batches = start(observed.onlooker())?;
                let tellers = Tellers {
                    events: events.map(|client| Events::start(client, &node, &observed)),
                    service_health: Some(ServiceHealth::new(observed.health.clone())),
                    observed,
                };
                let until = Until::Signalled;
                app::run(batches, &mut *sink, settings, tellers, until, Machine::ThisNode, shutdown).await
            }
            SinkCommand::ToApi(sink) => {
                let settings = settings(node.clone(), sink.externals);
                let observed = Observed::new(&node, kind, None);
                let _servers = http::serve(&observed, sink.health);
                let tls = sink.tls.files(&sink.listen)?;
                let metrics = Arc::clone(&observed.metrics);
                let mut api =
                    ApiSink::serve(&sink.listen, tls, Taken::Fails, sink.carried.carried()?, metrics)?;
                let batches = start(observed.onlooker())?;
                let tellers = Tellers::new(observed);
                // The backends may run anywhere, so what this host's interfaces have does not matter.
                app::run(batches, &mut api, settings, tellers, Until::Signalled, Machine::Any, shutdown).await
            }
            SinkCommand::ToJson(sink) => {
                let settings = settings(node.clone(), sink.externals);
                let observed = Observed::new(&node, kind, None);
                let mut json =
                    JsonSink::new(Box::new(io::stdout()), node, sink.carried.carried()?, sink.pretty);
                let until = if sink.once { Until::FirstApply } else { Until::Signalled };
                let batches = start(observed.onlooker())?;
                let tellers = Tellers::new(observed);
                // The lines may be read anywhere, so what this host's interfaces have does not matter.
                app::run(batches, &mut json, settings, tellers, until, Machine::Any, shutdown).await
            }
            SinkCommand::ToExec(sink) => {
                let settings = settings(node.clone(), sink.externals);
                let timing = sink.exec.timing();
                let invocation = sink.exec.invocation(&node)?;
                let carried = sink.carried.carried()?;
                let observed = Observed::new(&node, kind, None);
                let _servers = http::serve(&observed, sink.listen);
                let onlooker = observed.runs(timing.longest_run());
                let batches = start(observed.onlooker())?;
                let out = Box::new(io::stdout());
                let mut exec = ExecSink::start(invocation, timing, node, carried, out, onlooker);
                let tellers = Tellers::new(observed);
                // The lines are those of `to-json`.
                let result =
                    app::run(batches, &mut exec, settings, tellers, Until::Signalled, Machine::Any, shutdown)
                        .await;
                exec.stop().await;
                result
            }
        }
    })
}

/// What the API server takes as a label's value: no object has another one, so it would be waited for in vain.
fn label_value(text: &str) -> Result<String, String> {
    const MAX_LABEL_VALUE: usize = 63;
    let value = text.trim();
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = |c: char| c.is_ascii_alphanumeric();
    if value.is_empty()
        || value.len() > MAX_LABEL_VALUE
        || !value.chars().all(inside)
        || !(value.starts_with(ends) && value.ends_with(ends))
    {
        return Err(format!(
            "no label can have this value: write 1 to {MAX_LABEL_VALUE} letters, digits, '-', '_' and '.', letters or digits \
             at both ends"
        ));
    }
    Ok(value.to_owned())
}

/// What the kernel takes as an interface's name (`dev_valid_name`): one with a slip of the pen would be waited for in
/// vain.
fn interface_name(text: &str) -> Result<String, String> {
    let name = text.trim();
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0';
    if name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || matches!(name, "." | "..")
        || name.contains(forbidden)
    {
        return Err(format!(
            "no interface can have this name: write 1 to {} bytes without blank, slash and colon, several names with \
             commas between them",
            libc::IFNAMSIZ - 1
        ));
    }
    Ok(name.to_owned())
}

fn cidr(text: &str) -> Result<IpNet, String> {
    text.trim().parse().map_err(|_| {
        "not a network: write address/length, such as 192.0.2.0/24 or 2001:db8::/32, several with commas between them"
            .to_owned()
    })
}

fn settings(node: NodeName, externals: ExternalArgs) -> Settings {
    Settings {
        external_cidrs: externals.external_cidrs,
        cluster_cidrs: externals.cluster_cidrs,
        max_externals_per_namespace: externals.max_addresses_per_namespace,
        external_ips: !externals.no_external_ips,
        load_balancer_ips: !externals.no_load_balancer_ips,
        ..Settings::new(node)
    }
}

/// The name given, or the host's in lower case, which is what kubelet registers.
fn node_name(given: Option<String>) -> anyhow::Result<NodeName> {
    if let Some(name) = given.filter(|name| !name.is_empty()) {
        return Ok(NodeName::new(name));
    }
    let host = nix::unistd::gethostname().context("cannot read the host's name: give --node-name")?;
    Ok(NodeName::new(host.to_string_lossy().trim().to_lowercase()))
}

#[cfg(test)]
mod tests;
