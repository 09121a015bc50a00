//! [`Gpu`]: a runtime with the precision of its products. Its operations are in [`ops`](super::ops), a file for each `.cu`.

use super::array::Array;
use super::capture::{self, Captures};
use super::error::CudaError;
use super::kernel::{Kernel, Launch};
use super::runtime::{Precision, Runtime};
use crate::device::DeviceError;
use bytemuck::Pod;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that runs the kernels: a GPU, or the emulator of the tests.
pub struct Gpu<R: Runtime> {
    runtime: Arc<R>,
    precision: Precision,
    /// `None`: nothing is captured.
    captures: Option<Mutex<Captures>>,
}

impl<R: Runtime> Gpu<R> {
    /// On `runtime`, with products in `precision`. Values in memory are f32 either way.
    pub fn new(runtime: R, precision: Precision) -> Self {
        Self { runtime: Arc::new(runtime), precision, captures: None }
    }

    /// With [`Execution::captured`](crate::device::Execution::captured) by CUDA graphs.
    pub fn with_graphs(self) -> Self {
        Self { captures: Some(Mutex::default()), ..self }
    }

    /// What became of the captures so far; `None` without [`Gpu::with_graphs`].
    pub fn captures(&self) -> Option<Captures> {
        self.captures.as_ref().map(|captures| captures.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// What it runs on.
    pub fn runtime(&self) -> &Arc<R> {
        &self.runtime
    }

    /// What products are computed with.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Room for `len` values, content unspecified.
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

    /// Starts a kernel, unless its grid is empty.
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
        // SAFETY: the caller's promises.
        unsafe { self.runtime.launch(kernel, launch, bytemuck::bytes_of(params)) }
    }
}
