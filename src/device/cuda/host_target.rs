//! Target attention, which has no kernel yet: the CPU engine, on copies. Right, and slow: each call waits for the device, and
//! copies both ways. Every other operation stays on the device.

use super::CudaError;
use super::runtime::{Array, Runtime};
use crate::device::cpu::target_attention;
use crate::device::{Segments, TargetIndex, TargetWeights};

/// What a batch's index says, on the host.
pub struct TargetPlan {
    width: usize,
    hidden: [usize; 2],
    cu_seqlens: Vec<u32>,
    pair_offsets: Vec<u32>,
    score_offsets: Vec<u32>,
    row_offsets: Vec<u32>,
    row_members: Vec<u32>,
    row_length: Vec<u32>,
}

impl TargetPlan {
    pub(super) fn new(width: usize, hidden: [usize; 2], index: TargetIndex<[u32]>) -> Self {
        Self {
            width,
            hidden,
            cu_seqlens: index.cu_seqlens.to_vec(),
            pair_offsets: index.pair_offsets.to_vec(),
            score_offsets: index.score_offsets.to_vec(),
            row_offsets: index.rows.offsets.to_vec(),
            row_members: index.rows.members.to_vec(),
            row_length: index.row_length.to_vec(),
        }
    }

    fn index(&self) -> TargetIndex<'_, [u32]> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.row_offsets[..], members: &self.row_members[..] },
            row_length: &self.row_length,
        }
    }
}

/// Copies of weights, in the order of [`TargetWeights`].
fn copies<R: Runtime>(weights: &TargetWeights<&Array<R, f32>>) -> Result<[Vec<f32>; 6], CudaError> {
    let TargetWeights { w0, b0, w1, b1, w2, b2 } = weights;
    Ok([w0.to_vec()?, b0.to_vec()?, w1.to_vec()?, b1.to_vec()?, w2.to_vec()?, b2.to_vec()?])
}

fn borrowed(weights: &[Vec<f32>; 6]) -> TargetWeights<&[f32]> {
    let [w0, b0, w1, b1, w2, b2] = weights;
    TargetWeights { w0, b0, w1, b1, w2, b2 }
}

/// See [`crate::device::Device::target_attention`].
pub(super) fn forward<R: Runtime>(
    plan: &TargetPlan,
    [s, a, r]: [&Array<R, f32>; 3],
    weights: TargetWeights<&Array<R, f32>>,
    [e, lse, att]: [&mut Array<R, f32>; 3],
) -> Result<(), CudaError> {
    let weights = copies(&weights)?;
    let mut out = [&*e, lse, att].map(|array| vec![0.0; array.len()]);
    let [host_e, host_lse, host_att] = &mut out;
    target_attention::forward(
        plan.width,
        plan.hidden,
        plan.index(),
        &s.to_vec()?,
        &a.to_vec()?,
        &r.to_vec()?,
        borrowed(&weights),
        host_e,
        host_lse,
        host_att,
    );
    for (array, host) in [e, lse, att].into_iter().zip(&out) {
        array.copy_from(host)?;
    }
    Ok(())
}

/// See [`crate::device::Device::target_attention_backward`].
pub(super) fn backward<R: Runtime>(
    plan: &TargetPlan,
    [s, a, r]: [&Array<R, f32>; 3],
    weights: TargetWeights<&Array<R, f32>>,
    [e, lse, att, datt]: [&Array<R, f32>; 4],
    [ds, da, dr]: [&mut Array<R, f32>; 3],
    gradients: TargetWeights<&mut Array<R, f32>>,
) -> Result<(), CudaError> {
    let weights = copies(&weights)?;
    let TargetWeights { w0, b0, w1, b1, w2, b2 } = gradients;
    let gradients = [w0, b0, w1, b1, w2, b2];
    let mut sums = ds.to_vec()?;
    let mut own = [&*da, dr].map(|array| vec![0.0; array.len()]);
    let mut of_weights = gradients.each_ref().map(|array| vec![0.0; array.len()]);
    let [host_da, host_dr] = &mut own;
    let [g0, g1, g2, g3, g4, g5] = of_weights.each_mut().map(|g| &mut g[..]);
    target_attention::backward(
        plan.width,
        plan.hidden,
        plan.index(),
        &s.to_vec()?,
        &a.to_vec()?,
        &r.to_vec()?,
        borrowed(&weights),
        &e.to_vec()?,
        &lse.to_vec()?,
        &att.to_vec()?,
        &datt.to_vec()?,
        &mut sums,
        host_da,
        host_dr,
        TargetWeights { w0: g0, b0: g1, w1: g2, b1: g3, w2: g4, b2: g5 },
    );
    ds.copy_from(&sums)?;
    for (array, host) in [da, dr].into_iter().zip(&own) {
        array.copy_from(host)?;
    }
    for (array, host) in gradients.into_iter().zip(&of_weights) {
        array.copy_from(host)?;
    }
    Ok(())
}
