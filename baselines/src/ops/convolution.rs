//! The two convolutions of Caser (Tang and Wang, WSDM 2018, equations 4 to 8) over packed
//! histories, causal, so that the prefixes of a history share them.
//!
//! **Horizontal.** [`windows`] puts the last `h` events in front of each event side by side,
//! latest first, zeros before the oldest: `[s_t | s_(t-1) | .. | s_(t-h+1)]`. A linear layer with
//! ReLU makes `y_t` of it, and [`running_max`] takes the maximum of each column over a prefix. The
//! gradient goes to the earliest event that reaches the maximum. An empty prefix has the maximum 0.
//!
//! **Vertical.** [`Vertical`] is a weighted sum of the latest events of a prefix of `L` events, one
//! weight for each filter `k` and age `j`: `v_k = sum over j < min(L, L_v) of G[k, j] s_(L-j)`.

use super::rows::{pad_columns, transpose_padded};
use dfar::device::cpu::elementwise::{add_assign, unpad_rows};
use dfar::device::cpu::product::{Finish, Left, product};
use dfar::device::cpu::scratch::padded;
use rayon::prelude::*;
use std::ops::Range;

/// The prefixes of packed histories, as in `dfar::batch::Batch`.
#[derive(Clone, Copy, Debug)]
pub struct Prefixes<'a> {
    /// `[B + 1]` tokens of each history.
    pub cu_seqlens: &'a [u32],
    /// `[B + 1]` groups of each history.
    pub group_offsets: &'a [u32],
    /// `[G]` prefix length of each group, ascending within a history.
    pub group_length: &'a [u32],
}

impl Prefixes<'_> {
    /// Tokens and groups of history `b`.
    fn of(&self, b: usize) -> (Range<usize>, Range<usize>) {
        let range = |offsets: &[u32]| offsets[b] as usize..offsets[b + 1] as usize;
        (range(self.cu_seqlens), range(self.group_offsets))
    }
}

/// Cuts a matrix with rows of `width` values into the rows `offsets[b]..offsets[b + 1]`.
fn split<'a, T>(offsets: &[u32], width: usize, mut values: &'a mut [T]) -> Vec<&'a mut [T]> {
    let cut = |w: &[u32]| {
        let len = (w[1] - w[0]) as usize * width;
        values.split_off_mut(..len).expect("the matrix has a row for each index")
    };
    offsets.windows(2).map(cut).collect()
}

/// `y[t] = [x_t | x_(t-1) | .. | x_(t-height+1)]` within each sequence. `x: [N, width]`,
/// `y: [N, height * width]`.
pub fn windows(cu_seqlens: &[u32], width: usize, height: usize, x: &[f32], y: &mut [f32]) {
    for rows in cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize) {
        for (t, y) in rows.clone().zip(y[rows.start * height * width..].chunks_exact_mut(height * width)) {
            for (age, y) in y.chunks_exact_mut(width).enumerate() {
                match t.checked_sub(age).filter(|&t| t >= rows.start) {
                    Some(t) => y.copy_from_slice(&x[t * width..][..width]),
                    None => y.fill(0.0),
                }
            }
        }
    }
}

/// Adds the gradient of [`windows`] to `dx`.
pub fn windows_backward(cu_seqlens: &[u32], width: usize, height: usize, dy: &[f32], dx: &mut [f32]) {
    for rows in cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize) {
        for (t, dy) in rows.clone().zip(dy[rows.start * height * width..].chunks_exact(height * width)) {
            for (age, dy) in dy.chunks_exact(width).enumerate() {
                if let Some(t) = t.checked_sub(age).filter(|&t| t >= rows.start) {
                    add_assign(dy, &mut dx[t * width..][..width]);
                }
            }
        }
    }
}

/// The token of no maximum: the prefix is empty.
const NO_TOKEN: u32 = u32::MAX;

/// `max[g] = max over the tokens of prefix g of y`, column by column, and the earliest token that
/// reaches it. `y: [N, width]`, `max` and `token`: `[G, width]`.
pub fn running_max(prefixes: Prefixes, width: usize, y: &[f32], max: &mut [f32], token: &mut [u32]) {
    let max = split(prefixes.group_offsets, width, max);
    let token = split(prefixes.group_offsets, width, token);
    max.into_par_iter().zip(token).enumerate().for_each(|(b, (max, token))| {
        let (rows, groups) = prefixes.of(b);
        let (mut best, mut at) = (vec![0.0; width], vec![NO_TOKEN; width]);
        let mut seen = rows.start;
        let of_groups = max.chunks_exact_mut(width).zip(token.chunks_exact_mut(width));
        for ((max, token), g) in of_groups.zip(groups) {
            let end = rows.start + prefixes.group_length[g] as usize;
            for t in seen..end {
                let y = &y[t * width..][..width];
                for ((best, at), &y) in best.iter_mut().zip(&mut at).zip(y) {
                    let larger = y > *best || t == rows.start;
                    *best = if larger { y } else { *best };
                    *at = if larger { t as u32 } else { *at };
                }
            }
            seen = end;
            max.copy_from_slice(&best);
            token.copy_from_slice(&at);
        }
    });
}

/// The gradient of [`running_max`]; `dy` is overwritten.
pub fn running_max_backward(prefixes: Prefixes, width: usize, token: &[u32], d_max: &[f32], dy: &mut [f32]) {
    let dy = split(prefixes.cu_seqlens, width, dy);
    dy.into_par_iter().enumerate().for_each(|(b, dy)| {
        let (rows, groups) = prefixes.of(b);
        dy.fill(0.0);
        for g in groups {
            let maxima = token[g * width..].iter().zip(&d_max[g * width..]);
            for (j, (&t, d)) in maxima.take(width).enumerate().filter(|(_, (t, _))| **t != NO_TOKEN) {
                dy[(t as usize - rows.start) * width + j] += d;
            }
        }
    });
}

/// The vertical filters.
#[derive(Clone, Copy)]
pub struct Vertical<'a> {
    /// Width `D` of a token.
    pub width: usize,
    /// Number of filters.
    pub filters: usize,
    /// `[filters, L_v]`, column 0 for the latest event.
    pub w: &'a [f32],
}

impl Vertical<'_> {
    /// `v[g] = [v_0 | v_1 | ..]` of the prefix of each group. `x: [N, D]`, `v: [G, filters * D]`.
    pub fn forward(&self, prefixes: Prefixes, x: &[f32], v: &mut [f32]) {
        let Self { width, filters, .. } = *self;
        let (wide, oldest_first) = (padded(width), self.oldest_first());
        let x = pad_columns(x, width, wide);
        let v = split(prefixes.group_offsets, filters * width, v);
        v.into_par_iter().enumerate().for_each(|(b, v)| {
            let (tokens, groups) = prefixes.of(b);
            let mut out = vec![0.0; filters * wide];
            for (v, g) in v.chunks_exact_mut(filters * width).zip(groups) {
                let (rows, first) = self.latest(tokens.start, prefixes.group_length[g]);
                let w = Left::rows(&oldest_first[first..], self.length());
                let shape = [filters, width, rows.len()];
                product(shape, w, (&x[rows.start * wide..], wide), (&mut out, wide), Finish::Store);
                unpad_rows(&out, width, wide, v);
            }
        });
    }

    /// Adds the gradient of the tokens to `dx`, overwrites that of the weight.
    pub fn backward(&self, prefixes: Prefixes, x: &[f32], dv: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        let Self { width, filters, .. } = *self;
        let (wide, many) = (padded(width), padded(filters));
        let (oldest_first, length) = (self.oldest_first(), self.length());
        let x = pad_columns(x, width, wide);
        let run = |(b, dx): (usize, &mut [f32])| {
            let (tokens, groups) = prefixes.of(b);
            let mut dx_wide = vec![0.0; tokens.len() * wide];
            // Transposed, `[L_v, filters]`, oldest event first.
            let mut dw = vec![0.0; length * many];
            for g in groups {
                let (rows, first) = self.latest(tokens.start, prefixes.group_length[g]);
                let dv = pad_columns(&dv[g * filters * width..][..filters * width], width, wide);
                let w = Left::transposed(&oldest_first[first..], length);
                let here = &mut dx_wide[(rows.start - tokens.start) * wide..];
                product([rows.len(), width, filters], w, (&dv, wide), (here, wide), Finish::Add);
                let x = Left::rows(&x[rows.start * wide..], wide);
                let dvt = transpose_padded(&dv, wide, many);
                let shape = [rows.len(), filters, width];
                product(shape, x, (&dvt, many), (&mut dw[first * many..], many), Finish::Add);
            }
            let rows = dx_wide.chunks_exact(wide).zip(dx.chunks_exact_mut(width));
            rows.for_each(|(from, to)| add_assign(&from[..width], to));
            dw
        };
        let partials: Vec<Vec<f32>> =
            split(prefixes.cu_seqlens, width, dx).into_par_iter().enumerate().map(run).collect();
        let mut sum = vec![0.0; length * many];
        partials.iter().for_each(|partial| add_assign(partial, &mut sum));
        for (k, dw) in dw.chunks_exact_mut(length).enumerate() {
            for (age, dw) in dw.iter_mut().enumerate() {
                *dw = sum[(length - 1 - age) * many + k];
            }
        }
    }

    /// `L_v`
    fn length(&self) -> usize {
        self.w.len() / self.filters
    }

    /// The weights with the order of the columns reversed, the order of the tokens.
    fn oldest_first(&self) -> Vec<f32> {
        self.w.chunks_exact(self.length()).flat_map(|row| row.iter().rev().copied()).collect()
    }

    /// The tokens of a prefix that the filters read, and the column of the first of them.
    fn latest(&self, start: usize, prefix: u32) -> (Range<usize>, usize) {
        let end = start + prefix as usize;
        let count = self.length().min(prefix as usize);
        (end - count..end, self.length() - count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    /// Histories of 4, 0 and 7 events; empty prefixes, and two equal ones.
    const PREFIXES: Prefixes = Prefixes {
        cu_seqlens: &[0, 4, 4, 11],
        group_offsets: &[0, 3, 4, 7],
        group_length: &[0, 3, 4, 0, 2, 2, 7],
    };

    fn tokens_of_group(g: usize) -> Range<usize> {
        let start = if g < 4 { 0 } else { 4 };
        start..start + PREFIXES.group_length[g] as usize
    }

    fn dot(x: &[f64], d: &[f32]) -> f64 {
        x.iter().zip(d).map(|(x, &d)| x * f64::from(d)).sum()
    }

    #[test]
    fn a_window_holds_the_latest_events_first_and_zeros_before_the_oldest() {
        let x: Vec<f32> = (1..=11).map(|x| x as f32).collect();
        let mut y = vec![f32::NAN; 33];
        windows(PREFIXES.cu_seqlens, 1, 3, &x, &mut y);
        assert_eq!(y[..12], [1.0, 0.0, 0.0, 2.0, 1.0, 0.0, 3.0, 2.0, 1.0, 4.0, 3.0, 2.0]);
        assert_eq!(y[12..18], [5.0, 0.0, 0.0, 6.0, 5.0, 0.0]);
        // The transpose: <windows(x), dy> = <x, windows_backward(dy)>.
        let dy = random(33, 1);
        let mut dx = vec![0.0; 11];
        windows_backward(PREFIXES.cu_seqlens, 1, 3, &dy, &mut dx);
        let inner = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
        assert!((inner(&y, &dy) - inner(&x, &dx)).abs() < 1e-4);
    }

    #[test]
    fn the_maximum_of_a_prefix_and_its_gradient_agree_with_the_definition() {
        let width = 5;
        let y = random(11 * width, 1);
        let (mut max, mut token) = (vec![f32::NAN; 7 * width], vec![7; 7 * width]);
        running_max(PREFIXES, width, &y, &mut max, &mut token);
        let naive = |y: &[f64]| -> Vec<f64> {
            let of = |g: usize, j| tokens_of_group(g).map(move |t| y[t * width + j]).reduce(f64::max);
            (0..7).flat_map(|g| (0..width).map(move |j| of(g, j).unwrap_or(0.0))).collect()
        };
        assert_close("max", &max, &naive(&wide(&y)), 1e-7);
        let d_max = random(max.len(), 2);
        let mut dy = vec![f32::NAN; y.len()];
        running_max_backward(PREFIXES, width, &token, &d_max, &mut dy);
        let want = differences(&|at| dot(&naive(&at[0]), &d_max), &[wide(&y)]);
        assert_close("dy", &dy, &want[0], 1e-5);
    }

    #[test]
    fn the_gradient_of_a_tie_goes_to_the_earliest_event() {
        let (mut max, mut token) = (vec![0.0; 7], vec![0; 7]);
        running_max(PREFIXES, 1, &[0.5; 11], &mut max, &mut token);
        assert_eq!(token, [NO_TOKEN, 0, 0, NO_TOKEN, 4, 4, 4]);
        assert_eq!(max, [0.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5]);
        let mut dy = vec![f32::NAN; 11];
        running_max_backward(PREFIXES, 1, &token, &[1.0; 7], &mut dy);
        assert_eq!(dy, [2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn vertical_filters_and_their_gradients_agree_with_the_definition() {
        for (width, filters, length) in [(3, 2, 5), (16, 4, 9), (37, 17, 1)] {
            let (x, w) = (random(11 * width, 1), random(filters * length, 2));
            let naive = |x: &[f64], w: &[f64]| {
                let mut v = vec![];
                for (g, k, d) in
                    (0..7).flat_map(|g| (0..filters * width).map(move |i| (g, i / width, i % width)))
                {
                    let latest = tokens_of_group(g).rev().take(length).enumerate();
                    v.push(latest.map(|(j, t)| w[k * length + j] * x[t * width + d]).sum());
                }
                v
            };
            let vertical = Vertical { width, filters, w: &w };
            let mut v = vec![f32::NAN; 7 * filters * width];
            vertical.forward(PREFIXES, &x, &mut v);
            let at = [wide(&x), wide(&w)];
            assert_close("v", &v, &naive(&at[0], &at[1]), 1e-5);
            let dv = random(v.len(), 3);
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![f32::NAN; w.len()]);
            vertical.backward(PREFIXES, &x, &dv, &mut dx, &mut dw);
            let want = differences(&|at| dot(&naive(&at[0], &at[1]), &dv), &at);
            assert_close("dx", &dx, &want[0], 5e-5);
            assert_close("dw", &dw, &want[1], 5e-5);
        }
    }
}
