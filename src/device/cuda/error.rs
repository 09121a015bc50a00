//! [`CudaError`], the error of every module here.

use super::kernel::{Arch, Element};
use crate::attention::AttentionError;
use cudarc::driver::{DriverError, sys::CUresult};
use thiserror::Error;

/// A GPU that cannot be used, or a call it cannot serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The operation rejects its arguments.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// No NVIDIA driver is installed.
    #[error("cuda: no NVIDIA driver found (libcuda cannot be loaded)")]
    NoDriver,
    /// The device number does not exist.
    #[error("cuda: device {ordinal} does not exist; the driver reports {found}")]
    NoDevice {
        /// Requested device number, from 0.
        ordinal: usize,
        /// Number of devices the driver reports.
        found: usize,
    },
    /// A GPU older than the oldest supported architecture.
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
        /// Library names tried.
        tried: &'static [&'static str],
    },
    /// An NVRTC too old for the kernels.
    #[error("cuda: NVRTC is {}.{}, but the kernels need {}.{} or later", found.0, found.1, oldest.0, oldest.1)]
    OldNvrtc {
        /// Version found.
        found: (i32, i32),
        /// Version needed.
        oldest: (i32, i32),
    },
    /// NVRTC cannot compile a kernel.
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
        /// Library names tried.
        tried: &'static [&'static str],
    },
    /// cuBLASLt failed.
    #[error("cuda: {action} failed in cuBLASLt with status {status}")]
    Blas {
        /// The failed action, e.g. a product's shape.
        action: String,
        /// The `cublasStatus_t`.
        status: i32,
    },
    /// An allocation failed for lack of device memory.
    #[error("cuda: out of device memory: {bytes} bytes requested; use a smaller batch")]
    OutOfMemory {
        /// Bytes requested.
        bytes: usize,
    },
    /// Parameters and optimizer state do not fit the free device memory.
    #[error(
        "cuda: {parameters} parameters with their optimizer state need {:.2} GiB, but {:.2} of the device's {:.2} GiB are free; \
         choose a smaller --width, leave out --dense-embeddings, or use --device cpu", gib(*needed), gib(*free), gib(*total)
    )]
    NoRoom {
        /// Parameters of the model.
        parameters: usize,
        /// Bytes needed.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of device memory.
        total: usize,
    },
    /// The driver failed.
    #[error("cuda: {action} failed: {message}")]
    Driver {
        /// The failed action.
        action: &'static str,
        /// The driver's error message.
        message: String,
    },
    /// An action that a CUDA graph capture does not allow.
    #[error("cuda: {action} cannot be part of a CUDA graph")]
    NotCaptured {
        /// The action.
        action: &'static str,
    },
    /// A buffer of another device.
    #[error("cuda: {name} is on another device than the call")]
    OtherDevice {
        /// Argument.
        name: &'static str,
    },
    /// The element type of the tensors differs from that of the plan.
    #[error("cuda: the batch was planned for {}, but the tensors are {}", planned.name(), given.name())]
    Element {
        /// Type of the plan.
        planned: Element,
        /// Type of the tensors.
        given: Element,
    },
    /// No kernel is compiled for this head width.
    #[error("cuda: head_dim is {head_dim}, but the kernels have 8, 16, 32, 64 and 128")]
    HeadDim {
        /// Requested width.
        head_dim: usize,
    },
    /// No target attention kernel is compiled for this width.
    #[error(
        "cuda: tokens of width {width} are wider than target attention has a kernel for ({widest}); use --device cpu"
    )]
    TargetWidth {
        /// Width of the model.
        width: usize,
        /// Widest compiled.
        widest: usize,
    },
    /// A block needs more shared memory than the device allows.
    #[error(
        "cuda: pass {pass} needs {needed} bytes of shared memory per block, but the device has {available}"
    )]
    SharedMemory {
        /// Pass.
        pass: &'static str,
        /// Bytes of the smallest block.
        needed: usize,
        /// Bytes the device allows.
        available: usize,
    },
    /// A batch too large for one call.
    #[error("cuda: the batch has {rows} query rows, more than the limit of {} per call; split it", i32::MAX)]
    TooLarge {
        /// Rows `N * Q`.
        rows: usize,
    },
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl CudaError {
    /// A driver error during `action`; `bytes` is the requested size of an allocation, else 0.
    pub(crate) fn driver(action: &'static str, error: DriverError, bytes: usize) -> CudaError {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { bytes },
            _ => CudaError::Driver { action, message: error.to_string() },
        }
    }

    /// Exit code of the binaries: 1 for invalid arguments, else 4 (no usable GPU).
    pub fn exit_code(&self) -> u8 {
        if self.is_argument() { 1 } else { 4 }
    }

    /// Whether the caller's arguments caused the error.
    pub fn is_argument(&self) -> bool {
        matches!(self, CudaError::Attention(_) | CudaError::OtherDevice { .. } | CudaError::Element { .. })
    }
}
