//! Gradients of target attention.
//!
//! Softmax: row `i` of a pair has `p_t = e^(e_t - lse_i)` on its prefix, so with `g_i` the gradient of its output
//!
//! ```text
//! de_t  = sum over rows longer than t of e^(e_t - lse_i) (g_i . s_t - g_i . att_i)
//! ds_t += sum over the same rows of e^(e_t - lse_i) g_i
//! ```
//!
//! From the longest row to the shortest these are running sums `G = sum e^(ref - lse_i) g_i`, with `ref` the `lse` of
//! the shortest row so far: `lse` grows with length, so no exponent is ever positive.
//!
//! Perceptron, per pair with `dz` the gradient of the first layer before its ReLU:
//!
//! ```text
//! dM = a^T dz       da += dz M^T      dc = column sums of dz
//! dA = sum dM       dP = sum diag(r) dM       dR = sum r dc       dS = dA - dR       db0 = sum dc
//! dr = rowwise dot of dM and P  +  (R - S) dc
//! ```

use super::*;
use crate::device::cpu::elementwise::add_column_sums;

/// What the backward reads beside [`Packed`]: transposes, rows padded with zeros.
struct Transposed<'a> {
    /// `(A + S)^T: [hidden0, D]`
    token: &'a [f32],
    /// `P^T: [hidden0, D]`
    product: &'a [f32],
    /// `(R - S)^T: [hidden0, D]`
    candidate: &'a [f32],
    /// `[hidden1, hidden0]`
    w1: &'a [f32],
}

impl Transposed<'_> {
    fn lens(shape: Shape) -> [usize; 4] {
        let (d, [h0, h1]) = (shape.width_wide, shape.hidden);
        [h0 * d, h0 * d, h0 * d, h1 * shape.hidden_wide[0]]
    }

    fn new<'a>(
        shape: Shape,
        packed: &Packed,
        weights: &TargetWeights<&[f32]>,
        [token, product, candidate, w1]: [&'a mut [f32]; 4],
    ) -> Transposed<'a> {
        let (d, wide) = (shape.width_wide, shape.hidden_wide[0]);
        // The sources' padding columns become rows past the end of the outputs, which `transpose` leaves out.
        transpose(packed.token, wide, d, token);
        transpose(packed.product, wide, d, product);
        transpose(packed.candidate, wide, d, candidate);
        transpose(weights.w1, shape.hidden[1], wide, w1);
        Transposed { token, product, candidate, w1 }
    }
}

/// Sums of weight gradients over the pairs of a chunk, rows padded.
struct Sums<'a> {
    /// `sum dM: [D, hidden0]`
    token: &'a mut [f32],
    /// `sum diag(r) dM: [D, hidden0]`
    product: &'a mut [f32],
    /// `sum r dc: [D, hidden0]`
    candidate: &'a mut [f32],
    b0: &'a mut [f32],
    /// Transposed: `[hidden1, hidden0]`
    w1: &'a mut [f32],
    b1: &'a mut [f32],
    w2: &'a mut [f32],
}

impl Sums<'_> {
    fn lens(shape: Shape) -> [usize; 7] {
        let (d, [h0, h1]) = (shape.width, shape.hidden_wide);
        [d * h0, d * h0, d * h0, h0, shape.hidden[1] * h0, h1, h1]
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

/// [`Device::target_attention_backward`](crate::device::Device::target_attention_backward) on slices.
///
/// # Panics
/// Where the lengths of the buffers do not fit each other.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    width: usize,
    hidden: [usize; 2],
    index: TargetIndex<[u32]>,
    s: &[f32],
    a: &[f32],
    r: &[f32],
    weights: TargetWeights<&[f32]>,
    e: &[f32],
    lse: &[f32],
    att: &[f32],
    datt: &[f32],
    ds: &mut [f32],
    da: &mut [f32],
    dr: &mut [f32],
    gradients: TargetWeights<&mut [f32]>,
) {
    let shape = Shape::new(width, hidden);
    shape.check(&weights);
    shape.check(&gradients);
    check_index(&index, shape, s, a, r, e);
    let rows = index.row_length.len();
    let found = [lse.len(), att.len(), datt.len(), ds.len(), da.len(), dr.len()];
    let expected = [rows, rows * width, rows * width, s.len(), a.len(), r.len()];
    assert_eq!(found, expected, "lengths of lse, att, datt, ds, da, dr");
    let chunks = chunks(&index);
    let (packed_lens, transposed_lens) = (Packed::lens(shape), Transposed::lens(shape));
    let each = carved_len(&Sums::lens(shape));
    let len = carved_len(&packed_lens) + carved_len(&transposed_lens) + each * chunks.len().max(1);
    with_scratch(len, |mut memory| {
        let packed = Packed::new(shape, &weights, carve(&mut memory, packed_lens));
        let transposed = Transposed::new(shape, &packed, &weights, carve(&mut memory, transposed_lens));
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
            task.run([s, a, r], [e, lse, att, datt], ds, da, dr);
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

/// One chunk's part of the backward.
struct Task<'a> {
    shape: Shape,
    index: &'a TargetIndex<'a, [u32]>,
    chunk: &'a Chunk,
    packed: &'a Packed<'a>,
    transposed: &'a Transposed<'a>,
    sums: Sums<'a>,
}

/// Working memory of a pair, see [`Task::run`].
struct Memory<'a> {
    m: &'a mut [f32],
    m_transposed: &'a mut [f32],
    dm: &'a mut [f32],
    h0: &'a mut [f32],
    h1: &'a mut [f32],
    de: &'a mut [f32],
}

impl Task<'_> {
    fn run(
        &mut self,
        [s, a, r]: [&[f32]; 3],
        [e, lse, att, datt]: [&[f32]; 4],
        ds: &mut [f32],
        da: &mut [f32],
        dr: &mut [f32],
    ) {
        let shape = self.shape;
        let (width, width_wide, [h0_wide, h1_wide]) = (shape.width, shape.width_wide, shape.hidden_wide);
        let span = |offsets: &[u32], i: usize| offsets[i] as usize..offsets[i + 1] as usize;
        let (tokens, pairs) = longest(self.index, self.chunk);
        let lens = [
            pairs * h0_wide,
            pairs * h0_wide,
            width * h0_wide,
            shape.hidden[0] * width_wide,
            width * h0_wide,
            TILE * h0_wide,
            TILE * h1_wide,
            tokens * width_wide,
            tokens * width_wide,
            tokens * width_wide,
            tokens,
            tokens,
            width_wide,
            pairs * width_wide,
        ];
        let mut order = Vec::new();
        with_scratch(carved_len(&lens), |mut memory| {
            let [constants, dc, m, m_transposed, dm, h0, h1, s_wide, ds_wide, da_wide, de, p, g, dr_wide] =
                carve(&mut memory, lens);
            let mut memory = Memory { m, m_transposed, dm, h0, h1, de };
            for sequence in self.chunk.sequences.clone() {
                let pairs = span(self.index.pair_offsets, sequence);
                let tokens = span(self.index.cu_seqlens, sequence);
                let here = (tokens.start - self.chunk.tokens.start) * width..;
                let (ds, da) = (&mut ds[here.clone()][..tokens.len() * width], &mut da[here]);
                let da = &mut da[..tokens.len() * width];
                if pairs.is_empty() {
                    da.fill(0.0);
                    continue;
                }
                let tokens = tokens.start * width..tokens.end * width;
                let (s, a) = (&s[tokens.clone()], &a[tokens]);
                let r = &r[pairs.start * width..pairs.end * width];
                pad_rows(s, width, width_wide, s_wide);
                let ds_wide = &mut ds_wide[..s.len() / width * width_wide];
                let da_wide = &mut da_wide[..s.len() / width * width_wide];
                ds_wide.fill(0.0);
                da_wide.fill(0.0);
                self.packed.constants(shape, r, constants);
                let dc = &mut dc[..pairs.len() * h0_wide];
                dc.fill(0.0);
                for (i, pair) in pairs.clone().enumerate() {
                    by_length(self.index, span(self.index.rows.offsets, pair), &mut order);
                    let length = order.last().map_or(0, |(length, _)| *length);
                    let e = &e[span(self.index.score_offsets, pair)][..length];
                    let rows = order.iter().rev().map(|&(length, member)| {
                        let row = self.index.rows.members[member] as usize;
                        let vector = row * width..(row + 1) * width;
                        (length, lse[row], &att[vector.clone()], &datt[vector])
                    });
                    softmax_rows_backward(e, rows, (s_wide, ds_wide), memory.de, p, g);
                    let r = &r[i * width..(i + 1) * width];
                    let constant = &constants[i * h0_wide..(i + 1) * h0_wide];
                    let dc = &mut dc[i * h0_wide..(i + 1) * h0_wide];
                    let dr = &mut dr_wide[i * width_wide..][..width];
                    self.pair(&a[..length * width], r, constant, &mut memory, da_wide, dc, dr);
                }
                self.candidates(r, dc, dr_wide);
                let dr = &mut dr[(pairs.start - self.chunk.pairs.start) * width..][..r.len()];
                unpad(dr_wide, width_wide, dr, width, |from, to| to.copy_from_slice(from));
                unpad(da_wide, width_wide, da, width, |from, to| to.copy_from_slice(from));
                unpad(ds_wide, width_wide, ds, width, add_assign);
            }
        });
    }

    /// Backward of the perceptron for the tokens `a` of one pair, from `memory.de`: adds to the sums and to `da`,
    /// writes `dc` and the part of `dr` that comes through `a * r`.
    #[allow(clippy::too_many_arguments)]
    fn pair(
        &mut self,
        a: &[f32],
        r: &[f32],
        constant: &[f32],
        memory: &mut Memory,
        da_wide: &mut [f32],
        dc: &mut [f32],
        dr: &mut [f32],
    ) {
        let Memory { m, m_transposed, dm, h0, h1, de } = memory;
        let (shape, packed, sums) = (self.shape, self.packed, &mut self.sums);
        let (width, width_wide, wide) = (shape.width, shape.width_wide, shape.hidden_wide);
        let [n0, n1] = shape.hidden;
        add_scaled_rows(packed.token, packed.product, r, m);
        add_scaled_columns(self.transposed.token, self.transposed.product, r, width_wide, m_transposed);
        dm.fill(0.0);
        for tile in tiles(a.len() / width) {
            let n = tile.len();
            let a = &a[tile.start * width..tile.end * width];
            packed.hidden(shape, a, m, constant, h0, h1);
            let (h0, h1) = (&mut h0[..n * wide[0]], &mut h1[..n * wide[1]]);
            scores_backward(&de[tile.clone()], packed.w2, h1, sums.b1, sums.w2);
            let dh1 = &*h1;
            let left = Left::transposed(dh1, wide[1]);
            product([n1, n0, n], left, (&*h0, wide[0]), (sums.w1, wide[0]), Finish::Add);
            let left = Left::rows(dh1, wide[1]);
            let w1 = (self.transposed.w1, wide[0]);
            product([n, n0, n1], left, w1, (h0, wide[0]), Finish::WherePositive);
            let dz = &*h0;
            add_column_sums(dz, dc);
            let left = Left::transposed(a, width);
            product([width, n0, n], left, (dz, wide[0]), (dm, wide[0]), Finish::Add);
            let da = (&mut da_wide[tile.start * width_wide..], width_wide);
            product([n, width, n0], Left::rows(dz, wide[0]), (m_transposed, width_wide), da, Finish::Add);
        }
        fold(dm, packed.product, r, sums.token, sums.product, dr);
        add_assign(dc, sums.b0);
    }

    /// What the constants' gradients `dc` of a sequence's pairs mean for `R - S` and for `r`.
    fn candidates(&mut self, r: &[f32], dc: &[f32], dr_wide: &mut [f32]) {
        let (width, wide, width_wide) = (self.shape.width, self.shape.hidden_wide[0], self.shape.width_wide);
        let (pairs, h0) = (r.len() / width, self.shape.hidden[0]);
        let left = Left::transposed(r, width);
        product([width, h0, pairs], left, (dc, wide), (self.sums.candidate, wide), Finish::Add);
        let candidate = (self.transposed.candidate, width_wide);
        product([pairs, width, h0], Left::rows(dc, wide), candidate, (dr_wide, width_wide), Finish::Add);
    }
}

/// Copies or adds padded rows to rows without padding.
fn unpad(from: &[f32], padded: usize, to: &mut [f32], width: usize, put: impl Fn(&[f32], &mut [f32])) {
    for (from, to) in from.chunks_exact(padded).zip(to.chunks_exact_mut(width)) {
        put(&from[..width], to);
    }
}

/// Backward of a pair's softmaxes. `rows` are `(length, lse, att, datt)` from the longest to the shortest; writes
/// `de` up to the longest and adds to `ds`.
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

/// Replaces `h1` by the gradient before its ReLU, `de[t] * w2` where `h1` is positive; adds to `db1` and `dw2`.
fn scores_backward(de: &[f32], w2: &[f32], h1: &mut [f32], db1: &mut [f32], dw2: &mut [f32]) {
    struct ScoresBackward<'a>(&'a [f32], &'a [f32], &'a mut [f32], &'a mut [f32], &'a mut [f32]);
    impl Kernel for ScoresBackward<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(de, w2, h1, db1, dw2) = self;
            let wide = w2.len();
            for j in (0..wide).step_by(S::LANES) {
                let w2 = s.load(&w2[j..]);
                let (mut bias, mut weight) = (s.load(&db1[j..]), s.load(&dw2[j..]));
                for (h1, de) in h1.chunks_exact_mut(wide).zip(de) {
                    let (h, de) = (s.load(&h1[j..]), s.splat(*de));
                    let gradient = s.where_positive(h, s.mul(de, w2));
                    weight = s.mul_add(de, h, weight);
                    bias = s.add(bias, gradient);
                    s.store(gradient, &mut h1[j..]);
                }
                s.store(bias, &mut db1[j..]);
                s.store(weight, &mut dw2[j..]);
            }
        }
    }
    dispatch(ScoresBackward(de, w2, h1, db1, dw2));
}

/// `out[i, j] = base[i, j] + factor[i, j] * r[j]` for padded rows: `M^T`.
fn add_scaled_columns(base: &[f32], factor: &[f32], r: &[f32], wide: usize, out: &mut [f32]) {
    struct AddScaledColumns<'a>(&'a [f32], &'a [f32], &'a [f32], &'a mut [f32]);
    impl Kernel for AddScaledColumns<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(base, factor, r, out) = self;
            let wide = r.len();
            let rows = base.chunks_exact(wide).zip(factor.chunks_exact(wide)).zip(out.chunks_exact_mut(wide));
            for ((base, factor), out) in rows {
                for j in (0..wide).step_by(S::LANES) {
                    let value = s.mul_add(s.load(&r[j..]), s.load(&factor[j..]), s.load(&base[j..]));
                    s.store(value, &mut out[j..]);
                }
            }
        }
    }
    with_scratch(wide, |r_wide| {
        pad_rows(r, r.len(), wide, r_wide);
        dispatch(AddScaledColumns(base, factor, r_wide, out));
    });
}

/// `token += dm`, `product += diag(r) dm`, `dr = rowwise dot of dm and p`, for padded rows.
fn fold(dm: &[f32], p: &[f32], r: &[f32], token: &mut [f32], product: &mut [f32], dr: &mut [f32]) {
    struct Fold<'a>(&'a [f32], &'a [f32], &'a [f32], &'a mut [f32], &'a mut [f32], &'a mut [f32]);
    impl Kernel for Fold<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(dm, p, r, token, product, dr) = self;
            let wide = dm.len() / r.len();
            let inputs = dm.chunks_exact(wide).zip(p.chunks_exact(wide)).zip(r);
            let outputs = token.chunks_exact_mut(wide).zip(product.chunks_exact_mut(wide)).zip(dr);
            for (((dm, p), r), ((token, product), dr)) in inputs.zip(outputs) {
                let (r, mut dot) = (s.splat(*r), s.zero());
                for j in (0..wide).step_by(S::LANES) {
                    let dm = s.load(&dm[j..]);
                    dot = s.mul_add(dm, s.load(&p[j..]), dot);
                    s.store(s.add(s.load(&token[j..]), dm), &mut token[j..]);
                    s.store(s.mul_add(r, dm, s.load(&product[j..])), &mut product[j..]);
                }
                *dr = s.sum(dot);
            }
        }
    }
    dispatch(Fold(dm, p, r, token, product, dr));
}
