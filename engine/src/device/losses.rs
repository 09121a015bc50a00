//! The losses and their gradients.

use super::{DeviceError, Floats, Memory, Slot};

/// One value for each interest.
#[derive(Clone, Copy, Debug)]
pub struct Interests<F> {
    /// Of the positive interest.
    pub positive: F,
    /// Of the negative interest.
    pub negative: F,
}

/// Losses of a batch. Each is a mean over rows, or 0 for a batch without rows.
pub trait Losses: Memory {
    /// Binary cross-entropy (BCE) of the positive logits and interest-wise BPR (IBL), without
    /// weights. BCE goes to `losses.index`, IBL to the next index. `gradients` is overwritten
    /// with the gradients of `bce + bpr * ibl`. Logits and `target` are `[R]`.
    fn rank_loss(
        &self,
        bpr: f32,
        logits: Interests<&Floats<Self>>,
        target: &Floats<Self>,
        gradients: Interests<&mut Floats<Self>>,
        losses: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;

    /// Mean over rows of the cosine between the vectors of the two interests, `[.., width]` each.
    /// Adds `weight` times the gradients to `gradients`. A row with a squared norm below 1e-12
    /// contributes a cosine and a gradient of 0.
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        vectors: Interests<&Floats<Self>>,
        gradients: Interests<&mut Floats<Self>>,
        loss: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
}
