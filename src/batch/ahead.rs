//! Prefetching: worker threads prepare items, the consumer receives them in order.
//!
//! An item depends only on its index, so the number of workers does not change results. The number
//! of items in preparation is bounded, and so is their memory.

use crate::threads;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Items per worker that are started and not yet consumed: one in progress and one ready.
const AHEAD: usize = 2;

/// Calls `consume` with the items `make(i)` for `i` of `range`, in order. `workers` threads (at
/// least 1) prepare them ahead. When `consume` returns, items that are not started are dropped.
///
/// # Panics
/// Passes on panics of `make` and `consume`.
pub fn ahead<T: Send, R>(
    range: Range<usize>,
    workers: usize,
    make: impl Fn(usize) -> T + Sync,
    consume: impl FnOnce(&mut Made<'_, T>) -> R,
) -> R {
    let workers = workers.clamp(1, range.len().max(1));
    let line = Line {
        end: range.end,
        limit: AHEAD * workers,
        state: Mutex::new(State {
            begun: range.start,
            taken: range.start,
            made: BTreeMap::new(),
            closed: false,
        }),
        room: Condvar::new(),
        ready: Condvar::new(),
    };
    thread::scope(|scope| {
        // If the system refuses some of the threads, the others do the work; without any, the
        // consumer does it.
        let start = || threads::start(scope, || line.work(&make)).is_ok();
        let started = (0..workers).take_while(|_| start()).count();
        let inline: Option<&dyn Fn(usize) -> T> = if started == 0 { Some(&make) } else { None };
        consume(&mut Made { line: &line, inline, waited: Duration::ZERO })
    })
}

/// The items, in order. Dropping it stops the workers.
pub struct Made<'a, T> {
    line: &'a Line<T>,
    /// Makes an item on request, if no worker could be started.
    inline: Option<&'a dyn Fn(usize) -> T>,
    waited: Duration,
}

impl<T> Made<'_, T> {
    /// Time that the consumer has waited for items.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The next item if it is ready. Does not wait; `None` does not mean the end of the range.
    pub fn next_if_ready(&mut self) -> Option<T> {
        self.line.take(&mut self.line.lock())
    }
}

impl<T> Iterator for Made<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let asked = Instant::now();
        let mut state = self.line.lock();
        if let Some(make) = self.inline {
            let index = state.taken;
            if index >= self.line.end {
                return None;
            }
            state.taken += 1;
            drop(state);
            let item = make(index);
            self.waited += asked.elapsed();
            return Some(item);
        }
        let item = loop {
            if let Some(item) = self.line.take(&mut state) {
                break Some(item);
            }
            if state.taken >= self.line.end || state.closed {
                break None;
            }
            state = wait(&self.line.ready, state);
        };
        self.waited += asked.elapsed();
        item
    }
}

impl<T> Drop for Made<'_, T> {
    fn drop(&mut self) {
        self.line.close();
    }
}

/// State shared by the threads.
struct Line<T> {
    end: usize,
    limit: usize,
    state: Mutex<State<T>>,
    /// Signals that an item was consumed or the queue closed.
    room: Condvar,
    /// Signals that an item is ready or the queue closed.
    ready: Condvar,
}

struct State<T> {
    /// Index of the next item to start.
    begun: usize,
    /// Index of the next item to consume.
    taken: usize,
    made: BTreeMap<usize, T>,
    closed: bool,
}

impl<T> Line<T> {
    /// The loop of a worker: starts items while the bound permits, until the range ends or the
    /// queue closes.
    fn work(&self, make: impl Fn(usize) -> T) {
        // A panic of a worker closes the queue, so the consumer does not wait for its item.
        let _alarm = Alarm(self);
        loop {
            let mut state = self.lock();
            while !state.closed && state.begun < self.end && state.begun - state.taken >= self.limit {
                state = wait(&self.room, state);
            }
            if state.closed || state.begun >= self.end {
                return;
            }
            let index = state.begun;
            state.begun += 1;
            drop(state);
            let item = make(index);
            self.lock().made.insert(index, item);
            self.ready.notify_one();
        }
    }

    /// The next item, if it is ready.
    fn take(&self, state: &mut State<T>) -> Option<T> {
        let item = state.made.remove(&state.taken)?;
        state.taken += 1;
        self.room.notify_one();
        Some(item)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.room.notify_all();
        self.ready.notify_all();
    }

    /// Every change of the state is complete, so a panic leaves it valid.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

struct Alarm<'a, T>(&'a Line<T>);

impl<T> Drop for Alarm<'_, T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Delays items of even index, so that workers overtake each other.
    fn unevenly(index: usize) -> usize {
        if index.is_multiple_of(2) {
            thread::sleep(Duration::from_micros(300));
        }
        index
    }

    #[test]
    fn each_item_arrives_once_and_in_order() {
        for workers in [0, 1, 2, 3, 8] {
            for range in [0..0, 0..1, 3..40] {
                let found = ahead(range.clone(), workers, unevenly, |made| made.collect::<Vec<_>>());
                assert_eq!(found, range.collect::<Vec<_>>(), "{workers} workers");
            }
        }
    }

    #[test]
    fn the_number_of_items_in_preparation_is_bounded() {
        for workers in [1, 3] {
            let begun = AtomicUsize::new(0);
            let make = |index: usize| {
                begun.fetch_add(1, Ordering::SeqCst);
                index
            };
            ahead(0..100, workers, make, |made| {
                for taken in 1..=20 {
                    made.next();
                    thread::sleep(Duration::from_millis(2));
                    let ahead = begun.load(Ordering::SeqCst) - taken;
                    assert!(ahead <= AHEAD * workers, "{ahead} ahead with {workers} workers");
                }
            });
            // Without a consumer the rest is not started.
            assert!(begun.load(Ordering::SeqCst) <= 20 + AHEAD * workers);
        }
    }

    #[test]
    fn workers_fill_the_queue_of_an_idle_consumer() {
        let begun = AtomicUsize::new(0);
        let make = |_| begun.fetch_add(1, Ordering::SeqCst);
        ahead(0..100, 3, make, |_| {
            let start = Instant::now();
            while begun.load(Ordering::SeqCst) < 3 * AHEAD {
                assert!(start.elapsed() < Duration::from_secs(60), "workers should start without a request");
                thread::yield_now();
            }
        });
    }

    #[test]
    fn a_ready_item_arrives_without_waiting_but_not_out_of_order() {
        let (first, rest) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let make = |index: usize| {
            while index == 0 && first.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            rest.fetch_add(usize::from(index > 0), Ordering::SeqCst);
            index
        };
        ahead(0..3, 2, make, |items| {
            // Later items are ready, but out of order.
            while rest.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            assert_eq!(items.next_if_ready(), None);
            first.store(1, Ordering::SeqCst);
            assert_eq!(items.next(), Some(0));
            let waited = items.waited();
            let taken: Vec<_> = std::iter::repeat_with(|| items.next_if_ready()).flatten().take(2).collect();
            assert_eq!(taken, [1, 2]);
            assert_eq!((items.next_if_ready(), items.next(), items.waited() >= waited), (None, None, true));
        });
    }

    #[test]
    fn only_waiting_time_is_counted() {
        let made = AtomicUsize::new(0);
        let slow = |index| {
            thread::sleep(Duration::from_millis(50));
            made.fetch_add(1, Ordering::SeqCst);
            index
        };
        let at_once = ahead(0..5, 1, slow, |items| {
            items.by_ref().for_each(drop);
            items.waited()
        });
        assert!(at_once >= Duration::from_millis(5 * 50), "{at_once:?}");

        made.store(0, Ordering::SeqCst);
        let when_ready = ahead(0..5, 1, slow, |items| {
            for taken in 0..5 {
                while made.load(Ordering::SeqCst) <= taken {
                    thread::sleep(Duration::from_millis(1));
                }
                items.next();
            }
            items.waited()
        });
        assert!(when_ready < at_once / 2, "{when_ready:?} and {at_once:?}");
    }

    #[test]
    fn a_panic_of_a_worker_reaches_the_consumer() {
        for workers in [1, 3] {
            let make = |index: usize| if index == 4 { panic!("item {index}") } else { index };
            let mut taken = 0;
            let result = catch_unwind(AssertUnwindSafe(|| {
                ahead(0..100, workers, make, |made| made.for_each(|_| taken += 1));
            }));
            assert!(result.is_err() && taken <= 4, "{taken} taken");
        }
    }

    #[test]
    fn a_panic_of_the_consumer_stops_the_workers() {
        let result = catch_unwind(|| {
            ahead(
                0..usize::MAX,
                2,
                |index| index,
                |made| {
                    made.next();
                    panic!("enough");
                },
            )
        });
        assert!(result.is_err());
    }
}
