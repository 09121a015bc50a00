//! What the kernels need to know about a batch beyond its tensors: made once per batch, on the host.
//!
//! Tokens of a sequence are visited as keys in label order, negatives first, so that whole tiles of scores share one
//! fate (kept or not) and a query sees a prefix of each label. The work is listed longest first: on skewed lengths
//! the long sequences start at once and the short ones fill the gaps.

use super::CudaError;
use super::compile::{Define, Module};
use super::params::{AttentionParams, Item};
use super::runtime::{Kernel, Launch};
use super::tile::{DELTA_THREADS, Element, Tile, is_short, tile};
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
    pub whole: Vec<Item>,
    /// Blocks of the forward pass over the other sequences.
    pub forward: Vec<Item>,
    /// Blocks of the dq pass.
    pub dq: Vec<Item>,
    /// Blocks of the dk and dv pass, once per key head.
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
    /// `delta`, which both others of backward need.
    Delta,
    /// `dq`.
    Dq,
    /// `dk` and `dv`.
    DkDv,
}

impl Pass {
    /// Every one, in an order in which they can run.
    pub const ALL: [Pass; 5] = [Pass::ForwardWhole, Pass::Forward, Pass::Delta, Pass::Dq, Pass::DkDv];

    /// Name of the kernel.
    pub const fn entry(self) -> &'static str {
        match self {
            Pass::ForwardWhole => "attention_forward_whole",
            Pass::Forward => "attention_forward",
            Pass::Delta => "attention_delta",
            Pass::Dq => "attention_dq",
            Pass::DkDv => "attention_dk_dv",
        }
    }

    /// The kernel, for tensors of this type and heads of this width.
    pub const fn kernel(self, element: Element, head_dim: usize) -> Kernel {
        Kernel { module: module(element, head_dim), entry: self.entry() }
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
        let longest = sequences().map(|(start, end)| end - start).max().unwrap_or(0);
        let labelled = options.label_mask == LabelMask::Feedback;
        let slots = match options.pairing {
            Pairing::Factorized => options.query_slots(),
            Pairing::PerHead => 1,
        };
        let lengths = sequences().map(|(start, end)| end - start);
        let longest_short = lengths.filter(|&length| is_short(length, slots)).max().unwrap_or(0);
        let tile = tile(element, options, longest, longest_short, shared_limit)?;

        let (mut order, mut feedback) = (vec![], vec![]);
        if labelled {
            order = vec![0; tokens];
            feedback = vec![0; tokens];
        }
        let (mut whole, mut forward, mut dq, mut dk_dv) = (vec![], vec![], vec![], vec![]);
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
            let mut by_rows = vec![(&mut dq, tile.dq)];
            if tile.whole.is_some() && is_short(length, slots) {
                whole.push((length, item(0)));
            } else {
                by_rows.push((&mut forward, tile.forward));
            }
            for (items, block) in by_rows {
                for first in (0..length * slots).step_by(block.rows()) {
                    let last = ((first + block.rows()).min(length * slots) - 1) / slots;
                    items.push((if options.causal { last + 1 } else { length }, item(first)));
                }
            }
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
        let mut whole = longest_first(whole);
        if let Some(tile) = tile.whole {
            let blocks = whole.len().div_ceil(tile.items());
            whole.resize(blocks * tile.items(), Item { start: 0, length: 0, negatives: 0, first: 0 });
        }
        Ok(Plan {
            tokens,
            order,
            feedback,
            whole,
            forward: longest_first(forward),
            dq: longest_first(dq),
            dk_dv: longest_first(dk_dv),
            tile,
        })
    }

    /// Items of a pass; the delta pass has none.
    pub fn items(&self, pass: Pass) -> &[Item] {
        match pass {
            Pass::ForwardWhole => &self.whole,
            Pass::Forward => &self.forward,
            Pass::Delta => &[],
            Pass::Dq => &self.dq,
            Pass::DkDv => &self.dk_dv,
        }
    }

    /// Arguments that are no pointers; those are null.
    pub fn params(&self, options: &FhaOptions) -> AttentionParams {
        AttentionParams {
            heads: options.heads as u32,
            query_slots: options.query_slots() as u32,
            key_slots: options.key_slots() as u32,
            group: if options.label_mask == LabelMask::Feedback { options.heads as u32 / 2 } else { 0 },
            causal: options.causal.into(),
            masked: (options.normalization == Normalization::Masked).into(),
            scale: options.scale,
            rows: (self.tokens * options.query_slots()) as u32,
            item_warps: self.tile.whole.map_or(0, |whole| whole.item_warps as u32),
            capacity: self.tile.whole.map_or(0, |whole| whole.capacity as u32),
            ..AttentionParams::default()
        }
    }

    /// Grid and block of a pass.
    pub fn launch(&self, options: &FhaOptions, pass: Pass) -> Launch {
        let rows = self.tokens * options.query_slots();
        // With separate problems per head, they lie along y; so do the key heads of dk and dv.
        let separate = match options.pairing {
            Pairing::Factorized => 1,
            Pairing::PerHead => options.heads,
        };
        let (x, y, threads, shared_bytes) = match pass {
            Pass::ForwardWhole => self.tile.whole.map_or((0, 0, 0, 0), |whole| {
                (self.whole.len() / whole.items(), separate, whole.block.warps * 32, whole.block.shared_bytes)
            }),
            Pass::Forward => {
                (self.forward.len(), separate, self.tile.forward.warps * 32, self.tile.forward.shared_bytes)
            }
            Pass::Delta => (rows.div_ceil(DELTA_THREADS / 4), 1, DELTA_THREADS, 0),
            Pass::Dq => (self.dq.len(), separate, self.tile.dq.warps * 32, self.tile.dq.shared_bytes),
            Pass::DkDv => {
                (self.dk_dv.len(), options.heads, self.tile.dk_dv.warps * 32, self.tile.dk_dv.shared_bytes)
            }
        };
        Launch { grid: [x as u32, y as u32], threads: threads as u32, shared_bytes: shared_bytes as u32 }
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
        let negatives: Vec<_> = plan.whole.iter().map(|i| (i.start, i.length, i.negatives)).collect();
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
                for item in plan.whole.iter().filter(|item| item.length > 0) {
                    (0..item.length as usize * slots)
                        .for_each(|r| rows[item.start as usize * slots + r] += 1);
                }
                for item in &plan.forward {
                    let end =
                        (item.first as usize + plan.tile.forward.rows()).min(item.length as usize * slots);
                    (item.first as usize..end).for_each(|r| rows[item.start as usize * slots + r] += 1);
                }
                assert!(rows.iter().all(|&n| n == 1));
                let mut keys = vec![0; plan.tokens];
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
        let work: Vec<u32> = plan.whole.iter().map(|i| i.length).collect();
        assert!(work.is_sorted_by(|a, b| a >= b), "{work:?}");
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
