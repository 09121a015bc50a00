//! The CPU engine: every operation as a function over slices in the file of its name, and the [`Device`] that
//! lends them pooled memory. Work is cut into chunks that do not depend on the number of threads, and partial
//! sums are added in chunk order, so results are the same bits on 1 thread and on 64.

mod adam;
pub mod attention;
mod elementwise;
mod layer_norm;
pub mod linear;
mod loss;
mod memory;
mod prefix_mean;
mod product;
mod rows;
mod scratch;
pub mod simd;
pub mod target_attention;

pub use memory::CpuBuffer;

use super::{
    Activation, AdamStep, AdamTensor, Device, DeviceError, Element, Segments, Slot, Store, TargetIndex,
    TargetWeights,
};
use crate::attention::{self as fha, FhaOptions};
use std::sync::Arc;
use std::time::Instant;

type Floats = CpuBuffer<f32>;
type Indices = CpuBuffer<u32>;
type Bytes = CpuBuffer<u8>;
type Doubles = CpuBuffer<f64>;
type Done = Result<(), DeviceError>;

/// The processor this program runs on, with rayon's threads.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<memory::Pool>,
}

impl Cpu {
    /// A CPU with an empty memory pool.
    pub fn new() -> Self {
        Self::default()
    }
}

fn segments<'a>(s: &Segments<'a, Indices>) -> Segments<'a, [u32]> {
    Segments { offsets: s.offsets, members: s.members }
}

/// What [`Device::attention`] reads of a batch.
pub struct AttentionPlan {
    options: FhaOptions,
    cu_seqlens: Indices,
    label: Bytes,
}

/// What [`Device::target_attention`] reads of a batch.
pub struct TargetPlan {
    width: usize,
    hidden: [usize; 2],
    cu_seqlens: Indices,
    pair_offsets: Indices,
    score_offsets: Indices,
    row_offsets: Indices,
    row_members: Indices,
    row_length: Indices,
}

impl TargetPlan {
    fn index(&self) -> TargetIndex<'_, [u32]> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.row_offsets, members: &self.row_members },
            row_length: &self.row_length,
        }
    }
}

fn target_weights(w: TargetWeights<&Floats>) -> TargetWeights<&[f32]> {
    TargetWeights { w0: w.w0, b0: w.b0, w1: w.w1, b1: w.b1, w2: w.w2, b2: w.b2 }
}
impl Device for Cpu {
    type Buffer<T: Element> = CpuBuffer<T>;
    /// Nothing: what is staged is there at once.
    type Staging = ();
    type AttentionPlan = AttentionPlan;
    type TargetPlan = TargetPlan;
    /// Operations are over when they return.
    type Mark = Instant;

    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", simd::name(), rayon::current_num_threads())
    }
    /// One: more would take the cores that compute.
    fn default_workers(&self) -> usize {
        1
    }

    fn mark(&self) -> Result<Instant, DeviceError> {
        Ok(Instant::now())
    }
    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64, DeviceError> {
        Ok((*to - *from).as_secs_f64())
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>, DeviceError> {
        Ok(self.pool.take(len))
    }
    fn zeros<T: Element>(&self, len: usize) -> Result<CpuBuffer<T>, DeviceError> {
        let mut buffer = self.pool.take(len);
        buffer.fill(bytemuck::Zeroable::zeroed());
        Ok(buffer)
    }
    fn upload<T: Element>(&self, host: &[T]) -> Result<CpuBuffer<T>, DeviceError> {
        let mut buffer = self.pool.take(host.len());
        buffer.copy_from_slice(host);
        Ok(buffer)
    }
    fn staging(&self) -> Done {
        Ok(())
    }
    fn stage<T: Element>(&self, (): &mut (), host: &[T]) -> Result<CpuBuffer<T>, DeviceError> {
        self.upload(host)
    }
    fn send(&self, (): ()) -> Done {
        Ok(())
    }
    fn download<T: Element>(&self, buffer: &CpuBuffer<T>) -> Result<Vec<T>, DeviceError> {
        Ok(buffer.to_vec())
    }

    fn gather_sum(&self, width: usize, tables: &[(&Floats, &Indices)], y: &mut Floats) -> Done {
        let tables: Vec<(&[f32], &[u32])> = tables.iter().map(|&(t, i)| (&**t, &**i)).collect();
        rows::gather_sum(width, &tables, y);
        Ok(())
    }
    fn scatter_add(&self, width: usize, x: &Floats, index: &Indices, y: &mut Floats) -> Done {
        rows::scatter_add(width, x, index, y);
        Ok(())
    }
    fn segment_sum(
        &self,
        width: usize,
        sources: &[&Floats],
        list: Segments<Indices>,
        l2: f32,
        table: &Floats,
        row: &Indices,
        y: &mut Floats,
    ) -> Done {
        let sources: Vec<&[f32]> = sources.iter().map(|s| &***s).collect();
        rows::segment_sum(width, &sources, segments(&list), l2, table, row, y);
        Ok(())
    }
    fn half_square_sum(&self, width: usize, table: &Floats, row: &Indices, sum: Slot<Doubles>) -> Done {
        sum.values[sum.index] = rows::half_square_sum(width, table, row);
        Ok(())
    }
    fn add(&self, x: &Floats, y: &mut Floats) -> Done {
        rows::add(x, y);
        Ok(())
    }

    fn layer_norm(&self, width: usize, x: &Floats, gamma: &Floats, beta: &Floats, y: &mut Floats) -> Done {
        layer_norm::forward(width, x, gamma, beta, y);
        Ok(())
    }
    fn layer_norm_backward(
        &self,
        width: usize,
        x: &Floats,
        gamma: &Floats,
        dy: &Floats,
        dx: (&mut Floats, Store),
        dgamma: &mut Floats,
        dbeta: &mut Floats,
    ) -> Done {
        layer_norm::backward(width, x, gamma, dy, dx.0, dx.1, dgamma, dbeta);
        Ok(())
    }

    fn linear(
        &self,
        x: &Floats,
        w: &Floats,
        bias: Option<&Floats>,
        activation: Activation,
        y: (&mut Floats, Store),
        widths: (usize, usize),
    ) -> Done {
        linear::forward(x, w, bias.map(|b| &**b), activation, (&mut **y.0, y.1), widths);
        Ok(())
    }
    fn linear_backward(
        &self,
        x: &Floats,
        w: &Floats,
        activation: Activation,
        y: &Floats,
        dy: &mut Floats,
        dx: Option<(&mut Floats, Store)>,
        dw: &mut Floats,
        dbias: Option<&mut Floats>,
        widths: (usize, usize),
    ) -> Done {
        linear::backward(
            x,
            w,
            activation,
            y,
            dy,
            dx.map(|(dx, store)| (&mut **dx, store)),
            dw,
            dbias.map(|b| &mut **b),
            widths,
        );
        Ok(())
    }
    fn label_linear(
        &self,
        x: &Floats,
        w: &Floats,
        bias: &Floats,
        tokens_by_label: [&Indices; 2],
        y: (&mut Floats, Store),
        widths: (usize, usize),
    ) -> Done {
        linear::label_forward(x, w, bias, tokens_by_label.map(|t| &**t), (&mut **y.0, y.1), widths);
        Ok(())
    }
    fn label_linear_backward(
        &self,
        x: &Floats,
        w: &Floats,
        tokens_by_label: [&Indices; 2],
        dy: &Floats,
        dx: &mut Floats,
        dw: &mut Floats,
        dbias: &mut Floats,
        widths: (usize, usize),
    ) -> Done {
        linear::label_backward(x, w, tokens_by_label.map(|t| &**t), dy, dx, dw, dbias, widths);
        Ok(())
    }

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
    fn attention(
        &self,
        plan: &AttentionPlan,
        q: &Floats,
        k: &Floats,
        v: &Floats,
        o: &mut Floats,
        lse: &mut Floats,
    ) -> Done {
        let AttentionPlan { options, cu_seqlens, label } = plan;
        Ok(fha::forward(options, fha::Inputs { q, k, v, cu_seqlens, label }, o, lse)?)
    }
    fn attention_backward(
        &self,
        plan: &AttentionPlan,
        q: &Floats,
        k: &Floats,
        v: &Floats,
        o: &Floats,
        lse: &Floats,
        d_o: &Floats,
        dq: &mut Floats,
        dk: &mut Floats,
        dv: &mut Floats,
    ) -> Done {
        let AttentionPlan { options, cu_seqlens, label } = plan;
        let inputs = fha::Inputs { q, k, v, cu_seqlens, label };
        Ok(fha::backward(options, inputs, o, lse, d_o, fha::Gradients { dq, dk, dv })?)
    }

    fn prefix_mean(
        &self,
        width: usize,
        x: &Floats,
        start: &Indices,
        group_offsets: &Indices,
        count: &Indices,
        divisor: &Indices,
        mean: &mut Floats,
    ) -> Done {
        prefix_mean::forward(width, x, start, group_offsets, count, divisor, mean);
        Ok(())
    }
    fn prefix_mean_backward(
        &self,
        width: usize,
        start: &Indices,
        group_offsets: &Indices,
        count: &Indices,
        divisor: &Indices,
        dmean: &Floats,
        dx: &mut Floats,
    ) -> Done {
        prefix_mean::backward(width, start, group_offsets, count, divisor, dmean, dx);
        Ok(())
    }

    fn target_plan(
        &self,
        (): &mut (),
        width: usize,
        hidden: [usize; 2],
        index: TargetIndex<[u32]>,
    ) -> Result<TargetPlan, DeviceError> {
        Ok(TargetPlan {
            width,
            hidden,
            cu_seqlens: self.upload(index.cu_seqlens)?,
            pair_offsets: self.upload(index.pair_offsets)?,
            score_offsets: self.upload(index.score_offsets)?,
            row_offsets: self.upload(index.rows.offsets)?,
            row_members: self.upload(index.rows.members)?,
            row_length: self.upload(index.row_length)?,
        })
    }
    fn target_attention(
        &self,
        plan: &TargetPlan,
        s: &Floats,
        a: &Floats,
        r: &Floats,
        weights: TargetWeights<&Floats>,
        e: &mut Floats,
        lse: &mut Floats,
        att: &mut Floats,
    ) -> Done {
        target_attention::forward(
            plan.width,
            plan.hidden,
            plan.index(),
            s,
            a,
            r,
            target_weights(weights),
            e,
            lse,
            att,
        );
        Ok(())
    }
    fn target_attention_backward(
        &self,
        plan: &TargetPlan,
        s: &Floats,
        a: &Floats,
        r: &Floats,
        weights: TargetWeights<&Floats>,
        e: &Floats,
        lse: &Floats,
        att: &Floats,
        datt: &Floats,
        ds: &mut Floats,
        da: &mut Floats,
        dr: &mut Floats,
        gradients: TargetWeights<&mut Floats>,
    ) -> Done {
        let TargetWeights { w0, b0, w1, b1, w2, b2 } = gradients;
        let gradients = TargetWeights {
            w0: &mut **w0,
            b0: &mut **b0,
            w1: &mut **w1,
            b1: &mut **b1,
            w2: &mut **w2,
            b2: &mut **b2,
        };
        target_attention::backward(
            plan.width,
            plan.hidden,
            plan.index(),
            s,
            a,
            r,
            target_weights(weights),
            e,
            lse,
            att,
            datt,
            ds,
            da,
            dr,
            gradients,
        );
        Ok(())
    }

    fn concat(&self, width: usize, parts: &[(&Floats, Option<&Indices>)], y: &mut Floats) -> Done {
        let parts: Vec<(&[f32], Option<&[u32]>)> =
            parts.iter().map(|&(x, i)| (&**x, i.map(|i| &**i))).collect();
        rows::concat(width, &parts, y);
        Ok(())
    }
    fn concat_backward(
        &self,
        width: usize,
        part: usize,
        parts: usize,
        dy: &Floats,
        list: Option<Segments<Indices>>,
        dx: (&mut Floats, Store),
    ) -> Done {
        rows::concat_backward(width, part, parts, dy, list.as_ref().map(segments), dx.0, dx.1);
        Ok(())
    }
    fn rank_loss(
        &self,
        bpr: f32,
        logit_pos: &Floats,
        logit_neg: &Floats,
        target: &Floats,
        d_pos: &mut Floats,
        d_neg: &mut Floats,
        losses: Slot<Doubles>,
    ) -> Done {
        let means = loss::rank(bpr, logit_pos, logit_neg, target, d_pos, d_neg);
        losses.values[losses.index..losses.index + 2].copy_from_slice(&means);
        Ok(())
    }
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        x: &Floats,
        y: &Floats,
        dx: &mut Floats,
        dy: &mut Floats,
        loss: Slot<Doubles>,
    ) -> Done {
        loss.values[loss.index] = loss::cosine(width, weight, x, y, dx, dy);
        Ok(())
    }

    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Floats, Indices>],
        norm: Slot<Doubles>,
    ) -> Done {
        let mut tensors: Vec<_> = tensors
            .iter_mut()
            .map(|t| adam::Tensor {
                value: t.value,
                first: t.first,
                second: t.second,
                gradient: t.gradient,
                rows: t.rows.map(|(rows, width)| (&**rows, width)),
            })
            .collect();
        let (losses, norm) = norm.values.split_at_mut(norm.index);
        norm[0] = adam::step(step, &mut tensors, losses.iter().all(|loss| loss.is_finite()));
        Ok(())
    }
}
