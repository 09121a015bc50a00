//! Non-finite propagation in the backward pass: a non-finite input reaches only the gradients that
//! depend on it.
//!
//! A masked key takes part in the products of its tile with probability 0, because skipping it
//! would cost more. But 0 times NaN is NaN, so a non-finite value can spread to other rows and keys
//! of the tile. It always shows in `dq`. If `dq` of a sequence is non-finite, the backward pass
//! runs again with every non-finite input replaced by 0, and gradients that do not depend on a
//! non-finite input are taken from the second run.

use super::{Saved, Sequence};
use crate::simd::{Kernel, Simd, dispatch};

/// Whether all values are finite.
pub(super) fn is_finite(x: &[f32]) -> bool {
    struct IsFinite<'a>(&'a [f32]);
    impl Kernel for IsFinite<'_> {
        type Output = bool;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> bool {
            is_finite_on(s, self.0)
        }
    }
    dispatch(IsFinite(x))
}

/// [`is_finite`] inside of a kernel.
#[inline(always)]
pub(super) fn is_finite_on<S: Simd>(s: S, x: &[f32]) -> bool {
    // x * 0 is 0 for finite x and NaN otherwise.
    let mut sums = [s.zero(); 4];
    let mut blocks = x.chunks_exact(4 * S::LANES);
    for block in &mut blocks {
        for i in 0..4 {
            sums[i] = s.mul_add(s.load(&block[i * S::LANES..]), s.zero(), sums[i]);
        }
    }
    let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
    s.sum(sum) == 0.0 && blocks.remainder().iter().all(|x| x.is_finite())
}

/// Recomputes the gradients of a causal sequence that do not depend on a non-finite input.
/// `gradients` holds the result of `backward`.
pub(super) fn confine(
    sequence: Sequence,
    saved: &Saved,
    gradients: [&mut [f32]; 3],
    backward: impl Fn(Sequence, &Saved, [&mut [f32]; 3]) -> bool,
) {
    let shape = sequence.shape;
    let (width, tokens) = (shape.width(), sequence.tokens);
    let non_finite = |x: &[f32], width: usize| -> Vec<bool> {
        x.chunks_exact(width).map(|token| !is_finite(token)).collect()
    };
    let [q, k, v] = [sequence.q, sequence.k, sequence.v].map(|x| non_finite(x, width));
    let [o, d_o] = [saved.o, saved.d_o].map(|x| non_finite(x, shape.output_width()));
    let lse = non_finite(saved.lse, shape.query_slots);

    // A query reads earlier keys; the gradient of a key reads later queries.
    let seen_from = (0..tokens).find(|&t| k[t] || v[t]).unwrap_or(tokens);
    let end =
        |non_finite: &dyn Fn(usize) -> bool| (0..tokens).rev().find(|&t| non_finite(t)).map_or(0, |t| t + 1);
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
