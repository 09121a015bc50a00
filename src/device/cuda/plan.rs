//! What the kernels need to know about a batch beyond its tensors: made once per batch, on the host.
//!
//! Tokens of a sequence are visited as keys in label order, negatives first, so that whole tiles of scores share one
//! fate (kept or not) and a query sees a prefix of each label. The work is listed longest first: on skewed lengths
//! the long sequences start at once and the short ones fill the gaps.

use super::CudaError;
use super::compile::{Define, Module};
use super::params::{AttentionParams, Item};
use super::runtime::{Kernel, Launch};
use super::tile::{Block, Element, Tile, Whole, tile};
use crate::attention::{FhaOptions, LabelMask, Normalization, Pairing};

/// Order, feedback and work of one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Tokens `N`.
    pub tokens: usize,
    /// `[N]`: the tokens of each sequence by label, negatives first, each label in order. Empty without labels.
    pub order: Vec<u32>,
    /// `[N]`: `2 * positives + label`, where `positives` counts the tokens of label 1 of the sequence up to and with
    /// this one. Empty without labels.
    pub feedback: Vec<u32>,
    /// Short sequences, which forward takes whole, several a block; the last block's filled up with items of no tokens.
    pub forward_whole: Vec<Item>,
    /// Blocks of the forward pass over the other sequences.
    pub forward: Vec<Item>,
    /// Short sequences, which backward takes whole, in the same way; it needs more room, so they may be fewer.
    pub backward_whole: Vec<Item>,
    /// Blocks of the dq pass over the other sequences.
    pub dq: Vec<Item>,
    /// Blocks of the dk and dv pass over them, once per key head.
    pub dk_dv: Vec<Item>,
    /// Sizes of the blocks.
    pub tile: Tile,
}

/// The passes of the operation, each a kernel of `attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// `o` and `lse` of short sequences.
    ForwardWhole,
    /// `o` and `lse` of the others.
    Forward,
    /// `dq`, `dk` and `dv` of short sequences.
    BackwardWhole,
    /// `dq` of the others, and what the next one needs.
    Dq,
    /// `dk` and `dv` of the others.
    DkDv,
}

impl Pass {
    /// Every one, in an order in which they can run.
    pub const ALL: [Pass; 5] = [Pass::ForwardWhole, Pass::Forward, Pass::BackwardWhole, Pass::Dq, Pass::DkDv];

    /// Those of forward, in order.
    pub const FORWARD: [Pass; 2] = [Pass::ForwardWhole, Pass::Forward];

    /// Those of backward, in order.
    pub const BACKWARD: [Pass; 3] = [Pass::BackwardWhole, Pass::Dq, Pass::DkDv];

    /// Name of the kernel.
    pub const fn entry(self) -> &'static str {
        match self {
            Pass::ForwardWhole => "attention_forward_whole",
            Pass::Forward => "attention_forward",
            Pass::BackwardWhole => "attention_backward_whole",
            Pass::Dq => "attention_dq",
            Pass::DkDv => "attention_dk_dv",
        }
    }

    /// The kernel, for tensors of this type and heads of this width.
    pub const fn kernel(self, element: Element, head_dim: usize) -> Kernel {
        Kernel { module: module(element, head_dim), entry: self.entry() }
    }
}

impl Kernel {
    /// A kernel of attention in the variant that takes so many of 8 exponentials of long 16-bit sequences as polynomials; 0: as
    /// it is. To be measured.
    #[must_use]
    pub const fn with_polynomial(self, of_8: u32) -> Kernel {
        match of_8 {
            0 => self,
            _ => Kernel { module: self.module.with("DFAR_POLYNOMIAL", Define::Number(of_8)), ..self },
        }
    }
}

/// `attention.cu` for an element type and head width.
pub const fn module(element: Element, head_dim: usize) -> Module {
    Module::new("attention.cu")
        .with("DFAR_ELEMENT", Define::Word(element.cuda_name()))
        .with("DFAR_HEAD_DIM", Define::Number(head_dim as u32))
}

impl Plan {
    /// Plans a batch for a device that gives a block `shared_limit` bytes of shared memory. `label` is not read with
    /// [`LabelMask::None`]. Arguments have passed [`FhaOptions::check`].
    ///
    /// # Errors
    /// Those of [`tile`], and [`CudaError::TooLarge`] for a batch whose rows cannot be counted in 31 bits.
    pub fn new(
        element: Element,
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
        shared_limit: usize,
    ) -> Result<Plan, CudaError> {
        let sequences =
            || cu_seqlens.windows(2).map(|w| (w[0] as usize, w[1] as usize)).filter(|(s, e)| s < e);
        let tokens = cu_seqlens.last().map_or(0, |&n| n as usize);
        let rows = tokens.saturating_mul(options.query_slots());
        if rows > i32::MAX as usize {
            return Err(CudaError::TooLarge { rows });
        }
        let labelled = options.label_mask == LabelMask::Feedback;
        let slots = match options.pairing {
            Pairing::Factorized => options.query_slots(),
            Pairing::PerHead => 1,
        };
        let lengths: Vec<usize> = sequences().map(|(start, end)| end - start).collect();
        let tile = tile(element, options, &lengths, shared_limit)?;

        let (mut order, mut feedback) = (vec![], vec![]);
        if labelled {
            order = vec![0; tokens];
            feedback = vec![0; tokens];
        }
        let (mut forward_whole, mut backward_whole) = (vec![], vec![]);
        let (mut forward, mut dq, mut dk_dv) = (vec![], vec![], vec![]);
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
            // With the number of (row, key) pairs a block meets, for the order.
            let by_rows = |items: &mut Vec<(usize, Item)>, rows: usize| {
                for first in (0..length * slots).step_by(rows) {
                    let last = ((first + rows).min(length * slots) - 1) / slots;
                    items.push((if options.causal { last + 1 } else { length }, item(first)));
                }
            };
            let is_short = |whole: Option<Whole>| whole.is_some_and(|whole| length <= whole.longest);
            if is_short(tile.forward_whole) {
                forward_whole.push((length, item(0)));
            } else {
                by_rows(&mut forward, tile.forward.rows());
            }
            if is_short(tile.backward_whole) {
                backward_whole.push((length, item(0)));
                continue;
            }
            by_rows(&mut dq, tile.dq.rows());
            for (from, to) in [(0, negatives), (negatives, length)] {
                for first in (from..to).step_by(tile.dk_dv.rows()) {
                    let position = if labelled { order[start + first] as usize - start } else { first };
                    dk_dv.push((if options.causal { length - position } else { length }, item(first)));
                }
            }
        }
        let longest_first = |mut items: Vec<(usize, Item)>| {
            // Stable: equal work stays in the order of memory.
            items.sort_by_key(|&(work, _)| std::cmp::Reverse(work));
            items.into_iter().map(|(_, item)| item).collect::<Vec<Item>>()
        };
        let filled_up = |items: Vec<(usize, Item)>, whole: Option<Whole>| {
            let mut items = longest_first(items);
            let blocks = whole.map_or(0, |whole| items.len().next_multiple_of(whole.items()));
            items.resize(blocks, Item { start: 0, length: 0, negatives: 0, first: 0 });
            items
        };
        Ok(Plan {
            tokens,
            order,
            feedback,
            forward_whole: filled_up(forward_whole, tile.forward_whole),
            forward: longest_first(forward),
            backward_whole: filled_up(backward_whole, tile.backward_whole),
            dq: longest_first(dq),
            dk_dv: longest_first(dk_dv),
            tile,
        })
    }

    /// Items of a pass.
    pub fn items(&self, pass: Pass) -> &[Item] {
        match pass {
            Pass::ForwardWhole => &self.forward_whole,
            Pass::Forward => &self.forward,
            Pass::BackwardWhole => &self.backward_whole,
            Pass::Dq => &self.dq,
            Pass::DkDv => &self.dk_dv,
        }
    }

    /// Arguments of a pass: these pointers, and all else.
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
            item_warps: whole.map_or(0, |whole| whole.item_warps as u32),
            capacity: whole.map_or(0, |whole| whole.capacity as u32),
            ..pointers
        }
    }

    /// Grid and block of a pass.
    pub fn launch(&self, options: &FhaOptions, pass: Pass) -> Launch {
        let Some(block) = self.tile.block(pass) else {
            return Launch { grid: [0, 0], threads: 0, shared_bytes: 0 };
        };
        // With separate problems per head, they lie along y; so do the key heads of dk and dv.
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
    /// How a pass over whole sequences is cut; `None` for the others, and when no sequence is short enough.
    pub fn whole(&self, pass: Pass) -> Option<Whole> {
        match pass {
            Pass::ForwardWhole => self.forward_whole,
            Pass::BackwardWhole => self.backward_whole,
            Pass::Forward | Pass::Dq | Pass::DkDv => None,
        }
    }

    /// The block of a pass; `None` where it has no work.
    pub fn block(&self, pass: Pass) -> Option<Block> {
        match pass {
            Pass::ForwardWhole | Pass::BackwardWhole => self.whole(pass).map(|whole| whole.block),
            Pass::Forward => Some(self.forward),
            Pass::Dq => Some(self.dq),
            Pass::DkDv => Some(self.dk_dv),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(options: &FhaOptions, cu_seqlens: &[u32], label: &[u8]) -> Plan {
        Plan::new(Element::Bf16, options, cu_seqlens, label, 227 << 10).expect("it should fit")
    }

    #[test]
    fn tokens_are_ordered_by_label_and_counted() {
        let plan = plan(&FhaOptions::new(2, 16), &[0, 5, 5, 7], &[1, 0, 1, 0, 0, 1, 1]);
        assert_eq!(plan.order, [1, 3, 4, 0, 2, 5, 6]);
        assert_eq!(plan.feedback, [3, 2, 5, 4, 4, 3, 5]);
        let negatives: Vec<_> = plan.forward_whole.iter().map(|i| (i.start, i.length, i.negatives)).collect();
        assert_eq!(negatives, [(0, 5, 3), (5, 2, 0), (0, 0, 0), (0, 0, 0)], "filled up to the block's four");
    }

    #[test]
    fn every_row_and_key_belongs_to_one_block() {
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
                let plan = plan(&options, &cu, &label);
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
                plan.forward_whole.iter().flat_map(all).for_each(|r| rows[r] += 1);
                plan.forward.iter().flat_map(|i| some(i, plan.tile.forward)).for_each(|r| rows[r] += 1);
                plan.backward_whole.iter().flat_map(all).for_each(|r| {
                    rows_of_dq[r] += 1;
                    keys[r / slots] += (r % slots == 0) as i32;
                });
                plan.dq.iter().flat_map(|i| some(i, plan.tile.dq)).for_each(|r| rows_of_dq[r] += 1);
                assert!(rows.iter().chain(&rows_of_dq).all(|&n| n == 1));
                for item in &plan.dk_dv {
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
        let plan = plan(&FhaOptions::new(2, 16), &[0, 10, 210, 240], &[0; 240]);
        let work: Vec<u32> = plan.dq.iter().map(|i| (i.first + 64).min(i.length)).collect();
        assert!(work.is_sorted_by(|a, b| a >= b), "{work:?}");
        for whole in [&plan.forward_whole, &plan.backward_whole] {
            let work: Vec<u32> = whole.iter().map(|i| i.length).collect();
            assert!(work.len() >= 2 && work.is_sorted_by(|a, b| a >= b), "{work:?}");
        }
        let work: Vec<u32> = plan.dk_dv.iter().map(|i| i.length - i.first).collect();
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
