//! The right to enqueue work, which one thread has at a time: a lock that its holder may take again.

use crate::device::cuda::runtime::lock;
use std::sync::{Condvar, Mutex};
use std::thread::{self, ThreadId};

/// A lock that the thread that holds it may take again.
#[derive(Default)]
pub(super) struct Turn {
    /// The holder, and how often it has taken the lock.
    holder: Mutex<Option<(ThreadId, usize)>>,
    free: Condvar,
}

/// A turn that was taken. Drop gives it back.
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits until no other thread has the turn.
    pub fn take(&self) -> Taken<'_> {
        let me = thread::current().id();
        let mut holder = lock(&self.holder);
        loop {
            match &mut *holder {
                None => {
                    *holder = Some((me, 1));
                    return Taken(self);
                }
                Some((thread, times)) if *thread == me => {
                    *times += 1;
                    return Taken(self);
                }
                Some(_) => holder = self.free.wait(holder).unwrap_or_else(|broken| broken.into_inner()),
            }
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut holder = lock(&self.0.holder);
        match &mut *holder {
            Some((_, times)) if *times > 1 => *times -= 1,
            _ => {
                *holder = None;
                self.0.free.notify_one();
            }
        }
    }
}
