//! FHA on the GPU: [`Cuda::attention_forward`] and [`Cuda::attention_backward`] on device buffers, and
//! [`Cuda::forward`] and [`Cuda::backward`], the same operation as [`crate::attention`] has, on slices.

use super::compile::Variant;
use super::context::Cuda;
use super::params::{AttentionParams, Item};
use super::plan::{Pass, Plan};
use super::tile::Element;
use super::{CudaError, launch};
use crate::attention::{FhaOptions, Inputs, length};
use cudarc::driver::{CudaSlice, DeviceRepr};

/// A type tensors can have.
pub trait Value: DeviceRepr + bytemuck::Pod {
    /// Which one.
    const ELEMENT: Element;
}
impl Value for f32 {
    const ELEMENT: Element = Element::F32;
}
impl Value for half::bf16 {
    const ELEMENT: Element = Element::Bf16;
}
impl Value for half::f16 {
    const ELEMENT: Element = Element::F16;
}

/// What the kernels need to know about a batch, on the device. Made once per batch, used by every layer.
pub struct Batch {
    options: FhaOptions,
    element: Element,
    plan: Plan,
    order: CudaSlice<u32>,
    feedback: CudaSlice<u32>,
    items: [CudaSlice<Item>; Pass::ALL.len()],
}

/// `q`, `k` and `v` on the device, `[N, H, d]` each.
#[derive(Clone, Copy)]
pub struct Projections<'a, T> {
    /// Queries.
    pub q: &'a CudaSlice<T>,
    /// Keys.
    pub k: &'a CudaSlice<T>,
    /// Values.
    pub v: &'a CudaSlice<T>,
}

/// Their gradients, `[N, H, d]` each, overwritten.
pub struct ProjectionGradients<'a, T> {
    /// Of the queries.
    pub dq: &'a mut CudaSlice<T>,
    /// Of the keys.
    pub dk: &'a mut CudaSlice<T>,
    /// Of the values.
    pub dv: &'a mut CudaSlice<T>,
}

impl Cuda {
    /// Plans a batch and copies the plan to the device.
    ///
    /// # Errors
    /// Those of [`Plan::new`], and of the driver.
    pub fn batch<T: Value>(&self, options: &FhaOptions, inputs: &Inputs<T>) -> Result<Batch, CudaError> {
        options.check(inputs)?;
        let plan = Plan::new(T::ELEMENT, options, inputs.cu_seqlens, inputs.label, self.shared_limit())?;
        let [whole, forward, delta, dq, dk_dv] = Pass::ALL.map(|pass| self.upload(plan.items(pass)));
        Ok(Batch {
            options: *options,
            element: T::ELEMENT,
            order: self.upload(&plan.order)?,
            feedback: self.upload(&plan.feedback)?,
            items: [whole?, forward?, delta?, dq?, dk_dv?],
            plan,
        })
    }

    /// Checks that a buffer is this device's and holds `expected` values (room for one where there are none).
    fn check<T>(
        &self,
        name: &'static str,
        shape: &'static str,
        buffer: &CudaSlice<T>,
        expected: usize,
    ) -> Result<(), CudaError> {
        if buffer.context() != self.stream().context() {
            return Err(CudaError::OtherDevice { name });
        }
        Ok(length(name, shape, buffer.len(), expected.max(1))?)
    }

    fn check_all<T: Value>(
        &self,
        batch: &Batch,
        qkv: Projections<T>,
        o: &CudaSlice<T>,
        lse: &CudaSlice<f32>,
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

    /// [`crate::attention::forward`] on device buffers; returns when the work is on the stream.
    ///
    /// # Errors
    /// Buffers that do not fit the batch, a kernel that cannot be compiled, and what the driver reports.
    pub fn attention_forward<T: Value>(
        &self,
        batch: &Batch,
        qkv: Projections<T>,
        o: &mut CudaSlice<T>,
        lse: &mut CudaSlice<f32>,
    ) -> Result<(), CudaError> {
        self.check_all(batch, qkv, o, lse)?;
        let params = self.params(batch, qkv, o, lse);
        for pass in [Pass::ForwardWhole, Pass::Forward] {
            // SAFETY: `check_all` has found all that forward reads and writes to be of the batch's shape, and o and lse are
            // borrowed mutably.
            unsafe { self.run(batch, pass, params)? };
        }
        Ok(())
    }

    /// [`crate::attention::backward`] on device buffers; returns when the work is on the stream.
    ///
    /// # Errors
    /// As [`Cuda::attention_forward`].
    pub fn attention_backward<T: Value>(
        &self,
        batch: &Batch,
        qkv: Projections<T>,
        o: &CudaSlice<T>,
        lse: &CudaSlice<f32>,
        d_o: &CudaSlice<T>,
        gradients: ProjectionGradients<T>,
    ) -> Result<(), CudaError> {
        let tokens = self.check_all(batch, qkv, o, lse)?;
        let (options, ProjectionGradients { dq, dk, dv }) = (&batch.options, gradients);
        self.check("d_o", "[N, Q, K, d]", d_o, options.output_len(tokens))?;
        for (name, buffer) in [("dq", &*dq), ("dk", &*dk), ("dv", &*dv)] {
            self.check(name, "[N, H, d]", buffer, tokens * options.heads * options.head_dim)?;
        }
        // Freed in stream order, when the launches that use them are done.
        let delta = self.unwritten::<f32>(options.lse_len(tokens))?;
        let correction = self.unwritten::<f32>(options.lse_len(tokens))?;
        let stream = self.stream();
        let params = AttentionParams {
            d_o: launch::address(d_o, stream),
            delta: launch::address(&delta, stream),
            correction: launch::address(&correction, stream),
            dq: launch::address(dq, stream),
            dk: launch::address(dk, stream),
            dv: launch::address(dv, stream),
            ..self.params(batch, qkv, o, lse)
        };
        for pass in [Pass::Delta, Pass::Dq, Pass::DkDv] {
            // SAFETY: `check_all` and the checks above have found all that these passes read and write to be of the batch's
            // shape; the gradients are borrowed mutably; delta and correction were made for it, are written before they
            // are read, in the order of the passes, and are freed behind them on the same stream.
            unsafe { self.run(batch, pass, params)? };
        }
        Ok(())
    }

    /// Arguments that both directions share.
    fn params<T>(
        &self,
        batch: &Batch,
        qkv: Projections<T>,
        o: &CudaSlice<T>,
        lse: &CudaSlice<f32>,
    ) -> AttentionParams {
        let stream = self.stream();
        let labelled = !batch.plan.feedback.is_empty();
        let or_null = |buffer| if labelled { launch::address(buffer, stream) } else { 0 };
        AttentionParams {
            q: launch::address(qkv.q, stream),
            k: launch::address(qkv.k, stream),
            v: launch::address(qkv.v, stream),
            o: launch::address(o, stream),
            lse: launch::address(lse, stream),
            order: or_null(&batch.order),
            feedback: or_null(&batch.feedback),
            ..batch.plan.params(&batch.options)
        }
    }

    /// # Safety
    /// Pointers of `params`, but for `items`, are as [`launch::attention`] needs them for this batch and pass.
    unsafe fn run(&self, batch: &Batch, pass: Pass, params: AttentionParams) -> Result<(), CudaError> {
        let kernels = self.kernels(Variant { element: batch.element, head_dim: batch.options.head_dim })?;
        let items = launch::address(&batch.items[pass as usize], self.stream());
        let (kernel, launch) = (&kernels[pass as usize], batch.plan.launch(&batch.options, pass));
        // SAFETY: the kernel is of the batch's variant; grid, items and scalars are of its one plan; the rest is the caller's.
        unsafe { launch::attention(self.stream(), kernel, launch, &AttentionParams { items, ..params }) }
            .map_err(|error| CudaError::driver(pass.entry(), error, 0))
    }

    /// [`crate::attention::forward`] on this device: copies there, computes, copies back.
    ///
    /// # Errors
    /// Arguments the operation refuses (nothing is written then), and as [`Cuda::attention_forward`].
    pub fn forward<T: Value>(
        &self,
        options: &FhaOptions,
        inputs: Inputs<T>,
        o: &mut [T],
        lse: &mut [f32],
    ) -> Result<(), CudaError> {
        options.check_outputs(&inputs, o.len(), lse.len())?;
        let batch = self.batch(options, &inputs)?;
        let [q, k, v] = [self.upload(inputs.q)?, self.upload(inputs.k)?, self.upload(inputs.v)?];
        let (mut d_out, mut d_lse) = (self.unwritten(o.len())?, self.unwritten(lse.len())?);
        self.attention_forward(&batch, Projections { q: &q, k: &k, v: &v }, &mut d_out, &mut d_lse)?;
        self.download(&d_out, o)?;
        self.download(&d_lse, lse)
    }

    /// [`crate::attention::backward`] on this device: copies there, computes, copies back. `gradients` are `dq`, `dk`, `dv`.
    ///
    /// # Errors
    /// As [`Cuda::forward`].
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
        let [q, k, v] = [self.upload(inputs.q)?, self.upload(inputs.k)?, self.upload(inputs.v)?];
        let (o, lse, d_o) = (self.upload(o)?, self.upload(lse)?, self.upload(d_o)?);
        let width = inputs.q.len();
        let (mut dq, mut dk, mut dv) =
            (self.unwritten(width)?, self.unwritten(width)?, self.unwritten(width)?);
        let on_device = ProjectionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        self.attention_backward(&batch, Projections { q: &q, k: &k, v: &v }, &o, &lse, &d_o, on_device)?;
        for (buffer, host) in [&dq, &dk, &dv].into_iter().zip(gradients) {
            self.download(buffer, host)?;
        }
        Ok(())
    }
}
