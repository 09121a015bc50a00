//! Work lists of `target/target_attention.cu` for a batch: pairs sorted by length, and work items.

use crate::device::{TargetCounts, TargetIndex};
use bytemuck::{Pod, Zeroable};

/// Tokens per item: the M of `mma.m16n8k16`.
pub const TOKENS: usize = 16;

/// Maximum pairs per item. The fixed work of an item (loading its tokens, writing its sums) equals
/// about one pair, so many pairs make it negligible. But a warp takes whole items, and a batch
/// should have several items per warp.
pub const PAIRS: usize = 32;

/// A work item: sixteen consecutive tokens of a sequence, and pairs that reach them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// First token in the batch.
    pub token: u32,
    /// Position of the first token in the sequence.
    pub position: u32,
    /// First pair in [`TargetLists::pairs`], the longest of the item.
    pub first_pair: u32,
    /// Number of pairs.
    pub pairs: u32,
}

/// A (sequence, candidate) pair. The pairs of a sequence are consecutive, longest first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Pair {
    /// Index of the pair in the batch.
    pub index: u32,
    /// Index of its first score.
    pub score: u32,
    /// Number of scores.
    pub length: u32,
    /// Index of its first unit. A unit is sixteen scores.
    pub unit: u32,
}

/// An instance. The instances of a pair are consecutive, longest first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Row {
    /// Index of the row in the batch.
    pub index: u32,
    /// Number of tokens of its history.
    pub length: u32,
    /// Index of the first score of its pair.
    pub score: u32,
    /// First token of its sequence.
    pub token: u32,
}

/// Up to sixteen consecutive tokens of a sequence, with all items over them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Tile {
    /// First token in the batch.
    pub token: u32,
    /// Number of tokens.
    pub tokens: u32,
    /// Position of the first token in the sequence.
    pub position: u32,
    /// First pair that reaches the tile, the longest.
    pub first_pair: u32,
    /// Number of pairs that reach the tile.
    pub pairs: u32,
    /// Index of its first item.
    pub first_item: u32,
    /// Number of items.
    pub items: u32,
    /// Padding to a multiple of 16 bytes.
    pub unused: u32,
}

// As in target/scores.cuh and target/softmax.cuh.
const _: () = assert!(size_of::<Item>() == 16 && size_of::<Pair>() == 16);
const _: () = assert!(size_of::<Row>() == 16 && size_of::<Tile>() == 32);

/// Work lists of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetLists {
    /// Sizes of the batch.
    pub counts: TargetCounts,
    /// Work items of the MLP.
    pub items: Vec<Item>,
    /// `[C]`, by sequence, longest first.
    pub pairs: Vec<Pair>,
    /// `[C + 1]`: index of the first row of each of `pairs`.
    pub pair_rows: Vec<u32>,
    /// `[R]`, by pair, longest first.
    pub rows: Vec<Row>,
    /// Tiles of all tokens.
    pub tiles: Vec<Tile>,
    /// Number of units of all pairs.
    pub units: usize,
}

impl TargetLists {
    /// Builds the lists of a batch.
    ///
    /// # Panics
    /// If the arrays of `index` contradict each other.
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
            // A stable sort: pairs of equal length keep their order.
            pairs.sort_by_key(|&pair| std::cmp::Reverse(index.pair_length(pair as usize)));
            let first = lists.pairs.len();
            for &pair in &pairs {
                lists.add_pair(index, pair as usize, start);
            }
            lists.add_tiles(start, end - start, first);
        }
        lists
    }

    /// Appends a pair of the sequence that starts at `token`, with its rows.
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

    /// Appends the tiles and items of a sequence. Its pairs start at `first`.
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
        // Sequences of 40, 0 and 3 tokens; the first has 70 pairs of length 17, one of 40 and an
        // empty one.
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
