//! Names, order, shapes and initial values of the parameters, of DFAR and of the systems that it is
//! compared with.

use super::{HostTensor, Initialization, ModelConfig, ModelError};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Index of a parameter in every list of tensors.
pub type Id = usize;

/// Initial distribution of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initial {
    /// Normal, truncated at two standard deviations: 0.3, or 0.01 with [`Initialization::Small`].
    Embedding,
    /// Normal, truncated at two standard deviations: `sqrt(2 / (inputs + outputs))`, or 0.01 with
    /// [`Initialization::Small`]. Weights of target attention and the towers.
    Mlp,
    /// Uniform within a limit, see [`glorot`].
    Uniform(f32),
    /// Normal with a standard deviation.
    Normal(f32),
    /// All the same.
    Constant(f32),
    /// A constant for each third: the gates of a GRU.
    Thirds([f32; 3]),
    /// The identity matrix.
    Identity,
}

/// Glorot uniform for a matrix `[inputs, outputs]`.
pub fn glorot(inputs: usize, outputs: usize) -> Initial {
    Initial::Uniform((6.0 / (inputs + outputs) as f32).sqrt())
}

/// Name, shape and initial distribution of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// E.g. `encoder.q.w`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    pub initial: Initial,
}

impl Spec {
    /// Number of values.
    #[allow(clippy::len_without_is_empty, reason = "no parameter is empty")]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Scale and offset of a layer norm.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    pub gamma: Id,
    pub beta: Id,
}

/// Weight `[in, out]` and bias of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    pub w: Id,
    pub b: Id,
    pub inputs: usize,
    pub outputs: usize,
}

/// One encoder block.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub ln_in: Norm,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub ln_ffn: Norm,
    pub ffn1: Linear,
    pub ffn2: Linear,
    pub ln_out: Norm,
}

/// Target attention of one interest.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// `[D, D]`, no bias.
    pub w: Id,
    pub mlp: [Linear; 3],
}

/// All parameters of a network. Interests are indexed by feedback: 0 negative, 1 positive.
#[derive(Clone, Debug)]
pub struct Layout {
    pub specs: Vec<Spec>,
    pub item: Id,
    pub position: Id,
    pub label: Id,
    pub encoder: Vec<Block>,
    pub interest: [Vec<Block>; 2],
    pub target: [Target; 2],
    pub tower: [[Linear; 3]; 2],
}

/// Names of the interests, by feedback.
pub const INTERESTS: [&str; 2] = ["negative", "positive"];

impl Layout {
    /// The parameters of a valid `config`.
    pub fn new(config: &ModelConfig) -> Self {
        let mut names = Names::default();
        let width = config.width;
        let pairs = if config.fha { config.heads } else { 1 };
        let item = names.tensor("item", &[config.items, width], Initial::Embedding);
        let position = names.tensor("position", &[config.max_length, width], Initial::Embedding);
        let label = names.tensor("label", &[2, width], Initial::Embedding);
        let encoder = names.blocks("encoder", config.blocks, width, pairs);
        let interest = INTERESTS.map(|name| names.blocks(name, config.blocks, width, pairs));
        let target = INTERESTS.map(|name| Target {
            w: names.tensor(format!("target_{name}.w"), &[width, width], Initial::Mlp),
            mlp: names.mlp(&format!("target_{name}.mlp"), 4 * width, config.attention),
        });
        let tower = INTERESTS.map(|name| names.mlp(&format!("tower_{name}"), 4 * width, config.tower));
        Self { specs: names.specs, item, position, label, encoder, interest, target, tower }
    }

    /// Number of values.
    pub fn parameters(&self) -> usize {
        // A configuration within its limits can still ask for more than 2^64.
        self.specs.iter().map(Spec::len).fold(0, usize::saturating_add)
    }
}

/// Collects the parameters of a network. The methods return their indices.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The parameters so far.
    pub specs: Vec<Spec>,
}

impl Names {
    /// A tensor.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize], initial: Initial) -> Id {
        self.specs.push(Spec { name: name.into(), shape: shape.to_vec(), initial });
        self.specs.len() - 1
    }

    /// A linear layer `NAME.w`, `NAME.b`, with bias 0.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize, initial: Initial) -> Linear {
        let w = self.tensor(format!("{name}.w"), &[inputs, outputs], initial);
        let b = self.tensor(format!("{name}.b"), &[outputs], Initial::Constant(0.0));
        Linear { w, b, inputs, outputs }
    }

    /// An MLP of three layers `NAME.0`, `NAME.1`, `NAME.2`, the last of width 1.
    pub fn mlp(&mut self, name: &str, inputs: usize, [h0, h1]: [usize; 2]) -> [Linear; 3] {
        let widths = [(inputs, h0), (h0, h1), (h1, 1)];
        std::array::from_fn(|i| {
            let (inputs, outputs) = widths[i];
            self.linear(&format!("{name}.{i}"), inputs, outputs, Initial::Mlp)
        })
    }

    /// Encoder blocks `NAME`, `NAME.1`, ... `pairs`: heads that each output of attention has, side by
    /// side; 1 for plain heads, which share the width.
    pub fn blocks(&mut self, name: &str, count: usize, width: usize, pairs: usize) -> Vec<Block> {
        (0..count).map(|i| self.block(&numbered(name, i), width, pairs)).collect()
    }

    fn block(&mut self, name: &str, width: usize, pairs: usize) -> Block {
        let layer = |names: &mut Self, layer: &str, inputs: usize| {
            names.linear(&format!("{name}.{layer}"), inputs, width, glorot(inputs, width))
        };
        Block {
            ln_in: self.norm(&format!("{name}.ln_in"), width),
            q: layer(self, "q", width),
            k: layer(self, "k", width),
            v: layer(self, "v", width),
            o: layer(self, "o", pairs * width),
            ln_ffn: self.norm(&format!("{name}.ln_ffn"), width),
            ffn1: layer(self, "ffn1", width),
            ffn2: layer(self, "ffn2", width),
            ln_out: self.norm(&format!("{name}.ln_out"), width),
        }
    }

    fn norm(&mut self, name: &str, width: usize) -> Norm {
        Norm {
            gamma: self.tensor(format!("{name}.gamma"), &[width], Initial::Constant(1.0)),
            beta: self.tensor(format!("{name}.beta"), &[width], Initial::Constant(0.0)),
        }
    }
}

/// Name of block `i` of a stack. The first has no number, so that networks of one block have plain
/// names.
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
    let mut truncated = |std: f32| (0..n).map(|_| std * truncated_normal(rng)).collect();
    match (spec.initial, initialization) {
        (Initial::Embedding | Initial::Mlp, Initialization::Small) => truncated(0.01),
        (Initial::Embedding, Initialization::Scaled) => truncated(0.3),
        (Initial::Mlp, Initialization::Scaled) => {
            truncated((2.0 / (spec.shape[0] + spec.shape[1]) as f32).sqrt())
        }
        (Initial::Uniform(limit), _) => (0..n).map(|_| rng.random_range(-limit..limit)).collect(),
        (Initial::Normal(std), _) => (0..n).map(|_| std * normal(rng) as f32).collect(),
        (Initial::Constant(value), _) => vec![value; n],
        (Initial::Thirds(values), _) => (0..n).map(|i| values[i * 3 / n]).collect(),
        (Initial::Identity, _) => {
            let columns = spec.shape[1];
            (0..n).map(|i| if i / columns == i % columns { 1.0 } else { 0.0 }).collect()
        }
    }
}

/// A standard normal value truncated at two standard deviations, by rejection.
pub fn truncated_normal(rng: &mut impl Rng) -> f32 {
    loop {
        let value = normal(rng);
        if value.abs() <= 2.0 {
            return value as f32;
        }
    }
}

/// A standard normal value (Box-Muller).
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// The values of the `tensors` whose names start with `prefix`, in the order of `specs`.
///
/// # Errors
/// [`ModelError::Tensor`] for a missing or unknown name, or a wrong shape.
pub fn arrange<'a>(
    specs: &[Spec],
    prefix: &str,
    tensors: &'a [HostTensor],
) -> Result<Vec<&'a [f32]>, ModelError> {
    let mismatch = |name: &str, expected: &[usize], found: &[usize]| ModelError::Tensor {
        name: name.to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    };
    let is_unknown = |t: &&HostTensor| {
        t.name.strip_prefix(prefix).is_some_and(|name| specs.iter().all(|spec| spec.name != name))
    };
    if let Some(t) = tensors.iter().find(is_unknown) {
        return Err(mismatch(&t.name, &[], &t.shape));
    }
    let values = |spec: &Spec| {
        let name = format!("{prefix}{}", spec.name);
        let found = tensors.iter().find(|t| t.name == name);
        let t = found.ok_or_else(|| mismatch(&name, &spec.shape, &[]))?;
        let fits = t.shape == spec.shape && t.values.len() == spec.len();
        if fits { Ok(&t.values[..]) } else { Err(mismatch(&name, &spec.shape, &t.shape)) }
    };
    specs.iter().map(values).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_of_every_kind_follow_their_distributions() {
        let mut names = Names::default();
        let gates = names.tensor("gates", &[6], Initial::Thirds([1.0, -1.0, 0.0]));
        let mix = names.tensor("mix", &[2, 2], Initial::Identity);
        let q = names.tensor("q", &[10_000], Initial::Normal(0.5));
        let w = names.tensor("w", &[50, 50], glorot(50, 50));
        let small = names.tensor("item", &[100, 10], Initial::Embedding);
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

    #[test]
    fn initial_values_have_the_specified_distribution() {
        let layout = Layout::new(&ModelConfig::new(500, 20));
        let values = initial(&layout.specs, 7, Initialization::Small);
        assert_eq!(values, initial(&layout.specs, 7, Initialization::Small));
        assert_ne!(values[layout.item], initial(&layout.specs, 8, Initialization::Small)[layout.item]);
        let first = layout.tower[0][0].w; // 128 by 100
        for (initialization, tensor, std) in [
            (Initialization::Small, layout.item, 0.01),
            (Initialization::Small, first, 0.01),
            (Initialization::Scaled, layout.item, 0.3),
            (Initialization::Scaled, first, (2.0f32 / 228.0).sqrt()),
        ] {
            let drawn = &initial(&layout.specs, 7, initialization)[tensor];
            assert!(drawn.iter().all(|x| x.abs() <= 2.0 * std));
            let variance = drawn.iter().map(|x| (x / std * x / std) as f64).sum::<f64>() / drawn.len() as f64;
            // A normal truncated at two deviations has variance 0.7737.
            assert!((variance - 0.7737).abs() < 0.02, "{variance}");
        }
        let q = &values[layout.encoder[0].q.w];
        assert!(q.iter().all(|x| x.abs() <= (6.0f32 / 64.0).sqrt()) && q.iter().any(|x| x.abs() > 0.25));
    }
}
