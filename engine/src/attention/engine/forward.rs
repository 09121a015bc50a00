//! The forward pass of a range of queries of one sequence.

use super::pack::{ALIGN, Buffer, KeyOrder, Piece, QueryOrder, Row, STRIDE, Scratch, Tile, cut};
use super::product::{accumulate_rows, dots, exact_score, score};
use super::{Group, Sequence};
use crate::simd::{Kernel, Simd};
use std::f32::consts::LOG2_E;
use std::ops::Range;

pub(super) struct Forward<'a> {
    pub(super) sequence: Sequence<'a>,
    pub(super) queries: Range<usize>,
    /// Rows of the queries only, as in `lse`.
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
        let v_rows = rows.take(shape.heads * keys.slots * padded);
        let k_panels = KeyPanels::pack(s, &sequence, keys, k_panels);
        let finite = keys.pack_rows(&sequence, sequence.v, padded, v_rows);
        let values = Values { rows: v_rows, padded, finite };
        let mut context = Context { sequence, queries, k_panels, values, tile, o, lse, first: range.start };
        for group in shape.groups() {
            let rows = context.queries.rows(&group);
            let mut row = 0;
            while row < rows {
                // A tile computes all its rows, so a small remainder takes the small tile.
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
    queries: &'a QueryOrder,
    k_panels: KeyPanels<'a>,
    values: Values<'a>,
    tile: &'a mut Tile,
    o: &'a mut [f32],
    lse: &'a mut [f32],
    /// The first query token: row 0 of `o` and `lse`.
    first: usize,
}

impl Context<'_> {
    /// Output and `lse` of at most `R` rows of a group.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, group: &Group, range: Range<usize>) {
        let shape = self.sequence.shape;
        let rows = self.queries.tile::<R>(group, range.clone());
        let Tile { q, raw_q, scores, sums, pieces, .. } = &mut *self.tile;
        cut(shape, group, rows[R - 1].visible, pieces);
        let queries = Queries::<R>::take(s, &self.sequence, rows, self.k_panels.largest, q, raw_q);
        let keys = self.k_panels.keys;
        let padded = self.values.padded;
        let sum_stride = shape.key_slots * padded;
        let sums = sums.take(R * sum_stride);
        sums.fill(0.0);
        let scores = scores.take(R * STRIDE);
        let mut softmax = Softmax::<R>::new();
        for stretch in stretches(pieces) {
            let before = softmax.max;
            softmax.stretch(s, &self.k_panels, &queries, stretch, scores);
            for r in 0..R {
                let factor = rescale(before[r], softmax.max[r]);
                if factor != 1.0 {
                    sums[r * sum_stride..][..sum_stride].iter_mut().for_each(|x| *x *= factor);
                }
            }
            for piece in stretch.iter().filter(|piece| piece.kept) {
                let from = (piece.key_head * keys.slots + piece.slot(keys)) * padded;
                let values = &self.values.rows[from..][..piece.len * padded];
                let sums = &mut sums[(piece.key_head - group.key_heads.start) * padded..];
                let weights = &scores[piece.at..];
                // Masked keys have weight 0, which cancels any finite value. Non-finite values need
                // their own loop.
                let shared = if self.values.finite { piece.len } else { piece.visible(&rows[0]) };
                accumulate_rows::<S, R>(s, weights, STRIDE, values, padded, 0..shared, sums, sum_stride);
                for r in 0..R {
                    let own = shared..piece.visible(&rows[r]);
                    if !own.is_empty() {
                        let (weights, sums) = (&weights[r * STRIDE..], &mut sums[r * sum_stride..]);
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
            // In f64: for a large maximum, f32 would lose the contribution of the sum.
            self.lse[place] = (f64::from(max) * std::f64::consts::LN_2 + f64::from(sum.ln())) as f32;
        }
    }
}

/// Packed keys, `[H, d, slots]`.
#[derive(Clone, Copy)]
pub(super) struct KeyPanels<'a> {
    pub(super) keys: &'a KeyOrder,
    pub(super) panels: &'a [f32],
    d: usize,
    /// Largest Euclidean norm of a finite key.
    pub(super) largest: f32,
}

impl<'a> KeyPanels<'a> {
    #[inline(always)]
    pub(super) fn pack<S: Simd>(
        s: S,
        sequence: &Sequence,
        keys: &'a KeyOrder,
        buffer: &'a mut Buffer,
    ) -> Self {
        let (d, slots) = (sequence.shape.d, keys.slots);
        let panels = buffer.take(sequence.shape.width() * slots);
        keys.pack_panels(sequence, sequence.k, panels);
        // Bits of non-negative floats order like the floats.
        let mut largest = 0;
        for panel in panels.chunks_exact((d * slots).max(1)) {
            for slot in (0..slots).step_by(S::LANES) {
                let mut squares = s.zero();
                for line in panel[slot..].chunks(slots) {
                    let x = s.load(line);
                    squares = s.mul_add(x, x, squares);
                }
                let mut lanes = [0.0; ALIGN];
                s.store(squares, &mut lanes);
                let finite = |x: &f32| if x.is_finite() { x.to_bits() } else { 0 };
                largest = lanes.iter().fold(largest, |m, x| m.max(finite(x)));
            }
        }
        Self { keys, panels, d, largest: f32::from_bits(largest).sqrt() }
    }

    /// The panel of a piece: `d` lines of keys, [`KeyOrder::slots`] apart.
    #[inline(always)]
    pub(super) fn piece(&self, piece: &Piece) -> *const f32 {
        let from = piece.key_head * self.d * self.keys.slots + piece.slot(self.keys);
        self.panels[from..][..(self.d - 1) * self.keys.slots + piece.padded()].as_ptr()
    }
}

/// Bound on scores (in base 2, by Cauchy-Schwarz) above which they are computed with
/// [`exact_score`]. Rounding an f32 of this size errs by 2^-18, which leaves `p` accurate to 4e-6.
pub(super) const EXACT_ABOVE: f32 = 64.0;

/// Queries of `R` rows, interleaved.
pub(super) struct Queries<'a, const R: usize> {
    pub(super) rows: [Row; R],
    /// Multiplied by `factor`: scores in base 2.
    pub(super) scaled: &'a [f32],
    /// Unscaled, for scores above [`EXACT_ABOVE`], where the rounding of `scaled` would matter.
    pub(super) raw: Option<&'a [f32]>,
    /// `log2(e) * scale`
    pub(super) factor: f32,
}

impl<'a, const R: usize> Queries<'a, R> {
    #[inline(always)]
    pub(super) fn take<S: Simd>(
        s: S,
        sequence: &Sequence,
        rows: [Row; R],
        largest_key: f32,
        scaled: &'a mut Buffer,
        raw: &'a mut Buffer,
    ) -> Self {
        let d = sequence.shape.d;
        let factor = sequence.shape.scale * LOG2_E;
        let scaled = scaled.take(R * d);
        for (r, row) in rows.iter().enumerate() {
            interleave_row::<R>(sequence.query(row), factor, &mut scaled[r..]);
        }
        let norms = dots::<S, R>(s, scaled, scaled).map(f32::sqrt);
        let exact = norms.iter().any(|norm| norm.is_finite() && norm * largest_key > EXACT_ABOVE);
        let raw = exact.then(|| {
            let raw = raw.take(R * d);
            for (r, row) in rows.iter().enumerate() {
                interleave_row::<R>(sequence.query(row), 1.0, &mut raw[r..]);
            }
            &*raw
        });
        Self { rows, scaled, raw, factor }
    }
}

/// Running maximum (base 2) and sum of `R` rows.
pub(super) struct Softmax<const R: usize> {
    pub(super) max: [f32; R],
    pub(super) sum: [f32; R],
}

/// Factor on sums relative to the old maximum when the maximum grows.
fn rescale(old: f32, new: f32) -> f32 {
    if old == new || old == f32::NEG_INFINITY { 1.0 } else { (old - new).exp2() }
}

impl<const R: usize> Softmax<R> {
    pub(super) fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; R], sum: [0.0; R] }
    }

    /// Adds a stretch of pieces. Afterwards `scores` holds the exponentials of the kept pieces
    /// relative to the new maximum, 0 for masked keys.
    #[inline(always)]
    pub(super) fn stretch<S: Simd>(
        &mut self,
        s: S,
        panels: &KeyPanels,
        queries: &Queries<R>,
        pieces: &[Piece],
        scores: &mut [f32],
    ) {
        let mut max = [s.splat(f32::NEG_INFINITY); R];
        for piece in pieces {
            score_piece::<S, R>(s, panels, queries, piece, scores, &mut max);
        }
        let mut base = [0.0; R];
        for r in 0..R {
            let new = s.max_lane(max[r]).max(self.max[r]);
            self.sum[r] *= rescale(self.max[r], new);
            self.max[r] = new;
            // A row without keys so far has no maximum to subtract: all its scores are -inf.
            base[r] = if new == f32::NEG_INFINITY { 0.0 } else { new };
        }
        if let Some(raw) = queries.raw {
            for piece in pieces {
                score_piece_exactly::<S, R>(s, panels, queries, raw, &base, piece, scores);
            }
            base = [0.0; R];
        }
        let mut sum = [s.zero(); R];
        for piece in pieces {
            for r in 0..R {
                let scores = &mut scores[r * STRIDE + piece.at..][..piece.padded()];
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

/// Writes the scores of a piece to the stretch, -inf for masked keys, and updates the maximum.
#[inline(always)]
fn score_piece<S: Simd, const R: usize>(
    s: S,
    panels: &KeyPanels,
    queries: &Queries<R>,
    piece: &Piece,
    scores: &mut [f32],
    max: &mut [S::V; R],
) {
    let (len, stride, d) = (piece.padded(), panels.keys.slots, panels.d);
    let (panel, q) = (panels.piece(piece), &queries.scaled[..R * d]);
    assert!(scores.len() >= (R - 1) * STRIDE + piece.at + len);
    let mut j = 0;
    // SAFETY: vectors end at `len`, a multiple of LANES, which the panel holds at each of d strides
    // and `scores` in each of R rows, as asserted above; `q` holds d * R values.
    unsafe {
        while j + 2 * S::LANES <= len {
            let block = score::<S, R, 2>(s, q.as_ptr(), panel.add(j), stride, d);
            let out = scores.as_mut_ptr().add(piece.at + j);
            finish_scores(s, &queries.rows, piece, j, block, out, max);
            j += 2 * S::LANES;
        }
        while j < len {
            let block = score::<S, R, 1>(s, q.as_ptr(), panel.add(j), stride, d);
            let out = scores.as_mut_ptr().add(piece.at + j);
            finish_scores(s, &queries.rows, piece, j, block, out, max);
            j += S::LANES;
        }
    }
}

/// Replaces the scores of a piece by more accurate ones, relative to `base`.
#[inline(always)]
fn score_piece_exactly<S: Simd, const R: usize>(
    s: S,
    panels: &KeyPanels,
    queries: &Queries<R>,
    raw: &[f32],
    base: &[f32; R],
    piece: &Piece,
    scores: &mut [f32],
) {
    let (len, stride, d) = (piece.padded(), panels.keys.slots, panels.d);
    let (panel, q) = (panels.piece(piece), &raw[..R * d]);
    for j in (0..len).step_by(S::LANES) {
        // SAFETY: j + LANES <= len, which the panel holds at each of d strides; `q` holds d * R
        // values.
        let block =
            unsafe { exact_score::<S, R>(s, q.as_ptr(), panel.add(j), stride, d, queries.factor, base) };
        for r in 0..R {
            let visible = piece.visible(&queries.rows[r]).saturating_sub(j);
            let score = s.first(visible, block[r], s.splat(f32::NEG_INFINITY));
            s.store(score, &mut scores[r * STRIDE + piece.at + j..]);
        }
    }
}

/// # Safety
/// `out` must be valid for writing `C` vectors at each of `R` strides of [`STRIDE`].
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
            // SAFETY: guaranteed by the caller.
            unsafe { s.store_ptr(block[r][c], out.add(r * STRIDE + c * S::LANES)) };
        }
    }
}

/// Runs of pieces that share the scratch.
pub(super) fn stretches(pieces: &[Piece]) -> impl Iterator<Item = &[Piece]> {
    pieces.chunk_by(|_, next| next.at > 0)
}

/// `out[x * R] = factor * row[x]`
#[inline(always)]
pub(super) fn interleave_row<const R: usize>(row: &[f32], factor: f32, out: &mut [f32]) {
    for (out, x) in out.iter_mut().step_by(R).zip(row) {
        *out = factor * x;
    }
}
