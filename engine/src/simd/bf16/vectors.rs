//! Products of tiles on vectors, by the dot products of AVX512-BF16 (`vdpbf16ps`).

use super::{Product, TILE};
use std::arch::x86_64::*;

/// Rows and columns of tiles of `product`.
///
/// # Safety
/// The processor has AVX-512F and AVX512-BF16, and all tiles are in bounds.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn multiply(product: &Product, [m, n]: [usize; 2]) {
    let (rows, blocks) = (m * TILE, n.div_ceil(5));
    let mut column = 0;
    for block in 0..blocks {
        let columns = (n - column).div_ceil(blocks - block);
        // SAFETY: guaranteed by the caller.
        unsafe {
            // R * C sums, C vectors of the right factor and one broadcast must fit 32 registers; at
            // least 12 sums hide the latency of two pipes; a dot product needs at most one load.
            match columns {
                1 => column_block::<16, 1>(product, rows, column),
                2 => column_block::<8, 2>(product, rows, column),
                3 => column_block::<8, 3>(product, rows, column),
                4 => column_block::<4, 4>(product, rows, column),
                _ => column_block::<4, 5>(product, rows, column),
            }
        }
        column += columns;
    }
}

/// All rows of the `C` columns of tiles from `column` on, `R` rows at a time.
///
/// # Safety
/// As [`multiply`]; `R` divides [`TILE`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn column_block<const R: usize, const C: usize>(product: &Product, rows: usize, column: usize) {
    let Product { left, left_row, right, right_row, out, out_row, k, begin } = *product;
    let (right, out) = (right.wrapping_add(column * TILE), out.wrapping_add(column * TILE));
    for row in (0..rows).step_by(R) {
        let left = left.wrapping_byte_add(row * left_row);
        let out = out.wrapping_byte_add(row * out_row);
        // SAFETY: all tiles are in bounds, as the caller guarantees.
        unsafe {
            let out = |r: usize, c: usize| out.byte_add(r * out_row).add(c * TILE);
            let mut sums = [[_mm512_setzero_ps(); C]; R];
            if begin == super::Begin::Output {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(out(r, c));
                    }
                }
            }
            for step in 0..k * TILE {
                let right = right.byte_add(step * right_row);
                let mut columns = [_mm512_setzero_si512(); C];
                for (c, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_si512(right.add(c * TILE).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let pair = _mm512_set1_epi32(left.byte_add(r * left_row).add(step).cast::<i32>().read());
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = dot(*sum, pair, column);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (c, sum) in sums.into_iter().enumerate() {
                    _mm512_storeu_ps(out(r, c), sum);
                }
            }
        }
    }
}

/// Adds the products of 16 pairs to 16 sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sums: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both types are 512 bits of any content.
    let [a, b] = [a, b].map(|x| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) });
    _mm512_dpbf16_ps(sums, a, b)
}

/// Runs `16 * rounds` dot products, operands in registers, and returns the number of multiply-adds.
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn multiply_adds(rounds: usize) -> usize {
    const CHAINS: usize = 16;
    let factor = _mm512_set1_epi32(std::hint::black_box(0x3c00_3c00));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = dot(*sum, factor, factor);
        }
    }
    for sum in sums {
        std::hint::black_box(_mm512_reduce_add_ps(sum));
    }
    CHAINS * rounds * 2 * TILE
}
