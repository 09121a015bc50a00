//! `fha` and `fha_backward` on NumPy arrays; the arguments that all forms share.

use crate::arrays::{Floats, exact, integers};
use crate::errors::named;
use crate::results::unset;
use crate::threads;
use dfar::attention::{self, AttentionError, FhaOptions, Gradients, Inputs, LabelMask, Normalization};
use numpy::ndarray::{Ix2, Ix3, Ix4};
use numpy::{PyArray2, PyArray3, PyArray4, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The arguments that both passes share, checked.
struct Arguments<'py> {
    q: Floats<'py>,
    k: Floats<'py>,
    v: Floats<'py>,
    indices: Indices,
    options: FhaOptions,
}

/// `cu_seqlens` and `label`, copied.
pub struct Indices {
    pub cu_seqlens: Vec<u32>,
    /// Empty without labels.
    pub label: Vec<u8>,
}

impl Indices {
    pub fn new(
        cu_seqlens: &Bound<'_, PyAny>,
        label: Option<&Bound<'_, PyAny>>,
        label_mask: bool,
    ) -> PyResult<Self> {
        // The engine's own types first: one copy, without a conversion.
        let cu_seqlens = match exact::<u32>(cu_seqlens) {
            Some(lengths) => lengths,
            None => {
                integers(cu_seqlens, "cu_seqlens", "0 to 4294967295", |length| u32::try_from(length).ok())?
            }
        };
        let label = match label {
            Some(label) => match exact::<u8>(label) {
                Some(labels) if labels.iter().all(|&label| label <= 1) => labels,
                _ => integers(label, "label", "0 (skipped) or 1 (liked)", |label| match label {
                    0 | 1 => Some(label as u8),
                    _ => None,
                })?,
            },
            None if label_mask => {
                return Err(PyTypeError::new_err("label is None, but label_mask is True"));
            }
            None => Vec::new(),
        };
        Ok(Self { cu_seqlens, label })
    }
}

/// Options as Python gives them.
pub struct Options<'a> {
    pub normalization: &'a str,
    pub causal: bool,
    pub label_mask: bool,
    pub scale: Option<f64>,
}

impl Options<'_> {
    /// The options of the engine, for this many heads of this width.
    pub fn resolve(&self, heads: usize, width: usize) -> PyResult<FhaOptions> {
        let known = [("joint", Normalization::Joint), ("masked", Normalization::Masked)];
        let normalization = named("normalization", self.normalization, &known)?;
        let mut options = FhaOptions::new(heads, width);
        options.label_mask = if self.label_mask { LabelMask::Feedback } else { LabelMask::None };
        options.normalization = normalization;
        options.causal = self.causal;
        match self.scale {
            Some(scale) => options.scale = scale as f32,
            // Without a scale, a head width of 0 is reported as such.
            None if width == 0 => options.scale = 1.0,
            None => {}
        }
        Ok(options)
    }
}

impl<'py> Arguments<'py> {
    fn new(
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        cu_seqlens: &Bound<'py, PyAny>,
        label: Option<&Bound<'py, PyAny>>,
        given: Options<'_>,
    ) -> PyResult<Self> {
        let shape = ["N", "H", "d"];
        let q = Floats::new(q, "q", &shape)?;
        let (k, v) = (Floats::new(k, "k", &shape)?, Floats::new(v, "v", &shape)?);
        k.require_shape("k", q.shape(), "q")?;
        v.require_shape("v", q.shape(), "q")?;
        let indices = Indices::new(cu_seqlens, label, given.label_mask)?;
        let options = given.resolve(q.shape()[1], q.shape()[2])?;
        let arguments = Self { q, k, v, indices, options };
        options.check(&arguments.inputs()).map_err(|error| invalid(&error))?;
        Ok(arguments)
    }

    fn tokens(&self) -> usize {
        self.q.shape()[0]
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: self.q.values(),
            k: self.k.values(),
            v: self.v.values(),
            cu_seqlens: &self.indices.cu_seqlens,
            label: &self.indices.label,
        }
    }

    /// The shape of `o`.
    fn output_shape(&self) -> [usize; 4] {
        let FhaOptions { head_dim, .. } = self.options;
        [self.tokens(), self.options.query_slots(), self.options.key_slots(), head_dim]
    }
}

/// The forward pass: `o` and `lse`.
#[pyfunction]
#[pyo3(signature = (q, k, v, cu_seqlens, label, normalization, causal, label_mask, scale))]
#[expect(
    clippy::too_many_arguments,
    clippy::type_complexity,
    reason = "the arguments of the Python function"
)]
pub fn fha<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    cu_seqlens: &Bound<'py, PyAny>,
    label: Option<&Bound<'py, PyAny>>,
    normalization: &str,
    causal: bool,
    label_mask: bool,
    scale: Option<f64>,
) -> PyResult<(Bound<'py, PyArray4<f32>>, Bound<'py, PyArray2<f32>>)> {
    let given = Options { normalization, causal, label_mask, scale };
    let arguments = Arguments::new([q, k, v], cu_seqlens, label, given)?;
    let [tokens, slots, keys, width] = arguments.output_shape();
    let o = unset(py, Ix4(tokens, slots, keys, width))?;
    let lse = unset(py, Ix2(tokens, slots))?;
    {
        let (mut o, mut lse) = (o.readwrite(), lse.readwrite());
        let (o, lse) = (o.as_slice_mut()?, lse.as_slice_mut()?);
        let (options, inputs) = (arguments.options, arguments.inputs());
        // Overwrites all of `o` and `lse`.
        py.detach(|| threads::compute(tokens, || attention::forward(&options, inputs, o, lse)))?
            .map_err(|error| invalid(&error))?;
    }
    Ok((o, lse))
}

/// The backward pass: `dq`, `dk`, `dv`.
#[pyfunction]
#[pyo3(signature = (d_o, q, k, v, o, lse, cu_seqlens, label, normalization, causal, label_mask, scale))]
#[expect(
    clippy::too_many_arguments,
    clippy::type_complexity,
    reason = "the arguments of the Python function"
)]
pub fn fha_backward<'py>(
    py: Python<'py>,
    d_o: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    o: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    cu_seqlens: &Bound<'py, PyAny>,
    label: Option<&Bound<'py, PyAny>>,
    normalization: &str,
    causal: bool,
    label_mask: bool,
    scale: Option<f64>,
) -> PyResult<(Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>, Bound<'py, PyArray3<f32>>)> {
    let given = Options { normalization, causal, label_mask, scale };
    let arguments = Arguments::new([q, k, v], cu_seqlens, label, given)?;
    let shape = ["N", "Q", "K", "d"];
    let (d_o, o) = (Floats::new(d_o, "d_o", &shape)?, Floats::new(o, "o", &shape)?);
    let lse = Floats::new(lse, "lse", &shape[..2])?;
    let of = "an output for this q";
    d_o.require_shape("d_o", &arguments.output_shape(), of)?;
    o.require_shape("o", &arguments.output_shape(), of)?;
    lse.require_shape("lse", &arguments.output_shape()[..2], of)?;

    let (tokens, heads, width) = (arguments.tokens(), arguments.options.heads, arguments.options.head_dim);
    let shape = Ix3(tokens, heads, width);
    let (dq, dk, dv) = (unset(py, shape)?, unset(py, shape)?, unset(py, shape)?);
    {
        let (mut dq, mut dk, mut dv) = (dq.readwrite(), dk.readwrite(), dv.readwrite());
        let gradients = Gradients { dq: dq.as_slice_mut()?, dk: dk.as_slice_mut()?, dv: dv.as_slice_mut()? };
        let (options, inputs) = (arguments.options, arguments.inputs());
        let (o, lse, d_o) = (o.values(), lse.values(), d_o.values());
        // Overwrites all gradients.
        let run = || attention::backward(&options, inputs, o, lse, d_o, gradients);
        py.detach(|| threads::compute(tokens, run))?.map_err(|error| invalid(&error))?;
    }
    Ok((dq, dk, dv))
}

/// The address at which the engine reads an array, for tests that nothing is copied.
#[pyfunction]
pub fn address(array: &Bound<'_, PyAny>) -> PyResult<usize> {
    let dimensions = array.getattr("ndim")?.extract()?;
    Ok(Floats::new(array, "array", &vec!["n"; dimensions])?.values().as_ptr().addr())
}

/// A `ValueError` with the engine's message and the name of the argument.
pub fn invalid(error: &AttentionError) -> PyErr {
    let message = error.to_string();
    let message = message.strip_prefix("attention: ").unwrap_or(&message);
    PyValueError::new_err(match error {
        AttentionError::Zero { .. } | AttentionError::OddHeads { .. } => {
            format!("q has a shape [N, H, d] that is refused: {message}")
        }
        _ => message.to_owned(),
    })
}
