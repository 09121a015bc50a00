//! Launches of `prefix_mean.cu`.

use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, lane_bits, vector};
use crate::device::cuda::runtime::Runtime;
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("prefix_mean.cu"), entry }
}

const FORWARD: Kernel = kernel("prefix_mean_forward");
const BACKWARD: Kernel = kernel("prefix_mean_backward");

/// Every kernel of the file, with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[(FORWARD, block_of(SHARED)), (BACKWARD, block_of(SHARED))];

/// Sums of four columns a thread.
const SHARED: usize = THREADS * 4 * size_of::<f64>();

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PrefixMeanParams {
    start: Pointer,
    group_offsets: Pointer,
    count: Pointer,
    divisor: Pointer,
    x: Pointer,
    mean: Pointer,
    width: u32,
    bits: u32,
}

// As in prefix_mean.cu.
const _: () = assert!(size_of::<PrefixMeanParams>() == 56);

/// What both directions are told about sequences and groups; see [`crate::device::Device::prefix_mean`].
pub(crate) struct Groups<'a, R: Runtime> {
    pub start: &'a Array<R, u32>,
    pub group_offsets: &'a Array<R, u32>,
    pub count: &'a Array<R, u32>,
    pub divisor: &'a Array<R, u32>,
}

fn params<R: Runtime>(
    width: usize,
    groups: &Groups<R>,
    x: &Array<R, f32>,
    mean: &Array<R, f32>,
) -> (Launch, PrefixMeanParams) {
    let Groups { start, group_offsets, count, divisor } = groups;
    assert_eq!(start.len(), group_offsets.len(), "start and group_offsets differ in length");
    assert_eq!(count.len(), divisor.len(), "count and divisor differ in length");
    assert!(x.len().is_multiple_of(width), "x is not [tokens, width]");
    assert_eq!(mean.len(), count.len() * width, "mean is not [groups, width]");
    let bits = lane_bits(width);
    let chunks = width.div_ceil(vector(width) << bits);
    let grid = [start.len().saturating_sub(1) as u32, chunks as u32];
    let params = PrefixMeanParams {
        start: start.pointer(),
        group_offsets: group_offsets.pointer(),
        count: count.pointer(),
        divisor: divisor.pointer(),
        x: x.pointer(),
        mean: mean.pointer(),
        width: width as u32,
        bits,
    };
    (Launch { grid, threads: THREADS as u32, shared_bytes: SHARED as u32 }, params)
}

/// See [`crate::device::Device::prefix_mean`].
pub(crate) fn forward<R: Runtime>(
    gpu: &Gpu<R>,
    width: usize,
    groups: Groups<R>,
    x: &Array<R, f32>,
    mean: &mut Array<R, f32>,
) -> Result<(), CudaError> {
    let (launch, params) = params(width, &groups, x, mean);
    // SAFETY: `params` has checked the lengths; offsets and counts are their maker's; mean is borrowed mutably.
    unsafe { gpu.launch(FORWARD, launch, &params) }
}

/// See [`crate::device::Device::prefix_mean_backward`].
pub(crate) fn backward<R: Runtime>(
    gpu: &Gpu<R>,
    width: usize,
    groups: Groups<R>,
    dmean: &Array<R, f32>,
    dx: &mut Array<R, f32>,
) -> Result<(), CudaError> {
    let (launch, params) = params(width, &groups, dx, dmean);
    // SAFETY: `params` has checked the lengths; offsets and counts are their maker's; dx is borrowed mutably.
    unsafe { gpu.launch(BACKWARD, launch, &params) }
}
