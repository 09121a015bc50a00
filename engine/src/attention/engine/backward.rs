//! The backward pass of a range of queries and a range of keys of one sequence.
//!
//! Probabilities are recomputed from the scores and `lse`. For a piece of keys and a tile of rows:
//!
//! ```text
//! p  = exp2(q . k - lse)             q scaled into base 2
//! ds = p * (do . v - delta)          kept pieces;  -p * delta  for the others
//! dv += p^T do,  dk += ds^T q,  dq += ds k
//! ```
//!
//! Large scores cost two more passes over the keys of their rows ([`Normalizers`]):
//!
//! - An f32 `lse` of a few hundred is too coarse to normalize with, so maximum and sum are
//!   recomputed.
//! - If one key has nearly all of the probability, `ds` is a difference of nearly equal numbers.
//!   Both are taken relative to that key: `ds = p * ((do . v - center) - sum p (do . v - center))`
//!   with `center` its `do . v`. The difference of that key is then exactly 0.

use super::forward::{KeyPanels, Queries, Softmax, interleave_row, stretches};
use super::pack::{Buffer, KeyOrder, Piece, QueryOrder, Row, STRIDE, Scratch, Tile, cut};
use super::product::{accumulate_panel, accumulate_rows, dots, exact_score, score};
use super::{Group, Saved, Sequence, Shape};
use crate::simd::{Kernel, Simd};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// `p = exp2(score - shift) * factor` and `ds = p * (do . v - center - delta)` for one row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Normalizer {
    shift: f32,
    factor: f32,
    center: f32,
    delta: f32,
}

/// Normalizers of the rows of a sequence, `[T, Q]`.
pub(super) enum Normalizers<'a> {
    /// Each row reads all its keys in this piece of work: compute them from `lse`, or from the
    /// scores.
    Find,
    /// As above, and record them for the queries of this piece.
    Record(&'a mut [Normalizer]),
    /// Rows read only some of their keys here: read the normalizers that another piece recorded.
    Recorded(&'a [Normalizer]),
}

pub(super) struct Backward<'a> {
    pub(super) sequence: Sequence<'a>,
    pub(super) saved: &'a Saved<'a>,
    pub(super) keys: Range<usize>,
    pub(super) queries: Range<usize>,
    pub(super) normalizers: Normalizers<'a>,
    /// Rows of the queries only.
    pub(super) dq: Option<&'a mut [f32]>,
    /// `dk` and `dv`, rows of the keys only.
    pub(super) dkv: Option<[&'a mut [f32]; 2]>,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sequence, saved, keys: key_range, queries: range, normalizers, mut dq, mut dkv, scratch } =
            self;
        let shape = sequence.shape;
        let Scratch { keys, queries, k_panels, v_panels, rows, dk_panels, dv_panels, tile } = scratch;
        keys.arrange(&sequence, key_range.clone());
        queries.arrange(&sequence, keys, key_range.clone(), range.clone());
        let size = shape.width() * keys.slots;
        let k_panels = KeyPanels::pack(s, &sequence, keys, k_panels);
        let v_panels = v_panels.take(size);
        keys.pack_panels(&sequence, sequence.v, v_panels);
        let padded = shape.d.next_multiple_of(S::LANES);
        let k_rows = match dq.as_deref_mut() {
            Some(dq) => {
                dq.fill(0.0); // heads of the other feedback group stay 0
                let rows = rows.take(shape.heads * keys.slots * padded);
                keys.pack_rows(&sequence, sequence.k, padded, rows);
                Some(&*rows)
            }
            None => None,
        };
        let d_panels = dkv.as_ref().map(|_| {
            [dk_panels, dv_panels].map(|panels: &mut Buffer| {
                let panels = panels.take(size);
                panels.fill(0.0);
                panels
            })
        });
        let mut context = Context {
            sequence,
            saved,
            queries,
            k_panels,
            v_panels,
            k_rows,
            padded,
            d_panels,
            tile,
            normalizers,
            dq,
            first: range.start,
        };
        for group in shape.groups() {
            let rows = context.queries.rows(&group);
            let mut row = 0;
            while row < rows {
                if S::REGISTERS >= 32 && rows - row > 4 {
                    context.tile::<S, 8>(s, &group, row..rows.min(row + 8));
                    row += 8;
                } else {
                    context.tile::<S, 4>(s, &group, row..rows.min(row + 4));
                    row += 4;
                }
            }
        }
        if let (Some([dk, dv]), Some([dk_panels, dv_panels])) = (dkv.as_mut(), context.d_panels) {
            // The queries carry scale * log2(e); the gradient needs scale.
            keys.unpack_panels(&sequence, dk_panels, LN_2, key_range.start, dk);
            keys.unpack_panels(&sequence, dv_panels, 1.0, key_range.start, dv);
        }
    }
}

struct Context<'a> {
    sequence: Sequence<'a>,
    saved: &'a Saved<'a>,
    queries: &'a QueryOrder,
    k_panels: KeyPanels<'a>,
    v_panels: &'a [f32],
    /// `[H, slots, padded d]`, for `dq`.
    k_rows: Option<&'a [f32]>,
    padded: usize,
    /// Panels of `dk` and `dv`.
    d_panels: Option<[&'a mut [f32]; 2]>,
    tile: &'a mut Tile,
    normalizers: Normalizers<'a>,
    dq: Option<&'a mut [f32]>,
    /// The first query token: row 0 of `dq` and of the recorded normalizers.
    first: usize,
}

impl Context<'_> {
    /// Runs at most `R` rows of a group over all keys.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, group: &Group, range: Range<usize>) {
        let shape = self.sequence.shape;
        let keys = self.k_panels.keys;
        let (d, slots, key_slots) = (shape.d, keys.slots, shape.key_slots);
        let rows = self.queries.tile::<R>(group, range.clone());
        let Tile { q, raw_q, d_o, o, scores, gradients, sums, pieces } = &mut *self.tile;
        cut(shape, group, rows[R - 1].visible, pieces);
        let queries = Queries::<R>::take(s, &self.sequence, rows, self.k_panels.largest, q, raw_q);
        let [scores, gradients] = [scores, gradients].map(|x| x.take(R * STRIDE));
        let mut normalizers =
            self.normalizers.take(s, &self.k_panels, &queries, pieces, self.saved.lse, shape, scores);

        // `do` carries the factor, so that p needs none. Rows that only fill the tile are 0.
        let [d_o, o] = [d_o, o].map(|x| x.take(R * d * key_slots));
        let at = |row: &Row| (row.token * shape.query_slots + row.slot) * key_slots * d;
        for filler in &mut normalizers[range.len()..] {
            *filler = Normalizer { shift: filler.shift, ..Normalizer::default() };
        }
        for (r, row) in rows.iter().enumerate() {
            let factor = normalizers[r].factor;
            interleave_row::<R>(&self.saved.d_o[at(row)..][..key_slots * d], factor, &mut d_o[r..]);
            interleave_row::<R>(&self.saved.o[at(row)..][..key_slots * d], 1.0, &mut o[r..]);
        }
        let shift = normalizers.map(|normalizer| normalizer.shift);
        let products =
            OutputProducts { d_o, v_panels: self.v_panels, first_head: group.key_heads.start, d, slots };
        if !matches!(self.normalizers, Normalizers::Recorded(_)) {
            let [center, delta] = if queries.raw.is_some() {
                products.centered(
                    s,
                    &self.k_panels,
                    &queries,
                    pieces,
                    &normalizers,
                    [&mut *scores, &mut *gradients],
                )
            } else {
                [[0.0; R], dots::<S, R>(s, d_o, o)]
            };
            for r in 0..R {
                (normalizers[r].center, normalizers[r].delta) = (center[r], delta[r]);
            }
        }
        if let Normalizers::Record(record) = &mut self.normalizers {
            for (row, normalizer) in rows.iter().zip(normalizers).take(range.len()) {
                record[(row.token - self.first) * shape.query_slots + row.slot] = normalizer;
            }
        }
        // The reference point of `do . v` for a kept key, and of 0 for another.
        let delta = normalizers.map(|normalizer| normalizer.center + normalizer.delta);
        let (center, rest) = (normalizers.map(|n| n.center), normalizers.map(|n| n.delta));
        let sums = sums.take(R * self.padded);
        sums.fill(0.0);
        for piece in pieces.iter() {
            let head = piece.key_head * d * slots + piece.slot(keys);
            let len = piece.padded();
            probabilities::<S, R>(s, &self.k_panels, &queries, piece, &shift, scores);
            if piece.kept {
                products.score_gradients(s, piece, keys, [&center, &rest], scores, gradients);
            } else {
                unkept_gradients::<S, R>(s, &delta, len, scores, gradients);
            }
            let d_o = products.of_head::<R>(piece);
            if let Some([dk, dv]) = &mut self.d_panels {
                let [dk, dv] = [dk, dv].map(|x| &mut x[head..][..(d - 1) * slots + len]);
                if piece.kept {
                    accumulate_panel::<S, R>(s, scores, STRIDE, d_o, dv, slots, len);
                }
                accumulate_panel::<S, R>(s, gradients, STRIDE, queries.scaled, dk, slots, len);
            }
            if let Some(k_rows) = self.k_rows {
                let from = (piece.key_head * slots + piece.slot(keys)) * self.padded;
                let k_rows = &k_rows[from..][..piece.len * self.padded];
                let all = 0..piece.len;
                accumulate_rows::<S, R>(s, gradients, STRIDE, k_rows, self.padded, all, sums, self.padded);
            }
        }
        if let Some(dq) = &mut self.dq {
            for (r, row) in rows[..range.len()].iter().enumerate() {
                let out = &mut dq[(row.token - self.first) * shape.width() + row.head * d..][..d];
                for (out, sum) in out.iter_mut().zip(&sums[r * self.padded..]) {
                    *out = sum * shape.scale;
                }
            }
        }
    }
}

/// `do . v`, for a tile of rows.
struct OutputProducts<'a> {
    /// Interleaved rows: `[key slots, d, R]`.
    d_o: &'a [f32],
    v_panels: &'a [f32],
    /// Key head of slot 0 of `d_o`.
    first_head: usize,
    d: usize,
    slots: usize,
}

impl OutputProducts<'_> {
    /// The rows' `do` for the piece's key head: `[d, R]`.
    #[inline(always)]
    fn of_head<const R: usize>(&self, piece: &Piece) -> &[f32] {
        &self.d_o[(piece.key_head - self.first_head) * self.d * R..][..self.d * R]
    }

    /// `out = p * (do . v - center - rest)` for the keys of a piece.
    #[inline(always)]
    fn score_gradients<S: Simd, const R: usize>(
        &self,
        s: S,
        piece: &Piece,
        keys: &KeyOrder,
        [center, rest]: [&[f32; R]; 2],
        p: &[f32],
        out: &mut [f32],
    ) {
        let (d_o, len) = (self.of_head::<R>(piece), piece.padded());
        let from = piece.key_head * self.d * self.slots + piece.slot(keys);
        let panel = self.v_panels[from..][..(self.d - 1) * self.slots + len].as_ptr();
        assert!(p.len() >= (R - 1) * STRIDE + len && out.len() >= (R - 1) * STRIDE + len);
        let mut j = 0;
        while j < len {
            // SAFETY: the panel holds `len` keys, whole vectors, at each of d strides, as sliced
            // above, and `d_o` d * R values; `p` and `out` hold the vectors at j < len of every
            // row, as asserted.
            unsafe {
                let (p, out) = (p.as_ptr().add(j), out.as_mut_ptr().add(j));
                if j + 2 * S::LANES <= len {
                    let block = score::<S, R, 2>(s, d_o.as_ptr(), panel.add(j), self.slots, self.d);
                    times_probability(s, block, [center, rest], p, out);
                    j += 2 * S::LANES;
                } else {
                    let block = score::<S, R, 1>(s, d_o.as_ptr(), panel.add(j), self.slots, self.d);
                    times_probability(s, block, [center, rest], p, out);
                    j += S::LANES;
                }
            }
        }
    }

    /// For each row: `center`, the `do . v` of its most probable key (0 if that key is not kept),
    /// and the sum over all keys of `p * (do . v - center)`. This `p` is normalized; `do` already
    /// carries the factor once.
    #[inline(always)]
    fn centered<S: Simd, const R: usize>(
        &self,
        s: S,
        panels: &KeyPanels,
        queries: &Queries<R>,
        pieces: &[Piece],
        normalizers: &[Normalizer; R],
        [p, gradients]: [&mut [f32]; 2],
    ) -> [[f32; R]; 2] {
        let shift = normalizers.map(|normalizer| normalizer.shift);
        let (mut best, mut center, mut rest) = ([f32::NEG_INFINITY; R], [0.0; R], [0.0f64; R]);
        for piece in pieces {
            probabilities::<S, R>(s, panels, queries, piece, &shift, p);
            for r in 0..R {
                for (j, &p) in p[r * STRIDE..][..piece.len].iter().enumerate() {
                    if p > best[r] {
                        best[r] = p;
                        center[r] =
                            if piece.kept { self.product::<S, R>(s, piece, panels.keys, r, j) } else { 0.0 };
                    }
                }
            }
        }
        for piece in pieces {
            probabilities::<S, R>(s, panels, queries, piece, &shift, p);
            if piece.kept {
                self.score_gradients(s, piece, panels.keys, [&center, &[0.0; R]], p, gradients);
            } else {
                unkept_gradients::<S, R>(s, &center, piece.padded(), p, gradients);
            }
            for r in 0..R {
                let piece = &gradients[r * STRIDE..][..piece.len];
                rest[r] += piece.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
        }
        let factor = |r: usize| f64::from(normalizers[r].factor);
        [center, std::array::from_fn(|r| (rest[r] * factor(r)) as f32)]
    }

    /// `do . v` of one row and key, rounded as in [`OutputProducts::score_gradients`], so that
    /// their difference is 0.
    #[inline(always)]
    fn product<S: Simd, const R: usize>(
        &self,
        s: S,
        piece: &Piece,
        keys: &KeyOrder,
        row: usize,
        key: usize,
    ) -> f32 {
        let from = piece.key_head * self.d * self.slots + piece.slot(keys) + key;
        let products = self.of_head::<R>(piece).chunks_exact(R).enumerate();
        products.fold(0.0, |sum, (x, d_o)| s.mul_add_one(d_o[row], self.v_panels[from + x * self.slots], sum))
    }
}

impl Normalizers<'_> {
    /// The normalizers of a tile. Unless recorded, `center` and `delta` are not yet known.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "operands of a tile, kept in registers")]
    fn take<S: Simd, const R: usize>(
        &mut self,
        s: S,
        panels: &KeyPanels,
        queries: &Queries<R>,
        pieces: &[Piece],
        lse: &[f32],
        shape: &Shape,
        scores: &mut [f32],
    ) -> [Normalizer; R] {
        let places = queries.rows.map(|row| row.token * shape.query_slots + row.slot);
        if let Self::Recorded(recorded) = self {
            return places.map(|place| recorded[place]);
        }
        let mut normalizers = places.map(|place| Normalizer {
            shift: lse[place] * LOG2_E,
            factor: 1.0,
            ..Normalizer::default()
        });
        if queries.raw.is_some() {
            let mut softmax = Softmax::<R>::new();
            for stretch in stretches(pieces) {
                softmax.stretch(s, panels, queries, stretch, scores);
            }
            for r in 0..R {
                if lse[places[r]].is_finite() {
                    (normalizers[r].shift, normalizers[r].factor) = (softmax.max[r], 1.0 / softmax.sum[r]);
                }
            }
        }
        normalizers
    }
}

/// Writes `p` of a piece to `out[r * STRIDE ..]`, 0 for masked keys.
#[inline(always)]
fn probabilities<S: Simd, const R: usize>(
    s: S,
    panels: &KeyPanels,
    queries: &Queries<R>,
    piece: &Piece,
    shift: &[f32; R],
    out: &mut [f32],
) {
    let (len, stride, panel) = (piece.padded(), panels.keys.slots, panels.piece(piece));
    let q = queries.scaled;
    let d = q.len() / R;
    assert!(out.len() >= (R - 1) * STRIDE + len);
    let shared = piece.visible(&queries.rows[0]);
    let visible = queries.rows.map(|row| piece.visible(&row));
    let mut j = 0;
    while j < len {
        // SAFETY: the panel holds `len` keys at each of d strides, `q` and `raw` d * R values, and
        // `out` the vectors at j < len of every row, as asserted.
        unsafe {
            let (panel, out) = (panel.add(j), out.as_mut_ptr().add(j));
            if let Some(raw) = queries.raw {
                let block = exact_score::<S, R>(s, raw.as_ptr(), panel, stride, d, queries.factor, shift);
                let mut column = [[s.zero(); 1]; R];
                for r in 0..R {
                    column[r][0] = block[r];
                }
                exponentials(s, column, j, shared, &visible, &[0.0; R], out);
                j += S::LANES;
            } else if j + 2 * S::LANES <= len {
                let block = score::<S, R, 2>(s, q.as_ptr(), panel, stride, d);
                exponentials(s, block, j, shared, &visible, shift, out);
                j += 2 * S::LANES;
            } else {
                let block = score::<S, R, 1>(s, q.as_ptr(), panel, stride, d);
                exponentials(s, block, j, shared, &visible, shift, out);
                j += S::LANES;
            }
        }
    }
}

/// # Safety
/// `out` must be valid for writing `C` vectors at each of `R` strides of [`STRIDE`].
#[inline(always)]
unsafe fn exponentials<S: Simd, const R: usize, const C: usize>(
    s: S,
    block: [[S::V; C]; R],
    j: usize,
    shared: usize,
    visible: &[usize; R],
    shift: &[f32; R],
    out: *mut f32,
) {
    for r in 0..R {
        for c in 0..C {
            let mut p = s.exp2(s.sub(block[r][c], s.splat(shift[r])));
            if j + C * S::LANES > shared {
                p = s.first(visible[r].saturating_sub(j + c * S::LANES), p, s.zero());
            }
            // SAFETY: guaranteed by the caller.
            unsafe { s.store_ptr(p, out.add(r * STRIDE + c * S::LANES)) };
        }
    }
}

/// # Safety
/// `p` and `out` must be valid for `C` vectors at each of `R` strides of [`STRIDE`].
#[inline(always)]
unsafe fn times_probability<S: Simd, const R: usize, const C: usize>(
    s: S,
    block: [[S::V; C]; R],
    [center, rest]: [&[f32; R]; 2],
    p: *const f32,
    out: *mut f32,
) {
    for r in 0..R {
        for c in 0..C {
            let at = r * STRIDE + c * S::LANES;
            // SAFETY: guaranteed by the caller.
            unsafe {
                let away = s.sub(s.sub(block[r][c], s.splat(center[r])), s.splat(rest[r]));
                let ds = s.mul(s.load_ptr(p.add(at)), away);
                s.store_ptr(ds, out.add(at));
            }
        }
    }
}

/// `out = -p * delta`.
#[inline(always)]
fn unkept_gradients<S: Simd, const R: usize>(s: S, delta: &[f32; R], len: usize, p: &[f32], out: &mut [f32]) {
    for r in 0..R {
        let minus = s.splat(-delta[r]);
        let (p, out) = (&p[r * STRIDE..][..len], &mut out[r * STRIDE..][..len]);
        for (p, out) in p.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
            s.store(s.mul(s.load(p), minus), out);
        }
    }
}
