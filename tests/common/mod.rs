//! Shared by several test files.
#![allow(dead_code, reason = "each test file uses its own part")]

use dfar::attention::{FhaOptions, Inputs, LabelMask};
use dfar_tools::verify::{Case, TensorError};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};

/// The folder of this package.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The golden cases of one kind.
pub fn golden(kind: &str) -> Vec<Case> {
    let paths =
        dfar_tools::verify::cases(&root().join("tests/golden")).expect("reference cases should be there");
    let cases: Vec<Case> = paths.iter().map(|path| read(path)).filter(|case| case.kind == kind).collect();
    assert!(!cases.is_empty(), "there should be reference cases of kind {kind}");
    cases
}

fn read(path: &Path) -> Case {
    Case::read(path).unwrap_or_else(|error| panic!("{error}"))
}

/// Fails and names the tensors if an error exceeds its tolerance.
#[track_caller]
pub fn assert_within(errors: &[TensorError], context: &dyn std::fmt::Debug) {
    let failed: Vec<&TensorError> = errors.iter().filter(|e| !e.passes).collect();
    assert!(failed.is_empty(), "out of tolerance: {failed:?}\nfor {context:?}");
}

/// The largest of some errors, or NaN if one is: unlike `f64::max`, which ignores NaN.
pub fn worst(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().fold(0.0, |worst, error| if worst.is_nan() || error <= worst { worst } else { error })
}

/// A random number generator: the same seed gives the same numbers on every machine.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A value with the standard normal distribution.
pub fn normal(rng: &mut impl Rng) -> f32 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// `len` standard normal values.
pub fn normals(rng: &mut impl Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(rng)).collect()
}

/// A packed batch with all inputs of forward and backward.
#[derive(Clone, Debug)]
pub struct Batch {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub d_o: Vec<f32>,
    pub cu_seqlens: Vec<u32>,
    pub label: Vec<u8>,
}

impl Batch {
    pub fn random(options: &FhaOptions, lengths: &[usize], seed: u64) -> Self {
        let mut rng = rng(seed);
        let tokens: usize = lengths.iter().sum();
        let width = options.heads * options.head_dim;
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(lengths.iter().scan(0, |end, &length| {
            *end += length as u32;
            Some(*end)
        }));
        Self {
            q: normals(&mut rng, tokens * width),
            k: normals(&mut rng, tokens * width),
            v: normals(&mut rng, tokens * width),
            d_o: normals(&mut rng, options.output_len(tokens)),
            label: match options.label_mask {
                LabelMask::Feedback => (0..tokens).map(|_| rng.random_range(0..2)).collect(),
                LabelMask::None => Vec::new(),
            },
            cu_seqlens,
        }
    }

    pub fn tokens(&self) -> usize {
        *self.cu_seqlens.last().expect("cu_seqlens has B + 1 values") as usize
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }

    /// Sequence `index` as a batch of its own.
    pub fn sequence(&self, options: &FhaOptions, index: usize) -> Self {
        let tokens = self.cu_seqlens[index] as usize..self.cu_seqlens[index + 1] as usize;
        let part = |x: &[f32], width: usize| x[tokens.start * width..tokens.end * width].to_vec();
        let width = options.heads * options.head_dim;
        Self {
            q: part(&self.q, width),
            k: part(&self.k, width),
            v: part(&self.v, width),
            d_o: part(&self.d_o, options.output_len(1)),
            cu_seqlens: vec![0, tokens.len() as u32],
            label: self.label.get(tokens).unwrap_or_default().to_vec(),
        }
    }
}

/// All results of the operation.
#[derive(Clone, Debug)]
pub struct Results {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Results {
    /// Every value as bits, NaN included.
    pub fn bits(&self) -> Vec<u32> {
        let Self { o, lse, dq, dk, dv } = self;
        [o, lse, dq, dk, dv].into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}
