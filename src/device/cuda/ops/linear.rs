//! Linear layers: small products by `step/products.cu`, large ones by [`Runtime::gemm`]; bias
//! gradients and label order by `step/rows.cu`.

use super::rows::{self, Dy};
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::gpu::products::{Product, shares_of};
use crate::device::cuda::kernel::Pointer;
use crate::device::cuda::runtime::{Gemm, Runtime};
use crate::device::{
    Activation, Dense, DeviceError, LabelLinear, LabelLinearGradients, Linear, LinearGradients, Output, Rows,
    Store,
};

/// Address of a matrix, and whether it is used transposed.
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
    /// `c (+)= activation(a b + bias)` for `shape = [m, n, k]`.
    ///
    /// # Safety
    /// As [`Runtime::gemm`], except that sizes may be 0.
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
        // SAFETY: guaranteed by the caller. With k = 0 the product is 0, and no call with k = 0 has
        // a bias.
        unsafe {
            if k == 0 {
                return if store == Store::Overwrite {
                    self.fill(c, m * n * size_of::<f32>())
                } else {
                    Ok(())
                };
            }
            // A long inner dimension is cut into shares by `weight_gradient` only.
            if self.shares_launch(shape) && k <= 4096 {
                let (a, b) = ((a.at, a.transposed), (b.at, b.transposed));
                let product = Product::new(shape, a, b, (c, store), self.precision());
                return self.multiply(vec![product.activated(bias, activation)]);
            }
            self.gemm(Gemm {
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

/// Number of rows of `x` and `y`, checked against both widths.
fn rows_of(x: usize, y: usize, (inputs, outputs): (usize, usize)) -> usize {
    assert!(inputs > 0 && outputs > 0, "a layer without inputs or outputs");
    let rows = x / inputs;
    assert_eq!((x, y), (rows * inputs, rows * outputs), "x is not [n, inputs], or y not [n, outputs]");
    rows
}

impl<R: Runtime> Dense for Gpu<R> {
    fn linear(
        &self,
        layer: Linear<&Array<R, f32>>,
        x: &Array<R, f32>,
        y: Output<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let Linear { w, bias, activation, inputs, outputs } = layer;
        let Output { values: y, store } = y;
        let rows = rows_of(x.len(), y.len(), (inputs, outputs));
        assert_eq!(w.len(), inputs * outputs, "w is not [inputs, outputs]");
        assert!(bias.is_none_or(|bias| bias.len() == outputs), "bias is not [outputs]");
        if store == Store::Add && (bias.is_some() || activation != Activation::None) {
            let mut sum = self.array(y.len())?;
            self.linear(layer, x, Output::overwrite(&mut sum))?;
            return self.add(&sum, y);
        }
        let factors = (Factor::plain(x.pointer()), Factor::plain(w.pointer()));
        // SAFETY: lengths are checked above; y is borrowed mutably.
        unsafe {
            self.product(
                [rows, outputs, inputs],
                factors,
                (y.pointer(), store),
                bias.map_or(0, Array::pointer),
                activation,
            )?
        };
        Ok(())
    }

    fn linear_backward(
        &self,
        layer: Linear<&Array<R, f32>>,
        x: &Array<R, f32>,
        y: &Array<R, f32>,
        dy: &mut Array<R, f32>,
        gradients: LinearGradients<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let Linear { w, activation, inputs, outputs, .. } = layer;
        let LinearGradients { dx, dw, dbias } = gradients;
        let rows = rows_of(x.len(), dy.len(), (inputs, outputs));
        assert_eq!([w.len(), dw.len()], [inputs * outputs; 2], "w or dw is not [inputs, outputs]");
        if self.shares_launch([inputs, outputs, rows]) {
            let gate = match activation {
                Activation::None => 0,
                Activation::Relu => {
                    assert_eq!(y.len(), dy.len(), "y and dy differ in length");
                    y.pointer()
                }
            };
            let partial = self.array::<f32>(shares_of(rows) * (inputs + 1) * outputs)?;
            let shape = [inputs, outputs, rows];
            let dy_at = (dy.pointer(), gate);
            let mut products = vec![Product::weight_gradient(
                shape,
                x.pointer(),
                dy_at,
                partial.pointer(),
                self.precision(),
            )];
            if let Some(Output { values: dx, store }) = dx {
                assert_eq!(dx.len(), x.len(), "dx and x differ in length");
                let (a, b, c) = ((dy.pointer(), false), (w.pointer(), true), (dx.pointer(), store));
                let product = Product::new([rows, inputs, outputs], a, b, c, self.precision());
                products.push(product.gated(gate));
            }
            // SAFETY: lengths are checked above; dx is borrowed mutably; partial has one row per
            // share.
            unsafe { self.multiply(products)? };
            let (stride, shares) = ((inputs + 1) * outputs, shares_of(rows));
            self.sum_later(&partial, stride, 0..shares, 0, dw);
            if let Some(dbias) = dbias {
                assert_eq!(dbias.len(), outputs, "dbias is not [outputs]");
                self.sum_later(&partial, stride, 0..shares, inputs * outputs, dbias);
            }
            return Ok(());
        }
        match (activation, dbias) {
            (Activation::None, None) => {}
            (Activation::None, dbias) => rows::column_sums(self, outputs, Dy::Read(dy), dbias)?,
            (Activation::Relu, dbias) => rows::column_sums(self, outputs, Dy::Masked { dy, y }, dbias)?,
        }
        let (x_at, dy_at) = (x.pointer(), dy.pointer());
        // SAFETY: lengths are checked above and, for dx, below; dw and dx are borrowed mutably.
        unsafe {
            let factors = (Factor::transposed(x_at), Factor::plain(dy_at));
            let dw = (dw.pointer(), Store::Overwrite);
            self.product([inputs, outputs, rows], factors, dw, 0, Activation::None)?;
            if let Some(Output { values: dx, store }) = dx {
                assert_eq!(dx.len(), x.len(), "dx and x differ in length");
                let factors = (Factor::plain(dy_at), Factor::transposed(w.pointer()));
                self.product([rows, inputs, outputs], factors, (dx.pointer(), store), 0, Activation::None)?;
            }
        }
        Ok(())
    }

    /// Each half of the weight multiplies the rows of its label. The library multiplies contiguous
    /// rows only, so they are sorted by label for it.
    fn label_linear(
        &self,
        layer: LabelLinear<&Array<R, f32>, &Array<R, u32>>,
        x: &Array<R, f32>,
        y: Output<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let LabelLinear { w, bias, tokens_by_label, inputs, outputs } = layer;
        rows_of(x.len(), y.values.len(), (inputs, outputs));
        assert_eq!(w.len(), 2 * inputs * outputs, "w is not [2 * inputs, outputs]");
        assert_eq!(bias.len(), outputs, "bias is not [outputs]");
        let rows = x.len() / inputs;
        if self.shares_launch([rows, outputs, inputs]) {
            assert_eq!(tokens_by_label[0].len() + tokens_by_label[1].len(), rows, "a row without a label");
            let Output { values: y, store } = y;
            let product = |label: usize| {
                let half = w.pointer_at(label * inputs * outputs);
                let shape = [tokens_by_label[label].len(), outputs, inputs];
                let (a, b, c) = ((x.pointer(), false), (half, false), (y.pointer(), store));
                Product::new(shape, a, b, c, self.precision())
                    .activated(bias.pointer(), Activation::None)
                    .of_rows(tokens_by_label[label].pointer())
            };
            // SAFETY: lengths are checked above; the caller guarantees the rows, which differ; y is
            // borrowed mutably.
            unsafe { self.multiply(vec![product(0), product(1)])? };
            return Ok(());
        }
        let sorted_x = rows::split(self, inputs, tokens_by_label, x)?;
        let sorted_y = self.array::<f32>(y.values.len())?;
        for (label, first) in [(0, 0), (1, tokens_by_label[0].len())] {
            let factors = (
                Factor::plain(sorted_x.pointer_at(first * inputs)),
                Factor::plain(w.pointer_at(label * inputs * outputs)),
            );
            let c = (sorted_y.pointer_at(first * outputs), Store::Overwrite);
            let shape = [tokens_by_label[label].len(), outputs, inputs];
            // SAFETY: `split` has checked that the rows of both labels are all rows; sorted_y has
            // as many.
            unsafe { self.product(shape, factors, c, bias.pointer(), Activation::None)? };
        }
        Ok(rows::merge(self, outputs, tokens_by_label, &sorted_y, y)?)
    }

    fn label_linear_backward(
        &self,
        layer: LabelLinear<&Array<R, f32>, &Array<R, u32>>,
        x: &Array<R, f32>,
        dy: &Array<R, f32>,
        gradients: LabelLinearGradients<&mut Array<R, f32>>,
    ) -> Result<(), DeviceError> {
        let LabelLinear { w, tokens_by_label, inputs, outputs, .. } = layer;
        let LabelLinearGradients { dx, dw, dbias } = gradients;
        rows_of(x.len(), dy.len(), (inputs, outputs));
        assert_eq!([w.len(), dw.len()], [2 * inputs * outputs; 2], "w or dw is not [2 * inputs, outputs]");
        assert_eq!(dx.len(), x.len(), "dx and x differ in length");
        let all = x.len() / inputs;
        if self.shares_launch([inputs, outputs, all]) {
            let counts = tokens_by_label.map(Array::len);
            assert_eq!(counts[0] + counts[1], all, "a row without a label");
            let (stride, shares) = ((inputs + 1) * outputs, counts.map(shares_of));
            let partial = self.array::<f32>((shares[0] + shares[1]) * stride)?;
            let mut products = Vec::with_capacity(4);
            for (label, first) in [(0, 0), (1, shares[0])] {
                let (rows, of) = (counts[label], tokens_by_label[label].pointer());
                let partial = partial.pointer_at(first * stride);
                let dy_at = (dy.pointer(), 0);
                let shape = [inputs, outputs, rows];
                let of_weight =
                    Product::weight_gradient(shape, x.pointer(), dy_at, partial, self.precision());
                let half = w.pointer_at(label * inputs * outputs);
                let (a, b, c) = ((dy.pointer(), false), (half, true), (dx.pointer(), Store::Overwrite));
                let of_input = Product::new([rows, inputs, outputs], a, b, c, self.precision());
                products.extend([of_weight.of_rows(of), of_input.of_rows(of)]);
            }
            // SAFETY: lengths are checked above; the caller guarantees the rows, which differ; dx is
            // borrowed mutably; partial has one row per share.
            unsafe { self.multiply(products)? };
            let [end, all] = [shares[0], shares[0] + shares[1]];
            let mut half = dw.part(0, inputs * outputs);
            self.sum_later(&partial, stride, 0..end, 0, &mut half);
            let mut half = dw.part(inputs * outputs, inputs * outputs);
            self.sum_later(&partial, stride, end..all, 0, &mut half);
            self.sum_later(&partial, stride, 0..all, inputs * outputs, dbias);
            return Ok(());
        }
        rows::column_sums(self, outputs, Dy::Read(dy), Some(dbias))?;
        let sorted_x = rows::split(self, inputs, tokens_by_label, x)?;
        let sorted_dy = rows::split(self, outputs, tokens_by_label, dy)?;
        let sorted_dx = self.array::<f32>(dx.len())?;
        for (label, first) in [(0, 0), (1, tokens_by_label[0].len())] {
            let rows = tokens_by_label[label].len();
            let dy = sorted_dy.pointer_at(first * outputs);
            let half = label * inputs * outputs;
            // SAFETY: `split` has checked that the rows of both labels are all rows; the lengths of
            // dx and dw are checked above.
            unsafe {
                let factors = (Factor::transposed(sorted_x.pointer_at(first * inputs)), Factor::plain(dy));
                let dw = (dw.pointer_at(half), Store::Overwrite);
                self.product([inputs, outputs, rows], factors, dw, 0, Activation::None)?;
                let factors = (Factor::plain(dy), Factor::transposed(w.pointer_at(half)));
                let dx = (sorted_dx.pointer_at(first * inputs), Store::Overwrite);
                self.product([rows, inputs, outputs], factors, dx, 0, Activation::None)?;
            }
        }
        Ok(rows::merge(self, inputs, tokens_by_label, &sorted_dx, Output::overwrite(dx))?)
    }
}
