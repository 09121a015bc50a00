//! One encoder block:
//!
//! ```text
//! u = LN(x);  h = FHA(u Wq + bq, x Wk + bk, x Wv + bv) Wo + bo;  g = h + u
//! n = LN(g);  out = ReLU(n W1 + b1) W2 + b2 + n;  y = LN(out)
//! ```

use super::parameters::{Block, Linear, Norm};
use super::tensors::Tensors;
use crate::attention::{FhaOptions, LabelMask};
use crate::device::{
    Activation, Buffer, Device, DeviceError, Floats, Indices, LabelLinearGradients, Lookup, Output, Qkv,
    QkvGradients, SoftmaxState,
};

/// An attention computed outside [`Device`], as the compared systems need: from queries, keys and
/// values to heads. `layer` counts the blocks of the stack from 0.
pub trait Heads<D: Device> {
    fn forward(
        &self,
        layer: usize,
        qkv: Qkv<&Floats<D>>,
        state: SoftmaxState<&mut Floats<D>>,
    ) -> Result<(), DeviceError>;

    /// May also write gradients of parameters to `grads`.
    fn backward(
        &self,
        layer: usize,
        grads: &mut Tensors<D>,
        qkv: Qkv<&Floats<D>>,
        state: SoftmaxState<&Floats<D>>,
        d_o: &Floats<D>,
        gradients: QkvGradients<&mut Floats<D>>,
    ) -> Result<(), DeviceError>;
}

/// How a stack computes attention: on the device, by a plan for these sequences, or by [`Heads`].
#[derive(Clone, Copy)]
pub enum Attend<'a, D: Device> {
    Plan(&'a D::AttentionPlan),
    Other(&'a dyn Heads<D>),
}

/// The packed sequences of a block.
pub struct Sequences<'a, D: Device> {
    pub tokens: usize,
    pub attend: Attend<'a, D>,
    /// Tokens of each label, read only with the label mask.
    pub tokens_by_label: [&'a Indices<D>; 2],
    pub options: &'a FhaOptions,
}

/// A stack of at least one block over packed sequences.
pub struct Encoder<'a, D: Device> {
    pub device: &'a D,
    pub blocks: &'a [Block],
    pub p: &'a Tensors<D>,
    pub sequences: Sequences<'a, D>,
}

/// Activations that the backward pass reads.
pub struct BlockState<D: Device> {
    x: Floats<D>,
    u: Floats<D>,
    q: Floats<D>,
    k: Floats<D>,
    v: Floats<D>,
    o: Floats<D>,
    lse: Floats<D>,
    g: Floats<D>,
    n: Floats<D>,
    f: Floats<D>,
    out: Floats<D>,
}

impl<D: Device> BlockState<D> {
    /// The input of the block: `[N, D]`.
    pub fn input(&self) -> &Floats<D> {
        &self.x
    }

    /// Of the attention, `[N, H, d]` each.
    pub fn queries_and_keys(&self) -> [&Floats<D>; 2] {
        [&self.q, &self.k]
    }
}

impl<D: Device> Encoder<'_, D> {
    /// Encodes rows that are sums of rows of `tables`. Returns `[N, D]`.
    pub fn forward(
        &self,
        tables: &[Lookup<&Floats<D>, &Indices<D>>],
    ) -> Result<(Floats<D>, Vec<BlockState<D>>), DeviceError> {
        let Self { device, blocks, p, .. } = self;
        let (mut x, mut u) = (self.activation()?, self.activation()?);
        device.gather_layer_norm(p.norm(&blocks[0].ln_in, self.width()), tables, &mut x, &mut u)?;
        let mut states = Vec::with_capacity(blocks.len());
        for (i, block) in blocks.iter().enumerate() {
            let (y, state) = self.block_forward(i, block, x, u)?;
            states.push(state);
            x = y;
            u = device.alloc(0)?;
            if let Some(next) = blocks.get(i + 1) {
                u = self.activation()?;
                device.layer_norm(p.norm(&next.ln_in, self.width()), &x, &mut u)?;
            }
        }
        Ok((x, states))
    }

    /// Gradient `dy: [N, D]` of the output to `dx: [N, D]` of the input. Writes the gradients of
    /// the parameters to `grads`.
    pub fn backward(
        &self,
        grads: &mut Tensors<D>,
        states: Vec<BlockState<D>>,
        mut dy: Floats<D>,
    ) -> Result<Floats<D>, DeviceError> {
        for ((layer, block), state) in self.blocks.iter().enumerate().zip(states).rev() {
            dy = self.block_backward(layer, block, grads, state, dy)?;
        }
        Ok(dy)
    }

    fn width(&self) -> usize {
        self.sequences.options.heads * self.sequences.options.head_dim
    }

    /// `[N, D]` of unspecified content.
    fn activation(&self) -> Result<Floats<D>, DeviceError> {
        self.device.alloc(self.sequences.tokens * self.width())
    }

    fn linear(
        &self,
        layer: &Linear,
        activation: Activation,
        x: &Floats<D>,
    ) -> Result<Floats<D>, DeviceError> {
        let mut y = self.activation()?;
        self.device.linear(self.p.linear(layer, activation), x, Output::overwrite(&mut y))?;
        Ok(y)
    }

    /// `y += x`. Returns the layer norm of `y`.
    fn add_norm(&self, norm: &Norm, x: &Floats<D>, y: &mut Floats<D>) -> Result<Floats<D>, DeviceError> {
        let mut n = self.activation()?;
        self.device.add_layer_norm(self.p.norm(norm, self.width()), x, y, &mut n)?;
        Ok(n)
    }

    fn linear_backward(
        &self,
        grads: &mut Tensors<D>,
        layer: &Linear,
        activation: Activation,
        [x, y]: [&Floats<D>; 2],
        dy: &mut Floats<D>,
        dx: Output<&mut Floats<D>>,
    ) -> Result<(), DeviceError> {
        let gradients = grads.linear_gradients(layer, dx);
        self.device.linear_backward(self.p.linear(layer, activation), x, y, dy, gradients)
    }

    fn norm_backward(
        &self,
        grads: &mut Tensors<D>,
        norm: &Norm,
        x: &Floats<D>,
        dy: &Floats<D>,
        dx: Output<&mut Floats<D>>,
    ) -> Result<(), DeviceError> {
        let gradients = grads.norm_gradients(norm, dx);
        self.device.layer_norm_backward(self.p.norm(norm, self.width()), x, dy, gradients)
    }

    fn block_forward(
        &self,
        layer: usize,
        block: &Block,
        x: Floats<D>,
        u: Floats<D>,
    ) -> Result<(Floats<D>, BlockState<D>), DeviceError> {
        let Self { device, p, sequences, .. } = self;
        let (tokens, options) = (sequences.tokens, sequences.options);
        let [q, k, v] = device.together(|| {
            let project = |layer, x| self.linear(layer, Activation::None, x);
            Ok([project(&block.q, &u)?, project(&block.k, &x)?, project(&block.v, &x)?])
        })?;
        let (mut o, mut lse) =
            (device.alloc(options.output_len(tokens))?, device.alloc(options.lse_len(tokens))?);
        let qkv = Qkv { q: &q, k: &k, v: &v };
        let state = SoftmaxState { o: &mut o, lse: &mut lse };
        match sequences.attend {
            Attend::Plan(plan) => device.attention(plan, qkv, state)?,
            Attend::Other(heads) => heads.forward(layer, qkv, state)?,
        }
        let mut g = match options.label_mask {
            LabelMask::None => self.linear(&block.o, Activation::None, &o)?,
            LabelMask::Feedback => {
                let mut g = self.activation()?;
                let layer = p.label_linear(&block.o, sequences.tokens_by_label);
                device.label_linear(layer, &o, Output::overwrite(&mut g))?;
                g
            }
        };
        let n = self.add_norm(&block.ln_ffn, &u, &mut g)?;
        let f = self.linear(&block.ffn1, Activation::Relu, &n)?;
        let mut out = self.linear(&block.ffn2, Activation::None, &f)?;
        let y = self.add_norm(&block.ln_out, &n, &mut out)?;
        Ok((y, BlockState { x, u, q, k, v, o, lse, g, n, f, out }))
    }

    fn block_backward(
        &self,
        layer: usize,
        block: &Block,
        grads: &mut Tensors<D>,
        state: BlockState<D>,
        dy: Floats<D>,
    ) -> Result<Floats<D>, DeviceError> {
        let Self { device, p, sequences, .. } = self;
        let BlockState { x, u, q, k, v, o, lse, g, n, f, out } = state;
        let mut d_out = dy;
        let mut dn = self.activation()?;
        self.norm_backward(grads, &block.ln_out, &out, &d_out, Output::overwrite(&mut dn))?;
        // `dn` now holds the gradient of `out`, which is also the residual part of the gradient of
        // `n`.
        let mut df = self.activation()?;
        self.linear_backward(
            grads,
            &block.ffn2,
            Activation::None,
            [&f, &out],
            &mut dn,
            Output::overwrite(&mut df),
        )?;
        self.linear_backward(grads, &block.ffn1, Activation::Relu, [&n, &f], &mut df, Output::add(&mut dn))?;
        let mut dg = df;
        self.norm_backward(grads, &block.ln_ffn, &g, &dn, Output::overwrite(&mut dg))?;

        let mut d_o = device.alloc(o.len())?;
        match sequences.options.label_mask {
            LabelMask::None => {
                self.linear_backward(
                    grads,
                    &block.o,
                    Activation::None,
                    [&o, &g],
                    &mut dg,
                    Output::overwrite(&mut d_o),
                )?;
            }
            LabelMask::Feedback => {
                let layer = p.label_linear(&block.o, sequences.tokens_by_label);
                let [dw, dbias] = grads.several([block.o.w, block.o.b]);
                let gradients = LabelLinearGradients { dx: &mut d_o, dw, dbias };
                device.label_linear_backward(layer, &o, &dg, gradients)?;
            }
        }
        let (mut dq, mut dk, mut dv) = (dn, self.activation()?, self.activation()?);
        let (qkv, state) = (Qkv { q: &q, k: &k, v: &v }, SoftmaxState { o: &o, lse: &lse });
        let gradients = QkvGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        match sequences.attend {
            Attend::Plan(plan) => device.attention_backward(plan, qkv, state, &d_o, gradients)?,
            Attend::Other(heads) => heads.backward(layer, grads, qkv, state, &d_o, gradients)?,
        }
        // `dg` is the residual part of the gradient of `u`.
        let mut du = dg;
        let dx = &mut d_out;
        device.together(|| {
            let none = Activation::None;
            self.linear_backward(grads, &block.q, none, [&u, &q], &mut dq, Output::add(&mut du))?;
            self.linear_backward(grads, &block.k, none, [&x, &k], &mut dk, Output::overwrite(&mut *dx))?;
            self.linear_backward(grads, &block.v, none, [&x, &v], &mut dv, Output::add(&mut *dx))
        })?;
        self.norm_backward(grads, &block.ln_in, &x, &du, Output::add(dx))?;
        Ok(d_out)
    }
}
