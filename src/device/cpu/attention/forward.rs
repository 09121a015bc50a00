//! The forward pass of a range of queries of one sequence.

use super::pack::{KeyOrder, Piece, QueryOrder, Row, STRETCH, Scratch, Tile, cut};
use super::product::{accumulate_rows, score};
use super::{Group, Sequence, Shape};
use crate::device::cpu::simd::{Kernel, Simd};
use std::f32::consts::LOG2_E;
use std::ops::Range;

pub(super) struct Forward<'a> {
    pub(super) sequence: Sequence<'a>,
    pub(super) queries: Range<usize>,
    /// Of the queries only, as `lse`.
    pub(super) o: &'a mut [f32],
    pub(super) lse: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sequence, queries: range, o, lse, scratch } = self;
        let shape = sequence.shape;
        let visible = 0..if shape.causal { range.end } else { sequence.tokens };
        let Scratch { keys, queries, k_panels, rows, tile, .. } = scratch;
        keys.arrange(&sequence, visible.clone());
        queries.arrange(&sequence, keys, visible, range.clone());
        let padded = shape.d.next_multiple_of(S::LANES);
        let k_panels = k_panels.take(shape.width() * keys.slots);
        let v_rows = rows.take(shape.heads * keys.slots * padded);
        keys.pack_panels(&sequence, sequence.k, k_panels);
        let finite = keys.pack_rows(&sequence, sequence.v, padded, v_rows);
        let values = Values { rows: v_rows, padded, finite };
        let mut context =
            Context { sequence, keys, queries, k_panels, values, tile, o, lse, first: range.start };
        for group in shape.groups() {
            let rows = context.queries.rows(&group);
            let mut row = 0;
            while row < rows {
                // Few rows left go in a smaller tile: the rows a tile lacks are computed all the same.
                if S::REGISTERS >= 32 && rows - row > 4 {
                    context.tile::<S, 8>(s, &group, row..rows.min(row + 8));
                    row += 8;
                } else {
                    context.tile::<S, 4>(s, &group, row..rows.min(row + 4));
                    row += 4;
                }
            }
        }
    }
}

/// Packed values, `[H, slots, padded d]`.
#[derive(Clone, Copy)]
struct Values<'a> {
    rows: &'a [f32],
    padded: usize,
    finite: bool,
}

struct Context<'a> {
    sequence: Sequence<'a>,
    keys: &'a KeyOrder,
    queries: &'a QueryOrder,
    k_panels: &'a [f32],
    values: Values<'a>,
    tile: &'a mut Tile,
    o: &'a mut [f32],
    lse: &'a mut [f32],
    /// The first query token: the first row of `o` and `lse`.
    first: usize,
}

impl Context<'_> {
    /// Output and `lse` of at most `R` rows of a group.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, group: &Group, range: Range<usize>) {
        let shape = self.sequence.shape;
        let rows = self.queries.tile::<R>(group, range.clone());
        let Tile { q, scores, sums, pieces, .. } = &mut *self.tile;
        cut(shape, group, rows[R - 1].visible, pieces);
        let q = q.take(R * shape.d);
        interleave(&rows, self.sequence.q, shape.width(), |row| row.head * shape.d, shape.scale * LOG2_E, q);
        let padded = self.values.padded;
        let sum_stride = shape.key_slots * padded;
        let sums = sums.take(R * sum_stride);
        sums.fill(0.0);
        let scores = scores.take(R * STRETCH);
        let mut softmax = Softmax::<R>::new();
        for stretch in stretches(pieces) {
            let before = softmax.max;
            softmax.stretch(s, shape, self.keys, self.k_panels, &rows, q, stretch, scores);
            for r in 0..R {
                let factor = rescale(before[r], softmax.max[r]);
                if factor != 1.0 {
                    sums[r * sum_stride..][..sum_stride].iter_mut().for_each(|x| *x *= factor);
                }
            }
            for piece in stretch.iter().filter(|piece| piece.kept) {
                let from = (piece.key_head * self.keys.slots + piece.slot(self.keys)) * padded;
                let values = &self.values.rows[from..][..piece.len * padded];
                let sums = &mut sums[(piece.key_head - group.key_heads.start) * padded..];
                let weights = &scores[piece.at..];
                // Hidden keys have weight 0, which hides any value but those that are not finite.
                let shared = if self.values.finite { piece.len } else { piece.visible(&rows[0]) };
                accumulate_rows::<S, R>(s, weights, STRETCH, values, padded, 0..shared, sums, sum_stride);
                for r in 0..R {
                    let own = shared..piece.visible(&rows[r]);
                    if !own.is_empty() {
                        let (weights, sums) = (&weights[r * STRETCH..], &mut sums[r * sum_stride..]);
                        accumulate_rows::<S, 1>(s, weights, 0, values, padded, own, sums, 0);
                    }
                }
            }
        }
        for (r, row) in rows[..range.len()].iter().enumerate() {
            let place = (row.token - self.first) * shape.query_slots + row.slot;
            let (max, sum) = (softmax.max[r], softmax.sum[r]);
            let out = &mut self.o[place * shape.key_slots * shape.d..][..shape.key_slots * shape.d];
            if sum == 0.0 {
                out.fill(0.0);
                self.lse[place] = f32::NEG_INFINITY;
                continue;
            }
            let inverse = 1.0 / sum;
            let sums = sums[r * sum_stride..].chunks_exact(padded);
            for (out, sums) in out.chunks_exact_mut(shape.d).zip(sums) {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse;
                }
            }
            self.lse[place] = ((f64::from(max) + f64::from(sum).log2()) * std::f64::consts::LN_2) as f32;
        }
    }
}

/// Running maximum (base 2) and sum of `R` rows.
pub(super) struct Softmax<const R: usize> {
    pub(super) max: [f32; R],
    pub(super) sum: [f32; R],
}

/// What sums relative to an old maximum are multiplied with when it grows.
fn rescale(old: f32, new: f32) -> f32 {
    if old == new || old == f32::NEG_INFINITY { 1.0 } else { (old - new).exp2() }
}

impl<const R: usize> Softmax<R> {
    pub(super) fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; R], sum: [0.0; R] }
    }

    /// Takes in a stretch of pieces: `scores` then holds, for the kept ones, the exponentials relative to the
    /// new maximum, 0 where a row does not see the key.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "keys, rows, and where scores go")]
    pub(super) fn stretch<S: Simd>(
        &mut self,
        s: S,
        shape: &Shape,
        keys: &KeyOrder,
        k_panels: &[f32],
        rows: &[Row; R],
        q: &[f32],
        pieces: &[Piece],
        scores: &mut [f32],
    ) {
        let mut max = [s.splat(f32::NEG_INFINITY); R];
        for piece in pieces {
            let panel = &k_panels[piece.key_head * shape.d * keys.slots..][..shape.d * keys.slots];
            score_piece::<S, R>(s, keys, panel, rows, q, piece, scores, &mut max);
        }
        let mut base = [0.0; R];
        for r in 0..R {
            let new = s.max_lane(max[r]).max(self.max[r]);
            self.sum[r] *= rescale(self.max[r], new);
            self.max[r] = new;
            // A row that saw nothing yet has no maximum to subtract: its scores are all -inf.
            base[r] = if new == f32::NEG_INFINITY { 0.0 } else { new };
        }
        let mut sum = [s.zero(); R];
        for piece in pieces {
            for r in 0..R {
                let scores = &mut scores[r * STRETCH + piece.at..][..piece.padded()];
                let base = s.splat(base[r]);
                for vector in scores.chunks_exact_mut(S::LANES) {
                    let p = s.exp2(s.sub(s.load(vector), base));
                    sum[r] = s.add(sum[r], p);
                    s.store(p, vector);
                }
            }
        }
        for r in 0..R {
            self.sum[r] += s.sum(sum[r]);
        }
    }
}

/// Scores of a piece into the stretch, -inf where a row does not see the key, and their maximum.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "keys, rows, and where scores go")]
fn score_piece<S: Simd, const R: usize>(
    s: S,
    keys: &KeyOrder,
    panel: &[f32],
    rows: &[Row; R],
    q: &[f32],
    piece: &Piece,
    scores: &mut [f32],
    max: &mut [S::V; R],
) {
    let padded = piece.padded();
    let panel = &panel[piece.slot(keys)..];
    let d = q.len() / R;
    assert!(
        panel.len() >= (d - 1) * keys.slots + padded && scores.len() >= (R - 1) * STRETCH + piece.at + padded
    );
    let mut j = 0;
    // SAFETY: vectors end at `padded`, which `panel` and `scores` hold as asserted above; `q` holds d * R values.
    unsafe {
        while j + 2 * S::LANES <= padded {
            let panel = panel.as_ptr().add(j);
            let block = score::<S, R, 2>(s, q.as_ptr(), panel, keys.slots, d);
            let out = scores.as_mut_ptr().add(piece.at + j);
            finish_scores(s, rows, piece, j, block, out, max);
            j += 2 * S::LANES;
        }
        while j < padded {
            let panel = panel.as_ptr().add(j);
            let block = score::<S, R, 1>(s, q.as_ptr(), panel, keys.slots, d);
            let out = scores.as_mut_ptr().add(piece.at + j);
            finish_scores(s, rows, piece, j, block, out, max);
            j += S::LANES;
        }
    }
}

/// # Safety
/// `out` must be valid for writing `C` vectors at each of `R` strides of [`STRETCH`].
#[inline(always)]
unsafe fn finish_scores<S: Simd, const R: usize, const C: usize>(
    s: S,
    rows: &[Row; R],
    piece: &Piece,
    j: usize,
    mut block: [[S::V; C]; R],
    out: *mut f32,
    max: &mut [S::V; R],
) {
    if j + C * S::LANES > piece.visible(&rows[0]) {
        for r in 0..R {
            let visible = piece.visible(&rows[r]);
            for c in 0..C {
                let n = visible.saturating_sub(j + c * S::LANES);
                block[r][c] = s.first(n, block[r][c], s.splat(f32::NEG_INFINITY));
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            max[r] = s.max(max[r], block[r][c]);
            // SAFETY: the caller's promise.
            unsafe { s.store_ptr(block[r][c], out.add(r * STRETCH + c * S::LANES)) };
        }
    }
}

/// The runs of pieces that fill the scratch together.
pub(super) fn stretches(pieces: &[Piece]) -> impl Iterator<Item = &[Piece]> {
    pieces.chunk_by(|_, next| next.at > 0)
}

/// `out[x * R + r] = factor * x-th feature of row r`, where a row's features start at `token * width + offset`.
#[inline(always)]
pub(super) fn interleave<const R: usize>(
    rows: &[Row; R],
    features: &[f32],
    width: usize,
    offset: impl Fn(&Row) -> usize,
    factor: f32,
    out: &mut [f32],
) {
    let d = out.len() / R;
    for (r, row) in rows.iter().enumerate() {
        let features = &features[row.token * width + offset(row)..][..d];
        for (out, x) in out[r..].iter_mut().step_by(R).zip(features) {
            *out = factor * x;
        }
    }
}
