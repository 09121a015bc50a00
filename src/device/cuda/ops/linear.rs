//! Linear layers: products by [`Runtime::gemm`], and what is around them from `rows.cu`.

use super::rows::{self, Dy};
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::Pointer;
use crate::device::cuda::runtime::{Gemm, Runtime};
use crate::device::{Activation, Store};

/// A matrix in memory, and whether it is used transposed.
#[derive(Clone, Copy)]
pub(crate) struct Factor {
    pub(crate) at: Pointer,
    pub(crate) transposed: bool,
}

impl Factor {
    fn plain(at: Pointer) -> Self {
        Self { at, transposed: false }
    }
    fn transposed(at: Pointer) -> Self {
        Self { at, transposed: true }
    }
}

impl<R: Runtime> Gpu<R> {
    /// `c (+)= activation(a b + bias)`.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], but any size may be 0.
    pub(crate) unsafe fn product(
        &self,
        shape: [usize; 3],
        (a, b): (Factor, Factor),
        (c, store): (Pointer, Store),
        bias: Pointer,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let [m, n, k] = shape;
        if m == 0 || n == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promises; an empty sum is 0, and only sums without a bias are ever empty.
        unsafe {
            if k == 0 {
                return if store == Store::Overwrite {
                    self.runtime().zero(c, m * n * size_of::<f32>())
                } else {
                    Ok(())
                };
            }
            self.runtime().gemm(&Gemm {
                shape,
                a: a.at,
                a_transposed: a.transposed,
                b: b.at,
                b_transposed: b.transposed,
                c,
                store,
                bias,
                activation,
                precision: self.precision(),
            })
        }
    }
}

/// Rows of `x` and `y`, checked against the widths.
fn rows_of(x: usize, y: usize, (inputs, outputs): (usize, usize)) -> usize {
    assert!(inputs > 0 && outputs > 0, "a layer without inputs or outputs");
    let rows = x / inputs;
    assert_eq!((x, y), (rows * inputs, rows * outputs), "x is not [n, inputs], or y not [n, outputs]");
    rows
}

/// See [`crate::device::Device::linear`].
pub(crate) fn forward<R: Runtime>(
    gpu: &Gpu<R>,
    x: &Array<R, f32>,
    w: &Array<R, f32>,
    bias: Option<&Array<R, f32>>,
    activation: Activation,
    (y, store): (&mut Array<R, f32>, Store),
    widths: (usize, usize),
) -> Result<(), CudaError> {
    let (inputs, outputs) = widths;
    let rows = rows_of(x.len(), y.len(), widths);
    assert_eq!(w.len(), inputs * outputs, "w is not [inputs, outputs]");
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "bias is not [outputs]");
    if store == Store::Add && (bias.is_some() || activation != Activation::None) {
        let mut sum = gpu.array(y.len())?;
        forward(gpu, x, w, bias, activation, (&mut sum, Store::Overwrite), widths)?;
        return rows::add(gpu, &sum, y);
    }
    let factors = (Factor::plain(x.pointer()), Factor::plain(w.pointer()));
    // SAFETY: lengths are checked above, and y is borrowed mutably.
    unsafe {
        gpu.product(
            [rows, outputs, inputs],
            factors,
            (y.pointer(), store),
            bias.map_or(0, Array::pointer),
            activation,
        )
    }
}

/// See [`crate::device::Device::linear_backward`].
pub(crate) fn backward<R: Runtime>(
    gpu: &Gpu<R>,
    x: &Array<R, f32>,
    w: &Array<R, f32>,
    activation: Activation,
    y: &Array<R, f32>,
    dy: &mut Array<R, f32>,
    dx: Option<(&mut Array<R, f32>, Store)>,
    dw: &mut Array<R, f32>,
    dbias: Option<&mut Array<R, f32>>,
    widths: (usize, usize),
) -> Result<(), CudaError> {
    let (inputs, outputs) = widths;
    let rows = rows_of(x.len(), dy.len(), widths);
    assert_eq!([w.len(), dw.len()], [inputs * outputs; 2], "w or dw is not [inputs, outputs]");
    match (activation, dbias) {
        (Activation::None, None) => {}
        (Activation::None, dbias) => rows::column_sums(gpu, outputs, None, Dy::Read(dy), dbias)?,
        (Activation::Relu, dbias) => rows::column_sums(gpu, outputs, Some(y), Dy::Updated(dy), dbias)?,
    }
    let (x_at, dy_at) = (x.pointer(), dy.pointer());
    // SAFETY: lengths are checked above, and below for dx; dw and dx are borrowed mutably.
    unsafe {
        let factors = (Factor::transposed(x_at), Factor::plain(dy_at));
        let dw = (dw.pointer(), Store::Overwrite);
        gpu.product([inputs, outputs, rows], factors, dw, 0, Activation::None)?;
        if let Some((dx, store)) = dx {
            assert_eq!(dx.len(), x.len(), "dx and x differ in length");
            let factors = (Factor::plain(dy_at), Factor::transposed(w.pointer()));
            gpu.product([rows, inputs, outputs], factors, (dx.pointer(), store), 0, Activation::None)?;
        }
    }
    Ok(())
}

/// See [`crate::device::Device::label_linear`]: rows are brought into the order of their labels, so that each half of the weight
/// meets one piece of memory.
pub(crate) fn label_forward<R: Runtime>(
    gpu: &Gpu<R>,
    x: &Array<R, f32>,
    w: &Array<R, f32>,
    bias: &Array<R, f32>,
    tokens_by_label: [&Array<R, u32>; 2],
    y: (&mut Array<R, f32>, Store),
    widths: (usize, usize),
) -> Result<(), CudaError> {
    let (inputs, outputs) = widths;
    rows_of(x.len(), y.0.len(), widths);
    assert_eq!(w.len(), 2 * inputs * outputs, "w is not [2 * inputs, outputs]");
    assert_eq!(bias.len(), outputs, "bias is not [outputs]");
    let sorted_x = rows::split(gpu, inputs, tokens_by_label, x)?;
    let sorted_y = gpu.array::<f32>(y.0.len())?;
    for (label, first) in [(0, 0), (1, tokens_by_label[0].len())] {
        let factors = (
            Factor::plain(sorted_x.pointer_at(first * inputs)),
            Factor::plain(w.pointer_at(label * inputs * outputs)),
        );
        let c = (sorted_y.pointer_at(first * outputs), Store::Overwrite);
        let shape = [tokens_by_label[label].len(), outputs, inputs];
        // SAFETY: `split` has checked that the two labels' rows are all rows; the result was made for as many.
        unsafe { gpu.product(shape, factors, c, bias.pointer(), Activation::None)? };
    }
    rows::merge(gpu, outputs, tokens_by_label, &sorted_y, y)
}

/// See [`crate::device::Device::label_linear_backward`].
pub(crate) fn label_backward<R: Runtime>(
    gpu: &Gpu<R>,
    x: &Array<R, f32>,
    w: &Array<R, f32>,
    tokens_by_label: [&Array<R, u32>; 2],
    dy: &Array<R, f32>,
    dx: &mut Array<R, f32>,
    dw: &mut Array<R, f32>,
    dbias: &mut Array<R, f32>,
    widths: (usize, usize),
) -> Result<(), CudaError> {
    let (inputs, outputs) = widths;
    rows_of(x.len(), dy.len(), widths);
    assert_eq!([w.len(), dw.len()], [2 * inputs * outputs; 2], "w or dw is not [2 * inputs, outputs]");
    assert_eq!(dx.len(), x.len(), "dx and x differ in length");
    rows::column_sums(gpu, outputs, None, Dy::Read(dy), Some(dbias))?;
    let sorted_x = rows::split(gpu, inputs, tokens_by_label, x)?;
    let sorted_dy = rows::split(gpu, outputs, tokens_by_label, dy)?;
    let sorted_dx = gpu.array::<f32>(dx.len())?;
    for (label, first) in [(0, 0), (1, tokens_by_label[0].len())] {
        let rows = tokens_by_label[label].len();
        let dy = sorted_dy.pointer_at(first * outputs);
        let half = label * inputs * outputs;
        // SAFETY: `split` has checked that the two labels' rows are all rows; dx and dw have the lengths checked above.
        unsafe {
            let factors = (Factor::transposed(sorted_x.pointer_at(first * inputs)), Factor::plain(dy));
            let dw = (dw.pointer_at(half), Store::Overwrite);
            gpu.product([inputs, outputs, rows], factors, dw, 0, Activation::None)?;
            let factors = (Factor::plain(dy), Factor::transposed(w.pointer_at(half)));
            let dx = (sorted_dx.pointer_at(first * inputs), Store::Overwrite);
            gpu.product([rows, inputs, outputs], factors, dx, 0, Activation::None)?;
        }
    }
    rows::merge(gpu, inputs, tokens_by_label, &sorted_dx, (dx, Store::Overwrite))
}
