//! Factorization-heads attention alone, forward and backward on plain slices, checked against a
//! naive loop.
//!
//!     cargo run --release --example attention

use dfar::attention::{AttentionError, FhaOptions, Gradients, Inputs, backward, forward};

const HEADS: usize = 2; // the first reads skipped events, the second liked ones
const DIM: usize = 4;
const WIDTH: usize = HEADS * DIM;

/// Computes, compares, prints.
pub fn main() -> Result<(), AttentionError> {
    // Two users' events, packed end to end: tokens 0..3 and 3..5. No padding.
    let cu_seqlens = [0, 3, 5];
    let label = [1, 0, 1, 0, 0]; // 1 liked, 0 skipped
    let tokens = label.len();
    let options = FhaOptions::new(HEADS, DIM);

    // Projected queries, keys and values: [tokens, heads, dim], row-major.
    let values = |seed: usize| -> Vec<f32> {
        (0..tokens * WIDTH).map(|i| ((i * 7 + seed * 13) % 19) as f32 / 10.0 - 0.9).collect()
    };
    let (q, k, v) = (values(1), values(2), values(3));
    let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: &cu_seqlens, label: &label };

    // Forward: the output o and the logarithm of each softmax denominator, which backward needs.
    let mut o = vec![0.0; options.output_len(tokens)];
    let mut lse = vec![0.0; options.lse_len(tokens)];
    forward(&options, inputs, &mut o, &mut lse)?;

    // Backward: from the gradient of the loss with respect to o to those of q, k and v.
    let d_o: Vec<f32> = (0..o.len()).map(|i| (i % 5) as f32 / 5.0 - 0.4).collect();
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let gradients = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    backward(&options, inputs, &o, &lse, &d_o, gradients)?;

    // The same results from the definition.
    let expected = naive([&q, &k, &v], &cu_seqlens, &label, options.scale, &d_o);
    for (name, x, y) in [
        ("o", &o, &expected.o),
        ("dq", &dq, &expected.dq),
        ("dk", &dk, &expected.dk),
        ("dv", &dv, &expected.dv),
    ] {
        let error = x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        println!("{name:<3} {} values, largest difference from the naive loop {error:.1e}", x.len());
        assert!(error < 1e-5, "{name}: {error}");
    }
    Ok(())
}

struct Naive {
    o: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Each token has one query head, that of its label. It attends to all key heads of all tokens up
/// to itself in one softmax. Key head b keeps only tokens with label b; each key head has its own
/// output.
fn naive(qkv: [&[f32]; 3], cu_seqlens: &[u32], label: &[u8], scale: f32, d_o: &[f32]) -> Naive {
    let [q, k, v] = qkv;
    // Row of a [tokens, heads, dim] array.
    let row = |token: usize, head: usize| token * WIDTH + head * DIM..token * WIDTH + (head + 1) * DIM;
    let dot = |x: &[f32], y: &[f32]| -> f32 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
    let zeros = || vec![0.0; q.len()];
    // With two heads and one query per token, o has the shape of q.
    let mut out = Naive { o: zeros(), dq: zeros(), dk: zeros(), dv: zeros() };
    for sequence in cu_seqlens.windows(2) {
        for i in sequence[0] as usize..sequence[1] as usize {
            let q_row = row(i, label[i] as usize);
            // (key token, key head) pairs that the query sees.
            let pairs: Vec<(usize, usize)> =
                (sequence[0] as usize..=i).flat_map(|j| (0..HEADS).map(move |b| (j, b))).collect();
            let kept = |j: usize, b: usize| label[j] as usize == b;
            let exp: Vec<f32> =
                pairs.iter().map(|&(j, b)| (scale * dot(&q[q_row.clone()], &k[row(j, b)])).exp()).collect();
            let sum: f32 = exp.iter().sum();
            let p: Vec<f32> = exp.iter().map(|x| x / sum).collect();
            // The gradient of each probability, and the mean of these under the softmax.
            let dp: Vec<f32> = pairs
                .iter()
                .map(|&(j, b)| if kept(j, b) { dot(&d_o[row(i, b)], &v[row(j, b)]) } else { 0.0 })
                .collect();
            let mean = dot(&p, &dp);
            for (n, &(j, b)) in pairs.iter().enumerate() {
                let ds = p[n] * (dp[n] - mean) * scale;
                for e in 0..DIM {
                    let (qe, ke, oe) = (q_row.start + e, row(j, b).start + e, row(i, b).start + e);
                    if kept(j, b) {
                        out.o[oe] += p[n] * v[ke];
                        out.dv[ke] += p[n] * d_o[oe];
                    }
                    out.dq[qe] += ds * k[ke];
                    out.dk[ke] += ds * q[qe];
                }
            }
        }
    }
    out
}
