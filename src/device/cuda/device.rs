//! The topics of [`Device`](crate::device::Device) for every runtime: each operation is a function in the file of
//! its `.cu`.

use super::array::{Array, Staging};
use super::error::CudaError;
use super::gpu::Gpu;
use super::kernel::{self, Block, Kernel};
use super::ops::attention::{self, DevicePlan};
use super::ops::layer_norm::Input;
use super::ops::prefix_mean::Groups;
use super::ops::{
    convert, embedding, layer_norm, limits, linear, loss, naive_attention, optimizer, prefix_mean, rows,
    target_attention,
};
use super::plan::rows::block_of;
use super::plan::target_shape::Shape;
use super::runtime::{self, Runtime};
use crate::attention::FhaOptions;
use crate::device::{
    AdamStep, AdamTensor, Attention, Columns, ConcatPart, Dense, DeviceError, Element, Execution, Interests,
    LabelLinear, LabelLinearGradients, LayerNorm, LayerNormGradients, Linear, LinearGradients, Lookup,
    Losses, Memory, Optimizer, Output, Prefixes, Qkv, QkvGradients, Rows, SegmentSum, Segments, Slot,
    SoftmaxState, Store, TargetAttention, TargetGradients, TargetIndex, TargetInputs, TargetShape,
    TargetState, TargetWeights,
};

type Done = Result<(), DeviceError>;
type Floats<R> = Array<R, f32>;
type Indices<R> = Array<R, u32>;

impl<R: Runtime> Execution for Gpu<R> {
    type Event = R::Mark;

    fn name(&self) -> String {
        format!("{} ({})", self.runtime().name(), self.precision().name())
    }
    fn captured<T>(&self, work: impl FnMut() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.captured_work(work)
    }
    fn record_event(&self) -> Result<R::Mark, DeviceError> {
        Ok(self.runtime().mark()?)
    }
    fn seconds_between(&self, from: &R::Mark, to: &R::Mark) -> Result<f64, DeviceError> {
        Ok(self.runtime().seconds_between(from, to)?)
    }
}

impl<R: Runtime> Memory for Gpu<R> {
    type Buffer<T: Element> = Array<R, T>;
    type Staging = Staging<R>;

    fn check_room(&self, parameters: usize, copies: usize) -> Done {
        let runtime::Memory { free, total } = self.runtime().memory()?;
        let needed = parameters.saturating_mul(copies * size_of::<f32>());
        if needed > free { Err(CudaError::NoRoom { parameters, needed, free, total }.into()) } else { Ok(()) }
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Array<R, T>, DeviceError> {
        Ok(self.array(len)?)
    }
    fn zeros<T: Element>(&self, len: usize) -> Result<Array<R, T>, DeviceError> {
        Ok(Array::zeros(self.runtime(), len)?)
    }
    fn upload<T: Element>(&self, host: &[T]) -> Result<Array<R, T>, DeviceError> {
        Ok(self.copy_of(host)?)
    }
    fn staging(&self) -> Result<Staging<R>, DeviceError> {
        Ok(Staging::new(self.runtime())?)
    }
    fn stage<T: Element>(&self, staging: &mut Staging<R>, host: &[T]) -> Result<Array<R, T>, DeviceError> {
        Ok(staging.add(host)?)
    }
    fn send(&self, staging: Staging<R>) -> Done {
        Ok(staging.send()?)
    }
    fn download<T: Element>(&self, buffer: &Array<R, T>) -> Result<Vec<T>, DeviceError> {
        Ok(buffer.to_vec()?)
    }
}

fn tables<'a, R: Runtime>(
    tables: &[Lookup<&'a Floats<R>, &'a Indices<R>>],
) -> Vec<(&'a Floats<R>, &'a Indices<R>)> {
    tables.iter().map(|t| (t.table, t.index)).collect()
}

fn groups<R: Runtime>(prefixes: Prefixes<&Indices<R>>) -> Groups<'_, R> {
    let Prefixes { cu_seqlens: start, group_offsets, count, divisor } = prefixes;
    Groups { start, group_offsets, count, divisor }
}

impl<R: Runtime> Rows for Gpu<R> {
    fn gather_sum(
        &self,
        width: usize,
        tables: &[Lookup<&Floats<R>, &Indices<R>>],
        y: &mut Floats<R>,
    ) -> Done {
        Ok(embedding::gather_sum(self, width, &self::tables(tables), y)?)
    }
    fn scatter_add(&self, width: usize, x: &Floats<R>, index: &Indices<R>, y: &mut Floats<R>) -> Done {
        Ok(embedding::scatter_add(self, width, x, index, y)?)
    }
    fn segment_sum(&self, width: usize, sum: SegmentSum<&Floats<R>, &Indices<R>>, y: &mut Floats<R>) -> Done {
        let SegmentSum { sources, segments, l2, rows: Lookup { table, index } } = sum;
        let l2 = Some((l2, table, index));
        let sum = embedding::SegmentSum { sources, stride: width, column: 0, width, segments, l2 };
        Ok(embedding::segment_sum(self, sum, (y, Store::Overwrite))?)
    }
    fn half_square_sum(
        &self,
        width: usize,
        rows: Lookup<&Floats<R>, &Indices<R>>,
        sum: Slot<Array<R, f64>>,
    ) -> Done {
        Ok(embedding::half_square_sum(self, width, rows.table, rows.index, sum)?)
    }
    fn add(&self, x: &Floats<R>, y: &mut Floats<R>) -> Done {
        Ok(rows::add(self, x, y)?)
    }
    fn prefix_mean(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<R>>,
        x: &Floats<R>,
        mean: &mut Floats<R>,
    ) -> Done {
        Ok(prefix_mean::forward(self, width, groups(prefixes), x, mean)?)
    }
    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<R>>,
        dmean: &Floats<R>,
        dx: &mut Floats<R>,
    ) -> Done {
        Ok(prefix_mean::backward(self, width, groups(prefixes), dmean, dx)?)
    }
    fn concat(&self, width: usize, parts: &[ConcatPart<&Floats<R>, &Indices<R>>], y: &mut Floats<R>) -> Done {
        let parts: Vec<_> = parts.iter().map(|part| (part.values, part.index)).collect();
        Ok(rows::concat(self, width, &parts, y)?)
    }
    fn concat_backward(
        &self,
        columns: Columns,
        dy: &Floats<R>,
        segments: Option<Segments<&Indices<R>>>,
        dx: Output<&mut Floats<R>>,
    ) -> Done {
        let Columns { width, part, parts } = columns;
        let dx = (dx.values, dx.store);
        match segments {
            None => rows::take_part(self, width, (part, parts), dy, dx)?,
            Some(segments) => {
                let sum = embedding::SegmentSum {
                    sources: &[dy],
                    stride: parts * width,
                    column: part * width,
                    width,
                    segments,
                    l2: None,
                };
                embedding::segment_sum(self, sum, dx)?;
            }
        }
        Ok(())
    }
}

impl<R: Runtime> Dense for Gpu<R> {
    fn linear(&self, layer: Linear<&Floats<R>>, x: &Floats<R>, y: Output<&mut Floats<R>>) -> Done {
        let Linear { w, bias, activation, inputs, outputs } = layer;
        Ok(linear::forward(self, x, w, bias, activation, (y.values, y.store), (inputs, outputs))?)
    }
    fn linear_backward(
        &self,
        layer: Linear<&Floats<R>>,
        x: &Floats<R>,
        y: &Floats<R>,
        dy: &mut Floats<R>,
        gradients: LinearGradients<&mut Floats<R>>,
    ) -> Done {
        let Linear { w, activation, inputs, outputs, .. } = layer;
        let LinearGradients { dx, dw, dbias } = gradients;
        let dx = dx.map(|dx| (dx.values, dx.store));
        Ok(linear::backward(self, x, w, activation, y, dy, dx, dw, dbias, (inputs, outputs))?)
    }
    fn label_linear(
        &self,
        layer: LabelLinear<&Floats<R>, &Indices<R>>,
        x: &Floats<R>,
        y: Output<&mut Floats<R>>,
    ) -> Done {
        let LabelLinear { w, bias, tokens_by_label, inputs, outputs } = layer;
        let y = (y.values, y.store);
        Ok(linear::label_forward(self, x, w, bias, tokens_by_label, y, (inputs, outputs))?)
    }
    fn label_linear_backward(
        &self,
        layer: LabelLinear<&Floats<R>, &Indices<R>>,
        x: &Floats<R>,
        dy: &Floats<R>,
        gradients: LabelLinearGradients<&mut Floats<R>>,
    ) -> Done {
        let LabelLinear { w, tokens_by_label, inputs, outputs, .. } = layer;
        let LabelLinearGradients { dx, dw, dbias } = gradients;
        Ok(linear::label_backward(self, x, w, tokens_by_label, dy, dx, dw, dbias, (inputs, outputs))?)
    }

    fn layer_norm(&self, norm: LayerNorm<&Floats<R>>, x: &Floats<R>, y: &mut Floats<R>) -> Done {
        let LayerNorm { width, gamma, beta } = norm;
        Ok(layer_norm::forward(self, width, Input::Given(x), gamma, beta, y)?)
    }
    fn gather_layer_norm(
        &self,
        norm: LayerNorm<&Floats<R>>,
        tables: &[Lookup<&Floats<R>, &Indices<R>>],
        y: &mut Floats<R>,
        n: &mut Floats<R>,
    ) -> Done {
        let LayerNorm { width, gamma, beta } = norm;
        Ok(layer_norm::forward(self, width, Input::Tables(&self::tables(tables), y), gamma, beta, n)?)
    }
    fn add_layer_norm(
        &self,
        norm: LayerNorm<&Floats<R>>,
        x: &Floats<R>,
        y: &mut Floats<R>,
        n: &mut Floats<R>,
    ) -> Done {
        let LayerNorm { width, gamma, beta } = norm;
        Ok(layer_norm::forward(self, width, Input::Sum(x, y), gamma, beta, n)?)
    }
    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats<R>>,
        x: &Floats<R>,
        dy: &Floats<R>,
        gradients: LayerNormGradients<&mut Floats<R>>,
    ) -> Done {
        let LayerNormGradients { dx, dgamma, dbeta } = gradients;
        let dx = (dx.values, dx.store);
        Ok(layer_norm::backward(self, norm.width, x, norm.gamma, dy, dx, dgamma, dbeta)?)
    }
}

impl<R: Runtime> Attention for Gpu<R> {
    type AttentionPlan = DevicePlan<R>;

    fn attention_plan(
        &self,
        staging: &mut Staging<R>,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<DevicePlan<R>, DeviceError> {
        Ok(DevicePlan::new(self, staging, options, cu_seqlens, label)?)
    }
    fn attention(
        &self,
        plan: &DevicePlan<R>,
        Qkv { q, k, v }: Qkv<&Floats<R>>,
        state: SoftmaxState<&mut Floats<R>>,
    ) -> Done {
        Ok(attention::forward(self, plan, [q, k, v], state.o, state.lse)?)
    }
    fn attention_backward(
        &self,
        plan: &DevicePlan<R>,
        Qkv { q, k, v }: Qkv<&Floats<R>>,
        state: SoftmaxState<&Floats<R>>,
        d_o: &Floats<R>,
        QkvGradients { dq, dk, dv }: QkvGradients<&mut Floats<R>>,
    ) -> Done {
        Ok(attention::backward(self, plan, [q, k, v], [state.o, state.lse, d_o], [dq, dk, dv])?)
    }
}

impl<R: Runtime> TargetAttention for Gpu<R> {
    type TargetPlan = target_attention::TargetPlan<R>;

    fn target_plan(
        &self,
        staging: &mut Staging<R>,
        shape: TargetShape,
        index: TargetIndex<&[u32]>,
    ) -> Result<target_attention::TargetPlan<R>, DeviceError> {
        let TargetShape { width, hidden } = shape;
        Ok(target_attention::TargetPlan::new(self, staging, width, hidden, index)?)
    }
    fn target_attention(
        &self,
        plan: &target_attention::TargetPlan<R>,
        TargetInputs { s, a, r }: TargetInputs<&Floats<R>>,
        weights: TargetWeights<&Floats<R>>,
        TargetState { e, lse, att }: TargetState<&mut Floats<R>>,
    ) -> Done {
        Ok(target_attention::forward(self, plan, [s, a, r], weights, [e, lse, att])?)
    }
    fn target_attention_backward(
        &self,
        plan: &target_attention::TargetPlan<R>,
        TargetInputs { s, a, r }: TargetInputs<&Floats<R>>,
        weights: TargetWeights<&Floats<R>>,
        TargetState { e, lse, att }: TargetState<&Floats<R>>,
        datt: &Floats<R>,
        gradients: TargetGradients<&mut Floats<R>>,
    ) -> Done {
        let TargetGradients { ds, da, dr, weights: dw } = gradients;
        let read = [e, lse, att, datt];
        Ok(target_attention::backward(self, plan, [s, a, r], weights, read, [ds, da, dr], dw)?)
    }
}

impl<R: Runtime> Losses for Gpu<R> {
    fn rank_loss(
        &self,
        bpr: f32,
        logits: Interests<&Floats<R>>,
        target: &Floats<R>,
        gradients: Interests<&mut Floats<R>>,
        losses: Slot<Array<R, f64>>,
    ) -> Done {
        let gradients = [gradients.positive, gradients.negative];
        Ok(loss::rank(self, bpr, [logits.positive, logits.negative, target], gradients, losses)?)
    }
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        vectors: Interests<&Floats<R>>,
        gradients: Interests<&mut Floats<R>>,
        loss: Slot<Array<R, f64>>,
    ) -> Done {
        let vectors = [vectors.positive, vectors.negative];
        let gradients = [gradients.positive, gradients.negative];
        Ok(loss::cosine(self, width, weight, vectors, gradients, loss)?)
    }
}

impl<R: Runtime> Optimizer for Gpu<R> {
    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Floats<R>, Indices<R>>],
        norm: Slot<Array<R, f64>>,
    ) -> Done {
        Ok(optimizer::adam(self, step, tensors, norm)?)
    }
}

/// Shapes of target attention that are looked at without a device: the paper's, and twice as wide.
const TARGET_SHAPES: [Shape; 2] =
    [Shape { width: 32, hidden0: 80, hidden1: 40 }, Shape { width: 64, hidden0: 80, hidden1: 40 }];

/// Every kernel but those of attention, with its largest block.
pub fn step_kernels() -> Vec<(Kernel, Block)> {
    let files = [
        rows::KERNELS,
        embedding::KERNELS,
        layer_norm::KERNELS,
        prefix_mean::KERNELS,
        loss::KERNELS,
        optimizer::KERNELS,
        naive_attention::KERNELS,
        limits::KERNELS,
    ];
    let mut kernels = files.concat();
    for element in [kernel::Element::F32, kernel::Element::Bf16] {
        let module = convert::module(element);
        kernels.extend(convert::ENTRIES.map(|entry| (Kernel { module, entry }, block_of(0))));
        kernels.extend(TARGET_SHAPES.into_iter().flat_map(|shape| target_attention::kernels(element, shape)));
    }
    kernels
}
