//! Encoder blocks, not causal, over the sequences `[candidate; tokens of a prefix]`.
//!
//! ```text
//! u = LN(x);  h = Attention(u Wq + bq, x Wk + bk, x Wv + bv) Wo + bo;  g = h + u
//! n = LN(g);  y = LN(ReLU(n W1 + b1) W2 + b2 + n)
//! ```
//!
//! In the first block the input of a token does not depend on its sequence. Its first layer norm
//! and its query, key and value are therefore made once for each event and candidate, and
//! [`candidate_attention`](super::candidate_attention) shares most of the attention. From `h`
//! on, every sequence has its own tokens; so have the blocks behind the first.

use super::candidate_attention::{CandidateAttention, CandidateSequences};
use super::stack::{Encoder, Stack, StackState};
use crate::system::{Context, Settings};
use crate::{Floats, Result, Tensors};
use dfar::device::{Activation, Dense, Lookup, Memory, Norm, Output};
use dfar::model::parameters::{self, Block, Linear, Names};

/// Blocks `NAME`, `NAME.1`, ...
pub struct CandidateStack {
    first: Block,
    rest: Option<Stack>,
    heads: usize,
    head_dim: usize,
}

/// What the backward pass reads.
pub struct CandidateState {
    /// `[events and candidates, D]`
    u: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    /// `[T, D]`
    o: Floats,
    g: Floats,
    n: Floats,
    f: Floats,
    out: Floats,
    rest: Option<StackState>,
}

impl CandidateStack {
    /// Names the parameters of the blocks.
    pub fn new(names: &mut Names, name: &str, settings: &Settings) -> Self {
        let (first, rest) = Stack::bidirectional(names, name, settings).split_first();
        Self { first, rest, heads: settings.heads, head_dim: settings.width / settings.heads }
    }

    /// Encodes the sequences of `x: [events and candidates, D]`: `[T, D]`. `cu_seqlens: [R + 1]`
    /// are the tokens of each sequence.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward(
        &self,
        cx: Context,
        x: &Floats,
        sequences: &CandidateSequences,
        cu_seqlens: &[u32],
    ) -> Result<(Floats, CandidateState)> {
        let (device, width, block) = (cx.device, cx.width, &self.first);
        let linear = |layer: &Linear, activation, x: &Floats| -> Result<Floats> {
            let mut y = device.alloc(x.len())?;
            device.linear(cx.p.linear(layer, activation), x, Output::overwrite(&mut y))?;
            Ok(y)
        };
        let mut u = device.alloc(x.len())?;
        device.layer_norm(cx.p.norm(&block.ln_in, width), x, &mut u)?;
        let q = linear(&block.q, Activation::None, &u)?;
        let k = linear(&block.k, Activation::None, x)?;
        let v = linear(&block.v, Activation::None, x)?;
        let mut o = device.alloc(sequences.len() * width)?;
        self.attention(sequences, [&q, &k, &v]).forward(&mut o);
        let mut g = linear(&block.o, Activation::None, &o)?;
        let mut residual: Floats = device.alloc(g.len())?;
        sequences.gather(width, &u, &mut residual);
        let mut n = device.alloc(g.len())?;
        device.add_layer_norm(cx.p.norm(&block.ln_ffn, width), &residual, &mut g, &mut n)?;
        let f = linear(&block.ffn1, Activation::Relu, &n)?;
        let mut out = linear(&block.ffn2, Activation::None, &f)?;
        let mut y = residual;
        device.add_layer_norm(cx.p.norm(&block.ln_out, width), &n, &mut out, &mut y)?;
        let mut state = CandidateState { u, q, k, v, o, g, n, f, out, rest: None };
        if let Some(rest) = &self.rest {
            let every = device.upload(&(0..sequences.len() as u32).collect::<Vec<_>>())?;
            let of_rest;
            (y, of_rest) = rest.forward(cx, &[Lookup { table: &y, index: &every }], cu_seqlens)?;
            state.rest = Some(of_rest);
        }
        Ok((y, state))
    }

    /// Gradient `dy: [T, D]` of the output to that of `x`. Writes those of the parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        grads: &mut Tensors,
        x: &Floats,
        sequences: &CandidateSequences,
        state: CandidateState,
        mut dy: Floats,
    ) -> Result<Floats> {
        let (device, width, block) = (cx.device, cx.width, &self.first);
        let CandidateState { u, q, k, v, o, g, n, f, out, rest } = state;
        if let (Some(stack), Some(state)) = (&self.rest, rest) {
            dy = stack.backward(cx, grads, state, dy)?;
        }
        let mut layers = Layers { cx, grads };
        let none = Activation::None;
        let mut dn = device.alloc(n.len())?;
        layers.norm(&block.ln_out, &out, &dy, Output::overwrite(&mut dn))?;
        // `dn` is the gradient of `out`, and the residual part of its own.
        let mut df = dy;
        layers.linear(&block.ffn2, none, [&f, &out], &mut dn, Output::overwrite(&mut df))?;
        layers.linear(&block.ffn1, Activation::Relu, [&n, &f], &mut df, Output::add(&mut dn))?;
        let mut dg = df;
        layers.norm(&block.ln_ffn, &g, &dn, Output::overwrite(&mut dg))?;
        let mut d_o = dn;
        layers.linear(&block.o, none, [&o, &g], &mut dg, Output::overwrite(&mut d_o))?;
        let mut of_qkv: [Floats; 3] =
            [device.alloc(q.len())?, device.alloc(q.len())?, device.alloc(q.len())?];
        self.attention(sequences, [&q, &k, &v]).backward(&d_o, of_qkv.each_mut().map(|d| &mut d[..]));
        let [mut dq, mut dk, mut dv] = of_qkv;
        let mut du: Floats = device.alloc(u.len())?;
        sequences.gather_backward(width, &dg, &mut du);
        layers.linear(&block.q, none, [&u, &q], &mut dq, Output::add(&mut du))?;
        let mut dx = device.alloc(x.len())?;
        layers.linear(&block.k, none, [x, &k], &mut dk, Output::overwrite(&mut dx))?;
        layers.linear(&block.v, none, [x, &v], &mut dv, Output::add(&mut dx))?;
        layers.norm(&block.ln_in, x, &du, Output::add(&mut dx))?;
        Ok(dx)
    }

    fn attention<'a>(
        &self,
        sequences: &'a CandidateSequences,
        qkv: [&'a [f32]; 3],
    ) -> CandidateAttention<'a> {
        CandidateAttention { heads: self.heads, head_dim: self.head_dim, sequences, qkv }
    }
}

/// Backward passes that write the gradients of their parameters.
struct Layers<'a> {
    cx: Context<'a>,
    grads: &'a mut Tensors,
}

impl Layers<'_> {
    fn linear(
        &mut self,
        layer: &Linear,
        activation: Activation,
        [x, y]: [&Floats; 2],
        dy: &mut Floats,
        dx: Output<&mut Floats>,
    ) -> Result<()> {
        let gradients = self.grads.linear_gradients(layer, dx);
        Ok(self.cx.device.linear_backward(self.cx.p.linear(layer, activation), x, y, dy, gradients)?)
    }

    fn norm(
        &mut self,
        norm: &parameters::Norm,
        x: &Floats,
        dy: &Floats,
        dx: Output<&mut Floats>,
    ) -> Result<()> {
        let gradients = self.grads.norm_gradients(norm, dx);
        Ok(self.cx.device.layer_norm_backward(self.cx.p.norm(norm, self.cx.width), x, dy, gradients)?)
    }
}
