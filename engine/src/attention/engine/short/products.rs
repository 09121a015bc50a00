//! The two products of the short path, with sums in registers.

use super::keys::{Term, load};
use crate::simd::Simd;

/// `out[r][c] = sum over x < d of rows[r][x] * column[c][x]`: scores of `R` rows in `C` columns of
/// a panel, `apart` values from one to the next.
///
/// # Safety
/// Each row must be valid for reading `d` values, and `panel` for reading `d` vectors at each of
/// `C` columns.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, const R: usize, const C: usize>(
    s: S,
    rows: &[*const f32; R],
    panel: *const f32,
    apart: usize,
    d: usize,
) -> [[S::V; C]; R] {
    let mut out = [[s.zero(); C]; R];
    for x in 0..d {
        let mut key = [s.zero(); C];
        for c in 0..C {
            // SAFETY: guaranteed by the caller.
            key[c] = unsafe { s.load_ptr(panel.add(c * apart + x * S::LANES)) };
        }
        for r in 0..R {
            // SAFETY: guaranteed by the caller.
            let row = s.splat(unsafe { *rows[r].add(x) });
            for c in 0..C {
                out[r][c] = s.mul_add(row, key[c], out[r][c]);
            }
        }
    }
    out
}

/// `sums[n] += sum over terms of weights[n][term.weight] * (row at term.x)`: `C` vectors of
/// features of `N` results. The last vector of a row has `last` values.
///
/// # Safety
/// For each term, each of `weights` must be valid for reading the value at `term.weight`, and `x`
/// for reading `(C - 1) * LANES + last` values at `term.x`. `last` must be at most `LANES`.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const N: usize, const C: usize>(
    s: S,
    sums: &mut [[S::V; C]; N],
    weights: &[*const f32; N],
    terms: &[Term],
    x: *const f32,
    last: usize,
) {
    for term in terms {
        let mut value = [s.zero(); C];
        for c in 0..C {
            let n = if c + 1 < C { S::LANES } else { last };
            // SAFETY: guaranteed by the caller.
            value[c] = unsafe { load(s, n, x.add(term.x as usize + c * S::LANES)) };
        }
        for n in 0..N {
            // SAFETY: guaranteed by the caller.
            let weight = s.splat(unsafe { *weights[n].add(term.weight as usize) });
            for c in 0..C {
                sums[n][c] = s.mul_add(weight, value[c], sums[n][c]);
            }
        }
    }
}
