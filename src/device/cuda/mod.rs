//! NVIDIA GPUs: the kernels of `kernels/`, compiled at run time. Nothing here needs CUDA to build.
//!
//! | module | what it does |
//! |---|---|
//! | [`params`] | arguments of the kernels |
//! | [`tile`] | how work is cut: pure functions of shapes and limits |
//! | [`plan`], [`target_plan`] | what the kernels need to know about one batch |
//! | [`nvrtc`], [`compile`] | from source to machine code, and the cache on disk |
//! | [`runtime`] | the floor: memory, launches and products of a machine that runs the kernels |
//! | [`context`], [`blas`] | [`Cuda`]: a GPU as such a machine; cuBLASLt |
//! | [`gpu`] | [`Gpu`]: the model's operations, on any such machine |
//! | [`graph`] | a step as a CUDA graph |
//! | [`attention`], [`convert`], [`embedding`], [`layer_norm`], [`loss`], [`optimizer`], [`prefix_mean`], [`rows`], [`target_attention`] | the operations of the `.cu` of that name |
//!
//! What is unsafe about the driver is in one private module, `launch`, and in `context`, which calls it.

pub mod attention;
pub mod blas;
pub mod compile;
pub mod context;
pub mod convert;
mod device;
pub mod embedding;
pub mod gpu;
pub mod graph;
pub mod landing;
mod launch;
pub mod layer_norm;
pub mod limits;
mod linear;
pub mod loss;
pub mod naive_attention;
pub mod nvrtc;
mod once;
pub mod optimizer;
pub mod params;
pub mod plan;
pub mod prefix_mean;
pub mod rows;
pub mod runtime;
pub mod target_attention;
pub mod target_plan;
pub mod tile;

pub use context::{Cuda, device_count};
pub use gpu::Gpu;
pub use runtime::Precision;

use crate::attention::AttentionError;
use cudarc::driver::{DriverError, sys::CUresult};
use thiserror::Error;

/// A GPU that cannot be used, or a call it cannot serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The operation refuses its arguments.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// There is no driver.
    #[error("cuda: there is no NVIDIA driver here (its library, libcuda, cannot be loaded)")]
    NoDriver,
    /// There is no such GPU.
    #[error("cuda: there is no device {ordinal}; the driver shows {found}")]
    NoDevice {
        /// Number asked for, from 0.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// A GPU without the instructions the kernels use.
    #[error("cuda: {name} is {}, but the kernels need {} or later", arch.name(), compile::Arch::OLDEST.name())]
    OldDevice {
        /// Its name.
        name: String,
        /// Its compute capability.
        arch: compile::Arch,
    },
    /// NVRTC, which compiles the kernels, cannot be loaded.
    #[error("cuda: NVRTC cannot be loaded (tried {}); install the CUDA toolkit or put its libraries on the loader's path", tried.join(", "))]
    NoNvrtc {
        /// Names it was looked for under.
        tried: &'static [&'static str],
    },
    /// An NVRTC that does not know what the kernels need.
    #[error("cuda: NVRTC is {}.{}, but the kernels need {}.{} or later", found.0, found.1, oldest.0, oldest.1)]
    OldNvrtc {
        /// Version found.
        found: (i32, i32),
        /// Version needed.
        oldest: (i32, i32),
    },
    /// A kernel that NVRTC refuses.
    #[error("cuda: {kernel} does not compile for {arch} with {}: {error}\n{log}", options.join(" "))]
    Compile {
        /// Source file.
        kernel: &'static str,
        /// Architecture.
        arch: String,
        /// Options.
        options: Vec<String>,
        /// NVRTC's error.
        error: String,
        /// The compiler's log.
        log: String,
    },
    /// cuBLASLt, which multiplies matrices, cannot be loaded.
    #[error("cuda: cuBLASLt cannot be loaded (tried {}); install the CUDA toolkit or put its libraries on the loader's path", tried.join(", "))]
    NoBlas {
        /// Names it was looked for under.
        tried: &'static [&'static str],
    },
    /// cuBLASLt failed.
    #[error("cuda: {action} failed in cuBLASLt with status {status}")]
    Blas {
        /// What was tried, e.g. a product's shape.
        action: String,
        /// Its status.
        status: i32,
    },
    /// The device's memory does not suffice.
    #[error("cuda: the device has no {bytes} bytes of memory left; use a smaller batch")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// What a run keeps on the device does not fit.
    #[error(
        "cuda: {parameters} parameters with what training keeps of each need {:.2} GiB, but {:.2} of the device's {:.2} GiB are free; \
         choose a smaller --width, leave out --dense-embeddings, or use --device cpu", gib(*needed), gib(*free), gib(*total)
    )]
    NoRoom {
        /// Values of the model.
        parameters: usize,
        /// Bytes needed.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes in all.
        total: usize,
    },
    /// The driver failed.
    #[error("cuda: {action} failed: {message}")]
    Driver {
        /// What was tried.
        action: &'static str,
        /// The driver's error, in its words.
        message: String,
    },
    /// Something that a CUDA graph cannot hold, while one is recorded.
    #[error("cuda: {action} cannot be part of a CUDA graph")]
    NotCaptured {
        /// What was asked for.
        action: &'static str,
    },
    /// A buffer that lives on another device.
    #[error("cuda: {name} is on another device than the call")]
    OtherDevice {
        /// Argument.
        name: &'static str,
    },
    /// Tensors of another type than the batch was planned for.
    #[error("cuda: the batch was planned for {}, but the tensors are {}", planned.name(), given.name())]
    Element {
        /// Of the plan.
        planned: tile::Element,
        /// Of the tensors.
        given: tile::Element,
    },
    /// No kernel is compiled for this head width.
    #[error("cuda: head_dim is {head_dim}, but the kernels have 8, 16, 32, 64 and 128")]
    HeadDim {
        /// Width asked for.
        head_dim: usize,
    },
    /// No kernel of target attention is compiled for this width.
    #[error(
        "cuda: tokens of width {width} are wider than target attention has a kernel for ({}); use --device cpu",
        target_attention::MAX_WIDTH
    )]
    TargetWidth {
        /// Width of the model.
        width: usize,
    },
    /// A block needs more shared memory than the device gives it.
    #[error(
        "cuda: pass {pass} needs {needed} bytes of shared memory per block, but the device has {available}"
    )]
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

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl CudaError {
    /// What the driver reported while trying to `action`; `bytes` were asked for, if memory was.
    fn driver(action: &'static str, error: DriverError, bytes: usize) -> CudaError {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { bytes },
            _ => CudaError::Driver { action, message: error.to_string() },
        }
    }

    /// Exit code of the binaries: 4, no usable GPU, unless the caller's arguments are at fault.
    pub fn exit_code(&self) -> u8 {
        if self.is_argument() { 1 } else { 4 }
    }

    /// Whether the error is about what the caller gave, not about the machine.
    pub fn is_argument(&self) -> bool {
        matches!(self, CudaError::Attention(_) | CudaError::OtherDevice { .. } | CudaError::Element { .. })
    }
}
