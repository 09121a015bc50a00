//! Products whose factors are rounded to bf16, in tiles; sums are f32. Layouts and rounding:
//! [`crate::simd::bf16`].
//!
//! Factors are converted block by block into scratch memory, with zeros up to whole tiles: rows and
//! columns to a multiple of 16, the inner dimension to one of 32.

use super::product::{Finish, Products};
use super::scratch::{carve, carved_len, padded, with_scratch};
use crate::simd::bf16::{Begin, TILE, Unit, pairs};
use crate::simd::{Avx512, Kernel, Simd, dispatch};
use std::arch::x86_64::*;

/// Rows of the left factor, or steps of the inner dimension, that are converted at a time.
const BLOCK: usize = 128;

/// Pairs along `values` values, in whole tiles.
pub const fn pairs_of(values: usize) -> usize {
    values.div_ceil(2 * TILE) * TILE
}

/// Products in bf16.
#[derive(Clone, Copy, Debug)]
pub struct Bf16(pub Unit);

/// Panics unless a `[rows, columns]` matrix with this distance between rows fits `len` values.
fn check_matrix(len: usize, row: usize, [rows, columns]: [usize; 2]) {
    assert!(row >= columns, "rows overlap");
    assert!(rows == 0 || (rows - 1) * row + columns <= len, "a matrix exceeds its slice");
}

/// Converts `x: [m, k]` to a left factor, with rows `out_row` apart.
pub fn left_factor(
    unit: Unit,
    [m, k]: [usize; 2],
    (x, row): (&[f32], usize),
    (out, out_row): (&mut [u32], usize),
) {
    /// # Safety
    /// All rows of `x`, and the padded rows of `out`, are in bounds.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn inner(s: Avx512, [m, k]: [usize; 2], x: *const f32, row: usize, out: *mut u32, out_row: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            for i in 0..m.next_multiple_of(TILE) {
                for tile in 0..k.div_ceil(2 * TILE) {
                    let at = tile * 2 * TILE;
                    let pairs = if i < m {
                        let x = x.add(i * row + at);
                        let low = s.load_first_ptr(TILE.min(k - at), x);
                        let left = TILE.min((k - at).saturating_sub(TILE));
                        let high = s.load_first_ptr(left, x.wrapping_add(TILE));
                        pairs::along_row(low, high)
                    } else {
                        _mm512_setzero_si512()
                    };
                    _mm512_storeu_si512(out.add(i * out_row + tile * TILE).cast(), pairs);
                }
            }
        }
    }
    check_matrix(x.len(), row, [m, k]);
    check_matrix(out.len(), out_row, [m.next_multiple_of(TILE), pairs_of(k)]);
    // SAFETY: `unit` exists, so the processor has the instructions; the bounds are checked above.
    unsafe { inner(unit.vectors(), [m, k], x.as_ptr(), row, out.as_mut_ptr(), out_row) };
}

/// Converts `x: [k, n]` to a right factor, with rows `out_row` apart.
pub fn right_factor(
    unit: Unit,
    [k, n]: [usize; 2],
    (x, row): (&[f32], usize),
    (out, out_row): (&mut [u32], usize),
) {
    /// # Safety
    /// All rows of `x`, and the padded rows of `out`, are in bounds.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn inner(s: Avx512, [k, n]: [usize; 2], x: *const f32, row: usize, out: *mut u32, out_row: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            for l in 0..pairs_of(k) {
                for tile in 0..n.div_ceil(TILE) {
                    let count = TILE.min(n - tile * TILE);
                    let load = |l: usize| match l < k {
                        true => s.load_first_ptr(count, x.add(l * row + tile * TILE)),
                        false => _mm512_setzero_ps(),
                    };
                    let pairs = pairs::along_columns(load(2 * l), load(2 * l + 1));
                    _mm512_storeu_si512(out.add(l * out_row + tile * TILE).cast(), pairs);
                }
            }
        }
    }
    check_matrix(x.len(), row, [k, n]);
    check_matrix(out.len(), out_row, [pairs_of(k), n.next_multiple_of(TILE)]);
    // SAFETY: `unit` exists, so the processor has the instructions; the bounds are checked above.
    unsafe { inner(unit.vectors(), [k, n], x.as_ptr(), row, out.as_mut_ptr(), out_row) };
}

/// Transposes pairs, `rows` by `columns` tiles of 16 by 16: a right factor becomes the left factor
/// of the transposed matrix, and the reverse.
pub fn transpose_pairs(
    unit: Unit,
    [rows, columns]: [usize; 2],
    (from, from_row): (&[u32], usize),
    (to, to_row): (&mut [u32], usize),
) {
    /// # Safety
    /// Sixteen rows of sixteen pairs are in bounds of `from` and of `to`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn inner(from: *const u32, from_row: usize, to: *mut u32, to_row: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut tile = [_mm512_setzero_si512(); TILE];
            for (i, row) in tile.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(from.add(i * from_row).cast());
            }
            for (i, row) in pairs::transpose(tile).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(i * to_row).cast(), row);
            }
        }
    }
    check_matrix(from.len(), from_row, [rows * TILE, columns * TILE]);
    check_matrix(to.len(), to_row, [columns * TILE, rows * TILE]);
    let _ = unit;
    for i in 0..rows {
        for j in 0..columns {
            let from = &from[i * TILE * from_row + j * TILE..];
            let to = &mut to[j * TILE * to_row + i * TILE..];
            // SAFETY: `unit` exists, so the processor has the instructions; the bounds are checked
            // above.
            unsafe { inner(from.as_ptr(), from_row, to.as_mut_ptr(), to_row) };
        }
    }
}

/// Rounds values to bf16.
fn round(unit: Unit, x: &[f32], out: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(s: Avx512, x: &[f32], out: &mut [f32]) {
        for (x, out) in x.chunks(TILE).zip(out.chunks_mut(TILE)) {
            // SAFETY: only the lanes of `x` and `out`, which have the same length, are accessed.
            unsafe {
                // Pairs of each value, in the upper half, and 0.
                let value = s.load_first_ptr(x.len(), x.as_ptr());
                let pairs = pairs::along_columns(_mm512_setzero_ps(), value);
                s.store_first_ptr(x.len(), _mm512_castsi512_ps(pairs), out.as_mut_ptr());
            }
        }
    }
    assert_eq!(x.len(), out.len());
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(unit.vectors(), x, out) };
}

/// Applies an epilogue to rows of sums.
struct FinishRows<'a> {
    /// Rows of `columns` values.
    sums: &'a [f32],
    columns: usize,
    out: &'a mut [f32],
    out_row: usize,
    finish: Finish<'a>,
}

impl Kernel for FinishRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sums, columns, out, out_row, finish } = self;
        for (sums, out) in sums.chunks_exact(columns).zip(out.chunks_mut(out_row)) {
            for j in (0..columns).step_by(S::LANES) {
                let (sum, out) = (s.load(&sums[j..]), &mut out[j..]);
                let value = match finish {
                    Finish::Store => sum,
                    Finish::Add => s.add(s.load(out), sum),
                    Finish::Bias(bias) => s.add(sum, s.load(&bias[j..])),
                    Finish::BiasRelu(bias) => s.max(s.zero(), s.add(sum, s.load(&bias[j..]))),
                    Finish::AddRelu => s.max(s.zero(), s.add(s.load(out), sum)),
                    Finish::WherePositive => s.where_positive(s.load(out), sum),
                };
                s.store(value, out);
            }
        }
    }
}

impl Products for Bf16 {
    const ROUNDS: bool = true;

    fn round(self, x: &[f32], out: &mut [f32]) {
        round(self.0, x, out);
    }

    fn packed_len(self, [k, n]: [usize; 2]) -> usize {
        pairs_of(k) * padded(n)
    }

    fn pack(self, shape: [usize; 2], right: (&[f32], usize), out: &mut [f32]) {
        right_factor(self.0, shape, right, (bytemuck::cast_slice_mut(out), padded(shape[1])));
    }

    fn pack_transposed(self, [k, n]: [usize; 2], right: (&[f32], usize), out: &mut [f32]) {
        let (rows, row) = (padded(n), pairs_of(k));
        with_scratch(rows * row, |memory| {
            let left = bytemuck::cast_slice_mut(memory);
            left_factor(self.0, [n, k], right, (left, row));
            let out = bytemuck::cast_slice_mut(out);
            transpose_pairs(self.0, [rows / TILE, row / TILE], (left, row), (out, rows));
        });
    }

    fn product(
        self,
        [m, n, k]: [usize; 3],
        (left, left_row): (&[f32], usize),
        packed: &[f32],
        (out, out_row): (&mut [f32], usize),
        finish: Finish,
    ) {
        if m == 0 || n == 0 {
            return;
        }
        let (columns, row, block) = (padded(n), pairs_of(k), padded(m.min(BLOCK)));
        let right = (bytemuck::cast_slice(packed), columns);
        let lens = [block * row, block * columns];
        with_scratch(carved_len(&lens), |mut memory| {
            let [factor, sums] = carve(&mut memory, lens);
            let factor = bytemuck::cast_slice_mut(factor);
            let tiles = self.0.tiles();
            for i in (0..m).step_by(BLOCK) {
                let rows = (m - i).min(BLOCK);
                left_factor(self.0, [rows, k], (&left[i * left_row..], left_row), (factor, row));
                let shape = [rows.div_ceil(TILE), columns / TILE, row / TILE];
                tiles.product(shape, (factor, row), right, (sums, columns), Begin::Zero);
                let (sums, out) = (&sums[..rows * columns], &mut out[i * out_row..]);
                dispatch(FinishRows { sums, columns, out, out_row, finish });
            }
        });
    }

    fn add_transposed(
        self,
        [m, n, k]: [usize; 3],
        (left, left_row): (&[f32], usize),
        (right, right_row): (&[f32], usize),
        (out, out_row): (&mut [f32], usize),
    ) {
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        let (rows, columns, steps) = (padded(m), padded(n), pairs_of(k.min(BLOCK)));
        let lens = [steps * rows, rows * steps, steps * columns, rows * columns];
        with_scratch(carved_len(&lens), |mut memory| {
            let [narrow, factor, right_pairs, sums] = carve(&mut memory, lens);
            let [narrow, factor, right_pairs] =
                [narrow, factor, right_pairs].map(bytemuck::cast_slice_mut::<f32, u32>);
            let tiles = self.0.tiles();
            // Tiles add to whole rows of tiles in place.
            let in_place = rows == m;
            for l in (0..k).step_by(BLOCK) {
                let count = (k - l).min(BLOCK);
                let begin = if l == 0 && !in_place { Begin::Zero } else { Begin::Output };
                let steps = pairs_of(count);
                right_factor(self.0, [count, m], (&left[l * left_row..], left_row), (narrow, rows));
                let shape = [steps / TILE, rows / TILE];
                transpose_pairs(self.0, shape, (narrow, rows), (factor, steps));
                right_factor(
                    self.0,
                    [count, n],
                    (&right[l * right_row..], right_row),
                    (right_pairs, columns),
                );
                let shape = [rows / TILE, columns / TILE, steps / TILE];
                let sums = if in_place { (&mut *out, out_row) } else { (&mut *sums, columns) };
                tiles.product(shape, (factor, steps), (right_pairs, columns), sums, begin);
            }
            if !in_place {
                let sums = &sums[..m * columns];
                dispatch(FinishRows { sums, columns, out, out_row, finish: Finish::Add });
            }
        });
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::product::tests::{every_finish, expected};
    use super::*;
    use crate::skip::skip;
    use rand::{RngExt, SeedableRng};

    /// Products in bf16; `None`, with a line that says so, where the processor lacks them.
    pub fn bf16() -> Option<Bf16> {
        Unit::new().map(Bf16).map_err(skip).ok()
    }

    /// `x` in bf16, by integer arithmetic: to nearest, ties to even; subnormal values become 0.
    fn rounded(x: f32) -> f32 {
        let bits = x.to_bits();
        if x.is_nan() {
            return x;
        }
        if x.is_subnormal() {
            return 0f32.copysign(x);
        }
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    }

    #[test]
    fn rounding_is_to_nearest_even_and_keeps_nan_and_infinity() {
        let Some(bf16) = bf16() else { return };
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut values: Vec<f32> = (0..5000).map(|_| f32::from_bits(rng.random())).collect();
        let ties = [0x3f80_8000, 0x3f81_8000, 0xbf80_8000, 0x3f80_7fff, 0x3f80_8001, 0x7f7f_ffff];
        values.extend(ties.map(f32::from_bits));
        values.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-40]);
        let mut found = vec![1.0; values.len()];
        bf16.round(&values, &mut found);
        for (x, found) in values.iter().zip(found) {
            let expected = rounded(*x);
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{x:e} becomes {found:e}, not {expected:e}");
        }
    }

    fn random(len: usize, rng: &mut impl RngExt) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Every epilogue, every remainder of rows, columns and inner dimension; rows that are longer
    /// than the matrix hold NaN, which no product may read.
    #[test]
    fn products_agree_with_rounded_factors_in_f64() {
        let Some(bf16) = bf16() else { return };
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let sizes = [1, 8, 16, 17, 31, 32, 33, 40, 80, 130];
        let shapes = sizes.iter().flat_map(|m| sizes.map(|n| [*m, n, (m * n) % 143 + 1]));
        for [m, n, k] in shapes.chain([[5, 7, 300], [300, 20, 64]]) {
            let wide = padded(n);
            let matrix = |rows: usize, columns: usize, row: usize, rng: &mut _| -> Vec<f32> {
                let mut values = random(rows * row, rng);
                values.chunks_mut(row).for_each(|values| values[columns..].fill(f32::NAN));
                values
            };
            let (left, right) = (matrix(m, k, k + 3, &mut rng), matrix(k, n, n + 1, &mut rng));
            let exact: Vec<f64> = (0..m)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .map(|(i, j)| {
                    let factors = |l| (rounded(left[i * (k + 3) + l]), rounded(right[l * (n + 1) + j]));
                    (0..k).map(factors).map(|(x, y)| f64::from(x) * f64::from(y)).sum()
                })
                .collect();
            let check = |what: &str, found: f32, expected: f64, at: usize| {
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error < 2e-6 * k as f64 + 1e-6,
                    "{what} {m}x{n}x{k} at {at}: {found}, not {expected}"
                );
            };

            let transposed: Vec<f32> = (0..n * k).map(|at| right[at % k * (n + 1) + at / k]).collect();
            let (start, bias) = (random(m * wide, &mut rng), random(wide, &mut rng));
            let mut packed = vec![f32::NAN; bf16.packed_len([k, n])];
            for turn in 0..2 {
                match turn {
                    0 => bf16.pack([k, n], (&right, n + 1), &mut packed),
                    _ => bf16.pack_transposed([k, n], (&transposed, k), &mut packed),
                }
                for finish in every_finish(&bias) {
                    let mut out = start.clone();
                    bf16.product([m, n, k], (&left, k + 3), &packed, (&mut out, wide), finish);
                    for (at, sum) in exact.iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let (was, bias) = (f64::from(start[i * wide + j]), f64::from(bias[j]));
                        let expected = expected(finish, *sum, was, bias);
                        check("product", out[i * wide + j], expected, at);
                    }
                }
            }

            let left_transposed: Vec<f32> = (0..k * m).map(|at| left[at % m * (k + 3) + at / m]).collect();
            let mut right_wide = vec![0.0; k * wide];
            for (from, to) in right.chunks(n + 1).zip(right_wide.chunks_mut(wide)) {
                to[..n].copy_from_slice(&from[..n]);
            }
            let mut out = start.clone();
            bf16.add_transposed([m, n, k], (&left_transposed, m), (&right_wide, wide), (&mut out, wide));
            for (at, sum) in exact.iter().enumerate() {
                let index = at / n * wide + at % n;
                check("transposed", out[index], f64::from(start[index]) + sum, at);
            }
        }
    }
}
