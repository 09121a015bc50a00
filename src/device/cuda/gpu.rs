//! [`Gpu`]: a runtime and the precision of its products. [`ops`](super::ops) implements its
//! operations.

use super::array::Array;
use super::capture::{self, Captures};
use super::error::CudaError;
use super::kernel::{Kernel, Launch};
use super::runtime::Runtime;
use crate::device::DeviceError;
use crate::device::Precision;
use bytemuck::Pod;
use std::sync::{Arc, Mutex, PoisonError};

/// The device of the model: a GPU, or the emulator in tests.
pub struct Gpu<R: Runtime> {
    runtime: Arc<R>,
    precision: Precision,
    /// `None` if CUDA graphs are off.
    captures: Option<Mutex<Captures>>,
}

impl<R: Runtime> Gpu<R> {
    /// A device on `runtime`. `precision` is that of the matrix products; values in memory are f32.
    pub fn new(runtime: R, precision: Precision) -> Self {
        Self { runtime: Arc::new(runtime), precision, captures: None }
    }

    /// Enables CUDA graphs in [`Execution::captured`](crate::device::Execution::captured).
    pub fn with_graphs(self) -> Self {
        Self { captures: Some(Mutex::default()), ..self }
    }

    /// Capture counts so far; `None` without [`Gpu::with_graphs`].
    pub fn captures(&self) -> Option<Captures> {
        self.captures.as_ref().map(|captures| captures.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The runtime.
    pub fn runtime(&self) -> &Arc<R> {
        &self.runtime
    }

    /// Precision of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `len` values of unspecified content.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn array<T: Pod>(&self, len: usize) -> Result<Array<R, T>, CudaError> {
        Array::new(&self.runtime, len)
    }

    /// A copy of `host` on the device.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::write`].
    pub fn copy_of<T: Pod>(&self, host: &[T]) -> Result<Array<R, T>, CudaError> {
        Array::of(&self.runtime, host)
    }

    /// See [`crate::device::Execution::captured`].
    pub(super) fn captured_work<T>(
        &self,
        work: impl FnMut() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        capture::captured(&*self.runtime, self.captures.as_ref(), work)
    }

    /// Launches a kernel unless its grid is empty.
    ///
    /// # Safety
    /// As [`Runtime::launch`].
    pub(super) unsafe fn launch<P: Pod>(
        &self,
        kernel: Kernel,
        launch: Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { self.runtime.launch(kernel, launch, bytemuck::bytes_of(params)) }
    }
}
