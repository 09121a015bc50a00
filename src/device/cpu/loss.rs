//! The losses and their gradients, in float64 row by row: there are few rows and many cancellations.

use rayon::prelude::*;

/// Squared norms below this have no direction: cosine and gradient are 0.
const NO_DIRECTION: f64 = 1e-12;

/// See [`crate::device::Device::rank_loss`].
pub fn rank(
    bpr: f32,
    logit_pos: &[f32],
    logit_neg: &[f32],
    target: &[f32],
    d_pos: &mut [f32],
    d_neg: &mut [f32],
) -> [f64; 2] {
    let rows = target.len() as f64;
    let (mut bce, mut ibl) = (0.0, 0.0);
    for i in 0..target.len() {
        let (pos, neg, z) = (logit_pos[i] as f64, logit_neg[i] as f64, target[i] as f64);
        bce += softplus(pos) - z * pos;
        let sign = 2.0 * z - 1.0;
        let margin = -sign * (pos - neg);
        ibl += softplus(margin);
        let d_margin = bpr as f64 * sigmoid(margin) * -sign;
        d_pos[i] = ((sigmoid(pos) - z + d_margin) / rows) as f32;
        d_neg[i] = (-d_margin / rows) as f32;
    }
    if target.is_empty() { [0.0; 2] } else { [bce / rows, ibl / rows] }
}

/// See [`crate::device::Device::cosine_loss`].
pub fn cosine(width: usize, weight: f32, x: &[f32], y: &[f32], dx: &mut [f32], dy: &mut [f32]) -> f64 {
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

/// `log(1 + exp(x))` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}
