//! Cuts work over rows into blocks.

use crate::device::cuda::kernel::{Block, Launch};

/// Threads per block of every kernel over rows.
pub(crate) const THREADS: usize = 256;

/// A block of [`THREADS`] threads.
pub(crate) const fn block_of(shared_bytes: usize) -> Block {
    Block { warps: THREADS / 32, shared_bytes }
}

/// Values per memory access to rows of `width` values.
pub(crate) fn vector(width: usize) -> usize {
    if width.is_multiple_of(4) { 4 } else { 1 }
}

/// log2 of the lanes that share a row of `width` values: one lane per access, at most a warp.
pub(crate) fn lane_bits(width: usize) -> u32 {
    width.div_ceil(vector(width)).next_power_of_two().min(32).trailing_zeros()
}

/// A grid of [`THREADS`]-thread blocks for `items` items, `per_block` items per block.
pub(crate) fn blocks(items: usize, per_block: usize) -> Launch {
    Launch { grid: [items.div_ceil(per_block) as u32, 1], threads: THREADS as u32, shared_bytes: 0 }
}

/// A grid in which each group of lanes takes one row of `width` values.
pub(crate) fn by_rows(rows: usize, width: usize) -> Launch {
    blocks(rows, THREADS >> lane_bits(width))
}

/// Rows per block of a kernel that leaves partial sums: at most 512 blocks, or 4,096 rows, whose
/// statistics have room in shared memory. The blocks determine the order of summation, so they
/// depend on the number of rows only.
pub(crate) fn block_rows(rows: usize) -> usize {
    rows.div_ceil(512).clamp(1, 4096).next_multiple_of(128)
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
        assert_eq!(block_rows(1 << 25), 4096);
    }
}
