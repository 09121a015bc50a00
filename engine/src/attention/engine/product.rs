//! The three matrix products, for `R` rows at a time, with accumulators in registers.
//!
//! Row operands are interleaved, `rows[x * R + r]`: the `R` factors of one feature of the keys are
//! adjacent.

use crate::simd::Simd;

/// `out[r][c] = sum over x < d of rows[x][r] * panel[x][c-th vector]`: scores of `R` rows with `C`
/// vectors of keys.
///
/// # Safety
/// `rows` must be valid for reading `d * R` values, and `panel` for reading `C` vectors at every
/// multiple of `stride` below `d * stride`.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, const R: usize, const C: usize>(
    s: S,
    rows: *const f32,
    panel: *const f32,
    stride: usize,
    d: usize,
) -> [[S::V; C]; R] {
    let mut out = [[s.zero(); C]; R];
    for x in 0..d {
        let mut key = [s.zero(); C];
        for c in 0..C {
            // SAFETY: guaranteed by the caller.
            key[c] = unsafe { s.load_ptr(panel.add(x * stride + c * S::LANES)) };
        }
        for r in 0..R {
            // SAFETY: guaranteed by the caller.
            let row = s.splat(unsafe { *rows.add(x * R + r) });
            for c in 0..C {
                out[r][c] = s.mul_add(row, key[c], out[r][c]);
            }
        }
    }
    out
}

/// `score * factor - shift[r]` of `R` rows with one vector of keys, accurate to about one rounding
/// of the result for scores of any size. Products and sums carry their rounding errors (Ogita,
/// Rump, Oishi 2005, Dot2).
///
/// # Safety
/// As [`score`] with `C = 1`.
#[inline(always)]
pub(super) unsafe fn exact_score<S: Simd, const R: usize>(
    s: S,
    rows: *const f32,
    panel: *const f32,
    stride: usize,
    d: usize,
    factor: f32,
    shift: &[f32; R],
) -> [S::V; R] {
    let mut high = [s.zero(); R];
    let mut low = [s.zero(); R];
    for x in 0..d {
        // SAFETY: guaranteed by the caller.
        let key = unsafe { s.load_ptr(panel.add(x * stride)) };
        for r in 0..R {
            // SAFETY: guaranteed by the caller.
            let row = s.splat(unsafe { *rows.add(x * R + r) });
            let product = s.mul(row, key);
            let product_error = s.mul_sub(row, key, product);
            let sum = s.add(high[r], product);
            let back = s.sub(sum, high[r]);
            let sum_error = s.add(s.sub(high[r], s.sub(sum, back)), s.sub(product, back));
            high[r] = sum;
            low[r] = s.add(low[r], s.add(product_error, sum_error));
        }
    }
    let factor = s.splat(factor);
    let mut out = [s.zero(); R];
    for r in 0..R {
        let high = s.mul_sub(high[r], factor, s.splat(shift[r]));
        out[r] = s.mul_add(low[r], factor, high);
    }
    out
}

/// `sums[r][x] += sum over j in keys of weights[r][j] * rows[j][x]`: probabilities times values.
///
/// Rows of `weights`, `rows` and `sums` are `weight_stride`, `padded` and `sum_stride` values
/// apart.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "operands of a product in registers, with their strides")]
pub(super) fn accumulate_rows<S: Simd, const R: usize>(
    s: S,
    weights: &[f32],
    weight_stride: usize,
    rows: &[f32],
    padded: usize,
    keys: std::ops::Range<usize>,
    sums: &mut [f32],
    sum_stride: usize,
) {
    let mut x = 0;
    while x + 2 * S::LANES <= padded {
        accumulate_columns::<S, R, 2>(
            s,
            weights,
            weight_stride,
            rows,
            padded,
            keys.clone(),
            sums,
            sum_stride,
            x,
        );
        x += 2 * S::LANES;
    }
    while x < padded {
        accumulate_columns::<S, R, 1>(
            s,
            weights,
            weight_stride,
            rows,
            padded,
            keys.clone(),
            sums,
            sum_stride,
            x,
        );
        x += S::LANES;
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "operands of a product in registers, with their strides")]
fn accumulate_columns<S: Simd, const R: usize, const C: usize>(
    s: S,
    weights: &[f32],
    weight_stride: usize,
    rows: &[f32],
    padded: usize,
    keys: std::ops::Range<usize>,
    sums: &mut [f32],
    sum_stride: usize,
    x: usize,
) {
    if keys.is_empty() {
        return;
    }
    assert!(x + C * S::LANES <= padded && rows.len() >= keys.end * padded);
    assert!(weights.len() >= (R - 1) * weight_stride + keys.end);
    assert!(sums.len() >= (R - 1) * sum_stride + padded);
    let mut sum = [[s.zero(); C]; R];
    // SAFETY: columns x..x + C * LANES are inside `padded`, rows inside `R` and `keys.end`, all
    // asserted above.
    unsafe {
        for r in 0..R {
            for c in 0..C {
                sum[r][c] = s.load_ptr(sums.as_ptr().add(r * sum_stride + x + c * S::LANES));
            }
        }
        for j in keys {
            let mut value = [s.zero(); C];
            for c in 0..C {
                value[c] = s.load_ptr(rows.as_ptr().add(j * padded + x + c * S::LANES));
            }
            for r in 0..R {
                let weight = s.splat(*weights.as_ptr().add(r * weight_stride + j));
                for c in 0..C {
                    sum[r][c] = s.mul_add(weight, value[c], sum[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                s.store_ptr(sum[r][c], sums.as_mut_ptr().add(r * sum_stride + x + c * S::LANES));
            }
        }
    }
}

/// `panel[x][j] += sum over r of rows[x][r] * weights[r][j]` for `len` keys (whole vectors):
/// gradients of keys and values.
#[inline(always)]
pub(super) fn accumulate_panel<S: Simd, const R: usize>(
    s: S,
    weights: &[f32],
    weight_stride: usize,
    rows: &[f32],
    panel: &mut [f32],
    stride: usize,
    len: usize,
) {
    let d = rows.len() / R;
    assert!(weights.len() >= (R - 1) * weight_stride + len && panel.len() >= (d - 1) * stride + len);
    assert!(len.is_multiple_of(S::LANES));
    let mut j = 0;
    // SAFETY: vectors end at `len`, a multiple of LANES, which `weights` and `panel` hold as
    // asserted above.
    unsafe {
        while j + 2 * S::LANES <= len {
            accumulate_vectors::<S, R, 2>(
                s,
                weights.as_ptr().add(j),
                weight_stride,
                rows,
                panel.as_mut_ptr().add(j),
                stride,
            );
            j += 2 * S::LANES;
        }
        while j < len {
            accumulate_vectors::<S, R, 1>(
                s,
                weights.as_ptr().add(j),
                weight_stride,
                rows,
                panel.as_mut_ptr().add(j),
                stride,
            );
            j += S::LANES;
        }
    }
}

/// # Safety
/// `weights` must be valid for reading `C` vectors at each of `R` strides, `panel` for reading and
/// writing `C` vectors at each of `rows.len() / R` strides.
#[inline(always)]
unsafe fn accumulate_vectors<S: Simd, const R: usize, const C: usize>(
    s: S,
    weights: *const f32,
    weight_stride: usize,
    rows: &[f32],
    panel: *mut f32,
    stride: usize,
) {
    let mut weight = [[s.zero(); C]; R];
    // SAFETY: guaranteed by the caller; `rows` is read below its length.
    unsafe {
        for r in 0..R {
            for c in 0..C {
                weight[r][c] = s.load_ptr(weights.add(r * weight_stride + c * S::LANES));
            }
        }
        for x in 0..rows.len() / R {
            let mut sum = [s.zero(); C];
            for c in 0..C {
                sum[c] = s.load_ptr(panel.add(x * stride + c * S::LANES));
            }
            for r in 0..R {
                let row = s.splat(*rows.as_ptr().add(x * R + r));
                for c in 0..C {
                    sum[c] = s.mul_add(row, weight[r][c], sum[c]);
                }
            }
            for c in 0..C {
                s.store_ptr(sum[c], panel.add(x * stride + c * S::LANES));
            }
        }
    }
}

/// Dot products of interleaved rows, summed in the order of [`score`]. For a row with a single key,
/// `o` equals its value, and `do . v - delta` is exactly 0.
#[inline(always)]
pub(super) fn dots<S: Simd, const R: usize>(s: S, a: &[f32], b: &[f32]) -> [f32; R] {
    let mut sums = [0.0; R];
    for (a, b) in a.chunks_exact(R).zip(b.chunks_exact(R)) {
        for r in 0..R {
            sums[r] = s.mul_add_one(a[r], b[r], sums[r]);
        }
    }
    sums
}
