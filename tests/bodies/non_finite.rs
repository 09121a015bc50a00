//! Non-finite propagation in attention: which results a non-finite input may change, on every
//! device. All other results keep their bits.

use dfar::attention::{FhaOptions, Inputs};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

/// Results of both passes.
#[derive(Clone, PartialEq, Debug)]
pub struct Results {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
    /// `dq`, `dk`, `dv`
    pub gradients: [Vec<f32>; 3],
}

/// The tensor with a non-finite value.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Poisoned {
    Q,
    K,
    V,
    DO,
}

/// Tokens of a sequence of `tokens` whose (`o`, `lse`, `dq`, `dk`, `dv`) depend on a non-finite
/// token `at`, as in docs/kernels/attention.md.
fn may_show(poisoned: Poisoned, causal: bool, at: usize, tokens: usize) -> [Range<usize>; 5] {
    let (none, own, all) = (0..0, at..at + 1, 0..tokens);
    let (later, earlier) = if causal { (at..tokens, 0..at + 1) } else { (all.clone(), all.clone()) };
    match poisoned {
        Poisoned::Q => [own.clone(), own.clone(), own, earlier.clone(), earlier],
        Poisoned::K => [later.clone(), later.clone(), later, all.clone(), all],
        Poisoned::V => [later.clone(), none.clone(), later, all, none],
        Poisoned::DO => [none.clone(), none, own, earlier.clone(), earlier],
    }
}

/// Puts non-finite values into token `at` of sequence `sequence` of a random batch, tensor by
/// tensor. `run` computes the results from options, inputs and the gradient of `o`.
pub fn check_propagation(
    options: FhaOptions,
    lengths: &[usize],
    sequence: usize,
    at: usize,
    run: &dyn Fn(&FhaOptions, Inputs, &[f32]) -> Results,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(22);
    let (width, out, slots) = (options.heads * options.head_dim, options.output_len(1), options.lse_len(1));
    let n = lengths.iter().sum::<usize>();
    let ends = lengths.iter().scan(0, |end, &length| {
        *end += length as u32;
        Some(*end)
    });
    let cu_seqlens: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let label: Vec<u8> = (0..n).map(|_| rng.random_range(0..2)).collect();
    let tensors = [width, width, width, out]
        .map(|width| (0..n * width).map(|_| rng.random_range(-1.5f32..1.5)).collect::<Vec<f32>>());
    let run = |[q, k, v, d_o]: &[Vec<f32>; 4]| {
        run(&options, Inputs { q, k, v, cu_seqlens: &cu_seqlens, label: &label }, d_o)
    };
    let (clean, start) = (run(&tensors), lengths[..sequence].iter().sum::<usize>());
    for poisoned in [Poisoned::Q, Poisoned::K, Poisoned::V, Poisoned::DO] {
        // All features of the token, or one feature per head.
        for (bad, step) in [
            (f32::NAN, 1),
            (f32::NAN, options.head_dim),
            (f32::INFINITY, options.head_dim),
            (f32::NEG_INFINITY, 1),
        ] {
            let mut tensors = tensors.clone();
            let row = if poisoned == Poisoned::DO { out } else { width };
            let values = &mut tensors[poisoned as usize][(start + at) * row..][..row];
            values.iter_mut().skip(step - 1).step_by(step).for_each(|x| *x = bad);
            let results = run(&tensors);
            let name = format!("{bad} in each {step} of {poisoned:?}, {options:?} {lengths:?}");
            let [dq, dk, dv] = &results.gradients;
            let [clean_dq, clean_dk, clean_dv] = &clean.gradients;
            let tensors = [
                ("o", &results.o, &clean.o, out),
                ("lse", &results.lse, &clean.lse, slots),
                ("dq", dq, clean_dq, width),
                ("dk", dk, clean_dk, width),
                ("dv", dv, clean_dv, width),
            ];
            let may_show = may_show(poisoned, options.causal, at, lengths[sequence]);
            for ((tensor, x, clean, row), may_show) in tensors.into_iter().zip(may_show) {
                let mut shows = false;
                for (token, (x, clean)) in x.chunks(row).zip(clean.chunks(row)).enumerate() {
                    if token >= start && may_show.contains(&(token - start)) {
                        shows |= x.iter().any(|x| !x.is_finite());
                    } else {
                        assert!(x == clean, "{tensor} of token {token}: {name}");
                    }
                }
                // An infinite value can give a score of -inf, which has weight 0.
                assert!(shows || may_show.is_empty() || bad.is_infinite(), "{tensor} should show {name}");
            }
        }
    }
}
