//! Real processes: small scripts in a directory of their own, which leave there what they saw.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::mpsc::{Receiver, channel},
    time::Instant,
};

use nix::{sys::signal, unistd::Pid};
use tempfile::TempDir;

use super::*;
use crate::{
    catalog::Catalog,
    desired::{Scope, Settings, compute},
    model::testing::{mk_name, mk_service},
};

/// Nothing here takes a second; this only keeps a test that would wait for ever from doing so.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was told of runs, and what they printed.
#[derive(Clone, Default)]
struct Witness(Arc<Mutex<Told>>);

#[derive(Clone, Default)]
struct Told {
    /// When each run began, and whether with the same state again.
    begun: Vec<(Instant, bool)>,
    /// Nothing, or what the failure was.
    ended: Vec<Result<(), String>>,
    timeouts: usize,
    /// How long runs took that failed, all together.
    failing: Duration,
    printed: Vec<u8>,
}

impl Onlooker for Witness {
    fn begins(&self, again: bool) {
        self.0.lock().unwrap().begun.push((Instant::now(), again));
    }

    fn succeeded(&self, _took: Duration) {
        self.0.lock().unwrap().ended.push(Ok(()));
    }

    fn failed(&self, took: Duration, failure: &Failure, message: &str) {
        let mut told = self.0.lock().unwrap();
        told.failing += took;
        told.timeouts += usize::from(matches!(failure, Failure::Timeout(_)));
        told.ended.push(Err(message.to_owned()));
    }
}

impl Write for Witness {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().printed.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Witness {
    fn told(&self) -> Told {
        self.0.lock().unwrap().clone()
    }

    fn printed(&self) -> String {
        String::from_utf8(self.told().printed).unwrap()
    }

    /// Waits until so many runs have ended, and returns what came of the last of them.
    async fn ended(&self, runs: usize) -> Result<(), String> {
        eventually(|| self.told().ended.get(runs - 1).cloned()).await
    }
}

async fn eventually<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited for in vain");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn node() -> NodeName {
    NodeName::new("node1")
}

/// Short, but for what must not happen.
fn timing() -> Timing {
    Timing {
        timeout: PATIENCE,
        grace: Duration::from_millis(300),
        first_retry: Duration::from_millis(50),
        last_retry: Duration::from_secs(1),
    }
}

/// A sink that runs something in a directory.
struct Lab {
    dir: TempDir,
    witness: Witness,
    sink: ExecSink,
}

impl Lab {
    /// Runs `script` by a shell, whose `$DIR` is the directory.
    fn sh(script: &str, timing: Timing) -> Self {
        Self::start("sh", &["-euc", script], timing)
    }

    fn start(program: &str, arguments: &[&str], timing: Timing) -> Self {
        let witness = Witness::default();
        Self::printing_to(Box::new(witness.clone()), witness, program, arguments, timing)
    }

    fn printing_to(
        out: Box<dyn Write + Send>,
        witness: Witness,
        program: &str,
        arguments: &[&str],
        timing: Timing,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let arguments = arguments.iter().map(Into::into).collect();
        let invocation = Invocation::new(program.into(), arguments, &node())
            .unwrap()
            .with_variable("DIR", dir.path().as_os_str().to_owned());
        let sink =
            ExecSink::start(invocation, timing, node(), Carried::none(), out, Arc::new(witness.clone()));
        Self { dir, witness, sink }
    }

    fn give(&self, text: &str) {
        self.sink.newest.send_replace(Some(text.into()));
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.dir.path().join(name)).ok()
    }

    fn touch(&self, name: &str) {
        fs::write(self.dir.path().join(name), "").unwrap();
    }

    /// Waits for a script to leave its process's number there.
    async fn pid(&self, name: &str) -> Pid {
        eventually(|| self.read(name)?.strip_suffix('\n')?.parse().ok().map(Pid::from_raw)).await
    }
}

/// Whether a process is at work. A zombie is not: in a container nobody may wait for those that init inherits.
fn is_alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_a_run_with_the_lines_of_to_json_and_the_last_has_none() {
    let mut lab = Lab::start("sh", &["-c", "cat; echo end"], timing());
    let mut catalog = Catalog::default();
    let mut apply = |catalog: &Catalog| {
        let (desired, _) = compute(catalog, &Settings::new(node()));
        let (scope, touched) = (&Scope::All, &Scope::All);
        let snapshot = Snapshot { catalog, desired: &desired, scope, touched };
        lab.sink.apply(snapshot).unwrap();
        assert!(lab.sink.newest.borrow().is_some());
        json::render(snapshot, &node(), &Carried::none(), false).unwrap()
    };
    catalog.apply(mk_service("web", ["10.0.0.55"]).into());
    let first = apply(&catalog);
    lab.witness.ended(1).await.unwrap();
    catalog.apply(mk_service("mail", ["10.0.0.56"]).into());
    let second = apply(&catalog);
    lab.witness.ended(2).await.unwrap();
    for name in ["web", "mail"] {
        catalog.delete(&crate::model::ObjectId::Service(mk_name(name)));
    }
    assert_eq!(apply(&catalog), "");
    lab.witness.ended(3).await.unwrap();
    let printed = format!("{first}end\n{second}end\nend\n");
    eventually(|| (lab.witness.printed() == printed).then_some(())).await;
    assert_eq!((first.lines().count(), second.lines().count()), (1, 2));
    eventually(|| (!lab.sink.is_underway()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_a_run_goes_on_is_one_change_and_the_same_again_is_none() {
    let lab = Lab::sh(r#"cat >> "$DIR/runs"; until [ -e "$DIR/go" ]; do sleep 0.01; done"#, timing());
    assert!(!lab.sink.is_underway());
    lab.give("a\n");
    eventually(|| (lab.read("runs").as_deref() == Some("a\n")).then_some(())).await;
    for text in ["b\n", "c\n", "d\n"] {
        lab.give(text);
        assert!(lab.sink.is_underway());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(lab.read("runs").unwrap(), "a\n", "one run at a time");
    lab.touch("go");
    lab.witness.ended(2).await.unwrap();
    lab.give("d\n");
    // There and back again within one run.
    fs::remove_file(lab.dir.path().join("go")).unwrap();
    lab.give("e\n");
    eventually(|| (lab.read("runs").as_deref() == Some("a\nd\ne\n")).then_some(())).await;
    lab.give("f\n");
    lab.give("e\n");
    lab.touch("go");
    lab.witness.ended(3).await.unwrap();
    eventually(|| (!lab.sink.is_underway()).then_some(())).await;
    lab.give("g\n");
    lab.witness.ended(4).await.unwrap();
    assert_eq!(lab.read("runs").unwrap(), "a\nd\ne\ng\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_takes_too_long_is_ended_with_all_its_children() {
    let timing = Timing { timeout: Duration::from_secs(2), ..timing() };
    let lab = Lab::sh(
        r#"trap '' TERM; sleep 1000 & echo $! > "$DIR/child"; echo $$ > "$DIR/leader"; echo "still at it" >&2; wait"#,
        timing,
    );
    lab.give("a\n");
    let (child, leader) = (lab.pid("child").await, lab.pid("leader").await);
    assert!(is_alive(child) && is_alive(leader));
    let error = lab.witness.ended(1).await.unwrap_err();
    assert!(error.contains("was not done within 2 s, and was ended (--timeout)"), "{error}");
    assert!(error.contains("its standard error: still at it"), "{error}");
    assert_eq!(lab.witness.told().timeouts, 1);
    eventually(|| (!is_alive(child) && !is_alive(leader)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_takes_too_long_may_tidy_up() {
    let timing = Timing { timeout: Duration::from_secs(2), grace: PATIENCE, ..timing() };
    let lab =
        Lab::sh(r#"trap 'echo done > "$DIR/tidied"; exit 0' TERM; while :; do sleep 0.01; done"#, timing);
    lab.give("a\n");
    let error = lab.witness.ended(1).await.unwrap_err();
    assert!(error.contains("was not done within"), "{error}");
    assert_eq!(lab.read("tidied").as_deref(), Some("done\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_run_leaves_behind_is_ended_with_it() {
    let lab = Lab::sh(r#"sleep 1000 & echo $! > "$DIR/child""#, timing());
    let start = Instant::now();
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    let child = lab.pid("child").await;
    eventually(|| (!is_alive(child)).then_some(())).await;
    assert!(start.elapsed() < PATIENCE / 2, "the child held the pipes open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_a_run_leaves_behind_goes_on_and_holds_up_nothing() {
    let lab = Lab::sh(
        r#"setsid sh -c 'echo $$ > "$DIR/session"; exec sleep 1000' & while [ ! -s "$DIR/session" ]; do sleep 0.01; done; echo hello"#,
        timing(),
    );
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    let session = lab.pid("session").await;
    let is_left = is_alive(session);
    signal::kill(session, signal::Signal::SIGKILL).unwrap();
    assert!(is_left);
    eventually(|| (lab.witness.printed() == "hello\n").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_says_which_command_how_it_ended_and_what_it_wrote_last() {
    let lab = Lab::sh(
        r#"for i in 1 2 3 4 5 6 7 8 9 10; do echo "line $i" >&2; done; printf '\033[2Jno such chain\377' >&2; exit 3"#,
        timing(),
    );
    lab.give("a\n");
    let error = lab.witness.ended(1).await.unwrap_err();
    assert!(error.starts_with("the command `sh -euc "), "{error}");
    assert!(error.contains("ended with exit status 3; its standard error: ... | line 4 | line 5"), "{error}");
    assert!(error.ends_with("line 10 | \u{fffd}[2Jno such chain\u{fffd}"), "{error}");

    let lab = Lab::sh("kill -9 $$", timing());
    lab.give("a\n");
    let error = lab.witness.ended(1).await.unwrap_err();
    assert!(error.ends_with("was killed by SIGKILL"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_standard_error_is_kept_from_its_end() {
    let lab = Lab::sh("head -c 1000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo why >&2; exit 1", timing());
    lab.give("a\n");
    let error = lab.witness.ended(1).await.unwrap_err();
    assert!(error.ends_with("xxx | why") && error.len() < 5000, "{} bytes", error.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_its_own_environment_and_nothing_of_ours() {
    // What the test's own process has: cargo's variables, HOME and so on.
    assert!(std::env::vars_os().count() > 5);
    let lab = Lab::start("env", &[], timing());
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    let path = std::env::var("PATH").unwrap();
    let expected = format!("DIR={}\nLANG=C.UTF-8\nNODE_NAME=node1\nPATH={path}\n", lab.dir.path().display());
    let sorted = |text: String| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines.iter().map(|line| format!("{line}\n")).collect::<String>()
    };
    eventually(|| (sorted(lab.witness.printed()) == expected).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_inherits_no_descriptor_and_no_ignored_signal() {
    // SAFETY: nothing of this process waits for this signal, and ignoring it runs no code.
    unsafe { signal::signal(signal::Signal::SIGUSR2, signal::SigHandler::SigIgn) }.unwrap();
    // As whoever starts the agent may leave it open: not closed on exec.
    let file = fs::File::open("/dev/null").unwrap();
    let left_open = nix::unistd::dup(&file).unwrap();
    let name = std::os::fd::AsRawFd::as_raw_fd(&left_open).to_string();
    assert!(fs::read_dir("/proc/self/fd").unwrap().any(|entry| entry.unwrap().file_name() == *name));
    let lab =
        Lab::start("sh", &["-c", "ls /proc/self/fd; grep -E 'Sig(Blk|Ign)' /proc/self/status"], timing());
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    let printed = eventually(|| Some(lab.witness.printed()).filter(|printed| !printed.is_empty())).await;
    // 3 is where `ls` reads the directory.
    let signals = printed.strip_prefix("0\n1\n2\n3\n").unwrap_or_else(|| panic!("{printed}"));
    let signals: Vec<u64> = signals
        .lines()
        .map(|line| u64::from_str_radix(line.split_once('\t').unwrap().1, 16).unwrap())
        // 32 and 33 are libc's own: it lets nobody change them.
        .map(|signals| signals & !(0b11 << 31))
        .collect();
    assert_eq!(signals, [0, 0], "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_run_that_prints_without_end_the_beginning_is_passed_on() {
    let lab = Lab::sh(r#"head -c 1000000 /dev/zero | tr '\0' x; echo y > "$DIR/done""#, timing());
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    assert!(lab.read("done").is_some(), "it could print all it wanted");
    let expected = "x".repeat(64 * 1024) + "\n";
    eventually(|| (lab.witness.printed() == expected).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_does_not_read_its_input_is_as_good_as_any() {
    // More than a pipe holds.
    let text = "a line of a large state\n".repeat(100_000);
    for script in ["exit 0", "head -n 1 > /dev/null", "exec <&-; sleep 0.05"] {
        let lab = Lab::sh(script, timing());
        lab.give(&text);
        lab.witness.ended(1).await.unwrap_or_else(|error| panic!("{script}: {error}"));
    }
    let lab = Lab::start("wc", &["-c"], timing());
    lab.give(&text);
    lab.witness.ended(1).await.unwrap();
    eventually(|| (lab.witness.printed() == format!("{}\n", text.len())).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_be_started_is_tried_again_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("callout");
    let write = |mode| {
        // Renamed: a script that is open for writing cannot be run.
        let new = dir.path().join("new");
        fs::write(&new, "#!/bin/sh\ncat\n").unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(mode)).unwrap();
        fs::rename(&new, &script).unwrap();
    };
    let lab = Lab::start(script.to_str().unwrap(), &[], timing());
    lab.give("a\n");
    let error = lab.witness.ended(1).await.unwrap_err();
    let said = format!("the command `{}` cannot be started: No such file or directory", script.display());
    assert!(error.starts_with(&said) && error.contains("see whether the file is there"), "{error}");
    write(0o644);
    let error = eventually(|| {
        let last = lab.witness.told().ended.last().cloned()?.err()?;
        last.contains("Permission denied").then_some(last)
    })
    .await;
    assert!(error.contains("chmod +x"), "{error}");
    write(0o755);
    eventually(|| lab.witness.told().ended.last().cloned()?.ok()).await;
    let told = lab.witness.told();
    assert!(!told.begun[0].1 && told.begun[1..].iter().all(|(_, again)| *again), "{:?}", told.begun);
    eventually(|| (lab.witness.printed() == "a\n").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_failed_is_tried_again_ever_later_with_the_newest_state() {
    let lab = Lab::sh(r#"cat >> "$DIR/runs"; [ -e "$DIR/mended" ]"#, timing());
    lab.give("a\n");
    lab.witness.ended(4).await.unwrap_err();
    assert!(lab.sink.is_underway());
    let begun = lab.witness.told().begun;
    for (number, (pair, least)) in begun.windows(2).zip([50, 100, 200]).enumerate() {
        let pause = pair[1].0 - pair[0].0;
        assert!(pause >= Duration::from_millis(least), "pause {number} is {pause:?}");
    }
    lab.touch("mended");
    lab.give("b\n");
    eventually(|| lab.witness.told().ended.last().cloned()?.ok()).await;
    assert!(lab.read("runs").unwrap().ends_with("a\nb\n"));
    eventually(|| (!lab.sink.is_underway()).then_some(())).await;
    // And that was the end of it: nothing is run twice.
    let runs = lab.witness.told().ended.len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(lab.witness.told().ended.len(), runs);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_in_force_before_a_failure_is_set_up_anew() {
    let lab = Lab::sh(r#"read -r state; echo "$state" >> "$DIR/runs"; [ "$state" != broken ]"#, timing());
    lab.give("a\n");
    lab.witness.ended(1).await.unwrap();
    lab.give("broken\n");
    lab.witness.ended(2).await.unwrap_err();
    // The run that failed may have done half of it.
    lab.give("a\n");
    eventually(|| lab.read("runs")?.ends_with("broken\na\n").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_tried_soon_after_a_failure_but_a_thousand_changes_start_no_thousand_runs() {
    let timing =
        Timing { first_retry: Duration::from_millis(100), last_retry: Duration::from_secs(3600), ..timing() };
    let lab = Lab::sh(r#"cat > "$DIR/last"; exit 1"#, timing);
    let start = Instant::now();
    for number in 0..1000 {
        lab.give(&format!("{number}\n"));
        if number % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    eventually(|| (lab.read("last").as_deref() == Some("999\n")).then_some(())).await;
    let (told, took) = (lab.witness.told(), start.elapsed());
    let (runs, pauses) = (told.begun.len() as u128, took.saturating_sub(told.failing).as_millis());
    let took = took.as_millis();
    // Pauses that no change cuts short end 0.1, 0.3, 0.7, 1.5 and 3.1 seconds after the start.
    assert!(runs >= pauses / 250 && runs <= took / 100 + 1, "{runs} runs in {took} ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_lets_a_run_finish_that_is_nearly_done() {
    let timing = Timing { grace: PATIENCE, ..timing() };
    let lab = Lab::sh(r#"touch "$DIR/began"; sleep 0.2; cat; echo done"#, timing);
    lab.give("a\n");
    eventually(|| lab.read("began")).await;
    lab.sink.stop().await;
    assert_eq!(lab.witness.told().ended, [Ok(())]);
    assert_eq!(lab.witness.printed(), "a\ndone\n", "what it printed last is not lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_leaves_no_process_behind() {
    let lab = Lab::sh(
        r#"trap '' TERM; sleep 1000 & echo $! > "$DIR/child"; echo $$ > "$DIR/leader"; wait"#,
        timing(),
    );
    lab.give("a\n");
    let (child, leader) = (lab.pid("child").await, lab.pid("leader").await);
    lab.give("b\n");
    let start = Instant::now();
    lab.sink.stop().await;
    assert!(start.elapsed() >= 2 * timing().grace, "it had its time");
    assert!(start.elapsed() < PATIENCE / 2);
    eventually(|| (!is_alive(child) && !is_alive(leader)).then_some(())).await;
    let told = lab.witness.told();
    assert_eq!(told.begun.len(), 1, "nothing new is begun");
    assert!(told.ended[0].as_ref().unwrap_err().contains("was ended with the agent"), "{:?}", told.ended);
}

/// A standard output that takes its first piece when it is told to.
struct Stalled(Receiver<()>, Witness);

impl Write for Stalled {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Over as soon as the sender has gone.
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_go_on_when_nobody_reads_what_they_print() {
    let (go_on, wait) = channel();
    let witness = Witness::default();
    let out = Box::new(Stalled(wait, witness.clone()));
    let lab = Lab::printing_to(out, witness, "cat", &[], timing());
    for number in 0..40 {
        lab.give(&format!("{number}\n"));
        lab.witness.ended(number + 1).await.unwrap();
    }
    assert_eq!(lab.witness.printed(), "");
    drop(go_on);
    eventually(|| lab.witness.printed().starts_with("0\n1\n2\n").then_some(())).await;
    lab.give("new\n");
    eventually(|| lab.witness.printed().ends_with("new\n").then_some(())).await;
    assert!(!lab.witness.printed().contains("\n39\n"), "memory would have been without a bound");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_shows_a_command_on_one_line_and_not_without_end() {
    let invocation = |arguments: &[&str]| {
        let arguments = arguments.iter().map(Into::into).collect();
        Invocation::new(Path::new("/opt/callout").into(), arguments, &node()).unwrap().to_string()
    };
    assert_eq!(invocation(&[]), "`/opt/callout`");
    assert_eq!(invocation(&["a\nb", "\u{1b}[1m"]), r"`/opt/callout a\nb \u{1b}[1m`");
    let long = invocation(&["ä".repeat(500).as_str()]);
    assert!(long.ends_with("ä...`") && long.chars().count() == 205, "{long}");
}
