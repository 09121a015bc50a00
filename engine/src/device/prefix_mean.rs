//! Means of prefixes of packed sequences.

use super::{DeviceError, Floats, Indices, Memory};

/// Prefixes of packed sequences, grouped by sequence. The prefix of group `g` of sequence `b`
/// (`group_offsets[b]..group_offsets[b + 1]`) is the first `count[g]` rows of the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Prefixes<U> {
    /// `[B + 1]` prefix sums of the sequence lengths.
    pub cu_seqlens: U,
    /// `[B + 1]` groups of each sequence.
    pub group_offsets: U,
    /// `[G]` rows of each prefix, ascending within a sequence.
    pub count: U,
    /// `[G]` divisor of each mean. A divisor of 0 gives a mean of 0.
    pub divisor: U,
}

/// Prefix means.
pub trait PrefixMean: Memory {
    /// `mean[g] = (sum of the rows of prefix g) / divisor[g]`. `x: [N, width]`, `mean: [G, width]`.
    fn prefix_mean(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<Self>>,
        x: &Floats<Self>,
        mean: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`PrefixMean::prefix_mean`]. Overwrites all of `dx`.
    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<Self>>,
        dmean: &Floats<Self>,
        dx: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;
}
