//! NVIDIA GPUs: the kernels of `kernels/`, compiled at run time. Building the crate needs no CUDA.
//!
//! | above | uses | what it holds |
//! |---|---|---|
//! | [`device`] | `ops`, `gpu` | [`Device`](crate::device::Device) for [`Gpu`], and the list of all kernels |
//! | [`ops`] | `gpu`, `plan` | the model's operations, one file for each `.cu`: modules, entry points, launches |
//! | `gpu`, `capture` | `array` | [`Gpu`]: a runtime with its precision; a training step as a CUDA graph |
//! | [`mod@array`] | `runtime` | arrays in device memory, and staging of several for one copy |
//! | [`driver`] | `runtime` | [`Cuda`]: a GPU as a runtime; NVRTC and its cache; cuBLASLt |
//! | [`runtime`] | `kernel` | the trait between: memory, launches and matrix products |
//! | [`plan`] | `kernel` | how a batch is cut into tiles and blocks: pure functions of shapes and limits |
//! | [`kernel`], `error` | | names of kernels and types; [`CudaError`] |
//!
//! Imports point down this table only. All foreign functions are called in [`driver`]; above it, `unsafe` marks a kernel
//! launch, whose arguments the caller has checked.

pub mod array;
pub(crate) mod capture;
pub mod device;
pub mod driver;
pub(crate) mod error;
pub(crate) mod gpu;
pub mod kernel;
pub mod ops;
pub mod plan;
pub mod runtime;

pub use capture::Captures;
pub use driver::context::{Cuda, device_count};
pub use error::CudaError;
pub use gpu::Gpu;
pub use kernel::Element;
pub use runtime::Precision;
