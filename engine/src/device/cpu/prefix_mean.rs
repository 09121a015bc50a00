//! Means of the prefixes of each sequence, in one pass over it.

use super::slices::Slices;
use super::{Cpu, Done, Floats, Indices};
use crate::device::{PrefixMean, Prefixes};
use rayon::prelude::*;

impl PrefixMean for Cpu {
    fn prefix_mean(&self, width: usize, prefixes: Prefixes<&Indices>, x: &Floats, mean: &mut Floats) -> Done {
        let prefixes = prefixes.slices();
        let Prefixes { cu_seqlens, group_offsets, count, .. } = prefixes;
        split_rows(width, group_offsets, mean).into_par_iter().enumerate().for_each_init(
            || vec![0f64; width],
            |sum, (b, mean)| {
                sum.fill(0.0);
                let weights = Weights::new(&prefixes, b);
                let x = &x[cu_seqlens[b] as usize * width..cu_seqlens[b + 1] as usize * width];
                let mut token = 0;
                for (g, mean) in (group_offsets[b] as usize..).zip(mean.chunks_exact_mut(width)) {
                    while token < count[g] as usize {
                        let kept = weights.kept(token);
                        let x = &x[token * width..][..width];
                        sum.iter_mut().zip(x).for_each(|(s, &x)| *s = *s * kept + x as f64);
                        token += 1;
                    }
                    let factor = weights.factor(g);
                    mean.iter_mut().zip(sum.iter()).for_each(|(m, s)| *m = (s * factor) as f32);
                }
            },
        );
        Ok(())
    }

    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices>,
        dmean: &Floats,
        dx: &mut Floats,
    ) -> Done {
        let prefixes = prefixes.slices();
        let Prefixes { cu_seqlens, group_offsets, count, .. } = prefixes;
        let dmean = dmean.slices();
        split_rows(width, cu_seqlens, dx).into_par_iter().enumerate().for_each_init(
            || vec![0f64; width],
            |sum, (b, dx)| {
                sum.fill(0.0);
                let weights = Weights::new(&prefixes, b);
                // From the last token backwards: the sum covers the groups that contain the token.
                let mut groups = (group_offsets[b] as usize..group_offsets[b + 1] as usize).rev().peekable();
                let tokens = dx.len() / width;
                for (token, dx) in dx.chunks_exact_mut(width).enumerate().rev() {
                    if token + 1 < tokens {
                        let kept = weights.kept(token + 1);
                        sum.iter_mut().for_each(|s| *s *= kept);
                    }
                    while let Some(g) = groups.next_if(|&g| count[g] as usize > token) {
                        let factor = weights.factor(g);
                        sum.iter_mut()
                            .zip(&dmean[g * width..][..width])
                            .for_each(|(s, &d)| *s += d as f64 * factor);
                    }
                    dx.iter_mut().zip(sum.iter()).for_each(|(dx, s)| *dx = *s as f32);
                }
            },
        );
        Ok(())
    }
}

/// The weights of the rows of a sequence, relative to its newest row so far.
struct Weights<'a> {
    count: &'a [u32],
    divisor: &'a [u32],
    /// The rate, and the positions of the rows.
    recency: Option<(f64, &'a [u32])>,
}

impl<'a> Weights<'a> {
    fn new(prefixes: &Prefixes<&'a [u32]>, sequence: usize) -> Self {
        let &Prefixes { cu_seqlens, count, divisor, recency, .. } = prefixes;
        let rows = cu_seqlens[sequence] as usize..cu_seqlens[sequence + 1] as usize;
        Self { count, divisor, recency: recency.map(|recency| (recency.rate(), &recency.position[rows])) }
    }

    /// The share of its weight that a row keeps when row `token` follows.
    fn kept(&self, token: usize) -> f64 {
        match self.recency {
            Some((rate, position)) if token > 0 => {
                (-rate * f64::from(position[token] - position[token - 1])).exp()
            }
            _ => 1.0,
        }
    }

    /// The factor of the sum of the rows of prefix `g`.
    fn factor(&self, g: usize) -> f64 {
        let (count, length) = (self.count[g] as usize, f64::from(self.divisor[g]));
        match self.recency {
            _ if length == 0.0 => 0.0,
            None => 1.0 / length,
            Some(_) if count == 0 => 0.0,
            Some((rate, position)) => {
                let age = length - 1.0 - f64::from(position[count - 1]);
                // Divided by the geometric series 1 + w + .. + w^(L - 1).
                (-rate * age).exp() * (-rate).exp_m1() / (-rate * length).exp_m1()
            }
        }
    }
}

/// The rows of each sequence.
fn split_rows<'a>(width: usize, offsets: &[u32], mut x: &'a mut [f32]) -> Vec<&'a mut [f32]> {
    offsets
        .windows(2)
        .map(|o| {
            let (head, tail) = std::mem::take(&mut x).split_at_mut((o[1] - o[0]) as usize * width);
            x = tail;
            head
        })
        .collect()
}
