//! The fused attention engine against the float64 reference, and its determinism.

#[path = "bodies/non_finite.rs"]
mod bodies;
mod common;

use common::{Batch, Results, assert_within, golden, worst};
use dfar::attention::{
    AttentionError, FhaOptions, Gradients, Inputs, LabelMask, Normalization, Pairing, backward, forward,
    reference,
};
use dfar_tools::verify::{
    CpuEngine, Fha, GRADIENT_TOLERANCE, TensorError, compare, compare_gradients, relative_error, verify_fha,
};
use proptest::prelude::*;

/// Runs forward and backward. The initial content of the outputs must be overwritten.
fn run(options: &FhaOptions, batch: &Batch) -> Results {
    let n = batch.tokens();
    let garbage = |len| vec![7e7f32; len];
    let mut r = Results {
        o: garbage(options.output_len(n)),
        lse: garbage(options.lse_len(n)),
        dq: garbage(batch.q.len()),
        dk: garbage(batch.q.len()),
        dv: garbage(batch.q.len()),
    };
    forward(options, batch.inputs(), &mut r.o, &mut r.lse).expect("inputs should be accepted");
    let gradients = Gradients { dq: &mut r.dq, dk: &mut r.dk, dv: &mut r.dv };
    backward(options, batch.inputs(), &r.o, &r.lse, &batch.d_o, gradients)
        .expect("inputs should be accepted");
    r
}

/// Errors of the fused results against the float64 reference.
fn errors(options: &FhaOptions, batch: &Batch) -> Vec<TensorError> {
    let fused = run(options, batch);
    let output = reference::forward(options, batch.inputs()).expect("inputs should be accepted");
    let gradients =
        reference::backward(options, batch.inputs(), &batch.d_o).expect("inputs should be accepted");
    let mut errors = vec![compare("o", &fused.o, &output.o), compare("lse", &fused.lse, &output.lse)];
    errors.extend(compare_gradients(&[
        ("dq", &fused.dq, &gradients.dq),
        ("dk", &fused.dk, &gradients.dk),
        ("dv", &fused.dv, &gradients.dv),
    ]));
    errors
}

#[test]
fn fused_results_match_the_golden_cases() {
    for case in golden("fha") {
        let errors = verify_fha(&case, &CpuEngine)
            .unwrap_or_else(|error| panic!("{error}"))
            .expect("the CPU has every shape");
        assert_within(&errors, &case.name);
    }
}

#[test]
fn reference_matches_the_golden_cases_in_double_precision() {
    for case in golden("fha") {
        let fha = Fha::new(&case).unwrap_or_else(|error| panic!("{error}"));
        let output = reference::forward(&fha.options, fha.inputs()).expect("a case is valid");
        let gradients = reference::backward(&fha.options, fha.inputs(), &fha.d_o).expect("a case is valid");
        let [dq, dk, dv] = &fha.gradients;
        // The scale is an f64 in a case and an f32 in the options: they differ by up to 1e-7.
        for (name, x, expected) in [
            ("o", &output.o, &fha.o),
            ("lse", &output.lse, &fha.lse),
            ("dq", &gradients.dq, dq),
            ("dk", &gradients.dk, dk),
            ("dv", &gradients.dv, dv),
        ] {
            let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            assert_eq!(x.len(), expected.len(), "{} {name}", case.name);
            let error = worst(x.iter().zip(expected).map(|(x, e)| (x - e).abs()));
            let exact = fha.options.scale.log2().fract() == 0.0;
            let tolerance = if exact { 1e-12 } else { 1e-6 };
            assert!(error <= tolerance * largest, "{} {name}: {error:e} of {largest:e}", case.name);
        }
    }
}

/// Widths with and without padding, and lengths around the sizes of vectors and tiles.
const HEAD_DIMS: [usize; 9] = [1, 3, 4, 8, 16, 20, 32, 64, 128];

#[derive(Clone, Debug)]
struct Problem {
    options: FhaOptions,
    lengths: Vec<usize>,
    /// Overrides the random labels.
    label: Option<u8>,
    /// Scale of the queries: scores of a few units, or of thousands.
    magnitude: f32,
    seed: u64,
}

impl Problem {
    fn batch(&self) -> Batch {
        let mut batch = Batch::random(&self.options, &self.lengths, self.seed);
        batch.q.iter_mut().for_each(|x| *x *= self.magnitude);
        if let Some(label) = self.label {
            batch.label.fill(label);
        }
        batch
    }
}

fn options() -> impl Strategy<Value = FhaOptions> {
    let kind = prop_oneof![
        4 => (prop::sample::select(vec![2usize, 4, 8]), Just(LabelMask::Feedback), Just(Pairing::Factorized)),
        2 => (prop::sample::select(vec![1usize, 2, 4]), Just(LabelMask::None), Just(Pairing::Factorized)),
        1 => (1usize..6, Just(LabelMask::None), Just(Pairing::PerHead)),
    ];
    let normalization = prop::sample::select(vec![Normalization::Joint, Normalization::Masked]);
    (kind, prop::sample::select(HEAD_DIMS.to_vec()), normalization, any::<bool>()).prop_map(
        |((heads, label_mask, pairing), d, normalization, causal)| FhaOptions {
            label_mask,
            pairing,
            normalization,
            causal,
            ..FhaOptions::new(heads, d)
        },
    )
}

fn problem() -> impl Strategy<Value = Problem> {
    let length = prop_oneof![2 => Just(0usize), 2 => Just(1), 4 => 2usize..20, 2 => 20usize..80];
    let label = prop_oneof![4 => Just(None), 1 => Just(Some(0)), 1 => Just(Some(1))];
    let magnitude = prop::sample::select(vec![1.0, 1.0, 3.0, 8.0, 30.0, 300.0]);
    (options(), prop::collection::vec(length, 0..5), label, magnitude, any::<u64>()).prop_map(
        |(options, lengths, label, magnitude, seed)| Problem { options, lengths, label, magnitude, seed },
    )
}

/// Additional tolerance of (`o`, `lse`, `dq`, `dk`, `dv`) for cancellation in f32: eight roundings
/// of the cancelling terms. In small random problems, a row of one or two keys can have an `lse`
/// near 0, or gradients near 0 because one key dominates, and a kept key can have a probability
/// below the range of f32. Larger problems do not need it.
fn rounding(options: &FhaOptions, batch: &Batch) -> [f64; 5] {
    let norm = |x: &[f32]| {
        let norms = x.chunks(options.head_dim).map(|x| x.iter().map(|x| x * x).sum::<f32>().sqrt());
        f64::from(norms.fold(0.0, f32::max))
    };
    let [q, k, v, d_o] = [&batch.q, &batch.k, &batch.v, &batch.d_o].map(|x| norm(x));
    let scale = f64::from(options.scale);
    let output = reference::forward(options, batch.inputs()).expect("valid inputs");
    let gradients = reference::backward(options, batch.inputs(), &batch.d_o).expect("valid inputs");
    let largest = |x: &[f64]| x.iter().fold(f64::MIN_POSITIVE, |m: f64, x| m.max(x.abs()));
    // What `compare_gradients` divides an error by.
    let [dq, dk, dv] = [&gradients.dq, &gradients.dk, &gradients.dv].map(|x| largest(x));
    let floor = f64::from(f32::EPSILON) * dq.max(dk).max(dv) / GRADIENT_TOLERANCE;
    let roundings = 8.0 * f64::from(f32::EPSILON);
    let underflow = f64::from(f32::MIN_POSITIVE) / f64::from(f32::EPSILON);
    [
        underflow * v / largest(&output.o),
        roundings * scale * q * k / largest(&output.lse),
        roundings * scale * d_o * v * k / dq.max(floor),
        roundings * scale * d_o * v * q / dk.max(floor),
        underflow * d_o / dv.max(floor),
    ]
}

#[track_caller]
fn assert_matches_the_reference(problem: &Problem) {
    let batch = problem.batch();
    let mut errors = errors(&problem.options, &batch);
    for (error, absolute) in errors.iter_mut().zip(rounding(&problem.options, &batch)) {
        error.tolerance += absolute;
        error.passes = error.error <= error.tolerance;
    }
    assert_within(&errors, problem);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn fused_results_match_the_reference(problem in problem()) {
        assert_matches_the_reference(&problem);
    }
}

/// Weights of about 1e-93: all results are 0 in f32.
#[test]
fn weights_below_the_range_of_f32_are_a_rounding() {
    let options = FhaOptions { label_mask: LabelMask::Feedback, ..FhaOptions::new(2, 32) };
    let seed = 13385421171684671033;
    assert_matches_the_reference(&Problem {
        options,
        lengths: vec![1, 1, 0],
        label: None,
        magnitude: 300.0,
        seed,
    });
}

/// Lengths around the sizes of stretches, chunks and the two-pass backward.
#[test]
fn long_sequences_match_the_reference() {
    for (heads, d, lengths, causal, normalization) in [
        (2, 4, &[1300, 30][..], true, Normalization::Joint),
        (2, 4, &[1030], false, Normalization::Masked),
        (4, 3, &[513, 1025], true, Normalization::Masked),
        (2, 8, &[2100], true, Normalization::Joint),
    ] {
        let options = FhaOptions { causal, normalization, ..FhaOptions::new(heads, d) };
        let batch = Batch::random(&options, lengths, 3);
        assert_within(&errors(&options, &batch), &(options, lengths));
    }
    let options =
        FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..FhaOptions::new(3, 5) };
    assert_within(&errors(&options, &Batch::random(&options, &[1500, 7], 4)), &options);
}

#[test]
fn zero_padding_of_heads_does_not_change_results() {
    let narrow = FhaOptions::new(2, 8);
    let wide = FhaOptions { scale: narrow.scale, ..FhaOptions::new(2, 16) };
    let batch = Batch::random(&narrow, &[50, 3, 17], 5);
    let pad = |x: &[f32]| x.chunks(8).flat_map(|x| x.iter().copied().chain([0.0; 8])).collect::<Vec<f32>>();
    let padded =
        Batch { q: pad(&batch.q), k: pad(&batch.k), v: pad(&batch.v), d_o: pad(&batch.d_o), ..batch.clone() };
    let (narrow, wide) = (run(&narrow, &batch), run(&wide, &padded));
    assert_eq!(narrow.lse, wide.lse);
    for (narrow, wide) in [(&narrow.o, &wide.o), (&narrow.dk, &wide.dk), (&narrow.dv, &wide.dv)] {
        assert_eq!(&pad(narrow), wide);
    }
}

#[test]
fn a_packed_batch_equals_its_sequences_one_by_one() {
    for options in [
        FhaOptions::new(2, 16),
        FhaOptions { causal: false, normalization: Normalization::Masked, ..FhaOptions::new(4, 5) },
        FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..FhaOptions::new(3, 8) },
    ] {
        let lengths = [40, 0, 1, 300, 1100, 0, 77, 8];
        let batch = Batch::random(&options, &lengths, 6);
        let mut alone = Results { o: vec![], lse: vec![], dq: vec![], dk: vec![], dv: vec![] };
        for index in 0..lengths.len() {
            let r = run(&options, &batch.sequence(&options, index));
            alone.o.extend(r.o);
            alone.lse.extend(r.lse);
            alone.dq.extend(r.dq);
            alone.dk.extend(r.dk);
            alone.dv.extend(r.dv);
        }
        assert!(run(&options, &batch).bits() == alone.bits(), "{options:?}");
    }
}

#[test]
fn results_are_bitwise_equal_for_any_number_of_threads() {
    let options = FhaOptions::new(2, 16);
    let lengths: Vec<usize> = (0..60).map(|i| i * 13 % 90).chain([1500, 700, 1029]).collect();
    let batch = Batch::random(&options, &lengths, 7);
    let with = |threads: usize| {
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads should start");
        pool.install(|| run(&options, &batch)).bits()
    };
    let one = with(1);
    for threads in [2, 3, 8] {
        assert!(with(threads) == one, "{threads} threads");
    }
}

/// In tiles that share keys, in the last rows of a partial tile, across stretches, and across the
/// pieces of a long sequence.
#[test]
fn non_finite_input_reaches_only_dependent_results() {
    let engine = |options: &FhaOptions, inputs: Inputs, d_o: &[f32]| {
        let n = inputs.q.len() / (options.heads * options.head_dim);
        let (mut o, mut lse) = (vec![0.0; options.output_len(n)], vec![0.0; options.lse_len(n)]);
        forward(options, inputs, &mut o, &mut lse).expect("inputs should be accepted");
        let mut gradients = [(); 3].map(|()| vec![0.0; inputs.q.len()]);
        let [dq, dk, dv] = &mut gradients;
        backward(options, inputs, &o, &lse, d_o, Gradients { dq, dk, dv })
            .expect("inputs should be accepted");
        bodies::Results { o, lse, gradients }
    };
    let base = FhaOptions::new(2, 16);
    for options in [
        base,
        FhaOptions { normalization: Normalization::Masked, ..base },
        FhaOptions { causal: false, ..base },
        FhaOptions { label_mask: LabelMask::None, ..base },
        FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..base },
        FhaOptions::new(4, 5),
    ] {
        for at in [0, 1, 7, 25, 38, 39] {
            bodies::check_propagation(options, &[20, 40, 7], 1, at, &engine);
        }
        bodies::check_propagation(options, &[1], 0, 0, &engine);
    }
    bodies::check_propagation(base, &[600], 0, 590, &engine);
    bodies::check_propagation(FhaOptions::new(2, 4), &[9, 1030, 5], 1, 511, &engine);
    // Scores above the bound for exact computation, with a finite or non-finite token.
    bodies::check_propagation(FhaOptions { scale: 60.0, ..base }, &[20, 40, 7], 1, 25, &engine);
    bodies::check_propagation(FhaOptions { scale: 60.0, ..FhaOptions::new(2, 4) }, &[1030], 0, 700, &engine);
}

#[test]
fn large_scores_do_not_overflow() {
    for lengths in [&[50usize, 21][..], &[1200]] {
        let options = FhaOptions::new(2, 16);
        let mut batch = Batch::random(&options, lengths, 9);
        for x in batch.q.iter_mut().chain(&mut batch.k) {
            *x *= 70.0; // scores of up to 2e4
        }
        let r = run(&options, &batch);
        let lse = r.lse.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(lse > 1e4, "the test should reach large scores, not {lse}");
        assert!(r.o.iter().chain(&r.lse).chain(&r.dq).chain(&r.dk).chain(&r.dv).all(|x| x.is_finite()));
        // The probabilities of kept keys add up to at most 1.
        let largest = batch.v.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(r.o.iter().all(|x| x.abs() <= largest * 1.0001));
    }
}

/// Regression: if one key has nearly all of the probability, `ds` is the result of a cancellation
/// and once had only three correct digits. Each gradient is compared on its own scale.
#[test]
fn a_saturated_softmax_has_accurate_gradients() {
    for (lengths, seed) in [(&[50usize, 21][..], 31), (&[50, 21], 32), (&[9, 30], 33), (&[1100], 34)] {
        for normalization in [Normalization::Joint, Normalization::Masked] {
            let options = FhaOptions { normalization, ..FhaOptions::new(2, 16) };
            let mut batch = Batch::random(&options, lengths, seed);
            for x in batch.q.iter_mut().chain(&mut batch.k) {
                *x *= 30.0;
            }
            let fused = run(&options, &batch);
            let exact = reference::backward(&options, batch.inputs(), &batch.d_o).expect("inputs are valid");
            for (name, x, r) in [("dq", &fused.dq, &exact.dq), ("dk", &fused.dk, &exact.dk)] {
                let largest = r.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                let error = relative_error(x, r, largest);
                assert!(error < 5e-5, "{lengths:?} {normalization:?} {name}: {error:e} of {largest:e}");
            }
        }
    }
}

/// All scores of a row may be far below 0: only their differences matter.
#[test]
fn scores_far_below_zero_match_the_reference() {
    for lengths in [&[40usize, 9][..], &[400]] {
        for sign in [-1.0, 1.0] {
            let options = FhaOptions { scale: 1.0, ..FhaOptions::new(2, 4) };
            let mut batch = Batch::random(&options, lengths, 11);
            batch.q.iter_mut().chain(&mut batch.k).for_each(|x| *x *= 0.2);
            // The first feature moves all scores by 36, which is 52 in base 2.
            batch.q.chunks_mut(4).for_each(|q| q[0] = sign * 9.0);
            batch.k.chunks_mut(4).for_each(|k| k[0] = 4.0);
            for error in errors(&options, &batch) {
                assert!(error.passes, "{lengths:?}, {sign}: {error:?}");
            }
        }
    }
}

/// With the joint softmax, a masked key may take nearly all of a row's weight. The outputs of the
/// kept keys are tiny then, but as accurate as others.
#[test]
fn outputs_beside_a_dominant_masked_key_are_accurate() {
    for length in [1usize, 30, 400] {
        let options = FhaOptions { scale: 1.0, ..FhaOptions::new(2, 1) };
        let mut batch = Batch::random(&options, &[length], 12);
        batch.label.fill(1);
        for (q, k) in batch.q.chunks_mut(2).zip(batch.k.chunks_mut(2)) {
            // Head 0 is masked; its scores are 40, which is 58 in base 2.
            (q[1], k[0]) = (8.0, 5.0);
            k[1] *= 0.1;
        }
        for error in errors(&options, &batch) {
            assert!(error.passes, "{length}: {error:?}");
        }
    }
}

/// Integer scores are exact in f32, so large ones are as accurate as small ones.
#[test]
fn large_integer_scores_match_the_reference() {
    for lengths in [&[40usize, 9][..], &[1100]] {
        let options = FhaOptions { scale: 1.0, ..FhaOptions::new(2, 4) };
        let mut batch = Batch::random(&options, lengths, 10);
        for x in batch.q.iter_mut().chain(&mut batch.k) {
            *x = (*x * 2.0).round() * 2.0;
        }
        // One feature raises all scores of a row equally: only `lse` changes.
        for x in batch.q.chunks_mut(4).chain(batch.k.chunks_mut(4)) {
            x[3] = 32.0;
        }
        assert_within(&errors(&options, &batch), &lengths);
    }
}

#[test]
fn a_row_without_keys_has_output_zero() {
    let options = FhaOptions { causal: false, normalization: Normalization::Masked, ..FhaOptions::new(2, 4) };
    // A positive query always has a key in key head 1: itself. Only scores of -inf give a row
    // without keys.
    let mut batch = Batch::random(&options, &[6], 11);
    batch.label.copy_from_slice(&[0, 0, 1, 1, 1, 0]);
    batch.q.fill(1.0);
    batch.k.chunks_mut(4).for_each(|k| k.copy_from_slice(&[f32::NEG_INFINITY, 0.0, 0.0, 0.0]));
    batch.q.chunks_mut(4).for_each(|q| q.copy_from_slice(&[1.0, 0.0, 0.0, 0.0]));
    let n = batch.tokens();
    let (mut o, mut lse) = (vec![1.0; options.output_len(n)], vec![1.0; options.lse_len(n)]);
    forward(&options, batch.inputs(), &mut o, &mut lse).expect("inputs should be accepted");
    assert!(o.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY), "{o:?} {lse:?}");
}

/// The gradients of the reference against central differences in f64.
#[test]
fn reference_gradients_match_finite_differences() {
    for options in [
        FhaOptions::new(2, 3),
        FhaOptions { normalization: Normalization::Masked, ..FhaOptions::new(4, 2) },
        FhaOptions { causal: false, ..FhaOptions::new(2, 3) },
        FhaOptions { label_mask: LabelMask::None, ..FhaOptions::new(2, 3) },
        FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..FhaOptions::new(3, 2) },
    ] {
        let batch = Batch::random(&options, &[7, 0, 1, 4], 12);
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let mut x = [wide(&batch.q), wide(&batch.k), wide(&batch.v)];
        let loss = |[q, k, v]: &[Vec<f64>; 3]| -> f64 {
            let tokens = reference::Tokens { q, k, v };
            let output = reference::forward_in(&options, tokens, &batch.cu_seqlens, &batch.label);
            output.o.iter().zip(&batch.d_o).map(|(o, &d)| o * f64::from(d)).sum()
        };
        let gradients = reference::backward(&options, batch.inputs(), &batch.d_o).expect("valid inputs");
        for (tensor, gradient) in [gradients.dq, gradients.dk, gradients.dv].iter().enumerate() {
            let largest = gradient.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            for index in 0..gradient.len() {
                let (h, old) = (1e-5, x[tensor][index]);
                x[tensor][index] = old + h;
                let up = loss(&x);
                x[tensor][index] = old - h;
                let difference = (up - loss(&x)) / (2.0 * h);
                x[tensor][index] = old;
                let error = (difference - gradient[index]).abs();
                assert!(error <= 1e-8 * largest, "{options:?} tensor {tensor} index {index}: {error:e}");
            }
        }
    }
}

/// The error of the fused engine is at most twice the error of the naive computation in f32.
#[test]
fn fused_is_as_accurate_as_naive_f32() {
    let options = FhaOptions::new(2, 16);
    let batch = Batch::random(&options, &[300, 57], 13);
    let exact = reference::forward(&options, batch.inputs()).expect("valid inputs");
    let gradients = reference::backward(&options, batch.inputs(), &batch.d_o).expect("valid inputs");
    let fused = run(&options, &batch);
    let mut naive = fused.clone();
    reference::naive_forward(&options, batch.inputs(), &mut naive.o, &mut naive.lse).expect("valid inputs");
    let out = Gradients { dq: &mut naive.dq, dk: &mut naive.dk, dv: &mut naive.dv };
    reference::naive_backward(&options, batch.inputs(), &batch.d_o, out).expect("valid inputs");
    for (name, fused, naive, exact) in [
        ("o", &fused.o, &naive.o, &exact.o),
        ("lse", &fused.lse, &naive.lse, &exact.lse),
        ("dq", &fused.dq, &naive.dq, &gradients.dq),
        ("dk", &fused.dk, &naive.dk, &gradients.dk),
        ("dv", &fused.dv, &naive.dv, &gradients.dv),
    ] {
        let (fused, naive) = (compare(name, fused, exact).error, compare(name, naive, exact).error);
        println!("{name}: fused {fused:.1e}, naive {naive:.1e}");
        assert!(fused <= 2.0 * naive + f64::from(f32::EPSILON), "{name}: fused {fused:e}, naive {naive:e}");
    }
}

fn refused(options: &FhaOptions, inputs: Inputs) -> AttentionError {
    let (mut o, mut lse) = (vec![5.0; 8], vec![5.0; 2]);
    let error = forward(options, inputs, &mut o, &mut lse).expect_err("the arguments should be rejected");
    assert!(o.iter().chain(&lse).all(|&x| x == 5.0), "a rejected call should not write");
    error
}

#[test]
fn errors_name_the_invalid_argument() {
    let x = [0.0; 2 * 2];
    let good = Inputs { q: &x, k: &x, v: &x, cu_seqlens: &[0, 2], label: &[0, 1] };
    let options = FhaOptions::new(2, 1);
    let mut o = [0.0; 4];
    forward(&options, good, &mut o, &mut [0.0; 2]).expect("valid arguments should be accepted");

    use AttentionError as E;
    let unmasked = FhaOptions { label_mask: LabelMask::None, ..options };
    assert_eq!(refused(&FhaOptions { heads: 0, ..options }, good), E::Zero { name: "heads" });
    assert_eq!(refused(&FhaOptions { head_dim: 0, ..options }, good), E::Zero { name: "head_dim" });
    for heads in [1, 3] {
        assert_eq!(refused(&FhaOptions { heads, ..options }, good), E::OddHeads { heads });
    }
    assert_eq!(refused(&FhaOptions { heads: 3, ..unmasked }, good), E::OddHeads { heads: 3 });
    assert!(matches!(refused(&FhaOptions { scale: f32::NAN, ..options }, good), E::Scale { .. }));
    assert!(matches!(refused(&FhaOptions { scale: f32::INFINITY, ..options }, good), E::Scale { .. }));
    let per_head = FhaOptions { pairing: Pairing::PerHead, ..options };
    assert_eq!(refused(&per_head, good), E::PerHeadLabelMask);

    let cu = |cu_seqlens: &'static [u32]| refused(&options, Inputs { cu_seqlens, ..good });
    assert_eq!(cu(&[]), E::NoSequences);
    assert_eq!(cu(&[1, 2]), E::FirstSequence { found: 1 });
    assert_eq!(cu(&[0, 2, 1, 2]), E::DecreasingSequences { sequence: 1, start: 2, end: 1 });
    assert_eq!(cu(&[0, 1]), E::LastSequence { end: 1, tokens: 2 });
    assert_eq!(cu(&[0]), E::LastSequence { end: 0, tokens: 2 });

    let short = |name, expected, found, shape| E::Length { name, shape, expected, found };
    let width = "[N, H, d]";
    assert_eq!(refused(&options, Inputs { q: &x[..3], ..good }), short("q", 4, 3, width));
    assert_eq!(refused(&options, Inputs { k: &x[..2], ..good }), short("k", 4, 2, width));
    assert_eq!(refused(&options, Inputs { v: &[], ..good }), short("v", 4, 0, width));
    assert_eq!(refused(&options, Inputs { label: &[1], ..good }), short("label", 2, 1, "[N]"));
    assert_eq!(refused(&unmasked, Inputs { label: &[1], ..good }), short("label", 2, 1, "[N]"));
    assert_eq!(refused(&options, Inputs { label: &[0, 2], ..good }), E::Label { token: 1, value: 2 });
    assert_eq!(refused(&options, good), short("o", 4, 8, "[N, Q, K, d]"));
    let error = forward(&options, good, &mut o, &mut [0.0; 3]);
    assert_eq!(error, Err(short("lse", 2, 3, "[N, Q]")));

    let lengths = |d_o: usize, d: [usize; 3]| {
        let [mut dq, mut dk, mut dv] = d.map(|len| vec![0.0; len]);
        let gradients = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        backward(&options, good, &[0.0; 4], &[0.0; 2], &vec![0.0; d_o], gradients)
    };
    assert_eq!(lengths(3, [4, 4, 4]), Err(short("d_o", 4, 3, "[N, Q, K, d]")));
    assert_eq!(lengths(4, [3, 4, 4]), Err(short("dq", 4, 3, width)));
    assert_eq!(lengths(4, [4, 5, 4]), Err(short("dk", 4, 5, width)));
    assert_eq!(lengths(4, [4, 4, 0]), Err(short("dv", 4, 0, width)));
}

#[test]
fn labels_are_ignored_without_a_mask() {
    let options = FhaOptions { label_mask: LabelMask::None, ..FhaOptions::new(2, 4) };
    let mut batch = Batch::random(&options, &[9, 4], 14);
    let without = run(&options, &batch);
    batch.label = vec![9; 13];
    assert!(run(&options, &batch).bits() == without.bits());
}

#[test]
fn an_empty_batch_is_accepted() {
    let options = FhaOptions::new(2, 16);
    for cu_seqlens in [&[0u32][..], &[0, 0, 0]] {
        let inputs = Inputs { q: &[], k: &[], v: &[], cu_seqlens, label: &[] };
        forward(&options, inputs, &mut [], &mut []).expect("an empty batch should be accepted");
        let gradients = Gradients { dq: &mut [], dk: &mut [], dv: &mut [] };
        backward(&options, inputs, &[], &[], &[], gradients).expect("an empty batch should be accepted");
    }
}
