//! Limits of the CPU: fused multiply-adds and exponentials per second, operands in registers, on
//! all threads.

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
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (fma, exp) = (self.multiply_adds / 1e9, self.exponentials / 1e9);
        writeln!(f, "{} on {} threads, operands in registers:", self.simd, self.threads)?;
        writeln!(f, "  multiply-adds  {fma:>8.1} G/s  ({:.1} GFLOP/s)", 2.0 * fma)?;
        write!(f, "  exponentials   {exp:>8.2} G/s")
    }
}

/// Measures both rates in about a second.
pub fn measure() -> Limits {
    let threads = rayon::current_num_threads();
    let rate = |count: fn(usize) -> usize| {
        // Long enough to hide the start of the threads.
        let rounds = 200_000;
        let mut done = 0;
        let time = shortest(Duration::from_millis(500), || {
            done = (0..threads).into_par_iter().map(|_| count(black_box(rounds))).sum();
        });
        done as f64 / time.as_secs_f64()
    };
    Limits {
        simd: simd::name(),
        threads,
        multiply_adds: rate(|rounds| dispatch(MultiplyAdds(rounds))),
        exponentials: rate(|rounds| dispatch(Exponentials(rounds))),
    }
}

/// Independent chains, enough to hide the latency of one.
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
        let mut chains = [s.splat(black_box(-0.5)); CHAINS / 2];
        for _ in 0..self.0 {
            for x in &mut chains {
                // 2^x in (0, 1], so that this settles at a fixed point: never subnormal, never
                // constant-folded.
                *x = s.exp2(s.sub(s.zero(), *x));
            }
        }
        for x in chains {
            black_box(s.sum(x));
        }
        self.0 * (CHAINS / 2) * S::LANES
    }
}
