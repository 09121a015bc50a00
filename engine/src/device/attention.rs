//! Factorization-heads attention on device buffers. Shapes and semantics: [`crate::attention`].

use super::{DeviceError, Floats, Memory};
use crate::attention::FhaOptions;

/// Queries, keys and values, `[N, H, d]` each.
#[derive(Clone, Copy, Debug)]
pub struct Qkv<F> {
    /// Queries.
    pub q: F,
    /// Keys.
    pub k: F,
    /// Values.
    pub v: F,
}

/// Gradients with respect to [`Qkv`], `[N, H, d]` each, overwritten.
#[derive(Debug)]
pub struct QkvGradients<F> {
    /// Of the queries.
    pub dq: F,
    /// Of the keys.
    pub dk: F,
    /// Of the values.
    pub dv: F,
}

/// The result of the forward pass, which the backward pass reads.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxState<F> {
    /// `[N, Q, K, d]` output.
    pub o: F,
    /// `[N, Q]` logarithm of the softmax denominators.
    pub lse: F,
}

/// Factorization-heads attention.
pub trait Attention: Memory {
    /// The batch as the attention kernels read it. One plan serves all blocks of the batch.
    type AttentionPlan: Send;

    /// Creates the plan of a batch from `cu_seqlens: [B + 1]` and `label: [N]`, as in
    /// [`crate::attention::Inputs`]. The plan is valid after [`Memory::send`].
    fn attention_plan(
        &self,
        staging: &mut Self::Staging,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<Self::AttentionPlan, DeviceError>;

    /// [`crate::attention::forward`].
    fn attention(
        &self,
        plan: &Self::AttentionPlan,
        qkv: Qkv<&Floats<Self>>,
        state: SoftmaxState<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// [`crate::attention::backward`].
    fn attention_backward(
        &self,
        plan: &Self::AttentionPlan,
        qkv: Qkv<&Floats<Self>>,
        state: SoftmaxState<&Floats<Self>>,
        d_o: &Floats<Self>,
        gradients: QkvGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
