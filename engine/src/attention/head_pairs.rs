//! Attention weight by the feedback of the two tokens (Figure 4 of the paper).
//!
//! The weights are recomputed from queries, keys and softmax denominators, one at a time, and added
//! up at once: no matrix of weights exists.

use super::{FhaOptions, LabelMask, Normalization, Pairing};
use rayon::prelude::*;
use std::ops::AddAssign;

/// Sums over pairs of a query token and a visible key token, `[label of the key][label of the
/// query]`; 0 is a skipped event, 1 a liked one.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct HeadPairs {
    /// Attention weight over all heads.
    pub weight: [[f64; 2]; 2],
    /// Pairs of tokens.
    pub pairs: [[u64; 2]; 2],
}

impl HeadPairs {
    /// Mean weight of a pair of tokens, over all heads together; 0 without pairs.
    pub fn mean(&self, key: usize, query: usize) -> f64 {
        match self.pairs[key][query] {
            0 => 0.0,
            pairs => self.weight[key][query] / pairs as f64,
        }
    }
}

impl AddAssign for HeadPairs {
    fn add_assign(&mut self, more: Self) {
        let weights = self.weight.iter_mut().flatten().zip(more.weight.into_iter().flatten());
        weights.for_each(|(sum, more)| *sum += more);
        let pairs = self.pairs.iter_mut().flatten().zip(more.pairs.into_iter().flatten());
        pairs.for_each(|(sum, more)| *sum += more);
    }
}

/// Queries, keys (`[N, H, d]` each) and the logarithms of the denominators (`[N, Q]`) of an
/// attention over packed sequences, and the label of each token, which a mask need not read.
#[derive(Clone, Copy, Debug)]
pub struct Attended<'a> {
    /// Queries.
    pub q: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Logarithms of the denominators.
    pub lse: &'a [f32],
    /// Prefix sums of the sequence lengths.
    pub cu_seqlens: &'a [u32],
    /// Feedback of each token, 0 or 1.
    pub label: &'a [u8],
}

/// Sums the weights that reach the output: those that the label mask drops count as 0. Equal for
/// any number of threads.
///
/// # Panics
/// If the lengths do not agree.
pub fn head_pairs(options: &FhaOptions, attended: Attended) -> HeadPairs {
    let tokens = attended.label.len();
    let width = options.heads * options.head_dim;
    assert_eq!([attended.q.len(), attended.k.len()], [tokens * width; 2], "q and k are [N, H, d]");
    assert_eq!(attended.lse.len(), options.lse_len(tokens), "lse is [N, Q]");
    let of_sequence = |bounds: &[u32]| sequence(options, attended, bounds[0] as usize, bounds[1] as usize);
    let sums: Vec<HeadPairs> = attended.cu_seqlens.par_windows(2).map(of_sequence).collect();
    let mut total = HeadPairs::default();
    sums.into_iter().for_each(|sum| total += sum);
    total
}

fn sequence(options: &FhaOptions, x: Attended, start: usize, end: usize) -> HeadPairs {
    let mut sum = HeadPairs::default();
    for i in start..end {
        for j in start..if options.causal { i + 1 } else { end } {
            let (key, query) = (usize::from(x.label[j]), usize::from(x.label[i]));
            sum.pairs[key][query] += 1;
            sum.weight[key][query] += weight(options, x, i, j);
        }
    }
    sum
}

/// The weight from key token `j` to query token `i`, over all pairs of heads.
fn weight(options: &FhaOptions, x: Attended, i: usize, j: usize) -> f64 {
    let (heads, d) = (options.heads, options.head_dim);
    let masked = options.label_mask == LabelMask::Feedback;
    let slots = options.query_slots();
    let half = |label: u8| usize::from(label) * (heads / 2);
    let mut sum = 0.0;
    for slot in 0..slots {
        let query_head = if masked { slot + half(x.label[i]) } else { slot };
        let key_heads = match options.pairing {
            Pairing::PerHead => query_head..query_head + 1,
            Pairing::Factorized if masked => half(x.label[j])..half(x.label[j]) + heads / 2,
            Pairing::Factorized => 0..heads,
        };
        let q = &x.q[(i * heads + query_head) * d..][..d];
        for head in key_heads {
            let k = &x.k[(j * heads + head) * d..][..d];
            let score: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            sum += (f64::from(options.scale) * score - f64::from(x.lse[i * slots + slot])).exp();
        }
    }
    sum
}

/// Whether each row of weights adds up to 1: not where the mask drops weights after the softmax.
pub fn rows_add_up(options: &FhaOptions) -> bool {
    options.label_mask == LabelMask::None || options.normalization == Normalization::Masked
}

#[cfg(test)]
mod tests {
    use super::super::{Inputs, forward};
    use super::*;
    use rand::{RngExt, SeedableRng};

    /// Values of 1 make the output of a head pair the weight that reaches it.
    fn sums_of_outputs(options: FhaOptions) {
        let (tokens, width) = (11, options.heads * options.head_dim);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let mut random = || (0..tokens * width).map(|_| rng.random::<f32>() - 0.5).collect::<Vec<f32>>();
        let (q, k) = (random(), random());
        let v = vec![1.0; tokens * width];
        let label = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0];
        let cu_seqlens = [0, 4, 4, 11];
        let mut o = vec![0.0; options.output_len(tokens)];
        let mut lse = vec![0.0; options.lse_len(tokens)];
        let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: &cu_seqlens, label: &label };
        forward(&options, inputs, &mut o, &mut lse).expect("valid inputs");
        let attended = Attended { q: &q, k: &k, lse: &lse, cu_seqlens: &cu_seqlens, label: &label };
        let found = head_pairs(&options, attended);
        let by_query = |label_of: u8| {
            let row = o.len() / tokens;
            let own = (0..tokens).filter(|&i| label[i] == label_of);
            own.flat_map(|i| o[i * row..(i + 1) * row].iter().step_by(options.head_dim))
                .map(|o| f64::from(*o))
                .sum::<f64>()
        };
        for query in [0, 1] {
            let sum = found.weight[0][query] + found.weight[1][query];
            let expected = by_query(query as u8);
            assert!((sum - expected).abs() < 1e-4, "{options:?}: {sum}, not {expected}");
        }
        let rows = tokens * options.query_slots();
        let all: f64 = found.weight.iter().flatten().sum();
        assert_eq!(rows_add_up(&options), (all - rows as f64).abs() < 1e-4, "{options:?}: {all} of {rows}");
        assert_eq!(found.pairs.iter().flatten().sum::<u64>(), 10 + 28);
    }

    #[test]
    fn the_weights_are_those_of_the_engine() {
        let paper = FhaOptions::new(2, 8);
        let unmasked = FhaOptions { label_mask: LabelMask::None, ..paper };
        sums_of_outputs(paper);
        sums_of_outputs(FhaOptions::new(4, 8));
        sums_of_outputs(FhaOptions { normalization: Normalization::Masked, ..paper });
        sums_of_outputs(unmasked);
        sums_of_outputs(FhaOptions { pairing: Pairing::PerHead, ..unmasked });
    }
}
