//! Target attention of the device, with the parameters of its MLP.

use crate::parameters::Names;
use crate::system::{Context, Settings};
use crate::{Floats, Result, Tensors};
use dfar::device::cpu::Cpu;
use dfar::device::{
    Memory, TargetAttention, TargetCounts, TargetGradients, TargetIndex, TargetInputs, TargetShape,
    TargetState,
};
use dfar::model::parameters::Linear;

/// The MLP `[a, r, a - r, a * r] -> hidden -> hidden -> 1`.
pub struct Target {
    mlp: [Linear; 3],
    shape: TargetShape,
}

/// What the backward pass reads.
pub struct TargetPass {
    plan: <Cpu as TargetAttention>::TargetPlan,
    counts: TargetCounts,
    e: Floats,
    lse: Floats,
    /// `[R, D]` attended tokens of each row.
    pub att: Floats,
}

/// Gradients of the inputs.
pub struct InputGradients {
    /// `[N, D]` of the averaged tokens.
    pub ds: Floats,
    /// `[N, D]` of the scored tokens.
    pub da: Floats,
    /// `[C, D]` of the candidates.
    pub dr: Floats,
}

impl Target {
    /// Names the layers `NAME.0`, `NAME.1`, `NAME.2`.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let Settings { width, attention, .. } = *settings;
        let mlp = names.mlp(name, 4 * width, attention);
        Self { mlp, shape: TargetShape { width, hidden: attention, half_life: 0.0 } }
    }

    /// Attends to `s`, scored by `a` and `r`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward(
        &self,
        cx: Context,
        index: TargetIndex<&[u32]>,
        inputs: TargetInputs<&Floats>,
    ) -> Result<TargetPass> {
        let (device, counts) = (cx.device, index.counts());
        let plan = device.target_plan(&mut (), self.shape, index)?;
        let (mut e, mut lse) = (device.alloc(counts.scores)?, device.alloc(counts.rows)?);
        let mut att = device.alloc(counts.rows * cx.width)?;
        let state = TargetState { e: &mut e, lse: &mut lse, att: &mut att };
        device.target_attention(&plan, inputs, cx.p.target_weights(&self.mlp), state)?;
        Ok(TargetPass { plan, counts, e, lse, att })
    }

    /// Gradients from those of the attended tokens. Writes those of the parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        inputs: TargetInputs<&Floats>,
        pass: &TargetPass,
        d_att: &Floats,
        grads: &mut Tensors,
    ) -> Result<InputGradients> {
        let (device, TargetPass { plan, counts, e, lse, att }) = (cx.device, pass);
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
