//! Packing: histories and their candidates end to end, with all indices of the model.
//!
//! Packing removes two repetitions of the published code. A **history** is encoded once for all its
//! prefixes, because the encoder is causal. A (history, candidate) **pair** is scored once for all
//! groups with that candidate, over the longest of their prefixes. See `docs/mathematics.md`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Deref;
use thiserror::Error;

/// Consecutive events of one user, oldest first, encoded in one pass, and the candidates of their
/// prefixes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Item of each event.
    pub items: Vec<u32>,
    /// Feedback of each event: 0 skipped, 1 liked.
    pub labels: Vec<u8>,
    /// Candidate groups, by ascending [`Group::length`].
    pub groups: Vec<Group>,
}

/// Candidates scored against the first `length` events of a history.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// Length of the prefix. May be 0.
    pub length: u32,
    /// Candidate items.
    pub candidates: Vec<u32>,
    /// Target of each candidate: 1 for the liked item, else 0.
    pub targets: Vec<f32>,
}

/// An invalid history.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum BatchError {
    /// `labels` and `items` differ in length.
    #[error("history {history}: {items} items but {labels} labels")]
    Labels {
        /// Index of the history.
        history: usize,
        /// Number of items.
        items: usize,
        /// Number of labels.
        labels: usize,
    },
    /// A label other than 0 or 1.
    #[error("history {history}, event {event}: label {label}; feedback is 0 (skipped) or 1 (liked)")]
    Label {
        /// Index of the history.
        history: usize,
        /// Index of the event.
        event: usize,
        /// The label.
        label: u8,
    },
    /// The prefix of a group is longer than the history, or shorter than the prefix of the previous
    /// group.
    #[error(
        "history {history}, group {group}: length {length} must be at least the length of the previous group and at most {events}, the length of the history"
    )]
    GroupLength {
        /// Index of the history.
        history: usize,
        /// Index of the group.
        group: usize,
        /// Length of the prefix.
        length: u32,
        /// Length of the history.
        events: usize,
    },
    /// `targets` and `candidates` differ in length.
    #[error("history {history}, group {group}: {candidates} candidates but {targets} targets")]
    Targets {
        /// Index of the history.
        history: usize,
        /// Index of the group.
        group: usize,
        /// Number of candidates.
        candidates: usize,
        /// Number of targets.
        targets: usize,
    },
    /// More than `u32::MAX` tokens, rows or scores.
    #[error("the batch has {count} {what}; at most {} can be indexed", u32::MAX)]
    TooLarge {
        /// Kind of the index.
        what: &'static str,
        /// Their number.
        count: usize,
    },
}

/// Lists in CSR form: the members of row `i` are `members[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lists {
    /// `[rows + 1]`
    pub offsets: Vec<u32>,
    /// `[offsets[rows]]`, ascending within a row.
    pub members: Vec<u32>,
}

impl Lists {
    /// The indices `0..key.len()`, grouped by key. Keys are in `0..rows`.
    fn by_key(key: &[u32], rows: usize) -> Self {
        let mut offsets = vec![0u32; rows + 1];
        for &k in key {
            offsets[k as usize + 1] += 1;
        }
        for i in 0..rows {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut members = vec![0; key.len()];
        for (i, &k) in key.iter().enumerate() {
            members[next[k as usize] as usize] = i as u32;
            next[k as usize] += 1;
        }
        Self { offsets, members }
    }
}

/// The embedding rows of a batch, and the contributions to their gradients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Touched {
    /// `[U]` distinct rows, ascending.
    pub row: Vec<u32>,
    /// `[U]` contributions to each row: tokens, or pairs (`N + pair`).
    pub source: Lists,
}

/// The tokens of one label, packed as sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSplit {
    /// `[N_f]` token indices, ascending.
    pub token: Vec<u32>,
    /// `[B + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[G]` number of these tokens in the prefix of each group.
    pub count: Vec<u32>,
}

/// A packed batch: [`BatchIndices`] that [`Batch::pack`] made, and nobody can change. Devices rely on
/// them: a GPU does not check index values.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch(BatchIndices);

impl Deref for Batch {
    type Target = BatchIndices;
    fn deref(&self) -> &BatchIndices {
        &self.0
    }
}

/// The indices of a [`Batch`]. `B` histories, `N` tokens, `G` groups, `C` distinct (history,
/// candidate) pairs, `R` rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchIndices {
    /// `[B + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[N]` item of each token.
    pub item: Vec<u32>,
    /// `[N]` position of each token in its history, 0 for the oldest.
    pub position: Vec<u32>,
    /// `[N]` feedback of each token.
    pub label: Vec<u8>,
    /// Negative (0) and positive (1) tokens.
    pub split: [LabelSplit; 2],
    /// `[B + 1]` groups of each history.
    pub group_offsets: Vec<u32>,
    /// `[G]` prefix length of each group.
    pub group_length: Vec<u32>,
    /// `[G + 1]` rows of each group.
    pub row_offsets: Vec<u32>,
    /// `[R]` group of each row.
    pub row_group: Vec<u32>,
    /// `[R]` pair of each row.
    pub row_pair: Vec<u32>,
    /// `[R]` prefix length of each row.
    pub row_length: Vec<u32>,
    /// `[R]` target of each row.
    pub target: Vec<f32>,
    /// `[B + 1]` pairs of each history.
    pub pair_offsets: Vec<u32>,
    /// `[C]` candidate of each pair.
    pub pair_item: Vec<u32>,
    /// `[C + 1]` prefix sums of the lengths of the pairs: the longest prefix of each.
    pub score_offsets: Vec<u32>,
    /// Rows of each pair.
    pub pair_rows: Lists,
    /// Rows of the item table.
    pub touched_item: Touched,
    /// Rows of the position table.
    pub touched_position: Touched,
    /// Both rows of the label table. Contributions are tokens, pairs of the negative interest
    /// (`N + pair`), or pairs of the positive interest (`N + C + pair`).
    pub touched_label: Touched,
}

impl Batch {
    /// Packs `histories` in order. Rows are ordered by history, group, candidate.
    pub fn pack(histories: &[History]) -> Result<Self, BatchError> {
        Self::pack_with(histories, true)
    }

    /// As [`Batch::pack`], with one pair per row: the unshared baseline of tests and measurements.
    pub fn pack_without_pair_sharing(histories: &[History]) -> Result<Self, BatchError> {
        Self::pack_with(histories, false)
    }

    fn pack_with(histories: &[History], share_pairs: bool) -> Result<Self, BatchError> {
        check(histories)?;
        let mut batch = BatchIndices {
            cu_seqlens: vec![0],
            group_offsets: vec![0],
            row_offsets: vec![0],
            pair_offsets: vec![0],
            score_offsets: vec![0],
            ..BatchIndices::default()
        };
        for split in &mut batch.split {
            split.cu_seqlens.push(0);
        }
        let mut scores = 0usize;
        let mut pairs: HashMap<u32, u32, BuildHasherDefault<ItemHasher>> = HashMap::default();
        let mut longest: Vec<u32> = Vec::new();
        for history in histories {
            batch.push_tokens(history);
            pairs.clear();
            let first_pair = batch.pair_item.len() as u32;
            let (mut counted, mut liked) = (0, 0);
            for group in &history.groups {
                let g = batch.group_length.len() as u32;
                batch.group_length.push(group.length);
                // Lengths ascend, so each event is counted once.
                liked +=
                    history.labels[counted..group.length as usize].iter().map(|&l| u32::from(l)).sum::<u32>();
                counted = group.length as usize;
                batch.split[0].count.push(group.length - liked);
                batch.split[1].count.push(liked);
                for (&candidate, &target) in group.candidates.iter().zip(&group.targets) {
                    let fresh = longest.len() as u32;
                    let pair = if share_pairs { *pairs.entry(candidate).or_insert(fresh) } else { fresh };
                    if pair == fresh {
                        longest.push(0);
                        batch.pair_item.push(candidate);
                    }
                    longest[pair as usize] = group.length; // lengths ascend
                    batch.row_group.push(g);
                    batch.row_pair.push(first_pair + pair);
                    batch.row_length.push(group.length);
                    batch.target.push(target);
                }
                batch.row_offsets.push(batch.target.len() as u32);
            }
            for length in longest.drain(..) {
                scores += length as usize;
                if scores > u32::MAX as usize {
                    return Err(BatchError::TooLarge { what: "(candidate, event) scores", count: scores });
                }
                batch.score_offsets.push(scores as u32);
            }
            batch.pair_offsets.push(batch.pair_item.len() as u32);
            batch.group_offsets.push(batch.group_length.len() as u32);
        }
        batch.pair_rows = Lists::by_key(&batch.row_pair, batch.pair_item.len());
        batch.touched_item = touched(batch.item.iter().chain(&batch.pair_item).copied());
        // Positions count from 0 in each history, so all positions below the maximum occur.
        let positions = batch.position.iter().max().map_or(0, |&last| last + 1);
        let source = Lists::by_key(&batch.position, positions as usize);
        batch.touched_position = Touched { row: (0..positions).collect(), source };
        let pairs = batch.pair_item.len();
        let interests = std::iter::repeat_n(0, pairs).chain(std::iter::repeat_n(1, pairs));
        let label: Vec<u32> = batch.label.iter().map(|&l| l.into()).chain(interests).collect();
        batch.touched_label = Touched { row: vec![0, 1], source: Lists::by_key(&label, 2) };
        Ok(Batch(batch))
    }
}

impl BatchIndices {
    fn push_tokens(&mut self, history: &History) {
        let first = self.item.len() as u32;
        self.item.extend(&history.items);
        self.position.extend(0..history.items.len() as u32);
        self.label.extend(&history.labels);
        self.cu_seqlens.push(self.item.len() as u32);
        for (token, &label) in (first..).zip(&history.labels) {
            self.split[label as usize].token.push(token);
        }
        for split in &mut self.split {
            split.cu_seqlens.push(split.token.len() as u32);
        }
    }

    /// Number of histories `B`.
    pub fn histories(&self) -> usize {
        self.cu_seqlens.len() - 1
    }
    /// Number of tokens `N`.
    pub fn tokens(&self) -> usize {
        self.item.len()
    }
    /// Number of groups `G`.
    pub fn groups(&self) -> usize {
        self.group_length.len()
    }
    /// Number of rows (instances) `R`.
    pub fn rows(&self) -> usize {
        self.target.len()
    }
    /// Number of distinct (history, candidate) pairs `C`.
    pub fn pairs(&self) -> usize {
        self.pair_item.len()
    }
}

fn check(histories: &[History]) -> Result<(), BatchError> {
    let limit = |what, count: usize| match u32::try_from(count) {
        Ok(_) => Ok(()),
        Err(_) => Err(BatchError::TooLarge { what, count }),
    };
    limit(
        "events and candidates",
        histories
            .iter()
            // A candidate is read twice: by each interest.
            .map(|h| h.items.len() + h.groups.iter().map(|g| 2 * g.candidates.len() + 1).sum::<usize>())
            .sum(),
    )?;
    for (history, h) in histories.iter().enumerate() {
        if h.items.len() != h.labels.len() {
            return Err(BatchError::Labels { history, items: h.items.len(), labels: h.labels.len() });
        }
        if let Some(event) = h.labels.iter().position(|&l| l > 1) {
            return Err(BatchError::Label { history, event, label: h.labels[event] });
        }
        let mut before = 0;
        for (group, g) in h.groups.iter().enumerate() {
            if g.length < before || g.length as usize > h.items.len() {
                return Err(BatchError::GroupLength {
                    history,
                    group,
                    length: g.length,
                    events: h.items.len(),
                });
            }
            if g.candidates.len() != g.targets.len() {
                return Err(BatchError::Targets {
                    history,
                    group,
                    candidates: g.candidates.len(),
                    targets: g.targets.len(),
                });
            }
            before = g.length;
        }
    }
    Ok(())
}

/// Distinct values of `keys`, and the indices of their occurrences.
pub fn touched(keys: impl Iterator<Item = u32>) -> Touched {
    // Sorted by key, then by index: the order of the lists.
    let mut places: Vec<u64> =
        (0..).zip(keys).map(|(place, key): (u64, u32)| u64::from(key) << 32 | place).collect();
    places.sort_unstable();
    let mut touched = Touched::default();
    touched.source.members = places.iter().map(|&place| place as u32).collect();
    touched.source.offsets.push(0);
    for of_key in places.chunk_by(|a, b| a >> 32 == b >> 32) {
        touched.row.push((of_key[0] >> 32) as u32);
        let end = touched.source.offsets[touched.row.len() - 1] + of_key.len() as u32;
        touched.source.offsets.push(end);
    }
    touched
}

/// A multiplicative hash of item ids. Ids come from a data set, so resistance to chosen collisions
/// is not needed.
#[derive(Default)]
struct ItemHasher(u64);

impl Hasher for ItemHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(byte.into()));
    }
    fn write_u32(&mut self, item: u32) {
        // The table takes the bucket from the low bits and the tag from the high bits.
        let product = (self.0 ^ u64::from(item)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}
