//! Gradient clipping and Adam.

use super::{DeviceError, Floats, Indices, Memory, Slot};

/// Gradient clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Clip {
    /// Scales the gradient of each tensor to at most this norm.
    PerTensor(f32),
    /// Scales all gradients together to at most this norm.
    Global(f32),
}

/// Hyperparameters of one Adam step.
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
    /// Number of this step, from 1.
    pub step: u64,
    /// Gradient clipping before the update.
    pub clip: Option<Clip>,
}

/// A tensor with its optimizer state and gradient.
pub struct AdamTensor<'a, F: ?Sized, U: ?Sized> {
    /// Values, updated.
    pub value: &'a mut F,
    /// First moment, updated.
    pub first: &'a mut F,
    /// Second moment, updated.
    pub second: &'a mut F,
    /// Gradient: as long as `value`, or `[rows, width]` with `rows`.
    pub gradient: &'a F,
    /// The rows that have a gradient (lazy Adam); `None` for all. Other rows and their moments do
    /// not change.
    pub rows: Option<AdamRows<&'a U>>,
}

/// Rows of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct AdamRows<U> {
    /// Row numbers.
    pub index: U,
    /// Values of a row.
    pub width: usize,
}

/// The optimizer.
pub trait Optimizer: Memory {
    /// Clips all gradients and takes one Adam step on all tensors. Writes the norm of all gradients
    /// before clipping to `norm`.
    ///
    /// Refuses the step if the norm, or any value before it in its buffer (the losses of the step),
    /// is non-finite: no tensor changes, and the norm becomes NaN. `previous` is the buffer of the
    /// norm of the step before, at the same position. If that norm is non-finite, this step is
    /// refused too, so that no step in flight follows a refused one.
    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Floats<Self>, Indices<Self>>],
        norm: Slot<Self::Buffer<f64>>,
        previous: Option<&Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
}
