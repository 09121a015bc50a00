//! A small f32 vector trait, its instruction sets, and the dispatch between them at run time.
//!
//! An algorithm is a [`Kernel`], generic over [`Simd`]. [`dispatch`] runs it with the widest
//! instruction set of the processor. A value of a `Simd` type proves that its instructions exist:
//! only `new`, which checks, creates one. Hence all its methods are safe to call.
//!
//! The module `bf16` stands apart: products of bf16 factors, by AMX or AVX512-BF16.
//!
//! All methods must be `#[inline(always)]`: a method that is not inlined into the
//! `#[target_feature]` entry point is compiled without its instructions.

#[cfg(target_arch = "x86_64")]
pub mod bf16;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use std::ffi::OsString;

/// The largest [`Simd::LANES`].
pub const MAX_LANES: usize = 16;

/// Vectors of [`Simd::LANES`] f32 values.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Number of f32 values in a vector.
    const LANES: usize;
    /// Vector registers available to an inner loop.
    const REGISTERS: usize;
    /// Name for reports, e.g. `avx512`.
    const NAME: &'static str;
    /// One vector.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The `LANES` values at `x`.
    ///
    /// # Safety
    /// `x` must be valid for reading `LANES` values.
    unsafe fn load_ptr(self, x: *const f32) -> Self::V;
    /// Writes the `LANES` values of `v` to `out`.
    ///
    /// # Safety
    /// `out` must be valid for writing `LANES` values.
    unsafe fn store_ptr(self, v: Self::V, out: *mut f32);
    /// The `n` values at `x`, at most `LANES`, and 0 in the other lanes.
    ///
    /// # Safety
    /// `x` must be valid for reading `n` values, and `n` at most `LANES`.
    unsafe fn load_first_ptr(self, n: usize, x: *const f32) -> Self::V;
    /// Writes the first `n` lanes of `v` to `out`.
    ///
    /// # Safety
    /// `out` must be valid for writing `n` values, and `n` at most `LANES`.
    unsafe fn store_first_ptr(self, n: usize, v: Self::V, out: *mut f32);
    /// Transposes the square of the first `LANES` vectors: exchanges lane `r` of vector `x` and
    /// lane `x` of vector `r`.
    fn transpose(self, square: &mut [Self::V; MAX_LANES]);
    /// Asks for the cache line at `x`, which need not be valid, before it is read.
    fn prefetch(self, x: *const f32);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, with one rounding if the processor has FMA.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a * b - c`, with one rounding if the processor has FMA. Exact on every processor if `c` is
    /// the rounded product.
    fn mul_sub(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// [`mul_add`](Self::mul_add) of single values, with the same rounding.
    fn mul_add_one(self, a: f32, b: f32, c: f32) -> f32;
    /// Lane-wise `if a > b { a } else { b }`: keeps a NaN in `b`, and drops one in `a`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where `condition > 0`, else `b`, also where `condition` is NaN.
    fn select_positive(self, condition: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `value` where `x >= limit` or `x` is NaN, else 0.
    fn zero_below(self, limit: Self::V, x: Self::V, value: Self::V) -> Self::V;
    /// Lanes `0..n` of `a` and the other lanes of `otherwise`. `n` may exceed [`Simd::LANES`].
    fn first(self, n: usize, a: Self::V, otherwise: Self::V) -> Self::V;
    /// Nearest integer.
    fn round(self, a: Self::V) -> Self::V;
    /// `a * 2^n` for whole `n`; underflows to 0, overflows to infinity.
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V;
    /// The exponent of a positive normal number: the largest whole `n` with `2^n <= a`.
    fn exponent(self, a: Self::V) -> Self::V;
    /// Sum of the lanes.
    fn sum(self, a: Self::V) -> f32;
    /// Largest lane.
    fn max_lane(self, a: Self::V) -> f32;

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// The first `LANES` values of `x`. Panics if there are fewer.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..Self::LANES];
        // SAFETY: the slice above has LANES values.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    /// Writes `v` to the first `LANES` values of `out`. Panics if there are fewer.
    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32]) {
        let out = &mut out[..Self::LANES];
        // SAFETY: the slice above has LANES values.
        unsafe { self.store_ptr(v, out.as_mut_ptr()) }
    }

    /// `value` where `condition > 0`, else 0: the derivative mask of ReLU.
    #[inline(always)]
    fn where_positive(self, condition: Self::V, value: Self::V) -> Self::V {
        self.select_positive(condition, value, self.zero())
    }

    /// `2^x` to about 1 ulp; 0 for `x = -inf`, infinity for finite `x >= 128`, NaN for NaN, infinity
    /// or NaN for infinity.
    ///
    /// Degree 6 minimax polynomial on [-1/2, 1/2], after subtracting the nearest integer.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        // Clamped from below, because -inf - -inf is NaN. The order of the operands keeps a NaN.
        let x = self.max(self.splat(-1000.0), x);
        let n = self.round(x);
        let f = self.sub(x, n);
        let mut p = self.splat(1.535_336_8e-4);
        p = self.mul_add(p, f, self.splat(1.339_887_5e-3));
        p = self.mul_add(p, f, self.splat(9.618_437e-3));
        p = self.mul_add(p, f, self.splat(5.550_332_5e-2));
        p = self.mul_add(p, f, self.splat(2.402_264_7e-1));
        p = self.mul_add(p, f, self.splat(std::f32::consts::LN_2));
        p = self.mul_add(p, f, self.splat(1.0));
        self.scale_by_power(p, n)
    }

    /// `2^x` for a weight of a softmax whose largest weight is about 1 and takes part in the result;
    /// 0 for `x < -48`.
    ///
    /// In f32, weights below `2^-48` do not change the result, but their gradients are subnormal
    /// numbers. A processor takes more than a hundred cycles for an instruction on these: training
    /// would be several times slower once attention is sharp. Not for the joint softmax, whose
    /// largest weight may be masked.
    #[inline(always)]
    fn exp2_of_weight(self, x: Self::V) -> Self::V {
        self.zero_below(self.splat(-48.0), x, self.exp2(x))
    }

    /// The natural logarithm of a positive normal number to about 1 ulp, or to 1e-7 near 1; -inf
    /// for 0, NaN for NaN.
    ///
    /// Degree 8 polynomial (Cephes `logf`) on [sqrt(1/2), sqrt(2)], after dividing by a power of
    /// two.
    #[inline(always)]
    fn ln(self, x: Self::V) -> Self::V {
        let n = self.exponent(self.mul(x, self.splat(std::f32::consts::SQRT_2)));
        let f = self.sub(self.scale_by_power(x, self.sub(self.zero(), n)), self.splat(1.0));
        let square = self.mul(f, f);
        let mut p = self.splat(7.037_683_6e-2);
        for coefficient in [
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_7e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ] {
            p = self.mul_add(p, f, self.splat(coefficient));
        }
        // ln 2 in two parts, of which the first times n is exact.
        let mut small = self.mul(self.mul(p, f), square);
        small = self.mul_add(n, self.splat(-2.121_944_4e-4), small);
        small = self.mul_add(square, self.splat(-0.5), small);
        let y = self.mul_add(n, self.splat(0.693_359_4), self.add(small, f));
        // Other x are 0 or NaN.
        self.select_positive(x, y, self.sub(x, self.splat(f32::INFINITY)))
    }
}

/// An algorithm, generic over the instruction set.
pub trait Kernel {
    /// The result.
    type Output;
    /// Runs the algorithm. Implementations must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the widest vectors of the processor. The environment variable `DFAR_SIMD`
/// selects another set: `avx512`, `avx2`, `neon` or `portable`; an unavailable or unknown name is
/// ignored ([`check_selected`] refuses it).
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    best().run(kernel)
}

/// Refuses a `DFAR_SIMD` that [`dispatch`] would ignore.
///
/// # Errors
/// The names that this processor has, in words.
pub fn check_selected() -> Result<(), String> {
    let available = available();
    selected(&available).map(drop).map_err(|wanted| {
        let names: Vec<&str> = available.iter().map(|(name, _)| *name).collect();
        format!("{}: this processor has {}", wanted.display(), names.join(", "))
    })
}

/// The set that `DFAR_SIMD` names, if it is given; its value if that is none of these.
fn selected(available: &[(&'static str, Set)]) -> Result<Option<Set>, OsString> {
    let Some(wanted) = std::env::var_os("DFAR_SIMD") else { return Ok(None) };
    match available.iter().find(|(name, _)| *name == wanted) {
        Some((_, set)) => Ok(Some(*set)),
        None => Err(wanted),
    }
}

/// Name of the instruction set of [`dispatch`].
pub fn name() -> &'static str {
    struct Name;
    impl Kernel for Name {
        type Output = &'static str;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> &'static str {
            S::NAME
        }
    }
    dispatch(Name)
}

/// An instruction set of the processor.
#[derive(Clone, Copy)]
pub(crate) enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Portable(Portable),
}

impl Set {
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(simd) => kernel.run(simd),
            Self::Portable(simd) => kernel.run(simd),
        }
    }
}

fn best() -> Set {
    static BEST: std::sync::OnceLock<Set> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| {
        let available = available();
        selected(&available).ok().flatten().unwrap_or(available[0].1)
    })
}

/// The instruction sets of the processor, widest first.
pub(crate) fn available() -> Vec<(&'static str, Set)> {
    let mut sets = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        sets.extend(Avx512::new().map(|s| (Avx512::NAME, Set::Avx512(s))));
        sets.extend(Avx2::new().map(|s| (Avx2::NAME, Set::Avx2(s))));
    }
    #[cfg(target_arch = "aarch64")]
    sets.extend(Neon::new().map(|s| (Neon::NAME, Set::Neon(s))));
    sets.push((Portable::NAME, Set::Portable(Portable)));
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks each operation of an instruction set against scalar arithmetic.
    struct Check;
    impl Kernel for Check {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let a: Vec<f32> = (0..S::LANES).map(|i| i as f32 * 0.75 - 3.0).collect();
            let b: Vec<f32> = (0..S::LANES).map(|i| 2.5 - i as f32).collect();
            let (va, vb, vc) = (s.load(&a), s.load(&b), s.splat(0.3));
            let check = |v: S::V, f: &dyn Fn(f32, f32) -> f32| {
                let mut out = vec![0.0; S::LANES];
                s.store(v, &mut out);
                for i in 0..S::LANES {
                    assert_eq!(out[i], f(a[i], b[i]), "{} lane {i}", S::NAME);
                }
            };
            check(s.add(va, vb), &|a, b| a + b);
            check(s.sub(va, vb), &|a, b| a - b);
            check(s.mul(va, vb), &|a, b| a * b);
            check(s.div(va, vb), &|a, b| a / b);
            check(s.mul_add(va, vb, s.splat(1.0)), &|a, b| a * b + 1.0);
            check(s.mul_sub(va, vb, s.splat(1.0)), &|a, b| a * b - 1.0);
            let (x, y) = (1.0 + f32::EPSILON, 3.0 + 7.0 * f32::EPSILON);
            let rounding = (f64::from(x) * f64::from(y) - f64::from(x * y)) as f32;
            check(s.mul_sub(s.splat(x), s.splat(y), s.splat(x * y)), &|_, _| rounding);
            check(s.mul_add(va, vb, vc), &|a, b| s.mul_add_one(a, b, 0.3));
            check(s.max(va, vb), &f32::max);
            check(s.max(s.splat(f32::NAN), vb), &|_, b| b);
            let mut kept = vec![0.0; S::LANES];
            s.store(s.max(va, s.splat(f32::NAN)), &mut kept);
            assert!(kept.iter().all(|x| x.is_nan()), "{}", S::NAME);
            check(s.where_positive(va, vb), &|a, b| if a > 0.0 { b } else { 0.0 });
            check(s.round(va), &|a, _| a.round_ties_even());
            check(s.scale_by_power(va, s.splat(-3.0)), &|a, _| a / 8.0);
            for n in [0, 1, S::LANES - 1, S::LANES, S::LANES + 5, usize::MAX] {
                let mut out = vec![0.0; S::LANES];
                s.store(s.first(n, va, vb), &mut out);
                for i in 0..S::LANES {
                    assert_eq!(out[i], if i < n { a[i] } else { b[i] }, "{} first {n}, lane {i}", S::NAME);
                }
            }
            check(s.select_positive(va, va, vb), &|a, b| if a > 0.0 { a } else { b });
            check(s.select_positive(s.splat(f32::NAN), va, vb), &|_, b| b);
            check(s.zero_below(s.splat(0.5), va, vb), &|a, b| if a < 0.5 { 0.0 } else { b });
            check(s.zero_below(s.splat(0.5), s.splat(f32::NAN), vb), &|_, b| b);
            for n in 0..=S::LANES {
                let mut out = vec![7.0; S::LANES + 1];
                // SAFETY: both slices hold at least n values.
                unsafe {
                    check(s.load_first_ptr(n, a[S::LANES - n..].as_ptr()), &|x, _| {
                        let i = a.iter().position(|&a| a == x).expect("the values differ");
                        if i < n { a[S::LANES - n + i] } else { 0.0 }
                    });
                    s.store_first_ptr(n, va, out.as_mut_ptr());
                }
                assert_eq!(out[..n], a[..n], "{} store {n}", S::NAME);
                assert!(out[n..].iter().all(|&x| x == 7.0), "{} store {n}", S::NAME);
            }
            let square: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
            let mut vectors = [s.zero(); MAX_LANES];
            for r in 0..S::LANES {
                vectors[r] = s.load(&square[r * S::LANES..]);
            }
            s.transpose(&mut vectors);
            for x in 0..S::LANES {
                let mut out = vec![0.0; S::LANES];
                s.store(vectors[x], &mut out);
                let want: Vec<f32> = (0..S::LANES).map(|r| square[r * S::LANES + x]).collect();
                assert_eq!(out, want, "{} line {x}", S::NAME);
            }
            for (x, n) in
                [(1.0f32, 0.0), (1.99, 0.0), (2.0, 1.0), (0.4, -2.0), (1e-37, -123.0), (3e38, 127.0)]
            {
                check(s.exponent(s.splat(x)), &|_, _| n);
            }
            for x in [1e-37f32, 1e-20, 0.3, 0.70, 0.71, 0.999, 1.0, 1.001, 1.41, 1.42, 2.0, 9.7, 6e9, 1e37] {
                let mut out = vec![0.0; S::LANES];
                s.store(s.ln(s.splat(x)), &mut out);
                let want = f64::from(x).ln();
                let error = (f64::from(out[0]) - want).abs();
                assert!(error <= 1.2e-7 * want.abs().max(0.5), "{}: ln({x}) = {}", S::NAME, out[0]);
            }
            let logarithm = |x: f32| {
                let mut out = vec![0.0; S::LANES];
                s.store(s.ln(s.splat(x)), &mut out);
                out[0]
            };
            assert_eq!(logarithm(0.0), f32::NEG_INFINITY, "{}", S::NAME);
            assert!(logarithm(f32::NAN).is_nan(), "{}", S::NAME);
            assert_eq!(s.sum(va), a.iter().sum::<f32>());
            assert_eq!(s.max_lane(vb), 2.5);
            for x in [
                -1000.0, -149.5, -126.3, -48.1, -48.0, -47.9, -1.5, -0.5, 0.0, 0.49, 0.5, 1.0, 3.7, 126.9,
                127.6, 128.0, 1e4f32,
            ] {
                let mut out = vec![0.0; S::LANES];
                s.store(s.exp2(s.splat(x)), &mut out);
                let want = (x as f64).exp2() as f32;
                let ok = out[0] == want
                    || (out[0] - want).abs() <= 3e-7 * want
                    || want < f32::MIN_POSITIVE && out[0] <= 2.0 * f32::MIN_POSITIVE;
                assert!(ok, "{}: exp2({x}) = {} instead of {want}", S::NAME, out[0]);
                let whole = out[0];
                s.store(s.exp2_of_weight(s.splat(x)), &mut out);
                assert_eq!(out[0], if x < -48.0 { 0.0 } else { whole }, "{}: weight, {x}", S::NAME);
            }
            let mut out = vec![1.0; S::LANES];
            s.store(s.exp2(s.splat(f32::NEG_INFINITY)), &mut out);
            assert_eq!(out[0], 0.0, "{}", S::NAME);
            for f in [S::exp2, S::exp2_of_weight] {
                s.store(f(s, s.splat(f32::NAN)), &mut out);
                assert!(out[0].is_nan(), "{}", S::NAME);
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_scalar_arithmetic() {
        for (name, set) in available() {
            println!("checking {name}");
            set.run(Check);
        }
    }
}
