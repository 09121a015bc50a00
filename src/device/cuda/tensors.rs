//! The attention operation on tensors of another library: in its device memory, on its stream.
//!
//! All work goes to the given stream: kernels, and the copy of the plan. Nothing uses the tensors
//! after the work that a call enqueues there, so their owner may free them in the order of the
//! stream. Scratch memory belongs to the stream too, and is used again by later calls on it.

use super::array::{Array, Staging};
use super::driver::context::Cuda;
use super::driver::once::Once;
use super::error::CudaError;
use super::gpu::Gpu;
use super::kernel::{Element, Pointer, Value};
use super::ops::attention::{DevicePlan, ProjectionGradients, Projections};
use crate::attention::FhaOptions;
use crate::device::{Attention, DeviceError, Precision, Qkv, QkvGradients, SoftmaxState};
use std::sync::Arc;

/// A GPU and a stream on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Device number.
    pub ordinal: usize,
    /// The `CUstream`; 0 or 1 for the legacy default stream. The per-thread default stream, 2, is
    /// refused.
    pub stream: u64,
}

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: u64 = 2;

/// A packed batch: what the host knows of it.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Options of the operation.
    pub options: &'a FhaOptions,
    /// Tokens `N` of all tensors.
    pub tokens: usize,
    /// `[B + 1]`: prefix sums of the lengths.
    pub cu_seqlens: &'a [u32],
    /// `[N]`: feedback of each token; empty without a label mask.
    pub label: &'a [u8],
}

/// Addresses of the tensors of both passes.
#[derive(Clone, Copy, Debug)]
pub struct Tensors {
    /// Type of all elements but those of `lse`, which are f32.
    pub element: Element,
    /// `q`, `k` and `v`, `[N, H, d]` each.
    pub qkv: [Pointer; 3],
    /// `[N, Q, K, d]`.
    pub o: Pointer,
    /// `[N, Q]`.
    pub lse: Pointer,
}

/// Addresses of the tensors of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// Gradient of `o`.
    pub d_o: Pointer,
    /// Gradients of `q`, `k` and `v`, overwritten.
    pub qkv: [Pointer; 3],
}

/// The streams in use, with their scratch memory.
#[derive(Default)]
pub struct Streams {
    devices: Once<usize, Arc<Cuda>>,
    places: Once<Place, Arc<Gpu<Cuda>>>,
}

impl Streams {
    /// [`crate::attention::forward`] on tensors of another library: writes `o` and `lse`. Enqueues
    /// the work and returns.
    ///
    /// # Errors
    /// Invalid arguments; a device, driver or library that cannot be used; a driver error.
    ///
    /// # Safety
    /// - The stream belongs to the primary context of the device, or is a default stream, and exists
    ///   until `self` is dropped. It is not being captured into a graph: the graph would read host
    ///   memory that later calls use again.
    /// - Each address refers to memory of the shape in [`Tensors`], which the device can access and
    ///   which stays until the work enqueued here has run. `o` and `lse` overlap no other.
    /// - Work on other streams is ordered with the stream as for a kernel launch with these
    ///   tensors.
    pub unsafe fn forward(&self, at: Place, batch: Packed, tensors: &Tensors) -> Result<(), DeviceError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.run(at, batch, tensors, None) }
    }

    /// [`crate::attention::backward`] on tensors of another library: reads `o` and `lse` of the
    /// forward pass, writes the gradients of `q`, `k` and `v`. Enqueues the work and returns.
    ///
    /// # Errors
    /// As [`Streams::forward`].
    ///
    /// # Safety
    /// As [`Streams::forward`], where the written tensors are the gradients of `q`, `k` and `v`.
    pub unsafe fn backward(
        &self,
        at: Place,
        batch: Packed,
        tensors: &Tensors,
        gradients: &Gradients,
    ) -> Result<(), DeviceError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.run(at, batch, tensors, Some(gradients)) }
    }

    /// Both passes.
    ///
    /// # Safety
    /// As [`Streams::forward`] without `gradients`, as [`Streams::backward`] with them.
    unsafe fn run(
        &self,
        at: Place,
        batch: Packed,
        tensors: &Tensors,
        gradients: Option<&Gradients>,
    ) -> Result<(), DeviceError> {
        if at.stream == PER_THREAD {
            return Err(CudaError::PerThreadStream.into());
        }
        check(batch, tensors, gradients)?;
        // SAFETY: guaranteed by the caller.
        let gpu = unsafe { self.gpu(at)? };
        // SAFETY: guaranteed by the caller; the arguments are checked.
        unsafe {
            match tensors.element {
                Element::F32 => in_f32(&gpu, batch, tensors, gradients),
                Element::Bf16 => direct::<half::bf16>(&gpu, batch, tensors, gradients),
                Element::F16 => direct::<half::f16>(&gpu, batch, tensors, gradients),
            }
        }
    }

    /// The GPU with this stream.
    ///
    /// # Safety
    /// The stream belongs to the primary context of the device, or is a default stream, and exists
    /// until `self` is dropped.
    unsafe fn gpu(&self, at: Place) -> Result<Arc<Gpu<Cuda>>, CudaError> {
        self.places.get(at, || {
            let device = self.devices.get(at.ordinal, || Cuda::new(at.ordinal).map(Arc::new))?;
            // SAFETY: guaranteed by the caller.
            let cuda = unsafe { device.on_stream(at.stream)? };
            Ok(Arc::new(Gpu::new(cuda, Precision::F32)))
        })
    }
}

fn check(batch: Packed, tensors: &Tensors, gradients: Option<&Gradients>) -> Result<(), CudaError> {
    let Packed { options, tokens, cu_seqlens, label } = batch;
    options.check_packed(tokens, cu_seqlens, label)?;
    if tokens == 0 {
        return Ok(());
    }
    let [q, k, v] = tensors.qkv;
    let mut named = vec![("q", q), ("k", k), ("v", v), ("o", tensors.o), ("lse", tensors.lse)];
    if let Some(&Gradients { d_o, qkv: [dq, dk, dv] }) = gradients {
        named.extend([("d_o", d_o), ("dq", dq), ("dk", dk), ("dv", dv)]);
    }
    match named.into_iter().find(|&(_, at)| at == 0 || !at.is_multiple_of(16)) {
        Some((name, at)) => Err(CudaError::Misaligned { name, at }),
        None => Ok(()),
    }
}

/// The tensors of a call as arrays.
struct Arrays<T> {
    qkv: [Array<Cuda, T>; 3],
    o: Array<Cuda, T>,
    lse: Array<Cuda, f32>,
    gradients: Option<GradientArrays<T>>,
}

/// `d_o`, then the gradients of `q`, `k` and `v`.
type GradientArrays<T> = (Array<Cuda, T>, [Array<Cuda, T>; 3]);

impl<T: Value> Arrays<T> {
    /// # Safety
    /// As [`Streams::run`].
    unsafe fn new(gpu: &Gpu<Cuda>, batch: Packed, tensors: &Tensors, gradients: Option<&Gradients>) -> Self {
        let Packed { options, tokens, .. } = batch;
        let (wide, out) = (tokens * options.heads * options.head_dim, options.output_len(tokens));
        // SAFETY: guaranteed by the caller; the lengths are those of the documented shapes.
        let array = |at, len| unsafe { Array::<Cuda, T>::borrowed(gpu.runtime(), at, len) };
        Self {
            qkv: tensors.qkv.map(|at| array(at, wide)),
            o: array(tensors.o, out),
            // SAFETY: as above.
            lse: unsafe { Array::borrowed(gpu.runtime(), tensors.lse, options.lse_len(tokens)) },
            gradients: gradients.map(|given| (array(given.d_o, out), given.qkv.map(|at| array(at, wide)))),
        }
    }
}

/// Kernels on the tensors themselves, in the types that the model does not have.
///
/// # Safety
/// As [`Streams::run`].
unsafe fn direct<T: Value>(
    gpu: &Gpu<Cuda>,
    batch: Packed,
    tensors: &Tensors,
    gradients: Option<&Gradients>,
) -> Result<(), DeviceError> {
    // SAFETY: guaranteed by the caller.
    let arrays = unsafe { Arrays::<T>::new(gpu, batch, tensors, gradients) };
    let Arrays { qkv: [q, k, v], mut o, mut lse, gradients } = arrays;
    let mut staging = Staging::new(gpu.runtime())?;
    let plan = gpu.plan(&mut staging, T::ELEMENT, batch.options, batch.cu_seqlens, batch.label)?;
    staging.send()?;
    let qkv = Projections { q: &q, k: &k, v: &v };
    match gradients {
        None => gpu.attention_forward(&plan, qkv, &mut o, &mut lse)?,
        Some((d_o, [mut dq, mut dk, mut dv])) => {
            let gradients = ProjectionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            Gpu::attention_backward(gpu, &plan, qkv, &o, &lse, &d_o, gradients)?;
        }
    }
    Ok(())
}

/// As the model's attention in f32, which pads heads of widths without a kernel.
///
/// # Safety
/// As [`Streams::run`].
unsafe fn in_f32(
    gpu: &Gpu<Cuda>,
    batch: Packed,
    tensors: &Tensors,
    gradients: Option<&Gradients>,
) -> Result<(), DeviceError> {
    // SAFETY: guaranteed by the caller.
    let arrays = unsafe { Arrays::<f32>::new(gpu, batch, tensors, gradients) };
    let Arrays { qkv: [q, k, v], mut o, mut lse, gradients } = arrays;
    let mut staging = Staging::new(gpu.runtime())?;
    let plan = DevicePlan::new(gpu, &mut staging, batch.options, batch.cu_seqlens, batch.label)?;
    staging.send()?;
    let qkv = Qkv { q: &q, k: &k, v: &v };
    match gradients {
        None => gpu.attention(&plan, qkv, SoftmaxState { o: &mut o, lse: &mut lse }),
        Some((d_o, [mut dq, mut dk, mut dv])) => {
            let gradients = QkvGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            let state = SoftmaxState { o: &o, lse: &lse };
            Attention::attention_backward(gpu, &plan, qkv, state, &d_o, gradients)
        }
    }
}
