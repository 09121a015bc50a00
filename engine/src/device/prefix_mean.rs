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
    /// Weights by age; `None`: all rows weigh alike.
    pub recency: Option<Recency<U>>,
}

/// Weights that halve with age. They replace the divisor, which is the length of the history:
///
/// ```text
/// mean[g] = sum over t of w(L - 1 - position[t]) x[t] / (w(0) + .. + w(L - 1))
/// w(age)  = 2^(-age / half_life)            L = divisor[g]
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Recency<U> {
    /// Number of later events that halve a weight, above 0.
    pub half_life: f32,
    /// `[N]` position of each row in the history. Ascends within a sequence; in a prefix, less than
    /// its divisor.
    pub position: U,
}

impl<U> Recency<U> {
    /// What the logarithm of a weight loses with each later event.
    ///
    /// # Panics
    /// If the half-life is not above 0.
    pub fn rate(&self) -> f64 {
        assert!(self.half_life > 0.0, "a half-life of {}", self.half_life);
        std::f64::consts::LN_2 / f64::from(self.half_life)
    }
}

/// Prefix means.
pub trait PrefixMean: Memory {
    /// `mean[g] = (sum of the rows of prefix g) / divisor[g]`, or with weights as [`Recency`] says.
    /// `x: [N, width]`, `mean: [G, width]`.
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
