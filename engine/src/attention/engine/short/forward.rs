//! The forward pass of queries of a short sequence.

use super::super::Sequence;
use super::super::non_finite::is_finite_on;
use super::super::pack::ALIGN;
use super::keys::{Order, Panel, load, scores_are_small, store};
use super::products::{accumulate, score};
use super::{Heads, LONGEST_WITH_FEW_REGISTERS, MOST_ROWS, Row, Scratch, arrange_rows, for_each_tile};
use crate::simd::{Kernel, Simd};
use std::f32::consts::LN_2;
use std::ops::Range;

/// f32 values of a cache line.
const LINE: usize = 16;

pub(in super::super) struct Forward<'a> {
    pub(in super::super) sequence: Sequence<'a>,
    pub(in super::super) queries: Range<usize>,
    /// Rows of the queries only.
    pub(in super::super) o: &'a mut [f32],
    pub(in super::super) lse: &'a mut [f32],
    pub(in super::super) scratch: &'a mut Scratch,
}

impl Kernel for Forward<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let Self { mut sequence, queries, o, lse, scratch } = self;
        if S::REGISTERS < 16 && sequence.tokens > LONGEST_WITH_FEW_REGISTERS {
            return false;
        }
        if sequence.shape.causal {
            sequence = sequence.first(queries.end);
        }
        let Scratch { order, rows, k_panel, p, totals, .. } = scratch;
        let finite = is_finite_on(s, sequence.v);
        for heads in Heads::of(sequence.shape) {
            order.arrange(s, &sequence, &heads);
            let count = arrange_rows(rows, &sequence, queries.clone(), &heads, order);
            let (k_panel, largest_key) = Panel::keys(s, &sequence, &heads, order, k_panel);
            if !scores_are_small(s, &sequence, &heads, order, &rows[..count], largest_key) {
                return false;
            }
            let stride = order.columns(s, &heads) * S::LANES + ALIGN;
            let p = p.take(MOST_ROWS * stride);
            let totals = totals.take(rows.len());
            let mut context = Context { sequence, heads, order, k_panel, finite, p, stride, totals, o };
            for_each_tile!(
                S,
                0..count,
                |first, count| context.tile::<S, 8>(s, rows, first, count),
                context.tile::<S, 4>(s, rows, first, count)
            );
            context.logarithms(s, &rows[..count], lse);
        }
        true
    }
}

struct Context<'a> {
    sequence: Sequence<'a>,
    heads: Heads,
    order: &'a Order,
    k_panel: Panel<'a>,
    /// Whether all values are finite.
    finite: bool,
    /// Probabilities of a tile, `[R, stride]`.
    p: &'a mut [f32],
    stride: usize,
    /// Softmax denominators of all rows.
    totals: &'a mut [f32],
    o: &'a mut [f32],
}

impl Context<'_> {
    /// Output and softmax denominator of `R` rows from `first` on, of which `count` are not
    /// fillers.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, rows: &[Row], first: usize, count: usize) {
        let d = self.sequence.shape.d;
        let rows: &[Row; R] = rows[first..].first_chunk().expect("fillers complete the last tile");
        let mut queries = [std::ptr::null(); R];
        for r in 0..R {
            queries[r] = self.sequence.q[rows[r].query as usize..][..d].as_ptr();
        }
        if self.heads.slots.start == 0 {
            self.fetch_ahead(s, first, count);
        }
        let [a, b] = rows[R - 1].scored;
        let columns = (a.max(b) as usize).div_ceil(S::LANES) * self.heads.key_heads.len();
        let mut sums = [s.zero(); R];
        let mut column = 0;
        while column + 2 <= columns {
            self.exponentials::<S, R, 2>(s, column, rows, &queries, &mut sums);
            column += 2;
        }
        if column < columns {
            self.exponentials::<S, R, 1>(s, column, rows, &queries, &mut sums);
        }
        for r in 0..R {
            let total = s.sum(sums[r]);
            // NaN for a score of infinity, as in the general kernels.
            let total = if total.is_infinite() { f32::NAN } else { total };
            self.totals[first + r] = total;
            // 0 for a row without keys; NaN stays NaN.
            let factor = s.splat(if total == 0.0 { 0.0 } else { 1.0 / total });
            for p in self.p[r * self.stride..][..columns * S::LANES].chunks_exact_mut(S::LANES) {
                s.store(s.mul(s.load(p), factor), p);
            }
        }
        let mut from = 0;
        while from < d {
            if d - from > S::LANES {
                self.outputs::<S, R, 2>(s, rows, count, from);
            } else {
                self.outputs::<S, R, 1>(s, rows, count, from);
            }
            from += 2 * S::LANES;
        }
    }

    /// Fetches the tokens that are `count` rows from `first` on in the next sequence, if that is as
    /// long as this one: short sequences are over before the processor has recognized the stream of
    /// tokens.
    #[inline(always)]
    fn fetch_ahead<S: Simd>(&self, s: S, first: usize, count: usize) {
        let Sequence { shape, tokens, q, k, v, .. } = self.sequence;
        let (slots, width) = (self.heads.slots.len(), shape.width());
        let next = tokens * width + first / slots * width;
        for line in (0..count.div_ceil(slots) * width).step_by(LINE) {
            for x in [q, k, v] {
                s.prefetch(x.as_ptr().wrapping_add(next + line));
            }
        }
    }

    /// Writes the exponentials of the scores in `C` columns to `p`, 0 for masked keys, and adds
    /// them to `sums`.
    #[inline(always)]
    fn exponentials<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        column: usize,
        rows: &[Row; R],
        queries: &[*const f32; R],
        sums: &mut [S::V; R],
    ) {
        let d = self.sequence.shape.d;
        let panel = self.k_panel.column(column, C);
        // SAFETY: queries and panel come from slices of d values and C columns.
        let block = unsafe { score::<S, R, C>(s, queries, panel, d * S::LANES, d) };
        for c in 0..C {
            let (first, list) = self.order.column(column + c);
            let masked = first + S::LANES > rows[0].scored[list] as usize;
            for r in 0..R {
                let mut e = s.exp2(block[r][c]);
                if masked {
                    e = s.first((rows[r].scored[list] as usize).saturating_sub(first), e, s.zero());
                }
                sums[r] = s.add(sums[r], e);
                s.store(e, &mut self.p[r * self.stride + (column + c) * S::LANES..]);
            }
        }
    }

    /// Writes the output of each row for all key heads: `C` vectors of features from `from` on.
    #[inline(always)]
    fn outputs<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        rows: &[Row; R],
        count: usize,
        from: usize,
    ) {
        let shape = self.sequence.shape;
        let d = shape.d;
        let last = S::LANES.min(d - from - (C - 1) * S::LANES);
        for (index, head) in self.heads.key_heads.clone().enumerate() {
            let list = Order::list(shape, head);
            let terms = &self.order.kept(list)[..rows[R - 1].kept[list] as usize];
            let mut p = [std::ptr::null(); R];
            for r in 0..R {
                p[r] = self.p[r * self.stride + index * S::LANES..].as_ptr();
            }
            let values = self.sequence.v[head * d + from..].as_ptr();
            let mut sums = [[s.zero(); C]; R];
            if self.finite {
                // SAFETY: terms address columns that the tile has written, and tokens of v.
                unsafe { accumulate(s, &mut sums, &p, terms, values, last) };
            } else {
                // A key that a row does not see has weight 0, but 0 times NaN is NaN.
                for r in 0..R {
                    let mut row = [[s.zero(); C]];
                    let terms = &terms[..rows[r].kept[list] as usize];
                    // SAFETY: as above.
                    unsafe { accumulate(s, &mut row, &[p[r]], terms, values, last) };
                    [sums[r]] = row;
                }
            }
            for r in 0..R {
                if r < count {
                    let at = (rows[r].place as usize * shape.key_slots + index) * d + from;
                    let out = &mut self.o[at..][..(C - 1) * S::LANES + last];
                    for c in 0..C {
                        let n = if c + 1 < C { S::LANES } else { last };
                        // SAFETY: `out` holds C vectors, the last of `last` values.
                        unsafe { store(s, n, sums[r][c], out.as_mut_ptr().add(c * S::LANES)) };
                    }
                }
            }
        }
    }

    /// Writes `lse`.
    #[inline(always)]
    fn logarithms<S: Simd>(&mut self, s: S, rows: &[Row], lse: &mut [f32]) {
        for (rows, totals) in rows.chunks(S::LANES).zip(self.totals.chunks(S::LANES)) {
            let mut logarithms = [0.0; ALIGN];
            // SAFETY: the chunk has at most LANES values.
            s.store(s.ln(unsafe { load(s, totals.len(), totals.as_ptr()) }), &mut logarithms);
            for (row, logarithm) in rows.iter().zip(logarithms) {
                lse[row.place as usize] = logarithm;
            }
        }
        if !self.order.joint() {
            for row in rows {
                if let Some(score) = self.single_score(s, row) {
                    lse[row.place as usize] = score * LN_2;
                }
            }
        }
    }

    /// The score of a row's only key: its `lse` without the rounding of an exponential near 1.
    /// `None` if the row has several keys.
    fn single_score<S: Simd>(&self, s: S, row: &Row) -> Option<f32> {
        let shape = self.sequence.shape;
        let seen = |head| row.scored[Order::list(shape, head)];
        let mut heads = self.heads.key_heads.clone().enumerate().filter(|&(_, head)| seen(head) > 0);
        let (Some((column, head)), None) = (heads.next(), heads.next()) else { return None };
        (seen(head) == 1).then(|| {
            let query = &self.sequence.q[row.query as usize..][..shape.d];
            let products = query.iter().zip(self.k_panel.lane(s, column, 0));
            products.fold(0.0, |sum, (q, k)| s.mul_add_one(*q, k, sum))
        })
    }
}
