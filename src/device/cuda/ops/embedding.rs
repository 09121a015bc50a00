//! Launches of `step/embedding.cu`: gathers, scatters, and sums of rows by segment.

use super::loss;
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of, block_rows, by_rows, lane_bits};
use crate::device::cuda::runtime::Runtime;
use crate::device::{DeviceError, Embedding, Lookup, Output, SegmentSum, Segments, Slot, Store};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/embedding.cu"), entry }
}

const GATHER_SUM: Kernel = kernel("embedding_gather_sum");
const SCATTER_ADD: Kernel = kernel("embedding_scatter_add");
const SEGMENT_CHUNKS: Kernel = kernel("embedding_segment_chunks");
const SEGMENT_BORDERS: Kernel = kernel("embedding_segment_borders");
const SQUARES: Kernel = kernel("embedding_squares");

/// All kernels of the file, each with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (GATHER_SUM, block_of(0)),
    (SCATTER_ADD, block_of(0)),
    (SEGMENT_CHUNKS, block_of(0)),
    (SEGMENT_BORDERS, block_of(BORDERS_SHARED)),
    (SQUARES, block_of(loss::BLOCK_SUM_SHARED)),
];

/// Members per chunk: `CHUNK` of `step/embedding.cu`.
const CHUNK: usize = 64;
/// f64 sums of four columns per thread.
const BORDERS_SHARED: usize = THREADS * 4 * size_of::<f64>();

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GatherParams {
    tables: [Pointer; 4],
    index: [Pointer; 4],
    y: Pointer,
    rows: u32,
    width: u32,
    table_count: u32,
    bits: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScatterParams {
    x: Pointer,
    index: Pointer,
    y: Pointer,
    rows: u32,
    width: u32,
    bits: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SegmentParams {
    sources: [Pointer; 3],
    ends: [u32; 3],
    stride: u32,
    column: u32,
    l2: f32,
    offsets: Pointer,
    members: Pointer,
    table: Pointer,
    row: Pointer,
    y: Pointer,
    head: Pointer,
    tail: Pointer,
    segments: u32,
    member_count: u32,
    chunks: u32,
    width: u32,
    bits: u32,
    adds: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SquareParams {
    table: Pointer,
    row: Pointer,
    partial: Pointer,
    rows: u32,
    width: u32,
    block_rows: u32,
    bits: u32,
}

// As in step/embedding.cu.
const _: () = assert!(size_of::<GatherParams>() == 88);
const _: () = assert!(size_of::<ScatterParams>() == 40);
const _: () = assert!(size_of::<SegmentParams>() == 128);
const _: () = assert!(size_of::<SquareParams>() == 40);

/// Rows of a table on the device.
pub(crate) type TableRows<'a, R> = Lookup<&'a Array<R, f32>, &'a Array<R, u32>>;

/// Addresses of the tables, addresses of their indices, and the number of rows.
pub(crate) fn tables_of<R: Runtime>(tables: &[TableRows<R>]) -> ([Pointer; 4], [Pointer; 4], usize) {
    assert!((1..=4).contains(&tables.len()), "1 to 4 tables, not {}", tables.len());
    let rows = tables[0].index.len();
    let (mut values, mut indices) = ([0; 4], [0; 4]);
    for (i, Lookup { table, index }) in tables.iter().enumerate() {
        assert_eq!(index.len(), rows, "the indices differ in length");
        (values[i], indices[i]) = (table.pointer(), index.pointer());
    }
    (values, indices, rows)
}

impl<R: Runtime> Embedding for Gpu<R> {
    fn gather_sum(
        &self,
        width: usize,
        tables: &[Lookup<&Array<R, f32>, &Array<R, u32>>],
        y: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        let (values, index, rows) = tables_of(tables);
        assert_eq!(y.len(), rows * width, "y is not [rows, width]");
        let params = GatherParams {
            tables: values,
            index,
            y: y.pointer(),
            rows: rows as u32,
            width: width as u32,
            table_count: tables.len() as u32,
            bits: lane_bits(width),
        };
        // SAFETY: lengths are checked above; the caller guarantees the index values; y is borrowed
        // mutably.
        unsafe { self.launch_for_both(GATHER_SUM, by_rows(rows, width), &params)? };
        Ok(())
    }

    fn scatter_add(
        &self,
        width: usize,
        x: &Array<R, f32>,
        index: &Array<R, u32>,
        y: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        let rows = index.len();
        assert_eq!(x.len(), rows * width, "x is not [rows, width]");
        let params = ScatterParams {
            x: x.pointer(),
            index: index.pointer(),
            y: y.pointer(),
            rows: rows as u32,
            width: width as u32,
            bits: lane_bits(width),
            unused: 0,
        };
        // SAFETY: lengths are checked above; the caller guarantees the index values; y is borrowed
        // mutably.
        unsafe { self.launch_for_both(SCATTER_ADD, by_rows(rows, width), &params)? };
        Ok(())
    }

    fn segment_sum(
        &self,
        width: usize,
        sum: SegmentSum<&Array<R, f32>, &Array<R, u32>>,
        y: &mut Array<R, f32>,
    ) -> Result<(), DeviceError> {
        let SegmentSum { sources, segments, l2, rows } = sum;
        let l2 = Some((l2, rows));
        let sum = SegmentedSum { sources, stride: width, column: 0, width, segments, l2 };
        Ok(segmented_sum(self, sum, Output::overwrite(y))?)
    }

    fn half_square_sum(
        &self,
        width: usize,
        rows: Lookup<&Array<R, f32>, &Array<R, u32>>,
        sum: Slot<Array<R, f64>>,
    ) -> Result<(), DeviceError> {
        let (Lookup { table, index }, rows) = (rows, rows.index.len());
        let block_rows = block_rows(rows);
        let count = rows.div_ceil(block_rows);
        let partial = self.array::<f64>(count)?;
        let params = SquareParams {
            table: table.pointer(),
            row: index.pointer(),
            partial: partial.pointer(),
            rows: rows as u32,
            width: width as u32,
            block_rows: block_rows as u32,
            bits: lane_bits(width),
        };
        let launch = Launch {
            grid: [count as u32, 1],
            threads: THREADS as u32,
            shared_bytes: loss::BLOCK_SUM_SHARED as u32,
        };
        // SAFETY: the caller guarantees the index values; partial has one value per block.
        unsafe { self.launch_for_both(SQUARES, launch, &params)? };
        Ok(loss::reduce(self, &partial, 1, 0.5, sum)?)
    }
}

/// Sums of row parts by segment, for [`Embedding::segment_sum`] and
/// [`Rows::concat_backward`](crate::device::Rows).
pub(crate) struct SegmentedSum<'a, R: Runtime> {
    /// `[rows, stride]` each. Members number the rows of the first source, then those of the
    /// second, ...
    pub sources: &'a [&'a Array<R, f32>],
    /// Values per row of a source.
    pub stride: usize,
    /// First column of the summed part.
    pub column: usize,
    /// Columns of the summed part.
    pub width: usize,
    /// The members of each segment.
    pub segments: Segments<&'a Array<R, u32>>,
    /// Factor and table rows, `[segments, width]`, of the L2 gradient added to the sums.
    pub l2: Option<(f32, TableRows<'a, R>)>,
}

/// Writes the sums to `y: [segments, width]`, or adds them.
pub(crate) fn segmented_sum<R: Runtime>(
    gpu: &Gpu<R>,
    sum: SegmentedSum<R>,
    y: Output<&mut Array<R, f32>>,
) -> Result<(), CudaError> {
    let Output { values: y, store } = y;
    let SegmentedSum { sources, stride, column, width, segments, l2 } = sum;
    assert!((1..=3).contains(&sources.len()), "1 to 3 sources, not {}", sources.len());
    assert!(column + width <= stride, "the columns lie outside the rows");
    let count = segments.offsets.len() - 1;
    assert_eq!(y.len(), count * width, "y is not [segments, width]");
    let (mut pointers, mut ends, mut end) = ([0; 3], [u32::MAX; 3], 0);
    for (i, source) in sources.iter().enumerate() {
        assert!(source.len().is_multiple_of(stride), "a source is not [rows, stride]");
        pointers[i] = source.pointer();
        end += source.len() / stride;
        if i + 1 < sources.len() {
            ends[i] = end as u32;
        }
    }
    let (l2, table, row) = l2.map_or((0.0, 0, 0), |(l2, Lookup { table, index })| {
        assert_eq!(index.len(), count, "index is not [segments]");
        (l2, table.pointer(), index.pointer())
    });
    let members = segments.members.len();
    let chunks = members / CHUNK + 1;
    let (head, tail) = (gpu.array::<f32>(chunks * width)?, gpu.array::<f32>(chunks * width)?);
    let params = SegmentParams {
        sources: pointers,
        ends,
        stride: stride as u32,
        column: column as u32,
        l2,
        offsets: segments.offsets.pointer(),
        members: segments.members.pointer(),
        table,
        row,
        y: y.pointer(),
        head: head.pointer(),
        tail: tail.pointer(),
        segments: count as u32,
        member_count: members as u32,
        chunks: chunks as u32,
        width: width as u32,
        bits: lane_bits(width),
        adds: (store == Store::Add).into(),
    };
    // SAFETY: lengths are checked above; the caller guarantees offsets and members; y is borrowed
    // mutably; head and tail have one row per chunk.
    unsafe { gpu.launch_for_both(SEGMENT_CHUNKS, by_rows(chunks, width), &params)? };
    // One block per border between two chunks.
    let launch =
        Launch { grid: [chunks as u32 - 1, 1], threads: THREADS as u32, shared_bytes: BORDERS_SHARED as u32 };
    // SAFETY: as above.
    unsafe { gpu.launch_for_both(SEGMENT_BORDERS, launch, &params) }
}
