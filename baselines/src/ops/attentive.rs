//! Attentive pooling of prefixes, with scores that do not depend on the prefix:
//!
//! ```text
//! e_t = q . tanh(x_t w + b)        att_g = sum_(t < n_g) softmax_t(e) x_t        0 without tokens
//! ```
//!
//! Each prefix is the running state of one softmax over its sequence. Backward, with the logarithm
//! `lse_g` of the denominators, from the last prefix to the first:
//!
//! ```text
//! S_t  = sum over the prefixes g with t of e^(e_t - lse_g) datt_g
//! dx_t = S_t      de_t = S_t . x_t - sum over the same g of e^(e_t - lse_g) (datt_g . att_g)
//! ```
//!
//! `S_t` is kept relative to the `lse` of the shortest prefix with `t`, so every factor is at most
//! 1.

use crate::system::Context;
use crate::{Floats, Result, Tensors};
use dfar::batch::LabelSplit;
use dfar::device::{Activation, Dense, Memory, Output};
use dfar::model::parameters::{Id, Initial, Linear, Names, glorot};
use rayon::prelude::*;

/// Pooling parameters `NAME.w`, `NAME.b`, `NAME.q`.
pub struct Attentive {
    layer: Linear,
    q: Id,
}

/// What the backward pass reads.
pub struct AttentiveState {
    /// `[N_f, D]` `tanh(x w + b)`
    hidden: Floats,
    /// `[N_f]`
    e: Vec<f32>,
    /// `[G]`
    lse: Vec<f64>,
}

impl Attentive {
    /// Names the parameters.
    pub fn new(names: &mut Names, name: &str, width: usize) -> Self {
        let layer = names.linear(name, width, width, glorot(width, width));
        let q = names.tensor(format!("{name}.q"), &[width], Initial::Normal(1.0 / (width as f32).sqrt()));
        Self { layer, q }
    }

    /// `[G, D]` pooled tokens `x: [N_f, D]` of each prefix.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward(&self, cx: Context, split: &LabelSplit, x: &Floats) -> Result<(Floats, AttentiveState)> {
        let width = cx.width;
        let mut hidden = cx.device.alloc(x.len())?;
        cx.device.linear(cx.p.linear(&self.layer, Activation::None), x, Output::overwrite(&mut hidden))?;
        let q = &cx.p[self.q][..];
        let e: Vec<f32> = (hidden.par_chunks_mut(width).with_min_len(64))
            .map(|row| {
                row.iter_mut().for_each(|h| *h = h.tanh());
                row.iter().zip(q).map(|(h, q)| h * q).sum()
            })
            .collect();
        let groups = cx.x.batch.groups();
        let mut att = cx.device.zeros(groups * width)?;
        let mut lse = vec![f64::NEG_INFINITY; groups];
        let histories = histories(cx, split, &mut att, &mut lse);
        histories.into_par_iter().for_each(|History { tokens, counts, att, lse }| {
            let (mut max, mut denominator, mut sum) = (f64::NEG_INFINITY, 0.0, vec![0.0; width]);
            let mut t = 0;
            for ((&count, att), lse) in counts.iter().zip(att.chunks_exact_mut(width)).zip(lse) {
                while t < count as usize {
                    let score = f64::from(e[tokens.start + t]);
                    let rescale = (max - score.max(max)).exp();
                    max = max.max(score);
                    let weight = (score - max).exp();
                    denominator = denominator * rescale + weight;
                    let x = &x[(tokens.start + t) * width..][..width];
                    sum.iter_mut().zip(x).for_each(|(s, &x)| *s = *s * rescale + weight * f64::from(x));
                    t += 1;
                }
                if t > 0 {
                    att.iter_mut().zip(&sum).for_each(|(att, s)| *att = (s / denominator) as f32);
                    *lse = max + denominator.ln();
                }
            }
        });
        Ok((att, AttentiveState { hidden, e, lse }))
    }

    /// Gradient `[N_f, D]` of the tokens from that of the pooled prefixes. Writes those of the
    /// parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        split: &LabelSplit,
        grads: &mut Tensors,
        x: &Floats,
        [att, d_att]: [&Floats; 2],
        state: AttentiveState,
    ) -> Result<Floats> {
        let width = cx.width;
        let AttentiveState { mut hidden, e, lse } = state;
        let mut dx: Floats = cx.device.alloc(x.len())?;
        let mut de = vec![0.0f32; e.len()];
        let mut rest = (&mut dx[..], &mut de[..]);
        let bounds = split.cu_seqlens.windows(2).zip(cx.x.batch.group_offsets.windows(2));
        let jobs: Vec<_> = bounds
            .map(|(tokens, groups)| {
                let count = (tokens[1] - tokens[0]) as usize;
                let dx = rest.0.split_off_mut(..count * width).expect("a row for each token");
                let de = rest.1.split_off_mut(..count).expect("a score for each token");
                (tokens[0] as usize, groups[0] as usize..groups[1] as usize, dx, de)
            })
            .collect();
        jobs.into_par_iter().for_each(|(first, groups, dx, de)| {
            // Relative to the `lse` of the shortest prefix so far.
            let (mut sum, mut mean, mut shift) = (vec![0.0; width], 0.0, f64::NEG_INFINITY);
            let mut groups = groups.rev().peekable();
            for (t, (dx, de)) in dx.chunks_exact_mut(width).zip(de).enumerate().rev() {
                while let Some(g) = groups.next_if(|&g| split.count[g] as usize > t) {
                    let rescale = if shift.is_finite() { (lse[g] - shift).exp() } else { 0.0 };
                    shift = lse[g];
                    let row = |x: &Floats| x[g * width..][..width].to_vec();
                    let (att, d_att) = (row(att), row(d_att));
                    let dot = |x: &[f32], y: &[f32]| {
                        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>()
                    };
                    mean = mean * rescale + dot(&att, &d_att);
                    sum.iter_mut().zip(&d_att).for_each(|(s, &d)| *s = *s * rescale + f64::from(d));
                }
                let weight = if shift.is_finite() { (f64::from(e[first + t]) - shift).exp() } else { 0.0 };
                let x = &x[(first + t) * width..][..width];
                let along: f64 = sum.iter().zip(x).map(|(s, &x)| s * f64::from(x)).sum();
                dx.iter_mut().zip(&sum).for_each(|(dx, s)| *dx = (weight * s) as f32);
                *de = (weight * (along - mean)) as f32;
            }
        });
        let q = &cx.p[self.q][..];
        let mut dq = vec![0.0f64; width];
        for (row, &de) in hidden.chunks_exact(width).zip(&de) {
            dq.iter_mut().zip(row).for_each(|(dq, &h)| *dq += f64::from(de * h));
        }
        grads[self.q].iter_mut().zip(dq).for_each(|(out, dq)| *out = dq as f32);
        // The gradient of `x w + b` takes the place of the hidden values.
        hidden.par_chunks_mut(width).with_min_len(64).zip(&de).for_each(|(row, &de)| {
            row.iter_mut().zip(q).for_each(|(h, q)| *h = de * q * (1.0 - *h * *h));
        });
        // Not read without an activation.
        let y = cx.device.alloc(hidden.len())?;
        let layer = cx.p.linear(&self.layer, Activation::None);
        let gradients = grads.linear_gradients(&self.layer, Output::add(&mut dx));
        cx.device.linear_backward(layer, x, &y, &mut hidden, gradients)?;
        Ok(dx)
    }
}

/// The tokens of one label of a history, and its prefixes.
struct History<'a> {
    tokens: std::ops::Range<usize>,
    counts: &'a [u32],
    att: &'a mut [f32],
    lse: &'a mut [f64],
}

fn histories<'a>(
    cx: Context,
    split: &'a LabelSplit,
    mut att: &'a mut [f32],
    mut lse: &'a mut [f64],
) -> Vec<History<'a>> {
    let bounds = split.cu_seqlens.windows(2).zip(cx.x.batch.group_offsets.windows(2));
    let history = |(tokens, groups): (&[u32], &[u32])| {
        let count = (groups[1] - groups[0]) as usize;
        History {
            tokens: tokens[0] as usize..tokens[1] as usize,
            counts: &split.count[groups[0] as usize..groups[1] as usize],
            att: att.split_off_mut(..count * cx.width).expect("a row for each prefix"),
            lse: lse.split_off_mut(..count).expect("a value for each prefix"),
        }
    };
    bounds.map(history).collect()
}
