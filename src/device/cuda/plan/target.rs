//! What the kernels of `target_attention.cu` need to know about one batch: its pairs by length, and its work cut into items.

use crate::device::{TargetCounts, TargetIndex};
use bytemuck::{Pod, Zeroable};

/// Tokens of an item: the M of `mma.m16n8k16`.
pub const TOKENS: usize = 16;

/// Pairs of an item at most. What an item costs besides its pairs (loading its tokens, leaving its sums) is about a pair's work,
/// so many pairs make it negligible; but an item is one warp's work, and a batch should have several for every warp.
pub const PAIRS: usize = 32;

/// Sixteen neighbouring tokens of a sequence and some of the pairs that reach them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// The first token.
    pub token: u32,
    /// Its place in the sequence.
    pub position: u32,
    /// The longest of its pairs, in the order of [`TargetLists::pairs`].
    pub first_pair: u32,
    /// How many pairs.
    pub pairs: u32,
}

/// A pair list entry; the pairs of a sequence follow each other, the longest first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Pair {
    /// Its place in the batch.
    pub index: u32,
    /// Where its scores begin.
    pub score: u32,
    /// How many scores.
    pub length: u32,
    /// Its first unit: every sixteen scores are one.
    pub unit: u32,
}

/// An instance; those of a pair follow each other, the longest first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Row {
    /// Its place in the batch.
    pub index: u32,
    /// Tokens of its history.
    pub length: u32,
    /// Where its pair's scores begin.
    pub score: u32,
    /// Where its sequence begins.
    pub token: u32,
}

/// Sixteen tokens of a sequence, fewer at its end, with all their items.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Tile {
    /// The first token.
    pub token: u32,
    /// How many tokens.
    pub tokens: u32,
    /// The first one's place in the sequence.
    pub position: u32,
    /// The longest of the pairs that reach it.
    pub first_pair: u32,
    /// How many do.
    pub pairs: u32,
    /// Its first item.
    pub first_item: u32,
    /// How many items.
    pub items: u32,
    /// The size is a multiple of 16.
    pub unused: u32,
}

// As in target_scores.cuh and target_softmax.cuh.
const _: () = assert!(size_of::<Item>() == 16 && size_of::<Pair>() == 16);
const _: () = assert!(size_of::<Row>() == 16 && size_of::<Tile>() == 32);

/// The lists of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetLists {
    /// Of the batch.
    pub counts: TargetCounts,
    /// All work of the perceptron.
    pub items: Vec<Item>,
    /// `[C]`
    pub pairs: Vec<Pair>,
    /// `[C + 1]` where the rows of each of `pairs` begin.
    pub pair_rows: Vec<u32>,
    /// `[R]`
    pub rows: Vec<Row>,
    /// All tokens.
    pub tiles: Vec<Tile>,
    /// How many units the pairs have.
    pub units: usize,
}

impl TargetLists {
    /// Of a batch.
    ///
    /// # Panics
    /// Where the arrays of `index` do not fit each other.
    pub fn new(index: &TargetIndex<&[u32]>) -> Self {
        let counts = index.counts();
        let mut lists = Self { counts, pair_rows: vec![0], ..Self::default() };
        lists.pairs.reserve(counts.pairs);
        lists.rows.reserve(counts.rows);
        let mut pairs = Vec::new();
        for sequence in 0..index.cu_seqlens.len() - 1 {
            let [start, end] = [index.cu_seqlens[sequence], index.cu_seqlens[sequence + 1]];
            pairs.clear();
            pairs.extend(index.pair_offsets[sequence]..index.pair_offsets[sequence + 1]);
            // Stable: pairs of one length stay in their order.
            pairs.sort_by_key(|&pair| std::cmp::Reverse(index.pair_length(pair as usize)));
            let first = lists.pairs.len();
            for &pair in &pairs {
                lists.add_pair(index, pair as usize, start);
            }
            lists.add_tiles(start, end - start, first);
        }
        lists
    }

    /// The next pair of the sequence that begins at `token`, and its rows.
    fn add_pair(&mut self, index: &TargetIndex<&[u32]>, pair: usize, token: u32) {
        let (score, length) = (index.score_offsets[pair], index.pair_length(pair));
        self.pairs.push(Pair { index: pair as u32, score, length, unit: self.units as u32 });
        self.units += (length as usize).div_ceil(TOKENS);
        let first = self.rows.len();
        let members =
            &index.rows.members[index.rows.offsets[pair] as usize..index.rows.offsets[pair + 1] as usize];
        self.rows.extend(members.iter().map(|&row| Row {
            index: row,
            length: index.row_length[row as usize],
            score,
            token,
        }));
        self.rows[first..].sort_by_key(|row| std::cmp::Reverse(row.length));
        self.pair_rows.push(self.rows.len() as u32);
    }

    /// The tiles and items of a sequence whose pairs are those from `first` on.
    fn add_tiles(&mut self, start: u32, length: u32, first: usize) {
        for position in (0..length).step_by(TOKENS) {
            let token = start + position;
            let pairs = self.pairs[first..].partition_point(|pair| pair.length > position);
            let first_item = self.items.len();
            self.items.extend((0..pairs).step_by(PAIRS).map(|at| Item {
                token,
                position,
                first_pair: (first + at) as u32,
                pairs: PAIRS.min(pairs - at) as u32,
            }));
            self.tiles.push(Tile {
                token,
                tokens: (length - position).min(TOKENS as u32),
                position,
                first_pair: first as u32,
                pairs: pairs as u32,
                first_item: first_item as u32,
                items: (self.items.len() - first_item) as u32,
                unused: 0,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Segments;

    #[test]
    fn every_score_is_one_items_and_every_token_one_tiles() {
        // Sequences of 40, 0 and 3 tokens; the first has 70 pairs of length 17, one of 40 and an empty one.
        let lengths: Vec<u32> = [vec![17; 70], vec![40, 0, 3, 1]].concat();
        let score_offsets: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |sum, length| {
                *sum += length;
                Some(*sum)
            }))
            .collect();
        let row_offsets: Vec<u32> =
            (0u32..=74).map(|pair| pair.min(71) + pair.saturating_sub(72) * 2).collect();
        let members: Vec<u32> = (0..75).rev().collect();
        let mut row_length = vec![0; 75];
        for pair in 0..74 {
            for member in row_offsets[pair]..row_offsets[pair + 1] {
                row_length[members[member as usize] as usize] = lengths[pair].min(member % 5);
            }
        }
        let lists = TargetLists::new(&TargetIndex {
            cu_seqlens: &[0, 40, 40, 43],
            pair_offsets: &[0, 72, 72, 74],
            score_offsets: &score_offsets,
            rows: Segments { offsets: &row_offsets[..], members: &members },
            row_length: &row_length,
        });

        let mut scored = vec![0; *score_offsets.last().unwrap() as usize];
        for item in &lists.items {
            assert!(item.pairs >= 1 && item.pairs as usize <= PAIRS);
            for pair in &lists.pairs[item.first_pair as usize..][..item.pairs as usize] {
                assert!(pair.length > item.position, "an item has pairs that reach it only");
                for t in item.position..pair.length.min(item.position + 16) {
                    scored[(pair.score + t) as usize] += 1;
                }
            }
        }
        assert!(scored.iter().all(|&n| n == 1));
        let mut tokens = [0; 43];
        for tile in &lists.tiles {
            (tile.token..tile.token + tile.tokens).for_each(|token| tokens[token as usize] += 1);
            let items = &lists.items[tile.first_item as usize..][..tile.items as usize];
            assert_eq!(items.iter().map(|item| item.pairs).sum::<u32>(), tile.pairs);
            assert!(items.iter().all(|item| (item.token, item.position) == (tile.token, tile.position)));
        }
        assert!(tokens.iter().all(|&n| n == 1));
        assert_eq!(lists.items.len(), 3 + 3 + 1 + 1);
        assert_eq!(lists.units, 70 * 2 + 3 + 1 + 1);
        assert_eq!(lists.pairs[0].length, 40, "the longest is first");
        for (pair, rows) in lists.pairs.iter().zip(lists.pair_rows.windows(2)) {
            let rows = &lists.rows[rows[0] as usize..rows[1] as usize];
            assert!(rows.is_sorted_by_key(|row| std::cmp::Reverse(row.length)));
            assert!(rows.iter().all(|row| row.score == pair.score && row.length <= pair.length));
        }
        assert_eq!(lists.rows.len(), 75);
    }
}
