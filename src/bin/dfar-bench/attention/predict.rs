//! The work that the attention kernels execute for a batch, counted on the host, and a lower bound
//! of its time on a GPU.
//!
//! Counts include the padding of tiles: scores come in pieces of 16 rows by 16 keys, cut at the
//! diagonal and at the ends of the two labels. The lower bound is the largest of the bounds by
//! memory, exponentials and products. It leaves out latency, launches and all other instructions.
//! The emulator's tests compare its counters with these counts.

use super::batch::{Batch, Pass as Direction};
use crate::limits::gpu::Limits;
use dfar::attention::{FhaOptions, Inputs, LabelMask, Normalization, Pairing};
use dfar::device::cuda::plan::attention::{Pass, Plan};
use dfar::device::cuda::plan::params::Item;
use dfar::device::cuda::plan::tile::{Room, WARP_ROWS};
use dfar::device::cuda::{CudaError, Element};
use serde::Serialize;
use std::fmt;
use std::ops::Add;

/// The work of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Exponentials of scores, one per thread and score.
    pub exponentials: u64,
    /// Exponentials that rescale the output of each key head to the final maximum of its row. Those
    /// of the running maximum, 64 each time the maximum of a warp changes, depend on the data and
    /// are not counted.
    pub rescaling: u64,
    /// Multiply-adds of products, without those of large f32 scores that are computed twice.
    pub multiply_adds: u64,
    /// Bytes that blocks prefetch to shared memory. In streamed passes most of them hit the L2
    /// cache.
    pub copied: u64,
}

impl Add for Counts {
    type Output = Counts;
    fn add(self, other: Counts) -> Counts {
        Counts {
            exponentials: self.exponentials + other.exponentials,
            rescaling: self.rescaling + other.rescaling,
            multiply_adds: self.multiply_adds + other.multiply_adds,
            copied: self.copied + other.copied,
        }
    }
}

/// Scores of a piece: 16 by 16.
const PIECE: u64 = (WARP_ROWS * WARP_ROWS) as u64;

/// The keys that a head attends to in one row.
#[derive(Clone, Copy)]
enum List {
    /// All keys of a sequence, in order.
    All,
    /// The keys of one label.
    Label(usize),
}

/// A batch, counted for one (row, key head) problem.
struct Counter<'a> {
    element: Element,
    options: &'a FhaOptions,
    plan: &'a Plan,
    slots: usize,
    key_heads: usize,
}

impl Counter<'_> {
    fn is_kept(&self, head: usize, label: usize) -> bool {
        self.options.label_mask == LabelMask::None || (head >= self.options.heads / 2) == (label == 1)
    }

    /// The (label, kept) blocks of keys that are visited for each key head, in order.
    fn visited(&self) -> impl Iterator<Item = (usize, usize, bool)> {
        let masked = self.options.normalization == Normalization::Masked;
        (0..self.key_heads)
            .flat_map(|head| [0, 1].map(|label| (head, label, self.is_kept(head, label))))
            .filter(move |&(_, _, kept)| kept || !masked)
    }

    /// Number of keys of each label that the token at `position` sees.
    fn visible(&self, item: &Item, position: usize) -> [usize; 2] {
        if !self.options.causal {
            return [item.negatives as usize, (item.length - item.negatives) as usize];
        }
        let feedback = self.plan.feedback.get(item.start as usize + position);
        let positives = feedback.map_or(0, |raw| (raw >> 1) as usize);
        [position + 1 - positives, positives]
    }

    /// The first query row that sees the `index`-th key in label order.
    fn seen_from(&self, item: &Item, index: usize) -> usize {
        if !self.options.causal {
            return 0;
        }
        let token = self.plan.order.get(item.start as usize + index);
        token.map_or(index, |&token| (token - item.start) as usize) * self.slots
    }

    /// Bytes of rows of one head.
    fn bytes(&self, rows: usize) -> u64 {
        (rows * self.options.head_dim * self.element.size()) as u64
    }

    /// The work of `pieces` pieces of scores with `products` products each.
    fn pieces(&self, pieces: usize, products: usize) -> Counts {
        let exponentials = pieces as u64 * PIECE;
        let multiply_adds = exponentials * (products * self.options.head_dim) as u64;
        Counts { exponentials, multiply_adds, ..Counts::default() }
    }

    /// The lists of keys of a head, in order, and whether their values are kept. Streamed passes
    /// have one list per label; whole passes have one list of all keys, or with Masked of the
    /// head's own label.
    fn lists(&self, item: &Item, head: usize, whole: bool) -> Vec<(List, bool)> {
        let labelled = self.options.label_mask == LabelMask::Feedback;
        if !whole || (labelled && self.options.normalization == Normalization::Masked) {
            let visited = self.visited().filter(|&(h, ..)| h == head);
            return visited.map(|(_, label, kept)| (List::Label(label), kept)).collect();
        }
        let of_label =
            [item.negatives, item.length - item.negatives][usize::from(head >= self.options.heads / 2)];
        vec![(List::All, !labelled || of_label > 0)]
    }

    /// Number of keys of a list that the token at `position` sees.
    fn visible_of(&self, item: &Item, position: usize, list: List) -> usize {
        let visible = self.visible(item, position);
        match list {
            List::Label(label) => visible[label],
            List::All => visible.iter().sum(),
        }
    }

    /// The work of the query rows from `first` to `end`, in forward or dq.
    fn query_rows(&self, item: &Item, pass: Pass, first: usize, end: usize) -> Counts {
        let whole = matches!(pass, Pass::ForwardShort | Pass::ForwardWhole(_) | Pass::DqWhole);
        let dq = matches!(pass, Pass::DqWhole | Pass::Dq);
        let mut counts = Counts::default();
        for from in (first..end).step_by(WARP_ROWS) {
            let last = ((from + WARP_ROWS).min(end) - 1) / self.slots;
            for (list, kept) in (0..self.key_heads).flat_map(|head| self.lists(item, head, whole)) {
                let products = if dq { 2 + usize::from(kept) } else { 1 + usize::from(kept) };
                let pieces = self.visible_of(item, last, list).div_ceil(WARP_ROWS);
                counts = counts + self.pieces(pieces, products);
            }
        }
        if dq || pass == Pass::ForwardShort {
            return counts;
        }
        // Before the first key that a row sees, there is no output to rescale.
        for row in first..end {
            let sees = |&(list, _): &(List, bool)| self.visible_of(item, row / self.slots, list) > 0;
            let head = (0..self.key_heads).find(|&head| self.lists(item, head, whole).iter().any(sees));
            counts.rescaling += self.bytes(self.key_heads - head.unwrap_or(self.key_heads)) / 16;
        }
        counts
    }

    /// The bytes of keys, and of values where kept, for `count` keys of each label.
    fn keys(&self, count: [usize; 2]) -> u64 {
        self.visited().map(|(_, label, kept)| self.bytes(count[label]) * (1 + u64::from(kept))).sum()
    }

    /// The work of all keys of a whole sequence, 16 at a time. `pieces` returns the work of the
    /// tiles of query rows that see them.
    fn whole_keys(&self, item: &Item, pieces: impl Fn(usize, bool) -> Counts) -> Counts {
        let (length, negatives) = (item.length as usize, item.negatives as usize);
        let mut counts = Counts::default();
        for (list, kept) in (0..self.key_heads).flat_map(|head| self.lists(item, head, true)) {
            let keys = match list {
                List::All => 0..length,
                List::Label(0) => 0..negatives,
                List::Label(_) => negatives..length,
            };
            for key in keys.step_by(WARP_ROWS) {
                let seen_from = match list {
                    List::All if self.options.causal => key * self.slots,
                    List::All => 0,
                    List::Label(_) => self.seen_from(item, key),
                };
                let tiles = (length * self.slots).div_ceil(WARP_ROWS) - seen_from / WARP_ROWS;
                counts = counts + pieces(tiles, kept);
            }
        }
        counts
    }

    fn item(&self, pass: Pass, item: &Item) -> Counts {
        let (length, negatives, first) = (item.length as usize, item.negatives as usize, item.first as usize);
        let all_rows = length * self.slots;
        let block_rows = self.plan.tile.block(pass).map_or(0, |block| block.rows());
        let by_label = [negatives, length - negatives];
        match pass {
            Pass::ForwardShort | Pass::ForwardWhole(_) | Pass::DqWhole => {
                let copied = self.keys(by_label);
                Counts { copied, ..self.query_rows(item, pass, 0, all_rows) }
            }
            Pass::Forward | Pass::Dq => {
                let end = (first + block_rows).min(all_rows);
                let copied = self.keys(self.visible(item, (end - 1) / self.slots));
                Counts { copied, ..self.query_rows(item, pass, first, end) }
            }
            Pass::BackwardWhole(_) => {
                let copied = self.keys(by_label) + self.bytes(all_rows);
                // In f32, the sums of p are computed beforehand.
                let sums = usize::from(self.element == Element::F32);
                let pieces = |tiles, kept: bool| {
                    self.pieces(tiles, 3 + 2 * usize::from(kept)) + self.pieces(tiles * sums, 1)
                };
                Counts { copied, ..self.whole_keys(item, pieces) }
            }
            Pass::DkDvWhole => {
                let copied = self.bytes(all_rows) * (1 + self.key_heads as u64);
                Counts {
                    copied,
                    ..self.whole_keys(item, |tiles, kept| self.pieces(tiles, 2 + 2 * usize::from(kept)))
                }
            }
            Pass::DkDv => {
                let label = usize::from(first >= negatives);
                let end = (first + block_rows).min([negatives, length][label]);
                let block_from = self.seen_from(item, first);
                let mut counts = Counts::default();
                for (_, _, kept) in self.visited().filter(|&(_, l, _)| l == label) {
                    counts.copied += self.bytes(all_rows - block_from) * (1 + u64::from(kept));
                    for key in (first..end).step_by(WARP_ROWS) {
                        let skipped = (self.seen_from(item, key) - block_from) / WARP_ROWS;
                        let tiles = (all_rows - block_from).div_ceil(WARP_ROWS) - skipped;
                        counts = counts + self.pieces(tiles, 2 + 2 * usize::from(kept));
                    }
                }
                counts
            }
        }
    }
}

/// The work of a pass over a planned batch.
pub fn counts(element: Element, options: &FhaOptions, plan: &Plan, pass: Pass) -> Counts {
    let (problems, slots, key_heads) = match options.pairing {
        Pairing::Factorized => (1, options.query_slots(), options.heads),
        Pairing::PerHead => (options.heads as u64, 1, 1),
    };
    let counter = Counter { element, options, plan, slots, key_heads };
    let items = plan.items(pass).iter().filter(|item| item.length > 0);
    let one = items.fold(Counts::default(), |sum, item| sum + counter.item(pass, item));
    Counts {
        exponentials: problems * one.exponentials,
        rescaling: problems * one.rescaling,
        multiply_adds: problems * one.multiply_adds,
        copied: problems * one.copied,
    }
}

/// A lower bound of the time of forward or backward.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Prediction {
    /// The direction.
    pub pass: Direction,
    /// Length of the sequences.
    pub length: usize,
    /// Tokens of the batch.
    pub tokens: usize,
    /// Work of all passes of this direction.
    pub counts: Counts,
    /// Bytes between memory and the chip, each tensor counted once.
    pub bytes: usize,
    /// Lower bounds in seconds: by memory, by exponentials, by products.
    pub floors: [f64; 3],
}

impl Prediction {
    /// Names of the columns.
    pub const HEADER: &str =
        "pass      length    tokens  Gexp executed  by exp us  by products us  by bytes us  bound";

    pub(super) fn new(
        element: Element,
        options: &FhaOptions,
        plan: &Plan,
        limits: &Limits,
        length: usize,
        pass: Direction,
    ) -> Prediction {
        let passes: &[Pass] = match pass {
            Direction::Forward => Pass::FORWARD,
            Direction::Backward => Pass::BACKWARD,
        };
        let each = passes.iter().map(|&pass| counts(element, options, plan, pass));
        let counts = each.fold(Counts::default(), Add::add);
        let bytes = plan.tokens * bytes_per_token(element, options, pass);
        let peak = if element == Element::F32 { limits.multiply_adds } else { limits.products / 2.0 };
        let floors = [
            bytes as f64 / limits.copy,
            (counts.exponentials + counts.rescaling) as f64 / limits.exponentials,
            counts.multiply_adds as f64 / peak,
        ];
        Prediction { pass, length, tokens: plan.tokens, counts, bytes, floors }
    }

    /// The largest lower bound in seconds, and the resource that sets it.
    pub fn bound(&self) -> (f64, &'static str) {
        let names = ["memory", "exponentials", "products"];
        let floors = self.floors.into_iter().zip(names);
        floors.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are three")
    }
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let pass = self.pass.name();
        let [bytes, exponentials, products] = self.floors.map(|seconds| seconds * 1e6);
        let executed = self.counts.exponentials as f64 / 1e9;
        write!(f, "{pass:<8} {:>7} {:>9} {executed:>14.4} {exponentials:>10.1}", self.length, self.tokens)?;
        write!(f, " {products:>15.1} {bytes:>12.1}  {}", self.bound().1)
    }
}

/// Least number of bytes between memory and chip per token: active queries, keys, values and
/// results once each; for backward also `o`, `d_o` and all three gradients.
pub(super) fn bytes_per_token(element: Element, options: &FhaOptions, pass: Direction) -> usize {
    let all = options.heads * options.head_dim;
    let (row, out) = (options.query_slots() * options.head_dim, options.output_len(1));
    let values = match pass {
        Direction::Forward => row + 2 * all + out,
        Direction::Backward => row + 2 * all + 2 * out + 3 * all,
    };
    values * element.size() + options.lse_len(1) * size_of::<f32>()
}

/// Predicts forward and backward over sequences of one length with random labels, for a device with
/// 227 KiB of shared memory per block.
///
/// # Errors
/// Options that the kernels do not accept.
pub fn predict(
    element: Element,
    options: &FhaOptions,
    limits: &Limits,
    length: usize,
    tokens: usize,
) -> Result<[Prediction; 2], CudaError> {
    let batch = Batch::shape(*options, length, tokens);
    let values = vec![(); batch.tokens() * options.heads * options.head_dim];
    let (cu_seqlens, label) = (batch.cu_seqlens(), batch.label());
    options.check(&Inputs { q: &values, k: &values, v: &values, cu_seqlens, label })?;
    let plan = Plan::new(element, options, cu_seqlens, label, Room::of(227 << 10))?;
    Ok([Direction::Forward, Direction::Backward]
        .map(|pass| Prediction::new(element, options, &plan, limits, length, pass)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::gpu::Card;
    use dfar::device::cuda::plan::tile::Sharing;

    /// One sequence without labels, counted by hand: 40 tokens are rows of 3 warps, which see 1, 2
    /// and 3 pieces per head.
    #[test]
    fn a_short_sequence_by_hand() {
        let options = FhaOptions { label_mask: LabelMask::None, ..FhaOptions::new(1, 16) };
        let plan = Plan::new(Element::Bf16, &options, &[0, 40], &[], Room::of(227 << 10)).expect("it fits");
        let of = |pass| counts(Element::Bf16, &options, &plan, pass);
        let pieces = 1 + 2 + 3;
        assert_eq!(
            of(Pass::ForwardShort),
            Counts {
                exponentials: pieces * 256,
                rescaling: 0,
                multiply_adds: pieces * 256 * 16 * 2,
                copied: 2 * 40 * 32,
            }
        );
        assert_eq!(
            of(Pass::BackwardWhole(Sharing::Two)),
            Counts {
                exponentials: pieces * 256,
                rescaling: 0,
                multiply_adds: pieces * 256 * 16 * 5,
                copied: 3 * 40 * 32,
            }
        );
        assert_eq!(of(Pass::Forward), Counts::default());
    }

    /// Executed counts approach those of the mathematics for long sequences, and are never smaller.
    #[test]
    fn long_sequences_waste_little() {
        let options = FhaOptions::new(2, 16);
        for (length, most) in [(20, 12.0), (300, 1.4), (1024, 1.1), (4096, 1.03)] {
            let [forward, backward] =
                predict(Element::Bf16, &options, &Card::H200.datasheet(), length, 1 << 14).expect("valid");
            let sequences = (forward.tokens / length) as f64;
            let needed = sequences * (length * (length + 1)) as f64; // two key heads
            let executed = forward.counts.exponentials as f64;
            assert!(needed <= executed && executed <= most * needed, "{length}: {executed} of {needed}");
            let twice = if length <= 64 { 1.0 } else { 2.0 };
            assert!(backward.counts.exponentials as f64 >= twice * needed, "{length}");
        }
    }
}
