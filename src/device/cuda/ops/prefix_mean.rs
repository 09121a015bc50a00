//! Launches of `step/prefix_mean.cu`.

use crate::device::cuda::array::Array;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, lane_bits, vector};
use crate::device::cuda::runtime::Runtime;
use crate::device::{DeviceError, PrefixMean, Prefixes};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/prefix_mean.cu"), entry }
}

const FORWARD: Kernel = kernel("prefix_mean_forward");
const BACKWARD: Kernel = kernel("prefix_mean_backward");

/// All kernels of the file, each with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[(FORWARD, block_of(SHARED)), (BACKWARD, block_of(SHARED))];

/// f64 sums of four columns per thread.
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
    position: Pointer,
    rate: f64,
    width: u32,
    bits: u32,
}

// As in step/prefix_mean.cu.
const _: () = assert!(size_of::<PrefixMeanParams>() == 72);

fn params<R: Runtime>(
    width: usize,
    prefixes: Prefixes<&Array<R, u32>>,
    x: &Array<R, f32>,
    mean: &Array<R, f32>,
) -> (Launch, PrefixMeanParams) {
    let Prefixes { cu_seqlens, group_offsets, count, divisor, recency } = prefixes;
    assert_eq!(cu_seqlens.len(), group_offsets.len(), "cu_seqlens and group_offsets differ in length");
    assert_eq!(count.len(), divisor.len(), "count and divisor differ in length");
    assert!(x.len().is_multiple_of(width), "x is not [tokens, width]");
    assert_eq!(mean.len(), count.len() * width, "mean is not [groups, width]");
    let (position, rate) = match recency {
        None => (0, 0.0),
        Some(recency) => {
            assert_eq!(recency.position.len() * width, x.len(), "position is not [tokens]");
            (recency.position.pointer(), recency.rate())
        }
    };
    let bits = lane_bits(width);
    let chunks = width.div_ceil(vector(width) << bits);
    let grid = [cu_seqlens.len().saturating_sub(1) as u32, chunks as u32];
    let params = PrefixMeanParams {
        start: cu_seqlens.pointer(),
        group_offsets: group_offsets.pointer(),
        count: count.pointer(),
        divisor: divisor.pointer(),
        x: x.pointer(),
        mean: mean.pointer(),
        position,
        rate,
        width: width as u32,
        bits,
    };
    (Launch { grid, threads: THREADS as u32, shared_bytes: SHARED as u32 }, params)
}

impl<R: Runtime> PrefixMean for Gpu<R> {
    fn prefix_mean(
        &self,
        width: usize,
        prefixes: Prefixes<&Array<R, u32>>,
        x: &Array<R, f32>,
        mean: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        let (launch, params) = params(width, prefixes, x, mean);
        // SAFETY: `params` has checked the lengths; the caller guarantees offsets and counts; mean
        // is borrowed mutably.
        unsafe { self.launch_for_both(FORWARD, launch, &params)? };
        Ok(())
    }

    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Array<R, u32>>,
        dmean: &Array<R, f32>,
        dx: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        let (launch, params) = params(width, prefixes, dx, dmean);
        // SAFETY: `params` has checked the lengths; the caller guarantees offsets and counts; dx is
        // borrowed mutably.
        unsafe { self.launch_for_both(BACKWARD, launch, &params)? };
        Ok(())
    }
}
