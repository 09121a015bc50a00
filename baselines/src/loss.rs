//! The ranking loss of all systems, and its gradient.

use dfar::batch::Batch;
use dfar::device::cpu::elementwise::{sigmoid, softplus};
use serde::{Deserialize, Serialize};

/// Which loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Ranking {
    /// Binary cross-entropy: mean over rows of `softplus(logit) - z logit`.
    #[default]
    Bce,
    /// Softmax over the candidates of a group, as the published experiment used for these systems:
    /// mean over groups of `-sum_c z_c log softmax_c(logit)`.
    Softmax,
}

impl Ranking {
    /// The loss, and its gradient to `d_logits`. 0 for a batch without rows.
    pub fn loss(self, batch: &Batch, logits: &[f32], d_logits: &mut [f32]) -> f64 {
        if batch.rows() == 0 {
            return 0.0;
        }
        match self {
            Self::Bce => bce(&batch.target, logits, d_logits),
            Self::Softmax => {
                let group = |bounds: &[u32]| {
                    let rows = bounds[0] as usize..bounds[1] as usize;
                    let d_logits = &mut d_logits[rows.clone()];
                    softmax(&batch.target[rows.clone()], &logits[rows], 1.0 / batch.groups() as f64, d_logits)
                };
                batch.row_offsets.windows(2).map(group).sum::<f64>() / batch.groups() as f64
            }
        }
    }
}

fn bce(target: &[f32], logits: &[f32], d_logits: &mut [f32]) -> f64 {
    let rows = target.len() as f64;
    let mut sum = 0.0;
    for ((&z, &logit), d) in target.iter().zip(logits).zip(d_logits) {
        let (z, logit) = (f64::from(z), f64::from(logit));
        sum += softplus(logit) - z * logit;
        *d = ((sigmoid(logit) - z) / rows) as f32;
    }
    sum / rows
}

/// The loss of one group without, its gradient with `weight`.
fn softmax(target: &[f32], logits: &[f32], weight: f64, d_logits: &mut [f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |logit: &f32| f64::from(logit - largest).exp();
    let denominator: f64 = logits.iter().map(exp).sum();
    let positives: f64 = target.iter().map(|&z| f64::from(z)).sum();
    let mut loss = 0.0;
    for ((&z, logit), d) in target.iter().zip(logits).zip(d_logits) {
        let z = f64::from(z);
        loss += z * (denominator.ln() - f64::from(logit - largest));
        *d = (weight * (positives * exp(logit) / denominator - z)) as f32;
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_those_of_the_losses() {
        let (target, logits) = ([1.0, 0.0, 0.0, 1.0], [0.5f32, -1.25, 3.0, -2.0]);
        let loss = |is_softmax: bool, x: &[f32], d: &mut [f32]| match is_softmax {
            false => bce(&target, x, d),
            true => softmax(&target, x, 1.0, d),
        };
        for is_softmax in [false, true] {
            let (mut d, mut ignored) = ([0.0; 4], [0.0; 4]);
            loss(is_softmax, &logits, &mut d);
            for i in 0..4 {
                let mut moved = |by: f32| {
                    let mut x = logits;
                    x[i] += by;
                    loss(is_softmax, &x, &mut ignored)
                };
                let slope = (moved(0.0078125) - moved(-0.0078125)) / 0.015625;
                assert!((slope - f64::from(d[i])).abs() < 1e-4, "{i}: {slope}, {}", d[i]);
            }
        }
    }
}
