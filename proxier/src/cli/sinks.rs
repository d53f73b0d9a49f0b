//! The words after the source: which sink, its flags, and how it is fed.

use std::{io, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::{Args, Subcommand, builder::BoolishValueParser};
use globset::{Glob, GlobSet};
use ipnet::IpNet;

use super::sources::Found;
use crate::{
    app::{self, Machine, Shutdown, Tellers, Until},
    desired::{Delivery, ExternalCidr, NoBackend, Settings},
    model::NodeName,
    observe::{
        Observed,
        changes::Audience,
        events::Events,
        http::{self, ListenArgs},
        listen,
        metrics::kernel::PinnedMaps,
        service_health::ServiceHealth,
    },
    sink::{
        Sink,
        api::{ApiSink, DEFAULT_LISTEN_ADDRESS, ListenAddress, Taken, TlsFiles, WithApi},
        bpf::{self, AttachMode, BpfSink, Ingress},
        exec::{ExecSink, arguments::ExecArgs},
        export::Carried,
        json::JsonSink,
    },
};

#[derive(Debug, Subcommand)]
#[expect(clippy::enum_variant_names, reason = "the words of the command line")]
pub(super) enum SinkCommand {
    /// Program the kernel
    ToBpf(Box<ToBpfArgs>),
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
pub(super) struct ToBpfArgs {
    /// An interface towards clients; repeatable [default: every interface that carries a default route]
    #[arg(
        long = "uplink",
        env = "PROXIER_UPLINK",
        value_name = "INTERFACE",
        value_delimiter = ',',
        value_parser = interface_name
    )]
    pub(super) uplinks: Vec<String>,
    #[command(flatten)]
    pub(super) pin: PinArgs,
    /// How to attach to interfaces
    #[arg(long, env = "PROXIER_ATTACH", value_enum, default_value_t)]
    pub(super) attach: AttachMode,
    /// Where to rewrite what comes in by uplinks
    #[arg(long, env = "PROXIER_INGRESS", value_enum, default_value_t)]
    pub(super) ingress: Ingress,
    /// Leave alone what pods and processes of this node send to external addresses; pods' links then carry programs for
    /// direct delivery only. Set anew, it ends such conversations
    #[arg(long, env = "PROXIER_NO_LOCAL_CLIENTS", value_parser = BoolishValueParser::new())]
    pub(super) no_local_clients: bool,
    /// What to do with packets for a Service that has no pod on this node
    #[arg(long, env = "PROXIER_NO_BACKEND", value_enum, default_value_t)]
    pub(super) no_backend: NoBackend,
    /// How packets reach the pods of Services without the annotation proxier.io/delivery; `direct` passes the node's firewall by
    #[arg(long, env = "PROXIER_DELIVERY", value_enum, default_value_t)]
    pub(super) delivery: Delivery,
    #[command(flatten)]
    pub(super) externals: ExternalArgs,
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    /// Serve the same to other backends, by kpng's gRPC API: tcp://ADDRESS:PORT, or unix:///PATH
    #[arg(long, env = "PROXIER_SERVE_API", value_name = "ADDRESS")]
    pub(super) serve_api: Option<ListenAddress>,
    #[command(flatten)]
    pub(super) tls: TlsArgs,
    #[command(flatten)]
    pub(super) carried: CarriedArgs,
}

#[derive(Debug, Args)]
pub(super) struct ToApiArgs {
    /// Where: tcp://ADDRESS:PORT, or unix:///PATH
    #[arg(long, env = "PROXIER_LISTEN", value_name = "ADDRESS", default_value = DEFAULT_LISTEN_ADDRESS)]
    pub(super) listen: ListenAddress,
    #[command(flatten)]
    pub(super) tls: TlsArgs,
    #[command(flatten)]
    pub(super) carried: CarriedArgs,
    #[command(flatten)]
    pub(super) externals: ExternalArgs,
    #[command(flatten)]
    pub(super) health: ListenArgs,
}

/// What of a Service is passed on that proxier does not need.
#[derive(Debug, Args)]
pub(super) struct CarriedArgs {
    /// Pass on labels of Services with such names (*, ?, [...]); repeatable [default: none]
    #[arg(long, env = "PROXIER_WITH_SERVICE_LABELS", value_name = "GLOB", value_delimiter = ',')]
    pub(super) with_service_labels: Vec<Glob>,
    /// Pass on annotations of Services with such names, beside those of proxier; repeatable [default: none]
    #[arg(long, env = "PROXIER_WITH_SERVICE_ANNOTATIONS", value_name = "GLOB", value_delimiter = ',')]
    pub(super) with_service_annotations: Vec<Glob>,
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
pub(super) struct TlsArgs {
    /// The API's certificate, and those that lead to its authority (PEM); read again when it has changed
    #[arg(long, env = "PROXIER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(super) tls_cert: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, env = "PROXIER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate of one of these authorities (PEM)
    #[arg(long, env = "PROXIER_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_client_ca: Option<PathBuf>,
}

impl TlsArgs {
    fn files(self) -> Option<TlsFiles> {
        // The command line has none of the others without these two.
        let (certificate, key) = self.tls_cert.zip(self.tls_key)?;
        Some(TlsFiles { certificate, key, client_authorities: self.tls_client_ca })
    }
}

#[derive(Debug, Args)]
pub(super) struct ToJsonArgs {
    /// Print once and end
    #[arg(long, env = "PROXIER_ONCE", value_parser = BoolishValueParser::new())]
    pub(super) once: bool,
    /// Print on many lines, for people
    #[arg(long, env = "PROXIER_PRETTY", value_parser = BoolishValueParser::new())]
    pub(super) pretty: bool,
    #[command(flatten)]
    pub(super) carried: CarriedArgs,
    #[command(flatten)]
    pub(super) externals: ExternalArgs,
}

#[derive(Debug, Args)]
pub(super) struct ToExecArgs {
    #[command(flatten)]
    pub(super) exec: ExecArgs,
    #[command(flatten)]
    pub(super) carried: CarriedArgs,
    #[command(flatten)]
    pub(super) externals: ExternalArgs,
    #[command(flatten)]
    pub(super) listen: ListenArgs,
}

/// Which external addresses count.
#[derive(Debug, Args)]
pub(super) struct ExternalArgs {
    /// Take external addresses inside this range only, with NAMESPACE= for Services of that namespace alone; the most
    /// specific range that holds an address decides; repeatable [default: any]
    #[arg(
        long = "external-cidr",
        env = "PROXIER_EXTERNAL_CIDR",
        value_name = "[NAMESPACE=]CIDR",
        value_delimiter = ','
    )]
    pub(super) external_cidrs: Vec<ExternalCidr>,
    /// Take no external address inside this network, which is the cluster's own: its pods', its Services'; repeatable
    #[arg(
        long = "cluster-cidr",
        env = "PROXIER_CLUSTER_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = cidr
    )]
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// Take no more external addresses than this for the Services of a namespace together, the oldest Services' first
    /// [default: any number]
    #[arg(
        long,
        env = "PROXIER_MAX_ADDRESSES_PER_NAMESPACE",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(super) max_addresses_per_namespace: Option<u32>,
    /// Leave spec.externalIPs alone
    #[arg(long, env = "PROXIER_NO_EXTERNAL_IPS", value_parser = BoolishValueParser::new())]
    pub(super) no_external_ips: bool,
    /// Leave status.loadBalancer.ingress alone
    #[arg(long, env = "PROXIER_NO_LOAD_BALANCER_IPS", value_parser = BoolishValueParser::new())]
    pub(super) no_load_balancer_ips: bool,
}

impl ExternalArgs {
    /// What is worked out by, for `node`.
    pub(super) fn settings(self, node: NodeName) -> Settings {
        Settings {
            external_cidrs: self.external_cidrs,
            cluster_cidrs: self.cluster_cidrs,
            max_externals_per_namespace: self.max_addresses_per_namespace,
            external_ips: !self.no_external_ips,
            load_balancer_ips: !self.no_load_balancer_ips,
            ..Settings::new(node)
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct PinArgs {
    /// Where maps and links are pinned: a directory on a bpffs
    #[arg(long, env = "PROXIER_PIN_PATH", value_name = "DIR", default_value = bpf::DEFAULT_PIN_PATH)]
    pub(super) pin_path: PathBuf,
}

impl SinkCommand {
    /// What of the flags does not go with the others.
    pub(super) fn contradiction(&self) -> Option<&'static str> {
        let (address, tls) = match self {
            Self::ToBpf(bpf) => (bpf.serve_api.as_ref(), &bpf.tls),
            Self::ToApi(api) => (Some(&api.listen), &api.tls),
            Self::ToJson(_) | Self::ToExec(_) => return None,
        };
        tls.tls_cert.as_ref()?;
        match address {
            Some(ListenAddress::Tcp(_)) => None,
            Some(ListenAddress::Unix(_)) => Some(
                "the argument '--tls-cert <FILE>' is for TCP: who may use a unix socket is up to its owner and mode; leave it away",
            ),
            None => Some(
                "the argument '--tls-cert <FILE>' is for the API: give --serve-api as well, or leave it away",
            ),
        }
    }
}

/// What every sink begins with.
struct Beginning {
    node: NodeName,
    found: Found,
    shutdown: Shutdown,
}

/// Feeds a sink from the source that `find` finds, on `node`.
pub(super) fn run(
    node: NodeName,
    sink: SinkCommand,
    find: impl AsyncFnOnce() -> anyhow::Result<Found>,
) -> anyhow::Result<()> {
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
        let beginning = Beginning { node, found: find().await?, shutdown };
        match sink {
            SinkCommand::ToBpf(arguments) => to_bpf(*arguments, beginning).await,
            SinkCommand::ToApi(arguments) => to_api(arguments, beginning).await,
            SinkCommand::ToJson(arguments) => to_json(arguments, beginning).await,
            SinkCommand::ToExec(arguments) => to_exec(arguments, beginning).await,
        }
    })
}

async fn to_bpf(arguments: ToBpfArgs, beginning: Beginning) -> anyhow::Result<()> {
    let Beginning { node, found: Found { kind, events, only, start }, shutdown } = beginning;
    let ToBpfArgs {
        uplinks,
        pin: PinArgs { pin_path },
        attach,
        ingress,
        no_local_clients,
        no_backend,
        delivery,
        externals,
        listen,
        serve_api,
        tls,
        carried,
    } = arguments;
    let settings = Settings {
        no_backend,
        delivery,
        node_clients: !no_local_clients,
        ..externals.settings(node.clone())
    };
    let kernel = PinnedMaps { pin_path: pin_path.clone() };
    let options = bpf::Options { uplinks, pin_path, attach, ingress, local_clients: !no_local_clients };
    let observed = Observed::new(&node, kind, Some(Box::new(kernel)));
    let _servers = http::serve(&observed, listen);
    let api = match serve_api {
        Some(address) => {
            let (tls, carried) = (tls.files(), carried.carried()?);
            // Packets do not wait for it.
            let metrics = Arc::clone(&observed.metrics);
            Some(ApiSink::serve(&address, tls, Taken::Waits, carried, only, metrics)?)
        }
        None => None,
    };
    let bpf = BpfSink::open(options)?;
    if delivery == Delivery::Direct {
        tracing::info!(
            "--delivery direct: packets from outside for every Service go past this node's stack, and so past its firewall and \
             the NetworkPolicy that it enforces; a Service opts out with the annotation proxier.io/delivery: stack"
        );
    }
    let mut sink: Box<dyn Sink> = match api {
        Some(api) => Box::new(WithApi { sink: bpf, api }),
        None => Box::new(bpf),
    };
    let batches = start(observed.onlooker())?;
    let tellers = Tellers {
        audience: Audience::Kernel,
        events: events.map(|client| Events::start(client, &node, &observed)),
        service_health: Some(ServiceHealth::new(observed.health.clone())),
        observed,
    };
    app::run(batches, &mut *sink, settings, tellers, Until::Signalled, Machine::ThisNode, shutdown).await
}

async fn to_api(arguments: ToApiArgs, beginning: Beginning) -> anyhow::Result<()> {
    let Beginning { node, found: Found { kind, only, start, .. }, shutdown } = beginning;
    let ToApiArgs { listen: address, tls, carried, externals, health } = arguments;
    let settings = Settings { every_node: true, ..externals.settings(node.clone()) };
    let observed = Observed::new(&node, kind, None);
    let _servers = http::serve(&observed, health);
    let (tls, carried) = (tls.files(), carried.carried()?);
    let metrics = Arc::clone(&observed.metrics);
    let mut api = ApiSink::serve(&address, tls, Taken::Fails, carried, only, metrics)?;
    let batches = start(observed.onlooker())?;
    let tellers = Tellers { audience: Audience::EveryNode, ..Tellers::new(observed) };
    // The backends may run anywhere, so what this host's interfaces have does not matter.
    app::run(batches, &mut api, settings, tellers, Until::Signalled, Machine::Any, shutdown).await
}

async fn to_json(arguments: ToJsonArgs, beginning: Beginning) -> anyhow::Result<()> {
    let Beginning { node, found: Found { kind, start, .. }, shutdown } = beginning;
    let ToJsonArgs { once, pretty, carried, externals } = arguments;
    let settings = externals.settings(node.clone());
    let observed = Observed::new(&node, kind, None);
    let mut json = JsonSink::new(Box::new(io::stdout()), node, carried.carried()?, pretty);
    let until = if once { Until::FirstApply } else { Until::Signalled };
    let batches = start(observed.onlooker())?;
    let tellers = Tellers::new(observed);
    // The lines may be read anywhere, so what this host's interfaces have does not matter.
    app::run(batches, &mut json, settings, tellers, until, Machine::Any, shutdown).await
}

async fn to_exec(arguments: ToExecArgs, beginning: Beginning) -> anyhow::Result<()> {
    let Beginning { node, found: Found { kind, start, .. }, shutdown } = beginning;
    let ToExecArgs { exec, carried, externals, listen } = arguments;
    let settings = externals.settings(node.clone());
    let (timing, invocation, carried) = (exec.timing(), exec.invocation(&node)?, carried.carried()?);
    let observed = Observed::new(&node, kind, None);
    let _servers = http::serve(&observed, listen);
    let onlooker = observed.runs(timing.longest_run());
    let batches = start(observed.onlooker())?;
    let mut exec = ExecSink::start(invocation, timing, node, carried, Box::new(io::stdout()), onlooker);
    let tellers = Tellers::new(observed);
    // What reads the lines makes rules of this node as a rule: its own addresses are nobody else's.
    let result =
        app::run(batches, &mut exec, settings, tellers, Until::Signalled, Machine::ThisNode, shutdown).await;
    exec.stop().await;
    result
}

/// What the kernel takes as an interface's name (`dev_valid_name`): one with a slip of the pen would be waited for in
/// vain.
pub(super) fn interface_name(text: &str) -> Result<String, String> {
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

pub(super) fn cidr(text: &str) -> Result<IpNet, String> {
    text.trim().parse().map_err(|_| {
        "not a network: write address/length, such as 192.0.2.0/24 or 2001:db8::/32, several with commas between them"
            .to_owned()
    })
}
