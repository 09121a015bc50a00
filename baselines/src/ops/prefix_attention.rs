//! Attention of a candidate over the steps of its prefix, with scores of one inner product:
//!
//! ```text
//! l_t = k_t . e     a = softmax over the steps of l
//! ```
//!
//! With `k_t = h_t A` this is the bilinear attention of DIEN (Zhou et al., AAAI 2019, equation 14).
//! The weights gate a recurrence, so there is no weighted sum here. Backward, from `da`:
//!
//! ```text
//! dl_t = a_t (da_t - sum_s a_s da_s)     dk_t = dl_t e     de = sum_t dl_t k_t
//! ```

use super::rows::pad_columns;
use super::sequences::{RangeSums, Sequences};
use dfar::device::cpu::elementwise::unpad_rows;
use dfar::device::cpu::scratch::padded;
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Sequences of a task.
const TASK: usize = 64;

/// Attention of one candidate for each sequence.
#[derive(Clone, Copy)]
pub struct PrefixAttention<'a> {
    /// Width `D`.
    pub width: usize,
    /// The prefixes, as rows of `key`.
    pub sequences: Sequences<'a>,
    /// `[N, D]`
    pub key: &'a [f32],
    /// `[S, D]` candidate of each sequence.
    pub query: &'a [f32],
}

impl PrefixAttention<'_> {
    /// Writes the weights `[steps]`.
    ///
    /// # Panics
    /// If a length contradicts the width or the sequences.
    pub fn forward(&self, mut weights: &mut [f32]) {
        let padded = self.padded();
        assert_eq!(weights.len(), self.sequences.steps(), "weights is not [steps]");
        let mut jobs = Vec::new();
        for task in self.sequences.tasks(TASK) {
            let steps = self.sequences.steps_of(&task).len();
            jobs.push((weights.split_off_mut(..steps).expect("weights is [steps]"), task));
        }
        jobs.into_par_iter().for_each(|(weights, task)| dispatch(Forward(&padded, task, weights)));
    }

    /// Gradients of keys `[N, D]` and queries `[S, D]`, both overwritten, from those of the
    /// weights.
    ///
    /// # Panics
    /// If a length contradicts the width or the sequences.
    pub fn backward(&self, weights: &[f32], d_weights: &[f32], d_key: &mut [f32], d_query: &mut [f32]) {
        let Self { width, sequences, .. } = *self;
        let padded = self.padded();
        assert!(weights.len() == sequences.steps() && d_weights.len() == weights.len());
        assert!(d_key.len() == self.key.len() && d_query.len() == self.query.len());
        let tasks: Vec<_> = sequences.tasks(TASK).collect();
        let run = |task: Range<usize>| {
            let inputs = sequences.inputs_of(&task);
            let mut d_key = vec![0.0; inputs.len() * padded.wide];
            let mut d_query = vec![0.0; task.len() * padded.wide];
            let out = [&mut d_key[..], &mut d_query[..]];
            dispatch(Backward { attention: &padded, task, first: inputs.start, weights, d_weights, out });
            (inputs.start, d_key, d_query)
        };
        let partials: Vec<_> = tasks.into_par_iter().map(run).collect();
        let mut sums = RangeSums::new(d_key.len() / width, padded.wide);
        let mut rows = d_query.chunks_mut(TASK * width);
        for (start, d_key, d_query) in partials {
            sums.add(start, &d_key);
            unpad_rows(&d_query, width, padded.wide, rows.next().expect("a task has sequences"));
        }
        unpad_rows(&sums.values, width, padded.wide, d_key);
    }

    fn padded(&self) -> Padded<'_> {
        let Self { width, sequences, key, query } = *self;
        sequences.check(key.len() / width);
        assert_eq!(query.len(), sequences.count() * width, "query is not [S, D]");
        let wide = padded(width);
        let [key, query] = [key, query].map(|x| pad_columns(x, width, wide));
        Padded { wide, sequences, key, query }
    }
}

/// The rows padded with zeros to whole vectors.
struct Padded<'a> {
    wide: usize,
    sequences: Sequences<'a>,
    key: Cow<'a, [f32]>,
    query: Cow<'a, [f32]>,
}

impl Padded<'_> {
    /// The query and the keys of sequence `i`.
    #[inline(always)]
    fn of(&self, i: usize) -> (&[f32], &[f32]) {
        let wide = self.wide;
        let keys = &self.key[self.sequences.first[i] as usize * wide..][..self.sequences.length(i) * wide];
        (&self.query[i * wide..][..wide], keys)
    }
}

struct Forward<'a>(&'a Padded<'a>, Range<usize>, &'a mut [f32]);

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(attention, task, mut weights) = self;
        let mut padded_row = Vec::new();
        for i in task {
            let (query, keys) = attention.of(i);
            let steps = attention.sequences.length(i);
            // Columns behind the last step have a score of -inf, hence a weight of 0.
            padded_row.clear();
            padded_row.resize(padded(steps), f32::NEG_INFINITY);
            for (key, score) in keys.chunks_exact(attention.wide).zip(&mut padded_row) {
                let mut sum = s.zero();
                for j in (0..query.len()).step_by(S::LANES) {
                    sum = s.mul_add(s.load(&key[j..]), s.load(&query[j..]), sum);
                }
                *score = s.sum(sum);
            }
            softmax(s, &mut padded_row);
            let (row, rest) = weights.split_at_mut(steps);
            row.copy_from_slice(&padded_row[..steps]);
            weights = rest;
        }
    }
}

/// Softmax of whole vectors, in place.
#[inline(always)]
fn softmax<S: Simd>(s: S, x: &mut [f32]) {
    let mut max = s.splat(f32::NEG_INFINITY);
    for x in x.chunks_exact(S::LANES) {
        max = s.max(max, s.load(x));
    }
    let shift = s.splat(s.max_lane(max));
    let mut total = s.zero();
    for x in x.chunks_exact_mut(S::LANES) {
        let value = s.exp2(s.mul(s.sub(s.load(x), shift), s.splat(std::f32::consts::LOG2_E)));
        total = s.add(total, value);
        s.store(value, x);
    }
    let scale = s.splat(1.0 / s.sum(total));
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(s.mul(s.load(x), scale), x);
    }
}

struct Backward<'a> {
    attention: &'a Padded<'a>,
    task: Range<usize>,
    first: usize,
    weights: &'a [f32],
    d_weights: &'a [f32],
    /// Gradients of the keys of the task, added to, and of its queries.
    out: [&'a mut [f32]; 2],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { attention, task, first, weights, d_weights, out: [d_key, d_query] } = self;
        let (sequences, wide) = (attention.sequences, attention.wide);
        for (i, d_query) in task.zip(d_query.chunks_exact_mut(wide)) {
            let (query, keys) = attention.of(i);
            let steps = sequences.steps_of(&(i..i + 1));
            if steps.is_empty() {
                continue; // Its first row can lie outside the rows of the task.
            }
            let (a, da) = (&weights[steps.clone()], &d_weights[steps]);
            let mean: f32 = a.iter().zip(da).map(|(a, da)| a * da).sum();
            let d_keys = &mut d_key[(sequences.first[i] as usize - first) * wide..];
            let rows = keys.chunks_exact(wide).zip(d_keys.chunks_exact_mut(wide));
            for ((key, d_key), (a, da)) in rows.zip(a.iter().zip(da)) {
                let dl = s.splat(a * (da - mean));
                for j in (0..wide).step_by(S::LANES) {
                    s.store(s.mul_add(dl, s.load(&query[j..]), s.load(&d_key[j..])), &mut d_key[j..]);
                    s.store(s.mul_add(dl, s.load(&key[j..]), s.load(&d_query[j..])), &mut d_query[j..]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    fn naive(width: usize, sequences: Sequences, key: &[f64], query: &[f64]) -> Vec<f64> {
        let mut weights = vec![];
        for i in 0..sequences.count() {
            let score = |t: usize| {
                let row = (sequences.first[i] as usize + t) * width;
                (0..width).map(|j| key[row + j] * query[i * width + j]).sum::<f64>()
            };
            let e: Vec<f64> = (0..sequences.length(i)).map(|t| score(t).exp()).collect();
            let sum: f64 = e.iter().sum();
            weights.extend(e.iter().map(|e| e / sum));
        }
        weights
    }

    #[test]
    fn weights_and_gradients_agree_with_the_equations_in_f64() {
        // The last sequences are empty: behind the rows of a task, and a task of empty ones alone.
        let lengths: Vec<u32> = (0..70).map(|i| i * 7 % 5).chain([40]).chain([0; 122]).collect();
        let mut offsets = vec![0];
        lengths.iter().for_each(|l| offsets.push(offsets.last().unwrap() + l));
        let first: Vec<u32> = (0..71).map(|i| i / 10).chain([60; 122]).collect();
        for width in [3, 16, 37] {
            let sequences = Sequences { first: &first, offsets: &offsets };
            let (key, query) = (random(61 * width, 1), random(193 * width, 2));
            let attention = PrefixAttention { width, sequences, key: &key, query: &query };
            let mut weights = vec![f32::NAN; sequences.steps()];
            attention.forward(&mut weights);
            let at = [wide(&key), wide(&query)];
            assert_close("weights", &weights, &naive(width, sequences, &at[0], &at[1]), 1e-5);
            let d_weights = random(weights.len(), 3);
            let (mut d_key, mut d_query) = (vec![f32::NAN; key.len()], vec![f32::NAN; query.len()]);
            attention.backward(&weights, &d_weights, &mut d_key, &mut d_query);
            let want = differences(
                &|at| {
                    let weights = naive(width, sequences, &at[0], &at[1]);
                    weights.iter().zip(&d_weights).map(|(a, &d)| a * f64::from(d)).sum()
                },
                &at,
            );
            assert_close("d_key", &d_key, &want[0], 5e-5);
            assert_close("d_query", &d_query, &want[1], 5e-5);
        }
    }
}
