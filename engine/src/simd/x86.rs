//! AVX2 with FMA, and AVX-512F.

use super::{Kernel, MAX_LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512F, AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx512 {
    /// `None` if the processor or the operating system lacks it.
    pub fn new() -> Option<Self> {
        let here = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        here.then_some(Self(()))
    }

    /// Runs `kernel` compiled for AVX-512.
    #[inline]
    pub fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx2,fma")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { inner(self, kernel) }
    }
}

impl Avx2 {
    /// `None` if the processor or the operating system lacks it.
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    /// Runs `kernel` compiled for AVX2 and FMA.
    #[inline]
    pub fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { inner(self, kernel) }
    }
}

/// The operations that are one intrinsic on both sets.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::V),+) -> Self::V {
            // SAFETY: `self` exists, so `new` detected the features.
            unsafe { $intrinsic($($arg),+) }
        }
    )+};
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const NAME: &'static str = "avx512";
    type V = __m512;

    intrinsics! {
        add(a, b) = _mm512_add_ps;
        sub(a, b) = _mm512_sub_ps;
        mul(a, b) = _mm512_mul_ps;
        div(a, b) = _mm512_div_ps;
        mul_add(a, b, c) = _mm512_fmadd_ps;
        mul_sub(a, b, c) = _mm512_fmsub_ps;
        max(a, b) = _mm512_max_ps;
        scale_by_power(a, n) = _mm512_scalef_ps;
    }
    #[inline(always)]
    fn mul_add_one(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, x: *const f32) -> __m512 {
        // SAFETY: features as above; the caller guarantees 16 readable values.
        unsafe { _mm512_loadu_ps(x) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: __m512, out: *mut f32) {
        // SAFETY: features as above; the caller guarantees 16 writable values.
        unsafe { _mm512_storeu_ps(out, v) }
    }
    #[inline(always)]
    fn prefetch(self, x: *const f32) {
        // SAFETY: every x86-64 processor has it; a prefetch reads no memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(self, n: usize, x: *const f32) -> __m512 {
        // SAFETY: features as above; the caller guarantees n readable values, at most 16, and lanes
        // without a mask bit are not read.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, x) }
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, n: usize, v: __m512, out: *mut f32) {
        // SAFETY: features as above; the caller guarantees n writable values, at most 16, and lanes
        // without a mask bit are not written.
        unsafe { _mm512_mask_storeu_ps(out, ((1u32 << n) - 1) as __mmask16, v) }
    }
    #[inline(always)]
    fn transpose(self, square: &mut [__m512; MAX_LANES]) {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            // Of vectors g..g + 4: block k of vector g + e gets element 4k + e of each.
            for g in [0, 4, 8, 12] {
                let ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(square[g], square[g + 1]));
                let ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(square[g], square[g + 1]));
                let cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(square[g + 2], square[g + 3]));
                let cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(square[g + 2], square[g + 3]));
                square[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
                square[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
                square[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
                square[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
            }
            for e in 0..4 {
                let ab_low = _mm512_shuffle_f32x4::<0x44>(square[e], square[e + 4]);
                let ab_high = _mm512_shuffle_f32x4::<0xee>(square[e], square[e + 4]);
                let cd_low = _mm512_shuffle_f32x4::<0x44>(square[e + 8], square[e + 12]);
                let cd_high = _mm512_shuffle_f32x4::<0xee>(square[e + 8], square[e + 12]);
                square[e] = _mm512_shuffle_f32x4::<0x88>(ab_low, cd_low);
                square[e + 4] = _mm512_shuffle_f32x4::<0xdd>(ab_low, cd_low);
                square[e + 8] = _mm512_shuffle_f32x4::<0x88>(ab_high, cd_high);
                square[e + 12] = _mm512_shuffle_f32x4::<0xdd>(ab_high, cd_high);
            }
        }
    }
    #[inline(always)]
    fn select_positive(self, condition: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(condition, _mm512_setzero_ps());
            _mm512_mask_mov_ps(b, mask, a)
        }
    }
    #[inline(always)]
    fn zero_below(self, limit: __m512, x: __m512, value: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), value) }
    }
    #[inline(always)]
    fn first(self, n: usize, a: __m512, otherwise: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_mask_mov_ps(otherwise, ((1u32 << n.min(16)) - 1) as __mmask16, a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    /// Degree 6 minimax polynomial on [0, 1], after subtracting the floor. `scalef` takes the floor
    /// of its exponent itself. Of -inf it makes 0 and of infinity infinity, although the polynomial
    /// is NaN there.
    #[inline(always)]
    fn exp2(self, x: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        let floor = unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x) };
        let f = self.sub(x, floor);
        let mut p = self.splat(2.161_291_5e-4);
        for coefficient in [1.246_784_7e-3, 9.675_452e-3, 5.548_528_2e-2, 2.402_293_1e-1, 6.931_470_6e-1, 1.0]
        {
            p = self.mul_add(p, f, self.splat(coefficient));
        }
        self.scale_by_power(p, x)
    }
    #[inline(always)]
    fn exponent(self, a: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_getexp_ps(a) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm512_reduce_max_ps(a) }
    }
}

/// All bits of lanes `0..n`.
#[inline]
#[target_feature(enable = "avx2")]
fn below(n: usize) -> __m256i {
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), lane)
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const NAME: &'static str = "avx2";
    type V = __m256;

    intrinsics! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        mul_add(a, b, c) = _mm256_fmadd_ps;
        mul_sub(a, b, c) = _mm256_fmsub_ps;
        max(a, b) = _mm256_max_ps;
    }
    #[inline(always)]
    fn mul_add_one(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, x: *const f32) -> __m256 {
        // SAFETY: features as above; the caller guarantees 8 readable values.
        unsafe { _mm256_loadu_ps(x) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: __m256, out: *mut f32) {
        // SAFETY: features as above; the caller guarantees 8 writable values.
        unsafe { _mm256_storeu_ps(out, v) }
    }
    #[inline(always)]
    fn prefetch(self, x: *const f32) {
        // SAFETY: every x86-64 processor has it; a prefetch reads no memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(self, n: usize, x: *const f32) -> __m256 {
        // SAFETY: features as above; the caller guarantees n readable values, at most 8, and masked
        // lanes are not read.
        unsafe { _mm256_maskload_ps(x, below(n)) }
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, n: usize, v: __m256, out: *mut f32) {
        // SAFETY: features as above; the caller guarantees n writable values, at most 8, and masked
        // lanes are not written.
        unsafe { _mm256_maskstore_ps(out, below(n), v) }
    }
    #[inline(always)]
    fn transpose(self, square: &mut [__m256; MAX_LANES]) {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            // Of vectors g..g + 4: half k of vector g + e gets element 4k + e of each.
            for g in [0, 4] {
                let ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(square[g], square[g + 1]));
                let ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(square[g], square[g + 1]));
                let cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(square[g + 2], square[g + 3]));
                let cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(square[g + 2], square[g + 3]));
                square[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
                square[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
                square[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
                square[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
            }
            for e in 0..4 {
                let (low, high) = (square[e], square[e + 4]);
                square[e] = _mm256_permute2f128_ps::<0x20>(low, high);
                square[e + 4] = _mm256_permute2f128_ps::<0x31>(low, high);
            }
        }
    }
    #[inline(always)]
    fn select_positive(self, condition: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(condition, _mm256_setzero_ps());
            _mm256_blendv_ps(b, a, above)
        }
    }
    #[inline(always)]
    fn zero_below(self, limit: __m256, x: __m256, value: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm256_and_ps(value, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit)) }
    }
    #[inline(always)]
    fn first(self, n: usize, a: __m256, otherwise: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm256_blendv_ps(otherwise, a, _mm256_castsi256_ps(below(n))) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            // In two steps, so that each power is a normal number. For |a| in [0.5, 2], ±250 gives
            // 0 or infinity. max(bound, n) and min(bound, n) return n if n is NaN; `a` then holds
            // the NaN from x - round(x).
            let n = _mm256_min_ps(_mm256_set1_ps(250.0), _mm256_max_ps(_mm256_set1_ps(-250.0), n));
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let power =
                |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
            _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(n, half)))
        }
    }
    #[inline(always)]
    fn exponent(self, a: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let exponent = _mm256_srli_epi32::<23>(_mm256_castps_si256(a));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(exponent, _mm256_set1_epi32(127)))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
}
