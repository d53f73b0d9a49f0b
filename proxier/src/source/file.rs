//! `proxier file`: watches a directory of manifests and delivers what changes. Not for what the files say: that is
//! `directory` and `manifest`.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;

use super::{Batch, Onlooker, directory::Directory};
use crate::model::{Problem, ProblemKind, Severity, Subject};

/// What is read, for who looks on.
const FILES: &str = "files";
/// Editors write a file in several steps; what they leave in between is nobody's intention.
const QUIET: Duration = Duration::from_millis(100);
/// Somebody who writes all the time must not put off everybody else's changes for ever.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// inotify loses events when its queue is full, and sees nothing of what another host does on a network file system.
const REREAD: Duration = Duration::from_secs(30);
/// The same where nothing can be watched at all.
const REREAD_UNWATCHED: Duration = Duration::from_secs(2);

/// Reads `directory` on a thread of its own, now and at every change, until the receiver is dropped.
///
/// # Errors
///
/// The thread cannot be started.
pub fn spawn(directory: Directory, onlooker: Arc<dyn Onlooker>) -> anyhow::Result<mpsc::Receiver<Batch>> {
    // Small: while the receiver is busy, changes come together in the files, not in memory.
    let (batches, receiver) = mpsc::channel(1);
    thread::Builder::new()
        .name("file-source".to_owned())
        .spawn(move || run(directory, &batches, &*onlooker))
        .context("cannot start a thread to read --input")?;
    Ok(receiver)
}

fn run(mut directory: Directory, batches: &mpsc::Sender<Batch>, onlooker: &dyn Onlooker) {
    let (changes, changed) = std_mpsc::channel();
    let mut watch = Watch::new(directory.watched().to_owned(), changes);
    let mut known_problems = None;
    loop {
        // Before reading: what changes while the files are read is noticed after it.
        let unwatched = watch.renew();
        let mut batch = directory.read();
        if known_problems.is_none() && directory.is_empty() {
            // A directory that was mounted at the wrong place looks like this, and nothing else would be said about it.
            tracing::info!(
                "no *.yaml, *.yml or *.json in {}: nothing to do until there is",
                directory.watched().display()
            );
        }
        let pause = if watch.is_active() { REREAD } else { REREAD_UNWATCHED };
        batch.problems.get_or_insert_default().extend(unwatched);
        if !batch.events.is_empty() || known_problems != batch.problems {
            known_problems.clone_from(&batch.problems);
            onlooker.heard(FILES);
            if batches.blocking_send(batch).is_err() {
                return;
            }
        }
        // A file that cannot be read is a problem of that file; the directory is always in sight.
        onlooker.connected(FILES);
        if wait(&changed, pause, batches, onlooker).is_err() {
            return;
        }
    }
}

/// The receiver has gone.
struct Closed;

/// Returns after a change and the quiet that follows it, or after `pause`.
fn wait(
    changed: &std_mpsc::Receiver<()>,
    pause: Duration,
    batches: &mpsc::Sender<Batch>,
    onlooker: &dyn Onlooker,
) -> Result<(), Closed> {
    let until = Instant::now() + pause;
    loop {
        onlooker.turned();
        if batches.is_closed() {
            return Err(Closed);
        }
        let rest = until.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Ok(());
        }
        // In small steps, to notice within one that nobody listens any more.
        if changed.recv_timeout(rest.min(MAX_DELAY)).is_ok() {
            break;
        }
    }
    let latest = Instant::now() + MAX_DELAY;
    while Instant::now() < latest && changed.recv_timeout(QUIET).is_ok() {}
    Ok(())
}

/// Watches one directory, whatever directory has that name at the time.
struct Watch {
    path: PathBuf,
    changes: std_mpsc::Sender<()>,
    watcher: Option<(RecommendedWatcher, DirectoryId)>,
}

/// Device and inode: a directory that was removed and made again, or a link that points elsewhere now, is another.
type DirectoryId = (u64, u64);

impl Watch {
    const fn new(path: PathBuf, changes: std_mpsc::Sender<()>) -> Self {
        Self { path, changes, watcher: None }
    }

    /// Makes sure that the directory that has the name now is watched; if it cannot be, tells why.
    fn renew(&mut self) -> Option<Problem> {
        let Ok(id) = directory_id(&self.path) else {
            // Whoever reads it reports that.
            self.watcher = None;
            return None;
        };
        if self.watcher.as_ref().is_some_and(|(_, watched)| *watched == id) {
            return None;
        }
        // Before the new one: it has the same name, and instances of inotify are few.
        self.watcher = None;
        match self.start() {
            Ok(watcher) => {
                self.watcher = Some((watcher, id));
                None
            }
            Err(error) => Some(
                Problem::new(
                    Severity::Warning,
                    Subject::File(self.path.clone()),
                    format!(
                        "cannot be watched: {error}: read every {} s instead",
                        REREAD_UNWATCHED.as_secs()
                    ),
                    "raise the sysctls fs.inotify.max_user_instances and fs.inotify.max_user_watches",
                )
                .of_kind(ProblemKind::Unreadable),
            ),
        }
    }

    /// Whether changes will be noticed. They are not while the directory does not exist: nothing tells when it is back.
    const fn is_active(&self) -> bool {
        self.watcher.is_some()
    }

    fn start(&self) -> notify::Result<RecommendedWatcher> {
        let changes = self.changes.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may mean that events were lost, so it counts as a change.
            if event.map_or(true, |event| is_change(event.kind)) {
                let _ = changes.send(());
            }
        })?;
        watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Reading the files, as this module does, is none.
const fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => matches!(access, AccessKind::Close(AccessMode::Write)),
        _ => true,
    }
}

fn directory_id(path: &Path) -> io::Result<DirectoryId> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::testing::Nobody;

    #[test]
    fn reading_a_file_is_no_change_and_writing_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, "a").unwrap();
        let (changes, changed) = std_mpsc::channel();
        let mut watch = Watch::new(dir.path().to_owned(), changes);
        assert_eq!(watch.renew(), None);
        fs::read(&file).unwrap();
        fs::read_dir(dir.path()).unwrap();
        // The change that must come tells that whatever came before it has come.
        fs::write(dir.path().join("b.yaml"), "b").unwrap();
        changed.recv().unwrap();
        let events_of_reading_alone = |kind| !is_change(kind);
        assert!(events_of_reading_alone(EventKind::Access(AccessKind::Read)));
        assert!(events_of_reading_alone(EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(events_of_reading_alone(EventKind::Access(AccessKind::Close(AccessMode::Read))));
    }

    #[test]
    fn a_directory_made_again_is_watched_again() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("manifests");
        fs::create_dir(&path).unwrap();
        let (changes, changed) = std_mpsc::channel();
        let mut watch = Watch::new(path.clone(), changes);
        assert_eq!(watch.renew(), None);
        // Kept, so that the new one cannot get its inode.
        fs::rename(&path, parent.path().join("old")).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(watch.renew(), None);
        while changed.try_recv().is_ok() {}
        fs::write(path.join("a.yaml"), "a").unwrap();
        changed.recv().unwrap();
    }

    #[test]
    fn a_directory_that_is_away_is_not_watched_until_it_is_back() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("manifests");
        fs::create_dir(&path).unwrap();
        let (changes, _changed) = std_mpsc::channel();
        let mut watch = Watch::new(path.clone(), changes);
        for (there, active) in [(true, true), (false, false), (true, true)] {
            if there {
                fs::create_dir_all(&path).unwrap();
            } else {
                fs::remove_dir(&path).unwrap();
            }
            assert_eq!(watch.renew(), None);
            assert_eq!(watch.is_active(), active);
        }
    }

    #[tokio::test]
    async fn the_first_batch_comes_even_if_there_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path().to_owned(), None).unwrap();
        let mut batches = spawn(directory, Arc::new(Nobody)).unwrap();
        let first = Batch { problems: Some(Vec::new()), ..Batch::default() };
        assert_eq!(batches.recv().await, Some(first));
    }
}
