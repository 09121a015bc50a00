//! Hyperparameters of the model and its training, with validation.

use super::parameters::Layout;
use crate::attention::{FhaOptions, LabelMask, Normalization, Pairing};
use crate::device::{AdamStep, Clip, DeviceError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The shape of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the item table.
    pub items: usize,
    /// Length of the longest history; rows of the position table.
    pub max_length: usize,
    /// Model width `D`.
    pub width: usize,
    /// Attention heads `H`, a divisor of `D`.
    pub heads: usize,
    /// Blocks in the encoder and in each of the two interest encoders.
    pub blocks: usize,
    /// Hidden widths of the target-attention MLP.
    pub attention: [usize; 2],
    /// Hidden widths of the towers.
    pub tower: [usize; 2],
    /// Softmax denominator of the masked attention.
    pub normalization: Normalization,
    /// Factorization heads; `false` is the ablation with plain multi-head attention and no label
    /// mask.
    pub fha: bool,
    /// The label mask of the encoder; `false` is the "w/o MO" ablation.
    pub label_mask: bool,
    /// Number of later events that halve the weight of an event in the means and in target
    /// attention, at least [`SHORTEST_HALF_LIFE`]. `None`, as in the paper: all events weigh alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub half_life: Option<f32>,
}

/// Largest width and length. With [`MOST_BLOCKS`], no product of two sizes, nor a list of the
/// tensors, is too large for the memory of a machine that only reads a corrupt file.
pub const LARGEST_SIZE: usize = 1 << 20;

/// Most blocks. See [`LARGEST_SIZE`].
pub const MOST_BLOCKS: usize = 1 << 10;

/// The shortest half-life, in events: the weight of the event before the last is 2^-10.
pub const SHORTEST_HALF_LIFE: f32 = 0.1;

impl ModelConfig {
    /// The network of the paper for a number of items and a history length.
    pub fn new(items: usize, max_length: usize) -> Self {
        Self {
            items,
            max_length,
            width: 32,
            heads: 2,
            blocks: 1,
            attention: [80, 40],
            tower: [100, 64],
            normalization: Normalization::Joint,
            fha: true,
            label_mask: true,
            half_life: None,
        }
    }

    /// Attention of the encoder.
    pub fn encoder_attention(&self) -> FhaOptions {
        let masked = self.label_mask && self.fha && self.heads > 1;
        FhaOptions {
            label_mask: if masked { LabelMask::Feedback } else { LabelMask::None },
            normalization: self.normalization,
            ..self.interest_attention()
        }
    }

    /// Attention of the interest encoders. Their tokens have one label, so there is no mask.
    pub fn interest_attention(&self) -> FhaOptions {
        FhaOptions {
            label_mask: LabelMask::None,
            pairing: if self.fha { Pairing::Factorized } else { Pairing::PerHead },
            ..FhaOptions::new(self.heads, self.width / self.heads)
        }
    }

    /// Number of trainable values.
    pub fn parameters(&self) -> usize {
        Layout::new(self).parameters()
    }

    /// Validates the configuration.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the invalid field.
    pub fn check(&self) -> Result<(), ModelError> {
        let error =
            |field, value: usize, reason| Err(ModelError::Config { field, value: value.to_string(), reason });
        let [attention0, attention1] = self.attention;
        let [tower0, tower1] = self.tower;
        let sizes = [
            ("items", self.items, u32::MAX as usize),
            ("max_length", self.max_length, LARGEST_SIZE),
            ("width", self.width, LARGEST_SIZE),
            ("heads", self.heads, LARGEST_SIZE),
            ("blocks", self.blocks, MOST_BLOCKS),
            ("attention", attention0, LARGEST_SIZE),
            ("attention", attention1, LARGEST_SIZE),
            ("tower", tower0, LARGEST_SIZE),
            ("tower", tower1, LARGEST_SIZE),
        ];
        check_sizes(&sizes)?;
        if !self.width.is_multiple_of(self.heads) {
            return error("width", self.width, "must be a multiple of the number of heads");
        }
        if self.fha && self.heads > 1 && !self.heads.is_multiple_of(2) {
            return error(
                "heads",
                self.heads,
                "factorization heads form two groups: use an even number, or 1",
            );
        }
        if let Some(half_life) = self.half_life
            && !(SHORTEST_HALF_LIFE..=f32::MAX).contains(&half_life)
        {
            let reason = "must be at least 0.1 events";
            return Err(ModelError::Config { field: "half_life", value: half_life.to_string(), reason });
        }
        Ok(())
    }
}

/// Refuses a size of 0 and one above its limit. `sizes` are (field, value, limit).
///
/// # Errors
/// [`ModelError::Config`] names the first such field.
pub fn check_sizes(sizes: &[(&'static str, usize, usize)]) -> Result<(), ModelError> {
    for &(field, value, limit) in sizes {
        let reason = match value {
            0 => "must be at least 1",
            _ if value > limit => "is too large: at most 2^32 - 1 items, 1,024 blocks, else 2^20",
            _ => continue,
        };
        return Err(ModelError::Config { field, value: value.to_string(), reason });
    }
    Ok(())
}

/// Standard deviation of the initial embeddings and MLP weights. The projections of the blocks are
/// Glorot uniform in both cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Initialization {
    /// 0.01, as in the published code, whose MLPs have batch norm. Without batch norm, the signal
    /// nearly vanishes over three such layers: at first all candidates score alike, and training
    /// takes long to leave that plateau.
    Small,
    /// 0.3 for embeddings and `sqrt(2 / (inputs + outputs))` for an MLP weight, which preserves the
    /// scale of the signal.
    #[default]
    Scaled,
}

/// Weights of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossOptions {
    /// Interest-wise BPR (IBL).
    pub bpr: f32,
    /// Disentangling (IDL). A positive weight pushes the interests apart.
    pub idl: f32,
    /// L2 penalty on the embedding rows of the batch.
    pub embed_l2: f32,
}

/// Adam and clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamOptions {
    /// Learning rate.
    pub lr: f32,
    /// Gradient clipping.
    pub clip: Option<Clip>,
    /// Updates all embedding rows in each step (`true`), or only the rows of the batch (`false`,
    /// lazy Adam).
    pub dense_embeddings: bool,
}

impl AdamOptions {
    /// Step `step` (from 1 on), with the usual constants: decay rates 0.9 and 0.999, epsilon 1e-8.
    #[doc(hidden)]
    pub fn step(&self, step: u64) -> AdamStep {
        AdamStep { lr: self.lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, step, clip: self.clip }
    }
}

/// A failure to build or run a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An invalid configuration value.
    #[error("model: {field} = {value}: {reason}")]
    Config {
        /// Field of [`ModelConfig`].
        field: &'static str,
        /// Its value.
        value: String,
        /// Requirement.
        reason: &'static str,
    },
    /// A tensor that is missing, unknown or of the wrong shape.
    #[error("model: tensor {name}: expected shape {expected:?}, found {found:?}")]
    Tensor {
        /// Name.
        name: String,
        /// Shape that the configuration requires; empty for an unknown tensor.
        expected: Vec<usize>,
        /// Actual shape; empty for a missing tensor.
        found: Vec<usize>,
    },
    /// An index of the batch exceeds the limit of the model.
    #[error("model: {what} {found} in the batch, but the model has {limit}")]
    Batch {
        /// The index, e.g. `item` or `history position`.
        what: &'static str,
        /// Value in the batch.
        found: usize,
        /// Limit of the model.
        limit: usize,
    },
    /// A batch staged for another model.
    #[error("the batch was staged for another device or another model; stage it with this model's stager")]
    OtherModel,
    /// A non-finite loss or gradient.
    #[error("non-finite value in {tensor}")]
    NonFinite {
        /// The first non-finite tensor, e.g. `loss.bce` or `gradient of encoder.q.w`.
        tensor: String,
    },
    /// A step begun before a refused step was finished.
    #[error("an earlier step had a non-finite value, so this step changed nothing; begin it again")]
    Refused,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_corrupt_file_are_refused_by_name() {
        let refused = |change: fn(&mut ModelConfig)| {
            let mut config = ModelConfig::new(10, 20);
            change(&mut config);
            config.check().expect_err("a size beyond the limits").to_string()
        };
        for (field, error) in [
            ("blocks", refused(|config| config.blocks = usize::MAX)),
            ("width", refused(|config| config.width = 1 << 40)),
            ("max_length", refused(|config| config.max_length = usize::MAX)),
            ("attention", refused(|config| config.attention[1] = 1 << 40)),
            ("tower", refused(|config| config.tower[0] = 0)),
            ("items", refused(|config| config.items = 1 << 32)),
            ("half_life", refused(|config| config.half_life = Some(f32::NAN))),
            ("half_life", refused(|config| config.half_life = Some(0.0))),
        ] {
            assert!(error.starts_with(&format!("model: {field} = ")), "{error}");
        }
        ModelConfig { width: 512, blocks: 6, ..ModelConfig::new(u32::MAX as usize, 10_000) }.check().unwrap();
        // More parameters than can be counted, within the limits.
        let huge =
            ModelConfig { width: LARGEST_SIZE, heads: LARGEST_SIZE, blocks: 6, ..ModelConfig::new(10, 20) };
        huge.check().unwrap();
        assert_eq!(huge.parameters(), usize::MAX);
    }
}
