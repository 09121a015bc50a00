//! Names, shapes and initial values of the parameters of a system.

use crate::Tensors;
use dfar::device::Device;
use dfar::model::parameters::{Block, Id, Linear, Norm, truncated_normal};
use dfar::model::{HostTensor, Initialization, ModelError};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Initial distribution of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Normal, cut at two deviations: 0.3, or 0.01 with [`Initialization::Small`].
    Embedding,
    /// Normal, cut at two deviations: `sqrt(2 / (inputs + outputs))`, or 0.01 with
    /// [`Initialization::Small`].
    Mlp,
    /// Uniform within a limit.
    Uniform(f32),
    /// Normal of a deviation.
    Normal(f32),
    /// All the same.
    Constant(f32),
    /// A constant for each third: the gates of a GRU.
    Thirds([f32; 3]),
    /// The identity matrix.
    Identity,
}

/// Glorot uniform for a matrix `[inputs, outputs]`.
pub fn glorot(inputs: usize, outputs: usize) -> Start {
    Start::Uniform((6.0 / (inputs + outputs) as f32).sqrt())
}

/// Name, shape and initial distribution of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// E.g. `encoder.q.w`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Initial distribution.
    pub start: Start,
}

impl Spec {
    /// Number of values.
    #[allow(clippy::len_without_is_empty, reason = "no parameter is empty")]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Collects the parameters of a system. The methods return their indices.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The parameters so far.
    pub specs: Vec<Spec>,
}

impl Names {
    /// A tensor.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize], start: Start) -> Id {
        self.specs.push(Spec { name: name.into(), shape: shape.to_vec(), start });
        self.specs.len() - 1
    }

    /// A linear layer `NAME.w`, `NAME.b`, with bias 0.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize, start: Start) -> Linear {
        let w = self.tensor(format!("{name}.w"), &[inputs, outputs], start);
        let b = self.tensor(format!("{name}.b"), &[outputs], Start::Constant(0.0));
        Linear { w, b, inputs, outputs }
    }

    /// An MLP of three layers `NAME.0`, `NAME.1`, `NAME.2`, the last of width 1.
    pub fn mlp(&mut self, name: &str, inputs: usize, [h0, h1]: [usize; 2]) -> [Linear; 3] {
        let widths = [(inputs, h0), (h0, h1), (h1, 1)];
        std::array::from_fn(|i| {
            let (inputs, outputs) = widths[i];
            self.linear(&format!("{name}.{i}"), inputs, outputs, Start::Mlp)
        })
    }

    /// Encoder blocks with plain heads: `NAME`, `NAME.1`, ...
    pub fn blocks(&mut self, name: &str, count: usize, width: usize) -> Vec<Block> {
        (0..count).map(|i| self.block(&numbered(name, i), width)).collect()
    }

    fn block(&mut self, name: &str, width: usize) -> Block {
        let square = |names: &mut Self, layer: &str| {
            names.linear(&format!("{name}.{layer}"), width, width, glorot(width, width))
        };
        Block {
            ln_in: self.norm(&format!("{name}.ln_in"), width),
            q: square(self, "q"),
            k: square(self, "k"),
            v: square(self, "v"),
            o: square(self, "o"),
            ln_ffn: self.norm(&format!("{name}.ln_ffn"), width),
            ffn1: square(self, "ffn1"),
            ffn2: square(self, "ffn2"),
            ln_out: self.norm(&format!("{name}.ln_out"), width),
        }
    }

    fn norm(&mut self, name: &str, width: usize) -> Norm {
        Norm {
            gamma: self.tensor(format!("{name}.gamma"), &[width], Start::Constant(1.0)),
            beta: self.tensor(format!("{name}.beta"), &[width], Start::Constant(0.0)),
        }
    }
}

/// Name of block `i` of a stack: the first has no number.
pub fn numbered(name: &str, i: usize) -> String {
    if i == 0 { name.to_owned() } else { format!("{name}.{i}") }
}

/// Initial values. Each tensor has its own random stream.
pub fn initial(specs: &[Spec], seed: u64, initialization: Initialization) -> Vec<Vec<f32>> {
    let tensor = |(id, spec): (usize, &Spec)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(id as u64);
        draw(spec, initialization, &mut rng)
    };
    specs.iter().enumerate().map(tensor).collect()
}

fn draw(spec: &Spec, initialization: Initialization, rng: &mut impl Rng) -> Vec<f32> {
    let n = spec.len();
    let mut cut_normal = |std: f32| (0..n).map(|_| std * truncated_normal(rng)).collect();
    match (spec.start, initialization) {
        (Start::Embedding | Start::Mlp, Initialization::Small) => cut_normal(0.01),
        (Start::Embedding, _) => cut_normal(0.3),
        (Start::Mlp, _) => cut_normal((2.0 / (spec.shape[0] + spec.shape[1]) as f32).sqrt()),
        (Start::Uniform(limit), _) => (0..n).map(|_| rng.random_range(-limit..limit)).collect(),
        (Start::Normal(std), _) => (0..n).map(|_| std * normal(rng)).collect(),
        (Start::Constant(value), _) => vec![value; n],
        (Start::Thirds(values), _) => (0..n).map(|i| values[i * 3 / n]).collect(),
        (Start::Identity, _) => {
            let columns = spec.shape[1];
            (0..n).map(|i| if i / columns == i % columns { 1.0 } else { 0.0 }).collect()
        }
    }
}

/// A standard normal value (Box-Muller).
fn normal(rng: &mut impl Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
}

/// The values of `tensors` in the order of `specs`.
///
/// # Errors
/// [`ModelError::Tensor`] for a missing or unknown name, or a wrong shape.
pub fn arrange<'a>(specs: &[Spec], tensors: &'a [HostTensor]) -> crate::Result<Vec<&'a [f32]>> {
    let mismatch = |name: &str, expected: &[usize], found: &[usize]| ModelError::Tensor {
        name: name.to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    };
    if let Some(t) = tensors.iter().find(|t| specs.iter().all(|spec| spec.name != t.name)) {
        return Err(mismatch(&t.name, &[], &t.shape));
    }
    let values = |spec: &Spec| {
        let found = tensors.iter().find(|t| t.name == spec.name);
        let t = found.ok_or_else(|| mismatch(&spec.name, &spec.shape, &[]))?;
        let fits = t.shape == spec.shape && t.values.len() == spec.len();
        if fits { Ok(&t.values[..]) } else { Err(mismatch(&spec.name, &spec.shape, &t.shape)) }
    };
    specs.iter().map(values).collect()
}

/// Zeros for each parameter.
pub fn zeros<D: Device>(device: &D, specs: &[Spec]) -> crate::Result<Tensors<D>> {
    let zeros = specs.iter().map(|spec| device.zeros(spec.len()));
    Ok(Tensors::new(zeros.collect::<std::result::Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_follow_their_distributions() {
        let mut names = Names::default();
        let gates = names.tensor("gates", &[6], Start::Thirds([1.0, -1.0, 0.0]));
        let mix = names.tensor("mix", &[2, 2], Start::Identity);
        let q = names.tensor("q", &[10_000], Start::Normal(0.5));
        let w = names.tensor("w", &[50, 50], glorot(50, 50));
        let small = names.tensor("item", &[100, 10], Start::Embedding);
        let values = initial(&names.specs, 3, Initialization::Scaled);
        assert_eq!(values[gates], [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]);
        assert_eq!(values[mix], [1.0, 0.0, 0.0, 1.0]);
        let mean_square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        assert!((mean_square(&values[q]) - 0.25).abs() < 0.02);
        let limit = (6.0f32 / 100.0).sqrt();
        assert!((mean_square(&values[w]) - limit * limit / 3.0).abs() < 0.002);
        assert!(values[w].iter().all(|x| x.abs() < limit));
        assert!(values[small].iter().any(|x| x.abs() > 0.3) && values[small].iter().all(|x| x.abs() <= 0.6));
        let values = initial(&names.specs, 3, Initialization::Small);
        assert!(values[small].iter().all(|x| x.abs() <= 0.02));
    }
}
