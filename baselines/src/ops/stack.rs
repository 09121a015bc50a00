//! Encoder blocks over packed sequences: those of DFAR without factorization heads.

use crate::system::{Context, Settings};
use crate::{Floats, Indices, Result, Tensors};
use dfar::attention::{FhaOptions, LabelMask, Pairing};
use dfar::device::cpu::Cpu;
use dfar::device::{Device, Lookup};
use dfar::model::block::{self, Attend, BlockState};
use dfar::model::parameters::{Block, Names};

/// An encoder of the events of a history, which sees no future.
pub trait Encoder<D: Device>: Send + Sync {
    /// What the backward pass reads.
    type State;

    /// Encodes rows that are sums of rows of `tables`: `[N, D]`, with the state for
    /// [`Encoder::backward`].
    ///
    /// # Errors
    /// Failures of the device.
    fn forward(
        &self,
        cx: Context<D>,
        tables: &[Lookup<&Floats<D>, &Indices<D>>],
        cu_seqlens: &[u32],
    ) -> Result<(Floats<D>, Self::State)>;

    /// Gradient `dy: [N, D]` of the output to that of the input. Writes those of the parameters.
    ///
    /// # Errors
    /// Failures of the device.
    fn backward(
        &self,
        cx: Context<D>,
        grads: &mut Tensors<D>,
        state: Self::State,
        dy: Floats<D>,
    ) -> Result<Floats<D>>;
}

/// Blocks `NAME`, `NAME.1`, ... with plain heads.
pub struct Stack {
    blocks: Vec<Block>,
    options: FhaOptions,
}

/// What the backward pass reads.
pub struct StackState<D: Device = Cpu> {
    tokens: usize,
    plan: D::AttentionPlan,
    blocks: Vec<BlockState<D>>,
}

impl Stack {
    /// Names the parameters of causal blocks.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let options = FhaOptions {
            label_mask: LabelMask::None,
            pairing: Pairing::PerHead,
            ..FhaOptions::new(settings.heads, settings.width / settings.heads)
        };
        let blocks = names.blocks(name, settings.blocks, settings.width, 1);
        Self { blocks, options }
    }

    /// The same, with every token attending to all tokens of its sequence.
    pub fn bidirectional(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let causal = Self::new(names, name, settings);
        Self { options: FhaOptions { causal: false, ..causal.options }, ..causal }
    }

    /// The first block, and a stack of the others if there are any.
    pub fn split_first(mut self) -> (Block, Option<Self>) {
        let first = self.blocks.remove(0);
        (first, (!self.blocks.is_empty()).then_some(self))
    }

    /// Options of the attention.
    pub(super) fn options(&self) -> &FhaOptions {
        &self.options
    }

    /// The blocks over `tokens` tokens, with an attention.
    pub(super) fn encoder<'a, D: Device>(
        &'a self,
        cx: Context<'a, D>,
        tokens: usize,
        attend: Attend<'a, D>,
    ) -> block::Encoder<'a, D> {
        // The labels are not read without a label mask.
        let tokens_by_label = [&cx.x.item, &cx.x.item];
        let sequences = block::Sequences { tokens, attend, tokens_by_label, options: &self.options };
        block::Encoder { device: cx.device, blocks: &self.blocks, p: cx.p, sequences }
    }
}

/// Number of tokens of packed sequences.
pub(super) fn tokens(cu_seqlens: &[u32]) -> usize {
    cu_seqlens.last().map_or(0, |&end| end as usize)
}

impl<D: Device> Encoder<D> for Stack {
    type State = StackState<D>;

    fn forward(
        &self,
        cx: Context<D>,
        tables: &[Lookup<&Floats<D>, &Indices<D>>],
        cu_seqlens: &[u32],
    ) -> Result<(Floats<D>, StackState<D>)> {
        let plan = |staging: &mut _| Ok(cx.device.attention_plan(staging, &self.options, cu_seqlens, &[])?);
        let (tokens, plan) = (tokens(cu_seqlens), cx.staged(plan)?);
        let (y, blocks) = self.encoder(cx, tokens, Attend::Plan(&plan)).forward(tables)?;
        Ok((y, StackState { tokens, plan, blocks }))
    }

    fn backward(
        &self,
        cx: Context<D>,
        grads: &mut Tensors<D>,
        StackState { tokens, plan, blocks }: StackState<D>,
        dy: Floats<D>,
    ) -> Result<Floats<D>> {
        Ok(self.encoder(cx, tokens, Attend::Plan(&plan)).backward(grads, blocks, dy)?)
    }
}
