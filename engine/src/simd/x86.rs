//! AVX2 with FMA, and AVX-512F.

use super::{Kernel, Simd};
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
    fn where_positive(self, condition: __m512, value: __m512) -> __m512 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(condition, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(mask, value)
        }
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
    fn where_positive(self, condition: __m256, value: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(condition, _mm256_setzero_ps()), value) }
    }
    #[inline(always)]
    fn first(self, n: usize, a: __m256, otherwise: __m256) -> __m256 {
        // SAFETY: `self` exists, so `new` detected the features.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), lane);
            _mm256_blendv_ps(otherwise, a, _mm256_castsi256_ps(below))
        }
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
