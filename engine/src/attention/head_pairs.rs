//! Attention weight by the feedback of the two tokens (Figure 4 of the paper).
//!
//! An attention adds up its weights itself where the values are 1 at the tokens of one label and 0
//! at the others ([`indicator`]). So every device has the sums, and no matrix of weights exists.

use super::{FhaOptions, LabelMask, Normalization};
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

    /// Counts the pairs of packed sequences, without weights.
    ///
    /// # Panics
    /// If `cu_seqlens` does not fit the labels.
    pub fn count(causal: bool, cu_seqlens: &[u32], label: &[u8]) -> Self {
        let mut counts = Self::default();
        for bounds in cu_seqlens.windows(2) {
            let labels = &label[bounds[0] as usize..bounds[1] as usize];
            let mut visible = [0; 2];
            if !causal {
                labels.iter().for_each(|&label| visible[usize::from(label)] += 1);
            }
            for &query in labels {
                if causal {
                    visible[usize::from(query)] += 1;
                }
                for key in [0, 1] {
                    counts.pairs[key][usize::from(query)] += visible[key];
                }
            }
        }
        counts
    }

    /// Adds the weights of the key tokens with label `key`. `o: [N, Q, K, d]` is the output of the
    /// attention with the values [`indicator`]: each is a sum of weights.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub fn add_output(&mut self, options: &FhaOptions, key: usize, label: &[u8], o: &[f32]) {
        assert_eq!(o.len(), options.output_len(label.len()), "o is [N, Q, K, d]");
        let rows = o.chunks_exact(options.output_len(1));
        for (row, &query) in rows.zip(label) {
            let sum: f64 = row.iter().step_by(options.head_dim).map(|&weight| f64::from(weight)).sum();
            self.weight[key][usize::from(query)] += sum;
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

/// The values `[N, H, d]` for [`HeadPairs::add_output`]: 1 at the tokens with label `key`, 0 at the
/// others.
pub fn indicator(options: &FhaOptions, label: &[u8], key: usize) -> Vec<f32> {
    let width = options.heads * options.head_dim;
    let value = |&label: &u8| if usize::from(label) == key { 1.0 } else { 0.0 };
    label.iter().flat_map(|label| std::iter::repeat_n(value(label), width)).collect()
}

/// Whether each row of weights adds up to 1: not where the mask drops weights after the softmax.
pub fn rows_add_up(options: &FhaOptions) -> bool {
    options.label_mask == LabelMask::None || options.normalization == Normalization::Masked
}

#[cfg(test)]
mod tests {
    use super::super::{Inputs, Pairing, forward};
    use super::*;
    use rand::{RngExt, SeedableRng};

    const LABEL: [u8; 11] = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0];
    const CU_SEQLENS: [u32; 4] = [0, 4, 4, 11];

    /// The scores of a pair of tokens and the weights that reach the output, by the definition, in
    /// f64.
    fn defined(options: &FhaOptions, q: &[f32], k: &[f32]) -> HeadPairs {
        let (heads, d) = (options.heads, options.head_dim);
        let half = |label: u8| {
            let first = usize::from(label) * (heads / 2);
            first..first + heads / 2
        };
        let masked = options.label_mask == LabelMask::Feedback;
        let mut sum = HeadPairs::default();
        for bounds in CU_SEQLENS.windows(2) {
            let (start, end) = (bounds[0] as usize, bounds[1] as usize);
            for i in start..end {
                let visible = start..if options.causal { i + 1 } else { end };
                for j in visible.clone() {
                    sum.pairs[usize::from(LABEL[j])][usize::from(LABEL[i])] += 1;
                }
                for a in 0..heads {
                    let score = |j: usize, b: usize| {
                        let (q, k) = (&q[(i * heads + a) * d..][..d], &k[(j * heads + b) * d..][..d]);
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        (f64::from(options.scale) * dot).exp()
                    };
                    let kept = |j: usize, b: usize| {
                        !masked || half(LABEL[i]).contains(&a) && half(LABEL[j]).contains(&b)
                    };
                    let paired = match options.pairing {
                        Pairing::PerHead => a..a + 1,
                        Pairing::Factorized => 0..heads,
                    };
                    let each = || visible.clone().flat_map(|j| paired.clone().map(move |b| (j, b)));
                    let joint = options.normalization == Normalization::Joint;
                    let all = each().filter(|&(j, b)| joint || kept(j, b));
                    let total: f64 = all.map(|(j, b)| score(j, b)).sum();
                    for (j, b) in each().filter(|&(j, b)| kept(j, b)) {
                        sum.weight[usize::from(LABEL[j])][usize::from(LABEL[i])] += score(j, b) / total;
                    }
                }
            }
        }
        sum
    }

    fn agrees_with_the_definition(options: FhaOptions) {
        let (tokens, width) = (LABEL.len(), options.heads * options.head_dim);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let mut random = || (0..tokens * width).map(|_| rng.random::<f32>() - 0.5).collect::<Vec<f32>>();
        let (q, k) = (random(), random());
        let mut found = HeadPairs::count(options.causal, &CU_SEQLENS, &LABEL);
        for key in [0, 1] {
            let v = indicator(&options, &LABEL, key);
            let mut o = vec![0.0; options.output_len(tokens)];
            let mut lse = vec![0.0; options.lse_len(tokens)];
            let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: &CU_SEQLENS, label: &LABEL };
            forward(&options, inputs, &mut o, &mut lse).expect("valid inputs");
            found.add_output(&options, key, &LABEL, &o);
        }
        let expected = defined(&options, &q, &k);
        assert_eq!(found.pairs, expected.pairs);
        for (found, expected) in found.weight.iter().flatten().zip(expected.weight.iter().flatten()) {
            assert!((found - expected).abs() < 1e-4, "{options:?}: {found}, not {expected}");
        }
        let rows = (tokens * options.query_slots()) as f64;
        let all: f64 = found.weight.iter().flatten().sum();
        assert_eq!(rows_add_up(&options), (all - rows).abs() < 1e-4, "{options:?}: {all} of {rows}");
    }

    #[test]
    fn the_weights_are_those_of_the_definition() {
        let paper = FhaOptions::new(2, 8);
        let unmasked = FhaOptions { label_mask: LabelMask::None, ..paper };
        agrees_with_the_definition(paper);
        agrees_with_the_definition(FhaOptions::new(4, 8));
        agrees_with_the_definition(FhaOptions::new(2, 1));
        agrees_with_the_definition(FhaOptions { normalization: Normalization::Masked, ..paper });
        agrees_with_the_definition(FhaOptions { causal: false, ..paper });
        agrees_with_the_definition(unmasked);
        agrees_with_the_definition(FhaOptions { pairing: Pairing::PerHead, ..unmasked });
    }
}
