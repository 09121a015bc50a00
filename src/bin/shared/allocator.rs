//! Refused memory ends a program with a message and exit code 1.
//!
//! Without this, Rust aborts the process (exit code 134) when the system refuses an allocation:
//! beyond `ulimit -v`, the limit of a container, or the memory of the machine without overcommit.
//! Code that reports the refusal itself allocates inside [`fallible`](dfar::memory::fallible).

use std::alloc::{GlobalAlloc, Layout, System};

#[global_allocator]
static ALLOCATOR: Reporting = Reporting;

/// The system's allocator; a refusal ends the process.
struct Reporting;

// SAFETY: every call goes to `System` unchanged, and so does its result, except that the process
// may end before a null pointer is returned. Nothing here allocates or panics.
unsafe impl GlobalAlloc for Reporting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: guaranteed by the caller.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: guaranteed by the caller.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: guaranteed by the caller.
        given(unsafe { System.realloc(old, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[inline]
fn given(memory: *mut u8, bytes: usize) -> *mut u8 {
    if memory.is_null() && !dfar::memory::is_fallible() {
        end(bytes);
    }
    memory
}

/// Prints the message and ends the process. Nothing is allocated, and no lock is taken: the thread
/// may be printing.
#[cfg(unix)]
#[cold]
fn end(bytes: usize) {
    use std::io::Write;
    let mut text = std::io::Cursor::new([0; 256]);
    // The text is shorter than its room.
    let _ = writeln!(
        text,
        "error: out of memory: the system refused {bytes} bytes. Raise the limit (ulimit -v, the \
         container's), or use less: `dfar-data import --sort-memory`, `dfar-train --batch-tokens`."
    );
    let length = text.position() as usize;
    let text = text.into_inner();
    // SAFETY: `length` bytes of `text` are initialised; `_exit` has no conditions.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length);
        libc::_exit(1)
    }
}

/// Leaves the message to Rust, which aborts.
#[cfg(not(unix))]
fn end(_bytes: usize) {}
