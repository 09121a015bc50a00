//! What the operation accepts, checked before anything is computed or written.

use super::{FhaOptions, Inputs, LabelMask, Pairing};
use thiserror::Error;

/// An argument that cannot be computed with, named. Nothing was written to the outputs.
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
    /// No heads, or heads of width 0.
    #[error("attention: {name} is 0")]
    Zero {
        /// `heads` or `head_dim`.
        name: &'static str,
    },
    /// Factorization heads come in two groups of equal size.
    #[error("attention: heads is {heads}, but must be even (or 1, without a label mask)")]
    OddHeads {
        /// Heads given.
        heads: usize,
    },
    /// A scale that is infinite or not a number.
    #[error("attention: scale is {scale}, but must be finite")]
    Scale {
        /// Scale given.
        scale: f32,
    },
    /// Plain multi-head attention has no head groups a label could choose from.
    #[error("attention: pairing is per head, which has no label mask; set label_mask to none")]
    PerHeadLabelMask,
    /// `cu_seqlens` holds no value; it has one more than there are sequences.
    #[error("attention: cu_seqlens is empty, but has B + 1 values, the first 0")]
    NoSequences,
    /// `cu_seqlens[0]` is not 0.
    #[error("attention: cu_seqlens starts at {found}, but must start at 0")]
    FirstSequence {
        /// `cu_seqlens[0]`.
        found: u32,
    },
    /// A sequence that ends before it starts.
    #[error("attention: cu_seqlens decreases at sequence {sequence}, from {start} to {end}")]
    DecreasingSequences {
        /// The sequence.
        sequence: usize,
        /// `cu_seqlens[sequence]`.
        start: u32,
        /// `cu_seqlens[sequence + 1]`.
        end: u32,
    },
    /// `q`, `k` and `v` agree on a number of tokens that is not the last value of `cu_seqlens`.
    #[error("attention: cu_seqlens ends at {end}, but q, k and v hold {tokens} tokens")]
    LastSequence {
        /// The last value of `cu_seqlens`.
        end: u32,
        /// Tokens in `q`, `k` and `v`.
        tokens: usize,
    },
    /// A label that is neither 0 nor 1.
    #[error("attention: label of token {token} is {value}, but must be 0 (negative) or 1 (positive)")]
    Label {
        /// The token.
        token: usize,
        /// Its label.
        value: u8,
    },
}

pub(crate) fn length(
    name: &'static str,
    shape: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), AttentionError> {
    if found == expected { Ok(()) } else { Err(AttentionError::Length { name, shape, expected, found }) }
}

impl FhaOptions {
    /// Checks the options and the inputs against each other.
    ///
    /// # Errors
    /// [`AttentionError`] names the first argument that does not fit.
    ///
    /// # Returns
    /// The number of tokens `N`.
    pub fn check<T>(&self, inputs: &Inputs<T>) -> Result<usize, AttentionError> {
        let Self { heads, head_dim, .. } = *self;
        if heads == 0 {
            return Err(AttentionError::Zero { name: "heads" });
        }
        if head_dim == 0 {
            return Err(AttentionError::Zero { name: "head_dim" });
        }
        if !self.scale.is_finite() {
            return Err(AttentionError::Scale { scale: self.scale });
        }
        match (self.pairing, self.label_mask) {
            (Pairing::PerHead, LabelMask::Feedback) => return Err(AttentionError::PerHeadLabelMask),
            (Pairing::PerHead, LabelMask::None) => {}
            (Pairing::Factorized, LabelMask::None) if heads == 1 => {}
            (Pairing::Factorized, _) if heads % 2 == 1 => return Err(AttentionError::OddHeads { heads }),
            (Pairing::Factorized, _) => {}
        }

        let cu = inputs.cu_seqlens;
        let (&first, &last) = cu.first().zip(cu.last()).ok_or(AttentionError::NoSequences)?;
        if first != 0 {
            return Err(AttentionError::FirstSequence { found: first });
        }
        if let Some(sequence) = cu.windows(2).position(|w| w[1] < w[0]) {
            let (start, end) = (cu[sequence], cu[sequence + 1]);
            return Err(AttentionError::DecreasingSequences { sequence, start, end });
        }

        let (tokens, shape) = (last as usize, "[N, H, d]");
        let width = heads.saturating_mul(head_dim);
        let lengths = [inputs.q.len(), inputs.k.len(), inputs.v.len()];
        let agree = lengths.iter().all(|&length| length == lengths[0]);
        if agree && lengths[0].is_multiple_of(width) && lengths[0] / width != tokens {
            return Err(AttentionError::LastSequence { end: last, tokens: lengths[0] / width });
        }
        for (name, found) in ["q", "k", "v"].into_iter().zip(lengths) {
            length(name, shape, found, tokens.saturating_mul(width))?;
        }

        let unlabelled = self.label_mask == LabelMask::None;
        if !(unlabelled && inputs.label.is_empty()) {
            length("label", "[N]", inputs.label.len(), tokens)?;
        }
        if !unlabelled && let Some(token) = inputs.label.iter().position(|&l| l > 1) {
            return Err(AttentionError::Label { token, value: inputs.label[token] });
        }
        Ok(tokens)
    }

    /// [`check`](Self::check), and the lengths of `o` and `lse`.
    pub(crate) fn check_outputs<T>(
        &self,
        inputs: &Inputs<T>,
        o: usize,
        lse: usize,
    ) -> Result<usize, AttentionError> {
        let tokens = self.check(inputs)?;
        length("o", "[N, Q, K, d]", o, self.output_len(tokens))?;
        length("lse", "[N, Q]", lse, self.lse_len(tokens))?;
        Ok(tokens)
    }
}
