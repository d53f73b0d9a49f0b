//! What commands print: read without a limit, so that none hangs on a full pipe, and kept up to one. And passed on to the agent's
//! own standard output by a thread of its own: whoever reads that, or does not, holds up no run.

use std::{
    collections::VecDeque,
    io::{self, Write},
    mem,
    sync::mpsc::{SyncSender, TrySendError, sync_channel},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::oneshot,
};

/// Outputs of runs that wait to be written.
const WAITING: usize = 16;
/// How long the agent's end waits for somebody to read what was printed last.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Of the standard error, so many lines go into a message.
const LINES: usize = 8;

/// Reads `pipe` to its end, giving every piece to `keep`.
async fn read(pipe: Option<impl AsyncRead + Unpin>, mut keep: impl FnMut(&[u8])) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = vec![0; 8192];
    // A pipe has no errors that say more than its end.
    while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
        keep(&buffer[..read]);
    }
}

/// The beginning of an output.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// At most the limit.
    pub(super) bytes: Vec<u8>,
    /// Whether there was more.
    pub(super) is_cut: bool,
}

impl Head {
    pub(super) async fn read(&mut self, pipe: Option<impl AsyncRead + Unpin>, limit: usize) {
        read(pipe, |piece| {
            let room = limit - self.bytes.len();
            self.is_cut |= piece.len() > room;
            self.bytes.extend(&piece[..piece.len().min(room)]);
        })
        .await;
    }
}

/// The end of an output.
#[derive(Debug, Default)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    is_cut: bool,
}

impl Tail {
    pub(super) async fn read(&mut self, pipe: Option<impl AsyncRead + Unpin>, limit: usize) {
        read(pipe, |piece| {
            self.bytes.extend(piece);
            let excess = self.bytes.len().saturating_sub(limit);
            self.is_cut |= excess > 0;
            self.bytes.drain(..excess);
        })
        .await;
    }

    /// Its last lines as one, for a message.
    pub(super) fn last_lines(mut self) -> String {
        let text = String::from_utf8_lossy(self.bytes.make_contiguous());
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let first = lines.len().saturating_sub(LINES);
        let shown = lines[first..].join(" | ");
        // What sounds a terminal's bell, or clears it, has no place in a log.
        let shown = shown.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect::<String>();
        if self.is_cut || first > 0 { format!("... | {shown}") } else { shown }
    }
}

/// The agent's standard output.
#[derive(Debug)]
pub(super) struct Output {
    pieces: SyncSender<Vec<u8>>,
    written: oneshot::Receiver<()>,
    is_full: bool,
}

impl Output {
    pub(super) fn new(mut out: Box<dyn Write + Send>) -> Self {
        let (pieces, received) = sync_channel::<Vec<u8>>(WAITING);
        let (done, written) = oneshot::channel();
        thread::spawn(move || {
            let mut is_gone = false;
            for piece in received {
                if let Err(error) = out.write_all(&piece).and_then(|()| out.flush())
                    && !mem::replace(&mut is_gone, true)
                {
                    report_gone(&error);
                }
            }
            // Nobody waits for it unless the agent ends.
            let _ = done.send(());
        });
        Self { pieces, written, is_full: false }
    }

    /// Will write `piece`, and the end of its last line if it has none.
    pub(super) fn pass(&mut self, mut piece: Vec<u8>) {
        match piece.last() {
            None => return,
            Some(b'\n') => {}
            Some(_) => piece.push(b'\n'),
        }
        match self.pieces.try_send(piece) {
            Ok(()) => self.is_full = false,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                if !mem::replace(&mut self.is_full, true) {
                    tracing::warn!(
                        "nobody reads this agent's standard output: what the command prints is lost until somebody does; runs \
                         go on"
                    );
                }
            }
        }
    }

    /// Waits until all is written, but not for long.
    pub(super) async fn close(self) {
        drop(self.pieces);
        let _ = tokio::time::timeout(LAST_WORDS, self.written).await;
    }
}

fn report_gone(error: &io::Error) {
    tracing::warn!(
        "cannot write to this agent's standard output: {error}; what the command prints is lost from now on, runs go on"
    );
}
