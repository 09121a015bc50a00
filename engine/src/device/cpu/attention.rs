//! Factorization-heads attention: [`crate::attention`] on buffers of this device.

use super::product::Products;
use super::scratch::{carve, carved_len, with_scratch};
use super::{Cpu, CpuBuffer, Done, Floats, Indices, with_products};
use crate::attention::{FhaOptions, Gradients, Inputs, backward, forward};
use crate::device::{Attention, DeviceError, Memory, Qkv, QkvGradients, SoftmaxState};

/// The packed batch as [`forward`] and [`backward`] read it.
pub struct AttentionPlan {
    options: FhaOptions,
    cu_seqlens: Indices,
    label: CpuBuffer<u8>,
}

impl AttentionPlan {
    fn inputs<'a>(&'a self, [q, k, v]: [&'a [f32]; 3]) -> Inputs<'a> {
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }
}

/// Runs `f` on the factors of the products: tensors as they are, or rounded copies. Scores and
/// probabilities, the other factors, stay f32.
fn with_factors<P: Products, T, const N: usize>(
    products: P,
    tensors: [&[f32]; N],
    f: impl FnOnce([&[f32]; N]) -> T,
) -> T {
    if !P::ROUNDS {
        return f(tensors);
    }
    let lens = tensors.map(<[f32]>::len);
    with_scratch(carved_len(&lens), |mut memory| {
        let mut copies = carve(&mut memory, lens);
        copies.iter_mut().zip(tensors).for_each(|(copy, tensor)| products.round(tensor, copy));
        f(copies.map(|copy| &*copy))
    })
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
        let Qkv { q, k, v } = qkv;
        let run = |factors: [&[f32]; 3]| forward(&plan.options, plan.inputs(factors), state.o, state.lse);
        Ok(with_products!(self, |products| with_factors(products, [q, k, v], run))?)
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
        let (Qkv { q, k, v }, SoftmaxState { o, lse }) = (qkv, state);
        let run = |[q, k, v, d_o]: [&[f32]; 4]| {
            backward(&plan.options, plan.inputs([q, k, v]), o, lse, d_o, Gradients { dq, dk, dv })
        };
        Ok(with_products!(self, |products| with_factors(products, [q, k, v, d_o], run))?)
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::device::cpu::bf16::tests::bf16;

    /// Results of both passes.
    fn run(cpu: &Cpu, tensors: &[Vec<f32>; 4]) -> Vec<Vec<f32>> {
        let (options, cu_seqlens, label) =
            (FhaOptions::new(2, 8), [0, 5, 5, 12], [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1]);
        let plan = cpu.attention_plan(&mut (), &options, &cu_seqlens, &label).expect("there is memory");
        let [q, k, v, d_o] = tensors.each_ref().map(|x| cpu.upload(x).expect("there is memory"));
        let zeros = |n: usize| cpu.zeros::<f32>(n).expect("there is memory");
        let (mut o, mut lse) = (zeros(options.output_len(12)), zeros(options.lse_len(12)));
        let qkv = Qkv { q: &q, k: &k, v: &v };
        cpu.attention(&plan, qkv, SoftmaxState { o: &mut o, lse: &mut lse }).expect("arguments are valid");
        let [mut dq, mut dk, mut dv] = [zeros(192), zeros(192), zeros(192)];
        let gradients = QkvGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        cpu.attention_backward(&plan, qkv, SoftmaxState { o: &o, lse: &lse }, &d_o, gradients)
            .expect("arguments are valid");
        [o, lse, dq, dk, dv].map(|x| x.to_vec()).to_vec()
    }

    #[test]
    fn in_bf16_attention_reads_rounded_tensors() {
        let Some(bf16) = bf16() else { return };
        let tensors = [0.3f32, 0.7, 1.1, 0.9].map(|step| (0..192).map(|i| (i as f32 * step).sin()).collect());
        let rounded = tensors.each_ref().map(|x: &Vec<f32>| {
            let mut out = vec![0.0; x.len()];
            bf16.round(x, &mut out);
            out
        });
        let (narrow, wide) = (Cpu::bf16().expect("bf16 is available"), Cpu::new());
        assert!(run(&narrow, &tensors) == run(&wide, &rounded));
        assert!(run(&narrow, &tensors) != run(&wide, &tensors));
    }
}
