//! Layer norm over rows.

use super::simd::{Kernel, Simd, dispatch};
use super::slices::Slices;
use super::{Cpu, Done, Floats};
use crate::device::{LayerNorm, LayerNormGradients, Norm, Output, Store};
use rayon::prelude::*;

/// Added to the variance, inside the root.
const EPS: f32 = 1e-8;
/// Rows per task. It fixes the order of summation, so it must not depend on the number of threads.
const ROWS: usize = 128;

impl Norm for Cpu {
    fn layer_norm(&self, norm: LayerNorm<&Floats>, x: &Floats, y: &mut Floats) -> Done {
        let LayerNorm { width, gamma, beta } = norm.slices();
        let chunk = ROWS * width;
        y.par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk))
            .for_each(|(y, x)| dispatch(Forward { width, x, gamma, beta, y }));
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats>,
        x: &Floats,
        dy: &Floats,
        gradients: LayerNormGradients<&mut Floats>,
    ) -> Done {
        let LayerNorm { width, gamma, .. } = norm.slices();
        let LayerNormGradients { dx: Output { values: dx, store }, dgamma, dbeta } = gradients.slices();
        let chunk = ROWS * width;
        let parts: Vec<(Vec<f32>, Vec<f32>)> = dx
            .par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
            .map(|(dx, (x, dy))| dispatch(Backward { width, x, gamma, dy, dx, store }))
            .collect();
        let mut sum = vec![0f64; 2 * width];
        for (part_gamma, part_beta) in &parts {
            for (sum, &part) in sum.iter_mut().zip(part_gamma.iter().chain(part_beta)) {
                *sum += part as f64;
            }
        }
        for (out, sum) in dgamma.iter_mut().chain(dbeta).zip(sum) {
            *out = sum as f32;
        }
        Ok(())
    }
}

struct Forward<'a> {
    width: usize,
    x: &'a [f32],
    gamma: &'a [f32],
    beta: &'a [f32],
    y: &'a mut [f32],
}

// Plain loops: inlined into the entry points of `dispatch`, they are vectorised for each
// instruction set.
impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, y) in self.x.chunks_exact(self.width).zip(self.y.chunks_exact_mut(self.width)) {
            let (mean, inverse) = statistics(x);
            for (((y, x), gamma), beta) in y.iter_mut().zip(x).zip(self.gamma).zip(self.beta) {
                *y = (x - mean) * inverse * gamma + beta;
            }
        }
    }
}

struct Backward<'a> {
    width: usize,
    x: &'a [f32],
    gamma: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    store: Store,
}

impl Kernel for Backward<'_> {
    type Output = (Vec<f32>, Vec<f32>);
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let width = self.width;
        let (mut dgamma, mut dbeta) = (vec![0f32; width], vec![0f32; width]);
        let (mut normal, mut scaled) = (vec![0f32; width], vec![0f32; width]);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(width)) {
            let (mean, inverse) = statistics(x);
            for i in 0..width {
                normal[i] = (x[i] - mean) * inverse;
                scaled[i] = dy[i] * self.gamma[i];
                dgamma[i] += dy[i] * normal[i];
                dbeta[i] += dy[i];
            }
            let of_scaled = lane_sum(width, |i| scaled[i]) / width as f32;
            let of_product = lane_sum(width, |i| scaled[i] * normal[i]) / width as f32;
            for i in 0..width {
                let gradient = inverse * (scaled[i] - of_scaled - normal[i] * of_product);
                dx[i] = if self.store == Store::Add { dx[i] + gradient } else { gradient };
            }
        }
        (dgamma, dbeta)
    }
}

/// Mean and reciprocal standard deviation.
#[inline(always)]
fn statistics(x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = lane_sum(x.len(), |i| x[i]) / n;
    let variance = lane_sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1.0 / (variance + EPS).sqrt())
}

/// Sums in sixteen interleaved partial sums, which the compiler can keep in vector lanes.
#[inline(always)]
fn lane_sum(n: usize, x: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = n / 16 * 16;
    for base in (0..whole).step_by(16) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += x(base + lane);
        }
    }
    for i in whole..n {
        lanes[i - whole] += x(i);
    }
    lanes.iter().sum()
}
