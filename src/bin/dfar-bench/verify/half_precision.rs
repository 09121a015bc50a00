//! Tolerances of 16-bit results: the reference is computed from the same rounded inputs, and the
//! tolerance is twice the error of an unfused computation in that type (the rule of FlashAttention;
//! Dao et al., 2022).

use super::results::Results;
use super::{Fha, TensorError, largest, relative_error};
use dfar::attention::{FhaOptions, Inputs, LabelMask, Normalization, Pairing, reference};
use dfar::device::cuda::Element;
use half::{bf16, f16};

/// A result passes if its error is at most this many times that of the unfused computation, ...
const FACTOR: f64 = 2.0;
/// ... plus this, for results that are exact in the unfused computation by chance.
const SLACK: f64 = 1e-6;

/// `x` rounded to the nearest number of the type.
fn round(element: Element, x: f32) -> f32 {
    match element {
        Element::F32 => x,
        Element::Bf16 => bf16::from_f32(x).to_f32(),
        Element::F16 => f16::from_f32(x).to_f32(),
    }
}

/// The case with inputs rounded to `element`, and the float64 results on those.
pub(super) fn rounded(fha: &Fha, element: Element) -> Fha {
    let rounded = |x: &Vec<f32>| x.iter().map(|&x| round(element, x)).collect::<Vec<f32>>();
    let mut fha = Fha { qkv: fha.qkv.each_ref().map(rounded), d_o: rounded(&fha.d_o), ..fha.clone() };
    // Invalid arguments are reported by the engine.
    if let (Ok(exact), Ok(gradients)) = (
        reference::forward(&fha.options, fha.inputs()),
        reference::backward(&fha.options, fha.inputs(), &fha.d_o),
    ) {
        (fha.o, fha.lse) = (exact.o, exact.lse);
        fha.gradients = [gradients.dq, gradients.dk, gradients.dv];
    }
    fha
}

/// Compares with the exact results of a [`rounded`] case.
pub(super) fn compare(fha: &Fha, element: Element, results: &Results) -> Vec<TensorError> {
    let unfused = unfused(&fha.options, fha.inputs(), &fha.d_o, element);
    // A gradient that consists only of rounding errors of cancelling terms is judged relative to
    // the largest gradient.
    let floor = fha.gradients.iter().map(|x| largest(x)).fold(0.0, f64::max) / 400.0;
    let judge = |tensor: &str, fused: &[f32], unfused: &[f32], exact: &[f64], floor: f64| {
        let scale = largest(exact).max(floor);
        let tolerance = tolerance(element, relative_error(unfused, exact, scale));
        TensorError::new(tensor, fused, relative_error(fused, exact, scale), tolerance)
    };
    let mut errors = vec![
        judge("o", &results.o, &unfused.o, &fha.o, 0.0),
        judge("lse", &results.lse, &unfused.lse, &fha.lse, 0.0),
    ];
    let gradients = results.gradients.iter().zip(&unfused.gradients).zip(&fha.gradients);
    errors.extend(
        ["dq", "dk", "dv"]
            .into_iter()
            .zip(gradients)
            .map(|(tensor, ((fused, unfused), exact))| judge(tensor, fused, unfused, exact, floor)),
    );
    errors
}

/// Largest error that passes, for the error of the unfused computation. If that overflows, it says
/// nothing, and some roundings of the type are allowed.
pub fn tolerance(element: Element, unfused: f64) -> f64 {
    let rounding = match element {
        Element::F32 => f64::from(f32::EPSILON),
        Element::Bf16 => bf16::EPSILON.to_f64(),
        Element::F16 => f16::EPSILON.to_f64(),
    };
    if unfused.is_finite() { FACTOR * unfused + SLACK } else { 4.0 * rounding }
}

/// The operation without fusion: every tensor that it would write to memory is rounded to
/// `element`.
pub fn unfused(options: &FhaOptions, inputs: Inputs, d_o: &[f32], element: Element) -> Results {
    let (h, d, slots, key_slots) =
        (options.heads, options.head_dim, options.query_slots(), options.key_slots());
    let group = if options.label_mask == LabelMask::Feedback { h / 2 } else { 0 };
    let round = |x: f32| round(element, x);
    let Inputs { q, k, v, cu_seqlens, label } = inputs;
    let row =
        |x: &[f32], token: usize, head: usize| -> Vec<f32> { x[(token * h + head) * d..][..d].to_vec() };
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0f32, |sum, (x, y)| sum + x * y);
    let n = label.len();
    let mut results = Results {
        o: vec![0.0; options.output_len(n)],
        lse: vec![f32::NEG_INFINITY; options.lse_len(n)],
        gradients: [(); 3].map(|()| vec![0.0; q.len()]),
    };
    for bounds in cu_seqlens.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        for i in start..end {
            for a in 0..slots {
                let query = a + group * label[i] as usize;
                let q_row = row(q, i, query);
                let visible = start..if options.causal { i + 1 } else { end };
                let pairs: Vec<(usize, usize, bool)> = visible
                    .flat_map(|j| (0..h).map(move |b| (j, b)))
                    .filter(|&(_, b)| options.pairing == Pairing::Factorized || b == query)
                    .map(|(j, b)| (j, b, group == 0 || (b >= group) == (label[j] == 1)))
                    .filter(|&(.., kept)| kept || options.normalization == Normalization::Joint)
                    .collect();
                let s: Vec<f32> = pairs
                    .iter()
                    .map(|&(j, b, _)| round(options.scale * round(dot(&q_row, &row(k, j, b)))))
                    .collect();
                let peak = s.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
                let sum: f32 = s.iter().map(|x| (x - peak).exp()).sum();
                results.lse[i * slots + a] = peak + sum.ln();
                let p: Vec<f32> = s.iter().map(|x| round((x - peak).exp() / sum)).collect();
                let slot = |b: usize| ((i * slots + a) * key_slots + if key_slots == 1 { 0 } else { b }) * d;
                for (&(j, b, kept), &p) in pairs.iter().zip(&p) {
                    if kept {
                        let v_row = row(v, j, b);
                        results.o[slot(b)..][..d].iter_mut().zip(&v_row).for_each(|(o, v)| *o += p * v);
                    }
                }
                let dp: Vec<f32> = pairs
                    .iter()
                    .map(
                        |&(j, b, kept)| {
                            if kept { round(dot(&d_o[slot(b)..][..d], &row(v, j, b))) } else { 0.0 }
                        },
                    )
                    .collect();
                let delta: f32 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for (index, &(j, b, kept)) in pairs.iter().enumerate() {
                    let ds = round(p[index] * (dp[index] - delta)) * options.scale;
                    let k_row = row(k, j, b);
                    let [dq, dk, dv] = &mut results.gradients;
                    for e in 0..d {
                        dq[(i * h + query) * d + e] += ds * k_row[e];
                        dk[(j * h + b) * d + e] += ds * q_row[e];
                        if kept {
                            dv[(j * h + b) * d + e] += p[index] * d_o[slot(b) + e];
                        }
                    }
                }
            }
        }
    }
    let all = [&mut results.o].into_iter().chain(&mut results.gradients);
    all.flatten().for_each(|x| *x = round(*x));
    results
}
