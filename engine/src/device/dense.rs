//! Linear layers.

use super::{DeviceError, Floats, Indices, Memory, Output};

/// Activation of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `y = x`
    None,
    /// `y = max(x, 0)`
    Relu,
}

/// A linear layer: `y = activation(x w + bias)`.
#[derive(Clone, Copy, Debug)]
pub struct Linear<F> {
    /// `[inputs, outputs]`
    pub w: F,
    /// `[outputs]`
    pub bias: Option<F>,
    /// Applied to `x w + bias`.
    pub activation: Activation,
    /// Width of `x`.
    pub inputs: usize,
    /// Width of `y`.
    pub outputs: usize,
}

/// Gradients of a [`Linear`] layer.
#[derive(Debug)]
pub struct LinearGradients<F> {
    /// `[n, inputs]`; `None` to skip it.
    pub dx: Option<Output<F>>,
    /// `[inputs, outputs]`
    pub dw: F,
    /// `[outputs]`; `None` for a layer without bias.
    pub dbias: Option<F>,
}

/// A linear layer whose weight depends on the label of the row: row `n` is multiplied by half
/// `label[n]` of `w`. It is the output projection of compact FHA.
#[derive(Clone, Copy, Debug)]
pub struct LabelLinear<F, U> {
    /// `[2 * inputs, outputs]`, the half of label 0 first.
    pub w: F,
    /// `[outputs]`
    pub bias: F,
    /// The rows of each label, ascending.
    pub tokens_by_label: [U; 2],
    /// Width of `x`.
    pub inputs: usize,
    /// Width of `y`.
    pub outputs: usize,
}

/// Gradients of a [`LabelLinear`] layer, all overwritten.
#[derive(Debug)]
pub struct LabelLinearGradients<F> {
    /// `[n, inputs]`
    pub dx: F,
    /// `[2 * inputs, outputs]`
    pub dw: F,
    /// `[outputs]`
    pub dbias: F,
}

/// Linear layers.
pub trait Dense: Memory {
    /// Applies a layer to `x: [n, inputs]`; `y: [n, outputs]`.
    fn linear(
        &self,
        layer: Linear<&Floats<Self>>,
        x: &Floats<Self>,
        y: Output<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// Gradients of [`Dense::linear`] from `dy`. With an activation, `dy` may be multiplied in place
    /// by its derivative, which follows from `y`.
    fn linear_backward(
        &self,
        layer: Linear<&Floats<Self>>,
        x: &Floats<Self>,
        y: &Floats<Self>,
        dy: &mut Floats<Self>,
        gradients: LinearGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// Applies a layer with one weight per label to `x: [n, inputs]`; `y: [n, outputs]`.
    fn label_linear(
        &self,
        layer: LabelLinear<&Floats<Self>, &Indices<Self>>,
        x: &Floats<Self>,
        y: Output<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// Gradients of [`Dense::label_linear`] from `dy`.
    fn label_linear_backward(
        &self,
        layer: LabelLinear<&Floats<Self>, &Indices<Self>>,
        x: &Floats<Self>,
        dy: &Floats<Self>,
        gradients: LabelLinearGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
