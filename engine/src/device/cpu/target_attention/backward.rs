//! Gradients of target attention.
//!
//! Softmax: row `i` of a pair has `p_t = e^(e_t - lse_i)` on its prefix, so with `g_i` the gradient
//! of its output
//!
//! ```text
//! de_t  = sum over rows longer than t of e^(e_t - lse_i) (g_i . s_t - g_i . att_i)
//! ds_t += sum over the same rows of e^(e_t - lse_i) g_i
//! ```
//!
//! From the longest row to the shortest, these are running sums `G = sum e^(ref - lse_i) g_i`, with
//! `ref` the `lse` of the shortest row so far. `lse` grows with length, so no exponent is positive.
//!
//! MLP, with `x = a * r` and `dz` the gradient of the first layer before its ReLU:
//!
//! ```text
//! per score     dP += x^T dz                    y = dz P^T      da += y * r      dr += y * a
//! per token     dZ  = sum of dz over pairs      dA = a^T dZ     da += dZ (A + S)^T
//! per pair      dc  = sum of dz over tokens     dR = r^T dc     dr += dc (R - S)^T
//!               db0 = sum of dc
//! at the end    dS  = dA - dR
//! ```

use super::*;
use crate::device::cpu::elementwise::{add_column_sums, for_columns, load_columns};

/// Transposes of the weights, as right factors.
pub(super) struct Transposed<'a> {
    /// `(A + S)^T: [hidden0, D]`
    token: &'a [f32],
    /// `P^T: [hidden0, D]`
    pub(super) product: &'a [f32],
    /// `(R - S)^T: [hidden0, D]`
    candidate: &'a [f32],
    /// `[hidden1, hidden0]`
    pub(super) w1: &'a [f32],
}

impl Transposed<'_> {
    fn lens<P: Products>(products: P, shape: Shape) -> [usize; 4] {
        let [h0, h1] = shape.hidden;
        let first = products.packed_len([h0, shape.width]);
        [first, first, first, products.packed_len([h1, h0])]
    }

    fn new<'a, P: Products>(
        products: P,
        shape: Shape,
        weights: &TargetWeights<&[f32]>,
        [token, product, candidate, w1]: [&'a mut [f32]; 4],
    ) -> Transposed<'a> {
        let ([h0, h1], wide) = (shape.hidden, shape.hidden_wide[0]);
        let (lens, first) = (Combined::lens(shape), [h0, shape.width]);
        with_scratch(carved_len(&lens), |mut memory| {
            let combined = Combined::new(shape, weights, carve(&mut memory, lens));
            products.pack_transposed(first, (combined.token, wide), token);
            products.pack_transposed(first, (combined.candidate, wide), candidate);
        });
        products.pack_transposed(first, (shape.block(weights, 3), h0), product);
        products.pack_transposed([h1, h0], (weights.w1, h1), w1);
        Transposed { token, product, candidate, w1 }
    }
}

/// Sums of weight gradients over the pairs of a chunk. Rows are padded, and their number is, for
/// products in whole tiles.
pub(super) struct Sums<'a> {
    /// `dA: [D, hidden0]`
    token: &'a mut [f32],
    /// `dP: [D, hidden0]`
    pub(super) product: &'a mut [f32],
    /// `dR: [D, hidden0]`
    candidate: &'a mut [f32],
    b0: &'a mut [f32],
    /// Transposed: `[hidden1, hidden0]`
    pub(super) w1: &'a mut [f32],
    pub(super) b1: &'a mut [f32],
    pub(super) w2: &'a mut [f32],
}

impl Sums<'_> {
    fn lens(shape: Shape) -> [usize; 7] {
        let (d, [h0, h1]) = (shape.width_wide, shape.hidden_wide);
        [d * h0, d * h0, d * h0, h0, h1 * h0, h1, h1]
    }

    fn new<'a>(shape: Shape, mut memory: &'a mut [f32]) -> Sums<'a> {
        let [token, product, candidate, b0, w1, b1, w2] = carve(&mut memory, Self::lens(shape));
        Sums { token, product, candidate, b0, w1, b1, w2 }
    }

    /// Writes the gradients of the weights.
    fn unpack(&self, shape: Shape, gradients: TargetWeights<&mut [f32]>) {
        let (d, [h0, h1], wide) = (shape.width, shape.hidden, shape.hidden_wide[0]);
        for (row, out) in gradients.w0.chunks_exact_mut(h0).enumerate() {
            let (block, at) = (row / d, row % d * wide);
            let row = |sums: &[f32], out: &mut [f32]| out.copy_from_slice(&sums[at..at + h0]);
            match block {
                0 => row(self.token, out),
                1 => row(self.candidate, out),
                2 => {
                    let difference = self.token[at..].iter().zip(&self.candidate[at..]).map(|(x, y)| x - y);
                    out.iter_mut().zip(difference).for_each(|(out, x)| *out = x);
                }
                _ => row(self.product, out),
            }
        }
        for (i, out) in gradients.w1.chunks_exact_mut(h1).enumerate() {
            out.iter_mut().enumerate().for_each(|(j, out)| *out = self.w1[j * wide + i]);
        }
        gradients.b0.copy_from_slice(&self.b0[..h0]);
        gradients.b1.copy_from_slice(&self.b1[..h1]);
        gradients.w2.copy_from_slice(&self.w2[..h1]);
        gradients.b2.fill(0.0);
    }
}

/// [`TargetAttention::target_attention_backward`] on slices.
///
/// # Panics
/// If the lengths of the buffers contradict each other.
#[allow(clippy::too_many_arguments, reason = "those of the operation, and the products")]
pub fn backward<P: Mlp>(
    products: P,
    shape: TargetShape,
    index: TargetIndex<&[u32]>,
    inputs: TargetInputs<&[f32]>,
    weights: TargetWeights<&[f32]>,
    state: TargetState<&[f32]>,
    datt: &[f32],
    gradients: TargetGradients<&mut [f32]>,
) {
    let (shape, width) = (Shape::new(shape), shape.width);
    let TargetGradients { ds, da, dr, weights: gradients } = gradients;
    shape.check(&weights);
    shape.check(&gradients);
    check_index(&index, shape, &inputs, state.e);
    let (rows, TargetInputs { s, a, r }) = (index.row_length.len(), inputs);
    let TargetState { lse, att, .. } = state;
    let found = [lse.len(), att.len(), datt.len(), ds.len(), da.len(), dr.len()];
    let expected = [rows, rows * width, rows * width, s.len(), a.len(), r.len()];
    assert_eq!(found, expected, "lengths of lse, att, datt, ds, da, dr");
    let chunks = chunks(&index);
    let (packed_lens, transposed_lens) = (Packed::lens(products, shape), Transposed::lens(products, shape));
    let each = carved_len(&Sums::lens(shape));
    let len = carved_len(&packed_lens) + carved_len(&transposed_lens) + each * chunks.len().max(1);
    with_scratch(len, |mut memory| {
        let packed = Packed::new(products, shape, &weights, carve(&mut memory, packed_lens));
        let transposed = Transposed::new(products, shape, &weights, carve(&mut memory, transposed_lens));
        let sums = memory;
        let mut rest = (ds, da, dr);
        let tasks: Vec<_> = chunks
            .into_iter()
            .zip(sums.chunks_exact_mut(each))
            .map(|(chunk, sums)| {
                let ds = split(&mut rest.0, chunk.tokens.len() * width);
                let da = split(&mut rest.1, chunk.tokens.len() * width);
                let dr = split(&mut rest.2, chunk.pairs.len() * width);
                (chunk, sums, [ds, da, dr])
            })
            .collect();
        let count = tasks.len();
        tasks.into_par_iter().for_each(|(chunk, sums, [ds, da, dr])| {
            sums.fill(0.0);
            let mut task = Task {
                shape,
                index: &index,
                chunk: &chunk,
                packed: &packed,
                transposed: &transposed,
                sums: Sums::new(shape, sums),
            };
            task.run(inputs, state, datt, [ds, da, dr]);
        });
        let (total, others) = sums.split_at_mut(each);
        if count == 0 {
            total.fill(0.0);
        }
        const PIECE: usize = 1024;
        total.par_chunks_mut(PIECE).enumerate().for_each(|(i, total)| {
            for other in others.chunks_exact(each).take(count.saturating_sub(1)) {
                add_assign(&other[i * PIECE..][..total.len()], total);
            }
        });
        Sums::new(shape, total).unpack(shape, gradients);
    });
}

/// The backward pass of one chunk.
struct Task<'a, P> {
    shape: Shape,
    index: &'a TargetIndex<&'a [u32]>,
    chunk: &'a Chunk,
    packed: &'a Packed<'a, P>,
    transposed: &'a Transposed<'a>,
    sums: Sums<'a>,
}

impl<P: Mlp> Task<'_, P> {
    fn run(
        &mut self,
        TargetInputs { s, a, r }: TargetInputs<&[f32]>,
        state: TargetState<&[f32]>,
        datt: &[f32],
        [ds, da, dr]: [&mut [f32]; 3],
    ) {
        let (shape, chunk) = (self.shape, self.chunk);
        let (width, width_wide, h0_wide) = (shape.width, shape.width_wide, shape.hidden_wide[0]);
        let [s, a] = [s, a].map(|x| &x[rows(&chunk.tokens, width)]);
        let r = &r[rows(&chunk.pairs, width)];
        let pairs = pairs(self.index, chunk);
        let tokens = chunk.tokens.len();
        let lens = [
            tokens * h0_wide,
            tokens * h0_wide,
            pairs.len() * h0_wide,
            pairs.len() * h0_wide,
            padded_rows_len(tokens, width),
            padded_rows_len(tokens, width),
            padded_rows_len(pairs.len(), width),
            tokens * width_wide,
            pairs.len() * width_wide,
            chunk.scores.len(),
            P::tile_len(shape),
        ];
        with_scratch(carved_len(&lens), |mut memory| {
            let [z, dz_sum, c, dc, s_wide, a_wide, r_wide, d_wide, dr_wide, de, scratch] =
                carve(&mut memory, lens);
            self.packed.token_terms(shape, a, z);
            self.packed.candidate_terms(shape, r, c);
            let s = padded_rows(s, width, s_wide);
            let (a_rows, r_rows) = (a, r);
            let [a, r] = [(a, a_wide), (r, r_wide)].map(|(x, wide)| padded_rows(x, width, wide));

            d_wide.fill(0.0);
            self.softmax(&pairs, state, datt, (s, d_wide), de);
            unpad(d_wide, width_wide, ds, width, add_assign);

            for sums in [&mut *d_wide, dr_wide, dz_sum, dc] {
                sums.fill(0.0);
            }
            let inputs = TileInputs { pairs: &pairs, a, r, z, c };
            let products = self.packed.products;
            for tile in tiles(de.len(), P::TILE) {
                let (packed, de, sums) = (self.packed, &de[tile.clone()], &mut self.sums);
                let scatter = |scores: &Range<usize>, y: &[f32], dz: &[f32]| {
                    for Segment { pair, rows: here, tokens } in segments(&pairs, scores) {
                        let (token_rows, pair_row) =
                            (rows(&tokens, width_wide), rows(&(pair..pair + 1), width_wide));
                        dispatch(Scatter {
                            y: &y[rows(&here, width_wide)],
                            a: &a[token_rows.clone()],
                            r: &r[pair_row.clone()],
                            da: &mut d_wide[token_rows],
                            dr: &mut dr_wide[pair_row],
                            dz: &dz[rows(&here, h0_wide)],
                            dz_sum: &mut dz_sum[rows(&tokens, h0_wide)],
                            dc: &mut dc[rows(&(pair..pair + 1), h0_wide)],
                        });
                    }
                };
                let transposed = self.transposed;
                products.gradients(shape, packed, transposed, inputs, &tile, de, sums, scratch, scatter);
            }

            let ([n0, _], sums, transposed) = (shape.hidden, &mut self.sums, self.transposed);
            for (x, dx, grad, sum, weight) in [
                (a_rows, &mut *d_wide, &*dz_sum, &mut *sums.token, transposed.token),
                (r_rows, &mut *dr_wide, &*dc, &mut *sums.candidate, transposed.candidate),
            ] {
                let n = x.len() / width;
                products.add_transposed([width, n0, n], (x, width), (grad, h0_wide), (sum, h0_wide));
                let (left, out) = ((grad, h0_wide), (dx, width_wide));
                products.product([n, width, n0], left, weight, out, Finish::Add);
            }
            add_column_sums(dc, sums.b0);
            unpad(d_wide, width_wide, da, width, |from, to| to.copy_from_slice(from));
            unpad(dr_wide, width_wide, dr, width, |from, to| to.copy_from_slice(from));
        });
    }

    /// Backward pass of all softmaxes of the chunk: writes `de`, adds to `ds`.
    fn softmax(
        &self,
        pairs: &[Pair],
        TargetState { e, lse, att }: TargetState<&[f32]>,
        datt: &[f32],
        (s, ds): (&[f32], &mut [f32]),
        de: &mut [f32],
    ) {
        let Self { shape: Shape { width, width_wide, .. }, index, chunk, .. } = *self;
        let e = &e[chunk.scores.clone()];
        let longest = pairs.iter().map(|pair| pair.scores.len()).max().unwrap_or(0);
        let lens = [longest, width_wide];
        let mut order = Vec::new();
        with_scratch(carved_len(&lens), |mut memory| {
            let [p, g] = carve(&mut memory, lens);
            for (i, pair) in pairs.iter().enumerate() {
                let members = &index.rows.offsets[chunk.pairs.start + i..];
                by_length(index, members[0] as usize..members[1] as usize, &mut order);
                let rows = order.iter().rev().map(|&(length, member)| {
                    let row = index.rows.members[member] as usize;
                    let vector = row * width..(row + 1) * width;
                    (length, lse[row], &att[vector.clone()], &datt[vector])
                });
                let (e, de) = (&e[pair.scores.clone()], &mut de[pair.scores.clone()]);
                let first = pair.first_token * width_wide;
                softmax_rows_backward(e, rows, (&s[first..], &mut ds[first..]), de, p, g);
            }
        });
    }
}

/// Adds `y` and `dz` of a tile to the gradients of the tokens of one pair, in padded rows:
/// `da += y * r`, `dr += sum of y * a`, `dz_sum += dz`, `dc += sum of dz`.
struct Scatter<'a> {
    y: &'a [f32],
    a: &'a [f32],
    r: &'a [f32],
    da: &'a mut [f32],
    dr: &'a mut [f32],
    dz: &'a [f32],
    dz_sum: &'a mut [f32],
    dc: &'a mut [f32],
}

impl Kernel for Scatter<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let wide = self.r.len();
        for_columns!(S, wide, |C, j| {
            let (r, mut sums) = (load_columns::<S, C>(s, self.r, j), load_columns::<S, C>(s, self.dr, j));
            let rows = self.y.chunks_exact(wide).zip(self.a.chunks_exact(wide));
            for ((y, a), da) in rows.zip(self.da.chunks_exact_mut(wide)) {
                let columns = j..j + C * S::LANES;
                let (y, a, da) = (&y[columns.clone()], &a[columns.clone()], &mut da[columns]);
                for c in 0..C {
                    let at = c * S::LANES;
                    let y = s.load(&y[at..]);
                    s.store(s.mul_add(y, r[c], s.load(&da[at..])), &mut da[at..]);
                    sums[c] = s.mul_add(y, s.load(&a[at..]), sums[c]);
                }
            }
            for c in 0..C {
                s.store(sums[c], &mut self.dr[j + c * S::LANES..]);
            }
        });
        let wide = self.dc.len();
        for_columns!(S, wide, |C, j| {
            let mut sums = load_columns::<S, C>(s, self.dc, j);
            for (dz, sum) in self.dz.chunks_exact(wide).zip(self.dz_sum.chunks_exact_mut(wide)) {
                let (dz, sum) = (&dz[j..j + C * S::LANES], &mut sum[j..j + C * S::LANES]);
                for c in 0..C {
                    let at = c * S::LANES;
                    let dz = s.load(&dz[at..]);
                    s.store(s.add(s.load(&sum[at..]), dz), &mut sum[at..]);
                    sums[c] = s.add(sums[c], dz);
                }
            }
            for c in 0..C {
                s.store(sums[c], &mut self.dc[j + c * S::LANES..]);
            }
        });
    }
}

/// Copies or adds padded rows to packed rows.
fn unpad(from: &[f32], padded: usize, to: &mut [f32], width: usize, put: impl Fn(&[f32], &mut [f32])) {
    for (from, to) in from.chunks_exact(padded).zip(to.chunks_exact_mut(width)) {
        put(&from[..width], to);
    }
}

/// Backward pass of the softmaxes of a pair. `rows` are `(length, lse, att, datt)` from the longest
/// to the shortest. Writes `de` and adds to `ds`.
fn softmax_rows_backward<'a>(
    e: &[f32],
    rows: impl Iterator<Item = (usize, f32, &'a [f32], &'a [f32])>,
    (s_wide, ds_wide): (&[f32], &mut [f32]),
    de: &mut [f32],
    p: &mut [f32],
    g: &mut [f32],
) {
    let wide = g.len();
    let mut rows = rows.take_while(|(length, ..)| *length > 0).peekable();
    let (mut reference, mut offset) = (f32::INFINITY, 0.0);
    de[rows.peek().map_or(0, |(length, ..)| *length)..].fill(0.0);
    g.fill(0.0);
    while let Some((length, lse, att, datt)) = rows.next() {
        let scale = (lse - reference).exp();
        reference = lse;
        g.iter_mut().zip(datt).for_each(|(g, datt)| *g = *g * scale + datt);
        offset = offset * scale + datt.iter().zip(att).map(|(x, y)| x * y).sum::<f32>();
        let next = rows.peek().map_or(0, |(length, ..)| *length);
        let span = next..length;
        let p = &mut p[..span.len()];
        exp_sum(&e[span.clone()], reference, p);
        let tokens = span.start * wide..span.end * wide;
        dispatch(SoftmaxBackward {
            p,
            g,
            offset,
            s: &s_wide[tokens.clone()],
            ds: &mut ds_wide[tokens],
            de: &mut de[span],
        });
    }
}

/// `de = p (g . s - offset)`, `ds += p g` for some tokens, rows padded.
struct SoftmaxBackward<'a> {
    p: &'a [f32],
    g: &'a [f32],
    offset: f32,
    s: &'a [f32],
    ds: &'a mut [f32],
    de: &'a mut [f32],
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let wide = self.g.len();
        let rows = self.s.chunks_exact(wide).zip(self.ds.chunks_exact_mut(wide));
        for ((s, ds), (p, de)) in rows.zip(self.p.iter().zip(self.de)) {
            let (mut dot, factor) = (simd.zero(), simd.splat(*p));
            let vectors = s.chunks_exact(S::LANES).zip(ds.chunks_exact_mut(S::LANES));
            for ((s, ds), g) in vectors.zip(self.g.chunks_exact(S::LANES)) {
                let g = simd.load(g);
                dot = simd.mul_add(g, simd.load(s), dot);
                simd.store(simd.mul_add(factor, g, simd.load(ds)), ds);
            }
            *de = p * (simd.sum(dot) - self.offset);
        }
    }
}
