//! Launches of `step/limits.cu`: measures peak rates of a GPU.

use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::runtime::Runtime;
use bytemuck::{Pod, Zeroable};

/// Threads per block.
pub const THREADS: usize = 256;
/// Independent chains of operations per thread.
pub const CHAINS: usize = 8;
/// Multiply and add operations of one tensor-core product of a warp.
pub const PRODUCT_OPERATIONS: usize = 2 * 16 * 16 * 8;

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/limits.cu"), entry }
}

/// All kernels of the file, each with its block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (kernel("limits_copy"), BLOCK),
    (kernel("limits_exponentials"), BLOCK),
    (kernel("limits_multiply_adds"), BLOCK),
    (kernel("limits_products"), BLOCK),
];
const BLOCK: Block = Block { warps: THREADS / 32, shared_bytes: 0 };

/// An operation whose rate is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Special-function exponentials.
    Exponentials,
    /// f32 multiply-adds.
    MultiplyAdds,
    /// bf16 tensor-core products.
    Products,
}

/// As `LimitsParams` of `step/limits.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LimitsParams {
    x: Pointer,
    y: Pointer,
    len: u64,
    rounds: u32,
    seed: f32,
}

impl<R: Runtime> Gpu<R> {
    /// Copies `x` to `y`, 16 bytes per thread.
    ///
    /// # Errors
    /// A kernel that does not compile, or a driver error.
    ///
    /// # Panics
    /// If the lengths differ or are not a multiple of 4.
    pub fn copy(&self, x: &Array<R, f32>, y: &mut Array<R, f32>) -> Result<(), CudaError> {
        assert!(
            x.len() == y.len() && x.len().is_multiple_of(4),
            "x and y have {} and {} values",
            x.len(),
            y.len()
        );
        let params =
            LimitsParams { x: x.pointer(), y: y.pointer(), len: x.len() as u64, rounds: 0, seed: 0.0 };
        let launch = Launch {
            grid: [x.len().div_ceil(THREADS * 4) as u32, 1],
            threads: THREADS as u32,
            shared_bytes: 0,
        };
        // SAFETY: both arrays have `len` values, and y is borrowed mutably.
        unsafe { self.launch(kernel("limits_copy"), launch, &params) }
    }

    /// Runs `rounds` rounds of an operation on [`CHAINS`] values per thread, with `out.len()`
    /// threads.
    ///
    /// # Errors
    /// A kernel that does not compile, or a driver error.
    ///
    /// # Panics
    /// If the length of `out` is not a multiple of [`THREADS`].
    pub fn work(&self, rate: Rate, rounds: u32, out: &mut Array<R, f32>) -> Result<(), CudaError> {
        assert!(
            out.len().is_multiple_of(THREADS),
            "out has {} values, not whole blocks of threads",
            out.len()
        );
        let entry = match rate {
            Rate::Exponentials => "limits_exponentials",
            Rate::MultiplyAdds => "limits_multiply_adds",
            Rate::Products => "limits_products",
        };
        let params = LimitsParams { x: 0, y: out.pointer(), len: 0, rounds, seed: 0.25 };
        let launch =
            Launch { grid: [(out.len() / THREADS) as u32, 1], threads: THREADS as u32, shared_bytes: 0 };
        // SAFETY: each thread writes one value of `out`, which is borrowed mutably.
        unsafe { self.launch(kernel(entry), launch, &params) }
    }
}
