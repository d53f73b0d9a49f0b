//! What a test has to say when it passes: how much it compared, which cells of a matrix it covered. libtest keeps the
//! output of a test that passes to itself, so lines go to files of a directory that `cargo xtask test` names, and it
//! prints them with its results.

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// The variable with the directory's name.
pub const DIRECTORY: &str = "PROXIER_REPORTS";

/// Adds a line about `subject`, shown as `subject: text`. Without the variable it is printed, which `--nocapture` shows.
///
/// # Errors
///
/// The directory cannot be written to, or `subject` is no plain word.
pub fn line(subject: &str, text: &str) -> anyhow::Result<()> {
    println!("{subject}: {text}");
    match env::var_os(DIRECTORY) {
        Some(directory) => append(Path::new(&directory), subject, text),
        None => Ok(()),
    }
}

/// All lines in `directory`, those about one subject together and in the order in which they came.
///
/// # Errors
///
/// It cannot be read.
pub fn lines(directory: &Path) -> anyhow::Result<Vec<String>> {
    let context = || format!("cannot read the reports in {}", directory.display());
    let entries = fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut files: Vec<PathBuf> =
        entries.with_context(context)?.into_iter().map(|file| file.path()).collect();
    files.sort();
    let mut lines = Vec::new();
    for file in files {
        let subject = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).with_context(context)?;
        lines.extend(text.lines().map(|line| format!("{subject}: {line}")));
    }
    Ok(lines)
}

fn append(directory: &Path, subject: &str, text: &str) -> anyhow::Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    ensure!(!subject.is_empty() && subject.bytes().all(plain), "no subject for a report: {subject:?}");
    let path = directory.join(subject);
    let context = || format!("cannot write the report {}", path.display());
    let mut file = File::options().create(true).append(true).open(&path).with_context(context)?;
    // One write, so that lines of tests that run at the same time do not mix.
    file.write_all(format!("{text}\n").as_bytes()).with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_by_subject_and_in_order() {
        let directory = tempfile::tempdir().unwrap();
        for (subject, text) in [("matrix", "one"), ("oracle", "three"), ("matrix", "two")] {
            append(directory.path(), subject, text).unwrap();
        }
        assert_eq!(lines(directory.path()).unwrap(), ["matrix: one", "matrix: two", "oracle: three"]);
    }

    #[test]
    fn a_subject_is_no_path() {
        let directory = tempfile::tempdir().unwrap();
        for subject in ["", "..", "a/b", "a b"] {
            append(directory.path(), subject, "text").unwrap_err();
        }
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error = format!("{:#}", lines(Path::new("/nonexistent/reports")).unwrap_err());
        assert!(error.contains("/nonexistent/reports"), "{error}");
    }
}
