//! Target attention: candidates attend to the history before them.

use super::{DeviceError, Floats, Memory, Segments};

/// The (history token, candidate) pairs that target attention scores, and the rows that read the
/// scores.
///
/// A *pair* is a distinct (sequence, candidate item), with the longest prefix of the sequence that
/// any of its rows has. A *row* is an instance: a pair and the length of its history. A score does
/// not depend on the length of the history, so each score is computed once per pair and normalized
/// once per row.
#[derive(Clone, Copy, Debug)]
pub struct TargetIndex<U> {
    /// `[B + 1]` tokens of each sequence.
    pub cu_seqlens: U,
    /// `[B + 1]` pairs of each sequence: `pair_offsets[b]..pair_offsets[b + 1]`.
    pub pair_offsets: U,
    /// `[C + 1]` prefix sums of the lengths of the pairs; `e` holds the scores of pair `c` from
    /// `score_offsets[c]` on.
    pub score_offsets: U,
    /// `[C + 1]`, `[R]` the rows of each pair.
    pub rows: Segments<U>,
    /// `[R]` history length of each row, at most the length of its pair. May be 0.
    pub row_length: U,
}

/// Sizes of a [`TargetIndex`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetCounts {
    /// `N`
    pub tokens: usize,
    /// `C`
    pub pairs: usize,
    /// `score_offsets[C]`
    pub scores: usize,
    /// `R`
    pub rows: usize,
}

impl TargetIndex<&[u32]> {
    /// The sizes.
    ///
    /// # Panics
    /// If the lengths of the arrays contradict each other.
    pub fn counts(&self) -> TargetCounts {
        let last = |offsets: &[u32]| *offsets.last().expect("offsets start with 0") as usize;
        let ascending = |offsets: &[u32]| offsets[0] == 0 && offsets.is_sorted();
        let pairs = self.score_offsets.len() - 1;
        let offsets = [self.cu_seqlens, self.pair_offsets, self.score_offsets, self.rows.offsets];
        assert!(offsets.into_iter().all(ascending), "offsets must ascend from 0");
        assert_eq!(self.pair_offsets.len(), self.cu_seqlens.len(), "pair_offsets is not [B + 1]");
        assert_eq!(last(self.pair_offsets), pairs, "score_offsets is not [C + 1]");
        assert_eq!(self.rows.offsets.len(), pairs + 1, "rows.offsets is not [C + 1]");
        assert_eq!(last(self.rows.offsets), self.rows.members.len(), "rows.members is not [R]");
        assert_eq!(self.row_length.len(), self.rows.members.len(), "row_length is not [R]");
        TargetCounts {
            tokens: last(self.cu_seqlens),
            pairs,
            scores: last(self.score_offsets),
            rows: self.row_length.len(),
        }
    }

    /// Number of scores of a pair.
    pub fn pair_length(&self, pair: usize) -> u32 {
        self.score_offsets[pair + 1] - self.score_offsets[pair]
    }
}

/// Widths and weights of target attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetShape {
    /// `D`
    pub width: usize,
    /// Hidden widths of the scoring MLP.
    pub hidden: [usize; 2],
    /// Number of later events that halve the attention weight of a token; 0: none do.
    pub half_life: f32,
}

impl TargetShape {
    /// What the score of a token loses for each later token.
    pub fn slope(&self) -> f32 {
        if self.half_life > 0.0 { std::f32::consts::LN_2 / self.half_life } else { 0.0 }
    }
}

/// The inputs of target attention, besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct TargetInputs<F> {
    /// `[N, D]` history tokens, averaged by the attention weights.
    pub s: F,
    /// `[N, D]` projected history tokens, scored against the candidates.
    pub a: F,
    /// `[C, D]` candidates.
    pub r: F,
}

/// The MLP that scores a (token, candidate) pair: `4D -> hidden[0] -> hidden[1] -> 1`, ReLU between
/// the layers. Weights are `[inputs, outputs]`.
#[derive(Clone, Copy, Debug)]
pub struct TargetWeights<F> {
    /// `[4D, hidden[0]]`, the blocks multiplying `a`, `r`, `a - r`, `a * r` in this order.
    pub w0: F,
    /// `[hidden[0]]`
    pub b0: F,
    /// `[hidden[0], hidden[1]]`
    pub w1: F,
    /// `[hidden[1]]`
    pub b1: F,
    /// `[hidden[1], 1]`
    pub w2: F,
    /// `[1]`
    pub b2: F,
}

impl<F> TargetWeights<F> {
    /// Applies `f` to each weight.
    pub fn map<G>(self, mut f: impl FnMut(F) -> G) -> TargetWeights<G> {
        let Self { w0, b0, w1, b1, w2, b2 } = self;
        TargetWeights { w0: f(w0), b0: f(b0), w1: f(w1), b1: f(b1), w2: f(w2), b2: f(b2) }
    }
}

/// The result of the forward pass, which the backward pass reads.
#[derive(Clone, Copy, Debug)]
pub struct TargetState<F> {
    /// `[score_offsets[C]]` scores of the pairs.
    pub e: F,
    /// `[R]` logarithm of the softmax denominator of each row; -inf for an empty history.
    pub lse: F,
    /// `[R, D]` attended history of each row; 0 for an empty history.
    pub att: F,
}

/// Gradients of target attention.
#[derive(Debug)]
pub struct TargetGradients<F> {
    /// `[N, D]`, added to.
    pub ds: F,
    /// `[N, D]`, overwritten.
    pub da: F,
    /// `[C, D]`, overwritten.
    pub dr: F,
    /// Of the weights, overwritten. The gradient of `b2` is exactly 0: a softmax is invariant to a
    /// constant.
    pub weights: TargetWeights<F>,
}

/// Target attention.
pub trait TargetAttention: Memory {
    /// The batch as the target attention kernels read it. One plan serves both interests.
    type TargetPlan: Send;

    /// Creates the plan of a batch. The plan is valid after [`Memory::send`].
    fn target_plan(
        &self,
        staging: &mut Self::Staging,
        shape: TargetShape,
        index: TargetIndex<&[u32]>,
    ) -> Result<Self::TargetPlan, DeviceError>;

    /// Scores `e[pair, t] = MLP([a_t, r, a_t - r, a_t * r]) - slope (length - 1 - t)`, where
    /// `length` is that of the pair, and for each row `att[row] = sum over t of softmax_t(e[pair,
    /// t]) s_t` over its history.
    fn target_attention(
        &self,
        plan: &Self::TargetPlan,
        inputs: TargetInputs<&Floats<Self>>,
        weights: TargetWeights<&Floats<Self>>,
        state: TargetState<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// Gradients of [`TargetAttention::target_attention`] from `datt: [R, D]`.
    fn target_attention_backward(
        &self,
        plan: &Self::TargetPlan,
        inputs: TargetInputs<&Floats<Self>>,
        weights: TargetWeights<&Floats<Self>>,
        state: TargetState<&Floats<Self>>,
        datt: &Floats<Self>,
        gradients: TargetGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
