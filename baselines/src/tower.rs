//! The tower: `logit = MLP([e, parts..])`, ReLU between its layers.
//!
//! A first layer over concatenated parts is a sum: `[e, g] W = e W_e + g W_g`. Each term is
//! computed once for each row of its part: that of `e` once for each (history, candidate), that of
//! a history's vector once for each prefix.

use crate::ops::lists::{Lists, add, sum_by_list};
use crate::parameters::Names;
use crate::system::{Context, Gradients, Part, Per, Settings};
use crate::{Floats, Result};
use dfar::device::cpu::elementwise::relu_backward;
use dfar::device::cpu::linear;
use dfar::device::cpu::product::F32;
use dfar::device::{Activation, Dense, Linear, LinearGradients, Memory, Output};
use dfar::model::parameters;
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 64;

/// The layers.
pub struct Tower([parameters::Linear; 3]);

/// Activations that the backward pass reads.
pub struct TowerState {
    /// `[C, D]`
    e: Floats,
    h0: Floats,
    h1: Floats,
    /// `[R]`
    pub logits: Floats,
}

/// A part of the input with the rows that read each of its rows.
struct Term<'a> {
    values: &'a Floats,
    width: usize,
    lists: Lists<'a>,
}

impl Tower {
    /// Names the parameters `tower.*` for an input of `D + parts` values.
    pub fn new(names: &mut Names, settings: &Settings, parts: usize) -> Self {
        Self(names.mlp("tower", settings.width + parts, settings.tower))
    }

    /// The logits of all rows.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward(&self, cx: Context, parts: &[Part]) -> Result<TowerState> {
        let (device, batch) = (cx.device, &cx.x.batch);
        let [first, second, last] = &self.0;
        let e = cx.candidates()?;
        let mut sums: Vec<(Floats, Option<&[u32]>)> = Vec::new();
        let mut from = 0;
        for term in terms(cx, &e, parts) {
            let n = term.lists.len(batch.rows());
            let mut y = device.alloc(n * first.outputs)?;
            linear::forward(
                F32,
                self.slice(cx, from, term.width),
                term.values,
                Output::overwrite(&mut y[..]),
            );
            let index = match term.lists {
                Lists::Same => None,
                Lists::Ranges(_) => Some(&batch.row_group[..]),
                Lists::Members(..) => Some(&batch.row_pair[..]),
            };
            sums.push((y, index));
            from += term.width;
        }
        let mut h0: Floats = device.alloc(batch.rows() * first.outputs)?;
        let (bias, width) = (&cx.p[first.b][..], first.outputs);
        h0.par_chunks_mut(width).with_min_len(ROWS).enumerate().for_each(|(row, h)| {
            h.copy_from_slice(bias);
            for (y, index) in &sums {
                let at = index.map_or(row, |index| index[row] as usize);
                add(&y[at * width..][..width], h);
            }
            // Keeps a NaN, unlike f32::max.
            h.iter_mut().filter(|h| **h < 0.0).for_each(|h| *h = 0.0);
        });
        let layer = |layer: &parameters::Linear, activation, x: &Floats| -> Result<Floats> {
            let mut y = device.alloc(batch.rows() * layer.outputs)?;
            device.linear(cx.p.linear(layer, activation), x, Output::overwrite(&mut y))?;
            Ok(y)
        };
        let h1 = layer(second, Activation::Relu, &h0)?;
        let logits = layer(last, Activation::None, &h1)?;
        Ok(TowerState { e, h0, h1, logits })
    }

    /// Gradients of the parts from those of the logits. Adds that of `e` to `grads.candidates`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        parts: &[Part],
        state: TowerState,
        mut d_logits: Floats,
        grads: &mut Gradients,
    ) -> Result<Vec<Floats>> {
        let (device, rows) = (cx.device, cx.x.batch.rows());
        let [first, second, last] = &self.0;
        let TowerState { e, h0, h1, logits } = state;
        let mut layer = |layer: &parameters::Linear,
                         activation,
                         x: &Floats,
                         y: &Floats,
                         dy: &mut Floats|
         -> Result<Floats> {
            let mut dx = device.alloc(rows * layer.inputs)?;
            let gradients = grads.dense.linear_gradients(layer, Output::overwrite(&mut dx));
            device.linear_backward(cx.p.linear(layer, activation), x, y, dy, gradients)?;
            Ok(dx)
        };
        let mut d_h1 = layer(last, Activation::None, &h1, &logits, &mut d_logits)?;
        let mut d_h0 = layer(second, Activation::Relu, &h0, &h1, &mut d_h1)?;
        let (values, width) = (&h0[..], first.outputs);
        d_h0.par_chunks_mut(ROWS * width).enumerate().for_each(|(i, d_h0)| {
            relu_backward(&values[i * ROWS * width..][..d_h0.len()], d_h0);
        });

        let [dw, db] = grads.dense.several([first.w, first.b]);
        let mut dw = &mut dw[..];
        let mut d_parts = Vec::with_capacity(parts.len());
        let mut from = 0;
        for (i, term) in terms(cx, &e, parts).enumerate() {
            let n = term.lists.len(rows);
            let mut dy = device.alloc(n * width)?;
            sum_by_list(width, term.lists, &d_h0, &mut dy);
            let mut dx: Floats = device.alloc(n * term.width)?;
            let gradients = LinearGradients {
                dx: Some(Output::overwrite(&mut dx[..])),
                dw: dw.split_off_mut(..term.width * width).expect("the terms make the first layer"),
                // Each row of the tower belongs to one pair.
                dbias: if i == 0 { Some(&mut db[..]) } else { None },
            };
            // `y` is not read without an activation.
            let y: Floats = device.alloc(dy.len())?;
            linear::backward(F32, self.slice(cx, from, term.width), term.values, &y, &mut dy, gradients);
            if i == 0 {
                add(&dx, &mut grads.candidates);
            } else {
                d_parts.push(dx);
            }
            from += term.width;
        }
        Ok(d_parts)
    }

    /// The rows `from..from + width` of the first layer's weight, as a layer without bias.
    fn slice<'a>(&self, cx: Context<'a>, from: usize, width: usize) -> Linear<&'a [f32]> {
        let parameters::Linear { w, outputs, .. } = self.0[0];
        let w = &cx.p[w][from * outputs..(from + width) * outputs];
        Linear { w, bias: None, activation: Activation::None, inputs: width, outputs }
    }
}

/// The terms of the first layer: the candidate, then the parts.
fn terms<'a>(cx: Context<'a>, e: &'a Floats, parts: &'a [Part]) -> impl Iterator<Item = Term<'a>> {
    let batch = &cx.x.batch;
    let pairs = Lists::Members(&batch.pair_rows.offsets, &batch.pair_rows.members);
    let candidate = Term { values: e, width: cx.width, lists: pairs };
    std::iter::once(candidate).chain(parts.iter().map(|part| Term {
        values: &part.values,
        width: part.width,
        lists: match part.per {
            Per::Group => Lists::Ranges(&batch.row_offsets),
            Per::Row => Lists::Same,
        },
    }))
}
