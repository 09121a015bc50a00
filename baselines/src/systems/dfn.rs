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
//! The candidate inside the blocks leaves little to share: each (prefix, candidate) has an encoding
//! of its own, whose time and memory are linear in the length of the prefix.
//! [`candidate_stack`](crate::ops::candidate_stack) says what the candidates of a prefix have in
//! common.

use crate::ops::candidate_attention::CandidateSequences;
use crate::ops::candidate_stack::{CandidateStack, CandidateState};
use crate::ops::lists::scatter_sum;
use crate::ops::target::{InputGradients, Target};
use crate::system::{Backward, Context, Encoded, Gradients, Part, Per, Settings, System};
use crate::{Floats, Indices, Result};
use dfar::batch::{Batch, LabelSplit};
use dfar::device::cpu::elementwise::add_assign;
use dfar::device::{
    DeviceError, Embedding, Lookup, Memory, PrefixMean, Prefixes, Segments, TargetIndex, TargetInputs,
};
use dfar::model::parameters::Names;

/// DFN.
pub struct Dfn {
    positive: CandidateStack,
    negative: CandidateStack,
    cross: Target,
}

impl Dfn {
    /// Names the parameters `positive.*`, `negative.*`, `cross.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        Self {
            positive: CandidateStack::new(names, "positive", settings),
            negative: CandidateStack::new(names, "negative", settings),
            cross: Target::new(names, "cross", settings),
        }
    }
}

/// For each row, the candidate and the tokens of one label in its prefix, as a sequence.
struct Side {
    /// `[N_f]` the tokens of the label.
    token: Indices,
    /// `[N_f + C, D]` these tokens, and the candidates.
    x: Floats,
    sequences: CandidateSequences,
    /// `[R + 1]`
    cu_seqlens: Indices,
    /// `[R]`
    length: Indices,
    /// `[R + 1]` 0, 1, 2, ..: each sequence has one mean.
    one_each: Indices,
}

impl Side {
    fn new(cx: Context, split: &LabelSplit, z: &Floats, e: &Floats) -> Result<Self> {
        let (device, batch) = (cx.device, &cx.x.batch);
        let token = device.upload(&split.token)?;
        let mut own = device.alloc(token.len() * cx.width)?;
        device.gather_sum(cx.width, &[Lookup { table: z, index: &token }], &mut own)?;
        let mut sequences = CandidateSequences::default();
        for (b, groups) in batch.group_offsets.windows(2).enumerate() {
            let start = split.cu_seqlens[b] as usize;
            for group in groups[0] as usize..groups[1] as usize {
                sequences.tokens.push(start..start + split.count[group] as usize);
                sequences.rows.push(batch.row_offsets[group] as usize..batch.row_offsets[group + 1] as usize);
            }
        }
        sequences.candidate = batch.row_pair.iter().map(|&pair| token.len() + pair as usize).collect();
        let length: Vec<u32> = batch.row_group.iter().map(|&g| 1 + split.count[g as usize]).collect();
        let mut cu_seqlens = vec![0u32];
        for length in &length {
            let end = cu_seqlens[cu_seqlens.len() - 1].checked_add(*length);
            cu_seqlens.push(end.ok_or(DeviceError::Memory { bytes: usize::MAX })?);
        }
        let one_each: Vec<u32> = (0..=batch.rows() as u32).collect();
        Ok(Self {
            x: device.upload(&[&own[..], e].concat())?,
            token,
            sequences,
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
            recency: None,
        }
    }

    /// `[R, D]` means of the encoded sequences.
    fn encode(&self, cx: Context, stack: &CandidateStack) -> Result<(Floats, CandidateState)> {
        let (y, state) = stack.forward(cx, &self.x, &self.sequences, &self.cu_seqlens)?;
        let mut mean = cx.device.alloc(cx.x.batch.rows() * cx.width)?;
        cx.device.prefix_mean(cx.width, self.means(), &y, &mut mean)?;
        Ok((mean, state))
    }

    /// Adds the gradients of tokens and candidates.
    fn backward(
        &self,
        cx: Context,
        stack: &CandidateStack,
        state: CandidateState,
        d_mean: &Floats,
        grads: &mut Gradients,
    ) -> Result<()> {
        let mut dy = cx.device.alloc(self.sequences.len() * cx.width)?;
        cx.device.prefix_mean_backward(cx.width, self.means(), d_mean, &mut dy)?;
        let dx = stack.backward(cx, &mut grads.dense, &self.x, &self.sequences, state, dy)?;
        let (of_tokens, of_candidates) = dx.split_at(self.token.len() * cx.width);
        scatter_sum(cx.width, of_tokens, &self.token, &mut grads.tokens);
        add_assign(of_candidates, &mut grads.candidates);
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
        let e = cx.candidates()?;
        let (of_liked, of_skipped) = (Side::new(cx, liked, &z, &e)?, Side::new(cx, skipped, &z, &e)?);
        let (f_pos, positive_state) = of_liked.encode(cx, &self.positive)?;
        let (f_neg, negative_state) = of_skipped.encode(cx, &self.negative)?;
        let z_skipped = device.upload(&of_skipped.x[..skipped.token.len() * width])?;
        let index = CrossIndex::new(batch, skipped);
        let inputs = TargetInputs { s: &z_skipped, a: &z_skipped, r: &f_pos };
        let (f_skip, pass) = self.cross.forward(cx, index.target_index(skipped), inputs)?;
        let part = |values| Part { values, width, per: Per::Row };
        let parts = vec![part(f_pos), part(f_neg), part(f_skip)];
        let backward: Backward = Box::new(move |parts, mut d_parts, grads| {
            let skip = [&parts[2].values, &d_parts[2]];
            let inputs = TargetInputs { s: &z_skipped, a: &z_skipped, r: &parts[0].values };
            let InputGradients { mut ds, da, dr } =
                self.cross.backward(cx, inputs, &pass, skip, &mut grads.dense)?;
            add_assign(&da, &mut ds);
            device.scatter_add(width, &ds, &of_skipped.token, &mut grads.tokens)?;
            add_assign(&dr, &mut d_parts[0]);
            let sides = [
                (of_liked, &self.positive, positive_state, &d_parts[0]),
                (of_skipped, &self.negative, negative_state, &d_parts[1]),
            ];
            for (side, stack, state, d_mean) in sides {
                side.backward(cx, stack, state, d_mean, grads)?;
            }
            Ok(0.0)
        });
        Ok(Encoded { parts, backward })
    }
}
