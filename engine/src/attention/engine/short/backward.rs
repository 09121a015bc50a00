//! The backward pass of a short sequence.
//!
//! A block of rows keeps its probabilities and the gradients of its scores, `[rows, columns]` each:
//!
//! ```text
//! p  = exp2(q . k - lse)                tiles of rows; keys in lanes
//! dp = do . v                           0 for keys that the label mask drops
//! ds = p * (dp - sum over keys p * dp)
//! dq = scale * ds k                     tiles of rows; features in lanes
//! dk += scale * ds^T q,  dv += p^T do   tiles of keys; features in lanes
//! ```
//!
//! If one key has nearly all of the probability of a row, `ds` is a difference of nearly equal
//! numbers. Above [`DOMINANT`], `dp` is therefore taken relative to that key, whose difference is
//! then exactly 0 before its small remainder is subtracted.

use super::super::pack::ALIGN;
use super::super::{Saved, Sequence};
use super::keys::{Order, Panel, Term, load, scores_are_small, store};
use super::products::{accumulate, score};
use super::{Heads, MOST_ROWS, Row, Scratch, arrange_rows, for_each_tile};
use crate::simd::{Kernel, Simd};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Rows of a block: their probabilities should stay in the second-level cache.
const BLOCK: usize = 64;

/// Probability above which a key is the reference of its row. Cancellation below it costs five
/// bits.
const DOMINANT: f32 = 31.0 / 32.0;

pub(in super::super) struct Backward<'a> {
    pub(in super::super) sequence: Sequence<'a>,
    pub(in super::super) saved: &'a Saved<'a>,
    /// `dq`, `dk`, `dv`
    pub(in super::super) gradients: [&'a mut [f32]; 3],
    pub(in super::super) scratch: &'a mut Scratch,
}

impl Kernel for Backward<'_> {
    /// Whether `dq` is finite. `None` if the general kernels must compute the sequence.
    type Output = Option<bool>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Option<bool> {
        let Self { sequence, saved, gradients: [dq, dk, dv], scratch } = self;
        let shape = sequence.shape;
        let Scratch { order, rows, k_panel, v_panel, p, ds, queries, outputs, .. } = scratch;
        if shape.lists == 2 {
            dq.fill(0.0); // heads of the other feedback group stay 0
        }
        let mut check = s.zero();
        for heads in Heads::of(shape) {
            order.arrange(s, &sequence, &heads);
            let count = arrange_rows(rows, &sequence, 0..sequence.tokens, &heads, order);
            let (k_panel, largest_key) = Panel::keys(s, &sequence, &heads, order, k_panel);
            if !scores_are_small(s, &sequence, &heads, order, &rows[..count], largest_key) {
                return None;
            }
            let v_panel = Panel::values(s, &sequence, &heads, order, v_panel);
            let stride = order.columns(s, &heads) * S::LANES + ALIGN;
            // Tiles of keys write their gradients if they see all rows, or else add them.
            let adds = count > BLOCK;
            if heads.slots.start == 0 {
                if adds || !order.scores_all() {
                    dk.fill(0.0);
                }
                if adds || !order.keeps_all() {
                    dv.fill(0.0);
                }
            }
            let size = (BLOCK.min(count) + MOST_ROWS) * stride;
            let (p, ds) = (p.take(size), ds.take(size));
            let panels = [k_panel, v_panel];
            let mut context = Context { sequence, saved, heads, order, panels, p, ds, stride, dq };
            for start in (0..count).step_by(BLOCK) {
                let block = start..count.min(start + BLOCK);
                for_each_tile!(
                    S,
                    block.clone(),
                    |first, count| context.tile::<S, 8>(s, rows, first, count, first - start, &mut check),
                    context.tile::<S, 4>(s, rows, first, count, first - start, &mut check)
                );
                queries.clear();
                outputs.clear();
                for (index, row) in rows[block.clone()].iter().enumerate() {
                    let weight = (index * stride) as u32;
                    let output = row.place * (shape.key_slots * shape.d) as u32;
                    queries.push(Term { x: row.query, weight });
                    outputs.push(Term { x: output, weight });
                }
                let rows = &rows[block];
                context.key_gradients(s, rows, queries, adds, dk);
                context.value_gradients(s, rows, outputs, adds, dv);
            }
        }
        Some(s.sum(check) == 0.0)
    }
}

struct Context<'a> {
    sequence: Sequence<'a>,
    saved: &'a Saved<'a>,
    heads: Heads,
    order: &'a Order,
    /// Keys and values.
    panels: [Panel<'a>; 2],
    /// Probabilities of a block, `[rows, stride]`.
    p: &'a mut [f32],
    /// Gradients of the scores of a block, `[rows, stride]`.
    ds: &'a mut [f32],
    stride: usize,
    dq: &'a mut [f32],
}

impl Context<'_> {
    /// Probabilities, gradients of the scores and `dq` of `R` rows from `first` on, of which
    /// `count` are not fillers. They are rows `at` and following of the block. `check` becomes NaN
    /// if `dq` is not finite.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(
        &mut self,
        s: S,
        rows: &[Row],
        first: usize,
        count: usize,
        at: usize,
        check: &mut S::V,
    ) {
        let shape = self.sequence.shape;
        let (d, stride, key_heads) = (shape.d, self.stride, self.heads.key_heads.len());
        let rows: &[Row; R] = rows[first..].first_chunk().expect("fillers complete the last tile");
        let mut queries = [std::ptr::null(); R];
        let mut shift = [s.zero(); R];
        for r in 0..R {
            queries[r] = self.sequence.q[rows[r].query as usize..][..d].as_ptr();
            shift[r] = s.splat(self.saved.lse[rows[r].place as usize] * LOG2_E);
        }
        let [a, b] = rows[R - 1].scored;
        let vectors = (a.max(b) as usize).div_ceil(S::LANES);
        let columns = vectors * key_heads;
        let mut largest = s.zero();
        let mut column = 0;
        while column + 2 <= columns {
            self.probabilities::<S, R, 2>(s, column, rows, &queries, &shift, at, &mut largest);
            column += 2;
        }
        if column < columns {
            self.probabilities::<S, R, 1>(s, column, rows, &queries, &shift, at, &mut largest);
        }
        if self.order.joint() {
            // Later tiles of keys read whole rows.
            for r in 0..R {
                self.p[(at + r) * stride..][..stride][columns * S::LANES..].fill(0.0);
            }
        }

        let mut sums = [s.zero(); R];
        for index in 0..key_heads {
            let mut outputs = [std::ptr::null(); R];
            for r in 0..R {
                let output = (rows[r].place as usize * shape.key_slots + index) * d;
                outputs[r] = self.saved.d_o[output..][..d].as_ptr();
            }
            let mut vector = 0;
            while vector + 2 <= vectors {
                self.products::<S, R, 2>(s, vector * key_heads + index, &outputs, at, &mut sums);
                vector += 2;
            }
            if vector < vectors {
                self.products::<S, R, 1>(s, vector * key_heads + index, &outputs, at, &mut sums);
            }
        }
        let balanced = s.max_lane(largest) <= DOMINANT;
        for r in 0..R {
            let p = &self.p[(at + r) * stride..][..columns * S::LANES];
            let ds = &mut self.ds[(at + r) * stride..][..columns * S::LANES];
            let mut sum = s.sum(sums[r]);
            if !balanced {
                sum = from_dominant(s, p, ds, sum);
            }
            let sum = s.splat(sum);
            for (p, ds) in p.chunks_exact(S::LANES).zip(ds.chunks_exact_mut(S::LANES)) {
                s.store(s.mul(s.load(p), s.sub(s.load(ds), sum)), ds);
            }
        }
        let mut from = 0;
        while from < d {
            if d - from > S::LANES {
                self.query_gradients::<S, R, 2>(s, rows, count, at, from, check);
            } else {
                self.query_gradients::<S, R, 1>(s, rows, count, at, from, check);
            }
            from += 2 * S::LANES;
        }
    }

    /// Writes `p` in `C` columns, 0 for masked keys, and updates its largest values.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "operands of a tile, kept in registers")]
    fn probabilities<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        column: usize,
        rows: &[Row; R],
        queries: &[*const f32; R],
        shift: &[S::V; R],
        at: usize,
        largest: &mut S::V,
    ) {
        let d = self.sequence.shape.d;
        let panel = self.panels[0].column(column, C);
        // SAFETY: queries and panel come from slices of d values and C columns.
        let block = unsafe { score::<S, R, C>(s, queries, panel, d * S::LANES, d) };
        for c in 0..C {
            let (first, list) = self.order.column(column + c);
            let masked = first + S::LANES > rows[0].scored[list] as usize;
            for r in 0..R {
                let mut p = s.exp2(s.sub(block[r][c], shift[r]));
                if masked {
                    p = s.first((rows[r].scored[list] as usize).saturating_sub(first), p, s.zero());
                }
                // Keeps the largest if p is NaN.
                *largest = s.max(p, *largest);
                s.store(p, &mut self.p[(at + r) * self.stride + (column + c) * S::LANES..]);
            }
        }
    }

    /// Writes `do . v` in `C` columns of a key head to `ds`, and adds its products with `p` to
    /// `sums`.
    #[inline(always)]
    fn products<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        column: usize,
        outputs: &[*const f32; R],
        at: usize,
        sums: &mut [S::V; R],
    ) {
        let (d, key_heads) = (self.sequence.shape.d, self.heads.key_heads.len());
        let panel = self.panels[1].column(column, (C - 1) * key_heads + 1);
        // SAFETY: outputs and panel come from slices of d values and of the columns up to the last.
        let block = unsafe { score::<S, R, C>(s, outputs, panel, key_heads * d * S::LANES, d) };
        for c in 0..C {
            for r in 0..R {
                let place = (at + r) * self.stride + (column + c * key_heads) * S::LANES;
                sums[r] = s.mul_add(s.load(&self.p[place..]), block[r][c], sums[r]);
                s.store(block[r][c], &mut self.ds[place..]);
            }
        }
    }

    /// Writes `dq`: `C` vectors of features from `from` on.
    #[inline(always)]
    fn query_gradients<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        rows: &[Row; R],
        count: usize,
        at: usize,
        from: usize,
        check: &mut S::V,
    ) {
        let shape = self.sequence.shape;
        let last = S::LANES.min(shape.d - from - (C - 1) * S::LANES);
        let mut sums = [[s.zero(); C]; R];
        for (index, head) in self.heads.key_heads.clone().enumerate() {
            let list = Order::list(shape, head);
            let terms = &self.order.scored(list)[..rows[R - 1].scored[list] as usize];
            let mut ds = [std::ptr::null(); R];
            for r in 0..R {
                ds[r] = self.ds[(at + r) * self.stride + index * S::LANES..].as_ptr();
            }
            let keys = self.sequence.k[head * shape.d + from..].as_ptr();
            // SAFETY: terms address columns that the tile has written, and tokens of k.
            unsafe { accumulate(s, &mut sums, &ds, terms, keys, last) };
        }
        let scale = s.splat(shape.scale);
        for r in 0..R {
            if r < count {
                let out = &mut self.dq[rows[r].query as usize + from..][..(C - 1) * S::LANES + last];
                for c in 0..C {
                    let n = if c + 1 < C { S::LANES } else { last };
                    let x = s.mul(sums[r][c], scale);
                    // x * 0 is 0 for finite x and NaN otherwise.
                    *check = s.mul_add(x, s.zero(), *check);
                    // SAFETY: `out` holds C vectors, the last of `last` values.
                    unsafe { store(s, n, x, out.as_mut_ptr().add(c * S::LANES)) };
                }
            }
        }
    }

    /// Writes or adds `dk` of a block. `terms` are its rows, in `q` and `ds`.
    #[inline(always)]
    fn key_gradients<S: Simd>(&self, s: S, rows: &[Row], terms: &[Term], adds: bool, dk: &mut [f32]) {
        let shape = self.sequence.shape;
        for (index, head) in self.heads.key_heads.clone().enumerate() {
            let list = Order::list(shape, head);
            let of_rows = OfRows { terms, weights: &self.ds[index * S::LANES..], x: self.sequence.q, adds };
            let seen = |row: &Row| row.scored[list] as usize;
            of_rows.add(
                s,
                rows,
                seen,
                self.order.scored(list),
                shape.scale,
                shape.d,
                &mut dk[head * shape.d..],
            );
        }
    }

    /// Writes or adds `dv` of a block. `terms` are its rows, in `d_o` and `p`.
    #[inline(always)]
    fn value_gradients<S: Simd>(&self, s: S, rows: &[Row], terms: &[Term], adds: bool, dv: &mut [f32]) {
        let shape = self.sequence.shape;
        for (index, head) in self.heads.key_heads.clone().enumerate() {
            let list = Order::list(shape, head);
            let x = &self.saved.d_o[index * shape.d..];
            let of_rows = OfRows { terms, weights: &self.p[index * S::LANES..], x, adds };
            let seen = |row: &Row| row.kept[list] as usize;
            of_rows.add(s, rows, seen, self.order.kept(list), 1.0, shape.d, &mut dv[head * shape.d..]);
        }
    }
}

/// Makes `dp` relative to the key with most of the probability, if it has more than [`DOMINANT`].
/// Returns the sum of `p * dp`; `sum` is that of the unchanged `dp`.
#[inline(always)]
fn from_dominant<S: Simd>(s: S, p: &[f32], dp: &mut [f32], sum: f32) -> f32 {
    let mut largest = s.zero();
    for p in p.chunks_exact(S::LANES) {
        largest = s.max(s.load(p), largest);
    }
    let largest = s.max_lane(largest);
    let Some(key) = p.iter().position(|&p| p == largest && p > DOMINANT) else { return sum };
    let center = s.splat(dp[key]);
    let mut sum = s.zero();
    for (p, dp) in p.chunks_exact(S::LANES).zip(dp.chunks_exact_mut(S::LANES)) {
        let away = s.sub(s.load(dp), center);
        sum = s.mul_add(s.load(p), away, sum);
        s.store(away, dp);
    }
    s.sum(sum)
}

/// The rows of a block as terms of sums over rows.
struct OfRows<'a> {
    terms: &'a [Term],
    weights: &'a [f32],
    x: &'a [f32],
    /// Whether the sums are added to the gradients, not written.
    adds: bool,
}

impl OfRows<'_> {
    /// Writes or adds the sums times `factor` at `keys` in `out`. A row sees the first `seen` keys.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "two callers, inlined")]
    fn add<S: Simd>(
        &self,
        s: S,
        rows: &[Row],
        seen: impl Fn(&Row) -> usize,
        keys: &[Term],
        factor: f32,
        d: usize,
        out: &mut [f32],
    ) {
        let (mut key, mut first) = (0, 0);
        while key < keys.len() {
            while first < rows.len() && seen(&rows[first]) <= key {
                first += 1;
            }
            if first == rows.len() {
                return;
            }
            let rows = first..rows.len();
            // Keys of a tile are in one vector, or `p` is 0 where a row has no column.
            if S::REGISTERS >= 32 && S::LANES >= 8 && keys.len() - key > 4 {
                self.tile::<S, 8>(s, rows, &keys[key..keys.len().min(key + 8)], factor, d, out);
                key += 8;
            } else {
                self.tile::<S, 4>(s, rows, &keys[key..keys.len().min(key + 4)], factor, d, out);
                key += 4;
            }
        }
    }

    /// At most `N` keys.
    #[inline(always)]
    fn tile<S: Simd, const N: usize>(
        &self,
        s: S,
        rows: Range<usize>,
        keys: &[Term],
        factor: f32,
        d: usize,
        out: &mut [f32],
    ) {
        let mut from = 0;
        while from < d {
            if d - from > S::LANES {
                self.vectors::<S, N, 2>(s, rows.clone(), keys, factor, d, out, from);
            } else {
                self.vectors::<S, N, 1>(s, rows.clone(), keys, factor, d, out, from);
            }
            from += 2 * S::LANES;
        }
    }

    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "operands of a tile, kept in registers")]
    fn vectors<S: Simd, const N: usize, const C: usize>(
        &self,
        s: S,
        rows: Range<usize>,
        keys: &[Term],
        factor: f32,
        d: usize,
        out: &mut [f32],
        from: usize,
    ) {
        let last = S::LANES.min(d - from - (C - 1) * S::LANES);
        let mut weights = [std::ptr::null(); N];
        for n in 0..N {
            let key = keys[n.min(keys.len() - 1)];
            weights[n] = self.weights[key.weight as usize..].as_ptr();
        }
        let mut sums = [[s.zero(); C]; N];
        let x = self.x[from..].as_ptr();
        // SAFETY: terms address rows of x, and rows of the block, which hold a weight for each key.
        unsafe { accumulate(s, &mut sums, &weights, &self.terms[rows], x, last) };
        let factor = s.splat(factor);
        for n in 0..N {
            if n < keys.len() {
                let out = &mut out[keys[n].x as usize + from..][..(C - 1) * S::LANES + last];
                for c in 0..C {
                    let n_values = if c + 1 < C { S::LANES } else { last };
                    // SAFETY: `out` holds C vectors, the last of `last` values.
                    unsafe {
                        let out = out.as_mut_ptr().add(c * S::LANES);
                        let before = if self.adds { load(s, n_values, out) } else { s.zero() };
                        store(s, n_values, s.mul_add(sums[n][c], factor, before), out);
                    }
                }
            }
        }
    }
}
