//! Unfused target attention, as published: it stores `[a, r, a - r, a * r]` for every (token,
//! candidate) pair and keeps the activations of three full linear layers for the backward pass.
//!
//! The baseline of tests and benchmarks, with the arguments and results of the fused form. Training
//! does not use it: the first layer takes four times the work, and every activation goes through
//! memory.

use super::super::linear;
use super::super::product::F32;
use super::{Shape, check_index, prefer_recent};
use crate::device::{
    Activation, Linear, LinearGradients, Output, TargetGradients, TargetIndex, TargetInputs, TargetShape,
    TargetState, TargetWeights,
};
use rayon::prelude::*;

/// The operation with its activations. Calls reuse the memory.
pub struct Unfused {
    shape: TargetShape,
    /// `[P, 4D]`, `P` the number of scores.
    inputs: Vec<f32>,
    /// `[P, hidden0]`
    hidden0: Vec<f32>,
    /// `[P, hidden1]`
    hidden1: Vec<f32>,
    /// Gradients of the above and of the scores.
    gradients: [Vec<f32>; 4],
}

/// The first token of the sequence of each pair.
fn first_tokens(index: &TargetIndex<&[u32]>) -> Vec<usize> {
    let pairs = index.pair_offsets.windows(2).zip(index.cu_seqlens);
    pairs.flat_map(|(pairs, token)| (pairs[0]..pairs[1]).map(|_| *token as usize)).collect()
}

/// The pair of each row.
fn pair_of_row(index: &TargetIndex<&[u32]>) -> Vec<usize> {
    let mut pair_of_row = vec![0; index.row_length.len()];
    for (pair, segment) in index.rows.offsets.windows(2).enumerate() {
        for row in &index.rows.members[segment[0] as usize..segment[1] as usize] {
            pair_of_row[*row as usize] = pair;
        }
    }
    pair_of_row
}

/// Cuts `x` into pieces of `lens` values.
fn cut(mut x: &mut [f32], lens: impl Iterator<Item = usize>) -> Vec<&mut [f32]> {
    lens.map(|len| super::split(&mut x, len)).collect()
}

/// Lengths of the pairs.
fn pair_lens(index: &TargetIndex<&[u32]>, width: usize) -> impl Iterator<Item = usize> {
    index.score_offsets.windows(2).map(move |w| (w[1] - w[0]) as usize * width)
}

impl Unfused {
    /// Allocates nothing yet.
    pub fn new(shape: TargetShape) -> Self {
        let (inputs, hidden0, hidden1) = Default::default();
        Self { shape, inputs, hidden0, hidden1, gradients: Default::default() }
    }

    /// As [`super::forward`]; keeps the activations.
    ///
    /// # Panics
    /// If the lengths of the buffers contradict each other.
    pub fn forward(
        &mut self,
        index: TargetIndex<&[u32]>,
        inputs: TargetInputs<&[f32]>,
        weights: TargetWeights<&[f32]>,
        state: TargetState<&mut [f32]>,
    ) {
        let shape = Shape::new(self.shape);
        let TargetShape { width, hidden, .. } = self.shape;
        let TargetState { e, lse, att } = state;
        shape.check(&weights);
        check_index(&index, shape, &inputs, e);
        let (kept, TargetInputs { s, a, r }) = (self, inputs);
        let first = first_tokens(&index);
        kept.inputs.resize(e.len() * 4 * width, 0.0);
        kept.hidden0.resize(e.len() * hidden[0], 0.0);
        kept.hidden1.resize(e.len() * hidden[1], 0.0);
        let pairs = cut(&mut kept.inputs, pair_lens(&index, 4 * width));
        pairs.into_par_iter().zip(r.par_chunks(width)).zip(&first).for_each(|((inputs, r), first)| {
            for (row, a) in inputs.chunks_exact_mut(4 * width).zip(a[first * width..].chunks_exact(width)) {
                row[..width].copy_from_slice(a);
                row[width..2 * width].copy_from_slice(r);
                let (difference, product) = row[2 * width..].split_at_mut(width);
                for (((difference, product), a), r) in difference.iter_mut().zip(product).zip(a).zip(r) {
                    (*difference, *product) = (a - r, a * r);
                }
            }
        });
        let Unfused { inputs, hidden0, hidden1, .. } = kept;
        let [first_layer, second_layer, last_layer] = layers(kept.shape, weights);
        linear::forward(F32, first_layer, inputs, Output::overwrite(hidden0));
        linear::forward(F32, second_layer, hidden0, Output::overwrite(hidden1));
        linear::forward(F32, last_layer, hidden1, Output::overwrite(e));
        for pair in index.score_offsets.windows(2) {
            prefer_recent(shape.slope, &mut e[pair[0] as usize..pair[1] as usize]);
        }

        let pair_of_row = pair_of_row(&index);
        let rows = att.par_chunks_mut(width).zip(lse).zip(&pair_of_row).zip(index.row_length);
        rows.for_each(|(((att, lse), pair), length)| {
            let e = &e[index.score_offsets[*pair] as usize..][..*length as usize];
            let largest = e.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let denominator: f32 = e.iter().map(|e| (e - largest).exp()).sum();
            *lse = largest + denominator.ln();
            att.fill(0.0);
            for (e, s) in e.iter().zip(s[first[*pair] * width..].chunks_exact(width)) {
                let p = (e - *lse).exp();
                att.iter_mut().zip(s).for_each(|(att, s)| *att += p * s);
            }
        });
    }

    /// As [`super::backward`], after [`Unfused::forward`] with the same arguments.
    ///
    /// # Panics
    /// If the lengths of the buffers contradict each other.
    pub fn backward(
        &mut self,
        index: TargetIndex<&[u32]>,
        inputs: TargetInputs<&[f32]>,
        weights: TargetWeights<&[f32]>,
        state: TargetState<&[f32]>,
        datt: &[f32],
        gradients: TargetGradients<&mut [f32]>,
    ) {
        let TargetState { e, lse, att } = state;
        check_index(&index, Shape::new(self.shape), &inputs, e);
        let width = self.shape.width;
        let TargetGradients { ds, da, dr, weights: dw } = gradients;
        let (kept, TargetInputs { s, a, r }) = (self, inputs);
        let [dinputs, dhidden0, dhidden1, de] = &mut kept.gradients;
        dinputs.resize(kept.inputs.len(), 0.0);
        dhidden0.resize(kept.hidden0.len(), 0.0);
        dhidden1.resize(kept.hidden1.len(), 0.0);
        de.clear();
        de.resize(e.len(), 0.0);

        // Softmax: parallel over sequences, because the rows of a sequence share its `ds`.
        let token_lens = || index.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize * width);
        let score_lens = index.pair_offsets.windows(2).map(|pairs| {
            (index.score_offsets[pairs[1] as usize] - index.score_offsets[pairs[0] as usize]) as usize
        });
        let sequences = cut(ds, token_lens()).into_par_iter().zip(cut(de, score_lens)).enumerate();
        sequences.for_each(|(sequence, (ds, de))| {
            let pairs = index.pair_offsets[sequence] as usize..index.pair_offsets[sequence + 1] as usize;
            let s = &s[index.cu_seqlens[sequence] as usize * width..];
            let start = index.score_offsets[pairs.start] as usize;
            for pair in pairs {
                let segment = index.rows.offsets[pair] as usize..index.rows.offsets[pair + 1] as usize;
                let scores = index.score_offsets[pair] as usize;
                for row in index.rows.members[segment].iter().map(|row| *row as usize) {
                    let length = index.row_length[row] as usize;
                    let (att, datt) = (&att[row * width..][..width], &datt[row * width..][..width]);
                    let offset: f32 = att.iter().zip(datt).map(|(x, y)| x * y).sum();
                    let tokens = s.chunks_exact(width).zip(ds.chunks_exact_mut(width));
                    let scores = e[scores..][..length].iter().zip(&mut de[scores - start..]);
                    for ((s, ds), (e, de)) in tokens.zip(scores) {
                        let p = (e - lse[row]).exp();
                        let dot: f32 = s.iter().zip(datt).map(|(x, y)| x * y).sum();
                        *de += p * (dot - offset);
                        ds.iter_mut().zip(datt).for_each(|(ds, datt)| *ds += p * datt);
                    }
                }
            }
        });

        let [first_layer, second_layer, last_layer] = layers(kept.shape, weights);
        let Unfused { inputs, hidden0, hidden1, .. } = kept;
        let last = LinearGradients { dx: Some(Output::overwrite(&mut dhidden1[..])), dw: dw.w2, dbias: None };
        linear::backward(F32, last_layer, hidden1, e, de, last);
        dw.b2.fill(0.0);
        let dx = Some(Output::overwrite(&mut dhidden0[..]));
        let second = LinearGradients { dx, dw: dw.w1, dbias: Some(dw.b1) };
        linear::backward(F32, second_layer, hidden0, hidden1, dhidden1, second);
        let dx = Some(Output::overwrite(&mut dinputs[..]));
        let first = LinearGradients { dx, dw: dw.w0, dbias: Some(dw.b0) };
        linear::backward(F32, first_layer, inputs, hidden0, dhidden0, first);

        // Concatenation: parallel over sequences, because the pairs of a sequence share its tokens.
        let pair_counts = index.pair_offsets.windows(2).map(|w| (w[1] - w[0]) as usize * width);
        let sequences = cut(da, token_lens()).into_par_iter().zip(cut(dr, pair_counts)).enumerate();
        sequences.for_each(|(sequence, (da, dr))| {
            let pairs = index.pair_offsets[sequence] as usize..index.pair_offsets[sequence + 1] as usize;
            let a = &a[index.cu_seqlens[sequence] as usize * width..];
            da.fill(0.0);
            for (pair, dr) in pairs.zip(dr.chunks_exact_mut(width)) {
                let r = &r[pair * width..(pair + 1) * width];
                let scores = index.score_offsets[pair] as usize..index.score_offsets[pair + 1] as usize;
                let rows = dinputs[scores.start * 4 * width..scores.end * 4 * width].chunks_exact(4 * width);
                dr.fill(0.0);
                for ((dx, a), da) in rows.zip(a.chunks_exact(width)).zip(da.chunks_exact_mut(width)) {
                    for i in 0..width {
                        let [ga, gr, gd, gp] = [0, 1, 2, 3].map(|block| dx[block * width + i]);
                        da[i] += ga + gd + gp * r[i];
                        dr[i] += gr - gd + gp * a[i];
                    }
                }
            }
        });
    }
}

/// The layers of the MLP.
fn layers(
    TargetShape { width, hidden: [h0, h1], .. }: TargetShape,
    weights: TargetWeights<&[f32]>,
) -> [Linear<&[f32]>; 3] {
    let TargetWeights { w0, b0, w1, b1, w2, b2 } = weights;
    let layer =
        |w, bias, activation, inputs, outputs| Linear { w, bias: Some(bias), activation, inputs, outputs };
    [
        layer(w0, b0, Activation::Relu, 4 * width, h0),
        layer(w1, b1, Activation::Relu, h0, h1),
        layer(w2, b2, Activation::None, h1, 1),
    ]
}
