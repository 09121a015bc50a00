//! Vectorized, memory-bound passes over rows of f32.

use crate::simd::{Kernel, Simd, dispatch};

/// Runs a block for each group of column vectors of rows of `$width` values, a multiple of 16.
/// `$columns` is the number of vectors, a constant, and `$first` the first column. Factors and
/// running sums of a column stay in registers over all rows, in independent chains that hide the
/// latency of addition. A macro inlines the block, which is then compiled with the instructions of
/// `$simd`.
macro_rules! for_columns {
    ($simd:ident, $width:expr, |$columns:ident, $first:ident| $block:block) => {{
        let vectors = $width / $simd::LANES;
        let mut vector = 0;
        while vector < vectors {
            match vectors - vector {
                5.. => for_columns!(@run 5, $simd, vector, $columns, $first, $block),
                3.. => for_columns!(@run 3, $simd, vector, $columns, $first, $block),
                2 => for_columns!(@run 2, $simd, vector, $columns, $first, $block),
                _ => for_columns!(@run 1, $simd, vector, $columns, $first, $block),
            }
        }
    }};
    (@run $count:literal, $simd:ident, $vector:ident, $columns:ident, $first:ident, $block:block) => {{
        const $columns: usize = $count;
        let $first = $vector * $simd::LANES;
        #[allow(clippy::needless_range_loop, reason = "the block indexes arrays of registers")]
        $block
        $vector += $columns;
    }};
}
pub(super) use for_columns;

/// The vectors of `x` from column `first` on.
#[inline(always)]
pub fn load_columns<S: Simd, const C: usize>(s: S, x: &[f32], first: usize) -> [S::V; C] {
    let mut vectors = [s.zero(); C];
    for (c, vector) in vectors.iter_mut().enumerate() {
        *vector = s.load(&x[first + c * S::LANES..]);
    }
    vectors
}

/// `sums[j] += sum over rows of values[row, j]` for rows of `sums.len()` values, a multiple of 16.
pub fn add_column_sums(values: &[f32], sums: &mut [f32]) {
    struct ColumnSums<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for ColumnSums<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(values, sums) = self;
            let width = sums.len();
            for_columns!(S, width, |C, j| {
                let mut total = load_columns::<S, C>(s, sums, j);
                for row in values.chunks_exact(width) {
                    let row = &row[j..j + C * S::LANES];
                    for c in 0..C {
                        total[c] = s.add(total[c], s.load(&row[c * S::LANES..]));
                    }
                }
                for c in 0..C {
                    s.store(total[c], &mut sums[j + c * S::LANES..]);
                }
            });
        }
    }
    assert!(sums.len().is_multiple_of(super::scratch::LINE));
    if !sums.is_empty() {
        dispatch(ColumnSums(values, sums));
    }
}

/// `dy = 0` for every non-positive `y`: the derivative of ReLU follows from its output.
pub fn relu_backward(y: &[f32], dy: &mut [f32]) {
    struct ReluBackward<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for ReluBackward<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let (y, dy) = (self.0.chunks_exact(S::LANES), self.1);
            let rest = y.remainder();
            let mut out = dy.chunks_exact_mut(S::LANES);
            for (y, dy) in y.zip(&mut out) {
                s.store(s.where_positive(s.load(y), s.load(dy)), dy);
            }
            for (y, dy) in rest.iter().zip(out.into_remainder()) {
                *dy = if *y > 0.0 { *dy } else { 0.0 };
            }
        }
    }
    assert_eq!(y.len(), dy.len());
    dispatch(ReluBackward(y, dy));
}

/// `p = e^(x - shift)`, 0 below `2^-48`, and the sum of `p`. `shift` is at least about the largest
/// `x`.
pub fn exp_sum(x: &[f32], shift: f32, p: &mut [f32]) -> f32 {
    struct ExpSum<'a>(&'a [f32], f32, &'a mut [f32]);
    impl Kernel for ExpSum<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let Self(x, shift, p) = self;
            // x - shift first: it cancels exactly when both are large and close.
            let (log2e, shift) = (s.splat(std::f32::consts::LOG2_E), s.splat(shift));
            let mut total = s.zero();
            let mut x = x.chunks_exact(S::LANES);
            let mut out = p.chunks_exact_mut(S::LANES);
            for (x, p) in (&mut x).zip(&mut out) {
                let value = s.exp2_of_weight(s.mul(s.sub(s.load(x), shift), log2e));
                total = s.add(total, value);
                s.store(value, p);
            }
            let mut total = s.sum(total);
            for (x, p) in x.remainder().iter().zip(out.into_remainder()) {
                let mut lanes = [0.0; 16];
                let value = s.exp2_of_weight(s.mul(s.sub(s.splat(*x), shift), log2e));
                s.store(value, &mut lanes);
                *p = lanes[0];
                total += *p;
            }
            total
        }
    }
    assert_eq!(x.len(), p.len());
    dispatch(ExpSum(x, shift, p))
}

/// `log(1 + exp(x))` without overflow.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(-x))` without overflow.
pub fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// `y += x`
pub fn add_assign(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// Copies a row-major `[rows, width]` matrix to rows `padded` apart, padded with zeros.
pub fn pad_rows(x: &[f32], width: usize, padded: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(padded)) {
        out[..width].copy_from_slice(x);
        out[width..].fill(0.0);
    }
}

/// The inverse of [`pad_rows`].
pub fn unpad_rows(x: &[f32], width: usize, padded: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(padded).zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[..width]);
    }
}

/// Transposes a row-major `[rows, width]` matrix to rows `padded` apart, padded with zeros.
pub fn transpose(x: &[f32], width: usize, padded: usize, out: &mut [f32]) {
    for (j, out) in out.chunks_exact_mut(padded).take(width).enumerate() {
        out.fill(0.0);
        for (row, out) in x.chunks_exact(width).zip(out) {
            *out = row[j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectorized_passes_agree_with_scalar_loops() {
        let x: Vec<f32> = (0..160 * 3).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut sums = vec![1.0; 160];
        add_column_sums(&x, &mut sums);
        for (j, sum) in sums.iter().enumerate() {
            assert!((sum - (1.0 + x[j] + x[j + 160] + x[j + 320])).abs() < 1e-6);
        }
        for len in [0, 1, 15, 16, 37] {
            let mut dy = vec![2.0; len];
            relu_backward(&x[..len], &mut dy);
            assert!(dy.iter().zip(&x).all(|(dy, x)| *dy == if *x > 0.0 { 2.0 } else { 0.0 }));
            let mut p = vec![0.0; len];
            let sum = exp_sum(&x[..len], 0.5, &mut p);
            let want: Vec<f64> = x[..len].iter().map(|x| (f64::from(*x) - 0.5).exp()).collect();
            assert!(p.iter().zip(&want).all(|(p, want)| (f64::from(*p) - want).abs() < 1e-6));
            assert!((f64::from(sum) - want.iter().sum::<f64>()).abs() < 1e-5);
        }
        let mut out = vec![9.0; 6 * 16];
        transpose(&x[..12], 6, 16, &mut out);
        assert!((0..6).all(|j| out[j * 16] == x[j] && out[j * 16 + 1] == x[6 + j] && out[j * 16 + 2] == 0.0));
        pad_rows(&x[..12], 6, 16, &mut out);
        assert!(out[..6] == x[..6] && out[16..22] == x[6..12] && out[6..16] == [0.0; 10]);
    }
}
