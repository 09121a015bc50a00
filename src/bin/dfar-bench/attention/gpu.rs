//! Timing of the attention operation on a GPU by sequence length, compared with measured limits.
//!
//! A time is that of a whole operation between two CUDA events. Each run uses the next of several
//! sets of tensors, together larger than the L2 cache, so that tensors come from memory as in a
//! network.

use super::batch::{Batch, Pass};
use super::predict::{Prediction, bytes_per_token};
use crate::limits::gpu::{Limits, median};
use dfar::attention::{FhaOptions, Inputs};
use dfar::device::cuda::array::Array;
use dfar::device::cuda::kernel::Value;
use dfar::device::cuda::ops::attention::{self, ProjectionGradients, Projections};
use dfar::device::cuda::ops::naive_attention::Naive;
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{CudaError, Gpu};
use serde::Serialize;
use std::fmt;

/// Tensors of one run.
struct Tensors<R: Runtime, T> {
    qkv: [Array<R, T>; 3],
    d_o: Array<R, T>,
    o: Array<R, T>,
    lse: Array<R, f32>,
    gradients: [Array<R, T>; 3],
}

/// The fused kernels on a batch, with several sets of its tensors.
pub struct Fused<'a, R: Runtime, T> {
    gpu: &'a Gpu<R>,
    batch: attention::Batch<R>,
    sets: Vec<Tensors<R, T>>,
    next: usize,
}

impl<'a, R: Runtime, T: Value> Fused<'a, R, T> {
    /// Copies a batch to the device, converted from f32 by `narrow`, and runs forward on every set,
    /// because backward reads its results. `polynomial`: see [`attention::Batch::with_polynomial`].
    ///
    /// # Errors
    /// Options that the kernels do not accept, and errors of the runtime.
    pub fn new(
        gpu: &'a Gpu<R>,
        host: &Batch,
        narrow: fn(f32) -> T,
        polynomial: u32,
    ) -> Result<Self, CudaError> {
        let options = host.options();
        let upload = |x: &[f32]| gpu.copy_of(&x.iter().map(|&x| narrow(x)).collect::<Vec<T>>());
        let make = || -> Result<Tensors<R, T>, CudaError> {
            let [q, k, v] = host.qkv().map(upload);
            let width = host.qkv()[0].len();
            Ok(Tensors {
                qkv: [q?, k?, v?],
                d_o: upload(host.d_o())?,
                o: gpu.array(host.d_o().len())?,
                lse: gpu.array(options.lse_len(host.tokens()))?,
                gradients: [gpu.array(width)?, gpu.array(width)?, gpu.array(width)?],
            })
        };
        let first = make()?;
        let bytes = size_of::<T>() * (6 * first.qkv[0].len() + 2 * first.o.len());
        let sets = (2 * gpu.runtime().limits().cache_bytes).div_ceil(bytes).clamp(2, 64);
        let sets: Vec<_> =
            std::iter::once(Ok(first)).chain((1..sets).map(|_| make())).collect::<Result<_, _>>()?;
        let [q, k, v] = host.qkv().map(|x| x.iter().map(|&x| narrow(x)).collect::<Vec<T>>());
        let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: host.cu_seqlens(), label: host.label() };
        let batch = gpu.batch(options, &inputs)?.with_polynomial(polynomial);
        let mut fused = Self { gpu, batch, sets, next: 0 };
        for _ in 0..fused.sets.len() {
            fused.run(Pass::Forward)?;
        }
        Ok(fused)
    }

    /// Launches a pass on the next set.
    ///
    /// # Errors
    /// As [`Gpu::attention_forward`].
    pub fn run(&mut self, pass: Pass) -> Result<(), CudaError> {
        let next = self.next % self.sets.len();
        let Tensors { qkv: [q, k, v], d_o, o, lse, gradients: [dq, dk, dv] } = &mut self.sets[next];
        self.next = next + 1;
        let qkv = Projections { q, k, v };
        match pass {
            Pass::Forward => self.gpu.attention_forward(&self.batch, qkv, o, lse),
            Pass::Backward => {
                let gradients = ProjectionGradients { dq, dk, dv };
                self.gpu.attention_backward(&self.batch, qkv, o, lse, d_o, gradients)
            }
        }
    }
}

/// The naive form on a batch: f32 in memory, products in the GPU's precision.
pub struct NaiveForm<'a, R: Runtime> {
    gpu: &'a Gpu<R>,
    naive: Naive<R>,
    tensors: Tensors<R, f32>,
}

impl<'a, R: Runtime> NaiveForm<'a, R> {
    /// Copies a batch to the device and runs forward.
    ///
    /// # Errors
    /// Errors of the runtime, including scores that do not fit in memory.
    pub fn new(gpu: &'a Gpu<R>, host: &Batch, length: usize) -> Result<Self, CudaError> {
        let options = host.options();
        let naive = gpu.naive(options, host.cu_seqlens().len() - 1, length, host.label())?;
        let [q, k, v] = host.qkv().map(|x| gpu.copy_of(x));
        let width = host.qkv()[0].len();
        let tensors = Tensors {
            qkv: [q?, k?, v?],
            d_o: gpu.copy_of(host.d_o())?,
            o: gpu.array(host.d_o().len())?,
            lse: gpu.array(options.lse_len(host.tokens()))?,
            gradients: [gpu.array(width)?, gpu.array(width)?, gpu.array(width)?],
        };
        let mut form = Self { gpu, naive, tensors };
        form.run(Pass::Forward)?;
        Ok(form)
    }

    /// Launches a pass.
    ///
    /// # Errors
    /// Errors of the runtime.
    pub fn run(&mut self, pass: Pass) -> Result<(), CudaError> {
        let Tensors { qkv: [q, k, v], d_o, o, lse, gradients: [dq, dk, dv] } = &mut self.tensors;
        match pass {
            Pass::Forward => self.gpu.naive_forward(&mut self.naive, [q, k, v], o, lse),
            Pass::Backward => self.gpu.naive_backward(&mut self.naive, [q, k, v], lse, d_o, [dq, dk, dv]),
        }
    }
}

/// Options of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The operation.
    pub options: FhaOptions,
    /// Tokens of a batch.
    pub batch_tokens: usize,
    /// Time the forward pass.
    pub forward: bool,
    /// Time the backward pass.
    pub backward: bool,
    /// Time the naive form as well (f32 in memory, products in the GPU's precision).
    pub naive: bool,
    /// Number of polynomials among 8 exponentials; see [`attention::Batch::with_polynomial`].
    pub polynomial: u32,
    /// Number of measurements, of which the median is taken.
    pub repeats: usize,
}

impl Plan {
    /// Rows of the table for one length, with tensors of type `T` made from f32 by `narrow`.
    ///
    /// # Errors
    /// Options that the kernels do not accept, and errors of the runtime.
    pub fn measure<R: Runtime, T: Value>(
        &self,
        gpu: &Gpu<R>,
        limits: &Limits,
        length: usize,
        narrow: fn(f32) -> T,
    ) -> Result<Vec<Row>, CudaError> {
        let host = Batch::new(self.options, length, self.batch_tokens);
        let mut form = Fused::new(gpu, &host, narrow, self.polynomial)?;
        let mut naive = self.naive.then(|| NaiveForm::new(gpu, &host, length)).transpose()?;
        let mut rows = Vec::new();
        let wanted = [(self.forward, Pass::Forward), (self.backward, Pass::Backward)];
        for (_, pass) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
            let fused = median(gpu, self.repeats, || form.run(pass))?;
            let naive = match &mut naive {
                Some(naive) => Some(median(gpu, self.repeats, || naive.run(pass))?),
                None => None,
            };
            let plan = form.batch.plan();
            let predicted = Prediction::new(T::ELEMENT, &self.options, plan, limits, length, pass);
            rows.push(self.row::<T>(&host, &predicted, limits, fused, naive));
        }
        Ok(rows)
    }

    fn row<T: Value>(
        &self,
        host: &Batch,
        predicted: &Prediction,
        limits: &Limits,
        fused: f64,
        naive: Option<f64>,
    ) -> Row {
        let &Prediction { pass, length, .. } = predicted;
        let (multiply_adds, exponentials) = host.work(pass);
        let tokens = host.tokens();
        let bytes = tokens * bytes_per_token(T::ELEMENT, &self.options, pass);
        let peak = if size_of::<T>() == 4 { 2.0 * limits.multiply_adds } else { limits.products };
        let floors = [
            ("memory", bytes as f64 / limits.copy),
            ("exponentials", exponentials / limits.exponentials),
            ("products", 2.0 * multiply_adds / peak),
        ];
        let (bound, floor) = floors.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are three");
        let (least, predicted_by) = predicted.bound();
        Row {
            pass,
            length,
            tokens,
            naive_ms: naive.map(|naive| naive * 1e3),
            fused_ms: fused * 1e3,
            speed_up: naive.map(|naive| naive / fused),
            tokens_per_second: tokens as f64 / fused,
            tflops: 2.0 * multiply_adds / fused / 1e12,
            gexps: exponentials / fused / 1e9,
            gigabytes_per_second: bytes as f64 / fused / 1e9,
            bound,
            share_of_limit: floor / fused,
            predicted_ms: least * 1e3,
            predicted_by,
            share_of_prediction: least / fused,
        }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Row {
    pass: Pass,
    length: usize,
    tokens: usize,
    naive_ms: Option<f64>,
    fused_ms: f64,
    speed_up: Option<f64>,
    tokens_per_second: f64,
    tflops: f64,
    gexps: f64,
    gigabytes_per_second: f64,
    bound: &'static str,
    share_of_limit: f64,
    predicted_ms: f64,
    predicted_by: &'static str,
    share_of_prediction: f64,
}

impl Row {
    /// Names of the columns.
    pub const HEADER: &str = "pass      length  naive ms  fused ms  speed-up  Mtokens/s  TFLOP/s    Gexp/s    GB/s  predicted ms  by            reached  of the limit of";
    /// Explanation of the columns.
    pub const FOOTNOTE: &str = "Rates count the work of the mathematics, without the padding of tiles; bytes count each tensor once. The \
         prediction is a lower bound for the work of the tiles,\nby the limits above; reached is its share of the \
         measured time. The naive form keeps f32 in memory, and its backward pass recomputes the probabilities.";
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let pass = self.pass.name();
        let or_dash =
            |x: Option<f64>, decimals: usize| x.map_or("-".to_owned(), |x| format!("{x:.decimals$}"));
        let (naive, speed_up) = (or_dash(self.naive_ms, 3), or_dash(self.speed_up, 1));
        write!(f, "{pass:<8} {:>7} {naive:>9} {:>9.4} {speed_up:>9}", self.length, self.fused_ms)?;
        write!(f, " {:>10.1} {:>8.2} {:>9.1}", self.tokens_per_second / 1e6, self.tflops, self.gexps)?;
        write!(
            f,
            " {:>7.1} {:>13.4}  {:<12}",
            self.gigabytes_per_second, self.predicted_ms, self.predicted_by
        )?;
        write!(
            f,
            " {:>6.0} % {:>5.0} % {}",
            self.share_of_prediction * 100.0,
            self.share_of_limit * 100.0,
            self.bound
        )
    }
}
