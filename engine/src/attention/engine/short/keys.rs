//! The keys of a short sequence: the order of their positions, and their transposed copies.

use super::super::forward::EXACT_ABOVE;
use super::super::pack::Buffer;
use super::super::{Sequence, Shape};
use super::{Heads, Row};
use crate::simd::{MAX_LANES, Simd};
use std::f32::consts::LOG2_E;

/// One term of a weighted sum of rows: the row at `x`, with the weight at `weight`, both counted
/// from the start of an operand.
#[derive(Clone, Copy)]
pub(super) struct Term {
    pub(super) x: u32,
    pub(super) weight: u32,
}

/// Positions of the keys. List `l` has the tokens of label `l`; without label mask, list 0 has all.
#[derive(Default)]
pub(super) struct Order {
    tokens: usize,
    labelled: bool,
    /// Whether rows read all tokens in all key heads: the joint softmax under the label mask.
    joint: bool,
    /// What `all` and `columns` were made for: values per token, lanes, key heads, lists.
    made_for: [usize; 4],
    /// Terms (in `k` or `v`, and in a row of probabilities, both of the first key head) of the
    /// tokens, if their positions follow time.
    all: Vec<Term>,
    /// First position and list of each column.
    columns: Vec<(u32, u32)>,
    /// Under the label mask: terms of the tokens of each list, and their number.
    kept: [Vec<Term>; 2],
    lengths: [usize; 2],
    /// Under the label mask: tokens of each list that the row of a token sees.
    seen: Vec<[u32; 2]>,
}

impl Order {
    #[inline(always)]
    pub(super) fn arrange<S: Simd>(&mut self, s: S, sequence: &Sequence, heads: &Heads) {
        let (shape, tokens) = (sequence.shape, sequence.tokens);
        self.tokens = tokens;
        self.labelled = shape.lists == 2;
        self.joint = self.labelled && !shape.masked;
        self.reserve(s, shape, heads, tokens);
        if self.labelled {
            let (all, seen) = (&self.all[..tokens], &mut self.seen[..tokens]);
            let [negative, positive] = self.kept.each_mut().map(|kept| &mut kept[..tokens]);
            let mut positives = 0;
            for (token, (&label, seen)) in sequence.label.iter().zip(seen).enumerate() {
                let list = usize::from(label);
                let index = if list == 1 { positives } else { token - positives };
                let term = all[if self.joint { token } else { index }];
                let kept = if list == 1 { &mut *positive } else { &mut *negative };
                kept[index] = Term { x: all[token].x, ..term };
                positives += list;
                *seen = [(token + 1 - positives) as u32, positives as u32];
            }
            self.lengths = [tokens - positives, positives];
            if !shape.causal {
                self.seen[..tokens].fill(self.lengths.map(|len| len as u32));
            }
        } else {
            self.lengths = [tokens, 0];
        }
    }

    /// Makes `all`, `columns` and room for the rest.
    #[inline(always)]
    fn reserve<S: Simd>(&mut self, _: S, shape: &Shape, heads: &Heads, tokens: usize) {
        let key_heads = heads.key_heads.len();
        let made_for = [shape.width(), S::LANES, key_heads, shape.lists];
        if self.made_for != made_for {
            self.made_for = made_for;
            self.all.clear();
            self.columns.clear();
        }
        for token in self.all.len()..tokens {
            let first = token / S::LANES * S::LANES;
            let weight = first * key_heads + token % S::LANES;
            self.all.push(Term { x: (token * shape.width()) as u32, weight: weight as u32 });
            if token == first {
                let lists = heads.key_heads.clone().map(|head| Self::list(shape, head) as u32);
                self.columns.extend(lists.map(|list| (first as u32, list)));
            }
        }
        if self.seen.len() < tokens {
            self.seen.resize(tokens, [0; 2]);
            self.kept.iter_mut().for_each(|kept| kept.resize(tokens, Term { x: 0, weight: 0 }));
        }
    }

    /// Whether rows read keys that the label mask drops.
    #[inline(always)]
    pub(super) fn joint(&self) -> bool {
        self.joint
    }

    /// Whether rows read all tokens in all key heads.
    #[inline(always)]
    pub(super) fn scores_all(&self) -> bool {
        self.joint || !self.labelled
    }

    /// Whether the values of all tokens are kept in all key heads.
    #[inline(always)]
    pub(super) fn keeps_all(&self) -> bool {
        !self.labelled
    }

    /// The list of a key head.
    #[inline(always)]
    pub(super) fn list(shape: &Shape, key_head: usize) -> usize {
        usize::from(shape.lists == 2 && key_head >= shape.heads / 2)
    }

    /// The first position of a column, and its list.
    #[inline(always)]
    pub(super) fn column(&self, column: usize) -> (usize, usize) {
        let (first, list) = self.columns[column];
        (first as usize, list as usize)
    }

    /// Tokens whose scores enter the softmax in key heads of a list.
    #[inline(always)]
    pub(super) fn scored(&self, list: usize) -> &[Term] {
        if self.joint { &self.all[..self.tokens] } else { self.kept(list) }
    }

    /// Tokens whose values the label mask keeps in key heads of a list.
    #[inline(always)]
    pub(super) fn kept(&self, list: usize) -> &[Term] {
        let terms = if self.labelled { &self.kept[list] } else { &self.all };
        &terms[..self.lengths[list]]
    }

    /// Number of [`kept`](Self::kept) tokens of each list that a token sees, a prefix.
    #[inline(always)]
    pub(super) fn kept_by(&self, shape: &Shape, token: usize) -> [u32; 2] {
        if self.labelled {
            self.seen[token]
        } else {
            [if shape.causal { token + 1 } else { self.tokens } as u32, 0]
        }
    }

    /// Number of [`scored`](Self::scored) tokens of each list that a token sees, a prefix.
    #[inline(always)]
    pub(super) fn scored_by(&self, shape: &Shape, token: usize) -> [u32; 2] {
        let [a, b] = self.kept_by(shape, token);
        if self.joint { [a + b; 2] } else { [a, b] }
    }

    /// Positions of the longest list, in whole vectors.
    #[inline(always)]
    pub(super) fn vectors<S: Simd>(&self, _: S) -> usize {
        self.scored(0).len().max(self.scored(1).len()).div_ceil(S::LANES)
    }

    /// Columns of all positions: [`vectors`](Self::vectors) of each key head.
    #[inline(always)]
    pub(super) fn columns<S: Simd>(&self, s: S, heads: &Heads) -> usize {
        self.vectors(s) * heads.key_heads.len()
    }

    pub(super) fn bytes(&self) -> usize {
        let [a, b] = &self.kept;
        (a.capacity() + b.capacity() + self.all.capacity()) * size_of::<Term>()
            + (self.seen.capacity() + self.columns.capacity()) * 8
    }
}

/// Transposed keys or values, `[column, d, LANES]`.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    panel: &'a [f32],
    /// Values of a column.
    size: usize,
}

static ZEROS: [f32; super::WIDEST] = [0.0; super::WIDEST];

impl<'a> Panel<'a> {
    /// Packs the keys, in base 2. Also returns, in lanes, the largest squared norms: of finite
    /// keys, unless a square is infinite or NaN.
    #[inline(always)]
    pub(super) fn keys<S: Simd>(
        s: S,
        sequence: &Sequence,
        heads: &Heads,
        order: &Order,
        buffer: &'a mut Buffer,
    ) -> (Self, S::V) {
        let factor = sequence.shape.scale * LOG2_E;
        Self::pack(s, sequence.k, factor, sequence, heads, order, buffer, |_, _| true)
    }

    /// Packs the values; those that the label mask drops are 0.
    #[inline(always)]
    pub(super) fn values<S: Simd>(
        s: S,
        sequence: &Sequence,
        heads: &Heads,
        order: &Order,
        buffer: &'a mut Buffer,
    ) -> Self {
        let kept = |position, list| !order.joint || sequence.list(position) == list;
        Self::pack(s, sequence.v, 1.0, sequence, heads, order, buffer, kept).0
    }

    /// Packs `x` times `factor`, 0 for positions that are not `kept`. Returns as [`Panel::keys`].
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "two callers, inlined")]
    fn pack<S: Simd>(
        s: S,
        x: &[f32],
        factor: f32,
        sequence: &Sequence,
        heads: &Heads,
        order: &Order,
        buffer: &'a mut Buffer,
        kept: impl Fn(usize, usize) -> bool,
    ) -> (Self, S::V) {
        let (shape, d, factor) = (sequence.shape, sequence.shape.d, s.splat(factor));
        let size = d * S::LANES;
        let panel = buffer.take(order.columns(s, heads) * size);
        let mut columns = panel.chunks_exact_mut(size);
        let mut largest = s.zero();
        for first in (0..order.vectors(s)).map(|vector| vector * S::LANES) {
            for head in heads.key_heads.clone() {
                let column = columns.next().expect("a chunk for each vector and key head");
                let list = Order::list(shape, head);
                let terms = order.scored(list);
                let mut rows = [ZEROS.as_ptr(); MAX_LANES];
                for lane in 0..S::LANES.min(terms.len().saturating_sub(first)) {
                    if kept(first + lane, list) {
                        rows[lane] = x[terms[first + lane].x as usize + head * d..][..d].as_ptr();
                    }
                }
                let mut squares = s.zero();
                for from in (0..d).step_by(S::LANES) {
                    let n = S::LANES.min(d - from);
                    let lines = &mut column[from * S::LANES..][..n * S::LANES];
                    let mut square = [s.zero(); MAX_LANES];
                    for lane in 0..S::LANES {
                        // SAFETY: rows hold d values, and from + n <= d.
                        square[lane] = unsafe { load(s, n, rows[lane].add(from)) };
                    }
                    s.transpose(&mut square);
                    for x in 0..S::LANES {
                        if x < n {
                            let v = s.mul(square[x], factor);
                            squares = s.mul_add(v, v, squares);
                            s.store(v, &mut lines[x * S::LANES..]);
                        }
                    }
                }
                // Keeps the largest if the square is NaN.
                largest = s.max(squares, largest);
            }
        }
        (Self { panel, size }, largest)
    }

    /// `columns` columns from `column` on, `d * LANES` values each.
    #[inline(always)]
    pub(super) fn column(&self, column: usize, columns: usize) -> *const f32 {
        self.panel[column * self.size..][..columns * self.size].as_ptr()
    }

    /// One lane of a column: `d` values.
    #[inline(always)]
    pub(super) fn lane<S: Simd>(&self, _: S, column: usize, lane: usize) -> impl Iterator<Item = f32> {
        self.panel[column * self.size + lane..][..self.size - lane].iter().step_by(S::LANES).copied()
    }
}

/// The first `n` values at `x`, at most `LANES`.
///
/// # Safety
/// As [`Simd::load_first_ptr`].
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(s: S, n: usize, x: *const f32) -> S::V {
    // SAFETY: guaranteed by the caller.
    unsafe { if n == S::LANES { s.load_ptr(x) } else { s.load_first_ptr(n, x) } }
}

/// Writes the first `n` lanes, at most `LANES`.
///
/// # Safety
/// As [`Simd::store_first_ptr`].
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(s: S, n: usize, v: S::V, out: *mut f32) {
    // SAFETY: guaranteed by the caller.
    unsafe { if n == S::LANES { s.store_ptr(v, out) } else { s.store_first_ptr(n, v, out) } }
}

/// Whether all scores of finite rows are at most [`EXACT_ABOVE`] by Cauchy-Schwarz. `largest_key`
/// comes from [`Panel::keys`].
#[inline(always)]
pub(super) fn scores_are_small<S: Simd>(
    s: S,
    sequence: &Sequence,
    heads: &Heads,
    order: &Order,
    rows: &[Row],
    largest_key: S::V,
) -> bool {
    let d = sequence.shape.d;
    // An upper bound first: the sum of the largest squares of each feature.
    let mut squares = s.zero();
    for from in (0..d).step_by(S::LANES) {
        let n = S::LANES.min(d - from);
        let mut largest = s.zero();
        for row in rows {
            let query = &sequence.q[row.query as usize + from..][..n];
            // SAFETY: `query` holds n values.
            let x = unsafe { load(s, n, query.as_ptr()) };
            largest = s.max(s.mul(x, x), largest);
        }
        squares = s.add(squares, largest);
    }
    s.sum(squares) * s.max_lane(largest_key) <= EXACT_ABOVE * EXACT_ABOVE
        || exact_bound(sequence, heads, order, rows) <= f64::from(EXACT_ABOVE)
}

/// The largest product of the norms of a query and a key, both finite, in base 2.
#[cold]
fn exact_bound(sequence: &Sequence, heads: &Heads, order: &Order, rows: &[Row]) -> f64 {
    let shape = sequence.shape;
    let norm = |x: &[f32]| {
        let square = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        if square.is_finite() { square.sqrt() } else { 0.0 }
    };
    let queries = rows.iter().map(|row| norm(&sequence.q[row.query as usize..][..shape.d]));
    let keys = heads.key_heads.clone().flat_map(|head| {
        let terms = order.scored(Order::list(shape, head)).iter();
        terms.map(move |term| norm(&sequence.k[term.x as usize + head * shape.d..][..shape.d]))
    });
    let factor = f64::from(shape.scale * LOG2_E).abs();
    queries.fold(0.0, f64::max) * keys.fold(0.0, f64::max) * factor
}
