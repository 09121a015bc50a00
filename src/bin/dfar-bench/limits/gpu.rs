//! Limits of a GPU: measured (operands in registers, and a copy in memory) or from its datasheet.

use dfar::device::cuda::ops::limits::{CHAINS, PRODUCT_OPERATIONS, Rate, THREADS};
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{CudaError, Gpu};
use serde::Serialize;
use std::fmt;

/// Peak rates of a GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Name of the GPU.
    pub name: String,
    /// Bytes per second of a copy, reads and writes both counted.
    pub copy: f64,
    /// Exponentials per second of the special function units.
    pub exponentials: f64,
    /// f32 multiply-adds per second.
    pub multiply_adds: f64,
    /// Floating-point operations per second of bf16 tensor-core products (`mma.sync`).
    pub products: f64,
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}, operands in registers, copy in memory:", self.name)?;
        writeln!(f, "  copy           {:>9.1} GB/s", self.copy / 1e9)?;
        writeln!(f, "  exponentials   {:>9.1} G/s", self.exponentials / 1e9)?;
        writeln!(f, "  multiply-adds  {:>9.1} G/s", self.multiply_adds / 1e9)?;
        write!(f, "  bf16 products  {:>9.1} TFLOP/s", self.products / 1e12)
    }
}

/// Size and number of the measurements.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Values of the copied array; a multiple of 4.
    pub copied: usize,
    /// Iterations of the kernels that work in registers.
    pub rounds: u32,
    /// Number of measurements, of which the median is taken.
    pub repeats: usize,
}

impl Effort {
    /// For a real GPU: copies of 1 GiB, kernels of about a millisecond.
    pub const FULL: Self = Self { copied: 1 << 28, rounds: 4096, repeats: 25 };
    /// To see that the command works: its rates are not those of the GPU.
    pub const QUICK: Self = Self { copied: 1 << 10, rounds: 1, repeats: 1 };
}

/// Seconds of `count` calls of `run`, between two CUDA events.
///
/// # Errors
/// Errors of `run` and of the runtime.
pub fn time<R: Runtime>(
    gpu: &Gpu<R>,
    count: u64,
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let start = gpu.runtime().mark()?;
    for _ in 0..count {
        run()?;
    }
    let end = gpu.runtime().mark()?;
    gpu.runtime().seconds_between(&start, &end)
}

/// Seconds between two events of a measurement, at least. Less would time the launch, and the clock
/// of the events, which ticks every half a microsecond.
const LEAST_SECONDS: f64 = 2e-3;
/// Most runs of a measurement.
const MOST_RUNS: f64 = 1000.0;

/// Number of runs that take [`LEAST_SECONDS`] if one takes `once`.
fn runs(once: f64) -> u64 {
    (LEAST_SECONDS / once.max(1e-9)).ceil().clamp(1.0, MOST_RUNS) as u64
}

/// Median seconds of `run` over `repeats` measurements, after a warm-up run. A measurement has
/// enough runs to take two milliseconds.
pub fn median<R: Runtime>(
    gpu: &Gpu<R>,
    repeats: usize,
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    run()?;
    let count = runs(time(gpu, 1, &mut run)?);
    let times = (0..repeats).map(|_| Ok(time(gpu, count, &mut run)? / count as f64));
    let mut times = times.collect::<Result<Vec<f64>, CudaError>>()?;
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Measures the limits of a GPU.
///
/// # Errors
/// Errors of the runtime.
pub fn measure<R: Runtime>(gpu: &Gpu<R>, effort: Effort) -> Result<Limits, CudaError> {
    let copy = {
        let x = gpu.copy_of(&vec![1.5f32; effort.copied])?;
        let mut y = gpu.array(effort.copied)?;
        let bytes = 2 * effort.copied * size_of::<f32>();
        bytes as f64 / median(gpu, effort.repeats, || gpu.copy(&x, &mut y))?
    };
    // Full occupancy: a multiprocessor holds eight blocks of 256 threads.
    let mut out = gpu.array(gpu.runtime().limits().multiprocessors * 8 * THREADS)?;
    let done = (out.len() * CHAINS) as f64 * f64::from(effort.rounds);
    let mut rate = |rate, operations: f64| -> Result<f64, CudaError> {
        Ok(operations / median(gpu, effort.repeats, || gpu.work(rate, effort.rounds, &mut out))?)
    };
    Ok(Limits {
        name: gpu.runtime().name(),
        copy,
        exponentials: rate(Rate::Exponentials, done)?,
        multiply_adds: rate(Rate::MultiplyAdds, done)?,
        products: rate(Rate::Products, done / 32.0 * PRODUCT_OPERATIONS as f64)?,
    })
}

/// A data-centre GPU whose datasheet limits are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Card {
    /// H100 SXM.
    H100,
    /// H200 SXM: the same chip, faster memory.
    H200,
}

impl Card {
    /// Limits by the datasheet, not measured: 132 multiprocessors at 1.83 GHz with 16 special
    /// function results and 128 multiply-adds per clock; of 989 dense bf16 TFLOP/s, `mma.sync` can
    /// reach about 60 %.
    pub fn datasheet(self) -> Limits {
        let clocks = 132.0 * 1.83e9;
        let (name, copy) = match self {
            Card::H100 => ("H100 SXM, by its datasheet", 3.35e12),
            Card::H200 => ("H200 SXM, by its datasheet", 4.8e12),
        };
        Limits {
            name: name.to_owned(),
            copy,
            exponentials: 16.0 * clocks,
            multiply_adds: 128.0 * clocks,
            products: 0.6 * 989e12,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn a_measurement_takes_two_milliseconds() {
        assert_eq!([5e-3, 2e-3, 1.9e-3, 7e-4, 3e-6].map(runs), [1, 1, 2, 3, 667]);
        assert_eq!([1e-9, 0.0].map(runs), [1000, 1000]);
    }
}
