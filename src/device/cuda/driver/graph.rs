//! Work as a CUDA graph: a sequence of launches is recorded, and started in one piece.
//!
//! Batches are packed, so hardly two have the same sizes and addresses, but the same kernels follow each other. What is kept is
//! therefore not a sequence with its arguments but the executable that was made of it: the next sequence of the same nodes is
//! written over that.
//!
//! Recording changes nothing on the device. Work that cannot be recorded is simply done again, plainly.

use crate::device::cuda::kernel::Kernel;

/// A request as a graph holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// A launch.
    Kernel(Kernel),
    /// Matrix products of one shape.
    Product,
    /// Memory filled with zeros.
    Zero,
}

/// What was used last, by key: a few, the latest first.
pub(crate) struct Recent<K, V> {
    entries: Vec<(K, V)>,
}

impl<K: PartialEq, V> Recent<K, V> {
    /// How many are kept. A run meets few sequences of nodes: they differ where a batch has no token of a label, or a
    /// segment is short.
    const KEPT: usize = 16;

    /// Takes one out.
    pub fn take(&mut self, key: &K) -> Option<V> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Takes the oldest out, where there is no place for one more.
    pub fn make_room(&mut self) -> Option<V> {
        if self.entries.len() < Self::KEPT { None } else { self.entries.pop().map(|(_, value)| value) }
    }

    /// Makes one the latest.
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
    fn the_latest_are_kept() {
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
