//! Linear layers and layer norm on buffers; the computation is in `linear` and `layer_norm`.

use super::slices::Slices;
use super::{Cpu, Done, Floats, Indices, layer_norm, linear};
use crate::device::{
    Dense, LabelLinear, LabelLinearGradients, LayerNorm, LayerNormGradients, Linear, LinearGradients, Output,
};

impl Dense for Cpu {
    fn linear(&self, layer: Linear<&Floats>, x: &Floats, y: Output<&mut Floats>) -> Done {
        linear::forward(layer.slices(), x, y.slices());
        Ok(())
    }
    fn linear_backward(
        &self,
        layer: Linear<&Floats>,
        x: &Floats,
        y: &Floats,
        dy: &mut Floats,
        gradients: LinearGradients<&mut Floats>,
    ) -> Done {
        linear::backward(layer.slices(), x, y, dy, gradients.slices());
        Ok(())
    }
    fn label_linear(
        &self,
        layer: LabelLinear<&Floats, &Indices>,
        x: &Floats,
        y: Output<&mut Floats>,
    ) -> Done {
        linear::label_forward(layer.slices(), x, y.slices());
        Ok(())
    }
    fn label_linear_backward(
        &self,
        layer: LabelLinear<&Floats, &Indices>,
        x: &Floats,
        dy: &Floats,
        gradients: LabelLinearGradients<&mut Floats>,
    ) -> Done {
        linear::label_backward(layer.slices(), x, dy, gradients.slices());
        Ok(())
    }

    fn layer_norm(&self, norm: LayerNorm<&Floats>, x: &Floats, y: &mut Floats) -> Done {
        layer_norm::forward(norm.slices(), x, y);
        Ok(())
    }
    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats>,
        x: &Floats,
        dy: &Floats,
        gradients: LayerNormGradients<&mut Floats>,
    ) -> Done {
        layer_norm::backward(norm.slices(), x, dy, gradients.slices());
        Ok(())
    }
}
