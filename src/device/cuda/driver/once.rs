//! Values initialized on first use, once per key.

use crate::device::cuda::runtime::lock;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

/// Lazily initialized values by key. Initializing one key does not block callers of other keys.
pub(crate) struct Once<K, V> {
    places: Mutex<HashMap<K, Arc<Mutex<Option<V>>>>>,
}

impl<K: Eq + Hash, V: Clone> Once<K, V> {
    /// Value of `key`, made on first use. After an error, the next call tries again.
    ///
    /// # Errors
    /// The error of `make`.
    pub fn get<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        let place = lock(&self.places).entry(key).or_default().clone();
        let mut value = lock(&place);
        match &*value {
            Some(value) => Ok(value.clone()),
            None => Ok(value.insert(make()?).clone()),
        }
    }
}

impl<K, V> Default for Once<K, V> {
    fn default() -> Self {
        Self { places: Mutex::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    const SOON: Duration = Duration::from_secs(60);

    #[test]
    fn keys_do_not_wait_for_each_other() {
        let once = Once::<u32, u32>::default();
        let (begun, at_work) = mpsc::channel();
        let (other_is_there, let_go) = mpsc::channel();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                once.get(1, move || {
                    begun.send(()).expect("it is waited for");
                    let_go.recv_timeout(SOON).map(|()| 10)
                })
            });
            at_work.recv_timeout(SOON).expect("the first begins");
            assert_eq!(once.get(2, || Ok::<_, ()>(20)), Ok(20));
            other_is_there.send(()).expect("the first waits");
            assert_eq!(first.join().expect("no panic"), Ok(10));
        });
    }

    #[test]
    fn a_key_is_initialized_once() {
        let (once, made) = (Once::<u32, usize>::default(), AtomicUsize::new(0));
        let make = || {
            std::thread::sleep(Duration::from_millis(20)); // time for the other threads to arrive
            Ok::<_, ()>(made.fetch_add(1, Ordering::Relaxed))
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| once.get(7, make))).collect();
            all.into_iter().for_each(|thread| assert_eq!(thread.join().expect("no panic"), Ok(0)));
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn a_failed_initialization_is_retried() {
        let once = Once::<u32, u32>::default();
        assert_eq!(once.get(1, || Err("no compiler")), Err("no compiler"));
        assert_eq!(once.get(1, || Ok::<_, &str>(10)), Ok(10));
        assert_eq!(once.get(1, || Err("not called")), Ok(10));
    }
}
