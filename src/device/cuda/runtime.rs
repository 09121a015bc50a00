//! The interface of the operations to a machine that runs kernels: memory, launches, matrix
//! products.
//!
//! [`Cuda`](super::Cuda) implements it for a GPU, `tests/emulator` for the CPU. The operations
//! (argument checks, plans, launch order) are generic over it, so tests run them without a GPU.
//!
//! Work is stream-ordered: it executes in the order of the calls. The copies of [`Runtime::send`]
//! are the exception: they may execute earlier. Only [`Runtime::read`] waits for all earlier work,
//! and [`Runtime::end_read`] for the work before its copy.

use super::error::CudaError;
use super::kernel::{Kernel, Launch, Pointer};
use crate::device::{Activation, Precision, Store};
use std::ops::{DerefMut, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A matrix product `c = activation(a b + bias)`. All matrices are f32, row-major and packed: `a:
/// [m, k]`, `b: [k, n]`, `c: [m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `m`, `n`, `k`, each at least 1.
    pub shape: [usize; 3],
    /// Address of `a`.
    pub a: Pointer,
    /// Whether `a` is stored transposed, as `[k, m]`.
    pub a_transposed: bool,
    /// Address of `b`.
    pub b: Pointer,
    /// Whether `b` is stored transposed, as `[n, k]`.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: Pointer,
    /// Overwrites `c` or adds to it. Adding excludes bias and activation.
    pub store: Store,
    /// Address of the bias, `[n]`; null for none.
    pub bias: Pointer,
    /// Activation, applied to the sum.
    pub activation: Activation,
    /// Precision of the factors.
    pub precision: Precision,
}

/// How a recorded graph was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// By a cached graph executable, updated with the new addresses and sizes.
    Updated,
    /// By a newly instantiated graph executable.
    Instantiated,
}

/// Ignores poisoning: no critical section under `cuda` leaves partial state on a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that is freed but not to be reused yet.
#[derive(Debug, Default)]
pub struct Held(Mutex<Option<Vec<(Pointer, usize)>>>);

impl Held {
    /// Whether it keeps freed memory: between [`Runtime::hold_freed`] and [`Runtime::release_freed`].
    pub fn keeps(&self, at: Pointer, bytes: usize) -> bool {
        match &mut *lock(&self.0) {
            Some(held) => {
                held.push((at, bytes));
                true
            }
            None => false,
        }
    }

    fn begin(&self) {
        lock(&self.0).get_or_insert_default();
    }

    fn end(&self) -> Vec<(Pointer, usize)> {
        lock(&self.0).take().unwrap_or_default()
    }
}

/// Limits of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory per block, in bytes.
    pub shared_per_block: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Size of the L2 cache in bytes.
    pub cache_bytes: usize,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Free memory.
    pub free: usize,
    /// Total memory.
    pub total: usize,
}

/// A machine that runs the kernels.
pub trait Runtime: Send + Sync + 'static {
    /// An event recorded in the compute stream.
    type Mark: Send;

    /// A pinned staging buffer: host memory that the device copies from asynchronously.
    type Pinned: DerefMut<Target = [u8]> + Send;

    /// A copy to the host in flight.
    type Reading: Send;

    /// Bytes between the arrays of a [`Staging`](super::array::Staging), in addition to alignment.
    /// The emulator needs a gap to detect accesses outside an array.
    const GAP: usize = 0;

    /// Records an event behind all work enqueued so far.
    ///
    /// # Errors
    /// A driver error.
    fn mark(&self) -> Result<Self::Mark, CudaError>;

    /// Seconds between two events. Waits for the later one.
    ///
    /// # Errors
    /// A driver error, including a failure of earlier launches.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError>;

    /// Device name, for logs.
    fn name(&self) -> String;

    /// The limits of the device.
    fn limits(&self) -> Limits;

    /// Free and total memory.
    ///
    /// # Errors
    /// A driver error.
    fn memory(&self) -> Result<Memory, CudaError>;

    /// Allocates `bytes` bytes (not 0), 256-byte aligned, with unspecified content.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or another driver error.
    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Frees memory, stream-ordered: later allocations may reuse it.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate`] of this runtime with the same `bytes`, and is not freed
    /// yet.
    unsafe fn free(&self, at: Pointer, bytes: usize);

    /// The memory that [`Runtime::free`] holds back: it asks [`Held::keeps`] first.
    fn held(&self) -> &Held;

    /// Until [`Runtime::release_freed`], no allocation reuses memory that is freed from now on. Work
    /// enqueued later may still use it.
    fn hold_freed(&self) {
        self.held().begin();
    }

    /// Ends [`Runtime::hold_freed`].
    fn release_freed(&self) {
        for (at, bytes) in self.held().end() {
            // SAFETY: guaranteed by the caller of the `free` that held it back.
            unsafe { self.free(at, bytes) };
        }
    }

    /// Allocates landing memory, the destination of [`Runtime::send`]. No work in flight uses it,
    /// so a copy to it may run ahead of that work.
    ///
    /// # Errors
    /// As [`Runtime::allocate`]. [`CudaError::NotCaptured`] if it must wait for the device during a
    /// capture.
    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Frees landing memory, which work in flight may still use.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] of this runtime with the same `bytes`, and is not
    /// freed yet.
    unsafe fn free_landing(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// A driver error.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError>;

    /// Copies from the host. `host` may change after the call.
    ///
    /// # Errors
    /// A driver error.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError>;

    /// A pinned staging buffer of at least `bytes` bytes with unspecified content. No copy in
    /// flight reads it. Waits for an earlier [`Runtime::send`] if too many are in flight.
    ///
    /// # Errors
    /// A driver error.
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned, CudaError>;

    /// Starts one copy of the ascending `parts` of `from` to the same offsets from `at`. The gaps
    /// between the parts may be copied too. Takes the staging buffer, and reuses it after the copy.
    /// Later work sees the copy; the copy may run ahead of earlier work.
    ///
    /// # Errors
    /// A driver error.
    ///
    /// # Panics
    /// If a part ends outside `from`.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`], with a size of at least the end of the last
    /// part. No work enqueued since then uses it.
    unsafe fn send(&self, at: Pointer, from: Self::Pinned, parts: &[Range<usize>]) -> Result<(), CudaError>;

    /// Copies to the host, after all earlier work.
    ///
    /// # Errors
    /// A driver error, including a failure of earlier launches.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        let reading = unsafe { self.begin_read(at, host.len())? };
        self.end_read(reading, host)
    }

    /// Starts a copy of a few bytes to pinned host memory, behind all earlier work. Later work may
    /// overwrite or free the memory.
    ///
    /// # Errors
    /// A driver error.
    ///
    /// # Safety
    /// `bytes` bytes from `at` on lie inside one allocation.
    unsafe fn begin_read(&self, at: Pointer, bytes: usize) -> Result<Self::Reading, CudaError>;

    /// Waits for a copy of [`Runtime::begin_read`], not for later work, and copies its bytes.
    ///
    /// # Errors
    /// A driver error, including a failure of earlier launches.
    ///
    /// # Panics
    /// If `host` is not as long as the copy.
    fn end_read(&self, reading: Self::Reading, host: &mut [u8]) -> Result<(), CudaError>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// A kernel does not compile, or a driver error.
    ///
    /// # Safety
    /// `params` holds the bytes of the struct that the kernel declares as its parameter. For this
    /// grid, each pointer in it refers to memory of the shape that the kernel documents.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError>;

    /// Blocks of a kernel that a multiprocessor holds at once: by its registers, threads and shared
    /// memory.
    ///
    /// # Errors
    /// As [`Runtime::launch`].
    fn resident_blocks(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<usize, CudaError>;

    /// Enqueues a matrix product.
    ///
    /// # Errors
    /// An error of the product library.
    ///
    /// # Safety
    /// The addresses refer to matrices of the given shapes; `c` overlaps no other.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.gemm_batch(gemm, 1) }
    }

    /// Enqueues `count` matrix products of one shape. The matrices of consecutive products are
    /// adjacent in memory. `count > 1` excludes bias and activation.
    ///
    /// # Errors
    /// An error of the product library.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], for all products.
    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError>;

    /// Starts a capture: launches, products and fills are recorded with their current arguments and
    /// not executed. Memory may be allocated and freed, stream-ordered: work recorded later may
    /// reuse it. Any thread may take pinned staging buffers. Other calls fail with
    /// [`CudaError::NotCaptured`]. Only one thread may record.
    ///
    /// # Errors
    /// [`CudaError::NotCaptured`] if a capture is in progress, or a driver error.
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// Ends the capture and starts the recorded graph.
    ///
    /// # Errors
    /// A driver error. The capture has then ended, and nothing was started.
    fn start_capture(&self) -> Result<Start, CudaError>;

    /// Ends the capture and discards the recording.
    fn forget_capture(&self);
}
