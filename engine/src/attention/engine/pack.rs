//! Label order: the positions of key and query tokens, and the packed copies that the tiles read.
//!
//! The copying functions are inlined into the kernels and so compiled for their instruction set.

use super::{Group, Sequence, Shape};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// Slots are padded to whole vectors of the widest instruction set.
pub(super) const ALIGN: usize = 16;

/// Keys that a tile scores before it computes probabilities: a multiple of [`ALIGN`].
pub(super) const STRETCH: usize = 1024;

/// Distance between the scores of two rows. A whole page would map all rows to the same cache sets.
pub(super) const STRIDE: usize = STRETCH + ALIGN;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; ALIGN]);

/// A buffer that only grows, aligned so that no vector crosses a cache line.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// `len` values of unspecified content.
    pub(super) fn take(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(ALIGN);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; ALIGN]));
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..lines])[..len]
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Line>()
    }
}

/// Scratch of a thread, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) keys: KeyOrder,
    pub(super) queries: QueryOrder,
    /// `[H, d, slots]`
    pub(super) k_panels: Buffer,
    /// `[H, d, slots]`
    pub(super) v_panels: Buffer,
    /// `[H, slots, padded d]`
    pub(super) rows: Buffer,
    /// `[H, d, slots]` each
    pub(super) dk_panels: Buffer,
    pub(super) dv_panels: Buffer,
    /// Buffers of a tile; see `forward` and `backward`.
    pub(super) tile: Tile,
}

/// Buffers of one tile of rows.
#[derive(Default)]
pub(super) struct Tile {
    pub(super) q: Buffer,
    pub(super) raw_q: Buffer,
    pub(super) d_o: Buffer,
    pub(super) o: Buffer,
    pub(super) scores: Buffer,
    pub(super) gradients: Buffer,
    pub(super) sums: Buffer,
    pub(super) pieces: Vec<Piece>,
}

impl Scratch {
    pub(super) fn bytes(&self) -> usize {
        let Tile { q, raw_q, d_o, o, scores, gradients, sums, pieces } = &self.tile;
        let panels = [&self.k_panels, &self.v_panels, &self.rows, &self.dk_panels, &self.dv_panels];
        let tile = [q, raw_q, d_o, o, scores, gradients, sums];
        panels.into_iter().chain(tile).map(Buffer::bytes).sum::<usize>()
            + self.keys.tokens.capacity() * 4
            + self.queries.tokens.capacity() * 4
            + self.queries.visible.capacity() * 8
            + pieces.capacity() * size_of::<Piece>()
    }
}

/// Key tokens in label order. List `l` fills slots `base[l]..base[l] + len[l]`; the slots between
/// lists are padding, where packed values are 0.
#[derive(Default)]
pub(super) struct KeyOrder {
    tokens: Vec<u32>,
    pub(super) base: [usize; 2],
    pub(super) len: [usize; 2],
    pub(super) slots: usize,
}

/// Query tokens in label order, and the number of visible keys of each list.
#[derive(Default)]
pub(super) struct QueryOrder {
    pub(super) tokens: Vec<u32>,
    pub(super) visible: Vec<[u32; 2]>,
    /// Start of list 1.
    middle: usize,
}

impl KeyOrder {
    #[inline(always)]
    pub(super) fn arrange(&mut self, sequence: &Sequence, keys: Range<usize>) {
        self.tokens.clear();
        self.slots = 0;
        for list in 0..2 {
            self.base[list] = self.slots;
            let of_list = keys.clone().filter(|&t| sequence.list(t) == list).map(|t| t as u32);
            self.tokens.extend(of_list);
            self.len[list] = self.tokens.len() - self.slots;
            self.slots = self.tokens.len().next_multiple_of(ALIGN);
            self.tokens.resize(self.slots, u32::MAX);
        }
    }

    /// (slot, token) of every key.
    #[inline(always)]
    fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..2).flat_map(move |list| {
            let slots = self.base[list]..self.base[list] + self.len[list];
            slots.map(move |slot| (slot, self.tokens[slot] as usize))
        })
    }

    /// The keys in blocks of [`ALIGN`] slots: (first slot, tokens). The last block of a list may
    /// hold fewer.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = (usize, &[u32])> + '_ {
        (0..2).flat_map(move |list| {
            let end = self.base[list] + self.len[list];
            let starts = (self.base[list]..end).step_by(ALIGN);
            starts.map(move |slot| (slot, &self.tokens[slot..end.min(slot + ALIGN)]))
        })
    }

    #[inline(always)]
    fn padding(&self) -> [Range<usize>; 2] {
        [self.base[0] + self.len[0]..self.base[1], self.base[1] + self.len[1]..self.slots]
    }

    /// Packs `x` (`[T, H, d]`) as panels `[H, d, slots]`.
    #[inline(always)]
    pub(super) fn pack_panels(&self, sequence: &Sequence, x: &[f32], panels: &mut [f32]) {
        let (d, width) = (sequence.shape.d, sequence.shape.width());
        for (head, panel) in panels.chunks_exact_mut((d * self.slots).max(1)).enumerate() {
            for (slot, tokens) in self.blocks() {
                let mut rows: [&[f32]; ALIGN] = [&[]; ALIGN];
                for (row, &token) in rows.iter_mut().zip(tokens) {
                    *row = &x[token as usize * width + head * d..][..d];
                }
                for feature in 0..d {
                    let line = &mut panel[feature * self.slots + slot..][..ALIGN];
                    let (line, padding) = line.split_at_mut(tokens.len());
                    for (out, row) in line.iter_mut().zip(&rows) {
                        *out = row[feature];
                    }
                    padding.fill(0.0);
                }
            }
        }
    }

    /// The inverse of [`pack_panels`](Self::pack_panels), times `factor`, to tokens counted from
    /// `first`.
    #[inline(always)]
    pub(super) fn unpack_panels(
        &self,
        sequence: &Sequence,
        panels: &[f32],
        factor: f32,
        first: usize,
        x: &mut [f32],
    ) {
        let (d, width) = (sequence.shape.d, sequence.shape.width());
        for (head, panel) in panels.chunks_exact((d * self.slots).max(1)).enumerate() {
            for (slot, tokens) in self.blocks() {
                for feature in 0..d {
                    let line = &panel[feature * self.slots + slot..][..tokens.len()];
                    for (value, &token) in line.iter().zip(tokens) {
                        x[(token as usize - first) * width + head * d + feature] = value * factor;
                    }
                }
            }
        }
    }

    /// Packs `x` (`[T, H, d]`) as rows `[H, slots, padded]`, `padded >= d`. Returns whether all
    /// values are finite.
    #[inline(always)]
    pub(super) fn pack_rows(&self, sequence: &Sequence, x: &[f32], padded: usize, rows: &mut [f32]) -> bool {
        let (d, width) = (sequence.shape.d, sequence.shape.width());
        let mut largest = 0;
        for (head, rows) in rows.chunks_exact_mut((padded * self.slots).max(1)).enumerate() {
            for (slot, token) in self.iter() {
                let row = &mut rows[slot * padded..][..padded];
                let (values, padding) = row.split_at_mut(d);
                values.copy_from_slice(&x[token * width + head * d..][..d]);
                padding.fill(0.0);
                // Without the sign, bits order like floats: infinity and NaN come last.
                largest = values.iter().fold(largest, |m, x| m.max(x.abs().to_bits()));
            }
            for padding in self.padding() {
                rows[padding.start * padded..padding.end * padded].fill(0.0);
            }
        }
        largest < f32::INFINITY.to_bits()
    }
}

impl QueryOrder {
    #[inline(always)]
    pub(super) fn arrange(
        &mut self,
        sequence: &Sequence,
        keys: &KeyOrder,
        key_range: Range<usize>,
        queries: Range<usize>,
    ) {
        self.tokens.clear();
        self.visible.clear();
        for list in 0..sequence.shape.lists {
            if list == 1 {
                self.middle = self.tokens.len();
            }
            let mut visible = keys.len.map(|len| len as u32);
            if sequence.shape.causal {
                visible = [0, 0];
                for token in key_range.start..queries.start.min(key_range.end) {
                    visible[sequence.list(token)] += 1;
                }
            }
            for token in queries.clone() {
                if sequence.shape.causal && key_range.contains(&token) {
                    visible[sequence.list(token)] += 1;
                }
                if sequence.list(token) == list {
                    self.tokens.push(token as u32);
                    self.visible.push(visible);
                }
            }
        }
        if sequence.shape.lists == 1 {
            self.middle = self.tokens.len();
        }
    }

    /// The positions in [`tokens`](Self::tokens) of a list.
    fn list(&self, list: usize) -> Range<usize> {
        if list == 0 { 0..self.middle } else { self.middle..self.tokens.len() }
    }

    /// Number of rows of a group: its tokens times its heads, head-minor.
    pub(super) fn rows(&self, group: &Group) -> usize {
        self.list(group.list).len() * group.slots.len()
    }

    /// At most `R` rows of a group, padded with copies of the last.
    pub(super) fn tile<const R: usize>(&self, group: &Group, rows: Range<usize>) -> [Row; R] {
        let last = self.row(group, rows.end - 1);
        let mut tile = [last; R];
        for (row, index) in tile.iter_mut().zip(rows) {
            *row = self.row(group, index);
        }
        tile
    }

    fn row(&self, group: &Group, row: usize) -> Row {
        let (position, head) = (row / group.slots.len(), row % group.slots.len());
        let position = self.list(group.list).start + position;
        Row {
            token: self.tokens[position] as usize,
            head: group.head + head,
            slot: group.slots.start + head,
            visible: self.visible[position].map(|v| v as usize),
        }
    }
}

/// One query row: a token and a head.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// Position in the sequence.
    pub(super) token: usize,
    pub(super) head: usize,
    /// Slot of the head in `o` and `lse`.
    pub(super) slot: usize,
    /// Number of visible keys of each list, a prefix.
    pub(super) visible: [usize; 2],
}

/// Consecutive keys of one list in one key head, the unit of work of a tile.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) key_head: usize,
    pub(super) list: usize,
    /// Number of keys of the list before the piece.
    pub(super) offset: usize,
    /// Keys visible to the last row of the tile, at most [`STRETCH`].
    pub(super) len: usize,
    /// Whether the label mask keeps the piece.
    pub(super) kept: bool,
    /// Position of its scores in the stretch.
    pub(super) at: usize,
}

impl Piece {
    /// Slot of the first key.
    pub(super) fn slot(&self, keys: &KeyOrder) -> usize {
        keys.base[self.list] + self.offset
    }

    /// `len`, rounded up to whole vectors.
    pub(super) fn padded(&self) -> usize {
        self.len.next_multiple_of(ALIGN)
    }

    /// Number of keys visible to a row.
    pub(super) fn visible(&self, row: &Row) -> usize {
        row.visible[self.list].saturating_sub(self.offset).min(self.len)
    }
}

/// Fills `pieces` with the pieces of a tile. `visible` counts the keys of the last row, which reads
/// the most.
pub(super) fn cut(shape: &Shape, group: &Group, visible: [usize; 2], pieces: &mut Vec<Piece>) {
    pieces.clear();
    let mut at = 0;
    for key_head in group.key_heads.clone() {
        for list in (0..shape.lists).filter(|&list| shape.reads(key_head, list)) {
            let kept = shape.keeps(key_head, list);
            let mut offset = 0;
            while offset < visible[list] {
                let len = (visible[list] - offset).min(STRETCH);
                let padded = len.next_multiple_of(ALIGN);
                if at + padded > STRETCH {
                    at = 0;
                }
                pieces.push(Piece { key_head, list, offset, len, kept, at });
                at += padded;
                offset += len;
            }
        }
    }
}
