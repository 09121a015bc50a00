//! Launches of `step/loss.cu`: losses with gradients. The sums stay on the device.

use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, blocks, by_rows, lane_bits};
use crate::device::cuda::runtime::Runtime;
use crate::device::{DeviceError, Interests, Losses, Slot};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/loss.cu"), entry }
}

const RANK: Kernel = kernel("loss_rank");
const COSINE: Kernel = kernel("loss_cosine");
const REDUCE: Kernel = kernel("loss_reduce");

/// All kernels of the file, each with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (RANK, block_of(BLOCK_SUM_SHARED)),
    (COSINE, block_of(BLOCK_SUM_SHARED)),
    (REDUCE, block_of(BLOCK_SUM_SHARED)),
];

/// Shared memory of a block sum in bytes: one f64 per warp.
pub(crate) const BLOCK_SUM_SHARED: usize = THREADS / 32 * size_of::<f64>();

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RankParams {
    pos: Pointer,
    neg: Pointer,
    target: Pointer,
    d_pos: Pointer,
    d_neg: Pointer,
    partial: Pointer,
    rows: u32,
    bpr: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CosineParams {
    x: Pointer,
    y: Pointer,
    dx: Pointer,
    dy: Pointer,
    partial: Pointer,
    rows: u32,
    width: u32,
    bits: u32,
    weight: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ReduceParams {
    partial: Pointer,
    sums: Pointer,
    count: u32,
    width: u32,
    factor: f64,
}

// As in step/loss.cu.
const _: () = assert!(size_of::<RankParams>() == 56);
const _: () = assert!(size_of::<CosineParams>() == 56);
const _: () = assert!(size_of::<ReduceParams>() == 32);

/// Writes `factor` times the column sums of `partial: [count, width]` to the `width` values from
/// the slot on. Without rows the sums are 0.
pub(crate) fn reduce<R: Runtime>(
    gpu: &Gpu<R>,
    partial: &Array<R, f64>,
    width: usize,
    factor: f64,
    sums: Slot<Array<R, f64>>,
) -> Result<(), CudaError> {
    assert!(sums.index + width <= sums.values.len(), "the slot lies outside its buffer");
    let params = ReduceParams {
        partial: partial.pointer(),
        sums: sums.values.pointer_at(sums.index),
        count: (partial.len() / width) as u32,
        width: width as u32,
        factor,
    };
    let launch = Launch { shared_bytes: BLOCK_SUM_SHARED as u32, ..blocks(1, 1) };
    // SAFETY: lengths are checked above; the slot's buffer is borrowed mutably.
    unsafe { gpu.launch_for_both(REDUCE, launch, &params) }
}

/// 1 / `rows`, or 0 without rows.
fn mean_over(rows: usize) -> f64 {
    if rows == 0 { 0.0 } else { 1.0 / rows as f64 }
}

impl<R: Runtime> Losses for Gpu<R> {
    fn rank_loss(
        &self,
        bpr: f32,
        logits: Interests<&Array<R, f32>>,
        target: &Array<R, f32>,
        gradients: Interests<&mut Array<R, f32>>,
        losses: Slot<Array<R, f64>>,
    ) -> Result<(), DeviceError> {
        let Interests { positive: pos, negative: neg } = logits;
        let Interests { positive: d_pos, negative: d_neg } = gradients;
        let rows = target.len();
        assert_eq!(
            [pos, neg, d_pos, d_neg].map(|x| x.len()),
            [rows; 4],
            "logits, targets and gradients differ in length"
        );
        let launch = blocks(rows, THREADS);
        let partial = self.array::<f64>(launch.grid[0] as usize * 2)?;
        let params = RankParams {
            pos: pos.pointer(),
            neg: neg.pointer(),
            target: target.pointer(),
            d_pos: d_pos.pointer(),
            d_neg: d_neg.pointer(),
            partial: partial.pointer(),
            rows: rows as u32,
            bpr,
        };
        // SAFETY: lengths are checked above; the gradients are borrowed mutably; partial has two
        // values per block.
        unsafe { self.launch(RANK, Launch { shared_bytes: BLOCK_SUM_SHARED as u32, ..launch }, &params)? };
        Ok(reduce(self, &partial, 2, mean_over(rows), losses)?)
    }

    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        vectors: Interests<&Array<R, f32>>,
        gradients: Interests<&mut Array<R, f32>>,
        loss: Slot<Array<R, f64>>,
    ) -> Result<(), DeviceError> {
        let Interests { positive: x, negative: y } = vectors;
        let Interests { positive: dx, negative: dy } = gradients;
        assert!(x.len().is_multiple_of(width), "x is not [rows, width]");
        assert_eq!([y, dx, dy].map(|a| a.len()), [x.len(); 3], "x, y and their gradients differ in length");
        let rows = x.len() / width;
        let launch = by_rows(rows, width);
        let partial = self.array::<f64>(launch.grid[0] as usize)?;
        let params = CosineParams {
            x: x.pointer(),
            y: y.pointer(),
            dx: dx.pointer(),
            dy: dy.pointer(),
            partial: partial.pointer(),
            rows: rows as u32,
            width: width as u32,
            bits: lane_bits(width),
            weight,
        };
        // SAFETY: lengths are checked above; the gradients are borrowed mutably; partial has one
        // value per block.
        unsafe {
            self.launch_for_both(COSINE, Launch { shared_bytes: BLOCK_SUM_SHARED as u32, ..launch }, &params)?
        };
        Ok(reduce(self, &partial, 1, mean_over(rows), loss)?)
    }
}
