use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
};

use super::*;
use crate::observe::counts::{Endpoints, Families};

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

fn resource(resource: &str, connected: bool, since: i64, error: Option<&str>) -> ResourceReport {
    ResourceReport {
        resource: resource.to_owned(),
        connected,
        since: time(since),
        last_event: Some(time(998)),
        last_error: error.map(ToOwned::to_owned),
    }
}

fn report() -> StatusReport {
    let interface = |name: &str, role| Interface { name: name.to_owned(), role, xdp: None };
    StatusReport {
        version: "0.1.0".to_owned(),
        node: "node1".to_owned(),
        time: time(1000),
        started: time(0),
        live: true,
        ready: true,
        failing: Vec::new(),
        source: SourceReport {
            kind: "kube".to_owned(),
            synced: true,
            resources: vec![
                resource("services", true, 10, Some("too many requests")),
                resource("nodes", false, 700, Some("nodes is forbidden")),
            ],
        },
        sync: SyncReport {
            last_applied: Some(time(998)),
            last_duration_seconds: Some(0.003_14),
            failure: None,
        },
        counts: Counts {
            services: 5,
            services_without_local_endpoints: 2,
            external_addresses: Families { ipv4: 6, ipv6: 3 },
            endpoints: Endpoints { local: 4, draining: 1, total: 9 },
        },
        interfaces: vec![
            interface("eth0", InterfaceRole::Uplink),
            interface("eth1", InterfaceRole::Uplink),
            interface("veth7", InterfaceRole::PodLink),
        ],
        direct: DirectReport::default(),
        problems: ProblemsReport {
            total: 12,
            first: vec![ProblemReport {
                severity: "warning".to_owned(),
                text: "Service default/web: spec.externalIPs[1] \"x\" is not an IP address; write one"
                    .to_owned(),
            }],
        },
    }
}

fn unready() -> StatusReport {
    let failing = |check: &str, reason: &str| Failing { check: check.to_owned(), reason: reason.to_owned() };
    StatusReport {
        ready: false,
        failing: vec![failing("source-synced", "nothing heard"), failing("state-applied", "not yet")],
        source: SourceReport { synced: false, ..report().source },
        sync: SyncReport {
            last_applied: None,
            last_duration_seconds: None,
            failure: Some(FailureReport {
                since: time(940),
                attempts: 6,
                error: "the map is full".to_owned(),
            }),
        },
        interfaces: Vec::new(),
        problems: ProblemsReport::default(),
        ..report()
    }
}

#[test]
fn people_are_told_what_matters_with_ages_by_the_nodes_clock() {
    insta::assert_snapshot!(render(&report(), Output::Table).unwrap(), @r#"
    proxier 0.1.0 on node1, started 16m ago
    Live:        yes
    Ready:       yes
    Source:      kube
      services: followed for 16m, last heard of 2s ago
      nodes: away for 5m0s, last heard of 2s ago: nodes is forbidden
    Applied:     2s ago, in 3.1 ms
    Services:    5, 2 of them without a pod here
    Externals:   6 IPv4, 3 IPv6
    Pods:        4 here, 1 draining, 9 in the cluster
    Uplinks:     eth0, eth1
    Pod links:   1
    Problems:    12
      warning: Service default/web: spec.externalIPs[1] "x" is not an IP address; write one
      ... and 11 more: see the log
    "#);
    let wide = render(&report(), Output::Wide).unwrap();
    assert!(wide.contains("Pod links:   veth7\n"), "{wide}");
    assert!(wide.contains("last error: too many requests\n"), "{wide}");
}

#[test]
fn addresses_that_are_left_to_the_stack_are_told_with_their_services_and_the_reason() {
    let by_stack = |last: u8| StackReport {
        pod: IpAddr::from([11, 0, 2, last]),
        services: (1..last).map(|number| format!("default/web{number}")).collect(),
        reason: format!("the programs are not on its link veth{last} yet"),
    };
    let direct = DirectReport { reached: 2, by_stack: (2..7).map(by_stack).collect() };
    let report = StatusReport { direct, ..report() };
    let text = render(&report, Output::Table).unwrap();
    let told: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.starts_with("Direct:"))
        .take_while(|line| !line.starts_with("Problems"))
        .collect();
    assert_eq!(
        told,
        [
            "Direct:      2 of 7 addresses of pods whose Services ask for it",
            "  11.0.2.2 (default/web1): the programs are not on its link veth2 yet",
            "  11.0.2.3 (default/web1, default/web2): the programs are not on its link veth3 yet",
            "  11.0.2.4 (default/web1, default/web2, default/web3): the programs are not on its link veth4 yet",
            "  ... and 2 more: see -o wide",
        ]
    );
    let wide = render(&report, Output::Wide).unwrap();
    let all = "  11.0.2.6 (default/web1, default/web2, default/web3, default/web4, default/web5): ";
    assert!(wide.contains(all) && !wide.contains("more: see -o wide"), "{wide}");
    let json: StatusReport = serde_json::from_str(&render(&report, Output::Json).unwrap()).unwrap();
    assert_eq!(json, report);
    let mut report = report;
    report.direct.by_stack.drain(..4);
    let text = render(&report, Output::Table).unwrap();
    assert!(text.contains("  11.0.2.6 (default/web1, default/web2, default/web3 and 2 more): "), "{text}");
}

#[test]
fn who_is_not_ready_says_why() {
    insta::assert_snapshot!(render(&unready(), Output::Table).unwrap(), @r"
    proxier 0.1.0 on node1, started 16m ago
    Live:        yes
    Ready:       no
      source-synced: nothing heard
      state-applied: not yet
    Source:      kube, not read as a whole yet
      services: followed for 16m, last heard of 2s ago
      nodes: away for 5m0s, last heard of 2s ago: nodes is forbidden
    Applied:     not yet
      fails for 60s, attempts: 6: the map is full
    Services:    5, 2 of them without a pod here
    Externals:   6 IPv4, 3 IPv6
    Pods:        4 here, 1 draining, 9 in the cluster
    Uplinks:     none
    Pod links:   0
    Problems:    0
    ");
}

#[test]
fn json_and_yaml_hold_all_of_it() {
    for report in [report(), unready()] {
        let json = render(&report, Output::Json).unwrap();
        assert_eq!(serde_json::from_str::<StatusReport>(&json).unwrap(), report);
        let yaml = render(&report, Output::Yaml).unwrap();
        assert_eq!(serde_saphyr::from_str::<StatusReport>(&yaml).unwrap(), report);
    }
    let json: serde_json::Value = serde_json::from_str(&render(&report(), Output::Json).unwrap()).unwrap();
    assert_eq!(json["sync"]["lastApplied"], "2023-11-14T22:29:58Z");
    assert_eq!(json["interfaces"][2]["role"], "pod-link");
}

#[test]
fn an_agent_that_is_not_ready_is_a_failure_and_a_source_that_is_away_is_none() {
    verdict(&report()).unwrap();
    let error = verdict(&unready()).unwrap_err().to_string();
    assert_eq!(error, "the agent is not ready: source-synced, state-applied");
    let failing = vec![Failing { check: "loop-agent".to_owned(), reason: "hangs".to_owned() }];
    let error = verdict(&StatusReport { live: false, failing, ..report() }).unwrap_err().to_string();
    assert_eq!(error, "the agent is not live: loop-agent");
}

#[test]
fn ages_are_rough() {
    for (seconds, text) in [
        (-5, "0s"),
        (119, "119s"),
        (120, "2m0s"),
        (605, "10m"),
        (10_799, "179m"),
        (10_860, "3h1m"),
        (172_800, "2d0h"),
        (10 * 86_400 + 7200, "10d2h"),
    ] {
        assert_eq!(rough(SignedDuration::from_secs(seconds)), text);
    }
}

/// Answers one connection with `answer`, whatever it asks.
fn answering(answer: String) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // An answer that comes before the question is another mistake.
        assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        stream.write_all(answer.as_bytes()).unwrap();
    });
    address
}

#[test]
fn an_agent_on_all_addresses_is_asked_on_the_loopback() {
    let json = serde_json::to_string(&report()).unwrap();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{json}", json.len());
    let address = answering(answer);
    assert_eq!(fetch(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())).unwrap(), report());
}

#[test]
fn where_nobody_listens_is_told_with_what_that_means() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = format!("{:#}", fetch(free).unwrap_err());
    assert!(error.starts_with(&format!("no agent answers on {free}: none runs on this node")), "{error}");
    assert!(error.contains("`proxier get services` shows it"), "{error}");
}

#[test]
fn somebody_else_who_answers_is_told_from_an_agent() {
    let health = answering("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned());
    let error = format!("{:#}", fetch(health).unwrap_err());
    assert!(error.contains("not as a proxier does") && error.contains("404"), "{error}");
    let ssh = answering("SSH-2.0-OpenSSH_9.2\r\n".to_owned());
    let error = format!("{:#}", fetch(ssh).unwrap_err());
    assert!(error.contains("not as a proxier does"), "{error}");
    let other = answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}".to_owned());
    let error = format!("{:#}", fetch(other).unwrap_err());
    assert!(error.contains("no status of a proxier of this version"), "{error}");
}
