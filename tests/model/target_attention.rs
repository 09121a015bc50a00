//! Target attention on the CPU: fused and unfused against the definition in f64, and determinism.

#[path = "../bodies/target_attention.rs"]
mod bodies;

use crate::skip::skip;
use bodies::{Case, InBf16, NAMES, Output, assert_close, cases, ds_before, error, kernel_cases, last, wide};
use dfar::device::TargetState;
use dfar::device::cpu::Cpu;
use dfar::device::cpu::product::F32;
use dfar::device::cpu::target_attention::{backward, forward, unfused::Unfused};

/// Runs one of the two implementations, forward and backward. Outputs start as NaN, so an unwritten
/// value shows.
fn run(case: &Case, fused: bool) -> Output<f32> {
    let nan = |n: usize| vec![f32::NAN; n];
    let (d, rows) = (case.width, case.row_length.len());
    let mut out = Output {
        e: nan(last(&case.score_offsets)),
        lse: nan(rows),
        att: nan(rows * d),
        ds: (0..case.s.len()).map(ds_before).collect(),
        da: nan(case.a.len()),
        dr: nan(case.r.len()),
        weights: case.weights.each_ref().map(|w| nan(w.len())),
    };
    let (shape, index, inputs, weights) = (case.shape(), case.index(), case.inputs(), case.weights());
    let mut unfused = Unfused::new(shape);
    let (state, gradients) = out.buffers();
    let TargetState { e, lse, att } = state;
    let state = TargetState { e: &mut *e, lse: &mut *lse, att: &mut *att };
    if fused {
        forward(F32, shape, index, inputs, weights, state);
        let state = TargetState { e: &*e, lse: &*lse, att: &*att };
        backward(F32, shape, index, inputs, weights, state, &case.datt, gradients);
    } else {
        unfused.forward(index, inputs, weights, state);
        let state = TargetState { e: &*e, lse: &*lse, att: &*att };
        unfused.backward(index, inputs, weights, state, &case.datt, gradients);
    }
    out
}

#[test]
fn agrees_with_the_definition_in_f64() {
    for (name, case) in cases() {
        let want = case.reference();
        assert_close(&format!("fused, {name}"), &run(&case, true), &want);
        assert_close(&format!("unfused, {name}"), &run(&case, false), &want);
        assert_close(&format!("the device, {name}"), &case.run_on(&Cpu::new()), &want);
    }
}

/// The cases include rows without history and candidates without rows.
#[test]
fn empty_histories_have_output_zero() {
    let (_, case) = &cases()[0];
    assert!(case.row_length.contains(&0) && case.row_length.iter().any(|length| *length > 1));
    assert!(case.row_offsets.windows(2).any(|pair| pair[0] == pair[1]));
    let out = run(case, true);
    for (row, _) in case.row_length.iter().enumerate().filter(|(_, length)| **length == 0) {
        assert_eq!(out.lse[row], f32::NEG_INFINITY);
        assert!(out.att[row * case.width..][..case.width].iter().all(|x| *x == 0.0));
    }
}

/// Scores far apart and far from 0: the online softmax must not overflow, nor underflow for a short
/// prefix.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let mut case = Case::random(16, [24, 16], &[60, 45, 80], 6, 6, 99);
    case.weights[4].iter_mut().for_each(|w| *w *= 60.0);
    let want = case.reference();
    let spread = want.e.iter().fold(0.0f64, |m, e| m.max(e.abs()));
    assert!(spread > 150.0, "scores only reach {spread}");
    let got = run(&case, true);
    // The relative error of an exponential is the absolute error of the score.
    for (name, got, want) in
        [("att", &got.att, &want.att), ("ds", &got.ds, &want.ds), ("da", &got.da, &want.da)]
    {
        let error = error(got, want);
        assert!(error < 1e-5 * spread, "{name} is off by {error:.2e}");
    }
    assert!(error(&got.lse, &want.lse) < 1e-5);
}

/// Weights of 1e-20 and less have no effect, but their gradients would be subnormal numbers, on
/// which a processor is more than ten times slower.
#[test]
fn sharp_attention_has_no_subnormal_gradients() {
    let mut case = Case::random(16, [24, 16], &[60, 45, 80], 6, 6, 99);
    case.weights[4].iter_mut().for_each(|w| *w *= 60.0);
    case.datt.iter_mut().for_each(|x| *x *= 1e-6);
    let out = run(&case, true);
    for (name, gradient) in
        [("da", &out.da), ("dr", &out.dr)].into_iter().chain(out.weights.iter().map(|w| ("w", w)))
    {
        let subnormal = gradient.iter().filter(|x| x.is_subnormal()).count();
        assert_eq!(subnormal, 0, "{name} has {subnormal} subnormal values of {}", gradient.len());
    }
}

/// The gradients of the reference against finite differences of its forward pass.
#[test]
fn reference_agrees_with_finite_differences() {
    let case = Case::random(8, [7, 4], &[6, 0, 9, 4], 3, 2, 5);
    let inputs = [&case.s, &case.a, &case.r].map(|x| wide(x));
    let weights = case.weights.each_ref().map(|w| wide(w));
    let mut reference = case.reference();
    for (i, ds) in reference.ds.iter_mut().enumerate() {
        *ds -= f64::from(ds_before(i));
    }
    let step = 1e-6;
    let check = |name: &str, analytic: f64, loss: &dyn Fn(f64) -> f64| {
        let slope = (loss(step) - loss(-step)) / (2.0 * step);
        assert!((slope - analytic).abs() < 1e-7, "{name}: {analytic} against {slope}");
    };
    for (which, analytic) in [&reference.ds, &reference.da, &reference.dr].into_iter().enumerate() {
        assert!(analytic.iter().any(|x| x.abs() > 1e-3));
        for (i, analytic) in analytic.iter().enumerate() {
            check(["ds", "da", "dr"][which], *analytic, &|step| {
                let mut inputs = inputs.clone();
                inputs[which][i] += step;
                case.loss(&case.reference_of(inputs, weights.clone(), |x| x).att)
            });
        }
    }
    for (which, analytic) in reference.weights.iter().enumerate() {
        for (i, analytic) in analytic.iter().enumerate() {
            check(NAMES[which], *analytic, &|step| {
                let mut weights = weights.clone();
                weights[which][i] += step;
                case.loss(&case.reference_of(inputs.clone(), weights, |x| x).att)
            });
        }
    }
}

#[test]
fn results_are_bitwise_equal_for_any_number_of_threads() {
    let lengths: Vec<u32> = (0..120).map(|i| (i * 37) % 90).collect();
    let case = Case::random(32, [80, 40], &lengths, 12, 3, 3);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| run(&case, true))
    };
    assert!(run(1) == run(3));
}

/// The CPU in bf16; `None`, with a line that says so, where the processor lacks it.
fn bf16() -> Option<Cpu> {
    Cpu::bf16().map_err(skip).ok()
}

#[test]
fn in_bf16_it_is_as_exact_as_the_unfused_computation() {
    let Some(cpu) = bf16() else { return };
    let mut errors = InBf16::default();
    for (name, case) in cases().into_iter().chain(kernel_cases()) {
        errors.add(&name, &case.run_on(&cpu), &case.reference(), &case.in_bf16());
    }
    errors.assert();
}

#[test]
fn in_bf16_results_are_bitwise_equal_for_any_number_of_threads() {
    let Some(cpu) = bf16() else { return };
    let lengths: Vec<u32> = (0..120).map(|i| (i * 37) % 90).collect();
    let case = Case::random(32, [80, 40], &lengths, 12, 3, 3);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| case.run_on(&cpu))
    };
    assert!(run(1) == run(3));
}
