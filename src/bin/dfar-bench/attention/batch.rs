//! Timing of the attention operation by sequence length.

use crate::timing::shortest;
use dfar::attention::{
    self, AttentionError, FhaOptions, Gradients, Inputs, LabelMask, Normalization, reference,
};
use dfar::{attention::scratch_bytes, simd};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// A batch of sequences of one length, with random values and labels.
#[derive(Clone, Debug)]
pub struct Batch {
    options: FhaOptions,
    cu_seqlens: Vec<u32>,
    label: Vec<u8>,
    qkv: [Vec<f32>; 3],
    d_o: Vec<f32>,
    o: Vec<f32>,
    lse: Vec<f32>,
    gradients: [Vec<f32>; 3],
}

impl Batch {
    /// As many sequences of `length` as fit in `tokens`, but at least one.
    pub fn new(options: FhaOptions, length: usize, tokens: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let sequences = (tokens / length.max(1)).max(1);
        let tokens = sequences * length;
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.7..1.7)).collect() };
        let width = options.heads * options.head_dim;
        let qkv = [(); 3].map(|()| values(tokens * width));
        let d_o = values(options.output_len(tokens));
        let labels = if options.label_mask == LabelMask::Feedback { tokens } else { 0 };
        Self {
            options,
            cu_seqlens: (0..=sequences).map(|i| (i * length) as u32).collect(),
            label: (0..labels).map(|_| rng.random_range(0..2)).collect(),
            qkv,
            o: vec![0.0; d_o.len()],
            d_o,
            lse: vec![0.0; options.lse_len(tokens)],
            gradients: [(); 3].map(|()| vec![0.0; tokens * width]),
        }
    }

    /// Lengths and random labels as in [`Batch::new`], without values.
    pub(super) fn shape(options: FhaOptions, length: usize, tokens: usize) -> Self {
        let narrow = FhaOptions { head_dim: 0, ..options };
        Self { options, ..Self::new(narrow, length, tokens) }
    }

    /// Options of the operation.
    pub fn options(&self) -> &FhaOptions {
        &self.options
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        *self.cu_seqlens.last().expect("there is at least one sequence") as usize
    }

    /// Prefix sums of the lengths.
    pub fn cu_seqlens(&self) -> &[u32] {
        &self.cu_seqlens
    }

    /// Labels; empty without a label mask.
    pub fn label(&self) -> &[u8] {
        &self.label
    }

    /// `q`, `k` and `v`.
    pub fn qkv(&self) -> [&[f32]; 3] {
        self.qkv.each_ref().map(|x| &x[..])
    }

    /// All inputs of the operation.
    pub fn inputs(&self) -> Inputs<'_> {
        let [q, k, v] = self.qkv();
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }

    /// Gradient of the output.
    pub fn d_o(&self) -> &[f32] {
        &self.d_o
    }

    fn run(&mut self, naive: bool, pass: Pass) -> Result<(), AttentionError> {
        let Self { options, cu_seqlens, label, qkv: [q, k, v], d_o, o, lse, gradients } = self;
        let inputs = Inputs { q, k, v, cu_seqlens, label };
        let [dq, dk, dv] = gradients;
        let gradients = Gradients { dq, dk, dv };
        match (pass, naive) {
            (Pass::Forward, false) => attention::forward(options, inputs, o, lse),
            (Pass::Forward, true) => reference::naive_forward(options, inputs, o, lse),
            (Pass::Backward, false) => attention::backward(options, inputs, o, lse, d_o, gradients),
            (Pass::Backward, true) => reference::naive_backward(options, inputs, d_o, gradients),
        }
    }

    /// The fused forward pass.
    ///
    /// # Errors
    /// Options that the operation does not accept.
    pub fn forward(&mut self) -> Result<(), AttentionError> {
        self.run(false, Pass::Forward)
    }

    /// The fused backward pass, after [`forward`](Self::forward).
    ///
    /// # Errors
    /// As `forward`.
    pub fn backward(&mut self) -> Result<(), AttentionError> {
        self.run(false, Pass::Backward)
    }

    /// The naive forward pass.
    ///
    /// # Errors
    /// As `forward`.
    pub fn naive_forward(&mut self) -> Result<(), AttentionError> {
        self.run(true, Pass::Forward)
    }

    /// The naive backward pass. It recomputes the probabilities and so includes a forward pass.
    ///
    /// # Errors
    /// As `forward`.
    pub fn naive_backward(&mut self) -> Result<(), AttentionError> {
        self.run(true, Pass::Backward)
    }

    /// [`needed`], for these sequences.
    pub(super) fn work(&self, pass: Pass) -> (f64, f64) {
        needed(&self.options, &self.cu_seqlens, pass)
    }
}

/// (multiply-adds, exponentials) of the mathematics of a pass: visible pairs only, products with
/// values only where the label mask keeps them.
pub fn needed(options: &FhaOptions, cu_seqlens: &[u32], pass: Pass) -> (f64, f64) {
    let FhaOptions { head_dim, label_mask, normalization, causal, .. } = *options;
    let masked = label_mask == LabelMask::Feedback;
    let (slots, heads) = (options.query_slots() as f64, options.key_slots() as f64);
    let (mut inside, mut kept) = (0.0, 0.0);
    for w in cu_seqlens.windows(2) {
        let length = (w[1] - w[0]) as f64;
        // With or without the label mask, each visible key token meets all key heads, or half of
        // them.
        let pairs = if causal { length * (length + 1.0) / 2.0 } else { length * length };
        let kept_heads = if masked { heads / 2.0 } else { heads };
        let read_heads = if normalization == Normalization::Joint { heads } else { kept_heads };
        inside += pairs * slots * read_heads;
        kept += pairs * slots * kept_heads;
    }
    let products = match pass {
        Pass::Forward => inside + kept,              // q.k, p.v
        Pass::Backward => 3.0 * inside + 2.0 * kept, // q.k, dq, dk; do.v, dv
    };
    (products * head_dim as f64, inside)
}

/// A direction of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// `o` and `lse`.
    Forward,
    /// `dq`, `dk` and `dv`.
    Backward,
}

impl Pass {
    /// Both directions, in the order of execution.
    pub const ALL: [Pass; 2] = [Pass::Forward, Pass::Backward];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
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
    /// Time the naive form as well.
    pub naive: bool,
}

impl Plan {
    /// The conditions of the measurement, in one line.
    pub fn conditions(&self, threads: usize) -> String {
        let FhaOptions { heads, head_dim, normalization, .. } = self.options;
        let (simd, tokens) = (simd::name(), self.batch_tokens);
        format!(
            "fused attention, H = {heads}, d = {head_dim}, {normalization:?}, causal, {tokens} tokens per batch; \
             {simd}, {threads} threads; shortest of many runs"
        )
    }

    /// Rows of the table for one length: forward, backward.
    ///
    /// # Errors
    /// Options that the operation does not accept.
    pub fn measure(&self, length: usize) -> Result<Vec<Row>, AttentionError> {
        let mut batch = Batch::new(self.options, length, self.batch_tokens);
        batch.forward()?; // checks the options; backward reads its results
        let passes = [(self.forward, Pass::Forward), (self.backward, Pass::Backward)];
        let passes = passes.into_iter().filter(|(wanted, _)| *wanted);
        passes.map(|(_, pass)| self.measure_pass(&mut batch, length, pass)).collect()
    }

    fn measure_pass(&self, batch: &mut Batch, length: usize, pass: Pass) -> Result<Row, AttentionError> {
        let mut time = |naive: bool, milliseconds| {
            let mut result = Ok(());
            let budget = Duration::from_millis(milliseconds);
            let time = shortest(budget, || result = result.clone().and(batch.run(naive, pass)));
            result.map(|()| time.as_secs_f64())
        };
        let naive = self.naive.then(|| time(true, 300)).transpose()?;
        let fused = time(false, 700)?;
        let (multiply_adds, exponentials) = batch.work(pass);
        let threads = rayon::broadcast(|_| scratch_bytes());
        let seconds = |s: f64| s * 1e3;
        Ok(Row {
            pass,
            length,
            tokens: batch.tokens(),
            naive_ms: naive.map(seconds),
            fused_ms: seconds(fused),
            speed_up: naive.map(|naive| naive / fused),
            tokens_per_second: batch.tokens() as f64 / fused,
            gflops: 2.0 * multiply_adds / fused / 1e9,
            gexps: exponentials / fused / 1e9,
            scratch_bytes: threads.iter().sum(),
        })
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
    gflops: f64,
    gexps: f64,
    scratch_bytes: usize,
}

impl Row {
    /// Names of the columns.
    pub const HEADER: &str =
        "pass      length  naive ms  fused ms  speed-up  Mtokens/s  GFLOP/s  Gexp/s  scratch KiB";
    /// Explanation of the columns.
    pub const FOOTNOTE: &str = "GFLOP/s and Gexp/s count the work of the mathematics, without the padding of tiles. Scratch is \
         the memory of all threads beside inputs and outputs,\nthe largest so far in this run. The naive backward pass \
         recomputes the probabilities and so includes a forward pass.";
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let pass = self.pass.name();
        let or_dash =
            |x: Option<f64>, decimals: usize| x.map_or("-".to_owned(), |x| format!("{x:.decimals$}"));
        let (naive, speed_up) = (or_dash(self.naive_ms, 2), or_dash(self.speed_up, 1));
        write!(f, "{pass:<8} {:>7} {naive:>9} {:>9.3} {speed_up:>9}", self.length, self.fused_ms)?;
        write!(f, " {:>10.2} {:>8.1}", self.tokens_per_second / 1e6, self.gflops)?;
        write!(f, " {:>7.2} {:>12}", self.gexps, self.scratch_bytes / 1024)
    }
}
