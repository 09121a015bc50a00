//! The graph executable cache.
//!
//! Packed batches rarely repeat sizes and addresses, but their kernel sequences repeat. The cache
//! keeps a graph executable for each node sequence. The next recording of the same sequence updates
//! the arguments of the executable.

use crate::device::cuda::kernel::Kernel;

/// A recorded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// A kernel launch.
    Kernel(Kernel),
    /// Matrix products of one shape.
    Product,
    /// A fill with zeros.
    Zero,
}

/// A small cache, ordered by last use.
pub(crate) struct Recent<K, V> {
    entries: Vec<(K, V)>,
}

impl<K: PartialEq, V> Recent<K, V> {
    /// Capacity. A run has few node sequences: they vary only if a batch lacks a label or a segment
    /// is short.
    const KEPT: usize = 16;

    /// Removes an entry.
    pub fn take(&mut self, key: &K) -> Option<V> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Removes the least recently used entry if the cache is full.
    pub fn make_room(&mut self) -> Option<V> {
        if self.entries.len() < Self::KEPT { None } else { self.entries.pop().map(|(_, value)| value) }
    }

    /// Inserts an entry as the most recently used.
    pub fn put(&mut self, key: K, value: V) {
        self.entries.insert(0, (key, value));
    }
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_is_evicted() {
        let mut recent = Recent::default();
        for key in 0..16 {
            assert_eq!(recent.make_room(), None);
            recent.put(key, key);
        }
        let first = recent.take(&0).expect("it is among the latest");
        assert_eq!((recent.take(&0), recent.make_room()), (None, None));
        recent.put(0, first);
        assert_eq!(recent.make_room(), Some(1));
        recent.put(16, 16);
        assert_eq!((recent.take(&1), recent.take(&0)), (None, Some(0)));
    }
}
