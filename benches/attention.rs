//! The attention operation by sequence length, fused and naive: `cargo bench --bench attention`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dfar::attention::{AttentionError, FhaOptions};
use dfar::bench::attention::Batch;
use std::time::Duration;

type Run = fn(&mut Batch) -> Result<(), AttentionError>;

fn attention(c: &mut Criterion) {
    let passes: [(&str, [(&str, Run); 2]); 2] = [
        ("forward", [("fused", Batch::forward), ("naive", Batch::naive_forward)]),
        ("backward", [("fused", Batch::backward), ("naive", Batch::naive_backward)]),
    ];
    for (pass, forms) in passes {
        let mut group = c.benchmark_group(format!("attention/{pass}"));
        group
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_secs(1))
            .sample_size(10);
        for length in [20, 50, 100, 200, 300, 1024] {
            let mut batch = Batch::new(FhaOptions::new(2, 16), length, 4096);
            batch.forward().expect("the options are valid");
            group.throughput(Throughput::Elements(batch.tokens() as u64));
            for (form, run) in forms {
                group.bench_function(BenchmarkId::new(form, length), |b| b.iter(|| run(&mut batch)));
            }
        }
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
