//! NEON, part of every aarch64 processor.

use super::{MAX_LANES, Simd};
use std::arch::aarch64::*;

/// Proof that the processor has NEON.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

impl Neon {
    /// Always `Some` on aarch64; an `Option` for uniformity.
    pub fn new() -> Option<Self> {
        Some(Self(()))
    }
}

macro_rules! intrinsics {
    ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::V),+) -> Self::V {
            // SAFETY: NEON is part of aarch64.
            unsafe { $intrinsic($($arg),+) }
        }
    )+};
}

impl Simd for Neon {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    const NAME: &'static str = "neon";
    type V = float32x4_t;

    intrinsics! {
        add(a, b) = vaddq_f32;
        sub(a, b) = vsubq_f32;
        mul(a, b) = vmulq_f32;
        div(a, b) = vdivq_f32;
        round(a) = vrndnq_f32;
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // Not `vmaxq_f32`, which also keeps a NaN in `a`.
        // SAFETY: NEON is part of aarch64.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn mul_sub(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe { vfmaq_f32(vnegq_f32(c), a, b) }
    }
    #[inline(always)]
    fn mul_add_one(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, x: *const f32) -> float32x4_t {
        // SAFETY: the caller guarantees 4 readable values.
        unsafe { vld1q_f32(x) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: float32x4_t, out: *mut f32) {
        // SAFETY: the caller guarantees 4 writable values.
        unsafe { vst1q_f32(out, v) }
    }
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}
    #[inline(always)]
    unsafe fn load_first_ptr(self, n: usize, x: *const f32) -> float32x4_t {
        let mut values = [0.0; 4];
        // SAFETY: the caller guarantees n readable values, at most 4.
        unsafe {
            std::ptr::copy_nonoverlapping(x, values.as_mut_ptr(), n);
            vld1q_f32(values.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, n: usize, v: float32x4_t, out: *mut f32) {
        let mut values = [0.0; 4];
        // SAFETY: the caller guarantees n writable values, at most 4.
        unsafe {
            vst1q_f32(values.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(values.as_ptr(), out, n);
        }
    }
    #[inline(always)]
    fn transpose(self, square: &mut [float32x4_t; MAX_LANES]) {
        let [a, b, c, d, ..] = *square;
        // SAFETY: NEON is part of aarch64.
        unsafe {
            let ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
            let ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
            let cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d));
            let cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
            square[0] = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
            square[1] = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
            square[2] = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
            square[3] = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
        }
    }
    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn select_positive(self, condition: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe { vbslq_f32(vcgtzq_f32(condition), a, b) }
    }
    #[inline(always)]
    fn zero_below(self, limit: float32x4_t, x: float32x4_t, value: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe {
            let below = vcltq_f32(x, limit);
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), below))
        }
    }
    #[inline(always)]
    fn first(self, n: usize, a: float32x4_t, otherwise: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64; the array has 4 values.
        unsafe {
            let lane = vld1q_u32([0, 1, 2, 3].as_ptr());
            vbslq_f32(vcltq_u32(lane, vdupq_n_u32(n.min(4) as u32)), a, otherwise)
        }
    }
    #[inline(always)]
    fn scale_by_power(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe {
            // In two steps, so that each power is a normal number.
            let n = vminq_f32(vmaxq_f32(n, vdupq_n_f32(-250.0)), vdupq_n_f32(250.0));
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            let power = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
            vmulq_f32(vmulq_f32(a, power(half)), power(vsubq_s32(n, half)))
        }
    }
    #[inline(always)]
    fn exponent(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is part of aarch64.
        unsafe {
            let exponent = vshrq_n_s32::<23>(vreinterpretq_s32_f32(a));
            vcvtq_f32_s32(vsubq_s32(exponent, vdupq_n_s32(127)))
        }
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        // SAFETY: NEON is part of aarch64.
        unsafe { vaddvq_f32(a) }
    }
    #[inline(always)]
    fn max_lane(self, a: float32x4_t) -> f32 {
        // SAFETY: NEON is part of aarch64.
        unsafe { vmaxvq_f32(a) }
    }
}
