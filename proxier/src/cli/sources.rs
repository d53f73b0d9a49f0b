//! The words before the sink: which source, and its flags.

use std::{path::PathBuf, sync::Arc};

use ::kube::Client;
use anyhow::Context as _;
use clap::{Args, builder::BoolishValueParser};
use tokio::sync::mpsc;

use super::sinks::{self, SinkCommand};
use crate::{
    model::NodeName,
    source::{Batch, Onlooker, api, directory::Directory, file, kube},
};

#[derive(Debug, Args)]
pub(super) struct KubeArgs {
    /// Take Services whose label service.kubernetes.io/service-proxy-name has this value
    #[arg(long, env = "PROXIER_SERVICE_PROXY_NAME", value_name = "NAME", value_parser = label_value)]
    pub(super) service_proxy_name: String,
    /// How to reach the API server [default: this pod's ServiceAccount, or else what kubectl would use]
    #[arg(long, env = "PROXIER_KUBECONFIG", value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig [default: its current one]
    #[arg(long, env = "PROXIER_CONTEXT", value_name = "NAME")]
    pub(super) context: Option<String>,
    /// This node's name, as EndpointSlices write it [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub(super) node_name: Option<String>,
    /// Write no Events about Services; the log has the same
    #[arg(long, env = "PROXIER_NO_EVENTS", value_parser = BoolishValueParser::new())]
    pub(super) no_events: bool,
    #[command(subcommand)]
    pub(super) sink: SinkCommand,
}

#[derive(Debug, Args)]
pub(super) struct FileArgs {
    /// A directory (its *.yaml, *.yml and *.json; not its sub-directories) or a file
    #[arg(long, env = "PROXIER_INPUT", value_name = "DIR|FILE")]
    pub(super) input: PathBuf,
    /// Take Services whose label service.kubernetes.io/service-proxy-name has this value [default: any value]
    #[arg(long, env = "PROXIER_SERVICE_PROXY_NAME", value_name = "NAME")]
    pub(super) service_proxy_name: Option<String>,
    /// This node's name, as EndpointSlices write it [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub(super) node_name: Option<String>,
    #[command(subcommand)]
    pub(super) sink: SinkCommand,
}

#[derive(Debug, Args)]
pub(super) struct ApiArgs {
    /// Where the server is
    #[arg(
        long,
        env = "PROXIER_API",
        value_name = "HOST:PORT|tcp://HOST:PORT|unix:///PATH",
        default_value = api::DEFAULT_ADDRESS
    )]
    pub(super) api: api::Address,
    /// Speak TLS with a server whose certificate is of an authority in this file (PEM) [default: no TLS]
    #[arg(long, env = "PROXIER_API_CA", value_name = "FILE")]
    pub(super) api_ca: Option<PathBuf>,
    /// Show the server this certificate (PEM, with its chain); files are read anew at each connection
    #[arg(long, env = "PROXIER_API_CERT", value_name = "FILE", requires_all = ["api_ca", "api_key"])]
    pub(super) api_cert: Option<PathBuf>,
    /// The key of --api-cert (PEM)
    #[arg(long, env = "PROXIER_API_KEY", value_name = "FILE", requires = "api_cert")]
    pub(super) api_key: Option<PathBuf>,
    /// The node whose state is asked for [default: the host's name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub(super) node_name: Option<String>,
    #[command(subcommand)]
    pub(super) sink: SinkCommand,
}

impl ApiArgs {
    /// What of the flags does not go with the others.
    pub(super) const fn contradiction(&self) -> Option<&'static str> {
        match self {
            Self { api: api::Address::Unix(_), api_ca: Some(_), .. } => Some(
                "the argument '--api-ca <FILE>' is for TCP: who may use a unix socket is up to its owner and mode; leave it away",
            ),
            _ => None,
        }
    }
}

pub(super) fn kube(arguments: KubeArgs) -> anyhow::Result<()> {
    let KubeArgs { service_proxy_name, kubeconfig, context, node_name, no_events, sink } = arguments;
    let options = kube::Options { kubeconfig, context, ..kube::Options::new(service_proxy_name) };
    sinks::run(self::node_name(node_name)?, sink, async move || {
        let server = kube::server(&options).await?;
        let events = if no_events { None } else { Some(server.client()?) };
        let start = Box::new(move |onlooker| kube::spawn(&server, &options, onlooker));
        Ok(Found { kind: "kube", events, only: None, start })
    })
}

pub(super) fn file(arguments: FileArgs) -> anyhow::Result<()> {
    let FileArgs { input, service_proxy_name, node_name, sink } = arguments;
    sinks::run(self::node_name(node_name)?, sink, async move || {
        let directory = Directory::open(input, service_proxy_name)?;
        let start = Box::new(move |onlooker| file::spawn(directory, onlooker));
        Ok(Found { kind: "file", events: None, only: None, start })
    })
}

pub(super) fn api(arguments: ApiArgs) -> anyhow::Result<()> {
    let ApiArgs { api, api_ca, api_cert, api_key, node_name, sink } = arguments;
    let node = self::node_name(node_name)?;
    // The command line has none of the last two without the others.
    let credentials = api_ca.map(|ca| api::Credentials { ca, identity: api_cert.zip(api_key) });
    let options = api::Options { credentials, ..api::Options::new(api, node.clone()) };
    sinks::run(node.clone(), sink, async move || {
        let source = api::Source::open(options)?;
        let start = Box::new(move |onlooker| Ok(source.spawn(onlooker)));
        Ok(Found { kind: "api", events: None, only: Some(node), start })
    })
}

/// Starts a source.
type Start = Box<dyn FnOnce(Arc<dyn Onlooker>) -> anyhow::Result<mpsc::Receiver<Batch>>>;

/// A source that can be started.
pub(super) struct Found {
    /// The word that the command line has for it.
    pub(super) kind: &'static str,
    /// Where Events are written, if anywhere.
    pub(super) events: Option<Client>,
    /// The only node of which it knows the pods, if it is one.
    pub(super) only: Option<NodeName>,
    pub(super) start: Start,
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

/// The name given, or the host's in lower case, which is what kubelet registers.
pub(super) fn node_name(given: Option<String>) -> anyhow::Result<NodeName> {
    if let Some(name) = given.filter(|name| !name.is_empty()) {
        return Ok(NodeName::new(name));
    }
    let host = nix::unistd::gethostname().context("cannot read the host's name: give --node-name")?;
    Ok(NodeName::new(host.to_string_lossy().trim().to_lowercase()))
}
