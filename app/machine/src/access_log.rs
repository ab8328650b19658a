//! Counts accesses to what is not there and says which of them deserve a line in the log.
//!
//! The memory is bounded, because a guest chooses the keys: past [`CAPACITY`] different keys only
//! the total grows.

use alloc::vec::Vec;

/// How many different keys are remembered.
pub const CAPACITY: usize = 64;

/// Whether an access was seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sighting {
    /// The first one of its key: log it.
    First,
    /// Seen before, or too many different keys: stay silent.
    Repeated,
}

/// A counter per key, for the first [`CAPACITY`] keys, and a total.
#[derive(Clone, Debug)]
pub struct AccessLog<K> {
    counts: Vec<(K, u64)>,
    total: u64,
}

impl<K: Copy + PartialEq> AccessLog<K> {
    pub(crate) fn new() -> Self {
        Self {
            counts: Vec::with_capacity(CAPACITY),
            total: 0,
        }
    }

    pub(crate) fn record(&mut self, key: K) -> Sighting {
        self.total = self.total.saturating_add(1);
        if let Some((_, count)) = self.counts.iter_mut().find(|(known, _)| *known == key) {
            *count = count.saturating_add(1);
            return Sighting::Repeated;
        }
        if self.counts.len() == CAPACITY {
            return Sighting::Repeated;
        }
        self.counts.push((key, 1));
        Sighting::First
    }

    /// All accesses, also those of keys that are not remembered.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// The remembered keys in the order of their first access, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (K, u64)> + '_ {
        self.counts.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_new_once() {
        let mut log = AccessLog::new();
        assert_eq!(log.record(7), Sighting::First);
        assert_eq!(log.record(7), Sighting::Repeated);
        assert_eq!(log.record(8), Sighting::First);
        assert!(log.iter().eq([(7, 2), (8, 1)]));
    }

    #[test]
    fn memory_is_bounded_and_the_total_is_not_lost() {
        let mut log = AccessLog::new();
        for key in 0..1000 {
            log.record(key);
        }
        assert_eq!(log.iter().count(), CAPACITY);
        assert_eq!(log.total(), 1000);
    }
}
