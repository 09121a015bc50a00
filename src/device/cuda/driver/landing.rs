//! Landing memory: the destination of copies that run ahead of the compute stream.
//!
//! The pool reuses memory immediately after it is freed, because the next use is later on the same
//! stream. A copy on another stream may run earlier. Freed landing memory is therefore not reused
//! until the host has waited for work enqueued behind the free: then no kernel reads it and no copy
//! to it is in flight. This needs no CUDA event and no extra wait, because the host waits for the
//! losses of each step.

use crate::device::cuda::kernel::Pointer;
use std::collections::{BTreeMap, VecDeque};

/// Freed landing memory: idle, or resting until the host has waited for its last use.
#[derive(Debug, Default)]
pub struct Landing {
    idle: BTreeMap<usize, Vec<Pointer>>,
    /// Sequence number of the free, address, size in bytes.
    resting: VecDeque<(u64, Pointer, usize)>,
    given: u64,
}

/// A position in the sequence of frees.
#[derive(Clone, Copy, Debug)]
pub struct Given(u64);

impl Landing {
    /// Allocation size for `bytes` bytes: a power of two, because allocations are few and sizes
    /// vary.
    pub fn size(bytes: usize) -> usize {
        bytes.max(256).next_power_of_two()
    }

    /// Takes idle memory of this [`Landing::size`].
    pub fn take(&mut self, size: usize) -> Option<Pointer> {
        self.idle.get_mut(&size)?.pop()
    }

    /// Frees memory that work in flight may still use.
    pub fn give_back(&mut self, at: Pointer, size: usize) {
        self.resting.push_back((self.given, at, size));
        self.given += 1;
    }

    /// The current position. Call it before the work that the host waits for is enqueued.
    pub fn now(&self) -> Given {
        Given(self.given)
    }

    /// Declares work before `moment` finished: memory freed before it becomes idle.
    pub fn settle(&mut self, moment: Given) {
        let settled = self.resting.partition_point(|&(given, ..)| given < moment.0);
        for (_, at, size) in self.resting.drain(..settled) {
            self.idle.entry(size).or_default().push(at);
        }
    }

    /// Number of resting allocations.
    pub fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Takes all idle memory, with its sizes.
    pub fn take_idle(&mut self) -> impl Iterator<Item = (Pointer, usize)> + use<> {
        let idle = std::mem::take(&mut self.idle);
        idle.into_iter().flat_map(|(size, list)| list.into_iter().map(move |at| (at, size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_is_not_reused_before_the_host_synchronises() {
        let mut landing = Landing::default();
        landing.give_back(1, 256);
        assert_eq!((landing.take(256), landing.resting()), (None, 1));
        // Two threads synchronise; meanwhile a third frees memory that neither has waited for.
        let (first, second) = (landing.now(), landing.now());
        landing.give_back(2, 256);
        landing.settle(first);
        landing.settle(second);
        assert_eq!((landing.take(512), landing.take(256), landing.take(256)), (None, Some(1), None));
        landing.settle(landing.now());
        landing.give_back(3, 512);
        assert_eq!(landing.take_idle().collect::<Vec<_>>(), [(2, 256)]);
        assert_eq!((landing.take(256), landing.resting()), (None, 1));
    }

    /// As in training: the next batch is sent while the steps in flight may still read their own,
    /// already freed batches.
    #[test]
    fn two_steps_in_flight_take_turns_with_three_allocations() {
        let mut landing = Landing::default();
        let mut made = 0;
        let mut send = |landing: &mut Landing| {
            landing.take(256).unwrap_or_else(|| {
                made += 1;
                made
            })
        };
        let mut batch = send(&mut landing);
        let mut in_flight = VecDeque::new();
        let order: Vec<_> = (0..7)
            .map(|_| {
                landing.give_back(batch, 256);
                in_flight.push_back(landing.now());
                let used = std::mem::replace(&mut batch, send(&mut landing));
                if in_flight.len() == 2 {
                    landing.settle(in_flight.pop_front().expect("two steps"));
                }
                used
            })
            .collect();
        assert_eq!(order, [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn sizes_are_powers_of_two() {
        assert_eq!([1, 256, 257, 4096, 2_400_000].map(Landing::size), [256, 256, 512, 4096, 1 << 22]);
    }
}
