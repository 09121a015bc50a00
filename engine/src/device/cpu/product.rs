//! Products of small f32 matrices on one thread, without packing, for matrices that fit the
//! second-level cache.
//!
//! A tile of the output has `R` rows and `C` vectors of columns, with all sums in registers. Each
//! output value is one running sum in the order of the inner dimension, so it does not depend on
//! its position in a tile.

use super::elementwise::{pad_rows, transpose};
use super::scratch::padded;
use crate::simd::{Kernel, Simd, dispatch};

/// Matrix products in one precision of the factors; values in memory are f32. A matrix comes with
/// the distance between its rows. Columns of outputs are processed in whole vectors, as in
/// [`product`].
pub trait Products: Copy + Send + Sync {
    /// Whether factors are rounded.
    const ROUNDS: bool;

    /// Copies values as the products see them.
    fn round(self, x: &[f32], out: &mut [f32]);
    /// Values in memory of a packed right factor `[k, n]`.
    fn packed_len(self, shape: [usize; 2]) -> usize;
    /// Packs the right factor `[k, n]`.
    fn pack(self, shape: [usize; 2], right: (&[f32], usize), out: &mut [f32]);
    /// Packs the right factor `[k, n]`, the transpose of `right: [n, k]`.
    fn pack_transposed(self, shape: [usize; 2], right: (&[f32], usize), out: &mut [f32]);
    /// `out = finish(left right)` for `left: [m, k]`, a packed right factor `[k, n]` and
    /// `out: [m, n]`.
    fn product(
        self,
        shape: [usize; 3],
        left: (&[f32], usize),
        packed: &[f32],
        out: (&mut [f32], usize),
        finish: Finish,
    );
    /// `out += left^T right` for `left: [k, m]`, `right: [k, n]` with rows of whole vectors, and
    /// `out: [m, n]`.
    fn add_transposed(
        self,
        shape: [usize; 3],
        left: (&[f32], usize),
        right: (&[f32], usize),
        out: (&mut [f32], usize),
    );
}

/// Products in f32, by [`product`].
#[derive(Clone, Copy, Debug)]
pub struct F32;

impl Products for F32 {
    const ROUNDS: bool = false;

    fn round(self, x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn packed_len(self, [k, n]: [usize; 2]) -> usize {
        k * padded(n)
    }
    fn pack(self, [k, n]: [usize; 2], (right, row): (&[f32], usize), out: &mut [f32]) {
        let out = &mut out[..k * padded(n)];
        if row == n {
            return pad_rows(right, n, padded(n), out);
        }
        for (right, out) in right.chunks(row).zip(out.chunks_exact_mut(padded(n))) {
            pad_rows(&right[..n], n, padded(n), out);
        }
    }
    fn pack_transposed(self, [k, n]: [usize; 2], (right, row): (&[f32], usize), out: &mut [f32]) {
        transpose(&right[..n * row], row, padded(n), &mut out[..k * padded(n)]);
    }
    fn product(
        self,
        shape: [usize; 3],
        (left, row): (&[f32], usize),
        packed: &[f32],
        out: (&mut [f32], usize),
        finish: Finish,
    ) {
        product(shape, Left::rows(left, row), (packed, padded(shape[1])), out, finish);
    }
    fn add_transposed(
        self,
        shape: [usize; 3],
        (left, row): (&[f32], usize),
        right: (&[f32], usize),
        out: (&mut [f32], usize),
    ) {
        product(shape, Left::transposed(left, row), right, out, Finish::Add);
    }
}

/// The left factor `[m, k]`: entry `(i, l)` is `values[i * row + l * step]`. A transpose needs no
/// copy.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// The entries.
    pub values: &'a [f32],
    /// Distance between rows.
    pub row: usize,
    /// Distance between steps of the inner dimension.
    pub step: usize,
}

impl<'a> Left<'a> {
    /// A row-major matrix with rows `stride` apart.
    pub fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: stride, step: 1 }
    }

    /// The transpose of a row-major matrix with rows `stride` apart.
    pub fn transposed(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: 1, step: stride }
    }
}

/// The epilogue: how a finished sum is stored.
#[derive(Clone, Copy)]
pub enum Finish<'a> {
    /// Replaces the output.
    Store,
    /// Adds to the output.
    Add,
    /// `sum + bias[column]` replaces the output.
    Bias(&'a [f32]),
    /// `max(sum + bias[column], 0)` replaces the output.
    BiasRelu(&'a [f32]),
    /// `max(output + sum, 0)` replaces the output.
    AddRelu,
    /// Replaces positive outputs; others become 0. The backward pass of ReLU.
    WherePositive,
}

/// `out = finish(left right)` for `left: [m, k]`, `right: [k, n]`, `out: [m, n]`. `right` and `out`
/// come with the distance between their rows. Columns are processed in whole vectors: the rows of
/// `right` and `out`, and a bias, extend to the next multiple of 16 columns. The padding of `out` is
/// overwritten to the end of the last vector; what is behind it stays.
pub fn product(
    [m, n, k]: [usize; 3],
    left: Left,
    (right, right_row): (&[f32], usize),
    (out, out_row): (&mut [f32], usize),
    finish: Finish,
) {
    if m == 0 || n == 0 {
        return;
    }
    let columns = n.next_multiple_of(super::scratch::LINE);
    assert!(right_row >= columns && out_row >= columns, "rows too short for whole vectors");
    assert!(k == 0 || (m - 1) * left.row + (k - 1) * left.step < left.values.len());
    assert!(k == 0 || (k - 1) * right_row + columns <= right.len());
    assert!((m - 1) * out_row + columns <= out.len());
    let bias = match finish {
        Finish::Bias(bias) | Finish::BiasRelu(bias) => {
            assert!(columns <= bias.len());
            bias.as_ptr()
        }
        _ => std::ptr::null(),
    };
    let (left, row, step) = (left.values.as_ptr(), left.row, left.step);
    let (right, out) = (right.as_ptr(), out.as_mut_ptr());
    dispatch(Product { m, n, k, left, row, step, right, right_row, out, out_row, bias, finish });
}

/// The checked arguments of [`product`]: whole vectors within `m`, `n`, `k` are in bounds.
struct Product<'a> {
    m: usize,
    n: usize,
    k: usize,
    left: *const f32,
    row: usize,
    step: usize,
    right: *const f32,
    right_row: usize,
    out: *mut f32,
    out_row: usize,
    bias: *const f32,
    finish: Finish<'a>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let vectors = self.n.div_ceil(S::LANES);
        // R * C sums, C vectors of the right factor and one broadcast must fit the registers; at
        // least 8 sums hide the latency of two FMA pipes.
        let widest = match S::REGISTERS {
            32.. => 5,
            16.. => 3,
            _ => 1,
        };
        let mut blocks = vectors.div_ceil(widest);
        let mut j = 0;
        while blocks > 0 {
            let c = (vectors - j).div_ceil(blocks);
            match S::REGISTERS {
                32.. => match c {
                    1 => self.column_block::<S, 8, 1>(simd, j),
                    2 => self.column_block::<S, 8, 2>(simd, j),
                    3 => self.column_block::<S, 8, 3>(simd, j),
                    4 => self.column_block::<S, 6, 4>(simd, j),
                    _ => self.column_block::<S, 5, 5>(simd, j),
                },
                16.. => match c {
                    1 => self.column_block::<S, 8, 1>(simd, j),
                    2 => self.column_block::<S, 6, 2>(simd, j),
                    _ => self.column_block::<S, 4, 3>(simd, j),
                },
                _ => self.column_block::<S, 4, 1>(simd, j),
            }
            j += c;
            blocks -= 1;
        }
    }
}

impl Product<'_> {
    /// All rows of the `C` vectors of columns from vector `j` on.
    #[inline(always)]
    fn column_block<S: Simd, const R: usize, const C: usize>(&self, simd: S, j: usize) {
        let mut i = 0;
        while i + R <= self.m {
            self.tile::<S, R, C>(simd, i, j);
            i += R;
        }
        while R > 4 && i + 4 <= self.m {
            self.tile::<S, 4, C>(simd, i, j);
            i += 4;
        }
        while i + 2 <= self.m {
            self.tile::<S, 2, C>(simd, i, j);
            i += 2;
        }
        if i < self.m {
            self.tile::<S, 1, C>(simd, i, j);
        }
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "rows and columns index several arrays")]
    fn tile<S: Simd, const R: usize, const C: usize>(&self, simd: S, i: usize, j: usize) {
        let j = j * S::LANES;
        let mut sums = [[simd.zero(); C]; R];
        // SAFETY: rows i..i + R are below m and columns j..j + C * LANES below n rounded up to a
        // vector; `product` checked that everything there is in bounds of its slice. `out` is
        // borrowed mutably, so nothing else overlaps it.
        unsafe {
            let mut rows = [self.left; R];
            for r in 0..R {
                rows[r] = self.left.add((i + r) * self.row);
            }
            let mut right = self.right.add(j);
            let mut offset = 0;
            for _ in 0..self.k {
                let mut b = [simd.zero(); C];
                for c in 0..C {
                    b[c] = simd.load_ptr(right.add(c * S::LANES));
                }
                for r in 0..R {
                    let a = simd.splat(*rows[r].add(offset));
                    for c in 0..C {
                        sums[r][c] = simd.mul_add(a, b[c], sums[r][c]);
                    }
                }
                right = right.wrapping_add(self.right_row);
                offset += self.step;
            }
            // A macro and not a closure: it must be inlined to be compiled with S's instructions.
            macro_rules! store {
                (|$out:ident, $bias:ident, $sum:ident| $value:expr) => {
                    for r in 0..R {
                        let row = self.out.add((i + r) * self.out_row + j);
                        for c in 0..C {
                            let ($out, $sum) = (row.add(c * S::LANES), sums[r][c]);
                            let $bias = self.bias.wrapping_add(j + c * S::LANES);
                            simd.store_ptr($value, $out);
                        }
                    }
                };
            }
            match self.finish {
                Finish::Store => store!(|_out, _bias, sum| sum),
                Finish::Add => store!(|out, _bias, sum| simd.add(simd.load_ptr(out), sum)),
                Finish::Bias(_) => store!(|_out, bias, sum| simd.add(sum, simd.load_ptr(bias))),
                Finish::BiasRelu(_) => {
                    store!(|_out, bias, sum| simd.max(simd.zero(), simd.add(sum, simd.load_ptr(bias))))
                }
                Finish::AddRelu => {
                    store!(|out, _bias, sum| simd.max(simd.zero(), simd.add(simd.load_ptr(out), sum)))
                }
                Finish::WherePositive => {
                    store!(|out, _bias, sum| simd.where_positive(simd.load_ptr(out), sum))
                }
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::scratch::padded;
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn random(len: usize, rng: &mut impl RngExt) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    pub fn every_finish(bias: &[f32]) -> [Finish<'_>; 6] {
        [
            Finish::Store,
            Finish::Add,
            Finish::Bias(bias),
            Finish::BiasRelu(bias),
            Finish::AddRelu,
            Finish::WherePositive,
        ]
    }

    /// The definition of an epilogue: a sum of products, the value before, and the bias of a column.
    pub fn expected(finish: Finish, sum: f64, was: f64, bias: f64) -> f64 {
        match finish {
            Finish::Store => sum,
            Finish::Add => was + sum,
            Finish::Bias(_) => sum + bias,
            Finish::BiasRelu(_) => (sum + bias).max(0.0),
            Finish::AddRelu => (was + sum).max(0.0),
            Finish::WherePositive if was > 0.0 => sum,
            Finish::WherePositive => 0.0,
        }
    }

    /// Every epilogue, both orientations, every remainder of rows and columns.
    #[test]
    fn agrees_with_the_definition_in_f64() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let shapes = (1..20).flat_map(|m| [1, 8, 17, 40, 80, 96, 130].map(|n| [m, n, (m * n) % 23]));
        for [m, n, k] in shapes {
            let wide = padded(n);
            let (left, right) = (random(m * k, &mut rng), random(k * wide, &mut rng));
            let (start, bias) = (random(m * wide, &mut rng), random(wide, &mut rng));
            for transposed in [false, true] {
                let factor = match transposed {
                    false => Left::rows(&left, k),
                    true => Left::transposed(&left, m),
                };
                for finish in every_finish(&bias) {
                    let mut out = start.clone();
                    product([m, n, k], factor, (&right, wide), (&mut out, wide), finish);
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let entry = |l| f64::from(left[i * factor.row + l * factor.step]);
                        let sum: f64 = (0..k).map(|l| entry(l) * f64::from(right[l * wide + j])).sum();
                        let (was, bias) = (f64::from(start[i * wide + j]), f64::from(bias[j]));
                        let want = expected(finish, sum, was, bias);
                        let got = f64::from(out[i * wide + j]);
                        assert!((got - want).abs() < 1e-5, "{m}x{n}x{k} ({i}, {j}): {got}, not {want}");
                    }
                }
            }
        }
    }
}
