//! Names, order, shapes and initial values of the parameters.

use super::{HostTensor, Initialization, ModelConfig, ModelError};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Index of a parameter in every list of tensors.
pub type Id = usize;

/// Initial distribution of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initial {
    /// Normal, truncated at two standard deviations. [`Initialization`] sets the standard
    /// deviation.
    Embedding,
    /// The same for weights of the target attention and the towers.
    Mlp,
    /// Uniform within `sqrt(6 / (inputs + outputs))`: projections of the blocks.
    Glorot,
    /// Layer norm scales.
    One,
    /// Biases.
    Zero,
}

/// Name, shape and initial distribution of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    pub shape: Vec<usize>,
    pub initial: Initial,
}

impl Spec {
    pub(crate) fn len(&self) -> usize {
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
        let mut names = Namer { specs: Vec::new() };
        let width = config.width;
        let item = names.tensor("item".into(), vec![config.items, width], Initial::Embedding);
        let position = names.tensor("position".into(), vec![config.max_length, width], Initial::Embedding);
        let label = names.tensor("label".into(), vec![2, width], Initial::Embedding);
        let encoder = names.blocks("encoder", config);
        let interest = INTERESTS.map(|name| names.blocks(name, config));
        let target = INTERESTS.map(|name| Target {
            w: names.tensor(format!("target_{name}.w"), vec![width, width], Initial::Mlp),
            mlp: names.mlp(&format!("target_{name}.mlp"), 4 * width, config.attention),
        });
        let tower = INTERESTS.map(|name| names.mlp(&format!("tower_{name}"), 4 * width, config.tower));
        Self { specs: names.specs, item, position, label, encoder, interest, target, tower }
    }

    /// Initial values. Each tensor has its own random stream.
    pub fn initial(&self, seed: u64, initialization: Initialization) -> Vec<Vec<f32>> {
        let tensor = |(id, spec): (usize, &Spec)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(id as u64);
            draw(spec, initialization, &mut rng)
        };
        self.specs.iter().enumerate().map(tensor).collect()
    }

    /// Number of values.
    pub fn parameters(&self) -> usize {
        self.specs.iter().map(Spec::len).sum()
    }

    /// The values of the `tensors` whose names start with `prefix`, in order.
    ///
    /// # Errors
    /// A missing or unknown name, or a wrong shape.
    pub fn arrange<'a>(&self, prefix: &str, tensors: &'a [HostTensor]) -> Result<Vec<&'a [f32]>, ModelError> {
        let mismatch = |name: &str, expected: &[usize], found: &[usize]| ModelError::Tensor {
            name: name.to_owned(),
            expected: expected.to_vec(),
            found: found.to_vec(),
        };
        let own = |t: &&HostTensor| t.name.starts_with(prefix);
        for t in tensors.iter().filter(own) {
            let name = &t.name[prefix.len()..];
            if !self.specs.iter().any(|s| s.name == name) {
                return Err(mismatch(&t.name, &[], &t.shape));
            }
        }
        self.specs
            .iter()
            .map(|spec| {
                let name = format!("{prefix}{}", spec.name);
                let t = tensors
                    .iter()
                    .find(|t| t.name == name)
                    .ok_or_else(|| mismatch(&name, &spec.shape, &[]))?;
                let fits = t.shape == spec.shape && t.values.len() == spec.len();
                if fits { Ok(&t.values[..]) } else { Err(mismatch(&name, &spec.shape, &t.shape)) }
            })
            .collect()
    }
}

struct Namer {
    specs: Vec<Spec>,
}

impl Namer {
    fn tensor(&mut self, name: String, shape: Vec<usize>, initial: Initial) -> Id {
        self.specs.push(Spec { name, shape, initial });
        self.specs.len() - 1
    }

    fn norm(&mut self, name: String, width: usize) -> Norm {
        Norm {
            gamma: self.tensor(format!("{name}.gamma"), vec![width], Initial::One),
            beta: self.tensor(format!("{name}.beta"), vec![width], Initial::Zero),
        }
    }

    fn linear(&mut self, name: String, (inputs, outputs): (usize, usize), initial: Initial) -> Linear {
        let w = self.tensor(format!("{name}.w"), vec![inputs, outputs], initial);
        let b = self.tensor(format!("{name}.b"), vec![outputs], Initial::Zero);
        Linear { w, b, inputs, outputs }
    }

    /// Blocks `NAME`, `NAME.1`, `NAME.2`, ... The first has no number, so that networks of one
    /// block have plain names.
    fn blocks(&mut self, name: &str, config: &ModelConfig) -> Vec<Block> {
        let name_of = |i: usize| if i == 0 { name.to_owned() } else { format!("{name}.{i}") };
        (0..config.blocks).map(|i| self.block(&name_of(i), config)).collect()
    }

    fn block(&mut self, name: &str, config: &ModelConfig) -> Block {
        let width = config.width;
        let square = (width, width);
        let pairs = if config.fha { config.heads } else { 1 };
        Block {
            ln_in: self.norm(format!("{name}.ln_in"), width),
            q: self.linear(format!("{name}.q"), square, Initial::Glorot),
            k: self.linear(format!("{name}.k"), square, Initial::Glorot),
            v: self.linear(format!("{name}.v"), square, Initial::Glorot),
            o: self.linear(format!("{name}.o"), (pairs * width, width), Initial::Glorot),
            ln_ffn: self.norm(format!("{name}.ln_ffn"), width),
            ffn1: self.linear(format!("{name}.ffn1"), square, Initial::Glorot),
            ffn2: self.linear(format!("{name}.ffn2"), square, Initial::Glorot),
            ln_out: self.norm(format!("{name}.ln_out"), width),
        }
    }

    fn mlp(&mut self, name: &str, inputs: usize, hidden: [usize; 2]) -> [Linear; 3] {
        let widths = [(inputs, hidden[0]), (hidden[0], hidden[1]), (hidden[1], 1)];
        std::array::from_fn(|i| self.linear(format!("{name}.{i}"), widths[i], Initial::Mlp))
    }
}

fn draw(spec: &Spec, initialization: Initialization, rng: &mut impl Rng) -> Vec<f32> {
    let n = spec.len();
    match spec.initial {
        Initial::One => vec![1.0; n],
        Initial::Zero => vec![0.0; n],
        Initial::Glorot => {
            let limit = (6.0 / (spec.shape[0] + spec.shape[1]) as f32).sqrt();
            (0..n).map(|_| rng.random_range(-limit..limit)).collect()
        }
        Initial::Embedding | Initial::Mlp => {
            let std = match (initialization, spec.initial) {
                (Initialization::Small, _) => 0.01,
                (Initialization::Scaled, Initial::Embedding) => 0.3,
                (Initialization::Scaled, _) => (2.0 / (spec.shape[0] + spec.shape[1]) as f32).sqrt(),
            };
            (0..n).map(|_| std * truncated_normal(rng)).collect()
        }
    }
}

/// A normal value truncated at two standard deviations (Box-Muller with rejection).
pub fn truncated_normal(rng: &mut impl Rng) -> f32 {
    loop {
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let value = radius * (std::f64::consts::TAU * rng.random::<f64>()).cos();
        if value.abs() <= 2.0 {
            return value as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_have_the_specified_distribution() {
        let layout = Layout::new(&ModelConfig::new(500, 20));
        let values = layout.initial(7, Initialization::Small);
        assert_eq!(values, layout.initial(7, Initialization::Small));
        assert_ne!(values[layout.item], layout.initial(8, Initialization::Small)[layout.item]);
        let first = layout.tower[0][0].w; // 128 by 100
        for (initialization, tensor, std) in [
            (Initialization::Small, layout.item, 0.01),
            (Initialization::Small, first, 0.01),
            (Initialization::Scaled, layout.item, 0.3),
            (Initialization::Scaled, first, (2.0f32 / 228.0).sqrt()),
        ] {
            let drawn = &layout.initial(7, initialization)[tensor];
            assert!(drawn.iter().all(|x| x.abs() <= 2.0 * std));
            let variance = drawn.iter().map(|x| (x / std * x / std) as f64).sum::<f64>() / drawn.len() as f64;
            // A normal truncated at two deviations has variance 0.7737.
            assert!((variance - 0.7737).abs() < 0.02, "{variance}");
        }
        let q = &values[layout.encoder[0].q.w];
        assert!(q.iter().all(|x| x.abs() <= (6.0f32 / 64.0).sqrt()) && q.iter().any(|x| x.abs() > 0.25));
    }
}
