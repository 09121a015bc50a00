//! What is not finite reaches only what depends on it, in the backward pass too.
//!
//! A key that a row does not see has a probability of 0 and is left in the products of its tile, which costs less than to leave it
//! out. But 0 times NaN is NaN, and so rows and keys of one tile could spoil each other. Every fault shows in `dq`; where it does,
//! the sequence is computed once more with 0 in place of all that is not finite. What does not depend on a fault is the same in
//! both but for the faults of its neighbours, and is taken from there.

use super::{Saved, Sequence};

pub(super) fn is_finite(x: &[f32]) -> bool {
    // Without branches: what is finite is 0 times itself.
    let mut sums = [0.0f32; 16];
    let mut blocks = x.chunks_exact(sums.len());
    for block in &mut blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x * 0.0;
        }
    }
    sums.iter().chain(blocks.remainder()).all(|x| x.is_finite())
}

/// Gives gradients of a causal sequence that `backward` has computed the values they have without the faults that they do not
/// depend on.
pub(super) fn confine(
    sequence: Sequence,
    saved: &Saved,
    gradients: [&mut [f32]; 3],
    backward: impl Fn(Sequence, &Saved, [&mut [f32]; 3]),
) {
    let shape = sequence.shape;
    let (width, tokens) = (shape.width(), sequence.tokens);
    let spoiled = |x: &[f32], width: usize| -> Vec<bool> {
        x.chunks_exact(width).map(|token| !is_finite(token)).collect()
    };
    let [q, k, v] = [sequence.q, sequence.k, sequence.v].map(|x| spoiled(x, width));
    let [o, d_o] = [saved.o, saved.d_o].map(|x| spoiled(x, shape.output_width()));
    let lse = spoiled(saved.lse, shape.query_slots);

    // Keys see what comes later, queries what came before.
    let seen_from = (0..tokens).find(|&t| k[t] || v[t]).unwrap_or(tokens);
    let end = |spoiled: &dyn Fn(usize) -> bool| (0..tokens).rev().find(|&t| spoiled(t)).map_or(0, |t| t + 1);
    let row = |t: usize| q[t] || lse[t] || d_o[t];
    let dk_end = if seen_from < tokens { tokens } else { end(&|t| row(t) || o[t]) };
    let dv_end = if k.contains(&true) { tokens } else { end(&row) };
    let depends = |gradient: usize, t: usize| match gradient {
        0 => row(t) || o[t] || t >= seen_from,
        1 => t < dk_end,
        _ => t < dv_end,
    };

    let without =
        |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| if x.is_finite() { x } else { 0.0 }).collect() };
    let [q, k, v] = [sequence.q, sequence.k, sequence.v].map(without);
    let [o, lse, d_o] = [saved.o, saved.lse, saved.d_o].map(without);
    let saved = Saved { o: &o, lse: &lse, d_o: &d_o };
    let mut others = [(); 3].map(|()| vec![0.0; tokens * width]);
    let sequence = Sequence { q: &q, k: &k, v: &v, ..sequence };
    backward(sequence, &saved, others.each_mut().map(|x| &mut x[..]));
    for (index, (gradient, other)) in gradients.into_iter().zip(&others).enumerate() {
        for (t, (gradient, other)) in
            gradient.chunks_exact_mut(width).zip(other.chunks_exact(width)).enumerate()
        {
            if !depends(index, t) {
                gradient.copy_from_slice(other);
            }
        }
    }
}
