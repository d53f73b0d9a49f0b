//! Somebody else's words, and errors of libraries, as they can be put into a line of the log. Not for what they mean, nor what to do
//! about it: that is `failure`'s business, each source's own.

use std::{error::Error, io, iter};

/// More of an answer than this nobody reads.
pub(super) const MAX_WORDS: usize = 300;

/// Somebody else's words within a line of the log: what stands between may answer with a page.
pub(super) fn quote(words: &str) -> String {
    let words = words.trim();
    if words.starts_with('<') {
        return "a web page".to_owned();
    }
    let printable = |c: char| if c.is_whitespace() || c.is_control() { ' ' } else { c };
    let line: String = words.chars().take(MAX_WORDS).map(printable).collect();
    let line = line.trim_end_matches(['.', ' ']);
    if words.chars().nth(MAX_WORDS).is_some() { format!("{line}...") } else { line.to_owned() }
}

/// An error and its causes, each once: some of them repeat what is below.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error) {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
    }
    quote(text.lines().next().unwrap_or_default())
}

/// An error and what is below it, outermost first.
pub(super) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |&error: &&'a (dyn Error + 'static)| {
        // One that wraps another names as its source what is below the other.
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        }
    })
}
