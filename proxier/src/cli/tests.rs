use std::path::PathBuf;

use super::{
    sinks::{SinkCommand, cidr, interface_name},
    sources::node_name,
    *,
};
use crate::{desired::NoBackend, model::NodeName, sink::bpf::AttachMode};

fn parse(line: &str) -> Cli {
    Cli::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn the_grammar_has_no_contradictions() {
    Cli::command().debug_assert();
}

#[test]
fn source_and_sink_are_read_with_their_flags() {
    let cli = parse(
        "proxier file --input /m --service-proxy-name p --node-name n to-bpf --uplink eth0 --uplink eth1,eth2 \
         --pin-path /p --attach clsact --external-cidr 10.0.0.0/8 --external-cidr 1000::/16,voip=10.0.1.0/24 --no-backend pass \
         --cluster-cidr 10.96.0.0/12,10.244.0.0/16 --max-addresses-per-namespace 4 --log-format json",
    );
    assert_eq!(cli.log_format, LogFormat::Json);
    let Command::File(file) = cli.command else { panic!("{cli:?}", cli = cli.command) };
    assert_eq!(file.input, PathBuf::from("/m"));
    assert_eq!(file.service_proxy_name.as_deref(), Some("p"));
    assert_eq!(file.node_name.as_deref(), Some("n"));
    let SinkCommand::ToBpf(sink) = file.sink else { panic!("{:?}", file.sink) };
    assert_eq!(sink.uplinks, ["eth0", "eth1", "eth2"]);
    assert_eq!(sink.pin.pin_path, PathBuf::from("/p"));
    assert_eq!(sink.attach, AttachMode::Clsact);
    assert_eq!(sink.no_backend, NoBackend::Pass);
    let settings = sink.externals.settings(NodeName::new("n"));
    let ranges: Vec<_> = settings.external_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.0.0.0/8", "1000::/16", "voip=10.0.1.0/24"]);
    assert_eq!(settings.cluster_cidrs, ["10.96.0.0/12", "10.244.0.0/16"].map(|cidr| cidr.parse().unwrap()));
    assert_eq!(settings.max_externals_per_namespace, Some(4));
}

#[test]
fn a_server_of_the_api_is_named_with_what_tls_needs() {
    let Command::Api(arguments) = parse("proxier api to-json").command else { panic!() };
    assert_eq!(arguments.api.to_string(), "127.0.0.1:12090");
    let line = "proxier api --api tcp://kpng:12090 --api-ca /ca --api-cert /cert --api-key /key --node-name n to-bpf";
    let Command::Api(arguments) = parse(line).command else { panic!() };
    assert_eq!(arguments.api.to_string(), "kpng:12090");
    assert_eq!(arguments.api_ca, Some(PathBuf::from("/ca")));
    assert_eq!(arguments.api_cert.zip(arguments.api_key), Some(("/cert".into(), "/key".into())));

    let refused = |line: &str| {
        let refused = Cli::try_parse_from(line.split_whitespace()).and_then(Cli::checked).unwrap_err();
        assert_eq!(refused.exit_code(), 2, "{line}");
        refused.to_string()
    };
    assert!(refused("proxier api --api-ca /ca --api-cert /cert to-json").contains("--api-key <FILE>"));
    assert!(refused("proxier api --api-ca /ca --api-key /key to-json").contains("--api-cert <FILE>"));
    assert!(refused("proxier api --api-cert /cert --api-key /key to-json").contains("--api-ca <FILE>"));
    assert!(refused("proxier api --api unix:///s --api-ca /ca to-json").contains("is for TCP"));
    assert!(refused("proxier api --api nowhere to-json").contains("there is no port: write host:port"));
}

#[test]
fn without_flags_both_kinds_of_external_addresses_count_everywhere() {
    let Command::File(file) = parse("proxier file --input /m to-bpf").command else { panic!() };
    let SinkCommand::ToBpf(sink) = file.sink else { panic!() };
    assert_eq!(sink.pin.pin_path, PathBuf::from("/sys/fs/bpf/proxier"));
    assert_eq!(sink.no_backend, NoBackend::Drop);
    let settings = sink.externals.settings(NodeName::new("n"));
    assert!(settings.external_ips && settings.load_balancer_ips && settings.external_cidrs.is_empty());
    assert!(settings.cluster_cidrs.is_empty() && settings.max_externals_per_namespace.is_none());
}

#[test]
fn every_flag_can_come_from_the_environment() {
    fn visit(command: &clap::Command, path: &str) {
        for argument in command.get_arguments().filter(|argument| argument.get_long().is_some()) {
            let long = argument.get_long().unwrap();
            if matches!(long, "help" | "version") {
                continue;
            }
            let expected = match long {
                "node-name" => "NODE_NAME".to_owned(),
                long => format!("PROXIER_{}", long.replace('-', "_").to_uppercase()),
            };
            let name = argument.get_env().map(|name| name.to_string_lossy().into_owned());
            assert_eq!(name, Some(expected), "{path} --{long}");
        }
        for sub in command.get_subcommands() {
            visit(sub, &format!("{path} {}", sub.get_name()));
        }
    }
    visit(&Cli::command(), "proxier");
}

#[test]
fn everything_that_the_kernel_has_can_be_listed_in_the_singular_too() {
    for (word, is) in [
        ("sessions", (|what| matches!(what, GetCommand::Sessions(_))) as fn(GetCommand) -> bool),
        ("statistics", |what| matches!(what, GetCommand::Statistics(_))),
        ("drops", |what| matches!(what, GetCommand::Drops(_))),
        ("flows", |what| matches!(what, GetCommand::Flows(_))),
        ("endpoints", |what| matches!(what, GetCommand::Endpoints(_))),
        ("services", |what| matches!(what, GetCommand::Services(_))),
    ] {
        for word in [word, word.trim_end_matches('s')] {
            let Command::Get { what } = parse(&format!("proxier get {word} -o wide --pin-path /p")).command
            else {
                panic!("{word}")
            };
            assert!(is(what), "{word}");
        }
    }
}

#[test]
fn a_name_that_no_interface_can_have_is_refused_with_what_a_name_may_be() {
    for good in ["eth0", "bond0.100", "a-name-of-15-by", "ethé", " eth1 "] {
        assert_eq!(interface_name(good).as_deref(), Ok(good.trim()));
    }
    for bad in ["", " ", "eth0 eth1", "eth0/1", "eth0:1", ".", "..", "a-name-of-16-byt"] {
        let error = interface_name(bad).unwrap_err();
        assert!(error.contains("write 1 to 15 bytes"), "{bad:?}: {error}");
    }
}

#[test]
fn a_range_that_is_none_is_refused_with_an_example() {
    assert_eq!(cidr(" 10.0.0.0/8"), Ok("10.0.0.0/8".parse().unwrap()));
    for bad in ["", "10.0.0.5", "10.0.0.0/33", "10.0.0.300/8", "1000::/129", "eth0"] {
        assert!(cidr(bad).unwrap_err().contains("such as 192.0.2.0/24"), "{bad}");
    }
}

#[test]
fn what_is_not_understood_is_a_usage_error() {
    for line in [
        "proxier",
        "proxier file to-json",
        "proxier file --input /m",
        "proxier file --input /m to-bpf --no-backend maybe",
        "proxier file --input /m to-bpf --external-cidr 10.0.0.300/8",
        "proxier file --input /m to-bpf --external-cidr VoIP=10.0.0.0/8",
        "proxier file --input /m to-bpf --cluster-cidr voip=10.0.0.0/8",
        "proxier file --input /m to-bpf --max-addresses-per-namespace 0",
        "proxier file --input /m to-bpf --uplink eth0/1",
        "proxier --log-level loud=x=y get services",
        "proxier get pods",
        "proxier kube to-bpf",
    ] {
        let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn the_hosts_name_stands_in_for_the_nodes() {
    assert_eq!(node_name(Some("Node1".to_owned())).unwrap().as_str(), "Node1");
    let host = node_name(Some(String::new())).unwrap();
    assert_eq!(host.as_str(), host.as_str().to_lowercase());
    assert!(!host.as_str().is_empty());
}

#[test]
fn an_agent_is_asked_where_it_listens_without_flags() {
    let Command::Status(status) = parse("proxier status").command else { panic!() };
    assert_eq!(status.metrics_address.to_string(), DEFAULT_METRICS_ADDRESS);
    let Command::Status(status) = parse("proxier status --address [::1]:9 -o json").command else { panic!() };
    assert_eq!(status.metrics_address.to_string(), "[::1]:9");
    assert_eq!(status.output, Output::Json);
}

#[test]
fn a_wrong_range_is_refused_with_the_flag_and_what_to_write() {
    for (flag, says) in [
        ("--external-cidr voip=10.0.0.5", "write address/length, such as 192.0.2.0/24"),
        (
            "--external-cidr VoIP=10.0.0.0/8",
            "\"VoIP\" is not a namespace's name: write up to 63 lower-case letters",
        ),
        ("--cluster-cidr voip=10.0.0.0/8", "write address/length, such as 192.0.2.0/24"),
    ] {
        let line = format!("proxier file --input /m to-bpf {flag}");
        let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err().to_string();
        let name = flag.split(' ').next().unwrap();
        assert!(error.contains(name) && error.contains(says), "{error}");
    }
}

#[test]
fn tls_is_for_tcp() {
    for (line, is_right) in [
        ("proxier file --input /m to-api --listen tcp://:1 --tls-cert c --tls-key k --tls-client-ca a", true),
        ("proxier file --input /m to-api --listen unix:///run/x --tls-cert c --tls-key k", false),
        ("proxier file --input /m to-bpf --serve-api unix:///run/x --tls-cert c --tls-key k", false),
        ("proxier file --input /m to-bpf --serve-api [::1]:1 --tls-cert c --tls-key k", true),
        ("proxier file --input /m to-bpf --tls-cert c --tls-key k", false),
        ("proxier file --input /m to-api --tls-client-ca a", false),
        ("proxier file --input /m to-api --tls-cert c", false),
        ("proxier api --api unix:///run/x --api-ca a to-json", false),
    ] {
        let parsed = Cli::try_parse_from(line.split_whitespace()).and_then(Cli::checked);
        assert_eq!(parsed.is_ok(), is_right, "{line}");
    }
}
