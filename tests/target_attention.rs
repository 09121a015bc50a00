//! Target attention on the CPU: against the definition in f64, against the unfused form, and itself across threads.

use dfar::device::cpu::target_attention::{self, unfused};
use dfar::device::{Segments, TargetIndex, TargetWeights};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Arguments of one call, owned.
struct Case {
    width: usize,
    hidden: [usize; 2],
    cu_seqlens: Vec<u32>,
    pair_offsets: Vec<u32>,
    score_offsets: Vec<u32>,
    row_offsets: Vec<u32>,
    members: Vec<u32>,
    row_length: Vec<u32>,
    s: Vec<f32>,
    a: Vec<f32>,
    r: Vec<f32>,
    /// In the order of [`TargetWeights`].
    weights: [Vec<f32>; 6],
    datt: Vec<f32>,
}

/// Everything both directions write.
#[derive(Clone, Default, PartialEq)]
struct Output<T> {
    e: Vec<T>,
    lse: Vec<T>,
    att: Vec<T>,
    ds: Vec<T>,
    da: Vec<T>,
    dr: Vec<T>,
    weights: [Vec<T>; 6],
}

const NAMES: [&str; 6] = ["w0", "b0", "w1", "b1", "w2", "b2"];

/// Values of `ds` before the call, which must be added to.
fn ds_before(i: usize) -> f32 {
    (i % 7) as f32 * 0.125
}

fn last(offsets: &[u32]) -> usize {
    offsets[offsets.len() - 1] as usize
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

impl Case {
    /// Sequences of the given lengths; per sequence up to `pairs` pairs with prefixes of any length, per pair up to
    /// `rows` rows with prefixes of any length, row numbers shuffled.
    fn random(width: usize, hidden: [usize; 2], lengths: &[u32], pairs: u32, rows: u32, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let [mut cu_seqlens, mut pair_offsets] = [vec![0], vec![0]];
        let [mut score_offsets, mut row_offsets] = [vec![0], vec![0]];
        let mut length_of_member = Vec::new();
        let push = |offsets: &mut Vec<u32>, len: u32| offsets.push(last(offsets) as u32 + len);
        for &length in lengths {
            push(&mut cu_seqlens, length);
            let pairs = rng.random_range(0..=pairs);
            push(&mut pair_offsets, pairs);
            for _ in 0..pairs {
                let scored = rng.random_range(0..=length);
                push(&mut score_offsets, scored);
                let rows = rng.random_range(0..=rows);
                push(&mut row_offsets, rows);
                length_of_member.extend((0..rows).map(|_| rng.random_range(0..=scored)));
            }
        }
        let mut members: Vec<u32> = (0..length_of_member.len() as u32).collect();
        members.shuffle(&mut rng);
        let mut row_length = vec![0; members.len()];
        for (member, length) in members.iter().zip(length_of_member) {
            row_length[*member as usize] = length;
        }
        let (tokens, pairs) = (last(&cu_seqlens), last(&pair_offsets));
        let mut values =
            |n: usize, scale: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-scale..scale)).collect() };
        let [h0, h1] = hidden;
        let root = |n: usize| 1.7 / (n as f32).sqrt();
        Case {
            width,
            hidden,
            s: values(tokens * width, 1.0),
            a: values(tokens * width, 1.0),
            r: values(pairs * width, 1.0),
            weights: [
                values(4 * width * h0, root(3 * width)),
                values(h0, 0.2),
                values(h0 * h1, root(h0)),
                values(h1, 0.2),
                values(h1, 4.0 * root(h1)),
                values(1, 1.0),
            ],
            datt: values(members.len() * width, 1.0),
            cu_seqlens,
            pair_offsets,
            score_offsets,
            row_offsets,
            members,
            row_length,
        }
    }

    fn index(&self) -> TargetIndex<'_, [u32]> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.row_offsets[..], members: &self.members[..] },
            row_length: &self.row_length,
        }
    }

    fn weights(&self) -> TargetWeights<&[f32]> {
        let [w0, b0, w1, b1, w2, b2] = self.weights.each_ref().map(|w| &w[..]);
        TargetWeights { w0, b0, w1, b1, w2, b2 }
    }

    /// Runs one of the two implementations, forward and backward; outputs start as NaN, so nothing may be left out.
    fn run(&self, fused: bool) -> Output<f32> {
        let nan = |n: usize| vec![f32::NAN; n];
        let (d, hidden, rows) = (self.width, self.hidden, self.row_length.len());
        let (mut e, mut lse, mut att) = (nan(last(&self.score_offsets)), nan(rows), nan(rows * d));
        let mut ds: Vec<f32> = (0..self.s.len()).map(ds_before).collect();
        let (mut da, mut dr) = (nan(self.a.len()), nan(self.r.len()));
        let mut weights = self.weights.each_ref().map(|w| nan(w.len()));
        let [w0, b0, w1, b1, w2, b2] = weights.each_mut().map(|w| &mut w[..]);
        let dw = TargetWeights { w0, b0, w1, b1, w2, b2 };
        let (s, a, r, g) = (&self.s, &self.a, &self.r, &self.datt);
        let (i, w) = (|| self.index(), || self.weights());
        let (e_out, lse_out, att_out) = (&mut e, &mut lse, &mut att);
        let (ds_out, da_out, dr_out) = (&mut ds, &mut da, &mut dr);
        if fused {
            use target_attention::{backward, forward};
            forward(d, hidden, i(), s, a, r, w(), e_out, lse_out, att_out);
            backward(d, hidden, i(), s, a, r, w(), &e, &lse, &att, g, ds_out, da_out, dr_out, dw);
        } else {
            use unfused::{backward, forward};
            let kept = &mut unfused::Activations::default();
            forward(d, hidden, i(), s, a, r, w(), e_out, lse_out, att_out, kept);
            backward(d, hidden, i(), s, a, r, w(), &e, &lse, &att, g, ds_out, da_out, dr_out, dw, kept);
        }
        Output { e, lse, att, ds, da, dr, weights }
    }

    /// The definition in f64, entry by entry.
    fn reference(&self) -> Output<f64> {
        let inputs = [&self.s, &self.a, &self.r].map(|x| wide(x));
        self.reference_of(inputs, self.weights.each_ref().map(|w| wide(w)))
    }

    #[allow(clippy::needless_range_loop)]
    fn reference_of(&self, [s, a, r]: [Vec<f64>; 3], weights: [Vec<f64>; 6]) -> Output<f64> {
        let (d, [h0, h1]) = (self.width, self.hidden);
        let [w0, b0, w1, b1, w2, b2] = &weights;
        let mut out = Output {
            lse: vec![0.0; self.row_length.len()],
            att: vec![0.0; self.row_length.len() * d],
            ds: (0..s.len()).map(|i| f64::from(ds_before(i))).collect(),
            da: vec![0.0; a.len()],
            dr: vec![0.0; r.len()],
            weights: weights.each_ref().map(|w| vec![0.0; w.len()]),
            ..Output::default()
        };
        let dense = |x: &[f64], w: &[f64], b: &[f64]| -> Vec<f64> {
            let n = b.len();
            let sum = |j: usize| b[j] + x.iter().enumerate().map(|(i, x)| x * w[i * n + j]).sum::<f64>();
            (0..n).map(sum).collect()
        };
        let relu = |x: Vec<f64>| x.into_iter().map(|x| x.max(0.0)).collect::<Vec<_>>();
        for sequence in 0..self.cu_seqlens.len() - 1 {
            let first = self.cu_seqlens[sequence] as usize;
            for pair in self.pair_offsets[sequence] as usize..self.pair_offsets[sequence + 1] as usize {
                let length = (self.score_offsets[pair + 1] - self.score_offsets[pair]) as usize;
                let mut activations = Vec::new();
                for t in 0..length {
                    let (a, r) = (&a[(first + t) * d..][..d], &r[pair * d..][..d]);
                    let mut x = [a, r].concat();
                    x.extend((0..d).map(|i| a[i] - r[i]));
                    x.extend((0..d).map(|i| a[i] * r[i]));
                    let y0 = relu(dense(&x, w0, b0));
                    let y1 = relu(dense(&y0, w1, b1));
                    out.e.push(dense(&y1, w2, b2)[0]);
                    activations.push([x, y0, y1]);
                }
                let e = out.e[out.e.len() - length..].to_vec();
                let mut de = vec![0.0; length];
                let segment = self.row_offsets[pair] as usize..self.row_offsets[pair + 1] as usize;
                for row in self.members[segment].iter().map(|row| *row as usize) {
                    let length = self.row_length[row] as usize;
                    let largest = e[..length].iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = e[..length].iter().map(|e| (e - largest).exp()).sum();
                    out.lse[row] = largest + sum.ln();
                    let p: Vec<f64> = e[..length].iter().map(|e| (e - out.lse[row]).exp()).collect();
                    let g = |i: usize| f64::from(self.datt[row * d + i]);
                    let dot = |t: usize| (0..d).map(|i| g(i) * s[(first + t) * d + i]).sum::<f64>();
                    let mean: f64 = (0..length).map(|t| p[t] * dot(t)).sum();
                    for t in 0..length {
                        for i in 0..d {
                            out.att[row * d + i] += p[t] * s[(first + t) * d + i];
                            out.ds[(first + t) * d + i] += p[t] * g(i);
                        }
                        de[t] += p[t] * (dot(t) - mean);
                    }
                }
                let [dw0, db0, dw1, db1, dw2, _] = &mut out.weights;
                for (t, [x, y0, y1]) in activations.iter().enumerate() {
                    let mut dy1 = vec![0.0; h1];
                    for j in 0..h1 {
                        dw2[j] += de[t] * y1[j];
                        dy1[j] = if y1[j] > 0.0 { de[t] * w2[j] } else { 0.0 };
                        db1[j] += dy1[j];
                    }
                    let mut dy0 = vec![0.0; h0];
                    for i in 0..h0 {
                        for j in 0..h1 {
                            dw1[i * h1 + j] += y0[i] * dy1[j];
                            dy0[i] += if y0[i] > 0.0 { dy1[j] * w1[i * h1 + j] } else { 0.0 };
                        }
                        db0[i] += dy0[i];
                    }
                    for i in 0..d {
                        let mut dx = [0.0; 4];
                        for (block, dx) in dx.iter_mut().enumerate() {
                            for j in 0..h0 {
                                let at = (block * d + i) * h0 + j;
                                dw0[at] += x[block * d + i] * dy0[j];
                                *dx += dy0[j] * w0[at];
                            }
                        }
                        out.da[(first + t) * d + i] += dx[0] + dx[2] + dx[3] * r[pair * d + i];
                        out.dr[pair * d + i] += dx[1] - dx[2] + dx[3] * a[(first + t) * d + i];
                    }
                }
            }
        }
        out
    }

    fn loss(&self, att: &[f64]) -> f64 {
        att.iter().zip(&self.datt).map(|(x, y)| x * f64::from(*y)).sum()
    }
}

/// Largest error relative to the largest value of `want`; infinite where one of two is not finite or NaN.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().filter(|x| x.is_finite()).fold(1e-3f64, |m, x| m.max(x.abs()));
    let difference = |(got, want): (&f32, &f64)| match (got.is_finite(), want.is_finite()) {
        (true, true) => (f64::from(*got) - want).abs() / largest,
        _ if f64::from(*got) == *want => 0.0,
        _ => f64::INFINITY,
    };
    got.iter().zip(want).map(difference).fold(0.0, f64::max)
}

#[track_caller]
fn assert_close(what: &str, got: &Output<f32>, want: &Output<f64>) {
    let check = |name: &str, got: &[f32], want: &[f64], limit: f64| {
        let error = error(got, want);
        assert!(error <= limit, "{what}: {name} is off by {error:.2e} of the largest value");
    };
    check("e", &got.e, &want.e, 1e-5);
    check("lse", &got.lse, &want.lse, 1e-5);
    check("att", &got.att, &want.att, 1e-5);
    check("ds", &got.ds, &want.ds, 5e-5);
    check("da", &got.da, &want.da, 5e-5);
    check("dr", &got.dr, &want.dr, 5e-5);
    for ((name, got), want) in NAMES.iter().zip(&got.weights).zip(&want.weights) {
        check(name, got, want, 5e-5);
    }
    assert!(got.weights[5] == [0.0], "{what}: the gradient of b2 is exactly 0");
}

/// Widths and hidden layers at, below and across vector widths; empty and one-token sequences; lengths across
/// tiles; many rows a pair; nothing at all.
fn cases() -> Vec<(String, Case)> {
    let short = [5, 0, 1, 12, 3, 9, 2, 30];
    let long = [70, 0, 200, 1, 64, 129, 33, 65, 150, 90];
    let shapes: [(usize, [usize; 2], &[u32], u32, u32); 11] = [
        (8, [7, 4], &short, 4, 3),
        (8, [8, 4], &short, 5, 2),
        (1, [1, 1], &short, 3, 2),
        (5, [17, 33], &short, 3, 2),
        (16, [80, 40], &long, 3, 4),
        (32, [80, 40], &long, 10, 3),
        (32, [80, 40], &[20; 40], 10, 1),
        (64, [100, 48], &long, 3, 2),
        (32, [80, 40], &[100; 3], 4, 40),
        (32, [80, 40], &[], 4, 4),
        (32, [80, 40], &[0, 0], 4, 4),
    ];
    let case = |(seed, (width, hidden, lengths, pairs, rows))| {
        let name = format!("D = {width}, hidden {hidden:?}, lengths {lengths:?}");
        (name, Case::random(width, hidden, lengths, pairs, rows, seed))
    };
    (0u64..).zip(shapes).map(case).collect()
}

#[test]
fn agrees_with_the_definition_in_f64() {
    for (name, case) in cases() {
        let want = case.reference();
        assert_close(&format!("fused, {name}"), &case.run(true), &want);
        assert_close(&format!("unfused, {name}"), &case.run(false), &want);
    }
}

/// Rows without history and candidates without rows do occur above, and give what the contract says.
#[test]
fn empty_histories_attend_to_nothing() {
    let (_, case) = &cases()[0];
    assert!(case.row_length.contains(&0) && case.row_length.iter().any(|length| *length > 1));
    assert!(case.row_offsets.windows(2).any(|pair| pair[0] == pair[1]));
    let out = case.run(true);
    for (row, _) in case.row_length.iter().enumerate().filter(|(_, length)| **length == 0) {
        assert_eq!(out.lse[row], f32::NEG_INFINITY);
        assert!(out.att[row * case.width..][..case.width].iter().all(|x| *x == 0.0));
    }
}

/// Scores far apart and far from 0: the running softmaxes must neither overflow nor lose a short prefix.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let mut case = Case::random(16, [24, 16], &[60, 45, 80], 6, 6, 99);
    case.weights[4].iter_mut().for_each(|w| *w *= 60.0);
    let want = case.reference();
    let spread = want.e.iter().fold(0.0f64, |m, e| m.max(e.abs()));
    assert!(spread > 150.0, "scores only reach {spread}");
    let got = case.run(true);
    // The exponential of a score is known relatively to what the score is known to absolutely.
    for (name, got, want) in
        [("att", &got.att, &want.att), ("ds", &got.ds, &want.ds), ("da", &got.da, &want.da)]
    {
        let error = error(got, want);
        assert!(error < 1e-5 * spread, "{name} is off by {error:.2e}");
    }
    assert!(error(&got.lse, &want.lse) < 1e-5);
}

/// The reference's gradients are those of its own forward.
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
                case.loss(&case.reference_of(inputs, weights.clone()).att)
            });
        }
    }
    for (which, analytic) in reference.weights.iter().enumerate() {
        for (i, analytic) in analytic.iter().enumerate() {
            check(NAMES[which], *analytic, &|step| {
                let mut weights = weights.clone();
                weights[which][i] += step;
                case.loss(&case.reference_of(inputs.clone(), weights).att)
            });
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let lengths: Vec<u32> = (0..120).map(|i| (i * 37) % 90).collect();
    let case = Case::random(32, [80, 40], &lengths, 12, 3, 3);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| case.run(true))
    };
    assert!(run(1) == run(3));
}
