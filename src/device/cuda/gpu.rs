//! The model's operations on a [`Runtime`]: what is checked, launched and multiplied, in which order.
//!
//! Lengths are checked before every launch. Values of index arrays are not: they are on the device, and whoever made them
//! answers for them (a wrong one reads or spoils other device memory, never the host's). [`crate::model`] checks a batch
//! before it goes up.

use super::CudaError;
use super::runtime::{Array, Kernel, Launch, Precision, Runtime};
use bytemuck::Pod;
use std::sync::Arc;

/// A device that runs the kernels: a GPU, or the emulator of the tests.
pub struct Gpu<R: Runtime> {
    runtime: Arc<R>,
    precision: Precision,
}

impl<R: Runtime> Gpu<R> {
    /// On `runtime`, with products in `precision`. Values in memory are f32 either way.
    pub fn new(runtime: R, precision: Precision) -> Self {
        Self { runtime: Arc::new(runtime), precision }
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

/// A one-dimensional launch of enough blocks of `threads` threads for `items` items, `per_block` to a block.
pub(super) fn blocks(items: usize, per_block: usize, threads: usize) -> Launch {
    Launch { grid: [items.div_ceil(per_block) as u32, 1], threads: threads as u32, shared_bytes: 0 }
}
