//! Target attention on every device: cases, the definition in f64, and tolerances.

use dfar::device::{
    Device, Segments, TargetGradients, TargetIndex, TargetInputs, TargetShape, TargetState, TargetWeights,
};
use half::bf16;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The owned arguments of one call.
pub struct Case {
    pub width: usize,
    pub hidden: [usize; 2],
    pub half_life: f32,
    pub cu_seqlens: Vec<u32>,
    pub pair_offsets: Vec<u32>,
    pub score_offsets: Vec<u32>,
    pub row_offsets: Vec<u32>,
    pub members: Vec<u32>,
    pub row_length: Vec<u32>,
    pub s: Vec<f32>,
    pub a: Vec<f32>,
    pub r: Vec<f32>,
    /// In the order of [`TargetWeights`].
    pub weights: [Vec<f32>; 6],
    pub datt: Vec<f32>,
}

/// Results of both passes.
#[derive(Clone, Default, PartialEq)]
pub struct Output<T> {
    pub e: Vec<T>,
    pub lse: Vec<T>,
    pub att: Vec<T>,
    pub ds: Vec<T>,
    pub da: Vec<T>,
    pub dr: Vec<T>,
    pub weights: [Vec<T>; 6],
}

pub const NAMES: [&str; 6] = ["w0", "b0", "w1", "b1", "w2", "b2"];

/// Initial values of `ds`, to which the backward pass adds.
pub fn ds_before(i: usize) -> f32 {
    (i % 7) as f32 * 0.125
}

pub fn last(offsets: &[u32]) -> usize {
    offsets[offsets.len() - 1] as usize
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

impl Output<f32> {
    /// Buffers of the forward pass, then of the backward pass.
    pub fn buffers(&mut self) -> (TargetState<&mut [f32]>, TargetGradients<&mut [f32]>) {
        let Self { e, lse, att, ds, da, dr, weights } = self;
        let [w0, b0, w1, b1, w2, b2] = weights.each_mut().map(|w| &mut w[..]);
        let weights = TargetWeights { w0, b0, w1, b1, w2, b2 };
        (TargetState { e, lse, att }, TargetGradients { ds, da, dr, weights })
    }
}

impl Case {
    /// Sequences of the given lengths, each with up to `pairs` pairs, each with up to `rows` rows.
    /// The lengths of pairs and rows are random, the row numbers shuffled.
    pub fn random(
        width: usize,
        hidden: [usize; 2],
        lengths: &[u32],
        pairs: u32,
        rows: u32,
        seed: u64,
    ) -> Self {
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
            half_life: 0.0,
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

    pub fn shape(&self) -> TargetShape {
        TargetShape { width: self.width, hidden: self.hidden, half_life: self.half_life }
    }

    pub fn index(&self) -> TargetIndex<&[u32]> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: Segments { offsets: &self.row_offsets[..], members: &self.members[..] },
            row_length: &self.row_length,
        }
    }

    pub fn weights(&self) -> TargetWeights<&[f32]> {
        let [w0, b0, w1, b1, w2, b2] = self.weights.each_ref().map(|w| &w[..]);
        TargetWeights { w0, b0, w1, b1, w2, b2 }
    }

    pub fn inputs(&self) -> TargetInputs<&[f32]> {
        TargetInputs { s: &self.s, a: &self.a, r: &self.r }
    }

    /// Runs both passes on a device.
    pub fn run_on<D: Device>(&self, device: &D) -> Output<f32> {
        let up = |x: &[f32]| device.upload(x).expect("room");
        let room = |n: usize| device.alloc::<f32>(n).expect("room");
        let mut staging = device.staging().expect("room");
        let plan = device.target_plan(&mut staging, self.shape(), self.index()).expect("a plan");
        device.send(staging).expect("sent");
        let (s, a, r, datt) = (up(&self.s), up(&self.a), up(&self.r), up(&self.datt));
        let w = self.weights.each_ref().map(|w| up(w));
        let weights = || {
            let [w0, b0, w1, b1, w2, b2] = w.each_ref();
            TargetWeights { w0, b0, w1, b1, w2, b2 }
        };
        let rows = self.row_length.len();
        let (mut e, mut lse, mut att) =
            (room(last(&self.score_offsets)), room(rows), room(rows * self.width));
        let inputs = TargetInputs { s: &s, a: &a, r: &r };
        let state = TargetState { e: &mut e, lse: &mut lse, att: &mut att };
        device.target_attention(&plan, inputs, weights(), state).expect("forward");
        let mut ds = up(&(0..self.s.len()).map(ds_before).collect::<Vec<_>>());
        let (mut da, mut dr) = (room(self.a.len()), room(self.r.len()));
        let mut dw = self.weights.each_ref().map(|w| room(w.len()));
        let [w0, b0, w1, b1, w2, b2] = dw.each_mut();
        let gradients = TargetGradients {
            ds: &mut ds,
            da: &mut da,
            dr: &mut dr,
            weights: TargetWeights { w0, b0, w1, b1, w2, b2 },
        };
        let state = TargetState { e: &e, lse: &lse, att: &att };
        device
            .target_attention_backward(&plan, inputs, weights(), state, &datt, gradients)
            .expect("backward");
        let down = |x: &D::Buffer<f32>| device.download(x).expect("written everywhere");
        Output {
            e: down(&e),
            lse: down(&lse),
            att: down(&att),
            ds: down(&ds),
            da: down(&da),
            dr: down(&dr),
            weights: dw.each_ref().map(down),
        }
    }

    /// The definition in f64.
    pub fn reference(&self) -> Output<f64> {
        let inputs = [&self.s, &self.a, &self.r].map(|x| wide(x));
        self.reference_of(inputs, self.weights.each_ref().map(|w| wide(w)), |x| x)
    }

    /// The unfused computation with all factors of its products rounded to bf16.
    pub fn in_bf16(&self) -> Output<f64> {
        let inputs = [&self.s, &self.a, &self.r].map(|x| wide(x));
        self.reference_of(inputs, self.weights.each_ref().map(|w| wide(w)), |x| bf16::from_f64(x).to_f64())
    }

    #[allow(clippy::needless_range_loop)]
    pub fn reference_of(
        &self,
        [s, a, r]: [Vec<f64>; 3],
        weights: [Vec<f64>; 6],
        round: impl Fn(f64) -> f64,
    ) -> Output<f64> {
        let (d, [h0, h1]) = (self.width, self.hidden);
        let [mut w0, b0, mut w1, b1, mut w2, b2] = weights.clone();
        for w in [&mut w0, &mut w1, &mut w2] {
            w.iter_mut().for_each(|w| *w = round(*w));
        }
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
                    x.iter_mut().for_each(|x| *x = round(*x));
                    let rounded = |y: Vec<f64>| y.into_iter().map(&round).collect::<Vec<_>>();
                    let y0 = rounded(relu(dense(&x, &w0, &b0)));
                    let y1 = rounded(relu(dense(&y0, &w1, &b1)));
                    out.e.push(dense(&y1, &w2, &b2)[0]);
                    activations.push([x, y0, y1]);
                }
                if self.half_life > 0.0 {
                    let slope = std::f64::consts::LN_2 / f64::from(self.half_life);
                    let scores = out.e.iter_mut().rev().take(length);
                    scores.enumerate().for_each(|(later, e)| *e -= slope * later as f64);
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
                        dy1[j] = if y1[j] > 0.0 { round(de[t] * w2[j]) } else { 0.0 };
                        db1[j] += dy1[j];
                    }
                    let mut dy0 = vec![0.0; h0];
                    for i in 0..h0 {
                        for j in 0..h1 {
                            dw1[i * h1 + j] += y0[i] * dy1[j];
                            dy0[i] += if y0[i] > 0.0 { dy1[j] * w1[i * h1 + j] } else { 0.0 };
                        }
                        dy0[i] = round(dy0[i]);
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

    pub fn loss(&self, att: &[f64]) -> f64 {
        att.iter().zip(&self.datt).map(|(x, y)| x * f64::from(*y)).sum()
    }
}

/// Largest error, relative to the largest value of `want`. Infinite if only one of two values is
/// finite.
pub fn error(got: &[f32], want: &[f64]) -> f64 {
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
pub fn assert_close(what: &str, got: &Output<f32>, want: &Output<f64>) {
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

/// Width, hidden widths, lengths, maximum number of pairs per sequence and of rows per pair.
type Shape<'a> = (usize, [usize; 2], &'a [u32], u32, u32);

/// One named case per shape, with seeds from `first` on.
fn made(first: u64, shapes: &[Shape]) -> Vec<(String, Case)> {
    let case = |(seed, &(width, hidden, lengths, pairs, rows)): (u64, &Shape)| {
        // Some with a half-life.
        let half_life = [0.0, 0.0, 9.0][seed as usize % 3];
        let name = format!("D = {width}, hidden {hidden:?}, lengths {lengths:?}, half-life {half_life}");
        (name, Case { half_life, ..Case::random(width, hidden, lengths, pairs, rows, seed) })
    };
    (first..).zip(shapes).map(case).collect()
}

/// Widths and hidden layers around vector widths, empty and one-token sequences, lengths around
/// tiles, many rows per pair, and empty batches.
pub fn cases() -> Vec<(String, Case)> {
    let short = [5, 0, 1, 12, 3, 9, 2, 30];
    let long = [70, 0, 200, 1, 64, 129, 33, 65, 150, 90];
    let shapes: [Shape; 11] = [
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
    made(0, &shapes)
}

/// Shapes for which the tests of the kernels compile: widths that are a multiple of 4 or not, more
/// pairs than one item of work has, no pairs, rows that share a pair, and empty batches.
pub fn kernel_cases() -> Vec<(String, Case)> {
    let short = [5, 0, 1, 12, 3, 9, 2, 30];
    let long = [70, 0, 33, 1, 64, 16, 17];
    let shapes: [Shape; 11] = [
        (8, [7, 4], &short, 4, 3),
        (1, [1, 1], &short, 3, 2),
        (5, [13, 6], &short, 3, 2),
        (16, [16, 8], &[20, 40, 33], 75, 1),
        (16, [80, 40], &long, 3, 4),
        (32, [80, 40], &long, 10, 2),
        (32, [80, 40], &[20; 6], 10, 1),
        (50, [40, 20], &long, 3, 2),
        (32, [80, 40], &[50; 2], 4, 40),
        (32, [80, 40], &[], 4, 4),
        (32, [80, 40], &[0, 0], 4, 4),
    ];
    made(100, &shapes)
}

/// Errors of a computation in bf16 and of the unfused one, over several cases.
///
/// A ReLU with an input within rounding of 0 may be active in only one of them, which changes a
/// gradient by more than rounding. This happens at random, so gradients are compared over all cases
/// together, forward results per case.
#[derive(Default)]
pub struct InBf16 {
    squares: [[f64; 8]; 2],
}

impl InBf16 {
    /// Adds a case.
    #[track_caller]
    pub fn add(&mut self, what: &str, got: &Output<f32>, want: &Output<f64>, unfused: &Output<f64>) {
        let errors = |got: &[f32], unfused: &[f64], want: &[f64]| {
            let unfused: Vec<f32> = unfused.iter().map(|x| *x as f32).collect();
            [error(got, want), error(&unfused, want)]
        };
        for (name, [found, unfused]) in [
            ("e", errors(&got.e, &unfused.e, &want.e)),
            ("lse", errors(&got.lse, &unfused.lse, &want.lse)),
            ("att", errors(&got.att, &unfused.att, &want.att)),
            ("ds", errors(&got.ds, &unfused.ds, &want.ds)),
        ] {
            let limit = 2.0 * unfused + 1e-5;
            assert!(
                found <= limit,
                "{what}: {name} is off by {found:.2e} of the largest value, allowed are {limit:.2e}"
            );
        }
        let weights = (0..6).map(|i| errors(&got.weights[i], &unfused.weights[i], &want.weights[i]));
        let inputs = [errors(&got.da, &unfused.da, &want.da), errors(&got.dr, &unfused.dr, &want.dr)];
        for (i, errors) in inputs.into_iter().chain(weights).enumerate() {
            for (sum, error) in self.squares.iter_mut().zip(errors) {
                sum[i] += error * error;
            }
        }
    }

    /// Asserts that the errors of the gradients are at most twice those of the unfused computation.
    pub fn assert(&self) {
        let names = ["da", "dr"].into_iter().chain(NAMES);
        for (i, name) in names.enumerate() {
            let [found, unfused] = self.squares.map(|sum| sum[i].sqrt());
            assert!(found <= 2.0 * unfused, "{name} is off by {found:.2e}, but unfused by {unfused:.2e}");
        }
    }
}
