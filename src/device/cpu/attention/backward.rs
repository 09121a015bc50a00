//! The backward pass of a range of queries and a range of keys of one sequence.
//!
//! Probabilities are computed again from the scores and `lse`. For a piece of keys and a tile of rows:
//!
//! ```text
//! p  = exp2(q . k - lse)             q scaled into base 2
//! ds = p * (do . v - delta)          kept pieces;  -p * delta  others
//! dv += p^T do,  dk += ds^T q,  dq += ds k
//! ```
//!
//! A single-precision `lse` of some hundreds is too coarse to normalise with, so for rows of large scores maximum
//! and sum are computed again ([`Normalizers`]).

use super::forward::{KeyPanels, Queries, Softmax, interleave_row, stretches};
use super::pack::{Buffer, Piece, QueryOrder, Row, STRETCH, Scratch, Tile, cut};
use super::product::{accumulate_panel, accumulate_rows, dots, exact_score, score};
use super::{Group, Saved, Sequence, Shape};
use crate::device::cpu::simd::{Kernel, Simd};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// `p = exp2(score - shift) * factor` for one row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Normalizer {
    shift: f32,
    factor: f32,
}

/// Normalizers of the rows of a sequence, `[T, Q]`.
pub(super) enum Normalizers<'a> {
    /// Every row sees all its keys in this piece of work: find them from `lse`, or from the scores.
    Find,
    /// As above, and write them down (those of the queries of this piece).
    Record(&'a mut [Normalizer]),
    /// Rows see only some of their keys here: take those another piece has recorded.
    Recorded(&'a [Normalizer]),
}

pub(super) struct Backward<'a> {
    pub(super) sequence: Sequence<'a>,
    pub(super) saved: &'a Saved<'a>,
    pub(super) keys: Range<usize>,
    pub(super) queries: Range<usize>,
    pub(super) normalizers: Normalizers<'a>,
    /// Of the queries only.
    pub(super) dq: Option<&'a mut [f32]>,
    /// `dk` and `dv`, of the keys only.
    pub(super) dkv: Option<[&'a mut [f32]; 2]>,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sequence, saved, keys: key_range, queries: range, normalizers, mut dq, mut dkv, scratch } = self;
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
            // Queries were multiplied with scale * log2(e); the gradient wants scale.
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
    /// `[H, slots, padded d]`, where `dq` is wanted.
    k_rows: Option<&'a [f32]>,
    padded: usize,
    /// Of `dk` and `dv`, where they are wanted.
    d_panels: Option<[&'a mut [f32]; 2]>,
    tile: &'a mut Tile,
    normalizers: Normalizers<'a>,
    dq: Option<&'a mut [f32]>,
    /// The first query token: the first row of `dq` and of recorded normalizers.
    first: usize,
}

impl Context<'_> {
    /// At most `R` rows of a group through all keys.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, group: &Group, range: Range<usize>) {
        let shape = self.sequence.shape;
        let keys = self.k_panels.keys;
        let (d, slots, key_slots) = (shape.d, keys.slots, shape.key_slots);
        let rows = self.queries.tile::<R>(group, range.clone());
        let Tile { q, raw_q, d_o, o, scores, gradients, sums, pieces } = &mut *self.tile;
        cut(shape, group, rows[R - 1].visible, pieces);
        let queries = Queries::<R>::take(s, &self.sequence, rows, self.k_panels.largest, q, raw_q);
        let [scores, gradients] = [scores, gradients].map(|x| x.take(R * STRETCH));
        let first = self.first * shape.query_slots;
        let normalizers =
            self.normalizers.take(s, &self.k_panels, &queries, pieces, self.saved.lse, shape, first, scores);

        // Gradients of the outputs carry the factor, so that p needs none; rows that only fill the tile are 0.
        let [d_o, o] = [d_o, o].map(|x| x.take(R * d * key_slots));
        let at = |row: &Row| (row.token * shape.query_slots + row.slot) * key_slots * d;
        for (r, row) in rows.iter().enumerate() {
            let factor = if r < range.len() { normalizers[r].factor } else { 0.0 };
            interleave_row::<R>(&self.saved.d_o[at(row)..][..key_slots * d], factor, &mut d_o[r..]);
            interleave_row::<R>(&self.saved.o[at(row)..][..key_slots * d], 1.0, &mut o[r..]);
        }
        let shift = normalizers.map(|normalizer| normalizer.shift);
        let delta = dots::<S, R>(s, d_o, o);
        let sums = sums.take(R * self.padded);
        sums.fill(0.0);
        for piece in pieces.iter() {
            let head = piece.key_head * d * slots + piece.slot(keys);
            let len = piece.padded();
            let v_panel = self.v_panels[head..][..(d - 1) * slots + len].as_ptr();
            let d_o = &d_o[(piece.key_head - group.key_heads.start) * d * R..][..d * R];
            probabilities::<S, R>(s, &self.k_panels, &queries, piece, &shift, scores);
            if piece.kept {
                // SAFETY: the panel holds `len` keys at each of d strides, as sliced above.
                unsafe { score_gradients::<S, R>(s, d_o, v_panel, slots, &delta, len, scores, gradients) };
            } else {
                unkept_gradients::<S, R>(s, &delta, len, scores, gradients);
            }
            if let Some([dk, dv]) = &mut self.d_panels {
                let [dk, dv] = [dk, dv].map(|x| &mut x[head..][..(d - 1) * slots + len]);
                if piece.kept {
                    accumulate_panel::<S, R>(s, scores, STRETCH, d_o, dv, slots, len);
                }
                accumulate_panel::<S, R>(s, gradients, STRETCH, queries.scaled, dk, slots, len);
            }
            if let Some(k_rows) = self.k_rows {
                let from = (piece.key_head * slots + piece.slot(keys)) * self.padded;
                let k_rows = &k_rows[from..][..piece.len * self.padded];
                let all = 0..piece.len;
                accumulate_rows::<S, R>(s, gradients, STRETCH, k_rows, self.padded, all, sums, self.padded);
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

impl Normalizers<'_> {
    /// Those of a tile; `first` is the place in `lse` of the first query of this piece of work.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "rows, keys, and what is known of them")]
    fn take<S: Simd, const R: usize>(
        &mut self,
        s: S,
        panels: &KeyPanels,
        queries: &Queries<R>,
        pieces: &[Piece],
        lse: &[f32],
        shape: &Shape,
        first: usize,
        scores: &mut [f32],
    ) -> [Normalizer; R] {
        let places = queries.rows.map(|row| row.token * shape.query_slots + row.slot);
        if let Self::Recorded(recorded) = self {
            return places.map(|place| recorded[place]);
        }
        let mut normalizers = places.map(|place| Normalizer { shift: lse[place] * LOG2_E, factor: 1.0 });
        if queries.raw.is_some() {
            let mut softmax = Softmax::<R>::new();
            for stretch in stretches(pieces) {
                softmax.stretch(s, panels, queries, stretch, scores);
            }
            for r in 0..R {
                if lse[places[r]].is_finite() {
                    normalizers[r] = Normalizer { shift: softmax.max[r], factor: 1.0 / softmax.sum[r] };
                }
            }
        }
        if let Self::Record(record) = self {
            for (place, normalizer) in places.into_iter().zip(normalizers) {
                record[place - first] = normalizer;
            }
        }
        normalizers
    }
}

/// `p` of a piece into `out[r * STRETCH ..]`, 0 where a row does not see the key.
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
    assert!(out.len() >= (R - 1) * STRETCH + len);
    let shared = piece.visible(&queries.rows[0]);
    let visible = queries.rows.map(|row| piece.visible(&row));
    let mut j = 0;
    while j < len {
        // SAFETY: the panel holds `len` keys at each of d strides, `q` and `raw` d * R values, and `out` the
        // vectors at j < len of every row, as asserted.
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
/// `out` must be valid for writing `C` vectors at each of `R` strides of [`STRETCH`].
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
            // SAFETY: the caller's promise.
            unsafe { s.store_ptr(p, out.add(r * STRETCH + c * S::LANES)) };
        }
    }
}

/// `out = p * (do . v - delta)`.
///
/// # Safety
/// `panel` must be valid for reading `len` values at every of `d_o.len() / R` multiples of `stride`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "rows, keys, and where the result goes")]
unsafe fn score_gradients<S: Simd, const R: usize>(
    s: S,
    d_o: &[f32],
    panel: *const f32,
    stride: usize,
    delta: &[f32; R],
    len: usize,
    p: &[f32],
    out: &mut [f32],
) {
    assert!(p.len() >= (R - 1) * STRETCH + len && out.len() >= (R - 1) * STRETCH + len);
    let mut j = 0;
    while j < len {
        // SAFETY: `panel` by the caller's promise; `p` and `out` hold the vectors at j < len of every row.
        unsafe {
            let (p, out) = (p.as_ptr().add(j), out.as_mut_ptr().add(j));
            if j + 2 * S::LANES <= len {
                let block = score::<S, R, 2>(s, d_o.as_ptr(), panel.add(j), stride, d_o.len() / R);
                times_probability(s, block, delta, p, out);
                j += 2 * S::LANES;
            } else {
                let block = score::<S, R, 1>(s, d_o.as_ptr(), panel.add(j), stride, d_o.len() / R);
                times_probability(s, block, delta, p, out);
                j += S::LANES;
            }
        }
    }
}

/// # Safety
/// `p` and `out` must be valid for `C` vectors at each of `R` strides of [`STRETCH`].
#[inline(always)]
unsafe fn times_probability<S: Simd, const R: usize, const C: usize>(
    s: S,
    block: [[S::V; C]; R],
    delta: &[f32; R],
    p: *const f32,
    out: *mut f32,
) {
    for r in 0..R {
        for c in 0..C {
            let at = r * STRETCH + c * S::LANES;
            // SAFETY: the caller's promise.
            unsafe {
                let ds = s.mul(s.load_ptr(p.add(at)), s.sub(block[r][c], s.splat(delta[r])));
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
        let (p, out) = (&p[r * STRETCH..][..len], &mut out[r * STRETCH..][..len]);
        for (p, out) in p.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
            s.store(s.mul(s.load(p), minus), out);
        }
    }
}
