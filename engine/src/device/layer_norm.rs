//! Layer norm, alone and fused with the preceding operation.

use super::{DeviceError, Embedding, Floats, Indices, Lookup, Output, Rows};

/// A layer norm over rows: `y = gamma * (x - mean) / sqrt(variance + 1e-8) + beta`, with the
/// population variance.
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

/// Layer norm.
pub trait Norm: Embedding + Rows {
    /// Normalizes the rows of `x` to `y`.
    fn layer_norm(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        x: &Floats<Self>,
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// [`Embedding::gather_sum`] to `y`, and the layer norm of `y` to `n`.
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

    /// Gradients of [`Norm::layer_norm`] from `dy`. Mean and variance are recomputed from `x`.
    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats<Self>>,
        x: &Floats<Self>,
        dy: &Floats<Self>,
        gradients: LayerNormGradients<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
