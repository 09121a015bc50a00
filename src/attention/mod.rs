//! Factorization-heads attention (FHA) as an operation on packed buffers (Lin et al., WWW 2023).
//!
//! | name | shape | meaning |
//! |---|---|---|
//! | `q`, `k`, `v` | `[N, H, d]` f32 | projected tokens of a packed batch, row-major |
//! | `cu_seqlens` | `[B + 1]` u32 | prefix sums of the sequence lengths, `cu_seqlens[B] = N`; a length may be 0 |
//! | `label` | `[N]` u8 | feedback of each token: 0 negative (skip), 1 positive |
//! | `o` | `[N, Q, K, d]` f32 | output; `Q` = [`FhaOptions::query_slots`], `K` = [`FhaOptions::key_slots`] |
//! | `lse` | `[N, Q]` f32 | natural logarithm of each softmax denominator |

use thiserror::Error;

/// Which softmax denominator a row has when the label mask is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// All key heads of all visible tokens enter the denominator; the label mask is applied after the softmax.
    #[default]
    Joint,
    /// Only the kept (token, key head) pairs enter the denominator.
    Masked,
}

/// How heads meet labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelMask {
    /// The first half of the heads serves negative tokens, the second half positive ones.
    #[default]
    Feedback,
    /// Every head serves every token.
    None,
}

/// Which key heads a query head attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairing {
    /// Every query head meets every key head, in one joint softmax: factorization heads.
    #[default]
    Factorized,
    /// Head `h` meets only key head `h`: plain multi-head attention. No label mask.
    PerHead,
}

/// What the operation computes; everything but the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FhaOptions {
    /// Number of heads `H`: even, or 1 without a label mask.
    pub heads: usize,
    /// Width `d` of one head.
    pub head_dim: usize,
    /// Label mask.
    pub label_mask: LabelMask,
    /// Denominator.
    pub normalization: Normalization,
    /// Heads that meet.
    pub pairing: Pairing,
    /// Whether token `i` sees only tokens `j <= i` of its sequence.
    pub causal: bool,
    /// Factor on the scores.
    pub scale: f32,
}

impl FhaOptions {
    /// The paper's operation: factorized, label mask, joint, causal, scale `1/sqrt(d)`.
    pub fn new(heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            head_dim,
            label_mask: LabelMask::Feedback,
            normalization: Normalization::Joint,
            pairing: Pairing::Factorized,
            causal: true,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    /// Query heads computed and stored per token: `H/2` under the label mask (slot `a` stands for head
    /// `a + label * H/2`), else `H`.
    pub fn query_slots(&self) -> usize {
        match self.label_mask {
            LabelMask::Feedback => self.heads / 2,
            LabelMask::None => self.heads,
        }
    }

    /// Output slots per query head: `H`, one a key head; 1 for [`Pairing::PerHead`].
    pub fn key_slots(&self) -> usize {
        match self.pairing {
            Pairing::Factorized => self.heads,
            Pairing::PerHead => 1,
        }
    }
}

/// An argument that cannot be computed with, named.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// A buffer whose length does not follow from the options and `cu_seqlens`.
    #[error("attention: {name} has {found} values, but its shape {shape} needs {expected}")]
    Length {
        /// Argument.
        name: &'static str,
        /// Shape in words, e.g. `[N, H, d]`.
        shape: &'static str,
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
}
