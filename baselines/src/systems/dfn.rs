//! DFN (Xie et al., IJCAI 2020), its feedback interaction without wide, FM and deep parts:
//!
//! ```text
//! z_t    = item[x_t] + position[t]                     t counted in the whole prefix
//! f_pos  = mean of Block_pos([e; z_t with y_t = 1])    not causal; the candidate is the first token
//! f_neg  = mean of Block_neg([e; z_t with y_t = 0])    means over 1 + n tokens
//! f_skip = sum_t w_t z_t,  w = softmax over t with y_t = 0 of MLP([z_t, f_pos, z_t - f_pos, z_t * f_pos])
//! parts  = [e, f_pos, f_neg, f_skip]
//! ```
//!
//! The candidate inside the blocks leaves nothing to share: each (prefix, candidate) is encoded on its
//! own. Time and memory are those of as many histories as there are rows.

use crate::ops::lists::{add, scatter_sum};
use crate::ops::stack::{Stack, StackState};
use crate::ops::target::{InputGradients, Target};
use crate::parameters::Names;
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use crate::{Floats, Indices, Result, Tensors};
use dfar::batch::{Batch, LabelSplit};
use dfar::device::{Embedding, Lookup, Memory, PrefixMean, Prefixes, Segments, TargetIndex, TargetInputs};

/// DFN.
pub struct Dfn {
    positive: Stack,
    negative: Stack,
    cross: Target,
}

impl Dfn {
    /// Names the parameters `positive.*`, `negative.*`, `cross.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        Self {
            positive: Stack::bidirectional(names, "positive", settings),
            negative: Stack::bidirectional(names, "negative", settings),
            cross: Target::new(names, "cross", settings),
        }
    }
}

/// For each row, the candidate and the tokens of one label in its prefix, as a sequence.
struct RowSequences {
    /// Rows of `[z; e]`.
    index: Indices,
    /// `[R + 1]`
    cu_seqlens: Indices,
    /// `[R]`
    length: Indices,
    /// `[R + 1]` 0, 1, 2, ..: each sequence has one mean.
    one_each: Indices,
}

impl RowSequences {
    fn new(cx: Context, split: &LabelSplit) -> Result<Self> {
        let batch = &cx.x.batch;
        let (mut index, mut cu_seqlens) = (Vec::new(), vec![0]);
        let mut length = Vec::with_capacity(batch.rows());
        for (b, groups) in batch.group_offsets.windows(2).enumerate() {
            let tokens = &split.token[split.cu_seqlens[b] as usize..];
            for group in groups[0] as usize..groups[1] as usize {
                for row in batch.row_offsets[group]..batch.row_offsets[group + 1] {
                    index.push(batch.tokens() as u32 + batch.row_pair[row as usize]);
                    index.extend(&tokens[..split.count[group] as usize]);
                    cu_seqlens.push(index.len() as u32);
                    length.push(1 + split.count[group]);
                }
            }
        }
        let one_each: Vec<u32> = (0..=batch.rows() as u32).collect();
        let device = cx.device;
        Ok(Self {
            index: device.upload(&index)?,
            cu_seqlens: device.upload(&cu_seqlens)?,
            length: device.upload(&length)?,
            one_each: device.upload(&one_each)?,
        })
    }

    fn means(&self) -> Prefixes<&Indices> {
        Prefixes {
            cu_seqlens: &self.cu_seqlens,
            group_offsets: &self.one_each,
            count: &self.length,
            divisor: &self.length,
        }
    }

    /// `[R, D]` means of the encoded sequences.
    fn encode(&self, cx: Context, stack: &Stack, z_and_e: &Floats) -> Result<(Floats, StackState)> {
        let rows = [Lookup { table: z_and_e, index: &self.index }];
        let (y, state) = stack.forward(cx, &rows, &self.cu_seqlens)?;
        let mut mean = cx.device.alloc(cx.x.batch.rows() * cx.width)?;
        cx.device.prefix_mean(cx.width, self.means(), &y, &mut mean)?;
        Ok((mean, state))
    }

    /// Adds the gradient of `[z; e]`.
    fn backward(
        &self,
        cx: Context,
        stack: &Stack,
        state: StackState,
        d_mean: &Floats,
        grads: &mut Tensors,
        d_z_and_e: &mut Floats,
    ) -> Result<()> {
        let mut dy = cx.device.alloc(self.index.len() * cx.width)?;
        cx.device.prefix_mean_backward(cx.width, self.means(), d_mean, &mut dy)?;
        let dx = stack.backward(cx, grads, state, dy)?;
        scatter_sum(cx.width, &dx, &self.index, d_z_and_e);
        Ok(())
    }
}

/// Every row is a pair of its own: what it attends with, `f_pos`, is its own too.
struct CrossIndex {
    pair_offsets: Vec<u32>,
    score_offsets: Vec<u32>,
    row_length: Vec<u32>,
    /// 0, 1, 2, ..
    counting: Vec<u32>,
}

impl CrossIndex {
    fn new(batch: &Batch, skipped: &LabelSplit) -> Self {
        let row_length: Vec<u32> = batch.row_group.iter().map(|&g| skipped.count[g as usize]).collect();
        let mut score_offsets = vec![0];
        score_offsets.extend(row_length.iter().scan(0, |end, &length| {
            *end += length;
            Some(*end)
        }));
        let first_row = |&group: &u32| batch.row_offsets[group as usize];
        Self {
            pair_offsets: batch.group_offsets.iter().map(first_row).collect(),
            score_offsets,
            row_length,
            counting: (0..=batch.rows() as u32).collect(),
        }
    }

    fn target_index<'a>(&'a self, skipped: &'a LabelSplit) -> TargetIndex<&'a [u32]> {
        let rows = self.row_length.len();
        TargetIndex {
            cu_seqlens: &skipped.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.counting[..], members: &self.counting[..rows] },
            row_length: &self.row_length,
        }
    }
}

impl System for Dfn {
    fn encode<'a>(&'a self, cx: Context<'a>) -> Result<Encoded<'a>> {
        let (device, batch, width) = (cx.device, &cx.x.batch, cx.width);
        let [skipped, liked] = &batch.split;
        let z = cx.events()?;
        let z_and_e: Floats = device.upload(&[&z[..], &cx.candidates()?].concat())?;
        let (of_liked, of_skipped) = (RowSequences::new(cx, liked)?, RowSequences::new(cx, skipped)?);
        let (f_pos, positive_state) = of_liked.encode(cx, &self.positive, &z_and_e)?;
        let (f_neg, negative_state) = of_skipped.encode(cx, &self.negative, &z_and_e)?;
        let skipped_token = device.upload(&skipped.token)?;
        let mut z_skipped: Floats = device.alloc(skipped.token.len() * width)?;
        device.gather_sum(width, &[Lookup { table: &z, index: &skipped_token }], &mut z_skipped)?;
        let index = CrossIndex::new(batch, skipped);
        let inputs = TargetInputs { s: &z_skipped, a: &z_skipped, r: &f_pos };
        let pass = self.cross.forward(cx, index.target_index(skipped), inputs)?;
        let f_skip = device.upload(&pass.att)?;
        let part = |values| Part { values, width, per: Per::Row };
        let parts = vec![part(f_pos), part(f_neg), part(f_skip)];
        let backward: Backward = Box::new(move |parts, mut d_parts, grads| {
            let inputs = TargetInputs { s: &z_skipped, a: &z_skipped, r: &parts[0].values };
            let InputGradients { mut ds, da, dr } =
                self.cross.backward(cx, inputs, &pass, &d_parts[2], &mut grads.dense)?;
            add(&da, &mut ds);
            device.scatter_add(width, &ds, &skipped_token, &mut grads.tokens)?;
            add(&dr, &mut d_parts[0]);
            let mut d_z_and_e: Floats = device.zeros(z_and_e.len())?;
            let sides = [
                (of_liked, &self.positive, positive_state, &d_parts[0]),
                (of_skipped, &self.negative, negative_state, &d_parts[1]),
            ];
            for (rows, stack, state, d_mean) in sides {
                rows.backward(cx, stack, state, d_mean, &mut grads.dense, &mut d_z_and_e)?;
            }
            let (d_z, d_e) = d_z_and_e.split_at(grads.tokens.len());
            add(d_z, &mut grads.tokens);
            add(d_e, &mut grads.candidates);
            Ok(0.0)
        });
        Ok(Encoded { parts, backward })
    }
}
