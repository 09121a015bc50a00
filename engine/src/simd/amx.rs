//! AMX: products of bf16 factors with f32 sums, on eight tile registers of 16 rows of 64 bytes; and
//! the conversions to bf16, by AVX512-BF16.
//!
//! std has no stable intrinsics for AMX, so tiles are loaded, multiplied and stored in inline
//! assembly. No tile holds a value between two blocks of assembly; only the configuration, which
//! [`Tiles`] sets, does.
//!
//! **Layouts.** A factor is a matrix of *pairs*: a `u32` holds two bf16 that are consecutive in the
//! inner dimension, the first in the lower half. The left factor `[m, k]` has pairs along its rows,
//! `[m, k / 2]`; the right factor `[k, n]` has pairs along its columns, `[k / 2, n]`. So the pairs
//! of a right factor are the transposed pairs of its transpose as a left factor.
//!
//! **Rounding.** f32 values round to the nearest bf16, ties to even; NaN stays NaN. A subnormal
//! factor counts as 0 with its sign, and so does a subnormal sum. One instruction adds 32 products
//! to a sum: the 16 of the even and the 16 of the odd inner indices as two chains of fused
//! multiply-adds, then both to the sum, each time to nearest even.

use super::{Avx512, Simd};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;
use thiserror::Error;

/// Rows of a tile, and f32 sums or pairs of bf16 in one of its rows.
pub const TILE: usize = 16;

/// Why products in bf16 are not available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AmxError {
    /// The processor lacks an instruction set.
    #[error("this processor has no {0}")]
    Processor(&'static str),
    /// `DFAR_SIMD` selects other vectors.
    #[error("the environment variable DFAR_SIMD selects {0}")]
    Selected(&'static str),
    /// The operating system does not let the process use the tiles.
    #[error(
        "the operating system grants no tiles; Linux does from version 5.16 on, unless the signal \
         stack of a thread is too small for them"
    )]
    System,
}

/// What [`Amx::new`] finds.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Name of the vectors that [`dispatch`](super::dispatch) uses.
    pub simd: &'static str,
    /// The processor has AMX-TILE and AMX-BF16.
    pub amx_bf16: bool,
    /// The processor has AVX512-BF16, and AVX512-BW, which comes with it.
    pub avx512_bf16: bool,
}

impl Found {
    /// Looks at the processor and the environment.
    fn here() -> Self {
        #[allow(unused_unsafe)] // safe in newer versions of std
        // SAFETY: every x86-64 processor has CPUID.
        let (largest, leaf) = unsafe { (__cpuid(0).eax, __cpuid_count(7, 0)) };
        Self {
            simd: super::name(),
            amx_bf16: largest >= 7 && leaf.edx & (1 << 22) != 0 && leaf.edx & (1 << 24) != 0,
            avx512_bf16: is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw"),
        }
    }

    /// The first thing that is missing, apart from the permission of the operating system.
    fn check(self) -> Result<(), AmxError> {
        if !self.amx_bf16 {
            return Err(AmxError::Processor("AMX-BF16 (flags amx_tile and amx_bf16)"));
        }
        if !self.avx512_bf16 {
            return Err(AmxError::Processor("AVX512-BF16 (flag avx512_bf16)"));
        }
        if self.simd != Avx512::NAME {
            return Err(AmxError::Selected(self.simd));
        }
        Ok(())
    }
}

/// Asks Linux for the tiles, for all threads of the process.
fn granted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call changes a permission of this process; it takes no pointer.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Proof that the process may use AMX-BF16, AVX512-BF16 and AVX512-BW.
#[derive(Clone, Copy, Debug)]
pub struct Amx(Avx512);

impl Amx {
    /// # Errors
    /// [`AmxError`].
    pub fn new() -> Result<Self, AmxError> {
        static RESULT: OnceLock<Result<Amx, AmxError>> = OnceLock::new();
        *RESULT.get_or_init(|| {
            Found::here().check()?;
            let vectors = Avx512::new().ok_or(AmxError::Processor("AVX-512"))?;
            if granted() { Ok(Self(vectors)) } else { Err(AmxError::System) }
        })
    }

    /// Vectors of f32.
    #[inline(always)]
    pub fn vectors(self) -> Avx512 {
        self.0
    }
}

/// All eight tiles have 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration([u8; 64]);
static CONFIGURATION: Configuration = {
    let mut bytes = [0; 64];
    bytes[0] = 1; // palette
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64; // bytes per row
        bytes[48 + tile] = 16; // rows
        tile += 1;
    }
    Configuration(bytes)
};

thread_local! {
    /// Number of [`Tiles`] on this thread.
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// The tiles of this thread, configured while the value exists. To begin and end takes some 50 ns.
pub struct Tiles(PhantomData<*const ()>);

impl Amx {
    /// Configures the tiles of this thread.
    pub fn tiles(self) -> Tiles {
        if NESTED.replace(NESTED.get() + 1) == 0 {
            // SAFETY: `self` exists, so the tiles are there. The configuration has 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly));
            }
        }
        Tiles(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        NESTED.set(NESTED.get() - 1);
        if NESTED.get() == 0 {
            // SAFETY: the tiles are configured. No value in them is needed.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
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

/// Assembly for a block of the output: loads or zeroes its tiles, adds the products of all steps of
/// the inner dimension, stores the tiles.
macro_rules! block {
    ($product:ident, $row:ident, $column:ident, [$($load:literal)*], [$($zero:literal)*], [$($step:literal)*], [$($store:literal)*]) => {{
        let Product { left, left_row, right, right_row, out, out_row, k, begin } = *$product;
        let left = left.wrapping_byte_add($row * TILE * left_row);
        let right = right.wrapping_byte_add($column * 64);
        let out = out.wrapping_byte_add($row * TILE * out_row + $column * 64);
        asm!(
            "test {zero:e}, {zero:e}",
            "jnz 3f",
            $($load,)*
            "jmp 2f",
            "3:",
            $($zero,)*
            "2:",
            $($step,)*
            "add {left}, 64",
            "add {lower}, 64",
            "add {right}, {right_step}",
            "dec {k}",
            "jnz 2b",
            $($store,)*
            zero = in(reg) u32::from(begin == Begin::Zero),
            left = inout(reg) left => _,
            lower = inout(reg) left.wrapping_byte_add(TILE * left_row) => _,
            left_row = in(reg) left_row,
            right = inout(reg) right => _,
            right_row = in(reg) right_row,
            right_step = in(reg) TILE * right_row,
            out = in(reg) out,
            below = in(reg) out.wrapping_byte_add(TILE * out_row),
            out_row = in(reg) out_row,
            k = inout(reg) k => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }};
}

impl Product {
    /// Two by two tiles of the output.
    ///
    /// # Safety
    /// The tiles are configured, and all values are in bounds.
    #[inline(always)]
    unsafe fn square(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm1, [{out} + {out_row}*1 + 64]"
                 "tileloadd tmm2, [{below} + {out_row}*1]" "tileloadd tmm3, [{below} + {out_row}*1 + 64]"],
                ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{right} + {right_row}*1 + 64]"
                 "tdpbf16ps tmm1, tmm4, tmm7" "tileloadd tmm5, [{lower} + {left_row}*1]"
                 "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{out} + {out_row}*1 + 64], tmm1"
                 "tilestored [{below} + {out_row}*1], tmm2" "tilestored [{below} + {out_row}*1 + 64], tmm3"]
            );
        }
    }

    /// Two tiles of the output, one below the other.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn tall(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm2, [{below} + {out_row}*1]"],
                ["tilezero tmm0" "tilezero tmm2"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm5, [{lower} + {left_row}*1]"
                 "tdpbf16ps tmm2, tmm5, tmm6"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{below} + {out_row}*1], tmm2"]
            );
        }
    }

    /// Two tiles of the output, one beside the other.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn broad(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm1, [{out} + {out_row}*1 + 64]"
                 "/* {below} {lower} */"],
                ["tilezero tmm0" "tilezero tmm1"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{right} + {right_row}*1 + 64]"
                 "tdpbf16ps tmm1, tmm4, tmm7"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{out} + {out_row}*1 + 64], tmm1"]
            );
        }
    }

    /// One tile of the output.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn single(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "/* {below} {lower} */"],
                ["tilezero tmm0"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6"],
                ["tilestored [{out} + {out_row}*1], tmm0"]
            );
        }
    }
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
        // SAFETY: `self` exists, so the tiles are configured. Rows and columns below m and n are in
        // bounds, as checked above; `out` is borrowed mutably, so nothing else overlaps it.
        unsafe {
            for row in (0..m).step_by(2) {
                for column in (0..n).step_by(2) {
                    match (row + 1 < m, column + 1 < n) {
                        (true, true) => product.square(row, column),
                        (true, false) => product.tall(row, column),
                        (false, true) => product.broad(row, column),
                        (false, false) => product.single(row, column),
                    }
                }
            }
        }
    }
}

/// Peak rates, operands in registers. Both return the number of multiply-adds.
impl Amx {
    /// Runs `4 * rounds` products of tiles.
    pub fn multiply_adds_on_tiles(self, rounds: usize) -> usize {
        let _tiles = self.tiles();
        if rounds > 0 {
            // SAFETY: the tiles are configured; no memory is accessed.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        }
        4 * rounds * TILE * TILE * 2 * TILE
    }

    /// Runs `12 * rounds` dot products of vectors.
    pub fn multiply_adds_on_vectors(self, rounds: usize) -> usize {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn inner(rounds: usize) {
            const CHAINS: usize = 12;
            // SAFETY: both types are 512 bits of any content.
            let factor: __m512bh =
                unsafe { std::mem::transmute(_mm512_set1_epi32(std::hint::black_box(0x3c00_3c00))) };
            let mut sums = [_mm512_setzero_ps(); CHAINS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, factor, factor);
                }
            }
            for sum in sums {
                std::hint::black_box(_mm512_reduce_add_ps(sum));
            }
        }
        // SAFETY: `self` exists, so the processor has the instructions.
        unsafe { inner(rounds) };
        12 * rounds * 2 * TILE
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

    /// The tiles; `None`, with a line that says so, where they are missing.
    fn amx(test: &str) -> Option<Amx> {
        Amx::new().map_err(|missing| println!("{test} is SKIPPED: {missing}")).ok()
    }

    #[test]
    fn whatever_is_missing_is_named() {
        let all = Found { simd: "avx512", amx_bf16: true, avx512_bf16: true };
        assert_eq!(all.check(), Ok(()));
        let refused = |found: Found| found.check().expect_err("something is missing").to_string();
        assert!(refused(Found { amx_bf16: false, ..all }).contains("amx_tile and amx_bf16"));
        assert!(refused(Found { avx512_bf16: false, ..all }).contains("avx512_bf16"));
        assert!(refused(Found { simd: "portable", ..all }).contains("DFAR_SIMD selects portable"));
    }

    #[test]
    fn tiles_may_be_configured_twice_and_multiply_integers_exactly() {
        let Some(amx) = amx("tiles_may_be_configured_twice_and_multiply_integers_exactly") else { return };
        let bf16 = |x: usize| (x as f32).to_bits() >> 16;
        // left[i, l] = i % 5 + l % 3, right[l, j] = l % 7 + j % 4
        let (left, right) = (|i: usize, l: usize| i % 5 + l % 3, |l: usize, j: usize| l % 7 + j % 4);
        let outer = amx.tiles();
        drop(amx.tiles());
        for [m, n, k] in [[1, 1, 1], [2, 1, 3], [1, 2, 2], [3, 3, 1], [2, 4, 2]] {
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
                    assert_eq!(*found, expected, "{m} x {n} x {k} tiles, row {i}, column {j}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "the output is too short")]
    fn a_short_output_is_refused() {
        let Some(amx) = amx("a_short_output_is_refused") else { panic!("the output is too short") };
        let factor = [0; 512];
        let mut out = [0.0; 255];
        amx.tiles().product([1, 1, 1], (&factor, 16), (&factor, 16), (&mut out, 16), Begin::Zero);
    }
}
