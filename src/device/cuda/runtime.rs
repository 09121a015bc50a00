//! The trait between the operations and a machine that runs the kernels: memory, launches, matrix products.
//!
//! [`Cuda`](super::Cuda) implements it for a GPU, `tests/emulator` for the CPU. The operations (argument checks, plans, the
//! order of launches) are generic over it, so they are tested on machines without a GPU.
//!
//! Work runs in the order of the calls (stream-ordered), except the copies of [`Runtime::send`], which may run earlier. Only
//! [`Runtime::read`] waits for all earlier work.

use super::error::CudaError;
use super::kernel::{Kernel, Launch, Pointer};
use crate::device::{Activation, Store};
use serde::{Deserialize, Serialize};
use std::ops::{DerefMut, Range};

/// Precision of the factors of matrix products; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 factors.
    #[default]
    F32,
    /// Factors rounded to bf16, on the tensor cores.
    Bf16,
}

impl Precision {
    /// The name used by `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// `c = activation(a b + bias)`, all f32, row-major and packed: `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `m`, `n`, `k`; none of them 0.
    pub shape: [usize; 3],
    /// Address of `a`.
    pub a: Pointer,
    /// Whether `a` is stored as `[k, m]`.
    pub a_transposed: bool,
    /// Address of `b`.
    pub b: Pointer,
    /// Whether `b` is stored as `[n, k]`.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: Pointer,
    /// Overwrites or adds to `c`. Adding excludes bias and activation.
    pub store: Store,
    /// `[n]`, or null.
    pub bias: Pointer,
    /// Applied last.
    pub activation: Activation,
    /// Precision of the factors.
    pub precision: Precision,
}

/// How a recorded graph was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// By a cached executable, updated with new addresses and sizes.
    Updated,
    /// By a newly instantiated executable.
    Instantiated,
}

/// Limits of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory per block, in bytes.
    pub shared_per_block: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of the L2 cache.
    pub cache_bytes: usize,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Free.
    pub free: usize,
    /// Total.
    pub total: usize,
}

/// A machine that runs the kernels.
pub trait Runtime: Send + Sync + 'static {
    /// An event recorded in the stream of work.
    type Mark: Send;

    /// A pinned staging buffer: host memory that the device copies from asynchronously.
    type Pinned: DerefMut<Target = [u8]> + Send;

    /// Bytes to leave between the arrays of a [`Staging`](super::array::Staging), in addition to alignment: for a runtime
    /// that detects accesses outside an array by its surroundings.
    const GAP: usize = 0;

    /// Records an event behind all work so far.
    ///
    /// # Errors
    /// What the driver reports.
    fn mark(&self) -> Result<Self::Mark, CudaError>;

    /// Seconds between two events; waits for the later one.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError>;

    /// Device name, for logs.
    fn name(&self) -> String;

    /// The limits of the device.
    fn limits(&self) -> Limits;

    /// Free and total memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn memory(&self) -> Result<Memory, CudaError>;

    /// Allocates `bytes` bytes (not 0), 256-byte aligned, of unspecified content.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Frees memory in stream order: later allocations may reuse it.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate`] of this runtime with the same `bytes`, and is not freed.
    unsafe fn free(&self, at: Pointer, bytes: usize);

    /// Allocates landing memory, the target of [`Runtime::send`]. No work in flight uses it, so a copy to it may run ahead of
    /// that work.
    ///
    /// # Errors
    /// As [`Runtime::allocate`], and [`CudaError::NotCaptured`] if it has to wait for the device during a capture.
    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Frees landing memory. Work in flight may still use it.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] of this runtime with the same `bytes`, and is not freed.
    unsafe fn free_landing(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError>;

    /// Copies from the host; `host` may change once this returns.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError>;

    /// A pinned staging buffer of at least `bytes` bytes, of unspecified content, that no copy in flight reads. Waits for an
    /// earlier [`Runtime::send`] if too many are in flight.
    ///
    /// # Errors
    /// What the driver reports.
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned, CudaError>;

    /// Starts one copy of the ascending `parts` of `from` to the same offsets from `at`; the gaps may be copied too. Takes the
    /// staging buffer, and reuses it when the copy has finished. Later work sees the copy; the copy may overtake earlier
    /// work.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If a part ends outside `from`.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] with at least the end of the last part as its size, and no work enqueued
    /// since uses it.
    unsafe fn send(&self, at: Pointer, from: Self::Pinned, parts: &[Range<usize>]) -> Result<(), CudaError>;

    /// Copies to the host, after all earlier work.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// A kernel that cannot be compiled, and what the driver reports.
    ///
    /// # Safety
    /// `params` are the bytes of the argument that the kernel declares. For this grid, each of its pointers refers to memory
    /// of the shape in the kernel's contract.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError>;

    /// Enqueues a matrix product.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// The addresses refer to matrices of the given shapes; `c` overlaps no other.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), CudaError> {
        // SAFETY: the caller's contract.
        unsafe { self.gemm_batch(gemm, 1) }
    }

    /// Enqueues `count` matrix products of one shape, with matrices adjacent in memory. `count > 1` excludes bias and
    /// activation.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], for all of them.
    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError>;

    /// Starts a capture: launches, products and fills are recorded with their current arguments instead of executed. Memory
    /// may be allocated and freed under the stream-ordered rule: work recorded later may reuse it. Any thread may take pinned
    /// staging buffers. Everything else is refused with [`CudaError::NotCaptured`] and restricted to one thread.
    ///
    /// # Errors
    /// [`CudaError::NotCaptured`] during a capture, and what the driver reports.
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// Ends the capture and starts the recorded graph.
    ///
    /// # Errors
    /// What the driver reports. Then nothing was started, and the capture has ended.
    fn start_capture(&self) -> Result<Start, CudaError>;

    /// Ends the capture and discards the recording.
    fn forget_capture(&self);
}
