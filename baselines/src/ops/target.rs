//! Target attention of the device, with the parameters of its MLP.

use crate::system::{Context, Settings};
use crate::{Floats, Result, Tensors};
use dfar::device::cpu::Cpu;
use dfar::device::{
    Device, TargetCounts, TargetGradients, TargetIndex, TargetInputs, TargetShape, TargetState,
};
use dfar::model::parameters::{Linear, Names};

/// The MLP `[a, r, a - r, a * r] -> hidden -> hidden -> 1`.
pub struct Target {
    mlp: [Linear; 3],
    shape: TargetShape,
}

/// What the backward pass reads.
pub struct TargetPass<D: Device = Cpu> {
    plan: D::TargetPlan,
    counts: TargetCounts,
    e: Floats<D>,
    lse: Floats<D>,
}

/// Gradients of the inputs.
pub struct InputGradients<D: Device = Cpu> {
    /// `[N, D]` of the averaged tokens.
    pub ds: Floats<D>,
    /// `[N, D]` of the scored tokens.
    pub da: Floats<D>,
    /// `[C, D]` of the candidates.
    pub dr: Floats<D>,
}

impl Target {
    /// Names the layers `NAME.0`, `NAME.1`, `NAME.2`.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let Settings { width, attention, .. } = *settings;
        let mlp = names.mlp(name, 4 * width, attention);
        Self { mlp, shape: TargetShape { width, hidden: attention, half_life: 0.0 } }
    }

    /// Attends to `s`, scored by `a` and `r`. Returns the attended tokens `[R, D]`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward<D: Device>(
        &self,
        cx: Context<D>,
        index: TargetIndex<&[u32]>,
        inputs: TargetInputs<&Floats<D>>,
    ) -> Result<(Floats<D>, TargetPass<D>)> {
        let (device, counts) = (cx.device, index.counts());
        let plan = cx.staged(|staging| Ok(device.target_plan(staging, self.shape, index)?))?;
        let (mut e, mut lse) = (device.alloc(counts.scores)?, device.alloc(counts.rows)?);
        let mut att = device.alloc(counts.rows * cx.width)?;
        let state = TargetState { e: &mut e, lse: &mut lse, att: &mut att };
        device.target_attention(&plan, inputs, cx.p.target_weights(&self.mlp), state)?;
        Ok((att, TargetPass { plan, counts, e, lse }))
    }

    /// Gradients from `[att, d_att]`, the attended tokens and their gradients. Writes those of the
    /// parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward<D: Device>(
        &self,
        cx: Context<D>,
        inputs: TargetInputs<&Floats<D>>,
        pass: &TargetPass<D>,
        [att, d_att]: [&Floats<D>; 2],
        grads: &mut Tensors<D>,
    ) -> Result<InputGradients<D>> {
        let (device, TargetPass { plan, counts, e, lse }) = (cx.device, pass);
        let mut ds = device.zeros(counts.tokens * cx.width)?;
        let (mut da, mut dr) =
            (device.alloc(counts.tokens * cx.width)?, device.alloc(counts.pairs * cx.width)?);
        let weights = grads.target_gradients(&self.mlp);
        let gradients = TargetGradients { ds: &mut ds, da: &mut da, dr: &mut dr, weights };
        let state = TargetState { e, lse, att };
        let weights = cx.p.target_weights(&self.mlp);
        device.target_attention_backward(plan, inputs, weights, state, d_att, gradients)?;
        Ok(InputGradients { ds, da, dr })
    }
}
