//! One encoder block:
//!
//! ```text
//! u = LN(x);  h = FHA(u Wq + bq, x Wk + bk, x Wv + bv) Wo + bo;  g = h + u
//! n = LN(g);  out = ReLU(n W1 + b1) W2 + b2 + n;  y = LN(out)
//! ```

use super::parameters::{Block, Linear, Norm};
use super::tensors::Tensors;
use crate::attention::{FhaOptions, LabelMask};
use crate::device::{Activation, Buffer, Device, DeviceError, Store};

/// The packed sequences a block runs over.
pub struct Sequences<'a, D: Device> {
    pub tokens: usize,
    /// Made for `options`.
    pub plan: &'a D::AttentionPlan,
    /// Tokens of each label; read only under the label mask.
    pub tokens_by_label: [&'a D::Buffer<u32>; 2],
    pub options: &'a FhaOptions,
}

/// What the backward pass needs of the forward one.
pub struct BlockState<D: Device> {
    x: D::Buffer<f32>,
    u: D::Buffer<f32>,
    q: D::Buffer<f32>,
    k: D::Buffer<f32>,
    v: D::Buffer<f32>,
    o: D::Buffer<f32>,
    lse: D::Buffer<f32>,
    g: D::Buffer<f32>,
    n: D::Buffer<f32>,
    f: D::Buffer<f32>,
    out: D::Buffer<f32>,
}

impl<D: Device> BlockState<D> {
    /// What the block was given: `[N, D]`.
    pub fn input(&self) -> &D::Buffer<f32> {
        &self.x
    }
}

/// A stack of at least one block over rows that are sums of rows of `tables`: to `[N, D]`.
pub fn forward<D: Device>(
    device: &D,
    blocks: &[Block],
    p: &Tensors<D>,
    sequences: &Sequences<D>,
    tables: &[(&D::Buffer<f32>, &D::Buffer<u32>)],
) -> Result<(D::Buffer<f32>, Vec<BlockState<D>>), DeviceError> {
    let width = sequences.options.heads * sequences.options.head_dim;
    let fresh = || device.alloc::<f32>(sequences.tokens * width);
    let (mut x, mut u) = (fresh()?, fresh()?);
    let Norm { gamma, beta } = blocks[0].ln_in;
    device.gather_layer_norm(width, tables, &p[gamma], &p[beta], &mut x, &mut u)?;
    let mut states = Vec::with_capacity(blocks.len());
    for (i, block) in blocks.iter().enumerate() {
        let (y, state) = block_forward(device, block, p, sequences, x, u)?;
        states.push(state);
        x = y;
        u = device.alloc(0)?;
        if let Some(next) = blocks.get(i + 1) {
            u = fresh()?;
            device.layer_norm(width, &x, &p[next.ln_in.gamma], &p[next.ln_in.beta], &mut u)?;
        }
    }
    Ok((x, states))
}

/// Gradient of a stack: `dy: [N, D]` to `dx: [N, D]`; gradients of parameters go to `grads`.
pub fn backward<D: Device>(
    device: &D,
    blocks: &[Block],
    p: &Tensors<D>,
    grads: &mut Tensors<D>,
    sequences: &Sequences<D>,
    states: Vec<BlockState<D>>,
    mut dy: D::Buffer<f32>,
) -> Result<D::Buffer<f32>, DeviceError> {
    for (block, state) in blocks.iter().zip(states).rev() {
        dy = block_backward(device, block, p, grads, sequences, state, dy)?;
    }
    Ok(dy)
}

fn block_forward<D: Device>(
    device: &D,
    block: &Block,
    p: &Tensors<D>,
    sequences: &Sequences<D>,
    x: D::Buffer<f32>,
    u: D::Buffer<f32>,
) -> Result<(D::Buffer<f32>, BlockState<D>), DeviceError> {
    let options = sequences.options;
    let (tokens, width) = (sequences.tokens, options.heads * options.head_dim);
    let fresh = || device.alloc::<f32>(tokens * width);
    let linear = |x: &D::Buffer<f32>, layer: &Linear, activation| -> Result<D::Buffer<f32>, DeviceError> {
        let mut y = fresh()?;
        device.linear(
            x,
            &p[layer.w],
            Some(&p[layer.b]),
            activation,
            (&mut y, Store::Overwrite),
            layer.widths,
        )?;
        Ok(y)
    };
    // `y += x`, then its layer norm.
    let add_norm =
        |x: &D::Buffer<f32>, y: &mut D::Buffer<f32>, norm: &Norm| -> Result<D::Buffer<f32>, DeviceError> {
            let mut n = fresh()?;
            device.add_layer_norm(width, x, &p[norm.gamma], &p[norm.beta], y, &mut n)?;
            Ok(n)
        };

    let q = linear(&u, &block.q, Activation::None)?;
    let k = linear(&x, &block.k, Activation::None)?;
    let v = linear(&x, &block.v, Activation::None)?;
    let mut o = device.alloc(tokens * options.query_slots() * options.key_slots() * options.head_dim)?;
    let mut lse = device.alloc(tokens * options.query_slots())?;
    device.attention(sequences.plan, &q, &k, &v, &mut o, &mut lse)?;
    let mut g = match options.label_mask {
        LabelMask::None => linear(&o, &block.o, Activation::None)?,
        LabelMask::Feedback => {
            let mut g = fresh()?;
            let widths = (block.o.widths.0 / 2, block.o.widths.1);
            device.label_linear(
                &o,
                &p[block.o.w],
                &p[block.o.b],
                sequences.tokens_by_label,
                (&mut g, Store::Overwrite),
                widths,
            )?;
            g
        }
    };
    let n = add_norm(&u, &mut g, &block.ln_ffn)?;
    let f = linear(&n, &block.ffn1, Activation::Relu)?;
    let mut out = linear(&f, &block.ffn2, Activation::None)?;
    let y = add_norm(&n, &mut out, &block.ln_out)?;
    Ok((y, BlockState { x, u, q, k, v, o, lse, g, n, f, out }))
}

fn block_backward<D: Device>(
    device: &D,
    block: &Block,
    p: &Tensors<D>,
    grads: &mut Tensors<D>,
    sequences: &Sequences<D>,
    state: BlockState<D>,
    dy: D::Buffer<f32>,
) -> Result<D::Buffer<f32>, DeviceError> {
    let options = sequences.options;
    let (tokens, width) = (sequences.tokens, options.heads * options.head_dim);
    let BlockState { x, u, q, k, v, o, lse, g, n, f, out } = state;
    let fresh = || device.alloc::<f32>(tokens * width);
    let norm = |grads: &mut Tensors<D>,
                norm: &Norm,
                x: &D::Buffer<f32>,
                dy: &D::Buffer<f32>,
                dx: (&mut D::Buffer<f32>, Store)| {
        let [dgamma, dbeta] = grads.two([norm.gamma, norm.beta]);
        device.layer_norm_backward(width, x, &p[norm.gamma], dy, dx, dgamma, dbeta)
    };
    let linear = |grads: &mut Tensors<D>,
                  layer: &Linear,
                  activation,
                  x: &D::Buffer<f32>,
                  y: &D::Buffer<f32>,
                  dy: &mut D::Buffer<f32>,
                  dx: (&mut D::Buffer<f32>, Store)| {
        let [dw, db] = grads.two([layer.w, layer.b]);
        device.linear_backward(x, &p[layer.w], activation, y, dy, Some(dx), dw, Some(db), layer.widths)
    };

    let mut d_out = dy;
    let mut dn = fresh()?;
    norm(grads, &block.ln_out, &out, &d_out, (&mut dn, Store::Overwrite))?;
    // `dn` holds the gradient of `out`, which is also the residual's share of the gradient of `n`.
    let mut df = fresh()?;
    linear(grads, &block.ffn2, Activation::None, &f, &out, &mut dn, (&mut df, Store::Overwrite))?;
    linear(grads, &block.ffn1, Activation::Relu, &n, &f, &mut df, (&mut dn, Store::Add))?;
    let mut dg = df;
    norm(grads, &block.ln_ffn, &g, &dn, (&mut dg, Store::Overwrite))?;

    let mut d_o = device.alloc(o.len())?;
    match options.label_mask {
        LabelMask::None => {
            linear(grads, &block.o, Activation::None, &o, &g, &mut dg, (&mut d_o, Store::Overwrite))?
        }
        LabelMask::Feedback => {
            let widths = (block.o.widths.0 / 2, block.o.widths.1);
            let [dw, db] = grads.two([block.o.w, block.o.b]);
            device.label_linear_backward(
                &o,
                &p[block.o.w],
                sequences.tokens_by_label,
                &dg,
                &mut d_o,
                dw,
                db,
                widths,
            )?;
        }
    }
    let (mut dq, mut dk, mut dv) = (dn, fresh()?, fresh()?);
    device.attention_backward(sequences.plan, &q, &k, &v, &o, &lse, &d_o, &mut dq, &mut dk, &mut dv)?;
    // `dg` is the residual's share of the gradient of `u`.
    let mut du = dg;
    linear(grads, &block.q, Activation::None, &u, &q, &mut dq, (&mut du, Store::Add))?;
    let dx = &mut d_out;
    linear(grads, &block.k, Activation::None, &x, &k, &mut dk, (dx, Store::Overwrite))?;
    linear(grads, &block.v, Activation::None, &x, &v, &mut dv, (dx, Store::Add))?;
    norm(grads, &block.ln_in, &x, &du, (dx, Store::Add))?;
    Ok(d_out)
}
