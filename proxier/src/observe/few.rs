//! Lists in the text that people read, which must not become as long as what they are of.

use std::fmt::{Display, Write as _};

/// The first so many of `items`, and how many more there are.
pub(crate) fn first_of<T: Display>(
    items: impl IntoIterator<Item = T>,
    most: usize,
    separator: &str,
) -> String {
    let mut items = items.into_iter();
    let mut text = String::new();
    for (index, item) in items.by_ref().take(most).enumerate() {
        let separator = if index == 0 { "" } else { separator };
        // Into a string nothing fails.
        let _ = write!(text, "{separator}{item}");
    }
    match items.count() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_line_names_a_few() {
        let pods: Vec<IpAddr> = (1..=7).map(|last| IpAddr::from([11, 0, 0, last])).collect();
        assert_eq!(first_of(&pods[..0], 5, ", "), "");
        assert_eq!(first_of(&pods[..2], 5, ", "), "11.0.0.1, 11.0.0.2");
        assert_eq!(first_of(&pods[..5], 5, ", "), "11.0.0.1, 11.0.0.2, 11.0.0.3, 11.0.0.4, 11.0.0.5");
        assert!(first_of(&pods, 5, ",").ends_with(",11.0.0.5 and 2 more"));
    }
}
