//! The one error of the GPU side.

use super::kernel::{Arch, Element};
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
    #[error("cuda: {name} is {}, but the kernels need {} or later", arch.name(), Arch::OLDEST.name())]
    OldDevice {
        /// Its name.
        name: String,
        /// Its compute capability.
        arch: Arch,
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
        planned: Element,
        /// Of the tensors.
        given: Element,
    },
    /// No kernel is compiled for this head width.
    #[error("cuda: head_dim is {head_dim}, but the kernels have 8, 16, 32, 64 and 128")]
    HeadDim {
        /// Width asked for.
        head_dim: usize,
    },
    /// No kernel of target attention is compiled for this width.
    #[error(
        "cuda: tokens of width {width} are wider than target attention has a kernel for ({widest}); use --device cpu"
    )]
    TargetWidth {
        /// Width of the model.
        width: usize,
        /// Widest compiled.
        widest: usize,
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
    pub(crate) fn driver(action: &'static str, error: DriverError, bytes: usize) -> CudaError {
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
