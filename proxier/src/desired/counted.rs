//! What is there at least once, of things that many objects name: endpoints' addresses, their nodes. Pure.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
};

/// A multiset.
#[derive(Debug)]
pub(super) struct Counted<K>(HashMap<K, u32>);

impl<K> Default for Counted<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Clone + Eq + Hash> Counted<K> {
    /// Puts `after` in place of `before`, which was there, and returns what is new or has gone.
    pub(super) fn replace(
        &mut self,
        before: impl IntoIterator<Item = K>,
        after: impl IntoIterator<Item = K>,
    ) -> Vec<K> {
        let mut changed = Vec::new();
        // In this order: what stays must not go in between.
        for key in after {
            match self.0.entry(key) {
                Entry::Occupied(mut entry) => *entry.get_mut() += 1,
                Entry::Vacant(entry) => {
                    changed.push(entry.key().clone());
                    entry.insert(1);
                }
            }
        }
        for key in before {
            let Entry::Occupied(mut entry) = self.0.entry(key) else { continue };
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                changed.push(entry.remove_entry().0);
            }
        }
        changed
    }

    pub(super) fn contains(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    /// In no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &K> {
        self.0.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_first_and_goes_last_is_a_change() {
        let mut counted = Counted::default();
        assert_eq!(counted.replace([], [1, 1, 2]), [1, 2]);
        assert_eq!(counted.replace([], [2]), [0; 0]);
        assert_eq!(counted.replace([1, 2], [2, 3]), [3]);
        assert_eq!(counted.replace([1, 2], []), [1]);
        assert_eq!(counted.replace([2], []), [2]);
        assert_eq!(counted.replace([3], [3]), [0; 0]);
        assert_eq!(counted.iter().collect::<Vec<_>>(), [&3]);
    }
}
