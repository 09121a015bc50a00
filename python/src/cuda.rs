//! `fha` and `fha_backward` on tensors in the memory of a GPU, which PyTorch owns.
//!
//! `dfar.torch` passes addresses and the stream, having checked types, shapes and layouts. The
//! results are tensors of PyTorch too.

use crate::attention::{Indices, Options};
use dfar::attention::FhaOptions;
use dfar::device::DeviceError;
use dfar::device::cuda::tensors::{Gradients, Packed, Place, Streams, Tensors};
use dfar::device::cuda::{CudaError, Element};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::sync::OnceLock;

/// Never dropped: at the end of the process, the driver may be gone before.
static STREAMS: OnceLock<Streams> = OnceLock::new();

/// A call's device number, stream and dtype.
type Where = (usize, u64, String);

/// The arguments that both passes share.
struct Call {
    at: Place,
    options: FhaOptions,
    tokens: usize,
    indices: Indices,
    tensors: Tensors,
}

impl Call {
    fn new(
        (ordinal, stream, dtype): Where,
        (tokens, heads, width): (usize, usize, usize),
        (qkv, o, lse): ([u64; 3], u64, u64),
        indices: Indices,
        given: Options<'_>,
    ) -> PyResult<Self> {
        let element = match dtype.as_str() {
            "float32" => Element::F32,
            "bfloat16" => Element::Bf16,
            "float16" => Element::F16,
            other => {
                return Err(PyTypeError::new_err(format!(
                    "q has dtype {other}, but must be float32, bfloat16 or float16"
                )));
            }
        };
        let options = given.resolve(heads, width)?;
        let tensors = Tensors { element, qkv, o, lse };
        Ok(Self { at: Place { ordinal, stream }, options, tokens, indices, tensors })
    }

    fn batch(&self) -> Packed<'_> {
        Packed {
            options: &self.options,
            tokens: self.tokens,
            cu_seqlens: &self.indices.cu_seqlens,
            label: &self.indices.label,
        }
    }
}

/// Enqueues the forward pass. `place` is the device number, the stream and the dtype; `shape` is
/// that of `q`; `tensors` are the addresses of `q`, `k`, `v`, then `o` and `lse`, which it writes.
#[pyfunction]
#[pyo3(signature = (
    place, shape, tensors, cu_seqlens, label, normalization, causal, label_mask, scale
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn fha_cuda(
    py: Python<'_>,
    place: Where,
    shape: (usize, usize, usize),
    tensors: ([u64; 3], u64, u64),
    cu_seqlens: &Bound<'_, PyAny>,
    label: Option<&Bound<'_, PyAny>>,
    normalization: &str,
    causal: bool,
    label_mask: bool,
    scale: Option<f64>,
) -> PyResult<()> {
    let given = Options { normalization, causal, label_mask, scale };
    let call = Call::new(place, shape, tensors, Indices::new(cu_seqlens, label, label_mask)?, given)?;
    let streams = STREAMS.get_or_init(Streams::default);
    // SAFETY: `dfar.torch` passes the current stream, and addresses of contiguous tensors on its
    // device with these shapes and types, `o` and `lse` newly allocated. PyTorch frees them in the
    // order of that stream, and its streams are not destroyed.
    py.detach(|| unsafe { streams.forward(call.at, call.batch(), &call.tensors) }).map_err(refused)
}

/// Enqueues the backward pass: `gradients` are the addresses of `d_o`, then `dq`, `dk` and `dv`,
/// which it writes.
#[pyfunction]
#[pyo3(signature = (
    place, shape, tensors, gradients, cu_seqlens, label, normalization, causal, label_mask, scale
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn fha_backward_cuda(
    py: Python<'_>,
    place: Where,
    shape: (usize, usize, usize),
    tensors: ([u64; 3], u64, u64),
    gradients: (u64, [u64; 3]),
    cu_seqlens: &Bound<'_, PyAny>,
    label: Option<&Bound<'_, PyAny>>,
    normalization: &str,
    causal: bool,
    label_mask: bool,
    scale: Option<f64>,
) -> PyResult<()> {
    let given = Options { normalization, causal, label_mask, scale };
    let call = Call::new(place, shape, tensors, Indices::new(cu_seqlens, label, label_mask)?, given)?;
    let gradients = Gradients { d_o: gradients.0, qkv: gradients.1 };
    let streams = STREAMS.get_or_init(Streams::default);
    // SAFETY: as in `fha_cuda`; the gradients are newly allocated.
    py.detach(|| unsafe { streams.backward(call.at, call.batch(), &call.tensors, &gradients) })
        .map_err(refused)
}

/// A `ValueError` for arguments, a `RuntimeError` for the GPU and its libraries.
fn refused(error: DeviceError) -> PyErr {
    let message = error.to_string();
    match CudaError::of(&error) {
        Some(CudaError::Attention(error)) => crate::attention::invalid(error),
        Some(error) if error.is_argument() => PyValueError::new_err(message),
        _ => PyRuntimeError::new_err(message),
    }
}
