//! [`CudaError`], the error of all CUDA code.

use super::kernel::{Arch, Element};
use crate::attention::AttentionError;
use crate::device::DeviceError;
use cudarc::driver::{DriverError, sys::CUresult};
use thiserror::Error;

/// An unusable GPU, a failed driver call, or arguments that the operation rejects.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// Invalid arguments of the attention operation.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// No NVIDIA driver is installed.
    #[error("cuda: no NVIDIA driver found (libcuda cannot be loaded)")]
    NoDriver,
    /// The requested device does not exist.
    #[error("cuda: device {ordinal} does not exist; the driver reports {found}")]
    NoDevice {
        /// Requested device number, from 0.
        ordinal: usize,
        /// Number of devices the driver reports.
        found: usize,
    },
    /// The GPU is older than the oldest supported architecture.
    #[error("cuda: {name} is {}, but the kernels need {} or later", arch.name(), Arch::OLDEST.name())]
    OldDevice {
        /// Name of the GPU.
        name: String,
        /// Compute capability of the GPU.
        arch: Arch,
    },
    /// The NVRTC library cannot be loaded.
    #[error(
        "cuda: NVRTC cannot be loaded (tried {} on the loader's path, in pip's packages, $CUDA_HOME and \
         /usr/local/cuda); install the CUDA toolkit of the driver's major version, or pip's package",
        tried.join(", ")
    )]
    NoNvrtc {
        /// Library names tried.
        tried: Vec<String>,
    },
    /// The NVRTC library is too old for the kernels.
    #[error("cuda: NVRTC is {}.{}, but the kernels need {}.{} or later", found.0, found.1, oldest.0, oldest.1)]
    OldNvrtc {
        /// Version found.
        found: (i32, i32),
        /// Version needed.
        oldest: (i32, i32),
    },
    /// NVRTC rejects a kernel.
    #[error("cuda: {kernel} does not compile for {arch} with {}: {error}\n{log}", options.join(" "))]
    Compile {
        /// Source file.
        kernel: &'static str,
        /// Target architecture.
        arch: String,
        /// NVRTC options.
        options: Vec<String>,
        /// NVRTC's error.
        error: String,
        /// The compiler's log.
        log: String,
    },
    /// The cuBLASLt library cannot be loaded.
    #[error(
        "cuda: cuBLASLt cannot be loaded (tried {} on the loader's path, in pip's packages, $CUDA_HOME and \
         /usr/local/cuda); install the CUDA toolkit of the driver's major version, or pip's package",
        tried.join(", ")
    )]
    NoBlas {
        /// Library names tried.
        tried: Vec<String>,
    },
    /// A cuBLASLt call failed.
    #[error("cuda: {action} failed in cuBLASLt with status {status}")]
    Blas {
        /// The failed call, e.g. with the shape of the product.
        action: String,
        /// The `cublasStatus_t`.
        status: i32,
    },
    /// A device allocation failed.
    #[error("cuda: out of device memory: {bytes} bytes requested; use a smaller batch")]
    OutOfMemory {
        /// Bytes requested.
        bytes: usize,
    },
    /// Parameters and optimizer state exceed the free device memory.
    #[error(
        "cuda: {parameters} parameters with their optimizer state need {:.2} GiB, \
         but {:.2} of the device's {:.2} GiB are free; \
         choose a smaller --width, leave out --dense-embeddings, or use --device cpu",
        gib(*needed), gib(*free), gib(*total)
    )]
    NoRoom {
        /// Number of model parameters.
        parameters: usize,
        /// Bytes of parameters and optimizer state.
        needed: usize,
        /// Free device memory in bytes.
        free: usize,
        /// Total device memory in bytes.
        total: usize,
    },
    /// A driver call failed.
    #[error("cuda: {action} failed: {message}")]
    Driver {
        /// The failed action.
        action: &'static str,
        /// The driver's error message.
        message: String,
    },
    /// A launch's argument has another size than the kernel's parameter: a fault of this library.
    #[error("cuda: {kernel} takes {needed} bytes of parameters, but the library passes {given}")]
    Parameter {
        /// The kernel.
        kernel: &'static str,
        /// Bytes that the library passes.
        given: usize,
        /// Bytes that the kernel declares.
        needed: usize,
    },
    /// The action cannot be recorded during a CUDA graph capture.
    #[error("cuda: {action} cannot be part of a CUDA graph")]
    NotCaptured {
        /// The action.
        action: &'static str,
    },
    /// An argument belongs to another device.
    #[error("cuda: {name} belongs to another device; pass arrays of the device that runs the call")]
    OtherDevice {
        /// Name of the argument.
        name: &'static str,
    },
    /// An address of another library that the kernels cannot use.
    #[error("cuda: {name} is at address {at:#x}, but must be device memory aligned to 16 bytes")]
    Misaligned {
        /// Name of the argument.
        name: &'static str,
        /// Its address.
        at: u64,
    },
    /// The per-thread default stream, which is another stream in each thread.
    #[error(
        "cuda: the stream is the per-thread default stream (handle 2), whose scratch memory threads would \
         share; pass a stream that was created, or the legacy default stream (handle 0 or 1)"
    )]
    PerThreadStream,
    /// The element type of the tensors differs from that of the plan.
    #[error("cuda: the batch was planned for {}, but the tensors are {}", planned.name(), given.name())]
    Element {
        /// Element type of the plan.
        planned: Element,
        /// Element type of the tensors.
        given: Element,
    },
    /// No kernel is compiled for this head width.
    #[error("cuda: head_dim is {head_dim}, but attention kernels exist for 8, 16, 32, 64 and 128")]
    HeadDim {
        /// Requested head width.
        head_dim: usize,
    },
    /// No target attention kernel is compiled for tokens of this width.
    #[error(
        "cuda: no target attention kernel for tokens of width {width} (at most {widest}); use --device cpu"
    )]
    TargetWidth {
        /// Width `D` of the model.
        width: usize,
        /// Largest compiled width.
        widest: usize,
    },
    /// A block needs more shared memory than the device allows.
    #[error(
        "cuda: pass {pass} needs {needed} bytes of shared memory per block, but the device has {available}"
    )]
    SharedMemory {
        /// Name of the pass.
        pass: &'static str,
        /// Bytes that the smallest block needs.
        needed: usize,
        /// Bytes per block that the device allows.
        available: usize,
    },
    /// The batch has too many query rows for one call.
    #[error("cuda: the batch has {rows} query rows, more than the limit of {} per call; split it", i32::MAX)]
    TooLarge {
        /// Query rows, `N * Q`.
        rows: usize,
    },
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl CudaError {
    /// A driver error during `action`. `bytes` is the size of a requested allocation, otherwise 0.
    pub(crate) fn driver(action: &'static str, error: DriverError, bytes: usize) -> CudaError {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY if bytes > 0 => CudaError::OutOfMemory { bytes },
            _ => CudaError::Driver { action, message: error.to_string() },
        }
    }

    /// The CUDA error that `error` holds, if any.
    pub fn of(error: &DeviceError) -> Option<&CudaError> {
        match error {
            DeviceError::Backend(error) => error.downcast_ref(),
            _ => None,
        }
    }

    /// Exit code of the binaries: 1 for invalid arguments, 4 for an unusable GPU.
    pub fn exit_code(&self) -> u8 {
        if self.is_argument() { 1 } else { 4 }
    }

    /// Whether invalid arguments of the caller caused the error.
    pub fn is_argument(&self) -> bool {
        matches!(
            self,
            CudaError::Attention(_)
                | CudaError::OtherDevice { .. }
                | CudaError::Misaligned { .. }
                | CudaError::PerThreadStream
                | CudaError::Element { .. }
                | CudaError::HeadDim { .. }
                | CudaError::TargetWidth { .. }
                | CudaError::TooLarge { .. }
        )
    }
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        DeviceError::Backend(Box::new(error))
    }
}
