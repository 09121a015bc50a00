//! Factorization-heads attention: [`crate::attention`] on buffers of this device.

use super::{Cpu, CpuBuffer, Done, Floats, Indices};
use crate::attention::{FhaOptions, Gradients, Inputs, backward, forward};
use crate::device::{Attention, DeviceError, Memory, Qkv, QkvGradients, SoftmaxState};

/// The packed batch as [`forward`] and [`backward`] read it.
pub struct AttentionPlan {
    options: FhaOptions,
    cu_seqlens: Indices,
    label: CpuBuffer<u8>,
}

impl AttentionPlan {
    fn inputs<'a>(&'a self, qkv: Qkv<&'a Floats>) -> Inputs<'a> {
        let Qkv { q, k, v } = qkv;
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }
}

impl Attention for Cpu {
    type AttentionPlan = AttentionPlan;

    fn attention_plan(
        &self,
        (): &mut (),
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<AttentionPlan, DeviceError> {
        let (cu_seqlens, label) = (self.upload(cu_seqlens)?, self.upload(label)?);
        Ok(AttentionPlan { options: *options, cu_seqlens, label })
    }
    fn attention(&self, plan: &AttentionPlan, qkv: Qkv<&Floats>, state: SoftmaxState<&mut Floats>) -> Done {
        Ok(forward(&plan.options, plan.inputs(qkv), state.o, state.lse)?)
    }
    fn attention_backward(
        &self,
        plan: &AttentionPlan,
        qkv: Qkv<&Floats>,
        state: SoftmaxState<&Floats>,
        d_o: &Floats,
        gradients: QkvGradients<&mut Floats>,
    ) -> Done {
        let QkvGradients { dq, dk, dv } = gradients;
        let (SoftmaxState { o, lse }, gradients) = (state, Gradients { dq, dk, dv });
        Ok(backward(&plan.options, plan.inputs(qkv), o, lse, d_o, gradients)?)
    }
}
