//! Target attention on one thread, forward and backward: fused, and unfused as published.
//!
//! `cargo bench --bench target_attention`. The unit of throughput is one (history token, candidate)
//! score. Arithmetic per score at `D = 32`, hidden `(80, 40)`, fused: forward
//! `2 (32*80 + 80*40 + 40)` = 11.6 kFLOP; backward, which recomputes the activations,
//! `2 (3*32*80 + 3*80*40 + 2*40)` = 34.7 kFLOP; work shared by candidates or by tokens is not
//! counted. `peak` measures the FLOP rate of this core's multiply-add units for comparison.

#[path = "../tests/bodies/target_attention.rs"]
#[allow(dead_code)] // used only by tests
mod bodies;

use bodies::{Case, Output};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dfar::device::TargetState;
use dfar::device::cpu::product::F32;
use dfar::device::cpu::target_attention::{self, unfused::Unfused};
use dfar::simd::{Kernel, Simd, dispatch};
use rand::{RngExt, SeedableRng};
use std::time::Duration;

/// Sequences of equal length, each with the same number of candidates; one row reads each
/// candidate.
struct Workload {
    case: Case,
    out: Output<f32>,
    unfused: Unfused,
}

impl Workload {
    fn new(width: usize, hidden: [usize; 2], sequences: u32, length: u32, candidates: u32) -> Self {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut values =
            |n: usize, scale: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-scale..scale)).collect() };
        let multiples = |n: u32, step: u32| (0..=n).map(|i| i * step).collect::<Vec<_>>();
        let pairs = sequences * candidates;
        let [tokens, rows, scores] = [sequences * length, pairs, pairs * length].map(|n| n as usize);
        let [h0, h1] = hidden;
        let case = Case {
            half_life: 0.0,
            width,
            hidden,
            cu_seqlens: multiples(sequences, length),
            pair_offsets: multiples(sequences, candidates),
            score_offsets: multiples(pairs, length),
            row_offsets: multiples(pairs, 1),
            members: (0..pairs).collect(),
            row_length: vec![length; rows],
            weights: [
                values(4 * width * h0, 0.2),
                values(h0, 0.1),
                values(h0 * h1, 0.2),
                values(h1, 0.1),
                values(h1, 0.3),
                values(1, 0.1),
            ],
            s: values(tokens * width, 1.0),
            a: values(tokens * width, 1.0),
            r: values(rows * width, 1.0),
            datt: values(rows * width, 1.0),
        };
        let zeros = |n: usize| vec![0.0; n];
        let out = Output {
            e: zeros(scores),
            lse: zeros(rows),
            att: zeros(rows * width),
            ds: zeros(tokens * width),
            da: zeros(tokens * width),
            dr: zeros(rows * width),
            weights: case.weights.each_ref().map(|w| zeros(w.len())),
        };
        let unfused = Unfused::new(case.shape());
        Self { case, out, unfused }
    }

    fn scores(&self) -> u64 {
        self.out.e.len() as u64
    }

    fn forward(&mut self, fused: bool) {
        let Self { case, out, unfused } = self;
        let (index, inputs, weights) = (case.index(), case.inputs(), case.weights());
        let (state, _) = out.buffers();
        if fused {
            target_attention::forward(F32, case.shape(), index, inputs, weights, state);
        } else {
            unfused.forward(index, inputs, weights, state);
        }
    }

    fn backward(&mut self, fused: bool) {
        let Self { case, out, unfused } = self;
        let (index, inputs, weights) = (case.index(), case.inputs(), case.weights());
        let (TargetState { e, lse, att }, gradients) = out.buffers();
        let state = TargetState { e: &*e, lse: &*lse, att: &*att };
        if fused {
            let shape = case.shape();
            target_attention::backward(F32, shape, index, inputs, weights, state, &case.datt, gradients);
        } else {
            unfused.backward(index, inputs, weights, state, &case.datt, gradients);
        }
    }
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
            // Reads the results of the last forward pass.
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
