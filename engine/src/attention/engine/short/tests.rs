//! Short sequences against the float64 reference and the general kernels, for every instruction
//! set.

use super::super::{Normalizers, Saved, Sequence, Shape, backward, forward};
use super::{Backward, Forward, LONGEST_WITH_FEW_REGISTERS, Scratch, covers_backward, covers_forward};
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
    d_o: Vec<f32>,
}

/// `o`, `lse`, `dq`, `dk`, `dv`
type Results = [Vec<f32>; 5];

impl Problem {
    fn random(options: FhaOptions, tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |len| (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect::<Vec<f32>>();
        let width = options.heads * options.head_dim;
        let [q, k, v] = [(); 3].map(|()| values(tokens * width));
        let d_o = values(options.output_len(tokens));
        let label = (0..tokens).map(|_| rng.random_range(0..2)).collect();
        Self { options, tokens, q, k, v, label, d_o }
    }

    fn sequence<'a>(&'a self, shape: &'a Shape) -> Sequence<'a> {
        let label = if shape.lists == 2 { &self.label[..] } else { &[] };
        Sequence { shape, tokens: self.tokens, q: &self.q, k: &self.k, v: &self.v, label }
    }

    /// `None` if the short path leaves the sequence to the general kernels.
    fn run(&self, set: Set) -> Option<Results> {
        let shape = Shape::new(&self.options);
        let (sequence, mut scratch) = (self.sequence(&shape), Scratch::default());
        let [mut o, mut lse] = self.outputs();
        let queries = 0..self.tokens;
        let forward = Forward { sequence, queries, o: &mut o, lse: &mut lse, scratch: &mut scratch };
        if !covers_forward(&shape, self.tokens) || !set.run(forward) {
            return None;
        }
        let mut gradients = [(); 3].map(|()| vec![7e7; self.q.len()]);
        let saved = &Saved { o: &o, lse: &lse, d_o: &self.d_o };
        let done = set.run(Backward {
            sequence,
            saved,
            gradients: gradients.each_mut().map(|x| &mut x[..]),
            scratch: &mut scratch,
        });
        let finite = done.expect("both passes take the same path");
        assert_eq!(finite, gradients[0].iter().all(|x| x.is_finite()));
        let [dq, dk, dv] = gradients;
        Some([o, lse, dq, dk, dv])
    }

    /// As [`Problem::run`], by the general kernels.
    fn run_general(&self, set: Set) -> Results {
        let shape = Shape::new(&self.options);
        let (sequence, scratch) = (self.sequence(&shape), &mut super::super::Scratch::default());
        let [mut o, mut lse] = self.outputs();
        let all = 0..self.tokens;
        let queries = all.clone();
        set.run(forward::Forward { sequence, queries, o: &mut o, lse: &mut lse, scratch: &mut *scratch });
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![7e7; self.q.len()]);
        set.run(backward::Backward {
            sequence,
            saved: &Saved { o: &o, lse: &lse, d_o: &self.d_o },
            keys: all.clone(),
            queries: all,
            normalizers: Normalizers::Find,
            dq: Some(&mut dq),
            dkv: Some([&mut dk, &mut dv]),
            scratch,
        });
        [o, lse, dq, dk, dv]
    }

    fn outputs(&self) -> [Vec<f32>; 2] {
        [self.options.output_len(self.tokens), self.options.lse_len(self.tokens)].map(|len| vec![7e7; len])
    }

    fn reference(&self) -> [Vec<f64>; 5] {
        let cu_seqlens = [0, self.tokens as u32];
        let inputs =
            Inputs { q: &self.q, k: &self.k, v: &self.v, cu_seqlens: &cu_seqlens, label: &self.label };
        let output = reference::forward(&self.options, inputs).expect("valid inputs");
        let gradients = reference::backward(&self.options, inputs, &self.d_o).expect("valid inputs");
        [output.o, output.lse, gradients.dq, gradients.dk, gradients.dv]
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

/// The largest error; NaN if one is, unlike with `f64::max`.
fn worst(x: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(x.len(), expected.len());
    let errors = x.iter().zip(expected).map(|(x, e)| (f64::from(*x) - e).abs());
    errors.fold(0.0, |worst, error| if worst.is_nan() || error <= worst { worst } else { error })
}

/// Errors as a share of the largest value of a tensor: at most 1e-5 forward, 5e-5 for gradients.
/// Besides, roundings of values of about 1 are allowed for an `lse`, the logarithm of a sum near 1,
/// and for the gradients of scores of a row with one key, which cancel.
fn assert_close(results: &Results, expected: &[Vec<f64>; 5], case: &str) {
    let limits = [(1e-5, 0.0), (1e-5, 4e-7), (5e-5, 2e-6), (5e-5, 2e-6), (5e-5, 0.0)];
    for (i, name) in ["o", "lse", "dq", "dk", "dv"].into_iter().enumerate() {
        let (x, expected, (share, absolute)) = (&results[i], &expected[i], limits[i]);
        let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let error = worst(x, expected);
        assert_eq!(x.len(), expected.len(), "{name}, {case}");
        assert!(error <= share * largest + absolute, "{name}, {case}: {error:e} of {largest:e}");
    }
}

/// Lengths around multiples of the vectors and tiles of every instruction set.
fn lengths(rng: &mut impl Rng) -> [usize; 4] {
    let around = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
    [1, rng.random_range(1..66), around[rng.random_range(0..around.len())], rng.random_range(1..24)]
}

#[test]
fn results_match_the_reference_and_the_general_kernels() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (heads, d) in [(2, 16), (2, 1), (4, 3), (2, 8), (4, 16), (2, 17), (2, 32), (2, 64), (4, 20), (2, 128)]
    {
        for options in every_option(heads, d) {
            for tokens in lengths(&mut rng) {
                let problem = Problem::random(options, tokens, rng.random());
                let expected = problem.reference();
                for (name, set) in available() {
                    let case = format!("{name}, {tokens} tokens, {options:?}");
                    let results = problem.run(set).expect("short, with small scores");
                    assert_close(&results, &expected, &case);
                    let general = problem.run_general(set).map(|x| x.into_iter().map(f64::from).collect());
                    assert_close(&results, &general, &format!("{case}, general"));
                }
            }
        }
    }
}

/// Longer than a block of rows of the backward pass.
#[test]
fn the_longest_sequences_match_the_reference() {
    for (tokens, heads, options) in
        [(320, 2, 0), (100, 4, 0), (200, 2, 1), (130, 2, 2), (300, 2, 3), (65, 2, 5)]
    {
        let problem = Problem::random(every_option(heads, 8)[options], tokens, 2);
        for (name, set) in available() {
            let results = problem.run(set).expect("short, with small scores");
            assert_close(&results, &problem.reference(), &format!("{name}, {:?}", problem.options));
        }
    }
}

/// A long sequence is cut into pieces of its queries.
#[test]
fn a_range_of_queries_matches_the_reference() {
    let tokens = LONGEST_WITH_FEW_REGISTERS + 17;
    for options in every_option(2, 8) {
        let problem = Problem::random(options, tokens, 4);
        let [o, lse, ..] = problem.reference();
        let shape = Shape::new(&options);
        let [width, slots] = [shape.output_width(), shape.query_slots];
        for (name, set) in available() {
            for queries in [0..40, 40..tokens] {
                let [mut found, mut found_lse] =
                    [width, slots].map(|values| vec![7e7; queries.len() * values]);
                let (sequence, scratch) = (problem.sequence(&shape), &mut Scratch::default());
                let (range, o_here, lse_here) = (queries.clone(), &mut found[..], &mut found_lse[..]);
                let forward = Forward { sequence, queries: range, o: o_here, lse: lse_here, scratch };
                if !set.run(forward) {
                    assert_eq!(name, "portable", "only it has few registers");
                    continue;
                }
                for (what, found, expected) in [
                    ("o", &found, &o[queries.start * width..queries.end * width]),
                    ("lse", &found_lse, &lse[queries.start * slots..queries.end * slots]),
                ] {
                    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                    let error = worst(found, expected);
                    assert!(error <= 1e-5 * largest, "{what}, {name}, {queries:?}, {options:?}: {error:e}");
                }
            }
        }
    }
}

/// Without a maximum subtracted. Many rows have a dominant key.
#[test]
fn scores_up_to_the_bound_match_the_reference() {
    for (seed, factor) in [(5, 2.0f32), (6, 2.9)] {
        for options in every_option(2, 16) {
            let mut problem = Problem::random(options, 60, seed);
            problem.q.iter_mut().chain(&mut problem.k).for_each(|x| *x *= factor);
            let expected = problem.reference();
            for (name, set) in available() {
                let results = problem.run(set).expect("scores below the bound");
                assert_close(&results, &expected, &format!("{name}, times {factor}, {options:?}"));
            }
        }
    }
}

/// A probability of 1 up to rounding: the gradients of the scores are tiny, but accurate.
#[test]
fn a_dominant_key_leaves_accurate_gradients() {
    for options in every_option(2, 16) {
        let mut problem = Problem::random(options, 7, 9);
        // Every query points to the first token's keys.
        for row in problem.q.chunks_mut(16) {
            row.copy_from_slice(&[1.0; 16]);
        }
        for (i, row) in problem.k.chunks_mut(16).enumerate() {
            let towards = if i < 2 { 1.9 + 0.3 * i as f32 } else { -2.0 };
            row.iter_mut().for_each(|x| *x = towards + 0.05 * *x);
        }
        let expected = problem.reference();
        for (name, set) in available() {
            let results = problem.run(set).expect("scores below the bound");
            for (i, gradient) in [(2, "dq"), (3, "dk")] {
                let largest = expected[i].iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                let error = worst(&results[i], &expected[i]);
                assert!(error <= 5e-5 * largest, "{gradient}, {name}, {options:?}: {error:e} of {largest:e}");
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for options in every_option(2, 3) {
        let problem = Problem::random(options, 9, 3);
        let loss = |problem: &Problem| -> f64 {
            let [o, ..] = problem.reference();
            o.iter().zip(&problem.d_o).map(|(o, d)| o * f64::from(*d)).sum()
        };
        for (name, set) in available() {
            let results = problem.run(set).expect("short, with small scores");
            for tensor in 0..3 {
                for index in (0..problem.q.len()).step_by(7) {
                    let at = |step: f32| {
                        let mut moved = problem.clone();
                        let x = [&mut moved.q, &mut moved.k, &mut moved.v][tensor].get_mut(index).expect("x");
                        *x += step;
                        (f64::from(*x), loss(&moved))
                    };
                    let ((high, up), (low, down)) = (at(1e-3), at(-1e-3));
                    let (slope, found) = ((up - down) / (high - low), f64::from(results[2 + tensor][index]));
                    assert!((slope - found).abs() < 1e-5, "{name}, tensor {tensor}: {found}, not {slope}");
                }
            }
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
        assert!(problem.run(set).is_some(), "{name}");
        assert!(large.run(set).is_none(), "{name}");
        assert!(unread.run(set).is_some(), "{name}");
    }
    let shape = |heads, d, causal| Shape::new(&FhaOptions { causal, ..FhaOptions::new(heads, d) });
    for (shape, longest, longest_backward) in [
        (shape(2, 16, true), 1024, 320),
        (shape(2, 16, false), 1024, 160),
        (shape(8, 16, true), 1024, 80),
        (shape(2, 128, true), 1024, 320),
        (shape(2, 129, true), 0, 0),
    ] {
        for tokens in 0..1100 {
            assert_eq!(covers_forward(&shape, tokens), (1..=longest).contains(&tokens), "{tokens} tokens");
            let backward = (1..=longest_backward).contains(&tokens);
            assert_eq!(covers_backward(&shape, tokens), backward, "{tokens} tokens");
        }
    }
}

/// The softmax of such a row is not a number, also in the key heads that drop the key.
#[test]
fn an_infinite_score_reaches_all_outputs_of_its_row() {
    let mut problem = Problem::random(FhaOptions::new(2, 16), 6, 10);
    problem.label = vec![1, 0, 0, 1, 1, 0];
    problem.k[..32].fill(1.0);
    problem.k[32..].fill(-1.0);
    let row = 4;
    problem.q[row * 32..][..32].fill(f32::INFINITY);
    for (name, set) in available() {
        let [o, lse, ..] = problem.run(set).expect("short, with small scores");
        for (token, (o, lse)) in o.chunks(32).zip(lse).enumerate() {
            let nan = o.iter().filter(|x| x.is_nan()).count();
            assert_eq!(nan, if token == row { 32 } else { 0 }, "{name}, token {token}: {o:?}");
            assert_eq!(lse.is_nan(), token == row, "{name}, token {token}");
        }
    }
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
                let Some([clean, ..]) = problem.run(set) else {
                    assert!(factor > 1.0 && others.iter().all(|other| other.run(set).is_none()), "{name}");
                    continue;
                };
                for other in &others {
                    let [o, ..] = other.run(set).expect("as without the value");
                    assert!(o[..5 * 32] == clean[..5 * 32], "{name}: earlier rows do not read it");
                    assert!(o[5 * 32..6 * 32].iter().any(|x| !x.is_finite()), "{name}: its own row does");
                }
            }
        }
    }
}
