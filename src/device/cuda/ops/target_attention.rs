//! Launches of `target/target_attention.cu`, and the matrix products around them.

use super::linear::Factor;
use crate::device::cuda::array::{Array, Staging};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::gpu::products::{Product, shares_of};
use crate::device::cuda::kernel::{Block, Define, Element, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::blocks;
use crate::device::cuda::plan::target::{Item, Pair, Row, TargetLists, Tile};
use crate::device::cuda::plan::target_params::*;
use crate::device::cuda::plan::target_shape::{ROW_THREADS, Shape, WARPS};
use crate::device::cuda::runtime::Runtime;
use crate::device::{
    Activation, DeviceError, Store, TargetAttention, TargetCounts, TargetGradients, TargetIndex,
    TargetInputs, TargetShape, TargetState, TargetWeights,
};
use bytemuck::{Pod, Zeroable};

impl Shape {
    /// `target/target_attention.cu` compiled for this shape.
    pub const fn module(&self, element: Element) -> Module {
        Module::new("target/target_attention.cu")
            .with("DFAR_ELEMENT", Define::Word(element.cuda_name()))
            .with("DFAR_WIDTH", Define::Number(self.width as u32))
            .with("DFAR_HIDDEN0", Define::Number(self.hidden0 as u32))
            .with("DFAR_HIDDEN1", Define::Number(self.hidden1 as u32))
    }
}

/// All kernels of the file for one element type and shape, each with its block.
pub fn kernels(of: Element, shape: Shape) -> Vec<(Kernel, Block)> {
    let plain = Block { warps: ROW_THREADS / 32, shared_bytes: 0 };
    [
        ("target_combine", plain),
        ("target_scores", shape.scores(of)),
        ("target_softmax", plain),
        ("target_softmax_backward", shape.softmax_backward()),
        ("target_backward", shape.backward(of)),
        ("target_sum_tokens", plain),
        ("target_sum_pairs", plain),
        ("target_gradients", plain),
    ]
    .map(|(entry, block)| (Kernel { module: shape.module(of), entry }, block))
    .to_vec()
}

/// Work lists of a batch on the device.
pub struct TargetPlan<R: Runtime> {
    width: usize,
    hidden: [usize; 2],
    slope: f32,
    shape: Shape,
    counts: TargetCounts,
    units: usize,
    items: Array<R, Item>,
    pairs: Array<R, Pair>,
    pair_rows: Array<R, u32>,
    rows: Array<R, Row>,
    tiles: Array<R, Tile>,
}

impl<R: Runtime> TargetPlan<R> {
    pub(crate) fn new(
        gpu: &Gpu<R>,
        staging: &mut Staging<R>,
        asked: TargetShape,
        index: TargetIndex<&[u32]>,
    ) -> Result<Self, CudaError> {
        let TargetShape { width, hidden, .. } = asked;
        let shape = Shape::of(width, hidden)?;
        let available = gpu.runtime().limits().shared_per_block;
        for (kernel, block) in kernels(Element::from(gpu.precision()), shape) {
            if block.shared_bytes > available {
                return Err(CudaError::SharedMemory {
                    pass: kernel.entry,
                    needed: block.shared_bytes,
                    available,
                });
            }
        }
        let lists = TargetLists::new(&index);
        Ok(Self {
            width,
            hidden,
            slope: asked.slope(),
            shape,
            counts: lists.counts,
            units: lists.units,
            items: staging.add(&lists.items)?,
            pairs: staging.add(&lists.pairs)?,
            pair_rows: staging.add(&lists.pair_rows)?,
            rows: staging.add(&lists.rows)?,
            tiles: staging.add(&lists.tiles)?,
        })
    }

    /// # Panics
    /// If the length of a buffer contradicts the index of the batch.
    fn check(
        &self,
        inputs: TargetInputs<&Array<R, f32>>,
        weights: TargetWeights<usize>,
        state: TargetState<&Array<R, f32>>,
    ) {
        let (TargetInputs { s, a, r }, TargetState { e, lse, att }) = (inputs, state);
        let (TargetCounts { tokens, pairs, scores, rows }, d, [h0, h1]) =
            (self.counts, self.width, self.hidden);
        assert_eq!([s.len(), a.len()], [tokens * d; 2], "s and a are not [N, D]");
        assert_eq!(r.len(), pairs * d, "r is not [C, D]");
        assert_eq!(
            [e.len(), lse.len(), att.len()],
            [scores, rows, rows * d],
            "e, lse or att is not [S], [R] or [R, D]"
        );
        let TargetWeights { w0, b0, w1, b1, w2, b2 } = weights;
        assert_eq!(
            [w0, b0, w1, b1, w2, b2],
            [4 * d * h0, h0, h0 * h1, h1, h1, 1],
            "a weight has the wrong length"
        );
    }
}

/// The arguments that all launches of a call share.
struct Call<'a, R: Runtime> {
    gpu: &'a Gpu<R>,
    plan: &'a TargetPlan<R>,
}

/// The first layer of the MLP: `z = a token: [N, H0]` and `c = r candidate + bias: [C, H0]`,
/// with the combined weights `token` and `candidate`, `[D, H0]` each.
struct FirstLayer<R: Runtime> {
    token: Array<R, f32>,
    candidate: Array<R, f32>,
    z: Array<R, f32>,
    c: Array<R, f32>,
}

impl<R: Runtime> Call<'_, R> {
    /// A kernel of the plan's module.
    fn kernel(&self, entry: &'static str) -> Kernel {
        Kernel { module: self.plan.shape.module(Element::from(self.gpu.precision())), entry }
    }

    /// Launches a kernel of the plan's module.
    ///
    /// # Safety
    /// As [`Runtime::launch`].
    unsafe fn launch<P: Pod>(
        &self,
        entry: &'static str,
        launch: Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.gpu.launch(self.kernel(entry), launch, params) }
    }

    /// As [`Call::launch`], for a kernel for one or two problems.
    ///
    /// # Safety
    /// As [`Runtime::launch`].
    unsafe fn launch_for_both<P: Pod>(
        &self,
        entry: &'static str,
        launch: Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.gpu.launch_for_both(self.kernel(entry), launch, params) }
    }

    /// `c (+)= a b`, or `a b + bias`, for packed matrices; `shape = [m, n, k]`.
    fn product(
        &self,
        shape: [usize; 3],
        (a, a_transposed): (&Array<R, f32>, bool),
        (b, b_transposed): (&Array<R, f32>, bool),
        (c, store): (&mut Array<R, f32>, Store),
        bias: Pointer,
    ) -> Result<(), CudaError> {
        let [m, n, k] = shape;
        assert_eq!(
            [a.len(), b.len(), c.len()],
            [m * k, k * n, m * n],
            "a, b or c is not [m, k], [k, n] or [m, n]"
        );
        let factor = |x: &Array<R, f32>, transposed| Factor { at: x.pointer(), transposed };
        let factors = (factor(a, a_transposed), factor(b, b_transposed));
        // SAFETY: lengths are checked above; c is borrowed mutably; only `first_layer` passes a
        // bias, of length n.
        unsafe { self.gpu.product(shape, factors, (c.pointer(), store), bias, Activation::None) }
    }

    /// The terms of the first layer that depend on a token alone or on a pair alone.
    fn first_layer(
        &self,
        a: &Array<R, f32>,
        r: &Array<R, f32>,
        weights: &TargetWeights<&Array<R, f32>>,
    ) -> Result<FirstLayer<R>, CudaError> {
        let (gpu, plan, h0) = (self.gpu, self.plan, self.plan.shape.hidden0);
        let array = |rows: usize| gpu.array::<f32>(rows * h0);
        let (token, candidate, bias) = (array(plan.width)?, array(plan.width)?, array(1)?);
        let params = CombineParams {
            w0: weights.w0.pointer(),
            b0: weights.b0.pointer(),
            token: token.pointer(),
            candidate: candidate.pointer(),
            bias: bias.pointer(),
            width: plan.width as u32,
            hidden0: plan.hidden[0] as u32,
        };
        // SAFETY: `check` has checked the weights; the outputs have the sizes of this shape.
        unsafe {
            self.launch_for_both("target_combine", blocks((plan.width + 1) * h0, ROW_THREADS), &params)?
        };
        let (mut z, mut c) = (array(plan.counts.tokens)?, array(plan.counts.pairs)?);
        let plain = |x| (x, false);
        let shape = [plan.counts.tokens, h0, plan.width];
        gpu.one_group(|| {
            self.product(shape, plain(a), plain(&token), (&mut z, Store::Overwrite), 0)?;
            let shape = [plan.counts.pairs, h0, plan.width];
            let into = (&mut c, Store::Overwrite);
            self.product(shape, plain(r), plain(&candidate), into, bias.pointer())
        })?;
        Ok(FirstLayer { token, candidate, z, c })
    }

    /// Parameters of the MLP kernels, without the outputs.
    fn mlp_params(
        &self,
        [a, r]: [&Array<R, f32>; 2],
        first: &FirstLayer<R>,
        weights: &TargetWeights<&Array<R, f32>>,
        blocks: usize,
    ) -> MlpParams {
        let plan = self.plan;
        MlpParams {
            items: plan.items.pointer(),
            pairs: plan.pairs.pointer(),
            a: a.pointer(),
            r: r.pointer(),
            z: first.z.pointer(),
            c: first.c.pointer(),
            w0: weights.w0.pointer(),
            w1: weights.w1.pointer(),
            b1: weights.b1.pointer(),
            w2: weights.w2.pointer(),
            b2: weights.b2.pointer(),
            item_count: plan.items.len() as u32,
            width: plan.width as u32,
            hidden0: plan.hidden[0] as u32,
            hidden1: plan.hidden[1] as u32,
            blocks: blocks as u32,
            slope: plan.slope,
            ..MlpParams::zeroed()
        }
    }

    fn softmax(
        &self,
        s: &Array<R, f32>,
        TargetState { e, lse, att }: TargetState<&Array<R, f32>>,
        [datt, de, ds]: [Pointer; 3],
    ) -> SoftmaxParams {
        let plan = self.plan;
        SoftmaxParams {
            rows: plan.rows.pointer(),
            pairs: plan.pairs.pointer(),
            pair_rows: plan.pair_rows.pointer(),
            tiles: plan.tiles.pointer(),
            s: s.pointer(),
            e: e.pointer(),
            lse: lse.pointer(),
            att: att.pointer(),
            datt,
            de,
            ds,
            row_count: plan.rows.len() as u32,
            width: plan.width as u32,
        }
    }

    /// Parameters of a launch that adds the partial sums of backward: `hidden` and `input` for each
    /// row of `list`.
    fn sum(&self, list: Pointer, sums: &Array<R, f32>, [hidden, input]: [&Array<R, f32>; 2]) -> SumParams {
        let count = self.plan.counts.pairs as u32;
        let (sums, hidden, input) = (sums.pointer(), hidden.pointer(), input.pointer());
        SumParams { list, sums, hidden, input, count, width: self.plan.width as u32 }
    }
}

/// Number of blocks of an MLP pass over `items`: as many as are resident on the device at
/// once; each takes items in turn. More would wait for a second wave. The number of blocks
/// determines the order of summation of the weight gradients, so it depends on the batch, the
/// device and the compiled kernel only.
fn resident<R: Runtime>(
    gpu: &Gpu<R>,
    kernel: Kernel,
    block: Block,
    items: usize,
) -> Result<usize, CudaError> {
    let Launch { threads, shared_bytes, .. } = launch_of(block, 1);
    let at_once = gpu.runtime().resident_blocks(kernel, threads, shared_bytes)?;
    Ok(items.min(gpu.runtime().limits().multiprocessors * at_once.max(1)))
}

fn launch_of(block: Block, count: usize) -> Launch {
    Launch {
        grid: [count as u32, 1],
        threads: (block.warps * 32) as u32,
        shared_bytes: block.shared_bytes as u32,
    }
}

impl<R: Runtime> TargetAttention for Gpu<R> {
    type TargetPlan = TargetPlan<R>;

    fn target_plan(
        &self,
        staging: &mut Staging<R>,
        shape: TargetShape,
        index: TargetIndex<&[u32]>,
    ) -> Result<TargetPlan<R>, DeviceError> {
        Ok(TargetPlan::new(self, staging, shape, index)?)
    }

    fn target_attention(
        &self,
        plan: &TargetPlan<R>,
        inputs: TargetInputs<&Array<R, f32>>,
        weights: TargetWeights<&Array<R, f32>>,
        state: TargetState<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let TargetInputs { s, a, r } = inputs;
        let state = TargetState { e: &*state.e, lse: &*state.lse, att: &*state.att };
        plan.check(inputs, weights.map(Array::len), state);
        let (gpu, call, e) = (self, Call { gpu: self, plan }, state.e);
        let first = call.first_layer(a, r, &weights)?;
        let block = plan.shape.scores(Element::from(gpu.precision()));
        let kernel = call.kernel("target_scores");
        let count = resident(gpu, kernel, block, plan.items.len().div_ceil(WARPS))?;
        let params = MlpParams { e: e.pointer(), ..call.mlp_params([a, r], &first, &weights, count) };
        // SAFETY: `check` and `first_layer` have checked the shapes; the plan's lists stay inside
        // them; e is borrowed mutably.
        unsafe { call.launch("target_scores", launch_of(block, count), &params)? };
        let params = call.softmax(s, state, [0; 3]);
        // SAFETY: as above; lse and att are borrowed mutably.
        unsafe {
            call.launch_for_both("target_softmax", blocks(plan.rows.len(), ROW_THREADS / 32), &params)?
        };
        Ok(())
    }

    fn target_attention_backward(
        &self,
        plan: &TargetPlan<R>,
        inputs: TargetInputs<&Array<R, f32>>,
        weights: TargetWeights<&Array<R, f32>>,
        state: TargetState<&Array<R, f32>>,
        datt: &Array<R, f32>,
        gradients: TargetGradients<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let TargetInputs { s, a, r } = inputs;
        plan.check(inputs, weights.map(Array::len), state);
        let TargetGradients { ds, da, dr, weights: TargetWeights { w0, b0, w1, b1, w2, b2 } } = gradients;
        let written = TargetWeights { w0: &*w0, b0: &*b0, w1: &*w1, b1: &*b1, w2: &*w2, b2: &*b2 };
        let (of_inputs, of_rows) =
            (TargetInputs { s: &*ds, a: &*da, r: &*dr }, TargetState { att: datt, ..state });
        plan.check(of_inputs, written.map(Array::len), of_rows);
        let (gpu, call, counts, shape) = (self, Call { gpu: self, plan }, plan.counts, plan.shape);
        let (d, h0) = (plan.width, shape.hidden0);

        let de = gpu.array::<f32>(counts.scores)?;
        let params = call.softmax(s, state, [datt.pointer(), de.pointer(), ds.pointer()]);
        // SAFETY: `check` has checked the shapes; the plan's lists stay inside them; ds is borrowed
        // mutably.
        unsafe {
            let launch = launch_of(shape.softmax_backward(), plan.tiles.len());
            call.launch("target_softmax_backward", launch, &params)?;
        }

        let first = call.first_layer(a, r, &weights)?;
        let block = shape.backward(Element::from(gpu.precision()));
        let count = resident(gpu, call.kernel("target_backward"), block, plan.items.len())?;
        let token_sums = gpu.array::<f32>(plan.items.len() * 16 * shape.sums())?;
        let pair_sums = gpu.array::<f32>(plan.units * shape.sums())?;
        let weight_sums = gpu.array::<f32>(count * shape.weight_sums())?;
        let params = MlpParams {
            de: de.pointer(),
            token_sums: token_sums.pointer(),
            pair_sums: pair_sums.pointer(),
            weight_sums: weight_sums.pointer(),
            ..call.mlp_params([a, r], &first, &weights, count)
        };
        // SAFETY: as above; the sums have the sizes of all items, units and blocks.
        unsafe { call.launch("target_backward", launch_of(block, count), &params)? };

        let (dz, dc) = (gpu.array::<f32>(counts.tokens * h0)?, gpu.array::<f32>(counts.pairs * h0)?);
        // SAFETY: as above; da and dr are borrowed mutably; dz and dc were allocated above.
        unsafe {
            let params = call.sum(plan.tiles.pointer(), &token_sums, [&dz, da]);
            call.launch_for_both("target_sum_tokens", blocks(plan.tiles.len(), 1), &params)?;
            let params = call.sum(plan.pairs.pointer(), &pair_sums, [&dc, dr]);
            let quads = counts.pairs * shape.sums() / 4;
            call.launch_for_both("target_sum_pairs", blocks(quads, ROW_THREADS), &params)?;
        }

        let mut sums = gpu.array::<f32>(shape.weight_sums())?;
        let mut of_bias = gpu.array::<f32>(h0)?;
        let (mut of_token, mut of_candidate) = (gpu.array::<f32>(d * h0)?, gpu.array::<f32>(d * h0)?);
        let mut partial_sums = vec![Gpu::sum_of(&weight_sums, shape.weight_sums(), 0..count, 0, &mut sums)];
        let mut products = Vec::with_capacity(4);
        let mut partials = Vec::with_capacity(2);
        for (x, dx, hidden, weight, gradient, rows) in [
            (a, da, &dz, &first.token, &mut of_token, counts.tokens),
            (r, dr, &dc, &first.candidate, &mut of_candidate, counts.pairs),
        ] {
            let (stride, shares) = ((d + 1) * h0, shares_of(rows));
            let partial = gpu.array::<f32>(shares * stride)?;
            let (at, precision) = ((hidden.pointer(), 0), gpu.precision());
            products.push(Product::weight_gradient(
                [d, h0, rows],
                x.pointer(),
                at,
                partial.pointer(),
                precision,
            ));
            let (hidden, weight) = ((hidden.pointer(), false), (weight.pointer(), true));
            products.push(Product::new([rows, d, h0], hidden, weight, (dx.pointer(), Store::Add), precision));
            partial_sums.push(Gpu::sum_of(&partial, stride, 0..shares, 0, gradient));
            partials.push((partial, stride, shares));
        }
        let (of_pairs, stride, shares) = &partials[1];
        partial_sums.push(Gpu::sum_of(of_pairs, *stride, 0..*shares, d * h0, &mut of_bias));
        // SAFETY: `check` has checked the shapes; da and dr are borrowed mutably; the partial sums
        // have one row per share, and only these sums write the results, allocated above.
        unsafe {
            gpu.multiply(products)?;
            gpu.sum_now(partial_sums)?;
        }
        let params = GradientParams {
            token: of_token.pointer(),
            candidate: of_candidate.pointer(),
            bias: of_bias.pointer(),
            sums: sums.pointer(),
            w0: w0.pointer(),
            b0: b0.pointer(),
            w1: w1.pointer(),
            b1: b1.pointer(),
            w2: w2.pointer(),
            b2: b2.pointer(),
            width: d as u32,
            hidden0: plan.hidden[0] as u32,
            hidden1: plan.hidden[1] as u32,
            unused: 0,
        };
        let longest = w0.len().max(w1.len());
        let Launch { grid: [x, _], .. } = blocks(longest, ROW_THREADS);
        let launch = Launch { grid: [x, 3], ..blocks(longest, ROW_THREADS) };
        // SAFETY: `check` has checked the lengths of the gradients, which are borrowed mutably.
        unsafe { call.launch_for_both("target_gradients", launch, &params)? };
        Ok(())
    }
}
