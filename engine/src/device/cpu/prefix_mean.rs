//! Means of the prefixes of each sequence, in one pass over it.

use super::slices::Slices;
use super::{Cpu, Done, Floats, Indices};
use crate::device::{PrefixMean, Prefixes};
use rayon::prelude::*;

impl PrefixMean for Cpu {
    fn prefix_mean(&self, width: usize, prefixes: Prefixes<&Indices>, x: &Floats, mean: &mut Floats) -> Done {
        let Prefixes { cu_seqlens, group_offsets, count, divisor } = prefixes.slices();
        split_rows(width, group_offsets, mean).into_par_iter().enumerate().for_each_init(
            || vec![0f64; width],
            |sum, (b, mean)| {
                sum.fill(0.0);
                let x = &x[cu_seqlens[b] as usize * width..cu_seqlens[b + 1] as usize * width];
                let mut token = 0;
                for (g, mean) in (group_offsets[b] as usize..).zip(mean.chunks_exact_mut(width)) {
                    while token < count[g] as usize {
                        sum.iter_mut().zip(&x[token * width..][..width]).for_each(|(s, &x)| *s += x as f64);
                        token += 1;
                    }
                    let factor = reciprocal(divisor[g]);
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
        let Prefixes { cu_seqlens, group_offsets, count, divisor } = prefixes.slices();
        let dmean = dmean.slices();
        split_rows(width, cu_seqlens, dx).into_par_iter().enumerate().for_each_init(
            || vec![0f64; width],
            |sum, (b, dx)| {
                sum.fill(0.0);
                // From the last token backwards: the sum covers the groups that contain the token.
                let mut groups = (group_offsets[b] as usize..group_offsets[b + 1] as usize).rev().peekable();
                for (token, dx) in dx.chunks_exact_mut(width).enumerate().rev() {
                    while let Some(g) = groups.next_if(|&g| count[g] as usize > token) {
                        let factor = reciprocal(divisor[g]);
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

fn reciprocal(divisor: u32) -> f64 {
    if divisor == 0 { 0.0 } else { 1.0 / divisor as f64 }
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
