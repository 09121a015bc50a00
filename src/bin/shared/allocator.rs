//! Refused memory ends a program with a message and exit code 1.
//!
//! Without this, Rust aborts the process (exit code 134) when the system refuses an allocation:
//! beyond `ulimit -v`, the limit of a container, or the memory of the machine without overcommit.
//! Code that reports the refusal itself allocates inside [`fallible`](dfar::memory::fallible).
//!
//! The C library allocates too, a few bytes at a time, and glibc aborts where it is refused (when
//! a thread registers the destructor of a thread-local). So memory must run out here first: after
//! every [`EVERY`] bytes that a thread allocates, [`ROOM`] more bytes must be free. And under a
//! limit, all threads allocate from one heap ([`share_heap`]): the room is then free for each,
//! also for a new thread, which registers destructors before it allocates anything here.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

#[global_allocator]
static ALLOCATOR: Reporting = Reporting;

/// The bytes that must stay free for the C library. Less than the 128 KiB from which on glibc maps
/// pages for one allocation: the bytes must be in the heap that the C library allocates from.
const ROOM: usize = 96 << 10;

/// The bytes that a thread allocates between two probes of the room.
const EVERY: usize = 16 << 10;

thread_local! {
    /// The bytes allocated since the last probe. A thread's first allocation probes. Constant and
    /// without a destructor: its first use allocates nothing.
    static TAKEN: Cell<usize> = const { Cell::new(EVERY) };
}

/// The system's allocator; a refusal ends the process.
struct Reporting;

// SAFETY: every call goes to `System` unchanged, and so does its result, except that the process
// may end before it is returned. Nothing here panics, and what is allocated is freed at once.
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
    if memory.is_null() {
        refuse(bytes);
        return memory;
    }
    let taken = TAKEN.get().saturating_add(bytes);
    TAKEN.set(taken);
    if taken >= EVERY {
        leave_room();
    }
    memory
}

/// Whether [`share_heap`] was called: by the first allocation, when there is one thread.
static HEAP_CHOSEN: AtomicBool = AtomicBool::new(false);

/// Under a limit on address space, lets all threads allocate from one heap. By default glibc
/// reserves 128 MiB of addresses for a heap of each thread, and where it cannot, every allocation
/// of that thread is a mapping of its own, although other heaps have free memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn share_heap() {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is valid for writes; `mallopt` has no conditions.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) == 0 && limit.rlim_cur != libc::RLIM_INFINITY {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

/// Other C libraries have one heap, or do not abort.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn share_heap() {}

#[cold]
fn leave_room() {
    if !HEAP_CHOSEN.swap(true, Ordering::Relaxed) {
        share_heap();
    }
    let layout = Layout::new::<[u128; ROOM / 16]>();
    // SAFETY: the layout is not empty. The optimizer must not remove the pair of calls.
    let room = black_box(unsafe { System.alloc(layout) });
    if room.is_null() {
        refuse(ROOM);
    } else {
        // SAFETY: allocated above with the same layout.
        unsafe { System.dealloc(room, layout) };
        TAKEN.set(0);
    }
}

#[cold]
fn refuse(bytes: usize) {
    if !dfar::memory::is_fallible() {
        end(bytes);
    }
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
    // SAFETY: `length` bytes of `text` are initialized; `_exit` has no conditions.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length);
        libc::_exit(1)
    }
}

/// Leaves the message to Rust, which aborts.
#[cfg(not(unix))]
fn end(_bytes: usize) {}
