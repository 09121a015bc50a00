//! Device memory that copies from the host go to while the device is at work.
//!
//! The pool gives memory to its next owner as soon as it is given back, since whatever the next one does comes later on the
//! same stream. A copy on a stream of its own may come earlier: it waits for nothing. So memory that was given back rests here
//! until the host has waited for the device, and only then is there no kernel left that may read it, and no copy on its way to
//! it. That costs no event and no waiting: a step waits for its losses anyway.

use crate::device::cuda::kernel::Pointer;
use std::collections::{BTreeMap, VecDeque};

/// Memory to be used again, by size: given back lately, or idle.
#[derive(Debug, Default)]
pub struct Landing {
    idle: BTreeMap<usize, Vec<Pointer>>,
    /// By the number of times that memory was given back before it.
    resting: VecDeque<(u64, Pointer, usize)>,
    given: u64,
}

/// A moment between two times that memory was given back.
#[derive(Clone, Copy, Debug)]
pub struct Given(u64);

impl Landing {
    /// Bytes to ask for where `bytes` are needed. Powers of two, as there are few pieces, and batches of a run differ in size.
    pub fn size(bytes: usize) -> usize {
        bytes.max(256).next_power_of_two()
    }

    /// Idle memory of this [`Landing::size`], which nobody else gets until it is given back.
    pub fn take(&mut self, size: usize) -> Option<Pointer> {
        self.idle.get_mut(&size)?.pop()
    }

    /// Takes memory back that work under way may use, but none that is asked for later.
    pub fn give_back(&mut self, at: Pointer, size: usize) {
        self.resting.push_back((self.given, at, size));
        self.given += 1;
    }

    /// Now. To be called before the host waits for the device.
    pub fn now(&self) -> Given {
        Given(self.given)
    }

    /// All that was asked for before `moment` is done: what was given back by then is idle.
    pub fn settle(&mut self, moment: Given) {
        let settled = self.resting.partition_point(|&(given, ..)| given < moment.0);
        for (_, at, size) in self.resting.drain(..settled) {
            self.idle.entry(size).or_default().push(at);
        }
    }

    /// Pieces that rest.
    pub fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Takes all that is idle, with its sizes.
    pub fn take_idle(&mut self) -> impl Iterator<Item = (Pointer, usize)> + use<> {
        let idle = std::mem::take(&mut self.idle);
        idle.into_iter().flat_map(|(size, list)| list.into_iter().map(move |at| (at, size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_rests_until_the_host_has_waited_for_what_used_it() {
        let mut landing = Landing::default();
        landing.give_back(1, 256);
        assert_eq!((landing.take(256), landing.resting()), (None, 1));
        // Two threads wait at once; meanwhile a third gives memory back, which neither has waited for.
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

    /// As training goes: the next batch is sent when a step was asked for, whose batch was given back but may still be read.
    #[test]
    fn steps_use_two_pieces_in_turn() {
        let mut landing = Landing::default();
        let mut made = 0;
        let mut send = |landing: &mut Landing| {
            landing.take(256).unwrap_or_else(|| {
                made += 1;
                made
            })
        };
        let mut batch = send(&mut landing);
        let order: Vec<_> = (0..6)
            .map(|_| {
                landing.give_back(batch, 256);
                let losses = landing.now();
                let used = std::mem::replace(&mut batch, send(&mut landing));
                landing.settle(losses);
                used
            })
            .collect();
        assert_eq!(order, [1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn sizes_are_powers_of_two() {
        assert_eq!([1, 256, 257, 4096, 2_400_000].map(Landing::size), [256, 256, 512, 4096, 1 << 22]);
    }
}
