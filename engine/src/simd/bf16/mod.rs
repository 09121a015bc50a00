//! Products of bf16 factors with f32 sums, in tiles, and the conversions to bf16. A [`Unit`]
//! multiplies: the tile registers of AMX, or the dot products of AVX512-BF16.
//!
//! **Layouts.** A factor is a matrix of *pairs*: a `u32` holds two bf16 that are consecutive in the
//! inner dimension, the first in the lower half. The left factor `[m, k]` has pairs along its rows,
//! `[m, k / 2]`; the right factor `[k, n]` has pairs along its columns, `[k / 2, n]`. So the pairs
//! of a right factor are the transposed pairs of its transpose as a left factor. A *tile* is 16
//! rows of 16 pairs or sums.
//!
//! **Rounding.** f32 values round to the nearest bf16, ties to even; NaN stays NaN. A subnormal
//! factor counts as 0 with its sign, and so does a subnormal sum. AMX adds 32 products to a sum at
//! a time: the 16 of the even and the 16 of the odd inner indices as two chains of fused
//! multiply-adds, then both to the sum. AVX512-BF16 adds the two products of a pair to a sum, the
//! odd one first. Each operation rounds to nearest even. So the last bits differ between the units.

mod amx;
mod vectors;

use super::{Avx512, Simd};
use amx::Amx;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;
use thiserror::Error;

/// Rows of a tile, and f32 sums or pairs of bf16 in one of its rows.
pub const TILE: usize = 16;

/// Why products in bf16 are not available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Missing {
    /// The processor lacks AVX512-BF16.
    #[error("this processor does not have it (flag avx512_bf16)")]
    Processor,
    /// `DFAR_SIMD` selects other vectors.
    #[error("the environment variable DFAR_SIMD selects {0}")]
    Selected(&'static str),
}

/// What multiplies tiles of bf16. Proof that the processor has AVX512-BF16, which converts, and
/// AVX512-BW, which comes with it.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    vectors: Avx512,
    /// If present, it multiplies.
    amx: Option<Amx>,
}

impl Unit {
    /// The fastest unit of the processor.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn new() -> Result<Self, Missing> {
        static RESULT: OnceLock<Result<Unit, Missing>> = OnceLock::new();
        *RESULT.get_or_init(|| {
            let bf16 = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw");
            check(bf16, super::name())?;
            let vectors = Avx512::new().ok_or(Missing::Processor)?;
            Ok(Self { vectors, amx: Amx::new() })
        })
    }

    /// AVX512-BF16 also where there is AMX.
    pub fn without_amx(self) -> Self {
        Self { amx: None, ..self }
    }

    /// Name for reports: `amx` or `avx512_bf16`.
    pub fn name(self) -> &'static str {
        if self.amx.is_some() { "amx" } else { "avx512_bf16" }
    }

    /// Vectors of f32.
    #[inline(always)]
    pub fn vectors(self) -> Avx512 {
        self.vectors
    }

    /// Runs `rounds` rounds of products with all operands in registers. Returns the number of
    /// multiply-adds.
    pub fn multiply_adds(self, rounds: usize) -> usize {
        let _tiles = self.tiles();
        match self.amx {
            // SAFETY: `_tiles` keeps the tile registers of this thread configured.
            Some(amx) => unsafe { amx.multiply_adds(rounds) },
            // SAFETY: `self` exists, so the processor has the instructions.
            None => unsafe { vectors::multiply_adds(rounds) },
        }
    }

    /// Prepares this thread.
    pub fn tiles(self) -> Tiles {
        if let Some(amx) = self.amx
            && NESTED.replace(NESTED.get() + 1) == 0
        {
            amx.configure();
        }
        Tiles(self, PhantomData)
    }
}

/// The first missing requirement: AVX512-BF16, then vectors of 512 bits.
fn check(bf16: bool, simd: &'static str) -> Result<(), Missing> {
    if !bf16 {
        return Err(Missing::Processor);
    }
    if simd != Avx512::NAME {
        return Err(Missing::Selected(simd));
    }
    Ok(())
}

thread_local! {
    /// Number of [`Tiles`] on this thread that need AMX.
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// Products of tiles on this thread. With AMX, making and dropping one takes about 50 ns.
pub struct Tiles(Unit, PhantomData<*const ()>);

impl Drop for Tiles {
    fn drop(&mut self) {
        if let Some(amx) = self.0.amx {
            NESTED.set(NESTED.get() - 1);
            if NESTED.get() == 0 {
                amx.release();
            }
        }
    }
}

/// Whether sums begin with 0 or with the values of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    Zero,
    Output,
}

/// Addresses of a product, and distances between rows in bytes.
#[derive(Clone, Copy)]
struct Product {
    left: *const u32,
    left_row: usize,
    right: *const u32,
    right_row: usize,
    out: *mut f32,
    out_row: usize,
    /// Tiles of the inner dimension, at least 1.
    k: usize,
    begin: Begin,
}

impl Tiles {
    /// `out = left right` or `out += left right`, of `[m, n, k]` tiles: 16 rows of `left` and
    /// `out`, 16 columns of `right` and `out`, an inner dimension of 32. Each matrix comes with the
    /// distance between its rows, in pairs or values.
    ///
    /// # Panics
    /// If a matrix is too short, or a size is 0.
    pub fn product(
        &self,
        [m, n, k]: [usize; 3],
        (left, left_row): (&[u32], usize),
        (right, right_row): (&[u32], usize),
        (out, out_row): (&mut [f32], usize),
        begin: Begin,
    ) {
        let needed = |rows: usize, row: usize, columns: usize| {
            assert!(rows > 0 && columns > 0 && row >= columns * TILE, "rows too short for whole tiles");
            (rows * TILE - 1) * row + columns * TILE
        };
        assert!(left.len() >= needed(m, left_row, k), "the left factor is too short");
        assert!(right.len() >= needed(k, right_row, n), "the right factor is too short");
        assert!(out.len() >= needed(m, out_row, n), "the output is too short");
        let product = Product {
            left: left.as_ptr(),
            left_row: 4 * left_row,
            right: right.as_ptr(),
            right_row: 4 * right_row,
            out: out.as_mut_ptr(),
            out_row: 4 * out_row,
            k,
            begin,
        };
        // SAFETY: `self` exists, so the processor has the instructions, and with AMX the tile
        // registers are configured. Rows and columns below m and n are in bounds, as checked above;
        // `out` is borrowed mutably, so nothing else overlaps it.
        unsafe {
            match self.0.amx {
                Some(amx) => amx.multiply(&product, [m, n]),
                None => vectors::multiply(&product, [m, n]),
            }
        }
    }
}

/// Vectors of pairs. The caller has the instructions: these functions are inlined into functions
/// with the same target features.
pub mod pairs {
    use std::arch::x86_64::*;

    /// 32 values as 16 pairs along a row; `low` comes first.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn along_row(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both types are 512 bits of any content.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// The pairs along the columns of two rows of 16 values.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn along_columns(even: __m512, odd: __m512) -> __m512i {
        let order = _mm512_set_epi32(
            0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
            0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000,
        );
        _mm512_permutexvar_epi16(order, along_row(even, odd))
    }

    /// The pairs along the columns of two rows of 32 values that are pairs along their rows: those
    /// of the first 16 columns and those of the last.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn regroup(even: __m512i, odd: __m512i) -> [__m512i; 2] {
        // Unpacking works within quarters: columns 0..4, 8..12, 16..20, 24..28 and the others.
        let low = _mm512_unpacklo_epi16(even, odd);
        let high = _mm512_unpackhi_epi16(even, odd);
        [
            _mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high),
            _mm512_permutex2var_epi64(low, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), high),
        ]
    }

    /// Transposes 16 by 16 pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
        let mut a = rows;
        for i in (0..16).step_by(2) {
            (a[i], a[i + 1]) =
                (_mm512_unpacklo_epi32(rows[i], rows[i + 1]), _mm512_unpackhi_epi32(rows[i], rows[i + 1]));
        }
        // Quarter q of b[4 i + j] has column 4 q + j of rows 4 i..4 i + 4.
        let mut b = a;
        for i in (0..16).step_by(4) {
            b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
            b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
            b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
            b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
        }
        let mut out = b;
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
            // low: columns j (rows 0..4), 8 + j, j (rows 4..8), 8 + j. high: 4 + j and 12 + j.
            out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
            out[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::skip::skip;

    /// All units; none, with a line that says so, where they are missing.
    fn units() -> Vec<Unit> {
        match Unit::new() {
            Ok(unit) if unit.amx.is_some() => vec![unit, unit.without_amx()],
            Ok(unit) => vec![unit],
            Err(missing) => {
                skip(missing);
                Vec::new()
            }
        }
    }

    #[test]
    fn whatever_is_missing_is_named() {
        assert_eq!(check(true, "avx512"), Ok(()));
        let refused = |bf16, simd| check(bf16, simd).expect_err("something is missing").to_string();
        assert!(refused(false, "avx512").contains("avx512_bf16"));
        assert!(refused(true, "portable").contains("DFAR_SIMD selects portable"));
    }

    #[test]
    fn tiles_may_be_configured_twice_and_multiply_integers_exactly() {
        let bf16 = |x: usize| (x as f32).to_bits() >> 16;
        // left[i, l] = i % 5 + l % 3, right[l, j] = l % 7 + j % 4
        let (left, right) = (|i: usize, l: usize| i % 5 + l % 3, |l: usize, j: usize| l % 7 + j % 4);
        let shapes =
            [[1, 1, 1], [2, 1, 3], [1, 2, 2], [3, 3, 1], [2, 4, 2], [1, 5, 2], [2, 6, 1], [1, 11, 1]];
        for unit in units() {
            let outer = unit.tiles();
            drop(unit.tiles());
            for [m, n, k] in shapes {
                let [rows, columns, steps] = [m * TILE, n * TILE, k * TILE];
                let pair = |low: usize, high: usize| bf16(low) | bf16(high) << 16;
                let a: Vec<u32> = (0..rows * steps)
                    .map(|at| (at / steps, at % steps * 2))
                    .map(|(i, l)| pair(left(i, l), left(i, l + 1)))
                    .collect();
                let b: Vec<u32> = (0..steps * columns)
                    .map(|at| (at / columns * 2, at % columns))
                    .map(|(l, j)| pair(right(l, j), right(l + 1, j)))
                    .collect();
                for (begin, before) in [(Begin::Zero, 0.0), (Begin::Output, 8.0)] {
                    // One row more, which stays as it is.
                    let mut out = vec![8.0; (rows + 1) * columns];
                    outer.product([m, n, k], (&a, steps), (&b, columns), (&mut out, columns), begin);
                    for (at, found) in out.iter().enumerate() {
                        let (i, j) = (at / columns, at % columns);
                        let sum: usize = (0..2 * steps).map(|l| left(i, l) * right(l, j)).sum();
                        let expected = if i < rows { before + sum as f32 } else { 8.0 };
                        let name = unit.name();
                        assert_eq!(*found, expected, "{name}: {m} x {n} x {k} tiles, row {i}, column {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_short_output_is_refused() {
        let factor = [0; 512];
        for unit in units() {
            let product = |len: usize| {
                let mut out = vec![0.0; len];
                unit.tiles().product([1, 1, 1], (&factor, 16), (&factor, 16), (&mut out, 16), Begin::Zero);
            };
            product(256);
            assert!(std::panic::catch_unwind(|| product(255)).is_err(), "{}", unit.name());
        }
    }
}
