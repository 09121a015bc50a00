//! Validation of the arguments, before any computation.

use super::{FhaOptions, Inputs, LabelMask, Pairing};
use thiserror::Error;

/// An invalid argument. The outputs are unchanged.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// The length of a buffer contradicts the options or `cu_seqlens`.
    #[error("attention: {name} has {found} values, but its shape {shape} needs {expected}")]
    Length {
        /// Argument.
        name: &'static str,
        /// Its shape, e.g. `[N, H, d]`.
        shape: &'static str,
        /// Expected number of values.
        expected: usize,
        /// Actual number of values.
        found: usize,
    },
    /// No heads, or heads of width 0.
    #[error("attention: {name} is 0")]
    Zero {
        /// `heads` or `head_dim`.
        name: &'static str,
    },
    /// An odd number of heads: factorization heads form two groups of equal size.
    #[error("attention: heads is {heads}, but must be even (or 1, without a label mask)")]
    OddHeads {
        /// Number of heads.
        heads: usize,
    },
    /// A non-finite scale.
    #[error("attention: scale is {scale}, but must be finite")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// A label mask with [`Pairing::PerHead`]: plain multi-head attention has no head groups.
    #[error("attention: per-head pairing excludes the label mask; set label_mask to none")]
    PerHeadLabelMask,
    /// An empty `cu_seqlens`.
    #[error("attention: cu_seqlens is empty, but needs B + 1 values, the first 0")]
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
    /// `q`, `k` and `v` agree on the number of tokens, but `cu_seqlens` ends at another.
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

/// A typed error unless `found == expected`.
pub fn length(
    name: &'static str,
    shape: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), AttentionError> {
    if found == expected { Ok(()) } else { Err(AttentionError::Length { name, shape, expected, found }) }
}

impl FhaOptions {
    /// Validates the options and the inputs. Returns the number of tokens `N`.
    ///
    /// # Errors
    /// [`AttentionError`] names the first invalid argument.
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

    /// As [`check`](Self::check), for `tokens` tokens whose `q`, `k` and `v` are not on the host.
    #[doc(hidden)]
    pub fn check_packed(
        &self,
        tokens: usize,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<(), AttentionError> {
        // Only their lengths are read. Units take no memory.
        let rows = vec![(); tokens.saturating_mul(self.heads).saturating_mul(self.head_dim)];
        self.check(&Inputs { q: &rows, k: &rows, v: &rows, cu_seqlens, label }).map(drop)
    }

    /// As [`check`](Self::check), with the lengths of `o` and `lse`.
    #[doc(hidden)]
    pub fn check_outputs<T>(
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
