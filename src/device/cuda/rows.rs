//! Launches of `rows.cu`: passes over rows of activations.

use super::CudaError;
use super::compile::Module;
use super::gpu::{Gpu, blocks};
use super::params::Pointer;
use super::runtime::{Array, Kernel, Runtime};
use bytemuck::{Pod, Zeroable};

const THREADS: usize = 256;

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("rows.cu"), entry }
}

/// Every kernel of the file.
pub const KERNELS: &[Kernel] = &[kernel("rows_add")];

/// As `AddParams` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AddParams {
    x: Pointer,
    y: Pointer,
    len: u64,
}

impl<R: Runtime> Gpu<R> {
    /// `y += x`
    ///
    /// # Errors
    /// What the runtime reports.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_rows(&self, x: &Array<R, f32>, y: &mut Array<R, f32>) -> Result<(), CudaError> {
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        let params = AddParams { x: x.pointer(), y: y.pointer(), len: x.len() as u64 };
        let launch = blocks(x.len(), THREADS * 4, THREADS);
        // SAFETY: both arrays have `len` values, and y is borrowed mutably.
        unsafe { self.launch(kernel("rows_add"), launch, &params) }
    }
}
