//! Gradient clipping and Adam, dense or by rows.

use super::slices::Slices;
use super::{Cpu, Done, Doubles, Floats, Indices};
use crate::device::{AdamRows, AdamStep, AdamTensor, Clip, Optimizer, Slot};
use rayon::prelude::*;

/// Values per task. It fixes the order of summation, so it must not depend on the number of
/// threads.
const CHUNK: usize = 1 << 14;

type Tensor<'a> = AdamTensor<'a, Floats, Indices>;

impl Optimizer for Cpu {
    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [Tensor],
        norm: Slot<Doubles>,
        previous: Option<&Doubles>,
    ) -> Done {
        let Slot { values, index } = norm;
        let before = previous.is_none_or(|previous| previous[index].is_finite());
        let finite = before && values[..index].iter().all(|loss| loss.is_finite());
        values[index] = clip_and_update(step, tensors, finite);
        Ok(())
    }
}

/// Returns the norm of all gradients, or NaN if the step is refused. `finite`: whether the losses of
/// the step are, and the step before was not refused.
fn clip_and_update(step: &AdamStep, tensors: &mut [Tensor], finite: bool) -> f64 {
    let squares: Vec<f64> = tensors.iter().map(|t| square_sum(t.gradient)).collect();
    let global = squares.iter().sum::<f64>().sqrt();
    if !finite || !global.is_finite() {
        return f64::NAN;
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
            Some(rows) => update.rows(tensor, rows),
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

    fn rows(&self, t: &mut Tensor, AdamRows { index, width }: AdamRows<&Indices>) {
        let (value, first, second) = (t.value.slices(), t.first.slices(), t.second.slices());
        for (&row, gradient) in index.iter().zip(t.gradient.chunks_exact(width)) {
            let at = row as usize * width..(row as usize + 1) * width;
            self.slice(&mut value[at.clone()], &mut first[at.clone()], &mut second[at], gradient);
        }
    }

    fn slice(&self, value: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        let AdamStep { lr, beta1, beta2, eps, .. } = *self.step;
        for (((w, m), v), g) in value.iter_mut().zip(first).zip(second).zip(gradient) {
            let g = g * self.clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            // The moment of a unit without gradient (a ReLU that is always 0) would decay to
            // subnormal numbers, which are slow, and stay there. It has no effect long before.
            *m = if m.abs() < 1e-30 { 0.0 } else { *m };
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w -= lr * (*m / self.correction.0) / ((*v / self.correction.1).sqrt() + eps);
        }
    }
}
