//! One device buffer per parameter, and their use as arguments of operations.

use super::parameters::{self, Id, Layout, Norm, Spec};
use super::{HostTensor, ModelError};
use crate::device::{
    Activation, AdamRows, AdamTensor, Buffer, Device, DeviceError, Floats, Indices, LabelLinear, LayerNorm,
    LayerNormGradients, Linear, LinearGradients, Output, TargetWeights,
};
use std::ops::{Index, IndexMut};

/// One buffer per parameter, in the order of the layout: values, gradients or moments.
pub struct Tensors<D: Device>(Vec<Floats<D>>);

impl<D: Device> Tensors<D> {
    /// From one buffer per parameter.
    pub fn new(buffers: Vec<Floats<D>>) -> Self {
        Self(buffers)
    }

    /// Uploads one slice per parameter.
    pub fn upload<'a>(device: &D, values: impl IntoIterator<Item = &'a [f32]>) -> Result<Self, DeviceError> {
        Ok(Self(values.into_iter().map(|v| device.upload(v)).collect::<Result<_, _>>()?))
    }

    /// Zeros for each parameter.
    pub fn zeros(device: &D, specs: &[Spec]) -> Result<Self, DeviceError> {
        Ok(Self(specs.iter().map(|spec| device.zeros(spec.len())).collect::<Result<_, _>>()?))
    }

    /// Allocates all gradients except those of the embedding tables, which are computed by row and
    /// added later.
    pub fn gradients(device: &D, layout: &Layout) -> Result<Self, DeviceError> {
        let tables = [layout.item, layout.position, layout.label];
        let len = |id: Id| if tables.contains(&id) { 0 } else { layout.specs[id].len() };
        Ok(Self((0..layout.specs.len()).map(|id| device.alloc(len(id))).collect::<Result<_, _>>()?))
    }

    /// Mutable access to several parameters.
    pub fn several<const N: usize>(&mut self, ids: [Id; N]) -> [&mut Floats<D>; N] {
        self.0.get_disjoint_mut(ids).expect("the parameters should differ")
    }

    /// The parameters of a linear layer.
    pub fn linear(&self, ids: &parameters::Linear, activation: Activation) -> Linear<&Floats<D>> {
        let &parameters::Linear { w, b, inputs, outputs } = ids;
        Linear { w: &self[w], bias: Some(&self[b]), activation, inputs, outputs }
    }

    /// The parameters of a linear layer whose weight has one half for each label.
    pub fn label_linear<'a>(
        &'a self,
        ids: &parameters::Linear,
        tokens_by_label: [&'a Indices<D>; 2],
    ) -> LabelLinear<&'a Floats<D>, &'a Indices<D>> {
        let &parameters::Linear { w, b, inputs, outputs } = ids;
        LabelLinear { w: &self[w], bias: &self[b], tokens_by_label, inputs: inputs / 2, outputs }
    }

    /// The parameters of a layer norm.
    pub fn norm(&self, ids: &Norm, width: usize) -> LayerNorm<&Floats<D>> {
        LayerNorm { width, gamma: &self[ids.gamma], beta: &self[ids.beta] }
    }

    /// The parameters of a target attention MLP.
    pub fn target_weights(&self, [m0, m1, m2]: &[parameters::Linear; 3]) -> TargetWeights<&Floats<D>> {
        TargetWeights { w0: m0.w, b0: m0.b, w1: m1.w, b1: m1.b, w2: m2.w, b2: m2.b }.map(|id| &self[id])
    }

    /// Gradients of a linear layer: `dx`, and the parameters in place.
    pub fn linear_gradients<'a>(
        &'a mut self,
        ids: &parameters::Linear,
        dx: Output<&'a mut Floats<D>>,
    ) -> LinearGradients<&'a mut Floats<D>> {
        let [dw, dbias] = self.several([ids.w, ids.b]);
        LinearGradients { dx: Some(dx), dw, dbias: Some(dbias) }
    }

    /// Gradients of a layer norm: `dx`, and the parameters in place.
    pub fn norm_gradients<'a>(
        &'a mut self,
        ids: &Norm,
        dx: Output<&'a mut Floats<D>>,
    ) -> LayerNormGradients<&'a mut Floats<D>> {
        let [dgamma, dbeta] = self.several([ids.gamma, ids.beta]);
        LayerNormGradients { dx, dgamma, dbeta }
    }

    /// Gradients of a target attention MLP.
    pub fn target_gradients(
        &mut self,
        [m0, m1, m2]: &[parameters::Linear; 3],
    ) -> TargetWeights<&mut Floats<D>> {
        let [w0, b0, w1, b1, w2, b2] = self.several([m0.w, m0.b, m1.w, m1.b, m2.w, m2.b]);
        TargetWeights { w0, b0, w1, b1, w2, b2 }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Floats<D>> {
        self.0.iter()
    }

    /// All of them, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Floats<D>> {
        self.0.iter_mut()
    }

    /// Copies to the host. `prefix` is added to the names.
    pub fn download(&self, device: &D, specs: &[Spec], prefix: &str) -> Result<Vec<HostTensor>, ModelError> {
        let tensor = |(spec, buffer): (&Spec, &Floats<D>)| {
            let values = device.download(buffer)?;
            debug_assert_eq!(values.len(), buffer.len());
            Ok(HostTensor { name: format!("{prefix}{}", spec.name), shape: spec.shape.clone(), values })
        };
        specs.iter().zip(&self.0).map(tensor).collect()
    }
}

/// What Adam reads and updates of each parameter. `rows`: of an embedding table, the rows that have a
/// gradient; `None` for all.
pub fn adam_tensors<'a, D: Device>(
    values: &'a mut Tensors<D>,
    [first, second]: [&'a mut Tensors<D>; 2],
    gradients: &'a Tensors<D>,
    rows: Vec<Option<AdamRows<&'a Indices<D>>>>,
) -> Vec<AdamTensor<'a, Floats<D>, Indices<D>>> {
    let state = values.iter_mut().zip(first.iter_mut().zip(second.iter_mut()));
    state
        .zip(gradients.iter().zip(rows))
        .map(|((value, (first, second)), (gradient, rows))| AdamTensor {
            value,
            first,
            second,
            gradient,
            rows,
        })
        .collect()
}

impl<D: Device> Index<Id> for Tensors<D> {
    type Output = Floats<D>;
    fn index(&self, id: Id) -> &Self::Output {
        &self.0[id]
    }
}

impl<D: Device> IndexMut<Id> for Tensors<D> {
    fn index_mut(&mut self, id: Id) -> &mut Self::Output {
        &mut self.0[id]
    }
}
