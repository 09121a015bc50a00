//! Encoder blocks over packed sequences: those of DFAR without factorization heads, or with talking
//! heads.

use crate::ops::talking_heads::BlockHeads;
use crate::parameters::{Names, Start, numbered};
use crate::system::{Context, Settings};
use crate::{Floats, Indices, Result, Tensors};
use dfar::attention::{FhaOptions, LabelMask, Pairing};
use dfar::device::cpu::Cpu;
use dfar::device::{Attention, Lookup};
use dfar::model::block::{Attend, BlockState, Encoder, Sequences};
use dfar::model::parameters::{Block, Id};

/// Blocks `NAME`, `NAME.1`, ...
pub struct Stack {
    blocks: Vec<Block>,
    /// Mixing matrices of each block, or none.
    mix: Vec<[Id; 2]>,
    options: FhaOptions,
}

/// What the backward pass reads.
pub struct StackState {
    cu_seqlens: Vec<u32>,
    plan: <Cpu as Attention>::AttentionPlan,
    blocks: Vec<BlockState<Cpu>>,
}

impl Stack {
    /// Names the parameters of causal blocks with plain heads.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let options = FhaOptions {
            label_mask: LabelMask::None,
            pairing: Pairing::PerHead,
            ..FhaOptions::new(settings.heads, settings.width / settings.heads)
        };
        let blocks = names.blocks(name, settings.blocks, settings.width);
        Self { blocks, mix: Vec::new(), options }
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

    /// Causal blocks with talking heads: also names `mix_logits` and `mix_weights`, which start as
    /// the identity.
    pub fn talking(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let plain = Self::new(names, name, settings);
        let shape = [settings.heads; 2];
        let mix = |i: usize| {
            ["mix_logits", "mix_weights"]
                .map(|mix| names.tensor(format!("{}.{mix}", numbered(name, i)), &shape, Start::Identity))
        };
        Self { mix: (0..settings.blocks).map(mix).collect(), ..plain }
    }

    /// Encodes rows that are sums of rows of `tables`: `[N, D]`, with the state for
    /// [`Stack::backward`].
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward(
        &self,
        cx: Context,
        tables: &[Lookup<&Floats, &Indices>],
        cu_seqlens: &[u32],
    ) -> Result<(Floats, StackState)> {
        let plan = cx.device.attention_plan(&mut (), &self.options, cu_seqlens, &[])?;
        let mut state = StackState { cu_seqlens: cu_seqlens.to_vec(), plan, blocks: Vec::new() };
        let (y, blocks) = self.with_encoder(cx, &state, |encoder| encoder.forward(tables))?;
        state.blocks = blocks;
        Ok((y, state))
    }

    /// Gradient `dy: [N, D]` of the output to that of the input. Writes those of the parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        grads: &mut Tensors,
        mut state: StackState,
        dy: Floats,
    ) -> Result<Floats> {
        let blocks = std::mem::take(&mut state.blocks);
        Ok(self.with_encoder(cx, &state, |encoder| encoder.backward(grads, blocks, dy))?)
    }

    fn with_encoder<T>(&self, cx: Context, state: &StackState, run: impl FnOnce(Encoder<Cpu>) -> T) -> T {
        let StackState { cu_seqlens, plan, .. } = state;
        let FhaOptions { heads, head_dim, .. } = self.options;
        let talking = BlockHeads { cu_seqlens, heads, head_dim, mix: &self.mix, p: cx.p };
        let sequences = Sequences {
            tokens: cu_seqlens.last().map_or(0, |&end| end as usize),
            attend: if self.mix.is_empty() { Attend::Plan(plan) } else { Attend::Other(&talking) },
            // Not read without a label mask.
            tokens_by_label: [&cx.x.item, &cx.x.item],
            options: &self.options,
        };
        run(Encoder { device: cx.device, blocks: &self.blocks, p: cx.p, sequences })
    }
}
