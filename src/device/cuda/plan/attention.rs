//! The plan of a batch: label order, counts and work items. Made once per batch, on the host.
//!
//! Streamed passes visit the tokens of a sequence as keys in label order, negatives first. A tile
//! of scores is then kept or masked as a whole, and a query sees a prefix of each label. Work items
//! are listed longest first: the long sequences start at once and the short ones fill the gaps.

use super::params::{AttentionParams, Item};
use super::tile::{Room, Sharing, Tile, Whole, slots_of, tile};
use crate::attention::{FhaOptions, LabelMask, Normalization, Pairing};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Block, Element, Launch};

/// Label order, label counts and work items of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Number of tokens `N`.
    pub tokens: usize,
    /// `[N]`: token indices by sequence, negatives before positives, each in token order. Empty
    /// without labels.
    pub order: Vec<u32>,
    /// `[N]`: `2 * positives + label`, where `positives` counts the tokens of label 1 from the
    /// start of the sequence up to and including this token. Empty without labels.
    pub feedback: Vec<u32>,
    /// Work items of each pass, in the order of [`Pass::ALL`], longest first. Whole passes have one
    /// item per sequence, and empty items fill their last block. Streamed passes have one item per
    /// block; dk_dv runs each for every key head.
    items: [Vec<Item>; Pass::ALL.len()],
    /// Block sizes.
    pub tile: Tile,
}

/// A pass of the operation: one launch of a kernel of `attention/attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `o` and `lse` of short sequences, whose scores fit registers.
    ForwardShort,
    /// `o` and `lse` of the other whole sequences.
    ForwardWhole(Sharing),
    /// `o` and `lse` of streamed sequences.
    Forward,
    /// `dq`, `dk` and `dv` of whole sequences, in one pass.
    BackwardWhole(Sharing),
    /// `dq` of whole sequences in two passes, and the inputs of [`Pass::DkDvWhole`].
    DqWhole,
    /// `dk` and `dv` of whole sequences in two passes.
    DkDvWhole,
    /// `dq` of streamed sequences, and the inputs of [`Pass::DkDv`].
    Dq,
    /// `dk` and `dv` of streamed sequences.
    DkDv,
}

impl Pass {
    /// All passes, in launch order.
    pub const ALL: [Pass; 12] = [
        Pass::ForwardShort,
        Pass::ForwardWhole(Sharing::One),
        Pass::ForwardWhole(Sharing::Two),
        Pass::ForwardWhole(Sharing::Four),
        Pass::Forward,
        Pass::BackwardWhole(Sharing::One),
        Pass::BackwardWhole(Sharing::Two),
        Pass::BackwardWhole(Sharing::Four),
        Pass::DqWhole,
        Pass::DkDvWhole,
        Pass::Dq,
        Pass::DkDv,
    ];

    /// The passes of forward, in launch order.
    pub const FORWARD: &[Pass] = Pass::ALL.split_at(5).0;

    /// The passes of backward, in launch order.
    pub const BACKWARD: &[Pass] = Pass::ALL.split_at(5).1;

    /// Index in [`Pass::ALL`].
    pub fn index(self) -> usize {
        Pass::ALL.iter().position(|&pass| pass == self).expect("ALL has every pass")
    }
}

impl Plan {
    /// Plans a batch. With [`LabelMask::None`], `label` is not read. The arguments have passed
    /// [`FhaOptions::check`].
    ///
    /// # Errors
    /// The errors of [`tile`]; [`CudaError::TooLarge`] if the number of query rows exceeds
    /// `i32::MAX`.
    pub fn new(
        element: Element,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
        room: Room,
    ) -> Result<Plan, CudaError> {
        let sequences =
            || cu_seqlens.windows(2).map(|w| (w[0] as usize, w[1] as usize)).filter(|(s, e)| s < e);
        let tokens = cu_seqlens.last().map_or(0, |&n| n as usize);
        let rows = tokens.saturating_mul(options.query_slots());
        if rows > i32::MAX as usize {
            return Err(CudaError::TooLarge { rows });
        }
        let labelled = options.label_mask == LabelMask::Feedback;
        let slots = slots_of(options);
        let lengths: Vec<usize> = sequences().map(|(start, end)| end - start).collect();
        let tile = tile(element, options, &lengths, room)?;

        let (mut order, mut feedback) = (vec![], vec![]);
        if labelled {
            order = vec![0; tokens];
            feedback = vec![0; tokens];
        }
        // Each with its number of (row, key) pairs, the sort key.
        let mut items = Pass::ALL.map(|_| Vec::<(usize, Item)>::new());
        for (start, end) in sequences() {
            let length = end - start;
            let negatives =
                if labelled { label[start..end].iter().filter(|&&l| l == 0).count() } else { length };
            if labelled {
                let mut positives = 0;
                for t in start..end {
                    let positive = label[t] as usize;
                    let rank = if positive == 1 { negatives + positives } else { t - start - positives };
                    positives += positive;
                    order[start + rank] = t as u32;
                    feedback[t] = (2 * positives + positive) as u32;
                }
            }
            let item = |first: usize| Item {
                start: start as u32,
                length: length as u32,
                negatives: negatives as u32,
                first: first as u32,
            };
            let by_rows = |items: &mut [Vec<(usize, Item)>], pass: Pass, rows: usize| {
                for first in (0..length * slots).step_by(rows) {
                    let last = ((first + rows).min(length * slots) - 1) / slots;
                    let work = if options.causal { last + 1 } else { length };
                    items[pass.index()].push((work, item(first)));
                }
            };
            let sharing = Sharing::of(length * slots);
            let takes = |pass: &Pass| tile.whole(*pass).is_some_and(|whole| length <= whole.longest);
            let whole = [Some(Pass::ForwardShort), sharing.map(Pass::ForwardWhole)];
            let forward = whole.into_iter().flatten().find(takes);
            let one = sharing.map(Pass::BackwardWhole).filter(takes);
            // Only sequences that share no block take two passes; a shorter one in the batch must
            // take the passes that it takes alone.
            let may_take_two = one.is_none() && sharing == Some(Sharing::Four);
            let two = [Pass::DqWhole, Pass::DkDvWhole].into_iter().filter(|pass| may_take_two && takes(pass));
            let backward: Vec<Pass> = one.into_iter().chain(two).collect();
            for pass in forward.into_iter().chain(backward.iter().copied()) {
                items[pass.index()].push((length, item(0)));
            }
            if forward.is_none() {
                by_rows(&mut items, Pass::Forward, tile.forward.rows());
            }
            if backward.is_empty() {
                by_rows(&mut items, Pass::Dq, tile.dq.rows());
            }
            if !backward.is_empty() {
                continue;
            }
            for (from, to) in [(0, negatives), (negatives, length)] {
                for first in (from..to).step_by(tile.dk_dv.rows()) {
                    let position = if labelled { order[start + first] as usize - start } else { first };
                    let work = if options.causal { length - position } else { length };
                    items[Pass::DkDv.index()].push((work, item(first)));
                }
            }
        }
        let mut passes = Pass::ALL.into_iter();
        let items = items.map(|mut items| {
            // A stable sort: items of equal work keep their memory order.
            items.sort_by_key(|&(work, _)| std::cmp::Reverse(work));
            let mut items: Vec<Item> = items.into_iter().map(|(_, item)| item).collect();
            let whole = passes.next().and_then(|pass| tile.whole(pass));
            let filled_up = items.len().next_multiple_of(whole.map_or(1, |whole| whole.items()));
            items.resize(filled_up, Item { start: 0, length: 0, negatives: 0, first: 0 });
            items
        });
        Ok(Plan { tokens, order, feedback, items, tile })
    }

    /// Work items of a pass.
    pub fn items(&self, pass: Pass) -> &[Item] {
        &self.items[pass.index()]
    }

    /// Arguments of a pass: `pointers`, completed with the scalars.
    pub fn params(&self, options: &FhaOptions, pass: Pass, pointers: AttentionParams) -> AttentionParams {
        let whole = self.tile.whole(pass);
        AttentionParams {
            heads: options.heads as u32,
            query_slots: options.query_slots() as u32,
            key_slots: options.key_slots() as u32,
            group: if options.label_mask == LabelMask::Feedback { options.heads as u32 / 2 } else { 0 },
            causal: options.causal.into(),
            masked: (options.normalization == Normalization::Masked).into(),
            scale: options.scale,
            item_warps: whole.map_or(0, |whole| whole.sharing.warps() as u32),
            capacity: whole.map_or(0, |whole| whole.capacity as u32),
            slot_share: (1u32 << 31).div_ceil(slots_of(options) as u32),
            ..pointers
        }
    }

    /// Grid and block of a pass; the grid is 0 without work.
    pub fn launch(&self, options: &FhaOptions, pass: Pass) -> Launch {
        let Some(block) = self.tile.block(pass) else {
            return Launch { grid: [0, 0], threads: 0, shared_bytes: 0 };
        };
        // y is the head: of a separate problem (PerHead), or the key head of dk and dv.
        let y = match (pass, options.pairing) {
            (Pass::DkDv, _) | (_, Pairing::PerHead) => options.heads,
            (_, Pairing::Factorized) => 1,
        };
        let x = self.items(pass).len() / self.tile.whole(pass).map_or(1, |whole| whole.items());
        Launch {
            grid: [x as u32, y as u32],
            threads: (block.warps * 32) as u32,
            shared_bytes: block.shared_bytes as u32,
        }
    }
}

impl Tile {
    /// Block of a pass over whole sequences. `None` for streamed passes, and without such
    /// sequences.
    pub fn whole(&self, pass: Pass) -> Option<Whole> {
        match pass {
            Pass::ForwardShort => self.forward_short,
            Pass::ForwardWhole(sharing) => self.forward_whole[sharing as usize],
            Pass::BackwardWhole(sharing) => self.backward_whole[sharing as usize],
            Pass::DqWhole => self.sides_whole.map(|[dq, _]| dq),
            Pass::DkDvWhole => self.sides_whole.map(|[_, dk_dv]| dk_dv),
            Pass::Forward | Pass::Dq | Pass::DkDv => None,
        }
    }

    /// Block of a pass; `None` if it has no work.
    pub fn block(&self, pass: Pass) -> Option<Block> {
        match pass {
            Pass::Forward => Some(self.forward),
            Pass::Dq => Some(self.dq),
            Pass::DkDv => Some(self.dk_dv),
            _ => self.whole(pass).map(|whole| whole.block),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(options: &FhaOptions, cu_seqlens: &[u32], label: &[u8]) -> Plan {
        Plan::new(Element::Bf16, options, cu_seqlens, label, Room::of(227 << 10)).expect("it should fit")
    }

    #[test]
    fn tokens_are_ordered_by_label_and_counted() {
        let plan = plan(&FhaOptions::new(2, 16), &[0, 5, 5, 7], &[1, 0, 1, 0, 0, 1, 1]);
        assert_eq!(plan.order, [1, 3, 4, 0, 2, 5, 6]);
        assert_eq!(plan.feedback, [3, 2, 5, 4, 4, 3, 5]);
        let whole = plan.items(Pass::ForwardShort);
        let negatives: Vec<_> = whole.iter().map(|i| (i.start, i.length, i.negatives)).collect();
        assert_eq!(negatives, [(0, 5, 3), (5, 2, 0), (0, 0, 0), (0, 0, 0)], "filled up to the block's four");
    }

    /// With six heads of width 32, 17 to 21 tokens share two warps and do not fit in one pass.
    #[test]
    fn a_batch_does_not_change_the_passes_of_a_sequence() {
        let lengths: Vec<u32> = (1..=100).collect();
        let cu: Vec<u32> = (0..=lengths.len() as u32).map(|at| at * (at + 1) / 2).collect();
        let label = vec![1; *cu.last().expect("there are sequences") as usize];
        for (heads, head_dim) in [(6, 32), (6, 16), (4, 32), (2, 64), (8, 16)] {
            for (element, limit) in
                [(Element::Bf16, 227 << 10), (Element::Bf16, 163 << 10), (Element::F32, 99 << 10)]
            {
                let options = FhaOptions::new(heads, head_dim);
                let plan = |cu: &[u32], label: &[u8]| {
                    Plan::new(element, &options, cu, label, Room::of(limit)).expect("it should fit")
                };
                let all = plan(&cu, &label);
                for &length in &lengths {
                    let alone = plan(&[0, length], &label[..length as usize]);
                    for pass in Pass::ALL {
                        let of = |plan: &Plan| plan.items(pass).iter().any(|item| item.length == length);
                        assert_eq!(
                            of(&all),
                            of(&alone),
                            "{pass:?}, {length} tokens, {options:?}, {element:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_row_and_key_belongs_to_one_block() {
        // 1000 is streamed, 300 is whole in forward only, the others are whole.
        let lengths = [0usize, 1, 300, 17, 0, 64, 65, 1000];
        let cu: Vec<u32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |n, &l| {
                *n += l as u32;
                Some(*n)
            }))
            .collect();
        let label: Vec<u8> = (0..cu[8]).map(|t| (t * t % 7 < 3) as u8).collect();
        for heads in [2, 4, 8] {
            for causal in [true, false] {
                let options =
                    FhaOptions { causal, normalization: Normalization::Masked, ..FhaOptions::new(heads, 16) };
                let plan = &plan(&options, &cu, &label);
                let slots = options.query_slots();
                let mut rows = vec![0; plan.tokens * slots];
                let mut rows_of_dq = rows.clone();
                let mut keys = vec![0; plan.tokens];
                let all =
                    |item: &Item| item.start as usize * slots..(item.start + item.length) as usize * slots;
                let some = |item: &Item, block: Block| {
                    let end = (item.first as usize + block.rows()).min(item.length as usize * slots);
                    item.start as usize * slots + item.first as usize..item.start as usize * slots + end
                };
                let whole = |pass: fn(Sharing) -> Pass| {
                    Sharing::ALL.into_iter().flat_map(move |sharing| plan.items(pass(sharing)))
                };
                let short = plan.items(Pass::ForwardShort).iter();
                short.chain(whole(Pass::ForwardWhole)).flat_map(all).for_each(|r| rows[r] += 1);
                let forward = plan.items(Pass::Forward).iter();
                forward.flat_map(|i| some(i, plan.tile.forward)).for_each(|r| rows[r] += 1);
                whole(Pass::BackwardWhole).flat_map(all).for_each(|r| {
                    rows_of_dq[r] += 1;
                    keys[r / slots] += (r % slots == 0) as i32;
                });
                plan.items(Pass::DqWhole).iter().flat_map(all).for_each(|r| rows_of_dq[r] += 1);
                let side = plan.items(Pass::DkDvWhole).iter().flat_map(all);
                side.for_each(|r| keys[r / slots] += (r % slots == 0) as i32);
                let dq = plan.items(Pass::Dq).iter();
                dq.flat_map(|i| some(i, plan.tile.dq)).for_each(|r| rows_of_dq[r] += 1);
                assert!(rows.iter().chain(&rows_of_dq).all(|&n| n == 1));
                for item in plan.items(Pass::DkDv) {
                    let label_end = if item.first < item.negatives { item.negatives } else { item.length };
                    let end = (item.first as usize + plan.tile.dk_dv.rows()).min(label_end as usize);
                    (item.first as usize..end)
                        .for_each(|c| keys[plan.order[item.start as usize + c] as usize] += 1);
                }
                assert!(keys.iter().all(|&n| n == 1));
            }
        }
    }

    #[test]
    fn the_longest_come_first() {
        let plan = plan(&FhaOptions::new(2, 16), &[0, 10, 510, 540, 940], &[0; 940]);
        let work: Vec<u32> = plan.items(Pass::Dq).iter().map(|i| (i.first + 64).min(i.length)).collect();
        assert!(work.len() > 10 && work.is_sorted_by(|a, b| a >= b), "{work:?}");
        for pass in [Pass::ForwardShort, Pass::BackwardWhole(Sharing::One)] {
            let whole = plan.items(pass);
            let work: Vec<u32> = whole.iter().map(|i| i.length).collect();
            assert_eq!(work, [30, 10, 0, 0]);
        }
        let work: Vec<u32> = plan.items(Pass::DkDv).iter().map(|i| i.length - i.first).collect();
        assert!(work.is_sorted_by(|a, b| a >= b), "{work:?}");
    }

    #[test]
    fn an_empty_batch_has_no_blocks() {
        let plan = plan(&FhaOptions::new(2, 16), &[0, 0, 0], &[]);
        for pass in Pass::ALL {
            assert_eq!(plan.launch(&FhaOptions::new(2, 16), pass).grid[0], 0);
        }
    }
}
