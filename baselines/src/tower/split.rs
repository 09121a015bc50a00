//! The first layer on the CPU, split by its parts.
//!
//! A layer over concatenated parts is a sum: `[e, g] W = e W_e + g W_g`. Each term is computed once
//! for each row of its part: that of `e` once for each (history, candidate), that of a history's
//! vector once for each prefix.

use super::{FirstLayer, FirstPass};
use crate::ops::lists::{Lists, add_vectors, sum_by_list};
use crate::system::{Context, Gradients, Part, Per};
use crate::{Floats, Result};
use dfar::device::cpu::Cpu;
use dfar::device::cpu::elementwise::add_assign;
use dfar::device::cpu::elementwise::relu_backward;
use dfar::device::cpu::linear;
use dfar::device::cpu::product::F32;
use dfar::device::{Activation, Linear, LinearGradients, Memory, Output};
use dfar::model::parameters;
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 64;

/// One product for each part.
pub struct Split;

/// A part of the input with the rows that read each of its rows.
struct Term<'a> {
    values: &'a Floats,
    width: usize,
    lists: Lists<'a>,
}

impl FirstLayer<Cpu> for Split {
    type State = ();

    fn forward(cx: Context, layer: &parameters::Linear, e: &Floats, parts: &[Part]) -> Result<(Floats, ())> {
        let (device, batch, width) = (cx.device, &cx.x.batch, layer.outputs);
        let mut sums: Vec<(Floats, Option<&[u32]>)> = Vec::new();
        let mut from = 0;
        for term in terms(cx, e, parts) {
            let n = term.lists.len(batch.rows());
            let mut y = device.alloc(n * width)?;
            let weight = slice(cx, layer, from, term.width);
            linear::forward(F32, weight, term.values, Output::overwrite(&mut y[..]));
            let index = match term.lists {
                Lists::Same => None,
                Lists::Ranges(_) => Some(&batch.row_group[..]),
                Lists::Members(..) => Some(&batch.row_pair[..]),
            };
            sums.push((y, index));
            from += term.width;
        }
        let mut h: Floats = device.alloc(batch.rows() * width)?;
        let (bias, terms) = (&cx.p[layer.b][..], &sums[..]);
        h.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, h)| {
            dispatch(SumTerms { bias, terms, first: chunk * ROWS, h });
        });
        Ok((h, ()))
    }

    fn backward(
        cx: Context,
        layer: &parameters::Linear,
        FirstPass { e, parts, h, .. }: FirstPass<Cpu, ()>,
        mut d_h: Floats,
        grads: &mut Gradients,
    ) -> Result<Vec<Floats>> {
        let (device, rows, width) = (cx.device, cx.x.batch.rows(), layer.outputs);
        let values = &h[..];
        d_h.par_chunks_mut(ROWS * width).enumerate().for_each(|(i, d_h)| {
            relu_backward(&values[i * ROWS * width..][..d_h.len()], d_h);
        });
        let [dw, db] = grads.dense.several([layer.w, layer.b]);
        let mut dw = &mut dw[..];
        let mut d_parts = Vec::with_capacity(parts.len());
        let mut from = 0;
        for (i, term) in terms(cx, e, parts).enumerate() {
            let n = term.lists.len(rows);
            let mut dy = device.alloc(n * width)?;
            sum_by_list(width, term.lists, &d_h, &mut dy);
            let mut dx: Floats = device.alloc(n * term.width)?;
            let gradients = LinearGradients {
                dx: Some(Output::overwrite(&mut dx[..])),
                dw: dw.split_off_mut(..term.width * width).expect("the terms make the layer"),
                // Each row of the tower belongs to one pair.
                dbias: if i == 0 { Some(&mut db[..]) } else { None },
            };
            // `y` is not read without an activation.
            let y: Floats = device.alloc(dy.len())?;
            let weight = slice(cx, layer, from, term.width);
            linear::backward(F32, weight, term.values, &y, &mut dy, gradients);
            if i == 0 {
                add_assign(&dx, &mut grads.candidates);
            } else {
                d_parts.push(dx);
            }
            from += term.width;
        }
        Ok(d_parts)
    }
}

/// `h[row] = ReLU(bias + sum of y[index[row]] over the terms)` for the rows from `first` on.
struct SumTerms<'a> {
    bias: &'a [f32],
    /// The rows of each term, and which of them a row of the tower reads: without an index its own.
    terms: &'a [(Floats, Option<&'a [u32]>)],
    first: usize,
    h: &'a mut [f32],
}

impl Kernel for SumTerms<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.bias.len();
        for (i, h) in self.h.chunks_exact_mut(width).enumerate() {
            h.copy_from_slice(self.bias);
            for (y, index) in self.terms {
                let row = index.map_or(self.first + i, |index| index[self.first + i] as usize);
                add_vectors(s, &y[row * width..][..width], h);
            }
            let mut vectors = h.chunks_exact_mut(S::LANES);
            for h in &mut vectors {
                s.store(s.max(s.zero(), s.load(h)), h);
            }
            // Keeps a NaN, unlike f32::max.
            vectors.into_remainder().iter_mut().filter(|h| **h < 0.0).for_each(|h| *h = 0.0);
        }
    }
}

/// The rows `from..from + width` of the layer's weight, as a layer without bias.
fn slice<'a>(cx: Context<'a>, layer: &parameters::Linear, from: usize, width: usize) -> Linear<&'a [f32]> {
    let outputs = layer.outputs;
    let w = &cx.p[layer.w][from * outputs..(from + width) * outputs];
    Linear { w, bias: None, activation: Activation::None, inputs: width, outputs }
}

/// The candidate, then the parts.
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
