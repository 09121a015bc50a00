//! Launches of `step/rows.cu`: memory-bound passes over rows of activations.

use super::embedding::{SegmentedSum, segmented_sum};
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, block_rows, blocks, by_rows, lane_bits, vector};
use crate::device::cuda::runtime::Runtime;
use crate::device::{Columns, ConcatPart, DeviceError, Output, Rows, Segments, Store};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/rows.cu"), entry }
}

const ADD: Kernel = kernel("rows_add");
const COLUMN_SUMS: Kernel = kernel("rows_column_sums");
const CONCAT: Kernel = kernel("rows_concat");
const TAKE_PART: Kernel = kernel("rows_take_part");
const SPLIT: Kernel = kernel("rows_split");
const MERGE: Kernel = kernel("rows_merge");

/// All kernels of the file, each with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (ADD, block_of(0)),
    (COLUMN_SUMS, block_of(COLUMN_SUMS_SHARED)),
    (CONCAT, block_of(0)),
    (TAKE_PART, block_of(0)),
    (SPLIT, block_of(0)),
    (MERGE, block_of(0)),
];

/// f32 partial sums of four columns per thread.
const COLUMN_SUMS_SHARED: usize = THREADS * 4 * size_of::<f32>();

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AddParams {
    x: Pointer,
    y: Pointer,
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ColumnSumParams {
    y: Pointer,
    dy: Pointer,
    partial: Pointer,
    rows: u32,
    width: u32,
    block_rows: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConcatParams {
    parts: [Pointer; 4],
    index: [Pointer; 4],
    y: Pointer,
    rows: u32,
    width: u32,
    bits: u32,
    part_count: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TakePartParams {
    dy: Pointer,
    dx: Pointer,
    rows: u32,
    width: u32,
    part: u32,
    parts: u32,
    bits: u32,
    adds: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SplitParams {
    index: [Pointer; 2],
    x: Pointer,
    y: Pointer,
    count: [u32; 2],
    width: u32,
    bits: u32,
    adds: u32,
    unused: u32,
}

// As in step/rows.cu.
const _: () = assert!(size_of::<AddParams>() == 24);
const _: () = assert!(size_of::<ColumnSumParams>() == 40);
const _: () = assert!(size_of::<ConcatParams>() == 88);
const _: () = assert!(size_of::<TakePartParams>() == 40);
const _: () = assert!(size_of::<SplitParams>() == 56);

impl<R: Runtime> Rows for Gpu<R> {
    fn add(&self, x: &Array<R, f32>, y: &mut Array<R, f32>) -> Result<(), DeviceError> {
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        let params = AddParams { x: x.pointer(), y: y.pointer(), len: x.len() as u64 };
        // SAFETY: both arrays have `len` values, and y is borrowed mutably.
        unsafe { self.launch_for_both(ADD, blocks(x.len(), THREADS * 4), &params)? };
        Ok(())
    }

    fn concat(
        &self,
        width: usize,
        parts: &[ConcatPart<&Array<R, f32>, &Array<R, u32>>],
        y: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        assert!((1..=4).contains(&parts.len()), "1 to 4 parts, not {}", parts.len());
        assert!(y.len().is_multiple_of(parts.len() * width), "y is not [rows, parts * width]");
        let rows = y.len() / (parts.len() * width);
        let mut params = ConcatParams {
            y: y.pointer(),
            rows: rows as u32,
            width: width as u32,
            bits: lane_bits(width),
            part_count: parts.len() as u32,
            ..ConcatParams::zeroed()
        };
        for (i, ConcatPart { values: x, index }) in parts.iter().enumerate() {
            match index {
                Some(index) => assert_eq!(index.len(), rows, "an index is not [rows]"),
                None => assert_eq!(x.len(), rows * width, "a part without an index is not [rows, width]"),
            }
            params.parts[i] = x.pointer();
            params.index[i] = index.map_or(0, Array::pointer);
        }
        let Launch { grid: [x, _], .. } = by_rows(rows, width);
        let launch = Launch { grid: [x, parts.len() as u32], ..by_rows(rows, width) };
        // SAFETY: lengths are checked above; the caller guarantees the index values; y is borrowed
        // mutably.
        unsafe { self.launch_for_both(CONCAT, launch, &params)? };
        Ok(())
    }

    fn concat_backward(
        &self,
        columns: Columns,
        dy: &Array<R, f32>,
        segments: Option<Segments<&Array<R, u32>>>,
        dx: Output<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let Columns { width, part, parts } = columns;
        if let Some(segments) = segments {
            let (stride, column) = (parts * width, part * width);
            let sum = SegmentedSum { sources: &[dy], stride, column, width, segments, l2: None };
            return Ok(segmented_sum(self, sum, dx)?);
        }
        let Output { values: dx, store } = dx;
        assert!(dx.len().is_multiple_of(width) && part < parts, "dx is not [rows, width]");
        assert_eq!(dy.len(), dx.len() * parts, "dy is not [rows, parts * width]");
        let rows = dx.len() / width;
        let params = TakePartParams {
            dy: dy.pointer(),
            dx: dx.pointer(),
            rows: rows as u32,
            width: width as u32,
            part: part as u32,
            parts: parts as u32,
            bits: lane_bits(width),
            adds: (store == Store::Add).into(),
        };
        // SAFETY: lengths are checked above; dx is borrowed mutably.
        unsafe { self.launch_for_both(TAKE_PART, by_rows(rows, width), &params)? };
        Ok(())
    }
}

/// Writes the column sums of `dy: [rows, width]` to `sums`. Without `sums`, only masks `dy`.
pub(crate) fn column_sums<R: Runtime>(
    gpu: &Gpu<R>,
    width: usize,
    dy: Dy<R>,
    sums: Option<&mut Array<R, f32>>,
) -> Result<(), CudaError> {
    let (dy, y) = match dy {
        Dy::Read(dy) => (dy, None),
        Dy::Masked { dy, y } => (&*dy, Some(y)),
    };
    assert!(dy.len().is_multiple_of(width), "dy is not [rows, width]");
    assert!(y.is_none_or(|y| y.len() == dy.len()), "y and dy differ in length");
    let rows = dy.len() / width;
    let block_rows = block_rows(rows);
    let count = rows.div_ceil(block_rows);
    let partial = gpu.array::<f32>(count * width)?;
    let params = ColumnSumParams {
        y: y.map_or(0, Array::pointer),
        dy: dy.pointer(),
        partial: partial.pointer(),
        rows: rows as u32,
        width: width as u32,
        block_rows: block_rows as u32,
        unused: 0,
    };
    let chunks = (width / vector(width)).div_ceil(THREADS);
    let launch = Launch {
        grid: [count as u32, chunks as u32],
        threads: THREADS as u32,
        shared_bytes: COLUMN_SUMS_SHARED as u32,
    };
    // SAFETY: lengths are checked above; partial has the size of this grid; dy is borrowed mutably
    // if it is written.
    unsafe { gpu.launch(COLUMN_SUMS, launch, &params)? };
    if let Some(sums) = sums {
        assert_eq!(sums.len(), width, "the sums are not [width]");
        gpu.sum_later(&partial, width, 0..count, 0, sums);
    }
    Ok(())
}

/// A gradient: read, or first multiplied in place by the derivative of ReLU, which is 0 where
/// `y <= 0`.
pub(crate) enum Dy<'a, R: Runtime> {
    Read(&'a Array<R, f32>),
    Masked { dy: &'a mut Array<R, f32>, y: &'a Array<R, f32> },
}

/// The rows of `x` in label order: label 0 first.
pub(crate) fn split<R: Runtime>(
    gpu: &Gpu<R>,
    width: usize,
    tokens_by_label: [&Array<R, u32>; 2],
    x: &Array<R, f32>,
) -> Result<Array<R, f32>, CudaError> {
    let y = gpu.array(x.len())?;
    let params = split_params(width, tokens_by_label, x, &y, Store::Overwrite);
    let rows = tokens_by_label[0].len() + tokens_by_label[1].len();
    // SAFETY: `split_params` has checked the lengths; y was allocated above.
    unsafe { gpu.launch(SPLIT, by_rows(rows, width), &params)? };
    Ok(y)
}

/// The inverse of [`split`]: the rows of `x`, in label order, go to `y` in token order.
pub(crate) fn merge<R: Runtime>(
    gpu: &Gpu<R>,
    width: usize,
    tokens_by_label: [&Array<R, u32>; 2],
    x: &Array<R, f32>,
    y: Output<&mut Array<R, f32>>,
) -> Result<(), CudaError> {
    let Output { values: y, store } = y;
    let params = split_params(width, tokens_by_label, x, y, store);
    let rows = tokens_by_label[0].len() + tokens_by_label[1].len();
    // SAFETY: `split_params` has checked the lengths; y is borrowed mutably.
    unsafe { gpu.launch(MERGE, by_rows(rows, width), &params) }
}

fn split_params<R: Runtime>(
    width: usize,
    tokens_by_label: [&Array<R, u32>; 2],
    x: &Array<R, f32>,
    y: &Array<R, f32>,
    store: Store,
) -> SplitParams {
    let count = tokens_by_label.map(Array::len);
    let rows = count[0] + count[1];
    assert_eq!([x.len(), y.len()], [rows * width; 2], "x or y is not [rows, width]");
    SplitParams {
        index: tokens_by_label.map(Array::pointer),
        x: x.pointer(),
        y: y.pointer(),
        count: count.map(|n| n as u32),
        width: width as u32,
        bits: lane_bits(width),
        adds: (store == Store::Add).into(),
        unused: 0,
    }
}
