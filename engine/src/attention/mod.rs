//! Factorization-heads attention (FHA) as an operation on packed buffers (Lin et al., WWW 2023).
//!
//! | name | shape | meaning |
//! |---|---|---|
//! | `q`, `k`, `v` | `[N, H, d]` f32 | projected tokens of a packed batch, row-major |
//! | `cu_seqlens` | `[B + 1]` u32 | prefix sums of the sequence lengths, `cu_seqlens[B] = N`; a length may be 0 |
//! | `label` | `[N]` u8 | feedback of each token: 0 negative (skip), 1 positive |
//! | `o` | `[N, Q, K, d]` f32 | output; `Q` = [`FhaOptions::query_slots`], `K` = [`FhaOptions::key_slots`] |
//! | `lse` | `[N, Q]` f32 | natural logarithm of each softmax denominator |
//!
//! [`forward`] and [`backward`] run on the CPU engine: fused, vectorized, and parallel over
//! sequences and over tiles of long sequences. Memory is proportional to the number of tokens, and
//! results are bitwise equal for any number of threads. [`reference`](mod@reference) is a naive
//! implementation in f64.
//!
//! ```
//! # use dfar_engine as dfar;
//! use dfar::attention::{FhaOptions, Inputs, forward};
//!
//! let options = FhaOptions::new(2, 4);
//! // 3 tokens, 2 heads of width 4
//! let (q, k, v) = ([0.1; 3 * 2 * 4], [0.2; 3 * 2 * 4], [0.3; 3 * 2 * 4]);
//! let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: &[0, 2, 3], label: &[1, 0, 1] };
//! let mut o = vec![0.0; options.output_len(3)];
//! let mut lse = vec![0.0; options.lse_len(3)];
//! forward(&options, inputs, &mut o, &mut lse)?;
//! // The first token is positive: it attends to itself in key head 1 and to nothing in key head 0.
//! assert_eq!(o[..4], [0.0; 4]);
//! assert!((o[4] - 0.15).abs() < 1e-6);
//! # Ok::<(), dfar::attention::AttentionError>(())
//! ```

mod check;
mod engine;
#[doc(hidden)]
pub mod head_pairs;
pub mod reference;

pub use check::AttentionError;
#[doc(hidden)]
pub use check::length;
#[doc(hidden)]
pub use engine::scratch_bytes;
pub use engine::{backward, forward};

/// The softmax denominator of a row under the label mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// All key heads of all visible tokens enter the denominator. The label mask is applied after
    /// the softmax.
    #[default]
    Joint,
    /// Only the kept (token, key head) pairs enter the denominator.
    Masked,
}

/// The label mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelMask {
    /// The first half of the heads serves negative tokens, the second half positive tokens.
    #[default]
    Feedback,
    /// Every head serves every token.
    None,
}

/// The key heads that a query head attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairing {
    /// Factorization heads: each query head attends to all key heads, in one joint softmax.
    #[default]
    Factorized,
    /// Plain multi-head attention: query head `h` attends to key head `h`. Excludes the label mask.
    PerHead,
}

/// The options of the operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FhaOptions {
    /// Number of heads `H`: even, or 1 without a label mask.
    pub heads: usize,
    /// Width `d` of one head.
    pub head_dim: usize,
    /// Label mask.
    pub label_mask: LabelMask,
    /// Softmax denominator.
    pub normalization: Normalization,
    /// Pairing of query heads and key heads.
    pub pairing: Pairing,
    /// Whether token `i` attends only to tokens `j <= i` of its sequence.
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

    /// `Q`, the query heads stored per token: `H/2` under the label mask, where slot `a` is head
    /// `a + label * H/2`, else `H`.
    pub fn query_slots(&self) -> usize {
        match self.label_mask {
            LabelMask::Feedback => self.heads / 2,
            LabelMask::None => self.heads,
        }
    }

    /// Values of `o` for `tokens` tokens: `N * Q * K * d`.
    pub fn output_len(&self, tokens: usize) -> usize {
        tokens * self.query_slots() * self.key_slots() * self.head_dim
    }

    /// Values of `lse` for `tokens` tokens: `N * Q`.
    pub fn lse_len(&self, tokens: usize) -> usize {
        tokens * self.query_slots()
    }

    /// `K`, the output slots per query head: one per key head, `H`; 1 for [`Pairing::PerHead`].
    pub fn key_slots(&self) -> usize {
        match self.pairing {
            Pairing::Factorized => self.heads,
            Pairing::PerHead => 1,
        }
    }
}

/// The inputs: slices of packed tokens with the shapes of the [module table](self).
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T = f32> {
    /// Queries, `[N, H, d]`.
    pub q: &'a [T],
    /// Keys, `[N, H, d]`.
    pub k: &'a [T],
    /// Values, `[N, H, d]`.
    pub v: &'a [T],
    /// Prefix sums of the sequence lengths, `[B + 1]`.
    pub cu_seqlens: &'a [u32],
    /// Feedback of each token, `[N]`: 0 or 1. Ignored with [`LabelMask::None`], and may then be
    /// empty.
    pub label: &'a [u8],
}

/// The outputs of [`backward`], `[N, H, d]` each, overwritten.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Of the queries.
    pub dq: &'a mut [f32],
    /// Of the keys.
    pub dk: &'a mut [f32],
    /// Of the values.
    pub dv: &'a mut [f32],
}
