//! Linear layers, with one weight for all rows or one weight per label.
//!
//! The chunks of rows depend only on the number of rows. A chunk sums its partial weight gradient
//! in the order of its rows, and the partials are added in the order of the chunks. Results are
//! bitwise equal for any number of threads.

use super::elementwise::{add_assign, add_column_sums, pad_rows, relu_backward};
use super::product::{Finish, Products};
use super::scratch::{carve, carved_len, padded, with_scratch};
use super::slices::Slices;
use super::{Cpu, Done, Floats, Indices, with_products};
use crate::device::{
    Activation, Dense, LabelLinear, LabelLinearGradients, Linear, LinearGradients, Output, Store,
};
use crate::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;
use std::ops::Range;

/// Rows per product: their activations fit the first two cache levels.
const BLOCK: usize = 64;

/// Rows per chunk: enough to pay for a partial gradient, and at most 64 chunks.
fn chunk_rows(rows: usize) -> usize {
    rows.div_ceil(64).max(512)
}

impl Dense for Cpu {
    fn linear(&self, layer: Linear<&Floats>, x: &Floats, y: Output<&mut Floats>) -> Done {
        with_products!(self, |products| forward(products, layer.slices(), x, y.slices()));
        Ok(())
    }
    fn linear_backward(
        &self,
        layer: Linear<&Floats>,
        x: &Floats,
        y: &Floats,
        dy: &mut Floats,
        gradients: LinearGradients<&mut Floats>,
    ) -> Done {
        with_products!(self, |products| backward(products, layer.slices(), x, y, dy, gradients.slices()));
        Ok(())
    }
    fn label_linear(
        &self,
        layer: LabelLinear<&Floats, &Indices>,
        x: &Floats,
        y: Output<&mut Floats>,
    ) -> Done {
        with_products!(self, |products| label_forward(products, layer.slices(), x, y.slices()));
        Ok(())
    }
    fn label_linear_backward(
        &self,
        layer: LabelLinear<&Floats, &Indices>,
        x: &Floats,
        dy: &Floats,
        gradients: LabelLinearGradients<&mut Floats>,
    ) -> Done {
        with_products!(self, |products| label_backward(products, layer.slices(), x, dy, gradients.slices()));
        Ok(())
    }
}

/// [`Dense::linear`] on slices.
///
/// # Panics
/// If a length contradicts the widths of the layer.
pub fn forward<P: Products>(products: P, layer: Linear<&[f32]>, x: &[f32], y: Output<&mut [f32]>) {
    let Linear { w, bias, activation, inputs, outputs } = layer;
    let Output { values: y, store } = y;
    check_rows(x.len(), y.len(), inputs, outputs);
    assert_eq!(w.len(), inputs * outputs, "w is not [inputs, outputs]");
    let rows = chunk_rows(y.len() / outputs);
    let wide = padded(outputs);
    let lens = [products.packed_len([inputs, outputs]), wide];
    with_scratch(carved_len(&lens), |memory| {
        let [packed, bias_padded] = carve(&mut { memory }, lens);
        products.pack([inputs, outputs], (w, outputs), packed);
        pad_rows(bias.unwrap_or_default(), outputs, wide, bias_padded);
        bias_padded[bias.map_or(0, <[f32]>::len)..].fill(0.0);
        let finish = match activation {
            Activation::Relu => Finish::BiasRelu(bias_padded),
            Activation::None => Finish::Bias(bias_padded),
        };
        let chunks = x.par_chunks(rows * inputs).zip(y.par_chunks_mut(rows * outputs));
        chunks.for_each(|(x, y)| {
            if outputs == 1 && store == Store::Overwrite && !P::ROUNDS {
                dot_rows(x, w, bias.map_or(0.0, |bias| bias[0]), y);
                if activation == Activation::Relu {
                    // Keeps a NaN, unlike f32::max.
                    y.iter_mut().filter(|y| **y < 0.0).for_each(|y| *y = 0.0);
                }
                return;
            }
            for (x, y) in x.chunks(BLOCK * inputs).zip(y.chunks_mut(BLOCK * outputs)) {
                let shape = [y.len() / outputs, outputs, inputs];
                product_to(products, shape, x, packed, (y, store), finish);
            }
        });
    });
}

/// [`Dense::linear_backward`] on slices.
///
/// # Panics
/// If a length contradicts the widths of the layer.
pub fn backward<P: Products>(
    products: P,
    layer: Linear<&[f32]>,
    x: &[f32],
    y: &[f32],
    dy: &mut [f32],
    gradients: LinearGradients<&mut [f32]>,
) {
    let Linear { w, activation, inputs, outputs, .. } = layer;
    let LinearGradients { dx, dw, dbias } = gradients;
    check_rows(x.len(), dy.len(), inputs, outputs);
    assert_eq!(w.len(), inputs * outputs, "w is not [inputs, outputs]");
    assert_eq!(y.len(), dy.len(), "y and dy differ in length");
    let rows = chunk_rows(dy.len() / outputs);
    let chunks = dy.len().div_ceil(rows * outputs);
    let partials = Partials { chunks, inputs, outputs, swapped: outputs == 1 };
    let transposed_len = products.packed_len([outputs, inputs]);
    let (mut dx, dx_store) = dx.map_or((None, Store::Overwrite), |dx| (Some(dx.values), dx.store));
    if let Some(dx) = &dx {
        assert_eq!(dx.len(), x.len(), "dx and x differ in length");
    }
    with_scratch(partials.len() + transposed_len, |memory| {
        let (partial, transposed) = memory.split_at_mut(partials.len());
        products.pack_transposed([outputs, inputs], (w, outputs), transposed);
        let chunks: Vec<_> = partial
            .chunks_mut(partials.each())
            .zip(x.chunks(rows * inputs))
            .zip(y.chunks(rows * outputs).zip(dy.chunks_mut(rows * outputs)))
            .map(|((partial, x), (y, dy))| {
                let dx = dx.as_mut().map(|dx| dx.split_off_mut(..x.len()).expect("dx is as long as x"));
                (partial, x, y, dy, dx)
            })
            .collect();
        chunks.into_par_iter().for_each(|(partial, x, y, dy, mut dx)| {
            partial.fill(0.0);
            let blocks = y.chunks(BLOCK * outputs).zip(dy.chunks_mut(BLOCK * outputs));
            for (x, (y, dy)) in x.chunks(BLOCK * inputs).zip(blocks) {
                if activation == Activation::Relu {
                    relu_backward(y, dy);
                }
                partials.add(products, x, dy, partial);
                if let Some(dx) = &mut dx {
                    let dx = dx.split_off_mut(..x.len()).expect("dx is as long as x");
                    let shape = [dx.len() / inputs, inputs, outputs];
                    product_to(products, shape, dy, transposed, (dx, dx_store), Finish::Store);
                }
            }
        });
        partials.reduce(partial, dw, dbias);
    });
}

/// [`Dense::label_linear`] on slices.
///
/// # Panics
/// If a length contradicts the widths of the layer, or a token is out of range.
pub fn label_forward<P: Products>(
    products: P,
    layer: LabelLinear<&[f32], &[u32]>,
    x: &[f32],
    y: Output<&mut [f32]>,
) {
    let LabelLinear { w, bias, tokens_by_label, inputs, outputs } = layer;
    let Output { values: y, store } = y;
    check_rows(x.len(), y.len(), inputs, outputs);
    assert_eq!(w.len(), 2 * inputs * outputs, "w is not [2 * inputs, outputs]");
    let (rows, wide) = (chunk_rows(y.len() / outputs), padded(outputs));
    let lens = [products.packed_len([inputs, outputs]), products.packed_len([inputs, outputs]), wide];
    with_scratch(carved_len(&lens), |memory| {
        let [negative, positive, bias_padded] = carve(&mut { memory }, lens);
        let halves = w.split_at(inputs * outputs);
        products.pack([inputs, outputs], (halves.0, outputs), negative);
        products.pack([inputs, outputs], (halves.1, outputs), positive);
        pad_rows(bias, outputs, wide, bias_padded);
        let chunks = x.par_chunks(rows * inputs).zip(y.par_chunks_mut(rows * outputs));
        chunks.enumerate().for_each(|(chunk, (x, y))| {
            with_scratch(carved_len(&[BLOCK * inputs, BLOCK * wide]), |memory| {
                let [gathered, result] = carve(&mut { memory }, [BLOCK * inputs, BLOCK * wide]);
                let here = chunk * rows..chunk * rows + y.len() / outputs;
                for (tokens, w) in tokens_by_label.into_iter().zip([&*negative, &*positive]) {
                    for tokens in tokens_in(tokens, &here).chunks(BLOCK) {
                        gather(x, inputs, inputs, tokens, here.start, gathered);
                        let shape = [tokens.len(), outputs, inputs];
                        let finish = Finish::Bias(bias_padded);
                        products.product(shape, (gathered, inputs), w, (result, wide), finish);
                        for (token, result) in tokens.iter().zip(result.chunks_exact(wide)) {
                            let row = (*token as usize - here.start) * outputs;
                            put(&result[..outputs], &mut y[row..row + outputs], store);
                        }
                    }
                }
            });
        });
    });
}

/// [`Dense::label_linear_backward`] on slices.
///
/// # Panics
/// If a length contradicts the widths of the layer, or a token is out of range.
pub fn label_backward<P: Products>(
    products: P,
    layer: LabelLinear<&[f32], &[u32]>,
    x: &[f32],
    dy: &[f32],
    gradients: LabelLinearGradients<&mut [f32]>,
) {
    let LabelLinear { w, tokens_by_label, inputs, outputs, .. } = layer;
    let LabelLinearGradients { dx, dw, dbias } = gradients;
    check_rows(x.len(), dy.len(), inputs, outputs);
    assert_eq!(w.len(), 2 * inputs * outputs, "w is not [2 * inputs, outputs]");
    assert_eq!(dx.len(), x.len(), "dx and x differ in length");
    let rows = chunk_rows(dy.len() / outputs);
    let (wide, wide_inputs) = (padded(outputs), padded(inputs));
    let chunks = dy.len().div_ceil(rows * outputs);
    let partials = Partials { chunks, inputs: 2 * inputs, outputs, swapped: false };
    let transposed_len = products.packed_len([outputs, inputs]);
    with_scratch(partials.len() + 2 * transposed_len, |memory| {
        let (partial, transposed) = memory.split_at_mut(partials.len());
        for (w, transposed) in
            w.chunks_exact(inputs * outputs).zip(transposed.chunks_exact_mut(transposed_len))
        {
            products.pack_transposed([outputs, inputs], (w, outputs), transposed);
        }
        let chunks = partial.par_chunks_mut(partials.each()).zip(x.par_chunks(rows * inputs));
        let chunks = chunks.zip(dy.par_chunks(rows * outputs).zip(dx.par_chunks_mut(rows * inputs)));
        chunks.enumerate().for_each(|(chunk, ((partial, x), (dy, dx)))| {
            let lens = [BLOCK * inputs, BLOCK * wide, BLOCK * wide_inputs];
            with_scratch(carved_len(&lens), |memory| {
                let [x_rows, dy_rows, dx_rows] = carve(&mut { memory }, lens);
                partial.fill(0.0);
                let here = chunk * rows..chunk * rows + dy.len() / outputs;
                let (dw, dbias) = partial.split_at_mut(2 * inputs * wide);
                let halves = dw.chunks_exact_mut(inputs * wide).zip(transposed.chunks_exact(transposed_len));
                for (tokens, (dw, w)) in tokens_by_label.into_iter().zip(halves) {
                    for tokens in tokens_in(tokens, &here).chunks(BLOCK) {
                        let n = tokens.len();
                        gather(x, inputs, inputs, tokens, here.start, x_rows);
                        gather(dy, outputs, wide, tokens, here.start, dy_rows);
                        let shape = [inputs, outputs, n];
                        products.add_transposed(shape, (x_rows, inputs), (dy_rows, wide), (dw, wide));
                        add_column_sums(&dy_rows[..n * wide], dbias);
                        let (shape, out) = ([n, inputs, outputs], (&mut *dx_rows, wide_inputs));
                        products.product(shape, (dy_rows, wide), w, out, Finish::Store);
                        for (token, row) in tokens.iter().zip(dx_rows.chunks_exact(wide_inputs)) {
                            let at = (*token as usize - here.start) * inputs;
                            dx[at..at + inputs].copy_from_slice(&row[..inputs]);
                        }
                    }
                }
            });
        });
        partials.reduce(partial, dw, Some(dbias));
    });
}

/// Partial gradients of a `[inputs, outputs]` weight and its bias, one per chunk: padded rows, the
/// bias last.
///
/// For a single output most lanes of a vector would be empty. `swapped` then treats the weight as
/// `[outputs, inputs]`, with the same layout in memory.
struct Partials {
    chunks: usize,
    inputs: usize,
    outputs: usize,
    swapped: bool,
}

impl Partials {
    /// Rows and columns of the weight gradient.
    fn shape(&self) -> (usize, usize) {
        if self.swapped { (1, self.inputs) } else { (self.inputs, self.outputs) }
    }

    /// Values per chunk.
    fn each(&self) -> usize {
        let (rows, columns) = self.shape();
        (rows + 1) * padded(columns)
    }

    /// Values of all chunks.
    fn len(&self) -> usize {
        self.chunks * self.each()
    }

    /// Adds `x^T dy` and the column sums of `dy` for one block of rows.
    fn add<P: Products>(&self, products: P, x: &[f32], dy: &[f32], partial: &mut [f32]) {
        let ((rows, columns), n) = (self.shape(), dy.len() / self.outputs);
        let wide = padded(columns);
        let (left, right) = if self.swapped { (dy, x) } else { (x, dy) };
        let (dw, dbias) = partial.split_at_mut(rows * wide);
        let mut add = |right: &[f32]| {
            products.add_transposed([rows, columns, n], (left, rows), (right, wide), (dw, wide));
            if self.swapped {
                dbias[0] += dy.iter().sum::<f32>();
            } else {
                add_column_sums(right, dbias);
            }
        };
        if columns < wide {
            with_scratch(n * wide, |right_wide| {
                pad_rows(right, columns, wide, right_wide);
                add(right_wide);
            });
        } else {
            add(right);
        }
    }

    /// Adds the partials in the order of the chunks.
    fn reduce(&self, partial: &[f32], dw: &mut [f32], dbias: Option<&mut [f32]>) {
        let (rows, columns) = self.shape();
        let wide = padded(columns);
        assert_eq!(dw.len(), self.inputs * self.outputs, "dw is not [inputs, outputs]");
        let row_sum = |row: usize, out: &mut [f32]| {
            out.fill(0.0);
            for chunk in partial.chunks_exact(self.each()) {
                add_assign(&chunk[row * wide..][..out.len()], out);
            }
        };
        dw.par_chunks_mut(columns).with_min_len(16).enumerate().for_each(|(row, dw)| row_sum(row, dw));
        if let Some(dbias) = dbias {
            assert_eq!(dbias.len(), self.outputs, "dbias is not [outputs]");
            row_sum(rows, dbias);
        }
    }
}

/// `y = x w + bias` for a single output.
fn dot_rows(x: &[f32], w: &[f32], bias: f32, y: &mut [f32]) {
    struct DotRows<'a>(&'a [f32], &'a [f32], f32, &'a mut [f32]);
    impl Kernel for DotRows<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(x, w, bias, y) = self;
            for (x, y) in x.chunks_exact(w.len()).zip(y) {
                let (mut sum, mut rest) = (s.zero(), bias);
                let (x, w) = (x.chunks_exact(S::LANES), w.chunks_exact(S::LANES));
                for (x, w) in x.remainder().iter().zip(w.remainder()) {
                    rest += x * w;
                }
                for (x, w) in x.zip(w) {
                    sum = s.mul_add(s.load(x), s.load(w), sum);
                }
                *y = s.sum(sum) + rest;
            }
        }
    }
    dispatch(DotRows(x, w, bias, y));
}

/// `y = finish(left right)` for a packed right factor; rows of `left` and `y` are contiguous.
fn product_to<P: Products>(
    products: P,
    [m, n, k]: [usize; 3],
    left: &[f32],
    right: &[f32],
    (y, store): (&mut [f32], Store),
    finish: Finish,
) {
    let (wide, left) = (padded(n), (left, k));
    match (store, finish) {
        (Store::Overwrite, _) if n == wide => products.product([m, n, k], left, right, (y, n), finish),
        (Store::Add, Finish::Store) if n == wide => {
            products.product([m, n, k], left, right, (y, n), Finish::Add);
        }
        _ => with_scratch(m * wide, |result| {
            products.product([m, n, k], left, right, (result, wide), finish);
            for (result, y) in result.chunks_exact(wide).zip(y.chunks_exact_mut(n)) {
                put(&result[..n], y, store);
            }
        }),
    }
}

fn put(x: &[f32], y: &mut [f32], store: Store) {
    match store {
        Store::Overwrite => y.copy_from_slice(x),
        Store::Add => add_assign(x, y),
    }
}

/// The tokens of an ascending list that lie in `here`.
fn tokens_in<'a>(tokens: &'a [u32], here: &Range<usize>) -> &'a [u32] {
    let below = |end: usize| tokens.partition_point(|token| (*token as usize) < end);
    &tokens[below(here.start)..below(here.end)]
}

/// Copies the rows `tokens - first` of `x` to rows `padded` apart, padded with zeros.
fn gather(x: &[f32], width: usize, padded: usize, tokens: &[u32], first: usize, out: &mut [f32]) {
    for (token, out) in tokens.iter().zip(out.chunks_exact_mut(padded)) {
        let row = (*token as usize - first) * width;
        out[..width].copy_from_slice(&x[row..row + width]);
        out[width..].fill(0.0);
    }
}

fn check_rows(x: usize, y: usize, inputs: usize, outputs: usize) {
    assert!(inputs > 0 && outputs > 0, "a linear layer of width 0");
    assert_eq!(x % inputs, 0, "x is not [n, inputs]");
    assert_eq!(y, x / inputs * outputs, "y is not [n, outputs]");
}

#[cfg(test)]
mod tests {
    use super::super::product::F32;
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn random(len: usize, rng: &mut impl RngExt) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Values that bf16 represents exactly.
    fn coarse(len: usize, rng: &mut impl RngExt) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-128..129) as f32 / 128.0).collect()
    }

    /// Runs `$check` with f32 products of any values, and with bf16 products of values that bf16
    /// represents.
    macro_rules! in_every_precision {
        ($name:ident, $check:ident) => {
            #[test]
            fn $name() {
                $check(F32, random);
                #[cfg(target_arch = "x86_64")]
                if let Some(bf16) = super::super::bf16::tests::bf16() {
                    $check(bf16, coarse);
                }
            }
        };
    }

    #[track_caller]
    fn assert_close(name: &str, got: &[f32], want: &[f64]) {
        let largest = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
        assert_eq!(got.len(), want.len(), "{name}");
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(error <= 1e-5 * largest, "{name}[{i}] = {got}, not {want} (largest {largest})");
        }
    }

    /// `[m, k] [k, n]` in f64, entries by function.
    fn naive(
        [m, n, k]: [usize; 3],
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f64> {
        let entry = |i, j| (0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum();
        (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect()
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (0, 8, 8),
        (1, 5, 1),
        (70, 64, 1),
        (300, 32, 32),
        (257, 128, 100),
        (65, 100, 64),
        (600, 7, 33),
        (33, 64, 32),
        (1000, 1, 3),
    ];

    in_every_precision!(layer_and_gradients_agree_with_f64, check_layer);
    in_every_precision!(label_layer_and_gradients_agree_with_f64, check_label_layer);
    in_every_precision!(gradients_are_bitwise_equal_for_any_number_of_threads, check_threads);

    fn check_layer<P: Products>(p: P, random: fn(usize, &mut rand_chacha::ChaCha8Rng) -> Vec<f32>) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        for (n, inputs, outputs) in SHAPES {
            let (x, w) = (random(n * inputs, &mut rng), random(inputs * outputs, &mut rng));
            let (bias, start) = (random(outputs, &mut rng), random(n * outputs, &mut rng));
            let dx_start = random(n * inputs, &mut rng);
            for (activation, store, with_bias) in [
                (Activation::None, Store::Overwrite, true),
                (Activation::Relu, Store::Overwrite, true),
                (Activation::None, Store::Add, false),
                (Activation::None, Store::Add, true),
                (Activation::None, Store::Overwrite, false),
            ] {
                let mut y = start.clone();
                let given = with_bias.then_some(&bias[..]);
                let layer = Linear { w: &w[..], bias: given, activation, inputs, outputs };
                forward(p, layer, &x, Output { values: &mut y, store });
                let mut want =
                    naive([n, outputs, inputs], |i, l| x[i * inputs + l], |l, j| w[l * outputs + j]);
                for (i, want) in want.iter_mut().enumerate() {
                    *want += given.map_or(0.0, |b| f64::from(b[i % outputs]));
                    *want = if activation == Activation::Relu { want.max(0.0) } else { *want };
                    *want += if store == Store::Add { f64::from(start[i]) } else { 0.0 };
                }
                assert_close("y", &y, &want);

                let dy = random(n * outputs, &mut rng);
                let masked =
                    |i: usize| if activation == Activation::Relu && y[i] <= 0.0 { 0.0 } else { dy[i] };
                let (mut dy_given, mut dx) = (dy.clone(), dx_start.clone());
                let (mut dw, mut dbias) = (vec![f32::NAN; w.len()], vec![f32::NAN; outputs]);
                let gradients = LinearGradients {
                    dx: Some(Output { values: &mut dx[..], store }),
                    dw: &mut dw[..],
                    dbias: Some(&mut dbias[..]),
                };
                backward(p, layer, &x, &y, &mut dy_given, gradients);
                assert!(dy_given.iter().enumerate().all(|(i, dy)| *dy == masked(i)));
                let shape = [n, inputs, outputs];
                let mut want = naive(shape, |i, l| masked(i * outputs + l), |l, j| w[j * outputs + l]);
                if store == Store::Add {
                    want.iter_mut().zip(&dx_start).for_each(|(want, start)| *want += f64::from(*start));
                }
                assert_close("dx", &dx, &want);
                let shape = [inputs, outputs, n];
                let want = naive(shape, |i, l| x[l * inputs + i], |l, j| masked(l * outputs + j));
                assert_close("dw", &dw, &want);
                assert_close(
                    "dbias",
                    &dbias,
                    &naive([1, outputs, n], |_, _| 1.0, |l, j| masked(l * outputs + j)),
                );
            }
        }
    }

    fn check_label_layer<P: Products>(p: P, random: fn(usize, &mut rand_chacha::ChaCha8Rng) -> Vec<f32>) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(8);
        for (n, inputs, outputs) in SHAPES {
            let (x, w) = (random(n * inputs, &mut rng), random(2 * inputs * outputs, &mut rng));
            let (bias, start) = (random(outputs, &mut rng), random(n * outputs, &mut rng));
            let label: Vec<usize> = (0..n).map(|_| rng.random_range(0..2)).collect();
            let tokens =
                [0, 1].map(|f| (0..n as u32).filter(|t| label[*t as usize] == f).collect::<Vec<_>>());
            let tokens = [&tokens[0][..], &tokens[1][..]];
            let weight = |i: usize, l: usize, j: usize| w[(label[i] * inputs + l) * outputs + j];
            let layer = LabelLinear { w: &w[..], bias: &bias[..], tokens_by_label: tokens, inputs, outputs };
            for store in [Store::Overwrite, Store::Add] {
                let mut y = start.clone();
                label_forward(p, layer, &x, Output { values: &mut y, store });
                let mut want = Vec::new();
                for (i, j) in (0..n).flat_map(|i| (0..outputs).map(move |j| (i, j))) {
                    let sum = naive([1, 1, inputs], |_, l| x[i * inputs + l], |l, _| weight(i, l, j))[0];
                    let was = if store == Store::Add { f64::from(start[i * outputs + j]) } else { 0.0 };
                    want.push(sum + f64::from(bias[j]) + was);
                }
                assert_close("y", &y, &want);
            }
            let dy = random(n * outputs, &mut rng);
            let mut dx = vec![f32::NAN; x.len()];
            let (mut dw, mut dbias) = (vec![f32::NAN; w.len()], vec![f32::NAN; outputs]);
            let gradients = LabelLinearGradients { dx: &mut dx[..], dw: &mut dw[..], dbias: &mut dbias[..] };
            label_backward(p, layer, &x, &dy, gradients);
            let mut want = Vec::new();
            for (i, l) in (0..n).flat_map(|i| (0..inputs).map(move |l| (i, l))) {
                want.push(naive([1, 1, outputs], |_, j| dy[i * outputs + j], |j, _| weight(i, l, j))[0]);
            }
            assert_close("dx", &dx, &want);
            let is = |f: usize, i: usize| if label[i] == f { 1.0 } else { 0.0 };
            let shape = [2 * inputs, outputs, n];
            let x_of = |row: usize, i: usize| x[i * inputs + row % inputs] * is(row / inputs, i);
            assert_close("dw", &dw, &naive(shape, x_of, |i, j| dy[i * outputs + j]));
            assert_close("dbias", &dbias, &naive([1, outputs, n], |_, _| 1.0, |i, j| dy[i * outputs + j]));
        }
    }

    fn check_threads<P: Products>(p: P, random: fn(usize, &mut rand_chacha::ChaCha8Rng) -> Vec<f32>) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
        let (n, inputs, outputs) = (3000, 40, 24);
        let (x, w) = (random(n * inputs, &mut rng), random(2 * inputs * outputs, &mut rng));
        let dy = random(n * outputs, &mut rng);
        let even_odd = [0, 1].map(|f| (0..n as u32).filter(|t| t % 2 == f).collect::<Vec<_>>());
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| {
                let mut out =
                    [inputs * outputs, outputs, 2 * inputs * outputs, outputs].map(|n| vec![0.0; n]);
                let [dw, dbias, dw2, dbias2] = out.each_mut().map(|out| &mut out[..]);
                let w1 = &w[..inputs * outputs];
                let layer = Linear { w: w1, bias: None, activation: Activation::None, inputs, outputs };
                let gradients = LinearGradients { dx: None, dw, dbias: Some(dbias) };
                backward(p, layer, &x, &dy, &mut dy.clone(), gradients);
                let tokens_by_label = [&even_odd[0][..], &even_odd[1][..]];
                let layer = LabelLinear { w: &w[..], bias: &[], tokens_by_label, inputs, outputs };
                let gradients = LabelLinearGradients { dx: &mut x.clone()[..], dw: dw2, dbias: dbias2 };
                label_backward(p, layer, &x, &dy, gradients);
                out
            })
        };
        assert!(run(1) == run(3));
    }
}
