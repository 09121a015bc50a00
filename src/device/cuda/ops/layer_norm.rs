//! Launches of `step/layer_norm.cu`.

use super::embedding::{TableRows, tables_of};
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, block_rows, by_rows, lane_bits, vector};
use crate::device::cuda::runtime::Runtime;
use crate::device::{DeviceError, LayerNorm, LayerNormGradients, Lookup, Norm, Output, Store};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/layer_norm.cu"), entry }
}

const NORM: Kernel = kernel("layer_norm");
const NORM_ADD: Kernel = kernel("layer_norm_add");
const NORM_GATHER: Kernel = kernel("layer_norm_gather");
const BACKWARD: Kernel = kernel("layer_norm_backward");

/// All kernels of the file, each with a typical block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (NORM, block_of(0)),
    (NORM_ADD, block_of(0)),
    (NORM_GATHER, block_of(0)),
    (BACKWARD, block_of(backward_shared(128, 4))),
];

/// Shared memory in bytes: two statistics per row, and partial sums of two gradients per thread.
const fn backward_shared(block_rows: usize, vector: usize) -> usize {
    block_rows * 2 * size_of::<f32>() + THREADS * 2 * vector * size_of::<f32>()
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NormParams {
    tables: [Pointer; 4],
    index: [Pointer; 4],
    x: Pointer,
    y: Pointer,
    gamma: Pointer,
    beta: Pointer,
    n: Pointer,
    rows: u32,
    width: u32,
    table_count: u32,
    bits: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NormBackwardParams {
    x: Pointer,
    gamma: Pointer,
    dn: Pointer,
    dx: Pointer,
    partial: Pointer,
    rows: u32,
    width: u32,
    block_rows: u32,
    bits: u32,
    adds: u32,
    unused: u32,
}

// As in step/layer_norm.cu.
const _: () = assert!(size_of::<NormParams>() == 120);
const _: () = assert!(size_of::<NormBackwardParams>() == 64);

/// The input of a layer norm. The same kernel computes it.
enum Input<'a, R: Runtime> {
    /// `x`.
    Given(&'a Array<R, f32>),
    /// `(x, y)`: adds `x` to `y`; the input is `y`.
    Sum(&'a Array<R, f32>, &'a mut Array<R, f32>),
    /// `(tables, y)`: gathers and sums table rows to `y`; the input is `y`.
    Tables(&'a [TableRows<'a, R>], &'a mut Array<R, f32>),
}

fn forward<R: Runtime>(
    gpu: &Gpu<R>,
    norm: LayerNorm<&Array<R, f32>>,
    input: Input<R>,
    n: &mut Array<R, f32>,
) -> Result<(), CudaError> {
    let LayerNorm { width, gamma, beta } = norm;
    let mut params = NormParams::zeroed();
    let (kernel, y) = match input {
        Input::Given(y) => (NORM, y),
        Input::Sum(x, y) => {
            assert_eq!(x.len(), y.len(), "x and y differ in length");
            params.x = x.pointer();
            (NORM_ADD, &*y)
        }
        Input::Tables(tables, y) => {
            let (values, index, rows) = tables_of(tables);
            assert_eq!(y.len(), rows * width, "y is not [rows, width]");
            (params.tables, params.index, params.table_count) = (values, index, tables.len() as u32);
            (NORM_GATHER, &*y)
        }
    };
    assert!(y.len().is_multiple_of(width), "y is not [rows, width]");
    assert_eq!([gamma.len(), beta.len()], [width; 2], "gamma and beta are not [width]");
    assert_eq!(n.len(), y.len(), "n and y differ in length");
    let rows = y.len() / width;
    let params = NormParams {
        y: y.pointer(),
        gamma: gamma.pointer(),
        beta: beta.pointer(),
        n: n.pointer(),
        rows: rows as u32,
        width: width as u32,
        bits: lane_bits(width),
        ..params
    };
    // SAFETY: lengths are checked above; the caller guarantees the index values; the arrays that
    // the kernel writes are borrowed mutably.
    unsafe { gpu.launch_for_both(kernel, by_rows(rows, width), &params) }
}

impl<R: Runtime> Norm for Gpu<R> {
    fn layer_norm(
        &self,
        norm: LayerNorm<&Array<R, f32>>,
        x: &Array<R, f32>,
        y: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        Ok(forward(self, norm, Input::Given(x), y)?)
    }

    fn gather_layer_norm(
        &self,
        norm: LayerNorm<&Array<R, f32>>,
        tables: &[Lookup<&Array<R, f32>, &Array<R, u32>>],
        y: &mut Array<R, f32>,
        n: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        Ok(forward(self, norm, Input::Tables(tables, y), n)?)
    }

    fn add_layer_norm(
        &self,
        norm: LayerNorm<&Array<R, f32>>,
        x: &Array<R, f32>,
        y: &mut Array<R, f32>,
        n: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        Ok(forward(self, norm, Input::Sum(x, y), n)?)
    }

    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Array<R, f32>>,
        x: &Array<R, f32>,
        dn: &Array<R, f32>,
        gradients: LayerNormGradients<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let LayerNorm { width, gamma, .. } = norm;
        let LayerNormGradients { dx: Output { values: dx, store }, dgamma, dbeta } = gradients;
        assert!(x.len().is_multiple_of(width), "x is not [rows, width]");
        assert_eq!([dn.len(), dx.len()], [x.len(); 2], "x, dn and dx differ in length");
        assert_eq!(
            [gamma.len(), dgamma.len(), dbeta.len()],
            [width; 3],
            "gamma, dgamma and dbeta are not [width]"
        );
        let rows = x.len() / width;
        let block_rows = block_rows(rows);
        let count = rows.div_ceil(block_rows);
        let partial = self.array::<f32>(count * 2 * width)?;
        let params = NormBackwardParams {
            x: x.pointer(),
            gamma: gamma.pointer(),
            dn: dn.pointer(),
            dx: dx.pointer(),
            partial: partial.pointer(),
            rows: rows as u32,
            width: width as u32,
            block_rows: block_rows as u32,
            bits: lane_bits(width),
            adds: (store == Store::Add).into(),
            unused: 0,
        };
        let shared_bytes = backward_shared(block_rows, vector(width)) as u32;
        let launch = Launch { grid: [count as u32, 1], threads: THREADS as u32, shared_bytes };
        // SAFETY: lengths are checked above; dx is borrowed mutably; partial has one row per block.
        unsafe { self.launch_for_both(BACKWARD, launch, &params)? };
        self.sum_later(&partial, 2 * width, 0..count, 0, dgamma);
        self.sum_later(&partial, 2 * width, 0..count, width, dbeta);
        Ok(())
    }
}
