//! Limits of the CPU: multiply-adds, in f32 and of factors in bf16, and exponentials per second,
//! operands in registers, on all threads.

use crate::timing::shortest;
use dfar::simd::{self, Kernel, Simd, dispatch};
use rayon::prelude::*;
use serde::Serialize;
use std::fmt;
use std::hint::black_box;
use std::time::Duration;

/// Peak rates of all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Instruction set.
    pub simd: &'static str,
    /// Threads.
    pub threads: usize,
    /// f32 multiply-adds per second.
    pub multiply_adds: f64,
    /// f32 exponentials per second, by the polynomial of the attention engine.
    pub exponentials: f64,
    /// Multiply-adds per second of bf16 factors. `None` without AVX512-BF16.
    pub bf16: Option<Bf16>,
}

/// Multiply-adds per second of bf16 factors, with f32 sums.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bf16 {
    /// On AMX tiles (`tdpbf16ps`), which `--precision bf16` uses if the processor has them.
    pub tiles: Option<f64>,
    /// By AVX512-BF16 (`vdpbf16ps`).
    pub vectors: f64,
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (fma, exp) = (self.multiply_adds / 1e9, self.exponentials / 1e9);
        writeln!(f, "{} on {} threads, operands in registers:", self.simd, self.threads)?;
        writeln!(f, "  multiply-adds  {fma:>8.1} G/s  ({:.1} GFLOP/s)", 2.0 * fma)?;
        write!(f, "  exponentials   {exp:>8.2} G/s")?;
        if let Some(Bf16 { tiles, vectors }) = self.bf16 {
            writeln!(f)?;
            writeln!(f, "  multiply-adds of bf16 factors:")?;
            if let Some(tiles) = tiles {
                writeln!(f, "  amx tiles      {:>8.1} G/s", tiles / 1e9)?;
            }
            write!(f, "  avx512_bf16    {:>8.1} G/s", vectors / 1e9)?;
        }
        Ok(())
    }
}

/// Measures each rate for half a second.
pub fn measure() -> Limits {
    Limits {
        simd: simd::name(),
        threads: rayon::current_num_threads(),
        multiply_adds: rate(|rounds| dispatch(MultiplyAdds(rounds))),
        exponentials: rate(|rounds| dispatch(Exponentials(rounds))),
        bf16: bf16(),
    }
}

/// Operations per second of all threads together. `run` returns how many it has done.
fn rate(run: impl Fn(usize) -> usize + Sync) -> f64 {
    // Long enough to hide the start of the threads.
    let rounds = 200_000;
    let mut done = 0;
    let time = shortest(Duration::from_millis(500), || {
        let threads = (0..rayon::current_num_threads()).into_par_iter();
        done = threads.map(|_| run(black_box(rounds))).sum();
    });
    done as f64 / time.as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
fn bf16() -> Option<Bf16> {
    let unit = simd::bf16::Unit::new().ok()?;
    let vectors = unit.without_amx();
    Some(Bf16 {
        // A round on tiles has more work.
        tiles: (unit.name() != vectors.name()).then(|| rate(|rounds| unit.multiply_adds(rounds / 16))),
        vectors: rate(|rounds| vectors.multiply_adds(rounds)),
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16() -> Option<Bf16> {
    None
}

/// Independent chains of multiply-adds, enough to hide the latency of one.
const CHAINS: usize = 12;

struct MultiplyAdds(usize);
impl Kernel for MultiplyAdds {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let mut sums = [s.zero(); CHAINS];
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.mul_add(*sum, a, b);
            }
        }
        for sum in sums {
            black_box(s.sum(sum));
        }
        self.0 * CHAINS * S::LANES
    }
}

struct Exponentials(usize);
impl Kernel for Exponentials {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        // As many chains as registers allow beside the coefficients: an exponential takes about 40
        // cycles.
        if S::REGISTERS >= 32 { exponentials::<S, 20>(s, self.0) } else { exponentials::<S, 6>(s, self.0) }
    }
}

#[inline(always)]
fn exponentials<S: Simd, const CHAINS: usize>(s: S, rounds: usize) -> usize {
    let mut chains = [s.splat(black_box(-0.5)); CHAINS];
    for _ in 0..rounds {
        for x in &mut chains {
            // 2^x in (0, 1], so that this settles at a fixed point: never subnormal, never
            // constant-folded.
            *x = s.exp2(s.sub(s.zero(), *x));
        }
    }
    for x in chains {
        black_box(s.sum(x));
    }
    rounds * CHAINS * S::LANES
}
