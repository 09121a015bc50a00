//! Target attention: an MLP scores every (history token, candidate) pair, and a softmax over the
//! history of each row weighs its tokens. Contract: [`TargetAttention`].
//!
//! **First layer.** With the four row blocks `A, R, S, P` of `w0` (multiplying `a`, `r`, `a - r`,
//! `a * r`),
//!
//! ```text
//! [a, r, a - r, a * r] w0 + b0 = z + c + (a * r) P      z = a (A + S)      c = r (R - S) + b0
//! ```
//!
//! `z` is computed once per token, `c` once per candidate, and only the last term, a quarter of the
//! published layer, once per pair. The concatenation is never stored. All pairs share the weights,
//! so the scores of a chunk go through both layers in tiles that may span pairs and sequences. The
//! activations of a tile stay in the first cache levels; the backward pass recomputes them.
//!
//! **Softmax.** The rows of a pair share its scores and differ in the length of their history. One
//! online softmax, over the rows in order of length, serves all of them: each row is the running
//! state at its length.
//!
//! **Threads.** Chunks of whole sequences run in parallel. They depend only on the index, so
//! results are bitwise equal for any number of threads.

mod backward;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod mlp;
pub mod unfused;

pub use backward::backward;

use super::elementwise::{add_assign, exp_sum, for_columns, load_columns, pad_rows};
use super::product::{Finish, Left, Products, product};
use super::scratch::{carve, carved_len, padded, with_scratch};
use crate::device::cpu::slices::Slices;
use crate::device::cpu::{Cpu, Done, Floats, Indices, with_products};
use crate::device::{
    DeviceError, Memory, Segments, TargetAttention, TargetCounts, TargetGradients, TargetIndex, TargetInputs,
    TargetShape, TargetState, TargetWeights,
};
use crate::simd::{Kernel, Simd, dispatch};
use mlp::{Mlp, TileInputs};
use rayon::prelude::*;
use std::ops::Range;

/// Widths of the MLP, and distances between rows in scratch memory (suffix `_wide`).
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    hidden: [usize; 2],
    width_wide: usize,
    hidden_wide: [usize; 2],
    slope: f32,
}

impl Shape {
    fn new(shape: TargetShape) -> Self {
        let (TargetShape { width, hidden, .. }, slope) = (shape, shape.slope());
        assert!(width > 0 && hidden[0] > 0 && hidden[1] > 0, "an MLP layer of width 0");
        Self { width, hidden, width_wide: padded(width), hidden_wide: hidden.map(padded), slope }
    }

    /// Row block `i` of `w0`: `A, R, S, P`.
    fn block<'a>(&self, weights: &TargetWeights<&'a [f32]>, i: usize) -> &'a [f32] {
        let len = self.width * self.hidden[0];
        &weights.w0[i * len..(i + 1) * len]
    }

    /// Panics if the length of a weight contradicts the widths.
    fn check<F: AsRef<[f32]>>(&self, weights: &TargetWeights<F>) {
        let [h0, h1] = self.hidden;
        let TargetWeights { w0, b0, w1, b1, w2, b2 } = weights;
        let found = [w0, b0, w1, b1, w2, b2].map(|w| w.as_ref().len());
        assert_eq!(found, [4 * self.width * h0, h0, h0 * h1, h1, h1, 1], "lengths of the target weights");
    }
}

/// The sequences of a chunk, with their pairs, scores, tokens and members of the segments of rows.
struct Chunk {
    sequences: Range<usize>,
    pairs: Range<usize>,
    members: Range<usize>,
    scores: Range<usize>,
    tokens: Range<usize>,
}

/// Cuts the sequences into at most about 64 chunks of at least 2048 scores.
fn chunks(index: &TargetIndex<&[u32]>) -> Vec<Chunk> {
    let at = |offsets: &[u32], i: usize| offsets[i] as usize;
    let sequences = index.cu_seqlens.len() - 1;
    let enough = (at(index.score_offsets, index.score_offsets.len() - 1) / 64).max(2048);
    let chunk = |sequences: Range<usize>| {
        let of = |offsets: &[u32], range: &Range<usize>| at(offsets, range.start)..at(offsets, range.end);
        let pairs = of(index.pair_offsets, &sequences);
        Chunk {
            members: of(index.rows.offsets, &pairs),
            scores: of(index.score_offsets, &pairs),
            tokens: of(index.cu_seqlens, &sequences),
            sequences,
            pairs,
        }
    };
    let mut chunks = Vec::new();
    let mut start = 0;
    for end in 1..=sequences {
        let candidate = chunk(start..end);
        if candidate.scores.len() >= enough || end == sequences {
            chunks.push(candidate);
            start = end;
        }
    }
    chunks
}

/// Panics if the lengths of the buffers contradict the index.
fn check_index(index: &TargetIndex<&[u32]>, shape: Shape, inputs: &TargetInputs<&[f32]>, e: &[f32]) {
    let TargetInputs { s, a, r } = inputs;
    let TargetCounts { tokens, pairs, scores, .. } = index.counts();
    assert_eq!([s.len(), a.len()], [tokens * shape.width; 2], "s and a are not [N, D]");
    assert_eq!(r.len(), pairs * shape.width, "r is not [C, D]");
    assert_eq!(e.len(), scores, "e is not [score_offsets[C]]");
}

/// Combined weights, `[D, hidden0]`, rows padded with zeros.
struct Combined<'a> {
    /// `A + S`
    token: &'a [f32],
    /// `R - S`
    candidate: &'a [f32],
}

impl Combined<'_> {
    fn lens(shape: Shape) -> [usize; 2] {
        [shape.width * shape.hidden_wide[0]; 2]
    }

    fn new<'a>(
        shape: Shape,
        weights: &TargetWeights<&[f32]>,
        [token, candidate]: [&'a mut [f32]; 2],
    ) -> Combined<'a> {
        let (h0, h0_wide) = (shape.hidden[0], shape.hidden_wide[0]);
        let combine = |out: &mut [f32], i: usize, j: usize, sign: f32| {
            pad_rows(shape.block(weights, i), h0, h0_wide, out);
            for (out, x) in out.chunks_exact_mut(h0_wide).zip(shape.block(weights, j).chunks_exact(h0)) {
                out.iter_mut().zip(x).for_each(|(out, x)| *out += sign * x);
            }
        };
        combine(token, 0, 2, 1.0);
        combine(candidate, 1, 2, -1.0);
        Combined { token, candidate }
    }
}

/// The weights as right factors of the products `P`; biases and `w2` padded with zeros.
struct Packed<'a, P> {
    products: P,
    /// `A + S: [D, hidden0]`
    token: &'a [f32],
    /// `P: [D, hidden0]`
    product: &'a [f32],
    /// `R - S: [D, hidden0]`
    candidate: &'a [f32],
    b0: &'a [f32],
    /// `[hidden0, hidden1]`
    w1: &'a [f32],
    b1: &'a [f32],
    w2: &'a [f32],
    b2: f32,
}

impl<P: Products> Packed<'_, P> {
    fn lens(products: P, shape: Shape) -> [usize; 7] {
        let [h0, h1] = shape.hidden_wide;
        let first = products.packed_len([shape.width, shape.hidden[0]]);
        [first, first, first, h0, products.packed_len(shape.hidden), h1, h1]
    }

    fn new<'a>(
        products: P,
        shape: Shape,
        weights: &TargetWeights<&[f32]>,
        [token, product, candidate, b0, w1, b1, w2]: [&'a mut [f32]; 7],
    ) -> Packed<'a, P> {
        let ([h0, h1], [h0_wide, h1_wide]) = (shape.hidden, shape.hidden_wide);
        let (lens, first) = (Combined::lens(shape), [shape.width, h0]);
        with_scratch(carved_len(&lens), |mut memory| {
            let combined = Combined::new(shape, weights, carve(&mut memory, lens));
            products.pack(first, (combined.token, h0_wide), token);
            products.pack(first, (combined.candidate, h0_wide), candidate);
        });
        products.pack(first, (shape.block(weights, 3), h0), product);
        products.pack(shape.hidden, (weights.w1, h1), w1);
        pad_rows(weights.b0, h0, h0_wide, b0);
        pad_rows(weights.b1, h1, h1_wide, b1);
        pad_rows(weights.w2, h1, h1_wide, w2);
        Packed { products, token, product, candidate, b0, w1, b1, w2, b2: weights.b2[0] }
    }

    /// `z = a (A + S)` for the tokens `a`, in padded rows.
    fn token_terms(&self, shape: Shape, a: &[f32], out: &mut [f32]) {
        let sizes = [a.len() / shape.width, shape.hidden[0], shape.width];
        let out = (out, shape.hidden_wide[0]);
        self.products.product(sizes, (a, shape.width), self.token, out, Finish::Store);
    }

    /// `c = r (R - S) + b0` for the pairs `r`, in padded rows.
    fn candidate_terms(&self, shape: Shape, r: &[f32], out: &mut [f32]) {
        let sizes = [r.len() / shape.width, shape.hidden[0], shape.width];
        let (out, finish) = ((out, shape.hidden_wide[0]), Finish::Bias(self.b0));
        self.products.product(sizes, (r, shape.width), self.candidate, out, finish);
    }
}

/// A pair, with positions relative to the chunk.
struct Pair {
    scores: Range<usize>,
    first_token: usize,
}

/// The pairs of a chunk.
fn pairs(index: &TargetIndex<&[u32]>, chunk: &Chunk) -> Vec<Pair> {
    let mut pairs = Vec::with_capacity(chunk.pairs.len());
    for sequence in chunk.sequences.clone() {
        for pair in index.pair_offsets[sequence] as usize..index.pair_offsets[sequence + 1] as usize {
            let scores = &index.score_offsets[pair..];
            let relative = |offset: u32| offset as usize - chunk.scores.start;
            pairs.push(Pair {
                scores: relative(scores[0])..relative(scores[1]),
                first_token: index.cu_seqlens[sequence] as usize - chunk.tokens.start,
            });
        }
    }
    pairs
}

/// Consecutive scores of one pair in a tile.
struct Segment {
    pair: usize,
    /// Rows of the tile.
    rows: Range<usize>,
    /// Tokens of the chunk.
    tokens: Range<usize>,
}

/// The segments of the scores `tile` of a chunk.
fn segments<'a>(pairs: &'a [Pair], tile: &Range<usize>) -> impl Iterator<Item = Segment> + use<'a> {
    let tile = tile.clone();
    let first = pairs.partition_point(|pair| pair.scores.end <= tile.start);
    let inside = pairs[first..].iter().take_while(move |pair| pair.scores.start < tile.end);
    inside.enumerate().filter(|(_, pair)| !pair.scores.is_empty()).map(move |(i, pair)| {
        let scores = pair.scores.start.max(tile.start)..pair.scores.end.min(tile.end);
        let token = |score: usize| pair.first_token + score - pair.scores.start;
        Segment {
            pair: first + i,
            rows: scores.start - tile.start..scores.end - tile.start,
            tokens: token(scores.start)..token(scores.end),
        }
    })
}

/// The values of the rows `range`, `wide` each.
fn rows(range: &Range<usize>, wide: usize) -> Range<usize> {
    range.start * wide..range.end * wide
}

/// The members `range` of the segments of rows in order of length, ties in the given order.
fn by_length(index: &TargetIndex<&[u32]>, range: Range<usize>, order: &mut Vec<(usize, usize)>) {
    order.clear();
    order
        .extend(range.map(|member| (index.row_length[index.rows.members[member] as usize] as usize, member)));
    if !order.is_sorted() {
        order.sort_unstable();
    }
}

/// The tiles of `scores` scores, of `size` each.
fn tiles(scores: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..scores).step_by(size).map(move |start| start..(start + size).min(scores))
}

/// `x` if its rows are whole cache lines, else a copy in `memory` with padded rows.
fn padded_rows<'a>(x: &'a [f32], width: usize, memory: &'a mut [f32]) -> &'a [f32] {
    let wide = padded(width);
    if width == wide {
        return x;
    }
    pad_rows(x, width, wide, memory);
    memory
}

/// Values [`padded_rows`] needs for `rows` rows.
fn padded_rows_len(rows: usize, width: usize) -> usize {
    if width == padded(width) { 0 } else { rows * padded(width) }
}

/// The packed batch as [`forward`] and `backward` read it.
pub struct TargetPlan {
    shape: TargetShape,
    cu_seqlens: Indices,
    pair_offsets: Indices,
    score_offsets: Indices,
    row_offsets: Indices,
    row_members: Indices,
    row_length: Indices,
}

impl TargetPlan {
    fn index(&self) -> TargetIndex<&[u32]> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.row_offsets, members: &self.row_members },
            row_length: &self.row_length,
        }
    }
}

impl TargetAttention for Cpu {
    type TargetPlan = TargetPlan;

    fn target_plan(
        &self,
        (): &mut (),
        shape: TargetShape,
        index: TargetIndex<&[u32]>,
    ) -> Result<TargetPlan, DeviceError> {
        Ok(TargetPlan {
            shape,
            cu_seqlens: self.upload(index.cu_seqlens)?,
            pair_offsets: self.upload(index.pair_offsets)?,
            score_offsets: self.upload(index.score_offsets)?,
            row_offsets: self.upload(index.rows.offsets)?,
            row_members: self.upload(index.rows.members)?,
            row_length: self.upload(index.row_length)?,
        })
    }
    fn target_attention(
        &self,
        plan: &TargetPlan,
        inputs: TargetInputs<&Floats>,
        weights: TargetWeights<&Floats>,
        state: TargetState<&mut Floats>,
    ) -> Done {
        let (inputs, weights, state) = (inputs.slices(), weights.slices(), state.slices());
        with_products!(self, |products| forward(products, plan.shape, plan.index(), inputs, weights, state));
        Ok(())
    }
    fn target_attention_backward(
        &self,
        plan: &TargetPlan,
        inputs: TargetInputs<&Floats>,
        weights: TargetWeights<&Floats>,
        state: TargetState<&Floats>,
        datt: &Floats,
        gradients: TargetGradients<&mut Floats>,
    ) -> Done {
        let (inputs, weights, state) = (inputs.slices(), weights.slices(), state.slices());
        let (index, gradients) = (plan.index(), gradients.slices());
        with_products!(self, |products| {
            backward(products, plan.shape, index, inputs, weights, state, datt, gradients);
        });
        Ok(())
    }
}

/// [`TargetAttention::target_attention`] on slices.
///
/// # Panics
/// If the lengths of the buffers contradict each other.
pub fn forward<P: Mlp>(
    products: P,
    shape: TargetShape,
    index: TargetIndex<&[u32]>,
    inputs: TargetInputs<&[f32]>,
    weights: TargetWeights<&[f32]>,
    state: TargetState<&mut [f32]>,
) {
    let (shape, width) = (Shape::new(shape), shape.width);
    let TargetState { e, lse, att } = state;
    shape.check(&weights);
    check_index(&index, shape, &inputs, e);
    let rows = index.row_length.len();
    assert_eq!([lse.len(), att.len()], [rows, rows * width], "lse and att are not [R], [R, D]");
    let lens = Packed::lens(products, shape);
    with_scratch(carved_len(&lens) + padded(rows) + padded(rows * width), |mut memory| {
        let packed = Packed::new(products, shape, &weights, carve(&mut memory, lens));
        // In the order of the members of the segments, in which the rows of a chunk are contiguous.
        let [lse_members, att_members] = carve(&mut memory, [rows, rows * width]);
        let mut rest = (&mut e[..], &mut *lse_members, &mut *att_members);
        let tasks: Vec<_> = chunks(&index)
            .into_iter()
            .map(|chunk| {
                let e = split(&mut rest.0, chunk.scores.len());
                let lse = split(&mut rest.1, chunk.members.len());
                let att = split(&mut rest.2, chunk.members.len() * width);
                (chunk, e, lse, att)
            })
            .collect();
        tasks.into_par_iter().for_each(|(chunk, e, lse, att)| {
            forward_chunk(shape, &index, inputs, &packed, &chunk, TargetState { e, lse, att });
        });
        for (member, row) in index.rows.members.iter().enumerate() {
            let row = *row as usize;
            lse[row] = lse_members[member];
            att[row * width..(row + 1) * width]
                .copy_from_slice(&att_members[member * width..(member + 1) * width]);
        }
    });
}

/// Takes the first `len` values off `rest`.
fn split<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    rest.split_off_mut(..len).expect("chunks add up to the whole")
}

/// `lse` and `att` are in the order of the members of the segments.
fn forward_chunk<P: Mlp>(
    shape: Shape,
    index: &TargetIndex<&[u32]>,
    TargetInputs { s, a, r }: TargetInputs<&[f32]>,
    packed: &Packed<P>,
    chunk: &Chunk,
    TargetState { e, lse, att }: TargetState<&mut [f32]>,
) {
    let (width, width_wide, h0_wide) = (shape.width, shape.width_wide, shape.hidden_wide[0]);
    let [s, a] = [s, a].map(|x| &x[rows(&chunk.tokens, width)]);
    let r = &r[rows(&chunk.pairs, width)];
    let pairs = pairs(index, chunk);
    let longest = pairs.iter().map(|pair| pair.scores.len()).max().unwrap_or(0);
    let lens = [
        chunk.tokens.len() * h0_wide,
        pairs.len() * h0_wide,
        padded_rows_len(chunk.tokens.len(), width),
        padded_rows_len(chunk.tokens.len(), width),
        padded_rows_len(pairs.len(), width),
        P::tile_len(shape),
        longest,
        width_wide,
    ];
    with_scratch(carved_len(&lens), |mut memory| {
        let [z, c, s_wide, a_wide, r_wide, scratch, p, sum] = carve(&mut memory, lens);
        packed.token_terms(shape, a, z);
        packed.candidate_terms(shape, r, c);
        let [s, a, r] = [(s, s_wide), (a, a_wide), (r, r_wide)].map(|(x, wide)| padded_rows(x, width, wide));
        let inputs = TileInputs { pairs: &pairs, a, r, z, c };
        for tile in tiles(e.len(), P::TILE) {
            packed.products.scores(shape, packed, inputs, &tile, scratch, &mut e[tile.clone()]);
        }
        for pair in &pairs {
            prefer_recent(shape.slope, &mut e[pair.scores.clone()]);
        }
        let mut order = Vec::new();
        for (i, pair) in pairs.iter().enumerate() {
            let members =
                index.rows.offsets[chunk.pairs.start + i]..index.rows.offsets[chunk.pairs.start + i + 1];
            by_length(index, members.start as usize..members.end as usize, &mut order);
            let (e, s) = (&e[pair.scores.clone()], &s[pair.first_token * width_wide..]);
            softmax_rows(shape, e, s, &order, p, sum, |member, row_lse, row_att| {
                let member = member - chunk.members.start;
                lse[member] = row_lse;
                att[member * width..(member + 1) * width].copy_from_slice(row_att);
            });
        }
    });
}

/// Subtracts `slope` from the scores of a pair for each later token.
fn prefer_recent(slope: f32, e: &mut [f32]) {
    if slope != 0.0 {
        e.iter_mut().rev().enumerate().for_each(|(age, e)| *e -= slope * age as f32);
    }
}

/// One online softmax over `e`. Emits `(member, lse, att)` at the length of each `(length, member)`
/// of `order`.
fn softmax_rows(
    shape: Shape,
    e: &[f32],
    s_wide: &[f32],
    order: &[(usize, usize)],
    p: &mut [f32],
    sum: &mut [f32],
    mut emit: impl FnMut(usize, f32, &[f32]),
) {
    let (width, wide) = (shape.width, shape.width_wide);
    let (mut largest, mut denominator, mut done) = (f32::NEG_INFINITY, 0.0, 0);
    sum.fill(0.0);
    with_scratch(wide, |att| {
        for &(length, member) in order {
            if length > done {
                let e = &e[done..length];
                let before = largest;
                largest = e.iter().copied().fold(before, f32::max);
                let scale = if done == 0 { 0.0 } else { (before - largest).exp() };
                let p = &mut p[..e.len()];
                denominator = denominator * scale + exp_sum(e, largest, p);
                sum.iter_mut().for_each(|x| *x *= scale);
                let s = &s_wide[done * wide..];
                let left = Left::rows(p, e.len());
                product([1, width, e.len()], left, (s, wide), (sum, wide), Finish::Add);
                done = length;
            }
            if length == 0 {
                emit(member, f32::NEG_INFINITY, &sum[..width]);
            } else {
                att.iter_mut().zip(&*sum).for_each(|(att, sum)| *att = sum / denominator);
                emit(member, largest + denominator.ln(), &att[..width]);
            }
        }
    });
}
