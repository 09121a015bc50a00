//! The device: a runtime, and how work over rows is cut on it. What it does is in the file of each `.cu`.
//!
//! Lengths are checked before every launch. Values of index arrays are not: they are on the device, and whoever made them
//! answers for them (a wrong one reads or spoils other device memory, never the host's). [`crate::model`] checks a batch
//! before it goes up.

use super::runtime::{Array, Kernel, Launch, Precision, Runtime};
use super::target_attention::{self, Shape};
use super::tile::{Block, Element};
use super::{CudaError, convert, embedding, layer_norm, limits, loss, naive_attention, optimizer};
use super::{prefix_mean, rows};
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

/// Threads of a block of every kernel that goes over rows.
pub(super) const THREADS: usize = 256;

/// A block of [`THREADS`].
pub(super) const fn block_of(shared_bytes: usize) -> Block {
    Block { warps: THREADS / 32, shared_bytes }
}

/// Shapes of target attention that are looked at without a device: the paper's, and twice as wide.
const TARGET_SHAPES: [Shape; 2] =
    [Shape { width: 32, hidden0: 80, hidden1: 40 }, Shape { width: 64, hidden0: 80, hidden1: 40 }];

/// Every kernel but those of attention, with its largest block.
pub fn step_kernels() -> Vec<(Kernel, Block)> {
    let files = [
        rows::KERNELS,
        embedding::KERNELS,
        layer_norm::KERNELS,
        prefix_mean::KERNELS,
        loss::KERNELS,
        optimizer::KERNELS,
        naive_attention::KERNELS,
        limits::KERNELS,
    ];
    let mut kernels = files.concat();
    for element in [Element::F32, Element::Bf16] {
        let module = convert::module(element);
        kernels.extend(convert::ENTRIES.map(|entry| (Kernel { module, entry }, block_of(0))));
        kernels.extend(TARGET_SHAPES.into_iter().flat_map(|shape| target_attention::kernels(element, shape)));
    }
    kernels
}

/// Values of one access to rows of `width`.
pub(super) fn vector(width: usize) -> usize {
    if width.is_multiple_of(4) { 4 } else { 1 }
}

/// log2 of the lanes that share a row of `width`: as many as have an access of their own, at most a warp.
pub(super) fn lane_bits(width: usize) -> u32 {
    width.div_ceil(vector(width)).next_power_of_two().min(32).trailing_zeros()
}

/// Blocks of [`THREADS`] for `items` items, `per_block` to a block.
pub(super) fn blocks(items: usize, per_block: usize) -> Launch {
    Launch { grid: [items.div_ceil(per_block) as u32, 1], threads: THREADS as u32, shared_bytes: 0 }
}

/// Blocks whose groups of lanes take a row of `width` each.
pub(super) fn by_rows(rows: usize, width: usize) -> Launch {
    blocks(rows, THREADS >> lane_bits(width))
}

/// Rows of a block that leaves a partial sum: at most 512 of those are left. Part of the order of summation, so it depends
/// on the number of rows only.
pub(super) fn block_rows(rows: usize) -> usize {
    rows.div_ceil(512).max(1).next_multiple_of(128)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_by_as_many_lanes_as_they_have_accesses() {
        for (width, vectors, bits) in [
            (32, 4, 3),
            (64, 4, 4),
            (4, 4, 0),
            (8, 4, 1),
            (100, 4, 5),
            (512, 4, 5),
            (1, 1, 0),
            (5, 1, 3),
            (33, 1, 5),
        ] {
            assert_eq!((vector(width), lane_bits(width)), (vectors, bits), "{width}");
        }
        assert_eq!(by_rows(33, 32).grid, [2, 1]);
        assert_eq!([0, 1, 128, 65_536, 65_537, 1 << 20].map(block_rows), [128, 128, 128, 128, 256, 2048]);
    }
}
