//! Manifests in, a program called: the real command with scripts as its command.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

mod agent;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Output,
    thread::sleep,
    time::{Duration, Instant},
};

use agent::{Agent, command};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(30);

fn service(external: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  labels: {{service.kubernetes.io/service-proxy-name: \
         proxier}}\nspec:\n  externalIPs: [{external}]\n"
    )
}

fn eventually<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited for in vain");
        sleep(Duration::from_millis(10));
    }
}

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// With a Service.
    fn new() -> Self {
        let lab = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(lab.path("manifests")).unwrap();
        lab.write("manifests/service.yaml", &service("10.0.0.55"));
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }

    fn write(&self, name: &str, text: &str) {
        let temporary = self.path("new");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }

    fn manifests(&self) -> PathBuf {
        self.path("manifests")
    }

    /// `proxier` with these words after `to-exec`, and `metrics` as where it answers.
    fn command(&self, metrics: &str, words: &[&str]) -> std::process::Command {
        let mut command = command(["--log-level", "debug", "file", "--node-name", "node1", "--input"]);
        command.arg(self.manifests()).args([
            "to-exec",
            "--health-address",
            "off",
            "--metrics-address",
            metrics,
        ]);
        command.args(words).env("PATH", std::env::var_os("PATH").unwrap());
        command
    }

    /// Runs `script` by a shell, whose first argument is the directory.
    fn start(&self, metrics: &str, script: &str) -> Agent {
        let words = ["--", "sh", "-euc", script, "callout", self.dir.path().to_str().unwrap()];
        Agent::start(self.command(metrics, &words))
    }

    /// Runs the program that CALLOUT names.
    fn start_callout(&self, program: &Path) -> Agent {
        let mut command = self.command("off", &[]);
        command.env("CALLOUT", program);
        Agent::start(command)
    }
}

/// A port that nobody has at the moment.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn status(address: SocketAddr) -> Output {
    command(["status", "--metrics-address", &address.to_string()]).output().unwrap()
}

#[test]
fn a_command_is_given_what_to_json_prints_at_every_change() {
    let lab = Lab::new();
    let mut agent = lab.start("off", "cat; echo '\"end\"'");
    let mut json = Agent::to_json(&lab.manifests());
    assert_eq!(agent.next(), json.next());
    assert_eq!(agent.next(), "end");
    let ready = agent.logs(" ready ");
    assert!(ready.contains("services=1") && ready.contains("externals=1"), "{ready}");

    lab.write("manifests/service.yaml", &service("10.0.0.56"));
    let changed = json.next();
    assert_eq!(agent.next_that(|line| *line != "end"), changed);
    assert_eq!(changed["Service"]["IPs"]["ExternalIPs"]["V4"][0], "10.0.0.56");
    assert_eq!(agent.next(), "end");

    fs::remove_file(lab.path("manifests/service.yaml")).unwrap();
    assert_eq!(agent.next(), "end", "the whole set, of nothing");
    agent.signal(Signal::SIGTERM);
    let (status, out, log) = agent.end();
    assert_eq!(status.code(), Some(0));
    assert_eq!(out, [""; 0]);
    assert_eq!(log.iter().filter(|line| line.contains(" ready ")).count(), 1, "{log:#?}");
}

#[test]
fn callout_names_a_program_without_arguments_as_it_does_for_kpng() {
    let lab = Lab::new();
    let mut agent = lab.start_callout(Path::new("/bin/cat"));
    assert_eq!(agent.next()["Service"]["Name"], "web");
    // A command line goes before the environment.
    let mut command = lab.command("off", &["--", "echo", "\"from the command line\""]);
    command.env("CALLOUT", "/bin/cat");
    assert_eq!(Agent::start(command).next(), "from the command line");
    // No shell, and no words: that would be a file's name.
    let mut command = lab.command("off", &[]);
    let output = command.env("CALLOUT", "/bin/cat -n").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("without arguments: write to-exec -- /bin/cat -n"), "{error}");
}

#[test]
fn no_command_is_a_usage_error_that_names_both_ways() {
    let lab = Lab::new();
    for callout in [None, Some("")] {
        let mut command = lab.command("off", &[]);
        if let Some(callout) = callout {
            command.env("CALLOUT", callout);
        }
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("to-exec -- CMD ARGS") && error.contains("CALLOUT=CMD"), "{error}");
    }
    for words in [&["--timeout", "soon", "--", "true"][..], &["--env", "=", "--", "true"], &["true"]] {
        assert_eq!(lab.command("off", words).output().unwrap().status.code(), Some(2), "{words:?}");
    }
}

#[test]
fn the_agent_is_ready_once_the_command_has_set_up_a_first_state() {
    let lab = Lab::new();
    let address = free_address();
    let script = r#"cat > "$1/got"; [ -e "$1/mended" ] || { echo "no such chain" >&2; exit 4; }"#;
    let mut agent = lab.start(&address.to_string(), script);
    let error = agent.logs("ERROR");
    for part in
        ["the command `sh -euc ", "exit status 4", "no such chain", "it is run again", "retry_in_seconds=1"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    let readyz = get(address, "/readyz");
    assert!(readyz.starts_with("HTTP/1.1 503 ") && readyz.contains("[-]state-applied failed"), "{readyz}");
    let asked = status(address);
    let shown = String::from_utf8(asked.stdout).unwrap();
    assert_eq!(asked.status.code(), Some(1), "{shown}");
    assert!(shown.contains("exit status 4; its standard error: no such chain"), "{shown}");

    lab.write("mended", "");
    agent.logs(" ready ");
    assert!(get(address, "/readyz").starts_with("HTTP/1.1 200 "));
    assert!(get(address, "/livez").contains("[+]loop-command ok"));
    assert_eq!(status(address).status.code(), Some(0));
    let metrics = get(address, "/metrics");
    assert!(metrics.contains("proxier_exec_runs_total{result=\"ok\"} 1\n"), "{metrics}");
    assert!(metrics.contains("proxier_exec_runs_total{result=\"failed\"} "), "{metrics}");
    assert!(metrics.contains("proxier_exec_run_duration_seconds_count{result=\"ok\"} 1\n"), "{metrics}");

    // A later failure makes nobody unready: what the last run has set up is in force still.
    fs::remove_file(lab.path("mended")).unwrap();
    lab.write("manifests/service.yaml", &service("10.0.0.56"));
    agent.logs("ERROR");
    let readyz = get(address, "/readyz");
    assert!(readyz.starts_with("HTTP/1.1 200 ") && readyz.contains("but not all of it"), "{readyz}");
    assert!(lab.read("got").unwrap().contains("10.0.0.56"));
}

#[test]
fn ending_the_agent_ends_a_command_that_does_not_come_to_an_end() {
    let lab = Lab::new();
    let script = r#"sleep 1000 & echo $! $$ > "$1/pids"; wait"#;
    let agent = lab.start("off", script);
    let pids = eventually(|| lab.read("pids").filter(|pids| pids.ends_with('\n')));
    agent.signal(Signal::SIGTERM);
    let start = Instant::now();
    let (status, _, log) = agent.end();
    assert_eq!(status.code(), Some(0));
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "the DaemonSet gives it 15 seconds: {:?}",
        start.elapsed()
    );
    assert!(
        log.iter().any(|line| line.contains("was ended with the agent; what it has set up stays")),
        "{log:#?}"
    );
    for pid in pids.split_whitespace() {
        eventually(|| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // A zombie is gone as well: in a container nobody may wait for those that init inherits.
            (stat.is_empty() || stat.contains(") Z ")).then_some(())
        });
    }
}

#[test]
fn a_command_has_the_variables_that_are_given_and_no_others() {
    let lab = Lab::new();
    let script = r#"env | grep -vE '^(PWD|SHLVL|OLDPWD|_)=' | sort > "$1/env""#;
    let dir = lab.dir.path().to_str().unwrap();
    let words =
        ["--env", "TOKEN", "--env", "MODE=a b", "--env", "NOT_THERE", "--", "sh", "-euc", script, "x", dir];
    let mut command = lab.command("off", &words);
    command.env("TOKEN", "secret").env("HOME", "/root").env("PROXIER_TIMEOUT", "5s");
    let mut agent = Agent::start(command);
    let warning = agent.logs("NOT_THERE");
    assert!(warning.contains("WARN") && warning.contains("NOT_THERE=VALUE"), "{warning}");
    agent.logs(" ready ");
    let path = std::env::var("PATH").unwrap();
    let expected = format!("LANG=C.UTF-8\nMODE=a b\nNODE_NAME=node1\nPATH={path}\nTOKEN=secret\n");
    assert_eq!(lab.read("env").unwrap(), expected);
}
