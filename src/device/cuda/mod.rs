//! NVIDIA GPUs: the kernels of `kernels/`, compiled at run time. Nothing here needs CUDA to build.
//!
//! | module | what it does |
//! |---|---|
//! | [`params`] | arguments of the kernels |
//! | [`tile`] | how work is cut: pure functions of shapes and limits |
//! | [`plan`] | what the kernels need to know about one batch |

pub mod params;
pub mod plan;
pub mod tile;

use thiserror::Error;

/// A GPU that cannot be used, or a call it cannot serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No kernel is compiled for this head width.
    #[error("cuda: head_dim is {head_dim}, but the kernels have 8, 16, 32, 64 and 128")]
    HeadDim {
        /// Width asked for.
        head_dim: usize,
    },
    /// A block needs more shared memory than the device gives it.
    #[error("cuda: pass {pass} needs {needed} bytes of shared memory per block, but the device has {available}")]
    SharedMemory {
        /// Pass.
        pass: &'static str,
        /// Bytes of the smallest block.
        needed: usize,
        /// Bytes the device gives.
        available: usize,
    },
    /// A batch too large for one call.
    #[error("cuda: the batch has {rows} query rows, but one call can count {}; split it", i32::MAX)]
    TooLarge {
        /// Rows `N * Q`.
        rows: usize,
    },
}
