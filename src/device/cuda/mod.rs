//! NVIDIA GPUs: runs the kernels of `kernels/`, compiled at run time. The crate builds without
//! CUDA.
//!
//! | module | imports | contents |
//! |---|---|---|
//! | `tensors` | `driver`, `ops` | attention on memory and streams of another library |
//! | `device` | `ops`, `gpu` | [`Device`](crate::device::Device) for [`Gpu`]; all kernels |
//! | `ops` | `gpu`, `plan` | the operations: modules, entry points, launches |
//! | `gpu`, `capture` | `array` | [`Gpu`]: a runtime and its precision; CUDA graph capture |
//! | `array` | `runtime` | arrays in device memory; staging of several for one copy |
//! | `driver` | `runtime` | [`Cuda`]: a GPU as a runtime; NVRTC and its cache; cuBLASLt |
//! | [`runtime`] | `kernel` | the trait between: memory, launches and matrix products |
//! | `plan` | `kernel` | tiles and blocks of a batch: functions of shapes and device limits |
//! | `kernel`, `error` | | names of kernels and types; [`CudaError`] |
//!
//! Imports point down this table only. `driver` contains all foreign function calls. Above it,
//! `unsafe` marks kernel launches, whose arguments are checked first.

// Hidden: for the binaries, the benches and the emulator of the tests, without promises.
#[doc(hidden)]
pub mod array;
pub(crate) mod capture;
#[doc(hidden)]
pub mod device;
#[doc(hidden)]
pub mod driver;
pub(crate) mod error;
pub(crate) mod gpu;
#[doc(hidden)]
pub mod kernel;
#[doc(hidden)]
pub mod ops;
#[doc(hidden)]
pub mod plan;
pub mod runtime;
#[doc(hidden)]
pub mod tensors;

pub use crate::device::Precision;
pub use capture::Captures;
pub use driver::context::{Cuda, device_count};
pub use error::CudaError;
pub use gpu::Gpu;
pub use kernel::Element;
