//! The losses and their gradients, in float64 row by row: there are few rows and many
//! cancellations.

use super::elementwise::{sigmoid, softplus};
use super::slices::Slices;
use super::{Cpu, Done, Doubles, Floats};
use crate::device::{Interests, Losses, Slot};
use rayon::prelude::*;

/// Vectors with a smaller squared norm have no direction: cosine and gradient are 0.
const NO_DIRECTION: f64 = 1e-12;

impl Losses for Cpu {
    fn rank_loss(
        &self,
        bpr: f32,
        logits: Interests<&Floats>,
        target: &Floats,
        gradients: Interests<&mut Floats>,
        losses: Slot<Doubles>,
    ) -> Done {
        let means = rank(bpr, logits.slices(), target, gradients.slices());
        losses.values[losses.index..losses.index + 2].copy_from_slice(&means);
        Ok(())
    }
    fn cosine_loss(
        &self,
        width: usize,
        weight: f32,
        vectors: Interests<&Floats>,
        gradients: Interests<&mut Floats>,
        loss: Slot<Doubles>,
    ) -> Done {
        loss.values[loss.index] = cosine(width, weight, vectors.slices(), gradients.slices());
        Ok(())
    }
}

/// Means of BCE and IBL.
fn rank(bpr: f32, logits: Interests<&[f32]>, target: &[f32], gradients: Interests<&mut [f32]>) -> [f64; 2] {
    let rows = target.len() as f64;
    let (mut bce, mut ibl) = (0.0, 0.0);
    for (i, &z) in target.iter().enumerate() {
        let (pos, neg, z) = (logits.positive[i] as f64, logits.negative[i] as f64, z as f64);
        bce += softplus(pos) - z * pos;
        let sign = 2.0 * z - 1.0;
        let margin = -sign * (pos - neg);
        ibl += softplus(margin);
        let d_margin = bpr as f64 * sigmoid(margin) * -sign;
        gradients.positive[i] = ((sigmoid(pos) - z + d_margin) / rows) as f32;
        gradients.negative[i] = (-d_margin / rows) as f32;
    }
    if target.is_empty() { [0.0; 2] } else { [bce / rows, ibl / rows] }
}

/// Mean cosine.
fn cosine(
    width: usize,
    weight: f32,
    Interests { positive: x, negative: y }: Interests<&[f32]>,
    Interests { positive: dx, negative: dy }: Interests<&mut [f32]>,
) -> f64 {
    let rows = x.len() / width;
    if rows == 0 {
        return 0.0;
    }
    let weight = weight as f64 / rows as f64;
    let rows_of = |x| <[f32]>::par_chunks_exact(x, width);
    let cosines: Vec<f64> = dx
        .par_chunks_exact_mut(width)
        .zip(dy.par_chunks_exact_mut(width))
        .zip(rows_of(x).zip(rows_of(y)))
        .with_min_len(64)
        .map(|((dx, dy), (x, y))| {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
            let (xx, yy) = (dot(x, x), dot(y, y));
            if xx < NO_DIRECTION || yy < NO_DIRECTION {
                return 0.0;
            }
            let norms = (xx * yy).sqrt();
            let cosine = dot(x, y) / norms;
            for i in 0..width {
                let (x, y) = (x[i] as f64, y[i] as f64);
                dx[i] += (weight * (y / norms - cosine * x / xx)) as f32;
                dy[i] += (weight * (x / norms - cosine * y / yy)) as f32;
            }
            cosine
        })
        .collect();
    cosines.iter().sum::<f64>() / rows as f64
}
