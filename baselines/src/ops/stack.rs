//! Encoder blocks with plain heads over packed sequences: those of DFAR without factorization heads.

use crate::parameters::Names;
use crate::system::{Context, Settings};
use crate::{Floats, Indices, Result, Tensors};
use dfar::attention::{FhaOptions, LabelMask, Pairing};
use dfar::device::cpu::Cpu;
use dfar::device::{Attention, Lookup};
use dfar::model::block::{Attend, BlockState, Encoder, Sequences};
use dfar::model::parameters::Block;

type Plan = <Cpu as Attention>::AttentionPlan;

/// Blocks `NAME`, `NAME.1`, ...
pub struct Stack {
    blocks: Vec<Block>,
    options: FhaOptions,
}

/// What the backward pass reads.
pub struct StackState {
    plan: Plan,
    tokens: usize,
    blocks: Vec<BlockState<Cpu>>,
}

impl Stack {
    /// Names the parameters of causal blocks.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let options = FhaOptions {
            label_mask: LabelMask::None,
            pairing: Pairing::PerHead,
            ..FhaOptions::new(settings.heads, settings.width / settings.heads)
        };
        Self { blocks: names.blocks(name, settings.blocks, settings.width), options }
    }

    /// The same, with every token attending to all tokens of its sequence.
    pub fn bidirectional(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let causal = Self::new(names, name, settings);
        Self { options: FhaOptions { causal: false, ..causal.options }, ..causal }
    }

    /// Encodes rows that are sums of rows of `tables`: `[N, D]`, with the state for
    /// [`Stack::backward`].
    pub fn forward(
        &self,
        cx: Context,
        tables: &[Lookup<&Floats, &Indices>],
        cu_seqlens: &[u32],
    ) -> Result<(Floats, StackState)> {
        let tokens = cu_seqlens.last().map_or(0, |&end| end as usize);
        let plan = cx.device.attention_plan(&mut (), &self.options, cu_seqlens, &[])?;
        let (y, blocks) = self.encoder(cx, &plan, tokens).forward(tables)?;
        Ok((y, StackState { plan, tokens, blocks }))
    }

    /// Gradient `dy: [N, D]` of the output to that of the input. Writes those of the parameters.
    pub fn backward(
        &self,
        cx: Context,
        grads: &mut Tensors,
        state: StackState,
        dy: Floats,
    ) -> Result<Floats> {
        let StackState { plan, tokens, blocks } = state;
        Ok(self.encoder(cx, &plan, tokens).backward(grads, blocks, dy)?)
    }

    fn encoder<'a>(&'a self, cx: Context<'a>, plan: &'a Plan, tokens: usize) -> Encoder<'a, Cpu> {
        let sequences = Sequences {
            tokens,
            attend: Attend::Plan(plan),
            // Not read without a label mask.
            tokens_by_label: [&cx.x.item, &cx.x.item],
            options: &self.options,
        };
        Encoder { device: cx.device, blocks: &self.blocks, p: cx.p, sequences }
    }
}
