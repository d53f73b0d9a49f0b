//! Labels, annotations and selectors: a few pairs of strings, in as little memory as they can have. Every Service has
//! three such sets, and a map's first entry costs as much as eleven.

use std::{fmt, ops::Index};

/// Strings by name, sorted. Made once and never changed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    /// The value of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let index = self.0.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        Some(&self.0[index].1)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Panics if there is no such name, as maps do.
impl Index<&str> for Labels {
    type Output = str;

    fn index(&self, name: &str) -> &str {
        match self.get(name) {
            Some(value) => value,
            None => panic!("there is no {name:?}"),
        }
    }
}

impl<N: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(N, V)> for Labels {
    /// Of several values of one name the last counts.
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let mut pairs: Vec<(Box<str>, Box<str>)> =
            pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        // The sort is stable: among equal names, the later one is the one to keep.
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        Self(pairs.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_name_and_the_last_of_a_name_counts() {
        let labels: Labels =
            [("b", "1"), ("a", "2"), ("c", "3"), ("a", "4"), ("a", "5")].into_iter().collect();
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("a", "5"), ("b", "1"), ("c", "3")]);
        assert_eq!((labels.get("a"), labels.get("bb"), &labels["c"]), (Some("5"), None, "3"));
        assert_eq!(Labels::default().get("a"), None);
    }
}
