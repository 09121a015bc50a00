//! What a model is, and how it is trained: plain numbers, checked.

use super::parameters::Layout;
use crate::attention::{FhaOptions, LabelMask, Normalization, Pairing};
use crate::device::{Clip, DeviceError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The shape of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the item table.
    pub items: usize,
    /// Longest history, rows of the position table.
    pub max_length: usize,
    /// Model width `D`.
    pub width: usize,
    /// Attention heads `H`; `D` is a multiple of it.
    pub heads: usize,
    /// Blocks in the encoder and in each of the two interest encoders.
    pub blocks: usize,
    /// Hidden widths of the target-attention MLP.
    pub attention: [usize; 2],
    /// Hidden widths of the towers.
    pub tower: [usize; 2],
    /// Softmax denominator of the masked attention.
    pub normalization: Normalization,
    /// Factorization heads; `false` is the ablation with plain multi-head attention (and no label mask).
    pub fha: bool,
    /// The label mask of the encoder; `false` is the "w/o MO" ablation.
    pub label_mask: bool,
}

impl ModelConfig {
    /// The paper's network for this many items and this history length.
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
        }
    }
}

impl ModelConfig {
    /// Attention of the encoder.
    pub fn encoder_attention(&self) -> FhaOptions {
        let masked = self.label_mask && self.fha && self.heads > 1;
        FhaOptions {
            label_mask: if masked { LabelMask::Feedback } else { LabelMask::None },
            normalization: self.normalization,
            ..self.interest_attention()
        }
    }

    /// Attention of the interests' encoders: one label, so no mask.
    pub fn interest_attention(&self) -> FhaOptions {
        FhaOptions {
            label_mask: LabelMask::None,
            pairing: if self.fha { Pairing::Factorized } else { Pairing::PerHead },
            ..FhaOptions::new(self.heads, self.width / self.heads)
        }
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        Layout::new(self).parameters()
    }

    /// Whether these numbers make a network.
    pub fn check(&self) -> Result<(), ModelError> {
        let error = |field, value, reason| Err(ModelError::Config { field, value, reason });
        let [attention0, attention1] = self.attention;
        let [tower0, tower1] = self.tower;
        let sizes = [
            ("items", self.items),
            ("max_length", self.max_length),
            ("width", self.width),
            ("heads", self.heads),
            ("blocks", self.blocks),
            ("attention", attention0.min(attention1)),
            ("tower", tower0.min(tower1)),
        ];
        for (field, value) in sizes {
            if value == 0 {
                return error(field, value, "must be at least 1");
            }
        }
        if !self.width.is_multiple_of(self.heads) {
            return error("width", self.width, "must be a multiple of the number of heads");
        }
        if self.fha && self.heads > 1 && !self.heads.is_multiple_of(2) {
            return error(
                "heads",
                self.heads,
                "factorization heads come in two groups: use an even number, or 1",
            );
        }
        if u32::try_from(self.items).is_err() {
            return error("items", self.items, "item ids are 32 bits wide");
        }
        Ok(())
    }
}

/// Spread of the initial embeddings and MLP weights. (Projections of the blocks are Glorot uniform either way.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Initialization {
    /// Standard deviation 0.01 throughout, as the published code, whose MLPs have batch norm to make up for it.
    /// Without batch norm the signal through three such layers starts vanishingly small and training stays for long
    /// where every candidate scores alike.
    Small,
    /// Embeddings 0.3; an MLP weight `sqrt(2 / (inputs + outputs))`, so that signals keep their size.
    #[default]
    Scaled,
}

/// Weights of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossOptions {
    /// Interest-wise BPR (IBL).
    pub bpr: f32,
    /// Disentangling (IDL); positive pushes the interests apart.
    pub idl: f32,
    /// Squares of the touched embedding rows.
    pub embed_l2: f32,
}

/// Adam and clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamOptions {
    /// Learning rate.
    pub lr: f32,
    /// Gradient clipping.
    pub clip: Option<Clip>,
    /// Update every embedding row every step (`true`), or only the rows the batch touches (lazy Adam).
    pub dense_embeddings: bool,
}

/// A model that cannot be built or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A configuration value that makes no network.
    #[error("model: {field} = {value}: {reason}")]
    Config {
        /// Field of [`ModelConfig`].
        field: &'static str,
        /// Its value.
        value: usize,
        /// Why not.
        reason: &'static str,
    },
    /// A tensor is missing, unknown or of another shape.
    #[error("model: tensor {name}: expected shape {expected:?}, found {found:?}")]
    Tensor {
        /// Name.
        name: String,
        /// Shape the configuration asks for; empty when the tensor is unknown.
        expected: Vec<usize>,
        /// Shape found; empty when it is missing.
        found: Vec<usize>,
    },
    /// The batch does not fit the model.
    #[error("model: {what} {found} in the batch, but the model has {limit}")]
    Batch {
        /// E.g. `item` or `history length`.
        what: &'static str,
        /// Value in the batch.
        found: usize,
        /// The model's limit.
        limit: usize,
    },
    /// A staged batch of another model.
    #[error("the batch was staged for another device or another model; stage it with this model's stager")]
    OtherModel,
    /// A loss or gradient that is not finite.
    #[error("non-finite value in {tensor}")]
    NonFinite {
        /// The first tensor found to hold it, e.g. `loss.bce` or `gradient encoder.q.w`.
        tensor: String,
    },
}
