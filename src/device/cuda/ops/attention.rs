//! FHA on the device: [`Gpu::attention_forward`] and [`Gpu::attention_backward`] on device arrays;
//! [`Gpu::forward`] and [`Gpu::backward`] on host slices, as in [`crate::attention`].

use super::convert;
use crate::attention::{FhaOptions, Inputs, length};
use crate::device::Precision;
use crate::device::cuda::array::{Array, Staging};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Define, Element, Kernel, Module, Value};
use crate::device::cuda::plan::attention::{Pass, Plan};
use crate::device::cuda::plan::params::{AttentionParams, Item};
use crate::device::cuda::plan::tile::{HEAD_DIMS, Room};
use crate::device::cuda::runtime::Runtime;
use crate::device::{Attention, DeviceError, Qkv, QkvGradients, SoftmaxState};

impl Pass {
    /// Entry point of the kernel.
    pub const fn entry(self) -> &'static str {
        match self {
            Pass::ForwardShort => "attention_forward_short",
            Pass::ForwardWhole(_) => "attention_forward_whole",
            Pass::Forward => "attention_forward",
            Pass::BackwardWhole(_) => "attention_backward_whole",
            Pass::DqWhole => "attention_dq_whole",
            Pass::DkDvWhole => "attention_dk_dv_whole",
            Pass::Dq => "attention_dq",
            Pass::DkDv => "attention_dk_dv",
        }
    }

    /// The kernel for this element type and head width.
    pub const fn kernel(self, element: Element, head_dim: usize) -> Kernel {
        Kernel { module: module(element, head_dim), entry: self.entry() }
    }
}

impl Kernel {
    /// The attention kernel that computes `of_8` of 8 exponentials of streamed 16-bit sequences by
    /// polynomials. 0 is the default kernel. For benchmarks.
    #[must_use]
    pub const fn with_polynomial(self, of_8: u32) -> Kernel {
        match of_8 {
            0 => self,
            _ => Kernel { module: self.module.with("DFAR_POLYNOMIAL", Define::Number(of_8)), ..self },
        }
    }
}

/// `attention/attention.cu` for an element type and head width.
pub const fn module(element: Element, head_dim: usize) -> Module {
    Module::new("attention/attention.cu")
        .with("DFAR_ELEMENT", Define::Word(element.cuda_name()))
        .with("DFAR_HEAD_DIM", Define::Number(head_dim as u32))
}

/// The plan of a batch on the device. Made once per batch and used by every layer.
pub struct Batch<R: Runtime> {
    options: FhaOptions,
    element: Element,
    plan: Plan,
    order: Array<R, u32>,
    feedback: Array<R, u32>,
    /// Work items of each pass, in the order of [`Pass::ALL`].
    items: Vec<Array<R, Item>>,
    polynomial: u32,
}

impl<R: Runtime> Batch<R> {
    /// The same batch for the kernels of [`Kernel::with_polynomial`].
    #[must_use]
    pub fn with_polynomial(self, of_8: u32) -> Self {
        Self { polynomial: of_8, ..self }
    }

    /// The plan: how the batch is cut into work items.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

/// `q`, `k` and `v` on the device, `[N, H, d]` each.
pub struct Projections<'a, R: Runtime, T> {
    /// Queries.
    pub q: &'a Array<R, T>,
    /// Keys.
    pub k: &'a Array<R, T>,
    /// Values.
    pub v: &'a Array<R, T>,
}

impl<R: Runtime, T> Clone for Projections<'_, R, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R: Runtime, T> Copy for Projections<'_, R, T> {}

/// Gradients of `q`, `k` and `v`, `[N, H, d]` each. Overwritten.
pub struct ProjectionGradients<'a, R: Runtime, T> {
    /// Gradient of the queries.
    pub dq: &'a mut Array<R, T>,
    /// Gradient of the keys.
    pub dk: &'a mut Array<R, T>,
    /// Gradient of the values.
    pub dv: &'a mut Array<R, T>,
}

/// A batch planned for the device's precision. Heads are padded to the next compiled width.
pub struct DevicePlan<R: Runtime> {
    /// Head width `d` of the tensors.
    head_dim: usize,
    /// The plan, with the padded head width.
    batch: Batch<R>,
}

impl<R: Runtime> DevicePlan<R> {
    /// Plans a batch. Use the plan after the staging was sent.
    ///
    /// # Errors
    /// Options, offsets or labels that are invalid; [`CudaError::HeadDim`] for a head width above
    /// the largest compiled one.
    pub fn new(
        gpu: &Gpu<R>,
        staging: &mut Staging<R>,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<Self, CudaError> {
        let head_dim = options.head_dim;
        let padded = HEAD_DIMS.into_iter().find(|&compiled| compiled >= head_dim);
        // The scale stays that of the unpadded width.
        let wide = FhaOptions { head_dim: padded.ok_or(CudaError::HeadDim { head_dim })?, ..*options };
        wide.check_packed(cu_seqlens.last().map_or(0, |&n| n as usize), cu_seqlens, label)?;
        let batch = gpu.plan(staging, gpu.precision().into(), &wide, cu_seqlens, label)?;
        Ok(Self { head_dim, batch })
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
        qkv: Qkv<&Array<R, f32>>,
        state: SoftmaxState<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let (Qkv { q, k, v }, SoftmaxState { o, lse }) = (qkv, state);
        match self.precision() {
            Precision::F32 if plan.head_dim == plan.batch.options.head_dim => {
                self.attention_forward(&plan.batch, Projections { q, k, v }, o, lse)?;
            }
            Precision::F32 => forward_converted::<R, f32>(self, plan, qkv, o, lse)?,
            Precision::Bf16 => forward_converted::<R, half::bf16>(self, plan, qkv, o, lse)?,
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        plan: &DevicePlan<R>,
        qkv: Qkv<&Array<R, f32>>,
        state: SoftmaxState<&Array<R, f32>>,
        d_o: &Array<R, f32>,
        gradients: QkvGradients<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        match self.precision() {
            Precision::F32 if plan.head_dim == plan.batch.options.head_dim => {
                let (Qkv { q, k, v }, QkvGradients { dq, dk, dv }) = (qkv, gradients);
                let (qkv, gradients) = (Projections { q, k, v }, ProjectionGradients { dq, dk, dv });
                Gpu::attention_backward(self, &plan.batch, qkv, state.o, state.lse, d_o, gradients)?;
            }
            Precision::F32 => backward_converted::<R, f32>(self, plan, qkv, state, d_o, gradients)?,
            Precision::Bf16 => backward_converted::<R, half::bf16>(self, plan, qkv, state, d_o, gradients)?,
        }
        Ok(())
    }
}

fn forward_converted<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    plan: &DevicePlan<R>,
    qkv: Qkv<&Array<R, f32>>,
    o: &mut Array<R, f32>,
    lse: &mut Array<R, f32>,
) -> Result<(), CudaError> {
    let (width, padded) = (plan.head_dim, plan.batch.options.head_dim);
    let narrow = |x| convert::to::<R, T>(gpu, (x, width), padded);
    let [q, k, v] = gpu.one_group(|| Ok::<_, CudaError>([narrow(qkv.q)?, narrow(qkv.k)?, narrow(qkv.v)?]))?;
    let mut narrow_o = gpu.array::<T>(o.len() / width * padded)?;
    gpu.attention_forward(&plan.batch, Projections { q: &q, k: &k, v: &v }, &mut narrow_o, lse)?;
    convert::from(gpu, (&narrow_o, padded), (o, width))
}

fn backward_converted<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    plan: &DevicePlan<R>,
    qkv: Qkv<&Array<R, f32>>,
    state: SoftmaxState<&Array<R, f32>>,
    d_o: &Array<R, f32>,
    gradients: QkvGradients<&mut Array<R, f32>>,
) -> Result<(), CudaError> {
    let (width, padded) = (plan.head_dim, plan.batch.options.head_dim);
    let narrow = |x| convert::to::<R, T>(gpu, (x, width), padded);
    let [q, k, v, o, d_o] = gpu.one_group(|| -> Result<_, CudaError> {
        Ok([narrow(qkv.q)?, narrow(qkv.k)?, narrow(qkv.v)?, narrow(state.o)?, narrow(d_o)?])
    })?;
    let [mut dq, mut dk, mut dv] = [gpu.array::<T>(q.len())?, gpu.array(q.len())?, gpu.array(q.len())?];
    let narrow_gradients = ProjectionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    let qkv = Projections { q: &q, k: &k, v: &v };
    gpu.attention_backward(&plan.batch, qkv, &o, state.lse, &d_o, narrow_gradients)?;
    gpu.one_group(|| {
        convert::from(gpu, (&dq, padded), (gradients.dq, width))?;
        convert::from(gpu, (&dk, padded), (gradients.dk, width))?;
        convert::from(gpu, (&dv, padded), (gradients.dv, width))
    })
}

impl<R: Runtime> Gpu<R> {
    /// Plans a batch and starts copying the plan to the device.
    ///
    /// # Errors
    /// The errors of [`Plan::new`], or a driver error.
    pub fn batch<T: Value>(&self, options: &FhaOptions, inputs: &Inputs<T>) -> Result<Batch<R>, CudaError> {
        options.check(inputs)?;
        let mut staging = Staging::new(self.runtime())?;
        let batch = self.plan(&mut staging, T::ELEMENT, options, inputs.cu_seqlens, inputs.label)?;
        staging.send()?;
        Ok(batch)
    }

    /// Stages the plan of a batch. The arguments have passed [`FhaOptions::check`].
    pub(crate) fn plan(
        &self,
        staging: &mut Staging<R>,
        element: Element,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<Batch<R>, CudaError> {
        let room = Room::of(self.runtime().limits().shared_per_block);
        let plan = Plan::new(element, options, cu_seqlens, label, room)?;
        let mut items = Vec::with_capacity(Pass::ALL.len());
        for pass in Pass::ALL {
            items.push(staging.add(plan.items(pass))?);
        }
        Ok(Batch {
            options: *options,
            element,
            order: staging.add(&plan.order)?,
            feedback: staging.add(&plan.feedback)?,
            items,
            polynomial: 0,
            plan,
        })
    }

    /// Checks that a buffer belongs to this device and holds `expected` values.
    fn check<T: Value>(
        &self,
        name: &'static str,
        shape: &'static str,
        buffer: &Array<R, T>,
        expected: usize,
    ) -> Result<(), CudaError> {
        if !buffer.is_on(self.runtime()) {
            return Err(CudaError::OtherDevice { name });
        }
        Ok(length(name, shape, buffer.len(), expected)?)
    }

    fn check_all<T: Value>(
        &self,
        batch: &Batch<R>,
        qkv: Projections<R, T>,
        o: &Array<R, T>,
        lse: &Array<R, f32>,
    ) -> Result<usize, CudaError> {
        if batch.element != T::ELEMENT {
            return Err(CudaError::Element { planned: batch.element, given: T::ELEMENT });
        }
        let (options, tokens) = (&batch.options, batch.plan.tokens);
        for (name, buffer) in [("q", qkv.q), ("k", qkv.k), ("v", qkv.v)] {
            self.check(name, "[N, H, d]", buffer, tokens * options.heads * options.head_dim)?;
        }
        self.check("o", "[N, Q, K, d]", o, options.output_len(tokens))?;
        self.check("lse", "[N, Q]", lse, options.lse_len(tokens))?;
        Ok(tokens)
    }

    /// [`crate::attention::forward`] on device arrays. Enqueues the work and returns.
    ///
    /// # Errors
    /// Arrays of the wrong length, element type or device; a kernel that does not compile; a driver
    /// error.
    pub fn attention_forward<T: Value>(
        &self,
        batch: &Batch<R>,
        qkv: Projections<R, T>,
        o: &mut Array<R, T>,
        lse: &mut Array<R, f32>,
    ) -> Result<(), CudaError> {
        self.check_all(batch, qkv, o, lse)?;
        let pointers = self.pointers(batch, qkv, o, lse);
        for &pass in Pass::FORWARD {
            // SAFETY: `check_all` has checked the shapes of all arrays that forward reads or
            // writes; o and lse are borrowed mutably.
            unsafe { self.run(batch, pass, pointers)? };
        }
        Ok(())
    }

    /// [`crate::attention::backward`] on device arrays. Enqueues the work and returns.
    ///
    /// # Errors
    /// As [`Gpu::attention_forward`].
    pub fn attention_backward<T: Value>(
        &self,
        batch: &Batch<R>,
        qkv: Projections<R, T>,
        o: &Array<R, T>,
        lse: &Array<R, f32>,
        d_o: &Array<R, T>,
        gradients: ProjectionGradients<R, T>,
    ) -> Result<(), CudaError> {
        let tokens = self.check_all(batch, qkv, o, lse)?;
        let (options, ProjectionGradients { dq, dk, dv }) = (&batch.options, gradients);
        self.check("d_o", "[N, Q, K, d]", d_o, options.output_len(tokens))?;
        for (name, buffer) in [("dq", &*dq), ("dk", &*dk), ("dv", &*dv)] {
            self.check(name, "[N, H, d]", buffer, tokens * options.heads * options.head_dim)?;
        }
        // Passed from the first pass over a sequence to the second. Freed stream-ordered, behind
        // the launches that use them.
        let two_passes = [Pass::DqWhole, Pass::Dq].into_iter().any(|pass| !batch.plan.items(pass).is_empty());
        let between = if two_passes { options.lse_len(tokens) } else { 0 };
        let delta = self.array::<f32>(between)?;
        let correction = self.array::<f32>(between)?;
        let pointers = AttentionParams {
            d_o: d_o.pointer(),
            delta: delta.pointer(),
            correction: correction.pointer(),
            dq: dq.pointer(),
            dk: dk.pointer(),
            dv: dv.pointer(),
            ..self.pointers(batch, qkv, o, lse)
        };
        for &pass in Pass::BACKWARD {
            // SAFETY: `check_all` and the checks above cover the shapes of all arrays that these
            // passes read or write; the gradients are borrowed mutably. delta and correction have
            // the shapes of the batch, are written by an earlier pass than reads them, and are
            // freed behind both on the same stream.
            unsafe { self.run(batch, pass, pointers)? };
        }
        Ok(())
    }

    /// The pointers that forward and backward share.
    fn pointers<T: Value>(
        &self,
        batch: &Batch<R>,
        qkv: Projections<R, T>,
        o: &Array<R, T>,
        lse: &Array<R, f32>,
    ) -> AttentionParams {
        AttentionParams {
            q: qkv.q.pointer(),
            k: qkv.k.pointer(),
            v: qkv.v.pointer(),
            o: o.pointer(),
            lse: lse.pointer(),
            // The arrays are empty without labels, so these pointers are null.
            order: batch.order.pointer(),
            feedback: batch.feedback.pointer(),
            ..AttentionParams::default()
        }
    }

    /// Launches one pass.
    ///
    /// # Safety
    /// Except for `items`, `pointers` refer to arrays of the shapes in attention/params.cuh for
    /// this batch and pass.
    unsafe fn run(&self, batch: &Batch<R>, pass: Pass, pointers: AttentionParams) -> Result<(), CudaError> {
        let kernel = pass.kernel(batch.element, batch.options.head_dim).with_polynomial(batch.polynomial);
        let items = batch.items[pass.index()].pointer();
        let launch = batch.plan.launch(&batch.options, pass);
        let params = batch.plan.params(&batch.options, pass, AttentionParams { items, ..pointers });
        // SAFETY: the kernel is the batch's variant; grid, items and scalars come from its plan;
        // the caller guarantees the pointers.
        unsafe { self.launch(kernel, launch, &params) }
    }

    /// [`crate::attention::forward`] on this device, with copies to the device and back.
    ///
    /// # Errors
    /// Invalid arguments, before anything is written; otherwise as [`Gpu::attention_forward`].
    pub fn forward<T: Value>(
        &self,
        options: &FhaOptions,
        inputs: Inputs<T>,
        o: &mut [T],
        lse: &mut [f32],
    ) -> Result<(), CudaError> {
        options.check_outputs(&inputs, o.len(), lse.len())?;
        let batch = self.batch(options, &inputs)?;
        let [q, k, v] = [self.copy_of(inputs.q)?, self.copy_of(inputs.k)?, self.copy_of(inputs.v)?];
        let (mut d_out, mut d_lse) = (self.array(o.len())?, self.array(lse.len())?);
        self.attention_forward(&batch, Projections { q: &q, k: &k, v: &v }, &mut d_out, &mut d_lse)?;
        d_out.copy_to(o)?;
        d_lse.copy_to(lse)
    }

    /// [`crate::attention::backward`] on this device, with copies to the device and back.
    /// `gradients` are `dq`, `dk`, `dv`.
    ///
    /// # Errors
    /// As [`Gpu::forward`].
    pub fn backward<T: Value>(
        &self,
        options: &FhaOptions,
        inputs: Inputs<T>,
        o: &[T],
        lse: &[f32],
        d_o: &[T],
        gradients: [&mut [T]; 3],
    ) -> Result<(), CudaError> {
        options.check_outputs(&inputs, o.len(), lse.len())?;
        length("d_o", "[N, Q, K, d]", d_o.len(), o.len())?;
        for (name, gradient) in ["dq", "dk", "dv"].into_iter().zip(&gradients) {
            length(name, "[N, H, d]", gradient.len(), inputs.q.len())?;
        }
        let batch = self.batch(options, &inputs)?;
        let [q, k, v] = [self.copy_of(inputs.q)?, self.copy_of(inputs.k)?, self.copy_of(inputs.v)?];
        let (o, lse, d_o) = (self.copy_of(o)?, self.copy_of(lse)?, self.copy_of(d_o)?);
        let width = inputs.q.len();
        let (mut dq, mut dk, mut dv) = (self.array(width)?, self.array(width)?, self.array(width)?);
        let on_device = ProjectionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        self.attention_backward(&batch, Projections { q: &q, k: &k, v: &v }, &o, &lse, &d_o, on_device)?;
        for (buffer, host) in [&dq, &dk, &dv].into_iter().zip(gradients) {
            buffer.copy_to(host)?;
        }
        Ok(())
    }
}
