//! The trait between the operations and a machine that runs the kernels: memory, launches, matrix products.
//!
//! [`Cuda`](super::Cuda) implements it for a GPU, `tests/emulator` for the CPU. The operations (argument checks, plans, the
//! order of launches) are generic over it, so they are tested on machines without a GPU.
//!
//! Everything asked of a runtime happens in the order it was asked for, but for the copies of [`Runtime::send`], which may come
//! earlier; only [`Runtime::read`] waits for all of it.

use super::error::CudaError;
use super::kernel::{Kernel, Launch, Pointer};
use crate::device::{Activation, Store};
use serde::{Deserialize, Serialize};
use std::ops::{DerefMut, Range};

/// What products are computed with; sums are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Factors as they are.
    #[default]
    F32,
    /// Factors rounded to bf16, on the tensor cores.
    Bf16,
}

impl Precision {
    /// Its name, as in `--precision`.
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
    /// Whether `a` lies in memory as `[k, m]`.
    pub a_transposed: bool,
    /// Address of `b`.
    pub b: Pointer,
    /// Whether `b` lies in memory as `[n, k]`.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: Pointer,
    /// Whether the result replaces `c` or is added to it. Adding goes with neither bias nor activation.
    pub store: Store,
    /// `[n]`, or null.
    pub bias: Pointer,
    /// Applied last.
    pub activation: Activation,
    /// Of the factors.
    pub precision: Precision,
}

/// How what was recorded was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// By an executable that was there, with new addresses and sizes.
    Updated,
    /// By one made for it.
    Instantiated,
}

/// What the machine offers a block, and how many blocks at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory a block may have, in bytes.
    pub shared_per_block: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of the cache that all of them share.
    pub cache_bytes: usize,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not taken, by anybody.
    pub free: usize,
    /// In all.
    pub total: usize,
}

/// A machine that runs the kernels.
pub trait Runtime: Send + Sync + 'static {
    /// A moment in the course of the work.
    type Mark: Send;

    /// Host memory that the machine copies from by itself, while the host goes on.
    type Pinned: DerefMut<Target = [u8]> + Send;

    /// Bytes to leave between the arrays of a [`Staging`](super::array::Staging), besides those that align them: for a machine that finds accesses
    /// outside an array by what lies around it.
    const GAP: usize = 0;

    /// Marks the moment when all that was asked for so far is done.
    ///
    /// # Errors
    /// What the driver reports.
    fn mark(&self) -> Result<Self::Mark, CudaError>;

    /// Seconds between two moments; waits for the later one.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError>;

    /// What it is, for logs.
    fn name(&self) -> String;

    /// Its limits.
    fn limits(&self) -> Limits;

    /// Its memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn memory(&self) -> Result<Memory, CudaError>;

    /// `bytes` bytes (not 0) of unspecified content, at a multiple of 256.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Gives memory back, for what is asked for later.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate`] of this runtime with as many `bytes`, and was not freed.
    unsafe fn free(&self, at: Pointer, bytes: usize);

    /// Memory as [`Runtime::allocate`] gives it, for [`Runtime::send`]. Nothing that was asked for earlier uses it: a copy to it
    /// may come before all that.
    ///
    /// # Errors
    /// As [`Runtime::allocate`], and [`CudaError::NotCaptured`] if it has to wait for the device during a capture.
    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Gives such memory back. What was asked for so far may use it.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] of this runtime with as many `bytes`, and was not freed.
    unsafe fn free_landing(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError>;

    /// Copies from the host; `host` may be changed as soon as this returns.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError>;

    /// Host memory of at least `bytes` bytes, unspecified content, that no copy reads any more. Waits for an earlier
    /// [`Runtime::send`] where too many are under way.
    ///
    /// # Errors
    /// What the driver reports.
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned, CudaError>;

    /// Copies `parts` of `from`, which ascend, to the same places from `at` on, in one piece: what lies between them may be
    /// copied with them. Takes the host memory back, to give it to somebody else when the copy is done. What is asked for from
    /// now on finds the copy; what was asked for before need not be done when it is made.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If a part ends outside `from`.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate_landing`] with at least as many bytes as the last part ends at, and nothing that was
    /// asked for since uses it.
    unsafe fn send(&self, at: Pointer, from: Self::Pinned, parts: &[Range<usize>]) -> Result<(), CudaError>;

    /// Copies to the host, after all that was asked for before.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// A kernel that cannot be compiled, and what the driver reports.
    ///
    /// # Safety
    /// `params` are the bytes of the argument that the kernel declares; with this grid, each of its pointers is to memory
    /// of the shape the kernel's contract names.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError>;

    /// Starts a matrix product.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// The addresses are of matrices of the shapes named, `c` overlapping no other.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), CudaError> {
        // SAFETY: the caller's promises.
        unsafe { self.gemm_batch(gemm, 1) }
    }

    /// Starts `count` matrix products of one shape, whose matrices follow each other in memory. More than one goes with
    /// neither bias nor activation.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], for all of them.
    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError>;

    /// Records launches, products and fills from here on, with their arguments as they are now, in the place of doing them.
    /// Memory may be asked for and given back meanwhile, by the rule that holds without a capture: what is recorded later may
    /// use it again. Pinned memory may be asked for, by any thread; everything else is refused with
    /// [`CudaError::NotCaptured`], and is for one thread alone.
    ///
    /// # Errors
    /// [`CudaError::NotCaptured`] during a capture, and what the driver reports.
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// Ends the capture and starts what was recorded, in the order in which it was asked for.
    ///
    /// # Errors
    /// What the driver reports. None of it was started then, and the capture is over.
    fn start_capture(&self) -> Result<Start, CudaError>;

    /// Ends the capture and forgets what was recorded.
    fn forget_capture(&self);
}
