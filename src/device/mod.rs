//! The operations a model needs, on buffers a device owns. Nothing above this trait knows which device it has.
//!
//! Matrices are row-major and packed; a matrix argument is a buffer whose row count follows from its length and
//! the width named beside it. Operations on one device run in the order they are called. Two rules hold for every
//! backward operation: gradients of parameters are **overwritten**, gradients of activations are overwritten or
//! added to as the [`Store`] beside them says.

pub mod cpu;
pub mod cuda;

use crate::attention::FhaOptions;
use thiserror::Error;

/// A number that can live in a device buffer.
pub trait Element: bytemuck::Pod + Send + Sync {}
impl Element for f32 {}
impl Element for u32 {}
impl Element for u8 {}
impl Element for f64 {}

/// Memory owned by a device. Dropping it returns the memory to the device's pool.
pub trait Buffer<T>: Send {
    /// Number of values.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What an operation does with what its output already holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Replaces it.
    Overwrite,
    /// Adds to it.
    Add,
}

/// Nonlinearity at the end of [`Device::linear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `y = x`
    None,
    /// `y = max(x, 0)`
    Relu,
}

/// A device that failed or refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The attention operation refused its arguments.
    #[error(transparent)]
    Attention(#[from] crate::attention::AttentionError),
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] cuda::CudaError),
}

/// Rows that refer to rows, as compressed sparse rows: the members of row `i` are
/// `members[offsets[i]..offsets[i + 1]]`.
pub struct Segments<'a, U: ?Sized> {
    /// `[rows + 1]`
    pub offsets: &'a U,
    /// `[offsets[rows]]`
    pub members: &'a U,
}

/// Which (candidate, history token) pairs target attention scores, and which rows read them.
///
/// A *pair list entry* is a distinct (sequence, candidate item) with the longest prefix of the sequence it is
/// scored against; a *row* is an instance: a pair and the prefix its history has. Scores do not depend on the
/// prefix, so they are computed once a pair and normalised once a row.
pub struct TargetIndex<'a, U: ?Sized> {
    /// `[B + 1]` tokens of each sequence.
    pub cu_seqlens: &'a U,
    /// `[B + 1]` pairs of each sequence: `pair_offsets[b]..pair_offsets[b + 1]`.
    pub pair_offsets: &'a U,
    /// `[C + 1]` prefix sums of the pairs' lengths: where a pair's scores lie in `e`.
    pub score_offsets: &'a U,
    /// `[C + 1]`, `[R]` the rows of each pair.
    pub rows: Segments<'a, U>,
    /// `[R]` history length of each row, at most the length of its pair; may be 0.
    pub row_length: &'a U,
}

/// How many there are of what a [`TargetIndex`] is about.
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

impl TargetIndex<'_, [u32]> {
    /// Its counts.
    ///
    /// # Panics
    /// Where its arrays do not fit each other.
    pub fn counts(&self) -> TargetCounts {
        let last = |offsets: &[u32]| *offsets.last().expect("offsets start with 0") as usize;
        let ascending = |offsets: &[u32]| offsets[0] == 0 && offsets.is_sorted();
        let pairs = self.score_offsets.len() - 1;
        let offsets = [self.cu_seqlens, self.pair_offsets, self.score_offsets, self.rows.offsets];
        assert!(offsets.into_iter().all(ascending), "offsets must ascend from 0");
        assert_eq!(self.pair_offsets.len(), self.cu_seqlens.len(), "pair_offsets is not [B + 1]");
        assert_eq!(last(self.pair_offsets), pairs, "score_offsets is not [C + 1]");
        assert_eq!(self.rows.offsets.len(), pairs + 1, "offsets of rows are not [C + 1]");
        assert_eq!(last(self.rows.offsets), self.rows.members.len(), "members of rows are not [R]");
        assert_eq!(self.row_length.len(), self.rows.members.len(), "row_length is not [R]");
        TargetCounts {
            tokens: last(self.cu_seqlens),
            pairs,
            scores: last(self.score_offsets),
            rows: self.row_length.len(),
        }
    }

    /// Scores of a pair.
    pub fn pair_length(&self, pair: usize) -> u32 {
        self.score_offsets[pair + 1] - self.score_offsets[pair]
    }
}

/// The multilayer perceptron that scores a (token, candidate) pair: `4D -> hidden[0] -> hidden[1] -> 1`.
/// Weights are `[in, out]`, as everywhere.
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

/// Where a number is left on the device: a value of a buffer of them, which comes to the host in one piece when it is needed.
pub struct Slot<'a, F> {
    /// The buffer.
    pub values: &'a mut F,
    /// Which value.
    pub index: usize,
}

/// One tensor and its optimiser state, for [`Device::adam`].
pub struct AdamTensor<'a, F, U> {
    /// Values, updated.
    pub value: &'a mut F,
    /// First moment, updated.
    pub first: &'a mut F,
    /// Second moment, updated.
    pub second: &'a mut F,
    /// Gradient: as long as `value`, or `[rows.len(), width]` when only some rows have one.
    pub gradient: &'a F,
    /// The rows that have a gradient and their width; the others are left untouched (lazy Adam).
    pub rows: Option<(&'a U, usize)>,
}

/// Limit on gradient norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// Each tensor's gradient is scaled to at most this norm.
    PerTensor(f32),
    /// All gradients together are scaled to at most this norm.
    Global(f32),
}

/// Numbers of one Adam step.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Steps taken, this one included: 1 on the first.
    pub step: u64,
    /// Gradient clipping before the update.
    pub clip: Option<Clip>,
}

/// Operations on buffers. `N` tokens, `D` the width, `R` rows (instances), `C` pairs, `G` groups.
pub trait Device: Send + Sync {
    /// Memory of this device.
    type Buffer<T: Element>: Buffer<T>;
    /// Arrays on their way to the device together: see [`Device::stage`].
    type Staging: Send;
    /// What attention needs to know of a batch; made once a batch, used by every block.
    type AttentionPlan: Send;
    /// What target attention needs to know of a batch; made once a batch, used by both interests.
    type TargetPlan: Send;
    /// A moment in the course of its work.
    type Mark: Send;

    /// What it is, for logs, e.g. `cpu (avx512, 2 threads)`.
    fn name(&self) -> String;
    /// Threads that draw and pack batches ahead of its work, where nobody asked for another number: a few, as long as the
    /// processor has nothing better to do.
    fn default_workers(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |cores| (cores.get() - 1).clamp(1, 4))
    }

    // ---------------------------------------------------------------- time
    /// Marks the moment when all that was asked for so far is done.
    fn mark(&self) -> Result<Self::Mark, DeviceError>;
    /// Seconds between two moments; waits for the later one.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, DeviceError>;

    /// Does `work`. A device may record what it asks for and start all of it in one piece, if that is possible; if not, `work` is
    /// run again. So it may only compute: from buffers that were there before to new ones.
    fn captured<T>(&self, mut work: impl FnMut() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        work()
    }

    // ---------------------------------------------------------------- memory
    /// Whether `copies` values of f32 for each of `parameters` will fit, before any is allocated.
    ///
    /// # Errors
    /// The device's, with the numbers.
    fn check_room(&self, parameters: usize, copies: usize) -> Result<(), DeviceError> {
        let _ = (parameters, copies);
        Ok(())
    }
    /// `len` values, each initialised to something unspecified.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, DeviceError>;
    /// `len` zeros.
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>, DeviceError>;
    /// A copy of `host` on the device.
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>, DeviceError>;
    /// Begins a staging, with nothing in it. Any thread may fill one while the device works.
    fn staging(&self) -> Result<Self::Staging, DeviceError>;
    /// A copy of `host`, to be used once the staging was sent.
    fn stage<T: Element>(
        &self,
        staging: &mut Self::Staging,
        host: &[T],
    ) -> Result<Self::Buffer<T>, DeviceError>;
    /// Sends all that was staged, in one copy, for which nothing waits that was asked for before.
    fn send(&self, staging: Self::Staging) -> Result<(), DeviceError>;
    /// A copy of `buffer` on the host.
    fn download<T: Element>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>, DeviceError>;

    // ---------------------------------------------------------------- rows
    /// `y[n] = sum over (table, index) of table[index[n]]`. Tables `[.., width]`, `y: [N, width]`.
    fn gather_sum(
        &self,
        width: usize,
        tables: &[(&Self::Buffer<f32>, &Self::Buffer<u32>)],
        y: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// `y[index[n]] += x[n]`; no index may occur twice.
    fn scatter_add(
        &self,
        width: usize,
        x: &Self::Buffer<f32>,
        index: &Self::Buffer<u32>,
        y: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// `y[i] = l2 * table[row[i]] + sum of the members of segment i`, a member being a row of the stacked
    /// `sources` (member `m` is row `m` of the first source, or row `m - rows(first)` of the second, ...).
    fn segment_sum(
        &self,
        width: usize,
        sources: &[&Self::Buffer<f32>],
        segments: Segments<Self::Buffer<u32>>,
        l2: f32,
        table: &Self::Buffer<f32>,
        row: &Self::Buffer<u32>,
        y: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// Half the sum of squares of the rows `row` of `table`, each counted once, written to `sum`.
    fn half_square_sum(
        &self,
        width: usize,
        table: &Self::Buffer<f32>,
        row: &Self::Buffer<u32>,
        sum: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
    /// `y += x`
    fn add(&self, x: &Self::Buffer<f32>, y: &mut Self::Buffer<f32>) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- layer norm
    /// `y = gamma * (x - mean) / sqrt(variance + 1e-8) + beta` over rows of `width` (population variance).
    fn layer_norm(
        &self,
        width: usize,
        x: &Self::Buffer<f32>,
        gamma: &Self::Buffer<f32>,
        beta: &Self::Buffer<f32>,
        y: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// [`Device::gather_sum`] to `y`, and the layer norm of `y` to `n`.
    fn gather_layer_norm(
        &self,
        width: usize,
        tables: &[(&Self::Buffer<f32>, &Self::Buffer<u32>)],
        gamma: &Self::Buffer<f32>,
        beta: &Self::Buffer<f32>,
        y: &mut Self::Buffer<f32>,
        n: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError> {
        self.gather_sum(width, tables, y)?;
        self.layer_norm(width, y, gamma, beta, n)
    }
    /// `y += x`, and the layer norm of `y` to `n`.
    fn add_layer_norm(
        &self,
        width: usize,
        x: &Self::Buffer<f32>,
        gamma: &Self::Buffer<f32>,
        beta: &Self::Buffer<f32>,
        y: &mut Self::Buffer<f32>,
        n: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError> {
        self.add(x, y)?;
        self.layer_norm(width, y, gamma, beta, n)
    }
    /// Gradients of [`Device::layer_norm`]; the row statistics are recomputed from `x`.
    fn layer_norm_backward(
        &self,
        width: usize,
        x: &Self::Buffer<f32>,
        gamma: &Self::Buffer<f32>,
        dy: &Self::Buffer<f32>,
        dx: (&mut Self::Buffer<f32>, Store),
        dgamma: &mut Self::Buffer<f32>,
        dbeta: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- linear
    /// `y = activation(x w + bias)`; `x: [n, inputs]`, `w: [inputs, outputs]`, `bias: [outputs]`, `y: [n, outputs]`.
    fn linear(
        &self,
        x: &Self::Buffer<f32>,
        w: &Self::Buffer<f32>,
        bias: Option<&Self::Buffer<f32>>,
        activation: Activation,
        y: (&mut Self::Buffer<f32>, Store),
        widths: (usize, usize),
    ) -> Result<(), DeviceError>;
    /// Gradients of [`Device::linear`]. `dy` is the gradient of `y` and is multiplied in place by the derivative of
    /// the activation (read off `y`) when there is one.
    fn linear_backward(
        &self,
        x: &Self::Buffer<f32>,
        w: &Self::Buffer<f32>,
        activation: Activation,
        y: &Self::Buffer<f32>,
        dy: &mut Self::Buffer<f32>,
        dx: Option<(&mut Self::Buffer<f32>, Store)>,
        dw: &mut Self::Buffer<f32>,
        dbias: Option<&mut Self::Buffer<f32>>,
        widths: (usize, usize),
    ) -> Result<(), DeviceError>;
    /// [`Device::linear`] where row `n` uses the half `label[n]` of a weight `[2 * inputs, outputs]`: the output
    /// projection of compact FHA. `tokens_by_label[f]` lists the rows of label `f` in order.
    fn label_linear(
        &self,
        x: &Self::Buffer<f32>,
        w: &Self::Buffer<f32>,
        bias: &Self::Buffer<f32>,
        tokens_by_label: [&Self::Buffer<u32>; 2],
        y: (&mut Self::Buffer<f32>, Store),
        widths: (usize, usize),
    ) -> Result<(), DeviceError>;
    /// Gradients of [`Device::label_linear`].
    fn label_linear_backward(
        &self,
        x: &Self::Buffer<f32>,
        w: &Self::Buffer<f32>,
        tokens_by_label: [&Self::Buffer<u32>; 2],
        dy: &Self::Buffer<f32>,
        dx: &mut Self::Buffer<f32>,
        dw: &mut Self::Buffer<f32>,
        dbias: &mut Self::Buffer<f32>,
        widths: (usize, usize),
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- attention
    /// Makes the plan of a batch: `cu_seqlens: [B + 1]`, `label: [N]` as [`crate::attention::Inputs`] has them. To be used
    /// once the staging was sent.
    fn attention_plan(
        &self,
        staging: &mut Self::Staging,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<Self::AttentionPlan, DeviceError>;
    /// [`crate::attention::forward`] on device buffers.
    fn attention(
        &self,
        plan: &Self::AttentionPlan,
        q: &Self::Buffer<f32>,
        k: &Self::Buffer<f32>,
        v: &Self::Buffer<f32>,
        o: &mut Self::Buffer<f32>,
        lse: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// [`crate::attention::backward`] on device buffers.
    fn attention_backward(
        &self,
        plan: &Self::AttentionPlan,
        q: &Self::Buffer<f32>,
        k: &Self::Buffer<f32>,
        v: &Self::Buffer<f32>,
        o: &Self::Buffer<f32>,
        lse: &Self::Buffer<f32>,
        d_o: &Self::Buffer<f32>,
        dq: &mut Self::Buffer<f32>,
        dk: &mut Self::Buffer<f32>,
        dv: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- prefix means
    /// `mean[g] = (1 / divisor[g]) * sum of x[start[b]..start[b] + count[g]]` for the groups `g` of sequence `b`
    /// (`group_offsets[b]..group_offsets[b + 1]`, counts ascending inside a sequence); 0 where the divisor is 0.
    /// `x: [.., width]`, `mean: [G, width]`.
    fn prefix_mean(
        &self,
        width: usize,
        x: &Self::Buffer<f32>,
        start: &Self::Buffer<u32>,
        group_offsets: &Self::Buffer<u32>,
        count: &Self::Buffer<u32>,
        divisor: &Self::Buffer<u32>,
        mean: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// `dx` of [`Device::prefix_mean`], overwritten everywhere.
    fn prefix_mean_backward(
        &self,
        width: usize,
        start: &Self::Buffer<u32>,
        group_offsets: &Self::Buffer<u32>,
        count: &Self::Buffer<u32>,
        divisor: &Self::Buffer<u32>,
        dmean: &Self::Buffer<f32>,
        dx: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- target attention
    /// Makes the plan of a batch, for tokens of `width` and a perceptron of these hidden widths. To be used once the staging
    /// was sent.
    fn target_plan(
        &self,
        staging: &mut Self::Staging,
        width: usize,
        hidden: [usize; 2],
        index: TargetIndex<[u32]>,
    ) -> Result<Self::TargetPlan, DeviceError>;
    /// Scores `e: [score_offsets[C]]` with `e[pair, t] = MLP([a_t, r, a_t - r, a_t * r])`, and for every row
    /// `att[row] = sum_t softmax_t(e[pair, t]) s_t` over its history (0 where that is empty), `lse: [R]`.
    /// `s, a: [N, D]`, `r: [C, D]`, `att: [R, D]`.
    fn target_attention(
        &self,
        plan: &Self::TargetPlan,
        s: &Self::Buffer<f32>,
        a: &Self::Buffer<f32>,
        r: &Self::Buffer<f32>,
        weights: TargetWeights<&Self::Buffer<f32>>,
        e: &mut Self::Buffer<f32>,
        lse: &mut Self::Buffer<f32>,
        att: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// Gradients of [`Device::target_attention`] from `datt: [R, D]`: `ds` added to, `da`, `dr` and the weights'
    /// overwritten. The gradient of `b2` is exactly 0 (a softmax does not see a constant) and is written so.
    fn target_attention_backward(
        &self,
        plan: &Self::TargetPlan,
        s: &Self::Buffer<f32>,
        a: &Self::Buffer<f32>,
        r: &Self::Buffer<f32>,
        weights: TargetWeights<&Self::Buffer<f32>>,
        e: &Self::Buffer<f32>,
        lse: &Self::Buffer<f32>,
        att: &Self::Buffer<f32>,
        datt: &Self::Buffer<f32>,
        ds: &mut Self::Buffer<f32>,
        da: &mut Self::Buffer<f32>,
        dr: &mut Self::Buffer<f32>,
        gradients: TargetWeights<&mut Self::Buffer<f32>>,
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- towers and loss
    /// `y[row] = [part_0[index_0[row]], part_1[index_1[row]], ...]`, each part `[.., width]`; no index means the row itself.
    fn concat(
        &self,
        width: usize,
        parts: &[(&Self::Buffer<f32>, Option<&Self::Buffer<u32>>)],
        y: &mut Self::Buffer<f32>,
    ) -> Result<(), DeviceError>;
    /// One part of the gradient of [`Device::concat`]: `dx[i] = sum over the rows of segment i of dy[row, part]`
    /// (segments `None`: row `i` itself). `dy: [rows, parts * width]`.
    fn concat_backward(
        &self,
        width: usize,
        part: usize,
        parts: usize,
        dy: &Self::Buffer<f32>,
        segments: Option<Segments<Self::Buffer<u32>>>,
        dx: (&mut Self::Buffer<f32>, Store),
    ) -> Result<(), DeviceError>;
    /// BCE and IBL over rows and their gradients: `logit_pos, logit_neg, target: [R]` to the unweighted means, BCE in the
    /// slot and IBL in the one behind it (0 without rows); `d_pos`, `d_neg` are gradients of `bce + bpr * ibl`.
    fn rank_loss(
        &self,
        bpr: f32,
        logit_pos: &Self::Buffer<f32>,
        logit_neg: &Self::Buffer<f32>,
        target: &Self::Buffer<f32>,
        d_pos: &mut Self::Buffer<f32>,
        d_neg: &mut Self::Buffer<f32>,
        losses: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
    /// Mean over rows of `cos(x, y)` (0 with zero gradient where a squared norm is under 1e-12; 0 without rows), and
    /// `weight` times its gradients, added to `dx` and `dy`.
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        x: &Self::Buffer<f32>,
        y: &Self::Buffer<f32>,
        dx: &mut Self::Buffer<f32>,
        dy: &mut Self::Buffer<f32>,
        loss: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;

    // ---------------------------------------------------------------- optimiser
    /// Clips every gradient and takes one Adam step on all tensors. The norm of all gradients before clipping goes to
    /// `norm`; when it, or any value before it (the step's losses), is not finite, nothing is updated.
    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Self::Buffer<f32>, Self::Buffer<u32>>],
        norm: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
}
