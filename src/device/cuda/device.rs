//! [`Device`] for every runtime: each operation is a function in the file of its `.cu`.

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
use super::runtime::{Memory, Runtime};
use crate::attention::FhaOptions;
use crate::device::{
    Activation, AdamStep, AdamTensor, Device, DeviceError, Element, Segments, Slot, Store, TargetIndex,
    TargetWeights,
};

type Done = Result<(), DeviceError>;

impl<R: Runtime> Device for Gpu<R> {
    type Buffer<T: Element> = Array<R, T>;
    type Staging = Staging<R>;
    type AttentionPlan = DevicePlan<R>;
    type TargetPlan = target_attention::TargetPlan<R>;
    type Mark = R::Mark;

    fn name(&self) -> String {
        format!("{} ({})", self.runtime().name(), self.precision().name())
    }

    fn captured<T>(&self, work: impl FnMut() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.captured_work(work)
    }
    fn mark(&self) -> Result<R::Mark, DeviceError> {
        Ok(self.runtime().mark()?)
    }
    fn seconds_between(&self, from: &R::Mark, to: &R::Mark) -> Result<f64, DeviceError> {
        Ok(self.runtime().seconds_between(from, to)?)
    }

    fn check_room(&self, parameters: usize, copies: usize) -> Done {
        let Memory { free, total } = self.runtime().memory()?;
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

    fn gather_sum(
        &self,
        width: usize,
        tables: &[(&Array<R, f32>, &Array<R, u32>)],
        y: &mut Array<R, f32>,
    ) -> Done {
        Ok(embedding::gather_sum(self, width, tables, y)?)
    }
    fn scatter_add(
        &self,
        width: usize,
        x: &Array<R, f32>,
        index: &Array<R, u32>,
        y: &mut Array<R, f32>,
    ) -> Done {
        Ok(embedding::scatter_add(self, width, x, index, y)?)
    }
    fn segment_sum(
        &self,
        width: usize,
        sources: &[&Array<R, f32>],
        segments: Segments<Array<R, u32>>,
        l2: f32,
        table: &Array<R, f32>,
        row: &Array<R, u32>,
        y: &mut Array<R, f32>,
    ) -> Done {
        let l2 = Some((l2, table, row));
        let sum = embedding::SegmentSum { sources, stride: width, column: 0, width, segments, l2 };
        Ok(embedding::segment_sum(self, sum, (y, Store::Overwrite))?)
    }
    fn half_square_sum(
        &self,
        width: usize,
        table: &Array<R, f32>,
        row: &Array<R, u32>,
        sum: Slot<Array<R, f64>>,
    ) -> Done {
        Ok(embedding::half_square_sum(self, width, table, row, sum)?)
    }
    fn add(&self, x: &Array<R, f32>, y: &mut Array<R, f32>) -> Done {
        Ok(rows::add(self, x, y)?)
    }

    fn layer_norm(
        &self,
        width: usize,
        x: &Array<R, f32>,
        gamma: &Array<R, f32>,
        beta: &Array<R, f32>,
        y: &mut Array<R, f32>,
    ) -> Done {
        Ok(layer_norm::forward(self, width, Input::Given(x), gamma, beta, y)?)
    }
    fn gather_layer_norm(
        &self,
        width: usize,
        tables: &[(&Array<R, f32>, &Array<R, u32>)],
        gamma: &Array<R, f32>,
        beta: &Array<R, f32>,
        y: &mut Array<R, f32>,
        n: &mut Array<R, f32>,
    ) -> Done {
        Ok(layer_norm::forward(self, width, Input::Tables(tables, y), gamma, beta, n)?)
    }
    fn add_layer_norm(
        &self,
        width: usize,
        x: &Array<R, f32>,
        gamma: &Array<R, f32>,
        beta: &Array<R, f32>,
        y: &mut Array<R, f32>,
        n: &mut Array<R, f32>,
    ) -> Done {
        Ok(layer_norm::forward(self, width, Input::Sum(x, y), gamma, beta, n)?)
    }
    fn layer_norm_backward(
        &self,
        width: usize,
        x: &Array<R, f32>,
        gamma: &Array<R, f32>,
        dy: &Array<R, f32>,
        dx: (&mut Array<R, f32>, Store),
        dgamma: &mut Array<R, f32>,
        dbeta: &mut Array<R, f32>,
    ) -> Done {
        Ok(layer_norm::backward(self, width, x, gamma, dy, dx, dgamma, dbeta)?)
    }

    fn linear(
        &self,
        x: &Array<R, f32>,
        w: &Array<R, f32>,
        bias: Option<&Array<R, f32>>,
        activation: Activation,
        y: (&mut Array<R, f32>, Store),
        widths: (usize, usize),
    ) -> Done {
        Ok(linear::forward(self, x, w, bias, activation, y, widths)?)
    }
    fn linear_backward(
        &self,
        x: &Array<R, f32>,
        w: &Array<R, f32>,
        activation: Activation,
        y: &Array<R, f32>,
        dy: &mut Array<R, f32>,
        dx: Option<(&mut Array<R, f32>, Store)>,
        dw: &mut Array<R, f32>,
        dbias: Option<&mut Array<R, f32>>,
        widths: (usize, usize),
    ) -> Done {
        Ok(linear::backward(self, x, w, activation, y, dy, dx, dw, dbias, widths)?)
    }
    fn label_linear(
        &self,
        x: &Array<R, f32>,
        w: &Array<R, f32>,
        bias: &Array<R, f32>,
        tokens_by_label: [&Array<R, u32>; 2],
        y: (&mut Array<R, f32>, Store),
        widths: (usize, usize),
    ) -> Done {
        Ok(linear::label_forward(self, x, w, bias, tokens_by_label, y, widths)?)
    }
    fn label_linear_backward(
        &self,
        x: &Array<R, f32>,
        w: &Array<R, f32>,
        tokens_by_label: [&Array<R, u32>; 2],
        dy: &Array<R, f32>,
        dx: &mut Array<R, f32>,
        dw: &mut Array<R, f32>,
        dbias: &mut Array<R, f32>,
        widths: (usize, usize),
    ) -> Done {
        Ok(linear::label_backward(self, x, w, tokens_by_label, dy, dx, dw, dbias, widths)?)
    }

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
        q: &Array<R, f32>,
        k: &Array<R, f32>,
        v: &Array<R, f32>,
        o: &mut Array<R, f32>,
        lse: &mut Array<R, f32>,
    ) -> Done {
        Ok(attention::forward(self, plan, [q, k, v], o, lse)?)
    }
    fn attention_backward(
        &self,
        plan: &DevicePlan<R>,
        q: &Array<R, f32>,
        k: &Array<R, f32>,
        v: &Array<R, f32>,
        o: &Array<R, f32>,
        lse: &Array<R, f32>,
        d_o: &Array<R, f32>,
        dq: &mut Array<R, f32>,
        dk: &mut Array<R, f32>,
        dv: &mut Array<R, f32>,
    ) -> Done {
        Ok(attention::backward(self, plan, [q, k, v], [o, lse, d_o], [dq, dk, dv])?)
    }

    fn prefix_mean(
        &self,
        width: usize,
        x: &Array<R, f32>,
        start: &Array<R, u32>,
        group_offsets: &Array<R, u32>,
        count: &Array<R, u32>,
        divisor: &Array<R, u32>,
        mean: &mut Array<R, f32>,
    ) -> Done {
        Ok(prefix_mean::forward(self, width, Groups { start, group_offsets, count, divisor }, x, mean)?)
    }
    fn prefix_mean_backward(
        &self,
        width: usize,
        start: &Array<R, u32>,
        group_offsets: &Array<R, u32>,
        count: &Array<R, u32>,
        divisor: &Array<R, u32>,
        dmean: &Array<R, f32>,
        dx: &mut Array<R, f32>,
    ) -> Done {
        Ok(prefix_mean::backward(self, width, Groups { start, group_offsets, count, divisor }, dmean, dx)?)
    }

    fn target_plan(
        &self,
        staging: &mut Staging<R>,
        width: usize,
        hidden: [usize; 2],
        index: TargetIndex<[u32]>,
    ) -> Result<target_attention::TargetPlan<R>, DeviceError> {
        Ok(target_attention::TargetPlan::new(self, staging, width, hidden, index)?)
    }
    fn target_attention(
        &self,
        plan: &target_attention::TargetPlan<R>,
        s: &Array<R, f32>,
        a: &Array<R, f32>,
        r: &Array<R, f32>,
        weights: TargetWeights<&Array<R, f32>>,
        e: &mut Array<R, f32>,
        lse: &mut Array<R, f32>,
        att: &mut Array<R, f32>,
    ) -> Done {
        Ok(target_attention::forward(self, plan, [s, a, r], weights, [e, lse, att])?)
    }
    fn target_attention_backward(
        &self,
        plan: &target_attention::TargetPlan<R>,
        s: &Array<R, f32>,
        a: &Array<R, f32>,
        r: &Array<R, f32>,
        weights: TargetWeights<&Array<R, f32>>,
        e: &Array<R, f32>,
        lse: &Array<R, f32>,
        att: &Array<R, f32>,
        datt: &Array<R, f32>,
        ds: &mut Array<R, f32>,
        da: &mut Array<R, f32>,
        dr: &mut Array<R, f32>,
        gradients: TargetWeights<&mut Array<R, f32>>,
    ) -> Done {
        let read = [e, lse, att, datt];
        Ok(target_attention::backward(self, plan, [s, a, r], weights, read, [ds, da, dr], gradients)?)
    }

    fn concat(
        &self,
        width: usize,
        parts: &[(&Array<R, f32>, Option<&Array<R, u32>>)],
        y: &mut Array<R, f32>,
    ) -> Done {
        Ok(rows::concat(self, width, parts, y)?)
    }
    fn concat_backward(
        &self,
        width: usize,
        part: usize,
        parts: usize,
        dy: &Array<R, f32>,
        segments: Option<Segments<Array<R, u32>>>,
        dx: (&mut Array<R, f32>, Store),
    ) -> Done {
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
    fn rank_loss(
        &self,
        bpr: f32,
        logit_pos: &Array<R, f32>,
        logit_neg: &Array<R, f32>,
        target: &Array<R, f32>,
        d_pos: &mut Array<R, f32>,
        d_neg: &mut Array<R, f32>,
        losses: Slot<Array<R, f64>>,
    ) -> Done {
        Ok(loss::rank(self, bpr, [logit_pos, logit_neg, target], [d_pos, d_neg], losses)?)
    }
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        x: &Array<R, f32>,
        y: &Array<R, f32>,
        dx: &mut Array<R, f32>,
        dy: &mut Array<R, f32>,
        loss: Slot<Array<R, f64>>,
    ) -> Done {
        Ok(loss::cosine(self, width, weight, [x, y], [dx, dy], loss)?)
    }

    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Array<R, f32>, Array<R, u32>>],
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
