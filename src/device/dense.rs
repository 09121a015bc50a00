//! Linear layers and layer norm.

use super::{DeviceError, Floats, Indices, Lookup, Output, Rows};

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

/// A linear layer whose weight depends on the label of the row: row `n` is multiplied by half `label[n]` of `w`. It is
/// the output projection of compact FHA.
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

/// A layer norm over rows: `y = gamma * (x - mean) / sqrt(variance + 1e-8) + beta`, with the population variance.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<F> {
    /// Width of a row.
    pub width: usize,
    /// `[width]`
    pub gamma: F,
    /// `[width]`
    pub beta: F,
}

/// Gradients of a [`LayerNorm`].
#[derive(Debug)]
pub struct LayerNormGradients<F> {
    /// `[n, width]`
    pub dx: Output<F>,
    /// `[width]`
    pub dgamma: F,
    /// `[width]`
    pub dbeta: F,
}

/// Dense layers.
pub trait Dense: Rows {
    /// Applies a layer to `x: [n, inputs]`; `y: [n, outputs]`.
    fn linear(
        &self,
        layer: Linear<&Floats<Self>>,
        x: &Floats<Self>,
        y: Output<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;

    /// Gradients of [`Dense::linear`] from `dy`. With an activation, `dy` is multiplied in place by its derivative,
    /// which follows from `y`.
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

    /// Normalises the rows of `x` to `y`.
    fn layer_norm(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        x: &Floats<Self>,
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// [`Rows::gather_sum`] to `y`, and the layer norm of `y` to `n`.
    fn gather_layer_norm(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        tables: &[Lookup<&Floats<Self>, &Indices<Self>>],
        y: &mut Floats<Self>,
        n: &mut Floats<Self>,
    ) -> Result<(), DeviceError> {
        self.gather_sum(norm.width, tables, y)?;
        self.layer_norm(norm, y, n)
    }

    /// `y += x`, and the layer norm of `y` to `n`.
    fn add_layer_norm(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        x: &Floats<Self>,
        y: &mut Floats<Self>,
        n: &mut Floats<Self>,
    ) -> Result<(), DeviceError> {
        self.add(x, y)?;
        self.layer_norm(norm, y, n)
    }

    /// Gradients of [`Dense::layer_norm`] from `dy`. Mean and variance are recomputed from `x`.
    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        x: &Floats<Self>,
        dy: &Floats<Self>,
        gradients: LayerNormGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
