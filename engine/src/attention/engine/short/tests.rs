//! Short sequences against the float64 reference and the general kernels, for every instruction set.

use super::super::{Sequence, Shape, forward as general};
use super::{Forward, Scratch, covers};
use crate::attention::{FhaOptions, Inputs, LabelMask, Normalization, Pairing, reference};
use crate::simd::{Set, available};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One sequence and the gradient of its output.
#[derive(Clone)]
struct Problem {
    options: FhaOptions,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    label: Vec<u8>,
}

impl Problem {
    fn random(options: FhaOptions, tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |len| (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect::<Vec<f32>>();
        let width = options.heads * options.head_dim;
        let [q, k, v] = [(); 3].map(|()| values(tokens * width));
        let label = (0..tokens).map(|_| rng.random_range(0..2)).collect();
        Self { options, tokens, q, k, v, label }
    }

    fn sequence<'a>(&'a self, shape: &'a Shape) -> Sequence<'a> {
        let label = if shape.lists == 2 { &self.label[..] } else { &[] };
        Sequence { shape, tokens: self.tokens, q: &self.q, k: &self.k, v: &self.v, label }
    }

    /// `o` and `lse`; `None` if the short path leaves the sequence to the general kernels.
    fn forward(&self, set: Set) -> Option<[Vec<f32>; 2]> {
        let shape = Shape::new(&self.options);
        let mut o = vec![7e7; self.options.output_len(self.tokens)];
        let mut lse = vec![7e7; self.options.lse_len(self.tokens)];
        let (sequence, scratch) = (self.sequence(&shape), &mut Scratch::default());
        let done =
            covers(&shape, self.tokens) && set.run(Forward { sequence, o: &mut o, lse: &mut lse, scratch });
        done.then_some([o, lse])
    }

    /// As [`Problem::forward`], by the general kernels.
    fn general_forward(&self, set: Set) -> [Vec<f32>; 2] {
        let shape = Shape::new(&self.options);
        let mut o = vec![7e7; self.options.output_len(self.tokens)];
        let mut lse = vec![7e7; self.options.lse_len(self.tokens)];
        let (sequence, scratch) = (self.sequence(&shape), &mut super::super::Scratch::default());
        let (queries, out) = (0..self.tokens, (&mut o[..], &mut lse[..]));
        set.run(general::Forward { sequence, queries, o: out.0, lse: out.1, scratch });
        [o, lse]
    }

    fn inputs<'a>(&'a self, cu_seqlens: &'a [u32]) -> Inputs<'a> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, cu_seqlens, label: &self.label }
    }
}

fn every_option(heads: usize, d: usize) -> Vec<FhaOptions> {
    let mut all = Vec::new();
    for causal in [true, false] {
        let base = FhaOptions { causal, ..FhaOptions::new(heads, d) };
        let unmasked = FhaOptions { label_mask: LabelMask::None, ..base };
        all.extend([
            base,
            FhaOptions { normalization: Normalization::Masked, ..base },
            unmasked,
            FhaOptions { pairing: Pairing::PerHead, ..unmasked },
            FhaOptions { heads: 1, ..unmasked },
        ]);
    }
    all
}

/// Largest error, as a share of the largest value. `absolute` is allowed besides.
fn assert_close(name: &str, x: &[f32], expected: &[f64], tolerance: f64, absolute: f64) {
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let error = x.iter().zip(expected).fold(0.0, |m: f64, (x, e)| m.max((f64::from(*x) - e).abs()));
    assert_eq!(x.len(), expected.len(), "{name}");
    assert!(error <= tolerance * largest + absolute, "{name}: {error:e} of {largest:e}");
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Lengths around multiples of the vectors and tiles of every instruction set.
fn lengths(rng: &mut impl Rng) -> [usize; 4] {
    let around = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
    [1, rng.random_range(1..66), around[rng.random_range(0..around.len())], rng.random_range(1..24)]
}

#[test]
fn outputs_match_the_reference_and_the_general_kernels() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (heads, d) in [(2, 16), (2, 1), (4, 3), (2, 8), (4, 16), (2, 17), (2, 32), (2, 64), (4, 20)] {
        for options in every_option(heads, d) {
            for tokens in lengths(&mut rng) {
                let problem = Problem::random(options, tokens, rng.random());
                let cu_seqlens = [0, tokens as u32];
                let expected = reference::forward(&options, problem.inputs(&cu_seqlens)).expect("valid");
                for (name, set) in available() {
                    let name = format!("{name}, {tokens} tokens, {options:?}");
                    let [o, lse] = problem.forward(set).expect("short, with small scores");
                    assert_close(&format!("o, {name}"), &o, &expected.o, 1e-5, 0.0);
                    // An `lse` near 0 is the logarithm of a sum near 1.
                    assert_close(&format!("lse, {name}"), &lse, &expected.lse, 1e-5, 4e-7);
                    let general = problem.general_forward(set).map(|x| wide(&x));
                    assert_close(&format!("o, {name}, general"), &o, &general[0], 1e-5, 0.0);
                    assert_close(&format!("lse, {name}, general"), &lse, &general[1], 1e-5, 4e-7);
                }
            }
        }
    }
}

/// Without a maximum subtracted: scores up to the bound have accurate results.
#[test]
fn scores_up_to_the_bound_match_the_reference() {
    for (seed, factor) in [(5, 2.0f32), (6, 2.9)] {
        let options = FhaOptions::new(2, 16);
        let mut problem = Problem::random(options, 60, seed);
        problem.q.iter_mut().chain(&mut problem.k).for_each(|x| *x *= factor);
        let cu_seqlens = [0, 60];
        let expected = reference::forward(&options, problem.inputs(&cu_seqlens)).expect("valid inputs");
        for (name, set) in available() {
            let [o, lse] = problem.forward(set).expect("scores below the bound");
            assert_close(&format!("o, {name}, times {factor}"), &o, &expected.o, 1e-5, 0.0);
            assert_close(&format!("lse, {name}, times {factor}"), &lse, &expected.lse, 1e-5, 0.0);
        }
    }
}

/// The general kernels compute them with compensated dot products.
#[test]
fn large_scores_long_sequences_and_wide_heads_are_left_to_the_general_kernels() {
    let options = FhaOptions::new(2, 16);
    let problem = Problem::random(options, 20, 7);
    let mut large = problem.clone();
    large.k[13 * 32..14 * 32].iter_mut().for_each(|x| *x *= 30.0);
    // The query heads that do not serve a token are not read.
    let mut unread = problem.clone();
    let other = 1 - usize::from(problem.label[3]);
    unread.q[(3 * 2 + other) * 16..][..16].fill(1e6);
    for (name, set) in available() {
        assert!(problem.forward(set).is_some(), "{name}");
        assert!(large.forward(set).is_none(), "{name}");
        assert!(unread.forward(set).is_some(), "{name}");
    }
    assert!(!covers(&Shape::new(&options), 0) && covers(&Shape::new(&options), 300));
    assert!(!covers(&Shape::new(&options), 321) && !covers(&Shape::new(&FhaOptions::new(2, 65)), 20));
}

/// The path must not depend on it, or the rows that do not read it would change their bits.
#[test]
fn a_non_finite_value_does_not_change_the_path() {
    for factor in [1.0f32, 30.0] {
        let mut problem = Problem::random(FhaOptions::new(2, 16), 20, 8);
        problem.k.iter_mut().for_each(|x| *x *= factor);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut others = [(); 3].map(|()| problem.clone());
            others[0].q[5 * 32..6 * 32].fill(bad);
            others[1].k[5 * 32..6 * 32].fill(bad);
            others[2].v[5 * 32..6 * 32].fill(bad);
            for (name, set) in available() {
                let Some([clean, _]) = problem.forward(set) else {
                    assert!(
                        factor > 1.0 && others.iter().all(|other| other.forward(set).is_none()),
                        "{name}"
                    );
                    continue;
                };
                for other in &others {
                    let [o, _] = other.forward(set).expect("as without the value");
                    assert!(o[..5 * 32] == clean[..5 * 32], "{name}: earlier rows do not read it");
                    assert!(o[5 * 32..6 * 32].iter().any(|x| !x.is_finite()), "{name}: its own row does");
                }
            }
        }
    }
}
