//! Comparison of engines with reference cases: files of inputs and of float64 results by an
//! independent program.
//!
//! A case is a safetensors file whose metadata entry `case` is JSON with a `kind`:
//!
//! - `fha`: the attention operation. Options `heads`, `head_dim`, `label_mask`, `normalization`,
//!   `causal`, `scale`; tensors `q`, `k`, `v`, `do` (f32), `cu_seqlens` (u32), `label` (u8) and the
//!   results `o`, `lse`, `dq`, `dk`, `dv` (f64).
//! - `dfar`: the network and its training step. The network's shape and the weights of the loss;
//!   tensors `param.*` (f32), the batch (`cu_seqlens`, `history_item`, `history_label`,
//!   `candidate`, `target`) and the results `logits`, `loss`, `loss.*`, `grad.*`, `step_losses`,
//!   `after.*` (f64), the last after `steps` Adam steps.
//!
//! The error of a tensor is `max |x - reference| / scale`, where `scale` is the largest
//! `|reference|`, with one exception. A gradient can be 0 or nearly so (the softmax of a single
//! score has none), and the computed value is then the rounding error of terms that cancel. For
//! gradients, an absolute error of one f32 rounding (2^-23) of the largest reference gradient in
//! the case is therefore always within tolerance: `scale = max(max |reference|, 2^-23 * largest /
//! tolerance)`. Any gradient above 1/400 of the largest is judged by its own scale alone.
//!
//! `half_precision` has the tolerances of bf16 and f16.

mod case;
pub mod engine;
pub mod half_precision;
pub mod network;
pub mod results;
pub use case::{Case, VerifyError};
pub use engine::{CpuBf16, CpuEngine, Engine, GpuEngine, verify_fha};
pub use network::verify_dfar;

use dfar::attention::{FhaOptions, Inputs, LabelMask, Normalization, Pairing};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Largest error of a forward result in f32.
pub const FORWARD_TOLERANCE: f64 = 1e-5;
/// Largest error of a gradient in f32.
pub const GRADIENT_TOLERANCE: f64 = 5e-5;

/// The error of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorError {
    /// Its name in the case.
    pub tensor: String,
    /// `max |x - reference| / scale`; infinite (null in JSON) where one of the two is not finite and
    /// the other differs.
    pub error: f64,
    /// Largest error that passes.
    pub tolerance: f64,
    /// Whether the error is within the tolerance.
    pub passes: bool,
    /// CRC-32 of the computed values: equal for equal bits.
    pub crc32: u32,
}

impl TensorError {
    fn new(tensor: &str, values: &[f32], error: f64, tolerance: f64) -> Self {
        let crc32 = crc32fast::hash(bytemuck::cast_slice(values));
        Self { tensor: tensor.to_owned(), error, tolerance, passes: error <= tolerance, crc32 }
    }
}

/// The result of a case.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every result was compared.
    Checked(Vec<TensorError>),
    /// Nothing was compared, for this reason.
    Skipped(String),
}

/// A later run of a case with other bits than the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The run, from 2.
    pub run: usize,
    /// The first tensor that differs.
    pub tensor: String,
}

/// A case and its result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the case: that of its file, without extension.
    pub case: String,
    /// Its result.
    pub outcome: Outcome,
    /// The first of the repeated runs that gave other bits.
    pub differs: Option<Difference>,
}

impl Report {
    /// Sets `differs` if `other`, run number `run`, has other bits than this one.
    pub fn compare_run(&mut self, other: &Self, run: usize) {
        if self.differs.is_some() {
            return;
        }
        let (Outcome::Checked(first), Outcome::Checked(other)) = (&self.outcome, &other.outcome) else {
            return;
        };
        let differs = first.iter().zip(other).find(|(first, other)| first.crc32 != other.crc32);
        self.differs = differs.map(|(first, _)| Difference { run, tensor: first.tensor.clone() });
    }

    /// Whether every tensor is within its tolerance, and every run gave the same bits. A skipped
    /// case passes too.
    pub fn passes(&self) -> bool {
        if self.differs.is_some() {
            return false;
        }
        match &self.outcome {
            Outcome::Checked(errors) => errors.iter().all(|error| error.passes),
            Outcome::Skipped(_) => true,
        }
    }
}

/// One line for each tensor.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.outcome {
            Outcome::Skipped(reason) => writeln!(f, "{:<28} skipped: {reason}", self.case),
            Outcome::Checked(errors) => errors.iter().enumerate().try_for_each(|(index, error)| {
                let case = if index == 0 { &self.case } else { "" };
                let verdict = if error.passes { "ok" } else { "FAILED" };
                let (tensor, error, tolerance) = (&error.tensor, error.error, error.tolerance);
                writeln!(f, "{case:<28} {tensor:<24} {error:>8.1e}  (tolerance {tolerance:.0e})  {verdict}")
            }),
        }?;
        match &self.differs {
            Some(Difference { run, tensor }) => {
                writeln!(f, "{:<28} {tensor:<24} run {run} has other bits than run 1  FAILED", "")
            }
            None => Ok(()),
        }
    }
}

/// The results of a folder.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Cases within the tolerances.
    pub passed: usize,
    /// Cases with a tensor beyond its tolerance.
    pub failed: usize,
    /// Cases that were not compared.
    pub skipped: usize,
    /// All of them.
    pub cases: Vec<Report>,
}

impl Summary {
    /// Counts the results.
    pub fn new(cases: Vec<Report>) -> Self {
        let failed = cases.iter().filter(|report| !report.passes()).count();
        let skipped = cases.iter().filter(|report| matches!(report.outcome, Outcome::Skipped(_))).count();
        Self { passed: cases.len() - failed - skipped, failed, skipped, cases }
    }

    /// Whether no case failed, and at least one was compared.
    pub fn passes(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

/// The counts.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The case files of a folder, in alphabetical order.
///
/// # Errors
/// [`VerifyError::Io`], and [`VerifyError::NoCases`] for a folder without any.
pub fn cases(folder: &Path) -> Result<Vec<PathBuf>, VerifyError> {
    let io = |source| VerifyError::Io { path: folder.to_owned(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(VerifyError::NoCases { path: folder.to_owned() });
    }
    Ok(paths)
}

/// Reads a case and compares the results of `engine` with it.
///
/// # Errors
/// An unreadable or invalid case, or a failing device.
pub fn verify<E: Engine>(path: &Path, engine: &E) -> Result<Report, VerifyError> {
    let case = Case::read(path)?;
    let compared = match case.kind.as_str() {
        "fha" => verify_fha(&case, engine)?,
        "dfar" => engine.network(&case)?,
        kind => return Err(VerifyError::Kind { path: path.to_owned(), kind: kind.to_owned() }),
    };
    let outcome = compared.map_or_else(Outcome::Skipped, Outcome::Checked);
    Ok(Report { case: case.name, outcome, differs: None })
}

/// The `fha` part of a case's metadata.
#[derive(Deserialize)]
struct FhaCase {
    heads: usize,
    head_dim: usize,
    label_mask: bool,
    normalization: Normalization,
    causal: bool,
    scale: f64,
}

/// An `fha` case in memory.
#[derive(Clone, Debug)]
pub struct Fha {
    /// Options of the operation.
    pub options: FhaOptions,
    /// `[B + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[N]`
    pub label: Vec<u8>,
    /// Queries, keys and values, `[N, H, d]` each.
    pub qkv: [Vec<f32>; 3],
    /// Gradient with respect to the output, `[N, Q, K, d]`.
    pub d_o: Vec<f32>,
    /// Reference output, `[N, Q, K, d]`.
    pub o: Vec<f64>,
    /// Reference logarithms of the denominators, `[N, Q]`.
    pub lse: Vec<f64>,
    /// Reference gradients of queries, keys and values, `[N, H, d]` each.
    pub gradients: [Vec<f64>; 3],
}

impl Fha {
    /// Parses the case.
    ///
    /// # Errors
    /// Metadata or tensors that are missing, of another type or of another shape.
    pub fn new(case: &Case) -> Result<Self, VerifyError> {
        let FhaCase { heads, head_dim, label_mask, normalization, causal, scale } = case.options()?;
        let options = FhaOptions {
            heads,
            head_dim,
            label_mask: if label_mask { LabelMask::Feedback } else { LabelMask::None },
            normalization,
            pairing: Pairing::Factorized,
            causal,
            scale: scale as f32,
        };
        let cu_seqlens = case.u32s("cu_seqlens", &[None])?;
        let tokens = cu_seqlens.last().map_or(0, |&end| end as usize);
        let (slots, d) = (options.query_slots(), head_dim);
        let input = [tokens, heads, d].map(Some);
        let output = [tokens, slots, heads, d].map(Some);
        let f32s = |name| case.f32s(name, &input);
        let f64s = |name| case.f64s(name, &input);
        Ok(Self {
            options,
            label: case.u8s("label", &[Some(tokens)])?,
            qkv: [f32s("q")?, f32s("k")?, f32s("v")?],
            d_o: case.f32s("do", &output)?,
            o: case.f64s("o", &output)?,
            lse: case.f64s("lse", &[Some(tokens), Some(slots)])?,
            gradients: [f64s("dq")?, f64s("dk")?, f64s("dv")?],
            cu_seqlens,
        })
    }

    /// The inputs, as the operation takes them.
    pub fn inputs(&self) -> Inputs<'_> {
        let [q, k, v] = &self.qkv;
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }
}

/// Compares a forward result.
pub fn compare(tensor: &str, x: &[f32], reference: &[f64]) -> TensorError {
    let error = relative_error(x, reference, largest(reference));
    TensorError::new(tensor, x, error, FORWARD_TOLERANCE)
}

/// Compares all gradients of a case: (name, value, reference).
pub fn compare_gradients(gradients: &[(&str, &[f32], &[f64])]) -> Vec<TensorError> {
    let tolerance = GRADIENT_TOLERANCE;
    let overall = gradients.iter().map(|(_, _, reference)| largest(reference)).fold(0.0, f64::max);
    let floor = f64::from(f32::EPSILON) * overall / tolerance;
    let compare = |&(tensor, x, reference): &(&str, &[f32], &[f64])| {
        TensorError::new(tensor, x, relative_error(x, reference, largest(reference).max(floor)), tolerance)
    };
    gradients.iter().map(compare).collect()
}

fn largest(reference: &[f64]) -> f64 {
    reference.iter().filter(|x| x.is_finite()).fold(0.0, |max, x| max.max(x.abs()))
}

/// `max |x - reference| / scale`. Equal values have a difference of 0, even if non-finite. A
/// non-finite difference, or any difference if `scale` is 0, is an infinite error.
///
/// # Panics
/// For slices of different lengths.
pub fn relative_error(x: &[f32], reference: &[f64], scale: f64) -> f64 {
    assert_eq!(x.len(), reference.len(), "a tensor and its reference have the same shape");
    let differences = x.iter().zip(reference).map(|(&x, &r)| {
        let (x, difference) = (f64::from(x), (f64::from(x) - r).abs());
        if x == r {
            0.0
        } else if difference.is_finite() {
            difference
        } else {
            f64::INFINITY
        }
    });
    let difference = differences.fold(0.0, f64::max);
    if difference == 0.0 { 0.0 } else { difference / scale }
}
