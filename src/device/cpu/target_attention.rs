//! Target attention: a small perceptron scores every (history token, candidate) pair, a softmax over each row's
//! history weighs its tokens. Contracts: [`Device::target_attention`](crate::device::Device::target_attention).
//!
//! **Sharing.** With the four row blocks `A, R, S, P` of `w0` (multiplying `a`, `r`, `a - r`, `a * r`) and one
//! candidate `r`,
//!
//! ```text
//! [a, r, a - r, a * r] w0 + b0 = a M + c     M = (A + S) + diag(r) P     c = r (R - S) + b0
//! ```
//!
//! so a pair's first layer is one `[T, D] [D, hidden0]` product, a quarter of the published one, and no
//! concatenation is ever stored. Tokens go through both layers in tiles whose activations stay in the first
//! cache levels; the backward computes them again.
//!
//! **Rows of a pair** share its scores and differ only in how long a prefix they see, so with the rows in order of
//! length one online softmax serves all of them: each row is the running state at its length.
//!
//! Chunks of whole sequences run in parallel; they follow from the index alone, so bits do not depend on threads.

mod backward;
pub mod unfused;

pub use backward::backward;

use super::elementwise::{add_assign, exp_sum, pad_rows, transpose};
use super::product::{Finish, Left, product};
use super::scratch::{carve, carved_len, padded, with_scratch};
use super::simd::{Kernel, Simd, dispatch};
use crate::device::{TargetIndex, TargetWeights};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens in a tile: their activations (`hidden[0] + hidden[1]` values each) and a layer's weight fit the first two
/// cache levels.
const TILE: usize = 64;

/// Widths of the perceptron and the distances between rows in working memory (suffix `_wide`).
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    hidden: [usize; 2],
    width_wide: usize,
    hidden_wide: [usize; 2],
}

impl Shape {
    fn new(width: usize, hidden: [usize; 2]) -> Self {
        assert!(width > 0 && hidden[0] > 0 && hidden[1] > 0, "a layer of width 0");
        Self { width, hidden, width_wide: padded(width), hidden_wide: hidden.map(padded) }
    }

    /// Panics where a weight's length does not fit.
    fn check<F: AsRef<[f32]>>(&self, weights: &TargetWeights<F>) {
        let [h0, h1] = self.hidden;
        let TargetWeights { w0, b0, w1, b1, w2, b2 } = weights;
        let found = [w0, b0, w1, b1, w2, b2].map(|w| w.as_ref().len());
        assert_eq!(found, [4 * self.width * h0, h0, h0 * h1, h1, h1, 1], "lengths of the target weights");
    }
}

/// One chunk's sequences, pairs and members of the rows' segments, and where its scores lie.
struct Chunk {
    sequences: Range<usize>,
    pairs: Range<usize>,
    members: Range<usize>,
    scores: Range<usize>,
    tokens: Range<usize>,
}

/// Cuts the sequences into chunks of at least 2048 scored (token, pair) combinations, at most about 64 in all.
fn chunks(index: &TargetIndex<[u32]>) -> Vec<Chunk> {
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

/// Panics where the index does not fit the buffers.
fn check_index(index: &TargetIndex<[u32]>, shape: Shape, s: &[f32], a: &[f32], r: &[f32], e: &[f32]) {
    let last = |offsets: &[u32]| *offsets.last().expect("offsets start with 0") as usize;
    let ascending = |offsets: &[u32]| offsets[0] == 0 && offsets.is_sorted();
    let pairs = index.score_offsets.len() - 1;
    let offsets = [index.cu_seqlens, index.pair_offsets, index.score_offsets, index.rows.offsets];
    assert!(offsets.into_iter().all(ascending), "offsets must ascend from 0");
    assert_eq!(index.pair_offsets.len(), index.cu_seqlens.len(), "pair_offsets is not [B + 1]");
    assert_eq!(last(index.pair_offsets), pairs, "score_offsets is not [C + 1]");
    assert_eq!(index.rows.offsets.len(), pairs + 1, "offsets of rows are not [C + 1]");
    assert_eq!(last(index.rows.offsets), index.rows.members.len(), "members of rows are not [R]");
    assert_eq!(index.row_length.len(), index.rows.members.len(), "row_length is not [R]");
    assert_eq!([s.len(), a.len()], [last(index.cu_seqlens) * shape.width; 2], "s and a are not [N, D]");
    assert_eq!(r.len(), pairs * shape.width, "r is not [C, D]");
    assert_eq!(e.len(), last(index.score_offsets), "e is not [score_offsets[C]]");
}

/// The perceptron's weights as the tiles read them: blocks combined, rows padded with zeros.
struct Packed<'a> {
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

impl Packed<'_> {
    fn lens(shape: Shape) -> [usize; 7] {
        let (d, [h0, h1]) = (shape.width, shape.hidden_wide);
        [d * h0, d * h0, d * h0, h0, shape.hidden[0] * h1, h1, h1]
    }

    fn new<'a>(
        shape: Shape,
        weights: &TargetWeights<&[f32]>,
        [token, product, candidate, b0, w1, b1, w2]: [&'a mut [f32]; 7],
    ) -> Packed<'a> {
        let ([h0, h1], [h0_wide, h1_wide]) = (shape.hidden, shape.hidden_wide);
        let block = |i: usize| &weights.w0[i * shape.width * h0..(i + 1) * shape.width * h0];
        let combine = |out: &mut [f32], i: usize, j: usize, sign: f32| {
            pad_rows(block(i), h0, h0_wide, out);
            for (out, x) in out.chunks_exact_mut(h0_wide).zip(block(j).chunks_exact(h0)) {
                out.iter_mut().zip(x).for_each(|(out, x)| *out += sign * x);
            }
        };
        combine(token, 0, 2, 1.0);
        combine(candidate, 1, 2, -1.0);
        pad_rows(block(3), h0, h0_wide, product);
        pad_rows(weights.b0, h0, h0_wide, b0);
        pad_rows(weights.w1, h1, h1_wide, w1);
        pad_rows(weights.b1, h1, h1_wide, b1);
        pad_rows(weights.w2, h1, h1_wide, w2);
        Packed { token, product, candidate, b0, w1, b1, w2, b2: weights.b2[0] }
    }

    /// `c = r (R - S) + b0` for all pairs of `r`.
    fn constants(&self, shape: Shape, r: &[f32], out: &mut [f32]) {
        let sizes = [r.len() / shape.width, shape.hidden[0], shape.width];
        let wide = shape.hidden_wide[0];
        product(
            sizes,
            Left::rows(r, shape.width),
            (self.candidate, wide),
            (out, wide),
            Finish::Bias(self.b0),
        );
    }

    /// Both hidden layers of the tokens `a` of one pair with effective weight `m` and bias `constant`.
    fn hidden(&self, shape: Shape, a: &[f32], m: &[f32], constant: &[f32], h0: &mut [f32], h1: &mut [f32]) {
        let n = a.len() / shape.width;
        let (wide, left) = (shape.hidden_wide, Left::rows(a, shape.width));
        let sizes = [n, shape.hidden[0], shape.width];
        product(sizes, left, (m, wide[0]), (h0, wide[0]), Finish::BiasRelu(constant));
        let sizes = [n, shape.hidden[1], shape.hidden[0]];
        product(sizes, Left::rows(h0, wide[0]), (self.w1, wide[1]), (h1, wide[1]), Finish::BiasRelu(self.b1));
    }
}

/// `out[i] = base[i] + r[i] * factor[i]` row by row, for padded rows: `M` from `A + S` and `P`.
fn add_scaled_rows(base: &[f32], factor: &[f32], r: &[f32], out: &mut [f32]) {
    struct AddScaledRows<'a>(&'a [f32], &'a [f32], &'a [f32], &'a mut [f32]);
    impl Kernel for AddScaledRows<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(base, factor, r, out) = self;
            let wide = out.len() / r.len();
            let rows = base.chunks_exact(wide).zip(factor.chunks_exact(wide)).zip(out.chunks_exact_mut(wide));
            for (((base, factor), out), r) in rows.zip(r) {
                let r = s.splat(*r);
                let vectors = base.chunks_exact(S::LANES).zip(factor.chunks_exact(S::LANES));
                for ((base, factor), out) in vectors.zip(out.chunks_exact_mut(S::LANES)) {
                    s.store(s.mul_add(r, s.load(factor), s.load(base)), out);
                }
            }
        }
    }
    dispatch(AddScaledRows(base, factor, r, out));
}

/// `e[t] = h1[t] . w2 + b2` for padded rows `h1`.
fn scores(h1: &[f32], w2: &[f32], b2: f32, e: &mut [f32]) {
    struct Scores<'a>(&'a [f32], &'a [f32], f32, &'a mut [f32]);
    impl Kernel for Scores<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(h1, w2, b2, e) = self;
            for (h1, e) in h1.chunks_exact(w2.len()).zip(e) {
                let mut sum = s.zero();
                for (h1, w2) in h1.chunks_exact(S::LANES).zip(w2.chunks_exact(S::LANES)) {
                    sum = s.mul_add(s.load(h1), s.load(w2), sum);
                }
                *e = s.sum(sum) + b2;
            }
        }
    }
    dispatch(Scores(h1, w2, b2, e));
}

/// The members `range` of the rows' segments in order of length; ties in the order given.
fn by_length(index: &TargetIndex<[u32]>, range: Range<usize>, order: &mut Vec<(usize, usize)>) {
    order.clear();
    order
        .extend(range.map(|member| (index.row_length[index.rows.members[member] as usize] as usize, member)));
    if !order.is_sorted() {
        order.sort_unstable();
    }
}

/// Tiles of about equal size that cover `tokens`.
fn tiles(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let count = tokens.div_ceil(TILE).max(1);
    (0..count).map(move |i| tokens * i / count..tokens * (i + 1) / count)
}

/// [`Device::target_attention`](crate::device::Device::target_attention) on slices.
///
/// # Panics
/// Where the lengths of the buffers do not fit each other.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    width: usize,
    hidden: [usize; 2],
    index: TargetIndex<[u32]>,
    s: &[f32],
    a: &[f32],
    r: &[f32],
    weights: TargetWeights<&[f32]>,
    e: &mut [f32],
    lse: &mut [f32],
    att: &mut [f32],
) {
    let shape = Shape::new(width, hidden);
    shape.check(&weights);
    check_index(&index, shape, s, a, r, e);
    let rows = index.row_length.len();
    assert_eq!([lse.len(), att.len()], [rows, rows * width], "lse and att are not [R], [R, D]");
    let lens = Packed::lens(shape);
    with_scratch(carved_len(&lens) + padded(rows) + padded(rows * width), |mut memory| {
        let packed = Packed::new(shape, &weights, carve(&mut memory, lens));
        // In the order of the segments' members, where a chunk's rows lie together.
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
            forward_chunk(shape, &index, [s, a, r], &packed, &chunk, e, lse, att);
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

#[allow(clippy::too_many_arguments)]
fn forward_chunk(
    shape: Shape,
    index: &TargetIndex<[u32]>,
    [s, a, r]: [&[f32]; 3],
    packed: &Packed,
    chunk: &Chunk,
    e: &mut [f32],
    lse: &mut [f32],
    att: &mut [f32],
) {
    let (width, [h0_wide, h1_wide]) = (shape.width, shape.hidden_wide);
    let span = |offsets: &[u32], i: usize| offsets[i] as usize..offsets[i + 1] as usize;
    let (tokens, pairs) = longest(index, chunk);
    let lens = [
        pairs * h0_wide,
        width * h0_wide,
        TILE * h0_wide,
        TILE * h1_wide,
        tokens * shape.width_wide,
        tokens,
        shape.width_wide,
    ];
    let mut order = Vec::new();
    with_scratch(carved_len(&lens), |mut memory| {
        let [constants, m, h0, h1, s_wide, p, sum] = carve(&mut memory, lens);
        for sequence in chunk.sequences.clone() {
            let pairs = span(index.pair_offsets, sequence);
            let at = span(index.cu_seqlens, sequence).start * width;
            let (s, a) = (&s[at..][..span(index.cu_seqlens, sequence).len() * width], &a[at..]);
            if pairs.is_empty() {
                continue;
            }
            pad_rows(s, width, shape.width_wide, s_wide);
            packed.constants(shape, &r[pairs.start * width..pairs.end * width], constants);
            for (pair, constant) in pairs.zip(constants.chunks_exact(h0_wide)) {
                let scored = span(index.score_offsets, pair);
                let e = &mut e[scored.start - chunk.scores.start..][..scored.len()];
                add_scaled_rows(packed.token, packed.product, &r[pair * width..(pair + 1) * width], m);
                for tile in tiles(scored.len()) {
                    let a = &a[tile.start * width..tile.end * width];
                    packed.hidden(shape, a, m, constant, h0, h1);
                    scores(&h1[..tile.len() * h1_wide], packed.w2, packed.b2, &mut e[tile]);
                }
                by_length(index, span(index.rows.offsets, pair), &mut order);
                softmax_rows(shape, e, s_wide, &order, p, sum, |member, row_lse, row_att| {
                    let member = member - chunk.members.start;
                    lse[member] = row_lse;
                    att[member * width..(member + 1) * width].copy_from_slice(row_att);
                });
            }
        }
    });
}

/// Tokens of the longest sequence of a chunk, and pairs of the one with the most.
fn longest(index: &TargetIndex<[u32]>, chunk: &Chunk) -> (usize, usize) {
    let most = |offsets: &[u32]| {
        let lens = chunk.sequences.clone().map(|i| offsets[i + 1] - offsets[i]);
        lens.max().unwrap_or(0) as usize
    };
    (most(index.cu_seqlens), most(index.pair_offsets))
}

/// One online softmax over `e`, emitting `(member, lse, att)` at the length of each `(length, member)` of `order`.
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
