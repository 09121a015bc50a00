//! What a GPU can do at most: measured with operands in registers and in copying, or by its datasheet.

use dfar::device::cuda::ops::limits::{CHAINS, PRODUCT_OPERATIONS, Rate, THREADS};
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{CudaError, Gpu};
use serde::Serialize;
use std::fmt;

/// What a GPU reached with operands in registers, and in copying.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Name of the GPU.
    pub name: String,
    /// Bytes a second, those read and those written.
    pub copy: f64,
    /// Special-function exponentials a second.
    pub exponentials: f64,
    /// f32 multiply-adds a second.
    pub multiply_adds: f64,
    /// Operations a second of bf16 tensor-core products (`mma.sync`).
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

/// How long measurements take.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Values of the arrays that are copied; a multiple of 4.
    pub copied: usize,
    /// Rounds of work in registers.
    pub rounds: u32,
    /// Measurements; the median counts.
    pub repeats: usize,
}

impl Effort {
    /// For a GPU: 1 GiB copies, about a millisecond each of work.
    pub const FULL: Self = Self { copied: 1 << 28, rounds: 4096, repeats: 25 };
}

/// Seconds on the device from the first of `count` runs to the last.
///
/// # Errors
/// What `run` and the runtime report.
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

/// Median seconds of `run` over the repeats, after one run that is not counted.
pub fn median<R: Runtime>(
    gpu: &Gpu<R>,
    repeats: usize,
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    run()?;
    let times = (0..repeats).map(|_| time(gpu, 1, &mut run));
    let mut times = times.collect::<Result<Vec<f64>, _>>()?;
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Measures the limits.
///
/// # Errors
/// What the runtime reports.
pub fn measure<R: Runtime>(gpu: &Gpu<R>, effort: Effort) -> Result<Limits, CudaError> {
    let copy = {
        let x = gpu.copy_of(&vec![1.5f32; effort.copied])?;
        let mut y = gpu.array(effort.copied)?;
        let bytes = 2 * effort.copied * size_of::<f32>();
        bytes as f64 / median(gpu, effort.repeats, || gpu.copy(&x, &mut y))?
    };
    // Eight blocks of 256 threads are all that a multiprocessor holds.
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
    /// What its datasheet promises, as limits: nothing here was measured. 132 multiprocessors at 1.83 GHz with 16 special-function
    /// results and 128 multiply-adds a clock; of 989 dense bf16 TFLOP/s about 60 % is within reach of `mma.sync`.
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
