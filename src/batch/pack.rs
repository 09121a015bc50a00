//! Packing: histories and their candidates laid end to end, with every index the model needs.
//!
//! Two things are shared here that published code repeats. A **history** is encoded once for all the prefixes of
//! it that are asked about (the encoder is causal), and a (history, candidate) **pair** is scored once, over the
//! longest prefix that needs it, however many groups ask for that candidate. See `docs/mathematics.md`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use thiserror::Error;

/// A run of one user's events, oldest first, encoded in one pass, and what is asked of its prefixes.
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
    /// Events of the history that count; may be 0.
    pub length: u32,
    /// Candidate items.
    pub candidates: Vec<u32>,
    /// 1 for a candidate that was liked next, 0 for one that was not; as many as `candidates`.
    pub targets: Vec<f32>,
}

/// A history that cannot be packed.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum BatchError {
    /// `labels` is not as long as `items`.
    #[error("history {history}: {items} items but {labels} labels")]
    Labels {
        /// Index of the history.
        history: usize,
        /// Items given.
        items: usize,
        /// Labels given.
        labels: usize,
    },
    /// A label other than 0 and 1.
    #[error("history {history}, event {event}: label {label}; feedback is 0 (skipped) or 1 (liked)")]
    Label {
        /// Index of the history.
        history: usize,
        /// Index of the event.
        event: usize,
        /// The label.
        label: u8,
    },
    /// A group's length exceeds the history's, or is shorter than the group before.
    #[error(
        "history {history}, group {group}: length {length} must be at least that of the group before and at most {events}, the history's"
    )]
    GroupLength {
        /// Index of the history.
        history: usize,
        /// Index of the group.
        group: usize,
        /// The group's length.
        length: u32,
        /// Events in the history.
        events: usize,
    },
    /// `targets` is not as long as `candidates`.
    #[error("history {history}, group {group}: {candidates} candidates but {targets} targets")]
    Targets {
        /// Index of the history.
        history: usize,
        /// Index of the group.
        group: usize,
        /// Candidates given.
        candidates: usize,
        /// Targets given.
        targets: usize,
    },
    /// More than `u32::MAX` tokens, rows or scores.
    #[error("the batch has {count} {what}; at most {} can be indexed", u32::MAX)]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
    },
}

/// Rows that refer to rows: members of `i` are `members[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lists {
    /// `[rows + 1]`
    pub offsets: Vec<u32>,
    /// `[offsets[rows]]`, ascending inside a row.
    pub members: Vec<u32>,
}

impl Lists {
    /// Groups `0..key.len()` by key, keys in `0..rows`.
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

/// The rows of a table that a batch touches, and from where their gradient comes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Touched {
    /// `[U]` distinct rows, ascending.
    pub row: Vec<u32>,
    /// `[U]` contributions to each: indices into tokens, then pairs (`N + pair`).
    pub source: Lists,
}

/// The tokens of one label, as packed sequences of their own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSplit {
    /// `[N_f]` token of each, ascending.
    pub token: Vec<u32>,
    /// `[B + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[G]` how many of them lie in the group's prefix.
    pub count: Vec<u32>,
}

/// A packed batch. `B` histories, `N` tokens, `G` groups, `C` distinct (history, candidate) pairs, `R` rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[B + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[N]` item of each token.
    pub item: Vec<u32>,
    /// `[N]` position of each token in its history, 0 = the oldest.
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
    /// `[R]` prefix length of each row's group.
    pub row_length: Vec<u32>,
    /// `[R]` target of each row.
    pub target: Vec<f32>,
    /// `[B + 1]` pairs of each history.
    pub pair_offsets: Vec<u32>,
    /// `[C]` candidate of each pair.
    pub pair_item: Vec<u32>,
    /// `[C + 1]` prefix sums of the longest prefix each pair is scored over.
    pub score_offsets: Vec<u32>,
    /// Rows of each pair.
    pub pair_rows: Lists,
    /// Touched rows of the item table.
    pub touched_item: Touched,
    /// Touched rows of the position table.
    pub touched_position: Touched,
    /// Touched rows of the label table: always both. Members count tokens, then pairs scored for the negative
    /// interest (`N + pair`), then pairs scored for the positive one (`N + C + pair`).
    pub touched_label: Touched,
}

impl Batch {
    /// Packs `histories` in order; rows follow histories, groups, candidates.
    pub fn pack(histories: &[History]) -> Result<Self, BatchError> {
        Self::pack_with(histories, true)
    }

    /// As [`Batch::pack`], but every row gets a pair of its own: the long way, for tests and measurements.
    pub fn pack_without_pair_sharing(histories: &[History]) -> Result<Self, BatchError> {
        Self::pack_with(histories, false)
    }

    fn pack_with(histories: &[History], share_pairs: bool) -> Result<Self, BatchError> {
        check(histories)?;
        let mut batch = Batch {
            cu_seqlens: vec![0],
            group_offsets: vec![0],
            row_offsets: vec![0],
            pair_offsets: vec![0],
            score_offsets: vec![0],
            ..Batch::default()
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
                // Lengths ascend, so that every event is counted once.
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
        // Positions count from 0 in every history, so none is left out below the highest.
        let positions = batch.position.iter().max().map_or(0, |&last| last + 1);
        let source = Lists::by_key(&batch.position, positions as usize);
        batch.touched_position = Touched { row: (0..positions).collect(), source };
        let pairs = batch.pair_item.len();
        let interests = std::iter::repeat_n(0, pairs).chain(std::iter::repeat_n(1, pairs));
        let label: Vec<u32> = batch.label.iter().map(|&l| l.into()).chain(interests).collect();
        batch.touched_label = Touched { row: vec![0, 1], source: Lists::by_key(&label, 2) };
        Ok(batch)
    }

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
            .map(|h| h.items.len() + h.groups.iter().map(|g| g.candidates.len() + 1).sum::<usize>())
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

/// Distinct values of `keys` and where they occur.
fn touched(keys: impl Iterator<Item = u32>) -> Touched {
    // Sorted by key and then by place, which is the order of the lists.
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

/// A hash of item ids that costs a multiplication: ids come from a data set, not from somebody who looks for collisions.
#[derive(Default)]
struct ItemHasher(u64);

impl Hasher for ItemHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(byte.into()));
    }
    fn write_u32(&mut self, item: u32) {
        // The table takes its place from the low bits and its tag from the high ones.
        let product = (self.0 ^ u64::from(item)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}
