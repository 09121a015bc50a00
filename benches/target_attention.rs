//! Target attention, fused against the published way, forward and backward, on one thread.
//!
//! `cargo bench --bench target_attention`. The rate is of (history token, candidate) scores. Arithmetic per score
//! at `D = 32`, hidden `(80, 40)`, fused: forward `2 (32*80 + 80*40 + 40)` = 11.6 kFLOP; backward, which computes
//! the activations again, `2 (3*32*80 + 3*80*40 + 3*40)` = 34.8 kFLOP. `peak` is the rate of this core's
//! multiply-add units in FLOP, to compare with.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dfar::device::cpu::simd::{Kernel, Simd, dispatch};
use dfar::device::cpu::target_attention::{self, unfused};
use dfar::device::{Segments, TargetIndex, TargetWeights};
use rand::{RngExt, SeedableRng};
use std::time::Duration;

/// Sequences of one length, every one with the same number of candidates, each read by one row.
struct Workload {
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
    weights: [Vec<f32>; 6],
    datt: Vec<f32>,
    out: Output,
    kept: unfused::Activations,
}

struct Output {
    e: Vec<f32>,
    lse: Vec<f32>,
    att: Vec<f32>,
    ds: Vec<f32>,
    da: Vec<f32>,
    dr: Vec<f32>,
    weights: [Vec<f32>; 6],
}

impl Workload {
    fn new(width: usize, hidden: [usize; 2], sequences: u32, length: u32, candidates: u32) -> Self {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut values = |n: usize, scale: f32| -> Vec<f32> {
            (0..n).map(|_| rng.random_range(-scale..scale)).collect()
        };
        let multiples = |n: u32, step: u32| (0..=n).map(|i| i * step).collect::<Vec<_>>();
        let pairs = sequences * candidates;
        let [tokens, rows, scores] = [sequences * length, pairs, pairs * length].map(|n| n as usize);
        let [h0, h1] = hidden;
        let weights = [
            values(4 * width * h0, 0.2),
            values(h0, 0.1),
            values(h0 * h1, 0.2),
            values(h1, 0.1),
            values(h1, 0.3),
            values(1, 0.1),
        ];
        let zeros = |n: usize| vec![0.0; n];
        Self {
            width,
            hidden,
            cu_seqlens: multiples(sequences, length),
            pair_offsets: multiples(sequences, candidates),
            score_offsets: multiples(pairs, length),
            row_offsets: multiples(pairs, 1),
            members: (0..pairs).collect(),
            row_length: vec![length; rows],
            s: values(tokens * width, 1.0),
            a: values(tokens * width, 1.0),
            r: values(rows * width, 1.0),
            datt: values(rows * width, 1.0),
            out: Output {
                e: zeros(scores),
                lse: zeros(rows),
                att: zeros(rows * width),
                ds: zeros(tokens * width),
                da: zeros(tokens * width),
                dr: zeros(rows * width),
                weights: weights.each_ref().map(|w| zeros(w.len())),
            },
            weights,
            kept: unfused::Activations::default(),
        }
    }

    fn scores(&self) -> u64 {
        self.out.e.len() as u64
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

    fn forward(&mut self, fused: bool) {
        let mut out = std::mem::replace(&mut self.out, Output::empty());
        let mut kept = std::mem::take(&mut self.kept);
        let Output { e, lse, att, .. } = &mut out;
        let (d, hidden, s, a, r, w) =
            (self.width, self.hidden, &self.s, &self.a, &self.r, weights(&self.weights));
        if fused {
            target_attention::forward(d, hidden, self.index(), s, a, r, w, e, lse, att);
        } else {
            unfused::forward(d, hidden, self.index(), s, a, r, w, e, lse, att, &mut kept);
        }
        (self.out, self.kept) = (out, kept);
    }

    fn backward(&mut self, fused: bool) {
        let mut out = std::mem::replace(&mut self.out, Output::empty());
        let mut kept = std::mem::take(&mut self.kept);
        let Output { e, lse, att, ds, da, dr, weights: dw } = &mut out;
        let [w0, b0, w1, b1, w2, b2] = dw.each_mut().map(|w| &mut w[..]);
        let dw = TargetWeights { w0, b0, w1, b1, w2, b2 };
        let (d, hidden, s, a, r, w) =
            (self.width, self.hidden, &self.s, &self.a, &self.r, weights(&self.weights));
        let g = &self.datt;
        let i = self.index();
        if fused {
            target_attention::backward(d, hidden, i, s, a, r, w, e, lse, att, g, ds, da, dr, dw);
        } else {
            unfused::backward(d, hidden, i, s, a, r, w, e, lse, att, g, ds, da, dr, dw, &mut kept);
        }
        (self.out, self.kept) = (out, kept);
    }
}

impl Output {
    fn empty() -> Self {
        let [e, lse, att, ds, da, dr] = std::array::from_fn(|_| Vec::new());
        Self { e, lse, att, ds, da, dr, weights: Default::default() }
    }
}

fn weights(weights: &[Vec<f32>; 6]) -> TargetWeights<&[f32]> {
    let [w0, b0, w1, b1, w2, b2] = weights.each_ref().map(|w| &w[..]);
    TargetWeights { w0, b0, w1, b1, w2, b2 }
}

/// Independent multiply-adds in registers.
struct Peak;
const PEAK_STEPS: usize = 100_000;
const PEAK_CHAINS: usize = 12;

impl Kernel for Peak {
    type Output = (f32, u64);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, u64) {
        let (x, y) = (s.splat(std::hint::black_box(0.999)), s.splat(std::hint::black_box(0.001)));
        let mut sums = [s.zero(); PEAK_CHAINS];
        for _ in 0..PEAK_STEPS {
            for sum in &mut sums {
                *sum = s.mul_add(*sum, x, y);
            }
        }
        let mut total = s.zero();
        for sum in sums {
            total = s.add(total, sum);
        }
        (s.sum(total), (2 * S::LANES * PEAK_CHAINS * PEAK_STEPS) as u64)
    }
}

fn benchmark(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("peak");
    group.throughput(Throughput::Elements(dispatch(Peak).1));
    group.bench_function("multiply-add", |b| b.iter(|| dispatch(Peak).0));
    group.finish();

    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for (length, candidates) in [(100, 10), (20, 10)] {
        let mut workload = Workload::new(32, [80, 40], 3200 / length, length, candidates);
        let name = format!("D 32, hidden (80, 40), {length} tokens, {candidates} candidates");
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(workload.scores()));
        for (name, fused) in [("fused", true), ("unfused", false)] {
            group.bench_function(format!("{name} forward"), |b| {
                b.iter(|| one.install(|| workload.forward(fused)));
            });
            // The last forward kept what this backward reads.
            group.bench_function(format!("{name} backward"), |b| {
                b.iter(|| one.install(|| workload.backward(fused)));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).sample_size(30);
    targets = benchmark
}
criterion_main!(benches);
