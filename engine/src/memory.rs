//! Allocations whose refusal the caller reports.
//!
//! Rust aborts a process where the system refuses memory, unless the caller asked for the error
//! (`try_reserve`). The programs of `dfar` have an allocator that ends them with a message instead.
//! It must not do so inside [`fallible`].

use std::cell::Cell;

thread_local! {
    static FALLIBLE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `reserve`, which returns an error when the system refuses memory.
pub fn fallible<T>(reserve: impl FnOnce() -> T) -> T {
    // Restored also by a panic.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            FALLIBLE.set(self.0);
        }
    }
    let _before = Before(FALLIBLE.replace(true));
    reserve()
}

/// Whether this thread is inside [`fallible`].
pub fn is_fallible() -> bool {
    FALLIBLE.get()
}
