//! Attention of short sequences with small scores, forward and backward.
//!
//! **Contract.** [`Forward`] computes a range of queries of one sequence, [`Backward`] one sequence,
//! as the general kernels do, or they say that these must compute it. [`covers_forward`] and
//! [`covers_backward`] decide by shape and length, [`keys::scores_are_small`] by the size of the
//! scores. Neither depends on other sequences, on threads, or on whether a value is non-finite.
//! `Backward` does not read `o`.
//!
//! **No maximum.** By Cauchy-Schwarz, scores in base 2 are at most `EXACT_ABOVE = 64` in absolute
//! value here. So no exponential overflows or underflows without a maximum subtracted, and no sum
//! of them: scores become probabilities in registers, in a single pass.
//!
//! **Layout.** Keys (in the backward pass: and values) are transposed in registers, a vector of
//! positions at a time: panels `[column, d, LANES]`, column `vector * K + key head` of `K` key
//! heads. The keys carry `log2(e) * scale`. Positions follow time: all tokens with the joint
//! softmax, the tokens of the key head's label with the masked one. A row therefore sees a prefix
//! of the positions of a key head, and a tile of rows a prefix of the columns. All other operands
//! stay in their `[T, H, d]` layout: sums over tokens have features in lanes and one weight for all
//! lanes, and run over a list of tokens or rows ([`keys::Term`]). So only tokens that the label
//! mask keeps are multiplied with values.
//!
//! | file | contents |
//! |---|---|
//! | `keys` | order of the positions, transposed keys and values, bound on the scores |
//! | `products` | the two products in registers |
//! | `forward`, `backward` | tiles of rows over their keys, and of keys over their rows |

mod backward;
mod forward;
mod keys;
mod products;
#[cfg(test)]
mod tests;

pub(super) use backward::Backward;
pub(super) use forward::Forward;

use super::pack::Buffer;
use super::{Sequence, Shape};
use keys::{Order, Term};
use std::ops::Range;

/// Longest sequence of the forward pass. The transposed keys of a long one leave the first-level
/// cache between tiles; of a longer one, the general kernels are nearly as fast.
const LONGEST: usize = 1024;

/// As [`LONGEST`], of instruction sets with fewer than 16 registers.
const LONGEST_WITH_FEW_REGISTERS: usize = 320;

/// Longest sequence of the backward pass.
const LONGEST_BACKWARD: usize = 320;

/// Widest head: no wider one has been measured.
const WIDEST: usize = 128;

/// Most scores of an average row in the backward pass. Products with features in lanes load a
/// weight for each multiply-add; with more scores, the general kernels, which load one for two, are
/// as fast.
const MOST_SCORES: usize = 320;

/// Whether the forward pass has a short path for sequences of this shape and length.
pub(super) fn covers_forward(shape: &Shape, tokens: usize) -> bool {
    (1..=LONGEST).contains(&tokens) && shape.d <= WIDEST
}

/// As [`covers_forward`], for the backward pass.
pub(super) fn covers_backward(shape: &Shape, tokens: usize) -> bool {
    let key_heads = if shape.per_head { 1 } else { shape.heads };
    let scores = tokens * key_heads / if shape.causal { 2 } else { 1 };
    covers_forward(shape, tokens) && tokens <= LONGEST_BACKWARD && scores <= MOST_SCORES
}

/// Scratch of a thread.
#[derive(Default)]
pub(super) struct Scratch {
    order: Order,
    rows: Vec<Row>,
    k_panel: Buffer,
    v_panel: Buffer,
    p: Buffer,
    ds: Buffer,
    totals: Buffer,
    /// Rows of a block as terms of `dk` and `dv`.
    queries: Vec<Term>,
    outputs: Vec<Term>,
}

impl Scratch {
    pub(super) fn bytes(&self) -> usize {
        let buffers = [&self.k_panel, &self.v_panel, &self.p, &self.ds, &self.totals];
        buffers.into_iter().map(Buffer::bytes).sum::<usize>()
            + self.order.bytes()
            + self.rows.capacity() * size_of::<Row>()
            + (self.queries.capacity() + self.outputs.capacity()) * size_of::<Term>()
    }
}

/// Query slots that attend to the same key heads: all, or one with per-head pairing.
struct Heads {
    slots: Range<usize>,
    key_heads: Range<usize>,
}

impl Heads {
    fn of(shape: &Shape) -> impl Iterator<Item = Self> {
        let (heads, slots, per_head) = (shape.heads, shape.query_slots, shape.per_head);
        (0..if per_head { heads } else { 1 }).map(move |h| {
            if per_head {
                Self { slots: h..h + 1, key_heads: h..h + 1 }
            } else {
                Self { slots: 0..slots, key_heads: 0..heads }
            }
        })
    }
}

/// One query row: a token and a query head that serves it.
#[derive(Clone, Copy, Default)]
struct Row {
    /// Start of the query in `q`.
    query: u32,
    /// Index in `[T, Q]` of the queries.
    place: u32,
    /// Number of positions that the row sees in key heads of each list.
    scored: [u32; 2],
    /// Number of kept tokens of each list that the row sees.
    kept: [u32; 2],
}

/// The rows of a range of queries for `heads`, by token and slot. Returns their number; copies of
/// the last row follow, to fill the last tile.
#[inline(always)]
fn arrange_rows(
    rows: &mut Vec<Row>,
    sequence: &Sequence,
    queries: Range<usize>,
    heads: &Heads,
    order: &Order,
) -> usize {
    let shape = sequence.shape;
    let slots = heads.slots.len();
    let count = queries.len() * slots;
    rows.resize(count + MOST_ROWS, Row::default());
    for (index, rows) in rows[..count].chunks_exact_mut(slots).enumerate() {
        let token = queries.start + index;
        let first_head = sequence.list(token) * shape.query_slots + heads.slots.start;
        let query = token * shape.width() + first_head * shape.d;
        let place = index * shape.query_slots + heads.slots.start;
        let (scored, kept) = (order.scored_by(shape, token), order.kept_by(shape, token));
        for (slot, row) in rows.iter_mut().enumerate() {
            let (query, place) = ((query + slot * shape.d) as u32, (place + slot) as u32);
            *row = Row { query, place, scored, kept };
        }
    }
    let last = rows[count - 1];
    rows[count..].fill(last);
    count
}

/// Most rows of a tile.
const MOST_ROWS: usize = 8;

/// Cuts `$rows` into tiles: runs `$full` for each tile of 8 rows, if there are registers for it,
/// and `$small` for each tile of 4. `$first` is the first row of the tile, `$count` their number.
macro_rules! for_each_tile {
    ($S:ident, $rows:expr, |$first:ident, $count:ident| $full:expr, $small:expr) => {
        let rows: std::ops::Range<usize> = $rows;
        let mut $first = rows.start;
        while $first < rows.end {
            // A tile computes all its rows, so a small remainder takes the small tile.
            if $S::REGISTERS >= 32 && rows.end - $first > 4 {
                let $count = (rows.end - $first).min(8);
                $full;
                $first += 8;
            } else {
                let $count = (rows.end - $first).min(4);
                $small;
                $first += 4;
            }
        }
    };
}
use for_each_tile;
