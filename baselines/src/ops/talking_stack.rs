//! Encoder blocks with talking heads.

use super::stack::{Encoder, Stack, tokens};
use super::talking_heads::{TalkingGradients, TalkingHeads};
use crate::system::{Context, Settings};
use crate::{Floats, Indices, Result, Tensors};
use dfar::attention::FhaOptions;
use dfar::device::cpu::Cpu;
use dfar::device::{DeviceError, Lookup, Qkv, QkvGradients, SoftmaxState};
use dfar::model::block::{Attend, BlockState, Heads};
use dfar::model::parameters::{Id, Initial, Names, numbered};

/// The blocks of a [`Stack`], with `mix_logits` and `mix_weights` in each, which start as the
/// identity.
pub struct TalkingStack {
    blocks: Stack,
    mix: Vec<[Id; 2]>,
}

/// What the backward pass reads.
pub struct TalkingState {
    cu_seqlens: Vec<u32>,
    blocks: Vec<BlockState<Cpu>>,
}

impl TalkingStack {
    /// Names the parameters.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let blocks = Stack::new(names, name, settings);
        let shape = [settings.heads; 2];
        let mix = |i: usize| {
            ["mix_logits", "mix_weights"]
                .map(|mix| names.tensor(format!("{}.{mix}", numbered(name, i)), &shape, Initial::Identity))
        };
        Self { blocks, mix: (0..settings.blocks).map(mix).collect() }
    }
}

impl Encoder<Cpu> for TalkingStack {
    type State = TalkingState;

    fn forward(
        &self,
        cx: Context,
        tables: &[Lookup<&Floats, &Indices>],
        cu_seqlens: &[u32],
    ) -> Result<(Floats, TalkingState)> {
        let heads = BlockHeads { stack: self, p: cx.p, cu_seqlens };
        let encoder = self.blocks.encoder(cx, tokens(cu_seqlens), Attend::Other(&heads));
        let (y, blocks) = encoder.forward(tables)?;
        Ok((y, TalkingState { cu_seqlens: cu_seqlens.to_vec(), blocks }))
    }

    fn backward(
        &self,
        cx: Context,
        grads: &mut Tensors,
        TalkingState { cu_seqlens, blocks }: TalkingState,
        dy: Floats,
    ) -> Result<Floats> {
        let heads = BlockHeads { stack: self, p: cx.p, cu_seqlens: &cu_seqlens };
        let encoder = self.blocks.encoder(cx, tokens(&cu_seqlens), Attend::Other(&heads));
        Ok(encoder.backward(grads, blocks, dy)?)
    }
}

/// The attention of the blocks over packed sequences.
struct BlockHeads<'a> {
    stack: &'a TalkingStack,
    p: &'a Tensors,
    cu_seqlens: &'a [u32],
}

impl BlockHeads<'_> {
    fn of(&self, layer: usize) -> TalkingHeads<'_> {
        let Self { stack, p, cu_seqlens } = *self;
        let [logits, weights] = stack.mix[layer];
        let &FhaOptions { heads, head_dim, .. } = stack.blocks.options();
        TalkingHeads { heads, head_dim, cu_seqlens, mix_logits: &p[logits], mix_weights: &p[weights] }
    }
}

impl Heads<Cpu> for BlockHeads<'_> {
    fn forward(
        &self,
        layer: usize,
        Qkv { q, k, v }: Qkv<&Floats>,
        SoftmaxState { o, lse }: SoftmaxState<&mut Floats>,
    ) -> std::result::Result<(), DeviceError> {
        self.of(layer).forward(Qkv { q: &q[..], k: &k[..], v: &v[..] }, o, lse);
        Ok(())
    }

    fn backward(
        &self,
        layer: usize,
        grads: &mut Tensors,
        Qkv { q, k, v }: Qkv<&Floats>,
        SoftmaxState { lse, .. }: SoftmaxState<&Floats>,
        d_o: &Floats,
        QkvGradients { dq, dk, dv }: QkvGradients<&mut Floats>,
    ) -> std::result::Result<(), DeviceError> {
        let [d_mix_logits, d_mix_weights] = grads.several(self.stack.mix[layer]);
        let gradients = TalkingGradients { dq, dk, dv, d_mix_logits, d_mix_weights };
        self.of(layer).backward(Qkv { q: &q[..], k: &k[..], v: &v[..] }, lse, d_o, gradients);
        Ok(())
    }
}
