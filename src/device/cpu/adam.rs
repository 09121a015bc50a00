//! Gradient clipping and Adam, dense or by rows.

use crate::device::{AdamStep, Clip};
use rayon::prelude::*;

/// Values one task handles; part of the order of summation, so it must not depend on the number of threads.
const CHUNK: usize = 1 << 14;

/// One tensor, as slices; see [`crate::device::AdamTensor`].
pub struct Tensor<'a> {
    pub value: &'a mut [f32],
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
    pub gradient: &'a [f32],
    pub rows: Option<(&'a [u32], usize)>,
}

/// See [`crate::device::Device::adam`]: returns the norm. `finite` is whether the losses are.
pub fn step(step: &AdamStep, tensors: &mut [Tensor], finite: bool) -> f64 {
    let squares: Vec<f64> = tensors.iter().map(|t| square_sum(t.gradient)).collect();
    let global = squares.iter().sum::<f64>().sqrt();
    if !finite || !global.is_finite() {
        return global;
    }
    let correction =
        (1.0 - (step.beta1 as f64).powf(step.step as f64), 1.0 - (step.beta2 as f64).powf(step.step as f64));
    for (tensor, square) in tensors.iter_mut().zip(squares) {
        let (norm, limit) = match step.clip {
            None => (0.0, 1.0),
            Some(Clip::PerTensor(limit)) => (square.sqrt(), limit as f64),
            Some(Clip::Global(limit)) => (global, limit as f64),
        };
        let clip = if norm > limit { (limit / norm) as f32 } else { 1.0 };
        let update = Update { step, clip, correction: (correction.0 as f32, correction.1 as f32) };
        match tensor.rows {
            None => update.dense(tensor),
            Some((rows, width)) => update.rows(tensor, rows, width),
        }
    }
    global
}

fn square_sum(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|x| x.iter().map(|&x| x as f64 * x as f64).sum()).collect();
    parts.iter().sum()
}

struct Update<'a> {
    step: &'a AdamStep,
    clip: f32,
    correction: (f32, f32),
}

impl Update<'_> {
    fn dense(&self, t: &mut Tensor) {
        let moments = t.first.par_chunks_mut(CHUNK).zip(t.second.par_chunks_mut(CHUNK));
        t.value
            .par_chunks_mut(CHUNK)
            .zip(moments)
            .zip(t.gradient.par_chunks(CHUNK))
            .for_each(|((value, (first, second)), gradient)| self.slice(value, first, second, gradient));
    }

    fn rows(&self, t: &mut Tensor, rows: &[u32], width: usize) {
        for (&row, gradient) in rows.iter().zip(t.gradient.chunks_exact(width)) {
            let at = row as usize * width..(row as usize + 1) * width;
            self.slice(&mut t.value[at.clone()], &mut t.first[at.clone()], &mut t.second[at], gradient);
        }
    }

    fn slice(&self, value: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        let AdamStep { lr, beta1, beta2, eps, .. } = *self.step;
        for (((w, m), v), g) in value.iter_mut().zip(first).zip(second).zip(gradient) {
            let g = g * self.clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w -= lr * (*m / self.correction.0) / ((*v / self.correction.1).sqrt() + eps);
        }
    }
}
