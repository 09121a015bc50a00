//! Plain Rust for all other processors; the compiler may vectorize it.

use super::{MAX_LANES, Simd};

/// Eight lanes in an array.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const REGISTERS: usize = 8;
    const NAME: &'static str = "portable";
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_ptr(self, x: *const f32) -> Self::V {
        // SAFETY: the caller guarantees LANES readable values; an array of f32 has f32's alignment.
        unsafe { *x.cast() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: Self::V, out: *mut f32) {
        // SAFETY: the caller guarantees LANES writable values; an array of f32 has f32's alignment.
        unsafe { *out.cast() = v }
    }
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}
    #[inline(always)]
    unsafe fn load_first_ptr(self, n: usize, x: *const f32) -> Self::V {
        // SAFETY: the caller guarantees n readable values.
        map(|i| if i < n { unsafe { *x.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, n: usize, v: Self::V, out: *mut f32) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller guarantees n writable values.
            unsafe { *out.add(i) = x };
        }
    }
    #[inline(always)]
    fn transpose(self, square: &mut [Self::V; MAX_LANES]) {
        let rows = *square;
        for (x, v) in square.iter_mut().enumerate().take(LANES) {
            *v = map(|r| rows[r][x]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // f32::mul_add is a library call on a processor without FMA.
        map(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn mul_sub(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // A product of two f32 is exact in f64.
        map(|i| (f64::from(a[i]) * f64::from(b[i]) - f64::from(c[i])) as f32)
    }
    #[inline(always)]
    fn mul_add_one(self, a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn select_positive(self, condition: Self::V, a: Self::V, b: Self::V) -> Self::V {
        map(|i| if condition[i] > 0.0 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn zero_below(self, limit: Self::V, x: Self::V, value: Self::V) -> Self::V {
        map(|i| if x[i] < limit[i] { 0.0 } else { value[i] })
    }
    #[inline(always)]
    fn first(self, n: usize, a: Self::V, otherwise: Self::V) -> Self::V {
        map(|i| if i < n { a[i] } else { otherwise[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        map(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V {
        // In two steps, so that each power is a normal number.
        let power = |n: f32| f32::from_bits(((n as i32 + 127) as u32) << 23);
        map(|i| {
            let n = n[i].clamp(-250.0, 250.0);
            let half = (n * 0.5).trunc();
            if n.is_nan() { f32::NAN } else { a[i] * power(half) * power(n - half) }
        })
    }
    #[inline(always)]
    fn exponent(self, a: Self::V) -> Self::V {
        map(|i| (a[i].to_bits() >> 23) as f32 - 127.0)
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    fn max_lane(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
}
